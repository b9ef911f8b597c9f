//! Two attempts at a time, and endpoints nearby: virtual time, as in `tests.rs`.
use super::*;
use crate::model::Outcome::Timeout;

fn hedged<'a>(method: &'a str) -> Request<'a> {
    Request { hedge: Some(at(0.05)), ..request(method, "/") }
}

fn begin_as(engine: &Engine, request: &Request<'_>, now: f64) -> Call {
    engine.begin(request, &Vec::new(), at(now)).unwrap()
}

/// A call whose hedge was sent 50 ms after its first attempt at 1.0. Returns both tokens and addresses.
fn racing(engine: &Engine, request: &Request<'_>) -> (Call, (u32, String), (u32, String)) {
    let mut call = begin_as(engine, request, 1.0);
    let first = send(&mut call, 1.0);
    assert_eq!(call.hedge(true, false, at(1.05)), Some(at(0.0)));
    let second = send(&mut call, 1.05);
    (call, first, second)
}

fn row(engine: &Engine, endpoint: &str, now: f64) -> EndpointReading {
    engine.read(at(now)).into_iter().find(|row| row.endpoint == endpoint).unwrap()
}

fn story(call: &Call) -> Vec<&'static str> {
    call.record(at(2.0)).events.iter().map(|event| event.what).collect()
}

fn why(call: &Call) -> &'static str {
    call.record(at(2.0)).events.iter().find(|event| event.what == "not hedged").unwrap().word
}

#[test]
fn the_hedge_is_due_when_the_attempt_has_waited_and_goes_elsewhere() {
    let engine = engine();
    let mut call = begin_as(&engine, &hedged("GET"), 1.0);
    let (_, first) = send(&mut call, 1.0);
    assert_eq!(call.hedge(true, false, at(1.0)), Some(at(0.05)));
    assert_eq!(call.hedge(true, false, at(1.02)), Some(at(1.05) - at(1.02)));
    assert_eq!(call.attempts(), 0);
    assert_eq!(call.hedge(true, false, at(1.05)), Some(at(0.0)));
    // The number that travels, so that whoever is asked doesn't retry as well.
    assert_eq!(call.attempts(), 1);
    assert_ne!(send(&mut call, 1.05).1, first);
    assert_eq!(call.hedge(true, false, at(9.0)), None, "one a call");
    assert_eq!(call.next(at(1.06)).unwrap(), Next::Await);
}

#[test]
fn the_winner_ends_the_call_and_the_loser_gives_its_permit_back_unblamed() {
    let engine = engine();
    let (mut call, (slow, slow_at), (quick, quick_at)) = racing(&engine, &hedged("GET"));
    assert_eq!((row(&engine, &slow_at, 1.05).in_flight, row(&engine, &quick_at, 1.05).in_flight), (1, 1));
    assert_eq!(call.head(quick, Response, 200, Pushback::Unsaid, at(1.06)).unwrap(), Reply::Deliver);
    assert_eq!((row(&engine, &slow_at, 1.06).in_flight, row(&engine, &quick_at, 1.06).in_flight), (0, 1));
    call.finish(quick, Response, at(1.07)).unwrap();
    assert_eq!(in_flight(&engine), 0);
    let loser = row(&engine, &slow_at, 1.07);
    assert_eq!((loser.breaker, loser.counters.requests, loser.counters.failures), ("closed", 0, 0));
    assert_eq!(story(&call), ["matched", "picked", "hedged", "picked", "response", "given up"]);
    assert!(call.head(slow, Response, 200, Pushback::Unsaid, at(1.08)).is_err(), "it is over");
    // The service's own time is the winner's.
    assert_eq!(engine.read(at(1.1))[0].counters.latency_sum, 0.06);
}

#[test]
fn what_a_loser_took_raises_its_average_and_never_lowers_it() {
    let engine = engine();
    let (mut call, (_, slow), (quick, _)) = racing(&engine, &hedged("GET"));
    call.head(quick, Response, 200, Pushback::Unsaid, at(1.06)).unwrap();
    assert_eq!((row(&engine, &slow, 1.06).ewma * 1e3).round(), 60.0);
    let engine = super::engine();
    let (mut call, (first, _), (_, late)) = racing(&engine, &hedged("GET"));
    let before = row(&engine, &late, 1.06).ewma;
    call.head(first, Response, 200, Pushback::Unsaid, at(1.06)).unwrap();
    assert_eq!(row(&engine, &late, 1.06).ewma, before);
}

