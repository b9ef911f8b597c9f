"""How does a call of an ASGI server take the inbound way?

One middleware around the whole application: http and websocket go the way, lifespan passes, anything else is refused, since what is
not understood can't be judged. The gate reads the scope where it lies and writes the canonical path and the frozen headers into it;
bodies are not touched. The one thing that stands between the application and the server is `Exchange`, which sees the status and the
end, and hears from a server of ours that the client has gone away.

A server of ours (`uvicorn.py`) hands over the `Line` that the call came in on; over a connection of another server nobody is known,
and the scope is copied first, since it belongs to whatever stands around us.

It does not enforce the deadline on the handler: a payment must not stop half-way. It is there for the handler's own calls.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, Final

from .._native import core
from ..call import Visit
from ..errors import CallerGone, MeshError, Refused
from ..observe.spans import quieten, unquieten
from .door import Standing
from .line import LINE, Line, stranger
from .way import CLOSE, NO_RETRY, NO_STATUS, InboundWay, new_id, problem, refused, step_in, step_out

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

log = logging.getLogger("meshlib.server")

# Where the scope says that the call has been let in, by which way, and as what.
VISIT: Final = "meshlib.visit"

# Servers that make an end of TLS themselves and tell nobody whose certificate it was. Known by the module of what they hand over.
WITHOUT_PEERS: Final = frozenset({"hypercorn", "granian", "daphne", "nonecorn"})

# What `Entry.todo` asks for, as bits; 0, as a rule, is nothing at all.
_SET: Final = core.TODO_DEADLINE | core.TODO_LAYER | core.TODO_PRIORITY | core.TODO_KEEP | core.TODO_CANCEL | core.TODO_LOAD
_ATTEND: Final = ~_SET


class MeshASGI:
    """An application behind the inbound way; itself an ASGI application."""

    def __init__(self, app: App, way: InboundWay) -> None:
        self.app = app
        self.way = way
        self._is_told = False
        self._is_traced_inside: bool | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        around = scope.get(VISIT)
        if around is not None:
            # Wrapped twice, by `mesh.asgi` and by a framework's integration: once is enough, unless path or method have changed.
            if self._is_as_judged(scope):
                await self.app(scope, receive, send)
                return
            try:
                await self.serve(around.line, {**scope}, receive, send)
            finally:
                around.line.visit = None if around.is_over else around
            return
        line = scope.get(LINE)
        if not isinstance(line, Line):
            if scope["type"] not in ("http", "websocket"):
                await self._beside(scope["type"], scope, receive, send)
                return
            line = self._strangers_line(scope)
        await self.serve(line, {**scope}, receive, send)

    async def serve(self, line: Line, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        """The way of one call that came in on a line. The scope is ours to write into."""
        way = self.way
        kind = scope["type"]
        if kind != "http" and kind != "websocket":
            await self._beside(kind, scope, receive, send)
            return
        if way.is_asleep:
            way.rise_quietly()
        if way.agent is not None:
            # Another one holds the connection, and tells who is at its end.
            if not way.agent.is_ready:
                await way.agent.ready()
            line = way.agent.line(scope, line, way.door)
        visit = Exchange(way, line, send)
        if line.judge is not None:
            standing = line.judge()
            if standing is not Standing.GOOD and not await visit.is_proved(standing, scope, receive):
                return
            # As the extension is published: https://asgi.readthedocs.io/en/latest/specs/tls.html
            extensions = scope.get("extensions")
            scope["extensions"] = {**extensions, "tls": line.extension} if extensions else {"tls": line.extension}
        headers = scope["headers"]
        # observe > secure > admit > route, in one step.
        visit.entry = entry = way.gate.arrive(scope, line.place, way.clock(), way.wall_clock())
        todo = entry.todo
        if todo & _SET:
            visit.begin(todo)
        elif line.is_ours:
            visit.ends_calls = True
        if way.recorder() is not None and (entry.status or not self._is_traced()):
            visit.observe(todo, headers)
        if todo & _ATTEND and not await visit.attend(todo, scope, receive, headers):
            return
        visit.headers = scope["headers"]
        line.visit = scope[VISIT] = visit
        tokens = step_in(visit)
        try:
            # handle.
            await self.app(scope, receive, visit)
        except BaseException as error:
            # Cancelled or failed: the place goes back before anybody else runs.
            visit.close(error)
            if not visit.is_left or not visit.ended(error):
                raise
            # Of that the client has gone away, and there is nobody to be told anything else: a server would log it as a mistake.
        else:
            if visit.span is not None or not visit.is_over:
                visit.close(None)
        finally:
            if visit.quiet is not None:
                unquieten(visit.quiet)
            step_out(tokens)
            # A server's `send` knows the scope: without this each call would be a cycle, and wait for the collector.
            scope.pop(VISIT, None)

    def _is_traced(self) -> bool:
        """Does something further in make the span of a call? Found out with the first one, when all layers are in place."""
        if self._is_traced_inside is None:
            from ..observe.spans import is_traced_inside

            self._is_traced_inside = is_traced_inside(self.app)
        return self._is_traced_inside

    async def _beside(self, kind: str, scope: Scope, receive: Receive, send: Send) -> None:
        if kind != "lifespan":
            raise Refused(
                f"the server sent a scope of the type {kind!r}, and the mesh can't judge it.",
                hint="It knows http, websocket and lifespan. Is there a newer meshlib?",
            )
        try:
            self._look_at_server(receive)
            self._is_traced_inside = None
            self.way.rise()
        except MeshError as error:
            # Raised, it would read as "this application knows no lifespan", and the server would go on.
            await receive()
            await send({"type": "lifespan.startup.failed", "message": str(error)})
            return

        depart = self.way.depart
        if depart is None:
            await self.app(scope, receive, send)
            return

        async def heard() -> Message:
            message = await receive()
            if message["type"] == "lifespan.shutdown":
                await depart()
            return message

        await self.app(scope, heard, send)

    def _look_at_server(self, receive: Receive) -> None:
        """A server that shows no certificates can't prove who calls: in mode enforce nobody would ever get in."""
        name = str(getattr(receive, "__module__", None) or "").partition(".")[0]
        door = self.way.door
        if name not in WITHOUT_PEERS or door is None or door.mode == "observe" or self.way.agent is not None:
            return
        text = f"{name} shows the application no certificate of its callers, so that"
        hint = "Serve it with `meshlib serve`, or with `uvicorn --http meshlib.server.uvicorn:MeshHTTP`, or stay in mode observe."
        if door.mode == "enforce":
            raise Refused(f"{text} mode enforce would refuse every call.", hint=hint)
        log.warning("%s everybody is a caller without identity. %s", text, hint)

    def _is_as_judged(self, scope: Scope) -> bool:
        visit: Exchange = scope[VISIT]
        entry = visit.entry
        return visit.way.gate is self.way.gate and bool(
            scope["path"] == entry.path and scope.get("method", "GET") == entry.method
        )

    def _strangers_line(self, scope: Scope) -> Line:
        client, server = scope.get("client"), scope.get("server")
        extensions = scope.get("extensions")
        tls = extensions.get("tls") if extensions else None
        line = stranger(client[0] if client else "", port_of(server), is_tls=tls is not None)
        door = self.way.door
        is_alone = self.way.agent is None
        if is_alone and not self._is_told and not line.peer.spiffe_id and door is not None and door.mode == "enforce":
            self._is_told = True
            log.warning(
                "calls come in over connections that another server holds, which proves nobody's identity to us; in mode enforce they are "
                "refused. Serve the application with `meshlib serve`, or with `uvicorn --http meshlib.server.uvicorn:MeshHTTP`."
            )
        return line


