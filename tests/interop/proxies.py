"""How does a real Envoy stand between a client and a server of gRPC? HTTP/2 on both sides, with the mesh's certificates on one of them.

In front of a server that knows nothing of the mesh it takes in mutual TLS as `interop`; beside a client that knows nothing of it, it sends
mutual TLS as `envoy`. Both sides check SPIFFE IDs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from tests.interop.town import SERVICE, Town, spiffe_id
from tests.support import free_port
from tests.wire.envoy import cluster, envoy, listener, tls

_OPTIONS = "type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions"
HTTP2 = {
    "typed_extension_protocol_options": {
        "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
            "@type": _OPTIONS,
            "explicit_http_config": {"http2_protocol_options": {}},
        }
    }
}


@contextlib.contextmanager
def proxied(town: Town, *, inward: Sequence[int] = (), outward: Sequence[int] = (), as_service: str = "") -> Iterator[list[int]]:
    """One Envoy with a listener for each server's port; gives their ports, in this order.

    `inward`: from mutual TLS to a server in plain text. `outward`: from plain text to a server of the mesh. `as_service`: whose
    certificate Envoy shows, if not the right one.
    """
    listeners, clusters, ports = [], [], []
    for number, (port, is_inward) in enumerate([*((port, True) for port in inward), *((port, False) for port in outward)]):
        local = free_port()
        while local in ports:
            local = free_port()
        ports.append(local)
        secured = _secured(town, as_service, is_inward=is_inward)
        listeners.append(listener(local, {"route": {"cluster": f"c{number}"}}, secured if is_inward else None))
        clusters.append({**cluster(f"c{number}", port, None if is_inward else secured), **HTTP2})
    with envoy(town.folder, listeners, clusters):
        yield ports


def _secured(town: Town, as_service: str, *, is_inward: bool) -> dict[str, Any]:
    """Envoy's side of mutual TLS."""
    if is_inward:
        socket = tls(town.identities, as_service or SERVICE, spiffe_id("caller"), is_server=True)
    else:
        socket = tls(town.identities, as_service or "envoy", spiffe_id(SERVICE), is_server=False)
    socket["typed_config"]["common_tls_context"]["alpn_protocols"] = ["h2"]
    return socket
