//! The inbound way for Python: `Gate`, `Entry`, `canonical_path`. It converts and hands on; mesh-core decides.
//!
//! The header list is looked at where it lies, and an ASGI scope too: no Python code is called for it. Locks of the core are held only under the GIL
//! (a plan is compiled without it and swapped in with it), so that a fork never finds one taken.
use std::time::Duration;

use mesh_core::secure::jwt::KeySet;
use mesh_core::secure::path::profile::{normalized, Normalized};
use mesh_core::server::{Arrival, Gate as CoreGate, GrpcArrival, Listener, Origin, Snapshot, Version};
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict, PyString};

use self::entry::{todo, Entry};
use self::fields::{item, needed, passed, read_and_keep, read_fields, read_metadatum, target_of, TARGET};
use crate::place::Place;

mod entry;
mod fields;

pyo3::import_exception!(meshlib.errors, ConfigError);
pyo3::import_exception!(meshlib.errors, Refused);

pub fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_class::<Gate>()?;
    module.add_class::<Entry>()?;
    module.add("TARGET", TARGET)?;
    for (name, bit) in [
        ("TODO_REFUSED", todo::REFUSED),
        ("TODO_WAIT", todo::WAIT),
        ("TODO_HEADERS", todo::HEADERS),
        ("TODO_ID", todo::ID),
        ("TODO_ASK", todo::ASK),
        ("TODO_RATES", todo::RATES),
        ("TODO_DEADLINE", todo::DEADLINE),
        ("TODO_LAYER", todo::LAYER),
        ("TODO_PRIORITY", todo::PRIORITY),
        ("TODO_LOAD", todo::LOAD),
        ("TODO_KEEP", todo::KEEP),
        ("TODO_CANCEL", todo::CANCEL),
        ("TODO_TRACED", todo::TRACED),
    ] {
        module.add(name, bit)?;
    }
    module.add_function(wrap_pyfunction!(passed, module)?)?;
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

    /// The inbound way of an ASGI scope that came in at a place. What was judged is written into the scope: the canonical path and
    /// the headers that get in, as a list of its own. A server of ours has put the target as it came under `TARGET`; another one may
    /// have lost what an escape was, and gets the strictest reading.
    fn arrive(&self, scope: &Bound<'_, PyDict>, place: &Place, now: f64, wall: f64) -> PyResult<Entry> {
        let py = scope.py();
        let method = item(scope, intern!(py, "method"))?;
        let method = match &method {
            Some(method) => method.cast::<PyString>()?.to_str()?,
            // A WebSocket begins as one.
            None => "GET",
        };
        let target = target_of(scope)?;
        let target = target.as_bytes();
        let mut fields = self.0.headers(target);
        let headers = needed(scope, intern!(py, "headers"))?;
        let (kept, wants_id, is_traced) = read_and_keep(&mut fields, &headers)?;
        let version = item(scope, intern!(py, "http_version"))?;
        let version = version.as_ref().and_then(|version| version.cast::<PyString>().ok());
        fields.came_as(version.map_or(Ok(Version::Unknown), |version| version.to_str().map(Version::named))?);
        let is_short = kept.len() != headers.len()?;
        let entry = Entry {
            core: self.0.begin(Arrival {
                method,
                target,
                headers: fields,
                peer: place.peer(),
                is_tls: place.is_tls,
                now: duration(now),
                deadline: None,
                origin: place.origin(wall),
            }),
            is_short,
            wants_id,
            is_traced,
        };
        scope.set_item(intern!(py, "headers"), kept)?;
        if entry.core.status() == 0 {
            let raw = entry.core.raw_path();
            scope.set_item(intern!(py, "path"), entry.core.path())?;
            scope.set_item(intern!(py, "raw_path"), PyBytes::new(py, raw.as_bytes()))?;
            if scope.contains(intern!(py, TARGET))? {
                let query = target.splitn(2, |byte| *byte == b'?').nth(1).unwrap_or_default();
                scope.set_item(intern!(py, "query_string"), PyBytes::new(py, query))?;
            }
        }
        Ok(entry)
    }

    #[pyo3(signature = (method, target, headers, peer, is_tls, now, deadline = None, wall = 0.0, source = "", port = 0, sni = "", version = "", is_public = false, arrived = None))]
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
        is_public: bool,
        arrived: Option<f64>,
    ) -> PyResult<Entry> {
        let mut fields = self.0.headers(target);
        read_fields(&mut fields, headers)?;
        fields.came_as(Version::named(version));
        let (now, deadline) = (duration(now), deadline.map(duration));
        // What limits, queues and rates see of time never goes back: only its own time begins earlier.
        let arrived = arrived.map_or(now, duration).min(now);
        let deadline = deadline.or_else(|| fields.remaining().map(|left| arrived.saturating_add(left)));
        let origin = Origin { source, port, sni, wall, listener: listener(is_public) };
        let mut core = self.0.begin(Arrival { method, target, headers: fields, peer, is_tls, now, deadline, origin });
        core.waited_before(now.saturating_sub(arrived));
        Ok(Entry { core, is_short: false, wants_id: false, is_traced: false })
    }

    #[pyo3(signature = (method, peer, is_tls, now, deadline = None, metadata = None, wall = 0.0, source = "", port = 0, can_wait = false))]
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
        can_wait: bool,
    ) -> PyResult<Entry> {
        let mut fields = self.0.headers(b"/");
        let mut is_traced = false;
        if let Some(metadata) = metadata {
            for pair in metadata.try_iter()? {
                is_traced |= read_metadatum(&mut fields, &pair?)?;
            }
        }
        let (now, deadline) = (duration(now), deadline.map(duration));
        let origin = Origin { source, port, sni: "", wall, listener: Listener::Mesh };
        let core =
            self.0.begin_grpc(GrpcArrival { method, headers: fields, peer, is_tls, now, deadline, origin, can_wait });
        Ok(Entry { core, is_short: false, wants_id: false, is_traced })
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

    /// Tickets that were called since by entries that nobody ended.
    fn called(&self) -> Vec<u64> {
        self.0.called()
    }

    /// How full the house is, and what has come through it.
    fn load<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let load = self.0.load();
        let row = PyDict::new(py);
        row.set_item("in_flight", load.in_flight)?;
        row.set_item("limit", load.limit)?;
        row.set_item("waiting", load.waiting)?;
        row.set_item("calls", load.calls)?;
        row.set_item("errors", load.errors)?;
        row.set_item("refused", load.refused)?;
        Ok(row)
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

pub fn listener(is_public: bool) -> Listener {
    if is_public {
        Listener::Public
    } else {
        Listener::Mesh
    }
}

/// Seconds of a monotonic clock. What is no time is the beginning of time, so that such a deadline is spent.
fn duration(seconds: f64) -> Duration {
    Duration::try_from_secs_f64(seconds).unwrap_or(if seconds > 0.0 { Duration::MAX } else { Duration::ZERO })
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
