"""How does a Django project become a service of the mesh?

    MIDDLEWARE = ["meshlib_django.MeshMiddleware", ...]         request.peer, names of spans, answers for outgoing calls that failed
    application = meshlib_django.get_asgi_application()         in asgi.py; get_wsgi_application() in wsgi.py: the inbound way
    INSTALLED_APPS = ["meshlib_django", ...]                    what `manage.py check` has to say about it
    MESH = {"CONFIG": BASE_DIR / "mesh.yaml", "SERVICE": "shop"}    or MESHLIB_CONFIG and MESHLIB_SERVICE in the environment

    meshlib_django.mesh()                                       the Mesh of the process, for clients: mesh().client()
    @peer_required                                              401 for callers who proved nothing, for sync and async views

Two parts, since Django has two: what stands around the application decides who gets in, and sees the path as it came over the wire; the
middleware stands inside, and knows views. It is written with Django's own means, and imports only public names of meshlib. It does not
authorise: the rules in mesh.yaml do. It makes nobody a user of `django.contrib.auth`.
"""

from __future__ import annotations

from .application import get_asgi_application, get_wsgi_application, mesh_asgi, mesh_wsgi
from .middleware import MeshMiddleware
from .peer import peer_required
from .process import mesh

__all__ = [
    "MeshMiddleware",
    "get_asgi_application",
    "get_wsgi_application",
    "mesh",
    "mesh_asgi",
    "mesh_wsgi",
    "peer_required",
]
__version__ = "0.1.0"
