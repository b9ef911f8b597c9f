"""THE OUTBOUND WAY of a gRPC call: what happens to it between the stub and a channel to one endpoint?

    observe > route > retry > [ balance > admit > secure > send ]        [ ] = once per attempt

The mirror of `client/way.py` for calls whose bytes gRPC moves: the same engine takes the same decisions in the same
order. A `Course` is one call on this way. It never waits, so that it serves asyncio, threads and gRPC's callbacks alike:
whoever drives it asks `step` for an attempt, makes it, and says how it went. gRPC sends the deadline itself
(`grpc-timeout`); attempts go over a channel per endpoint (grpc_links.py); their ends are read from gRPC's codes
(grpc_status.py).

An attempt is repeated only before the first message of the response, and only if the engine says so; gRPC's own retries
are off. Wait-for-ready and hedging are not offered here.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import grpc
import grpc.aio

from meshlib import errors
from meshlib._native import core
from meshlib.call import HEADER_ATTEMPT, HEADER_DEADLINE, Call, outer_end, outer_layer, peer

from .grpc_links import Link, Links
from .grpc_status import OK, failure_of, judge, judge_end, pushback, rpc_error
from .way import OutboundWay

# A caller declares with this metadata key that one call may be repeated. It stays here: the next hop declares for itself.
IDEMPOTENT = "x-mesh-idempotent"
OWN_KEYS = frozenset({IDEMPOTENT, HEADER_ATTEMPT, HEADER_DEADLINE})
TRUE = ("1", "true", b"1", b"true")

# gRPC's timers and ours are not the same clock.
EARLY = 0.005

Pairs = tuple[tuple[str, Any], ...]


class GrpcWay:
    """The way out to one Service: over links to its endpoints, or (`links` is None) over a channel that is not ours."""

    __slots__ = ("_idempotent", "clock", "links", "outbound", "service")

    def __init__(self, service: str, outbound: OutboundWay, links: Links | None, idempotent: Iterable[str] = ()) -> None:
        self.service = service
        self.outbound = outbound
        self.links = links
        self.clock = outbound.clock
        self._idempotent = tuple(idempotent)

    def is_idempotent(self, method: str) -> bool | None:
        """True for methods declared so: exactly, or as `/pkg.Service/*`. None leaves it to the route."""
        for declared in self._idempotent:
            if declared == method or (declared.endswith("/*") and method.startswith(declared[:-1])):
                return True
        return None

    def standing(self, link: Link | None) -> tuple[bool, bool]:
        """Right after a failure: is the channel connected, does it fail to connect? Of a channel not ours nothing is known."""
        return (True, False) if self.links is None or link is None else self.links.standing(link)


class Course:
    """One call on its way: what was decided, and the attempt under way.

    `link`, `sent` (metadata) and `timeout` are for the attempt that `step` picked; `patience` is what is left of the
    route's deadline, which ends a call with one response, and of a stream only the wait for its first one. What the
    caller set, by `timeout` or a deadline further out, ends both.
    """

    __slots__ = (
        "_end",
        "_is_forgotten",
        "_is_headed",
        "_is_over",
        "_limit",
        "_own",
        "_span",
        "_token",
        "_way",
        "call",
        "link",
        "native",
        "now",
        "sent",
    )

    def __init__(
        self,
        way: GrpcWay,
        method: str,
        timeout: float | None,
        metadata: Any,
        *,
        is_idempotent: bool | None,
        is_replayable: bool,
        is_stream: bool,
    ) -> None:
        """route: the policy, and the permit of the service. Raises AioRpcError for what the engine refuses."""
        own: Pairs = ()
        headers: list[tuple[bytes, bytes]] = []
        if metadata:
            metadata = tuple(metadata)
            for key, value in metadata:
                if key == IDEMPOTENT:
                    is_idempotent = value in TRUE
            own = tuple((key, value) for key, value in metadata if key not in OWN_KEYS)
            headers = [(key.encode(), value if isinstance(value, bytes) else value.encode()) for key, value in own]
        now = self.now = way.clock()
        asked = outer_end()
        if timeout is not None:
            asked = now + timeout if asked is None else min(asked, now + timeout)
        layer = outer_layer()
        caller = peer()
        try:
            native = way.outbound.engine.begin(
                way.service, "POST", method, headers, now, asked, is_idempotent, is_replayable, layer,
                peer=None if caller is None else caller.spiffe_id,
            )  # fmt: skip
        except errors.MeshError as error:
            raise rpc_error(error) from error.__cause__
        self.native = native
        self.call = Call(native, "POST", method)
        self.link: Link | None = None
        self.sent: Pairs = ()
        self._way = way
        self._own = own
        self._end = native.deadline
        self._limit = asked if is_stream else self._end
        self._token: int | None = None
        self._span: Any = None
        self._is_headed = False
        self._is_over = False
        self._is_forgotten = False

    @property
    def timeout(self) -> float | None:
        return None if self._limit is None else max(self._limit - self.now, 0.0)

    @property
    def patience(self) -> float:
        return max(self._end - self.now, 0.0)

    def step(self) -> float:
        """Pick the next attempt. Returns the seconds to wait before asking again, 0.0 when there is one.

        Raises AioRpcError when there is none to be had; then the call is over.
        """
        now = self.now = self._way.clock()
        try:
            # retry: the engine says when.
            step = self.native.next(now)
            if step[0] == core.WAIT:
                return min(step[1], max(self._end - now, 0.0)) or 1e-6
            # balance > admit: the engine has chosen an endpoint and holds its permit.
            _, self._token, address, identity, _ = step
            # secure: the channel of our newest identity to the one that we expect.
            if self._way.links is not None:
                self.link = self._way.links.take(address, identity, self.native.connect_timeout)
            self.dress(address)
        except errors.MeshError as error:
            self.give_up()
            error.call = self.call
            raise rpc_error(error) from error.__cause__
        return 0.0

    def dress(self, address: str = "") -> None:
        """observe: what an attempt carries (the caller's metadata, the attempt's number, the trace), and its span."""
        sent, attempt, observer = self._own, self.native.attempt, self._way.outbound.observer
        if attempt:
            sent = (*sent, (HEADER_ATTEMPT, str(attempt)))
        if observer is not None:
            self._span = observer.client_span("POST", self._way.service, attempt, endpoint=address, rpc=self.call.target)
            present = [(key.encode(), b"") for key, _ in sent]
            sent = (*sent, *((key.decode(), value.decode()) for key, value in observer.client_headers(present)))
        self.sent = sent

    def fail(self, error: Any) -> bool:
        """The attempt failed before its answer began. True if another is to be made; otherwise the call is over."""
        code, now = error.code(), self._way.clock()
        is_lost = code is grpc.StatusCode.UNAVAILABLE
        is_ready, is_down = self._way.standing(self.link) if is_lost else (True, False)
        is_late = now + EARLY >= (self._end if self._limit is None else self._limit)
        outcome, status = judge(code, error.details(), is_ready=is_ready, is_down=is_down, is_late=is_late)
        self._end_span(status, error)
        error.call = self.call
        if self._token is not None:
            after = pushback(error.trailing_metadata())
            if self.native.head(self._token, outcome, status, now, after) == core.RETRY:
                self._give_link()
                return True
            if outcome == core.OUTCOME_RESPONSE:
                self.native.finish(self._token, outcome, now)
        self.give_up()
        return False

    def head(self) -> None:
        """The answer began."""
        if self._is_headed or self._is_over:
            return
        self._is_headed = True
        self._end_span(OK, None)
        if self._token is not None:
            self.native.head(self._token, core.OUTCOME_RESPONSE, OK, self._way.clock())

    def end(self, code: grpc.StatusCode = grpc.StatusCode.OK, *, is_cancelled: bool = False) -> None:
        """The answer is through, or broke off."""
        if self._is_over:
            return
        outcome = core.OUTCOME_RESPONSE
        if code is not grpc.StatusCode.OK or is_cancelled:
            is_ready = code is not grpc.StatusCode.UNAVAILABLE or self._way.standing(self.link)[0]
            outcome = judge_end(code, is_ready=is_ready, is_cancelled=is_cancelled)
        if self._token is not None:
            self.native.finish(self._token, outcome, self._way.clock())
        self.give_up()

    def give_up(self) -> None:
        """Cancelled, or a mistake of the caller's: everything goes back. Harmless after the end."""
        if self._is_over:
            return
        self._is_over = True
        self._end_span(0, None)
        self.native.abandon(self._way.clock())
        self._give_link()

    def landed(self, attempt: Any) -> None:
        """gRPC's callback at the end of an attempt with one response: a success is noted at once, whoever awaits it when.

        A failure waits for whoever asks, since it may be tried again, unless nobody is left to ask.
        """
        code = at_once(attempt.code())
        if code is grpc.StatusCode.OK:
            self.head()
            self.end()
        elif self._is_forgotten and not self._is_over:
            details, trailing = at_once(attempt.details()), at_once(attempt.trailing_metadata())
            if code is None or attempt.cancelled() or self.fail(failure_of(code, details, trailing)):
                self.give_up()

    def forget(self, attempt: Any) -> None:
        """The caller dropped the call."""
        self._is_forgotten = True
        if self._is_over:
            return
        if attempt is None:
            self.give_up()
        elif attempt.done():
            self.landed(attempt)

    @property
    def is_headed(self) -> bool:
        return self._is_headed

    @property
    def is_over(self) -> bool:
        return self._is_over

    def _give_link(self) -> None:
        link, self.link = self.link, None
        if link is not None and self._way.links is not None:
            self._way.links.give(link)

    def _end_span(self, status: int, error: Any) -> None:
        span, self._span = self._span, None
        if span is not None:
            span.end(status, error)


def at_once(answer: Any) -> Any:
    """What a coroutine returns if it needn't wait, else None: gRPC's asyncio calls tell even what they know by coroutines."""
    try:
        answer.send(None)
    except StopIteration as end:
        return end.value
    answer.close()
    return None
