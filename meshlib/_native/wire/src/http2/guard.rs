//! Does this peer speak HTTP/2 at all, and does it make us work for nothing?
//!
//! The frames' headers are read on their way to the `h2` crate, which bounds what it must keep: header lists, CONTINUATION frames,
//! small and empty DATA frames, streams that it had to reset. It answers every PING and SETTINGS though, so that a peer that sends
//! them and never reads would fill our memory with answers. Without a clock the measure is work: what was asked and what came of it
//! earns the peer the right to a few.
//!
//! The first frame is looked at too, because "this is HTTP/1.1" helps whoever configured the service, and "PROTOCOL_ERROR" doesn't.
use crate::error::{Error, ErrorKind, Result};
use crate::http2::frames::{Frame, Frames, ACK, DATA, PING, SETTINGS};

/// PING and SETTINGS frames that a peer may send for nothing; a keep-alive each second fits the longest life of a connection.
pub const ALLOWANCE: u32 = 1000;
/// What one request earns: the peer may measure the way it takes.
pub const REQUEST: u32 = 10;

pub struct Guard {
    frames: Frames,
    /// Frames that began.
    seen: u64,
    allowance: u32,
}

impl Default for Guard {
    fn default() -> Self {
        Guard { frames: Frames::default(), seen: 0, allowance: ALLOWANCE }
    }
}

impl Guard {
    pub fn earn(&mut self, allowance: u32) {
        self.allowance = earned(self.allowance, allowance);
    }

    /// The peer's first frame, its SETTINGS, has come whole.
    pub fn is_greeted(&self) -> bool {
        self.seen > 1 || (self.seen == 1 && self.frames.is_whole())
    }

    pub fn read(&mut self, bytes: &[u8]) -> Result<()> {
        let Guard { frames, seen, allowance } = self;
        frames.read(bytes, |frame| {
            *seen += 1;
            if *seen == 1 && (frame.kind != SETTINGS || frame.has(ACK)) {
                return Err(stranger(&frame.head));
            }
            *allowance = judged(*allowance, frame)?;
            Ok(())
        })
    }
}

/// So much may be sent for nothing after something was asked or came.
pub fn earned(allowance: u32, more: u32) -> u32 {
    (allowance + more).min(ALLOWANCE)
}

/// So much may still be sent for nothing after this frame. Fails on the one that is too many.
pub fn judged(allowance: u32, frame: &Frame) -> Result<u32> {
    match frame.kind {
        DATA => Ok(earned(allowance, 1)),
        PING | SETTINGS if !frame.has(ACK) => allowance
            .checked_sub(1)
            .ok_or_else(|| Error::protocol("The peer sent too many PING or SETTINGS frames that nobody needed.")),
        _ => Ok(allowance),
    }
}

fn stranger(head: &[u8]) -> Error {
    let what = match head {
        [b'H', b'T', b'T', b'P', ..] => "it speaks HTTP/1.1",
        [0x14..=0x17, 3, ..] => "it speaks TLS",
        _ => "it speaks something else",
    };
    Error::new(
        ErrorKind::Protocol,
        format!("The peer does not speak HTTP/2: {what}."),
        "Likely cause: the service is configured for HTTP/2, but what listens at this address isn't. Set the protocol of the \
         service to http/1.1, or switch HTTP/2 on at the server.",
    )
}
