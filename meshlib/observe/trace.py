"""Which trace does this call belong to, and how does the next hop learn of it?

W3C Trace Context, read and written by ourselves: every call passes here, and OpenTelemetry's propagator knows neither
our header lists nor whether who sent them is trusted. A process without a tracing SDK makes no spans, so it names none:
what came in goes out unchanged, and only a call that has no trace yet gets a new one, with the decision whether it is
sampled.

What a stranger sends is input like any other. A malformed traceparent begins a new trace; too long or too many
tracestate members are dropped, not cut; the sampled flag counts only from a caller whose identity was proved, since it
costs money, and so does baggage. Baggage goes on to services of the mesh, never to other hosts, and is never an
attribute nor part of a decision.

It makes no spans: `spans.py` does, where the application configured OpenTelemetry's SDK.
"""

from __future__ import annotations

import os
import random
import re
import threading
from collections.abc import Iterable, Sequence
from contextvars import ContextVar, Token
from typing import Final

from meshlib.call import Visit, current_visit

Headers = list[tuple[bytes, bytes]]
Seen = Sequence[tuple[bytes, bytes]]

TRACEPARENT: Final = b"traceparent"
TRACESTATE: Final = b"tracestate"
BAGGAGE: Final = b"baggage"

LONGEST_REST: Final = 512  # of a traceparent of a later version
MOST_MEMBERS: Final = 32
LONGEST_STATE: Final = 2048  # the standard asks for 512 at least
MOST_BAGGAGE: Final = 180
LONGEST_BAGGAGE: Final = 8192

_PARENT: Final = re.compile(rb"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})")
_MEMBER: Final = re.compile(
    rb"(?:[a-z][a-z0-9_*/-]{0,255}|[a-z0-9][a-z0-9_*/-]{0,240}@[a-z][a-z0-9_*/-]{0,13})"
    rb"=[\x20-\x2b\x2d-\x3c\x3e-\x7e]{0,255}[\x21-\x2b\x2d-\x3c\x3e-\x7e]"
)
_BAGGAGE_MEMBER: Final = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+[ \t]*=[\x21\x23-\x2b\x2d-\x7e \t]*")
_CARRIERS: Final = frozenset((TRACEPARENT, TRACESTATE, BAGGAGE))
_LOW: Final = 2**64 - 1
_NO_TRACE: Final = b"0" * 32
_NO_SPAN: Final = b"0" * 16
_ODD: Final = b"13579bdf"

# Not the global source: an application that seeds it would give the same traces to all its processes.
_random = random.Random()  # names of traces are no secret
_lock = threading.Lock()


def _after_fork() -> None:
    global _lock
    _lock = threading.Lock()
    _random.seed()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


class Sampler:
    """Is a new trace recorded?

    By its id, so that all processes with the same share decide alike (OpenTelemetry's rule).
    """

    __slots__ = ("_bound", "share")

    def __init__(self, share: float) -> None:
        self.share = share
        self._bound = round(share * 2**64)

    def begins(self, number: int) -> bool:
        """Is the trace recorded that is made of this number?"""
        return self.is_sampled(number >> 64 or 1)

    def is_sampled(self, trace_id: int) -> bool:
        return trace_id & _LOW < self._bound


def new_number() -> int:
    """What the ids of a new trace and of its first span are made of."""
    return _random.getrandbits(192)


class Trace:
    """The place in a trace at which a call came in: what the calls of its handler have as their parent. A context
    manager.

    `headers` are those of the call that came in, names in lower case. What concerns the trace is taken at once and read
    when the first call goes out, since most handlers make none. Set `status` before the end, or don't: here it's of no
    use.
    """

    __slots__ = ("_fields", "_found", "_is_trusted", "_number", "_sampler", "_token", "status")

    def __init__(self, headers: Seen, sampler: Sampler, *, is_trusted: bool, number: int | None = None) -> None:
        self.status = 0
        self._fields = [pair for pair in headers if pair[0] in _CARRIERS]
        self._sampler = sampler
        self._is_trusted = is_trusted
        # Drawn now, so that threads that read at once read the same.
        self._number = new_number() if number is None else number
        self._found: _Found | None = None
        self._token: Token[Trace | None] | None = None

    def __enter__(self) -> Trace:
        self._token = current_trace.set(self)
        return self

    def __exit__(self, *error: object) -> None:
        self.end(self.status)

    def let_go(self) -> None:
        """It ends when nobody knows what runs by then: only a context that is still ours is given back."""
        if current_trace.get() is not self:
            self._token = None

    def messages(self, sent: int, received: int) -> None:
        """Nobody records them here."""

    def end(self, status: int, error: BaseException | None = None) -> None:
        token, self._token = self._token, None
        if token is not None:
            try:
                current_trace.reset(token)
            except ValueError:  # a server that ends a response in another context than the one that began it
                current_trace.set(None)

    def __repr__(self) -> str:
        found = self.found
        word = "sampled" if found.is_sampled else "not sampled"
        return f"<Trace {found.trace_id.decode()} {found.span_id.decode()} {word}>"

    @property
    def is_sampled(self) -> bool:
        """Is it to be recorded? Told without putting anything into words, since nearly all calls of a service are not."""
        if self._found is None and not self._fields:
            return self._sampler.begins(self._number)
        return self.found.is_sampled

    @property
    def found(self) -> _Found:
        """What the headers say, or a new trace if they say nothing valid."""
        if self._found is None:
            self._found = self._read()
        return self._found

    def _read(self) -> _Found:
        fields = self._fields
        parents = [value for name, value in fields if name == TRACEPARENT]
        # One caller sends one traceparent; of two, none is to be believed.
        parent = parse_traceparent(parents[0]) if len(parents) == 1 else None
        state = baggage = b""
        if len(fields) > len(parents):
            state = check_tracestate([value for name, value in fields if name == TRACESTATE])
            if self._is_trusted:
                baggage = check_baggage([value for name, value in fields if name == BAGGAGE])
        if parent is None:
            number, span = self._number >> 64 or 1, self._number & _LOW or 1
            is_sampled = self._sampler.is_sampled(number)
            return _Found(b"%032x" % number, b"%016x" % span, is_sampled, True, b"", baggage)
        trace_id, span_id, is_sampled = parent
        if not self._is_trusted:
            is_sampled = self._sampler.is_sampled(int(trace_id, 16))
        return _Found(trace_id, span_id, is_sampled, False, state, baggage)


