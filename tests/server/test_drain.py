"""Does a process end so that nobody notices? The table on a virtual clock, and real servers under load that get a signal."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest

from meshlib.server import drain as tested
from meshlib.server.drain import LAST, LINGER, TELL, Drain, Phase, drain_of
from tests.server.inside import Clock
from tests.support import PYTHON, ROOT, free_port, mesh_of, process, wait_until_listening, write_config

WAIT, GRACE = 5.0, 25.0

MESHLIB = str(Path(PYTHON).parent / "meshlib")


class World:
    """A drain on a clock of the test's, and what it was asked to run, which runs when the test says so."""

    def __init__(self, *, is_seen: bool = True, wait: float = WAIT, grace: float = GRACE) -> None:
        self.clock = Clock()
        self.work: list[Coroutine[Any, Any, None]] = []
        self.drain = Drain(lambda: (wait, grace), is_seen=lambda: is_seen, run=self.work.append, clock=self.clock)

    def after(self, seconds: float) -> Phase:
        self.clock.now += seconds
        return self.drain.look()

    def tell(self) -> None:
        for work in self.work:
            asyncio.run(work)
        self.work.clear()


class Way:
    is_closing = True


def test_the_table_is_walked_through_by_time() -> None:
    """Ready, not ready for `wait`, then closing for `grace` less the last second, then over; and everybody hears of the closing."""
    here, way = World(), Way()
    here.drain.follow(way)
    assert (here.drain.look(), here.drain.is_serving, way.is_closing) == (Phase.SERVING, True, False)
    assert here.drain.begin() is Phase.LEAVING
    assert (here.drain.is_serving, here.after(WAIT - 0.1), way.is_closing) == (False, Phase.LEAVING, False)
    assert (round(here.drain.left, 3), here.after(0.2)) == (0.1, Phase.CLOSING)
    assert (way.is_closing, here.drain.is_closing) == (True, True)
    assert here.after(GRACE - LAST - 0.3) is Phase.CLOSING
    assert (here.after(0.3), here.drain.left, here.after(100)) == (Phase.ENDED, 0.0, Phase.ENDED)


def test_all_of_it_takes_no_longer_than_wait_and_grace() -> None:
    """Orchestrators kill after 30 seconds: what is left after ours is for the end itself."""
    here = World()
    here.drain.begin()
    begun = here.clock.now
    while here.after(0.1) is not Phase.ENDED:
        assert here.clock.now - begun < WAIT + GRACE
    assert here.clock.now - begun == pytest.approx(WAIT + GRACE - LAST, abs=0.2)


def test_to_begin_again_changes_nothing() -> None:
    """An arbiter says SIGTERM again and again to a worker of which it has too many."""
    here = World()
    here.drain.begin()
    here.after(WAIT - 1)
    here.drain.begin()
    assert (round(here.drain.left, 3), here.after(1.1), here.drain.begin()) == (1.0, Phase.CLOSING, Phase.CLOSING)


def test_a_person_does_not_wait() -> None:
    """Neither from the beginning, nor where somebody else has begun; and not for idle connections."""
    first, later = World(), World()
    assert (first.drain.begin(is_person=True), first.drain.linger) == (Phase.CLOSING, 0.0)
    later.drain.begin()
    assert (later.drain.linger, later.drain.begin(is_person=True)) == (LINGER, Phase.LEAVING)
    assert (later.drain.look(), later.drain.linger) == (Phase.CLOSING, 0.0)


def test_nobody_is_waited_for_where_nobody_can_see_readiness() -> None:
    """No probe listener, no metrics, nobody to be told; or another process takes the place of this one."""
    assert World(is_seen=False).drain.begin() is Phase.CLOSING
    assert World().drain.begin(may_wait=False) is Phase.CLOSING
    here = World(is_seen=False)
    here.drain.on_leave(lambda: None)
    assert here.drain.begin() is Phase.LEAVING


@pytest.mark.parametrize(("longest", "wait", "end"), [(30.0, 5.0, 29.0), (60.0, 5.0, 29.0), (12.0, 5.0, 11.0), (6.0, 3.0, 5.0), (1.0, 0.5, 0.75)])  # fmt: skip
def test_it_ends_before_somebody_else_kills_it(longest: float, wait: float, end: float) -> None:
    """gunicorn's `graceful_timeout` may be shorter than what we are configured for."""
    here = World()
    here.drain.begin(longest=longest)
    assert here.drain.left == pytest.approx(wait)
    assert here.after(wait) is Phase.CLOSING
    assert here.drain.left == pytest.approx(end - wait)


