"""Which servers are running, and how are they asked? Each kind in each of its modes is a process, which all behaviours of a run share.

One that has ended, since a behaviour is about its end, is started again for whoever comes after.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.conformance.server.kinds import Kind
from tests.conformance.server.wire import Answer, Wire, connection
from tests.conformance.server.world import STOREFRONT, World
from tests.support import PYTHON, ROOT, free_port, wait_until_listening

_names = itertools.count(1)
# The connection that calls use where a behaviour names no other.
_USUAL: Any = object()


class Server:
    """One running server."""

    def __init__(self, kind: Kind, mode: str, world: World) -> None:
        self.kind = kind
        self.mode = mode
        self.world = world
        self.home = world.home(f"{kind.name.replace('/', '-')}-{mode}-{next(_names)}")
        self.port = free_port()
        # Beside its own.
        self.listeners = {name: free_port() for name in ("public", "probe")} if "listeners" not in kind.lacks else {}
        self.child: Any = None

    @property
    def has_tls(self) -> bool:
        return self.mode == "enforce"

    @property
    def usual_peer(self) -> str:
        """Who the usual caller is, for the handler."""
        return STOREFRONT if self.has_tls else ""

    def has(self, need: str) -> bool:
        return need not in self.kind.lacks

    def connect(self, tls: Any = _USUAL, timeout: float = 15.0) -> contextlib.AbstractContextManager[Wire]:
        """A connection of `tls`: a context, the name of a caller, None for plain text; by default what is usual in this mode."""
        if tls is _USUAL:
            tls = "storefront" if self.has_tls else None
        return connection(self.port, self.world.caller(tls) if isinstance(tls, str) else tls, timeout)

    def ask(self, method: str, target: str, *headers: str, body: bytes = b"", tls: Any = _USUAL) -> Answer:
        """One request on a connection of its own."""
        with self.connect(tls) as wire:
            return wire.ask(method, target, *headers, body=body, is_last=True)

    def ask_at(self, listener: str, method: str, target: str, *headers: str, tls: Any = None) -> Answer:
        """The same at another listener; plain text, if nothing else is said."""
        with connection(self.listeners[listener], self.world.caller(tls) if tls else None) as wire:
            return wire.ask(method, target, *headers, is_last=True)

    def numbers(self) -> Any:
        return self.ask("GET", "/numbers").json

    # --- what happens in the middle of a call: see `served/common.py`

    def new_name(self) -> str:
        return f"n{next(_names)}"

    def let_go(self, name: str) -> None:
        (self.home / f"{name}.go").touch()

    def waits(self, name: str) -> int:
        """How many handlers have said under this name that they are in."""
        file = self.home / f"{name}.in"
        return file.stat().st_size if file.exists() else 0

    def until(self, is_so: Callable[[], bool], seconds: float = 10.0) -> None:
        """Wait until it is so."""
        end = time.monotonic() + seconds
        while not is_so():
            assert time.monotonic() < end, "it never came to that"
            time.sleep(0.005)

    @property
    def is_running(self) -> bool:
        return self.child is not None and self.child.poll() is None


@contextlib.contextmanager
def started(kind: Kind, mode: str, world: World, *, command: tuple[str, ...] | None = None) -> Iterator[Server]:
    """A server that may not listen yet: `wait_until_listening`."""
    server = Server(kind, mode, world)
    config = world.config(server.home, mode, server.listeners)
    env = {
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "CONFORMANCE_HOME": str(server.home),
        "CONFORMANCE_FRAMEWORK": kind.application,
        "MESHLIB_CONFIG": str(config),
        "MESHLIB_SERVICE": "orders",
        **({"CONFORMANCE_SPANS": "1"} if kind.has_spans else {}),
    }
    programs = {"python": PYTHON, "meshlib": str(Path(PYTHON).with_name("meshlib"))}
    words = [word.format(port=server.port, **programs) for word in command or kind.command]
    with (server.home / "output").open("wb") as output:
        server.child = subprocess.Popen(
            words, env={**os.environ, **env}, cwd=ROOT, start_new_session=True, stdout=output, stderr=subprocess.STDOUT
        )
    try:
        yield server
    finally:
        # Nothing is under way any more, and some take seconds to end in peace; how a server ends is a behaviour of its own.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.child.pid, signal.SIGKILL)
        server.child.wait()


@contextlib.contextmanager
def running(kind: Kind, mode: str, world: World, *, command: tuple[str, ...] | None = None) -> Iterator[Server]:
    with started(kind, mode, world, command=command) as server:
        ready(server)
        yield server


def ready(server: Server) -> None:
    try:
        wait_until_listening(server.port, server.child, seconds=40)
    except AssertionError as error:
        raise AssertionError(f"{error}\n{output_of(server.home)}") from None


def output_of(home: Path) -> str:
    return (home / "output").read_text(errors="replace")[-4000:]


class Fleet:
    """The servers of one run, one after the other. While one is asked, the next one starts already."""

    def __init__(self, world: World, order: list[tuple[Kind, str]]) -> None:
        self._world = world
        self._order = order
        self._running: dict[tuple[str, str], tuple[Server, contextlib.ExitStack]] = {}
        self._present = ("", "")
        # Those that never came to listen: they are not tried again for each behaviour.
        self._failed: dict[tuple[str, str], AssertionError] = {}

    def server(self, kind: Kind, mode: str) -> Server:
        if (kind.name, mode) in self._failed:
            raise self._failed[kind.name, mode]
        if self._present != (kind.name, mode):
            self._present = (kind.name, mode)
            for other in [other for other in self._running if other != (kind.name, mode)]:
                self._stop(other)
        server = self._started(kind, mode)
        following = self._order[self._order.index((kind, mode)) + 1 :][:1]
        for next_kind, next_mode in following:
            self._started(next_kind, next_mode)
        try:
            ready(server)
        except AssertionError as error:
            self._failed[kind.name, mode] = error
            raise
        return server

    def _started(self, kind: Kind, mode: str) -> Server:
        key = (kind.name, mode)
        if key in self._running and not self._running[key][0].is_running:
            self._stop(key)
        if key not in self._running:
            stack = contextlib.ExitStack()
            self._running[key] = stack.enter_context(started(kind, mode, self._world)), stack
        return self._running[key][0]

    def _stop(self, key: tuple[str, str]) -> None:
        self._running.pop(key)[1].close()

    def close(self) -> None:
        while self._running:
            self._stop(next(iter(self._running)))
