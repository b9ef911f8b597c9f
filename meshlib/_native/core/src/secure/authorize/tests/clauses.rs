//! Every clause, as a permission and as a denial: a table for each, of calls with what they are to both.
use super::*;

/// With one rule that has only these fields: what a permission lets in, and what a denial fires at.
fn judged(fields: &Value, call: &Call) -> (bool, bool) {
    let open = rule("allow", json!({}));
    let denied = rules(&[rule("deny", fields.clone()), open.clone()]).answer(call);
    let custom = rules(&[rule("custom", fields.clone()), open]).answer(call);
    assert_eq!(custom.custom.is_some(), !denied.is_allowed, "a custom rule fires where a denial would");
    (rules(&[rule("allow", fields.clone())]).allows(call), !denied.is_allowed)
}

/// (call, it is allowed, it is denied)
fn table(fields: Value, cases: &[(Call, bool, bool)]) {
    for (call, is_allowed, is_denied) in cases {
        assert_eq!(judged(&fields, call), (*is_allowed, *is_denied), "{fields} {call:?}");
    }
}

fn by(peer: Option<&str>) -> Call {
    get("/").by(peer)
}

fn when(key: &str, values: Value, not_values: Value) -> Value {
    json!({"when": [{"key": key, "values": values, "not_values": not_values}]})
}

#[test]
fn from_and_not_from() {
    table(json!({"from": [any()]}), &[(by(None), true, true), (by(Some(SHOP)), true, true)]);
    for (fields, ours) in [
        (json!({"from": [exact(SHOP)]}), SHOP),
        (when("source.principal", json!([exact(SHOP)]), json!([])), SHOP),
        (json!({"from": [prefix("spiffe://td/ns/a/")]}), "spiffe://td/ns/a/sa/x"),
    ] {
        table(
            fields,
            &[
                (by(Some(ours)), true, true),
                (by(Some(&format!("{ours}2"))), ours != SHOP, ours != SHOP),
                (by(Some("spiffe://td/ns/ab/sa/x")), false, false),
                (by(Some("spiffe://td/ns/a")), false, false),
                (by(Some("spiffe://td.evil/ns/a/sa/x")), false, false),
                (by(None), false, false),
            ],
        );
    }
    // Who proved nothing didn't prove to be somebody else.
    for fields in [json!({"not_from": [exact(SHOP)]}), when("source.principal", json!([]), json!([exact(SHOP)]))] {
        table(fields, &[(by(Some(SHOP)), false, false), (by(Some(BROWSER)), true, true), (by(None), false, true)]);
    }
    for fields in [json!({"from": [prefix("spiffe://")]}), when("source.principal", json!([any()]), json!([]))] {
        table(fields, &[(by(Some("spiffe://td/x")), true, true), (by(None), false, false)]);
    }
    let nobody = json!({"not_from": [prefix("spiffe://")]});
    let rules = rules(&[rule("deny", nobody), rule("allow", json!({}))]);
    assert!(rules.allows(&by(Some(SHOP))) && !rules.allows(&by(None)));
}

#[test]
fn a_dot_in_a_principal_is_a_dot() {
    table(
        json!({"from": [exact("spiffe://a.b/x.y")]}),
        &[(get("/").by(Some("spiffe://a.b/x.y")), true, true), (get("/").by(Some("spiffe://a.b/xay")), false, false)],
    );
}

#[test]
fn namespaces_and_not_namespaces() {
    for fields in [json!({"namespaces": [exact("a")]}), when("source.namespace", json!([exact("a")]), json!([]))] {
        table(
            fields,
            &[
                (by(Some("spiffe://td/ns/a/sa/x")), true, true),
                (by(Some("spiffe://other/ns/a/sa/x")), true, true),
                (by(Some("spiffe://td/ns/ab/sa/x")), false, false),
                (by(Some("spiffe://td/ns/b/sa/a")), false, false),
                // In doubt: it could be read as one.
                (by(Some("spiffe://td/ns/b/ns/a/sa/x")), false, true),
                (by(Some("spiffe://td/eu/ns/a/sa/x")), false, true),
                (by(Some("spiffe://td/ns/ns/a/x")), false, true),
                (by(Some("spiffe://td/ns/a")), false, true),
                (by(Some("spiffe://td/a")), false, false),
                (by(None), false, false),
            ],
        );
    }
    table(
        json!({"namespaces": [prefix("team-"), suffix("-prod")]}),
        &[
            (by(Some("spiffe://td/ns/team-a/sa/x")), true, true),
            (by(Some("spiffe://td/ns/a-prod/sa/x")), true, true),
            (by(Some("spiffe://td/ns/a-prod2/sa/x")), false, false),
        ],
    );
    for fields in [json!({"not_namespaces": [exact("a")]}), when("source.namespace", json!([]), json!([exact("a")]))] {
        table(
            fields,
            &[
                (by(Some("spiffe://td/ns/a/sa/x")), false, false),
                (by(Some("spiffe://td/ns/b/sa/x")), true, true),
                (by(Some("spiffe://td/ns/b/ns/a/sa/x")), false, true),
                (by(Some("spiffe://td/x")), false, true),
                (by(None), false, true),
            ],
        );
    }
}

