"""Which of requests' errors is each of the mesh's?

Both at once: `except requests.ConnectionError` keeps working, and `except meshlib.ConnectFailed` says more. Before an answer has begun the
classes are those of requests' own adapter; while its body is read they are those that `iter_content` raises. Where requests has no word of
its own for a refusal (an open breaker, a limit), it is a ConnectionError: nothing was sent. They can be copied and pickled, like
those of requests; a call's record stays behind in its process.
"""

from __future__ import annotations

from typing import Any, Final

from requests import PreparedRequest, exceptions

import meshlib

# Reasons of the mesh: our clock ended a connect, and a request that can't be written at all.
CONNECT_TIMEOUT: Final = "send.connect_timeout"
UNWRITABLE: Final = "send.request"

_twins: dict[tuple[str, type], type[meshlib.MeshError]] = {}


class BodyTimeout(exceptions.ConnectionError, exceptions.ReadTimeout):
    """In the middle of a body requests tells of a timeout as a ConnectionError."""


def _theirs(error: BaseException, *, has_begun: bool) -> type[exceptions.RequestException] | None:
    """The class of requests that says what this error says; None for what is no failure of a call."""
    reason = getattr(error, "reason", "")
    if isinstance(error, meshlib.DeadlineExceeded) and isinstance(error.__cause__, meshlib.AttemptFailed):
        # What the time was spent on.
        return _theirs(error.__cause__, has_begun=has_begun)
    if isinstance(error, meshlib.AttemptTimeout | meshlib.DeadlineExceeded):
        return BodyTimeout if has_begun else exceptions.ReadTimeout
    if reason == CONNECT_TIMEOUT:
        return exceptions.ConnectTimeout
    if reason == UNWRITABLE:
        return exceptions.RequestException
    if isinstance(error, meshlib.PeerIdentityError | meshlib.TlsError | meshlib.IdentityError):
        return exceptions.SSLError
    if isinstance(error, meshlib.AttemptFailed):
        return exceptions.ChunkedEncodingError if has_begun else exceptions.ConnectionError
    return exceptions.ConnectionError if isinstance(error, meshlib.Refused) else None


def as_requests_says(error: meshlib.MeshError, request: PreparedRequest, *, has_begun: bool = False) -> meshlib.MeshError:
    """The same error, of requests' class too. `has_begun`: the answer's head has come, and its body broke."""
    theirs = _theirs(error, has_begun=has_begun)
    if theirs is None or isinstance(error, exceptions.RequestException):
        return error
    # What it knows moves over, but for what another library's class had put there.
    knows = {name: value for name, value in error.__dict__.items() if name != "_request"}
    made = _made(_twin(_ours(type(error)), theirs), error.args, {**knows, "request": request, "response": None})
    made.__cause__ = error.__cause__
    return made


def _ours(kind: type[BaseException]) -> str:
    """The name of the mesh's own class, below those that another library's client has made of it."""
    names: list[str] = [base.__name__ for base in kind.__mro__ if getattr(meshlib, base.__name__, None) is base]
    return names[0]


def _twin(ours: str, theirs: type[exceptions.RequestException]) -> type[meshlib.MeshError]:
    made = _twins.get((ours, theirs))
    if made is None:
        base: type[meshlib.MeshError] = getattr(meshlib, ours)

        def reduce(error: Any) -> Any:
            return _revive, (ours, theirs, error.args, {**error.__dict__, "call": None})

        made = type(ours, (base, theirs), {"__module__": __name__, "__doc__": base.__doc__, "__reduce__": reduce})
        made = _twins.setdefault((ours, theirs), made)
    return made


def _made(kind: type[meshlib.MeshError], args: tuple[Any, ...], knows: dict[str, Any]) -> meshlib.MeshError:
    made = kind.__new__(kind)
    made.args = args
    made.__dict__.update(knows)
    return made


def _revive(ours: str, theirs: type[exceptions.RequestException], args: tuple[Any, ...], knows: dict[str, Any]) -> Any:
    return _made(_twin(ours, theirs), args, knows)
