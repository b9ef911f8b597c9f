//! Which bytes does the node agent move for other processes? Those of calls that a library delegates to it, and those that come in for
//! an application that has no TLS of its own.
//!
//! Outbound, a library of the node names endpoint and identity with each request (`outbound`), and the agent makes one attempt over a
//! pooled connection (`pool`, `exchange`). Inbound, it ends TLS at a listener and hands requests over to a UNIX socket (`inbound`).
//! HTTP is hyper's; TLS, the guards and the words between library and agent are the wire crate's, so that a delegated call is proved
//! and judged as one in the process is.
//!
//! This crate is the only one that may run tokio. It is run by the agent alone: in an application's process nothing of it is ever
//! started, because a native runtime behind Python is known to hang forked workers and to abort at exit. Threads begin with
//! `Proxy::new` and end with `stop`. It decides nothing: no retries, no balancing, no authorisation. It opens no tunnels (CONNECT).
mod body;
mod counts;
mod crowd;
mod dial;
mod exchange;
mod fail;
mod forward;
mod gauge;
mod identity;
mod inbound;
mod limits;
mod line;
mod linger;
mod outbound;
mod pool;
mod progress;
mod rt;
mod serve;
mod socket;
mod switch;
mod watch;
mod worker;

use std::collections::BTreeMap;
use std::io;
use std::net::TcpListener;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::Ordering;
use std::sync::Arc;
use std::thread::{sleep, Builder, JoinHandle};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use tokio::sync::mpsc::unbounded_channel;

use counts::Door;
use gauge::{Gauge, Told};
use inbound::Listener;
use worker::{Common, Order};

pub use counts::Rows;
pub use identity::Material;
pub use mesh_wire::{Error, Result};

/// How often `stop` looks whether all is quiet.
const LOOK: Duration = Duration::from_millis(10);

