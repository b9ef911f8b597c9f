//! Who are the endpoints of a Service at one moment, and who of them belongs to which Backend?
//!
//! A fleet is immutable once it is made, and a call pins one. Thousands of endpoints share a handful of identities, label sets and
//! zones, and their addresses stand in one text: what is left of an endpoint is 32 bytes and its state, which survives a swap by its
//! address, since a new snapshot must not make a sick endpoint look healthy. Tables of balancers are built here, off the request's path.
//! A call that pins an older fleet goes by the counts of its last moment. It does not judge health; `health.rs` does, and only tells the counts.
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use ahash::{AHashMap, AHashSet};
use parking_lot::Mutex;

use super::health::{EndpointState, Health};
use super::service::Service;
use crate::balance::alias::Alias;
use crate::balance::hash::xxh64;
use crate::balance::locality;
use crate::balance::maglev;
use crate::balance::orca;
use crate::balance::ring::Ring;
use crate::balance::stride::Stride;
use crate::model::{seconds, Address, BalancePlan, BalancePolicy, LocalityPolicy, OrcaPlan, StickyKind, WeightSource};
use crate::random::Random;

mod amend;
mod backend;
mod held;

use backend::step;

pub type Labels = BTreeMap<String, String>;

/// The largest weight of a round robin counts for so many times the mean at most: in a large fleet, where a turn that takes too many steps
/// ends in a long scan, for less.
const MOST_STEPS: [f32; 2] = [50.0, 10.0];
const LARGE: usize = 1000;

/// Subsets that calls ask for by labels, and that are kept; more are made anew each time.
const MOST_SUBSETS: usize = 64;

/// The endpoints of a Service at one moment.
pub struct Fleet {
    pub version: u64,
    pub endpoints: Vec<Endpoint>,
    /// All addresses, one after the other.
    text: String,
    identities: Vec<Arc<str>>,
    labels: Vec<Arc<Labels>>,
    /// Their names, by number.
    zones: Vec<String>,
    /// By route, by backend.
    backends: Vec<Box<[Arc<Backend>]>>,
    /// The same, each once.
    distinct: Vec<(Labels, Arc<Backend>)>,
    subsets: Mutex<Vec<(Labels, Arc<Backend>)>>,
    /// Endpoints by what a session names them, made when somebody looks for one.
    index: OnceLock<Box<AHashMap<u64, u32>>>,
    /// Callers by zone, in the order of `zones`; empty: unknown.
    callers: Mutex<Vec<u32>>,
    /// The number of our own zone, where calls go by the zones' shares.
    shared_from: Option<u32>,
    /// Places of those that the source doesn't tell any more, in order; none most of the time.
    held: Vec<u32>,
    /// It tells others that take traffic.
    has_told: bool,
    /// Endpoints that a breaker, a check or a person took out.
    out: AtomicU32,
    /// The largest weight, and the mean of those that reported one (f32 bits).
    top: AtomicU32,
    mean: AtomicU32,
}

/// Tier: Endpoint. One address of one moment.
#[derive(Clone)]
pub struct Endpoint {
    pub state: Arc<EndpointState>,
    at: u32,
    pub weight: f32,
    /// Numbers in the fleet's lists.
    labels: u32,
    /// Whom it must prove to be, and what discovery said of it: a new plan is merged with the latter, not with the old plan.
    identity: u32,
    found_identity: u32,
    length: u16,
    zone: u16,
}

/// Tier: Backend.
pub struct Backend {
    /// None: all endpoints of the Service.
    members: Option<Box<[u32]>>,
    /// Its part in each zone by number, where there is more than one.
    zones: Box<[Backend]>,
    /// Its parts in the order of preference: own zone, the listed ones, all others together (failover).
    pub tiers: Box<[Backend]>,
    /// Share of the calls that a zone gets (zone-aware), f32 bits, by zone number.
    shares: Box<[AtomicU32]>,
    /// Members that take traffic, and how many of those a breaker, a check or a person took out.
    able: u32,
    out: AtomicU32,
    /// Those members of `able` that the source tells, and how many of the others are out: as both say that they are gone, they are
    /// missing to nobody.
    told: u32,
    gone: AtomicU32,
    /// The sum of its weights.
    pub weight: f32,
    pub turn: Stride,
    pub table: Table,
}

/// What a policy needs beside the members.
pub enum Table {
    None,
    Alias(Alias),
    Ring(Ring),
    Maglev(maglev::Table),
}

// === impl Fleet ===

