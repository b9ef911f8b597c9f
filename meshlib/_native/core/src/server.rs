//! May this call come in, and what is known of it? The inbound way, the mirror of `client`:
//!
//! ```text
//! observe > secure > admit > route > handle
//! ```
//!
//! `begin` goes the way down and answers with an `Entry`: refused (it has a status), waiting for a place (it has a ticket, `wait`), or
//! in, and then the driver hands the call to the application, and `finish` goes the way back. A refusal is counted at once and holds
//! nothing. An entry pins the snapshot of the plan with which it began. Before the first plan is published everything is refused: no
//! plan is not an empty plan.
//!
//! What a mode makes of a verdict stands in `Mode::enforces` and nowhere else. Malformed requests, spent deadlines and full houses
//! are refused in every mode: a mode is about trust. It does no I/O and reads no clock.
use std::borrow::Cow;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicU8, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use parking_lot::{Mutex, RwLock};

use crate::admit::adaptive::Adaptive;
use crate::admit::priority::Priority;
use crate::admit::queue::{Queue, Terms};
use crate::secure::authorize::Verdict;
use crate::secure::jwt::KeySet;
use crate::secure::path::Path;

mod admission;
mod entry;
mod facts;
mod headers;
mod plan;
mod rates;
mod refusal;
mod secure;
mod series;
mod tokens;
mod traffic;
mod wait;

use entry::Phase;
use facts::Facts;
pub use facts::{Listener, Origin};
pub use headers::{HeaderFault, Headers, LoadFormat, Version};
pub use plan::{Mode, OnDisconnect, Snapshot, Xfcc};
use rates::Counts;
pub use refusal::Refusal;
pub use series::Reading;
use series::{Series, Table};
pub use traffic::Observed;
use traffic::Traffic;

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
    queue: Queue,
    adaptive: Adaptive,
    /// Counts forks: places of another generation are not ours to give back.
    generation: AtomicU32,
    table: Table,
    counts: Counts,
    traffic: Traffic,
    /// The keys of each provider of tokens, which come and go beside the plans.
    keys: Mutex<Vec<(String, Arc<KeySet>)>>,
}

/// A request as the driver sees it. `peer` counts only with `is_tls`: an identity comes from the connection and from nowhere else.
#[derive(Debug)]
pub struct Arrival<'a> {
    pub method: &'a str,
    pub target: &'a [u8],
    pub headers: Headers,
    pub peer: Option<&'a str>,
    pub is_tls: bool,
    pub now: Duration,
    /// The absolute end, where the driver knows it better than the headers.
    pub deadline: Option<Duration>,
    pub origin: Origin<'a>,
}

/// The same for gRPC, whose method is its path.
#[derive(Debug)]
pub struct GrpcArrival<'a> {
    pub method: &'a str,
    pub headers: Headers,
    pub peer: Option<&'a str>,
    pub is_tls: bool,
    pub now: Duration,
    pub deadline: Option<Duration>,
    pub origin: Origin<'a>,
    /// The driver parks an entry that has a ticket. Where it can't, the call finds a place at once or is refused.
    pub can_wait: bool,
}

/// What a service tells of its load.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Load {
    pub in_flight: u32,
    /// How many may be; 0 before the first plan.
    pub limit: u32,
    pub waiting: u32,
    /// Calls that were let in and have ended, and how many of them with a fault of ours.
    pub calls: u64,
    pub errors: u64,
    /// Calls that were refused, for whatever reason.
    pub refused: u64,
}

/// One call on its way in.
#[derive(Debug)]
pub struct Entry {
    state: Arc<State>,
    snapshot: Option<Arc<Snapshot>>,
    series: Option<Arc<Series>>,
    is_grpc: bool,
    is_tls: bool,
    listener: Listener,
    method: Cow<'static, str>,
    peer: Option<String>,
    path: Option<Path>,
    route: Option<usize>,
    facts: Option<Box<Facts>>,
    verdict: Option<Verdict>,
    refusal: Option<Refusal>,
    /// Where `paths: redirect` sends the caller.
    location: Option<String>,
    /// It showed a token that is no good, where the rules don't bind.
    is_misled: bool,
    begun: Duration,
    /// How long it was in the process before anybody asked.
    before: Duration,
    deadline: Option<Duration>,
    layer: u32,
    generation: u32,
    load_format: LoadFormat,
    priority: Priority,
    /// It needs no place, and holds none.
    is_probe: bool,
    /// Of one that had to wait, and for how long at most.
    ticket: u64,
    patience: Duration,
    /// Nanoseconds that it did wait.
    waited: AtomicU64,
    /// How many places were taken when it took its own, with it.
    crowd: AtomicU32,
    phase: AtomicU8,
    /// Why it was refused after it had been let in, or after it had waited.
    late: OnceLock<Refusal>,
    /// A call that its handler made has failed for good.
    is_spent: AtomicBool,
}