def test_who_is_to_be_told_is_told_once_and_waited_for() -> None:
    """As long as it takes, but not longer than 5 seconds; plain functions and coroutine functions, and a failure is nobody else's."""
    here, told = World(wait=0.0), []

    async def registry() -> None:
        told.append("registry")

    def broken() -> None:
        told.append("broken")
        raise RuntimeError("no such registry")

    for callback in (broken, registry):
        here.drain.on_leave(callback)
    here.drain.begin()
    assert (here.drain.look(), here.drain.look(), len(here.work), told) == (Phase.LEAVING, Phase.LEAVING, 1, [])
    here.tell()
    assert (sorted(told), here.drain.look(), here.work) == (["broken", "registry"], Phase.CLOSING, [])


def test_who_takes_too_long_to_be_told_is_left() -> None:
    """A registry that is away must not keep the process."""
    here = World(wait=1.0)
    here.drain.on_leave(lambda: None)
    here.drain.begin()
    assert (here.after(TELL - 0.1), here.after(0.2)) == (Phase.LEAVING, Phase.CLOSING)
    for work in here.work:
        work.close()


def test_one_that_hangs_keeps_no_other_from_being_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """All at once, and cut after their time."""
    monkeypatch.setattr(tested, "TELL", 0.05)
    here, told = World(), []

    async def hangs() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            told.append("cut")

    here.drain.on_leave(hangs)
    here.drain.on_leave(lambda: told.append("second"))
    here.drain.begin()
    here.drain.look()
    here.tell()
    assert told == ["second", "cut"]


def test_where_nobody_can_be_told_the_process_ends_all_the_same() -> None:
    """The keeper is gone already."""

    def gone(work: Coroutine[Any, Any, None]) -> None:
        raise RuntimeError("the keeper was stopped")

    clock = Clock()
    drain = Drain(lambda: (0.0, 5.0), run=gone, clock=clock)
    drain.on_leave(lambda: None)
    assert (drain.begin(), drain.look()) == (Phase.LEAVING, Phase.CLOSING)


def test_behind_a_server_that_is_not_ours_only_registries_are_waited_for() -> None:
    """At the end of the lifespan everything is over; the application may be started again."""
    told: list[str] = []

    async def scenario() -> Drain:
        drain = Drain(run=lambda work: asyncio.ensure_future(work))
        drain.on_leave(lambda: told.append("registry"))
        await drain.depart()
        await drain.depart()
        return drain

    drain = asyncio.run(scenario())
    assert (drain.phase, told) == (Phase.ENDED, ["registry"])
    drain.renew()
    assert (drain.phase, drain.is_serving, drain.is_closing) == (Phase.SERVING, True, False)


def test_a_mesh_has_one_drain_and_a_child_one_of_its_own(tmp_path: Path) -> None:
    """What the parent began is not the end of its child, which still tells whom the parent would."""
    with mesh_of(tmp_path, {"other": {}}) as mesh:
        drain = drain_of(mesh)
        drain.on_leave(lambda: None)
        drain.begin()
        assert drain_of(mesh) is drain
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            mine = drain_of(mesh)
            os.write(writer, json.dumps([mine.is_serving, mine.begin() is Phase.LEAVING, drain.pid == os.getpid()]).encode())
            os._exit(0)
        os.close(writer)
        with os.fdopen(reader, "rb") as pipe:
            assert json.loads(pipe.read()) == [True, True, True]
        os.waitpid(child, 0)
        assert drain.phase is Phase.LEAVING


# ------------------------------------------------------------------------------------------------ real servers

APPS = """
import asyncio, threading, time

async def asgi(scope, receive, send):
    if scope["type"] == "lifespan":
        while True:
            message = await receive()
            await send({"type": message["type"] + ".complete"})
            if message["type"].endswith("shutdown"):
                return
    _, _, seconds = scope["path"].partition("/slow/")
    if scope["path"].startswith("/stuck"):
        await asyncio.to_thread(time.sleep, 60)
    await asyncio.sleep(float(seconds or 0))
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})

def wsgi(environ, start_response):
    if environ["PATH_INFO"].startswith("/stuck"):
        time.sleep(60)
    time.sleep(float(environ["PATH_INFO"].partition("/slow/")[2] or 0))
    start_response("200 OK", [("content-length", "2")])
    return [b"ok"]
"""
KINDS = {
    "uvicorn": ("asgi",),
    "gunicorn-asgi": ("asgi", "--workers", "2"),
    "gunicorn-gthread": ("wsgi", "--threads", "120"),
    "gunicorn-sync": ("wsgi", "--threads", "1", "--workers", "4"),
}


