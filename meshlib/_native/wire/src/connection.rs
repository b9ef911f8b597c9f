//! What does the client's side of one connection do with these bytes? TLS (or none) below, HTTP above, both without I/O.
//!
//! The driver moves bytes: what `output` holds goes to the socket, what the socket gave goes to `receive`, and what it meant goes
//! to the `Sink`. A request that is sent before the handshake is done waits inside. There is one output buffer, so that a request,
//! a handshake message and an alert can never overtake one another.
//!
//! The work in bulk (handshakes, large records) is in methods of its own, `decrypt` and `seal`, which touch nothing but this
//! object: a caller may let others run meanwhile.
//!
//! Which HTTP is spoken is a detail of this file: HTTP/2 belongs beside `http1`, behind the same methods.
use std::sync::Arc;

use crate::error::{Error, ErrorKind, Result};
use crate::http1::request::Request;
use crate::http1::Http1;
use crate::sink::Sink;
use crate::tls::client::{ClientSession, TlsClient};

/// Buffers above this size are not kept: many connections are idle, and the allocator is quick.
const KEPT: usize = 32 * 1024;

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

    /// Begins: without TLS the connection is open at once, with TLS the output holds the first message of the handshake.
    pub fn open(&mut self) -> Result<()> {
        if self.phase != Phase::New {
            return Ok(());
        }
        let Some(target) = &self.target else {
            self.phase = Phase::Open;
            return Ok(());
        };
        self.phase = Phase::Opening;
        let session = ClientSession::new(target.tls.clone(), &target.expected, &target.address);
        self.tls = Some(Box::new(session.inspect_err(|_| self.phase = Phase::Over)?));
        self.decrypt()
    }

    /// Begins an exchange; `seal` brings it to the output, together with the large body that is returned (maybe an empty one).
    pub fn send<'a>(&mut self, request: &Request<'a>) -> Result<&'a [u8]> {
        self.refuse_if_over()?;
        let rest = self.http.send(request, &mut self.unsealed)?;
        self.has_written = false;
        Ok(rest)
    }

    /// Goes on with the body of a request; `seal` brings it to the output. After an answer that didn't wait for it, it is dropped.
    pub fn send_body(&mut self, data: &[u8], is_last: bool) -> Result<()> {
        if self.http.drops_body() {
            return Ok(());
        }
        self.refuse_if_over()?;
        self.http.send_body(data, is_last, &mut self.unsealed)
    }

    /// Brings what was sent, and `rest` behind it, to the output, encrypted where there is TLS. During the handshake all waits.
    pub fn seal(&mut self, rest: &[u8]) -> Result<()> {
        if self.phase != Phase::Open {
            self.unsealed.extend_from_slice(rest);
            return Ok(());
        }
        if self.unsealed.is_empty() && rest.is_empty() {
            return Ok(());
        }
        self.holds_request = true;
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
            self.phase = Phase::Open;
            return self.seal(&[]);
        }
        Ok(())
    }

    /// The third part: says what the decrypted bytes mean.
    pub fn deliver(&mut self, sink: &mut impl Sink) -> Result<()> {
        if self.phase == Phase::Open && !self.is_open_reported {
            self.is_open_reported = true;
            sink.opened();
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
        let is_clean = self.tls.as_ref().is_none_or(|tls| tls.is_peer_closed());
        let result = self.http.receive_eof(is_clean, sink);
        self.fail();
        result
    }

    /// Ends our side; the output may hold a farewell.
    pub fn close(&mut self) {
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
        self.is_open() && self.http.is_idle()
    }

    /// A byte of the current request was handed over.
    pub fn has_written(&self) -> bool {
        self.has_written
    }

    /// A byte of the answer to the current request came.
    pub fn has_received(&self) -> bool {
        self.http.has_received()
    }

    /// How much of what was sent waits for `seal`.
    pub fn unsealed(&self) -> usize {
        self.unsealed.len()
    }

    pub fn session(&self) -> Option<&ClientSession> {
        self.tls.as_deref()
    }

    fn fail(&mut self) {
        self.http.stop();
        self.phase = Phase::Over;
    }

    fn settle(&mut self) {
        if self.http.is_over() {
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
