"""What does a stub get back from a mesh channel under asyncio, if one message goes each way?

A call object like gRPC's own, with the same methods. The first attempt is made at once, and whoever awaits the call awaits
that attempt itself: the ordinary call costs no task and no turn of the loop beyond gRPC's. Only when an attempt fails does
a task take the call on, to another endpoint. The request is serialised once and may be sent again.

A call that its caller drops goes on to its end, as gRPC's does, but is not tried again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Generator
from typing import Any

import grpc
import grpc.aio

from meshlib.call import Call

from .grpc_links import METHODS_KEPT, Link
from .grpc_way import Course, GrpcWay

CANCELLED_DETAILS = "Locally cancelled by application!"  # gRPC's own words


class Method:
    """One method of a stub: how its messages are written and read, and its multicallable on each link."""

    __slots__ = ("_key", "is_idempotent", "kind", "name", "serializer")

    def __init__(
        self, way: GrpcWay, kind: str, name: str, serializer: Any, deserializer: Any, is_registered: bool | None
    ) -> None:
        self.kind = kind
        self.name = name
        self.serializer = serializer
        self.is_idempotent = way.is_idempotent(name)
        self._key = (kind, name, serializer, deserializer, is_registered)

    def write(self, request: Any) -> Any:
        """A request message as bytes."""
        return request if self.serializer is None else self.serializer(request)

    def on(self, link: Link | None) -> Any:
        """The multicallable of this method on a link. It takes bytes where the request is one message."""
        assert link is not None
        found = link.methods.get(self._key)
        if found is None:
            kind, name, serializer, deserializer, is_registered = self._key
            if len(link.methods) >= METHODS_KEPT:
                link.methods.clear()
            found = link.methods[self._key] = getattr(link.channel, kind)(
                name,
                request_serializer=serializer if kind.startswith("stream") else None,
                response_deserializer=deserializer,
                _registered_method=is_registered,
            )
        return found


def extras(credentials: Any, compression: Any) -> dict[str, Any]:
    """The arguments of a call that only gRPC cares for."""
    if credentials is None and compression is None:
        return {}
    return {name: value for name, value in (("credentials", credentials), ("compression", compression)) if value is not None}


class UnaryUnaryCall(grpc.aio.UnaryUnaryCall[Any, Any]):
    """One message each way: await it."""

    def __init__(
        self, way: GrpcWay, method: Method, request: Any, timeout: float | None, metadata: Any, more: dict[str, Any]
    ) -> None:
        self._method = method
        self._request = request
        self._more = more
        self._attempt: Any = None
        self._course: Course | None = None
        self._error: Exception | None = None
        self._is_cancelled = False
        self._rest: asyncio.Task[None] | None = None
        try:
            self._course = Course(
                way,
                method.name,
                timeout,
                metadata,
                is_idempotent=method.is_idempotent,
                is_replayable=True,
                is_stream=False,
            )
            self._course.step()  # the first attempt never has to wait
            self._start(self._course)
        except grpc.aio.AioRpcError as error:
            self._error = error
        except BaseException:
            if self._course is not None:
                self._course.give_up()
            raise

    def __del__(self) -> None:
        course = getattr(self, "_course", None)
        if course is not None:
            course.forget(self._attempt)

    def __await__(self) -> Generator[Any, None, Any]:
        if self._error is None and self._rest is None:
            try:
                return (yield from self._attempt.__await__())
            except grpc.aio.AioRpcError:
                self._go_on()
            except BaseException:
                self._give_up()
                raise
        if self._rest is not None:
            try:
                yield from self._rest.__await__()
            except asyncio.CancelledError:
                self.cancel()
                raise
        if self._error is not None:
            raise self._error
        return (yield from self._attempt.__await__())

    @property
    def mesh_call(self) -> Call | None:
        """The decisions that were taken for this call: `mesh_call.explain()`. None if it never began."""
        return None if self._course is None else self._course.call

    def cancel(self) -> bool:
        if self.done():
            return False
        self._is_cancelled = True
        if self._rest is not None:
            self._rest.cancel()
        self._attempt.cancel()
        self._give_up()
        return True

    def cancelled(self) -> bool:
        if isinstance(self._error, grpc.aio.AioRpcError):
            return self._error.code() is grpc.StatusCode.CANCELLED
        return self._is_cancelled or (self._rest is None and self._error is None and bool(self._attempt.cancelled()))

    def done(self) -> bool:
        if self._error is not None or self._is_cancelled:
            return True
        if self._rest is None and self._attempt.done() and self._has_failed():
            self._go_on()
        return self._rest.done() if self._rest is not None else bool(self._attempt.done())

    def add_done_callback(self, callback: Callable[[Any], None]) -> None:
        async def tell() -> None:
            await self._settled()
            callback(self)

        task = asyncio.get_running_loop().create_task(tell())
        _telling.add(task)
        task.add_done_callback(_telling.discard)

    def time_remaining(self) -> float | None:
        if self._attempt is None:
            return None
        left: float | None = self._attempt.time_remaining()
        return left

    async def initial_metadata(self) -> Any:
        await self._settled()
        return grpc.aio.Metadata() if self._attempt is None else await self._attempt.initial_metadata()

    async def trailing_metadata(self) -> Any:
        await self._settled()
        if isinstance(self._error, grpc.aio.AioRpcError):
            return self._error.trailing_metadata()
        return await self._attempt.trailing_metadata()

    async def code(self) -> grpc.StatusCode:
        await self._settled()
        if isinstance(self._error, grpc.aio.AioRpcError):
            return self._error.code()
        if self._is_cancelled:
            return grpc.StatusCode.CANCELLED
        code: grpc.StatusCode = await self._attempt.code()
        return code

    async def details(self) -> Any:
        await self._settled()
        if isinstance(self._error, grpc.aio.AioRpcError):
            return self._error.details()
        return CANCELLED_DETAILS if self._is_cancelled else await self._attempt.details()

    async def debug_error_string(self) -> Any:
        await self._settled()
        if isinstance(self._error, grpc.aio.AioRpcError):
            return self._error.debug_error_string()
        return await self._attempt.debug_error_string()

    async def wait_for_connection(self) -> None:
        await self._settled()
        if self._error is not None:
            raise self._error
        await self._attempt.wait_for_connection()

    async def _settled(self) -> None:
        """Wait for the end, whatever it is. Who stops waiting doesn't cancel the call."""
        if self._error is None and self._rest is None and not self._is_cancelled:
            await self._attempt.code()
            if self._has_failed():
                self._go_on()
        if self._rest is not None and not self._rest.done():
            await asyncio.wait((self._rest,))

    def _start(self, course: Course) -> None:
        metadata = grpc.aio.Metadata(*course.sent) if course.sent else None
        start = self._method.on(course.link)
        attempt = self._attempt = start(self._request, timeout=course.timeout, metadata=metadata, **self._more)
        attempt.add_done_callback(course.landed)

    def _has_failed(self) -> bool:
        """The attempt ended, and a success would have ended the course."""
        return self._course is not None and not self._course.is_over

    def _go_on(self) -> None:
        if self._rest is None:
            self._rest = asyncio.get_running_loop().create_task(self._attempts())

    async def _attempts(self) -> None:
        """What becomes of the call after the first attempt failed. Never raises but CancelledError."""
        course = self._course
        assert course is not None
        try:
            while True:
                try:
                    await self._attempt
                    return
                except grpc.aio.AioRpcError as error:
                    if not course.fail(error):
                        self._error = error
                        return
                while pause := course.step():  # noqa: ASYNC110  # the engine says for how long
                    await asyncio.sleep(pause)
                self._start(course)
        except Exception as error:
            # Kept for whoever asks: a task that raises would complain of callers who don't.
            self._error = error
        finally:
            course.give_up()

    def _give_up(self) -> None:
        if self._course is not None:
            self._course.give_up()


# Tasks that wait to tell a callback; the loop itself holds tasks only weakly.
_telling: set[asyncio.Task[None]] = set()
