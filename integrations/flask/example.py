"""How does a Flask service know who calls, and what does it say when a call of its own fails? Two services in one file.

meshlib dev                                            # in a first terminal; it prints what the others export
meshlib serve "example:orders()" --service orders
meshlib serve "example:storefront()" --service storefront
curl http://127.0.0.1:8200/buy/7                       # asks orders; stop orders, and ask again
"""

from typing import Any

from flask import Flask, g
from meshlib_flask import MeshFlask, peer_required

import meshlib


def orders() -> Flask:
    app = Flask("orders")
    MeshFlask(app, meshlib.Mesh.load())

    @app.get("/items/<int:item>")
    @peer_required
    def show(item: int) -> dict[str, Any]:
        return {"item": item, "price": 5 + item, "for": g.peer.service}

    return app


def storefront() -> Flask:
    app = Flask("storefront")
    mesh = meshlib.Mesh.load()
    MeshFlask(app, mesh)
    http = mesh.sync_client()  # an httpx.Client

    @app.get("/buy/<int:item>")
    def buy(item: int) -> dict[str, Any]:
        answer = http.get(f"http://orders/items/{item}")
        return {"customer": g.peer.service if g.peer else "somebody", "order": answer.json()}

    return app
