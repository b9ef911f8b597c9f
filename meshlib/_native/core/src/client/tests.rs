//! The outbound way as a story: virtual time, seeded chance, no sockets.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]
use std::collections::HashMap;

use super::*;
use crate::model::Outcome::{self, Cancelled, Refused, Reset, Response, Stale};
use crate::model::Pushback;

mod amending;
mod balancing;
mod checks;
mod guards;
mod hedges;
mod held;
mod invariants;
mod limits;
mod localities;
mod regressions;
mod stage;

const PLAN: &str = r#"{"service":"me","zone":"","services":[{"name":"orders","hosts":["orders"],"protocol":"http","identity":"spiffe://shop/orders","is_guard":false,
  "routes":[{"name":"split","match":{"path":{"kind":"prefix","value":"/split"},"methods":[],"headers":[]},
     "backends":[{"name":"v1","labels":{"version":"v1"},"weight":90},{"name":"v2","labels":{"version":"v2"},"weight":10}],
     "retry":{"attempts":1,"backoff_base":0.025,"backoff_max":0.25,"statuses":[503],"idempotency_key":true,"idempotent":false,"on":["connect","refused_stream","reset","timeout","protocol","identity","status"],"per_try":0.0,"hedge":null},"deadline":2.0,"stream_idle":60.0},
   {"name":"all","match":{"path":{"kind":"prefix","value":"/"},"methods":["GET","POST"],"headers":[]},
     "backends":[{"name":"all","labels":{},"weight":1}],
     "retry":{"attempts":1,"backoff_base":0.025,"backoff_max":0.25,"statuses":[503],"idempotency_key":false,"idempotent":false,"on":["connect","refused_stream","reset","timeout","protocol","identity","status"],"per_try":0.0,"hedge":null},"deadline":15.0,"stream_idle":60.0}],
  "budget":{"ratio":0.2,"per_second":10.0,"window":10.0},
  "balance":{"policy":"POLICY","decay":10.0,"start":0.03,"penalty":5.0,"panic":0.5,
    "weights":"discover","orca":{"blackout":10.0,"expiry":180.0,"error_penalty":1.0},"slow_start":0.0,"slow_start_least":0.1,
    "hash":{"on":[],"bound":0.0,"ring":1024,"table":65537},"sticky":{"kind":"none","name":""},
    "locality":{"policy":"off","order":[],"overprovisioning":1.4,"least_endpoints":6}},
  "admit":{"in_flight":4,"pending":0,"connect":1.0,"adaptive":null,"throttle":{"ratio":0.0,"window":30.0},"rate":[],"breaker":{"failures":5,"success_rate":0.8,"window":10.0,"minimum_calls":5,"open_min":1.0,"open_max":60.0,"max_ejected":0.5,"slow":0.0,"slow_rate":0.5}}}]}"#;

fn at(seconds: f64) -> Duration {
    Duration::from_secs_f64(seconds)
}

fn address(name: &str, version: &str) -> Address {
    Address {
        is_held: false,
        address: name.into(),
        weight: 1.0,
        zone: String::new(),
        labels: [("version".to_owned(), version.to_owned())].into(),
        identity: String::new(),
    }
}

fn engine_with(policy: &str, endpoints: &[(&str, &str)]) -> Engine {
    let engine = Engine::new(11);
    engine.publish(PLAN.replace("POLICY", policy).as_bytes(), at(0.0)).unwrap();
    engine.resolve("orders", 1, &endpoints.iter().map(|(n, v)| address(n, v)).collect::<Vec<_>>(), at(0.0)).unwrap();
    engine
}

fn engine() -> Engine {
    engine_with("peak_ewma", &[("a", "v1"), ("b", "v1"), ("c", "v2")])
}

fn request<'a>(method: &'a str, path: &'a str) -> Request<'a> {
    Request {
        authority: "orders",
        method,
        path,
        deadline: None,
        is_idempotent: None,
        is_replayable: true,
        timeout: None,
        retries: None,
        hedge: None,
        zone: None,
        key: None,
        peer: None,
        labels: None,
        is_standby: false,
        layer: 0,
    }
}

fn begin(engine: &Engine, method: &str, path: &str, now: f64) -> Call {
    engine.begin(&request(method, path), &Vec::new(), at(now)).unwrap()
}

