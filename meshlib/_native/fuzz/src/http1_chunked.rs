//! Invariant: a chunked body is the same body in any pieces, ends at the same byte, and what we write is read back.
//!
//! The first byte of the input is the size of the pieces.
use mesh_wire::http1::chunked::{write, Decoder};

#[derive(Debug, Default, PartialEq)]
struct Record {
    body: Vec<u8>,
    used: usize,
    is_done: bool,
    is_refused: bool,
    trailers: Option<Vec<(String, Vec<u8>)>>,
}

fn read<'a>(pieces: impl Iterator<Item = &'a [u8]>) -> Record {
    let (mut decoder, mut record) = (Decoder::default(), Record::default());
    for piece in pieces {
        let Ok(used) = decoder.read(piece, |data| record.body.extend_from_slice(data)) else {
            // How far it came before it was refused depends on the pieces, and matters to nobody.
            (record.is_refused, record.used) = (true, 0);
            return record;
        };
        assert!(used <= piece.len());
        assert!(used == piece.len() || decoder.is_done(), "bytes were left without an end");
        record.used += used;
        if decoder.is_done() {
            record.is_done = true;
            break;
        }
    }
    if record.is_done {
        let fields = |fields: &[httparse::Header<'_>]| {
            record.trailers = Some(fields.iter().map(|field| (field.name.to_owned(), field.value.to_vec())).collect());
        };
        record.is_refused = decoder.trailers(fields).is_err();
    }
    record
}

pub fn check(input: &[u8]) {
    let [size, bytes @ ..] = input else { return };
    let size = usize::from(*size).max(1);
    let whole = read(std::iter::once(bytes));
    assert_eq!(whole, read(bytes.chunks(size)));
    assert_eq!(whole, read(bytes.chunks(1)));
    if whole.is_done && !whole.is_refused {
        // Nobody is asked what lies behind the end.
        assert_eq!(whole, read(std::iter::once(&bytes[..whole.used])));
    }

    // Whatever the data, in whatever pieces: written and read, it is the same.
    let mut out = Vec::new();
    bytes.chunks(size).for_each(|piece| write(piece, false, &mut out));
    write(b"", true, &mut out);
    let length = out.len();
    out.extend_from_slice(bytes);
    let again = read(std::iter::once(out.as_slice()));
    assert!(again.is_done && !again.is_refused);
    assert_eq!((again.used, again.body.as_slice(), again.trailers), (length, bytes, Some(Vec::new())));
}
