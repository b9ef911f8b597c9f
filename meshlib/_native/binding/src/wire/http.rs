//! How does Python drive the client's side of a connection? `HttpConnection` of `_core.pyi`.
//!
//! Each method takes what the driver has and returns what it must write and what has come. The address is kept only to be named
//! in errors.
use std::os::fd::BorrowedFd;

use mesh_wire::http1::request::Request;
use mesh_wire::{Error, Protocols};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyList, PyTuple};

use super::blocking::{self, Failure, Notes};
use super::events::Collector;
use super::tls::TlsClient;
use super::{chain_of, not_after_of, parse_spiffe_id, raise, with_bytes, HEAVY};

#[pyclass(module = "meshlib._native._core")]
pub struct HttpConnection {
    wire: mesh_wire::HttpConnection,
    address: String,
    /// What a blocking socket would not take yet.
    unsent: Vec<u8>,
}

#[pymethods]
impl HttpConnection {
    #[new]
    #[pyo3(signature = (tls, expected, address, protocols = "http/1.1"))]
    fn new(
        tls: Option<&Bound<'_, TlsClient>>,
        expected: &str,
        address: &str,
        protocols: &str,
    ) -> PyResult<HttpConnection> {
        if !expected.is_empty() {
            parse_spiffe_id(expected)?;
        }
        let protocols = match protocols {
            "http/1.1" => Protocols::Http1,
            "h2" => Protocols::Http2,
            "h2,http/1.1" => Protocols::Either,
            other => {
                let what = format!("{other:?} is no choice of protocols: say http/1.1, h2, or h2,http/1.1");
                return Err(PyValueError::new_err(what));
            }
        };
        let wire = match tls {
            Some(tls) => mesh_wire::HttpConnection::tls(tls.get().wire.clone(), expected, address),
            None => mesh_wire::HttpConnection::plain(),
        };
        Ok(HttpConnection { wire: wire.speaking(protocols), address: address.to_owned(), unsent: Vec::new() })
    }

