//! What becomes of one call? `begin`, then for each attempt `next` and `head`, and at the end `finish`.
//!
//! The call holds the Service's permit from `begin` to its end, and an Endpoint's permit for each attempt under way. Attempts have
//! tokens, because hedges may overlap. Latency is taken at `head`; the permit ends with the body; what fails after `head` counts
//! against the endpoint and is never repeated. A call that is dropped gives everything back.
//!
//! ```text
//! call/choose.rs  who takes the next attempt     call/hedge.rs   a second attempt beside the first
//! call/learn.rs   what an attempt teaches        call/record.rs  what is left for whoever asks why
//! ```
use std::sync::atomic::Ordering;
use std::sync::Arc;
use std::time::Duration;

use super::carried;
use super::fleet::{Backend, Fleet, Labels};
use super::keys::Asked;
use super::limits::Admission;
use super::service::Service;
use super::Refusal;
use crate::model::{classify, seconds, Class, Outcome, Pushback, StickyKind};
use crate::random::Random;
use crate::retry::{judge, Facts, Verdict, NONE_AFFORDED, NONE_LEFT, NONE_WANTED};
use crate::route::{Headers, Route};

mod asked;
mod choose;
mod hedge;
mod learn;
mod record;

pub use record::{Candidate, Event, Record};

/// What the application asks.
#[derive(Debug, Clone, Copy)]
pub struct Request<'a> {
    pub authority: &'a str,
    pub method: &'a str,
    pub path: &'a str,
    /// An end set further up, on the same clock as `now`.
    pub deadline: Option<Duration>,
    /// Seconds for the whole call in place of the route's.
    pub timeout: Option<Duration>,
    /// Retries in place of the route's; the budget stays.
    pub retries: Option<u32>,
    /// How long an attempt may be without an answer before another goes out beside it; None: for ever.
    pub hedge: Option<Duration>,
    /// Endpoints of this zone first.
    pub zone: Option<&'a str>,
    /// The application's own key for a consistent hash.
    pub key: Option<&'a str>,
    /// On whose behalf: the SPIFFE ID of our own caller.
    pub peer: Option<&'a str>,
    /// Only endpoints that carry these labels, in place of the route's backends.
    pub labels: Option<&'a Labels>,
    /// The global store of rate limits is away, and ours stand in.
    pub is_standby: bool,
    /// The application's own word; None leaves it to method and route.
    pub is_idempotent: Option<bool>,
    pub is_replayable: bool,
    /// The attempt in which we ourselves were called: above 0, somebody further up retries.
    pub layer: u32,
}

/// What the driver does next.
#[derive(Debug, Clone, PartialEq)]
pub enum Next {
    Wait(Duration),
    /// The endpoint is at this place of the fleet: `Call::address`, `Call::identity`.
    Send {
        token: u32,
        place: u32,
        is_http2: bool,
    },
    /// An attempt is under way, and what comes of it decides.
    Await,
}

/// What the driver does with what came back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reply {
    Deliver,
    Retry,
    /// Not good enough, but another attempt is under way.
    Await,
}

/// What a driver has to do for this call beyond the ordinary, as bits, so that the ordinary call costs one look.
pub mod extra {
    /// It may be hedged.
    pub const HEDGE: u8 = 1;
    /// The answer may have to carry a session.
    pub const SESSION: u8 = 2;
    /// An attempt has a time of its own.
    pub const PER_TRY: u8 = 4;
    /// Load reports in answers are wanted.
    pub const REPORT: u8 = 8;
}

