"""Can a body that is streamed be sent a second time?

As long as all that was taken from it is still here: up to 64 KiB of a body are kept while they go out (as Linkerd does), and another
attempt gets those pieces first and then goes on with the same iterator. Beyond that, or where the iterator failed or was stopped in
the middle of a piece, it is lost, and the call is not repeated once the body was begun.

A body that is held goes to somebody who takes some of it before he knows where to send it (the node agent, in HTTP/2): what he may
take is kept, too, and an iterator that makes a piece when he fails is not stopped.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterable, AsyncIterator, Iterable, Iterator

# Bytes of a streamed body that are kept (linkerd/http/retry/src/replay.rs).
LIMIT = 64 * 1024
# Bytes that the agent takes of a stream before it has a connection: its window (DATA_STREAM_WINDOW in proxy/src/limits.rs).
AHEAD = 64 * 1024
# How long the iterator of an upload that is not wanted any more may take to clean up before the call goes on.
FAREWELL = 0.1


class Replay:
    """What has been taken from a body so far. `is_lost`: it can't be sent again. `is_held`: whoever takes it may fail and leave it."""

    __slots__ = ("_is_over", "_kept", "_room", "_size", "is_held", "is_lost")

    def __init__(self) -> None:
        self._kept: list[bytes] = []
        self._size = 0
        # A piece that begins within is kept, however long it is.
        self._room = 0
        self._is_over = False
        self.is_held = False
        self.is_lost = False

    def hold(self) -> None:
        """It is taken before there is a connection to its receiver."""
        self.is_held = True
        self._room = AHEAD + 1

    async def release(self) -> None:
        """It has been answered. What is left of it is for an upload that still goes on, or for nobody."""
        self.is_held = False

    async def close(self) -> None:
        """Nobody wants the rest. A generator is not left to the garbage collector, which would finish it in some other task."""

    def _keep(self, piece: bytes, *, is_left: bool = False) -> None:
        # A copy where it is no bytes: some iterators fill the same buffer again and again.
        piece = bytes(piece)
        before = self._size
        self._size += len(piece)
        if self._size > LIMIT and before >= self._room and not is_left:
            self.is_lost = True
            self._kept = []
        else:
            self._kept.append(piece)


class Replayed(Replay):
    """A body from an iterator."""

    __slots__ = ("_source",)

    def __init__(self, body: Iterable[bytes]) -> None:
        super().__init__()
        self._source = iter(body)

    def __iter__(self) -> Iterator[bytes]:
        yield from tuple(self._kept)
        while not self._is_over:
            try:
                piece = next(self._source, None)
            except BaseException:
                self.is_lost = True
                raise
            if piece is None:
                self._is_over = True
                return
            if not self.is_lost:
                self._keep(piece)
            yield piece


class AsyncReplayed(Replay):
    """A body from an asynchronous iterator."""

    __slots__ = ("_source", "is_going", "is_making", "left")

    def __init__(self, body: AsyncIterable[bytes]) -> None:
        super().__init__()
        self._source = body.__aiter__()
        # While it is held: an upload takes it, and the iterator makes a piece.
        self.is_going = self.is_making = False
        # An upload that was given up while the iterator made a piece. It ends with that piece, which is kept.
        self.left: asyncio.Task[None] | None = None

    async def __aiter__(self) -> AsyncIterator[bytes]:
        left = self.left
        if left is not None:
            await asyncio.wait((left,))
            self.left = None
            # Where the iterator failed, what it gave is not the whole.
            left.result()
        for piece in tuple(self._kept):
            yield piece
        while not self._is_over:
            self.is_making = True
            try:
                fresh = await anext(self._source, None)
            except BaseException:
                # Cancelled while it made a piece, a generator is at its end, and what it would have said is gone.
                self.is_lost = True
                raise
            finally:
                self.is_making = False
            if fresh is None:
                self._is_over = True
                return
            if not self.is_lost:
                self._keep(fresh, is_left=self.left is not None)
            yield fresh

    async def release(self) -> None:
        await super().release()
        if not self.is_going:
            await self.close()

    async def close(self) -> None:
        if self._is_over:
            return
        self._is_over = self.is_lost = True
        left, self.left = self.left, None
        if left is not None and not left.done():
            left.cancel()
            await asyncio.wait((left,), timeout=FAREWELL)
        aclose = getattr(self._source, "aclose", None)
        if aclose is not None:
            # An upload that is being stopped closes it itself.
            with contextlib.suppress(RuntimeError):
                await aclose()


def replayed(body: Iterable[bytes] | AsyncIterable[bytes], *, is_blocking: bool) -> Replayed | AsyncReplayed:
    """The same body, and what was taken from it. Some bodies can be read in both ways (multipart): the caller's kind counts."""
    if isinstance(body, AsyncIterable) and not (is_blocking and isinstance(body, Iterable)):
        return AsyncReplayed(body)
    return Replayed(body)
