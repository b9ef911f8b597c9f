//! Could two readers see two different requests in these bytes? A watch over a server's connection, before any parser reads it.
//!
//! The parser behind may be lenient where others are not: that gap is what smuggling lives in (RFC 9112, 6.3 and 11.2). So here only
//! framing is read, strictly, and what is ambiguous is refused as a whole: both lengths or two of them, a transfer coding that isn't
//! exactly `chunked`, a bare LF, a folded line, a chunk that doesn't end where it says, a host that is missing or there twice.
//! Everything else about a head (names, values, versions) is left to the parser, which refuses what it can't read.
//!
//! It keeps a head only while it is incomplete, and no bodies. Where a protocol is switched it stops, once it is told that the other
//! side agreed; what comes before that is refused, because no honest client sends before it knows.
use crate::error::{Error, Result};
use crate::http1::chunked::Decoder;
use crate::http1::response::{has_token, parse_length, LineScan};

/// More than a parser behind takes, which has a better word for it (431): here only memory is bounded.
const MAX_HEAD: usize = 128 * 1024;

#[derive(Debug, Default)]
enum State {
    #[default]
    Head,
    Length(u64),
    Chunked(Box<Decoder>),
    /// The request offered to switch; nothing more comes before it is answered.
    Offered,
    Switched,
    Refused,
}

#[derive(Debug, Default)]
pub struct Guard {
    state: State,
    /// A head that has not come whole.
    partial: Vec<u8>,
    scan: LineScan,
    offers_switch: bool,
}

/// What is the matter, and where: whether the parser behind is in the middle of a body, with all bytes before these.
#[derive(Debug)]
pub struct Violation {
    pub error: Error,
    pub is_in_body: bool,
}

impl Guard {
    /// Some of a head is here, and the rest isn't.
    pub fn is_in_head(&self) -> bool {
        !self.partial.is_empty()
    }

    pub fn is_offered(&self) -> bool {
        matches!(self.state, State::Offered)
    }

    /// The answer to the offer: from now on the bytes are no HTTP, or the next request follows.
    pub fn answer_offer(&mut self, is_accepted: bool) {
        if matches!(self.state, State::Offered) || (is_accepted && self.offers_switch) {
            self.state = if is_accepted { State::Switched } else { State::Head };
        }
        self.offers_switch = false;
    }

    /// Takes bytes. How many of them may be read is all or nothing: what stands before a violation belongs to the same doubt.
    pub fn read(&mut self, bytes: &[u8]) -> std::result::Result<(), Violation> {
        let is_in_body = !matches!(self.state, State::Head);
        let result = self.step(bytes).map_err(|error| Violation { error, is_in_body });
        if result.is_err() {
            self.state = State::Refused;
            self.partial = Vec::new();
        }
        result
    }

    fn step(&mut self, bytes: &[u8]) -> Result<()> {
        let mut rest = bytes;
        while !rest.is_empty() {
            match &mut self.state {
                State::Head => rest = self.read_head(rest)?,
                State::Length(left) => {
                    let take = usize::try_from(*left).map_or(rest.len(), |left| left.min(rest.len()));
                    *left -= take as u64;
                    let is_done = *left == 0;
                    rest = rest.get(take..).unwrap_or_default();
                    if is_done {
                        self.state = self.after_body();
                    }
                }
                State::Chunked(decoder) => {
                    let used = decoder.read(rest, |_| {})?;
                    rest = rest.get(used..).unwrap_or_default();
                    if decoder.is_done() {
                        decoder.trailers(|_| {})?;
                        self.state = self.after_body();
                    }
                }
                State::Switched => return Ok(()),
                State::Offered => {
                    return Err(Error::protocol("Bytes came before the change of protocol was answered."));
                }
                State::Refused => {
                    return Err(Error::protocol("The connection was refused."));
                }
            }
        }
        Ok(())
    }

    fn after_body(&self) -> State {
        if self.offers_switch {
            State::Offered
        } else {
            State::Head
        }
    }

