//! How many of what in the last seconds?
//!
//! A ring of ten buckets with exact counts, no moving average: what it says does not depend on the rate of calls, and who is idle
//! forgets (Linkerd's success-rate window). A count has 16 bits, since an Endpoint of a busy fleet holds a ring and 65,535 calls
//! in a tenth of a window are more than a Python process sends; a bucket that gets more is halved as a whole, so that shares stay.
//! The number of the newest bucket has 32 bits and goes round: only distances count. It does not judge, and it has no lock.
use std::time::Duration;

pub const BUCKETS: usize = 10;

/// Where bucket numbers go round: a multiple of the number of buckets, so that a bucket keeps its slot.
const ROUND: u64 = (u32::MAX as u64 / BUCKETS as u64) * BUCKETS as u64;

/// Counts of several series over a window whose length the caller tells each time, so that a new plan holds at once.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ring<const SERIES: usize> {
    newest: u32,
    counts: [[u16; SERIES]; BUCKETS],
}

impl<const SERIES: usize> Ring<SERIES> {
    pub fn new() -> Self {
        Self { newest: 0, counts: [[0; SERIES]; BUCKETS] }
    }

    /// One more in each series that is marked. `window` is in seconds.
    pub fn add(&mut self, series: [bool; SERIES], window: f64, now: Duration) {
        self.turn(window, now);
        let Some(counts) = self.counts.get_mut(self.newest as usize % BUCKETS) else { return };
        if counts.iter().zip(series).any(|(count, is_marked)| is_marked && *count == u16::MAX) {
            counts.iter_mut().for_each(|count| *count /= 2);
        }
        counts.iter_mut().zip(series).for_each(|(count, is_marked)| *count += u16::from(is_marked));
    }

    /// One less in each series that is marked, where the newest bucket has any.
    pub fn take(&mut self, series: [bool; SERIES], window: f64, now: Duration) {
        self.turn(window, now);
        if let Some(counts) = self.counts.get_mut(self.newest as usize % BUCKETS) {
            counts.iter_mut().zip(series).for_each(|(count, is_marked)| *count -= u16::from(is_marked && *count > 0));
        }
    }

    /// Forget what is older than the window.
    pub fn turn(&mut self, window: f64, now: Duration) {
        let bucket = (now.as_secs_f64() * BUCKETS as f64 / window.max(0.001)) as u64 % ROUND;
        let ahead = (bucket + ROUND - u64::from(self.newest)) % ROUND;
        if ahead > ROUND / 2 {
            // A thread that read its clock a moment ago counts into the newest bucket. Further back is no clock: a new plan made
            // the window longer, and old numbers mean nothing in it.
            if ROUND - ahead > BUCKETS as u64 {
                *self = Self { newest: bucket as u32, ..Self::new() };
            }
            return;
        }
        for step in 0..ahead.min(BUCKETS as u64) {
            let slot = ((bucket + ROUND - step) % BUCKETS as u64) as usize;
            if let Some(counts) = self.counts.get_mut(slot) {
                *counts = [0; SERIES];
            }
        }
        self.newest = bucket as u32;
    }

    /// Per series, as of the last turn.
    pub fn sums(&self) -> [u32; SERIES] {
        let mut sums = [0; SERIES];
        for counts in &self.counts {
            sums.iter_mut().zip(counts).for_each(|(sum, count)| *sum += u32::from(*count));
        }
        sums
    }
}

impl<const SERIES: usize> Default for Ring<SERIES> {
    fn default() -> Self {
        Self::new()
    }
}

/// What a call was like.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Good,
    Bad,
    SlowGood,
    SlowBad,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Sums {
    pub good: u32,
    pub bad: u32,
    /// Good or bad, and slow.
    pub slow: u32,
}

/// The window of a breaker. State of an Endpoint.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Window(Ring<3>);

impl Window {
    pub fn note(&mut self, kind: Kind, window: f64, now: Duration) {
        let is_good = matches!(kind, Kind::Good | Kind::SlowGood);
        self.0.add([is_good, !is_good, matches!(kind, Kind::SlowGood | Kind::SlowBad)], window, now);
    }

