//! The same answers from a plain reading of the rules: no index, no compiled patterns, each fact with three truths.
//!
//! Written from the specification alone: a clause is true, false, or in doubt; a rule is as true as the least of its clauses;
//! permissions need what is true, denials and custom rules take doubt for truth. Thousands of random policies and calls, drawn from
//! few values, so that they meet.
use std::cell::RefCell;
use std::collections::HashMap;

use ::regex::Regex;

use super::*;
use crate::random::Random;

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Truth {
    False,
    Doubt,
    True,
}

use Truth::{Doubt, False, True};

impl From<bool> for Truth {
    fn from(value: bool) -> Self {
        if value {
            True
        } else {
            False
        }
    }
}

/// What a call shows of something.
enum Fact {
    Unknown,
    Absent,
    /// One or more values, of which any counts.
    Values(Vec<String>),
}

fn fully(pattern: &str, text: &str) -> bool {
    thread_local!(static KNOWN: RefCell<HashMap<String, Regex>> = RefCell::default());
    KNOWN.with_borrow_mut(|known| {
        known
            .entry(pattern.to_owned())
            .or_insert_with(|| Regex::new(&format!("^(?:{pattern})$")).unwrap())
            .is_match(text)
    })
}

fn text_matches(pattern: &Value, text: &str) -> bool {
    let value = pattern["value"].as_str().unwrap_or("");
    match pattern["kind"].as_str().unwrap() {
        "any" => !text.is_empty(),
        "exact" => text == value,
        "prefix" => text.starts_with(value),
        "suffix" => text.ends_with(value),
        other => panic!("{other}"),
    }
}

fn path_matches(pattern: &Value, path: &str, is_folded: bool) -> bool {
    let value = pattern["value"].as_str().unwrap();
    // Only ASCII is drawn.
    let fold = |text: &str| if is_folded { text.to_ascii_lowercase() } else { text.to_owned() };
    match pattern["kind"].as_str().unwrap() {
        "template" => {
            let segments: Vec<String> = fold(value)
                .split('/')
                .map(|segment| match segment {
                    "{**}" => ".*".to_owned(),
                    name if name.starts_with('{') => "[^/]+".to_owned(),
                    text => ::regex::escape(text),
                })
                .collect();
            fully(&segments.join("/"), &fold(path))
        }
        "regex" => fully(&format!("{}{value}", if is_folded { "(?i)" } else { "" }), path),
        _ => text_matches(&json!({"kind": pattern["kind"], "value": fold(value)}), &fold(path)),
    }
}

fn is_listed(list: &[Value], fact: &Fact, matches: impl Fn(&Value, &str) -> bool) -> Truth {
    match fact {
        Fact::Unknown => Doubt,
        Fact::Absent => False,
        Fact::Values(values) => values.iter().any(|value| list.iter().any(|pattern| matches(pattern, value))).into(),
    }
}

fn in_network(network: &str, address: IpAddr) -> bool {
    let bits = |address: IpAddr| -> String {
        match address {
            IpAddr::V4(address) => format!("4{:032b}", u32::from(address)),
            IpAddr::V6(address) => format!("6{:0128b}", u128::from(address)),
        }
    };
    let (base, length) =
        network.split_once('/').map_or((network, 128), |(base, length)| (base, length.parse().unwrap()));
    let (base, address) = (bits(base.parse().unwrap()), bits(address.to_canonical()));
    let length = (length + 1).min(base.len());
    base[..length] == address[..length.min(address.len())]
}

/// Truth of a positive list; and of its negation, where absence proves nothing.
fn clause(key: &str, list: &[Value], fact: &Fact, matches: impl Fn(&Value, &str) -> bool) -> Truth {
    let truth = is_listed(list, fact, matches);
    match (key.starts_with("not_"), fact) {
        (false, _) => truth,
        (true, Fact::Absent) => Doubt,
        (true, _) => opposite(truth),
    }
}

fn opposite(truth: Truth) -> Truth {
    match truth {
        True => False,
        Doubt => Doubt,
        False => True,
    }
}

