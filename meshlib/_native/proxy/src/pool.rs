//! Which open connection carries this request? State of one worker: no connection is ever used by two.
//!
//! Connections are kept by what they prove and speak: our identity's generation, the address, whom it must prove to be, the
//! protocol. An HTTP/1.1 connection carries one request at a time, and comes back only when hyper says that it is ready for
//! another, which it is not while a byte of the last exchange is unread or unwritten. HTTP/2 requests share one connection until
//! its streams are used up, and then a second one.
use std::cell::{Cell, RefCell};
use std::future::Future as _;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use hyper::client::conn::{http1, http2};
use mesh_wire::delegated::{Ask, Spoken};
use tokio::sync::{oneshot, Semaphore};
use tokio::time::{timeout_at, Instant as Moment};

use crate::body::Relay;
use crate::counts::add;
use crate::dial::{dial, late, Dialled};
use crate::fail::Failure;
use crate::gauge::{Gauge, Told};
use crate::identity::Identity;
use crate::limits;
use crate::rt::Local;
use crate::worker::Worker;

#[derive(Clone, Debug)]
pub enum Place {
    Ip(SocketAddr),
    Name(Box<str>, u16),
    /// Whose socket it must be stands beside it; nobody's in particular if nobody does.
    Unix(Box<str>, Arc<[u32]>),
}

type Opened = Result<Rc<Multi>, Failure>;

/// Everything that connections of one kind have in common.
pub struct Target {
    pub direction: &'static str,
    pub address: Box<str>,
    pub place: Place,
    pub expect: Option<Box<str>>,
    pub identity: Option<Arc<Identity>>,
    /// For whom connections are open: one of our identities, also where it isn't shown to anybody.
    pub owner: Arc<str>,
    pub spoken: Spoken,
    pub idle_for: Duration,
    idle: RefCell<Vec<Idle>>,
    shared: RefCell<Vec<Rc<Multi>>>,
    waiting: RefCell<Option<Waiting>>,
    /// Who opens the next connection, where that takes turns.
    pub turn: Semaphore,
}

/// Those who wait for the same connection, and until when the most patient of them does.
struct Waiting {
    senders: Vec<oneshot::Sender<Opened>>,
    until: Rc<Cell<Moment>>,
}

struct Idle {
    one: One,
    since: Instant,
}

/// An HTTP/1.1 connection.
pub struct One {
    pub sender: http1::SendRequest<Relay>,
    pub gauge: Arc<Gauge>,
    pub is_used: bool,
}

/// An HTTP/2 connection.
pub struct Multi {
    pub sender: RefCell<http2::SendRequest<Relay>>,
    pub gauge: Arc<Gauge>,
    pub in_flight: Cell<usize>,
    pub used: Cell<u64>,
    most: Rc<Cell<usize>>,
    idle_since: Cell<Instant>,
}

impl Multi {
    fn has_room(&self) -> bool {
        !self.sender.borrow().is_closed() && self.gauge.is_usable() && self.in_flight.get() < self.most.get().max(1)
    }
}

/// What an exchange holds until its end.
pub enum Lease {
    One(One, Rc<Target>),
    Multi { _stream: Stream },
}

impl Lease {
    /// The exchange has ended well.
    pub fn finish(self) {
        if let Lease::One(one, target) = self {
            target.put_back(one);
        }
    }
}

/// One of a connection's streams; counted until it is dropped.
pub struct Stream(pub Rc<Multi>);

impl Stream {
    fn on(multi: Rc<Multi>) -> Stream {
        multi.in_flight.set(multi.in_flight.get() + 1);
        Stream(multi)
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        self.0.in_flight.set(self.0.in_flight.get().saturating_sub(1));
        self.0.idle_since.set(Instant::now());
    }
}

