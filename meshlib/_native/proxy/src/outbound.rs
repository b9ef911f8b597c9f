//! What does the agent do for a library of its node? It takes a request at the data socket, and makes one attempt.
//!
//! Who is at the other end was attested before the connection came here: under an identity that this gave it, and no other,
//! everything is done. A request says which (`x-mesh-as`), where there are several. Which endpoint, whom to expect there, what to speak:
//! each request says it. The library decides and retries; so every failure before the answer's head says how far it had come.
//!
//! It opens no UNIX sockets for callers. There the kernel vouches for who connects, and that would be the agent and not the caller.
use std::convert::Infallible;
use std::future::{poll_fn, Future};
use std::pin::pin;
use std::rc::Rc;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::Arc;
use std::task::Poll;

use bytes::Bytes;
use http::header::UPGRADE;
use http::request::Parts;
use http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode, Version};
use hyper::body::{Body as _, Incoming};
use hyper::server::conn::{http1, http2};
use hyper::service::service_fn;
use mesh_wire::delegated::{self, Endpoint, Reason, Spoken};
use tokio::net::UnixStream;
use tokio::time::{sleep, Instant};

use crate::body::Relay;
use crate::counts::add;
use crate::exchange;
use crate::fail::{self, Failure};
use crate::forward;
use crate::gauge::{Gauge, Listed, Told, Visit};
use crate::identity::Identity;
use crate::limits;
use crate::line::{Line, Tls};
use crate::progress::Progress;
use crate::rt::Local;
use crate::serve;
use crate::socket::Socket;
use crate::switch;
use crate::watch::Watch;
use crate::worker::Worker;

/// Beginning of every HTTP/2 connection (RFC 9113, 3.4).
pub const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

struct Caller {
    worker: Rc<Worker>,
    ids: Arc<[Arc<str>]>,
    gauge: Arc<Gauge>,
    visit: Rc<Visit>,
}

pub async fn serve(worker: Rc<Worker>, socket: UnixStream, ids: Arc<[Arc<str>]>, listed: Listed) {
    let door = worker.common.data.clone();
    let Ok(user) = socket.peer_cred().map(|peer| peer.uid()) else { return };
    let seat = worker.common.data_of.take(&user.to_string().into());
    if seat.is_none() && user != 0 {
        add(&door.refused);
        return;
    }
    let listed = listed.within(seat);
    let gauge = listed.gauge.clone();
    let visit = Rc::new(Visit::new(listed, door));
    let mut line = Line::new(Socket::Unix(socket), Tls::None, gauge.clone()).lingering(worker.lingering.clone());
    if let Some(is_http2) = first_word(&mut line, &gauge).await {
        let caller = Rc::new(Caller { worker, ids, gauge: gauge.clone(), visit });
        let service = service_fn(move |request| {
            let caller = caller.clone();
            async move { Ok::<_, Infallible>(caller.answer(request).await) }
        });
        if is_http2 {
            let _ = gauge.protocol.set("h2");
            line.watch_with(Watch::http2(true));
            let _ = serve::serve(http2_server(true).serve_connection(line, service), &gauge, limits::AGE).await;
        } else {
            let _ = gauge.protocol.set("http/1.1");
            line.watch_with(Watch::http1(true));
            let connection = http1_server(true).serve_connection(line, service).with_upgrades();
            let _ = serve::serve(connection, &gauge, limits::AGE).await;
        }
    }
}

/// Which protocol a caller begins with; None for one that says nothing in its time, which is short once it is told to leave.
async fn first_word(line: &mut Line, gauge: &Gauge) -> Option<bool> {
    let mut word = pin!(is_http2(line));
    let mut end = pin!(sleep(limits::IDLE));
    let mut heard = None;
    poll_fn(|context| loop {
        if let Poll::Ready(word) = word.as_mut().poll(context) {
            return Poll::Ready(word.ok());
        }
        if let Poll::Ready(told) = gauge.poll_told(heard, context) {
            if told == Told::Cut {
                return Poll::Ready(None);
            }
            heard = Some(told);
            end.as_mut().reset(Instant::now() + limits::LAST);
            continue;
        }
        return end.as_mut().poll(context).map(|()| None);
    })
    .await
}