/// One identity: its generation, and the counters of its sides.
pub type IdentityRow = (u64, Vec<(&'static str, Rows)>);

#[derive(Debug, Default)]
pub struct Stats {
    pub outbound: (Rows, Rows),
    pub inbound: BTreeMap<String, (Rows, Rows)>,
    pub upstream: Rows,
    /// By SPIFFE ID: the generation, and the TLS counters of each side.
    pub identities: BTreeMap<String, IdentityRow>,
}

/// One open connection.
#[derive(Debug)]
pub struct Row {
    pub direction: &'static str,
    pub name: String,
    pub owner: String,
    pub peer: String,
    pub address: String,
    pub local: String,
    pub protocol: &'static str,
    pub age: f64,
    pub requests: u64,
    pub not_after: u64,
    pub received: u64,
    pub written: u64,
}

pub struct Proxy {
    common: Arc<Common>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

impl Proxy {
    pub fn new(workers: usize) -> io::Result<Proxy> {
        let common = Arc::new(Common::default());
        let count = workers.max(1);
        let proxy = Proxy { common: common.clone(), threads: Mutex::default() };
        for number in 0..count {
            let (sender, orders) = unbounded_channel();
            common.workers.write().push(sender);
            let common = common.clone();
            let thread = Builder::new().name(format!("mesh-proxy-{number}")).spawn(move || {
                // Without a runtime the worker is gone, and its orders find nobody.
                let _ = worker::run(common, orders, count == 1);
            })?;
            proxy.threads.lock().push(thread);
        }
        Ok(proxy)
    }

    /// Puts an identity in force, or a new generation of it. What was opened under the old one ends when it is idle; callers whom the
    /// new bundles don't know any more are cut.
    pub fn identify(&self, id: &str, material: &Material<'_>) -> Result<()> {
        let made = self.common.identities.put(id, material)?;
        // A root was withdrawn, or a certificate revoked: what was proved by it holds no more.
        self.common.gauges.tell(Told::Cut, |gauge| {
            gauge.is_served() && gauge.is_of(id) && gauge.chain.get().is_some_and(|chain| !made.lenient.accepts(chain))
        });
        Ok(())
    }

    /// Withdraws an identity: all connections under it end.
    pub fn forget(&self, id: &str) {
        self.common.identities.remove(id);
        self.common.tell_all(|| Order::Forget(id.to_owned()));
        self.common.gauges.tell(Told::Cut, |gauge| gauge.is_of(id));
    }

    /// Fewer callers than before may be somebody: connections that were adopted for it end once they have answered, and whoever comes
    /// again is attested anew.
    pub fn readmit(&self, id: &str) {
        self.common.gauges.tell(Told::Leave, |gauge| gauge.direction == "data" && gauge.is_of(id));
    }

    /// Serves an accepted connection to the data socket, whose other end was attested to be each of `ids`.
    pub fn adopt(&self, socket: OwnedFd, ids: &[String]) -> io::Result<()> {
        let socket = UnixStream::from(socket);
        // Also while we drain: who is told that we can't loses nothing, and who is cut off doesn't know what became of the request.
        if self.common.data.open.load(Ordering::Relaxed) >= limits::CONNECTIONS as u64 {
            counts::add(&self.common.data.refused);
            return Ok(());
        }
        socket.set_nonblocking(true)?;
        // On the list from now on: what is told to connections of an identity reaches it, however long it waits for its worker.
        let owner = ids.join(" ");
        let gauge = Gauge::new("data", "".into(), owner.as_str().into(), String::new(), String::new());
        let _ = gauge.peer.set(owner);
        let listed = self.common.gauges.add(gauge);
        let ids = ids.iter().map(|id| id.as_str().into()).collect();
        self.ordered(self.common.hand_out(Order::Adopt(socket, ids, listed)))
    }

    /// Ends TLS at a listening socket, for the application at `to`, where one of `owners` must listen if any are named: whoever else has
    /// put his socket there would be told what the application is.
    pub fn listen(
        &self,
        name: &str,
        socket: OwnedFd,
        id: &str,
        to: &str,
        is_strict: bool,
        owners: &[u32],
    ) -> io::Result<()> {
        let socket = TcpListener::from(socket);
        socket.set_nonblocking(true)?;
        let port = socket.local_addr()?.port();
        self.unlisten(name);
        let listener = Listener {
            name: name.into(),
            id: id.into(),
            to: to.into(),
            owners: owners.into(),
            behind: format!("{owners:?} {to}").into(),
            is_strict,
            port,
            door: Arc::new(Door::default()),
        };
        let listener = Arc::new(listener);
        self.common.listeners.write().insert(name.to_owned(), listener.clone());
        self.ordered(self.common.hand_out(Order::Listen(socket, listener)))
    }

    /// Accepts no more there; what is open finishes what is under way.
    pub fn unlisten(&self, name: &str) {
        self.common.listeners.write().remove(name);
        self.common.tell_all(|| Order::Unlisten(name.to_owned()));
        self.common.gauges.tell(Told::Leave, |gauge| gauge.direction == "inbound" && &*gauge.name == name);
    }

    fn ordered(&self, is_taken: bool) -> io::Result<()> {
        if is_taken {
            return Ok(());
        }
        Err(io::Error::new(io::ErrorKind::BrokenPipe, "the proxy has been stopped"))
    }

    pub fn stats(&self) -> Stats {
        let upstream = &self.common.upstream;
        let read = |counter: &std::sync::atomic::AtomicU64| counter.load(Ordering::Relaxed);
        let is_open = |direction: &str| {
            self.common.gauges.all().iter().filter(|gauge| gauge.direction == direction).count() as u64
        };
        Stats {
            outbound: self.common.data.rows(),
            inbound: self
                .common
                .listeners
                .read()
                .iter()
                .map(|(name, listener)| (name.clone(), listener.door.rows()))
                .collect(),
            upstream: vec![
                ("opened", read(&upstream.opened)),
                ("reused", read(&upstream.reused)),
                ("open", is_open("upstream")),
                ("application_opened", read(&upstream.application_opened)),
                ("application_open", is_open("application")),
            ],
            identities: self
                .common
                .identities
                .all()
                .iter()
                .map(|identity| (identity.id.to_string(), (identity.generation, identity.stats().into())))
                .collect(),
        }
    }

    pub fn connections(&self) -> Vec<Row> {
        let row = |gauge: &Arc<gauge::Gauge>| Row {
            direction: gauge.direction,
            name: gauge.name.to_string(),
            owner: gauge.owner.to_string(),
            peer: gauge.peer.get().cloned().unwrap_or_default(),
            address: gauge.address.clone(),
            local: gauge.local.clone(),
            protocol: gauge.protocol.get().copied().unwrap_or_default(),
            age: gauge.opened.elapsed().as_secs_f64(),
            requests: gauge.requests.load(Ordering::Relaxed),
            not_after: gauge.not_after.load(Ordering::Relaxed),
            received: gauge.received.load(Ordering::Relaxed),
            written: gauge.written.load(Ordering::Relaxed),
        };
        self.common.gauges.all().iter().map(row).collect()
    }

    /// Accepts no more, and asks all callers to leave: GOAWAY, or `connection: close`.
    pub fn drain(&self) {
        self.common.is_draining.store(true, Ordering::Release);
        self.common.tell_all(|| Order::Drain);
        self.common.gauges.tell(Told::Leave, gauge::Gauge::is_served);
    }

    /// Ends everything within `patience`. True if nothing had to be cut.
    pub fn stop(&self, patience: Duration) -> bool {
        self.drain();
        let end = Instant::now() + patience;
        let is_busy = || self.common.gauges.all().iter().any(|gauge| gauge.is_served());
        while is_busy() && Instant::now() < end {
            // Those that were taken meanwhile, too.
            self.common.gauges.tell(Told::Leave, gauge::Gauge::is_served);
            sleep(LOOK);
        }
        let is_clean = !is_busy();
        self.common.gauges.tell(Told::Cut, |_| true);
        self.common.tell_all(|| Order::Stop);
        self.common.workers.write().clear();
        for thread in self.threads.lock().drain(..) {
            let _ = thread.join();
        }
        is_clean
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.common.tell_all(|| Order::Stop);
        self.common.workers.write().clear();
    }
}
