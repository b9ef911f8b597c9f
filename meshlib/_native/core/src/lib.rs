//! Which endpoint may take this call, and may this call come in? All decisions of meshlib, and nothing but decisions.
//!
//! The modules are the seven words of the mesh. `client` composes the outbound way, `server` the inbound one; phases never call
//! one another. No clock, no randomness of its own, no I/O, no Python: `now` and `Random` are arguments, so that every
//! decision can be replayed.
pub mod admit;
pub mod balance;
pub mod client;
pub mod model;
pub mod observe;
pub mod random;
pub mod retry;
pub mod route;
pub mod secure;
pub mod server;
