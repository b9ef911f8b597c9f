#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]
use std::sync::atomic::AtomicU32;

use super::*;
use crate::random::Random;

const NOW: Duration = Duration::from_secs(100);
const MILLI: Duration = Duration::from_millis(1);
const TERMS: Terms =
    Terms { rooms: [2; 4], longest: 4, target: Duration::from_millis(5), interval: Duration::from_millis(100) };
const SHARED: Terms = Terms { rooms: [2, 3, 4, 5], longest: 4, ..TERMS };

use Priority::{Critical, CriticalPlus, Sheddable};

fn ask(queue: &Queue, priority: Priority, now: Duration, terms: &Terms) -> Place {
    queue.ask(&Asker { priority, now, deadline: None, can_wait: true }, terms)
}

/// One that has to wait: its ticket, and for how long.
fn wait(queue: &Queue, priority: Priority, now: Duration, terms: &Terms) -> (u64, Duration) {
    match ask(queue, priority, now, terms) {
        Place::Waits { ticket, end } => (ticket, end - now),
        other => panic!("it should wait: {other:?}"),
    }
}

/// All places are taken.
fn full(terms: &Terms) -> Queue {
    let queue = Queue::default();
    let most = terms.rooms[3];
    assert_eq!((0..=most).filter(|_| queue.enter(most).is_some()).count(), most as usize);
    queue
}

fn give_back(queue: &Queue, now: Duration, terms: &Terms) -> Vec<u64> {
    queue.give_back(Some(now), || *terms);
    queue.called()
}

#[test]
fn while_nobody_waits_a_place_is_a_number() {
    let queue = Queue::default();
    assert_eq!((queue.enter(2), queue.enter(2), queue.enter(2)), (Some(1), Some(2), None));
    let _locked = queue.line.lock();
    queue.give_back(Some(NOW), || panic!("nobody asks for the terms"));
    assert_eq!((queue.enter(2), queue.count(), queue.waiting()), (Some(2), 2, 0));
    assert_eq!(queue.called().capacity(), 0);
}

#[test]
fn a_place_that_is_given_back_is_handed_to_who_waits_and_not_to_a_newcomer() {
    let queue = full(&TERMS);
    let (first, _) = wait(&queue, Critical, NOW, &TERMS);
    let (second, _) = wait(&queue, Critical, NOW, &TERMS);
    assert_eq!(give_back(&queue, NOW, &TERMS), [first]);
    assert_eq!((queue.enter(2), queue.count(), queue.waiting()), (None, 2, 1));
    assert_eq!((queue.is_waiting(first), queue.is_waiting(second)), (false, true));
    assert_eq!(queue.withdraw(first, None), Turn::Taken(2));
    // There is room for three now, and the newcomer goes behind who waits.
    let wider = Terms { rooms: [3; 4], ..TERMS };
    wait(&queue, Critical, NOW, &wider);
    assert_eq!(queue.called(), [second]);
}

#[test]
fn it_is_first_come_first_served_while_the_queue_is_short_lived() {
    let queue = full(&TERMS);
    let tickets: Vec<u64> = (0..3).map(|_| wait(&queue, Critical, NOW, &TERMS).0).collect();
    let called: Vec<u64> = (0..3).flat_map(|_| give_back(&queue, NOW + 99 * MILLI, &TERMS)).collect();
    assert_eq!(called, tickets);
}

#[test]
fn it_is_last_come_first_served_once_the_queue_stands() {
    let queue = full(&TERMS);
    let (old, _) = wait(&queue, Critical, NOW, &TERMS);
    let (middle, _) = wait(&queue, Critical, NOW + 97 * MILLI, &TERMS);
    let (young, _) = wait(&queue, Critical, NOW + 98 * MILLI, &TERMS);
    assert_eq!(give_back(&queue, NOW + 99 * MILLI, &TERMS), [old]);
    // The others have not left it empty since.
    assert_eq!(give_back(&queue, NOW + 100 * MILLI, &TERMS), [young]);
    assert_eq!(give_back(&queue, NOW + 100 * MILLI, &TERMS), [middle]);
}