/// Looks at the first bytes, and leaves them.
pub async fn is_http2(line: &mut Line) -> std::io::Result<bool> {
    let can_tell = |bytes: &[u8]| bytes.len() >= PREFACE.len() || !PREFACE.starts_with(bytes);
    line.peek(can_tell).await?;
    Ok(line.unread().starts_with(PREFACE))
}

pub fn http1_server(is_ours: bool) -> http1::Builder {
    let (fields, head, buffer) = match is_ours {
        true => (limits::DATA_FIELDS, limits::DATA_HEAD_BYTES, limits::DATA_HEAD_BYTES),
        false => (limits::FIELDS, limits::HEAD_BYTES, limits::HTTP1_BUFFER),
    };
    let mut builder = http1::Builder::new();
    // What is late is seen by the worker's sweep.
    builder
        .header_read_timeout(None)
        .max_headers(fields)
        .max_buf_size(buffer)
        .max_header_size(head)
        .auto_date_header(false);
    builder
}

/// `is_ours`: for attested callers.
pub fn http2_server(is_ours: bool) -> http2::Builder<Local> {
    let mut builder = http2::Builder::new(Local);
    builder.max_send_buf_size(limits::SEND_BUFFER).auto_date_header(false);
    if is_ours {
        builder
            .initial_stream_window_size(limits::DATA_STREAM_WINDOW)
            .initial_connection_window_size(limits::DATA_CONNECTION_WINDOW)
            .max_concurrent_streams(limits::DATA_STREAMS)
            .max_pending_accept_reset_streams(limits::DATA_STREAMS as usize)
            .max_local_error_reset_streams(None)
            .max_header_list_size(limits::DATA_HEAD_BYTES as u32);
    } else {
        builder
            .initial_stream_window_size(limits::STREAM_WINDOW)
            .initial_connection_window_size(limits::CONNECTION_WINDOW)
            .max_concurrent_streams(limits::STREAMS)
            .max_header_list_size(limits::HEAD_BYTES as u32);
    }
    builder
}

/// One request under way, as the connection's record shows it.
pub struct UnderWay(pub Arc<Gauge>);

impl UnderWay {
    pub fn begin(gauge: &Arc<Gauge>) -> UnderWay {
        gauge.requests.fetch_add(1, Relaxed);
        UnderWay::go_on(gauge)
    }

    /// It goes on, though its answer has ended.
    pub fn go_on(gauge: &Arc<Gauge>) -> UnderWay {
        gauge.active.fetch_add(1, Relaxed);
        UnderWay(gauge.clone())
    }
}

impl Drop for UnderWay {
    fn drop(&mut self) {
        self.0.active.fetch_sub(1, Relaxed);
    }
}

impl Caller {
    async fn answer(&self, request: Request<Incoming>) -> Response<Relay> {
        let under_way = UnderWay::begin(&self.gauge);
        add(&self.worker.common.data.requests);
        let is_offer = request.headers().contains_key(UPGRADE);
        let is_http1 = request.version() != Version::HTTP_2;
        // Whoever is told to leave may be nobody any more: on a new connection it is attested anew.
        let is_leaving = is_http1 && self.gauge.is_leaving();
        let mut response = match request.headers().contains_key(delegated::ENDPOINT) {
            true if is_leaving => {
                let failure = Failure::new(Reason::Agent, false, "this connection ends: nothing was tried.");
                fail::told(&failure, fail::is_grpc(request.headers()))
            }
            true => self.attempt(request).await,
            false if is_leaving => fail::plain(StatusCode::SERVICE_UNAVAILABLE, "this connection ends: connect anew."),
            false => self.reserved(&request),
        };
        self.gauge.answer_offer(is_offer, response.status());
        response.body_mut().hold(under_way);
        if is_http1 && self.gauge.is_leaving() && response.status() != StatusCode::SWITCHING_PROTOCOLS {
            return fail::last(response);
        }
        response
    }