    fn read_head<'a>(&mut self, bytes: &'a [u8]) -> Result<&'a [u8]> {
        if self.partial.is_empty() {
            let mut scan = LineScan::default();
            let whole = bytes.get(..bytes.len().min(MAX_HEAD)).unwrap_or_default();
            if let Some(end) = scan.find_end(whole, false)? {
                self.judge(bytes.get(..end).unwrap_or_default())?;
                return Ok(bytes.get(end..).unwrap_or_default());
            }
        }
        let before = self.partial.len();
        let room = MAX_HEAD.saturating_sub(before);
        let piece = bytes.get(..bytes.len().min(room)).unwrap_or_default();
        self.partial.extend_from_slice(piece);
        begins_well(&self.partial)?;
        if let Some(end) = self.scan.find_end(&self.partial, false)? {
            let head = std::mem::take(&mut self.partial);
            self.scan = LineScan::default();
            self.judge(head.get(..end).unwrap_or_default())?;
            return Ok(bytes.get(end - before..).unwrap_or_default());
        }
        if piece.len() < bytes.len() {
            return Err(Error::protocol("The head of the request exceeds 128 KiB."));
        }
        Ok(&[])
    }

    /// Decides from a whole head what follows it.
    fn judge(&mut self, head: &[u8]) -> Result<()> {
        begins_well(head)?;
        let (mut length, mut is_chunked, mut hosts) = (None, false, 0u8);
        let (mut has_upgrade, mut asks_upgrade) = (false, false);
        let mut lines = Lines(head);
        let first = lines.next().unwrap_or_default();
        let is_old = first.ends_with(b" HTTP/1.0");
        for line in lines {
            match line.first() {
                None => break,
                Some(b' ' | b'\t') => return Err(Error::protocol("A header line is folded.")),
                Some(_) => {}
            }
            let at = memchr::memchr(b':', line).ok_or_else(|| Error::protocol("A header line has no colon."))?;
            let (name, value) = line.split_at_checked(at).unwrap_or_default();
            let value = trim(value.get(1..).unwrap_or_default());
            if name.last().is_none_or(|last| last.is_ascii_whitespace()) {
                return Err(Error::protocol("A header's name is empty, or has a space behind it."));
            }
            match name.len() {
                4 if name.eq_ignore_ascii_case(b"host") => hosts = hosts.saturating_add(1),
                7 if name.eq_ignore_ascii_case(b"upgrade") => has_upgrade = true,
                10 if name.eq_ignore_ascii_case(b"connection") => asks_upgrade |= has_token(value, b"upgrade"),
                14 if name.eq_ignore_ascii_case(b"content-length") => {
                    if length.is_some() {
                        return Err(Error::protocol("The request has more than one content-length."));
                    }
                    let parsed = parse_length(value);
                    length =
                        Some(parsed.ok_or_else(|| Error::protocol("The content-length is no plain decimal number."))?);
                }
                17 if name.eq_ignore_ascii_case(b"transfer-encoding") => {
                    if is_chunked || !value.eq_ignore_ascii_case(b"chunked") {
                        return Err(Error::protocol("The transfer-encoding is not exactly \"chunked\"."));
                    }
                    is_chunked = true;
                }
                _ => {}
            }
        }
        if is_chunked && (length.is_some() || is_old) {
            return Err(Error::protocol(
                "The request has a transfer-encoding beside a content-length, or in HTTP/1.0.",
            ));
        }
        if hosts > 1 || (hosts == 0 && !is_old) {
            return Err(Error::protocol("The request has no host, or more than one."));
        }
        self.offers_switch = has_upgrade && asks_upgrade;
        self.state = match (is_chunked, length) {
            (true, _) => State::Chunked(Box::default()),
            (false, Some(left)) if left > 0 => State::Length(left),
            _ => self.after_body(),
        };
        Ok(())
    }
}

/// Some parsers skip empty lines before a request, others don't.
fn begins_well(head: &[u8]) -> Result<()> {
    if head.first().is_some_and(|byte| !byte.is_ascii_alphabetic()) {
        return Err(Error::protocol("The request does not begin with a method."));
    }
    Ok(())
}

/// Only these two may stand around a value (RFC 9110, 5.5); anything else that looks like space belongs to it.
fn trim(value: &[u8]) -> &[u8] {
    let is_space = |byte: &u8| matches!(byte, b' ' | b'\t');
    let start = value.iter().position(|byte| !is_space(byte)).unwrap_or(value.len());
    let end = value.iter().rposition(|byte| !is_space(byte)).map_or(start, |at| at + 1);
    value.get(start..end).unwrap_or_default()
}

