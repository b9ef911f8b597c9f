"""Which figures are wanted, and does a run reach them?

One table, so that nobody has to look for a number in the code of a script. A goal compares two modes, maybe of two cases: it takes the
ratio of their figures in the *same* round, and judges the median of those, since the rounds share a machine that is not equally quick
in all of them. Where the script has compared already (`added_us`), it is the figure itself. A goal without a figure to compare with is told as absent or failed, with
the reason, and never as met. What was not asked for (`--case`, `--mode`) is left out. A goal that is missed is no error of the run.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

from .harness import UNITS, Key, Results

AT_LEAST, AT_MOST = "≥", "≤"
State = Literal["met", "missed", "told", "absent", "failed"]


@dataclass(frozen=True)
class Goal:
    """`mode` in `case`, compared with `peer` (in `peer_case`, by default the same). Without `goal` it is only told.

    `is_ratio` is not said of a metric that is a comparison with the peer already.
    """

    case: str
    mode: str
    peer: str
    metric: str
    relation: str
    goal: float | None
    peer_case: str = ""
    script: str = "client"
    is_ratio: bool = True

    @property
    def ours(self) -> Key:
        return self.case, self.mode

    @property
    def theirs(self) -> Key:
        return (self.peer_case or self.case, self.peer) if self.is_ratio else self.ours

    @property
    def against(self) -> str:
        """The peer as a reader wants to see it: with its case where that is another."""
        return f"{self.peer} ({self.peer_case})" if self.peer_case else self.peer

    def is_reached_by(self, figure: float) -> bool | None:
        if self.goal is None:
            return None
        return figure >= self.goal if self.relation == AT_LEAST else figure <= self.goal


def _faster(what: str, mode: str, peer: str, wanted: Mapping[str, float], peer_what: str = "") -> list[Goal]:
    """So many times the peer's answers per second, at each number of callers."""
    return [
        Goal(f"{what}/{at}", mode, peer, "rps", AT_LEAST, least, f"{peer_what}/{at}" if peer_what else "")
        for at, least in wanted.items()
    ]


def _added(mode: str, most: float | None) -> list[Goal]:
    """CPU of a call above that of the bare wire client."""
    return [Goal(f"added/mtls/{at}", mode, "meshlib-wire", "added_us", AT_MOST, most, is_ratio=False) for at in ("c=1", "c=64")]


def _kept(what: str, most: float, callers: str, threads: str) -> list[Goal]:
    """MB that the process grew by."""
    modes = (("meshlib", callers), ("meshlib-sync", threads))
    return [
        Goal(f"{what}/{kind}/{at}", mode, "", "rss_mb", AT_MOST, most, script="memory", is_ratio=False)
        for kind in ("plain", "mtls")
        for mode, at in modes
    ]


def _grown(most: Mapping[str, float]) -> list[Goal]:
    """A call with 100,000 endpoints against one with ten."""
    return [
        Goal(f"growth/{policy}/100k-endpoints", "meshlib-rust", "", "growth", AT_MOST, limit, script="decide", is_ratio=False)
        for policy, limit in most.items()
    ]


def _swapped(case: str) -> list[Goal]:
    """Milliseconds of a swap, and what it adds to the p99 of the calls beside it."""
    return [
        Goal(case, mode, "", metric, AT_MOST, most, script="decide", is_ratio=False)
        for mode in ("meshlib", "meshlib-rust")
        for metric, most in (("ms", 50.0), ("added_us", 1000.0))
    ]


def _watched(case: str) -> list[Goal]:
    """Microseconds of a pick, and milliseconds of all else, while endpoints change."""
    most = {"p99_us": 20.0, "apply_ms": 50.0, "stall_ms": 5.0, "stale_ms": 100.0, "rss_mb": 50.0}
    wanted = [
        Goal(case, "meshlib", "", metric, AT_MOST, limit, script="discover", is_ratio=False) for metric, limit in most.items()
    ]
    # What the machine does to a loop that nobody disturbs.
    told = [(mode, "first_us") for mode in ("meshlib", "still")] + [("still", "stall_ms")]
    return [*wanted, *(Goal(case, mode, "", metric, AT_MOST, None, script="discover", is_ratio=False) for mode, metric in told)]


