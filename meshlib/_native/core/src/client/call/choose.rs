//! Who takes the next attempt, and why?
//!
//! ```text
//! 1. probe     an ejected endpoint whose wait is over takes this call, or one that only the cap kept in (first attempts only: a
//!              retry must not gamble)
//! 2. session   the endpoint that this session came back to (first attempts only, if it is well)
//! 3. zone      the healthy in the part that locality names: the call's own wish, the order of failover, or the zone's share
//! 4. backend   the healthy of the whole backend; in panic, all of it
//! 5. others    the healthy of the route's other backends
//! 6. again     those that were tried already, the healthy first
//! ```
//!
//! A hash key skips 3: it has one home, whoever asks. Within each step the policy of the Service picks (`eligible.rs`). Where some endpoints
//! are only held (the registry doesn't tell them any more), a call that has met one of them that is gone goes on to one that is told, if there
//! is any: the next one that is held may be gone, too.
use std::sync::atomic::Ordering;
use std::time::Duration;

use super::record::Event;
use super::Call;
use crate::balance::{locality, Pick};
use crate::client::eligible::{Eligible, Held};
use crate::client::fleet::Backend;
use crate::model::{BalancePolicy, LocalityPolicy};

/// An endpoint by its place, whether it is a probe, and the words for the record.
pub(super) type Choice = (u32, bool, Event);

impl Call {
    pub(super) fn choose(&self, now: Duration) -> Option<Choice> {
        let backend = self.backend()?;
        if self.attempts.is_empty() {
            if let Some((place, is_probe)) = self.service.probe(&self.fleet, backend, self.is_idempotent, now) {
                let what = if is_probe { "probe" } else { "picked to see whether it is back" };
                return Some((place as u32, is_probe, Event { what, ..Event::NONE }));
            }
            if let Some(place) = self.session.filter(|place| self.is_well(backend, *place)) {
                return Some((place, false, Event { what: "picked by session", ..Event::NONE }));
            }
        }
        let (place, event) = self.choose_untried(now).or_else(|| {
            // A healthy one that was tried before one that is known to be sick. A guard has no other: its breaker's word is final.
            let sick = || if self.service.plan.is_guard { None } else { self.pick(backend, true, &[], now) };
            let pick = self.pick(backend, false, &[], now).or_else(sick)?;
            picked(pick, backend, "picked again, for want of another")
        })?;
        Some((place, false, event))
    }

    /// Steps 3 to 5.
    pub(super) fn choose_untried(&self, now: Duration) -> Option<(u32, Event)> {
        // Nothing is allocated for the first attempt, which has none behind it.
        let tried: Vec<u32> = self.attempts.iter().map(|attempt| attempt.place).collect();
        let backend = self.backend()?;
        // Priorities have a panic of their own: the other zones may have room.
        let is_panic = backend.tiers.is_empty() && self.service.is_panicking(backend);
        let mut what = "picked";
        if is_panic {
            self.service.state.panics.fetch_add(1, Ordering::Relaxed);
            what = "picked in panic";
        } else if self.has_home() {
            what = "picked by key";
        } else if let Some((part, is_panic)) = self.part(backend) {
            // Where a zone is gone as a whole, its other endpoints are, too.
            let part = part.filter(|part| part.has_told() || !backend.has_doubtful() || !self.has_met_gone(&tried));
            let near = part.and_then(|part| Some((self.pick(part, is_panic, &tried, now)?, part)));
            if let Some((pick, part)) = near {
                return picked(pick, part, if is_panic { "picked in zone, in panic" } else { "picked in zone" });
            }
            what = "picked outside the zone";
        }
        let is_panic = self.service.is_panicking(backend);
        if let Some(pick) = self.pick(backend, is_panic, &tried, now) {
            return picked(pick, backend, what);
        }
        if self.subset.is_some() {
            return None; // the call asked for these labels
        }
        let others = &self.plan()?.plan.backends;
        for index in (0..others.len()).filter(|index| *index != self.backend as usize) {
            if others.get(index).is_none_or(|plan| plan.weight == 0) {
                continue; // it takes no traffic, by configuration
            }
            let Some(other) = self.fleet.backend(self.route as usize, index) else { continue };
            if let Some(pick) = self.pick(other, false, &tried, now) {
                return picked(pick, other, "picked from another backend");
            }
        }
        None
    }

