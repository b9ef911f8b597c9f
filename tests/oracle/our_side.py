"""How is our engine asked the same? Under a virtual clock, with a plan that says everything, and answers that the test invents.

The plan is written here and not compiled from a mesh.yaml, so that a test can set what Envoy sets: the defaults of meshlib are
not what is compared. Breaker, budget and panic are wide open unless a test closes them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from meshlib._native import core

TOOK = 0.001
Answer = Callable[[str, int], tuple[int, int]]  # (address, attempt from 0) -> (outcome, status)


def fine(address: str, attempt: int) -> tuple[int, int]:
    return core.OUTCOME_RESPONSE, 200


def failing(*addresses: str, status: int = 500) -> Answer:
    return lambda address, attempt: (core.OUTCOME_RESPONSE, status if address in addresses else 200)


class Ours:
    """An engine with one service, `orders`, and these endpoints."""

    def __init__(
        self,
        policy: str,
        endpoints: Sequence[str],
        *,
        weights: Sequence[float] | None = None,
        zones: Sequence[str] | None = None,
        zone: str = "",
        seed: int = 1,
        callers: Sequence[str] = (),
        balance: dict[str, Any] | None = None,
        breaker: dict[str, Any] | None = None,
        retry: dict[str, Any] | None = None,
    ) -> None:
        self.engine, self.now, self.version = core.Engine(seed), 1000.0, 0
        services = [_service("orders", policy, balance or {}, breaker or {}, retry or {}), _service("me", policy, {}, {}, {})]
        self.engine.publish(json.dumps({"service": "me", "zone": zone, "services": services}).encode(), self.now)
        if callers:
            found = [(f"127.7.0.{n}:1", 1.0, at, {}, "") for n, at in enumerate(callers, 1)]
            self.engine.resolve("me", 1, found, self.now)
        self.resolve(endpoints, weights, zones)

    def resolve(
        self, endpoints: Sequence[str], weights: Sequence[float] | None = None, zones: Sequence[str] | None = None
    ) -> None:
        self.version += 1
        count = len(endpoints)
        rows = zip(endpoints, weights or [1.0] * count, zones or [""] * count, strict=True)
        self.engine.resolve("orders", self.version, [(at, weight, zone, {}, "") for at, weight, zone in rows], self.now)

    def call(self, answer: Answer = fine, method: str = "GET", **fields: str) -> list[tuple[str, int]]:
        """One call: (address, status) of its attempts, status 0 without an answer."""
        call, attempts = self.engine.begin("orders", method, "/", _headers(fields), self.now), []
        while True:
            step = call.next(self.now)
            if step[0] == core.WAIT:
                self.now += step[1]
                continue
            self.now += TOOK
            outcome, status = answer(step[2], len(attempts))
            attempts.append((step[2], status))
            if call.head(step[1], outcome, status, self.now) == core.DELIVER:
                if outcome == core.OUTCOME_RESPONSE:
                    call.finish(step[1], outcome, self.now)
                return attempts

    def order(self, count: int) -> list[str]:
        """To which endpoints so many calls go, in turn."""
        return [self.call()[0][0] for _ in range(count)]

    def hold(self, **fields: str) -> tuple[core.Call, str]:
        """A call that stays under way as long as it is kept, and where it went."""
        call = self.engine.begin("orders", "GET", "/", _headers(fields), self.now)
        return call, call.next(self.now)[2]

    def fail(self, *addresses: str) -> None:
        """Unhealthy, whatever balance and breaker think: the word of an active health check."""
        for address in addresses:
            self.engine.check("orders", address, False, self.now)

    def breakers(self) -> dict[str, str]:
        return {row["endpoint"]: row["breaker"] for row in self.engine.stats(self.now) if row["service"] == "orders"}


def _headers(fields: dict[str, str]) -> list[tuple[bytes, bytes]]:
    return [(name.replace("_", "-").encode(), value.encode()) for name, value in fields.items()]


def _service(name: str, policy: str, balance: dict[str, Any], breaker: dict[str, Any], retry: dict[str, Any]) -> dict[str, Any]:
    route = {
        "name": "all",
        "match": {"path": {"kind": "prefix", "value": "/"}, "methods": [], "headers": []},
        "backends": [{"name": "all", "labels": {}, "weight": 1}],
        "retry": {
            "attempts": 0, "backoff_base": 0.001, "backoff_max": 0.01, "statuses": [500, 502, 503, 504],
            "idempotency_key": False, "idempotent": False, "per_try": 0.0, "hedge": None,
            "on": ["connect", "refused_stream", "reset", "timeout", "protocol", "identity", "status"],
            **retry,
        },
        "deadline": 15.0,
        "stream_idle": 60.0,
    }  # fmt: skip
    return {
        "name": name, "hosts": [name], "protocol": "http", "identity": "", "is_guard": False, "routes": [route],
        "budget": {"ratio": 1.0, "per_second": 1000.0, "window": 10.0},
        "balance": {
            "policy": policy, "decay": 10.0, "start": 0.03, "penalty": 5.0, "panic": 0.5, "weights": "discover",
            "orca": {"blackout": 10.0, "expiry": 180.0, "error_penalty": 1.0},
            "slow_start": 0.0, "slow_start_least": 0.1,
            "hash": {"on": [{"kind": "header", "name": "x-key"}], "bound": 0.0, "ring": 1024, "table": 65537},
            "sticky": {"kind": "none", "name": ""},
            "locality": {"policy": "off", "order": [], "overprovisioning": 1.4, "least_endpoints": 6},
            **balance,
        },
        "admit": {
            "in_flight": 100_000, "pending": 0, "connect": 1.0, "adaptive": None,
            "throttle": {"ratio": 0.0, "window": 30.0}, "rate": [],
            "breaker": {
                "failures": 1_000_000, "success_rate": 0.0, "window": 10.0, "minimum_calls": 1_000_000, "open_min": 1.0,
                "open_max": 60.0, "max_ejected": 0.5, "slow": 0.0, "slow_rate": 0.5,
                **breaker,
            },
        },
    }  # fmt: skip
