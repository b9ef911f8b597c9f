//! How do bytes that arrived become Python objects, each made once and none of them twice?
//!
//! The codec calls the `Collector` with slices of the buffer; it makes `bytes` straight from them. A whole answer becomes one
//! tuple, because that is what nearly every call is. For many exchanges at once each event stands beside its stream. Names that every server sends are kept as objects. Small pieces of a body are
//! joined, so that a peer that sends a million one-byte chunks makes us no million objects.
use mesh_wire::{Error, ErrorKind, Sink, StreamSink};
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyBytes, PyList, PyTuple};

use super::raise;

pub const OPEN: u8 = 0;
pub const HEAD: u8 = 1;
pub const BODY: u8 = 2;
pub const END: u8 = 3;
pub const RESPONSE: u8 = 4;
pub const CLOSED: u8 = 5;
pub const WRITABLE: u8 = 6;
pub const RESET: u8 = 7;

/// From this size on a piece of a streamed body is an event of its own.
const LARGE: usize = 4096;

struct Head<'py> {
    status: u16,
    minor: u8,
    reason: Bound<'py, PyBytes>,
    fields: Bound<'py, PyList>,
}

enum Body<'py> {
    None,
    One(Bound<'py, PyBytes>),
    Many(Vec<u8>),
}

pub struct Collector<'py> {
    py: Python<'py>,
    events: Vec<Bound<'py, PyTuple>>,
    head: Option<Head<'py>>,
    body: Body<'py>,
    failure: Option<PyErr>,
    /// Where there are many: the one that events belong to, and the address that errors name.
    stream: Option<(u32, String)>,
}

impl<'py> Collector<'py> {
    pub fn new(py: Python<'py>) -> Self {
        Collector { py, events: Vec::new(), head: None, body: Body::None, failure: None, stream: None }
    }

    /// For many exchanges at once: each event comes as (stream, event).
    pub fn of_streams(py: Python<'py>, address: &str) -> Self {
        Collector { stream: Some((0, address.to_owned())), ..Collector::new(py) }
    }

    /// All events of this call, in order.
    pub fn finish(mut self) -> PyResult<Bound<'py, PyList>> {
        self.flush();
        match self.failure {
            Some(error) => Err(error),
            None => PyList::new(self.py, self.events),
        }
    }

    fn push(&mut self, event: impl IntoPyObject<'py, Target = PyTuple, Output = Bound<'py, PyTuple>, Error = PyErr>) {
        let event = event.into_pyobject(self.py).and_then(|event| match &self.stream {
            None => Ok(event),
            Some((stream, _)) => (*stream, event).into_pyobject(self.py),
        });
        match event {
            Ok(event) => self.events.push(event),
            Err(error) => self.failure = Some(error),
        }
    }

    fn take_body(&mut self) -> Option<Bound<'py, PyBytes>> {
        match std::mem::replace(&mut self.body, Body::None) {
            Body::None => None,
            Body::One(bytes) => Some(bytes),
            Body::Many(bytes) => Some(PyBytes::new(self.py, &bytes)),
        }
    }

    fn flush(&mut self) {
        if let Some(head) = self.head.take() {
            self.push((HEAD, head.status, head.minor, head.reason, head.fields));
        }
        if let Some(body) = self.take_body() {
            self.push((BODY, body));
        }
    }

    fn fields<'a>(
        &mut self,
        fields: impl ExactSizeIterator<Item = (&'a [u8], &'a [u8])>,
    ) -> PyResult<Bound<'py, PyList>> {
        let py = self.py;
        let list = PyList::empty(py);
        for (field, value) in fields {
            list.append((name(py, field), PyBytes::new(py, value)))?;
        }
        Ok(list)
    }
}

