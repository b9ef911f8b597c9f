"""Which of httpx's errors is each of ours as well?

A program that was written for httpx says `except httpx.ConnectTimeout`, and has to go on working; one that was written for the mesh asks
for `meshlib.ConnectFailed` and its `reason`. So what a mesh client raises is both: for each of our errors a class that derives from it
and from httpx's (or httpcore's, inside an upgraded stream). They carry the call and the request, and can be copied and pickled; a call's
record belongs to its process and stays behind there. What is judged here is the name only, never whether to try again.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

from .. import errors
from .faults import CONNECT_TIMEOUT, WRITE_TIMEOUT

# The most special first: the first match wins. Several names where httpx itself tells cases apart that we don't.
_NAMES: tuple[tuple[type[errors.MeshError], str], ...] = (
    (errors.PeerIdentityError, "ConnectError"),
    (errors.ConnectFailed, "ConnectError"),
    (errors.AttemptTimeout, "ReadTimeout"),
    (errors.ProtocolError, "RemoteProtocolError"),
    (errors.AttemptFailed, "TransportError"),
    (errors.LimitExceeded, "PoolTimeout"),
    (errors.RateLimited, "PoolTimeout"),
    (errors.Refused, "ConnectError"),
    (errors.IdentityError, "ConnectError"),
)
# Why a request can't be written at all: the caller's mistake, and the only one that is found while writing.
UNWRITABLE = "send.request"


def names_of(error: errors.MeshError) -> tuple[str, ...]:
    """The names of httpx's classes that this error also is; none for what is no failure of a call."""
    reason = error.reason
    if isinstance(error, errors.DeadlineExceeded):
        # What the time was spent on is in the cause.
        cause = error.__cause__
        return names_of(cause) if isinstance(cause, (errors.AttemptTimeout, errors.ConnectFailed)) else ("ReadTimeout",)
    if reason == CONNECT_TIMEOUT:
        return ("ConnectTimeout",)
    if reason == WRITE_TIMEOUT:
        return ("WriteTimeout",)
    if reason == UNWRITABLE:
        return ("LocalProtocolError",)
    if isinstance(error, errors.ConnectionLost):
        if reason == "send.unwritten":
            return ("WriteError",)
        # A peer that closes without a word is a RemoteProtocolError for httpx; one that resets is a ReadError.
        return ("ReadError",) if isinstance(error.__cause__, OSError) else ("ReadError", "RemoteProtocolError")
    if isinstance(error, errors.TlsError):
        return ("ReadError",) if error.is_written else ("ConnectError",)
    return next(((name,) for ours, name in _NAMES if isinstance(error, ours)), ())


def twins(module: ModuleType) -> Callable[[errors.MeshError, Any], errors.MeshError]:
    """The function that gives an error its second class, for one module of the httpx or httpcore family."""
    kinds: dict[tuple[type, tuple[str, ...]], type[errors.MeshError]] = {}
    # httpcore knows no common base of what a transport raises.
    fallback = getattr(module, "TransportError", None) or module.NetworkError
    base = getattr(module, "HTTPError", None)

    def kind_of(ours: type[errors.MeshError], names: tuple[str, ...]) -> type[errors.MeshError]:
        made = kinds.get((ours, names))
        if made is None:
            theirs = tuple(getattr(module, name, fallback) for name in names)
            made = kinds[ours, names] = type(
                ours.__name__,
                (ours, *theirs),
                {
                    "__module__": ours.__module__,
                    "__doc__": ours.__doc__,
                    # httpx's own __init__ is not called: it would set `request` aside.
                    "_request": None,
                    "_origin": (module.__name__, ours.__name__, names),
                    "__reduce__": _reduce,
                    "__copy__": _copy,
                },
            )
        return made

    def translate(error: errors.MeshError, request: Any) -> errors.MeshError:
        """The same error, of their class too. What it knows moves over; its cause stays its cause."""
        names = names_of(error)
        if not names or hasattr(error, "_origin") or (base is not None and isinstance(error, base)):
            return error
        made = _made(kind_of(type(error), names), error.args, error.__dict__)
        if request is not None:
            made.__dict__["_request"] = request
        made.__cause__ = error.__cause__
        return made

    _kinds[module.__name__] = kind_of
    return translate


# By the name of a module of the family, for errors that come out of a pickle.
_kinds: dict[str, Callable[[type[errors.MeshError], tuple[str, ...]], type[errors.MeshError]]] = {}


def _made(kind: type[errors.MeshError], args: tuple[Any, ...], state: dict[str, Any]) -> errors.MeshError:
    made = kind.__new__(kind)
    made.args = args
    made.__dict__.update(state)
    return made


def _copy(error: Any) -> Any:
    copied = _made(type(error), error.args, error.__dict__)
    copied.__cause__ = error.__cause__
    return copied


def _reduce(error: Any) -> Any:
    # The engine's record doesn't leave its process.
    return _revive, (*error._origin, error.args, {**error.__dict__, "call": None})


def _revive(module: str, ours: str, names: tuple[str, ...], args: tuple[Any, ...], state: dict[str, Any]) -> errors.MeshError:
    if module not in _kinds:
        twins(importlib.import_module(module))
    return _made(_kinds[module](getattr(errors, ours), names), args, state)
