"""How does the calling thread move the bytes?

By itself: it connects, and for each exchange crosses into Rust once, where it writes, waits and reads with the interpreter released
(`HttpConnection.converse`), while other threads run Python. One pool per process, behind a lock that is held for a few instructions
and never while a byte moves; a connection is used by one thread at a time. It decides nothing: no retry, no choice of endpoint.
"""

from __future__ import annotations

import select
import socket
import threading
import time
from collections import deque
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from .. import errors
from .._native import core
from .connection import NEVER, key_of, limits_of, split_address
from .faults import IDLE_TIMEOUT, STALE, WRITE_TIMEOUT, late, lost, too_slow, unreachable
from .pool import Key, Ledger, keep_seconds
from .terms import ORDINARY
from .upload import LARGE, PIECE, demand_end, idle_of, is_on_demand

if TYPE_CHECKING:
    from .way import Attempt, Headers, Reply

# The longest that one crossing waits; a peer that never stops talking is still found to be late.
LONGEST = 3600.0
# The least that one crossing can be given, if nothing is to be awaited.
MOMENT = 0.001
# Bytes read at once while the peer may only ask for a body.
WORD = 64 * 1024


class Connection:
    """One blocking connection: connect, exchange, exchange, …"""

    __slots__ = (
        "_attempt",
        "_carrier",
        "_events",
        "_is_broken",
        "_phase",
        "_socket",
        "_used",
        "born",
        "end",
        "idle",
        "idle_since",
        "keep",
        "key",
        "limit",
        "not_after",
        "tls",
        "until",
        "wire",
    )

    def __init__(self, carrier: ThreadCarrier, attempt: Attempt, key: Key) -> None:
        self.key = key
        self.tls = attempt.tls
        self.wire = core.HttpConnection(attempt.tls, attempt.identity, attempt.address, key[2])
        self._carrier = carrier
        self._events: deque[tuple[Any, ...]] = deque()
        self._attempt: Attempt | None = None
        self._used = False
        # The peer spoke before it had the whole request, or writing failed: what has come is read, and that's all.
        self._is_broken = False
        self._phase: str | None = None
        self.born = self.idle_since = time.monotonic()
        self.keep = 0.0
        # The ends of the peer's certificate (Unix seconds) and of its use (the pool's judgement).
        self.not_after = NEVER
        self.until = 0.0
        # As in `connection.py`: when time is up, until when it can be moved on, and by how much.
        self.end = self.limit = attempt.connect_end
        self.idle = 0.0
        self._socket = self._open(attempt)
        try:
            hello = self.wire.open()
            while not self.wire.is_open:
                self._converse(hello)
                hello = b""
            self._events.clear()
            self.not_after = self.wire.peer_not_after or NEVER
        except BaseException:
            # An error keeps its frames, and so this object: the socket isn't left to the garbage collector.
            self._socket.close()
            raise

    def _open(self, attempt: Attempt) -> socket.socket:
        try:
            return self.dial(attempt)
        except TimeoutError as error:
            raise too_slow(attempt.address) from error
        except OSError as error:
            raise unreachable(attempt.address, error) from error

    def dial(self, attempt: Attempt) -> socket.socket:
        host, port = split_address(attempt.address)
        return _dial(host, port, attempt.connect_end)

    # --- the exchange, in its order

    def exchange(self, attempt: Attempt) -> Reply:
        self._attempt = attempt
        body = attempt.body
        try:
            if attempt.terms is ORDINARY and (body is None or (type(body) is bytes and len(body) < LARGE)):
                self.end = attempt.head_end
                self._converse(self.wire.send(attempt.method, attempt.target, attempt.headers, body, False))
            else:
                self._deliver(attempt, body)
            while True:
                if not self._events:
                    self._converse(b"")
                    continue
                event = self._events.popleft()
                kind = event[0]
                if kind == core.EVENT_RESPONSE:
                    self._first(event[4])
                    self._over(event[6])
                    return event[1:6]
                if kind == core.EVENT_HEAD:
                    self._first(event[4])
                    self._stream(event[1], event[4])
                    return (*event[1:5], _Upgraded(self) if event[1] == 101 else _Body(self))
        except BaseException as error:
            if isinstance(error, errors.ConnectionLost) and error.reason == STALE:
                self._carrier.saw(self)
            self.close()
            raise

    def _deliver(self, attempt: Attempt, body: Any) -> None:
        """Send a request that has terms of its own, or a body that is more than one write."""
        terms, now = attempt.terms, time.monotonic()
        # What the route gives for the head counts from the end of the upload.
        patience = attempt.head_end - now if terms.read is None else terms.read
        self.limit = attempt.end if terms.is_explicit else attempt.hard_end
        if body is None or (isinstance(body, bytes) and len(body) < LARGE):
            self.end = min(attempt.head_end, now + patience)
            self._converse(self.wire.send(attempt.method, attempt.target, attempt.headers, body, False))
            return
        self._phase = WRITE_TIMEOUT
        self.idle = idle_of(attempt)
        self._upload(attempt, body)
        self._phase = None
        self.idle = 0.0
        self.end = min(self.limit, time.monotonic() + patience)

    def _upload(self, attempt: Attempt, body: Any) -> None:
        """Until it ends, or the peer has answered or gone: the rest would be for nobody."""
        if not self._push(self.wire.send(attempt.method, attempt.target, attempt.headers, None, True)):
            return
        if is_on_demand(attempt) and not self._is_asked(attempt):
            return
        if isinstance(body, bytes):
            whole = memoryview(body)
            for at in range(0, len(body), PIECE):
                if not self._push(self.wire.send_body(whole[at : at + PIECE], at + PIECE >= len(body))):
                    return
            return
        for piece in body:
            if piece and not self._push(self.wire.send_body(piece, False)):
                return
        self._push(self.wire.send_body(b"", True))

    def _is_asked(self, attempt: Attempt) -> bool:
        """Wait until the peer asks for the body; False if it answers without it."""
        self._phase = None
        self.end = demand_end(attempt)
        while not self._events and not self.wire.has_received:
            left = self.end - time.monotonic()
            if left <= 0:
                raise self._late()
            if not self._poll(select.POLLIN, left):
                continue
            # `converse` would wait for more: this word is no event.
            data = b""
            with suppress(OSError):
                data = self._socket.recv(WORD)
            if data:
                self._take(self.wire.receive(data, len(data))[1])
            else:
                self._converse(b"")  # it is over, and this says why
        self._phase = WRITE_TIMEOUT
        # Half an answer is taken for the word, too: then some of the body goes out in vain.
        self._is_broken |= bool(self._events)
        return not self._events

    def _push(self, data: bytes) -> bool:
        """Write a piece of a request; False if an answer came first."""
        self.end = min(self.limit, time.monotonic() + self.idle) if self.idle else self.limit
        while True:
            code, events = self._cross(data, False)
            data = b""
            self._take(events)
            if code in (core.CONVERSE_EARLY, core.CONVERSE_CLOSED) and not self._events:
                # It takes no more: it may have said why.
                self._converse(b"")
            # HTTP/2 goes both ways at once: there only the end of the answer ends an upload.
            is_http2 = self.wire.protocol == "h2"
            if self._events and (not is_http2 or self._events[-1][0] in (core.EVENT_RESPONSE, core.EVENT_END)):
                self._is_broken |= not is_http2
                return False
            if code == core.CONVERSE_DONE:
                if not self.wire.is_blocked:
                    return True
                # HTTP/2: the peer's window is used up, and only what it says opens it again.
                self._converse(b"")

    def read(self) -> bytes:
        try:
            while True:
                if not self._events:
                    self.end = min(self.limit, time.monotonic() + self.idle) if self.idle else self.limit
                    self._converse(b"")
                    continue
                event = self._events.popleft()
                if event[0] == core.EVENT_BODY:
                    piece: bytes = event[1]
                    return piece
                if event[0] == core.EVENT_END:
                    self._over(event[1])
                    return b""
        except BaseException:
            self.close()
            raise

    # --- after a change of protocols, for one thread that reads and one that writes (`_Upgraded`)

    def is_heard(self, seconds: float) -> bool:
        """Whether something has come, or comes within so many seconds. Touches nothing that a writer needs."""
        return bool(self._events) or bool(self._poll(select.POLLIN, seconds))

    def is_ready(self, seconds: float) -> bool:
        """Whether the socket takes more; raises if nobody is there to take it."""
        found = self._poll(select.POLLOUT, seconds)
        if found & (select.POLLERR | select.POLLHUP | select.POLLNVAL):
            raise lost(self.wire, True, True, self.key[0], None)
        return found != 0

    def _poll(self, interest: int, seconds: float) -> int:
        poll = select.poll()
        poll.register(self._socket.fileno(), interest)
        found = poll.poll(min(seconds, LONGEST) * 1000)
        return found[0][1] if found else 0

    def hear(self) -> bool:
        """Take what is in the socket; False if it was nothing for the application."""
        if not self._events:
            # Of half a record the rest is awaited by `is_heard`, where it hinders nobody.
            self.end = time.monotonic() + MOMENT
            code, events = self._cross(b"", True, may_be_late=True)
            self._take(self.wire.receive_eof() if code == core.CONVERSE_CLOSED else events)
        while self._events and self._events[0][0] not in (core.EVENT_BODY, core.EVENT_END):
            self._events.popleft()
        return bool(self._events)

    def heard(self) -> bytes:
        """The next piece of what was taken, b"" at the end."""
        event = self._events.popleft()
        piece: bytes = event[1] if event[0] == core.EVENT_BODY else b""
        return piece

    def say(self, data: bytes) -> bool:
        """Write what the socket takes now; False if something is left, which goes out with the next call."""
        self.end = time.monotonic() + MOMENT
        code, events = self._cross(data, False, may_be_late=True)
        self._take(events)
        return code == core.CONVERSE_DONE

    def is_closed(self) -> bool:
        return self._socket.fileno() < 0

    def hang_up(self) -> None:
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def info(self, name: str) -> Any:
        with suppress(OSError):  # it is closed
            if name == "peername":
                return self._socket.getpeername()
            if name == "sockname":
                return self._socket.getsockname()
        return self._socket if name == "socket" else None

    def _converse(self, data: bytes) -> None:
        """Write, wait and read once; what has come is in the events afterwards."""
        code, events = self._cross(data, True)
        if code == core.CONVERSE_CLOSED:
            # Before the first byte of an answer it is no malformed answer: how far had it come?
            events = self.wire.receive_eof() if self.wire.has_received and self.wire.is_open else []
            if not events:
                raise lost(self.wire, self.wire.is_open or self._used, self._used, self.key[0], None)
        elif code == core.CONVERSE_EARLY:
            self._is_broken = True
        self._take(events)

    def _take(self, events: list[tuple[Any, ...]]) -> None:
        self._events.extend(event for event in events if event[0] not in (core.EVENT_OPEN, core.EVENT_WRITABLE))

    def _cross(self, data: bytes, is_reading: bool, *, may_be_late: bool = False) -> tuple[int, list[tuple[Any, ...]]]:
        """Cross into Rust. Raises what ended the connection, and the end of the time."""
        was_open = self.wire.is_open
        try:
            while True:
                left = self.end - time.monotonic()
                if left <= 0 and not may_be_late:
                    raise self._late()
                code, events = self.wire.converse(self._socket.fileno(), data, min(max(left, 0.0), LONGEST), is_reading)
                if code == core.CONVERSE_INTERRUPTED or (code == core.CONVERSE_LATE and left > LONGEST):
                    data = b""
                    continue
                if code == core.CONVERSE_LATE and not may_be_late:
                    raise self._late()
                return code, events
        except OSError as error:
            if isinstance(error, errors.MeshError):
                raise
            raise lost(self.wire, was_open, self._used, self.key[0], error) from error
        except errors.ConnectionLost:
            if self.wire.is_open:
                raise  # a stream that was reset, not the connection
            # TLS can say farewell before the socket ends, and means the same.
            raise lost(self.wire, was_open, self._used, self.key[0], None) from None

    def _late(self) -> errors.AttemptFailed:
        return late(self.key[0], self._phase, self.wire.has_written) if self.wire.is_open else too_slow(self.key[0])

    def _stream(self, status: int, headers: Headers) -> None:
        """The head is here and the body is not: what limits the rest?"""
        if self._attempt is not None:
            self.limit, self.idle = limits_of(self._attempt, status, headers)
            self._phase = IDLE_TIMEOUT if self.idle else None

    def _first(self, headers: Headers) -> None:
        if not self._used:
            self._used = True
            self.keep = keep_seconds(headers)

    def _over(self, is_reusable: bool) -> None:
        self._attempt = self._phase = None
        self.idle = 0.0
        if is_reusable and not self._is_broken:
            self._carrier.give(self)
        else:
            self.close()

    # --- what the pool asks

    def is_usable(self) -> bool:
        """Whole, and the peer has said nothing since: a closed or talking idle connection is not used again."""
        return self.wire.is_idle and self._socket.fileno() >= 0 and self.wire.is_quiet(self._socket.fileno())

    def close(self) -> None:
        if self._socket.fileno() >= 0:
            farewell = self.wire.close()
            with suppress(OSError):  # the peer is gone already; there is nobody left to tell
                if farewell:
                    self._socket.send(farewell)
            self._socket.close()


