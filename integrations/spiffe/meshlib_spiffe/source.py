"""How is the identity had from SPIRE, by the library `spiffe`?

The mesh itself knows how a Workload API is listened to, and what ends the use of an identity (`meshlib.secure.workload`). Here are the
settings for agents that are not meshlib's own, and the library's channel and messages. Its own watcher isn't used: it hides hints,
revocations and the status of a refusal.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any

from spiffe import WorkloadApiClient
from spiffe._proto import workload_pb2
from spiffe.errors import PySpiffeError

from meshlib.errors import ConfigError, IdentityError
from meshlib.secure.workload import TIMEOUT, WorkloadSource

SETTINGS = {"socket", "hint", "uid", "timeout"}
VARIABLE = "SPIFFE_ENDPOINT_SOCKET"


class _Stream:
    """The messages of one call."""

    def __init__(self, call: Any) -> None:
        self._call = call

    def __iter__(self) -> Iterator[workload_pb2.X509SVIDResponse]:
        yield from self._call

    def cancel(self) -> None:
        self._call.cancel()


class _Client:
    """The library's channel, which adds the header that the standard demands."""

    def __init__(self, address: str) -> None:
        try:
            self._client = WorkloadApiClient(address)
        except PySpiffeError as error:
            raise IdentityError(f"the library spiffe can't ask the Workload API at {address}: {error}.") from None

    def fetch(self) -> _Stream:
        return _Stream(self._client._spiffe_workload_api_stub.FetchX509SVID(workload_pb2.X509SVIDRequest()))

    def close(self) -> None:
        self._client.close()


def open_source(settings: Mapping[str, Any], *, spiffe_id: str, trust_domain: str) -> WorkloadSource:
    """The factory behind the entry point. `settings` are those of `secure.identity` in mesh.yaml."""
    unknown = sorted(settings.keys() - SETTINGS)
    if unknown:
        raise ConfigError(
            f"secure.identity: unknown settings {', '.join(unknown)}.", hint=f"Known: {', '.join(sorted(SETTINGS))}."
        )
    socket, hint, uid, timeout = (settings.get(name) for name in ("socket", "hint", "uid", "timeout"))
    socket = socket if socket is not None else os.environ.get(VARIABLE, "")
    for name, value, kind in (("socket", socket, str), ("hint", hint, str), ("uid", uid, int)):
        if value is not None and (not isinstance(value, kind) or isinstance(value, bool)):
            raise ConfigError(f"secure.identity.{name} must be {'a text' if kind is str else 'a number'}.")
    if timeout is not None and (not isinstance(timeout, int | float) or isinstance(timeout, bool) or not 0 < timeout <= 300):
        raise ConfigError("secure.identity.timeout must be a number of seconds, at most 300.")
    seconds = TIMEOUT if timeout is None else float(timeout)
    return WorkloadSource(socket, spiffe_id, hint=hint or "", uid=uid, timeout=seconds, connect=_Client)
