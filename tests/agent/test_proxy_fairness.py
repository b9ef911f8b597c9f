"""Does one caller of the node hold up another? Callers share connections, threads and descriptors, and know nothing of one another."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import h2.config
import h2.connection
import h2.events
import pytest

from tests.agent.proxy_support import CALLER, Caller2, World, asking, head_of, heard, read_all, scripted, until, world

__all__ = ["world"]

GRPC = {"content-type": "application/grpc", "te": "trailers"}
NOBODY = 65534
LARGE = 200_000


def answering(plug: socket.socket) -> None:
    """An endpoint of HTTP/2: much for /large as the windows allow it, little for everything else."""
    left: dict[int, int] = {}
    for peer, event in heard(plug):
        if isinstance(event, h2.events.RequestReceived):
            assert event.stream_id is not None and event.headers is not None
            peer.send_headers(event.stream_id, [(":status", "200"), ("content-type", "application/grpc")])
            left[event.stream_id] = LARGE if dict(event.headers)[":path"] == "/large" else 10
        for stream in sorted(left):
            while left.get(stream):
                size = min(peer.local_flow_control_window(stream), peer.max_outbound_frame_size, left[stream])
                if size <= 0:
                    break
                left[stream] -= size
                peer.send_data(stream, b"x" * size, end_stream=not left[stream])


def test_answers_that_one_caller_does_not_read_hold_up_nobody(world: World) -> None:
    """As many as fit on the connection that another caller of the same identity uses too."""
    with scripted(answering) as port:
        fields = GRPC | asking(port, expect="-", protocol="http2")
        slow, other = Caller2(world.caller()), Caller2(world.caller())
        assert other.ask(fields) and other.wait(h2.events.StreamEnded)
        for _ in range(60):
            slow.ask(fields, target="/large")
        time.sleep(0.5)
        for _ in range(5):
            other.ask(fields)
            assert other.wait(h2.events.StreamEnded, 5)
        upstream = [row for row in world.proxy.connections() if row["direction"] == "upstream"]
        assert len(upstream) == 1


@contextlib.contextmanager
def unanswered() -> Iterator[int]:
    """A port whose queue is full: connections to it wait until somebody gives up."""
    with socket.socket() as server, contextlib.ExitStack() as stack:
        server.bind(("127.0.0.1", 0))
        server.listen(0)
        port: int = server.getsockname()[1]
        for _ in range(3):
            plug = stack.enter_context(socket.socket())
            plug.setblocking(False)
            plug.connect_ex(("127.0.0.1", port))
        time.sleep(0.2)
        yield port


@pytest.mark.parametrize(("first", "second"), [(3000, 300), (60, 700)])
def test_each_caller_waits_as_long_as_it_said(world: World, first: int, second: int) -> None:
    """Though both wait for the same connection, and the other one has more time or less."""
    with unanswered() as port:
        callers = [Caller2(world.caller()), Caller2(world.caller())]
        callers[0].ask(GRPC | asking(port, expect="-", protocol="http2", connect=first))
        time.sleep(0.03)
        begun = time.monotonic()
        callers[1].ask(GRPC | asking(port, expect="-", protocol="http2", connect=second))
        event = callers[1].wait(h2.events.ResponseReceived, 5)
        took = time.monotonic() - begun
        assert dict(event.headers)[b"x-mesh-failed"] == b"connect_timeout; written=0"
        assert second / 1000 - 0.05 < took < second / 1000 + 1.0


CROWD = """
    import os, resource, socket, sys
    from meshlib._native import core
    resource.setrlimit(resource.RLIMIT_NOFILE, (9000, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    if os.geteuid() == 0:
        os.setgid({nobody}); os.setuid({nobody})
    proxy = core.Proxy(1)
    plugs = []
    for _ in range(2600):
        ours, theirs = socket.socketpair()
        proxy.adopt(theirs.detach(), "spiffe://td/a")
        plugs.append(ours)
    plugs[-1].settimeout(10)
    assert plugs[-1].recv(1) == b""
    plugs[0].sendall(b"GET /ping HTTP/1.1\\r\\nhost: a\\r\\n\\r\\n")
    assert b" 204 " in plugs[0].recv(1000)
    stats = proxy.stats()["outbound"]
    print(stats["connections_open"], stats["connections_refused"])
    proxy.stop(0.0)
"""


@pytest.mark.skipif(resource.getrlimit(resource.RLIMIT_NOFILE)[1] < 9000, reason="fewer descriptors than it takes")
def test_one_user_has_a_quarter_of_the_data_socket(tmp_path: Path) -> None:
    """What comes above is closed at once, and its caller goes on by himself."""
    command = [sys.executable, "-c", textwrap.dedent(CROWD).format(nobody=NOBODY)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.stdout, done.returncode) == ("2500 100\n", 0), done.stderr[-2000:]


LISTENER = """
    import os, socket, sys
    os.setgid({nobody}); os.setuid({nobody})
    server = socket.socket(socket.AF_UNIX)
    server.bind(sys.argv[1])
    server.listen()
    print("here", flush=True)
    while True:
        plug, _ = server.accept()
        if plug.recv(65536):
            plug.sendall(b"HTTP/1.1 200 OK\\r\\ncontent-length: 0\\r\\n\\r\\n")
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="needs two users")
def test_socket_of_another_user_is_told_nothing(world: World) -> None:
    """Whoever has put his socket in the application's place would learn the secret of calls that are handed over."""
    folder = Path(tempfile.mkdtemp(prefix="mesh-"))
    world.open.callback(shutil.rmtree, folder)
    folder.chmod(0o777)
    path = folder / "app.sock"
    command = [sys.executable, "-c", textwrap.dedent(LISTENER).format(nobody=NOBODY), str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as listener:
        try:
            assert listener.stdout is not None and listener.stdout.readline() == "here\n"
            for owners, status in (([0, 1000], b" 503 "), ([0, NOBODY], b" 200 "), ([], b" 200 ")):
                with socket.create_server(("127.0.0.1", 0)) as plug:
                    world.proxy.listen("orders", plug.fileno(), CALLER, str(path), "permissive", owners)
                    port = plug.getsockname()[1]
                with socket.create_connection(("127.0.0.1", port), 10) as caller:
                    caller.sendall(b"GET / HTTP/1.1\r\nhost: orders\r\n\r\n")
                    assert status in head_of(caller)
                world.proxy.unlisten("orders")
        finally:
            listener.kill()


@pytest.mark.parametrize("token", ["h2c", "websocket, h2c", "TLS/1.0"])
def test_no_protocol_but_websocket_is_agreed_on(world: World, token: str) -> None:
    """Behind another one the application would hear what we never looked at."""
    heads: list[bytes] = []

    def agree(plug: socket.socket) -> None:
        heads.append(head_of(plug))
        plug.sendall(b"HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: %s\r\n\r\n" % token.encode())
        heads.append(plug.recv(65536))

    with scripted(agree) as port:
        plug = world.caller()
        fields = "".join(f"{name}: {value}\r\n" for name, value in asking(port, expect="-").items())
        offer = f"connection: upgrade, http2-settings\r\nupgrade: {token}\r\nhttp2-settings: AAMAAABkAAQAAP__\r\n"
        plug.sendall(f"GET / HTTP/1.1\r\nhost: orders\r\n{offer}{fields}\r\n".encode())
        assert b"x-mesh-failed: protocol" in head_of(plug).lower()
        plug.sendall(b"GET /second HTTP/1.1\r\nhost: orders\r\n\r\n")
        until(lambda: len(heads) == 2)
    assert b"upgrade" not in heads[0].lower() and b"settings" not in heads[0].lower()
    assert heads[1] == b""


@pytest.mark.parametrize(
    "lengths",
    [
        "content-length: 5\r\ntransfer-encoding: chunked",
        "transfer-encoding: gzip, chunked",
        "transfer-encoding: chunked\r\ntransfer-encoding: chunked",
        "content-length: 5\r\ncontent-length: 5",
    ],
)
def test_an_answer_whose_length_is_said_in_two_ways_is_none(world: World, lengths: str) -> None:
    """As the client in the library judges: a part of it would look whole."""
    reply = f"HTTP/1.1 200 OK\r\n{lengths}\r\n\r\na\r\n0123456789\r\n0\r\n\r\n"

    def answer(plug: socket.socket) -> None:
        head_of(plug)
        plug.sendall(reply.encode())
        plug.recv(1)

    with scripted(answer) as port:
        plug = world.caller()
        fields = "".join(f"{name}: {value}\r\n" for name, value in asking(port, expect="-").items())
        plug.sendall(f"GET / HTTP/1.1\r\nhost: orders\r\n{fields}\r\n".encode())
        assert b"x-mesh-failed: protocol; written=1" in head_of(plug).lower()


def test_a_body_that_is_malformed_is_told_as_the_callers_own(world: World) -> None:
    """Not as if the endpoint had answered 400."""
    with scripted(lambda plug: plug.recv(65536) and plug.recv(65536)) as port:
        plug = world.caller()
        fields = "".join(f"{name}: {value}\r\n" for name, value in asking(port, expect="-").items())
        plug.sendall(f"POST / HTTP/1.1\r\nhost: orders\r\ntransfer-encoding: chunked\r\n{fields}\r\n5\r\nhello\r\n".encode())
        time.sleep(0.2)
        plug.sendall(b"no size\r\n")
        answer = read_all(plug, 5).lower()
        assert b"x-mesh-failed: caller; written=1" in answer


def test_a_caller_that_waits_for_its_worker_is_told_to_leave_too(tmp_path: Path) -> None:
    """Its entry is taken away between its attestation and the first look at it."""
    made = World(tmp_path)
    try:
        for _ in range(20):
            plug = made.caller()
            made.proxy.readmit(CALLER)
            plug.settimeout(5)
            assert plug.recv(1) == b""
    finally:
        made.close()


def test_threads_of_one_process_share_one_connection(world: World) -> None:
    """And each gets its own answer."""
    with scripted(answering) as port:
        fields = GRPC | asking(port, expect="-", protocol="http2")
        ended: list[bool] = []

        def call() -> None:
            caller = Caller2(world.caller())
            caller.ask(fields)
            ended.append(caller.wait(h2.events.StreamEnded) is not None)

        threads = [threading.Thread(target=call) for _ in range(20)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert ended == [True] * 20
        assert sum(row["direction"] == "upstream" for row in world.proxy.connections()) == 1


def staying(plug: socket.socket) -> None:
    """An endpoint of HTTP/2 whose answers begin and don't end, and which takes no more of a body than its windows."""
    for peer, event in heard(plug):
        if isinstance(event, h2.events.RequestReceived):
            assert event.stream_id is not None
            peer.send_headers(event.stream_id, [(":status", "200"), ("content-type", "application/grpc")])


def test_streams_of_a_process_do_not_hold_up_its_other_calls(world: World) -> None:
    """It has one connection to us for all it does: hundreds of streams may stay open there, and be given up at once."""
    with scripted(staying) as stays, scripted(answering) as answers:
        caller = Caller2(world.caller())
        long = GRPC | asking(stays, expect="-", protocol="http2")
        short = GRPC | asking(answers, expect="-", protocol="http2")
        for _ in range(3):
            streams = [caller.ask(long) for _ in range(300)]
            for _ in streams:
                assert caller.wait(h2.events.ResponseReceived)
            caller.ask(short)
            assert caller.wait(h2.events.StreamEnded, 5)
            for stream in streams:
                caller.peer.reset_stream(stream, 8)
            caller.flush()
            caller.ask(short)
            assert caller.wait(h2.events.StreamEnded, 5)
        # In one go: opened and given up before anybody looked.
        for _ in range(300):
            stream = caller.peer.get_next_available_stream_id()
            pseudo = [(":method", "POST"), (":scheme", "http"), (":authority", "orders"), (":path", "/")]
            caller.peer.send_headers(stream, [*pseudo, *long.items()])
            caller.peer.reset_stream(stream, 8)
        caller.flush()
        caller.ask(short)
        assert caller.wait(h2.events.StreamEnded, 5)


def test_uploads_that_stand_still_do_not_hold_up_other_calls(world: World) -> None:
    """What we keep of them is bounded for each, and all together leave room on the connection."""
    with scripted(staying) as stays, scripted(answering) as answers:
        caller = Caller2(world.caller())
        fields = GRPC | asking(stays, expect="-", protocol="http2")
        for _ in range(300):
            stream = caller.ask(fields, method="POST", is_end=False)
            assert caller.wait(h2.events.ResponseReceived)
            left = 60_000
            while left:
                size = min(left, caller.peer.max_outbound_frame_size)
                caller.peer.send_data(stream, b"x" * size)
                left -= size
            caller.flush()
        stream = caller.ask(GRPC | asking(answers, expect="-", protocol="http2"), method="POST", is_end=False)
        caller.peer.send_data(stream, b"x" * 10_000, end_stream=True)
        caller.flush()
        assert caller.wait(h2.events.StreamEnded, 5)
