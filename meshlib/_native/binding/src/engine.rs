//! The outbound engine as Python sees it: `Engine` and `Call`.
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;
use std::time::Duration;

use mesh_core::client::{self, carried, extra, Labels, Next, Reply, Request};
use mesh_core::model::{Address, Outcome, Pushback, StickyKind};
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
    let extras =
        [("HEDGE", extra::HEDGE), ("SESSION", extra::SESSION), ("PER_TRY", extra::PER_TRY), ("REPORT", extra::REPORT)];
    for (name, value) in extras {
        module.add(format!("EXTRA_{name}").as_str(), value)?;
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
    if value.is_nan() {
        return Duration::ZERO;
    }
    mesh_core::model::seconds(value)
}

#[pyfunction]
fn is_plain_target(target: &str) -> bool {
    mesh_core::route::is_plain_target(target)
}

#[pyclass(frozen, module = "meshlib._native._core")]
pub struct Engine {
    core: client::Engine,
    /// A change of the plan or of endpoints is under way, in a thread that doesn't hold the interpreter.
    is_changing: AtomicBool,
}

impl Engine {
    /// One change after the other, so that none is lost, and without the interpreter, so that calls go on.
    fn change<R: Send>(&self, py: Python<'_>, make: impl FnOnce(&client::Engine) -> R + Send) -> R {
        py.detach(|| {
            let _turn = Turn::wait(&self.is_changing);
            make(&self.core)
        })
    }
}

/// Leave to change an engine. A flag and no mutex, so that a forked child inherits nothing that only a lost thread could unlock.
struct Turn<'a>(&'a AtomicBool);

impl<'a> Turn<'a> {
    fn wait(flag: &'a AtomicBool) -> Self {
        while flag.swap(true, Ordering::Acquire) {
            std::thread::sleep(Duration::from_micros(50));
        }
        Self(flag)
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        self.0.store(false, Ordering::Release);
    }
}

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

/// Endpoints that are read from Python at a time, while the interpreter waits: about 0.1 ms.
const SLICE: usize = 256;

type Found = (String, f64, String, BTreeMap<String, String>, String);

#[pymethods]
impl Engine {
    #[new]
    fn new(seed: u64) -> Self {
        Self { core: client::Engine::new(seed), is_changing: AtomicBool::new(false) }
    }

    fn publish(&self, py: Python<'_>, plan: &[u8], now: f64) -> PyResult<()> {
        self.change(py, |core| core.publish(plan, seconds(now))).map_err(PyValueError::new_err)
    }

    fn resolve(
        &self,
        py: Python<'_>,
        service: &str,
        version: u64,
        endpoints: &Bound<'_, PyAny>,
        now: f64,
    ) -> PyResult<()> {
        let mut found = Vec::with_capacity(endpoints.len().unwrap_or(0));
        for endpoint in endpoints.try_iter()? {
            let (address, weight, zone, labels, identity): Found = endpoint?.extract()?;
            found.push(Address { address, weight, zone, labels, identity });
            if found.len() % SLICE == 0 {
                // Other threads have calls under way, and must not wait for ten thousand endpoints.
                py.detach(std::thread::yield_now);
            }
        }
        self.change(py, |core| core.resolve(service, version, &found, seconds(now)))
            .map_err(|why| errors::refusal(py, why))
    }

    fn service_of(&self, authority: &str) -> Option<String> {
        self.core.service_of(authority)
    }

    /// (service, route) of a call that is not begun yet; None where `begin` would refuse it.
    fn route_of(
        &self,
        authority: &str,
        method: &str,
        path: &str,
        headers: &Bound<'_, PyList>,
    ) -> Option<(String, String)> {
        self.core.route_of(authority, method, path, &HeaderList(headers))
    }

