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
from collections.abc import Callable
from contextvars import Token
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Final

from .._native import core
from ..call import HEADER_NO_RETRY, Peer, current_deadline, current_entry, current_layer, current_peer
from ..errors import ListenError

if TYPE_CHECKING:
    from ..secure.custom import Inquiry
    from ..secure.trust import Trust
    from .door import Door

log = logging.getLogger("meshlib.server")

Headers = list[tuple[bytes, bytes]]
Tokens = tuple[Token[Peer | None], Token[core.Entry | None], Token[float | None] | None, Token[int] | None]

# Nobody whose connection proved who they are: a caller on a plain connection.
PLAIN: Final = Peer("")
PLAIN_TLS: Final = Peer("", is_tls=True)

# No status at all: the call ended before the application answered, because its client went away or it was cancelled.
NO_STATUS: Final = 0


class InboundWay:
    """The way into one process: gate and observer, in the order in which a call meets them.

    `door` decides about connections, for the servers whose connections are ours. `wake` is called in a process before its first call
    (again after a fork): what a parent started does not live in its child.
    """

    __slots__ = ("__weakref__", "_is_asleep", "clock", "door", "gate", "observer", "trust", "wake", "wall_clock")

    def __init__(
        self,
        gate: core.Gate,
        observer: Any = None,
        clock: Callable[[], float] = time.monotonic,
        *,
        door: Door | None = None,
        wake: Callable[[], object] | None = None,
        trust: Trust | None = None,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self.gate = gate
        self.trust = trust
        self.wall_clock = wall_clock
        self.observer = observer
        self.clock = clock
        self.door = door
        self.wake = wake
        self._is_asleep = wake is not None
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
    ) -> core.Entry:
        """Take one call in. If `status` of the answer is not 0, the call is refused and over; otherwise it must `leave`, once.

        `target` is the path as it came over the wire, with its query; `headers` is the whole list; `source` the address at the other
        end, `port` our own, `version` that of HTTP, "" and 0 where the server doesn't tell. Where the answer `has_more`, it goes on
        with `consent` and `handed`.
        """
        if self._is_asleep:
            try:
                self.rise()
            except ListenError as error:
                # Metrics, at an address that another worker of ours has: no reason to refuse calls.
                log.warning("%s", error)
        # observe: the time starts here, and the gate counts what it refuses.
        now = self.clock()
        # secure: the one canonical path, sound headers, a token, who may do this; the identity is the connection's.
        # admit: time left, and room for one more.
        # route: the label under which the call is counted.
        entry = self.gate.begin(
            method, target, headers, peer.spiffe_id, peer.is_tls, now, None, self.wall_clock(), source, port, sni, version
        )
        if entry.status:
            self.told(entry, method, target, peer)
        return entry

    def told(self, entry: core.Entry, method: str, target: bytes, peer: Peer) -> None:
        """A refusal: into the log, and to whoever can do something about it."""
        if self.trust is not None and self.trust.keys is not None and (provider := entry.wants_keys):
            self.trust.keys.nudge(provider)
        if log.isEnabledFor(logging.INFO):
            caller = peer.spiffe_id or "a caller without identity"
            # The query may hold what is nobody's to read: it never gets into a log.
            path = shown(target.split(b"?", 1)[0].split(b"#", 1)[0])
            log.info("%d %s: %s %s by %s: %s", entry.status, entry.reason, shown(method), path, shown(caller), entry.detail)

    def handed(self, entry: core.Entry, peer: Peer, headers: Headers, kept: Headers) -> Headers:
        """The headers for the handler of an entry that `has_more`: `kept`, with what the policy takes out or puts in."""
        from .trusted import handed

        return handed(entry, peer, headers, kept)

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
        entry.veto()
        self.told(entry, entry.method, entry.raw_path, peer)
        return False

    def span(self, method: str, entry: core.Entry, headers: Headers, peer: Peer) -> Any | None:
        """observe: the call's place in its trace, begun; to be ended with `end(status, error)`. None where nobody observes."""
        if self.observer is None:
            return None
        try:
            span = self.observer.server_span(method, entry.route, headers, peer.spiffe_id, path=entry.path)
            return None if span is None else span.__enter__()
        except Exception:
            log.exception("a call could not be traced; it goes on")
            return None

    def leave(self, entry: core.Entry, status: int) -> None:
        """The call is over: measured, and its place is free for another. Only the first time counts."""
        entry.finish(status, self.clock())

    def rise(self) -> None:
        """Start what belongs to this process, if it was not started in it."""
        self._is_asleep = False
        if self.wake is not None:
            self.wake()

    def sleep(self) -> None:
        self._is_asleep = self.wake is not None


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


