"""Does `meshlib status` tell at a glance what is private and what is not, with an exit code, and without trusting what answers?"""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from meshlib import cli
from meshlib.cli import status
from meshlib.cli.status import Answer, Silent, fold
from meshlib.keeper import Keeper
from meshlib.observe.exporter import MetricsListener
from tests.support import free_port, identities, mesh_of

NOW = 1_778_000_000.0


def row(caller: str, callee: str, state: str = "mtls", requests: int = 10, **more: Any) -> dict[str, Any]:
    plain = {"caller": caller, "callee": callee, "state": state, "requests": requests, "last_seen": NOW - 5}
    return {**plain, "peer": "", "refused": 0, "would_deny": 0, **more}


def document(service: str, **more: Any) -> dict[str, Any]:
    """A status as a process gives it."""
    certificate = {
        "spiffe_id": f"spiffe://shop.internal/ns/default/sa/{service}",
        "serial": "a1b2",
        "not_before": NOW - 3600,
        "not_after": NOW + 82800,
        "spent": 0.0417,
        "is_overdue": False,
    }
    plain = {"version": 1, "mesh": "shop", "service": service, "mode": "enforce", "pid": 7, "started": NOW - 60, "now": NOW}
    return {**plain, "port": "mtls", "certificate": certificate, "in": [], "out": [], "alerts": [], **more}


@pytest.fixture
def keeper() -> Iterator[Keeper]:
    made = Keeper()
    yield made
    made.stop()


@pytest.fixture
def serve(keeper: Keeper) -> Iterator[Callable[[Any], str]]:
    """Give a status to a real listener; its address."""
    made: list[MetricsListener] = []

    def start(told: Any) -> str:
        listener = MetricsListener("127.0.0.1:0", lambda: "", status=lambda: told)
        listener.start(keeper)
        made.append(listener)
        return f"127.0.0.1:{listener.port}"

    yield start
    for listener in made:
        listener.stop()


def run(*arguments: str) -> int:
    return cli.main(["status", *arguments])


def bundle(**more: Any) -> dict[str, Any]:
    """A row of `bundles` as a process gives it."""
    told = {"trust_domain": "partner.example", "source": "url", "roots": 2, "age": 30.0, "failures": 0}
    return {**told, "state": "good", "fault": "", **more}


def keys(**more: Any) -> dict[str, Any]:
    """A row of `keys` as a process gives it."""
    told = {"provider": "people", "source": "inline", "keys": 3, "age": None, "failures": 0}
    return {**told, "state": "good", "fault": "", **more}


def alarm(kind: str, about: str = "", message: str = "it isn't well") -> dict[str, str]:
    return {"kind": kind, "about": about, "message": message}


def of(*addresses: str) -> list[str]:
    return [word for address in addresses for word in ("--address", address)]


# ---------------------------------------------------------------- the answer


