//! Who moves the bytes? Workers: threads of which each has a runtime of its own, and shares no connection with any other.
//!
//! So one worker is one core, and compares with another proxy's. They are told what to do by messages, and wake one another only
//! when a new connection is handed out.
use std::cell::RefCell;
use std::fmt::Write as _;
use std::net::SocketAddr;
use std::os::unix::net::UnixStream as PlainUnix;
use std::rc::{Rc, Weak};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::Arc;
use std::time::{Duration, Instant};

use ahash::AHashMap;
use mesh_wire::delegated::{Ask, Spoken};
use parking_lot::RwLock;
use tokio::net::{TcpListener, TcpStream, UnixStream};
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender};
use tokio::sync::Semaphore;
use tokio::task::{spawn_local, AbortHandle, LocalSet};
use tokio::time::interval;

use crate::counts::{Door, Upstream};
use crate::crowd::Crowd;
use crate::gauge::{Gauges, Listed, Told};
use crate::identity::{Identities, Identity};
use crate::inbound::Listener;
use crate::limits;
use crate::linger::Lingering;
use crate::pool::Target;
use crate::{inbound, linger, outbound, progress};

/// What all workers share.
pub struct Common {
    pub identities: Identities,
    pub gauges: Arc<Gauges>,
    pub data: Arc<Door>,
    pub upstream: Upstream,
    /// Connections to endpoints by identity, and those of callers by user.
    pub upstream_of: Crowd,
    pub data_of: Crowd,
    pub listeners: RwLock<AHashMap<String, Arc<Listener>>>,
    pub is_draining: AtomicBool,
    pub workers: RwLock<Vec<UnboundedSender<Order>>>,
    next: AtomicUsize,
}

impl Default for Common {
    fn default() -> Common {
        Common {
            identities: Identities::default(),
            gauges: Arc::default(),
            data: Arc::default(),
            upstream: Upstream::default(),
            upstream_of: Crowd::of(limits::UPSTREAM_OF_ONE),
            data_of: Crowd::of(limits::DATA_OF_ONE),
            listeners: RwLock::default(),
            is_draining: AtomicBool::default(),
            workers: RwLock::default(),
            next: AtomicUsize::default(),
        }
    }
}

impl Common {
    /// To the worker whose turn it is. False: none is left.
    pub fn hand_out(&self, order: Order) -> bool {
        let workers = self.workers.read();
        let turn = self.next.fetch_add(1, Ordering::Relaxed);
        workers.get(turn % workers.len().max(1)).is_some_and(|worker| worker.send(order).is_ok())
    }

    pub fn tell_all(&self, order: impl Fn() -> Order) {
        for worker in self.workers.read().iter() {
            let _ = worker.send(order());
        }
    }
}

/// What a worker is told.
pub enum Order {
    Adopt(PlainUnix, Arc<[Arc<str>]>, Listed),
    Listen(std::net::TcpListener, Arc<Listener>),
    Serve(std::net::TcpStream, SocketAddr, Arc<Listener>),
    Unlisten(String),
    Drain,
    Forget(String),
    Stop,
}

/// State of one worker. Only its own thread sees it.
pub struct Worker {
    pub common: Arc<Common>,
    pub lingering: Lingering,
    targets: RefCell<AHashMap<String, Rc<Target>>>,
    turns: RefCell<AHashMap<Arc<str>, Arc<Semaphore>>>,
    name: RefCell<String>,
    listening: RefCell<AHashMap<String, AbortHandle>>,
    is_alone: bool,
}

/// The worker's life.
pub fn run(common: Arc<Common>, orders: UnboundedReceiver<Order>, is_alone: bool) -> std::io::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_io()
        .enable_time()
        .max_blocking_threads(limits::LOOKUP_THREADS)
        .build()?;
    let set = LocalSet::new();
    let (lingering, left) = Lingering::new();
    let worker = Rc::new(Worker {
        common,
        lingering,
        targets: RefCell::default(),
        turns: RefCell::default(),
        name: RefCell::default(),
        listening: RefCell::default(),
        is_alone,
    });
    set.block_on(&runtime, async {
        spawn_local(linger::run(left));
        spawn_local(sweep(Rc::downgrade(&worker)));
        obey(&worker, orders).await;
    });
    // Tasks end before what they use.
    drop(set);
    drop(worker);
    runtime.shutdown_timeout(Duration::from_millis(100));
    Ok(())
}

