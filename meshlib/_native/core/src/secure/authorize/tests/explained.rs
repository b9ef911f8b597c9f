//! A refusal names the nearest rule, the clause and the line; a denial the rule and the clause.
use super::*;

fn explain(rules: &Rules, call: &Call) -> String {
    rules.explain(rules.answer(call).rule, &call.question())
}

#[test]
fn a_refusal_names_the_nearest_rule_and_what_would_allow_it() {
    let far = rule("allow", json!({"name": "health", "methods": ["GET"], "paths": [exact("/health")]}));
    let near = rule(
        "allow",
        json!({"name": "shop", "from": [exact(SHOP)], "methods": ["GET", "POST"], "paths": [prefix("/orders/")]}),
    );
    let rules = rules(&[far, near]);
    assert_eq!(
        explain(&rules, &get("/orders/7").by(Some(BROWSER))),
        "no rule allows it. The nearest: rule \"shop\" allows GET, POST on /orders/* to spiffe://shop/ns/default/sa/storefront; \
         the caller \"spiffe://shop/ns/default/sa/browser\" is not in \"from\". Add it to \"from\" of rule \"shop\" to allow it: \
         from: [\"spiffe://shop/ns/default/sa/browser\"]. This would allow it: allow: [{name: …, \
         from: [\"spiffe://shop/ns/default/sa/browser\"], methods: [GET], paths: [\"/orders/7\"]}]."
    );
    for (call, words) in [
        (call("PUT", "/orders/7"), "the method PUT is not in \"methods\". Add it to \"methods\" of rule \"shop\" to allow it: methods: [PUT]."),
        (call("POST", "/other"), "the path \"/other\" is not in \"paths\". Add it to \"paths\" of rule \"shop\" to allow it: paths: [\"/other\"]."),
        (call("POST", "/orders/7").by(None), "the caller proved no identity (\"from\"). Let the caller come over mutual TLS"),
    ] {
        let text = explain(&rules, &call);
        assert!(text.contains(words), "{text}");
        assert_eq!(rules.nearest_name(&call.question()), "shop");
    }
    // With more than one clause that failed, an entry alone would change nothing.
    let text = explain(&rules, &call("PUT", "/orders/7").by(Some(BROWSER)));
    assert!(text.contains("is not in \"from\". This would allow it: allow: ["), "{text}");
}

#[test]
fn the_line_allows_it() {
    for target in [
        "/orders/7",
        "/a%20b",
        "/a%22b",
        "/a%5Cb",
        "/caf%C3%A9",
        "/a*b",
        "/%7Ba%7D",
        "/a;b/c",
        "/x%E2%80%AEy",
        "/",
        "/a.b+c",
    ] {
        let call = get(target);
        let text = explain(&rules(&[]), &call);
        let (_, line) = text.split_once("allow: [{name: …, from: [").unwrap();
        // What stands in the lists is JSON as well as YAML, but for YAML's long escapes.
        let (key, list) = line.split_once("methods: [GET], ").unwrap().1.split_once(": ").unwrap();
        let list = list.strip_suffix("}].").unwrap().replace("\\U0000", "\\u");
        let values: Vec<String> = serde_json::from_str(&list).unwrap();
        let kind = match key {
            "paths" => "exact",
            "path_regexes" => "regex",
            other => panic!("{other}"),
        };
        let fields = json!({"from": [exact(SHOP)], "methods": ["GET"], "paths": [{"kind": kind, "value": values[0]}]});
        assert!(rules(&[rule("allow", fields)]).allows(&call), "{target}: {line}");
    }
}

