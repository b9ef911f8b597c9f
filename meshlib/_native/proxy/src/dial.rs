//! How does a connection to an endpoint come about, and who is there? One attempt, in the time that the caller gives it.
use std::cell::Cell;
use std::io;
use std::net::{SocketAddr, ToSocketAddrs as _};
use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;

use mesh_wire::connection::Protocols;
use mesh_wire::delegated::{Endpoint, Reason, Spoken};
use mesh_wire::tls::client::ClientSession;
use rustix::net::sockopt;
use tokio::net::{TcpStream, UnixStream};
use tokio::sync::Semaphore;
use tokio::task::spawn_blocking;
use tokio::time::{sleep, timeout_at, Instant};

use crate::fail::Failure;
use crate::gauge::{Gauge, Listed};
use crate::limits;
use crate::line::{Line, Tls};
use crate::pool::{Place, Target};
use crate::socket::Socket;
use crate::worker::Worker;

/// An open connection, whose peer was judged.
pub struct Dialled {
    pub line: Line,
    pub listed: Listed,
}

/// `until` may move while it is dialled: whoever joins those that wait may have more time than they.
pub async fn dial(worker: &Rc<Worker>, target: &Target, until: &Cell<Instant>) -> Result<Dialled, Failure> {
    let mut opening = pin!(open(worker, target));
    loop {
        let end = until.get();
        match timeout_at(end, &mut opening).await {
            Ok(result) => return result,
            Err(_) if until.get() > end => {}
            Err(_) => return Err(late(target)),
        }
    }
}

pub fn late(target: &Target) -> Failure {
    let text = format!(
        "{} did not complete a connection in time. It is overloaded, or the network drops packets.",
        target.address
    );
    Failure::new(Reason::ConnectTimeout, false, text)
}

async fn open(worker: &Rc<Worker>, target: &Target) -> Result<Dialled, Failure> {
    let address = &*target.address;
    let seat = if target.direction == "upstream" {
        let seat = worker.common.upstream_of.take(&target.owner).ok_or_else(|| {
            let text =
                format!("the agent has {} connections open for {} already.", limits::UPSTREAM_OF_ONE, target.owner);
            Failure::new(Reason::Agent, false, text)
        })?;
        Some(seat)
    } else {
        None
    };
    let (socket, local) = connect(worker, target).await.map_err(|error| {
        let text = format!("no connection to {address} ({error}). Nothing listens there, or it can't be reached.");
        Failure::new(Reason::Connect, false, text)
    })?;
    let shown = if target.identity.is_some() { target.owner.clone() } else { "".into() };
    let gauge = Gauge::new(target.direction, "".into(), shown, local, address.to_owned());
    let listed = worker.common.gauges.add(gauge).within(seat);
    let gauge = listed.gauge.clone();
    let protocol = if target.spoken == Spoken::Http2 { "h2" } else { "http/1.1" };
    let _ = gauge.protocol.set(protocol);
    let (Some(expect), Some(identity)) = (&target.expect, &target.identity) else {
        return Ok(Dialled { line: Line::new(socket, Tls::None, gauge), listed });
    };
    let offer = if target.spoken == Spoken::Http2 { Protocols::Http2 } else { Protocols::Http1 };
    let failed = |error: mesh_wire::Error| Failure::tls(address, &error);
    let session = ClientSession::offering(identity.client.clone(), expect, address, offer).map_err(failed)?;
    let mut line = Line::new(socket, Tls::Client(Box::new(session)), gauge.clone());
    line.shake().await.map_err(failed)?;
    let Tls::Client(session) = line.tls() else { return Ok(Dialled { line, listed }) };
    if target.spoken == Spoken::Http2 && session.state().alpn_protocol() != Some(mesh_wire::tls::client::HTTP2) {
        let text = format!(
            "{address} does not speak HTTP/2: it picked no application protocol (ALPN). Offer h2 by ALPN there."
        );
        return Err(Failure::new(Reason::Tls, false, text));
    }
    if let Some(peer) = session.peer() {
        let _ = gauge.peer.set(peer.id.clone());
        gauge.not_after.store(peer.not_after, std::sync::atomic::Ordering::Relaxed);
    }
    Ok(Dialled { line, listed })
}

async fn connect(worker: &Worker, target: &Target) -> io::Result<(Socket, String)> {
    let tcp = match &target.place {
        Place::Unix(path, owners) => {
            let socket = knock(path, &target.turn).await?;
            let user = socket.peer_cred()?.uid();
            if !owners.is_empty() && !owners.contains(&user) {
                return Err(io::Error::new(io::ErrorKind::PermissionDenied, format!("user {user} listens there")));
            }
            return Ok((Socket::Unix(socket), String::new()));
        }
        Place::Ip(address) => TcpStream::connect(address).await?,
        Place::Name(host, port) => {
            let mut last = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
            let mut found = None;
            for address in look_up(worker.turns(target.owner.clone()), host, *port).await? {
                match TcpStream::connect(address).await {
                    Ok(socket) => {
                        found = Some(socket);
                        break;
                    }
                    Err(error) => last = error,
                }
            }
            found.ok_or(last)?
        }
    };
    tcp.set_nodelay(true)?;
    keep_watch(&tcp, target.spoken);
    let local = tcp.local_addr().map(|address| address.to_string()).unwrap_or_default();
    Ok((Socket::Tcp(tcp), local))
}

/// The kernel makes nobody wait for room in the queue of a UNIX socket: it says at once that there is none, where TCP would ask again.
/// So whoever comes waits in line, and the first of the line asks again, until his time is over.
async fn knock(path: &str, turn: &Semaphore) -> io::Result<UnixStream> {
    let _turn = turn.acquire().await.map_err(io::Error::other)?;
    loop {
        match UnixStream::connect(path).await {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => sleep(limits::APPLICATION_AGAIN).await,
            result => return result,
        }
    }
}

/// The system's resolver takes a thread for as long as it likes, also when nobody waits any more. So whoever looks up names has a few turns,
/// and waits for them in the time of the own attempt: nobody's slow names hold up another's.
async fn look_up(turns: Arc<Semaphore>, host: &str, port: u16) -> io::Result<Vec<SocketAddr>> {
    let turn = turns.acquire_owned().await.map_err(io::Error::other)?;
    let name = (host.to_owned(), port);
    let found = spawn_blocking(move || {
        let found = name.to_socket_addrs().map(Iterator::collect);
        drop(turn);
        found
    });
    found.await.map_err(io::Error::other)?
}

/// A peer that vanished without a word is noticed by the kernel. Where it can't do this, it is only noticed later.
fn keep_watch(tcp: &TcpStream, spoken: Spoken) {
    let _ = sockopt::set_socket_keepalive(tcp, true);
    let _ = sockopt::set_tcp_keepidle(tcp, limits::ALIVE_AFTER);
    let _ = sockopt::set_tcp_keepintvl(tcp, limits::ALIVE_EVERY);
    let _ = sockopt::set_tcp_keepcnt(tcp, limits::ALIVE_TIMES);
    if spoken == Spoken::Http2 {
        #[cfg(target_os = "linux")]
        let _ = sockopt::set_tcp_user_timeout(tcp, limits::TAKEN_WITHIN);
    }
}

impl Place {
    pub fn of(endpoint: &Endpoint<'_>) -> Place {
        match endpoint {
            Endpoint::Ip(address, port) => Place::Ip((*address, *port).into()),
            Endpoint::Name(host, port) => Place::Name((*host).into(), *port),
            Endpoint::Unix(path) => Place::Unix((*path).into(), Arc::default()),
        }
    }
}
