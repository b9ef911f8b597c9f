"""Do calls between two nodes go on, whatever becomes of their agents, of the cable and of the certificates?

Two network namespaces are the nodes, each with a real agent that has enrolled with a real CA; services of several users are behind them,
and `storefront` on node A calls `orders` on node B, at a steady rate whatever becomes of the calls before. Everything is a process: what
is killed here is killed.

Bounds are those of the design where it names one (no failure; away and back within seconds; at most a millisecond more). The seconds
of single calls are printed, not judged: the machine may have others to serve.
"""

from __future__ import annotations

import json
import math
import shutil
import signal
import time
from collections import Counter
from collections.abc import Iterator

import pytest

from tests.agent.daemon_world import place
from tests.chaos.hosts import Host, two_hosts, why_not
from tests.chaos.inbound_load import percentile
from tests.chaos.node_pair import NOBODY, PORTS, Calls, Node, Pair, id_of, two_nodes
from tests.proxy_agent import needs_proxy

_REASON = why_not() or ("" if shutil.which("setpriv") else "there is no `setpriv` (util-linux) to be several users with")
pytestmark = [
    pytest.mark.skipif(bool(_REASON), reason=_REASON),
    pytest.mark.slow,
    pytest.mark.timeout(120),
    needs_proxy,
]

HTTP = ("async", "blocking")
ALL = (*HTTP, "grpc")

# Seconds of load before something happens, and after all is well again.
BEFORE, AFTER = 2.0, 2.0

# Two instances in turn, and soon again one that has failed.
TURNS = {"balance": {"policy": "round_robin"}, "admit": {"breaker": {"open": ["500ms", "1s"]}}}

# No second attempt: what an agent's failure costs is made good without one.
ONCE = {"retry": {"attempts": 0}}

# Calls that take long enough for some of them to be under way at any time.
SLOW = "/items?wait=0.05"

# Whoever shows no certificate: in plain text, and by TLS.
WITHOUT_PROOF = """\
import socket, ssl, sys
host, port = sys.argv[1].split(":")
context = ssl.create_default_context()
context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
for wrap in (lambda plug: plug, lambda plug: context.wrap_socket(plug, server_hostname="orders")):
    got = b""
    try:
        with socket.create_connection((host, int(port)), 5) as plug:
            secured = wrap(plug)
            secured.sendall(b"GET /in-the-open HTTP/1.1\\r\\nhost: orders\\r\\nconnection: close\\r\\n\\r\\n")
            while piece := secured.recv(4096):
                got += piece
    except OSError as error:
        print("refused:", error, flush=True)
    print("got", got, flush=True)
"""

# Whoever no entry names: what the Workload API, the data socket and the library say.
STRANGER = """\
import socket, sys
from pathlib import Path
import grpc, meshlib
from tests.agent.daemon_world import raw, x509_svids
folder = Path(sys.argv[1])
with grpc.insecure_channel(f"unix://{folder}/socket.sock") as channel:
    try:
        print("identity", next(iter(x509_svids(channel))))
    except grpc.RpcError as error:
        print("identity", error.code().name)
for what in ("/ping", "/handover"):
    print("data", raw(folder / "data.sock", f"GET {what} HTTP/1.1\\r\\nhost: agent\\r\\n\\r\\n".encode()))
try:
    with meshlib.Mesh.load(sys.argv[2], service="storefront").sync_client() as http:
        print("call", http.get("http://orders/items").status_code)
except meshlib.errors.MeshError as error:
    print("call", type(error).__name__, flush=True)
"""


@pytest.fixture(scope="module")
def hosts() -> Iterator[tuple[Host, Host]]:
    with place() as where, two_hosts(where) as both:
        yield both


@pytest.fixture(scope="module")
def pair(hosts: tuple[Host, Host]) -> Iterator[Pair]:
    with place() as where, two_nodes(hosts, where) as both:
        yield both


def told(rows: list[tuple[float, float, str, int, str]]) -> str:
    """p50, p99 and the longest, in milliseconds."""
    took = sorted(row[1] for row in rows)
    return (
        f"{len(took)} calls: p50 {1000 * percentile(took, 0.5):.2f}, p99 {1000 * percentile(took, 0.99):.1f}, "
        f"at most {1000 * percentile(took, 1.0):.0f} ms"
    )


def carriers(rows: list[tuple[float, float, str, int, str]]) -> dict[str, int]:
    return dict(Counter(row[2] for row in rows))


def serials(rows: list[tuple[float, float, str, int, str]]) -> set[str]:
    return {row[4].split()[2] for row in rows}