#[test]
fn the_patience_is_the_interval_and_the_target_once_the_queue_stands() {
    let queue = full(&TERMS);
    assert_eq!(wait(&queue, Critical, NOW, &TERMS).1, TERMS.interval);
    assert_eq!(wait(&queue, Critical, NOW + 99 * MILLI, &TERMS).1, TERMS.interval);
    assert_eq!(wait(&queue, Critical, NOW + 100 * MILLI, &TERMS).1, TERMS.target);
    // All have gone 199 ms after the beginning. What is less than the target is no pause.
    assert_eq!(wait(&queue, Critical, NOW + 204 * MILLI, &TERMS).1, TERMS.target);
    assert_eq!(wait(&queue, Critical, NOW + 215 * MILLI, &TERMS).1, TERMS.interval);
}

#[test]
fn nobody_waits_beyond_its_deadline() {
    let queue = full(&TERMS);
    let asker = Asker { priority: Critical, now: NOW, deadline: Some(NOW + 3 * MILLI), can_wait: true };
    assert_eq!(queue.ask(&asker, &TERMS), Place::Waits { ticket: 1, end: NOW + 3 * MILLI });
    assert_eq!(queue.ask(&Asker { deadline: Some(NOW), ..asker }, &TERMS), Place::Refused);
    assert_eq!(queue.ask(&Asker { can_wait: false, ..asker }, &TERMS), Place::Refused);
}

#[test]
fn whose_time_is_over_is_not_called_though_its_driver_has_not_come() {
    let queue = full(&TERMS);
    let (late, _) = wait(&queue, Critical, NOW, &TERMS);
    let (timely, _) = wait(&queue, Critical, NOW + 60 * MILLI, &TERMS);
    assert_eq!(give_back(&queue, NOW + 100 * MILLI, &TERMS), [timely]);
    assert_eq!((queue.withdraw(late, None), queue.withdraw(timely, None)), (Turn::InVain, Turn::Taken(2)));
    assert_eq!((queue.count(), queue.waiting()), (2, 0));
}

#[test]
fn who_was_called_in_time_has_its_place_however_late_it_comes() {
    let queue = full(&TERMS);
    let (ticket, _) = wait(&queue, Critical, NOW, &TERMS);
    assert_eq!(give_back(&queue, NOW + 99 * MILLI, &TERMS), [ticket]);
    assert_eq!(give_back(&queue, NOW + 500 * MILLI, &TERMS), [0u64; 0]);
    assert_eq!((queue.withdraw(ticket, None), queue.count()), (Turn::Taken(2), 1));
    assert_eq!(queue.withdraw(ticket, None), Turn::InVain);
}

#[test]
fn the_highest_priority_goes_first() {
    let queue = full(&TERMS);
    let [low, middle, high] = [Sheddable, Critical, CriticalPlus].map(|one| wait(&queue, one, NOW, &TERMS).0);
    let called: Vec<u64> = (0..3).flat_map(|_| give_back(&queue, NOW, &TERMS)).collect();
    assert_eq!(called, [high, middle, low]);
}

#[test]
fn a_newcomer_overtakes_who_matters_less_and_nobody_else() {
    // Five places, of which two are for what may be shed.
    let queue = Queue::default();
    for _ in 0..2 {
        queue.enter(5);
    }
    wait(&queue, Sheddable, NOW, &SHARED);
    assert_eq!(queue.enter(5), None);
    assert_eq!(ask(&queue, Critical, NOW, &SHARED), Place::Taken(3));
    assert_eq!(ask(&queue, Critical, NOW, &SHARED), Place::Taken(4));
    wait(&queue, Critical, NOW, &SHARED);
    assert_eq!(ask(&queue, CriticalPlus, NOW, &SHARED), Place::Taken(5));
    wait(&queue, Critical, NOW, &SHARED);
    assert_eq!((queue.count(), queue.waiting()), (5, 3));
}

