//! Whose turn is it, if some may take more turns than others?
//!
//! The static stride scheduler of gRPC (gRFC A58 describes the policy, gRPC's C-core the scheduler). One counter is all the state:
//! its remainder by the number of endpoints names the endpoint, its quotient the round. In each round an endpoint of weight w takes
//! its turn or lets it pass, by a fixed rule that spreads w turns evenly over 65,535 rounds. So the shares are exact over a period,
//! the turns of a heavy endpoint do not come in bursts, and threads share one atomic addition instead of the lock around a queue
//! that earliest-deadline-first needs. With equal weights nobody lets a turn pass: it is plain round robin.
//!
//! A turn costs as many steps as the largest weight is above the mean one; the caller bounds that. If most of
//! the weight may not be chosen, the steps end at a bound and one scan decides, in proportion to what is left. What the weights
//! mean, and who is eligible, is the caller's word.
use std::sync::atomic::{AtomicU64, Ordering};

/// The weight that never lets a turn pass; the rounds of a period.
pub const FULL: u16 = u16::MAX;

/// Steps before a scan takes over. With a largest weight of ten times the mean a step finds nobody nine times in ten: 128 in a row are one
/// in 700,000.
const STEPS: usize = 128;

/// The largest weight counts for at most so many times the mean: it bounds the steps of a turn.
#[cfg(test)]
const MOST_OF_MEAN: f64 = 10.0;

/// A weight that is not zero counts for at least this share of the mean: a nearly idle endpoint is heard of now and then.
#[cfg(test)]
const LEAST_OF_MEAN: f64 = 0.01;

#[derive(Debug, Default)]
pub struct Stride {
    turn: AtomicU64,
}

impl Stride {
    /// Start anywhere (a random number), so that the clients of a fleet that start together do not move in step.
    pub fn new(start: u64) -> Self {
        Self { turn: AtomicU64::new(start) }
    }

    /// How many turns there have been, to go on from there.
    pub fn now(&self) -> u64 {
        self.turn.load(Ordering::Relaxed)
    }

    /// The one whose turn it is; None if nobody eligible has a weight. `weight` is out of `FULL`, which the largest one should
    /// have: others only cost steps.
    pub fn pick(
        &self,
        count: usize,
        weight: impl Fn(usize) -> u16,
        is_eligible: impl Fn(usize) -> bool,
    ) -> Option<usize> {
        if count == 0 {
            return None;
        }
        for _ in 0..STEPS.min(count.saturating_mul(4)) {
            let (round, index) = self.step(count);
            if takes_turn(weight(index), round, index) && is_eligible(index) {
                return Some(index);
            }
        }
        self.scan(count, weight, is_eligible)
    }

    fn step(&self, count: usize) -> (u64, usize) {
        let (turn, count) = (self.turn.fetch_add(1, Ordering::Relaxed), count.max(1) as u64);
        (turn / count, (turn % count) as usize)
    }

    /// A point on the line of all eligible weights. The points of successive turns are spread by the golden ratio, which keeps
    /// them apart: smooth without a memory.
    fn scan(&self, count: usize, weight: impl Fn(usize) -> u16, is_eligible: impl Fn(usize) -> bool) -> Option<usize> {
        const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;
        let of = |index: usize| if is_eligible(index) { u64::from(weight(index)) } else { 0 };
        let total: u64 = (0..count).map(of).sum();
        let at = self.turn.fetch_add(1, Ordering::Relaxed).wrapping_mul(GOLDEN);
        let mut left = ((u128::from(at) * u128::from(total)) >> 64) as u64;
        let mut last = None;
        for index in 0..count {
            let own = of(index);
            if own == 0 {
                continue;
            }
            if left < own {
                return Some(index);
            }
            left -= own;
            // Eligibility may change between the two passes; then the line is shorter than the point is far.
            last = Some(index);
        }
        last
    }
}

