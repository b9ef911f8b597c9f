"""What does a stub get back from a mesh channel under asyncio, if messages stream?

A call object like gRPC's own, in three kinds; behind it one task that makes the attempts, notes when the answer begins
and how it ends. The object that the caller holds and the task are two, on purpose: gRPC cancels a call that its caller drops,
and a task that held the caller's object would keep a forgotten stream alive for ever.

One request message is sent again if an attempt fails before the first response; so the first message of its response stream is
awaited before the caller sees any. A stream of requests is sent once: its one attempt is handed out at once.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Generator
from contextlib import suppress
from typing import Any

import grpc
import grpc.aio

from meshlib.call import Call

from .calls import CANCELLED_DETAILS
from .course import TOO_LATE, Course
from .status import failure_of
from .way import Method

EOF: Any = grpc.aio.EOF  # type: ignore[attr-defined]  # the stubs lack it


class Run:
    """One call under way: the task that drives it, and the attempt that counts."""

    __slots__ = (
        "_more",
        "_request",
        "attempt",
        "course",
        "error",
        "first",
        "is_cancelled",
        "messages",
        "method",
        "opened",
        "task",
    )

    def __init__(
        self,
        method: Method,
        request: Any,
        timeout: float | None,
        metadata: Any,
        wait_for_ready: bool | None,
        more: dict[str, Any],
    ) -> None:
        self.method = method
        self._request = request
        self._more = more
        self.attempt: Any = None
        self.course: Course | None = None
        self.error: Exception | None = None
        # gRPC's own iterator, once somebody has read, and a message that was read before anybody asked.
        self.messages: Any = None
        self.first: list[Any] = []
        self.is_cancelled = False
        loop = asyncio.get_running_loop()
        # Set when the attempt that counts is known: from then on the caller may read from it and write to it.
        self.opened: asyncio.Future[None] = loop.create_future()
        self.task: asyncio.Task[Any] = loop.create_task(self._drive(timeout, metadata, wait_for_ready))

    async def _drive(self, timeout: float | None, metadata: Any, wait_for_ready: bool | None) -> Any:
        """The whole call. Returns the response where there is one, None otherwise; never raises but CancelledError."""
        method = self.method
        course = None
        try:
            course = self.course = Course(method, timeout, metadata, wait_for_ready)
            while True:
                while pause := course.step():  # noqa: ASYNC110  # the engine says for how long
                    await asyncio.sleep(pause)
                if course.is_recorded and not method.is_replayable and self._request is not None:
                    self._request = _counted(self._request, course)
                metadata = grpc.aio.Metadata(*course.sent)
                start = method.on(course.link)
                self.attempt = start(self._request, timeout=course.timeout, metadata=metadata, **self._more)
                try:
                    response = await self._head(course)
                    break
                except grpc.aio.AioRpcError as error:
                    if not course.fail(error):
                        raise
            course.head()
            if method.kind == "stream_unary":
                course.received = 1
            self._open()
            code = await self.attempt.code()
            course.end(code, is_cancelled=self.attempt.cancelled())
            return response
        except Exception as error:
            # Kept for whoever asks: a task that raises would complain of callers who don't.
            self.error = error
        except asyncio.CancelledError:
            self.is_cancelled = True
            if self.attempt is not None:
                self.attempt.cancel()
            raise
        finally:
            if course is not None:
                course.give_up()
            self._open()

    async def _head(self, course: Course) -> Any:
        """Wait until the answer begins. Raises AioRpcError for an attempt that failed before."""
        attempt = self.attempt
        if self.method.kind == "unary_stream":
            try:
                async with asyncio.timeout(course.patience if course.timeout is None else None):
                    await attempt.initial_metadata()
            except TimeoutError:
                attempt.cancel()
                raise failure_of(grpc.StatusCode.DEADLINE_EXCEEDED, TOO_LATE) from None
            messages = self.messages = aiter(attempt)
            with suppress(StopAsyncIteration):
                self.first.append(await anext(messages))
            return None
        # The caller writes into this attempt: it is the one that counts.
        self._open()
        if self.method.kind == "stream_unary":
            return await attempt
        await attempt.initial_metadata()
        if attempt.done() and (code := await attempt.code()) is not grpc.StatusCode.OK:
            raise failure_of(code, await attempt.details(), await attempt.trailing_metadata())
        return None

    def cancel(self) -> bool:
        """Give up, at once. False if it was over."""
        if not self.task.cancel():
            return False
        self.is_cancelled = True
        if self.attempt is not None:
            self.attempt.cancel()
        return True

    @property
    def is_open(self) -> bool:
        """Nothing is in the way of the caller: no need to wait in `ready`."""
        return self.error is None and self.attempt is not None and self.opened.done()

    async def ready(self) -> Any:
        """The attempt that counts. Raises what ended the call before there was one."""
        if not self.opened.done():
            await asyncio.shield(self.opened)
        if self.error is not None:
            raise self.error
        if self.attempt is None:
            raise asyncio.CancelledError
        return self.attempt

    async def settled(self) -> None:
        """Wait for the end, whatever it is."""
        if not self.task.done():
            await asyncio.wait((self.task,))

    def _open(self) -> None:
        if not self.opened.done():
            self.opened.set_result(None)


class _StreamCall:
    """What the three kinds have in common."""

    def __init__(self, run: Run) -> None:
        self._run = run

    def __del__(self) -> None:
        run = getattr(self, "_run", None)
        if run is not None:
            run.cancel()

    @property
    def mesh_call(self) -> Call | None:
        """The decisions that were taken for this call, once it began: `mesh_call.explain()`."""
        return None if self._run.course is None else self._run.course.call

    def cancel(self) -> bool:
        return self._run.cancel()

    def cancelled(self) -> bool:
        run = self._run
        if isinstance(run.error, grpc.aio.AioRpcError):
            return run.error.code() is grpc.StatusCode.CANCELLED
        return run.is_cancelled or bool(run.task.done() and run.attempt is not None and run.attempt.cancelled())

    def done(self) -> bool:
        return self._run.is_cancelled or self._run.task.done()

    def add_done_callback(self, callback: Callable[[Any], None]) -> None:
        self._run.task.add_done_callback(lambda _: callback(self))

    def time_remaining(self) -> float | None:
        run = self._run
        if run.attempt is None:
            return None
        left: float | None = run.attempt.time_remaining()
        return left

    async def initial_metadata(self) -> Any:
        run = self._run
        await asyncio.shield(run.opened)
        return grpc.aio.Metadata() if run.attempt is None else await run.attempt.initial_metadata()

    async def trailing_metadata(self) -> Any:
        run = self._run
        await run.settled()
        if isinstance(run.error, grpc.aio.AioRpcError):
            return run.error.trailing_metadata()
        return grpc.aio.Metadata() if run.attempt is None else await run.attempt.trailing_metadata()

    async def code(self) -> grpc.StatusCode:
        run = self._run
        await run.settled()
        if isinstance(run.error, grpc.aio.AioRpcError):
            return run.error.code()
        if run.error is not None:
            raise run.error
        if run.is_cancelled or run.attempt is None:
            return grpc.StatusCode.CANCELLED
        code: grpc.StatusCode = await run.attempt.code()
        return code

    async def details(self) -> Any:
        run = self._run
        await run.settled()
        if isinstance(run.error, grpc.aio.AioRpcError):
            return run.error.details()
        if run.is_cancelled or run.attempt is None:
            return CANCELLED_DETAILS
        return await run.attempt.details()

    async def debug_error_string(self) -> Any:
        run = self._run
        await run.settled()
        if isinstance(run.error, grpc.aio.AioRpcError):
            return run.error.debug_error_string()
        return "" if run.attempt is None else await run.attempt.debug_error_string()

    async def wait_for_connection(self) -> None:
        await (await self._run.ready()).wait_for_connection()


class _StreamRequest(_StreamCall):
    """A call into which the caller writes messages, unless it gave an iterator."""

    async def write(self, request: Any) -> None:
        await (await self._run.ready()).write(request)
        course = self._run.course
        assert course is not None
        course.written += 1

    async def done_writing(self) -> None:
        await (await self._run.ready()).done_writing()


class _StreamResponse(_StreamCall):
    """A call with a stream of response messages: iterate over it, or `read` until EOF."""

    _messages: AsyncIterator[Any] | None = None

    def __aiter__(self) -> AsyncIterator[Any]:
        if self._messages is None:
            self._messages = _Messages(self)
        return self._messages

    async def read(self) -> Any:
        try:
            return await self.begin()
        except StopAsyncIteration:
            run = self._run
            # gRPC's iterator is over after a failure; who reads once more is told of it again.
            code = None if run.attempt is None else await run.attempt.code()
            if code not in (None, grpc.StatusCode.OK):
                raise failure_of(code, await run.attempt.details(), await run.attempt.trailing_metadata()) from None
            return EOF

    async def begin(self) -> Any:
        """The next message, whatever there is to wait for."""
        run = self._run
        try:
            attempt = run.attempt if run.is_open else await run.ready()
            if run.first:
                message = run.first.pop()
            else:
                if run.messages is None:
                    run.messages = aiter(attempt)
                message = await anext(run.messages)
        except asyncio.CancelledError:
            self.cancel()
            raise
        course = run.course
        assert course is not None
        course.received += 1
        return message

    @property
    def rest(self) -> Callable[[], Any] | None:
        """How the next messages are got from gRPC without a step of ours; None where there is something to do."""
        run = self._run
        has_step = run.messages is None or bool(run.first) or not run.is_open
        return None if has_step or run.course is None or run.course.is_recorded else run.messages.__anext__


class _Messages(AsyncIterator[Any]):
    """The messages of a response in turn. From the second on they are gRPC's own iterator's."""

    __slots__ = ("_call", "_rest")

    def __init__(self, call: _StreamResponse) -> None:
        self._call = call
        self._rest: Callable[[], Any] | None = None

    def __anext__(self) -> Any:
        rest = self._rest
        if rest is None:
            rest = self._rest = self._call.rest
            if rest is None:
                return self._call.begin()
        return rest()


class UnaryStreamCall(_StreamResponse, grpc.aio.UnaryStreamCall[Any, Any]):
    """One message there, many back."""


class StreamUnaryCall(_StreamRequest, grpc.aio.StreamUnaryCall[Any, Any]):
    """Many messages there, one back: await it."""

    def __await__(self) -> Generator[Any, None, Any]:
        run = self._run
        response = yield from run.task.__await__()
        if run.error is not None:
            raise run.error
        return response


class StreamStreamCall(_StreamRequest, _StreamResponse, grpc.aio.StreamStreamCall[Any, Any]):
    """Many messages both ways."""


async def _counted(requests: Any, course: Course) -> AsyncIterator[Any]:
    """The caller's messages, counted as gRPC asks for them."""
    if hasattr(requests, "__aiter__"):
        async for request in requests:
            course.written += 1
            yield request
    else:
        for request in requests:
            course.written += 1
            yield request
