//! Which connections are open, how much went over each, and how is one told to end?
//!
//! A connection's task, its transport and whoever asks for a list share one record of atomics; the list of records is locked only
//! when a connection opens or ends, or somebody reads it. A signal wakes the task, which ends the connection in its own way.
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicU8, Ordering};
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll, Waker};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use ahash::AHashMap;
use http::StatusCode;
use mesh_wire::tls::CertificateDer;
use parking_lot::Mutex;

use crate::counts::{add, Door};
use crate::crowd::Seat;

/// What a connection was told. Only ever more.
const ON: u8 = 0;
const LEAVE: u8 = 1;
const CUT: u8 = 2;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Told {
    /// Finish what is under way, begin nothing more.
    Leave,
    /// End now.
    Cut,
}

/// One connection, as all who care see it.
pub struct Gauge {
    pub direction: &'static str,
    pub name: Arc<str>,
    /// The identity of ours under which it runs; of a caller's connection all that it was attested for, with a space between them.
    pub owner: Arc<str>,
    pub local: String,
    pub address: String,
    pub peer: OnceLock<String>,
    /// The certificates of a caller, to be judged again when the bundles change.
    pub chain: OnceLock<Vec<CertificateDer<'static>>>,
    pub protocol: OnceLock<&'static str>,
    pub opened: Instant,
    pub not_after: AtomicU64,
    pub received: AtomicU64,
    pub written: AtomicU64,
    pub requests: AtomicU64,
    /// Requests under way.
    pub active: AtomicU64,
    /// Milliseconds of `opened` at which something moved last, and at which an unfinished head began (0: none).
    moved: AtomicU64,
    head_since: AtomicU64,
    /// Milliseconds at which a write first found no room; 0: there is room.
    stalled_since: AtomicU64,
    told: AtomicU8,
    waker: Mutex<Option<Waker>>,
    /// The protocol of an HTTP/1.1 connection changes: set by the service, read by the transport's guard.
    pub switching: AtomicU8,
    pub is_refused: AtomicBool,
}

/// Values of `switching`.
pub const SWITCH_NO: u8 = 0;
pub const SWITCH_REFUSED: u8 = 1;
pub const SWITCHED: u8 = 2;

impl Gauge {
    pub fn new(direction: &'static str, name: Arc<str>, owner: Arc<str>, local: String, address: String) -> Gauge {
        Gauge {
            direction,
            name,
            owner,
            local,
            address,
            peer: OnceLock::new(),
            chain: OnceLock::new(),
            protocol: OnceLock::new(),
            opened: Instant::now(),
            not_after: AtomicU64::new(0),
            received: AtomicU64::new(0),
            written: AtomicU64::new(0),
            requests: AtomicU64::new(0),
            active: AtomicU64::new(0),
            moved: AtomicU64::new(0),
            head_since: AtomicU64::new(0),
            stalled_since: AtomicU64::new(0),
            told: AtomicU8::new(ON),
            waker: Mutex::new(None),
            switching: AtomicU8::new(SWITCH_NO),
            is_refused: AtomicBool::new(false),
        }
    }

    /// A connection that somebody opened to us.
    pub fn is_served(&self) -> bool {
        matches!(self.direction, "data" | "inbound")
    }

    pub fn is_of(&self, id: &str) -> bool {
        self.owner.split(' ').any(|one| one == id)
    }

    fn now(&self) -> u64 {
        u64::try_from(self.opened.elapsed().as_millis()).unwrap_or(u64::MAX).max(1)
    }

    pub fn moved(&self) {
        self.moved.store(self.now(), Ordering::Relaxed);
    }

    /// Milliseconds since something moved.
    pub fn still_for(&self) -> u64 {
        self.now().saturating_sub(self.moved.load(Ordering::Relaxed))
    }

    /// A head has begun, or is whole.
    pub fn note_head(&self, is_unfinished: bool) {
        if is_unfinished {
            if self.head_since.load(Ordering::Relaxed) == 0 {
                self.head_since.store(self.now(), Ordering::Relaxed);
            }
        } else if self.head_since.load(Ordering::Relaxed) != 0 {
            self.head_since.store(0, Ordering::Relaxed);
        }
    }

    pub fn head_for(&self) -> Option<u64> {
        since(&self.head_since, self.now())
    }

    pub fn note_room(&self, has_room: bool) {
        if has_room {
            if self.stalled_since.load(Ordering::Relaxed) != 0 {
                self.stalled_since.store(0, Ordering::Relaxed);
            }
        } else if self.stalled_since.load(Ordering::Relaxed) == 0 {
            self.stalled_since.store(self.now(), Ordering::Relaxed);
        }
    }

