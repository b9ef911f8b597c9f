//! How is one endpoint, and how does everybody learn that it changed?
//!
//! An endpoint's state stands in four places, because each reader needs it in another form: the breaker (the truth), a flag that
//! balance reads without a lock, the list of ejected endpoints in which probes are found, and the counts of each Backend by which panic
//! and zones go. All four change in `Service::transition` and nowhere else, under one lock (`Ejected`), so that they can't disagree.
//! Who may be ejected at all (at most half, never the last) is decided here too; what a breaker thinks of a result is `admit`'s.
//!
//! Some endpoints may only be held: the registry doesn't tell them any more, and discovery keeps them in case that it is wrong. As long as
//! they answer they are like all others. One at which nobody is (a dead connection, or somebody else's identity) is ejected whatever the cap
//! says, and is not counted any more, neither by the cap nor by panic: two witnesses say that it is gone, and to keep half of such in would
//! fail the calls that it gets. That holds only while the registry tells somebody. Where it tells nobody it is not believed at all, and the
//! rules are the ordinary ones.
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;

use super::fleet::{Backend, Endpoint, Fleet};
use super::service::Service;
use crate::admit::breaker::{is_slow, Breaker, Signal, State};
use crate::admit::permits::InFlight;
use crate::balance::orca;
use crate::balance::PeakEwma;
use crate::model::{BalancePlan, Class};
use crate::observe::Counters;
use crate::random::Random;

/// Tier: Endpoint. What outlives a swap.
pub struct EndpointState {
    pub in_flight: InFlight,
    /// The breaker's word as balance needs it: read without a lock.
    is_out: AtomicBool,
    /// Taken out by hand: not even panic uses it.
    is_isolated: AtomicBool,
    /// It ought to be out, and is not for want of others.
    is_suspect: AtomicBool,
    /// Its place in the newest fleet.
    pub place: AtomicU32,
    /// Since when it warms up, in tenths of a second; 0: it is warm.
    warm_since: AtomicU32,
    pub health: Mutex<Health>,
    pub counters: Counters,
}

pub struct Health {
    pub breaker: Breaker,
    pub average: PeakEwma,
    /// What it said of its own load.
    pub load: Option<Box<orca::Weight>>,
}

/// Tier: Service. Endpoints that a breaker took out, in the order of their ejection.
pub type Ejected = Mutex<Vec<Arc<EndpointState>>>;

impl EndpointState {
    pub fn new(plan: &BalancePlan, is_new: bool, now: Duration) -> Self {
        let state = Self {
            in_flight: InFlight::default(),
            is_out: AtomicBool::new(false),
            is_isolated: AtomicBool::new(false),
            is_suspect: AtomicBool::new(false),
            place: AtomicU32::new(0),
            warm_since: AtomicU32::new(0),
            health: Mutex::new(Health { breaker: Breaker::new(), average: PeakEwma::new(plan, now), load: None }),
            counters: Counters::default(),
        };
        if is_new {
            state.warm_up(now);
        }
        state
    }

    pub fn is_out(&self) -> bool {
        self.is_out.load(Ordering::Acquire)
    }

    /// A breaker took it out, and not a check or a person.
    pub fn is_ejected(&self) -> bool {
        self.is_out() && matches!(self.health.lock().breaker.state, State::Open | State::HalfOpen)
    }

    /// It is ejected, and the last that was heard of it was that nobody is there.
    pub fn is_found_dead(&self) -> bool {
        self.is_ejected() && self.health.lock().breaker.is_dead()
    }

    pub fn is_isolated(&self) -> bool {
        self.is_isolated.load(Ordering::Acquire)
    }

    fn warm_up(&self, now: Duration) {
        self.warm_since.store(tenths(now).max(1), Ordering::Relaxed);
    }

    /// Seconds since it began to warm up; None: it is warm.
    pub fn age(&self, now: Duration) -> Option<Duration> {
        match self.warm_since.load(Ordering::Relaxed) {
            0 => None,
            since => Some(now.saturating_sub(Duration::from_millis(u64::from(since) * 100))),
        }
    }

    /// It has its full weight: from here on nobody has to ask for the time.
    pub fn is_warm(&self) {
        self.warm_since.store(0, Ordering::Relaxed);
    }

    /// In a forked child nothing of the parent's is under way, and its probe's end will not be told.
    pub fn forget_in_flight(&self) {
        self.in_flight.clear();
        self.health.lock().breaker.signal(Signal::ProbeVanished);
    }
}

fn tenths(now: Duration) -> u32 {
    u32::try_from(now.as_millis() / 100).unwrap_or(u32::MAX)
}

