"""What travels down with a call and back up?

The context that a handler and its outgoing calls share, a `Visit`: who called us (`Peer`), until when there is time (`deadline`), how
often our caller has tried. And the `Call` that just came back, with its record. Context variables carry it through tasks and
`asyncio.to_thread`; no thread-local and no argument has to be passed along. This module decides nothing.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from ._native import core
from .errors import CallerGone

HEADER_DEADLINE = "x-mesh-deadline-ms"
HEADER_ATTEMPT = "x-mesh-attempt"
# Our key in `tracestate`, which passes through hops that know nothing but traces.
STATE = "meshlib"
# On a failed answer: what may be tried has been tried further down.
HEADER_NO_RETRY = "x-mesh-no-retry"
# How much a call matters, in words of the SRE book.
HEADER_PRIORITY = "x-mesh-priority"


@dataclass(frozen=True, slots=True)
class Peer:
    """Who called, as proved by the connection. `spiffe_id` is "" for a caller without identity (modes observe and permissive)."""

    spiffe_id: str
    is_tls: bool = False
    serial: str = ""
    not_after: float = 0.0
    chain: tuple[bytes, ...] = field(default=(), repr=False)

    @property
    def trust_domain(self) -> str:
        return self.spiffe_id.removeprefix("spiffe://").split("/", 1)[0]

    @property
    def service(self) -> str:
        """The last segment of the SPIFFE ID: the service account, by convention the service's name."""
        return self.spiffe_id.rsplit("/", 1)[-1] if self.spiffe_id else ""


class Call:
    """What the application asked once, with the story of how it went. Found at `response.extensions["meshlib.call"]`."""

    __slots__ = ("_native", "_trail", "fallback", "method", "target")

    def __init__(self, native: core.Call, method: str, target: str, trail: list[str] | None = None) -> None:
        self._native = native
        # Who carried each attempt ("agent", or why it was this process), where calls are delegated to the node agent.
        self._trail = trail
        self.method = method
        self.target = target
        # The word of what answered in its place: value, last_good or callable.
        self.fallback = ""

    @property
    def service(self) -> str:
        return self._native.service

    @property
    def route(self) -> str:
        return self._native.route

    @property
    def attempts(self) -> int:
        """How often it was sent."""
        return sum(1 for event in self._native.record()["events"] if event["phase"] == "balance")

    def record(self) -> dict[str, Any]:
        """The decisions in order, for programs: candidates, choices, verdicts, waits. Times in milliseconds since the beginning."""
        record = {**self._native.record(), "method": self.method, "path": self.target}
        if self._trail is not None:
            record["carried"] = list(self._trail)
        if self.fallback:
            record["fallback"] = self.fallback
        return record

    def explain(self) -> str:
        """The same for people: which route, who was a candidate, what each attempt did, and why it was (not) tried again."""
        from .observe.explain import explain

        return explain(self.record())

    def __repr__(self) -> str:
        return f"<Call {self.method} {self.service}{self.target} route={self.route} attempts={self.attempts}>"


# Where a failed call hangs on an exception that isn't ours.
MARK = "__meshlib_call__"


def call_of(error: BaseException) -> Call | None:
    """The record of the call that ended with this exception: of a guarded function, or of the mesh's own errors."""
    call = getattr(error, MARK, None) or getattr(error, "call", None)
    return call if isinstance(call, Call) else None


