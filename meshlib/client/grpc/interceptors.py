"""What can the mesh do for a gRPC channel that the user built?

Everything but choose the endpoint: the channel goes where its target says. So each call gets its route's policy (deadline, the
limit of calls in flight), the trace and the caller's attempt number; and where the Service has exactly one endpoint, which then is
the one that the channel reaches, the breaker and the endpoint's statistics, too. With several endpoints nobody can tell to which
one an outcome belongs, so none is blamed. Nothing is tried again here.

gRPC sorts interceptors by class, and asyncio's takes each object for one kind only; so there is one for each of the four kinds, and one
object more for all four kinds of a blocking channel.
"""

from __future__ import annotations

import asyncio
import time
import weakref
from typing import Any, NamedTuple

import grpc
import grpc.aio

from .course import Course
from .links import METHODS_KEPT
from .status import failure_of
from .way import GrpcWay, Method

# Seconds for which the number of endpoints is believed.
RECOUNT = 1.0


def client_interceptors(mesh: Any, service: str) -> list[Any]:
    """The interceptors of all four kinds, for `grpc.aio.insecure_channel(target, interceptors=...)` and its secure sibling."""
    aside = _Aside(GrpcWay(service, mesh.outbound, None))
    return [_UnaryUnary(aside), _UnaryStream(aside), _StreamUnary(aside), _StreamStream(aside)]


def sync_client_interceptors(mesh: Any, service: str) -> list[Any]:
    """The same for `grpc.intercept_channel(channel, ...)`."""
    return [_Sync(_Aside(GrpcWay(service, mesh.outbound, None)))]


class _Aside:
    """The way of calls that are only accompanied."""

    def __init__(self, way: GrpcWay) -> None:
        self._way = way
        self._methods: dict[tuple[str, str], Method] = {}
        self._has_one_endpoint = False
        self._counted = float("-inf")
        self._watchers: set[asyncio.Task[None]] = set()

    def begin(self, details: Any, kind: str) -> tuple[Course, float]:
        """The call's course, and the seconds to wait before it is asked again by `step`."""
        name = details.method.decode() if isinstance(details.method, bytes) else details.method
        method = self._methods.get((kind, name))
        if method is None:
            if len(self._methods) >= METHODS_KEPT:
                self._methods.clear()
            method = self._methods[kind, name] = Method(self._way, kind, name)
        course = Course(method, details.timeout, details.metadata)
        try:
            if self._knows_the_endpoint(course.now):
                return course, course.step()
            course.accompany()
        except BaseException:
            course.give_up()
            raise
        return course, 0.0

    async def begun(self, details: Any, kind: str) -> tuple[Course, Any]:
        """The course of a call that may go, and gRPC's details with what the mesh adds."""
        course, pause = self.begin(details, kind)
        try:
            while pause > 0.0:
                await asyncio.sleep(pause)
                pause = course.step()
        except BaseException:
            course.give_up()
            raise
        metadata = grpc.aio.Metadata(*course.sent)
        return course, grpc.aio.ClientCallDetails(
            details.method, course.timeout, metadata, details.credentials, details.wait_for_ready
        )

    async def open(self, continuation: Any, details: Any, request: Any, kind: str) -> Any:
        """A stream, whose head and end are noted while the caller reads it."""
        course, changed = await self.begun(details, kind)
        try:
            call = await continuation(changed, request)
        except BaseException:
            course.give_up()
            raise
        task = asyncio.get_running_loop().create_task(_watch(course, call))
        self._watchers.add(task)
        task.add_done_callback(self._watchers.discard)
        return call

    def _knows_the_endpoint(self, now: float) -> bool:
        if now - self._counted > RECOUNT:
            rows = self._way.outbound.engine.stats(now)
            found = sum(1 for row in rows if row["service"] == self._way.service and row["endpoint"])
            self._has_one_endpoint, self._counted = found == 1, now
        return self._has_one_endpoint


async def _watch(course: Course, call: Any) -> None:
    try:
        await call.initial_metadata()
        if call.done() and (code := await call.code()) is not grpc.StatusCode.OK and not call.cancelled():
            course.fail(failure_of(code, await call.details(), await call.trailing_metadata()))
        elif not call.cancelled():
            course.head()
            course.end(await call.code(), is_cancelled=call.cancelled())
    finally:
        course.give_up()


