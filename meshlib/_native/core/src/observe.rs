//! What happened, and why? Counters and histograms of Services and Endpoints, and the record that each decision leaves.
//!
//! Fixed buckets as atomics: a histogram of the OpenTelemetry SDK costs microseconds of Python under a lock for each call. The
//! record is kept with the call and formatted only when somebody asks. It does not export anything: Python does, off the path.
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::OnceLock;
use std::time::Duration;

use parking_lot::Mutex;

/// Upper bounds in seconds; the buckets of OpenTelemetry's HTTP and RPC duration metrics. A last bucket takes the rest.
pub const BOUNDS: [f64; 14] = [0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0];

#[derive(Debug, Default)]
#[repr(C)]
pub struct Histogram {
    nanos: AtomicU64,
    buckets: [AtomicU64; BOUNDS.len() + 1],
}

impl Histogram {
    pub fn note(&self, took: Duration) {
        let seconds = took.as_secs_f64();
        let place = BOUNDS.iter().position(|bound| seconds <= *bound).unwrap_or(BOUNDS.len());
        if let Some(bucket) = self.buckets.get(place) {
            bucket.fetch_add(1, Ordering::Relaxed);
        }
        self.nanos.fetch_add(u64::try_from(took.as_nanos()).unwrap_or(u64::MAX), Ordering::Relaxed);
    }

    /// Counts per bucket (not cumulative), and the sum in seconds.
    pub fn read(&self) -> (Vec<u64>, f64) {
        let counts = self.buckets.iter().map(|b| b.load(Ordering::Relaxed)).collect();
        (counts, self.nanos.load(Ordering::Relaxed) as f64 / 1e9)
    }
}

/// What is counted for an Endpoint (attempts, as the wire saw them) and for a Service (calls, as the caller saw them). Made at the
/// first call, so that 50,000 endpoints of which a process uses 50 cost 50.
#[derive(Debug, Default)]
pub struct Counters(OnceLock<Box<Counts>>);

/// In this order in memory: what the ordinary call touches stands in one line of the cache, and is not there yet when it is asked for.
#[derive(Debug, Default)]
#[repr(C)]
struct Counts {
    codes: Mutex<Codes>,
    requests: AtomicU64,
    latency: Histogram,
    failures: AtomicU64,
    retries: AtomicU64,
    ejections: AtomicU64,
}

/// Calls by status. Most have one status, which is kept in place.
#[derive(Debug, Default)]
struct Codes {
    first: u16,
    count: u64,
    others: Vec<(u16, u64)>,
}

impl Codes {
    fn note(&mut self, status: u16) {
        if self.count == 0 || self.first == status {
            (self.first, self.count) = (status, self.count + 1);
            return;
        }
        match self.others.iter_mut().find(|(code, _)| *code == status) {
            Some((_, count)) => *count += 1,
            None => self.others.push((status, 1)),
        }
    }

    fn read(&self) -> Vec<(u16, u64)> {
        let first = Some((self.first, self.count)).filter(|(_, count)| *count > 0);
        let mut codes: Vec<(u16, u64)> = first.into_iter().chain(self.others.iter().copied()).collect();
        codes.sort_unstable();
        codes
    }
}

impl Counters {
    fn counts(&self) -> &Counts {
        self.0.get_or_init(Box::default)
    }

    pub fn requests(&self) -> u64 {
        self.0.get().map_or(0, |counts| counts.requests.load(Ordering::Relaxed))
    }

    pub fn retry(&self) {
        self.counts().retries.fetch_add(1, Ordering::Relaxed);
    }

    pub fn ejection(&self) {
        self.counts().ejections.fetch_add(1, Ordering::Relaxed);
    }

    /// A finished call or attempt: its status (0 = none came) and how long it took to the head.
    pub fn note(&self, status: u16, is_failure: bool, took: Duration) {
        let counts = self.counts();
        counts.requests.fetch_add(1, Ordering::Relaxed);
        if is_failure {
            counts.failures.fetch_add(1, Ordering::Relaxed);
        }
        counts.latency.note(took);
        counts.codes.lock().note(status);
    }

    pub fn read(&self) -> Reading {
        let Some(counts) = self.0.get() else {
            return Reading { latency_buckets: vec![0; BOUNDS.len() + 1], ..Reading::default() };
        };
        let load = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let (latency_buckets, latency_sum) = counts.latency.read();
        let codes = counts.codes.lock().read();
        Reading {
            requests: load(&counts.requests),
            failures: load(&counts.failures),
            retries: load(&counts.retries),
            ejections: load(&counts.ejections),
            latency_buckets,
            latency_sum,
            codes,
        }
    }
}

#[derive(Debug, Clone, Default, PartialEq)]
pub struct Reading {
    pub requests: u64,
    pub failures: u64,
    pub retries: u64,
    pub ejections: u64,
    pub latency_buckets: Vec<u64>,
    pub latency_sum: f64,
    pub codes: Vec<(u16, u64)>,
}

#[cfg(test)]
mod tests {
    #![allow(clippy::indexing_slicing)]
    use super::*;

    #[test]
    fn a_value_on_a_bound_belongs_below_it() {
        let histogram = Histogram::default();
        histogram.note(Duration::from_millis(5));
        histogram.note(Duration::from_secs(60));
        let (counts, sum) = histogram.read();
        assert_eq!((counts[0], counts[BOUNDS.len()], sum), (1, 1, 60.005));
    }

    #[test]
    fn codes_are_counted_apart() {
        let counters = Counters::default();
        counters.note(503, true, Duration::ZERO);
        counters.note(200, false, Duration::ZERO);
        counters.note(200, false, Duration::ZERO);
        let reading = counters.read();
        assert_eq!((reading.requests, reading.failures, reading.codes), (3, 1, vec![(200, 2), (503, 1)]));
    }
}
