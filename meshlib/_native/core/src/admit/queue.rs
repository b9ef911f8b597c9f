//! Who goes next, where there are fewer places than calls?
//!
//! A limit with a queue in front of it. A queue is there for bursts: it is good if it is empty again soon, and if it is not, then
//! waiting in it helps nobody, since each one waits for as long as all before it, and is served when its caller has gone. So what
//! counts is not how long the queue is, but for how long it has not been empty (Nichols and Jacobson's CoDel, RFC 8289):
//!
//! ```text
//!                        how long one may wait   who goes next
//! it was empty lately    `interval` (100 ms)     the first that came
//! it stands: not empty   `target` (5 ms)         the last that came
//!   for `interval`
//! ```
//!
//! These are controlled delay and adaptive LIFO as Facebook described them ("Fail at Scale", ACM Queue 2015; folly's Codel), which
//! showed that two numbers fit all services: the last that came is the one whose caller is the surest to be still there. A queue that
//! was empty for less than the target was not empty: under an overload a short one is so by chance, and each time it would take what
//! comes for a burst again. The bound in length beside it is one of memory: of those who wait and a newcomer, the one that would go
//! last finds no place when the queue is full. So it is crowded out by what matters more, and while the queue stands by what is newer.
//!
//! Higher priorities go first, and a lower one never overtakes a higher one that waits. So each priority has a queue of its own, those
//! who matter as much or more: a backlog of what matters less makes nobody else's queue a standing one. Each has a share of the places
//! (SRE book, "Handling Overload"), so that a burst of what matters less is turned away before it takes the last one.
//!
//! A place that is given back is handed to one who waits there and then, and its ticket is called: nobody can come in between.
//! Without anybody waiting, a place is a number that is taken by a compare-and-swap, and no lock is touched; how many wait stands in
//! the upper half of the same word, so that both are looked at together and no one is left behind who came while a place was given
//! back. It wakes nobody and reads no clock: drivers do.
use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use ahash::AHashMap;
use parking_lot::Mutex;

use super::priority::Priority;

/// What holds at the moment, by the plan and by what was learnt.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Terms {
    /// How many places may be taken for a call of each priority to get one, the least first. A higher one has no less.
    pub rooms: [u32; 4],
    /// How many may wait.
    pub longest: u32,
    pub target: Duration,
    pub interval: Duration,
}

/// One who asks for a place.
#[derive(Debug, Clone, Copy)]
pub struct Asker {
    pub priority: Priority,
    pub now: Duration,
    pub deadline: Option<Duration>,
    pub can_wait: bool,
}

/// The answer to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// It has a place, which it must give back; so many are taken, with it.
    Taken(u32),
    /// It waits until its ticket is called, and no longer than this, and must `withdraw` then.
    Waits {
        ticket: u64,
        end: Duration,
    },
    Refused,
}

/// What became of one who waited.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Turn {
    /// Its ticket was called: it has a place, which it must give back; so many were taken, with it.
    Taken(u32),
    /// It found no place: it waited for too long, others crowded it out, or it gave up.
    InVain,
}

/// The places and those who wait for one. State of the Service that we are.
#[derive(Debug, Default)]
pub struct Queue {
    /// How many places are taken; above it how many wait; on top whether there are tickets that nobody has been told of.
    word: AtomicU64,
    line: Mutex<Line>,
}

const UNTOLD: u64 = 1 << 63;
/// Those who wait are counted from here.
const WAITING: u32 = 32;

/// Those who wait. Tickets are numbered as they come.
#[derive(Debug, Default)]
struct Line {
    /// By priority, the least first: until when each one waits.
    lanes: [BTreeMap<u64, Duration>; 4],
    /// The same in the order in which they end.
    ends: BTreeSet<(Duration, u64, Priority)>,
    /// The queue of each priority: those of it and of the higher ones.
    busy: [Option<Busy>; 4],
    /// The newest time that we were told.
    now: Duration,
    last: u64,
    /// Tickets that were called and have not come yet; their places are taken.
    taken: AHashMap<u64, u32>,
    /// Tickets that nobody has been told of.
    untold: Vec<u64>,
}

/// Since when somebody has been waiting, and since when nobody is.
#[derive(Debug, Clone, Copy)]
struct Busy {
    since: Duration,
    empty: Option<Duration>,
}

impl Busy {
    /// An overload leaves a short queue empty now and then by chance. Less than the target is no pause.
    fn goes_on(&self, now: Duration, terms: &Terms) -> bool {
        self.empty.is_none_or(|empty| now <= empty.saturating_add(terms.target))
    }
}

