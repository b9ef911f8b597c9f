"""Which backend is this call for, and under which policy?

Decided in Rust, `_native/core/src/route.rs`: routes in the order of the configuration, the first whose path, method and headers
all match, then one backend by weight; a call that asks for labels gets the endpoints that carry them in place of the backend. The
variables of a route's template can be keys of a consistent hash. What a user writes is typed in `meshlib.config`. Python adds nothing
to a request here.
"""
