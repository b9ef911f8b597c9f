"""What does an orchestrator hear that asks a process for its health, without a certificate? The listener alone, and behind real servers."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from meshlib.keeper import Keeper
from meshlib.observe import exporter
from meshlib.observe.probe import SILENT, ProbeListener, Pulse
from meshlib.server.listeners import bind
from tests.server.inside import Clock
from tests.support import PYTHON, ROOT, free_port, identities, process, wait_until_listening, write_config

MESHLIB = str(Path(PYTHON).parent / "meshlib")


def ask(port: int, path: str, method: str = "GET", host: str = "10.0.0.7:8081") -> tuple[int, bytes]:
    """As kubelet asks: by the address of the pod."""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as sock:
        sock.sendall(f"{method} {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
        answer = b"".join(iter(lambda: sock.recv(65536), b""))
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head[9:12] or 0), body


class World:
    """A listener that tells what a test wants it to."""

    def __init__(self, keeper: Keeper) -> None:
        self.clock = Clock()
        self.pulse = Pulse(self.clock)
        self.reason = ""
        self.listener = ProbeListener(lambda: "mesh_calls 1\n", why_not_ready=lambda: self.reason, pulse=self.pulse)
        self.listener.start(keeper, bind("127.0.0.1:0"))
        assert self.listener.port is not None
        self.port = self.listener.port


@pytest.fixture
def world() -> Iterator[World]:
    keeper = Keeper()
    made = World(keeper)
    yield made
    made.listener.stop()
    keeper.stop()


def test_health_readiness_and_metrics_and_nothing_else(world: World) -> None:
    """Also by a name in Host, which a browser might send; `/status` names peers, and is not told here."""
    assert [ask(world.port, path)[0] for path in ("/healthz", "/livez", "/readyz", "/metrics")] == [200] * 4
    assert ask(world.port, "/readyz?verbose", host="evil.example")[0] == 200
    assert ask(world.port, "/metrics")[1] == b"mesh_calls 1\n"
    for path in ("/status", "/", "/livez/", "/metrics/x", "//livez", "/LIVEZ"):
        assert ask(world.port, path)[0] == 404, path
    assert [ask(world.port, "/livez", method)[0] for method in ("POST", "PUT", "DELETE", "OPTIONS")] == [404] * 4


def test_a_load_balancer_may_ask_for_the_head_alone(world: World) -> None:
    """The same status, and no body."""
    world.reason = "draining"
    assert (ask(world.port, "/livez", "HEAD"), ask(world.port, "/readyz", "HEAD")) == ((200, b""), (503, b""))


def test_what_is_no_http_is_refused(world: World) -> None:
    """With a word, as everywhere."""
    with socket.create_connection(("127.0.0.1", world.port), timeout=10) as sock:
        sock.sendall(b"\x16\x03\x01\r\n\r\n")
        assert sock.recv(100).startswith(b"HTTP/1.1 400")


def test_readiness_says_why_not(world: World) -> None:
    """A person reads it, too. Health has nothing to do with it."""
    world.reason = "starting"
    assert (ask(world.port, "/readyz"), ask(world.port, "/livez")[0]) == ((503, b"starting\n"), 200)


def test_a_silent_event_loop_is_not_alive(world: World) -> None:
    """From its first beat on, until it rests; a server without a loop is never judged by one."""
    world.clock.now += 10 * SILENT
    assert ask(world.port, "/livez")[0] == 200
    world.pulse.begin()
    world.clock.now += 10 * SILENT
    assert (ask(world.port, "/livez")[0], world.pulse.has_begun) == (200, True)
    world.pulse.beat()
    world.clock.now += SILENT
    assert ask(world.port, "/livez")[0] == 200
    world.clock.now += 1
    assert ask(world.port, "/livez") == (503, b"the event loop is silent for 31 s\n")
    assert ask(world.port, "/healthz")[0] == 503
    world.pulse.rest()
    assert ask(world.port, "/livez")[0] == 200


def test_a_flood_does_not_make_a_process_look_dead(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever holds connections and asks nothing loses the oldest of them to a probe, which asks at once."""
    monkeypatch.setattr(exporter, "MOST", 4)
    with contextlib.ExitStack() as stack:
        held = [stack.enter_context(socket.create_connection(("127.0.0.1", world.port), timeout=10)) for _ in range(20)]
        assert [ask(world.port, "/livez")[0] for _ in range(5)] == [200] * 5
        with contextlib.suppress(ConnectionResetError):
            assert held[0].recv(1) == b""


# ------------------------------------------------------------------------------------------------ real servers

APP = """
import time

def wsgi(environ, start_response):
    start_response("200 OK", [("content-length", "2")])
    return [b"ok"]

async def asgi(scope, receive, send):
    if scope["type"] == "lifespan":
        await receive()
        import asyncio
        await asyncio.sleep(1.5)
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await send({"type": "lifespan.shutdown.complete"})
        return
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})
"""
KINDS = {
    "uvicorn": ("asgi",),
    "gunicorn-asgi": ("asgi", "--workers", "2"),
    "gunicorn-gthread": ("wsgi", "--workers", "3"),
    "gunicorn-sync": ("wsgi", "--threads", "1", "--workers", "2"),
}