pub struct Call {
    service: Arc<Service>,
    fleet: Arc<Fleet>,
    random: Arc<Random>,
    route: u32,
    backend: u32,
    /// In place of the route's backend, and its name.
    subset: Option<Box<(String, Arc<Backend>)>>,
    begun: Duration,
    deadline: Duration,
    is_idempotent: bool,
    is_replayable: bool,
    has_replayed: bool,
    is_done: bool,
    /// It failed with its retries used up.
    is_spent: bool,
    /// It waits for a permit of the Service.
    is_pending: bool,
    /// The attempt whose answer the caller got.
    delivered: Option<u32>,
    /// When it was driven last.
    last: Duration,
    layer: u32,
    /// Retries spent, and how many there may be.
    retries: u32,
    most_retries: u32,
    /// The hedge that may still come, and how many were sent.
    hedge: Option<Duration>,
    hedges: u32,
    /// The zone that the call wishes for, and ours, by their numbers in the fleet.
    zone: Option<u32>,
    own_zone: Option<u32>,
    /// The key that picks a home.
    hash: Option<u64>,
    /// The endpoint of the caller's session.
    session: Option<u32>,
    wait_until: Option<Duration>,
    /// Where the next attempt goes, if that is settled already.
    chosen: Option<Box<(u32, bool, Event)>>,
    attempts: Vec<Attempt>,
    trail: Vec<Event>,
    /// The trace that this call began, the same for all its attempts.
    trace: Option<String>,
}

#[derive(Debug)]
struct Attempt {
    place: u32,
    sent: Duration,
    status: u16,
    is_probe: bool,
    is_over: bool,
    /// Time to the head, once it came.
    took: Option<Duration>,
}

impl Attempt {
    fn is_under_way(&self) -> bool {
        !self.is_over && self.took.is_none()
    }
}

impl Call {
    /// route, then the Service's limits: once per call, above retry and balance.
    pub(super) fn begin(
        service: Arc<Service>,
        random: Arc<Random>,
        request: &Request<'_>,
        headers: &dyn Headers,
        now: Duration,
    ) -> Result<Self, Refusal> {
        let found = service.routes.iter().enumerate().find(|(_, r)| r.matches(request.method, request.path, headers));
        let Some((index, route)) = found else {
            let text = format!("no route of {:?} matches {} {}", service.plan.name, request.method, request.path);
            return Err(Refusal::NoRoute(text));
        };
        let own = now + request.timeout.unwrap_or_else(|| seconds(route.plan.deadline));
        let deadline = request.deadline.map_or(own, |end| end.min(own));
        if deadline <= now {
            let text = format!("the deadline had passed before the call to {:?} began", service.plan.name);
            return Err(Refusal::DeadlineExceeded(text));
        }
        let asked = Asked { request, headers, service: &service.plan.name, route };
        let admission = service.admit(&asked, &random, now)?;
        service.state.budget.deposit(&service.plan.budget, now);
        let retry = &route.plan.retry;
        let is_idempotent = request.is_idempotent.unwrap_or_else(|| {
            retry.idempotent
                || matches!(request.method, "GET" | "HEAD" | "OPTIONS")
                || (retry.idempotency_key && headers.any("idempotency-key", &mut |v| !v.is_empty()))
        });
        let learnt = hedge::learnt(&service, retry, now);
        let fleet = service.fleet();
        let balance = &service.plan.balance;
        let is_keyed = request.key.is_some() || !balance.hash.on.is_empty();
        let mut trail = Vec::with_capacity(4);
        trail.push(Event {
            at: now,
            phase: "route",
            what: "matched",
            amount: deadline.saturating_sub(now).as_secs_f64(),
            ..Event::NONE
        });
        if admission == Admission::Pending {
            trail.push(Event { at: now, phase: "admit", what: "waiting for a permit", ..Event::NONE });
        }
        Ok(Self {
            route: index as u32,
            backend: route.backend(&random) as u32,
            subset: request.labels.map(|labels| Box::new((named(labels), service.subset(&fleet, labels)))),
            begun: now,
            deadline,
            is_idempotent,
            is_replayable: request.is_replayable,
            has_replayed: false,
            is_done: false,
            is_spent: false,
            is_pending: admission == Admission::Pending,
            delivered: None,
            last: now,
            layer: request.layer,
            retries: 0,
            most_retries: request.retries.unwrap_or(retry.attempts),
            hedge: request.hedge.or(learnt),
            hedges: 0,
            zone: request.zone.and_then(|zone| fleet.zone(zone)),
            own_zone: fleet.zone(&service.zone),
            hash: if is_keyed { asked.hash(&balance.hash.on) } else { None },
            session: match balance.sticky.kind {
                StickyKind::None => None,
                kind => asked.session(kind, &balance.sticky.name).and_then(|session| fleet.of_session(session)),
            },
            wait_until: None,
            chosen: None,
            attempts: Vec::with_capacity(1),
            trail,
            trace: None,
            service,
            fleet,
            random,
        })
    }

