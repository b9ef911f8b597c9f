//! What does the engine alone take, in nanoseconds? For `benchmarks/decide.py`, which says what is wanted.
//!
//! `decide call SIZE POLICY SECONDS`, `decide growth ENDPOINTS POLICY SECONDS`, `decide swap WHAT SECONDS`; one JSON object of figures. It
//! measures what `cargo bench` does, but two things by turns in one process, so that a busy machine slows both down, and their ratio holds.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use serde_json::{json, Value};

#[path = "../benches/fixture/mod.rs"]
mod fixture;
use fixture::{addresses, plan, service_name, Mesh, Size, LARGE, SMALL};

/// Calls of one measured block.
const BLOCK: usize = 2_048;
/// Swaps of which the time and the calls are told, at least.
const SWAPS: usize = 5;

fn main() {
    let given: Vec<String> = std::env::args().skip(1).collect();
    let given: Vec<&str> = given.iter().map(String::as_str).collect();
    let seconds = |text: &str| Duration::from_secs_f64(text.parse().expect("seconds"));
    let found = match given[..] {
        ["call", "large", policy, time] => call(LARGE, policy, seconds(time)),
        ["call", "small", policy, time] => call(SMALL, policy, seconds(time)),
        ["growth", endpoints, policy, time] => growth(endpoints.parse().expect("a number"), policy, seconds(time)),
        ["swap", what, time] => swap(what, seconds(time)),
        _ => panic!(
            "decide call large|small POLICY SECONDS, growth ENDPOINTS POLICY SECONDS, swap routes|endpoints SECONDS"
        ),
    };
    println!("{found}");
}

fn call(size: Size, policy: &str, seconds: Duration) -> Value {
    let mut mesh = Mesh::new(size, policy).warm();
    let end = Instant::now() + seconds;
    let mut blocks = vec![block(&mut mesh)];
    while Instant::now() < end {
        blocks.push(block(&mut mesh));
    }
    json!({"ns": median(&mut blocks)})
}

/// Against ten endpoints, block by block.
fn growth(endpoints: usize, policy: &str, seconds: Duration) -> Value {
    let mut small = Mesh::new(Size::of_one_service(10), policy).warm();
    let mut large = Mesh::new(Size::of_one_service(endpoints), policy).warm();
    let end = Instant::now() + seconds;
    let (mut blocks, mut ratios) = (Vec::new(), Vec::new());
    while blocks.is_empty() || Instant::now() < end {
        let (one, many) = (block(&mut small), block(&mut large));
        blocks.push(many);
        ratios.push(many / one);
    }
    json!({"ns": median(&mut blocks), "growth": median(&mut ratios)})
}

/// One thread calls, another swaps. Calls that met a swap are held against those between the swaps; `ms` is a swap while nobody calls.
fn swap(what: &str, seconds: Duration) -> Value {
    let size = match what {
        "routes" => Size { endpoints: 2, ..LARGE },
        "routes-50k-endpoints" => LARGE,
        "endpoints" => Size::of_one_service(10_000),
        _ => panic!("swap routes|routes-50k-endpoints|endpoints"),
    };
    let mut mesh = Mesh::new(size, "peak_ewma").warm();
    let (engine, known) = (mesh.engine.clone(), calls_known(&mesh));
    // Nothing of the one stands in the other: a plan that hasn't changed would be taken over unread.
    let (text, found) = (plan(size, "peak_ewma"), addresses(0, size.endpoints, "peak_ewma"));
    let other = String::from_utf8_lossy(&text).replace("\"deadline\":15.0", "\"deadline\":16.0").into_bytes();
    assert_ne!(text, other, "the two plans are the same");
    let (is_over, is_swapping) = (AtomicBool::new(false), AtomicBool::new(false));
    let (mut quiet, mut met) = (Vec::new(), Vec::new());
    let swap_once = |version: u64| {
        let (begun, now) = (Instant::now(), Duration::from_secs(1));
        match what {
            "endpoints" => engine.resolve(&service_name(0), version, &found, now).expect("it is known"),
            _ => engine.publish(if version % 2 == 0 { &text } else { &other }, now).expect("the plan is one"),
        }
        begun.elapsed()
    };
    let mut alone: Vec<f64> = (2..2 + SWAPS).map(|version| swap_once(version as u64).as_secs_f64() * 1e3).collect();
    std::thread::scope(|scope| {
        let caller = scope.spawn(|| {
            while !is_over.load(Ordering::Relaxed) {
                let before = is_swapping.load(Ordering::Acquire);
                let begun = Instant::now();
                mesh.call();
                let micros = begun.elapsed().as_nanos() as f64 / 1e3;
                let list = if before || is_swapping.load(Ordering::Acquire) { &mut met } else { &mut quiet };
                list.push(micros);
            }
        });
        let end = Instant::now() + seconds;
        for version in 100.. {
            is_swapping.store(true, Ordering::Release);
            let took = swap_once(version);
            is_swapping.store(false, Ordering::Release);
            std::thread::sleep(took);
            if version >= 100 + SWAPS as u64 && Instant::now() > end {
                break;
            }
        }
        is_over.store(true, Ordering::Relaxed);
        caller.join().expect("it calls");
    });
    assert_eq!(calls_known(&mesh), known + (quiet.len() + met.len()) as u64, "what endpoints had counted is lost");
    let (during, between) = (quantile(&mut met, 0.99), quantile(&mut quiet, 0.99));
    json!({
        "ms": median(&mut alone), "p50_us": median(&mut met), "p99_us": during, "added_us": during - between,
        "most_us": met.last().copied().unwrap_or(0.0),
    })
}

/// Attempts that the endpoints have counted, all together.
fn calls_known(mesh: &Mesh) -> u64 {
    mesh.engine.read(mesh.now).iter().filter(|row| !row.endpoint.is_empty()).map(|row| row.counters.requests).sum()
}

fn block(mesh: &mut Mesh) -> f64 {
    let begun = Instant::now();
    (0..BLOCK).for_each(|_| mesh.call());
    begun.elapsed().as_nanos() as f64 / BLOCK as f64
}

fn median(values: &mut [f64]) -> f64 {
    quantile(values, 0.5)
}

/// Leaves them sorted.
fn quantile(values: &mut [f64], share: f64) -> f64 {
    values.sort_by(f64::total_cmp);
    let place = (values.len() as f64 * share) as usize;
    values.get(place.min(values.len().saturating_sub(1))).copied().unwrap_or(0.0)
}
