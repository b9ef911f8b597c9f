//! THE OUTBOUND WAY, as decisions: where does this call go, and what becomes of it?
//!
//! ```text
//! observe > route > retry > [ balance > admit > secure > send ]        [ ] = once per attempt
//! ```
//!
//! Read from the top: what is met first stands first. `begin` routes and takes the Service's permit (once per call, above
//! retry: a second attempt is no second call). `next` balances and admits one attempt. `head` judges what came back and decides
//! whether it is done again. `finish` gives the permits back. The phases never call one another; they meet in these files:
//!
//! ```text
//! client.rs            the engine: the plan, swapped as a whole; a call pins one state of it
//! client/service.rs    a Service: its compiled plan, and what survives a swap
//! client/fleet.rs      its endpoints at one moment, and the Backends that they form; fleet/amend.rs: the next moment's, out of these
//! client/health.rs     how an endpoint is, and how everybody learns that it changed
//! client/limits.rs     may the Service have one more call? asked once per call
//! client/keys.rs       for whom is the call: hashes and rate limits
//! client/call.rs       one call: begin, next, head, finish
//! client/eligible.rs   what balance sees of the endpoints
//! client/carried.rs    what an attempt tells the next hop
//! ```
use std::sync::atomic::Ordering;
use std::sync::Arc;
use std::time::Duration;

use ahash::{AHashMap, AHashSet};
use parking_lot::Mutex;

use crate::balance::hash::xxh64;
use crate::model::{share_policies, Address, Plan, ServicePlan};
use crate::random::Random;
use crate::route::{host_of, Headers};

mod call;
pub mod carried;
mod eligible;
mod fleet;
mod health;
mod keys;
mod limits;
mod service;

pub use call::{extra, Call, Candidate, Event, Next, Record, Reply, Request};
pub use fleet::Labels;
pub use service::EndpointReading;
use service::{Service, Zone};

/// Why the mesh itself says no. Nothing was sent.
#[derive(Debug, Clone, PartialEq)]
pub enum Refusal {
    UnknownService(String),
    NoRoute(String),
    NoEndpoint(String),
    CircuitOpen(String),
    LimitExceeded(String),
    /// The Service refuses so much that we don't even ask.
    Throttled(String),
    /// Too many calls in a time, and when the next may go.
    RateLimited(String, Duration),
    DeadlineExceeded(String),
    /// The driver called out of order: a mistake of ours, never of the user.
    Misuse(&'static str),
}

/// All outbound decisions of one process.
pub struct Engine {
    known: Mutex<Arc<Known>>,
    random: Arc<Random>,
}

/// All Services of one plan.
#[derive(Default)]
struct Known {
    services: AHashMap<String, Arc<Service>>,
    zone: Arc<Zone>,
    /// The plan of guards that have none of their own.
    guard: Option<ServicePlan>,
}

/// The beginning of the names of guards: no host of a URL can look like that.
const GUARD: &str = "guard:";
const ANY_GUARD: &str = "guard:*";

impl Engine {
    pub fn new(seed: u64) -> Self {
        Self { known: Mutex::default(), random: Arc::new(Random::new(seed)) }
    }

    pub fn reseed(&self, seed: u64) {
        self.random.reseed(seed);
        for service in self.distinct() {
            service.forget_in_flight();
        }
    }

