//! Again, and may we afford it?
//!
//! A call is repeated only if that is safe: nothing was written, the peer said that it did not process it, or the call is
//! idempotent. And only if the budget allows it: a count of attempts per call multiplies load through layers, exactly when there
//! is none to spare; a share of the calls of the last ten seconds cannot (Finagle's RetryBudget, Linkerd's default: 20 % and
//! 10 a second). The ring of buckets counts exactly, so that the decision does not depend on the rate of calls. It does not choose
//! the endpoint of the next attempt; balance does, after this module has said yes.
use std::time::Duration;

use parking_lot::Mutex;

use crate::model::{BudgetPlan, Outcome, RetryPlan};
use crate::random::Random;

/// What may be done after an attempt.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Verdict {
    /// Hand it to the caller; the word says why it is not repeated.
    Deliver(&'static str),
    /// Another attempt, after this wait.
    Retry(Duration, &'static str),
    /// The same request once more on a fresh connection, outside the budget: the connection was dead before it was used.
    Replay,
}

/// All that the decision looks at.
#[derive(Debug, Clone, Copy)]
pub struct Facts {
    pub outcome: Outcome,
    pub status: u16,
    pub is_idempotent: bool,
    /// The body can be sent again.
    pub is_replayable: bool,
    pub has_replayed: bool,
    /// Retries that this call has already spent, and how many it may spend.
    pub retries: u32,
    pub most_retries: u32,
    /// Above 0 a caller further up is already retrying, and this layer must not.
    pub layer: u32,
    pub left: Duration,
    pub retry_after: Option<Duration>,
}

/// The judgement, case by case; the words go into the call's record.
pub fn judge(
    facts: &Facts,
    plan: &RetryPlan,
    budget: (&Budget, &BudgetPlan),
    random: &Random,
    now: Duration,
) -> Verdict {
    use Outcome::{Cancelled, Identity, Protocol, Refused, Reset, Response, Stale, Timeout, Unwritten};
    let word = match facts.outcome {
        Response if !plan.statuses.contains(&facts.status) => return Verdict::Deliver("answered"),
        Cancelled => return Verdict::Deliver("cancelled by the caller"),
        // 1. Nothing was processed: safe for every method.
        Refused => "no connection",
        Unwritten => "nothing was written",
        Identity => "wrong identity, so nothing was sent",
        // 2. It may have been processed: only for idempotent calls.
        Stale | Reset | Timeout | Protocol | Response if !facts.is_idempotent => {
            return Verdict::Deliver("not idempotent, and it may have been processed")
        }
        Stale => "kept-alive connection was closed",
        Reset => "connection lost",
        Timeout => "too slow",
        Protocol => "malformed answer",
        Response => "status",
    };
    // A body that is streamed is still whole where no connection came about.
    if !facts.is_replayable && !matches!(facts.outcome, Refused | Identity) {
        return Verdict::Deliver("the body was streamed and can't be sent again");
    }
    if matches!(facts.outcome, Stale | Unwritten) && !facts.has_replayed {
        return Verdict::Replay;
    }
    if facts.layer > 0 {
        return Verdict::Deliver("a caller further up is already retrying");
    }
    if facts.retries >= facts.most_retries {
        return Verdict::Deliver(if facts.most_retries == 0 { "retry is off" } else { "no retry left" });
    }
    let wait = match facts.retry_after {
        Some(asked) => asked,
        None => backoff(plan, facts.retries, random),
    };
    if wait >= facts.left {
        return Verdict::Deliver("the deadline comes before the next attempt");
    }
    if !budget.0.withdraw(budget.1, now) {
        return Verdict::Deliver("the retry budget is empty");
    }
    Verdict::Retry(wait, word)
}

/// Why may a call never be hedged? None if it may: whether there is an endpoint, a budget and the time is another question.
pub fn unhedged(is_idempotent: bool, is_replayable: bool, layer: u32, can_overlap: bool) -> Option<&'static str> {
    let reasons = [
        (!is_idempotent, "not idempotent, and both may be processed"),
        (!is_replayable, "the body was streamed and can't be sent again"),
        (layer > 0, "a caller further up is already retrying"),
        (!can_overlap, "a blocking client has one thread"),
    ];
    reasons.iter().find(|(is_so, _)| *is_so).map(|(_, word)| *word)
}

/// Full jitter: uniform below `base * 2^n`, capped (AWS, "Exponential backoff and jitter"; Envoy's 25 and 250 ms).
fn backoff(plan: &RetryPlan, retries: u32, random: &Random) -> Duration {
    let ceiling = (plan.backoff_base * f64::from(1u32 << retries.min(16))).min(plan.backoff_max);
    Duration::from_secs_f64((ceiling * random.unit()).max(0.0))
}

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

    fn plan() -> RetryPlan {
        RetryPlan {
            attempts: 1,
            backoff_base: 0.025,
            backoff_max: 0.25,
            statuses: vec![502, 503, 504],
            idempotency_key: false,
            idempotent: false,
        }
    }

    fn facts(outcome: Outcome) -> Facts {
        Facts {
            outcome,
            status: 503,
            is_idempotent: true,
            is_replayable: true,
            has_replayed: false,
            retries: 0,
            most_retries: 1,
            layer: 0,
            left: 15 * SECOND,
            retry_after: None,
        }
    }

    const BUDGET: BudgetPlan = BudgetPlan { ratio: 0.2, per_second: 10.0, window: 10.0 };

    fn judged(facts: Facts) -> Verdict {
        judge(&facts, &plan(), (&Budget::new(), &BUDGET), &Random::new(1), SECOND)
    }

    #[test]
    fn what_was_never_sent_is_safe_for_every_method() {
        for outcome in [Outcome::Refused, Outcome::Identity] {
            assert!(matches!(judged(Facts { is_idempotent: false, ..facts(outcome) }), Verdict::Retry(..)));
        }
    }

    #[test]
    fn what_may_have_been_processed_is_repeated_only_if_idempotent() {
        for outcome in [Outcome::Stale, Outcome::Reset, Outcome::Timeout, Outcome::Response, Outcome::Protocol] {
            assert!(matches!(judged(Facts { is_idempotent: false, ..facts(outcome) }), Verdict::Deliver(_)));
            assert!(!matches!(judged(facts(outcome)), Verdict::Deliver(_)));
        }
    }

    #[test]
    fn a_stale_connection_is_replayed_once_outside_the_budget() {
        assert_eq!(judged(facts(Outcome::Stale)), Verdict::Replay);
        assert!(matches!(judged(Facts { has_replayed: true, ..facts(Outcome::Stale) }), Verdict::Retry(..)));
    }

    #[test]
    fn only_one_layer_retries() {
        assert!(matches!(judged(Facts { layer: 1, ..facts(Outcome::Refused) }), Verdict::Deliver(_)));
    }

    #[test]
    fn a_wait_beyond_the_deadline_is_not_begun() {
        let late = Facts { left: SECOND, retry_after: Some(2 * SECOND), ..facts(Outcome::Response) };
        assert_eq!(judged(late), Verdict::Deliver("the deadline comes before the next attempt"));
    }

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
