//! Which bytes carry these exchanges over HTTP/2, and what has come of each? The client's side, many exchanges at once.
//!
//! The `h2` crate keeps the state machine of the protocol; it is driven over a pipe in memory and polled by hand, so that it needs
//! no runtime. Whatever is done to a stream, `settle` polls the connection until nothing moves any more: when a method returns, all
//! that can be said is in the output. Three things are added: a guard in front of the parser (`guard.rs`), what the crate leaves
//! to its user (`stream.rs`), and what a failure means for the caller: was the request processed or not?
//!
//! A reader that stalls can't stop another: the connection's window is the sum of all that its streams may have.
pub mod floods;
pub mod frames;
pub mod guard;
pub mod pipe;
pub mod request;
pub mod stream;

use std::future::Future;
use std::pin::{pin, Pin};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use ::http::uri::Scheme;
use ahash::AHashMap;
use bytes::Bytes;
use h2::client::{Builder, Connection, SendRequest};
use h2::Reason;

use crate::error::{Error, ErrorKind, Result};
use crate::http1::request::Request;
use crate::http1::response::MAX_HEAD;
use crate::sink::StreamSink;
use guard::Guard;
use pipe::{Pipe, Woken};
use stream::{Begin, Failure, Step, Stream};

/// Exchanges at once on one connection, however many the peer would allow: above that another connection shares the load.
pub const MAX_STREAMS: usize = 128;
/// What a peer may send on one stream before the application has taken it.
pub const STREAM_WINDOW: u32 = 256 * 1024;
const CONNECTION_WINDOW: u32 = STREAM_WINDOW * MAX_STREAMS as u32;
/// Larger frames mean fewer pieces of a large body.
const FRAME: u32 = 64 * 1024;
/// Streams that we reset are remembered so long and so many, since the peer may have sent more before it knew.
const RESET_MEMORY: Duration = Duration::from_secs(10);
const RESETS: usize = 1024;
/// Malformed answers on one connection, for each of which we reset its stream (CVE-2025-8671 and its kin).
const FAULTS: usize = 1024;
/// Exchanges in a row that the peer resets (CVE-2023-44487 from the other side): then the connection is of no use, and is told so.
const REFUSALS: u32 = 100;
/// How many streams may be opened before the peer has said how many it wants.
const UNTOLD: usize = 100;

/// The id under which the connection itself is woken: no stream has it.
const CONNECTION: u32 = 0;
/// The head of a GOAWAY frame that ends everything at once: we process no streams of the peer's.
const GOAWAY: [u8; 13] = [0, 0, 8, 7, 0, 0, 0, 0, 0, 0, 0, 0, 0];

pub struct Http2 {
    pipe: Pipe,
    woken: Woken,
    waker: Waker,
    connection: Connection<Pipe, Bytes>,
    requests: SendRequest<Bytes>,
    streams: AHashMap<u32, Stream>,
    scheme: Scheme,
    guard: Guard,
    /// Streams that were woken and not yet read.
    unread: Vec<u32>,
    /// Memory that is used again.
    scratch: Vec<u32>,
    /// Why the connection ended; None while it goes on.
    end: Option<Error>,
    /// The peer takes no new exchanges (GOAWAY), or we open none.
    is_leaving: bool,
    /// The peer's limit came down meanwhile, and a request waits inside.
    is_full: bool,
    is_told: bool,
    received: u64,
    refusals: u32,
    has_answered: bool,
}

impl Http2 {
    pub fn new(is_tls: bool) -> Result<Http2> {
        let pipe = Pipe::default();
        let woken = Woken::default();
        let waker = woken.waker(CONNECTION);
        let mut builder = Builder::new();
        builder
            .enable_push(false)
            .initial_window_size(STREAM_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW)
            .max_frame_size(FRAME)
            .max_header_list_size(MAX_HEAD as u32)
            .max_concurrent_streams(0)
            .initial_max_send_streams(UNTOLD)
            .max_concurrent_reset_streams(RESETS)
            .reset_stream_duration(RESET_MEMORY)
            .max_local_error_reset_streams(Some(FAULTS));
        // The future only writes the preface, and a pipe takes it at once.
        let handshake = pin!(builder.handshake(pipe.clone()));
        let Poll::Ready(Ok((requests, connection))) = handshake.poll(&mut Context::from_waker(&waker)) else {
            return Err(Error::protocol("HTTP/2 could not be begun."));
        };
        let scheme = if is_tls { Scheme::HTTPS } else { Scheme::HTTP };
        let mut http = Http2 {
            pipe,
            woken,
            waker,
            connection,
            requests,
            streams: AHashMap::new(),
            scheme,
            guard: Guard::default(),
            unread: Vec::new(),
            scratch: Vec::new(),
            end: None,
            is_leaving: false,
            is_full: false,
            is_told: false,
            received: 0,
            refusals: 0,
            has_answered: false,
        };
        http.settle();
        Ok(http)
    }

