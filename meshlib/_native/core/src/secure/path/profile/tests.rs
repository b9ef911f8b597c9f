#![allow(clippy::unwrap_used)]
use super::super::{canonical, PathError};
use super::*;

const PROFILES: [Profile; 4] = [Profile::None, Profile::Base, Profile::MergeSlashes, Profile::DecodeAndMergeSlashes];

#[test]
fn the_four_profiles_give_what_istio_documents() {
    for (target, expected) in [
        ("/svc/../admin", ["/svc/../admin", "/admin", "/admin", "/admin"]),
        ("//admin", ["//admin", "//admin", "/admin", "/admin"]),
        ("/a//b//", ["/a//b//", "/a//b//", "/a/b/", "/a/b/"]),
        ("/svc%2fadmin", ["/svc%2fadmin", "/svc%2fadmin", "/svc%2fadmin", "/svc/admin"]),
        ("/svc%2Fadmin", ["/svc%2Fadmin", "/svc%2Fadmin", "/svc%2Fadmin", "/svc/admin"]),
        ("/svc\\admin", ["/svc\\admin", "/svc/admin", "/svc/admin", "/svc/admin"]),
        ("/svc%5cadmin", ["/svc%5cadmin", "/svc%5cadmin", "/svc%5cadmin", "/svc/admin"]),
        ("/svc%5Cadmin", ["/svc%5Cadmin", "/svc%5Cadmin", "/svc%5Cadmin", "/svc/admin"]),
        ("/%61dmin", ["/%61dmin", "/admin", "/admin", "/admin"]),
        ("/svc/%2e%2e/admin", ["/svc/%2e%2e/admin", "/admin", "/admin", "/admin"]),
        ("/svc//../admin", ["/svc//../admin", "/svc/admin", "/svc/admin", "/svc/admin"]),
        ("/svc/..%2fadmin", ["/svc/..%2fadmin", "/svc/..%2fadmin", "/svc/..%2fadmin", "/admin"]),
        ("/svc#frag", ["/svc", "/svc", "/svc", "/svc"]),
        ("/svc?q=/../x", ["/svc?q=/../x", "/svc?q=/../x", "/svc?q=/../x", "/svc?q=/../x"]),
        ("/svc?q#f?g", ["/svc?q", "/svc?q", "/svc?q", "/svc?q"]),
        ("/%2561dmin", ["/%2561dmin", "/%2561dmin", "/%2561dmin", "/%2561dmin"]),
        ("/admin;a=b", ["/admin;a=b", "/admin;a=b", "/admin;a=b", "/admin;a=b"]),
        ("/svc%7eu%2D", ["/svc%7eu%2D", "/svc~u-", "/svc~u-", "/svc~u-"]),
        ("/svc/.../x", ["/svc/.../x", "/svc/.../x", "/svc/.../x", "/svc/.../x"]),
        ("/%c0%afx", ["/%c0%afx", "/%c0%afx", "/%c0%afx", "/%c0%afx"]),
        ("svc", ["svc", "/svc", "/svc", "/svc"]),
        ("/svc/..", ["/svc/..", "/", "/", "/"]),
        ("/svc/.", ["/svc/.", "/svc/", "/svc/", "/svc/"]),
        ("/x?a=%00", ["/x?a=%00", "/x?a=%00", "/x?a=%00", "/x?a=%00"]),
        ("/caf\u{c3}\u{a9}%", ["/caf\u{c3}\u{a9}%", "/caf\u{c3}\u{a9}%", "/caf\u{c3}\u{a9}%", "/caf\u{c3}\u{a9}%"]),
    ] {
        let found = PROFILES.map(|profile| profile.apply(target).unwrap());
        assert_eq!(found, expected.map(str::to_owned), "{target}");
    }
    for profile in PROFILES {
        assert_eq!(profile.apply("/x%00"), None);
    }
}