fn path_truth(list: &[Value], call: &Call, is_folded: bool) -> Truth {
    let one = |pattern: &Value, path: &str| path_matches(pattern, path, is_folded);
    if list.iter().any(|pattern| call.path.readings().all(|path| one(pattern, path))) {
        True
    } else if list.iter().any(|pattern| call.path.wide_readings().any(|path| one(pattern, path))) {
        Doubt
    } else {
        False
    }
}

fn method_truth(list: &[Value], call: &Call) -> Truth {
    let has = |method: &str| list.iter().any(|listed| listed == method);
    match call.method.as_str() {
        method if has(method) => True,
        "HEAD" if has("GET") => Doubt,
        _ => False,
    }
}

fn namespace_truth(list: &[Value], call: &Call, is_negative: bool) -> Truth {
    let Some(peer) = &call.peer else { return if is_negative { Doubt } else { False } };
    let segments: Vec<&str> = peer.split('/').skip(3).collect();
    let named: Vec<usize> = (0..segments.len().saturating_sub(1)).filter(|n| segments[*n] == "ns").collect();
    let is_one = |n: &usize| list.iter().any(|pattern| text_matches(pattern, segments[n + 1]));
    let is_sound = named.contains(&0) && segments.len() > 2;
    let truth = match (is_sound && is_one(&0), named.iter().any(is_one)) {
        (true, _) => True,
        (false, true) => Doubt,
        (false, false) => False,
    };
    match is_negative {
        false => truth,
        true if !is_sound && truth == False => Doubt,
        true => opposite(truth),
    }
}

fn header_truth(values: &[Value], name: &str, call: &Call, is_negative: bool) -> Truth {
    let fields: Vec<String> = call
        .headers
        .iter()
        .filter(|(known, _)| **known == *name)
        .map(|(_, value)| String::from_utf8(value.clone()).unwrap().trim().to_owned())
        .collect();
    let is_one = |text: &str| values.iter().any(|pattern| text_matches(pattern, text));
    let has_any = values.iter().any(|pattern| pattern["kind"] == "any");
    let parts: Vec<&str> = fields.iter().flat_map(|field| field.split(',').map(str::trim)).collect();
    let is_unknown = parts.len() > 64;
    let has = is_unknown
        || fields.iter().any(|field| is_one(field) || field.split(',').any(|part| is_one(part.trim())) || has_any);
    let is_sure = fields.len() == 1
        && ((has_any && !fields[0].is_empty())
            || (!is_unknown && is_one(&fields[0]) && parts.iter().all(|part| is_one(part))));
    match (is_negative, fields.as_slice()) {
        (false, _) if is_sure => True,
        (false, _) if has => Doubt,
        (false, _) => False,
        (true, _) if is_sure => False,
        (true, [field]) if !has && !field.is_empty() => True,
        (true, _) => Doubt,
    }
}

fn address_fact(address: Option<IpAddr>) -> Fact {
    address.map_or(Fact::Unknown, |address| Fact::Values(vec![address.to_string()]))
}

fn text_fact(text: &str) -> Fact {
    if text.is_empty() {
        Fact::Absent
    } else {
        Fact::Values(vec![text.to_owned()])
    }
}

fn host_fact(call: &Call) -> Fact {
    const HOST: &str = r"([a-z0-9_-]+(?:\.[a-z0-9_-]+)*)\.?(?::[0-9]{0,5})?";
    let host = call.host.as_deref().unwrap_or("").to_ascii_lowercase();
    if fully(HOST, &host) {
        Fact::Values(vec![host.split(':').next().unwrap().trim_end_matches('.').to_owned()])
    } else {
        Fact::Unknown
    }
}

fn claim_truth(values: &[Value], name: &str, call: &Call, is_negative: bool) -> Truth {
    let found = call.claims.as_ref().and_then(|claims| claims.claim(&[name]));
    let one = |text: &str| -> Truth { values.iter().any(|pattern| text_matches(pattern, text)).into() };
    let of = |value: &Value| match value {
        Value::String(text) => one(text),
        Value::Bool(value) => one(&value.to_string()),
        Value::Number(number) if number.is_i64() => one(&number.to_string()),
        _ => Doubt,
    };
    let truth = match found {
        None | Some(Value::Null) => return if is_negative { Doubt } else { False },
        Some(Value::String(text)) if text.is_empty() => return if is_negative { Doubt } else { False },
        Some(Value::Array(list)) if list.is_empty() => return if is_negative { Doubt } else { False },
        Some(Value::Array(list)) => list.iter().map(of).max().unwrap(),
        Some(value) => of(value),
    };
    if is_negative {
        opposite(truth)
    } else {
        truth
    }
}

