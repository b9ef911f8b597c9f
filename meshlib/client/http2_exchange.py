"""How does one exchange go over a stream of an HTTP/2 connection?

The same steps and the same words as in `connection.py`, with a stream in the place of the socket: a timeout, a cancellation or an
error resets the stream. A body that isn't read stops its own stream by flow control, since the window is given back when a piece is
taken; an upload waits for the peer's window, and for the socket. Other than in HTTP/1.1 an answer that begins early doesn't end the
upload, since both directions may flow at once; only the end of the stream does. An exchange knows its stream and its time; bytes are
the connection's.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING, Any

from .. import errors
from .._native import core
from .connection import NEVER, limits_of
from .faults import IDLE_TIMEOUT, WRITE_TIMEOUT, late
from .terms import ORDINARY
from .upload import FAREWELL, LARGE, feed

if TYPE_CHECKING:
    from .http2 import Http2Connection
    from .way import Attempt, Headers, Reply


class Exchange:
    """One exchange, and afterwards the body that is still on its way (`way.Incoming`)."""

    __slots__ = (
        "_connection",
        "_error",
        "_idle",
        "_is_over",
        "_limit",
        "_phase",
        "_pieces",
        "_reader",
        "_reply",
        "_stream",
        "_upload",
        "_writer",
        "attempt",
        "end",
    )

    def __init__(self, connection: Http2Connection, attempt: Attempt) -> None:
        self._connection = connection
        self.attempt = attempt
        self._stream = 0
        self._reply = connection.create_future()
        self._pieces: deque[bytes] | None = None
        self._reader: asyncio.Future[None] | None = None
        self._writer: asyncio.Future[None] | None = None
        # What is still being sent, maybe while the answer comes.
        self._upload: asyncio.Task[None] | None = None
        # The stream has ended: nothing more is sent or told.
        self._is_over = False
        self._error: BaseException | None = None
        # When time is up, until when it can be moved on, and by how many seconds a sign of life does so (0: not at all).
        self.end = self._limit = NEVER
        self._idle = 0.0
        # The reason of a timeout now: None while the head is awaited.
        self._phase: str | None = None

    # --- in its order

    async def run(self) -> Reply:
        attempt, connection = self.attempt, self._connection
        body = attempt.body
        try:
            if body is None or (isinstance(body, bytes) and len(body) < LARGE):
                self._stream = connection.begin(self, body, False)
                end = attempt.head_end
                if attempt.terms is not ORDINARY:
                    now, terms = connection.time(), attempt.terms
                    self._limit = attempt.end if terms.is_explicit else attempt.hard_end
                    end = min(end, NEVER if terms.read is None else now + terms.read)
                self._watch(end)
            else:
                await self._deliver(attempt, body)
            return await self._reply  # type: ignore[no-any-return]
        except BaseException:
            await self.close()
            raise

    async def _deliver(self, attempt: Attempt, body: Any) -> None:
        """Send a body that is more than one write."""
        terms, now = attempt.terms, self._connection.time()
        # What the route gives for the head counts from the end of the upload.
        patience = attempt.head_end - now if terms.read is None else terms.read
        self._limit = attempt.end if terms.is_explicit else attempt.hard_end
        self._stream = self._connection.begin(self, None, True)
        self._phase = WRITE_TIMEOUT
        self._idle = terms.write or (0.0 if terms.is_explicit else attempt.stream_idle)
        self._watch(min(self._limit, now + self._idle) if self._idle else self._limit)
        upload = self._upload = asyncio.ensure_future(feed(attempt, self._push))
        upload.add_done_callback(self._sent)
        # An iterator may wait for ever; so the answer, or the end of the time, counts if it comes first.
        await asyncio.wait((upload, self._reply), return_when=asyncio.FIRST_COMPLETED)
        if self._is_over:
            await self._stop()
        if not self._reply.done():
            upload.result()
            self._phase = None
            self._idle = 0.0
            self._watch(min(self._limit, self._connection.time() + patience))

    def _sent(self, upload: asyncio.Task[None]) -> None:
        """If the iterator failed, half a body must not be taken for a whole one, and who reads the answer is told."""
        error = None if upload.cancelled() else upload.exception()
        if error is not None and not self._is_over:
            self._is_over = True
            self._connection.give_up(self._stream)
            self._error = error
            _wake(self._reader)

    async def _stop(self) -> None:
        """What is left of the upload is for nobody."""
        upload = self._upload
        if upload is not None and not upload.done():
            upload.cancel()
            # The iterator has a moment to put things away, but it can't hold the answer back.
            await asyncio.wait((upload,), timeout=FAREWELL)

    async def _push(self, piece: bytes | memoryview, is_last: bool) -> bool:
        """Write a piece when the peer takes it; False once the stream has ended, since the rest is for nobody."""
        connection, wire = self._connection, self._connection.wire
        if self._is_over or connection.is_gone():
            return False
        if piece or is_last:
            connection.put(wire.send_stream(self._stream, piece, is_last))
        while not self._is_over and wire.is_stream_blocked(self._stream):
            self._writer = connection.create_future()
            try:
                await self._writer
            finally:
                self._writer = None
        if not await connection.drained():
            return False
        self._alive()
        return True

    # --- what comes

    def take(self, event: tuple[Any, ...]) -> None:
        kind = event[0]
        if kind == core.EVENT_RESPONSE:
            self._over()
            self._answer(event[1:6])
        elif kind == core.EVENT_HEAD:
            self._pieces = deque()
            self._begin_body(event[1], event[4])
            self._answer((*event[1:5], self))
        elif kind == core.EVENT_BODY:
            if self._pieces is not None:
                self._pieces.append(event[1])
            self._alive()
            _wake(self._reader)
        elif kind == core.EVENT_END:
            self._over()
            if self._pieces is not None:
                self._pieces.append(b"")
            _wake(self._reader)
        elif kind == core.EVENT_WRITABLE:
            _wake(self._writer)
        elif kind == core.EVENT_RESET:
            self._connection.over(self._stream)
            self.fail(event[1])

    def _over(self) -> None:
        """The stream has ended, and with it the upload, wherever it stands."""
        self._is_over = True
        self._connection.over(self._stream)
        if self._upload is not None:
            self._upload.cancel()

    def _answer(self, reply: tuple[Any, ...]) -> None:
        if not self._reply.done():
            self._reply.set_result(reply)

    def _begin_body(self, status: int, headers: Headers) -> None:
        """The head is here and the body is not: what limits the rest?"""
        self._limit, self._idle = limits_of(self.attempt, status, headers)
        self._phase = IDLE_TIMEOUT if self._idle else None
        self._watch(min(self._limit, self._connection.time() + self._idle) if self._idle else self._limit)

    def fail(self, error: errors.AttemptFailed) -> None:
        """It has ended badly: whoever waits for it, or reads on, is told the error."""
        self._is_over = True
        if self._upload is not None:
            self._upload.cancel()
        if self._error is None:
            self._error = error
        if not self._reply.done():
            self._reply.set_exception(error)
            # Seen: who waited may have been cancelled meanwhile, and that is no reason for a line in the log.
            self._reply.exception()
        _wake(self._reader)

    # --- its time

    def _watch(self, end: float) -> None:
        self.end = end
        self._connection.watch(end)

    def _alive(self) -> None:
        """A sign of life moves the end on, where the times between two pieces are what is limited."""
        if self._idle:
            self.end = min(self._limit, self._connection.time() + self._idle)

    def expire(self) -> None:
        if self._idle and self._connection.time() < self._limit and self._is_ours():
            self._alive()
            return
        self._connection.give_up(self._stream)
        self.fail(late(self._connection.key[0], self._phase, True))

    def _is_ours(self) -> bool:
        """The silence is the application's, which has not taken what came, or (where it set the times itself) doesn't ask."""
        if self._pieces:
            return True
        if not self.attempt.terms.is_explicit:
            return False
        return (self._writer if self._phase == WRITE_TIMEOUT else self._reader) is None

    # --- a body on its way (way.Incoming)

    async def read(self) -> bytes:
        pieces, connection = self._pieces, self._connection
        if pieces is None:
            return b""
        while not pieces:
            if self._error is not None:
                raise self._error
            self._reader = connection.create_future()
            # Nobody is late while nobody waits for it.
            self._alive()
            try:
                await self._reader
            except BaseException:
                await self.close()
                raise
            finally:
                self._reader = None
        piece = pieces.popleft()
        if not piece:
            self._pieces = None
            await self._stop()
        elif not connection.is_gone():
            # The peer may send as much again; of a stream that has ended the wire knows nothing any more.
            connection.put(connection.wire.consume(self._stream, len(piece)))
        return piece

    async def write(self, data: bytes) -> None:
        raise errors.ProtocolError("an HTTP/2 exchange has no change of protocols.", hint="Send an Upgrade over HTTP/1.1.")

    async def close(self) -> None:
        """Give up on the rest, also of what is still being sent."""
        self._pieces = None
        self._is_over = True
        self._connection.give_up(self._stream)
        await self._stop()

    def info(self, name: str) -> Any:
        return self._connection.info(name)


def _wake(future: asyncio.Future[None] | None) -> None:
    if future is not None and not future.done():
        future.set_result(None)
