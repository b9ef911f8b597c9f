//! Is a fleet that was amended the one that would have been compiled?
use std::collections::BTreeMap;

use super::*;

/// A small generator: the same steps in every run.
struct Dice(u64);

impl Dice {
    fn below(&mut self, n: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % n
    }
}

fn any(dice: &mut Dice, name: u64) -> Address {
    Address {
        is_held: dice.below(4) == 0,
        address: format!("10.0.0.{name}:80"),
        weight: [0.0, 1.0, 2.5][dice.below(3) as usize],
        zone: ["", "a", "b"][dice.below(3) as usize].to_owned(),
        labels: [("version".to_owned(), format!("v{}", 1 + dice.below(2)))].into(),
        identity: ["", "spiffe://shop/other"][dice.below(2) as usize].to_owned(),
    }
}

/// What can be seen of a fleet: its endpoints, and of each backend how many there are, how many are well, and what they weigh.
fn seen(engine: &Engine) -> (BTreeMap<String, String>, Vec<(usize, (u32, u32), String)>, BTreeMap<String, u32>) {
    let service = engine.find("orders").unwrap();
    let fleet = service.fleet();
    let endpoints = fleet.addresses().into_iter().map(|a| {
        let endpoint = fleet.find(&a.address).unwrap();
        assert_eq!(
            fleet.place_of(&endpoint.state).map(|place| fleet.address(&fleet.endpoints[place])),
            Some(&*a.address)
        );
        (a.address.clone(), format!("{a:?} {}", fleet.identity(endpoint)))
    });
    let backends = (0..service.routes.len()).filter_map(|route| fleet.backend(route, 0));
    let backends = backends.map(|b| (b.count(&fleet), b.health(), format!("{:.3}", b.weight))).collect();
    (endpoints.collect(), backends, fleet.zone_counts().into_iter().collect())
}

#[test]
fn a_fleet_that_was_amended_is_the_one_that_would_have_been_compiled() {
    // Large tables take their time where nothing is optimised.
    for (policy, last) in [("peak_ewma", 300), ("round_robin", 300), ("maglev", 30), ("ring_hash", 30)] {
        let mut dice = Dice(7);
        let (amended, compiled) = (engine_with(policy, &[]), engine_with(policy, &[]));
        let mut known: BTreeMap<String, Address> = BTreeMap::new();
        for version in 2..last {
            let changed: Vec<Address> = (0..dice.below(4))
                .map(|_| {
                    let n = dice.below(40);
                    any(&mut dice, n)
                })
                .collect();
            let gone: Vec<String> = (0..dice.below(4)).map(|_| format!("10.0.0.{}:80", dice.below(40))).collect();
            gone.iter().for_each(|address| drop(known.remove(address)));
            known.extend(changed.iter().map(|a| (a.address.clone(), a.clone())));
            let now = at(version as f64);
            assert_eq!(amended.amend("orders", version - 1, version, &changed, &gone, now), Ok(true));
            compiled.resolve("orders", version, &known.values().cloned().collect::<Vec<_>>(), now).unwrap();
            assert_eq!(seen(&amended), seen(&compiled), "{policy} {version}");
        }
    }
}

#[test]
fn a_change_of_another_version_is_not_taken() {
    let engine = engine();
    for (base, version) in [(0, 2), (2, 3), (1, 1)] {
        assert_eq!(engine.amend("orders", base, version, &[address("z", "v1")], &[], at(1.0)), Ok(false));
    }
    assert_eq!(engine.find("orders").unwrap().fleet().version, 1);
    assert!(engine.amend("nobody", 1, 2, &[], &[], at(1.0)).is_err());
}

