"""How is a number made that can be compared with another?

A `Run` is one mode in one case. All runs are measured in each of several rounds: the cases in random order, and within a case
its modes in random order, one right after the other, each in a fresh process. So a machine that slows down for a minute slows down
all modes of a case alike. What is told is the median of the rounds, its spread, and the median of the *rounds' own* ratios to the mesh.

It does not repeat until a number looks stable, and it throws none away.
"""

from __future__ import annotations

import json
import operator
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final

from .machine import cpu_of, cpu_of_all, cpu_stolen
from .peers import ROOT, Absent, Broken

UNITS: Final = {
    "rps": "1/s",
    "cpu_us": "us",
    "p50_us": "us",
    "p99_us": "us",
    "ms": "ms",
    "ns": "ns",
    "rss_mb": "MB",
    "bytes": "B",
}
HIGHER_IS_BETTER: Final = {"rps"}
# Seconds that a worker may take on top of the time that it measures: imports, connections, warming up.
PATIENCE: Final = 60.0

# A case and a mode.
Key = tuple[str, str]


@dataclass(frozen=True)
class Run:
    """One mode in one case. `measure(seconds)` gives {metric: value}, or raises Absent or Broken."""

    case: str
    mode: str
    measure: Callable[[float], dict[str, float]]


@dataclass(frozen=True)
class Comparison:
    """One line of the summary: a ratio between two modes, maybe of different cases, and what it should be."""

    label: str
    ratio: float
    wanted: str


@dataclass
class Results:
    """What one script has measured. `primary` is the metric by which its modes are compared."""

    script: str
    primary: str
    values: dict[Key, dict[str, list[float | None]]] = field(default_factory=dict)
    skipped: dict[Key, str] = field(default_factory=dict)
    broken: dict[Key, str] = field(default_factory=dict)
    # Cores that other programs, and other guests of the host, had on average while this was measured.
    elsewhere: float = 0.0
    stolen: float = 0.0
    _failures: dict[Key, int] = field(default_factory=dict, repr=False)

    def measure(self, runs: list[Run], rounds: int, seconds: float, order: random.Random) -> None:
        by_case: dict[str, list[Run]] = {}
        for run in runs:
            by_case.setdefault(run.case, []).append(run)
            self.values[run.case, run.mode] = {}
        progress = Progress(self.script, rounds * len(runs))
        begun, before, stolen = time.monotonic(), _of_others(), cpu_stolen()
        for number in range(rounds):
            for case in order.sample(list(by_case), len(by_case)):
                for run in order.sample(by_case[case], len(by_case[case])):
                    progress.step(f"{run.case} {run.mode}")
                    self._take(run, number, seconds)
        progress.end()
        wall = time.monotonic() - begun
        self.elsewhere = max(0.0, _of_others() - before) / wall
        self.stolen = (cpu_stolen() - stolen) / wall

    def _take(self, run: Run, number: int, seconds: float) -> None:
        key = run.case, run.mode
        if key in self.skipped or self._failures.get(key, 0) > 1:
            return
        try:
            found = run.measure(seconds)
        except Absent as reason:
            self.skipped[key] = str(reason)
            return
        except Broken as error:
            # Once more in the next round, and then it is given up: it may hang for a minute each time.
            self.broken[key] = str(error)
            self._failures[key] = self._failures.get(key, 0) + 1
            return
        for metric, value in found.items():
            taken = self.values[key].setdefault(metric, [])
            taken += [None] * (number - len(taken)) + [value]

    def of(self, case: str, mode: str, metric: str) -> list[float]:
        return [value for value in self.values.get((case, mode), {}).get(metric, []) if value is not None]

    def median(self, case: str, mode: str, metric: str) -> float | None:
        values = self.of(case, mode, metric)
        return statistics.median(values) if values else None

    def spread(self, case: str, mode: str, metric: str) -> float:
        """Half of what lies between the lowest and the highest round, as a share of the median."""
        values = self.of(case, mode, metric)
        middle = statistics.median(values) if values else 0.0
        return (max(values) - min(values)) / 2 / middle if middle else 0.0

    def ratio(self, one: Key, other: Key, metric: str) -> float | None:
        """The median over the rounds of `one` divided by `other`; None without a round that has both."""
        return self._of_rounds(one, other, metric, operator.truediv)

    def difference(self, one: Key, other: Key, metric: str) -> float | None:
        """The median over the rounds of `one` less `other`."""
        return self._of_rounds(one, other, metric, operator.sub)

    def _of_rounds(self, one: Key, other: Key, metric: str, judge: Callable[[float, float], float]) -> float | None:
        pairs = zip(self.values.get(one, {}).get(metric, []), self.values.get(other, {}).get(metric, []), strict=False)
        found = [judge(a, b) for a, b in pairs if a is not None and b]
        return statistics.median(found) if found else None

    def rows(self) -> Iterable[dict[str, Any]]:
        for (case, mode), metrics in self.values.items():
            for metric in metrics:
                value = self.median(case, mode, metric)
                if value is not None:
                    yield {
                        "script": self.script,
                        "case": case,
                        "mode": mode,
                        "metric": metric,
                        "value": round(value, 3),
                        "unit": UNITS[metric],
                    }


def _of_others() -> float:
    return cpu_of_all() - cpu_of(os.getpid(), with_ended=True)


def write_json(file: Path, everything: list[Results]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for results in everything for row in results.rows()))


def in_process(work: str, **job: Any) -> Callable[[float], dict[str, float]]:
    """A measurement by `work` ("module:function", called with the job) in a process of its own."""
    return partial(_in_process, work, job)


def _in_process(work: str, job: dict[str, Any], seconds: float) -> dict[str, float]:
    # What needs a peer is a function: the peer is started when the first run asks for it.
    made = {name: value() if callable(value) else value for name, value in job.items()}
    try:
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.worker"],
            input=json.dumps({"work": work, "job": {**made, "seconds": seconds}}),
            cwd=ROOT,
            text=True,
            capture_output=True,
            timeout=PATIENCE + 10 * seconds,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise Broken(f"no result within {error.timeout:.0f} s") from None
    said = done.stderr.strip().splitlines() or ["no word"]
    if done.returncode:
        raise Broken(f"exit code {done.returncode}: {said[-1]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    if "absent" in result:
        raise Absent(result["absent"])
    return result


class Progress:
    """Where we are, on stderr: one line that changes in a terminal, a line every ten seconds elsewhere."""

    def __init__(self, script: str, total: int) -> None:
        self._script = script
        self._total = total
        self._done = 0
        self._begun = self._told = time.monotonic()
        self._is_terminal = sys.stderr.isatty()

    def step(self, what: str) -> None:
        now = time.monotonic()
        if self._is_terminal or now - self._told > 10:
            left = (now - self._begun) / self._done * (self._total - self._done) if self._done else 0
            line = f"{self._script} {self._done + 1}/{self._total} {what}" + (f", about {left:.0f} s left" if self._done else "")
            sys.stderr.write(f"\r\x1b[K{line}" if self._is_terminal else f"{line}\n")
            sys.stderr.flush()
            self._told = now
        self._done += 1

    def end(self) -> None:
        if self._is_terminal:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()