#[test]
fn each_priority_goes_only_while_its_share_is_not_taken() {
    let queue = full(&SHARED);
    let (low, _) = wait(&queue, Sheddable, NOW, &SHARED);
    let (high, _) = wait(&queue, Critical, NOW, &SHARED);
    let called: Vec<Vec<u64>> = (0..5).map(|_| give_back(&queue, NOW, &SHARED)).collect();
    // 4, then 3 (critical goes: 4 again), 3, 2, and then 1 (sheddable goes: 2 again).
    assert_eq!(called, [vec![], vec![high], vec![], vec![], vec![low]]);
    assert_eq!(queue.count(), 2);
}

#[test]
fn without_any_room_nobody_waits_for_it() {
    let queue = Queue::default();
    let none = Terms { rooms: [0, 2, 2, 2], ..TERMS };
    assert_eq!(ask(&queue, Sheddable, NOW, &none), Place::Refused);
    assert_eq!(ask(&queue, Critical, NOW, &none), Place::Taken(1));
}

#[test]
fn a_full_queue_has_no_room_for_who_would_go_last() {
    let queue = full(&TERMS);
    for _ in 0..4 {
        wait(&queue, Critical, NOW, &TERMS);
    }
    assert_eq!(ask(&queue, Critical, NOW, &TERMS), Place::Refused);
    assert_eq!(ask(&queue, Sheddable, NOW, &TERMS), Place::Refused);
    assert_eq!((queue.waiting(), queue.called()), (4, vec![]));
}

#[test]
fn what_matters_more_crowds_out_who_would_go_last() {
    let queue = full(&TERMS);
    let (first, _) = wait(&queue, Sheddable, NOW, &TERMS);
    let (second, _) = wait(&queue, Sheddable, NOW, &TERMS);
    for _ in 0..2 {
        wait(&queue, Critical, NOW, &TERMS);
    }
    wait(&queue, Critical, NOW, &TERMS);
    assert_eq!(queue.called(), [second]);
    wait(&queue, Critical, NOW, &TERMS);
    assert_eq!(queue.called(), [first]);
    assert_eq!(
        (queue.withdraw(first, None), queue.withdraw(second, None), queue.waiting()),
        (Turn::InVain, Turn::InVain, 4)
    );
}

#[test]
fn a_standing_queue_makes_room_for_what_is_newer() {
    let terms = Terms { longest: 2, ..TERMS };
    let queue = full(&terms);
    let (first, _) = wait(&queue, Critical, NOW + 50 * MILLI, &terms);
    let (old, _) = wait(&queue, Critical, NOW + 60 * MILLI, &terms);
    assert_eq!(give_back(&queue, NOW + 70 * MILLI, &terms), [first]);
    let (other, _) = wait(&queue, Critical, NOW + 70 * MILLI, &terms);
    // It has been standing since 50 ms, and still does when one goes for another.
    let (newest, patience) = wait(&queue, Critical, NOW + 150 * MILLI, &terms);
    assert_eq!((queue.called(), patience), (vec![old], terms.target));
    let (last, patience) = wait(&queue, Critical, NOW + 151 * MILLI, &terms);
    assert_eq!((queue.called(), patience), (vec![other], terms.target));
    assert_eq!(give_back(&queue, NOW + 152 * MILLI, &terms), [last]);
    assert_eq!(give_back(&queue, NOW + 152 * MILLI, &terms), [newest]);
}

#[test]
fn a_backlog_of_what_matters_less_shortens_nobody_elses_patience() {
    let queue = full(&SHARED);
    for step in 0..30 {
        wait(&queue, Sheddable, NOW + step * 10 * MILLI, &Terms { longest: 100, ..SHARED });
    }
    let now = NOW + 300 * MILLI;
    assert_eq!(wait(&queue, Critical, now, &SHARED).1, SHARED.interval);
    assert_eq!(wait(&queue, Sheddable, now, &Terms { longest: 100, ..SHARED }).1, SHARED.target);
    // What matters more stands before what matters less, too.
    let queue = full(&SHARED);
    for step in 0..3 {
        wait(&queue, CriticalPlus, NOW + step * 50 * MILLI, &SHARED);
    }
    assert_eq!(wait(&queue, Critical, NOW + 110 * MILLI, &SHARED).1, SHARED.target);
}

