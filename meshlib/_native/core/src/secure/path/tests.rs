#![allow(clippy::unwrap_used)]
use super::*;

fn canon(target: &str) -> Result<Path, PathError> {
    canonical(target.as_bytes(), "GET", Some(b"svc.local"), false)
}

fn text(target: &str) -> String {
    canon(target).unwrap().text().to_owned()
}

#[test]
fn an_ordinary_path_is_canonical_as_it_stands() {
    for target in ["/", "/orders/7", "/a.b/c..d", "/a:b@c/d,e", "/caf/"] {
        assert_eq!(plain(target.as_bytes()), Some(target));
    }
    assert_eq!(plain(b"/orders?x=%2f//..#y"), Some("/orders"));
    for target in ["", "orders", "//a", "/./a", "/a%20b", "/a\\b", "/a b", "/a?b c", "*", "http://svc.local/a"] {
        assert_eq!(plain(target.as_bytes()), None, "{target}");
    }
}

#[test]
fn escapes_dots_slashes_and_backslashes_give_one_form() {
    for target in
        ["//admin", "/%2fadmin", "/x%2f..%2fadmin", "/x%5C..%5cadmin", "/x\\..\\admin", "/../%61dmin", "/admin#x"]
    {
        assert_eq!(text(target), "/admin", "{target}");
    }
    for target in ["http://svc.local/admin", "HTTP://SVC.LOCAL:80/admin?x"] {
        assert_eq!(text(target), "/admin", "{target}");
    }
    assert_eq!(text("http://svc.local?x"), "/");
    assert_eq!(text("/x/.."), "/");
    assert_eq!(text("/x/./"), "/x/");
}

#[test]
fn what_can_be_read_in_two_ways_is_refused() {
    for (target, expected) in [
        ("/a\u{7f}", PathError::RawByte),
        ("*", PathError::Asterisk),
        ("ftp://svc.local/", PathError::AbsoluteForm),
        ("http://a@svc.local/", PathError::AbsoluteForm),
        ("http://evil/admin", PathError::Authority),
        ("http:///admin", PathError::Authority),
        ("admin", PathError::NoSlash),
        ("", PathError::NoSlash),
        ("/admin%", PathError::Percent),
        ("/admin%z0", PathError::Percent),
        ("/%252fadmin", PathError::EscapedTwice),
        ("/%257F", PathError::EscapedTwice),
        ("/%251f", PathError::EscapedTwice),
        ("/%255C", PathError::EscapedTwice),
        ("/admin%0a", PathError::Control),
        ("/admin%ff", PathError::Utf8),
        ("/x//../admin", PathError::Ambiguous),
    ] {
        assert_eq!(canon(target), Err(expected), "{target}");
    }
}

#[test]
fn the_raw_form_escapes_what_a_segment_may_not_hold() {
    assert_eq!(canon("/a%3Fb%20c").unwrap().raw(), "/a%3Fb%20c");
    assert_eq!(canon("/caf%c3%a9").unwrap().raw(), "/caf%C3%A9");
    assert_eq!(canon("/%2561dmin").unwrap().raw(), "/%2561dmin");
    assert_eq!(canon("/%61/b").unwrap().raw(), "/a/b");
}

#[test]
fn strict_refuses_what_has_to_be_resolved() {
    for target in ["/a%2Fb", "/a%5cb", "/a\\b", "/./a", "/%2e%2E/a", "/a/.."] {
        let answer = canonical(target.as_bytes(), "GET", None, true);
        assert_eq!(answer, Err(PathError::NotCanonical), "{target}");
    }
    assert_eq!(canonical(b"/a%20b?%2f", "GET", None, true).unwrap().text(), "/a b");
}

#[test]
fn readings_differ_in_params_and_in_the_last_slash() {
    let path = canon("/public/..;/admin/").unwrap();
    assert_eq!(
        path.wide_readings().collect::<Vec<_>>(),
        ["/public/..;/admin/", "/public/..;/admin", "/admin/", "/admin"]
    );
    assert_eq!(path.readings().collect::<Vec<_>>(), ["/public/..;/admin/", "/admin/"]);
    let star = canonical(b"*", "OPTIONS", None, false).unwrap();
    assert_eq!(star.wide_readings().collect::<Vec<_>>(), ["*", "/"]);
    assert_eq!(canon("/a").unwrap().wide_readings().collect::<Vec<_>>(), ["/a"]);
}

#[test]
fn rules_write_decoded_canonical_paths() {
    for good in ["/", "/a", "/a/", "/caf\u{e9}", "/a?b"] {
        assert!(is_canonical_text(good, true), "{good}");
    }
    for bad in ["", "a", "//a", "/a/../b", "/a/..", "/a\\b", "/a\n"] {
        assert!(!is_canonical_text(bad, true), "{bad}");
    }
    assert!(is_canonical_text("/.", false) && !is_canonical_text("/./", false));
}
