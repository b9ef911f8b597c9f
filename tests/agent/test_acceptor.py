"""Is everybody attested, bounded and counted, and nobody held up by anybody else? Real connections."""

from __future__ import annotations

import asyncio
import logging
import os
import resource
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from meshlib.agent import acceptor as acceptor_module
from meshlib.agent.acceptor import Acceptor
from meshlib.agent.attest import Attestor, Caller, Kernel, Peer
from meshlib.agent.sockets import open_socket
from meshlib.errors import Denied
from tests.agent.workload_world import PATIENCE


class Served:
    """What was handed on, and what became of it."""

    def __init__(self) -> None:
        self.callers: list[Caller] = []
        self.refused = 0
        self.ended: list[str] = []
        self.connections: list[socket.socket] = []

    async def caller(self, connection: socket.socket, caller: Caller) -> None:
        self.callers.append(caller)
        self.connections.append(connection)
        try:
            while await asyncio.get_running_loop().sock_recv(connection, 100):
                pass
            self.ended.append("eof")
        except asyncio.CancelledError:
            self.ended.append("cancelled")
            raise

    async def nobody(self, connection: socket.socket) -> None:
        self.refused += 1
        await asyncio.get_running_loop().sock_sendall(connection, b"no")


@asynccontextmanager
async def accepting(folder: Path, attestor: Attestor | None = None, **named: Any) -> AsyncIterator[tuple[Acceptor, Served, Path]]:
    served, listening = Served(), open_socket(folder / "x.sock", 0o666)
    on_refused = served.nobody if named.pop("answers", False) else None
    made = Acceptor(listening.sock, attestor or Attestor(), served.caller, on_refused=on_refused, name="test", **named)
    await made.start()
    try:
        yield made, served, listening.path
    finally:
        await made.close()
        listening.close()


