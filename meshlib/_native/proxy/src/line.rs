//! How do plain bytes get to a socket and back, with TLS in between or without? The one transport under every HTTP connection here.
//!
//! The TLS is the wire crate's, as in the library: whom a peer must prove to be, what a ticket is worth and how handshakes are
//! counted is the same code. This file moves the bytes. What hyper writes is gathered and sealed when it flushes, so that the frames
//! of one answer make one record. Everything that came is shown to a guard before hyper may read it.
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::Arc;
use std::task::{ready, Context, Poll};

use hyper::rt::ReadBufCursor;
use mesh_wire::tls::client::ClientSession;
use mesh_wire::TlsConnection;

use crate::gauge::Gauge;
use crate::linger::Lingering;
use crate::socket::Socket;
use crate::watch::Watch;

/// Plain text of one record at most, and sealed bytes that may wait for the socket.
const RECORD: usize = 16 * 1024;
const SEALED_AT_MOST: usize = 64 * 1024;
/// A buffer that grew beyond this is given back once it is empty.
const KEPT: usize = 32 * 1024;

/// The record layer of a connection.
pub enum Tls {
    None,
    Client(Box<ClientSession>),
    Server(Box<TlsConnection>),
}

/// A connection's bytes.
pub struct Line {
    /// Gone once it was handed to the lingering.
    socket: Option<Socket>,
    tls: Tls,
    plain: Vec<u8>,
    read: usize,
    unsealed: Vec<u8>,
    sealed: Vec<u8>,
    sent: usize,
    is_eof: bool,
    is_closing: bool,
    pub watch: Watch,
    pub gauge: Arc<Gauge>,
    linger: Option<Lingering>,
}

impl Line {
    pub fn new(socket: Socket, tls: Tls, gauge: Arc<Gauge>) -> Line {
        Line {
            socket: Some(socket),
            tls,
            plain: Vec::new(),
            read: 0,
            unsealed: Vec::new(),
            sealed: Vec::new(),
            sent: 0,
            is_eof: false,
            is_closing: false,
            watch: Watch::None,
            gauge,
            linger: None,
        }
    }

    /// A peer that was refused gets the time to read why.
    pub fn lingering(mut self, linger: Lingering) -> Line {
        self.linger = Some(linger);
        self
    }

    pub fn tls(&self) -> &Tls {
        &self.tls
    }

    /// The first bytes stay where they are: who waits for `least` of them may look at what is there. Empty: the peer is gone.
    pub async fn peek(&mut self, is_enough: impl Fn(&[u8]) -> bool) -> io::Result<()> {
        std::future::poll_fn(|context| {
            while !self.is_eof && !is_enough(self.unread()) {
                ready!(self.poll_fill(context))?;
            }
            Poll::Ready(Ok(()))
        })
        .await
    }

    pub fn unread(&self) -> &[u8] {
        self.plain.get(self.read..).unwrap_or_default()
    }

    /// From now on every byte is looked at, and those first that have come already.
    pub fn watch_with(&mut self, watch: Watch) {
        self.watch = watch;
        let from = self.read;
        self.inspect(from);
    }

    /// What came so far, and all that comes, are records of this TLS.
    pub async fn secure(&mut self, tls: Tls) -> mesh_wire::Result<()> {
        let records = std::mem::take(&mut self.plain);
        self.read = 0;
        self.tls = tls;
        let result = self.pump(&records);
        if result.is_err() {
            std::future::poll_fn(|context| self.poll_send(context)).await.ok();
        }
        result?;
        self.shake().await
    }

    /// Does the handshake; the peer was judged when this is done.
    pub async fn shake(&mut self) -> mesh_wire::Result<()> {
        std::future::poll_fn(|context| self.poll_shake(context)).await
    }

    fn poll_shake(&mut self, context: &mut Context<'_>) -> Poll<mesh_wire::Result<()>> {
        loop {
            let result = self.pump(&[]);
            let flushed = self.poll_send(context);
            result?;
            let is_done = match &self.tls {
                Tls::None => true,
                Tls::Client(session) => session.is_established(),
                Tls::Server(connection) => !connection.is_handshaking(),
            };
            if is_done {
                if let Poll::Ready(Err(error)) = &flushed {
                    return Poll::Ready(Err(self.interrupted(Some(error))));
                }
                // What is left to say (our Finished, tickets) may wait for the first bytes of the application's.
                return Poll::Ready(Ok(()));
            }
            if self.is_eof {
                return Poll::Ready(Err(self.interrupted(None)));
            }
            let filled = match (self.poll_fill(context), flushed) {
                // What it said before it went tells more.
                (Poll::Pending, Poll::Ready(Err(error))) => Poll::Ready(Err(error)),
                (filled, _) => filled,
            };
            match filled {
                Poll::Ready(Ok(())) => {}
                Poll::Ready(Err(error)) => {
                    return Poll::Ready(Err(
                        match error.get_ref().and_then(|inner| inner.downcast_ref::<mesh_wire::Error>()) {
                            Some(inner) => inner.clone(),
                            None => self.interrupted(Some(&error)),
                        },
                    ))
                }
                Poll::Pending => return Poll::Pending,
            }
        }
    }

