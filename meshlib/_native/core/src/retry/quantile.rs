//! From when on is a call of this service slow?
//!
//! A histogram with buckets in equal ratios (each 16 % wider, so that a bucket's middle is at most 8 % off), in three windows of
//! ten seconds that take turns: what it says covers the last 20 to 30 seconds, and a service that changes is learnt in that time
//! (Finagle's BackupRequestFilter keeps 30 s). Counts are atomics of 16 bits: a note takes no lock, and all fits in 600 bytes; a
//! count that is full halves its window, so that the shares stay. It says nothing below a hundred samples, since the 95th
//! percentile of twenty calls is the second-slowest of them. It does not decide on hedges.
use std::sync::atomic::{AtomicU16, AtomicU32, Ordering};
use std::time::Duration;

const WINDOWS: usize = 3;
const WINDOW: Duration = Duration::from_secs(10);
const BUCKETS: usize = 88;
/// The first bucket ends here; the last begins at 100 s.
const LEAST: f64 = 0.000_25;
const RATIO: f64 = 1.16;
const LEAST_SAMPLES: u32 = 100;

/// Latencies of a Service.
#[derive(Debug)]
pub struct Quantile {
    /// Number of the newest window: which of them takes the notes.
    newest: AtomicU32,
    counts: [[AtomicU16; BUCKETS]; WINDOWS],
}

impl Quantile {
    pub fn new() -> Self {
        Self { newest: AtomicU32::new(0), counts: std::array::from_fn(|_| [const { AtomicU16::new(0) }; BUCKETS]) }
    }

    pub fn note(&self, rtt: Duration) {
        let place = self.newest.load(Ordering::Relaxed) as usize % WINDOWS;
        let Some(counts) = self.counts.get(place) else { return };
        let Some(count) = counts.get(bucket(rtt)) else { return };
        let add = |count: &AtomicU16| count.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |n| n.checked_add(1));
        if add(count).is_err() {
            for count in counts {
                let _ = count.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |n| Some(n / 2));
            }
            let _ = add(count);
        }
    }

    /// Forget what is too old; to be called every few seconds. True if a window began.
    pub fn refresh(&self, now: Duration) -> bool {
        let number = (now.as_secs() / WINDOW.as_secs()) as u32;
        let newest = self.newest.load(Ordering::Relaxed);
        let ahead = number.saturating_sub(newest).min(WINDOWS as u32);
        for step in 0..ahead {
            // Emptied before it takes notes.
            if let Some(counts) = self.counts.get((number - step) as usize % WINDOWS) {
                counts.iter().for_each(|count| count.store(0, Ordering::Relaxed));
            }
        }
        self.newest.fetch_max(number, Ordering::Relaxed);
        ahead > 0
    }

    /// The latency that this share of the calls stays within; None if too few are known.
    pub fn value(&self, share: f64) -> Option<Duration> {
        let mut sums = [0u32; BUCKETS];
        for counts in &self.counts {
            sums.iter_mut().zip(counts).for_each(|(sum, count)| *sum += u32::from(count.load(Ordering::Relaxed)));
        }
        let total: u32 = sums.iter().sum();
        if total < LEAST_SAMPLES {
            return None;
        }
        let rank = (share * f64::from(total)).ceil().max(1.0) as u32;
        let mut seen = 0;
        let place = sums.iter().position(|sum| {
            seen += sum;
            seen >= rank.min(total)
        })?;
        Some(middle(place))
    }
}

impl Default for Quantile {
    fn default() -> Self {
        Self::new()
    }
}

fn bucket(rtt: Duration) -> usize {
    let above = (rtt.as_secs_f64().max(LEAST) / LEAST).ln() / RATIO.ln();
    // What is below the first bound has a bucket of its own.
    if rtt.as_secs_f64() < LEAST {
        return 0;
    }
    (above as usize + 1).min(BUCKETS - 1)
}

