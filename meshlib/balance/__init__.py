"""Which endpoint of the backend?

Decided in Rust, `_native/core/src/balance.rs`: peak EWMA over two random choices, or round robin. What it may choose from is
fed by `meshlib.discover`; what it learns comes from the drivers in `meshlib.client`.
"""
