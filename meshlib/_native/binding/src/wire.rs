//! How do Python's bytes reach the wire crate, and its answers Python? Classes of the third group of `_core.pyi`.
//!
//! Methods borrow the object only while Rust runs and return data: the driver writes it, so that a transport that calls back at
//! once finds nothing borrowed. The interpreter is released only for work in bulk, handshakes and large records: for less, giving
//! it away and getting it back costs more than the work.
use mesh_wire::{Error, ErrorKind};
use pyo3::buffer::PyBuffer;
use pyo3::exceptions::{PyBufferError, PyValueError};
use pyo3::import_exception;
use pyo3::prelude::*;
use pyo3::types::{IntoPyDict, PyBytes, PyList, PyMapping};

mod blocking;
mod events;
mod http;
mod tls;

use http::HttpConnection;

import_exception!(meshlib.errors, ConnectionLost);
import_exception!(meshlib.errors, IdentityError);
import_exception!(meshlib.errors, PeerIdentityError);
import_exception!(meshlib.errors, ProtocolError);
import_exception!(meshlib.errors, TlsError);
import_exception!(meshlib.errors, TrustDomainError);

pub fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add("EVENT_OPEN", events::OPEN)?;
    module.add("EVENT_HEAD", events::HEAD)?;
    module.add("EVENT_BODY", events::BODY)?;
    module.add("EVENT_END", events::END)?;
    module.add("EVENT_RESPONSE", events::RESPONSE)?;
    module.add("EVENT_CLOSED", events::CLOSED)?;
    module.add("EVENT_WRITABLE", events::WRITABLE)?;
    module.add("EVENT_RESET", events::RESET)?;
    module.add("CONVERSE_DONE", blocking::DONE)?;
    module.add("CONVERSE_EARLY", blocking::EARLY)?;
    module.add("CONVERSE_LATE", blocking::LATE)?;
    module.add("CONVERSE_CLOSED", blocking::CLOSED)?;
    module.add("CONVERSE_INTERRUPTED", blocking::INTERRUPTED)?;
    module.add_class::<HttpConnection>()?;
    tls::register(module)?;
    module.add_function(wrap_pyfunction!(parse_spiffe_id, module)?)
}

/// Above this many bytes encryption is work in bulk.
pub const HEAVY: usize = 16 * 1024;

#[pyfunction]
pub fn parse_spiffe_id(text: &str) -> PyResult<(&str, &str)> {
    match mesh_wire::spiffe::parse(text) {
        Ok(id) => Ok((id.trust_domain, id.path)),
        Err(why) => Err(PyValueError::new_err(format!(
            "{text:?} is no SPIFFE ID: {why}. One looks like spiffe://shop.internal/ns/default/sa/orders."
        ))),
    }
}

pub fn bundles_of(bundles: &Bound<'_, PyMapping>) -> PyResult<Vec<(String, Vec<u8>)>> {
    bundles.items()?.iter().map(|item| item.extract()).collect()
}

/// The peer's certificates, the leaf first; none as long as it proved nothing.
pub fn chain_of<'py>(py: Python<'py>, state: Option<&mesh_wire::tls::CommonState>) -> PyResult<Bound<'py, PyList>> {
    let chain = state.and_then(|state| state.peer_certificates()).unwrap_or_default();
    PyList::new(py, chain.iter().map(|der| PyBytes::new(py, der)))
}

/// When the peer's proof ends, in Unix seconds; 0.0 if it gave none.
pub fn not_after_of(peer: Option<&mesh_wire::tls::verify::Peer>) -> f64 {
    peer.map_or(0.0, |peer| peer.not_after as f64)
}

/// Runs `with` on the first `size` bytes of any buffer.
pub fn with_bytes<T>(object: &Bound<'_, PyAny>, size: usize, with: impl FnOnce(&[u8]) -> T) -> PyResult<T> {
    if let Ok(bytes) = object.cast_exact::<PyBytes>() {
        let bytes = bytes.as_bytes();
        return Ok(with(bytes.get(..size.min(bytes.len())).unwrap_or_default()));
    }
    let buffer = PyBuffer::<u8>::get(object)?;
    if !buffer.is_c_contiguous() {
        return Err(PyBufferError::new_err("the buffer is not contiguous"));
    }
    let length = buffer.len_bytes().min(size);
    if length == 0 {
        return Ok(with(&[]));
    }
    // SAFETY: the view is contiguous, holds at least `length` bytes, and while it is exported its memory can be neither freed nor
    // resized. Nobody writes to it meanwhile: the interpreter is attached, `with` runs no Python code, and a buffer is filled only
    // by the thread that then calls us (the seam's contract: one thread per connection and per receive buffer).
    let bytes = unsafe { std::slice::from_raw_parts(buffer.buf_ptr().cast::<u8>().cast_const(), length) };
    Ok(with(bytes))
}

/// The exception that says this error. `address` is the context that the wire doesn't know.
pub fn raise(py: Python<'_>, address: &str, error: Error, is_written: bool) -> PyErr {
    let (class, is_attempt) = match error.kind {
        ErrorKind::Misuse => return PyValueError::new_err(format!("{} {}", error.message, error.hint)),
        ErrorKind::Identity => (py.get_type::<IdentityError>(), false),
        ErrorKind::TrustDomain => (py.get_type::<TrustDomainError>(), false),
        ErrorKind::PeerIdentity => (py.get_type::<PeerIdentityError>(), true),
        ErrorKind::Tls => (py.get_type::<TlsError>(), true),
        ErrorKind::Lost | ErrorKind::Stale | ErrorKind::Unprocessed | ErrorKind::Declined => {
            (py.get_type::<ConnectionLost>(), true)
        }
        ErrorKind::Protocol => (py.get_type::<ProtocolError>(), true),
    };
    let message = if address.is_empty() { error.message.into_owned() } else { format!("{address}: {}", error.message) };
    let made = [("hint", error.hint)].into_py_dict(py).and_then(|keywords| {
        if is_attempt {
            keywords.set_item("is_written", is_written)?;
        }
        match error.kind {
            ErrorKind::Stale => keywords.set_item("reason", "send.stale")?,
            ErrorKind::Unprocessed => keywords.set_item("reason", "send.unwritten")?,
            ErrorKind::Declined => keywords.set_item("reason", "send.declined")?,
            _ => {}
        }
        class.call((message,), Some(&keywords))
    });
    match made {
        Ok(value) => PyErr::from_value(value),
        Err(error) => error,
    }
}
