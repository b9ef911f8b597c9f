//! Where there is no place, what does a call wait for, and what becomes of it?
//!
//! The admit phase of an entry. It asks in this order: is there time left; is it a probe; is there a place, or one to wait for; is its
//! caller within the rates. Rates are looked at before a call waits, so that the queue is not filled by those who will be refused
//! anyway, and counted when it has its place, so that what finds none uses up nothing. The driver parks an entry with a ticket until
//! that is called or its patience is over, and then asks `resume`, once. A place that is given back without an answer to give the
//! tickets in (by an entry that was dropped) calls them into `Gate::called`.
//!
//! It does not know how an entry is parked: an event loop and a thread do that in different ways.
use std::sync::atomic::Ordering;
use std::time::Duration;

use super::entry::Phase;
use super::headers;
use super::plan::Snapshot;
use super::rates::{Caller, Limit};
use super::{Entry, Refusal};
use crate::admit::priority::Priority;
use crate::admit::queue::{Asker, Place, Turn};

impl Entry {
    pub(super) fn admit(
        &mut self,
        deadline: Option<Duration>,
        told: Option<Priority>,
        can_wait: bool,
    ) -> Option<Refusal> {
        let Some(snapshot) = &self.snapshot else { return Some(Refusal::NotReady) };
        self.deadline = deadline.map(|end| end.min(self.begun.saturating_add(headers::LONGEST)));
        if self.deadline.is_some_and(|end| end <= self.begun) {
            return Some(Refusal::Deadline);
        }
        let admission = &snapshot.admission;
        if admission.concerns(self.path()) {
            if let Some(question) = self.question() {
                // Anybody may ask at the public listener, and must not come past the limits by asking for this.
                let is_probe = !self.is_public() && admission.is_probe(&question);
                let priority = admission.priority(&question, told);
                (self.is_probe, self.priority) = (is_probe, priority);
            }
            if self.is_probe {
                return None;
            }
        }
        match self.state.queue.enter(admission.room(self.priority, &self.state.adaptive)) {
            Some(crowd) => *self.crowd.get_mut() = crowd,
            None => match self.line_up(can_wait) {
                Ok(true) => {}
                Ok(false) => return None,
                Err(refusal) => return Some(refusal),
            },
        }
        // Last: a call that finds no place must not use up its caller's rate.
        let wait = self.too_early(self.begun)?;
        self.state.give_back(Some(self.begun));
        Some(Refusal::Rate(wait))
    }

    /// True: it has a place after all. False: it waits.
    #[cold]
    fn line_up(&mut self, can_wait: bool) -> Result<bool, Refusal> {
        let Some(snapshot) = self.snapshot.clone() else { return Err(Refusal::NotReady) };
        if let Some(wait) = self.is_outrun(&snapshot.rates) {
            return Err(Refusal::Rate(wait));
        }
        let asker = Asker { priority: self.priority, now: self.begun, deadline: self.deadline, can_wait };
        match self.state.queue.ask(&asker, &self.state.terms()) {
            Place::Taken(crowd) => {
                *self.crowd.get_mut() = crowd;
                Ok(true)
            }
            Place::Waits { ticket, end } => {
                (self.ticket, self.patience) = (ticket, end.saturating_sub(self.begun));
                Ok(false)
            }
            Place::Refused => {
                let limit = snapshot.admission.limit(&self.state.adaptive);
                Err(if self.state.queue.count() < limit { Refusal::Shed } else { Refusal::Limit(limit) })
            }
        }
    }

    /// 0: it does not wait. Otherwise it is neither in nor refused until its ticket is called or `patience` is over, and `resume`
    /// was asked. A ticket may be called before it is parked: ask `is_called` when it is.
    pub fn ticket(&self) -> u64 {
        if self.phase() == Phase::Waits {
            self.ticket
        } else {
            0
        }
    }

    /// Its ticket was called, or nobody will ever call it: it is time to ask `resume`.
    pub fn is_called(&self) -> bool {
        self.phase() != Phase::Waits || !self.is_ours() || !self.state.queue.is_waiting(self.ticket)
    }

    /// For how long from its arrival it may wait: never longer than its deadline.
    pub fn patience(&self) -> Duration {
        self.patience
    }

    /// How long it did wait.
    pub fn waited(&self) -> Duration {
        Duration::from_nanos(self.waited.load(Ordering::Relaxed))
    }