class Served:
    def __init__(self, child: subprocess.Popen[str], port: int, public: int, probe: int) -> None:
        self.child, self.port, self.public, self.probe = child, port, public, probe

    def seen(self, path: str, wanted: int, seconds: float = 15.0) -> None:
        end = time.monotonic() + seconds
        while True:
            with contextlib.suppress(OSError):
                if ask(self.probe, path)[0] == wanted:
                    return
            assert time.monotonic() < end, f"{path} does not become {wanted}"
            time.sleep(0.02)


@pytest.fixture
def served(tmp_path: Path) -> Callable[..., Any]:
    @contextlib.contextmanager
    def serving(kind: str) -> Iterator[Served]:
        (tmp_path / "probed_app.py").write_text(APP)
        identities(tmp_path, "orders", "web")
        port, public, probe = free_port(), free_port(), free_port()
        inbound = {
            "public": {"listen": f"127.0.0.1:{public}", "allow": [{"name": "open", "from": ["*"], "paths": ["/open"]}]},
            "probe": f"127.0.0.1:{probe}",
            "drain": {"wait": "2s", "grace": "10s"},
        }
        services: dict[str, Any] = {
            "orders": {"listen": f"127.0.0.1:{port}", "inbound": inbound, "secure": {"allow": [{"name": "web", "from": ["web"]}]}}
        }
        file = write_config(tmp_path, {**services, "web": {}}, mode="enforce")
        app, *words = KINDS[kind]
        command = (MESHLIB, "serve", f"probed_app:{app}", "--config", str(file), "--service", "orders", *words)
        with process(*command, env={"PYTHONPATH": f"{tmp_path}:{ROOT}"}, cwd=tmp_path) as child:
            wait_until_listening(probe, child)
            yield Served(child, port, public, probe)

    return serving


@pytest.mark.parametrize("kind", KINDS)
def test_probes_are_answered_by_each_server(served: Any, kind: str) -> None:
    """Without a certificate, in mode enforce: alive while it starts, ready when it serves, not ready as soon as it drains."""
    with served(kind) as here:
        here.seen("/livez", 200)
        if kind == "uvicorn":
            assert ask(here.probe, "/readyz") == (503, b"starting\n")
        here.seen("/readyz", 200)
        assert b"meshlib_observe_info" in ask(here.probe, "/metrics")[1]
        assert ask(here.probe, "/status")[0] == 404
        here.child.send_signal(signal.SIGTERM)
        here.seen("/readyz", 503, 1.5)
        assert ask(here.probe, "/livez")[0] == 200
        assert here.child.wait(15) == 0


@pytest.mark.parametrize("kind", KINDS)
def test_the_public_listener_has_rules_of_its_own(served: Any, kind: str) -> None:
    """Plain text is welcome there, and so is what its rules allow; the mesh port of the same process takes neither. Whatever Host says."""
    with served(kind) as here:
        here.seen("/readyz", 200)
        wait_until_listening(here.public, here.child)
        for host in (f"orders:{here.port}", f"orders:{here.public}", "orders"):
            assert ask(here.public, "/open", host=host)[0] == 200
            assert ask(here.public, "/closed", host=host)[0] in (401, 403)
            assert ask(here.port, "/open", host=host)[0] == 400


def test_each_worker_answers_for_itself(served: Any) -> None:
    """On one socket, which outlives them: where one is gone, another answers."""
    with served("gunicorn-gthread") as here:
        here.seen("/readyz", 200)
        children = Path(f"/proc/{here.child.pid}/task/{here.child.pid}/children")
        end = time.monotonic() + 15
        while len(children.read_text().split()) < 3:
            assert time.monotonic() < end
            time.sleep(0.05)
        for pid in children.read_text().split():
            os.kill(int(pid), signal.SIGKILL)
        here.seen("/readyz", 200)


def test_an_address_that_is_taken_is_named_and_nothing_is_left(tmp_path: Path) -> None:
    """Each of the three: exit code 1, the address, and no other listener of ours."""
    identities(tmp_path, "orders")
    (tmp_path / "probed_app.py").write_text(APP)
    port, public, probe = free_port(), free_port(), free_port()
    inbound = {
        "public": {"listen": f"127.0.0.1:{public}", "allow": [{"name": "all", "from": ["*"]}]},
        "probe": f"127.0.0.1:{probe}",
    }
    file = write_config(tmp_path, {"orders": {"listen": f"127.0.0.1:{port}", "inbound": inbound}}, mode="enforce")
    for taken in (port, public, probe):
        with bind(f"127.0.0.1:{taken}"):
            done = subprocess.run(
                [MESHLIB, "serve", "probed_app:wsgi", "--config", str(file), "--service", "orders"],
                env={**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"}, cwd=tmp_path, capture_output=True, text=True, timeout=30,
            )  # fmt: skip
        assert (done.returncode, f"127.0.0.1:{taken} can't be listened on" in done.stderr) == (1, True), done.stderr
        assert "Traceback" not in done.stderr