def all_went_well(loads: list[Calls], least: int) -> None:
    """No call failed, there were enough of them, and each was the storefront's."""
    for each in loads:
        assert each.faults == [], (
            f"{each.name}: {len(each.faults)} of {len(each.calls)} failed: {Counter(each.faults).most_common(5)}"
        )
        assert len(each.calls) >= least
        assert {row[4].split()[1] for row in each.sent} == {id_of("storefront")}


# ---------------------------------------------------------------------------------------------------- who, and by what


def test_calls_cross_as_the_storefront_by_both_agents(pair: Pair) -> None:
    """Of all three kinds; the handler behind the other agent knows who called, though its server knows nothing of TLS."""
    config = pair.storefront("cross")
    with pair.load(config, *ALL, rate=40.0) as loads:
        time.sleep(BEFORE)
    all_went_well(loads, 60)
    for each in loads:
        print(f"\n{each.name}: {told(each.sent)}", end="")
        assert {row[4].split()[0] for row in each.sent} == {"b"}
        if each.name != "grpc":
            assert carriers(each.sent) == {"agent": len(each.sent)}
    carried = pair.a.ask("/metrics"), pair.b.ask("/metrics")
    number = sum(len(each.calls) for each in loads)
    counts = [_requests(metrics, *doors) for metrics, doors in zip(carried, (["data"], ["orders", "stock"]), strict=True)]
    print(f"\nagents carried {counts} requests for {number} calls")
    assert min(counts) >= number


def _requests(metrics: str, *doors: str) -> int:
    lines = [line.split() for line in metrics.splitlines() if line.startswith("meshlib_agent_requests_total{")]
    return sum(int(float(value)) for name, value in lines if any(f'door="{door}"' in name for door in doors))


def test_nothing_but_tls_goes_over_the_cable(pair: Pair) -> None:
    """Seen at the interface itself. Plain text, and TLS without a certificate, get nothing."""
    config = pair.storefront("cable")
    words = ("/items", "/test.Stock", "spiffe://", "x-mesh-", "/in-the-open")
    with pair.b.host.running("-m", "tests.chaos.node_cable", *words) as cable:
        cable.wait_for("ready")
        with pair.load(config, *ALL, rate=40.0) as loads:
            time.sleep(1.0)
        all_went_well(loads, 20)
        for service in PORTS:
            with pair.a.host.running("-c", WITHOUT_PROOF, pair.b.address_of(service)) as prober:
                answers = [prober.wait_for("got ") for _ in range(2)]
            assert not any("HTTP/1.1 2" in answer or "storefront" in answer for answer in answers), prober.said
            assert answers[1] == "got b''\n", prober.said
        cable.child.send_signal(signal.SIGTERM)
        seen = json.loads(cable.wait_for("result").removeprefix("result "))
    print(f"\n{seen}")
    assert seen["frames"] >= sum(len(each.calls) for each in loads)
    # That one was sent in plain text, so that we know that the others would have been seen.
    assert seen["seen"].pop("/in-the-open") >= 2
    assert set(seen["seen"].values()) == {0}


def test_service_that_no_rule_names_is_refused(pair: Pair) -> None:
    """It has an identity and a data path, and is told 403."""
    config = pair.storefront("stranger")
    for kind in HTTP:
        assert pair.once(config, kind, service="stranger").startswith("403 ")
    assert "PERMISSION_DENIED" in pair.once(config, "grpc", service="stranger")
    assert pair.once(config).startswith("200 ")


def test_process_of_another_user_gets_neither_identity_nor_data_path(pair: Pair) -> None:
    """No entry names it: the Workload API denies, the data socket closes, the library can't start as the storefront."""
    config = pair.storefront("another")
    with pair.a.user(NOBODY).running("-c", STRANGER, pair.a.folder, config) as running:
        running.wait_for("call", 40)
    lines = [line.strip() for line in running.said if line.startswith(("identity", "data", "call"))]
    assert lines[:3] == ["identity PERMISSION_DENIED", "data b''", "data b''"]
    assert lines[3].startswith("call ")
    assert lines[3].endswith("Error"), running.said


# ---------------------------------------------------------------------------------------------------- the cable


def test_cut_of_three_seconds_costs_no_call_that_has_longer(pair: Pair) -> None:
    """What is written waits for the cable, what isn't is tried again: calls of ten seconds have their answers, and all goes on by itself."""
    retry = {"attempts": 5, "backoff": ["100ms", "1500ms"], "budget": {"ratio": 1.0, "per_second": 1000}}
    config = pair.storefront("cut", deadline="10s", retry=retry)
    with pair.load(config, *HTTP) as loads:
        time.sleep(BEFORE)
        cut = time.monotonic()
        pair.b.host.link("down")
        time.sleep(3.0)
        pair.b.host.link("up")
        back = time.monotonic()
        time.sleep(3 + AFTER)
        end = time.monotonic()
    for each in loads:
        first = min((row[0] + row[1] for row in each.sent if row[0] + row[1] > back), default=math.nan)
        print(
            f"\n{each.name}: {len(each.faults)} failed; before {told(each.between(0.0, cut))}; begun in the cut {told(each.between(cut, back))}",
            end="",
        )
        print(
            f"\n  the first answer {first - back:.2f} s after it; in the last two seconds {told(each.between(end - 2, end))}",
            end="",
        )
    all_went_well(loads, 500)
    for each in loads:
        assert percentile(sorted(row[1] for row in each.between(end - 2, end)), 0.5) < 0.1


