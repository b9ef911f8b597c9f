"""Every kind of server, each in a process of its own, in mode enforce and in mode permissive, for all tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.conformance.server.host import KINDS
from tests.conformance.server.servers import Server, World, running


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module", params=KINDS)
def enforcing(request: pytest.FixtureRequest, world: World) -> Iterator[Server]:
    with running(request.param, "enforce", world) as server:
        yield server


@pytest.fixture(scope="module", params=KINDS)
def permissive(request: pytest.FixtureRequest, world: World) -> Iterator[Server]:
    with running(request.param, "permissive", world) as server:
        yield server
