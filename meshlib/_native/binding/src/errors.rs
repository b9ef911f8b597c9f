//! How does a refusal of the core become a Python exception? Here, and only here: what, why and what to do, in one table.
use mesh_core::client::Refusal;
use pyo3::import_exception;
use pyo3::prelude::*;
use pyo3::types::IntoPyDict;

import_exception!(meshlib.errors, UnknownService);
import_exception!(meshlib.errors, NoRoute);
import_exception!(meshlib.errors, NoEndpoint);
import_exception!(meshlib.errors, CircuitOpen);
import_exception!(meshlib.errors, LimitExceeded);
import_exception!(meshlib.errors, RateLimited);
import_exception!(meshlib.errors, Throttled);
import_exception!(meshlib.errors, DeadlineExceeded);
import_exception!(meshlib.errors, MeshError);

pub fn refusal(py: Python<'_>, refusal: Refusal) -> PyErr {
    let mut after = None;
    let (kind, message, hint) = match refusal {
        Refusal::UnknownService(text) => (
            py.get_type::<UnknownService>(),
            text,
            "Check the host of the URL, or add the service to mesh.yaml; a host outside the mesh needs a dot in its name.",
        ),
        Refusal::NoRoute(text) => (
            py.get_type::<NoRoute>(),
            text,
            "Add a route, or end the list with one that matches every path.",
        ),
        Refusal::NoEndpoint(text) => (
            py.get_type::<NoEndpoint>(),
            text,
            "Discovery has found none yet, or no endpoint carries the backend's labels.",
        ),
        Refusal::CircuitOpen(text) => (
            py.get_type::<CircuitOpen>(),
            text,
            "They failed or were isolated by hand; the mesh probes them and comes back by itself.",
        ),
        Refusal::LimitExceeded(text) => (
            py.get_type::<LimitExceeded>(),
            text,
            "The service is slower than its callers: shed load, add endpoints, or raise admit.in_flight.",
        ),
        Refusal::Throttled(text) => (
            py.get_type::<Throttled>(),
            text,
            "It recovers by itself when the service answers again; look why it refuses (429, 5xx).",
        ),
        Refusal::RateLimited(text, wait) => {
            after = Some(wait.as_secs_f64());
            (
                py.get_type::<RateLimited>(),
                text,
                "Try again after `retry_after` seconds, send less, or raise the rate in admit.rate.",
            )
        }
        Refusal::DeadlineExceeded(text) => (
            py.get_type::<DeadlineExceeded>(),
            text,
            "Raise the deadline of the route or of the caller, or look in explain() for what took the time.",
        ),
        Refusal::Misuse(text) => {
            let text = format!("the call was driven out of order: {text}");
            (py.get_type::<MeshError>(), text, "This is a mistake in meshlib; please report it.")
        }
    };
    let made = [("hint", hint)].into_py_dict(py).and_then(|kwargs| {
        if let Some(after) = after {
            kwargs.set_item("retry_after", after)?;
        }
        kind.call((format!("{message}."),), Some(&kwargs))
    });
    match made {
        Ok(value) => PyErr::from_value(value),
        Err(error) => error,
    }
}
