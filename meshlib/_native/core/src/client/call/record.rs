//! What is left of a call for whoever asks why?
//!
//! Each decision leaves one `Event` of plain numbers and static words; they become text only when somebody reads them. The candidates
//! are looked up then too: with the cost as it was compared, and the rest as it is now.
use std::time::Duration;

use super::Call;

/// Candidates of a record that took no part in a decision, so that a small fleet is shown whole.
const MOST_CANDIDATES: usize = 16;

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
    /// Seconds to wait.
    pub amount: f64,
    /// Retries that the budget held; below 0: it was not asked.
    pub budget: f64,
}

impl Event {
    pub const NONE: Event = Event {
        at: Duration::ZERO,
        phase: "",
        what: "",
        endpoint: None,
        cost: 0.0,
        other: None,
        status: 0,
        word: "",
        amount: 0.0,
        budget: -1.0,
    };
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
    pub weight: f64,
}

/// The whole story of a call, in words.
pub struct Record {
    pub service: String,
    pub route: String,
    pub backend: String,
    pub policy: &'static str,
    pub deadline: f64,
    pub is_idempotent: bool,
    pub retries: u32,
    pub hedges: u32,
    /// Endpoints of the backend, and how many of them are out.
    pub total: usize,
    pub out: usize,
    /// Share of healthy ones below which health is ignored.
    pub panic: f64,
    pub endpoints: Vec<Candidate>,
    pub events: Vec<Event>,
}

impl Call {
    pub fn record(&self, now: Duration) -> Record {
        let balance = &self.service.plan.balance;
        let mut places: Vec<u32> =
            self.trail.iter().flat_map(|e| [e.endpoint, e.other.map(|o| o.0)]).flatten().collect();
        let backend = self.backend();
        if let Some(backend) = backend {
            let all = backend.count(&self.fleet);
            places.extend((0..all.min(MOST_CANDIDATES)).filter_map(|n| backend.place(n)).map(|place| place as u32));
        }
        places.sort_unstable();
        places.dedup();
        let describe = |place: u32| {
            let endpoint = self.fleet.endpoints.get(place as usize)?;
            let health = endpoint.state.health.lock();
            Some(Candidate {
                place,
                address: self.fleet.address(endpoint).to_owned(),
                zone: self.fleet.zone_of(endpoint).to_owned(),
                breaker: health.breaker.state.word(),
                average: health.average.read(balance, now),
                in_flight: endpoint.state.in_flight.count(),
                weight: self.fleet.weight(endpoint, &health, balance, now),
            })
        };
        let plan = self.plan().map(|route| &route.plan);
        let name = match self.subset.as_deref() {
            Some((name, _)) => name.clone(),
            None => {
                plan.and_then(|p| p.backends.get(self.backend as usize)).map_or_else(String::new, |b| b.name.clone())
            }
        };
        Record {
            service: self.service.plan.name.clone(),
            route: self.route().to_owned(),
            backend: name,
            policy: balance.policy.word(),
            deadline: self.deadline.saturating_sub(self.begun).as_secs_f64(),
            is_idempotent: self.is_idempotent,
            retries: self.retries,
            hedges: self.hedges,
            total: backend.map_or(0, |backend| backend.count(&self.fleet)),
            out: backend.map_or(0, |backend| backend.out()),
            panic: if self.service.plan.is_guard { 0.0 } else { balance.panic },
            endpoints: places.into_iter().filter_map(describe).collect(),
            events: self.trail.iter().map(|e| Event { at: e.at.saturating_sub(self.begun), ..e.clone() }).collect(),
        }
    }
}
