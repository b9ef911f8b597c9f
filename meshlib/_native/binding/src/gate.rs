//! The inbound way for Python: `Gate`, `Entry`, `canonical_path`. It converts and hands on; mesh-core decides.
//!
//! The header list is looked at where it lies: no copy, no Python code called. Locks of the core are held only under the GIL
//! (a plan is compiled without it and swapped in with it), so that a fork never finds one taken.
use std::time::Duration;

use mesh_core::secure::jwt::KeySet;
use mesh_core::secure::path::profile::{normalized, Normalized};
use mesh_core::server::{
    Arrival, Entry as CoreEntry, Gate as CoreGate, GrpcArrival, Headers, Mode, Origin, Snapshot, Version,
};
use pyo3::exceptions::PyTypeError;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict, PyList, PyString, PyTuple};

pyo3::import_exception!(meshlib.errors, ConfigError);
pyo3::import_exception!(meshlib.errors, Refused);

pub fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_class::<Gate>()?;
    module.add_class::<Entry>()?;
    module.add_function(wrap_pyfunction!(normalized_path, module)?)?;
    module.add_function(wrap_pyfunction!(canonical_path, module)?)
}

#[pyclass(frozen, module = "meshlib._native._core")]
struct Gate(CoreGate);

#[pymethods]
impl Gate {
    #[new]
    fn new() -> Self {
        Self(CoreGate::default())
    }

    #[expect(unused_variables, reason = "the seam says when; the gate has nothing that ages yet")]
    fn publish(&self, py: Python<'_>, plan: &[u8], now: f64) -> PyResult<()> {
        let snapshot = py.detach(|| Snapshot::compile(plan)).map_err(ConfigError::new_err)?;
        self.0.publish(snapshot);
        Ok(())
    }

    /// The keys of a provider of tokens, as a JWKS; None: none of its tokens is believed. Answers why keys in it are left out.
    fn keys(&self, py: Python<'_>, provider: &str, jwks: Option<&[u8]>) -> PyResult<Vec<String>> {
        let Some(jwks) = jwks else {
            self.0.set_keys(provider, None);
            return Ok(Vec::new());
        };
        let (set, ignored) = py.detach(|| KeySet::parse(jwks)).map_err(ConfigError::new_err)?;
        self.0.set_keys(provider, Some(set));
        Ok(ignored)
    }

    #[pyo3(signature = (method, target, headers, peer, is_tls, now, deadline = None, wall = 0.0, source = "", port = 0, sni = "", version = ""))]
    #[expect(clippy::too_many_arguments, reason = "one call across the seam for each request")]
    fn begin(
        &self,
        method: &str,
        target: &[u8],
        headers: &Bound<'_, PyAny>,
        peer: Option<&str>,
        is_tls: bool,
        now: f64,
        deadline: Option<f64>,
        wall: f64,
        source: &str,
        port: u16,
        sni: &str,
        version: &str,
    ) -> PyResult<Entry> {
        let mut fields = self.0.headers(target);
        read_fields(&mut fields, headers)?;
        fields.came_as(Version::named(version));
        let (now, deadline) = (duration(now), deadline.map(duration));
        let origin = Origin { source, port, sni, wall };
        Ok(Entry(self.0.begin(Arrival { method, target, headers: fields, peer, is_tls, now, deadline, origin })))
    }

    #[pyo3(signature = (method, peer, is_tls, now, deadline = None, metadata = None, wall = 0.0, source = "", port = 0))]
    #[expect(clippy::too_many_arguments, reason = "one call across the seam for each request")]
    fn begin_grpc(
        &self,
        method: &str,
        peer: Option<&str>,
        is_tls: bool,
        now: f64,
        deadline: Option<f64>,
        metadata: Option<&Bound<'_, PyAny>>,
        wall: f64,
        source: &str,
        port: u16,
    ) -> PyResult<Entry> {
        let mut fields = self.0.headers(b"/");
        if let Some(metadata) = metadata {
            metadata.try_iter()?.try_for_each(|pair| read_metadatum(&mut fields, &pair?))?;
        }
        let (now, deadline) = (duration(now), deadline.map(duration));
        let origin = Origin { source, port, sni: "", wall };
        Ok(Entry(self.0.begin_grpc(GrpcArrival { method, headers: fields, peer, is_tls, now, deadline, origin })))
    }

