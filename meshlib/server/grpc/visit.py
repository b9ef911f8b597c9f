"""What does one gRPC call meet on its way in and out, and what is it told?

`Reception.enter` is the inbound way of one call, `Exchange` the call itself from then on: it waits for a place or for somebody's word,
is the context of its handler, hears that its client has gone, and gives back what it was given. A refusal is told to the caller in
words that never change and name nothing; the log of this service has the rule.

It moves no message and wraps no handler: that is `handlers.py`. It does not cancel a handler: gRPC does that with those of asyncio,
and nobody can with those in threads.
"""

from __future__ import annotations

import asyncio
import time
from functools import lru_cache
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final

import grpc
import grpc.aio

from meshlib._native import core
from meshlib.call import Peer, Visit

from ..handed import HEADER
from ..line import PLAIN_TLS
from ..way import ORDINARY, Headers, InboundWay, step_in, step_out
from .peer import Callers

if TYPE_CHECKING:
    from ..handed import Handed

CARRIERS: Final = frozenset({"traceparent", "tracestate", "baggage"})
FOREVER: Final = 10 * 365 * 86400.0  # a blocking server says "no deadline" with a very large number

# The gate's status for a refusal, as gRPC's code and the words for the caller.
REFUSALS: Final[dict[int, tuple[grpc.StatusCode, str]]] = {
    401: (grpc.StatusCode.UNAUTHENTICATED, "no identity"),
    429: (grpc.StatusCode.RESOURCE_EXHAUSTED, "too many calls"),
    403: (grpc.StatusCode.PERMISSION_DENIED, "not allowed"),
    404: (grpc.StatusCode.UNIMPLEMENTED, "no such method"),
    503: (grpc.StatusCode.UNAVAILABLE, "too many calls"),
    504: (grpc.StatusCode.DEADLINE_EXCEEDED, "the deadline is over"),
}
UNKNOWN_METHOD: Final = grpc.StatusCode.UNIMPLEMENTED, "no such method"
OTHERWISE: Final = grpc.StatusCode.UNAVAILABLE, "refused"
LEFT: Final = grpc.StatusCode.CANCELLED, "the client has gone away"
# Refused before anything was done, and not to be tried elsewhere: what is too much here, is too much (gRFC A6).
FINAL: Final = frozenset({"admit.shed", "admit.rate"})
NO_RETRY: Final = (("grpc-retry-pushback-ms", "-1"),)

CANCELLED: Final[int] = grpc.StatusCode.CANCELLED.value[0]
# What `Entry.todo` asks for beyond letting in or refusing.
ATTEND: Final = core.TODO_WAIT | core.TODO_RATES | core.TODO_ASK


class Reception:
    """The inbound way for gRPC: one for a server."""

    __slots__ = ("_peer_of", "way")

    def __init__(self, way: InboundWay, callers: Callers) -> None:
        self.way = way
        self._peer_of = callers.peer_of

    def enter(self, method: str, context: Any, *, is_known: bool = True) -> Exchange:
        """Take one call in. If the exchange has a refusal, the call is over; otherwise it must be closed, once.

        `is_known`: there is a handler for its method.
        """
        way = self.way
        if way.is_asleep:
            way.rise_quietly()
        now = way.clock()
        peer, address = self._peer_of(context.auth_context()), address_of(context.peer())
        left = context.time_remaining()
        end = None if left is None or left > FOREVER else now + left
        metadata = context.invocation_metadata()
        if way.agent is not None and any(key == HEADER for key, _ in metadata):
            context, told = _handed(way.agent, context)
            metadata = context.invocation_metadata()
            if told is not None:
                peer, address = told
        # All of it: the gate knows what the policy asks about, by the same plan with which it judges.
        entry = way.gate.begin_grpc(
            method,
            peer.spiffe_id or None,
            peer.is_tls,
            now,
            end,
            metadata,
            way.wall_clock(),
            address,
            can_wait=True,
        )
        exchange = Exchange(way, entry, peer, context, method, metadata)
        if not is_known:
            exchange.is_known = False
        if way.recorder() is not None:
            carriers = _carriers(metadata)
            exchange.span = way.observer.server_span("POST", entry.route, carriers, peer.spiffe_id, rpc=method, is_known=is_known)
        if entry.status:
            way.told(entry, "POST", method.encode("latin-1", "replace"), peer)
            exchange.refuse()
        return exchange


