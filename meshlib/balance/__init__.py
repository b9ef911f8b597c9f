"""Which endpoint of the backend?

Decided in Rust, `_native/core/src/balance.rs` and the folder beside it: of two drawn at random the one with less to wait for
(peak EWMA, the default) or less in flight, in turn or by chance by weight, or the home of a key (ring hash, Maglev); how zones share
the calls, how an endpoint warms up, and what endpoints say of their own load. What it may choose from is fed by `meshlib.discover`;
what it learns comes from the drivers in `meshlib.client`; whom it must not choose is the word of `admit`. Python adds nothing to a
choice.
"""
