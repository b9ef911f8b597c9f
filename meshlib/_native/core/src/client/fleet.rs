//! Whose state is it? The Service owns budget, limit and routes; the Backend is one weighted target of a route and owns its
//! balancer; the Endpoint is one address and owns breaker, average and count.
//!
//! A plan and a list of endpoints are immutable once compiled. What a call has learnt lives behind `Arc`s that survive a swap by
//! name or address: a new snapshot must not make a sick endpoint look healthy.
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};
use std::sync::Arc;
use std::time::Duration;

use ahash::AHashMap;
use parking_lot::Mutex;

use crate::admit::{Breaker, InFlight, Signal, State};
use crate::balance::{PeakEwma, View};
use crate::model::{Address, BalancePlan, Class, ServicePlan};
use crate::observe::{Counters, Reading};
use crate::random::Random;
use crate::retry::Budget;
use crate::route::Route;

/// Tier: Service. The compiled plan, and the endpoints of the moment.
pub struct Service {
    pub plan: ServicePlan,
    pub routes: Vec<Route>,
    pub state: Arc<ServiceState>,
    fleet: Mutex<Arc<Fleet>>,
}

/// Tier: Service. What outlives a swap.
pub struct ServiceState {
    pub budget: Budget,
    pub in_flight: InFlight,
    pub counters: Counters,
    /// Endpoints that a breaker took out, in the order of their ejection.
    ejected: Mutex<Vec<Arc<EndpointState>>>,
    pub ejected_count: AtomicUsize,
}

/// The endpoints of a Service at one moment, and who of them belongs to which Backend.
pub struct Fleet {
    pub version: u64,
    pub endpoints: Vec<Endpoint>,
    /// Their names, by number.
    zones: Vec<String>,
    /// By route, by backend.
    backends: Vec<Vec<Arc<Backend>>>,
}

/// Tier: Backend.
pub struct Backend {
    /// None: all endpoints of the Service.
    members: Option<Vec<u32>>,
    /// Its endpoints by zone, where there is more than one.
    zones: Vec<Backend>,
    pub turn: AtomicUsize,
}

/// Tier: Endpoint. One address of one moment.
pub struct Endpoint {
    pub address: Arc<str>,
    /// Whom it must prove to be; empty for plain text.
    pub identity: Arc<str>,
    /// What discovery said of its identity, so that a new plan is merged with that and not with the old plan.
    found_identity: Arc<str>,
    weight: f32,
    zone: u32,
    labels: Arc<BTreeMap<String, String>>,
    pub state: Arc<EndpointState>,
}

/// Tier: Endpoint. What outlives a swap.
pub struct EndpointState {
    pub in_flight: InFlight,
    /// The breaker's word as balance needs it: read without a lock.
    is_out: AtomicBool,
    /// Its place in the newest fleet.
    place: AtomicU32,
    pub health: Mutex<Health>,
    pub counters: Counters,
}

pub struct Health {
    pub breaker: Breaker,
    pub average: PeakEwma,
}

// === impl Service ===

impl Service {
    pub fn compile(plan: ServicePlan, old: &AHashMap<String, Arc<Service>>, now: Duration) -> Self {
        let known = old.values().find(|service| service.plan.name == plan.name);
        let routes: Vec<Route> = plan.routes.iter().map(Route::compile).collect();
        let state = match known {
            Some(service) => service.state.clone(),
            None => Arc::new(ServiceState {
                budget: Budget::new(),
                in_flight: InFlight::default(),
                counters: Counters::default(),
                ejected: Mutex::default(),
                ejected_count: AtomicUsize::new(0),
            }),
        };
        let service = Self { plan, routes, state, fleet: Mutex::new(Arc::new(Fleet::empty())) };
        if let Some(known) = known {
            let fleet = known.fleet();
            service.install(fleet.version, fleet.addresses(), &fleet, now);
        }
        service
    }

    pub fn fleet(&self) -> Arc<Fleet> {
        self.fleet.lock().clone()
    }

    pub fn resolve(&self, version: u64, addresses: Vec<Address>, now: Duration) {
        let old = self.fleet();
        if version >= old.version {
            self.install(version, addresses, &old, now);
        }
    }

