//! Who may come in at a listener, and what does the application behind it get?
//!
//! TLS ends here, with the identity of the service. What it proved goes along with every request in one field that only the agent
//! can write: the application knows it by the secret in it. The application canonicalises, authorises and measures; what is refused
//! here is only what is malformed, smuggled, too large or too slow.
//!
//! The mode says what is taken, as in the library's own servers: enforce takes TLS with a certificate only; permissive and observe
//! take plain text too. The first byte tells one from the other.
use std::convert::Infallible;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::Arc;
use std::time::Duration;

use http::header::UPGRADE;
use http::{HeaderName, HeaderValue, Method, Request, Response, StatusCode, Version};
use hyper::body::{Body as _, Incoming};
use hyper::service::service_fn;
use mesh_wire::delegated::{self, Handed, Reason, Spoken};
use mesh_wire::TlsConnection;
use tokio::net::{TcpListener, TcpStream};
use tokio::time::{sleep, timeout};

use crate::body::Relay;
use crate::counts::{add, Door};
use crate::exchange;
use crate::fail;
use crate::forward;
use crate::gauge::{Gauge, Visit};
use crate::limits;
use crate::line::{Line, Tls};
use crate::outbound::{http1_server, http2_server, is_http2, UnderWay};
use crate::progress::Progress;
use crate::serve;
use crate::socket::Socket;
use crate::switch;
use crate::watch::Watch;
use crate::worker::{Order, Worker};

/// The first byte of every TLS connection: the record type "handshake". No HTTP request begins with it.
const HANDSHAKE: u8 = 22;
/// The fatal alert internal_error: we have no identity (any more) to speak TLS with.
const ALERT: &[u8] = b"\x15\x03\x03\x00\x02\x02\x50";
const WORDS: &str =
    "This port speaks mutual TLS. The caller sent plain HTTP; it needs a certificate of this mesh and https.\n\
    (Service in mode enforce. In mode permissive it would take both.)\n";
const HANDED: HeaderName = HeaderName::from_static(delegated::HANDED);

/// One listening socket, and what is behind it.
pub struct Listener {
    pub name: Arc<str>,
    pub id: Arc<str>,
    pub to: Arc<str>,
    /// Users who may listen there; nobody is asked if there are none.
    pub owners: Arc<[u32]>,
    /// These two, as the pools of connections are told apart by them.
    pub behind: Box<str>,
    /// Nobody comes in without a certificate.
    pub is_strict: bool,
    pub port: u16,
    pub door: Arc<Door>,
}

