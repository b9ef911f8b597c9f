//! May it go now?
//!
//! Two signals eject an endpoint, because each is blind to what the other sees: a row of failures (or one dead connection) reacts
//! at once to an outage but never notices an endpoint that fails half of its calls; the success rate over a window notices that one
//! but waits for its minimum of calls (Linkerd's unified breaker). The window is a ring of exact counts, no moving average: the
//! decision does not depend on the rate of calls, and an idle endpoint forgets. It does not protect against a backend that is
//! slow but correct: balance does that.
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use crate::model::{BreakerPlan, Class};
use crate::random::Random;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    Closed,
    Open,
    HalfOpen,
    Isolated,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Signal {
    /// A row of failures, a low success rate, or a dead connection.
    Trip,
    /// The wait is over, and one call goes as a probe.
    Probe,
    ProbeSucceeded,
    ProbeFailed,
    /// The probe said nothing (its caller gave up).
    ProbeVanished,
    /// A person took the endpoint out, or let it back in.
    Isolate,
    Release,
}

/// The whole state machine. What is not listed leaves the state as it is.
pub const TRANSITIONS: [(State, Signal, State); 10] = [
    (State::Closed, Signal::Trip, State::Open),
    (State::Open, Signal::Probe, State::HalfOpen),
    (State::HalfOpen, Signal::ProbeSucceeded, State::Closed),
    (State::HalfOpen, Signal::ProbeFailed, State::Open),
    (State::HalfOpen, Signal::ProbeVanished, State::Open),
    (State::Closed, Signal::Isolate, State::Isolated),
    (State::Open, Signal::Isolate, State::Isolated),
    (State::HalfOpen, Signal::Isolate, State::Isolated),
    (State::Isolated, Signal::Release, State::Closed),
    (State::Isolated, Signal::Isolate, State::Isolated),
];

impl State {
    pub fn after(self, signal: Signal) -> State {
        TRANSITIONS.iter().find(|(from, on, _)| *from == self && *on == signal).map_or(self, |(_, _, to)| *to)
    }

    pub fn word(self) -> &'static str {
        match self {
            State::Closed => "closed",
            State::Open => "open",
            State::HalfOpen => "half_open",
            State::Isolated => "isolated",
        }
    }
}

const BUCKETS: usize = 10;

/// The breaker of an Endpoint. It judges; whether an ejection is allowed (never the last, at most half) is asked of the caller.
#[derive(Debug)]
pub struct Breaker {
    pub state: State,
    row: u32,
    newest: u64,
    good: [u32; BUCKETS],
    bad: [u32; BUCKETS],
    /// How often in a row it opened: the exponent of the wait.
    openings: u8,
    until: Duration,
    wait: Duration,
    /// The last failure was a dead connection, so that a probe is safe for every call.
    is_dead: bool,
}

impl Breaker {
    pub fn new() -> Self {
        Self {
            state: State::Closed,
            row: 0,
            newest: 0,
            good: [0; BUCKETS],
            bad: [0; BUCKETS],
            openings: 0,
            until: Duration::ZERO,
            wait: Duration::ZERO,
            is_dead: false,
        }
    }

    /// Note a result while closed; true if the endpoint ought to be ejected.
    pub fn note(&mut self, class: Class, plan: &BreakerPlan, now: Duration) -> bool {
        self.turn_to((now.as_secs_f64() * BUCKETS as f64 / plan.window.max(0.001)) as u64);
        let slot = (self.newest % BUCKETS as u64) as usize;
        let counts = if class == Class::Success { &mut self.good } else { &mut self.bad };
        match class {
            Class::Ignored => return false,
            Class::Success => self.row = 0,
            Class::Overload => {}
            Class::Failure | Class::Dead => self.row = self.row.saturating_add(1),
        }
        if let Some(count) = counts.get_mut(slot) {
            *count = count.saturating_add(1);
        }
        self.is_dead = class == Class::Dead;
        class == Class::Dead || self.row >= plan.failures || self.is_below(plan)
    }

    fn is_below(&self, plan: &BreakerPlan) -> bool {
        let sum = |counts: &[u32]| counts.iter().fold(0u32, |sum, n| sum.saturating_add(*n));
        let (good, bad) = (sum(&self.good), sum(&self.bad));
        let calls = good.saturating_add(bad);
        bad > 0 && calls >= plan.minimum_calls && f64::from(good) < plan.success_rate * f64::from(calls)
    }

    fn turn_to(&mut self, bucket: u64) {
        if bucket.saturating_add(BUCKETS as u64) < self.newest {
            // Not a thread that read its clock a moment ago: a new plan made the window longer, and old numbers mean nothing in it.
            (self.good, self.bad) = ([0; BUCKETS], [0; BUCKETS]);
            self.newest = bucket;
        }
        let steps = bucket.saturating_sub(self.newest).min(BUCKETS as u64);
        for step in 0..steps {
            let slot = ((bucket - step) % BUCKETS as u64) as usize;
            if let (Some(good), Some(bad)) = (self.good.get_mut(slot), self.bad.get_mut(slot)) {
                (*good, *bad) = (0, 0);
            }
        }
        self.newest = self.newest.max(bucket);
    }