    /// The part of the backend that locality names, and whether that part is in panic. None: zones don't count for this call;
    /// Some(None): they do, but there is nothing in the wanted one.
    fn part<'a>(&self, backend: &'a Backend) -> Option<(Option<&'a Backend>, bool)> {
        if let Some(zone) = self.zone {
            return Some((backend.in_zone(zone), false));
        }
        let plan = &self.service.plan.balance.locality;
        match plan.policy {
            LocalityPolicy::Failover if !backend.tiers.is_empty() => Some(self.tier(backend, plan.overprovisioning)),
            LocalityPolicy::ZoneAware
                if self.own_zone.is_some() && backend.count(&self.fleet) >= plan.least_endpoints =>
            {
                Some((backend.draw_zone(&self.random), false))
            }
            _ => None,
        }
    }

    /// A priority by its share, as Envoy's: 1.4 times its healthy ones must carry it, what they can't goes to the next.
    fn tier<'a>(&self, backend: &'a Backend, overprovisioning: f64) -> (Option<&'a Backend>, bool) {
        if backend.out() == 0 {
            return (backend.tiers.iter().find(|tier| tier.health().1 > 0), false);
        }
        let mut health = [locality::Health::default(); locality::PRIORITIES];
        for (slot, tier) in health.iter_mut().zip(&backend.tiers) {
            let (healthy, total) = tier.health();
            *slot = locality::Health { healthy, total };
        }
        let loads = locality::loads(&health, (overprovisioning * 100.0).round() as u32);
        // Where no priority is well enough to go by, size decides: each endpoint takes the same.
        let is_well = |tier: &Backend| tier.health().1 > 0 && !self.service.is_panicking(tier);
        if loads.health < 100 && !backend.tiers.iter().any(is_well) {
            return (Some(backend), true);
        }
        let tier = loads.pick(&self.random).and_then(|priority| backend.tiers.get(priority));
        // Only where all priorities together can't carry it does the health within one stop to count.
        let is_panic = loads.health < 100 && tier.is_some_and(|tier| self.service.is_panicking(tier));
        (tier, is_panic)
    }

    /// A key decides, not cost.
    fn has_home(&self) -> bool {
        self.hash.is_some()
            && matches!(self.service.plan.balance.policy, BalancePolicy::RingHash | BalancePolicy::Maglev)
    }

    fn is_well(&self, backend: &Backend, place: u32) -> bool {
        let endpoint = self.fleet.endpoints.get(place as usize);
        backend.has(place as usize) && endpoint.is_some_and(|e| e.weight > 0.0 && !e.state.is_out())
    }

    /// One that the source doesn't tell any more was tried, and is out.
    fn has_met_gone(&self, tried: &[u32]) -> bool {
        let is_gone = |place: &u32| {
            let endpoint = self.fleet.endpoints.get(*place as usize);
            self.fleet.is_doubtful(*place as usize) && endpoint.is_some_and(|e| e.state.is_out())
        };
        tried.iter().any(is_gone)
    }

    fn pick(&self, backend: &Backend, is_panic: bool, tried: &[u32], now: Duration) -> Option<Pick> {
        let balance = &self.service.plan.balance;
        // This call is in flight itself.
        let in_flight = self.service.state.in_flight.count().saturating_sub(1);
        let with = |held: Held| {
            let view = Eligible { fleet: &self.fleet, backend, balance, now, is_panic, tried, held };
            view.pick(self.hash, in_flight, &self.random)
        };
        if !backend.has_doubtful() {
            return with(Held::All);
        }
        let told = if self.has_met_gone(tried) { with(Held::None) } else { None };
        let pick = told.or_else(|| with(Held::Well));
        if is_panic {
            pick.or_else(|| with(Held::All))
        } else {
            pick
        }
    }
}

fn picked(pick: Pick, backend: &Backend, what: &'static str) -> Option<(u32, Event)> {
    let place = backend.place(pick.index)?;
    let other = pick.other.and_then(|(index, cost)| backend.place(index).map(|p| (p as u32, cost)));
    Some((place as u32, Event { what, cost: pick.cost, other, ..Event::NONE }))
}
