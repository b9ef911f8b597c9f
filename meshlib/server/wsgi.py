"""How does a call of a WSGI server take the inbound way?

One middleware around the whole application. WSGI has no place for a list of headers: they come as keys of `environ`, merged and
renamed, so that a name with an underscore and its twin with a dash are one; both forms of an identity header go. The path that is
judged is the one on the wire, where the server tells (RAW_URI, REQUEST_URI), and the application finds its canonical form in all the
places where it may look. A body that is a list is over when it is returned; any other is over when the server closes it.

Who calls, and at which listener, is told by the worker of ours that holds the connection (`gunicorn_socket.py`), in keys of the environ
that no header can make. Over a connection of another server nobody is known, and what SERVER_PORT says decides nothing but rules on
ports: there are servers that take it from the Host header.

It does not wrap the pieces of a body: `iter()` gives the application's own iterator. It says nothing about the connection: that is for
servers (PEP 3333), and ours say by themselves that an answer is the last. It can't see that a client goes away.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import quote

from .._native import core
from ..call import Peer, Visit, current_visit
from . import line
from .door import ARRIVED, PEER, PORT, PUBLIC, SNI
from .line import PLAIN, PLAIN_TLS
from .way import NO_RETRY, NO_STATUS, ORDINARY, Headers, InboundWay, frozen, problem, refused, step_in, step_out

if TYPE_CHECKING:
    from _typeshed import OptExcInfo
    from _typeshed.wsgi import StartResponse, WSGIApplication

log = logging.getLogger("meshlib.server")

Environ = dict[str, Any]

# Where the environ says that the call has been let in, by which gate, and as what.
GATE: Final = "meshlib.gate"
ENTRY: Final = "meshlib.entry"
# The mark of `NO_RETRY`, in this interface's spelling.
_NO_RETRY: Final = (NO_RETRY[0].decode(), NO_RETRY[1].decode())
# A body that is there as a whole.
_WHOLE: Final = (list, tuple)
# What only matters where somebody sees the client go.
_UNSEEN: Final = ~(core.TODO_KEEP | core.TODO_CANCEL)
_SET: Final = core.TODO_DEADLINE | core.TODO_LAYER | core.TODO_PRIORITY | core.TODO_LOAD


class MeshWSGI:
    """An application behind the inbound way; itself a WSGI application."""

    def __init__(self, app: WSGIApplication, way: InboundWay) -> None:
        self.app = app
        self.way = way
        self._is_traced_inside: bool | None = None
        self._is_told = False

    def __call__(self, environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        way = self.way
        if environ.get(GATE) is way.gate and _is_as_judged(environ):
            # Wrapped twice, by `mesh.wsgi` and by a framework's integration: once is enough, unless path or method have changed.
            return self.app(environ, start_response)
        if "HTTP_SCRIPT_NAME" in environ or "HTTP_PATH_INFO" in environ:
            # Some servers let a header say where the application begins. What a caller says about that doesn't count.
            environ = {**environ, "SCRIPT_NAME": ""}
            environ.pop("HTTP_SCRIPT_NAME", None)
            environ.pop("HTTP_PATH_INFO", None)
        if way.agent is not None:
            # Another one holds the connection, and tells who is at its end.
            if not way.agent.is_ready:
                if way.is_asleep:
                    way.rise_quietly()
                way.agent.ready_blocking()
            environ = way.agent.environ(environ, way.door)
        headers = headers_of(environ)
        peer, port, is_public = whence(environ)
        arrived = environ.get(ARRIVED) if environ.get(PEER) is peer else None
        method = environ["REQUEST_METHOD"]
        entry = way.enter(
            method,
            target_of(environ),
            headers,
            peer,
            environ.get("REMOTE_ADDR") or "",
            port,
            environ.get(SNI) or "",
            environ.get("SERVER_PROTOCOL", "").removeprefix("HTTP/"),
            is_public=is_public,
            arrived=arrived,
        )
        exchange = Exchange(way, entry, start_response, peer)
        if way.recorder() is not None and (entry.status or not self._is_traced()):
            exchange.span = way.span(method, entry, headers, peer)
        exchange.headers = kept = frozen(headers)
        todo = entry.todo & _UNSEEN
        if todo or len(kept) != len(headers):
            exchange.begin(todo)
            kept = exchange.attend(todo, headers)
        prefix = environ.get("SCRIPT_NAME")
        if entry.status or (prefix and not _is_under(entry.path, prefix)):
            if PEER not in environ and way.agent is None:
                self._tell()
            return exchange.refuse(method)
        exchange.tokens = step_in(exchange)
        try:
            body = self.app(_frozen(environ, way, entry, prefix or "", headers, kept), exchange)
        except BaseException as error:
            exchange.close(error)
            raise
        if isinstance(body, _WHOLE):
            exchange.close(None)
            return body
        wrapper = environ.get("wsgi.file_wrapper")
        if isinstance(wrapper, type) and isinstance(body, wrapper):
            # Servers know this class and send the file themselves: it must stay what it is.
            body.close = Body(exchange, body, getattr(body, "close", None)).close  # type: ignore[attr-defined]
            return body
        return Body(exchange, body, getattr(body, "close", None))

    def _tell(self) -> None:
        """Of calls over another server's connections, once: in mode enforce all of them are refused."""
        door = self.way.door
        if not self._is_told and door is not None and door.mode == "enforce":
            self._is_told = True
            log.warning(
                "calls come in over connections that another server holds, which proves nobody's identity to us; in mode enforce they are "
                "refused. Serve the application with `meshlib serve`, or with `gunicorn -k meshlib.server.gunicorn.ThreadWorker`."
            )

    def _is_traced(self) -> bool:
        """Does something further in make the span of a call? Found out with the first one, when all layers are in place."""
        if self._is_traced_inside is None:
            from ..observe.spans import is_traced_inside

            self._is_traced_inside = is_traced_inside(self.app)
        return self._is_traced_inside


