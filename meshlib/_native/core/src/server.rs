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

use parking_lot::{Mutex, RwLock};

use crate::admit::permits::InFlight;
use crate::secure::address::{self, client_of};
use crate::secure::authorize::{is_grpc_method, is_method, Verdict};
use crate::secure::jwt::{KeySet, PlaceKind, TokenFault};
use crate::secure::path::profile::redirect;
use crate::secure::path::{canonical, Path};

mod entry;
mod facts;
mod headers;
mod plan;
mod rates;
mod refusal;
mod series;
mod tokens;
mod traffic;

use facts::Facts;
pub use facts::Origin;
pub use headers::{HeaderFault, Headers, Version};
pub use plan::{Mode, Snapshot, Xfcc};
use plan::{Paths, Tokens};
use rates::{Caller, Counts};
pub use refusal::Refusal;
pub use series::Reading;
use series::{Series, Table};
use tokens::Found;
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
    in_flight: InFlight,
    /// Counts forks: permits of another generation are not ours to give back.
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
    facts: Option<Box<Facts>>,
    verdict: Option<Verdict>,
    refusal: Option<Refusal>,
    /// Where `paths: redirect` sends the caller.
    location: Option<String>,
    /// It showed a token that is no good, where the rules don't bind.
    is_misled: bool,
    begun: Duration,
    deadline: Option<Duration>,
    layer: u32,
    generation: u32,
    is_done: AtomicBool,
    /// A call that its handler made has failed for good.
    is_spent: AtomicBool,
    /// The authorizer that a CUSTOM rule names said no.
    is_vetoed: AtomicBool,
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
        entry.layer = arrival.headers.layer();
        let deadline =
            arrival.deadline.or_else(|| arrival.headers.remaining().map(|left| arrival.now.saturating_add(left)));
        let refusal = entry
            .secure(&arrival)
            .or_else(|| entry.learn(&mut arrival.headers, &arrival.origin, arrival.target))
            .or_else(|| entry.authorize())
            .or_else(|| entry.admit(deadline));
        entry.settle(refusal)
    }

    /// The same for gRPC, whose method is the path: exact, or refused.
    pub fn begin_grpc(&self, mut arrival: GrpcArrival<'_>) -> Entry {
        let snapshot = arrival.headers.snapshot.take();
        let mut entry = self.entry(snapshot, "POST", arrival.peer, arrival.is_tls, arrival.now);
        entry.is_grpc = true;
        let refusal = entry
            .secure_grpc(arrival.method)
            .or_else(|| entry.learn(&mut arrival.headers, &arrival.origin, b""))
            .or_else(|| entry.authorize())
            .or_else(|| entry.admit(arrival.deadline));
        entry.settle(refusal)
    }

    /// In a forked child nothing of the parent's is under way, and what it counted is the parent's to tell.
    pub fn reset(&self) {
        self.state.generation.fetch_add(1, Ordering::Relaxed);
        self.state.in_flight.clear();
        self.state.table.clear();
        self.state.traffic.clear();
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
            deadline: None,
            layer: 0,
            generation: self.state.generation.load(Ordering::Relaxed),
            // Until it is settled it holds nothing that could be given back.
            is_done: AtomicBool::new(true),
            is_spent: AtomicBool::new(false),
            is_vetoed: AtomicBool::new(false),
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
        match canonical(arrival.target, arrival.method, arrival.headers.host_value(), snapshot.paths == Paths::Strict) {
            Ok(path) => {
                if snapshot.paths == Paths::Redirect {
                    self.location = redirect(arrival.target, &path);
                    if self.location.is_some() {
                        return Some(Refusal::Redirect);
                    }
                }
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

    /// Gathers what the policy asks about, and judges a token, if one was shown.
    fn learn(&mut self, headers: &mut Headers, origin: &Origin<'_>, target: &[u8]) -> Option<Refusal> {
        let snapshot = Arc::clone(self.snapshot.as_ref()?);
        if !self.is_tls {
            self.state.traffic.note_plain(address::parse(origin.source));
        } else if self.peer.is_none() {
            self.state.traffic.note_anonymous();
        }
        if !snapshot.has_questions {
            return None;
        }
        let source = address::parse(origin.source);
        let is_believed = snapshot.proxies.is_trusted(source, self.peer.as_deref());
        let forwarded: Vec<&[u8]> =
            headers.kept.iter().filter(|(name, _)| &**name == "x-forwarded-for").map(|(_, value)| &value[..]).collect();
        let mut facts = Facts {
            host: headers.host_value().and_then(|host| std::str::from_utf8(host).ok()).map(str::to_owned),
            port: origin.port,
            source,
            remote: client_of(source, is_believed, &forwarded, snapshot.proxies.hops()),
            sni: origin.sni.into(),
            is_believed,
            // An address is no identity: it is believed about addresses, and about nothing else.
            is_from_proxy: snapshot.proxies.is_trusted(None, self.peer.as_deref()),
            ..Facts::default()
        };
        facts.headers = std::mem::take(&mut headers.kept);
        let refusal =
            snapshot.providers.as_ref().and_then(|tokens| self.verify(tokens, &mut facts, target, origin.wall));
        self.facts = Some(Box::new(facts));
        // A mode is about trust: where the rules don't bind, a bad token is none, and reported.
        self.is_misled = refusal.is_some();
        refusal.filter(|_| snapshot.mode.enforces())
    }

    fn verify(&self, tokens: &Tokens, facts: &mut Facts, target: &[u8], wall: f64) -> Option<Refusal> {
        let (token, place) = match tokens::find(&tokens.places, &facts.headers, target) {
            Found::Nothing => return None,
            Found::Several => return Some(Refusal::Token),
            Found::Token(token, place) => (token, place),
        };
        match tokens.providers.verify(token, wall) {
            Ok(claims) => {
                let (places, is_forwarded) = tokens.terms.get(claims.provider())?;
                if !places.contains(place) {
                    facts.fault =
                        Some(TokenFault::Header("is in a place where this provider's tokens are not looked for"));
                    return Some(Refusal::Token);
                }
                if place.kind == PlaceKind::Header && !is_forwarded {
                    facts.token_header = Some(place.name.as_str().into());
                }
                facts.claims = Some(claims);
                None
            }
            Err(fault) => {
                facts.fault = Some(fault);
                Some(Refusal::Token)
            }
        }
    }

    fn authorize(&mut self) -> Option<Refusal> {
        let Some(snapshot) = &self.snapshot else { return Some(Refusal::NotReady) };
        let Some(question) = self.question() else { return Some(Refusal::NotReady) };
        let verdict = snapshot.rules.judge(&question);
        self.verdict = Some(verdict);
        if snapshot.is_recorded {
            self.record(snapshot, verdict);
        }
        if !snapshot.mode.enforces() {
            return None;
        }
        // Enforce means mutual TLS: a rule for everybody is one for everybody who proved to be somebody. Who proved nothing may try
        // again with an identity, unless a rule denies this to all the world.
        match (self.peer.is_none(), verdict.is_allowed) {
            (true, true) => Some(Refusal::NoIdentity),
            (true, false) if verdict.rule.is_none() => Some(Refusal::NoIdentity),
            (false, false) if verdict.needs_token => Some(Refusal::NoToken),
            (_, false) => Some(Refusal::Denied),
            (false, true) => None,
        }
    }

    fn record(&self, snapshot: &Snapshot, verdict: Verdict) {
        self.state.traffic.note(Observed {
            peer: self.peer.clone().unwrap_or_default(),
            method: self.method.to_string(),
            path: self.path().to_owned(),
            route: self.route.map_or("", |route| snapshot.route_path(route)).to_owned(),
            principal: self.claims().map_or("", |claims| claims.principal()).to_owned(),
            is_allowed: verdict.is_allowed,
            is_grpc: self.is_grpc,
        });
    }

    fn admit(&mut self, deadline: Option<Duration>) -> Option<Refusal> {
        let Some(snapshot) = &self.snapshot else { return Some(Refusal::NotReady) };
        self.deadline = deadline.map(|end| end.min(self.begun.saturating_add(headers::LONGEST)));
        if self.deadline.is_some_and(|end| end <= self.begun) {
            return Some(Refusal::Deadline);
        }
        if !self.state.in_flight.enter(snapshot.in_flight) {
            return Some(Refusal::Limit(snapshot.in_flight));
        }
        // Last: a call that finds no place must not use up its caller's rate.
        let wait = self.too_early(snapshot)?;
        self.state.in_flight.leave();
        Some(Refusal::Rate(wait))
    }

    fn too_early(&self, snapshot: &Snapshot) -> Option<Duration> {
        if snapshot.rates.is_empty() {
            return None;
        }
        let facts = self.facts.as_deref();
        let header = |name: &str| {
            let fields = facts.map_or(&[][..], |facts| &facts.headers);
            let mut values = fields.iter().filter(|(known, _)| **known == *name).map(|(_, value)| &value[..]);
            // Of two nobody knows which one counts: they are one caller with all who send two, or none.
            values.next().filter(|_| values.next().is_none()).unwrap_or_default()
        };
        let caller = Caller {
            route: self.route(),
            peer: self.peer.as_deref().unwrap_or(""),
            client: facts.and_then(|facts| facts.remote),
            header: &header,
        };
        self.state.counts.take(&snapshot.rates, &caller, self.begun)
    }

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
            None => {
                self.is_done = AtomicBool::new(false);
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