class Exchange(Visit):
    """One call on its way back: what the application sends, on its way to the server. It sees status and end.

    It changes nothing, but for header fields of the mesh in the head of an answer.
    """

    layer = 0
    span: Any = None
    status = NO_STATUS
    is_over = False
    # What the head of the answer gets: that it is the last of this connection, or the load that was asked for.
    fields: list[tuple[bytes, bytes]] | None = None
    # It is not recorded, and what runs on its behalf has been told so.
    quiet: Any = None
    # The handler's task, where the route lets it be cancelled, and whether it was.
    task: asyncio.Task[Any] | None = None
    is_cut = False
    # The client has gone away before it had its answer.
    is_left = False
    # The same task while the call has not come to its handler: it waits for a place, or for somebody's word.
    parked: asyncio.Task[Any] | None = None
    entry: core.Entry

    def __init__(self, way: InboundWay, line: Line, send: Send) -> None:
        self.peer = line.peer
        self.way = way
        self.line = line
        self._send = send

    # --- in

    def observe(self, todo: int, headers: list[tuple[bytes, bytes]]) -> None:
        """observe: a span, where somebody records them. Nearly all calls of a busy service aren't recorded, and cost next to nothing."""
        way, entry = self.way, self.entry
        if self.line.is_ours and not todo & (core.TODO_TRACED | core.TODO_REFUSED):
            self.number, is_recorded = way.draw()
            if not is_recorded:
                self.quiet = quieten()
                if self.quiet is not None:
                    return
        self.span = way.span(entry.method, entry, headers, self.line.peer, self.number)

    async def is_proved(self, standing: Standing, scope: Scope, receive: Receive) -> bool:
        """secure: what the connection's peer has proved doesn't hold as it did. If not at all, the call is refused."""
        if standing is Standing.OVER:
            body, headers = problem(401, "secure.proof_ended")
            await _answer(scope, receive, self._send, 401, "secure.proof_ended", body, [*headers, CLOSE])
            return False
        self.fields = [CLOSE]
        return True

    def begin(self, todo: int) -> None:
        """What the call brings along: its time, the attempt of its caller, its weight; and what is to become of it without its client."""
        entry = self.entry
        if todo & core.TODO_DEADLINE:
            self.end = entry.deadline
        if todo & core.TODO_LAYER:
            self.layer = entry.layer
        if todo & core.TODO_PRIORITY:
            self.priority = entry.priority
        if todo & core.TODO_LOAD:
            self.fields = [*(self.fields or ()), *self.way.load(entry.load_format)]
        if self.line.is_ours and not todo & core.TODO_KEEP:
            self.ends_calls = True
            if todo & core.TODO_CANCEL:
                self.task = asyncio.current_task()

    async def attend(self, todo: int, scope: Scope, receive: Receive, headers: list[tuple[bytes, bytes]]) -> bool:
        """Everything that is not the rule: a refusal, a wait, somebody to ask, headers to put in or take out. False: it is over."""
        way, entry, peer = self.way, self.entry, self.line.peer
        # As they were judged: a server may still be adding to its list.
        headers = list(headers)
        self.line.visit, self.parked = self, asyncio.current_task()
        try:
            if todo & core.TODO_REFUSED:
                way.told(entry, entry.method, target_of(scope), peer)
            elif not todo & core.TODO_WAIT or await way.wait(entry, peer):
                kept = scope["headers"]
                if todo & core.TODO_ID:
                    kept.append(new_id())
                if todo & core.TODO_HEADERS:
                    # From the list that was judged, and from nothing that came later.
                    kept = scope["headers"] = way.handed(entry, peer, headers, kept)
                if todo & core.TODO_RATES and not await way.fits(entry, peer, headers):
                    pass
                elif todo & core.TODO_ASK:
                    await way.consent(entry, peer, kept)
        except BaseException as problem:
            # Cancelled, while somebody was asked: the caller has gone, and the place is free.
            self.close(problem)
            if self.is_left and self.ended(problem):
                # Nothing was begun.
                return False
            raise
        finally:
            self.parked = None
        if not entry.status:
            return True
        self.is_over = True
        if self.span is not None:
            self.span.end(entry.status, None)
        body, fields = refused(entry)
        if way.is_closing or self.fields:
            fields = [*fields, *(self.fields or ()), *((CLOSE,) if way.is_closing else ())]
        await _answer(scope, receive, self._send, entry.status, entry.reason, body, fields)
        return False

    # --- back

    def __call__(self, message: Message) -> Awaitable[None]:
        kind = message["type"]
        if kind == "http.response.body":
            if not self.is_over and not message.get("more_body"):
                # Over for the caller. What runs on behind the response has no deadline.
                self._finish()
        elif kind == "http.response.start":
            self.status = status = message["status"]
            if self.fields is not None or status >= 500 or self.way.is_closing:
                message = self._marked(message)
        elif not self.status:
            if kind == "websocket.accept":
                self.status = 101
                # A conversation has no end in sight: the deadline was for its beginning.
                self.end = None
            elif kind == "websocket.close":
                self.status = 403
            elif kind == "websocket.http.response.start":
                self.status = message["status"]
        return self._send(message)

    def _marked(self, message: Message) -> Message:
        fields = self.fields or []
        if self.way.is_closing and CLOSE not in fields:
            fields = [*fields, CLOSE]
        if self.status >= 500 and self.entry.is_spent:
            fields = [*fields, NO_RETRY]
        return {**message, "headers": [*message.get("headers", ()), *fields]} if fields else message

    def _finish(self) -> None:
        self.is_over = True
        self.over()
        self.line.visit = None
        way = self.way
        # What the handler says to a client that has gone away was no answer.
        called = self.entry.finish(NO_STATUS if self.is_left else self.status, way.clock())
        if called:
            way.room.call(called)

    def close(self, error: BaseException | None) -> None:
        """The application has returned, or was left by an exception."""
        if not self.is_over:
            if not self.status and not isinstance(error, asyncio.CancelledError):
                self.status = 500  # what the server will answer for it
            self._finish()
        if self.span is not None:
            self.span.end(self.status, error)

    def gone(self) -> None:
        """The client has gone away: what is asked on its behalf is not wanted any more, as far as the route lets that end."""
        if self.is_over or not self.ends_calls:
            return
        self.is_left = True
        if self.parked is not None:
            self.task = self.parked
        else:
            self.cut()
        if self.task is not None:
            self.is_cut = True
            self.task.cancel("the client has gone away")

    def ended(self, error: BaseException) -> bool:
        """Is this what the client's leaving has made of the handler, and nothing else? Asked once, where it leaves the handler."""
        if self.is_cut and self.task is not None:
            self.is_cut = False
            # Who else has cancelled it is still heard.
            return self.task.uncancel() == 0 and isinstance(error, asyncio.CancelledError)
        return _is_of_leaving(error)


