//! The outbound engine as Python sees it: `Engine` and `Call`.
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use mesh_core::client::{self, carried, Next, Reply, Request};
use mesh_core::model::{Address, Outcome};
use mesh_core::route::Headers;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict, PyList, PyTuple};

use crate::errors;

const WAIT: u8 = 0;
const SEND: u8 = 1;
const DELIVER: u8 = 0;
const RETRY: u8 = 1;
/// Both of a step and of a judgement: another attempt is under way.
const AWAIT: u8 = 2;

pub fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    for (name, value) in [("WAIT", WAIT), ("SEND", SEND), ("DELIVER", DELIVER), ("RETRY", RETRY), ("AWAIT", AWAIT)] {
        module.add(name, value)?;
    }
    for (outcome, word) in Outcome::ALL {
        module.add(format!("OUTCOME_{}", word.to_uppercase()).as_str(), outcome as u8)?;
    }
    module.add_function(wrap_pyfunction!(is_plain_target, module)?)?;
    module.add_class::<Engine>()?;
    module.add_class::<Call>()
}

/// A moment or a span given in seconds. What lies beyond all clocks is a century; what is no such number is zero.
pub fn seconds(value: f64) -> Duration {
    const CENTURY: f64 = 100.0 * 365.0 * 86_400.0;
    Duration::try_from_secs_f64(value.min(CENTURY)).unwrap_or_default()
}

#[pyfunction]
fn is_plain_target(target: &str) -> bool {
    mesh_core::route::is_plain_target(target)
}

#[pyclass(frozen, module = "meshlib._native._core")]
pub struct Engine(client::Engine);

/// A Python list of (name, value) pairs of bytes, looked at only where a route asks for a header.
struct HeaderList<'a, 'py>(&'a Bound<'py, PyList>);

impl Headers for HeaderList<'_, '_> {
    fn any(&self, name: &str, check: &mut dyn FnMut(&[u8]) -> bool) -> bool {
        self.0.iter().any(|item| {
            let Ok(pair) = item.cast::<PyTuple>() else { return false };
            let (Ok(key), Ok(value)) = (pair.get_item(0), pair.get_item(1)) else { return false };
            let (Ok(key), Ok(value)) = (key.cast::<PyBytes>(), value.cast::<PyBytes>()) else { return false };
            key.as_bytes().eq_ignore_ascii_case(name.as_bytes()) && check(value.as_bytes())
        })
    }
}

type Found = (String, f64, String, BTreeMap<String, String>, String);

#[pymethods]
impl Engine {
    #[new]
    fn new(seed: u64) -> Self {
        Self(client::Engine::new(seed))
    }

    fn publish(&self, py: Python<'_>, plan: &[u8], now: f64) -> PyResult<()> {
        py.detach(|| self.0.publish(plan, seconds(now))).map_err(PyValueError::new_err)
    }

    fn resolve(&self, py: Python<'_>, service: &str, version: u64, endpoints: Vec<Found>, now: f64) -> PyResult<()> {
        let found = endpoints
            .into_iter()
            .map(|(address, weight, zone, labels, identity)| Address { address, weight, zone, labels, identity })
            .collect();
        py.detach(|| self.0.resolve(service, version, found, seconds(now))).map_err(|why| errors::refusal(py, why))
    }

    fn service_of(&self, authority: &str) -> Option<String> {
        self.0.service_of(authority)
    }

    #[pyo3(signature = (authority, method, path, headers, now, deadline=None, idempotent=None, replayable=true, attempt=0, timeout=None, retries=None, hedge=None, zone=None))]
    #[allow(clippy::too_many_arguments)] // one call across the seam is cheaper than building an object for it
    fn begin(
        &self,
        py: Python<'_>,
        authority: &str,
        method: &str,
        path: &str,
        headers: &Bound<'_, PyList>,
        now: f64,
        deadline: Option<f64>,
        idempotent: Option<bool>,
        replayable: bool,
        attempt: u32,
        timeout: Option<f64>,
        retries: Option<u32>,
        hedge: Option<f64>,
        zone: Option<&str>,
    ) -> PyResult<Call> {
        let request = Request {
            authority,
            method,
            path,
            deadline: deadline.map(seconds),
            timeout: timeout.map(seconds),
            retries,
            hedge: hedge.map(seconds),
            zone,
            is_idempotent: idempotent,
            is_replayable: replayable,
            layer: attempt,
        };
        match self.0.begin(&request, &HeaderList(headers), seconds(now)) {
            Ok(call) => Ok(Call { call, last: seconds(now) }),
            Err(why) => Err(errors::refusal(py, why)),
        }
    }

    fn isolate(&self, service: &str, address: &str, isolated: bool, now: f64) -> bool {
        self.0.isolate(service, address, isolated, seconds(now))
    }

