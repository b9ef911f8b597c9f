//! Is the list of headers sound, and how much time does it leave?
//!
//! One pass over the list as the server parsed it, field by field, so that nothing is copied. It refuses what two parsers read in
//! two ways (two Hosts, two framings, names that are no names): the request behind such a list is not the one that was checked.
//! Time limits of three kinds are understood; the shortest counts, none is believed beyond an hour, and an unreadable one is
//! ignored, since it can only hurt its sender. What the policy in force asks about (rules, tokens, rates) is kept on the way, and
//! nothing else. It does not judge identity headers: no header ever carries an identity here.
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use super::plan::Snapshot;
use crate::admit::priority::Priority;

/// No caller keeps us busy for longer than this by asking for it.
pub const LONGEST: Duration = Duration::from_secs(3600);
const MOST_FIELDS: u32 = 100;
/// Names and values together, with what separates them on the wire.
const MOST_BYTES: usize = 60 * 1024;
/// A longer Range counts as none, as RFC 9110 section 14.2 allows: it is meant to cost more than it says.
const LONGEST_RANGE: usize = 1024;
/// Our key in `tracestate`, as `client::carried` writes it.
const STATE: &str = "meshlib";

/// Made by `Gate::headers`, under whose policy it reads; feed it each field, then hand it to `Gate::begin`.
#[derive(Debug, Default)]
pub struct Headers {
    pub(super) snapshot: Option<Arc<Snapshot>>,
    pub(super) kept: Vec<Kept>,
    is_host_wanted: bool,
    version: Version,
    host: Option<Vec<u8>>,
    fields: u32,
    bytes: usize,
    hosts: u32,
    lengths: u32,
    encodings: u32,
    remaining: Option<Duration>,
    layer: u32,
    priority: Option<Priority>,
    load_format: LoadFormat,
    fault: Option<HeaderFault>,
}

/// In which form the caller wants to be told of our load (ORCA), if it does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum LoadFormat {
    #[default]
    Nothing,
    Text,
    Json,
}

impl LoadFormat {
    /// What can't be read is not asked for.
    fn named(value: &[u8]) -> Self {
        match value.trim_ascii() {
            word if word.eq_ignore_ascii_case(b"text") => Self::Text,
            word if word.eq_ignore_ascii_case(b"json") => Self::Json,
            _ => Self::Nothing,
        }
    }

    pub fn word(self) -> &'static str {
        match self {
            Self::Nothing => "",
            Self::Text => "text",
            Self::Json => "json",
        }
    }
}

/// As which protocol the request came, as far as the driver knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Version {
    #[default]
    Unknown,
    Http10,
    Http11,
    /// HTTP/2 and later, which have framing of their own.
    Http2,
}

impl Version {
    /// As ASGI writes it.
    pub fn named(text: &str) -> Self {
        match text {
            "1.0" => Self::Http10,
            "1.1" => Self::Http11,
            "2" | "2.0" | "3" => Self::Http2,
            _ => Self::Unknown,
        }
    }
}

/// A field that the policy asks about: its lower-case name and its value.
pub type Kept = (Box<str>, Vec<u8>);

/// Which fields a policy asks about.
#[derive(Debug, Default)]
pub struct Wanted {
    names: Vec<Box<str>>,
    /// A bit for each length of a name: nearly every field is told to be none of them by this alone.
    lengths: u64,
    pub is_host: bool,
}

impl Wanted {
    pub fn new(names: impl IntoIterator<Item = Box<str>>, is_host: bool) -> Self {
        let mut names: Vec<Box<str>> = names.into_iter().map(|name| name.to_ascii_lowercase().into()).collect();
        names.sort_unstable();
        names.dedup();
        let lengths = names.iter().fold(0, |bits, name| bits | bit(name.len()));
        Self { names, lengths, is_host }
    }

    pub fn names(&self) -> &[Box<str>] {
        &self.names
    }

    fn find(&self, name: &[u8]) -> Option<&str> {
        if self.lengths & bit(name.len()) == 0 {
            return None;
        }
        self.names.iter().find(|wanted| name.eq_ignore_ascii_case(wanted.as_bytes())).map(|wanted| &**wanted)
    }
}

