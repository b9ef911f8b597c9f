//! Invariant: whatever a rule says and a call is, a denial fires wherever the same rule as a permission would let in; a target is
//! sent at most once to another place, which is on this host; and an address is read in one way.
//!
//! The input is a pattern, a target, a host, a value of a header and one of x-forwarded-for, each ended by a byte 0xff.
use mesh_core::secure::address::{client_of, parse, Cidr};
use mesh_core::secure::authorize::{Action, ConditionPlan, PathPlan, PeerPlan, Question, RulePlan, Rules, TextPlan};
use mesh_core::secure::path::profile::{normalized, redirect, Normalized};
use mesh_core::secure::path::{canonical, Path};

pub fn check(input: &[u8]) {
    let mut parts = input.split(|byte| *byte == 0xff);
    let mut next = || parts.next().unwrap_or_default();
    let (pattern, target, host, value, forwarded) = (next(), next(), next(), next(), next());
    addresses(forwarded);
    let Ok(text) = std::str::from_utf8(target) else { return };
    profiles(text);
    let Ok(path) = canonical(target, "GET", Some(host), false) else { return };
    places(target, &path);
    if let (Ok(pattern), Ok(host)) = (std::str::from_utf8(pattern), std::str::from_utf8(host)) {
        rules(pattern, &path, host, value);
    }
}

fn addresses(forwarded: &[u8]) {
    let source = parse("10.0.0.1");
    assert_eq!(client_of(source, false, &[forwarded], 1), source);
    assert!(client_of(source, true, &[forwarded], 1).is_some());
    let Ok(text) = std::str::from_utf8(forwarded) else { return };
    if let Some(address) = parse(text) {
        assert_eq!(parse(&address.to_string()), Some(address));
        assert_eq!(address.to_canonical(), address);
    }
    if let Ok(cidr) = Cidr::parse(text) {
        assert!(cidr.contains(cidr.base()) && cidr.covers(&cidr));
        assert_eq!(Cidr::parse(&cidr.to_string()), Ok(cidr));
    }
}

fn profiles(target: &str) {
    for profile in ["NONE", "BASE", "MERGE_SLASHES", "DECODE_AND_MERGE_SLASHES"] {
        for action in ["KEEP_UNCHANGED", "REJECT_REQUEST", "UNESCAPE_AND_REDIRECT", "UNESCAPE_AND_FORWARD"] {
            match normalized(target, profile, action, false).expect("both words are known") {
                Normalized::Redirect(place) => assert!(is_local(&place), "{place}"),
                Normalized::Path(path) => {
                    let path = path.split('?').next().unwrap_or_default();
                    assert!(profile == "NONE" || (path.starts_with('/') && !path.contains('\\')), "{path}");
                    assert!(!profile.contains("MERGE") || !path.contains("//"), "{path}");
                }
                Normalized::Refused => {}
            }
        }
    }
}

fn places(target: &[u8], path: &Path) {
    if let Some(place) = redirect(target, path) {
        assert!(is_local(&place), "{place}");
        let there = canonical(place.as_bytes(), "GET", None, false).expect("the place is a path");
        assert_eq!((there.text(), redirect(place.as_bytes(), &there)), (path.text(), None));
    }
}

fn is_local(place: &str) -> bool {
    place.starts_with('/') && !place.starts_with("//") && place.bytes().all(|byte| byte.is_ascii_graphic())
}

fn rules(pattern: &str, path: &Path, host: &str, value: &[u8]) {
    let value_of = || pattern.to_owned();
    let texts = [
        TextPlan::Exact { value: value_of() },
        TextPlan::Prefix { value: value_of() },
        TextPlan::Suffix { value: value_of() },
        TextPlan::Any,
    ];
    let paths = [
        PathPlan::Exact { value: value_of() },
        PathPlan::Prefix { value: value_of() },
        PathPlan::Suffix { value: value_of() },
        PathPlan::Template { value: value_of() },
        PathPlan::Regex { value: value_of() },
    ];
    let mut plans = Vec::new();
    for path in paths {
        for is_case_insensitive in [false, true] {
            plans.push(RulePlan { paths: vec![path.clone()], is_case_insensitive, ..RulePlan::default() });
            plans.push(RulePlan { not_paths: vec![path.clone()], is_case_insensitive, ..RulePlan::default() });
        }
    }
    for text in texts {
        plans.push(RulePlan { hosts: vec![text.clone()], ..RulePlan::default() });
        plans.push(RulePlan { not_hosts: vec![text.clone()], ..RulePlan::default() });
        plans.push(RulePlan { namespaces: vec![text.clone()], ..RulePlan::default() });
        let key = "request.headers[x-a]".to_owned();
        let (values, not_values) = (vec![text.clone()], Vec::new());
        plans.push(RulePlan {
            when: vec![ConditionPlan { key: key.clone(), values, not_values }],
            ..RulePlan::default()
        });
        let (values, not_values) = (Vec::new(), vec![text]);
        plans.push(RulePlan { when: vec![ConditionPlan { key, values, not_values }], ..RulePlan::default() });
    }
    plans.push(RulePlan { from: vec![PeerPlan::Exact { value: value_of() }], ..RulePlan::default() });
    plans.push(RulePlan { not_from: vec![PeerPlan::Prefix { value: value_of() }], ..RulePlan::default() });
    plans.push(RulePlan { ip_blocks: vec![value_of()], ..RulePlan::default() });
    plans.push(RulePlan {
        when: vec![ConditionPlan { key: value_of(), values: vec![TextPlan::Any], not_values: Vec::new() }],
        ..RulePlan::default()
    });
    let fields = [("x-a".into(), value.to_vec())];
    for peer in [None, Some("spiffe://shop.internal/ns/default/sa/orders")] {
        let question = Question {
            peer,
            method: "GET",
            path,
            host: Some(host),
            port: 0,
            source: parse("10.0.0.1"),
            remote: None,
            sni: host,
            headers: &fields,
            claims: None,
        };
        for plan in &plans {
            let compiled = |action| Rules::compile(&[RulePlan { action, ..plan.clone() }]);
            if let (Ok(allow), Ok(deny)) = (compiled(Action::Allow), compiled(Action::Deny)) {
                let (allowed, denied) = (allow.judge(&question), deny.judge(&question));
                assert!(!allowed.is_allowed || denied.rule == Some(0), "{plan:?} {question:?}");
                assert!(
                    !allow.explain(allowed.rule, &question).is_empty()
                        && !deny.explain(denied.rule, &question).is_empty()
                );
            }
        }
    }
}
