//! What does a library ask of its node's agent, and what does the agent say back? The header fields between the two, read and written.
//!
//! A request on the data socket names its endpoint in `x-mesh-*` fields; an answer that the agent made itself carries
//! `x-mesh-failed`; a request that is handed over to an application carries one `x-mesh-handed`. These fields are for one hop: they
//! are taken away before a message goes on, also where somebody wrote them with underscores, since servers that follow CGI can't
//! tell the two apart.
//!
//! It does not judge whether an endpoint may be called: who may is for the one at its other end.
use core::net::{IpAddr, Ipv6Addr};
use std::time::Duration;

use x509_parser::prelude::{FromDer, X509Certificate};

use crate::spiffe;
use crate::tls::crypto::digest;

pub const ENDPOINT: &str = "x-mesh-endpoint";
pub const EXPECT: &str = "x-mesh-expect";
pub const PROTOCOL: &str = "x-mesh-protocol";
pub const CONNECT: &str = "x-mesh-connect";
/// As which of the identities that the caller was attested for: its first one, if it doesn't say.
pub const AS: &str = "x-mesh-as";
pub const FAILED: &str = "x-mesh-failed";
pub const HANDED: &str = "x-mesh-handed";

/// Without a word of the caller: the default of `admit.connect`.
const CONNECT_WITHIN: Duration = Duration::from_secs(1);
/// The longest patience that may be asked for.
const CONNECT_AT_MOST: Duration = Duration::from_secs(60);
/// A path of a UNIX socket, as the kernel has room for it.
const MAX_PATH: usize = 107;
const MAX_HOST: usize = 253;

/// Is this a field of the one hop between library and agent?
pub fn is_hop_field(name: &str) -> bool {
    let [x, first, m, e, s, h, second, ..] = name.as_bytes() else { return false };
    let is_between = |byte: &u8| matches!(byte, b'-' | b'_');
    if !(is_between(first) && is_between(second) && [*x, *m, *e, *s, *h].eq_ignore_ascii_case(b"xmesh")) {
        return false;
    }
    let rest = name.get(7..).unwrap_or_default();
    ["endpoint", "expect", "protocol", "connect", "as", "failed", "handed"]
        .iter()
        .any(|known| rest.eq_ignore_ascii_case(known))
}

/// Where a request is to go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Endpoint<'a> {
    Ip(IpAddr, u16),
    Name(&'a str, u16),
    Unix(&'a str),
}

/// What is spoken there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Spoken {
    Http1,
    Http2,
}

/// One request's wish, as its fields say it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ask<'a> {
    /// As it was written.
    pub address: &'a str,
    pub endpoint: Endpoint<'a>,
    /// The SPIFFE ID that must be proved; None for plain text.
    pub expect: Option<&'a str>,
    pub spoken: Spoken,
    pub connect: Duration,
}

/// Reads the four fields; the error is for the developer of the caller.
pub fn read<'a>(
    endpoint: &'a str,
    expect: Option<&'a str>,
    protocol: Option<&'a str>,
    connect: Option<&'a str>,
) -> Result<Ask<'a>, &'static str> {
    let expect = match expect {
        None => return Err("x-mesh-expect is missing: name the SPIFFE ID of the endpoint, or \"-\" for plain text"),
        Some("-") => None,
        Some(id) => match spiffe::parse(id) {
            Ok(parsed) if !parsed.path.is_empty() => Some(id),
            _ => return Err("x-mesh-expect is neither the SPIFFE ID of a workload nor \"-\""),
        },
    };
    let spoken = match protocol {
        None | Some("http1") => Spoken::Http1,
        Some("http2") => Spoken::Http2,
        Some(_) => return Err("x-mesh-protocol is neither http1 nor http2"),
    };
    let connect = match connect {
        None => CONNECT_WITHIN,
        Some(text) => {
            if text.is_empty() || text.len() > 9 || !text.bytes().all(|byte| byte.is_ascii_digit()) {
                return Err("x-mesh-connect is not a number of milliseconds");
            }
            let millis = text.parse().map_err(|_| "x-mesh-connect is not a number of milliseconds")?;
            Duration::from_millis(millis).clamp(Duration::from_millis(1), CONNECT_AT_MOST)
        }
    };
    Ok(Ask { address: endpoint, endpoint: read_endpoint(endpoint)?, expect, spoken, connect })
}

