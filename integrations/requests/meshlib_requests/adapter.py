"""How does a prepared request of requests get onto the mesh's way?

Through `HTTPAdapter.send`, overridden for hosts that are services: there the mesh's blocking transport carries the request, and its
answer becomes a `requests.Response` by the adapter's own `build_response`. For all other hosts the adapter is what it ever was, with its
pool, `max_retries`, `proxies`, `verify` and `cert`. None of these four concerns a service: the mesh balances and tries again by its own
policy, and its certificates say who is who; so two retry loops are never nested.

Thread-safe as the transport is, and in a forked child its connections to services are made anew.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any
from urllib.parse import urlsplit

import httpx
import requests
from requests.adapters import HTTPAdapter
from requests.structures import CaseInsensitiveDict
from urllib3 import Timeout

import meshlib

from .failures import as_requests_says
from .raw import MeshRaw, raw_of

# Bytes that are taken at once from a file that is sent.
BLOCK = 64 * 1024


class MeshAdapter(HTTPAdapter):
    """An adapter to mount on "http://" and "https://".

    `extensions` go with every call to a service, as with `httpx`: mount a second adapter on a prefix to say more about it, for example
    ``session.mount("http://orders/search", MeshAdapter(mesh, extensions=meshlib.policy(idempotent=True)))``. `options` are those
    of `HTTPAdapter`, and concern hosts outside the mesh only.
    """

    def __init__(self, mesh: meshlib.Mesh, *, extensions: Mapping[str, Any] | None = None, **options: Any) -> None:
        super().__init__(**options)
        self.mesh = mesh
        self._extensions = dict(extensions or {})
        self._transport = mesh.sync_transport()

    def send(
        self,
        request: requests.PreparedRequest,
        stream: bool = False,
        timeout: Any = None,
        verify: Any = True,
        cert: Any = None,
        proxies: Mapping[str, str] | None = None,
    ) -> requests.Response:
        """Send a prepared request; called by the session."""
        host = urlsplit(request.url or "").hostname or ""
        try:
            if self.mesh.service_of(host) is None:
                return self._send_outside(request, host, stream, timeout, verify, cert, proxies)
            answer = self._transport.handle_request(self._as_httpx(request, stream, timeout))
        except meshlib.MeshError as error:
            raise as_requests_says(error, request) from error.__cause__
        return self.build_response(request, raw_of(answer, request))

    def _send_outside(
        self,
        request: requests.PreparedRequest,
        host: str,
        stream: bool,
        timeout: Any,
        verify: Any,
        cert: Any,
        proxies: Mapping[str, str] | None,
    ) -> requests.Response:
        # To requests every empty value means that nothing is verified, but only False gets a pool of its own: with another one, a
        # connection that proved nothing would be there for who asks for proof.
        verify = verify or False
        # Another request, since redirects are made from this one: a credential is for its host only.
        leaving = request.copy()
        leaving.headers = CaseInsensitiveDict(self._dressed(request, host, is_verified=verify is not False))
        try:
            answer = super().send(leaving, stream, timeout, verify, cert, proxies)
        except requests.RequestException as error:
            error.request = request
            raise
        answer.request = request
        return answer

    def _dressed(self, request: requests.PreparedRequest, host: str, *, is_verified: bool) -> list[tuple[str, str]]:
        headers = [(_latin(name).decode("latin-1"), _latin(value).decode("latin-1")) for name, value in request.headers.items()]
        return self.mesh.leaving(urlsplit(request.url or "").scheme, host, headers, is_verified=is_verified)

    def close(self) -> None:
        """Close all idle connections. The adapter can be used again, as requests' own."""
        self._transport.close()
        super().close()

    def _as_httpx(self, request: requests.PreparedRequest, stream: bool, timeout: Any) -> httpx.Request:
        headers = [
            (_latin(name), _latin(value))
            for name, value in request.headers.items()
            # Redirects may bring it along, for a proxy that a service never sees.
            if name.lower() != "proxy-authorization"
        ]
        terms = dict(self._extensions)
        if stream:
            # The route's deadline ends with the head; the body may take its time.
            terms["meshlib.stream"] = True
        if timeout is not None:
            terms["timeout"] = _seconds(timeout)
        return httpx.Request(
            _text(request.method),
            _text(request.url),
            headers=headers,
            content=_content(request.body),
            extensions=terms,
        )

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError(
            "A session of the mesh can't be pickled: it holds connections and an identity. Make one in each process with session(mesh)."
        )


def session(mesh: meshlib.Mesh, **options: Any) -> requests.Session:
    """A `requests.Session` whose hosts may be services: ``session.get("http://orders/items/7")``. `options` as for `MeshAdapter`."""
    made = requests.Session()
    adapter = MeshAdapter(mesh, **options)
    made.mount("http://", adapter)
    made.mount("https://", adapter)
    return made


def call_of(found: requests.Response | BaseException) -> meshlib.Call | None:
    """The call behind a response or an error, with its record; None for hosts outside the mesh."""
    if isinstance(found, requests.Response):
        return found.raw.call if isinstance(found.raw, MeshRaw) else None
    call: meshlib.Call | None = getattr(found, "call", None)
    return call


def _seconds(timeout: Any) -> dict[str, float | None]:
    """A timeout of requests (a number, a pair, or urllib3's own) as httpx writes it. It wins over the route's deadline."""
    if isinstance(timeout, tuple):
        try:
            connect, read = timeout
            timeout = Timeout(connect=connect, read=read)
        except ValueError:
            raise ValueError(
                f"Invalid timeout {timeout}. Pass a (connect, read) timeout tuple, "
                "or a single float to set both timeouts to the same value."
            ) from None
    elif not isinstance(timeout, Timeout):
        timeout = Timeout(connect=timeout, read=timeout)
    running = timeout.clone()
    running.start_connect()
    connect, read = (Timeout.resolve_default_timeout(value) for value in (running.connect_timeout, running.read_timeout))
    return {"connect": connect, "read": read, "write": read, "pool": None}


def _content(body: Any) -> bytes | Iterator[bytes] | None:
    """A body of requests as bytes, which can be sent again, or as a stream, which can't."""
    if body is None or isinstance(body, bytes):
        return body
    if isinstance(body, str):
        return body.encode()
    if isinstance(body, bytearray | memoryview):
        return bytes(body)
    return _blocks(body) if hasattr(body, "read") else _pieces(body)


def _blocks(file: Any) -> Iterator[bytes]:
    while block := file.read(BLOCK):
        yield block.encode() if isinstance(block, str) else block


def _pieces(body: Iterable[bytes | str]) -> Iterator[bytes]:
    for piece in body:
        yield piece.encode() if isinstance(piece, str) else bytes(piece)


def _latin(value: str | bytes) -> bytes:
    return value if isinstance(value, bytes) else value.encode("latin-1")


def _text(value: str | bytes | None) -> str:
    return value.decode() if isinstance(value, bytes) else value or ""
