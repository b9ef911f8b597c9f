"""Who calls, in a test that has no connections?

A test client hands a call to the application without a server, so that nobody has proved anything. `as_peer` declares who it is from:

    with as_peer("spiffe://shop.internal/ns/default/sa/web"):
        client.get("/items/7")                           # meshlib.peer() is web, and the rules judge web

    @as_peer("spiffe://shop.internal/ns/default/sa/web")
    async def test_web_sees_its_items(): ...             # functions, coroutine functions, and both kinds of fixtures

    @pytest.fixture
    def web():                                           # async fixtures as well
        with as_peer("spiffe://shop.internal/ns/default/sa/web") as peer:
            yield peer

    with as_peer(None): ...                              # nobody, also inside another as_peer

A context variable carries it, so it reaches whatever a test client runs the application in (Starlette's portal thread, asgiref's threads,
tasks), is nobody else's, and can be nested: the innermost counts. An object may be used again, also by several threads at once.

It is asked only where no server of ours holds the connection; what came over a connection is what the connection proved. It makes no
certificate, so nothing of TLS is tested, and in modes permissive and enforce the mesh under test has an identity of its own as always:
`meshlib dev -- pytest` gives every service one, in the trust domain dev.meshlib.invalid, of which the declared peers are then too.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextvars import ContextVar
from functools import wraps
from types import TracebackType
from typing import Any, Final, TypeVar, cast

from .._native import core
from ..call import Peer
from ..server import line

F = TypeVar("F", bound=Callable[..., Any])

NOBODY: Final = Peer("")
# What the faces of the servers ask. It is there from the import on, since an application may be started before the first as_peer.
_declared: Final[ContextVar[Peer | None]] = ContextVar("meshlib.declared", default=None)
# What was declared outside of each as_peer that is in force here, outermost first.
_outer: Final[ContextVar[tuple[Peer | None, ...]]] = ContextVar("meshlib.declared.outer", default=())
line.declared = _declared


class as_peer:  # noqa: N801  # reads as a statement, like contextlib's own
    """Calls of test clients come from this peer: as a context manager (sync and async) or a decorator.

    `spiffe_id` is the caller's, or None for a caller without identity. Raises `ValueError` for what is no SPIFFE ID of a workload.
    """

    __slots__ = ("_peer",)

    def __init__(self, spiffe_id: str | None) -> None:
        self._peer = NOBODY if spiffe_id is None else Peer(_checked(spiffe_id), is_tls=True)

    def __enter__(self) -> Peer:
        _outer.set((*_outer.get(), _declared.get()))
        _declared.set(self._peer)
        return self._peer

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        outer = _outer.get()
        # Empty where a fixture is ended in another context than the one that it began in, where it was never in force.
        if outer:
            _declared.set(outer[-1])
            _outer.set(outer[:-1])

    async def __aenter__(self) -> Peer:
        return self.__enter__()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.__exit__(kind, error, traceback)

    def __call__(self, function: F) -> F:
        if isinstance(function, type) or not callable(function):
            raise TypeError(
                f"as_peer decorates functions, and {function!r} is none. For all tests of a class: "
                "self.enterContext(as_peer(...)) in setUp, or a fixture with autouse."
            )
        return cast("F", _wrapped(self, function))

    def __repr__(self) -> str:
        return f"as_peer({self._peer.spiffe_id or None!r})"


def _wrapped(peer: as_peer, function: Callable[..., Any]) -> Callable[..., Any]:
    """Generators are fixtures: the peer is in force from their beginning to their end, around the test."""
    if inspect.isasyncgenfunction(function):

        @wraps(function)
        async def pieces(*args: Any, **kwargs: Any) -> Any:
            with peer:
                async for piece in function(*args, **kwargs):
                    yield piece

        return pieces
    if inspect.iscoroutinefunction(function):

        @wraps(function)
        async def later(*args: Any, **kwargs: Any) -> Any:
            with peer:
                return await function(*args, **kwargs)

        return later
    if inspect.isgeneratorfunction(function):

        @wraps(function)
        def parts(*args: Any, **kwargs: Any) -> Any:
            with peer:
                return (yield from function(*args, **kwargs))

        return parts

    @wraps(function)
    def now(*args: Any, **kwargs: Any) -> Any:
        with peer:
            return function(*args, **kwargs)

    return now


def _checked(spiffe_id: str) -> str:
    if not isinstance(spiffe_id, str):
        raise ValueError(f"{spiffe_id!r} is no SPIFFE ID: a text is expected, such as spiffe://shop.internal/ns/default/sa/web")  # noqa: TRY004  # as for a text that is none
    _, path = core.parse_spiffe_id(spiffe_id)
    if not path:
        raise ValueError(f'"{spiffe_id}" names a trust domain and no workload in it, such as {spiffe_id}/ns/default/sa/web')
    return spiffe_id
