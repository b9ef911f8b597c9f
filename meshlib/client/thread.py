"""How does the calling thread move the bytes of an exchange?

Blocking sockets around the same Rust state machine as under asyncio. The methods are coroutines that never suspend, so that
`way.run` drives the one way to its end in one step. One pool per process; a connection belongs to one thread while it is in use.
It decides nothing.
"""

from __future__ import annotations

import socket
import threading
import time
from collections import deque
from contextlib import suppress
from typing import Any

from .. import errors
from .._native import core
from .loop import lost, split_address, too_slow, unreachable
from .pool import Pool, keep_seconds
from .way import Attempt, Headers, Reply


class Connection:
    """One blocking connection: connect, exchange, exchange, …"""

    __slots__ = (
        "_buffer",
        "_carrier",
        "_events",
        "_is_broken",
        "_is_open",
        "_socket",
        "_used",
        "_wire",
        "born",
        "end",
        "idle_since",
        "keep",
        "key",
        "not_after",
        "tls",
    )

    def __init__(self, carrier: ThreadCarrier, attempt: Attempt) -> None:
        self.key = (attempt.address, attempt.identity)
        self.tls = attempt.tls
        self._wire = core.HttpConnection(attempt.tls, attempt.identity, attempt.address)
        self._carrier = carrier
        self._buffer = bytearray(64 * 1024)
        self._events: deque[tuple[Any, ...]] = deque()
        self._used = False
        self._is_open = False
        # Writing failed; what had come before is read, and that's all.
        self._is_broken = False
        self.born = self.idle_since = time.monotonic()
        self.keep = 0.0
        self.not_after = float("inf")
        self.end = attempt.connect_end
        self._socket = self._open(attempt)
        try:
            hello = self._wire.open()
            if hello:
                self._write(hello)
                while not self._wire.is_open:
                    self._fill()
                self._events.clear()
                self.not_after = self._wire.peer_not_after or float("inf")
        except BaseException:
            # An error keeps its frames, and so this object: the socket isn't left to the garbage collector.
            self._socket.close()
            raise
        self._is_open = True

    def _open(self, attempt: Attempt) -> socket.socket:
        host, port = split_address(attempt.address)
        left = attempt.connect_end - time.monotonic()
        if left <= 0:
            raise too_slow(attempt.address)
        try:
            if port is not None:
                plug = socket.create_connection((host, port), timeout=left)
            else:
                plug = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                if port is not None:
                    plug.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                else:
                    plug.settimeout(left)
                    plug.connect(host)
            except BaseException:
                plug.close()
                raise
        except TimeoutError as error:
            raise too_slow(attempt.address) from error
        except OSError as error:
            raise unreachable(attempt.address, error) from error
        return plug

    # --- the exchange, in its order

    def exchange(self, attempt: Attempt) -> Reply:
        self.end = attempt.end
        try:
            try:
                self._send(attempt)
            except errors.ConnectionLost as error:
                # A peer that has had enough answers and closes; its answer may have come already.
                self._is_broken = True
                try:
                    self._events.appendleft(self._next())
                except errors.AttemptFailed:
                    raise error from error.__cause__
            while True:
                event = self._next()
                kind = event[0]
                if kind == core.EVENT_RESPONSE:
                    self._first(event[4])
                    self._over(event[6])
                    return event[1:6]
                if kind == core.EVENT_HEAD:
                    self._first(event[4])
                    return (*event[1:5], _Body(self))
        except BaseException:
            self.close()
            raise

    def _send(self, attempt: Attempt) -> None:
        wire, body = self._wire, attempt.body
        if body is None or isinstance(body, bytes):
            self._write(wire.send(attempt.method, attempt.target, attempt.headers, body, False))
            return
        self._write(wire.send(attempt.method, attempt.target, attempt.headers, None, True))
        attempt.is_drawn = True
        for piece in body:  # type: ignore[union-attr]
            if piece:
                self._write(wire.send_body(piece, False))
        self._write(wire.send_body(b"", True))

    def read(self) -> bytes:
        try:
            while True:
                event = self._next()
                if event[0] == core.EVENT_BODY:
                    piece: bytes = event[1]
                    return piece
                if event[0] == core.EVENT_END:
                    self._over(event[1])
                    return b""
        except BaseException:
            self.close()
            raise

    def _next(self) -> tuple[Any, ...]:
        while not self._events:
            self._fill()
        return self._events.popleft()

    def _fill(self) -> None:
        """Read once and let the wire take it in."""
        left = self._left()
        try:
            self._socket.settimeout(left)
            size = self._socket.recv_into(self._buffer)
        except TimeoutError as error:
            raise self._late() from error
        except OSError as error:
            raise lost(self._wire, self._is_open, self._used, self.key[0], error) from error
        if not size:
            # Before the first byte of an answer it is no malformed answer: how far had it come?
            events = self._wire.receive_eof() if self._wire.has_received else []
            if not events:
                raise lost(self._wire, self._is_open, self._used, self.key[0], None)
            self._events.extend(events)
            return
        try:
            out, events = self._wire.receive(self._buffer, size)
        except errors.AttemptFailed as error:
            alert = self._wire.pending()
            if alert:
                with suppress(errors.AttemptFailed):
                    self._write(alert)
            if isinstance(error, errors.ConnectionLost):
                # TLS can say farewell before the socket ends, and means the same.
                raise lost(self._wire, self._is_open, self._used, self.key[0], None) from None
            raise
        self._events.extend(event for event in events if event[0] != core.EVENT_OPEN)
        if out:
            self._write(out)

    def _write(self, data: bytes) -> None:
        if not data:
            return
        left = self._left()
        try:
            self._socket.settimeout(left)
            self._socket.sendall(data)
        except TimeoutError as error:
            raise self._late() from error
        except OSError as error:
            raise lost(self._wire, self._is_open, self._used, self.key[0], error) from error

    def _left(self) -> float:
        """Seconds until the end. A peer that never stops talking would otherwise never be late."""
        left = self.end - time.monotonic()
        if left <= 0:
            raise self._late()
        return left

    def _late(self) -> errors.AttemptFailed:
        if not self._is_open:
            return too_slow(self.key[0])
        return errors.AttemptTimeout(
            f"{self.key[0]} did not answer in time.",
            hint="See the attempt's timeout and the deadline.",
            is_written=self._wire.has_written,
        )

    def _first(self, headers: Headers) -> None:
        if not self._used:
            self._used = True
            self.keep = keep_seconds(headers)

    def _over(self, is_reusable: bool) -> None:
        if is_reusable and not self._is_broken:
            self._carrier.give(self)
        else:
            self.close()

    # --- what the pool asks

    def is_usable(self) -> bool:
        """Whole, and the peer has said nothing since: a closed or talking idle connection is not used again."""
        if not self._wire.is_idle or self._socket.fileno() < 0:
            return False
        try:
            self._socket.settimeout(0)
            self._socket.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return True
        except OSError:
            return False
        return False

    def close(self) -> None:
        if self._socket.fileno() >= 0:
            farewell = self._wire.close()
            try:
                if farewell:
                    self._socket.settimeout(0)
                    self._socket.send(farewell)
            except OSError:
                pass  # the peer is gone already; there is nobody left to tell
            self._socket.close()


