//! Which bytes say this request, so that every server reads the same one?
//!
//! Whatever the application passed is checked before a byte is written: a CR, LF or NUL in a value would let a user's input write
//! headers or whole requests of its own (CVE-2023-27493 and its kin). Framing is decided once: by the caller's content-length or
//! transfer-encoding if there is one, else by what the body is.
//!
//! It adds no headers but those of the framing.
use crate::error::{Error, Result};
use crate::http1::chunked;
use crate::http1::response::{has_token, parse_length};
use crate::http1::Writing;

pub struct Request<'a> {
    pub method: &'a str,
    pub target: &'a str,
    pub fields: &'a [(&'a [u8], &'a [u8])],
    pub body: &'a [u8],
    pub is_streaming: bool,
}

/// A body from this size on is left to the caller to write, since copying it behind the head would cost more than a second write.
pub const LARGE: usize = 16 * 1024;

/// What the exchange must know about the request it began with.
pub struct Plan<'a> {
    /// What is still to be written, right behind the head.
    pub rest: &'a [u8],
    pub writing: Writing,
    pub is_head: bool,
    pub asks_close: bool,
    pub offers_upgrade: bool,
}

pub fn write<'a>(request: &Request<'a>, out: &mut Vec<u8>) -> Result<Plan<'a>> {
    let method = request.method.as_bytes();
    if method.is_empty() || !method.iter().all(|byte| is_token(*byte)) {
        return Err(refused("The method is not a token"));
    }
    if method == b"CONNECT" {
        return Err(refused("CONNECT is not supported"));
    }
    let target = request.target.as_bytes();
    if target.is_empty() || !target.iter().all(|byte| (0x21..=0x7e).contains(byte)) {
        return Err(refused("The request target is empty or holds spaces, control or non-ASCII characters"));
    }

    let fields_length: usize = request.fields.iter().map(|(name, value)| name.len() + value.len() + 4).sum();
    out.reserve(method.len() + target.len() + fields_length + 64 + request.body.len().min(LARGE));
    out.extend_from_slice(method);
    out.push(b' ');
    out.extend_from_slice(target);
    out.extend_from_slice(b" HTTP/1.1\r\n");

    let mut hosts = 0u32;
    let mut length = None;
    let mut is_chunked = false;
    let mut asks_close = false;
    let mut connection_upgrade = false;
    let mut has_upgrade = false;
    for (name, value) in request.fields {
        if name.is_empty() || !name.iter().all(|byte| is_token(*byte)) {
            return Err(refused("A header's name is empty or not a token"));
        }
        if has_control(value) {
            return Err(refused(format!("The value of the header {} holds a control character", text(name))));
        }
        match name.len() {
            4 if name.eq_ignore_ascii_case(b"host") => hosts += 1,
            7 if name.eq_ignore_ascii_case(b"upgrade") => has_upgrade = true,
            10 if name.eq_ignore_ascii_case(b"connection") => {
                asks_close |= has_token(value, b"close");
                connection_upgrade |= has_token(value, b"upgrade");
            }
            14 if name.eq_ignore_ascii_case(b"content-length") => {
                if length.is_some() {
                    return Err(refused("The request has more than one content-length"));
                }
                let parsed = parse_length(value);
                length = Some(parsed.ok_or_else(|| refused("The content-length is not a plain decimal number"))?);
            }
            17 if name.eq_ignore_ascii_case(b"transfer-encoding") => {
                if is_chunked || !value.eq_ignore_ascii_case(b"chunked") {
                    return Err(refused("The transfer-encoding is not exactly \"chunked\""));
                }
                is_chunked = true;
            }
            _ => {}
        }
        out.extend_from_slice(name);
        out.extend_from_slice(b": ");
        out.extend_from_slice(value);
        out.extend_from_slice(b"\r\n");
    }
    if hosts != 1 {
        return Err(refused("The request has no host header, or more than one"));
    }
    if is_chunked && length.is_some() {
        return Err(refused("The request has both content-length and transfer-encoding"));
    }

    let mut rest: &[u8] = &[];
    let given = request.body.len() as u64;
    let is_streaming = request.is_streaming;
    let writing = if is_chunked || (is_streaming && length.is_none()) {
        if !is_chunked {
            out.extend_from_slice(b"transfer-encoding: chunked\r\n");
        }
        out.extend_from_slice(b"\r\n");
        chunked::write(request.body, !is_streaming, out);
        if is_streaming {
            Writing::Chunked
        } else {
            Writing::Done
        }
    } else {
        let left = match length {
            Some(length) => length.checked_sub(given).filter(|left| *left == 0 || is_streaming),
            None => Some(0),
        };
        let left = left.ok_or_else(|| refused("The content-length is not the length of the body"))?;
        if length.is_none() && (given > 0 || matches!(method, b"POST" | b"PUT" | b"PATCH")) {
            out.extend_from_slice(b"content-length: ");
            write_decimal(given, out);
            out.extend_from_slice(b"\r\n");
        }
        out.extend_from_slice(b"\r\n");
        if request.body.len() < LARGE {
            out.extend_from_slice(request.body);
        } else {
            rest = request.body;
        }
        if left == 0 {
            Writing::Done
        } else {
            Writing::Length(left)
        }
    };
    Ok(Plan {
        rest,
        writing,
        is_head: method == b"HEAD",
        asks_close,
        offers_upgrade: has_upgrade && connection_upgrade,
    })
}

fn write_decimal(mut number: u64, out: &mut Vec<u8>) {
    let mut digits = [0u8; 20];
    let mut count = 0;
    for slot in digits.iter_mut().rev() {
        *slot = b'0' + (number % 10) as u8;
        count += 1;
        number /= 10;
        if number == 0 {
            break;
        }
    }
    out.extend_from_slice(digits.get(digits.len() - count..).unwrap_or_default());
}

fn is_token(byte: u8) -> bool {
    const TOKEN: [bool; 256] = {
        let mut table = [false; 256];
        let allowed = b"!#$%&'*+-.^_`|~0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz";
        let mut at = 0;
        #[allow(clippy::indexing_slicing)] // at compile time
        while at < allowed.len() {
            table[allowed[at] as usize] = true;
            at += 1;
        }
        table
    };
    TOKEN.get(usize::from(byte)).copied().unwrap_or_default()
}

/// Without a branch inside, so that it runs on vectors.
fn has_control(value: &[u8]) -> bool {
    value.iter().fold(false, |found, byte| found | ((*byte < 0x20) & (*byte != b'\t')) | (*byte == 0x7f))
}

pub(crate) fn refused(what: impl std::fmt::Display) -> Error {
    Error::misuse(
        format!("The request can't be written: {what}."),
        "Likely cause: unchecked input in a URL or header. Correct the call; nothing was sent.",
    )
}

fn text(name: &[u8]) -> std::borrow::Cow<'_, str> {
    String::from_utf8_lossy(name)
}
