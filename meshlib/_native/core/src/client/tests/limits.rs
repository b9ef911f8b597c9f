//! May it go, and may it go again? Permits and who waits for them, rates, throttle, learnt limits; conditions of retries, and hedges.
use serde_json::{json, Value};

use super::stage::*;
use super::*;
use crate::model::Outcome::{Identity, Protocol, Timeout, Unwritten};

fn get() -> Request<'static> {
    request("GET", "/")
}

fn try_begin(engine: &Engine, request: &Request<'_>, headers: &Lines, now: f64) -> Result<Call, Refusal> {
    engine.begin(request, headers, at(now))
}

fn answer(call: &mut Call, token: u32, status: u16, now: f64) -> Reply {
    call.head(token, Response, status, Pushback::Unsaid, at(now)).unwrap()
}

// --- permits

fn narrow() -> Engine {
    setting().with("/admit/in_flight", json!(1)).with("/admit/pending", json!(2)).engine(&fleet(2))
}

/// Those who may wait do, and go when a permit is free; the next is refused at once.
#[test]
fn calls_wait_for_a_permit_and_are_promoted() {
    let engine = narrow();
    let mut first = begin(&engine, "GET", "/", 0.0);
    let (token, _) = send(&mut first, 0.0);
    let mut waiting: Vec<Call> = (0..2).map(|_| begin(&engine, "GET", "/", 0.0)).collect();
    assert!(matches!(try_begin(&engine, &get(), &Vec::new(), 0.0), Err(Refusal::LimitExceeded(_))));
    assert!(waiting.iter_mut().all(|call| matches!(call.next(at(0.0)), Ok(Next::Wait(wait)) if wait > Duration::ZERO)));
    let service = |engine: &Engine| (engine.read(at(0.0))[0].in_flight, engine.read(at(0.0))[0].pending);
    assert_eq!(service(&engine), (1, 2));
    assert_eq!(answer(&mut first, token, 200, 0.1), Reply::Deliver);
    first.finish(token, Response, at(0.1)).unwrap();
    // The free permit belongs to who waits, not to who comes.
    assert!(matches!(try_begin(&engine, &get(), &Vec::new(), 0.1), Err(Refusal::LimitExceeded(_))));
    send(&mut waiting[0], 0.1);
    assert!(matches!(waiting[1].next(at(0.1)), Ok(Next::Wait(_))));
    assert_eq!(service(&engine), (1, 1));
    drop(waiting);
    assert_eq!(service(&engine), (0, 0));
}

/// The deadline runs while a call waits, and who gives up leaves the queue.
#[test]
fn a_call_that_waits_ends_with_its_deadline() {
    let engine = narrow();
    let mut first = begin(&engine, "GET", "/", 0.0);
    send(&mut first, 0.0);
    let mut late = try_begin(&engine, &Request { timeout: Some(at(0.5)), ..get() }, &Vec::new(), 0.0).unwrap();
    assert!(matches!(late.next(at(0.499)), Ok(Next::Wait(wait)) if wait <= at(0.001)));
    assert!(matches!(late.next(at(0.5)), Err(Refusal::DeadlineExceeded(_))));
    assert_eq!(engine.read(at(0.5))[0].pending, 0);
    let mut gone = begin(&engine, "GET", "/", 0.5);
    assert!(matches!(gone.next(at(0.5)), Ok(Next::Wait(_))));
    gone.abandon(at(0.6));
    assert_eq!((engine.read(at(0.6))[0].in_flight, engine.read(at(0.6))[0].pending), (1, 0));
}

// --- rates

fn rate(name: &str, calls: f64, by: Value) -> Value {
    json!({"name": name, "calls": calls, "per": 1.0, "burst": calls, "by": by, "is_standby": false})
}

fn part(kind: &str, name: &str) -> Value {
    json!([{"kind": kind, "name": name}])
}

/// How many of ten calls at one moment get through.
fn let_in(engine: &Engine, request: &Request<'_>, headers: &Lines, now: f64) -> usize {
    (0..10).filter(|_| try_begin(engine, request, headers, now).is_ok()).count()
}