class Served:
    """A service in a process, with a probe port, and those who call it."""

    def __init__(self, port: int, probe: int, child: subprocess.Popen[str]) -> None:
        self.port, self.probe, self.child = port, probe, child
        self.answered = self.last = 0
        self.lost: list[str] = []
        self.in_flight = 0
        self.signalled = 0.0

    def kill(self, sig: int) -> None:
        self.signalled = self.signalled or time.monotonic()
        self.child.send_signal(sig)

    def readiness(self) -> int:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.probe), timeout=5) as sock:
            sock.sendall(b"GET /readyz HTTP/1.1\r\nhost: probe\r\n\r\n")
            return int(sock.recv(100)[9:12] or 0)
        return 0

    async def caller(self, target: str, pause: float) -> None:
        """Asks again and again, on one connection as long as that is kept, until nobody can connect any more."""
        reader = writer = None
        while True:
            if writer is None:
                try:
                    reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
                except OSError:
                    return
            assert reader is not None
            self.in_flight += 1
            try:
                writer.write(f"GET {target} HTTP/1.1\r\nhost: orders\r\n\r\n".encode())
                head = await reader.readuntil(b"\r\n\r\n")
                body = await reader.readexactly(2)
            except (OSError, asyncio.IncompleteReadError) as error:
                self.lost.append(f"{target}: {error!r}")
                return
            finally:
                self.in_flight -= 1
            assert (head[9:12], body) == (b"200", b"ok")
            self.answered += 1
            if b"connection: close" in head.lower():
                self.last += 1
                writer.close()
                writer = None
            await asyncio.sleep(pause)

    async def under_load(self, slow: int, sig: int = signal.SIGTERM) -> float:
        """`slow` requests in flight all the time and 500 short ones a second, a signal in their middle; seconds until the end."""
        calls = [self.caller("/slow/1", 0.0) for _ in range(slow)] + [self.caller("/a", 0.1) for _ in range(50)]
        tasks = [asyncio.ensure_future(call) for call in calls]
        while self.in_flight < slow or self.answered < 200:
            await asyncio.sleep(0.01)
        self.kill(sig)
        while self.readiness() == 200:
            await asyncio.sleep(0.01)
        await asyncio.gather(*tasks)
        return await asyncio.to_thread(self.ended)

    def ended(self, seconds: float = 30.0) -> float:
        self.child.wait(seconds)
        return time.monotonic() - self.signalled


def heard(sock: socket.socket) -> bytes:
    """One whole answer."""
    whole = b""
    while not whole.endswith(b"\r\n\r\nok") and (data := sock.recv(65536)):
        whole += data
    return whole


@pytest.fixture
def served(tmp_path: Path) -> Callable[..., Any]:
    @contextlib.contextmanager
    def serving(kind: str, *, wait: str = "1s", grace: str = "10s") -> Iterator[Served]:
        (tmp_path / "drained_apps.py").write_text(APPS)
        port, probe = free_port(), free_port()
        inbound = {"probe": f"127.0.0.1:{probe}", "drain": {"wait": wait, "grace": grace}, "in_flight": 1000}
        file = write_config(tmp_path, {"orders": {"listen": f"127.0.0.1:{port}", "inbound": inbound}})
        app, *words = KINDS[kind]
        command = (MESHLIB, "serve", f"drained_apps:{app}", "--config", str(file), "--service", "orders", *words)
        with process(*command, env={"PYTHONPATH": f"{tmp_path}:{ROOT}"}, cwd=tmp_path) as child:
            wait_until_listening(port, child)
            here = Served(port, probe, child)
            end = time.monotonic() + 20
            while here.readiness() != 200:
                assert time.monotonic() < end, "it does not become ready"
                time.sleep(0.05)
            yield here

    return serving


@pytest.mark.parametrize("kind", KINDS)
def test_a_signal_under_load_loses_nothing(served: Any, kind: str) -> None:
    """100 in flight and 500 a second: readiness goes at once, all that is accepted is answered, and the process is gone in time."""
    slow = 4 if kind == "gunicorn-sync" else 100
    with served(kind) as here:
        seconds = asyncio.run(here.under_load(slow))
    assert (here.lost, here.child.returncode) == ([], 0)
    assert here.last >= 50
    # It was served for the wait, and ended long before the grace was over.
    assert 1.0 <= seconds < 14


