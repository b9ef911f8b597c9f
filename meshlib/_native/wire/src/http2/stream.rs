//! How far has one exchange come, in both directions?
//!
//! A request's body waits in `queue` until the peer's window lets it out; an answer's body is handed over at once, and its window
//! is given back when the application has taken it (`consume`), so that a slow reader stops its own stream and no other. What the
//! `h2` crate leaves to its user is checked here: the number of fields and of interim answers, one content-length, no body where
//! there can be none.
use std::collections::VecDeque;
use std::pin::Pin;
use std::task::{Context, Poll, Waker};

use ::http::header::{HeaderMap, CONTENT_LENGTH};
use ::http::response::Parts;
use bytes::Bytes;
use h2::client::ResponseFuture;
use h2::{Reason, RecvStream, SendStream};
use std::future::Future;

use crate::error::{Error, ErrorKind, Result};
use crate::http1::response::MAX_FIELDS;
use crate::http1::MAX_INTERIM;
use crate::sink::Sink;

/// What faces show as the version: 1 is HTTP/1.1, 20 is HTTP/2.
pub const MINOR: u8 = 20;

enum Reading {
    Head(ResponseFuture),
    Body(RecvStream),
    Over,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Writing {
    More,
    /// All is in the queue.
    Last,
    Done,
}

/// What `read` found.
pub enum Step {
    Waiting,
    Ended,
    Failed(Failure),
}

pub enum Failure {
    /// What the crate found, or was told by the peer.
    Crate(h2::Error),
    /// What we found; the peer is to be told.
    Ours(Error),
}

pub struct Stream {
    waker: Waker,
    send: SendStream<Bytes>,
    queue: VecDeque<Bytes>,
    queued: usize,
    writing: Writing,
    left: Option<u64>,
    was_blocked: bool,
    reading: Reading,
    is_head: bool,
    has_no_body: bool,
    interim: u8,
    /// The window is given back at once: the caller reads only when it wants more.
    is_automatic: bool,
    unconsumed: usize,
    has_received: bool,
    /// How much had been received on the connection when it began.
    pub began: u64,
}

pub struct Begin {
    pub waker: Waker,
    pub response: ResponseFuture,
    pub send: SendStream<Bytes>,
    pub is_ended: bool,
    pub left: Option<u64>,
    pub is_head: bool,
    pub is_automatic: bool,
    pub began: u64,
}

impl Stream {
    pub fn new(begin: Begin) -> Stream {
        Stream {
            waker: begin.waker,
            send: begin.send,
            queue: VecDeque::new(),
            queued: 0,
            writing: if begin.is_ended { Writing::Done } else { Writing::More },
            left: begin.left,
            was_blocked: false,
            reading: Reading::Head(begin.response),
            is_head: begin.is_head,
            has_no_body: false,
            interim: 0,
            is_automatic: begin.is_automatic,
            unconsumed: 0,
            has_received: false,
            began: begin.began,
        }
    }

    pub fn has_received(&self) -> bool {
        self.has_received
    }

    pub fn is_sent(&self) -> bool {
        self.writing == Writing::Done
    }

    /// The peer's window is used up: what was sent last still waits here.
    pub fn is_blocked(&self) -> bool {
        self.queued > 0
    }

    /// Takes a piece of the request's body; `pump` sends it.
    pub fn queue(&mut self, data: Bytes, is_last: bool) -> Result<()> {
        match self.writing {
            Writing::More => {}
            Writing::Done | Writing::Last if data.is_empty() => return Ok(()),
            Writing::Done | Writing::Last => {
                return Err(Error::misuse(
                    "A piece of body was sent, but the request has ended.",
                    "Send the pieces after a request with streaming=True and before the one that is the last.",
                ));
            }
        }
        let hint = "Correct the header, or leave it out: the stream tells where the body ends.";
        if let Some(left) = &mut self.left {
            match left.checked_sub(data.len() as u64) {
                None => return Err(Error::misuse("The body is longer than its content-length.", hint)),
                Some(left) if is_last && left > 0 => {
                    let what = format!("The body ended {left} bytes before its content-length.");
                    return Err(Error::misuse(what, hint));
                }
                Some(rest) => *left = rest,
            }
        }
        if !data.is_empty() {
            self.queued += data.len();
            self.queue.push_back(data);
        }
        if is_last {
            self.writing = Writing::Last;
        }
        Ok(())
    }