def test_all_mtls_is_exit_code_0(serve: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """Every edge with its state and the certificates of both sides, every process with its own."""
    orders = serve(document("orders", **{"in": [row("web", "orders", would_deny=2)]}))
    web = serve(document("web", out=[row("web", "orders"), row("web", "stock", "unused", 0, last_seen=0.0)]))
    assert run(*of(orders, web)) == 0
    text = capsys.readouterr().out
    lines = text.splitlines()
    assert lines[0].split("  ")[0] == "caller"
    assert [line.split()[:3] for line in lines[1:3]] == [["web", "orders", "mtls"], ["web", "stock", "unused"]]
    assert "4%, 4%" in lines[1] and "5 s ago" in lines[1]
    assert f"orders   {orders}  enforce  a1b2         23 h     4%" in lines
    assert lines[-1] == "Every edge in use is mutual TLS, and nothing alarms."
    assert "\033" not in text


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"in": [row("10.0.0.7", "orders", "plain")]}, "1 of 1 edges not mutual TLS"),
        ({"in": [row("10.0.0.7", "orders", "plain", refused=9)]}, "1 of 1 edges not mutual TLS"),
        ({"in": [row("(no certificate)", "orders", "tls")]}, "1 of 1 edges not mutual TLS"),
        ({"out": [row("orders", "stock", "plain")]}, "1 of 1 edges not mutual TLS"),
        (
            {"certificate": {**document("orders")["certificate"], "spent": 0.8, "is_overdue": True}},
            "1 certificates near their end",
        ),
        ({"alerts": [{"kind": "new_peer", "edge": "x → orders", "text": "x calls orders", "at": time.time() - 60}]}, "1 alerts"),
        ({"alarms": [alarm("clock")]}, "1 alarms"),
        ({"bundles": [bundle(state="missing", age=None)]}, "1 bundles or keys missing or stale"),
        ({"keys": [keys(state="stale")]}, "1 bundles or keys missing or stale"),
    ],
)
def test_what_is_plain_or_alarming_is_exit_code_1(
    serve: Any, capsys: pytest.CaptureFixture[str], changes: Any, words: str
) -> None:
    """Each by itself."""
    assert run(*of(serve(document("orders", **changes)))) == 1
    assert words in capsys.readouterr().out


@pytest.mark.parametrize(
    "changes",
    [
        {"in": [row("10.0.0.7", "orders", "plain", refused=10)]},
        {"out": [row("orders", "stock", "unused", 0)]},
        {"alerts": [{"kind": "new_peer", "edge": "x → orders", "text": "old", "at": time.time() - 7200}]},
        {"certificate": None},
    ],
)
def test_what_is_refused_unused_or_over_is_fine(serve: Any, changes: Any) -> None:
    """Plain calls that got no further, edges without calls, alerts of yesterday."""
    assert run(*of(serve(document("orders", **changes)))) == 0


