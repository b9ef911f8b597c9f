"""Does what must hold hold in small simulated fleets, and is the simulator itself right? Virtual time: the same seed, the same figures."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import simulate
from benchmarks.harness import UNITS, Results
from benchmarks.peers import ROOT, Absent, Peers
from benchmarks.simulation.catalogue import SCENARIOS, Check, play
from benchmarks.simulation.plan import POLICIES, change, plan_of
from benchmarks.simulation.report import show
from benchmarks.simulation.stage import Size, Stage
from benchmarks.simulation.world import HOP, REFUSING, Endpoint
from meshlib._native import core

SMALL = Size(endpoints=9, clients=3)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A configuration without a word on balance, admit and retry."""
    import contextlib

    return Peers(tmp_path_factory.mktemp("simulate"), contextlib.ExitStack()).mesh([], is_private=False)


def has(policy: str, config: str) -> bool:
    try:
        core.Engine(1).publish(plan_of(config, policy, {}), 0.0)
    except ValueError:
        return False
    return True


def missed(scenario: str, mode: str, figures: dict[str, float]) -> list[str]:
    return [
        f"{check.words}: {check.metric} is {figures[check.metric]}, wanted {check.relation} {check.bound(figures)}"
        for check in SCENARIOS[scenario].checks_of(mode)
        if not check.is_met(figures)
    ]


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_what_must_hold_holds_with_the_default_balancer(scenario: str, config: str) -> None:
    """Each scenario says what its fleet must not suffer, and the defaults of a user keep it."""
    assert missed(scenario, "peak_ewma", play(scenario, "peak_ewma", SMALL, config)) == []


@pytest.mark.parametrize("policy", POLICIES[1:])
def test_a_killed_endpoint_fails_no_idempotent_call_with_any_balancer(policy: str, config: str) -> None:
    """The breaker and one retry are no balancer's business."""
    if not has(policy, config):
        pytest.skip(f"this build has no policy {policy}")
    assert missed("killed", policy, play("killed", policy, SMALL, config)) == []


@pytest.mark.parametrize("scenario", ["retry-storm", "metastable"])
def test_without_budget_and_shedding_it_is_lost(scenario: str, config: str) -> None:
    """The trigger is one that a naive client doesn't survive; otherwise that ours does would say nothing."""
    figures = play(scenario, "naive", SMALL, config)
    assert figures["met"] == 1.0, missed(scenario, "naive", figures)


def test_where_failures_are_marked_only_the_lowest_layer_repeats(config: str) -> None:
    """Budgets of several layers multiply; a mark that nobody is to repeat it keeps the storm to one of them."""
    marked, usual = (play("retry-storm", mode, SMALL, config) for mode in ("marked", "peak_ewma"))
    assert missed("retry-storm", "marked", marked) == []
    assert marked["bottom"] < 0.7 * usual["bottom"]


def test_without_a_retry_a_killed_endpoint_costs_calls(config: str) -> None:
    """What must hold is held by the mesh and not by the simulator."""
    stage = Stage(config, "peak_ewma", SMALL, changes={"route": {"retry": {"attempts": 0}}})
    own = SCENARIOS["killed"].play(stage)
    assert "no idempotent call fails" in missed("killed", "peak_ewma", {**stage.figures(), **own})[0]


def test_the_same_seed_gives_the_same_figures(config: str) -> None:
    """All chance, that of the engines included, comes from one seed."""
    one, again, other = (play("killed", "peak_ewma", Size(6, 3, seed=seed), config) for seed in (1, 1, 2))
    assert (one == again, one == other) == (True, False)


@pytest.mark.parametrize("scenario", ["killed", "zone-lost", "overload", "metastable"])
def test_every_call_ends_and_gives_back_its_permits(scenario: str, config: str) -> None:
    """At the end each call has one line in the journal, and no engine holds a permit."""
    found = SCENARIOS[scenario]
    stage = Stage(config, "peak_ewma", Size(6, 3, seconds=5.0), **found.stage)
    callers = list(stage.world.callers)
    found.play(stage)
    rows = [row for caller in callers for row in caller.engine.stats(stage.world.now)]
    assert len(stage.world.journal.begun) == stage.world.simulated > 1000
    assert {row["in_flight"] for row in rows} == {0}


def test_calls_are_served_in_their_order_by_as_many_workers(config: str) -> None:
    """Three calls at once, two workers: the third waits for the first that is free."""
    stage = Stage(config, "peak_ewma", Size(3, 1))
    stage.world._works = [1.0] * len(stage.world._works)
    stage.world.rate = 0.0
    stage.resolve([stage.endpoints[0]])
    for _ in range(3):
        stage.world.call(stage.world.callers[0])
    stage.run()
    assert [round(took - 2 * HOP, 6) for took in stage.world.journal.took] == [1.0, 1.0, 2.0]


