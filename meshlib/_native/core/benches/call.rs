//! What does one call cost the engine, and how does that grow with the mesh?
//!
//! `begin`, `next`, `head` and `finish` in a row, without Python. `cargo bench -p mesh-core`; the same by turns, with goals, is printed by
//! `python -m benchmarks decide`.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]
use criterion::{criterion_group, criterion_main, BenchmarkId, Criterion};

mod fixture;
use fixture::{Mesh, Size, LARGE, POLICIES, SMALL};

fn call(criterion: &mut Criterion) {
    for (name, size) in [("call/10k-routes-50k-endpoints", LARGE), ("call/1-route-10-endpoints", SMALL)] {
        let mut mesh = Mesh::new(size, "peak_ewma").warm();
        criterion.bench_function(name, |bencher| bencher.iter(|| mesh.call()));
    }
}

fn growth(criterion: &mut Criterion) {
    for policy in POLICIES {
        let mut group = criterion.benchmark_group(format!("growth/{policy}"));
        for endpoints in [10, 1_000, 10_000, 100_000] {
            let mut mesh = Mesh::new(Size::of_one_service(endpoints), policy).warm();
            group.bench_function(BenchmarkId::from_parameter(endpoints), |bencher| bencher.iter(|| mesh.call()));
        }
    }
}

criterion_group!(benches, call, growth);
criterion_main!(benches);
