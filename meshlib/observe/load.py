"""How loaded is this process, in the words in which a caller's balancer asks?

ORCA (Open Request Cost Aggregation, xds.data.orca.v3): a caller that weighs endpoints by their load sends `endpoint-load-metrics-format`,
and the answer carries `endpoint-load-metrics`. Envoy's and gRPC's rule for it is `weight = rps / (utilization + eps / rps)` (gRFC A58), so
what counts is that a number grows with the work and reaches 1 where no more fits. Where each number comes from:

- `cpu_utilization`: CPU seconds of this process (all its threads) per second, of the CPUs that it may use: those of its affinity, or of
  the quota of its cgroups (v2, `cpu.max`, also of those above) if that is less.
- `mem_utilization`: its resident memory, as a share of the least `memory.max` of its cgroups, or of the machine's memory.
- `rps_fractional`, `eps`: calls that ended and answers of 5xx per second, as the gate counts them; refusals are no calls.
- `application_utilization`: how full the fullest of these is: the interpreter (CPU seconds per second, of the one CPU that a GIL lets run,
  or of all without one), the places for calls (those in flight beside the one that is answered, of the limit, averaged over about a
  second), the event loop (100 ms late is full, and what a timer is late by nature doesn't count), a queue in which somebody waits (full).
  It may be above 1. It has no floor: a part that is there without work would give the most calls to whoever has the most already.
- `named_metrics`: `loop_lag_ms` (how late the loop's timers are, averaged over about a second), `threads_waiting` (calls that wait for
  one of anyio's threads, where Starlette runs plain functions, and whatever `watch_queue` was given), `in_flight`.

Rates are of the last 5 to 6 seconds; who asks more seldom gets those since the last question. In the first second, and after 30 s without
a question, there are none. A number that can't be had is left out, and a report that can't be made is empty: nothing of this is worth a
call. Numbers are of a process: each worker speaks for itself, as the connection to it does.
"""

from __future__ import annotations

import json
import logging
import math
import os
import resource
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, NamedTuple, Protocol

logger = logging.getLogger("meshlib.observe")

# Seconds that a report stands before there is another.
FRESH: Final = 0.1
# Seconds over which rates are taken, how far apart the readings for them are, and after how many there is nothing to compare with.
WINDOW: Final = 5.0
STEP: Final = 1.0
STALE: Final = 30.0
# The loop's timer: how often, how long after the last question, over how many seconds the lag is averaged, and which one is full.
TICK: Final = 0.1
REST: Final = 10.0
MEMORY: Final = 1.0
FULL_LAG: Final = 0.1
# epoll counts milliseconds, and other handlers run first: a loop with nothing to do is late by this much too.
USUAL_LAG: Final = 0.005
# Above it, no number of ours is worth anything. The other side may add such numbers up.
MOST: Final = 1e9
# Seconds after which the limits of the cgroup are read again: some systems change them under a running process.
LOOK: Final = 30.0


class Gate(Protocol):
    """What the meter asks of `core.Gate`."""

    def load(self) -> dict[str, Any]: ...


