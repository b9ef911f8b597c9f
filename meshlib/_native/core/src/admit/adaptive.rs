//! How many calls at once can this service take, as its own latency tells?
//!
//! Netflix's Gradient2: a long average of latency (600 samples) stands for the service at ease; where the newest sample is more
//! than 1.5 times that, a queue has formed somewhere and the limit shrinks with the ratio, and otherwise it grows by a queue of
//! four. A limit of which less than half is used proves nothing and stays, so that it can't grow without calls. What was dropped
//! (refused for overload, or too slow to wait for) has no honest latency: it takes a tenth off, which is the gradient's least
//! without the queue. The average follows the latency, so under an overload that never pauses the limit creeps upwards: it guards
//! against bursts, and the fixed limit beside it against the rest. It does not count what is in flight: `permits` does.
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use parking_lot::Mutex;

use crate::model::AdaptivePlan;

const LONG_WINDOW: f64 = 600.0;
/// The first samples are averaged plainly: one slow first call must not be the measure of all.
const WARM_UP: u32 = 10;
const TOLERANCE: f64 = 1.5;
const SMOOTHING: f64 = 0.2;
const QUEUE: f64 = 4.0;
const LEAST_GRADIENT: f64 = 0.5;

/// The learnt limit of a Service. Its bounds come from the plan at each use, so that a new plan holds at once.
#[derive(Debug, Default)]
pub struct Adaptive {
    /// 0: nothing learnt yet.
    limit: AtomicU32,
    learnt: Mutex<Learnt>,
}

#[derive(Debug, Default)]
struct Learnt {
    limit: f64,
    /// Seconds.
    long: f64,
    samples: u32,
}

impl Adaptive {
    /// Read without a lock.
    pub fn limit(&self, plan: &AdaptivePlan) -> u32 {
        let limit = match self.limit.load(Ordering::Relaxed) {
            0 => plan.initial,
            learnt => learnt,
        };
        limit.max(plan.least).min(plan.most)
    }

    /// The long average of latency; None before the first sample.
    pub fn long(&self) -> Option<Duration> {
        let learnt = self.learnt.lock();
        (learnt.samples > 0).then(|| Duration::try_from_secs_f64(learnt.long).unwrap_or(Duration::MAX))
    }

    /// A call ended: how long it took, how many were in flight when it began (itself among them), and whether it was dropped.
    pub fn note(&self, rtt: Duration, in_flight: u32, is_dropped: bool, plan: &AdaptivePlan) {
        let (least, most) = (f64::from(plan.least.max(1)), f64::from(plan.most));
        let mut learnt = self.learnt.lock();
        if learnt.limit == 0.0 {
            learnt.limit = f64::from(plan.initial);
        }
        let limit = if is_dropped {
            learnt.limit * (1.0 - SMOOTHING * (1.0 - LEAST_GRADIENT))
        } else {
            learnt.after(rtt.as_secs_f64().max(1e-9), f64::from(in_flight))
        };
        learnt.limit = limit.max(least).min(most);
        self.limit.store(learnt.limit as u32, Ordering::Relaxed);
    }
}

