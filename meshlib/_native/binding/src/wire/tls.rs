//! How does Python hold an identity, and the two sides of a connection? `TlsClient`, `TlsServer`, `TlsConnection` and `TlsTunnel` of
//! `_core.pyi`.
//!
//! The first two are frozen: one object serves all threads and connections of its generation. The clock is the system's; the wire
//! crate has none.
use std::sync::Arc;

use ahash::AHashMap;
use mesh_wire::tls::path::{Roots, Side};
use mesh_wire::tls::verify::Verifier;
use mesh_wire::tls::{provider, refused, unix_time, CertificateDer};
use mesh_wire::SystemTime;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::{IntoPyDict, PyBytes, PyDict, PyList, PyMapping};

use super::{bundles_of, chain_of, not_after_of, raise, with_bytes, HEAVY};

pub fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add("crypto_provider", mesh_wire::tls::crypto::NAME)?;
    module.add_class::<TlsClient>()?;
    module.add_class::<TlsServer>()?;
    module.add_class::<TlsConnection>()?;
    module.add_class::<TlsTunnel>()?;
    module.add_function(wrap_pyfunction!(verify_chain, module)?)?;
    module.add_function(wrap_pyfunction!(verify_path, module)?)
}

/// The bundles and what their CAs have revoked, read.
fn roots_of(
    py: Python<'_>,
    bundles: &Bound<'_, PyMapping>,
    crls: Option<&Bound<'_, PyMapping>>,
) -> PyResult<AHashMap<String, Roots>> {
    let bundles = bundles_of(bundles)?;
    let crls = crls.map(bundles_of).transpose()?.unwrap_or_default();
    mesh_wire::tls::bundles(each(&bundles), each(&crls)).map_err(|error| raise(py, "", error, false))
}

fn each(pems: &[(String, Vec<u8>)]) -> impl Iterator<Item = (&str, &[u8])> {
    pems.iter().map(|(name, pem)| (name.as_str(), pem.as_slice()))
}

fn side_of(side: &str) -> PyResult<Side> {
    match side {
        "servers" => Ok(Side::Servers),
        "clients" => Ok(Side::Clients),
        _ => Err(PyValueError::new_err(format!("side is \"servers\" or \"clients\", not {side:?}"))),
    }
}

/// What a handshake does with a peer's chain, outside of one.
#[pyfunction]
#[pyo3(signature = (chain, bundles, expected, now, side, crls = None))]
fn verify_chain<'py>(
    py: Python<'py>,
    chain: Vec<Vec<u8>>,
    bundles: &Bound<'py, PyMapping>,
    expected: &str,
    now: f64,
    side: &str,
    crls: Option<&Bound<'py, PyMapping>>,
) -> PyResult<Bound<'py, PyDict>> {
    let verifier = Verifier::new(side_of(side)?, roots_of(py, bundles, crls)?, &provider());
    let chain: Vec<CertificateDer<'_>> = chain.into_iter().map(CertificateDer::from).collect();
    let answer = py.detach(|| verifier.verify(&chain.iter().collect::<Vec<_>>(), expected, unix_time(now)));
    let peer = answer.map_err(|refusal| raise(py, "", refused(&refusal), false))?;
    let dict = PyDict::new(py);
    dict.set_item("id", &peer.id)?;
    dict.set_item("not_before", peer.not_before as f64)?;
    dict.set_item("not_after", peer.not_after as f64)?;
    Ok(dict)
}

/// The part of that which finds a path to a root, whoever the leaf is.
#[pyfunction]
fn verify_path(py: Python<'_>, chain: Vec<Vec<u8>>, roots: Vec<Vec<u8>>, now: f64, side: &str) -> PyResult<()> {
    let side = side_of(side)?;
    let [chain, roots] = [chain, roots].map(|ders| ders.into_iter().map(CertificateDer::from).collect::<Vec<_>>());
    let roots = Roots::new(&roots, None).map_err(PyValueError::new_err)?;
    let algorithms = provider().signature_verification_algorithms;
    let answer = py.detach(|| {
        let chain: Vec<_> = chain.iter().collect();
        roots.path(&chain, None, side, unix_time(now), &algorithms)
    });
    answer.map(|_| ()).map_err(|refusal| raise(py, "", refused(&refusal), false))
}

