"""How does a Flask application become a service of the mesh?

    MeshFlask(app, mesh)         once; or MeshFlask(mesh=mesh) and later init_app(app)
    g.peer                       who called, proved by the connection; None if nobody proved anything
    @peer_required               401 for those

The extension puts the inbound way around the WSGI application, gives the span of a call the URL rule, and answers for outgoing calls that
failed. It is written with Flask's own means (signals, error handlers, `app.extensions`), and imports only public names of meshlib. It does
not authorise: the rules in mesh.yaml do.
"""

from __future__ import annotations

from .extension import MeshFlask
from .peer import peer_required

__all__ = ["MeshFlask", "peer_required"]
__version__ = "0.1.0"
