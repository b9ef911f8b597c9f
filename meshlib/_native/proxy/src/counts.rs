//! What has happened so far, in numbers? Counters of the data socket, of each listener, and of connections to others.
use std::sync::atomic::{AtomicU64, Ordering};

use mesh_wire::delegated::Reason;

/// Names and values.
pub type Rows = Vec<(&'static str, u64)>;

/// Of one door: the data socket, or a listener.
#[derive(Debug, Default)]
pub struct Door {
    pub opened: AtomicU64,
    pub open: AtomicU64,
    pub refused: AtomicU64,
    pub requests: AtomicU64,
    pub failed: [AtomicU64; Reason::ALL.len()],
    /// Requests and connections that were turned away: malformed, too large, too slow, a flood.
    pub malformed: AtomicU64,
    pub late: AtomicU64,
    pub received: AtomicU64,
    pub written: AtomicU64,
}

/// Of connections that we open.
#[derive(Debug, Default)]
pub struct Upstream {
    pub opened: AtomicU64,
    pub application_opened: AtomicU64,
    pub reused: AtomicU64,
}

pub fn add(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

impl Door {
    pub fn fail(&self, reason: Reason) {
        if let Some(counter) = Reason::ALL.iter().position(|known| *known == reason).and_then(|at| self.failed.get(at))
        {
            add(counter);
        }
    }

    /// (name, value), and the failures by their word.
    pub fn rows(&self) -> (Rows, Rows) {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let plain = vec![
            ("connections_opened", read(&self.opened)),
            ("connections_open", read(&self.open)),
            ("connections_refused", read(&self.refused)),
            ("requests", read(&self.requests)),
            ("malformed", read(&self.malformed)),
            ("late", read(&self.late)),
            ("bytes_received", read(&self.received)),
            ("bytes_written", read(&self.written)),
        ];
        let failed =
            Reason::ALL.iter().zip(&self.failed).map(|(reason, counter)| (reason.word(), read(counter))).collect();
        (plain, failed)
    }
}