@dataclass(frozen=True, slots=True)
class CallPolicy:
    """What one call asks for beyond the configuration. None leaves it to the route.

    `idempotent`: may it be done twice? `timeout`: seconds for the whole call, in place of the route's deadline. `retries`: how often
    it may be sent again, 0 to 10; the budget stays in force. `hedge`: seconds, at most 60, that an attempt may be without an answer
    before a second one goes to another endpoint; the first good answer counts, and the other attempt is cancelled. `zone`: endpoints
    of this zone first; the others only when none of it is healthy and untried. A zone that discovery doesn't know changes nothing.
    `wait` and `stop`: strategies of tenacity (``wait_random_exponential()``, ``stop_after_delay(2)``) or callables over its
    RetryCallState, asked only when a retry is due: seconds in place of the configured backoff, and whether to give up. `key`: the
    key for services that are balanced by a hash, in place of what the configuration names. `labels`: only endpoints that carry these.
    `fallback`: what the caller gets where every attempt failed: a value, `meshlib.last_good()` or a callable (sync or async) that
    is given the error; `...` for none.

    A call is hedged once at most, and only if it is idempotent, its body is in memory, nobody further up is retrying, and the budget
    of retries has one left. The hedge is none of the `retries`: with 0 of them there is still one hedge, and after a failure of both
    attempts the retries are still there. A blocking client has one thread, so that it can't wait for two answers: it doesn't hedge.
    The call's record says why there was none.

    Raises `ValueError` for what is out of range.
    """

    idempotent: bool | None = None
    timeout: float | None = None
    retries: int | None = None
    hedge: float | None = None
    zone: str | None = None
    wait: Callable[[Any], float] | None = field(default=None, repr=False)
    stop: Callable[[Any], bool] | None = field(default=None, repr=False)
    key: str | None = field(default=None, repr=False)
    labels: Mapping[str, str] | None = field(default=None, hash=False)
    fallback: Any = field(default=..., repr=False, hash=False)

    @property
    def has_fallback(self) -> bool:
        return self.fallback is not ...

    def __post_init__(self) -> None:
        if self.timeout is not None and not 0 < self.timeout <= 86400:
            raise ValueError(f"timeout={self.timeout!r}: seconds above 0, at most 86400, are expected")
        if self.retries is not None and not 0 <= self.retries <= 10:
            raise ValueError(f"retries={self.retries!r}: a number from 0 to 10 is expected")
        if self.hedge is not None and not 0 < self.hedge <= 60:
            raise ValueError(f"hedge={self.hedge!r}: seconds above 0, at most 60, are expected")
        if self.zone is not None and (not isinstance(self.zone, str) or not self.zone):
            raise ValueError(f"zone={self.zone!r}: the name of a zone is expected, or None for any")
        for name, strategy in (("wait", self.wait), ("stop", self.stop)):
            if strategy is not None and (not callable(strategy) or isinstance(strategy, type)):
                raise ValueError(f"{name}={strategy!r}: one of tenacity's {name}_* objects or a callable(state) is expected")
        if self.key is not None and (not isinstance(self.key, str) or not self.key):
            raise ValueError("key: a text that isn't empty is expected, or None for what the configuration names")
        if self.labels is not None and not _are_labels(self.labels):
            raise ValueError(f"labels={self.labels!r}: a mapping of texts is expected, such as {{'version': 'v2'}}")
        if isinstance(self.fallback, type):
            text = (
                f"fallback={self.fallback.__name__}: a value, meshlib.last_good() or a callable(error) is expected, not a class"
            )
            raise ValueError(text)  # noqa: TRY004  # as for every other value that can't be used


def _are_labels(labels: object) -> bool:
    return isinstance(labels, Mapping) and all(
        isinstance(name, str) and name and isinstance(value, str) for name, value in labels.items()
    )


NO_POLICY = CallPolicy()


def policy(
    *,
    idempotent: bool | None = None,
    timeout: float | None = None,
    retries: int | None = None,
    hedge: float | None = None,
    zone: str | None = None,
    wait: Callable[[Any], float] | None = None,
    stop: Callable[[Any], bool] | None = None,
    key: str | None = None,
    labels: Mapping[str, str] | None = None,
    fallback: Any = ...,
) -> dict[str, CallPolicy]:
    """A `CallPolicy` in the form that httpx takes: ``http.post(url, extensions=meshlib.policy(idempotent=True))``."""
    return {"meshlib.policy": CallPolicy(idempotent, timeout, retries, hedge, zone, wait, stop, key, labels, fallback)}


class Visit:
    """One call that came in, as its handler and everything that runs on its behalf see it.

    One object for all of them, so that what ends with the call ends for them too: `end`, the absolute end in monotonic seconds, is
    None once the answer is given, and a task that outlives it has no deadline. `layer` tells in which attempt of our caller we run;
    above 0 the caller retries, and we must not. `priority` is how much it matters, and travels on. `headers` are those that the handler
    sees; `trace` is made of them when somebody asks. `is_gone`: the client has gone away, and what is asked on its behalf is not wanted
    any more.
    """

    # Made for every call, and nearly always all of this stays as it is: so it stands here, and not in each of them.
    end: float | None = None
    priority = ""
    trace: Any = None
    # Of which the ids of a new trace are made, where that was decided before anybody asked.
    number: int | None = None
    is_gone = False
    # Whether somebody would notice that the client goes away, and the route wants its calls to end then.
    ends_calls = False
    # The idempotent calls that are under way on its behalf.
    _errands: set[Errand] | None = None

    def __init__(
        self, peer: Peer | None, entry: core.Entry | None = None, headers: Sequence[tuple[bytes, bytes]] = (), layer: int = 0
    ) -> None:
        self.peer = peer
        self.entry = entry
        self.headers = headers
        self.layer = layer

    def errand(self) -> Errand:
        """An idempotent call goes out on behalf of this one: until its `end` it is cut when the client goes away. Raises `CallerGone`."""
        if self.is_gone:
            raise gone_away()
        if self._errands is None:
            self._errands = set()
        made = Errand(self._errands)
        self._errands.add(made)
        if self.is_gone:
            # Another thread has said so meanwhile, and may not have seen this one.
            self._errands.discard(made)
            raise gone_away()
        return made

    def cut(self) -> None:
        """The client has gone away: what waits for an idempotent call is told so."""
        self.is_gone = True
        for errand in tuple(self._errands or ()):
            errand.cut()

    def over(self) -> None:
        """The call has its answer. What runs on has time of its own, tries of its own, and no client that could go away."""
        self.end = None
        self.layer = 0
        self.priority = ""
        self.ends_calls = self.is_gone = False


