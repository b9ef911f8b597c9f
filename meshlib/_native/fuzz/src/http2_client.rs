//! Invariant: whatever a peer sends, each stream ends once, answers mean the same however they are cut, and little is said back.
//!
//! The input is a list of frames: a byte for the kind, one for the flags, one for the stream, two for the length, then the payload.
//! So the fuzzer works behind the framing instead of guessing lengths; a kind above the known ones is raw bytes. The first byte of
//! the input is the size of the pieces.
use std::collections::BTreeMap;

use mesh_wire::http1::request::Request;
use mesh_wire::http2::{Http2, STREAM_WINDOW};
use mesh_wire::{Error, Sink, StreamSink};

const STREAMS: u32 = 3;

#[derive(Debug, Default, PartialEq)]
struct Stream {
    heads: Vec<(u16, Vec<u8>)>,
    body: Vec<u8>,
    ends: usize,
    resets: usize,
}

#[derive(Debug, Default)]
struct Record {
    selected: u32,
    streams: BTreeMap<u32, Stream>,
    closed: usize,
}

impl Record {
    fn stream(&mut self) -> &mut Stream {
        let stream = self.streams.entry(self.selected).or_default();
        assert!(stream.ends + stream.resets == 0, "told of a stream that has ended");
        stream
    }
}

impl Sink for Record {
    fn opened(&mut self) {}

    fn head<'a>(
        &mut self,
        status: u16,
        minor: u8,
        _reason: &'a [u8],
        fields: impl ExactSizeIterator<Item = (&'a [u8], &'a [u8])>,
    ) {
        assert!(minor == 20 && status >= 200 && fields.len() <= 100);
        let fields: Vec<u8> = fields.flat_map(|(name, value)| [name, b":", value, b"\n"].concat()).collect();
        assert!(!fields.iter().any(|byte| *byte == b'\r' || *byte == 0));
        let stream = self.stream();
        stream.heads.push((status, fields));
        assert_eq!(1, stream.heads.len());
    }

    fn body(&mut self, bytes: &[u8]) {
        assert!(!bytes.is_empty());
        let stream = self.stream();
        assert_eq!(1, stream.heads.len());
        stream.body.extend_from_slice(bytes);
        assert!(stream.body.len() <= STREAM_WINDOW as usize, "more than was allowed");
    }

    fn end<'a>(&mut self, _: bool, trailers: impl ExactSizeIterator<Item = (&'a [u8], &'a [u8])>) {
        assert!(trailers.len() <= 100);
        let stream = self.stream();
        assert_eq!(1, stream.heads.len());
        stream.ends += 1;
    }

    fn closed(&mut self) {
        self.closed += 1;
        assert_eq!(1, self.closed);
    }

    fn writable(&mut self) {
        self.stream();
    }
}

impl StreamSink for Record {
    fn select(&mut self, stream: u32) {
        self.selected = stream;
    }

    fn reset(&mut self, _: &Error) {
        self.stream().resets += 1;
    }
}

fn read<'a>(pieces: impl Iterator<Item = &'a [u8]>) -> Record {
    let mut http = Http2::new(true).expect("a preface");
    let mut record = Record::default();
    // What the peer has to say first.
    http.receive(&[0, 0, 0, 4, 0, 0, 0, 0, 0], &mut record);
    for number in 0..STREAMS {
        let method = ["GET", "POST", "HEAD"][number as usize];
        let request = Request { method, target: "/", fields: &[(b"host", b"h")], body: b"", is_streaming: number == 1 };
        let stream = http.send(&request, false).expect("a correct request");
        if request.is_streaming {
            http.send_body(stream, &[7; 70_000], true).expect("a body");
        }
    }
    let (mut out, mut heard) = (Vec::new(), 0);
    http.take_output(&mut out);
    out.clear();
    for piece in pieces {
        heard += piece.len();
        http.receive(piece, &mut record);
        http.take_output(&mut out);
    }
    // Answers to PING and SETTINGS, RST_STREAM for what is malformed, and the upload when its window opens.
    assert!(out.len() <= heard * 4 + 90_000, "{} bytes for {heard}", out.len());
    http.receive_eof(&mut record);
    for number in 0..STREAMS {
        let stream = record.streams.get(&(2 * number + 1)).expect("told how it ended");
        assert_eq!(1, stream.ends + stream.resets);
    }
    assert_eq!((0, 1, true), (http.streams(), record.closed, http.is_over()));
    record
}

fn framed(mut input: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    while let [kind, flags, stream, high, low, rest @ ..] = input {
        let size = (usize::from(*high % 4) << 8 | usize::from(*low)).min(rest.len());
        let (payload, after) = rest.split_at(size);
        if *kind % 12 < 10 {
            bytes.extend([0, (size >> 8) as u8, size as u8, kind % 12, *flags, 0, 0, 0, stream % 8]);
        }
        bytes.extend(payload);
        input = after;
    }
    bytes
}

pub fn check(input: &[u8]) {
    let [size, input @ ..] = input else { return };
    let bytes = framed(input);
    let whole = read(std::iter::once(&bytes[..]));
    let cut = read(bytes.chunks(usize::from(*size).max(1)));
    // What a connection error cuts off may have been told already where it came in pieces: then it is a beginning of the same.
    for (id, stream) in &whole.streams {
        let other = &cut.streams[id];
        if stream.ends + other.ends == 2 {
            assert_eq!(stream, other);
        } else if stream.heads.len() + other.heads.len() == 2 {
            assert_eq!(stream.heads, other.heads);
            assert!(stream.body.starts_with(&other.body) || other.body.starts_with(&stream.body));
        }
    }
}
