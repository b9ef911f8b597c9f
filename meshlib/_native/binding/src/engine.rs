//! The outbound engine as Python sees it: `Engine` and `Call`.
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;
use std::time::Duration;

use mesh_core::client::{self, extra, Labels, Next, Request};
use mesh_core::model::{Address, Outcome};
use mesh_core::route::Headers;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict, PyList, PyTuple};

use self::call::{Call, NO_TOKEN};
use crate::errors;

mod call;

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

/// The parts of an endpoint that is told.
const TOLD: usize = 5;

/// As discovery has them; without its last part, an endpoint is told.
type Found = (String, f64, String, BTreeMap<String, String>, String, bool);
type Told = (String, f64, String, BTreeMap<String, String>, String);

fn read(py: Python<'_>, endpoints: &Bound<'_, PyAny>) -> PyResult<Vec<Address>> {
    let mut found = Vec::with_capacity(endpoints.len().unwrap_or(0));
    for endpoint in endpoints.try_iter()? {
        let endpoint = endpoint?;
        let (address, weight, zone, labels, identity, is_held): Found = if endpoint.len()? == TOLD {
            let (address, weight, zone, labels, identity): Told = endpoint.extract()?;
            (address, weight, zone, labels, identity, false)
        } else {
            endpoint.extract()?
        };
        found.push(Address { address, weight, zone, labels, identity, is_held });
        if found.len() % SLICE == 0 {
            // Other threads have calls under way, and must not wait for ten thousand endpoints.
            py.detach(std::thread::yield_now);
        }
    }
    Ok(found)
}

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
        let found = read(py, endpoints)?;
        self.change(py, |core| core.resolve(service, version, &found, seconds(now)))
            .map_err(|why| errors::refusal(py, why))
    }

    /// What has changed since the version `base`; False where that is not the version at hand.
    #[allow(clippy::too_many_arguments)] // as for `begin`
    fn amend(
        &self,
        py: Python<'_>,
        service: &str,
        base: u64,
        version: u64,
        changed: &Bound<'_, PyAny>,
        gone: Vec<String>,
        now: f64,
    ) -> PyResult<bool> {
        let found = read(py, changed)?;
        self.change(py, |core| core.amend(service, base, version, &found, &gone, seconds(now)))
            .map_err(|why| errors::refusal(py, why))
    }

    /// How many connects of a Service's calls have come to nothing so far.
    fn unreachable(&self, service: &str) -> u32 {
        self.core.unreachable(service)
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

// Shared by reference between Python threads: the engine must be both.
const fn is_shared<T: Send + Sync>() {}
const _: () = is_shared::<Arc<client::Engine>>();
