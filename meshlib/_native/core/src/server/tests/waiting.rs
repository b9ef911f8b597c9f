//! Calls that find no place at once.
use super::*;

const MILLI: Duration = Duration::from_millis(1);

/// Two places, and as many may wait.
fn queueing() -> Gate {
    gate_of(|plan| plan["admission"]["queue"] = json!(1.0))
}

/// Both places are taken.
fn full(gate: &Gate) -> [Entry; 2] {
    [0, 1].map(|_| get(gate, "/", Some(SHOP)))
}

#[test]
fn a_call_without_a_place_waits_and_is_in_when_its_ticket_is_called() {
    let gate = queueing();
    let [first, second] = full(&gate);
    assert_eq!((first.ticket(), first.is_called(), first.waited()), (0, true, Duration::ZERO));
    let waiting = get(&gate, "/", Some(SHOP));
    assert_eq!((waiting.status(), waiting.is_over(), waiting.is_called()), (0, false, false));
    assert_eq!(waiting.patience(), 100 * MILLI);
    assert_eq!((gate.load().in_flight, gate.load().waiting, gate.load().limit), (2, 1, 2));
    let ticket = waiting.ticket();
    assert_eq!(first.finish(200, NOW + 20 * MILLI), [ticket]);
    assert!(waiting.is_called());
    assert!(waiting.resume(NOW + 21 * MILLI) && waiting.resume(NOW + 500 * MILLI));
    assert_eq!((waiting.ticket(), waiting.status(), waiting.waited()), (0, 0, 21 * MILLI));
    assert_eq!((gate.load().in_flight, gate.load().waiting), (2, 0));
    assert_eq!(waiting.finish(200, NOW + 30 * MILLI), [0; 0]);
    assert_eq!(second.finish(200, NOW + 30 * MILLI), [0; 0]);
    let reading = &gate.readings()[0];
    assert_eq!((gate.load().in_flight, reading.in_flight, reading.requests, reading.refused), (0, 0, 3, 0));
}

#[test]
fn an_end_that_calls_nobody_allocates_nothing() {
    let gate = queueing();
    assert_eq!(get(&gate, "/", Some(SHOP)).finish(200, NOW).capacity(), 0);
}

#[test]
fn who_waited_in_vain_is_shed() {
    let gate = queueing();
    let _full = full(&gate);
    let waiting = get(&gate, "/", Some(SHOP));
    assert!(!waiting.resume(NOW + 100 * MILLI) && !waiting.resume(NOW + 101 * MILLI));
    assert_eq!((waiting.status(), waiting.reason(), waiting.is_over()), (503, "admit.shed", true));
    assert_eq!((Refusal::Shed.grpc_status(), waiting.ticket()), (14, 0));
    let told = waiting.detail();
    assert!(told.contains("priority critical, waited 100 ms") && told.contains("add instances"), "{told}");
    waiting.finish(200, NOW + 110 * MILLI);
    drop(waiting);
    let reading = &gate.readings()[0];
    assert_eq!((reading.codes.clone(), reading.refused, reading.in_flight), (vec![(503, 1)], 1, 2));
    assert_eq!((gate.load().in_flight, gate.load().waiting), (2, 0));
}

#[test]
fn nobody_waits_beyond_its_deadline() {
    let gate = queueing();
    let [first, _second] = full(&gate);
    let hasty = || arrive(&gate, "GET", "/", Some(SHOP), &[("x-mesh-deadline-ms", "30")]);
    let waiting = hasty();
    assert_eq!(waiting.patience(), 30 * MILLI);
    // The timer was early.
    assert!(!waiting.resume(NOW + 29 * MILLI));
    assert_eq!((waiting.status(), waiting.reason()), (504, "deadline.exceeded"));
    // Its ticket was called in time, and it came too late: its place goes on.
    let (late, other) = (hasty(), get(&gate, "/", Some(SHOP)));
    assert_eq!(first.finish(200, NOW + 29 * MILLI), [late.ticket()]);
    assert!(!late.resume(NOW + 30 * MILLI));
    assert_eq!((late.reason(), gate.called()), ("deadline.exceeded", vec![other.ticket()]));
    assert!(other.resume(NOW + 30 * MILLI));
}

#[test]
fn beyond_the_queue_calls_are_refused_at_once() {
    let gate = queueing();
    let _full = full(&gate);
    let _waiting = full(&gate);
    let entry = get(&gate, "/", Some(SHOP));
    assert_eq!((entry.status(), entry.reason(), entry.ticket(), entry.is_over()), (503, "admit.limit", 0, true));
}

