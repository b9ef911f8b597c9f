//! What arrived on a connection, for whoever wants to know?
//!
//! A trait with slices instead of a list of events with copies: the receiver makes its own objects straight from the buffer, and
//! only those that it keeps. One trait for every version of HTTP.
use crate::error::Error;

/// Fields are in the order of the wire, names as they came.
pub trait Sink {
    /// The handshake is done and the peer has proved its identity.
    fn opened(&mut self);
    fn head<'a>(
        &mut self,
        status: u16,
        minor: u8,
        reason: &'a [u8],
        fields: impl ExactSizeIterator<Item = (&'a [u8], &'a [u8])>,
    );
    fn body(&mut self, bytes: &[u8]);
    fn end<'a>(&mut self, is_reusable: bool, trailers: impl ExactSizeIterator<Item = (&'a [u8], &'a [u8])>);
    /// No further exchange is possible: the peer closed the idle connection, or sent bytes that nobody asked for.
    fn closed(&mut self);
    /// HTTP/2: what was held up by the peer's window is out, and more may be sent.
    fn writable(&mut self) {}
}

/// The same for many exchanges at once.
pub trait StreamSink: Sink {
    /// What follows belongs to this stream; 0 is the connection.
    fn select(&mut self, stream: u32);
    /// The stream ended without a whole answer; the error's kind says whether the request was processed.
    fn reset(&mut self, error: &Error);
}
