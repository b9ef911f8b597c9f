"""THE INBOUND WAY: what happens to a call between the connection and the handler?

    observe > secure > admit > route > handle

Read `InboundWay.enter` from the top: what is met first stands first, as in the Rust gate (`core/src/server.rs`), which takes the
decisions in one step; this file only moves a call through them, and back by `leave`. The connection itself, and who is at its other
end, was settled before (`door.py`). The way knows no server: `asgi.py`, `wsgi.py` and `grpc.py` are its faces, and a face does what
the answer asks of it: refuse, or hand over the canonical path and the headers that were looked at, and nothing else.
"""

from __future__ import annotations

import json
import logging
import math
import os
import time
import uuid
import weakref
from collections.abc import Awaitable, Callable, Sequence
from contextvars import Token
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Final

from .._native import core
from ..call import HEADER_NO_RETRY, Peer, Visit, current_deadline, current_layer, current_visit
from ..errors import ListenError
from .line import PLAIN, PLAIN_TLS
from .waiting import Room

if TYPE_CHECKING:
    from ..admit.inbound import InboundRates
    from ..observe.load import LoadMeter
    from ..secure.custom import Inquiry
    from ..secure.trust import Trust
    from .door import Door
    from .handed import Handed

__all__ = ["PLAIN", "PLAIN_TLS", "InboundWay"]

log = logging.getLogger("meshlib.server")

Headers = list[tuple[bytes, bytes]]
Tokens = tuple[Token[Visit | None], tuple[Token[float | None], Token[int]] | None]

# No status at all: the call ended before the application answered, because its client went away or it was cancelled.
NO_STATUS: Final = 0

# How much a call matters of which nobody says more.
ORDINARY: Final = "critical"