impl Service {
    /// The one place where an endpoint's state changes. True if the signal changed it; only then `change` is made as well.
    fn transition(&self, state: &Arc<EndpointState>, signal: Signal, change: impl FnOnce(&mut Health)) -> bool {
        let mut ejected = self.state.ejected.lock();
        let fleet = self.newest();
        if signal == Signal::Trip && !self.may_eject(&fleet, state, &ejected) {
            return false;
        }
        let mut health = state.health.lock();
        let was_out = health.breaker.state != State::Closed;
        let is_changed = health.breaker.signal(signal);
        if is_changed {
            change(&mut health);
        }
        let (after, until) = (health.breaker.state, health.breaker.until());
        drop(health);
        let is_out = after != State::Closed;
        state.is_out.store(is_out, Ordering::Release);
        state.is_isolated.store(after == State::Isolated, Ordering::Release);
        // One that discovery has taken away meanwhile would count as ejected for ever.
        let place = fleet.place_of(state);
        if is_out != was_out {
            if let Some(place) = place {
                fleet.count_out(place, is_out);
            }
        }
        ejected.retain(|known| !Arc::ptr_eq(known, state));
        if matches!(after, State::Open | State::HalfOpen) && place.is_some() {
            ejected.push(state.clone());
            self.state.probe_at(until);
        }
        self.state.ejected_count.store(ejected.len() as u32, Ordering::Release);
        self.state.changes.fetch_add(1, Ordering::AcqRel);
        drop(ejected);
        if is_out != was_out {
            fleet.share_zones();
        }
        is_changed
    }