# ---------------------------------------------------------------------------------------------------- the agent of those who call


def test_killed_agent_of_the_caller_costs_no_call(pair: Pair) -> None:
    """Nor a second attempt: calls go out by the process itself with the certificate it has, and by the agent again within two seconds of its return."""
    with pair.load(pair.storefront("killed", **ONCE), *ALL, rate=60.0, call=f"GET {SLOW}") as loads:
        time.sleep(BEFORE)
        killed, _ = pair.a.end(signal.SIGKILL)
        time.sleep(1.5)
        pair.a.start()
        ready = pair.a.ready()
        time.sleep(2.0 + AFTER)
    for each in loads:
        away, up = each.when("away", killed), each.when("up", killed)
        down = each.between(away, ready - 0.5)
        print(
            f"\n{each.name}: {len(each.faults)} failed; away after {1000 * (away - killed):.0f} ms, back {up - ready:+.2f} s after its return",
            end="",
        )
        print(f"\n  before {told(each.between(0.0, killed))}; without {told(down)} {carriers(down)}", end="")
    all_went_well(loads, 350)
    for each in loads:
        away, up = each.when("away", killed), each.when("up", killed)
        assert away - killed < 1.0
        assert up - ready <= 2.0
        before, down, after = each.between(0.0, killed), each.between(away, ready - 0.5), each.between(up + 0.5, math.inf)
        # The process has the certificate that the agent had.
        assert serials(down) == serials(before)
        assert len(serials(after)) == 1
        if each.name != "grpc":
            # Some were under way when it was killed.
            assert "closed" in carriers(before)
            assert set(carriers(before)) <= {"agent", "closed", "gone"}
            assert set(carriers(after)) == {"agent"}
            assert set(carriers(down)) == {"away"}
        assert each.stats["fallbacks"]["away"] >= len(down)
        assert each.stats["sent"] >= len(before) + len(after)


def test_agent_of_the_caller_that_is_told_to_end_costs_no_call(pair: Pair) -> None:
    """SIGTERM, as for an upgrade: calls that may not be repeated have their answers too, and go by the next one within two seconds."""
    with pair.load(pair.storefront("upgraded"), *ALL, rate=60.0, call=f"POST {SLOW}") as loads:
        time.sleep(BEFORE)
        begun, ended = pair.a.end(signal.SIGTERM)
        pair.a.start()
        ready = pair.a.ready()
        time.sleep(2.0 + AFTER)
    print(f"\nthe agent ended after {ended - begun:.2f} s, and was there again after {ready - begun:.1f} s", end="")
    for each in loads:
        up = each.when("up", ended)
        print(f"\n{each.name}: {len(each.faults)} failed; back {up - ready:+.2f} s after its return; {told(each.sent)}", end="")
    all_went_well(loads, 300)
    for each in loads:
        assert each.when("up", ended) - ready <= 2.0
        assert each.stats["fallbacks"]["away"] > 0


def test_stopped_agent_of_the_caller_costs_no_call_and_no_time(pair: Pair) -> None:
    """SIGSTOP: once it is known, calls take as long as those of a mesh without an agent; and it is back within five seconds of SIGCONT."""
    config, direct = pair.storefront("stopped", **ONCE), pair.storefront("direct", delegate="off")
    with pair.load(config, *HTTP, rate=100.0, other=direct) as loads:
        time.sleep(BEFORE)
        stopped = pair.a.send(signal.SIGSTOP)
        try:
            time.sleep(6.0)
        finally:
            continued = pair.a.send(signal.SIGCONT)
        time.sleep(3.0 + AFTER)
    for each in loads:
        away, up = each.when("away", stopped), each.when("up", stopped)
        print(
            f"\n{each.name}: {len(each.faults)} failed; known after {1000 * (away - stopped):.0f} ms, back {up - continued:.2f} s after SIGCONT",
            end="",
        )
        for name, begin, end in (("before", 0.0, stopped), ("unknown", stopped, away), ("known", away + 0.1, continued)):
            rows = each.between(begin, end)
            print(
                f"\n  {name}: delegated {told([row for row in rows if row[3] == 0])}; direct {told([row for row in rows if row[3] == 1])}",
                end="",
            )
    all_went_well(loads, 900)
    for each in loads:
        away, up = each.when("away", stopped), each.when("up", stopped)
        assert away - stopped < 2.0
        assert 0.0 < up - continued <= 5.0
        known = each.between(away + 0.1, continued)
        delegated, alone = ([row for row in known if row[3] == by] for by in (0, 1))
        assert set(carriers(delegated)) == {"away"}
        assert serials(known) == serials(each.between(0.0, stopped))
        added = _p50(delegated) - _p50(alone)
        print(f"\n{each.name}: {1000 * added:+.3f} ms more at p50", end="")
        assert added <= 0.001


