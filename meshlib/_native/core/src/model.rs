//! What does the engine know, and in which words? Plain data: the plan as Python compiles it from the user's configuration, and
//! the outcomes that drivers report. No phase is imported here, and nothing has a default: every default lives in `meshlib.config`.
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use serde::Deserialize;
use serde_json::value::RawValue;

/// The outbound plan of a process. Unknown keys are refused: Python and Rust must agree to the letter.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Plan<'a> {
    /// The Service that this process is: its own endpoints are the callers of the others.
    pub service: String,
    /// The zone that this process runs in; empty: unknown.
    pub zone: String,
    /// Each a `ServicePlan`, read only if its text is new.
    #[serde(borrow)]
    pub services: Vec<&'a RawValue>,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ServicePlan {
    pub name: String,
    pub hosts: Vec<String>,
    pub protocol: String,
    /// The SPIFFE ID that its endpoints must prove; empty means plain text (mode observe).
    pub identity: String,
    /// A function instead of endpoints: its breaker may open, although there is no other.
    pub is_guard: bool,
    pub routes: Vec<RoutePlan>,
    pub budget: BudgetPlan,
    /// Services are many and alike: equal ones share one.
    pub balance: Arc<BalancePlan>,
    pub admit: Arc<AdmitPlan>,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RoutePlan {
    pub name: String,
    #[serde(rename = "match")]
    pub matches: MatchPlan,
    pub backends: Arc<[BackendPlan]>,
    pub retry: Arc<RetryPlan>,
    pub deadline: f64,
    /// Seconds without progress that a stream may stay after its head.
    pub stream_idle: f64,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MatchPlan {
    pub path: PathPlan,
    pub methods: Vec<String>,
    pub headers: Vec<HeaderPlan>,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PathPlan {
    pub kind: PathKind,
    pub value: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PathKind {
    Exact,
    Prefix,
    Template,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HeaderPlan {
    pub name: String,
    pub kind: HeaderKind,
    pub value: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum HeaderKind {
    Exact,
    Prefix,
    Present,
}

#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BackendPlan {
    pub name: String,
    pub labels: BTreeMap<String, String>,
    pub weight: u32,
}

#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RetryPlan {
    pub attempts: u32,
    pub backoff_base: f64,
    pub backoff_max: f64,
    pub statuses: Vec<u16>,
    /// An `Idempotency-Key` header makes a call idempotent.
    pub idempotency_key: bool,
    /// Every call of this route is idempotent, whatever its method (the operator's declaration).
    pub idempotent: bool,
    /// After which failures an attempt may be repeated at all.
    pub on: Vec<Condition>,
    /// Seconds for one attempt; 0: as long as the call has.
    pub per_try: f64,
    pub hedge: Option<HedgePlan>,
}

/// A failure that may be repeated, in the words of Envoy's `retry_on`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Condition {
    Connect,
    RefusedStream,
    Reset,
    Timeout,
    Protocol,
    Identity,
    Status,
}

/// A second attempt beside a slow first one.
#[derive(Debug, Clone, Copy, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HedgePlan {
    /// Of the Service's own latency: what took longer is slow.
    pub quantile: f64,
    /// Hedges per call, at most.
    pub share: f64,
    /// Seconds below which nothing is slow.
    pub least: f64,
}

#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BudgetPlan {
    pub ratio: f64,
    pub per_second: f64,
    pub window: f64,
}

#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BalancePlan {
    pub policy: BalancePolicy,
    pub decay: f64,
    pub start: f64,
    pub penalty: f64,
    pub panic: f64,
    pub weights: WeightSource,
    pub orca: OrcaPlan,
    /// Seconds in which a new endpoint, or one that came back, grows to its full weight; 0: at once.
    pub slow_start: f64,
    pub slow_start_least: f64,
    pub hash: HashPlan,
    pub sticky: StickyPlan,
    pub locality: LocalityPlan,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BalancePolicy {
    PeakEwma,
    LeastRequest,
    RoundRobin,
    Random,
    RingHash,
    Maglev,
}