    fn reseed(&self, seed: u64) {
        self.0.reseed(seed);
    }

    fn stats<'py>(&self, py: Python<'py>, now: f64) -> PyResult<Bound<'py, PyList>> {
        let list = PyList::empty(py);
        for reading in self.0.read(seconds(now)) {
            let row = PyDict::new(py);
            row.set_item("service", reading.service)?;
            row.set_item("endpoint", reading.endpoint)?;
            row.set_item("requests", reading.counters.requests)?;
            row.set_item("failures", reading.counters.failures)?;
            row.set_item("retries", reading.counters.retries)?;
            row.set_item("ejections", reading.counters.ejections)?;
            row.set_item("in_flight", reading.in_flight)?;
            row.set_item("breaker", reading.breaker)?;
            row.set_item("ewma", reading.ewma)?;
            row.set_item("budget", reading.budget)?;
            row.set_item("latency_buckets", reading.counters.latency_buckets)?;
            row.set_item("latency_sum", reading.counters.latency_sum)?;
            let codes = PyDict::new(py);
            for (code, count) in reading.counters.codes {
                codes.set_item(code.to_string(), count)?;
            }
            row.set_item("codes", codes)?;
            list.append(row)?;
        }
        Ok(list)
    }
}

#[pyclass(module = "meshlib._native._core")]
pub struct Call {
    call: client::Call,
    last: Duration,
}

#[pymethods]
impl Call {
    #[getter]
    fn service(&self) -> &str {
        self.call.service()
    }

    #[getter]
    fn route(&self) -> &str {
        self.call.route()
    }

    #[getter]
    fn deadline(&self) -> f64 {
        self.call.deadline().as_secs_f64()
    }

    #[getter]
    fn connect_timeout(&self) -> f64 {
        self.call.connect_timeout().as_secs_f64()
    }

    #[getter]
    fn stream_idle(&self) -> f64 {
        self.call.stream_idle()
    }

    #[getter]
    fn is_idempotent(&self) -> bool {
        self.call.is_idempotent()
    }

    #[getter]
    fn attempt(&self) -> u32 {
        self.call.attempts()
    }

    #[getter]
    fn has_attempts_left(&self) -> bool {
        self.call.has_attempts_left()
    }