impl Default for Fleet {
    fn default() -> Self {
        Self {
            version: 0,
            endpoints: Vec::new(),
            text: String::new(),
            identities: Vec::new(),
            labels: Vec::new(),
            zones: Vec::new(),
            backends: Vec::new(),
            distinct: Vec::new(),
            subsets: Mutex::default(),
            index: OnceLock::new(),
            callers: Mutex::default(),
            shared_from: None,
            held: Vec::new(),
            has_told: true,
            out: AtomicU32::new(0),
            top: AtomicU32::new(0),
            mean: AtomicU32::new(0),
        }
    }
}

impl Fleet {
    /// The fleet of these addresses for a Service; what `old` knew of an address is kept.
    pub fn compile(service: &Service, version: u64, addresses: &[Address], old: &Fleet, now: Duration) -> Self {
        let plan = &service.plan;
        let known: AHashMap<&str, usize> =
            old.endpoints.iter().enumerate().map(|(place, e)| (old.address(e), place)).collect();
        // The first fleet has nobody to compare with: all are as warm as each other.
        let warms_up = plan.balance.slow_start > 0.0 && !old.endpoints.is_empty();
        let mut fleet = Self {
            version,
            text: String::with_capacity(addresses.iter().map(|a| a.address.len()).sum()),
            ..Self::default()
        };
        fleet.endpoints.reserve_exact(addresses.len());
        let mut numbers = Numbers::default();
        let mut seen = AHashSet::with_capacity(addresses.len());
        for found in addresses {
            // Twice the same address is one endpoint: it has one state.
            if !seen.insert(&*found.address) {
                continue;
            }
            // A service without identity is plain by configuration, whatever discovery says of one endpoint.
            let is_common = found.identity.is_empty() || plan.identity.is_empty();
            let wanted = if is_common { &plan.identity } else { &found.identity };
            let place = known.get(&*found.address).filter(|place| !old.begins_anew(**place, found));
            let state = match place.and_then(|place| old.endpoints.get(*place)) {
                Some(endpoint) => endpoint.state.clone(),
                None => Arc::new(EndpointState::new(&plan.balance, warms_up, now)),
            };
            fleet.hold(found.is_held);
            let at = fleet.text.len() as u32;
            fleet.text.push_str(&found.address);
            fleet.endpoints.push(Endpoint {
                state,
                at,
                length: u16::try_from(found.address.len()).unwrap_or(u16::MAX),
                weight: found.weight.max(0.0) as f32,
                labels: numbers.label(&mut fleet.labels, &found.labels),
                zone: numbers.zone(&mut fleet.zones, &found.zone),
                identity: numbers.identity(&mut fleet.identities, wanted),
                found_identity: numbers.identity(&mut fleet.identities, &found.identity),
            });
        }
        fleet.settle(service, old, now);
        fleet
    }

    /// What follows from the endpoints: counts, tables, backends.
    fn settle(&mut self, service: &Service, old: &Fleet, now: Duration) {
        let (plan, fleet) = (&service.plan, self);
        fleet.has_told = fleet.tells();
        let weights = || fleet.endpoints.iter().map(|e| e.weight).filter(|weight| *weight > 0.0);
        let mut top = weights().fold(0.0, f32::max);
        if plan.balance.policy == BalancePolicy::RoundRobin {
            // A turn takes as many steps as the largest weight is above the mean.
            let mean = weights().sum::<f32>() / weights().count().max(1) as f32;
            let [few, many] = MOST_STEPS;
            top = top.min(mean * if fleet.endpoints.len() < LARGE { few } else { many });
        }
        fleet.top.store(top.to_bits(), Ordering::Relaxed);
        if plan.balance.sticky.kind != StickyKind::None {
            fleet.index();
        }
        *fleet.out.get_mut() = fleet.endpoints.iter().filter(|e| e.state.is_out()).count() as u32;
        if plan.balance.locality.policy == LocalityPolicy::ZoneAware {
            fleet.shared_from = fleet.zone(&service.zone);
        }
        fleet.divide(service, old);
        if plan.balance.weights == WeightSource::Orca {
            fleet.weigh(service, now);
        }
    }

    /// From here on it is the newest, and each endpoint's place is its place in this one. What changed since it was compiled is counted
    /// again where `is_stale`.
    pub fn take_over(&self, is_stale: bool) {
        for (place, endpoint) in self.endpoints.iter().enumerate() {
            endpoint.state.place.store(place as u32, Ordering::Release);
        }
        if is_stale {
            let out = self.endpoints.iter().filter(|e| e.state.is_out()).count();
            self.out.store(out as u32, Ordering::Release);
            self.distinct.iter().for_each(|(_, backend)| backend.recount(self));
            self.share_zones();
        }
    }

    /// How many endpoints are out.
    pub fn out(&self) -> usize {
        self.out.load(Ordering::Acquire) as usize
    }