impl Learnt {
    /// The limit after this sample.
    fn after(&mut self, short: f64, in_flight: f64) -> f64 {
        self.samples = self.samples.saturating_add(1);
        let weight = if self.samples <= WARM_UP { 1.0 / f64::from(self.samples) } else { 2.0 / (LONG_WINDOW + 1.0) };
        self.long += weight * (short - self.long);
        let long = self.long;
        if long / short > 2.0 {
            // The end of an overload: come down faster than an average of 600 does.
            self.long *= 0.95;
        }
        if in_flight < self.limit / 2.0 {
            return self.limit;
        }
        let gradient = (TOLERANCE * long / short).clamp(LEAST_GRADIENT, 1.0);
        (1.0 - SMOOTHING) * self.limit + SMOOTHING * (self.limit * gradient + QUEUE)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::indexing_slicing)]
    use super::*;
    use std::collections::VecDeque;

    const PLAN: AdaptivePlan = AdaptivePlan { initial: 20, least: 4, most: 1000 };
    const BASE: Duration = Duration::from_millis(100);

    /// So many samples of this latency with the limit in full use.
    fn press(adaptive: &Adaptive, samples: u32, rtt: Duration) {
        (0..samples).for_each(|_| adaptive.note(rtt, adaptive.limit(&PLAN), false, &PLAN));
    }

    #[test]
    fn a_limit_is_small() {
        assert_eq!(std::mem::size_of::<Adaptive>(), 40);
    }

    #[test]
    fn it_begins_as_the_plan_says() {
        let adaptive = Adaptive::default();
        assert_eq!((adaptive.limit(&PLAN), adaptive.long()), (20, None));
        assert_eq!(adaptive.limit(&AdaptivePlan { most: 10, ..PLAN }), 10);
        assert_eq!(adaptive.limit(&AdaptivePlan { least: 50, ..PLAN }), 50);
    }

    #[test]
    fn it_grows_by_a_fifth_of_the_queue_while_it_is_used_and_nothing_waits() {
        let adaptive = Adaptive::default();
        press(&adaptive, 10, BASE);
        assert_eq!((adaptive.limit(&PLAN), adaptive.long()), (28, Some(BASE)));
        press(&adaptive, 10_000, BASE);
        assert_eq!(adaptive.limit(&PLAN), 1000);
    }

    #[test]
    fn it_never_grows_unused() {
        let adaptive = Adaptive::default();
        (0..10_000).for_each(|_| adaptive.note(BASE, 9, false, &PLAN));
        assert_eq!(adaptive.limit(&PLAN), 20);
        adaptive.note(BASE, 10, false, &PLAN);
        adaptive.note(BASE, 11, false, &PLAN);
        assert_eq!(adaptive.limit(&PLAN), 21);
    }

    #[test]
    fn it_shrinks_when_latency_doubles() {
        let adaptive = Adaptive::default();
        press(&adaptive, 100, BASE);
        let before = adaptive.limit(&PLAN);
        press(&adaptive, 20, 2 * BASE);
        assert_eq!((before, adaptive.limit(&PLAN)), (100, 50));
    }

    #[test]
    fn it_is_never_below_its_least() {
        let adaptive = Adaptive::default();
        (0..100).for_each(|_| adaptive.note(Duration::ZERO, 20, true, &PLAN));
        assert_eq!(adaptive.limit(&PLAN), 4);
        press(&adaptive, 20, BASE);
        press(&adaptive, 100, 1000 * BASE);
        assert!(adaptive.limit(&PLAN) >= 4);
    }

    #[test]
    fn what_was_dropped_takes_a_tenth_and_says_nothing_of_latency() {
        let adaptive = Adaptive::default();
        press(&adaptive, 100, BASE);
        adaptive.note(Duration::ZERO, 1, true, &PLAN);
        assert_eq!((adaptive.limit(&PLAN), adaptive.long()), (90, Some(BASE)));
    }

    #[test]
    fn after_a_burst_it_comes_back() {
        let adaptive = Adaptive::default();
        press(&adaptive, 100, BASE);
        press(&adaptive, 100, 5 * BASE);
        let (low, long) = (adaptive.limit(&PLAN), adaptive.long().unwrap());
        press(&adaptive, 200, BASE);
        assert!(low < 20 && adaptive.limit(&PLAN) > 100, "{low} {}", adaptive.limit(&PLAN));
        assert!(long > 2 * BASE && adaptive.long().unwrap() < long, "{long:?} {:?}", adaptive.long());
    }

    #[test]
    fn after_a_long_overload_the_average_comes_down_within_twenty_samples() {
        let adaptive = Adaptive::default();
        press(&adaptive, 10, BASE);
        press(&adaptive, 2000, 5 * BASE);
        let before = adaptive.long().unwrap();
        press(&adaptive, 20, BASE);
        let after = adaptive.long().unwrap();
        assert!(before > 4 * BASE && after < 2 * BASE, "{before:?} {after:?}");
    }

    #[test]
    fn a_new_plan_holds_at_once() {
        let adaptive = Adaptive::default();
        press(&adaptive, 1000, BASE);
        assert_eq!(adaptive.limit(&AdaptivePlan { most: 50, ..PLAN }), 50);
    }

    /// A server of so many workers and one queue, in steps of a millisecond; a caller that begins what the limit allows.
    struct Served {
        workers: usize,
        waiting: VecDeque<(u32, u32)>,
        working: Vec<(u32, u32, u32)>,
    }

    impl Served {
        fn step(&mut self, now: u32, wanted: u32, took: u32, adaptive: &Adaptive) {
            self.working.retain(|(begun, in_flight, end)| {
                if *end <= now {
                    adaptive.note(Duration::from_millis(u64::from(now - begun)), *in_flight, false, &PLAN);
                }
                *end > now
            });
            for _ in 0..wanted {
                let in_flight = (self.waiting.len() + self.working.len()) as u32;
                if in_flight < adaptive.limit(&PLAN) {
                    self.waiting.push_back((now, in_flight + 1));
                }
            }
            while self.working.len() < self.workers {
                let Some((begun, in_flight)) = self.waiting.pop_front() else { break };
                self.working.push((begun, in_flight, now + took));
            }
        }
    }

    /// The limits of each millisecond but the first 20 seconds; `wanted` calls begin in a millisecond. By Little's law 40 workers
    /// of 50 ms each have 40 in flight at their best: 800 calls a second.
    fn limits(seconds: u32, wanted: impl Fn(u32) -> u32) -> Vec<u32> {
        let adaptive = Adaptive::default();
        let mut server = Served { workers: 40, waiting: VecDeque::new(), working: Vec::new() };
        let mut limits = Vec::new();
        for now in 0..1000 * seconds {
            server.step(now, wanted(now), 50, &adaptive);
            if now >= 20_000 {
                limits.push(adaptive.limit(&PLAN));
            }
        }
        limits.sort_unstable();
        limits
    }

    #[test]
    fn it_settles_near_the_capacity_of_a_server_with_bursts() {
        // A tenth of the time five times the capacity is asked for, and else half of it.
        let limits = limits(70, |now| if now % 2000 < 200 { 4 } else { u32::from(now % 5 < 2) });
        let (low, middle, high) = (limits[0], limits[limits.len() / 2], limits[limits.len() - 1]);
        assert!(low >= 20 && (40..=60).contains(&middle) && high <= 120, "{low} {middle} {high}");
    }

    #[test]
    fn below_the_capacity_it_leaves_room_for_twice_the_load() {
        // 30 in flight.
        let limits = limits(30, |now| u32::from(now % 5 < 3));
        assert!(limits[0] >= 40 && limits[limits.len() - 1] <= 70, "{limits:?}");
    }

    #[test]
    fn an_overload_that_never_pauses_is_what_it_can_not_see() {
        assert_eq!(limits(40, |_| 2).last().copied(), Some(1000));
    }
}
