//! What could never match, or means something else than it says, is refused, with what to write instead.
use super::*;

/// The one mistake of a rule with these fields.
fn mistake(action: &str, fields: Value) -> String {
    let found = mistakes(rule(action, fields.clone()));
    assert_eq!(found.len(), 1, "{fields} {found:?}");
    found[0].clone()
}

#[test]
fn every_mistake_is_named_at_once() {
    let bad = rule(
        "deny",
        json!({
            "from": [exact("admin")], "methods": ["get"], "ports": [0],
            "paths": [exact("//admin"), exact("/a%2fb"), {"kind": "template", "value": "/a{b"}],
            "hosts": [exact("a:80")], "ip_blocks": ["10"], "when": [{"key": "x", "values": [any()], "not_values": []}]
        }),
    );
    assert_eq!(mistakes(bad).len(), 9);
}

#[test]
fn a_plan_with_an_unknown_or_a_missing_clause_is_refused() {
    let good = rule("allow", json!({}));
    assert!(serde_json::from_value::<RulePlan>(good.clone()).is_ok());
    for name in good.as_object().unwrap().keys() {
        let mut less = good.clone();
        less.as_object_mut().unwrap().remove(name);
        assert!(serde_json::from_value::<RulePlan>(less).is_err(), "without {name}");
    }
    let mut more = good.clone();
    more["servers"] = json!([]);
    assert!(serde_json::from_value::<RulePlan>(more).is_err());
    for (name, value) in [
        ("action", json!("audit")),
        ("from", json!([{"kind": "suffix", "value": "/x"}])),
        ("paths", json!([{"kind": "any"}])),
        ("hosts", json!([{"kind": "regex", "value": "."}])),
        ("ports", json!([70000])),
        ("when", json!([{"key": "a", "values": []}])),
        ("paths", json!([{"kind": "exact", "value": "/", "case": "x"}])),
    ] {
        let mut bad = good.clone();
        bad[name] = value;
        assert!(serde_json::from_value::<RulePlan>(bad).is_err(), "{name}");
    }
}

#[test]
fn callers_are_spiffe_ids_or_prefixes_of_whole_trust_domains() {
    for bad in [
        "spiffe://td",
        "spiffe:///",
        "spiffe:///a",
        "*/ns/a",
        "https://td/",
        "",
        "spiffe://TD/",
        "spiffe://td/a//",
        "spiffe://td/../",
        "spiffe://t*/a",
    ] {
        assert!(mistake("allow", json!({"from": [prefix(bad)]})).contains("whole trust domain"), "{bad}");
        assert!(mistake("deny", json!({"not_from": [prefix(bad)]})).contains("not_from"), "{bad}");
    }
    for bad in [
        "spiffe://td",
        "spiffe://td/",
        "spiffe://td/a/",
        "spiffe://td/a/../b",
        "td/a",
        "",
        "spiffe://td/a*",
        "spiffe://td/%61",
        "SPIFFE://td/a",
    ] {
        assert!(mistake("allow", json!({"from": [exact(bad)]})).contains("write the whole of it"), "{bad}");
    }
    for good in ["spiffe://", "spiffe://td/", "spiffe://td/ns/a", "spiffe://td/ns/a/", "spiffe://a.b-c_1/x."] {
        assert_eq!(mistakes(rule("allow", json!({"from": [prefix(good)]}))), Vec::<String>::new());
    }
    let principal = |value: Value| json!({"when": [{"key": "source.principal", "values": [value], "not_values": []}]});
    assert!(mistake("allow", principal(suffix("/ns/a/sa/x"))).contains("any trust domain"));
    assert!(mistake("allow", principal(exact("td/ns/a/sa/x"))).contains("spiffe://"));
}

