"""How is a server put under load by callers that count every request?

Plain HTTP/1.1 on asyncio, without a client's kindness: nothing is tried again. A request that was written and got no answer is
*lost*, unless the connection had been announced to close before it was written, which a `Caller` minds. Where no connection can be had,
nothing was sent: the caller is *turned away*. The load is open: requests begin when their time has come, whatever has become of those
before them.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any


class Lost(Exception):  # it is what happened
    """A request went out, and no whole answer came."""


class TurnedAway(Exception):
    """There was nobody to send it to."""


@dataclass(slots=True)
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes


class Caller:
    """One connection, with one request at a time."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer
        # The server has said that this connection ends, or it has ended.
        self.is_over = False

    @classmethod
    async def at(cls, port: int, tls: ssl.SSLContext | None = None) -> Caller:
        """Connected, and with TLS. A connection that breaks off in the handshake was not the server's word on any request."""
        try:
            return cls(*await asyncio.open_connection("127.0.0.1", port, ssl=tls, server_hostname="" if tls else None))
        except OSError as error:
            raise TurnedAway(repr(error)) from None

    async def ask(self, method: str, target: str, *headers: str) -> Answer:
        lines = [f"{method} {target} HTTP/1.1", "Host: orders", *headers, "", ""]
        self.writer.write("\r\n".join(lines).encode())
        head = b""
        try:
            head = await self.reader.readuntil(b"\r\n\r\n")
            answer = _answer(head)
            answer.body = await self.reader.readexactly(int(answer.headers["content-length"]))
        except (OSError, asyncio.IncompleteReadError) as error:
            self.is_over = True
            raise Lost(f"{target}: {error!r} after {head!r}") from None
        self.is_over = answer.headers.get("connection", "").lower() == "close"
        if self.is_over:
            self.writer.close()
        return answer

    @property
    def is_idle(self) -> bool:
        """Is it a connection to ask on? One whose end has come is not."""
        return not self.is_over and not self.reader.at_eof() and not self.writer.is_closing()

    def close(self) -> None:
        self.is_over = True
        self.writer.close()

    def reset(self) -> None:
        """Gone, as a process that was killed is gone."""
        self.is_over = True
        with contextlib.suppress(OSError, ValueError):
            import socket
            import struct

            plug = self.writer.get_extra_info("socket")
            plug.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()


def _answer(head: bytes) -> Answer:
    line, *fields = head.decode("latin-1").split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (each.partition(":") for each in fields if each)}
    return Answer(int(line.split()[1]), headers, b"")


class Crew:
    """Callers of one service, with kept-alive connections: the one that has been idle longest asks next."""

    def __init__(self, port: int, tls: ssl.SSLContext | None = None, *, is_kept: bool = True) -> None:
        self.port = port
        self.tls = tls
        self.is_kept = is_kept
        self.idle: deque[Caller] = deque()

    async def ask(self, method: str, target: str, *headers: str) -> Answer:
        caller = None
        while self.idle and caller is None:
            caller = self.idle.popleft()
            if not caller.is_idle:
                caller.close()
                caller = None
        if caller is None:
            caller = await Caller.at(self.port, self.tls)
        try:
            answer = await caller.ask(method, target, *headers, *(() if self.is_kept else ("Connection: close",)))
        except BaseException:
            caller.close()
            raise
        if not caller.is_over:
            self.idle.append(caller)
        return answer

    async def open(self, count: int) -> None:
        """So many connections, before anybody needs them."""
        self.idle.extend(await asyncio.gather(*(Caller.at(self.port, self.tls) for _ in range(count))))

    def close(self) -> None:
        for caller in self.idle:
            caller.close()
        self.idle.clear()


@dataclass
class Tally:
    """What became of the requests."""

    statuses: Counter[int] = field(default_factory=Counter)
    lost: list[str] = field(default_factory=list)
    turned_away: int = 0
    # Of answers, by their status: seconds.
    took: dict[int, list[float]] = field(default_factory=dict)
    in_flight: int = 0
    most_in_flight: int = 0

    async def count(self, asking: Awaitable[Answer]) -> None:
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        start = time.monotonic()
        try:
            answer = await asking
        except Lost as error:
            self.lost.append(str(error))
        except TurnedAway:
            self.turned_away += 1
        else:
            self.statuses[answer.status] += 1
            self.took.setdefault(answer.status, []).append(time.monotonic() - start)
        finally:
            self.in_flight -= 1

    def percentile(self, share: float, *statuses: int) -> float:
        """Seconds; of the answers with these statuses, or of all."""
        found = sorted(
            took for status, all_of_it in self.took.items() if not statuses or status in statuses for took in all_of_it
        )
        return percentile(found, share)


def percentile(ordered: list[float], share: float) -> float:
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else float("nan")


async def open_load(
    rate: float, seconds: float, ask: Callable[[int], Awaitable[Any]], is_over: asyncio.Event | None = None
) -> float:
    """Call `ask` with 0, 1, 2 … so many times a second, for so many seconds or until it is over; ends with the last of them.

    Answers by how many seconds a call began too late: a machine that is as busy as that can't judge a server by seconds.
    """
    start, number, late = time.monotonic(), 0, 0.0
    under_way: set[asyncio.Task[Any]] = set()
    while (now := time.monotonic() - start) < seconds and not (is_over is not None and is_over.is_set()):
        # What is late is caught up with, as far as this machine can.
        late = max(late, now - number / rate)
        while number < now * rate:
            task = asyncio.ensure_future(ask(number))
            under_way.add(task)
            task.add_done_callback(under_way.discard)
            number += 1
        await asyncio.sleep(max(0.0, number / rate - (time.monotonic() - start)))
    for task in list(under_way):
        await task
    return late
