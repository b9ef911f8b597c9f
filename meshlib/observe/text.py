"""How do numbers and tables look where people read them?

Seconds in the unit that fits, a dash for what isn't known, columns under each other. Values come from records of any version, so that
whatever is no number is written as unknown and never fails. It knows nothing of calls.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Record = Mapping[str, Any]


def facts(*pairs: tuple[str, str]) -> list[str]:
    """Name and value, a line each; without a value there is no line."""
    return [f"  {name:<12}{value}" for name, value in pairs if value]


def table(rows: Sequence[tuple[str, ...]], *, right: set[int]) -> list[str]:
    """Columns as wide as their widest cell; empty columns vanish."""
    widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            cell.rjust(width) if place in right else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
            if width
        ]
        lines.append("  " + "  ".join(cells).rstrip())
    return lines


def seconds(value: Any) -> str:
    if not isinstance(value, int | float):
        return ""
    return f"{value * 1000:.0f} ms" if 0 <= value < 1 else f"{value:.4g} s"


def milliseconds(value: Any) -> str:
    if not isinstance(value, int | float):
        return "-"
    return f"{value:.1f} ms" if value < 1000 else f"{value / 1000:.1f} s"


def decimal(value: Any) -> str:
    """Short, and a whole number as one."""
    if not isinstance(value, int | float):
        return "-"
    return f"{value:.2f}".rstrip("0").rstrip(".") if abs(value) < 1e6 else f"{value:.3g}"


def plain(value: Any) -> str:
    return "-" if value is None else str(value)