    fn open<'py>(&mut self, py: Python<'py>) -> PyResult<Bound<'py, PyBytes>> {
        let result = py.detach(|| self.wire.open());
        self.answer(py, result)
    }

    fn send<'py>(
        &mut self,
        py: Python<'py>,
        method: &str,
        target: &str,
        headers: &Bound<'py, PyList>,
        body: Option<&[u8]>,
        streaming: bool,
    ) -> PyResult<Bound<'py, PyBytes>> {
        let pairs = pairs_of(headers)?;
        let fields = fields_of(&pairs)?;
        let body = body.unwrap_or_default();
        let request = Request { method, target, fields: &fields, body, is_streaming: streaming };
        let rest = self.wire.send(&request);
        self.sealed(py, rest)
    }

    fn send_body<'py>(
        &mut self,
        py: Python<'py>,
        data: &Bound<'py, PyAny>,
        is_last: bool,
    ) -> PyResult<Bound<'py, PyBytes>> {
        let result = with_bytes(data, usize::MAX, |bytes| self.wire.send_body(bytes, is_last))?;
        self.sealed(py, result.map(|()| &[][..]))
    }

    fn receive<'py>(
        &mut self,
        py: Python<'py>,
        buffer: &Bound<'py, PyAny>,
        size: usize,
    ) -> PyResult<(Bound<'py, PyBytes>, Bound<'py, PyList>)> {
        let mut events = Collector::new(py);
        let result = if self.wire.is_heavy(size) {
            with_bytes(buffer, size, |bytes| self.wire.absorb(bytes))?;
            py.detach(|| self.wire.decrypt()).and_then(|()| self.wire.deliver(&mut events))
        } else {
            with_bytes(buffer, size, |bytes| self.wire.receive(bytes, &mut events))?
        };
        Ok((self.answer(py, result)?, events.finish()?))
    }

    /// Writes `data` to a socket that doesn't block, waits, and (if `is_reading`) reads until there is an event: (code, events).
    fn converse<'py>(
        &mut self,
        py: Python<'py>,
        fd: i32,
        data: &[u8],
        seconds: f64,
        is_reading: bool,
    ) -> PyResult<(u8, Bound<'py, PyList>)> {
        let mut notes = Notes::default();
        let socket = borrowed(fd)?;
        self.unsent.extend_from_slice(data);
        let (wire, unsent) = (&mut self.wire, &mut self.unsent);
        let result = py.detach(|| blocking::converse(wire, socket, unsent, seconds, is_reading, &mut notes));
        match result {
            Ok(code) => {
                let mut events = Collector::new(py);
                notes.replay(&mut events);
                Ok((code, events.finish()?))
            }
            Err(Failure::Wire(error)) => Err(self.raised(py, error)),
            Err(Failure::Socket(error)) => Err(std::io::Error::from(error).into()),
        }
    }

    /// Whether nothing has come on a kept-alive socket, nor its end. HTTP/2 takes in what came, and says whether it goes on.
    fn is_quiet(&mut self, fd: i32) -> PyResult<bool> {
        let socket = borrowed(fd)?;
        Ok(blocking::is_usable(&mut self.wire, socket, &mut self.unsent))
    }

    fn receive_eof<'py>(&mut self, py: Python<'py>) -> PyResult<Bound<'py, PyList>> {
        let mut events = Collector::new(py);
        match self.wire.receive_eof(&mut events) {
            Ok(()) => events.finish(),
            Err(error) => Err(self.raised(py, error)),
        }
    }

    fn pending<'py>(&mut self, py: Python<'py>) -> Bound<'py, PyBytes> {
        let bytes = PyBytes::new(py, self.wire.output());
        self.wire.clear_output();
        bytes
    }

    fn close<'py>(&mut self, py: Python<'py>) -> Bound<'py, PyBytes> {
        self.wire.close();
        self.pending(py)
    }

    // --- many exchanges at once, over HTTP/2

    /// Begins an exchange: (stream, bytes to write).
    fn open_stream<'py>(
        &mut self,
        py: Python<'py>,
        method: &str,
        target: &str,
        headers: &Bound<'py, PyList>,
        body: Option<&[u8]>,
        streaming: bool,
    ) -> PyResult<(u32, Bound<'py, PyBytes>)> {
        let pairs = pairs_of(headers)?;
        let fields = fields_of(&pairs)?;
        let body = body.unwrap_or_default();
        let request = Request { method, target, fields: &fields, body, is_streaming: streaming };
        let stream = self.wire.open_stream(&request).map_err(|error| self.raised(py, error))?;
        Ok((stream, self.sealed(py, Ok(&[]))?))
    }

    fn send_stream<'py>(
        &mut self,
        py: Python<'py>,
        stream: u32,
        data: &Bound<'py, PyAny>,
        is_last: bool,
    ) -> PyResult<Bound<'py, PyBytes>> {
        let result = with_bytes(data, usize::MAX, |bytes| self.wire.send_stream(stream, bytes, is_last))?;
        self.sealed(py, result.map(|()| &[][..]))
    }

    fn reset_stream<'py>(&mut self, py: Python<'py>, stream: u32) -> PyResult<Bound<'py, PyBytes>> {
        let result = self.wire.reset_stream(stream);
        self.sealed(py, result.map(|()| &[][..]))
    }

    fn consume<'py>(&mut self, py: Python<'py>, stream: u32, size: usize) -> PyResult<Bound<'py, PyBytes>> {
        let result = self.wire.consume(stream, size);
        self.sealed(py, result.map(|()| &[][..]))
    }

    fn is_stream_blocked(&self, stream: u32) -> bool {
        self.wire.is_stream_blocked(stream)
    }

    fn receive_streams<'py>(
        &mut self,
        py: Python<'py>,
        buffer: &Bound<'py, PyAny>,
        size: usize,
    ) -> PyResult<(Bound<'py, PyBytes>, Bound<'py, PyList>)> {
        let mut events = Collector::of_streams(py, &self.address);
        let result = if self.wire.is_heavy(size) {
            with_bytes(buffer, size, |bytes| self.wire.absorb(bytes))?;
            py.detach(|| self.wire.decrypt()).and_then(|()| self.wire.receive_streams(&[], &mut events))
        } else {
            with_bytes(buffer, size, |bytes| self.wire.receive_streams(bytes, &mut events))?
        };
        Ok((self.answer(py, result)?, events.finish()?))
    }

    fn receive_streams_eof<'py>(&mut self, py: Python<'py>) -> PyResult<Bound<'py, PyList>> {
        let mut events = Collector::of_streams(py, &self.address);
        match self.wire.receive_streams_eof(&mut events) {
            Ok(()) => events.finish(),
            Err(error) => Err(self.raised(py, error)),
        }
    }

    #[getter]
    fn streams_left(&self) -> usize {
        self.wire.streams_left()
    }

    #[getter]
    fn protocol(&self) -> Option<&'static str> {
        self.wire.protocol()
    }

    #[getter]
    fn is_blocked(&self) -> bool {
        self.wire.is_blocked()
    }

    #[getter]
    fn is_open(&self) -> bool {
        self.wire.is_open()
    }

    #[getter]
    fn is_idle(&self) -> bool {
        self.wire.is_idle()
    }

    #[getter]
    fn has_written(&self) -> bool {
        self.wire.has_written()
    }

    #[getter]
    fn has_received(&self) -> bool {
        self.wire.has_received()
    }

    #[getter]
    fn peer(&self) -> Option<&str> {
        Some(self.wire.session()?.peer()?.id.as_str())
    }

    #[getter]
    fn peer_chain<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyList>> {
        chain_of(py, self.wire.session().filter(|session| session.is_established()).map(|session| session.state()))
    }

    #[getter]
    fn peer_not_after(&self) -> f64 {
        not_after_of(self.wire.session().and_then(|session| session.peer()))
    }

    #[getter]
    fn tls_version(&self) -> Option<&'static str> {
        mesh_wire::tls::version(self.wire.session()?.state())
    }

    #[getter]
    fn tls_resumed(&self) -> bool {
        self.wire.session().is_some_and(|session| mesh_wire::tls::is_resumed(session.state()))
    }
}