/// `host:port`, `[v6]:port` or `unix:/path`.
pub fn read_endpoint(text: &str) -> Result<Endpoint<'_>, &'static str> {
    let wrong = "x-mesh-endpoint is none of host:port, [v6]:port and unix:/path";
    if let Some(path) = text.strip_prefix("unix:") {
        let is_fine =
            path.starts_with('/') && path.len() <= MAX_PATH && path.bytes().all(|byte| byte > 0x20 && byte != 0x7f);
        return if is_fine { Ok(Endpoint::Unix(path)) } else { Err(wrong) };
    }
    let (host, port) = text.rsplit_once(':').ok_or(wrong)?;
    if port.is_empty() || port.len() > 5 || !port.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err(wrong);
    }
    let port = port.parse::<u16>().ok().filter(|port| *port > 0).ok_or(wrong)?;
    if let Some(inner) = host.strip_prefix('[') {
        let address = inner.strip_suffix(']').and_then(|inner| inner.parse::<Ipv6Addr>().ok()).ok_or(wrong)?;
        return Ok(Endpoint::Ip(IpAddr::V6(address), port));
    }
    if let Ok(address) = host.parse::<IpAddr>() {
        return if address.is_ipv4() { Ok(Endpoint::Ip(address, port)) } else { Err(wrong) };
    }
    let is_name = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_');
    // What is all digits and dots and no address would be taken for one by some resolvers (010.1, 2130706433).
    let is_number = host.bytes().all(|byte| byte.is_ascii_digit() || byte == b'.');
    if host.is_empty() || host.len() > MAX_HOST || is_number || !host.bytes().all(is_name) {
        return Err(wrong);
    }
    Ok(Endpoint::Name(host, port))
}

/// Why the one attempt failed before its answer had a head.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Reason {
    Connect,
    ConnectTimeout,
    Identity,
    Tls,
    Unwritten,
    Stale,
    Declined,
    Closed,
    Protocol,
    /// The agent itself can't: nothing was tried.
    Agent,
    /// The caller's own doing: his request is malformed, or its body doesn't come.
    Caller,
}

impl Reason {
    pub const ALL: [Reason; 11] = [
        Reason::Connect,
        Reason::ConnectTimeout,
        Reason::Identity,
        Reason::Tls,
        Reason::Unwritten,
        Reason::Stale,
        Reason::Declined,
        Reason::Closed,
        Reason::Protocol,
        Reason::Agent,
        Reason::Caller,
    ];

    pub fn word(self) -> &'static str {
        match self {
            Reason::Connect => "connect",
            Reason::ConnectTimeout => "connect_timeout",
            Reason::Identity => "identity",
            Reason::Tls => "tls",
            Reason::Unwritten => "unwritten",
            Reason::Stale => "stale",
            Reason::Declined => "declined",
            Reason::Closed => "closed",
            Reason::Protocol => "protocol",
            Reason::Agent => "agent",
            Reason::Caller => "caller",
        }
    }
}

/// The value of `x-mesh-failed`.
pub fn failed(reason: Reason, is_written: bool) -> String {
    format!("{}; written={}", reason.word(), u8::from(is_written))
}

/// What an application is told of a connection that was ended for it.
#[derive(Clone, Debug, Default)]
pub struct Handed<'a> {
    pub secret: &'a str,
    /// "TLSv1.3"; empty for plain text.
    pub tls: &'a str,
    pub id: &'a str,
    pub not_after: u64,
    /// Of the leaf, as DER has it.
    pub serial: &'a [u8],
    pub sha256: &'a [u8],
    pub address: &'a str,
    pub port: u16,
    pub sni: &'a str,
}

/// The value of `x-mesh-handed`. A name that could not stand in it (it comes from the caller) is left out.
pub fn handed(facts: &Handed<'_>) -> String {
    let mut text = String::with_capacity(256 + facts.id.len() + facts.sni.len());
    let is_plain =
        |value: &str| value.bytes().all(|byte| (0x21..=0x7e).contains(&byte) && byte != b';' && byte != b',');
    let mut part = |name: &str, value: &str| {
        text.push_str(if text.is_empty() { "" } else { ";" });
        text.push_str(name);
        text.push('=');
        text.push_str(if is_plain(value) { value } else { "" });
    };
    part("secret", facts.secret);
    part("tls", facts.tls);
    part("id", facts.id);
    part("not_after", &facts.not_after.to_string());
    part("serial", &hex(facts.serial));
    part("sha256", &hex(facts.sha256));
    part("address", facts.address);
    part("port", &facts.port.to_string());
    part("sni", facts.sni);
    text
}

