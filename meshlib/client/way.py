"""THE OUTBOUND WAY: what happens to a call between the application and the wire?

    observe > route > retry > [ balance > admit > secure > send ]        [ ] = once per attempt

Read `OutboundWay.send` from the top: what is met first stands first, as in the Rust engine (`core/src/client.rs`), which takes the
decisions; this file only moves a call through them. There is one way for both kinds of caller. It is a coroutine, and what
waits is behind `Carrier`: under asyncio a carrier suspends, in a blocking thread its methods block and never suspend, so that
`run` drives the same code to its end in one step. The way knows no HTTP library; `client/http.py` is its face.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterable, Callable, Coroutine, Iterable
from typing import Any, Protocol, TypeVar

from .. import errors
from .._native import core
from ..call import HEADER_ATTEMPT, HEADER_DEADLINE, Call, current_deadline, current_layer

T = TypeVar("T")
Headers = list[tuple[bytes, bytes]]
Body = bytes | Iterable[bytes] | AsyncIterable[bytes] | None

# Bytes of an answer that are awaited before it counts as come, if it could be asked for again: as much as is replayed upward.
SHORT = 64 * 1024
# Taken from the deadline that the next hop is told: its answer needs time to travel back.
HOP_MARGIN = 0.005
# The reason of a `ConnectFailed` that our clock caused, not the endpoint's word.
CONNECT_TIMEOUT = "send.connect_timeout"

_OUTCOMES: tuple[tuple[type[errors.AttemptFailed], int], ...] = (
    (errors.ConnectFailed, core.OUTCOME_REFUSED),
    (errors.PeerIdentityError, core.OUTCOME_IDENTITY),
    (errors.TlsError, core.OUTCOME_IDENTITY),
    (errors.AttemptTimeout, core.OUTCOME_TIMEOUT),
    (errors.ProtocolError, core.OUTCOME_PROTOCOL),
    (errors.ConnectionLost, core.OUTCOME_RESET),
)
_LOST = {
    "send.unwritten": core.OUTCOME_UNWRITTEN,
    "send.stale": core.OUTCOME_STALE,
    # Our own doing, which says nothing of the endpoint.
    "send.client_closed": core.OUTCOME_CANCELLED,
}
# What the engine takes for "not a byte was sent", so that every method is safe to send again.
_UNSENT = (core.OUTCOME_REFUSED, core.OUTCOME_IDENTITY, core.OUTCOME_UNWRITTEN)
_DEADLINE = HEADER_DEADLINE.encode()
_ATTEMPT = HEADER_ATTEMPT.encode()


def outcome_of(error: errors.AttemptFailed) -> int:
    """What the engine is told of a failed attempt. A broken connection is judged by how far the exchange had come."""
    lost = _LOST.get(error.reason)
    if lost is not None:
        return lost
    outcome = next((outcome for kind, outcome in _OUTCOMES if isinstance(error, kind)), core.OUTCOME_RESET)
    # TLS can break long after the handshake, when the endpoint may have acted on the request already.
    return core.OUTCOME_RESET if outcome == core.OUTCOME_IDENTITY and error.is_written else outcome


class Attempt:
    """One attempt as a carrier gets it: where to, as whom, and how long at most."""

    __slots__ = (
        "address",
        "body",
        "connect_end",
        "end",
        "headers",
        "identity",
        "is_drawn",
        "is_fresh",
        "method",
        "target",
        "tls",
    )

    def __init__(
        self,
        address: str,
        identity: str,
        tls: core.TlsClient | None,
        method: str,
        target: str,
        headers: Headers,
        body: Body,
        connect_end: float,
        end: float,
        is_fresh: bool,
    ) -> None:
        self.address = address
        self.identity = identity
        self.tls = tls
        self.method = method
        self.target = target
        self.headers = headers
        self.body = body
        self.connect_end = connect_end
        self.end = end
        self.is_fresh = is_fresh
        # Set by the carrier before it takes the first piece of a streamed body: there is no second time.
        self.is_drawn = False


class Incoming(Protocol):
    """A body that is still on its way. `read` gives the next piece, b"" at the end; `close` gives up on the rest."""

    async def read(self) -> bytes: ...
    async def close(self) -> None: ...


# Status, minor version of HTTP/1, reason, headers, and the body or what is still on its way.
Reply = tuple[int, int, bytes, Headers, bytes | Incoming]


class Carrier(Protocol):
    """What moves the bytes: the caller's event loop, or the calling thread. Raises `errors.AttemptFailed`."""

    async def exchange(self, attempt: Attempt) -> Reply: ...
    async def sleep(self, seconds: float) -> None: ...


