"""How does an application that speaks httpx use the mesh?

Through a transport, which is httpx's own seam, and through clients that are built on it. httpx asserts that a response's stream is
of *its own* classes, so the classes are made per module: `faces(httpx)` and `faces(httpx2)` both work. Hosts that are Services go
through the mesh; others (egress) go out by httpx's own transport, if the configuration allows it. Errors are of httpx's classes and of
ours at once, so that existing `except httpx.TransportError` keeps working. It routes nothing: `way.py` does.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import AsyncIterator, Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

from .. import errors
from .loop import LoopCarriers
from .thread import ThreadCarrier
from .way import Answer, OutboundWay, run

# Which of httpx's errors each of ours also is. The most special first: the first match wins.
TWINS: tuple[tuple[type[errors.MeshError], str], ...] = (
    (errors.ConnectFailed, "ConnectError"),
    (errors.PeerIdentityError, "ConnectError"),
    (errors.TlsError, "ConnectError"),
    (errors.AttemptTimeout, "ReadTimeout"),
    (errors.DeadlineExceeded, "ReadTimeout"),
    (errors.ConnectionLost, "ReadError"),
    (errors.ProtocolError, "RemoteProtocolError"),
    (errors.AttemptFailed, "TransportError"),
    (errors.UnknownService, "ConnectError"),
    (errors.NoRoute, "ConnectError"),
    (errors.NoEndpoint, "ConnectError"),
    (errors.CircuitOpen, "ConnectError"),
    (errors.LimitExceeded, "PoolTimeout"),
    (errors.RateLimited, "PoolTimeout"),
    (errors.Denied, "ConnectError"),
    (errors.IdentityError, "ConnectError"),
)

_faces: dict[str, SimpleNamespace] = {}
_carriers: weakref.WeakSet[Any] = weakref.WeakSet()


def _after_fork() -> None:
    for carriers in list(_carriers):
        carriers.forget()


os.register_at_fork(after_in_child=_after_fork)


def faces(httpx: ModuleType) -> SimpleNamespace:
    """The classes for one module of the httpx family: `.AsyncTransport`, `.Transport`, `.AsyncClient` and `.Client`."""
    found = _faces.get(httpx.__name__)
    if found is None:
        found = _faces[httpx.__name__] = _make(httpx)
    return found


def _twins(httpx: ModuleType) -> dict[type[errors.MeshError], type[errors.MeshError]]:
    def twin(ours: type[errors.MeshError], theirs: type[Exception]) -> type[errors.MeshError]:
        # httpx's own __init__ is not called: it would set `request` aside; the attribute is set where the error is raised.
        return type(ours.__name__, (ours, theirs), {"__module__": ours.__module__, "__doc__": ours.__doc__, "_request": None})

    return {ours: twin(ours, getattr(httpx, name)) for ours, name in TWINS}


def _make(httpx: ModuleType) -> SimpleNamespace:
    twins = _twins(httpx)

    def translate(error: errors.MeshError, request: Any) -> errors.MeshError:
        """The same error, of httpx's class too. What it knows moves over; its cause stays its cause."""
        kind = next((twins[ours] for ours, _ in TWINS if isinstance(error, ours)), None)
        if kind is None or isinstance(error, httpx.HTTPError):
            return error
        made = kind.__new__(kind)
        made.args = error.args
        made.__dict__.update(error.__dict__)
        made._request = request  # type: ignore[attr-defined]
        made.__cause__ = error.__cause__
        return made

    async def go(way: OutboundWay, carrier: Any, host: str, request: Any) -> Answer:
        """Send a request of httpx on its way, for both kinds of client."""
        given = request.extensions.get("timeout") or {}
        try:
            return await way.send(
                carrier,
                host,
                request.method,
                request.url.raw_path.decode("ascii"),
                request.headers.raw,
                request._content if hasattr(request, "_content") else request.stream,
                timeout=given.get("read"),
                connect_timeout=given.get("connect"),
                idempotent=request.extensions.get("meshlib.idempotent"),
            )
        except errors.MeshError as error:
            raise translate(error, request) from error.__cause__

    def response(answer: Answer, stream: Any) -> Any:
        """The answer as httpx's own; its body is `stream` unless it is here already."""
        return httpx.Response(
            answer.status,
            headers=answer.headers,
            stream=httpx.ByteStream(answer.body) if answer.body is not None else stream,
            extensions={
                "http_version": b"HTTP/1.1" if answer.minor else b"HTTP/1.0",
                "reason_phrase": answer.reason,
                "meshlib.call": answer.call,
            },
        )

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

    class AsyncTransport(httpx.AsyncBaseTransport):  # type: ignore[misc,name-defined]
        """The mesh as an httpx transport. Belongs to no event loop; each loop that uses it gets its own connections."""

        def __init__(self, way: OutboundWay, egress: str) -> None:
            self._way = way
            self._egress = egress
            self._carriers = LoopCarriers()
            _carriers.add(self._carriers)
            self._outside: Any = None

        async def handle_async_request(self, request: Any) -> Any:
            host = request.url.raw_host.decode("ascii")
            if self._way.engine.service_of(host) is None:
                return await self._out(host, request).handle_async_request(request)
            answer = await go(self._way, self._carriers.current(), host, request)
            return response(answer, AsyncAnswerStream(answer, request))

        def _out(self, host: str, request: Any) -> Any:
            try:
                check_egress(host, self._egress)
            except errors.MeshError as error:
                raise translate(error, request) from None
            if self._way.observer is not None:
                self._way.observer.egress(host)
            if self._outside is None:
                self._outside = httpx.AsyncHTTPTransport()
            return self._outside

        async def aclose(self) -> None:
            self._carriers.close()
            if self._outside is not None:
                await self._outside.aclose()

    class Transport(httpx.BaseTransport):  # type: ignore[misc,name-defined]
        """The same for the blocking client. Thread-safe: a connection is used by one thread at a time."""

        def __init__(self, way: OutboundWay, egress: str) -> None:
            self._way = way
            self._egress = egress
            self._carrier = ThreadCarrier()
            _carriers.add(self._carrier)
            self._outside: Any = None

        def handle_request(self, request: Any) -> Any:
            host = request.url.raw_host.decode("ascii")
            if self._way.engine.service_of(host) is None:
                return self._out(host, request).handle_request(request)
            answer = run(go(self._way, self._carrier, host, request))
            return response(answer, AnswerStream(answer, request))

        def _out(self, host: str, request: Any) -> Any:
            try:
                check_egress(host, self._egress)
            except errors.MeshError as error:
                raise translate(error, request) from None
            if self._way.observer is not None:
                self._way.observer.egress(host)
            if self._outside is None:
                self._outside = httpx.HTTPTransport()
            return self._outside

        def close(self) -> None:
            self._carrier.close()
            if self._outside is not None:
                self._outside.close()

    transports = SimpleNamespace(
        AsyncTransport=AsyncTransport,
        Transport=Transport,
        translate=translate,
    )
    from .short import clients

    return SimpleNamespace(**vars(transports), **vars(clients(httpx, transports)))


def check_egress(host: str, egress: str) -> None:
    """Refuse what is no Service and may not leave. A bare name is a Service that is missing, never a host outside."""
    if "." not in host and ":" not in host and host != "localhost":
        raise errors.UnknownService(
            f"no service is called {host!r}.", hint="Add it to mesh.yaml; a host outside the mesh needs a dot in its name."
        )
    if egress == "deny":
        raise errors.Denied(
            f"{host!r} is not a service, and egress is denied.", rule="egress: deny", hint="Set `egress: allow` in mesh.yaml."
        )
