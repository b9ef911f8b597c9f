//! Which bytes make a request, and which answer is in these bytes? HTTP/1.1 on the client's side, one exchange at a time.
//!
//! A codec of our own on httparse instead of hyper over in-memory I/O: a third of the cost a message, and every decision about
//! where a message ends is in this folder. It is strict where parsers are known to disagree (RFC 9112 leaves them room, smuggling
//! lives in it): what is ambiguous is an error, never a guess. It never pipelines: a byte that comes while nothing is asked makes
//! the connection unusable.
//!
//! It does no I/O and keeps no body: what arrives goes to the `Sink` as slices of the caller's buffer.
pub mod chunked;
pub mod guard;
pub mod request;
pub mod response;

use crate::error::{Error, ErrorKind, Result};
use crate::sink::Sink;
use chunked::Decoder;
use request::{Plan, Request};
use response::{BodyLength, HeadReader};

/// Interim (1xx) answers to one request; more is a peer that plays with us.
pub const MAX_INTERIM: u8 = 16;

/// What the next byte from the peer belongs to.
#[derive(Debug)]
enum Reading {
    Idle,
    Head(HeadReader),
    Length(u64),
    Chunked(Decoder),
    UntilClose,
    Upgraded,
    Over,
}

/// What the next byte of our body belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Writing {
    Done,
    Length(u64),
    Chunked,
    Raw,
    /// The answer was complete before the request: what follows of it is for nobody.
    Dropped,
}

/// One connection's exchanges. State: Idle → Head → body → Idle, or → Over from anywhere.
#[derive(Debug)]
pub struct Http1 {
    reading: Reading,
    writing: Writing,
    is_head_request: bool,
    is_persistent: bool,
    offers_upgrade: bool,
    interim: u8,
    has_received: bool,
}

impl Default for Http1 {
    fn default() -> Self {
        Http1 {
            reading: Reading::Idle,
            writing: Writing::Done,
            is_head_request: false,
            is_persistent: true,
            offers_upgrade: false,
            interim: 0,
            has_received: false,
        }
    }
}

impl Http1 {
    pub fn is_idle(&self) -> bool {
        matches!(self.reading, Reading::Idle)
    }

    /// The protocol was changed, and the bytes are the application's.
    pub fn is_upgraded(&self) -> bool {
        matches!(self.reading, Reading::Upgraded)
    }

    pub fn is_over(&self) -> bool {
        matches!(self.reading, Reading::Over)
    }

    /// Whether the peer answered before it had the whole request.
    pub fn drops_body(&self) -> bool {
        self.writing == Writing::Dropped
    }

    /// Whether a byte of the answer to the current (or last) request has come.
    pub fn has_received(&self) -> bool {
        self.has_received
    }

    /// No exchange any more, whatever comes.
    pub fn stop(&mut self) {
        self.reading = Reading::Over;
        self.writing = Writing::Done;
    }

