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

/// The registry tells the first so many of a fleet.
fn told_of(found: Vec<Address>, count: usize) -> Vec<Address> {
    found.into_iter().enumerate().map(|(n, found)| Address { is_held: n >= count, ..found }).collect()
}

/// However large it was: who is gone is met once, then by a probe a second for all together, and what nobody got costs no retry of the budget.
#[test]
fn no_call_fails_where_a_large_service_shrinks() {
    for name in ["peak_ewma", "round_robin", "random"] {
        for (total, left, rate) in [(100, 10, 100), (300, 30, 100), (300, 30, 10), (1000, 100, 500)] {
            let engine = policy(name).engine(&fleet(total));
            engine.resolve("orders", 2, &told_of(fleet(total), left), at(0.0)).unwrap();
            let (mut failed, mut met) = (0, 0);
            for n in 0..rate * 20 {
                let answer = |name: &str| if number(name) < left { (Response, 200) } else { (Refused, 0) };
                let (tried, outcome, _) = drive(&engine, "GET", n as f64 / rate as f64, answer);
                failed += usize::from(outcome != Response);
                met += usize::from(number(&tried[0]) >= left);
            }
            assert_eq!(failed, 0, "{name}, {total} to {left}, {rate} a second");
            assert!(met <= total - left + 20, "{name}, {total} to {left}, {rate} a second: {met} met one that is gone");
        }
    }
}

/// The caller's own zone is gone as a whole: a retry goes to the other one.
#[test]
fn no_call_fails_where_a_zone_is_gone() {
    for locality in ["zone_aware", "failover", "off"] {
        let found = || in_zones(&[("a", 10), ("b", 10)]);
        let service =
            policy("round_robin").whole("/zone", json!("a")).with("/balance/locality/policy", json!(locality));
        let engine = service.engine(&found());
        let is_gone = |name: &str| name.starts_with('a');
        let told: Vec<Address> = found().into_iter().map(|f| Address { is_held: is_gone(&f.address), ..f }).collect();
        engine.resolve("orders", 2, &told, at(0.0)).unwrap();
        let answer = |name: &str| if is_gone(name) { (Refused, 0) } else { (Response, 200) };
        let failed = (0..1000).filter(|n| drive(&engine, "GET", *n as f64 / 100.0, answer).1 != Response).count();
        assert_eq!(failed, 0, "{locality}");
    }
}

/// The registry is wrong, and a call is made again for another reason: the few that it tells don't get all the retries.
#[test]
fn retries_are_spread_over_those_that_are_held_and_well() {
    for name in ["peak_ewma", "least_request", "round_robin", "random"] {
        let engine = policy(name).engine(&fleet(10));
        engine.resolve("orders", 2, &told(1), at(0.0)).unwrap();
        let chance = crate::random::Random::new(7);
        let (mut attempts, mut at_told) = (0, 0);
        for n in 0..5000 {
            let answer = |_: &str| if chance.unit() < 0.1 { (Response, 503) } else { (Response, 200) };
            let (tried, ..) = drive(&engine, "GET", n as f64 / 200.0, answer);
            attempts += tried.len();
            at_told += tried.iter().filter(|name| number(name) == 0).count();
        }
        assert!(at_told as f64 <= 0.1 * 1.25 * attempts as f64, "{name}: {at_told} of {attempts} at one of ten");
    }
}

/// Where eight are gone, the ninth is held and answers with errors: it is ejected as if those eight had never been.
#[test]
fn who_is_held_and_sick_is_ejected_beside_many_that_are_gone() {
    let engine = policy("round_robin").engine(&fleet(10));
    engine.resolve("orders", 2, &told(1), at(0.0)).unwrap();
    let answer = |name: &str| match name {
        "e0" => (Response, 200),
        "e9" => (Response, 500),
        _ => (Refused, 0),
    };
    let failed = (0..3000).filter(|n| drive(&engine, "POST", *n as f64 / 100.0, answer).2 == 500).count();
    assert!(failed <= 10, "{failed} of 3000 failed");
}

/// The registry loses its data for a moment, and is right again: an endpoint that fails its calls is as sick as before.
#[test]
fn who_is_sick_stays_out_over_a_blip_of_the_registry() {
    let engine = policy("round_robin").engine(&fleet(10));
    let answer = |name: &str| if name == "e9" { (Response, 500) } else { (Response, 200) };
    let run =
        |from: f64| (0..500).filter(|n| drive(&engine, "POST", from + *n as f64 / 100.0, answer).2 == 500).count();
    run(0.0);
    for blip in 0..5 {
        let now = 5.0 + 5.0 * blip as f64;
        engine.resolve("orders", 2 + 2 * blip, &told(3), at(now)).unwrap();
        engine.resolve("orders", 3 + 2 * blip, &fleet(10), at(now + 0.1)).unwrap();
        let failed = run(now + 0.1);
        assert!(failed <= 2, "after blip {blip}: {failed}");
    }
}
