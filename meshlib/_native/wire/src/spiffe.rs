//! Is this text a SPIFFE ID, and what are its trust domain and path?
//!
//! The strict reading of the standard (SPIFFE-ID sections 2.1 to 2.3): lower case in the trust domain, no port, no escapes, no query,
//! no empty or dot segments. A lenient parser is how `spiffe://td/a` and something that only looks like it become the same caller.
//! Comparison is equality of bytes; nothing here normalises.
const MAX_LENGTH: usize = 2048;
const MAX_TRUST_DOMAIN: usize = 255;
const SCHEME: &str = "spiffe://";

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SpiffeId<'a> {
    pub trust_domain: &'a str,
    /// Empty (a trust domain's own ID), or begins with a slash.
    pub path: &'a str,
}

/// The parts, or what is wrong with the text.
pub fn parse(text: &str) -> Result<SpiffeId<'_>, &'static str> {
    if text.len() > MAX_LENGTH {
        return Err("it is longer than 2048 bytes");
    }
    let rest = text.strip_prefix(SCHEME).ok_or("it does not begin with spiffe://")?;
    let (trust_domain, path) = match rest.find('/') {
        Some(slash) => rest.split_at_checked(slash).ok_or("it is not ASCII")?,
        None => (rest, ""),
    };
    check_trust_domain(trust_domain)?;
    if !path.is_empty() {
        for segment in path.split('/').skip(1) {
            match segment {
                "" => return Err("its path has an empty segment or ends in a slash"),
                "." | ".." => return Err("its path has a dot segment"),
                _ if !segment.bytes().all(|byte| byte.is_ascii_alphanumeric() || b".-_".contains(&byte)) => {
                    return Err("its path holds a character other than letters, digits, '.', '-' and '_'");
                }
                _ => {}
            }
        }
    }
    Ok(SpiffeId { trust_domain, path })
}

pub fn check_trust_domain(name: &str) -> Result<(), &'static str> {
    if name.is_empty() {
        return Err("its trust domain is empty");
    }
    if name.len() > MAX_TRUST_DOMAIN {
        return Err("its trust domain is longer than 255 bytes");
    }
    if !name.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || b".-_".contains(&byte)) {
        return Err("its trust domain holds a character other than lower-case letters, digits, '.', '-' and '_'");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn well_formed_ids_split_into_trust_domain_and_path() {
        for (text, trust_domain, path) in [
            ("spiffe://td", "td", ""),
            ("spiffe://td/a/b/c", "td", "/a/b/c"),
            ("spiffe://10.0.0.1/a", "10.0.0.1", "/a"),
            ("spiffe://td/..a", "td", "/..a"),
            ("spiffe://a-b_c.d/A.B-C_9", "a-b_c.d", "/A.B-C_9"),
        ] {
            assert_eq!(Ok(SpiffeId { trust_domain, path }), parse(text), "{text}");
        }
    }

    #[test]
    fn whatever_could_be_read_in_two_ways_is_refused() {
        for text in [
            "",
            "td/a",
            "Spiffe://td/a",
            "SPIFFE://td/a",
            "spiffe:/td/a",
            "spiffe://",
            "spiffe:///a",
            "spiffe://td:443/a",
            "spiffe://user@td/a",
            "spiffe://t%64/a",
            "spiffe://TD/a",
            "spiffe://td/",
            "spiffe://td//a",
            "spiffe://td/a/",
            "spiffe://td/./a",
            "spiffe://td/../other",
            "spiffe://td/a?q",
            "spiffe://td/a#f",
            "spiffe://td?q",
            "spiffe://td/a\0",
            "spiffe://td/a%2fb",
            "spiffe://t\u{501}/a",
            "spiffe://td/\u{e9}",
            "spiffe://td/a;b",
            "spiffe://td\\a",
            "spiffe://td/a\n",
            "spiffe://td/a b",
            " spiffe://td/a",
            "spiffe://td\u{501}",
        ] {
            assert!(parse(text).is_err(), "{text:?}");
        }
    }

    #[test]
    fn lengths_are_capped_at_2048_and_255_bytes() {
        let longest = format!("spiffe://td/{}", "a".repeat(2048 - 12));
        assert!(parse(&longest).is_ok());
        assert!(parse(&format!("{longest}a")).is_err());
        assert!(parse(&format!("spiffe://{}/a", "d".repeat(255))).is_ok());
        assert!(parse(&format!("spiffe://{}/a", "d".repeat(256))).is_err());
    }
}
