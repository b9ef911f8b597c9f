//! Invariant: each entry of a key set is a usable key or left out with a reason, no name stands for two keys, and no key that is usable
//! is secret, private, or for something else, as a reader sees it that isn't ours.
use mesh_core::secure::jwt::{payload_of, KeySet};
use serde_json::Value;

pub fn check(input: &[u8]) {
    let Ok((set, ignored)) = KeySet::parse(input) else { return };
    let read: Value = serde_json::from_slice(input).expect("JSON");
    let entries = read["keys"].as_array().expect("a list");
    let names = set.names();
    assert_eq!(names.len() + ignored.len(), entries.len());
    for (place, name) in names.iter().enumerate().filter(|(_, name)| !name.is_empty()) {
        // A key for tokens of SPIFFE may have the name of one that isn't.
        assert!(names[..place].iter().filter(|other| *other == name).count() < 2, "{name}");
    }
    let usable = |entry: &&Value| {
        let is_text = |name: &str| entry.get(name).is_none_or(Value::is_string);
        matches!(entry["kty"].as_str(), Some("RSA" | "EC" | "OKP"))
            && matches!(entry.get("use").map(Value::as_str), None | Some(Some("sig" | "jwt-svid")))
            && entry
                .get("key_ops")
                .is_none_or(|list| list.as_array().is_some_and(|list| list.contains(&"verify".into())))
            && ["d", "p", "q", "oth"].iter().all(|name| entry.get(name).is_none())
            && ["kid", "alg", "crv", "n", "e", "x", "y"].iter().all(|name| is_text(name))
    };
    assert!(names.len() <= entries.iter().filter(usable).count());
    assert!(payload_of(b"eyJhbGciOiJFUzI1NiJ9.e30.AAAA", &set, &["ES256", "RS256"]).is_err());
}
