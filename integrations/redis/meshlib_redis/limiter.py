"""How is one limit counted for many processes, by Redis?

By the sliding window counter of the library `limits`: two counters per key and one script, so that asking costs one round trip and a
few bytes, whatever the limit is. Its moving window would be exact, but keeps a time for every call, and takes that time from the
caller's clock: processes whose clocks differ would count differently. The counter goes by the clock of Redis alone.

A rate of `calls` per `per` with a `burst` is a window in which `burst` calls fit, `burst * per / calls` seconds long: at most
`burst` at once and `calls / per` a second in the long run, and in no stretch of time more than that rate gives and `burst` (and one,
where counters are rounded down). The engine's local limit (GCRA) keeps the same bound, so that a limit means the same whoever counts.

Under asyncio, calls that come for a key while an answer is awaited are asked for together, so that a burst of a thousand is a handful of
questions. Blocking callers share one pool of connections per process, and each event loop has its own; a forked child begins anew.
Nothing is retried here: the mesh knows what to do without an answer.
"""

from __future__ import annotations

import asyncio
import copy
import threading
import time
from collections.abc import Mapping
from math import ceil
from pathlib import Path
from typing import Any, cast

import redis
import redis.asyncio
from limits.aio.storage import RedisStorage as AsyncRedisStorage
from limits.storage import RedisStorage
from redis.asyncio.retry import Retry as AsyncRetry
from redis.backoff import NoBackoff
from redis.connection import parse_url
from redis.retry import Retry

from meshlib import ConfigError

SETTINGS = {"url", "url_file", "timeout", "connections"}
SCHEMES = ("redis://", "rediss://", "unix://")
PREFIX = "meshlib"
TIMEOUT = 0.05
# The shortest window. Redis counts milliseconds, so that a shorter one would be inexact by more than a tenth.
SHORTEST = 10


class RedisLimiter:
    """A `GlobalLimiter`. Any thread, any event loop and any forked child may use it."""

    def __init__(self, url: str, *, timeout: float = TIMEOUT, connections: int = 32) -> None:
        self._url = url
        self._timeout = timeout
        self._connections = connections
        # redis-py begins anew in a forked child by itself; there, what belongs to a loop of the parent's is never touched.
        self._blocking: RedisStorage | None = None
        self._by_loop: dict[asyncio.AbstractEventLoop, _Asker] = {}

    def __repr__(self) -> str:
        return f"<RedisLimiter with {len(self._by_loop)} event loops>"

    async def take_async(self, key: str, calls: int, per: float, burst: int, timeout: float) -> float:
        most, seconds = window(calls, per, burst)
        return await self._of_this_loop().take(f"{key}:{most}/{seconds:g}", most, seconds)

    def take(self, key: str, calls: int, per: float, burst: int, timeout: float) -> float:
        most, seconds = window(calls, per, burst)
        key = f"{key}:{most}/{seconds:g}"
        _now.end = time.monotonic() + timeout
        store = self._of_this_process()
        if store.acquire_sliding_window_entry(key, most, seconds):  # type: ignore[arg-type]
            return 0.0
        try:
            return wait(most, seconds, *store.get_sliding_window(key, seconds))  # type: ignore[arg-type]
        except Exception:
            return seconds / most

    # --- connections

    def _of_this_process(self) -> RedisStorage:
        store = self._blocking
        if store is None:
            pool = redis.BlockingConnectionPool.from_url(
                self._url,
                **self._options(),
                retry=Retry(NoBackoff(), 0),
                connection_class=_timely(_parsed(self._url).get("connection_class", redis.Connection)),
            )
            store = self._blocking = RedisStorage(self._url, connection_pool=pool, key_prefix=PREFIX)
        return store

    def _of_this_loop(self) -> _Asker:
        loop = asyncio.get_running_loop()
        asker = self._by_loop.get(loop)
        if asker is None:
            for other in [other for other in self._by_loop if other.is_closed()]:
                del self._by_loop[other]
            pool = redis.asyncio.BlockingConnectionPool.from_url(self._url, **self._options(), retry=AsyncRetry(NoBackoff(), 0))
            store = AsyncRedisStorage(
                f"async+{self._url}", implementation="redispy", connection_pool=cast(Any, pool), key_prefix=PREFIX
            )
            asker = self._by_loop[loop] = _Asker(loop, store)
        return asker

    def _options(self) -> dict[str, Any]:
        return {
            "max_connections": self._connections,
            "timeout": self._timeout,  # until one of them is free
            "socket_timeout": self._timeout,
            "socket_connect_timeout": self._timeout,
            "protocol": 2,
            "driver_info": None,  # each would be a round trip more on a new connection
        }


def open_limiter(settings: Mapping[str, Any]) -> RedisLimiter:
    """The factory behind the entry point. `settings` are those of `stores.redis` in mesh.yaml."""
    unknown = sorted(settings.keys() - SETTINGS)
    if unknown:
        raise ConfigError(f"stores.redis: unknown settings {', '.join(unknown)}.", hint=f"Known: {', '.join(sorted(SETTINGS))}.")
    url = settings.get("url")
    if (url is None) == ("url_file" not in settings):
        raise ConfigError("stores.redis: needs url or url_file, and not both.")
    if url is None:
        try:
            url = Path(settings["url_file"]).read_text().strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"stores.redis: the file of the URL can't be read: {type(error).__name__}.") from None
    try:
        # The whole text is kept out of the error: there may be a password in it.
        if not (isinstance(url, str) and url.startswith(SCHEMES)):
            raise ValueError
        _parsed(url)
    except ValueError:
        raise ConfigError(
            "stores.redis: the URL can't be used.",
            hint="redis://[user:password@]host[:port][/db], rediss://… with TLS, or unix:///path.",
        ) from None
    connections = settings.get("connections", 32)
    if not isinstance(connections, int) or isinstance(connections, bool) or not 1 <= connections <= 10_000:
        raise ConfigError("stores.redis: connections must be a whole number from 1 to 10000.")
    return RedisLimiter(url, timeout=settings.get("timeout", TIMEOUT), connections=connections)