fn send(call: &mut Call, now: f64) -> (u32, String) {
    match call.next(at(now)).unwrap() {
        Next::Send { token, place, .. } => (token, call.address(place).to_owned()),
        other => panic!("{other:?}"),
    }
}

/// Drive a whole call; the fleet's answer by address. Returns the addresses that were tried and the last outcome.
fn drive(
    engine: &Engine,
    method: &str,
    now: f64,
    answer: impl Fn(&str) -> (Outcome, u16),
) -> (Vec<String>, Outcome, u16) {
    let mut call = begin(engine, method, "/", now);
    let (mut now, mut tried) = (now, Vec::new());
    loop {
        match call.next(at(now)).unwrap() {
            Next::Wait(wait) => now += wait.as_secs_f64(),
            Next::Await => panic!("nothing else is under way"),
            Next::Send { token, place, .. } => {
                let address = call.address(place).to_owned();
                tried.push(address.clone());
                let (outcome, status) = answer(&address);
                now += 0.01;
                if call.head(token, outcome, status, Pushback::Unsaid, at(now)).unwrap() == Reply::Deliver {
                    if outcome == Response {
                        call.finish(token, Response, at(now)).unwrap();
                    }
                    return (tried, outcome, status);
                }
            }
        }
    }
}

fn in_flight(engine: &Engine) -> u32 {
    engine.read(at(0.0)).iter().map(|row| row.in_flight).sum()
}

#[test]
fn unknown_service_and_missing_route_are_refused() {
    let engine = engine();
    let unknown =
        engine.begin(&Request { authority: "order", ..request("GET", "/") }, &Vec::new(), at(0.0)).err().unwrap();
    assert_eq!(
        unknown,
        Refusal::UnknownService("no service is called \"order\"; the configuration names orders".into())
    );
    let none = engine.begin(&request("DELETE", "/"), &Vec::new(), at(0.0)).err().unwrap();
    assert!(matches!(none, Refusal::NoRoute(_)));
}

#[test]
fn a_refused_connection_is_tried_on_another_endpoint_for_every_method() {
    let engine = engine();
    for n in 0..50 {
        let (tried, outcome, status) =
            drive(&engine, "POST", f64::from(n), |a| if a == "a" { (Refused, 0) } else { (Response, 200) });
        assert_eq!((outcome, status), (Response, 200));
        assert!(tried.len() <= 2 && (tried.len() == 1 || tried[0] != tried[1]), "{tried:?}");
    }
}

#[test]
fn a_post_that_was_written_is_not_repeated() {
    let engine = engine();
    let (tried, outcome, _) = drive(&engine, "POST", 0.0, |_| (Reset, 0));
    assert_eq!((tried.len(), outcome), (1, Reset));
    let (tried, outcome, _) = drive(&engine, "GET", 0.0, |_| (Reset, 0));
    assert_eq!((tried.len(), outcome), (2, Reset));
}

#[test]
fn an_idempotency_key_counts_only_where_the_route_says_so() {
    let engine = engine();
    let key = vec![(b"Idempotency-Key".to_vec(), b"k1".to_vec())];
    let with = |path| engine.begin(&request("POST", path), &key, at(0.0)).unwrap().is_idempotent();
    assert!(with("/split"));
    assert!(!with("/other"));
    assert!(!begin(&engine, "POST", "/split", 0.0).is_idempotent());
}

#[test]
fn a_stale_connection_is_replayed_on_the_same_endpoint() {
    let engine = engine();
    let mut call = begin(&engine, "GET", "/", 0.0);
    let (token, first) = send(&mut call, 0.0);
    assert_eq!(call.head(token, Stale, 0, Pushback::Unsaid, at(0.1)).unwrap(), Reply::Retry);
    assert_eq!(send(&mut call, 0.1).1, first);
    assert_eq!(engine.read(at(0.1))[0].counters.retries, 0);
}

