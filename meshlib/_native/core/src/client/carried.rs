//! What does an attempt tell the next hop? How long there is time, which attempt it is, and which trace it belongs to; and where
//! endpoints are weighed by their load, that we want to be told of it.
//!
//! These are ours alone to say: what the application forwards of an incoming call under the same names would contradict it, and is
//! left out. A trace that the application wrote by hand is the exception, since then it is meant. No header is parsed here.
use std::time::Duration;

use crate::random::Random;

pub const DEADLINE: &str = "x-mesh-deadline-ms";
pub const ATTEMPT: &str = "x-mesh-attempt";
pub const TRACEPARENT: &str = "traceparent";
pub const TRACESTATE: &str = "tracestate";
/// Asks for a report of the load (ORCA); what is read of it is `balance::orca::parse`'s.
pub const LOAD_FORMAT: &str = "endpoint-load-metrics-format";
/// The shortest of the formats that all who report at all can write.
pub const LOAD_TEXT: &str = "text";
/// Our key in `tracestate`, as `server::headers` reads it.
const STATE: &str = "meshlib";

/// Taken from the deadline that the next hop is told: its answer needs time to travel back.
const HOP_MARGIN: Duration = Duration::from_millis(5);

/// Whether a header of the application is in our place.
pub fn is_ours(name: &[u8]) -> bool {
    (name.len() == DEADLINE.len() && name.eq_ignore_ascii_case(DEADLINE.as_bytes()))
        || (name.len() == ATTEMPT.len() && name.eq_ignore_ascii_case(ATTEMPT.as_bytes()))
}

pub fn is_trace(name: &[u8]) -> bool {
    name.len() == TRACEPARENT.len() && name.eq_ignore_ascii_case(TRACEPARENT.as_bytes())
}

pub fn is_state(name: &[u8]) -> bool {
    name.len() == TRACESTATE.len() && name.eq_ignore_ascii_case(TRACESTATE.as_bytes())
}

pub fn is_load_format(name: &[u8]) -> bool {
    name.len() == LOAD_FORMAT.len() && name.eq_ignore_ascii_case(LOAD_FORMAT.as_bytes())
}

/// The state of a trace with our attempt in front (the newest entry stands first, W3C Trace Context 3.3), in the place of an older one:
/// a hop that knows nothing but traces hands it on, and whoever is behind it doesn't retry what is retried here.
pub fn tracestate(attempt: u32, given: &[u8]) -> Vec<u8> {
    let mut state = format!("{STATE}={attempt}").into_bytes();
    let is_old = |member: &&[u8]| member.strip_prefix(STATE.as_bytes()).is_some_and(|rest| rest.first() == Some(&b'='));
    let members = given.split(|byte| *byte == b',').map(<[u8]>::trim_ascii);
    // 32 in all (W3C): the oldest stand last.
    for member in members.filter(|member| !member.is_empty() && !is_old(member)).take(31) {
        state.push(b',');
        state.extend_from_slice(member);
    }
    state
}

/// Milliseconds that the next hop has; never 0, which some would read as "none".
pub fn deadline_ms(now: Duration, end: Duration) -> u64 {
    u64::try_from(end.saturating_sub(now).saturating_sub(HOP_MARGIN).as_millis()).unwrap_or(u64::MAX).max(1)
}

/// A new trace, for a call that belongs to none. Sampled by the low half of its id, as OpenTelemetry's ratio sampler does, so that
/// all processes with the same share decide alike.
pub fn traceparent(random: &Random, sample: f64) -> String {
    let (high, low, span) = (random.next(), random.next(), random.next());
    let trace = (u128::from(high) << 64 | u128::from(low)).max(1);
    let bound = (sample.clamp(0.0, 1.0) * 2f64.powi(64)).round() as u128;
    let flags = u8::from(u128::from(low) < bound);
    format!("00-{trace:032x}-{:016x}-{flags:02x}", span.max(1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_compared_without_case() {
        assert!(is_ours(b"X-Mesh-Deadline-MS") && is_ours(b"x-mesh-attempt") && is_trace(b"TraceParent"));
        assert!(is_load_format(b"Endpoint-Load-Metrics-Format"));
        assert!(!is_ours(b"x-mesh-deadline") && !is_trace(b"tracestate") && !is_load_format(b"endpoint-load-metrics"));
    }

    #[test]
    fn the_attempt_stands_first_in_the_state_and_once() {
        assert_eq!(tracestate(1, b""), b"meshlib=1");
        assert_eq!(tracestate(2, b"a=b, meshlib=1 ,c=d"), b"meshlib=2,a=b,c=d");
    }

    #[test]
    fn the_next_hop_has_less_time_than_we_have_and_never_none() {
        let now = Duration::from_secs(10);
        assert_eq!(deadline_ms(now, Duration::from_secs(12)), 1995);
        assert_eq!(deadline_ms(now, Duration::from_millis(10_003)), 1);
        assert_eq!(deadline_ms(now, Duration::from_secs(3)), 1);
    }

    #[test]
    fn a_new_trace_has_the_form_of_the_standard() {
        let random = Random::new(7);
        let made = traceparent(&random, 1.0);
        assert_eq!((made.len(), made.get(..3), made.get(52..)), (55, Some("00-"), Some("-01")));
        assert!(traceparent(&random, 0.0).ends_with("-00"));
        assert_ne!(made, traceparent(&random, 1.0));
    }

    #[test]
    fn the_share_of_sampled_traces_is_what_was_asked() {
        let random = Random::new(3);
        let sampled = (0..10_000).filter(|_| traceparent(&random, 0.25).ends_with("-01")).count();
        assert!((2300..2700).contains(&sampled), "{sampled}");
    }
}