@pytest.mark.parametrize("kind", KINDS)
def test_a_second_signal_ends_at_once(served: Any, kind: str) -> None:
    """Whatever is in flight, and even where a handler in a thread can't be ended."""
    with served(kind, wait="5s", grace="25s") as here:
        with socket.create_connection(("127.0.0.1", here.port)) as sock:
            sock.sendall(b"GET /stuck HTTP/1.1\r\nhost: orders\r\n\r\n")
            time.sleep(0.3)
            here.kill(signal.SIGTERM)
            while here.readiness() == 200:
                time.sleep(0.01)
            here.kill(signal.SIGTERM)
            assert here.ended() < 5


@pytest.mark.parametrize("kind", KINDS)
def test_a_person_does_not_wait_for_a_load_balancer(served: Any, kind: str) -> None:
    """SIGINT: what is in flight is answered, and no time passes before that."""
    with served(kind, wait="30s", grace="20s") as here:
        with socket.create_connection(("127.0.0.1", here.port), timeout=20) as sock:
            sock.sendall(b"GET /slow/1 HTTP/1.1\r\nhost: orders\r\n\r\n")
            time.sleep(0.3)
            here.kill(signal.SIGINT)
            answer = b"".join(iter(lambda: sock.recv(65536), b""))
        assert answer.startswith(b"HTTP/1.1 200")
        assert b"connection: close" in answer.lower()
        assert (here.ended() < 10, here.child.returncode) == (True, 0)


@pytest.mark.parametrize("kind", KINDS)
def test_who_can_not_be_ended_does_not_keep_the_process(served: Any, kind: str) -> None:
    """A handler in a thread that runs on and on: at the end of the grace the process goes all the same."""
    with served(kind, wait="0s", grace="3s") as here:
        with socket.create_connection(("127.0.0.1", here.port)) as sock:
            sock.sendall(b"GET /stuck HTTP/1.1\r\nhost: orders\r\n\r\n")
            time.sleep(0.3)
            here.kill(signal.SIGTERM)
            assert here.ended() < 6


@pytest.mark.parametrize("kind", ["uvicorn", "gunicorn-asgi", "gunicorn-gthread"])
def test_an_idle_connection_may_ask_once_more(served: Any, kind: str) -> None:
    """When closing begins, its client may be sending already: answered, and told that it was the last; who says nothing is closed."""
    with served(kind, wait="0s", grace="20s") as here:
        asking, silent, busy = (socket.create_connection(("127.0.0.1", here.port), timeout=20) for _ in range(3))
        with asking, silent, busy:
            for sock in (asking, silent):
                sock.sendall(b"GET /a HTTP/1.1\r\nhost: orders\r\n\r\n")
                assert b"connection: close" not in heard(sock).lower()
            # So that the process is there for longer than the idle ones are.
            busy.sendall(b"GET /slow/4 HTTP/1.1\r\nhost: orders\r\n\r\n")
            time.sleep(0.2)
            here.kill(signal.SIGTERM)
            time.sleep(0.5)
            asking.sendall(b"GET /a HTTP/1.1\r\nhost: orders\r\n\r\n")
            last = b"".join(iter(lambda: asking.recv(65536), b""))
            assert (last[9:12], b"connection: close" in last.lower()) == (b"200", True)
            begun = time.monotonic()
            assert silent.recv(10) == b""
            assert time.monotonic() - begun < LINGER + 1
            assert b"".join(iter(lambda: busy.recv(65536), b"")).startswith(b"HTTP/1.1 200")
            assert here.ended() < 10


@pytest.mark.parametrize("kind", ["gunicorn-asgi", "gunicorn-gthread", "gunicorn-sync"])
def test_a_worker_hears_the_same_signal_twice_and_drains_once(served: Any, kind: str) -> None:
    """gunicorn's arbiter repeats itself to workers that it has too many of; another worker takes the place."""
    with served(kind, wait="1s", grace="20s") as here:
        (first, *_) = map(int, Path(f"/proc/{here.child.pid}/task/{here.child.pid}/children").read_text().split())
        with contextlib.ExitStack() as stack:
            # More than one, so that this worker has one of them.
            socks = [stack.enter_context(socket.create_connection(("127.0.0.1", here.port), timeout=20)) for _ in range(8)]
            for sock in socks:
                sock.sendall(b"GET /slow/2 HTTP/1.1\r\nhost: orders\r\n\r\n")
            time.sleep(0.5)
            for _ in range(3):
                os.kill(first, signal.SIGTERM)
                time.sleep(0.2)
            assert all(sock.recv(12) == b"HTTP/1.1 200" for sock in socks)
        end = time.monotonic() + 15
        while Path(f"/proc/{first}").exists():
            assert time.monotonic() < end
            time.sleep(0.05)
        assert here.child.poll() is None