class _Body:
    """The body of a connection's exchange, as `way.Incoming`."""

    __slots__ = ("_connection",)

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    async def read(self) -> bytes:
        return self._connection.read()

    async def close(self) -> None:
        self._connection.close()


class ThreadCarrier:
    """What moves bytes on the calling thread. One per process."""

    def __init__(self) -> None:
        self.pool = Pool()
        self._lock = threading.Lock()

    async def sleep(self, seconds: float) -> None:
        time.sleep(seconds)

    async def exchange(self, attempt: Attempt) -> Reply:
        if not attempt.is_fresh:
            with self._lock:
                found = self.pool.take((attempt.address, attempt.identity), attempt.tls, time.monotonic(), time.time())
            if found is not None:
                return found.exchange(attempt)  # type: ignore[no-any-return]
        self.pool.opened += 1
        return Connection(self, attempt).exchange(attempt)

    def give(self, connection: Connection) -> None:
        now = time.monotonic()
        with self._lock:
            self.pool.give(connection, now)
            self.pool.sweep(now)

    def close(self) -> None:
        with self._lock:
            self.pool.clear()

    def forget(self) -> None:
        """In a forked child: the sockets are closed without a word on the wire, since the parent goes on using them."""
        self.pool = Pool()
        self._lock = threading.Lock()
