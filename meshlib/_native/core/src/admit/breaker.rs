//! Is this endpoint fit to be called?
//!
//! Three signals of calls eject an endpoint, because each is blind to what the others see: a row of failures (or one dead
//! connection) reacts at once to an outage but never notices an endpoint that fails half of its calls; the success rate over a
//! window notices that one but waits for its minimum of calls (Linkerd's unified breaker); the share of slow calls notices one
//! that is slow but correct (resilience4j). An active check is another matter: it knows of an outage before any call does, and
//! its word outlasts the breaker's, in both directions: what fails it gets no probe, and what passes it is back at once (Envoy).
//! It does not decide whether an ejection is allowed (never the last, at most half): that is asked of the caller. A failing check
//! is not asked about: where all fail, balance panics.
use std::time::Duration;

use super::window::{Kind, Window};
use crate::model::{BreakerPlan, Class};
use crate::random::Random;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum State {
    Closed,
    Open,
    HalfOpen,
    /// It fails its active checks.
    Failing,
    Isolated,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Signal {
    /// A row of failures, a low success rate, too many slow calls, or a dead connection.
    Trip,
    /// The wait is over, and one call goes as a probe.
    Probe,
    ProbeSucceeded,
    ProbeFailed,
    /// The probe said nothing (its caller gave up).
    ProbeVanished,
    /// The word of an active check.
    CheckFailed,
    CheckPassed,
    /// A person took the endpoint out, or let it back in.
    Isolate,
    Release,
}

/// The whole state machine. What is not listed leaves the state as it is.
pub const TRANSITIONS: [(State, Signal, State); 17] = [
    (State::Closed, Signal::Trip, State::Open),
    (State::Open, Signal::Probe, State::HalfOpen),
    (State::HalfOpen, Signal::ProbeSucceeded, State::Closed),
    (State::HalfOpen, Signal::ProbeFailed, State::Open),
    (State::HalfOpen, Signal::ProbeVanished, State::Open),
    (State::Closed, Signal::CheckFailed, State::Failing),
    (State::Open, Signal::CheckFailed, State::Failing),
    (State::HalfOpen, Signal::CheckFailed, State::Failing),
    (State::Open, Signal::CheckPassed, State::Closed),
    (State::HalfOpen, Signal::CheckPassed, State::Closed),
    (State::Failing, Signal::CheckPassed, State::Closed),
    (State::Closed, Signal::Isolate, State::Isolated),
    (State::Open, Signal::Isolate, State::Isolated),
    (State::HalfOpen, Signal::Isolate, State::Isolated),
    (State::Failing, Signal::Isolate, State::Isolated),
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
            State::Failing => "failing",
            State::Isolated => "isolated",
        }
    }
}

/// Did an answer take so long that it counts as slow?
pub fn is_slow(took: Duration, plan: &BreakerPlan) -> bool {
    plan.slow > 0.0 && took.as_secs_f64() >= plan.slow
}

/// The breaker of an Endpoint. Small, since a process may know 50,000 endpoints and call 50.
#[derive(Debug)]
pub struct Breaker {
    pub state: State,
    /// How often in a row it opened: the exponent of the wait.
    openings: u8,
    /// The last failure was a dead connection, so that a probe is safe for every call.
    is_dead: bool,
    /// The last word of the active checks: it holds through an isolation.
    is_failing: bool,
    row: u32,
    /// Seconds.
    wait: f32,
    /// Nanoseconds.
    until: u64,
    /// Made at the first note.
    window: Option<Box<Window>>,
}

impl Breaker {
    pub fn new() -> Self {
        Self {
            state: State::Closed,
            openings: 0,
            is_dead: false,
            is_failing: false,
            row: 0,
            wait: 0.0,
            until: 0,
            window: None,
        }
    }

    /// Note a result while closed, and how long it took; true if the endpoint ought to be ejected.
    pub fn note(&mut self, class: Class, took: Duration, plan: &BreakerPlan, now: Duration) -> bool {
        match class {
            Class::Ignored => return false,
            Class::Success => self.row = 0,
            Class::Overload => {}
            Class::Failure | Class::Dead => self.row = self.row.saturating_add(1),
        }
        let kind = match (class == Class::Success, is_slow(took, plan)) {
            (true, false) => Kind::Good,
            (false, false) => Kind::Bad,
            (true, true) => Kind::SlowGood,
            (false, true) => Kind::SlowBad,
        };
        self.window.get_or_insert_with(Box::default).note(kind, plan.window, now);
        self.is_dead = class == Class::Dead;
        class == Class::Dead || self.row >= plan.failures || self.is_beyond(plan)
    }

