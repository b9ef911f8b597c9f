//! What happens to a connection whose protocol was changed (WebSocket)? Bytes go both ways until one side ends.
//!
//! The change was agreed end to end: the request offered it, the answer accepted it. What came before the answer is not passed on:
//! no honest client sends before it knows.
use std::future::{poll_fn, Future};
use std::io;
use std::pin::{pin, Pin};
use std::rc::Rc;
use std::sync::atomic::Ordering::Relaxed;
use std::task::{ready, Context, Poll};
use std::time::Duration;

use hyper::rt::{Read as _, ReadBuf, Write as _};
use hyper::upgrade::{OnUpgrade, Upgraded};
use tokio::time::{sleep, Instant};

use crate::gauge::{Told, Visit};
use crate::limits;
use crate::outbound::UnderWay;
use crate::progress::Progress;
use crate::serve;

/// What waits between two sides.
const PIECE: usize = 16 * 1024;

/// It lasts no longer than what the caller proved, and ends when the caller's connection is cut. One that is told to leave can't be
/// asked to: it gets the time that a stream of HTTP/2 has.
pub async fn join(near: OnUpgrade, far: OnUpgrade, progress: Rc<Progress>, visit: Rc<Visit>) {
    let (Ok(mut near), Ok(mut far)) = (near.await, far.await) else { return };
    progress.answered();
    let (mut up, mut down) = (Way::new(), Way::new());
    let gauge = visit.gauge();
    let _under_way = UnderWay::go_on(gauge);
    let mut end = pin!(sleep(serve::lasts(gauge.not_after.load(Relaxed))));
    let mut heard = None;
    let _: io::Result<()> = poll_fn(|context| {
        while let Poll::Ready(told) = gauge.poll_told(heard, context) {
            let time = if told == Told::Cut { Duration::ZERO } else { limits::GRACE };
            let at = end.deadline().min(Instant::now() + time);
            end.as_mut().reset(at);
            heard = Some(told);
        }
        if end.as_mut().poll(context).is_ready() || progress.is_late() {
            return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
        }
        let there = up.poll(&mut near, &mut far, &progress, context)?;
        let back = down.poll(&mut far, &mut near, &progress, context)?;
        match (there, back) {
            (Poll::Ready(()), Poll::Ready(())) => Poll::Ready(Ok(())),
            _ => {
                progress.wait(0, context);
                Poll::Pending
            }
        }
    })
    .await;
}

/// One direction.
struct Way {
    buffer: Vec<u8>,
    from: usize,
    to: usize,
    is_ended: bool,
    is_shut: bool,
    needs_flush: bool,
}

impl Way {
    fn new() -> Way {
        Way { buffer: vec![0; PIECE], from: 0, to: 0, is_ended: false, is_shut: false, needs_flush: false }
    }

    fn poll(
        &mut self,
        reader: &mut Upgraded,
        writer: &mut Upgraded,
        progress: &Progress,
        context: &mut Context<'_>,
    ) -> io::Result<Poll<()>> {
        loop {
            match self.step(reader, writer, progress, context) {
                Poll::Ready(Ok(true)) => return Ok(Poll::Ready(())),
                Poll::Ready(Ok(false)) => {}
                Poll::Ready(Err(error)) => return Err(error),
                Poll::Pending => return Ok(Poll::Pending),
            }
        }
    }

    fn step(
        &mut self,
        reader: &mut Upgraded,
        writer: &mut Upgraded,
        progress: &Progress,
        context: &mut Context<'_>,
    ) -> Poll<io::Result<bool>> {
        if self.from < self.to {
            let piece = self.buffer.get(self.from..self.to).unwrap_or_default();
            let written = ready!(Pin::new(&mut *writer).poll_write(context, piece))?;
            if written == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.from += written;
            self.needs_flush = true;
            progress.step(written);
            return Poll::Ready(Ok(false));
        }
        if self.is_ended {
            if !self.is_shut {
                ready!(Pin::new(&mut *writer).poll_shutdown(context))?;
                self.is_shut = true;
            }
            return Poll::Ready(Ok(true));
        }
        let mut buffer = ReadBuf::new(&mut self.buffer);
        match Pin::new(&mut *reader).poll_read(context, buffer.unfilled()) {
            Poll::Ready(result) => {
                result?;
                let count = buffer.filled().len();
                (self.from, self.to) = (0, count);
                self.is_ended = count == 0;
                Poll::Ready(Ok(false))
            }
            Poll::Pending => {
                if self.needs_flush {
                    ready!(Pin::new(&mut *writer).poll_flush(context))?;
                    self.needs_flush = false;
                }
                Poll::Pending
            }
        }
    }
}
