"""THE OUTBOUND WAY of a gRPC call: what happens to it between the stub and a channel to one endpoint?

    observe > route > retry > [ balance > admit > secure > send ]        [ ] = once per attempt

The mirror of `client/way.py` for calls whose bytes gRPC moves: the same engine takes the same decisions in the same
order. A `Course` is one call on this way. It never waits, so that it serves asyncio, threads and gRPC's callbacks alike:
whoever drives it asks `step` for an attempt, makes it, and says how it went. gRPC sends the deadline itself
(`grpc-timeout`); attempts go over a channel per endpoint (links.py); their ends are read from gRPC's codes
(status.py).

An attempt is repeated only before the first message of the response, and only if the engine says so; gRPC's own retries
are off. `wait_for_ready` means what it means in gRPC, over all endpoints: as long as none can be reached, and nothing was sent to any,
the call begins anew until its deadline.
"""

from __future__ import annotations

import random
from typing import Any, Final

import grpc
import grpc.aio

from meshlib import errors
from meshlib._native import core
from meshlib.call import (
    HEADER_ATTEMPT,
    HEADER_DEADLINE,
    HEADER_PRIORITY,
    Call,
    Visit,
    current_deadline,
    current_layer,
    current_visit,
    gone_away,
)

from ..delegated import BY_AGENT, RESERVED, agent_lost, error_of
from ..delegated import FAILED as _FAILED
from ..delegated_agent import AWAY, CLOSED, GONE
from ..faults import AGENT_CLOSED, outcome_of
from .links import Link
from .status import NOT_CONNECTED, OK, STATUS, failure_of, judge, judge_end, pushback, rpc_error
from .way import Method

# A caller declares with this metadata key that one call may be repeated. It stays here: the next hop declares for itself.
IDEMPOTENT: Final = "x-mesh-idempotent"
TRACEPARENT: Final = "traceparent"
OWN_KEYS: Final = frozenset({IDEMPOTENT, HEADER_ATTEMPT, HEADER_DEADLINE, *(name.decode() for name in RESERVED)})
FAILED: Final = _FAILED.decode()
# How gRPC begins the details of a call whose connection broke (since 2025, and before).
CUT: Final = (
    "stream removed",
    "socket closed",
    "recvmsg",
    "sendmsg",
    "connection reset",
    "broken pipe",
    "keepalive",
    "ping timeout",
)
TRUE: Final = ("1", "true", b"1", b"true")

# gRPC's timers and ours are not the same clock.
EARLY: Final = 0.005
# Seconds between two looks of a call that waits for an endpoint to be ready: doubled from the first to the second, jittered.
FIRST_LOOK, LAST_LOOK = 0.02, 1.0
# What `step` says when no attempt is due, but one under way decides.
OTHERS: Final = -1.0
TOO_LATE: Final = "meshlib: no answer began within the route's deadline; give the call a timeout, or the route a longer deadline."

# Of refusals: there is nobody to call, or nobody who may be called now.
NOT_READY: Final = frozenset({errors.NoEndpoint.reason, "admit.breaker_open"})
UNSENT: Final = frozenset({core.OUTCOME_REFUSED, core.OUTCOME_UNWRITTEN})

Pairs = tuple[tuple[str, Any], ...]
# One attempt of several under way: its token, link, span and end.
Leg = tuple[int | None, Link | None, Any, float | None]

_NONE: list[tuple[bytes, bytes]] = []
_OK: Final = grpc.StatusCode.OK
_SEND: Final = core.SEND
_WAIT: Final = core.WAIT
_GOOD: Final = core.OUTCOME_RESPONSE