class Exchange(Visit):
    """One call inside: what its handler and everything on its behalf see of it. A context manager around the handler."""

    entry: core.Entry
    peer: Peer
    span: Any = None
    # Code, words, and metadata where there is any: what the caller is told in the handler's place.
    refusal: tuple[Any, ...] | None = None
    # gRPC has ended the call while it was under way: its client has left, or its time is over.
    is_left = False
    is_over = False
    # There is a handler for its method. Names that callers invent are not counted one by one.
    is_known = True
    # Messages, and how many answers a good end is, beside those of a stream.
    sent = 0
    received = 0
    answers = 0
    _tokens: Any = None

    def __init__(self, way: InboundWay, entry: core.Entry, peer: Peer, context: Any, method: str, metadata: Any) -> None:
        self.todo = todo = entry.todo
        super().__init__(peer, entry, _carriers(metadata) if todo & core.TODO_TRACED else (), entry.layer)
        self._way = way
        self._context = context
        self._method = method
        if todo & core.TODO_DEADLINE:
            self.end = entry.deadline
        if todo & core.TODO_PRIORITY and entry.priority != ORDINARY:
            self.priority = entry.priority
        self.ends_calls = not todo & core.TODO_KEEP

    # --- in

    async def attend(self) -> None:
        """Everything that is not the rule: a wait for a place, a store or somebody to ask. A no is a refusal."""
        way, entry, peer, todo = self._way, self.entry, self.peer, self.todo
        headers = fields_of(self._context.invocation_metadata())
        try:
            has_place = not todo & core.TODO_WAIT or await way.wait(entry, peer, CANCELLED)
            fits = has_place and (not todo & core.TODO_RATES or await way.fits(entry, peer, headers))
            if fits and todo & core.TODO_ASK:
                await way.consent(entry, peer, headers)
        except BaseException as problem:
            # Cancelled: the caller has gone, and the place is free.
            self.close(grpc.StatusCode.CANCELLED, problem)
            raise
        if entry.status:
            self.refuse()

    def attend_blocking(self) -> None:
        """The same for threads."""
        way, entry, peer, todo = self._way, self.entry, self.peer, self.todo
        headers = fields_of(self._context.invocation_metadata())
        try:
            has_place = not todo & core.TODO_WAIT or way.wait_blocking(entry, peer)
            if has_place and self.is_left:
                # Meanwhile: nobody waits for what the handler would do.
                self.close(grpc.StatusCode.CANCELLED)
                self.refusal = LEFT
                return
            fits = has_place and (not todo & core.TODO_RATES or way.fits_blocking(entry, peer, headers))
            if fits and todo & core.TODO_ASK:
                way.consent_blocking(entry, peer, headers)
        except BaseException as problem:
            self.close(grpc.StatusCode.CANCELLED, problem)
            raise
        if entry.status:
            self.refuse()

    def refuse(self) -> None:
        """The gate has said no, at once or after a wait."""
        entry = self.entry
        self.refusal = refused = refusal(entry)
        self.is_over = True
        if self.span is not None:
            self.span.end(entry.status, _Ended(refused[0]))

    def shown(self, context: Any) -> Any:
        """The context as the handler sees it: without the node agent's word, which is for us alone."""
        return self._context if isinstance(self._context, _Handed) else context

    def listen(self) -> None:
        """Hear of it when gRPC ends the call. For handlers in threads, whom nobody cancels."""
        # A server of asyncio answers nothing, and calls nobody back (`handlers.py` hears of it in another way).
        if self._context.add_callback(self.gone) is False:
            self.gone()

    def gone(self) -> None:
        """gRPC says, from a thread of its own, that the call is over: by its end, or because the client has left or has no time."""
        if self.is_over:
            return
        self.is_left = True
        if self.ends_calls:
            self.cut()

    # --- back

    def __enter__(self) -> Exchange:
        self._tokens = step_in(self)
        if self.span is not None:
            self.span.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close(code_of(self._context, error), error)

    def close(self, code: grpc.StatusCode, error: BaseException | None = None) -> None:
        """The call ended with a code: its place is free for another, and its thread as it was found."""
        if self.is_over:
            return
        self.is_over = True
        if self.is_left and code is grpc.StatusCode.OK:
            # What the handler says to a client that has gone away was no answer.
            code = code_of(self._context, asyncio.CancelledError())
        elif self.ends_calls and isinstance(error, asyncio.CancelledError):
            # What other tasks do on behalf of this call is not wanted any more either.
            self.cut()
        elif code is grpc.StatusCode.OK:
            self.sent += self.answers
        self.over()
        way, number = self._way, code.value[0]
        way.leave(self.entry, number)
        span = self.span
        if way.observer is not None and self.is_known:
            way.observer.tally("server", self.peer.spiffe_id, self._method).add(self.sent, self.received)
        if span is not None:
            span.messages(self.sent, self.received)
            span.end(number, None if code is grpc.StatusCode.OK else _Ended(code))
        tokens, self._tokens = self._tokens, None
        if tokens is not None:
            try:
                step_out(tokens)
            except ValueError:
                pass  # a stream that was dropped in another context, which never was the handler's
        # What outlives the call keeps its visit, and needs nothing of gRPC's for that.
        self._context = None


