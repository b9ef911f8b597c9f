"""What does our caller learn, when a call that we made for them failed?

That it failed, and whether it's worth trying again: problem details (RFC 9457) with a constant body for each status. Which service we
called, and what went wrong there, is nobody's business but the operator's, who has it in the log.
"""

from __future__ import annotations

import json
import logging
from typing import Final

from flask import Response, request

from meshlib import AttemptTimeout, CircuitOpen, DeadlineExceeded, IdentityError, LimitExceeded, NoEndpoint, RateLimited

log = logging.getLogger("meshlib_flask")

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


def answer_for_failed_call(error: Exception) -> Response:
    status = status_of(error)
    route = request.url_rule.rule if request.url_rule is not None else "no route"
    log.warning("%d for %s: %s: %s", status, route, type(error).__name__, error)
    return problem(status)


def problem(status: int) -> Response:
    reason, title, headers = _PROBLEMS[status]
    body = {"type": f"urn:meshlib:problem:{reason}", "title": title, "status": status, "reason": reason}
    return Response(json.dumps(body), status, headers, content_type="application/problem+json")
