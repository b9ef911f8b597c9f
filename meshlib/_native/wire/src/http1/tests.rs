#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]
use super::request::Request;
use super::Http1;
use crate::error::{ErrorKind, Result};
use crate::testing::{Event, Recorder};

const HOST: (&[u8], &[u8]) = (b"host", b"orders");

fn request<'a>(method: &'a str, fields: &'a [(&'a [u8], &'a [u8])], body: &'a [u8], is_streaming: bool) -> Request<'a> {
    Request { method, target: "/items/7", fields, body, is_streaming }
}

fn written(method: &str, fields: &[(&[u8], &[u8])], body: &[u8], is_streaming: bool) -> Result<String> {
    let mut out = Vec::new();
    let rest = Http1::default().send(&request(method, fields, body, is_streaming), &mut out)?;
    out.extend_from_slice(rest);
    Ok(String::from_utf8(out).unwrap())
}

/// A connection on which a request was just sent.
fn asked(method: &str, fields: &[(&[u8], &[u8])]) -> Http1 {
    let mut http = Http1::default();
    http.send(&request(method, fields, b"", false), &mut Vec::new()).unwrap();
    http
}

fn answer_to(method: &str, bytes: &[u8]) -> Result<Recorder> {
    let mut events = Recorder::default();
    asked(method, &[HOST]).receive(bytes, &mut events)?;
    Ok(events)
}

fn refusal_of(bytes: &[u8]) -> String {
    let error = answer_to("GET", bytes).expect_err(&format!("accepted {:?}", String::from_utf8_lossy(bytes)));
    assert_eq!(ErrorKind::Protocol, error.kind);
    error.message.into_owned()
}

// ------------------------------------------------------------------ what we write

#[test]
fn a_request_without_body_is_written_as_it_was_asked() {
    let text = written("GET", &[HOST, (b"Accept", b"*/*")], b"", false).unwrap();
    assert_eq!("GET /items/7 HTTP/1.1\r\nhost: orders\r\nAccept: */*\r\n\r\n", text);
}

#[test]
fn a_body_gets_its_length_and_a_post_without_one_says_zero() {
    assert_eq!(
        "POST /items/7 HTTP/1.1\r\nhost: orders\r\ncontent-length: 12\r\n\r\nhello, world",
        written("POST", &[HOST], b"hello, world", false).unwrap()
    );
    assert_eq!(
        "POST /items/7 HTTP/1.1\r\nhost: orders\r\ncontent-length: 0\r\n\r\n",
        written("POST", &[HOST], b"", false).unwrap()
    );
}

#[test]
fn a_large_body_is_left_to_the_caller_whatever_its_framing() {
    let body = "x".repeat(16 * 1024);
    let text = written("POST", &[HOST], body.as_bytes(), false).unwrap();
    assert_eq!(format!("POST /items/7 HTTP/1.1\r\nhost: orders\r\ncontent-length: 16384\r\n\r\n{body}"), text);
    let text = written("POST", &[HOST, (b"transfer-encoding", b"chunked")], body.as_bytes(), false).unwrap();
    assert!(text.ends_with(&format!("\r\n\r\n4000\r\n{body}\r\n0\r\n\r\n")));
    let mut out = Vec::new();
    let rest = Http1::default().send(&request("POST", &[HOST], body.as_bytes(), false), &mut out).unwrap();
    assert_eq!((body.len(), true), (rest.len(), out.len() < 100));
}

#[test]
fn a_length_given_by_the_caller_is_kept_and_must_be_true() {
    let text = written("POST", &[HOST, (b"Content-Length", b"2")], b"ok", false).unwrap();
    assert_eq!("POST /items/7 HTTP/1.1\r\nhost: orders\r\nContent-Length: 2\r\n\r\nok", text);
    for length in [&b"1"[..], b"3", b"+2", b"2,2", b"", b"0x2", b"99999999999999999999"] {
        assert!(written("POST", &[HOST, (b"content-length", length)], b"ok", false).is_err(), "{length:?}");
    }
}

