//! Invariant: what is accepted is made of exactly the parts that are returned, in the characters that the standard allows.
use mesh_wire::spiffe;

pub fn check(text: &str) {
    if let Ok(id) = spiffe::parse(text) {
        assert_eq!(text, format!("spiffe://{}{}", id.trust_domain, id.path));
        assert!(text.len() <= 2048 && text.bytes().all(|byte| byte.is_ascii_graphic()));
        assert!(spiffe::check_trust_domain(id.trust_domain).is_ok());
        assert!(id.path.is_empty() || id.path.split('/').skip(1).all(|segment| !matches!(segment, "" | "." | "..")));
    }
}
