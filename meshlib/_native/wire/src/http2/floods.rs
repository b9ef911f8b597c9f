//! Does this client make a server work for nothing? A watch over the frames of an HTTP/2 connection, on the server's side.
//!
//! The `h2` crate bounds what it keeps. What it doesn't see is the rate: streams that are opened and reset at once cost work that is
//! never asked for back (CVE-2023-44487), and so do frames that the client makes us reset (CVE-2025-8671), CONTINUATION frames that
//! never end (CVE-2024-27919) and empty DATA frames (RUSTSEC-2026-0258). So frames are counted on their way in, streams that we had
//! to reset on their way out. What PING and SETTINGS may cost is what the guard of the client's side allows a server.
//!
//! `now` is an argument, in whole seconds; payloads are never looked at.
use crate::error::{Error, Result};
use crate::http2::frames::{Frame, Frames, CONTINUATION, DATA, END_HEADERS, END_STREAM, HEADERS, RST_STREAM};
use crate::http2::guard::{earned, judged, ALLOWANCE, REQUEST};

/// In so many seconds more than so many resets are an attack, if they are more than half of the streams.
const WINDOW: u64 = 30;
const RESETS: u32 = 100;
/// CONTINUATION frames of one head: 60 KiB fit four frames of the usual size.
const CONTINUATIONS: u32 = 16;
/// Empty DATA frames that end nothing, of a connection between two that carry something or end a stream.
const EMPTY: u32 = 1000;

const PREFACE: usize = 24;

/// What was counted in one window.
struct Tally {
    since: u64,
    streams: u32,
    resets: u32,
    /// Of the window before, so that nobody splits a flood between two.
    before: (u32, u32),
    continuations: u32,
    empty: u32,
    highest: u32,
    /// The last frame belongs to a head, and whether to its end.
    is_head: bool,
    is_head_end: bool,
    /// What was asked of us earns the right to a few frames that want an answer and nothing else.
    allowance: u32,
    /// Resets are judged at all.
    is_strange: bool,
}

impl Default for Tally {
    fn default() -> Tally {
        Tally {
            since: 0,
            streams: 0,
            resets: 0,
            before: (0, 0),
            continuations: 0,
            empty: 0,
            highest: 0,
            is_head: false,
            is_head_end: false,
            allowance: ALLOWANCE,
            is_strange: true,
        }
    }
}

impl Tally {
    fn turn(&mut self, now: u64) {
        if now.saturating_sub(self.since) >= WINDOW {
            let is_next = now.saturating_sub(self.since) < 2 * WINDOW;
            self.before = if is_next { (self.streams, self.resets) } else { (0, 0) };
            (self.streams, self.resets, self.since) = (0, 0, now);
        }
    }

    fn judge(&self) -> Result<()> {
        let streams = u64::from(self.streams) + u64::from(self.before.0);
        let resets = u64::from(self.resets) + u64::from(self.before.1);
        if self.is_strange && resets > u64::from(RESETS) && resets * 2 > streams {
            return Err(Error::protocol("The peer opens streams and has them reset at once (rapid reset)."));
        }
        Ok(())
    }

    fn came(&mut self, frame: &Frame) -> Result<()> {
        self.is_head = matches!(frame.kind, HEADERS | CONTINUATION);
        self.is_head_end = frame.has(END_HEADERS);
        match frame.kind {
            HEADERS => {
                self.continuations = 0;
                if frame.stream > self.highest {
                    self.highest = frame.stream;
                    self.streams = self.streams.saturating_add(1);
                    self.allowance = earned(self.allowance, REQUEST);
                }
                self.judge()
            }
            CONTINUATION => {
                self.continuations += 1;
                if self.continuations > CONTINUATIONS {
                    return Err(Error::protocol("The peer sent too many CONTINUATION frames for one head."));
                }
                Ok(())
            }
            RST_STREAM => {
                self.resets = self.resets.saturating_add(1);
                self.judge()
            }
            DATA if frame.length == 0 && !frame.has(END_STREAM) => {
                self.empty += 1;
                if self.empty > EMPTY {
                    return Err(Error::protocol("The peer sent too many empty DATA frames."));
                }
                Ok(())
            }
            _ => {
                if frame.kind == DATA {
                    self.empty = 0;
                }
                self.allowance = judged(self.allowance, frame)?;
                Ok(())
            }
        }
    }
}

