//! Where does each frame of an HTTP/2 connection begin? The heads of one direction, cut out of a stream of bytes that comes in pieces.
//!
//! Nothing but the nine bytes of a head is kept (RFC 9113, 4.1): payloads are counted and passed over.
use crate::error::Result;

pub const DATA: u8 = 0;
pub const HEADERS: u8 = 1;
pub const RST_STREAM: u8 = 3;
pub const SETTINGS: u8 = 4;
pub const PING: u8 = 6;
pub const CONTINUATION: u8 = 9;

pub const ACK: u8 = 1;
pub const END_STREAM: u8 = 1;
pub const END_HEADERS: u8 = 4;

const HEAD: usize = 9;

/// A frame as its head describes it.
#[derive(Clone, Copy)]
pub struct Frame {
    pub length: usize,
    pub kind: u8,
    pub flags: u8,
    pub stream: u32,
    /// As it came.
    pub head: [u8; HEAD],
}

impl Frame {
    fn of(head: [u8; HEAD]) -> Frame {
        let [high, middle, low, kind, flags, a, b, c, d] = head;
        let length = usize::from(high) << 16 | usize::from(middle) << 8 | usize::from(low);
        Frame { length, kind, flags, stream: u32::from_be_bytes([a & 0x7f, b, c, d]), head }
    }

    pub fn has(&self, flag: u8) -> bool {
        self.flags & flag != 0
    }
}

#[derive(Default)]
pub struct Frames {
    head: [u8; HEAD],
    /// Bytes of the head that are here, and bytes that are still to come before the next.
    have: usize,
    skip: usize,
}

impl Frames {
    /// Frames that begin behind so many bytes: a client's preface.
    pub fn after(skip: usize) -> Frames {
        Frames { skip, ..Frames::default() }
    }

    /// The last frame has come whole, and of the next one nothing.
    pub fn is_between(&self) -> bool {
        self.is_whole() && !self.is_in_head()
    }

    /// Of the next frame's head some bytes are here, and the rest isn't.
    pub fn is_in_head(&self) -> bool {
        self.have > 0
    }

    /// The payload of the last frame is here.
    pub fn is_whole(&self) -> bool {
        self.skip == 0
    }

    /// Calls with each frame whose head ends in these bytes. An error of the call ends the reading.
    pub fn read(&mut self, mut bytes: &[u8], mut with: impl FnMut(&Frame) -> Result<()>) -> Result<()> {
        while !bytes.is_empty() {
            if self.skip > 0 {
                let skipped = self.skip.min(bytes.len());
                self.skip -= skipped;
                bytes = bytes.get(skipped..).unwrap_or_default();
                continue;
            }
            let taken = (HEAD - self.have).min(bytes.len());
            let (piece, rest) = bytes.split_at_checked(taken).unwrap_or((bytes, &[]));
            if let Some(room) = self.head.get_mut(self.have..self.have + taken) {
                room.copy_from_slice(piece);
            }
            self.have += taken;
            bytes = rest;
            if self.have == HEAD {
                let frame = Frame::of(self.head);
                (self.have, self.skip) = (0, frame.length);
                with(&frame)?;
            }
        }
        Ok(())
    }
}
