//! May a Service have one more call? Everything that is asked once per call, before an endpoint is thought of.
//!
//! In this order: calls at once, fixed or learnt from latency; calls in a time (GCRA); calls that the Service would take anyway
//! (throttle). What is refused by one must not use up another, so the permit comes first and is given back. Which endpoint goes, and whether that one may be
//! used, is not asked here.
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;

use super::keys::Asked;
use super::service::Service;
use super::Refusal;
use crate::admit::adaptive::Adaptive;
use crate::admit::permits;
use crate::admit::rate::{take_all, Ask, Limiter, Rate};
use crate::admit::throttle::Throttle;
use crate::model::{AdmitPlan, KeyPlan, Outcome, RatePlan};
use crate::random::Random;
use crate::retry::quantile::Quantile;

/// Tier: Service. What outlives a swap, and is there only where it is configured (None: nothing is); replaced as a whole.
#[derive(Default)]
pub struct Limits(Mutex<Option<Arc<Kept>>>);

#[derive(Default)]
struct Kept {
    adaptive: Option<Arc<Adaptive>>,
    throttle: Option<Arc<Throttle>>,
    /// In the order of the plan.
    rates: Vec<Counted>,
    hasher: ahash::RandomState,
}

#[derive(Clone)]
struct Counted {
    name: String,
    by: Vec<KeyPlan>,
    limiter: Arc<Limiter>,
}

/// Calls that the mesh itself refused, by reason.
#[derive(Default)]
pub struct Refusals {
    pub limited: AtomicU32,
    pub throttled: AtomicU32,
    pub rate_limited: AtomicU32,
}

/// How a call was let in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Admission {
    Go,
    /// It waits for a permit: `Service::admit_pending`.
    Pending,
}

/// Between two looks of a call that waits for a permit.
const LEAST_WAIT: Duration = Duration::from_millis(1);
const MOST_WAIT: Duration = Duration::from_millis(20);

impl Service {
    pub(super) fn admit(&self, asked: &Asked<'_>, random: &Random, now: Duration) -> Result<Admission, Refusal> {
        let (plan, state, name) = (&self.plan.admit, &self.state, &self.plan.name);
        let limit = state.limits.in_flight(plan);
        let admission = match state.in_flight.ask(limit, plan.pending) {
            permits::Admission::Go => Admission::Go,
            permits::Admission::Wait => Admission::Pending,
            permits::Admission::Refused => {
                state.refusals.limited.fetch_add(1, Ordering::Relaxed);
                let waiting = if plan.pending > 0 { format!(", and {} wait", plan.pending) } else { String::new() };
                return Err(Refusal::LimitExceeded(format!(
                    "{limit} calls to {name:?} are in flight already{waiting}"
                )));
            }
        };
        let checked = self.take_rate(asked, now).and_then(|()| self.throttle(random, now));
        if let Err(refusal) = checked {
            match admission {
                Admission::Go => drop(state.in_flight.leave()),
                Admission::Pending => state.in_flight.give_up(),
            }
            return Err(refusal);
        }
        Ok(admission)
    }

    /// A call that waits asks again; None: it has its permit, otherwise when to ask next.
    pub(super) fn admit_pending(&self) -> Option<Duration> {
        let state = &self.state;
        let limit = state.limits.in_flight(&self.plan.admit);
        if state.in_flight.promote(limit) {
            return None;
        }
        // About when as many permits come free as there are calls in the queue.
        let usual = state.slow_after(0.5).unwrap_or(LEAST_WAIT);
        Some((usual * state.in_flight.pending().max(1) / limit.max(1)).clamp(LEAST_WAIT, MOST_WAIT))
    }

    fn throttle(&self, random: &Random, now: Duration) -> Result<(), Refusal> {
        let plan = &self.plan.admit.throttle;
        if plan.ratio <= 0.0 {
            return Ok(());
        }
        // This call is among them, and not under way yet.
        let under_way = (self.state.in_flight.count() + self.state.in_flight.pending()).saturating_sub(1);
        let throttle = self.state.limits.kept().and_then(|kept| kept.throttle.clone());
        if throttle.is_none_or(|throttle| throttle.may_go(random, plan.ratio, plan.window, under_way, now)) {
            return Ok(());
        }
        self.state.refusals.throttled.fetch_add(1, Ordering::Relaxed);
        Err(Refusal::Throttled(format!(
            "{:?} refuses most of what it gets, so this process sends at most {} times what it accepts",
            self.plan.name, plan.ratio
        )))
    }

    /// A call ended, and says nothing of whether the Service takes what it is sent.
    pub(super) fn unasked(&self, now: Duration) {
        let plan = &self.plan.admit.throttle;
        if plan.ratio > 0.0 {
            if let Some(throttle) = self.state.limits.kept().and_then(|kept| kept.throttle.clone()) {
                throttle.forget(plan.window, now);
            }
        }
    }