/// The truths of all clauses of a rule, each with whether it is about the token.
fn clauses(rule: &Value, call: &Call) -> Vec<(Truth, bool)> {
    let mut truths = Vec::new();
    let is_folded = rule["is_case_insensitive"] == true;
    let (claims, peer) = (call.claims.as_ref(), call.peer.as_deref().unwrap_or(""));
    let principal = || text_fact(claims.map_or("", |claims| claims.principal()));
    let port = || if call.port == 0 { Fact::Unknown } else { Fact::Values(vec![call.port.to_string()]) };
    let in_one = |network: &Value, address: &str| in_network(network.as_str().unwrap(), address.parse().unwrap());
    for (key, list) in rule.as_object().unwrap() {
        let Some(list) = list.as_array().filter(|list| !list.is_empty() && key != "when") else { continue };
        let is_negative = key.starts_with("not_");
        let turned = |truth: Truth| if is_negative { opposite(truth) } else { truth };
        let truth = match key.strip_prefix("not_").unwrap_or(key) {
            "from" if list.contains(&any()) => turned(True),
            "from" => clause(key, list, &text_fact(peer), text_matches),
            "namespaces" => namespace_truth(list, call, is_negative),
            "request_principals" => clause(key, list, &principal(), text_matches),
            "ip_blocks" => clause(key, list, &address_fact(call.source), in_one),
            "remote_ip_blocks" => clause(key, list, &address_fact(call.remote), in_one),
            "methods" => turned(method_truth(list, call)),
            "paths" => turned(path_truth(list, call, is_folded)),
            "hosts" => clause(key, list, &host_fact(call), text_matches),
            "ports" => clause(key, list, &port(), |listed, port| listed.as_u64() == port.parse().ok()),
            other => panic!("{other}"),
        };
        truths.push((truth, key.ends_with("request_principals")));
    }
    for condition in rule["when"].as_array().unwrap() {
        let key = condition["key"].as_str().unwrap();
        let inner = |start: &str| key.strip_prefix(start).and_then(|rest| rest.strip_suffix(']'));
        let network =
            |pattern: &Value, address: &str| in_network(pattern["value"].as_str().unwrap(), address.parse().unwrap());
        for side in ["values", "not_values"] {
            let list = condition[side].as_array().unwrap();
            if list.is_empty() {
                continue;
            }
            let is_negative = side == "not_values";
            let truth = match key {
                "source.ip" => clause(side, list, &address_fact(call.source), network),
                "destination.port" => clause(side, list, &port(), text_matches),
                "connection.sni" if call.sni.is_empty() => Doubt,
                "connection.sni" => clause(side, list, &text_fact(&call.sni.to_lowercase()), text_matches),
                "source.principal" => clause(side, list, &text_fact(peer), text_matches),
                "request.auth.audiences" => {
                    let fact = claims.map_or(Fact::Absent, |claims| Fact::Values(claims.audiences().to_vec()));
                    clause(side, list, &fact, text_matches)
                }
                "request.auth.presenter" => {
                    clause(side, list, &text_fact(claims.map_or("", |claims| claims.presenter())), text_matches)
                }
                _ => match (inner("request.headers["), inner("request.auth.claims[")) {
                    (Some(name), _) => header_truth(list, name, call, is_negative),
                    (_, Some(name)) => claim_truth(list, name, call, is_negative),
                    _ => panic!("{key}"),
                },
            };
            truths.push((truth, key.starts_with("request.auth.")));
        }
    }
    truths
}

fn fires(rule: &Value, call: &Call) -> bool {
    let least = clauses(rule, call).into_iter().map(|(truth, _)| truth).min().unwrap_or(True);
    if rule["action"] == "allow" {
        least == True
    } else {
        least != False
    }
}

