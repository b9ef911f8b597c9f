"""How is each edge of the shop, as the mesh itself counts it?

From the Prometheus text of the processes, as any dashboard would have it: calls, failures, retries, breakers and
latencies as the calling side counts them, and by whom it was proved to be called as the called side does. Latencies
are of an edge as a whole; its endpoints have counts only. Names of metrics stand here and nowhere else in the demo.
"""

from __future__ import annotations

import asyncio
import contextlib
import time

from examples.shop.figures import Labels, Meter, chosen, quantile_of_buckets
from examples.shop.screen import Edge

# Caller (a process), service called, its endpoints (processes), and the histogram of the calls.
HTTP, RPC = "http_client_request_duration_seconds_bucket", "rpc_client_call_duration_seconds_bucket"
EDGES = (
    ("shopper", "storefront", ("storefront",), HTTP),
    ("storefront", "orders", ("orders-a", "orders-b", "orders-c"), HTTP),
    ("storefront", "inventory", ("inventory-a", "inventory-b"), RPC),
)
BREAKER = {0.0: "closed", 1.0: "half open", 2.0: "open", 3.0: "isolated"}
WINDOW = 3.0

Values = dict[tuple[str, Labels], float]


class Meters:
    """The meters of all processes of the mesh."""

    def __init__(self) -> None:
        self.of: dict[str, Meter] = {}
        self.where: dict[str, str] = {}
        self.endpoints: dict[str, tuple[str, str]] = {}  # of a process: its address, and what is worth knowing about it

    def add(self, name: str, metrics: str, address: str, note: str) -> None:
        self.of[name] = Meter()
        self.where[name] = metrics
        self.endpoints[name] = (address, note)

    async def look(self) -> None:
        """Read what can be read; a process that is down keeps its last numbers."""

        async def one(name: str) -> None:
            with contextlib.suppress(OSError, TimeoutError, asyncio.IncompleteReadError):
                self.of[name].look(await read(self.where[name]), time.monotonic())

        await asyncio.gather(*(one(name) for name in self.of))

    def edges(self) -> list[Edge]:
        found = []
        for caller, service, processes, histogram in EDGES:
            now, before, span = self.window(caller)
            rate, success = self.rate(now, before, span, "route", service=service)
            p50, p99 = (self.quantile(now, before, histogram, service, share) for share in (0.50, 0.99))
            retries = int(sum_of(now, "meshlib_retry_attempts_total", service=service))
            mtls = self.mtls_share(*processes)
            found.append(Edge(f"{caller} > {service}", rate, success, p50, p99, retries, "", mtls))
            for name in processes if len(processes) > 1 else ():
                address, note = self.endpoints[name]
                rate, success = self.rate(now, before, span, "balance", service=service, endpoint=address)
                states = [BREAKER.get(value, "?") for _, value in chosen(now, "meshlib_admit_breaker_state", endpoint=address)]
                again = int(sum_of(now, "meshlib_balance_retried_total", endpoint=address))
                breaker = states[0] if states else ""
                found.append(Edge(f"  {address} {note}", rate, success, None, None, again, breaker, self.mtls_share(name)))
        return found

    def window(self, name: str) -> tuple[Values, Values, float]:
        """The numbers of a process now and some seconds before, and how many seconds lie between."""
        history = self.of[name].history
        if not history:
            return {}, {}, 0.0
        last, now = history[-1]
        first, before = next((past for past in history if last - past[0] <= WINDOW), history[-1])
        return now, before, last - first

    @staticmethod
    def rate(now: Values, before: Values, span: float, phase: str, **labels: str) -> tuple[float, float]:
        """Calls a second, and the share of them that went well."""
        calls, failures = (
            sum_of(now, f"meshlib_{phase}_{what}_total", **labels) - sum_of(before, f"meshlib_{phase}_{what}_total", **labels)
            for what in ("requests", "failures")
        )
        return (calls / span if span else 0.0), (1 - failures / calls if calls else 1.0)

    @staticmethod
    def quantile(now: Values, before: Values, histogram: str, service: str, share: float) -> float:
        counts: dict[float, float] = {}
        for sign, values in ((1, now), (-1, before)):
            for labels, value in chosen(values, histogram, server_address=service):
                bound = float(labels["le"])
                counts[bound] = counts.get(bound, 0.0) + sign * value
        bounds = sorted(counts)
        heights = [counts[bound] - (counts[bounds[place - 1]] if place else 0.0) for place, bound in enumerate(bounds)]
        return quantile_of_buckets(bounds[:-1], heights, share)

    # --- over the whole run

    def retries(self) -> int:
        return int(sum(sum_of(self.of[caller].total(), "meshlib_retry_attempts_total") for caller in ("shopper", "storefront")))

    def ejections(self) -> int:
        return int(sum(sum_of(self.of[caller].total(), "meshlib_admit_ejections_total") for caller in ("shopper", "storefront")))

    def rotations(self) -> dict[str, int]:
        """How many identities each process has taken into use after its first; what is down is left out."""
        return {
            name: int(sum_of(meter.now, "meshlib_secure_rotations_total"))
            for name, meter in self.of.items()
            if any(metric == "meshlib_secure_rotations_total" for metric, _ in meter.now)
        }

    def by_agent(self) -> int:
        """Attempts that the node agent made."""
        return int(sum(sum_of(meter.total(), "meshlib_admit_delegated_total", by="agent") for meter in self.of.values()))

    def open_breakers(self) -> int:
        now = self.of["storefront"].now
        return sum(value > 0 for _, value in chosen(now, "meshlib_admit_breaker_state"))

    def mtls_share(self, *names: str) -> float | None:
        """The share of the requests that came in whose caller was proved by a certificate; None without requests."""
        proved = total = 0.0
        for name in names or self.of:
            for labels, value in chosen(self.of[name].total(), "meshlib_secure_requests_total"):
                total += value
                proved += value if labels["peer"].startswith("spiffe://") else 0.0
        return proved / total if total else None


def sum_of(values: Values, name: str, **labels: str) -> float:
    return sum(value for _, value in chosen(values, name, **labels))


async def read(address: str) -> str:
    """The metrics at an address; raises OSError or TimeoutError if nobody answers."""
    host, _, port = address.rpartition(":")
    async with asyncio.timeout(1):
        reader, writer = await asyncio.open_connection(host, int(port))
        try:
            writer.write(f"GET /metrics HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n".encode())
            head, _, body = (await reader.read()).partition(b"\r\n\r\n")
        finally:
            writer.close()
    if b" 200 " not in head.split(b"\r\n", 1)[0]:
        raise OSError(f"no metrics at {address}: {head[:80]!r}")
    return body.decode()
