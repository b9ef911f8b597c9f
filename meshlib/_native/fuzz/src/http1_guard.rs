//! Invariant: bytes that the guard takes are read as the same requests by httparse, which is lenient, and by a reading of the framing
//! that knows nothing of the guard's; and how they are cut makes no difference.
//!
//! The first byte of the input chooses the cuts.
use mesh_wire::http1::guard::Guard;

pub fn check(input: &[u8]) {
    let [seed, bytes @ ..] = input else { return };
    let mut whole = Guard::default();
    let is_taken = whole.read(bytes).is_ok();
    let mut cut = Guard::default();
    let mut rest = bytes;
    let mut is_taken_in_pieces = true;
    let mut size = usize::from(*seed % 7) + 1;
    while !rest.is_empty() && is_taken_in_pieces {
        let (piece, after) = rest.split_at(size.min(rest.len()));
        is_taken_in_pieces = cut.read(piece).is_ok();
        (rest, size) = (after, size * 3 % 11 + 1);
    }
    assert_eq!(is_taken, is_taken_in_pieces);
    if is_taken {
        assert_eq!((whole.is_in_head(), whole.is_offered()), (cut.is_in_head(), cut.is_offered()));
        read_leniently(bytes, whole.is_in_head());
    }
}

/// Walks the requests as a reader would that never refuses, and takes the guard by its word that each has one length.
fn read_leniently(bytes: &[u8], ends_in_head: bool) {
    let mut rest = bytes;
    loop {
        let mut fields = [httparse::EMPTY_HEADER; 256];
        let mut seen = httparse::Request::new(&mut fields);
        let end = match seen.parse(rest) {
            Ok(httparse::Status::Complete(end)) => end,
            Ok(httparse::Status::Partial) => {
                assert_eq!(!rest.is_empty(), ends_in_head, "{:?}", String::from_utf8_lossy(rest));
                return;
            }
            // What no parser reads may be taken by the guard: it is refused behind it.
            Err(_) => return,
        };
        let all = |name: &str| {
            seen.headers
                .iter()
                .filter(|field| field.name.eq_ignore_ascii_case(name))
                .map(|field| field.value)
                .collect::<Vec<_>>()
        };
        let (lengths, codings) = (all("content-length"), all("transfer-encoding"));
        assert!(lengths.len() + codings.len() <= 1, "framed twice");
        assert!(all("host").len() == 1 || (seen.version == Some(0) && all("host").is_empty()));
        rest = &rest[end..];
        if !codings.is_empty() {
            assert_eq!(seen.version, Some(1));
            assert!(codings[0].eq_ignore_ascii_case(b"chunked"), "{:?}", codings[0]);
            match unchunked(rest) {
                Some(used) => rest = &rest[used..],
                None => return,
            }
        } else if let Some(length) = lengths.first() {
            let text = std::str::from_utf8(length).expect("a length of digits");
            assert!(text.bytes().all(|byte| byte.is_ascii_digit()));
            let length: usize = text.parse().unwrap_or(usize::MAX);
            if length >= rest.len() {
                return;
            }
            rest = &rest[length..];
        }
    }
}

/// How many bytes a chunked body has, sizes by httparse; None where it isn't whole.
fn unchunked(bytes: &[u8]) -> Option<usize> {
    let mut used = 0;
    loop {
        let rest = bytes.get(used..)?;
        let (line, size) = match httparse::parse_chunk_size(rest) {
            Ok(httparse::Status::Complete(found)) => found,
            Ok(httparse::Status::Partial) => return None,
            Err(_) => panic!("the guard took a chunk that httparse refuses"),
        };
        used += line;
        if size == 0 {
            let mut fields = [httparse::EMPTY_HEADER; 256];
            return match httparse::parse_headers(bytes.get(used..)?, &mut fields) {
                Ok(httparse::Status::Complete((end, _))) => Some(used + end),
                _ => None,
            };
        }
        let end = used.checked_add(usize::try_from(size).ok()?)?;
        let behind = bytes.get(end..end.checked_add(2)?)?;
        assert_eq!(behind, b"\r\n", "a chunk that doesn't end where it says");
        used = end + 2;
    }
}