fn expected(rules: &[Value], call: &Call) -> Verdict {
    let first = |action: &str, with_dry_run: bool| {
        (0..rules.len()).find(|n| {
            let rule = &rules[*n];
            rule["action"] == action && (with_dry_run || rule["dry_run"] == false) && fires(rule, call)
        })
    };
    let decided = |with_dry_run: bool| match (first("deny", with_dry_run), first("allow", with_dry_run)) {
        (Some(rule), _) => (false, Some(rule)),
        (None, Some(rule)) => (true, Some(rule)),
        (None, None) => (false, None),
    };
    let ((is_allowed, rule), mut shadow) = (decided(false), decided(true));
    let custom_dry = (0..rules.len())
        .find(|n| rules[*n]["action"] == "custom" && rules[*n]["dry_run"] == true && fires(&rules[*n], call));
    if shadow.0 && custom_dry.is_some() {
        shadow.1 = custom_dry;
    }
    // With a token that fits: clauses about it are no hindrance to a permission, and a denial with one may not fire.
    let counted = |action: &str| {
        rules.iter().filter(|rule| rule["action"] == action && rule["dry_run"] == false).collect::<Vec<_>>()
    };
    let denies = counted("deny")
        .iter()
        .any(|rule| clauses(rule, call).iter().all(|(_, is_token)| !is_token) && fires(rule, call));
    let allows = counted("allow")
        .iter()
        .any(|rule| clauses(rule, call).iter().all(|(truth, is_token)| *is_token || *truth == True));
    let needs_token = !is_allowed && call.claims.is_none() && !denies && allows && {
        let has_token = |rule: &&Value| clauses(rule, call).iter().any(|(_, is_token)| *is_token);
        rules.iter().any(|rule| has_token(&rule))
    };
    Verdict { is_allowed, rule, shadow, custom: first("custom", false), needs_token }
}

const PEERS: [&str; 8] = [
    "spiffe://td/ns/a/sa/x",
    "spiffe://td/ns/a/sa/y",
    "spiffe://td/ns/b/sa/x",
    "spiffe://other/ns/a/sa/x",
    "spiffe://td/eu/ns/a/sa/x",
    "spiffe://td/ns/a",
    "spiffe://td/w",
    "spiffe://td/ns/ns/a/x",
];

struct Draw(Random);

impl Draw {
    fn one<T: Clone>(&self, of: &[T]) -> T {
        of[self.0.below(of.len())].clone()
    }

    fn is_so(&self, out_of: usize) -> bool {
        self.0.below(out_of) == 0
    }

    fn some(&self, of: &[Value]) -> Value {
        let mut list: Vec<Value> = (0..=self.0.below(2)).map(|_| self.one(of)).collect();
        list.dedup();
        Value::Array(list)
    }