    /// The calls that were recorded since the last time, and how many found no place.
    fn traffic<'py>(&self, py: Python<'py>) -> PyResult<(Vec<Bound<'py, PyDict>>, u64)> {
        let (calls, lost) = self.0.drain_traffic();
        let rows = calls.into_iter().map(|(call, count)| {
            let row = PyDict::new(py);
            row.set_item("peer", call.peer)?;
            row.set_item("method", call.method)?;
            row.set_item("path", call.path)?;
            row.set_item("route", call.route)?;
            row.set_item("principal", call.principal)?;
            row.set_item("protocol", if call.is_grpc { "grpc" } else { "http" })?;
            row.set_item("verdict", if call.is_allowed { "allow" } else { "deny" })?;
            row.set_item("count", count)?;
            Ok(row)
        });
        Ok((rows.collect::<PyResult<_>>()?, lost))
    }

    /// Who calls us: a row for each identity, one for all without a certificate, and one for each address without TLS.
    fn edges<'py>(&self, py: Python<'py>) -> PyResult<Vec<Bound<'py, PyDict>>> {
        let mut rows: Vec<Bound<'py, PyDict>> = Vec::new();
        let mut add = |peer: &str, is_tls: bool, address: &str, requests: u64, refused: u64, would_deny: u64| {
            let row = PyDict::new(py);
            row.set_item("peer", peer)?;
            row.set_item("is_tls", is_tls)?;
            row.set_item("address", address)?;
            row.set_item("requests", requests)?;
            row.set_item("refused", refused)?;
            row.set_item("would_deny", would_deny)?;
            rows.push(row);
            PyResult::Ok(())
        };
        for edge in self.0.edges() {
            add(&edge.peer, true, "", edge.requests, edge.refused, edge.would_deny)?;
        }
        match self.0.anonymous_calls() {
            0 => {}
            requests => add("", true, "", requests, 0, 0)?,
        }
        for (address, requests) in self.0.plain_callers() {
            add("", false, &address.map_or(String::new(), |address| address.to_string()), requests, 0, 0)?;
        }
        Ok(rows)
    }

    fn reset(&self) {
        self.0.reset();
    }

    fn stats<'py>(&self, py: Python<'py>) -> PyResult<Vec<Bound<'py, PyDict>>> {
        let service = self.0.service();
        let rows = self.0.readings().into_iter().map(|reading| {
            let row = PyDict::new(py);
            row.set_item("service", &service)?;
            row.set_item("route", reading.route)?;
            row.set_item("method", reading.method)?;
            row.set_item("peer", reading.peer)?;
            row.set_item("requests", reading.requests)?;
            let codes = PyDict::new(py);
            for (code, count) in reading.codes {
                codes.set_item(code.to_string(), count)?;
            }
            row.set_item("codes", codes)?;
            row.set_item("refused", reading.refused)?;
            row.set_item("would_deny", reading.would_deny)?;
            row.set_item("latency_buckets", reading.latency_buckets)?;
            row.set_item("latency_sum", reading.latency_sum)?;
            row.set_item("in_flight", reading.in_flight)?;
            Ok(row)
        });
        rows.collect()
    }
}

fn read_fields(fields: &mut Headers, headers: &Bound<'_, PyAny>) -> PyResult<()> {
    match headers.cast::<PyList>() {
        Ok(list) => list.iter().try_for_each(|pair| read_field(fields, &pair)),
        Err(_) => headers.try_iter()?.try_for_each(|pair| read_field(fields, &pair?)),
    }
}