def _is_of_leaving(error: BaseException) -> bool:
    if isinstance(error, BaseExceptionGroup):
        return all(_is_of_leaving(each) for each in error.exceptions)
    return isinstance(error, CallerGone)


def port_of(server: Any) -> int:
    """Our own port, as the scope tells it: a number, for some servers as text, and none for a UNIX socket."""
    port = server[1] if server else None
    if isinstance(port, int):
        return port
    return int(port) if isinstance(port, str) and port.isascii() and port.isdecimal() and len(port) <= 5 else 0


def target_of(scope: Scope) -> bytes:
    """What was asked for, for the log."""
    raw: bytes | None = scope.get(core.TARGET) or scope.get("raw_path")
    return raw or str(scope.get("path", "")).encode("utf-8", "replace")


async def _answer(
    scope: Scope, receive: Receive, send: Send, status: int, reason: str, body: bytes, headers: list[tuple[bytes, bytes]]
) -> None:
    """Answer in the application's place."""
    kind = "http.response"
    if scope["type"] == "websocket":
        await receive()
        if "websocket.http.response" not in (scope.get("extensions") or ()):
            # 1008: policy. Before the acceptance a server makes 403 of it.
            await send({"type": "websocket.close", "code": 1008, "reason": reason})
            return
        kind = "websocket.http.response"
    await send({"type": f"{kind}.start", "status": status, "headers": headers})
    await send({"type": f"{kind}.body", "body": body})
