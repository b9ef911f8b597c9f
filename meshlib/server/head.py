"""How long may a request's head take, how large may it grow, and how slow may a caller be, in uvicorn's protocols?

uvicorn sets a limit to idle connections only: a head that never ends costs its sender a byte now and then, and the server a connection
(and with httptools all the memory that it can be sent). `bounded` derives a protocol from uvicorn's own that ends such connections:
`PATIENCE` seconds from a head's first byte to its last, and while it is incomplete at most `HEAD` bytes and `FIELDS` fields.
A connection that was never asked for anything counts as idle, and ends like an idle one.

A slow body, or an answer that is read slowly, costs a connection and a place for a call. There are many connections and fewer places:
so where half of the places are taken, whoever moves less than `LEAST_RATE` bytes a second over `PACE` seconds is cut. A stream with
pauses is none of that as long as there is room, and one in which nobody waits for the caller never is.

Told by what the protocols have: of httptools' `data_received`, `on_headers_complete`, `headers`, `url`, `scope`, `root_path` and the
`more_body` of `cycle`; of both `flow`, `pause_writing` and `resume_writing`; h11's `handle_events` with `conn`; of both
`connection_lost`, by which the connection's `Line` hears that the client has gone away. These names have no underscore and are no
documented interface of uvicorn either (`tests/server/test_pinned_names.py` looks whether they are there). A protocol with neither is
taken as it is.

h11 also takes lines that end in a bare LF, and lines that continue the one before, for what they might mean; another reader of the same
bytes may read another head. Such a head is refused.

It sets no limit to the size of bodies, and complete heads are the gate's to judge.
"""

from __future__ import annotations

import asyncio
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final

from .._native import core
from .door import FIELDS, HEAD, PATIENCE
from .slow import LEAST_RATE

# Seconds between two looks at how quick a caller is.
PACE: Final = 10.0

if TYPE_CHECKING:
    from .line import Line

    # What these are mixed into.
    _Base: Any = object
else:
    _Base = object


@lru_cache(maxsize=16)
def bounded(http: Any) -> Any:
    """A protocol class of uvicorn's, with bounds to its heads."""
    if not isinstance(http, type):
        return http
    if hasattr(http, "on_message_begin"):
        return type(http.__name__, (_HttpTools, http), {})
    if hasattr(http, "handle_events"):
        return type(http.__name__, (_H11, http), {})
    return http


@lru_cache(maxsize=16)
def heard(websocket: Any) -> Any:
    """A protocol class of uvicorn's for WebSockets, of which the line hears that the client has gone away."""
    return type(websocket.__name__, (_Heard, websocket), {}) if isinstance(websocket, type) else websocket


class _Heard(_Base):  # type: ignore[misc]
    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self.config.line.gone()


