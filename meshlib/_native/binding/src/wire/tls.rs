//! How does Python hold an identity, and the server's side of a connection? `TlsClient`, `TlsServer`, `TlsConnection` of `_core.pyi`.
//!
//! The first two are frozen: one object serves all threads and connections of its generation. The clock is the system's; the wire
//! crate has none.
use std::sync::Arc;

use mesh_wire::tls::CertificateDer;
use mesh_wire::SystemTime;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::{IntoPyDict, PyBytes, PyDict, PyList, PyMapping};

use super::{bundles_of, chain_of, not_after_of, raise, with_bytes, HEAVY};

#[pyclass(frozen, module = "meshlib._native._core")]
pub struct TlsClient {
    pub wire: Arc<mesh_wire::TlsClient>,
    #[pyo3(get)]
    generation: u64,
}

#[pymethods]
impl TlsClient {
    #[new]
    #[pyo3(signature = (chain, key, bundles, generation, before = None))]
    fn new(
        py: Python<'_>,
        chain: Option<&[u8]>,
        key: Option<&[u8]>,
        bundles: &Bound<'_, PyMapping>,
        generation: u64,
        before: Option<&Bound<'_, TlsClient>>,
    ) -> PyResult<TlsClient> {
        let bundles = bundles_of(bundles)?;
        let svid = match (chain, key) {
            (Some(chain), Some(key)) => Some((chain, key)),
            (None, None) => None,
            _ => return Err(PyValueError::new_err("chain and key belong together: give both, or neither")),
        };
        let wire = mesh_wire::tls::bundles(bundles.iter().map(|(name, pem)| (name.as_str(), pem.as_slice())))
            .and_then(|bundles| mesh_wire::TlsClient::new(svid, bundles, Arc::new(SystemTime)))
            .map_err(|error| raise(py, "", error, false))?;
        let wire = match before {
            Some(before) => wire.counting_on(&before.get().wire),
            None => wire,
        };
        Ok(TlsClient { wire: Arc::new(wire), generation })
    }

    #[getter]
    fn not_after(&self) -> f64 {
        self.wire.not_after().map_or(f64::INFINITY, |end| end as f64)
    }

    fn stats<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        self.wire.stats().into_py_dict(py)
    }
}

#[pyclass(frozen, module = "meshlib._native._core")]
pub struct TlsServer {
    wire: Arc<mesh_wire::TlsServer>,
    #[pyo3(get)]
    generation: u64,
}

#[pymethods]
impl TlsServer {
    #[new]
    #[pyo3(signature = (chain, key, bundles, generation, require_client, alpn = vec![b"http/1.1".to_vec()], before = None))]
    // One argument for each thing that the other side of the seam decides.
    #[allow(clippy::too_many_arguments)]
    fn new(
        py: Python<'_>,
        chain: &[u8],
        key: &[u8],
        bundles: &Bound<'_, PyMapping>,
        generation: u64,
        require_client: bool,
        alpn: Vec<Vec<u8>>,
        before: Option<&Bound<'_, TlsServer>>,
    ) -> PyResult<TlsServer> {
        let bundles = bundles_of(bundles)?;
        let wire = mesh_wire::tls::bundles(bundles.iter().map(|(name, pem)| (name.as_str(), pem.as_slice())))
            .and_then(|bundles| {
                mesh_wire::TlsServer::new(chain, key, bundles, require_client, alpn, Arc::new(SystemTime))
            })
            .map_err(|error| raise(py, "", error, false))?;
        let wire = match before {
            Some(before) => wire.counting_on(&before.get().wire),
            None => wire,
        };
        Ok(TlsServer { wire: Arc::new(wire), generation })
    }

    fn accepts(&self, py: Python<'_>, chain: Vec<Vec<u8>>) -> bool {
        let chain: Vec<CertificateDer<'_>> = chain.into_iter().map(CertificateDer::from).collect();
        py.detach(|| self.wire.accepts(&chain))
    }

    fn stats<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        self.wire.stats().into_py_dict(py)
    }
}

#[pyclass(module = "meshlib._native._core")]
pub struct TlsConnection {
    wire: mesh_wire::TlsConnection,
    #[pyo3(get)]
    server: Py<TlsServer>,
}

#[pymethods]
impl TlsConnection {
    #[new]
    fn new(py: Python<'_>, tls: &Bound<'_, TlsServer>) -> PyResult<TlsConnection> {
        let wire =
            mesh_wire::TlsConnection::new(tls.get().wire.clone()).map_err(|error| raise(py, "", error, false))?;
        Ok(TlsConnection { wire, server: tls.clone().unbind() })
    }

    fn receive<'py>(
        &mut self,
        py: Python<'py>,
        data: &Bound<'py, PyAny>,
    ) -> PyResult<(Bound<'py, PyBytes>, Bound<'py, PyBytes>, bool)> {
        let size = with_bytes(data, usize::MAX, |bytes| {
            self.wire.absorb(bytes);
            bytes.len()
        })?;
        let is_heavy = self.wire.is_handshaking() || size > HEAVY;
        let result = if is_heavy { py.detach(|| self.wire.decrypt()) } else { self.wire.decrypt() };
        result.map_err(|error| raise(py, "", error, false))?;
        let plain = PyBytes::new(py, self.wire.plain());
        self.wire.clear_plain();
        Ok((plain, self.pending(py), self.wire.is_eof()))
    }

    fn send<'py>(&mut self, py: Python<'py>, data: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyBytes>> {
        let result = match data.cast_exact::<PyBytes>() {
            // Only `bytes` can't change while others run.
            Ok(bytes) if bytes.as_bytes().len() > HEAVY => {
                let bytes = bytes.as_bytes();
                py.detach(|| self.wire.send(bytes))
            }
            _ => with_bytes(data, usize::MAX, |bytes| self.wire.send(bytes))?,
        };
        result.map_err(|error| raise(py, "", error, false))?;
        Ok(self.pending(py))
    }

    fn close<'py>(&mut self, py: Python<'py>) -> Bound<'py, PyBytes> {
        self.wire.close();
        self.pending(py)
    }

    fn pending<'py>(&mut self, py: Python<'py>) -> Bound<'py, PyBytes> {
        let bytes = PyBytes::new(py, self.wire.output());
        self.wire.clear_output();
        bytes
    }

    #[getter]
    fn generation(&self) -> u64 {
        self.server.get().generation
    }

    #[getter]
    fn is_handshaking(&self) -> bool {
        self.wire.is_handshaking()
    }

    #[getter]
    fn peer(&self) -> Option<&str> {
        Some(self.wire.peer()?.id.as_str())
    }

    #[getter]
    fn peer_chain<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyList>> {
        chain_of(py, self.wire.peer().map(|_| self.wire.state()))
    }

    #[getter]
    fn peer_not_after(&self) -> f64 {
        not_after_of(self.wire.peer())
    }

    #[getter]
    fn tls_version(&self) -> Option<&'static str> {
        mesh_wire::tls::version(self.wire.state())
    }

    #[getter]
    fn tls_cipher(&self) -> Option<String> {
        mesh_wire::tls::cipher(self.wire.state())
    }

    #[getter]
    fn tls_resumed(&self) -> bool {
        mesh_wire::tls::is_resumed(self.wire.state())
    }

    #[getter]
    fn alpn<'py>(&self, py: Python<'py>) -> Option<Bound<'py, PyBytes>> {
        Some(PyBytes::new(py, self.wire.state().alpn_protocol()?))
    }

    #[getter]
    fn server_name(&self) -> Option<&str> {
        self.wire.server_name()
    }
}