#[pyclass(frozen, module = "meshlib._native._core")]
pub struct TlsClient {
    pub wire: Arc<mesh_wire::TlsClient>,
    #[pyo3(get)]
    generation: u64,
}

#[pymethods]
impl TlsClient {
    #[new]
    #[pyo3(signature = (chain, key, bundles, generation, before = None, crls = None))]
    fn new(
        py: Python<'_>,
        chain: Option<&[u8]>,
        key: Option<&[u8]>,
        bundles: &Bound<'_, PyMapping>,
        generation: u64,
        before: Option<&Bound<'_, TlsClient>>,
        crls: Option<&Bound<'_, PyMapping>>,
    ) -> PyResult<TlsClient> {
        let bundles = roots_of(py, bundles, crls)?;
        let svid = match (chain, key) {
            (Some(chain), Some(key)) => Some((chain, key)),
            (None, None) => None,
            _ => return Err(PyValueError::new_err("chain and key belong together: give both, or neither")),
        };
        let wire = mesh_wire::TlsClient::new(svid, bundles, Arc::new(SystemTime))
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

    #[getter]
    fn crls_until(&self) -> f64 {
        self.wire.lists_until().map_or(f64::INFINITY, |until| until as f64)
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
    #[pyo3(signature = (chain, key, bundles, generation, require_client, alpn = vec![b"http/1.1".to_vec()], before = None, crls = None))]
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
        crls: Option<&Bound<'_, PyMapping>>,
    ) -> PyResult<TlsServer> {
        let bundles = roots_of(py, bundles, crls)?;
        let wire = mesh_wire::TlsServer::new(chain, key, bundles, require_client, alpn, Arc::new(SystemTime))
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

    #[getter]
    fn crls_until(&self) -> f64 {
        self.wire.lists_until().map_or(f64::INFINITY, |until| until as f64)
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

#[pyclass(module = "meshlib._native._core")]
pub struct TlsTunnel {
    wire: mesh_wire::TlsTunnel,
    address: String,
}

#[pymethods]
impl TlsTunnel {
    #[new]
    fn new(py: Python<'_>, tls: &Bound<'_, TlsClient>, expected: &str, address: &str) -> PyResult<TlsTunnel> {
        let wire = mesh_wire::TlsTunnel::new(tls.get().wire.clone(), expected, address)
            .map_err(|error| raise(py, address, error, false))?;
        Ok(TlsTunnel { wire, address: address.to_owned() })
    }

    fn open<'py>(&mut self, py: Python<'py>) -> PyResult<Bound<'py, PyBytes>> {
        py.detach(|| self.wire.decrypt()).map_err(|error| self.raise(py, error))?;
        Ok(self.pending(py))
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
        result.map_err(|error| self.raise(py, error))?;
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
        result.map_err(|error| self.raise(py, error))?;
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
    fn is_handshaking(&self) -> bool {
        self.wire.is_handshaking()
    }

    #[getter]
    fn peer(&self) -> Option<&str> {
        Some(self.wire.peer()?.id.as_str())
    }

    #[getter]
    fn peer_not_after(&self) -> f64 {
        not_after_of(self.wire.peer())
    }

    #[getter]
    fn tls_resumed(&self) -> bool {
        mesh_wire::tls::is_resumed(self.wire.state())
    }
}

impl TlsTunnel {
    /// Whether something was written, the wire doesn't know: HTTP is somebody else's.
    fn raise(&self, py: Python<'_>, error: mesh_wire::Error) -> PyErr {
        raise(py, &self.address, error, !self.wire.is_handshaking())
    }
}
