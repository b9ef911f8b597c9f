"""With what does a gRPC chaos test begin? A folder with a CA and a mesh.yaml, backends in processes of their own, and counted load.

The load is open: a call begins when its time has come, whatever has become of those before it, and its latency is counted from that
time. So a client that is held up, or that has no thread free, can't hide it. The callers of a load share one thread with a loop, or are
threads themselves; the test's own thread is free to break things meanwhile.

`MESHLIB_CHAOS=long` runs the tests of this kind in full; by default they run for seconds.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import select
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import meshlib
from tests.support import PYTHON, ROOT, free_port, identities, mesh_of, wait_until_listening, write_config

IS_LONG = os.environ.get("MESHLIB_CHAOS") == "long"
RULES: dict[str, Any] = {"allow": [{"name": "callers", "from": ["me"], "paths": ["/shop.Inventory/*"]}]}

# A call and what becomes of a thread of a load, at its end.
PATIENCE = 20.0


class Shop:
    """The service `me`, who calls, and others with backends."""

    def __init__(self, folder: Path, *services: str) -> None:
        self.folder = folder
        self.services = services
        self.authority = identities(folder, "me", *services)

    def turn_over(self) -> dict[str, str]:
        """New certificates for everybody. Returns their serial numbers."""
        return {name: str(self.authority.write(name, self.folder / "identities").serial) for name in ("me", *self.services)}

    def config(self, addresses: dict[str, Sequence[str]], **more: Any) -> dict[str, Any]:
        """The services of mesh.yaml: every call may be repeated, unless `more` says otherwise."""
        each: dict[str, Any] = {"protocol": "grpc", "secure": RULES, "retry": {"attempts": 1, "backoff": [0.001, 0.002]}}
        route = [{"name": "all", "retry": {"idempotent": True}}]
        return {name: {**each, "route": route, "discover": {"static": list(found)}, **more} for name, found in addresses.items()}

    def write(self, addresses: dict[str, Sequence[str]], **more: Any) -> Path:
        return write_config(self.folder, {"me": {}, **self.config(addresses, **more)}, mode="enforce")

    @contextlib.contextmanager
    def mesh(self, addresses: dict[str, Sequence[str]], **more: Any) -> Iterator[meshlib.Mesh]:
        """The mesh of the caller, in this process. All have one mesh.yaml, so `more` has to be what it was for the backends."""
        with mesh_of(self.folder, self.config(addresses, **more), mode="enforce") as mesh:
            yield mesh


class Backend:
    """A process of `grpc_served`. `start` again after its end, at the same address."""

    def __init__(self, config: Path, service: str, kind: str, port: int = 0) -> None:
        self.port = port or free_port()
        self.address = f"127.0.0.1:{self.port}"
        self.log = config.parent / f"{service}-{self.port}.log"
        self.child: subprocess.Popen[bytes] | None = None
        self._words = [PYTHON, "-m", "tests.chaos.grpc_served", str(config), service, self.address, kind]

    def begin(self) -> None:
        path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        with self.log.open("ab") as out:
            self.child = subprocess.Popen(
                self._words, env={**os.environ, "PYTHONPATH": path}, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=out
            )  # fmt: skip

    def wait(self) -> None:
        """Until it listens."""
        try:
            wait_until_listening(self.port, self.child)  # type: ignore[arg-type]
        except AssertionError:
            raise AssertionError(f"the backend ended or never listened: {self.said()}") from None

    def start(self) -> None:
        self.begin()
        self.wait()

    def tell(self, command: dict[str, Any] | None = None) -> Any:
        """Do this from now on, or (None) go on as before; tells what `grpc_served` tells."""
        child = self.child
        assert child is not None and child.stdin is not None and child.stdout is not None
        child.stdin.write(("ask" if command is None else json.dumps(command)).encode() + b"\n")
        child.stdin.flush()
        assert select.select([child.stdout], [], [], PATIENCE)[0], f"the backend says nothing: {self.said()}"
        return json.loads(child.stdout.readline())

    def send(self, number: signal.Signals) -> None:
        assert self.child is not None
        self.child.send_signal(number)

    def end(self) -> None:
        child = self.child
        if child is not None:
            if child.poll() is None:
                child.kill()
            child.wait()
            for pipe in (child.stdin, child.stdout):
                if pipe is not None:
                    with contextlib.suppress(OSError):
                        pipe.close()

    def said(self) -> str:
        return self.log.read_text(errors="replace")[-4000:]

    def complaints(self) -> list[str]:
        return [line for line in self.said().splitlines() if " ERROR " in line or line.startswith("Traceback")]


@contextlib.contextmanager
def backends(config: Path, *services_and_kinds: tuple[str, str], ports: Sequence[int] = ()) -> Iterator[list[Backend]]:
    """So many processes, started together."""
    made = [Backend(config, *each, port) for each, port in zip(services_and_kinds, ports, strict=True)]
    try:
        for one in made:
            one.begin()
        for one in made:
            one.wait()
        yield made
    finally:
        for one in made:
            one.end()


@dataclass
class Done:
    """One call of a load: when it was due, the seconds from then to its end, and how it failed, or ""."""

    due: float
    took: float
    fault: str


@dataclass
class Load:
    """Calls at a rate, of one kind, until `stop`. `done` may be read at any time."""

    rate: float
    done: list[Done] = field(default_factory=list)
    _is_over: bool = False
    _threads: list[threading.Thread] = field(default_factory=list)

    def in_loop(self, main: Callable[[Load], Any]) -> Load:
        """Run `main`, a coroutine function, on a loop in a thread of its own; it calls `drive`."""
        return self._begin(lambda: asyncio.run(main(self)))

    async def drive(self, call: Callable[[int], Any]) -> None:
        """Call `call`, a coroutine function, with 0, 1, 2 … when due."""
        start, under_way = time.monotonic(), set()

        async def one(number: int, due: float) -> None:
            fault = ""
            try:
                await call(number)
            except Exception as error:
                fault = repr(error)
            self.done.append(Done(due, time.monotonic() - due, fault))

        for number in itertools.count():
            due = start + number / self.rate
            # What is late is caught up with, as far as this machine can.
            while (left := due - time.monotonic()) > 0 and not self._is_over:
                await asyncio.sleep(left)
            if self._is_over:
                break
            task = asyncio.ensure_future(one(number, due))
            under_way.add(task)
            task.add_done_callback(under_way.discard)
        await asyncio.gather(*under_way)

    def in_threads(self, call: Callable[[int], Any], threads: int = 48) -> Load:
        """Each of the threads takes the next call that is due; `call` is a function."""
        start, numbers = time.monotonic() + 0.05, itertools.count()

        def work() -> None:
            while not self._is_over:
                number = next(numbers)
                due = start + number / self.rate
                while (left := due - time.monotonic()) > 0:
                    if self._is_over:
                        return
                    time.sleep(min(left, 0.25))
                fault = ""
                try:
                    call(number)
                except Exception as error:
                    fault = repr(error)
                self.done.append(Done(due, time.monotonic() - due, fault))

        for _ in range(threads):
            self._begin(work)
        return self

    def _begin(self, work: Callable[[], object]) -> Load:
        def run() -> None:
            try:
                work()
            except Exception as error:
                self.done.append(Done(time.monotonic(), 0.0, f"the load itself: {error!r}"))

        thread = threading.Thread(target=run, daemon=True)
        self._threads.append(thread)
        thread.start()
        return self

    def stop(self) -> None:
        """Begin no more calls, and wait for those under way."""
        self._is_over = True
        end = time.monotonic() + PATIENCE
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))
        assert not any(thread.is_alive() for thread in self._threads), "calls that never end"

    def between(self, begin: float, end: float) -> list[Done]:
        return [one for one in tuple(self.done) if begin <= one.due < end]

    @property
    def faults(self) -> list[str]:
        return [one.fault for one in self.done if one.fault]


def connections(ports: Sequence[int]) -> int:
    """Connections on this machine that were made to one of these ports and are open."""
    found = 0
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            _, _, remote, state, *_ = line.split()
            found += state == "01" and int(remote.rpartition(":")[2], 16) in ports
    return found


def percentile(found: Sequence[Done], share: float) -> float:
    """Milliseconds from the time at which a call was due."""
    ordered = sorted(one.took for one in found)
    return 1000 * ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else float("nan")


@contextlib.contextmanager
def lateness() -> Iterator[list[float]]:
    """By how many seconds this machine woke a process at worst, which had nothing to do but to sleep: `[0]`, at the end."""
    code = (
        "import select, sys, time\nworst = 0.0\nwhile True:\n begun = time.monotonic()\n"
        " if select.select([sys.stdin], [], [], 0.01)[0]: break\n worst = max(worst, time.monotonic() - begun - 0.01)\nprint(worst)"
    )
    worst = [0.0]
    with subprocess.Popen([PYTHON, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        yield worst
        worst[0] = float(child.communicate()[0] or 0.0)
