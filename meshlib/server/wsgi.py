"""How does a call of a WSGI server take the inbound way?

One middleware around the whole application. WSGI has no place for a list of headers: they come as keys of `environ`, merged and
renamed, so that a name with an underscore and its twin with a dash are one; both forms of an identity header go. The path that is
judged is the one on the wire, where the server tells (RAW_URI, REQUEST_URI), and the application finds its canonical form in all the
places where it may look. A body that is a list is over when it is returned; any other is over when the server closes it.

It does not wrap the pieces of a body: `iter()` gives the application's own iterator.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import quote

from .._native import core
from ..call import Peer
from .door import PEER, SNI
from .way import NO_RETRY, NO_STATUS, PLAIN, PLAIN_TLS, Headers, InboundWay, Tokens, frozen, problem, refused, step_in, step_out

if TYPE_CHECKING:
    from _typeshed import OptExcInfo
    from _typeshed.wsgi import StartResponse, WSGIApplication

Environ = dict[str, Any]

# Where the environ says that the call has been let in, by which gate, and as what.
GATE = "meshlib.gate"
ENTRY = "meshlib.entry"
# The mark of `NO_RETRY`, in this interface's spelling.
_NO_RETRY: Final = (NO_RETRY[0].decode(), NO_RETRY[1].decode())


class MeshWSGI:
    """An application behind the inbound way; itself a WSGI application."""

    def __init__(self, app: WSGIApplication, way: InboundWay) -> None:
        self.app = app
        self.way = way

    def __call__(self, environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        way = self.way
        if environ.get(GATE) is way.gate and _is_as_judged(environ):
            # Wrapped twice, by `mesh.wsgi` and by a framework's integration: once is enough, unless path or method have changed.
            return self.app(environ, start_response)
        method = environ["REQUEST_METHOD"]
        peer = peer_of(environ)
        if "HTTP_SCRIPT_NAME" in environ or "HTTP_PATH_INFO" in environ:
            # Some servers let a header say where the application begins. What a caller says about that doesn't count.
            environ = {**environ, "SCRIPT_NAME": ""}
            environ.pop("HTTP_SCRIPT_NAME", None)
            environ.pop("HTTP_PATH_INFO", None)
        headers = headers_of(environ)
        kept = frozen(headers)
        entry = way.enter(
            method,
            target_of(environ),
            headers,
            peer,
            environ.get("REMOTE_ADDR") or "",
            port_of(environ),
            environ.get(SNI) or "",
            environ.get("SERVER_PROTOCOL", "").removeprefix("HTTP/"),
        )
        if len(kept) != len(headers) or entry.has_more:
            kept = way.handed(entry, peer, headers, kept)
            way.consent_blocking(entry, peer, kept)
        status, reason = entry.status, entry.reason
        prefix = environ.get("SCRIPT_NAME", "")
        if not status and prefix and not _is_under(entry.path, prefix):
            # The canonical path has left the place where this application is mounted: it's not for it.
            status, reason = 400, "secure.path"
            way.leave(entry, status)
        span = way.span(method, entry, headers, peer)
        if status:
            if span is not None:
                span.end(status, None)
            return _refuse(method, status, refused(entry) if entry.status else problem(status, reason), start_response)
        environ = _frozen_environ(environ, entry, prefix, headers, kept)
        environ[GATE] = way.gate
        exchange = Exchange(way, entry, start_response, span, step_in(peer, entry, entry.deadline, entry.layer))
        try:
            body = self.app(environ, exchange)
        except BaseException as error:
            exchange.end(error)
            raise
        if isinstance(body, list | tuple):
            exchange.end(None)
            return body
        wrapper = environ.get("wsgi.file_wrapper")
        if isinstance(wrapper, type) and isinstance(body, wrapper):
            # Servers know this class and send the file themselves: it must stay what it is.
            body.close = _Closing(exchange, getattr(body, "close", None))  # type: ignore[attr-defined]
            return body
        return Body(exchange, body)


class Exchange:
    """The way back of one call: `start_response` as the application sees it. It sees the status.

    It changes nothing, but for one header of a failure that is not to be repeated.
    """

    __slots__ = ("_entry", "_is_over", "_span", "_start_response", "_tokens", "_way", "status")

    def __init__(self, way: InboundWay, entry: core.Entry, start_response: StartResponse, span: Any, tokens: Tokens) -> None:
        self._way = way
        self._entry = entry
        self._start_response = start_response
        self._span = span
        self._tokens = tokens
        self._is_over = False
        self.status = NO_STATUS

    def __call__(
        self, status: str, headers: list[tuple[str, str]], exc_info: OptExcInfo | None = None, /
    ) -> Callable[[bytes], object]:
        with contextlib.suppress(ValueError):
            self.status = int(status[:3])
        if self.status >= 500 and self._entry.is_spent:
            headers = [*headers, _NO_RETRY]
        return self._start_response(status, headers) if exc_info is None else self._start_response(status, headers, exc_info)

    def end(self, error: BaseException | None) -> None:
        if self._is_over:
            return
        self._is_over = True
        if error is not None and not self.status:
            self.status = 500  # what the server will answer for it
        self._way.leave(self._entry, self.status)
        if self._span is not None:
            self._span.end(self.status, error)
        # Closed by another thread or context than the one that called: there is nothing of ours to give back there.
        with contextlib.suppress(ValueError):
            step_out(self._tokens)


class Body:
    """A body that is still being made. The server iterates the application's own iterator, and closes this."""

    __slots__ = ("_body", "_exchange")

    def __init__(self, exchange: Exchange, body: Iterable[bytes]) -> None:
        self._exchange = exchange
        self._body = body

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._body)

    def close(self) -> None:
        _Closing(self._exchange, getattr(self._body, "close", None))()

    def __del__(self) -> None:
        # A server has to close; test clients forget to.
        self._exchange.end(None)