def _judged(case: str) -> Goal:
    """Nanoseconds in which one request is authorised."""
    return Goal(case, "meshlib-rust", "", "ns", AT_MOST, 2000.0, script="decide", is_ratio=False)


def _small(case: str, most: float | None) -> list[Goal]:
    """Bytes asked of the allocator."""
    return [Goal(case, "meshlib-rust", "", "bytes", AT_MOST, most, script="memory", is_ratio=False)]


def _served(case: str, mode: str, peer: str, metric: str, relation: str, wanted: float | None) -> Goal:
    return Goal(case, mode, peer, metric, relation, wanted, script="server", is_ratio=bool(peer))


def _delegated() -> list[Goal]:
    """The node agent, against a pair of Envoys and against doing without; and what etcd tells, until a call uses it."""
    return [
        Goal("get/mtls/c=64", "meshlib-agent", "envoy-pair", "rps", AT_LEAST, 1.0, script="agent"),
        Goal("get/mtls/c=64", "meshlib-agent", "envoy-pair", "cpu_us", AT_MOST, 1.0, script="agent"),
        Goal("get/mtls/c=1", "meshlib-agent", "envoy-pair", "p50_us", AT_MOST, None, script="agent"),
        Goal("5k-services", "meshlib", "envoy", "rss_mb", AT_MOST, 0.4, script="agent"),
        Goal("5k-services", "meshlib-agent", "envoy", "rss_mb", AT_MOST, 0.4, script="agent"),
        Goal("delegated/mtls/c=1", "meshlib-agent", "", "added_us", AT_MOST, 120.0, script="agent", is_ratio=False),
        Goal("shared/mtls", "meshlib-agent", "meshlib", "connections", AT_MOST, 1 / 8, script="agent"),
        Goal("shared-http1/mtls", "meshlib-agent", "meshlib", "connections", AT_MOST, None, script="agent"),
        Goal("added/plain/c=1", "meshlib", "", "p99_us", AT_MOST, 20_000.0, script="etcd", is_ratio=False),
    ]


def _abused() -> list[Goal]:
    """What an attack costs those who share the agent with it, above what it costs those who only share the machine."""
    found = []
    for attack in ("slow-hello", "slow-head", "slow-body", "resets", "continuation", "hpack"):
        case = f"{attack}/mtls"
        limit = ("freed_s", 11.0) if attack.startswith("slow") else ("grown_mb", 50.0)
        found += [
            Goal(case, "here", "elsewhere", "p99_us", AT_MOST, 1.5, script="abuse"),
            Goal(case, "here", "quiet", "p99_us", AT_MOST, None, script="abuse"),
            Goal(case, "here", "", limit[0], AT_MOST, limit[1], script="abuse", is_ratio=False),
        ]
    return found


def _called(case: str, mode: str, peer: str, metric: str, relation: str, wanted: float | None) -> Goal:
    """Of gRPC."""
    return Goal(case, mode, peer, metric, relation, wanted, script="grpc_calls", is_ratio=bool(peer))


