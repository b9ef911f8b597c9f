"""How long may a request's head take, and how large may it grow, in uvicorn's protocols?

uvicorn sets a limit to idle connections only: a head that never ends costs its sender a byte now and then, and the server a connection
(and with httptools all the memory that it can be sent). `bounded` derives a protocol from uvicorn's own that ends such connections:
`PATIENCE` seconds from a head's first byte to its last, and while it is incomplete at most `HEAD` bytes and `FIELDS` fields.
A connection that was never asked for anything counts as idle, and ends like an idle one.

Told by what the protocols have: httptools' callbacks (`on_message_begin`, `on_headers_complete`, `on_message_complete`) with `headers`
and `url`; h11's `handle_events` with `conn`. These names have no underscore and are no documented interface of uvicorn either. A
protocol with neither is taken as it is.

h11 also takes lines that end in a bare LF, and lines that continue the one before, for what they might mean; another reader of the same
bytes may read another head. Such a head is refused.

It sets no limit to bodies, and complete heads are the gate's to judge.
"""

from __future__ import annotations

import asyncio
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from .door import FIELDS, HEAD, PATIENCE

if TYPE_CHECKING:
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


class _Bounded(_Base):  # type: ignore[misc]
    """What both do alike: the time."""

    # The end of the head that is under way, or of the wait for the first one.
    _timer: asyncio.TimerHandle | None = None
    _is_waiting = True

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        if self.timeout_keep_alive:
            self._timer = self.loop.call_later(self.timeout_keep_alive, self._give_up)

    def connection_lost(self, exc: Exception | None) -> None:
        self._rest()
        super().connection_lost(exc)

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

    def _give_up(self) -> None:
        self._timer = None
        if self._is_waiting:
            self.transport.close()
        elif self.flow.read_paused:
            # It is we who don't read, because of the requests before this one.
            self._begin()
        else:
            self.transport.abort()


class _HttpTools(_Bounded):
    _is_in_head = False
    _is_in_body = False
    _heads = 0
    _size = 0

    def data_received(self, data: bytes) -> None:
        self._arrived()
        was_in_head, heads = self._is_in_head, self._heads
        super().data_received(data)
        if self._is_in_head or (self._heads == heads and not self._is_in_body):
            # Only what came in whole for this head is counted: the part before it may be another's body.
            self._size = self._size + len(data) if was_in_head and self._heads == heads else 0
            if self._size > HEAD or (self._is_in_head and len(self.headers) > FIELDS):
                self.transport.abort()
            elif not self.transport.is_closing():
                self._begin()

    def on_message_begin(self) -> None:
        self._is_in_head = True
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._is_in_head, self._is_in_body = False, True
        self._heads += 1
        self._rest()
        super().on_headers_complete()
        if "raw_path" in self.scope:
            # As it came: httptools leaves out what else is in an absolute target, and the gate must judge that too.
            path, _, query = self.url.partition(b"?")
            self.scope["raw_path"] = self.root_path.encode("ascii") + path
            self.scope["query_string"] = query

    def on_message_complete(self) -> None:
        self._is_in_body = False
        super().on_message_complete()


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
        super().data_received(data)

    def handle_events(self) -> None:
        from h11 import IDLE

        if self.conn.their_state is IDLE and not is_sound(self.conn.trailing_data[0]):
            self.send_400_response("A line of the head ends without a carriage return, or continues the one before.")
            return
        super().handle_events()
        if self.conn.their_state is not IDLE:
            self._rest()
            return
        begun = self.conn.trailing_data[0]
        if not begun:
            self._rest()
        elif begun.count(b"\n") > FIELDS + 1:
            self.transport.abort()
        elif not self.transport.is_closing():
            self._begin()
