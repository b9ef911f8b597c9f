"""What does the machine itself say: which it is, what a process has used, and how much went to somebody else?

From /proc, so on Linux; elsewhere the figures are 0 and the table says nothing of them. It does not pin anything to a core: a client
with a thread of its own would lose what makes it fast.
"""

from __future__ import annotations

import contextlib
import os
import platform
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
    family, more = {pid}, {pid}
    while more:
        more = {child for child, (parent, _) in seen.items() if parent in family} - family
        family |= more
    return sum(seen[member][1] for member in family if member in seen)


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
