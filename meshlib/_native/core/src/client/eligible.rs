//! What may balance see of the endpoints?
//!
//! Who can be chosen, how long it is expected to take, how busy it is, and what it weighs. This is where the endpoint's state, which
//! `admit` keeps, is handed to `balance`, which knows nothing of breakers.
use std::time::Duration;

use super::fleet::{Backend, Endpoint, Fleet, Table};
use crate::balance::{self, orca, warm, Pick, View};
use crate::model::{seconds, BalancePlan, BalancePolicy, WeightSource};
use crate::random::Random;

pub struct Eligible<'a> {
    pub fleet: &'a Fleet,
    pub backend: &'a Backend,
    pub balance: &'a BalancePlan,
    pub now: Duration,
    /// Health is ignored (but not a person's word).
    pub is_panic: bool,
    /// Endpoints that this call has tried already.
    pub tried: &'a [u32],
    pub held: Held,
}

/// Who of those that the source doesn't tell any more counts, where it tells others?
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Held {
    None,
    /// Those that aren't out: two witnesses against it are more than panic ignores.
    Well,
    All,
}

impl Eligible<'_> {
    /// By the Service's policy. `hash` is the call's key, `in_flight` the calls of the whole Service.
    pub fn pick(&self, hash: Option<u64>, in_flight: u32, random: &Random) -> Option<Pick> {
        let bound = self.balance.hash.bound;
        match (self.balance.policy, &self.backend.table, hash) {
            (BalancePolicy::RingHash, Table::Ring(ring), Some(key)) => {
                balance::by_hash(self, ring.walk(key), in_flight, bound)
            }
            (BalancePolicy::Maglev, Table::Maglev(table), Some(key)) => {
                balance::by_hash(self, table.walk(key), in_flight, bound)
            }
            (BalancePolicy::PeakEwma, _, _) => balance::peak_ewma(self, random),
            (BalancePolicy::LeastRequest, _, _) => balance::least_request(self, random),
            (BalancePolicy::RoundRobin, _, _) => balance::round_robin(self, &self.backend.turn),
            // A call without a key has no home.
            (BalancePolicy::Random | BalancePolicy::RingHash | BalancePolicy::Maglev, _, _) => {
                balance::by_chance(self, random)
            }
        }
    }

    fn endpoint(&self, index: usize) -> Option<(usize, &Endpoint)> {
        let place = self.backend.place(index)?;
        self.fleet.endpoints.get(place).map(|endpoint| (place, endpoint))
    }

    /// As a share of the largest.
    fn share_of_top(&self, endpoint: &Endpoint) -> f32 {
        let (top, mean) = (self.fleet.top(), self.fleet.mean());
        let weight = match self.balance.weights {
            WeightSource::Discover => endpoint.weight,
            // Nothing to compare with (yet): all are alike.
            WeightSource::Orca if mean <= 0.0 => return 1.0,
            // One that has said nothing for long is taken for an average one.
            WeightSource::Orca => {
                let terms = super::fleet::terms(&self.balance.orca);
                let health = endpoint.state.health.lock();
                orca::effective(health.load.as_ref().and_then(|load| load.read(&terms, self.now)), Some(mean))
            }
        };
        if weight <= 0.0 || top <= 0.0 {
            return 1.0;
        }
        (weight / top).min(1.0)
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
        let is_out = endpoint.state.is_out();
        let is_healthy = !is_out || (self.is_panic && !endpoint.state.is_isolated());
        let counts = match self.held {
            Held::All => true,
            Held::Well => !is_out || !self.fleet.is_held(place),
            Held::None => !self.fleet.is_held(place),
        };
        is_healthy && counts && !self.tried.contains(&(place as u32))
    }

    fn latency(&self, index: usize) -> f64 {
        self.endpoint(index)
            .map_or(f64::INFINITY, |(_, endpoint)| endpoint.state.health.lock().average.read(self.balance, self.now))
    }

    fn in_flight(&self, index: usize) -> u32 {
        self.endpoint(index).map_or(u32::MAX, |(_, endpoint)| endpoint.state.in_flight.count())
    }

    fn weight(&self, index: usize) -> f32 {
        self.endpoint(index).map_or(0.0, |(_, endpoint)| self.share_of_top(endpoint))
    }

    fn share(&self, index: usize) -> f64 {
        let sum = f64::from(self.backend.weight) * self.backend.healthy_part();
        self.endpoint(index).map_or(0.0, |(_, endpoint)| f64::from(endpoint.weight) / sum.max(1e-9))
    }

    fn warmth(&self, index: usize) -> f32 {
        let Some((_, endpoint)) = self.endpoint(index) else { return 1.0 };
        let Some(age) = endpoint.state.age(self.now) else { return 1.0 };
        let window = seconds(self.balance.slow_start);
        if age >= window {
            endpoint.state.is_warm();
            return 1.0;
        }
        warm::factor(age, self.balance.slow_start, self.balance.slow_start_least as f32, 1.0)
    }

    fn draw(&self, random: &Random) -> (usize, bool) {
        match &self.backend.table {
            Table::Alias(alias) if self.balance.weights == WeightSource::Discover => (alias.draw(random), true),
            // Where a policy has such tables, none means that all weights are alike; unless they are reported ones.
            table => {
                let is_alike = matches!(table, Table::None) && self.balance.policy.is_drawn();
                let is_by_weight = is_alike && self.balance.weights == WeightSource::Discover;
                (random.below(self.backend.count(self.fleet)), is_by_weight)
            }
        }
    }
}