    /// Open (again): the wait doubles from `open_min` to `open_max`, jittered by a quarter, so that probes of many processes spread.
    pub fn open(&mut self, plan: &BreakerPlan, random: &Random, now: Duration) {
        let wait = (plan.open_min * f64::from(1u32 << self.openings.min(16))).min(plan.open_max);
        self.wait = Duration::from_secs_f64((wait * (0.75 + 0.5 * random.unit())).max(0.0));
        self.until = now + self.wait;
        self.openings = self.openings.saturating_add(1).min(16);
    }

    /// As long as the last time, from now.
    pub fn wait_again(&mut self, now: Duration) {
        self.until = now + self.wait;
    }

    pub fn signal(&mut self, signal: Signal) -> bool {
        let before = self.state;
        self.state = before.after(signal);
        self.state != before
    }

    /// Begin anew after a good probe.
    pub fn reset(&mut self) {
        *self = Self::new();
    }

    /// Until when no probe is due.
    pub fn until(&self) -> Duration {
        self.until
    }

    /// A probe may go. One that might be processed and lost goes only where nothing was listening, or after twice the wait:
    /// otherwise an endpoint that gets no idempotent calls would never come back.
    pub fn is_due(&self, is_idempotent: bool, now: Duration) -> bool {
        let patience = if is_idempotent || self.is_dead { Duration::ZERO } else { self.wait };
        self.state == State::Open && now >= self.until + patience
    }
}

impl Default for Breaker {
    fn default() -> Self {
        Self::new()
    }
}

/// How many at once: leave to go, given back when its holder ends. State of a Service or an Endpoint.
#[derive(Debug, Default)]
pub struct InFlight(AtomicU32);

impl InFlight {
    pub fn enter(&self, limit: u32) -> bool {
        self.0.fetch_update(Ordering::AcqRel, Ordering::Acquire, |n| (n < limit).then_some(n + 1)).is_ok()
    }

    pub fn leave(&self) {
        let _ = self.0.fetch_update(Ordering::AcqRel, Ordering::Acquire, |n| n.checked_sub(1));
    }

    pub fn count(&self) -> u32 {
        self.0.load(Ordering::Relaxed)
    }

    /// In a forked child nothing of the parent's is under way.
    pub fn clear(&self) {
        self.0.store(0, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLAN: BreakerPlan = BreakerPlan {
        failures: 5,
        success_rate: 0.8,
        window: 10.0,
        minimum_calls: 5,
        open_min: 1.0,
        open_max: 60.0,
        max_ejected: 0.5,
    };
    const NOW: Duration = Duration::from_secs(100);

    #[test]
    fn every_edge_of_the_table_is_walked() {
        for (from, signal, to) in TRANSITIONS {
            assert_eq!(from.after(signal), to);
        }
        assert_eq!(State::Closed.after(Signal::Probe), State::Closed);
        assert_eq!(State::Isolated.after(Signal::Trip), State::Isolated);
    }

    #[test]
    fn a_dead_connection_trips_at_once() {
        assert!(Breaker::new().note(Class::Dead, &PLAN, NOW));
    }

    #[test]
    fn five_failures_in_a_row_trip_and_a_success_ends_the_row() {
        let mut breaker = Breaker::new();
        for second in 0..40 {
            // Each pair stands alone in its window, so that only the row can trip.
            let now = NOW + Duration::from_secs(20 * second);
            assert!(!breaker.note(Class::Failure, &PLAN, now));
            assert!(!breaker.note(Class::Success, &PLAN, now));
        }
        let mut tripped = Vec::new();
        for n in 0..5 {
            tripped.push(breaker.note(Class::Failure, &BreakerPlan { minimum_calls: 100, ..PLAN }, NOW * 20 + NOW * n));
        }
        assert_eq!(tripped, [false, false, false, false, true]);
    }

    #[test]
    fn half_failing_endpoint_trips_by_rate() {
        let mut breaker = Breaker::new();
        let tripped: Vec<bool> = (0..6)
            .map(|n| breaker.note(if n % 2 == 0 { Class::Success } else { Class::Failure }, &PLAN, NOW))
            .collect();
        assert_eq!(tripped, [false, false, false, false, true, true]);
    }

    #[test]
    fn old_failures_are_forgotten() {
        let mut breaker = Breaker::new();
        for _ in 0..4 {
            breaker.note(Class::Failure, &PLAN, NOW);
        }
        breaker.note(Class::Success, &PLAN, NOW + Duration::from_secs(11));
        assert!(!breaker.is_below(&PLAN));
    }

    #[test]
    fn the_wait_doubles_up_to_its_cap() {
        let (mut breaker, random) = (Breaker::new(), Random::new(5));
        let mut waits = Vec::new();
        for _ in 0..8 {
            breaker.open(&PLAN, &random, NOW);
            waits.push((breaker.until() - NOW).as_secs_f64());
        }
        for (n, wait) in waits.iter().enumerate() {
            let middle = f64::from(1u32 << n).min(60.0);
            assert!((0.75 * middle..=1.25 * middle).contains(wait), "{waits:?}");
        }
    }

    #[test]
    fn no_more_than_the_limit_enter() {
        let permits = InFlight::default();
        assert_eq!((0..5).filter(|_| permits.enter(3)).count(), 3);
        permits.leave();
        assert!(permits.enter(3));
        permits.clear();
        permits.leave();
        assert_eq!(permits.count(), 0);
    }
}