/// Each value of the key has its own rate: of the service one, of routes, headers and peers one each.
#[test]
fn a_rate_holds_for_each_value_of_its_key() {
    for (kind, other_counts) in [("service", 0), ("route", 3), ("header", 3), ("peer", 3)] {
        let engine = setting().with("/admit/rate", json!([rate("r", 3.0, part(kind, "x-tenant"))])).engine(&fleet(2));
        let of = |tenant: &'static str, path: &'static str| {
            (Request { peer: Some(tenant), ..request("GET", path) }, header("x-tenant", tenant))
        };
        let (one, its_lines) = of("t1", "/");
        assert_eq!(let_in(&engine, &one, &its_lines, 1.0), 3, "{kind}");
        let (other, other_lines) = of("t2", "/split");
        assert_eq!(let_in(&engine, &other, &other_lines, 1.0), other_counts, "{kind}");
        assert_eq!(let_in(&engine, &one, &its_lines, 1.0), 0, "{kind}");
        assert_eq!(let_in(&engine, &one, &its_lines, 1.34), 1, "{kind}: one comes free every third of a second");
        assert_eq!(let_in(&engine, &one, &its_lines, 60.0), 3, "{kind}: no more than the burst");
    }
}

/// A refusal says when to come again, to the moment.
#[test]
fn a_refusal_by_rate_says_when_the_next_may_go() {
    let engine = setting().with("/admit/rate", json!([rate("r", 4.0, part("service", ""))])).engine(&fleet(1));
    let_in(&engine, &get(), &Vec::new(), 10.0);
    let Err(Refusal::RateLimited(text, wait)) = try_begin(&engine, &get(), &Vec::new(), 10.1) else {
        panic!("not limited")
    };
    assert!(text.contains("\"r\"") && (wait.as_secs_f64() - 0.15).abs() < 1e-6, "{text} {wait:?}");
    assert!(try_begin(&engine, &get(), &Vec::new(), 10.1 + wait.as_secs_f64() - 0.001).is_err());
    assert!(try_begin(&engine, &get(), &Vec::new(), 10.1 + wait.as_secs_f64()).is_ok());
    assert_eq!(engine.read(at(11.0))[0].rate_limited, 8);
}

/// A call that one of several limits refuses takes nothing from the others, and no permit.
#[test]
fn limits_are_taken_all_or_not_at_all() {
    let rates = json!([rate("all", 10.0, part("service", "")), rate("tenant", 2.0, part("header", "x-tenant"))]);
    let engine = setting().with("/admit/rate", rates).engine(&fleet(1));
    let all: Vec<usize> = (0..7).map(|n| let_in(&engine, &get(), &header("x-tenant", &format!("t{n}")), 1.0)).collect();
    assert_eq!(all, [2, 2, 2, 2, 2, 0, 0]);
    assert_eq!(in_flight(&engine), 0);
}

/// A stand-in for a global limit counts only calls that were begun while the store was away.
#[test]
fn a_stand_in_holds_only_while_it_stands_in() {
    let mut stand_in = rate("r", 2.0, part("service", ""));
    stand_in["is_standby"] = json!(true);
    let engine = setting().with("/admit/rate", json!([stand_in])).engine(&fleet(1));
    assert_eq!(let_in(&engine, &get(), &Vec::new(), 1.0), 10);
    assert_eq!(let_in(&engine, &Request { is_standby: true, ..get() }, &Vec::new(), 1.0), 2);
}

/// A limit that is used up stays so through a new plan; a plan with another number holds at once.
#[test]
fn a_used_up_rate_survives_a_new_plan() {
    let setting = setting().with("/admit/rate", json!([rate("r", 3.0, part("service", ""))]));
    let engine = setting.engine(&fleet(1));
    assert_eq!(let_in(&engine, &get(), &Vec::new(), 1.0), 3);
    let other = setting
        .clone()
        .with("/admit/rate", json!([rate("new", 9.0, part("route", "")), rate("r", 3.0, part("service", ""))]));
    engine.publish(&other.text(), at(1.0)).unwrap();
    assert_eq!(let_in(&engine, &get(), &Vec::new(), 1.0), 0);
}

