"""What do we say of a connection that failed?

One place for the words and for the judgement that they carry: how far the exchange had come decides whether it is safe to try again,
and programs read it from `reason` and `is_written`. Both drivers, and HTTP/1.1 and HTTP/2, fail in the same words. Nothing is raised
here.
"""

from __future__ import annotations

from .. import errors
from .._native import core

# The reason of a `ConnectFailed` that our clock caused, not the endpoint's word.
CONNECT_TIMEOUT = "send.connect_timeout"
# Reasons of an `AttemptTimeout`: the peer took no more of the request, or sent no more of the answer.
WRITE_TIMEOUT = "send.write_timeout"
IDLE_TIMEOUT = "send.idle_timeout"
# Reasons of a `ConnectionLost`: nothing had been written, or a kept-alive connection ended before a byte of the answer came.
UNWRITTEN = "send.unwritten"
STALE = "send.stale"
DECLINED = "send.declined"
# Reasons of what the node agent did to an attempt that it carried, and of that it fell silent (`delegated.py`).
AGENT_CLOSED = "send.agent_closed"
AGENT_SILENT = "send.agent_silent"

# Content codings of one answer; curl takes as many.
MOST_CODINGS = 5

_OUTCOMES: tuple[tuple[type[errors.AttemptFailed], int], ...] = (
    (errors.ConnectFailed, core.OUTCOME_REFUSED),
    (errors.PeerIdentityError, core.OUTCOME_IDENTITY),
    (errors.TlsError, core.OUTCOME_IDENTITY),
    (errors.AttemptTimeout, core.OUTCOME_TIMEOUT),
    (errors.ProtocolError, core.OUTCOME_PROTOCOL),
    (errors.ConnectionLost, core.OUTCOME_RESET),
)
_LOST = {
    UNWRITTEN: core.OUTCOME_UNWRITTEN,
    DECLINED: core.OUTCOME_DECLINED,
    STALE: core.OUTCOME_STALE,
    # Our own doing, which says nothing of the endpoint.
    "send.client_closed": core.OUTCOME_CANCELLED,
    # Nor does an agent that goes: what may be sent again is, and nobody is blamed.
    AGENT_CLOSED: core.OUTCOME_STALE,
    AGENT_SILENT: core.OUTCOME_STALE,
}
# What the engine takes for "nothing was processed", so that every method is safe to send again.
UNSENT = (core.OUTCOME_REFUSED, core.OUTCOME_IDENTITY, core.OUTCOME_UNWRITTEN, core.OUTCOME_DECLINED)


def outcome_of(error: errors.AttemptFailed) -> int:
    """What the engine is told of a failed attempt. A broken connection is judged by how far the exchange had come."""
    outcome = _LOST.get(error.reason)
    if outcome is not None:
        return outcome
    outcome = next((outcome for kind, outcome in _OUTCOMES if isinstance(error, kind)), core.OUTCOME_RESET)
    # TLS can break long after the handshake, when the endpoint may have acted on the request already.
    return core.OUTCOME_RESET if outcome == core.OUTCOME_IDENTITY and error.is_written else outcome


def lost(
    wire: core.HttpConnection, was_open: bool, was_used: bool, address: str, cause: BaseException | None
) -> errors.AttemptFailed:
    """How far had it come when the connection broke?"""
    if not was_open:
        return errors.ConnectFailed(
            f"{address} closed the connection during the handshake{_because(cause)}.",
            hint="It may not speak mutual TLS there, or it is stopping.",
        )
    if not wire.has_written:
        reason, text = UNWRITTEN, "before anything was written"
    elif was_used and not wire.has_received:
        reason, text = STALE, "that it had kept alive, without a byte of an answer"
    else:
        reason, text = "send.closed", "before its answer was complete"
    return errors.ConnectionLost(
        f"{address} closed the connection {text}{_because(cause)}.", reason=reason, is_written=wire.has_written
    )


def given_up(address: str, is_written: bool) -> errors.ConnectionLost:
    return errors.ConnectionLost(
        f"the connection to {address} was closed by this side: the client was closed, or the rest was not wanted.",
        hint="Close the client after its last answer has been read.",
        reason="send.client_closed",
        is_written=is_written,
    )


def too_slow(address: str) -> errors.ConnectFailed:
    return errors.ConnectFailed(
        f"{address} did not complete a connection in time.",
        hint="It is overloaded, or the network drops packets: see admit.connect.",
        reason=CONNECT_TIMEOUT,
    )


def late(address: str, reason: str | None, is_written: bool) -> errors.AttemptTimeout:
    """`reason` is None where no answer came in time."""
    if reason == WRITE_TIMEOUT:
        text, hint = "took no more of the request in time", "It reads slower than we write: see the write timeout."
    elif reason == IDLE_TIMEOUT:
        text, hint = "sent no more of its answer in time", "See the read timeout, and `stream_idle` in mesh.yaml for streams."
    else:
        text, hint = "did not answer in time", "See the attempt's timeout and the deadline."
    return errors.AttemptTimeout(f"{address} {text}.", hint=hint, reason=reason, is_written=is_written)


def unreachable(address: str, cause: OSError) -> errors.ConnectFailed:
    return errors.ConnectFailed(
        f"no connection to {address} ({cause.strerror or cause}).",
        hint="Nothing listens there, or it can't be reached: is the process up, and the address in discover right?",
    )


def too_coded(headers: list[tuple[bytes, bytes]]) -> errors.ProtocolError | None:
    """An answer that is packed into itself more often than anybody needs: each layer may multiply what has to be unpacked."""
    codings = sum(1 + value.count(b",") for name, value in headers if name == b"content-encoding")
    if codings <= MOST_CODINGS:
        return None
    return errors.ProtocolError(
        f"the answer's body is coded {codings} times; at most {MOST_CODINGS} are unpacked.",
        hint="No honest server does that; look at what answers there.",
        is_written=True,
    )


def _because(cause: BaseException | None) -> str:
    return f" ({cause})" if cause is not None else ""