    /// The application wants no more retries.
    pub fn stop(&mut self) {
        self.most_retries = self.retries;
        self.hedge = None;
    }

    /// The application's own wait, in place of the backoff that `head` decided.
    pub fn wait(&mut self, wait: Duration, now: Duration) {
        if self.wait_until.is_some() {
            self.wait_until = Some(now + wait);
            if let Some(event) = self.trail.iter_mut().rev().find(|event| event.what == "again") {
                event.amount = wait.as_secs_f64();
            }
        }
    }

    /// A new trace for a call that belongs to none, made once.
    pub fn traceparent(&mut self, sample: f64) -> &str {
        self.trace.get_or_insert_with(|| carried::traceparent(&self.random, sample))
    }

    /// balance > admit: who takes the next attempt.
    pub fn next(&mut self, now: Duration) -> Result<Next, Refusal> {
        self.last = now;
        if self.is_done {
            return Err(Refusal::Misuse("next() after the end of the call"));
        }
        if self.chosen.is_none() && self.attempts.iter().any(Attempt::is_under_way) {
            return Ok(Next::Await);
        }
        if now >= self.deadline {
            return Err(self.refuse(now, |call| {
                let elapsed = now.saturating_sub(call.begun).as_secs_f64();
                Refusal::DeadlineExceeded(format!(
                    "the deadline of the call to {:?} passed after {elapsed:.3} s, before attempt {}",
                    call.service.plan.name,
                    call.attempts.len() + 1
                ))
            }));
        }
        if self.is_pending {
            if let Some(wait) = self.service.admit_pending() {
                return Ok(Next::Wait(wait.min(self.deadline - now)));
            }
            self.is_pending = false;
            let waited = now.saturating_sub(self.begun).as_secs_f64();
            self.trail.push(Event { at: now, phase: "admit", what: "got a permit", amount: waited, ..Event::NONE });
        }
        if let Some(until) = self.wait_until {
            if now < until {
                return Ok(Next::Wait(until - now));
            }
            self.wait_until = None;
        }
        let (place, is_probe, event) = match self.chosen.take() {
            Some(chosen) => *chosen,
            None => match self.choose(now) {
                Some(choice) => choice,
                None => return Err(self.refuse(now, Self::nowhere)),
            },
        };
        let Some(endpoint) = self.fleet.endpoints.get(place as usize) else {
            return Err(Refusal::Misuse("an endpoint that was chosen is gone"));
        };
        endpoint.state.in_flight.enter(u32::MAX);
        let is_http2 = self.service.plan.protocol == "http2";
        let next = Next::Send { token: self.attempts.len() as u32, place, is_http2 };
        self.trail.push(Event { at: now, phase: "balance", endpoint: Some(place), ..event });
        self.attempts.push(Attempt { place, sent: now, status: 0, is_probe, is_over: false, took: None });
        Ok(next)
    }

