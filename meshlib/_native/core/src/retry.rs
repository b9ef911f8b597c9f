//! Again, and may we afford it?
//!
//! A call is repeated only if that is safe: nothing was written, the peer said that it did not process it, or the call is
//! idempotent; if the route wants such a failure repeated; and if the budget allows it (budget.rs). What is slow enough to be asked
//! twice is quantile.rs. It does not choose the endpoint of the next attempt; balance does, after this module has said yes.
use std::time::Duration;

use self::budget::Budget;
use crate::model::{BudgetPlan, Condition, Outcome, Pushback, RetryPlan};
use crate::random::Random;

pub mod budget;
pub mod quantile;

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

/// Words of a call whose retries are used up, here or further down: whoever called us need not begin anew.
pub const NONE_LEFT: &str = "no retry left";
pub const NONE_AFFORDED: &str = "the retry budget is empty";
pub const NONE_WANTED: &str = "the endpoint asks not to be tried again";

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
    pub pushback: Pushback,
    /// Nobody was there, as the source says too: an attempt that nobody got loads nobody, and a service that has shrunk isn't an outage.
    pub is_free: bool,
}

/// The judgement, case by case; the words go into the call's record.
pub fn judge(
    facts: &Facts,
    plan: &RetryPlan,
    budget: (&Budget, &BudgetPlan),
    random: &Random,
    now: Duration,
) -> Verdict {
    use Outcome::{Cancelled, Declined, Identity, Protocol, Refused, Reset, Response, Stale, Timeout, Unwritten};
    let word = match facts.outcome {
        Response if !plan.statuses.contains(&facts.status) => return Verdict::Deliver("answered"),
        Cancelled => return Verdict::Deliver("cancelled by the caller"),
        // 1. Nothing was processed: safe for every method.
        Refused => "no connection",
        Unwritten => "nothing was written",
        Declined => "the endpoint declined to process it",
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
    if condition(facts.outcome).is_none_or(|failed| !plan.on.contains(&failed)) {
        return Verdict::Deliver("the route does not repeat this kind of failure");
    }
    if facts.layer > 0 {
        return Verdict::Deliver("a caller further up is already retrying");
    }
    if facts.retries >= facts.most_retries {
        return Verdict::Deliver(if facts.most_retries == 0 { "retry is off" } else { NONE_LEFT });
    }
    let wait = match facts.pushback {
        Pushback::Never => return Verdict::Deliver(NONE_WANTED),
        Pushback::After(asked) => asked,
        Pushback::Unsaid => backoff(plan, facts.retries, random),
    };
    if wait >= facts.left {
        return Verdict::Deliver("the deadline comes before the next attempt");
    }
    if !facts.is_free && !budget.0.withdraw(budget.1, now) {
        return Verdict::Deliver(NONE_AFFORDED);
    }
    Verdict::Retry(wait, word)
}

/// What the configuration calls a failure.
fn condition(outcome: Outcome) -> Option<Condition> {
    match outcome {
        Outcome::Refused => Some(Condition::Connect),
        // What is declined is not sent again for nothing: the whole service may be declining.
        Outcome::Unwritten | Outcome::Declined => Some(Condition::RefusedStream),
        Outcome::Stale | Outcome::Reset => Some(Condition::Reset),
        Outcome::Timeout => Some(Condition::Timeout),
        Outcome::Identity => Some(Condition::Identity),
        Outcome::Protocol => Some(Condition::Protocol),
        Outcome::Response => Some(Condition::Status),
        Outcome::Cancelled => None,
    }
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
            on: vec![
                Condition::Connect,
                Condition::RefusedStream,
                Condition::Reset,
                Condition::Timeout,
                Condition::Protocol,
                Condition::Identity,
                Condition::Status,
            ],
            per_try: 0.0,
            hedge: None,
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
            pushback: Pushback::Unsaid,
            is_free: false,
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
    fn only_the_failures_that_the_route_names_are_repeated() {
        let narrow = RetryPlan { on: vec![Condition::Connect], ..plan() };
        let budget = Budget::new();
        let judged = |outcome| judge(&facts(outcome), &narrow, (&budget, &BUDGET), &Random::new(1), SECOND);
        assert!(matches!(judged(Outcome::Refused), Verdict::Retry(..)));
        assert_eq!(judged(Outcome::Reset), Verdict::Deliver("the route does not repeat this kind of failure"));
        // Nothing was sent: this is no retry.
        assert_eq!(judged(Outcome::Stale), Verdict::Replay);
    }

    #[test]
    fn only_one_layer_retries() {
        assert!(matches!(judged(Facts { layer: 1, ..facts(Outcome::Refused) }), Verdict::Deliver(_)));
    }

    #[test]
    fn a_wait_beyond_the_deadline_is_not_begun() {
        let late = Facts { left: SECOND, pushback: Pushback::After(2 * SECOND), ..facts(Outcome::Response) };
        assert_eq!(judged(late), Verdict::Deliver("the deadline comes before the next attempt"));
        let never = Facts { pushback: Pushback::Never, ..facts(Outcome::Response) };
        assert_eq!(judged(never), Verdict::Deliver("the endpoint asks not to be tried again"));
    }
}