/// Metadata of gRPC: its values are text, or bytes where the key ends in `-bin`.
fn read_metadatum(fields: &mut Headers, pair: &Bound<'_, PyAny>) -> PyResult<()> {
    let (name, value) = (pair.get_item(0)?, pair.get_item(1)?);
    let name = name.cast::<PyString>()?.to_str()?;
    match value.cast::<PyString>() {
        Ok(text) => fields.field(name.as_bytes(), text.to_string_lossy().as_bytes()),
        Err(_) => fields.field(name.as_bytes(), value.cast::<PyBytes>()?.as_bytes()),
    }
    Ok(())
}

/// A pair is a tuple of bytes as a rule; ASGI allows any two-item sequence.
fn read_field(fields: &mut Headers, pair: &Bound<'_, PyAny>) -> PyResult<()> {
    if let Ok(pair) = pair.cast::<PyTuple>() {
        if let (Ok(name), Ok(value)) = (pair.get_borrowed_item(0), pair.get_borrowed_item(1)) {
            if let (Ok(name), Ok(value)) = (name.cast::<PyBytes>(), value.cast::<PyBytes>()) {
                fields.field(name.as_bytes(), value.as_bytes());
                return Ok(());
            }
        }
    }
    let wrong = || PyTypeError::new_err("headers are a list of pairs of bytes: [(b\"host\", b\"orders\"), …]");
    let (name, value) = (pair.get_item(0).map_err(|_| wrong())?, pair.get_item(1).map_err(|_| wrong())?);
    let name = name.cast::<PyBytes>().map_err(|_| wrong())?;
    let value = value.cast::<PyBytes>().map_err(|_| wrong())?;
    fields.field(name.as_bytes(), value.as_bytes());
    Ok(())
}

/// Seconds of a monotonic clock. What is no time is the beginning of time, so that such a deadline is spent.
fn duration(seconds: f64) -> Duration {
    Duration::try_from_secs_f64(seconds).unwrap_or(if seconds > 0.0 { Duration::MAX } else { Duration::ZERO })
}

#[pyclass(frozen, module = "meshlib._native._core")]
struct Entry(CoreEntry);

#[pymethods]
impl Entry {
    #[getter]
    fn status(&self) -> u16 {
        self.0.status()
    }

    fn spend(&self) {
        self.0.spend();
    }

    #[getter]
    fn is_spent(&self) -> bool {
        self.0.is_spent()
    }

    #[getter]
    fn has_more(&self) -> bool {
        self.0.has_more()
    }

    #[getter]
    fn identity(&self) -> &str {
        self.0.identity()
    }

    /// The authorizer to be asked before the call goes on; "" for none.
    #[getter]
    fn custom(&self) -> &str {
        self.0.authorizer()
    }

    fn veto(&self) {
        self.0.veto();
    }

    /// The payload of a good token; None without one.
    #[getter]
    fn claims(&self) -> Option<&str> {
        self.0.claims().map(|claims| claims.json())
    }

    #[getter]
    fn principal(&self) -> &str {
        self.0.claims().map_or("", |claims| claims.principal())
    }

    #[getter]
    fn token_header(&self) -> &str {
        self.0.token_header()
    }

    #[getter]
    fn wants_keys(&self) -> &str {
        self.0.wants_keys()
    }

    #[getter]
    fn client(&self) -> String {
        self.0.client().map_or(String::new(), |client| client.to_string())
    }

    #[getter]
    fn is_from_proxy(&self) -> bool {
        self.0.is_from_proxy()
    }

    #[getter]
    fn is_believed(&self) -> bool {
        self.0.is_believed()
    }