class InboundWay:
    """The way into one process: gate and observer, in the order in which a call meets them.

    `door` decides about connections, for the servers whose connections are ours. `wake` is called in a process before its first call
    (again after a fork): what a parent started does not live in its child.
    """

    __slots__ = (
        *(
            "__weakref__",
            "_meter",
            "clock",
            "depart",
            "door",
            "draw",
            "agent",
            "gate",
            "is_asleep",
            "is_closing",
            "observer",
            "rates",
            "recorder",
        ),
        *("room", "trust", "wake", "wall_clock"),
    )

    def __init__(
        self,
        gate: core.Gate,
        observer: Any = None,
        clock: Callable[[], float] = time.monotonic,
        *,
        door: Door | None = None,
        wake: Callable[[], object] | None = None,
        depart: Callable[[], Awaitable[object]] | None = None,
        trust: Trust | None = None,
        wall_clock: Callable[[], float] = time.time,
        room: Room | None = None,
    ) -> None:
        self.gate = gate
        self.trust = trust
        self.wall_clock = wall_clock
        self.observer = observer
        # Asked before a span is: without a tracing SDK there is none, and a trace is looked at when somebody asks for it.
        self.recorder: Callable[[], object] = getattr(observer, "recorder", _nobody if observer is None else _somebody)
        self.draw: Callable[[], tuple[int | None, bool]] = getattr(observer, "draw", _drawn)
        self.clock = clock
        self.door = door
        self.wake = wake
        # What a server that ends tells us, where it has no other word than the end of the lifespan.
        self.depart = depart
        self.is_asleep = wake is not None
        # The server ends: every answer is the last on its connection.
        self.is_closing = False
        self.room = room or Room(gate, clock)
        # The rates that all processes share, if there are any.
        self.rates: InboundRates | None = None
        # What the node agent tells of the connections that it holds for us, where it does.
        self.agent: Handed | None = None
        self._meter: LoadMeter | None = None
        _ways.add(self)

    def enter(
        self,
        method: str,
        target: bytes,
        headers: Headers,
        peer: Peer,
        source: str = "",
        port: int = 0,
        sni: str = "",
        version: str = "",
        *,
        is_public: bool = False,
        arrived: float | None = None,
    ) -> core.Entry:
        """Take one call in. If `status` of the answer is not 0, the call is refused and over; otherwise it must `leave`, once.

        `target` is the path as it came over the wire, with its query; `headers` is the whole list; `source` the address at the other
        end, `port` our own, `version` that of HTTP, "" and 0 where the server doesn't tell; `arrived` when it came into the process,
        where it has waited for a thread since: its deadline and its time count from there. Where the answer has a `ticket`, it waits
        for a place (`wait`); what else is to be done stands in its `todo`: it goes on with `consent` and `handed`. `asgi.py` takes the
        same step by `gate.arrive`, which reads a scope where it lies.
        """
        if self.is_asleep:
            self.rise_quietly()
        # observe: the time starts here, and the gate counts what it refuses.
        now = self.clock()
        # secure: the one canonical path, sound headers, a token, who may do this; the identity is the connection's.
        # admit: time left, and room for one more.
        # route: the label under which the call is counted.
        entry = self.gate.begin(
            method,
            target,
            headers,
            peer.spiffe_id,
            peer.is_tls,
            now,
            None,
            self.wall_clock(),
            source,
            port,
            sni,
            version,
            is_public,
            arrived,
        )
        if entry.status:
            self.told(entry, method, target, peer)
        return entry

    async def wait(self, entry: core.Entry, peer: Peer, lost: int = NO_STATUS) -> bool:
        """admit: wait until there is a place for an entry with a `ticket`. False: the call is refused and over.

        `lost` is the status of a call that is cancelled meanwhile.
        """
        return await self.room.wait(entry, lost) or self._over(entry, peer)

    def wait_blocking(self, entry: core.Entry, peer: Peer) -> bool:
        """The same for threads."""
        return self.room.wait_blocking(entry) or self._over(entry, peer)

    def _over(self, entry: core.Entry, peer: Peer) -> bool:
        self.told(entry, entry.method, entry.raw_path, peer)
        return False

    def told(self, entry: core.Entry, method: str, target: bytes, peer: Peer) -> None:
        """A refusal: into the log, and to whoever can do something about it."""
        if entry.reason.startswith("admit."):
            # It may have taken the place of somebody who waits.
            self.room.call(self.gate.called())
        if self.trust is not None and self.trust.keys is not None and (provider := entry.wants_keys):
            self.trust.keys.nudge(provider)
        if log.isEnabledFor(logging.INFO):
            caller = peer.spiffe_id or "a caller without identity"
            # The query may hold what is nobody's to read: it never gets into a log.
            path = shown(target.split(b"?", 1)[0].split(b"#", 1)[0])
            log.info("%d %s: %s %s by %s: %s", entry.status, entry.reason, shown(method), path, shown(caller), entry.detail)

    def handed(self, entry: core.Entry, peer: Peer, headers: Headers, kept: Headers) -> Headers:
        """The headers for the handler of an entry with TODO_HEADERS: `kept`, with what the policy takes out or puts in."""
        from .trusted import handed

        return handed(entry, peer, headers, kept)

    async def fits(self, entry: core.Entry, peer: Peer, headers: Headers) -> bool:
        """admit: ask the stores of the rates that all processes share. False: the call is refused and over."""
        if not self.rates:
            return True
        answer = await self.rates.take(entry.route, peer.spiffe_id, entry.client, headers)
        return answer is None or self._counted(answer, entry, peer)

    def fits_blocking(self, entry: core.Entry, peer: Peer, headers: Headers) -> bool:
        """The same for threads."""
        if not self.rates:
            return True
        answer = self.rates.take_blocking(entry.route, peer.spiffe_id, entry.client, headers)
        return answer is None or self._counted(answer, entry, peer)

    def _counted(self, answer: Any, entry: core.Entry, peer: Peer) -> bool:
        if isinstance(answer, float):
            called: list[int] | None = entry.outrun(answer)
        else:
            # The store is away, and this process counts by itself.
            called = entry.stand_in(self.clock())
            if called is None:
                return True
        self.room.call(called or ())
        return self._over(entry, peer)

    async def consent(self, entry: core.Entry, peer: Peer, headers: Headers) -> bool:
        """secure: ask the authorizer that a CUSTOM rule names. False: the call is refused and over. No answer is a no."""
        name = entry.custom
        if not name:
            return True
        if self.trust is not None and await self.trust.authorizers.ask(name, inquiry(entry, peer, headers)):
            return True
        return self._vetoed(entry, peer)

    def consent_blocking(self, entry: core.Entry, peer: Peer, headers: Headers) -> bool:
        """The same for threads."""
        name = entry.custom
        if not name:
            return True
        if self.trust is not None and self.trust.authorizers.ask_blocking(name, inquiry(entry, peer, headers)):
            return True
        return self._vetoed(entry, peer)

    def _vetoed(self, entry: core.Entry, peer: Peer) -> bool:
        self.room.call(entry.veto())
        return self._over(entry, peer)

    def span(self, method: str, entry: core.Entry, headers: Headers, peer: Peer, number: int | None = None) -> Any | None:
        """observe: the call's place in its trace, begun; to be ended with `end(status, error)`. None where nobody observes."""
        if self.observer is None:
            return None
        try:
            drawn = {} if number is None else {"number": number}
            span = self.observer.server_span(method, entry.route, headers, peer.spiffe_id, path=entry.path, **drawn)
            return None if span is None else span.__enter__()
        except Exception:
            log.exception("a call could not be traced; it goes on")
            return None

    def leave(self, entry: core.Entry, status: int) -> None:
        """The call is over: measured, and its place is free for another. Only the first time counts."""
        called = entry.finish(status, self.clock())
        if called:
            self.room.call(called)

    def load(self, form: str) -> Headers:
        """observe: how loaded this process is, as the header of an answer to a caller that asked for it in this form."""
        if self._meter is None:
            from ..observe.load import LoadMeter

            self._meter = LoadMeter(self.gate, self.clock)
        report = self._meter.report(form)
        return [(LOAD, report)] if report else []

    def rise(self) -> None:
        """Start what belongs to this process, if it was not started in it."""
        self.is_asleep = False
        if self.wake is not None:
            self.wake()

    def rise_quietly(self) -> None:
        """The same, when a call is there already."""
        try:
            self.rise()
        except ListenError as error:
            # Metrics, at an address that another worker of ours has: no reason to refuse calls.
            log.warning("%s", error)

    def sleep(self) -> None:
        # Also one that has nothing to wake: its server stayed with the parent, and this process serves when a call comes.
        self.is_asleep = True
        self.is_closing = False
        self.room.renew()
        self._meter = None


