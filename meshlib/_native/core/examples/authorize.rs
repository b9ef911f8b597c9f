//! What does it take to judge one request by a thousand rules, in nanoseconds? For `benchmarks/decide.py`, which says what is wanted.
//!
//! `authorize first|middle|last|miss|mix SECONDS`; one JSON object of figures. The rules are those of a service that many call: named
//! callers, namespaces, prefixes, templates, methods, headers, claims, networks, permissions and denials. `first`, `middle` and `last`
//! is the place of the permission that a request meets; `miss` meets none; `mix` is all of these and a denial, by turns. Every denial
//! is passed by each request that is let in.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]
use std::hint::black_box;
use std::net::IpAddr;
use std::time::{Duration, Instant};

use mesh_core::secure::authorize::{
    Action, ConditionPlan, PathPlan, PeerPlan, Question, RulePlan, Rules, TextPlan, Verdict,
};
use mesh_core::secure::path::{canonical, Path};
use serde_json::json;

const RULES: usize = 1_000;
const BLOCK: usize = 2_048;

fn main() {
    let given: Vec<String> = std::env::args().skip(1).collect();
    let given: Vec<&str> = given.iter().map(String::as_str).collect();
    let [what, seconds] = given[..] else { panic!("authorize first|middle|last|miss|mix SECONDS") };
    let plans = plans();
    let rules = Rules::compile(&plans).expect("the rules are sound");
    let all = requests(&plans);
    let asked: Vec<&Request> = all.iter().filter(|request| what == "mix" || request.kind == what).collect();
    assert!(!asked.is_empty(), "authorize first|middle|last|miss|mix SECONDS");
    for request in &all {
        let verdict = request.judge(&rules);
        assert_eq!(
            (verdict.is_allowed, rules.rule_name(verdict.rule)),
            (request.is_allowed, &*request.rule),
            "{}",
            request.kind
        );
    }
    let end = Instant::now() + Duration::from_secs_f64(seconds.parse().expect("seconds"));
    let mut blocks = Vec::new();
    while blocks.is_empty() || Instant::now() < end {
        let begun = Instant::now();
        for request in asked.iter().cycle().take(BLOCK) {
            black_box(black_box(*request).judge(&rules));
        }
        blocks.push(begun.elapsed().as_nanos() as f64 / BLOCK as f64);
    }
    blocks.sort_by(f64::total_cmp);
    println!("{}", json!({"ns": blocks[blocks.len() / 2]}));
}

struct Request {
    kind: &'static str,
    peer: String,
    method: &'static str,
    path: Path,
    source: IpAddr,
    headers: Vec<(Box<str>, Vec<u8>)>,
    is_allowed: bool,
    rule: String,
}

impl Request {
    fn judge(&self, rules: &Rules) -> Verdict {
        rules.judge(&Question {
            peer: Some(&self.peer),
            method: self.method,
            path: &self.path,
            host: Some("orders:8443"),
            port: 8443,
            source: Some(self.source),
            remote: Some(self.source),
            sni: "orders",
            headers: &self.headers,
            claims: None,
        })
    }
}

fn peer(n: usize) -> String {
    format!("spiffe://shop.internal/ns/team-{}/sa/service-{n}", n % 40)
}

fn exact(value: String) -> TextPlan {
    TextPlan::Exact { value }
}

/// Resources have names of their own, as the routes of an API do.
fn resource(n: usize) -> String {
    format!("/api/v1/resource-{}", n % 120)
}

