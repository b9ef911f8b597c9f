//! Why may a call not go on, and which status, word and sentence does that get?
//!
//! The status is for the caller, the word for programs, the sentence for the one who runs the service. A table, and nothing else.
use std::fmt;

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
    NoIdentity,
    Denied,
    Deadline,
    Limit(u32),
}

impl Refusal {
    pub fn status(self) -> u16 {
        match self {
            Refusal::Method | Refusal::Path(_) => 400,
            Refusal::NoIdentity => 401,
            Refusal::Denied => 403,
            // gRPC's table turns 404 into UNIMPLEMENTED.
            Refusal::GrpcMethod => 404,
            Refusal::Trace => 405,
            Refusal::TargetTooLong => 414,
            Refusal::Headers(fault) => fault.status(),
            Refusal::NotReady | Refusal::Limit(_) => 503,
            Refusal::Deadline => 504,
        }
    }

    /// The same as a code of gRPC.
    pub fn grpc_status(self) -> u16 {
        match self {
            Refusal::NoIdentity => 16,
            Refusal::Denied => 7,
            Refusal::NotReady | Refusal::Limit(_) => 14,
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
            Refusal::Denied => "secure.denied",
            Refusal::Deadline => "deadline.exceeded",
            Refusal::Limit(_) => "admit.limit",
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
            Refusal::Denied => f.write_str("the caller is not allowed to do this."),
            Refusal::Deadline => {
                f.write_str("the caller's time was spent on arrival; the caller, or what stands before us, is too slow.")
            }
            Refusal::Limit(most) => write!(
                f,
                "{most} calls are in flight, as many as `admit.in_flight` allows; the service is too slow, or the limit too low."
            ),
        }
    }
}
