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

/// What hyper would say in its own words, where the library must know that they are the agent's.
const UNREADABLE: &[u8] = b"HTTP/1.1 400 Bad Request\r\nx-mesh-failed: agent; written=0\r\n\
    content-type: text/plain; charset=utf-8\r\ncontent-length: 79\r\nconnection: close\r\n\r\n\
    the agent can't read this request: it is too large, or means two things at once";

pub enum Watch {
    None,
    /// And whether it is a caller of ours whom it guards us from.
    Http1(Box<Guard>, bool),
    Http2(Box<Floods>),
}

impl Watch {
    pub fn http1(is_ours: bool) -> Watch {
        Watch::Http1(Box::default(), is_ours)
    }

    pub fn http2(is_ours: bool) -> Watch {
        Watch::Http2(if is_ours { Box::new(Floods::of_ours()) } else { Box::default() })
    }

    pub fn read(&mut self, bytes: &[u8], gauge: &Gauge) -> Option<Objection> {
        match self {
            Watch::None => None,
            Watch::Http1(guard, is_ours) => {
                if gauge.switching.load(Relaxed) != SWITCH_NO {
                    guard.answer_offer(gauge.switching.swap(SWITCH_NO, Relaxed) == SWITCHED);
                }
                let result = guard.read(bytes);
                gauge.note_head(guard.is_in_head());
                let violation = result.err()?;
                if *is_ours && !violation.is_in_body && gauge.active.load(Relaxed) == 0 {
                    return Some(Objection { instead: b"", is_end: true, farewell: UNREADABLE });
                }
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

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use mesh_wire::delegated::{failed, Reason, FAILED};

    #[test]
    fn what_we_say_ourselves_is_one_whole_answer() {
        let text = std::str::from_utf8(UNREADABLE).unwrap();
        let (head, body) = text.split_once("\r\n\r\n").unwrap();
        assert!(head.contains(&format!("\r\ncontent-length: {}\r\n", body.len())), "{}", body.len());
        assert!(head.contains(&format!("\r\n{FAILED}: {}\r\n", failed(Reason::Agent, false))));
    }
}
