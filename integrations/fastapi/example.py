"""How does a FastAPI service know who calls, and what does it say when a call of its own fails? Two services in one file.

meshlib dev                                            # in a first terminal; it prints what the others export
meshlib serve "example:orders()" --service orders
meshlib serve "example:storefront()" --service storefront
curl http://127.0.0.1:8200/buy/7                       # asks orders; stop orders, and ask again
"""

from typing import Any

from fastapi import FastAPI
from meshlib_fastapi import OptionalPeer, Peer, install

import meshlib


def orders() -> FastAPI:
    app = FastAPI(title="orders")
    install(app, meshlib.Mesh.load())

    @app.get("/items/{item}")
    async def show(item: int, peer: Peer) -> dict[str, Any]:
        return {"item": item, "price": 5 + item, "for": peer.service}

    return app


def storefront() -> FastAPI:
    app = FastAPI(title="storefront")
    mesh = meshlib.Mesh.load()
    install(app, mesh)
    http = mesh.client()  # an httpx.AsyncClient

    @app.get("/buy/{item}")
    async def buy(item: int, peer: OptionalPeer) -> dict[str, Any]:
        answer = await http.get(f"http://orders/items/{item}")
        return {"customer": peer.service if peer else "somebody", "order": answer.json()}

    return app
