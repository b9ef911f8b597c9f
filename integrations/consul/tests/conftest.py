"""Which Consul is it? Both where a real one is found (`CONSUL_BIN`, or consul on the PATH), else the stand-in alone, and the run says so."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from integrations.consul.tests.agents import BINARY, RealAgent, StandInAgent

FOUND = (
    f"consul tests ran against the stand-in and {BINARY}"
    if BINARY
    else "consul tests ran against the stand-in only: no consul binary"
)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    terminalreporter.write_line(FOUND)


@pytest.fixture(
    params=["stand-in", pytest.param("consul", marks=pytest.mark.skipif(not BINARY, reason="no consul binary (CONSUL_BIN)"))]
)
def agent(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[StandInAgent | RealAgent]:
    made = StandInAgent() if request.param == "stand-in" else RealAgent(tmp_path)
    try:
        yield made
    finally:
        made.close()


@pytest.fixture
def standin() -> Iterator[StandInAgent]:
    """For what no real agent can be made to do."""
    made = StandInAgent()
    try:
        yield made
    finally:
        made.close()
