//! May this call come in, and what is known of it? The inbound way, the mirror of `client`:
//!
//! ```text
//! observe > secure > admit > route > handle
//! ```
//!
//! `begin` goes the way down and answers with an `Entry`; the driver hands the call to the application if its status is 0, and
//! `finish` goes the way back. A refusal is counted at once and holds nothing. An entry pins the snapshot of the plan with which it
//! began. Before the first plan is published everything is refused: no plan is not an empty plan.
//!
//! What a mode makes of a verdict stands in `Mode::enforces` and nowhere else. Malformed requests, spent deadlines and full houses
//! are refused in every mode: a mode is about trust. It does no I/O and reads no clock.
use std::borrow::Cow;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::Arc;
use std::time::Duration;

use parking_lot::RwLock;

use crate::admit::permits::InFlight;
use crate::secure::authorize::{is_grpc_method, is_method, Question, Verdict};
use crate::secure::path::{canonical, Path};

mod entry;
mod headers;
mod plan;
mod refusal;
mod series;

pub use headers::{HeaderFault, Headers};
pub use plan::{Mode, Snapshot};
pub use refusal::Refusal;
pub use series::Reading;
use series::{Series, Table};

/// A longer target is refused before anything looks at it.
pub const LONGEST_TARGET: usize = 8192;

/// All inbound decisions of one process.
#[derive(Debug, Default)]
pub struct Gate {
    state: Arc<State>,
}

#[derive(Debug, Default)]
struct State {
    snapshot: RwLock<Option<Arc<Snapshot>>>,
    in_flight: InFlight,
    /// Counts forks: permits of another generation are not ours to give back.
    generation: AtomicU32,
    table: Table,
}

/// A request as the driver sees it. `peer` counts only with `is_tls`: an identity comes from the connection and from nowhere else.
#[derive(Debug)]
pub struct Arrival<'a> {
    pub method: &'a str,
    pub target: &'a [u8],
    pub headers: &'a Headers,
    pub peer: Option<&'a str>,
    pub is_tls: bool,
    pub now: Duration,
    /// The absolute end, where the driver knows it better than the headers.
    pub deadline: Option<Duration>,
}

/// One call on its way in.
#[derive(Debug)]
pub struct Entry {
    state: Arc<State>,
    snapshot: Option<Arc<Snapshot>>,
    series: Option<Arc<Series>>,
    is_grpc: bool,
    is_tls: bool,
    method: Cow<'static, str>,
    peer: Option<String>,
    path: Option<Path>,
    route: Option<usize>,
    verdict: Option<Verdict>,
    refusal: Option<Refusal>,
    begun: Duration,
    deadline: Option<Duration>,
    layer: u32,
    generation: u32,
    is_done: AtomicBool,
    /// A call that its handler made has failed for good.
    is_spent: AtomicBool,
}

impl Gate {
    /// Take a plan for every request from now on. It was compiled before (`Snapshot::compile`), so that a bad one changes nothing.
    pub fn publish(&self, snapshot: Snapshot) {
        *self.state.snapshot.write() = Some(Arc::new(snapshot));
    }

    pub fn begin(&self, arrival: &Arrival<'_>) -> Entry {
        let mut entry = self.entry(arrival.method, arrival.peer, arrival.is_tls, arrival.now);
        entry.layer = arrival.headers.layer();
        let deadline =
            arrival.deadline.or_else(|| arrival.headers.remaining().map(|left| arrival.now.saturating_add(left)));
        let refusal = entry.secure(arrival).or_else(|| entry.authorize()).or_else(|| entry.admit(deadline));
        entry.settle(refusal)
    }

    /// The same for gRPC, whose method is the path: exact, or refused.
    pub fn begin_grpc(
        &self,
        method: &str,
        peer: Option<&str>,
        is_tls: bool,
        now: Duration,
        deadline: Option<Duration>,
    ) -> Entry {
        let mut entry = self.entry("POST", peer, is_tls, now);
        entry.is_grpc = true;
        let refusal = entry.secure_grpc(method).or_else(|| entry.authorize()).or_else(|| entry.admit(deadline));
        entry.settle(refusal)
    }

    /// In a forked child nothing of the parent's is under way, and what it counted is the parent's to tell.
    pub fn reset(&self) {
        self.state.generation.fetch_add(1, Ordering::Relaxed);
        self.state.in_flight.clear();
        self.state.table.clear();
    }

    pub fn service(&self) -> String {
        self.state.snapshot.read().as_ref().map_or(String::new(), |snapshot| snapshot.service.clone())
    }

    pub fn readings(&self) -> Vec<Reading> {
        self.state.table.read()
    }

