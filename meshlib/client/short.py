"""Which requests may skip httpx's shell, and how is the result still httpx's own?

For an ordinary request httpx spends 80 µs on what it does not use: parsing the URL into an object, merging empty settings, an
authentication flow without authentication, a cookie jar without cookies. The mesh itself needs less than 20. So a request that uses
none of the rarer features goes straight to the way, and comes back as an `httpx.Response` whose `request` is built when somebody asks
for it. Any feature in use takes httpx's own path with equal results; so does every version of httpx that the differential test
(`tests/client/test_short_path.py`) has not been run with, since private fields are set here. It decides nothing about the call.
"""

from __future__ import annotations

import json as jsonlib
import logging
import time
from datetime import timedelta
from types import ModuleType, SimpleNamespace
from typing import Any

from .. import errors
from .._native import core
from .way import Answer, Headers, OutboundWay, run

# Versions whose private fields the differential test has compared.
KNOWN = {"httpx": {"0.28.1"}}
# Authorities that were seen to be plain names of services; a handful in a real process.
MOST_AUTHORITIES = 1024
_BODILESS = ("GET", "HEAD", "OPTIONS", "DELETE")
# Headers that mean work before the body is the caller's.
_RARE = frozenset((b"set-cookie", b"content-encoding"))
# Options of `request` that are about sending, not about the request.
_SENDING = ("auth", "follow_redirects")
_REDIRECTS = frozenset((301, 302, 303, 307, 308))


def _request(asked: tuple[Any, ...]) -> Any:
    """The request as httpx would have built it, made when somebody wants to see it."""
    client, method, url, options = asked
    return client.build_request(method, url, **{k: v for k, v in options.items() if k not in _SENDING})


class Plain:
    """A request that takes the short path, in the form that the way wants."""

    __slots__ = ("body", "connect", "headers", "host", "method", "read", "target")

    def __init__(
        self, method: str, host: str, target: str, headers: Headers, body: bytes | None, read: float | None, connect: float | None
    ) -> None:
        self.method = method
        self.host = host
        self.target = target
        self.headers = headers
        self.body = body
        self.read = read
        self.connect = connect


