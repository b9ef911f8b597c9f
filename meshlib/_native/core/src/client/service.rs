//! What does the process know of a Service, and what of it survives a new configuration?
//!
//! The plan is compiled and immutable; the fleet is swapped as a whole; what calls have taught (budget, limits, latencies, breakers)
//! lives behind `Arc`s and goes on by the Service's name. It takes no decision about a call: `call.rs` does.
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use parking_lot::Mutex;

use super::fleet::{Fleet, Labels};
use super::health::Ejected;
use super::limits::{Limits, Refusals};
use crate::admit::permits::Permits;
use crate::model::{Address, Plan, ServicePlan, WeightSource};
use crate::observe::{Counters, Reading};
use crate::retry::budget::Budget;
use crate::retry::quantile::Quantile;
use crate::route::Route;

/// Tier: Service. The compiled plan, and the endpoints of the moment.
pub struct Service {
    /// A hash of the text that it was compiled from.
    pub text: u64,
    pub plan: ServicePlan,
    pub routes: Vec<Route>,
    pub state: Arc<ServiceState>,
    /// The zone of this process; empty: unknown.
    pub zone: Arc<str>,
    /// Some route asks how long calls take.
    pub has_hedges: bool,
    /// Where turns begin, so that the processes of a fleet that start together don't move in step.
    pub start: u64,
    fleet: Mutex<Arc<Fleet>>,
}

/// Tier: Service. What outlives a swap.
#[derive(Default)]
pub struct ServiceState {
    pub budget: Budget,
    /// What hedges may add; apart from the budget, which they draw on too.
    pub hedge_share: Rare<Budget>,
    pub in_flight: Permits,
    pub limits: Limits,
    /// How long calls take; there only where somebody asks.
    pub latency: OnceLock<Box<Quantile>>,
    pub counters: Counters,
    pub ejected: Ejected,
    pub ejected_count: AtomicU32,
    /// Endpoints that would be ejected, were that allowed.
    pub suspects: Ejected,
    pub suspect_count: AtomicU32,
    /// When the next probe may be due, in nanoseconds: nobody looks for one before.
    next_probe: AtomicU64,
    /// When the next probe may go to an endpoint that the source doesn't tell any more, in nanoseconds.
    next_doubtful: AtomicU64,
    /// Changes of any endpoint's state.
    pub changes: AtomicU32,
    /// The newest fleet: a call that pins an older plan tells this one what it learns.
    newest: Mutex<Arc<Fleet>>,
    /// Those that were replaced, and that calls still have.
    retired: Mutex<Vec<Arc<Fleet>>>,
    pub hedges: AtomicU32,
    pub panics: AtomicU32,
    /// Connects that came to nothing: whoever knows where the endpoints are should look again.
    pub unreachable: AtomicU32,
    pub refusals: Refusals,
}

/// What few Services need; made when it is first asked for.
#[derive(Default)]
pub struct Rare<T>(OnceLock<Box<T>>);

impl<T: Default> std::ops::Deref for Rare<T> {
    type Target = T;

    fn deref(&self) -> &T {
        self.0.get_or_init(Box::default)
    }
}

/// What the exporters see of an Endpoint, or of the Service itself (`endpoint` empty).
#[derive(Debug, Clone, Default)]
pub struct EndpointReading {
    pub service: String,
    pub endpoint: String,
    pub zone: String,
    pub in_flight: u32,
    pub breaker: &'static str,
    pub ewma: f64,
    pub weight: f64,
    pub counters: Reading,
    pub budget: f64,
    pub limit: u32,
    pub pending: u32,
    pub limited: u32,
    pub throttled: u32,
    pub rate_limited: u32,
    pub hedges: u32,
    pub panics: u32,
    /// Seconds after which a call of this Service is slow; 0: not known yet.
    pub slow_after: f64,
}

