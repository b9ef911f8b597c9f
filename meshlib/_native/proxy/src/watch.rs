//! Which guard looks at the bytes of this connection, and what is done when it objects?
//!
//! The guards are the wire crate's. Bad HTTP/1.1 never reaches hyper's parser: in its place hyper finds what it must answer with 400,
//! in turn behind the answers that are under way. A flood of HTTP/2 frames gets GOAWAY(ENHANCE_YOUR_CALM), and nothing after it.
use std::io::IoSlice;
use std::sync::atomic::Ordering::Relaxed;

use mesh_wire::http1::guard::Guard;
use mesh_wire::http2::floods::{Floods, GOAWAY};

use crate::gauge::{Gauge, SWITCHED, SWITCH_NO};

/// What is done about bytes that a guard objects to.
pub struct Objection {
    /// What hyper reads instead of them.
    pub instead: &'static [u8],
    /// Whether that is the last that it reads.
    pub is_end: bool,
    /// What the peer is told, beside what hyper says.
    pub farewell: &'static [u8],
}

/// No head can have this in it, wherever it is cut: hyper answers 400.
const NO_HEAD: &[u8] = b"\0\r\n\r\n";

pub enum Watch {
    None,
    Http1(Box<Guard>),
    Http2(Box<Floods>),
}

impl Watch {
    pub fn http1() -> Watch {
        Watch::Http1(Box::default())
    }

    pub fn http2() -> Watch {
        Watch::Http2(Box::default())
    }

    pub fn read(&mut self, bytes: &[u8], gauge: &Gauge) -> Option<Objection> {
        match self {
            Watch::None => None,
            Watch::Http1(guard) => {
                if gauge.switching.load(Relaxed) != SWITCH_NO {
                    guard.answer_offer(gauge.switching.swap(SWITCH_NO, Relaxed) == SWITCHED);
                }
                let result = guard.read(bytes);
                gauge.note_head(guard.is_in_head());
                let violation = result.err()?;
                let instead = if violation.is_in_body { b"" } else { NO_HEAD };
                Some(Objection { instead, is_end: violation.is_in_body, farewell: b"" })
            }
            Watch::Http2(floods) => {
                let result = floods.read(bytes, gauge.opened.elapsed().as_secs());
                gauge.note_head(floods.is_in_head());
                result.err().map(|_| Objection { instead: b"", is_end: true, farewell: GOAWAY })
            }
        }
    }

    pub fn wrote(&mut self, slices: &[IoSlice<'_>], count: usize) {
        let Watch::Http2(floods) = self else { return };
        let mut left = count;
        for slice in slices {
            let piece = slice.get(..left.min(slice.len())).unwrap_or_default();
            floods.wrote(piece);
            left -= piece.len();
        }
    }

    pub fn is_between_frames(&self) -> bool {
        match self {
            Watch::Http2(floods) => floods.is_between_frames(),
            _ => true,
        }
    }
}
