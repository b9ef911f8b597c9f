"""How did it go, in numbers, over any stretch of time?

`Calls` keeps every call that a load reported: with a few thousand of them, exact percentiles are a sort away, and
nothing has to be estimated. `Meter` reads the Prometheus text of one process and knows what changed between two
looks; a process that was started again counts from zero, so what it had counted before is kept. Percentiles of edges
come from histograms, so they are as fine as the buckets; those of the loads are exact.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

Labels = frozenset[tuple[str, str]]
LINE = re.compile(r"^([a-zA-Z_:][\w:]*)(?:\{(.*)\})? (\S+)")
LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')
SLOW = 0.2


@dataclass(frozen=True, slots=True)
class Summary:
    calls: int
    failed: int
    slow: int
    p50: float
    p99: float
    per_second: float

    @property
    def success(self) -> float:
        return 1 - self.failed / self.calls if self.calls else 1.0


class Calls:
    """All calls of one side: (begun, took, is_good, purchase), in monotonic seconds; the purchase is "" for a look."""

    def __init__(self) -> None:
        self.all: list[tuple[float, float, bool, str]] = []
        self.errors: list[tuple[float, str]] = []  # when the call began, and what the customer saw
        self.retries = 0
        self.breakers: dict[str, str] = {}

    def take(self, report: dict[str, Any]) -> None:
        """A line that the load printed."""
        self.all += [(begun, took, is_good, purchase) for begun, took, is_good, purchase in report["calls"]]
        self.errors += [(begun, error) for begun, error in report["errors"]]
        self.retries, self.breakers = report["retries"], report["breakers"]

    def bought(self) -> set[str]:
        """The purchases that the customers were told had worked."""
        return {purchase for _, _, is_good, purchase in self.all if is_good and purchase}

    def open_breakers(self) -> int:
        return sum(state != "closed" for state in self.breakers.values())

    def summary(self, since: float = 0.0, until: float = float("inf")) -> Summary:
        """What began in this stretch of time."""
        chosen = [call for call in self.all if since <= call[0] < until]
        took = sorted(call[1] for call in chosen)
        span = max(call[0] for call in chosen) - min(call[0] for call in chosen) if len(chosen) > 1 else 0.0
        return Summary(
            calls=len(chosen),
            failed=sum(not call[2] for call in chosen),
            slow=sum(seconds > SLOW for seconds in took),
            p50=quantile(took, 0.50),
            p99=quantile(took, 0.99),
            per_second=len(chosen) / span if span else 0.0,
        )


def quantile(ordered: Sequence[float], share: float) -> float:
    """The nearest-rank quantile of an ordered list; 0.0 of an empty one."""
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0


def quantile_of_buckets(bounds: Sequence[float], counts: Sequence[float], share: float) -> float:
    """A quantile of a histogram: straight lines within a bucket; the last one is open and answers its lower bound."""
    wanted, below = share * sum(counts), 0.0
    for place, count in enumerate(counts):
        if count and below + count >= wanted:
            low = bounds[place - 1] if place else 0.0
            high = bounds[place] if place < len(bounds) else low
            return low + (high - low) * (wanted - below) / count
        below += count
    return 0.0


def parse(text: str) -> dict[tuple[str, Labels], float]:
    """Prometheus text as (name, labels) → value."""
    found = {}
    for line in text.splitlines():
        if match := LINE.match(line):
            labels = frozenset(LABEL.findall(match[2] or ""))
            found[match[1], labels] = float(match[3])
    return found


class Meter:
    """One process's metrics over all its lives, with what they were a few seconds ago."""

    def __init__(self) -> None:
        self.past: dict[tuple[str, Labels], float] = {}  # what lives before this one had counted
        self.now: dict[tuple[str, Labels], float] = {}
        self.history: list[tuple[float, dict[tuple[str, Labels], float]]] = []

    def look(self, text: str, now: float) -> None:
        self.now = parse(text)
        self.history = [*self.history[-10:], (now, self.total())]

    def began_anew(self) -> None:
        """The process was started again: its counters begin at zero."""
        self.past, self.now = self.total(), {}

    def total(self) -> dict[tuple[str, Labels], float]:
        return {key: self.past.get(key, 0.0) + self.now.get(key, 0.0) for key in self.past.keys() | self.now.keys()}


def chosen(values: dict[tuple[str, Labels], float], name: str, **labels: str) -> Iterable[tuple[dict[str, str], float]]:
    """All values of a metric that carry these labels."""
    wanted = set(labels.items())
    return [(dict(found), value) for (metric, found), value in values.items() if metric == name and wanted <= found]