async fn obey(worker: &Rc<Worker>, mut orders: UnboundedReceiver<Order>) {
    while let Some(order) = orders.recv().await {
        match order {
            Order::Adopt(socket, ids, listed) => {
                if let Ok(socket) = UnixStream::from_std(socket) {
                    spawn_local(outbound::serve(worker.clone(), socket, ids, listed));
                }
            }
            Order::Serve(socket, address, listener) => {
                if let Ok(socket) = TcpStream::from_std(socket) {
                    spawn_local(inbound::serve(worker.clone(), socket, address, listener));
                }
            }
            Order::Listen(socket, listener) => {
                if let Ok(socket) = TcpListener::from_std(socket) {
                    let name = listener.name.to_string();
                    let task = spawn_local(inbound::accept(worker.clone(), socket, listener));
                    if let Some(before) = worker.listening.borrow_mut().insert(name, task.abort_handle()) {
                        before.abort();
                    }
                }
            }
            Order::Unlisten(name) => {
                if let Some(task) = worker.listening.borrow_mut().remove(&name) {
                    task.abort();
                }
            }
            Order::Drain => worker.listening.borrow_mut().drain().for_each(|(_, task)| {
                spawn_local(async move {
                    tokio::time::sleep(limits::DRAIN_ACCEPT).await;
                    task.abort();
                });
            }),
            Order::Forget(id) => worker.targets.borrow_mut().retain(|_, target| {
                let is_its = target.identity.as_ref().is_some_and(|identity| *identity.id == *id);
                if is_its {
                    target.cut();
                }
                !is_its
            }),
            Order::Stop => return,
        }
    }
}

/// Looks after what may take too long, for all connections of the worker at once: a timer for each would cost more than the requests.
async fn sweep(worker: Weak<Worker>) {
    let mut ticks = interval(limits::SWEEP);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut count = 0u32;
    loop {
        ticks.tick().await;
        let Some(worker) = worker.upgrade() else { return };
        let now = Instant::now();
        progress::sweep(now);
        worker.targets.borrow_mut().retain(|_, target| !(target.sweep(now) && Rc::strong_count(target) == 1));
        count = count.wrapping_add(1);
        if worker.is_alone || count % 2 == 0 {
            sweep_connections(&worker.common);
        }
    }
}

fn sweep_connections(common: &Common) {
    let millis = |duration: Duration| u64::try_from(duration.as_millis()).unwrap_or(u64::MAX);
    for gauge in common.gauges.all() {
        let is_idle = gauge.active.load(Ordering::Relaxed) == 0 && gauge.is_served();
        let is_late = gauge.head_for().is_some_and(|time| time >= millis(limits::HEAD))
            || gauge.stalled_for().is_some_and(|time| time >= millis(limits::STALL));
        if is_late {
            gauge.tell(Told::Cut);
        } else if is_idle && gauge.still_for() >= millis(limits::IDLE) {
            gauge.tell(Told::Leave);
        }
    }
}

impl Worker {
    /// The pool of what a request of the library names.
    ///
    /// One of plain text is its caller's own, too: whose connection it is bounds how many he may have.
    pub fn target(&self, owner: &Arc<str>, identity: Option<Arc<Identity>>, ask: &Ask<'_>) -> Rc<Target> {
        let mut name = self.name.borrow_mut();
        name.clear();
        let generation = identity.as_ref().map_or(0, |identity| identity.generation);
        let expect = ask.expect.unwrap_or("-");
        let _ = write!(name, "{generation} {owner} {} {expect} {}", ask.spoken as u8, ask.address);
        let mut targets = self.targets.borrow_mut();
        if let Some(found) = targets.get(&*name) {
            return found.clone();
        }
        let made = Rc::new(Target::of_endpoint(owner, identity, ask));
        targets.insert(name.clone(), made.clone());
        made
    }

    /// The pool of an application.
    pub fn application(&self, listener: &Listener, spoken: Spoken) -> Rc<Target> {
        let mut name = self.name.borrow_mut();
        name.clear();
        let _ = write!(name, "application {} {}", spoken as u8, listener.behind);
        let mut targets = self.targets.borrow_mut();
        if let Some(found) = targets.get(&*name) {
            return found.clone();
        }
        let made = Rc::new(Target::of_application(&listener.to, &listener.owners, spoken));
        targets.insert(name.clone(), made.clone());
        made
    }

    /// Whose names are looked up.
    pub fn turns(&self, owner: Arc<str>) -> Arc<Semaphore> {
        let mut turns = self.turns.borrow_mut();
        turns.entry(owner).or_insert_with(|| Arc::new(Semaphore::new(limits::LOOKUPS))).clone()
    }

    pub fn is_alone(&self) -> bool {
        self.is_alone
    }

    pub fn is_draining(&self) -> bool {
        self.common.is_draining.load(Ordering::Acquire)
    }
}