#[test]
fn every_clause_can_be_the_one_that_failed() {
    let ada = get("/").claiming(json!({"role": "clerk"}));
    let when = |key: &str, value: Value| json!({"when": [{"key": key, "values": [value], "not_values": []}]});
    let secret = get("/").with("x-role", "hunter2");
    for (fields, call, words) in [
        (json!({"not_from": [exact(SHOP)]}), get("/"), "the caller \"spiffe://shop/ns/default/sa/storefront\" is in \"not_from\". Take it out"),
        (json!({"namespaces": [exact("a")]}), get("/"), "the caller's namespace \"default\" is not in \"namespaces\""),
        (json!({"namespaces": [exact("a")]}), get("/").by(None), "proved no identity with a namespace (\"namespaces\")"),
        (json!({"request_principals": [exact("https://issuer/x")]}), ada.clone(), "the token's principal \"https://issuer/ada\" is not in \"request_principals\""),
        (json!({"request_principals": [any()]}), get("/"), "no token was shown (\"request_principals\"). Let the caller show a token"),
        (json!({"ip_blocks": ["1.0.0.0/8"]}), get("/"), "the address 10.0.0.7 of the connection is not in \"ip_blocks\""),
        (json!({"ip_blocks": ["1.0.0.0/8"]}), Call { source: None, ..get("/") }, "the address of the connection is not known (\"ip_blocks\")"),
        (json!({"not_remote_ip_blocks": ["203.0.113.0/24"]}), get("/"), "the client's address 203.0.113.9 is in \"not_remote_ip_blocks\""),
        (json!({"not_methods": ["GET"]}), get("/"), "the method GET is in \"not_methods\""),
        (json!({"not_paths": [exact("/")]}), get("/"), "the path \"/\" is in \"not_paths\""),
        (json!({"hosts": [exact("a")]}), get("/"), "the host \"orders\" is not in \"hosts\". Add it to \"hosts\" of rule \"r\" to allow it: hosts: [\"orders\"]"),
        (json!({"hosts": [exact("a")]}), Call { host: None, ..get("/") }, "the host is not known (\"hosts\")"),
        (json!({"hosts": [exact("a")]}), Call { host: Some("a:b".into()), ..get("/") }, "the host \"a:b\" can be read in two ways"),
        (json!({"ports": [1]}), get("/"), "the port 8443 is not in \"ports\""),
        (json!({"ports": [1]}), Call { port: 0, ..get("/") }, "our port is not known"),
        (when("request.headers[x-role]", exact("a")), get("/"), "there is no header \"x-role\" (the values of \"request.headers[x-role]\")"),
        (when("request.headers[x-role]", exact("a")), secret.clone(), "the header \"x-role\" is not in the values of \"request.headers[x-role]\""),
        (when("request.headers[x-role]", exact("a")), secret.clone().with("x-role", "a"), "the header \"x-role\" stands 2 times"),
        (when("request.auth.claims[role]", exact("a")), ada.clone(), "the claim of the token is not in the values of \"request.auth.claims[role]\""),
        (when("request.auth.claims[age]", exact("a")), ada, "the token has no such claim"),
        (when("connection.sni", exact("a")), get("/"), "the server's name \"orders\" is not in"),
    ] {
        let text = explain(&rules(&[rule("allow", fields)]), &call);
        assert!(text.contains(words), "{text}");
        assert!(!text.contains("hunter2"), "{text}");
    }
}

#[test]
fn a_denial_names_the_rule_and_the_clauses_that_made_it_fire() {
    let fields = json!({"name": "no-admin", "methods": ["GET"], "paths": [exact("/admin")], "not_from": [exact(SHOP)]});
    let rules = rules(&[rule("deny", fields), rule("allow", json!({}))]);
    assert_eq!(
        explain(&rules, &call("HEAD", "/admin/").by(Some(BROWSER))),
        "rule \"no-admin\" denies GET on /admin from anyone, with \"not_from\": the caller \
         \"spiffe://shop/ns/default/sa/browser\" is not in \"not_from\"; the method HEAD is in \"methods\"; the path \"/admin/\" is \
         in \"paths\". Only a narrower \"not_from\" or \"methods\" or \"paths\" of that rule would allow HEAD on \"/admin/\" to \
         \"spiffe://shop/ns/default/sa/browser\"."
    );
    let text = explain(&rules, &get("/admin").by(None));
    assert!(text.contains("the caller proved no identity (\"not_from\")"), "{text}");
}

#[test]
fn a_denial_for_want_of_a_token_asks_for_one() {
    let rules = rules(&[rule("deny", json!({"not_request_principals": [any()]})), rule("allow", json!({}))]);
    let text = explain(&rules, &get("/"));
    assert!(
        text.contains("no token was shown (\"not_request_principals\"). Only a token that fits could allow GET"),
        "{text}"
    );
}

#[test]
fn a_denial_of_everything_says_so() {
    let rules = rules(&[rule("deny", json!({"name": "stop"}))]);
    let text = explain(&rules, &get("/"));
    assert!(
        text.starts_with("rule \"stop\" denies every method on every path from anyone: it has no clause"),
        "{text}"
    );
}

#[test]
fn what_is_not_known_is_said() {
    let rules = rules(&[rule("deny", json!({"ports": [80], "hosts": [exact("a")]})), rule("allow", json!({}))]);
    let text = explain(&rules, &Call { port: 0, host: None, ..get("/") });
    assert!(text.contains("the host is not known (\"hosts\"); our port is not known (\"ports\")"), "{text}");
}

#[test]
fn text_from_outside_is_escaped_and_cut() {
    let long = format!("/%E2%80%AE{}", "x".repeat(1000));
    for list in
        [&[][..], &[rule("allow", json!({"paths": [exact("/")]}))], &[rule("deny", json!({"paths": [prefix("/")]}))]]
    {
        let text = explain(&rules(list), &get(&long));
        assert!(!text.contains('\u{202e}') && text.len() < 1200, "{text}");
    }
}