// --- throttle

/// Whoever refuses nearly everything gets about `ratio` times what it accepts, and everything again once it accepts.
#[test]
fn a_service_that_refuses_is_asked_less() {
    let engine = setting()
        .with("/admit/throttle", json!({"ratio": 2.0, "window": 30.0}))
        .with("/routes/1/retry/attempts", json!(0))
        .with("/admit/breaker/success_rate", json!(0.0))
        .with("/admit/breaker/failures", json!(1_000_000))
        .engine(&fleet(3));
    let run = |from: u32, to: u32, accepts: &dyn Fn(u32) -> bool| {
        let (mut sent, mut accepted) = (0, 0);
        for n in from * 100..to * 100 {
            let now = f64::from(n) / 100.0;
            let Ok(mut call) = try_begin(&engine, &get(), &Vec::new(), now) else { continue };
            let (token, _) = send(&mut call, now);
            sent += 1;
            let status = if accepts(sent) { 200 } else { 503 };
            accepted += u32::from(status == 200);
            answer(&mut call, token, status, now);
            call.finish(token, Response, at(now)).unwrap();
        }
        (sent, accepted)
    };
    assert_eq!(run(0, 30, &|_| true), (3000, 3000), "nobody is refused who is served");
    run(30, 60, &|_| false);
    let (sent, _) = run(60, 90, &|_| false);
    assert!((30..300).contains(&sent), "{sent} of 3000: one a second must still ask");
    assert!(engine.read(at(90.0))[0].throttled > 2000);
    // Twice what was accepted in half a minute: from one a second to all of a hundred takes two minutes.
    run(90, 220, &|_| true);
    assert_eq!(run(220, 230, &|_| true).0, 1000);
}

// --- learnt limits

fn load(engine: &Engine, rounds: u32, from: f64, took: f64) -> u32 {
    for n in 0..rounds {
        let now = from + f64::from(n) * (took + 0.01);
        let mut calls: Vec<(Call, u32)> = Vec::new();
        while let Ok(mut call) = try_begin(engine, &get(), &Vec::new(), now) {
            let (token, _) = send(&mut call, now);
            calls.push((call, token));
        }
        for (call, token) in &mut calls {
            answer(call, *token, 200, now + took);
            call.finish(*token, Response, at(now + took)).unwrap();
        }
    }
    engine.read(at(from))[0].limit
}

/// From 20 up while calls stay quick, down when they queue, and never below four.
#[test]
fn the_learnt_limit_grows_shrinks_and_stops_at_its_least() {
    let adaptive = json!({"initial": 20, "least": 4, "most": 60});
    let engine = setting().with("/admit/adaptive", adaptive).engine(&fleet(3));
    assert_eq!(engine.read(at(0.0))[0].limit, 20);
    assert_eq!(load(&engine, 40, 0.0, 0.01), 60, "the most");
    let shrunk = load(&engine, 2, 100.0, 0.2);
    assert!((4..30).contains(&shrunk), "{shrunk}");
    for n in 0..200 {
        let now = 200.0 + f64::from(n);
        let mut call = begin(&engine, "POST", "/", now);
        let (token, _) = send(&mut call, now);
        answer(&mut call, token, 503, now + 0.01);
        call.finish(token, Response, at(now + 0.01)).unwrap();
    }
    assert_eq!(engine.read(at(900.0))[0].limit, 4);
    let held: Vec<Call> = (0..4).map(|_| begin(&engine, "GET", "/", 900.0)).collect();
    assert!(matches!(try_begin(&engine, &get(), &Vec::new(), 900.0), Err(Refusal::LimitExceeded(_))));
    drop(held);
}

// --- retries

