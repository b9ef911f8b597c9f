"""How is a number made that can be compared with another?

A `Run` is one mode in one case. All runs are measured in each of several rounds: the cases in random order, and within a case
its modes in random order, one right after the other, each in a fresh process. So a machine that slows down for a minute slows down
all modes of a case alike. What is told is the median of the rounds, its spread, and the median of the *rounds' own* ratios to the mesh.

It does not repeat until a number looks stable, and it throws none away.
"""

from __future__ import annotations

import contextlib
import json
import operator
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final

from .machine import cores, cpu_of, cpu_of_all, cpu_stolen, on_one_core
from .peers import ROOT, Absent, Broken

UNITS: Final = {
    "rps": "1/s",
    "cpu_us": "us",
    "p50_us": "us",
    "p99_us": "us",
    "first_us": "us",
    "ms": "ms",
    "ns": "ns",
    "rss_mb": "MB",
    "bytes": "B",
    "added_us": "us",
    "ratio": "1",
    "connections": "1",
    # Of attackers.
    "freed_s": "s",
    "grown_mb": "MB",
    "cut": "1",
    "growth": "1",
    "most_us": "us",
    # Of endpoints that change without end.
    **dict.fromkeys(("apply_ms", "stall_ms", "stall_p99_ms", "stale_ms"), "ms"),
    # Of servers: what stands beside them.
    **dict.fromkeys(("client_us", "receiver_us"), "us"),
    "spans": "1",
    "dropped": "%",
    "rss_bytes": "B",
    # Of the simulator, where times are virtual.
    "p999_us": "us",
    **dict.fromkeys(
        ("spread", "cv", "attempts", "load", "calls", "met", "sight", "slow_share", "old_share", "goodput", "ejected_by"), "1"
    ),
    **dict.fromkeys(("bottom", "bottom_limit", "above"), "1"),
    **dict.fromkeys(("p99_then_us", "p99_before_us", "p99_limit_us"), "us"),
    **dict.fromkeys(("back_s", "back_limit_s", "recovery_s"), "s"),
    **dict.fromkeys(("failed_ppm", "failed_idempotent_ppm", "failed_before_ppm", "failed_after_ppm"), "ppm"),
    **dict.fromkeys(("failed_first_second_ppm", "in_burst_failed_ppm", "end_failed_ppm"), "ppm"),
}
HIGHER_IS_BETTER: Final = {"rps"}
# Seconds that a worker may take on top of the time that it measures: imports, connections, warming up.
PATIENCE: Final = 60.0

# A case and a mode.
Key = tuple[str, str]


@dataclass(frozen=True)
class Run:
    """One mode in one case. `measure(seconds)` gives {metric: value}, or raises Absent or Broken.

    `is_serial` is said of one call at a time: client and peers take turns, and do so on one core.
    """

    case: str
    mode: str
    measure: Callable[[float], dict[str, float]]
    is_serial: bool = False


@dataclass(frozen=True)
class Comparison:
    """One line of a script's own summary: a ratio between two modes, maybe of different cases, and a word on it."""

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
            with on_one_core() if run.is_serial else contextlib.nullcontext():
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
        found = self.ratios(one, other, metric)
        return statistics.median(found) if found else None

    def difference(self, one: Key, other: Key, metric: str) -> float | None:
        """The median over the rounds of `one` less `other`."""
        found = self._of_rounds(one, other, metric, operator.sub)
        return statistics.median(found) if found else None

    def ratios(self, one: Key, other: Key, metric: str) -> list[float]:
        """`one` divided by `other`, for each round that has both."""
        return self._of_rounds(one, other, metric, operator.truediv)

    def _of_rounds(self, one: Key, other: Key, metric: str, judge: Callable[[float, float], float]) -> list[float]:
        pairs = zip(self.values.get(one, {}).get(metric, []), self.values.get(other, {}).get(metric, []), strict=False)
        return [judge(a, b) for a, b in pairs if a is not None and b]

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


def write_json(file: Path, rows: Iterable[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def in_process(work: str, **job: Any) -> Callable[[float], dict[str, float]]:
    """A measurement by `work` ("module:function", called with the job) in a process of its own."""
    return in_processes(1, work, **job)


def in_processes(number: int, work: str, **job: Any) -> Callable[[float], dict[str, float]]:
    """The same in several processes that begin together, each on a core; their figures are put together as those of one."""
    return partial(_in_processes, number, work, job)


def _in_processes(number: int, work: str, job: dict[str, Any], seconds: float) -> dict[str, float]:
    # What needs a peer is a function: the peer is started when the first run asks for it.
    made = {name: value() if callable(value) else value for name, value in job.items()}
    task = json.dumps({"work": work, "job": {**made, "seconds": seconds}}) + "\n"
    patience = PATIENCE + 10 * seconds
    is_late = threading.Event()
    with contextlib.ExitStack() as stack:
        workers = [_Worker(stack) for _ in range(number)]
        if len(cores()) >= number > 1:
            for core, worker in zip(cores(), workers, strict=False):
                os.sched_setaffinity(worker.child.pid, {core})

        def give_up() -> None:
            is_late.set()
            for worker in workers:
                worker.child.kill()

        timer = threading.Timer(patience, give_up)
        # A run that is told to stop just here must not wait for it at its end.
        timer.daemon = True
        stack.callback(timer.cancel)
        timer.start()
        for worker in workers:
            worker.tell(task)
        # All are warm before any is measured. One that needs no such moment gives its result at once.
        first = [worker.said.readline() for worker in workers]
        for worker in workers:
            worker.tell("go\n")
        found = [worker.result(begun, is_late) for worker, begun in zip(workers, first, strict=True)]
    return _together(found)


class _Worker:
    """A process of `worker.py`: one line with the job, one with "go", and what it says in between and at the end."""

    def __init__(self, stack: contextlib.ExitStack) -> None:
        self._errors = stack.enter_context(tempfile.TemporaryFile("w+", errors="replace"))
        self.child = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.worker"],
            cwd=ROOT,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
        )
        assert self.child.stdin is not None and self.child.stdout is not None
        self.said = self.child.stdout
        self._ears = self.child.stdin
        stack.callback(self._stop)

    def tell(self, line: str) -> None:
        # One that is at its end already says so by its exit code.
        with contextlib.suppress(BrokenPipeError):
            self._ears.write(line)
            self._ears.flush()

    def result(self, begun: str, is_late: threading.Event) -> dict[str, float]:
        said = (begun + self.said.read()).splitlines()
        self.child.wait()
        if is_late.is_set():
            raise Broken("no result in time")
        if self.child.returncode:
            self._errors.seek(0)
            raise Broken(f"exit code {self.child.returncode}: {(self._errors.read().strip().splitlines() or ['no word'])[-1]}")
        result: dict[str, Any] = json.loads(said[-1])
        if "absent" in result:
            raise Absent(result["absent"])
        return result

    def _stop(self) -> None:
        self.child.kill()
        self.child.wait()
        self.said.close()
        with contextlib.suppress(BrokenPipeError):
            self._ears.close()


def _together(parts: list[dict[str, float]]) -> dict[str, float]:
    """Answers per second add up, the worst p99 counts, and what is per call is weighed by the calls."""
    if len(parts) == 1:
        return parts[0]
    calls = sum(part["rps"] for part in parts)
    joined = {name: sum(part[name] * part["rps"] for part in parts) / calls for name in parts[0]}
    return {**joined, "rps": calls, "p99_us": max(part["p99_us"] for part in parts)}


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
