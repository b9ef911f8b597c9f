"""How does a gRPC server end with its process, and how is a process served that has nothing else?

By the table of `drain.py`. A server is the mesh's to end from `add_grpc_port` on (`ends_with`): when CLOSING begins it takes no new
calls, and what is under way has what is left of the grace; then gRPC cuts it. Where the process belongs to another server, that one
ticks; where to none, the keeper does.

`serve` and `serve_blocking` are for processes that serve nothing but gRPC: start, until they are told to end, drain, return. A first
SIGTERM drains, SIGINT is a person, who isn't made to wait, and a second one ends at once, as with HTTP. Probes are answered where the
service has a listener for them.

The word that CLOSING has begun may come in a signal handler, or in any thread: so nothing is done then but to leave word, on the server's
own loop or, for a server in threads, on the keeper's.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import threading
import weakref
from collections.abc import Callable, Generator
from types import FrameType
from typing import TYPE_CHECKING, Any, Final

import grpc
import grpc.aio

from ...observe.probe import Pulse
from ..door import Inside, door_of
from ..drain import LAST, Drain, Phase, disarm, drain_of, last_resort
from ..listeners import bind
from ..serve import answer_probes

if TYPE_CHECKING:
    from ...observe.probe import ProbeListener

log = logging.getLogger("meshlib.server")

# Seconds between two looks at what is due.
TICK: Final = 0.1


class Closer:
    """Ends one server when its process does. State of that server, which it does not keep alive."""

    __slots__ = ("__weakref__", "_drain", "_is_closing", "_loop", "_server", "_stopping", "mesh")

    def __init__(self, mesh: Inside, server: Any) -> None:
        self.mesh = weakref.ref(mesh)
        self._drain = drain_of(mesh)
        self._server = weakref.ref(server)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._is_closing = False
        self._stopping: asyncio.Task[None] | None = None

    def look_around(self) -> None:
        """A server of asyncio runs where this is called, if a loop does."""
        if self._loop is None and isinstance(self._server(), grpc.aio.Server):
            with contextlib.suppress(RuntimeError):
                self._loop = asyncio.get_running_loop()

    @property
    def is_closing(self) -> bool:
        return self._is_closing

    @is_closing.setter
    def is_closing(self, value: bool) -> None:
        has_begun = value and not self._is_closing
        self._is_closing = value
        if not has_begun:
            return
        mesh, server = self.mesh(), self._server()
        with contextlib.suppress(RuntimeError):  # the loop is closed, and the server with it
            if self._loop is not None:
                self._loop.call_soon_threadsafe(self._stop_aio)
            elif isinstance(server, grpc.aio.Server):
                log.warning("a grpc.aio server was given its port outside of its event loop, and does not end by itself")
            elif server is not None and mesh is not None:
                stopping = self._stop_blocking()
                try:
                    mesh.keeper.run(stopping)
                except RuntimeError:
                    stopping.close()

    def _stop_aio(self) -> None:
        server = self._server()
        if server is not None:
            self._stopping = asyncio.ensure_future(server.stop(self._drain.left))

    async def _stop_blocking(self) -> None:
        """It waits for nothing: gRPC cuts what is left in a thread of its own."""
        server = self._server()
        if server is not None:
            server.stop(self._drain.left)


# A closer lives as long as its server.
_closers: weakref.WeakKeyDictionary[Any, Closer] = weakref.WeakKeyDictionary()


def ends_with(mesh: Inside, server: Any) -> None:
    """From now on the server ends when the process of the mesh does. Again, it changes nothing."""
    closer = _closers.get(server)
    if closer is None or closer.mesh() is not mesh:
        closer = _closers[server] = Closer(mesh, server)
    closer.look_around()
    drain_of(mesh).follow(closer)


# ------------------------------------------------------------------------------------------ a process of its own


async def serve(mesh: Inside, server: Any) -> None:
    """Start the server, and come back when it has ended. Raises ListenError if the address for probes can't be had."""
    with _served(mesh, server) as process:
        await server.start()
        try:
            while process.look() < Phase.CLOSING:  # noqa: ASYNC110  # a clock moves it, and signals do
                await asyncio.sleep(TICK)
            ended = asyncio.ensure_future(server.stop(process.drain.left))
            while not ended.done():
                await asyncio.wait([ended], timeout=TICK)
                if process.is_cut:
                    await server.stop(None)
        finally:
            # Cancelled by whoever awaits us: nothing is left behind.
            await server.stop(None)


def serve_blocking(mesh: Inside, server: Any) -> None:
    """The same for a server in threads."""
    with _served(mesh, server) as process:
        server.start()
        try:
            pause = threading.Event()
            while process.look() < Phase.CLOSING:
                pause.wait(TICK)
            process.limit()
            ended = server.stop(process.drain.left)
            while not ended.wait(TICK) and not process.is_cut:
                pass
        finally:
            server.stop(None).wait(LAST)


class _Process:
    """What ends it, and how far that has come."""

    def __init__(self, drain: Drain, mesh: Inside, pulse: Pulse) -> None:
        self.drain = drain
        self.is_cut = False
        self._is_limited = False
        self._mesh = mesh
        self._pulse = pulse
        self._signals = 0

    def look(self) -> Phase:
        phase = self.drain.look()
        if phase < Phase.CLOSING:
            self._pulse.beat()
        else:
            self._pulse.rest()
        return phase

    def limit(self) -> None:
        """For handlers in threads: nobody can stop them, and Python waits for them before it goes."""
        if threading.current_thread() is threading.main_thread():
            self._is_limited = True
            last_resort(self.drain.left + LAST)

    def end(self) -> None:
        self._pulse.rest()
        self.drain.end()
        if self._is_limited and not self._mesh.gate.load()["in_flight"]:
            disarm()

    def handle(self, sig: int, frame: FrameType | None) -> None:
        self._signals += 1
        if self._signals > 1:
            self.is_cut = True
            self.drain.end()
            if self._is_limited:
                last_resort()
            return
        self.drain.begin(is_person=sig == signal.SIGINT)
        self._mesh.drain()


@contextlib.contextmanager
def _served(mesh: Inside, server: Any) -> Generator[_Process, None, None]:
    """While the process is ended by signals and answers probes."""
    mesh.start()
    drain, pulse = drain_of(mesh), Pulse()
    if drain.phase is Phase.ENDED:
        drain.renew()
    ends_with(mesh, server)
    door_of(mesh).is_served = True
    probe = mesh.config.own.inbound.probe
    probes: ProbeListener | None = answer_probes(mesh, None if probe is None else bind(probe), pulse)
    process = _Process(drain, mesh, pulse)
    try:
        with _signals(process.handle):
            yield process
    finally:
        process.end()
        if probes is not None:
            probes.stop()


@contextlib.contextmanager
def _signals(handle: Callable[[int, FrameType | None], None]) -> Generator[None, None, None]:
    if threading.current_thread() is not threading.main_thread():
        yield  # who serves in another thread ends by `mesh.drain()`
        return
    before = {sig: signal.signal(sig, handle) for sig in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for sig, handler in before.items():
            signal.signal(sig, handler)