    /// What had been held up is out (or for nobody) now. True once.
    pub fn take_unblocked(&mut self) -> bool {
        self.queued == 0 && std::mem::take(&mut self.was_blocked)
    }

    /// Gives the crate as much of the body as the windows allow.
    pub fn pump(&mut self) {
        if self.writing == Writing::Done {
            return;
        }
        let waker = self.waker.clone();
        let mut context = Context::from_waker(&waker);
        while let Some(first) = self.queue.front_mut() {
            self.send.reserve_capacity(self.queued);
            let mut room = self.send.capacity();
            if room == 0 {
                room = match self.send.poll_capacity(&mut context) {
                    Poll::Ready(Some(Ok(room))) => room,
                    // The peer wants no more of it; what it has to say comes to `read`.
                    Poll::Ready(Some(Err(_)) | None) => return self.stop_writing(),
                    Poll::Pending => {
                        self.was_blocked = true;
                        return;
                    }
                };
            }
            let piece = first.split_to(room.min(first.len()));
            if first.is_empty() {
                self.queue.pop_front();
            }
            self.queued -= piece.len();
            let is_end = self.writing == Writing::Last && self.queued == 0;
            if self.send.send_data(piece, is_end).is_err() {
                return self.stop_writing();
            }
            if is_end {
                self.writing = Writing::Done;
            }
        }
        if self.writing == Writing::Last {
            // An error means that the peer has ended the stream, which `read` tells.
            let _ = self.send.send_data(Bytes::new(), true);
            self.writing = Writing::Done;
        }
    }

    fn stop_writing(&mut self) {
        self.writing = Writing::Done;
        self.queue.clear();
        self.queued = 0;
    }

    /// Tells what has come of the answer.
    pub fn read(&mut self, sink: &mut impl Sink) -> Step {
        let waker = self.waker.clone();
        let mut context = Context::from_waker(&waker);
        if let Reading::Head(response) = &mut self.reading {
            loop {
                match response.poll_informational(&mut context) {
                    Poll::Ready(Some(Ok(interim))) => {
                        self.interim += 1;
                        self.has_received = true;
                        if interim.status().as_u16() == 101 {
                            return ours("The peer switched protocols, which HTTP/2 doesn't know.");
                        }
                        if self.interim > MAX_INTERIM {
                            return ours("The peer sent too many interim (1xx) answers to one request.");
                        }
                    }
                    Poll::Ready(Some(Err(error))) => return Step::Failed(Failure::Crate(error)),
                    Poll::Ready(None) | Poll::Pending => break,
                }
            }
            match Pin::new(response).poll(&mut context) {
                Poll::Pending => return Step::Waiting,
                Poll::Ready(Err(error)) => return Step::Failed(Failure::Crate(error)),
                Poll::Ready(Ok(response)) => {
                    self.has_received = true;
                    let (parts, body) = response.into_parts();
                    if let Err(error) = self.head(&parts, sink) {
                        return Step::Failed(Failure::Ours(error));
                    }
                    self.reading = Reading::Body(body);
                }
            }
        }
        let Reading::Body(body) = &mut self.reading else { return Step::Waiting };
        loop {
            match body.poll_data(&mut context) {
                Poll::Pending => return Step::Waiting,
                Poll::Ready(Some(Err(error))) => return Step::Failed(Failure::Crate(error)),
                Poll::Ready(Some(Ok(data))) if data.is_empty() => {}
                Poll::Ready(Some(Ok(_))) if self.has_no_body => {
                    return ours("An answer that has no body (to HEAD, 204 or 304) has one.");
                }
                Poll::Ready(Some(Ok(data))) => {
                    sink.body(&data);
                    if self.is_automatic {
                        // It can't be more than was received.
                        let _ = body.flow_control().release_capacity(data.len());
                    } else {
                        self.unconsumed += data.len();
                    }
                }
                Poll::Ready(None) => break,
            }
        }
        let trailers = match body.poll_trailers(&mut context) {
            Poll::Pending => return Step::Waiting,
            Poll::Ready(Err(error)) => return Step::Failed(Failure::Crate(error)),
            Poll::Ready(Ok(trailers)) => trailers.unwrap_or_default(),
        };
        if trailers.len() > MAX_FIELDS {
            return ours("The answer has more than 100 trailer fields.");
        }
        self.reading = Reading::Over;
        sink.end(true, fields(&trailers));
        Step::Ended
    }

