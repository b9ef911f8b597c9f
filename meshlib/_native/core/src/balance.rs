//! Which endpoint of the backend?
//!
//! ```text
//! peak_ewma      of two drawn at random the one with the lower expected wait (Finagle, Linkerd)
//! least_request  of two drawn at random the one with fewer calls in flight for its weight (Envoy)
//! random         by weight                                      alias.rs
//! round_robin    by weight, smoothly                            stride.rs
//! ring_hash      a key has a home; few keys move when it leaves hash.rs, ring.rs
//! maglev         the same with a table: quicker, more keys move hash.rs, maglev.rs
//! ```
//!
//! Weights come from discovery, or from what endpoints report of their load (orca.rs); a new endpoint warms up (warm.rs). Which zone is
//! asked first is locality.rs. Two draws instead of a scan keep the cost flat from 3 to 100,000 endpoints and avoid the herd that a
//! global minimum attracts. A weight is a capacity: draws go by it, and calls in flight are measured against it, so that idle endpoints
//! share calls in proportion and busy ones share load. Endpoints are seen through `View`; nothing here knows of breakers: who may be
//! chosen is the caller's word.
use std::time::Duration;

use crate::model::BalancePlan;
use crate::random::Random;

pub mod alias;
pub mod bound;
#[cfg(test)]
mod golden;
pub mod hash;
pub mod locality;
pub mod maglev;
pub mod orca;
pub mod ring;
pub mod stride;
pub mod warm;

/// An average of round-trip times that peaks replace and time erodes. State of an Endpoint.
///
/// The average jumps up with a peak and comes down slowly, so that a stall is felt at once; a failed call counts as slow, so that an
/// endpoint which fails fast does not draw the traffic.
#[derive(Debug, Clone, Copy)]
pub struct PeakEwma {
    nanos: u64,
    seconds: f32,
}

impl PeakEwma {
    pub fn new(plan: &BalancePlan, now: Duration) -> Self {
        // A zero seed would make a fresh endpoint look free and draw everything to it.
        Self { seconds: plan.start.max(0.001) as f32, nanos: nanos(now) }
    }

    pub fn add(&mut self, rtt: Duration, plan: &BalancePlan, now: Duration) {
        let rtt = rtt.as_secs_f64();
        let keep = self.keep(plan, now);
        let faded = f64::from(self.seconds) * keep;
        self.seconds = if rtt > faded { rtt } else { faded + rtt * (1.0 - keep) } as f32;
        self.nanos = self.nanos.max(nanos(now));
    }

    /// The expected wait now. Reading never writes: an endpoint that nobody asks loses its bad name with time.
    pub fn read(&self, plan: &BalancePlan, now: Duration) -> f64 {
        f64::from(self.seconds) * self.keep(plan, now)
    }

    fn keep(&self, plan: &BalancePlan, now: Duration) -> f64 {
        (-(nanos(now).saturating_sub(self.nanos) as f64) / (plan.decay.max(0.001) * 1e9)).exp()
    }
}

fn nanos(now: Duration) -> u64 {
    now.as_nanos() as u64
}

/// The endpoints of a Backend as balance may see them.
pub trait View {
    fn count(&self) -> usize;
    fn is_eligible(&self, index: usize) -> bool;
    /// The expected wait of one call, in seconds.
    fn latency(&self, index: usize) -> f64;
    fn in_flight(&self, index: usize) -> u32;
    /// The weight as a share of the largest, in (0, 1].
    fn weight(&self, index: usize) -> f32;
    /// Its part of the weights of all that may be chosen.
    fn share(&self, index: usize) -> f64;
    /// How far it has warmed up, in (0, 1].
    fn warmth(&self, index: usize) -> f32;
    /// One of all, and whether that was by weight already; otherwise it was uniformly.
    fn draw(&self, random: &Random) -> (usize, bool);
}

