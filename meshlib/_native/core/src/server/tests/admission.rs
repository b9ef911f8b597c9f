//! The plan of admission: priorities, shares, probes, a learnt limit, and what it tells of its load.
use std::collections::VecDeque;

use super::*;

const MILLI: Duration = Duration::from_millis(1);

fn exact(value: &str) -> Value {
    json!({"kind": "exact", "value": value})
}

fn priorities() -> Value {
    json!([
        {"from": [exact(BROWSER)], "paths": [], "as": "told"},
        {"from": [], "paths": [{"kind": "prefix", "value": "/checkout/"}], "as": "critical_plus"},
        {"from": [{"kind": "prefix", "value": "spiffe://shop/ns/batch/"}], "paths": [], "as": "sheddable"},
        {"from": [exact(SHOP)], "paths": [exact("/late")], "as": "sheddable_plus"},
    ])
}

#[test]
fn the_first_entry_that_matches_says_how_much_a_call_matters() {
    let gate = gate_of(|plan| plan["admission"]["priorities"] = priorities());
    for (target, peer, told, expected) in [
        ("/", SHOP, "", "critical"),
        ("/late", SHOP, "", "sheddable_plus"),
        ("/checkout/7", SHOP, "", "critical_plus"),
        ("/checkout/7", "spiffe://shop/ns/batch/sa/a", "", "critical_plus"),
        ("/x", "spiffe://shop/ns/batch/sa/a", "", "sheddable"),
        // Who is not named tells nothing.
        ("/x", "spiffe://shop/ns/batch/sa/a", "critical_plus", "sheddable"),
        ("/", SHOP, "critical_plus", "critical"),
        // Who is named tells all, if it is a level.
        ("/checkout/7", BROWSER, "sheddable", "sheddable"),
        ("/", BROWSER, "Critical_Plus", "critical_plus"),
        ("/checkout/7", BROWSER, "", "critical"),
        ("/", BROWSER, "urgent", "critical"),
    ] {
        let fields = [("x-mesh-priority", told)];
        let fields = if told.is_empty() { &fields[..0] } else { &fields };
        assert_eq!(come(&gate, NOW, target, peer, fields).priority(), expected, "{target} {peer} {told}");
    }
    // Of two words the lower one counts.
    let fields = [("x-mesh-priority", "critical_plus"), ("X-Mesh-Priority", "sheddable")];
    assert_eq!(come(&gate, NOW, "/", BROWSER, &fields).priority(), "sheddable");
    let unnamed = gate_of(|_| {});
    assert_eq!(come(&unnamed, NOW, "/", SHOP, &[("x-mesh-priority", "sheddable")]).priority(), "critical");
}

#[test]
fn a_priority_without_tls_is_nobodys() {
    let gate = gate_of(|plan| {
        plan["mode"] = json!("observe");
        plan["admission"]["priorities"] = priorities();
    });
    let mut headers = gate.headers(b"/");
    headers.field(b"x-mesh-priority", b"critical_plus");
    let (peer, origin) = (Some(BROWSER), Origin::default());
    let arrival =
        Arrival { method: "GET", target: b"/", headers, peer, is_tls: false, now: NOW, deadline: None, origin };
    assert_eq!(gate.begin(arrival).priority(), "critical");
}

/// Ten places, nobody waits.
fn shared(with: Value) -> Gate {
    gate_of(|plan| {
        plan["admission"]["in_flight"] = json!(10);
        plan["admission"]["priorities"] = with;
    })
}

#[test]
fn each_priority_has_its_share_of_the_places() {
    let gate = shared(json!([{"from": [exact(SHOP)], "paths": [], "as": "told"}]));
    for (word, expected, reason) in [
        ("sheddable", 6, "admit.shed"),
        ("sheddable_plus", 2, "admit.shed"),
        ("critical", 1, "admit.shed"),
        ("critical_plus", 1, "admit.limit"),
    ] {
        let entries: Vec<Entry> = (0..11).map(|_| come(&gate, NOW, "/", SHOP, &[("x-mesh-priority", word)])).collect();
        // Those that got in stay.
        let count = entries.iter().filter(|entry| entry.status() == 0).count();
        assert_eq!((count, entries[10].reason()), (expected, reason), "{word}");
        std::mem::forget(entries);
    }
}

