//! One call as Python sees it: `Call`, from the engine's word until it is over.
use std::time::Duration;

use mesh_core::client::{self, carried, extra, Next, Reply};
use mesh_core::model::{Outcome, Pushback, StickyKind};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict, PyList, PyTuple};

use super::{seconds, AWAIT, DELIVER, RETRY, SEND, WAIT};
use crate::errors;

#[pyclass(module = "meshlib._native._core")]
pub struct Call {
    pub call: client::Call,
    pub last: Duration,
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
    pub fn deadline(&self) -> f64 {
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
    pub fn extras(&self) -> u8 {
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

    pub fn next<'py>(&mut self, py: Python<'py>, now: f64) -> PyResult<Bound<'py, PyTuple>> {
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
    pub fn traceparent(&mut self, sample: f64) -> &str {
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
pub const NO_TOKEN: u32 = u32::MAX;

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
