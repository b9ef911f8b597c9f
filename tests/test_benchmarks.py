"""Do the benchmarks run, and do they say what they measured in the agreed form? No speed is asserted: machines differ."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks.harness import Comparison, Results, Run, write_json
from benchmarks.peers import ROOT, Absent, Broken
from benchmarks.table import print_results
from benchmarks.worker import figures

KEYS = {"script", "case", "mode", "metric", "value", "unit"}


def measure(tmp_path: Path, *arguments: str) -> list[dict[str, Any]]:
    """The rows of a short real run. Skips where a peer is absent."""
    file = tmp_path / "rows.json"
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", *arguments, "--brief", "--rounds", "1", "--seconds", "0.2", "--json", str(file)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    skipped = [line for line in done.stdout.splitlines() if line.startswith("skipped: ")]
    if skipped:
        pytest.skip(skipped[0])
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads(line) for line in file.read_text().splitlines()]


def check(rows: list[dict[str, Any]], expected: dict[tuple[str, str], set[str]]) -> None:
    """Every row has the agreed keys, a positive value, and each (case, mode) its metrics."""
    found: dict[tuple[str, str], set[str]] = {}
    for row in rows:
        assert set(row) == KEYS
        assert row["value"] > 0
        found.setdefault((row["case"], row["mode"]), set()).add(row["metric"])
    assert found == expected


def test_client_measures_the_mesh_and_a_peer_over_mutual_tls(tmp_path: Path) -> None:
    """Real nginx, real certificates, a process for each mode."""
    rows = measure(tmp_path, "client", "--case", "get/mtls/c=1", "--mode", "meshlib", "--mode", "streams")
    metrics = {"rps", "cpu_us", "p50_us", "p99_us"}
    check(rows, {("get/mtls/c=1", "meshlib"): metrics, ("get/mtls/c=1", "streams"): metrics})
    assert {(row["metric"], row["unit"]) for row in rows} == {
        ("rps", "1/s"),
        ("cpu_us", "us"),
        ("p50_us", "us"),
        ("p99_us", "us"),
    }


@pytest.mark.parametrize("mode", ["meshlib-transport", "meshlib-way", "meshlib-wire"])
def test_client_measures_the_layers_of_the_mesh(tmp_path: Path, mode: str) -> None:
    """These reach into the client's inside: a change there must be followed here."""
    rows = measure(tmp_path, "client", "--case", "get/plain/c=1", "--mode", mode)
    check(rows, {("get/plain/c=1", mode): {"rps", "cpu_us", "p50_us", "p99_us"}})


@pytest.mark.parametrize("mode", ["httpx", "httpx-envoy-pair", "aiohttp", "pyreqwest"])
def test_client_measures_its_peers(tmp_path: Path, mode: str) -> None:
    """Each peer gets the same answer with the same certificates."""
    rows = measure(tmp_path, "client", "--case", "get/mtls/c=1", "--mode", mode)
    check(rows, {("get/mtls/c=1", mode): {"rps", "cpu_us", "p50_us", "p99_us"}})


def test_client_measures_threads(tmp_path: Path) -> None:
    """The blocking clients, at one thread."""
    rows = measure(tmp_path, "client", "--case", "get/mtls/t=1")
    assert {row["mode"] for row in rows} == {"meshlib-sync", "httpx-sync", "pyreqwest-sync"}


def test_handshake_measures_both_sides_full_and_resumed(tmp_path: Path) -> None:
    """A run ends with an error if a handshake is not of the kind that is measured."""
    cases = [(f"{kind}/mtls/c=1", mode) for kind in ("full", "resumed") for mode in ("meshlib", "ssl")]
    check(measure(tmp_path, "handshake"), {key: {"cpu_us", "p50_us"} for key in cases})


def test_decide_measures_a_call_and_its_parts(tmp_path: Path) -> None:
    """The small case; the large one has the same code."""
    rows = measure(tmp_path, "decide", "--case", "call/1-route-10-endpoints")
    assert {row["mode"] for row in rows} == {"meshlib", "round_robin", "begin", "next", "head", "finish"}
    assert {row["unit"] for row in rows if row["metric"] == "ns"} == {"ns"}


