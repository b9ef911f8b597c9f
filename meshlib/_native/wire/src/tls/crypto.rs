//! Whose arithmetic is it? The one place that knows which library does the cryptography: ring, or AWS-LC.
//!
//! Both give rustls a provider and have the same names for digests, sealing and randomness, so that nothing else of this crate
//! differs. AWS-LC is for those who need FIPS 140-3: its module is validated, ring is not. It is chosen when the library is built:
//!
//! ```text
//! maturin build --release --no-default-features --features aws-lc,pyo3/extension-module,pyo3/abi3-py311
//! maturin build --release --no-default-features --features fips,pyo3/extension-module,pyo3/abi3-py311
//! ```
//!
//! `aws-lc` needs a C compiler and cmake; `fips`, which takes the validated module itself, Go and perl too. Where both features are
//! on, because two crates asked for different ones, AWS-LC wins: who asked for it had a reason.
use rustls::crypto::CryptoProvider;

#[cfg(feature = "aws-lc")]
pub use aws_lc_rs::{aead, digest, rand};
#[cfg(not(feature = "aws-lc"))]
pub use ring::{aead, digest, rand};

#[cfg(not(any(feature = "aws-lc", feature = "ring")))]
compile_error!("mesh-wire needs a library for its cryptography: the feature `ring` (the default) or `aws-lc`.");

/// Which library it is, as an operator wants to read it.
pub const NAME: &str = if cfg!(feature = "fips") {
    "aws-lc-rs (FIPS)"
} else if cfg!(feature = "aws-lc") {
    "aws-lc-rs"
} else {
    "ring"
};

/// All that the library can do for rustls.
pub fn provider() -> CryptoProvider {
    #[cfg(feature = "aws-lc")]
    return rustls::crypto::aws_lc_rs::default_provider();
    #[cfg(not(feature = "aws-lc"))]
    return rustls::crypto::ring::default_provider();
}

/// Tickets as rustls gives them.
#[cfg(test)]
pub fn ticketer() -> std::sync::Arc<dyn rustls::server::ProducesTickets> {
    #[cfg(feature = "aws-lc")]
    return rustls::crypto::aws_lc_rs::Ticketer::new().unwrap_or_else(|error| unreachable!("{error}"));
    #[cfg(not(feature = "aws-lc"))]
    return rustls::crypto::ring::Ticketer::new().unwrap_or_else(|error| unreachable!("{error}"));
}
