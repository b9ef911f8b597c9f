"""Who called, as a parameter of the handler?

The proof was made by the connection, before the handler was chosen; these dependencies only hand it over. They are coroutines, so that
FastAPI runs them in place and not in a thread. A test replaces `optional_peer`, on which both are built:
``app.dependency_overrides[optional_peer] = lambda: meshlib.Peer("spiffe://…")``.
"""

from __future__ import annotations

from typing import Annotated, TypeAlias

from fastapi import Depends, HTTPException

import meshlib


class IdentityRequired(HTTPException):
    """The handler wants to know who calls, and the connection proved nothing. Answered with 401."""

    def __init__(self) -> None:
        super().__init__(401, "An identity is required", {"www-authenticate": "mTLS"})


async def optional_peer() -> meshlib.Peer | None:
    """Who called, or None for a caller without identity (modes observe and permissive)."""
    peer = meshlib.peer()
    return peer if peer is not None and peer.spiffe_id else None


async def proved_peer(peer: Annotated[meshlib.Peer | None, Depends(optional_peer)]) -> meshlib.Peer:
    """Who called; raises IdentityRequired for a caller without identity."""
    if peer is None:
        raise IdentityRequired
    return peer


Peer: TypeAlias = Annotated[meshlib.Peer, Depends(proved_peer)]
OptionalPeer: TypeAlias = Annotated[meshlib.Peer | None, Depends(optional_peer)]
