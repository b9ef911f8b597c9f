"""What do the customers do, and how does it go for them?

One process for each side, `mesh` or `hand`, with the same rhythm: `--rate` calls a second, three purchases for each
look at an item, started at even times whether or not the earlier ones have come back (so that a slow answer doesn't
hide the calls that would have waited behind it), at most 200 at once. `mesh` goes to the storefront, as the service
`shopper`; `hand` goes straight to `orders` with the client of by_hand.py. A call has failed if the customer got an
exception or anything but 200 or 201.

Five times a second it prints a line of JSON with every call since the line before. It measures; it repeats nothing by
itself.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import time
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, Protocol, Self

IN_FLIGHT = 200
REPORT_EVERY = 0.2


class Client(Protocol):
    retries: int

    async def buy(self, purchase: str, item: int) -> None: ...
    async def show(self, item: int) -> None: ...


class Storefront:
    """The way through the mesh: an httpx client that knows services by name."""

    def __init__(self) -> None:
        import meshlib

        self.mesh = meshlib.Mesh.load(service="shopper")
        self.http = self.mesh.client()
        self.retries = 0

    async def buy(self, purchase: str, item: int) -> None:
        answer = await self.http.post("http://storefront/buy", json={"purchase": purchase, "item": item})
        answer.raise_for_status()

    async def show(self, item: int) -> None:
        answer = await self.http.get(f"http://storefront/items/{item}")
        answer.raise_for_status()

    async def __aenter__(self) -> Self:
        await self.http.__aenter__()
        return self

    async def __aexit__(self, *error: Any) -> None:
        await self.http.__aexit__(*error)


class Crowd:
    """All customers of one side, and what became of their calls since the last report."""

    def __init__(self, side: str, client: Client) -> None:
        self.side, self.client = side, client
        self.calls: list[tuple[float, float, bool, str]] = []
        self.errors: list[tuple[float, str]] = []
        self.running: set[asyncio.Task[None]] = set()

    async def run(self, rate: float, stopped: asyncio.Event) -> None:
        start, number = time.monotonic(), 0
        while not stopped.is_set():
            await asyncio.sleep(max(0.0, start + number / rate - time.monotonic()))
            number += 1
            if len(self.running) < IN_FLIGHT:
                task = asyncio.create_task(self.call(number))
                self.running.add(task)
                task.add_done_callback(self.running.discard)
        await asyncio.gather(*self.running)

    async def call(self, number: int) -> None:
        begun, is_good = time.monotonic(), False
        purchase = f"{self.side}-{number}" if number % 4 else ""
        try:
            if purchase:
                await self.client.buy(purchase, number % 500)
            else:
                await self.client.show(number % 500)
            is_good = True
        except Exception as error:  # a customer's view: whatever it was, it failed
            self.errors.append((begun, f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"))
        self.calls.append((begun, time.monotonic() - begun, is_good, purchase))

    def report(self) -> None:
        line = {"calls": self.calls, "errors": self.errors, "retries": self.client.retries, "breakers": self.breakers()}
        print(json.dumps(line), flush=True)
        self.calls, self.errors = [], []

    def breakers(self) -> dict[str, str]:
        return {address: breaker.current_state for address, breaker in getattr(self.client, "breakers", {}).items()}


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("side", choices=["mesh", "hand"])
    parser.add_argument("--rate", type=float, default=60.0)
    parser.add_argument("--address", action="append", default=[], help="hand: a process of orders")
    parser.add_argument("--identity", type=Path, help="hand: folder with svid.pem, key.pem and bundle.pem")
    parser.add_argument("--server-name", default="", help="hand: the DNS name in the certificate of orders")
    options = parser.parse_args()

    stopped = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopped.set)
    async with AsyncExitStack() as stack:
        client: Client
        if options.side == "mesh":
            client = await stack.enter_async_context(Storefront())
        else:
            from examples.shop.by_hand import Orders

            client = await stack.enter_async_context(Orders(options.address, options.identity, options.server_name))
        crowd = Crowd(options.side, client)
        load = asyncio.create_task(crowd.run(options.rate, stopped))
        while not load.done():
            await asyncio.wait([load], timeout=REPORT_EVERY)
            crowd.report()
        await load


if __name__ == "__main__":
    asyncio.run(main())