def _dial(host: str, port: int | None, end: float) -> socket.socket:
    """A socket that doesn't block: of the first address of a name that answers, all of them before `end`.

    Looking up the name has no end but the resolver's own.
    """
    if port is None:
        places: list[Any] = [(socket.AF_UNIX, socket.SOCK_STREAM, 0, "", host)]
    else:
        places = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    failure: OSError | None = None
    for family, kind, protocol, _, place in places:
        left = end - time.monotonic()
        if left <= 0:
            raise TimeoutError
        plug = socket.socket(family, kind, protocol)
        try:
            plug.settimeout(left)
            plug.connect(place)
            if port is not None:
                plug.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            plug.setblocking(False)
        except OSError as error:
            failure = error
            plug.close()
        except BaseException:
            plug.close()
            raise
        else:
            return plug
    raise failure or OSError(f"{host} has no addresses")


class _Body:
    """The body of a connection's exchange, as `way.Incoming`."""

    __slots__ = ("_connection",)

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    async def read(self) -> bytes:
        return self._connection.read()

    async def write(self, data: bytes) -> None:
        raise errors.ProtocolError("there was no change of protocols.", hint="Only an answer 101 hands the connection over.")

    async def close(self) -> None:
        self._connection.close()

    def info(self, name: str) -> Any:
        return self._connection.info(name)