class Answer:
    """What came back: head, body (or what is still on its way), and the call with its record."""

    __slots__ = (
        "_has_last_word",
        "_is_over",
        "_native",
        "_stream",
        "_token",
        "_way",
        "body",
        "call",
        "headers",
        "minor",
        "reason",
        "status",
    )

    def __init__(
        self,
        way: OutboundWay,
        native: core.Call,
        token: int,
        reply: Reply,
        call: Call,
        has_last_word: bool,
    ) -> None:
        self._way = way
        # A timeout of this attempt is the deadline of the call.
        self._has_last_word = has_last_word
        self._native = native
        self._token = token
        self.call = call
        self.status, self.minor, self.reason, self.headers, body = reply
        self._is_over = isinstance(body, bytes)
        if isinstance(body, bytes):
            self.body: bytes | None = body
            self._stream: Incoming | None = None
            native.finish(token, core.OUTCOME_RESPONSE, way.clock())
        else:
            self.body = None
            self._stream = body

    async def read(self) -> bytes:
        """The next piece of the body, b"" at its end."""
        if self._stream is None or self._is_over:
            return b""
        try:
            piece = await self._stream.read()
        except errors.AttemptFailed as error:
            self._end(outcome_of(error))
            error.call = self.call
            if isinstance(error, errors.AttemptTimeout) and (self._has_last_word or self._way.clock() >= self._native.deadline):
                raise _too_late(self._native, self.call) from error
            raise
        if not piece:
            self._end(core.OUTCOME_RESPONSE)
        return piece

    async def close(self) -> None:
        """Give up on the rest of the body; harmless after its end."""
        if self._stream is not None and not self._is_over:
            self._end(core.OUTCOME_CANCELLED)
            await self._stream.close()

    def _end(self, outcome: int) -> None:
        if not self._is_over:
            self._is_over = True
            self._native.finish(self._token, outcome, self._way.clock())


class OutboundWay:
    """The way out of one process: engine, identity and observer, in the order in which a call meets them."""

    __slots__ = ("clock", "engine", "identity", "observer", "wake")

    def __init__(self, engine: core.Engine, identity: Any, observer: Any, clock: Callable[[], float] = time.monotonic) -> None:
        self.engine = engine
        self.identity = identity
        self.observer = observer
        self.clock = clock
        # Set in a forked child: the first call starts what the mesh needs beside it, the rest pay one comparison.
        self.wake: Callable[[], object] | None = None

    async def send(
        self,
        carrier: Carrier,
        authority: str,
        method: str,
        target: str,
        headers: Headers,
        body: Body = None,
        *,
        timeout: float | None = None,
        connect_timeout: float | None = None,
        idempotent: bool | None = None,
    ) -> Answer:
        """Send one call and return its answer.

        `timeout` and `connect_timeout` are seconds for one attempt, on top of the call's deadline. Raises `errors.Refused`,
        `errors.DeadlineExceeded` or `errors.AttemptFailed`, each with the call.
        """
        clock = self.clock
        now = clock()
        if self.wake is not None:
            self.wake()
        # observe: outside everything, so that refusals are counted and traced too.
        observer = self.observer
        # route: which service, which backend, which policy; the permit of the service is taken here, once per call.
        is_whole = body is None or isinstance(body, bytes)
        native = self.engine.begin(
            authority,
            method,
            target.partition("?")[0],
            headers,
            now,
            current_deadline.get(),
            idempotent,
            is_whole,
            current_layer.get(),
        )
        call = Call(native, method, target)
        end = native.deadline
        headers = _without_ours(headers)
        is_fresh = False
        trace: Headers | None = None
        try:
            while True:
                # retry: the engine says when; the wait is never longer than the deadline.
                step = native.next(now)
                if step[0] == core.WAIT:
                    await carrier.sleep(min(step[1], max(end - now, 0.0)))
                    now = clock()
                    continue
                # balance > admit: the engine has chosen an endpoint and holds its permit.
                _, token, address, identity = step
                # secure: the newest identity of ours, and whom we expect. An empty identity is plain text, by configuration.
                tls = self.identity.client_tls if identity and self.identity is not None else None
                if identity and tls is None:
                    raise errors.IdentityError(
                        f"the call to {native.service!r} needs mutual TLS, but this process has no identity.",
                        hint="Its certificate was never loaded: see the log, and `secure.identity` in mesh.yaml.",
                        call=call,
                    )
                sent = [*headers, (_DEADLINE, b"%d" % max(1, int((end - now - HOP_MARGIN) * 1000)))]
                if native.attempt:
                    sent.append((_ATTEMPT, b"%d" % native.attempt))
                span = None
                if observer is not None:
                    span = observer.client_span(method, authority, native.attempt, target=target, endpoint=address)
                    if span is not None:
                        sent += observer.client_headers()
                    else:
                        # Nobody records: all attempts of a call carry the same trace, which is made once.
                        if trace is None:
                            trace = [] if has_trace(headers) else observer.client_headers()
                        sent += trace
                attempt_end = end if timeout is None else min(end, now + timeout)
                connect_end = min(attempt_end, now + (native.connect_timeout if connect_timeout is None else connect_timeout))
                attempt = Attempt(address, identity, tls, method, target, sent, body, connect_end, attempt_end, is_fresh)
                # send: the carrier moves the bytes.
                try:
                    reply = await carrier.exchange(attempt)
                    if not isinstance(reply[4], bytes) and native.is_idempotent and native.has_attempts_left:
                        reply = await _whole(reply)
                except errors.AttemptFailed as error:
                    now = clock()
                    if span is not None:
                        span.end(0, error)
                    error.call = call
                    outcome = outcome_of(error)
                    is_late = isinstance(error, errors.AttemptTimeout) and (attempt_end >= end or now >= end)
                    if error.reason == CONNECT_TIMEOUT and connect_end >= end:
                        # The caller had no time for a connection, which says nothing of the endpoint.
                        is_late, outcome = True, core.OUTCOME_CANCELLED
                    elif attempt.is_drawn and outcome in _UNSENT:
                        outcome = core.OUTCOME_RESET
                    # A body that was begun can't be sent again, whatever the engine says.
                    if native.head(token, outcome, 0, now) == core.DELIVER or attempt.is_drawn:
                        if is_late:
                            raise _too_late(native, call) from error
                        raise
                    is_fresh = outcome in (core.OUTCOME_STALE, core.OUTCOME_UNWRITTEN)
                    continue
                except BaseException as error:
                    if span is not None:
                        span.end(0, error)
                    raise
                now = clock()
                status = reply[0]
                if span is not None:
                    span.end(status, None)
                after = _retry_after(reply[3]) if status in (429, 503) else -1.0
                if native.head(token, core.OUTCOME_RESPONSE, status, now, after) == core.DELIVER:
                    return Answer(self, native, token, reply, call, attempt_end >= end)
                if not isinstance(reply[4], bytes):
                    await reply[4].close()
        except errors.MeshError as error:
            if error.call is None:
                error.call = call
            native.abandon(clock())
            raise
        except BaseException:
            # Cancelled, or a mistake in a body's iterator: every permit goes back before anybody else runs.
            native.abandon(clock())
            raise