    pub fn stalled_for(&self) -> Option<u64> {
        since(&self.stalled_since, self.now())
    }

    pub fn tell(&self, what: Told) {
        let level = if what == Told::Leave { LEAVE } else { CUT };
        if self.told.fetch_max(level, Ordering::AcqRel) < level {
            if let Some(waker) = self.waker.lock().take() {
                waker.wake();
            }
        }
    }

    /// Ready once more has been said than `heard`.
    pub fn poll_told(&self, heard: Option<Told>, context: &mut Context<'_>) -> Poll<Told> {
        let level = match heard {
            None => ON,
            Some(Told::Leave) => LEAVE,
            Some(Told::Cut) => CUT,
        };
        if let Some(told) = self.above(level) {
            return Poll::Ready(told);
        }
        let mut waker = self.waker.lock();
        match &mut *waker {
            Some(known) if known.will_wake(context.waker()) => {}
            other => *other = Some(context.waker().clone()),
        }
        drop(waker);
        self.above(level).map_or(Poll::Pending, Poll::Ready)
    }

    fn above(&self, level: u8) -> Option<Told> {
        match self.told.load(Ordering::Acquire) {
            told if told <= level => None,
            LEAVE => Some(Told::Leave),
            _ => Some(Told::Cut),
        }
    }

    /// A request that offered to change the protocol has its answer.
    pub fn answer_offer(&self, is_offer: bool, status: StatusCode) {
        if is_offer {
            let answer = if status == StatusCode::SWITCHING_PROTOCOLS { SWITCHED } else { SWITCH_REFUSED };
            self.switching.store(answer, Ordering::Relaxed);
        }
    }

    pub fn is_leaving(&self) -> bool {
        self.told.load(Ordering::Acquire) != ON
    }

    pub fn is_cut(&self) -> bool {
        self.told.load(Ordering::Acquire) == CUT
    }

    /// A new request may go over it: nobody said otherwise, and what its peer proved still holds.
    pub fn is_usable(&self) -> bool {
        let end = self.not_after.load(Ordering::Relaxed);
        let holds = || SystemTime::now().duration_since(UNIX_EPOCH).is_ok_and(|now| now.as_secs() < end);
        self.told.load(Ordering::Acquire) == ON && (end == 0 || holds())
    }
}

fn since(mark: &AtomicU64, now: u64) -> Option<u64> {
    let at = mark.load(Ordering::Relaxed);
    (at != 0).then(|| now.saturating_sub(at))
}

/// All open connections of the proxy.
#[derive(Default)]
pub struct Gauges {
    table: Mutex<(u64, AHashMap<u64, Arc<Gauge>>)>,
}

/// Somebody who came in at a door, until the last of what he began has ended.
pub struct Visit {
    listed: Listed,
    door: Arc<Door>,
}

impl Visit {
    pub fn new(listed: Listed, door: Arc<Door>) -> Visit {
        add(&door.opened);
        add(&door.open);
        Visit { listed, door }
    }

    pub fn gauge(&self) -> &Arc<Gauge> {
        &self.listed.gauge
    }
}

impl Drop for Visit {
    fn drop(&mut self) {
        let gauge = &self.listed.gauge;
        self.door.open.fetch_sub(1, Ordering::Relaxed);
        self.door.received.fetch_add(gauge.received.load(Ordering::Relaxed), Ordering::Relaxed);
        self.door.written.fetch_add(gauge.written.load(Ordering::Relaxed), Ordering::Relaxed);
    }
}

/// A connection's place in the list, until it is dropped.
pub struct Listed {
    pub gauge: Arc<Gauge>,
    number: u64,
    gauges: Arc<Gauges>,
    seat: Option<Seat>,
}

impl Listed {
    /// The connection takes one of the places that somebody has, for as long as it is listed.
    pub fn within(mut self, seat: Option<Seat>) -> Listed {
        self.seat = seat;
        self
    }
}

impl Gauges {
    pub fn add(self: &Arc<Self>, gauge: Gauge) -> Listed {
        let gauge = Arc::new(gauge);
        let mut table = self.table.lock();
        table.0 += 1;
        let number = table.0;
        table.1.insert(number, gauge.clone());
        Listed { gauge, number, gauges: self.clone(), seat: None }
    }

    pub fn all(&self) -> Vec<Arc<Gauge>> {
        self.table.lock().1.values().cloned().collect()
    }

    pub fn tell(&self, what: Told, is_meant: impl Fn(&Gauge) -> bool) {
        for gauge in self.all() {
            if is_meant(&gauge) {
                gauge.tell(what);
            }
        }
    }
}

impl Drop for Listed {
    fn drop(&mut self) {
        self.gauges.table.lock().1.remove(&self.number);
    }
}