/// Of `FULL` successive rounds, exactly `weight` are taken, evenly spread. The offset by half a period between neighbours keeps
/// two equal ones from letting the same rounds pass.
fn takes_turn(weight: u16, round: u64, index: usize) -> bool {
    let full = u64::from(FULL);
    let weight = u64::from(weight);
    let phase = (weight * (round % full) + (index as u64 % full) * (full / 2)) % full;
    phase >= full - weight
}

/// For the tests, as gRPC does it: turns weights of any size into parts of `FULL`, within the limits that bound the steps of a turn.
#[cfg(test)]
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Scale {
    factor: f64,
    least: u16,
}

#[cfg(test)]
impl Scale {
    /// None if no weight is positive: there is nothing to scale by. What is not a positive finite number counts as zero.
    pub fn of(weights: impl Iterator<Item = f32>) -> Option<Self> {
        let (mut sum, mut count, mut largest) = (0.0f64, 0usize, 0.0f64);
        for weight in weights.filter(|weight| weight.is_finite() && *weight > 0.0).map(f64::from) {
            sum += weight;
            count += 1;
            largest = largest.max(weight);
        }
        if count == 0 {
            return None;
        }
        let mean = sum / count as f64;
        let factor = f64::from(FULL) / largest.min(mean * MOST_OF_MEAN);
        Some(Self { factor, least: ((mean * factor * LEAST_OF_MEAN).round() as u16).max(1) })
    }

