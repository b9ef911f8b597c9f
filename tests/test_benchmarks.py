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

from benchmarks import (
    abuse,
    agent,
    client,
    decide,
    discover,
    etcd,
    grpc_calls,
    grpc_peers,
    guard,
    handshake,
    memory,
    native,
    receiver,
    server,
    swap,
)
from benchmarks.goals import GOALS, Goal, judged
from benchmarks.harness import Comparison, Results, Run, in_process, in_processes, write_json
from benchmarks.machine import clock_of
from benchmarks.peers import ROOT, Absent, Broken, Peers
from benchmarks.table import print_goals, print_results
from benchmarks.worker import figures

KEYS = {"script", "case", "mode", "metric", "value", "unit"}


def measure(tmp_path: Path, *arguments: str) -> list[dict[str, Any]]:
    """The rows of a short real run. Skips where a peer is absent."""
    file = tmp_path / "rows.json"
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "--brief", "--rounds", "1", "--seconds", "0.2", "--json", str(file), *arguments],
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
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    # What is wanted of these figures is no matter of a test.
    return [row for row in rows if "goal" not in row]


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


def test_client_measures_two_worker_processes_with_work_of_their_own(tmp_path: Path) -> None:
    """Their figures are put together as those of one mode."""
    rows = measure(tmp_path, "client", "--case", "get-2-workers/mtls/c=1")
    metrics = {"rps", "cpu_us", "p50_us", "p99_us"}
    check(rows, {("get-2-workers/mtls/c=1", mode): metrics for mode in ("meshlib", "pyreqwest")})


def test_client_measures_large_bodies(tmp_path: Path) -> None:
    """A mebibyte that does not come whole ends the run with an error."""
    rows = measure(tmp_path, "client", "--case", "get-1MiB/mtls/c=1")
    assert {row["mode"] for row in rows} == {"meshlib", "aiohttp", "pyreqwest", "streams"}


def test_client_measures_what_the_layers_of_the_mesh_add(tmp_path: Path) -> None:
    """Both sides by turns in one process."""
    rows = measure(tmp_path, "client", "--case", "added/mtls/c=1")
    check(rows, {("added/mtls/c=1", mode): {"cpu_us", "added_us"} for mode in ("meshlib", "meshlib-way")})


def test_handshake_measures_both_sides_full_and_resumed(tmp_path: Path) -> None:
    """A run ends with an error if a handshake is not of the kind that is measured."""
    cases = [(f"{kind}/mtls/c=1", mode) for kind in ("full", "resumed") for mode in ("meshlib", "ssl")]
    check(measure(tmp_path, "handshake"), {key: {"cpu_us", "p50_us"} for key in cases})


def test_decide_measures_a_call_and_its_parts(tmp_path: Path) -> None:
    """The small case; the large one has the same code."""
    modes = ("meshlib", "round_robin", "begin", "next", "head", "finish")
    rows = measure(tmp_path, "decide", "--case", "call/1-route-10-endpoints", *(f"--mode={mode}" for mode in modes))
    assert {row["mode"] for row in rows} == set(modes)
    assert {row["unit"] for row in rows if row["metric"] == "ns"} == {"ns"}


