//! Invariant: one host has one name however its authority is written, and a target that skips the URL parser is one that none changes.
use mesh_core::route::{host_of, is_plain_target};
use mesh_core::secure::path::canonical;

pub fn check(input: &[u8]) {
    let Ok(text) = std::str::from_utf8(input) else { return };
    let host = host_of(text);
    assert!(!host.bytes().any(|byte| byte.is_ascii_uppercase()));
    assert!(!host.ends_with('.'));
    assert_eq!(host_of(&text.to_ascii_uppercase()), host_of(&text.to_ascii_lowercase()));
    if !text.contains([':', '[', ']']) {
        for other in [format!("{text}:80"), format!("{text}."), format!("{text}.:443")] {
            assert_eq!(host_of(&other), host, "{other}");
        }
        assert_eq!(host_of(&host), host);
    }

    if is_plain_target(text) {
        assert!(
            text.starts_with('/')
                && text.bytes().all(|byte| byte.is_ascii_graphic() && !b"%#\\\"<>{}|^`'".contains(&byte))
        );
        let path = text.split('?').next().unwrap_or_default();
        assert!(path.split('/').skip(1).all(|segment| !segment.starts_with('.')), "{path}");
        // What the client sends as it stands, a server of ours takes as it stands.
        let server = canonical(text.as_bytes(), "GET", None, true).expect("a plain target is canonical already");
        assert_eq!((server.text(), server.raw()), (path, path));
    }
}
