//! The inbound way for Python: `Gate`, `Entry`, `canonical_path`. It converts and hands on; mesh-core decides.
//!
//! The header list is looked at where it lies, and an ASGI scope too: no Python code is called for it. Locks of the core are held only under the GIL
//! (a plan is compiled without it and swapped in with it), so that a fork never finds one taken.
use std::time::Duration;

use mesh_core::secure::jwt::KeySet;
use mesh_core::secure::passage::{passage, Passage};
use mesh_core::secure::path::profile::{normalized, Normalized};
use mesh_core::server::{
    Arrival, Entry as CoreEntry, Gate as CoreGate, GrpcArrival, Headers, Listener, Mode, Origin, Snapshot, Version,
    Xfcc,
};
use pyo3::exceptions::{PyKeyError, PyTypeError};
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict, PyList, PyString, PyTuple};

use crate::place::Place;

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

/// Where a server of ours puts the whole target, as it came over the wire.
const TARGET: &str = "meshlib.target";

/// What is left to do for an entry, beside letting it in. The bits of `Entry.todo`.
mod todo {
    /// It is refused, and over.
    pub const REFUSED: u32 = 1;
    /// It waits for a place.
    pub const WAIT: u32 = 2;
    /// Header fields are to be put in or taken out.
    pub const HEADERS: u32 = 4;
    /// It needs a request id in place of its own.
    pub const ID: u32 = 8;
    /// An authorizer has to be asked.
    pub const ASK: u32 = 16;
    /// Rates are to be asked that all processes share.
    pub const RATES: u32 = 32;
    pub const DEADLINE: u32 = 64;
    pub const LAYER: u32 = 128;
    pub const PRIORITY: u32 = 256;
    /// The caller wants to know our load.
    pub const LOAD: u32 = 512;
    /// Nothing ends when the client goes away.
    pub const KEEP: u32 = 1024;
    /// The handler ends, too.
    pub const CANCEL: u32 = 2048;
    /// The caller has named a trace.
    pub const TRACED: u32 = 4096;
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

/// Headers are to be taken out or put in for the handler of this entry.
fn has_headers(entry: &CoreEntry) -> bool {
    entry.is_from_proxy() || !entry.token_header().is_empty() || entry.xfcc() != Xfcc::Sanitize
}

pub fn listener(is_public: bool) -> Listener {
    if is_public {
        Listener::Public
    } else {
        Listener::Mesh
    }
}

fn item<'py>(scope: &Bound<'py, PyDict>, key: &Bound<'py, PyString>) -> PyResult<Option<Bound<'py, PyAny>>> {
    scope.get_item(key)
}

fn needed<'py>(scope: &Bound<'py, PyDict>, key: &Bound<'py, PyString>) -> PyResult<Bound<'py, PyAny>> {
    item(scope, key)?
        .ok_or_else(|| PyKeyError::new_err(format!("the scope has no {key}: is this a call of an ASGI server?")))
}

/// The target of a scope: as it came, or put together again, which where an escape was lost is the strictest reading.
fn target_of<'py>(scope: &Bound<'py, PyDict>) -> PyResult<Bound<'py, PyBytes>> {
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
fn passed<'py>(headers: &Bound<'py, PyAny>) -> PyResult<(Bound<'py, PyList>, bool)> {
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
fn read_and_keep<'py>(fields: &mut Headers, headers: &Bound<'py, PyAny>) -> PyResult<(Bound<'py, PyList>, bool, bool)> {
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

fn read_fields(fields: &mut Headers, headers: &Bound<'_, PyAny>) -> PyResult<()> {
    match headers.cast::<PyList>() {
        Ok(list) => list.iter().try_for_each(|pair| read_field(fields, &pair)),
        Err(_) => headers.try_iter()?.try_for_each(|pair| read_field(fields, &pair?)),
    }
}

/// Metadata of gRPC: its values are text, or bytes where the key ends in `-bin`.
/// True if it concerns a trace.
fn read_metadatum(fields: &mut Headers, pair: &Bound<'_, PyAny>) -> PyResult<bool> {
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

/// Seconds of a monotonic clock. What is no time is the beginning of time, so that such a deadline is spent.
fn duration(seconds: f64) -> Duration {
    Duration::try_from_secs_f64(seconds).unwrap_or(if seconds > 0.0 { Duration::MAX } else { Duration::ZERO })
}

#[pyclass(frozen, module = "meshlib._native._core")]
struct Entry {
    core: CoreEntry,
    /// Fields were left out of the headers.
    is_short: bool,
    wants_id: bool,
    is_traced: bool,
}

#[pymethods]
impl Entry {
    #[getter]
    fn status(&self) -> u16 {
        self.core.status()
    }

    fn spend(&self) {
        self.core.spend();
    }

    #[getter]
    fn is_spent(&self) -> bool {
        self.core.is_spent()
    }

    #[getter]
    fn has_more(&self) -> bool {
        self.core.has_more()
    }

    #[getter]
    fn identity(&self) -> &str {
        self.core.identity()
    }

    /// The authorizer to be asked before the call goes on; "" for none.
    #[getter]
    fn custom(&self) -> &str {
        self.core.authorizer()
    }

    fn veto(&self) -> Vec<u64> {
        self.core.veto()
    }

    /// What is left to do, as bits; 0 as a rule.
    #[getter]
    fn todo(&self) -> u32 {
        let core = &self.core;
        let bit = |is_set: bool, bit: u32| if is_set { bit } else { 0 };
        if core.status() != 0 {
            return todo::REFUSED | bit(!core.load_format().is_empty(), todo::LOAD);
        }
        let hears = self.is_short && (core.is_believed() || core.is_from_proxy());
        bit(core.ticket() != 0, todo::WAIT)
            | bit(hears || has_headers(core), todo::HEADERS)
            | bit(self.wants_id, todo::ID)
            | bit(!core.authorizer().is_empty(), todo::ASK)
            | bit(core.wants_rates(), todo::RATES)
            | bit(core.deadline().is_some(), todo::DEADLINE)
            | bit(core.layer() != 0, todo::LAYER)
            | bit(core.priority() != "critical", todo::PRIORITY)
            | bit(!core.load_format().is_empty(), todo::LOAD)
            | bit(self.is_traced, todo::TRACED)
            | match core.on_disconnect() {
                0 => todo::KEEP,
                2 => todo::CANCEL,
                _ => 0,
            }
    }

    /// It waits for a place until its ticket is called, 0 if it doesn't; `patience` seconds at most, and then it asks `resume`.
    #[getter]
    fn ticket(&self) -> u64 {
        self.core.ticket()
    }

    /// Its ticket was called already: it need not wait.
    #[getter]
    fn is_called(&self) -> bool {
        self.core.is_called()
    }

    #[getter]
    fn patience(&self) -> f64 {
        self.core.patience().as_secs_f64()
    }

    /// True: it has a place. False: it is refused, and over.
    fn resume(&self, now: f64) -> bool {
        self.core.resume(duration(now))
    }

    /// A rate that all processes share has no room: refused, for so many seconds. Answers the tickets that are called by that.
    fn outrun(&self, wait: f64) -> Vec<u64> {
        self.core.outrun(duration(wait))
    }

    /// The store of such a rate is away, and this process counts by itself: None if the call fits.
    fn stand_in(&self, now: f64) -> Option<Vec<u64>> {
        self.core.stand_in(duration(now))
    }

    #[getter]
    fn priority(&self) -> &'static str {
        self.core.priority()
    }

    #[getter]
    fn load_format(&self) -> &'static str {
        self.core.load_format()
    }

    #[getter]
    fn is_over(&self) -> bool {
        self.core.is_over()
    }

    #[getter]
    fn peer(&self) -> &str {
        self.core.peer().unwrap_or("")
    }

    /// The payload of a good token; None without one.
    #[getter]
    fn claims(&self) -> Option<&str> {
        self.core.claims().map(|claims| claims.json())
    }

    #[getter]
    fn principal(&self) -> &str {
        self.core.claims().map_or("", |claims| claims.principal())
    }

    #[getter]
    fn token_header(&self) -> &str {
        self.core.token_header()
    }

    #[getter]
    fn wants_keys(&self) -> &str {
        self.core.wants_keys()
    }

    #[getter]
    fn client(&self) -> String {
        self.core.client().map_or(String::new(), |client| client.to_string())
    }

    #[getter]
    fn is_from_proxy(&self) -> bool {
        self.core.is_from_proxy()
    }

    #[getter]
    fn is_believed(&self) -> bool {
        self.core.is_believed()
    }

    #[getter]
    fn xfcc(&self) -> &'static str {
        self.core.xfcc().word()
    }

    #[getter]
    fn location(&self) -> &str {
        self.core.location()
    }

    #[getter]
    fn retry_after(&self) -> Option<f64> {
        self.core.retry_after().map(|wait| wait.as_secs_f64())
    }

    #[getter]
    fn layer(&self) -> u32 {
        self.core.layer()
    }

    #[getter]
    fn reason(&self) -> &'static str {
        self.core.reason()
    }

    #[getter]
    fn rule(&self) -> &str {
        self.core.rule()
    }

    #[getter]
    fn detail(&self) -> String {
        self.core.detail()
    }

    #[getter]
    fn method(&self) -> &str {
        self.core.method()
    }

    #[getter]
    fn path(&self) -> &str {
        self.core.path()
    }

    #[getter]
    fn raw_path(&self) -> &[u8] {
        self.core.raw_path().as_bytes()
    }

    #[getter]
    fn route(&self) -> &str {
        self.core.route()
    }

    #[getter]
    fn deadline(&self) -> Option<f64> {
        self.core.deadline().map(|end| end.as_secs_f64())
    }

    #[getter]
    fn would_deny(&self) -> bool {
        self.core.would_deny()
    }

    /// The call is over. Answers the tickets of those whose turn it is now: None as a rule.
    fn finish(&self, status: u16, now: f64) -> Option<Vec<u64>> {
        let called = self.core.finish(status, duration(now));
        (!called.is_empty()).then_some(called)
    }

    /// Everything about the decision, for logs and `explain`; slower than the decision.
    fn record<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let entry = &self.core;
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
        record.set_item("waited", entry.waited().as_secs_f64())?;
        record.set_item("priority", entry.priority())?;
        record.set_item("listener", if entry.is_public() { "public" } else { "mesh" })?;
        Ok(record)
    }

    fn __repr__(&self) -> String {
        format!(
            "<Entry {:?} {:?} status={} rule={:?}>",
            self.core.method(),
            self.core.path(),
            self.core.status(),
            self.core.rule()
        )
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
