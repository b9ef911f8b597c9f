"""Which of aiohttp's errors is each of the mesh's?

Both at once: `except aiohttp.ClientConnectorError` keeps working, and `except meshlib.ConnectFailed` says more. What was never sent is a
`ClientConnectorError`, since code may count on that; what was sent and lost is a `ServerDisconnectedError`, and in the middle of a body a
`ClientPayloadError`, as a connection of aiohttp's would say it. They can be copied and pickled; a call's record stays behind in
its process.
"""

from __future__ import annotations

from typing import Any, Final

import aiohttp

import meshlib

# Reasons of the mesh: our clock ended a connect, and a request that can't be written at all.
CONNECT_TIMEOUT: Final = "send.connect_timeout"
UNWRITABLE: Final = "send.request"

_twins: dict[tuple[str, type], type[meshlib.MeshError]] = {}


def _theirs(error: BaseException, *, has_begun: bool) -> type[aiohttp.ClientError] | None:
    """The class of aiohttp that says what this error says; None for what is no failure of a call."""
    reason = getattr(error, "reason", "")
    if isinstance(error, meshlib.DeadlineExceeded) and isinstance(error.__cause__, meshlib.AttemptFailed):
        # What the time was spent on.
        return _theirs(error.__cause__, has_begun=has_begun)
    if isinstance(error, meshlib.AttemptTimeout | meshlib.DeadlineExceeded):
        return aiohttp.SocketTimeoutError
    if reason == CONNECT_TIMEOUT:
        return aiohttp.ConnectionTimeoutError
    if reason == UNWRITABLE:
        return aiohttp.ClientError
    if has_begun:
        return aiohttp.ClientPayloadError if isinstance(error, meshlib.AttemptFailed) else None
    if isinstance(error, meshlib.PeerIdentityError):
        return aiohttp.ClientConnectorCertificateError
    if isinstance(error, meshlib.IdentityError) or (isinstance(error, meshlib.TlsError) and not error.is_written):
        return aiohttp.ClientConnectorSSLError
    if isinstance(error, meshlib.ConnectionLost):
        return aiohttp.ServerDisconnectedError
    if isinstance(error, meshlib.ProtocolError):
        return aiohttp.ClientResponseError
    if isinstance(error, meshlib.UnknownService):
        return aiohttp.ClientConnectorDNSError
    if isinstance(error, meshlib.Refused | meshlib.ConnectFailed):
        return aiohttp.ClientConnectorError
    return aiohttp.ClientConnectionError if isinstance(error, meshlib.AttemptFailed) else None


def as_aiohttp_says(error: meshlib.MeshError, request: aiohttp.ClientRequest, *, has_begun: bool = False) -> meshlib.MeshError:
    """The same error, of aiohttp's class too. `has_begun`: the answer's head has come, and its body broke."""
    theirs = _theirs(error, has_begun=has_begun)
    if theirs is None or isinstance(error, aiohttp.ClientError):
        return error
    # What it knows moves over, but for what another library's class had put there.
    knows: dict[str, Any] = {name: value for name, value in error.__dict__.items() if name != "_request"}
    cause = error.__cause__
    if issubclass(theirs, aiohttp.ClientConnectorError):
        os_error = cause if isinstance(cause, OSError) else OSError(None, error.message)
        knows.update(_conn_key=request.connection_key, _os_error=os_error, _certificate_error=error)
    elif issubclass(theirs, aiohttp.ClientResponseError):
        # As aiohttp calls an answer that it can't parse.
        knows.update(request_info=request.request_info, history=(), status=400, headers=None)
    made = _made(_twin(_ours(type(error)), theirs), error.args, knows)
    made.__cause__ = cause
    return made


def again(error: meshlib.MeshError) -> meshlib.MeshError:
    """The same error without the frames that it came through, to be raised a second time."""
    made = _made(type(error), error.args, error.__dict__)
    made.__cause__ = error.__cause__
    return made


def _ours(kind: type[BaseException]) -> str:
    """The name of the mesh's own class, below those that another library's client has made of it."""
    names: list[str] = [base.__name__ for base in kind.__mro__ if getattr(meshlib, base.__name__, None) is base]
    return names[0]


def _twin(ours: str, theirs: type[aiohttp.ClientError]) -> type[meshlib.MeshError]:
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
    os_error = knows.get("_os_error")
    if isinstance(made, OSError) and os_error is not None:
        made.errno, made.strerror = os_error.errno, os_error.strerror
    return made


def _revive(ours: str, theirs: type[aiohttp.ClientError], args: tuple[Any, ...], knows: dict[str, Any]) -> Any:
    return _made(_twin(ours, theirs), args, knows)
