"""How is a number written so that Prometheus reads it?

A family at a time: its head with type, unit and help, then its samples. The format is Prometheus' 0.0.4, or OpenMetrics 1.0, which
differ in little. Which numbers there are, and what they mean, is not known here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from .names import BOUNDS, Metric

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
OPENMETRICS_TYPE = "application/openmetrics-text; version=1.0.0; charset=utf-8"
OPENMETRICS_END = "# EOF\n"

Labels = tuple[str, ...]
Histogram = tuple[Sequence[int], float]  # counts per bucket (not cumulative, the last one for the rest), sum in seconds


class Text:
    """The text as it grows, a family at a time."""

    def __init__(self, is_openmetrics: bool) -> None:
        self._is_openmetrics = is_openmetrics
        self._lines: list[str] = []

    def add(self, metric: Metric, samples: Iterable[tuple[Labels, float]]) -> None:
        """A counter or gauge; without samples it has no line at all."""
        heads = [(metric.name + _labels(metric.labels, values), value) for values, value in samples]
        if heads:
            self._head(metric)
            self._lines += [f"{head} {_number(value)}" for head, value in heads]

    def add_histograms(self, metric: Metric, histograms: Mapping[Labels, Histogram]) -> None:
        if histograms:
            self._head(metric)
        for values, (counts, total) in histograms.items():
            inner = _labels(metric.labels, values)[1:-1]
            front = f"{metric.name}_bucket{{{inner}{',' if inner else ''}le="
            count = 0
            for bound, more in zip((*map(_number, BOUNDS), "+Inf"), counts, strict=True):
                count += more
                self._lines.append(f'{front}"{bound}"}} {count}')
            closed = f"{{{inner}}}" if inner else ""
            self._lines.append(f"{metric.name}_sum{closed} {_number(total)}")
            self._lines.append(f"{metric.name}_count{closed} {count}")

    def end(self) -> str:
        return "\n".join(self._lines) + "\n" + (OPENMETRICS_END if self._is_openmetrics else "")

    def _head(self, metric: Metric) -> None:
        name = metric.name
        if self._is_openmetrics and metric.kind == "counter":
            name = name.removesuffix("_total")
        self._lines.append(f"# TYPE {name} {metric.kind}")
        if self._is_openmetrics and metric.unit:
            self._lines.append(f"# UNIT {name} {metric.unit}")
        self._lines.append(f"# HELP {name} {_help(metric.help, self._is_openmetrics)}")


_ESCAPES = str.maketrans({"\\": "\\\\", "\n": "\\n", '"': '\\"'})


def _labels(names_of: Labels, values: Labels) -> str:
    if not names_of:
        return ""
    pairs = ",".join(f'{name}="{str(value).translate(_ESCAPES)}"' for name, value in zip(names_of, values, strict=True))
    return "{" + pairs + "}"


def _help(text: str, is_openmetrics: bool) -> str:
    text = text.replace("\\", "\\\\").replace("\n", "\\n")
    return text.replace('"', '\\"') if is_openmetrics else text


def _number(value: float) -> str:
    if isinstance(value, int):
        return str(int(value))
    if math.isnan(value):
        return "NaN"
    if value in (float("inf"), float("-inf")):
        return "+Inf" if value > 0 else "-Inf"
    return repr(value)
