//! Is each step of HTTP/2 what it should be, frame by frame? Written by hand, so that nothing here trusts the crate under test.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]
use super::*;
use crate::connection::{HttpConnection, Protocols};
use crate::testing::{Event, Recorder};
use crate::Sink;

const DATA: u8 = 0;
const HEADERS: u8 = 1;
const RST_STREAM: u8 = 3;
const SETTINGS: u8 = 4;
const PING: u8 = 6;
const GOAWAY_FRAME: u8 = 7;
const WINDOW_UPDATE: u8 = 8;
const END_STREAM: u8 = 1;
const END_HEADERS: u8 = 4;
/// `:status: 200` of HPACK's static table.
const OK: &[u8] = &[0x88];

#[derive(Clone, Debug, PartialEq, Eq)]
enum Told {
    Event(u32, Event),
    Writable(u32),
    Reset(u32, ErrorKind),
}

#[derive(Default)]
struct Streams {
    stream: u32,
    told: Vec<Told>,
}

impl Streams {
    fn note(&mut self, with: impl FnOnce(&mut Recorder)) {
        let mut one = Recorder::default();
        with(&mut one);
        self.told.extend(one.0.into_iter().map(|event| Told::Event(self.stream, event)));
    }
}

impl Sink for Streams {
    fn opened(&mut self) {
        self.note(Sink::opened);
    }

    fn head<'a>(
        &mut self,
        status: u16,
        minor: u8,
        reason: &'a [u8],
        fields: impl ExactSizeIterator<Item = (&'a [u8], &'a [u8])>,
    ) {
        self.note(|one| one.head(status, minor, reason, fields));
    }

    fn body(&mut self, bytes: &[u8]) {
        self.note(|one| one.body(bytes));
    }

    fn end<'a>(&mut self, is_reusable: bool, trailers: impl ExactSizeIterator<Item = (&'a [u8], &'a [u8])>) {
        self.note(|one| one.end(is_reusable, trailers));
    }

    fn closed(&mut self) {
        self.note(Sink::closed);
    }

    fn writable(&mut self) {
        self.told.push(Told::Writable(self.stream));
    }
}

impl StreamSink for Streams {
    fn select(&mut self, stream: u32) {
        self.stream = stream;
    }

    fn reset(&mut self, error: &Error) {
        self.told.push(Told::Reset(self.stream, error.kind));
    }
}

fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let mut made = (payload.len() as u32).to_be_bytes()[1..].to_vec();
    made.extend([kind, flags]);
    made.extend(stream.to_be_bytes());
    made.extend(payload);
    made
}

fn frames(mut bytes: &[u8]) -> Vec<(u8, u8, u32, Vec<u8>)> {
    let mut found = Vec::new();
    while !bytes.is_empty() {
        let size = u32::from_be_bytes([0, bytes[0], bytes[1], bytes[2]]) as usize;
        let stream = u32::from_be_bytes([bytes[5], bytes[6], bytes[7], bytes[8]]);
        found.push((bytes[3], bytes[4], stream, bytes[9..9 + size].to_vec()));
        bytes = &bytes[9 + size..];
    }
    found
}

fn said(http: &mut Http2) -> Vec<(u8, u8, u32, Vec<u8>)> {
    let mut out = Vec::new();
    http.take_output(&mut out);
    frames(&out)
}

fn heard(http: &mut Http2, bytes: &[u8]) -> Vec<Told> {
    let mut sink = Streams::default();
    http.receive(bytes, &mut sink);
    sink.told
}