pub struct Floods {
    incoming: Frames,
    outgoing: Frames,
    preface: usize,
    tally: Tally,
}

impl Default for Floods {
    fn default() -> Floods {
        Floods {
            incoming: Frames::after(PREFACE),
            outgoing: Frames::default(),
            preface: PREFACE,
            tally: Tally::default(),
        }
    }
}

impl Floods {
    /// For a client that was attested, and works for many: whoever of them gives up, gives up all that he had begun at once.
    pub fn of_ours() -> Floods {
        let mut made = Floods::default();
        made.tally.is_strange = false;
        made
    }

    /// Bytes from the client, its preface first.
    pub fn read(&mut self, bytes: &[u8], now: u64) -> Result<()> {
        let Floods { incoming, preface, tally, .. } = self;
        tally.turn(now);
        *preface -= (*preface).min(bytes.len());
        incoming.read(bytes, |frame| tally.came(frame))
    }

    /// Bytes to the client. Streams that we had to reset count as if the client had done it, but are judged with the next that it
    /// sends.
    pub fn wrote(&mut self, bytes: &[u8]) {
        let tally = &mut self.tally;
        let _ = self.outgoing.read(bytes, |frame| {
            if frame.kind == RST_STREAM {
                tally.resets = tally.resets.saturating_add(1);
            }
            Ok(())
        });
    }

    /// Some of a head is here (or of the preface, or of a frame's beginning), and the rest isn't.
    pub fn is_in_head(&self) -> bool {
        let is_cut = if self.tally.is_head { !self.incoming.is_between() } else { self.incoming.is_in_head() };
        is_cut || self.preface > 0 || (self.tally.is_head && !self.tally.is_head_end)
    }

    /// No frame of ours is half written: another may stand here.
    pub fn is_between_frames(&self) -> bool {
        self.outgoing.is_between()
    }
}