fn pairs_of<'py>(headers: &Bound<'py, PyList>) -> PyResult<Vec<Bound<'py, PyTuple>>> {
    headers.iter().map(|pair| Ok(pair.cast_into::<PyTuple>()?)).collect()
}

fn fields_of<'a>(pairs: &'a [Bound<'_, PyTuple>]) -> PyResult<Vec<(&'a [u8], &'a [u8])>> {
    let mut fields = Vec::with_capacity(pairs.len());
    for pair in pairs {
        fields.push(pair.extract()?);
    }
    Ok(fields)
}

fn borrowed<'a>(fd: i32) -> PyResult<BorrowedFd<'a>> {
    if fd < 0 {
        return Err(PyValueError::new_err("the socket is closed"));
    }
    // SAFETY: the descriptor is open, since the driver closes its socket only between two calls, on the thread that calls us.
    Ok(unsafe { BorrowedFd::borrow_raw(fd) })
}

impl HttpConnection {
    /// Encrypts what was sent and `rest` behind it. `rest` belongs to a `bytes`, which can't change while others run.
    fn sealed<'py>(&mut self, py: Python<'py>, rest: mesh_wire::Result<&[u8]>) -> PyResult<Bound<'py, PyBytes>> {
        let result = rest.and_then(|rest| {
            if self.wire.unsealed() + rest.len() > HEAVY {
                py.detach(|| self.wire.seal(rest))
            } else {
                self.wire.seal(rest)
            }
        });
        self.answer(py, result)
    }

    fn answer<'py>(&mut self, py: Python<'py>, result: mesh_wire::Result<()>) -> PyResult<Bound<'py, PyBytes>> {
        match result {
            Ok(()) => Ok(self.pending(py)),
            Err(error) => Err(self.raised(py, error)),
        }
    }

    fn raised(&self, py: Python<'_>, error: Error) -> PyErr {
        raise(py, &self.address, error, self.wire.has_written())
    }
}
