//! Is the endpoint fit? The word of active checks against that of calls, and answers that are slow but correct.
use serde_json::json;

use super::stage::*;
use super::*;

fn breaker(engine: &Engine, name: &str) -> &'static str {
    row(engine, name, 0.0).breaker
}

fn out_of(engine: &Engine) -> usize {
    let call = begin(engine, "GET", "/", 5000.0);
    call.record(at(5000.0)).out
}

/// It gets nothing, not even a probe, however long that lasts; and everything from the moment on at which a check passes.
#[test]
fn a_failing_check_takes_out_until_one_passes() {
    let engine = policy("round_robin").engine(&fleet(3));
    assert!(engine.check("orders", "e0", false, at(0.0)));
    assert_eq!((breaker(&engine, "e0"), out_of(&engine)), ("failing", 1));
    for n in 0..300 {
        assert_ne!(drive(&engine, "GET", f64::from(n) * 10.0, |_| (Response, 200)).0, ["e0"]);
    }
    engine.check("orders", "e0", true, at(3000.0));
    assert_eq!((breaker(&engine, "e0"), out_of(&engine)), ("closed", 0));
    assert!(spread(&engine, &request("GET", "/"), 6, 3000.0).contains_key("e0"));
}

/// Nobody knows the endpoint or the service: said, not ignored.
#[test]
fn a_check_of_nobody_is_told() {
    let engine = setting().engine(&fleet(1));
    assert!(!engine.check("orders", "e9", false, at(0.0)));
    assert!(!engine.check("nobody", "e0", false, at(0.0)));
}

/// No cap holds for checks: where all fail, all are used.
#[test]
fn where_all_checks_fail_balance_panics() {
    let engine = policy("random").engine(&fleet(4));
    for n in 0..4 {
        engine.check("orders", &format!("e{n}"), false, at(1.0));
    }
    let mut call = begin(&engine, "GET", "/", 1.0);
    send(&mut call, 1.0);
    assert_eq!(words(&call), ["matched", "picked in panic"]);
    assert_eq!(spread(&engine, &request("GET", "/"), 400, 1.0).len(), 4);
    assert!(engine.read(at(1.0))[0].panics >= 400);
}

/// A check that passes ends an ejection before its wait is over; one that passes while calls fail forgives nothing.
#[test]
fn a_passing_check_ends_an_ejection_early() {
    let engine = policy("round_robin").engine(&fleet(3));
    let answer = |name: &str| if name == "e0" { (Response, 500) } else { (Response, 200) };
    let mut failures = 0;
    while breaker(&engine, "e0") == "closed" {
        engine.check("orders", "e0", true, at(0.0));
        failures += usize::from(drive(&engine, "POST", 0.0, answer).0 == ["e0"]);
    }
    assert_eq!(failures, 5);
    engine.check("orders", "e0", true, at(0.1));
    assert_eq!(breaker(&engine, "e0"), "closed");
}

/// What began before the check failed says nothing against the check, neither a probe nor a plain call.
#[test]
fn calls_do_not_overrule_a_failing_check() {
    let engine = policy("round_robin").engine(&fleet(3));
    while breaker(&engine, "e0") == "closed" {
        drive(&engine, "GET", 0.0, |name| if name == "e0" { (Refused, 0) } else { (Response, 200) });
    }
    let mut call = begin(&engine, "GET", "/", 5.0);
    let (token, name) = send(&mut call, 5.0);
    assert_eq!((name.as_str(), breaker(&engine, "e0")), ("e0", "half_open"));
    engine.check("orders", "e0", false, at(5.0));
    call.head(token, Response, 200, Pushback::Unsaid, at(5.1)).unwrap();
    assert_eq!(breaker(&engine, "e0"), "failing");
}

/// A person's word stands above the checks', in both directions.
#[test]
fn who_is_isolated_stays_so_whatever_checks_say() {
    let engine = policy("round_robin").engine(&fleet(2));
    engine.isolate("orders", "e0", true, at(0.0));
    engine.check("orders", "e0", true, at(0.0));
    assert_eq!(breaker(&engine, "e0"), "isolated");
    engine.check("orders", "e0", false, at(0.0));
    engine.isolate("orders", "e0", false, at(0.0));
    assert_eq!(breaker(&engine, "e0"), "failing");
}

/// A failing endpoint stays so through a new plan and a new fleet.
#[test]
fn a_failing_check_survives_a_swap() {
    let engine = setting().engine(&fleet(3));
    engine.check("orders", "e1", false, at(0.0));
    engine.publish(&policy("random").text(), at(1.0)).unwrap();
    engine.resolve("orders", 2, &fleet(4), at(1.0)).unwrap();
    assert_eq!((breaker(&engine, "e1"), out_of(&engine)), ("failing", 1));
}

// --- slow calls

/// A call of `e0` takes so long, of others a millisecond; each answers 200.
fn call_for(engine: &Engine, now: f64, slow: f64) -> String {
    let mut call = begin(engine, "GET", "/", now);
    let (token, name) = send(&mut call, now);
    let end = now + if name == "e0" { slow } else { 0.001 };
    call.head(token, Response, 200, Pushback::Unsaid, at(end)).unwrap();
    call.finish(token, Response, at(end)).unwrap();
    name
}

fn with_slow(seconds: f64) -> Engine {
    policy("round_robin").with("/admit/breaker/slow", json!(seconds)).engine(&fleet(3))
}

/// Half of the calls in the window, five at least, and every one of them correct.
#[test]
fn slow_answers_open_the_breaker() {
    let engine = with_slow(0.2);
    let opened = (0..30).find(|n| {
        call_for(&engine, f64::from(*n) / 100.0, 0.2);
        breaker(&engine, "e0") == "open"
    });
    // Five of its turns among three endpoints.
    assert!(opened.is_some_and(|n| (12..15).contains(&n)), "{opened:?}");
    for (engine, slow) in [(with_slow(0.2), 0.19), (with_slow(0.0), 14.0)] {
        (0..90).for_each(|n| _ = call_for(&engine, f64::from(n) / 100.0, slow));
        assert_eq!(breaker(&engine, "e0"), "closed", "{slow}");
    }
}

/// A slow probe is no proof of health: it waits again, longer; a quick one brings it back.
#[test]
fn a_slow_probe_does_not_close() {
    let engine = with_slow(0.2);
    let mut now = 0.0;
    while breaker(&engine, "e0") == "closed" {
        call_for(&engine, now, 0.5);
        now += 0.01;
    }
    assert_eq!(call_for(&engine, 10.0, 0.5), "e0");
    assert_eq!(breaker(&engine, "e0"), "open");
    assert_ne!(call_for(&engine, 10.6, 0.5), "e0");
    assert_eq!(call_for(&engine, 20.0, 0.01), "e0");
    assert_eq!(breaker(&engine, "e0"), "closed");
}
