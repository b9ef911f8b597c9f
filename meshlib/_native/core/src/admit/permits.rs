//! How many at once, and how many may wait for that?
//!
//! Leave to go is a number, not a lock: it is taken by a compare-and-swap and given back when its holder ends. Waiting is a
//! second number beside it, in the same word, so that both change together and none is lost or counted twice, whatever the threads do. A
//! permit that is given back belongs to those who wait: a newcomer goes only if there are more free permits than that. It does
//! not know who waits, and wakes nobody: the drivers do.
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

/// How many at once. State of a Service or an Endpoint.
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

/// The answer to one who asks for a permit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Admission {
    /// It holds a permit, and must `leave`.
    Go,
    /// It waits, and must `promote` (until that is granted) or `give_up`.
    Wait,
    Refused,
}

/// How many at once, and how many may wait. State of a Service.
#[derive(Debug, Default)]
pub struct Permits(AtomicU64);

impl Permits {
    /// A newcomer.
    pub fn ask(&self, limit: u32, pending_limit: u32) -> Admission {
        let mut answer = Admission::Refused;
        let _ = self.0.fetch_update(Ordering::AcqRel, Ordering::Acquire, |word| {
            let (in_flight, pending) = parts(word);
            answer = if u64::from(in_flight) + u64::from(pending) < u64::from(limit) {
                Admission::Go
            } else if pending < pending_limit {
                Admission::Wait
            } else {
                Admission::Refused
            };
            match answer {
                Admission::Go => Some(word_of(in_flight + 1, pending)),
                Admission::Wait => Some(word_of(in_flight, pending + 1)),
                Admission::Refused => None,
            }
        });
        answer
    }

    /// One who waits asks again; true: it waits no longer and holds a permit.
    pub fn promote(&self, limit: u32) -> bool {
        self.change(|in_flight, pending| {
            let rest = pending.checked_sub(1)?;
            (in_flight < limit).then_some((in_flight + 1, rest))
        })
    }

    /// One who waits does so no longer.
    pub fn give_up(&self) {
        self.change(|in_flight, pending| Some((in_flight, pending.checked_sub(1)?)));
    }

    /// One who holds a permit gives it back; true: somebody waits for it.
    pub fn leave(&self) -> bool {
        self.change(|in_flight, pending| Some((in_flight.checked_sub(1)?, pending))) && self.pending() > 0
    }

    pub fn count(&self) -> u32 {
        parts(self.0.load(Ordering::Relaxed)).0
    }

    pub fn pending(&self) -> u32 {
        parts(self.0.load(Ordering::Relaxed)).1
    }

    /// In a forked child nothing of the parent's is under way, and nobody waits.
    pub fn clear(&self) {
        self.0.store(0, Ordering::Release);
    }

    fn change(&self, to: impl Fn(u32, u32) -> Option<(u32, u32)>) -> bool {
        let next = |word| {
            let (in_flight, pending) = parts(word);
            to(in_flight, pending).map(|(in_flight, pending)| word_of(in_flight, pending))
        };
        self.0.fetch_update(Ordering::AcqRel, Ordering::Acquire, next).is_ok()
    }
}

fn parts(word: u64) -> (u32, u32) {
    (word as u32, (word >> 32) as u32)
}

fn word_of(in_flight: u32, pending: u32) -> u64 {
    u64::from(pending) << 32 | u64::from(in_flight)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::Random;

    #[test]
    fn permits_are_one_word() {
        assert_eq!((std::mem::size_of::<InFlight>(), std::mem::size_of::<Permits>()), (4, 8));
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

    #[test]
    fn with_nobody_allowed_to_wait_the_rest_is_refused_at_once() {
        let permits = Permits::default();
        let answers: Vec<Admission> = (0..3).map(|_| permits.ask(2, 0)).collect();
        assert_eq!(answers, [Admission::Go, Admission::Go, Admission::Refused]);
        assert_eq!((permits.count(), permits.pending()), (2, 0));
    }

    #[test]
    fn a_permit_given_back_belongs_to_who_waits() {
        let permits = Permits::default();
        assert_eq!(permits.ask(1, 2), Admission::Go);
        assert_eq!(permits.ask(1, 2), Admission::Wait);
        assert!(!permits.promote(1));
        assert!(permits.leave());
        assert_eq!(permits.ask(1, 2), Admission::Wait);
        assert_eq!(permits.ask(1, 2), Admission::Refused);
        assert!(permits.promote(1));
        assert!(!permits.promote(1));
        permits.give_up();
        assert!(!permits.leave());
        assert_eq!((permits.count(), permits.pending()), (0, 0));
    }

    #[test]
    fn a_lower_limit_lets_nobody_in_until_enough_have_left() {
        let permits = Permits::default();
        (0..4).for_each(|_| assert_eq!(permits.ask(4, 1), Admission::Go));
        assert_eq!(permits.ask(2, 1), Admission::Wait);
        let granted: Vec<bool> = (0..3)
            .map(|_| {
                permits.leave();
                permits.promote(2)
            })
            .collect();
        assert_eq!(granted, [false, false, true]);
    }

    #[test]
    fn what_nobody_holds_can_not_be_given_back() {
        let permits = Permits::default();
        assert!(!permits.leave());
        permits.give_up();
        assert!(!permits.promote(10));
        assert_eq!((permits.count(), permits.pending()), (0, 0));
    }

    #[test]
    fn permits_are_conserved_whatever_the_threads_do() {
        const LIMIT: u32 = 3;
        let permits = Permits::default();
        std::thread::scope(|scope| {
            for seed in 0..6 {
                let permits = &permits;
                scope.spawn(move || {
                    let random = Random::new(seed);
                    for _ in 0..2000 {
                        let holds = match permits.ask(LIMIT, 2) {
                            Admission::Go => true,
                            Admission::Refused => false,
                            Admission::Wait => loop {
                                if permits.promote(LIMIT) {
                                    break true;
                                }
                                if random.below(8) == 0 {
                                    permits.give_up();
                                    break false;
                                }
                                std::thread::yield_now();
                            },
                        };
                        assert!(permits.count() <= LIMIT && permits.pending() <= 2);
                        if holds {
                            permits.leave();
                        }
                    }
                });
            }
        });
        assert_eq!((permits.count(), permits.pending()), (0, 0));
    }
}