#[test]
fn a_dead_endpoint_is_ejected_at_once_and_probed_when_its_wait_is_over() {
    let engine = engine();
    let answer = |a: &str| if a == "a" { (Refused, 0) } else { (Response, 200) };
    let mut n = 0.0;
    while !engine.read(at(n)).iter().any(|r| r.breaker == "open") {
        drive(&engine, "GET", n, answer);
        n += 0.001;
    }
    // No call goes there while it is out …
    for step in 0..200 {
        assert!(!drive(&engine, "GET", n + 0.1 + f64::from(step) / 1000.0, answer).0.contains(&"a".to_owned()));
    }
    // … then exactly one does, which opens it again …
    let probes: Vec<bool> =
        (0..5).map(|_| drive(&engine, "GET", n + 1.3, answer).0.contains(&"a".to_owned())).collect();
    assert_eq!(probes, [true, false, false, false, false]);
    // … and a good probe brings it back with a fresh average.
    let (tried, ..) = drive(&engine, "GET", n + 5.0, |_| (Response, 200));
    assert_eq!(tried, ["a"]);
    let row = engine.read(at(n + 5.0)).into_iter().find(|r| r.endpoint == "a").unwrap();
    assert_eq!((row.breaker, (row.ewma * 1e3).round()), ("closed", 30.0));
}

#[test]
fn at_most_half_are_ejected_and_never_the_last() {
    for (fleet, most) in [(1, 0), (2, 1), (3, 1), (4, 2), (10, 5)] {
        let names: Vec<String> = (0..fleet).map(|n| format!("e{n}")).collect();
        let endpoints: Vec<(&str, &str)> = names.iter().map(|n| (n.as_str(), "v1")).collect();
        let engine = engine_with("round_robin", &endpoints);
        for n in 0..50 {
            drive(&engine, "GET", f64::from(n) / 1e3, |_| (Refused, 0));
        }
        assert_eq!(engine.read(at(0.1)).iter().filter(|r| r.breaker == "open").count(), most, "of {fleet}");
    }
}

#[test]
fn the_average_survives_a_new_snapshot_and_what_left_is_forgotten() {
    let engine = engine_with("round_robin", &[("a", "v1"), ("b", "v1"), ("c", "v1")]);
    for n in 0..3 {
        drive(&engine, "GET", f64::from(n) / 1e3, |a| if a == "a" { (Refused, 0) } else { (Response, 200) });
    }
    let breaker = |name: &str| engine.read(at(0.1)).into_iter().find(|r| r.endpoint == name).map(|r| r.breaker);
    assert_eq!(breaker("a"), Some("open"));
    engine.resolve("orders", 2, &vec![address("a", "v1"), address("d", "v1")], at(0.1)).unwrap();
    assert_eq!((breaker("a"), breaker("b"), breaker("d")), (Some("open"), None, Some("closed")));
    engine.publish(PLAN.replace("POLICY", "peak_ewma").as_bytes(), at(0.1)).unwrap();
    assert_eq!(breaker("a"), Some("open"));
    engine.resolve("orders", 1, &vec![], at(0.1)).unwrap();
    assert_eq!(breaker("a"), Some("open"), "an older version is ignored");
}

#[test]
fn weights_and_labels_choose_the_backend() {
    let engine = engine();
    let mut hits: HashMap<String, u32> = HashMap::new();
    for n in 0..2000 {
        let mut call = begin(&engine, "GET", "/split", f64::from(n) / 1e3);
        *hits.entry(send(&mut call, f64::from(n) / 1e3).1).or_default() += 1;
    }
    assert!((140..260).contains(&hits["c"]), "{hits:?}");
}

#[test]
fn a_dead_canary_falls_back_to_the_other_backend() {
    let engine = engine();
    for n in 0..300 {
        let mut call = begin(&engine, "GET", "/split", f64::from(n) / 100.0);
        let mut now = f64::from(n) / 100.0;
        let (token, first) = send(&mut call, now);
        if first != "c" {
            continue;
        }
        assert_eq!(call.head(token, Refused, 0, Pushback::Unsaid, at(now)).unwrap(), Reply::Retry);
        if let Next::Wait(wait) = call.next(at(now)).unwrap() {
            now += wait.as_secs_f64();
        }
        assert_ne!(send(&mut call, now).1, "c");
    }
}

#[test]
fn the_limit_of_the_service_is_taken_once_a_call_and_given_back() {
    let engine = engine();
    let held: Vec<Call> = (0..4).map(|_| begin(&engine, "GET", "/", 0.0)).collect();
    let refused = engine.begin(&request("GET", "/"), &Vec::new(), at(0.0)).err().unwrap();
    assert_eq!(refused, Refusal::LimitExceeded("4 calls to \"orders\" are in flight already".into()));
    drop(held);
    assert_eq!(in_flight(&engine), 0);
    begin(&engine, "GET", "/", 0.0);
}

