//! Does this subject name a member of that trust domain?
//!
//! A SPIFFE ID in a token is text that somebody signed, and not yet one that was checked, unlike one from a certificate (mesh-wire
//! has the parser for those). The same strict grammar: no other spelling of the scheme or the domain, no escapes, no empty or dotted
//! segment, no trailing slash, and a path, because the trust domain itself authenticates nobody.
const LONGEST: usize = 2048;
const LONGEST_DOMAIN: usize = 255;

pub fn is_member(subject: &str, trust_domain: &str) -> bool {
    let path = subject
        .strip_prefix("spiffe://")
        .and_then(|rest| rest.strip_prefix(trust_domain))
        .and_then(|rest| rest.strip_prefix('/'));
    subject.len() <= LONGEST && path.is_some_and(|path| path.split('/').all(is_segment))
}

/// Of which trust domain would it be a member? None for what isn't one's.
pub fn trust_domain_of(subject: &str) -> Option<&str> {
    subject.strip_prefix("spiffe://")?.split_once('/').map(|(domain, _)| domain)
}

pub fn is_trust_domain(text: &str) -> bool {
    let is_allowed = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || b".-_".contains(&byte);
    !text.is_empty() && text.len() <= LONGEST_DOMAIN && text.bytes().all(is_allowed)
}

fn is_segment(text: &str) -> bool {
    let is_allowed = |byte: u8| byte.is_ascii_alphanumeric() || b".-_".contains(&byte);
    !matches!(text, "" | "." | "..") && text.bytes().all(is_allowed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_member_has_a_path_under_its_trust_domain() {
        assert!(is_member("spiffe://shop.internal/ns/default/sa/orders", "shop.internal"));
        let long = format!("spiffe://shop.internal/{}", "a".repeat(2048));
        for subject in [
            "",
            "orders",
            "spiffe://shop.internal",
            "spiffe://shop.internal/",
            "spiffe://shop.internal//a",
            "spiffe://shop.internal/a/",
            "spiffe://shop.internal/a/../b",
            "spiffe://shop.internal/%61",
            "spiffe://shop.internal/a?b",
            "spiffe://shop.internal/a#b",
            "spiffe://shop.internal:1/a",
            "spiffe://u@shop.internal/a",
            "Spiffe://shop.internal/a",
            "spiffe://SHOP.internal/a",
            "spiffe://shop.internal.evil/a",
            "spiffe://evil/shop.internal/a",
            "https://shop.internal/a",
            "spiffe://shop.internal/a\n",
            long.as_str(),
        ] {
            assert!(!is_member(subject, "shop.internal"), "{subject}");
        }
    }
}
