//! Which body is this, and what hangs on its end?
//!
//! One type for both directions: what somebody sends passes through piece by piece, and when it has ended well its connection goes
//! back to the pool. A body that breaks is an error to whoever reads it, so that a cut message never looks whole: it goes on as the
//! reset that the other side sent, or else, where it is an answer of gRPC, as UNAVAILABLE, which is what gRPC itself makes of a
//! connection that ended. One that makes no progress is broken by the worker's sweep (`progress`).
//!
//! There is one that it can't tell: an answer of HTTP/2 without a length that is reset in the middle with NO_ERROR, which hyper takes for
//! the end of the message.
use std::error::Error as _;
use std::fmt;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};

use bytes::Bytes;
use http::{HeaderMap, HeaderName};
use http_body::{Body, Frame, SizeHint};
use hyper::body::Incoming;

use crate::fail;
use crate::outbound::UnderWay;
use crate::pool::Lease;
use crate::progress::{Progress, Taken};

/// Why a body ended before its end. It hides its cause, which is another connection's affair.
#[derive(Debug)]
pub struct Broken {
    why: &'static str,
    /// What a stream of HTTP/2 is reset with: hyper looks for it here.
    reset: Option<h2::Error>,
}

impl fmt::Display for Broken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.why)
    }
}

impl std::error::Error for Broken {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.reset.as_ref().map(|error| error as _)
    }
}

const LATE: &str = "the message made no progress";
const ENDED: &str = "the connection that the message came over has ended";

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
    /// It may end with a status of ours.
    is_grpc: bool,
}

enum Kind {
    Empty,
    Full(Option<Bytes>),
    Passing(Incoming),
}

impl Relay {
    pub fn empty() -> Relay {
        Relay { kind: Kind::Empty, progress: None, way: 0, lease: None, under_way: None, taken: None, is_grpc: false }
    }

    pub fn full(bytes: Bytes) -> Relay {
        Relay {
            kind: Kind::Full(Some(bytes)),
            progress: None,
            way: 0,
            lease: None,
            under_way: None,
            taken: None,
            is_grpc: false,
        }
    }

    /// A request's body.
    pub fn request(incoming: Incoming, progress: Option<Rc<Progress>>) -> Relay {
        if incoming.is_end_stream() {
            return Relay::empty();
        }
        Relay {
            kind: Kind::Passing(incoming),
            progress,
            way: 0,
            lease: None,
            under_way: None,
            taken: None,
            is_grpc: false,
        }
    }

    /// An answer's body, with what it holds until its end.
    pub fn answer(incoming: Incoming, lease: Lease, progress: Option<Rc<Progress>>, is_grpc: bool) -> Relay {
        if incoming.is_end_stream() {
            lease.finish();
            return Relay::empty();
        }
        Relay {
            kind: Kind::Passing(incoming),
            progress,
            way: 1,
            lease: Some(lease),
            under_way: None,
            taken: None,
            is_grpc,
        }
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

    /// The end that isn't one.
    fn broken(&mut self, why: &'static str, reset: Option<h2::Reason>) -> Result<Frame<Bytes>, Broken> {
        self.kind = Kind::Empty;
        self.lease = None;
        match reset {
            None if self.is_grpc => Ok(Frame::trailers(fail::unavailable(why))),
            reset => Err(Broken { why, reset: reset.map(h2::Error::from) }),
        }
    }

    /// What the other side broke it off with. Whoever gives a request up cancels it, however he does that; an answer that has begun was
    /// not refused, whatever is said.
    fn reset_of(&self, error: &hyper::Error) -> Option<h2::Reason> {
        let told = error.source().and_then(|source| source.downcast_ref::<h2::Error>());
        let told = told.filter(|error| error.is_reset() && error.is_remote()).and_then(h2::Error::reason);
        told.filter(|reason| *reason != h2::Reason::REFUSED_STREAM).or((self.way == 0).then_some(h2::Reason::CANCEL))
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
            return Poll::Ready(Some(relay.broken(LATE, None)));
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
            // A reset without an error (NO_ERROR) is for what we still send, and hyper takes it for the end of what comes, too.
            Poll::Ready(None) if incoming.size_hint().exact().is_some_and(|left| left > 0) => {
                Poll::Ready(Some(relay.broken(ENDED, None)))
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
            Poll::Ready(Some(Err(error))) => {
                let reset = relay.reset_of(&error);
                Poll::Ready(Some(relay.broken(ENDED, reset)))
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