#[test]
fn where_nobody_has_a_priority_all_have_all_places() {
    let gate = shared(json!([]));
    let entries: Vec<Entry> = (0..11).map(|_| get(&gate, "/", Some(SHOP))).collect();
    assert_eq!(entries.iter().filter(|entry| entry.status() == 0).count(), 10);
    assert_eq!(entries[10].refusal(), Some(Refusal::Limit(10)));
}

#[test]
fn probes_need_no_place_and_no_rate_and_are_judged_by_the_rules() {
    let probing = |rule: &str| {
        let gate = gate("enforce", rule);
        let mut plan: Value = serde_json::from_str(&plan("enforce", rule)).unwrap();
        plan["admission"]["in_flight"] = json!(1);
        plan["admission"]["probes"] = json!([exact("/healthz"), {"kind": "prefix", "value": "/probe/"}]);
        let by = json!([{"kind": "peer", "name": ""}]);
        plan["rates"] = json!([{"name": "r", "calls": 1.0, "per": 60.0, "burst": 1.0, "by": by, "is_global": false},
            {"name": "g", "calls": 1.0, "per": 60.0, "burst": 1.0, "by": by, "is_global": true}]);
        gate.publish(Snapshot::compile(plan.to_string().as_bytes()).unwrap());
        gate
    };
    let gate = probing(OPEN_RULE);
    let held = get(&gate, "/", Some(SHOP));
    assert_eq!((held.status(), held.is_probe(), get(&gate, "/", Some(BROWSER)).status()), (0, false, 503));
    for target in ["/healthz", "/healthz?deep=1", "/probe/a", "/healthz"] {
        let probe = get(&gate, target, Some(SHOP));
        assert_eq!((probe.status(), probe.is_probe(), probe.wants_rates()), (0, true, false), "{target}");
        assert_eq!((probe.stand_in(NOW), probe.finish(200, NOW)), (None, vec![]));
    }
    assert_eq!((get(&gate, "/healthz/", Some(BROWSER)).status(), gate.load().in_flight), (503, 1));
    assert_eq!(arrive(&gate, "GET", "/healthz", Some(SHOP), &[("x-mesh-deadline-ms", "0")]).status(), 504);
    assert_eq!(get(&probing(SHOP_RULE), "/healthz", Some(BROWSER)).status(), 403);
}

fn learning() -> Gate {
    gate_of(|plan| {
        plan["admission"]["in_flight"] = json!(50);
        plan["admission"]["queue"] = json!(10.0);
        plan["admission"]["adaptive"] = json!({"initial": 20, "least": 4, "most": 1000});
    })
}

/// So many calls one after another, that all take so long, with all places taken at all times.
fn press(gate: &Gate, under_way: &mut VecDeque<Entry>, calls: u32, took: Duration, status: u16) {
    for step in 0..calls {
        let now = NOW + step * MILLI;
        while under_way.len() < gate.load().limit as usize {
            under_way.push_back(come(gate, now, "/", SHOP, &[]));
        }
        let entry = under_way.pop_front().unwrap();
        entry.finish(status, entry.begun() + took);
    }
}

#[test]
fn a_limit_is_learnt_from_latency_and_never_above_the_plans() {
    let (gate, mut calls) = (learning(), VecDeque::new());
    assert_eq!(gate.load().limit, 20);
    press(&gate, &mut calls, 500, 100 * MILLI, 200);
    assert_eq!(gate.load().limit, 50);
    // What is above the plan's number is not learnt, so that it has not to be unlearnt.
    press(&gate, &mut calls, 10, 500 * MILLI, 200);
    let limit = gate.load().limit;
    assert!((15..30).contains(&limit), "{limit}");
    assert!(gate.load().in_flight >= limit && get(&gate, "/", Some(SHOP)).ticket() > 0);
}

#[test]
fn the_time_in_the_queue_is_not_latency() {
    let gate = learning();
    press(&gate, &mut VecDeque::new(), 20, 100 * MILLI, 200);
    let before = gate.state.adaptive.long();
    let full: Vec<Entry> = (0..gate.load().limit).map(|_| get(&gate, "/", Some(SHOP))).collect();
    let waiting = get(&gate, "/", Some(SHOP));
    full.iter().for_each(|entry| drop(entry.finish(0, NOW + 90 * MILLI)));
    assert!(waiting.resume(NOW + 90 * MILLI));
    waiting.finish(200, NOW + 190 * MILLI);
    assert_eq!((before, gate.state.adaptive.long()), (Some(100 * MILLI), Some(100 * MILLI)));
}