class _Handed:
    """The context of a call that was handed over by the node agent. All but its metadata is gRPC's own."""

    __slots__ = ("_context", "_metadata")

    def __init__(self, context: Any, metadata: Any) -> None:
        self._context = context
        self._metadata = metadata

    def invocation_metadata(self) -> Any:
        return self._metadata

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)


def _handed(agent: Handed, context: Any) -> tuple[Any, tuple[Peer, str] | None]:
    """What the node agent says of a call, and the context without that. None if it wasn't the agent who said it."""
    values, rest = [], []
    for pair in context.invocation_metadata():
        if pair[0] == HEADER:
            values.append(pair[1].encode("latin-1", "replace") if isinstance(pair[1], str) else pair[1])
        else:
            rest.append(pair)
    told = agent.told(values)
    seen = _Handed(context, tuple(rest))
    return seen, None if told is None else (PLAIN_TLS if agent.is_over(told) else told.peer, told.address)


class _Ended(Exception):  # never raised: a span asks it for a code
    def __init__(self, code: grpc.StatusCode) -> None:
        super().__init__()
        self._code = code

    def code(self) -> grpc.StatusCode:
        return self._code


def refusal(entry: core.Entry) -> tuple[Any, ...]:
    """What a caller is told of a refusal: words that never change, so that they tell nothing."""
    if entry.reason.startswith("secure.") and entry.status not in (401, 403):
        return UNKNOWN_METHOD
    told = REFUSALS.get(entry.status, OTHERWISE)
    return (*told, NO_RETRY) if entry.reason in FINAL else told


def code_of(context: Any, error: BaseException | None) -> grpc.StatusCode:
    """How a handler ended: by the code that it set, or by what it raised."""
    # In an asyncio server, a blocking handler's context does not tell the code.
    told: Any = context.code() if hasattr(context, "code") else None
    code: grpc.StatusCode | None = _CODES.get(told) if isinstance(told, int) else told
    if error is None:
        return code or grpc.StatusCode.OK
    if isinstance(error, (asyncio.CancelledError, GeneratorExit)):
        is_late = context.time_remaining() == 0
        return grpc.StatusCode.DEADLINE_EXCEEDED if is_late else grpc.StatusCode.CANCELLED
    return code or grpc.StatusCode.UNKNOWN


_CODES: Final = {code.value[0]: code for code in grpc.StatusCode}


def _carriers(metadata: Any) -> Headers:
    """What concerns the trace."""
    return [
        (key.encode(), value.encode("latin-1", "replace"))
        for key, value in metadata
        if key in CARRIERS and isinstance(value, str)
    ]


def fields_of(metadata: Any) -> Headers:
    """Metadata as HTTP has them."""
    return [
        (key.encode(), value.encode("latin-1", "replace") if isinstance(value, str) else value) for key, value in metadata or ()
    ]


@lru_cache(maxsize=1024)
def address_of(peer: str) -> str:
    """`ipv4:127.0.0.1:50051`, `ipv6:%5B::1%5D:50051`: the address alone; "" for a socket without one."""
    kind, _, rest = peer.partition(":")
    if kind not in ("ipv4", "ipv6"):
        return ""
    return rest.rpartition(":")[0].replace("%5B", "").replace("%5D", "").strip("[]")


def reception_of(mesh: Any) -> Reception:
    """The way of a mesh for one server."""
    way = InboundWay(mesh.gate, mesh.observer, trust=mesh.trust, room=mesh.room)
    way.rates = mesh.inbound_rates
    way.agent = getattr(mesh, "handed", None)
    mesh.ways.add(way)
    return Reception(way, Callers(lambda: mesh.identity.current if mesh.identity is not None else None, time.time))


__all__ = ["Exchange", "Reception", "address_of", "code_of", "fields_of", "reception_of", "refusal"]
