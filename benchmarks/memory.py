"""What does the client keep: of a large body that passes through it, of a million calls, and of its own import?

`body-down` and `body-up` are a GiB through `stream()`: the most that the process grew while it passed, above what it had after a small one
of the same kind. `calls` is how much more there is after a million calls than after the first tenth, and that not one file descriptor more
is open (otherwise the run is broken). `import` is the whole interpreter, with the mesh and with httpx and grpc alone. `endpoint` is what the
engine keeps for each of 100,000 endpoints of a service (with the tables of its policy), `endpoint-used` what comes on top with the first call
to it, `service` one of 5,000 services with two routes and no endpoint: `bytes` as asked of the allocator, `rss_bytes` as the kernel sees it. The servers are
processes of their own and keep no body. Sizes: `--brief` makes them small; `python -m benchmarks.memory --calls 50000 --mib 64` as one
likes, and says how far it is. It says nothing of speed.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import json
import os
import random
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

from .harness import Results, Run, in_process
from .machine import PROC
from .native import by_example
from .peers import ROOT, Absent, Broken, Peers, free_port, running
from .worker import on_loop

PRIMARY = "rss_mb"
HAS_RATIOS = False
# It isn't the machine's mood that is measured, and a million calls take their time.
MOST_ROUNDS = 1
# Not a time, as it is elsewhere: patience with a million calls. A run takes as long as they take.
SECONDS = 90.0

MIB = 1 << 20
CALLS, BODY_MIB = 1_000_000, 1024
BRIEF_CALLS, BRIEF_MIB = 3_000, 16
PIECE = bytes(256 * 1024)
CALLERS = 64


def runs(peers: Peers, calls: int | None = None, mib: int | None = None) -> list[Run]:
    def run(case: str, what: str, mode: str, file: Any) -> Run:
        return Run(case, mode, partial(_measure, {"what": what, "mode": mode, "file": file}, calls, mib))

    server = cache(lambda kind: _server(peers, kind))
    made = []
    for kind in ("plain", "mtls"):
        is_private = kind == "mtls"
        bodies = cache(
            lambda kind=kind, is_private=is_private: peers.mesh([server(kind)], is_private=is_private, deadline="600s")
        )
        small = cache(lambda is_private=is_private: peers.private_mesh if is_private else peers.plain_mesh)
        for mode in ("meshlib", "meshlib-sync"):
            made += [run(f"{what}/{kind}/c=1", what, mode, bodies) for what in ("body-down", "body-up")]
            callers = f"c={CALLERS}" if mode == "meshlib" else "t=1"
            made.append(run(f"calls/{kind}/{callers}", "calls", mode, small))
    made += [run("import", "import", mode, "") for mode in ("meshlib", "bare")]
    return made + _of_engine()


def _of_engine() -> list[Run]:
    def run(case: str, *arguments: str) -> Run:
        return Run(case, "meshlib-rust", by_example("memory", *arguments, is_timed=False))

    return [
        *(run(f"endpoint/{policy}", "endpoint", policy) for policy in ("peak_ewma", "ring_hash", "maglev")),
        run("endpoint-used/peak_ewma", "used", "peak_ewma"),
        run("service", "service"),
    ]


def _measure(job: dict[str, Any], calls: int | None, mib: int | None, seconds: float) -> dict[str, float]:
    is_brief = seconds < 1
    size = {"calls": calls or (BRIEF_CALLS if is_brief else CALLS), "mib": mib or (BRIEF_MIB if is_brief else BODY_MIB)}
    if calls is None:
        return in_process("benchmarks.memory:work", **job, **size)(seconds)
    return _aloud({name: value() if callable(value) else value for name, value in {**job, **size, "seconds": seconds}.items()})


def _aloud(job: dict[str, Any]) -> dict[str, float]:
    """As the harness does it, with as much patience as it takes, and what the worker says of its progress is seen."""
    told = json.dumps({"work": "benchmarks.memory:work", "job": job})
    command = [sys.executable, "-m", "benchmarks.worker"]
    done = subprocess.run(command, input=told, cwd=ROOT, text=True, stdout=subprocess.PIPE, check=False)
    if done.returncode:
        raise Broken(f"exit code {done.returncode}: see above")
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def _server(peers: Peers, kind: str) -> str:
    port = free_port()
    own = Path(peers.identities) / "orders" if kind == "mtls" else ""
    command = (sys.executable, "-m", "benchmarks.memory", "--serve", str(port), "--identity", str(own))
    peers._stack.enter_context(running(peers.folder, *command, port=port))
    return f"127.0.0.1:{port}"


# ------------------------------------------------------------------ in the worker


def resident() -> float:
    """MB that the process has in memory now."""
    try:
        return int((PROC / "self" / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / MIB
    except OSError:
        raise Absent("there is no /proc") from None


def descriptors() -> int:
    """Open files. The fewest of some looks: the keeper reads the configuration now and then."""
    looks = []
    for _ in range(10):
        looks.append(len(os.listdir(PROC / "self" / "fd")))
        time.sleep(0.005)
    return min(looks)


class Told:
    """How far it is, on stderr, every two seconds; and the most memory that was seen on the way."""

    def __init__(self, what: str, total: int) -> None:
        self.what, self.total, self.done = what, total, 0
        self.most = 0.0
        self._said = time.monotonic()

    def step(self, count: int) -> None:
        self.done += count
        self.most = max(self.most, resident())
        if (now := time.monotonic()) - self._said > 2:
            self._said = now
            print(f"  {self.what}: {100 * self.done // self.total} %, {resident():.1f} MB", file=sys.stderr, flush=True)


def work(what: str, mode: str, file: str, *, calls: int, mib: int, seconds: float) -> dict[str, float]:
    if what == "import":
        return {"rss_mb": _import(mode)}
    import meshlib

    mesh = meshlib.Mesh.load(file, service="me")
    drive = {
        ("body-down", "meshlib"): _down, ("body-down", "meshlib-sync"): _down_blocking,
        ("body-up", "meshlib"): _up, ("body-up", "meshlib-sync"): _up_blocking,
        ("calls", "meshlib"): _calls, ("calls", "meshlib-sync"): _calls_blocking,
    }[what, mode]  # fmt: skip
    size = calls if what == "calls" else mib
    # What any run leaves behind for good (caches, arenas, buffers of the loop) is there before the first look.
    drive(mesh, max(size // 10, 1000) if what == "calls" else 4, "warming up")
    return {"rss_mb": drive(mesh, size, f"{what} {mode}")}


def _import(mode: str) -> float:
    code = (
        f"import httpx, grpc{', meshlib' if mode == 'meshlib' else ''}; from benchmarks.memory import resident; print(resident())"
    )
    # This module's own imports are in both.
    return float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)


def _grown(told: Told, before: float) -> float:
    return max(0.0, told.most - before)


def _down(mesh: Any, mib: int, name: str) -> float:
    async def main() -> dict[str, float]:
        async with mesh.client() as http:
            gc.collect()
            told, before = Told(name, mib * MIB), resident()
            async with http.stream("GET", f"http://orders/{mib * MIB}") as answer:
                async for piece in answer.aiter_raw():
                    told.step(len(piece))
            if told.done != told.total:
                raise RuntimeError("a body of a wrong length")
            return {"rss_mb": _grown(told, before)}

    return on_loop("uvloop", main)["rss_mb"]


def _down_blocking(mesh: Any, mib: int, name: str) -> float:
    with mesh.sync_client() as http:
        gc.collect()
        told, before = Told(name, mib * MIB), resident()
        with http.stream("GET", f"http://orders/{mib * MIB}") as answer:
            for piece in answer.iter_raw():
                told.step(len(piece))
        if told.done != told.total:
            raise RuntimeError("a body of a wrong length")
        return _grown(told, before)


def _up(mesh: Any, mib: int, name: str) -> float:
    async def main() -> dict[str, float]:
        async with mesh.client() as http:
            gc.collect()
            told, before = Told(name, mib * MIB), resident()

            async def pieces() -> AsyncIterator[bytes]:
                while told.done < told.total:
                    yield PIECE
                    told.step(len(PIECE))

            async with http.stream("POST", "http://orders/0", content=pieces()) as answer:
                await answer.aread()
            return {"rss_mb": _grown(told, before)}

    return on_loop("uvloop", main)["rss_mb"]


def _up_blocking(mesh: Any, mib: int, name: str) -> float:
    with mesh.sync_client() as http:
        gc.collect()
        told, before = Told(name, mib * MIB), resident()

        def pieces() -> Iterator[bytes]:
            while told.done < told.total:
                yield PIECE
                told.step(len(PIECE))

        with http.stream("POST", "http://orders/0", content=pieces()) as answer:
            answer.read()
        return _grown(told, before)


def _slope(told: Told, before: tuple[float, int]) -> float:
    gc.collect()
    if (now := descriptors()) > before[1]:
        raise RuntimeError(f"{now - before[1]} file descriptors more after {told.done} calls")
    return max(0.0, resident() - before[0])


def _calls(mesh: Any, calls: int, name: str) -> float:
    async def main() -> dict[str, float]:
        async with mesh.client() as http:

            async def caller(count: int, told: Told | None) -> None:
                for number in range(count):
                    (await http.get("http://orders/items/7")).json()
                    if told is not None and number % 50 == 0:
                        told.step(50)

            # The connections of the measured calls are open before they are counted.
            async with asyncio.TaskGroup() as group:
                for _ in range(CALLERS):
                    group.create_task(caller(20, None))
            gc.collect()
            told, before = Told(name, calls), (resident(), descriptors())
            async with asyncio.TaskGroup() as group:
                for _ in range(CALLERS):
                    group.create_task(caller(calls // CALLERS, told))
            return {"rss_mb": _slope(told, before)}

    return on_loop("uvloop", main)["rss_mb"]


def _calls_blocking(mesh: Any, calls: int, name: str) -> float:
    with mesh.sync_client() as http:
        for _ in range(100):
            http.get("http://orders/items/7").json()
        gc.collect()
        told, before = Told(name, calls), (resident(), descriptors())
        for number in range(calls):
            http.get("http://orders/items/7").json()
            if number % 50 == 0:
                told.step(50)
        return _slope(told, before)


# ------------------------------------------------------------------ the server of bodies


def serve(port: int, identity: str) -> None:
    """GET /N answers with N bytes, POST takes chunks: a piece at a time, a thread for each connection."""
    context: ssl.SSLContext | None = None
    if identity:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(f"{identity}/svid.pem", f"{identity}/key.pem")
        context.load_verify_locations(f"{identity}/bundle.pem")
        context.verify_mode = ssl.CERT_REQUIRED

    def one(plug: socket.socket) -> None:
        with contextlib.suppress(OSError, ValueError), context.wrap_socket(plug, server_side=True) if context else plug as wire:
            with wire.makefile("rb", 1 << 18) as come:
                while line := come.readline():
                    head = [line, *iter(come.readline, b"\r\n")]
                    if any(b"chunked" in field for field in head):
                        while size := int(come.readline(), 16):
                            come.read(size + 2)
                        come.readline()
                    left = int(line.split()[1].lstrip(b"/") or b"0")
                    wire.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % left)
                    while left > 0:
                        wire.sendall(PIECE[:left])
                        left -= len(PIECE)

    with socket.create_server(("127.0.0.1", port)) as server:
        while True:
            threading.Thread(target=one, args=(server.accept()[0],), daemon=True).start()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--calls", type=int, default=CALLS, metavar="N", help="how many calls (default %(default)s)")
    parser.add_argument("--mib", type=int, default=BODY_MIB, metavar="N", help="how large a body is (default %(default)s)")
    parser.add_argument("--serve", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--identity", default="", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.serve is not None:
        serve(given.serve, given.identity)
        return 0
    from .table import print_results

    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="meshlib-bench-")))
        results = Results("memory", PRIMARY)
        results.measure(runs(Peers(folder, stack), given.calls, given.mib), 1, SECONDS, random.Random(0))
    print_results(results, [], has_ratios=HAS_RATIOS)
    return 1 if results.broken else 0


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(main())
