"""Which backend is this call for, and under which policy?

Decided in Rust, `_native/core/src/route.rs`: routes in the order of the configuration, the first whose path, method and headers
all match, then one backend by weight. What a user writes is typed in `meshlib.config`. Python adds nothing to a request here.
"""
