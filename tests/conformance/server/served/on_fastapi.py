"""What is served with FastAPI and `meshlib_fastapi`? Starlette's routes, and handlers that get their caller as a parameter."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from meshlib_fastapi import OptionalPeer, Peer, install
from starlette.routing import Route

from tests.conformance.server.served import on_starlette
from tests.conformance.server.served.on_starlette import METHODS, seen


def made(mesh: Any) -> Any:
    app = FastAPI(lifespan=on_starlette.lifespan, openapi_url=None)

    @app.api_route("/items/{number}", methods=METHODS)
    async def items(number: str, request: Request, peer: OptionalPeer) -> Response:
        return JSONResponse(seen(request, "items", await request.body(), peer.spiffe_id if peer else ""))

    @app.api_route("/sync", methods=METHODS)
    def sync(request: Request, peer: OptionalPeer) -> Response:
        # A plain function: FastAPI runs it in a thread.
        return JSONResponse(seen(request, "rest", own=peer.spiffe_id if peer else ""))

    @app.get("/mine")
    async def mine(peer: Peer) -> str:
        return peer.spiffe_id

    app.router.routes += [
        route for route in on_starlette.routes() if not (isinstance(route, Route) and route.path in ("/items/{number}", "/sync"))
    ]
    install(app, mesh)
    return app