    fn reserved(&self, request: &Request<Incoming>) -> Response<Relay> {
        match (request.method(), request.uri().path()) {
            // Whoever asks goes on without us.
            (&Method::GET, "/ping") if self.worker.is_draining() => {
                fail::plain(StatusCode::SERVICE_UNAVAILABLE, "the agent ends.")
            }
            (&Method::GET, "/ping") => {
                let mut response = Response::new(Relay::empty());
                *response.status_mut() = StatusCode::NO_CONTENT;
                response
            }
            (&Method::GET, "/handover") => match self.own(request.headers().get(delegated::AS)) {
                Some(identity) => fail::plain(StatusCode::OK, Bytes::copy_from_slice(identity.secret.as_bytes())),
                None => fail::plain(StatusCode::NOT_FOUND, "the agent has no identity for this caller (any more)."),
            },
            _ => fail::plain(
                StatusCode::BAD_REQUEST,
                "x-mesh-endpoint is missing: the request doesn't say where it is to go.",
            ),
        }
    }

    /// The identity that a request names, of those that its caller was attested for; the first of them, if it names none.
    fn own(&self, named: Option<&HeaderValue>) -> Option<Arc<Identity>> {
        let id = match named {
            Some(named) => self.ids.iter().find(|id| id.as_bytes() == named.as_bytes()),
            None => self.ids.first(),
        };
        self.worker.common.identities.current(id?)
    }

    async fn attempt(&self, request: Request<Incoming>) -> Response<Relay> {
        let is_grpc = fail::is_grpc(request.headers());
        match self.try_once(request, is_grpc).await {
            Ok(response) => response,
            Err(Refused::Request(why)) => {
                self.worker.common.data.fail(Reason::Caller);
                fail::own(StatusCode::BAD_REQUEST, false, why)
            }
            Err(Refused::Body(status, why)) => {
                self.worker.common.data.fail(Reason::Caller);
                fail::last(fail::own(status, true, why))
            }
            Err(Refused::Unable(failure)) => {
                self.worker.common.data.fail(failure.reason);
                fail::last(fail::told(&failure, is_grpc))
            }
            Err(Refused::Failed(failure)) => {
                self.worker.common.data.fail(failure.reason);
                fail::told(&failure, is_grpc)
            }
        }
    }

    async fn try_once(&self, mut request: Request<Incoming>, is_grpc: bool) -> Result<Response<Relay>, Refused> {
        let near = hyper::upgrade::on(&mut request);
        let (mut head, body) = request.into_parts();
        let mut one = |name: &'static str| take_one(&mut head.headers, name);
        let (endpoint, expect) = (one(delegated::ENDPOINT)?, one(delegated::EXPECT)?);
        let (protocol, connect) = (one(delegated::PROTOCOL)?, one(delegated::CONNECT)?);
        let identity = self.own(one(delegated::AS)?.as_ref());
        let text = |value: &'_ Option<http::HeaderValue>| {
            value.as_ref().and_then(|value| value.to_str().ok()).map(str::to_owned)
        };
        let (endpoint, expect, protocol, connect) = (text(&endpoint), text(&expect), text(&protocol), text(&connect));
        let ask = delegated::read(
            endpoint.as_deref().unwrap_or(""),
            expect.as_deref(),
            protocol.as_deref(),
            connect.as_deref(),
        )?;
        if let Endpoint::Unix(_) = ask.endpoint {
            // Whoever listens there asks the kernel who comes, and would hear that it is us: our own sockets first of all.
            let text = "the agent opens no UNIX sockets for its callers, where it would be taken for the caller. \
                Connect to this endpoint from your own process.";
            return Err(Failure::new(Reason::Agent, false, text).into());
        }

