"""What changes in etcd from now on, and is it still etcd that says nothing?

A watch is an answer that doesn't end. Silence on it may mean that nothing changed, that the member was cut off from its
cluster, or that it stopped; etcd's own notice of progress comes every ten minutes only. So where nothing was said for `every`
seconds, that very member is asked for a key, which it can answer only together with a majority.

What etcd says is handed on by a plain call, in the task that reads it: each task in between would be one more turn of the loop,
for which the keeper has to wait while calls have the interpreter. It begins nothing anew: it raises when the watch is over.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Coroutine
from typing import Any, Final

from .client import Client
from .messages import UNAVAILABLE, Batch, EtcdError, read_batch, text_of

# Seconds of silence after which the member is asked.
EVERY: Final = 5.0
# Seconds after which the watch itself must have said a word: etcd's notices of progress come every ten minutes, and a tenth of chance.
SILENCE: Final = 900.0
STILL_SO: Final = Batch(0)


async def watch(
    client: Client,
    key: bytes,
    end: bytes,
    told: Callable[[Batch], None],
    *,
    since: int = 0,
    every: float = EVERY,
    silence: float = SILENCE,
) -> None:
    """`told` is called first with a Batch that says from which revision on it tells, then with what happened; an empty one says that
    nothing did.

    `since` is the revision of the first event that is wanted; without it, what comes from now on. Raises EtcdError, and never
    just ends.
    """
    url = await client.ping(key)
    wish: dict[str, Any] = {"key": text_of(key), "range_end": text_of(end), "progress_notify": True, "start_revision": since}
    async with contextlib.AsyncExitStack() as stack:
        try:
            async with asyncio.timeout(client.settings.timeout):
                lines = await stack.enter_async_context(client.lines(url, "watch", {"create_request": wish}))
                created = read_batch(await anext(lines, b""))
        except TimeoutError:
            raise EtcdError(f"etcd at {url} began no watch within {client.settings.timeout:g} s.", code=UNAVAILABLE) from None
        if not created.is_created:
            raise EtcdError("what answers is not etcd's gateway: it didn't begin the watch.")
        told(created)
        heard = time.monotonic()

        async def read() -> None:
            nonlocal heard
            async for line in lines:
                heard = time.monotonic()
                told(read_batch(line))
            raise EtcdError(f"etcd at {url} ended the watch.", code=UNAVAILABLE)

        async def ask() -> None:
            # It costs a connection the first time: not while all others come back, too, who have lost etcd with this one.
            await asyncio.sleep(every)
            while True:
                await asyncio.sleep(every)
                if (quiet := time.monotonic() - heard) > silence:
                    raise EtcdError(f"the watch of etcd at {url} has said nothing for {silence:g} s.", code=UNAVAILABLE)
                if quiet >= every:
                    await client.ping(key, url)
                told(STILL_SO)

        await either(read(), ask())


async def either(*ways: Coroutine[Any, Any, None]) -> None:
    """Until one of them ends or fails; the others are cancelled."""
    tasks = [asyncio.ensure_future(way) for way in ways]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        for task in tasks:
            if not task.cancelled():
                task.exception()  # seen, so that nothing is said of it later
