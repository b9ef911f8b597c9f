//! May it go now?
//!
//! ```text
//! breaker.rs   is this endpoint fit to be called?            state of an Endpoint, with its window.rs
//! permits.rs   how many at once, and how many may wait?      of Services and Endpoints
//! adaptive.rs  how many at once, learnt from latency
//! queue.rs     who goes next, where there are too few places? of the Service that we are, with priority.rs
//! rate.rs      how many in a time?
//! throttle.rs  does the Service take what we send?
//! ```
//!
//! It does not protect against an endpoint that is slow but correct, unless slow calls are configured: balance does that.
pub mod adaptive;
pub mod breaker;
pub mod permits;
pub mod priority;
pub mod queue;
pub mod rate;
pub mod throttle;
pub mod window;