        forward::strip_mesh(&mut head.headers);
        let is_offered = forward::strip(&mut head.headers);
        if !fits(&head) {
            let text =
                "the request's head has more than 100 fields or more than 60 KiB, and the agent carries no such. \
                Send it from your own process.";
            return Err(Failure::new(Reason::Agent, false, text).into());
        }
        if head.method == Method::CONNECT {
            return Err(Refused::Request("CONNECT is not supported: the agent opens no tunnels."));
        }
        let is_switching = is_offered && ask.spoken == Spoken::Http1 && head.version != Version::HTTP_2;
        let has_body = !body.is_end_stream();
        let is_http2 = head.version == Version::HTTP_2;
        match ask.spoken {
            Spoken::Http1 => forward::as_http1(&mut head, has_body)?,
            Spoken::Http2 => forward::as_http2(&mut head, ask.expect.is_some())?,
        }
        if is_switching {
            forward::offer(&mut head.headers);
        }

        if ask.expect.is_some() && identity.is_none() {
            // Whoever connects anew is attested anew.
            let text =
                "the agent has no such identity for this caller (any more): nothing can be proved to the endpoint.";
            return Err(Refused::Unable(Failure::new(Reason::Agent, false, text)));
        }
        let owner = identity.as_ref().map(|identity| &identity.id).or(self.ids.first()).cloned().unwrap_or_default();
        let identity = identity.filter(|_| ask.expect.is_some());
        let target = self.worker.target(&owner, identity, &ask);
        let progress = (is_grpc || is_switching).then(|| Progress::new(true, has_body));
        let upward = progress.clone().or_else(|| has_body.then(Progress::of_ours));
        let request = Request::from_parts(head, Relay::request(body, upward.clone()));
        let mut answer = match exchange::send(&self.worker, &target, request, ask.connect).await {
            Ok(answer) => answer,
            Err(_) if self.gauge.is_refused.load(Relaxed) => {
                return Err(Refused::Body(StatusCode::BAD_REQUEST, "the request's body is malformed."))
            }
            Err(_) if upward.is_some_and(|progress| progress.is_late()) => {
                return Err(Refused::Body(StatusCode::REQUEST_TIMEOUT, "the request's body made no progress."))
            }
            Err((failure, _)) => return Err(failure.into()),
        };
        let fields = answer.response.headers_mut();
        forward::strip_mesh(fields);
        let is_accepted = forward::strip(fields);
        if answer.response.status() == StatusCode::SWITCHING_PROTOCOLS {
            let Some(progress) = progress.filter(|_| is_switching && is_accepted) else {
                return Err(Failure::new(
                    Reason::Protocol,
                    true,
                    "the peer switched protocols, but nobody offered that.",
                )
                .into());
            };
            let far = hyper::upgrade::on(&mut answer.response);
            tokio::task::spawn_local(switch::join(near, far, progress, self.visit.clone()));
            let mut response = answer.relay(None, false);
            forward::offer(response.headers_mut());
            return Ok(response);
        }
        Ok(answer.relay(progress, is_http2))
    }
}

enum Refused {
    Request(&'static str),
    /// The head was fine; what followed wasn't.
    Body(StatusCode, &'static str),
    Unable(Failure),
    Failed(Failure),
}

impl From<&'static str> for Refused {
    fn from(why: &'static str) -> Refused {
        Refused::Request(why)
    }
}

impl From<Failure> for Refused {
    fn from(failure: Failure) -> Refused {
        Refused::Failed(failure)
    }
}

/// As large as anybody's head may be; the fields of this hop are gone.
fn fits(head: &Parts) -> bool {
    let fields: usize = head.headers.iter().map(|(name, value)| name.as_str().len() + value.len() + 4).sum();
    let target = head.uri.path_and_query().map_or(0, |target| target.as_str().len());
    head.headers.len() <= limits::FIELDS && fields + target <= limits::HEAD_BYTES
}

/// A field that may be there once.
fn take_one(fields: &mut HeaderMap, name: &'static str) -> Result<Option<http::HeaderValue>, Refused> {
    if fields.get_all(name).iter().nth(1).is_some() {
        return Err(Refused::Request("a field x-mesh-endpoint, -expect, -protocol, -connect or -as is there twice."));
    }
    Ok(fields.remove(name))
}