def inquiry(entry: core.Entry, peer: Peer, headers: Headers) -> Inquiry:
    """What an authorizer is asked."""
    from ..secure.custom import Inquiry

    said = entry.claims
    return Inquiry(
        method=entry.method,
        path=entry.path,
        host=next((value.decode("latin-1") for name, value in headers if name == b"host"), ""),
        peer=peer,
        headers=tuple(headers),
        claims=None if said is None else json.loads(said),
        client=entry.client,
    )


# handle: what a handler and its outgoing calls see of the call that they serve.


def _nobody() -> None:
    return None


def _somebody() -> bool:
    return True


def _drawn() -> tuple[int | None, bool]:
    return None, True


def visit_of(entry: core.Entry, peer: Peer, headers: Sequence[tuple[bytes, bytes]], layer: int = 0) -> Visit:
    """A call that was let in, as its handler sees it."""
    visit = Visit(peer, entry, headers, max(layer, entry.layer))
    visit.end = entry.deadline
    if entry.priority != ORDINARY:
        visit.priority = entry.priority
    return visit


def step_in(visit: Visit) -> Tokens:
    """Set the context of a handler, all of it: a server may run a call in the context of another, which must not show."""
    token = current_visit.set(visit)
    if current_deadline.get() is None and not current_layer.get():
        return token, None
    return token, (current_deadline.set(None), current_layer.set(0))


def step_out(tokens: Tokens) -> None:
    """Give the context back as it was found."""
    of_visit, others = tokens
    current_visit.reset(of_visit)
    if others is not None:
        current_deadline.reset(others[0])
        current_layer.reset(others[1])