class Errand:
    """One idempotent call on behalf of a visit, and the task that waits for it; a thread that waits can't be told."""

    __slots__ = ("_before", "_is_cut", "_others", "_task")

    def __init__(self, others: set[Errand]) -> None:
        import asyncio

        self._others = others
        try:
            self._task = asyncio.current_task()
        except RuntimeError:
            self._task = None
        # As asyncio.timeout does it: who else cancels the task is still heard.
        self._before = 0 if self._task is None else self._task.cancelling()
        self._is_cut = False

    def cut(self) -> None:
        """By the task's own loop, whichever thread the word of it comes from."""
        import asyncio

        self._others.discard(self)
        task = self._task
        if task is None:
            return
        self._is_cut = True
        loop = task.get_loop()
        try:
            if loop is asyncio.get_running_loop():
                task.cancel("the client has gone away")
            else:
                loop.call_soon_threadsafe(task.cancel, "the client has gone away")
        except RuntimeError:
            self._is_cut = False  # its loop is closed, and it with it

    def end(self, error: BaseException | None = None) -> bool:
        """That call is over, before anything else is awaited. True if it was cut because the client has gone, and for no other reason."""
        self._others.discard(self)
        if not self._is_cut or self._task is None:
            return False
        import asyncio

        self._is_cut = False
        return self._task.uncancel() <= self._before and isinstance(error, asyncio.CancelledError)


def gone_away() -> CallerGone:
    return CallerGone(
        "the client of the call that this handler serves has gone away, so that this call on its behalf is not wanted any more.",
        hint="Nothing is to be done. To go on all the same: `on_disconnect: nothing` on the route.",
    )


current_visit: ContextVar[Visit | None] = ContextVar("meshlib.visit", default=None)
# What the application itself has set: by `deadline`, and for calls that repeat others.
current_deadline: ContextVar[float | None] = ContextVar("meshlib.deadline", default=None)
current_layer: ContextVar[int] = ContextVar("meshlib.layer", default=0)


def outer_end() -> float | None:
    """The absolute end of what runs now, in monotonic seconds: the earlier of the application's own and that of the call it serves."""
    own, visit = current_deadline.get(), current_visit.get()
    if visit is None or visit.end is None:
        return own
    return visit.end if own is None or visit.end < own else own


def outer_layer() -> int:
    """In which attempt of anybody further up we run: 0 in the first."""
    own, visit = current_layer.get(), current_visit.get()
    return own if visit is None else max(own, visit.layer)


def peer() -> Peer | None:
    """Who called the handler that runs now, as proved by its connection; None outside a handler."""
    visit = current_visit.get()
    return None if visit is None else visit.peer


def claims() -> dict[str, Any] | None:
    """What the token of the call that the running handler serves says, as verified; None without a token or outside a handler."""
    visit = current_visit.get()
    said = None if visit is None or visit.entry is None else visit.entry.claims
    return None if said is None else json.loads(said)


def current_call() -> Mapping[str, Any] | None:
    """The decisions on the call that the running handler serves (rule, path, peer, deadline …); None outside a handler."""
    visit = current_visit.get()
    return None if visit is None or visit.entry is None else visit.entry.record()


def remaining(now: float | None = None) -> float | None:
    """Seconds left of the current deadline, None without one; negative when it is spent."""
    end = outer_end()
    return None if end is None else end - (time.monotonic() if now is None else now)


@contextmanager
def deadline(seconds: float) -> Iterator[float]:
    """Cut everything under it, at most `seconds` from now; an outer, earlier deadline stays in force.

    Yields the absolute end in monotonic seconds. It travels with outgoing calls as a header.
    """
    end = time.monotonic() + seconds
    outer = outer_end()
    if outer is not None and outer < end:
        end = outer
    token = current_deadline.set(end)
    try:
        yield end
    finally:
        current_deadline.reset(token)