    fn install(&self, version: u64, addresses: Vec<Address>, old: &Fleet, now: Duration) {
        let known: AHashMap<&str, &Arc<EndpointState>> =
            old.endpoints.iter().map(|e| (&*e.address, &e.state)).collect();
        // Thousands of endpoints share a handful of label sets and identities: keep one of each.
        let mut labels: Vec<Arc<BTreeMap<String, String>>> = Vec::new();
        let mut identities: AHashMap<String, Arc<str>> = AHashMap::new();
        let mut zones: AHashMap<String, u32> = AHashMap::new();
        let mut endpoints: Vec<Endpoint> = Vec::with_capacity(addresses.len());
        for (place, found) in addresses.into_iter().enumerate() {
            let shared = match labels.iter().find(|known| ***known == found.labels) {
                Some(known) => known.clone(),
                None => {
                    let fresh = Arc::new(found.labels);
                    labels.push(fresh.clone());
                    fresh
                }
            };
            // A service without identity is plain by configuration, whatever discovery says of one endpoint.
            let is_common = found.identity.is_empty() || self.plan.identity.is_empty();
            let wanted = if is_common { self.plan.identity.clone() } else { found.identity.clone() };
            let mut share = |text: String| identities.entry(text.clone()).or_insert_with(|| Arc::from(text)).clone();
            let (identity, found_identity) = (share(wanted), share(found.identity));
            let state = match known.get(&*found.address) {
                Some(state) => (*state).clone(),
                None => Arc::new(EndpointState::new(&self.plan.balance, now)),
            };
            state.place.store(place as u32, Ordering::Release);
            let next = zones.len() as u32;
            let zone = *zones.entry(found.zone).or_insert(next);
            endpoints.push(Endpoint {
                address: Arc::from(found.address),
                identity,
                found_identity,
                weight: found.weight.max(0.0) as f32,
                zone,
                labels: shared,
                state,
            });
        }
        let all = Arc::new(Backend::new(None, &endpoints, zones.len()));
        let backends = self
            .routes
            .iter()
            .map(|route| {
                let select = |wanted: &BTreeMap<String, String>| {
                    if wanted.is_empty() {
                        return all.clone();
                    }
                    let is_member = |e: &Endpoint| wanted.iter().all(|(name, value)| e.labels.get(name) == Some(value));
                    let members = endpoints.iter().enumerate().filter(|(_, e)| is_member(e)).map(|(i, _)| i as u32);
                    Arc::new(Backend::new(Some(members.collect()), &endpoints, zones.len()))
                };
                route.plan.backends.iter().map(|backend| select(&backend.labels)).collect()
            })
            .collect();
        let mut zones: Vec<(String, u32)> = zones.into_iter().collect();
        zones.sort_unstable_by_key(|(_, number)| *number);
        let zones = zones.into_iter().map(|(name, _)| name).collect();
        let fleet = Arc::new(Fleet { version, endpoints, zones, backends });
        let old = std::mem::replace(&mut *self.fleet.lock(), fleet.clone());
        self.state.keep_ejected(|state| fleet.place_of(state).is_some());
        // A table of many endpoints is freed where nobody waits for it.
        drop(old);
    }

    pub fn isolate(&self, address: &str, is_isolated: bool, now: Duration) -> bool {
        let fleet = self.fleet();
        let Some(endpoint) = fleet.endpoints.iter().find(|e| &*e.address == address) else {
            return false;
        };
        let mut health = endpoint.state.health.lock();
        health.breaker.signal(if is_isolated { Signal::Isolate } else { Signal::Release });
        if !is_isolated {
            health.breaker.reset();
            health.average = PeakEwma::new(&self.plan.balance, now);
        }
        endpoint.state.is_out.store(health.breaker.state != State::Closed, Ordering::Release);
        drop(health);
        self.state.keep_ejected(|state| !Arc::ptr_eq(state, &endpoint.state));
        true
    }

