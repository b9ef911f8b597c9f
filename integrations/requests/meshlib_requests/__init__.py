"""How does code that is written for requests call the services of the mesh?

    session(mesh)                a requests.Session whose hosts may be services
    MeshAdapter(mesh)            the same for a session that is there already: session.mount("http://", MeshAdapter(mesh))
    call_of(response)            the meshlib.Call behind a response, or behind an error: call_of(response).explain()

An adapter is the seam that requests documents for this, so that everything above it (cookies, redirects, auth, hooks, decoding, files)
stays requests' own. Calls to services take the mesh's outbound way; hosts outside the mesh are requests' own business, under the egress
policy of mesh.yaml. It imports only public names of meshlib, and takes no decision about a call.
"""

from __future__ import annotations

from .adapter import MeshAdapter, call_of, session

__all__ = ["MeshAdapter", "call_of", "session"]
__version__ = "0.1.0"