#[test]
fn who_goes_away_leaves_its_place_in_the_queue_to_others() {
    let queue = full(&TERMS);
    let (first, _) = wait(&queue, Critical, NOW, &TERMS);
    let (second, _) = wait(&queue, Critical, NOW, &TERMS);
    assert_eq!((queue.withdraw(first, None), queue.waiting()), (Turn::InVain, 1));
    assert_eq!(give_back(&queue, NOW, &TERMS), [second]);
}

#[test]
fn more_places_are_taken_as_soon_as_the_terms_say_so() {
    let queue = full(&TERMS);
    let tickets: Vec<u64> = (0..3).map(|_| wait(&queue, Critical, NOW, &TERMS).0).collect();
    queue.revise(&Terms { rooms: [4; 4], ..TERMS });
    assert_eq!((queue.called(), queue.count(), queue.waiting()), (tickets[..2].to_vec(), 4, 1));
    // Fewer places: nobody is called until enough have been given back.
    let called: Vec<usize> = (0..3).map(|_| give_back(&queue, NOW, &TERMS).len()).collect();
    assert_eq!(called, [0, 0, 1]);
}

#[test]
fn a_call_that_nobody_was_told_of_is_told_later() {
    let queue = full(&TERMS);
    let (ticket, _) = wait(&queue, Critical, NOW, &TERMS);
    queue.give_back(None, || TERMS);
    assert_eq!((queue.is_waiting(ticket), queue.waiting()), (false, 0));
    // Nobody waits, and still a newcomer looks.
    assert_eq!(queue.enter(3), None);
    assert_eq!(ask(&queue, Critical, NOW, &Terms { rooms: [3; 4], ..TERMS }), Place::Taken(3));
    assert_eq!((queue.called(), queue.called()), (vec![ticket], vec![]));
    assert_eq!(queue.enter(4), Some(4));
}

#[test]
fn nothing_is_left_of_it_after_a_fork() {
    let queue = full(&TERMS);
    let (called, _) = wait(&queue, Critical, NOW, &TERMS);
    let (waiting, _) = wait(&queue, Critical, NOW, &TERMS);
    queue.give_back(Some(NOW), || TERMS);
    queue.clear();
    assert_eq!((queue.count(), queue.waiting(), queue.called()), (0, 0, vec![]));
    assert_eq!((queue.withdraw(called, None), queue.withdraw(waiting, None)), (Turn::InVain, Turn::InVain));
    for _ in 0..2 {
        queue.enter(2);
    }
    assert!(wait(&queue, Critical, NOW, &TERMS).0 > waiting);
}

/// The queue as one would write it down: a list, gone through from one end to the other.
#[derive(Default)]
struct Plain {
    taken: u32,
    waiting: Vec<(u64, Priority, Duration)>,
    /// Since when somebody waits, and since when nobody does.
    busy: [Option<(Duration, Option<Duration>)>; 4],
    last: u64,
    told: Vec<u64>,
}

impl Plain {
    fn stands(&self, priority: Priority, now: Duration, terms: &Terms) -> bool {
        self.busy[priority as usize].is_some_and(|(since, empty)| {
            now >= since + terms.interval && empty.is_none_or(|empty| now - empty <= terms.target)
        })
    }

    /// In the order in which they go.
    fn order(&self, now: Duration, terms: &Terms) -> Vec<(u64, Priority)> {
        let mut order: Vec<(u64, Priority)> = self.waiting.iter().map(|one| (one.0, one.1)).collect();
        order.sort_by_key(|(ticket, priority)| {
            let age = if self.stands(*priority, now, terms) { u64::MAX - ticket } else { *ticket };
            (std::cmp::Reverse(*priority), age)
        });
        order
    }