#[test]
fn request_principals_and_not_request_principals() {
    let ada = get("/").claiming(json!({"sub": "ada"}));
    let bob = get("/").claiming(json!({"sub": "bob"}));
    for pattern in [exact("https://issuer/ada"), prefix("https://issuer/a"), suffix("/ada")] {
        for fields in
            [json!({"request_principals": [pattern]}), when("request.auth.principal", json!([pattern]), json!([]))]
        {
            table(fields, &[(ada.clone(), true, true), (bob.clone(), false, false), (get("/"), false, false)]);
        }
        for fields in
            [json!({"not_request_principals": [pattern]}), when("request.auth.principal", json!([]), json!([pattern]))]
        {
            table(fields, &[(ada.clone(), false, false), (bob.clone(), true, true), (get("/"), false, true)]);
        }
    }
    table(json!({"request_principals": [any()]}), &[(bob.clone(), true, true), (get("/"), false, false)]);
    // A token about nobody has no principal.
    let nobody = get("/").claiming(json!({"sub": ""}));
    table(json!({"request_principals": [any()]}), &[(nobody.clone(), false, false)]);
    table(json!({"not_request_principals": [exact("https://issuer/ada")]}), &[(nobody, false, true)]);
}

#[test]
fn addresses_of_the_connection_and_of_the_client() {
    let from = |source: &str, remote: &str| {
        let (source, remote) = (source.parse().ok(), remote.parse().ok());
        Call { source, remote, ..get("/") }
    };
    let sources = ["ip_blocks", "source.ip"];
    let remotes = ["remote_ip_blocks", "remote.ip"];
    for ([field, key], is_source) in [(sources, true), (remotes, false)] {
        let at = |address: &str| if is_source { from(address, "9.9.9.9") } else { from("9.9.9.9", address) };
        let values = json!([exact("10.0.0.0/8"), exact("::1")]);
        for fields in [json!({field: ["10.0.0.0/8", "::1"]}), when(key, values.clone(), json!([]))] {
            table(
                fields,
                &[
                    (at("10.9.9.9"), true, true),
                    (at("::ffff:10.9.9.9"), true, true),
                    (at("::1"), true, true),
                    (at("11.0.0.1"), false, false),
                    (at("::2"), false, false),
                    (at("unknown"), false, true),
                ],
            );
        }
        for fields in [json!({format!("not_{field}"): ["10.0.0.0/8", "::1"]}), when(key, json!([]), values)] {
            table(
                fields,
                &[(at("10.9.9.9"), false, false), (at("11.0.0.1"), true, true), (at("unknown"), false, true)],
            );
        }
    }
}