#[test]
fn a_streamed_body_is_chunked_and_ends_once() {
    let mut http = Http1::default();
    let mut out = Vec::new();
    http.send(&request("POST", &[HOST], b"", true), &mut out).unwrap();
    http.send_body(b"hello", false, &mut out).unwrap();
    http.send_body(b"", false, &mut out).unwrap();
    http.send_body(&[b'x'; 26], true, &mut out).unwrap();
    assert!(http.send_body(b"more", false, &mut out).is_err());
    let expected = "POST /items/7 HTTP/1.1\r\nhost: orders\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n\
                    1a\r\nxxxxxxxxxxxxxxxxxxxxxxxxxx\r\n0\r\n\r\n";
    assert_eq!(expected, String::from_utf8(out).unwrap());
}

#[test]
fn a_streamed_body_with_a_length_is_counted() {
    let fields: &[(&[u8], &[u8])] = &[HOST, (b"content-length", b"5")];
    let begin = || {
        let mut http = Http1::default();
        http.send(&request("PUT", fields, b"", true), &mut Vec::new()).unwrap();
        http
    };
    let mut out = Vec::new();
    let mut http = begin();
    http.send_body(b"hel", false, &mut out).unwrap();
    http.send_body(b"lo", true, &mut out).unwrap();
    assert_eq!(b"hello", out.as_slice());
    assert!(begin().send_body(b"hello!", false, &mut out).is_err());
    assert!(begin().send_body(b"hell", true, &mut out).is_err());
}

#[test]
fn nothing_that_could_write_a_second_request_gets_into_the_first() {
    type Fields<'a> = &'a [(&'a [u8], &'a [u8])];
    let bad: &[(&str, &str, Fields)] = &[
        ("GET ", "/", &[HOST]),
        ("", "/", &[HOST]),
        ("G\r\nET", "/", &[HOST]),
        ("CONNECT", "orders:80", &[HOST]),
        ("GET", "", &[HOST]),
        ("GET", "/a b", &[HOST]),
        ("GET", "/a\r\nx: y", &[HOST]),
        ("GET", "/\u{e9}", &[HOST]),
        ("GET", "/a\0", &[HOST]),
        ("GET", "/", &[]),
        ("GET", "/", &[HOST, HOST]),
        ("GET", "/", &[HOST, (b"", b"x")]),
        ("GET", "/", &[HOST, (b"x y", b"z")]),
        ("GET", "/", &[HOST, (b"x:", b"z")]),
        ("GET", "/", &[HOST, (b"x\r\ny", b"z")]),
        ("GET", "/", &[HOST, (b"x", b"y\r\nz: w")]),
        ("GET", "/", &[HOST, (b"x", b"y\nz")]),
        ("GET", "/", &[HOST, (b"x", b"y\rz")]),
        ("GET", "/", &[HOST, (b"x", b"y\0")]),
        ("GET", "/", &[HOST, (b"x", b"\x7f")]),
        ("GET", "/", &[HOST, (b"content-length", b"0"), (b"content-length", b"0")]),
        ("GET", "/", &[HOST, (b"content-length", b"0"), (b"transfer-encoding", b"chunked")]),
        ("GET", "/", &[HOST, (b"transfer-encoding", b"gzip, chunked")]),
        ("GET", "/", &[HOST, (b"transfer-encoding", b"chunked"), (b"transfer-encoding", b"chunked")]),
    ];
    for (method, target, fields) in bad {
        let mut http = Http1::default();
        let mut out = b"before".to_vec();
        let request = Request { method, target, fields, body: b"", is_streaming: false };
        let error = http.send(&request, &mut out).expect_err(&format!("{method:?} {target:?} {fields:?}"));
        assert_eq!((ErrorKind::Misuse, &b"before"[..], true), (error.kind, out.as_slice(), http.is_idle()));
    }
}

#[test]
fn tabs_and_bytes_above_ascii_may_stand_in_values() {
    let mut out = Vec::new();
    Http1::default().send(&request("GET", &[HOST, (b"x", b"a\tb \xe9")], b"", false), &mut out).unwrap();
    assert!(out.ends_with(b"x: a\tb \xe9\r\n\r\n"));
}

#[test]
fn a_second_request_waits_for_the_first_answer() {
    let mut http = asked("GET", &[HOST]);
    assert!(http.send(&request("GET", &[HOST], b"", false), &mut Vec::new()).is_err());
    http.receive(b"HTTP/1.1 204 No Content\r\n\r\n", &mut Recorder::default()).unwrap();
    assert!(http.send(&request("GET", &[HOST], b"", false), &mut Vec::new()).is_ok());
}