async def _whole(reply: Reply) -> Reply:
    """Wait for a short body that is announced: an endpoint that dies between head and body can then still be replaced."""
    size = next((value for name, value in reply[3] if name == b"content-length"), b"")
    body = reply[4]
    if isinstance(body, bytes) or not size.isdigit() or len(size) > 6 or int(size) > SHORT:
        return reply
    pieces = []
    try:
        while piece := await body.read():
            pieces.append(piece)
    except BaseException:
        # Nobody else knows of this body yet.
        await body.close()
        raise
    return (*reply[:4], b"".join(pieces))


def has_trace(headers: Headers) -> bool:
    """The application forwards a trace by hand, and is not contradicted."""
    for name, _ in headers:  # noqa: SIM110  a generator costs more than the whole loop
        if len(name) == 11 and name.lower() == b"traceparent":
            return True
    return False


def _without_ours(headers: Headers) -> Headers:
    """The caller's headers; what it forwards of an incoming call's deadline and attempt would contradict what we say ourselves."""
    for name, _ in headers:
        if len(name) in (14, 18) and name.lower() in (_ATTEMPT, _DEADLINE):
            return [header for header in headers if header[0].lower() not in (_ATTEMPT, _DEADLINE)]
    return headers


def _too_late(native: core.Call, call: Call) -> errors.DeadlineExceeded:
    return errors.DeadlineExceeded(
        f"the call to {native.service!r} did not end within its deadline.",
        hint="Raise `deadline` of the route or of the caller, or look in explain() for what took the time.",
        call=call,
    )


def _retry_after(headers: Headers) -> float:
    """Seconds of a Retry-After header; its date form is not worth a clock's trust between machines."""
    for name, value in headers:
        if name == b"retry-after" and value.isdigit() and len(value) < 7:
            return float(value)
    return -1.0


def run(way: Coroutine[Any, Any, T]) -> T:
    """Drive a way whose carrier never suspends: the calling thread does all the waiting."""
    try:
        way.send(None)
    except StopIteration as end:
        result: T = end.value
        return result
    way.close()
    raise RuntimeError("a blocking carrier suspended; it must block instead")