impl Gate {
    /// Take a plan for every request from now on. It was compiled before (`Snapshot::compile`), so that a bad one changes nothing.
    pub fn publish(&self, snapshot: Snapshot) {
        let keys = self.state.keys.lock();
        if let Some(tokens) = &snapshot.providers {
            for (name, set) in keys.iter() {
                tokens.providers.set_keys(name, Some(Arc::clone(set)));
            }
        }
        *self.state.snapshot.write() = Some(Arc::new(snapshot));
        // There may be more places now, and nobody has to give one back before they are taken.
        self.state.queue.revise(&self.state.terms());
    }

    /// The keys by which a provider's tokens are verified from now on; None: none of them is believed.
    pub fn set_keys(&self, provider: &str, set: Option<KeySet>) {
        let set = set.map(Arc::new);
        let mut keys = self.state.keys.lock();
        keys.retain(|(name, _)| name != provider);
        keys.extend(set.clone().map(|set| (provider.to_owned(), set)));
        if let Some(tokens) = self.state.snapshot.read().as_ref().and_then(|snapshot| snapshot.providers.as_ref()) {
            tokens.providers.set_keys(provider, set);
        }
    }

    /// What reads the header fields of a request, under the policy that the request will be judged by.
    pub fn headers(&self, target: &[u8]) -> Headers {
        Headers::new(target, self.state.snapshot.read().clone())
    }

    pub fn begin(&self, mut arrival: Arrival<'_>) -> Entry {
        let snapshot = arrival.headers.snapshot.take();
        let mut entry = self.entry(snapshot, arrival.method, arrival.peer, arrival.is_tls, arrival.now);
        entry.listener = arrival.origin.listener;
        entry.layer = arrival.headers.layer();
        entry.load_format = arrival.headers.load_format();
        let deadline =
            arrival.deadline.or_else(|| arrival.headers.remaining().map(|left| arrival.now.saturating_add(left)));
        let refusal = entry
            .secure(&arrival)
            .or_else(|| entry.learn(&mut arrival.headers, &arrival.origin, arrival.target))
            .or_else(|| entry.authorize())
            .or_else(|| entry.admit(deadline, arrival.headers.priority(), true));
        entry.settle(refusal)
    }

    /// The same for gRPC, whose method is the path: exact, or refused.
    pub fn begin_grpc(&self, mut arrival: GrpcArrival<'_>) -> Entry {
        let snapshot = arrival.headers.snapshot.take();
        let mut entry = self.entry(snapshot, "POST", arrival.peer, arrival.is_tls, arrival.now);
        entry.is_grpc = true;
        entry.listener = arrival.origin.listener;
        entry.layer = arrival.headers.layer();
        entry.load_format = arrival.headers.load_format();
        let refusal = entry
            .secure_grpc(arrival.method)
            .or_else(|| entry.learn(&mut arrival.headers, &arrival.origin, b""))
            .or_else(|| entry.authorize())
            .or_else(|| entry.admit(arrival.deadline, arrival.headers.priority(), arrival.can_wait));
        entry.settle(refusal)
    }

    /// In a forked child nothing of the parent's is under way, and what it counted is the parent's to tell.
    pub fn reset(&self) {
        self.state.generation.fetch_add(1, Ordering::Relaxed);
        self.state.queue.clear();
        self.state.table.clear();
        self.state.traffic.clear();
    }

    /// The tickets that were called by what gives no answer: by an entry that was dropped or went in vain, by one that crowds
    /// another out, by a plan with more places. Costs nothing where there are none.
    pub fn called(&self) -> Vec<u64> {
        self.state.queue.called()
    }

    pub fn load(&self) -> Load {
        let totals = self.state.table.totals();
        let snapshot = self.state.snapshot.read();
        Load {
            in_flight: self.state.queue.count(),
            limit: snapshot.as_ref().map_or(0, |snapshot| snapshot.admission.limit(&self.state.adaptive)),
            waiting: self.state.queue.waiting(),
            calls: totals.calls,
            errors: totals.faults,
            refused: totals.refused,
        }
    }

