"""What does the mesh answer, if I call as this service?

`python -m examples.shop.ask newsletter GET http://orders/items/7 POST http://orders/orders` makes these calls with the
identity of `newsletter` (a POST orders something) and prints a line of JSON for each: status and body. A process of its
own, because an identity belongs to a process.
"""

from __future__ import annotations

import asyncio
import json
import sys

import meshlib


async def ask(service: str, *questions: str) -> None:
    mesh = meshlib.Mesh.load(service=service)
    async with mesh.client() as http:
        for method, url in zip(questions[::2], questions[1::2], strict=True):
            order = {"purchase": f"{service}-1", "item": 7} if method == "POST" else None
            answer = await http.request(method, url, json=order)
            print(json.dumps({"status": answer.status_code, "body": answer.text}), flush=True)
    mesh.close()


if __name__ == "__main__":
    asyncio.run(ask(*sys.argv[1:]))