#[test]
fn escaped_slashes_are_kept_refused_redirected_or_opened() {
    let path = |text: &str| Ok(Normalized::Path(text.to_owned()));
    let redirect = |text: &str| Ok(Normalized::Redirect(text.to_owned()));
    let refused = Ok(Normalized::Refused);
    for (target, action, is_grpc, expected) in [
        ("/a%2fb", "KEEP_UNCHANGED", false, path("/a%2fb")),
        ("/a%5Cb", "IMPLEMENTATION_SPECIFIC_DEFAULT", false, path("/a%5Cb")),
        ("/a%2fb", "REJECT_REQUEST", false, refused.clone()),
        ("/a%5cb", "REJECT_REQUEST", false, refused.clone()),
        ("/a?%2f", "REJECT_REQUEST", false, path("/a?%2f")),
        ("/a#%2f", "REJECT_REQUEST", false, path("/a")),
        ("/a%2fb?x=%2f#y", "UNESCAPE_AND_REDIRECT", false, redirect("/a/b?x=%2f")),
        ("/a%5cb", "UNESCAPE_AND_REDIRECT", false, redirect("/a/b")),
        ("/a%2f..%2fb", "UNESCAPE_AND_REDIRECT", false, redirect("/b")),
        ("/a/b", "UNESCAPE_AND_REDIRECT", false, path("/a/b")),
        ("/a%2Fb%5cc", "UNESCAPE_AND_FORWARD", false, path("/a/b/c")),
        ("/a%252fb", "UNESCAPE_AND_FORWARD", false, path("/a%252fb")),
        ("/p%2fS/M", "REJECT_REQUEST", true, refused.clone()),
        ("/p%2fS/M", "UNESCAPE_AND_REDIRECT", true, refused.clone()),
        ("/p%2fS/M", "UNESCAPE_AND_FORWARD", true, path("/p/S/M")),
        // No open redirect: the next host would read it as one of its own.
        ("/%2fevil.example", "UNESCAPE_AND_REDIRECT", false, refused.clone()),
        ("/%5cevil.example", "UNESCAPE_AND_REDIRECT", false, refused.clone()),
        ("/a%2fb\r\nx:y", "UNESCAPE_AND_REDIRECT", false, refused.clone()),
        ("/a%2f%00", "UNESCAPE_AND_FORWARD", false, refused.clone()),
    ] {
        assert_eq!(normalized(target, "BASE", action, is_grpc), expected, "{target} {action}");
    }
    assert_eq!(normalized("/%2fa", "MERGE_SLASHES", "UNESCAPE_AND_REDIRECT", false), redirect("/a"));
    assert_eq!(normalized("/%5ca", "NONE", "UNESCAPE_AND_REDIRECT", false), refused);
    assert!(normalized("/", "LOOSE", "KEEP_UNCHANGED", false).unwrap_err().contains("LOOSE"));
    assert!(normalized("/", "NONE", "KEEP", false).unwrap_err().contains("KEEP"));
}

fn sent(target: &str) -> Option<String> {
    redirect(target.as_bytes(), &canonical(target.as_bytes(), "GET", Some(b"svc.local"), false).unwrap())
}

#[test]
fn a_target_that_is_not_canonical_is_sent_to_the_one_that_is() {
    for (target, place) in [
        ("//admin", "/admin"),
        ("/x/../admin?a=//b#c", "/admin?a=//b"),
        ("/%61dmin", "/admin"),
        ("/caf%c3%a9", "/caf%C3%A9"),
        ("//evil.example/%2e%2e", "/"),
        ("/\\evil.example", "/evil.example"),
        ("http://svc.local/a%2fb?c", "/a/b?c"),
        ("http://svc.local//a", "/a"),
    ] {
        assert_eq!(sent(target).as_deref(), Some(place), "{target}");
        assert_eq!(sent(place), None, "{place} is sent on");
    }
    for target in
        ["/", "/a", "/a?b=%2f", "/a#b", "/%2561dmin", "http://svc.local/a", "http://svc.local?x", "http://svc.local"]
    {
        assert_eq!(sent(target), None, "{target}");
    }
    let star = canonical(b"*", "OPTIONS", None, false).unwrap();
    assert_eq!(redirect(b"*", &star), None);
}

#[test]
fn a_place_begins_with_one_slash_and_breaks_no_line() {
    assert!(is_place("/") && is_place("/a?b"));
    for bad in ["", "a", "//a", "/\\a", "/a\r\nb", "/a b", "/\u{e9}"] {
        assert!(!is_place(bad), "{bad}");
    }
    assert_eq!(canonical(b"/a\r\n", "GET", None, false), Err(PathError::RawByte));
}