    fn note(&mut self, now: Duration, terms: &Terms) {
        for priority in Priority::ALL {
            let is_empty = self.waiting.iter().all(|one| one.1 < priority);
            let busy = &mut self.busy[priority as usize];
            *busy = match *busy {
                None => (!is_empty).then_some((now, None)),
                Some((since, empty)) if is_empty => Some((since, empty.or(Some(now)))),
                Some((_, Some(empty))) if now - empty > terms.target => Some((now, None)),
                Some((since, _)) => Some((since, None)),
            };
        }
    }

    fn advance(&mut self, now: Duration, terms: &Terms) {
        let mut ended: Vec<Duration> = self.waiting.iter().map(|one| one.2).filter(|end| *end <= now).collect();
        ended.sort_unstable();
        for end in ended {
            self.waiting.retain(|one| one.2 > end);
            self.note(end, terms);
        }
        for (ticket, priority) in self.order(now, terms) {
            if self.taken >= terms.rooms[priority as usize] {
                break;
            }
            self.taken += 1;
            self.waiting.retain(|one| one.0 != ticket);
            self.told.push(ticket);
        }
        self.note(now, terms);
    }

    fn ask(&mut self, priority: Priority, now: Duration, terms: &Terms) -> Place {
        self.advance(now, terms);
        let room = terms.rooms[priority as usize];
        if self.waiting.iter().all(|one| one.1 < priority) && self.taken < room {
            self.taken += 1;
            return Place::Taken(self.taken);
        }
        let end = now + if self.stands(priority, now, terms) { terms.target } else { terms.interval };
        self.last += 1;
        self.waiting.push((self.last, priority, end));
        if room == 0 || self.waiting.len() > terms.longest as usize {
            // Of those who wait and the newcomer the last one goes.
            let mut order = self.order(now, terms);
            if room == 0 {
                order = vec![(self.last, priority)];
            }
            let (out, _) = *order.last().unwrap();
            self.waiting.retain(|one| one.0 != out);
            if out == self.last {
                self.last -= 1;
                return Place::Refused;
            }
            self.told.push(out);
        }
        self.note(now, terms);
        Place::Waits { ticket: self.last, end }
    }
}

#[test]
fn it_does_what_a_plain_list_does() {
    let (mut waited, mut crowded) = (0, 0);
    for seed in 0..3000 {
        let random = Random::new(seed);
        let least = random.below(3) as u32;
        let mut rooms = [0; 4].map(|_| least + random.below(4) as u32);
        rooms.sort_unstable();
        let terms = Terms { rooms, longest: random.below(5) as u32, ..TERMS };
        let (queue, mut plain, mut now) = (Queue::default(), Plain::default(), NOW);
        let (mut holders, mut tickets) = (0, Vec::new());
        for step in 0..200 {
            now += random.below([1, 4, 40][random.below(3)]) as u32 * MILLI;
            match random.below(5) {
                0 | 1 => {
                    let priority = Priority::ALL[random.below(4)];
                    let expected = plain.ask(priority, now, &terms);
                    let place = match queue.enter(terms.rooms[priority as usize]) {
                        Some(count) => Place::Taken(count),
                        None => ask(&queue, priority, now, &terms),
                    };
                    assert_eq!(place, expected, "seed {seed} step {step}");
                    match place {
                        Place::Taken(_) => holders += 1,
                        Place::Waits { ticket, .. } => tickets.push(ticket),
                        Place::Refused => {}
                    }
                }
                2 | 3 if holders > 0 => {
                    holders -= 1;
                    plain.taken -= 1;
                    // Where nobody waits, the list is not looked at either.
                    plain.advance(now, &terms);
                    queue.give_back(Some(now), || terms);
                }
                _ if !tickets.is_empty() => {
                    let ticket = tickets.swap_remove(random.below(tickets.len()));
                    let was_waiting = plain.waiting.iter().any(|one| one.0 == ticket);
                    plain.waiting.retain(|one| one.0 != ticket);
                    plain.note(now, &terms);
                    match queue.withdraw(ticket, Some(now)) {
                        Turn::Taken(_) => {
                            assert!(!was_waiting, "seed {seed} step {step}");
                            holders += 1;
                        }
                        Turn::InVain => crowded += usize::from(!was_waiting),
                    }
                    waited += 1;
                }
                _ => {}
            }
            assert_eq!(queue.called(), std::mem::take(&mut plain.told), "seed {seed} step {step}");
            assert_eq!(queue.count(), plain.taken, "seed {seed} step {step}");
            assert_eq!(queue.waiting() as usize, plain.waiting.len(), "seed {seed} step {step}");
        }
        for ticket in tickets {
            holders += u32::from(queue.withdraw(ticket, Some(now)) != Turn::InVain);
        }
        assert_eq!(queue.count(), holders, "seed {seed}");
    }
    assert!(waited > 10_000 && crowded > 1000, "{waited} {crowded}");
}