    /// The Backends of all routes; routes that ask for the same labels share one.
    fn divide(&mut self, service: &Service, old: &Fleet) {
        let mut made: Vec<(Labels, Arc<Backend>)> = Vec::new();
        let mut backends = Vec::with_capacity(service.routes.len());
        for route in &service.routes {
            let of_route = route.plan.backends.iter().map(|wanted| {
                match made.iter().find(|(labels, _)| *labels == wanted.labels) {
                    Some((_, backend)) => backend.clone(),
                    None => {
                        // Whose turn it is doesn't begin anew because an endpoint came or went.
                        let before = old.distinct.iter().find(|(labels, _)| *labels == wanted.labels);
                        let start = before.map_or(service.start, |(_, backend)| backend.turn.now());
                        let backend = Arc::new(self.backend_of(service, &wanted.labels, start, true));
                        made.push((wanted.labels.clone(), backend.clone()));
                        backend
                    }
                }
            });
            backends.push(of_route.collect());
        }
        self.distinct = made;
        self.backends = backends;
        self.share_zones();
    }

    fn backend_of(&self, service: &Service, wanted: &Labels, start: u64, is_whole: bool) -> Backend {
        if wanted.is_empty() {
            return Backend::new(None, self, service, start, is_whole);
        }
        let is_member = |labels: &Labels| wanted.iter().all(|(name, value)| labels.get(name) == Some(value));
        // Labels are few, endpoints many.
        let fits: Vec<bool> = self.labels.iter().map(|labels| is_member(labels)).collect();
        let members = self.endpoints.iter().enumerate();
        let members =
            members.filter(|(_, e)| fits.get(e.labels as usize).copied().unwrap_or(false)).map(|(n, _)| n as u32);
        Backend::new(Some(members.collect()), self, service, start, is_whole)
    }

    /// The endpoints that carry these labels, for a call that asks for them itself.
    pub fn subset(&self, service: &Service, wanted: &Labels) -> Arc<Backend> {
        let mut subsets = self.subsets.lock();
        if let Some((_, backend)) = subsets.iter().find(|(labels, _)| labels == wanted) {
            return backend.clone();
        }
        // One that is not kept has no tables: they would be built for this call alone.
        let is_kept = subsets.len() < MOST_SUBSETS;
        let backend = Arc::new(self.backend_of(service, wanted, service.start, is_kept));
        backend.share_zones(self);
        if is_kept {
            subsets.push((wanted.clone(), backend.clone()));
        }
        backend
    }

    pub fn backend(&self, route: usize, backend: usize) -> Option<&Arc<Backend>> {
        self.backends.get(route).and_then(|list| list.get(backend))
    }

    pub fn address(&self, endpoint: &Endpoint) -> &str {
        let at = endpoint.at as usize;
        self.text.get(at..at + usize::from(endpoint.length)).unwrap_or("")
    }

    pub fn identity(&self, endpoint: &Endpoint) -> &str {
        self.identities.get(endpoint.identity as usize).map_or("", |identity| identity)
    }

    fn index(&self) -> &AHashMap<u64, u32> {
        self.index.get_or_init(|| {
            let named = self.endpoints.iter().enumerate().map(|(n, e)| (session_of(self.address(e)), n as u32));
            Box::new(named.collect())
        })
    }

    pub fn find(&self, address: &str) -> Option<&Endpoint> {
        let place = self.index().get(&session_of(address))?;
        self.endpoints.get(*place as usize).filter(|e| self.address(e) == address)
    }

    /// The endpoint that a session names.
    pub fn of_session(&self, session: u64) -> Option<u32> {
        self.index().get(&session).copied()
    }

    /// The number of a zone; None also where all endpoints are in one, so that there is nothing to prefer.
    pub fn zone(&self, name: &str) -> Option<u32> {
        let found = self.zones.iter().position(|zone| zone == name)?;
        (self.zones.len() > 1).then_some(found as u32)
    }

    pub fn zone_of(&self, endpoint: &Endpoint) -> &str {
        self.zones.get(usize::from(endpoint.zone)).map_or("", String::as_str)
    }

    /// How many endpoints there are in each zone.
    pub fn zone_counts(&self) -> Vec<(String, u32)> {
        let mut counts: Vec<(String, u32)> = self.zones.iter().map(|zone| (zone.clone(), 0)).collect();
        for endpoint in &self.endpoints {
            if let Some((_, count)) = counts.get_mut(usize::from(endpoint.zone)) {
                *count += 1;
            }
        }
        counts
    }

    /// Who calls, by zone: what zone-aware balancing weighs its own share with.
    pub fn set_callers(&self, counts: &[(String, u32)]) {
        let of = |zone: &String| counts.iter().find(|(name, _)| name == zone).map_or(0, |(_, count)| *count);
        *self.callers.lock() = if counts.is_empty() { Vec::new() } else { self.zones.iter().map(of).collect() };
        self.share_zones();
    }

