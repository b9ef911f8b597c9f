//! Which body is this, and what hangs on its end?
//!
//! One type for both directions: what somebody sends passes through piece by piece, and when it has ended well its connection goes
//! back to the pool. A body that breaks is an error to whoever reads it, so that a cut message never looks whole. One that makes no
//! progress is broken by the worker's sweep (`progress`).
use std::fmt;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};

use bytes::Bytes;
use http::{HeaderMap, HeaderName};
use http_body::{Body, Frame, SizeHint};
use hyper::body::Incoming;

use crate::outbound::UnderWay;
use crate::pool::Lease;
use crate::progress::{Progress, Taken};

/// Why a body ended before its end. It hides its cause, which is another connection's affair.
#[derive(Debug)]
pub struct Broken(pub &'static str);

impl fmt::Display for Broken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0)
    }
}

impl std::error::Error for Broken {}

pub struct Relay {
    kind: Kind,
    progress: Option<Rc<Progress>>,
    /// Which of the two ways of `progress`.
    way: usize,
    lease: Option<Lease>,
    /// The answer is under way until this is dropped.
    under_way: Option<UnderWay>,
    /// Set once the first of several pieces was given.
    taken: Option<Rc<Taken>>,
}

enum Kind {
    Empty,
    Full(Option<Bytes>),
    Passing(Incoming),
}

impl Relay {
    pub fn empty() -> Relay {
        Relay { kind: Kind::Empty, progress: None, way: 0, lease: None, under_way: None, taken: None }
    }

    pub fn full(bytes: Bytes) -> Relay {
        Relay { kind: Kind::Full(Some(bytes)), progress: None, way: 0, lease: None, under_way: None, taken: None }
    }

    /// A request's body.
    pub fn request(incoming: Incoming, progress: Option<Rc<Progress>>) -> Relay {
        if incoming.is_end_stream() {
            return Relay::empty();
        }
        Relay { kind: Kind::Passing(incoming), progress, way: 0, lease: None, under_way: None, taken: None }
    }

    /// An answer's body, with what it holds until its end.
    pub fn answer(incoming: Incoming, lease: Lease, progress: Option<Rc<Progress>>) -> Relay {
        if incoming.is_end_stream() {
            lease.finish();
            return Relay::empty();
        }
        Relay { kind: Kind::Passing(incoming), progress, way: 1, lease: Some(lease), under_way: None, taken: None }
    }

    pub fn hold(&mut self, under_way: UnderWay) {
        self.under_way = Some(under_way);
    }

    fn finish(&mut self) {
        if let (0, Some(progress)) = (self.way, &self.progress) {
            progress.asked();
        }
        if let Some(lease) = self.lease.take() {
            lease.finish();
        }
    }
}

impl Body for Relay {
    type Data = Bytes;
    type Error = Broken;

    fn poll_frame(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Broken>>> {
        let relay = &mut *self;
        let incoming = match &mut relay.kind {
            Kind::Empty => return Poll::Ready(None),
            Kind::Full(bytes) => {
                return Poll::Ready(bytes.take().filter(|bytes| !bytes.is_empty()).map(|bytes| Ok(Frame::data(bytes))))
            }
            Kind::Passing(incoming) => incoming,
        };
        if relay.progress.as_ref().is_some_and(|progress| progress.is_late()) {
            relay.kind = Kind::Empty;
            relay.lease = None;
            return Poll::Ready(Some(Err(Broken("the message made no progress"))));
        }
        if let Some(taken) = &relay.taken {
            taken.asked();
        }
        match Pin::new(&mut *incoming).poll_frame(context) {
            Poll::Pending => {
                if let Some(progress) = &relay.progress {
                    progress.wait(relay.way, context);
                }
                Poll::Pending
            }
            Poll::Ready(None) => {
                relay.kind = Kind::Empty;
                relay.finish();
                Poll::Ready(None)
            }
            Poll::Ready(Some(Ok(mut frame))) => {
                if let Some(progress) = &relay.progress {
                    progress.step(frame.data_ref().map_or(0, Bytes::len));
                }
                if let Some(trailers) = frame.trailers_mut() {
                    clean(trailers);
                }
                if incoming.is_end_stream() {
                    relay.finish();
                } else if let Some(under_way) = &relay.under_way {
                    relay.taken.get_or_insert_with(|| Taken::new(&under_way.0)).gave();
                }
                Poll::Ready(Some(Ok(frame)))
            }
            Poll::Ready(Some(Err(_))) => {
                relay.kind = Kind::Empty;
                relay.lease = None;
                Poll::Ready(Some(Err(Broken("the connection that the message came over has ended"))))
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        match &self.kind {
            Kind::Empty => true,
            Kind::Full(bytes) => bytes.as_ref().is_none_or(|bytes| bytes.is_empty()),
            Kind::Passing(incoming) => incoming.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match &self.kind {
            Kind::Empty => SizeHint::with_exact(0),
            Kind::Full(bytes) => SizeHint::with_exact(bytes.as_ref().map_or(0, |bytes| bytes.len() as u64)),
            Kind::Passing(incoming) => incoming.size_hint(),
        }
    }
}

/// Trailers carry no fields of the one hop either.
fn clean(trailers: &mut HeaderMap) {
    let hop: Vec<HeaderName> =
        trailers.keys().filter(|name| mesh_wire::delegated::is_hop_field(name.as_str())).cloned().collect();
    for name in hop {
        trailers.remove(name);
    }
}