    fn rule(&self, number: usize) -> Value {
        let template = |value: &str| json!({"kind": "template", "value": value});
        let regex = |value: &str| json!({"kind": "regex", "value": value});
        let peers = [
            exact(PEERS[0]),
            exact(PEERS[1]),
            exact(PEERS[2]),
            exact(PEERS[6]),
            prefix("spiffe://"),
            prefix("spiffe://td/"),
            prefix("spiffe://td/ns/a/"),
            prefix("spiffe://td/ns/"),
            prefix("spiffe://td/ns/a/sa/x"),
            any(),
        ];
        let namespaces = [exact("a"), exact("b"), prefix("a"), suffix("b"), any()];
        let principals = [exact("https://issuer/ada"), prefix("https://issuer/a"), suffix("/bob"), any()];
        let networks =
            ["10.0.0.0/8", "10.1.0.0/16", "10.1.2.3", "::1", "2001:db8::/32", "192.168.0.0/16"].map(|text| json!(text));
        let methods = ["GET", "POST", "PUT", "HEAD"].map(|text| json!(text));
        let paths = [
            exact("/a"),
            exact("/a/b"),
            exact("/b/"),
            exact("/"),
            exact("*"),
            exact("/a/b/c/d/e/f"),
            prefix("/a/"),
            prefix("/a"),
            prefix("/b/c"),
            prefix(""),
            prefix("/a/b/c/d/e/"),
            suffix("/b"),
            suffix("f"),
            suffix(".css"),
            suffix("x.css"),
            suffix(""),
            template("/a/{x}"),
            template("/{*}"),
            template("/{x}/b"),
            template("/b/{x}/{**}"),
            template("/a/{**}/f"),
            template("/a/b/c/d/e/{x}"),
            template("/"),
            regex("/a|/b"),
            regex("/[ab]/.*"),
            regex(".*b"),
        ];
        let hosts = [exact("orders"), exact("secret.com"), prefix("api."), suffix(".com"), any()];
        let ports = [80, 443, 8443].map(|port| json!(port));
        let texts = [exact("boss"), exact("clerk"), prefix("b"), suffix("k"), exact("7"), any()];
        let mut fields = json!({"name": format!("r{number}"), "dry_run": self.is_so(5)});
        for (key, values, chance) in [
            ("from", &peers[..], 2),
            ("not_from", &peers[..9], 12),
            ("namespaces", &namespaces, 8),
            ("not_namespaces", &namespaces, 20),
            ("request_principals", &principals, 12),
            ("not_request_principals", &principals, 16),
            ("ip_blocks", &networks, 8),
            ("not_ip_blocks", &networks, 20),
            ("remote_ip_blocks", &networks, 12),
            ("not_remote_ip_blocks", &networks, 20),
            ("methods", &methods, 4),
            ("not_methods", &methods, 12),
            ("paths", &paths, 2),
            ("not_paths", &paths, 10),
            ("hosts", &hosts, 8),
            ("not_hosts", &hosts, 20),
            ("ports", &ports, 10),
            ("not_ports", &ports, 20),
        ] {
            if self.is_so(chance) {
                fields[key] = self.some(values);
            }
        }
        fields["is_case_insensitive"] = json!(self.is_so(6));
        let mut conditions = Vec::new();
        while self.is_so(3) {
            let key = self.one(&[
                "request.headers[x-role]",
                "request.headers[x-none]",
                "request.auth.claims[role]",
                "request.auth.audiences",
                "request.auth.presenter",
                "source.ip",
                "destination.port",
                "connection.sni",
                "source.principal",
            ]);
            let of = match key {
                "source.ip" => networks.iter().map(|network| exact(network.as_str().unwrap())).collect(),
                "destination.port" => vec![exact("80"), exact("443")],
                "connection.sni" => hosts.to_vec(),
                "source.principal" => peers[..9].to_vec(),
                "request.auth.audiences" => vec![exact("orders"), exact("admin"), any()],
                _ => texts.to_vec(),
            };
            let (values, not_values) = self.one(&[(true, false), (true, false), (false, true), (true, true)]);
            let list = |is_there: bool| if is_there { self.some(&of) } else { json!([]) };
            conditions.push(json!({"key": key, "values": list(values), "not_values": list(not_values)}));
        }
        fields["when"] = json!(conditions);
        rule(self.one(&["allow", "allow", "deny", "deny", "custom"]), fields)
    }

    /// Rules that are none are drawn again.
    fn policy(&self, size: usize) -> Vec<Value> {
        let mut made = Vec::new();
        while made.len() < size {
            let rule = self.rule(made.len());
            if mistakes(rule.clone()).is_empty() {
                made.push(rule);
            }
        }
        made
    }

    fn call(&self, tokens: &[Option<Arc<Claims>>]) -> Call {
        const TARGETS: [&str; 19] = [
            "/",
            "/a",
            "/A",
            "/a/",
            "/a/b",
            "/a/b;x",
            "/a;x/b",
            "/b/c/d",
            "/b/..;/a",
            "/c",
            "/ab",
            "/a/b/c/d/e/f",
            "/a/b/c/d/e/f/g",
            "/a;/b/c/d/e/",
            "/B/",
            "/a/x/f",
            "/b/c/",
            "/a/x.css",
            "/x/b",
        ];
        let address = || -> Option<IpAddr> {
            let text = self.one(&[
                "10.9.9.9",
                "10.1.9.9",
                "::ffff:10.1.2.3",
                "::1",
                "2001:db8::9",
                "192.168.1.1",
                "8.8.8.8",
                "?",
            ]);
            text.parse().ok()
        };
        let method = self.one(&["GET", "GET", "HEAD", "POST", "PUT", "DELETE"]);
        let mut made = if self.is_so(30) { call("OPTIONS", "*") } else { call(method, self.one(&TARGETS)) };
        made.peer = if self.is_so(5) { None } else { Some(self.one(&PEERS).to_owned()) };
        made.host = self
            .one(&[Some("orders"), Some("Secret.com:80"), Some("api.x."), Some("a.COM"), Some("a:b"), Some(""), None])
            .map(str::to_owned);
        made.port = self.one(&[0, 80, 443, 8443]);
        (made.source, made.remote) = (address(), address());
        made.sni = self.one(&["", "orders", "Secret.com", "api.x"]).to_owned();
        made.claims = self.one(tokens);
        let long: &str = &"x,".repeat(64);
        while self.is_so(2) {
            made = made.with(
                "x-role",
                self.one(&["boss", "clerk", "boss,x", "a, clerk", "", " boss ", "B", "boss,clerk", "b,,", long]),
            );
        }
        made
    }
}

