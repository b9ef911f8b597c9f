"""Again, and may we afford it?

Decided in Rust, `_native/core/src/retry.rs`: whether it's safe (nothing was written, or the call is idempotent), whether the
budget of the service allows it, and how long to wait. The drivers in `meshlib.client` only wait and send.
"""