def test_an_endpoint_refuses_what_would_wait_too_long(config: str) -> None:
    """Shedding: beyond the patience of the queue the answer is 503 at once, and one repeats it elsewhere only within the budget."""
    stage = Stage(config, "peak_ewma", Size(3, 1), patience=50.0, changes={"route": {"retry": {"attempts": 0}}})
    stage.world._works = [1.0] * len(stage.world._works)
    stage.world.rate = 0.0
    stage.resolve([stage.endpoints[0]])
    for _ in range(3):
        stage.world.call(stage.world.callers[0])
    stage.run()
    assert sorted(stage.world.journal.failed) == [0, 0, 1]
    assert min(stage.world.journal.took) == pytest.approx(2 * HOP)


def test_a_crash_resets_what_is_under_way(config: str) -> None:
    """An idempotent call goes on elsewhere, one that is not ends with the endpoint."""
    stage = Stage(config, "peak_ewma", Size(3, 1))
    stage.world._works = [1.0] * len(stage.world._works)
    stage.world.rate = 0.0
    for is_idempotent in (True, False):
        stage.world.call(stage.world.callers[0], is_idempotent)
    for each in stage.endpoints[:]:
        if each.flying:
            stage.world.at(0.5, stage.world.crash, each)
    stage.run()
    assert sorted(stage.world.journal.failed) == [0, 2]
    assert {each.state for each in stage.endpoints if each.taken and not each.served} <= {REFUSING}


def test_the_queue_is_that_of_the_textbook(config: str) -> None:
    """One worker, exponential gaps: the mean wait is that of Pollaczek and Khinchine, load * work * (1 + variance) / 2 / (1 - load)."""
    stage = Stage(config, "peak_ewma", Size(3, 1, seconds=400.0, most=60_000))
    one = Endpoint("10.9.9.9:1", 1)
    stage.resolve([one])
    stage.world.rate = 50.0
    stage.run()
    took = list(stage.world.journal.took)
    variance = math.exp(0.6**2) - 1
    expected = 0.5 * 0.010 * (1 + variance) / 2 / 0.5 + 0.010 + 2 * HOP
    assert sum(took) / len(took) == pytest.approx(expected, rel=0.05)


def test_a_key_that_the_plan_does_not_have_is_left_alone() -> None:
    """Scenarios speak of policies that a build may not have."""
    plan: dict[str, Any] = {"admit": {"in_flight": 1}, "budget": 2}
    change(plan, {"admit": {"in_flight": 3, "new": 1}, "new": {"a": 1}, "budget": 4})
    assert plan == {"admit": {"in_flight": 3}, "budget": 4}


def test_a_policy_that_the_engine_does_not_have_is_absent(config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is told as absent, not as failed."""
    monkeypatch.setattr("benchmarks.simulation.plan.POLICIES", ("teapot",))
    with pytest.raises(Absent, match="no policy teapot"):
        simulate.work("steady", "teapot", {"endpoints": 3, "clients": 1}, config, 10.0)


def test_a_scenario_about_load_is_absent_where_there_can_be_none(config: str) -> None:
    """So that nobody reads an overload of 3 % as one."""
    with pytest.raises(Absent, match="give --most"):
        play("overload", "peak_ewma", Size(1000, 2), config)


def test_a_goal_that_is_missed_is_said_in_words(capsys: pytest.CaptureFixture[str]) -> None:
    """In the table of the balancers, beside the figures."""
    results = Results("simulate", "p99_us")
    names = ("p50_us", "p99_us", "p999_us", "spread", "cv", "attempts", "failed_ppm", "load", "sight", "met")
    results.values["steady/3x1", "peak_ewma"] = {name: [1.0] for name in names}
    show(results)
    assert "missed: nothing fails" in capsys.readouterr().out


def test_a_bound_may_be_another_figure() -> None:
    """The probe interval depends on how long the endpoint was away."""
    check = Check("back_s", "≤", "back_limit_s", "")
    assert (check.is_met({"back_s": 1, "back_limit_s": 2}), check.is_met({"back_s": 3, "back_limit_s": 2})) == (True, False)


def test_the_rows_are_in_the_agreed_form(tmp_path: Path) -> None:
    """As a script of the benchmarks, briefly, in processes of its own."""
    file = tmp_path / "rows.json"
    command = (sys.executable, "-m", "benchmarks", "simulate", "--brief", "--case", "killed/*", "--mode", "peak_ewma")
    done = subprocess.run([*command, "--json", str(file)], cwd=ROOT, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert {tuple(row) for row in rows} == {("script", "case", "mode", "metric", "value", "unit")}
    assert {(row["script"], row["case"], row["mode"]) for row in rows} == {("simulate", "killed/usual", "peak_ewma")}
    assert {"p50_us", "p99_us", "spread", "attempts", "failed_ppm", "back_s", "met"} < {row["metric"] for row in rows}
    assert all(row["unit"] == UNITS[row["metric"]] for row in rows)