class _Upgraded(_Body):
    """The connection after a change of protocols: one thread may read while another writes, and a third closes.

    Whoever waits holds no lock that another needs, and doesn't read for another: a reader would not learn of it.
    """

    __slots__ = ("_lock", "_reading", "_writing")

    def __init__(self, connection: Connection) -> None:
        super().__init__(connection)
        # Around every use of the connection's state; and for as long as one reads or writes, so that the socket stays its own.
        self._lock = threading.Lock()
        self._reading = threading.Lock()
        self._writing = threading.Lock()

    async def is_ready(self, seconds: float) -> bool:
        """Whether something for the application comes within so many seconds."""
        with self._reading:
            # After the end there is nothing to wait for.
            return self._connection.is_closed() or self._hear(time.monotonic() + seconds)

    async def read(self) -> bytes:
        connection = self._connection
        try:
            with self._reading:
                end = min(connection.limit, time.monotonic() + (connection.idle or NEVER))
                if not self._hear(end):
                    raise late(connection.key[0], IDLE_TIMEOUT, True)
                piece = connection.heard()
        except BaseException:
            await self.close()
            raise
        if not piece:
            await self.close()
        return piece

    def _hear(self, end: float) -> bool:
        while True:
            left = end - time.monotonic()
            if self._connection.is_heard(max(left, 0.0)):
                with self._lock:
                    if self._connection.hear():
                        return True
            elif left <= LONGEST:
                return False

    async def write(self, data: bytes) -> None:
        connection = self._connection
        with self._writing:
            with self._lock:
                is_said = connection.say(connection.wire.send_body(data, False))
            while not is_said:
                end = time.monotonic() + (connection.idle or LONGEST)
                if not connection.is_ready(end - time.monotonic()):
                    raise late(connection.key[0], WRITE_TIMEOUT, True)
                with self._lock:
                    is_said = connection.say(b"")

    async def close(self) -> None:
        # Whoever waits for the other side is woken first.
        self._connection.hang_up()
        with self._reading, self._writing, self._lock:
            self._connection.close()