#[test]
fn what_fails_or_is_cancelled_says_nothing_of_latency() {
    for status in [0, 101, 500, 503] {
        let gate = learning();
        press(&gate, &mut VecDeque::new(), 100, MILLI, status);
        assert_eq!((gate.load().limit, gate.state.adaptive.long()), (20, None), "{status}");
    }
    // What ran out of time is what a limit is for.
    let gate = learning();
    press(&gate, &mut VecDeque::new(), 100, MILLI, 504);
    assert_eq!(gate.load().limit, 4);
}

#[test]
fn the_load_tells_what_was_let_in_apart_from_what_was_refused() {
    let gate = gate_of(|_| {});
    for status in [200, 404, 500, 503] {
        get(&gate, "/", Some(SHOP)).finish(status, NOW);
    }
    let _full = [get(&gate, "/", Some(SHOP)), get(&gate, "/", Some(SHOP))];
    get(&gate, "/", Some(SHOP));
    get(&gate, "/", None);
    let expected = Load { in_flight: 2, limit: 2, waiting: 0, calls: 4, errors: 2, refused: 2 };
    assert_eq!((gate.load(), Gate::default().load()), (expected, Load::default()));
}

#[test]
fn the_load_is_told_in_the_form_that_was_asked_for() {
    let gate = gate_of(|_| {});
    for (value, expected) in [("text", "text"), (" JSON ", "json"), ("Text", "text"), ("bin", ""), ("", "")] {
        let entry = arrive(&gate, "GET", "/", Some(SHOP), &[("Endpoint-Load-Metrics-Format", value)]);
        assert_eq!(entry.load_format(), expected, "{value:?}");
    }
    assert_eq!(get(&gate, "/", Some(SHOP)).load_format(), "");
}

#[test]
fn a_route_says_what_stops_when_the_client_goes_away() {
    for (word, expected) in [("nothing", 0), ("calls", 1), ("handler", 2)] {
        let gate = gate_of(|plan| plan["routes"][0]["on_disconnect"] = json!(word));
        assert_eq!(get(&gate, "/items/7", Some(SHOP)).on_disconnect(), expected);
        assert_eq!(get(&gate, "/elsewhere", Some(SHOP)).on_disconnect(), 1);
    }
}

#[test]
fn a_mistake_in_the_plan_is_named_with_all_others() {
    let wrong = changed(|plan| {
        plan["admission"]["shares"] = json!([0.9, 0.6, 1.0, 2.0]);
        plan["admission"]["queue"] = json!(-1.0);
        plan["admission"]["target"] = json!(0.2);
        plan["admission"]["priorities"] = json!([
            {"from": [{"kind": "any"}], "paths": [], "as": "told"},
            {"from": [], "paths": [], "as": "told"},
            {"from": [exact("gateway")], "paths": [], "as": "sheddable"},
        ]);
        plan["admission"]["probes"] = json!([exact("healthz")]);
    })
    .unwrap_err();
    for part in [
        "inbound.shares: each is between",
        "inbound.shares: a priority has no less",
        "inbound.queue",
        "inbound.codel",
        "inbound.priority[0]: `as: told`",
        "inbound.priority[1]: `as: told`",
        "inbound.priority[2]\": from: the caller \"gateway\"",
        "inbound.probes",
    ] {
        assert!(wrong.contains(part), "{part} in {wrong}");
    }
}

#[test]
fn what_is_missing_or_unknown_is_a_mistake() {
    for (path, name) in [
        ("", "admission"),
        ("", "public_rules"),
        ("/admission", "in_flight"),
        ("/admission", "adaptive"),
        ("/admission", "queue"),
        ("/admission", "target"),
        ("/admission", "interval"),
        ("/admission", "shares"),
        ("/admission", "priorities"),
        ("/admission", "probes"),
        ("/routes/0", "on_disconnect"),
    ] {
        let without = changed(|plan| drop(plan.pointer_mut(path).unwrap().as_object_mut().unwrap().remove(name)));
        assert!(without.unwrap_err().contains(name), "{name}");
    }
    assert!(changed(|plan| plan["admission"]["limit"] = json!(1)).is_err());
    assert!(changed(|plan| plan["in_flight"] = json!(1)).is_err());
    assert!(changed(|plan| plan["routes"][0]["on_disconnect"] = json!("all")).is_err());
}