/// Each failure is repeated only where the route lists it; what was sent over a dead connection goes once more in any case.
#[test]
fn a_route_says_after_which_failures_it_retries() {
    let conditions = [
        ("connect", Refused, 0),
        ("refused_stream", Unwritten, 0),
        ("reset", Reset, 0),
        ("timeout", Timeout, 0),
        ("protocol", Protocol, 0),
        ("identity", Identity, 0),
        ("status", Response, 503),
    ];
    for (listed, _, _) in conditions {
        let engine = setting().with("/routes/1/retry/on", json!([listed])).engine(&fleet(3));
        for (n, (name, outcome, status)) in conditions.iter().enumerate() {
            let now = 100.0 * n as f64;
            let mut call = begin(&engine, "GET", "/", now);
            let (token, _) = send(&mut call, now);
            let mut reply = call.head(token, *outcome, *status, Pushback::Unsaid, at(now)).unwrap();
            if *outcome == Unwritten {
                assert_eq!(reply, Reply::Retry);
                let (token, _) = send(&mut call, now);
                reply = call.head(token, Unwritten, 0, Pushback::Unsaid, at(now)).unwrap();
            }
            let expected = if *name == listed { Reply::Retry } else { Reply::Deliver };
            assert_eq!(reply, expected, "{name} where {listed} is listed");
        }
    }
}

/// Never means never, also where everything else would allow it; a time is kept to.
#[test]
fn the_endpoints_own_word_on_retries_counts() {
    let engine = setting().engine(&fleet(3));
    for (pushback, expected) in [
        (Pushback::Never, Reply::Deliver),
        (Pushback::After(at(2.0)), Reply::Retry),
        (Pushback::After(at(20.0)), Reply::Deliver),
    ] {
        let mut call = begin(&engine, "GET", "/", 1.0);
        let (token, _) = send(&mut call, 1.0);
        assert_eq!(call.head(token, Response, 503, pushback, at(1.0)).unwrap(), expected, "{pushback:?}");
        if let Pushback::After(asked) = pushback {
            let next = (expected == Reply::Retry).then(|| call.next(at(1.0)).unwrap());
            assert!(next.is_none_or(|next| next == Next::Wait(asked)));
        }
    }
}

/// stop() ends all retries and the hedge of a call.
#[test]
fn a_stopped_call_is_not_repeated() {
    let engine = setting().with("/routes/1/retry/attempts", json!(5)).engine(&fleet(3));
    let mut call = try_begin(&engine, &Request { hedge: Some(at(0.01)), ..get() }, &Vec::new(), 1.0).unwrap();
    let (token, _) = send(&mut call, 1.0);
    assert!(call.has_attempts_left());
    call.stop();
    assert!(!call.has_attempts_left());
    assert_eq!(call.extras() & extra::HEDGE, 0);
    assert_eq!(answer(&mut call, token, 503, 1.1), Reply::Deliver);
}

/// wait() replaces the backoff of the retry that is due, and nothing else.
#[test]
fn the_applications_own_wait_replaces_the_backoff() {
    let engine = setting().engine(&fleet(3));
    let mut call = begin(&engine, "GET", "/", 1.0);
    call.wait(at(3.0), at(1.0));
    let (token, _) = send(&mut call, 1.0);
    assert_eq!(answer(&mut call, token, 503, 1.0), Reply::Retry);
    call.wait(at(3.0), at(1.0));
    assert_eq!(call.next(at(1.5)).unwrap(), Next::Wait(at(2.5)));
    send(&mut call, 4.0);
}

