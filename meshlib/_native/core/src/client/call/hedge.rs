//! Two attempts at a time: when does the second go out, and what becomes of the other when one has won?
//!
//! Waiting for the second answer costs less than waiting for the slow one, if only few calls do it ("The tail at scale", Dean and
//! Barroso): so it is asked for call by call, and draws on the budget of retries. It is none of the call's retries (as in Finagle,
//! whose backup requests have no count either): it answers slowness, while a retry answers failure, and a call whose attempts both
//! failed may still be repeated. Nothing is sent while two are under way; the driver races them, and this file never waits.
use std::sync::atomic::Ordering;
use std::time::Duration;

use super::{Call, Event};
use crate::client::service::Service;
use crate::model::{seconds, BudgetPlan, Class, HedgePlan, RetryPlan};
use crate::retry::unhedged;

/// After how long a call of this route is slow by what its Service has taken so far; None: nobody asked, or too little is known.
pub(super) fn learnt(service: &Service, plan: &RetryPlan, now: Duration) -> Option<Duration> {
    let hedge = plan.hedge?;
    service.state.hedge_share.deposit(&share(&hedge), now);
    service.state.slow_after(hedge.quantile).map(|after| after.max(seconds(hedge.least)))
}

/// Hedges that a Service may send: this share of its calls, over ten seconds; one where there are few calls.
fn share(plan: &HedgePlan) -> BudgetPlan {
    BudgetPlan { ratio: plan.share, per_second: 0.1, window: 10.0 }
}

impl Call {
    /// How long until a second attempt goes out beside the one under way? A body that is streamed (`is_streamed`) goes out once at a
    /// time. Zero: now, and `next` names it. None: there will be none.
    pub fn hedge(&mut self, can_overlap: bool, is_streamed: bool, now: Duration) -> Option<Duration> {
        let after = self.hedge.filter(|_| !self.is_done)?;
        let sent = self.attempts.last().filter(|attempt| attempt.is_under_way());
        let (place, sent) = sent.map_or((None, now), |attempt| (Some(attempt.place), attempt.sent));
        let due = sent + after;
        let why_not = unhedged(self.is_idempotent, self.is_replayable && !is_streamed, self.layer, can_overlap)
            .or((due >= self.deadline || now >= self.deadline).then_some("the deadline comes before it"));
        if why_not.is_none() && (place.is_none() || now < due) {
            return Some(due - now);
        }
        // One a call, whatever comes of it.
        self.hedge = None;
        let chosen = match why_not {
            Some(word) => Err(word),
            None => self.choose_hedge(now),
        };
        let event = Event { at: now, phase: "retry", endpoint: place, ..Event::NONE };
        match chosen {
            Ok(chosen) => {
                let waited = now.saturating_sub(sent).as_secs_f64();
                self.trail.push(Event { what: "hedged", amount: waited, ..event });
                self.chosen = Some(Box::new((chosen.0, false, chosen.1)));
                self.hedges += 1;
                self.service.state.hedges.fetch_add(1, Ordering::Relaxed);
                self.service.state.counters.retry();
                if let Some(slow) = place.and_then(|place| self.fleet.endpoints.get(place as usize)) {
                    slow.state.counters.retry();
                }
                Some(Duration::ZERO)
            }
            Err(word) => {
                self.trail.push(Event { what: "not hedged", word, ..event });
                None
            }
        }
    }

    /// The budget comes last: what goes nowhere costs nothing.
    fn choose_hedge(&self, now: Duration) -> Result<(u32, Event), &'static str> {
        let chosen = self.choose_untried(now).ok_or("no other endpoint can be asked")?;
        let plan = self.plan().and_then(|route| route.plan.retry.hedge);
        if plan.is_some_and(|plan| !self.service.state.hedge_share.withdraw(&share(&plan), now)) {
            return Err("as many as allowed are hedged already");
        }
        if !self.service.state.budget.withdraw(&self.service.plan.budget, now) {
            return Err("the retry budget is empty");
        }
        Ok(chosen)
    }

    /// Attempts of a hedged call without an answer.
    pub(super) fn under_way(&self) -> usize {
        if self.hedges == 0 {
            return 0;
        }
        self.attempts.iter().filter(|attempt| attempt.is_under_way()).count()
    }

    /// Another attempt has won, or the call is refused: what is still under way is nobody's any more. No breaker hears of it, since
    /// nothing failed. The average does, as far as it took longer than was expected: hedges would hide a slow endpoint from balance.
    pub(super) fn give_up_rest(&mut self, now: Duration) {
        if self.hedges == 0 {
            return;
        }
        let (service, fleet) = (self.service.clone(), self.fleet.clone());
        for token in 0..self.attempts.len() as u32 {
            let Some(attempt) = self.attempts.get(token as usize).filter(|a| a.is_under_way()) else { continue };
            let (place, waited, is_probe) = (attempt.place, now.saturating_sub(attempt.sent), attempt.is_probe);
            if let Some(endpoint) = fleet.endpoints.get(place as usize) {
                if is_probe {
                    service.note(endpoint, Class::Ignored, Duration::ZERO, true, &self.random, now);
                }
                let balance = &service.plan.balance;
                let mut health = endpoint.state.health.lock();
                if waited.as_secs_f64() > health.average.read(balance, now) {
                    health.average.add(waited, balance, now);
                }
            }
            self.end_attempt(token);
            self.trail.push(Event { at: now, phase: "retry", what: "given up", endpoint: Some(place), ..Event::NONE });
        }
    }
}
