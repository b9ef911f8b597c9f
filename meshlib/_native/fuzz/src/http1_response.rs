//! Invariant: an answer means the same however it is cut, of a wrong one nothing is made, an error ends the connection.
//!
//! The first byte of the input chooses the request, the second the size of the pieces.
use mesh_wire::http1::request::Request;
use mesh_wire::http1::Http1;
use mesh_wire::Sink;

#[derive(Debug, Default, PartialEq)]
struct Record {
    heads: Vec<(u16, u8, Vec<u8>)>,
    body: Vec<u8>,
    ends: Vec<(bool, usize)>,
    closed: usize,
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
        let fields = fields.flat_map(|(name, value)| [name, b":", value, b"\n"].concat()).collect();
        self.heads.push((status, minor, fields));
    }

    fn body(&mut self, bytes: &[u8]) {
        assert!(!bytes.is_empty());
        self.body.extend_from_slice(bytes);
    }

    fn end<'a>(&mut self, is_reusable: bool, trailers: impl ExactSizeIterator<Item = (&'a [u8], &'a [u8])>) {
        self.ends.push((is_reusable, trailers.len()));
    }

    fn closed(&mut self) {
        self.closed += 1;
    }
}

fn read<'a>(method: &str, mut pieces: impl Iterator<Item = &'a [u8]>) -> (bool, Record) {
    let fields: &[(&[u8], &[u8])] = &[(b"host", b"h"), (b"connection", b"upgrade"), (b"upgrade", b"x")];
    let mut http = Http1::default();
    let request = Request { method, target: "/", fields, body: b"", is_streaming: false };
    http.send(&request, &mut Vec::new()).expect("a correct request");
    let mut record = Record::default();
    let is_fine = pieces.all(|piece| http.receive(piece, &mut record).is_ok());
    assert!(is_fine || http.is_over());
    (is_fine, record)
}

pub fn check(input: &[u8]) {
    let [choice, size, bytes @ ..] = input else { return };
    let method = if choice % 2 == 0 { "GET" } else { "HEAD" };
    let (is_fine, whole) = read(method, std::iter::once(bytes));
    let (is_fine_too, cut) = read(method, bytes.chunks(usize::from(*size).max(1)));
    // Bytes after the end are seen in one piece, and come too late in many: then the first answer was taken for reusable.
    if cut.closed > 0 {
        return;
    }
    if is_fine {
        assert!(is_fine_too, "{whole:?} {cut:?}");
        assert_eq!(whole, cut);
    } else if is_fine_too {
        // A head is judged when it is whole: what is wrong with it may still be waiting. But nothing was made of it.
        assert_eq!((&whole.heads, &whole.ends, &whole.body), (&cut.heads, &cut.ends, &cut.body));
    }
}