def test_bundles_and_keys_have_a_table_where_there_are_any(serve: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """By whom, how many, when confirmed last; nothing about it where nothing is configured."""
    address = serve(document("orders", bundles=[bundle()], keys=[keys()], alarms=[]))
    assert run(*of(address)) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["orders", address, "bundle", "partner.example", "url", "2", "30", "s", "ago", "-", "good"] in lines
    assert ["orders", address, "tokens", "people", "inline", "3", "-", "-", "good"] in lines
    assert run(*of(serve(document("orders", bundles=[], keys=[], alarms=[])))) == 0
    assert "confirmed" not in capsys.readouterr().out


def test_what_isnt_well_is_said_once_each(serve: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """A bundle's fault is an alarm of the identity, too; without an identity it is told by itself."""
    missing = bundle(state="missing", age=None, fault="there is none yet")
    alarms = [alarm("federation", "partner.example", "the bundle of partner.example: there is none yet")]
    people = keys(state="missing", keys=0, fault="no route")
    assert run(*of(serve(document("orders", bundles=[missing], keys=[people], alarms=alarms)))) == 1
    out = capsys.readouterr().out
    assert out.count("there is none yet") == 1
    assert "alarm: federation (orders): the bundle of partner.example: there is none yet\n" in out
    assert "missing: tokens people (orders): no route\n" in out
    assert run(*of(serve(document("orders", bundles=[missing])))) == 1
    assert "missing: bundle partner.example (orders): there is none yet\n" in capsys.readouterr().out


def test_both_sides_of_an_edge_are_one_edge() -> None:
    """What the service counts, in the worst state that either says; processes of one service are added up."""
    answers = [
        Answer("a", document("orders", **{"in": [row("web", "orders", requests=3, last_seen=NOW - 50)]})),
        Answer("b", document("orders", **{"in": [row("web", "orders", requests=4, refused=1)]})),
        Answer("c", document("web", out=[row("web", "orders", "mtls", 9)])),
        Answer("d", document("web", out=[row("web", "orders", "plain", 1)])),
    ]
    (edge,) = fold(answers, [], NOW).edges
    assert (edge.state, edge.requests, edge.refused, edge.last_seen) == ("mixed", 7, 1, 5.0)
    (edge,) = fold(answers[:3], [], NOW).edges
    assert edge.state == "mtls"


def test_json_has_all_of_it(serve: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """One object, for programs; serial numbers in full, no key."""
    address = serve(document("orders", **{"in": [row("web", "orders")]}))
    assert run("--json", *of(address)) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["is_fine"], told["silent"], told["alerts"]) == (True, [], [])
    assert told["edges"][0] | {"last_seen": 0} == {
        "caller": "web",
        "callee": "orders",
        "state": "mtls",
        "requests": 10,
        "refused": 0,
        "would_deny": 0,
        "last_seen": 0,
        "caller_spent": None,
        "callee_spent": 0.0417,
    }
    assert (told["processes"][0]["serial"], told["processes"][0]["address"]) == ("a1b2", address)


@pytest.mark.parametrize("has_rich", [True, False])
def test_on_a_terminal_there_is_a_table(
    serve: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, has_rich: bool
) -> None:
    """With colours where rich is installed, and as elsewhere where it isn't; what others say is no markup."""
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.delenv("NO_COLOR", raising=False)
    if not has_rich:
        monkeypatch.setitem(sys.modules, "rich.console", None)
    assert run(*of(serve(document("orders", **{"in": [row("[red]x", "orders", "plain")]})))) == 1
    out = capsys.readouterr().out
    assert ("\033[" in out, "[red]x" in out, "plain" in out) == (has_rich, True, True)


# ---------------------------------------------------------------- who doesn't answer


def test_an_address_that_doesnt_answer_is_named_with_what_to_do(serve: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """Of what didn't answer nothing is known, so that it isn't fine; the others are shown."""
    address, nobody = serve(document("orders")), f"127.0.0.1:{free_port()}"
    assert run(*of(address, nobody)) == 1
    out = capsys.readouterr().out
    assert f"no answer: a process at {nobody}: " in out and "Is the process running" in out
    assert "orders" in out and "1 without an answer" in out
    assert run(*of(nobody)) == 1
    assert "Nobody answered" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (b"HTTP/1.1 404 Not Found\r\n\r\nno", "answered 404"),
        (b"HTTP/1.1 200 OK\r\n\r\n{}", "no status of meshlib"),
        (b"HTTP/1.1 200 OK\r\n\r\n[1]", "no status of meshlib"),
        (b'HTTP/1.1 200 OK\r\n\r\n{"version": 9}', "version 9"),
        (b'HTTP/1.1 200 OK\r\n\r\n{"version": 1, "in": [{}], "out": [], "alerts": []}', "no status of meshlib"),
        (b"HTTP/1.1 200 OK\r\n\r\n" + json.dumps(document("x", keys=[keys(keys=float("inf"))])).encode(), "no status of meshlib"),
        (b"HTTP/1.1 200 OK\r\n\r\n" + json.dumps(document("x", alarms=[{"kind": "life"}])).encode(), "no status of meshlib"),
        (b"SSH-2.0-OpenSSH_9\r\n", "doesn't speak HTTP"),
        (b"", "doesn't speak HTTP"),
        (None, "no answer within"),
    ],
)
def test_whatever_answers_is_not_believed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, answer: bytes | None, words: str
) -> None:
    """Another program, another version, nonsense, silence: told, and no traceback."""
    monkeypatch.setattr(status, "PATIENCE", 0.2 if answer is None else 10.0)
    with answering(answer) as port:
        assert run(*of(f"127.0.0.1:{port}")) == 1
    assert words in capsys.readouterr().out


