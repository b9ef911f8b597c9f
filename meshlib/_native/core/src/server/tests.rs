#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]
use serde_json::{json, Value};

use super::*;

mod admission;
mod overload;
mod public;
mod waiting;

const SHOP: &str = "spiffe://shop/ns/default/sa/storefront";
const BROWSER: &str = "spiffe://shop/ns/default/sa/browser";
const NOW: Duration = Duration::from_secs(100);

fn plan(mode: &str, rules: &str) -> String {
    format!(
        r#"{{"service":"orders","mode":"{mode}","identity":"spiffe://shop/ns/default/sa/orders","trust_domain":"shop",
            "paths":"canonical","admission":{{"in_flight":2,"adaptive":null,"queue":0.0,"target":0.005,"interval":0.1,
            "shares":[0.6,0.75,0.9,1.0],"priorities":[],"probes":[]}},"rules":[{}],"public_rules":[],
            "routes":[{{"name":"items","path":{{"kind":"template","value":"/items/{{id}}"}},"on_disconnect":"calls"}}],
            "proxies":{{"identities":[],"cidrs":[],"hops":0}},"xfcc":"sanitize","providers":[],"jwt_required":[],"rates":[],
            "record":false}}"#,
        rules.replace("CLAUSES", CLAUSES)
    )
}

/// What a rule doesn't ask.
const CLAUSES: &str = r#""authorizer":"","not_from":[],"namespaces":[],"not_namespaces":[],"request_principals":[],
    "not_request_principals":[],"ip_blocks":[],"not_ip_blocks":[],"remote_ip_blocks":[],"not_remote_ip_blocks":[],
    "not_methods":[],"not_paths":[],"is_case_insensitive":false,"hosts":[],"not_hosts":[],"ports":[],"not_ports":[],"when":[]"#;

const SHOP_RULE: &str = r#"{"name":"shop","action":"allow","dry_run":false,
    "from":[{"kind":"exact","value":"spiffe://shop/ns/default/sa/storefront"}],"methods":["GET"],"paths":[],CLAUSES}"#;
const OPEN_RULE: &str =
    r#"{"name":"open","action":"allow","dry_run":false,"from":[{"kind":"any"}],"methods":[],"paths":[],CLAUSES}"#;

fn gate(mode: &str, rules: &str) -> Gate {
    let gate = Gate::default();
    gate.publish(Snapshot::compile(plan(mode, rules).as_bytes()).unwrap());
    gate
}

/// The open one, changed.
fn changed(change: impl FnOnce(&mut Value)) -> Result<Snapshot, String> {
    let mut plan: Value = serde_json::from_str(&plan("enforce", OPEN_RULE)).unwrap();
    change(&mut plan);
    Snapshot::compile(plan.to_string().as_bytes())
}

fn gate_of(change: impl FnOnce(&mut Value)) -> Gate {
    let gate = Gate::default();
    gate.publish(changed(change).unwrap());
    gate
}

/// The same, come at another time.
fn come(gate: &Gate, now: Duration, target: &str, peer: &str, fields: &[(&str, &str)]) -> Entry {
    let mut headers = gate.headers(target.as_bytes());
    fields.iter().for_each(|(name, value)| headers.field(name.as_bytes(), value.as_bytes()));
    let (target, peer, origin) = (target.as_bytes(), Some(peer), Origin::default());
    gate.begin(Arrival { method: "GET", target, headers, peer, is_tls: true, now, deadline: None, origin })
}

fn arrive(gate: &Gate, method: &str, target: &str, peer: Option<&str>, fields: &[(&str, &str)]) -> Entry {
    let mut headers = gate.headers(target.as_bytes());
    for (name, value) in fields {
        headers.field(name.as_bytes(), value.as_bytes());
    }
    let target = target.as_bytes();
    let origin = Origin::default();
    gate.begin(Arrival { method, target, headers, peer, is_tls: peer.is_some(), now: NOW, deadline: None, origin })
}

