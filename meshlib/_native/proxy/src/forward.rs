//! What of a message's head is for this hop only, and how does a request's line look in the other version of HTTP?
//!
//! What a sender named in `Connection` goes, with the fields that are always for one hop; but `Connection` can't take away what the
//! agent sets itself, because that is set afterwards. `te: trailers` stays: gRPC needs it.
use http::header::{
    HeaderMap, HeaderName, HeaderValue, CONNECTION, CONTENT_LENGTH, EXPECT, HOST, PROXY_AUTHENTICATE,
    PROXY_AUTHORIZATION, TE, TRANSFER_ENCODING, UPGRADE,
};
use http::uri::{Authority, PathAndQuery, Scheme};
use http::{request, Response, Uri, Version};
use mesh_wire::delegated;

const KEEP_ALIVE: HeaderName = HeaderName::from_static("keep-alive");
const PROXY_CONNECTION: HeaderName = HeaderName::from_static("proxy-connection");
const NO_HOST: &str = "The request names no host.";
const TRAILERS: HeaderValue = HeaderValue::from_static("trailers");

/// Takes out the fields of one hop. The answer is whether both fields agree on a change to WebSocket.
///
/// No other protocol is passed on: behind `h2c` an application would speak HTTP past our guards, and believe fields that we take out.
pub fn strip(fields: &mut HeaderMap) -> bool {
    let mut is_websocket = false;
    if fields.contains_key(CONNECTION) {
        let mut named: Vec<HeaderName> = Vec::new();
        for value in fields.get_all(CONNECTION) {
            for item in value.as_bytes().split(|byte| *byte == b',') {
                let item = item.trim_ascii();
                if item.eq_ignore_ascii_case(b"upgrade") {
                    let mut all = fields.get_all(UPGRADE).iter();
                    let is_meant = all.next().is_some_and(|value| value.as_bytes().eq_ignore_ascii_case(b"websocket"));
                    is_websocket = is_meant && all.next().is_none();
                } else if !item.eq_ignore_ascii_case(b"close") && !item.eq_ignore_ascii_case(b"keep-alive") {
                    named.extend(HeaderName::from_bytes(item).ok());
                }
            }
        }
        for name in named {
            // Nobody may hide where the request goes, or how long it is.
            if name != HOST && name != CONTENT_LENGTH && name != TE {
                fields.remove(name);
            }
        }
        fields.remove(CONNECTION);
    }
    for name in [KEEP_ALIVE, PROXY_CONNECTION, PROXY_AUTHENTICATE, PROXY_AUTHORIZATION, TRANSFER_ENCODING, UPGRADE] {
        fields.remove(name);
    }
    if let Some(te) = fields.remove(TE) {
        let has =
            te.as_bytes().split(|byte| *byte == b',').any(|item| item.trim_ascii().eq_ignore_ascii_case(b"trailers"));
        if has {
            fields.insert(TE, TRAILERS);
        }
    }
    is_websocket
}

/// Takes out what only library and agent say to one another.
pub fn strip_mesh(fields: &mut HeaderMap) {
    let is_hop = |name: &HeaderName| delegated::is_hop_field(name.as_str());
    if fields.keys().any(is_hop) {
        let hop: Vec<HeaderName> = fields.keys().filter(|name| is_hop(name)).cloned().collect();
        for name in hop {
            fields.remove(name);
        }
    }
}

/// Puts the change to WebSocket back, for the next hop.
pub fn offer(fields: &mut HeaderMap) {
    fields.insert(CONNECTION, HeaderValue::from_static("upgrade"));
    fields.insert(UPGRADE, HeaderValue::from_static("websocket"));
}

