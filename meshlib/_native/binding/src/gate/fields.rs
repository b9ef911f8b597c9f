//! What does a request say, where it lies? Its target and header fields, out of an ASGI scope, a list of pairs or gRPC's metadata.
use mesh_core::secure::passage::{passage, Passage};
use mesh_core::server::Headers;
use pyo3::exceptions::{PyKeyError, PyTypeError};
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict, PyList, PyString, PyTuple};

/// Where a server of ours puts the whole target, as it came over the wire.
pub const TARGET: &str = "meshlib.target";

pub fn item<'py>(scope: &Bound<'py, PyDict>, key: &Bound<'py, PyString>) -> PyResult<Option<Bound<'py, PyAny>>> {
    scope.get_item(key)
}

pub fn needed<'py>(scope: &Bound<'py, PyDict>, key: &Bound<'py, PyString>) -> PyResult<Bound<'py, PyAny>> {
    item(scope, key)?
        .ok_or_else(|| PyKeyError::new_err(format!("the scope has no {key}: is this a call of an ASGI server?")))
}

/// The target of a scope: as it came, or put together again, which where an escape was lost is the strictest reading.
pub fn target_of<'py>(scope: &Bound<'py, PyDict>) -> PyResult<Bound<'py, PyBytes>> {
    let py = scope.py();
    if let Some(target) = item(scope, intern!(py, TARGET))? {
        return Ok(target.cast_into::<PyBytes>()?);
    }
    let raw = item(scope, intern!(py, "raw_path"))?.filter(|raw| !raw.is_none());
    let raw = raw.map(|raw| raw.cast_into::<PyBytes>()).transpose()?.filter(|raw| !raw.as_bytes().is_empty());
    let query = item(scope, intern!(py, "query_string"))?;
    let query = query.as_ref().and_then(|query| query.cast::<PyBytes>().ok()).map(|query| query.as_bytes());
    let query = query.filter(|query| !query.is_empty());
    let path = match (raw, query) {
        (Some(raw), None) => return Ok(raw),
        (Some(raw), _) => raw.as_bytes().to_vec(),
        (None, _) => {
            let path = needed(scope, intern!(py, "path"))?;
            quoted(path.cast::<PyString>()?.to_string_lossy().as_bytes())
        }
    };
    Ok(match query {
        Some(query) => PyBytes::new(py, &[&path[..], b"?", query].concat()),
        None => PyBytes::new(py, &path),
    })
}

/// A decoded path with escapes for all that could mean something else.
fn quoted(path: &[u8]) -> Vec<u8> {
    const HEX: &[u8; 16] = b"0123456789ABCDEF";
    let mut out = Vec::with_capacity(path.len());
    for byte in path {
        if byte.is_ascii_alphanumeric() || b"_.-~/".contains(byte) {
            out.push(*byte);
        } else {
            let digit = |nibble: u8| HEX.get(usize::from(nibble & 15)).copied().unwrap_or(b'0');
            out.extend([b'%', digit(byte >> 4), digit(*byte)]);
        }
    }
    out
}

/// The fields of a list that get in, as a list of its own; and whether a request id has to be made for it.
#[pyfunction]
pub fn passed<'py>(headers: &Bound<'py, PyAny>) -> PyResult<(Bound<'py, PyList>, bool)> {
    let mut keeper = Keeper::new(headers.py());
    for pair in headers.try_iter()? {
        let pair = pair?;
        with_field(&pair, |name, value| keeper.note(name, value))?;
        keeper.settle(&pair)?;
    }
    let (kept, wants_id, _) = keeper.end();
    Ok((kept, wants_id))
}

/// Reads the fields for the gate and keeps those that get in, in one go.
pub fn read_and_keep<'py>(
    fields: &mut Headers,
    headers: &Bound<'py, PyAny>,
) -> PyResult<(Bound<'py, PyList>, bool, bool)> {
    let mut keeper = Keeper::new(headers.py());
    let mut take = |pair: &Bound<'py, PyAny>| {
        with_field(pair, |name, value| {
            fields.field(name, value);
            keeper.note(name, value);
        })?;
        keeper.settle(pair)
    };
    match headers.cast::<PyList>() {
        Ok(list) => list.iter().try_for_each(|pair| take(&pair))?,
        Err(_) => headers.try_iter()?.try_for_each(|pair| take(&pair?))?,
    }
    Ok(keeper.end())
}