class Exchange(Visit):
    """The way back of one call: `start_response` as the application sees it. It sees the status.

    It changes nothing, but for header fields of the mesh in the head of an answer.
    """

    entry: core.Entry

    def __init__(self, way: InboundWay, entry: core.Entry, start_response: StartResponse, peer: Peer) -> None:
        super().__init__(peer, entry)
        self._way = way
        self._start_response = start_response
        self._is_over = False
        self.span: Any = None
        self.tokens: Any = None
        self.fields: list[tuple[str, str]] | None = None
        self.status = NO_STATUS

    # --- in

    def begin(self, todo: int) -> None:
        """What the call brings along: its time, the attempt of its caller, its weight, and a wish to know our load."""
        if not todo & _SET:
            return
        entry = self.entry
        if todo & core.TODO_DEADLINE:
            self.end = entry.deadline
        if todo & core.TODO_LAYER:
            self.layer = entry.layer
        if todo & core.TODO_PRIORITY and entry.priority != ORDINARY:
            self.priority = entry.priority
        if todo & core.TODO_LOAD:
            self.fields = [(name.decode(), value.decode("latin-1")) for name, value in self._way.load(entry.load_format)]

    def attend(self, todo: int, headers: Headers) -> Headers:
        """Everything that is not the rule: a wait, somebody to ask, headers to put in or take out. Answers the handler's headers."""
        way, entry, peer = self._way, self.entry, self.peer
        assert peer is not None
        try:
            if not todo & core.TODO_REFUSED and (not todo & core.TODO_WAIT or way.wait_blocking(entry, peer)):
                # From the list that was judged, and from nothing that came later.
                self.headers = way.handed(entry, peer, headers, list(self.headers))
                if todo & core.TODO_RATES and not way.fits_blocking(entry, peer, headers):
                    pass
                elif todo & core.TODO_ASK:
                    way.consent_blocking(entry, peer, list(self.headers))
        except BaseException as problem:
            # The worker is ended, while somebody was asked: the place is free.
            way.leave(entry, NO_STATUS)
            if self.span is not None:
                self.span.end(NO_STATUS, problem)
            raise
        return list(self.headers)

    def refuse(self, method: str) -> Iterable[bytes]:
        """Answer in the application's place."""
        entry = self.entry
        status = entry.status
        if status:
            body, headers = refused(entry)
        else:
            # The canonical path has left the place where this application is mounted: it's not for it.
            status = HTTPStatus.BAD_REQUEST
            body, headers = problem(status, "secure.path")
            self._way.leave(entry, status)
        if self.span is not None:
            self.span.end(status, None)
        told = [(name.decode(), value.decode("latin-1")) for name, value in headers]
        self._start_response(f"{status:d} {HTTPStatus(status).phrase}", told if self.fields is None else [*told, *self.fields])
        return [] if method == "HEAD" else [body]

    # --- back

    def __call__(
        self, status: str, headers: list[tuple[str, str]], exc_info: OptExcInfo | None = None, /
    ) -> Callable[[bytes], object]:
        try:
            self.status = code = int(status[:3])
        except ValueError:
            code = 0
        if code >= 500 and self.entry.is_spent:
            headers = [*headers, _NO_RETRY]
        if self.fields is not None:
            headers = [*headers, *self.fields]
        return self._start_response(status, headers) if exc_info is None else self._start_response(status, headers, exc_info)

    def let_go(self) -> None:
        """It is closed when nobody knows what runs by then: only a context that is still ours is given back."""
        if self.span is not None:
            self.span.let_go()
        if current_visit.get() is not self:
            self.tokens = None

    def close(self, error: BaseException | None) -> None:
        """The application has answered all of it, or was left by an exception."""
        if self._is_over:
            return
        self._is_over = True
        # What runs on behind the answer has time of its own.
        self.over()
        if error is not None and not self.status:
            self.status = 500  # what the server will answer for it
        self._way.leave(self.entry, self.status)
        if self.span is not None:
            self.span.end(self.status, error)
        try:
            if self.tokens is not None:
                step_out(self.tokens)
        except ValueError:
            # Closed by another thread or context than the one that called: there is nothing of ours to give back there.
            return
        left = current_visit.get()
        if isinstance(left, Exchange) and left._is_over:
            current_visit.set(None)  # of a call that was let go while this one ran