    /// All limits that hold for this call, or none of them is used up.
    fn take_rate(&self, asked: &Asked<'_>, now: Duration) -> Result<(), Refusal> {
        if self.plan.admit.rate.is_empty() {
            return Ok(());
        }
        let Some(kept) = self.state.limits.kept() else { return Ok(()) };
        let holds = |plan: &RatePlan| !plan.is_standby || asked.request.is_standby;
        let held: Vec<(&RatePlan, &Counted)> =
            self.plan.admit.rate.iter().zip(&kept.rates).filter(|(plan, _)| holds(plan)).collect();
        let ask = |(plan, known): &(&RatePlan, &'_ Counted)| (asked.limit(&known.by, &kept.hasher), rate(plan));
        let asks: Vec<Ask<'_>> = held
            .iter()
            .map(|pair| {
                let (key, rate) = ask(pair);
                Ask { limiter: &pair.1.limiter, key, rate }
            })
            .collect();
        let Err(excess) = take_all(&asks, now) else { return Ok(()) };
        self.state.refusals.rate_limited.fetch_add(1, Ordering::Relaxed);
        let text = held.get(excess.place).map_or_else(String::new, |(plan, _)| {
            format!(
                "the rate limit {:?} of {:?} is used up: {} calls in {} s",
                plan.name, self.plan.name, plan.calls, plan.per
            )
        });
        Err(Refusal::RateLimited(text, excess.wait))
    }

    /// What an attempt teaches about the Service as a whole. `status` is 0 where no answer came.
    pub(super) fn learn(&self, outcome: Outcome, status: u16, took: Duration, now: Duration) {
        let plan = &self.plan.admit;
        let is_refusal = matches!(status, 429 | 503);
        if plan.adaptive.is_some() || plan.throttle.ratio > 0.0 {
            let kept = self.state.limits.kept().unwrap_or_default();
            if let (Some(adaptive), Some(plan)) = (&kept.adaptive, &plan.adaptive) {
                // A fault of the application, or of one endpoint, says nothing of how much the Service can take.
                let is_dropped = is_refusal || outcome == Outcome::Timeout;
                if is_dropped || (200..500).contains(&status) {
                    adaptive.note(took, self.state.in_flight.count(), is_dropped, plan);
                }
            }
            if let Some(throttle) = &kept.throttle {
                match outcome {
                    Outcome::Response if !is_refusal => throttle.accepted(plan.throttle.window, now),
                    Outcome::Cancelled | Outcome::Unwritten | Outcome::Stale => {
                        throttle.forget(plan.throttle.window, now)
                    }
                    _ => {}
                }
            }
        }
        if (self.has_hedges || plan.pending > 0) && outcome == Outcome::Response {
            let begin = || {
                let fresh = Box::<Quantile>::default();
                // Its windows begin now, not at the beginning of time.
                fresh.refresh(now);
                fresh
            };
            self.state.latency.get_or_init(begin).note(took);
        }
    }
}

fn rate(plan: &RatePlan) -> Rate {
    Rate::new(plan.calls, plan.per, plan.burst)
}

impl Limits {
    /// How many may be in flight: the plan's number, or what was learnt if that is less.
    pub fn in_flight(&self, plan: &AdmitPlan) -> u32 {
        let Some(adaptive) = &plan.adaptive else { return plan.in_flight };
        let kept = self.0.lock();
        let learnt = kept.as_ref().and_then(|kept| kept.adaptive.as_ref());
        learnt.map_or(plan.in_flight, |learnt| learnt.limit(adaptive).min(plan.in_flight))
    }

    /// Take over what a new plan still names: a limit that was used up stays so.
    pub fn keep(&self, plan: &AdmitPlan) {
        let mut slot = self.0.lock();
        let is_limited = plan.adaptive.is_some() || plan.throttle.ratio > 0.0 || !plan.rate.is_empty();
        let Some(kept) = is_limited.then(|| slot.clone().unwrap_or_default()) else {
            *slot = None;
            return;
        };
        let known = |plan: &RatePlan| kept.rates.iter().find(|r| r.name == plan.name && r.by == plan.by).cloned();
        let rates = plan.rate.iter().map(|plan| {
            known(plan).unwrap_or_else(|| Counted {
                name: plan.name.clone(),
                by: plan.by.clone(),
                limiter: Arc::default(),
            })
        });
        let rates = rates.collect();
        let adaptive = plan.adaptive.map(|_| kept.adaptive.clone().unwrap_or_default());
        let throttle = (plan.throttle.ratio > 0.0).then(|| kept.throttle.clone().unwrap_or_default());
        *slot = Some(Arc::new(Kept { adaptive, throttle, rates, hasher: kept.hasher.clone() }));
    }

    fn kept(&self) -> Option<Arc<Kept>> {
        self.0.lock().clone()
    }
}
