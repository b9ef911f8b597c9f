"""How does a FastAPI service call others through the mesh?

Like any others: `orders` over HTTP with an httpx client, `inventory` over gRPC with a channel. What the mesh adds
(which process answers, mutual TLS, a second attempt if the first one broke) stands in mesh.yaml. The
`Idempotency-Key` is the customer's own purchase number: it is the same for all attempts, and mesh.yaml says that it
counts for this route. Without both, the mesh would not repeat a POST that a process may already have executed; it
would report the failure.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import httpx
from fastapi import FastAPI, Response
from pydantic import BaseModel

import meshlib

mesh = meshlib.Mesh.load()
http: httpx.AsyncClient
reserve: Callable[[dict[str, Any]], Awaitable[dict[str, Any]]]
retried: deque[str] = deque(maxlen=20)


class Purchase(BaseModel):
    purchase: str
    item: int


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    global http, reserve
    async with mesh.client() as http, mesh.grpc_channel("inventory") as channel:
        reserve = channel.unary_unary("/shop.Inventory/Reserve", request_serializer=to_bytes, response_deserializer=json.loads)
        yield


shop = FastAPI(lifespan=lifespan)


@shop.post("/buy")
async def buy(purchase: Purchase) -> Response:
    await reserve(purchase.model_dump())
    key = {"Idempotency-Key": purchase.purchase}
    return relay(await http.post("http://orders/orders", json=purchase.model_dump(), headers=key))


@shop.get("/items/{item}")
async def show(item: int) -> Response:
    return relay(await http.get(f"http://orders/items/{item}"))


@shop.get("/debug/retried")
async def debug() -> list[str]:
    """The mesh's own account of the last calls that needed more than one attempt."""
    return list(retried)


def relay(answer: httpx.Response) -> Response:
    call = answer.extensions["meshlib.call"]
    if call.attempts > 1:
        retried.append(call.explain())
    return Response(answer.content, answer.status_code, media_type="application/json")


def to_bytes(message: dict[str, Any]) -> bytes:
    return json.dumps(message).encode()


app = mesh.asgi(shop)