@pytest.mark.parametrize("what", swap.SIZES)
def test_swap_holds_calls_beside_it_against_those_between(what: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A small mesh, in this process; what the endpoints have counted must be there after it, or the run breaks."""
    monkeypatch.setattr(swap, "SIZES", {"routes": (20, 2, 2), "endpoints": (1, 2, 40)})
    with contextlib.ExitStack() as stack:
        config = Peers(tmp_path, stack).mesh([], is_private=False)
        found = swap.work(what, config, 0.05)
    assert set(found) == {"ms", "p99_us", "added_us", "most_us"}
    assert found["most_us"] >= found["p99_us"] > 0


@pytest.fixture(scope="module")
def examples() -> None:
    """Those of the engine, built: a minute where nobody has done it yet."""
    try:
        native.built()
    except Absent as reason:
        pytest.skip(str(reason))


@pytest.mark.timeout(600)
@pytest.mark.usefixtures("examples")
@pytest.mark.parametrize("mode", ["meshlib-agent", "envoy-pair"])
def test_agent_measures_two_agents_and_two_envoys(tmp_path: Path, mode: str) -> None:
    """Under wrk, over mutual TLS and HTTP/2, with nginx behind a UNIX socket."""
    rows = measure(tmp_path, "agent", "--case", "get/mtls/c=64", "--mode", mode)
    check(rows, {("get/mtls/c=64", mode): {"rps", "cpu_us", "p50_us", "p99_us"}})


def test_agent_measures_what_delegation_costs_and_saves(tmp_path: Path) -> None:
    """By a real agent: a call beside one without it, and the connections of eight workers."""
    rows = measure(tmp_path, "agent", "--case", "delegated/*", "--case", "shared/mtls")
    found = {(row["case"], row["mode"], row["metric"]): row["value"] for row in rows}
    assert set(found) == {
        ("delegated/mtls/c=1", "meshlib-agent", "p50_us"),
        ("delegated/mtls/c=1", "meshlib-agent", "added_us"),
        ("shared/mtls", "meshlib", "connections"),
        ("shared/mtls", "meshlib-agent", "connections"),
    }
    # This is no speed: it is what sharing means.
    assert (found["shared/mtls", "meshlib", "connections"], found["shared/mtls", "meshlib-agent", "connections"]) == (400, 50)


@pytest.mark.parametrize(("attack", "told"), [("slow-body", "freed_s"), ("continuation", "cut")])
def test_abuse_measures_what_attackers_cost_the_others(tmp_path: Path, attack: str, told: str) -> None:
    """Those who share their agent, their machine, or neither; and the attackers are met."""
    rows = measure(tmp_path, "abuse", "--case", f"{attack}/mtls", "--seconds", "0.9")
    found = {(row["mode"], row["metric"]): row["value"] for row in rows if row["case"] == f"{attack}/mtls"}
    assert {key for key in found if key[1].endswith("_us")} == {
        (mode, metric) for mode in ("here", "elsewhere", "quiet") for metric in ("p50_us", "p99_us")
    }
    assert min(found["here", told], found["elsewhere", told]) > 0


def test_etcd_measures_how_soon_a_change_is_used(tmp_path: Path) -> None:
    """Beside a bare watcher of the same etcd."""
    rows = measure(tmp_path, "etcd", "--seconds", "3")
    assert {(row["case"], row["mode"]) for row in rows} == {
        ("change/plain/c=1", "meshlib"),
        ("change/plain/c=1", "etcd"),
        ("added/plain/c=1", "meshlib"),
    }


def test_discover_measures_endpoints_that_change(tmp_path: Path) -> None:
    """Picks, the loop, and what the endpoints hold; without changes nothing was applied."""
    rows = measure(tmp_path, "discover", "--seconds", "1")
    found = {(row["mode"], row["metric"]): row["value"] for row in rows}
    assert {metric for _, metric in found} >= {"p50_us", "p99_us", "first_us", "apply_ms", "stall_ms", "stale_ms", "rss_mb"}
    assert found["meshlib", "apply_ms"] > 0.0
    assert found["still", "apply_ms"] == 0.0
    assert 1.0 < found["meshlib", "rss_mb"] < 50.0


def test_decide_measures_the_engine_alone(tmp_path: Path) -> None:
    """A call, what it grows by, and a swap, without Python."""
    cases = ("call/1-route-10-endpoints", "growth/maglev/1k-endpoints", "swap/10k-endpoints")
    rows = measure(tmp_path, "decide", "--mode", "meshlib-rust", *(f"--case={case}" for case in cases))
    assert {(row["case"], row["metric"]) for row in rows} == {
        ("call/1-route-10-endpoints", "ns"),
        ("growth/maglev/1k-endpoints", "ns"),
        ("growth/maglev/1k-endpoints", "growth"),
        *(("swap/10k-endpoints", metric) for metric in ("ms", "p50_us", "p99_us", "added_us", "most_us")),
    }


@pytest.mark.timeout(600)
@pytest.mark.usefixtures("examples")
def test_memory_measures_an_endpoint_and_a_service(tmp_path: Path) -> None:
    """Bytes of the allocator and of the kernel; the tables of a hash are the difference between the policies."""
    rows = measure(tmp_path, "memory", "--case", "endpoint*", "--case", "service")
    cases = ("endpoint/peak_ewma", "endpoint/ring_hash", "endpoint/maglev", "endpoint-used/peak_ewma", "service")
    check(rows, {(case, "meshlib-rust"): {"bytes", "rss_bytes"} for case in cases})
    bytes_of = {row["case"]: row["value"] for row in rows if row["metric"] == "bytes"}
    assert bytes_of["endpoint/peak_ewma"] < bytes_of["endpoint/ring_hash"] < bytes_of["endpoint/maglev"]


def test_an_example_that_fails_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its last word; and without cargo the figures are absent."""
    monkeypatch.setattr(native, "built", lambda: {"decide": sys.executable})
    with pytest.raises(Broken, match=r"exit code 1: ZeroDivisionError"):
        native.by_example("decide", "-c", "1 / 0", is_timed=False)(0.0)
    monkeypatch.undo()
    monkeypatch.setattr(native.shutil, "which", lambda name: None)
    native.built.cache_clear()
    with pytest.raises(Absent, match="cargo is not installed"):
        native.by_example("decide")(0.0)


@pytest.mark.parametrize("case", list(guard.MODES))
def test_guard_measures_the_mesh_and_its_peers(tmp_path: Path, case: str) -> None:
    """Every mode of a case calls the same function."""
    rows = measure(tmp_path, "guard", "--case", case)
    assert {(row["mode"], row["unit"]) for row in rows} == {(mode, "ns") for mode in guard.MODES[case]}


@pytest.mark.parametrize("what", list(server.MODES))
def test_server_measures_the_mesh_before_an_application(tmp_path: Path, what: str) -> None:
    """wrk counts seconds: this takes some. What the spans cost is left to the test below."""
    mode = "bare" if what == "uvicorn-otlp" else "meshlib-no-sdk"
    rows = measure(tmp_path, "server", "--case", f"{what}/plain/c=32", "--mode", mode)
    check(rows, {(f"{what}/plain/c=32", mode): {"rps", "cpu_us", "p50_us", "p99_us"}})


@pytest.mark.parametrize("mode", ["meshlib", "otel", "otel-lean"])
def test_server_counts_the_spans_that_have_arrived(tmp_path: Path, mode: str) -> None:
    """One for each call from the mesh, three from OpenTelemetry's middleware as it comes; wrk leaves some tens of calls half-way."""
    rows = measure(tmp_path, "server", "--case", "uvicorn-otlp/plain/c=32", "--mode", mode)
    found = {row["metric"]: row["value"] for row in rows}
    assert set(found) == {"rps", "cpu_us", "p50_us", "p99_us", "receiver_us", "spans", "dropped"}
    assert found["spans"] == pytest.approx(3.0 if mode == "otel" else 1.0, rel=0.2)


@pytest.mark.parametrize("mode", ["meshlib", "ssl"])
def test_server_measures_connections_of_both_kinds(tmp_path: Path, mode: str) -> None:
    """A run ends with an error if a handshake is not of the kind that is measured."""
    rows = measure(tmp_path, "server", "--case", "connect-*", "--mode", mode)
    assert {(row["case"], row["metric"]) for row in rows} == {
        (f"connect-{kind}/mtls/c=1", metric) for kind in ("full", "resumed") for metric in ("cpu_us", "client_us", "p50_us")
    }
    assert all(row["value"] > 0 for row in rows if row["metric"] == "p50_us")


@pytest.mark.parametrize("mode", ["meshlib-no-sdk", "ssl"])
def test_server_measures_connections_that_are_kept(tmp_path: Path, mode: str) -> None:
    """By the mesh's own client, also where the other side is not the mesh."""
    rows = measure(tmp_path, "server", "--case", "kept/*", "--mode", mode)
    check(rows, {("kept/mtls/c=32", mode): {"rps", "cpu_us", "client_us", "p50_us", "p99_us"}})


def test_spans_are_not_taken_for_sent_where_there_is_no_receiver(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The modes that make spans are absent then."""
    monkeypatch.setattr(receiver, "find_spec", lambda name: None)
    monkeypatch.setattr(receiver, "ROOT", tmp_path)
    with contextlib.ExitStack() as stack, pytest.raises(Absent, match=r"no OTLP receiver: rotel is not installed"):
        _ = Peers(tmp_path, stack).receiver


CALLED = {"rps", "cpu_us", "p50_us", "p99_us"}


@pytest.mark.parametrize("case", [case for case in grpc_calls.PLAIN if case.startswith("unary") and case.endswith("=1")])
def test_grpc_calls_measures_the_mesh_and_grpcio_in_plain_text(tmp_path: Path, case: str) -> None:
    """nginx answers; a message that does not come whole, or a status but OK, ends the run with an error."""
    check(measure(tmp_path, "grpc_calls", "--case", case), {(case, mode): CALLED for mode in grpc_calls.PLAIN[case]})


@pytest.mark.parametrize("case", ["unary-sync/plain/c=64", "stream-aio/plain/c=1", "chat-aio/plain/c=1"])
def test_grpc_calls_measures_threads_and_streams(tmp_path: Path, case: str) -> None:
    """Of the mesh alone: grpcio goes the same way through the script."""
    check(measure(tmp_path, "grpc_calls", "--case", case, "--mode", "meshlib"), {(case, "meshlib"): CALLED})


@pytest.mark.parametrize("case", [*(case for case in grpc_calls.PLAIN if case.startswith("added")), *grpc_calls.BY_TURNS])
def test_grpc_calls_measures_what_the_mesh_adds_by_turns(tmp_path: Path, case: str) -> None:
    """Both channels in one process, or both servers; what it adds may be less than nothing in so short a time."""
    rows = measure(tmp_path, "grpc_calls", "--case", case)
    assert {(row["mode"], row["metric"]) for row in rows} == {("meshlib", metric) for metric in ("cpu_us", "added_us", "ratio")}


@pytest.mark.parametrize("mode", ["meshlib", "bare", "envoy-pair"])
def test_grpc_calls_measures_mutual_tls(tmp_path: Path, mode: str) -> None:
    """Of the mesh, of grpcio itself, and of two sidecars."""
    case = "unary-aio/mtls/c=1"
    check(measure(tmp_path, "grpc_calls", "--case", case, "--mode", mode), {(case, mode): CALLED})


@pytest.mark.parametrize("case", list(grpc_calls.SERVED))
def test_grpc_calls_measures_servers(tmp_path: Path, case: str) -> None:
    """With and without the mesh, by the same caller, whose CPU is told beside the server's."""
    expected = {(case, mode): {*CALLED, "client_us"} for mode in grpc_calls.SERVED[case]}
    check(measure(tmp_path, "grpc_calls", "--case", case, "--seconds", "0.5"), expected)


def test_grpc_calls_measures_grpcio_with_its_own_balancer(tmp_path: Path) -> None:
    """Who answers is known by a control plane only."""
    case = "unary-aio/plain/c=64"
    check(measure(tmp_path, "grpc_calls", "--case", case, "--mode", "grpc-xds"), {(case, "grpc-xds"): CALLED})


def test_grpcio_has_no_balancer_where_there_is_no_control_plane(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The mode is absent then, with the package that is missing."""
    monkeypatch.setattr(grpc_peers, "ROOT", tmp_path)
    with contextlib.ExitStack() as stack, pytest.raises(Absent, match="xds-protos is not installed"):
        _ = grpc_peers.GrpcPeers(Peers(tmp_path, stack)).bootstrap


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
    # They are init's children now, which collects them when it comes to it.
    end = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in started) and time.monotonic() < end:
        time.sleep(0.02)
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
    assert [said.count(f" {word} |") for word in ("absent", "failed")] == [1, 1]
    write_json(tmp_path / "rows.json", results.rows())
    assert [json.loads(line)["mode"] for line in (tmp_path / "rows.json").read_text().splitlines()] == ["meshlib"]


def test_figures_are_of_all_calls() -> None:
    """A hundred calls of 1 to 100 ms in two seconds, half of it on the CPU."""
    from array import array

    found = figures(array("d", [n / 1000 for n in range(1, 101)]), 2.0, 1.0)
    assert found == {"rps": 50.0, "cpu_us": 10_000.0, "p50_us": 51_000.0, "p99_us": 100_000.0}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs Linux")
def test_the_cpu_clock_of_another_process_counts_its_work_and_not_ours() -> None:
    """One that sleeps uses next to nothing while we work; our own clock tells what we did."""
    with subprocess.Popen(["sleep", "60"]) as other:
        before, own = clock_of(other.pid), (clock_of(os.getpid()), time.process_time())
        while time.process_time() - own[1] < 0.05:
            pass
        spent, said = time.process_time() - own[1], clock_of(os.getpid()) - own[0]
        assert clock_of(other.pid) - before < 0.01
        other.kill()
    assert said == pytest.approx(spent, abs=0.01)


def test_start_prints_what_the_import_costs(tmp_path: Path) -> None:
    """Rows for the import on top of httpx and grpc, and for those two."""
    check(measure(tmp_path, "start"), {("import", mode): {"ms"} for mode in ("meshlib", "bare")})


# --- goals


CASE = "get/plain/c=1"


def goal(mode: str, peer: str, relation: str, wanted: float | None) -> Goal:
    return Goal(CASE, mode, peer, "rps", relation, wanted)


def test_a_goal_is_judged_by_the_median_of_the_ratios_of_each_round() -> None:
    """The medians of the modes themselves would say 2, and miss the second one."""
    results = results_of(meshlib=[200.0, 20.0, 900.0], peer=[100.0, 5.0, 100.0])
    goals = [goal("meshlib", "peer", "≥", 4.0), goal("meshlib", "peer", "≥", 4.1), goal("meshlib", "peer", "≤", 4.0)]
    found = judged([results], [*goals, goal("meshlib", "peer", "≤", 3.9), goal("meshlib", "peer", "≥", None)])
    assert [verdict.state for verdict in found] == ["met", "missed", "met", "missed", "told"]
    assert [(v.figure, v.low, v.high) for v in found] == [(4.0, 2.0, 9.0)] * 5


def test_a_goal_of_another_case_takes_the_peer_from_there() -> None:
    """As the mesh over mutual TLS against a peer without any."""
    results = results_of(meshlib=[10.0, 10.0, 10.0])
    results.values["get/other/c=1", "peer"] = {"rps": [5.0, 5.0, 5.0]}
    results.values[CASE, "peer"] = {"rps": [1.0, 1.0, 1.0]}
    [verdict] = judged([results], [Goal(CASE, "meshlib", "peer", "rps", "≥", 2.0, "get/other/c=1")])
    assert (verdict.state, verdict.figure) == ("met", 2.0)


def test_a_goal_of_a_figure_that_is_a_comparison_already_is_not_divided_again() -> None:
    """Such as the CPU above that of the wire client, which is no mode of that case."""
    results = results_of(meshlib=[3.0, 5.0, 4.0])
    [verdict] = judged([results], [Goal(CASE, "meshlib", "wire", "rps", "≤", 4.0, is_ratio=False)])
    assert (verdict.state, verdict.figure, verdict.low, verdict.high) == ("met", 4.0, 3.0, 5.0)


def test_a_goal_without_its_peer_is_absent_and_never_met() -> None:
    """The reason comes along. A side that broke has failed; where one is absent and the other broke, absence is the word."""
    results = results_of(meshlib=[9.0, 9.0, 9.0], gone=Absent("the package gone is not installed"), bad=Broken("boom"))
    found = judged(
        [results], [goal("meshlib", "gone", "≥", 1.0), goal("meshlib", "bad", "≤", 1.0), goal("gone", "bad", "≥", 1.0)]
    )
    assert [(v.state, v.reason) for v in found] == [
        ("absent", "the package gone is not installed"),
        ("failed", "boom"),
        ("absent", "the package gone is not installed"),
    ]
    assert not any(verdict.has_figure for verdict in found)


def test_a_goal_that_was_not_asked_for_is_left_out() -> None:
    """Neither met nor absent: the run has been told to leave its mode, its case or its script alone."""
    results = results_of(meshlib=[9.0, 9.0, 9.0])
    elsewhere = Goal(CASE, "meshlib", "meshlib", "rps", "≥", 1.0, script="handshake")
    assert judged([results], [goal("meshlib", "aiohttp", "≥", 1.0), elsewhere]) == []


def test_goals_are_printed_with_their_figure_and_what_came_of_them(capsys: pytest.CaptureFixture[str]) -> None:
    """Also the ones without a figure."""
    results = results_of(meshlib=[30.0, 31.0, 32.0], peer=[10.0, 10.0, 10.0], gone=Absent("no wrk"))
    verdicts = judged(
        [results], [goal("meshlib", "peer", "≥", 3.0), goal("peer", "meshlib", "≥", 3.0), goal("meshlib", "gone", "≥", 1.0)]
    )
    print_goals(verdicts)
    lines = [[cell.strip() for cell in line.split("|")[2:-1]] for line in capsys.readouterr().out.splitlines() if CASE in line]
    assert lines == [
        ["meshlib", "rps / peer", "3.10 ×", "3.00 … 3.20", "≥ 3 ×", "met"],
        ["peer", "rps / meshlib", "0.32 ×", "0.31 … 0.33", "≥ 3 ×", "missed"],
        ["meshlib", "rps / gone", "", "", "≥ 1 ×", "absent: no wrk"],
    ]


def test_a_goal_is_a_row_that_names_both_sides_and_what_was_wanted() -> None:
    """Its mode differs from those of all measurements, so that no row is taken for another."""
    results = results_of(meshlib=[30.0, 30.0, 30.0], peer=[10.0, 10.0, 10.0])
    [verdict] = judged([results], [goal("meshlib", "peer", "≥", 3.5)])
    assert verdict.row() == {
        "script": "client", "case": CASE, "mode": "meshlib / peer", "metric": "ratio", "value": 3.0, "unit": "1",
        "low": 3.0, "high": 3.0, "relation": "≥", "goal": 3.5, "is_met": False,
    }  # fmt: skip
    assert {key for row in results.rows() for key in row} == KEYS


def test_both_sides_of_every_goal_are_measured(tmp_path: Path) -> None:
    """A case that is renamed in a script takes its goal along. No peer is started."""
    with contextlib.ExitStack() as stack:
        peers = Peers(tmp_path, stack)
        made = {
            "client": client.runs(peers),
            "handshake": handshake.runs(peers),
            "memory": memory.runs(peers),
            "guard": guard.runs(peers),
            "decide": decide.runs(peers),
            "discover": discover.runs(peers),
            "agent": agent.runs(peers),
            "abuse": abuse.runs(peers),
            "etcd": etcd.runs(peers),
            "server": server.runs(peers),
            "grpc_calls": grpc_calls.runs(peers),
        }
    keys = {(script, run.case, run.mode) for script, runs in made.items() for run in runs}
    wanted = {(each.script, *side) for each in GOALS for side in (each.ours, each.theirs)}
    assert wanted - keys == set()
    # What isn't about the outbound path is judged where its own script is run.
    assert {each.script for each in GOALS} <= {
        "client",
        *client.WITH,
        "guard",
        "decide",
        "discover",
        "server",
        "grpc_calls",
        "agent",
        "abuse",
        "etcd",
    }


# --- processes


def echo(value: float, *, seconds: float) -> dict[str, float]:
    """A job of a worker that has its result at once."""
    if value < 0:
        raise ValueError("below nothing")
    if value > 100:
        raise Absent("too much")
    return {"rps": value, "cpu_us": 1000 / value, "p99_us": value}


def test_the_figures_of_two_processes_are_those_of_one_mode() -> None:
    """Answers add up; CPU per call is weighed by the calls, here of equal processes."""
    assert in_processes(2, "tests.test_benchmarks:echo", value=50.0)(0.0) == {"rps": 100.0, "cpu_us": 20.0, "p99_us": 50.0}


@pytest.mark.parametrize(("value", "error", "said"), [(-1.0, Broken, "below nothing"), (101.0, Absent, "too much")])
def test_a_process_that_has_no_figures_says_why(value: float, error: type[Exception], said: str) -> None:
    """Its last word, or what is not installed."""
    with pytest.raises(error, match=said):
        in_process("tests.test_benchmarks:echo", value=value)(0.0)


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="needs Linux")
def test_a_case_with_one_call_at_a_time_is_measured_on_one_core() -> None:
    """Client and peers alike; afterwards all cores are free again, also for what was started meanwhile."""
    free = os.sched_getaffinity(0)
    with subprocess.Popen(["sleep", "60"]) as peer:
        seen: list[set[int]] = []

        def take(seconds: float) -> dict[str, float]:
            seen.extend([os.sched_getaffinity(0), os.sched_getaffinity(peer.pid)])
            return {"rps": 1.0}

        results = Results("client", "rps")
        results.measure([Run(CASE, "meshlib", take, is_serial=True)], 1, 0.0, random.Random(1))
        after = [os.sched_getaffinity(0), os.sched_getaffinity(peer.pid)]
        peer.kill()
    assert seen == [{max(free)}] * 2
    assert after == [free] * 2
