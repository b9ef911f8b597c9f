"""Are the engine's scores those of the formula? Peak EWMA has no Envoy peer (its build doesn't contain it), so the formula is the oracle.

Random histories of calls that overlap, fail and are given up run through the engine and through twelve lines of Python; each score
that decided a choice must agree, and each average afterwards. The engine may keep single precision, hence 1e-4.
"""

from __future__ import annotations

import math
import random
from typing import Any

import pytest

from meshlib._native import core
from tests.oracle.our_side import Ours

DECAY, START, PENALTY = 10.0, 0.03, 5.0
NAMES = [f"10.0.0.{n}:80" for n in range(1, 6)]


class Formula:
    """value and t0 of one endpoint, as written down by Finagle and Linkerd."""

    def __init__(self, now: float, capacity: float) -> None:
        self.value, self.t0, self.pending, self.capacity = START, now, 0, capacity

    def read(self, now: float) -> float:
        return self.value * math.exp(-(now - self.t0) / DECAY)

    def add(self, rtt: float, now: float) -> None:
        weight = math.exp(-(now - self.t0) / DECAY)
        self.value = rtt if rtt > self.value * weight else self.value * weight + rtt * (1 - weight)
        self.t0 = now

    def cost(self, now: float) -> float:
        # With equal weights this is the usual `* (pending + 1)`. What is in flight weighs less where there is more room for it; the call
        # itself does not, or an idle endpoint of weight 5 would always win and get more than its share.
        return self.read(now) * (self.pending / self.capacity + 1)


def penalised(outcome: int, status: int, took: float, retry_after: float) -> float | None:
    """The time that an attempt counts as: failures are slow, and what says nothing about the endpoint doesn't count."""
    if outcome in (core.OUTCOME_STALE, core.OUTCOME_UNWRITTEN, core.OUTCOME_CANCELLED):
        return None
    if outcome == core.OUTCOME_RESPONSE and status < 500 and status != 429:
        return took
    return max(took, PENALTY, min(retry_after, 300.0))


ENDS = [
    (core.OUTCOME_RESPONSE, 200, -1.0), (core.OUTCOME_RESPONSE, 200, -1.0), (core.OUTCOME_RESPONSE, 200, -1.0),
    (core.OUTCOME_RESPONSE, 404, -1.0), (core.OUTCOME_RESPONSE, 429, -1.0), (core.OUTCOME_RESPONSE, 429, 20.0),
    (core.OUTCOME_RESPONSE, 503, 900.0), (core.OUTCOME_RESPONSE, 500, -1.0), (core.OUTCOME_TIMEOUT, 0, -1.0),
    (core.OUTCOME_PROTOCOL, 0, -1.0), (core.OUTCOME_STALE, 0, -1.0), (core.OUTCOME_CANCELLED, 0, -1.0),
]  # fmt: skip


@pytest.mark.parametrize("weights", [[1.0] * 5, [5.0, 1.0, 2.0, 1.0, 5.0]], ids=["equal", "weighted"])
@pytest.mark.parametrize("seed", range(12))
def test_scores_of_random_histories_are_those_of_the_formula(seed: int, weights: list[float]) -> None:
    """Both costs of every choice, that the lower one won, and all averages at the end."""
    chance = random.Random(seed)
    engine = Ours("peak_ewma", NAMES, weights=weights, seed=seed, breaker={"max_ejected": 0.0})
    formula = {name: Formula(engine.now, weight / max(weights)) for name, weight in zip(NAMES, weights, strict=True)}
    under_way: list[tuple[Any, int, str, float]] = []
    compared = 0
    for _ in range(300):
        engine.now += chance.choice([0.0001, 0.003, 0.05, 1.0, 7.0]) * chance.random()
        if (under_way and chance.random() < 0.45) or len(under_way) > 12:
            call, token, name, sent = under_way.pop(chance.randrange(len(under_way)))
            outcome, status, after = chance.choice(ENDS)
            rtt = penalised(outcome, status, engine.now - sent, after)
            if call.head(token, outcome, status, engine.now, after) == core.DELIVER and outcome == core.OUTCOME_RESPONSE:
                call.finish(token, outcome, engine.now)
            call.abandon(engine.now)
            formula[name].pending -= 1
            if rtt is not None:
                formula[name].add(rtt, engine.now)
            continue
        call = engine.engine.begin("orders", "GET", "/", [], engine.now, engine.now + 1e6)
        step = call.next(engine.now)
        scores = {row["endpoint"]: row["score"] for row in call.record()["candidates"] if row["score"] is not None}
        expected = {name: formula[name].cost(engine.now) for name in scores}
        assert len(scores) == 2
        assert scores == pytest.approx(expected, rel=1e-4)
        other = next(name for name in scores if name != step[2])
        assert scores[step[2]] <= scores[other]
        formula[step[2]].pending += 1
        under_way.append((call, step[1], step[2], engine.now))
        compared += 1
    assert compared > 100
    read = {row["endpoint"]: row["ewma"] for row in engine.engine.stats(engine.now) if row["endpoint"]}
    assert read == pytest.approx({name: formula[name].read(engine.now) for name in read}, rel=1e-4)


def test_peak_replaces_and_fades_by_the_clock() -> None:
    """By hand: 30 ms at the start; 2 s replace it; 10 s later a factor e less; then 100 ms are blended in with 1 - 1/e."""
    engine = Ours("peak_ewma", NAMES[:1])
    start = engine.now

    def took(seconds: float) -> None:
        call, sent = engine.engine.begin("orders", "GET", "/", [], engine.now), engine.now
        token = call.next(sent)[1]
        engine.now = sent + seconds
        call.head(token, core.OUTCOME_RESPONSE, 200, engine.now, is_whole=True)

    def ewma() -> float:
        return next(row["ewma"] for row in engine.engine.stats(engine.now) if row["endpoint"])

    took(2.0)
    assert (engine.now - start, ewma()) == (2.0, pytest.approx(2.0, rel=1e-4))
    engine.now += DECAY - 0.1
    took(0.1)
    assert ewma() == pytest.approx(2.0 / math.e + 0.1 * (1 - 1 / math.e), rel=1e-4)
