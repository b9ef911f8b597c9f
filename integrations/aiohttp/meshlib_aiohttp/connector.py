"""How does a request of aiohttp get onto the mesh's way?

By the connector, which gives a request whose host is a service a `Link` instead of a socket: one for each call, since a call is what the
mesh balances, and free of cost to make. The connections that cost something are the mesh's, which keeps them. All other hosts are
connected as ever, under the egress policy, with the session's `ssl`, `proxy` and resolver; none of the three concerns a service.

aiohttp itself sends an idempotent request once more when a connection breaks. Within a call to a service that would nest two
retry loops, so that the second sending of the same request gets the first one's error, and the mesh alone decides.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from contextvars import ContextVar
from ssl import CERT_REQUIRED, SSLContext
from typing import Any

import aiohttp
from aiohttp.client import DEFAULT_TIMEOUT
from aiohttp.client_proto import ResponseHandler
from aiohttp.connector import Connection

import meshlib

from .failures import again, as_aiohttp_says
from .link import Link, Reader


class Asked:
    """The last request to a service in this context, and how it failed."""

    __slots__ = ("failure", "request", "timer")

    def __init__(self, request: aiohttp.ClientRequest) -> None:
        # One per `session.request`, also if aiohttp makes a second request of it; private, so that it may be missing one day.
        self.timer = getattr(request, "_timer", None)
        self.request = weakref.ref(request)
        self.failure: meshlib.MeshError | None = None

    def is_before(self, request: aiohttp.ClientRequest) -> bool:
        return self.timer is not None and self.timer is getattr(request, "_timer", None) and self.request() is not request


_asked: ContextVar[Asked | None] = ContextVar("meshlib_aiohttp.asked", default=None)


class MeshConnector(aiohttp.TCPConnector):
    """A connector whose hosts may be services of the mesh. Belongs to the event loop in which it is made, as every connector.

    `extensions` go with every call to a service, as with `httpx`: ``meshlib.policy(idempotent=True)``. `options` are those of
    `TCPConnector`; its limits count calls to services too.
    """

    def __init__(self, mesh: meshlib.Mesh, *, extensions: Mapping[str, Any] | None = None, **options: Any) -> None:
        super().__init__(**options)
        self.mesh = mesh
        self._extensions = dict(extensions or {})
        self._way = mesh.transport()

    async def connect(self, req: aiohttp.ClientRequest, traces: list[Any], timeout: aiohttp.ClientTimeout) -> Connection:
        """A connection for one request; called by the session."""
        is_service = self._is_service(req)
        if is_service:
            before = _asked.get()
            if before is not None and before.failure is not None and before.is_before(req):
                raise again(before.failure)
            _asked.set(Asked(req))
        else:
            self._leave(req)
        while True:
            connection = await super().connect(req, traces, timeout)
            if isinstance(connection.protocol, Reader) is is_service:
                return connection
            # It waited in the pool while the host became a service.
            connection.close()

    async def close(self, *, abort_ssl: bool = False) -> None:
        """Close all connections, also the mesh's for this connector."""
        await super().close(abort_ssl=abort_ssl)
        await self._way.aclose()

    async def _create_connection(
        self, req: aiohttp.ClientRequest, traces: list[Any], timeout: aiohttp.ClientTimeout
    ) -> ResponseHandler:
        if not self._is_service(req):
            return await super()._create_connection(req, traces, timeout)
        asked = _asked.get()

        def remember(error: meshlib.MeshError) -> None:
            if asked is not None:
                asked.failure = again(error)

        reader = Reader(self._loop)
        reader.connection_made(
            Link(reader, self._way, req, _terms(timeout, self._extensions), loop=self._loop, on_failure=remember)
        )
        return reader

    def _is_service(self, req: aiohttp.ClientRequest) -> bool:
        return self.mesh.service_of(req.url.raw_host or "") is not None

    def _leave(self, req: aiohttp.ClientRequest) -> None:
        host = req.url.raw_host or ""
        # True leaves it to the connector. Another name to prove is another host.
        is_verified = _is_asking_who(self._ssl if req.ssl is True else req.ssl) and req.server_hostname in (None, host)
        try:
            headers = self.mesh.leaving(req.url.scheme, host, req.headers.items(), is_verified=is_verified)
        except meshlib.MeshError as error:
            raise as_aiohttp_says(error, req) from None
        # Its own list: a redirect is made from the session's.
        req.headers.clear()
        req.headers.extend(headers)


def session(mesh: meshlib.Mesh, *, extensions: Mapping[str, Any] | None = None, **options: Any) -> aiohttp.ClientSession:
    """An `aiohttp.ClientSession` whose hosts may be services: ``session.get("http://orders/items/7")``. `options` are its own."""
    return aiohttp.ClientSession(connector=MeshConnector(mesh, extensions=extensions), **options)


def _is_asking_who(ssl: object) -> bool:
    """Does this setting of aiohttp prove the other side's name? `False` and a fingerprint don't, and a context may be one that doesn't."""
    return ssl is True or (isinstance(ssl, SSLContext) and ssl.verify_mode is CERT_REQUIRED and ssl.check_hostname)


def _terms(timeout: aiohttp.ClientTimeout, extensions: Mapping[str, Any]) -> dict[str, Any]:
    """A timeout of aiohttp as the mesh takes it. aiohttp's own default is no wish, so that the route's deadline stays in force.

    The total is told to the next hop; the times between two reads aiohttp keeps by itself.
    """
    if timeout == DEFAULT_TIMEOUT:
        return dict(extensions)
    connect = min((seconds for seconds in (timeout.connect, timeout.sock_connect) if seconds), default=None)
    terms = {**extensions, "timeout": {"connect": connect, "read": None, "write": None, "pool": None}}
    if timeout.total and "meshlib.policy" not in extensions:
        terms["meshlib.policy"] = {"timeout": timeout.total}
    return terms
