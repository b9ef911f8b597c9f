"""Who called, for a view?

The proof was made by the connection, before the view was chosen; it is only handed over, as `g.peer`. A view that can't do without is
wrapped in `peer_required`, below the route: what an unknown caller gets is 401 with problem details.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

from flask import current_app, g
from werkzeug.exceptions import Unauthorized

import meshlib

from .problems import problem

Arguments = ParamSpec("Arguments")
Answer = TypeVar("Answer")


def proved_peer() -> meshlib.Peer | None:
    """Who called, or None for a caller without identity (modes observe and permissive)."""
    peer = meshlib.peer()
    return peer if peer is not None and peer.spiffe_id else None


def peer_required(view: Callable[Arguments, Answer]) -> Callable[Arguments, Answer]:
    """A view that is only for callers who proved who they are."""

    @wraps(view)
    def guarded(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Answer:
        if g.peer is None:
            raise Unauthorized(response=problem(401))
        answer: Answer = current_app.ensure_sync(view)(*args, **kwargs)
        return answer

    return guarded
