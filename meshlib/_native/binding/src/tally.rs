//! Two numbers to which many threads add: what a call of gRPC sent and received. Python would need a lock for them in every call.
use std::sync::atomic::{AtomicU64, Ordering};

use pyo3::prelude::*;

pub fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_class::<Tally>()
}

#[pyclass(frozen, module = "meshlib._native._core")]
#[derive(Default)]
pub struct Tally {
    sent: AtomicU64,
    received: AtomicU64,
}

#[pymethods]
impl Tally {
    #[new]
    fn new() -> Self {
        Self::default()
    }

    fn add(&self, sent: u64, received: u64) {
        self.sent.fetch_add(sent, Ordering::Relaxed);
        self.received.fetch_add(received, Ordering::Relaxed);
    }

    fn read(&self) -> (u64, u64) {
        (self.sent.load(Ordering::Relaxed), self.received.load(Ordering::Relaxed))
    }
}
