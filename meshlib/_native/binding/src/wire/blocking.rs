//! How does a calling thread move the bytes of its own connection? It waits here, with the interpreter released.
//!
//! One crossing for one exchange: what is to be written goes out, the thread waits, reads, decrypts and parses, and takes the
//! interpreter back only when there is something to tell. With a crossing for each system call, eight threads would hand the
//! interpreter around more often than they work (measured: eight threads were no faster than one). Events are noted without Python
//! and become Python objects afterwards.
//!
//! The socket belongs to Python, which opens and closes it; it doesn't block, and its waiting is done by `poll`. Nothing is decided
//! here, neither how long to wait nor what a failure means.
use std::cell::RefCell;
use std::os::fd::BorrowedFd;
use std::time::{Duration, Instant};

use mesh_wire::{HttpConnection, Sink};
use rustix::event::{poll, PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use rustix::net::{recv, send, RecvFlags, SendFlags};

/// There are events, or (if nothing was to be read) everything is written.
pub const DONE: u8 = 0;
/// There are events, but the peer spoke before it had taken what was to be written.
pub const EARLY: u8 = 1;
/// The time is over.
pub const LATE: u8 = 2;
/// The peer ended the connection; what it had said before has been told.
pub const CLOSED: u8 = 3;
/// A signal came: let Python handle it, and go on.
pub const INTERRUPTED: u8 = 4;

const BUFFER: usize = 64 * 1024;

thread_local! {
    static INCOMING: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

/// Why it stopped, if not for one of the codes.
pub enum Failure {
    Wire(mesh_wire::Error),
    Socket(Errno),
}

/// Writes `unsent`, and reads until there is an event if `is_reading`. What could not be written stays in `unsent`.
pub fn converse(
    wire: &mut HttpConnection,
    socket: BorrowedFd<'_>,
    unsent: &mut Vec<u8>,
    seconds: f64,
    is_reading: bool,
    notes: &mut Notes,
) -> Result<u8, Failure> {
    let end = Instant::now() + Duration::try_from_secs_f64(seconds.min(1e9)).unwrap_or_default();
    INCOMING.with_borrow_mut(|buffer| {
        buffer.resize(BUFFER, 0);
        // A peer that closed may have answered first.
        let mut cut = None;
        loop {
            if let Err(error) = write(socket, unsent) {
                unsent.clear();
                cut = Some(error);
                if !is_reading {
                    return Ok(EARLY);
                }
            }
            if unsent.is_empty() && !is_reading {
                return Ok(DONE);
            }
            // The answer to a small request is rarely here already: wait first.
            match wait(socket, !unsent.is_empty(), end)? {
                Wait::Late => return Ok(LATE),
                Wait::Interrupted => return Ok(INTERRUPTED),
                Wait::Writable => continue,
                Wait::Readable => {}
            }
            // After an Upgrade another thread may be the one that reads.
            if !is_reading && wire.is_upgraded() {
                return Ok(EARLY);
            }
            // What comes now may be no answer (a session ticket, 100 Continue, all that HTTP/2 says), and is heard while we write.
            let is_http2 = wire.is_http2();
            let size = match recv(socket, &mut buffer[..], RecvFlags::empty()) {
                Ok((0, _)) => return cut.map_or(Ok(CLOSED), |error| Err(Failure::Socket(error))),
                Ok((size, _)) => size,
                Err(Errno::AGAIN | Errno::INTR) => continue,
                Err(error) => return Err(Failure::Socket(cut.unwrap_or(error))),
            };
            let result = wire.receive(buffer.get(..size).unwrap_or_default(), notes);
            let is_early = ((!unsent.is_empty() || !is_reading) && !is_http2) || cut.is_some();
            unsent.extend_from_slice(wire.output());
            wire.clear_output();
            if let Err(error) = result {
                // The alert, if the socket takes it at once.
                let _ = write(socket, unsent);
                return Err(Failure::Wire(error));
            }
            if !notes.is_empty() {
                let _ = write(socket, unsent); // the next crossing says why, if there is one
                return Ok(if is_early { EARLY } else { DONE });
            }
        }
    })
}

/// An idle connection may carry another exchange. In HTTP/2 what the peer said meanwhile is taken in, and answered.
pub fn is_usable(wire: &mut HttpConnection, socket: BorrowedFd<'_>, unsent: &mut Vec<u8>) -> bool {
    if !wire.is_http2() {
        return wire.is_idle() && is_quiet(socket);
    }
    let mut notes = Notes::default();
    INCOMING.with_borrow_mut(|buffer| {
        buffer.resize(BUFFER, 0);
        loop {
            let size = match recv(socket, &mut buffer[..], RecvFlags::DONTWAIT) {
                Ok((size, _)) => size,
                Err(Errno::INTR) => continue,
                Err(Errno::AGAIN) => return wire.is_idle(),
                Err(_) => return false,
            };
            let is_fine = size > 0 && wire.receive(buffer.get(..size).unwrap_or_default(), &mut notes).is_ok();
            unsent.extend_from_slice(wire.output());
            wire.clear_output();
            if !is_fine || write(socket, unsent).is_err() {
                return false;
            }
        }
    })
}

/// Nothing has come on an idle connection, and it isn't closed.
fn is_quiet(socket: BorrowedFd<'_>) -> bool {
    let mut byte = [0u8; 1];
    matches!(recv(socket, &mut byte, RecvFlags::PEEK | RecvFlags::DONTWAIT), Err(Errno::AGAIN))
}

fn write(socket: BorrowedFd<'_>, unsent: &mut Vec<u8>) -> Result<(), Errno> {
    let mut sent = 0;
    let result = loop {
        let left = unsent.get(sent..).unwrap_or_default();
        if left.is_empty() {
            break Ok(());
        }
        match send(socket, left, SendFlags::NOSIGNAL) {
            Ok(size) => sent += size,
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => break Ok(()),
            Err(error) => break Err(error),
        }
    };
    unsent.drain(..sent);
    result
}

enum Wait {
    Readable,
    Writable,
    Late,
    Interrupted,
}

fn wait(socket: BorrowedFd<'_>, is_writing: bool, end: Instant) -> Result<Wait, Failure> {
    let left = end.saturating_duration_since(Instant::now());
    if left.is_zero() {
        return Ok(Wait::Late);
    }
    let interest = if is_writing { PollFlags::IN | PollFlags::OUT } else { PollFlags::IN };
    let mut fds = [PollFd::new(&socket, interest)];
    let left = Timespec::try_from(left).ok();
    match poll(&mut fds, left.as_ref()) {
        Ok(0) => Ok(Wait::Late),
        Ok(_) => {
            let found = fds.first().map_or(PollFlags::empty(), PollFd::revents);
            // An error or a hang-up is what `recv` says of it.
            Ok(if found.intersects(PollFlags::OUT) && !found.intersects(PollFlags::IN) {
                Wait::Writable
            } else {
                Wait::Readable
            })
        }
        Err(Errno::INTR) => Ok(Wait::Interrupted),
        Err(error) => Err(Failure::Socket(error)),
    }
}

/// What came, in order, without Python.
#[derive(Default)]
pub struct Notes {
    notes: Vec<Note>,
    bytes: Vec<u8>,
    fields: Vec<(usize, usize, usize)>,
}

enum Note {
    Opened,
    /// Status, minor version, and the places of the reason and of the fields.
    Head(u16, u8, (usize, usize), (usize, usize)),
    Body(usize, usize),
    End(bool, (usize, usize)),
    Closed,
    Writable,
}

impl Notes {
    pub fn is_empty(&self) -> bool {
        self.notes.is_empty()
    }

    /// Tells another sink all of it.
    pub fn replay(&self, sink: &mut impl Sink) {
        for note in &self.notes {
            match *note {
                Note::Opened => sink.opened(),
                Note::Head(status, minor, (from, to), fields) => {
                    sink.head(status, minor, self.slice(from, to), self.fields(fields));
                }
                Note::Body(from, to) => sink.body(self.slice(from, to)),
                Note::End(is_reusable, fields) => sink.end(is_reusable, self.fields(fields)),
                Note::Closed => sink.closed(),
                Note::Writable => sink.writable(),
            }
        }
    }

    fn slice(&self, from: usize, to: usize) -> &[u8] {
        self.bytes.get(from..to).unwrap_or_default()
    }

    fn fields(&self, (from, to): (usize, usize)) -> impl ExactSizeIterator<Item = (&[u8], &[u8])> {
        let places = self.fields.get(from..to).unwrap_or_default();
        places.iter().map(|(name, value, end)| (self.slice(*name, *value), self.slice(*value, *end)))
    }

    fn keep(&mut self, bytes: &[u8]) -> (usize, usize) {
        let from = self.bytes.len();
        self.bytes.extend_from_slice(bytes);
        (from, self.bytes.len())
    }

    fn keep_fields<'a>(&mut self, fields: impl Iterator<Item = (&'a [u8], &'a [u8])>) -> (usize, usize) {
        let from = self.fields.len();
        for (name, value) in fields {
            let (start, middle) = self.keep(name);
            let (_, end) = self.keep(value);
            self.fields.push((start, middle, end));
        }
        (from, self.fields.len())
    }
}

impl Sink for Notes {
    fn opened(&mut self) {
        self.notes.push(Note::Opened);
    }

    fn head<'a>(
        &mut self,
        status: u16,
        minor: u8,
        reason: &'a [u8],
        fields: impl ExactSizeIterator<Item = (&'a [u8], &'a [u8])>,
    ) {
        let reason = self.keep(reason);
        let fields = self.keep_fields(fields);
        self.notes.push(Note::Head(status, minor, reason, fields));
    }

    fn body(&mut self, bytes: &[u8]) {
        let (from, to) = self.keep(bytes);
        match self.notes.last_mut() {
            Some(Note::Body(_, end)) if *end == from => *end = to,
            _ => self.notes.push(Note::Body(from, to)),
        }
    }

    fn end<'a>(&mut self, is_reusable: bool, trailers: impl ExactSizeIterator<Item = (&'a [u8], &'a [u8])>) {
        let fields = self.keep_fields(trailers);
        self.notes.push(Note::End(is_reusable, fields));
    }

    fn closed(&mut self) {
        self.notes.push(Note::Closed);
    }

    fn writable(&mut self) {
        self.notes.push(Note::Writable);
    }
}