class ThreadCarrier:
    """What moves bytes on the calling thread. One per process."""

    can_overlap = False

    def __init__(self, ledger: Ledger | None = None, protocols: str = "http/1.1") -> None:
        self.protocols = protocols
        self._ledger = ledger or Ledger()
        self.pool = self._ledger.open()
        self._lock = threading.Lock()
        # As in `loop.py`: what carries the attempts of delegated services.
        self.delegate: Any = None

    async def sleep(self, seconds: float) -> None:
        time.sleep(seconds)

    async def exchange(self, attempt: Attempt) -> Reply:
        key = key_of(attempt, self.protocols)
        if not attempt.is_fresh:
            with self._lock:
                found = self.pool.take(key, attempt.tls, attempt.now, time.time())
            if found is not None:
                return found.exchange(attempt)  # type: ignore[no-any-return]
        with self._lock:
            self.pool.opened += 1
        connection = self.connect(attempt, key)
        if attempt.tls is not None:
            attempt.resumed = connection.wire.tls_resumed
        return connection.exchange(attempt)

    def connect(self, attempt: Attempt, key: Key) -> Connection:
        return Connection(self, attempt, key)

    def give(self, connection: Connection) -> None:
        now = time.monotonic()
        with self._lock:
            self.pool.give(connection, now, True)
            self.pool.sweep(now)

    def sweep(self) -> None:
        """Close what has waited too long; the keeper calls it, since a process that makes no calls has nobody else."""
        with self._lock:
            self.pool.sweep(time.monotonic())
        if self.delegate is not None:
            self.delegate.sweep()

    def saw(self, connection: Connection) -> None:
        """A kept-alive connection was closed under us: how long does this peer keep one?"""
        now = time.monotonic()
        with self._lock:
            self.pool.learn(connection.key, now - connection.idle_since, now)

    def close(self) -> None:
        with self._lock:
            self.pool.clear()
        if self.delegate is not None:
            self.delegate.close()

    def forget(self) -> None:
        """In a forked child: the sockets are closed without a word on the wire, since the parent goes on using them."""
        self.delegate = None
        self.pool = self._ledger.open()
        self._lock = threading.Lock()
