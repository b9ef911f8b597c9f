"""What does a gRPC status mean to the mesh, and the mesh's refusal to gRPC?

The engine's one classifier speaks HTTP, so a gRPC code is turned into a status here and nowhere else, in both directions. A refusal
of the mesh becomes an exception that is both an `AioRpcError`, which gRPC callers catch, and the `meshlib.errors` class that HTTP
callers of the mesh catch. (It serves `grpc.Channel`, too: an `AioRpcError` is a `grpc.RpcError` with `code()` and `details()`.)

`judge` decides what became of an attempt that gRPC reports as failed. gRPC tells callers neither whether a status came from the
peer nor whether the request left, and its texts can be forged by any server that relays an error of its own upstream. So the text
alone never proves "nothing was sent"; it has to agree with the state of the channel to that one endpoint. What can't be proved
counts as sent, and is not repeated unless the call is idempotent. Why a connection failed is read from gRPC's text, or better told by
the relay behind which the TLS is ours (relay.py).
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import Any, cast

import grpc
import grpc.aio

from meshlib import errors
from meshlib._native import core

OK = 200

STATUS: dict[grpc.StatusCode, int] = {
    grpc.StatusCode.OK: OK,
    grpc.StatusCode.CANCELLED: 499,
    grpc.StatusCode.UNKNOWN: 500,
    grpc.StatusCode.INVALID_ARGUMENT: 400,
    grpc.StatusCode.DEADLINE_EXCEEDED: 504,
    grpc.StatusCode.NOT_FOUND: 404,
    grpc.StatusCode.ALREADY_EXISTS: 409,
    grpc.StatusCode.PERMISSION_DENIED: 403,
    grpc.StatusCode.RESOURCE_EXHAUSTED: 429,
    grpc.StatusCode.FAILED_PRECONDITION: 400,
    grpc.StatusCode.ABORTED: 409,
    grpc.StatusCode.OUT_OF_RANGE: 400,
    grpc.StatusCode.UNIMPLEMENTED: 501,
    grpc.StatusCode.INTERNAL: 500,
    grpc.StatusCode.UNAVAILABLE: 503,
    grpc.StatusCode.DATA_LOSS: 500,
    grpc.StatusCode.UNAUTHENTICATED: 401,
}

# How gRPC's core begins the details of a call for which it never got a connection (pick_first, since 2021).
NOT_CONNECTED = "failed to connect to all addresses"
# What stands in those details when there was a connection, but not to whom we expect.
NOT_PROVED = ("handshake", "certificate", "verification")
# The same, as a relay says it.
UNPROVED = (errors.PeerIdentityError, errors.TlsError)


def judge(
    code: grpc.StatusCode,
    details: str | None,
    *,
    is_ready: bool,
    is_down: bool,
    is_late: bool,
    why: errors.AttemptFailed | None = None,
) -> tuple[int, int]:
    """The outcome and status of an attempt that ended with a code other than OK.

    `is_ready` and `is_down` tell how the channel to the endpoint stands right after: connected, or failing to connect. `is_late`:
    the attempt's time was up. `why`: what the link's relay knows of its last connection, which says nothing of one that stands.
    Of attempts that we cancelled ourselves nobody asks.
    """
    status = STATUS.get(code, 500)
    if code is grpc.StatusCode.UNAVAILABLE:
        text = (details or "").lower()
        if text.startswith(NOT_CONNECTED) and is_down:
            is_unproved = any(word in text for word in NOT_PROVED) if why is None else isinstance(why, UNPROVED)
            return (core.OUTCOME_IDENTITY if is_unproved else core.OUTCOME_REFUSED), status
        if not is_ready:
            return core.OUTCOME_RESET, status
    elif code is grpc.StatusCode.DEADLINE_EXCEEDED and is_late:
        return core.OUTCOME_TIMEOUT, status
    elif code is grpc.StatusCode.CANCELLED:
        # Not by us: so a server of grpcio that stops answers calls that arrive at that moment, whether it began them or not.
        return core.OUTCOME_RESPONSE, STATUS[grpc.StatusCode.UNAVAILABLE]
    return core.OUTCOME_RESPONSE, status


def judge_end(code: grpc.StatusCode, *, is_ready: bool, is_cancelled: bool = False) -> int:
    """The outcome of an attempt that ended after its head: nothing is repeated any more, it only counts."""
    if is_cancelled:
        return core.OUTCOME_CANCELLED
    if code is grpc.StatusCode.UNAVAILABLE and not is_ready:
        return core.OUTCOME_RESET
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return core.OUTCOME_TIMEOUT
    return core.OUTCOME_PROTOCOL if STATUS.get(code, 500) >= 500 else core.OUTCOME_RESPONSE


def failure_of(code: grpc.StatusCode, details: str | None, trailing: Any = None) -> grpc.aio.AioRpcError:
    """What gRPC would raise."""
    empty = grpc.aio.Metadata()
    return grpc.aio.AioRpcError(code, empty, empty if trailing is None else trailing, details, None)


def pushback(metadata: Iterable[Any] | None) -> float:
    """What a server asks of retries (`grpc-retry-pushback-ms`): the seconds to wait, -1.0 for no wish, -2.0 for none at all.

    A negative or unreadable value forbids retries (gRFC A6).
    """
    for key, value in metadata or ():
        if key == "grpc-retry-pushback-ms":
            text = value.decode("ascii", "replace") if isinstance(value, bytes) else value
            return int(text) / 1000 if text.isascii() and text.isdecimal() and len(text) <= 9 else -2.0
    return -1.0


def rpc_error(error: errors.MeshError) -> grpc.aio.AioRpcError:
    """The mesh's own error as an exception that callers of gRPC catch, too."""
    if isinstance(error, grpc.aio.AioRpcError):
        return error
    joined: grpc.aio.AioRpcError = _joined(cast("Any", type(error)))(error)
    return joined