fn plans() -> Vec<RulePlan> {
    let prefix = |value: String| vec![PathPlan::Prefix { value }];
    let template = |value: String| vec![PathPlan::Template { value }];
    let when = |key: &str, value: &str| {
        vec![ConditionPlan { key: key.to_owned(), values: vec![exact(value.to_owned())], not_values: Vec::new() }]
    };
    (0..RULES)
        .map(|n| {
            let methods = if n % 3 == 0 { vec!["GET".to_owned()] } else { vec!["GET".to_owned(), "POST".to_owned()] };
            let rule = RulePlan { name: format!("rule-{n}"), action: Action::Allow, methods, ..RulePlan::default() };
            let denied = RulePlan { action: Action::Deny, methods: Vec::new(), ..rule.clone() };
            match n % 20 {
                // The last of all is a plain one.
                _ if n + 1 == RULES => allowed(rule, n),
                0 => RulePlan { paths: prefix(format!("/internal/{n}/")), ..denied },
                1 if n % 40 == 1 => RulePlan { from: vec![PeerPlan::Exact { value: peer(n + 5000) }], ..denied },
                1 => RulePlan { ip_blocks: vec![format!("198.51.{}.0/24", n / 20)], ..denied },
                2 if n % 100 == 2 => {
                    RulePlan { when: when("request.headers[x-tenant]", &format!("blocked-{n}")), ..denied }
                }
                2 if n % 100 == 22 => RulePlan {
                    methods: vec!["DELETE".to_owned()],
                    not_namespaces: vec![exact("team-1".to_owned())],
                    ..denied
                },
                2 => RulePlan { paths: vec![PathPlan::Suffix { value: format!("/secret-{n}") }], ..denied },
                3..=5 => RulePlan {
                    namespaces: vec![exact(format!("team-{}", n % 40))],
                    paths: prefix(format!("{}/shared/", resource(n))),
                    ..rule
                },
                6 | 7 => RulePlan {
                    from: vec![PeerPlan::Prefix { value: format!("spiffe://shop.internal/ns/team-{}/", n % 40) }],
                    paths: template(format!("{}/{{id}}/parts/{{part}}", resource(n))),
                    ..rule
                },
                8 => RulePlan {
                    ip_blocks: vec![format!("10.{}.0.0/16", n % 250)],
                    paths: prefix(format!("/probe/{n}")),
                    ..rule
                },
                9 => RulePlan {
                    paths: template(format!("{}/{{id}}/claims", resource(n))),
                    when: when("request.auth.claims[role]", "clerk"),
                    ..rule
                },
                10 => RulePlan {
                    hosts: vec![exact(format!("tenant-{n}.shop"))],
                    paths: prefix("/tenant/".to_owned()),
                    ..rule
                },
                _ => allowed(rule, n),
            }
        })
        .collect()
}

/// Three callers may use a resource.
fn allowed(rule: RulePlan, n: usize) -> RulePlan {
    let from = (0..3).map(|more| PeerPlan::Exact { value: peer(n + 1000 * more) }).collect();
    let paths = vec![
        PathPlan::Exact { value: resource(n) },
        PathPlan::Template { value: format!("{}/{{id}}", resource(n)) },
        PathPlan::Prefix { value: format!("{}/search/", resource(n)) },
    ];
    RulePlan { from, paths, ..rule }
}

fn requests(plans: &[RulePlan]) -> Vec<Request> {
    let request = |kind, n: usize, target: &str, is_allowed: bool, rule: String| Request {
        kind,
        peer: peer(n),
        method: "GET",
        path: canonical(target.as_bytes(), "GET", None, false).expect("a path"),
        source: "10.3.2.1".parse().expect("an address"),
        headers: vec![("x-tenant".into(), b"acme".to_vec())],
        is_allowed,
        rule,
    };
    let is_plain = |n: usize| plans[n].action == Action::Allow && plans[n].from.len() == 3;
    let at = |kind, n: usize| request(kind, n, &format!("{}/4711", resource(n)), true, format!("rule-{n}"));
    let first = (0..RULES).find(|n| is_plain(*n)).expect("a plain rule");
    let middle = (RULES / 2..RULES).find(|n| is_plain(*n)).expect("a plain rule");
    vec![
        at("first", first),
        at("middle", middle),
        at("last", RULES - 1),
        // A known caller, and a resource that is another's.
        request("miss", middle, &format!("{}/4711", resource(middle + 7)), false, String::new()),
        request("denied", middle, "/internal/500/x", false, "rule-500".to_owned()),
    ]
}
