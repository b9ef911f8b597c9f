"""What does a careful Python developer write without a mesh?

This: httpx with mutual TLS, both processes of `orders` in turn, a circuit breaker (pybreaker) for each of them, and
three attempts (tenacity) with jittered backoff on connection errors, 5xx and an open breaker. It follows the manuals
of the three libraries, and it meets the same processes, ports and handlers as the mesh does.

What it lacks is what the demo shows, so here it stands in full, with the switch that adds it:
- A broken POST is repeated, although the process may have executed it. None of the three libraries asks whether that
  is safe, and none knows of `Idempotency-Key`. DEMO_PEER_KEY=1 sends the key as the storefront does: nothing is done
  twice any more. (Without a key the mesh would not repeat a POST that was written: it fails once, rather than buys
  twice.)
- The turn is taken by all calls together, so three attempts of one call may meet the same dead process, or its open
  breaker. DEMO_PEER_OTHER=1 lets each attempt take the process after the one before: hardly a call fails any more.
- It doesn't skip a process whose breaker is open, it spends an attempt on it. To skip it by `current_state` would
  shut it out for good, because pybreaker looks again only when it is called. What skips, probes and takes back is a
  load balancer: a mesh.
- Certificates are read once, and of the server only the DNS name is checked; Python's ssl doesn't know SPIFFE IDs.
"""

from __future__ import annotations

import itertools
import os
import ssl
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx
import pybreaker
import tenacity

SENDS_KEY = os.environ.get("DEMO_PEER_KEY") == "1"
TAKES_OTHER = os.environ.get("DEMO_PEER_OTHER") == "1"


class ServerError(Exception):
    """The process answered with 5xx."""


class Orders:
    """A client of `orders`, made by hand."""

    def __init__(self, addresses: Sequence[str], identity: Path, server_name: str) -> None:
        context = ssl.create_default_context(cafile=str(identity / "bundle.pem"))
        context.load_cert_chain(identity / "svid.pem", identity / "key.pem")
        self.http = httpx.AsyncClient(verify=context, timeout=2.0, limits=httpx.Limits(max_connections=200))
        self.addresses = addresses
        self.turn = itertools.count()
        self.breakers = {address: pybreaker.CircuitBreaker(fail_max=5, reset_timeout=5, name=address) for address in addresses}
        self.server_name = server_name
        self.retries = 0

    async def buy(self, purchase: str, item: int) -> None:
        headers = {"Idempotency-Key": purchase} if SENDS_KEY else {}
        await self.send("POST", "/orders", json={"purchase": purchase, "item": item}, headers=headers)

    async def show(self, item: int) -> None:
        await self.send("GET", f"/items/{item}")

    async def send(self, method: str, path: str, **request: Any) -> httpx.Response:
        turn = itertools.count(next(self.turn)) if TAKES_OTHER else self.turn
        async for attempt in tenacity.AsyncRetrying(
            stop=tenacity.stop_after_attempt(3),
            wait=tenacity.wait_random_exponential(multiplier=0.1, max=2),
            retry=tenacity.retry_if_exception_type((httpx.TransportError, ServerError, pybreaker.CircuitBreakerError)),
            reraise=True,
        ):
            with attempt:
                self.retries += attempt.retry_state.attempt_number > 1
                address = self.addresses[next(turn) % len(self.addresses)]
                with self.breakers[address].calling():
                    response = await self.http.request(
                        method, f"https://{address}{path}", extensions={"sni_hostname": self.server_name}, **request
                    )
                    if response.status_code >= 500:
                        raise ServerError(f"{response.status_code} from {address}")
                return response.raise_for_status()
        raise AssertionError("tenacity returns or raises")

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.http.aclose()