def _p50(rows: list[tuple[float, float, str, int, str]]) -> float:
    return percentile(sorted(row[1] for row in rows), 0.5)


# ---------------------------------------------------------------------------------------------------- the agent of those who are called


def test_killed_agent_of_one_of_two_instances_costs_no_call(pair: Pair) -> None:
    """Calls go to the other instance; to this one again when its agent is back. Where it is the only one, they fail and say why."""
    config, alone = pair.storefront("instances", pair.a, pair.b, **TURNS), pair.storefront("alone", deadline="2s")
    with pair.load(config, *HTTP, call=f"GET {SLOW}") as loads:
        time.sleep(BEFORE)
        killed, _ = pair.b.end(signal.SIGKILL)
        time.sleep(0.5)
        begun = time.monotonic()
        said = pair.once(alone)
        print(f"\nalone: after {time.monotonic() - begun:.1f} s (with the process's start) {said}")
        pair.b.start()
        ready = pair.b.ready()
        time.sleep(2.0 + AFTER)
    all_back(loads, killed, ready)
    assert said.startswith("ConnectFailed"), said
    assert "refused" in said


def test_agent_of_one_of_two_instances_that_is_told_to_end_costs_no_call(pair: Pair) -> None:
    """SIGTERM: what is under way ends, and no call is lost that may not be repeated; nor while it starts again."""
    config = pair.storefront("drained", pair.a, pair.b, **TURNS)
    with pair.load(config, *HTTP, call=f"POST {SLOW}") as loads:
        time.sleep(BEFORE)
        told_at, ended = pair.b.end(signal.SIGTERM)
        print(f"\nthe agent ended after {ended - told_at:.2f} s", end="")
        time.sleep(1.0)
        pair.b.start()
        ready = pair.b.ready()
        time.sleep(2.0 + AFTER)
    all_back(loads, ended, ready)
    assert ended - told_at <= 30.0


def all_back(loads: list[Calls], gone: float, ready: float) -> None:
    """No call failed; both instances were called before, one in between, and both again."""
    for each in loads:
        between, after = each.between(gone + 0.5, ready - 0.5), each.between(ready, math.inf)
        print(
            f"\n{each.name}: {len(each.faults)} failed; before {told(each.between(0.0, gone))} {_nodes(each.between(0.0, gone))}",
            end="",
        )
        print(f"\n  meanwhile {told(between)} {_nodes(between)}; after {told(after)} {_nodes(after)}", end="")
    all_went_well(loads, 400)
    for each in loads:
        assert set(_nodes(each.between(0.0, gone))) == {"a", "b"}
        assert set(_nodes(each.between(gone + 0.5, ready - 0.5))) == {"a"}
        assert set(_nodes(each.between(ready, math.inf))) == {"a", "b"}


def _nodes(rows: list[tuple[float, float, str, int, str]]) -> dict[str, int]:
    return dict(Counter(row[4].split()[0] for row in rows))


# ---------------------------------------------------------------------------------------------------- certificates


def test_certificates_that_rotate_under_load_cost_no_call(hosts: tuple[Host, Host]) -> None:
    """Lives of six seconds: both agents renew theirs at the CA again and again, and calls go on."""
    with place() as where, two_nodes(hosts, where, ttl="6s", port=9443) as pair:
        first = [_rotations(node) for node in (pair.a, pair.b)]
        with pair.load(pair.storefront("rotated"), *ALL, rate=60.0) as loads:
            time.sleep(12.0)
            last = [_rotations(node) for node in (pair.a, pair.b)]
    for each in loads:
        print(
            f"\n{each.name}: {len(each.faults)} failed; {told(each.sent)}; {len(serials(each.sent))} certificates were seen",
            end="",
        )
    print(f"\nrotations: {first} before, {last} after")
    all_went_well(loads, 500)
    for each in loads:
        assert len(serials(each.sent)) >= 3
    for before, after in zip(first, last, strict=True):
        assert all(after[service] >= before[service] + 2 for service in before)


def _rotations(node: Node) -> dict[str, int]:
    return {row["service"]: row["rotations"] for row in node.ask("/certificates")}
