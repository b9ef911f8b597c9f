"""What is there before anything happens? A service of so many endpoints, its callers, and what they have to do.

Times are shares of the run, unless a scenario says otherwise. Load is half of what the endpoints can do, unless it says otherwise. The
figures that every scenario tells are made here, from what the callers saw.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from meshlib._native import core

from .plan import plan_of
from .world import INFINITE, Caller, Endpoint, World, resolve

WORKERS: Final = 2
LOAD: Final = 0.5
QUANTILES: Final = {"p50_us": 0.5, "p99_us": 0.99, "p999_us": 0.999}


@dataclass(frozen=True)
class Size:
    """How large, how long (virtual seconds), how quick. `most` bounds the usual calls: beyond it the fleet has less to do, see `load`."""

    endpoints: int = 20
    clients: int = 10
    seconds: float = 10.0
    seed: int = 1
    work: float = 0.010
    most: int = 60_000


class Stage:
    """One service of `size.endpoints` endpoints, its callers, and the world that they are in."""

    def __init__(
        self,
        config: str,
        mode: str,
        size: Size,
        *,
        load: float = LOAD,
        zones: int = 1,
        patience: float = 100.0,
        per_try: float = INFINITE,
        timeout: float | None = None,
        least_seconds: float = 0.0,
        work: float | None = None,
        changes: dict[str, Any] | None = None,
    ) -> None:
        """`patience` is how many mean works a call may wait in an endpoint's queue before it is refused. `work` in place of the size's."""
        self.config, self.mode, self.size = config, mode, size
        self.work = work = work or size.work
        self.seconds = max(size.seconds, least_seconds)
        self.world = World(size.seed, work)
        self.per_try, self.timeout = per_try, timeout
        if per_try < INFINITE:
            changes = {**(changes or {}), "route": {"retry": {"per_try": per_try}}}
        self.changes = changes or {}
        names = [f"zone-{n}" for n in range(zones)] if zones > 1 else [""]
        self.patience = patience * work
        self.endpoints = [self.endpoint(n, names[n % zones]) for n in range(size.endpoints)]
        self.capacity = size.endpoints * WORKERS / work
        self.world.rate = min(load * self.capacity, size.most / self.seconds)
        self.load = self.world.rate / self.capacity
        plans = {zone: plan_of(config, mode, self.changes, zone) for zone in names}
        self.version = 1
        self.world.add(self.endpoints)
        for n in range(size.clients):
            self.world.callers.append(self.caller(n, plans[names[n % zones]], self.endpoints))
        if zones > 1:
            self._resolve_callers(names)

    def endpoint(self, n: int, zone: str = "") -> Endpoint:
        return Endpoint(f"10.{n >> 16}.{(n >> 8) & 255}.{n & 255}:8443", WORKERS, self.patience, zone)

    def caller(self, n: int, plan: bytes, endpoints: Sequence[Endpoint]) -> Caller:
        engine = core.Engine((self.size.seed << 16) + n)
        engine.publish(plan, 0.0)
        made = Caller(n, engine, self.timeout, self.per_try, is_naive=self.mode == "naive")
        resolve(made, 1, endpoints, 0.0)
        tend = getattr(engine, "tend", None)
        if tend is not None:
            self.world.each(1.0, lambda: tend(self.world.now), begin=n / (self.size.clients + 1))
        return made

    def _resolve_callers(self, zones: list[str]) -> None:
        # Whoever keeps its zone must know how many others there are.
        count = len(self.world.callers)
        own = [Endpoint(f"10.255.0.{n}:8443", 1, zone=zones[n % len(zones)]) for n in range(min(count, 255))]
        for caller in self.world.callers:
            resolve(caller, 1, own, 0.0, service="me")

    def resolve(self, endpoints: Sequence[Endpoint]) -> None:
        """Discovery tells all callers at once."""
        self.version += 1
        self.world.add(endpoints)
        for caller in self.world.callers:
            resolve(caller, self.version, endpoints, self.world.now)

    def at(self, share: float, act: Callable[[], object]) -> float:
        when = share * self.seconds
        self.world.at(when, act)
        return when

    def run(self) -> None:
        self.world.run(self.seconds)

    # --- what came of it

    def failed(self, begin: float = 0.0, end: float = INFINITE, *, idempotent_only: bool = False) -> float:
        """Of a million calls begun in this time so many failed."""
        journal = self.world.journal
        found = [word for begun, word in zip(journal.begun, journal.failed, strict=True) if begin <= begun < end]
        return 1e6 * sum(word == 1 if idempotent_only else word > 0 for word in found) / max(1, len(found))

    def quantile(self, share: float, begin: float = 0.0, end: float = INFINITE) -> float:
        """Seconds that calls took, also those that failed: a caller waited for them."""
        journal = self.world.journal
        took = sorted(took for begun, took in zip(journal.begun, journal.took, strict=True) if begin <= begun < end)
        return took[min(len(took) - 1, int(share * len(took)))] if took else 0.0

    def goodput(self, begin: float, end: float) -> float:
        """Calls a second that were answered well in this time."""
        journal = self.world.journal
        ends = zip(journal.begun, journal.took, journal.failed, strict=True)
        return sum(not word and begin <= begun + took < end for begun, took, word in ends) / (end - begin)

    def figures(self) -> dict[str, float]:
        """What every scenario tells."""
        journal = self.world.journal
        took = sorted(journal.took)
        quantile = {name: took[min(len(took) - 1, int(share * len(took)))] for name, share in QUANTILES.items()} if took else {}
        return {
            **{name: 1e6 * value for name, value in quantile.items()},
            **evenness([each.taken for each in self.endpoints]),
            "attempts": journal.attempts / max(1, len(journal.begun)),
            "failed_ppm": self.failed(),
            "failed_idempotent_ppm": self.failed(idempotent_only=True),
            "load": self.load,
            "sight": self.world.rate / len(self.world.callers) / len(self.endpoints),
            "calls": float(len(journal.begun)),
        }


def evenness(counts: Sequence[int]) -> dict[str, float]:
    """The most that one endpoint got as a multiple of the mean, and the coefficient of variation."""
    mean = statistics.fmean(counts) or 1.0
    return {"spread": max(counts) / mean, "cv": statistics.pstdev(counts) / mean}
