//! What becomes of endpoints that the registry doesn't tell any more, and that discovery holds?
use super::stage::*;
use super::*;
use serde_json::json;

/// Ten endpoints, of which the registry tells the first so many.
fn told(count: usize) -> Vec<Address> {
    let hold = |(n, found): (usize, Address)| Address { is_held: n >= count, ..found };
    fleet(10).into_iter().enumerate().map(hold).collect()
}

fn number(name: &str) -> usize {
    name.trim_start_matches('e').parse().unwrap()
}

fn out_of(engine: &Engine) -> usize {
    begin(engine, "GET", "/", 0.0).record(at(0.0)).out
}

const POLICIES: [&str; 6] = ["peak_ewma", "least_request", "round_robin", "random", "ring_hash", "maglev"];

/// Calls in which those that the registry doesn't tell are dead: how many failed, and how many attempts met a dead one.
fn calls(engine: &Engine, count: usize, alive: usize) -> (usize, usize) {
    let (mut failed, mut met) = (0, 0);
    for n in 0..count {
        let answer = |name: &str| if number(name) < alive { (Response, 200) } else { (Refused, 0) };
        let (tried, outcome, _) = drive(engine, "GET", n as f64 / 100.0, answer);
        failed += usize::from(outcome != Response);
        met += tried.iter().filter(|name| number(name) >= alive).count();
    }
    (failed, met)
}

/// Most of a service has gone for good. Each of those that are held fails one attempt, which is made again at one that is told, and then
/// only its probes; by the cap alone half of them would stay in.
#[test]
fn no_call_fails_where_those_that_are_held_are_gone() {
    for name in POLICIES {
        for left in [1, 3] {
            let engine = policy(name).engine(&fleet(10));
            assert_eq!(calls(&engine, 50, 10), (0, 0));
            engine.resolve("orders", 2, &told(left), at(0.5)).unwrap();
            let (failed, met) = calls(&engine, 3000, left);
            assert_eq!(failed, 0, "{name}, {left} are left");
            // In thirty seconds a probe after 1, 2, 4, 8 and 16 s.
            assert!(met <= 10 * 6, "{name}, {left} are left: {met} attempts at who is gone");
            if name != "ring_hash" && name != "maglev" {
                assert_eq!(out_of(&engine), 10 - left, "{name}");
            }
        }
    }
}

/// The registry is wrong about nine of ten: they are called like the tenth.
#[test]
fn who_is_held_and_answers_is_called_as_before() {
    let engine = policy("round_robin").engine(&fleet(10));
    engine.resolve("orders", 2, &told(1), at(0.0)).unwrap();
    let hits = spread(&engine, &request("GET", "/"), 100, 0.1);
    assert!(hits.len() == 10 && hits.values().all(|count| *count == 10), "{hits:?}");
}

/// A registry that tells nobody is not believed in anything: half stay in, also those that refuse.
#[test]
fn the_cap_holds_where_nobody_is_told() {
    let engine = policy("round_robin").engine(&fleet(10));
    engine.resolve("orders", 2, &told(0), at(0.0)).unwrap();
    (0..50).for_each(|_| drop(drive(&engine, "GET", 0.0, |_| (Refused, 0))));
    assert_eq!(out_of(&engine), 5);
}

/// Errors are no sign that an endpoint has gone: those that the registry has lost are half of the service, and it may be what fails.
#[test]
fn the_cap_holds_for_who_answers_with_errors() {
    let engine = policy("round_robin").engine(&fleet(10));
    engine.resolve("orders", 2, &told(1), at(0.0)).unwrap();
    (0..500).for_each(|_| drop(drive(&engine, "GET", 0.0, |_| (Response, 503))));
    assert_eq!(out_of(&engine), 5);
}

/// An address that was given to somebody else is as dead as one where nobody is.
#[test]
fn who_is_held_and_is_somebody_else_is_out_at_once() {
    let engine = policy("round_robin").engine(&fleet(10));
    engine.resolve("orders", 2, &told(1), at(0.0)).unwrap();
    for _ in 0..20 {
        drive(&engine, "GET", 0.0, |name| if name == "e0" { (Response, 200) } else { (Outcome::Identity, 0) });
    }
    assert_eq!(out_of(&engine), 9);
}

