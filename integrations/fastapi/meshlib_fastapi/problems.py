"""What does our caller learn, when a call that we made for them failed?

That it failed, and whether it's worth trying again: problem details (RFC 9457) with a constant body for each status. Which service we
called, and what went wrong there, is nobody's business but the operator's, who has it in the log.
"""

from __future__ import annotations

import json
import logging
from typing import Any, Final

from fastapi import Response, WebSocket
from fastapi.websockets import WebSocketState

from meshlib import AttemptTimeout, CircuitOpen, DeadlineExceeded, IdentityError, LimitExceeded, NoEndpoint, RateLimited

from .route import template_of

log = logging.getLogger("meshlib_fastapi")

_PROBLEMS: Final[dict[int, tuple[str, str, dict[str, str]]]] = {
    401: ("secure.no_identity", "An identity is required", {"www-authenticate": "mTLS"}),
    502: ("upstream.failed", "A service behind this one failed", {}),
    503: ("upstream.unavailable", "A service behind this one is not available", {"retry-after": "1"}),
    504: ("upstream.timeout", "A service behind this one did not answer in time", {}),
}
_LATE: Final = (DeadlineExceeded, AttemptTimeout)
# Refused before anything was sent, for a reason that passes.
_PASSING: Final = (NoEndpoint, CircuitOpen, LimitExceeded, RateLimited, IdentityError)


def status_of(error: Exception) -> int:
    """What an error of an outgoing call is to our own caller."""
    return 504 if isinstance(error, _LATE) else 503 if isinstance(error, _PASSING) else 502


async def answer_for_failed_call(connection: Any, error: Exception) -> Any:
    status = status_of(error)
    route = template_of(connection.scope) or "no route"
    log.warning("%d for %s: %s: %s", status, route, type(error).__name__, error)
    return await _answer(connection, status)


async def answer_for_missing_identity(connection: Any, error: Exception) -> Any:
    return await _answer(connection, 401)


async def _answer(connection: Any, status: int) -> Response | None:
    reason, title, headers = _PROBLEMS[status]
    body = {"type": f"urn:meshlib:problem:{reason}", "title": title, "status": status, "reason": reason}
    response = Response(json.dumps(body), status, headers, media_type="application/problem+json")
    if not isinstance(connection, WebSocket):
        return response
    if connection.application_state is WebSocketState.CONNECTING and _can_be_denied(connection):
        await connection.send_denial_response(response)
    elif connection.application_state is not WebSocketState.DISCONNECTED:
        # 1008: policy; 1011: we failed. Before the acceptance a server makes 403 of either.
        await connection.close(1008 if status == 401 else 1011, title)
    return None


def _can_be_denied(socket: WebSocket) -> bool:
    return "websocket.http.response" in (socket.scope.get("extensions") or ())