class _Bounded(_Base):  # type: ignore[misc]
    """What both do alike: the time."""

    # The end of the head that is under way, or of the wait for the first one.
    _timer: asyncio.TimerHandle | None = None
    _is_waiting = True
    line: Line | None = None
    # The next look at a body that is under way, and what has come of it since the last; the same for what has to go out.
    _body_timer: asyncio.TimerHandle | None = None
    _came = 0
    _answer_timer: asyncio.TimerHandle | None = None
    _waits = 0

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        if self.timeout_keep_alive:
            self._timer = self.loop.call_later(self.timeout_keep_alive, self._give_up)

    def connection_lost(self, exc: Exception | None) -> None:
        self._rest()
        self._end_watches()
        super().connection_lost(exc)
        if self.line is not None:
            self.line.gone()

    def _begin(self) -> None:
        """A head is under way, and not complete."""
        if self._timer is None:
            self._timer = self.loop.call_later(PATIENCE, self._give_up)

    def _rest(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _arrived(self) -> None:
        if self._is_waiting:
            self._is_waiting = False
            self._rest()

    # --- slow callers

    def _is_in_body(self) -> bool:
        raise NotImplementedError

    def _watch_body(self) -> None:
        self._came = 0
        self._body_timer = self.loop.call_later(PACE, self._look_at_body)

    def _look_at_body(self) -> None:
        self._body_timer = None
        if not self._is_in_body() or self.transport.is_closing():
            return
        if not self.flow.read_paused and self._came < LEAST_RATE * PACE and self._is_crowded():
            self.transport.abort()
        else:
            self._watch_body()

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._answer_timer is None:
            self._watch_answer()

    def resume_writing(self) -> None:
        if self._answer_timer is not None:
            self._answer_timer.cancel()
            self._answer_timer = None
        super().resume_writing()

    def _watch_answer(self) -> None:
        self._waits = self.transport.get_write_buffer_size()
        self._answer_timer = self.loop.call_later(PACE, self._look_at_answer)

    def _look_at_answer(self) -> None:
        went = self._waits - self.transport.get_write_buffer_size()
        if went < LEAST_RATE * PACE and self._is_crowded():
            self._answer_timer = None
            self.transport.abort()
        else:
            self._watch_answer()

    def _end_watches(self) -> None:
        for timer in (self._body_timer, self._answer_timer):
            if timer is not None:
                timer.cancel()
        self._body_timer = self._answer_timer = None

    def _is_crowded(self) -> bool:
        """Are the places getting scarce, one of which this caller has?"""
        visit = None if self.line is None else self.line.visit
        if visit is None:
            return False
        load = visit.way.gate.load()
        return 2 * load["in_flight"] >= load["limit"]

    def _give_up(self) -> None:
        self._timer = None
        if self._is_waiting:
            self.transport.close()
        elif self.flow.read_paused:
            # It is we who don't read, because of the requests before this one.
            self._begin()
        else:
            self.transport.abort()


class _Nowhere(list[tuple[bytes, bytes]]):
    """Where the fields of a trailer are put: they are no headers, whoever has the list."""

    def append(self, pair: tuple[bytes, bytes]) -> None:
        pass


_NOWHERE: Final = _Nowhere()


class _HttpTools(_Bounded):
    # The scope of the last head that is complete: another one is that of a head which isn't.
    _judged: Any = None
    _size = 0

    def data_received(self, data: bytes) -> None:
        if self._is_waiting:
            self._arrived()
        before, judged, cycle = self.scope, self._judged, self.cycle
        was_in_body = cycle is not None and cycle.more_body
        self._came += len(data)
        super().data_received(data)
        cycle = self.cycle
        if cycle is not None and cycle.more_body and self._body_timer is None:
            self._watch_body()
        is_in_head = self.scope is not self._judged
        # Neither head nor body: empty lines before a head, which may be many, too.
        if is_in_head or (judged is self._judged and not was_in_body):
            # Only what came in whole for this head is counted: the part before it may be another's body.
            was_in_head = before is not judged and judged is self._judged
            self._size = self._size + len(data) if was_in_head else 0
            if self._size > HEAD or (is_in_head and len(self.headers) > FIELDS):
                self.transport.abort()
            elif not self.transport.is_closing():
                self._begin()

    def on_headers_complete(self) -> None:
        scope = self._judged = self.scope
        if self._timer is not None:
            self._rest()
        # As it came: httptools leaves out what else is in an absolute target, and the gate must judge that too. Put there before the
        # call is begun, which with eager tasks is at once.
        scope[core.TARGET] = self.root_path.encode("ascii") + self.url if self.root_path else self.url
        super().on_headers_complete()
        if not self.parser.should_upgrade():
            # Headers are frozen when authorised: whatever the parser finds behind them goes nowhere, however much there is of it.
            self.headers: Any = _NOWHERE

    def _is_in_body(self) -> bool:
        cycle = self.cycle
        return cycle is not None and bool(cycle.more_body)


def is_sound(head: bytes) -> bool:
    """Does each line of this head end in CR LF, and does none continue the one before? h11 takes both for what they might mean.

    What stands behind the head is not looked at. An incomplete head is sound as far as it goes.
    """
    end = head.find(b"\r\n\r\n")
    bare = head.find(b"\n\n")
    if bare >= 0 and (end < 0 or bare < end):
        return False
    head = head if end < 0 else head[:end]
    return head.count(b"\n") == head.count(b"\r\n") and b"\n " not in head and b"\n\t" not in head


class _H11(_Bounded):
    # The number of bytes is limited by h11.

    def data_received(self, data: bytes) -> None:
        self._arrived()
        self._came += len(data)
        super().data_received(data)

    def _is_in_body(self) -> bool:
        from h11 import SEND_BODY

        return self.conn.their_state is SEND_BODY

    def handle_events(self) -> None:
        from h11 import IDLE

        if self.conn.their_state is IDLE and not is_sound(self.conn.trailing_data[0]):
            self.send_400_response("A line of the head ends without a carriage return, or continues the one before.")
            return
        super().handle_events()
        if self.conn.their_state is not IDLE:
            self._rest()
            if self._body_timer is None and self._is_in_body():
                self._watch_body()
            return
        begun = self.conn.trailing_data[0]
        if not begun:
            self._rest()
        elif begun.count(b"\n") > FIELDS + 1:
            self.transport.abort()
        elif not self.transport.is_closing():
            self._begin()