impl Service {
    pub fn compile(
        text: u64,
        mut plan: ServicePlan,
        whole: &Zone,
        known: Option<&Arc<Service>>,
        now: Duration,
    ) -> Self {
        // The compiled routes own their plans.
        let routes: Vec<Route> = std::mem::take(&mut plan.routes).into_iter().map(Route::compile).collect();
        let state = known.map_or_else(Arc::default, |service| service.state.clone());
        state.limits.keep(&plan.admit);
        let has_hedges = routes.iter().any(|route| route.plan.retry.hedge.is_some());
        let (zone, start) = (whole.name.clone(), whole.start);
        let service =
            Self { text, plan, routes, state, zone, has_hedges, start, fleet: Mutex::new(Arc::new(Fleet::default())) };
        if let Some(known) = known {
            let fleet = known.fleet();
            service.install(whole, || Fleet::compile(&service, fleet.version, &fleet.addresses(), &fleet, now));
        }
        service
    }

    pub fn fleet(&self) -> Arc<Fleet> {
        self.fleet.lock().clone()
    }

    pub fn resolve(&self, version: u64, addresses: &[Address], whole: &Zone, now: Duration) {
        let old = self.fleet();
        if version >= old.version {
            self.install(whole, || Fleet::compile(self, version, addresses, &old, now));
        }
    }

    /// Endpoints that are new or not as before, and addresses that are gone; false where what is known is not the version `base`.
    pub fn amend(
        &self,
        base: u64,
        version: u64,
        changed: &[Address],
        gone: &[String],
        whole: &Zone,
        now: Duration,
    ) -> bool {
        let old = self.fleet();
        let is_fitting = base == old.version && version > base;
        if is_fitting {
            self.install(whole, || Fleet::amend(self, version, changed, gone, &old, now));
        }
        is_fitting
    }

    fn install(&self, whole: &Zone, make: impl FnOnce() -> Fleet) {
        let changes = self.state.changes.load(Ordering::Acquire);
        let fleet = Arc::new(make());
        fleet.set_callers(&whole.callers.lock());
        // Nobody is ejected or comes back from here on; what happened while it was compiled is counted again.
        let mut ejected = self.state.ejected.lock();
        fleet.take_over(self.state.changes.load(Ordering::Acquire) != changes);
        let before = std::mem::replace(&mut *self.fleet.lock(), fleet.clone());
        let newest = std::mem::replace(&mut *self.state.newest.lock(), fleet.clone());
        ejected.retain(|state| fleet.place_of(state).is_some());
        self.state.ejected_count.store(ejected.len() as u32, Ordering::Release);
        drop(ejected);
        let mut suspects = self.state.suspects.lock();
        suspects.retain(|state| fleet.place_of(state).is_some());
        self.state.suspect_count.store(suspects.len() as u32, Ordering::Release);
        drop(suspects);
        self.state.retire([before, newest]);
    }

    /// The fleet of the newest plan and the newest snapshot: not ours, where a call outlives its plan.
    pub fn newest(&self) -> Arc<Fleet> {
        self.state.newest.lock().clone()
    }

    /// The labels that a call asked for, as a Backend.
    pub fn subset(&self, fleet: &Fleet, labels: &Labels) -> Arc<super::fleet::Backend> {
        fleet.subset(self, labels)
    }

    /// What is computed once a second, off the request's path.
    pub fn tend(&self, now: Duration) {
        self.state.retire([]);
        if let Some(latency) = self.state.latency.get() {
            latency.refresh(now);
        }
        if self.plan.balance.weights == WeightSource::Orca {
            self.fleet().weigh(self, now);
        }
    }

    /// In a forked child nothing of the parent's is under way.
    pub fn forget_in_flight(&self) {
        self.state.in_flight.clear();
        for endpoint in &self.fleet().endpoints {
            endpoint.state.forget_in_flight();
        }
        self.state.probe_again_at(Duration::ZERO);
    }

