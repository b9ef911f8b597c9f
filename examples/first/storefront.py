"""How does a program call a service of the mesh? By its name."""

import asyncio

import meshlib


async def main() -> None:
    async with meshlib.Mesh.load(service="storefront").client() as http:  # an httpx.AsyncClient
        answer = await http.get("http://orders/items/7")
    print(answer.status_code, answer.json())
    print(answer.extensions["meshlib.call"].explain())


asyncio.run(main())