    /// Begins an exchange and says on which stream. `is_automatic`: windows are given back without `consume`.
    pub fn send(&mut self, request: &Request<'_>, is_automatic: bool) -> Result<u32> {
        if self.streams_left() == 0 {
            return Err(Error::misuse(
                "A request was sent over a connection that takes no more.",
                "Ask `streams_left` before, and take another connection.",
            ));
        }
        let plan = request::plan(request, &self.scheme)?;
        let is_ended = plan.is_whole && plan.body.is_empty();
        let begun = self.requests.send_request(plan.request, is_ended);
        let (response, send) = begun.map_err(|error| {
            if error.is_go_away() {
                self.is_leaving = true;
            }
            Error::misuse("The request can't be said in HTTP/2.", "Take another connection, or HTTP/1.1.")
        })?;
        let id = response.stream_id().as_u32();
        let mut stream = Stream::new(Begin {
            waker: self.woken.waker(id),
            response,
            send,
            is_ended,
            left: plan.left,
            is_head: plan.is_head,
            is_automatic,
            began: self.received,
        });
        if !is_ended && (plan.is_whole || !plan.body.is_empty()) {
            stream.queue(plan.body, plan.is_whole)?;
        }
        self.guard.earn(guard::REQUEST);
        self.streams.insert(id, stream);
        self.woken.note(id);
        self.settle();
        Ok(id)
    }

    /// Goes on with the body of a request; after the stream's end it is for nobody, and dropped.
    pub fn send_body(&mut self, id: u32, data: &[u8], is_last: bool) -> Result<()> {
        let Some(stream) = self.streams.get_mut(&id) else { return Ok(()) };
        stream.queue(Bytes::copy_from_slice(data), is_last)?;
        stream.pump();
        self.settle();
        Ok(())
    }

    /// The application has taken so much of the body of an answer.
    pub fn consume(&mut self, id: u32, size: usize) {
        if let Some(stream) = self.streams.get_mut(&id) {
            stream.consume(size);
            self.settle();
        }
    }

    /// Gives up on an exchange: nothing more is told of it.
    pub fn reset(&mut self, id: u32) {
        if let Some(mut stream) = self.streams.remove(&id) {
            stream.reset(Reason::CANCEL);
            drop(stream);
            self.settle();
        }
    }

    /// Takes bytes and says what they mean, stream by stream. What ends a stream is told there; what ends the connection ends
    /// every stream, each with its own fate, and then the connection.
    pub fn receive(&mut self, data: &[u8], sink: &mut impl StreamSink) {
        if !data.is_empty() && self.end.is_none() {
            self.received += data.len() as u64;
            match self.guard.read(data) {
                Ok(()) => self.pipe.put(data),
                Err(error) => self.fail(error, Reason::ENHANCE_YOUR_CALM),
            }
        }
        self.tell(sink);
    }

    /// The peer will send no more.
    pub fn receive_eof(&mut self, sink: &mut impl StreamSink) {
        self.pipe.end();
        self.tell(sink);
    }

    /// Moves what must go to the peer behind `out`.
    pub fn take_output(&mut self, out: &mut Vec<u8>) {
        self.pipe.take(out);
    }

    pub fn output_size(&self) -> usize {
        self.pipe.written()
    }

    /// Says farewell, if there is anybody to say it to.
    pub fn close(&mut self) {
        if self.end.is_none() {
            self.say_goaway(Reason::NO_ERROR);
            self.end = Some(gone());
        }
        self.streams.clear();
    }

    pub fn is_over(&self) -> bool {
        self.end.is_some()
    }

    /// Why it ended before the first exchange, if the peer does not even speak HTTP/2.
    pub fn failure(&self) -> Option<&Error> {
        self.end.as_ref()
    }

