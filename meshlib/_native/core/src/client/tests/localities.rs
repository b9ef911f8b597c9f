//! How far does a call travel? Priorities by zone, the share that stays in the own zone, and panic: against the tables that Envoy documents.
use serde_json::json;

use super::stage::*;
use super::*;

const CALLS: usize = 6000;

fn failover(order: &[&str]) -> Setting {
    policy("random")
        .whole("/zone", json!("a"))
        .with("/balance/locality/policy", json!("failover"))
        .with("/balance/locality/order", json!(order))
}

/// Which zones got how many calls, in percent and in the order of the zones.
fn percent(engine: &Engine, zones: &[&str]) -> Vec<f64> {
    let hits = spread(engine, &request("GET", "/"), CALLS, 1.0);
    let of = |zone: &&str| hits.iter().filter(|(name, _)| name.starts_with(*zone)).map(|(_, n)| n).sum::<usize>();
    zones.iter().map(|zone| of(zone) as f64 * 100.0 / CALLS as f64).collect()
}

/// All but so many of a zone fail their checks.
fn leave_healthy(engine: &Engine, zone: &str, total: usize, healthy: usize) {
    for n in healthy..total {
        assert!(engine.check("orders", &format!("{zone}{n}"), false, at(0.5)));
    }
}

/// The golden tables: with a factor of 1.4 nothing moves until more than 28 of 100 are out.
#[test]
fn the_tables_of_priorities_hold() {
    let rows: [(&[usize], &[f64]); 13] = [
        (&[100, 100], &[100.0, 0.0]),
        (&[72, 100], &[100.0, 0.0]),
        (&[71, 100], &[99.0, 1.0]),
        (&[50, 100], &[70.0, 30.0]),
        (&[25, 100], &[35.0, 65.0]),
        (&[0, 100], &[0.0, 100.0]),
        (&[72, 72], &[100.0, 0.0]),
        (&[71, 71], &[99.0, 1.0]),
        (&[50, 50], &[70.0, 30.0]),
        (&[25, 25], &[50.0, 50.0]),
        (&[71, 71, 100], &[99.0, 1.0, 0.0]),
        (&[25, 25, 100], &[35.0, 35.0, 30.0]),
        (&[25, 25, 20], &[37.0, 35.0, 28.0]),
    ];
    for (healthy, expected) in rows {
        let zones = &["a", "b", "c"][..healthy.len()];
        let found: Vec<(&str, usize)> = zones.iter().map(|zone| (*zone, 100)).collect();
        // Without panic, which has a test of its own.
        let engine = failover(&["b"]).with("/balance/panic", json!(0.0)).engine(&in_zones(&found));
        for (zone, healthy) in zones.iter().zip(healthy) {
            leave_healthy(&engine, zone, 100, *healthy);
        }
        for (is, expected) in percent(&engine, zones).iter().zip(expected) {
            // Five standard deviations; what gets nothing gets nothing.
            let wide = (expected * (100.0 - expected) / CALLS as f64).sqrt() * 5.0;
            assert!((is - expected).abs() <= wide, "{healthy:?} of 100: {is} instead of {expected}");
        }
        assert!(spread(&engine, &request("GET", "/"), 500, 1.0)
            .keys()
            .all(|name| row(&engine, name, 1.0).breaker == "closed"));
    }
}

/// The own zone, then the listed ones in their order, then all others as one.
#[test]
fn zones_are_asked_in_the_order_of_preference() {
    let zones = [("d", 2), ("c", 2), ("b", 2), ("a", 2), ("e", 2)];
    let engine = failover(&["c", "b"]).engine(&in_zones(&zones));
    let first = |engine: &Engine| -> std::collections::BTreeSet<char> {
        spread(engine, &request("GET", "/"), 300, 1.0).keys().map(|name| name.chars().next().unwrap()).collect()
    };
    for (gone, expected) in [("", "a"), ("a", "c"), ("c", "b"), ("b", "de")] {
        for n in 0..2 {
            engine.isolate("orders", &format!("{gone}{n}"), true, at(1.0));
        }
        assert_eq!(first(&engine), expected.chars().collect(), "after {gone:?} went");
    }
}

/// A priority panics only while all together can't carry the traffic, and then alone: the healthy of another are not mixed with its sick.
#[test]
fn panic_is_of_one_priority() {
    // 28 and 70 of 100: two short of enough. The first is below half, the second isn't.
    let engine = failover(&["b"]).engine(&in_zones(&[("a", 100), ("b", 100)]));
    leave_healthy(&engine, "a", 100, 20);
    leave_healthy(&engine, "b", 100, 50);
    let hits = spread(&engine, &request("GET", "/"), CALLS, 1.0);
    let count = |zone: &str| hits.keys().filter(|name| name.starts_with(zone)).count();
    assert_eq!((count("a"), count("b")), (100, 50));
    let share = percent(&engine, &["a", "b"]);
    assert!((share[0] - 29.0).abs() < 3.5, "{share:?}");
    // One more in the second zone is enough: nobody panics.
    engine.check("orders", "b50", true, at(0.5));
    engine.check("orders", "b51", true, at(0.5));
    let hits = spread(&engine, &request("GET", "/"), CALLS, 1.0);
    assert_eq!(hits.keys().filter(|name| name.starts_with('a')).count(), 20);
}

