//! Which header fields of a request does the handler get to see?
//!
//! A field that says who somebody is, or what another proxy has found out, is a claim, and counts only over connections that are
//! trusted to make it; so it is taken out of every request, and what the policy lets a trusted proxy say is put back by the driver.
//! Names with an underscore are the same name as their twin with a dash to a WSGI application, and go as well. The mesh's own are read
//! by the gate, and are for nobody else. Of two fields the value decides: a request id ends up in logs, and a range may ask for more
//! work than it says.
//!
//! It judges one field at a time and keeps nothing; trailers never come here, since headers are frozen when they are authorised.

/// What becomes of a field.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Passage {
    In,
    /// A claim that nobody here may make.
    Out,
    /// A request id that is a plain word.
    Id,
    /// One that isn't: it is replaced.
    BadId,
}

/// Exactly these.
const NAMES: [&[u8]; 20] = [
    b"forwarded",
    b"x-forwarded-for",
    b"x-forwarded-host",
    b"x-forwarded-port",
    b"x-forwarded-proto",
    b"x-real-ip",
    b"client-cert",
    b"client-cert-chain",
    b"x-spiffe-id",
    b"remote-user",
    b"x-remote-user",
    b"x-forwarded-user",
    b"x-forwarded-prefix",
    b"x-forwarded-uri",
    b"x-forwarded-method",
    // A framework that obeys them runs another method than the one that was authorised.
    b"x-http-method-override",
    b"x-http-method",
    b"x-method-override",
    b"x-b3-sampled",
    b"x-b3-flags",
];

/// And whatever begins like these.
const FAMILIES: [&[u8]; 17] = [
    b"x-mesh-",
    b"x-envoy-",
    b"l5d-",
    b"ssl-client-",
    b"x-ssl-",
    b"x-tls-",
    b"x-client-",
    b"x-arr-",
    b"x-amzn-mtls-",
    b"x-forwarded-client-cert",
    b"x-forwarded-tls-",
    b"x-auth-request-",
    b"x-amzn-oidc-",
    b"x-goog-authenticated-",
    b"x-original-",
    b"x-rewrite-",
    // What was asked of us about our load is answered by us.
    b"endpoint-load-metrics",
];

/// A longer range, or one of more parts, is meant to cost more than it says; a server may ignore it (RFC 9110 section 14.2).
const LONGEST_RANGE: usize = 1024;
const MOST_RANGES: usize = 32;
const LONGEST_ID: usize = 128;

/// Servers hand out lower case; one that does not must not open a gap.
pub fn passage(name: &[u8], value: &[u8]) -> Passage {
    if !name.iter().any(u8::is_ascii_uppercase) {
        return judge(name, value);
    }
    judge(&name.to_ascii_lowercase(), value)
}

fn judge(name: &[u8], value: &[u8]) -> Passage {
    match name.first() {
        // Nearly every name is told to be none of them by its first letter.
        Some(b'x' | b'f' | b'c' | b'r' | b'l' | b's' | b'e') => {}
        _ if name.contains(&b'_') => return Passage::Out,
        _ => return Passage::In,
    }
    if name.contains(&b'_') || NAMES.contains(&name) || FAMILIES.iter().any(|family| name.starts_with(family)) {
        return Passage::Out;
    }
    match name {
        b"x-request-id" if is_word(value) => Passage::Id,
        b"x-request-id" => Passage::BadId,
        b"range"
            if value.len() > LONGEST_RANGE || value.iter().filter(|byte| **byte == b',').count() >= MOST_RANGES =>
        {
            Passage::Out
        }
        _ => Passage::In,
    }
}

fn is_word(value: &[u8]) -> bool {
    (1..=LONGEST_ID).contains(&value.len())
        && value.iter().all(|byte| byte.is_ascii_alphanumeric() || b"-._~+/=:".contains(byte))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_claim_does_not_get_in_however_it_is_written() {
        for name in [
            "forwarded",
            "X-Forwarded-For",
            "x-forwarded-client-cert",
            "x-forwarded-client-cert-2",
            "x-mesh-peer",
            "X-ENVOY-original-path",
            "l5d-client-id",
            "ssl-client-verify",
            "remote-user",
            "remote_user",
            "user_agent",
            "x_ok",
            "a_b",
            "endpoint-load-metrics-format",
        ] {
            assert_eq!(passage(name.as_bytes(), b"1"), Passage::Out, "{name}");
        }
    }

    #[test]
    fn what_claims_nothing_gets_in() {
        for name in [
            "host",
            "cookie",
            "accept",
            "x-tenant",
            "x-clients",
            "forwarded-by",
            "ssl",
            "range",
            "",
            "traceparent",
            "expect",
        ] {
            assert_eq!(passage(name.as_bytes(), b"1"), Passage::In, "{name}");
        }
    }

    #[test]
    fn a_request_id_is_a_plain_word() {
        assert_eq!(passage(b"x-request-id", b"0af7-65.1_x"), Passage::Id);
        assert_eq!(passage(b"X-Request-Id", b"0af7-65.1~x+/=:"), Passage::Id);
        for value in [&b""[..], b"a b", b"a\r\nb", &[b'a'; 129]] {
            assert_eq!(passage(b"x-request-id", value), Passage::BadId);
        }
    }

    #[test]
    fn a_range_that_asks_for_too_much_is_left_out() {
        assert_eq!(passage(b"range", b"bytes=0-1,5-9"), Passage::In);
        assert_eq!(passage(b"range", &[b'0'; 1025]), Passage::Out);
        assert_eq!(passage(b"Range", format!("bytes={}", "0-1,".repeat(32)).as_bytes()), Passage::Out);
    }
}