impl Target {
    /// What a request of the library names, for one of our identities.
    pub fn of_endpoint(owner: &Arc<str>, identity: Option<Arc<Identity>>, ask: &Ask<'_>) -> Target {
        let bare = Target::bare("upstream", ask.address, Place::of(&ask.endpoint), ask.spoken, limits::UPSTREAM_IDLE);
        Target { expect: ask.expect.map(Into::into), identity, owner: owner.clone(), ..bare }
    }

    /// The UNIX socket of an application.
    pub fn of_application(path: &str, owners: &Arc<[u32]>, spoken: Spoken) -> Target {
        Target::bare("application", path, Place::Unix(path.into(), owners.clone()), spoken, limits::APPLICATION_IDLE)
    }

    fn bare(direction: &'static str, address: &str, place: Place, spoken: Spoken, idle_for: Duration) -> Target {
        Target {
            direction,
            address: address.into(),
            place,
            expect: None,
            identity: None,
            owner: Arc::default(),
            spoken,
            idle_for,
            idle: RefCell::default(),
            shared: RefCell::default(),
            waiting: RefCell::default(),
            turn: Semaphore::new(1),
        }
    }

    fn is_in_force(&self) -> bool {
        self.identity.as_ref().is_none_or(|identity| identity.is_current())
    }

    /// An idle connection that can carry a request at once.
    pub fn take_idle(&self) -> Option<One> {
        let mut idle = self.idle.borrow_mut();
        while let Some(Idle { one, since }) = idle.pop() {
            let is_fresh = since.elapsed() < self.idle_for;
            if is_fresh && one.sender.is_ready() && !one.sender.is_closed() && one.gauge.is_usable() {
                return Some(one);
            }
        }
        None
    }

    fn put_back(self: Rc<Self>, mut one: One) {
        one.is_used = true;
        if one.sender.is_ready() {
            self.keep(one);
        } else if !one.sender.is_closed() {
            // The end of the answer is known a moment before the connection is ready, or the request is still being written.
            tokio::task::spawn_local(async move {
                if one.sender.ready().await.is_ok() {
                    self.keep(one);
                }
            });
        }
    }

    fn keep(&self, one: One) {
        let mut idle = self.idle.borrow_mut();
        if idle.len() < limits::IDLE_AT_MOST && self.is_in_force() && one.gauge.is_usable() {
            idle.push(Idle { one, since: Instant::now() });
        }
    }

    pub async fn open_one(&self, worker: &Rc<Worker>, until: Moment) -> Result<One, Failure> {
        let Dialled { line, listed } = dial(worker, self, &Cell::new(until)).await?;
        let gauge = listed.gauge.clone();
        let (sender, connection) = http1::Builder::new()
            .max_buf_size(limits::HTTP1_BUFFER)
            .max_header_size(limits::HEAD_BYTES)
            .max_headers(limits::FIELDS)
            .handshake(line)
            .await
            .map_err(|error| Failure::new(mesh_wire::delegated::Reason::Closed, false, error.to_string()))?;
        self.count_opened(worker);
        tokio::task::spawn_local(async move {
            let _ = crate::serve::until_told(connection.with_upgrades(), &listed.gauge).await;
            drop(listed);
        });
        Ok(One { sender, gauge, is_used: false })
    }

    /// A connection with a free stream. All who need a new one wait for the same one.
    pub async fn share(self: &Rc<Self>, worker: &Rc<Worker>, until: Moment) -> Result<(Stream, bool), Failure> {
        loop {
            let free = {
                let mut shared = self.shared.borrow_mut();
                shared.retain(|multi| !multi.sender.borrow().is_closed() && multi.gauge.is_usable());
                shared.iter().find(|multi| multi.has_room()).cloned()
            };
            if let Some(multi) = free {
                let was_used = multi.used.get() > 0;
                return Ok((Stream::on(multi), was_used));
            }
            let receiver = self.join(worker, until);
            let opened = match timeout_at(until, receiver).await {
                Err(_) => return Err(late(self)),
                Ok(opened) => opened.unwrap_or_else(|_| {
                    Err(Failure::new(mesh_wire::delegated::Reason::Agent, false, "the agent is stopping."))
                })?,
            };
            if opened.has_room() {
                return Ok((Stream::on(opened), false));
            }
            if Moment::now() >= until {
                let text = format!("{} has no free stream.", self.address);
                return Err(Failure::new(mesh_wire::delegated::Reason::ConnectTimeout, false, text));
            }
        }
    }

