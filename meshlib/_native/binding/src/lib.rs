//! The seam between Python and Rust, and nothing else: it converts arguments, calls mesh-core or mesh-wire, converts the answer.
//!
//! It decides nothing and never calls back into Python code. Each file here mirrors one group of classes of `_core.pyi`.
use pyo3::prelude::*;

mod engine;
mod errors;
mod gate;
mod jwt;
mod place;
mod proxy;
mod tally;
mod wire;

#[pymodule]
fn _core(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add("VERSION", env!("CARGO_PKG_VERSION"))?;
    engine::register(module)?;
    gate::register(module)?;
    jwt::register(module)?;
    place::register(module)?;
    proxy::register(module)?;
    tally::register(module)?;
    wire::register(module)
}