    #[getter]
    fn xfcc(&self) -> &'static str {
        self.0.xfcc().word()
    }

    #[getter]
    fn location(&self) -> &str {
        self.0.location()
    }

    #[getter]
    fn retry_after(&self) -> Option<f64> {
        self.0.retry_after().map(|wait| wait.as_secs_f64())
    }

    #[getter]
    fn layer(&self) -> u32 {
        self.0.layer()
    }

    #[getter]
    fn reason(&self) -> &'static str {
        self.0.reason()
    }

    #[getter]
    fn rule(&self) -> &str {
        self.0.rule()
    }

    #[getter]
    fn detail(&self) -> String {
        self.0.detail()
    }

    #[getter]
    fn method(&self) -> &str {
        self.0.method()
    }

    #[getter]
    fn path(&self) -> &str {
        self.0.path()
    }

    #[getter]
    fn raw_path(&self) -> &[u8] {
        self.0.raw_path().as_bytes()
    }

    #[getter]
    fn route(&self) -> &str {
        self.0.route()
    }

    #[getter]
    fn deadline(&self) -> Option<f64> {
        self.0.deadline().map(|end| end.as_secs_f64())
    }

    #[getter]
    fn would_deny(&self) -> bool {
        self.0.would_deny()
    }

    fn finish(&self, status: u16, now: f64) {
        self.0.finish(status, duration(now));
    }

    /// Everything about the decision, for logs and `explain`; slower than the decision.
    fn record<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let entry = &self.0;
        let record = PyDict::new(py);
        record.set_item("service", entry.service())?;
        record.set_item("protocol", if entry.is_grpc() { "grpc" } else { "http" })?;
        record.set_item("mode", entry.mode().map_or("", Mode::word))?;
        record.set_item("peer", entry.peer().unwrap_or(""))?;
        record.set_item("tls", entry.is_tls())?;
        record.set_item("method", entry.method())?;
        record.set_item("path", entry.path())?;
        record.set_item("route", entry.route())?;
        record.set_item("verdict", entry.verdict())?;
        record.set_item("rule", entry.rule())?;
        record.set_item("nearest_rule", entry.nearest_rule())?;
        record.set_item("dry_run_rule", entry.dry_run_rule())?;
        record.set_item("principal", self.principal())?;
        record.set_item("client", self.client())?;
        record.set_item("authorizer", entry.authorizer())?;
        record.set_item("would_deny", entry.would_deny())?;
        record.set_item("status", entry.status())?;
        record.set_item("reason", entry.reason())?;
        record.set_item("detail", entry.detail())?;
        record.set_item("left", entry.deadline().map(|end| end.saturating_sub(entry.begun()).as_secs_f64()))?;
        record.set_item("waited", 0.0)?;
        Ok(record)
    }

    fn __repr__(&self) -> String {
        format!("<Entry {:?} {:?} status={} rule={:?}>", self.0.method(), self.0.path(), self.0.status(), self.0.rule())
    }
}

/// The canonical form of a target alone. Without a Host to compare it with, an absolute target has none.
#[pyfunction]
#[pyo3(signature = (target, strict = false))]
fn canonical_path<'py>(py: Python<'py>, target: &[u8], strict: bool) -> PyResult<(String, Bound<'py, PyBytes>)> {
    match mesh_core::secure::path::canonical(target, "GET", None, strict) {
        Ok(path) => Ok((path.text().to_owned(), PyBytes::new(py, path.raw().as_bytes()))),
        Err(error) => {
            let fields = PyDict::new(py);
            fields.set_item("reason", "secure.path")?;
            let message = format!("The path has no canonical form: {error}.");
            Err(PyErr::from_value(py.get_type::<Refused>().call((message,), Some(&fields))?))
        }
    }
}

/// A path as Istio's `pathNormalization` and Envoy's `path_with_escaped_slashes_action` would have it: `("path", text)`,
/// `("refused", "400")`, `("redirect", location)` or, for gRPC, `("refused", "INTERNAL")`.
#[pyfunction]
#[pyo3(signature = (target, profile = "NONE", escaped_slashes = "KEEP_UNCHANGED", is_grpc = false))]
fn normalized_path(
    target: &str,
    profile: &str,
    escaped_slashes: &str,
    is_grpc: bool,
) -> PyResult<(&'static str, String)> {
    Ok(match normalized(target, profile, escaped_slashes, is_grpc).map_err(ConfigError::new_err)? {
        Normalized::Path(text) => ("path", text),
        Normalized::Redirect(location) => ("redirect", location),
        Normalized::Refused => ("refused", if is_grpc { "INTERNAL" } else { "400" }.to_owned()),
    })
}