/// The cap and panic count those that are left: with three, one may be ejected, and one that is sick is no reason to panic.
#[test]
fn who_is_gone_is_missing_to_nobody() {
    let engine = policy("round_robin").engine(&told(3));
    let answer = |name: &str| if number(name) < 3 { (Response, 200) } else { (Refused, 0) };
    (0..20).for_each(|_| drop(drive(&engine, "GET", 0.0, answer)));
    assert_eq!(out_of(&engine), 7);
    for _ in 0..20 {
        drive(&engine, "GET", 0.1, |name| if name == "e0" { (Response, 200) } else { (Refused, 0) });
    }
    assert_eq!(out_of(&engine), 8);
    let hits = spread(&engine, &request("GET", "/"), 20, 0.2);
    assert!(hits.keys().all(|name| number(name) < 3), "{hits:?}");
    assert_eq!(engine.read(at(0.2))[0].panics, 0);
}

/// Panic ignores health, and not what the registry says, too.
#[test]
fn nobody_who_is_gone_is_called_in_panic() {
    let engine = policy("round_robin").engine(&told(3));
    let answer = |name: &str| if number(name) < 3 { (Response, 200) } else { (Refused, 0) };
    (0..20).for_each(|_| drop(drive(&engine, "GET", 0.0, answer)));
    for name in ["e0", "e1"] {
        engine.check("orders", name, false, at(0.1));
    }
    let hits = spread(&engine, &request("GET", "/"), 30, 0.2);
    assert!(hits.len() == 3 && hits.keys().all(|name| number(name) < 3), "{hits:?}");
    assert!(engine.read(at(0.2))[0].panics > 0);
}

/// It has come back, and the registry says so: nobody waits for its probe. What a person or a check says of it stays.
#[test]
fn who_is_told_again_begins_anew() {
    for amends in [false, true] {
        let engine = policy("round_robin").engine(&told(1));
        let answer = |name: &str| if name == "e0" { (Response, 200) } else { (Refused, 0) };
        (0..20).for_each(|_| drop(drive(&engine, "GET", 0.0, answer)));
        engine.isolate("orders", "e8", true, at(0.0));
        engine.check("orders", "e9", false, at(0.0));
        assert_eq!(out_of(&engine), 9);
        if amends {
            assert_eq!(engine.amend("orders", 1, 2, &fleet(10)[1..], &[], at(0.1)), Ok(true));
        } else {
            engine.resolve("orders", 2, &fleet(10), at(0.1)).unwrap();
        }
        let states: Vec<_> = (0..10).map(|n| row(&engine, &format!("e{n}"), 0.1).breaker).collect();
        assert_eq!((&states[..8], states[8], states[9]), (&["closed"; 8][..], "isolated", "failing"));
    }
}

/// Also in the zone of the caller: those that have gone leave no hole there that other zones fill.
#[test]
fn who_is_gone_counts_for_no_zone() {
    let zones = [("a", 10), ("b", 10)];
    let found = |left: usize| -> Vec<Address> {
        let hold =
            |found: Address| Address { is_held: number(&found.address.replace(['a', 'b'], "e")) >= left, ..found };
        in_zones(&zones).into_iter().map(hold).collect()
    };
    let locality = json!({"policy": "failover", "order": [], "overprovisioning": 1.4, "least_endpoints": 6});
    let engine = policy("round_robin").whole("/zone", json!("a")).with("/balance/locality", locality).engine(&found(2));
    let answer = |name: &str| if matches!(name, "a0" | "a1" | "b0" | "b1") { (Response, 200) } else { (Refused, 0) };
    (0..100).for_each(|_| drop(drive(&engine, "GET", 0.0, answer)));
    let hits = spread(&engine, &request("GET", "/"), 100, 0.1);
    assert!(hits.keys().all(|name| name.starts_with('a')), "{hits:?}");
}
