//! What may a driver ask of a call while it is under way? Nothing in here changes it.
use std::time::Duration;

use super::{extra, Call};
use crate::client::fleet::session_of;
use crate::model::{seconds, StickyKind, WeightSource};
use crate::route::Route;

impl Call {
    /// What the driver has to do beyond the ordinary: bits of `extra`.
    pub fn extras(&self) -> u8 {
        let plan = &self.service.plan.balance;
        let has = |bit: u8, is_there: bool| if is_there { bit } else { 0 };
        has(extra::HEDGE, self.hedge.is_some())
            | has(extra::SESSION, plan.sticky.kind != StickyKind::None)
            | has(extra::PER_TRY, self.per_try().is_some())
            | has(extra::REPORT, plan.weights == WeightSource::Orca)
    }

    /// How long one attempt may take.
    pub fn per_try(&self) -> Option<Duration> {
        let time = self.plan().map_or(0.0, |route| route.plan.retry.per_try);
        (time > 0.0).then(|| seconds(time))
    }

    /// What the answer has to carry so that the caller comes back to the same endpoint; None: nothing new.
    pub fn new_session(&self) -> Option<(StickyKind, &str, u64)> {
        let sticky = &self.service.plan.balance.sticky;
        let delivered = self.delivered.and_then(|token| self.attempts.get(token as usize));
        let place = delivered.or(self.attempts.last()).map(|attempt| attempt.place)?;
        if sticky.kind == StickyKind::None || self.session == Some(place) {
            return None;
        }
        let endpoint = self.fleet.endpoints.get(place as usize)?;
        Some((sticky.kind, &sticky.name, session_of(self.fleet.address(endpoint))))
    }

    /// The address of an endpoint that `next` named.
    pub fn address(&self, place: u32) -> &str {
        self.fleet.endpoints.get(place as usize).map_or("", |endpoint| self.fleet.address(endpoint))
    }

    /// Whom it must prove to be; empty: plain text.
    pub fn identity(&self, place: u32) -> &str {
        self.fleet.endpoints.get(place as usize).map_or("", |endpoint| self.fleet.identity(endpoint))
    }

    pub fn service(&self) -> &str {
        &self.service.plan.name
    }

    pub fn route(&self) -> &str {
        self.plan().map_or("", Route::name)
    }

    pub fn deadline(&self) -> Duration {
        self.deadline
    }

    /// Seconds for a connection to come about.
    pub fn connect_timeout(&self) -> Duration {
        seconds(self.service.plan.admit.connect)
    }

    /// Seconds without progress that the body of a stream may stay.
    pub fn stream_idle(&self) -> f64 {
        self.plan().map_or(0.0, |route| route.plan.stream_idle)
    }

    pub fn is_idempotent(&self) -> bool {
        self.is_idempotent
    }

    /// It failed with its retries used up: whoever called us need not begin anew.
    pub fn is_spent(&self) -> bool {
        self.is_spent
    }

    /// Attempts sent so far; the number of the next one, which travels.
    pub fn attempts(&self) -> u32 {
        self.layer + self.retries + self.hedges
    }

    /// Another attempt is possible, so that the driver must keep the body.
    pub fn has_attempts_left(&self) -> bool {
        !self.is_done && (self.retries < self.most_retries || self.under_way() > 1)
    }
}