fn grpc(gate: &Gate, method: &str, deadline: Option<Duration>) -> Entry {
    let (headers, origin) = (gate.headers(b"/"), Origin::default());
    gate.begin_grpc(GrpcArrival {
        method,
        headers,
        peer: Some(SHOP),
        is_tls: true,
        now: NOW,
        deadline,
        origin,
        can_wait: true,
    })
}

fn get(gate: &Gate, target: &str, peer: Option<&str>) -> Entry {
    arrive(gate, "GET", target, peer, &[])
}

#[test]
fn nothing_is_let_in_before_a_plan_is_published() {
    let entry = get(&Gate::default(), "/", Some(SHOP));
    assert_eq!((entry.status(), entry.reason()), (503, "server.not_ready"));
}

#[test]
fn enforce_refuses_what_no_rule_allows() {
    let gate = gate("enforce", SHOP_RULE);
    assert_eq!((get(&gate, "/items/7", Some(SHOP)).status(), get(&gate, "/items/7", Some(SHOP)).rule()), (0, "shop"));
    let denied = get(&gate, "/items/7", Some(BROWSER));
    assert_eq!(
        (denied.status(), denied.reason(), denied.rule(), denied.nearest_rule()),
        (403, "secure.denied", "", "shop")
    );
    let nobody = get(&gate, "/items/7", None);
    assert_eq!((nobody.status(), nobody.reason()), (401, "secure.no_identity"));
}

#[test]
fn in_enforce_a_rule_for_everybody_is_for_everybody_who_proved_to_be_somebody() {
    let gate = gate("enforce", OPEN_RULE);
    assert_eq!((get(&gate, "/", Some(BROWSER)).status(), get(&gate, "/", None).status()), (0, 401));
}

#[test]
fn the_other_modes_report_what_they_would_refuse() {
    for mode in ["observe", "permissive"] {
        let gate = gate(mode, SHOP_RULE);
        for (peer, would_deny) in [(Some(SHOP), false), (Some(BROWSER), true), (None, true)] {
            let entry = get(&gate, "/x", peer);
            assert_eq!((entry.status(), entry.would_deny()), (0, would_deny), "{mode} {peer:?}");
            assert_eq!(entry.detail().is_empty(), !would_deny);
        }
    }
}

#[test]
fn malformed_requests_are_refused_in_every_mode() {
    for mode in ["observe", "permissive", "enforce"] {
        let gate = gate(mode, OPEN_RULE);
        let status = |method, target, fields: &[_]| arrive(&gate, method, target, Some(SHOP), fields).status();
        assert_eq!(status("GET", "/admin%00", &[]), 400);
        assert_eq!(status("get", "/", &[]), 400);
        assert_eq!(status("TRACE", "/", &[]), 405);
        assert_eq!(status("CONNECT", "/", &[]), 405);
        assert_eq!(status("GET", "/", &[("host", "a"), ("host", "b")]), 400);
        assert_eq!(arrive(&gate, "GET", &format!("/{}", "a".repeat(9000)), Some(SHOP), &[]).status(), 414);
        assert_eq!(status("GET", "/", &[("x-mesh-deadline-ms", "0")]), 504);
        assert_eq!(status("GET", "http://a/", &[("host", "a")]), 0);
        assert_eq!(status("GET", "http://b/", &[("host", "a")]), 400);
    }
}

#[test]
fn an_identity_without_tls_is_none() {
    let gate = gate("enforce", SHOP_RULE);
    let entry = gate.begin(Arrival {
        method: "GET",
        target: b"/",
        headers: gate.headers(b"/"),
        peer: Some(SHOP),
        is_tls: false,
        now: NOW,
        deadline: None,
        origin: Origin::default(),
    });
    assert_eq!((entry.status(), entry.peer()), (401, None));
}

