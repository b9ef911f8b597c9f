"""What does gunicorn serve in the prefork tests? An application whose module makes a mesh, makes clients, and has called by them.

That is what applications do: a client at module level, and a first call for a setting or a flag. With `preload_app` the module runs in the
process that forks, and its children find clients that have been used: by a keeper that did not come along, and with connections whose
other holder is their parent.
"""

from __future__ import annotations

import asyncio
import json
import os
from typing import Any

import meshlib

mesh = meshlib.Mesh.load()
blocking = mesh.sync_client()
asking = mesh.client()


def _headers() -> dict[str, str]:
    return {"x-pid": str(os.getpid())}


async def _twice() -> None:
    for _ in range(2):
        (await asking.get("http://elsewhere/import", headers=_headers())).raise_for_status()


for _ in range(2):
    blocking.get("http://elsewhere/import", headers=_headers()).raise_for_status()
asyncio.run(_twice())


def _body(status: int) -> bytes:
    return json.dumps({"pid": os.getpid(), "status": status}).encode()


def _wsgi(environ: dict[str, Any], start_response: Any) -> Any:
    body = _body(blocking.get("http://elsewhere/x", headers=_headers()).status_code)
    start_response("200 OK", [("Content-Type", "application/json"), ("Content-Length", str(len(body)))])
    return [body]


async def _asgi(scope: Any, receive: Any, send: Any) -> None:
    if scope["type"] == "lifespan":
        while True:
            message = await receive()
            await send({"type": message["type"] + ".complete"})
            if message["type"] == "lifespan.shutdown":
                return
    body = _body((await asking.get("http://elsewhere/x", headers=_headers())).status_code)
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(body))]})
    await send({"type": "http.response.body", "body": body})


wsgi = mesh.wsgi(_wsgi)
asgi = mesh.asgi(_asgi)