    /// The calls that were recorded since the last time, how often each, and how many found no place.
    pub fn drain_traffic(&self) -> (Vec<(Observed, u64)>, u64) {
        self.state.traffic.drain()
    }

    /// The callers with an identity, and what became of their calls, all routes and methods together.
    pub fn edges(&self) -> Vec<Reading> {
        let mut edges: Vec<Reading> = Vec::new();
        let mut readings = self.state.table.read();
        readings.sort_unstable_by(|a, b| a.peer.cmp(&b.peer));
        for reading in readings.into_iter().filter(|reading| reading.peer.starts_with("spiffe://")) {
            match edges.last_mut().filter(|edge| edge.peer == reading.peer) {
                Some(edge) => {
                    edge.requests += reading.requests;
                    edge.refused += reading.refused;
                    edge.would_deny += reading.would_deny;
                }
                None => edges.push(reading),
            }
        }
        edges
    }

    /// How many calls came over TLS without a certificate.
    pub fn anonymous_calls(&self) -> u64 {
        self.state.traffic.anonymous()
    }

    /// From which addresses calls came without TLS, and how often; None stands for the rest.
    pub fn plain_callers(&self) -> Vec<(Option<core::net::IpAddr>, u64)> {
        self.state.traffic.plain()
    }

    pub fn service(&self) -> String {
        self.state.snapshot.read().as_ref().map_or(String::new(), |snapshot| snapshot.service.clone())
    }

    pub fn readings(&self) -> Vec<Reading> {
        self.state.table.read()
    }

    fn entry(
        &self,
        snapshot: Option<Arc<Snapshot>>,
        method: &str,
        peer: Option<&str>,
        is_tls: bool,
        now: Duration,
    ) -> Entry {
        Entry {
            state: Arc::clone(&self.state),
            snapshot,
            series: None,
            is_grpc: false,
            is_tls,
            listener: Listener::Mesh,
            method: interned(method),
            peer: peer.filter(|peer| is_tls && !peer.is_empty()).map(str::to_owned),
            path: None,
            route: None,
            facts: None,
            verdict: None,
            refusal: None,
            location: None,
            is_misled: false,
            begun: now,
            before: Duration::ZERO,
            deadline: None,
            layer: 0,
            generation: self.state.generation.load(Ordering::Relaxed),
            load_format: LoadFormat::Nothing,
            priority: Priority::default(),
            is_probe: false,
            ticket: 0,
            patience: Duration::ZERO,
            waited: AtomicU64::new(0),
            crowd: AtomicU32::new(0),
            // Until it is settled it holds nothing that could be given back.
            phase: AtomicU8::new(Phase::Over as u8),
            late: OnceLock::new(),
            is_spent: AtomicBool::new(false),
        }
    }
}

impl State {
    /// By the newest plan, whoever asks.
    fn terms(&self) -> Terms {
        let snapshot = self.snapshot.read();
        snapshot.as_ref().map_or(Terms::default(), |snapshot| snapshot.admission.terms(&self.adaptive))
    }

    fn give_back(&self, now: Option<Duration>) {
        self.queue.give_back(now, || self.terms());
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

impl Entry {
    fn settle(mut self, refusal: Option<Refusal>) -> Self {
        let peer = self.peer.as_deref().unwrap_or("");
        let is_known = self.route.is_some() || self.verdict.is_some_and(|verdict| verdict.is_allowed);
        let method = match (&self.method, &self.path) {
            // A name that no server knows is a label only once the rules let it pass, or would: a mode lets in what nobody knows.
            (_, Some(path)) if self.is_grpc && refusal.is_none() && is_known => path.text(),
            (Cow::Borrowed(known), _) if !self.is_grpc => known,
            _ => OTHER_METHOD,
        };
        let series = self.state.table.series(self.route(), method, peer);
        match refusal {
            Some(refusal) => {
                series.refuse(if self.is_grpc { refusal.grpc_status() } else { refusal.status() });
            }
            None if self.ticket != 0 => self.phase = AtomicU8::new(Phase::Waits as u8),
            None => {
                self.phase = AtomicU8::new(Phase::In as u8);
                series.begin(self.would_deny());
            }
        }
        self.refusal = refusal;
        self.series = Some(series);
        self
    }
}

#[cfg(test)]
mod tests;
