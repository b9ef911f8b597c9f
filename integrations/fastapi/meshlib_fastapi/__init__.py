"""How does a FastAPI application become a service of the mesh?

    install(app, mesh)                                  once, before the first request
    async def show(item: int, peer: Peer): ...          who called, proved by the connection; 401 if nobody proved anything
    async def show(item: int, peer: OptionalPeer): ...  the same, or None

`install` puts the inbound way around the whole application, gives the span of a call the route's template, closes the mesh when the
application shuts down, and answers for outgoing calls that failed. It is written with FastAPI's own means where it has some (dependencies,
exception handlers, lifespan), and imports only public names of meshlib. It does not authorise: the rules in mesh.yaml do.
"""

from __future__ import annotations

from .install import install
from .peer import IdentityRequired, OptionalPeer, Peer, optional_peer, proved_peer

__all__ = ["IdentityRequired", "OptionalPeer", "Peer", "install", "optional_peer", "proved_peer"]
__version__ = "0.1.0"
