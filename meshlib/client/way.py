"""THE OUTBOUND WAY: what happens to a call between the application and the wire?

    observe > route > retry > [ balance > admit > secure > send ]        [ ] = once per attempt

Read `OutboundWay.send` from the top: what is met first stands first, as in the Rust engine (`core/src/client.rs`), which takes the
decisions; this file only moves a call through them. There is one way for both kinds of caller. It is a coroutine, and what
waits is behind `Carrier`: under asyncio a carrier suspends, in a blocking thread its methods block and never suspend, so that
`run` drives the same code to its end in one step. The way knows no HTTP library; `client/http.py` is its face.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterable, Awaitable, Callable, Coroutine, Iterable
from typing import TYPE_CHECKING, Any, Protocol, TypeVar
from weakref import WeakSet

from .. import errors
from .._native import core
from ..call import HEADER_NO_RETRY, HEADER_PRIORITY, Call, current_deadline, current_layer, current_visit, gone_away, peer
from .faults import CONNECT_TIMEOUT, IDLE_TIMEOUT, UNSENT, WRITE_TIMEOUT, outcome_of
from .pool import Ledger
from .terms import FOREVER, LARGE, ORDINARY, Terms

if TYPE_CHECKING:
    from ..admit.limiter import RateGuard
    from ..call import Errand
    from .delegated import Delegation
    from .egress import EgressRules
    from .patience import Patience
    from .race import Race
    from .replay import AsyncReplayed, Replayed

T = TypeVar("T")
Headers = list[tuple[bytes, bytes]]
Body = bytes | Iterable[bytes] | AsyncIterable[bytes] | None

# Bytes of an answer that are awaited before it counts as come, if it could be asked for again: as much as is replayed upward.
SHORT = 64 * 1024
NO_RETRY = HEADER_NO_RETRY.encode()
PRIORITY = HEADER_PRIORITY.encode()


class Attempt:
    """One attempt as a carrier gets it: where to, as whom, and how long at most.

    Times are monotonic seconds. `end` is the end of the call, at least of its head; `head_end` the one of this attempt's head, which
    may be earlier; `hard_end` the application's own, which holds for streams too. `native` is the engine's call, and knows the rest.
    None of it is needed by a carrier in a test.
    """

    __slots__ = (
        "address",
        "body",
        "by",
        "end",
        "hard_end",
        "head_end",
        "headers",
        "identity",
        "is_fresh",
        "is_http2",
        "method",
        "native",
        "now",
        "resumed",
        "target",
        "terms",
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
        now: float,
        end: float,
        is_fresh: bool = False,
        terms: Terms = ORDINARY,
        hard_end: float = FOREVER,
        native: core.Call | None = None,
        is_http2: bool = False,
        head_end: float | None = None,
    ) -> None:
        self.address = address
        self.identity = identity
        self.tls = tls
        self.method = method
        self.target = target
        self.headers = headers
        self.body = body
        self.now = now
        self.end = end
        self.head_end = end if head_end is None else head_end
        self.is_fresh = is_fresh
        self.terms = terms
        self.hard_end = hard_end
        self.native = native
        self.is_http2 = is_http2
        # Set by the carrier when a new connection came about with TLS: was a session resumed?
        self.resumed: bool | None = None
        # And by that of a delegated service: who carried it (`delegated.py`).
        self.by = ""

    @property
    def connect_end(self) -> float:
        """Until when a new connection must have come about."""
        connect = self.terms.connect
        if connect is None:
            connect = FOREVER if self.terms.is_explicit or self.native is None else self.native.connect_timeout
        return min(self.head_end, self.now + connect)

    @property
    def stream_idle(self) -> float:
        """Seconds without progress that a stream may stay, where the caller gave no times of its own."""
        return 0.0 if self.native is None else self.native.stream_idle


class Incoming(Protocol):
    """A body that is still on its way. `read` gives the next piece, b"" at the end; `close` gives up on the rest.

    After a change of protocols (101) `write` sends, and the body is what the other side says.
    """

    async def read(self) -> bytes: ...
    async def write(self, data: bytes) -> None: ...
    async def close(self) -> None: ...
    def info(self, name: str) -> Any: ...


# Status, version of HTTP (0 and 1 for 1.0 and 1.1, 20 for 2), reason, headers, and the body or what is still on its way.
Reply = tuple[int, int, bytes, Headers, bytes | Incoming]


class Carrier(Protocol):
    """What moves the bytes: the caller's event loop, or the calling thread. Raises `errors.AttemptFailed`.

    `can_overlap`: two exchanges can be awaited at a time.
    """

    @property
    def can_overlap(self) -> bool: ...
    def exchange(self, attempt: Attempt) -> Awaitable[Reply]: ...
    async def sleep(self, seconds: float) -> None: ...


class Answer:
    """What came back: the head, the body if it is here already, and the call with its record."""

    __slots__ = ("_method", "_native", "_target", "_trail", "body", "headers", "minor", "reason", "status")

    body: bytes | Incoming | None

    def __init__(self, native: core.Call, method: str, target: str, reply: Reply, trail: list[str] | None = None) -> None:
        self._native = native
        self._method = method
        self._target = target
        # Who carried each attempt, where the service is delegated.
        self._trail = trail
        self.status, self.minor, self.reason, self.headers, self.body = reply

    @property
    def call(self) -> Call:
        return Call(self._native, self._method, self._target, self._trail)

    async def read(self) -> bytes:
        """The next piece of a body that is still on its way, b"" at its end."""
        return b""

    async def close(self) -> None:
        """Give up on the rest of the body; harmless after its end."""


class StreamedAnswer(Answer):
    """An answer whose body is still on its way. The call ends with it."""

    __slots__ = ("_call", "_hard_end", "_is_over", "_token", "_way", "stream")

    def __init__(
        self,
        native: core.Call,
        method: str,
        target: str,
        reply: Reply,
        trail: list[str] | None,
        way: OutboundWay,
        token: int,
        hard_end: float,
    ) -> None:
        super().__init__(native, method, target, reply, trail)
        assert not isinstance(reply[4], bytes)
        self.stream: Incoming = reply[4]
        self.body = None
        self._way = way
        self._token = token
        self._hard_end = hard_end
        self._is_over = False
        # One for the answer and for what may still go wrong with it.
        self._call = Call(native, method, target, trail)

    @property
    def call(self) -> Call:
        return self._call

    async def read(self) -> bytes:
        if self._is_over:
            return b""
        try:
            piece = await self.stream.read()
        except errors.AttemptFailed as error:
            self._end(outcome_of(error))
            error.call = self.call
            late_at = self._hard_end if error.reason == IDLE_TIMEOUT else self._native.deadline
            if isinstance(error, errors.AttemptTimeout) and self._way.clock() >= late_at:
                late = _too_late(self._native)
                late.call = error.call
                raise late from error
            raise
        if not piece:
            self._end(core.OUTCOME_RESPONSE)
        return piece

    async def close(self) -> None:
        if not self._is_over:
            self._end(core.OUTCOME_CANCELLED)
            await self.stream.close()

    def _end(self, outcome: int) -> None:
        if not self._is_over:
            self._is_over = True
            self._native.finish(self._token, outcome, self._way.clock())


class OutboundWay:
    """The way out of one process: engine, identity and observer, in the order in which a call meets them."""

    __slots__ = (
        "carriers",
        "clock",
        "delegation",
        "egress",
        "engine",
        "identity",
        "is_by_peer",
        "ledger",
        "observer",
        "rates",
        "wake",
    )

    def __init__(self, engine: core.Engine, identity: Any, observer: Any, clock: Callable[[], float] = time.monotonic) -> None:
        self.engine = engine
        self.identity = identity
        self.observer = observer
        self.clock = clock
        # What becomes of hosts that are no Service: "allow" or "deny".
        self.egress: EgressRules | str = "allow"
        # Whether some service is balanced or limited by our own caller, and the rates that all processes share, if there are any.
        self.is_by_peer = False
        self.rates: RateGuard | None = None
        # Which services the node agent carries, None for none.
        self.delegation: Delegation | None = None
        # What the connections of this mesh have counted, and the carriers that somebody has to sweep.
        self.ledger = Ledger()
        self.carriers: WeakSet[Any] = WeakSet()
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
        terms: Terms = ORDINARY,
    ) -> Answer:
        """Send one call and return its answer. Raises `errors.Refused`, `errors.DeadlineExceeded` or `errors.AttemptFailed`, each
        with the call.
        """
        clock = self.clock
        now = clock()
        if self.wake is not None:
            self.wake()
        # observe: outside everything, so that refusals are counted and traced too.
        observer = self.observer
        is_recording = observer is not None and observer.recorder() is not None
        # route: which service, which backend, which policy; the permit of the service is taken here, once per call.
        path = target if "?" not in target else target.partition("?")[0]
        outer, layer, visit = current_deadline.get(), current_layer.get(), current_visit.get()
        if visit is not None:
            # On behalf of a call that came in: its time is ours, and so is the attempt of its caller.
            if visit.end is not None and (outer is None or visit.end < outer):
                outer = visit.end
            layer = max(layer, visit.layer)
            if visit.priority:
                headers = [*headers, (PRIORITY, visit.priority.encode())]
        is_whole = body is None or isinstance(body, bytes)
        replay: Replayed | AsyncReplayed | None = None
        if not is_whole:
            from .replay import replayed

            body = replay = replayed(body, is_blocking=not carrier.can_overlap)  # type: ignore[arg-type]
        reply: Reply | None = None
        race: Race | None = None
        patience: Patience | None = None
        if terms is ORDINARY and self.rates is None and not self.is_by_peer:
            native = self.engine.begin(authority, method, path, headers, now, outer, None, True, layer)
        else:
            native = await self._begin(carrier, authority, method, path, headers, outer, layer, terms)
            # A store of rates may have taken its time, which is no endpoint's.
            now = clock()
            if terms.wait is not None or terms.stop is not None:
                from .patience import Patience

                patience = Patience(terms, now)
        trail: list[str] | None = None
        if self.delegation is not None and native.service in self.delegation.services:
            # send: the same attempts, by the agent of this node.
            carrier, trail = self.delegation.carrier(carrier), []
        extras = native.extras
        if extras & core.EXTRA_HEDGE and native.hedge(now, carrier.can_overlap, not is_whole) is not None:
            from .race import Race

            race = Race(carrier, native, clock)
        end = native.deadline
        hard_end = FOREVER if outer is None else outer
        # Of a stream, either way, only the application's own end is told: the route's ends with the head.
        is_long = terms.is_stream or not is_whole or (body is not None and len(body) >= LARGE)  # type: ignore[arg-type]
        told = hard_end if is_long else end
        if terms.read is not None and not is_long:
            told = min(told, now + terms.read)
        is_fresh = False
        errand: Errand | None = None
        try:
            if visit is not None and visit.ends_calls and native.is_idempotent:
                errand = visit.errand()
            while True:
                # retry: the engine says when; the wait is never longer than the deadline.
                step = native.next(now)
                if step[0] == core.SEND:
                    # balance > admit: the engine has chosen an endpoint and holds its permit.
                    _, token, address, identity, is_http2 = step
                    # secure: the newest identity of ours, and whom we expect. An empty identity is plain text, by configuration.
                    tls = self.identity.client_tls if identity and self.identity is not None else None
                    if identity and tls is None:
                        raise errors.IdentityError(
                            f"the call to {native.service!r} needs mutual TLS, but this process has no identity.",
                            hint="Its certificate was never loaded: see the log, and `secure.identity` in mesh.yaml.",
                        )
                    if terms.is_private and not identity:
                        raise errors.Denied(
                            f"the URL promises TLS, but {native.service!r} is called in plain text.",
                            rule="https",
                            hint="Write http:// (the mesh decides what is encrypted), or give the services identities.",
                        )
                    span = None
                    if is_recording:
                        span = observer.client_span(method, authority, native.attempt, target=target, endpoint=address)
                    if observer is None:
                        sent = native.headers(headers, now, told, [], 0.0)
                    else:
                        # Without a span the trace that this call is part of is passed on, or a new one begun.
                        trace = span.headers if span is not None else observer.carried(is_recording)
                        sent = native.headers(headers, now, told, trace, observer.sample)
                    head_end = min(end, now + native.per_try) if extras & core.EXTRA_PER_TRY else end
                    attempt = Attempt(
                        address, identity, tls, method, target, sent, body, now, end, is_fresh, terms, hard_end, native, is_http2, head_end
                    )  # fmt: skip
                elif step[0] == core.WAIT:
                    await carrier.sleep(min(step[1], max(end - now, 0.0)))
                    now = clock()
                    continue
                # Otherwise (AWAIT) one of two attempts has failed, and what becomes of the other decides.
                # send: the carrier moves the bytes.
                try:
                    if race is None:
                        reply = await carrier.exchange(attempt)
                    else:
                        # hedge: of the attempts under way, the one that ends first.
                        if step[0] == core.SEND:
                            race.start(attempt, token, span)
                        ended = await race.first()
                        if ended is None:
                            # All are slow, and the engine names another endpoint for the same.
                            is_fresh = False
                            now = clock()
                            continue
                        task, attempt, token, span = ended
                        reply = task.result()
                    if not isinstance(reply[4], bytes) and native.is_idempotent and native.has_attempts_left:
                        reply = await _whole(reply)
                except errors.AttemptFailed as error:
                    now = clock()
                    if trail is not None:
                        trail.append(attempt.by)
                    if span is not None:
                        span.end(0, error, attempt.resumed, attempt.by)
                    outcome = outcome_of(error)
                    # A stream that fell silent has outlived the route's deadline; only the application's own still counts.
                    late_at = hard_end if error.reason in (WRITE_TIMEOUT, IDLE_TIMEOUT) else end
                    is_late = isinstance(error, errors.AttemptTimeout) and now >= late_at
                    if error.reason == CONNECT_TIMEOUT and attempt.connect_end >= end:
                        # The caller had no time for a connection, which says nothing of the endpoint.
                        is_late, outcome = True, core.OUTCOME_CANCELLED
                    elif error.reason == CONNECT_TIMEOUT and terms.connect is not None and terms.connect < native.connect_timeout:
                        # Nor does a caller with less patience than the configuration has.
                        outcome = core.OUTCOME_CANCELLED
                    elif replay is not None and replay.is_lost and outcome in UNSENT:
                        outcome = core.OUTCOME_RESET
                    if patience is not None and native.has_attempts_left and (native.is_idempotent or outcome in UNSENT):
                        patience.ask(native, now, error)
                    if is_lost := replay is not None and replay.is_lost:
                        native.stop()
                    judgement = native.head(token, outcome, 0, now)
                    # What can't be sent again isn't, whatever the engine says.
                    if judgement == core.DELIVER or is_lost:
                        if is_late:
                            raise _too_late(native) from error
                        raise
                    if patience is not None and judgement == core.RETRY:
                        patience.wait(native, now)
                    is_fresh = outcome in (core.OUTCOME_STALE, core.OUTCOME_UNWRITTEN)
                    continue
                except BaseException as error:
                    if span is not None:
                        span.end(0, error)
                    raise
                now = clock()
                status = reply[0]
                if trail is not None:
                    trail.append(attempt.by)
                if span is not None:
                    span.end(status, None, attempt.resumed, attempt.by)
                is_here = isinstance(reply[4], bytes)
                after = _pushback(reply[3]) if status >= 500 or status == 429 else -1.0
                if extras & core.EXTRA_REPORT:
                    _report(native, token, reply[3], now)
                if status >= 500 or status == 429:
                    if patience is not None and native.has_attempts_left and native.is_idempotent:
                        patience.ask(native, now, None, status)
                    if replay is not None and replay.is_lost:
                        native.stop()
                judgement = native.head(token, core.OUTCOME_RESPONSE, status, now, after, is_here)
                if judgement == core.DELIVER:
                    if status >= 500 and native.is_spent:
                        _spend()
                    if extras & core.EXTRA_SESSION and (session := native.session) is not None:
                        reply = (*reply[:3], [*reply[3], session], reply[4])
                    if is_here:
                        return Answer(native, method, target, reply, trail)
                    return StreamedAnswer(native, method, target, reply, trail, self, token, hard_end)
                if patience is not None and judgement == core.RETRY:
                    patience.wait(native, now)
                await _drop(reply)
                reply = None
        except errors.MeshError as error:
            if errand is not None:
                errand.end()
            if error.call is None:
                error.call = Call(native, method, target, trail)
            native.abandon(clock())
            if native.is_spent and not isinstance(error, errors.Refused):
                _spend()
            if replay is not None:
                await replay.close()
            raise
        except BaseException as error:
            # Cancelled, or a mistake in a body's iterator or a strategy: every permit goes back before anybody else runs.
            native.abandon(clock())
            is_unwanted = errand is not None and errand.end(error)
            await _drop(reply)
            if replay is not None:
                await replay.close()
            if is_unwanted:
                gone = gone_away()
                gone.call = Call(native, method, target, trail)
                raise gone from None
            raise
        finally:
            if errand is not None:
                errand.end()
            if race is not None:
                await race.stop()

    async def _begin(
        self,
        carrier: Carrier,
        authority: str,
        method: str,
        path: str,
        headers: Headers,
        outer: float | None,
        layer: int,
        terms: Terms,
    ) -> core.Call:
        """A call that asks for something of its own, or of which the engine has to know on whose behalf it is."""
        known = peer()
        caller = known.spiffe_id if known is not None else None
        is_standby = False
        rates = self.rates
        if rates is not None:
            # Before the engine counts the call: what the store refuses was never begun here.
            where = self.engine.route_of(authority, method, path, headers)
            if where is not None and where[0] in rates:
                end = FOREVER if outer is None else outer
                is_standby = await rates.take(*where, caller, headers, end, is_blocking=not carrier.can_overlap)
        return self.engine.begin(
            authority, method, path, headers, self.clock(), outer, terms.idempotent, True, layer,
            terms.whole, terms.most_retries, terms.hedge, terms.zone, terms.key, caller, is_standby, terms.labels,
        )  # fmt: skip


def _report(native: core.Call, token: int, headers: Headers, now: float) -> None:
    """What the endpoint says of its load, if it says anything."""
    for name, value in headers:
        if name == b"endpoint-load-metrics":
            native.report(token, value, now)


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


def _too_late(native: core.Call) -> errors.DeadlineExceeded:
    return errors.DeadlineExceeded(
        f"the call to {native.service!r} did not end within its deadline.",
        hint="Raise `deadline` of the route or of the caller, or look in explain() for what took the time.",
    )


def _pushback(headers: Headers) -> float:
    """Seconds of a Retry-After header (its date form is not worth a clock's trust between machines), -2.0 for: never again."""
    after = -1.0
    for name, value in headers:
        if name == b"retry-after" and value.isdigit() and len(value) < 7:
            after = float(value)
        elif name == NO_RETRY:
            return -2.0
    return after


async def _drop(reply: Reply | None) -> None:
    """An answer that nobody will read."""
    if reply is not None and not isinstance(reply[4], bytes):
        await reply[4].close()


def _spend() -> None:
    """What may be tried has been tried. If a handler made the call, whoever called the handler need not try that again."""
    visit = current_visit.get()
    if visit is not None and visit.entry is not None:
        visit.entry.spend()


def run(way: Coroutine[Any, Any, T]) -> T:
    """Drive a way whose carrier never suspends: the calling thread does all the waiting."""
    try:
        way.send(None)
    except StopIteration as end:
        result: T = end.value
        return result
    way.close()
    raise RuntimeError("a blocking carrier suspended; it must block instead")