class Body:
    """A body that is still being made. The server iterates the application's own iterator, and closes this."""

    __slots__ = ("_body", "_close", "_exchange")

    def __init__(self, exchange: Exchange, body: Iterable[bytes], close: Callable[[], object] | None) -> None:
        self._exchange = exchange
        self._body = body
        self._close = close

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._body)

    def close(self) -> None:
        # What the application does behind its answer has time of its own.
        self._exchange.over()
        try:
            if self._close is not None:
                self._close()
        except BaseException as error:
            self._exchange.close(error)
            raise
        self._exchange.close(None)

    def __del__(self) -> None:
        # A server has to close; test clients forget to. The collector comes when it likes, perhaps in the middle of another call.
        self._exchange.let_go()
        self._exchange.close(None)


def _is_as_judged(environ: Environ) -> bool:
    entry: core.Entry = environ[ENTRY]
    return _whole_path(environ) == entry.path and environ["REQUEST_METHOD"] == entry.method


def whence(environ: Environ) -> tuple[Peer, int, bool]:
    """Who is at the other end, at which port of ours, and is that the public one? As the worker of ours has found that holds the
    connection; from no header, and from no other server.
    """
    peer = environ.get(PEER)
    if isinstance(peer, Peer):
        port = environ.get(PORT)
        return peer, port_of(environ) if port is None else port, environ.get(PUBLIC) is True
    if line.declared is not None and (declared := line.declared.get()) is not None:
        return declared, port_of(environ), False
    return (PLAIN_TLS if environ.get("wsgi.url_scheme") == "https" else PLAIN), port_of(environ), False


def port_of(environ: Environ) -> int:
    """Our own port, as a server that isn't ours tells it."""
    port = environ.get("SERVER_PORT") or "0"
    return int(port) if port.isascii() and port.isdecimal() and len(port) <= 5 and int(port) < 65536 else 0


def target_of(environ: Environ) -> bytes:
    """The path as it came. A server that hands over only the decoded one has lost what an escape was, and gets the strictest reading."""
    raw: str | None = environ.get("RAW_URI") or environ.get("REQUEST_URI")
    if raw:
        return raw.encode("latin-1", "replace")
    path = quote(_whole_path_bytes(environ), safe="/").encode()
    query: str = environ.get("QUERY_STRING", "")
    return path + b"?" + query.encode("latin-1", "replace") if query else path


class _Names(dict[str, bytes]):
    """The header's name of a key, b"" for what is none. Answers are remembered; the table is bounded, since callers choose the names."""

    def __missing__(self, key: str) -> bytes:
        is_header = key.startswith("HTTP_")
        name = key[5:].replace("_", "-").lower().encode("latin-1", "replace") if is_header else b""
        if len(self) < 1024:
            self[key] = name
        return name


_names: Final = _Names()


def headers_of(environ: Environ) -> Headers:
    """The headers as the wire had them, as far as WSGI tells."""
    headers = [(name, value.encode("latin-1", "replace")) for key, value in environ.items() if (name := _names[key])]
    if value := environ.get("CONTENT_TYPE"):
        headers.append((b"content-type", value.encode("latin-1", "replace")))
    if value := environ.get("CONTENT_LENGTH"):
        headers.append((b"content-length", value.encode("latin-1", "replace")))
    return headers


def _frozen(environ: Environ, way: InboundWay, entry: core.Entry, prefix: str, headers: Headers, kept: Headers) -> Environ:
    """What the application sees: an environ of its own, with what was judged and nothing else."""
    fresh = environ.copy()
    if len(kept) != len(headers) or kept != headers:
        for name in {name for name, _ in headers} - {name for name, _ in kept}:
            fresh.pop(_key(name), None)
        fresh.update({_key(name): value.decode("latin-1") for name, value in kept if (name, value) not in headers})
    path = entry.path
    if not path.isascii():
        # A WSGI string holds bytes as latin-1.
        path = path.encode().decode("latin-1")
    fresh["PATH_INFO"] = path[len(prefix) :] if prefix else path
    uri = entry.raw_path.decode()
    if query := environ.get("QUERY_STRING"):
        uri = f"{uri}?{query}"
    if "RAW_URI" in fresh:
        fresh["RAW_URI"] = uri
    if "REQUEST_URI" in fresh:
        fresh["REQUEST_URI"] = uri
    fresh[ENTRY] = entry
    fresh[GATE] = way.gate
    return fresh


def _key(name: bytes) -> str:
    if name in (b"content-type", b"content-length"):
        return name.decode().replace("-", "_").upper()
    return "HTTP_" + name.decode("latin-1").replace("-", "_").upper()


def _whole_path_bytes(environ: Environ) -> bytes:
    whole: str = environ.get("SCRIPT_NAME", "") + environ.get("PATH_INFO", "")
    return whole.encode("latin-1", "replace")


def _whole_path(environ: Environ) -> str:
    return _whole_path_bytes(environ).decode("utf-8", "replace")


def _is_under(path: str, prefix: str) -> bool:
    seen = path.encode().decode("latin-1")
    return seen.startswith(prefix) and (len(seen) == len(prefix) or seen[len(prefix)] == "/")