impl Queue {
    /// A place at once, where there is room and nobody waits; how many are taken then.
    pub fn enter(&self, room: u32) -> Option<u32> {
        let next = |word: u64| (word < u64::from(room)).then_some(word + 1);
        self.word.fetch_update(Ordering::AcqRel, Ordering::Acquire, next).ok().map(|before| taken(before) + 1)
    }

    /// A place, or to wait for one.
    pub fn ask(&self, asker: &Asker, terms: &Terms) -> Place {
        let mut line = self.line.lock();
        line.see(asker.now);
        self.advance(&mut line, terms);
        let place = self.place(&mut line, asker, terms);
        self.tell(&line);
        place
    }

    fn place(&self, line: &mut Line, asker: &Asker, terms: &Terms) -> Place {
        let Asker { priority, now, deadline, can_wait } = *asker;
        let room = priority.of(&terms.rooms);
        // Whoever matters as much or more and waits was called before, if there was room.
        loop {
            if let Some(count) = self.take(room) {
                return Place::Taken(count);
            }
            let patience = if line.stands(priority, terms) { terms.target } else { terms.interval };
            let end = now.saturating_add(patience).min(deadline.unwrap_or(Duration::MAX));
            if !can_wait || room == 0 || end <= now || !line.make_room(priority, terms) {
                return Place::Refused;
            }
            if self.count_in(room) {
                return Place::Waits { ticket: line.join(asker, end, terms), end };
            }
        }
    }

    /// One who waited comes, or goes away. It is asked once for each ticket.
    pub fn withdraw(&self, ticket: u64, now: Option<Duration>) -> Turn {
        let mut line = self.line.lock();
        line.see(now.unwrap_or_default());
        if let Some(count) = line.taken.remove(&ticket) {
            return Turn::Taken(count);
        }
        let now = line.now;
        line.remove(ticket, now);
        self.tell(&line);
        Turn::InVain
    }

    /// Does this ticket still wait? If not, it was called, crowded out, or withdrawn.
    pub fn is_waiting(&self, ticket: u64) -> bool {
        self.line.lock().lanes.iter().any(|lane| lane.contains_key(&ticket))
    }

    /// A place is free again. Where somebody waits for it, it is handed on, by the terms of now.
    pub fn give_back(&self, now: Option<Duration>, terms: impl FnOnce() -> Terms) {
        let next = |word: u64| (word >> WAITING == 0).then(|| word.saturating_sub(1));
        if self.word.fetch_update(Ordering::AcqRel, Ordering::Acquire, next).is_err() {
            self.hand_on(now, &terms());
        }
    }

    #[cold]
    fn hand_on(&self, now: Option<Duration>, terms: &Terms) {
        let mut line = self.line.lock();
        let next = |word: u64| (taken(word) > 0).then(|| word - 1);
        let _ = self.word.fetch_update(Ordering::AcqRel, Ordering::Acquire, next);
        line.see(now.unwrap_or_default());
        self.advance(&mut line, terms);
        self.tell(&line);
    }

    /// The terms have changed.
    pub fn revise(&self, terms: &Terms) {
        let mut line = self.line.lock();
        self.advance(&mut line, terms);
        self.tell(&line);
    }

    /// The tickets that were called or crowded out since the last time. Where there are none, nothing is locked.
    pub fn called(&self) -> Vec<u64> {
        if self.word.load(Ordering::Acquire) & UNTOLD == 0 {
            return Vec::new();
        }
        let mut line = self.line.lock();
        let called = std::mem::take(&mut line.untold);
        self.tell(&line);
        called
    }

    /// How many places are taken.
    pub fn count(&self) -> u32 {
        taken(self.word.load(Ordering::Relaxed))
    }

    pub fn waiting(&self) -> u32 {
        ((self.word.load(Ordering::Relaxed) & !UNTOLD) >> WAITING) as u32
    }

    /// In a forked child nothing of the parent's is under way, and nobody waits. Its tickets are no tickets of ours.
    pub fn clear(&self) {
        let mut line = self.line.lock();
        *line = Line { last: line.last, now: line.now, ..Line::default() };
        self.word.store(0, Ordering::Release);
    }