def code_of(error: errors.MeshError) -> grpc.StatusCode:
    """The gRPC code of the mesh's own error."""
    if isinstance(error, errors.Denied):
        return grpc.StatusCode.PERMISSION_DENIED
    if isinstance(error, errors.DeadlineExceeded):
        return grpc.StatusCode.DEADLINE_EXCEEDED
    if isinstance(error, errors.CallerGone):
        return grpc.StatusCode.CANCELLED
    return grpc.StatusCode.UNAVAILABLE


class _Over:
    """A call that is over, as grpc.Call and grpc.Future have it: gRPC's blocking interceptors are handed the error in the call's place."""

    def result(self, *_: Any, **__: Any) -> Any:
        raise cast("BaseException", self)

    def exception(self, *_: Any, **__: Any) -> Any:
        return self

    def traceback(self, *_: Any, **__: Any) -> Any:
        return getattr(self, "__traceback__", None)

    def add_done_callback(self, callback: Any) -> None:
        callback(self)

    def add_callback(self, *_: Any) -> bool:
        return False

    def done(self) -> bool:
        return True

    def running(self) -> bool:
        return False

    is_active = cancel = cancelled = running

    def time_remaining(self) -> float:
        return 0.0


@cache
def _joined(kind: Any) -> Any:
    """A class that is both `kind` and AioRpcError, named after `kind`: made once, with gRPC's texts and the mesh's attributes."""

    def __init__(self: Any, error: errors.MeshError) -> None:
        grpc.aio.AioRpcError.__init__(
            self,
            code_of(error),
            grpc.aio.Metadata(),
            grpc.aio.Metadata(),
            details=f"meshlib: {error}",
            debug_error_string=error.reason,
        )
        self.__dict__.update(error.__dict__)
        self.args = error.args

    def __reduce__(self: Any) -> tuple[Any, ...]:
        return _again, (
            kind,
            self.args,
            {key: value for key, value in self.__dict__.items() if not key.startswith("_")} | {"call": None},
        )

    return type(
        kind.__name__,
        (_Over, grpc.aio.AioRpcError, kind),
        {"__init__": __init__, "__reduce__": __reduce__, "__module__": kind.__module__},
    )


def _again(kind: type[errors.MeshError], args: tuple[Any, ...], state: dict[str, Any]) -> grpc.aio.AioRpcError:
    """Unpickle: the class is made anew, and the cause stays behind."""
    error = kind(*args)
    error.__dict__.update(state)
    return rpc_error(error)