#[test]
fn a_failure_beside_another_attempt_waits_for_it_and_costs_nothing() {
    let engine = engine();
    let (mut call, (first, _), (second, _)) = racing(&engine, &hedged("GET"));
    let budget = engine.read(at(1.06))[0].budget;
    assert_eq!(call.head(first, Response, 503, Pushback::Unsaid, at(1.06)).unwrap(), Reply::Await);
    assert_eq!(call.next(at(1.06)).unwrap(), Next::Await);
    assert_eq!(call.head(second, Response, 200, Pushback::Unsaid, at(1.07)).unwrap(), Reply::Deliver);
    assert_eq!(engine.read(at(1.06))[0].budget, budget);
    assert_eq!(story(&call), ["matched", "picked", "hedged", "picked", "response", "awaited", "response"]);
}

#[test]
fn when_both_fail_the_last_is_judged_and_the_retry_is_still_there() {
    let engine = engine();
    let (mut call, (first, a), (second, b)) = racing(&engine, &hedged("GET"));
    assert_eq!(call.head(second, Refused, 0, Pushback::Unsaid, at(1.06)).unwrap(), Reply::Await);
    assert_eq!(call.head(first, Reset, 0, Pushback::Unsaid, at(1.07)).unwrap(), Reply::Retry);
    let Next::Wait(wait) = call.next(at(1.07)).unwrap() else { panic!("no jitter") };
    let (third, c) = send(&mut call, 1.08 + wait.as_secs_f64());
    assert!(c != a && c != b, "{a} {b} {c}");
    assert_eq!((call.attempts(), call.hedge(true, false, at(9.0))), (2, None));
    assert_eq!(call.head(third, Timeout, 0, Pushback::Unsaid, at(1.5)).unwrap(), Reply::Deliver);
    assert_eq!(in_flight(&engine), 0);
}

#[test]
fn without_retries_there_is_still_one_hedge() {
    let engine = engine();
    let (mut call, (first, _), (second, _)) = racing(&engine, &Request { retries: Some(0), ..hedged("GET") });
    // Between head and body of one, the other can still save the call.
    assert!(call.has_attempts_left());
    assert_eq!(call.head(first, Reset, 0, Pushback::Unsaid, at(1.06)).unwrap(), Reply::Await);
    assert!(!call.has_attempts_left());
    assert_eq!(call.head(second, Reset, 0, Pushback::Unsaid, at(1.06)).unwrap(), Reply::Deliver);
    assert_eq!(in_flight(&engine), 0);
}

#[test]
fn what_may_not_be_sent_twice_is_not_hedged_and_says_why() {
    let engine = engine();
    for (request, can_overlap, word) in [
        (hedged("POST"), true, "not idempotent, and both may be processed"),
        (Request { is_replayable: false, ..hedged("GET") }, true, "the body was streamed and can't be sent again"),
        (Request { layer: 1, ..hedged("GET") }, true, "a caller further up is already retrying"),
        (hedged("GET"), false, "a blocking client has one thread"),
        (Request { timeout: Some(at(0.05)), ..hedged("GET") }, true, "the deadline comes before it"),
    ] {
        let mut call = begin_as(&engine, &request, 1.0);
        // Known before anything is sent, so that the driver needn't prepare for it.
        assert_eq!(call.hedge(can_overlap, false, at(1.0)), None);
        assert_eq!(why(&call), word);
        call.abandon(at(1.0));
    }
    let mut call = begin_as(&engine, &Request { is_idempotent: Some(true), ..hedged("POST") }, 1.0);
    assert_eq!(call.hedge(true, false, at(1.0)), Some(at(0.05)));
}

#[test]
fn hedges_draw_on_the_budget_of_retries() {
    let engine = engine();
    let mut sent = 0;
    for _ in 0..1000 {
        let mut call = begin_as(&engine, &hedged("GET"), 1.0);
        send(&mut call, 1.0);
        match call.hedge(true, false, at(1.05)) {
            Some(_) => sent += 1,
            None => assert_eq!(why(&call), "the retry budget is empty"),
        }
    }
    // At call n the budget has earned n / 5 + 100.
    assert_eq!((sent, engine.read(at(1.0))[0].counters.retries), (300, 300));
}

#[test]
fn without_another_endpoint_there_is_no_hedge_and_the_budget_stays() {
    let engine = engine_with("peak_ewma", &[("a", "v1")]);
    let mut call = begin_as(&engine, &hedged("GET"), 1.0);
    let (token, _) = send(&mut call, 1.0);
    let budget = engine.read(at(1.0))[0].budget;
    assert_eq!(call.hedge(true, false, at(1.05)), None);
    assert_eq!((why(&call), engine.read(at(1.0))[0].budget), ("no other endpoint can be asked", budget));
    assert_eq!(call.head(token, Response, 200, Pushback::Unsaid, at(1.1)).unwrap(), Reply::Deliver);
}