@pytest.mark.parametrize("server", ["uvicorn", "gunicorn"])
def test_server_measures_the_mesh_before_an_application(tmp_path: Path, server: str) -> None:
    """wrk counts seconds: this takes some."""
    rows = measure(tmp_path, "server", "--case", f"{server}/plain/c=32", "--mode", "meshlib")
    check(rows, {(f"{server}/plain/c=32", "meshlib"): {"rps", "cpu_us", "p50_us", "p99_us"}})


def children(pid: int) -> set[int]:
    found = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                if int((entry / "stat").read_text().rpartition(")")[2].split()[1]) == pid:
                    found.add(int(entry.name))
    return found


def test_nothing_outlives_a_run_that_is_told_to_stop(tmp_path: Path) -> None:
    """SIGTERM in the middle of a measurement ends the peers and the worker, and clears the folder."""
    run = subprocess.Popen(
        [sys.executable, "-m", "benchmarks", "client", "--case", "get/plain/c=1", "--mode", "streams", "--seconds", "60"],
        cwd=ROOT, env={**os.environ, "TMPDIR": str(tmp_path)}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        end = time.monotonic() + 30
        while len(started := children(run.pid)) < 2:
            if run.poll() is not None and "skipped: " in (said := run.stdout.read() if run.stdout else ""):
                pytest.skip(said.partition("skipped: ")[2])
            assert run.poll() is None and time.monotonic() < end
            time.sleep(0.02)
        run.terminate()
        assert run.wait(30) == 128 + signal.SIGTERM
    finally:
        run.kill()
        run.wait()
        if run.stdout is not None:
            run.stdout.close()
    assert [pid for pid in started if Path(f"/proc/{pid}").exists()] == []
    assert list(tmp_path.iterdir()) == []


def results_of(**modes: Any) -> Results:
    """Three rounds of scripted runs; a mode is a list of values, or an exception."""

    def run(mode: str, script: Any) -> Run:
        values = iter(script) if isinstance(script, list) else None

        def take(seconds: float) -> dict[str, float]:
            if values is None:
                raise script
            return {"rps": next(values)}

        return Run("get/plain/c=1", mode, take)

    results = Results("client", "rps")
    results.measure([run(mode, script) for mode, script in modes.items()], 3, 0.0, random.Random(1))
    return results


def test_values_are_medians_and_ratios_are_taken_round_by_round() -> None:
    """A round in which the machine was slow for both changes no ratio."""
    results = results_of(meshlib=[200.0, 20.0, 300.0], peer=[100.0, 10.0, 100.0])
    case = "get/plain/c=1"
    assert results.median(case, "meshlib", "rps") == 200.0
    assert results.spread(case, "peer", "rps") == 0.45
    assert results.ratio((case, "meshlib"), (case, "peer"), "rps") == 2.0
    assert results.difference((case, "meshlib"), (case, "peer"), "rps") == 100.0
    assert [(row["mode"], row["value"]) for row in results.rows()] == [("meshlib", 200.0), ("peer", 100.0)]


def test_an_absent_peer_is_skipped_and_a_broken_one_fails(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Both say why, neither leaves a row, and the rest is measured."""
    results = results_of(meshlib=[1.0, 1.0, 1.0], gone=Absent("wrk is not installed"), bad=Broken("exit code 1: boom"))
    print_results(results, [Comparison("one", 1.5, "≥ 1")], has_ratios=True)
    said = capsys.readouterr().out
    assert "skipped: get/plain/c=1 gone: wrk is not installed" in said
    assert "FAILED: get/plain/c=1 bad: exit code 1: boom" in said
    assert list(results.broken) == [("get/plain/c=1", "bad")]
    write_json(tmp_path / "rows.json", [results])
    assert [json.loads(line)["mode"] for line in (tmp_path / "rows.json").read_text().splitlines()] == ["meshlib"]


def test_figures_are_of_all_calls() -> None:
    """A hundred calls of 1 to 100 ms in two seconds, half of it on the CPU."""
    from array import array

    found = figures(array("d", [n / 1000 for n in range(1, 101)]), 2.0, 1.0)
    assert found == {"rps": 50.0, "cpu_us": 10_000.0, "p50_us": 51_000.0, "p99_us": 100_000.0}


def test_start_prints_what_the_import_costs(tmp_path: Path) -> None:
    """Rows for the import on top of httpx and grpc, and for those two."""
    check(measure(tmp_path, "start"), {("import", mode): {"ms"} for mode in ("meshlib", "bare")})
