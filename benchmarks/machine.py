"""What does the machine itself say: which it is, what a process has used, and how much went to somebody else? And who runs where?

From /proc, so on Linux; elsewhere the figures are 0, the table says nothing of them, and nothing is pinned. With one call in flight
client and server take turns, and it is the scheduler's whim whether they do so on one core or wake each other across two, which in a
virtual machine takes twice the time: `on_one_core` takes the whim away. With many calls in flight nothing is pinned: a client
with a thread of its own would lose what makes it fast.
"""

from __future__ import annotations

import contextlib
import os
import platform
import time
from collections.abc import Iterator
from pathlib import Path

PROC = Path("/proc")


def processor() -> str:
    try:
        lines = (PROC / "cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def cpu_of(pid: int, *, with_ended: bool = False) -> float:
    """CPU seconds of a process and of all that it started and that lives; with `with_ended` also of those that it has waited for."""
    tick = os.sysconf("SC_CLK_TCK")
    seen: dict[int, tuple[int, float]] = {}
    for entry in PROC.iterdir() if PROC.exists() else ():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                used = fields[11:15] if with_ended else fields[11:13]
                seen[int(entry.name)] = int(fields[1]), sum(map(int, used)) / tick
    family = _family(pid, {child: parent for child, (parent, _) in seen.items()})
    return sum(seen[member][1] for member in family if member in seen)


def clock_of(pid: int) -> float:
    """CPU seconds of one process, all its threads, to the nanosecond: for slices of time in which the ticks of `cpu_of` are too coarse. Linux only."""
    # As the C library's clock_getcpuclockid makes it.
    return time.clock_gettime((~pid << 3) | 2)


def _family(pid: int, parents: dict[int, int]) -> set[int]:
    """A process and all that it started, and that they started."""
    family, more = {pid}, {pid}
    while more:
        more = {child for child, parent in parents.items() if parent in family} - family
        family |= more
    return family


def cores() -> list[int]:
    """Those that this process may use; none where that can't be said."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []


@contextlib.contextmanager
def on_one_core() -> Iterator[None]:
    """This process and all that it has started, or starts meanwhile, share a core."""
    all_of_them = cores()
    if len(all_of_them) < 2:
        yield
        return
    # The first one has most of the machine's interrupts.
    pin(os.getpid(), {all_of_them[-1]})
    try:
        yield
    finally:
        pin(os.getpid(), set(all_of_them))


def pin(pid: int, to: set[int]) -> None:
    """A process and all that it has started, with all their threads."""
    parents: dict[int, int] = {}
    for entry in PROC.iterdir() if PROC.exists() else ():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
    for member in _family(pid, parents):
        with contextlib.suppress(OSError):
            for thread in (PROC / str(member) / "task").iterdir():
                with contextlib.suppress(OSError):
                    os.sched_setaffinity(int(thread.name), to)


def cpu_of_all() -> float:
    """CPU seconds that the machine has worked, for whomever."""
    try:
        fields = (PROC / "stat").read_text().split("\n", 1)[0].split()[1:]
    except OSError:
        return 0.0
    user, nice, system, _, _, irq, softirq, *_ = map(int, fields)
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


def cpu_stolen() -> float:
    """CPU seconds that the machine wanted and its host gave to others."""
    with contextlib.suppress(OSError, IndexError):
        return int((PROC / "stat").read_text().split("\n", 1)[0].split()[8]) / os.sysconf("SC_CLK_TCK")
    return 0.0