#[test]
fn a_hedge_that_comes_too_late_ends_the_call_with_both_permits_back() {
    let engine = engine();
    let mut call = begin_as(&engine, &Request { timeout: Some(at(0.06)), ..hedged("GET") }, 1.0);
    send(&mut call, 1.0);
    assert_eq!(call.hedge(true, false, at(1.055)), Some(at(0.0)));
    // The driver's clock went on between the two.
    assert!(matches!(call.next(at(1.07)), Err(Refusal::DeadlineExceeded(_))));
    assert_eq!(in_flight(&engine), 0);
}

#[test]
fn a_probe_that_is_outrun_waits_again() {
    let engine = engine();
    while !engine.read(at(0.0)).iter().any(|r| r.breaker == "open") {
        drive(&engine, "GET", 0.0, |a| if a == "a" { (Refused, 0) } else { (Response, 200) });
    }
    let mut call = begin_as(&engine, &hedged("GET"), 2.0);
    assert_eq!(send(&mut call, 2.0).1, "a");
    assert_eq!(call.hedge(true, false, at(2.05)), Some(at(0.0)));
    let (second, _) = send(&mut call, 2.05);
    call.head(second, Response, 200, Pushback::Unsaid, at(2.06)).unwrap();
    assert_eq!(row(&engine, "a", 2.06).breaker, "open");
    assert_eq!(row(&engine, "a", 2.06).in_flight, 0);
}

#[test]
fn permits_are_conserved_whatever_overlaps() {
    let engine = engine();
    let random = crate::random::Random::new(7);
    for n in 0..3000 {
        let mut now = f64::from(n) / 5.0;
        let mut call = begin_as(&engine, &Request { timeout: Some(at(0.4)), ..hedged("GET") }, now);
        let mut running: Vec<u32> = Vec::new();
        for _ in 0..20 {
            now += random.unit() / 10.0;
            match random.below(10) {
                0 => break, // dropped in flight
                1..=3 if !running.is_empty() => {
                    let token = running.swap_remove(random.below(running.len()));
                    let (outcome, _) = Outcome::ALL[random.below(Outcome::ALL.len())];
                    if call.head(token, outcome, [200, 404, 503][random.below(3)], Pushback::Unsaid, at(now)).unwrap()
                        == Reply::Deliver
                    {
                        if outcome == Response && random.below(3) > 0 {
                            call.finish(token, Response, at(now)).unwrap();
                        }
                        break;
                    }
                }
                _ if running.is_empty() || call.hedge(true, false, at(now)) == Some(at(0.0)) => {
                    match call.next(at(now)) {
                        Ok(Next::Send { token, .. }) => running.push(token),
                        Ok(_) => {}
                        Err(_) => break,
                    }
                }
                _ => {}
            }
            assert_eq!(in_flight(&engine), running.len() as u32 + 1, "in call {n}");
        }
        drop(call);
        assert_eq!(in_flight(&engine), 0, "after call {n}");
    }
}

// --- zones

fn zoned(policy: &str, endpoints: &[(&str, &str)]) -> Engine {
    let engine = engine_with(policy, &[]);
    let found = endpoints
        .iter()
        .map(|(name, zone)| Address { zone: (*zone).into(), ..address(name, "v1") })
        .collect::<Vec<_>>();
    engine.resolve("orders", 2, &found, at(0.0)).unwrap();
    engine
}

fn near<'a>(zone: &'a str) -> Request<'a> {
    Request { zone: Some(zone), ..request("GET", "/") }
}

#[test]
fn endpoints_of_the_zone_come_first_and_share() {
    for policy in ["peak_ewma", "round_robin"] {
        let engine = zoned(policy, &[("a1", "a"), ("b1", "b"), ("a2", "a"), ("b2", "b"), ("c1", "c")]);
        let mut hits: HashMap<String, u32> = HashMap::new();
        for n in 0..200 {
            let mut call = begin_as(&engine, &near("a"), f64::from(n));
            *hits.entry(send(&mut call, f64::from(n)).1).or_default() += 1;
        }
        assert_eq!(hits.keys().filter(|name| name.starts_with('a')).count(), 2, "{hits:?}");
        assert!(hits.len() == 2 && hits.values().all(|n| *n > 50), "{hits:?}");
    }
}

