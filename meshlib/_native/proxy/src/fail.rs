//! What does a caller get when there is no answer to pass on?
//!
//! To the library: the reason in one word, whether anything was written, and the explanation; by these it decides whether to try
//! again. To a peer: a problem document (RFC 9457) that says no more than it must. gRPC gets its own form of either.
use bytes::Bytes;
use http::header::{HeaderName, HeaderValue, CONNECTION, CONTENT_TYPE};
use http::{HeaderMap, Response, StatusCode};
use mesh_wire::delegated::{self, Reason};
use mesh_wire::ErrorKind;

use crate::body::Relay;

/// Why the one attempt failed before its answer had a head.
#[derive(Clone, Debug)]
pub struct Failure {
    pub reason: Reason,
    pub is_written: bool,
    pub text: String,
}

impl Failure {
    pub fn new(reason: Reason, is_written: bool, text: impl Into<String>) -> Failure {
        Failure { reason, is_written, text: text.into() }
    }

    pub fn tls(address: &str, error: &mesh_wire::Error) -> Failure {
        let reason = match error.kind {
            ErrorKind::PeerIdentity => Reason::Identity,
            ErrorKind::Lost => Reason::Connect,
            _ => Reason::Tls,
        };
        Failure::new(reason, false, format!("{address}: {} {}", error.message, error.hint))
    }
}

const FAILED: HeaderName = HeaderName::from_static(delegated::FAILED);
const GRPC_STATUS: HeaderName = HeaderName::from_static("grpc-status");
const GRPC_MESSAGE: HeaderName = HeaderName::from_static("grpc-message");
const GRPC: HeaderValue = HeaderValue::from_static("application/grpc");
const TEXT: HeaderValue = HeaderValue::from_static("text/plain; charset=utf-8");
const PROBLEM: HeaderValue = HeaderValue::from_static("application/problem+json");
/// UNAVAILABLE.
const UNAVAILABLE: HeaderValue = HeaderValue::from_static("14");

pub fn is_grpc(fields: &HeaderMap) -> bool {
    let prefix = b"application/grpc";
    fields.get(CONTENT_TYPE).is_some_and(|value| {
        let value = value.as_bytes();
        value.get(..prefix.len()).is_some_and(|start| start.eq_ignore_ascii_case(prefix))
            && matches!(value.get(prefix.len()), None | Some(b'+' | b';'))
    })
}

/// What is the caller's own doing, as a status for people and as a word for the library.
pub fn own(status: StatusCode, is_written: bool, text: &'static str) -> Response<Relay> {
    marked(plain(status, text), Reason::Caller, is_written)
}

/// The library's answer.
pub fn told(failure: &Failure, is_grpc: bool) -> Response<Relay> {
    let response = if is_grpc {
        trailers_only(UNAVAILABLE, &failure.text)
    } else {
        plain(StatusCode::BAD_GATEWAY, failure.text.clone())
    };
    marked(response, failure.reason, failure.is_written)
}

fn marked(mut response: Response<Relay>, reason: Reason, is_written: bool) -> Response<Relay> {
    if let Ok(word) = HeaderValue::from_str(&delegated::failed(reason, is_written)) {
        response.headers_mut().insert(FAILED, word);
    }
    response
}

pub fn plain(status: StatusCode, text: impl Into<Bytes>) -> Response<Relay> {
    let mut response = Response::new(Relay::full(text.into()));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, TEXT);
    response
}

/// A peer's answer. `title` is ours, never a word of anybody else's.
pub fn problem(status: StatusCode, title: &'static str, is_grpc: bool) -> Response<Relay> {
    if is_grpc {
        // As gRPC maps the statuses of HTTP.
        let code = match status {
            StatusCode::BAD_REQUEST => HeaderValue::from_static("13"),
            _ => UNAVAILABLE,
        };
        return trailers_only(code, title);
    }
    let body = format!("{{\"type\":\"about:blank\",\"title\":\"{title}\",\"status\":{}}}", status.as_u16());
    let mut response = Response::new(Relay::full(body.into()));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, PROBLEM);
    response
}

/// The connection is of no use after this answer.
pub fn last(mut response: Response<Relay>) -> Response<Relay> {
    response.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
    response
}

/// How an answer of gRPC ends that broke off: its caller decides by the status whether to ask again.
pub fn unavailable(text: &str) -> HeaderMap {
    let mut fields = HeaderMap::with_capacity(2);
    status(&mut fields, UNAVAILABLE, text);
    fields
}

fn trailers_only(code: HeaderValue, text: &str) -> Response<Relay> {
    let mut response = Response::new(Relay::empty());
    let fields = response.headers_mut();
    fields.insert(CONTENT_TYPE, GRPC);
    status(fields, code, text);
    response
}

fn status(fields: &mut HeaderMap, code: HeaderValue, text: &str) {
    fields.insert(GRPC_STATUS, code);
    if let Ok(message) = HeaderValue::from_str(&percent(text)) {
        fields.insert(GRPC_MESSAGE, message);
    }
}

/// As gRPC writes a message: what isn't printable ASCII, and the percent sign, is escaped.
fn percent(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for byte in text.bytes().take(1024) {
        if (0x20..=0x7e).contains(&byte) && byte != b'%' {
            out.push(char::from(byte));
        } else {
            out.push_str(&format!("%{byte:02X}"));
        }
    }
    out
}
