"""May it go now?

Decided in Rust, `_native/core/src/admit.rs` and the folder beside it: the breaker of each endpoint as a table of states; the permits
of services, which are given back when their holder ends, how many calls may wait for one, and how many permits there are if latency
decides; calls in a time, and calls that a service would refuse anyway. Limits are in the configuration's `admit` sections.

What the engine can't know by itself is found out here: `checks.py` (and `probe.py`) asks endpoints how they are, on the keeper's
time, `limiter.py` asks a store for the rates that all processes share, and `inbound.py` does so for calls that come in. Each is
imported only if the configuration wants it.
"""