#[test]
fn methods_and_not_methods() {
    let cases = |table: [(&'static str, bool, bool); 4]| table.map(|(method, a, b)| (call(method, "/"), a, b));
    // What a framework answers to HEAD is what it answers to GET.
    table(
        json!({"methods": ["GET", "POST"]}),
        &cases([("GET", true, true), ("POST", true, true), ("PUT", false, false), ("HEAD", false, true)]),
    );
    table(
        json!({"methods": ["HEAD"]}),
        &cases([("GET", false, false), ("POST", false, false), ("PUT", false, false), ("HEAD", true, true)]),
    );
    table(
        json!({"not_methods": ["GET"]}),
        &cases([("GET", false, false), ("POST", true, true), ("PUT", true, true), ("HEAD", false, true)]),
    );
    table(
        json!({"not_methods": ["HEAD"]}),
        &cases([("GET", true, true), ("POST", true, true), ("PUT", true, true), ("HEAD", false, false)]),
    );
}

/// (target, it is allowed, it is denied)
fn targets(fields: Value, cases: &[(&str, bool, bool)]) {
    let calls: Vec<_> = cases.iter().map(|(target, a, b)| (get(target), *a, *b)).collect();
    table(fields, &calls);
}

fn template(value: &str) -> Value {
    json!({"kind": "template", "value": value})
}

fn regex(value: &str) -> Value {
    json!({"kind": "regex", "value": value})
}

#[test]
fn exact_paths_prefixes_and_suffixes() {
    targets(
        json!({"paths": [exact("/admin")]}),
        &[
            ("/admin", true, true),
            ("/x/..%2fadmin", true, true),
            ("/admin/", false, true),
            ("/admin;a=b", false, true),
            ("/public/..;/admin", false, true),
            ("/administrator", false, false),
            ("/admin/x", false, false),
            ("/ADMIN", false, false),
        ],
    );
    targets(
        json!({"paths": [prefix("/public/")]}),
        &[("/public/x", true, true), ("/public/..;/admin", false, true), ("/public", false, false)],
    );
    targets(json!({"paths": [prefix("")]}), &[("/", true, true), ("/a/b;c/..;/", true, true)]);
    targets(
        json!({"paths": [suffix(".css")]}),
        &[
            ("/a/b.css", true, true),
            ("/a/b.css/", false, true),
            ("/admin?x=.css", false, false),
            ("/admin%3F.css", true, true),
            ("/admin;.css", false, true),
        ],
    );
    targets(
        json!({"paths": [suffix("/login")]}),
        &[("/login", true, true), ("/a/login", true, true), ("/xlogin", false, false)],
    );
}

#[test]
fn not_paths_leave_out_what_could_be_read_as_one() {
    targets(
        json!({"not_paths": [exact("/admin")]}),
        &[
            ("/admin", false, false),
            ("//admin", false, false),
            ("/admin/", false, true),
            ("/admin;x", false, true),
            ("/public", true, true),
        ],
    );
}

#[test]
fn templates_match_segment_for_segment() {
    targets(
        json!({"paths": [template("/items/{id}/parts")]}),
        &[
            ("/items/7/parts", true, true),
            ("/items/7/parts/", false, true),
            ("/items/7", false, false),
            ("/items//parts", false, false),
            ("/items/7/8/parts", false, false),
        ],
    );
    targets(json!({"paths": [template("/items/{*}")]}), &[("/items/7", true, true), ("/items/", false, false)]);
    targets(
        json!({"paths": [template("/files/{*}/{**}")]}),
        &[
            ("/files/a/b", true, true),
            ("/files/a/b/c/d", true, true),
            ("/files/a/", true, true),
            ("/files/a", false, false),
            ("/files/", false, false),
        ],
    );
    targets(
        json!({"paths": [template("/v1/{**}/acl")]}),
        &[
            ("/v1/a/acl", true, true),
            ("/v1/a/b/acl", true, true),
            ("/v1/acl/acl", true, true),
            ("/v1/acl", false, false),
            ("/v1/a/acl/b", false, false),
        ],
    );
    targets(json!({"paths": [template("/{**}")]}), &[("/", true, true), ("/a/b", true, true)]);
}

#[test]
fn expressions_match_whole_paths_and_ascii_classes() {
    targets(
        json!({"paths": [regex("/v1/users/[0-9]+")]}),
        &[
            ("/v1/users/7", true, true),
            ("/x/v1/users/7", false, false),
            ("/v1/users/7/x", false, false),
            ("/v1/users/7;x", false, true),
        ],
    );
    // Digits of other scripts are none, as in RE2; a dot is any character.
    for (pattern, target, is_match) in [
        (r"/u/\d+", "/u/7", true),
        (r"/u/\d+", "/u/%D9%A7", false),
        (r"/u/[\d_]+", "/u/7_", true),
        (r"/u/[^\d]", "/u/%D9%A7", true),
        (r"/\w+", "/caf%C3%A9", false),
        (r"/\W", "/%C3%A9", true),
        (r"/a\sb\Sc", "/a%20bxc", true),
        (r"/a\sb", "/a%C2%A0b", false),
        (r"/a\b.*", "/a-", true),
        (r"/a\b.*", "/ab", false),
        (r"/caf.", "/caf%C3%A9", true),
        (r"/\\d", "/7", false),
        ("/admin\\.local", "/adminXlocal", false),
        // The anchors hold for every branch.
        ("/a|/b", "/a/x", false),
        ("/a|/b", "/x/b", false),
        ("/a|/b", "/b", true),
        ("^/a$", "/a", true),
        ("(?i)/a", "/A", true),
    ] {
        let fields = json!({"paths": [regex(pattern)]});
        assert_eq!(judged(&fields, &get(target)), (is_match, is_match), "{pattern} {target}");
    }
}

#[test]
fn a_text_that_is_too_long_for_an_expression_is_denied() {
    let long = Call { path: Path::exact(&format!("/{}", "a".repeat(8192))), ..get("/") };
    table(json!({"paths": [regex("/b")]}), &[(long, false, true)]);
    let longest = Call { path: Path::exact(&format!("/{}", "a".repeat(8191))), ..get("/") };
    table(json!({"paths": [regex("/a+")]}), &[(longest, true, true)]);
}

#[test]
fn no_text_makes_an_expression_slow() {
    let evil = get(&format!("/{}!", "a".repeat(8000)));
    for pattern in ["/(a+)+", "/(a|a)*b", "/(x+x+)+y", "/(.*a){12}b"] {
        table(json!({"paths": [regex(pattern)]}), &[(evil.clone(), false, false)]);
    }
}

#[test]
fn case_counts_unless_the_rule_says_otherwise() {
    for pattern in [exact("/Admin"), prefix("/aDMin"), suffix("/ADMIN"), template("/aDmin"), regex("/[A]dmin")] {
        targets(
            json!({"paths": [pattern], "is_case_insensitive": true}),
            &[
                ("/aDm%49n", true, true),
                ("/ADMIN/", pattern["kind"] == "prefix", true),
                ("/adm%C4%B0n", false, false),
                ("/other", false, false),
            ],
        );
    }
    let fields = json!({"paths": [exact("/stra\u{df}e/\u{3c3}")], "is_case_insensitive": true});
    targets(fields, &[("/STRASSE/%CE%A3", true, true), ("/stra%E1%BA%9Ee/%CF%82", true, true)]);
    targets(
        json!({"not_paths": [exact("/a")], "is_case_insensitive": true}),
        &[("/A", false, false), ("/b", true, true)],
    );
    // The dotless i is a letter of its own, a long s is none.
    let fields = json!({"paths": [exact("/sin")], "is_case_insensitive": true});
    targets(fields, &[("/%C5%BFIN", true, true), ("/s%C4%B1n", false, false)]);
}

#[test]
fn an_expression_without_case_still_finds_letters_that_folding_spells_out() {
    let of = |key: &str, pattern: &str| json!({key: [regex(pattern)], "is_case_insensitive": true});
    targets(
        of("paths", "/stra\u{df}e/.*"),
        &[
            ("/stra%C3%9Fe/x", true, true),
            ("/STRA%E1%BA%9EE/x", true, true),
            ("/x/stra%C3%9Fe/", false, false),
            ("/stra%C3%9Fe/x;y", true, true),
        ],
    );
    targets(of("paths", "/\u{fb01}le"), &[("/%EF%AC%81LE", true, true), ("/other", false, false)]);
    // A denial takes the folded spelling as well.
    targets(of("paths", "/strasse"), &[("/stra%C3%9Fe", false, true), ("/STRASSE", true, true)]);
    targets(
        of("not_paths", "/stra\u{df}e/.*"),
        &[("/stra%C3%9Fe/x", false, false), ("/STRA%E1%BA%9EE/x", false, false), ("/other", true, true)],
    );
    targets(of("not_paths", "/strasse"), &[("/stra%C3%9Fe", false, true), ("/STRASSE", false, false)]);
}

#[test]
fn hosts_are_compared_without_case_port_and_last_dot() {
    let to = |host: Option<&str>| Call { host: host.map(str::to_owned), ..get("/") };
    table(
        json!({"hosts": [exact("Secret.com")]}),
        &[
            (to(Some("secret.com")), true, true),
            (to(Some("SECRET.COM")), true, true),
            (to(Some("secret.com:443")), true, true),
            (to(Some("Secret.com.:80")), true, true),
            (to(Some("secret.com:")), true, true),
            (to(Some("secret.com.evil.org")), false, false),
            (to(Some("notsecret.com")), false, false),
            // Two readings, or none: in doubt.
            (to(Some("secret.com:80:80")), false, true),
            (to(Some("secret.com:x")), false, true),
            (to(Some("secret.com..")), false, true),
            (to(Some("secret%2ecom")), false, true),
            (to(Some("")), false, true),
            (to(None), false, true),
        ],
    );
    for (pattern, host) in
        [(prefix("api."), "API.x"), (suffix(".Shop"), "a.b.SHOP:1"), (exact("[::1]"), "[::1]:80"), (any(), "a")]
    {
        table(json!({"hosts": [pattern]}), &[(to(Some(host)), true, true), (to(Some("a b")), false, true)]);
    }
    table(json!({"hosts": [prefix("api."), suffix(".shop")]}), &[(to(Some("a")), false, false)]);
    table(
        json!({"not_hosts": [exact("secret.com")]}),
        &[
            (to(Some("SECRET.com:1")), false, false),
            (to(Some("public.com")), true, true),
            (to(Some("a/b")), false, true),
            (to(None), false, true),
        ],
    );
}

#[test]
fn ports_and_not_ports() {
    let on = |port| Call { port, ..get("/") };
    for fields in
        [json!({"ports": [80, 8443]}), when("destination.port", json!([exact("80"), exact("8443")]), json!([]))]
    {
        table(fields, &[(on(80), true, true), (on(8443), true, true), (on(81), false, false), (on(0), false, true)]);
    }
    for fields in [json!({"not_ports": [80]}), when("destination.port", json!([]), json!([exact("80")]))] {
        table(fields, &[(on(80), false, false), (on(81), true, true), (on(0), false, true)]);
    }
}

#[test]
fn headers_that_stand_twice_are_one_and_the_other() {
    let none = get("/");
    let with = |fields: &[&str]| {
        fields.iter().fold(get("/").with("x-other", "admin"), |call, value| call.with("x-role", value))
    };
    table(
        when("request.headers[X-Role]", json!([exact("admin")]), json!([])),
        &[
            (with(&["admin"]), true, true),
            (with(&[" admin\t"]), true, true),
            (with(&["user", "admin"]), false, true),
            (with(&["admin", "x"]), false, true),
            (with(&["admin", "admin"]), false, true),
            (with(&["user, admin"]), false, true),
            (with(&["user,admin ,x"]), false, true),
            (with(&["ADMIN"]), false, false),
            (with(&["administrator"]), false, false),
            (with(&[""]), false, false),
            (none.clone(), false, false),
            (get("/").with("x-other", "admin"), false, false),
        ],
    );
    table(
        when("request.headers[x-role]", json!([]), json!([exact("admin")])),
        &[
            (with(&["admin"]), false, false),
            (with(&["user"]), true, true),
            (with(&["user", "admin"]), false, true),
            (with(&["user", "user"]), false, true),
            (with(&["user,admin"]), false, true),
            (with(&[""]), false, true),
            (none.clone(), false, true),
        ],
    );
    table(
        when("request.headers[x-role]", json!([any()]), json!([])),
        &[
            (with(&["x"]), true, true),
            (with(&[""]), false, true),
            (with(&["a", "b"]), false, true),
            (none.clone(), false, false),
        ],
    );
    table(
        when("request.headers[x-role]", json!([prefix("a"), suffix("z")]), json!([])),
        &[
            (with(&["abc"]), true, true),
            (with(&["xyz"]), true, true),
            (with(&["b"]), false, false),
            (with(&["b,a"]), false, true),
        ],
    );
    // Both lists of one condition have to hold.
    let both = when("request.headers[x-role]", json!([prefix("a")]), json!([exact("ab")]));
    table(
        both,
        &[
            (with(&["aa"]), true, true),
            (with(&["ab"]), false, false),
            (with(&["b"]), false, false),
            (none, false, false),
        ],
    );
    let mut bytes = get("/");
    bytes.headers.push(("x-role".into(), b"\xff".to_vec()));
    table(when("request.headers[x-role]", json!([any()]), json!([])), &[(bytes, true, true)]);
}

#[test]
fn a_permission_needs_every_value_of_a_list() {
    let with = |value: &str| get("/").with("x-role", value);
    let of = |values: Value, not_values: Value| when("request.headers[x-role]", values, not_values);
    table(
        of(json!([prefix("user")]), json!([])),
        &[
            (with("user-x"), true, true),
            (with("user-x, user-y"), true, true),
            (with("user-x,admin"), false, true),
            (with("user-x,"), false, true),
        ],
    );
    table(of(json!([suffix("-ro")]), json!([])), &[(with("a-ro,b-ro"), true, true), (with("admin,b-ro"), false, true)]);
    // One entry for each is enough.
    table(of(json!([prefix("a"), exact("b")]), json!([])), &[(with("ax,b"), true, true), (with("ax,c"), false, true)]);
    table(
        of(json!([]), json!([prefix("user")])),
        &[(with("user-x,admin"), false, true), (with("user-x"), false, false)],
    );
    // Who writes a comma has meant it.
    table(of(json!([exact("a,b")]), json!([])), &[(with("a,b"), true, true), (with("a,b,c"), false, false)]);
    table(of(json!([prefix("a, b")]), json!([])), &[(with("a, bc"), true, true), (with("a, bc, d"), false, true)]);
    // Presence is no value.
    table(of(json!([any()]), json!([])), &[(with("a,,b"), true, true)]);
}

#[test]
fn a_list_that_is_too_long_is_unknown() {
    let list = |count: usize| get("/").with("x-role", &vec!["a"; count].join(","));
    let of = |values: Value, not_values: Value| when("request.headers[x-role]", values, not_values);
    for pattern in [exact("b"), prefix("b")] {
        table(of(json!([pattern]), json!([])), &[(list(64), false, false), (list(65), false, true)]);
        table(of(json!([]), json!([pattern])), &[(list(64), true, true), (list(65), false, true)]);
    }
    table(of(json!([prefix("a")]), json!([])), &[(list(64), true, true), (list(65), false, true)]);
    table(of(json!([any()]), json!([])), &[(list(65), true, true)]);
    let fields = (0..65).fold(get("/"), |call, _| call.with("x-role", "a"));
    table(of(json!([exact("b")]), json!([])), &[(fields.clone(), false, true)]);
    table(of(json!([]), json!([exact("b")])), &[(fields, false, true)]);
    // The same where rules are looked up.
    let many: Vec<Value> = (0..20).map(|n| rule("deny", of(json!([exact(&format!("b{n}"))]), json!([])))).collect();
    assert_eq!((rules(&many).answer(&list(65)).rule, rules(&many).answer(&list(64)).rule), (Some(0), None));
}

#[test]
fn audiences_and_presenter_of_a_token() {
    let of = |aud: Value, azp: &str| get("/").claiming(json!({"aud": aud, "azp": azp}));
    let key = "request.auth.audiences";
    table(
        when(key, json!([exact("orders-admin")]), json!([])),
        &[
            (of(json!(["orders", "orders-admin"]), ""), true, true),
            (of(json!("orders"), ""), false, false),
            (get("/"), false, false),
        ],
    );
    table(
        when(key, json!([]), json!([exact("orders-admin")])),
        &[
            (of(json!(["orders", "orders-admin"]), ""), false, false),
            (of(json!("orders"), ""), true, true),
            (get("/"), false, true),
        ],
    );
    let key = "request.auth.presenter";
    table(
        when(key, json!([exact("app")]), json!([])),
        &[
            (of(json!("orders"), "app"), true, true),
            (of(json!("orders"), "web"), false, false),
            (get("/"), false, false),
        ],
    );
    table(
        when(key, json!([]), json!([exact("app")])),
        &[
            (of(json!("orders"), "app"), false, false),
            (of(json!("orders"), "web"), true, true),
            (of(json!("orders"), ""), false, true),
            (get("/"), false, true),
        ],
    );
}

#[test]
fn claims_are_text_or_lists_of_it() {
    let role = |value: Value| get("/").claiming(json!({"role": value}));
    let key = "request.auth.claims[role]";
    table(
        when(key, json!([exact("boss")]), json!([])),
        &[
            (role(json!("boss")), true, true),
            (role(json!(["clerk", "boss"])), true, true),
            (role(json!("clerk")), false, false),
            (role(json!("boss clerk")), false, false),
            (role(json!("")), false, false),
            (role(json!([])), false, false),
            (role(json!(null)), false, false),
            // What no rule can compare may be anything.
            (role(json!({"boss": "boss"})), false, true),
            (role(json!(1.5)), false, true),
            (role(json!([["boss"]])), false, true),
            (get("/").claiming(json!({"boss": "boss"})), false, false),
            (get("/"), false, false),
        ],
    );
    table(
        when(key, json!([]), json!([exact("boss")])),
        &[
            (role(json!("boss")), false, false),
            (role(json!(["clerk", "boss"])), false, false),
            (role(json!("clerk")), true, true),
            (role(json!({"a": 1})), false, true),
            (role(json!([])), false, true),
            (get("/").claiming(json!({})), false, true),
            (get("/"), false, true),
        ],
    );
    for (value, text) in [(json!(true), "true"), (json!(false), "false"), (json!(7), "7"), (json!(-7), "-7")] {
        table(
            when(key, json!([exact(text)]), json!([])),
            &[(role(value), true, true), (role(json!("x")), false, false)],
        );
    }
    let inner = when("request.auth.claims[realm][roles]", json!([prefix("b")]), json!([]));
    let realm = |value: Value| get("/").claiming(json!({"realm": value}));
    table(
        inner,
        &[
            (realm(json!({"roles": ["a", "b"]})), true, true),
            (realm(json!({"roles": ["a"]})), false, false),
            (realm(json!("b")), false, false),
            (realm(json!({})), false, false),
        ],
    );
    // Lists of words that are written as one text.
    for name in ["scope", "permission"] {
        let one = when(&format!("request.auth.claims[{name}]"), json!([exact("read")]), json!([]));
        let claiming = |text: &str| get("/").claiming(json!({name: text}));
        table(one, &[(claiming("write read"), true, true), (claiming("readonly"), false, false)]);
    }
}

#[test]
fn the_name_of_the_server() {
    let sni = |name: &str| Call { sni: name.to_owned(), ..get("/") };
    let key = "connection.sni";
    table(
        when(key, json!([exact("Secret.com"), suffix(".shop")]), json!([])),
        &[
            (sni("secret.com"), true, true),
            (sni("SECRET.com."), true, true),
            (sni("a.shop"), true, true),
            (sni("other.com"), false, false),
            (sni(""), false, true),
        ],
    );
    table(
        when(key, json!([]), json!([exact("secret.com")])),
        &[(sni("Secret.com"), false, false), (sni("other.com"), true, true), (sni(""), false, true)],
    );
}

#[test]
fn all_clauses_of_a_rule_have_to_hold() {
    let good = get("/a").with("x-role", "admin").claiming(json!({"role": "boss"}));
    let fields = json!({
        "from": [exact(SHOP)], "not_from": [exact(BROWSER)], "namespaces": [exact("default")], "not_namespaces": [exact("x")],
        "request_principals": [exact("https://issuer/ada")], "not_request_principals": [exact("https://issuer/bob")],
        "ip_blocks": ["10.0.0.0/8"], "not_ip_blocks": ["10.1.0.0/16"], "remote_ip_blocks": ["203.0.113.0/24"],
        "not_remote_ip_blocks": ["203.0.113.1"], "methods": ["GET"], "not_methods": ["PUT"], "paths": [exact("/a"), exact("/b")],
        "not_paths": [exact("/b")], "hosts": [exact("orders")], "not_hosts": [exact("x")], "ports": [8443], "not_ports": [80],
        "when": [{"key": "request.headers[x-role]", "values": [exact("admin")], "not_values": []},
                 {"key": "request.auth.claims[role]", "values": [exact("boss")], "not_values": [exact("x")]}]
    });
    table(fields.clone(), &[(good.clone(), true, true)]);
    for broken in [
        good.clone().by(Some("spiffe://shop/ns/default/sa/other")),
        call("POST", "/a").with("x-role", "admin").claiming(json!({"role": "boss"})),
        Call { path: get("/b").path, ..good.clone() },
        Call { path: get("/c").path, ..good.clone() },
        Call { source: "11.0.0.1".parse().ok(), ..good.clone() },
        Call { source: "10.1.0.1".parse().ok(), ..good.clone() },
        Call { remote: "203.0.114.1".parse().ok(), ..good.clone() },
        Call { remote: "203.0.113.1".parse().ok(), ..good.clone() },
        Call { host: Some("else".to_owned()), ..good.clone() },
        Call { port: 80, ..good.clone() },
        Call { headers: Vec::new(), ..good.clone() },
        Call { claims: None, ..good.clone() },
        good.clone().claiming(json!({"role": "boss", "sub": "eve"})),
        good.clone().claiming(json!({"role": "clerk"})),
    ] {
        assert_eq!(judged(&fields, &broken), (false, false), "{broken:?}");
    }
}