class _Found:
    """A trace as its headers say it."""

    __slots__ = ("baggage", "headers", "inner_headers", "is_new", "is_sampled", "span_id", "state", "trace_id")

    def __init__(  # made at one place
        self, trace_id: bytes, span_id: bytes, is_sampled: bool, is_new: bool, state: bytes, baggage: bytes
    ) -> None:
        self.trace_id = trace_id
        self.span_id = span_id
        self.is_sampled = is_sampled
        self.is_new = is_new  # nobody is its parent
        self.state = state
        self.headers: Headers = [(TRACEPARENT, traceparent(trace_id, span_id, is_sampled))]
        if state:
            self.headers.append((TRACESTATE, state))
        self.baggage: Headers = [(BAGGAGE, baggage)] if baggage else []
        self.inner_headers = self.headers + self.baggage if baggage else self.headers


current_trace: ContextVar[Trace | None] = ContextVar("meshlib.trace", default=None)


def here(sampler: Sampler) -> Trace | None:
    """The place in a trace of what runs now; None where nothing has one.

    A call that came in without anybody who records it has one as soon as somebody asks, and then it's the same for all.
    """
    trace = current_trace.get()
    if trace is None:
        visit = current_visit.get()
        if visit is not None and visit.entry is not None:
            trace = visit.trace or _begin(visit, sampler)
    return trace


def _begin(visit: Visit, sampler: Sampler) -> Trace:
    with _lock:  # threads of one handler that ask at once get the same
        if visit.trace is None:
            is_trusted = visit.peer is not None and bool(visit.peer.spiffe_id)
            visit.trace = Trace(visit.headers, sampler, is_trusted=is_trusted, number=visit.number)
        trace: Trace = visit.trace
        return trace


def outgoing(sampler: Sampler, *, is_inner: bool = True) -> Headers:
    """The headers for a call made now. The list is shared: add it to another, don't change it.

    Baggage goes only to services of the mesh (`is_inner`).
    """
    trace = here(sampler)
    if trace is not None:
        found = trace.found
        return found.inner_headers if is_inner else found.headers
    number = _random.getrandbits(128) or 1
    form = b"00-%032x-%016x-01" if sampler.is_sampled(number) else b"00-%032x-%016x-00"
    return [(TRACEPARENT, form % (number, _random.getrandbits(64) or 1))]


def traceparent(trace_id: bytes, span_id: bytes, is_sampled: bool) -> bytes:
    """The header of version 00."""
    return (b"00-%b-%b-01" if is_sampled else b"00-%b-%b-00") % (trace_id, span_id)


def parse_traceparent(value: bytes) -> tuple[bytes, bytes, bool] | None:
    """Trace id, span id and sampled flag; None if it isn't valid. Later versions may be longer, and are read as this
    one.
    """
    match = _PARENT.match(value)
    if match is None:
        return None
    version, trace_id, span_id, flags = match.groups()
    if version == b"ff" or trace_id == _NO_TRACE or span_id == _NO_SPAN:
        return None
    rest = value[55:]
    if rest and (version == b"00" or not rest.startswith(b"-") or len(rest) > LONGEST_REST):
        return None
    return trace_id, span_id, flags[1] in _ODD


def check_tracestate(values: Iterable[bytes]) -> bytes:
    """Several headers as one; nothing if it breaks a rule or a limit."""
    members = [member.strip(b" \t") for member in b",".join(values).split(b",")]
    members = [member for member in members if member]
    keys = {member.partition(b"=")[0] for member in members}
    state = b",".join(members)
    if len(members) > MOST_MEMBERS or len(keys) != len(members) or len(state) > LONGEST_STATE:
        return b""
    return state if all(map(_MEMBER.fullmatch, members)) else b""


def check_baggage(values: Iterable[bytes]) -> bytes:
    """The same for baggage."""
    value = b",".join(values)
    if len(value) > LONGEST_BAGGAGE:
        return b""
    members = [member.strip(b" \t") for member in value.split(b",")]
    if len(members) > MOST_BAGGAGE or not all(map(_BAGGAGE_MEMBER.fullmatch, members)):
        return b""
    return value