#[test]
fn paths_are_written_as_they_are_compared() {
    for bad in ["", "a", "//a", "/a/../b", "/a/..", "/a\\b", "/a\n", "/a%2fb", "/a%20b"] {
        assert!(mistake("deny", json!({"paths": [exact(bad)]})).contains("could never match"), "{bad}");
        assert!(
            mistake("deny", json!({"not_paths": [{"kind": "template", "value": bad}]})).contains("could never match"),
            "{bad}"
        );
    }
    for bad in ["a", "//a", "/./", "/a%2f"] {
        assert!(mistake("deny", json!({"paths": [prefix(bad)]})).contains("could never match"), "{bad}");
    }
    for bad in ["//a", "/..", "a/./b", "\\a", "%2f"] {
        assert!(mistake("deny", json!({"paths": [suffix(bad)]})).contains("could never match"), "{bad}");
    }
    for good in [
        exact("*"),
        prefix(""),
        prefix("*"),
        prefix("/."),
        suffix(""),
        suffix(".."),
        suffix("x/y"),
        exact("/a?b"),
        exact("/caf\u{e9}"),
    ] {
        assert_eq!(mistakes(rule("deny", json!({"paths": [good]}))), Vec::<String>::new(), "{good}");
    }
    for bad in ["/a{b", "/{a}b", "/{}", "/{a*}", "/a*/{b}", "/{**}x", "/{***}"] {
        assert!(
            mistake("deny", json!({"paths": [{"kind": "template", "value": bad}]})).contains("neither text nor"),
            "{bad}"
        );
    }
    for bad in ["/{**}/{*}", "/{**}/{**}", "/{**}/a/{b}"] {
        assert!(
            mistake("deny", json!({"paths": [{"kind": "template", "value": bad}]})).contains("behind {**}"),
            "{bad}"
        );
    }
}

#[test]
fn expressions_are_linear_short_and_whole() {
    let found = |pattern: &str| mistake("deny", json!({"paths": [{"kind": "regex", "value": pattern}]}));
    for (bad, words) in [
        ("(?P<x>a)(?P=x)", "can't be used"),
        ("/(a", "can't be used"),
        ("/a)|(/b", "can't be used"),
        ("/(?=a)", "can't be used"),
        (r"/\p{L}", "can't be used"),
        (r"/(a{1000}){1000}", "can't be used"),
        ("admin/.*", "begins with a slash"),
        ("^admin", "begins with a slash"),
        ("/a%2fb", "could never match"),
    ] {
        assert!(found(bad).contains(words), "{bad}: {}", found(bad));
    }
    assert!(found(&format!("/{}", "a".repeat(1024))).contains("1024"));
    assert_eq!(
        mistakes(rule("deny", json!({"paths": [{"kind": "regex", "value": format!("/{}", "a".repeat(1023))}]}))),
        Vec::<String>::new()
    );
}

#[test]
fn hosts_have_no_port_and_namespaces_no_slash() {
    for bad in ["a:80", "a.", "a/b", "b\u{fc}cher.example", "a..b", "", "*.a", "http://a"] {
        assert_eq!(mistakes(rule("deny", json!({"hosts": [exact(bad)]}))).len(), 1, "{bad}");
    }
    for bad in [prefix(".a"), suffix("a."), suffix("*.a"), prefix("a..")] {
        assert_eq!(mistakes(rule("deny", json!({"not_hosts": [bad]}))).len(), 1, "{bad}");
    }
    for bad in [exact("ns/a"), prefix("a/"), exact("a b"), exact("")] {
        assert_eq!(mistakes(rule("deny", json!({"namespaces": [bad]}))).len(), 1, "{bad}");
    }
    assert!(mistake("allow", json!({"request_principals": [exact("ada")]})).contains("https://issuer/subject"));
}

#[test]
fn conditions_name_known_facts_and_never_baggage() {
    let of =
        |key: &str, value: Value| mistake("deny", json!({"when": [{"key": key, "values": [value], "not_values": []}]}));
    for key in [
        "request.headers[baggage]",
        "request.headers[Baggage-x]",
        "baggage",
        "baggage.tenant",
        "request.headers[ot-baggage-x]",
    ] {
        assert!(of(key, exact("a")).contains("baggage"), "{key}");
    }
    for (key, words) in [
        ("request.header[x]", "not known"),
        ("destination.ip", "not known"),
        ("request.headers[]", "no name of a header"),
        ("request.headers[x y]", "no name of a header"),
        ("request.headers[x_role]", "with dashes"),
        ("request.headers[Host]", "\"hosts\""),
        ("request.headers[:path]", "\"paths\""),
        ("request.headers[:method]", "\"methods\""),
        ("request.headers[x-forwarded-for]", "remote_ip_blocks"),
        ("request.headers[X-Forwarded-Client-Cert]", "\"from\""),
        ("request.auth.claims[]", "names no claim"),
        ("request.auth.claims[a][]", "names no claim"),
        ("request.auth.claims[a]b]", "names no claim"),
        ("request.auth.claims[a][b][c][d][e][f][g][h][i]", "names no claim"),
        ("request.auth.claims", "not known"),
    ] {
        assert!(of(key, exact("a")).contains(words), "{key}: {}", of(key, exact("a")));
    }
    for (key, value) in [
        ("source.ip", any()),
        ("source.ip", prefix("10.")),
        ("remote.ip", exact("10.0.0.0/33")),
        ("destination.port", exact("http")),
        ("destination.port", exact("0")),
        ("destination.port", exact("+80")),
        ("destination.port", exact("70000")),
        ("destination.port", any()),
        ("connection.sni", exact("a:443")),
        ("source.namespace", exact("ns/a")),
        ("request.auth.principal", exact("ada")),
        ("request.headers[x]", exact("")),
        ("request.headers[x]", exact("a\r\nb")),
    ] {
        of(key, value);
    }
    let nothing = json!({"when": [{"key": "source.ip", "values": [], "not_values": []}]});
    assert!(mistake("deny", nothing).contains("neither values nor not_values"));
}

