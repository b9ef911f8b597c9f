//! What does the engine keep for each endpoint and each Service, in bytes? For `benchmarks/memory.py`, which says what is wanted.
//!
//! `memory endpoint POLICY`, `memory used POLICY`, `memory service`; one JSON object of figures. `bytes` is what was asked of the allocator
//! and not given back, `rss_bytes` what the kernel says, which has the allocator's own share in it. An endpoint that is `used` has been called
//! once. Tables of consistent hashes are the difference between their policies and the others.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]
use std::time::Duration;

use mesh_core::client::{Engine, Next, Request};
use mesh_core::model::{Outcome, Pushback};
use peak_alloc::PeakAlloc;
use serde_json::{json, Value};

#[path = "../benches/fixture/mod.rs"]
mod fixture;
use fixture::{addresses, plan, service_name, Size};

#[global_allocator]
static ALLOCATED: PeakAlloc = PeakAlloc;

const ENDPOINTS: usize = 100_000;
const SERVICES: usize = 5_000;

fn main() {
    let given: Vec<String> = std::env::args().skip(1).collect();
    let given: Vec<&str> = given.iter().map(String::as_str).collect();
    let found = match given[..] {
        ["endpoint", policy] => endpoint(policy),
        ["used", policy] => used(policy),
        ["service"] => service(),
        _ => panic!("memory endpoint POLICY, used POLICY, service"),
    };
    println!("{found}");
}

fn endpoint(policy: &str) -> Value {
    let (engine, size) = (Engine::new(1), Size::of_one_service(ENDPOINTS));
    engine.publish(&plan(size, policy), Duration::ZERO).expect("the plan is one");
    let found = addresses(0, ENDPOINTS, policy);
    kept(ENDPOINTS, || engine.resolve(&service_name(0), 1, &found, Duration::ZERO).expect("it is known"))
}

/// Of an endpoint that was called, above one that was not.
fn used(policy: &str) -> Value {
    let (engine, size) = (Engine::new(1), Size::of_one_service(ENDPOINTS));
    engine.publish(&plan(size, policy), Duration::ZERO).expect("the plan is one");
    engine.resolve(&service_name(0), 1, &addresses(0, ENDPOINTS, policy), Duration::ZERO).expect("it is known");
    let name = service_name(0);
    let request = Request {
        authority: &name,
        method: "GET",
        path: "/",
        deadline: None,
        timeout: None,
        retries: None,
        hedge: None,
        zone: None,
        key: None,
        peer: None,
        labels: None,
        is_standby: false,
        is_idempotent: None,
        is_replayable: true,
        layer: 0,
    };
    let mut seen = vec![false; ENDPOINTS];
    let now = Duration::from_secs(100);
    let call = |seen: &mut Vec<bool>| {
        let mut call = engine.begin(&request, &Vec::new(), now).expect("it is let in");
        let Ok(Next::Send { token, place, .. }) = call.next(now) else { panic!("no endpoint") };
        call.head(token, Outcome::Response, 200, Pushback::Unsaid, now).expect("it was sent");
        call.finish(token, Outcome::Response, now).expect("it was answered");
        seen[place as usize] = true;
    };
    // The Service's own counters are there by then.
    call(&mut seen);
    seen.fill(false);
    let (allocated, resident) = (ALLOCATED.current_usage(), rss());
    (0..ENDPOINTS).for_each(|_| call(&mut seen));
    let count = seen.iter().filter(|is_used| **is_used).count() as f64;
    json!({
        "bytes": ALLOCATED.current_usage().saturating_sub(allocated) as f64 / count,
        "rss_bytes": rss().saturating_sub(resident) as f64 / count,
    })
}

/// Two routes, and a list of endpoints that is empty.
fn service() -> Value {
    let (engine, text) = (Engine::new(1), plan(Size { services: SERVICES, routes: 2, endpoints: 0 }, "peak_ewma"));
    kept(SERVICES, || {
        engine.publish(&text, Duration::ZERO).expect("the plan is one");
        (0..SERVICES).for_each(|n| engine.resolve(&service_name(n), 1, &[], Duration::ZERO).expect("it is known"));
    })
}

fn kept(count: usize, make: impl FnOnce()) -> Value {
    let (allocated, resident) = (ALLOCATED.current_usage(), rss());
    make();
    let (bytes, grown) = (ALLOCATED.current_usage().saturating_sub(allocated), rss().saturating_sub(resident));
    json!({"bytes": bytes as f64 / count as f64, "rss_bytes": grown as f64 / count as f64})
}

/// 0 where there is no /proc.
fn rss() -> usize {
    let text = std::fs::read_to_string("/proc/self/statm").unwrap_or_default();
    text.split(' ').nth(1).and_then(|pages| pages.parse::<usize>().ok()).unwrap_or(0) * 4096
}