    fn next<'py>(&mut self, py: Python<'py>, now: f64) -> PyResult<Bound<'py, PyTuple>> {
        self.last = seconds(now);
        match self.call.next(self.last) {
            Ok(Next::Wait(wait)) => (WAIT, wait.as_secs_f64()).into_pyobject(py),
            Ok(Next::Send { token, address, identity, is_http2 }) => {
                (SEND, token, &*address, &*identity, is_http2).into_pyobject(py)
            }
            Ok(Next::Await) => (AWAIT,).into_pyobject(py),
            Err(why) => Err(errors::refusal(py, why)),
        }
    }

    /// Seconds until a second attempt goes out beside the one under way; 0.0: now, and `next` names it. None: there will be none.
    #[pyo3(signature = (now, can_overlap=true))]
    fn hedge(&mut self, now: f64, can_overlap: bool) -> Option<f64> {
        self.last = seconds(now);
        self.call.hedge(can_overlap, self.last).map(|wait| wait.as_secs_f64())
    }

    /// The caller's headers, with ours in the place of what it forwards of them. `trace` None: it is given a new one.
    fn headers<'py>(
        &mut self,
        py: Python<'py>,
        given: &Bound<'py, PyList>,
        now: f64,
        end: f64,
        trace: Option<&Bound<'py, PyList>>,
        sample: f64,
    ) -> PyResult<Bound<'py, PyList>> {
        let mut has_trace = false;
        let mut headers = Vec::with_capacity(given.len() + 4);
        for pair in given.iter() {
            let name = pair.cast::<PyTuple>()?.get_item(0)?.cast_into::<PyBytes>()?;
            if carried::is_ours(name.as_bytes()) {
                continue;
            }
            has_trace |= carried::is_trace(name.as_bytes());
            headers.push(pair);
        }
        if end < FOREVER {
            let left = carried::deadline_ms(seconds(now), seconds(end)).to_string();
            headers.push(field(py, carried::DEADLINE, &left)?);
        }
        if self.call.attempts() > 0 {
            headers.push(field(py, carried::ATTEMPT, &self.call.attempts().to_string())?);
        }
        match trace {
            _ if has_trace => {}
            Some(trace) => headers.extend(trace.iter()),
            None => headers.push(field(py, carried::TRACEPARENT, self.call.traceparent(sample))?),
        }
        PyList::new(py, headers)
    }

    /// `is_whole`: the body is here too, so that an answer that is delivered ends the call.
    #[pyo3(signature = (token, outcome, status, now, retry_after=-1.0, is_whole=false))]
    #[allow(clippy::too_many_arguments)] // as for `begin`
    fn head(
        &mut self,
        py: Python<'_>,
        token: u32,
        outcome: u8,
        status: u16,
        now: f64,
        retry_after: f64,
        is_whole: bool,
    ) -> PyResult<u8> {
        self.last = seconds(now);
        let retry_after = (retry_after >= 0.0).then(|| seconds(retry_after));
        let outcome = self::outcome(outcome)?;
        match self.call.head(token, outcome, status, retry_after, self.last) {
            Ok(Reply::Deliver) if is_whole && outcome == Outcome::Response => {
                self.call.finish(token, outcome, self.last).map_err(|why| errors::refusal(py, why))?;
                Ok(DELIVER)
            }
            Ok(Reply::Deliver) => Ok(DELIVER),
            Ok(Reply::Retry) => Ok(RETRY),
            Ok(Reply::Await) => Ok(AWAIT),
            Err(why) => Err(errors::refusal(py, why)),
        }
    }

    fn finish(&mut self, py: Python<'_>, token: u32, outcome: u8, now: f64) -> PyResult<()> {
        self.last = seconds(now);
        self.call.finish(token, self::outcome(outcome)?, self.last).map_err(|why| errors::refusal(py, why))
    }

    fn abandon(&mut self, now: f64) {
        self.last = seconds(now);
        self.call.abandon(self.last);
    }

    fn record<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let record = self.call.record(self.last);
        let out = PyDict::new(py);
        out.set_item("service", record.service)?;
        out.set_item("route", record.route)?;
        out.set_item("backend", record.backend)?;
        out.set_item("deadline", record.deadline)?;
        out.set_item("idempotent", record.is_idempotent)?;
        out.set_item("retries", record.retries)?;
        out.set_item("hedges", record.hedges)?;
        let candidate = |place: u32| record.endpoints.iter().find(|e| e.place == place);
        let address = |place: u32| candidate(place).map(|e| e.address.as_str());
        let candidates = PyList::empty(py);
        for endpoint in &record.endpoints {
            let place = endpoint.place;
            let row = PyDict::new(py);
            row.set_item("endpoint", &endpoint.address)?;
            row.set_item("zone", &endpoint.zone)?;
            row.set_item("breaker", endpoint.breaker)?;
            row.set_item("ewma_ms", endpoint.average * 1e3)?;
            row.set_item("in_flight", endpoint.in_flight)?;
            let score = record.events.iter().rev().find_map(|event| match (event.endpoint, event.other) {
                (Some(at), _) if at == place && event.cost > 0.0 => Some(event.cost),
                (_, Some((at, cost))) if at == place => Some(cost),
                _ => None,
            });
            row.set_item("score", score)?;
            candidates.append(row)?;
        }
        out.set_item("candidates", candidates)?;
        let events = PyList::empty(py);
        for event in &record.events {
            let row = PyDict::new(py);
            row.set_item("at", event.at.as_secs_f64() * 1e3)?;
            row.set_item("phase", event.phase)?;
            row.set_item("what", event.what)?;
            if let Some(name) = event.endpoint.and_then(address) {
                row.set_item("endpoint", name)?;
            }
            let detail = PyDict::new(py);
            if event.cost > 0.0 {
                detail.set_item("cost", event.cost)?;
            }
            if let Some((place, cost)) = event.other {
                detail.set_item("other", address(place))?;
                detail.set_item("other_cost", cost)?;
            }
            if event.status > 0 {
                detail.set_item("status", event.status)?;
            }
            if event.what == "picked in zone" {
                detail.set_item("zone", event.endpoint.and_then(candidate).map(|e| e.zone.as_str()))?;
            }
            if !event.word.is_empty() {
                detail.set_item("why", event.word)?;
            }
            if event.amount > 0.0 {
                detail.set_item("seconds", event.amount)?;
            }
            row.set_item("detail", detail)?;
            events.append(row)?;
        }
        out.set_item("events", events)?;
        Ok(out)
    }
}

/// An end later than this is none.
const FOREVER: f64 = 1e9;

fn field<'py>(py: Python<'py>, name: &'static str, value: &str) -> PyResult<Bound<'py, PyAny>> {
    Ok((PyBytes::new(py, name.as_bytes()), PyBytes::new(py, value.as_bytes())).into_pyobject(py)?.into_any())
}

fn outcome(code: u8) -> PyResult<Outcome> {
    Outcome::from_code(code).ok_or_else(|| PyValueError::new_err(format!("{code} is no outcome; see OUTCOME_*")))
}

// Shared by reference between Python threads: the engine must be both.
const fn is_shared<T: Send + Sync>() {}
const _: () = is_shared::<Arc<client::Engine>>();
