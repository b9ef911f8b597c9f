//! What went wrong once: a minimal story for each mistake that the walks of `invariants.rs` have found.
use super::stage::*;
use super::*;
use serde_json::json;

/// Whoever pins an older plan tells the newest fleet what it learns.
#[test]
fn an_ejection_by_a_call_from_before_a_publish_is_counted() {
    let setting = policy("round_robin");
    let engine = setting.engine(&fleet(4));
    let mut call = begin(&engine, "POST", "/", 0.0);
    let (token, _) = send(&mut call, 0.0);
    engine.publish(&setting.text(), at(0.0)).unwrap();
    call.head(token, Refused, 0, Pushback::Unsaid, at(0.1)).unwrap();
    assert_eq!(begin(&engine, "GET", "/", 0.1).record(at(0.1)).out, 1);
}

/// Also where a snapshot has moved the places: what is out is probed.
#[test]
fn an_endpoint_ejected_by_a_call_from_before_a_publish_is_probed() {
    let setting = policy("round_robin");
    let engine = setting.engine(&fleet(4));
    let mut call = begin(&engine, "POST", "/", 0.0);
    let (token, name) = send(&mut call, 0.0);
    engine.publish(&setting.text(), at(0.0)).unwrap();
    let turned: Vec<Address> = fleet(4).into_iter().rev().collect();
    engine.resolve("orders", 2, &turned, at(0.0)).unwrap();
    call.head(token, Refused, 0, Pushback::Unsaid, at(0.1)).unwrap();
    let used = (0..1000).any(|n| answered(&engine, &request("GET", "/"), &Vec::new(), 10.0 + f64::from(n)) == name);
    assert!(used, "{name} is {} and got no call in 1000 s", row(&engine, &name, 1010.0).breaker);
}

/// And a probe that succeeds brings its endpoint back in the newest fleet.
#[test]
fn a_probe_from_before_a_publish_is_counted() {
    let setting = policy("round_robin");
    let engine = setting.engine(&fleet(3));
    while row(&engine, "e0", 0.0).breaker == "closed" {
        drive(&engine, "GET", 0.0, |name| if name == "e0" { (Refused, 0) } else { (Response, 200) });
    }
    let mut call = begin(&engine, "GET", "/", 5.0);
    let (token, name) = send(&mut call, 5.0);
    assert_eq!(name, "e0");
    engine.publish(&setting.text(), at(5.0)).unwrap();
    call.head(token, Response, 200, Pushback::Unsaid, at(5.1)).unwrap();
    assert_eq!((row(&engine, "e0", 5.1).breaker, begin(&engine, "GET", "/", 5.1).record(at(5.1)).out), ("closed", 0));
}

/// Only overloaded ones count towards the end of the walk, not those that are out.
#[test]
fn a_bound_does_not_hide_the_healthy() {
    for name in ["ring_hash", "maglev"] {
        let engine = policy(name).with("/balance/hash/bound", json!(1.25)).engine(&fleet(2));
        engine.isolate("orders", "e0", true, at(0.0));
        let refused = (0..5000).filter(|n| {
            let key = format!("k{n}");
            let mut call =
                engine.begin(&Request { key: Some(&key), ..request("GET", "/") }, &Vec::new(), at(1.0)).unwrap();
            call.next(at(1.0)).is_err()
        });
        assert_eq!(refused.count(), 0, "{name}");
    }
}

/// The mean counts the call that is about to go once.
#[test]
fn the_bound_counts_the_call_once() {
    let engine = policy("ring_hash").with("/balance/hash/bound", json!(1.25)).engine(&fleet(4));
    let mut held = Vec::new();
    for total in 1..=20 {
        let mut call = begin_with(&engine, &Request { key: Some("k"), ..request("GET", "/") }, &Vec::new(), 1.0);
        send(&mut call, 1.0);
        held.push(call);
        let most = (1.25 * f64::from(total) / 4.0).ceil() as u32;
        let busy: Vec<u32> = (0..4).map(|n| row(&engine, &format!("e{n}"), 1.0).in_flight).collect();
        assert!(busy.iter().all(|n| *n <= most), "{busy:?} of {total}");
    }
}

