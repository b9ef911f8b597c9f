"""How does code that is written for aiohttp call the services of the mesh?

    session(mesh)                an aiohttp.ClientSession whose hosts may be services
    MeshConnector(mesh)          the same for a session of your own: ClientSession(connector=MeshConnector(mesh))
    call_of(response)            the meshlib.Call behind a response, or behind an error: call_of(response).explain()

A connector is the lowest seam that aiohttp documents. What it hands out here is a connection to the mesh instead of one to a host, and
so everything above it stays aiohttp's own code: redirects, cookies, timeouts, middlewares, traces, decoding, the StreamReader with its flow
control. It imports only public names of meshlib, and takes no decision about a call.
"""

from __future__ import annotations

from .connector import MeshConnector, session
from .link import call_of

__all__ = ["MeshConnector", "call_of", "session"]
__version__ = "0.1.0"