#[test]
fn an_endpoint_that_stays_keeps_what_is_known_of_it_and_one_that_is_gone_is_not_picked() {
    let engine = engine_with("random", &[("a", "v1"), ("b", "v1"), ("c", "v1")]);
    assert!(engine.isolate("orders", "a", true, at(0.0)));
    assert_eq!(engine.amend("orders", 1, 2, &[address("d", "v1")], &["b".to_owned()], at(1.0)), Ok(true));
    let fleet = engine.find("orders").unwrap().fleet();
    assert!(fleet.find("a").unwrap().state.is_out());
    for n in 0..200 {
        let mut call = engine.begin(&request("GET", "/"), &Vec::new(), at(1.0 + f64::from(n))).unwrap();
        let Next::Send { place, token, .. } = call.next(at(1.0 + f64::from(n))).unwrap() else { panic!() };
        assert!(["c", "d"].contains(&call.address(place)));
        call.head(token, Response, 200, Pushback::Unsaid, at(1.0 + f64::from(n))).unwrap();
        call.finish(token, Response, at(1.0 + f64::from(n))).unwrap();
    }
}

#[test]
fn what_nobody_uses_any_more_is_cleared_away() {
    let engine = engine_with("random", &[("a", "v1")]);
    for version in 2..4000 {
        let one = Address {
            is_held: false,
            labels: [("build".to_owned(), version.to_string())].into(),
            ..address(&format!("host-{version}"), "v1")
        };
        let before = format!("host-{}", version - 1);
        assert_eq!(engine.amend("orders", version - 1, version, &[one], &[before], at(1.0)), Ok(true));
    }
    let fleet = engine.find("orders").unwrap().fleet();
    assert_eq!(fleet.endpoints.len(), 2);
    assert!(fleet.kept() < 20_000, "{} bytes and lists for two endpoints", fleet.kept());
}

#[test]
fn connects_that_came_to_nothing_are_counted() {
    let engine = engine();
    let mut call = engine.begin(&request("GET", "/"), &Vec::new(), at(1.0)).unwrap();
    let Next::Send { token, .. } = call.next(at(1.0)).unwrap() else { panic!() };
    call.head(token, Refused, 0, Pushback::Unsaid, at(1.0)).unwrap();
    assert_eq!((engine.unreachable("orders"), engine.unreachable("nobody")), (1, 0));
}

#[test]
fn a_fleet_that_was_replaced_is_not_freed_by_the_call_that_had_it_last() {
    let engine = engine();
    let service = engine.find("orders").unwrap();
    let old = Arc::downgrade(&service.fleet());
    let mut call = engine.begin(&request("GET", "/"), &Vec::new(), at(1.0)).unwrap();
    assert_eq!(engine.amend("orders", 1, 2, &[address("d", "v1")], &[], at(1.0)), Ok(true));
    call.abandon(at(1.0));
    drop(call);
    assert!(old.upgrade().is_some());
    engine.tend(at(2.0));
    assert!(old.upgrade().is_none());
}

#[test]
fn fleets_that_calls_keep_for_long_do_not_pile_up() {
    let engine = Engine::new(1);
    engine
        .publish(PLAN.replace("POLICY", "random").replace("\"in_flight\":4", "\"in_flight\":1000").as_bytes(), at(0.0))
        .unwrap();
    engine.resolve("orders", 1, &[address("a", "v1")], at(0.0)).unwrap();
    let service = engine.find("orders").unwrap();
    let mut calls = Vec::new();
    let mut fleets = Vec::new();
    for version in 2..60 {
        calls.push(engine.begin(&request("GET", "/"), &Vec::new(), at(1.0)).unwrap());
        fleets.push(Arc::downgrade(&service.fleet()));
        assert_eq!(engine.amend("orders", version - 1, version, &[address("d", "v1")], &[], at(1.0)), Ok(true));
    }
    assert_eq!(service.state.retired_count(), 16);
    calls.clear();
    assert_eq!(fleets.iter().filter(|fleet| fleet.upgrade().is_some()).count(), 16);
    engine.tend(at(2.0));
    assert_eq!(fleets.iter().filter(|fleet| fleet.upgrade().is_some()).count(), 0);
}
