//! Does the service as a whole refuse, so that most calls had better not be sent?
//!
//! The client-side throttling of Google's SRE book ("Handling Overload"): a backend that refuses still pays for each refusal, and
//! enough of them bring it down, so callers refuse for it once they have asked `ratio` times as often as it accepts:
//! p = max(0, (requests - ratio * accepts) / (requests + 1)). A request counts before it is sent, and one refused here counts as
//! well, so that demand is measured and not our own refusals; it is never an accept. Who is under way has no answer yet and is
//! not held against the backend, otherwise the first burst of a fresh process would refuse itself. A pass each second keeps the
//! question open. It looks at one Service; a single bad endpoint is the breaker's.
use std::time::Duration;

use parking_lot::Mutex;

use super::window::Ring;
use crate::random::Random;

/// So long at most without a call that asks how it stands.
const FORCED: Duration = Duration::from_secs(1);

/// State of a Service.
#[derive(Debug, Default)]
pub struct Throttle(Mutex<Counts>);

#[derive(Debug, Default)]
struct Counts {
    /// Requests, accepts.
    ring: Ring<2>,
    passed: Duration,
}

impl Throttle {
    /// May this call be sent? `ratio` is the K of the book, `window` is in seconds, `under_way` are the calls without an answer.
    pub fn may_go(&self, random: &Random, ratio: f64, window: f64, under_way: u32, now: Duration) -> bool {
        let mut counts = self.0.lock();
        counts.ring.turn(window, now);
        let share = refused_share(counts.ring.sums(), ratio, under_way);
        counts.ring.add([true, false], window, now);
        let is_forced = now.saturating_sub(counts.passed) >= FORCED;
        let may_go = share <= 0.0 || is_forced || random.unit() >= share;
        if may_go {
            counts.passed = now;
        }
        may_go
    }

    /// The backend took a call: it answered, and not with a refusal.
    pub fn accepted(&self, window: f64, now: Duration) {
        self.0.lock().ring.add([false, true], window, now);
    }

    /// A call was not sent after all, or nobody waited for its answer.
    pub fn forget(&self, window: f64, now: Duration) {
        self.0.lock().ring.take([true, false], window, now);
    }

    /// Share of the calls that would be refused now.
    pub fn refused(&self, ratio: f64, window: f64, under_way: u32, now: Duration) -> f64 {
        let mut counts = self.0.lock();
        counts.ring.turn(window, now);
        refused_share(counts.ring.sums(), ratio, under_way)
    }
}

fn refused_share([requests, accepts]: [u32; 2], ratio: f64, under_way: u32) -> f64 {
    let answered = f64::from(requests.saturating_sub(under_way));
    ((answered - ratio * f64::from(accepts)) / (f64::from(requests) + 1.0)).max(0.0)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::indexing_slicing)]
    use super::*;

    const WINDOW: f64 = 30.0;
    const NOW: Duration = Duration::from_secs(1000);

    /// So many seconds of so many calls each, of which the backend accepts so many a second: calls sent in the last ten seconds.
    fn run(throttle: &Throttle, from: u64, seconds: u64, demand: u64, capacity: u64) -> u64 {
        let random = Random::new(from);
        let mut sent = 0;
        for second in from..from + seconds {
            let mut taken = 0;
            for n in 0..demand {
                let now = NOW + Duration::from_secs(second) + Duration::from_nanos(1_000_000_000 / demand * n);
                if throttle.may_go(&random, 2.0, WINDOW, 0, now) {
                    sent += u64::from(second + 10 >= from + seconds);
                    taken += 1;
                    if taken <= capacity {
                        throttle.accepted(WINDOW, now);
                    }
                }
            }
        }
        sent
    }

    #[test]
    fn a_throttle_is_small() {
        assert_eq!(std::mem::size_of::<Throttle>(), 72);
    }

    #[test]
    fn the_share_is_that_of_the_book() {
        assert_eq!(refused_share([99, 0], 2.0, 0), 0.99);
        assert_eq!(refused_share([99, 40], 2.0, 0), 0.19);
        assert_eq!(refused_share([99, 50], 2.0, 0), 0.0);
        assert_eq!(refused_share([99, 40], 2.0, 19), 0.0);
        assert_eq!(refused_share([0, 0], 2.0, 0), 0.0);
    }

    #[test]
    fn a_service_that_accepts_all_never_notices() {
        assert_eq!(run(&Throttle::default(), 0, 100, 200, 200), 2000);
    }

    #[test]
    fn the_first_burst_of_a_process_goes_as_nobody_has_answered_yet() {
        let (throttle, random) = (Throttle::default(), Random::new(1));
        assert!((0..500).all(|n| throttle.may_go(&random, 2.0, WINDOW, n, NOW)));
    }

    #[test]
    fn of_a_service_that_refuses_all_about_one_call_a_second_still_asks() {
        let sent = run(&Throttle::default(), 0, 100, 1000, 0);
        assert!((10..=14).contains(&sent), "{sent} of 10,000");
    }

    #[test]
    fn at_most_about_twice_of_what_is_accepted_goes_out() {
        let sent = run(&Throttle::default(), 0, 100, 1000, 100);
        assert!((1850..=2150).contains(&sent), "{sent} for 1,000 accepted");
    }

    #[test]
    fn it_recovers_when_the_service_does() {
        let throttle = Throttle::default();
        run(&throttle, 0, 100, 1000, 0);
        // What it lets through doubles in a bit less than half a window, from one a second on.
        let sent: Vec<u64> = (0..5).map(|n| run(&throttle, 100 + 40 * n, 40, 1000, 1000)).collect();
        assert!(sent.windows(2).all(|pair| pair[1] > 5 * pair[0] || pair[1] == 10_000), "{sent:?}");
        assert_eq!(sent[4], 10_000);
        assert_eq!(throttle.refused(2.0, WINDOW, 0, NOW + Duration::from_secs(300)), 0.0);
    }

    #[test]
    fn what_is_refused_here_counts_as_a_request_and_never_as_an_accept() {
        let (throttle, random) = (Throttle::default(), Random::new(3));
        let sent = (0..1000).filter(|_| throttle.may_go(&random, 2.0, WINDOW, 0, NOW)).count();
        let counts = throttle.0.lock();
        assert!(sent < 20, "{sent}");
        assert_eq!(counts.ring.sums(), [1000, 0]);
    }

    #[test]
    fn an_old_outage_is_forgotten() {
        let throttle = Throttle::default();
        run(&throttle, 0, 30, 100, 0);
        assert_eq!(throttle.refused(2.0, WINDOW, 0, NOW + Duration::from_secs(61)), 0.0);
    }
}