/// Full jitter: anywhere between nothing and the doubled base, up to the cap.
#[test]
fn the_backoff_is_jittered_between_nothing_and_its_cap() {
    let engine = setting()
        .with("/routes/1/retry/attempts", json!(6))
        .with("/budget/per_second", json!(1000.0))
        .engine(&fleet(9));
    let mut waits = [0.0f64; 6];
    for n in 0..200 {
        let mut now = 100.0 * f64::from(n);
        let mut call = try_begin(&engine, &Request { timeout: Some(at(60.0)), ..get() }, &Vec::new(), now).unwrap();
        for most in &mut waits {
            let (token, _) = send(&mut call, now);
            assert_eq!(answer(&mut call, token, 503, now), Reply::Retry);
            if let Next::Wait(wait) = call.next(at(now)).unwrap() {
                *most = most.max(wait.as_secs_f64());
                now += wait.as_secs_f64() + 1e-9;
            }
        }
    }
    for (n, most) in waits.iter().enumerate() {
        let cap = (0.025 * 2f64.powi(n as i32)).min(0.25);
        assert!(*most <= cap && *most > cap * 0.8, "retry {n}: {waits:?}");
    }
}

/// The route's time for one attempt is told to the driver, and is none by default.
#[test]
fn an_attempt_has_the_time_of_its_route() {
    for (seconds, expected) in [(0.0, None), (0.2, Some(at(0.2)))] {
        let engine = setting().with("/routes/1/retry/per_try", json!(seconds)).engine(&fleet(1));
        let call = begin(&engine, "GET", "/", 1.0);
        assert_eq!((call.per_try(), call.extras() & extra::PER_TRY != 0), (expected, expected.is_some()));
    }
}

// --- hedges by what is learnt

fn hedging() -> Engine {
    let hedge = json!({"quantile": 0.95, "share": 0.02, "least": 0.001});
    policy("random").with("/routes/1/retry/hedge", hedge).engine(&fleet(4))
}

/// One call that takes so long; whether it was hedged, and after how long that was due.
fn hedged_call(engine: &Engine, now: f64, took: f64) -> (bool, Option<f64>) {
    let mut call = begin(engine, "GET", "/", now);
    let (first, _) = send(&mut call, now);
    let due = call.hedge(true, false, at(now)).map(|due| due.as_secs_f64());
    let mut is_hedged = false;
    if due.is_some_and(|due| due < took) {
        is_hedged = call.hedge(true, false, at(now + due.unwrap() + 1e-6)) == Some(Duration::ZERO);
    }
    if is_hedged {
        send(&mut call, now + due.unwrap() + 1e-6);
    }
    answer(&mut call, first, 200, now + took);
    call.finish(first, Response, at(now + took)).unwrap();
    (is_hedged, due)
}

/// Nothing is slow before a hundred calls are known; then what 95 of 100 stay below is (to the width of a bucket, 16 %).
#[test]
fn what_is_slow_is_learnt_from_the_service() {
    let engine = hedging();
    let took = |n: u32| if n % 10 == 9 { 0.5 } else { 0.02 };
    for n in 0..99 {
        assert_eq!(hedged_call(&engine, 1.0 + f64::from(n) / 100.0, took(n)).1, None, "call {n}");
    }
    hedged_call(&engine, 2.0, 0.5);
    let (_, due) = hedged_call(&engine, 2.1, 0.02);
    assert!(due.is_some_and(|due| (due / 0.5 - 1.0).abs() < 0.16), "{due:?}");
}

/// However many are slow, hedges stay at 2 % of the calls of ten seconds, and one.
#[test]
fn hedges_add_two_percent_and_no_more() {
    let engine = hedging();
    (0..200).for_each(|n| _ = hedged_call(&engine, f64::from(n) / 200.0, 0.01));
    let before = engine.read(at(1.0))[0].hedges;
    let random = crate::random::Random::new(3);
    for window in 1..6 {
        let from = 20.0 * f64::from(window);
        let hedged = (0..2000).filter(|n| {
            let took = if random.below(10) == 0 { 1.0 } else { 0.01 };
            // Sooner or later each tenth call is what is usual, so what is slow is told once more.
            hedged_call(&engine, from + f64::from(*n) / 400.0, took).0
        });
        let hedged = hedged.count();
        assert!(hedged <= 41, "{hedged} of 2000");
    }
    let all = engine.read(at(200.0))[0].hedges - before;
    assert!(all > 0 && all <= 205, "{all}");
}
