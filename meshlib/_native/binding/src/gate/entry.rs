//! One request that came in, for Python: `Entry`, from the gate's word until it is over.
use mesh_core::server::{Entry as CoreEntry, Mode, Xfcc};
use pyo3::prelude::*;
use pyo3::types::PyDict;

use super::duration;

/// What is left to do for an entry, beside letting it in. The bits of `Entry.todo`.
pub mod todo {
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

/// Headers are to be taken out or put in for the handler of this entry.
fn has_headers(entry: &CoreEntry) -> bool {
    entry.is_from_proxy() || !entry.token_header().is_empty() || entry.xfcc() != Xfcc::Sanitize
}

#[pyclass(frozen, module = "meshlib._native._core")]
pub struct Entry {
    pub core: CoreEntry,
    /// Fields were left out of the headers.
    pub is_short: bool,
    pub wants_id: bool,
    pub is_traced: bool,
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