    /// What came back from an attempt, and whether it goes out again.
    pub fn head(
        &mut self,
        token: u32,
        outcome: Outcome,
        status: u16,
        pushback: Pushback,
        now: Duration,
    ) -> Result<Reply, Refusal> {
        self.last = now;
        let service = self.service.clone();
        let fleet = self.fleet.clone();
        let Some(attempt) = self.attempts.get_mut(token as usize).filter(|a| !a.is_over && a.took.is_none()) else {
            return Err(Refusal::Misuse("head() for an attempt that is over"));
        };
        let (place, is_probe, took) = (attempt.place, attempt.is_probe, now.saturating_sub(attempt.sent));
        (attempt.took, attempt.status) = (Some(took), status);
        let Some(endpoint) = fleet.endpoints.get(place as usize) else {
            return Err(Refusal::Misuse("an endpoint in use is gone"));
        };
        let class = classify(outcome, status);
        self.learn(&service, endpoint, (outcome, status), is_probe, took, pushback, now);
        if outcome != Outcome::Cancelled {
            endpoint.state.counters.note(status, matches!(class, Class::Failure | Class::Dead), took);
        }
        if outcome == Outcome::Refused {
            service.state.unreachable.fetch_add(1, Ordering::Relaxed);
        }
        // The ordinary answer needs no judgement and leaves no words.
        let is_plain = outcome == Outcome::Response && status < 500;
        let is_listed = self.plan().is_some_and(|route| route.plan.retry.statuses.contains(&status));
        if (outcome != Outcome::Response || is_listed) && self.under_way() > 0 {
            let event = Event { at: now, endpoint: Some(place), status, ..Event::NONE };
            self.trail.push(Event { phase: "send", what: outcome.word(), ..event.clone() });
            self.trail.push(Event { phase: "retry", what: "awaited", word: "another attempt is under way", ..event });
            self.end_attempt(token);
            return Ok(Reply::Await);
        }
        let mut budget = -1.0;
        let verdict = match self.plan() {
            // Who is somebody else now is somebody else in a moment too.
            Some(_) if outcome == Outcome::Identity && self.choose_untried(now).is_none() => {
                Verdict::Deliver("wrong identity, and there is no other endpoint")
            }
            Some(route) if !is_plain || is_listed => {
                let facts = Facts {
                    outcome,
                    status,
                    is_idempotent: self.is_idempotent,
                    is_replayable: self.is_replayable,
                    has_replayed: self.has_replayed,
                    retries: self.retries,
                    most_retries: self.most_retries,
                    layer: self.layer,
                    left: self.deadline.saturating_sub(now),
                    pushback,
                    is_free: matches!(outcome, Outcome::Refused | Outcome::Identity)
                        && service.is_doubtful(&endpoint.state),
                };
                budget = service.state.budget.left(&service.plan.budget, now);
                judge(&facts, &route.plan.retry, (&service.state.budget, &service.plan.budget), &self.random, now)
            }
            _ => Verdict::Deliver("answered"),
        };
        self.is_spent = matches!(verdict, Verdict::Deliver(NONE_LEFT | NONE_AFFORDED | NONE_WANTED));
        let (what, word, wait) = match verdict {
            Verdict::Deliver(word) => ("delivered", word, 0.0),
            Verdict::Retry(wait, word) => ("again", word, wait.as_secs_f64()),
            Verdict::Replay => ("again", "a kept-alive connection was closed without a byte of an answer", 0.0),
        };
        self.trail.push(Event {
            at: now,
            phase: "send",
            what: outcome.word(),
            endpoint: Some(place),
            status,
            ..Event::NONE
        });
        if !is_plain {
            self.trail.push(Event { at: now, phase: "retry", what, word, amount: wait, budget, ..Event::NONE });
        }
        match verdict {
            Verdict::Retry(wait, _) => {
                self.wait_until = Some(now + wait);
                self.retries += 1;
                endpoint.state.counters.retry();
                service.state.counters.retry();
            }
            Verdict::Replay => {
                self.has_replayed = true;
                let event = Event { what: "sent again on a fresh connection", ..Event::NONE };
                // A probe that found a dead connection is still one.
                self.chosen = Some(Box::new((place, is_probe, event)));
            }
            Verdict::Deliver(_) if outcome == Outcome::Response => {
                self.delivered = Some(token);
                self.give_up_rest(now);
                return Ok(Reply::Deliver);
            }
            Verdict::Deliver(_) => {
                self.end_attempt(token);
                self.end(status, true, now);
                return Ok(Reply::Deliver);
            }
        }
        self.end_attempt(token);
        Ok(Reply::Retry)
    }

    /// The body is through (`Outcome::Response`), or it failed. Ends the attempt, and with it the call.
    pub fn finish(&mut self, token: u32, outcome: Outcome, now: Duration) -> Result<(), Refusal> {
        let Some(attempt) = self.attempts.get(token as usize).filter(|a| !a.is_over) else {
            return Err(Refusal::Misuse("finish() for an attempt that is over"));
        };
        // One that ends without a head is judged here, as a probe too.
        let (place, status, is_probe) = (attempt.place, attempt.status, attempt.is_probe && attempt.took.is_none());
        let mut is_failure = status >= 500;
        if outcome != Outcome::Response {
            let class = classify(outcome, 0);
            let (service, fleet) = (self.service.clone(), self.fleet.clone());
            if let Some(endpoint) = fleet.endpoints.get(place as usize) {
                let took = now.saturating_sub(attempt.sent);
                self.learn(&service, endpoint, (outcome, 0), is_probe, took, Pushback::Unsaid, now);
            }
            self.trail.push(Event {
                at: now,
                phase: "send",
                what: outcome.word(),
                endpoint: Some(place),
                word: "in the body",
                ..Event::NONE
            });
            is_failure |= class != Class::Ignored;
        }
        self.end_attempt(token);
        self.end(status, is_failure, now);
        Ok(())
    }

