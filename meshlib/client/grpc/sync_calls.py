"""What does a thread get back from a mesh channel for a call that gRPC moves on threads of its own?

`SyncFuture` for `future()` and for streams of requests with one answer, `Responses` for streams of answers. A call whose request is one
message is tried again as elsewhere, before its answer begins. Who does that differs, since no thread is here to wait: a future goes on
in gRPC's callback (or, after a pause, in a timer of that one pause), a stream of answers in the thread that reads it. A stream of requests
is sent once. As with gRPC, no call raises while it is made: a refusal of the mesh is told to who asks for the answer.
"""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import grpc

from meshlib.call import Call

from .course import TOO_LATE, Course
from .status import failure_of
from .way import Method

log = logging.getLogger("meshlib.client")


class Outgoing:
    """A call with what is needed to send it again."""

    __slots__ = ("_method", "_more", "_request", "_starter", "course", "waiting")

    def __init__(
        self, method: Method, starter: str, request: Any, timeout: float | None, metadata: Any, ready: bool | None, more: Any
    ) -> None:
        self._method = method
        self._starter = starter
        self._more = more
        self.course = Course(method, timeout, metadata, ready)
        links = method.way.links
        assert links is not None
        self.waiting = links.waiting
        self._request = request

    @property
    def is_sent_once(self) -> bool:
        """A stream of requests has one attempt."""
        return not self._method.is_replayable

    def send(self) -> Any:
        """Make the attempt that `step` picked."""
        course = self.course
        try:
            start = self._method.on(course.link)
            if self._starter:
                start = getattr(start, self._starter)
            if course.is_recorded and not self._method.is_replayable:
                self._request = _counted(self._request, course)
            return start(self._request, timeout=course.timeout, metadata=course.sent, **self._more)
        except BaseException:
            course.give_up()
            raise


def _counted(requests: Any, course: Course) -> Iterator[Any]:
    """The caller's messages, counted as gRPC asks for them."""
    for request in requests:
        course.written += 1
        yield request


class SyncFuture(grpc.Future, grpc.Call):  # type: ignore[type-arg]  # generic in the stubs only
    """A call with one answer, as gRPC's own future. `mesh_call` tells the decisions."""

    def __init__(self, outgoing: Outgoing) -> None:
        self._outgoing = outgoing
        self._course = outgoing.course
        self._is_over = threading.Event()
        self._lock = threading.Lock()
        self._callbacks: list[Callable[[], Any]] = []
        self._is_cancelled = False
        self._inner: Any = None
        # A refusal of the mesh.
        self._error: Any = None
        try:
            while pause := self._course.step():
                time.sleep(pause)
        except grpc.RpcError as error:
            self._error = error
            self._end()
        else:
            self._launch()

    @property
    def mesh_call(self) -> Call | None:
        """The decisions that were taken for this call: `mesh_call.explain()`."""
        return self._course.call

    def _launch(self) -> None:
        inner = self._inner = self._outgoing.send()
        if self._is_cancelled:
            inner.cancel()
        inner.add_done_callback(self._landed)

    def _landed(self, inner: Any) -> None:
        """gRPC's callback at the end of an attempt."""
        code = inner.code()
        course = self._course
        if code is grpc.StatusCode.OK:
            course.good()
        elif self._is_cancelled or not course.fail(inner):
            course.give_up()
        else:
            self._again()
            return
        self._end()

    def _again(self) -> None:
        try:
            pause = self._course.step()
            if pause:
                timer = threading.Timer(pause, self._again)
                timer.daemon = True
                timer.start()
            else:
                self._launch()
        except Exception as error:
            self._course.give_up()
            self._error = error
            self._end()

    def _end(self) -> None:
        with self._lock:
            self._is_over.set()
            callbacks, self._callbacks = self._callbacks, []
        tell(callbacks)

    def _settled(self, timeout: float | None = None) -> Any:
        """What answers for the call, once it is over: gRPC's own attempt, or the mesh's refusal."""
        if not self._is_over.wait(timeout):
            raise grpc.FutureTimeoutError
        return self._inner if self._error is None else self._error

    def cancel(self) -> bool:
        if self._is_over.is_set():
            return False
        self._is_cancelled = True
        self._inner.cancel()
        return True

    def cancelled(self) -> bool:
        return self._is_cancelled

    def done(self) -> bool:
        return self._is_cancelled or self._is_over.is_set()

    def running(self) -> bool:
        return not self.done()

    is_active = running

    def result(self, timeout: float | None = None) -> Any:
        settled = self._settled(timeout)
        if self._error is not None:
            raise self._error
        return settled.result()

    def exception(self, timeout: float | None = None) -> Any:
        settled = self._settled(timeout)
        return self._error if self._error is not None else settled.exception()

    def traceback(self, timeout: float | None = None) -> Any:
        settled = self._settled(timeout)
        return self._error.__traceback__ if self._error is not None else settled.traceback()

    def add_done_callback(self, callback: Callable[[Any], Any]) -> None:
        if not self.add_callback(lambda: callback(self)):
            callback(self)

    def add_callback(self, callback: Callable[[], Any]) -> bool:
        with self._lock:
            if self._is_over.is_set():
                return False
            self._callbacks.append(callback)
            return True

    def time_remaining(self) -> Any:
        return 0.0 if self._inner is None else self._inner.time_remaining()

    def initial_metadata(self) -> Any:
        if self._outgoing.is_sent_once and self._error is None:
            return self._inner.initial_metadata()
        return self._settled().initial_metadata()

    def trailing_metadata(self) -> Any:
        return self._settled().trailing_metadata()

    def code(self) -> Any:
        return self._settled().code()

    def details(self) -> Any:
        return self._settled().details()


