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
//! client/fleet.rs      Services, Backends and Endpoints as state, and what survives a swap
//! client/call.rs       one call: begin, next, head, finish
//! client/call/hedge.rs a second attempt beside the first
//! client/carried.rs    what an attempt tells the next hop
//! ```
use std::sync::Arc;
use std::time::Duration;

use ahash::AHashMap;
use parking_lot::Mutex;

use crate::model::{Address, Plan};
use crate::observe::{Counters, Reading};
use crate::random::Random;
use crate::route::{host_of, Headers};

mod call;
pub mod carried;
mod fleet;

pub use call::{Call, Candidate, Event, Next, Record, Reply, Request};
pub use fleet::EndpointReading;
use fleet::Service;

/// Why the mesh itself says no. Nothing was sent.
#[derive(Debug, Clone, PartialEq)]
pub enum Refusal {
    UnknownService(String),
    NoRoute(String),
    NoEndpoint(String),
    CircuitOpen(String),
    LimitExceeded(String),
    DeadlineExceeded(String),
    /// The driver called out of order: a mistake of ours, never of the user.
    Misuse(&'static str),
}

/// All outbound decisions of one process.
pub struct Engine {
    services: Mutex<Arc<AHashMap<String, Arc<Service>>>>,
    random: Arc<Random>,
}

impl Engine {
    pub fn new(seed: u64) -> Self {
        Self { services: Mutex::default(), random: Arc::new(Random::new(seed)) }
    }

    pub fn reseed(&self, seed: u64) {
        self.random.reseed(seed);
        for service in self.distinct() {
            service.forget_in_flight();
        }
    }

    /// Take a whole plan. What is not named any more disappears; the state of what stays (budgets, breakers, averages) survives.
    pub fn publish(&self, text: &[u8], now: Duration) -> Result<(), String> {
        let plan: Plan =
            serde_json::from_slice(text).map_err(|error| format!("the client plan can't be read: {error}"))?;
        let old = self.services.lock().clone();
        let mut new = AHashMap::with_capacity(plan.services.len());
        for service in plan.services {
            let hosts = service.hosts.clone();
            let compiled = Arc::new(Service::compile(service, &old, now));
            for host in hosts {
                if new.insert(host_of(&host), compiled.clone()).is_some() {
                    return Err(format!("two services of the client plan claim the host {host:?}"));
                }
            }
        }
        let old = std::mem::replace(&mut *self.services.lock(), Arc::new(new));
        // A large table is freed where nobody waits for it.
        drop(old);
        Ok(())
    }

    /// Take the endpoints of a Service as its resolver found them; an older version than the one at hand is ignored.
    pub fn resolve(&self, service: &str, version: u64, addresses: Vec<Address>, now: Duration) -> Result<(), Refusal> {
        let found = self.find(service).ok_or_else(|| Refusal::UnknownService(service.to_owned()))?;
        found.resolve(version, addresses, now);
        Ok(())
    }

    pub fn service_of(&self, authority: &str) -> Option<String> {
        self.find(authority).map(|service| service.plan.name.clone())
    }

    pub fn begin(&self, request: &Request<'_>, headers: &dyn Headers, now: Duration) -> Result<Call, Refusal> {
        let Some(service) = self.find(request.authority) else {
            return Err(Refusal::UnknownService(self.unknown(request.authority)));
        };
        Call::begin(service, self.random.clone(), request, headers, now)
    }

    /// Take an endpoint out by hand, or let it back in; false if there is none of that address.
    pub fn isolate(&self, service: &str, address: &str, is_isolated: bool, now: Duration) -> bool {
        self.find(service).is_some_and(|service| service.isolate(address, is_isolated, now))
    }

    /// Counters of each Service (endpoint "") and each Endpoint that was ever used.
    pub fn read(&self, now: Duration) -> Vec<EndpointReading> {
        self.distinct().iter().flat_map(|service| service.read(now)).collect()
    }

    fn distinct(&self) -> Vec<Arc<Service>> {
        let services = self.services.lock().clone();
        let mut list: Vec<Arc<Service>> = services.values().cloned().collect();
        list.sort_by(|a, b| a.plan.name.cmp(&b.plan.name));
        list.dedup_by(|a, b| Arc::ptr_eq(a, b));
        list
    }

    fn find(&self, authority: &str) -> Option<Arc<Service>> {
        let services = self.services.lock();
        // The ordinary authority is the bare name; only others pay for parsing.
        services.get(authority).or_else(|| services.get(&host_of(authority))).cloned()
    }

    fn unknown(&self, authority: &str) -> String {
        let mut names: Vec<String> = self.distinct().iter().map(|s| s.plan.name.clone()).collect();
        names.truncate(20);
        format!("no service is called {:?}; the configuration names {}", host_of(authority), names.join(", "))
    }
}

/// The reading of a counter with the words that the exporter needs.
fn reading(counters: &Counters) -> Reading {
    counters.read()
}

#[cfg(test)]
mod tests;