    pub fn read(&self, now: Duration) -> Vec<EndpointReading> {
        let state = &self.state;
        let load = |counter: &AtomicU32| counter.load(Ordering::Relaxed);
        let hedge = self.routes.iter().find_map(|route| route.plan.retry.hedge);
        let mut list = vec![EndpointReading {
            service: self.plan.name.clone(),
            in_flight: state.in_flight.count(),
            counters: state.counters.read(),
            budget: state.budget.left(&self.plan.budget, now),
            limit: state.limits.in_flight(&self.plan.admit),
            pending: state.in_flight.pending(),
            limited: load(&state.refusals.limited),
            throttled: load(&state.refusals.throttled),
            rate_limited: load(&state.refusals.rate_limited),
            hedges: load(&state.hedges),
            panics: load(&state.panics),
            slow_after: hedge.and_then(|plan| state.slow_after(plan.quantile)).map_or(0.0, |after| after.as_secs_f64()),
            ..EndpointReading::default()
        }];
        let fleet = self.fleet();
        for endpoint in &fleet.endpoints {
            let health = endpoint.state.health.lock();
            list.push(EndpointReading {
                service: self.plan.name.clone(),
                endpoint: fleet.address(endpoint).to_owned(),
                zone: fleet.zone_of(endpoint).to_owned(),
                in_flight: endpoint.state.in_flight.count(),
                breaker: health.breaker.state.word(),
                ewma: health.average.read(&self.plan.balance, now),
                weight: fleet.weight(endpoint, &health, &self.plan.balance, now),
                counters: endpoint.state.counters.read(),
                ..EndpointReading::default()
            });
        }
        list
    }
}

/// Fleets at most that wait for the last call to be done with them.
const MOST_RETIRED: usize = 16;

/// A probe of who isn't told any more costs a call an attempt, and there may be hundreds of them: one a second for all together.
const DOUBTFUL_EVERY: Duration = Duration::from_secs(1);

impl ServiceState {
    /// A fleet that was replaced is freed here, when no call has it any more, and not by the last of those calls: that would wait for ten
    /// thousand endpoints.
    fn retire<const N: usize>(&self, replaced: [Arc<Fleet>; N]) {
        let mut retired = self.retired.lock();
        for fleet in replaced {
            if !retired.iter().any(|known| Arc::ptr_eq(known, &fleet)) {
                retired.push(fleet);
            }
        }
        let all = std::mem::take(&mut *retired);
        let (used, unused): (Vec<_>, Vec<_>) = all.into_iter().partition(|fleet| Arc::strong_count(fleet) > 1);
        let excess = used.len().saturating_sub(MOST_RETIRED);
        *retired = used.into_iter().skip(excess).collect();
        drop(retired);
        drop(unused);
    }

    #[cfg(test)]
    pub fn retired_count(&self) -> usize {
        self.retired.lock().len()
    }

    /// No probe goes to an endpoint that the source doesn't tell any more before then.
    pub fn doubtful_from(&self) -> Duration {
        Duration::from_nanos(self.next_doubtful.load(Ordering::Acquire))
    }

    pub fn doubtful_asked(&self, now: Duration) {
        self.next_doubtful.store(nanos(now + DOUBTFUL_EVERY), Ordering::Release);
    }

    /// A probe is due then, or earlier.
    pub fn probe_at(&self, until: Duration) {
        self.next_probe.fetch_min(nanos(until), Ordering::AcqRel);
    }

    pub fn is_probe_due(&self, now: Duration) -> bool {
        let has_any = self.ejected_count.load(Ordering::Acquire) > 0 || self.suspect_count.load(Ordering::Acquire) > 0;
        has_any && nanos(now) >= self.next_probe.load(Ordering::Acquire)
    }

    /// All have been looked at, and the next is due then.
    pub fn probe_again_at(&self, next: Duration) {
        self.next_probe.store(nanos(next), Ordering::Release);
    }

    /// What this share of the calls stays below; None: not enough is known.
    pub fn slow_after(&self, quantile: f64) -> Option<Duration> {
        self.latency.get()?.value(quantile)
    }
}

fn nanos(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

/// Where this process runs, and where those run that are the same Service as it.
#[derive(Default)]
pub struct Zone {
    pub name: Arc<str>,
    /// The Service that we are.
    pub service: String,
    /// Its processes by zone.
    pub callers: Mutex<Vec<(String, u32)>>,
    pub start: u64,
}

impl Zone {
    pub fn of(plan: &Plan<'_>, own: Option<&Arc<Service>>, start: u64) -> Self {
        let callers = own.map_or_else(Vec::new, |own| own.fleet().zone_counts());
        Self { name: Arc::from(&*plan.zone), service: plan.service.clone(), callers: Mutex::new(callers), start }
    }
}