    /// What a breaker has to say after an attempt. Returns a word for the record if the state changed.
    pub fn note(
        &self,
        endpoint: &Endpoint,
        class: Class,
        is_probe: bool,
        random: &Random,
        now: Duration,
    ) -> Option<&'static str> {
        let (plan, state) = (&self.plan.admit.breaker, &endpoint.state);
        let mut health = state.health.lock();
        match health.breaker.state {
            State::HalfOpen if is_probe => match class {
                Class::Success | Class::Overload => {
                    health.breaker.reset();
                    health.average = PeakEwma::new(&self.plan.balance, now);
                    state.is_out.store(false, Ordering::Release);
                    drop(health);
                    self.state.keep_ejected(|known| !Arc::ptr_eq(known, state));
                    Some("probe succeeded: closed")
                }
                Class::Ignored => {
                    // It waits again: an endpoint that hangs must not take every call of an impatient caller as its probe.
                    health.breaker.signal(Signal::ProbeVanished);
                    health.breaker.wait_again(now);
                    None
                }
                Class::Failure | Class::Dead => {
                    health.breaker.signal(Signal::ProbeFailed);
                    health.breaker.open(plan, random, now);
                    Some("probe failed: open again")
                }
            },
            State::Closed => {
                if !health.breaker.note(class, plan, now) || !self.may_eject() {
                    return None;
                }
                health.breaker.signal(Signal::Trip);
                health.breaker.open(plan, random, now);
                state.is_out.store(true, Ordering::Release);
                drop(health);
                // One that discovery has taken away meanwhile would count as ejected for ever.
                let is_here = self.fleet().place_of(state).is_some();
                let mut ejected = self.state.ejected.lock();
                if is_here {
                    ejected.push(state.clone());
                    self.state.ejected_count.store(ejected.len(), Ordering::Release);
                }
                drop(ejected);
                Counters::add(&state.counters.ejections);
                Counters::add(&self.state.counters.ejections);
                Some("ejected")
            }
            // Attempts that were under way when the breaker opened say nothing new.
            _ => None,
        }
    }

    /// At most a share of the endpoints, and never the last one: an outage of all must not look like an outage of the mesh.
    fn may_eject(&self) -> bool {
        let total = self.fleet.lock().endpoints.len();
        let out = self.state.ejected_count.load(Ordering::Acquire) + 1;
        out < total && out as f64 <= total as f64 * self.plan.admit.breaker.max_ejected
    }

    /// An ejected endpoint of this Backend whose wait is over; it is half open from here on, for this one call.
    pub fn probe(&self, fleet: &Fleet, backend: &Backend, is_idempotent: bool, now: Duration) -> Option<usize> {
        if self.state.ejected_count.load(Ordering::Acquire) == 0 {
            return None;
        }
        let ejected = self.state.ejected.lock();
        ejected.iter().find_map(|state| {
            let mut health = state.health.lock();
            if !health.breaker.is_due(is_idempotent, now) {
                return None;
            }
            let place = fleet.place_of(state)?;
            if !backend.has(place) {
                return None;
            }
            health.breaker.signal(Signal::Probe);
            Some(place)
        })
    }

    /// So few endpoints of this Backend are healthy that health is ignored.
    pub fn is_panicking(&self, fleet: &Fleet, backend: &Backend) -> bool {
        let out = self.state.ejected_count.load(Ordering::Acquire);
        if out == 0 {
            return false;
        }
        let total = backend.count(fleet);
        let out = match &backend.members {
            None => out,
            Some(_) => {
                let ejected = self.state.ejected.lock();
                ejected.iter().filter(|s| fleet.place_of(s).is_some_and(|place| backend.has(place))).count()
            }
        };
        ((total.saturating_sub(out)) as f64) < total as f64 * self.plan.balance.panic
    }

    /// In a forked child nothing of the parent's is under way.
    pub fn forget_in_flight(&self) {
        self.state.in_flight.clear();
        for endpoint in &self.fleet().endpoints {
            endpoint.state.in_flight.clear();
            // The probe is the parent's, and its end will not be told here.
            endpoint.state.health.lock().breaker.signal(Signal::ProbeVanished);
        }
    }

    pub fn read(&self, now: Duration) -> Vec<EndpointReading> {
        let mut list = vec![EndpointReading {
            service: self.plan.name.clone(),
            endpoint: String::new(),
            in_flight: self.state.in_flight.count(),
            breaker: "",
            ewma: 0.0,
            counters: super::reading(&self.state.counters),
            budget: self.state.budget.left(&self.plan.budget, now),
        }];
        for endpoint in &self.fleet().endpoints {
            let health = endpoint.state.health.lock();
            list.push(EndpointReading {
                service: self.plan.name.clone(),
                endpoint: endpoint.address.to_string(),
                in_flight: endpoint.state.in_flight.count(),
                breaker: health.breaker.state.word(),
                ewma: health.average.read(&self.plan.balance, now),
                counters: super::reading(&endpoint.state.counters),
                budget: 0.0,
            });
        }
        list
    }
}

/// What the exporters see of an Endpoint, or of the Service itself (`endpoint` empty).
#[derive(Debug, Clone)]
pub struct EndpointReading {
    pub service: String,
    pub endpoint: String,
    pub in_flight: u32,
    pub breaker: &'static str,
    pub ewma: f64,
    pub counters: Reading,
    pub budget: f64,
}

// === impl ServiceState ===

impl ServiceState {
    fn keep_ejected(&self, keep: impl Fn(&Arc<EndpointState>) -> bool) {
        let mut ejected = self.ejected.lock();
        ejected.retain(keep);
        self.ejected_count.store(ejected.len(), Ordering::Release);
    }
}

// === impl Fleet ===

impl Fleet {
    fn empty() -> Self {
        Self { version: 0, endpoints: Vec::new(), zones: Vec::new(), backends: Vec::new() }
    }

    pub fn backend(&self, route: usize, backend: usize) -> Option<&Arc<Backend>> {
        self.backends.get(route).and_then(|list| list.get(backend))
    }

