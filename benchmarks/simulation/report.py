"""How do the balancers do, side by side, and did what must hold hold?

One table for each fleet: a line for each scenario and balancer, with what a caller saw (virtual milliseconds), how even the load was, how
many attempts a call took, and the goals: `met`, `missed` or `told`, where nothing is promised. What they are is listed below in words, with the
smallest and the largest figure of the balancers that they are said of.
"""

from __future__ import annotations

from ..harness import Results
from ..table import _print
from .catalogue import SCENARIOS

COLUMNS = ["case", "mode", "p50 ms", "p99 ms", "p99.9 ms", "max/mean", "cv", "attempts", "failed %", "load", "goal"]


def show(results: Results) -> None:
    lines: list[list[str]] = []
    for case, mode in results.values:
        figures = _figures(results, case, mode)
        lines.append([case, mode, *(_line(case, mode, figures) if figures else _nothing(results, case, mode))])
    if lines:
        _print(results.script, COLUMNS, lines)
        _print("what must hold", ["case", "goal", "figure", "wanted", "measured"], _goals(results))
    for title, found in (("skipped", results.skipped), ("FAILED", results.broken)):
        for why in dict.fromkeys(found.values()):
            keys = [f"{case} {mode}" for (case, mode), other in found.items() if other == why]
            print(f"{title}: {', '.join(keys)}: {why}")


def _figures(results: Results, case: str, mode: str) -> dict[str, float]:
    metrics = results.values.get((case, mode), {})
    return {metric: found for metric in metrics if (found := results.median(case, mode, metric)) is not None}


def _line(case: str, mode: str, figures: dict[str, float]) -> list[str]:
    times = [f"{figures[name] / 1000:,.1f}" for name in ("p50_us", "p99_us", "p999_us")]
    ratios = [f"{figures[name]:.2f}" for name in ("spread", "cv", "attempts")]
    checks = SCENARIOS[scenario_of(case)].checks_of(mode)
    missed = [check.words for check in checks if check.is_promised(figures) and not check.is_met(figures)]
    said = f"missed: {'; '.join(missed)}" if missed else "met" if "met" in figures else "told"
    return [*times, *ratios, f"{figures['failed_ppm'] / 1e4:.2f}", f"{100 * figures['load']:.0f} %", said]


def _nothing(results: Results, case: str, mode: str) -> list[str]:
    return ["absent" if (case, mode) in results.skipped else "failed", *[""] * 8]


def _goals(results: Results) -> list[list[str]]:
    """Each check of each case, with what the balancers had that it is said of."""
    lines = []
    for case in dict.fromkeys(case for case, _ in results.values):
        for check in SCENARIOS[scenario_of(case)].checks:
            every = [figures for mode in check.modes if (figures := _figures(results, case, mode))]
            if every:
                bounds = _range([check.bound(figures) for figures in every])
                wanted = f"{check.relation} {bounds}" if any(check.is_promised(figures) for figures in every) else "told"
                lines.append([case, check.words, check.metric, wanted, _range([figures[check.metric] for figures in every])])
    return lines


def _range(figures: list[float]) -> str:
    low, high = (f"{figure:,.4g}" if figure < 1000 else f"{figure:,.0f}" for figure in (min(figures), max(figures)))
    return low if low == high else f"{low} … {high}"


def scenario_of(case: str) -> str:
    return case.partition("/")[0]
