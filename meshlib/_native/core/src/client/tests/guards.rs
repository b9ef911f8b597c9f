//! A guarded function is a service with one endpoint: what differs is that its breaker may open, and that no URL can reach it.
use serde_json::{json, Value};

use super::stage::*;
use super::*;

/// `guard:*` for all, and `guard:ledger` with a limit of its own.
fn guards() -> Setting {
    let keys = |name: &str, more: &[(&'static str, Value)]| -> Vec<(&'static str, Value)> {
        let route = json!([{
            "name": name, "match": {"path": {"kind": "prefix", "value": "/"}, "methods": [], "headers": []},
            "backends": [{"name": "all", "labels": {}, "weight": 1}],
            "retry": {"attempts": 1, "backoff_base": 0.025, "backoff_max": 0.25, "statuses": [503], "idempotency_key": false, "idempotent": false,
                "on": ["connect", "refused_stream", "reset", "timeout", "protocol", "identity", "status"], "per_try": 0.0, "hedge": null},
            "deadline": 15.0, "stream_idle": 15.0}]);
        let common = [
            ("/routes", route),
            ("/protocol", json!("function")),
            ("/identity", json!("")),
            ("/is_guard", json!(true)),
            ("/admit/breaker/max_ejected", json!(1.0)),
        ];
        common.into_iter().chain(more.iter().cloned()).collect()
    };
    setting()
        .and("guard:*", &keys("guard:*", &[]))
        .and("guard:ledger", &keys("guard:ledger", &[("/admit/in_flight", json!(1))]))
}

fn function(is_idempotent: bool) -> Request<'static> {
    Request { authority: "", is_idempotent: Some(is_idempotent), ..request("CALL", "/") }
}

fn ask(engine: &Engine, name: &str, now: f64) -> Result<(Call, u32), Refusal> {
    let (call, next) = engine.guard(name, &function(false), at(now))?;
    let Next::Send { token, .. } = next else { panic!("{next:?}") };
    Ok((call, token))
}

/// One guarded call that ends like this at once.
fn run(engine: &Engine, name: &str, is_good: bool, now: f64) -> Result<(), Refusal> {
    let (mut call, token) = ask(engine, name, now)?;
    assert_eq!(
        call.head(token, Response, if is_good { 200 } else { 503 }, Pushback::Unsaid, at(now)).unwrap(),
        Reply::Deliver
    );
    call.finish(token, Response, at(now)).unwrap();
    Ok(())
}

fn engine_of_guards() -> Engine {
    guards().engine(&fleet(1))
}

fn opened(name: &str) -> Engine {
    let engine = engine_of_guards();
    (0..5).for_each(|_| run(&engine, name, false, 1.0).unwrap());
    engine
}

/// Five failures in a row open it: nothing is called any more, although there is no other to ask.
#[test]
fn an_open_breaker_refuses_the_function() {
    for name in ["guard:ledger", "guard:mail"] {
        let engine = opened(name);
        for n in 0..20 {
            assert!(
                matches!(run(&engine, name, true, 1.0 + f64::from(n) / 100.0), Err(Refusal::CircuitOpen(_))),
                "{name}"
            );
        }
        assert_eq!(in_flight(&engine), 0);
    }
}

/// After the wait one call goes as a probe; the others are refused as long as it is under way. What it finds decides.
#[test]
fn one_probe_closes_or_opens_it() {
    let engine = opened("guard:mail");
    let (mut probe, token) = ask(&engine, "guard:mail", 4.0).unwrap();
    assert!((0..5).all(|_| matches!(run(&engine, "guard:mail", true, 4.0), Err(Refusal::CircuitOpen(_)))));
    probe.head(token, Response, 503, Pushback::Unsaid, at(4.1)).unwrap();
    probe.finish(token, Response, at(4.1)).unwrap();
    // Twice the wait now, and twice that for what must not be done twice.
    assert!(matches!(run(&engine, "guard:mail", true, 5.0), Err(Refusal::CircuitOpen(_))));
    run(&engine, "guard:mail", true, 20.0).unwrap();
    assert!((0..50).all(|_| run(&engine, "guard:mail", true, 20.0).is_ok()));
}