const TRACEPARENT: &[u8] = b"traceparent";

struct Keeper<'py> {
    kept: Bound<'py, PyList>,
    /// What becomes of the field at hand.
    verdict: Passage,
    ids: u32,
    id: Option<Bound<'py, PyAny>>,
    is_traced: bool,
}

impl<'py> Keeper<'py> {
    fn new(py: Python<'py>) -> Self {
        Self { kept: PyList::empty(py), verdict: Passage::Out, ids: 0, id: None, is_traced: false }
    }

    fn note(&mut self, name: &[u8], value: &[u8]) {
        self.verdict = passage(name, value);
        self.is_traced |= name.len() == TRACEPARENT.len() && name.eq_ignore_ascii_case(TRACEPARENT);
    }

    fn settle(&mut self, pair: &Bound<'py, PyAny>) -> PyResult<()> {
        match self.verdict {
            Passage::In => self.kept.append(pair)?,
            Passage::Out => {}
            Passage::Id => {
                self.ids += 1;
                self.id = Some(pair.clone());
            }
            Passage::BadId => self.ids += 2,
        }
        Ok(())
    }

    /// Of two request ids none counts.
    fn end(self) -> (Bound<'py, PyList>, bool, bool) {
        let wants_id = match (self.ids, &self.id) {
            (0, _) => false,
            (1, Some(pair)) => self.kept.append(pair).is_err(),
            _ => true,
        };
        (self.kept, wants_id, self.is_traced)
    }
}

pub fn read_fields(fields: &mut Headers, headers: &Bound<'_, PyAny>) -> PyResult<()> {
    match headers.cast::<PyList>() {
        Ok(list) => list.iter().try_for_each(|pair| read_field(fields, &pair)),
        Err(_) => headers.try_iter()?.try_for_each(|pair| read_field(fields, &pair?)),
    }
}

/// Metadata of gRPC: its values are text, or bytes where the key ends in `-bin`.
/// True if it concerns a trace.
pub fn read_metadatum(fields: &mut Headers, pair: &Bound<'_, PyAny>) -> PyResult<bool> {
    let (name, value) = (pair.get_item(0)?, pair.get_item(1)?);
    let name = name.cast::<PyString>()?.to_str()?;
    match value.cast::<PyString>() {
        Ok(text) => fields.field(name.as_bytes(), text.to_string_lossy().as_bytes()),
        Err(_) => fields.field(name.as_bytes(), value.cast::<PyBytes>()?.as_bytes()),
    }
    Ok(matches!(name, "traceparent" | "tracestate" | "baggage"))
}

fn read_field(fields: &mut Headers, pair: &Bound<'_, PyAny>) -> PyResult<()> {
    with_field(pair, |name, value| fields.field(name, value))
}

/// A pair is a tuple of bytes as a rule; ASGI allows any two-item sequence.
fn with_field(pair: &Bound<'_, PyAny>, take: impl FnOnce(&[u8], &[u8])) -> PyResult<()> {
    if let Ok(pair) = pair.cast::<PyTuple>() {
        if let (Ok(name), Ok(value)) = (pair.get_borrowed_item(0), pair.get_borrowed_item(1)) {
            if let (Ok(name), Ok(value)) = (name.cast::<PyBytes>(), value.cast::<PyBytes>()) {
                take(name.as_bytes(), value.as_bytes());
                return Ok(());
            }
        }
    }
    let wrong = || PyTypeError::new_err("headers are a list of pairs of bytes: [(b\"host\", b\"orders\"), …]");
    let (name, value) = (pair.get_item(0).map_err(|_| wrong())?, pair.get_item(1).map_err(|_| wrong())?);
    let name = name.cast::<PyBytes>().map_err(|_| wrong())?;
    let value = value.cast::<PyBytes>().map_err(|_| wrong())?;
    take(name.as_bytes(), value.as_bytes());
    Ok(())
}