#[test]
fn permits_are_conserved_whatever_the_end() {
    let engine = engine();
    let random = crate::random::Random::new(5);
    for n in 0..3000 {
        let now = f64::from(n) / 100.0;
        let mut call = begin(&engine, if n % 2 == 0 { "GET" } else { "POST" }, "/", now);
        while let Ok(next) = call.next(at(now + 1.0)) {
            let Next::Send { token, .. } = next else { break };
            let (outcome, _) = Outcome::ALL[random.below(Outcome::ALL.len())];
            if random.below(10) == 0 {
                break; // dropped in flight
            }
            let status = [200, 404, 429, 503][random.below(4)];
            if call.head(token, outcome, status, Pushback::Unsaid, at(now + 1.0)).unwrap() == Reply::Deliver {
                if outcome == Response && random.below(5) != 0 {
                    let end = if random.below(4) == 0 { Reset } else { Response };
                    call.finish(token, end, at(now + 1.0)).unwrap();
                }
                break;
            }
        }
        drop(call);
        assert_eq!(in_flight(&engine), 0, "after call {n}");
    }
}

#[test]
fn retries_stay_within_the_budget_in_an_outage() {
    let engine = engine();
    let calls = 2000;
    let attempts: usize =
        (0..calls).map(|n| drive(&engine, "GET", f64::from(n) / 200.0, |_| (Response, 503)).0.len()).sum();
    // 10 seconds: a fifth of the calls, ten a second, and the reserve of the first window.
    assert!(attempts as f64 <= f64::from(calls) * 1.2 + 100.0 + 100.0, "{attempts}");
}

#[test]
fn the_earlier_deadline_wins_and_a_spent_one_ends_the_call() {
    let engine = engine();
    let early = Request { deadline: Some(at(1.0)), ..request("GET", "/") };
    let mut call = engine.begin(&early, &Vec::new(), at(0.0)).unwrap();
    assert_eq!(call.deadline(), at(1.0));
    assert!(matches!(call.next(at(1.0)), Err(Refusal::DeadlineExceeded(_))));
    assert_eq!(in_flight(&engine), 0);
    let late = Request { deadline: Some(at(99.0)), ..request("GET", "/") };
    assert_eq!(engine.begin(&late, &Vec::new(), at(0.0)).unwrap().deadline(), at(15.0));
}

#[test]
fn an_isolated_endpoint_gets_nothing_not_even_in_panic() {
    let engine = engine_with("peak_ewma", &[("a", "v1"), ("b", "v1")]);
    assert!(engine.isolate("orders", "a", true, at(0.0)));
    for n in 0..100 {
        assert_eq!(drive(&engine, "GET", f64::from(n), |_| (Response, 200)).0, ["b"]);
    }
    engine.isolate("orders", "b", true, at(0.0));
    let mut call = begin(&engine, "GET", "/", 0.0);
    assert!(matches!(call.next(at(0.0)), Err(Refusal::CircuitOpen(_))));
    engine.isolate("orders", "a", false, at(0.0));
    assert_eq!(drive(&engine, "GET", 0.0, |_| (Response, 200)).0, ["a"]);
}

#[test]
fn a_cancelled_probe_waits_again_and_then_another_goes() {
    let engine = engine();
    while !engine.read(at(0.0)).iter().any(|r| r.breaker == "open") {
        drive(&engine, "GET", 0.0, |a| if a == "a" { (Refused, 0) } else { (Response, 200) });
    }
    let mut call = begin(&engine, "GET", "/", 2.0);
    assert_eq!(send(&mut call, 2.0).1, "a");
    drop(call);
    // An endpoint that hangs must not take every call of a caller who soon gives up.
    for n in 0..30 {
        let mut call = begin(&engine, "GET", "/", 2.0 + f64::from(n) / 100.0);
        assert_ne!(send(&mut call, 2.0 + f64::from(n) / 100.0).1, "a");
    }
    let mut call = begin(&engine, "GET", "/", 3.3);
    let (token, address) = send(&mut call, 3.3);
    assert_eq!(address, "a");
    call.head(token, Cancelled, 0, Pushback::Unsaid, at(3.3)).unwrap();
    assert_eq!(in_flight(&engine), 0);
}