/// After the greetings of both sides.
fn open() -> Http2 {
    let mut http = Http2::new(false).unwrap();
    let mut hello = Vec::new();
    http.take_output(&mut hello);
    assert!(hello.starts_with(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"));
    let kinds: Vec<u8> = frames(&hello[24..]).iter().map(|frame| frame.0).collect();
    assert_eq!(vec![SETTINGS, WINDOW_UPDATE], kinds);
    let greeting = [frame(SETTINGS, 0, 0, &[]), frame(SETTINGS, 1, 0, &[])].concat();
    assert!(heard(&mut http, &greeting).is_empty() && http.is_greeted());
    assert_eq!(vec![(SETTINGS, 1, 0, vec![])], said(&mut http));
    http
}

fn ask(http: &mut Http2, is_streaming: bool) -> u32 {
    let fields: &[(&[u8], &[u8])] = &[(b"host", b"h")];
    let request = Request { method: "POST", target: "/", fields, body: b"", is_streaming };
    http.send(&request, false).unwrap()
}

fn head(minor_fields: &[(&str, &str)]) -> Event {
    let fields = minor_fields.iter().map(|(name, value)| (name.as_bytes().to_vec(), value.as_bytes().to_vec()));
    Event::Head { status: 200, minor: stream::MINOR, reason: String::new(), fields: fields.collect() }
}

fn end() -> Event {
    Event::End { is_reusable: true, trailers: vec![] }
}

#[test]
fn exchange_goes_and_comes_frame_by_frame() {
    let mut http = open();
    assert_eq!(1, ask(&mut http, false));
    let out = said(&mut http);
    assert_eq!((HEADERS, END_STREAM | END_HEADERS, 1), (out[0].0, out[0].1, out[0].2));
    assert_eq!(vec![Told::Event(1, head(&[]))], heard(&mut http, &frame(HEADERS, END_HEADERS, 1, OK)));
    let bytes = frame(DATA, 0, 1, b"ab");
    // However it is cut.
    assert!(heard(&mut http, &bytes[..5]).is_empty());
    assert_eq!(vec![Told::Event(1, Event::Body(b"ab".to_vec()))], heard(&mut http, &bytes[5..]));
    assert_eq!(vec![Told::Event(1, end())], heard(&mut http, &frame(DATA, END_STREAM, 1, b"")));
    assert_eq!((0, MAX_STREAMS), (http.streams(), http.streams_left()));
}

#[test]
fn a_whole_body_of_announced_length_goes_out() {
    let mut http = open();
    let fields: &[(&[u8], &[u8])] = &[(b"host", b"h"), (b"content-length", b"3")];
    http.send(&Request { method: "POST", target: "/", fields, body: b"abc", is_streaming: false }, false).unwrap();
    let out = said(&mut http);
    assert_eq!((DATA, END_STREAM, 1, b"abc".to_vec()), out[1]);
}

#[test]
fn padding_costs_no_window_and_is_no_body() {
    let mut http = open();
    ask(&mut http, false);
    heard(&mut http, &frame(HEADERS, END_HEADERS, 1, OK));
    let padded = frame(DATA, 8, 1, &[&[200u8][..], b"x", &[0; 200]].concat());
    let mut body = 0;
    // Without giving it back, the padding alone would use up the window.
    for _ in 0..2 * STREAM_WINDOW as usize / padded.len() {
        for told in heard(&mut http, &padded) {
            assert_eq!(Told::Event(1, Event::Body(b"x".to_vec())), told);
            body += 1;
        }
        http.consume(1, 1);
    }
    assert_eq!(2 * STREAM_WINDOW as usize / padded.len(), body);
    assert!(!http.is_over());
}

#[test]
fn body_waits_for_the_window_and_goes_on_by_itself() {
    let mut http = open();
    let id = ask(&mut http, true);
    said(&mut http);
    let body: Vec<u8> = (0..100_000u32).map(|n| n as u8).collect();
    http.send_body(id, &body, true).unwrap();
    assert!(http.is_blocked(id));
    let mut sent: Vec<u8> = said(&mut http).into_iter().flat_map(|frame| frame.3).collect();
    assert_eq!(65_535, sent.len());
    let update = |stream| frame(WINDOW_UPDATE, 0, stream, &60_000u32.to_be_bytes());
    assert!(heard(&mut http, &update(0)).is_empty());
    assert_eq!(vec![Told::Writable(id)], heard(&mut http, &update(id)));
    let rest = said(&mut http);
    assert_eq!(Some(END_STREAM), rest.last().map(|frame| frame.1));
    sent.extend(rest.into_iter().flat_map(|frame| frame.3));
    assert_eq!((body, false), (sent, http.is_blocked(id)));
}

#[test]
fn smaller_initial_window_takes_back_what_was_promised() {
    let mut http = open();
    let id = ask(&mut http, true);
    heard(&mut http, &frame(SETTINGS, 0, 0, &[0, 4, 0, 0, 0, 10]));
    said(&mut http);
    http.send_body(id, &[7; 20], true).unwrap();
    assert_eq!(vec![(DATA, 0, id, vec![7; 10])], said(&mut http));
    assert!(http.is_blocked(id));
}

#[test]
fn window_is_given_back_when_the_body_is_consumed() {
    let mut http = open();
    ask(&mut http, false);
    heard(&mut http, &frame(HEADERS, END_HEADERS, 1, OK));
    for _ in 0..STREAM_WINDOW / 16_384 {
        heard(&mut http, &frame(DATA, 0, 1, &[0; 16_384]));
    }
    said(&mut http);
    // More than it is allowed ends the stream, not the connection.
    http.consume(1, STREAM_WINDOW as usize / 2);
    assert_eq!(vec![(WINDOW_UPDATE, 0, 1, (STREAM_WINDOW / 2).to_be_bytes().to_vec())], said(&mut http));
    // What was not received can't be consumed.
    http.consume(1, usize::MAX);
    http.consume(99, 1);
    let size: u32 = said(&mut http).iter().map(|frame| u32::from_be_bytes(frame.3[..].try_into().unwrap())).sum();
    assert_eq!(STREAM_WINDOW / 2, size);
}

#[test]
fn sender_that_ignores_the_window_is_cut_off() {
    let mut http = open();
    ask(&mut http, false);
    heard(&mut http, &frame(HEADERS, END_HEADERS, 1, OK));
    let mut told = Vec::new();
    for _ in 0..=STREAM_WINDOW / 16_384 {
        told.extend(heard(&mut http, &frame(DATA, 0, 1, &[0; 16_384])));
    }
    assert_eq!(Some(&Told::Reset(1, ErrorKind::Protocol)), told.last());
    assert_eq!(Some(RST_STREAM), said(&mut http).last().map(|frame| frame.0));
    assert!(!http.is_over());
}

#[test]
fn goaway_splits_the_streams_at_its_last_id() {
    let mut http = open();
    let ids: Vec<u32> = (0..3).map(|_| ask(&mut http, false)).collect();
    let goaway = frame(GOAWAY_FRAME, 0, 0, &[0, 0, 0, 3, 0, 0, 0, 0]);
    let told = heard(&mut http, &goaway);
    assert_eq!(vec![Told::Reset(ids[2], ErrorKind::Unprocessed), Told::Event(0, Event::Closed)], told);
    assert_eq!((2, 0), (http.streams(), http.streams_left()));
    for id in &ids[..2] {
        assert!(!http.is_over());
        heard(&mut http, &frame(HEADERS, END_HEADERS | END_STREAM, *id, OK));
    }
    assert!(http.is_over());
}

#[test]
fn goaway_for_a_fault_is_told_only_to_streams_that_it_hits() {
    let mut http = open();
    let id = ask(&mut http, false);
    heard(&mut http, &frame(GOAWAY_FRAME, 0, 0, &[0, 0, 0, 1, 0, 0, 0, 11]));
    let mut sink = Streams::default();
    http.receive_eof(&mut sink);
    assert_eq!(vec![Told::Reset(id, ErrorKind::Lost)], sink.told);
}

#[test]
fn answer_before_the_end_of_the_request_is_whole() {
    let mut http = open();
    let id = ask(&mut http, true);
    said(&mut http);
    let bytes = [frame(HEADERS, END_HEADERS | END_STREAM, id, OK), frame(RST_STREAM, 0, id, &[0; 4])].concat();
    assert_eq!(vec![Told::Event(id, head(&[])), Told::Event(id, end())], heard(&mut http, &bytes));
    // For nobody any more, and no error.
    http.send_body(id, b"rest", true).unwrap();
    assert!(said(&mut http).is_empty() && http.streams() == 0);
}

#[test]
fn truncated_answer_is_never_a_whole_one() {
    for code in [0u8, 2, 8] {
        let mut http = open();
        let id = ask(&mut http, false);
        let bytes = [frame(HEADERS, END_HEADERS, id, OK), frame(RST_STREAM, 0, id, &[0, 0, 0, code])].concat();
        let told = heard(&mut http, &bytes);
        assert_eq!(Some(&Told::Reset(id, ErrorKind::Lost)), told.last(), "code {code}");
    }
}

#[test]
fn allowance_for_pings_is_earned_by_work() {
    let data = frame(DATA, 0, 1, b"x");
    for (requests, pieces, expected) in [(0, 0, 999), (1, 0, 1009), (2, 0, 1019), (0, 3, 1002), (0, 0, 999)] {
        let mut guard = Guard::default();
        guard.read(&frame(SETTINGS, 0, 0, &[])).unwrap();
        let ping = frame(PING, 0, 0, &[0; 8]);
        (0..999).for_each(|_| guard.read(&ping).unwrap());
        (0..requests).for_each(|_| guard.earn(guard::REQUEST));
        (0..pieces).for_each(|_| guard.read(&data).unwrap());
        // An answer to a ping of ours costs nothing.
        guard.read(&frame(PING, 1, 0, &[0; 8])).unwrap();
        let more = (0..2000).take_while(|_| guard.read(&ping).is_ok()).count();
        assert_eq!(expected, 999 + more, "{requests} requests, {pieces} pieces");
    }
}

#[test]
fn guard_reads_frames_however_they_are_cut() {
    let bytes = [frame(SETTINGS, 0, 0, &[0; 6]), frame(PING, 0, 0, &[0; 8]), frame(DATA, 0, 1, &[0; 300])].concat();
    for size in 1..bytes.len() {
        let mut guard = Guard::default();
        for (number, piece) in bytes.chunks(size).enumerate() {
            guard.read(piece).unwrap();
            assert_eq!((number + 1) * size >= 15, guard.is_greeted(), "size {size}");
        }
        // Nothing is left over: the next frame is read as one.
        assert!(guard.read(&frame(DATA, 0, 1, b"")).is_ok());
    }
}

#[test]
fn prior_knowledge_is_open_when_the_peer_has_greeted() {
    let mut connection = HttpConnection::plain().speaking(Protocols::Http2);
    connection.open().unwrap();
    assert!(connection.output().starts_with(b"PRI") && !connection.is_open());
    connection.clear_output();
    let mut recorder = Recorder::default();
    let greeting = frame(SETTINGS, 0, 0, &[0, 3, 0, 0, 0, 9]);
    connection.receive(&greeting[..12], &mut recorder).unwrap();
    assert!(recorder.0.is_empty() && !connection.is_open());
    connection.receive(&greeting[12..], &mut recorder).unwrap();
    assert_eq!((vec![Event::Opened], true, 9), (recorder.0, connection.is_idle(), connection.streams_left()));
    // Nothing of a request was written, whatever the protocol has said meanwhile.
    assert!(!connection.output().is_empty());
    connection.clear_output();
    assert!(!connection.has_written());
}
