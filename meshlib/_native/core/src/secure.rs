//! Who is it, are they allowed, and is the wire private?
//!
//! The decisions of the phase, without its bytes: `path` makes the one form of a request's path that is authorised, routed,
//! measured and handed to the application; `address` says where a call comes from; `jwt` judges a token and keeps what it claims;
//! `authorize` judges a caller by the rules. Keys, certificates and records are mesh-wire's.
//! SPIFFE IDs are compared here as strings; their grammar was checked where they were read from the certificate.
pub mod address;
pub mod authorize;
mod crypto;
pub mod jwt;
pub mod passage;
pub mod path;
