//! Which bytes go out, and what do the bytes mean that came in? TLS and HTTP without a socket, a clock or a thread.
//!
//! Whoever has the bytes moves them: an event loop or a blocking call in Python today, tokio in the agent. So this crate is the
//! same in all of them, is safe under fork and at interpreter exit, and can be tested byte by byte. `HttpConnection` is the client's
//! side (TLS or none, HTTP/1.1 and HTTP/2), `TlsConnection` the server's record layer, and `TlsTunnel` the client's,
//! for those who bring an HTTP of their own.
//!
//! It decides nothing: which endpoint, which identity is expected and what becomes of a failure is mesh-core's.
pub mod connection;
pub mod delegated;
pub mod error;
pub mod http1;
pub mod http2;
pub mod sink;
pub mod spiffe;
#[cfg(test)]
mod testing;
pub mod tls;
pub mod tunnel;

pub use connection::{HttpConnection, Protocols};
pub use error::{Error, ErrorKind, Result};
pub use rustls::time_provider::{DefaultTimeProvider as SystemTime, TimeProvider};
pub use sink::{Sink, StreamSink};
pub use tls::client::TlsClient;
pub use tls::server::{TlsConnection, TlsServer};
pub use tunnel::TlsTunnel;