    /// The number of a zone; None also where all endpoints are in one, so that there is nothing to prefer.
    pub fn zone(&self, name: &str) -> Option<u32> {
        let found = self.zones.iter().position(|zone| zone == name)?;
        (self.zones.len() > 1).then_some(found as u32)
    }

    pub fn zone_of(&self, endpoint: &Endpoint) -> &str {
        self.zones.get(endpoint.zone as usize).map_or("", String::as_str)
    }

    /// Where an endpoint stands in this fleet, if it does.
    fn place_of(&self, state: &Arc<EndpointState>) -> Option<usize> {
        let place = state.place.load(Ordering::Acquire) as usize;
        self.endpoints.get(place).filter(|e| Arc::ptr_eq(&e.state, state)).map(|_| place)
    }

    fn addresses(&self) -> Vec<Address> {
        let back = |e: &Endpoint| Address {
            address: e.address.to_string(),
            weight: f64::from(e.weight),
            zone: self.zone_of(e).to_owned(),
            labels: (*e.labels).clone(),
            identity: e.found_identity.to_string(),
        };
        self.endpoints.iter().map(back).collect()
    }
}

// === impl Backend ===

impl Backend {
    fn new(members: Option<Vec<u32>>, endpoints: &[Endpoint], zones: usize) -> Self {
        let plain = |members| Self { members, zones: Vec::new(), turn: AtomicUsize::new(0) };
        let mut backend = plain(members);
        if zones > 1 {
            let mut lists = vec![Vec::new(); zones];
            for place in
                (0..backend.members.as_ref().map_or(endpoints.len(), Vec::len)).filter_map(|i| backend.place(i))
            {
                if let Some(list) = endpoints.get(place).and_then(|endpoint| lists.get_mut(endpoint.zone as usize)) {
                    list.push(place as u32);
                }
            }
            backend.zones = lists.into_iter().map(|list| plain(Some(list))).collect();
        }
        backend
    }

    /// The part of it that is in a zone.
    pub fn in_zone(&self, zone: u32) -> Option<&Backend> {
        self.zones.get(zone as usize)
    }

    pub fn count(&self, fleet: &Fleet) -> usize {
        self.members.as_ref().map_or(fleet.endpoints.len(), Vec::len)
    }

    pub fn place(&self, index: usize) -> Option<usize> {
        self.members.as_ref().map_or(Some(index), |members| members.get(index).map(|m| *m as usize))
    }

    fn has(&self, place: usize) -> bool {
        self.members.as_ref().is_none_or(|members| members.binary_search(&(place as u32)).is_ok())
    }
}

// === impl EndpointState ===

impl EndpointState {
    fn new(plan: &BalancePlan, now: Duration) -> Self {
        Self {
            in_flight: InFlight::default(),
            is_out: AtomicBool::new(false),
            place: AtomicU32::new(0),
            health: Mutex::new(Health { breaker: Breaker::new(), average: PeakEwma::new(plan, now) }),
            counters: Counters::default(),
        }
    }

    pub fn is_out(&self) -> bool {
        self.is_out.load(Ordering::Acquire)
    }

    pub fn is_isolated(&self) -> bool {
        self.is_out() && self.health.lock().breaker.state == State::Isolated
    }
}

/// What balance may see: who can be chosen, and at what cost.
pub struct Eligible<'a> {
    pub fleet: &'a Fleet,
    pub backend: &'a Backend,
    pub balance: &'a BalancePlan,
    pub now: Duration,
    /// Health is ignored (but not a person's word).
    pub is_panic: bool,
    /// Endpoints that this call has tried already.
    pub tried: &'a [u32],
}

impl Eligible<'_> {
    fn endpoint(&self, index: usize) -> Option<(usize, &Endpoint)> {
        let place = self.backend.place(index)?;
        self.fleet.endpoints.get(place).map(|endpoint| (place, endpoint))
    }
}

impl View for Eligible<'_> {
    fn count(&self) -> usize {
        self.backend.count(self.fleet)
    }

    fn is_eligible(&self, index: usize) -> bool {
        let Some((place, endpoint)) = self.endpoint(index) else { return false };
        if endpoint.weight <= 0.0 {
            return false;
        }
        let is_healthy = !endpoint.state.is_out() || (self.is_panic && !endpoint.state.is_isolated());
        is_healthy && !self.tried.contains(&(place as u32))
    }

    fn cost(&self, index: usize) -> f64 {
        self.endpoint(index).map_or(f64::INFINITY, |(_, endpoint)| {
            let average = endpoint.state.health.lock().average.read(self.balance, self.now);
            average * f64::from(endpoint.state.in_flight.count().saturating_add(1)) / f64::from(endpoint.weight)
        })
    }
}