#[test]
fn a_call_that_is_cancelled_while_it_waits_leaves_the_queue() {
    let gate = queueing();
    let [first, _second] = full(&gate);
    drop(get(&gate, "/", Some(SHOP)));
    get(&gate, "/", Some(SHOP)).finish(499, NOW);
    assert_eq!((gate.load().waiting, first.finish(200, NOW), gate.load().in_flight), (0, vec![], 1));
    // It was counted with what it ended by, and was not refused.
    let reading = &gate.readings()[0];
    assert_eq!((reading.codes.clone(), reading.refused, reading.in_flight), (vec![(0, 1), (200, 1), (499, 1)], 0, 1));
}

#[test]
fn a_call_that_is_cancelled_after_it_was_called_hands_its_place_on() {
    let gate = queueing();
    let [first, _second] = full(&gate);
    let (gone, next) = (get(&gate, "/", Some(SHOP)), get(&gate, "/", Some(SHOP)));
    assert_eq!(first.finish(200, NOW), [gone.ticket()]);
    drop(gone);
    assert_eq!((gate.called(), gate.called()), (vec![next.ticket()], vec![]));
    assert!(next.resume(NOW));
    assert_eq!(gate.load().in_flight, 2);
}

#[test]
fn every_end_tells_whom_it_calls() {
    let gate = queueing();
    let ends: [fn(&Entry) -> Vec<u64>; 3] =
        [|entry| entry.finish(200, NOW), Entry::veto, |entry| entry.outrun(7 * MILLI)];
    for (end, status) in ends.into_iter().zip([0, 403, 429]) {
        let [first, second] = full(&gate);
        let waiting = get(&gate, "/", Some(SHOP));
        assert_eq!((end(&first), first.status(), first.is_over()), (vec![waiting.ticket()], status, true));
        assert_eq!(end(&first), [0; 0]);
        assert!(waiting.resume(NOW));
        drop((second, waiting));
    }
    assert_eq!(gate.load().in_flight, 0);
}

#[test]
fn what_crowds_another_out_calls_its_ticket() {
    let gate = gate_of(|plan| {
        plan["admission"]["queue"] = json!(0.5);
        plan["admission"]["priorities"] =
            json!([{"from": [], "paths": [{"kind": "exact", "value": "/batch"}], "as": "sheddable"}]);
        plan["admission"]["shares"] = json!([1.0, 1.0, 1.0, 1.0]);
    });
    let [first, _second] = full(&gate);
    let batch = get(&gate, "/batch", Some(SHOP));
    let ticket = batch.ticket();
    let user = get(&gate, "/", Some(SHOP));
    assert_eq!((ticket > 0, gate.called(), batch.is_called()), (true, vec![ticket], true));
    assert!(!batch.resume(NOW + MILLI));
    assert_eq!((batch.reason(), batch.priority()), ("admit.shed", "sheddable"));
    assert_eq!(first.finish(200, NOW), [user.ticket()]);
}

#[test]
fn grpc_without_a_driver_that_waits_is_refused_at_once() {
    let gate = queueing();
    let call = |can_wait| {
        let (headers, origin) = (gate.headers(b"/"), Origin::default());
        let (peer, method) = (Some(SHOP), "/a.B/C");
        gate.begin_grpc(GrpcArrival { method, headers, peer, is_tls: true, now: NOW, deadline: None, origin, can_wait })
    };
    let _full = [call(false), call(false)];
    let refused = call(false);
    assert_eq!((refused.refusal(), refused.ticket(), refused.is_over()), (Some(Refusal::Limit(2)), 0, true));
    let waiting = call(true);
    assert!(waiting.ticket() > 0 && !waiting.resume(NOW + 100 * MILLI));
    let reading = gate.readings().into_iter().find(|reading| reading.refused > 0 && reading.method == "/a.B/C");
    assert_eq!(reading.unwrap().codes, [(14, 1)]);
}

#[test]
fn a_plan_with_more_places_lets_in_who_waits() {
    let gate = queueing();
    let _full = full(&gate);
    let waiting = get(&gate, "/", Some(SHOP));
    gate.publish(changed(|plan| plan["admission"]["in_flight"] = json!(3)).unwrap());
    assert_eq!(gate.called(), [waiting.ticket()]);
    assert!(waiting.resume(NOW));
    assert_eq!((gate.load().in_flight, gate.load().limit), (3, 3));
}

#[test]
fn who_waited_in_the_parent_has_no_place_in_a_forked_child() {
    let gate = queueing();
    let [first, _second] = full(&gate);
    let (called, waiting) = (get(&gate, "/", Some(SHOP)), get(&gate, "/", Some(SHOP)));
    first.finish(200, NOW);
    gate.reset();
    let _mine = full(&gate);
    assert!(called.is_called() && !called.resume(NOW) && !waiting.resume(NOW));
    drop((first, called));
    assert_eq!((gate.load().in_flight, gate.load().waiting, gate.called()), (2, 0, vec![]));
}

