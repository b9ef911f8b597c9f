"""Does `make interop` tell the truth: a failure as a failure, a peer that isn't there as skipped, and by its exit code?

With a peer of another language that is none: programs of a few lines, so that nothing has to be built.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
from pathlib import Path

import pytest

from tests.interop import matrix
from tests.interop.expected import SCENARIOS
from tests.interop.matrix import Told, try_out
from tests.interop.peers import Peer, Secured
from tests.interop.table import as_json, as_text
from tests.support import PYTHON, ROOT

SOCKET = "import socket, sys; s = socket.create_server(('127.0.0.1', int(sys.argv[1]))); s.accept(); s.accept()"


class Liar(Peer):
    """Its client passes one scenario and fails the others; its server isn't one of gRPC."""

    name, version = "liar", "1"
    notes = ("it lies",)

    def build(self, cache: Path, run: matrix.Run) -> None:
        run(cache, "the liar", [PYTHON, "-c", "pass"], {})

    def client(self, port: int, scenario: str, secured: Secured | None = None) -> list[str]:
        return [PYTHON, "-S", "-c", f"raise SystemExit({scenario!r} != 'ping_pong' and 'it said so')"]

    def server(self, port: int, secured: Secured | None = None) -> list[str]:
        return [PYTHON, "-c", SOCKET, str(port)]


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Told:
    """Of the liar's client alone, against one server."""
    monkeypatch.setattr(matrix, "_outward", lambda *_: [])
    real = matrix._inward
    monkeypatch.setattr(matrix, "_inward", lambda *given: itertools.islice(real(*given), 1))
    told = Told()
    try_out(Liar(), tmp_path, tmp_path, told)
    return told


def test_a_scenario_that_fails_is_shown_with_its_reason(told: Told) -> None:
    """In the table, in the JSON, and in the count that the exit code goes by."""
    assert told.failures == len(SCENARIOS) - 1
    text = as_text(told)
    rows = {line.split()[0]: line.split()[1:] for line in text.splitlines() if line.split()[:1] and line.split()[0] in SCENARIOS}
    assert rows == {scenario: ["pass" if scenario == "ping_pong" else "FAIL"] for scenario in SCENARIOS}
    assert "FAILED their client, our server, aio plain, large_unary: AssertionError: exit code 1: it said so" in text
    assert "note: it lies" in text
    assert text.endswith(f"1 of {len(SCENARIOS)} passed")
    results = json.loads(as_json(told))["results"]
    assert {result["scenario"] for result in results if result["passed"]} == {"ping_pong"}


def test_a_client_of_the_mesh_that_fails_is_counted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Against a server that accepts and hangs up."""
    monkeypatch.setattr(matrix, "_inward", lambda *_: [])
    monkeypatch.setattr(matrix, "SCENARIOS", ("empty_unary",))
    real = matrix._outward
    # The second way is the blocking client's, in plain text.
    monkeypatch.setattr(matrix, "_outward", lambda *given: itertools.islice(real(*given), 1, 2))
    told = Told()
    try_out(Liar(), tmp_path, tmp_path, told)
    assert [(result.way, bool(result.failure)) for result in told.results] == [("sync plain", True)]
    assert told.failures == 1


def test_a_peer_that_cannot_be_built_is_a_failure(tmp_path: Path) -> None:
    """With the words of what failed."""

    class Broken(Liar):
        def build(self, cache: Path, run: matrix.Run) -> None:
            run(cache, "the liar", [PYTHON, "-c", "raise SystemExit('no such module')"], {})

    told = Told()
    try_out(Broken(), tmp_path, tmp_path, told)
    assert told.failures == 1
    assert "no such module" in as_text(told)


def test_a_peer_without_its_tools_is_skipped_with_the_reason(tmp_path: Path) -> None:
    """And that is no failure."""
    command = [PYTHON, "-m", "tests.interop", "--cache", str(tmp_path), "--json", str(tmp_path / "told.json")]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PATH": str(tmp_path)}, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert "grpc-go 1.85.0: skipped, not installed: go" in done.stdout
    assert [peer["skipped"] for peer in json.loads((tmp_path / "told.json").read_text())["peers"]] == [
        "not installed: go",
        "not installed: java, mvn",
    ]