# Of a failed answer whose handler has tried all that may be tried, and of what was shed: whoever called us had better not try it again.
NO_RETRY: Final = (HEADER_NO_RETRY.encode(), b"1")
CLOSE: Final = (b"connection", b"close")
LOAD: Final = b"endpoint-load-metrics"
REQUEST_ID: Final = b"x-request-id"


def frozen(headers: Headers) -> Headers:
    """The headers that the handler sees, as a list of its own (`core/src/secure/passage.rs` says which).

    Headers are frozen when authorised: nothing that is done to the server's list later shows in this one.
    """
    kept, wants_id = core.passed(headers)
    return [*kept, new_id()] if wants_id else kept


def new_id() -> tuple[bytes, bytes]:
    """It ends up in logs and in other systems: one that isn't a plain word, or stands twice, is replaced."""
    return REQUEST_ID, uuid.uuid4().hex.encode()


# What a caller is told who is refused: which kind of refusal, and nothing about rules. RFC 9457. Who runs the service has the log.
_TITLES: Final = {
    "server.not_ready": "The service is not ready",
    "secure.path": "The path is not acceptable",
    "secure.method": "The method is not acceptable",
    "secure.headers": "The headers are not acceptable",
    "secure.redirect": "The path has a canonical form",
    "secure.no_identity": "An identity is required",
    "secure.jwt": "A good token is required",
    "secure.custom": "Not allowed",
    "secure.proof_ended": "The proof of identity has ended",
    "secure.denied": "Not allowed",
    "deadline.exceeded": "The time for this call is spent",
    "admit.limit": "The service is busy",
    "admit.shed": "The service is overloaded",
    "admit.rate": "Too many calls",
}
# Refused before anything was done, and not to be tried elsewhere: what is too much here, is too much.
_FINAL: Final = frozenset({"admit.shed", "admit.rate"})
_problems: dict[tuple[int, str], tuple[bytes, Headers]] = {}


def problem(status: int, reason: str) -> tuple[bytes, Headers]:
    """Body and headers of a refusal as problem details."""
    known = _problems.get((status, reason))
    if known is None:
        body = json.dumps(
            {
                "type": f"urn:meshlib:problem:{reason}",
                "title": _TITLES.get(reason, HTTPStatus(status).phrase),
                "status": status,
                "reason": reason,
            }
        ).encode()
        headers = [(b"content-type", b"application/problem+json"), (b"content-length", b"%d" % len(body))]
        if status == HTTPStatus.SERVICE_UNAVAILABLE:
            headers.append((b"retry-after", b"1"))
        if reason in _FINAL:
            headers.append(NO_RETRY)
        if status == HTTPStatus.UNAUTHORIZED:
            headers.append((b"www-authenticate", b"Bearer" if reason == "secure.jwt" else b"mTLS"))
        elif status == HTTPStatus.METHOD_NOT_ALLOWED:
            headers.append((b"allow", b"GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS"))
        known = _problems[status, reason] = body, headers
    return known


def refused(entry: core.Entry) -> tuple[bytes, Headers]:
    """The same for an entry, with what belongs to it alone: where the canonical path is, or when to come again."""
    body, headers = problem(entry.status, entry.reason)
    if location := entry.location:
        return body, [*headers, (b"location", location.encode("latin-1", "replace"))]
    if (wait := entry.retry_after) is not None:
        return body, [*headers, (b"retry-after", b"%d" % max(1, math.ceil(wait)))]
    return body, headers


def shown(text: str | bytes) -> str:
    """Text of a stranger, fit for a log: short, and without control characters."""
    whole = ascii(text if isinstance(text, str) else text.decode("latin-1"))[1:-1]
    return whole if len(whole) <= 200 else whole[:197] + "..."


# A fork takes the memory along and leaves the threads behind.
_ways: weakref.WeakSet[InboundWay] = weakref.WeakSet()


def _after_fork() -> None:
    for way in list(_ways):
        way.sleep()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