def clients(httpx: ModuleType, transports: SimpleNamespace) -> SimpleNamespace:
    """`.AsyncClient` and `.Client` for one module of the httpx family; subclasses of its own."""
    default = httpx.USE_CLIENT_DEFAULT
    is_known = httpx.__version__ in KNOWN.get(httpx.__name__, ())
    log = logging.getLogger(httpx.__name__)
    nothing = httpx.ByteStream(b"")
    translate = transports.translate

    class ShortResponse(httpx.Response):  # type: ignore[misc,name-defined]
        """An `httpx.Response` that came by the short path. Pickles and copies as a plain one."""

        @property
        def _request(self) -> Any:
            made = self.__dict__.get("_made")
            if made is None:
                made = self.__dict__["_made"] = _request(self.__dict__["_asked"])
            return made

        @_request.setter
        def _request(self, request: Any) -> None:
            self.__dict__["_made"] = request

        @property
        def elapsed(self) -> timedelta:
            return timedelta(seconds=self.__dict__["_took"])

        @elapsed.setter
        def elapsed(self, elapsed: timedelta) -> None:
            self.__dict__["_took"] = elapsed.total_seconds()

        def __reduce_ex__(self, protocol: Any) -> Any:
            plain = httpx.Response.__new__(httpx.Response)
            plain.__dict__.update({k: v for k, v in self.__dict__.items() if k not in ("_made", "_asked", "_took", "_is_coded")})
            plain._request = self._request
            plain._elapsed = self.elapsed
            _, _, *state = plain.__reduce_ex__(protocol)
            return (object.__new__, (httpx.Response,), *state)

    def headers_of(raw: Headers) -> Any:
        headers = httpx.Headers.__new__(httpx.Headers)
        headers._list = [(name, name, value) for name, value in raw]
        headers._encoding = None
        return headers

    class Short:
        """What both clients share: when the path is open, and what its result looks like."""

        _way: OutboundWay
        _mesh_transport: Any
        _authorities: dict[str, str | None]
        _own_headers: tuple[Any, int, list[tuple[bytes, bytes]], frozenset[bytes]] | None

        def _open(self, way: OutboundWay, transport: Any, kind: Any) -> None:
            self._way = way
            self._mesh_transport = transport
            self._authorities = {}
            self._own_headers = None
            # A subclass that changes how requests are made or sent gets httpx's own path.
            own: Any = type(self)
            self._is_short = is_known and (own.send, own.build_request) == (kind.send, kind.build_request)

        def _defaults(self) -> tuple[list[tuple[bytes, bytes]], frozenset[bytes]]:
            """The client's own headers. Compared as a list, since anybody may have changed them."""
            known = self._own_headers
            now = self._headers._list  # type: ignore[attr-defined]
            if known is not None and known[0] == now:
                return known[2], known[3]
            raw = [(name, value) for name, _, value in now]
            self._own_headers = (list(now), 0, raw, frozenset(lower for _, lower, _ in now))
            return raw, self._own_headers[3]

        def _host(self, authority: str) -> str | None:
            """The service's host if the authority is nothing but its name (and port)."""
            found = self._authorities.get(authority, "")
            if found == "":
                url = httpx.URL(f"http://{authority}/")
                is_plain = url.netloc == authority.encode("ascii", "replace") and not url.userinfo
                found = url.host if is_plain and self._way.engine.service_of(url.host) is not None else None
                if found is not None and len(self._authorities) < MOST_AUTHORITIES:
                    self._authorities[authority] = found
            return found

        def _plain(self, method: Any, url: Any, options: dict[str, Any]) -> Plain | None:
            """The request for the short path, or None if any of the rarer features is in use."""
            me: Any = self
            content = json = headers = None
            timeout = follow_redirects = default
            for name, value in options.items():
                if value is None or value is default:
                    if name == "timeout" and value is None:
                        timeout = None
                elif name == "headers":
                    headers = value
                elif name == "json":
                    json = value
                elif name == "content":
                    content = value
                elif name == "timeout":
                    timeout = value
                elif name == "follow_redirects":
                    follow_redirects = value
                else:
                    return None
            if (
                not self._is_short
                or type(url) is not str
                or not url.startswith("http://")
                or me._transport is not self._mesh_transport
                or me._mounts
                or me._auth is not None
                or me._params
                or me._event_hooks["request"]
                or me._event_hooks["response"]
                or me._cookies.jar._cookies
                or me._base_url.host
                or me._state.value == 3  # closed: the full path raises
                or "handle_async_request" in self._mesh_transport.__dict__
                or "handle_request" in self._mesh_transport.__dict__
                or self.__dict__.keys() & {"send", "build_request"}
                or (me.follow_redirects if follow_redirects is default else follow_redirects)
                or log.isEnabledFor(logging.INFO)
                or (content is not None and json is not None)
            ):
                return None
            authority, slash, rest = url[7:].partition("/")
            target = slash + rest or "/"
            if not core.is_plain_target(target):
                return None
            host = self._host(authority)
            if host is None:
                return None
            own, names = self._defaults()
            sent = [(b"Host", authority.encode()), *own]
            if headers is not None:
                if type(headers) is not dict:
                    return None
                for name, value in headers.items():
                    if type(name) is not str or type(value) is not str or not (name.isascii() and value.isascii()):
                        return None
                    raw = name.encode()
                    if raw.lower() in names or raw.lower() in (b"host", b"content-length", b"content-type", b"transfer-encoding"):
                        return None
                    sent.append((raw, value.encode()))
            method = method.upper()
            body: bytes | None = None
            if json is not None:
                body = jsonlib.dumps(json, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()
                if b"content-length" in names or b"content-type" in names:
                    return None
                sent += ((b"Content-Length", b"%d" % len(body)), (b"Content-Type", b"application/json"))
            elif content is not None:
                if type(content) is str:
                    body = content.encode()
                elif type(content) is bytes:
                    body = content
                else:
                    return None
                if not body or b"content-length" in names:
                    return None
                sent.append((b"Content-Length", b"%d" % len(body)))
            elif method not in _BODILESS:
                sent.insert(1, (b"Content-Length", b"0"))
            if timeout is default:
                limits = me._timeout
                read, connect = limits.read, limits.connect
            elif timeout is None or type(timeout) in (int, float):
                read = connect = timeout
            else:
                return None
            return Plain(method, host, target, sent, body, read, connect)

        def _made(self, answer: Answer, asked: tuple[Any, ...], took: float) -> Any:
            """A response whose body is complete, unless it must be decoded, redirected or mined for cookies first."""
            me: Any = self
            body = answer.body
            response = ShortResponse.__new__(ShortResponse)
            response.__dict__ = {
                "status_code": answer.status,
                "headers": headers_of(answer.headers),
                "next_request": None,
                "extensions": {
                    "http_version": b"HTTP/1.1" if answer.minor else b"HTTP/1.0",
                    "reason_phrase": answer.reason,
                    "meshlib.call": answer.call,
                },
                "history": [],
                "is_closed": True,
                "is_stream_consumed": True,
                "default_encoding": me._default_encoding,
                "stream": nothing,
                "_content": body,
                "_num_bytes_downloaded": len(body) if body is not None else 0,
                "_asked": asked,
                "_took": took,
            }
            for name, _ in answer.headers:
                if name in _RARE:
                    if name == b"set-cookie":
                        me.cookies.extract_cookies(response)
                    else:
                        response.__dict__["_is_coded"] = True
            return response

        async def _go(self, carrier: Any, plain: Plain, asked: tuple[Any, ...]) -> Any:
            me: Any = self
            me._state = type(me._state).OPENED
            begun = time.perf_counter()
            try:
                answer = await self._way.send(
                    carrier, plain.host, plain.method, plain.target, plain.headers, plain.body,
                    timeout=plain.read, connect_timeout=plain.connect,
                )  # fmt: skip
                if answer.body is None:
                    pieces = []
                    while piece := await answer.read():
                        pieces.append(piece)
                    answer.body = b"".join(pieces)
            except errors.MeshError as error:
                raise translate(error, _request(asked)) from error.__cause__
            response = self._made(answer, asked, time.perf_counter() - begun)
            if "_is_coded" in response.__dict__:
                # httpx decodes, from a stream that serves both kinds of client.
                del response.__dict__["_content"], response.__dict__["_is_coded"]
                response.__dict__.update(
                    is_closed=False, is_stream_consumed=False, stream=httpx.ByteStream(answer.body), _num_bytes_downloaded=0
                )
                response.read()
            if answer.status in _REDIRECTS and response.has_redirect_location:
                response.next_request = me._build_redirect_request(response._request, response)
            return response

    class AsyncClient(Short, httpx.AsyncClient):  # type: ignore[misc,name-defined]
        """An `httpx.AsyncClient` whose hosts may be services."""

        def __init__(self, way: OutboundWay, transport: Any, **options: Any) -> None:
            httpx.AsyncClient.__init__(self, transport=transport, **options)
            self._open(way, transport, httpx.AsyncClient)

        async def request(self, method: str, url: Any, **options: Any) -> Any:
            plain = self._plain(method, url, options)
            if plain is None:
                return await httpx.AsyncClient.request(self, method, url, **options)
            return await self._go(self._mesh_transport._carriers.current(), plain, (self, method, url, options))

    class Client(Short, httpx.Client):  # type: ignore[misc,name-defined]
        """An `httpx.Client` whose hosts may be services. Thread-safe, as httpx's is."""

        def __init__(self, way: OutboundWay, transport: Any, **options: Any) -> None:
            httpx.Client.__init__(self, transport=transport, **options)
            self._open(way, transport, httpx.Client)

        def request(self, method: str, url: Any, **options: Any) -> Any:
            plain = self._plain(method, url, options)
            if plain is None:
                return httpx.Client.request(self, method, url, **options)
            return run(self._go(self._mesh_transport._carrier, plain, (self, method, url, options)))

    return SimpleNamespace(AsyncClient=AsyncClient, Client=Client)
