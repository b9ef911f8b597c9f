//! Invariant: whatever is done with a connection in whatever order, an exchange has one head and one end, and after an end without
//! reuse, an error, an end of the socket or a close nothing goes out and nothing comes in any more.
//!
//! The input is a list of steps: a byte for the kind, one for the length of what belongs to it, then that.
use mesh_wire::http1::request::Request;
use mesh_wire::{HttpConnection, Sink};

#[derive(Debug, Default)]
struct Record {
    requests: usize,
    heads: usize,
    ends: usize,
    closed: usize,
    is_reusable: bool,
}

impl Sink for Record {
    fn opened(&mut self) {
        panic!("only TLS opens with an event");
    }

    fn head<'a>(&mut self, status: u16, _: u8, _: &'a [u8], _: impl ExactSizeIterator<Item = (&'a [u8], &'a [u8])>) {
        assert!(status == 101 || status >= 200);
        self.heads += 1;
        assert_eq!((self.heads, self.ends), (self.requests, self.requests - 1), "a head that nobody asked for");
    }

    fn body(&mut self, bytes: &[u8]) {
        assert!(!bytes.is_empty());
        assert_eq!(self.heads, self.ends + 1, "a body outside an answer");
    }

    fn end<'a>(&mut self, is_reusable: bool, _: impl ExactSizeIterator<Item = (&'a [u8], &'a [u8])>) {
        self.ends += 1;
        assert_eq!(self.heads, self.ends, "an end without a head");
        self.is_reusable = is_reusable;
    }

    fn closed(&mut self) {
        self.closed += 1;
        assert!(self.closed == 1 && self.heads == self.ends, "closed within an answer, or twice");
    }
}

pub fn check(input: &[u8]) {
    let (mut wire, mut record) = (HttpConnection::plain(), Record::default());
    assert!(wire.receive(b"x", &mut record).is_err() && wire.open().is_ok() && wire.is_idle());
    let mut rest = input;
    while let [kind, length, after @ ..] = rest {
        let (piece, after) = after.split_at(usize::from(*length).min(after.len()));
        rest = after;
        let (was_open, was_idle, ends, waiting) = (wire.is_open(), wire.is_idle(), record.ends, wire.output().len());
        let is_fine = step(&mut wire, &mut record, *kind, piece);

        assert!(wire.is_open() || !wire.is_idle(), "idle, but not open");
        assert!(was_open || !wire.is_open(), "what is over stays over");
        assert!(was_open || (record.ends == ends && wire.output().len() <= waiting), "alive after its end");
        if record.ends > ends {
            assert_eq!(wire.is_idle(), record.is_reusable && record.closed == 0);
            assert!(!was_idle || record.ends == record.requests);
        }
        if wire.is_idle() {
            assert!(is_fine || was_idle);
            assert_eq!((record.heads, record.ends), (record.requests, record.requests));
        }
    }
    let _ = wire.receive_eof(&mut record);
    assert!(!wire.is_open() && !wire.is_idle());
    assert!(wire.receive_eof(&mut record).is_ok() && record.closed <= 1);
}

fn step(wire: &mut HttpConnection, record: &mut Record, kind: u8, piece: &[u8]) -> bool {
    match kind % 16 {
        // Mostly what a peer does: bytes.
        0..=6 => {
            let result = wire.receive(piece, record);
            assert!(result.is_ok() || !wire.is_open(), "an error ends the connection");
            result.is_ok()
        }
        7..=11 => {
            let methods = ["GET", "HEAD", "POST", "PUT", "OPTIONS"];
            let upgrade: &[(&[u8], &[u8])] = &[(b"host", b"h"), (b"connection", b"upgrade"), (b"upgrade", b"x")];
            let fields = if kind & 16 == 0 { &upgrade[..1] } else { upgrade };
            let method = methods[usize::from(kind / 32) % methods.len()];
            let request = Request { method, target: "/", fields, body: piece, is_streaming: kind % 16 == 11 };
            let could = wire.is_idle();
            let result = wire.send(&request).map(<[u8]>::to_vec);
            assert_eq!(result.is_ok(), could, "sent unless the connection is idle");
            let Ok(large) = result else { return false };
            record.requests += 1;
            wire.seal(&large).is_ok() && !wire.output().is_empty()
        }
        12 => wire.send_body(piece, piece.len() % 2 == 0).is_ok() && wire.seal(b"").is_ok(),
        13 => {
            wire.clear_output();
            wire.output().is_empty()
        }
        14 => {
            let was_asked = record.requests > record.ends;
            let result = wire.receive_eof(record);
            assert!(!wire.is_open());
            result.is_ok() || was_asked
        }
        _ => {
            wire.clear_output();
            wire.close();
            assert!(!wire.is_open() && wire.output().is_empty(), "nothing is said without TLS");
            true
        }
    }
}
