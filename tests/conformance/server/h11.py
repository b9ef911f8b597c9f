"""How is uvicorn told to parse with h11 behind the mesh? `python -m uvicorn --http tests.conformance.server.h11:MeshH11`."""

from __future__ import annotations

from uvicorn.protocols.http.h11_impl import H11Protocol

from meshlib.server.uvicorn import MeshHTTP


class MeshH11(MeshHTTP):
    http = H11Protocol
