"""Again, and may we afford it?

Decided in Rust, `_native/core/src/retry.rs` and the folder beside it: whether it's safe (nothing was written, or the call is
idempotent), whether nobody further up is repeating already, whether the budget of the service allows it, how long to wait, and from
when on a call is slow enough for a hedge. The drivers in `meshlib.client` only wait and send.

What applications bring of their own is here: `tenacity.py` asks the strategies of tenacity, which can make a call wait differently or
stop earlier, and `fallback.py` says what the caller gets where every attempt has failed. Neither decides on an attempt.
"""