    fn interrupted(&self, cause: Option<&io::Error>) -> mesh_wire::Error {
        match &self.tls {
            Tls::Client(session) => session.interrupted(),
            _ => mesh_wire::Error::new(
                mesh_wire::ErrorKind::Tls,
                format!(
                    "The handshake was broken off{}.",
                    cause.map(|error| format!(" ({error})")).unwrap_or_default()
                ),
                "The peer closed the connection before it was open.",
            ),
        }
    }

    /// Works off bytes of the socket: plain text to `plain`, what the TLS says to `sealed`.
    fn pump(&mut self, data: &[u8]) -> mesh_wire::Result<()> {
        match &mut self.tls {
            Tls::None => {
                self.plain.extend_from_slice(data);
                Ok(())
            }
            Tls::Client(session) => {
                session.absorb(data);
                let result = session.pump(&mut self.sealed, &mut self.plain);
                self.is_eof |= session.is_peer_closed();
                result
            }
            Tls::Server(connection) => {
                connection.absorb(data);
                let result = connection.decrypt();
                self.sealed.extend_from_slice(connection.output());
                connection.clear_output();
                self.plain.extend_from_slice(connection.plain());
                connection.clear_plain();
                self.is_eof |= connection.is_eof();
                result
            }
        }
    }

    /// Brings more plain text, or the end.
    fn poll_fill(&mut self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.read > 0 && self.read == self.plain.len() {
            recycle(&mut self.plain);
            self.read = 0;
        }
        let from = self.plain.len();
        let Some(mut socket) = self.socket.take() else { return Poll::Ready(Err(io::ErrorKind::NotConnected.into())) };
        let pumped = socket.poll_piece(context, |data| (data.len(), self.pump(data)));
        self.socket = Some(socket);
        let (count, result) = ready!(pumped)?;
        self.gauge.received.fetch_add(count as u64, Relaxed);
        self.gauge.moved();
        if count == 0 {
            // Without a close_notify anybody may have cut the connection: a body that ends with it is not whole.
            let is_cut = !matches!(self.tls, Tls::None) && !self.is_eof;
            self.is_eof = true;
            return Poll::Ready(if is_cut { Err(io::ErrorKind::UnexpectedEof.into()) } else { Ok(()) });
        }
        let mut said = Poll::Pending;
        if self.sent < self.sealed.len() {
            // An alert, or the answer to a change of keys: said now if there is room, with the next write otherwise.
            said = self.poll_send(context);
        }
        result.map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
        if let Poll::Ready(Err(error)) = said {
            return Poll::Ready(Err(error));
        }
        self.inspect(from);
        Poll::Ready(Ok(()))
    }

    /// Shows the guard what came. What it objects to is never read: in its place stands what makes hyper answer 400, or nothing.
    fn inspect(&mut self, from: usize) {
        if matches!(self.watch, Watch::None) {
            return;
        }
        let came = self.plain.get(from..).unwrap_or_default();
        let verdict = self.watch.read(came, &self.gauge);
        if let Some(objection) = verdict {
            self.plain.truncate(from);
            self.plain.extend_from_slice(objection.instead);
            self.is_eof |= objection.is_end;
            self.sealed_farewell(objection.farewell);
            self.gauge.is_refused.store(true, Relaxed);
        }
    }

    /// The last word to a peer that can't be served; then the connection is dropped.
    pub fn refuse(&mut self, words: &[u8]) {
        self.sealed.extend_from_slice(words);
        self.gauge.is_refused.store(true, Relaxed);
    }

    fn sealed_farewell(&mut self, farewell: &[u8]) {
        if !farewell.is_empty() && self.watch.is_between_frames() {
            self.unsealed.extend_from_slice(farewell);
        }
    }

    /// Encrypts what was gathered.
    fn seal(&mut self) -> io::Result<()> {
        if self.unsealed.is_empty() {
            return Ok(());
        }
        let result = match &mut self.tls {
            Tls::None => {
                self.sealed.append(&mut self.unsealed);
                Ok(())
            }
            Tls::Client(session) => session.write(&self.unsealed, &mut self.sealed),
            Tls::Server(connection) => {
                let result = connection.send(&self.unsealed);
                self.sealed.extend_from_slice(connection.output());
                connection.clear_output();
                result
            }
        };
        recycle(&mut self.unsealed);
        result.map_err(|error| io::Error::new(io::ErrorKind::BrokenPipe, error))
    }

