"""Do gunicorn's workers take what they can serve, and leave the rest to others? gunicorn's own command, in processes, and parts of them."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from meshlib.server import gunicorn as tested
from meshlib.server.door import PATIENCE
from meshlib.server.gunicorn import SyncWorker, ThreadWorker, is_closed_above, waiting_at
from tests.support import PYTHON, ROOT, free_port, process, wait_until_listening, write_config

APP = """
import time, meshlib

mesh = meshlib.Mesh.load()
seen = []

def app(environ, start_response):
    seen.append(environ["PATH_INFO"])
    time.sleep(float(environ["PATH_INFO"].partition("/slow/")[2] or 0))
    body = " ".join(seen).encode()
    start_response("200 OK", [("content-length", str(len(body)))])
    return [body]

wsgi = mesh.wsgi(app)
"""


@pytest.fixture
def served(tmp_path: Path) -> Callable[..., Any]:
    @contextlib.contextmanager
    def serving(kind: str, *words: str, grace: int = 2) -> Iterator[tuple[int, Any]]:
        (tmp_path / "worked.py").write_text(APP)
        port = free_port()
        file = write_config(tmp_path, {"orders": {"listen": f"127.0.0.1:{port}", "inbound": {"drain": {"wait": "0s"}}}})
        env = {"PYTHONPATH": f"{tmp_path}:{ROOT}", "MESHLIB_CONFIG": str(file), "MESHLIB_SERVICE": "orders"}
        command = (PYTHON, "-m", "gunicorn", "-k", f"meshlib.server.gunicorn.{kind}", "-b", f"127.0.0.1:{port}", "worked:wsgi")
        words = (*words, "--graceful-timeout", str(grace), "--no-control-socket")
        with process(*command, *words, env=env, cwd=tmp_path) as child:
            wait_until_listening(port, child)
            # Until a worker is behind it.
            assert ask(port, "/first").startswith(b"HTTP/1.1 200")
            yield port, child

    return serving


def ask(port: int, target: str, *fields: str, timeout: float = 30.0) -> bytes:
    head = "\r\n".join([f"GET {target} HTTP/1.1", "host: orders", "connection: close", *fields, "", ""])
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=timeout) as sock:
            sock.sendall(head.encode())
            return b"".join(iter(lambda: sock.recv(65536), b""))
    except OSError as error:
        return repr(error).encode()


@contextlib.contextmanager
def asking(port: int, target: str, count: int) -> Iterator[list[bytes]]:
    """Answers, all of which are there at the end."""
    answers: list[bytes] = []
    threads = [threading.Thread(target=lambda: answers.append(ask(port, target))) for _ in range(count)]
    for thread in threads:
        thread.start()
    # Whoever asks after this stands behind them.
    time.sleep(0.2)
    yield answers
    for thread in threads:
        thread.join()


@pytest.mark.parametrize("sig", [signal.SIGHUP, signal.SIGTTOU], ids=["reload", "one-less"])
def test_a_sync_worker_that_is_replaced_leaves_the_queue_to_the_others(served: Any, sig: int) -> None:
    """It would have taken all of it, and could not have answered it within its grace."""
    with served("SyncWorker", "--workers", "2") as (port, child), asking(port, "/slow/0.2", 40) as answers:
        time.sleep(0.5)
        child.send_signal(sig)
    assert [answer[:12] for answer in answers] == [b"HTTP/1.1 200"] * 40


def test_when_the_server_ends_its_sync_workers_share_who_waits(served: Any) -> None:
    """As long as the grace lasts. One that took all would leave the others with nothing to do, and be done in twice the time."""
    with served("SyncWorker", "--workers", "2", grace=5) as (port, child):
        with asking(port, "/slow/0.2", 34) as answers:
            time.sleep(0.5)
            child.send_signal(signal.SIGTERM)
        assert [answer[:12] for answer in answers] == [b"HTTP/1.1 200"] * 34
        child.wait(10)


def test_a_sync_worker_that_is_to_end_at_once_takes_nobody_more(served: Any) -> None:
    """gunicorn takes the end of a worker in a handler for a failed request, and would go on to the next one."""
    with (
        served("SyncWorker", "--workers", "1", grace=20) as (port, child),
        asking(port, "/slow/1", 1),
        asking(port, "/slow/15", 3),
    ):
        time.sleep(0.5)
        child.send_signal(signal.SIGTERM)
        # By now it answers those who wait.
        time.sleep(1.5)
        begun = time.monotonic()
        child.send_signal(signal.SIGQUIT)
        child.wait(10)
        assert time.monotonic() - begun < 2
        assert "SIGKILL" not in child.stdout.read()


def test_silent_connections_do_not_fill_a_worker(served: Any) -> None:
    """Whoever has said nothing for longest makes room; far sooner than an idle connection would."""
    words = ("--workers", "1", "--threads", "2", "--worker-connections", "10", "--keep-alive", "75")
    with served("ThreadWorker", *words) as (port, _), contextlib.ExitStack() as stack:
        for _ in range(40):
            stack.enter_context(socket.create_connection(("127.0.0.1", port)))
        begun = time.monotonic()
        assert [ask(port, "/a", timeout=5)[:12] for _ in range(5)] == [b"HTTP/1.1 200"] * 5
        assert time.monotonic() - begun < PATIENCE / 2


def test_who_waited_too_long_for_a_thread_is_refused_before_the_handler(served: Any) -> None:
    """Its caller has given up. Where it waited is nothing to its deadline."""
    with served("ThreadWorker", "--workers", "1", "--threads", "2") as (port, _):
        with asking(port, "/slow/1.5", 2):
            time.sleep(0.5)
            late = ask(port, "/late", "x-mesh-deadline-ms: 500")
        assert late.startswith(b"HTTP/1.1 504")
        assert b"/late" not in ask(port, "/seen", "x-mesh-deadline-ms: 5000")


# ------------------------------------------------------------------------------------------------ parts


def test_a_connection_that_was_never_used_has_the_patience_of_a_head(monkeypatch: pytest.MonkeyPatch) -> None:
    """The time of idle ones is for who has asked for something; and nothing but an answer renews it."""
    worker: Any = SimpleNamespace(cfg=SimpleNamespace(keepalive=75), pending_conns=deque(), poller=SimpleNamespace())
    worker.on_pending_socket_readable = None
    worker.poller.register = lambda *_: None
    times = []
    for is_unused in (True, False):
        sock = SimpleNamespace(since=1000.0, is_unused=is_unused, setblocking=lambda _: None)
        conn: Any = SimpleNamespace(sock=sock)
        monkeypatch.setattr(tested, "partial", lambda *_: None)
        ThreadWorker._await(worker, conn)
        times.append(conn.timeout)
    assert times == [1000.0 + PATIENCE, 1075.0]


def test_the_oldest_that_never_was_answered_makes_room() -> None:
    """First one whose head has not come; never one that has had an answer."""
    ended: list[Any] = []

    def conn(since: float, arrived: float = 0.0, is_unused: bool = True) -> Any:
        return SimpleNamespace(sock=SimpleNamespace(since=since, arrived=arrived, is_unused=is_unused))

    used, uploading, old, young = conn(1.0, is_unused=False), conn(2.0, 3.0), conn(4.0), conn(5.0)
    worker: Any = SimpleNamespace(pending_conns=deque([young, used, uploading, old]), _end=ended.append)
    for _ in range(5):
        ThreadWorker.make_room(worker)
    assert (ended, list(worker.pending_conns)) == ([old, young, uploading], [used])


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="the system tells nobody")
def test_a_listener_that_the_arbiter_has_closed_is_known() -> None:
    """By its parent's descriptors; whoever can't see them takes it for closed."""
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.create_server(("127.0.0.1", 0)) as other:
        assert [is_closed_above(listener, pid) for pid in (os.getpid(), os.getppid(), 2**30)] == [False, True, True]
        copy = other.dup()
        other.close()
        assert not is_closed_above(copy, os.getpid())
        copy.close()


@pytest.mark.skipif(not hasattr(socket, "TCP_INFO"), reason="the system tells nobody")
def test_a_listener_tells_how_many_wait() -> None:
    """0 where there is no such queue."""
    with socket.create_server(("127.0.0.1", 0)) as listener, contextlib.ExitStack() as stack:
        for _ in range(3):
            stack.enter_context(socket.create_connection(listener.getsockname()))
        end = time.monotonic() + 5
        while waiting_at(listener) < 3 and time.monotonic() < end:
            time.sleep(0.01)
        assert waiting_at(listener) == 3
    with socket.socket(socket.AF_UNIX) as other:
        assert waiting_at(other) == 0


def test_that_no_file_is_left_is_not_the_end_of_a_queue() -> None:
    """Who waits behind that is not answered: the log says so. A caller that has gone meanwhile is just overlooked."""
    problems = [OSError(errno.ECONNABORTED, "gone"), OSError(errno.EMFILE, "too many open files")]
    logged: list[Any] = []

    def accept() -> Any:
        raise problems.pop(0)

    listener = SimpleNamespace(accept=accept, getsockname=lambda: "/socket", close=lambda: None)
    door: Any = SimpleNamespace(is_public=lambda _: False)
    queue = tested._Queue(listener, door, SimpleNamespace(error=lambda *words: logged.append(words)))
    assert (len(queue), len(logged), problems) == (0, 1, [])


def test_a_sync_worker_does_not_overlook_that_no_file_is_left() -> None:
    """An empty queue is an end, a caller that has gone is none, and anything else is an error."""
    answers: list[Any] = [None, OSError(errno.ECONNABORTED, ""), OSError(errno.EAGAIN, ""), OSError(errno.EMFILE, "")]

    def accept(_: Any) -> None:
        if (problem := answers.pop(0)) is not None:
            raise problem

    worker: Any = SimpleNamespace(accept=accept)
    assert [SyncWorker.has_served(worker, None) for _ in range(3)] == [True, True, False]
    with pytest.raises(OSError, match="24"):
        SyncWorker.has_served(worker, None)


@pytest.mark.parametrize(
    ("kind", "threads", "in_flight", "adaptive", "is_told"),
    [
        (ThreadWorker, 8, 100, object(), True),
        (SyncWorker, 8, 2, object(), True),
        (ThreadWorker, 8, 8, object(), False),
        (ThreadWorker, 8, 100, None, False),
    ],
)
def test_where_threads_are_the_places_a_warning_says_so(
    kind: Any, threads: int, in_flight: int, adaptive: Any, is_told: bool, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    """Who waits for a thread waits in gunicorn's line, which knows no priorities. Nobody is told who has asked for nothing special."""

    def load(self: Any) -> None:
        self.wsgi = None

    monkeypatch.setattr("gunicorn.workers.base.Worker.load_wsgi", load)
    worker = kind.__new__(kind)
    worker.cfg = SimpleNamespace(threads=threads)
    inbound = SimpleNamespace(in_flight=in_flight, adaptive=adaptive, priorities=())
    worker.door = SimpleNamespace(mesh=SimpleNamespace(config=SimpleNamespace(own=SimpleNamespace(inbound=inbound))))
    worker._drain = SimpleNamespace()
    worker.load_wsgi()
    assert ("threads" in caplog.text) is is_told