/// GOAWAY(ENHANCE_YOUR_CALM), naming no stream as processed.
pub const GOAWAY: &[u8] = &[0, 0, 8, 7, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 11];

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]
    use super::*;
    use crate::http2::frames::PING;

    #[test]
    fn resets_of_an_attested_client_are_not_judged_but_what_else_it_sends_is() {
        let open_and_reset = |floods: &mut Floods| {
            floods.read(HELLO, 0).unwrap();
            (0..1000_u32).try_for_each(|number| {
                let stream = 2 * number + 1;
                floods.read(&frame(HEADERS, END_HEADERS | END_STREAM, stream, b"x"), 1)?;
                floods.read(&frame(RST_STREAM, 0, stream, &[0, 0, 0, 8]), 1)
            })
        };
        assert!(open_and_reset(&mut Floods::default()).is_err());
        let mut ours = Floods::of_ours();
        open_and_reset(&mut ours).unwrap();
        let pings = (0..20_000).try_for_each(|_| ours.read(&frame(PING, 0, 0, &[0; 8]), 1));
        assert!(pings.is_err());
    }

    const HELLO: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00";

    fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
        let mut out = (payload.len() as u32).to_be_bytes()[1..].to_vec();
        out.extend([kind, flags]);
        out.extend(stream.to_be_bytes());
        out.extend(payload);
        out
    }

    fn greeted() -> Floods {
        let mut floods = Floods::default();
        HELLO.iter().for_each(|byte| floods.read(&[*byte], 0).unwrap());
        floods
    }

    #[test]
    fn streams_that_are_reset_at_once_are_an_attack() {
        let mut floods = greeted();
        let mut taken = 0;
        for number in 0..1000u32 {
            let mut both = frame(HEADERS, 5, number * 2 + 1, b"x");
            both.extend(frame(RST_STREAM, 0, number * 2 + 1, &[0, 0, 0, 8]));
            if floods.read(&both, u64::from(number) / 50).is_err() {
                break;
            }
            taken += 1;
        }
        assert_eq!(RESETS, taken);
    }

    #[test]
    fn a_client_that_cancels_now_and_then_stays() {
        let mut floods = greeted();
        for number in 0..3000u32 {
            floods.read(&frame(HEADERS, 5, number * 2 + 1, b"x"), 0).unwrap();
            if number % 3 == 0 {
                floods.read(&frame(RST_STREAM, 0, number * 2 + 1, &[0, 0, 0, 8]), 0).unwrap();
            }
        }
        for number in 3000..3090u32 {
            let mut both = frame(HEADERS, 5, number * 2 + 1, b"x");
            both.extend(frame(RST_STREAM, 0, number * 2 + 1, &[0, 0, 0, 8]));
            floods.read(&both, 100).unwrap();
        }
    }

    #[test]
    fn resets_that_the_client_makes_us_send_count_too() {
        let mut floods = greeted();
        let mut taken = 0;
        for number in 0..1000u32 {
            if floods.read(&frame(HEADERS, 5, number * 2 + 1, b"x"), 0).is_err() {
                break;
            }
            floods.wrote(&frame(RST_STREAM, 0, number * 2 + 1, &[0, 0, 0, 1]));
            taken += 1;
        }
        assert!(taken <= RESETS + 1, "{taken}");
    }

    #[test]
    fn a_head_without_end_and_data_without_content_are_attacks() {
        let mut head = greeted();
        head.read(&frame(HEADERS, 0, 1, b"x"), 0).unwrap();
        let refused = (0..100).position(|_| head.read(&frame(CONTINUATION, 0, 1, b"x"), 0).is_err());
        assert_eq!(Some(CONTINUATIONS as usize), refused);
        let mut data = greeted();
        let refused = (0..2000).position(|_| data.read(&frame(DATA, 0, 1, b""), 0).is_err());
        assert_eq!(Some(EMPTY as usize), refused);
    }

    #[test]
    fn frames_that_only_want_an_answer_must_be_earned() {
        let mut floods = greeted();
        let refused = (0..2000).position(|_| floods.read(&frame(PING, 0, 0, &[0; 8]), 0).is_err());
        assert_eq!(Some(ALLOWANCE as usize - 1), refused);
    }

    #[test]
    fn it_knows_whether_a_head_is_whole() {
        let mut floods = Floods::default();
        floods.read(&HELLO[..10], 0).unwrap();
        assert!(floods.is_in_head());
        floods.read(&HELLO[10..], 0).unwrap();
        assert!(!floods.is_in_head());
        floods.read(&frame(HEADERS, 0, 1, b"x"), 0).unwrap();
        assert!(floods.is_in_head());
        let last = frame(CONTINUATION, END_HEADERS, 1, b"xyz");
        floods.read(&last[..10], 0).unwrap();
        assert!(floods.is_in_head());
        floods.read(&last[10..], 0).unwrap();
        assert!(!floods.is_in_head());
        floods.read(&frame(DATA, 0, 1, b"abc")[..10], 0).unwrap();
        assert!(!floods.is_in_head());
    }

    #[test]
    fn it_knows_where_a_frame_of_ours_ends() {
        let mut floods = greeted();
        let ours = frame(DATA, 0, 1, b"abc");
        for (at, byte) in ours.iter().enumerate() {
            floods.wrote(&[*byte]);
            assert_eq!(at + 1 == ours.len(), floods.is_between_frames());
        }
    }
}