/// Where every priority is below half, each endpoint takes the same, well or not.
#[test]
fn in_panic_of_all_priorities_size_decides() {
    let engine = failover(&["b"]).engine(&in_zones(&[("a", 20), ("b", 60)]));
    leave_healthy(&engine, "a", 20, 2);
    leave_healthy(&engine, "b", 60, 20);
    let share = percent(&engine, &["a", "b"]);
    assert!((share[0] - 25.0).abs() < 3.0, "{share:?}");
    assert_eq!(spread(&engine, &request("GET", "/"), CALLS, 1.0).len(), 80);
}

/// Below half of a fleet that is well, health is ignored; at half it isn't, and by hand is by hand.
#[test]
fn below_half_health_is_ignored() {
    for name in ["peak_ewma", "round_robin", "random"] {
        let engine = policy(name).engine(&fleet(4));
        for (failing, used) in [("e0", 3), ("e1", 2), ("e2", 4)] {
            engine.check("orders", failing, false, at(1.0));
            assert_eq!(spread(&engine, &request("GET", "/"), 400, 1.0).len(), used, "{name}, {failing} fails");
        }
        engine.isolate("orders", "e3", true, at(1.0));
        assert_eq!(spread(&engine, &request("GET", "/"), 400, 1.0).len(), 3, "{name}");
    }
}

// --- zone-aware

/// A client in zone `a`, whose own service runs so many processes in each zone.
fn aware(callers: &[(&str, usize)], found: &[Address]) -> Engine {
    let setting = policy("random")
        .whole("/zone", json!("a"))
        .with("/balance/locality/policy", json!("zone_aware"))
        .and("me", &[]);
    let engine = setting.engine(found);
    engine.resolve("me", 1, &in_zones(callers), at(0.0)).unwrap();
    engine
}

/// Local as long as endpoints here get no more than elsewhere; what is beyond goes where there is room.
#[test]
fn as_much_stays_in_the_zone_as_keeps_endpoints_alike() {
    let rows: [(&[(&str, usize)], &[(&str, usize)], [f64; 3]); 5] = [
        // As many endpoints here as callers, in proportion: all stays.
        (&[("a", 2), ("b", 4)], &[("a", 2), ("b", 4)], [100.0, 0.0, 0.0]),
        (&[("a", 1), ("b", 5)], &[("a", 5), ("b", 1)], [100.0, 0.0, 0.0]),
        // Half of the callers, a third of the endpoints: two thirds stay.
        (&[("a", 3), ("b", 3)], &[("a", 2), ("b", 4)], [66.67, 33.33, 0.0]),
        // What leaves goes by what is free there: 1/3 - 1/4 in b and 1/2 - 1/4 in c.
        (&[("a", 2), ("b", 1), ("c", 1)], &[("a", 2), ("b", 4), ("c", 6)], [33.33, 16.67, 50.0]),
        // No endpoint here: the others, each endpoint alike.
        (&[("a", 2), ("b", 2)], &[("b", 3), ("c", 6)], [0.0, 33.33, 66.67]),
    ];
    for (callers, found, expected) in rows {
        let engine = aware(callers, &in_zones(found));
        for (is, expected) in percent(&engine, &["a", "b", "c"]).iter().zip(expected) {
            let wide = (expected * (100.0 - expected) / CALLS as f64).sqrt() * 5.0 + 0.01;
            assert!((is - expected).abs() <= wide, "{callers:?} to {found:?}: {is} instead of {expected}");
        }
    }
}

/// The share goes by who is healthy now, and comes back with health.
#[test]
fn the_share_of_the_zone_follows_health() {
    let engine = aware(&[("a", 1), ("b", 1)], &in_zones(&[("a", 4), ("b", 4)]));
    assert_eq!(percent(&engine, &["a"]), [100.0]);
    leave_healthy(&engine, "a", 4, 2);
    // A third of the healthy, half of the callers.
    let share = percent(&engine, &["a"])[0];
    assert!((share - 66.67).abs() < 3.5, "{share}");
    (2..4).for_each(|n| assert!(engine.check("orders", &format!("a{n}"), true, at(1.0))));
    assert_eq!(percent(&engine, &["a"]), [100.0]);
}

/// With fewer than six endpoints zones don't count.
#[test]
fn zones_count_from_six_endpoints_on() {
    let callers = [("a", 1), ("b", 1)];
    for (found, expected) in [([("a", 3), ("b", 2)], 60.0), ([("a", 3), ("b", 3)], 100.0)] {
        let share = percent(&aware(&callers, &in_zones(&found)), &["a"])[0];
        assert!((share - expected).abs() < 3.5, "{found:?}: {share}");
    }
}

/// In panic nobody is spared for his zone.
#[test]
fn zones_do_not_count_in_panic() {
    let engine = aware(&[("a", 1), ("b", 1)], &in_zones(&[("a", 4), ("b", 4)]));
    leave_healthy(&engine, "a", 4, 2);
    leave_healthy(&engine, "b", 4, 1);
    let share = percent(&engine, &["a"])[0];
    assert!((share - 50.0).abs() < 3.5, "{share}");
}

/// Who doesn't know his zone goes everywhere.
#[test]
fn without_a_zone_of_its_own_a_client_goes_everywhere() {
    for name in ["failover", "zone_aware"] {
        let engine =
            policy("random").with("/balance/locality/policy", json!(name)).engine(&in_zones(&[("a", 4), ("b", 4)]));
        let share = percent(&engine, &["a"])[0];
        assert!((share - 50.0).abs() < 3.5, "{name}: {share}");
    }
}