/// The choice, and what it was compared with (for `explain`).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Pick {
    pub index: usize,
    pub cost: f64,
    pub other: Option<(usize, f64)>,
}

/// Draws before a scan takes over. With half of the endpoints out and weights of which the largest is ten times the mean, all of them miss
/// once in thirty picks, and with equal weights never.
const DRAWS: usize = 64;

/// The one of two whose next call is expected to end first.
pub fn peak_ewma(view: &impl View, random: &Random) -> Option<Pick> {
    two_choices(view, random, |index| {
        view.latency(index) * (f64::from(view.in_flight(index)) / capacity(view, index) + 1.0)
    })
}

/// The one of two with fewer calls in flight; of idle ones the first drawn, so that weights hold.
pub fn least_request(view: &impl View, random: &Random) -> Option<Pick> {
    two_choices(view, random, |index| f64::from(view.in_flight(index)) / capacity(view, index))
}

fn capacity(view: &impl View, index: usize) -> f64 {
    f64::from(view.weight(index) * view.warmth(index)).max(1e-6)
}

pub fn by_chance(view: &impl View, random: &Random) -> Option<Pick> {
    draw(view, random, None).map(|index| Pick { index, cost: 0.0, other: None })
}

/// In turn, by weight.
pub fn round_robin(view: &impl View, turn: &stride::Stride) -> Option<Pick> {
    let weight = |index: usize| (view.weight(index) * view.warmth(index) * f32::from(u16::MAX)).ceil() as u16;
    let index = turn.pick(view.count(), weight, |index| view.is_eligible(index))?;
    Some(Pick { index, cost: 0.0, other: None })
}

/// The home of a key, or who stands in for it: the first of the candidates that may be chosen and isn't overloaded. `limit` 0: nobody is.
/// Where all are overloaded the first of them takes it: the bound spreads load, it doesn't refuse. `other` is the home where another
/// stands in for it. `total` is in flight in the whole Service.
pub fn by_hash(view: &impl View, candidates: impl Iterator<Item = u32>, total: u32, limit: f64) -> Option<Pick> {
    // Beyond so many that are overloaded the load is as even as it will get.
    let mut left = view.count().saturating_mul(4).max(64);
    // So many that may not be chosen, and who can be is looked for without the key.
    let mut misses = view.count().saturating_mul(64).max(1024);
    let (mut home, mut first) = (None, None);
    for index in candidates.map(|index| index as usize) {
        let cost = f64::from(view.in_flight(index));
        let (home_index, home_cost) = *home.get_or_insert((index, cost));
        if !view.is_eligible(index) {
            misses -= 1;
            if misses == 0 {
                break;
            }
            continue;
        }
        let pick = Pick { index, cost, other: (index != home_index).then_some((home_index, home_cost)) };
        if limit <= 1.0
            || !bound::is_overloaded(u64::from(view.in_flight(index)), u64::from(total), view.share(index), limit)
        {
            return Some(pick);
        }
        first = first.or(Some(pick));
        left = left.saturating_sub(1);
        if left == 0 {
            break;
        }
    }
    if misses == 0 && first.is_none() {
        let index = (0..view.count()).find(|index| view.is_eligible(*index))?;
        return Some(Pick { index, cost: f64::from(view.in_flight(index)), other: home });
    }
    first
}

fn two_choices(view: &impl View, random: &Random, cost: impl Fn(usize) -> f64) -> Option<Pick> {
    let first = draw(view, random, None)?;
    let Some(second) = draw(view, random, Some(first)) else {
        return Some(Pick { index: first, cost: cost(first), other: None });
    };
    let (a, b) = (cost(first), cost(second));
    Some(if b < a {
        Pick { index: second, cost: b, other: Some((first, a)) }
    } else {
        Pick { index: first, cost: a, other: Some((second, b)) }
    })
}

