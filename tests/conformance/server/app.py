"""Which application do the conformance tests give to a server? `tests.conformance.server.app:app`, by the server's own command line.

$CONFORMANCE_FRAMEWORK says in what it is written, $MESHLIB_CONFIG and $MESHLIB_SERVICE where its mesh comes from. It is put into the mesh here,
as an application does it that is not started by `meshlib serve`.
"""

from __future__ import annotations

import importlib
import logging
import os

import meshlib
from tests.conformance.server.served import common

logging.basicConfig(level=logging.INFO)
if os.environ.get("CONFORMANCE_SPANS"):
    common.trace_calls()
name = os.environ["CONFORMANCE_FRAMEWORK"]
if name.startswith("django"):
    # It finds its mesh by itself.
    django = importlib.import_module("tests.conformance.server.served.on_django")
    app = django.made_wsgi() if name == "django-wsgi" else django.made_asgi()
else:
    mesh = common.MESH = meshlib.Mesh.load()
    app = importlib.import_module(f"tests.conformance.server.served.{name}").made(mesh)
