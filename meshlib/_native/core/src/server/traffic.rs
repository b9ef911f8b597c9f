//! Who called what, and who still comes in plain? What a team looks at before it turns a mode up.
//!
//! Two bounded tables beside the snapshots: calls by caller, method and path, kept only where the plan says `record`, and taken out
//! by whoever writes them down; and the addresses of callers without TLS, with how often they came. Neither holds a query, a header
//! or a body.
use core::net::IpAddr;
use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::Mutex;

use super::rates::network;

/// Different calls between two look-ins; what comes after is counted as lost.
const MOST_CALLS: usize = 20_000;
/// Bytes of them, and of one: callers choose the paths, and fill what there is.
const MOST_BYTES: usize = 8 * 1024 * 1024;
const LONGEST: usize = 1024;
/// Addresses of plain callers; the others share a row.
const MOST_PLAIN: usize = 1000;

#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Observed {
    pub peer: String,
    pub method: String,
    pub path: String,
    /// The template of the route of ours that it took; "" for none.
    pub route: String,
    /// `iss/sub` of a good token.
    pub principal: String,
    pub is_allowed: bool,
    pub is_grpc: bool,
}

#[derive(Debug, Default)]
pub(super) struct Traffic {
    calls: Mutex<Calls>,
    plain: Mutex<HashMap<Option<IpAddr>, u64>>,
    /// Calls over TLS by callers without a certificate.
    anonymous: AtomicU64,
}

#[derive(Debug, Default)]
struct Calls {
    counts: HashMap<Observed, u64>,
    bytes: usize,
    lost: u64,
}

impl Observed {
    fn size(&self) -> usize {
        [&self.peer, &self.method, &self.path, &self.route, &self.principal].into_iter().map(String::len).sum()
    }
}

impl Traffic {
    pub fn note(&self, call: Observed) {
        let mut calls = self.calls.lock();
        if let Some(count) = calls.counts.get_mut(&call) {
            *count += 1;
            return;
        }
        let size = call.size();
        if size > LONGEST || calls.counts.len() >= MOST_CALLS || calls.bytes + size > MOST_BYTES {
            calls.lost += 1;
        } else {
            calls.bytes += size;
            calls.counts.insert(call, 1);
        }
    }

    /// What was noted since the last time, and how much found no place.
    pub fn drain(&self) -> (Vec<(Observed, u64)>, u64) {
        let taken = std::mem::take(&mut *self.calls.lock());
        let mut calls: Vec<_> = taken.counts.into_iter().collect();
        calls.sort_unstable();
        (calls, taken.lost)
    }

    pub fn note_anonymous(&self) {
        self.anonymous.fetch_add(1, Ordering::Relaxed);
    }

    pub fn anonymous(&self) -> u64 {
        self.anonymous.load(Ordering::Relaxed)
    }

    pub fn note_plain(&self, source: Option<IpAddr>) {
        let source = source.map(network);
        let mut plain = self.plain.lock();
        let known = if plain.len() < MOST_PLAIN || plain.contains_key(&source) { source } else { None };
        *plain.entry(known).or_default() += 1;
    }

    pub fn plain(&self) -> Vec<(Option<IpAddr>, u64)> {
        let mut plain: Vec<_> = self.plain.lock().iter().map(|(address, count)| (*address, *count)).collect();
        plain.sort_unstable();
        plain
    }

    pub fn clear(&self) {
        *self.calls.lock() = Calls::default();
        self.plain.lock().clear();
        self.anonymous.store(0, Ordering::Relaxed);
    }
}