    /// Where an endpoint stands in this fleet, if it does.
    pub fn place_of(&self, state: &Arc<EndpointState>) -> Option<usize> {
        let place = state.place.load(Ordering::Acquire) as usize;
        self.endpoints.get(place).filter(|e| Arc::ptr_eq(&e.state, state)).map(|_| place)
    }

    /// An endpoint went out, or came in again.
    pub fn count_out(&self, place: usize, is_out: bool) {
        step(&self.out, is_out);
        if self.endpoints.get(place).is_none_or(|e| e.weight <= 0.0) {
            return;
        }
        let is_held = self.is_held(place);
        for (_, backend) in &self.distinct {
            backend.count_out(place, is_out, is_held);
        }
        for (_, backend) in self.subsets.lock().iter() {
            backend.count_out(place, is_out, is_held);
        }
    }

    /// Compute anew which zone gets how much: endpoints or their health have changed.
    pub fn share_zones(&self) {
        if self.shared_from.is_none() {
            return;
        }
        for (_, backend) in &self.distinct {
            backend.share_zones(self);
        }
        for (_, backend) in self.subsets.lock().iter() {
            backend.share_zones(self);
        }
    }

    /// What an endpoint said of itself, where that counts, or discovery of it.
    pub fn weight(&self, endpoint: &Endpoint, health: &Health, plan: &BalancePlan, now: Duration) -> f64 {
        let said = health.load.as_ref().filter(|_| plan.weights == WeightSource::Orca);
        f64::from(said.and_then(|load| load.read(&terms(&plan.orca), now)).unwrap_or(endpoint.weight))
    }

    /// The largest weight there is: 0 if none takes traffic.
    pub fn top(&self) -> f32 {
        f32::from_bits(self.top.load(Ordering::Relaxed))
    }

    /// The mean of the weights that were reported; 0 without any.
    pub fn mean(&self) -> f32 {
        f32::from_bits(self.mean.load(Ordering::Relaxed))
    }

    /// Look at all reported weights, once a second and off the request's path.
    pub fn weigh(&self, service: &Service, now: Duration) {
        let terms = terms(&service.plan.balance.orca);
        let said = |e: &Endpoint| e.state.health.lock().load.as_ref().and_then(|load| load.read(&terms, now));
        let weights: Vec<Option<f32>> = self.endpoints.iter().map(said).collect();
        let mean = orca::mean(weights.iter().copied());
        let top = weights.iter().flatten().fold(mean.unwrap_or(1.0), |top, weight| top.max(*weight));
        // As in gRPC: the largest counts for ten times the mean at most, which bounds the draws too.
        let top = mean.map_or(top, |mean| top.min(10.0 * mean));
        self.mean.store(mean.unwrap_or(0.0).to_bits(), Ordering::Relaxed);
        self.top.store(top.to_bits(), Ordering::Relaxed);
    }
}

/// How long a report counts.
pub fn terms(plan: &OrcaPlan) -> orca::Terms {
    orca::Terms { blackout: seconds(plan.blackout), expiry: seconds(plan.expiry) }
}

/// How many endpoints have been met with what is kept once.
#[derive(Default)]
struct Numbers<'a> {
    zones: AHashMap<&'a str, u16>,
    identities: AHashMap<&'a str, u32>,
    last_labels: Option<(&'a Labels, u32)>,
    labels: AHashMap<&'a Labels, u32>,
}

impl<'a> Numbers<'a> {
    fn zone(&mut self, zones: &mut Vec<String>, name: &'a str) -> u16 {
        *self.zones.entry(name).or_insert_with(|| {
            zones.push(name.to_owned());
            (zones.len() - 1).min(usize::from(u16::MAX)) as u16
        })
    }

    fn identity(&mut self, identities: &mut Vec<Arc<str>>, text: &'a str) -> u32 {
        *self.identities.entry(text).or_insert_with(|| {
            identities.push(Arc::from(text));
            (identities.len() - 1) as u32
        })
    }

    fn label(&mut self, all: &mut Vec<Arc<Labels>>, found: &'a Labels) -> u32 {
        // Neighbours are alike more often than not.
        if let Some((last, number)) = self.last_labels.filter(|(last, _)| *last == found) {
            self.last_labels = Some((last, number));
            return number;
        }
        let number = *self.labels.entry(found).or_insert_with(|| {
            all.push(Arc::new(found.clone()));
            (all.len() - 1) as u32
        });
        self.last_labels = Some((found, number));
        number
    }
}

/// What a session says instead of an address: the same in all processes. It is opaque, and no secret: who knows an address knows it.
pub fn session_of(address: &str) -> u64 {
    const SESSION: u64 = 0x6d65_7368_6c69_6221;
    xxh64(address.as_bytes(), SESSION)
}
