//! How does one request go over one connection, and how far had it come when it failed?
//!
//! Exactly one attempt. What tells the failures apart is counted, not guessed: the bytes that the socket took and gave since the
//! request began, and whether the connection had carried a request before.
use std::error::Error as _;
use std::rc::Rc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use http::{Request, Response, Version};
use hyper::body::Incoming;
use mesh_wire::delegated::{Reason, Spoken};
use tokio::time::Instant;

use crate::body::Relay;
use crate::fail::{self, Failure};
use crate::forward;
use crate::gauge::Gauge;
use crate::pool::{Lease, Target};
use crate::progress::Progress;
use crate::worker::Worker;

pub struct Answer {
    pub response: Response<Incoming>,
    pub lease: Lease,
}

impl Answer {
    /// `is_http2`: whoever gets it is told its end by HTTP/2.
    pub fn relay(self, progress: Option<Rc<Progress>>, is_http2: bool) -> Response<Relay> {
        let Answer { response, lease } = self;
        if let Some(progress) = &progress {
            progress.answered();
        }
        let (mut head, body) = response.into_parts();
        // In the words of HTTP/1.0 the answer would end with the connection, and one that was cut would look whole.
        head.version = Version::HTTP_11;
        let is_grpc = is_http2 && fail::is_grpc(&head.headers);
        Response::from_parts(head, Relay::answer(body, lease, progress, is_grpc))
    }
}

/// What had gone over a connection when the request began.
struct Mark {
    written: u64,
    received: u64,
    was_used: bool,
}

impl Mark {
    fn of(gauge: &Gauge, was_used: bool) -> Mark {
        Mark { written: gauge.written.load(Relaxed), received: gauge.received.load(Relaxed), was_used }
    }
}

pub async fn send(
    worker: &Rc<Worker>,
    target: &Rc<Target>,
    request: Request<Relay>,
    connect: Duration,
) -> Result<Answer, (Failure, Option<Request<Relay>>)> {
    let until = Instant::now() + connect;
    match target.spoken {
        Spoken::Http1 => {
            let mut one = match target.take_idle() {
                Some(one) => {
                    worker.common.upstream.reused.fetch_add(1, Relaxed);
                    one
                }
                None => match target.open_one(worker, until).await {
                    Ok(one) => one,
                    Err(failure) => return Err((failure, Some(request))),
                },
            };
            let mark = Mark::of(&one.gauge, one.is_used);
            one.gauge.requests.fetch_add(1, Relaxed);
            match one.sender.try_send_request(request).await {
                Ok(response) if !forward::has_one_length(&response) => {
                    // The connection goes with it: nobody knows where the answer ends.
                    let text = format!("{} says in two ways how long its answer is.", target.address);
                    Err((Failure::new(Reason::Protocol, true, text), None))
                }
                Ok(response) => Ok(Answer { response, lease: Lease::One(one, target.clone()) }),
                Err(mut error) => {
                    let unsent = error.take_message();
                    Err((judge(target, &one.gauge, &mark, unsent.is_some(), error.error()), unsent))
                }
            }
        }
        Spoken::Http2 => {
            let (stream, was_used) = match target.share(worker, until).await {
                Ok(found) => found,
                Err(failure) => return Err((failure, Some(request))),
            };
            let multi = stream.0.clone();
            let mark = Mark::of(&multi.gauge, was_used);
            multi.gauge.requests.fetch_add(1, Relaxed);
            multi.used.set(multi.used.get() + 1);
            let sent = multi.sender.borrow_mut().try_send_request(request);
            match sent.await {
                Ok(response) => Ok(Answer { response, lease: Lease::Multi { _stream: stream } }),
                Err(mut error) => {
                    let unsent = error.take_message();
                    Err((judge(target, &multi.gauge, &mark, unsent.is_some(), error.error()), unsent))
                }
            }
        }
    }
}

fn judge(target: &Target, gauge: &Gauge, mark: &Mark, is_unsent: bool, error: &hyper::Error) -> Failure {
    let address = &target.address;
    let is_written = !is_unsent && gauge.written.load(Relaxed) != mark.written;
    let has_received = gauge.received.load(Relaxed) != mark.received;
    let because = deepest(error);
    if !is_written {
        let text = format!("{address} closed the connection before anything was written ({because}).");
        return Failure::new(Reason::Unwritten, false, text);
    }
    if let Some(error) = error.source().and_then(|source| source.downcast_ref::<h2::Error>()) {
        let is_gone = error.is_go_away() && error.is_remote();
        if is_gone || error.reason() == Some(h2::Reason::REFUSED_STREAM) {
            let text = format!("{address} declined the request without processing it ({because}).");
            return Failure::new(Reason::Declined, true, text);
        }
        if error.is_reset() || error.is_go_away() {
            let reason = if error.is_remote() { Reason::Closed } else { Reason::Protocol };
            return Failure::new(reason, true, format!("{address} ended the request before its answer ({because})."));
        }
    }
    if error.is_parse() || error.is_parse_status() {
        let text = format!("{address} does not answer in correct HTTP ({because}). Look at what really listens there.");
        return Failure::new(Reason::Protocol, true, text);
    }
    if mark.was_used && !has_received {
        let text =
            format!("{address} closed the connection that it had kept alive, without a byte of an answer ({because}).");
        return Failure::new(Reason::Stale, true, text);
    }
    Failure::new(
        Reason::Closed,
        true,
        format!("{address} closed the connection before its answer was complete ({because})."),
    )
}

fn deepest(error: &hyper::Error) -> String {
    let mut cause: &dyn std::error::Error = error;
    while let Some(next) = cause.source() {
        cause = next;
    }
    cause.to_string()
}
