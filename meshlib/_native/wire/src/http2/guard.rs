//! Does this peer speak HTTP/2 at all, and does it make us work for nothing?
//!
//! The frames' headers are read on their way to the `h2` crate, which bounds what it must keep: header lists, CONTINUATION frames,
//! small and empty DATA frames, streams that it had to reset. It answers every PING and SETTINGS though, so that a peer that sends
//! them and never reads would fill our memory with answers. Without a clock the measure is work: what was asked and what came of it
//! earns the peer the right to a few.
//!
//! The first frame is looked at too, because "this is HTTP/1.1" helps whoever configured the service, and "PROTOCOL_ERROR" doesn't.
use crate::error::{Error, ErrorKind, Result};

/// PING and SETTINGS frames that a peer may send for nothing; a keep-alive each second fits the longest life of a connection.
const ALLOWANCE: u32 = 1000;
/// What one request earns: the peer may measure the way it takes.
pub const REQUEST: u32 = 10;

const HEADER: usize = 9;
const DATA: u8 = 0;
const SETTINGS: u8 = 4;
const PING: u8 = 6;
const ACK: u8 = 1;

pub struct Guard {
    header: [u8; HEADER],
    /// Bytes of the header that are here, and bytes of payload that are still to come.
    have: usize,
    payload: usize,
    allowance: u32,
    frames: u64,
}

impl Default for Guard {
    fn default() -> Self {
        Guard { header: [0; HEADER], have: 0, payload: 0, allowance: ALLOWANCE, frames: 0 }
    }
}

impl Guard {
    pub fn earn(&mut self, allowance: u32) {
        self.allowance = (self.allowance + allowance).min(ALLOWANCE);
    }

    /// The peer's first frame, its SETTINGS, has come whole.
    pub fn is_greeted(&self) -> bool {
        self.frames > 1 || (self.frames == 1 && self.payload == 0)
    }

    pub fn read(&mut self, mut bytes: &[u8]) -> Result<()> {
        while !bytes.is_empty() {
            if self.payload > 0 {
                let skipped = self.payload.min(bytes.len());
                self.payload -= skipped;
                bytes = bytes.get(skipped..).unwrap_or_default();
                continue;
            }
            let taken = (HEADER - self.have).min(bytes.len());
            let (piece, rest) = bytes.split_at_checked(taken).unwrap_or((bytes, &[]));
            if let Some(room) = self.header.get_mut(self.have..self.have + taken) {
                room.copy_from_slice(piece);
            }
            self.have += taken;
            bytes = rest;
            if self.have == HEADER {
                self.have = 0;
                self.judge()?;
            }
        }
        Ok(())
    }

    fn judge(&mut self) -> Result<()> {
        let [high, middle, low, kind, flags, ..] = self.header;
        self.payload = usize::from(high) << 16 | usize::from(middle) << 8 | usize::from(low);
        self.frames += 1;
        if self.frames == 1 && (kind != SETTINGS || flags & ACK != 0) {
            return Err(self.stranger());
        }
        match kind {
            DATA => self.earn(1),
            PING | SETTINGS if flags & ACK == 0 => match self.allowance.checked_sub(1) {
                Some(left) => self.allowance = left,
                None => {
                    return Err(Error::protocol("The peer sent too many PING or SETTINGS frames that nobody needed."));
                }
            },
            _ => {}
        }
        Ok(())
    }

    fn stranger(&self) -> Error {
        let what = match self.header {
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
}
