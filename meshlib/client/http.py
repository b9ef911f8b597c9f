"""How does an application that speaks httpx use the mesh?

Through a transport, which is httpx's own seam, and through clients that are built on it. httpx asserts that a response's stream is
of *its own* classes, so the classes are made per module: `faces(httpx)` and `faces(httpx2)` both work. Hosts that are Services go
through the mesh; others go out by `egress.py`, if the configuration allows it. Errors are of httpx's classes and of ours at once
(`twins.py`), and whoever intercepts httpx intercepts this as well (`intercept.py`). It routes nothing: `way.py` does.

Of httpx's request extensions the mesh itself obeys `timeout` and calls `trace` (the events `http11.send_request_headers.started` and
`http11.receive_response_headers.complete` or `.failed`, once per call and not per attempt); `sni_hostname` and the rest of httpcore's
events are for egress only, since a Service's name and its connections are the mesh's affair.
"""

from __future__ import annotations

import os
import re
import weakref
from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import ModuleType, SimpleNamespace
from typing import Any

from .. import errors
from ..call import current_layer, outer_layer
from .egress import NETWORK, Egress, EgressRules, check_egress, leave
from .faults import too_coded
from .intercept import core_of, interception
from .loop import LoopCarriers
from .stand_in import policy_of, stand_ins
from .terms import Unset, terms_of
from .thread import ThreadCarrier
from .twins import UNWRITABLE, twins
from .unpack import bounded
from .upgraded import streams
from .way import Answer, OutboundWay, run

__all__ = ["NETWORK", "check_egress", "faces", "leave"]

