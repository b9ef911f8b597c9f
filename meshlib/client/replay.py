"""Can a body that is streamed be sent a second time?

As long as all that was taken from it is still here: up to 64 KiB of a body are kept while they go out (as Linkerd does), and another
attempt gets those pieces first and then goes on with the same iterator. Beyond that, or where the iterator failed or was stopped in
the middle of a piece, it is lost, and the call is not repeated once the body was begun.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterable, AsyncIterator, Iterable, Iterator

# Bytes of a streamed body that are kept (linkerd/http/retry/src/replay.rs).
LIMIT = 64 * 1024


class Replay:
    """What has been taken from a body so far. `is_lost`: it can't be sent again."""

    __slots__ = ("_is_over", "_kept", "_size", "is_lost")

    def __init__(self) -> None:
        self._kept: list[bytes] = []
        self._size = 0
        self._is_over = False
        self.is_lost = False

    async def close(self) -> None:
        """Nobody wants the rest. A generator is not left to the garbage collector, which would finish it in some other task."""

    def _keep(self, piece: bytes) -> None:
        # A copy where it is no bytes: some iterators fill the same buffer again and again.
        piece = bytes(piece)
        self._size += len(piece)
        if self._size > LIMIT:
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

    __slots__ = ("_source",)

    def __init__(self, body: AsyncIterable[bytes]) -> None:
        super().__init__()
        self._source = body.__aiter__()

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for piece in tuple(self._kept):
            yield piece
        while not self._is_over:
            try:
                fresh = await anext(self._source, None)
            except BaseException:
                # Cancelled while it made a piece, a generator is at its end, and what it would have said is gone.
                self.is_lost = True
                raise
            if fresh is None:
                self._is_over = True
                return
            if not self.is_lost:
                self._keep(fresh)
            yield fresh

    async def close(self) -> None:
        if self._is_over:
            return
        self._is_over = self.is_lost = True
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