impl Sink for Collector<'_> {
    fn opened(&mut self) {
        self.push((OPEN,));
    }

    fn head<'a>(
        &mut self,
        status: u16,
        minor: u8,
        reason: &'a [u8],
        fields: impl ExactSizeIterator<Item = (&'a [u8], &'a [u8])>,
    ) {
        match self.fields(fields) {
            Ok(fields) => {
                let reason = if reason == b"OK" { known(self.py, 0) } else { PyBytes::new(self.py, reason) };
                self.head = Some(Head { status, minor, reason, fields });
            }
            Err(error) => self.failure = Some(error),
        }
    }

    fn body(&mut self, bytes: &[u8]) {
        match &mut self.body {
            Body::None => self.body = Body::One(PyBytes::new(self.py, bytes)),
            Body::One(first) if self.head.is_some() || (first.as_bytes().len() < LARGE && bytes.len() < LARGE) => {
                let first = first.as_bytes();
                let mut joined = Vec::with_capacity((first.len() + bytes.len()) * 2);
                joined.extend_from_slice(first);
                joined.extend_from_slice(bytes);
                self.body = Body::Many(joined);
            }
            Body::Many(joined) if self.head.is_some() || bytes.len() < LARGE => joined.extend_from_slice(bytes),
            Body::One(_) | Body::Many(_) => {
                self.flush();
                self.body = Body::One(PyBytes::new(self.py, bytes));
            }
        }
    }

    fn end<'a>(&mut self, is_reusable: bool, trailers: impl ExactSizeIterator<Item = (&'a [u8], &'a [u8])>) {
        if trailers.len() == 0 {
            if let Some(head) = self.head.take() {
                let body = self.take_body().unwrap_or_else(|| PyBytes::new(self.py, b""));
                self.push((RESPONSE, head.status, head.minor, head.reason, head.fields, body, is_reusable));
                return;
            }
        }
        self.flush();
        match self.fields(trailers) {
            Ok(trailers) => self.push((END, is_reusable, trailers)),
            Err(error) => self.failure = Some(error),
        }
    }

    fn closed(&mut self) {
        self.flush();
        self.push((CLOSED,));
    }

    fn writable(&mut self) {
        self.flush();
        self.push((WRITABLE,));
    }
}

impl StreamSink for Collector<'_> {
    fn select(&mut self, stream: u32) {
        self.flush();
        if let Some((selected, _)) = &mut self.stream {
            *selected = stream;
        }
    }

    fn reset(&mut self, error: &Error) {
        self.flush();
        let address = self.stream.as_ref().map_or("", |(_, address)| address);
        let is_written = !matches!(error.kind, ErrorKind::Unprocessed | ErrorKind::Declined);
        let error = raise(self.py, address, error.clone(), is_written).into_value(self.py);
        self.push((RESET, error));
    }
}

macro_rules! known_words {
    ($($index:literal $word:literal)*) => {
        const WORDS: &[&[u8]] = &[$($word),*];
        fn index_of(word: &[u8]) -> Option<usize> {
            match word { $($word => Some($index),)* _ => None }
        }
    };
}

known_words! {
    0 b"OK" 1 b"content-type" 2 b"content-length" 3 b"date" 4 b"server" 5 b"connection" 6 b"transfer-encoding" 7 b"cache-control"
    8 b"etag" 9 b"last-modified" 10 b"vary" 11 b"location" 12 b"set-cookie" 13 b"keep-alive" 14 b"accept-ranges" 15 b"expires"
    16 b"content-encoding" 17 b"traceparent" 18 b"tracestate" 19 b"x-request-id" 20 b"retry-after" 21 b"age" 22 b"pragma" 23 b"via"
    24 b"access-control-allow-origin" 25 b"strict-transport-security" 26 b"x-content-type-options" 27 b"x-frame-options"
    28 b"content-disposition" 29 b"content-language" 30 b"www-authenticate" 31 b"allow" 32 b"link" 33 b"alt-svc"
    34 b"x-envoy-upstream-service-time" 35 b"server-timing" 36 b"content-security-policy" 37 b"trailer" 38 b"upgrade"
}

fn known(py: Python<'_>, index: usize) -> Bound<'_, PyBytes> {
    static OBJECTS: PyOnceLock<Vec<Py<PyBytes>>> = PyOnceLock::new();
    let objects = OBJECTS.get_or_init(py, || WORDS.iter().map(|word| PyBytes::new(py, word).unbind()).collect());
    match objects.get(index) {
        Some(object) => object.bind(py).clone(),
        None => PyBytes::new(py, b""),
    }
}

/// The name in lower case.
fn name<'py>(py: Python<'py>, field: &[u8]) -> Bound<'py, PyBytes> {
    let mut buffer = [0u8; 48];
    match buffer.get_mut(..field.len()) {
        Some(lower) => {
            lower.copy_from_slice(field);
            lower.make_ascii_lowercase();
            match index_of(lower) {
                Some(index) => known(py, index),
                None => PyBytes::new(py, lower),
            }
        }
        None => PyBytes::new(py, &field.to_ascii_lowercase()),
    }
}
