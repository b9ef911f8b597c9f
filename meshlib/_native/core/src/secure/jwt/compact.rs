//! What are the three parts of this token, if there is one way to write it?
//!
//! Only the compact form exists here, and only in its one spelling: base64url without padding, without white space, and without bits
//! left over that nobody reads. Otherwise one signed token had many texts, and what was remembered or revoked by its text would come
//! back in another.
use super::TokenFault;

/// Nothing longer is looked at.
pub const LONGEST: usize = 16 * 1024;

pub struct Compact<'a> {
    pub header: Vec<u8>,
    pub payload: Vec<u8>,
    pub signature: Vec<u8>,
    /// What was signed.
    pub message: &'a [u8],
}

impl<'a> Compact<'a> {
    pub fn parse(token: &'a [u8]) -> Result<Self, TokenFault> {
        if token.len() > LONGEST {
            return Err(TokenFault::Malformed("it is longer than 16 KiB"));
        }
        let mut parts = token.split(|byte| *byte == b'.');
        let (Some(header), Some(payload), Some(signature), None) =
            (parts.next(), parts.next(), parts.next(), parts.next())
        else {
            return Err(TokenFault::Malformed("it hasn't three parts"));
        };
        let message = token.get(..header.len() + 1 + payload.len()).unwrap_or_default();
        let decoded =
            |part: &[u8]| decoded(part).ok_or(TokenFault::Malformed("it is not base64url in its one spelling"));
        if signature.is_empty() {
            return Err(TokenFault::Malformed("it isn't signed"));
        }
        Ok(Self { header: decoded(header)?, payload: decoded(payload)?, signature: decoded(signature)?, message })
    }
}

/// Base64url (RFC 4648, section 5) in its one spelling.
pub fn decoded(text: &[u8]) -> Option<Vec<u8>> {
    let mut out = Vec::with_capacity(text.len() / 4 * 3 + 2);
    for group in text.chunks(4) {
        let mut bits: u32 = 0;
        for byte in group {
            bits = bits << 6 | u32::from(value(*byte)?);
        }
        let [_, high, middle, low] = match group.len() {
            4 => bits,
            3 if bits & 0x3 == 0 => bits << 6,
            2 if bits & 0xf == 0 => bits << 12,
            _ => return None,
        }
        .to_be_bytes();
        match group.len() {
            4 => out.extend([high, middle, low]),
            3 => out.extend([high, middle]),
            _ => out.push(high),
        }
    }
    Some(out)
}

fn value(byte: u8) -> Option<u8> {
    match byte {
        b'A'..=b'Z' => Some(byte - b'A'),
        b'a'..=b'z' => Some(byte - b'a' + 26),
        b'0'..=b'9' => Some(byte - b'0' + 52),
        b'-' => Some(62),
        b'_' => Some(63),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base64url_has_one_spelling() {
        for (text, bytes) in [("", ""), ("Zg", "f"), ("Zm8", "fo"), ("Zm9v", "foo"), ("Zm9vYg", "foob")] {
            assert_eq!(decoded(text.as_bytes()).as_deref(), Some(bytes.as_bytes()), "{text}");
        }
        assert_eq!(decoded(b"-_-_").as_deref(), Some([0xfb, 0xff, 0xbf].as_slice()));
        // Bits left over, padding, a group of one, the other alphabet, white space, other bytes.
        for text in ["Zh", "Zm9", "Zg==", "Zg=", "Z", "Zm9vY", "+/+/", "Zm 9v", "Zm9v\n", " Zm9v", "Zm9\u{e9}"] {
            assert_eq!(decoded(text.as_bytes()), None, "{text}");
        }
    }

    #[test]
    fn only_three_parts_are_a_token() {
        for token in ["", ".", "..", "a.b", "YQ.YQ.YQ.", "YQ.YQ.YQ.YQ.YQ", "YQ.YQ.", "YQ.YQ.YQ\n", "{\"payload\":\"\"}"]
        {
            assert!(Compact::parse(token.as_bytes()).is_err(), "{token}");
        }
        let token = Compact::parse(b"YQ.Yg.Yw").ok();
        assert_eq!(token.map(|token| token.message), Some(b"YQ.Yg".as_slice()));
        let token = [b"YQ.".as_slice(), &[b'A'; LONGEST], b".YQ"].concat();
        assert_eq!(Compact::parse(&token).err(), Some(TokenFault::Malformed("it is longer than 16 KiB")));
    }
}