    /// Take a whole plan. What is not named any more disappears; the state of what stays (budgets, breakers, averages) survives.
    pub fn publish(&self, text: &[u8], now: Duration) -> Result<(), String> {
        let unreadable = |error: serde_json::Error| format!("the client plan can't be read: {error}");
        let plan: Plan<'_> = serde_json::from_slice(text).map_err(unreadable)?;
        let old = self.known.lock().clone();
        let by_name: AHashMap<&str, &Arc<Service>> = old.services.values().map(|s| (&*s.plan.name, s)).collect();
        // What stands there letter for letter as before is as before: a change of one service costs one.
        let same_zone = *old.zone.name == *plan.zone;
        let by_text: AHashMap<u64, &Arc<Service>> =
            old.services.values().filter(|_| same_zone).map(|service| (service.text, service)).collect();
        let zone = Arc::new(Zone::of(&plan, by_name.get(&*plan.service).copied(), self.random.next()));
        let mut new = Known { services: AHashMap::with_capacity(plan.services.len()), zone: zone.clone(), guard: None };
        let mut fresh = Vec::new();
        let mut claimed = AHashSet::with_capacity(plan.services.len());
        for text in &plan.services {
            let hash = xxh64(text.get().as_bytes(), 0);
            let known = by_text.get(&hash).map(|same| (*same).clone());
            let service: Option<ServicePlan> = match known {
                Some(_) => None,
                None => Some(serde_json::from_str(text.get()).map_err(unreadable)?),
            };
            let plan = known.as_ref().map(|same| &same.plan).or(service.as_ref());
            for host in plan.map_or(&[][..], |plan| &plan.hosts) {
                if !claimed.insert(host_of(host)) && !host.starts_with(GUARD) {
                    return Err(format!("two services of the client plan claim the host {host:?}"));
                }
            }
            known.into_iter().for_each(|same| new.add(same));
            fresh.extend(service.map(|service| (hash, service)));
        }
        share_policies(fresh.iter_mut().map(|(_, service)| service));
        // Nothing can fail from here on: what is compiled takes over the state of what was.
        for (hash, service) in fresh {
            if service.name == ANY_GUARD {
                new.guard = Some(service);
                continue;
            }
            let before = by_name.get(&*service.name).copied();
            let compiled = Service::compile(hash, service, &zone, before, now);
            let is_guard = compiled.plan.is_guard;
            new.add(Arc::new(if is_guard { with_function(compiled, &zone, now) } else { compiled }));
        }
        for (name, before) in old.services.iter().filter(|(_, service)| service.plan.is_guard) {
            if let (false, Some(plan)) = (new.services.contains_key(name), &new.guard) {
                new.services.insert(name.clone(), Arc::new(guard_of(plan, name, &zone, Some(before), now)));
            }
        }
        // A large table is freed where nobody waits for it.
        let old = std::mem::replace(&mut *self.known.lock(), Arc::new(new));
        drop(old);
        Ok(())
    }

    /// Take the endpoints of a Service as its resolver found them; an older version than the one at hand is ignored.
    pub fn resolve(&self, service: &str, version: u64, addresses: &[Address], now: Duration) -> Result<(), Refusal> {
        let known = self.known.lock().clone();
        let found = known.find(service).ok_or_else(|| Refusal::UnknownService(service.to_owned()))?;
        found.resolve(version, addresses, &known.zone, now);
        self.count_callers(&known, found);
        Ok(())
    }

    /// Take what has changed of a Service's endpoints since the version `base`; false where that is not the version at hand, so that all
    /// of them have to be told.
    pub fn amend(
        &self,
        service: &str,
        base: u64,
        version: u64,
        changed: &[Address],
        gone: &[String],
        now: Duration,
    ) -> Result<bool, Refusal> {
        let known = self.known.lock().clone();
        let found = known.find(service).ok_or_else(|| Refusal::UnknownService(service.to_owned()))?;
        let is_taken = found.amend(base, version, changed, gone, &known.zone, now);
        if is_taken {
            self.count_callers(&known, found);
        }
        Ok(is_taken)
    }

    /// Who else calls from where has changed for all, if it is our own Service.
    fn count_callers(&self, known: &Known, found: &Service) {
        if found.plan.name == known.zone.service {
            known.zone.callers.lock().clone_from(&found.fleet().zone_counts());
            for service in self.distinct() {
                service.fleet().set_callers(&known.zone.callers.lock());
            }
        }
    }

    /// How many connects of a Service's calls have come to nothing so far.
    pub fn unreachable(&self, service: &str) -> u32 {
        let known = self.known.lock();
        known.find(service).map_or(0, |service| service.state.unreachable.load(Ordering::Relaxed))
    }

    pub fn service_of(&self, authority: &str) -> Option<String> {
        self.find(authority).map(|service| service.plan.name.clone())
    }

    /// The Service and the route that a call would take, with nothing counted; None where `begin` would refuse it.
    pub fn route_of(
        &self,
        authority: &str,
        method: &str,
        path: &str,
        headers: &dyn Headers,
    ) -> Option<(String, String)> {
        let service = self.find(authority).filter(|service| !service.plan.is_guard)?;
        let route = service.routes.iter().find(|route| route.matches(method, path, headers))?;
        Some((service.plan.name.clone(), route.name().to_owned()))
    }

    pub fn begin(&self, request: &Request<'_>, headers: &dyn Headers, now: Duration) -> Result<Call, Refusal> {
        // A guard is no host, even where a port makes a URL look like its name.
        let Some(service) = self.find(request.authority).filter(|service| !service.plan.is_guard) else {
            return Err(Refusal::UnknownService(self.unknown(request.authority)));
        };
        Call::begin(service, self.random.clone(), request, headers, now)
    }

