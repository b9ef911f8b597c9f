//! Where a connection came in and who is at its other end: what a server knows of it once and for all of its calls.
use mesh_core::server::Origin;
use pyo3::prelude::*;

use crate::gate::listener;

pub fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_class::<Place>()
}

#[pyclass(frozen, module = "meshlib._native._core")]
pub struct Place {
    peer: String,
    pub is_tls: bool,
    source: String,
    port: u16,
    sni: String,
    is_public: bool,
}

#[pymethods]
impl Place {
    #[new]
    #[pyo3(signature = (peer, is_tls, source, port = 0, sni = "", is_public = false))]
    fn new(peer: &str, is_tls: bool, source: &str, port: u16, sni: &str, is_public: bool) -> Self {
        Self { peer: peer.into(), is_tls, source: source.into(), port, sni: sni.into(), is_public }
    }

    #[getter]
    fn is_public(&self) -> bool {
        self.is_public
    }

    fn __repr__(&self) -> String {
        let listener = if self.is_public { "public" } else { "mesh" };
        format!(
            "<Place {listener} port={} source={:?} peer={:?} tls={}>",
            self.port, self.source, self.peer, self.is_tls
        )
    }
}

impl Place {
    pub fn peer(&self) -> Option<&str> {
        Some(self.peer.as_str()).filter(|peer| !peer.is_empty())
    }

    pub fn origin(&self, wall: f64) -> Origin<'_> {
        Origin { source: &self.source, port: self.port, sni: &self.sni, wall, listener: listener(self.is_public) }
    }
}
