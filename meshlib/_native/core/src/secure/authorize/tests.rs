#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]
use std::sync::{Arc, OnceLock};

use serde_json::{json, Map, Value};

use super::*;
use crate::secure::crypto::signing::Signer;
use crate::secure::jwt::{KeySet, ProviderPlan, Providers};
use crate::secure::path::canonical;

mod asked;
mod clauses;
mod explained;
mod mistakes;
mod oracle;

const SHOP: &str = "spiffe://shop/ns/default/sa/storefront";
const BROWSER: &str = "spiffe://shop/ns/default/sa/browser";

/// A rule with every field, those of `fields` as they stand there.
fn rule(action: &str, fields: Value) -> Value {
    let mut rule = json!({
        "name": "r", "action": action, "dry_run": false, "authorizer": if action == "custom" { "desk" } else { "" },
        "from": [], "not_from": [], "namespaces": [], "not_namespaces": [], "request_principals": [],
        "not_request_principals": [], "ip_blocks": [], "not_ip_blocks": [], "remote_ip_blocks": [],
        "not_remote_ip_blocks": [], "methods": [], "not_methods": [], "paths": [], "not_paths": [],
        "is_case_insensitive": false, "hosts": [], "not_hosts": [], "ports": [], "not_ports": [], "when": []
    });
    for (name, value) in fields.as_object().unwrap() {
        assert!(rule.get(name).is_some(), "{name} is no field");
        rule[name] = value.clone();
    }
    rule
}

fn plans(rules: &[Value]) -> Vec<RulePlan> {
    rules.iter().map(|rule| serde_json::from_value(rule.clone()).unwrap()).collect()
}

fn rules(rules: &[Value]) -> Rules {
    Rules::compile(&plans(rules)).unwrap_or_else(|mistakes| panic!("{}", mistakes.join("\n")))
}

fn mistakes(rule: Value) -> Vec<String> {
    Rules::compile(&plans(&[rule])).map(|_| Vec::new()).unwrap_or_else(|mistakes| mistakes)
}

fn exact(value: &str) -> Value {
    json!({"kind": "exact", "value": value})
}

fn prefix(value: &str) -> Value {
    json!({"kind": "prefix", "value": value})
}

fn suffix(value: &str) -> Value {
    json!({"kind": "suffix", "value": value})
}

fn any() -> Value {
    json!({"kind": "any"})
}

/// What is asked, owned.
#[derive(Debug, Clone)]
struct Call {
    peer: Option<String>,
    method: String,
    path: Path,
    host: Option<String>,
    port: u16,
    source: Option<IpAddr>,
    remote: Option<IpAddr>,
    sni: String,
    headers: Vec<(Box<str>, Vec<u8>)>,
    claims: Option<Arc<Claims>>,
}

/// A call of which everything is known, and nothing is special.
fn call(method: &str, target: &str) -> Call {
    Call {
        peer: Some(SHOP.to_owned()),
        method: method.to_owned(),
        path: canonical(target.as_bytes(), method, None, false).unwrap(),
        host: Some("orders".to_owned()),
        port: 8443,
        source: Some("10.0.0.7".parse().unwrap()),
        remote: Some("203.0.113.9".parse().unwrap()),
        sni: "orders".to_owned(),
        headers: Vec::new(),
        claims: None,
    }
}

fn get(target: &str) -> Call {
    call("GET", target)
}

impl Call {
    fn question(&self) -> Question<'_> {
        Question {
            peer: self.peer.as_deref(),
            method: &self.method,
            path: &self.path,
            host: self.host.as_deref(),
            port: self.port,
            source: self.source,
            remote: self.remote,
            sni: &self.sni,
            headers: &self.headers,
            claims: self.claims.as_deref(),
        }
    }

    fn by(mut self, peer: Option<&str>) -> Self {
        self.peer = peer.map(str::to_owned);
        self
    }

    fn with(mut self, name: &str, value: &str) -> Self {
        self.headers.push((name.into(), value.as_bytes().to_vec()));
        self
    }

    fn claiming(mut self, claims: Value) -> Self {
        self.claims = Some(token(claims));
        self
    }
}

impl Rules {
    fn answer(&self, call: &Call) -> Verdict {
        self.judge(&call.question())
    }

    fn allows(&self, call: &Call) -> bool {
        self.answer(call).is_allowed
    }
}

