//! Does a message get on? Asked of all messages of a worker at once, twice a second.
//!
//! A timer for each message would be set and cleared with every piece; here a message only notes when it began to wait, and nothing
//! at all while it doesn't. What is too late is broken where it waits: a body that doesn't come fails its reader, and a peer that
//! doesn't take its answer is asked to leave.
use std::cell::{Cell, RefCell};
use std::rc::{Rc, Weak};
use std::sync::Arc;
use std::task::{Context, Waker};
use std::time::{Duration, Instant};

use crate::gauge::{Gauge, Told};
use crate::limits;

thread_local! {
    static WAITING: RefCell<Vec<Weak<dyn Swept>>> = const { RefCell::new(Vec::new()) };
}

trait Swept {
    fn sweep(&self, now: Instant);
}

/// Called by each worker, on its own thread.
pub fn sweep(now: Instant) {
    // What is woken may begin to wait again at once.
    let mut all = WAITING.take();
    all.retain(|weak| {
        weak.upgrade().is_some_and(|message| {
            message.sweep(now);
            true
        })
    });
    WAITING.with(|waiting| {
        let mut waiting = waiting.borrow_mut();
        all.append(&mut waiting);
        *waiting = all;
    });
}

fn look_after(message: Weak<dyn Swept>) {
    WAITING.with(|waiting| waiting.borrow_mut().push(message));
}

/// Of what somebody sends us, or of a stream both ways.
pub struct Progress {
    is_stream: bool,
    limit: Duration,
    /// Of a stream: its request has not ended; its answer has begun.
    is_asking: Cell<bool>,
    is_answered: Cell<bool>,
    /// Since when more is waited for, and what has come since.
    since: Cell<Option<Instant>>,
    bytes: Cell<u64>,
    is_late: Cell<bool>,
    wakers: RefCell<[Option<Waker>; 2]>,
}

impl Progress {
    /// Of a request's body; on a `stream` long pauses are usual, and either direction counts.
    pub fn new(is_stream: bool, has_body: bool) -> Rc<Progress> {
        Progress::within(is_stream, has_body, if is_stream { limits::IDLE } else { limits::BODY })
    }

    /// Of the body of a caller who was attested, and who knows himself how long he wants to wait.
    pub fn of_ours() -> Rc<Progress> {
        Progress::within(false, true, limits::IDLE)
    }

    fn within(is_stream: bool, has_body: bool, limit: Duration) -> Rc<Progress> {
        let made = Rc::new(Progress {
            is_stream,
            limit,
            is_asking: Cell::new(has_body),
            is_answered: Cell::new(false),
            since: Cell::new((is_stream && has_body).then(Instant::now)),
            bytes: Cell::new(0),
            is_late: Cell::new(false),
            wakers: RefCell::default(),
        });
        let weak: Weak<Progress> = Rc::downgrade(&made);
        look_after(weak);
        made
    }

    pub fn is_late(&self) -> bool {
        self.is_late.get()
    }

    /// The answer's head is here: from now on silence counts.
    pub fn answered(&self) {
        self.is_answered.set(true);
        if self.is_stream {
            self.since.set(Some(Instant::now()));
        }
    }

    /// Something came.
    pub fn step(&self, bytes: usize) {
        if self.is_stream {
            if self.since.get().is_some() {
                self.since.set(Some(Instant::now()));
            }
            return;
        }
        let total = self.bytes.get() + bytes as u64;
        self.bytes.set(total);
        if total >= limits::BODY_AT_LEAST {
            self.since.set(None);
            self.bytes.set(0);
        }
    }

    /// Nothing is there, and more is waited for.
    pub fn wait(&self, way: usize, context: &mut Context<'_>) {
        if !self.is_stream && self.since.get().is_none() {
            self.since.set(Some(Instant::now()));
        }
        if let Some(slot) = self.wakers.borrow_mut().get_mut(way) {
            match slot {
                Some(known) if known.will_wake(context.waker()) => {}
                other => *other = Some(context.waker().clone()),
            }
        }
    }

    /// The request has ended in time.
    pub fn asked(&self) {
        self.is_asking.set(false);
        if !self.is_stream || !self.is_answered.get() {
            self.since.set(None);
        }
    }
}

impl Swept for Progress {
    fn sweep(&self, now: Instant) {
        if self.since.get().is_some_and(|since| now.saturating_duration_since(since) >= self.limit) {
            self.is_late.set(true);
            self.wakers.take().into_iter().flatten().for_each(Waker::wake);
        }
    }
}

/// Of an answer that is here and isn't taken.
pub struct Taken {
    gauge: Arc<Gauge>,
    since: Cell<Option<Instant>>,
}

impl Taken {
    pub fn new(gauge: &Arc<Gauge>) -> Rc<Taken> {
        let made = Rc::new(Taken { gauge: gauge.clone(), since: Cell::new(None) });
        let weak: Weak<Taken> = Rc::downgrade(&made);
        look_after(weak);
        made
    }

    /// A piece was given; the next is asked for when it has gone.
    pub fn gave(&self) {
        self.since.set(Some(Instant::now()));
    }

    /// It is asked for.
    pub fn asked(&self) {
        self.since.set(None);
    }
}

impl Swept for Taken {
    fn sweep(&self, now: Instant) {
        if self.since.get().is_some_and(|since| now.saturating_duration_since(since) >= limits::STALL) {
            // One stream alone can't be ended while its window is closed; the others may go on for a while.
            self.gauge.tell(Told::Leave);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    fn after(seconds: u64) -> Instant {
        Instant::now() + Duration::from_secs(seconds)
    }

    fn context() -> Context<'static> {
        Context::from_waker(Waker::noop())
    }

    #[test]
    fn a_body_that_is_waited_for_is_late_after_its_time() {
        let body = Progress::new(false, true);
        sweep(after(3600));
        assert!(!body.is_late(), "nobody waits for it");
        body.wait(0, &mut context());
        sweep(after(9));
        assert!(!body.is_late());
        sweep(after(11));
        assert!(body.is_late());
    }

    #[test]
    fn a_byte_now_and_then_is_no_progress() {
        let body = Progress::new(false, true);
        body.wait(0, &mut context());
        (0..10).for_each(|_| body.step(1));
        sweep(after(11));
        assert!(body.is_late());
        let honest = Progress::new(false, true);
        honest.wait(0, &mut context());
        honest.step(100);
        sweep(after(11));
        assert!(!honest.is_late());
    }

    #[test]
    fn a_stream_may_wait_for_its_answer_but_not_be_silent_for_ever() {
        let call = Progress::new(true, true);
        call.asked();
        sweep(after(3600));
        assert!(!call.is_late(), "the request has ended, and the answer takes its time");
        call.answered();
        sweep(after(59));
        assert!(!call.is_late());
        sweep(after(61));
        assert!(call.is_late());
    }

    #[test]
    fn who_does_not_take_an_answer_is_asked_to_leave() {
        let gauge = Arc::new(Gauge::new("inbound", "".into(), "".into(), String::new(), String::new()));
        let taken = Taken::new(&gauge);
        taken.gave();
        sweep(after(59));
        assert!(gauge.is_usable());
        taken.asked();
        sweep(after(61));
        assert!(gauge.is_usable());
        taken.gave();
        sweep(after(61));
        assert!(!gauge.is_usable());
    }
}