    fn entry(&self, method: &str, peer: Option<&str>, is_tls: bool, now: Duration) -> Entry {
        Entry {
            state: Arc::clone(&self.state),
            snapshot: self.state.snapshot.read().clone(),
            series: None,
            is_grpc: false,
            is_tls,
            method: interned(method),
            peer: peer.filter(|peer| is_tls && !peer.is_empty()).map(str::to_owned),
            path: None,
            route: None,
            verdict: None,
            refusal: None,
            begun: now,
            deadline: None,
            layer: 0,
            generation: self.state.generation.load(Ordering::Relaxed),
            is_done: AtomicBool::new(false),
            is_spent: AtomicBool::new(false),
        }
    }
}

/// The methods that get a label of their own; all the others share one.
const METHODS: [&str; 8] = ["GET", "POST", "PUT", "DELETE", "PATCH", "HEAD", "OPTIONS", "CONNECT"];
const OTHER_METHOD: &str = "_OTHER";

fn interned(method: &str) -> Cow<'static, str> {
    match METHODS.iter().find(|known| **known == method) {
        Some(known) => Cow::Borrowed(known),
        None => Cow::Owned(method.to_owned()),
    }
}

// The way down, phase by phase: None is "go on".
impl Entry {
    fn secure(&mut self, arrival: &Arrival<'_>) -> Option<Refusal> {
        let Some(snapshot) = &self.snapshot else { return Some(Refusal::NotReady) };
        if arrival.target.len() > LONGEST_TARGET {
            return Some(Refusal::TargetTooLong);
        }
        if !is_method(arrival.method) {
            return Some(Refusal::Method);
        }
        if let Some(fault) = arrival.headers.fault() {
            return Some(Refusal::Headers(fault));
        }
        match canonical(arrival.target, arrival.method, arrival.headers.host_value(), snapshot.is_strict) {
            Ok(path) => {
                self.route = snapshot.route(path.text());
                self.path = Some(path);
            }
            Err(error) => return Some(Refusal::Path(error)),
        }
        // TRACE gives the caller back what proxies added on the way, credentials too.
        // CONNECT asks for a tunnel, which no application behind the mesh means by a 200.
        matches!(arrival.method, "TRACE" | "CONNECT").then_some(Refusal::Trace)
    }

    fn secure_grpc(&mut self, method: &str) -> Option<Refusal> {
        let Some(snapshot) = &self.snapshot else { return Some(Refusal::NotReady) };
        if !is_grpc_method(method) {
            return Some(Refusal::GrpcMethod);
        }
        self.route = snapshot.route(method);
        self.path = Some(Path::exact(method));
        None
    }

    fn authorize(&mut self) -> Option<Refusal> {
        let (Some(snapshot), Some(path)) = (&self.snapshot, &self.path) else { return Some(Refusal::NotReady) };
        let verdict = snapshot.rules.judge(&Question { peer: self.peer.as_deref(), method: &self.method, path });
        self.verdict = Some(verdict);
        if !snapshot.mode.enforces() {
            return None;
        }
        // Enforce means mutual TLS: a rule for everybody is one for everybody who proved to be somebody. Who proved nothing may try
        // again with an identity, unless a rule denies this to all the world.
        match (self.peer.is_none(), verdict.is_allowed) {
            (true, true) => Some(Refusal::NoIdentity),
            (true, false) if verdict.rule.is_none() => Some(Refusal::NoIdentity),
            (_, false) => Some(Refusal::Denied),
            (false, true) => None,
        }
    }

    fn admit(&mut self, deadline: Option<Duration>) -> Option<Refusal> {
        let Some(snapshot) = &self.snapshot else { return Some(Refusal::NotReady) };
        self.deadline = deadline.map(|end| end.min(self.begun.saturating_add(headers::LONGEST)));
        if self.deadline.is_some_and(|end| end <= self.begun) {
            return Some(Refusal::Deadline);
        }
        (!self.state.in_flight.enter(snapshot.in_flight)).then_some(Refusal::Limit(snapshot.in_flight))
    }

    fn settle(mut self, refusal: Option<Refusal>) -> Self {
        let peer = self.peer.as_deref().unwrap_or("");
        let method = match (&self.method, &self.path) {
            // A name that no server knows is a label only once the rules let it pass.
            (_, Some(path)) if self.is_grpc && refusal.is_none() => path.text(),
            (Cow::Borrowed(known), _) if !self.is_grpc => known,
            _ => OTHER_METHOD,
        };
        let series = self.state.table.series(self.route(), method, peer);
        match refusal {
            Some(refusal) => {
                series.refuse(if self.is_grpc { refusal.grpc_status() } else { refusal.status() });
                self.is_done = AtomicBool::new(true);
            }
            None => series.begin(self.would_deny()),
        }
        self.refusal = refusal;
        self.series = Some(series);
        self
    }
}

#[cfg(test)]
mod tests;
