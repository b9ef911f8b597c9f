//! How did the handshakes end, and what became of the tickets? Counters that outlive a generation.
//!
//! A rotation makes new TLS objects while handshakes of the old ones are still under way. So the counters are shared by all
//! generations of one side, and nothing that ends late is lost. They are read, and decide nothing.
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::Arc;

/// A number with its name, as Python gets it.
pub type Count = (&'static str, u64);

/// Why a handshake failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Failed {
    /// The peer did not prove to be who it must be.
    Identity,
    /// The peer refused our certificate.
    Refused,
    /// It speaks no TLS, or none that we speak.
    Protocol,
    /// It was broken off in the middle, by the peer or by us.
    Lost,
}

/// Handshakes of one side, by how they ended.
#[derive(Clone, Debug, Default)]
pub struct Handshakes(Arc<HandshakeCounters>);

#[derive(Debug, Default)]
struct HandshakeCounters {
    full: AtomicU64,
    resumed: AtomicU64,
    identity: AtomicU64,
    refused: AtomicU64,
    protocol: AtomicU64,
    lost: AtomicU64,
}

impl Handshakes {
    pub fn succeeded(&self, is_resumed: bool) {
        add(if is_resumed { &self.0.resumed } else { &self.0.full });
    }

    pub fn failed(&self, why: Failed) {
        add(match why {
            Failed::Identity => &self.0.identity,
            Failed::Refused => &self.0.refused,
            Failed::Protocol => &self.0.protocol,
            Failed::Lost => &self.0.lost,
        });
    }

    pub fn counts(&self) -> [Count; 3] {
        let failed = self.failures().iter().map(|(_, count)| count).sum();
        [("full", read(&self.0.full)), ("resumed", read(&self.0.resumed)), ("failed", failed)]
    }

    pub fn failures(&self) -> [Count; 4] {
        [
            ("failed_identity", read(&self.0.identity)),
            ("failed_refused", read(&self.0.refused)),
            ("failed_protocol", read(&self.0.protocol)),
            ("failed_lost", read(&self.0.lost)),
        ]
    }
}

/// Tickets won as a client, by what became of them.
#[derive(Clone, Debug, Default)]
pub struct WonCounts(Arc<WonCounters>);

#[derive(Debug, Default)]
struct WonCounters {
    stored: AtomicU64,
    used: AtomicU64,
    expired: AtomicU64,
    evicted: AtomicU64,
}

impl WonCounts {
    pub fn stored(&self) {
        add(&self.0.stored);
    }

    /// Offered to a server, which may take it or not.
    pub fn used(&self) {
        add(&self.0.used);
    }

    pub fn expired(&self) {
        add(&self.0.expired);
    }

    pub fn evicted(&self, count: usize) {
        self.0.evicted.fetch_add(count as u64, Ordering::Relaxed);
    }

    pub fn counts(&self) -> [Count; 4] {
        [
            ("tickets_stored", read(&self.0.stored)),
            ("tickets_used", read(&self.0.used)),
            ("tickets_expired", read(&self.0.expired)),
            ("tickets_evicted", read(&self.0.evicted)),
        ]
    }
}

fn add(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

fn read(counter: &AtomicU64) -> u64 {
    counter.load(Ordering::Relaxed)
}