/// A token that was really verified: there is no other way to claims.
fn token(claims: Value) -> Arc<Claims> {
    const ISSUER: &str = "https://issuer";
    static DESK: OnceLock<(Providers, Signer)> = OnceLock::new();
    let (providers, signer) = DESK.get_or_init(|| {
        let plan: ProviderPlan = serde_json::from_value(json!({
            "name": "auth", "issuer": ISSUER, "audiences": ["orders"], "algorithms": ["EdDSA"], "leeway": 30.0,
            "longest": 86400.0, "from": [], "forward": false, "is_svid": false
        }))
        .unwrap();
        let (providers, signer) = (Providers::compile(&[plan]).unwrap(), Signer::eddsa());
        let key = json!({"keys": [{"kty": "OKP", "crv": "Ed25519", "kid": "1", "x": encoded(signer.public())}]});
        let (keys, _) = KeySet::parse(key.to_string().as_bytes()).unwrap();
        providers.set_keys("auth", Some(Arc::new(keys)));
        (providers, signer)
    });
    let mut members: Map<String, Value> = claims.as_object().unwrap().clone();
    for (name, value) in [("iss", json!(ISSUER)), ("aud", json!("orders")), ("sub", json!("ada")), ("exp", json!(1060))]
    {
        members.entry(name).or_insert(value);
    }
    let message = format!(
        "{}.{}",
        encoded(br#"{"alg":"EdDSA","kid":"1"}"#),
        encoded(Value::Object(members).to_string().as_bytes())
    );
    let token = format!("{message}.{}", encoded(&signer.sign(message.as_bytes())));
    providers.verify(token.as_bytes(), 1000.0).unwrap()
}

/// Base64, as tokens have it.
fn encoded(bytes: &[u8]) -> String {
    const SIGNS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
    let mut text = String::new();
    for group in bytes.chunks(3) {
        let bits = group.iter().fold(0, |bits: u32, byte| bits << 8 | u32::from(*byte)) << (8 * (3 - group.len()));
        (0..=group.len()).for_each(|n| text.push(char::from(SIGNS[(bits >> (18 - 6 * n) & 63) as usize])));
    }
    text
}

#[test]
fn what_no_rule_allows_is_denied() {
    let verdict = Verdict { is_allowed: false, rule: None, shadow: (false, None), custom: None, needs_token: false };
    assert_eq!(rules(&[]).answer(&get("/x")), verdict);
}

#[test]
fn a_denial_wins_over_a_permission() {
    let rules = rules(&[rule("allow", json!({"from": [any()]})), rule("deny", json!({"paths": [exact("/admin")]}))]);
    assert_eq!(rules.answer(&get("/admin/")).rule, Some(1));
    assert!(rules.allows(&get("/public").by(None)));
}

#[test]
fn each_clause_has_to_match() {
    let fields = json!({"from": [exact(SHOP)], "methods": ["GET"], "paths": [prefix("/orders/")]});
    let rules = rules(&[rule("allow", fields)]);
    assert!(rules.allows(&get("/orders/7")));
    assert!(!rules.allows(&get("/orders/7").by(Some("spiffe://shop/ns/default/sa/storefront2"))));
    assert!(!rules.allows(&get("/orders/7").by(None)));
    assert!(!rules.allows(&call("POST", "/orders/7")));
    assert!(!rules.allows(&call("HEAD", "/orders/7")));
    assert!(!rules.allows(&get("/orders")));
}

#[test]
fn a_custom_rule_names_whom_to_ask_and_decides_nothing() {
    let rules = rules(&[
        rule("allow", json!({"paths": [prefix("/a")]})),
        rule("custom", json!({"paths": [prefix("/a/b"), prefix("/c")]})),
        rule("deny", json!({"paths": [exact("/a/b/no")]})),
    ]);
    let answer = |target| {
        let verdict = rules.answer(&get(target));
        (verdict.is_allowed, verdict.rule, verdict.custom)
    };
    assert_eq!(answer("/a"), (true, Some(0), None));
    assert_eq!(answer("/a/b"), (true, Some(0), Some(1)));
    assert_eq!(answer("/a/b/no"), (false, Some(2), Some(1)));
    assert_eq!(answer("/c"), (false, None, Some(1)));
    assert_eq!((rules.authorizer(1), rules.authorizer(0), rules.authorizer(9)), ("desk", "", ""));
}

#[test]
fn dry_run_rules_decide_nothing_and_are_reported() {
    let dry = |action: &str, path: &str| rule(action, json!({"dry_run": true, "paths": [prefix(path)]}));
    let rules = rules(&[
        rule("allow", json!({"paths": [prefix("/a")]})),
        dry("deny", "/a/old"),
        dry("allow", "/b"),
        dry("custom", "/a/ask"),
        rule("deny", json!({"paths": [prefix("/a/never")]})),
    ]);
    let answer = |target| {
        let verdict = rules.answer(&get(target));
        ((verdict.is_allowed, verdict.rule), verdict.shadow, verdict.custom)
    };
    assert_eq!(answer("/a"), ((true, Some(0)), (true, Some(0)), None));
    assert_eq!(answer("/a/old"), ((true, Some(0)), (false, Some(1)), None));
    assert_eq!(answer("/b"), ((false, None), (true, Some(2)), None));
    // Reported where it would have been asked, and never asked.
    assert_eq!(answer("/a/ask"), ((true, Some(0)), (true, Some(3)), None));
    assert_eq!(answer("/a/never"), ((false, Some(4)), (false, Some(4)), None));
}

#[test]
fn a_token_is_asked_for_where_it_would_help() {
    let open = rule("allow", json!({"paths": [prefix("/open"), prefix("/both")]}));
    let wanted =
        rule("deny", json!({"not_request_principals": [any()], "paths": [exact("/open/mine"), prefix("/closed")]}));
    let claimed = rule(
        "allow",
        json!({"paths": [prefix("/claimed")], "when": [{"key": "request.auth.claims[role]", "values": [exact("boss")], "not_values": []}]}),
    );
    let never = rule("deny", json!({"paths": [prefix("/claimed/never")]}));
    let rules = rules(&[open, wanted, claimed, never]);
    for (target, is_allowed, needs_token) in [
        ("/open", true, false),
        ("/open/mine", false, true),
        // With or without one: nobody allows it.
        ("/closed", false, false),
        ("/claimed", false, true),
        ("/claimed/never", false, false),
        ("/else", false, false),
    ] {
        let verdict = rules.answer(&get(target));
        assert_eq!((verdict.is_allowed, verdict.needs_token), (is_allowed, needs_token), "{target}");
    }
    // Whoever has shown one is not asked for another.
    let shown = get("/claimed").claiming(json!({"role": "clerk"}));
    assert!(!rules.answer(&shown).needs_token && !rules.allows(&shown));
    assert!(rules.allows(&get("/open/mine").claiming(json!({}))));
    assert!(rules.allows(&get("/claimed").claiming(json!({"role": "boss"}))));
}

#[test]
fn rules_say_what_they_look_at() {
    let when = |key: &str, value: Value| json!({"key": key, "values": [value], "not_values": []});
    let headers = [when("request.headers[X-Role]", exact("a")), when("request.headers[x-a]", any())];
    let looking = rules(&[
        rule("allow", json!({"when": headers})),
        rule("deny", json!({"when": [when("request.headers[x-role]", exact("b"))]})),
    ]);
    assert_eq!(looking.wanted_headers(), ["x-a".into(), "x-role".into()]);
    assert!(!looking.wants_source());
    for field in ["ip_blocks", "not_ip_blocks", "remote_ip_blocks", "not_remote_ip_blocks"] {
        assert!(rules(&[rule("deny", json!({field: ["10.0.0.0/8"]}))]).wants_source(), "{field}");
    }
    assert!(rules(&[rule("deny", json!({"when": [when("remote.ip", exact("::1"))]}))]).wants_source());
}

#[test]
fn methods_are_upper_case_words() {
    for good in ["GET", "PROPFIND", "M-SEARCH"] {
        assert!(is_method(good), "{good}");
    }
    for bad in ["", "get", "Get", "G@T", "GET ", "1GET", "GET\n", &"X".repeat(33)] {
        assert!(!is_method(bad), "{bad}");
    }
}

#[test]
fn grpc_methods_are_exact() {
    assert!(is_grpc_method("/admin.Svc/Delete"));
    for bad in [
        "",
        "/",
        "//admin.Svc/Delete",
        "/admin.Svc/Delete/",
        "/admin.Svc/Delete#x",
        "/x/../admin.Svc/Delete",
        "/admin.Svc",
        "/a.S/D%00",
        "a.S/D",
        "/a.S/D.x",
    ] {
        assert!(!is_grpc_method(bad), "{bad}");
    }
}
