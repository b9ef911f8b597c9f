"""What can the mesh do for a gRPC channel that the user built?

Everything but choose the endpoint: the channel goes where its target says. So each call gets its route's policy (deadline, the
limit of calls in flight), the trace and the caller's attempt number; and where the Service has exactly one endpoint, which then is
the one that the channel reaches, the breaker and the endpoint's statistics, too. With several endpoints nobody can tell to which
one an outcome belongs, so none is blamed. Nothing is tried again here.

gRPC sorts interceptors by class, and takes each object for one kind only; so there is one for each of the four kinds.
"""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import grpc.aio

from .grpc_status import failure_of
from .grpc_way import Course, GrpcWay

# Seconds for which the number of endpoints is believed.
RECOUNT = 1.0


def client_interceptors(mesh: Any, service: str) -> list[Any]:
    """The interceptors of all four kinds, for `grpc.aio.insecure_channel(target, interceptors=...)` and its secure sibling."""
    aside = _Aside(GrpcWay(service, mesh.outbound, None))
    return [_UnaryUnary(aside), _UnaryStream(aside), _StreamUnary(aside), _StreamStream(aside)]


class _Aside:
    """The way of calls that are only accompanied."""

    def __init__(self, way: GrpcWay) -> None:
        self._way = way
        self._has_one_endpoint = False
        self._counted = float("-inf")
        self._watchers: set[asyncio.Task[None]] = set()

    def begin(self, details: Any, *, is_stream: bool) -> tuple[Course, Any]:
        """The call's course, and gRPC's details with what the mesh adds."""
        method = details.method.decode() if isinstance(details.method, bytes) else details.method
        course = Course(
            self._way,
            method,
            details.timeout,
            details.metadata,
            is_idempotent=None,
            is_replayable=False,
            is_stream=is_stream,
        )
        try:
            if self._knows_the_endpoint(course.now):
                course.step()  # the first attempt never has to wait
            else:
                course.dress()
        except BaseException:
            course.give_up()
            raise
        metadata = grpc.aio.Metadata(*course.sent)
        return course, grpc.aio.ClientCallDetails(
            details.method, course.timeout, metadata, details.credentials, details.wait_for_ready
        )

    async def open(self, continuation: Any, details: Any, request: Any) -> Any:
        """A stream, whose head and end are noted while the caller reads it."""
        course, changed = self.begin(details, is_stream=True)
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
        course, details = self._aside.begin(client_call_details, is_stream=False)
        try:
            call = await continuation(details, request)
            await call
            course.head()
            course.end()
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
        return await self._aside.open(continuation, client_call_details, request)


class _StreamUnary(grpc.aio.StreamUnaryClientInterceptor):  # type: ignore[type-arg]  # generic in the stubs only
    def __init__(self, aside: _Aside) -> None:
        self._aside = aside

    async def intercept_stream_unary(self, continuation: Any, client_call_details: Any, request_iterator: Any) -> Any:
        return await self._aside.open(continuation, client_call_details, request_iterator)


class _StreamStream(grpc.aio.StreamStreamClientInterceptor):  # type: ignore[type-arg]  # generic in the stubs only
    def __init__(self, aside: _Aside) -> None:
        self._aside = aside

    async def intercept_stream_stream(self, continuation: Any, client_call_details: Any, request_iterator: Any) -> Any:
        return await self._aside.open(continuation, client_call_details, request_iterator)
