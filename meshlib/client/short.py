"""Which requests may skip httpx's shell, and how is the result still httpx's own?

For an ordinary request httpx spends 80 µs on what it does not use: parsing the URL into an object, merging empty settings, an
authentication flow without authentication, a cookie jar without cookies. The mesh itself needs less than 10. So a request that uses
none of the rarer features goes straight to the way, and comes back as an `httpx.Response` whose parts are made when somebody asks
for them. Any feature in use takes httpx's own path with equal results; so does every version of httpx that the differential test
(`tests/client/test_short_path.py`) has not been run with, since private fields are set here. It decides nothing about the call.
"""

from __future__ import annotations

import importlib
import json as jsonlib
import logging
import time
from collections.abc import Callable
from datetime import timedelta
from functools import lru_cache, wraps
from types import ModuleType, SimpleNamespace
from typing import Any

from .. import errors
from .._native import core
from .faults import too_coded
from .terms import ORDINARY, UNSET, Asked, Terms, Unset, terms_of
from .unpack import bounded
from .way import Answer, Headers, OutboundWay, run

# Versions whose private fields the differential test has compared.
KNOWN = {"httpx": {"0.28.1"}}
# URLs whose parts are remembered; a service calls some dozens of them again and again.
MOST_URLS = 4096
# Methods to which httpx adds a length even without a body.
_BODIED = ("POST", "PUT", "PATCH")
_BODY = {"json", "content", "data", "files"}
_VERBS = ("get", "options", "head", "post", "put", "patch", "delete")
# Headers that mean work before the body is the caller's.
_RARE = frozenset((b"set-cookie", b"content-encoding"))
# What a request's own headers may not say on the short path: httpx merges or computes these, or the transport reads them.
_FRAMING = frozenset((b"host", b"content-length", b"content-type", b"transfer-encoding", b"x-stainless-retry-count"))
clock = time.perf_counter
_REDIRECTS = frozenset((301, 302, 303, 307, 308))
_VERSIONS = {0: b"HTTP/1.0", 1: b"HTTP/1.1", 20: b"HTTP/2"}


def version_of(answer: Answer) -> bytes:
    """The version of HTTP as httpx names it."""
    return _VERSIONS[answer.minor]


class Plain:
    """A request that takes the short path, in the form that the way wants. Shared between calls that ask for the same."""

    __slots__ = ("body", "headers", "host", "method", "own", "target", "terms", "timeout", "url")

    def __init__(
        self,
        method: str,
        url: str,
        host: str,
        target: str,
        headers: Headers,
        body: bytes | None,
        terms: Terms,
        timeout: Any,
        own: object,
    ) -> None:
        self.method = method
        self.url = url
        self.host = host
        self.target = target
        self.headers = headers
        self.body = body
        self.terms = terms
        # As httpx will want to see it in the request.
        self.timeout = timeout
        # The client's own headers that are in it.
        self.own = own


class Lazy:
    """An attribute that is made when it is first asked for, and then an ordinary one."""

    def __init__(self, make: Callable[[Any], Any]) -> None:
        self._make = make

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, instance: Any, owner: Any) -> Any:
        if instance is None:
            return self
        value = self._make(instance)
        setattr(instance, self._name, value)
        return value


