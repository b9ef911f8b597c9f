"""May it go now?

Decided in Rust, `_native/core/src/admit.rs`: the breaker of each endpoint as a table of states, and the permits of services and
endpoints, which are given back when their holder ends. Limits are in the configuration's `admit` sections.
"""