    /// The peer's SETTINGS have come.
    pub fn is_greeted(&self) -> bool {
        self.guard.is_greeted()
    }

    /// How many exchanges may be begun now.
    pub fn streams_left(&self) -> usize {
        if self.is_over() || self.is_leaving || self.is_full {
            return 0;
        }
        self.requests.current_max_send_streams().min(MAX_STREAMS).saturating_sub(self.streams.len())
    }

    pub fn streams(&self) -> usize {
        self.streams.len()
    }

    /// The peer's window is used up for this stream: what was sent last still waits.
    pub fn is_blocked(&self, id: u32) -> bool {
        self.streams.get(&id).is_some_and(Stream::is_blocked)
    }

    fn fail(&mut self, error: Error, reason: Reason) {
        if self.end.is_none() {
            self.say_goaway(reason);
            self.end = Some(error);
        }
    }

    fn say_goaway(&self, reason: Reason) {
        self.pipe.write(&GOAWAY);
        self.pipe.write(&u32::from(reason).to_be_bytes());
    }

    /// Polls the connection, and every stream that has something to send, until nothing moves.
    fn settle(&mut self) {
        let mut woken = std::mem::take(&mut self.scratch);
        loop {
            self.poll_connection();
            self.woken.take(&mut woken);
            if woken.is_empty() {
                self.scratch = woken;
                return;
            }
            for id in &woken {
                if let Some(stream) = self.streams.get_mut(id) {
                    stream.pump();
                    self.unread.push(*id);
                }
            }
        }
    }

    fn poll_connection(&mut self) {
        if self.end.is_some() {
            return;
        }
        let mut context = Context::from_waker(&self.waker);
        match Pin::new(&mut self.connection).poll(&mut context) {
            Poll::Pending => {}
            Poll::Ready(Ok(())) => self.end = Some(gone()),
            Poll::Ready(Err(error)) => self.end = Some(stream::explain(&error, false)),
        }
        match self.requests.poll_ready(&mut context) {
            Poll::Ready(Ok(())) => self.is_full = false,
            Poll::Ready(Err(_)) => self.is_leaving = true,
            Poll::Pending => self.is_full = true,
        }
    }

    fn tell(&mut self, sink: &mut impl StreamSink) {
        loop {
            self.settle();
            let mut ids = std::mem::take(&mut self.unread);
            if self.end.is_some() {
                ids.extend(self.streams.keys());
            }
            if ids.is_empty() {
                break;
            }
            ids.sort_unstable();
            ids.dedup();
            ids.into_iter().for_each(|id| self.tell_stream(id, sink));
        }
        if (self.is_over() || self.is_leaving) && !self.is_told {
            self.is_told = true;
            sink.select(CONNECTION);
            sink.closed();
        }
    }

    fn tell_stream(&mut self, id: u32, sink: &mut impl StreamSink) {
        let Some(stream) = self.streams.get_mut(&id) else { return };
        sink.select(id);
        if stream.take_unblocked() {
            sink.writable();
        }
        let mut is_enough = false;
        let failure = match (stream.read(sink), &self.end) {
            (Step::Waiting, None) => return,
            (Step::Waiting, Some(end)) => Some(end.clone()),
            (Step::Ended, _) => None,
            (Step::Failed(Failure::Ours(error)), _) => {
                stream.reset(Reason::PROTOCOL_ERROR);
                Some(error)
            }
            (Step::Failed(Failure::Crate(error)), _) => {
                if error.is_reset() && error.is_remote() {
                    self.refusals += 1;
                    is_enough = self.refusals == REFUSALS;
                }
                let is_stale = self.has_answered && !stream.has_received() && stream.began == self.received;
                Some(stream::explain(&error, is_stale))
            }
        };
        if failure.is_none() {
            self.has_answered = true;
            self.refusals = 0;
            if !stream.is_sent() {
                // It answered before it had the whole request: the rest is for nobody.
                stream.reset(Reason::CANCEL);
            }
        }
        self.streams.remove(&id);
        if is_enough {
            self.is_leaving = true;
            self.say_goaway(Reason::ENHANCE_YOUR_CALM);
        }
        if let Some(error) = failure {
            sink.reset(&error);
        }
    }
}

fn gone() -> Error {
    Error::new(
        ErrorKind::Lost,
        "The connection is closed.",
        "Take another one: this one ended, failed, or was closed by the peer.",
    )
}

#[cfg(test)]
mod tests;
