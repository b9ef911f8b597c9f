//! Why may a call not go on, and which status, word and sentence does that get?
//!
//! The status is for the caller, the word for programs, the sentence for the one who runs the service. A table, and nothing else.
use std::fmt;
use std::time::Duration;

use super::headers::HeaderFault;
use super::LONGEST_TARGET;
use crate::secure::path::PathError;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    NotReady,
    TargetTooLong,
    Method,
    Trace,
    GrpcMethod,
    Headers(HeaderFault),
    Path(PathError),
    /// `paths: redirect`, and the target is not the canonical one.
    Redirect,
    NoIdentity,
    /// A token was shown that is no good.
    Token,
    /// A rule asks for a token, and there is none.
    NoToken,
    Denied,
    /// The authorizer of a CUSTOM rule said no, or nothing.
    Custom,
    Deadline,
    /// So many are in flight, and nobody more may wait.
    Limit(u32),
    /// It waited in vain, or what matters more has the places.
    Shed,
    /// A rate, and how long it is until the next call fits.
    Rate(Duration),
}

impl Refusal {
    pub fn status(self) -> u16 {
        match self {
            Refusal::Method | Refusal::Path(_) => 400,
            Refusal::Redirect => 307,
            Refusal::NoIdentity | Refusal::Token | Refusal::NoToken => 401,
            Refusal::Denied | Refusal::Custom => 403,
            // gRPC's table turns 404 into UNIMPLEMENTED.
            Refusal::GrpcMethod => 404,
            Refusal::Trace => 405,
            Refusal::TargetTooLong => 414,
            Refusal::Headers(fault) => fault.status(),
            Refusal::Rate(_) => 429,
            Refusal::NotReady | Refusal::Limit(_) | Refusal::Shed => 503,
            Refusal::Deadline => 504,
        }
    }

    /// It is about how much we can do, and not about who asks for what.
    pub fn is_of_admission(self) -> bool {
        matches!(self, Refusal::Limit(_) | Refusal::Shed | Refusal::Rate(_))
    }

    /// The same as a code of gRPC.
    pub fn grpc_status(self) -> u16 {
        match self {
            Refusal::NoIdentity | Refusal::Token | Refusal::NoToken => 16,
            Refusal::Denied | Refusal::Custom => 7,
            Refusal::Rate(_) => 8,
            Refusal::NotReady | Refusal::Limit(_) | Refusal::Shed => 14,
            Refusal::Deadline => 4,
            _ => 12,
        }
    }

    pub fn reason(self) -> &'static str {
        match self {
            Refusal::NotReady => "server.not_ready",
            Refusal::TargetTooLong | Refusal::Path(_) => "secure.path",
            Refusal::Method | Refusal::Trace | Refusal::GrpcMethod => "secure.method",
            Refusal::Headers(_) => "secure.headers",
            Refusal::NoIdentity => "secure.no_identity",
            Refusal::Redirect => "secure.redirect",
            Refusal::Token | Refusal::NoToken => "secure.jwt",
            Refusal::Denied => "secure.denied",
            Refusal::Custom => "secure.custom",
            Refusal::Rate(_) => "admit.rate",
            Refusal::Deadline => "deadline.exceeded",
            Refusal::Limit(_) => "admit.limit",
            Refusal::Shed => "admit.shed",
        }
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Refusal::NotReady => f.write_str("no policy is loaded yet, and nothing is let in without one."),
            Refusal::TargetTooLong => write!(f, "the target is longer than {LONGEST_TARGET} bytes."),
            Refusal::Method => f.write_str("the method is no upper-case word; servers differ in what they make of it."),
            Refusal::Trace => f.write_str("TRACE and CONNECT are never let in: one gives back what proxies added, the other asks for a tunnel."),
            Refusal::GrpcMethod => {
                f.write_str("the method is not /package.Service/Method; gRPC names are exact and never normalised.")
            }
            Refusal::Headers(fault) => write!(f, "{fault}."),
            Refusal::Path(error) => write!(f, "{error}."),
            Refusal::NoIdentity => f.write_str("the caller proved no identity, and mode enforce lets nobody in without one."),
            Refusal::Redirect => {
                f.write_str("the target is not in canonical form, and `paths: redirect` sends the caller to the form that is.")
            }
            Refusal::Token => f.write_str("the caller showed a token that is no good."),
            Refusal::NoToken => f.write_str("the caller showed no token, and this is only for those with one."),
            Refusal::Denied => f.write_str("the caller is not allowed to do this."),
            Refusal::Custom => f.write_str("the authorizer that a custom rule names did not allow it."),
            Refusal::Rate(wait) => write!(
                f,
                "the caller is above a rate of `inbound.rate`; the next call fits in {:.1} s.",
                wait.as_secs_f64()
            ),
            Refusal::Deadline => {
                f.write_str("the caller's time was spent before a handler was asked; the caller, what stands before us, or this service is too slow.")
            }
            Refusal::Limit(most) => write!(
                f,
                "{most} calls are in flight, as many as `inbound.in_flight` (or with `inbound.adaptive` the latency) allows, and nobody more may wait; the service is too slow, or the limit too low."
            ),
            Refusal::Shed => f.write_str(
                "the service has more to do than it can, and what matters more, or came later, goes first: add instances, make it faster, or see `inbound.priority` and `inbound.shares`."
            ),
        }
    }
}
