//! Where does the head of an answer end, and how long is its body?
//!
//! httparse reads the fields; this file adds what it leaves open: no bare LF, no empty lines before the status line, caps on size
//! and number of fields, and one answer to "how long is the body" (RFC 9112, 6.3) that refuses every combination in which two
//! parsers could see two different messages.
use std::mem::MaybeUninit;

use crate::error::{Error, Result};

/// Bytes and fields in one head (or trailer section): the caps of Envoy.
pub const MAX_HEAD: usize = 60 * 1024;
pub const MAX_FIELDS: usize = 100;

pub type Field<'a> = httparse::Header<'a>;

pub struct Head<'h, 'b> {
    pub status: u16,
    pub minor: u8,
    pub reason: &'b [u8],
    pub fields: &'h [Field<'b>],
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BodyLength {
    Exactly(u64),
    Chunked,
    UntilClose,
}

/// Gathers a head that comes in pieces; one that comes whole is read where it lies.
#[derive(Debug, Default)]
pub struct HeadReader {
    partial: Vec<u8>,
    scan: LineScan,
}

impl HeadReader {
    /// Reads from `bytes`, says in `used` how many of them it took, and calls `with` once the head is whole.
    pub fn read<T>(
        &mut self,
        bytes: &[u8],
        used: &mut usize,
        with: impl FnOnce(&Head<'_, '_>) -> Result<T>,
    ) -> Result<Option<T>> {
        if self.partial.is_empty() {
            let whole = bytes.get(..bytes.len().min(MAX_HEAD)).unwrap_or_default();
            let mut length = 0;
            if let Some(answer) = parse(whole, &mut length, with)? {
                *used = length;
                return Ok(Some(answer));
            }
            if bytes.len() >= MAX_HEAD {
                return Err(too_long());
            }
            // The scan starts here, so that a bare LF is seen before a head that never ends has filled the buffer.
            self.partial.extend_from_slice(bytes);
            self.scan.find_end(&self.partial, false)?;
            *used = bytes.len();
            return Ok(None);
        }
        let before = self.partial.len();
        let piece = bytes.get(..bytes.len().min(MAX_HEAD - before)).unwrap_or_default();
        self.partial.extend_from_slice(piece);
        let Some(end) = self.scan.find_end(&self.partial, false)? else {
            if self.partial.len() >= MAX_HEAD {
                return Err(too_long());
            }
            *used = piece.len();
            return Ok(None);
        };
        *used = end - before;
        match parse(self.partial.get(..end).unwrap_or_default(), &mut 0, with)? {
            Some(answer) => Ok(Some(answer)),
            None => Err(Error::protocol("The head of the answer can't be read.")),
        }
    }
}

fn parse<T>(bytes: &[u8], length: &mut usize, with: impl FnOnce(&Head<'_, '_>) -> Result<T>) -> Result<Option<T>> {
    // httparse skips empty lines before the status line; another reader might not.
    match bytes.first() {
        Some(b'H') => {}
        Some(0x14..=0x17) => {
            return Err(Error::protocol("The peer answered with TLS on a connection without TLS."));
        }
        _ => return Err(Error::protocol("The answer does not begin with an HTTP status line.")),
    }
    let mut fields = [const { MaybeUninit::uninit() }; MAX_FIELDS];
    let mut response = httparse::Response::new(&mut []);
    let status =
        httparse::ParserConfig::default().parse_response_with_uninit_headers(&mut response, bytes, &mut fields);
    let end = match status {
        Ok(httparse::Status::Complete(end)) => end,
        Ok(httparse::Status::Partial) => return Ok(None),
        Err(httparse::Error::TooManyHeaders) => {
            return Err(Error::protocol("The answer has more than 100 header fields."));
        }
        Err(error) => return Err(Error::protocol(format!("The head of the answer is malformed: {error}."))),
    };
    LineScan::default().find_end(bytes.get(..end).unwrap_or_default(), false)?;
    *length = end;
    let head = Head {
        status: response.code.unwrap_or_default(),
        minor: response.version.unwrap_or_default(),
        reason: response.reason.unwrap_or_default().as_bytes(),
        fields: response.headers,
    };
    if head.status < 100 {
        return Err(Error::protocol(format!("The answer has the impossible status {:03}.", head.status)));
    }
    with(&head).map(Some)
}

