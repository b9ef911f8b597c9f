//! How long does a connection last? Until it ends, is told to, or what its peer proved has ended.
use std::future::{poll_fn, Future};
use std::pin::{pin, Pin};
use std::sync::atomic::Ordering;
use std::task::Poll;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use hyper::body::Incoming;
use hyper::server::conn::{http1, http2};
use hyper::service::HttpService;
use tokio::time::{sleep, Instant};

use crate::body::Relay;
use crate::gauge::{Gauge, Told};
use crate::limits;
use crate::line::Line;
use crate::rt::Local;

/// Ends in its own way: with GOAWAY, or with the answer under way.
pub trait Leaving {
    /// HTTP/1.1 has no GOAWAY: an idle connection that ends may cut off a request that is on its way, and nobody knows whether it was read.
    const IS_ABRUPT: bool;
    fn leave(self: Pin<&mut Self>);
}

impl<S> Leaving for http1::UpgradeableConnection<Line, S>
where
    S: HttpService<Incoming, ResBody = Relay>,
    S::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    const IS_ABRUPT: bool = true;

    fn leave(self: Pin<&mut Self>) {
        self.graceful_shutdown();
    }
}

impl<S> Leaving for http2::Connection<Line, S, Local>
where
    S: HttpService<Incoming, ResBody = Relay>,
    S::Future: 'static,
    S::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    const IS_ABRUPT: bool = false;

    fn leave(self: Pin<&mut Self>) {
        self.graceful_shutdown();
    }
}

/// Polls a connection to its end. `lasts`: after so long it is told to leave.
pub async fn serve<C, E>(connection: C, gauge: &Gauge, lasts: Duration) -> Result<(), E>
where
    C: Future<Output = Result<(), E>> + Leaving,
{
    let mut connection = pin!(connection);
    let mut end = pin!(sleep(lasts));
    let mut heard = None;
    let (mut is_listening, mut is_over) = (false, false);
    poll_fn(|context| loop {
        if let Poll::Ready(result) = connection.as_mut().poll(context) {
            return Poll::Ready(result);
        }
        if let Poll::Ready(told) = gauge.poll_told(heard, context) {
            heard = Some(told);
            if told == Told::Cut {
                return Poll::Ready(Ok(()));
            }
            is_listening = C::IS_ABRUPT && !is_over && gauge.active.load(Ordering::Relaxed) == 0;
            if is_listening {
                end.as_mut().reset(Instant::now() + limits::LAST);
            } else {
                connection.as_mut().leave();
                end.as_mut().reset(Instant::now() + limits::GRACE);
            }
            continue;
        }
        if end.as_mut().poll(context).is_ready() {
            if is_listening {
                is_listening = false;
                connection.as_mut().leave();
                end.as_mut().reset(Instant::now() + limits::GRACE);
                continue;
            }
            // What the peer proved has ended: it may ask nothing more.
            is_over = heard.is_none();
            gauge.tell(if heard.is_none() { Told::Leave } else { Told::Cut });
            continue;
        }
        return Poll::Pending;
    })
    .await
}

/// A connection of ours to somebody: ends when it ends, or is cut.
pub async fn until_told<E>(connection: impl Future<Output = Result<(), E>>, gauge: &Gauge) -> Result<(), E> {
    let mut connection = pin!(connection);
    poll_fn(|context| {
        if let Poll::Ready(result) = connection.as_mut().poll(context) {
            return Poll::Ready(result);
        }
        match gauge.poll_told(Some(Told::Leave), context) {
            Poll::Ready(_) => Poll::Ready(Ok(())),
            Poll::Pending => Poll::Pending,
        }
    })
    .await
}

/// How long a connection may last whose peer's proof ends then (Unix seconds; 0 without one).
pub fn lasts(not_after: u64) -> Duration {
    if not_after == 0 {
        return limits::AGE;
    }
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    Duration::from_secs(not_after).saturating_sub(now).min(limits::AGE)
}
