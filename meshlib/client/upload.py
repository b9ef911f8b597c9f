"""How does a body go out that is more than one write?

Piece by piece, as the peer takes it, until it ends or an answer comes first: what an iterator gives is for nobody then, and it may wait
for ever. HTTP/1.1 and HTTP/2 differ only in what a piece becomes, which is `push`. Where time runs out is not decided here.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import TYPE_CHECKING, Any

from .replay import AsyncReplayed
from .terms import LARGE

if TYPE_CHECKING:
    from .way import Attempt

PIECE = 256 * 1024
# How long the iterator of an upload that is not wanted any more may take to clean up before the call goes on.
FAREWELL = 0.1

__all__ = ["LARGE", "PIECE", "feed", "race"]

# Sends a piece (and whether it is the last one); False if the rest is for nobody.
Push = Callable[[bytes | memoryview, bool], Awaitable[bool]]


async def feed(attempt: Attempt, push: Push) -> None:
    """Give the body of an attempt to `push`."""
    body: Any = attempt.body
    if isinstance(body, bytes):
        whole = memoryview(body)
        for at in range(0, len(body), PIECE):
            if not await push(whole[at : at + PIECE], at + PIECE >= len(body)):
                return
        return
    if hasattr(body, "__aiter__"):
        pieces = body.__aiter__()
        is_wanted = False
        try:
            async for piece in pieces:
                if not await push(piece, False):
                    return
        except Exception:
            # Another attempt may want what was taken, and the rest.
            is_wanted = True
            raise
        finally:
            # Generators are not left to the garbage collector, which would finish them in some other task.
            if hasattr(pieces, "aclose"):
                await pieces.aclose()
            if not is_wanted and isinstance(body, AsyncReplayed):
                await body.close()
    else:
        for piece in body:
            if not await push(piece, False):
                return
    await push(b"", True)


async def race(upload: Coroutine[Any, Any, None], reply: asyncio.Future[Any]) -> None:
    """Run an upload until it ends, or until the reply is there."""
    task = asyncio.ensure_future(upload)
    try:
        await asyncio.wait((task, reply), return_when=asyncio.FIRST_COMPLETED)
        if not reply.done():
            task.result()
    finally:
        if not task.done():
            task.cancel()
            # The iterator has a moment to put things away, but it can't hold the answer back.
            await asyncio.wait((task,), timeout=FAREWELL)
        task.add_done_callback(_forgive)


def _forgive(task: asyncio.Task[None]) -> None:
    """What an upload raises after its call has ended is nobody's any more."""
    if not task.cancelled():
        task.exception()