    /// Calls everybody for whom there is room.
    fn advance(&self, line: &mut Line, terms: &Terms) {
        line.expire();
        for priority in Priority::ALL.into_iter().rev() {
            let stands = line.stands(priority, terms);
            while let Some(ticket) = line.first(priority, stands) {
                // Whoever matters less waits behind.
                let Some(count) = self.take(priority.of(&terms.rooms)) else { return };
                let now = line.now;
                line.remove(ticket, now);
                line.taken.insert(ticket, count);
                line.untold.push(ticket);
            }
        }
    }

    fn take(&self, room: u32) -> Option<u32> {
        let next = |word: u64| (taken(word) < room).then_some(word + 1);
        self.word.fetch_update(Ordering::AcqRel, Ordering::Acquire, next).ok().map(|before| taken(before) + 1)
    }

    /// One more waits. False: a place was given back meanwhile, by one who saw nobody waiting.
    fn count_in(&self, room: u32) -> bool {
        let next = |word: u64| (taken(word) >= room).then_some(word + (1 << WAITING));
        self.word.fetch_update(Ordering::AcqRel, Ordering::Acquire, next).is_ok()
    }

    /// Puts into the word what the line says.
    fn tell(&self, line: &Line) {
        let untold = if line.untold.is_empty() { 0 } else { UNTOLD };
        let upper = (line.ends.len() as u64) << WAITING | untold;
        let next = |word: u64| Some(u64::from(taken(word)) | upper);
        let _ = self.word.fetch_update(Ordering::AcqRel, Ordering::Acquire, next);
    }
}

fn taken(word: u64) -> u32 {
    word as u32
}

impl Line {
    fn see(&mut self, now: Duration) {
        self.now = self.now.max(now);
    }

    /// Its queue has not been empty for so long that it is no burst.
    fn stands(&self, priority: Priority, terms: &Terms) -> bool {
        let is_old = |busy: &Busy| busy.since.saturating_add(terms.interval) <= self.now;
        priority.of(&self.busy).is_some_and(|busy| is_old(&busy) && busy.goes_on(self.now, terms))
    }

    fn join(&mut self, asker: &Asker, end: Duration, terms: &Terms) -> u64 {
        self.last += 1;
        if let Some(lane) = self.lanes.get_mut(asker.priority as usize) {
            lane.insert(self.last, end);
        }
        self.ends.insert((end, self.last, asker.priority));
        for busy in self.busy.iter_mut().take(asker.priority as usize + 1) {
            let since = busy.filter(|busy| busy.goes_on(asker.now, terms)).map_or(asker.now, |busy| busy.since);
            *busy = Some(Busy { since, empty: None });
        }
        self.last
    }

    fn remove(&mut self, ticket: u64, now: Duration) {
        for (lane, priority) in self.lanes.iter_mut().zip(Priority::ALL) {
            if let Some(end) = lane.remove(&ticket) {
                self.ends.remove(&(end, ticket, priority));
            }
        }
        let mut is_empty = true;
        for (lane, busy) in self.lanes.iter().zip(&mut self.busy).rev() {
            is_empty &= lane.is_empty();
            if let (true, Some(busy)) = (is_empty, busy) {
                busy.empty.get_or_insert(now);
            }
        }
    }

    /// Whose time is over waits no longer, whether or not its driver has noticed.
    fn expire(&mut self) {
        while let Some(&(end, ticket, _)) = self.ends.first() {
            if end > self.now {
                break;
            }
            self.remove(ticket, end);
        }
    }

    /// Who of this priority goes next.
    fn first(&self, priority: Priority, stands: bool) -> Option<u64> {
        let lane = self.lanes.get(priority as usize)?;
        if stands { lane.last_key_value() } else { lane.first_key_value() }.map(|(ticket, _)| *ticket)
    }

    /// Is there room in the queue for one more of this priority? If need be, whoever would go last is crowded out.
    fn make_room(&mut self, priority: Priority, terms: &Terms) -> bool {
        if self.ends.len() < terms.longest as usize {
            return true;
        }
        let last = Priority::ALL.into_iter().take_while(|other| *other <= priority).find_map(|other| {
            // Among equals the newcomer goes last, unless the queue stands: then it would go first.
            let stands = self.stands(other, terms);
            let lane = self.lanes.get(other as usize).filter(|_| other < priority || stands)?;
            if stands { lane.first_key_value() } else { lane.last_key_value() }.map(|(ticket, _)| *ticket)
        });
        let Some(last) = last else { return false };
        self.remove(last, self.now);
        self.untold.push(last);
        true
    }
}

#[cfg(test)]
mod tests;