#[test]
fn when_the_zone_is_tried_or_sick_the_others_take_over() {
    let engine = zoned("peak_ewma", &[("a1", "a"), ("b1", "b"), ("b2", "b")]);
    let mut call = begin_as(&engine, &near("a"), 1.0);
    let (token, first) = send(&mut call, 1.0);
    assert_eq!(first, "a1");
    call.head(token, Refused, 0, Pushback::Unsaid, at(1.0)).unwrap();
    let Next::Wait(wait) = call.next(at(1.0)).unwrap() else { panic!("no jitter") };
    assert_ne!(send(&mut call, 1.01 + wait.as_secs_f64()).1, "a1");
    assert!(story(&call).contains(&"picked in zone") && story(&call).contains(&"picked outside the zone"));
    assert_eq!(row(&engine, "a1", 1.0).breaker, "open");
    for _ in 0..20 {
        assert_ne!(send(&mut begin_as(&engine, &near("a"), 1.1), 1.1).1, "a1");
    }
}

#[test]
fn a_hedge_prefers_the_zone_as_well() {
    let engine = zoned("peak_ewma", &[("a1", "a"), ("b1", "b"), ("a2", "a"), ("b2", "b")]);
    for _ in 0..20 {
        let (_, (_, first), (_, second)) = racing(&engine, &Request { zone: Some("a"), ..hedged("GET") });
        assert!(first != second && first.starts_with('a') && second.starts_with('a'), "{first} {second}");
    }
}

#[test]
fn an_unknown_zone_or_the_only_one_changes_nothing() {
    for (engine, zone) in [(zoned("peak_ewma", &[("a1", "a"), ("b1", "b")]), "nowhere"), (engine(), "")] {
        let mut hits: HashMap<String, u32> = HashMap::new();
        for n in 0..100 {
            let mut call = begin_as(&engine, &near(zone), f64::from(n));
            *hits.entry(send(&mut call, f64::from(n)).1).or_default() += 1;
            assert_eq!(story(&call), ["matched", "picked"]);
        }
        assert!(hits.len() >= 2, "{hits:?}");
    }
}

#[test]
fn in_panic_all_zones_share_the_load() {
    let engine = zoned("round_robin", &[("a1", "a"), ("b1", "b"), ("b2", "b"), ("b3", "b"), ("b4", "b")]);
    for name in ["b1", "b2", "b3", "b4"] {
        while row(&engine, name, 0.0).breaker == "closed"
            && engine.read(at(0.0)).iter().filter(|r| r.breaker == "open").count() < 2
        {
            drive(&engine, "GET", 0.0, |a| if a == name { (Refused, 0) } else { (Response, 200) });
        }
    }
    // Two of five out: no panic yet, and the zone is all there is for its callers.
    assert_eq!(send(&mut begin_as(&engine, &near("a"), 0.1), 0.1).1, "a1");
    // A fleet in which the two are most of what there is.
    let of = |name: &str, zone: &str| Address { zone: zone.into(), ..address(name, "v1") };
    engine.resolve("orders", 3, &vec![of("a1", "a"), of("b1", "b"), of("b2", "b")], at(0.1)).unwrap();
    let hits: std::collections::HashSet<String> =
        (0..9).map(|_| send(&mut begin_as(&engine, &near("a"), 0.1), 0.1).1).collect();
    assert_eq!(hits.len(), 3, "{hits:?}");
}

#[test]
fn zones_survive_a_new_plan() {
    let engine = zoned("peak_ewma", &[("a1", "a"), ("b1", "b")]);
    engine.publish(PLAN.replace("POLICY", "peak_ewma").as_bytes(), at(1.0)).unwrap();
    let mut call = begin_as(&engine, &near("b"), 1.0);
    assert_eq!(send(&mut call, 1.0).1, "b1");
    let record = call.record(at(1.0));
    assert!(record.endpoints.iter().any(|e| (e.address.as_str(), e.zone.as_str()) == ("b1", "b")));
}

#[test]
fn a_subset_has_zones_of_its_own() {
    let engine = engine_with("peak_ewma", &[]);
    let of = |name: &str, version: &str, zone: &str| Address { zone: zone.into(), ..address(name, version) };
    let found = vec![of("a1", "v1", "a"), of("a2", "v2", "a"), of("b1", "v1", "b"), of("b2", "v2", "b")];
    engine.resolve("orders", 2, &found, at(0.0)).unwrap();
    for n in 0..100 {
        let mut call = begin_as(&engine, &Request { path: "/split", ..near("b") }, f64::from(n));
        assert!(send(&mut call, f64::from(n)).1.starts_with('b'));
    }
}
