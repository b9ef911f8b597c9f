//! How does HTTP/2 look to a driver: as one exchange at a time like HTTP/1.1, or as many on their streams?
//!
//! The second half of `connection.rs`. With one exchange at a time, what ends its stream badly is an error, as what ends a connection
//! is with HTTP/1.1, and windows are given back by themselves. With many, the fate of each is told on its own stream, and an error is
//! only what ends all of them.
use super::{HttpConnection, Phase};
use crate::error::{Error, ErrorKind, Result};
use crate::http1::request::Request;
use crate::http2::Http2;
use crate::sink::{Sink, StreamSink};

/// Many exchanges at once.
impl HttpConnection {
    /// Begins an exchange and says on which stream; `seal` brings it to the output.
    pub fn open_stream(&mut self, request: &Request<'_>) -> Result<u32> {
        self.refuse_if_over()?;
        let stream = self.streams()?.send(request, false)?;
        self.holds_request = true;
        Ok(stream)
    }

    /// Goes on with the body of a request; after the end of its stream it is dropped.
    pub fn send_stream(&mut self, stream: u32, data: &[u8], is_last: bool) -> Result<()> {
        self.streams()?.send_body(stream, data, is_last)
    }

    /// Gives up on an exchange. Nothing more is told of it.
    pub fn reset_stream(&mut self, stream: u32) -> Result<()> {
        self.streams()?.reset(stream);
        Ok(())
    }

    /// The application has taken so much of an answer's body: the peer may send as much again.
    pub fn consume(&mut self, stream: u32, size: usize) -> Result<()> {
        self.streams()?.consume(stream, size);
        Ok(())
    }

    /// The peer's window is used up for this stream: what was sent last waits inside.
    pub fn is_stream_blocked(&self, stream: u32) -> bool {
        self.http2.as_ref().is_some_and(|http| http.is_blocked(stream))
    }

    /// How many exchanges may be begun now.
    pub fn streams_left(&self) -> usize {
        self.http2.as_ref().filter(|_| self.is_open()).map_or(0, |http| http.streams_left())
    }

    /// As `receive`, or after `absorb` and `decrypt` with no `data`, for all streams. What ends a stream is told there; an error is
    /// TLS's, and ends all.
    pub fn receive_streams(&mut self, data: &[u8], sink: &mut impl StreamSink) -> Result<()> {
        let mut is_ended = false;
        if self.tls.is_some() {
            self.absorb(data);
            self.decrypt()?;
            is_ended = self.tls.as_ref().is_some_and(|tls| tls.is_peer_closed());
        } else {
            self.plain.extend_from_slice(data);
        }
        self.streams()?;
        let plain = std::mem::take(&mut self.plain);
        let result = receive_streams(&mut self.http2, &plain, is_ended, sink);
        let flushed = self.flush();
        self.settle();
        result.and(flushed)
    }

    /// The socket ended: every stream that is left is told its fate.
    pub fn receive_streams_eof(&mut self, sink: &mut impl StreamSink) -> Result<()> {
        let result = receive_streams(&mut self.http2, &[], true, sink);
        self.fail();
        result
    }

    fn streams(&mut self) -> Result<&mut Http2> {
        self.http2.as_deref_mut().ok_or_else(|| {
            Error::misuse("The connection does not speak HTTP/2.", "Look at `protocol` once it is open.")
        })
    }
}

/// One exchange at a time.
impl HttpConnection {
    pub(super) fn send_http2<'a>(&mut self, request: &Request<'a>) -> Result<&'a [u8]> {
        let Some(http) = self.http2.as_mut().filter(|_| self.exchange.is_none() && self.phase == Phase::Open) else {
            return Err(Error::misuse(
                "A request was sent while the connection is not idle, or its protocol not known yet.",
                "Wait until it is open, and for the end of the exchange; `open_stream` begins many at once.",
            ));
        };
        self.exchange = Some(http.send(request, true)?);
        self.has_written = false;
        self.has_received = false;
        self.holds_request = true;
        Ok(&[])
    }

    /// One exchange at a time over HTTP/2: what ends its stream badly is an error, as with HTTP/1.1.
    pub(super) fn receive_http2(&mut self, data: &[u8], is_ended: bool, sink: &mut impl Sink) -> Result<()> {
        let mut single = Single { sink, exchange: self.exchange, selected: 0, has_received: false, failure: None };
        let result = receive_streams(&mut self.http2, data, is_ended, &mut single);
        let Single { exchange, has_received, failure, .. } = single;
        self.exchange = exchange;
        self.has_received |= has_received;
        self.greet(sink);
        let flushed = self.flush();
        self.settle();
        if let Some(error) = failure {
            // Then nothing of it counts as written: it is safe to send again.
            self.has_written &= !matches!(error.kind, ErrorKind::Unprocessed | ErrorKind::Declined);
            return Err(error);
        }
        result.and(flushed)
    }

    /// Without TLS the connection is open when the peer has proved to speak HTTP/2.
    fn greet(&mut self, sink: &mut impl Sink) {
        if self.phase == Phase::Opening && self.http2.as_ref().is_some_and(|http| http.is_greeted() && !http.is_over())
        {
            self.phase = Phase::Open;
            self.is_open_reported = true;
            sink.opened();
        }
    }
}

fn receive_streams(
    http: &mut Option<Box<Http2>>,
    data: &[u8],
    is_ended: bool,
    sink: &mut impl StreamSink,
) -> Result<()> {
    let Some(http) = http else { return Ok(()) };
    http.receive(data, sink);
    if is_ended {
        http.receive_eof(sink);
    }
    match http.failure() {
        // Nobody was there to be told.
        Some(error) if !http.is_greeted() && error.kind == ErrorKind::Protocol => Err(error.clone()),
        _ => Ok(()),
    }
}

/// The events of one stream as those of a connection.
struct Single<'a, S> {
    sink: &'a mut S,
    exchange: Option<u32>,
    selected: u32,
    has_received: bool,
    failure: Option<Error>,
}

impl<S: Sink> Sink for Single<'_, S> {
    fn opened(&mut self) {
        self.sink.opened();
    }

    fn head<'a>(
        &mut self,
        status: u16,
        minor: u8,
        reason: &'a [u8],
        fields: impl ExactSizeIterator<Item = (&'a [u8], &'a [u8])>,
    ) {
        self.has_received = true;
        self.sink.head(status, minor, reason, fields);
    }

    fn body(&mut self, bytes: &[u8]) {
        self.sink.body(bytes);
    }

    fn end<'a>(&mut self, is_reusable: bool, trailers: impl ExactSizeIterator<Item = (&'a [u8], &'a [u8])>) {
        self.exchange = None;
        self.sink.end(is_reusable, trailers);
    }

    /// Told only to a connection that is idle, as with HTTP/1.1: an exchange that goes on ends by itself.
    fn closed(&mut self) {
        if self.exchange.is_none() && self.failure.is_none() {
            self.sink.closed();
        }
    }

    fn writable(&mut self) {
        self.sink.writable();
    }
}

impl<S: Sink> StreamSink for Single<'_, S> {
    fn select(&mut self, stream: u32) {
        self.selected = stream;
    }

    fn reset(&mut self, error: &Error) {
        if self.exchange == Some(self.selected) {
            self.exchange = None;
            self.failure = Some(error.clone());
        }
    }
}
