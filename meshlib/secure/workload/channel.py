"""How is FetchX509SVID called?

Over gRPC, with the header that the standard demands, on a channel of its own: one that tries again soon after the agent was away, and
that finds out within about a minute (gRPC sends pings no faster) that an agent hangs. Messages are bytes here; `read.py` reads them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import grpc

from . import read

if TYPE_CHECKING:
    from .watch import Stream

METHOD: Final = "/SpiffeWorkloadAPI/FetchX509SVID"
HEADERS: Final = (("workload.spiffe.io", "true"),)
_OPTIONS: Final = (
    # Milliseconds. gRPC's own pause between connections would be up to two minutes, and the agent is on this machine.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
    # An agent that was stopped accepts connections all the same: its kernel does.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.max_receive_message_length", read.LONGEST),
    ("grpc.enable_http_proxy", 0),
    ("grpc.use_local_subchannel_pool", 1),
)


class _Connection:
    def __init__(self, address: str) -> None:
        self._channel = grpc.insecure_channel(address, options=_OPTIONS)
        self._method = self._channel.unary_stream(METHOD, request_serializer=None, response_deserializer=None)

    def fetch(self) -> Stream:
        call: Stream = self._method(b"", metadata=HEADERS)
        return call

    def close(self) -> None:
        self._channel.close()


def connect(address: str) -> _Connection:
    """A channel to the agent at a checked address; nothing is connected before the first call."""
    return _Connection(address)