/// Serial number (without leading zeros) and SHA-256 of a certificate.
pub fn marks(der: &[u8]) -> (Vec<u8>, Vec<u8>) {
    let serial =
        X509Certificate::from_der(der).map(|(_, certificate)| certificate.raw_serial().to_vec()).unwrap_or_default();
    let zeros = serial.iter().take_while(|byte| **byte == 0).count();
    let digest = digest::digest(&digest::SHA256, der);
    (serial.get(zeros..).unwrap_or_default().to_vec(), digest.as_ref().to_vec())
}

fn hex(bytes: &[u8]) -> String {
    let digit = |value: u8| char::from_digit(u32::from(value), 16).unwrap_or('0');
    bytes.iter().flat_map(|byte| [digit(byte >> 4), digit(byte & 15)]).collect()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;

    #[test]
    fn an_endpoint_is_read_in_three_forms_and_no_other() {
        assert_eq!(Ok(Endpoint::Ip("10.0.0.7".parse().unwrap(), 8443)), read_endpoint("10.0.0.7:8443"));
        assert_eq!(Ok(Endpoint::Ip("::1".parse().unwrap(), 1)), read_endpoint("[::1]:1"));
        assert_eq!(Ok(Endpoint::Name("orders.internal", 80)), read_endpoint("orders.internal:80"));
        assert_eq!(Ok(Endpoint::Unix("/run/a.sock")), read_endpoint("unix:/run/a.sock"));
        for wrong in [
            "",
            ":1",
            "a",
            "a:",
            "a:0",
            "a:65536",
            "a:+1",
            "::1:80",
            "[::1]",
            "[a]:1",
            "unix:",
            "unix:a",
            "2130706433:1",
            "a b:1",
            "a/b:1",
        ] {
            assert!(read_endpoint(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn an_ask_says_whom_it_expects() {
        let ask = read("a:1", Some("spiffe://td/x"), Some("http2"), Some("250")).unwrap();
        assert_eq!(
            (Some("spiffe://td/x"), Spoken::Http2, Duration::from_millis(250)),
            (ask.expect, ask.spoken, ask.connect)
        );
        let plain = read("a:1", Some("-"), None, None).unwrap();
        assert_eq!((None, Spoken::Http1, Duration::from_secs(1)), (plain.expect, plain.spoken, plain.connect));
        assert_eq!(CONNECT_AT_MOST, read("a:1", Some("-"), None, Some("999999999")).unwrap().connect);
        assert!(read("a:1", None, None, None).is_err());
        assert!(read("a:1", Some("spiffe://td"), None, None).is_err());
        assert!(read("a:1", Some("-"), Some("h3"), None).is_err());
        assert!(read("a:1", Some("-"), None, Some("-5")).is_err());
    }

    #[test]
    fn hop_fields_are_known_in_every_spelling() {
        for name in ["x-mesh-handed", "X-Mesh-Handed", "x_mesh_handed", "x-mesh_failed", "x-mesh-endpoint"] {
            assert!(is_hop_field(name), "{name}");
        }
        for name in ["x-mesh-attempt", "x-mesh-deadline-ms", "x-meshhanded", "x-mesh-", "host", "x-mesh-handed-by"] {
            assert!(!is_hop_field(name), "{name}");
        }
    }

    #[test]
    fn what_is_handed_over_can_not_be_forged_by_a_name() {
        let facts = Handed {
            secret: "ab",
            tls: "TLSv1.3",
            id: "spiffe://td/x",
            not_after: 7,
            serial: &[0, 255],
            sni: "a;id=y",
            ..Handed::default()
        };
        assert_eq!(
            "secret=ab;tls=TLSv1.3;id=spiffe://td/x;not_after=7;serial=00ff;sha256=;address=;port=0;sni=",
            handed(&facts)
        );
    }

    #[test]
    fn a_failure_is_one_word_and_one_digit() {
        assert_eq!("connect_timeout; written=0", failed(Reason::ConnectTimeout, false));
        assert_eq!(
            Reason::ALL.len(),
            Reason::ALL.iter().map(|reason| reason.word()).collect::<std::collections::HashSet<_>>().len()
        );
    }
}