fn tokens() -> Vec<Option<Arc<Claims>>> {
    let shown = [
        json!({}),
        json!({"sub": "bob", "role": "boss"}),
        json!({"role": ["clerk", "boss"], "azp": "boss", "aud": ["orders", "admin"]}),
        json!({"sub": "amy", "role": 7, "azp": "clerk"}),
        json!({"sub": "", "role": {"a": "boss"}}),
        json!({"role": []}),
        json!({"role": true}),
    ];
    shown.into_iter().map(|claims| Some(token(claims))).chain([None, None, None]).collect()
}

#[test]
fn random_policies_are_judged_as_a_plain_reading_of_them_says() {
    let draw = Draw(Random::new(11));
    let tokens = tokens();
    let mut seen: HashMap<(bool, bool, bool, bool), u32> = HashMap::new();
    // Of one rule, where each clause shows; of a few, which are walked; of many, which are looked up.
    for size in [1; 40].into_iter().chain([3; 20]).chain([20; 12]).chain([60; 8]) {
        let policy = draw.policy(size);
        let compiled = rules(&policy);
        for _ in 0..60 {
            let call = draw.call(&tokens);
            let (found, wanted) = (compiled.answer(&call), expected(&policy, &call));
            assert_eq!(found, wanted, "{call:#?}\n{policy:#?}");
            let kind = (found.is_allowed, found.rule.is_some(), found.needs_token, found.shadow.0 == found.is_allowed);
            *seen.entry(kind).or_default() += 1;
            // The words for it never fail, and name the rule.
            let text = compiled.explain(found.rule, &call.question());
            assert!(found.is_allowed || !text.is_empty());
        }
    }
    let count = |kind: (bool, bool, bool, bool)| seen.get(&kind).copied().unwrap_or(0);
    assert!(count((true, true, false, true)) > 100 && count((false, true, false, true)) > 100, "{seen:?}");
    assert!(count((false, false, false, true)) > 100 && count((false, false, true, true)) > 10, "{seen:?}");
}

#[test]
fn the_index_answers_as_walking_all_rules_does() {
    let draw = Draw(Random::new(12));
    let tokens = tokens();
    for _ in 0..20 {
        let compiled = rules(&draw.policy(120));
        let walked = |index: &Index, question: &Question<'_>| {
            index.numbers().iter().copied().find(|number| compiled.rules[*number].matches(&Asked::new(question)))
        };
        for _ in 0..300 {
            let call = draw.call(&tokens);
            let question = call.question();
            let lists = [&compiled.counted, compiled.dry.as_ref().unwrap()];
            for index in lists.iter().flat_map(|lists| [&lists.custom, &lists.deny, &lists.allow]) {
                assert_eq!(compiled.first(index, &Asked::new(&question)), walked(index, &question), "{call:#?}");
            }
        }
    }
}

#[test]
fn a_token_is_asked_for_wherever_one_would_be_let_in() {
    let draw = Draw(Random::new(13));
    let tokens = tokens();
    let mut asked = 0;
    for _ in 0..60 {
        let compiled = rules(&draw.policy(6));
        for _ in 0..40 {
            let call = Call { claims: None, ..draw.call(&tokens) };
            let without = compiled.answer(&call);
            let helps = tokens.iter().any(|token| compiled.allows(&Call { claims: token.clone(), ..call.clone() }));
            if helps && !without.is_allowed {
                assert!(without.needs_token, "{call:#?}");
                asked += 1;
            }
        }
    }
    assert!(asked > 50, "{asked}");
}
