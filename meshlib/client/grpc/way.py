"""What is known of the way to a Service before the first call, and of a stub's method?

A `GrpcWay` belongs to a channel, a `Method` to a multicallable of a stub. Calls are `Course`s on that way (course.py). Nothing is
decided here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Final

from meshlib._native import core

from ..way import OutboundWay
from .links import METHODS_KEPT, Link, Links

# Links that a method remembers how to be called on, before it begins anew: far more than a Service has endpoints nearby.
STARTS_KEPT: Final = 1024


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


class Method:
    """One method of a stub: how its messages are written and read, and its multicallable on each link.

    `is_replayable`: its request is one message, which may be sent again. `is_stream`: messages stream one way or both. `starts` are the
    multicallables that `on` has found.
    """

    __slots__ = ("_key", "is_idempotent", "is_replayable", "is_stream", "kind", "name", "serializer", "starts", "tally", "way")

    def __init__(
        self,
        way: GrpcWay,
        kind: str,
        name: str,
        serializer: Any = None,
        deserializer: Any = None,
        is_registered: bool | None = False,
    ) -> None:
        self.way = way
        self.kind = kind
        self.name = name
        self.serializer = serializer
        self.is_idempotent = way.is_idempotent(name)
        self.is_replayable = kind.startswith("unary")
        self.is_stream = kind != "unary_unary"
        self._key = (kind, name, serializer, deserializer, is_registered)
        self.starts: dict[Link, Any] = {}
        observer = way.outbound.observer
        self.tally = core.Tally() if observer is None else observer.tally("client", way.service, name)

    def write(self, request: Any) -> Any:
        """A request message as bytes."""
        return request if self.serializer is None else self.serializer(request)

    def on(self, link: Link | None) -> Any:
        """The multicallable of this method on a link. It takes bytes where the request is one message."""
        assert link is not None
        found = self.starts.get(link)
        if found is None:
            # Stubs that are made anew for each call find what others left on the link.
            found = link.methods.get(self._key)
            if found is None:
                kind, name, serializer, deserializer, is_registered = self._key
                if len(link.methods) >= METHODS_KEPT:
                    link.methods.clear()
                found = link.methods[self._key] = getattr(link.channel, kind)(
                    name,
                    request_serializer=None if self.is_replayable else _told(serializer, self.tally, 1, 0),
                    response_deserializer=_told(deserializer, self.tally, 0, 1) if kind.endswith("stream") else deserializer,
                    _registered_method=is_registered,
                )
            if len(self.starts) >= STARTS_KEPT or any(known.is_left for known in self.starts):
                self.starts.clear()
            self.starts[link] = found
        return found


def _told(turn: Callable[[Any], Any] | None, tally: core.Tally, sent: int, received: int) -> Callable[[Any], Any]:
    """A (de)serializer that counts: the messages of a stream are seen while it runs, and no iterator stands around gRPC's own."""
    add = tally.add
    if turn is None:

        def as_it_is(message: Any) -> Any:
            add(sent, received)
            return message

        return as_it_is

    def turned(message: Any) -> Any:
        add(sent, received)
        return turn(message)

    return turned
