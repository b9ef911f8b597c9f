//! Which bytes does the node agent move for other processes? None yet.
//!
//! This crate is the only one that may depend on tokio. It is run by the agent and the gateway alone: an
//! application's process never loads it, because a native runtime behind Python is known to hang forked
//! workers and to abort at exit. Until the agent has a data path, nothing is here, and nothing claims to be.