    /// Too few good calls in the window, or too many slow ones.
    fn is_beyond(&self, plan: &BreakerPlan) -> bool {
        let sums = self.window.as_ref().map(|window| window.sums()).unwrap_or_default();
        let calls = sums.good + sums.bad;
        let is_low = sums.bad > 0 && f64::from(sums.good) < plan.success_rate * f64::from(calls);
        let is_slow = plan.slow > 0.0 && sums.slow > 0 && f64::from(sums.slow) >= plan.slow_rate * f64::from(calls);
        calls >= plan.minimum_calls && (is_low || is_slow)
    }

    /// Open (again): the wait doubles from `open_min` to `open_max`, jittered by a quarter, so that probes of many processes
    /// spread.
    pub fn open(&mut self, plan: &BreakerPlan, random: &Random, now: Duration) {
        let wait = (plan.open_min * f64::from(1u32 << self.openings.min(16))).min(plan.open_max);
        self.wait = (wait * (0.75 + 0.5 * random.unit())).max(0.0) as f32;
        self.openings = self.openings.saturating_add(1).min(16);
        self.wait_again(now);
    }

    /// As long as the last time, from now.
    pub fn wait_again(&mut self, now: Duration) {
        self.until = nanos(now).saturating_add(self.wait_nanos());
    }

    pub fn signal(&mut self, signal: Signal) -> bool {
        match signal {
            Signal::CheckFailed => self.is_failing = true,
            Signal::CheckPassed => self.is_failing = false,
            _ => {}
        }
        let before = self.state;
        self.state = before.after(signal);
        self.state != before
    }

    /// The word of an active check; true if the state changed. One that passes ends an ejection early and begins anew; while
    /// closed it forgets nothing, or an endpoint that is only good at checks would never trip.
    pub fn check(&mut self, is_healthy: bool) -> bool {
        let has_changed = self.signal(if is_healthy { Signal::CheckPassed } else { Signal::CheckFailed });
        if has_changed && is_healthy {
            self.reset();
        }
        has_changed
    }

    /// Begin anew after a good probe, or where a person let it back in. What the active checks said last still holds.
    pub fn reset(&mut self) {
        let is_failing = self.is_failing;
        *self = Self::new();
        if is_failing {
            self.signal(Signal::CheckFailed);
        }
    }

    /// Its active checks fail, whether or not a person took it out as well.
    pub fn is_failing(&self) -> bool {
        self.is_failing
    }

    /// The last failure was a dead connection.
    pub fn is_dead(&self) -> bool {
        self.is_dead
    }

    /// Until when no probe is due.
    pub fn until(&self) -> Duration {
        Duration::from_nanos(self.until)
    }

    /// A probe may go. One that might be processed and lost goes only where nothing was listening, or after twice the wait:
    /// otherwise an endpoint that gets no idempotent calls would never come back.
    pub fn is_due(&self, is_idempotent: bool, now: Duration) -> bool {
        let patience = if is_idempotent || self.is_dead { 0 } else { self.wait_nanos() };
        self.state == State::Open && nanos(now) >= self.until.saturating_add(patience)
    }

    fn wait_nanos(&self) -> u64 {
        (f64::from(self.wait) * 1e9) as u64
    }
}

impl Default for Breaker {
    fn default() -> Self {
        Self::new()
    }
}

