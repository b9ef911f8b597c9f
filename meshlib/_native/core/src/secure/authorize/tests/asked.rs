//! What is worked out about a question is worked out once, however many rules ask for it.
use super::*;

fn condition(value: Value) -> Value {
    json!({"when": [{"key": "request.headers[x-role]", "values": [value], "not_values": []}]})
}

/// How many rules of those that deny are asked in full, if none of them matches.
fn candidates(rules: &Rules, call: &Call) -> usize {
    let asked = std::cell::Cell::new(0);
    let none = |_| {
        asked.set(asked.get() + 1);
        false
    };
    assert_eq!(rules.counted.deny.first(&Asked::new(&call.question()), none), None);
    asked.get()
}

#[test]
fn a_path_is_folded_once_and_only_if_it_has_capitals() {
    let call = get("/A;x/B/");
    let question = call.question();
    let asked = Asked::new(&question);
    assert!(std::ptr::eq(asked.folded_path(), asked.folded_path()));
    let folded: Vec<&str> = asked.folded_path().wide_readings().collect();
    assert_eq!(folded, ["/a;x/b/", "/a;x/b", "/a/b/", "/a/b"]);
    for plain in ["/a;x/b/", "/a/%E2%82%AC"] {
        let call = get(plain);
        assert!(Asked::new(&call.question()).differently_folded_path().is_none(), "{plain}");
    }
    assert_eq!(Asked::new(&get("/stra%C3%9Fe").question()).folded_path().text(), "/strasse");
}

#[test]
fn rules_without_case_are_looked_up() {
    let template = |value: &str| json!({"kind": "template", "value": value});
    let patterns: [(fn(usize) -> Value, &str); 3] = [
        (|n| exact(&format!("/Path-{n}")), "/pAth-7"),
        (|n| prefix(&format!("/Path-{n}/x")), "/pAth-7/X"),
        (|n| suffix(&format!("/Path-{n}")), "/a/pAth-7"),
    ];
    for (pattern, target) in patterns {
        let one = |n| rule("deny", json!({"paths": [pattern(n)], "is_case_insensitive": true}));
        let many = rules(&(0..100).map(one).collect::<Vec<_>>());
        assert_eq!((candidates(&many, &get(target)), many.answer(&get(target)).rule), (1, Some(7)), "{target}");
        assert_eq!(candidates(&many, &get("/other")), 0);
    }
    let street =
        |n| rule("deny", json!({"paths": [template(&format!("/Stra\u{df}e-{n}/{{x}}"))], "is_case_insensitive": true}));
    let streets = rules(&(0..100).map(street).collect::<Vec<_>>());
    assert_eq!(candidates(&streets, &get("/STRASSE-7/x")), 1);
    assert_eq!(streets.answer(&get("/STRASSE-7/x")).rule, Some(7));
    assert_eq!(streets.answer(&get("/stra%C3%9Fe-8/x")).rule, Some(8));
}

#[test]
fn a_header_is_split_once_and_not_beyond_what_anybody_needs() {
    let of = |value: &[u8]| Call { headers: vec![("x-role".into(), value.to_vec())], ..get("/") };
    let seen = |call: &Call| {
        let question = call.question();
        let asked = Asked::new(&question);
        let (once, again) = (asked.header("x-role").unwrap(), asked.header("x-role").unwrap());
        assert!(std::ptr::eq(once.others, again.others));
        (once.lone.map(<[u8]>::len), once.others.len(), once.is_too_long)
    };
    assert_eq!(seen(&of(b" admin ")), (Some(5), 0, false));
    assert_eq!(seen(&of(b"a, b")), (Some(4), 2, false));
    assert_eq!(seen(&of(&vec![b','; 58_000])), (Some(58_000), 0, true));
    assert_eq!(seen(&of(&vec![b' '; 58_000])), (Some(0), 0, false));
    assert_eq!(seen(&of(b"a").with("x-role", "b,c")), (None, 4, false));
    let call = of(b"a,b");
    assert!(Asked::new(&call.question()).header("x-other").is_none());
}

#[test]
fn a_list_that_is_too_long_opens_denials_and_no_permissions() {
    let many = |action| rules(&(0..20).map(|n| rule(action, condition(exact(&format!("b{n}"))))).collect::<Vec<_>>());
    let long = get("/").with("x-role", &",".repeat(58_000));
    assert_eq!(many("deny").answer(&long).rule, Some(0));
    assert_eq!(many("custom").answer(&long).custom, Some(0));
    assert!(!many("allow").allows(&long));
}