GOALS: Final[tuple[Goal, ...]] = (
    *_faster("get/mtls", "meshlib", "httpx", {"c=1": 6.0, "c=64": 50.0}, "get/plain"),
    *_faster("get/mtls", "meshlib", "httpx-envoy-pair", {"c=1": 6.0, "c=64": 40.0}),
    *_faster("get/mtls", "meshlib", "aiohttp", {"c=1": 1.5, "c=64": 3.0}),
    *_faster("get/mtls", "meshlib", "pyreqwest", {"c=1": 1.2, "c=64": 1.2}),
    *_faster("get/mtls", "meshlib", "streams", {"c=1": 0.8, "c=64": 0.6}),
    *_faster("get/mtls", "meshlib-transport", "httpx", {"c=1": 2.5, "c=64": 10.0}),
    *_faster("get/mtls", "meshlib-sync", "httpx-sync", {"t=1": 3.0, "t=8": 15.0}),
    *_faster("get-2-workers/mtls", "meshlib", "pyreqwest", {"c=1": 1.2, "c=64": 1.05}),
    *_faster("get-1MiB/mtls", "meshlib", "streams", {"c=1": 0.8, "c=8": 0.8}),
    *_added("meshlib-way", 4.0),
    *_added("meshlib", None),
    *_kept("body-down", 8.0, "c=1", "c=1"),
    *_kept("body-up", 8.0, "c=1", "c=1"),
    *_kept("calls", 1.0, "c=64", "t=1"),
    Goal("resumed/mtls/c=1", "meshlib", "meshlib", "cpu_us", AT_MOST, 0.45, "full/mtls/c=1", "handshake"),
    Goal("full/mtls/c=1", "meshlib", "ssl", "cpu_us", AT_MOST, 0.5, script="handshake"),
    Goal("call/10k-routes-50k-endpoints", "meshlib-rust", "", "ns", AT_MOST, 1000.0, script="decide", is_ratio=False),
    *_grown({"random": 3.0, "least_request": 3.0, "peak_ewma": 3.0, "maglev": 3.0, "ring_hash": 6.0, "round_robin": 6.0}),
    *_swapped("swap/10k-routes"),
    *_swapped("swap/10k-endpoints"),
    *_watched("watch/10k-endpoints/100-changes"),
    Goal("jwt/seen/RS256", "meshlib-rust", "", "ns", AT_MOST, 3000.0, script="decide", is_ratio=False),
    *(_judged(f"authorize/1000-rules{place}") for place in ("", "/first", "/middle", "/last", "/miss")),
    *_small("endpoint/peak_ewma", 200.0),
    *_small("endpoint/ring_hash", None),
    *_small("endpoint/maglev", None),
    *_small("endpoint-used/peak_ewma", None),
    *_small("service", 2048.0),
    Goal("call/async", "meshlib", "", "ns", AT_MOST, 1500.0, script="guard", is_ratio=False),
    Goal("call/sync", "meshlib-sync", "", "ns", AT_MOST, 1500.0, script="guard", is_ratio=False),
    Goal("call/async-waits", "meshlib", "", "ns", AT_MOST, None, script="guard", is_ratio=False),
    _served("uvicorn/plain/c=32", "meshlib", "bare", "rps", AT_LEAST, 0.8),
    _served("uvicorn/plain/c=32", "meshlib", "otel", "rps", AT_LEAST, 4.0),
    _served("uvicorn/plain/c=32", "meshlib", "otel-lean", "rps", AT_LEAST, None),
    _served("uvicorn/plain/c=32", "meshlib-no-sdk", "bare", "rps", AT_LEAST, None),
    _served("uvicorn-otlp/plain/c=32", "meshlib", "bare", "rps", AT_LEAST, 0.35),
    # Spans that are thrown away would make it quick.
    _served("uvicorn-otlp/plain/c=32", "meshlib", "", "dropped", AT_MOST, 1.0),
    _served("uvicorn-otlp/plain/c=32", "meshlib", "otel", "rps", AT_LEAST, None),
    _served("gunicorn-sync/plain/c=32", "meshlib", "bare", "rps", AT_LEAST, 0.9),
    _served("gunicorn/plain/c=32", "meshlib", "bare", "rps", AT_LEAST, None),
    _served("connect-full/mtls/c=1", "meshlib", "ssl", "cpu_us", AT_MOST, 1 / 2),
    _served("connect-resumed/mtls/c=1", "meshlib", "ssl", "cpu_us", AT_MOST, 1 / 2.5),
    _served("kept/mtls/c=32", "meshlib", "ssl", "rps", AT_LEAST, 1.0),
    _served("kept/mtls/c=32", "meshlib-no-sdk", "ssl", "rps", AT_LEAST, None),
    _called("unary-aio/plain/c=1", "meshlib", "bare", "cpu_us", AT_MOST, 1.08),
    _called("unary-aio/plain/c=64", "meshlib", "bare", "rps", AT_LEAST, 0.92),
    _called("unary-aio/plain/c=64", "meshlib", "bare", "cpu_us", AT_MOST, None),
    _called("unary-aio/plain/c=64", "meshlib", "grpc-xds", "rps", AT_LEAST, 0.96),
    _called("unary-sync/plain/c=1", "meshlib", "bare", "cpu_us", AT_MOST, 1.08),
    _called("unary-sync/plain/c=64", "meshlib", "bare", "rps", AT_LEAST, 0.92),
    *(_called(f"unary-{kind}/plain/c=1", "meshlib", "bare-no-retries", "cpu_us", AT_MOST, None) for kind in ("aio", "sync")),
    *(_called(f"unary-{kind}/plain/c=64", "meshlib", "bare-no-retries", "rps", AT_LEAST, None) for kind in ("aio", "sync")),
    *(
        _called(f"added-{what}", "meshlib", "", metric, AT_MOST, None)
        for what in ("aio/plain/c=1", "aio/plain/c=64", "sync/plain/c=1", "served-aio/plain/c=64", "served-sync/plain/c=64")
        for metric in ("added_us", "ratio")
    ),
    _called("unary-aio/mtls/c=64", "meshlib", "envoy-pair", "rps", AT_LEAST, 2.0),
    _called("unary-aio/mtls/c=1", "meshlib", "envoy-pair", "p50_us", AT_MOST, 0.6),
    *(_called(f"unary-aio/mtls/c={count}", "meshlib-relay", "meshlib", "rps", AT_LEAST, None) for count in (1, 64)),
    _called("unary-aio/mtls/c=64", "meshlib", "bare", "rps", AT_LEAST, None),
    _called("unary-aio/mtls/c=1", "meshlib", "bare", "p50_us", AT_MOST, None),
    # As far as grpcio's own server and TLS let anybody come.
    _called("unary-aio/mtls/c=64", "bare", "envoy-pair", "rps", AT_LEAST, None),
    _called("unary-aio/mtls/c=1", "bare", "envoy-pair", "p50_us", AT_MOST, None),
    _called("stream-aio/plain/c=1", "meshlib", "bare", "rps", AT_LEAST, 0.95),
    *_delegated(),
    *_abused(),
    _called("chat-aio/plain/c=1", "meshlib", "bare", "rps", AT_LEAST, None),
    *(_called(f"served-{kind}/plain/c=64", "meshlib", "bare", "rps", AT_LEAST, 0.92) for kind in ("aio", "sync")),
    *(_called(f"served-{kind}/plain/c=64", "meshlib", "bare", "cpu_us", AT_MOST, None) for kind in ("aio", "sync")),
)