    pub fn priority(&self) -> &'static str {
        self.priority.word()
    }

    /// It needed no place.
    pub fn is_probe(&self) -> bool {
        self.is_probe
    }

    /// The wait is over, one way or the other. True: it is in. False: it is refused, or has ended.
    pub fn resume(&self, now: Duration) -> bool {
        match self.phase() {
            Phase::Waits => {}
            phase => return phase == Phase::In,
        }
        let waited = now.saturating_sub(self.begun);
        self.waited.store(u64::try_from(waited.as_nanos()).unwrap_or(u64::MAX), Ordering::Relaxed);
        let turn = if self.is_ours() { self.state.queue.withdraw(self.ticket, Some(now)) } else { Turn::InVain };
        // A timer may be early by a little.
        let until = now.max(self.begun.saturating_add(self.patience));
        let refusal = match (turn, self.deadline) {
            (Turn::Taken(_), Some(end)) if end <= now => Some(Refusal::Deadline),
            (Turn::Taken(_), _) => self.too_early(now).map(Refusal::Rate),
            (Turn::InVain, Some(end)) if end <= until => Some(Refusal::Deadline),
            (Turn::InVain, _) => Some(Refusal::Shed),
        };
        let next = if refusal.is_none() { Phase::In } else { Phase::Over };
        if let Turn::Taken(crowd) = turn {
            self.crowd.store(crowd, Ordering::Relaxed);
        }
        // It may have been given up in between, by another thread, which then found no place to give back.
        let is_first =
            self.phase.compare_exchange(Phase::Waits as u8, next as u8, Ordering::AcqRel, Ordering::Acquire).is_ok();
        if let (true, Some(series)) = (is_first, &self.series) {
            match refusal {
                None => series.begin(self.would_deny()),
                Some(refusal) => series.refuse(self.code(refusal)),
            }
        }
        let is_in = is_first && refusal.is_none();
        if let (true, Some(refusal)) = (is_first, refusal) {
            let _ = self.late.set(refusal);
        }
        if !is_in && matches!(turn, Turn::Taken(_)) {
            self.state.give_back(Some(now));
        }
        is_in
    }

    /// There are rates that a store counts for all instances: it has to be asked, or `stand_in`.
    pub fn wants_rates(&self) -> bool {
        !self.is_probe
            && self.refusal().is_none()
            && self.snapshot.as_ref().is_some_and(|snapshot| !snapshot.global_rates.is_empty())
    }

    /// The store is away: its rates are counted here. Some: the call is refused, and over.
    pub fn stand_in(&self, now: Duration) -> Option<Vec<u64>> {
        let snapshot = self.snapshot.as_ref().filter(|_| !self.is_probe && !self.is_over())?;
        let wait =
            self.counted(&snapshot.global_rates, |limits, caller| self.state.counts.take(limits, caller, now))?;
        Some(self.outrun(wait))
    }

    /// Whatever it held is given back.
    pub(super) fn go_out(&self, phase: Phase, code: u16, now: Option<Duration>) {
        if self.is_probe || !self.is_ours() {
            return;
        }
        if phase == Phase::Waits && self.state.queue.withdraw(self.ticket, now) == Turn::InVain {
            return;
        }
        if let (Phase::In, Some(now), Some(snapshot)) = (phase, now, &self.snapshot) {
            if snapshot.admission.adaptive.is_some() {
                self.teach(snapshot, code, now);
            }
        }
        self.state.give_back(now);
    }

    /// What its time in here says of how many we can take. It counts from when it had its place: the queue is no work.
    #[cold]
    fn teach(&self, snapshot: &Snapshot, code: u16, now: Duration) {
        let Some(plan) = &snapshot.admission.adaptive else { return };
        let took = now.saturating_sub(self.begun).saturating_sub(self.waited());
        let is_dropped = self.code(Refusal::Deadline) == code || self.deadline.is_some_and(|end| end <= now);
        // What fails fails fast, what switches protocols stays, and neither is the time of a call.
        let is_honest = if self.is_grpc { !matches!(code, 1 | 2 | 8 | 13..=15) } else { (200..500).contains(&code) };
        if is_dropped || is_honest {
            self.state.adaptive.note(took, self.crowd.load(Ordering::Relaxed), is_dropped, plan);
        }
    }

    /// It is of this process, and not of the one that forked it.
    fn is_ours(&self) -> bool {
        self.generation == self.state.generation.load(Ordering::Relaxed)
    }

    fn too_early(&self, now: Duration) -> Option<Duration> {
        let limits = &self.snapshot.as_ref()?.rates;
        self.counted(limits, |limits, caller| self.state.counts.take(limits, caller, now))
    }

    fn is_outrun(&self, limits: &[Limit]) -> Option<Duration> {
        self.counted(limits, |limits, caller| self.state.counts.peek(limits, caller, self.begun))
    }

    fn counted(
        &self,
        limits: &[Limit],
        count: impl FnOnce(&[Limit], &Caller<'_>) -> Option<Duration>,
    ) -> Option<Duration> {
        if limits.is_empty() {
            return None;
        }
        let facts = self.facts.as_deref();
        let header = |name: &str| {
            let fields = facts.map_or(&[][..], |facts| &facts.headers);
            let mut values = fields.iter().filter(|(known, _)| **known == *name).map(|(_, value)| &value[..]);
            // Of two nobody knows which one counts: they are one caller with all who send two, or none.
            values.next().filter(|_| values.next().is_none()).unwrap_or_default()
        };
        let caller = Caller {
            route: self.route(),
            peer: self.peer.as_deref().unwrap_or(""),
            client: facts.and_then(|facts| facts.remote),
            header: &header,
        };
        count(limits, &caller)
    }
}