/// It is asked now and then, or its average would starve it for a minute.
#[test]
fn a_killed_endpoint_above_the_cap_is_used_again_too() {
    let engine = policy("peak_ewma").engine(&fleet(4));
    let mut last: HashMap<String, f64> = HashMap::new();
    for n in 0..4000 {
        let now = f64::from(n) / 50.0;
        let is_dead = |name: &str| now < 20.0 && name != "e3";
        for name in drive(&engine, "GET", now, |name| if is_dead(name) { (Refused, 0) } else { (Response, 200) }).0 {
            if now > 20.0 {
                last.entry(name).or_insert(now);
            }
        }
    }
    eprintln!("first uses after the return at 20.0: {last:?}");
    let late = (0..4).map(|n| last.get(&format!("e{n}")).copied().unwrap_or(f64::INFINITY)).fold(0.0, f64::max);
    assert!(late <= 20.0 + 16.0 * 1.25, "first uses after the return at 20.0: {last:?}");
}

/// Isolated ones are no last resort.
#[test]
fn the_last_that_may_be_used_is_not_ejected() {
    let engine = policy("round_robin").engine(&fleet(4));
    (0..3).for_each(|n| _ = engine.isolate("orders", &format!("e{n}"), true, at(0.0)));
    drive(&engine, "POST", 1.0, |_| (Refused, 0));
    assert_eq!(row(&engine, "e3", 1.0).breaker, "closed");
}

/// It is not sent, and takes nothing from the budget.
#[test]
fn a_hedge_after_the_deadline_costs_nothing() {
    let engine = setting().engine(&fleet(3));
    let ask = Request { hedge: Some(at(0.05)), timeout: Some(at(0.1)), ..request("GET", "/") };
    let mut call = engine.begin(&ask, &Vec::new(), at(1.0)).unwrap();
    send(&mut call, 1.0);
    let before = engine.read(at(1.2))[0].budget;
    assert_eq!(call.hedge(true, false, at(1.2)), None);
    assert_eq!(engine.read(at(1.2))[0].budget, before);
}

/// Nothing is sent that nobody asked for.
#[test]
fn next_beside_an_attempt_awaits() {
    let engine = setting().engine(&fleet(3));
    let mut call = begin(&engine, "GET", "/", 1.0);
    send(&mut call, 1.0);
    assert_eq!(call.next(at(1.0)).unwrap(), Next::Await);
}

/// With few endpoints a walk may meet many points of the same before it meets another.
#[test]
fn a_bound_is_kept_however_the_points_lie() {
    for seed in 0..400u32 {
        let engine = policy("ring_hash").with("/balance/hash/bound", json!(1.25)).engine(&[]);
        let found: Vec<Address> =
            (0..3).map(|n| address(&format!("127.0.0.1:{}", 20_000 + seed * 97 + n * 31), "v1")).collect();
        engine.resolve("orders", 5, &found, at(0.0)).unwrap();
        let mut held = Vec::new();
        for _ in 0..12 {
            let mut call = begin_with(&engine, &Request { key: Some("k"), ..request("GET", "/") }, &Vec::new(), 1.0);
            send(&mut call, 1.0);
            held.push(call);
        }
        let most = found.iter().map(|e| row(&engine, &e.address, 1.0).in_flight).max();
        assert_eq!(most, Some(5), "seed {seed}");
    }
}

/// More than are told apart share the last priority, so that none is forgotten.
#[test]
fn zones_beyond_the_sixteenth_are_priorities_too() {
    let names: Vec<String> = (0..20).map(|n| format!("z{n:02}")).collect();
    let setting = policy("random")
        .whole("/zone", json!("z00"))
        .with("/balance/locality/policy", json!("failover"))
        .with("/balance/locality/order", json!(names[1..]));
    let engine = setting.engine(&[]);
    let found: Vec<Address> = names.iter().map(|zone| Address { zone: zone.clone(), ..address(zone, "v1") }).collect();
    engine.resolve("orders", 5, &found, at(0.0)).unwrap();
    for name in &names[..17] {
        assert!(engine.check("orders", name, false, at(0.5)));
    }
    let healthy = (0..200).filter(|n| {
        let now = 1.0 + f64::from(*n) / 1e3;
        names[17..].contains(&answered(&engine, &request("GET", "/"), &Vec::new(), now))
    });
    assert!(healthy.count() > 0);
}