#[test]
fn a_rate_is_counted_when_a_call_is_in_and_looked_at_before_it_waits() {
    let gate = gate_of(|plan| {
        plan["admission"]["queue"] = json!(2.0);
        plan["rates"] = json!([rate("each", false)]);
    });
    let [first, _second] = full(&gate);
    // Of its three calls a minute the third waits, and the fourth may do so too: nothing is counted yet.
    let (third, fourth) = (get(&gate, "/", Some(SHOP)), get(&gate, "/", Some(SHOP)));
    assert_eq!(first.finish(200, NOW), [third.ticket()]);
    assert!(third.resume(NOW));
    assert_eq!(third.finish(200, NOW), [fourth.ticket()]);
    assert!(!fourth.resume(NOW));
    assert_eq!((fourth.reason(), fourth.retry_after()), ("admit.rate", Some(Duration::from_secs(20))));
    // What could not be let in anyway takes nobody's place in the queue, nor is it counted.
    let _other = get(&gate, "/", Some(BROWSER));
    let early = get(&gate, "/", Some(SHOP));
    assert_eq!((early.status(), early.ticket(), gate.load().waiting, gate.load().in_flight), (429, 0, 0, 2));
}

#[test]
fn who_is_above_its_rate_holds_no_place() {
    let gate = gate_of(|plan| plan["rates"] = json!([rate("each", false)]));
    for expected in [0, 0, 0, 429, 429] {
        let entry = get(&gate, "/", Some(SHOP));
        assert_eq!((entry.status(), gate.load().in_flight), (expected, u32::from(expected == 0)));
        entry.finish(200, NOW);
    }
}

fn rate(name: &str, is_global: bool) -> Value {
    json!({"name": name, "calls": 3.0, "per": 60.0, "burst": 3.0, "by": [{"kind": "peer", "name": ""}], "is_global": is_global})
}

#[test]
fn global_rates_are_counted_here_only_while_their_store_is_away() {
    let gate = gate_of(|plan| {
        plan["admission"]["queue"] = json!(1.0);
        plan["rates"] = json!([rate("all", true)]);
    });
    for _ in 0..5 {
        let entry = get(&gate, "/", Some(SHOP));
        assert_eq!((entry.status(), entry.wants_rates()), (0, true));
    }
    let stood: Vec<bool> = (0..4).map(|_| get(&gate, "/", Some(SHOP)).stand_in(NOW).is_none()).collect();
    assert_eq!(stood, [true, true, true, false]);
    let [first, _second] = full(&gate);
    let waiting = get(&gate, "/", Some(SHOP));
    assert_eq!(first.stand_in(NOW), Some(vec![waiting.ticket()]));
    assert_eq!((first.status(), first.retry_after(), first.wants_rates()), (429, Some(Duration::from_secs(20)), false));
    assert_eq!(first.stand_in(NOW), None);
    assert_eq!(
        (queueing().load(), get(&queueing(), "/", Some(SHOP)).wants_rates()),
        (Load { limit: 2, ..Load::default() }, false)
    );
}

#[test]
fn places_are_conserved_whatever_the_threads_do() {
    let gate = gate_of(|plan| {
        plan["admission"]["queue"] = json!(1.0);
        plan["admission"]["in_flight"] = json!(3);
        plan["admission"]["priorities"] =
            json!([{"from": [], "paths": [{"kind": "exact", "value": "/batch"}], "as": "sheddable"}]);
    });
    let served = AtomicU32::new(0);
    std::thread::scope(|scope| {
        for seed in 0..4 {
            let (gate, served) = (&gate, &served);
            scope.spawn(move || {
                let random = crate::random::Random::new(seed);
                for step in 0..1000 {
                    let now = NOW + step * MILLI / 10;
                    let entry = come(gate, now, ["/", "/batch"][random.below(2)], SHOP, &[]);
                    while entry.ticket() > 0 && !entry.is_called() && random.below(6) > 0 {
                        std::thread::yield_now();
                    }
                    match random.below(4) {
                        0 => drop(entry),
                        _ if entry.ticket() > 0 && !entry.resume(now) => {}
                        1 => drop(entry.veto()),
                        _ if entry.status() == 0 => {
                            served.fetch_add(1, Ordering::Relaxed);
                            drop(entry.finish(200, now + MILLI));
                        }
                        _ => {}
                    }
                }
            });
        }
    });
    drop(gate.called());
    let (load, readings) = (gate.load(), gate.readings());
    assert_eq!((load.in_flight, load.waiting), (0, 0));
    assert!(readings.iter().all(|reading| reading.in_flight == 0) && served.load(Ordering::Relaxed) > 200);
    assert_eq!(readings.iter().map(|reading| reading.requests).sum::<u64>(), 4000);
    assert_eq!(load.calls + load.refused, 4000);
}