    /// What a breaker has to say after an attempt. Returns a word for the record if the state changed.
    pub fn note(
        &self,
        endpoint: &Endpoint,
        class: Class,
        took: Duration,
        is_probe: bool,
        random: &Random,
        now: Duration,
    ) -> Option<&'static str> {
        let (plan, state) = (&self.plan.admit.breaker, &endpoint.state);
        let mut health = state.health.lock();
        match health.breaker.state {
            State::HalfOpen if is_probe => {
                drop(health);
                let is_slow = class == Class::Success && is_slow(took, plan);
                match class {
                    // A slow but correct endpoint must not go in and out.
                    Class::Success if is_slow => {
                        self.transition(state, Signal::ProbeFailed, |health| health.breaker.open(plan, random, now));
                        Some("probe was slow: open again")
                    }
                    Class::Success | Class::Overload => {
                        self.come_back(state, Signal::ProbeSucceeded, now);
                        Some("probe succeeded: closed")
                    }
                    Class::Ignored => {
                        // It waits again: an endpoint that hangs must not take every call of an impatient caller as its probe.
                        self.transition(state, Signal::ProbeVanished, |health| health.breaker.wait_again(now));
                        None
                    }
                    Class::Failure | Class::Dead => {
                        self.transition(state, Signal::ProbeFailed, |health| health.breaker.open(plan, random, now));
                        Some("probe failed: open again")
                    }
                }
            }
            State::Closed => {
                let is_due = health.breaker.note(class, took, plan, now);
                drop(health);
                if !is_due {
                    if class == Class::Success && state.is_suspect.load(Ordering::Acquire) {
                        self.acquit(state, now);
                        return Some("well again: it was kept in for want of others");
                    }
                    return None;
                }
                if !self.transition(state, Signal::Trip, |health| health.breaker.open(plan, random, now)) {
                    self.suspect(state, random, now);
                    return None;
                }
                self.release(state);
                state.counters.ejection();
                self.state.counters.ejection();
                Some("ejected")
            }
            // Attempts that were under way when the breaker opened say nothing new.
            _ => None,
        }
    }

    /// It ought to be out, but too many are. Nearly nobody would choose it, with the average that it has; so it is asked now and then, as
    /// one that is out, or it would be missed for minutes after it came back.
    fn suspect(&self, state: &Arc<EndpointState>, random: &Random, now: Duration) {
        let _no_probe = self.state.ejected.lock();
        let mut suspects = self.state.suspects.lock();
        if self.newest().place_of(state).is_some() && !state.is_suspect.swap(true, Ordering::AcqRel) {
            suspects.push(state.clone());
            self.state.suspect_count.store(suspects.len() as u32, Ordering::Release);
        }
        drop(suspects);
        let mut health = state.health.lock();
        health.breaker.open(&self.plan.admit.breaker, random, now);
        self.state.probe_at(health.breaker.until());
    }

    fn acquit(&self, state: &Arc<EndpointState>, now: Duration) {
        self.release(state);
        let mut health = state.health.lock();
        health.breaker.reset();
        health.average = PeakEwma::new(&self.plan.balance, now);
    }

    fn release(&self, state: &Arc<EndpointState>) {
        if state.is_suspect.swap(false, Ordering::AcqRel) {
            let mut suspects = self.state.suspects.lock();
            suspects.retain(|known| !Arc::ptr_eq(known, state));
            self.state.suspect_count.store(suspects.len() as u32, Ordering::Release);
        }
    }

    /// Well again: with a clean record and an average of its own making, and warmed up like a new one.
    fn come_back(&self, state: &Arc<EndpointState>, signal: Signal, now: Duration) {
        let balance = &self.plan.balance;
        let is_back = self.transition(state, signal, |health| {
            if health.breaker.state == State::Closed {
                health.breaker.reset();
                health.average = PeakEwma::new(balance, now);
                health.load = None;
            }
        });
        if is_back && balance.slow_start > 0.0 {
            state.warm_up(now);
        }
    }

    /// By hand: out, or in again. False if there is none of that address.
    pub fn isolate(&self, address: &str, is_isolated: bool, now: Duration) -> bool {
        let fleet = self.fleet();
        let Some(endpoint) = fleet.find(address) else { return false };
        if is_isolated {
            self.transition(&endpoint.state, Signal::Isolate, |_| {});
        } else {
            self.come_back(&endpoint.state, Signal::Release, now);
        }
        true
    }

    /// The word of an active health check. A failing one takes the endpoint out until a check passes, whatever the calls say; a passing
    /// one ends an ejection early (Envoy). No cap holds for it: where all fail, balance panics.
    pub fn check(&self, address: &str, is_healthy: bool, now: Duration) -> bool {
        let fleet = self.fleet();
        let Some(endpoint) = fleet.find(address) else { return false };
        if !is_healthy {
            self.transition(&endpoint.state, Signal::CheckFailed, |_| {});
        } else if endpoint.state.is_out() {
            self.come_back(&endpoint.state, Signal::CheckPassed, now);
        }
        true
    }

    /// At most a share of the endpoints, and never the last one: an outage of all must not look like an outage of the mesh. A guard
    /// has one function and no other, so its breaker may open.
    fn may_eject(&self, fleet: &Fleet, state: &Arc<EndpointState>, ejected: &[Arc<EndpointState>]) -> bool {
        if self.plan.is_guard {
            return true;
        }
        let is_doubtful =
            |state: &Arc<EndpointState>| fleet.place_of(state).is_some_and(|place| fleet.is_doubtful(place));
        let (mut total, mut out, mut count) = (fleet.endpoints.len(), fleet.out(), ejected.len());
        if is_doubtful(state) {
            if state.health.lock().breaker.is_dead() {
                return true;
            }
            // Where nobody is there at all is no part of what may be out.
            let is_gone = |state: &&Arc<EndpointState>| is_doubtful(state) && state.health.lock().breaker.is_dead();
            let gone = ejected.iter().filter(is_gone).count();
            total = total.saturating_sub(gone);
            out = out.saturating_sub(gone);
            count = count.saturating_sub(gone);
        } else {
            let gone = fleet.gone();
            total = total.saturating_sub(gone);
            out = out.saturating_sub(gone);
            count = count.saturating_sub(ejected.iter().filter(|state| is_doubtful(state)).count());
        }
        // Whoever a person took out is no last resort either.
        out + 1 < total && (count + 1) as f64 <= total as f64 * self.plan.admit.breaker.max_ejected
    }

    /// The source doesn't tell it any more, and tells others.
    pub fn is_doubtful(&self, state: &Arc<EndpointState>) -> bool {
        let fleet = self.newest();
        fleet.place_of(state).is_some_and(|place| fleet.is_doubtful(place))
    }

    /// An endpoint of this Backend whose wait is over, and whether that is a probe: an ejected one is half open from here on, for this
    /// one call; one that was only kept in is asked like any other.
    pub fn probe(&self, fleet: &Fleet, backend: &Backend, is_idempotent: bool, now: Duration) -> Option<(usize, bool)> {
        let takes_traffic = |place: &usize| fleet.endpoints.get(*place).is_some_and(|e| e.weight > 0.0);
        let place = |state: &Arc<EndpointState>| {
            fleet.place_of(state).filter(takes_traffic).filter(|place| backend.has(*place))
        };
        if !self.state.is_probe_due(now) {
            return None;
        }
        // When the next of them is due, if this call takes none. Held to the end, so that none is added unseen.
        let mut next = Duration::MAX;
        let ejected = self.state.ejected.lock();
        let found = ejected.iter().find_map(|state| {
            let mut health = state.health.lock();
            if !health.breaker.is_due(is_idempotent, now) {
                if health.breaker.state == State::Open {
                    next = next.min(health.breaker.until());
                }
                return None;
            }
            let is_doubtful = fleet.place_of(state).is_some_and(|place| fleet.is_doubtful(place));
            if is_doubtful && now < self.state.doubtful_from() {
                next = next.min(self.state.doubtful_from());
                return None;
            }
            next = Duration::ZERO; // one that is due stays so until a call can take it
            let place = place(state)?;
            if is_doubtful {
                self.state.doubtful_asked(now);
            }
            // Open and half open are both "out": none of the other three places has to hear of it.
            health.breaker.signal(Signal::Probe);
            Some((place, true))
        });
        if found.is_some() {
            return found;
        }
        let suspects = self.state.suspects.lock();
        let found = suspects.iter().find_map(|state| {
            let mut health = state.health.lock();
            if health.breaker.state != State::Closed || now < health.breaker.until() {
                next = next.min(health.breaker.until().max(now));
                return None;
            }
            next = Duration::ZERO;
            let place = place(state)?;
            health.breaker.wait_again(now);
            Some((place, false))
        });
        if found.is_none() {
            self.state.probe_again_at(next);
        }
        found
    }

    /// So few endpoints of this Backend are healthy that health is ignored.
    pub fn is_panicking(&self, backend: &Backend) -> bool {
        let (healthy, total) = backend.health();
        if healthy == total || self.plan.is_guard {
            return false;
        }
        f64::from(healthy) < f64::from(total) * self.plan.balance.panic
    }
}