/// Threads that come and go; whoever waits gives up now and then, if it may. How many were in at once at most is bounded by the terms.
fn crowd(terms: Terms, is_patient: bool) -> (Queue, u32) {
    let (queue, inside, served) = (Queue::default(), AtomicU32::new(0), AtomicU32::new(0));
    std::thread::scope(|scope| {
        for seed in 0..6 {
            let (queue, inside, served) = (&queue, &inside, &served);
            scope.spawn(move || {
                let random = Random::new(seed);
                for _ in 0..3000 {
                    let priority = Priority::ALL[random.below(4)];
                    let place = match queue.enter(priority.of(&terms.rooms)) {
                        Some(count) => Place::Taken(count),
                        None => ask(queue, priority, NOW, &terms),
                    };
                    let is_in = match place {
                        Place::Taken(_) => true,
                        Place::Refused => false,
                        Place::Waits { ticket, .. } => {
                            let mut looks = 0u64;
                            while queue.is_waiting(ticket) && (is_patient || random.below(8) > 0) {
                                looks += 1;
                                assert!(looks < 50_000_000, "nobody called it");
                                std::thread::yield_now();
                            }
                            queue.withdraw(ticket, None) != Turn::InVain
                        }
                    };
                    if is_in {
                        assert!(inside.fetch_add(1, Ordering::SeqCst) < terms.rooms[3]);
                        served.fetch_add(1, Ordering::Relaxed);
                        inside.fetch_sub(1, Ordering::SeqCst);
                        queue.give_back((random.below(2) == 0).then_some(NOW), || terms);
                    }
                    drop(queue.called());
                }
            });
        }
    });
    let served = served.load(Ordering::Relaxed);
    (queue, served)
}

#[test]
fn places_are_conserved_whatever_the_threads_do() {
    let (queue, served) = crowd(Terms { rooms: [1, 1, 2, 3], longest: 2, ..TERMS }, false);
    assert_eq!((queue.count(), queue.waiting(), queue.called()), (0, 0, vec![]));
    assert!(queue.line.lock().taken.is_empty() && served > 1000, "{served}");
}

#[test]
fn nobody_is_left_behind_who_came_while_a_place_was_given_back() {
    // As many may wait as there are threads, no time passes, and nobody gives up: all are served.
    let (queue, served) = crowd(Terms { rooms: [1, 1, 2, 2], longest: 6, ..TERMS }, true);
    assert_eq!((queue.count(), queue.waiting(), served), (0, 0, 6 * 3000));
}

#[test]
fn nobody_begins_to_wait_where_a_place_has_just_been_given_back() {
    // Between the look for a place and the beginning of the wait another thread gave one back, and saw nobody.
    let queue = full(&TERMS);
    assert!(queue.count_in(2));
    let queue = full(&TERMS);
    queue.give_back(Some(NOW), || TERMS);
    assert!(!queue.count_in(2));
    assert_eq!((queue.count(), queue.waiting()), (1, 0));
}
