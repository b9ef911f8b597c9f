"""How does a script that is written for aiohttp get the mesh? One line of it changes. The service that it asks is in this file too.

meshlib dev                                            # in a first terminal; it prints what the others export
meshlib serve "example:orders()" --service orders
MESHLIB_SERVICE=reports python example.py              # three items at once, a report, and what the mesh did about it
"""

import asyncio
from typing import Any

import aiohttp
import meshlib_aiohttp

import meshlib


def orders() -> Any:
    """The service: an ASGI application of nothing but the standard library."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        peer = meshlib.peer()
        if scope["method"] == "POST":
            text = f"{(await receive())['body'].decode()} read by orders"
        else:
            text = f"item {scope['path'].rsplit('/', 1)[-1]} for {peer.service if peer else 'nobody'}"
        headers = [(b"content-type", b"text/plain; charset=utf-8")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": text.encode()})

    return app


async def item(http: aiohttp.ClientSession, number: int) -> str:
    async with http.get(f"http://orders/items/{number}") as answer:
        return await answer.text()


async def report(http: aiohttp.ClientSession) -> list[str]:
    """What a team has had for years. It knows nothing of the mesh."""
    lines = await asyncio.gather(*(item(http, number) for number in (1, 2, 3)))
    async with http.post("http://orders/audits", data=f"{len(lines)} lines", raise_for_status=True) as answer:
        return [*lines, await answer.text()]


async def main() -> None:
    mesh = meshlib.Mesh.load()
    async with meshlib_aiohttp.session(mesh) as http:  # was: aiohttp.ClientSession()
        print("\n".join(await report(http)))
        async with http.get("http://orders/items/4") as answer:
            call = meshlib_aiohttp.call_of(answer)
            print(call.explain() if call else "")


if __name__ == "__main__":
    asyncio.run(main())