@dataclass(frozen=True)
class Verdict:
    """What became of a goal: the median, the lowest and the highest of its rounds; or why there is none."""

    goal: Goal
    state: State
    figure: float = 0.0
    low: float = 0.0
    high: float = 0.0
    reason: str = ""

    @property
    def has_figure(self) -> bool:
        return self.state in ("met", "missed", "told")

    def row(self) -> dict[str, Any]:
        """As the other rows of `--json`, with what was wanted. `mode` names both."""
        goal = self.goal
        metric = "ratio" if goal.is_ratio else goal.metric
        return {
            "script": goal.script,
            "case": goal.case,
            "mode": f"{goal.mode} {'/' if goal.is_ratio else '-'} {goal.against}" if goal.peer else goal.mode,
            "metric": metric,
            "value": round(self.figure, 3),
            "unit": UNITS[metric],
            "low": round(self.low, 3),
            "high": round(self.high, 3),
            "relation": goal.relation,
            "goal": goal.goal,
            "is_met": goal.is_reached_by(self.figure),
        }


def judged(everything: Iterable[Results], goals: Iterable[Goal] = GOALS) -> list[Verdict]:
    """The goals of which both sides were asked for, each with what the run says of it."""
    by_script = {results.script: results for results in everything}
    found = []
    for goal in goals:
        results = by_script.get(goal.script)
        if results is not None and goal.ours in results.values and goal.theirs in results.values:
            found.append(_judge(goal, results))
    return found


def _judge(goal: Goal, results: Results) -> Verdict:
    figures = results.ratios(goal.ours, goal.theirs, goal.metric) if goal.is_ratio else results.of(*goal.ours, goal.metric)
    if figures:
        figure = statistics.median(figures)
        is_met = goal.is_reached_by(figure)
        state: State = "told" if is_met is None else "met" if is_met else "missed"
        return Verdict(goal, state, figure, min(figures), max(figures))
    for key in (goal.ours, goal.theirs):
        if key in results.skipped:
            return Verdict(goal, "absent", reason=results.skipped[key])
    for key in (goal.ours, goal.theirs):
        if key in results.broken:
            return Verdict(goal, "failed", reason=results.broken[key])
    return Verdict(goal, "failed", reason="no round has both")
