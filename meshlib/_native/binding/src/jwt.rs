//! What does Python ask of the core about tokens and keys, without a gate? A set of keys before it is published, a token by hand.
//!
//! A request's token goes another way, with the request (`gate`), and there the keys stay and good tokens are remembered. Here
//! nothing is: these are for key sets that are fetched, for tokens that somebody wants to look at, and for the vectors of others.
use std::sync::Arc;

use mesh_core::secure::jwt::{payload_of, KeySet, ProviderPlan, Providers, TokenFault};
use pyo3::import_exception;
use pyo3::prelude::*;
use pyo3::types::{IntoPyDict, PyBytes, PyDict};

import_exception!(meshlib.errors, ConfigError);
import_exception!(meshlib.errors, Refused);

pub fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_function(wrap_pyfunction!(parse_jwks, module)?)?;
    module.add_function(wrap_pyfunction!(verify_jwt, module)?)?;
    module.add_function(wrap_pyfunction!(verify_jws, module)?)
}

/// The names of the usable keys, and why others are left out.
#[pyfunction]
fn parse_jwks(py: Python<'_>, jwks: &[u8]) -> PyResult<(Vec<String>, Vec<String>)> {
    let (set, ignored) = py.detach(|| KeySet::parse(jwks)).map_err(ConfigError::new_err)?;
    Ok((set.names().into_iter().map(str::to_owned).collect(), ignored))
}

/// What a token claims, if a provider (as in the server plan) with these keys takes it at this time.
#[pyfunction]
fn verify_jwt<'py>(
    py: Python<'py>,
    token: &[u8],
    jwks: &[u8],
    provider: &[u8],
    wall: f64,
) -> PyResult<Bound<'py, PyDict>> {
    let plan: ProviderPlan = serde_json::from_slice(provider)
        .map_err(|error| ConfigError::new_err(format!("the provider can't be read: {error}")))?;
    let name = plan.name.clone();
    let providers = Providers::compile(&[plan]).map_err(|mistakes| ConfigError::new_err(mistakes.join("\n")))?;
    let (set, _) = KeySet::parse(jwks).map_err(ConfigError::new_err)?;
    providers.set_keys(&name, Some(Arc::new(set)));
    let claims = providers.verify(token, wall).map_err(|fault| refused(py, &fault))?;
    let found = PyDict::new(py);
    found.set_item("issuer", claims.issuer())?;
    found.set_item("subject", claims.subject())?;
    found.set_item("principal", claims.principal())?;
    found.set_item("audiences", claims.audiences())?;
    found.set_item("presenter", claims.presenter())?;
    found.set_item("expires", claims.expires())?;
    found.set_item("claims", claims.json())?;
    Ok(found)
}

/// The payload of a signed token, whatever it is: only the signature is judged, by these keys and algorithms.
#[pyfunction]
fn verify_jws<'py>(
    py: Python<'py>,
    token: &[u8],
    jwks: &[u8],
    algorithms: Vec<String>,
) -> PyResult<Bound<'py, PyBytes>> {
    let (set, _) = KeySet::parse(jwks).map_err(ConfigError::new_err)?;
    let algorithms: Vec<&str> = algorithms.iter().map(String::as_str).collect();
    let payload = payload_of(token, &set, &algorithms).map_err(|fault| refused(py, &fault))?;
    Ok(PyBytes::new(py, &payload))
}

fn refused(py: Python<'_>, fault: &TokenFault) -> PyErr {
    let hint = "Look at the configuration of its provider, and at what issued it.";
    let made = [("reason", "secure.jwt"), ("hint", hint)]
        .into_py_dict(py)
        .and_then(|kwargs| py.get_type::<Refused>().call((format!("{fault}."),), Some(&kwargs)));
    match made {
        Ok(value) => PyErr::from_value(value),
        Err(error) => error,
    }
}