class Course:
    """One call on its way: what was decided, and the attempt under way.

    `link`, `sent` (metadata) and `timeout` are for the attempt that `step` picked; `patience` is what is left of the
    route's deadline, which ends a call with one message each way, and of a stream of answers the wait for the first one. A stream of
    requests goes at its caller's pace. What the caller set, by `timeout` or a deadline further out, ends all.
    """

    __slots__ = (
        "_asked",
        "_bare",
        "_call",
        "_end",
        "_extras",
        "_has_begun",
        "_headers",
        "_is_again",
        "_is_forgotten",
        "_is_idempotent",
        "_is_waiting",
        "_layer",
        "_look",
        "_look_at",
        "_method",
        "_own",
        "_span",
        "_token",
        "_trail",
        "_way",
        "attempt_end",
        "is_headed",
        "is_over",
        "link",
        "native",
        "now",
        "received",
        "sent",
        "visit",
        "written",
    )

    def __init__(
        self, method: Method, timeout: float | None = None, metadata: Any = None, wait_for_ready: bool | None = None
    ) -> None:
        way = self._way = method.way
        self._method = method
        now = self.now = way.clock()
        self._own: tuple[tuple[str, Any], ...] = ()
        # Of the call, and of the attempt; known from `step` or `accompany` on.
        self._end = now
        self.attempt_end: float | None = None
        self._extras = 0
        # Of a call that waits for an endpoint: when it looks again.
        self._look, self._look_at = FIRST_LOOK, now
        self._headers = _NONE
        self._is_idempotent = method.is_idempotent
        asked, layer, visit = current_deadline.get(), current_layer.get(), current_visit.get()
        if timeout is not None:
            asked = now + timeout if asked is None else min(asked, now + timeout)
        if metadata:
            self._read(metadata)
        if visit is not None:
            # On behalf of a call that came in: its time is ours, and so is the attempt of its caller.
            if visit.end is not None and (asked is None or visit.end < asked):
                asked = visit.end
            layer = max(layer, visit.layer)
            if visit.priority:
                self._matter(visit.priority)
        self.visit: Visit | None = visit
        self._asked = asked
        self._layer = layer
        self._is_waiting = wait_for_ready
        self._has_begun = self._is_forgotten = self.is_headed = self.is_over = False
        self.sent: Pairs = ()
        # Of a delegated service: who carried each attempt, what was sent without what is for the agent, and whether the same attempt goes
        # again, by this process.
        self._trail: list[str] | None = None
        self._bare: Pairs = ()
        self._is_again = False
        # None until `step` or `accompany`.
        self.native: Any = None
        self.link: Link | None = None
        self._token: int | None = None
        self._span: Any = None
        self._call: Call | None = None
        # The messages of the attempt that counts, for its span; those of streams are noted only where there is one.
        self.written, self.received = (1, 0) if method.is_replayable else (0, 0)

    def _read(self, metadata: Any) -> None:
        pairs: Pairs = tuple(metadata)
        for key, value in pairs:
            if key == IDEMPOTENT:
                self._is_idempotent = value in TRUE
        own = self._own = tuple(pair for pair in pairs if pair[0] not in OWN_KEYS)
        self._headers = [(key.encode(), value if isinstance(value, bytes) else value.encode()) for key, value in own]

    def _matter(self, priority: str) -> None:
        """How much the call that we serve matters travels on."""
        self._own = (*(pair for pair in self._own if pair[0] != HEADER_PRIORITY), (HEADER_PRIORITY, priority))

    @property
    def call(self) -> Call | None:
        """The decisions that were taken for this call. None if it never began."""
        if self._call is None and self.native is not None:
            self._call = Call(self.native, "POST", self._method.name, self._trail)
        return self._call

    @property
    def is_recorded(self) -> bool:
        """Does a span stand for the attempt?"""
        return self._span is not None

    @property
    def timeout(self) -> float | None:
        """Seconds that the attempt has, for gRPC. None: a stream, which only its caller ends."""
        end = self.attempt_end
        return None if end is None else max(end - self.now, 0.0)

    @property
    def end_of_patience(self) -> float:
        """The route's own deadline."""
        return float(self._end)

    @property
    def patience(self) -> float:
        return max(self.end_of_patience - self.now, 0.0)

    @property
    def is_hedged(self) -> bool:
        """May a second attempt go out beside a slow one?"""
        return bool(self._extras & core.EXTRA_HEDGE) and self.native.hedge(self.now, True, False) is not None

    def accompany(self) -> None:
        """route, for a call that isn't balanced: the policy, and the permit of the Service."""
        try:
            self._begin(self.now)
        except errors.MeshError as error:
            raise rpc_error(error) from error.__cause__
        self.attempt_end = self._asked if self._method.is_stream else self._end
        self.dress()

    def step(self) -> float:
        """Pick the next attempt. Returns the seconds to wait before asking again, 0.0 when there is one, and OTHERS where one under
        way is to be awaited.

        Raises AioRpcError when there is none to be had; then the call is over.
        """
        way = self._way
        now = self.now = way.clock()
        if self._is_again:
            self._is_again = False
            return 0.0
        native, visit, trace = self.native, self.visit, None
        try:
            if native is None:
                if self._is_waiting:
                    if self._has_begun and now < self._look_at and now < self._end:
                        return min(self._look_at, self._end) - now
                    native = self._begin(now)
                    step = native.next(now)
                else:
                    # route, and the first pick: one crossing for what nearly every call is.
                    method, outbound = self._method, way.outbound
                    peer = None if visit is None or visit.peer is None else visit.peer.spiffe_id
                    sample = None if outbound.observer is None else outbound.observer.fresh()
                    native, self._end, self._extras, trace, step = outbound.engine.depart(
                        way.service, method.name, self._headers, now, self._asked,
                        self._is_idempotent, way.links is not None and method.is_replayable, self._layer, peer, sample,
                    )  # fmt: skip
                    self.native = native
                    self._has_begun = True
                if visit is not None and visit.is_gone and visit.ends_calls and native.is_idempotent:
                    raise gone_away()
            else:
                # retry: the engine says when.
                step = native.next(now)
            kind = step[0]
            if kind != _SEND:
                return (min(step[1], max(self._end - now, 0.0)) or 1e-6) if kind == _WAIT else OTHERS
            # balance > admit: the engine has chosen an endpoint and holds its permit.
            _, self._token, address, identity, _ = step
            # secure: the channel of our newest identity to the one that we expect.
            if way.links is not None:
                self.link = way.links.take(address, identity, native.connect_timeout)
            end = self._asked if self._method.is_stream else self._end
            if self._extras & core.EXTRA_PER_TRY and not self._method.is_stream:
                end = min(end, now + native.per_try)
            self.attempt_end = end
            if trace is None or self._own or self._layer:
                self.dress(address)
            else:
                # A first attempt that nobody records and that is part of no trace carries the one that it begins.
                self.sent = ((TRACEPARENT, trace),)
            if way.outbound.delegation is not None:
                self._note()
        except errors.MeshError as error:
            if self._is_waiting and error.reason in NOT_READY and self._wait(now):
                return self.step()
            call = self.call
            self.give_up()
            error.call = call
            raise rpc_error(error) from error.__cause__
        return 0.0

    def _begin(self, now: float) -> Any:
        way, visit, method = self._way, self.visit, self._method
        native = self.native = way.outbound.engine.begin(
            way.service, "POST", method.name, self._headers, now, self._asked,
            self._is_idempotent, way.links is not None and method.is_replayable, self._layer,
            peer=None if visit is None or visit.peer is None else visit.peer.spiffe_id,
        )  # fmt: skip
        if not self._has_begun:
            # A call that waits and begins anew has the deadline of its first beginning.
            self._has_begun, self._end, self._extras = True, native.deadline, native.extras
            if self._is_waiting:
                self._asked = self._end if self._asked is None else min(self._asked, self._end)
        return native

    def _wait(self, now: float) -> bool:
        """Nobody is there yet, and nothing was sent: begin anew after a while. False if there is no time for it."""
        if not self._has_begun or now >= self._end:
            return False
        self._look_at = now + self._look * random.uniform(0.5, 1.0)
        self._look = min(2 * self._look, LAST_LOOK)
        native, self.native, self._token = self.native, None, None
        self._call = None
        if native is not None:
            native.abandon(now)
        self._give_link()
        return True

    def dress(self, address: str = "") -> None:
        """observe: what an attempt carries (the caller's metadata, the attempt's number, the trace), and its span."""
        sent, native, observer = self._own, self.native, self._way.outbound.observer
        attempt = native.attempt
        if attempt:
            sent = (*sent, (HEADER_ATTEMPT, str(attempt)))
        if observer is not None:
            span, is_recording = None, observer.recorder() is not None
            if is_recording:
                span = self._span = observer.client_span(
                    "POST", self._way.service, attempt, endpoint=address, rpc=self._method.name
                )
            # Without a span the trace that this call is part of is passed on, or a new one begun.
            trace = observer.carried(is_recording) if span is None else span.headers
            if sent and any(key == TRACEPARENT for key, _ in sent):
                pass  # who wrote it by hand is not contradicted
            elif trace is None:
                sent = (*sent, (TRACEPARENT, native.traceparent(observer.sample)))
            else:
                sent = (*sent, *((key.decode(), value.decode()) for key, value in trace))
        self.sent = sent

    def _note(self) -> None:
        """send: by the node agent, which is told where to."""
        links, link = self._way.links, self.link
        if links is None or link is None or links.delegation is None:
            return
        self._bare, self._trail = self.sent, self._trail if self._trail is not None else []
        self.sent = (*self.sent, *link.directions)
        self._trail.append(BY_AGENT if link.directions else AWAY)

    def _answered_for(self, error: Any, link: Link) -> errors.AttemptFailed | None:
        """What the node agent says that it met, in place of an answer; or that it failed itself. None of an answer of the endpoint's."""
        delegation = None if self._way.links is None else self._way.links.delegation
        code = error.code()
        for key, value in error.trailing_metadata() or ():
            if key == FAILED:
                return error_of(value.encode() if isinstance(value, str) else value, (error.details() or "").encode())
        if delegation is None or code not in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
            return None
        if code is grpc.StatusCode.DEADLINE_EXCEEDED:
            return agent_lost(is_written=True) if delegation.watch.is_overdue else None
        is_ready, is_down = self._way.standing(link)
        # gRPC may tell of the call's end before it knows of the connection's. An endpoint that says the same words spares itself blame,
        # and gets a call again that may be repeated.
        if is_ready and not (error.details() or "").lower().startswith(CUT) and not delegation.is_gone():
            return None
        delegation.watch.soon()
        return agent_lost(is_written=not (is_down and (error.details() or "").lower().startswith(NOT_CONNECTED)))

    def _goes_by_us(self, why: errors.AttemptFailed, link: Link) -> bool:
        """The agent failed, and not the endpoint: the same attempt goes again, by this process, if it may."""
        links, native = self._way.links, self.native
        # gRPC takes messages of a stream before it knows whether they arrive, and nobody can give them back.
        is_safe = self._method.is_replayable and (not why.is_written or native.is_idempotent)
        if links is None or why.reason != AGENT_CLOSED or not is_safe or self._way.clock() >= self._end:
            return False
        try:
            direct = links.take(*link.place, native.connect_timeout, is_own=True)
        except errors.MeshError:
            return False
        reason = CLOSED if why.is_written else GONE
        if links.delegation is not None:
            links.delegation.fell_back(reason)
        if self._trail:
            self._trail[-1] = reason
        links.give(link)
        self.link, self.sent, self._is_again = direct, self._bare, True
        return True

    def fail(self, error: Any) -> bool:
        """The attempt failed before its answer began. True if the call goes on; otherwise it is over."""
        code, now = error.code(), self._way.clock()
        agents = None
        if self.link is not None and self.link.directions and not self._way.links.is_closed:  # type: ignore[union-attr]
            agents = self._answered_for(error, self.link)
            if agents is not None and self._goes_by_us(agents, self.link):
                return True
        if self._way.links is not None and self._way.links.is_closed:
            # Its channel was closed under it: no endpoint has failed, and there is nowhere to go on.
            self._end_span(STATUS.get(code, 500), error)
            error.call = self.call
            self.give_up()
            return False
        is_lost = code is grpc.StatusCode.UNAVAILABLE
        is_ready, is_down = self._way.standing(self.link) if is_lost else (True, False)
        is_late = now + EARLY >= (self._end if self.attempt_end is None else self.attempt_end)
        why = None if self.link is None or not is_down else self.link.error
        outcome, status = judge(code, error.details(), is_ready=is_ready, is_down=is_down, is_late=is_late, why=why)
        if agents is not None:
            outcome, why = outcome_of(agents), agents
        if why is not None:
            error.__cause__ = why
        self._end_span(status, error)
        error.call = self.call
        if self._token is not None:
            verdict = self.native.head(self._token, outcome, status, now, pushback(error.trailing_metadata()))
            if verdict != core.DELIVER:
                self._give_link()
                return True
            if self._is_waiting and self._method.is_replayable and outcome in UNSENT and self._wait(now):
                return True
            if outcome == core.OUTCOME_RESPONSE:
                self.native.finish(self._token, outcome, now)
        self.give_up()
        return False

    def good(self) -> None:
        """The one message of the answer is here."""
        if self.is_over:
            return
        self.is_over = self.is_headed = True
        self.received = 1
        if self._span is not None:
            self._end_span(OK, None)
        self._count(_OK)
        now = self._way.clock()
        if self._token is None:
            self.native.abandon(now)
        else:
            self.native.head(self._token, _GOOD, OK, now, -1.0, True)
        self._give_link()

    def head(self) -> None:
        """The answer began."""
        if self.is_headed or self.is_over:
            return
        self.is_headed = True
        if self._token is not None:
            self.native.head(self._token, _GOOD, OK, self._way.clock())

    def end(self, code: grpc.StatusCode = grpc.StatusCode.OK, *, is_cancelled: bool = False) -> None:
        """The answer is through, or broke off."""
        if self.is_over:
            return
        outcome, error = _GOOD, None
        if code is not grpc.StatusCode.OK or is_cancelled:
            is_ready = code is not grpc.StatusCode.UNAVAILABLE or self._way.standing(self.link)[0]
            outcome, error = judge_end(code, is_ready=is_ready, is_cancelled=is_cancelled), failure_of(code, None)
            if not is_ready and self.link is not None and self.link.directions:
                # The agent's connection, which says nothing of the endpoint.
                outcome = core.OUTCOME_STALE
        self.is_over = True
        self._end_span(STATUS.get(code, 500), error)
        self._count(code)
        now = self._way.clock()
        if self._token is None:
            self.native.abandon(now)
        else:
            self.native.finish(self._token, outcome, now)
        self._give_link()

    def give_up(self) -> None:
        """Cancelled, or a mistake of the caller's: everything goes back. Harmless after the end."""
        if self.is_over:
            return
        self.is_over = True
        self._end_span(0, None)
        self._count()
        if self.native is not None:
            self.native.abandon(self._way.clock())
        self._give_link()

    # --- several attempts at a time

    def hedge_after(self) -> float | None:
        """Seconds after which `step` may name another attempt beside those under way. None: never."""
        wait: float | None = self.native.hedge(self._way.clock(), True, False)
        return wait

    def put_aside(self) -> Leg:
        """The attempt that has just gone out is one of several; it is nobody's until `take_up`."""
        leg = self._token, self.link, self._span, self.attempt_end
        self._token = self.link = self._span = None
        return leg

    def take_up(self, leg: Leg) -> None:
        """Of those put aside, the attempt that ended."""
        self._token, self.link, self._span, self.attempt_end = leg

    def drop(self, leg: Leg) -> None:
        """Another attempt was quicker, or the caller gave up. Its permit goes back with the call."""
        _, link, span, _ = leg
        if span is not None:
            span.end(0, failure_of(grpc.StatusCode.CANCELLED, None))
        if link is not None and self._way.links is not None:
            self._way.links.give(link)

    # --- calls that nobody waits for

    def landed(self, attempt: Any) -> None:
        """gRPC's callback at the end of an attempt with one response: a success is noted at once, whoever awaits it when.

        A failure waits for whoever asks, since it may be tried again, unless nobody is left to ask.
        """
        # As `at_once`, for what nearly every call does.
        answer, code = attempt.code(), None
        try:
            answer.send(None)
        except StopIteration as told:
            code = told.value
        if code is _OK:
            self.good()
        elif self._is_forgotten and not self.is_over:
            details, trailing = at_once(attempt.details()), at_once(attempt.trailing_metadata())
            if code is None or attempt.cancelled() or self.fail(failure_of(code, details, trailing)):
                self.give_up()

    def forget(self, attempt: Any) -> None:
        """The caller dropped the call."""
        if self.is_over:
            return
        self._is_forgotten = True
        if attempt is None:
            self.give_up()
        elif attempt.done():
            self.landed(attempt)

    def _give_link(self) -> None:
        link, self.link = self.link, None
        if link is not None and self._way.links is not None:
            self._way.links.give(link)

    def _end_span(self, status: int, error: Any) -> None:
        span, self._span = self._span, None
        if span is not None:
            span.messages(self.written, self.received)
            span.end(status, error)

    def _count(self, code: grpc.StatusCode | None = None) -> None:
        """observe: the messages beside streams. Those of streams are counted as they come and go (way.py)."""
        if self._has_begun:
            method = self._method
            has_answer = code is _OK and not method.kind.endswith("stream")
            method.tally.add(int(method.is_replayable), int(has_answer))


def at_once(answer: Any) -> Any:
    """What a coroutine returns if it needn't wait, else None: gRPC's asyncio calls tell even what they know by coroutines."""
    try:
        answer.send(None)
    except StopIteration as end:
        return end.value
    answer.close()
    return None