#[test]
fn an_entry_gives_its_permit_back_once() {
    let gate = gate("enforce", OPEN_RULE);
    let (first, second) = (get(&gate, "/", Some(SHOP)), get(&gate, "/", Some(SHOP)));
    assert_eq!(get(&gate, "/", Some(SHOP)).status(), 503);
    first.finish(200, NOW + Duration::from_millis(20));
    first.finish(500, NOW);
    let third = get(&gate, "/", Some(SHOP));
    assert_eq!((third.status(), get(&gate, "/", Some(SHOP)).status()), (0, 503));
    drop((first, second));
    assert_eq!(gate.load().in_flight, 1);
    drop(third);
    let reading = &gate.readings()[0];
    assert_eq!((reading.requests, reading.refused, reading.in_flight), (5, 2, 0));
    assert_eq!(reading.codes, vec![(0, 2), (200, 1), (503, 2)]);
    assert_eq!(reading.latency_buckets.iter().sum::<u64>(), 1);
}

#[test]
fn a_deadline_is_the_shortest_and_at_most_an_hour() {
    let gate = gate("observe", "");
    let entry = arrive(&gate, "GET", "/", Some(SHOP), &[("x-mesh-deadline-ms", "250"), ("grpc-timeout", "3S")]);
    assert_eq!(entry.deadline(), Some(NOW + Duration::from_millis(250)));
    let entry = grpc(&gate, "/a.B/C", Some(Duration::MAX));
    assert_eq!(entry.deadline(), Some(NOW + Duration::from_secs(3600)));
    assert_eq!(grpc(&gate, "/a.B/C", Some(NOW)).refusal(), Some(Refusal::Deadline));
}

#[test]
fn an_entry_keeps_the_plan_with_which_it_began() {
    let gate = gate("enforce", OPEN_RULE);
    let entry = get(&gate, "/items/7", Some(SHOP));
    gate.publish(Snapshot::compile(plan("enforce", SHOP_RULE).as_bytes()).unwrap());
    assert_eq!((entry.rule(), entry.route()), ("open", "items"));
    entry.finish(204, NOW);
    gate.publish(Snapshot::compile(plan("enforce", "").as_bytes()).unwrap());
    assert_eq!(get(&gate, "/items/7", Some(SHOP)).status(), 403);
    assert_eq!(gate.readings()[0].codes, vec![(204, 1), (403, 1)]);
}

#[test]
fn grpc_methods_are_judged_letter_for_letter() {
    let gate = gate(
        "enforce",
        r#"{"name":"svc","action":"allow","dry_run":false,"from":[],"methods":[],"paths":[{"kind":"prefix","value":"/app.Svc/"}],CLAUSES}"#,
    );
    let grpc = |method| grpc(&gate, method, None).status();
    assert_eq!(grpc("/app.Svc/Get"), 0);
    assert_eq!(grpc("/grpc.reflection.v1.ServerReflection/ServerReflectionInfo"), 403);
    assert_eq!(grpc("//app.Svc/Get"), 404);
    let labels: Vec<_> = gate.readings().into_iter().map(|reading| (reading.method, reading.codes)).collect();
    assert_eq!(labels, vec![("/app.Svc/Get".to_owned(), vec![(1, 1)]), ("_OTHER".to_owned(), vec![(7, 1), (12, 1)])]);
}

#[test]
fn a_forked_child_begins_with_empty_hands() {
    let gate = gate("enforce", OPEN_RULE);
    let (first, _lost) = (get(&gate, "/", Some(SHOP)), get(&gate, "/", Some(SHOP)));
    gate.reset();
    let (mine, also_mine) = (get(&gate, "/", Some(SHOP)), get(&gate, "/", Some(SHOP)));
    assert_eq!((mine.status(), also_mine.status(), get(&gate, "/", Some(SHOP)).status()), (0, 0, 503));
    first.finish(200, NOW);
    assert_eq!(get(&gate, "/", Some(SHOP)).status(), 503);
}

#[test]
fn a_plan_that_is_not_understood_is_refused() {
    for (good, bad) in [("\"enforce\"", "\"strict\""), ("\"rules\"", "\"rule\""), ("\"canonical\"", "\"loose\"")] {
        assert!(Snapshot::compile(plan("enforce", "").replace(good, bad).as_bytes()).is_err(), "{bad}");
    }
}