    /// The caller gave up, or is gone: give everything back. Harmless after the end.
    pub fn abandon(&mut self, now: Duration) {
        if self.is_done {
            return;
        }
        let fleet = self.fleet.clone();
        for token in 0..self.attempts.len() as u32 {
            let Some(attempt) = self.attempts.get(token as usize).filter(|a| !a.is_over) else { continue };
            if attempt.is_probe && attempt.took.is_none() {
                if let Some(endpoint) = fleet.endpoints.get(attempt.place as usize) {
                    self.service.note(endpoint, Class::Ignored, Duration::ZERO, true, &self.random, now);
                }
            }
            self.end_attempt(token);
        }
        self.trail.push(Event { at: now, phase: "send", what: "cancelled", ..Event::NONE });
        self.is_done = true;
        self.leave();
        if self.attempts.iter().all(|attempt| attempt.took.is_none()) {
            self.service.unasked(now);
        }
    }

    fn plan(&self) -> Option<&Route> {
        self.service.routes.get(self.route as usize)
    }

    fn backend(&self) -> Option<&Backend> {
        match &self.subset {
            Some(subset) => Some(&subset.1),
            None => self.fleet.backend(self.route as usize, self.backend as usize).map(|backend| &**backend),
        }
    }

    fn end_attempt(&mut self, token: u32) {
        if let Some(attempt) = self.attempts.get_mut(token as usize) {
            if !attempt.is_over {
                attempt.is_over = true;
                if let Some(endpoint) = self.fleet.endpoints.get(attempt.place as usize) {
                    endpoint.state.in_flight.leave();
                }
            }
        }
    }

    fn end(&mut self, status: u16, is_failure: bool, now: Duration) {
        if !self.is_done {
            self.is_done = true;
            self.leave();
            // The last head that came is the one that counted, also where attempts overlapped.
            let took = self.attempts.iter().filter_map(|a| a.took.map(|t| a.sent + t)).max().unwrap_or(now);
            self.service.state.counters.note(status, is_failure, took.saturating_sub(self.begun));
        }
    }

    /// Give back the Service's permit, or the place in the queue for one.
    fn leave(&mut self) {
        if self.is_pending {
            self.is_pending = false;
            self.service.state.in_flight.give_up();
        } else {
            self.service.state.in_flight.leave();
        }
    }

    fn refuse(&mut self, now: Duration, why: impl Fn(&Self) -> Refusal) -> Refusal {
        let refusal = why(self);
        self.give_up_rest(now);
        self.trail.push(Event { at: now, phase: "retry", what: "refused", ..Event::NONE });
        self.end(0, true, now);
        refusal
    }

    fn nowhere(&self) -> Refusal {
        let (service, route) = (&self.service.plan.name, self.route());
        let count = self.backend().map_or(0, |backend| backend.count(&self.fleet));
        if let Some((labels, _)) = self.subset.as_deref().filter(|_| count == 0) {
            return Refusal::NoEndpoint(format!("no endpoint of {service:?} carries the labels {labels}"));
        }
        if count == 0 {
            return Refusal::NoEndpoint(format!("the backend of route {route:?} of {service:?} has no endpoints"));
        }
        if self.service.plan.is_guard {
            return Refusal::CircuitOpen(format!("{service:?} has failed too often, and its circuit is open"));
        }
        Refusal::CircuitOpen(format!(
            "all {count} endpoints of the backend of route {route:?} of {service:?} are taken out"
        ))
    }
}

/// `version=v2,zone=a`: what explain calls a subset.
fn named(labels: &Labels) -> String {
    labels.iter().map(|(name, value)| format!("{name}={value}")).collect::<Vec<_>>().join(",")
}

impl Drop for Call {
    fn drop(&mut self) {
        self.abandon(self.last);
    }
}