fn bit(length: usize) -> u64 {
    1 << length.min(63)
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HeaderFault {
    Name,
    Value,
    NoHost,
    Hosts,
    Host,
    Framing,
    Length,
    TooMany,
}

impl HeaderFault {
    pub fn status(self) -> u16 {
        if self == HeaderFault::TooMany {
            431
        } else {
            400
        }
    }
}

impl fmt::Display for HeaderFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            HeaderFault::Name => "a header's name has a character that names do not have",
            HeaderFault::Value => "a header's value has a NUL or a line break",
            HeaderFault::NoHost => "there is no Host header, which HTTP/1.1 demands",
            HeaderFault::Hosts => "there is more than one Host header",
            HeaderFault::Host => "the Host header is not the name of a host",
            HeaderFault::Framing => "Content-Length and Transfer-Encoding stand together or twice, or the coding is not chunked, or not of HTTP/1.1",
            HeaderFault::Length => "Content-Length is not a number",
            HeaderFault::TooMany => "there are more than 100 header fields, or more than 60 KiB of them",
        })
    }
}

impl Headers {
    /// The target decides whether Host has to be kept: an absolute one is compared with it, and rules may ask for it.
    pub(super) fn new(target: &[u8], snapshot: Option<Arc<Snapshot>>) -> Self {
        let is_asked = snapshot.as_ref().is_some_and(|snapshot| snapshot.wanted.is_host);
        Self { is_host_wanted: is_asked || target.first() != Some(&b'/'), snapshot, ..Self::default() }
    }

    /// In HTTP/1.1 a request without Host is malformed, and only there a body may come in chunks.
    pub fn came_as(&mut self, version: Version) {
        self.version = version;
    }

    pub fn field(&mut self, name: &[u8], value: &[u8]) {
        self.fields += 1;
        // A Range that asks for too much is ignored, and never handed on.
        if value.len() <= LONGEST_RANGE || !name.eq_ignore_ascii_case(b"range") {
            self.bytes = self.bytes.saturating_add(name.len()).saturating_add(value.len()).saturating_add(4);
        }
        if !is_token(name) {
            self.blame(HeaderFault::Name);
        }
        if value.iter().fold(false, |found, byte| found | matches!(byte, 0 | b'\r' | b'\n')) {
            self.blame(HeaderFault::Value);
        }
        if let Some(wanted) = self.snapshot.as_ref().and_then(|snapshot| snapshot.wanted.find(name)) {
            self.kept.push((wanted.into(), value.to_vec()));
        }
        let is = |wanted: &str| name.eq_ignore_ascii_case(wanted.as_bytes());
        match name.len() {
            4 if is("host") => self.host(value),
            14 if is("x-mesh-attempt") => self.count(attempt(value)),
            21 if is("x-envoy-attempt-count") => self.count(envoy_attempt(value)),
            10 if is("tracestate") => self.count(carried(value).map_or(0, attempt)),
            14 if is("content-length") => {
                self.lengths += 1;
                if value.is_empty() || !value.iter().all(u8::is_ascii_digit) {
                    self.blame(HeaderFault::Length);
                }
            }
            17 if is("transfer-encoding") => {
                self.encodings += 1;
                // Every other coding, and every list of them, is read differently by somebody.
                if !value.trim_ascii().eq_ignore_ascii_case(b"chunked") {
                    self.blame(HeaderFault::Framing);
                }
            }
            18 if is("x-mesh-deadline-ms") => self.leave(milliseconds(value)),
            12 if is("grpc-timeout") => self.leave(grpc_timeout(value)),
            30 if is("x-envoy-expected-rq-timeout-ms") => self.leave(milliseconds(value)),
            15 if is("x-mesh-priority") => self.claim(value),
            28 if is("endpoint-load-metrics-format") => self.load_format = LoadFormat::named(value),
            _ => {}
        }
    }

    fn host(&mut self, value: &[u8]) {
        self.hosts += 1;
        let is_host = |byte: &u8| byte.is_ascii_alphanumeric() || b"-._~!$&'()*+;=%:[]".contains(byte);
        if value.is_empty() || !value.iter().all(is_host) {
            self.blame(HeaderFault::Host);
        }
        if self.is_host_wanted {
            self.host = Some(value.to_vec());
        }
    }

    fn blame(&mut self, fault: HeaderFault) {
        self.fault.get_or_insert(fault);
    }

    fn leave(&mut self, remaining: Option<Duration>) {
        if let Some(remaining) = remaining {
            let remaining = remaining.min(LONGEST);
            self.remaining = Some(self.remaining.map_or(remaining, |shortest| shortest.min(remaining)));
        }
    }

    /// Of two claims the lower one counts, and what is no level claims nothing.
    fn claim(&mut self, value: &[u8]) {
        let claimed = Priority::named(value).unwrap_or_default();
        self.priority = Some(self.priority.map_or(claimed, |other| other.min(claimed)));
    }

    /// What the caller says of how much it matters. Who is believed, the plan says.
    pub fn priority(&self) -> Option<Priority> {
        self.priority
    }

    pub fn load_format(&self) -> LoadFormat {
        self.load_format
    }

    fn count(&mut self, layer: u32) {
        self.layer = self.layer.max(layer);
    }

