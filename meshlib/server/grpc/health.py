"""Does a gRPC server want work? For those who ask as gRPC does: the standard service grpc.health.v1.Health.

Check, Watch and List, as gRPC's health checking protocol has them: SERVING until the process begins to end, NOT_SERVING from then on, and
who watches is told at once. The names that are known: "" for the whole server, the service's own in the mesh, and those that were
given; a Check of another is NOT_FOUND, a Watch of it says SERVICE_UNKNOWN. When the server closes, watchers are let go, so that they
hold nothing up.

The messages are a text and a number each, read and written here: that needs no package for protocol buffers. Like every method these are
open to whom a rule lets in. A process that is full is well: by default they need no place (`inbound.probes`).

It does not ask how the application is: a process whose database is away is alive. In a blocking server each watcher holds a thread as
long as it watches, so that there are at most `WATCHERS` of them; the next is refused, and has Check.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping
from typing import Any, Final

import grpc
import grpc.aio

from ..door import Inside
from ..drain import drain_of

SERVICE: Final = "grpc.health.v1.Health"
SERVING: Final = 1
NOT_SERVING: Final = 2
SERVICE_UNKNOWN: Final = 3

# Of a blocking server; and the seconds between two looks of each.
WATCHERS: Final = 2
LOOK: Final = 0.2

_NOT_FOUND: Final = grpc.StatusCode.NOT_FOUND, "unknown service"
_TOO_MANY: Final = grpc.StatusCode.RESOURCE_EXHAUSTED, "too many watchers"


def add_health(mesh: Inside, server: Any, names: Iterable[str] = ()) -> None:
    """Add the service to a server (aio or blocking)."""
    health = Health(mesh, names)
    methods: dict[str, tuple[Any, Any, Any, Any]] = (
        {
            "Check": (grpc.unary_unary_rpc_method_handler, health.check_aio, service_in, status_out),
            "Watch": (grpc.unary_stream_rpc_method_handler, health.watch_aio, service_in, status_out),
            "List": (grpc.unary_unary_rpc_method_handler, health.list_aio, service_in, statuses_out),
        }
        if isinstance(server, grpc.aio.Server)
        else {
            "Check": (grpc.unary_unary_rpc_method_handler, health.check, service_in, status_out),
            "Watch": (grpc.unary_stream_rpc_method_handler, health.watch, service_in, status_out),
            "List": (grpc.unary_unary_rpc_method_handler, health.list, service_in, statuses_out),
        }
    )
    handlers = {name: make(method, read, write) for name, (make, method, read, write) in methods.items()}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))


class Health:
    """How one server is. State of the process; its handlers keep it alive."""

    def __init__(self, mesh: Inside, names: Iterable[str] = ()) -> None:
        self._names = frozenset({"", mesh.service, *names})
        self._drain = drain_of(mesh)
        # Somebody can see it now, and is waited for.
        self._drain.is_watched = True
        self._watchers: set[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = set()
        self._places = threading.BoundedSemaphore(WATCHERS)
        self._drain.inform(self)

    def phase_changed(self) -> None:
        """Perhaps in a signal handler: word is left, and nothing else is done."""
        for loop, word in tuple(self._watchers):
            with contextlib.suppress(RuntimeError):  # it is closed
                loop.call_soon_threadsafe(word.set)

    def status_of(self, service: str) -> int:
        if service not in self._names:
            return SERVICE_UNKNOWN
        return SERVING if self._drain.is_serving else NOT_SERVING

    def statuses(self) -> dict[str, int]:
        return {name: self.status_of(name) for name in sorted(self._names)}

    async def check_aio(self, service: str, context: Any) -> int:
        status = self.status_of(service)
        if status == SERVICE_UNKNOWN:
            await context.abort(*_NOT_FOUND)
        return status

    def check(self, service: str, context: Any) -> int:
        status = self.status_of(service)
        if status == SERVICE_UNKNOWN:
            context.abort(*_NOT_FOUND)
        return status

    async def list_aio(self, service: str, context: Any) -> dict[str, int]:
        return self.statuses()

    def list(self, service: str, context: Any) -> dict[str, int]:
        return self.statuses()

    async def watch_aio(self, service: str, context: Any) -> AsyncIterator[int]:
        told, word = 0, asyncio.Event()
        watcher = asyncio.get_running_loop(), word
        self._watchers.add(watcher)
        try:
            while True:
                word.clear()
                status = self.status_of(service)
                if status != told:
                    told = status
                    yield status
                if self._drain.is_closing:
                    return
                await word.wait()
        finally:
            self._watchers.discard(watcher)

    def watch(self, service: str, context: Any) -> Iterator[int]:
        if not self._places.acquire(blocking=False):
            context.abort(*_TOO_MANY)
        try:
            told, gone = 0, threading.Event()
            if context.add_callback(gone.set) is False:
                return
            while not gone.wait(LOOK if told else 0):
                status = self.status_of(service)
                if status != told:
                    told = status
                    yield status
                if self._drain.is_closing:
                    return
        finally:
            self._places.release()


# ------------------------------------------------------------------------------------------ messages


def service_in(data: bytes) -> str:
    """HealthCheckRequest: its field 1, "" without one. Raises ValueError for what is no message."""
    service, place = b"", 0
    while place < len(data):
        tag, place = _varint(data, place)
        kind = tag & 7
        if kind == 2:
            size, place = _varint(data, place)
            end = place + size
            if tag >> 3 == 1:
                service = data[place:end]
        elif kind == 0:
            _, end = _varint(data, place)
        elif kind in (1, 5):
            end = place + (8 if kind == 1 else 4)
        else:
            raise ValueError(f"no field of a message is of the type {kind}")
        if end > len(data) or not tag >> 3:
            raise ValueError("the message is cut off, or has a field 0")
        place = end
    return service.decode()


def status_out(status: int) -> bytes:
    """HealthCheckResponse."""
    return b"\x08%c" % status


def statuses_out(statuses: Mapping[str, int]) -> bytes:
    """HealthListResponse: a map from names to HealthCheckResponses."""
    return b"".join(_field(1, _field(1, name.encode()) + _field(2, status_out(status))) for name, status in statuses.items())


def _field(number: int, value: bytes) -> bytes:
    size, head = len(value), bytearray((number << 3 | 2,))
    while size > 127:
        head.append(size & 127 | 128)
        size >>= 7
    head.append(size)
    return bytes(head) + value


def _varint(data: bytes, place: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if place >= len(data):
            break
        byte = data[place]
        place += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, place
    raise ValueError("a number in the message has no end")