fn nanos(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
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
        slow: 0.0,
        slow_rate: 0.5,
    };
    const SLOW: BreakerPlan = BreakerPlan { slow: 0.2, ..PLAN };
    const NOW: Duration = Duration::from_secs(100);
    const SECOND: Duration = Duration::from_secs(1);
    const FAST: Duration = Duration::from_millis(10);

    fn opened(plan: &BreakerPlan) -> Breaker {
        let mut breaker = Breaker::new();
        breaker.signal(Signal::Trip);
        breaker.open(plan, &Random::new(5), NOW);
        breaker
    }

    #[test]
    fn a_breaker_is_small() {
        assert_eq!(std::mem::size_of::<Breaker>(), 32);
    }

    #[test]
    fn every_edge_of_the_table_is_walked() {
        for (from, signal, to) in TRANSITIONS {
            assert_eq!(from.after(signal), to);
        }
        assert_eq!(State::Closed.after(Signal::Probe), State::Closed);
        assert_eq!(State::Isolated.after(Signal::Trip), State::Isolated);
        for from in [State::Open, State::HalfOpen, State::Failing, State::Closed] {
            assert_eq!(from.after(Signal::CheckPassed), State::Closed);
            assert_eq!(from.after(Signal::CheckFailed), State::Failing);
        }
        for signal in [Signal::CheckPassed, Signal::CheckFailed] {
            assert_eq!(State::Isolated.after(signal), State::Isolated);
        }
    }

    #[test]
    fn no_edge_is_listed_twice() {
        for (n, (from, signal, _)) in TRANSITIONS.iter().enumerate() {
            assert!(!TRANSITIONS.iter().take(n).any(|(f, s, _)| (f, s) == (from, signal)), "{from:?} {signal:?}");
        }
    }

    #[test]
    fn a_dead_connection_trips_at_once() {
        assert!(Breaker::new().note(Class::Dead, FAST, &PLAN, NOW));
    }

    #[test]
    fn five_failures_in_a_row_trip_and_a_success_ends_the_row() {
        let mut breaker = Breaker::new();
        for second in 0..40 {
            // Each pair stands alone in its window, so that only the row can trip.
            let now = NOW + Duration::from_secs(20 * second);
            assert!(!breaker.note(Class::Failure, FAST, &PLAN, now));
            assert!(!breaker.note(Class::Success, FAST, &PLAN, now));
        }
        let mut tripped = Vec::new();
        for n in 0..5 {
            tripped.push(breaker.note(
                Class::Failure,
                FAST,
                &BreakerPlan { minimum_calls: 100, ..PLAN },
                NOW * 20 + NOW * n,
            ));
        }
        assert_eq!(tripped, [false, false, false, false, true]);
    }

    #[test]
    fn half_failing_endpoint_trips_by_rate() {
        let mut breaker = Breaker::new();
        let tripped: Vec<bool> = (0..6)
            .map(|n| breaker.note(if n % 2 == 0 { Class::Success } else { Class::Failure }, FAST, &PLAN, NOW))
            .collect();
        assert_eq!(tripped, [false, false, false, false, true, true]);
    }

    #[test]
    fn old_failures_are_forgotten() {
        let mut breaker = Breaker::new();
        for _ in 0..4 {
            breaker.note(Class::Failure, FAST, &PLAN, NOW);
        }
        breaker.note(Class::Success, FAST, &PLAN, NOW + Duration::from_secs(11));
        assert!(!breaker.is_beyond(&PLAN));
    }

    #[test]
    fn overload_counts_for_the_rate_and_not_for_the_row() {
        let mut breaker = Breaker::new();
        let plan = BreakerPlan { success_rate: 0.0, ..PLAN };
        assert!((0..100).all(|_| !breaker.note(Class::Overload, FAST, &plan, NOW)));
        assert!(breaker.note(Class::Overload, FAST, &PLAN, NOW));
    }

    #[test]
    fn what_says_nothing_leaves_no_trace() {
        let mut breaker = Breaker::new();
        assert!((0..100).all(|_| !breaker.note(Class::Ignored, 10 * SECOND, &SLOW, NOW)));
        assert!(breaker.window.is_none());
    }

    #[test]
    fn half_slow_endpoint_trips_although_every_answer_is_good() {
        let mut breaker = Breaker::new();
        let tripped: Vec<bool> = (0..6)
            .map(|n| breaker.note(Class::Success, Duration::from_millis(if n % 2 == 0 { 10 } else { 200 }), &SLOW, NOW))
            .collect();
        // 2 of 5 are below the rate, 3 of 6 are at it.
        assert_eq!(tripped, [false, false, false, false, false, true]);
    }

    #[test]
    fn slow_calls_wait_for_the_minimum_of_calls_and_are_forgotten() {
        let mut breaker = Breaker::new();
        assert!((0..4).all(|_| !breaker.note(Class::Success, SECOND, &SLOW, NOW)));
        assert!((0..20).all(|_| !breaker.note(Class::Success, FAST, &SLOW, NOW + 11 * SECOND)));
        assert!(!breaker.note(Class::Success, SECOND, &SLOW, NOW + 11 * SECOND));
    }

    #[test]
    fn nothing_is_slow_where_that_is_off() {
        let mut breaker = Breaker::new();
        assert!((0..100).all(|_| !breaker.note(Class::Success, 60 * SECOND, &PLAN, NOW)));
        // Nor were they slow once it is on: the window holds what was counted under its own plan.
        assert!(!breaker.note(Class::Success, FAST, &SLOW, NOW));
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
    fn a_probe_is_due_after_the_wait_and_for_other_calls_after_twice_the_wait() {
        let mut breaker = opened(&PLAN);
        let wait = breaker.until() - NOW;
        assert!(!breaker.is_due(true, breaker.until() - FAST));
        assert!(breaker.is_due(true, breaker.until()));
        assert!(!breaker.is_due(false, breaker.until()));
        assert!(breaker.is_due(false, breaker.until() + wait));
        breaker.wait_again(NOW + 100 * SECOND);
        assert_eq!(breaker.until(), NOW + 100 * SECOND + wait);
    }

    #[test]
    fn an_endless_wait_is_no_fault() {
        let breaker = opened(&BreakerPlan { open_min: f64::INFINITY, open_max: f64::INFINITY, ..PLAN });
        assert!(!breaker.is_due(true, NOW + Duration::from_secs(1_000_000_000)));
    }

    #[test]
    fn a_failing_check_takes_out_and_lets_no_probe_through() {
        for mut breaker in [Breaker::new(), opened(&PLAN)] {
            assert!(breaker.check(false));
            assert_eq!(breaker.state, State::Failing);
            assert!(!breaker.check(false));
            assert!(!breaker.is_due(true, NOW + 1000 * SECOND));
            assert!(!breaker.signal(Signal::Probe));
            assert!(breaker.check(true));
            assert_eq!(breaker.state, State::Closed);
        }
    }

    #[test]
    fn a_probe_that_ends_after_the_check_failed_changes_nothing() {
        for end in [Signal::ProbeSucceeded, Signal::ProbeFailed, Signal::ProbeVanished] {
            let mut breaker = opened(&PLAN);
            breaker.signal(Signal::Probe);
            breaker.check(false);
            assert!(!breaker.signal(end));
            assert_eq!(breaker.state, State::Failing);
        }
    }

    #[test]
    fn a_passing_check_ends_an_ejection_early_and_begins_anew() {
        let (mut breaker, random) = (Breaker::new(), Random::new(5));
        for _ in 0..5 {
            breaker.note(Class::Failure, FAST, &PLAN, NOW);
        }
        breaker.signal(Signal::Trip);
        (0..6).for_each(|_| breaker.open(&PLAN, &random, NOW));
        assert!(breaker.check(true));
        assert_eq!(breaker.state, State::Closed);
        assert!(!breaker.note(Class::Failure, FAST, &PLAN, NOW));
        breaker.open(&PLAN, &random, NOW);
        assert!(breaker.until() - NOW <= Duration::from_millis(1250));
    }

    #[test]
    fn a_passing_check_forgives_nothing_while_closed() {
        let mut breaker = Breaker::new();
        let tripped: Vec<bool> = (0..5)
            .map(|_| {
                breaker.check(true);
                breaker.note(Class::Failure, FAST, &PLAN, NOW)
            })
            .collect();
        assert_eq!(tripped, [false, false, false, false, true]);
    }

    #[test]
    fn who_isolates_and_releases_does_not_overrule_the_check() {
        let mut breaker = Breaker::new();
        breaker.signal(Signal::Isolate);
        breaker.check(false);
        assert_eq!((breaker.state, breaker.is_failing()), (State::Isolated, true));
        breaker.signal(Signal::Release);
        breaker.reset();
        assert_eq!(breaker.state, State::Failing);
        breaker.signal(Signal::Isolate);
        breaker.check(true);
        assert_eq!(breaker.state, State::Isolated);
        breaker.signal(Signal::Release);
        breaker.reset();
        assert_eq!((breaker.state, breaker.is_failing()), (State::Closed, false));
    }
}
