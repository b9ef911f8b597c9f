//! What does the client's side of one connection do with these bytes? TLS (or none) below, HTTP above, both without I/O.
//!
//! The driver moves bytes: what `output` holds goes to the socket, what the socket gave goes to `receive`, and what it meant goes
//! to the `Sink`. A request that is sent before the handshake is done waits inside, if it can only be HTTP/1.1. There is one
//! output buffer, so that a request, a handshake message and an alert can never overtake one another.
//!
//! The work in bulk (handshakes, large records) is in methods of its own, `decrypt` and `seal`, which touch nothing but this
//! object: a caller may let others run meanwhile.
//!
//! Which HTTP is spoken is a detail of this file. The methods with one exchange at a time work with both versions, so that a
//! driver which wants no more need not know; those with a stream are HTTP/2's alone (`connection/streams.rs`). A connection is
//! used in one of the two ways.
mod streams;

use std::sync::Arc;

use crate::error::{Error, ErrorKind, Result};
use crate::http1::request::Request;
use crate::http1::Http1;
use crate::http2::Http2;
use crate::sink::Sink;
use crate::tls::client::{ClientSession, TlsClient, HTTP2};

/// Buffers above this size are not kept: many connections are idle, and the allocator is quick.
const KEPT: usize = 32 * 1024;

/// What may be spoken. Without TLS, where nobody can negotiate, `Either` is HTTP/1.1 and `Http2` is HTTP/2 by prior knowledge.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocols {
    Http1,
    Http2,
    Either,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    New,
    Opening,
    Open,
    Over,
}

struct Target {
    tls: Arc<TlsClient>,
    expected: String,
    address: String,
}

pub struct HttpConnection {
    phase: Phase,
    target: Option<Target>,
    tls: Option<Box<ClientSession>>,
    http: Http1,
    protocols: Protocols,
    /// HTTP/2, once it is agreed; then `http` is not used.
    http2: Option<Box<Http2>>,
    /// HTTP/2 used with one exchange at a time: its stream.
    exchange: Option<u32>,
    has_received: bool,
    /// What came and is decrypted, but not yet read.
    plain: Vec<u8>,
    /// What HTTP wrote and is not yet in the output: because the handshake is not done, or `seal` was not called.
    unsealed: Vec<u8>,
    output: Vec<u8>,
    is_open_reported: bool,
    is_tls_broken: bool,
    /// The output holds bytes of the current request.
    holds_request: bool,
    has_written: bool,
}

impl HttpConnection {
    pub fn plain() -> HttpConnection {
        HttpConnection {
            phase: Phase::New,
            target: None,
            tls: None,
            http: Http1::default(),
            protocols: Protocols::Http1,
            http2: None,
            exchange: None,
            has_received: false,
            plain: Vec::new(),
            unsealed: Vec::new(),
            output: Vec::new(),
            is_open_reported: false,
            is_tls_broken: false,
            holds_request: false,
            has_written: false,
        }
    }

    /// With TLS: the peer must prove to be `expected`, a SPIFFE ID, or (if that is empty) anyone whom the bundles know.
    pub fn tls(tls: Arc<TlsClient>, expected: &str, address: &str) -> HttpConnection {
        let target = Target { tls, expected: expected.to_owned(), address: address.to_owned() };
        HttpConnection { target: Some(target), ..HttpConnection::plain() }
    }

    /// To be said before `open`; the default is HTTP/1.1 alone.
    pub fn speaking(self, protocols: Protocols) -> HttpConnection {
        HttpConnection { protocols, ..self }
    }

    /// Begins: with TLS the output holds the first message of the handshake, with HTTP/2 by prior knowledge the preface (and the
    /// connection is open when the peer has answered that). Else it is open at once.
    pub fn open(&mut self) -> Result<()> {
        if self.phase != Phase::New {
            return Ok(());
        }
        let Some(target) = &self.target else {
            self.phase = Phase::Open;
            if self.protocols == Protocols::Http2 {
                self.phase = Phase::Opening;
                self.http2 = Some(Box::new(Http2::new(false)?));
                return self.flush();
            }
            return Ok(());
        };
        self.phase = Phase::Opening;
        let session = ClientSession::offering(target.tls.clone(), &target.expected, &target.address, self.protocols);
        self.tls = Some(Box::new(session.inspect_err(|_| self.phase = Phase::Over)?));
        self.decrypt()
    }

