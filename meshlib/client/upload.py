"""How does a body go out that is more than one write?

Piece by piece, as the peer takes it, until it ends or an answer comes first: what an iterator gives is for nobody then, and it may wait
for ever. HTTP/1.1 and HTTP/2 differ only in what a piece becomes, which is `push`. Where time runs out is not decided here.

A body `on demand` is not begun before the peer asks for it (100 Continue). The node agent does when it has a connection to the endpoint,
so that an attempt which fails before costs nothing of a body that can't be read twice.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import TYPE_CHECKING, Any

from .replay import FAREWELL, AsyncReplayed
from .terms import LARGE

if TYPE_CHECKING:
    from .way import Attempt

PIECE = 256 * 1024

__all__ = ["FAREWELL", "LARGE", "PIECE", "demand_end", "feed", "idle_of", "is_on_demand", "race"]

# Sends a piece (and whether it is the last one); False if the rest is for nobody.
Push = Callable[[bytes | memoryview, bool], Awaitable[bool]]


def is_on_demand(attempt: Attempt) -> bool:
    """Does the body wait until the peer asks for it?"""
    return getattr(attempt, "is_on_demand", False)


def idle_of(attempt: Attempt) -> float:
    """Seconds that the peer may take none of a body (0: any)."""
    terms = attempt.terms
    return terms.write or (0.0 if terms.is_explicit else attempt.stream_idle)


def demand_end(attempt: Attempt) -> float:
    """Until when a body on demand must have been asked for: by then there is a connection, or an answer that there is none."""
    idle = idle_of(attempt)
    return min(attempt.head_end, attempt.connect_end + idle) if idle else attempt.head_end


async def feed(attempt: Attempt, push: Push) -> None:
    """Give the body of an attempt to `push`."""
    body = attempt.body
    if not (isinstance(body, AsyncReplayed) and body.is_held):
        await _feed(attempt, push)
        return
    task = asyncio.ensure_future(_feed(attempt, push))
    task.add_done_callback(_forgive)
    body.is_going = True
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        if body.is_held and body.is_making and body.left is None:
            # A generator that is stopped is at its end: it finishes its piece, for the next attempt.
            body.left = task
        else:
            task.cancel()
            await asyncio.wait((task,), timeout=FAREWELL)
        raise
    finally:
        body.is_going = False


async def _feed(attempt: Attempt, push: Push) -> None:
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
            is_left = isinstance(body, AsyncReplayed) and body.left is asyncio.current_task()
            if isinstance(body, AsyncReplayed) and not (is_wanted or is_left or body.is_held):
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
