//! Where does a body end whose length nobody knew beforehand? The chunked coding (RFC 9112, 7.1), both ways.
//!
//! Read strictly: sizes are bare hexadecimal digits that fit 64 bits, every line ends in CR LF, the data of a chunk is followed by
//! CR LF and by nothing else (CVE-2025-43859 was exactly that check missing). Extensions are skipped, but counted over the whole
//! body, so that nobody hides a flood in them. Data is passed on as slices, never gathered.
use crate::error::{Error, Result};
use crate::http1::response::{parse_fields, Field, LineScan, MAX_HEAD};

/// Bytes of chunk extensions in one body; real senders use none.
const MAX_EXTENSIONS: u32 = 16 * 1024;

pub fn write(data: &[u8], is_last: bool, out: &mut Vec<u8>) {
    if !data.is_empty() {
        out.reserve(data.len() + 24);
        let mut digits = [0u8; 16];
        let mut size = data.len();
        let mut count = 0;
        for slot in digits.iter_mut().rev() {
            *slot = char::from_digit((size & 15) as u32, 16).map_or(b'0', |digit| digit as u8);
            count += 1;
            size >>= 4;
            if size == 0 {
                break;
            }
        }
        out.extend_from_slice(digits.get(digits.len() - count..).unwrap_or_default());
        out.extend_from_slice(b"\r\n");
        out.extend_from_slice(data);
        out.extend_from_slice(b"\r\n");
    }
    if is_last {
        out.extend_from_slice(b"0\r\n\r\n");
    }
}

#[derive(Debug, Default)]
enum State {
    #[default]
    SizeStart,
    Size(u64),
    Extension(u64),
    SizeLf(u64),
    Data(u64),
    DataCr,
    DataLf,
    Trailers,
    Done,
}

#[derive(Debug, Default)]
pub struct Decoder {
    state: State,
    digits: u8,
    extensions: u32,
    trailers: Vec<u8>,
    scan: LineScan,
}

impl Decoder {
    pub fn is_done(&self) -> bool {
        matches!(self.state, State::Done)
    }

    /// Takes bytes, passes data on, and says how many bytes belong to this body.
    pub fn read(&mut self, bytes: &[u8], mut data: impl FnMut(&[u8])) -> Result<usize> {
        let mut rest = bytes;
        loop {
            if let State::Data(left) = &mut self.state {
                let take = usize::try_from(*left).map_or(rest.len(), |left| left.min(rest.len()));
                let (piece, after) = rest.split_at_checked(take).unwrap_or((rest, &[]));
                if !piece.is_empty() {
                    data(piece);
                }
                *left -= take as u64;
                if *left == 0 {
                    self.state = State::DataCr;
                }
                rest = after;
            }
            if matches!(self.state, State::Trailers) {
                let used = self.read_trailers(rest)?;
                rest = rest.get(used..).unwrap_or_default();
            }
            if self.is_done() {
                return Ok(bytes.len() - rest.len());
            }
            let Some((&byte, after)) = rest.split_first() else {
                return Ok(bytes.len());
            };
            rest = after;
            self.state = self.next(byte)?;
        }
    }

    /// The trailer fields; called once, when the body is done.
    pub fn trailers(&self, with: impl FnOnce(&[Field<'_>])) -> Result<()> {
        parse_fields(&self.trailers, with)
    }

    fn next(&mut self, byte: u8) -> Result<State> {
        Ok(match (&self.state, byte) {
            (State::SizeStart, _) => match hex(byte) {
                Some(digit) => {
                    self.digits = 1;
                    State::Size(digit)
                }
                None => return Err(Error::protocol("A chunk's size is not a hexadecimal number.")),
            },
            (State::Size(size), b'\r') => State::SizeLf(*size),
            (State::Size(size), b';') => State::Extension(*size),
            (State::Size(size), _) => match hex(byte) {
                Some(digit) if self.digits < 16 => {
                    self.digits += 1;
                    State::Size((size << 4) | digit)
                }
                Some(_) => return Err(Error::protocol("A chunk's size has more than 16 digits.")),
                None => return Err(Error::protocol("A chunk's size is not a hexadecimal number.")),
            },
            (State::Extension(size), b'\r') => State::SizeLf(*size),
            (State::Extension(size), _) => {
                self.extensions += 1;
                if self.extensions > MAX_EXTENSIONS {
                    return Err(Error::protocol("The chunk extensions of one body exceed 16 KiB."));
                }
                if byte == 0x7f || (byte < 0x20 && byte != b'\t') {
                    return Err(Error::protocol("A chunk extension holds a control character."));
                }
                State::Extension(*size)
            }
            (State::SizeLf(0), b'\n') => State::Trailers,
            (State::SizeLf(size), b'\n') => State::Data(*size),
            (State::DataCr, b'\r') => State::DataLf,
            (State::DataLf, b'\n') => State::SizeStart,
            _ => return Err(Error::protocol("A chunk does not end in CR LF.")),
        })
    }

    /// Gathers the trailer section; an empty one is just CR LF.
    fn read_trailers(&mut self, bytes: &[u8]) -> Result<usize> {
        let room = MAX_HEAD.saturating_sub(self.trailers.len());
        let piece = bytes.get(..bytes.len().min(room)).unwrap_or_default();
        let before = self.trailers.len();
        self.trailers.extend_from_slice(piece);
        if let Some(end) = self.scan.find_end(&self.trailers, true)? {
            self.trailers.truncate(end);
            self.state = State::Done;
            return Ok(end - before);
        }
        if self.trailers.len() >= MAX_HEAD {
            return Err(Error::protocol("The trailers exceed 60 KiB."));
        }
        Ok(piece.len())
    }
}

fn hex(byte: u8) -> Option<u64> {
    char::from(byte).to_digit(16).map(u64::from)
}
