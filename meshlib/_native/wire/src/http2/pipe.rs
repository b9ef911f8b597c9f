//! What lies between the `h2` crate and our bytes? A pipe in memory, and wakers that only remember.
//!
//! The crate is written for sockets and tasks. Here a read takes what was put in and is never waited for, a write always succeeds,
//! and waking means that an id is noted: whoever moves the bytes polls what was noted. So there is no runtime, no thread and no
//! timer, and the work of one read is done when the call returns.
use std::io::{IoSlice, Result};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Wake, Waker};

use parking_lot::Mutex;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::connection::recycle;

#[derive(Default)]
struct Bytes {
    incoming: Vec<u8>,
    read: usize,
    outgoing: Vec<u8>,
    is_ended: bool,
}

/// Our end of the pipe and the crate's are the same object.
#[derive(Clone, Default)]
pub struct Pipe(Arc<Mutex<Bytes>>);

impl Pipe {
    pub fn put(&self, data: &[u8]) {
        self.0.lock().incoming.extend_from_slice(data);
    }

    /// The peer will send no more.
    pub fn end(&self) {
        self.0.lock().is_ended = true;
    }

    /// Moves what was written to `out`.
    pub fn take(&self, out: &mut Vec<u8>) {
        let mut bytes = self.0.lock();
        if out.is_empty() {
            std::mem::swap(out, &mut bytes.outgoing);
        } else {
            out.extend_from_slice(&bytes.outgoing);
            recycle(&mut bytes.outgoing);
        }
    }

    pub fn written(&self) -> usize {
        self.0.lock().outgoing.len()
    }

    pub fn write(&self, data: &[u8]) {
        self.0.lock().outgoing.extend_from_slice(data);
    }
}

impl AsyncRead for Pipe {
    fn poll_read(self: Pin<&mut Self>, _: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<Result<()>> {
        let mut bytes = self.0.lock();
        let bytes = &mut *bytes;
        let unread = bytes.incoming.get(bytes.read..).unwrap_or_default();
        if unread.is_empty() {
            return if bytes.is_ended { Poll::Ready(Ok(())) } else { Poll::Pending };
        }
        let piece = unread.get(..buffer.remaining()).unwrap_or(unread);
        buffer.put_slice(piece);
        bytes.read += piece.len();
        if bytes.read == bytes.incoming.len() {
            recycle(&mut bytes.incoming);
            bytes.read = 0;
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Pipe {
    fn poll_write(self: Pin<&mut Self>, _: &mut Context<'_>, data: &[u8]) -> Poll<Result<usize>> {
        self.write(data);
        Poll::Ready(Ok(data.len()))
    }

    fn poll_write_vectored(self: Pin<&mut Self>, _: &mut Context<'_>, slices: &[IoSlice<'_>]) -> Poll<Result<usize>> {
        let mut bytes = self.0.lock();
        slices.iter().for_each(|slice| bytes.outgoing.extend_from_slice(slice));
        Poll::Ready(Ok(slices.iter().map(|slice| slice.len()).sum()))
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Result<()>> {
        Poll::Ready(Ok(()))
    }
}

/// The ids that were woken, each once or more.
#[derive(Clone, Default)]
pub struct Woken(Arc<Mutex<Vec<u32>>>);

struct Bell {
    woken: Woken,
    id: u32,
}

impl Wake for Bell {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.woken.0.lock().push(self.id);
    }
}

impl Woken {
    pub fn waker(&self, id: u32) -> Waker {
        Waker::from(Arc::new(Bell { woken: self.clone(), id }))
    }

    pub fn note(&self, id: u32) {
        self.0.lock().push(id);
    }

    /// All that were woken since the last time, in order and each once.
    pub fn take(&self, ids: &mut Vec<u32>) {
        ids.clear();
        std::mem::swap(ids, &mut self.0.lock());
        ids.sort_unstable();
        ids.dedup();
    }
}