impl BalancePolicy {
    /// Its endpoints are drawn by chance, for which a table of their weights is kept.
    pub fn is_drawn(self) -> bool {
        matches!(self, BalancePolicy::PeakEwma | BalancePolicy::LeastRequest | BalancePolicy::Random)
    }

    pub fn word(self) -> &'static str {
        match self {
            BalancePolicy::PeakEwma => "peak_ewma",
            BalancePolicy::LeastRequest => "least_request",
            BalancePolicy::RoundRobin => "round_robin",
            BalancePolicy::Random => "random",
            BalancePolicy::RingHash => "ring_hash",
            BalancePolicy::Maglev => "maglev",
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum WeightSource {
    Discover,
    Orca,
}

#[derive(Debug, Clone, Copy, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OrcaPlan {
    pub blackout: f64,
    pub expiry: f64,
    pub error_penalty: f64,
}

#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HashPlan {
    pub on: Vec<KeyPlan>,
    /// At most so many times the mean in flight; 0: no bound.
    pub bound: f64,
    pub ring: usize,
    pub table: usize,
}

/// A part of a call that stands for whom it is: what a hash or a rate limit goes by.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KeyPlan {
    pub kind: KeyKind,
    pub name: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum KeyKind {
    Header,
    Cookie,
    /// A variable of the route's path template.
    Path,
    /// On whose behalf we call.
    Peer,
    Service,
    Route,
}

#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StickyPlan {
    pub kind: StickyKind,
    pub name: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StickyKind {
    None,
    Cookie,
    Header,
}

#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LocalityPlan {
    pub policy: LocalityPolicy,
    /// Zones after the own one, in the order of preference; the rest come last, together.
    pub order: Vec<String>,
    pub overprovisioning: f64,
    /// With fewer endpoints zones don't count (zone_aware only).
    pub least_endpoints: usize,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LocalityPolicy {
    Off,
    Failover,
    ZoneAware,
}

#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AdmitPlan {
    pub in_flight: u32,
    /// Calls that may wait for a permit.
    pub pending: u32,
    pub connect: f64,
    pub breaker: BreakerPlan,
    pub adaptive: Option<AdaptivePlan>,
    pub throttle: ThrottlePlan,
    pub rate: Vec<RatePlan>,
}

#[derive(Debug, Clone, Copy, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BreakerPlan {
    pub failures: u32,
    pub success_rate: f64,
    pub window: f64,
    pub minimum_calls: u32,
    pub open_min: f64,
    pub open_max: f64,
    pub max_ejected: f64,
    /// Seconds from which an answer is slow; 0: none is.
    pub slow: f64,
    /// Share of slow answers in the window that opens it.
    pub slow_rate: f64,
}

#[derive(Debug, Clone, Copy, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AdaptivePlan {
    pub initial: u32,
    pub least: u32,
    pub most: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ThrottlePlan {
    /// Calls for each that is accepted; 0: no throttle.
    pub ratio: f64,
    pub window: f64,
}

#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RatePlan {
    pub name: String,
    pub calls: f64,
    pub per: f64,
    pub burst: f64,
    pub by: Vec<KeyPlan>,
    /// It holds only while the global store is away.
    pub is_standby: bool,
}

/// Services and routes that are told the same share it: a mesh of thousands has a handful of policies, and they stay in the caches.
pub fn share_policies<'a>(services: impl Iterator<Item = &'a mut ServicePlan>) {
    let (mut balances, mut admits, mut retries, mut backends) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for service in services {
        share(&mut balances, &mut service.balance);
        share(&mut admits, &mut service.admit);
        for route in &mut service.routes {
            share(&mut retries, &mut route.retry);
            share(&mut backends, &mut route.backends);
        }
    }
}

/// Among the last few only: where all differ, looking for an equal one must not cost more than it saves.
const LATELY: usize = 8;

fn share<T: PartialEq + ?Sized>(known: &mut Vec<Arc<T>>, plan: &mut Arc<T>) {
    match known.iter().rev().take(LATELY).find(|other| **other == *plan) {
        Some(other) => *plan = other.clone(),
        None => known.push(plan.clone()),
    }
}