# What httpx sends; anything else it refuses in these words.
_SCHEMES = ("http", "https", "ws", "wss")
# How the wire begins its refusal of a request whose framing contradicts itself.
_MISFRAMED = "The request can't be written: "
_HTTP2 = 20
_VERSIONS = {0: b"HTTP/1.0", 1: b"HTTP/1.1", _HTTP2: b"HTTP/2"}
# What may stand in a request (RFC 9110, 5.1 and 5.5; 9112, 3).
_TOKEN = re.compile(rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")
_VALUE = re.compile(rb"[^\x00-\x08\x0a-\x1f\x7f]*")

_faces: dict[str, SimpleNamespace] = {}
_carriers: weakref.WeakSet[Any] = weakref.WeakSet()


def _after_fork() -> None:
    for carriers in list(_carriers):
        carriers.forget()


os.register_at_fork(after_in_child=_after_fork)


def httpx_of(module: ModuleType | None) -> ModuleType:
    """The module that was given, or httpx."""
    if module is None:
        import httpx

        return httpx
    return module


def laid_out(options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """A client's options: those of its transport, and those of httpx's own constructor."""
    network = {name: options[name] for name in NETWORK if name in options}
    rest = {name: value for name, value in options.items() if name not in {*NETWORK, "transport"}}
    # httpx's own look at the environment can't find a proxy for a Service, since a transport is given: egress looks there itself.
    return network, {**rest, "trust_env": network.get("trust_env", True)}


def faces(httpx: ModuleType) -> SimpleNamespace:
    """The classes for one module of the httpx family: `.AsyncTransport`, `.Transport`, `.AsyncClient` and `.Client`."""
    found = _faces.get(httpx.__name__)
    if found is None:
        found = _faces[httpx.__name__] = _make(httpx)
    return found


def _make(httpx: ModuleType) -> SimpleNamespace:
    translate = twins(httpx)
    intercepted = interception(httpx)
    stream_of = streams(core_of(httpx)).stream_of
    fallen = stand_ins(httpx)

    def body_of(request: Any) -> Any:
        """Bytes where the body is known, so that it can be sent again; otherwise what it comes from."""
        if hasattr(request, "_content"):
            return request._content
        # A redirected request, or one that was made by hand, holds its bytes in a stream only.
        return b"".join(request.stream) if isinstance(request.stream, httpx.ByteStream) else request.stream

    async def go(way: OutboundWay, carrier: Any, host: str, request: Any) -> Answer:
        """Send a request of httpx on its way, for both kinds of client."""
        try:
            answer = await way.send(
                carrier,
                host,
                request.method,
                request.url.raw_path.decode("ascii"),
                request.headers.raw,
                body_of(request),
                terms_of(request.extensions, is_private=request.url.scheme in ("https", "wss")),
            )
            flaw = too_coded(answer.headers)
            if flaw is not None:
                flaw.call = answer.call
                await answer.close()
                raise flaw
            return answer
        except errors.MeshError as error:
            raise translate(error, request) from error.__cause__

    def response(answer: Answer, stream: Any, *, is_async: bool) -> Any:
        """The answer as httpx's own; its body is `stream` unless it is here already."""
        extensions = {"http_version": _VERSIONS[answer.minor], "meshlib.call": answer.call}
        if answer.minor != _HTTP2:
            # HTTP/2 has no such words, and httpx then knows the usual ones.
            extensions["reason_phrase"] = answer.reason
        if answer.body is None:
            extensions["network_stream"] = stream_of(answer, is_async=is_async)
        made = httpx.Response(
            answer.status,
            headers=answer.headers,
            stream=httpx.ByteStream(answer.body) if answer.body is not None else stream,
            extensions=extensions,
        )
        return bounded(httpx, made) if "content-encoding" in made.headers else made

    def check(request: Any) -> None:
        """Refuse what httpx's own transport refuses before it looks at the host."""
        scheme = request.url.scheme
        if scheme not in _SCHEMES:
            text = (
                f"Request URL has an unsupported protocol '{scheme}://'."
                if scheme
                else "Request URL is missing an 'http://' or 'https://' protocol."
            )
            raise httpx.UnsupportedProtocol(text, request=request)

    def unwritable(error: ValueError, request: Any) -> BaseException:
        """The wire takes no request that can't be written. The same error comes from a body's iterator, and is left alone then."""
        why = flaw(request.method.encode("ascii", "replace"), request.headers.raw) or str(error).partition(_MISFRAMED)[2]
        if not why:
            return error
        made = errors.Refused(f"the request can't be written: {why.rstrip('.')}.", hint="Nothing was sent.", reason=UNWRITABLE)
        made.__cause__ = error
        return translate(made, request)

    def settled(way: OutboundWay, host: str, request: Any, outside: Egress) -> Any:
        """Before a request leaves the mesh: may it, for how long, and with what on it? The request to send."""
        try:
            leave(way, host)
            leaving = outside.dressed(way.egress, request)
        except errors.MeshError as error:
            raise translate(error, request) from None
        if type(request.extensions.get("timeout")) is Unset:
            # No timeout was asked for, and outside there is no route whose deadline is in force: httpx's own default is.
            leaving.extensions = {**request.extensions, "timeout": httpx.Timeout(5.0).as_dict()}
        return leaving

    class AsyncAnswerStream(httpx.AsyncByteStream):  # type: ignore[misc,name-defined]
        def __init__(self, answer: Answer, request: Any) -> None:
            self._answer = answer
            self._request = request

        async def __aiter__(self) -> AsyncIterator[bytes]:
            try:
                while piece := await self._answer.read():
                    yield piece
            except errors.MeshError as error:
                raise translate(error, self._request) from error.__cause__

        async def aclose(self) -> None:
            await self._answer.close()

    class AnswerStream(httpx.SyncByteStream):  # type: ignore[misc,name-defined]
        def __init__(self, answer: Answer, request: Any) -> None:
            self._answer = answer
            self._request = request

        def __iter__(self) -> Iterator[bytes]:
            try:
                while piece := run(self._answer.read()):
                    yield piece
            except errors.MeshError as error:
                raise translate(error, self._request) from error.__cause__

        def close(self) -> None:
            run(self._answer.close())

    class Owner:
        """What both transports are made of: the way, and what leaves beside it."""

        def __init__(self, way: OutboundWay, *, is_async: bool, **network: Any) -> None:
            self._way = way
            self._outside = Egress(httpx, is_async=is_async, **network)
            # What may be spoken with the endpoints of the mesh, too.
            self.protocols = self._outside.protocols
            _carriers.add(self._outside)

    class AsyncTransport(Owner, httpx.AsyncBaseTransport):  # type: ignore[misc,name-defined]
        """The mesh as an httpx transport. Belongs to no event loop; each loop that uses it gets its own connections."""

        def __init__(self, way: OutboundWay, **network: Any) -> None:
            super().__init__(way, is_async=True, **network)
            self._carriers = LoopCarriers(way.ledger, self.protocols)
            _carriers.add(self._carriers)

        async def handle_async_request(self, request: Any) -> Any:
            check(request)
            if intercepted.is_intercepted() and intercepted.is_diverted():
                return await self._divert(request)
            return await self._deliver(request)

        async def _deliver(self, request: Any) -> Any:
            host = request.url.raw_host.decode("ascii")
            service = self._way.engine.service_of(host)
            if service is None:
                request = settled(self._way, host, request, self._outside)
                return await self._outside.transport_for(request.url).handle_async_request(request)
            policy = policy_of(request)
            if policy is not None:
                return await fallen.fetch_async(self._way, service, policy, request, self._send)
            return await self._send(request)

        async def _send(self, request: Any) -> Any:
            host = request.url.raw_host.decode("ascii")
            trace = request.extensions.get("trace")
            if trace is not None:
                await trace("http11.send_request_headers.started", {"request": request})
            try:
                with layered(request):
                    answer = await go(self._way, self._carrier(), host, request)
            except BaseException as error:
                if trace is not None:
                    await trace("http11.receive_response_headers.failed", {"exception": error})
                if isinstance(error, ValueError):
                    raise unwritable(error, request) from error.__cause__
                raise
            if trace is not None:
                await trace("http11.receive_response_headers.complete", {"return_value": seen(answer)})
            return response(answer, AsyncAnswerStream(answer, request), is_async=True)

        async def _divert(self, request: Any) -> Any:
            host = request.url.raw_host.decode("ascii")
            if self._way.engine.service_of(host) is None and is_outside(host, self._way.egress):
                return await self._deliver(request)
            return await intercepted.AsyncDiversion(self._deliver).divert(request)

        def _carrier(self) -> Any:
            try:
                return self._carriers.current()
            except RuntimeError as error:
                raise no_loop() from error

        async def aclose(self) -> None:
            self._carriers.close()
            await self._outside.aclose()

    class Transport(Owner, httpx.BaseTransport):  # type: ignore[misc,name-defined]
        """The same for the blocking client. Thread-safe: a connection is used by one thread at a time."""

        def __init__(self, way: OutboundWay, **network: Any) -> None:
            super().__init__(way, is_async=False, **network)
            self._carrier = ThreadCarrier(way.ledger, self.protocols)
            _carriers.add(self._carrier)
            way.carriers.add(self._carrier)

        def handle_request(self, request: Any) -> Any:
            check(request)
            if intercepted.is_intercepted() and intercepted.is_diverted():
                return self._divert(request)
            return self._deliver(request)

        def _deliver(self, request: Any) -> Any:
            host = request.url.raw_host.decode("ascii")
            service = self._way.engine.service_of(host)
            if service is None:
                request = settled(self._way, host, request, self._outside)
                return self._outside.transport_for(request.url).handle_request(request)
            policy = policy_of(request)
            if policy is not None:
                return fallen.fetch(self._way, service, policy, request, self._send)
            return self._send(request)

        def _send(self, request: Any) -> Any:
            host = request.url.raw_host.decode("ascii")
            trace = request.extensions.get("trace")
            if trace is not None:
                trace("http11.send_request_headers.started", {"request": request})
            try:
                with layered(request):
                    answer = run(go(self._way, self._carrier, host, request))
            except BaseException as error:
                if trace is not None:
                    trace("http11.receive_response_headers.failed", {"exception": error})
                if isinstance(error, ValueError):
                    raise unwritable(error, request) from error.__cause__
                raise
            if trace is not None:
                trace("http11.receive_response_headers.complete", {"return_value": seen(answer)})
            return response(answer, AnswerStream(answer, request), is_async=False)

        def _divert(self, request: Any) -> Any:
            host = request.url.raw_host.decode("ascii")
            if self._way.engine.service_of(host) is None and is_outside(host, self._way.egress):
                return self._deliver(request)
            return intercepted.Diversion(self._deliver).divert(request)

        def close(self) -> None:
            self._carrier.close()
            self._outside.close()

    transports = SimpleNamespace(
        AsyncTransport=AsyncTransport,
        Transport=Transport,
        translate=translate,
        unwritable=unwritable,
        is_intercepted=intercepted.is_intercepted,
    )
    from .short import clients

    return SimpleNamespace(**vars(transports), **vars(clients(httpx, transports)))


# The headers in which a client that retries by itself says which attempt this is: those of the SDKs that are made with Stainless.
_ATTEMPT = "x-stainless-retry-count"
_ONCE = nullcontext()


def layered(request: Any) -> AbstractContextManager[None]:
    """A repeated attempt of somebody above isn't repeated here as well: so their attempts and ours add up, and don't multiply."""
    value = request.headers.get(_ATTEMPT)
    if value is None or value == "0" or not value.isdigit():
        return _ONCE
    return _layer(min(int(value), 1000))


@contextmanager
def _layer(layer: int) -> Iterator[None]:
    token = current_layer.set(max(layer, outer_layer()))
    try:
        yield
    finally:
        current_layer.reset(token)


def seen(answer: Answer) -> tuple[Any, ...]:
    """The head of an answer as httpcore's trace tells it."""
    return (_VERSIONS[answer.minor], answer.status, answer.reason, answer.headers)


def flaw(method: bytes, headers: list[tuple[bytes, bytes]]) -> str | None:
    """Why a request can't be written, without its values: they may be secret."""
    if not _TOKEN.fullmatch(method):
        return f"{method!r} is no method"
    for name, value in headers:
        if not _TOKEN.fullmatch(name):
            return f"{name!r} is no name of a header"
        if not _VALUE.fullmatch(value):
            return f"the value of the header {name.decode()!r} has a control character in it"
    return None


def is_outside(host: str, policy: str | EgressRules) -> bool:
    try:
        check_egress(host, policy)
    except errors.MeshError:
        return False
    return True


def no_loop() -> errors.ConfigError:
    """What an asynchronous client says where no asyncio loop runs."""
    return errors.ConfigError(
        "meshlib's async client runs on asyncio (or uvloop, or anyio on top of it), and no asyncio loop runs here.",
        hint="Under trio, run it with anyio's asyncio backend, or call mesh.sync_client() in a thread.",
    )