pub async fn accept(worker: Rc<Worker>, socket: TcpListener, listener: Arc<Listener>) {
    loop {
        let (stream, address) = match socket.accept().await {
            Ok(accepted) => accepted,
            // Out of descriptors, mostly: what is open may end.
            Err(_) => {
                sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        if listener.door.open.load(Relaxed) >= limits::CONNECTIONS as u64 {
            add(&listener.door.refused);
            continue;
        }
        let _ = stream.set_nodelay(true);
        if worker.is_alone() {
            tokio::task::spawn_local(serve(worker.clone(), stream, address, listener.clone()));
        } else if let Ok(stream) = stream.into_std() {
            worker.common.hand_out(Order::Serve(stream, address, listener.clone()));
        }
    }
}

struct Guest {
    worker: Rc<Worker>,
    listener: Arc<Listener>,
    gauge: Arc<Gauge>,
    visit: Rc<Visit>,
    handed: HeaderValue,
}

pub async fn serve(worker: Rc<Worker>, socket: TcpStream, address: SocketAddr, listener: Arc<Listener>) {
    let local = socket.local_addr().map(|address| address.to_string()).unwrap_or_default();
    let gauge = Gauge::new("inbound", listener.name.clone(), listener.id.clone(), local, address.to_string());
    let listed = worker.common.gauges.add(gauge);
    let gauge = listed.gauge.clone();
    let visit = Rc::new(Visit::new(listed, listener.door.clone()));
    let line = Line::new(Socket::Tcp(socket), Tls::None, gauge.clone()).lingering(worker.lingering.clone());
    let opened = timeout(limits::HANDSHAKE, open(&worker, line, &listener, address)).await;
    match opened {
        Ok(Some(Opened { mut line, handed, is_http2 })) => {
            let lasts = serve::lasts(gauge.not_after.load(Relaxed));
            let guest = Rc::new(Guest { worker, listener: listener.clone(), gauge: gauge.clone(), visit, handed });
            let service = service_fn(move |request| {
                let guest = guest.clone();
                async move { Ok::<_, Infallible>(guest.answer(request).await) }
            });
            if is_http2 {
                let _ = gauge.protocol.set("h2");
                line.watch_with(Watch::http2(false));
                let _ = serve::serve(http2_server(false).serve_connection(line, service), &gauge, lasts).await;
            } else {
                let _ = gauge.protocol.set("http/1.1");
                line.watch_with(Watch::http1(false));
                let connection = http1_server(false).serve_connection(line, service).with_upgrades();
                let _ = serve::serve(connection, &gauge, lasts).await;
            }
            if gauge.is_refused.load(Relaxed) {
                add(&listener.door.malformed);
            }
        }
        Ok(None) => add(&listener.door.refused),
        Err(_) => add(&listener.door.late),
    }
}

struct Opened {
    line: Line,
    handed: HeaderValue,
    is_http2: bool,
}

async fn open(worker: &Rc<Worker>, mut line: Line, listener: &Listener, address: SocketAddr) -> Option<Opened> {
    line.peek(|bytes| !bytes.is_empty()).await.ok()?;
    let first = *line.unread().first()?;
    let gauge = line.gauge.clone();
    let identity = worker.common.identities.current(&listener.id);
    let text = address.ip().to_string();
    let address = match address {
        SocketAddr::V4(_) => format!("{text}:{}", address.port()),
        SocketAddr::V6(_) => format!("[{text}]:{}", address.port()),
    };
    let secret = identity.as_ref().map(|identity| identity.secret.clone()).unwrap_or_default();
    let mut facts = Handed { secret: &secret, address: &address, port: listener.port, ..Handed::default() };
    if first != HANDSHAKE {
        if listener.is_strict {
            let head = format!(
                "HTTP/1.1 400 Bad Request\r\ncontent-type: text/plain; charset=utf-8\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{WORDS}",
                WORDS.len()
            );
            line.refuse(head.as_bytes());
            return None;
        }
        let handed = HeaderValue::from_str(&delegated::handed(&facts)).ok()?;
        let is_http2 = is_http2(&mut line).await.ok()?;
        return Some(Opened { line, handed, is_http2 });
    }
    let Some(identity) = identity else {
        line.refuse(ALERT);
        return None;
    };
    let session = TlsConnection::new(identity.server(listener.is_strict).clone()).ok()?;
    if line.secure(Tls::Server(Box::new(session))).await.is_err() {
        line.refuse(b"");
        return None;
    }
    let Tls::Server(session) = line.tls() else { return None };
    if let Some(chain) = session.state().peer_certificates() {
        let chain: Vec<_> = chain.iter().map(|certificate| certificate.clone().into_owned()).collect();
        let _ = gauge.chain.set(chain);
        // Whoever changes the bundles looks at the chains that are here already; one that came just now is looked at here.
        if !identity.is_current() {
            let now = worker.common.identities.current(&listener.id)?;
            if !now.lenient.accepts(gauge.chain.get()?) {
                return None;
            }
        }
    }
    let leaf = session.state().peer_certificates().and_then(|chain| chain.first()).map(|leaf| leaf.to_vec());
    let (serial, digest) = leaf.as_deref().map(delegated::marks).unwrap_or_default();
    let sni = session.server_name().unwrap_or_default().to_owned();
    let id = session.peer().map(|peer| peer.id.clone()).unwrap_or_default();
    facts.tls = mesh_wire::tls::version(session.state()).unwrap_or_default();
    (facts.id, facts.sni, facts.serial, facts.sha256) = (&id, &sni, &serial, &digest);
    facts.not_after = session.peer().map_or(0, |peer| peer.not_after);
    if !id.is_empty() {
        let _ = gauge.peer.set(id.clone());
        gauge.not_after.store(facts.not_after, Relaxed);
    }
    let handed = HeaderValue::from_str(&delegated::handed(&facts)).ok()?;
    let alpn = session.state().alpn_protocol().map(<[u8]>::to_vec);
    let is_http2 = match alpn {
        Some(protocol) => protocol == mesh_wire::tls::client::HTTP2,
        None => is_http2(&mut line).await.ok()?,
    };
    Some(Opened { line, handed, is_http2 })
}

impl Guest {
    async fn answer(&self, request: Request<Incoming>) -> Response<Relay> {
        let under_way = UnderWay::begin(&self.gauge);
        add(&self.listener.door.requests);
        let is_offer = request.headers().contains_key(UPGRADE);
        let is_http1 = request.version() != Version::HTTP_2;
        let mut response = self.hand_over(request).await;
        self.gauge.answer_offer(is_offer, response.status());
        response.body_mut().hold(under_way);
        if is_http1 && self.gauge.is_leaving() && response.status() != StatusCode::SWITCHING_PROTOCOLS {
            return fail::last(response);
        }
        response
    }

    async fn hand_over(&self, mut request: Request<Incoming>) -> Response<Relay> {
        let is_grpc = fail::is_grpc(request.headers());
        if let Some(refusal) = self.refusal(&request, is_grpc) {
            add(&self.listener.door.malformed);
            return if request.version() == Version::HTTP_2 { refusal } else { fail::last(refusal) };
        }
        let is_http2 = request.version() == Version::HTTP_2;
        let spoken = if is_http2 && is_grpc { Spoken::Http2 } else { Spoken::Http1 };
        let near = hyper::upgrade::on(&mut request);
        let (mut head, body) = request.into_parts();
        forward::strip_mesh(&mut head.headers);
        let is_switching = forward::strip(&mut head.headers) && !is_http2;
        let has_body = !body.is_end_stream();
        let written = match spoken {
            Spoken::Http1 => forward::as_http1(&mut head, has_body),
            Spoken::Http2 => forward::as_http2(&mut head, false),
        };
        if let Err(title) = written {
            add(&self.listener.door.malformed);
            let refusal = fail::problem(StatusCode::BAD_REQUEST, title, is_grpc);
            return if is_http2 { refusal } else { fail::last(refusal) };
        }
        if is_switching {
            forward::offer(&mut head.headers);
        }
        head.headers.insert(HANDED, self.handed.clone());

        let target = self.worker.application(&self.listener, spoken);
        let progress = (is_grpc || is_switching).then(|| Progress::new(true, has_body));
        let upward = progress.clone().or_else(|| has_body.then(|| Progress::new(false, true)));
        let request = Request::from_parts(head, Relay::request(body, upward.clone()));
        let mut sent = exchange::send(&self.worker, &target, request, limits::APPLICATION_CONNECT).await;
        if let Err((failure, Some(_))) = &sent {
            // An idle connection that the application closed just now: nothing of the request has left.
            if failure.reason == Reason::Unwritten {
                if let Err((_, Some(request))) = sent {
                    sent = exchange::send(&self.worker, &target, request, limits::APPLICATION_CONNECT).await;
                } else {
                    return fail::problem(StatusCode::BAD_GATEWAY, "The application can't be reached.", is_grpc);
                }
            }
        }
        let mut answer = match sent {
            Ok(answer) => answer,
            Err(_) if self.gauge.is_refused.load(Relaxed) => {
                return fail::last(fail::problem(StatusCode::BAD_REQUEST, "The request's body is malformed.", is_grpc));
            }
            Err(_) if upward.is_some_and(|progress| progress.is_late()) => {
                add(&self.listener.door.late);
                return fail::last(fail::problem(
                    StatusCode::REQUEST_TIMEOUT,
                    "The request's body made no progress.",
                    is_grpc,
                ));
            }
            Err((failure, _)) => {
                self.listener.door.fail(failure.reason);
                return match failure.reason {
                    Reason::Connect | Reason::ConnectTimeout | Reason::Unwritten => {
                        fail::problem(StatusCode::SERVICE_UNAVAILABLE, "The application is not there.", is_grpc)
                    }
                    _ => fail::problem(
                        StatusCode::BAD_GATEWAY,
                        "The application ended the connection before its answer.",
                        is_grpc,
                    ),
                };
            }
        };
        let fields = answer.response.headers_mut();
        forward::strip_mesh(fields);
        let is_accepted = forward::strip(fields);
        if answer.response.status() == StatusCode::SWITCHING_PROTOCOLS {
            let Some(progress) = progress.filter(|_| is_switching && is_accepted) else {
                return fail::problem(StatusCode::BAD_GATEWAY, "The application switched protocols unasked.", is_grpc);
            };
            let far = hyper::upgrade::on(&mut answer.response);
            tokio::task::spawn_local(switch::join(near, far, progress, self.visit.clone()));
            let mut response = answer.relay(None, false);
            forward::offer(response.headers_mut());
            return response;
        }
        answer.relay(progress, is_http2)
    }

    /// What nobody behind us needs to see.
    fn refusal(&self, request: &Request<Incoming>, is_grpc: bool) -> Option<Response<Relay>> {
        let target = request.uri().path_and_query().map_or(0, |target| target.as_str().len());
        if target > limits::TARGET {
            return Some(fail::last(fail::problem(
                StatusCode::URI_TOO_LONG,
                "The request's target exceeds 8 KiB.",
                is_grpc,
            )));
        }
        if request.headers().len() > limits::FIELDS {
            let title = "The request has more than 100 header fields.";
            return Some(fail::problem(StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE, title, is_grpc));
        }
        if request.method() == Method::CONNECT {
            return Some(fail::problem(StatusCode::BAD_REQUEST, "CONNECT is not supported.", is_grpc));
        }
        None
    }
}