#[test]
fn what_takes_away_all_that_it_gives_is_a_mistake() {
    for (field, values, not_values) in [
        ("from", json!([exact(SHOP)]), json!([prefix("spiffe://shop/")])),
        ("namespaces", json!([exact("a"), prefix("ab")]), json!([prefix("a")])),
        ("request_principals", json!([suffix("/ada")]), json!([suffix("a")])),
        ("ip_blocks", json!(["10.1.0.0/16"]), json!(["10.0.0.0/8"])),
        ("remote_ip_blocks", json!(["::1"]), json!(["::1"])),
        ("methods", json!(["GET"]), json!(["PUT", "GET"])),
        ("paths", json!([exact("/a")]), json!([prefix("/")])),
        ("hosts", json!([exact("a.b")]), json!([suffix(".b")])),
        ("ports", json!([80]), json!([80, 81])),
    ] {
        let fields = json!({field: values, format!("not_{field}"): not_values});
        assert!(mistake("deny", fields).contains("leave out one of them"), "{field}");
        let some = json!({field: not_values, format!("not_{field}"): values});
        let is_same = values == not_values;
        assert_eq!(mistakes(rule("deny", some)).len(), usize::from(is_same), "{field}");
    }
    let condition = json!([{"key": "destination.port", "values": [exact("80")], "not_values": [exact("80")]}]);
    assert!(mistake("deny", json!({"when": condition})).contains("not_values too"));
}

#[test]
fn spaces_around_the_value_of_a_header_are_refused() {
    let condition =
        |value: &Value| json!({"when": [{"key": "request.headers[x-role]", "values": [value], "not_values": []}]});
    for bad in [exact(" admin"), exact("admin "), exact(" "), prefix(" a"), suffix("n ")] {
        assert!(mistake("deny", condition(&bad)).contains("spaces around a value"), "{bad}");
    }
    for good in [exact("an admin"), prefix("an "), suffix(" admin"), any()] {
        assert_eq!(mistakes(rule("deny", condition(&good))), Vec::<String>::new(), "{good}");
    }
}

#[test]
fn not_anybody_is_nobody() {
    assert!(mistake("deny", json!({"not_from": [any()]})).contains("leaves nobody"));
    assert!(mistake("allow", json!({"not_from": [prefix("spiffe://")]})).contains("leaves nobody"));
    assert!(mistake("deny", json!({"not_paths": [prefix("")]})).contains("leaves nobody"));
    // Of a denial it is "unless there is one", the usual way to ask for a token.
    for field in ["not_request_principals", "not_namespaces", "not_hosts"] {
        assert!(mistake("allow", json!({field: [any()]})).contains("leaves nobody"), "{field}");
        assert_eq!(mistakes(rule("deny", json!({field: [any()]}))), Vec::<String>::new(), "{field}");
    }
}

#[test]
fn only_custom_rules_ask_and_all_of_them_the_same_authorizer() {
    assert!(mistake("custom", json!({"authorizer": ""})).contains("whom it asks"));
    assert!(mistake("deny", json!({"authorizer": "desk"})).contains("custom"));
    let (desk, opa) = (rule("custom", json!({})), rule("custom", json!({"authorizer": "opa"})));
    let found = Rules::compile(&plans(&[desk.clone(), opa.clone()])).unwrap_err();
    assert!(found.len() == 1 && found[0].contains("\"desk\"") && found[0].contains("\"opa\""), "{found:?}");
    // A dry-run rule asks nobody.
    let mut dry = opa;
    dry["dry_run"] = json!(true);
    assert!(Rules::compile(&plans(&[desk.clone(), desk, dry])).is_ok());
}