def step_in(peer: Peer, entry: core.Entry, deadline: float | None, layer: int) -> Tokens:
    """Set the context of a handler, all of it: a server may run a call in the context of another, which must not show.

    `layer`: in which attempt of our caller we run; above 0 our own calls aren't retried.
    """
    return (
        current_peer.set(peer),
        current_entry.set(entry),
        current_deadline.set(deadline) if deadline is not None or current_deadline.get() is not None else None,
        current_layer.set(layer) if layer or current_layer.get() else None,
    )


def step_out(tokens: Tokens) -> None:
    """Give the context back as it was found."""
    of_peer, of_entry, of_deadline, of_layer = tokens
    current_peer.reset(of_peer)
    current_entry.reset(of_entry)
    if of_deadline is not None:
        current_deadline.reset(of_deadline)
    if of_layer is not None:
        current_layer.reset(of_layer)


def end_deadline() -> None:
    """What runs on from here has time of its own: behind a response, or in a conversation."""
    if current_deadline.get() is not None:
        current_deadline.set(None)


# secure: headers that say who somebody is, or what another proxy found out, count only over connections that are trusted to set them,
# and then `trusted.py` puts them back. Names with an underscore are the same name to a WSGI application. The mesh's own are read
# here, and are for nobody else.
_IDENTITY: Final = frozenset(
    {
        *(b"forwarded", b"x-forwarded-for", b"x-forwarded-host", b"x-forwarded-port", b"x-forwarded-proto", b"x-real-ip"),
        *(b"client-cert", b"client-cert-chain", b"x-spiffe-id", b"remote-user", b"x-remote-user", b"x-forwarded-user"),
        *(b"x-forwarded-prefix", b"x-forwarded-uri", b"x-forwarded-method"),
        # A framework that obeys them runs another method than the one that was authorised.
        *(b"x-http-method-override", b"x-http-method", b"x-method-override"),
        *(b"x-b3-sampled", b"x-b3-flags"),
    }
)
_FAMILIES: Final = (
    *(b"x-mesh-", b"x-envoy-", b"l5d-", b"ssl-client-", b"x-ssl-", b"x-tls-", b"x-client-", b"x-arr-", b"x-amzn-mtls-"),
    *(b"x-forwarded-client-cert", b"x-forwarded-tls-", b"x-auth-request-", b"x-amzn-oidc-", b"x-goog-authenticated-"),
    *(b"x-original-", b"x-rewrite-"),
)


# Of a failed answer whose handler has tried all that may be tried: whoever called us had better not try it again.
NO_RETRY: Final = (HEADER_NO_RETRY.encode(), b"1")


# Of these the value decides.
REQUEST_ID: Final = b"x-request-id"
RANGE: Final = b"range"
_JUDGED: Final = frozenset({REQUEST_ID, RANGE})
# A longer one, or one of more parts, is meant to cost more than it says; a server may ignore it (RFC 9110 section 14.2).
_LONGEST_RANGE: Final = 1024
_MOST_RANGES: Final = 32
_WORD: Final = b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-._~+/=:"


class _Names(dict[bytes, bool]):
    """Does a header of this (lower-case) name get in? Answers are remembered; the table is bounded, since callers choose the names."""

    def __missing__(self, name: bytes) -> bool:
        # Servers hand out lower case; one that does not must not open a gap.
        plain = name.lower()
        gets_in = plain not in _IDENTITY and not plain.startswith(_FAMILIES) and b"_" not in plain and plain not in _JUDGED
        if len(self) < 1024:
            self[name] = gets_in
        return gets_in


gets_in: Final = _Names()


def frozen(headers: Headers) -> Headers:
    """The headers that the handler sees, as a list of its own.

    Headers are frozen when authorised: nothing that is done to the server's list later shows in this one.
    """
    kept = [pair for pair in headers if gets_in[pair[0]]]
    if len(kept) != len(headers):
        kept += [pair for pair in headers if pair[0] == RANGE and _is_modest(pair[1])]
        ids = [value for name, value in headers if name == REQUEST_ID]
        if ids:
            # It ends up in logs and in other systems: one that isn't a plain word, or stands twice, is replaced.
            kept.append((REQUEST_ID, ids[0] if len(ids) == 1 and _is_word(ids[0]) else uuid.uuid4().hex.encode()))
    return kept


def _is_modest(value: bytes) -> bool:
    return len(value) <= _LONGEST_RANGE and value.count(b",") < _MOST_RANGES


def _is_word(value: bytes) -> bool:
    return 0 < len(value) <= 128 and value.translate(None, _WORD) == b""


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
    "admit.rate": "Too many calls",
}
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
        elif status == HTTPStatus.UNAUTHORIZED:
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
