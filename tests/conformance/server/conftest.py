"""Every kind of server, each in a process of its own in each of its modes, for all tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.conformance.server.kinds import places
from tests.conformance.server.servers import Fleet
from tests.conformance.server.world import World

# Before they are imported: a behaviour that fails should say what it saw.
pytest.register_assert_rewrite("tests.conformance.server.behaviours")


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="session")
def fleet(world: World) -> Iterator[Fleet]:
    made = Fleet(world, places())
    yield made
    made.close()
