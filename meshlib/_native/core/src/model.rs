//! What does the engine know, and in which words? Plain data: the plan as Python compiles it from the user's configuration, and
//! the outcomes that drivers report. No phase is imported here, and nothing has a default: every default lives in `meshlib.config`.
use std::collections::BTreeMap;

use serde::Deserialize;

/// The outbound plan of a process. Unknown keys are refused: Python and Rust must agree to the letter.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Plan {
    pub services: Vec<ServicePlan>,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ServicePlan {
    pub name: String,
    pub hosts: Vec<String>,
    pub protocol: String,
    /// The SPIFFE ID that its endpoints must prove; empty means plain text (mode observe).
    pub identity: String,
    pub routes: Vec<RoutePlan>,
    pub budget: BudgetPlan,
    pub balance: BalancePlan,
    pub admit: AdmitPlan,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RoutePlan {
    pub name: String,
    #[serde(rename = "match")]
    pub matches: MatchPlan,
    pub backends: Vec<BackendPlan>,
    pub retry: RetryPlan,
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

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BackendPlan {
    pub name: String,
    pub labels: BTreeMap<String, String>,
    pub weight: u32,
}

#[derive(Debug, Clone, Deserialize)]
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
}

#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BudgetPlan {
    pub ratio: f64,
    pub per_second: f64,
    pub window: f64,
}

#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BalancePlan {
    pub policy: BalancePolicy,
    pub decay: f64,
    pub start: f64,
    pub penalty: f64,
    pub panic: f64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BalancePolicy {
    PeakEwma,
    RoundRobin,
}

#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AdmitPlan {
    pub in_flight: u32,
    pub connect: f64,
    pub breaker: BreakerPlan,
}

#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BreakerPlan {
    pub failures: u32,
    pub success_rate: f64,
    pub window: f64,
    pub minimum_calls: u32,
    pub open_min: f64,
    pub open_max: f64,
    pub max_ejected: f64,
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
}

impl Outcome {
    pub const ALL: [(Outcome, &'static str); 9] = [
        (Outcome::Response, "response"),
        (Outcome::Refused, "refused"),
        (Outcome::Unwritten, "unwritten"),
        (Outcome::Stale, "stale"),
        (Outcome::Reset, "reset"),
        (Outcome::Timeout, "timeout"),
        (Outcome::Identity, "identity"),
        (Outcome::Protocol, "protocol"),
        (Outcome::Cancelled, "cancelled"),
    ];

    pub fn from_code(code: u8) -> Option<Self> {
        Self::ALL.get(usize::from(code)).map(|(outcome, _)| *outcome)
    }

    pub fn word(self) -> &'static str {
        Self::ALL.get(self as usize).map_or("unknown", |(_, word)| word)
    }
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
        assert_eq!(Outcome::from_code(9), None);
    }

    #[test]
    fn a_client_error_is_the_endpoints_success() {
        assert_eq!(classify(Outcome::Response, 404), Class::Success);
        assert_eq!(classify(Outcome::Response, 503), Class::Failure);
        assert_eq!(classify(Outcome::Response, 429), Class::Overload);
    }
}
