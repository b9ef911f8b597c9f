//! Which endpoint of the backend?
//!
//! Peak EWMA over the power of two choices (Finagle, Linkerd): two endpoints are drawn, the one with the lower expected wait wins.
//! The average jumps up with a peak and comes down slowly, so that a stall is felt at once; the failed call counts as slow, so that
//! an endpoint which fails fast does not draw the traffic. Two draws instead of a scan keep the cost flat from 3 to 100,000
//! endpoints and avoid the herd that a global minimum attracts. It sees endpoints through `View` and knows nothing of breakers:
//! who may be chosen is the caller's word.
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use crate::model::BalancePlan;
use crate::random::Random;

/// An average of round-trip times that peaks replace and time erodes. State of an Endpoint.
#[derive(Debug, Clone, Copy)]
pub struct PeakEwma {
    seconds: f64,
    at: Duration,
}

impl PeakEwma {
    pub fn new(plan: &BalancePlan, now: Duration) -> Self {
        // A zero seed would make a fresh endpoint look free and draw everything to it.
        Self { seconds: plan.start.max(0.001), at: now }
    }

    pub fn add(&mut self, rtt: Duration, plan: &BalancePlan, now: Duration) {
        let rtt = rtt.as_secs_f64();
        let faded = self.read(plan, now);
        self.seconds = if rtt > faded {
            rtt
        } else {
            let keep = self.keep(plan, now);
            self.seconds * keep + rtt * (1.0 - keep)
        };
        self.at = self.at.max(now);
    }

    /// The expected wait now. Reading never writes: an endpoint that nobody asks loses its bad name with time.
    pub fn read(&self, plan: &BalancePlan, now: Duration) -> f64 {
        self.seconds * self.keep(plan, now)
    }

    fn keep(&self, plan: &BalancePlan, now: Duration) -> f64 {
        (-now.saturating_sub(self.at).as_secs_f64() / plan.decay.max(0.001)).exp()
    }
}

/// The endpoints of a Backend as balance may see them.
pub trait View {
    fn count(&self) -> usize;
    fn is_eligible(&self, index: usize) -> bool;
    /// The expected wait: the average times the calls in flight and this one, over the weight.
    fn cost(&self, index: usize) -> f64;
}

/// The choice, and what it was compared with (for `explain`).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Pick {
    pub index: usize,
    pub cost: f64,
    pub other: Option<(usize, f64)>,
}

/// Draws before a scan takes over. With half of the endpoints out, eight draws all miss once in 256 picks.
const DRAWS: usize = 8;

pub fn two_choices(view: &impl View, random: &Random) -> Option<Pick> {
    let first = draw(view, random, None)?;
    let Some(second) = draw(view, random, Some(first)) else {
        return Some(Pick { index: first, cost: view.cost(first), other: None });
    };
    let (a, b) = (view.cost(first), view.cost(second));
    Some(if b < a {
        Pick { index: second, cost: b, other: Some((first, a)) }
    } else {
        Pick { index: first, cost: a, other: Some((second, b)) }
    })
}

/// In turn; each caller's turn is one atomic step.
pub fn round_robin(view: &impl View, turn: &AtomicUsize) -> Option<Pick> {
    let count = view.count();
    let start = turn.fetch_add(1, Ordering::Relaxed);
    (0..count).map(|step| start.wrapping_add(step) % count).find(|index| view.is_eligible(*index)).map(|index| Pick {
        index,
        cost: view.cost(index),
        other: None,
    })
}

/// An eligible endpoint other than `except`, uniformly; None if there is none.
fn draw(view: &impl View, random: &Random, except: Option<usize>) -> Option<usize> {
    let count = view.count();
    let may = |index: usize| Some(index) != except && view.is_eligible(index);
    if count > 2 {
        for _ in 0..DRAWS {
            let index = random.below(count);
            if may(index) {
                return Some(index);
            }
        }
    }
    let start = random.below(count);
    (0..count).map(|step| (start + step) % count).find(|index| may(*index))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::indexing_slicing)]
    use super::*;
    use crate::model::BalancePolicy;

    const PLAN: BalancePlan =
        BalancePlan { policy: BalancePolicy::PeakEwma, decay: 10.0, start: 0.03, penalty: 5.0, panic: 0.5 };

    fn seconds(s: f64) -> Duration {
        Duration::from_secs_f64(s)
    }

    struct Fleet(Vec<(bool, f64)>);
    impl View for Fleet {
        fn count(&self) -> usize {
            self.0.len()
        }
        fn is_eligible(&self, index: usize) -> bool {
            self.0[index].0
        }
        fn cost(&self, index: usize) -> f64 {
            self.0[index].1
        }
    }

    #[test]
    fn a_peak_replaces_the_average_at_once() {
        let mut ewma = PeakEwma::new(&PLAN, seconds(0.0));
        ewma.add(seconds(1.0), &PLAN, seconds(1.0));
        assert_eq!(ewma.read(&PLAN, seconds(1.0)), 1.0);
    }

    #[test]
    fn a_lower_value_is_blended_by_the_formula() {
        let mut ewma = PeakEwma { seconds: 1.0, at: seconds(0.0) };
        ewma.add(seconds(0.1), &PLAN, seconds(5.0));
        let keep = (-0.5f64).exp();
        assert!((ewma.seconds - (keep + 0.1 * (1.0 - keep))).abs() < 1e-12);
    }

    #[test]
    fn reading_fades_and_does_not_write() {
        let ewma = PeakEwma { seconds: 1.0, at: seconds(0.0) };
        assert!((ewma.read(&PLAN, seconds(10.0)) - (-1.0f64).exp()).abs() < 1e-12);
        assert_eq!(ewma.seconds, 1.0);
    }

    #[test]
    fn the_cheaper_of_two_wins() {
        let (fleet, random) = (Fleet(vec![(true, 2.0), (true, 1.0)]), Random::new(1));
        for _ in 0..50 {
            assert_eq!(two_choices(&fleet, &random).unwrap().index, 1);
        }
    }

    #[test]
    fn an_endpoint_that_may_not_be_chosen_is_not() {
        let (fleet, random) = (Fleet(vec![(false, 0.0), (true, 9.0), (false, 0.0), (false, 0.0)]), Random::new(1));
        for _ in 0..200 {
            assert_eq!(two_choices(&fleet, &random).unwrap(), Pick { index: 1, cost: 9.0, other: None });
        }
        assert_eq!(two_choices(&Fleet(vec![(false, 0.0)]), &random), None);
        assert_eq!(two_choices(&Fleet(vec![]), &random), None);
        assert_eq!(round_robin(&Fleet(vec![]), &AtomicUsize::new(0)), None);
    }

    #[test]
    fn equal_endpoints_share_evenly() {
        let (fleet, random) = (Fleet(vec![(true, 1.0); 5]), Random::new(9));
        let mut counts = [0; 5];
        for _ in 0..10_000 {
            counts[two_choices(&fleet, &random).unwrap().index] += 1;
        }
        assert!(counts.iter().all(|n| (1800..2200).contains(n)), "{counts:?}");
    }

    #[test]
    fn round_robin_skips_the_ineligible() {
        let (fleet, turn) = (Fleet(vec![(true, 0.0), (false, 0.0), (true, 0.0)]), AtomicUsize::new(0));
        let order: Vec<usize> = (0..4).map(|_| round_robin(&fleet, &turn).unwrap().index).collect();
        assert_eq!(order, [0, 2, 2, 0]);
    }
}