    /// `begin` and `next` of a call of a function: its guard is a Service with one endpoint, and comes about when it is first asked for.
    pub fn guard(&self, name: &str, request: &Request<'_>, now: Duration) -> Result<(Call, Next), Refusal> {
        let known = self.known.lock().services.get(name).cloned();
        let service = match known {
            Some(service) if service.plan.is_guard => service,
            _ => self.new_guard(name, now)?,
        };
        let mut call = Call::begin(service, self.random.clone(), request, &Vec::new(), now)?;
        let next = call.next(now)?;
        Ok((call, next))
    }

    fn new_guard(&self, name: &str, now: Duration) -> Result<Arc<Service>, Refusal> {
        let mut known = self.known.lock();
        let unknown = || Refusal::UnknownService(format!("there is no guard {name:?}, and no plan for any"));
        let plan = known.guard.as_ref().filter(|_| name.starts_with(GUARD)).ok_or_else(unknown)?;
        let service = Arc::new(guard_of(plan, name, &known.zone, known.services.get(name), now));
        let mut services = known.services.clone();
        services.insert(name.to_owned(), service.clone());
        *known = Arc::new(Known { services, zone: known.zone.clone(), guard: known.guard.clone() });
        Ok(service)
    }

    /// Take an endpoint out by hand, or let it back in; false if there is none of that address.
    pub fn isolate(&self, service: &str, address: &str, is_isolated: bool, now: Duration) -> bool {
        self.find(service).is_some_and(|service| service.isolate(address, is_isolated, now))
    }

    /// The word of an active health check; false if there is no such endpoint.
    pub fn check(&self, service: &str, address: &str, is_healthy: bool, now: Duration) -> bool {
        self.find(service).is_some_and(|service| service.check(address, is_healthy, now))
    }

    /// What is computed once a second, off the request's path.
    pub fn tend(&self, now: Duration) {
        for service in self.known.lock().clone().services.values() {
            service.tend(now);
        }
    }

    /// How many calls of a Service have begun to end, or are under way: 0 means that nobody here calls it.
    pub fn calls(&self, service: &str) -> u64 {
        let calls =
            |service: &Arc<Service>| service.state.counters.requests() + u64::from(service.state.in_flight.count());
        self.known.lock().find(service).map_or(0, calls)
    }

    /// Counters of each Service (endpoint "") and each Endpoint that was ever used.
    pub fn read(&self, now: Duration) -> Vec<EndpointReading> {
        self.distinct().iter().flat_map(|service| service.read(now)).collect()
    }

    fn distinct(&self) -> Vec<Arc<Service>> {
        let known = self.known.lock().clone();
        let mut list: Vec<Arc<Service>> = known.services.values().cloned().collect();
        list.sort_by(|a, b| a.plan.name.cmp(&b.plan.name));
        list.dedup_by(|a, b| Arc::ptr_eq(a, b));
        list
    }

    fn find(&self, authority: &str) -> Option<Arc<Service>> {
        self.known.lock().find(authority).cloned()
    }

    fn unknown(&self, authority: &str) -> String {
        let services = self.distinct();
        let names: Vec<&str> = services.iter().filter(|s| !s.plan.is_guard).map(|s| &*s.plan.name).take(20).collect();
        format!("no service is called {:?}; the configuration names {}", host_of(authority), names.join(", "))
    }
}

impl Known {
    fn add(&mut self, service: Arc<Service>) {
        for host in &service.plan.hosts {
            let key = if service.plan.is_guard { host.clone() } else { host_of(host) };
            self.services.insert(key, service.clone());
        }
    }

    fn find(&self, authority: &str) -> Option<&Arc<Service>> {
        // The ordinary authority is the bare name; only others pay for parsing.
        self.services.get(authority).or_else(|| self.services.get(&host_of(authority)))
    }
}

/// A guard by the plan that all guards without their own have.
fn guard_of(plan: &ServicePlan, name: &str, zone: &Zone, known: Option<&Arc<Service>>, now: Duration) -> Service {
    let mut plan = ServicePlan { name: name.to_owned(), hosts: vec![name.to_owned()], ..plan.clone() };
    for route in &mut plan.routes {
        name.clone_into(&mut route.name);
    }
    // No text of the plan is its own.
    with_function(Service::compile(0, plan, zone, known, now), zone, now)
}

/// What a guard calls: the one endpoint that it has.
fn with_function(service: Service, zone: &Zone, now: Duration) -> Service {
    let address = service.plan.name.trim_start_matches(GUARD).to_owned();
    let function = Address {
        address,
        weight: 1.0,
        zone: String::new(),
        labels: Labels::new(),
        identity: String::new(),
        is_held: false,
    };
    service.resolve(1, &[function], zone, now);
    service
}

#[cfg(test)]
mod tests;
