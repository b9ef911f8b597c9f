//! How often, how fast, with which result, for whom? The counters of the inbound way. State of the Service that we are.
//!
//! One series for each (route, method, peer): the labels are bounded by the plan, by the methods in use and by the certificates
//! that were issued, and the table is bounded all the same: what comes after 1000 series is counted as "other". It lives beside the
//! snapshots, so that publishing a plan resets nothing.
use std::collections::HashMap;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::Arc;
use std::time::Duration;

use parking_lot::{Mutex, RwLock};

use crate::observe::Histogram;

pub const MOST_SERIES: usize = 1000;

#[derive(Debug, Default)]
pub struct Series {
    pub route: String,
    pub method: String,
    pub peer: String,
    requests: AtomicU64,
    refused: AtomicU64,
    would_deny: AtomicU64,
    /// Faults of ours, of those that were let in.
    faults: AtomicU64,
    in_flight: AtomicU32,
    latency: Histogram,
    codes: Mutex<Vec<(u16, u64)>>,
}

/// All series together.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Totals {
    /// Calls that were let in and have ended, and those of them that ended with a fault of ours.
    pub calls: u64,
    pub faults: u64,
    pub refused: u64,
}

/// The numbers of one series at one moment.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Reading {
    pub route: String,
    pub method: String,
    pub peer: String,
    pub requests: u64,
    pub refused: u64,
    pub would_deny: u64,
    pub in_flight: u32,
    pub latency_buckets: Vec<u64>,
    pub latency_sum: f64,
    pub codes: Vec<(u16, u64)>,
}

impl Series {
    fn new(route: &str, method: &str, peer: &str) -> Self {
        Self { route: route.to_owned(), method: method.to_owned(), peer: peer.to_owned(), ..Self::default() }
    }

    fn is(&self, route: &str, method: &str, peer: &str) -> bool {
        self.route == route && self.method == method && self.peer == peer
    }

    /// A request was refused: it has a code, and no latency, which would be that of our own decision.
    pub fn refuse(&self, code: u16) {
        self.requests.fetch_add(1, Ordering::Relaxed);
        self.refused.fetch_add(1, Ordering::Relaxed);
        self.count(code);
    }

    pub fn begin(&self, would_deny: bool) {
        self.in_flight.fetch_add(1, Ordering::Relaxed);
        if would_deny {
            self.would_deny.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// A request ended: with a code and a duration, or (None) unseen.
    pub fn end(&self, code: u16, took: Option<Duration>) {
        self.in_flight.fetch_sub(1, Ordering::Relaxed);
        self.requests.fetch_add(1, Ordering::Relaxed);
        if let Some(took) = took {
            self.latency.note(took);
        }
        if is_fault(code) {
            self.faults.fetch_add(1, Ordering::Relaxed);
        }
        self.count(code);
    }

    /// A request that was let in was refused after all, by a judge outside.
    pub fn veto(&self, code: u16) {
        self.refused.fetch_add(1, Ordering::Relaxed);
        self.end(code, None);
    }

    fn count(&self, code: u16) {
        let mut codes = self.codes.lock();
        match codes.iter_mut().find(|(known, _)| *known == code) {
            Some((_, count)) => *count += 1,
            None => codes.push((code, 1)),
        }
    }

    fn read(&self) -> Reading {
        let (latency_buckets, latency_sum) = self.latency.read();
        let mut codes = self.codes.lock().clone();
        codes.sort_unstable();
        Reading {
            route: self.route.clone(),
            method: self.method.clone(),
            peer: self.peer.clone(),
            requests: self.requests.load(Ordering::Relaxed),
            refused: self.refused.load(Ordering::Relaxed),
            would_deny: self.would_deny.load(Ordering::Relaxed),
            in_flight: self.in_flight.load(Ordering::Relaxed),
            latency_buckets,
            latency_sum,
            codes,
        }
    }
}

/// All series of a process. Found by a hash of their labels; each bucket holds those (in practice one) with that hash.
#[derive(Debug, Default)]
pub struct Table {
    hasher: ahash::RandomState,
    rows: RwLock<Rows>,
}

#[derive(Debug, Default)]
struct Rows {
    count: usize,
    series: HashMap<u64, Vec<Arc<Series>>, ahash::RandomState>,
    /// Takes what comes after the table is full.
    other: Option<Arc<Series>>,
}

impl Table {
    pub fn series(&self, route: &str, method: &str, peer: &str) -> Arc<Series> {
        let hash = self.hasher.hash_one((route, method, peer));
        let known = |bucket: &Vec<Arc<Series>>| bucket.iter().find(|series| series.is(route, method, peer)).cloned();
        if let Some(series) = self.rows.read().series.get(&hash).and_then(known) {
            return series;
        }
        let mut rows = self.rows.write();
        if let Some(series) = rows.series.get(&hash).and_then(known) {
            return series;
        }
        if rows.count >= MOST_SERIES {
            return Arc::clone(rows.other.get_or_insert_with(|| Arc::new(Series::new(OTHER, OTHER, OTHER))));
        }
        let series = Arc::new(Series::new(route, method, peer));
        rows.count += 1;
        rows.series.entry(hash).or_default().push(Arc::clone(&series));
        series
    }

    pub fn read(&self) -> Vec<Reading> {
        let rows = self.rows.read();
        let mut readings: Vec<Reading> =
            rows.series.values().flatten().chain(&rows.other).map(|series| series.read()).collect();
        readings.sort_unstable_by(|a, b| (&a.route, &a.method, &a.peer).cmp(&(&b.route, &b.method, &b.peer)));
        readings
    }

    pub fn totals(&self) -> Totals {
        let rows = self.rows.read();
        rows.series.values().flatten().chain(&rows.other).fold(Totals::default(), |sum, series| {
            let read = |count: &AtomicU64| count.load(Ordering::Relaxed);
            let refused = read(&series.refused);
            Totals {
                calls: sum.calls + read(&series.requests).saturating_sub(refused),
                faults: sum.faults + read(&series.faults),
                refused: sum.refused + refused,
            }
        })
    }

    pub fn clear(&self) {
        *self.rows.write() = Rows::default();
    }
}

/// 5xx, or what stands for it among the codes of gRPC: unknown, deadline exceeded, unimplemented, internal, unavailable, data loss.
fn is_fault(code: u16) -> bool {
    code >= 500 || matches!(code, 2 | 4 | 12..=15)
}

const OTHER: &str = "other";

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn the_table_is_bounded() {
        let table = Table::default();
        for n in 0..3000 {
            table.series("", "GET", &format!("spiffe://td/{n}")).refuse(403);
        }
        let readings = table.read();
        let other = readings.iter().find(|reading| reading.peer == OTHER).unwrap();
        assert_eq!((readings.len(), other.requests, other.refused), (MOST_SERIES + 1, 2000, 2000));
    }

    #[test]
    fn a_series_is_found_again() {
        let table = Table::default();
        assert!(Arc::ptr_eq(&table.series("a", "GET", ""), &table.series("a", "GET", "")));
        assert!(!Arc::ptr_eq(&table.series("a", "GET", ""), &table.series("", "GET", "a")));
    }
}