class _Closing:
    __slots__ = ("_close", "_exchange")

    def __init__(self, exchange: Exchange, close: Callable[[], object] | None) -> None:
        self._exchange = exchange
        self._close = close

    def __call__(self) -> None:
        try:
            if self._close is not None:
                self._close()
        except BaseException as error:
            self._exchange.end(error)
            raise
        self._exchange.end(None)


def _is_as_judged(environ: Environ) -> bool:
    entry: core.Entry = environ[ENTRY]
    return _whole_path(environ) == entry.path and environ["REQUEST_METHOD"] == entry.method


def peer_of(environ: Environ) -> Peer:
    """Who is at the other end, as the server of ours that holds the connection has found; from no header, and from no other server."""
    peer = environ.get(PEER)
    if isinstance(peer, Peer):
        return peer
    return PLAIN_TLS if environ.get("wsgi.url_scheme") == "https" else PLAIN


def port_of(environ: Environ) -> int:
    """Our own port, as the server tells it."""
    port = environ.get("SERVER_PORT") or "0"
    return int(port) if port.isascii() and port.isdecimal() and len(port) <= 5 else 0


def target_of(environ: Environ) -> bytes:
    """The path as it came. A server that hands over only the decoded one has lost what an escape was, and gets the strictest reading."""
    raw: str | None = environ.get("RAW_URI") or environ.get("REQUEST_URI")
    if raw:
        return raw.encode("latin-1", "replace")
    path = quote(_whole_path_bytes(environ), safe="/").encode()
    query: str = environ.get("QUERY_STRING", "")
    return path + b"?" + query.encode("latin-1", "replace") if query else path


def headers_of(environ: Environ) -> Headers:
    """The headers as the wire had them, as far as WSGI tells."""
    headers = [
        (key[5:].replace("_", "-").lower().encode("latin-1"), _bytes(environ[key])) for key in environ if key.startswith("HTTP_")
    ]
    for key, name in (("CONTENT_TYPE", b"content-type"), ("CONTENT_LENGTH", b"content-length")):
        if value := environ.get(key):
            headers.append((name, _bytes(value)))
    return headers


def _bytes(value: str) -> bytes:
    return value.encode("latin-1", "replace")


def _frozen_environ(environ: Environ, entry: core.Entry, prefix: str, headers: Headers, kept: Headers) -> Environ:
    fresh = dict(environ)
    if kept != headers:
        for name in {name for name, _ in headers} - {name for name, _ in kept}:
            fresh.pop(_key(name), None)
        fresh.update({_key(name): value.decode("latin-1") for name, value in kept if (name, value) not in headers})
    # A WSGI string holds bytes as latin-1.
    fresh["PATH_INFO"] = entry.path.encode().decode("latin-1")[len(prefix) :]
    raw = entry.raw_path.decode()
    query = environ.get("QUERY_STRING", "")
    uri = f"{raw}?{query}" if query else raw
    for key in ("RAW_URI", "REQUEST_URI"):
        if key in fresh:
            fresh[key] = uri
    fresh[ENTRY] = entry
    return fresh


def _key(name: bytes) -> str:
    return "HTTP_" + name.decode("latin-1").replace("-", "_").upper()


def _whole_path_bytes(environ: Environ) -> bytes:
    whole: str = environ.get("SCRIPT_NAME", "") + environ.get("PATH_INFO", "")
    return whole.encode("latin-1", "replace")


def _whole_path(environ: Environ) -> str:
    return _whole_path_bytes(environ).decode("utf-8", "replace")


def _is_under(path: str, prefix: str) -> bool:
    seen = path.encode().decode("latin-1")
    return seen.startswith(prefix) and (len(seen) == len(prefix) or seen[len(prefix)] == "/")


def _refuse(method: str, status: int, told: tuple[bytes, Headers], start_response: StartResponse) -> Iterable[bytes]:
    from http import HTTPStatus

    body, headers = told
    text = [(name.decode(), value.decode()) for name, value in headers]
    start_response(f"{status} {HTTPStatus(status).phrase}", text)
    return [] if method == "HEAD" else [body]