class Responses:
    """A stream of answers. What is not here is gRPC's own call of the attempt that counts.

    An attempt that fails before the first answer is followed by another while somebody reads or asks for the head or the end; not
    where a callback was added before, which would be told of the wrong end.
    """

    def __init__(self, outgoing: Outgoing) -> None:
        self._outgoing = outgoing
        self._course = outgoing.course
        self._lock = threading.RLock()
        self._inner: Any = None
        self._callbacks: list[Callable[[], Any]] = []
        self._is_cancelled = self._is_late = self._is_over = False
        # A refusal of the mesh.
        self._error: Any = None
        self._launch()

    @property
    def mesh_call(self) -> Call | None:
        """The decisions that were taken for this call: `mesh_call.explain()`."""
        return self._course.call

    def _launch(self) -> None:
        course = self._course
        try:
            while pause := course.step():
                time.sleep(pause)
        except grpc.RpcError as error:
            self._error = error
            self._end()
            return
        if course.timeout is None and not self._outgoing.is_sent_once:
            self._outgoing.waiting.add(self)
        inner = self._inner = self._outgoing.send()
        if self._is_cancelled:
            inner.cancel()
        # gRPC keeps what it calls back: a stream that its reader drops must end nevertheless.
        me = weakref.ref(self)

        def ended() -> None:
            alive = me()
            if alive is not None:
                alive._ended(inner)

        if not inner.add_callback(ended):
            self._ended(inner)

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        course = self._course
        while True:
            if self._error is not None:
                raise self._error
            try:
                message = next(self._inner)
            except grpc.RpcError:
                if self._goes_on():
                    self._launch()
                    continue
                if self._error is not None:
                    raise self._error from None
                raise
            course.received += 1
            if not course.is_headed:
                self._outgoing.waiting.discard(self)
                with self._lock:
                    course.head()
            return message

    next = __next__

    def look(self, now: float) -> None:
        """The route's time for a beginning may be over."""
        if not self._course.is_headed and not self._is_over and now >= self._course.end_of_patience:
            self._outgoing.waiting.discard(self)
            self._is_late = True
            self._inner.cancel()

    def cancel(self) -> bool:
        """Give up. A call that the mesh refused is over."""
        if self._error is not None or self._is_over:
            return False
        self._is_cancelled = True
        self._inner.cancel()
        return True

    def initial_metadata(self) -> Any:
        return self._headed().initial_metadata()

    def trailing_metadata(self) -> Any:
        return self._through().trailing_metadata()

    def code(self) -> Any:
        return self._through().code()

    def details(self) -> Any:
        return self._through().details()

    def add_callback(self, callback: Callable[[], Any]) -> bool:
        with self._lock:
            if self._is_over:
                return False
            self._callbacks.append(callback)
            return True

    def add_done_callback(self, callback: Callable[[Any], Any]) -> None:
        if not self.add_callback(lambda: callback(self)):
            callback(self)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner if self._error is None else self._error, name)

    def __del__(self) -> None:
        inner = self.__dict__.get("_inner")
        if inner is not None:
            self._is_cancelled = True
            inner.cancel()
            self._course.give_up()

    def _headed(self) -> Any:
        """What tells of the head: the attempt that counts, or the mesh's refusal."""
        while self._error is None:
            inner = self._inner
            inner.initial_metadata()
            if not inner.done() or inner.code() is grpc.StatusCode.OK or not self._goes_on():
                break
            self._launch()
        return self._inner if self._error is None else self._error

    def _through(self) -> Any:
        """The same of the end."""
        while self._error is None and self._inner.code() is not grpc.StatusCode.OK and self._goes_on():
            self._launch()
        return self._inner if self._error is None else self._error

    def _goes_on(self) -> bool:
        """The attempt failed under the eyes of who asks. True: before its answer began, and there is another."""
        with self._lock:
            course, inner = self._course, self._inner
            if self._is_over or course.is_headed or course.is_over or self._is_cancelled:
                return False
            failed: Any = inner
            if self._is_late:
                failed = self._error = failure_of(grpc.StatusCode.DEADLINE_EXCEEDED, TOO_LATE)
            is_due = course.fail(failed)
            if not is_due or self._error is not None:
                course.give_up()
                self._end()
                return False
            return True

    def _ended(self, inner: Any) -> None:
        """gRPC says that an attempt is over."""
        code = inner.code()
        with self._lock:
            course = self._course
            if inner is not self._inner or self._is_over:
                return
            if code is grpc.StatusCode.OK or course.is_headed:
                course.head()
                course.end(code, is_cancelled=self._is_cancelled)
            elif self._is_cancelled:
                course.give_up()
            elif self._callbacks and not self._is_late:
                course.fail(inner)
                course.give_up()
            else:
                return  # who asks finds it failed, and may try again
            self._end()

    def _end(self) -> None:
        with self._lock:
            self._is_over = True
            self._outgoing.waiting.discard(self)
            callbacks, self._callbacks = self._callbacks, []
        tell(callbacks)


def tell(callbacks: list[Callable[[], Any]]) -> None:
    """Each of them, whatever another raises."""
    for callback in callbacks:
        try:
            callback()
        except Exception:
            log.exception("a callback of a gRPC call raised; the others are called all the same")