    #[pyo3(signature = (authority, method, path, headers, now, deadline=None, idempotent=None, replayable=true, attempt=0, timeout=None, retries=None, hedge=None, zone=None, key=None, peer=None, standby=false, labels=None))]
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
        key: Option<&str>,
        peer: Option<&str>,
        standby: bool,
        labels: Option<Labels>,
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
            key,
            peer,
            labels: labels.as_ref(),
            is_standby: standby,
            is_idempotent: idempotent,
            is_replayable: replayable,
            layer: attempt,
        };
        match self.core.begin(&request, &HeaderList(headers), seconds(now)) {
            Ok(call) => Ok(Call { call, last: seconds(now) }),
            Err(why) => Err(errors::refusal(py, why)),
        }
    }

    /// `begin` and `next` of a function's call, in one crossing: the call, the token of its attempt, and its end.
    #[pyo3(signature = (name, now, deadline=None, idempotent=false, retries=None, timeout=None, peer=None))]
    #[allow(clippy::too_many_arguments)] // as for `begin`
    fn guard(
        &self,
        py: Python<'_>,
        name: &str,
        now: f64,
        deadline: Option<f64>,
        idempotent: bool,
        retries: Option<u32>,
        timeout: Option<f64>,
        peer: Option<&str>,
    ) -> PyResult<(Call, u32, f64)> {
        let request = Request {
            authority: name,
            method: "CALL",
            path: "/",
            deadline: deadline.map(seconds),
            timeout: timeout.map(seconds),
            retries,
            hedge: None,
            zone: None,
            key: None,
            peer,
            labels: None,
            is_standby: false,
            is_idempotent: Some(idempotent),
            is_replayable: true,
            layer: 0,
        };
        match self.core.guard(name, &request, seconds(now)) {
            // A call that waits for a permit has no attempt yet, and goes on with `next`.
            Ok((call, next)) => {
                let token = if let Next::Send { token, .. } = next { token } else { NO_TOKEN };
                let end = call.deadline().as_secs_f64();
                Ok((Call { call, last: seconds(now) }, token, end))
            }
            Err(why) => Err(errors::refusal(py, why)),
        }
    }

    /// `begin` and the first `next` of a gRPC call, in one crossing: the call, its end, what is extraordinary about it, the trace that it
    /// begins (if `sample` is said), and what `next` says.
    #[pyo3(signature = (service, path, headers, now, deadline, idempotent, replayable, attempt, peer, sample))]
    #[allow(clippy::too_many_arguments)] // as for `begin`
    fn depart<'py>(
        &self,
        py: Python<'py>,
        service: &str,
        path: &str,
        headers: &Bound<'py, PyList>,
        now: f64,
        deadline: Option<f64>,
        idempotent: Option<bool>,
        replayable: bool,
        attempt: u32,
        peer: Option<&str>,
        sample: Option<f64>,
    ) -> PyResult<Bound<'py, PyTuple>> {
        let mut call = self.begin(
            py, service, "POST", path, headers, now, deadline, idempotent, replayable, attempt, None, None, None, None,
            None, peer, false, None,
        )?;
        let step = call.next(py, now)?;
        let (end, extras) = (call.deadline(), call.extras());
        let trace = sample.map(|sample| call.traceparent(sample).to_owned());
        (call, end, extras, trace, step).into_pyobject(py)
    }

    fn check(&self, service: &str, address: &str, is_healthy: bool, now: f64) -> bool {
        self.core.check(service, address, is_healthy, seconds(now))
    }

    /// Calls of a Service so far, those under way included.
    fn calls(&self, service: &str) -> u64 {
        self.core.calls(service)
    }

    /// What is computed once a second, off the request's path.
    fn tend(&self, py: Python<'_>, now: f64) {
        self.change(py, |core| core.tend(seconds(now)));
    }

    fn isolate(&self, service: &str, address: &str, isolated: bool, now: f64) -> bool {
        self.core.isolate(service, address, isolated, seconds(now))
    }

    /// Before a fork: wait for the change that is under way, and let none begin.
    fn hold(&self, py: Python<'_>) {
        py.detach(|| std::mem::forget(Turn::wait(&self.is_changing)));
    }

    /// After a fork, on both sides.
    fn release(&self) {
        drop(Turn(&self.is_changing));
    }

    fn reseed(&self, seed: u64) {
        self.core.reseed(seed);
    }

    fn stats<'py>(&self, py: Python<'py>, now: f64) -> PyResult<Bound<'py, PyList>> {
        let list = PyList::empty(py);
        for reading in self.core.read(seconds(now)) {
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
            row.set_item("zone", reading.zone)?;
            row.set_item("weight", reading.weight)?;
            row.set_item("limit", reading.limit)?;
            row.set_item("pending", reading.pending)?;
            row.set_item("limited", reading.limited)?;
            row.set_item("throttled", reading.throttled)?;
            row.set_item("rate_limited", reading.rate_limited)?;
            row.set_item("hedges", reading.hedges)?;
            row.set_item("panics", reading.panics)?;
            row.set_item("slow_after", reading.slow_after)?;
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

    /// What the driver has to do beyond the ordinary: EXTRA_*.
    #[getter]
    fn extras(&self) -> u8 {
        self.call.extras()
    }

    /// Seconds for one attempt; 0.0: as long as the call has.
    #[getter]
    fn per_try(&self) -> f64 {
        self.call.per_try().map_or(0.0, |time| time.as_secs_f64())
    }

    /// The header with which the answer keeps the caller's session at its endpoint; None: it has that already.
    #[getter]
    fn session<'py>(&self, py: Python<'py>) -> PyResult<Option<Bound<'py, PyTuple>>> {
        let Some((kind, name, session)) = self.call.new_session() else { return Ok(None) };
        let pair = match kind {
            StickyKind::Cookie => {
                ("set-cookie".to_owned(), format!("{name}={session:016x}; Path=/; HttpOnly; SameSite=Lax"))
            }
            _ => (name.to_ascii_lowercase(), format!("{session:016x}")),
        };
        Ok(Some((PyBytes::new(py, pair.0.as_bytes()), PyBytes::new(py, pair.1.as_bytes())).into_pyobject(py)?))
    }

    /// No more retries, and no hedge: the application has had enough.
    fn stop(&mut self) {
        self.call.stop();
    }

    /// The application's own wait before the retry that `head` decided.
    fn wait(&mut self, wait: f64, now: f64) {
        self.call.wait(seconds(wait), seconds(now));
    }

    /// The value of an `endpoint-load-metrics` header that came with an attempt's answer.
    fn report(&mut self, token: u32, value: &[u8], now: f64) {
        self.call.report(token, value, seconds(now));
    }

    /// It failed with its retries used up.
    #[getter]
    fn is_spent(&self) -> bool {
        self.call.is_spent()
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
            Ok(Next::Send { token, place, is_http2 }) => {
                (SEND, token, self.call.address(place), self.call.identity(place), is_http2).into_pyobject(py)
            }
            Ok(Next::Await) => (AWAIT,).into_pyobject(py),
            Err(why) => Err(errors::refusal(py, why)),
        }
    }

    /// Seconds until a second attempt goes out beside the one under way; 0.0: now, and `next` names it. None: there will be none.
    #[pyo3(signature = (now, can_overlap=true, is_streamed=false))]
    fn hedge(&mut self, now: f64, can_overlap: bool, is_streamed: bool) -> Option<f64> {
        self.last = seconds(now);
        self.call.hedge(can_overlap, is_streamed, self.last).map(|wait| wait.as_secs_f64())
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
        let wants_report = self.call.extras() & extra::REPORT != 0;
        let mut headers = Vec::with_capacity(given.len() + 5);
        for pair in given.iter() {
            let name = pair.cast::<PyTuple>()?.get_item(0)?.cast_into::<PyBytes>()?;
            if carried::is_ours(name.as_bytes()) || (wants_report && carried::is_load_format(name.as_bytes())) {
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
        if wants_report {
            headers.push(field(py, carried::LOAD_FORMAT, carried::LOAD_TEXT)?);
        }
        match trace {
            _ if has_trace => {}
            Some(trace) => headers.extend(trace.iter()),
            None => headers.push(field(py, carried::TRACEPARENT, self.call.traceparent(sample))?),
        }
        if self.call.attempts() > 0 {
            add_state(py, &mut headers, self.call.attempts())?;
        }
        PyList::new(py, headers)
    }

    /// The trace that this call begins, where it is part of none: the same for all its attempts.
    fn traceparent(&mut self, sample: f64) -> &str {
        self.call.traceparent(sample)
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
        let pushback = match retry_after {
            after if after >= 0.0 => Pushback::After(seconds(after)),
            NEVER => Pushback::Never,
            _ => Pushback::Unsaid,
        };
        let outcome = self::outcome(outcome)?;
        match self.call.head(token, outcome, status, pushback, self.last) {
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

    /// `head` and `finish` of a function that returned.
    fn good(&mut self, py: Python<'_>, token: u32, now: f64) -> PyResult<()> {
        self.last = seconds(now);
        let head = self.call.head(token, Outcome::Response, 200, Pushback::Unsaid, self.last);
        let ended = head.and_then(|_| self.call.finish(token, Outcome::Response, self.last));
        ended.map_err(|why| errors::refusal(py, why))
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
        out.set_item("policy", record.policy)?;
        out.set_item("total", record.total)?;
        out.set_item("out", record.out)?;
        out.set_item("panic", record.panic)?;
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
            row.set_item("weight", endpoint.weight)?;
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
            if event.budget >= 0.0 {
                detail.set_item("budget", event.budget)?;
            }
            row.set_item("detail", detail)?;
            events.append(row)?;
        }
        out.set_item("events", events)?;
        Ok(out)
    }
}

/// In the place of seconds: the endpoint asks not to be tried again.
const NEVER: f64 = -2.0;

/// In the place of a token: there is no attempt yet.
const NO_TOKEN: u32 = u32::MAX;

/// An end later than this is none.
const FOREVER: f64 = 1e9;

/// The attempt in the trace's state, in the place of what is there.
fn add_state<'py>(py: Python<'py>, headers: &mut Vec<Bound<'py, PyAny>>, attempt: u32) -> PyResult<()> {
    let mut given = Vec::new();
    let mut kept = Vec::with_capacity(headers.len() + 1);
    for pair in headers.drain(..) {
        let tuple = pair.cast::<PyTuple>()?;
        if carried::is_state(tuple.get_item(0)?.cast::<PyBytes>()?.as_bytes()) {
            given.extend_from_slice(tuple.get_item(1)?.cast::<PyBytes>()?.as_bytes());
            given.push(b',');
        } else {
            kept.push(pair);
        }
    }
    let state = carried::tracestate(attempt, &given);
    kept.push(
        (PyBytes::new(py, carried::TRACESTATE.as_bytes()), PyBytes::new(py, &state)).into_pyobject(py)?.into_any(),
    );
    *headers = kept;
    Ok(())
}

fn field<'py>(py: Python<'py>, name: &'static str, value: &str) -> PyResult<Bound<'py, PyAny>> {
    Ok((PyBytes::new(py, name.as_bytes()), PyBytes::new(py, value.as_bytes())).into_pyobject(py)?.into_any())
}

fn outcome(code: u8) -> PyResult<Outcome> {
    Outcome::from_code(code).ok_or_else(|| PyValueError::new_err(format!("{code} is no outcome; see OUTCOME_*")))
}

// Shared by reference between Python threads: the engine must be both.
const fn is_shared<T: Send + Sync>() {}
const _: () = is_shared::<Arc<client::Engine>>();
