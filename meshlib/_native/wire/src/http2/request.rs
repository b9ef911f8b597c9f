//! How is this request said in HTTP/2, and may it be said at all?
//!
//! The checks are those of HTTP/1.1 (`http1/request.rs`), so that a request that passes on one protocol passes on the other: what
//! the crates would quietly repair or cut off is refused. Names are lowered, `host` becomes `:authority`, and what belongs to a
//! connection (RFC 9113, 8.2.2) is left out. An Upgrade is refused, since leaving it out would make another request of it.
use ::http::header::{HeaderMap, HeaderName, HeaderValue};
use ::http::uri::{Authority, PathAndQuery, Scheme};
use ::http::{Method, Uri, Version};
use bytes::Bytes;

use crate::error::{Error, Result};
use crate::http1::request::{refused, Request};
use crate::http1::response::{has_token, parse_length};

/// Other in each call, or secret: not worth (or not fit) to be remembered by HPACK.
const UNINDEXED: [&str; 5] = ["authorization", "proxy-authorization", "cookie", "traceparent", "x-mesh-deadline-ms"];

pub struct Plan {
    pub request: ::http::Request<()>,
    pub body: Bytes,
    /// The body is whole: nothing will follow.
    pub is_whole: bool,
    /// What the body must hold, where the caller said so.
    pub left: Option<u64>,
    pub is_head: bool,
}

pub fn plan(request: &Request<'_>, scheme: &Scheme) -> Result<Plan> {
    let method = method(request.method)?;
    let target = target(request.target)?;
    let mut headers = HeaderMap::with_capacity(request.fields.len());
    let mut host = None;
    let mut length = None;
    let mut is_chunked = false;
    let nominated: Vec<&[u8]> = request
        .fields
        .iter()
        .filter(|(name, _)| name.eq_ignore_ascii_case(b"connection"))
        .flat_map(|(_, value)| value.split(|byte| *byte == b',').map(<[u8]>::trim_ascii))
        .collect();
    for (name, value) in request.fields {
        let known = HeaderName::from_bytes(name).map_err(|_| refused("A header's name is empty or not a token"))?;
        // HTTP/1.1 lets spaces stand around a value, HTTP/2 forbids them.
        let mut said = HeaderValue::from_bytes(value.trim_ascii())
            .map_err(|_| refused(format!("The value of the header {known} holds a control character")))?;
        match known.as_str() {
            "host" if host.is_some() => return Err(refused("The request has no host header, or more than one")),
            "host" => host = Some(authority(value)?),
            "content-length" if length.is_some() => {
                return Err(refused("The request has more than one content-length"))
            }
            "content-length" => {
                let parsed = parse_length(value);
                length = Some(parsed.ok_or_else(|| refused("The content-length is not a plain decimal number"))?);
            }
            "transfer-encoding" if is_chunked || !value.eq_ignore_ascii_case(b"chunked") => {
                return Err(refused("The transfer-encoding is not exactly \"chunked\""));
            }
            "transfer-encoding" => is_chunked = true,
            "upgrade" if nominated.iter().any(|name| name.eq_ignore_ascii_case(b"upgrade")) => {
                return Err(refused("HTTP/2 has no Upgrade; send it over HTTP/1.1"));
            }
            "connection" | "keep-alive" | "proxy-connection" | "upgrade" | "http2-settings" => {}
            "te" if !has_token(value, b"trailers") => {}
            "te" => {
                headers.try_insert(known, HeaderValue::from_static("trailers")).map_err(|_| too_many())?;
            }
            other if nominated.iter().any(|name| name.eq_ignore_ascii_case(other.as_bytes())) => {}
            other => {
                said.set_sensitive(UNINDEXED.contains(&other));
                headers.try_append(known, said).map_err(|_| too_many())?;
            }
        }
    }
    let host = host.ok_or_else(|| refused("The request has no host header, or more than one"))?;
    if is_chunked && length.is_some() {
        return Err(refused("The request has both content-length and transfer-encoding"));
    }
    let given = request.body.len() as u64;
    if length.is_some_and(|length| given > length || (given < length && !request.is_streaming)) {
        return Err(refused("The content-length is not the length of the body"));
    }
    let is_whole = !request.is_streaming;
    if length.is_none() && !is_whole {
        // A body of unknown length is ended by its stream: there is nothing to say.
    } else if let Some(length) = length {
        headers.try_insert(::http::header::CONTENT_LENGTH, HeaderValue::from(length)).map_err(|_| too_many())?;
    } else if given > 0 || matches!(request.method, "POST" | "PUT" | "PATCH") {
        headers.try_insert(::http::header::CONTENT_LENGTH, HeaderValue::from(given)).map_err(|_| too_many())?;
    }
    let is_head = method == Method::HEAD;
    let mut parts = ::http::uri::Parts::default();
    parts.scheme = Some(scheme.clone());
    parts.authority = Some(host);
    parts.path_and_query = Some(target);
    let mut made = ::http::Request::new(());
    *made.method_mut() = method;
    *made.uri_mut() = Uri::from_parts(parts).map_err(|_| refused("The request target can't be said in HTTP/2"))?;
    *made.version_mut() = Version::HTTP_2;
    *made.headers_mut() = headers;
    Ok(Plan { request: made, body: Bytes::copy_from_slice(request.body), is_whole, left: length, is_head })
}

fn method(method: &str) -> Result<Method> {
    if method == "CONNECT" {
        return Err(refused("CONNECT is not supported"));
    }
    Method::from_bytes(method.as_bytes()).map_err(|_| refused("The method is not a token"))
}

fn target(target: &str) -> Result<PathAndQuery> {
    if target.is_empty() || !target.bytes().all(|byte| (0x21..=0x7e).contains(&byte)) {
        return Err(refused("The request target is empty or holds spaces, control or non-ASCII characters"));
    }
    let parsed = PathAndQuery::try_from(target).ok().filter(|parsed| parsed.as_str() == target);
    parsed
        .filter(|_| target.starts_with('/') || target == "*")
        .ok_or_else(|| refused("The request target is no path that HTTP/2 can say: a character in it must be escaped"))
}

fn authority(host: &[u8]) -> Result<Authority> {
    Authority::try_from(host)
        .ok()
        .filter(|parsed| !parsed.as_str().contains('@'))
        .ok_or_else(|| refused("The host header is no name with an optional port"))
}

fn too_many() -> Error {
    refused("It has too many headers")
}