def connected(path: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(PATIENCE)
    sock.connect(str(path))
    return sock


async def until(question: Any, answer: Any = True) -> None:
    end = time.monotonic() + PATIENCE
    while (found := question()) != answer and time.monotonic() < end:
        await asyncio.sleep(0.005)
    assert found == answer


async def told(sock: socket.socket) -> bytes:
    def read() -> bytes:
        try:
            return sock.recv(10)
        except ConnectionResetError:
            return b""

    return await asyncio.to_thread(read)


async def test_caller_is_handed_on_with_the_connection(tmp_path: Path) -> None:
    """And the connection is closed when that is over."""
    async with accepting(tmp_path) as (made, served, path):
        with connected(path):
            await until(lambda: len(served.callers), 1)
            assert (served.callers[0].pid, made.connections, made.accepted) == (os.getpid(), 1, 1)
        await until(lambda: (served.ended, made.connections), (["eof"], 0))
        assert served.connections[0].fileno() == -1


async def test_connection_that_is_kept_stays_open(tmp_path: Path) -> None:
    """Who takes it by `detach` closes it."""
    listening = open_socket(tmp_path / "x.sock", 0o666)
    kept: list[int] = []

    async def keep(connection: socket.socket, caller: Caller) -> None:
        kept.append(connection.detach())

    made = Acceptor(listening.sock, Attestor(), keep)
    await made.start()
    with connected(listening.path) as client:
        await until(lambda: (len(kept), made.connections), (1, 0))
        with socket.socket(fileno=kept[0]) as connection:
            connection.sendall(b"still here")
            assert client.recv(20) == b"still here"
    await made.close()
    listening.close()


class Refusing(Attestor):
    """Nobody can be attested; early or late."""

    def __init__(self, when: str) -> None:
        super().__init__()
        self.when = when

    def meet(self, sock: socket.socket) -> Peer:
        if self.when == "meet":
            raise Denied("no", rule="attest.test")
        return super().meet(sock)

    def attest(self, peer: Peer) -> Caller:
        raise Denied("no", rule="attest.test")


@pytest.mark.parametrize("when", ["meet", "attest"])
@pytest.mark.parametrize("answers", [True, False])
async def test_who_cannot_be_attested_is_answered_or_hung_up_on(tmp_path: Path, when: str, answers: bool) -> None:
    """And never handed on as a caller."""
    async with accepting(tmp_path, Refusing(when), answers=answers) as (made, served, path):
        with connected(path) as client:
            assert await told(client) == (b"no" if answers else b"")
        await until(lambda: made.connections, 0)
        assert (served.callers, served.refused, made.refused["attest.test"]) == ([], int(answers), 1)


async def test_one_user_cannot_take_all_places(tmp_path: Path) -> None:
    """Root is bounded by the bound for all only."""

    class Users(Kernel):
        uid = 1001

        def credentials(self, sock: socket.socket) -> tuple[int, int, int]:
            pid, _, gid = super().credentials(sock)
            return pid, self.uid, gid

    class Believing(Attestor):
        def attest(self, peer: Peer) -> Caller:
            return Caller(peer.pid, peer.uid, peer.gid)

    kernel = Users()
    clients = []
    async with accepting(tmp_path, Believing(kernel=kernel), most=6, most_of_one=3) as (made, served, path):
        for uid, expected in ((1001, 3), (1002, 5), (0, 6), (1003, 6)):
            kernel.uid = uid
            wanted = 2 if uid == 1002 else 5
            clients += [connected(path) for _ in range(wanted)]
            await until(lambda: made.accepted, len(clients))
            await until(lambda expected=expected: len(served.callers), expected)
        assert [caller.uid for caller in served.callers] == [1001] * 3 + [1002] * 2 + [0]
        assert made.refused["attest.too_many"] == len(clients) - 6
        for client in clients:
            client.close()
        await until(lambda: made.connections, 0)
        kernel.uid = 1001
        with connected(path):
            await until(lambda: len(served.callers), 7)


class Users(Kernel):
    """Everybody who connects is the user that a test says."""

    uid = 1001

    def credentials(self, sock: socket.socket) -> tuple[int, int, int]:
        pid, _, gid = super().credentials(sock)
        return pid, self.uid, gid


class Believing(Attestor):
    def attest(self, peer: Peer) -> Caller:
        return Caller(peer.pid, peer.uid, peer.gid)


async def test_strangers_leave_most_places_to_those_who_have_entries(tmp_path: Path) -> None:
    """However many users there are: each has few places, and all of them together a part. Root is none."""
    kernel, clients = Users(), []
    named = {"most": 9, "most_of_one": 5, "most_of_stranger": 2, "most_of_strangers": 3}
    async with accepting(tmp_path, Believing(kernel=kernel), knows=lambda uid: uid == 1001, **named) as (made, served, path):
        for uid, expected in ((2001, 2), (2002, 3), (2003, 3), (1001, 8), (0, 9)):
            kernel.uid = uid
            clients += [connected(path) for _ in range(6)]
            await until(lambda: made.accepted, len(clients))
            await until(lambda expected=expected: len(served.callers), expected)
        assert made.refused["attest.too_many"] == len(clients) - 9
        for client in clients:
            client.close()
        await until(lambda: (made.connections, len(made._places)), (0, 0))
        kernel.uid = 2003
        with connected(path):
            await until(lambda: len(served.callers), 10)


async def test_process_that_fits_no_entry_of_its_user_is_a_stranger(tmp_path: Path) -> None:
    """Whoever of that user does fit one finds room all the same."""
    fits = [False]
    named = {"most_of_one": 4, "most_of_stranger": 2, "most_of_strangers": 3, "fits": lambda _: fits[0]}
    async with accepting(tmp_path, Believing(kernel=Users()), **named) as (made, served, path):
        clients = [connected(path) for _ in range(4)]
        await until(lambda: (len(served.callers), made.refused["attest.too_many"]), (2, 2))
        fits[0] = True
        clients += [connected(path) for _ in range(5)]
        await until(lambda: (len(served.callers), made.refused["attest.too_many"]), (6, 3))
        for client in clients:
            client.close()
        await until(lambda: len(made._places), 0)


async def test_user_who_is_barred_is_hung_up_on(tmp_path: Path) -> None:
    """Before anything is found out about them; and taken again when that is over."""
    kernel, barred = Users(), {1001}
    async with accepting(tmp_path, Believing(kernel=kernel), bars=barred.__contains__) as (made, served, path):
        with connected(path) as client:
            assert await told(client) == b""
        assert (made.refused, len(made._places)) == ({"attest.flood": 1}, 0)
        barred.clear()
        with connected(path):
            await until(lambda: len(served.callers), 1)


async def test_slow_attestation_holds_nobody_up_but_its_caller(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is on a thread, and not waited for for ever."""
    go = threading.Event()

    class Slow(Attestor):
        first = True

        def attest(self, peer: Peer) -> Caller:
            if Slow.first:
                Slow.first = False
                go.wait(PATIENCE)
            return super().attest(peer)

    monkeypatch.setattr(acceptor_module, "SECONDS", 0.5)
    async with accepting(tmp_path, Slow()) as (made, served, path):
        with connected(path) as slow:
            await until(lambda: made.connections, 1)
            with connected(path):
                await until(lambda: len(served.callers), 1)
            assert await told(slow) == b""
            assert made.refused["attest.too_slow"] == 1
        go.set()


async def test_slow_attestations_of_one_user_hold_up_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many he begins, and also when nobody waits for them any more. Nobody is told that he is nobody."""
    go = threading.Event()

    class Users(Kernel):
        uid = 1001

        def credentials(self, sock: socket.socket) -> tuple[int, int, int]:
            pid, _, gid = super().credentials(sock)
            return pid, self.uid, gid

    class Slow(Attestor):
        def attest(self, peer: Peer) -> Caller:
            if peer.uid == 1001:
                go.wait(PATIENCE)
            return Caller(peer.pid, peer.uid, peer.gid)

    async def refuse(connection: socket.socket) -> None:
        connection.send(b"you are nobody")

    kernel = Users()
    monkeypatch.setattr(acceptor_module, "SECONDS", 0.5)
    async with accepting(tmp_path, Slow(kernel=kernel)) as (made, served, path):
        made._on_refused = refuse
        slow = [connected(path) for _ in range(12)]
        await until(lambda: made.accepted, 12)
        for plug in slow:
            assert await told(plug) == b""
            plug.close()
        assert made.refused["attest.too_slow"] == 12
        kernel.uid = 1002
        with connected(path):
            await until(lambda: [caller.uid for caller in served.callers], [1002])
        go.set()


HAND_ON = """
    import array, os, socket, sys
    first = socket.socket(socket.AF_UNIX)
    first.connect(sys.argv[1])
    ours, theirs = socket.socketpair()
    child = os.fork()
    if child == 0:
        taken = socket.socket(fileno=socket.recv_fds(theirs, 1, 1)[1][0])
        ours.close(); first.close()
        print("has it", flush=True)
        print(taken.recv(1), flush=True)
        os._exit(0)
    socket.send_fds(ours, [b"x"], [first.fileno()])
    first.close()
    sys.stdin.readline()
    os._exit(0)
"""


async def test_connection_ends_with_the_process_that_connected(tmp_path: Path) -> None:
    """Even if another one has it by now."""
    async with accepting(tmp_path) as (made, served, path):
        command = [sys.executable, "-c", textwrap.dedent(HAND_ON), str(path)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdin is not None and process.stdout is not None
            assert await asyncio.to_thread(process.stdout.readline) == "has it\n"
            await until(lambda: [caller.pid for caller in served.callers], [process.pid])
            process.stdin.write("end\n")
            process.stdin.flush()
            assert await asyncio.to_thread(process.stdout.readline) == "b''\n"
        await until(lambda: (served.ended, made.connections), (["cancelled"], 0))


async def test_closing_ends_what_is_open(tmp_path: Path) -> None:
    """After the time that it may take."""
    async with accepting(tmp_path) as (made, served, path):
        with connected(path):
            await until(lambda: len(served.callers), 1)
            began = time.monotonic()
            await made.close(0.2)
            assert 0.2 <= time.monotonic() - began < PATIENCE / 2
        assert (served.ended, made.connections) == (["cancelled"], 0)


async def test_fault_of_who_serves_ends_one_connection(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """And is told, without what is known of the caller."""
    listening = open_socket(tmp_path / "x.sock", 0o666)

    async def fail(connection: socket.socket, caller: Caller) -> None:
        raise ValueError(f"{caller.executable}")

    made = Acceptor(listening.sock, Attestor(), fail, name="test")
    await made.start()
    caplog.set_level(logging.INFO)
    for _ in range(2):
        with connected(listening.path) as client:
            assert await told(client) == b""
    await made.close()
    listening.close()
    assert [record.getMessage() for record in caplog.records] == ["a connection to the test socket failed unexpectedly"] * 2
    assert os.path.realpath(sys.executable) not in caplog.text


async def test_refusals_are_logged_now_and_then_and_by_rule_only(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Whoever is refused can't fill the log, and learns nothing that stands in it."""
    async with accepting(tmp_path, Refusing("attest")) as (made, _, path):
        for _ in range(20):
            with connected(path) as client:
                await told(client)
        assert made.refused["attest.test"] == 20
    assert [record.getMessage() for record in caplog.records if record.name == "meshlib.agent"] == [
        "a caller of the test socket was refused (attest.test, 1 so far)"
    ]


async def test_acceptor_without_descriptors_rests_and_goes_on(tmp_path: Path) -> None:
    """It neither ends, nor turns in circles."""
    async with accepting(tmp_path) as (made, served, path):
        clients = [connected(path)]
        await until(lambda: len(served.callers), 1)
        before = resource.getrlimit(resource.RLIMIT_NOFILE)
        used = max(int(name) for name in os.listdir("/proc/self/fd"))
        waiting = socket.socket(socket.AF_UNIX)
        resource.setrlimit(resource.RLIMIT_NOFILE, (used + 1, before[1]))
        holes = []
        try:
            while True:
                try:
                    holes.append(os.dup(0))
                except OSError:
                    break
            waiting.connect(str(path))
            began = time.process_time()
            await asyncio.sleep(0.5)
            assert (len(served.callers), time.process_time() - began < 0.3) == (1, True)
        finally:
            for hole in holes:
                os.close(hole)
            resource.setrlimit(resource.RLIMIT_NOFILE, before)
        await until(lambda: len(served.callers), 2)
        assert made.refused["attest.no_descriptors"] >= 1
        for client in (*clients, waiting):
            client.close()


async def test_nothing_stays_open(tmp_path: Path) -> None:
    """Of a thousand connections."""
    async with accepting(tmp_path) as (made, _, path):
        for _ in range(3):
            connected(path).close()
        await until(lambda: (made.accepted, made.connections), (3, 0))
        before = len(os.listdir("/proc/self/fd"))
        for count in range(200):
            connected(path).close()
            await until(lambda count=count: made.accepted, 4 + count)
        await until(lambda: made.connections, 0)
        await until(lambda: len(os.listdir("/proc/self/fd")), before)
        assert len(made._places) == 0