def window(calls: int, per: float, burst: int) -> tuple[int, float]:
    """How many calls fit into how many seconds, for a rate with a burst."""
    length = round(1000 * burst * per / calls)
    if length < SHORTEST:
        length = SHORTEST
        burst = max(1, round(calls * SHORTEST / (1000 * per)))
        if burst == 1:
            length = max(SHORTEST, ceil(1000 * per / calls))
    while length / 1000 * 1000 != length:  # the script multiplies, and Redis takes whole milliseconds only
        length += 1
    return burst, length / 1000


def wait(most: int, seconds: float, before: int, before_left: float, now: int, now_left: float) -> float:
    """Seconds until a call fits again, if nobody else comes: the calls of the last window lose weight, or this one ends."""
    if now >= most:
        return max(0.001, now_left - seconds)
    if not before:
        return 0.001
    return max(0.001, before_left - (most - now) * seconds / before + 0.001)


class _Asker:
    """Who asks for one event loop: one question about a key at a time, and those who come meanwhile share the next."""

    def __init__(self, loop: asyncio.AbstractEventLoop, store: AsyncRedisStorage) -> None:
        self._loop = loop
        self._store = store
        # By key, while a question is under way.
        self._queues: dict[str, _Queue] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    async def take(self, key: str, most: int, seconds: float) -> float:
        under_way = self._queues.get(key)
        if under_way is not None:
            told: asyncio.Future[float] = self._loop.create_future()
            under_way.waiting.append(told)
            return await told
        queue = self._queues[key] = _Queue()
        try:
            _, left = await self._ask(key, most, seconds, 1)
            return left
        finally:
            if queue.waiting:
                task = self._loop.create_task(self._ask_for_all(queue, key, most, seconds))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)
                # A task that is cancelled before it begins runs no `finally` of its own.
                task.add_done_callback(lambda _: self._end(queue, key))
            else:
                del self._queues[key]

    async def _ask_for_all(self, queue: _Queue, key: str, most: int, seconds: float) -> None:
        try:
            while asking := [told for told in queue.waiting if not told.done()]:
                queue.asking, queue.waiting = asking, []
                try:
                    granted, left = await self._ask(key, most, seconds, len(asking))
                except Exception as error:
                    for told in asking:
                        if not told.done():
                            told.set_exception(copy.copy(error))  # each its own: who catches one adds to it
                else:
                    for index, told in enumerate(asking):
                        if not told.done():  # who gave up meanwhile has been counted
                            told.set_result(0.0 if index < granted else left)
        finally:
            self._end(queue, key)

    def _end(self, queue: _Queue, key: str) -> None:
        """Nobody asks any more. Who still waits is told so as a failure of the store: they were not cancelled themselves."""
        if self._queues.get(key) is queue:
            del self._queues[key]
        for told in (*queue.asking, *queue.waiting):
            if not told.done():
                told.set_exception(redis.ConnectionError("the question was given up, since the task that asked was cancelled"))

    async def _ask(self, key: str, most: int, seconds: float, amount: int) -> tuple[int, float]:
        """How many of so many calls may go, and the seconds until another may."""
        store = self._store
        if await store.acquire_sliding_window_entry(key, most, seconds, amount):  # type: ignore[arg-type]  # it takes fractions, too
            return amount, 0.0
        granted = 0
        try:
            state = await store.get_sliding_window(key, seconds)  # type: ignore[arg-type]
            room = min(most - int(state[0] * state[1] / seconds) - state[2], amount - 1)
            if room > 0 and await store.acquire_sliding_window_entry(key, most, seconds, room):  # type: ignore[arg-type]
                granted = room
                state = await store.get_sliding_window(key, seconds)  # type: ignore[arg-type]
            return granted, wait(most, seconds, *state)
        except Exception:
            return granted, seconds / most  # the rest is refused, whatever happened since


class _Queue:
    """Who waits for an answer about one key, and who for the next question."""

    __slots__ = ("asking", "waiting")

    def __init__(self) -> None:
        self.asking: list[asyncio.Future[float]] = []
        self.waiting: list[asyncio.Future[float]] = []


class _Timely:
    """A connection whose steps together take no longer than the call may: redis-py limits each of them alone."""

    def connect(self) -> None:
        self.socket_connect_timeout = _left()
        super().connect()  # type: ignore[misc]

    def read_response(self, *args: Any, **options: Any) -> Any:
        return super().read_response(*args, **{**options, "timeout": _left()})  # type: ignore[misc]


def _parsed(url: str) -> dict[str, Any]:
    return cast(dict[str, Any], parse_url(url))  # type: ignore[no-untyped-call]


def _timely(kind: type) -> type:
    return type(kind.__name__, (_Timely, kind), {})


def _left() -> float:
    return max(_now.end - time.monotonic(), 0.001)


class _Now(threading.local):
    end = 0.0


_now = _Now()
