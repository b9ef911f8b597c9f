//! How does the agent's Python drive the data path? `Proxy` of `_core.pyi`.
//!
//! Native threads run from `Proxy()` to its end, and nowhere else in this extension. They never call Python. A forked child has the
//! object but not the threads: there every method raises.
use std::os::fd::{BorrowedFd, FromRawFd as _, OwnedFd, RawFd};
use std::time::Duration;

use mesh_proxy::Material;
use pyo3::exceptions::{PyRuntimeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{IntoPyDict, PyDict, PyList, PyMapping};

use crate::wire::{bundles_of, raise};

pub fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_class::<Proxy>()
}

#[pyclass(frozen, module = "meshlib._native._core")]
struct Proxy {
    /// Given back only in the process that made it.
    inner: Option<mesh_proxy::Proxy>,
    pid: u32,
}

impl Proxy {
    fn here(&self) -> PyResult<&mesh_proxy::Proxy> {
        match &self.inner {
            Some(proxy) if self.pid == std::process::id() => Ok(proxy),
            _ => Err(PyRuntimeError::new_err(
                "This proxy belongs to another process: its threads did not come along with the fork. Make a new Proxy here.",
            )),
        }
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        if self.pid != std::process::id() {
            // The threads and what they hold are the parent's: a lock of theirs may be taken for ever in this copy.
            std::mem::forget(self.inner.take());
        }
    }
}

fn check_fd(fd: RawFd) -> PyResult<()> {
    if fd < 0 {
        return Err(PyValueError::new_err(format!("{fd} is no file descriptor")));
    }
    Ok(())
}

#[pymethods]
impl Proxy {
    #[new]
    #[pyo3(signature = (workers = 1))]
    fn new(workers: usize) -> PyResult<Proxy> {
        if !(1..=64).contains(&workers) {
            return Err(PyValueError::new_err(format!("workers is 1 to 64, not {workers}")));
        }
        Ok(Proxy { inner: Some(mesh_proxy::Proxy::new(workers)?), pid: std::process::id() })
    }

    #[allow(clippy::too_many_arguments)] // as the interface has it
    fn identify(
        &self,
        py: Python<'_>,
        spiffe_id: &str,
        chain: &[u8],
        key: &[u8],
        bundles: &Bound<'_, PyMapping>,
        crls: &Bound<'_, PyMapping>,
        secret: &str,
    ) -> PyResult<()> {
        let proxy = self.here()?;
        if !secret.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            return Err(PyValueError::new_err("the secret of handing over is written in hexadecimal digits"));
        }
        let (bundles, crls) = (bundles_of(bundles)?, bundles_of(crls)?);
        let material = Material { chain, key, bundles: &bundles, crls: &crls, secret };
        py.detach(|| proxy.identify(spiffe_id, &material)).map_err(|error| raise(py, "", error, false))
    }

    fn forget(&self, py: Python<'_>, spiffe_id: &str) -> PyResult<()> {
        let proxy = self.here()?;
        py.detach(|| proxy.forget(spiffe_id));
        Ok(())
    }

    fn readmit(&self, py: Python<'_>, spiffe_id: &str) -> PyResult<()> {
        let proxy = self.here()?;
        py.detach(|| proxy.readmit(spiffe_id));
        Ok(())
    }

    #[pyo3(signature = (fd, *spiffe_ids))]
    fn adopt(&self, py: Python<'_>, fd: RawFd, spiffe_ids: Vec<String>) -> PyResult<()> {
        let proxy = self.here()?;
        check_fd(fd)?;
        // SAFETY: the caller gives the descriptor away, as the stub says; nobody else closes it.
        let socket = unsafe { OwnedFd::from_raw_fd(fd) };
        Ok(py.detach(|| proxy.adopt(socket, &spiffe_ids))?)
    }

    #[pyo3(signature = (name, fd, spiffe_id, to, mode, owners = Vec::new()))]
    #[allow(clippy::too_many_arguments)] // as the interface has it
    fn listen(
        &self,
        py: Python<'_>,
        name: &str,
        fd: RawFd,
        spiffe_id: &str,
        to: &str,
        mode: &str,
        owners: Vec<u32>,
    ) -> PyResult<()> {
        let proxy = self.here()?;
        check_fd(fd)?;
        let is_strict = match mode {
            "enforce" => true,
            "permissive" | "observe" => false,
            _ => return Err(PyValueError::new_err(format!("mode is enforce, permissive or observe, not {mode:?}"))),
        };
        // SAFETY: the descriptor is only looked at during this call, in which the caller keeps it open.
        let socket = unsafe { BorrowedFd::borrow_raw(fd) }.try_clone_to_owned()?;
        Ok(py.detach(|| proxy.listen(name, socket, spiffe_id, to, is_strict, &owners))?)
    }

    fn unlisten(&self, py: Python<'_>, name: &str) -> PyResult<()> {
        let proxy = self.here()?;
        py.detach(|| proxy.unlisten(name));
        Ok(())
    }

    fn stats<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let proxy = self.here()?;
        let stats = py.detach(|| proxy.stats());
        let door = |(plain, failed): (mesh_proxy::Rows, mesh_proxy::Rows)| -> PyResult<Bound<'py, PyDict>> {
            let row = plain.into_py_dict(py)?;
            row.set_item("failed", failed.into_py_dict(py)?)?;
            Ok(row)
        };
        let (inbound, identities) = (PyDict::new(py), PyDict::new(py));
        for (name, rows) in stats.inbound {
            inbound.set_item(name, door(rows)?)?;
        }
        for (id, (generation, sides)) in stats.identities {
            let row = PyDict::new(py);
            row.set_item("generation", generation)?;
            for (side, counts) in sides {
                row.set_item(side, counts.into_py_dict(py)?)?;
            }
            identities.set_item(id, row)?;
        }
        let all = PyDict::new(py);
        all.set_item("outbound", door(stats.outbound)?)?;
        all.set_item("inbound", inbound)?;
        all.set_item("upstream", stats.upstream.into_py_dict(py)?)?;
        all.set_item("identities", identities)?;
        Ok(all)
    }

    fn connections<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyList>> {
        let proxy = self.here()?;
        let rows = py.detach(|| proxy.connections());
        let list = PyList::empty(py);
        for row in rows {
            let dict = PyDict::new(py);
            dict.set_item("direction", row.direction)?;
            dict.set_item("name", row.name)?;
            dict.set_item("owner", row.owner)?;
            dict.set_item("peer", row.peer)?;
            dict.set_item("address", row.address)?;
            dict.set_item("local", row.local)?;
            dict.set_item("protocol", row.protocol)?;
            dict.set_item("age", row.age)?;
            dict.set_item("requests", row.requests)?;
            dict.set_item("not_after", row.not_after as f64)?;
            dict.set_item("received", row.received)?;
            dict.set_item("written", row.written)?;
            list.append(dict)?;
        }
        Ok(list)
    }

    fn drain(&self, py: Python<'_>) -> PyResult<()> {
        let proxy = self.here()?;
        py.detach(|| proxy.drain());
        Ok(())
    }

    fn stop(&self, py: Python<'_>, seconds: f64) -> PyResult<bool> {
        let proxy = self.here()?;
        let patience = Duration::try_from_secs_f64(seconds.max(0.0))
            .map_err(|_| PyValueError::new_err(format!("{seconds} is no number of seconds")))?;
        Ok(py.detach(|| proxy.stop(patience)))
    }
}