class _UnaryUnary(grpc.aio.UnaryUnaryClientInterceptor):  # type: ignore[type-arg]  # generic in the stubs only
    def __init__(self, aside: _Aside) -> None:
        self._aside = aside

    async def intercept_unary_unary(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        course, details = await self._aside.begun(client_call_details, "unary_unary")
        try:
            call = await continuation(details, request)
            await call
            course.good()
            return call
        except grpc.aio.AioRpcError as error:
            course.fail(error)
            raise
        finally:
            course.give_up()


class _UnaryStream(grpc.aio.UnaryStreamClientInterceptor):  # type: ignore[type-arg]  # generic in the stubs only
    def __init__(self, aside: _Aside) -> None:
        self._aside = aside

    async def intercept_unary_stream(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        return await self._aside.open(continuation, client_call_details, request, "unary_stream")


class _StreamUnary(grpc.aio.StreamUnaryClientInterceptor):  # type: ignore[type-arg]  # generic in the stubs only
    def __init__(self, aside: _Aside) -> None:
        self._aside = aside

    async def intercept_stream_unary(self, continuation: Any, client_call_details: Any, request_iterator: Any) -> Any:
        return await self._aside.open(continuation, client_call_details, request_iterator, "stream_unary")


class _StreamStream(grpc.aio.StreamStreamClientInterceptor):  # type: ignore[type-arg]  # generic in the stubs only
    def __init__(self, aside: _Aside) -> None:
        self._aside = aside

    async def intercept_stream_stream(self, continuation: Any, client_call_details: Any, request_iterator: Any) -> Any:
        return await self._aside.open(continuation, client_call_details, request_iterator, "stream_stream")


class _Details(NamedTuple):
    method: str
    timeout: float | None
    metadata: Any
    credentials: Any
    wait_for_ready: bool | None
    compression: Any


class _SyncDetails(_Details, grpc.ClientCallDetails):
    pass


class _Sync(
    grpc.UnaryUnaryClientInterceptor,  # type: ignore[type-arg]  # generic in the stubs only
    grpc.UnaryStreamClientInterceptor,  # type: ignore[type-arg]
    grpc.StreamUnaryClientInterceptor,  # type: ignore[type-arg]
    grpc.StreamStreamClientInterceptor,  # type: ignore[type-arg]
):
    """All four kinds of a blocking channel."""

    def __init__(self, aside: _Aside) -> None:
        self._aside = aside

    def intercept_unary_unary(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        return self._one(continuation, client_call_details, request, "unary_unary")

    def intercept_stream_unary(self, continuation: Any, client_call_details: Any, request_iterator: Any) -> Any:
        return self._one(continuation, client_call_details, request_iterator, "stream_unary")

    def intercept_unary_stream(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        return self._many(continuation, client_call_details, request, "unary_stream")

    def intercept_stream_stream(self, continuation: Any, client_call_details: Any, request_iterator: Any) -> Any:
        return self._many(continuation, client_call_details, request_iterator, "stream_stream")

    def _begun(self, details: Any, kind: str) -> tuple[Course, _SyncDetails]:
        course, pause = self._aside.begin(details, kind)
        try:
            while pause > 0.0:
                time.sleep(pause)
                pause = course.step()
        except BaseException:
            course.give_up()
            raise
        return course, _SyncDetails(
            details.method,
            course.timeout,
            course.sent,
            details.credentials,
            getattr(details, "wait_for_ready", None),
            getattr(details, "compression", None),
        )

    def _one(self, continuation: Any, details: Any, request: Any, kind: str) -> Any:
        course, changed = self._begun(details, kind)
        try:
            call = continuation(changed, request)
        except BaseException:
            course.give_up()
            raise
        # Of a blocking call it is over by now, and this is told at once.
        call.add_done_callback(lambda ended: _note(course, ended))
        return call

    def _many(self, continuation: Any, details: Any, request: Any, kind: str) -> Any:
        course, changed = self._begun(details, kind)
        try:
            call = continuation(changed, request)
        except BaseException:
            course.give_up()
            raise
        # gRPC keeps what it calls back: a stream that its reader drops must end nevertheless.
        kept = weakref.ref(call)
        call.add_callback(lambda: _note(course, kept()))
        return _Told(call, course)


class _Told:
    """A stream of answers that tells when the first has come. Everything else is gRPC's own call."""

    def __init__(self, call: Any, course: Course) -> None:
        self._call = call
        self._course = course

    def __iter__(self) -> _Told:
        return self

    def __next__(self) -> Any:
        message = next(self._call)
        self._course.received += 1
        self._course.head()
        return message

    next = __next__

    def __getattr__(self, name: str) -> Any:
        return getattr(self._call, name)


def _note(course: Course, call: Any) -> None:
    """How a call on a blocking channel ended; None is one that nobody holds any more."""
    if call is None:
        course.give_up()
        return
    code = call.code()
    if code is grpc.StatusCode.OK or course.is_headed:
        course.head()
        course.end(code, is_cancelled=code is grpc.StatusCode.CANCELLED)
    elif code is not grpc.StatusCode.CANCELLED:
        course.fail(call)
    course.give_up()