#[test]
fn a_probe_of_the_parent_does_not_bind_the_forked_child() {
    let engine = engine();
    while !engine.read(at(0.0)).iter().any(|r| r.breaker == "open") {
        drive(&engine, "GET", 0.0, |a| if a == "a" { (Refused, 0) } else { (Response, 200) });
    }
    let mut call = begin(&engine, "GET", "/", 2.0);
    send(&mut call, 2.0);
    engine.reseed(7);
    std::mem::forget(call); // it lives on in the parent
    assert_eq!(drive(&engine, "GET", 9.0, |_| (Response, 200)).0, ["a"]);
}

#[test]
fn a_new_identity_of_the_service_reaches_its_endpoints() {
    let engine = engine();
    let plan = PLAN.replace("POLICY", "peak_ewma");
    let identity = |engine: &Engine| {
        let mut call = begin(engine, "GET", "/", 1.0);
        match call.next(at(1.0)).unwrap() {
            Next::Send { place, .. } => call.identity(place).to_owned(),
            other => panic!("{other:?}"),
        }
    };
    engine.publish(plan.replace("spiffe://shop/orders", "spiffe://shop/new").as_bytes(), at(1.0)).unwrap();
    assert_eq!(identity(&engine), "spiffe://shop/new");
    engine.publish(plan.replace("spiffe://shop/orders", "").as_bytes(), at(1.0)).unwrap();
    assert_eq!(identity(&engine), "");
}

#[test]
fn an_endpoint_that_left_is_not_counted_as_ejected() {
    let engine = engine_with("round_robin", &[("a", "v1"), ("b", "v1"), ("c", "v1"), ("d", "v1")]);
    let mut calls: Vec<Call> = (0..2).map(|_| begin(&engine, "POST", "/", 0.0)).collect();
    let tokens: Vec<(u32, String)> = calls.iter_mut().map(|call| send(call, 0.0)).collect();
    let stays = |name: &&&str| tokens.iter().all(|(_, gone)| gone != **name);
    let left: Vec<Address> = ["a", "b", "c", "d", "e"].iter().filter(stays).map(|name| address(name, "v1")).collect();
    engine.resolve("orders", 2, &left, at(0.0)).unwrap();
    for (call, (token, _)) in calls.iter_mut().zip(&tokens) {
        call.head(*token, Refused, 0, Pushback::Unsaid, at(0.1)).unwrap();
    }
    drop(calls);
    let dead = |a: &str| if a == "e" { (Refused, 0) } else { (Response, 200) };
    for n in 0..6 {
        drive(&engine, "GET", 1.0 + f64::from(n) / 1e3, dead);
    }
    assert_eq!(engine.read(at(1.1)).into_iter().find(|r| r.endpoint == "e").unwrap().breaker, "open");
}

#[test]
fn weight_zero_takes_no_traffic() {
    let engine = engine_with("peak_ewma", &[]);
    let none = Address { weight: 0.0, ..address("a", "v1") };
    engine.resolve("orders", 2, &vec![none, address("b", "v1")], at(0.0)).unwrap();
    for n in 0..100 {
        assert_eq!(drive(&engine, "GET", f64::from(n) / 1e3, |_| (Response, 200)).0, ["b"]);
    }
}

#[test]
fn the_record_tells_the_story_in_order() {
    let engine = engine_with("round_robin", &[("a", "v1"), ("b", "v1"), ("c", "v1")]);
    let mut call = begin(&engine, "GET", "/", 1.0);
    let (token, first) = send(&mut call, 1.0);
    call.head(token, Refused, 0, Pushback::Unsaid, at(1.01)).unwrap();
    let Next::Wait(wait) = call.next(at(1.01)).unwrap() else { panic!("no jitter") };
    let (token, second) = send(&mut call, 1.01 + wait.as_secs_f64() + 0.001);
    assert_ne!(first, second);
    call.head(token, Response, 200, Pushback::Unsaid, at(1.1)).unwrap();
    call.finish(token, Response, at(1.1)).unwrap();
    let record = call.record(at(1.1));
    let story: Vec<&str> = record.events.iter().map(|e| e.what).collect();
    assert_eq!(story, ["matched", "picked", "ejected", "refused", "again", "picked", "response"]);
    assert_eq!((record.service.as_str(), record.route.as_str(), record.retries), ("orders", "all", 1));
}