    /// In which attempt of a caller we run, however it was told: 0 in the first. Above 0 somebody further up retries.
    pub fn layer(&self) -> u32 {
        self.layer
    }

    pub fn fault(&self) -> Option<HeaderFault> {
        if self.fields > MOST_FIELDS || self.bytes > MOST_BYTES {
            Some(HeaderFault::TooMany)
        } else if self.fault.is_some() {
            self.fault
        } else if self.hosts > 1 {
            Some(HeaderFault::Hosts)
        } else if self.hosts == 0 && self.version == Version::Http11 {
            Some(HeaderFault::NoHost)
        } else if self.lengths + self.encodings > 1 || (self.encodings > 0 && self.version == Version::Http10) {
            Some(HeaderFault::Framing)
        } else {
            None
        }
    }

    pub fn host_value(&self) -> Option<&[u8]> {
        self.host.as_deref()
    }

    /// The time that the caller leaves us; zero: it is spent.
    pub fn remaining(&self) -> Option<Duration> {
        self.remaining
    }
}

/// What can't be read counts as a retry: then we don't retry too.
fn attempt(value: &[u8]) -> u32 {
    match std::str::from_utf8(value) {
        Ok(text) if text.len() < 4 => text.parse().unwrap_or(1),
        _ => 1,
    }
}

/// Envoy counts from 1.
fn envoy_attempt(value: &[u8]) -> u32 {
    match std::str::from_utf8(value).ok().filter(|text| text.len() < 4).and_then(|text| text.parse::<u32>().ok()) {
        Some(count) => count.saturating_sub(1),
        None => 1,
    }
}

/// Our member of a trace's state: it passes through hops that know nothing but traces.
fn carried(value: &[u8]) -> Option<&[u8]> {
    let members = value.split(|byte| *byte == b',').map(<[u8]>::trim_ascii);
    members.filter_map(|member| member.strip_prefix(STATE.as_bytes())?.strip_prefix(b"=")).next()
}

fn is_token(name: &[u8]) -> bool {
    let is_bad = |byte: u8| {
        !(byte.is_ascii_alphanumeric()
            || matches!(
                byte,
                b'!' | b'#' | b'$' | b'%' | b'&' | b'\'' | b'*' | b'+' | b'-' | b'.' | b'^' | b'_' | b'`' | b'|' | b'~'
            ))
    };
    !name.is_empty() && !name.iter().fold(false, |found, byte| found | is_bad(*byte))
}

/// A whole number of at most 8 digits; more digits are more than an hour in every unit but nanoseconds, and are cut there.
/// A negative number is a time that is spent.
fn number(text: &[u8]) -> Option<u64> {
    let (is_negative, digits) = match text {
        [b'-', digits @ ..] => (true, digits),
        _ => (false, text),
    };
    if digits.is_empty() || !digits.iter().all(u8::is_ascii_digit) {
        return None;
    }
    let value = digits.iter().fold(0u64, |sum, digit| sum.saturating_mul(10).saturating_add(u64::from(digit - b'0')));
    Some(if is_negative { 0 } else { value })
}

fn milliseconds(value: &[u8]) -> Option<Duration> {
    number(value).map(Duration::from_millis)
}