@contextlib.contextmanager
def answering(answer: bytes | None) -> Iterator[int]:
    """A server that says this to whoever connects; None says nothing."""
    port = free_port()
    loop, over = asyncio.new_event_loop(), asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if answer is not None:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(answer)
            await writer.drain()
        else:
            await over.wait()
        writer.close()

    async def live() -> None:
        server = await asyncio.start_server(serve, "127.0.0.1", port)
        ready.set()
        await over.wait()
        server.close()

    ready = threading.Event()
    thread = threading.Thread(target=lambda: loop.run_until_complete(live()), daemon=True)
    thread.start()
    ready.wait(10)
    try:
        yield port
    finally:
        loop.call_soon_threadsafe(over.set)
        thread.join(10)
        loop.close()


def test_what_others_say_moves_no_cursor(serve: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """Names and texts come from processes that may have been taken over."""
    evil = "x\x1b[2J\r\nEvery edge is fine"
    alerts = [{"kind": evil, "edge": evil, "text": evil, "at": time.time()}]
    more: dict[str, Any] = {"alerts": alerts, "alarms": [alarm(evil, evil, evil)]}
    more |= {"bundles": [bundle(trust_domain=evil, source=evil, state=evil, fault=evil)], "keys": [keys(provider=evil)]}
    assert run(*of(serve(document(evil, **{"in": [row(evil, "orders", evil)]}, **more)))) == 1
    out = capsys.readouterr().out
    assert "\x1b" not in out and "\r" not in out
    assert not any(line.startswith("Every edge is fine") for line in out.splitlines())


# ---------------------------------------------------------------- whom it asks


def config(folder: Path, services: dict[str, Any], **top: Any) -> str:
    file = folder / "mesh.yaml"
    file.write_text(json.dumps({"mesh": "shop", "secure": {"mode": "observe"}, "services": services, **top}))
    return str(file)


def test_the_addresses_are_those_of_the_configuration(tmp_path: Path) -> None:
    """Of the system and of services; each once; on all interfaces means each host of the service; what can't be asked is told."""
    file = config(
        tmp_path,
        {
            "web": {"listen": "127.0.0.1:80"},
            "orders": {"listen": "127.0.0.1:81", "observe": {"metrics": "127.0.0.1:9001"}},
            "stock": {
                "observe": {"metrics": "0.0.0.0:9002"},
                "discover": {"static": ["10.0.0.1:80", "10.0.0.1:81", "10.0.0.2:80", "unix:/run/x.sock"]},
            },
            "free": {"listen": "127.0.0.1:82", "observe": {"metrics": "127.0.0.1:0"}},
            "job": {},
        },
        observe={"metrics": "127.0.0.1:9000"},
    )
    places, silent = status._places(Path(file))
    assert places == {
        "127.0.0.1:9000": ["web", "job"],
        "127.0.0.1:9001": ["orders"],
        "10.0.0.1:9002": ["stock"],
        "10.0.0.2:9002": ["stock"],
    }
    assert [(one.services, one.why) for one in silent] == [(("free",), "its metrics are at any free port")]


def test_a_service_without_metrics_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With the key to set; who only calls is seen by those it calls."""
    file = config(tmp_path, {"orders": {"listen": "127.0.0.1:81"}, "job": {}})
    assert run("--config", file) == 1
    out = capsys.readouterr().out
    assert "orders" in out and "observe.metrics" in out and "job" not in out


@pytest.mark.parametrize("address", ["127.0.0.1", ":80", "127.0.0.1:", "127.0.0.1:0", "127.0.0.1:99999", "http://127.0.0.1:x"])
def test_a_bad_address_is_exit_code_2(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    """As a bad file."""
    assert run("--address", address) == 2
    assert "host:port" in capsys.readouterr().err
    assert run("--config", "/nowhere/mesh.yaml") == 2


def test_watching_looks_again_until_it_is_stopped(
    serve: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A line of JSON for each look."""
    looks = []

    def sleep(seconds: float) -> None:
        looks.append(seconds)
        if len(looks) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(status, "time", SimpleNamespace(time=time.time, sleep=sleep))
    assert run("--watch", "5", "--json", *of(serve(document("orders")))) == 130
    assert looks == [5.0, 5.0, 5.0]
    assert [json.loads(line)["is_fine"] for line in capsys.readouterr().out.splitlines()] == [True] * 3


# ---------------------------------------------------------------- the listener


@pytest.mark.parametrize(
    ("headers", "code"),
    [
        ({"host": "127.0.0.1"}, 200),
        ({"host": "127.0.0.1:9464"}, 200),
        ({"host": "LOCALHOST:9464"}, 200),
        ({"host": "[::1]:9464"}, 200),
        ({"host": "evil.example"}, 403),
        ({"host": "127.0.0.1.evil.example"}, 403),
        ({"host": "localhost.evil.example:9464"}, 403),
        ({"host": ""}, 403),
        ({"host": "127.0.0.1", "origin": "http://evil.example"}, 403),
    ],
)
@pytest.mark.parametrize("path", ["/status", "/metrics"])
def test_no_web_page_reads_it_by_a_name_that_leads_here(serve: Any, path: str, headers: dict[str, str], code: int) -> None:
    """A browser that was led here by DNS says the page's own name."""
    connection = http.client.HTTPConnection(serve(document("orders")), timeout=10)
    connection.putrequest("GET", path, skip_host=True)
    for name, value in headers.items():
        connection.putheader(name, value)
    connection.endheaders()
    assert connection.getresponse().status == code
    connection.close()


def test_a_listener_on_all_interfaces_gives_metrics_to_names_and_its_status_to_addresses(keeper: Keeper) -> None:
    """Prometheus scrapes by name; who asks for the status knows where."""
    listener = MetricsListener("0.0.0.0:0", lambda: "", status=dict)
    listener.start(keeper)
    codes = []
    for path in ("/metrics", "/status"):
        for host in ("orders-1.example", "127.0.0.1"):
            connection = http.client.HTTPConnection("127.0.0.1", listener.port, timeout=10)
            connection.request("GET", path, headers={"host": host})
            codes.append(connection.getresponse().status)
            connection.close()
    listener.stop()
    assert codes == [200, 200, 403, 200]


def test_real_meshes_tell_of_each_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The whole: a mesh with certificates, a caller by mTLS and one in plain, asked by the command at the address of mesh.yaml."""
    identities(tmp_path, "me")
    port = free_port()
    services = {"web": {}, "me": {"listen": "127.0.0.1:1"}}
    with mesh_of(tmp_path, services, mode="permissive", observe={"metrics": f"127.0.0.1:{port}"}) as mesh:
        mesh.start()
        peer = mesh.config.services["web"].identity
        call(mesh, peer)
        assert until(lambda: run("--config", str(tmp_path / "mesh.yaml")) == 0 and "web" in capsys.readouterr().out)
        call(mesh, "")
        assert until(lambda: run("--config", str(tmp_path / "mesh.yaml")) == 1)
    out = capsys.readouterr().out
    assert "mtls_lost" in out and "10.0.0.7" in out and "plain" in out


def call(mesh: Any, peer: str) -> None:
    mesh.gate.begin("GET", b"/", [(b"host", b"me")], peer, bool(peer), 0.0, None, 0.0, "10.0.0.7").finish(200, 0.0)


def until(is_so: Callable[[], bool]) -> bool:
    """The keeper looks each second."""
    end = time.monotonic() + 20
    while time.monotonic() < end:
        if is_so():
            return True
        time.sleep(0.1)
    return False


def test_silence_is_sorted_by_who_should_be_there() -> None:
    """The same report, whichever process was the faster."""
    silent = [Silent("b", ("web",), "", ""), Silent("a", ("orders",), "", "")]
    assert [one.address for one in fold([], silent, NOW).silent] == ["a", "b"]