/// Of its ratio, so that the error to both sides is the same.
fn middle(bucket: usize) -> Duration {
    Duration::try_from_secs_f64(LEAST * RATIO.powf(bucket as f64 - 0.5)).unwrap_or(Duration::MAX)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::random::Random;

    const MILLI: Duration = Duration::from_millis(1);

    fn second(n: u64) -> Duration {
        Duration::from_secs(n)
    }

    #[test]
    fn a_quantile_is_small() {
        assert_eq!(std::mem::size_of::<Quantile>(), 532);
    }

    #[test]
    fn every_latency_is_told_with_at_most_eight_percent_of_error() {
        for n in 0..100_000u64 {
            // 0.25 ms to 100 s, evenly in ratios.
            let seconds = LEAST * (400_000f64).powf(n as f64 / 100_000.0);
            let told = middle(bucket(Duration::from_secs_f64(seconds))).as_secs_f64();
            assert!((told / seconds - 1.0).abs() <= 0.08, "{seconds} was told as {told}");
        }
        assert_eq!((bucket(Duration::ZERO), bucket(second(1_000_000))), (0, BUCKETS - 1));
    }

    #[test]
    fn below_a_hundred_samples_it_says_nothing() {
        let quantile = Quantile::new();
        (0..99).for_each(|_| quantile.note(20 * MILLI));
        assert_eq!(quantile.value(0.95), None);
        quantile.note(20 * MILLI);
        assert_eq!(quantile.value(0.95), Some(middle(bucket(20 * MILLI))));
    }

    #[test]
    fn quantiles_are_those_of_the_sorted_list() {
        for seed in 0..100 {
            let (quantile, random) = (Quantile::new(), Random::new(seed));
            let mut list: Vec<f64> = (0..1000).map(|_| 0.001 * (1.0 / (1.0 - random.unit())).powf(1.5)).collect();
            list.iter().for_each(|seconds| quantile.note(Duration::from_secs_f64(*seconds)));
            list.sort_by(f64::total_cmp);
            for (share, rank) in [(0.0, 0), (0.5, 499), (0.95, 949), (0.99, 989), (1.0, 999)] {
                let (exact, told) = (list.get(rank).copied().unwrap(), quantile.value(share).unwrap().as_secs_f64());
                assert!(exact >= 100.0 || (told / exact - 1.0).abs() <= 0.08, "p{share}: {exact} was told as {told}");
            }
        }
    }

    #[test]
    fn what_is_older_than_thirty_seconds_is_forgotten_and_what_is_younger_than_twenty_is_not() {
        for phase in 0..10 {
            let (quantile, start) = (Quantile::new(), second(1000 + phase));
            quantile.refresh(start);
            (0..100).for_each(|_| quantile.note(MILLI));
            let known: Vec<u64> = (0..60)
                .filter(|n| {
                    quantile.refresh(start + second(*n));
                    quantile.value(0.95).is_some()
                })
                .collect();
            let last = *known.last().unwrap();
            assert_eq!(known, (0..=last).collect::<Vec<_>>());
            assert_eq!(last, 29 - phase);
        }
    }

    #[test]
    fn a_clock_that_steps_back_forgets_nothing() {
        let quantile = Quantile::new();
        quantile.refresh(second(1000));
        (0..100).for_each(|_| quantile.note(MILLI));
        assert!(!quantile.refresh(second(900)));
        assert!(quantile.value(0.5).is_some());
    }

    #[test]
    fn a_service_that_becomes_slow_is_learnt_in_time() {
        let quantile = Quantile::new();
        let mut told = Vec::new();
        for n in 0..80u64 {
            quantile.refresh(second(n));
            (0..100).for_each(|_| quantile.note(if n < 40 { 10 * MILLI } else { 100 * MILLI }));
            told.push(quantile.value(0.5));
        }
        let (fast, slow) = (Some(middle(bucket(10 * MILLI))), Some(middle(bucket(100 * MILLI))));
        assert_eq!((told.get(39).copied(), told.get(70).copied()), (Some(fast), Some(slow)));
    }

    #[test]
    fn a_full_count_is_halved_and_the_shares_stay() {
        let quantile = Quantile::new();
        for n in 0..300_000u32 {
            quantile.note(if n % 10 == 0 { 100 * MILLI } else { 10 * MILLI });
        }
        let (fast, slow) = (Some(middle(bucket(10 * MILLI))), Some(middle(bucket(100 * MILLI))));
        assert_eq!((quantile.value(0.899), quantile.value(0.901)), (fast, slow));
    }

    #[test]
    fn notes_of_many_threads_are_all_counted() {
        let quantile = Quantile::new();
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| (0..5000).for_each(|_| quantile.note(MILLI)));
            }
        });
        let total: u32 = quantile.counts.iter().flatten().map(|count| u32::from(count.load(Ordering::Relaxed))).sum();
        assert_eq!(total, 20_000);
    }
}