    fn join(self: &Rc<Self>, worker: &Rc<Worker>, until: Moment) -> oneshot::Receiver<Opened> {
        let (sender, receiver) = oneshot::channel();
        let mut waiting = self.waiting.borrow_mut();
        match &mut *waiting {
            Some(others) => {
                others.senders.push(sender);
                others.until.set(others.until.get().max(until));
            }
            None => {
                let until = Rc::new(Cell::new(until));
                *waiting = Some(Waiting { senders: vec![sender], until: until.clone() });
                let (target, worker) = (self.clone(), worker.clone());
                tokio::task::spawn_local(async move {
                    let opened = target.open_multi(&worker, &until).await;
                    if let Ok(multi) = &opened {
                        target.shared.borrow_mut().push(multi.clone());
                    }
                    for other in target.waiting.take().into_iter().flat_map(|waiting| waiting.senders) {
                        let _ = other.send(opened.clone());
                    }
                });
            }
        }
        receiver
    }

    async fn open_multi(&self, worker: &Rc<Worker>, until: &Cell<Moment>) -> Result<Rc<Multi>, Failure> {
        let Dialled { line, listed } = dial(worker, self, until).await?;
        let gauge = listed.gauge.clone();
        let (sender, mut connection) = http2::Builder::new(Local)
            .initial_stream_window_size(limits::STREAM_WINDOW)
            .initial_connection_window_size(limits::CONNECTION_WINDOW)
            .max_header_list_size(limits::HEAD_BYTES as u32)
            .max_send_buf_size(limits::SEND_BUFFER)
            .handshake(line)
            .await
            .map_err(|error| Failure::new(mesh_wire::delegated::Reason::Closed, false, error.to_string()))?;
        self.count_opened(worker);
        let most = Rc::new(Cell::new(limits::STREAMS as usize));
        let allowed = most.clone();
        tokio::task::spawn_local(async move {
            let watched = std::future::poll_fn(move |context| {
                let polled = std::pin::Pin::new(&mut connection).poll(context);
                allowed.set(connection.current_max_send_streams().min(limits::STREAMS as usize));
                polled
            });
            let _ = crate::serve::until_told(watched, &listed.gauge).await;
            drop(listed);
        });
        Ok(Rc::new(Multi {
            sender: RefCell::new(sender),
            gauge,
            in_flight: Cell::new(0),
            used: Cell::new(0),
            most,
            idle_since: Cell::new(Instant::now()),
        }))
    }

    fn count_opened(&self, worker: &Worker) {
        let counts = &worker.common.upstream;
        add(if self.direction == "application" { &counts.application_opened } else { &counts.opened });
    }

    /// Lets go of what was idle for too long, or is of an identity that is not in force any more. True: nothing is left.
    pub fn sweep(&self, now: Instant) -> bool {
        let is_in_force = self.is_in_force();
        let is_fresh = |since: Instant| is_in_force && now.saturating_duration_since(since) < self.idle_for;
        let mut idle = self.idle.borrow_mut();
        idle.retain(|idle| is_fresh(idle.since) && !idle.one.sender.is_closed());
        let mut shared = self.shared.borrow_mut();
        shared.retain(|multi| {
            !multi.sender.borrow().is_closed() && (multi.in_flight.get() > 0 || is_fresh(multi.idle_since.get()))
        });
        idle.is_empty() && shared.is_empty() && self.waiting.borrow().is_none()
    }

    /// The identity was withdrawn.
    pub fn cut(&self) {
        self.idle.borrow_mut().clear();
        for multi in self.shared.take() {
            multi.gauge.tell(Told::Cut);
        }
    }
}