/// An endpoint is asked for its own identity, however many there are.
#[test]
fn seventy_thousand_identities_are_told_apart() {
    let engine = policy("random").engine(&[]);
    let of = |n: u32| Address { identity: format!("spiffe://shop/{n}"), ..address(&format!("e{n}"), "v1") };
    let found: Vec<Address> = (0..70_000).map(of).collect();
    engine.resolve("orders", 5, &found, at(0.0)).unwrap();
    for n in 0..500 {
        let mut call = begin(&engine, "GET", "/", 1.0 + f64::from(n));
        let Next::Send { place, .. } = call.next(at(1.0 + f64::from(n))).unwrap() else { panic!("no attempt") };
        let name = call.address(place).trim_start_matches('e').to_owned();
        assert_eq!(call.identity(place), format!("spiffe://shop/{name}"));
    }
}

/// The session is that of whoever answered, not of the attempt that lost.
#[test]
fn a_session_names_the_winner_of_a_hedge() {
    let engine =
        policy("round_robin").with("/balance/sticky", json!({"kind": "cookie", "name": "s"})).engine(&fleet(2));
    let request = Request { hedge: Some(at(0.05)), ..request("GET", "/") };
    let mut call = engine.begin(&request, &Vec::new(), at(1.0)).unwrap();
    let (first, first_at) = send(&mut call, 1.0);
    assert_eq!(call.hedge(true, false, at(1.05)), Some(at(0.0)));
    send(&mut call, 1.05);
    call.head(first, Response, 200, Pushback::Unsaid, at(1.06)).unwrap();
    let (_, _, session) = call.new_session().unwrap();
    assert_eq!(session, crate::balance::hash::xxh64(first_at.as_bytes(), 0x6d65_7368_6c69_6221));
}

/// Who is drained gets no call, not even a probe.
#[test]
fn an_endpoint_without_weight_is_not_probed() {
    let engine = policy("round_robin").engine(&fleet(3));
    while row(&engine, "e0", 0.0).breaker == "closed" {
        drive(&engine, "GET", 0.0, |name| if name == "e0" { (Refused, 0) } else { (Response, 200) });
    }
    let mut drained = fleet(3);
    drained[0].weight = 0.0;
    engine.resolve("orders", 5, &drained, at(0.1)).unwrap();
    for n in 0..100 {
        assert_ne!(answered(&engine, &request("GET", "/"), &Vec::new(), 10.0 + f64::from(n)), "e0");
    }
}

/// What the mesh refused itself, and what nobody waited for, is not held against the service.
#[test]
fn the_throttle_counts_only_what_the_service_refuses() {
    let engine = policy("round_robin")
        .with("/admit/in_flight", json!(1))
        .with("/admit/throttle/ratio", json!(2.0))
        .engine(&fleet(2));
    let held = begin(&engine, "GET", "/", 1.0);
    for _ in 0..200 {
        assert!(matches!(engine.begin(&request("GET", "/"), &Vec::new(), at(1.0)), Err(Refusal::LimitExceeded(_))));
    }
    drop(held);
    for n in 0..100 {
        let mut call = begin(&engine, "GET", "/", 1.0 + f64::from(n) / 1e3);
        send(&mut call, 1.0 + f64::from(n) / 1e3);
        call.abandon(at(1.0 + f64::from(n) / 1e3));
    }
    for n in 0..100 {
        assert_ne!(answered(&engine, &request("GET", "/"), &Vec::new(), 1.2 + f64::from(n) / 1e3), "");
    }
}
