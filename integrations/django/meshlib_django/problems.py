"""What does our caller learn, when a call that we made for them failed?

That it failed, and whether it's worth trying again: problem details (RFC 9457) with a constant body for each status. Which service we
called, and what went wrong there, is nobody's business but the operator's, who has it in the log.
"""

from __future__ import annotations

import json
import logging
from typing import Final

from django.http import HttpRequest, HttpResponse

from meshlib import (
    AttemptFailed,
    AttemptTimeout,
    CircuitOpen,
    DeadlineExceeded,
    IdentityError,
    LimitExceeded,
    NoEndpoint,
    RateLimited,
    Refused,
)

from .route import template_of

log = logging.getLogger("meshlib_django")

_PROBLEMS: Final[dict[int, tuple[str, str, dict[str, str]]]] = {
    401: ("secure.no_identity", "An identity is required", {"www-authenticate": "mTLS"}),
    502: ("upstream.failed", "A service behind this one failed", {}),
    503: ("upstream.unavailable", "A service behind this one is not available", {"retry-after": "1"}),
    504: ("upstream.timeout", "A service behind this one did not answer in time", {}),
}
# Errors of outgoing calls. All others of meshlib are mistakes of our own, and stay what they are.
FAILED: Final = (DeadlineExceeded, Refused, AttemptFailed, IdentityError)
_LATE: Final = (DeadlineExceeded, AttemptTimeout)
# Refused before anything was sent, for a reason that passes.
_PASSING: Final = (NoEndpoint, CircuitOpen, LimitExceeded, RateLimited, IdentityError)


def status_of(error: Exception) -> int:
    """What an error of an outgoing call is to our own caller."""
    return 504 if isinstance(error, _LATE) else 503 if isinstance(error, _PASSING) else 502


def answer_for_failed_call(request: HttpRequest, error: Exception) -> HttpResponse:
    status = status_of(error)
    log.warning("%d for %s: %s: %s", status, template_of(request) or "no route", type(error).__name__, error)
    return problem(status)


def problem(status: int) -> HttpResponse:
    reason, title, headers = _PROBLEMS[status]
    body = {"type": f"urn:meshlib:problem:{reason}", "title": title, "status": status, "reason": reason}
    return HttpResponse(json.dumps(body), status=status, headers=headers, content_type="application/problem+json")