    fn head(&mut self, parts: &Parts, sink: &mut impl Sink) -> Result<()> {
        if parts.headers.len() > MAX_FIELDS {
            return Err(Error::protocol("The answer has more than 100 header fields."));
        }
        if parts.headers.get_all(CONTENT_LENGTH).iter().nth(1).is_some() {
            return Err(Error::protocol("The answer has more than one content-length."));
        }
        self.has_no_body = self.is_head || matches!(parts.status.as_u16(), 204 | 304);
        sink.head(parts.status.as_u16(), MINOR, b"", fields(&parts.headers));
        Ok(())
    }

    /// The application has taken so much of the answer's body: the peer may send as much again.
    pub fn consume(&mut self, size: usize) {
        let size = size.min(self.unconsumed);
        if let Reading::Body(body) = &mut self.reading {
            self.unconsumed -= size;
            // It can't be more than was received.
            let _ = body.flow_control().release_capacity(size);
        }
    }

    pub fn reset(&mut self, reason: Reason) {
        self.send.send_reset(reason);
    }
}

fn ours(what: &'static str) -> Step {
    Step::Failed(Failure::Ours(Error::protocol(what)))
}

/// What the crate says of a stream, as one of our errors. `is_stale`: nothing at all has come since the stream began.
pub fn explain(error: &h2::Error, is_stale: bool) -> Error {
    let reason = error.reason().unwrap_or(Reason::NO_ERROR);
    if error.is_remote() && (error.is_go_away() || reason == Reason::REFUSED_STREAM) {
        let kind = if error.is_go_away() { ErrorKind::Unprocessed } else { ErrorKind::Declined };
        return Error::new(
            kind,
            format!("The peer did not process the request ({}).", name(reason)),
            "Likely cause: it is stopping, or has more streams open than it wants. The request is safe to send again.",
        );
    }
    if error.is_remote() {
        return Error::new(
            ErrorKind::Lost,
            format!("The peer reset the stream before its answer was complete ({}).", name(reason)),
            "Likely cause: the application behind it failed or gave up. Look at the peer's log for this request.",
        );
    }
    if error.is_library() {
        return Error::protocol(match reason {
            Reason::ENHANCE_YOUR_CALM => "The peer floods the connection, or sends a header list that is far too large.".into(),
            _ => format!(
                "The answer breaks the rules of HTTP/2 ({}): malformed, not as long as its content-length, or with headers \
                 above 60 KiB.",
                name(reason)
            ),
        });
    }
    if is_stale {
        return Error::new(
            ErrorKind::Stale,
            "The peer closed the connection, which had been kept open, without a byte of an answer.",
            "Likely cause: it closes idle connections sooner than we do, or was restarted.",
        );
    }
    Error::new(
        ErrorKind::Lost,
        "The peer closed the connection before its answer was complete.",
        "Likely cause: it crashed, was killed, or something between dropped the connection. Look at the peer's log.",
    )
}

fn name(reason: Reason) -> String {
    // Its Debug is the name in the specification, or the number of one that has none.
    format!("{reason:?}")
}

fn fields(map: &HeaderMap) -> impl ExactSizeIterator<Item = (&[u8], &[u8])> {
    Fields { left: map.len(), fields: map.iter() }
}

/// The map's own iterator doesn't say how many are left.
struct Fields<'a> {
    left: usize,
    fields: ::http::header::Iter<'a, ::http::HeaderValue>,
}

impl<'a> Iterator for Fields<'a> {
    type Item = (&'a [u8], &'a [u8]);

    fn next(&mut self) -> Option<Self::Item> {
        let (name, value) = self.fields.next()?;
        self.left = self.left.saturating_sub(1);
        Some((name.as_str().as_bytes(), value.as_bytes()))
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        (self.left, Some(self.left))
    }
}

impl ExactSizeIterator for Fields<'_> {}
