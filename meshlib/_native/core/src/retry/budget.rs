//! How many retries may a Service still afford?
//!
//! A count of attempts per call multiplies load through layers, exactly when there is none to spare; a share of the calls of the last ten
//! seconds cannot (Finagle's RetryBudget, Linkerd's default: 20 % and 10 a second). The ring of buckets counts exactly, so that the
//! decision does not depend on the rate of calls. Retries and hedges draw on it alike; it does not ask which is which.
use std::time::Duration;

use parking_lot::Mutex;

use crate::model::BudgetPlan;

const BUCKETS: u32 = 10;

/// How many retries a Service may still spend. State of the Service; one per process.
#[derive(Debug, Default)]
pub struct Budget {
    ring: Mutex<Ring>,
}

#[derive(Debug, Default)]
struct Ring {
    newest: u64,
    calls: [u32; BUCKETS as usize],
    retries: [u32; BUCKETS as usize],
}

impl Budget {
    pub fn new() -> Self {
        Self::default()
    }

    /// A call began: it earns its share of a retry.
    pub fn deposit(&self, plan: &BudgetPlan, now: Duration) {
        let mut ring = self.ring.lock();
        let slot = ring.turn_to(bucket(plan, now));
        if let Some(calls) = ring.calls.get_mut(slot) {
            *calls = calls.saturating_add(1);
        }
    }

    /// Take a retry if there is one.
    pub fn withdraw(&self, plan: &BudgetPlan, now: Duration) -> bool {
        let mut ring = self.ring.lock();
        let slot = ring.turn_to(bucket(plan, now));
        if left_in(plan, &ring) < 1.0 {
            return false;
        }
        if let Some(retries) = ring.retries.get_mut(slot) {
            *retries = retries.saturating_add(1);
        }
        true
    }

    /// Retries that could be spent now.
    pub fn left(&self, plan: &BudgetPlan, now: Duration) -> f64 {
        let mut ring = self.ring.lock();
        ring.turn_to(bucket(plan, now));
        left_in(plan, &ring)
    }
}

fn left_in(plan: &BudgetPlan, ring: &Ring) -> f64 {
    let sum = |counts: &[u32]| counts.iter().map(|n| f64::from(*n)).sum::<f64>();
    plan.ratio * sum(&ring.calls) + plan.per_second * plan.window - sum(&ring.retries)
}

fn bucket(plan: &BudgetPlan, now: Duration) -> u64 {
    (now.as_secs_f64() * f64::from(BUCKETS) / plan.window.max(0.001)) as u64
}

impl Ring {
    /// Forget the buckets between the newest and this one, and say where this one stands.
    fn turn_to(&mut self, bucket: u64) -> usize {
        if bucket.saturating_add(u64::from(BUCKETS)) < self.newest {
            // Not a thread that read its clock a moment ago: a new plan made the window longer, and old numbers mean nothing in it.
            *self = Self { newest: bucket, ..Self::default() };
        }
        let steps = bucket.saturating_sub(self.newest).min(u64::from(BUCKETS));
        for step in 1..=steps {
            let slot = ((self.newest + step) % u64::from(BUCKETS)) as usize;
            if let (Some(calls), Some(retries)) = (self.calls.get_mut(slot), self.retries.get_mut(slot)) {
                (*calls, *retries) = (0, 0);
            }
        }
        if steps == u64::from(BUCKETS) {
            (self.calls, self.retries) = Default::default();
        }
        self.newest = self.newest.max(bucket);
        (self.newest % u64::from(BUCKETS)) as usize
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);
    const BUDGET: BudgetPlan = BudgetPlan { ratio: 0.2, per_second: 10.0, window: 10.0 };

    #[test]
    fn budget_gives_a_fifth_of_the_calls_and_ten_a_second() {
        let budget = Budget::new();
        for _ in 0..100 {
            budget.deposit(&BUDGET, SECOND);
        }
        assert_eq!((0..1000).filter(|_| budget.withdraw(&BUDGET, SECOND)).count(), 120);
        assert_eq!(budget.left(&BUDGET, SECOND * 12), 100.0);
        // A new plan counts at once.
        assert_eq!(budget.left(&BudgetPlan { per_second: 0.0, ..BUDGET }, SECOND * 12), 0.0);
    }
}