/// Guards know nothing of one another: the breaker of one doesn't refuse another.
#[test]
fn each_guard_has_its_own_breaker() {
    let engine = opened("guard:mail");
    assert!(run(&engine, "guard:sms", true, 1.0).is_ok() && run(&engine, "guard:ledger", true, 1.0).is_ok());
}

/// One that the file doesn't name goes by the plan of all, and keeps its state when a new plan comes, named or not.
#[test]
fn an_unknown_guard_takes_the_plan_of_all_and_survives_a_new_one() {
    let engine = opened("guard:mail");
    let is_open = |engine: &Engine| matches!(run(engine, "guard:mail", true, 1.1), Err(Refusal::CircuitOpen(_)));
    assert!(is_open(&engine));
    engine.publish(&guards().text(), at(1.0)).unwrap();
    assert!(is_open(&engine), "after a plan that doesn't name it");
    let named = String::from_utf8(guards().text()).unwrap().replace("guard:ledger", "guard:mail");
    engine.publish(named.as_bytes(), at(1.0)).unwrap();
    assert!(is_open(&engine), "after a plan that names it");
    engine.publish(&guards().text(), at(1.0)).unwrap();
    assert!(is_open(&engine), "after a plan that names it no more");
}

/// Its own plan holds, not that of all: the ledger takes one at a time.
#[test]
fn a_named_guard_goes_by_its_own_plan() {
    let engine = engine_of_guards();
    let held = ask(&engine, "guard:ledger", 1.0).unwrap();
    assert!(matches!(ask(&engine, "guard:ledger", 1.0), Err(Refusal::LimitExceeded(_))));
    let others: Vec<_> = (0..20).map(|_| ask(&engine, "guard:mail", 1.0).unwrap()).collect();
    drop((held, others));
    assert_eq!(in_flight(&engine), 0);
}

/// Retries are for what may be done twice.
#[test]
fn only_an_idempotent_function_is_repeated() {
    let engine = engine_of_guards();
    for (is_idempotent, expected) in [(true, Reply::Retry), (false, Reply::Deliver)] {
        let (mut call, next) = engine.guard("guard:mail", &function(is_idempotent), at(1.0)).unwrap();
        let Next::Send { token, .. } = next else { panic!("{next:?}") };
        assert_eq!(call.head(token, Response, 503, Pushback::Unsaid, at(1.0)).unwrap(), expected);
    }
}

/// No URL names a guard, whatever its host and port look like, and no service is taken for a guard.
#[test]
fn no_host_reaches_a_guard() {
    let engine = engine_of_guards();
    run(&engine, "guard:mail", true, 1.0).unwrap();
    for authority in
        ["guard:mail", "guard:ledger", "guard:*", "guard", "GUARD:mail", "guard:80", "mail", "ledger", "guard:mail:80"]
    {
        let refused = engine.begin(&Request { authority, ..request("GET", "/") }, &Vec::new(), at(1.0));
        assert!(matches!(refused, Err(Refusal::UnknownService(_))), "{authority}");
    }
    for name in ["orders", "mail", ""] {
        assert!(matches!(engine.guard(name, &function(false), at(1.0)), Err(Refusal::UnknownService(_))), "{name}");
    }
}

/// The plan of all is no guard itself, and it is not listed among the services that there are.
#[test]
fn guards_are_not_shown_as_services() {
    let engine = engine_of_guards();
    let Err(Refusal::UnknownService(text)) =
        engine.begin(&Request { authority: "x", ..request("GET", "/") }, &Vec::new(), at(0.0))
    else {
        panic!("x is known")
    };
    assert!(!text.contains("guard"), "{text}");
}
