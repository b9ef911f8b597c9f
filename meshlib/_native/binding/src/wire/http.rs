//! How does Python drive the client's side of a connection? `HttpConnection` of `_core.pyi`.
//!
//! Each method takes what the driver has and returns what it must write and what has come. The address is kept only to be named
//! in errors.
use mesh_wire::http1::request::Request;
use mesh_wire::Error;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyList, PyTuple};

use super::events::Collector;
use super::tls::TlsClient;
use super::{chain_of, not_after_of, parse_spiffe_id, raise, with_bytes, HEAVY};

#[pyclass(module = "meshlib._native._core")]
pub struct HttpConnection {
    wire: mesh_wire::HttpConnection,
    address: String,
}

#[pymethods]
impl HttpConnection {
    #[new]
    fn new(tls: Option<&Bound<'_, TlsClient>>, expected: &str, address: &str) -> PyResult<HttpConnection> {
        if !expected.is_empty() {
            parse_spiffe_id(expected)?;
        }
        let wire = match tls {
            Some(tls) => mesh_wire::HttpConnection::tls(tls.get().wire.clone(), expected, address),
            None => mesh_wire::HttpConnection::plain(),
        };
        Ok(HttpConnection { wire, address: address.to_owned() })
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
        let pairs = headers.iter().map(|pair| Ok(pair.cast_into::<PyTuple>()?)).collect::<PyResult<Vec<_>>>()?;
        let mut fields = Vec::with_capacity(pairs.len());
        for pair in &pairs {
            let (name, value): (&[u8], &[u8]) = pair.extract()?;
            fields.push((name, value));
        }
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