    /// Writes what is sealed.
    fn poll_send(&mut self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        while self.sent < self.sealed.len() {
            let Some(socket) = &mut self.socket else { return Poll::Ready(Err(io::ErrorKind::NotConnected.into())) };
            let rest = self.sealed.get(self.sent..).unwrap_or_default();
            let Poll::Ready(written) = socket.poll_write(context, rest) else {
                self.gauge.note_room(false);
                return Poll::Pending;
            };
            let written = written?;
            if written == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.sent += written;
            self.note_written(written);
        }
        self.sent = 0;
        recycle(&mut self.sealed);
        Poll::Ready(Ok(()))
    }

    fn note_written(&self, count: usize) {
        self.gauge.written.fetch_add(count as u64, Relaxed);
        self.gauge.note_room(true);
        self.gauge.moved();
    }

    fn is_bare(&self) -> bool {
        matches!(self.tls, Tls::None) && self.unsealed.is_empty() && self.sealed.is_empty()
    }

    /// Room for more to seal.
    fn poll_room(&mut self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.unsealed.len() >= RECORD {
            self.seal()?;
        }
        if self.sealed.len() - self.sent >= SEALED_AT_MOST {
            ready!(self.poll_send(context))?;
        }
        Poll::Ready(Ok(()))
    }

    pub fn poll_read_plain<T>(
        &mut self,
        context: &mut Context<'_>,
        most: usize,
        with: impl FnOnce(&[u8]) -> T,
    ) -> Poll<io::Result<T>> {
        while self.read == self.plain.len() && !self.is_eof {
            ready!(self.poll_fill(context))?;
        }
        let unread = self.unread();
        let piece = unread.get(..most.min(unread.len())).unwrap_or_default();
        let count = piece.len();
        let answer = with(piece);
        self.read += count;
        Poll::Ready(Ok(answer))
    }
}

impl hyper::rt::Read for Line {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        mut buffer: ReadBufCursor<'_>,
    ) -> Poll<io::Result<()>> {
        let room = buffer.remaining();
        self.poll_read_plain(context, room, |piece| buffer.put_slice(piece))
    }
}

impl hyper::rt::Write for Line {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        self.poll_write_vectored_inner(context, &[IoSlice::new(data)])
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.poll_write_vectored_inner(context, slices)
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.seal()?;
        self.poll_send(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.seal()?;
        if !self.is_closing {
            self.is_closing = true;
            let line = &mut *self;
            match &mut line.tls {
                Tls::None => {}
                Tls::Client(session) => session.close(&mut line.sealed),
                Tls::Server(connection) => {
                    connection.close();
                    line.sealed.extend_from_slice(connection.output());
                    connection.clear_output();
                }
            }
        }
        ready!(self.poll_send(context))?;
        match &mut self.socket {
            Some(socket) => socket.poll_shutdown(context),
            None => Poll::Ready(Ok(())),
        }
    }
}

impl Line {
    fn poll_write_vectored_inner(
        &mut self,
        context: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        if self.is_bare() {
            let Some(socket) = &mut self.socket else { return Poll::Ready(Err(io::ErrorKind::NotConnected.into())) };
            let Poll::Ready(written) = socket.poll_write_vectored(context, slices) else {
                self.gauge.note_room(false);
                return Poll::Pending;
            };
            let written = written?;
            self.note_written(written);
            self.watch.wrote(slices, written);
            return Poll::Ready(Ok(written));
        }
        ready!(self.poll_room(context))?;
        let mut count = 0;
        for slice in slices {
            self.unsealed.extend_from_slice(slice);
            count += slice.len();
        }
        self.watch.wrote(slices, count);
        Poll::Ready(Ok(count))
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        let is_refused = self.gauge.is_refused.load(Relaxed);
        if (self.is_eof && !is_refused) || self.gauge.is_cut() {
            return;
        }
        if let (Some(linger), Some(socket)) = (self.linger.take(), self.socket.take()) {
            let _ = self.seal();
            let unsent = self.sealed.get(self.sent..).unwrap_or_default().to_vec();
            linger.take_over(socket, unsent);
        }
    }
}

fn recycle(buffer: &mut Vec<u8>) {
    if buffer.capacity() > KEPT {
        *buffer = Vec::new();
    } else {
        buffer.clear();
    }
}