/// As in gRPC over HTTP/2: digits and a unit. More than 8 digits are no gRPC; they mean the longest time.
fn grpc_timeout(value: &[u8]) -> Option<Duration> {
    let (unit, digits) = value.split_last()?;
    let count = number(digits)?;
    if digits.len() > 8 {
        return Some(if count == 0 { Duration::ZERO } else { LONGEST });
    }
    Some(match unit {
        b'H' => Duration::from_secs(count.saturating_mul(3600)),
        b'M' => Duration::from_secs(count.saturating_mul(60)),
        b'S' => Duration::from_secs(count),
        b'm' => Duration::from_millis(count),
        b'u' => Duration::from_micros(count),
        b'n' => Duration::from_nanos(count),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(fields: &[(&str, &str)]) -> Headers {
        let mut headers = Headers::new(b"http://h/", None);
        for (name, value) in fields {
            headers.field(name.as_bytes(), value.as_bytes());
        }
        headers
    }

    #[test]
    fn what_two_parsers_read_differently_is_refused() {
        for (fields, fault) in [
            (&[("host", "a"), ("Host", "a")][..], HeaderFault::Hosts),
            (&[("content-length", "1"), ("transfer-encoding", "chunked")], HeaderFault::Framing),
            (&[("content-length", "1"), ("content-length", "1")], HeaderFault::Framing),
            (&[("content-length", "+1")], HeaderFault::Length),
            (&[("transfer-encoding", "identity, chunked")], HeaderFault::Framing),
            (&[("transfer-encoding", "chunked, chunked")], HeaderFault::Framing),
            (&[("transfer-encoding", "\u{b}chunked")], HeaderFault::Framing),
            (&[("host", "")], HeaderFault::Host),
            (&[("x-a\u{1}", "")], HeaderFault::Name),
            (&[("x a", "")], HeaderFault::Name),
            (&[("", "")], HeaderFault::Name),
            (&[("x-role", "ad\0min")], HeaderFault::Value),
            (&[("x-role", "user\r\nx-role: admin")], HeaderFault::Value),
            (&[("host", "a b")], HeaderFault::Host),
            (&[("host", "a/b")], HeaderFault::Host),
        ] {
            assert_eq!(read(fields).fault(), Some(fault), "{fields:?}");
        }
        assert_eq!(read(&[("host", "[::1]:80"), ("content-length", "5"), ("x-y", "z\u{e9}")]).fault(), None);
    }

    #[test]
    fn a_hundred_fields_are_enough() {
        let fields = vec![("x-a", "1"); 101];
        assert_eq!(read(&fields).fault(), Some(HeaderFault::TooMany));
        assert_eq!(read(fields.get(1..).unwrap_or_default()).fault(), None);
    }

    #[test]
    fn what_each_version_demands_is_there() {
        let fault = |version, fields: &[(&str, &str)]| {
            let mut headers = read(fields);
            headers.came_as(version);
            headers.fault()
        };
        assert_eq!(fault(Version::Http11, &[]), Some(HeaderFault::NoHost));
        assert_eq!(fault(Version::Http10, &[]), None);
        assert_eq!(fault(Version::Http2, &[]), None);
        let chunked = [("host", "a"), ("transfer-encoding", "Chunked")];
        assert_eq!(fault(Version::Http11, &chunked), None);
        assert_eq!(fault(Version::Http10, &chunked), Some(HeaderFault::Framing));
    }

    #[test]
    fn sixty_kibibytes_are_enough() {
        let long = "x".repeat(30_000);
        assert_eq!(read(&[("x-a", &long), ("x-b", &long)]).fault(), None);
        assert_eq!(read(&[("x-a", &long), ("x-b", &long), ("x-c", &long)]).fault(), Some(HeaderFault::TooMany));
    }

    #[test]
    fn the_shortest_time_counts() {
        for (fields, expected) in [
            (&[("x-mesh-deadline-ms", "1500")][..], Some(Duration::from_millis(1500))),
            (&[("grpc-timeout", "2S"), ("x-envoy-expected-rq-timeout-ms", "500")], Some(Duration::from_millis(500))),
            (&[("grpc-timeout", "20m")], Some(Duration::from_millis(20))),
            (&[("grpc-timeout", "99999999H")], Some(LONGEST)),
            (&[("grpc-timeout", "99999999999999999n")], Some(LONGEST)),
            (&[("grpc-timeout", "100000000n")], Some(LONGEST)),
            (&[("grpc-timeout", "000000000S")], Some(Duration::ZERO)),
            (&[("grpc-timeout", "1x")], None),
            (&[("grpc-timeout", "S")], None),
            (&[("x-mesh-deadline-ms", "0")], Some(Duration::ZERO)),
            (&[("x-mesh-deadline-ms", "-20")], Some(Duration::ZERO)),
            (&[("x-mesh-deadline-ms", "99999999999999999999999999")], Some(LONGEST)),
            (&[("x-mesh-deadline-ms", "soon")], None),
            (&[("x-mesh-deadline-ms", "1.5")], None),
            (&[], None),
        ] {
            assert_eq!(read(fields).remaining(), expected, "{fields:?}");
        }
    }

    #[test]
    fn the_attempt_is_known_however_it_is_told() {
        let layer = |fields: &[(&str, &str)]| {
            let mut headers = Headers::new(b"/", None);
            fields.iter().for_each(|(name, value)| headers.field(name.as_bytes(), value.as_bytes()));
            headers.layer()
        };
        assert_eq!(layer(&[("host", "orders")]), 0);
        assert_eq!(layer(&[("X-Mesh-Attempt", "2")]), 2);
        // Envoy counts from 1.
        assert_eq!((layer(&[("x-envoy-attempt-count", "1")]), layer(&[("x-envoy-attempt-count", "3")])), (0, 2));
        assert_eq!(layer(&[("tracestate", "rojo=00f067aa0ba902b7, meshlib=1,congo=t61")]), 1);
        assert_eq!(layer(&[("tracestate", "notmeshlib=7,meshlibs=8")]), 0);
        assert_eq!((layer(&[("x-mesh-attempt", "many")]), layer(&[("x-mesh-attempt", "9999")])), (1, 1));
    }
}
