"""Which scenarios are there, and what must hold?

`checks` are what must hold of the figures for each balancer; where they are said of one kind of balancer, or of a variant without our retries,
`modes` names it. A balancer for which nothing is promised is shown all the same.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

from ..peers import Absent
from .plan import POLICIES
from .scenarios import (
    cold_start,
    deploy,
    flapping,
    killed,
    metastable,
    overload,
    retry_storm,
    slow_middle,
    steady,
    zone_lost,
)
from .stage import LOAD, Size, Stage

# Balancers that look at how endpoints are doing.
WATCHFUL: Final = ("peak_ewma", "least_request")
RELATIONS: Final[dict[str, Callable[[float, float], bool]]] = {"≤": operator.le, "≥": operator.ge}


@dataclass(frozen=True)
class Check:
    """A figure and what it must be: a number, or another figure."""

    metric: str
    relation: str
    wanted: float | str
    words: str
    modes: tuple[str, ...] = POLICIES
    # Calls that a caller sends to each endpoint in a second, at least. It knows only what it has seen: with less than these it is told how
    # the balancer did, and nothing is promised.
    sight: float = 0.0

    def is_promised(self, figures: dict[str, float]) -> bool:
        return figures["sight"] >= self.sight

    def is_met(self, figures: dict[str, float]) -> bool:
        return RELATIONS[self.relation](figures[self.metric], self.bound(figures))

    def bound(self, figures: dict[str, float]) -> float:
        return figures[self.wanted] if isinstance(self.wanted, str) else self.wanted


@dataclass(frozen=True)
class Scenario:
    name: str
    play: Callable[[Stage], dict[str, float]]
    checks: tuple[Check, ...]
    variants: tuple[str, ...] = ()
    # What the stage is like.
    stage: dict[str, Any] = field(default_factory=dict)
    # It says something only under the load that it names.
    needs_load: bool = False

    @property
    def modes(self) -> tuple[str, ...]:
        return POLICIES + self.variants

    def checks_of(self, mode: str) -> list[Check]:
        return [check for check in self.checks if mode in check.modes]


SIGHT: Final = 2.0

NOTHING_FAILS: Final = Check("failed_ppm", "≤", 0.0, "nothing fails")
NO_IDEMPOTENT_FAILS: Final = Check("failed_idempotent_ppm", "≤", 0.0, "no idempotent call fails")
# A reserve of ten a second and process makes it a little more where a process has few calls.
FEW_ATTEMPTS: Final = Check("attempts", "≤", 1.2, "attempts within the budget")

SCENARIOS: Final = {
    scenario.name: scenario
    for scenario in (
        Scenario("steady", steady, (NOTHING_FAILS,)),
        Scenario(
            "slow-middle",
            slow_middle,
            (
                # Two draws are both slow once in nine: so much no watching avoids, and it is more than the slow can do.
                Check("slow_share", "≤", 0.13, "the slow third gets little more than a ninth", WATCHFUL, SIGHT),
                Check("failed_idempotent_ppm", "≤", 1000.0, "hardly an idempotent call fails", WATCHFUL, SIGHT),
            ),
        ),
        Scenario(
            "cold-start",
            cold_start,
            (
                Check("failed_idempotent_ppm", "≤", 0.0, "no idempotent call fails", WATCHFUL),
                Check("p99_then_us", "≤", "p99_limit_us", "p99 stays below 10 x what it was", WATCHFUL, SIGHT),
            ),
        ),
        Scenario(
            "flapping",
            flapping,
            # Where several flap, both attempts of a call can meet one.
            (Check("failed_idempotent_ppm", "≤", 1000.0, "hardly an idempotent call fails", sight=SIGHT), FEW_ATTEMPTS),
        ),
        Scenario(
            "killed",
            killed,
            (
                NO_IDEMPOTENT_FAILS,
                Check("back_s", "≤", "back_limit_s", "used again by every caller within its probe interval"),
                FEW_ATTEMPTS,
            ),
        ),
        Scenario(
            "zone-lost",
            zone_lost,
            (Check("failed_after_ppm", "≤", 0.0, "nothing that began a second later fails", sight=SIGHT),),
            stage={"zones": 3},
        ),
        Scenario(
            "retry-storm",
            retry_storm,
            (
                Check("bottom", "≤", "bottom_limit", "attempts at the bottom within B's budgets"),
                Check("bottom", "≥", 8.0, "without budgets it is a storm", ("naive",)),
                Check("bottom", "≤", "bottom_limit", "attempts at the bottom within B's budgets", ("marked",)),
                Check("above", "≤", 1.05, "where failures are marked, only the lowest layer repeats", ("marked",)),
            ),
            ("naive", "marked"),
            stage={"work": 0.010},
            needs_load=True,
        ),
        Scenario(
            "overload",
            overload,
            (
                Check("goodput", "≥", 0.85, "most of the capacity is used well"),
                Check("failed_after_ppm", "≤", 1000.0, "and a second after its end it is over"),
            ),
            stage={"patience": 10.0, "work": 0.010},
            needs_load=True,
        ),
        Scenario(
            "metastable",
            metastable,
            (
                Check("recovery_s", "≤", 10.0, "well within 10 s after the burst"),
                Check("end_failed_ppm", "≥", 500_000, "without budget and shedding it never recovers", ("naive",)),
            ),
            ("naive", "budget-only", "shedding-only"),
            stage={"load": 0.7, "patience": 10.0, "work": 0.010, "per_try": 0.25, "timeout": 1.0, "least_seconds": 16.0},
            needs_load=True,
        ),
        Scenario("deploy", deploy, (NOTHING_FAILS, Check("attempts", "≤", 1.05, "hardly an attempt is wasted"))),
    )
}


def play(scenario: str, mode: str, size: Size, config: str) -> dict[str, float]:
    """One scenario with one balancer: all figures. The same size, seed included, gives the same figures."""
    found = SCENARIOS[scenario]
    stage = Stage(config, mode, size, **found.stage)
    wanted = found.stage.get("load", LOAD)
    if found.needs_load and stage.load < 0.99 * wanted:
        calls = wanted * stage.capacity * stage.seconds
        raise Absent(
            f"it needs {100 * wanted:.0f} % load, which is {calls:,.0f} calls: give --most {calls:.0f} or fewer endpoints"
        )
    own = found.play(stage)
    figures = {**stage.figures(), **own}
    checks = [check for check in found.checks_of(mode) if check.is_promised(figures)]
    if checks:
        figures["met"] = float(all(check.is_met(figures) for check in checks))
    return figures
