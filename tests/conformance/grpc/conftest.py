"""Who are the peers of the matrix? Servers in processes of their own and what stands between, each started when a test first needs it."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator

import pytest

pytest.importorskip("grpc_tools", reason="the protocol is compiled by grpcio-tools, which isn't installed")

from tests.conformance.grpc.proxyless import XdsClient, xds_client
from tests.interop.proxies import proxied
from tests.interop.town import Town


class Peers:
    """All of them, for one session."""

    def __init__(self, town: Town, stack: contextlib.ExitStack) -> None:
        self.town = town
        self._stack = stack

    @functools.cache
    def server(self, kind: str, mode: str = "") -> int:
        return self._stack.enter_context(self.town.server(kind, mode))

    @functools.cache
    def mesh(self, mode: str, port: int) -> object:
        return self._stack.enter_context(self.town.mesh(mode, f"127.0.0.1:{port}"))

    @functools.cache
    def inward(self, kind: str) -> int:
        """Envoy in front of a bare server."""
        return self._stack.enter_context(proxied(self.town, inward=[self.server(kind)]))[0]

    @functools.cache
    def outward(self, kind: str) -> int:
        """Envoy beside a bare client, on its way to a server of the mesh."""
        return self._stack.enter_context(proxied(self.town, outward=[self.server(kind, "enforce")]))[0]

    @functools.cache
    def xds(self, kind: str, mode: str) -> XdsClient:
        return self._stack.enter_context(xds_client(self.town, self.server(kind, mode), is_mutual=mode == "enforce"))


@pytest.fixture(scope="session")
def peers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Peers]:
    with contextlib.ExitStack() as stack:
        yield Peers(Town(tmp_path_factory.mktemp("interop")), stack)