class Machine:
    """What the process may use, and what it uses. `root` is where /proc and /sys are."""

    __slots__ = ("_cgroups", "_meminfo", "_rss")

    def __init__(self, root: str | os.PathLike[str] = "/") -> None:
        base = Path(root)
        self._rss = base / "proc/self/statm"
        self._meminfo = base / "proc/meminfo"
        self._cgroups = _cgroups(base)

    def cpu_seconds(self) -> float:
        return time.process_time()

    def cpus(self) -> float:
        count = float(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
        for group in self._cgroups:
            quota, _, period = _text(group / "cpu.max").partition(" ")
            if quota.isdigit() and period.strip().isdigit() and int(quota) and int(period):
                count = min(count, int(quota) / int(period))
        return count

    def memory_limit(self) -> int:
        """In bytes; 0 where it can't be had."""
        limits = [int(text) for group in self._cgroups if (text := _text(group / "memory.max").strip()).isdigit()]
        for line in _text(self._meminfo).splitlines():
            name, _, size = line.partition(":")
            if name == "MemTotal":
                limits.append(int(size.split()[0]) * 1024)
        return min(limits, default=0)

    def memory(self) -> int:
        """Resident bytes; 0 where they can't be had."""
        fields = _text(self._rss).split()
        return int(fields[1]) * resource.getpagesize() if len(fields) > 1 else 0


class Reading(NamedTuple):
    """The counters, as they stood at a time."""

    at: float
    cpu: float
    calls: int
    errors: int


class LoadMeter:
    """The load of this process. Safe to ask from any thread and event loop; after a fork it begins anew."""

    def __init__(self, gate: Gate, clock: Callable[[], float] = time.monotonic, machine: Machine | None = None) -> None:
        self._gate = gate
        self._clock = clock
        self._machine = Machine() if machine is None else machine
        self._queues: dict[str, Callable[[], int]] = {}
        self._begin()

    def _begin(self) -> None:
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._loops: weakref.WeakKeyDictionary[Any, LoopLag] = weakref.WeakKeyDictionary()
        self._at = -math.inf
        self._told: dict[str, bytes] = {}
        self._is_failing = False
        self._busy = 0.0
        self._looked = -math.inf
        self._cpus, self._memory_limit = 1.0, 0
        self._readings: deque[Reading] = deque()
        self._read(self._clock(), self._gate.load())

    def watch_queue(self, name: str, waiting: Callable[[], int]) -> None:
        """Count what waits in a queue of yours, such as that of a thread pool; `name` tells it from others, and replaces an older one."""
        self._queues[name] = waiting

    def report(self, format: str) -> bytes:
        """The value of `endpoint-load-metrics`, in the format "text" or "json"; b"" for another one, or if it can't be had."""
        if self._pid != os.getpid():
            self._begin()
        lag = self._loop_lag()
        # Somebody else measures at this moment: what there is will do.
        if self._clock() - self._at >= FRESH and self._lock.acquire(blocking=False):
            try:
                self._measure(self._clock(), lag)
                self._is_failing = False
            except Exception:
                self._told = {}
                if not self._is_failing:
                    self._is_failing = True
                    logger.warning("the load of this process could not be measured; answers go out without it", exc_info=True)
            finally:
                self._lock.release()
        return self._told.get(format.lower(), b"")

    def _measure(self, now: float, lag: float | None) -> None:
        passed = now - self._at
        # First, so that what fails is not tried by every call.
        self._at = now
        load = self._gate.load()
        last = self._read(now, load)
        if now - self._looked >= LOOK:
            self._looked = now
            self._cpus, self._memory_limit = self._machine.cpus(), self._machine.memory_limit()
        waiting = _threads_waiting() + sum(max(0, int(queue())) for queue in self._queues.values())
        taken = max(0, load["in_flight"] - 1) / load["limit"] if load["limit"] else 0.0
        self._busy += (taken - self._busy) * (1 - math.exp(-passed / MEMORY))
        utilization = [self._busy]
        if load["waiting"] or waiting:
            utilization.append(1.0 + (load["waiting"] / load["limit"] if load["limit"] else 0.0))
        numbers: dict[str, float] = {}
        first = self._readings[0]
        if (span := now - first.at) >= STEP:
            used = max(0.0, last.cpu - first.cpu) / span
            numbers["cpu_utilization"] = used / self._cpus
            numbers["rps_fractional"] = max(0, last.calls - first.calls) / span
            numbers["eps"] = max(0, last.errors - first.errors) / span
            utilization.append(used / (min(1.0, self._cpus) if _has_gil() else self._cpus))
        if self._memory_limit and (memory := self._machine.memory()):
            numbers["mem_utilization"] = min(1.0, memory / self._memory_limit)
        named = {"in_flight": float(load["in_flight"]), "threads_waiting": float(waiting)}
        if lag is not None:
            named["loop_lag_ms"] = lag * 1000
            utilization.append((lag - USUAL_LAG) / (FULL_LAG - USUAL_LAG))
        numbers["application_utilization"] = max(utilization)
        self._told = _told(numbers, named)

    def _read(self, now: float, load: dict[str, Any]) -> Reading:
        """Read the counters, and keep what the next rates are taken from: the first reading is that of WINDOW ago, or a little more."""
        last = Reading(now, self._machine.cpu_seconds(), load["calls"], load["errors"])
        readings = self._readings
        if readings and now - readings[-1].at > STALE:
            readings.clear()
        if not readings or now - readings[-1].at >= STEP:
            readings.append(last)
        while len(readings) > 1 and now - readings[1].at >= WINDOW:
            readings.popleft()
        return last

    def _loop_lag(self) -> float | None:
        """Of the running loop, in seconds; None where none runs. Its timer begins with the first question."""
        asyncio = sys.modules.get("asyncio")
        try:
            loop = asyncio.get_running_loop() if asyncio is not None else None
        except RuntimeError:
            loop = None
        if loop is None:
            return None
        lag = self._loops.get(loop)
        if lag is None:
            lag = self._loops[loop] = LoopLag(loop)
        return lag.ask()


class LoopLag:
    """How late one event loop is with its timers: what a call waits before anybody looks at it. Belongs to the loop's thread."""

    __slots__ = ("__weakref__", "_asked", "_due", "_is_ticking", "_lag", "_loop")

    def __init__(self, loop: Any) -> None:
        # No strong reference from here, also not by a timer's handle: the meter keeps us by our loop, which would then never go.
        self._loop = weakref.ref(loop)
        self._lag = 0.0
        self._due = self._asked = 0.0
        self._is_ticking = False

    def ask(self) -> float:
        loop = self._loop()
        if loop is None:
            return 0.0
        self._asked = loop.time()
        if not self._is_ticking:
            self._lag = 0.0
            self._rise(loop)
        return self._lag

    def _rise(self, loop: Any) -> None:
        self._due = loop.time() + TICK
        self._is_ticking = True
        loop.call_at(self._due, self._tick)

    def _tick(self) -> None:
        loop = self._loop()
        self._is_ticking = False
        if loop is None:
            return
        late = max(0.0, loop.time() - self._due)
        # A tick that comes late speaks for the whole time until it came.
        self._lag += (late - self._lag) * (1 - math.exp(-(TICK + late) / MEMORY))
        if loop.time() - self._asked < REST:
            self._rise(loop)


def _told(numbers: dict[str, float], named: dict[str, float]) -> dict[str, bytes]:
    """A report in both formats. Envoy parts name and number in TEXT by a colon, and refuses a report with a name that it doesn't know."""
    known = {name: _sound(value) for name, value in numbers.items()}
    others = {name: _sound(value) for name, value in named.items()}
    pairs = [*known.items(), *((f"named_metrics.{name}", value) for name, value in others.items())]
    text = ", ".join(f"{name}:{value:g}" for name, value in pairs)
    whole = json.dumps({**known, "named_metrics": others}, separators=(",", ":"), allow_nan=False)
    return {"text": b"TEXT " + text.encode(), "json": b"JSON " + whole.encode()}


def _sound(value: float) -> float:
    """A number that every reader takes: finite, not negative, and no longer than it is worth."""
    return float(f"{min(max(value, 0.0), MOST):g}") if math.isfinite(value) else 0.0


def _has_gil() -> bool:
    ask = getattr(sys, "_is_gil_enabled", None)
    return True if ask is None else bool(ask())


def _threads_waiting() -> int:
    """Calls that wait for a thread of anyio's default limiter, of the running loop."""
    anyio = sys.modules.get("anyio.to_thread")
    if anyio is None:
        return 0
    try:
        return int(anyio.current_default_thread_limiter().statistics().tasks_waiting)
    except Exception:
        return 0  # no loop of anyio's runs here


def _cgroups(root: Path) -> list[Path]:
    """The folders of our cgroup (v2) and of those above it, whose limits hold for us too; none elsewhere."""
    for line in _text(root / "proc/self/cgroup").splitlines():
        number, _, rest = line.partition(":")
        if number == "0" and rest.startswith(":/"):
            top = root / "sys/fs/cgroup"
            own = top.joinpath(*(part for part in rest[2:].split("/") if part not in ("", "..")))
            return [own, *(parent for parent in own.parents if parent == top or top in parent.parents)]
    return []


def _text(file: Path) -> str:
    try:
        return file.read_text()
    except OSError:
        return ""
