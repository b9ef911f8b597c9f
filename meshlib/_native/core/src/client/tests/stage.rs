//! What do the stories of these tests play on? A plan of which a test changes single keys, fleets, and calls that are answered at once.
use serde_json::{json, Value};

use super::*;

/// A plan: that of `tests.rs` with the ordinary limit of calls at once. A key is named by its JSON pointer, below the service `orders`.
#[derive(Clone)]
pub struct Setting(Value);

pub fn setting() -> Setting {
    let plan: Value = serde_json::from_str(&PLAN.replace("POLICY", "peak_ewma")).unwrap();
    Setting(plan).with("/admit/in_flight", json!(1024))
}

pub fn policy(name: &str) -> Setting {
    setting().with("/balance/policy", json!(name))
}

impl Setting {
    /// A key that isn't there already is a mistake of the test.
    pub fn with(self, pointer: &str, value: Value) -> Self {
        self.whole(&format!("/services/0{pointer}"), value)
    }

    /// A key of the whole plan.
    pub fn whole(mut self, pointer: &str, value: Value) -> Self {
        *self.0.pointer_mut(pointer).unwrap_or_else(|| panic!("the plan has no {pointer}")) = value;
        self
    }

    /// One more service, like `orders` but for the name and these keys.
    pub fn and(mut self, name: &str, keys: &[(&str, Value)]) -> Self {
        let mut service = self.0["services"][0].clone();
        (service["name"], service["hosts"]) = (json!(name), json!([name]));
        for (pointer, value) in keys {
            *service.pointer_mut(pointer).unwrap_or_else(|| panic!("the plan has no {pointer}")) = value.clone();
        }
        self.0["services"].as_array_mut().unwrap().push(service);
        self
    }

    pub fn text(&self) -> Vec<u8> {
        self.0.to_string().into_bytes()
    }

    pub fn engine(&self, fleet: &[Address]) -> Engine {
        self.seeded(11, fleet)
    }

    pub fn seeded(&self, seed: u64, fleet: &[Address]) -> Engine {
        let engine = Engine::new(seed);
        engine.publish(&self.text(), at(0.0)).unwrap();
        engine.resolve("orders", 1, &fleet.to_vec(), at(0.0)).unwrap();
        engine
    }
}

/// `e0`, `e1` and so on.
pub fn fleet(count: usize) -> Vec<Address> {
    (0..count).map(|n| address(&format!("e{n}"), "v1")).collect()
}

/// `e0` with the first weight, and so on.
pub fn weighted(weights: &[f64]) -> Vec<Address> {
    fleet(weights.len()).into_iter().zip(weights).map(|(found, weight)| Address { weight: *weight, ..found }).collect()
}

/// Zone by zone so many endpoints, called `a0`, `a1`, … in zone `a`.
pub fn in_zones(zones: &[(&str, usize)]) -> Vec<Address> {
    let of = |(zone, count): &(&str, usize)| {
        let (zone, count) = ((*zone).to_owned(), *count);
        (0..count).map(move |n| Address { zone: zone.clone(), ..address(&format!("{zone}{n}"), "v1") })
    };
    zones.iter().flat_map(of).collect()
}

pub type Lines = Vec<(Vec<u8>, Vec<u8>)>;

pub fn header(name: &str, value: &str) -> Lines {
    vec![(name.as_bytes().to_vec(), value.as_bytes().to_vec())]
}

pub fn begin_with(engine: &Engine, request: &Request<'_>, headers: &Lines, now: f64) -> Call {
    engine.begin(request, headers, at(now)).unwrap()
}

/// A call that is answered at once. Returns who took it.
pub fn answered(engine: &Engine, request: &Request<'_>, headers: &Lines, now: f64) -> String {
    let mut call = begin_with(engine, request, headers, now);
    let (token, address) = send(&mut call, now);
    assert_eq!(call.head(token, Response, 200, Pushback::Unsaid, at(now)).unwrap(), Reply::Deliver);
    call.finish(token, Response, at(now)).unwrap();
    address
}

/// So many calls that nobody answers, so that they teach nothing: how many each endpoint got.
pub fn spread(engine: &Engine, request: &Request<'_>, calls: usize, now: f64) -> HashMap<String, usize> {
    let mut hits = HashMap::new();
    for _ in 0..calls {
        *hits.entry(send(&mut begin_with(engine, request, &Vec::new(), now), now).1).or_default() += 1;
    }
    hits
}

pub fn row(engine: &Engine, endpoint: &str, now: f64) -> EndpointReading {
    engine.read(at(now)).into_iter().find(|row| row.service == "orders" && row.endpoint == endpoint).unwrap()
}

/// The words of a call's decisions, in order.
pub fn words(call: &Call) -> Vec<&'static str> {
    call.record(at(0.0)).events.iter().map(|event| event.what).collect()
}

/// The squared distance from the expected shares (Pearson). Chance alone is above `CHANCE` of its degrees of freedom once in a million.
pub fn chi_square(hits: &HashMap<String, usize>, expected: &[(&str, f64)]) -> f64 {
    let calls: usize = hits.values().sum();
    let listed: usize = expected.iter().filter_map(|(name, _)| hits.get(*name)).sum();
    assert_eq!(listed, calls, "somebody else got calls: {hits:?}");
    let whole: f64 = expected.iter().map(|(_, share)| share).sum();
    let distance = |(name, share): &(&str, f64)| {
        let wanted = share / whole * calls as f64;
        (hits.get(*name).copied().unwrap_or(0) as f64 - wanted).powi(2) / wanted.max(1e-9)
    };
    expected.iter().map(distance).sum()
}

/// By degrees of freedom, from 0 to 5: p = 1e-6.
pub const CHANCE: [f64; 6] = [1e-9, 23.93, 27.63, 30.66, 33.38, 35.89];
