"""What does a stub get back from a mesh channel under asyncio, if one message goes each way?

A call object like gRPC's own, with the same methods. The first attempt is made at once, and whoever awaits the call awaits
that attempt itself: the ordinary call costs no task and no turn of the loop beyond gRPC's. Only when an attempt fails, when it has to
wait, or when it may be hedged does a task take the call on. The request is serialised once and may be sent again.

A call that its caller drops goes on to its end, as gRPC's does, but is not tried again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Generator
from typing import Any

import grpc
import grpc.aio

from meshlib.call import Call, Errand, Visit, gone_away

from .course import OTHERS, Course, Leg
from .status import failure_of, rpc_error
from .way import Method

CANCELLED_DETAILS = "Locally cancelled by application!"  # gRPC's own words


def extras(credentials: Any, compression: Any) -> dict[str, Any]:
    """The arguments of a call that only gRPC cares for."""
    if credentials is None and compression is None:
        return {}
    return {name: value for name, value in (("credentials", credentials), ("compression", compression)) if value is not None}


class UnaryUnaryCall(grpc.aio.UnaryUnaryCall[Any, Any]):
    """One message each way: await it."""

    # What nearly every call keeps.
    _attempt: Any = None
    _course: Course | None = None
    _error: Exception | None = None
    _is_cancelled = False
    _rest: asyncio.Task[None] | None = None

    def __init__(
        self,
        method: Method,
        request: Any,
        timeout: float | None,
        metadata: Any,
        wait_for_ready: bool | None,
        more: dict[str, Any],
    ) -> None:
        self._method = method
        self._request = request
        self._more = more
        try:
            course = self._course = Course(method, timeout, metadata, wait_for_ready)
            pause = course.step()
            if pause or course.is_hedged:
                self._rest = asyncio.get_running_loop().create_task(self._race(course, pause))
            else:
                self._start(course)
        except grpc.aio.AioRpcError as error:
            self._error = error
        except BaseException:
            if self._course is not None:
                self._course.give_up()
            raise

    def __del__(self) -> None:
        course = self._course
        if course is not None and not course.is_over and self._rest is None:
            course.forget(self._attempt)

    def __await__(self) -> Generator[Any, None, Any]:
        course = self._course
        if course is None or course.visit is None or not course.visit.ends_calls or self._error is not None:
            return self._answer()
        return self._wanted(course, course.visit)

    def _wanted(self, course: Course, visit: Visit) -> Generator[Any, None, Any]:
        """On behalf of a client that may go away."""
        errand = visit.errand() if course.native.is_idempotent else None
        try:
            return (yield from self._answer())
        except asyncio.CancelledError as error:
            raise self._why(errand, error) from None
        finally:
            if errand is not None:
                errand.end()

    def _why(self, errand: Errand | None, error: asyncio.CancelledError) -> BaseException:
        if errand is None or not errand.end(error):
            return error
        gone = gone_away()
        gone.call = self.mesh_call
        return rpc_error(gone)

    def _answer(self) -> Generator[Any, None, Any]:
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
        if self._attempt is not None:
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
        return grpc.aio.Metadata() if self._attempt is None else await self._attempt.trailing_metadata()

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
        return "" if self._attempt is None else await self._attempt.debug_error_string()

    async def wait_for_connection(self) -> None:
        await self._settled()
        if self._error is not None:
            raise self._error
        if self._attempt is None:
            raise asyncio.CancelledError
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
        self._attempt = attempt = self._send(course)
        attempt.add_done_callback(course.landed)

    def _send(self, course: Course) -> Any:
        link, end = course.link, course.attempt_end
        assert link is not None
        start = self._method.starts.get(link) or self._method.on(link)
        metadata = grpc.aio.Metadata(*course.sent) if course.sent else None
        return start(self._request, timeout=None if end is None else max(end - course.now, 0.0), metadata=metadata, **self._more)

    def _has_failed(self) -> bool:
        """The attempt ended, and a success would have ended the course."""
        return self._course is not None and not self._course.is_over

    def _go_on(self) -> None:
        """The attempt under way has failed: a task takes the call on."""
        if self._rest is None:
            assert self._course is not None
            self._rest = asyncio.get_running_loop().create_task(self._attempts(self._course))

    async def _attempts(self, course: Course) -> None:
        """What becomes of the call after the first attempt failed. Never raises but CancelledError."""
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

    async def _race(self, course: Course, pause: float) -> None:
        """A call whose first attempt has to wait, or which may have two under way. Never raises but CancelledError."""
        under_way: dict[Any, Leg] = {}
        landed: asyncio.Queue[Any] = asyncio.Queue()
        try:
            while True:
                while pause > 0.0:
                    await asyncio.sleep(pause)
                    pause = course.step()
                if pause != OTHERS:
                    attempt = self._send(course)
                    under_way[attempt] = course.put_aside()
                    attempt.add_done_callback(landed.put_nowait)
                try:
                    async with asyncio.timeout(course.hedge_after()):
                        ended = await landed.get()
                except TimeoutError:
                    # All are slow: another endpoint is asked for the same.
                    pause = course.step()
                    continue
                course.take_up(under_way.pop(ended))
                self._attempt = ended
                code = await ended.code()
                if code is grpc.StatusCode.OK:
                    course.good()
                    return
                error = failure_of(code, await ended.details(), await ended.trailing_metadata())
                if not course.fail(error):
                    self._error = error
                    return
                pause = course.step()
        except Exception as error:
            self._error = error
        finally:
            for attempt, leg in under_way.items():
                attempt.cancel()
                course.drop(leg)
            course.give_up()

    def _give_up(self) -> None:
        if self._course is not None:
            self._course.give_up()


# Tasks that wait to tell a callback; the loop itself holds tasks only weakly.
_telling: set[asyncio.Task[None]] = set()