    /// Begins an exchange; `seal` brings it to the output, together with the large body that is returned (maybe an empty one).
    pub fn send<'a>(&mut self, request: &Request<'a>) -> Result<&'a [u8]> {
        self.refuse_if_over()?;
        if self.http2.is_some() || (self.protocols != Protocols::Http1 && self.phase != Phase::Open) {
            return self.send_http2(request);
        }
        let rest = self.http.send(request, &mut self.unsealed)?;
        self.has_written = false;
        Ok(rest)
    }

    /// Goes on with the body of a request; `seal` brings it to the output. After an answer that didn't wait for it, it is dropped.
    pub fn send_body(&mut self, data: &[u8], is_last: bool) -> Result<()> {
        if let Some(http) = &mut self.http2 {
            return self.exchange.map_or(Ok(()), |stream| http.send_body(stream, data, is_last));
        }
        if self.http.drops_body() {
            return Ok(());
        }
        self.refuse_if_over()?;
        self.http.send_body(data, is_last, &mut self.unsealed)
    }

    /// Brings what was sent, and `rest` behind it, to the output, encrypted where there is TLS. During the handshake all waits.
    pub fn seal(&mut self, rest: &[u8]) -> Result<()> {
        if self.http2.is_some() {
            return self.flush();
        }
        if self.phase != Phase::Open {
            self.unsealed.extend_from_slice(rest);
            return Ok(());
        }
        if self.unsealed.is_empty() && rest.is_empty() {
            return Ok(());
        }
        self.holds_request = true;
        self.put(rest)
    }

    /// Brings what HTTP/2 has to say to the output.
    fn flush(&mut self) -> Result<()> {
        if let Some(http) = &mut self.http2 {
            http.take_output(&mut self.unsealed);
        }
        if self.unsealed.is_empty() {
            return Ok(());
        }
        self.put(&[])
    }

    fn put(&mut self, rest: &[u8]) -> Result<()> {
        let Some(tls) = &mut self.tls else {
            if self.output.is_empty() {
                std::mem::swap(&mut self.output, &mut self.unsealed);
            } else {
                self.output.append(&mut self.unsealed);
            }
            self.output.extend_from_slice(rest);
            return Ok(());
        };
        let mut result = tls.write(&self.unsealed, &mut self.output);
        recycle(&mut self.unsealed);
        if result.is_ok() && !rest.is_empty() {
            result = tls.write(rest, &mut self.output);
        }
        result.inspect_err(|_| {
            self.is_tls_broken = true;
            self.fail();
        })
    }

    /// Takes what the socket gave, decrypts it and says what it means.
    pub fn receive(&mut self, data: &[u8], sink: &mut impl Sink) -> Result<()> {
        if self.tls.is_some() {
            self.absorb(data);
            self.decrypt()?;
            return self.deliver(sink);
        }
        self.refuse_unless_open()?;
        if self.http2.is_some() {
            return self.receive_http2(data, false, sink);
        }
        let result = self.http.receive(data, sink);
        self.settle();
        result
    }

    /// The first part of `receive` where there is TLS: takes the bytes.
    pub fn absorb(&mut self, data: &[u8]) {
        if let Some(tls) = self.tls.as_mut().filter(|_| self.phase != Phase::Over) {
            tls.absorb(data);
        }
    }

    /// The second part: handshake and decryption. After an error the output ends in the alert.
    pub fn decrypt(&mut self) -> Result<()> {
        let Some(tls) = self.tls.as_mut().filter(|_| self.phase != Phase::Over) else {
            return Ok(());
        };
        let result = tls.pump(&mut self.output, &mut self.plain);
        if let Err(error) = result {
            self.is_tls_broken = true;
            self.fail();
            return Err(error);
        }
        if self.phase == Phase::Opening && tls.is_established() {
            return self.agree();
        }
        Ok(())
    }

    /// The handshake is done, and has said which HTTP is spoken. A peer that picks none speaks HTTP/1.1.
    fn agree(&mut self) -> Result<()> {
        self.phase = Phase::Open;
        let picked = self.tls.as_ref().and_then(|tls| tls.state().alpn_protocol());
        if picked == Some(HTTP2) {
            self.http2 = Some(Box::new(Http2::new(true)?));
        } else if self.protocols == Protocols::Http2 {
            self.close();
            return Err(Error::new(
                ErrorKind::Tls,
                "The peer does not speak HTTP/2: it picked no application protocol (ALPN).",
                "Likely cause: the service is configured for HTTP/2, and its server isn't. Set the protocol of the service to \
                 http/1.1, or switch HTTP/2 on at the server.",
            ));
        }
        self.seal(&[])
    }

    /// The third part: says what the decrypted bytes mean.
    pub fn deliver(&mut self, sink: &mut impl Sink) -> Result<()> {
        if self.phase == Phase::Open && !self.is_open_reported {
            self.is_open_reported = true;
            sink.opened();
        }
        if self.http2.is_some() {
            let plain = std::mem::take(&mut self.plain);
            let is_ended = self.tls.as_ref().is_some_and(|tls| tls.is_peer_closed());
            return self.receive_http2(&plain, is_ended, sink);
        }
        let mut result = self.http.receive(&self.plain, sink);
        recycle(&mut self.plain);
        if result.is_ok() && self.tls.as_ref().is_some_and(|tls| tls.is_peer_closed()) {
            result = self.http.receive_eof(true, sink);
        }
        self.settle();
        result
    }

    /// Whether `size` more bytes mean work in bulk, so that it is worth while to let others run.
    pub fn is_heavy(&self, size: usize) -> bool {
        self.tls.is_some() && (self.phase == Phase::Opening || size > 16 * 1024)
    }

    /// The socket ended.
    pub fn receive_eof(&mut self, sink: &mut impl Sink) -> Result<()> {
        match (&self.tls, self.phase) {
            (Some(tls), Phase::Opening) => {
                let error = tls.interrupted();
                self.fail();
                return Err(error);
            }
            (_, Phase::Over | Phase::New) => return Ok(()),
            _ => {}
        }
        if self.http2.is_some() {
            let result = self.receive_http2(&[], true, sink);
            self.fail();
            return result;
        }
        let is_clean = self.tls.as_ref().is_none_or(|tls| tls.is_peer_closed());
        let result = self.http.receive_eof(is_clean, sink);
        self.fail();
        result
    }

    /// Ends our side; the output may hold a farewell.
    pub fn close(&mut self) {
        if let Some(http) = self.http2.as_mut().filter(|_| self.phase != Phase::Over && !self.is_tls_broken) {
            http.close();
            // What can't be said any more is not missed.
            let _ = self.flush();
        }
        if let Some(tls) = self.tls.as_mut().filter(|tls| tls.is_established() && !self.is_tls_broken) {
            tls.close(&mut self.output);
        }
        self.fail();
    }

    /// What must go to the socket.
    pub fn output(&self) -> &[u8] {
        &self.output
    }

    /// The output was handed over.
    pub fn clear_output(&mut self) {
        self.has_written |= self.holds_request && !self.output.is_empty();
        self.holds_request = false;
        recycle(&mut self.output);
    }

    pub fn is_open(&self) -> bool {
        self.phase == Phase::Open
    }

    /// May carry a new exchange.
    pub fn is_idle(&self) -> bool {
        match &self.http2 {
            Some(http) => self.is_open() && self.exchange.is_none() && http.streams_left() > 0,
            None => self.is_open() && self.http.is_idle(),
        }
    }

    /// The bytes are the application's now, in both directions.
    pub fn is_upgraded(&self) -> bool {
        self.http.is_upgraded()
    }

    /// A byte of the current request was handed over.
    pub fn has_written(&self) -> bool {
        self.has_written
    }

    /// A byte of the answer to the current request came.
    pub fn has_received(&self) -> bool {
        self.has_received || self.http.has_received()
    }

    /// The version of HTTP, once it is agreed.
    pub fn protocol(&self) -> Option<&'static str> {
        match (&self.http2, self.phase, self.protocols) {
            (Some(_), ..) => Some("h2"),
            (None, Phase::Open | Phase::Over, Protocols::Http1 | Protocols::Either) | (None, _, Protocols::Http1) => {
                Some("http/1.1")
            }
            _ => None,
        }
    }

    pub fn is_http2(&self) -> bool {
        self.http2.is_some()
    }

    /// The peer's window is used up: what was sent last waits inside, and goes out with what is received.
    pub fn is_blocked(&self) -> bool {
        self.exchange.is_some_and(|stream| self.is_stream_blocked(stream))
    }

    /// How much of what was sent waits for `seal`.
    pub fn unsealed(&self) -> usize {
        self.unsealed.len() + self.http2.as_ref().map_or(0, |http| http.output_size())
    }

    pub fn session(&self) -> Option<&ClientSession> {
        self.tls.as_deref()
    }

    fn fail(&mut self) {
        self.http.stop();
        self.phase = Phase::Over;
    }

    fn settle(&mut self) {
        if self.http.is_over() || self.http2.as_ref().is_some_and(|http| http.is_over()) {
            self.phase = Phase::Over;
        }
    }

    fn refuse_unless_open(&self) -> Result<()> {
        match self.phase {
            Phase::New => Err(Error::misuse("Bytes came before the connection was opened.", "Call open() first.")),
            _ => Ok(()),
        }
    }

    fn refuse_if_over(&self) -> Result<()> {
        if self.phase == Phase::Over {
            return Err(Error::new(
                ErrorKind::Lost,
                "The connection is closed.",
                "Take another one: this one ended, failed, or was closed by the peer.",
            ));
        }
        Ok(())
    }
}

/// Empties a buffer, and gives back its memory if one large message made it large.
pub(crate) fn recycle(buffer: &mut Vec<u8>) {
    if buffer.capacity() > KEPT {
        *buffer = Vec::new();
    } else {
        buffer.clear();
    }
}