/// An eligible endpoint other than `except`, by weight; None if there is none.
fn draw(view: &impl View, random: &Random, except: Option<usize>) -> Option<usize> {
    let count = view.count();
    let may = |index: usize| Some(index) != except && view.is_eligible(index);
    // Of two there is no choice left.
    let draws = if count < 2 || (count == 2 && except.is_some()) { 0 } else { DRAWS };
    for _ in 0..draws {
        let (index, is_by_weight) = view.draw(random);
        if may(index) && wins(if is_by_weight { 1.0 } else { view.weight(index) } * view.warmth(index), random) {
            return Some(index);
        }
    }
    let start = random.below(count);
    (0..count).map(|step| (start + step) % count).find(|index| may(*index))
}

/// A toss that full weight always wins.
fn wins(weight: f32, random: &Random) -> bool {
    weight >= 1.0 || (random.unit() as f32) < weight
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::indexing_slicing)]
    use super::*;
    use crate::model::{
        BalancePolicy, HashPlan, LocalityPlan, LocalityPolicy, OrcaPlan, StickyKind, StickyPlan, WeightSource,
    };

    fn plan() -> BalancePlan {
        BalancePlan {
            policy: BalancePolicy::PeakEwma,
            decay: 10.0,
            start: 0.03,
            penalty: 5.0,
            panic: 0.5,
            weights: WeightSource::Discover,
            orca: OrcaPlan { blackout: 10.0, expiry: 180.0, error_penalty: 1.0 },
            slow_start: 0.0,
            slow_start_least: 0.1,
            hash: HashPlan { on: Vec::new(), bound: 0.0, ring: 1024, table: 65_537 },
            sticky: StickyPlan { kind: StickyKind::None, name: String::new() },
            locality: LocalityPlan {
                policy: LocalityPolicy::Off,
                order: Vec::new(),
                overprovisioning: 1.4,
                least_endpoints: 6,
            },
        }
    }

    fn seconds(s: f64) -> Duration {
        Duration::from_secs_f64(s)
    }

    /// May it be chosen, its latency, its calls in flight, its weight.
    struct Fleet(Vec<(bool, f64, u32, f32)>);
    impl View for Fleet {
        fn count(&self) -> usize {
            self.0.len()
        }
        fn is_eligible(&self, index: usize) -> bool {
            self.0[index].0
        }
        fn latency(&self, index: usize) -> f64 {
            self.0[index].1
        }
        fn in_flight(&self, index: usize) -> u32 {
            self.0[index].2
        }
        fn weight(&self, index: usize) -> f32 {
            self.0[index].3
        }
        fn share(&self, _: usize) -> f64 {
            1.0 / self.0.iter().filter(|endpoint| endpoint.0).count() as f64
        }
        fn warmth(&self, _: usize) -> f32 {
            1.0
        }
        fn draw(&self, random: &Random) -> (usize, bool) {
            (random.below(self.0.len()), false)
        }
    }

    fn idle(latency: f64) -> (bool, f64, u32, f32) {
        (true, latency, 0, 1.0)
    }

    const OUT: (bool, f64, u32, f32) = (false, 0.0, 0, 1.0);

    #[test]
    fn a_peak_replaces_the_average_at_once() {
        let mut ewma = PeakEwma::new(&plan(), seconds(0.0));
        ewma.add(seconds(1.0), &plan(), seconds(1.0));
        assert_eq!(ewma.read(&plan(), seconds(1.0)), 1.0);
    }

    #[test]
    fn a_lower_value_is_blended_by_the_formula() {
        let mut ewma = PeakEwma { seconds: 1.0, nanos: 0 };
        ewma.add(seconds(0.1), &plan(), seconds(5.0));
        let keep = (-0.5f64).exp();
        assert!((f64::from(ewma.seconds) - (keep + 0.1 * (1.0 - keep))).abs() < 1e-7);
    }

    #[test]
    fn reading_fades_and_does_not_write() {
        let ewma = PeakEwma { seconds: 1.0, nanos: 0 };
        assert!((ewma.read(&plan(), seconds(10.0)) - (-1.0f64).exp()).abs() < 1e-12);
        assert_eq!(ewma.seconds, 1.0);
    }

    #[test]
    fn the_cheaper_of_two_wins() {
        let (fleet, random) = (Fleet(vec![idle(2.0), idle(1.0)]), Random::new(1));
        for _ in 0..50 {
            assert_eq!(peak_ewma(&fleet, &random).unwrap().index, 1);
        }
    }

    #[test]
    fn an_endpoint_that_may_not_be_chosen_is_not() {
        let (fleet, random) = (Fleet(vec![OUT, idle(9.0), OUT, OUT]), Random::new(1));
        for _ in 0..200 {
            assert_eq!(peak_ewma(&fleet, &random).unwrap(), Pick { index: 1, cost: 9.0, other: None });
            assert_eq!(least_request(&fleet, &random).unwrap().index, 1);
            assert_eq!(by_chance(&fleet, &random).unwrap().index, 1);
        }
        let turn = stride::Stride::default();
        for empty in [Fleet(vec![OUT]), Fleet(vec![])] {
            assert_eq!(peak_ewma(&empty, &random), None);
            assert_eq!(least_request(&empty, &random), None);
            assert_eq!(by_chance(&empty, &random), None);
            assert_eq!(round_robin(&empty, &turn), None);
        }
    }

    #[test]
    fn equal_endpoints_share_evenly() {
        let (fleet, random) = (Fleet(vec![idle(1.0); 5]), Random::new(9));
        let mut counts = [0; 5];
        for _ in 0..10_000 {
            counts[peak_ewma(&fleet, &random).unwrap().index] += 1;
        }
        assert!(counts.iter().all(|n| (1800..2200).contains(n)), "{counts:?}");
    }

    #[test]
    fn least_request_takes_the_one_with_less_in_flight_for_its_weight() {
        let random = Random::new(3);
        let by_count = Fleet(vec![(true, 0.0, 4, 1.0), (true, 0.0, 3, 1.0)]);
        let by_weight = Fleet(vec![(true, 0.0, 4, 1.0), (true, 0.0, 3, 0.5)]);
        for _ in 0..50 {
            assert_eq!(least_request(&by_count, &random).unwrap().index, 1);
            assert_eq!(least_request(&by_weight, &random).unwrap().index, 0);
        }
    }

    #[test]
    fn chance_goes_by_weight() {
        let (fleet, random) =
            (Fleet(vec![(true, 0.0, 0, 1.0), (true, 0.0, 0, 0.25), (true, 0.0, 0, 0.25)]), Random::new(5));
        let mut counts = [0; 3];
        for _ in 0..30_000 {
            counts[by_chance(&fleet, &random).unwrap().index] += 1;
        }
        assert!((19_000..21_000).contains(&counts[0]), "{counts:?}");
    }

    #[test]
    fn round_robin_skips_the_ineligible() {
        let (fleet, turn) = (Fleet(vec![idle(0.0), OUT, idle(0.0)]), stride::Stride::default());
        let order: Vec<usize> = (0..4).map(|_| round_robin(&fleet, &turn).unwrap().index).collect();
        assert_eq!(order, [0, 2, 0, 2]);
    }

    #[test]
    fn a_home_that_is_overloaded_sends_the_key_on() {
        let fleet = Fleet(vec![(true, 0.0, 9, 1.0), (true, 0.0, 1, 1.0), OUT]);
        let pick = |order: [u32; 3], bound| by_hash(&fleet, order.into_iter(), 10, bound).unwrap().index;
        assert_eq!(pick([0, 1, 2], 0.0), 0);
        assert_eq!(pick([2, 1, 0], 0.0), 1);
        assert_eq!(pick([0, 1, 2], 1.25), 1);
    }
}
