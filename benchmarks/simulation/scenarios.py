"""What happens to the fleet?

A scenario is a function that is given a `Stage`, says what happens when, lets it run, and tells its own figures. What must hold of them is in
`catalogue.py`. The default balancer and its rivals live through the very same.
"""

from __future__ import annotations

from .plan import plan_of
from .stage import Stage, evenness
from .world import INFINITE, REFUSING, SILENT, Caller, Endpoint, resolve


def steady(stage: Stage) -> dict[str, float]:
    """Nothing. What the others are compared with."""
    stage.run()
    return {}


def slow_middle(stage: Stage) -> dict[str, float]:
    """In the middle third of the run a third of the endpoints takes ten times as long."""
    slow = stage.endpoints[: max(1, len(stage.endpoints) // 3)]
    marks: list[int] = []

    def turn(slowness: float) -> None:
        marks.append(sum(each.taken for each in slow))
        marks.append(sum(each.taken for each in stage.endpoints))
        for each in slow:
            each.slowness = slowness

    begin, end = stage.at(1 / 3, lambda: turn(10.0)), stage.at(2 / 3, lambda: turn(1.0))
    stage.run()
    to_slow, to_all = marks[2] - marks[0], marks[3] - marks[1]
    return {"slow_share": to_slow / max(1, to_all), "p99_then_us": 1e6 * stage.quantile(0.99, begin, end)}


def cold_start(stage: Stage) -> dict[str, float]:
    """After a third of the run half as many endpoints come in addition, five times as slow at first and warm after a third of it."""
    old = list(stage.endpoints)
    new = [stage.endpoint(len(old) + n) for n in range(max(1, len(old) // 2))]
    for each in new:
        each.slowness = 5.0

    def warm() -> None:
        left = max(0.0, 1.0 - (stage.world.now - begin) / (stage.seconds / 3))
        for each in new:
            each.slowness = 1.0 + 4.0 * left

    begin = stage.at(1 / 3, lambda: stage.resolve(old + new))
    for step in range(1, 11):
        stage.world.at(begin + step * stage.seconds / 30, warm)
    stage.run()
    before = stage.quantile(0.99, 0.0, begin)
    first = stage.quantile(0.99, begin, begin + stage.seconds / 3)
    return {"p99_then_us": 1e6 * first, "p99_before_us": 1e6 * before, "p99_limit_us": 1e7 * before}


def flapping(stage: Stage) -> dict[str, float]:
    """A tenth of the endpoints, one at least, is up for a second and down for a second, all the time."""
    some = stage.endpoints[: max(1, len(stage.endpoints) // 10)]

    def flap() -> None:
        for each in some:
            if each.state == REFUSING:
                stage.world.revive(each)
            else:
                stage.world.crash(each)

    stage.world.each(1.0, flap)
    stage.run()
    return {}


def killed(stage: Stage) -> dict[str, float]:
    """One endpoint dies after two seconds, and is back after four."""
    died, returned = 2.0, 4.0
    one = stage.endpoints[len(stage.endpoints) // 2]
    # The waits are 1, 2, 4 … s, jittered by a quarter; those that ended while it was down make together at most that time. A caller that
    # calls seldom comes later by some of its own gaps.
    limit = 1.25 * ((returned - died) / 0.75 + 1.0) + 20 * stage.size.clients / stage.world.rate
    stage.seconds = max(stage.seconds, returned + limit + 0.5)
    without: list[int] = []

    def back() -> None:
        stage.world.revive(one)
        one.first_use = {}
        without.extend(caller.number for caller in stage.world.callers if _is_out(caller, one, stage.world.now))

    stage.world.at(died, stage.world.crash, one)
    stage.world.at(returned, back)
    stage.run()
    uses = one.first_use or {}
    waits = [uses.get(number, stage.seconds) - returned for number in without]
    return {"back_s": max(waits, default=0.0), "back_limit_s": limit, "ejected_by": len(without) / len(stage.world.callers)}


def _is_out(caller: Caller, endpoint: Endpoint, now: float) -> bool:
    rows = caller.engine.stats(now)
    return any(row["endpoint"] == endpoint.address and row.get("breaker", row.get("health")) != "closed" for row in rows)


def zone_lost(stage: Stage) -> dict[str, float]:
    """After a third of the run all endpoints of one of three zones are cut off: no answer, no refusal, connects run into their time-out.

    They stay away. The callers of that zone are still there, and nobody tells them.
    """
    lost = [each for each in stage.endpoints if each.zone == "zone-1"]
    begin = stage.at(1 / 3, lambda: [stage.world.crash(each, SILENT) for each in lost])
    stage.run()
    return {"failed_after_ppm": stage.failed(begin + 1.0), "failed_first_second_ppm": stage.failed(begin - 1.0, begin + 1.0)}


def overload(stage: Stage) -> dict[str, float]:
    """In the middle third of the run three times as many calls come as the endpoints can do."""
    usual = stage.world.rate

    def turn(rate: float) -> None:
        stage.world.rate = rate

    begin = stage.at(1 / 3, lambda: turn(usual * 3 / stage.load))
    end = stage.at(2 / 3, lambda: turn(usual))
    stage.run()
    return {
        "goodput": stage.goodput(begin + 0.5, end) / stage.capacity,
        "failed_before_ppm": stage.failed(0.0, begin - 0.5),
        "failed_after_ppm": stage.failed(end + 1.0),
    }


def metastable(stage: Stage) -> dict[str, float]:
    """At 70 % load a burst of three times as much comes for two seconds. The load is the old one then; is the service, too?

    An attempt has 0.25 s, and an endpoint works on what nobody waits for any more. So whoever repeats what was too late keeps the
    endpoints at work on answers that come too late.
    """
    usual = stage.world.rate
    begin, end = 2.0, 4.0
    if stage.mode in ("naive", "budget-only"):
        for each in stage.endpoints:
            each.patience = INFINITE

    def turn(rate: float) -> None:
        stage.world.rate = rate

    stage.world.at(begin, lambda: turn(3 * usual))
    stage.world.at(end, lambda: turn(usual))
    stage.run()
    step = 0.5
    bad = [
        n * step for n in range(int(end / step), int(stage.seconds / step)) if stage.failed(n * step, n * step + step) > 10_000
    ]
    return {
        "recovery_s": (bad[-1] + step if bad else end) - end,
        "end_failed_ppm": stage.failed(stage.seconds - 2.0),
        "in_burst_failed_ppm": stage.failed(begin, end),
    }


def deploy(stage: Stage) -> dict[str, float]:
    """All endpoints are replaced, a tenth at a time: the new ones are found, the old ones are left out, and fifty mean works later they end."""
    world, count = stage.world, len(stage.endpoints)
    batches = min(10, count)
    fleet = list(stage.endpoints)
    fresh = [stage.endpoint(count + n) for n in range(count)]

    def replace(first: int, last: int) -> None:
        old = fleet[first:last]
        fleet[first:last] = fresh[first:last]
        stage.resolve(fleet)
        for each in old:
            world.at(world.now + 50 * stage.work, world.crash, each)

    for n in range(batches):
        first, last = n * count // batches, (n + 1) * count // batches
        stage.at(0.1 + 0.8 * n / batches, lambda first=first, last=last: replace(first, last))  # type: ignore[misc]
    stage.run()
    # An old endpoint and its successor are one place, so that all places are there all the time.
    places = [old.taken + new.taken for old, new in zip(stage.endpoints, fresh, strict=True)]
    old_share = sum(each.taken for each in stage.endpoints) / max(1, sum(places))
    return {**evenness(places), "old_share": old_share}


def retry_storm(stage: Stage) -> dict[str, float]:
    """Callers call A, A calls B, B calls C, each with engines and budgets of its own; from a fifth to four fifths of the run C answers 503.

    A and B have few processes, so that each of them has as many calls as a process has that matters. The number of the attempt travels;
    in the variant `naive` it doesn't, there is no budget, and each layer repeats three times. In `marked` a layer that hands a failure up says
    that it is not to be repeated.
    """
    world = stage.world
    bottom = stage.endpoints
    size = min(4, len(bottom))
    plan = plan_of(stage.config, stage.mode, stage.changes)
    number = len(world.callers)
    below: list[Endpoint] = bottom
    tiers: list[list[Caller]] = []
    for tier in ("b", "a"):
        endpoints, callers = [], []
        for n in range(size):
            each = Endpoint(f"{tier}-{n}:8443", 64)
            each.slowness = 0.1
            each.onward = stage.caller(number, plan, below)
            callers.append(each.onward)
            endpoints.append(each)
            number += 1
        world.add(endpoints)
        tiers.append(callers)
        below = endpoints
    for caller in world.callers:
        resolve(caller, 2, below, 0.0)
    usual = stage.world.rate
    world.is_marking = stage.mode == "marked"
    if stage.mode == "naive":
        # Sixty-four times as many attempts: fewer calls tell the same.
        world.rate = usual / 8

    marks: list[tuple[int, int, int]] = []

    def turn(failing: int) -> None:
        into_b = sum(world.endpoints[f"b-{n}:8443"].taken for n in range(size))
        marks.append((world.simulated, sum(each.taken for each in bottom), into_b))
        for each in bottom:
            each.failing = failing

    begin, end = stage.at(0.2, lambda: turn(503)), stage.at(0.8, lambda: turn(0))
    stage.run()
    calls, attempts, above = (later - earlier for earlier, later in zip(*marks[:2], strict=True))
    # What the processes of B may send: a fifth more than they are asked, also for what they were asked in the ten seconds before, and ten a
    # second each with ten seconds of them in reserve.
    reserve = size * (10.0 * (end - begin) + 100.0)
    limit = 1.2 * above + 0.2 * min(marks[0][2], 10.0 * marks[0][2] / begin) + reserve
    return {"bottom": attempts / max(1, calls), "bottom_limit": limit / max(1, calls), "above": above / max(1, calls)}