def clients(httpx: ModuleType, transports: SimpleNamespace) -> SimpleNamespace:
    """`.AsyncClient` and `.Client` for one module of the httpx family; subclasses of its own."""
    default = httpx.USE_CLIENT_DEFAULT
    states: Any = importlib.import_module(f"{httpx.__name__}._client").ClientState
    is_known = httpx.__version__ in KNOWN.get(httpx.__name__, ())
    log = logging.getLogger(httpx.__name__)
    empty_stream = httpx.ByteStream(b"")
    translate = transports.translate
    unwritable = transports.unwritable
    is_intercepted = transports.is_intercepted

    def headers_of(raw: Headers) -> Any:
        headers = httpx.Headers.__new__(httpx.Headers)
        headers._list = [(name, name, value) for name, value in raw]
        headers._encoding = None
        return headers

    def extensions_of(answer: Answer) -> dict[str, Any]:
        version = version_of(answer)
        if version == b"HTTP/2":
            # It has none, and httpx knows the words.
            return {"http_version": version, "meshlib.call": answer.call}
        return {"http_version": version, "reason_phrase": answer.reason, "meshlib.call": answer.call}

    def request_of(plain: Plain) -> Any:
        """The request as httpx would have built it."""
        return httpx.Request(
            plain.method, plain.url, headers=plain.headers, content=plain.body, extensions={"timeout": plain.timeout}
        )

    def asked(request: Any, is_stream: bool) -> None:
        """Tell the transport what only a client of ours knows: a timeout was asked for, and the answer will be read as a stream."""
        more: dict[str, Any] = {"meshlib.stream": True} if is_stream else {}
        timeout = request.extensions.get("timeout")
        if type(timeout) is dict:
            more["timeout"] = Asked(timeout)
        if more:
            request.extensions = {**request.extensions, **more}

    class ShortResponse(httpx.Response):  # type: ignore[misc,name-defined]
        """An `httpx.Response` that came by the short path. Pickles and copies as a plain one."""

        # What a response of httpx holds in fields of its own, and what is the same in nearly all of them.
        headers = Lazy(lambda self: headers_of(self._answer.headers))
        extensions = Lazy(lambda self: extensions_of(self._answer))
        history = Lazy(lambda _: [])
        _request = Lazy(lambda self: request_of(self._plain))
        _elapsed = Lazy(lambda self: timedelta(seconds=self._took))
        _num_bytes_downloaded = Lazy(lambda self: len(self._content))
        next_request = None
        is_closed = True
        is_stream_consumed = True
        stream = empty_stream

        def __reduce_ex__(self, protocol: Any) -> Any:
            plain = httpx.Response.__new__(httpx.Response)
            for name in parts:
                setattr(plain, name, getattr(self, name))
            own = {"_answer", "_plain", "_took"}
            plain.__dict__.update({name: value for name, value in self.__dict__.items() if name not in own})
            _, _, *state = plain.__reduce_ex__(protocol)
            return (object.__new__, (httpx.Response,), *state)

    parts = (
        "headers", "extensions", "history", "_request", "_elapsed", "_num_bytes_downloaded",
        "next_request", "is_closed", "is_stream_consumed", "stream",
    )  # fmt: skip

    class MeshTimeout(httpx.Timeout):  # type: ignore[misc,name-defined]
        """No timeout of httpx's was asked for: the mesh's deadline is in force."""

        def as_dict(self) -> dict[str, float | None]:
            return Unset(UNSET)

        def __eq__(self, other: object) -> bool:
            # SDKs ask whether it is httpx's default, and then bring their own.
            return isinstance(other, httpx.Timeout) and httpx.Timeout(self) == httpx.Timeout(other)

        __hash__ = None  # type: ignore[assignment]  # as its base

    new = ShortResponse.__new__

    class Short:
        """What both clients share: when the path is open, and what its result looks like."""

        _way: OutboundWay
        _mesh_transport: Any

        def _open(self, way: OutboundWay, transport: Any, kind: Any, has_timeout: bool) -> None:
            if not has_timeout:
                self._timeout = MeshTimeout(5.0)
            self._way = way
            self._mesh_transport = transport
            # Somebody may have replaced it on this one transport.
            self._handler = "handle_async_request" if hasattr(transport, "handle_async_request") else "handle_request"
            # A subclass that changes how requests are made or sent gets httpx's own path.
            own: Any = type(self)
            changes = ("send", "build_request", "_send_single_request", "_send_handling_auth", "_send_handling_redirects")
            self._may_be_short = is_known and all(getattr(own, name) is getattr(kind, name) for name in changes)
            self._urls: dict[str, Plain] = {}
            self._own_headers: tuple[list[Any], frozenset[bytes]] = ([], frozenset())
            self._settings: tuple[bool, Terms, Any, object] = (False, ORDINARY, None, None)

        def __setattr__(self, name: str, value: Any) -> None:
            object.__setattr__(self, name, value)
            # Whatever was changed from outside, what follows from the settings is looked at again. By a mark, and after the
            # change: another thread may be looking at this moment.
            self.__dict__["_mark"] = object()

        def _settle(self) -> tuple[bool, Terms, Any, object]:
            """What follows from the client's settings: whether the short path is open, and its terms; and at which mark."""
            me: Any = self
            mark = me._mark
            is_open = (
                self._may_be_short
                and me._transport is self._mesh_transport
                and not me._mounts
                and me._auth is None
                and not me._params
                and not me._base_url.host
                and not me.follow_redirects
                and me._state is not states.CLOSED
                and not me.__dict__.keys() & {"send", "build_request", "request", "_send_single_request", *_VERBS}
            )
            if me._state is states.UNOPENED:
                # As httpx does before its first request.
                self.__dict__["_state"] = states.OPENED
            timeout = me._timeout.as_dict()
            if type(timeout) is not Unset:
                timeout = Asked(timeout)
            settings = (is_open, terms_of({"timeout": timeout}), timeout, mark)
            self.__dict__["_settings"] = settings
            return settings

        def _bare(self, method: str, url: str, terms: Terms, limits: Any) -> Plain | None:
            """The request without options, if the URL is nothing but a service's name (and port) and a path."""
            if type(url) is not str or not url.startswith("http://"):
                return None
            authority, slash, rest = url[7:].partition("/")
            target = slash + rest or "/"
            if not core.is_plain_target(target):
                return None
            parsed = httpx.URL(f"http://{authority}/")
            if parsed.netloc != authority.encode("ascii", "replace") or parsed.userinfo:
                return None
            if self._way.engine.service_of(parsed.host) is None:
                return None
            own = self._own_headers
            if b"host" in own[1]:
                return None
            headers = [(b"Host", authority.encode()), *((name, value) for name, _, value in own[0])]
            plain = Plain(method, url, parsed.host, target, headers, None, terms, limits, own)
            if len(self._urls) >= MOST_URLS:
                self._urls.clear()
            self._urls[url] = plain
            return plain

        def _plain(self, method: Any, url: Any, options: dict[str, Any]) -> Plain | None:
            """The request for the short path, or None if any of the rarer features is in use."""
            me: Any = self
            settings = self._settings
            if settings[3] is not me._mark:
                settings = self._settle()
            is_open, terms, limits, _ = settings
            hooks = me._event_hooks
            if (
                not is_open
                or hooks["request"]
                or hooks["response"]
                or me._cookies.jar._cookies
                or is_intercepted()
                or log.isEnabledFor(logging.INFO)
                or self._handler in self._mesh_transport.__dict__
            ):
                return None
            # The client's own headers may have been changed in place.
            if self._own_headers[0] != me._headers._list:
                now = list(me._headers._list)
                self.__dict__["_own_headers"] = (now, frozenset(lower for _, lower, _ in now))
            try:
                plain: Plain | None = self._urls.get(url)
            except TypeError:
                return None
            if plain is None or plain.own is not self._own_headers or plain.timeout is not limits:
                plain = self._bare(method, url, terms, limits)
                if plain is None:
                    return None
            if options or method in _BODIED:
                return self._adapted(plain, method, options)
            if plain.method != method:
                plain = Plain(method, plain.url, plain.host, plain.target, plain.headers, None, terms, limits, plain.own)
            return plain

        def _adapted(self, plain: Plain, method: str, options: dict[str, Any]) -> Plain | None:
            """The same with what this one request asks for; None if it is too much."""
            content = json = headers = None
            terms, limits = plain.terms, plain.timeout
            for name, value in options.items():
                if value is None or value is default:
                    if name == "timeout" and value is None:
                        limits = Asked(httpx.Timeout(None).as_dict())
                        terms = terms_of({"timeout": limits})
                elif name == "headers":
                    headers = value
                elif name == "json":
                    json = value
                elif name == "content":
                    content = value
                elif name == "timeout" and type(value) in (int, float):
                    limits = Asked(httpx.Timeout(value).as_dict())
                    terms = terms_of({"timeout": limits})
                elif name != "follow_redirects" or value is not False:
                    return None
            if content is not None and json is not None:
                return None
            names, sent, body = self._own_headers[1], plain.headers, None
            if headers is not None:
                added = self._added(headers)
                if added is None:
                    return None
                sent = [*sent, *added]
            if json is not None:
                body = jsonlib.dumps(json, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()
                if b"content-length" in names or b"content-type" in names:
                    return None
                sent = [*sent, (b"Content-Length", b"%d" % len(body)), (b"Content-Type", b"application/json")]
            elif content is not None:
                if type(content) is str:
                    body = content.encode()
                elif type(content) is bytes:
                    body = content
                if not body or b"content-length" in names:
                    return None
                sent = [*sent, (b"Content-Length", b"%d" % len(body))]
            elif method in _BODIED:
                sent = [sent[0], (b"Content-Length", b"0"), *sent[1:]]
            return Plain(method, plain.url, plain.host, plain.target, sent, body, terms, limits, plain.own)

        def _added(self, headers: Any) -> Headers | None:
            """The headers of one request, if httpx would only put them behind the client's own."""
            if type(headers) is not dict:
                return None
            names, added = self._own_headers[1], []
            for name, value in headers.items():
                if type(name) is not str or type(value) is not str or not (name.isascii() and value.isascii()):
                    return None
                raw = name.encode()
                lower = raw.lower()
                if lower in names or lower in _FRAMING:
                    return None
                added.append((raw, value.encode()))
            return added

        def _refused(self, error: errors.MeshError, plain: Plain) -> None:
            """Raise what httpx would. A service that is gone since its URL was looked at: its own path says what becomes of it."""
            if not isinstance(error, errors.UnknownService):
                raise translate(error, request_of(plain)) from error.__cause__
            self._urls.clear()

        def _made(self, answer: Answer, body: Any, plain: Plain, took: float) -> Any:
            me: Any = self
            # One by one: a dictionary would cost more than all the rest.
            response: Any = new(ShortResponse)
            response.status_code = answer.status
            response._content = body
            response.default_encoding = me._default_encoding
            response._answer = answer
            response._plain = plain
            response._took = took
            for name, _ in answer.headers:
                if name in _RARE:
                    self._unpack(response, name, body)
            if answer.status in _REDIRECTS and response.has_redirect_location:
                response.next_request = me._build_redirect_request(response._request, response)
            return response

        def _unpack(self, response: Any, name: bytes, body: Any) -> None:
            """Cookies are kept; a coded body is decoded by httpx, from a stream that serves both kinds of client."""
            me: Any = self
            if name == b"set-cookie":
                me.cookies.extract_cookies(response)
            elif "_content" in response.__dict__:
                flaw = too_coded(response._answer.headers)
                if flaw is not None:
                    flaw.call = response._answer.call
                    raise flaw
                del response.__dict__["_content"]
                response.__dict__.update(
                    is_closed=False, is_stream_consumed=False, stream=httpx.ByteStream(body), _num_bytes_downloaded=0
                )
                bounded(httpx, response)
                try:
                    response.read()
                except httpx.HTTPError as error:
                    error.request = response._request
                    raise

    class AsyncClient(Short, httpx.AsyncClient):  # type: ignore[misc,name-defined]
        """An `httpx.AsyncClient` whose hosts may be services."""

        def __init__(self, way: OutboundWay, transport: Any, **options: Any) -> None:
            options.setdefault("transport", transport)
            httpx.AsyncClient.__init__(self, **options)
            self._open(way, transport, AsyncClient, "timeout" in options)

        async def request(self, method: str, url: Any, **options: Any) -> Any:
            return await _async_call(method.upper())(self, url, **options)

        async def send(self, request: Any, *, stream: bool = False, **options: Any) -> Any:
            asked(request, stream)
            return await httpx.AsyncClient.send(self, request, stream=stream, **options)

    class Client(Short, httpx.Client):  # type: ignore[misc,name-defined]
        """An `httpx.Client` whose hosts may be services. Thread-safe, as httpx's is."""

        def __init__(self, way: OutboundWay, transport: Any, **options: Any) -> None:
            options.setdefault("transport", transport)
            httpx.Client.__init__(self, **options)
            self._open(way, transport, Client, "timeout" in options)

        def request(self, method: str, url: Any, **options: Any) -> Any:
            return _call(method.upper())(self, url, **options)

        def send(self, request: Any, *, stream: bool = False, **options: Any) -> Any:
            asked(request, stream)
            return httpx.Client.send(self, request, stream=stream, **options)

    def async_call(method: str, full: Any, may_have_body: bool = True) -> Any:
        """The function that makes one kind of call: by the short path, or by `full`, which is httpx's own."""

        async def ask(self: Any, url: Any, **options: Any) -> Any:
            plain = self._plain(method, url, options) if may_have_body or not options.keys() & _BODY else None
            if plain is not None:
                begun = clock()
                carrier = self._mesh_transport._carrier()
                try:
                    answer = await self._way.send(
                        carrier, plain.host, method, plain.target, plain.headers, plain.body, plain.terms
                    )
                    body = await _all_of(answer) if answer.body is None else answer.body
                    return self._made(answer, body, plain, clock() - begun)
                except errors.MeshError as error:
                    self._refused(error, plain)
                except ValueError as error:
                    raise unwritable(error, request_of(plain)) from error.__cause__
            return await full(self, url, **options)

        return ask

    def call(method: str, full: Any, may_have_body: bool = True) -> Any:
        """The same in a thread."""

        def ask(self: Any, url: Any, **options: Any) -> Any:
            plain = self._plain(method, url, options) if may_have_body or not options.keys() & _BODY else None
            if plain is not None:
                begun = clock()
                carrier = self._mesh_transport._carrier
                try:
                    answer = run(
                        self._way.send(carrier, plain.host, method, plain.target, plain.headers, plain.body, plain.terms)
                    )
                    body = run(_all_of(answer)) if answer.body is None else answer.body
                    return self._made(answer, body, plain, clock() - begun)
                except errors.MeshError as error:
                    self._refused(error, plain)
                except ValueError as error:
                    raise unwritable(error, request_of(plain)) from error.__cause__
            return full(self, url, **options)

        return ask

    def own(kind: type, name: str) -> Any:
        """httpx's own method, looked up at the call: somebody may have replaced it."""
        return lambda self, url, **options: getattr(kind, name)(self, url, **options)  # noqa: PLW0108

    @lru_cache(64)
    def _async_call(method: str) -> Any:
        return async_call(method, lambda self, url, **options: httpx.AsyncClient.request(self, method, url, **options))

    @lru_cache(64)
    def _call(method: str) -> Any:
        return call(method, lambda self, url, **options: httpx.Client.request(self, method, url, **options))

    for name in _VERBS:
        method, has_body = name.upper(), name in ("post", "put", "patch")
        for kind, make in ((AsyncClient, async_call), (Client, call)):
            setattr(kind, name, wraps(getattr(kind.__mro__[2], name))(make(method, own(kind.__mro__[2], name), has_body)))
    return SimpleNamespace(AsyncClient=AsyncClient, Client=Client)


async def _all_of(answer: Answer) -> bytes:
    pieces = []
    try:
        while piece := await answer.read():
            pieces.append(piece)
    except BaseException:
        # Cancelled: nobody else knows of this answer.
        await answer.close()
        raise
    return b"".join(pieces)
