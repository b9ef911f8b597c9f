//! Invariant: a request that is written is exactly one request, the one that was asked for; of a refused one not a byte is written.
//!
//! The first byte of the input chooses the kind of body. The rest is cut at each 0xff into method, target, name, value, name, value …
//! and, last, the body. httparse reads it back, strictly.
use mesh_wire::http1::chunked::Decoder;
use mesh_wire::http1::request::Request;
use mesh_wire::http1::Http1;

pub fn check(input: &[u8]) {
    let [kind, rest @ ..] = input else { return };
    let mut parts: Vec<&[u8]> = rest.split(|byte| *byte == 0xff).collect();
    let body = parts.pop().unwrap_or_default();
    let [method, target, fields @ ..] = parts.as_slice() else { return };
    let (Ok(method), Ok(target)) = (std::str::from_utf8(method), std::str::from_utf8(target)) else { return };
    let mut fields: Vec<(&[u8], &[u8])> = fields.chunks_exact(2).map(|pair| (pair[0], pair[1])).collect();
    if kind & 4 == 0 {
        fields.insert(0, (b"host", b"orders"));
    }
    let is_streaming = kind & 1 == 1;
    let first = if is_streaming && kind & 2 == 2 { &body[..body.len() / 2] } else { body };
    let request = Request { method, target, fields: &fields, body: first, is_streaming };

    let (mut http, mut out) = (Http1::default(), b"before".to_vec());
    let Ok(large) = http.send(&request, &mut out) else {
        assert_eq!(out, b"before");
        assert!(http.is_idle());
        return;
    };
    out.extend_from_slice(large);
    if is_streaming {
        let sent =
            http.send_body(&body[first.len()..], false, &mut out).and_then(|()| http.send_body(b"", true, &mut out));
        if sent.is_err() {
            return; // the length that was announced is not the body's
        }
    }
    read_back(&request, &out[6..], body);
}

fn read_back(request: &Request<'_>, out: &[u8], body: &[u8]) {
    let mut fields = [httparse::EMPTY_HEADER; 128];
    let mut seen = httparse::Request::new(&mut fields);
    let end = match seen.parse(out) {
        Ok(httparse::Status::Complete(end)) => end,
        // More fields than it has room for; whether they are too many is the caller's business.
        Err(httparse::Error::TooManyHeaders) => return,
        other => panic!("what was written can't be read: {other:?} {:?}", String::from_utf8_lossy(out)),
    };
    assert_eq!((seen.method, seen.path, seen.version), (Some(request.method), Some(request.target), Some(1)));
    let lines = out[..end].iter().filter(|byte| matches!(byte, b'\r' | b'\n')).count();
    assert_eq!(lines, 2 * (seen.headers.len() + 2), "a line more than fields");

    let is = |name: &str, wanted: &str| name.eq_ignore_ascii_case(wanted);
    let own = seen.headers.iter().skip(request.fields.len()).map(|field| field.name).collect::<Vec<_>>();
    assert!(matches!(own.as_slice(), [] | ["content-length"] | ["transfer-encoding"]), "{own:?}");
    for (field, (name, value)) in seen.headers.iter().zip(request.fields) {
        let trimmed = value.trim_ascii();
        assert_eq!((field.name.as_bytes(), field.value.trim_ascii()), (*name, trimmed));
    }
    assert_eq!(seen.headers.iter().filter(|field| is(field.name, "host")).count(), 1);

    let framing: Vec<_> = seen
        .headers
        .iter()
        .filter(|field| is(field.name, "content-length") || is(field.name, "transfer-encoding"))
        .collect();
    let rest = &out[end..];
    match framing.as_slice() {
        [] => assert!(rest.is_empty() && body.is_empty()),
        [field] if is(field.name, "content-length") => {
            assert_eq!(
                std::str::from_utf8(field.value).ok().and_then(|text| text.trim().parse().ok()),
                Some(body.len())
            );
            assert_eq!(rest, body);
        }
        [_] => {
            let (mut decoder, mut data) = (Decoder::default(), Vec::new());
            let used = decoder.read(rest, |piece| data.extend_from_slice(piece)).expect("chunks of our own");
            assert!(decoder.is_done());
            assert_eq!((used, data.as_slice()), (rest.len(), body));
        }
        _ => panic!("framed twice"),
    }
}