    pub fn sums(&self) -> Sums {
        let [good, bad, slow] = self.0.sums();
        Sums { good, bad, slow }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::indexing_slicing)]
    use super::*;
    use crate::random::Random;

    const NOW: Duration = Duration::from_secs(100);

    fn second(n: u64) -> Duration {
        Duration::from_secs(n)
    }

    #[test]
    fn a_window_fills_one_cache_line() {
        assert_eq!(std::mem::size_of::<Window>(), 64);
    }

    #[test]
    fn a_slow_call_is_good_or_bad_as_well() {
        let mut window = Window::default();
        for kind in [Kind::Good, Kind::Bad, Kind::SlowGood, Kind::SlowBad] {
            window.note(kind, 10.0, NOW);
        }
        assert_eq!(window.sums(), Sums { good: 2, bad: 2, slow: 2 });
    }

    #[test]
    fn counts_are_those_of_a_list_of_all_calls() {
        for seed in 0..200 {
            let random = Random::new(seed);
            let (mut window, mut calls, mut bucket) = (Window::default(), Vec::new(), 1000u64);
            for _ in 0..300 {
                bucket += [0, 0, 0, 1, 1, 2, 9, 10, 11, 50][random.below(10)];
                let kind = [Kind::Good, Kind::Bad, Kind::SlowGood, Kind::SlowBad][random.below(4)];
                window.note(kind, 10.0, second(bucket));
                calls.push((bucket, kind));
                let count = |kinds: [Kind; 2]| {
                    calls.iter().filter(|(at, kind)| at + 10 > bucket && kinds.contains(kind)).count() as u32
                };
                let expected = Sums {
                    good: count([Kind::Good, Kind::SlowGood]),
                    bad: count([Kind::Bad, Kind::SlowBad]),
                    slow: count([Kind::SlowGood, Kind::SlowBad]),
                };
                assert_eq!(expected, window.sums(), "seed {seed}");
            }
        }
    }

    #[test]
    fn a_clock_that_steps_back_a_little_counts_as_now() {
        let mut window = Window::default();
        window.note(Kind::Good, 10.0, NOW);
        window.note(Kind::Bad, 10.0, NOW - second(3));
        assert_eq!(window.sums(), Sums { good: 1, bad: 1, slow: 0 });
        window.note(Kind::Good, 10.0, NOW + second(9));
        assert_eq!(window.sums(), Sums { good: 2, bad: 1, slow: 0 });
        window.note(Kind::Good, 10.0, NOW + second(10));
        assert_eq!(window.sums(), Sums { good: 2, bad: 0, slow: 0 });
    }

    #[test]
    fn a_longer_window_begins_anew() {
        let mut window = Window::default();
        window.note(Kind::Bad, 10.0, NOW);
        window.note(Kind::Good, 60.0, NOW);
        assert_eq!(window.sums(), Sums { good: 1, bad: 0, slow: 0 });
        window.note(Kind::Good, 60.0, NOW + second(59));
        window.note(Kind::Good, 60.0, NOW + second(66));
        assert_eq!(window.sums(), Sums { good: 2, bad: 0, slow: 0 });
    }

    #[test]
    fn numbers_that_go_round_forget_nothing_and_keep_nothing() {
        // Two buckets before the numbers begin again.
        let before = Duration::from_secs(ROUND - 2);
        let mut window = Window::default();
        window.note(Kind::Bad, 10.0, before - second(100));
        for step in 0..5 {
            window.note(Kind::Good, 10.0, before + second(step));
        }
        assert_eq!(window.sums().good, 5);
        window.note(Kind::Good, 10.0, before + second(10));
        assert_eq!(window.sums().good, 5);
        window.note(Kind::Good, 10.0, before + second(13));
        assert_eq!(window.sums().good, 3);
        window.note(Kind::Good, 10.0, before + second(ROUND / 2 + 1000));
        assert_eq!(window.sums().good, 1);
    }

    #[test]
    fn a_full_bucket_is_halved_and_its_share_stays() {
        let mut window = Window::default();
        for n in 0..200_000 {
            window.note(if n % 4 == 0 { Kind::SlowBad } else { Kind::Good }, 10.0, NOW);
        }
        let sums = window.sums();
        let share = f64::from(sums.bad) / f64::from(sums.good + sums.bad);
        assert!((share - 0.25).abs() < 0.001, "{sums:?}");
        assert_eq!(sums.bad, sums.slow);
        assert!(sums.good > u32::from(u16::MAX / 2), "{sums:?}");
    }
}