/// Reads a block of fields that ends in an empty line, such as trailers.
pub fn parse_fields(bytes: &[u8], with: impl FnOnce(&[Field<'_>])) -> Result<()> {
    let mut fields = [httparse::EMPTY_HEADER; MAX_FIELDS];
    match httparse::parse_headers(bytes, &mut fields) {
        Ok(httparse::Status::Complete((_, fields))) => {
            with(fields);
            Ok(())
        }
        Err(httparse::Error::TooManyHeaders) => Err(Error::protocol("The answer has more than 100 trailer fields.")),
        _ => Err(Error::protocol("The trailers are malformed.")),
    }
}

/// RFC 9112, 6.3, without its leniency.
pub fn body_length(head: &Head<'_, '_>, is_head_request: bool) -> Result<BodyLength> {
    let mut length = None;
    let mut is_chunked = false;
    for field in head.fields {
        if field.name.len() == 14 && field.name.eq_ignore_ascii_case("content-length") {
            if length.is_some() {
                return Err(Error::protocol("The answer has more than one content-length."));
            }
            length =
                Some(parse_length(field.value).ok_or_else(|| {
                    Error::protocol("The content-length of the answer is not a plain decimal number.")
                })?);
        } else if field.name.len() == 17 && field.name.eq_ignore_ascii_case("transfer-encoding") {
            if is_chunked || !field.value.eq_ignore_ascii_case(b"chunked") {
                return Err(Error::protocol("The transfer-encoding of the answer is not exactly \"chunked\"."));
            }
            is_chunked = true;
        }
    }
    if is_chunked && length.is_some() {
        return Err(Error::protocol("The answer has both content-length and transfer-encoding."));
    }
    if is_chunked && head.minor == 0 {
        return Err(Error::protocol("An HTTP/1.0 answer has a transfer-encoding."));
    }
    if is_head_request || head.status < 200 || head.status == 204 || head.status == 304 {
        return Ok(BodyLength::Exactly(0));
    }
    Ok(match (is_chunked, length) {
        (true, _) => BodyLength::Chunked,
        (false, Some(length)) => BodyLength::Exactly(length),
        (false, None) => BodyLength::UntilClose,
    })
}

/// Digits and nothing else: no sign, no list, no space inside, no overflow.
pub fn parse_length(value: &[u8]) -> Option<u64> {
    if value.is_empty() || value.len() > 19 {
        return None;
    }
    value.iter().try_fold(0u64, |sum, byte| {
        byte.is_ascii_digit().then(|| sum.wrapping_mul(10).wrapping_add(u64::from(byte - b'0')))
    })
}

/// Whether the peer means to keep the connection open.
pub fn is_persistent(head: &Head<'_, '_>) -> bool {
    let mut is_kept = head.minor > 0;
    for field in head.fields {
        if field.name.len() == 10 && field.name.eq_ignore_ascii_case("connection") {
            if has_token(field.value, b"close") {
                return false;
            }
            is_kept |= has_token(field.value, b"keep-alive");
        }
    }
    is_kept
}

pub fn has_token(value: &[u8], token: &[u8]) -> bool {
    value.split(|byte| *byte == b',').any(|item| item.trim_ascii().eq_ignore_ascii_case(token))
}

/// Walks the lines of a growing buffer, each byte once: finds the empty line and refuses a LF without CR.
#[derive(Debug, Default)]
pub struct LineScan {
    scanned: usize,
    line_start: usize,
}

impl LineScan {
    /// The end of the block, after its empty line. `can_be_empty`: the empty line may be the first one (trailers).
    pub fn find_end(&mut self, buffer: &[u8], can_be_empty: bool) -> Result<Option<usize>> {
        let unseen = buffer.get(self.scanned..).unwrap_or_default();
        let base = self.scanned;
        for at in memchr::memchr_iter(b'\n', unseen) {
            let at = base + at;
            if at == 0 || buffer.get(at - 1) != Some(&b'\r') {
                return Err(Error::protocol("A line of the answer ends in LF without CR."));
            }
            let is_empty_line = at - self.line_start == 1;
            if is_empty_line && (can_be_empty || self.line_start > 0) {
                return Ok(Some(at + 1));
            }
            self.line_start = at + 1;
        }
        self.scanned = buffer.len();
        Ok(None)
    }
}

fn too_long() -> Error {
    Error::protocol("The head of the answer exceeds 60 KiB.")
}