/// One address as a resolver found it.
#[derive(Debug, Clone, PartialEq)]
pub struct Address {
    pub address: String,
    pub weight: f64,
    pub zone: String,
    pub labels: BTreeMap<String, String>,
    /// The SPIFFE ID of this endpoint; empty takes the service's.
    pub identity: String,
    /// The source doesn't tell it any more, and may be wrong about that.
    pub is_held: bool,
}

/// What became of an attempt, as its driver saw it. The numbers are part of the seam (`OUTCOME_*` in `_core.pyi`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Outcome {
    /// An answer with a status.
    Response = 0,
    /// No connection: refused, unreachable or not in time. Nothing was written.
    Refused = 1,
    /// The connection broke before a byte of the request left.
    Unwritten = 2,
    /// A kept-alive connection that the peer had closed: written, and not one byte came back.
    Stale = 3,
    /// The connection broke after the request was written.
    Reset = 4,
    /// The endpoint was too slow.
    Timeout = 5,
    /// The other side did not prove the identity that we expect.
    Identity = 6,
    /// The other side does not speak correct HTTP.
    Protocol = 7,
    /// The caller gave up.
    Cancelled = 8,
    /// The endpoint answers, and says that it did not process this one (REFUSED_STREAM).
    Declined = 9,
}

impl Outcome {
    pub const ALL: [(Outcome, &'static str); 10] = [
        (Outcome::Response, "response"),
        (Outcome::Refused, "refused"),
        (Outcome::Unwritten, "unwritten"),
        (Outcome::Stale, "stale"),
        (Outcome::Reset, "reset"),
        (Outcome::Timeout, "timeout"),
        (Outcome::Identity, "identity"),
        (Outcome::Protocol, "protocol"),
        (Outcome::Cancelled, "cancelled"),
        (Outcome::Declined, "declined"),
    ];

    pub fn from_code(code: u8) -> Option<Self> {
        Self::ALL.get(usize::from(code)).map(|(outcome, _)| *outcome)
    }

    pub fn word(self) -> &'static str {
        Self::ALL.get(self as usize).map_or("unknown", |(_, word)| word)
    }
}

/// Seconds of a plan as a time; what no clock can hold is a century, what is no time is none.
pub fn seconds(value: f64) -> Duration {
    const CENTURY: f64 = 100.0 * 365.0 * 86_400.0;
    Duration::try_from_secs_f64(value.min(CENTURY)).unwrap_or_default()
}

/// What the endpoint said of another attempt (Retry-After, grpc-retry-pushback-ms).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pushback {
    Unsaid,
    After(Duration),
    Never,
}

/// The one judgement on an attempt, which retry, breaker, balance and metrics all ask for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Class {
    Success,
    /// The endpoint works, but has too much to do (429): slow for balance, a failure for the rate, not for the row.
    Overload,
    Failure,
    /// Nobody listens, or the connection died: ejects at once.
    Dead,
    /// Says nothing about the endpoint (the caller gave up).
    Ignored,
}

/// The classifier. A 4xx is the caller's mistake and so the endpoint's success.
pub fn classify(outcome: Outcome, status: u16) -> Class {
    match outcome {
        Outcome::Response => match status {
            429 => Class::Overload,
            500..=599 => Class::Failure,
            _ => Class::Success,
        },
        Outcome::Refused | Outcome::Reset => Class::Dead,
        Outcome::Timeout | Outcome::Identity | Outcome::Protocol => Class::Failure,
        // A kept-alive connection that was closed under us is a race of idle timers, not a sick endpoint.
        Outcome::Unwritten | Outcome::Stale | Outcome::Cancelled => Class::Ignored,
        // As after a 429: it works, and has too much to do.
        Outcome::Declined => Class::Overload,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn outcome_codes_are_their_places() {
        for (place, (outcome, _)) in Outcome::ALL.iter().enumerate() {
            assert_eq!(*outcome as usize, place);
        }
        assert_eq!(Outcome::from_code(10), None);
    }

    #[test]
    fn a_client_error_is_the_endpoints_success() {
        assert_eq!(classify(Outcome::Response, 404), Class::Success);
        assert_eq!(classify(Outcome::Response, 503), Class::Failure);
        assert_eq!(classify(Outcome::Response, 429), Class::Overload);
    }
}
