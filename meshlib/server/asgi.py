"""How does a call of an ASGI server take the inbound way?

One middleware around the whole application: http and websocket go the way, lifespan passes, anything else is refused, since what is
not understood can't be judged. The application gets the canonical path and the frozen headers in a scope of its own; bodies are not
touched. The one thing that stands between it and the server is `Exchange`, which sees the status and the end.

It does not enforce the deadline on the handler: a payment must not stop half-way. It is there for the handler's own calls.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import quote

from .._native import core
from ..call import Peer
from ..errors import MeshError, Refused
from .door import PEER, SNI
from .way import NO_RETRY, NO_STATUS, PLAIN, PLAIN_TLS, InboundWay, end_deadline, frozen, refused, step_in, step_out

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

# Where the scope says that the call has been let in, by which gate, and as what.
GATE = "meshlib.gate"
ENTRY = "meshlib.entry"


class MeshASGI:
    """An application behind the inbound way; itself an ASGI application."""

    def __init__(self, app: App, way: InboundWay) -> None:
        self.app = app
        self.way = way

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        kind = scope["type"]
        if kind != "http" and kind != "websocket":
            await self._beside(kind, scope, receive, send)
            return
        way = self.way
        if scope.get(GATE) is way.gate and _is_as_judged(scope):
            # Wrapped twice, by `mesh.asgi` and by a framework's integration: once is enough, unless path or method have changed.
            await self.app(scope, receive, send)
            return
        is_http = kind == "http"
        method = scope["method"] if is_http else "GET"
        peer = peer_of(scope)
        headers = scope["headers"]
        kept = frozen(headers)
        client, server = scope.get("client"), scope.get("server")
        entry = way.enter(
            method,
            target_of(scope),
            headers,
            peer,
            client[0] if client else "",
            port_of(server),
            sni_of(scope),
            scope.get("http_version") or "",
        )
        span = way.span(method, entry, headers, peer)
        if len(kept) != len(headers) or entry.has_more:
            # From the list that was judged, and from nothing that came later.
            kept = way.handed(entry, peer, headers, kept)
            try:
                await way.consent(entry, peer, kept)
            except BaseException as problem:
                # Cancelled, while an authorizer was asked: the caller has gone, and the place is free.
                way.leave(entry, NO_STATUS)
                if span is not None:
                    span.end(NO_STATUS, problem)
                raise
        if entry.status:
            if span is not None:
                span.end(entry.status, None)
            await (_refuse if is_http else _refuse_websocket)(scope, receive, send, entry)
            return
        exchange = Exchange(way, entry, send)
        tokens = step_in(peer, entry, entry.deadline, entry.layer)
        error: BaseException | None = None
        try:
            await self.app(
                {**scope, "path": entry.path, "raw_path": entry.raw_path, "headers": kept, GATE: way.gate, ENTRY: entry},
                receive,
                exchange,
            )
        except BaseException as problem:
            error = problem
            raise
        finally:
            # Cancelled, failed or done: the place goes back before anybody else runs.
            status = exchange.end(error)
            if span is not None:
                span.end(status, error)
            step_out(tokens)

    async def _beside(self, kind: str, scope: Scope, receive: Receive, send: Send) -> None:
        if kind != "lifespan":
            raise Refused(
                f"the server sent a scope of the type {kind!r}, and the mesh can't judge it.",
                hint="It knows http, websocket and lifespan. Is there a newer meshlib?",
            )
        try:
            self.way.rise()
        except MeshError as error:
            # Raised, it would read as "this application knows no lifespan", and the server would go on.
            await receive()
            await send({"type": "lifespan.startup.failed", "message": str(error)})
            return
        await self.app(scope, receive, send)


class Exchange:
    """The way back of one call: what the application sends, on its way to the server. It sees status and end.

    It changes nothing, but for one header of a failure that is not to be repeated.
    """

    __slots__ = ("_entry", "_is_over", "_send", "_way", "status")

    def __init__(self, way: InboundWay, entry: core.Entry, send: Send) -> None:
        self._way = way
        self._entry = entry
        self._send = send
        self._is_over = False
        self.status = NO_STATUS

    def __call__(self, message: Message) -> Awaitable[None]:
        kind = message["type"]
        if kind == "http.response.body":
            if not message.get("more_body") and not self._is_over:
                # Over for the caller. What runs on behind the response has no deadline.
                self._is_over = True
                self._way.leave(self._entry, self.status)
                end_deadline()
        elif kind == "http.response.start":
            self.status = message["status"]
            if self.status >= 500 and self._entry.is_spent:
                message = {**message, "headers": [*message.get("headers", ()), NO_RETRY]}
        elif not self.status:
            if kind == "websocket.accept":
                self.status = 101
                # A conversation has no end in sight: the deadline was for its beginning.
                end_deadline()
            elif kind == "websocket.close":
                self.status = 403
            elif kind == "websocket.http.response.start":
                self.status = message["status"]
        return self._send(message)

    def end(self, error: BaseException | None) -> int:
        """The application has returned, or was left by an exception. Answers the status that counts."""
        if not self._is_over:
            self._is_over = True
            if not self.status and not isinstance(error, asyncio.CancelledError):
                self.status = 500  # what the server will answer for it
            self._way.leave(self._entry, self.status)
        return self.status


def _is_as_judged(scope: Scope) -> bool:
    entry: core.Entry = scope[ENTRY]
    return bool(scope["path"] == entry.path and scope.get("method", "GET") == entry.method)


def peer_of(scope: Scope) -> Peer:
    """Who is at the other end, as the server of ours that holds the connection has found; from no header, and from no other server."""
    extensions = scope.get("extensions")
    if extensions:
        tls = extensions.get("tls")
        if tls:
            peer = tls.get(PEER)
            return peer if isinstance(peer, Peer) else PLAIN_TLS
    return PLAIN


def port_of(server: Any) -> int:
    """Our own port, as the scope tells it: a number, for some servers as text, and none for a UNIX socket."""
    port = server[1] if server else None
    if isinstance(port, int):
        return port
    return int(port) if isinstance(port, str) and port.isascii() and port.isdecimal() and len(port) <= 5 else 0


def sni_of(scope: Scope) -> str:
    """The name that the caller asked TLS for, where a server of ours tells it."""
    extensions = scope.get("extensions")
    tls = extensions.get("tls") if extensions else None
    return tls.get(SNI) or "" if tls else ""


def target_of(scope: Scope) -> bytes:
    """The path as it came. A server that hands over only the decoded one has lost what an escape was, and gets the strictest reading."""
    raw: bytes | None = scope.get("raw_path")
    if not raw:
        raw = quote(scope["path"], safe="/").encode()
    query = scope.get("query_string")
    return raw + b"?" + query if query else raw


async def _refuse(scope: Scope, receive: Receive, send: Send, entry: core.Entry) -> None:
    body, headers = refused(entry)
    await send({"type": "http.response.start", "status": entry.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def _refuse_websocket(scope: Scope, receive: Receive, send: Send, entry: core.Entry) -> None:
    await receive()
    if "websocket.http.response" in (scope.get("extensions") or ()):
        body, headers = refused(entry)
        await send({"type": "websocket.http.response.start", "status": entry.status, "headers": headers})
        await send({"type": "websocket.http.response.body", "body": body})
    else:
        # 1008: policy. Before the acceptance a server makes 403 of it.
        await send({"type": "websocket.close", "code": 1008, "reason": entry.reason})