    /// Zero stays zero, whatever else is at least one part.
    pub fn weight(&self, weight: f32) -> u16 {
        if !(weight.is_finite() && weight > 0.0) {
            return 0;
        }
        // A float beyond the range becomes the largest integer: that is the cap.
        ((f64::from(weight) * self.factor).round() as u16).max(self.least)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::indexing_slicing)]
    use super::*;

    fn scaled(weights: &[f32]) -> Vec<u16> {
        let scale = Scale::of(weights.iter().copied()).unwrap();
        weights.iter().map(|weight| scale.weight(*weight)).collect()
    }

    fn picks(stride: &Stride, weights: &[u16], out: &[usize], count: usize) -> Vec<usize> {
        (0..count).map(|_| stride.pick(weights.len(), |i| weights[i], |i| !out.contains(&i)).unwrap()).collect()
    }

    fn counts(picks: &[usize], of: usize) -> Vec<usize> {
        (0..of).map(|index| picks.iter().filter(|pick| **pick == index).count()).collect()
    }

    #[test]
    fn equal_weights_are_plain_round_robin_in_order() {
        assert_eq!(picks(&Stride::default(), &scaled(&[2.0; 3]), &[], 7), [0, 1, 2, 0, 1, 2, 0]);
        assert_eq!(picks(&Stride::new(5), &[FULL; 4], &[], 4), [1, 2, 3, 0]);
    }

    #[test]
    fn shares_are_exact_over_a_period() {
        let weights = [FULL, 40_000, 12_345, 1, 655];
        let total: usize = weights.iter().map(|w| usize::from(*w)).sum();
        let picks = picks(&Stride::default(), &weights, &[], total);
        assert_eq!(counts(&picks, 5), weights.map(usize::from));
    }

    #[test]
    fn five_to_one_to_one_is_exact_in_every_seven() {
        let picks = picks(&Stride::default(), &scaled(&[5.0, 1.0, 1.0]), &[], 700);
        for seven in picks.chunks(7) {
            assert_eq!(counts(seven, 3), [5, 1, 1], "{seven:?}");
        }
    }

    #[test]
    fn the_heavy_one_never_has_more_than_one_turn_above_its_share() {
        let picks = picks(&Stride::default(), &scaled(&[5.0, 1.0, 1.0]), &[], 7000);
        for length in 1..=28 {
            for window in picks.windows(length) {
                let (heavy, share) = (counts(window, 3)[0] as f64, length as f64 * 5.0 / 7.0);
                assert!((heavy - share).abs() <= 1.15, "{heavy} of {length}: {window:?}");
            }
        }
    }

    #[test]
    fn neighbours_of_equal_weight_do_not_pass_together() {
        let picks = picks(&Stride::default(), &[FULL, 52_428, 52_428], &[], 10_000);
        assert!(picks.windows(2).all(|pair| pair != [0, 0]), "both let the same round pass");
    }

    #[test]
    fn the_share_of_an_ineligible_one_is_spread() {
        let order = picks(&Stride::default(), &[FULL; 3], &[1], 6);
        assert_eq!(order, [0, 2, 0, 2, 0, 2]);
        let picks = picks(&Stride::default(), &scaled(&[5.0, 2.0, 1.0]), &[1], 6000);
        assert_eq!(counts(&picks, 3), [5000, 0, 1000]);
    }

    #[test]
    fn without_the_heavy_one_the_light_ones_keep_their_proportion() {
        let picks = picks(&Stride::default(), &scaled(&[100.0, 2.0, 1.0, 1.0]), &[0], 8000);
        let counts = counts(&picks, 4);
        assert_eq!(counts[0], 0);
        assert!((3900..4100).contains(&counts[1]), "{counts:?}");
        assert!((1900..2100).contains(&counts[2]) && (1900..2100).contains(&counts[3]), "{counts:?}");
    }

    #[test]
    fn the_only_eligible_one_is_always_found() {
        let stride = Stride::default();
        let weight = |index: usize| if index == 977 { 1 } else { FULL };
        for _ in 0..200 {
            assert_eq!(stride.pick(1000, weight, |index| index == 977), Some(977));
        }
    }

    #[test]
    fn a_weight_of_zero_never_has_a_turn() {
        let picks = picks(&Stride::default(), &[0, FULL, 0, 300], &[], 5000);
        assert_eq!((counts(&picks, 4)[0], counts(&picks, 4)[2]), (0, 0));
        let stride = Stride::default();
        assert_eq!(stride.pick(2, |_| 0, |_| true), None);
        assert_eq!(stride.pick(2, |_| FULL, |_| false), None);
        assert_eq!(stride.pick(0, |_| FULL, |_| true), None);
    }

    #[test]
    fn one_that_fails_during_the_scan_leaves_its_turn_to_another() {
        let stride = Stride::default();
        for _ in 0..20 {
            let asked = std::cell::Cell::new(0);
            let is_eligible = |index: usize| {
                asked.set(asked.get() + 1);
                asked.get() <= 2 || index == 0
            };
            assert_eq!(stride.scan(2, |_| FULL, is_eligible), Some(0));
        }
    }

    #[test]
    fn the_end_of_the_counter_is_nothing_special() {
        let picks = picks(&Stride::new(u64::MAX - 2), &[FULL, 30_000, 7], &[], 50);
        assert_eq!(picks.len(), 50);
    }

    #[test]
    fn threads_share_the_turns_exactly() {
        let (stride, weights) = (Stride::default(), scaled(&[3.0, 1.0]));
        let share = || counts(&picks(&stride, &weights, &[], 1000), 2);
        let (a, b) = std::thread::scope(|scope| {
            let (a, b) = (scope.spawn(share), scope.spawn(share));
            (a.join().unwrap(), b.join().unwrap())
        });
        assert_eq!([a[0] + b[0], a[1] + b[1]], [1500, 500]);
    }

    #[test]
    fn a_scale_gives_the_largest_all_and_keeps_proportions() {
        assert_eq!(scaled(&[4.0, 2.0, 1.0, 0.0, f32::NAN, -1.0]), [65535, 32768, 16384, 0, 0, 0]);
        assert_eq!(Scale::of([0.0, f32::INFINITY].into_iter()), None);
        assert_eq!(Scale::of([].into_iter()), None);
    }

    #[test]
    fn a_scale_bounds_the_largest_and_the_least_by_the_mean() {
        let mut weights = vec![1.0; 98];
        weights.extend([1902.0, 0.000_001]);
        let scaled = scaled(&weights);
        // The mean is 20: the largest counts for 200, the tiny one for 0.2.
        assert_eq!((scaled[98], scaled[99]), (FULL, 66));
        assert_eq!(scaled[0], (65535.0f64 / 200.0).round() as u16);
    }
}
