//! What becomes of one call? `begin`, then for each attempt `next` and `head`, and at the end `finish`.
//!
//! The call holds the Service's permit from `begin` to its end, and an Endpoint's permit for each attempt under way. Attempts have
//! tokens, because hedges may overlap. Latency is taken at `head`; the permit ends with the body; what fails after `head` counts
//! against the endpoint and is never repeated. A call that is dropped gives everything back.
use std::sync::Arc;
use std::time::Duration;

use super::carried;
use super::fleet::{Backend, Eligible, Endpoint, Fleet, Service};
use super::Refusal;
use crate::balance::{round_robin, two_choices, Pick};
use crate::model::{classify, BalancePolicy, Class, Outcome};
use crate::observe::Counters;
use crate::random::Random;
use crate::retry::{judge, Facts, Verdict};
use crate::route::{Headers, Route};

mod hedge;

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
    Send {
        token: u32,
        address: Arc<str>,
        identity: Arc<str>,
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

pub struct Call {
    service: Arc<Service>,
    fleet: Arc<Fleet>,
    random: Arc<Random>,
    route: usize,
    backend: usize,
    begun: Duration,
    deadline: Duration,
    is_idempotent: bool,
    is_replayable: bool,
    layer: u32,
    has_replayed: bool,
    /// Retries spent, and how many there may be.
    retries: u32,
    most_retries: u32,
    /// The hedge that may still come, and how many were sent.
    hedge: Option<Duration>,
    hedges: u32,
    /// Its number in the fleet.
    zone: Option<u32>,
    wait_until: Option<Duration>,
    /// Where the next attempt goes, if that is settled already.
    chosen: Option<(u32, Event)>,
    attempts: Vec<Attempt>,
    /// Places of the endpoints that were tried.
    tried: Vec<u32>,
    is_done: bool,
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

/// An endpoint as a record shows it.
pub struct Candidate {
    pub place: u32,
    pub address: String,
    pub zone: String,
    pub breaker: &'static str,
    /// Seconds.
    pub average: f64,
    pub in_flight: u32,
}

/// One decision, for `explain`.
#[derive(Debug, Clone, PartialEq)]
pub struct Event {
    pub at: Duration,
    pub phase: &'static str,
    pub what: &'static str,
    pub endpoint: Option<u32>,
    pub cost: f64,
    /// What the choice was compared with.
    pub other: Option<(u32, f64)>,
    pub status: u16,
    pub word: &'static str,
    /// Seconds to wait, or what is left in the budget.
    pub amount: f64,
}

impl Event {
    const NONE: Event = Event {
        at: Duration::ZERO,
        phase: "",
        what: "",
        endpoint: None,
        cost: 0.0,
        other: None,
        status: 0,
        word: "",
        amount: 0.0,
    };
}

/// The whole story of a call, in words.
pub struct Record {
    pub service: String,
    pub route: String,
    pub backend: String,
    pub deadline: f64,
    pub is_idempotent: bool,
    pub retries: u32,
    pub hedges: u32,
    pub endpoints: Vec<Candidate>,
    pub events: Vec<Event>,
}

impl Call {
    /// route, then the Service's limit: once per call, above retry and balance.
    pub(super) fn begin(
        service: Arc<Service>,
        random: Arc<Random>,
        request: &Request<'_>,
        headers: &dyn Headers,
        now: Duration,
    ) -> Result<Self, Refusal> {
        let Some(index) = service.routes.iter().position(|r| r.matches(request.method, request.path, headers)) else {
            let text = format!("no route of {:?} matches {} {}", service.plan.name, request.method, request.path);
            return Err(Refusal::NoRoute(text));
        };
        let Some(route) = service.routes.get(index) else {
            return Err(Refusal::Misuse("a route that was found is gone"));
        };
        let limit = service.plan.admit.in_flight;
        let own = now + request.timeout.unwrap_or_else(|| Duration::from_secs_f64(route.plan.deadline.max(0.0)));
        let deadline = request.deadline.map_or(own, |end| end.min(own));
        if deadline <= now {
            let text = format!("the deadline had passed before the call to {:?} began", service.plan.name);
            return Err(Refusal::DeadlineExceeded(text));
        }
        if !service.state.in_flight.enter(limit) {
            let text = format!("{limit} calls to {:?} are in flight already", service.plan.name);
            return Err(Refusal::LimitExceeded(text));
        }
        service.state.budget.deposit(&service.plan.budget, now);
        let backend = route.backend(&random);
        let is_idempotent = request.is_idempotent.unwrap_or_else(|| {
            route.plan.retry.idempotent
                || matches!(request.method, "GET" | "HEAD" | "OPTIONS")
                || (route.plan.retry.idempotency_key && headers.any("idempotency-key", &mut |v| !v.is_empty()))
        });
        let fleet = service.fleet();
        let mut trail = Vec::with_capacity(4);
        trail.push(Event {
            at: now,
            phase: "route",
            what: "matched",
            amount: deadline.saturating_sub(now).as_secs_f64(),
            ..Event::NONE
        });
        Ok(Self {
            route: index,
            backend,
            begun: now,
            deadline,
            is_idempotent,
            is_replayable: request.is_replayable,
            layer: request.layer,
            has_replayed: false,
            retries: 0,
            most_retries: request.retries.unwrap_or(route.plan.retry.attempts),
            hedge: request.hedge,
            hedges: 0,
            zone: request.zone.and_then(|zone| fleet.zone(zone)),
            wait_until: None,
            chosen: None,
            attempts: Vec::with_capacity(1),
            tried: Vec::new(),
            is_done: false,
            trail,
            trace: None,
            service,
            fleet,
            random,
        })
    }

    pub fn service(&self) -> &str {
        &self.service.plan.name
    }

    pub fn route(&self) -> &str {
        self.service.routes.get(self.route).map_or("", |route| &route.name)
    }

    pub fn deadline(&self) -> Duration {
        self.deadline
    }

    /// Seconds for a connection to come about.
    pub fn connect_timeout(&self) -> Duration {
        Duration::from_secs_f64(self.service.plan.admit.connect.max(0.0))
    }

    /// Seconds without progress that the body of a stream may stay.
    pub fn stream_idle(&self) -> f64 {
        self.plan().map_or(0.0, |route| route.plan.stream_idle)
    }

    pub fn is_idempotent(&self) -> bool {
        self.is_idempotent
    }

    /// A new trace for a call that belongs to none, made once.
    pub fn traceparent(&mut self, sample: f64) -> &str {
        self.trace.get_or_insert_with(|| carried::traceparent(&self.random, sample))
    }

    /// Attempts sent so far; the number of the next one, which travels.
    pub fn attempts(&self) -> u32 {
        self.layer + self.retries + self.hedges
    }

    /// Another attempt is possible, so that the driver must keep the body.
    pub fn has_attempts_left(&self) -> bool {
        !self.is_done && (self.retries < self.most_retries || self.under_way() > 1)
    }

    /// balance > admit: who takes the next attempt.
    pub fn next(&mut self, now: Duration) -> Result<Next, Refusal> {
        if self.is_done {
            return Err(Refusal::Misuse("next() after the end of the call"));
        }
        if self.chosen.is_none() && self.under_way() > 0 {
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
        if let Some(until) = self.wait_until.take() {
            if now < until {
                self.wait_until = Some(until);
                return Ok(Next::Wait(until - now));
            }
        }
        let (place, is_probe, event) = match self.chosen.take() {
            Some((place, event)) => (place, false, event),
            None => match self.choose(now) {
                Some(choice) => choice,
                None => return Err(self.refuse(now, Self::nowhere)),
            },
        };
        let Some(endpoint) = self.fleet.endpoints.get(place as usize) else {
            return Err(Refusal::Misuse("an endpoint that was chosen is gone"));
        };
        endpoint.state.in_flight.enter(u32::MAX);
        let next = Next::Send {
            token: self.attempts.len() as u32,
            address: endpoint.address.clone(),
            identity: endpoint.identity.clone(),
            is_http2: self.service.plan.protocol == "http2",
        };
        if !self.tried.contains(&place) {
            self.tried.push(place);
        }
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
        retry_after: Option<Duration>,
        now: Duration,
    ) -> Result<Reply, Refusal> {
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
        self.learn(&service, endpoint, class, is_probe, took, retry_after, now);
        if outcome != Outcome::Cancelled {
            endpoint.state.counters.note(status, matches!(class, Class::Failure | Class::Dead), took);
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
        let verdict = match self.plan() {
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
                    retry_after,
                };
                judge(&facts, &route.plan.retry, (&service.state.budget, &service.plan.budget), &self.random, now)
            }
            _ => Verdict::Deliver("answered"),
        };
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
            self.trail.push(Event { at: now, phase: "retry", what, word, amount: wait, ..Event::NONE });
        }
        match verdict {
            Verdict::Retry(wait, _) => {
                self.wait_until = Some(now + wait);
                self.retries += 1;
                Counters::add(&endpoint.state.counters.retries);
                Counters::add(&service.state.counters.retries);
            }
            Verdict::Replay => {
                self.has_replayed = true;
                self.chosen = Some((place, Event { what: "sent again on a fresh connection", ..Event::NONE }));
            }
            Verdict::Deliver(_) if outcome == Outcome::Response => {
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
        let (place, status) = (attempt.place, attempt.status);
        let mut is_failure = status >= 500;
        if outcome != Outcome::Response {
            let class = classify(outcome, 0);
            let (service, fleet) = (self.service.clone(), self.fleet.clone());
            if let Some(endpoint) = fleet.endpoints.get(place as usize) {
                let took = now.saturating_sub(attempt.sent);
                self.learn(&service, endpoint, class, false, took, None, now);
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
                    self.service.note(endpoint, Class::Ignored, true, &self.random, now);
                }
            }
            self.end_attempt(token);
        }
        self.trail.push(Event { at: now, phase: "send", what: "cancelled", ..Event::NONE });
        self.is_done = true;
        self.service.state.in_flight.leave();
    }

    pub fn record(&self, now: Duration) -> Record {
        let balance = &self.service.plan.balance;
        let mut places: Vec<u32> =
            self.trail.iter().flat_map(|e| [e.endpoint, e.other.map(|o| o.0)]).flatten().collect();
        places.sort_unstable();
        places.dedup();
        let describe = |place: u32| {
            let endpoint = self.fleet.endpoints.get(place as usize)?;
            let health = endpoint.state.health.lock();
            Some(Candidate {
                place,
                address: endpoint.address.to_string(),
                zone: self.fleet.zone_of(endpoint).to_owned(),
                breaker: health.breaker.state.word(),
                average: health.average.read(balance, now),
                in_flight: endpoint.state.in_flight.count(),
            })
        };
        let plan = self.plan().map(|route| &route.plan);
        Record {
            service: self.service.plan.name.clone(),
            route: self.route().to_owned(),
            backend: plan.and_then(|p| p.backends.get(self.backend)).map_or(String::new(), |b| b.name.clone()),
            deadline: self.deadline.saturating_sub(self.begun).as_secs_f64(),
            is_idempotent: self.is_idempotent,
            retries: self.retries,
            hedges: self.hedges,
            endpoints: places.into_iter().filter_map(describe).collect(),
            events: self.trail.iter().map(|e| Event { at: e.at.saturating_sub(self.begun), ..e.clone() }).collect(),
        }
    }

    fn plan(&self) -> Option<&Route> {
        self.service.routes.get(self.route)
    }

    /// Three cases, in this order:
    /// 1. An ejected endpoint whose wait is over takes this call as its probe (first attempts only: a retry must not gamble).
    /// 2. The balancer picks among those that were not tried.
    /// 3. Nothing is left there: endpoints that were tried already.
    fn choose(&self, now: Duration) -> Option<(u32, bool, Event)> {
        let backend = self.fleet.backend(self.route, self.backend)?;
        if self.attempts.is_empty() {
            if let Some(place) = self.service.probe(&self.fleet, backend, self.is_idempotent, now) {
                return Some((place as u32, true, Event { what: "probe", ..Event::NONE }));
            }
        }
        let (place, event) = self.choose_untried(now).or_else(|| {
            // A healthy one that was tried before one that is known to be sick.
            let pick = self.pick(backend, false, &[], now).or_else(|| self.pick(backend, true, &[], now))?;
            picked(pick, backend, "picked again, for want of another")
        })?;
        Some((place, false, event))
    }

    /// Three cases, in this order:
    /// 1. The healthy of the backend in the zone that the call prefers. Not in panic, when all must share what there is.
    /// 2. The healthy of the backend; in panic, all of it.
    /// 3. Other backends of the route.
    fn choose_untried(&self, now: Duration) -> Option<(u32, Event)> {
        let backend = self.fleet.backend(self.route, self.backend)?;
        let is_panic = self.service.is_panicking(&self.fleet, backend);
        if let Some(near) = self.zone.filter(|_| !is_panic).and_then(|zone| backend.in_zone(zone)) {
            if let Some(pick) = self.pick(near, false, &self.tried, now) {
                return picked(pick, near, "picked in zone");
            }
        }
        if let Some(pick) = self.pick(backend, is_panic, &self.tried, now) {
            let what = match self.zone {
                _ if is_panic => "picked in panic",
                Some(_) => "picked outside the zone",
                None => "picked",
            };
            return picked(pick, backend, what);
        }
        let others = &self.plan()?.plan.backends;
        for index in (0..others.len()).filter(|index| *index != self.backend) {
            if others.get(index).is_none_or(|plan| plan.weight == 0) {
                continue; // it takes no traffic, by configuration
            }
            let Some(other) = self.fleet.backend(self.route, index) else { continue };
            if let Some(pick) = self.pick(other, false, &self.tried, now) {
                return picked(pick, other, "picked from another backend");
            }
        }
        None
    }

    fn pick(&self, backend: &Backend, is_panic: bool, tried: &[u32], now: Duration) -> Option<Pick> {
        let balance = &self.service.plan.balance;
        let view = Eligible { fleet: &self.fleet, backend, balance, now, is_panic, tried };
        match balance.policy {
            BalancePolicy::PeakEwma => two_choices(&view, &self.random),
            BalancePolicy::RoundRobin => round_robin(&view, &backend.turn),
        }
    }

    /// Tell average and breaker what an attempt was like.
    #[allow(clippy::too_many_arguments)] // the facts of one attempt, used at two places of this file
    fn learn(
        &mut self,
        service: &Service,
        endpoint: &Endpoint,
        class: Class,
        is_probe: bool,
        took: Duration,
        retry_after: Option<Duration>,
        now: Duration,
    ) {
        const LONGEST_PENALTY: Duration = Duration::from_secs(300);
        let balance = &service.plan.balance;
        match class {
            Class::Ignored => {}
            Class::Success => endpoint.state.health.lock().average.add(took, balance, now),
            Class::Overload | Class::Failure | Class::Dead => {
                let penalty = Duration::from_secs_f64(balance.penalty.max(0.0));
                let slow = took.max(penalty).max(retry_after.unwrap_or_default().min(LONGEST_PENALTY));
                endpoint.state.health.lock().average.add(slow, balance, now);
            }
        }
        if let Some(word) = service.note(endpoint, class, is_probe, &self.random, now) {
            self.trail.push(Event { at: now, phase: "admit", what: word, ..Event::NONE });
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
            self.service.state.in_flight.leave();
            // The last head that came is the one that counted, also where attempts overlapped.
            let took = self.attempts.iter().filter_map(|a| a.took.map(|t| a.sent + t)).max().unwrap_or(now);
            self.service.state.counters.note(status, is_failure, took.saturating_sub(self.begun));
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
        let count = self.fleet.backend(self.route, self.backend).map_or(0, |backend| backend.count(&self.fleet));
        if count == 0 {
            return Refusal::NoEndpoint(format!("the backend of route {route:?} of {service:?} has no endpoints"));
        }
        Refusal::CircuitOpen(format!(
            "all {count} endpoints of the backend of route {route:?} of {service:?} are taken out"
        ))
    }
}

fn picked(pick: Pick, backend: &Backend, what: &'static str) -> Option<(u32, Event)> {
    let place = backend.place(pick.index)?;
    let other = pick.other.and_then(|(index, cost)| backend.place(index).map(|p| (p as u32, cost)));
    Some((place as u32, Event { what, cost: pick.cost, other, ..Event::NONE }))
}

impl Drop for Call {
    fn drop(&mut self) {
        self.abandon(self.begun);
    }
}