/// Lines of a block in which every LF follows a CR.
struct Lines<'a>(&'a [u8]);

impl<'a> Iterator for Lines<'a> {
    type Item = &'a [u8];

    fn next(&mut self) -> Option<&'a [u8]> {
        let end = memchr::memchr(b'\n', self.0)?;
        let line = self.0.get(..end.saturating_sub(1)).unwrap_or_default();
        self.0 = self.0.get(end + 1..).unwrap_or_default();
        Some(line)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;

    /// Whole, and cut at every byte: the answer must be the same.
    fn is_taken(bytes: &[u8]) -> bool {
        let whole = Guard::default().read(bytes).is_ok();
        let mut guard = Guard::default();
        let pieces = bytes.iter().all(|byte| guard.read(&[*byte]).is_ok());
        assert_eq!(whole, pieces, "{:?}", String::from_utf8_lossy(bytes));
        whole
    }

    fn post(fields: &str, body: &str) -> Vec<u8> {
        format!("POST / HTTP/1.1\r\nHost: h\r\n{fields}\r\n{body}").into_bytes()
    }

    #[test]
    fn honest_requests_follow_one_another() {
        let mut all = post("Content-Length: 3\r\n", "abc");
        all.extend(post("Transfer-Encoding: Chunked\r\n", "3;x=y\r\nabc\r\n0\r\nx-t: 1\r\n\r\n"));
        all.extend(b"GET / HTTP/1.0\r\n\r\n");
        all.extend(post("Content-Length: 0\r\n", ""));
        assert!(is_taken(&all));
    }

    #[test]
    fn whatever_can_be_read_in_two_ways_is_refused() {
        for (fields, body) in [
            ("Content-Length: 6\r\nTransfer-Encoding: chunked\r\n", "0\r\n\r\nG"),
            ("Content-Length: 1\r\nContent-Length: 1\r\n", "a"),
            ("Content-Length: +1\r\n", "a"),
            ("Content-Length: 1, 1\r\n", "a"),
            ("Content-Length:\r\n", ""),
            ("Transfer-Encoding: \u{b}chunked\r\n", "0\r\n\r\n"),
            ("Transfer-Encoding: chunked, chunked\r\n", "0\r\n\r\n"),
            ("Transfer-Encoding: identity\r\n", ""),
            ("Transfer-Encoding : chunked\r\n", "0\r\n\r\n"),
            ("Transfer-Encoding: chunked\r\n", "1\r\nAXX0\r\n\r\n"),
            ("Transfer-Encoding: chunked\r\n", "0x1\r\nA\r\n0\r\n\r\n"),
            ("Transfer-Encoding: chunked\r\n", "1\nA\r\n0\r\n\r\n"),
            ("X-Role: user\r\n admin\r\n", ""),
            ("X-Role: user\n", ""),
            ("Host: other\r\n", ""),
            ("no colon\r\n", ""),
            (": empty\r\n", ""),
        ] {
            assert!(!is_taken(&post(fields, body)), "{fields:?}");
        }
        assert!(!is_taken(b"GET / HTTP/1.1\r\n\r\n"));
        assert!(!is_taken(b"\r\nGET / HTTP/1.1\r\nhost: h\r\n\r\n"));
        assert!(!is_taken(b"POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"));
    }

    #[test]
    fn a_head_is_bounded() {
        let mut guard = Guard::default();
        assert!(guard.read(&[b'A'; MAX_HEAD]).is_ok());
        assert!(guard.is_in_head());
        assert!(guard.read(b"A").is_err());
    }

    #[test]
    fn nothing_comes_before_a_switch_is_answered() {
        let offer = b"GET / HTTP/1.1\r\nhost: h\r\nconnection: keep-alive, Upgrade\r\nupgrade: websocket\r\n\r\n";
        let mut accepted = Guard::default();
        accepted.read(offer).unwrap();
        accepted.answer_offer(true);
        accepted.read(b"\x00\x01 anything\n").unwrap();
        let mut refused = Guard::default();
        refused.read(offer).unwrap();
        refused.answer_offer(false);
        refused.read(offer).unwrap();
        assert!(refused.read(b"G").is_err());
    }
}