    /// Begins an exchange: writes the request's head and a small body. A large one is returned, to be written right behind.
    pub fn send<'a>(&mut self, request: &Request<'a>, out: &mut Vec<u8>) -> Result<&'a [u8]> {
        if !self.is_idle() {
            return Err(Error::misuse(
                "A request was sent while the connection is not idle.",
                "Wait for the end of the exchange, or take another connection: requests are never pipelined.",
            ));
        }
        let start = out.len();
        let plan = match request::write(request, out) {
            Ok(plan) => plan,
            Err(error) => {
                out.truncate(start);
                return Err(error);
            }
        };
        let Plan { rest, writing, is_head, asks_close, offers_upgrade } = plan;
        self.writing = writing;
        self.is_head_request = is_head;
        self.is_persistent = !asks_close;
        self.offers_upgrade = offers_upgrade;
        self.interim = 0;
        self.has_received = false;
        self.reading = Reading::Head(HeadReader::default());
        Ok(rest)
    }

    /// Frames a piece of a streamed body.
    pub fn send_body(&mut self, data: &[u8], is_last: bool, out: &mut Vec<u8>) -> Result<()> {
        match self.writing {
            Writing::Dropped => Ok(()),
            Writing::Done if data.is_empty() => Ok(()),
            Writing::Done => Err(Error::misuse(
                "A piece of body was sent, but the request has ended.",
                "Send the pieces after a request with streaming=True and before the one that is the last.",
            )),
            Writing::Raw => {
                out.extend_from_slice(data);
                Ok(())
            }
            Writing::Length(left) => {
                let left = left.checked_sub(data.len() as u64).ok_or_else(|| {
                    Error::misuse(
                        "The body is longer than its content-length.",
                        "Correct the header, or leave it out and the body is sent in chunks.",
                    )
                })?;
                if is_last && left > 0 {
                    return Err(Error::misuse(
                        format!("The body ended {left} bytes before its content-length."),
                        "Correct the header, or leave it out and the body is sent in chunks.",
                    ));
                }
                out.extend_from_slice(data);
                self.writing = if left == 0 { Writing::Done } else { Writing::Length(left) };
                Ok(())
            }
            Writing::Chunked => {
                chunked::write(data, is_last, out);
                if is_last {
                    self.writing = Writing::Done;
                }
                Ok(())
            }
        }
    }

    /// Takes bytes of the answer. After an error the connection is over.
    pub fn receive(&mut self, data: &[u8], sink: &mut impl Sink) -> Result<()> {
        let result = self.step(data, sink);
        if result.is_err() {
            self.stop();
        }
        result
    }

    /// The peer will send no more. `is_clean` if that can't be an attacker's cut: close_notify, or a wire without TLS.
    pub fn receive_eof(&mut self, is_clean: bool, sink: &mut impl Sink) -> Result<()> {
        let reading = std::mem::replace(&mut self.reading, Reading::Over);
        self.writing = Writing::Done;
        match reading {
            Reading::Over => Ok(()),
            Reading::Idle => {
                sink.closed();
                Ok(())
            }
            Reading::Upgraded => {
                sink.end(false, std::iter::empty());
                Ok(())
            }
            Reading::UntilClose if is_clean => {
                sink.end(false, std::iter::empty());
                Ok(())
            }
            Reading::Head(_) if !self.has_received => Err(Error::new(
                ErrorKind::Lost,
                "The peer closed the connection before a byte of the answer came.",
                "Likely cause: it closes idle connections sooner than we do, was restarted, or crashed on this request. If it \
                 happens often, compare its keep-alive timeout with ours and look at its log.",
            )),
            Reading::Head(_) | Reading::Length(_) | Reading::Chunked(_) | Reading::UntilClose => Err(Error::new(
                ErrorKind::Protocol,
                "The answer was cut off: the connection ended before the message did.",
                "Likely cause: the peer crashed or was killed while answering, or something between dropped the connection. Look \
                 at the peer's log for this request.",
            )),
        }
    }

    fn step(&mut self, data: &[u8], sink: &mut impl Sink) -> Result<()> {
        let mut rest = data;
        while !rest.is_empty() {
            self.has_received = true;
            match &mut self.reading {
                Reading::Idle => {
                    self.stop();
                    sink.closed();
                    return Ok(());
                }
                Reading::Over => return Ok(()),
                Reading::Head(reader) => {
                    let (used, is_head_request) = (&mut 0, self.is_head_request);
                    let parsed = reader.read(rest, used, |head| {
                        let body = response::body_length(head, is_head_request)?;
                        if head.status >= 200 || head.status == 101 {
                            sink.head(
                                head.status,
                                head.minor,
                                head.reason,
                                head.fields.iter().map(|field| (field.name.as_bytes(), field.value)),
                            );
                        }
                        Ok((head.status, body, response::is_persistent(head)))
                    })?;
                    rest = rest.get(*used..).unwrap_or_default();
                    if let Some((status, body, is_persistent)) = parsed {
                        self.begin_body(status, body, is_persistent, rest, sink)?;
                    }
                }
                Reading::Length(left) => {
                    let take = usize::try_from(*left).map_or(rest.len(), |left| left.min(rest.len()));
                    let (piece, after) = rest.split_at_checked(take).unwrap_or((rest, &[]));
                    *left -= take as u64;
                    let is_done = *left == 0;
                    sink.body(piece);
                    rest = after;
                    if is_done {
                        self.end(rest, sink);
                    }
                }
                Reading::Chunked(decoder) => {
                    let used = decoder.read(rest, |piece| sink.body(piece))?;
                    rest = rest.get(used..).unwrap_or_default();
                    if decoder.is_done() {
                        let Reading::Chunked(decoder) = std::mem::replace(&mut self.reading, Reading::Idle) else {
                            return Ok(());
                        };
                        let is_reusable = self.finish(rest);
                        decoder.trailers(|fields| {
                            sink.end(is_reusable, fields.iter().map(|field| (field.name.as_bytes(), field.value)));
                        })?;
                    }
                }
                Reading::UntilClose | Reading::Upgraded => {
                    sink.body(rest);
                    rest = &[];
                }
            }
        }
        Ok(())
    }

    fn begin_body(
        &mut self,
        status: u16,
        body: BodyLength,
        is_persistent: bool,
        rest: &[u8],
        sink: &mut impl Sink,
    ) -> Result<()> {
        if status == 101 {
            if !self.offers_upgrade {
                return Err(Error::protocol("The peer switched protocols, but the request did not offer that."));
            }
            self.reading = Reading::Upgraded;
            self.writing = Writing::Raw;
            return Ok(());
        }
        if status < 200 {
            self.interim += 1;
            if self.interim > MAX_INTERIM {
                return Err(Error::protocol("The peer sent too many interim (1xx) answers to one request."));
            }
            self.reading = Reading::Head(HeadReader::default());
            return Ok(());
        }
        self.is_persistent &= is_persistent;
        match body {
            BodyLength::Exactly(0) => self.end(rest, sink),
            BodyLength::Exactly(length) => self.reading = Reading::Length(length),
            BodyLength::Chunked => self.reading = Reading::Chunked(Decoder::default()),
            BodyLength::UntilClose => {
                self.is_persistent = false;
                self.reading = Reading::UntilClose;
            }
        }
        Ok(())
    }

    fn end(&mut self, rest: &[u8], sink: &mut impl Sink) {
        let is_reusable = self.finish(rest);
        sink.end(is_reusable, std::iter::empty());
    }

    /// The answer is complete: may this connection carry another exchange? Not if the peer answered before it had the whole
    /// request (what we send next would be taken for the rest of it), and not if more bytes came than belong to the answer.
    fn finish(&mut self, rest: &[u8]) -> bool {
        let is_reusable = self.is_persistent && self.writing == Writing::Done && rest.is_empty();
        self.writing = if self.writing == Writing::Done { Writing::Done } else { Writing::Dropped };
        self.reading = if is_reusable { Reading::Idle } else { Reading::Over };
        is_reusable
    }
}

#[cfg(test)]
mod tests;
