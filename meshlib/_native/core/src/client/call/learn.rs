//! What does an attempt teach?
//!
//! The endpoint: its average, its breaker, and the load that it reported. The Service: what is slow, what its limit should be, whether it
//! takes what it is sent. All ask one judge, `classify`.
use std::time::Duration;

use super::record::Event;
use super::Call;
use crate::balance::orca;
use crate::client::fleet::{terms, Endpoint};
use crate::client::service::Service;
use crate::model::{classify, seconds, Class, Outcome, Pushback, WeightSource};

const LONGEST_PENALTY: Duration = Duration::from_secs(300);

impl Call {
    /// Tell average and breaker what an attempt was like.
    #[allow(clippy::too_many_arguments)] // the facts of one attempt, used at two places
    pub(super) fn learn(
        &mut self,
        service: &Service,
        endpoint: &Endpoint,
        (outcome, status): (Outcome, u16),
        is_probe: bool,
        took: Duration,
        pushback: Pushback,
        now: Duration,
    ) {
        let (balance, mut class) = (&service.plan.balance, classify(outcome, status));
        if outcome == Outcome::Identity && service.is_doubtful(&endpoint.state) {
            // Its address was given to somebody else: nobody of ours is there.
            class = Class::Dead;
        }
        match class {
            Class::Ignored => {}
            Class::Success => endpoint.state.health.lock().average.add(took, balance, now),
            Class::Overload | Class::Failure | Class::Dead => {
                let penalty = seconds(balance.penalty);
                let asked = match pushback {
                    Pushback::After(asked) => asked.min(LONGEST_PENALTY),
                    Pushback::Unsaid | Pushback::Never => Duration::ZERO,
                };
                endpoint.state.health.lock().average.add(took.max(penalty).max(asked), balance, now);
            }
        }
        if let Some(word) = service.note(endpoint, class, took, is_probe, &self.random, now) {
            self.trail.push(Event { at: now, phase: "admit", what: word, ..Event::NONE });
        }
        service.learn(outcome, status, took, now);
    }

    /// The endpoint told its load with an answer. What can't be read is ignored: it is a hint, and no reason to fail.
    pub fn report(&mut self, token: u32, value: &[u8], now: Duration) {
        let plan = &self.service.plan.balance;
        let Some(attempt) = self.attempts.get(token as usize).filter(|_| plan.weights == WeightSource::Orca) else {
            return;
        };
        let Some(endpoint) = self.fleet.endpoints.get(attempt.place as usize) else { return };
        let Some(weight) = orca::parse(value).ok().and_then(|report| orca::weight(&report, plan.orca.error_penalty))
        else {
            return;
        };
        let mut health = endpoint.state.health.lock();
        health.load.get_or_insert_with(Box::default).add(weight, &terms(&plan.orca), now);
    }
}