// ------------------------------------------------------------------ what we read

const ANSWERS: &[(&str, &[u8])] = &[
    ("GET", b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nServer: x\r\n\r\nhello"),
    ("GET", b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n"),
    ("GET", b"HTTP/1.1 204 No Content\r\n\r\n"),
    ("GET", b"HTTP/1.1 304 Not Modified\r\ncontent-length: 99\r\n\r\n"),
    ("HEAD", b"HTTP/1.1 200 OK\r\ncontent-length: 99\r\n\r\n"),
    ("HEAD", b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"),
    ("GET", b"HTTP/1.1 200 OK\r\ntransfer-encoding: Chunked\r\n\r\n5\r\nhello\r\n00A;x=\"y\"\r\n0123456789\r\n0\r\n\r\n"),
    ("GET", b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n1\r\na\r\n0\r\nchecksum: 1\r\nx: \r\n\r\n"),
    ("GET", b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n"),
    ("GET", b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\nHTTP/1.1 200 OK\r\ncontent-length: 1\r\n\r\nx"),
    ("GET", b"HTTP/1.0 200 OK\r\nconnection: keep-alive\r\ncontent-length: 2\r\n\r\nok"),
    ("GET", b"HTTP/1.0 200 OK\r\ncontent-length: 2\r\n\r\nok"),
    ("GET", b"HTTP/1.1 200 OK\r\nconnection: x, Close\r\ncontent-length: 2\r\n\r\nok"),
    ("GET", b"HTTP/1.1 200\r\ncontent-length: 2\r\n\r\nok"),
    ("GET", b"HTTP/1.1 200 \r\ncontent-length: 2\r\n\r\nok"),
    ("GET", b"HTTP/1.1 500 Internal Server Error\r\nx:y\r\nz: \t w \r\n\r\nuntil the end"),
];

#[test]
fn an_answer_means_the_same_wherever_it_is_cut() {
    for (method, bytes) in ANSWERS {
        let whole = answer_to(method, bytes).unwrap();
        for cut in 0..=bytes.len() {
            let mut http = asked(method, &[HOST]);
            let mut events = Recorder::default();
            http.receive(&bytes[..cut], &mut events).unwrap();
            http.receive(&bytes[cut..], &mut events).unwrap();
            assert_eq!(whole, events, "cut at {cut} of {:?}", String::from_utf8_lossy(bytes));
        }
        let mut http = asked(method, &[HOST]);
        let mut events = Recorder::default();
        for byte in *bytes {
            http.receive(&[*byte], &mut events).unwrap();
        }
        assert_eq!(whole, events, "byte by byte: {:?}", String::from_utf8_lossy(bytes));
    }
}

#[test]
fn a_refused_answer_is_refused_wherever_it_is_cut() {
    for bytes in REFUSED {
        let mut last = None;
        for cut in 0..=bytes.len() {
            let mut http = asked("GET", &[HOST]);
            let mut events = Recorder::default();
            let result =
                http.receive(&bytes[..cut], &mut events).and_then(|()| http.receive(&bytes[cut..], &mut events));
            assert!(result.is_err(), "cut at {cut} of {:?}", String::from_utf8_lossy(bytes));
            assert!(http.is_over());
            last = Some(result);
        }
        assert!(last.is_some());
    }
}

#[test]
fn lengths_chunks_and_trailers_are_understood() {
    let bodies: Vec<(Vec<u8>, Option<bool>)> = ANSWERS
        .iter()
        .map(|(method, bytes)| answer_to(method, bytes).map(|events| (events.body(), events.is_reusable())).unwrap())
        .collect();
    let expected: Vec<(Vec<u8>, Option<bool>)> = [
        ("hello", Some(true)),
        ("", Some(true)),
        ("", Some(true)),
        ("", Some(true)),
        ("", Some(true)),
        ("", Some(true)),
        ("hello0123456789", Some(true)),
        ("a", Some(true)),
        ("", Some(true)),
        ("x", Some(true)),
        ("ok", Some(true)),
        ("ok", Some(false)),
        ("ok", Some(false)),
        ("ok", Some(true)),
        ("ok", Some(true)),
        ("until the end", None),
    ]
    .map(|(body, reusable)| (body.as_bytes().to_vec(), reusable))
    .to_vec();
    assert_eq!(expected, bodies);

    let trailers = vec![(b"checksum".to_vec(), b"1".to_vec()), (b"x".to_vec(), b"".to_vec())];
    let events = answer_to("GET", ANSWERS[7].1).unwrap();
    assert_eq!(Some(&Event::End { is_reusable: true, trailers }), events.0.last());
}

/// Each of them is one message to one parser and another (or two) to another parser, or a flood.
const REFUSED: &[&[u8]] = &[
    b"HTTP/1.1 200 OK\r\ncontent-length: 6\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\nG",
    b"HTTP/1.1 200 OK\r\ncontent-length: 1\r\ncontent-length: 1\r\n\r\na",
    b"HTTP/1.1 200 OK\r\ncontent-length: 1\r\nContent-Length: 2\r\n\r\nab",
    b"HTTP/1.1 200 OK\r\ncontent-length: +1\r\n\r\na",
    b"HTTP/1.1 200 OK\r\ncontent-length: -1\r\n\r\na",
    b"HTTP/1.1 200 OK\r\ncontent-length: 1, 1\r\n\r\na",
    b"HTTP/1.1 200 OK\r\ncontent-length: 0x1\r\n\r\na",
    b"HTTP/1.1 200 OK\r\ncontent-length: 1 1\r\n\r\na",
    b"HTTP/1.1 200 OK\r\ncontent-length:\r\n\r\na",
    b"HTTP/1.1 200 OK\r\ncontent-length: 18446744073709551617\r\n\r\na",
    b"HTTP/1.1 200 OK\r\ntransfer-encoding: \x0bchunked\r\n\r\n0\r\n\r\n",
    b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked, chunked\r\n\r\n0\r\n\r\n",
    b"HTTP/1.1 200 OK\r\ntransfer-encoding: identity, chunked\r\n\r\n0\r\n\r\n",
    b"HTTP/1.1 200 OK\r\ntransfer-encoding: gzip\r\n\r\n0\r\n\r\n",
    b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
    b"HTTP/1.0 200 OK\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
    b"HTTP/1.1 200 OK\ncontent-length: 1\r\n\r\na",
    b"HTTP/1.1 200 OK\r\ncontent-length: 1\n\r\na",
    b"HTTP/1.1 200 OK\r\ncontent-length: 1\r\n\na",
    b"HTTP/1.1 200 OK\r\nx: y\r\n folded\r\ncontent-length: 1\r\n\r\na",
    b"HTTP/1.1 200 OK\r\nx: y\r\n\tfolded\r\n\r\na",
    b"HTTP/1.1 200 OK\r\n x: y\r\n\r\na",
    b"HTTP/1.1 200 OK\r\nx : y\r\n\r\na",
    b"HTTP/1.1 200 OK\r\nx\r\n\r\na",
    b"HTTP/1.1 200 OK\r\n: y\r\n\r\na",
    b"HTTP/1.1 200 OK\r\nx: a\0b\r\n\r\na",
    b"HTTP/1.1 200 OK\r\nx: a\rb\r\n\r\na",
    b"\r\nHTTP/1.1 200 OK\r\ncontent-length: 1\r\n\r\na",
    b"HTTP/2.0 200 OK\r\n\r\n",
    b"HTTP/1.1  200 OK\r\n\r\n",
    b"HTTP/1.1 2000 OK\r\n\r\n",
    b"HTTP/1.1 099 OK\r\n\r\n",
    b"HTTP/1.1 20 OK\r\n\r\n",
    b"hTTP/1.1 200 OK\r\n\r\n",
    b"\x15\x03\x01\x00\x02\x02\x28",
    b"HTTP/1.1 101 Switching Protocols\r\nupgrade: x\r\n\r\n",
    b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n1\r\nAXX0\r\n\r\n",
    b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n1\r\nA\n0\r\n\r\n",
    b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n1\nA\r\n0\r\n\r\n",
    b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n0x1\r\nA\r\n0\r\n\r\n",
    b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n+1\r\nA\r\n0\r\n\r\n",
    b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n-1\r\nA\r\n0\r\n\r\n",
    b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n 1\r\nA\r\n0\r\n\r\n",
    b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n1 \r\nA\r\n0\r\n\r\n",
    b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n\r\nA\r\n0\r\n\r\n",
    b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n;x\r\nA\r\n0\r\n\r\n",
    b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n1;\nA\r\n0\r\n\r\n",
    b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n1;a\rb\r\nA\r\n0\r\n\r\n",
    b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n10000000000000000\r\nA\r\n0\r\n\r\n",
    b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n00000000000000001\r\nA\r\n0\r\n\r\n",
    b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n0\r\nx: y\n\r\n",
    b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n0\r\n x: y\r\n\r\n",
    b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n0\r\nx y\r\n\r\n",
];

#[test]
fn a_speaker_of_tls_is_recognised() {
    assert!(refusal_of(b"\x15\x03\x01\x00\x02\x02\x28").contains("TLS"));
}

#[test]
fn a_head_has_at_most_100_fields_and_60_kib() {
    let with = |count: usize| format!("HTTP/1.1 200 OK\r\n{}\r\n", "x: y\r\n".repeat(count));
    assert!(answer_to("HEAD", with(100).as_bytes()).is_ok());
    assert!(refusal_of(with(101).as_bytes()).contains("100"));

    let long = |length: usize| format!("HTTP/1.1 200 OK\r\nx: {}\r\n\r\n", "v".repeat(length - 24));
    for length in [60 * 1024, 60 * 1024 + 1] {
        let (bytes, is_fine) = (long(length), length == 60 * 1024);
        assert_eq!(length, bytes.len());
        assert_eq!(is_fine, answer_to("HEAD", bytes.as_bytes()).is_ok());
        let mut http = asked("HEAD", &[HOST]);
        let mut events = Recorder::default();
        let result = bytes.as_bytes().chunks(1000).try_for_each(|piece| http.receive(piece, &mut events));
        assert_eq!(is_fine, result.is_ok());
    }
}

#[test]
fn trailers_have_the_same_caps_as_heads() {
    let with = |trailers: &str| format!("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n0\r\n{trailers}\r\n");
    assert!(answer_to("GET", with(&"x: y\r\n".repeat(100)).as_bytes()).is_ok());
    assert!(answer_to("GET", with(&"x: y\r\n".repeat(101)).as_bytes()).is_err());
    assert!(answer_to("GET", with(&format!("x: {}\r\n", "v".repeat(61 * 1024))).as_bytes()).is_err());
}

#[test]
fn chunk_extensions_are_counted_over_the_whole_body() {
    let chunk = format!("1;{}\r\na\r\n", "e".repeat(1000));
    let head = "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n";
    assert!(answer_to("GET", format!("{head}{}0\r\n\r\n", chunk.repeat(16)).as_bytes()).is_ok());
    assert!(answer_to("GET", format!("{head}{}0\r\n\r\n", chunk.repeat(17)).as_bytes()).is_err());
}

#[test]
fn interim_answers_are_skipped_but_not_without_end() {
    let interim = "HTTP/1.1 102 Processing\r\n\r\n";
    let last = "HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n";
    assert_eq!(Some(200), answer_to("GET", format!("{}{last}", interim.repeat(16)).as_bytes()).unwrap().status());
    assert!(answer_to("GET", format!("{}{last}", interim.repeat(17)).as_bytes()).is_err());
}

// ------------------------------------------------------------------ which connection may be used again

#[test]
fn bytes_that_nobody_asked_for_end_the_connection() {
    let mut http = Http1::default();
    let mut events = Recorder::default();
    http.receive(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n", &mut events).unwrap();
    assert_eq!((vec![Event::Closed], true), (events.0, http.is_over()));

    let mut http = asked("GET", &[HOST]);
    let mut events = Recorder::default();
    http.receive(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nokHTTP/1.1 200 OK\r\n\r\n", &mut events).unwrap();
    assert_eq!((Some(false), b"ok".to_vec(), true), (events.is_reusable(), events.body(), http.is_over()));
}

#[test]
fn an_answer_before_the_request_is_complete_ends_the_connection() {
    let mut http = Http1::default();
    http.send(&request("POST", &[HOST, (b"expect", b"100-continue")], b"", true), &mut Vec::new()).unwrap();
    let mut events = Recorder::default();
    http.receive(b"HTTP/1.1 417 Expectation Failed\r\ncontent-length: 0\r\n\r\n", &mut events).unwrap();
    assert_eq!((Some(false), true), (events.is_reusable(), http.is_over()));
    let mut out = Vec::new();
    http.send_body(b"what nobody wants", false, &mut out).unwrap();
    http.send_body(b"", true, &mut out).unwrap();
    assert_eq!((true, true), (http.drops_body(), out.is_empty()));
}

#[test]
fn a_request_that_asks_to_close_is_the_last() {
    let mut http = asked("GET", &[HOST, (b"connection", b"Close")]);
    let mut events = Recorder::default();
    http.receive(b"HTTP/1.1 204 No Content\r\n\r\n", &mut events).unwrap();
    assert_eq!(Some(false), events.is_reusable());
}

#[test]
fn an_upgrade_that_was_offered_passes_bytes_both_ways() {
    let mut http = asked("GET", &[HOST, (b"connection", b"Upgrade"), (b"upgrade", b"websocket")]);
    let mut events = Recorder::default();
    http.receive(b"HTTP/1.1 101 Switching Protocols\r\nupgrade: websocket\r\n\r\n\x81\x02hi", &mut events).unwrap();
    http.receive(b"more", &mut events).unwrap();
    let mut out = Vec::new();
    http.send_body(b"\x81\x00", false, &mut out).unwrap();
    assert_eq!((Some(101), b"\x81\x02himore".to_vec(), b"\x81\x00".to_vec()), (events.status(), events.body(), out));
    http.receive_eof(true, &mut events).unwrap();
    assert_eq!(Some(false), events.is_reusable());
}

// ------------------------------------------------------------------ how it can end early

#[test]
fn a_body_without_length_ends_with_the_connection_if_that_is_no_cut() {
    let head = b"HTTP/1.1 200 OK\r\n\r\npart";
    let mut http = asked("GET", &[HOST]);
    let mut events = Recorder::default();
    http.receive(head, &mut events).unwrap();
    http.receive_eof(true, &mut events).unwrap();
    assert_eq!((b"part".to_vec(), Some(false)), (events.body(), events.is_reusable()));

    let mut http = asked("GET", &[HOST]);
    http.receive(head, &mut Recorder::default()).unwrap();
    assert_eq!(ErrorKind::Protocol, http.receive_eof(false, &mut Recorder::default()).unwrap_err().kind);
}

#[test]
fn an_end_before_the_first_byte_is_told_from_one_in_the_middle() {
    let end = |bytes: &[u8]| {
        let mut http = asked("GET", &[HOST]);
        http.receive(bytes, &mut Recorder::default()).unwrap();
        let error = http.receive_eof(true, &mut Recorder::default()).unwrap_err();
        (error.kind, http.has_received(), http.is_over())
    };
    assert_eq!((ErrorKind::Lost, false, true), end(b""));
    for bytes in [
        &b"H"[..],
        b"HTTP/1.1 100 Continue\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\no",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nok\r\n",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n0\r\n",
    ] {
        assert_eq!((ErrorKind::Protocol, true, true), end(bytes));
    }
}

#[test]
fn an_idle_connection_that_ends_is_closed_without_an_error() {
    let mut http = Http1::default();
    let mut events = Recorder::default();
    http.receive_eof(true, &mut events).unwrap();
    http.receive_eof(true, &mut events).unwrap();
    assert_eq!(vec![Event::Closed], events.0);
}

#[test]
fn a_million_tiny_chunks_pass_in_constant_memory() {
    let mut http = asked("GET", &[HOST]);
    struct Count(usize);
    impl crate::sink::Sink for Count {
        fn opened(&mut self) {}
        fn head<'a>(&mut self, _: u16, _: u8, _: &'a [u8], _: impl ExactSizeIterator<Item = (&'a [u8], &'a [u8])>) {}
        fn body(&mut self, bytes: &[u8]) {
            self.0 += bytes.len();
        }
        fn end<'a>(&mut self, _: bool, _: impl ExactSizeIterator<Item = (&'a [u8], &'a [u8])>) {}
        fn closed(&mut self) {}
    }
    let mut count = Count(0);
    http.receive(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n", &mut count).unwrap();
    for _ in 0..1000 {
        http.receive(&b"1\r\na\r\n".repeat(1000), &mut count).unwrap();
    }
    http.receive(b"0\r\n\r\n", &mut count).unwrap();
    assert_eq!((1_000_000, true), (count.0, http.is_idle()));
}
