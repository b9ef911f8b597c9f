"""Has somebody replaced httpx's own way of sending, and what then?

respx, pytest-httpx and tracers replace methods of httpx's transports and clients, or of httpcore's pools. A mesh client must be
intercepted as a plain one is; so when a method isn't httpx's own any more, a request is handed to httpx's stock transport, and what the
interceptor lets pass ends in the mesh after all: the stock transport's pool has the mesh where others have connections. Asking costs
every call, and the answer is nearly always no: CPython marks a class whose bases were changed (its method cache depends on it),
and one look at that mark of a class that derives from all of them is enough. Nothing is decided about the call.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from contextvars import ContextVar
from pathlib import Path
from types import FunctionType, ModuleType, SimpleNamespace
from typing import Any

# Py_TPFLAGS_VALID_VERSION_TAG: taken away from a class, and from all that derive from it, by every change.
_UNCHANGED = 1 << 19
# What mockers and tracers replace. The first two rows send one request; the others lead there.
_SENDING = (("AsyncHTTPTransport", "handle_async_request"), ("HTTPTransport", "handle_request"))
_POOLS = (
    ("AsyncConnectionPool", "handle_async_request"),
    ("ConnectionPool", "handle_request"),
    ("AsyncHTTPConnection", "handle_async_request"),
    ("HTTPConnection", "handle_request"),
)
_CLIENT = (
    *("send", "build_request", "request", "_transport_for_url", "_send_single_request", "_send_handling_auth"),
    *("get", "options", "head", "post", "put", "patch", "delete"),
)


def core_of(httpx: ModuleType) -> ModuleType:
    """The httpcore that belongs to a module of the httpx family."""
    return importlib.import_module(httpx.__name__.replace("httpx", "httpcore"))


def interception(httpx: ModuleType) -> SimpleNamespace:
    """`.is_intercepted()`: is anything replaced? `.is_diverted()`: is what sends a request? And the stock transports to hand it to."""
    httpcore = core_of(httpx)
    sending = [(getattr(httpx, kind), name) for kind, name in _SENDING]
    sending += [(getattr(httpcore, kind), name) for kind, name in _POOLS]
    leading = [(getattr(httpx, kind), name) for kind in ("AsyncClient", "Client") for name in _CLIENT]
    homes = tuple(str(Path(str(module.__file__)).parent) for module in (httpx, httpcore))

    def is_own(seam: tuple[Any, str]) -> bool:
        """Whether the method is the one that its class was written with. Its code tells, since a wrapper copies names."""
        kind, name = seam
        method = getattr(kind, name, None)
        if type(method) is not FunctionType:
            return False
        code = method.__code__
        return code.co_qualname.endswith(f".{name}") and "<" not in code.co_qualname and code.co_filename.startswith(homes)

    def is_changed(*seams: tuple[Any, str]) -> bool:
        return not all(map(is_own, seams))

    return SimpleNamespace(
        is_intercepted=_watch([*sending, *leading], is_changed),
        is_diverted=lambda: is_changed(*sending),
        **_stock(httpx, httpcore),
    )


def _watch(seams: list[tuple[Any, str]], is_changed: Callable[..., bool]) -> Callable[[], bool]:
    """A question about many methods that costs one attribute."""
    kinds = list(dict.fromkeys(kind for kind, _ in seams))
    # Those that derive from others come first, or there is no order.
    kinds.sort(key=lambda kind: -len(kind.__mro__))
    watched: Any = type("Watched", tuple(kinds), {"__doc__": "Changes whenever one of its bases does.", "__slots__": ()})
    is_suspect = True

    def look() -> bool:
        nonlocal is_suspect
        # In this order another thread's change can't get lost: suspect, marked as unchanged, compared.
        is_suspect = True
        _mark(watched)
        is_suspect = is_changed(*seams)
        return is_suspect

    def is_intercepted() -> bool:
        """Whether a method of httpx's on the way of a request isn't its own."""
        return (is_suspect or not watched.__flags__ & _UNCHANGED) and look()

    return is_intercepted if _is_marked_by_changes() else lambda: is_changed(*seams)


def _mark(kind: Any) -> None:
    """Any look through the method cache makes the mark valid again."""
    getattr(kind, "nothing_of_this_name", None)


def _is_marked_by_changes() -> bool:
    """Does this interpreter take the mark away from a class when its base changes?"""
    base: Any = type("Base", (), {})
    kind: Any = type("Kind", (base,), {})
    _mark(kind)
    before = kind.__flags__ & _UNCHANGED
    base.changed = True
    after = kind.__flags__ & _UNCHANGED
    _mark(kind)
    return bool(before) and not after and bool(kind.__flags__ & _UNCHANGED)


# The request that is on its way through a stock transport: httpcore's form of it has lost the URL as it was written.
_request: ContextVar[Any] = ContextVar("meshlib.client.intercepted")


def _stock(httpx: ModuleType, httpcore: ModuleType) -> dict[str, Any]:
    """`AsyncDiversion` and `Diversion`: httpx's stock transports, whose pools end in `send`."""

    def given(asked: Any) -> Any:
        """The request as it came through the pool: an interceptor may have read its body."""
        whole = _request.get()
        if asked.stream is whole.stream:
            return whole
        return httpx.Request(
            whole.method, whole.url, headers=whole.headers.raw, stream=asked.stream, extensions=dict(whole.extensions)
        )

    def answer(response: Any) -> Any:
        return httpcore.Response(
            response.status_code, headers=response.headers.raw, content=response.stream, extensions=response.extensions
        )

    class Always:
        """What a pool asks its connections. The mesh is always there, and has pools of its own."""

        def __init__(self, origin: Any, send: Callable[[Any], Any]) -> None:
            self._origin = origin
            self._send = send

        def info(self) -> str:
            return "mesh"

        def can_handle_request(self, origin: Any) -> bool:
            return bool(origin == self._origin)

        def is_available(self) -> bool:
            return True

        def has_expired(self) -> bool:
            return False

        def is_idle(self) -> bool:
            return False

        def is_closed(self) -> bool:
            # Its one request stays with it, and the next gets another: the pool keeps none of them.
            return True

    class AsyncMesh(Always, httpcore.AsyncConnectionInterface):  # type: ignore[misc,name-defined]
        async def handle_async_request(self, request: Any) -> Any:
            return answer(await self._send(given(request)))

        async def aclose(self) -> None:
            pass

    class Mesh(Always, httpcore.ConnectionInterface):  # type: ignore[misc,name-defined]
        def handle_request(self, request: Any) -> Any:
            return answer(self._send(given(request)))

        def close(self) -> None:
            pass

    class AsyncPool(httpcore.AsyncConnectionPool):  # type: ignore[misc,name-defined]
        def __init__(self, send: Callable[[Any], Any]) -> None:
            super().__init__(max_connections=None)
            self._send = send

        def create_connection(self, origin: Any) -> Any:
            return AsyncMesh(origin, self._send)

    class Pool(httpcore.ConnectionPool):  # type: ignore[misc,name-defined]
        def __init__(self, send: Callable[[Any], Any]) -> None:
            super().__init__(max_connections=None)
            self._send = send

        def create_connection(self, origin: Any) -> Any:
            return Mesh(origin, self._send)

    class AsyncDiversion(httpx.AsyncHTTPTransport):  # type: ignore[misc,name-defined]
        def __init__(self, send: Callable[[Any], Any]) -> None:
            # Not httpx's own __init__, which makes an SSL context: no byte leaves by this pool.
            self._pool = AsyncPool(send)

        async def divert(self, request: Any) -> Any:
            token = _request.set(request)
            try:
                return await self.handle_async_request(request)
            finally:
                _request.reset(token)

    class Diversion(httpx.HTTPTransport):  # type: ignore[misc,name-defined]
        def __init__(self, send: Callable[[Any], Any]) -> None:
            self._pool = Pool(send)

        def divert(self, request: Any) -> Any:
            token = _request.set(request)
            try:
                return self.handle_request(request)
            finally:
                _request.reset(token)

    return {"AsyncDiversion": AsyncDiversion, "Diversion": Diversion}