/// Is it said in one way only how long this answer is? As the client in the library judges (RFC 9112, 6.3, without its leniency).
pub fn has_one_length<B>(answer: &Response<B>) -> bool {
    let fields = answer.headers();
    let mut codings = fields.get_all(TRANSFER_ENCODING).iter();
    match (codings.next(), codings.next()) {
        (None, _) => fields.get_all(CONTENT_LENGTH).iter().nth(1).is_none(),
        (Some(coding), None) => {
            coding.as_bytes().eq_ignore_ascii_case(b"chunked")
                && !fields.contains_key(CONTENT_LENGTH)
                && answer.version() == Version::HTTP_11
        }
        _ => false,
    }
}

/// Writes the request's line and framing as HTTP/1.1 has them. `has_body`: something may follow the head.
///
/// What comes of HTTP/2 was never judged by the guard of HTTP/1.1: no host or length goes on that could be read in two ways.
pub fn as_http1(head: &mut request::Parts, has_body: bool) -> Result<(), &'static str> {
    head.headers.remove(EXPECT);
    if let Some(authority) = head.uri.authority() {
        // Also in HTTP/1.1, where a target in absolute form counts and `Host` doesn't (RFC 9112, 3.2.2).
        let host = HeaderValue::from_str(authority.as_str()).map_err(|_| NO_HOST)?;
        head.headers.insert(HOST, host);
        let mut parts = http::uri::Parts::default();
        parts.path_and_query = Some(path_of(&head.uri));
        head.uri = Uri::from_parts(parts).map_err(|_| NO_HOST)?;
    }
    if head.version == Version::HTTP_2 {
        join_cookies(&mut head.headers);
        let mut lengths = head.headers.get_all(CONTENT_LENGTH).iter();
        let is_plain = |length: &HeaderValue| !length.is_empty() && length.as_bytes().iter().all(u8::is_ascii_digit);
        if lengths.next().is_some_and(|first| !is_plain(first)) || lengths.next().is_some() {
            return Err("The request's content-length is not one plain number.");
        }
    }
    let mut hosts = head.headers.get_all(HOST).iter();
    let host = hosts.next().ok_or(NO_HOST)?;
    if head.version == Version::HTTP_2 && (hosts.next().is_some() || Authority::try_from(host.as_bytes()).is_err()) {
        return Err("The request names more than one host, or an impossible one.");
    }
    if has_body && !head.headers.contains_key(CONTENT_LENGTH) {
        // Without a word of ours hyper takes it that GET and HEAD have no body, and drops what follows.
        head.headers.insert(TRANSFER_ENCODING, HeaderValue::from_static("chunked"));
    }
    head.version = Version::HTTP_11;
    Ok(())
}

/// Writes the request's line as HTTP/2 has it.
pub fn as_http2(head: &mut request::Parts, is_tls: bool) -> Result<(), &'static str> {
    head.headers.remove(EXPECT);
    let host = head.headers.remove(HOST);
    let authority = match head.uri.authority() {
        Some(authority) => Some(authority.clone()),
        None => host.and_then(|host| Authority::try_from(host.as_bytes()).ok()),
    };
    let mut parts = http::uri::Parts::default();
    parts.scheme = Some(if is_tls { Scheme::HTTPS } else { Scheme::HTTP });
    parts.authority = Some(authority.ok_or(NO_HOST)?);
    parts.path_and_query = Some(path_of(&head.uri));
    head.uri = Uri::from_parts(parts).map_err(|_| NO_HOST)?;
    head.version = Version::HTTP_2;
    Ok(())
}

fn path_of(uri: &Uri) -> PathAndQuery {
    uri.path_and_query().cloned().unwrap_or_else(|| PathAndQuery::from_static("/"))
}

/// HTTP/2 may send a cookie in pieces, which HTTP/1.1 has as one field (RFC 9113, 8.2.3).
fn join_cookies(fields: &mut HeaderMap) {
    let all = fields.get_all(http::header::COOKIE);
    if all.iter().nth(1).is_none() {
        return;
    }
    let joined = all.iter().map(HeaderValue::as_bytes).collect::<Vec<_>>().join(&b"; "[..]);
    if let Ok(value) = HeaderValue::from_bytes(&joined) {
        fields.insert(http::header::COOKIE, value);
    }
}
