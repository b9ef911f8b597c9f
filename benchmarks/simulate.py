"""What would a fleet do that is larger than this machine?

The engines that `mesh.client()` uses, one for each simulated process that calls, under a virtual clock: no sockets, no waiting, and the same
seed gives the same figures. `simulation/world.py` has the clock, the queues and the callers, `simulation/scenarios.py` what happens to them,
`simulation/catalogue.py` what must hold. Every balancer sees the same calls of the same users on the same endpoints.

    python -m benchmarks simulate                                         # all scenarios, 20 endpoints, 10 callers
    python -m benchmarks.simulate --scenario killed --endpoints 1000 --clients 200 --work 0.1
    python -m benchmarks.simulate --fleets                                # from 3 endpoints to 100,000; some minutes

An engine is a process's: its memory is that of a real one, so that 100,000 endpoints are for few callers (four take about half a gigabyte)
and 1,000 callers for few endpoints each. The number of usual calls is bounded (`--most`): with more endpoints each has less to do, which the
column `load` tells; `--work`, the mean seconds of work in a call, makes it more. A scenario that is about load is left out there.
It measures no time of this machine; `rps` of the rows is how many calls were simulated in a second of it.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Final

from .harness import Results, Run, in_process, write_json
from .machine import cores
from .peers import Absent, Broken, Peers
from .simulation.catalogue import SCENARIOS, play
from .simulation.plan import POLICIES, VARIANTS
from .simulation.report import show
from .simulation.stage import Size

__all__ = ["HAS_RATIOS", "MOST_ROUNDS", "PRIMARY", "SECONDS", "main", "runs", "show", "work"]
PRIMARY: Final = "p99_us"
HAS_RATIOS: Final = False
# Of virtual time; and a second round would be the first once more.
SECONDS: Final = 10.0
MOST_ROUNDS: Final = 1
USUAL: Final = Size(seconds=SECONDS)
# With --brief.
SMALL: Final = Size(endpoints=6, clients=3, seconds=SECONDS)
# With --fleets. Work grows with the fleet, so that a machine like this one can give it something to do.
FLEETS: Final = (
    Size(endpoints=3, clients=3),
    Size(endpoints=20, clients=10),
    Size(endpoints=100, clients=1000, most=250_000),
    Size(endpoints=1_000, clients=200, work=0.1, most=100_000),
    Size(endpoints=10_000, clients=100, work=0.1, most=100_000),
    Size(endpoints=100_000, clients=4, work=0.1, most=20_000),
)


def runs(peers: Peers, sizes: tuple[Size, ...] | None = None) -> list[Run]:
    """One run for each scenario, fleet and balancer. `sizes` None: the usual fleet, or the small one where the run is brief."""
    return [
        Run(
            f"{name}/{'usual' if size is None else f'{size.endpoints}x{size.clients}'}",
            mode,
            in_process(
                "benchmarks.simulate:work",
                scenario=name,
                mode=mode,
                size=None if size is None else asdict(size),
                config=lambda: peers.mesh([], is_private=False),
            ),
        )
        for size in sizes or (None,)
        for name, scenario in SCENARIOS.items()
        for mode in scenario.modes
    ]


def work(scenario: str, mode: str, size: dict[str, float] | None, config: str, seconds: float) -> dict[str, float]:
    """In a process of its own. A policy that this build's engine doesn't have is absent."""
    if size is None:
        chosen = SMALL if seconds < 1 else replace(USUAL, seconds=seconds)
    else:
        chosen = Size(**size)  # type: ignore[arg-type]
    begun = time.perf_counter()
    try:
        figures = play(scenario, mode, chosen, config)
    except ValueError as error:
        if "client plan" in str(error) and "unknown variant" in str(error):
            raise Absent(f"this build has no policy {mode}") from None
        raise
    return {**figures, "rps": figures["calls"] / (time.perf_counter() - begun)}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.simulate", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--scenario", action="append", choices=list(SCENARIOS), help="only this one; again for more")
    parser.add_argument("--policy", action="append", choices=[*POLICIES, *VARIANTS], help="only this one; again for more")
    parser.add_argument("--endpoints", type=int, default=USUAL.endpoints, metavar="N", help="3 to 100,000 (%(default)s)")
    parser.add_argument(
        "--clients", type=int, default=USUAL.clients, metavar="N", help="processes that call, to 1,000 (%(default)s)"
    )
    parser.add_argument("--seconds", type=float, default=USUAL.seconds, metavar="S", help="of virtual time (%(default)s)")
    parser.add_argument("--seed", type=int, default=USUAL.seed, metavar="N", help="of all chance (%(default)s)")
    parser.add_argument("--work", type=float, default=USUAL.work, metavar="S", help="mean work of a call (%(default)s)")
    parser.add_argument("--most", type=int, default=USUAL.most, metavar="N", help="usual calls, at most (%(default)s)")
    parser.add_argument("--fleets", action="store_true", help="a list of fleets from 3 to 100,000 endpoints in place of one")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows, one JSON object per line")
    given = parser.parse_args(arguments)
    if not (3 <= given.endpoints <= 100_000 and 1 <= given.clients <= 1_000):
        parser.error("--endpoints is 3 to 100000, --clients 1 to 1000")
    if given.seconds < 3 or given.work <= 0 or given.most < 1:
        parser.error("--seconds is at least 3, --work and --most are above 0")
    one = Size(given.endpoints, given.clients, given.seconds, given.seed, given.work, given.most)
    sizes = tuple(replace(size, seed=given.seed) for size in FLEETS) if given.fleets else (one,)
    everything = []
    with contextlib.ExitStack() as stack:
        peers = Peers(Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="meshlib-bench-"))), stack)
        for size in sizes:
            wanted = [
                run
                for run in runs(peers, (size,))
                if (given.scenario is None or run.case.partition("/")[0] in given.scenario)
                and (given.policy is None or run.mode in given.policy)
            ]
            results = Results("simulate", PRIMARY)
            _measure(results, wanted, size.seconds)
            print(f"\n{size.endpoints:,} endpoints, {size.clients:,} callers, {size.seconds:g} virtual seconds, seed {size.seed}")
            show(results)
            everything.append(results)
    if given.json:
        write_json(given.json, [row for results in everything for row in results.rows()])
    return 1 if any(results.broken for results in everything) else 0


def _measure(results: Results, wanted: list[Run], seconds: float) -> None:
    """As many at a time as there are cores: no clock of this machine is read for the figures."""

    def take(run: Run) -> None:
        try:
            found = run.measure(seconds)
        except Absent as reason:
            results.skipped[run.case, run.mode] = str(reason)
        except Broken as error:
            results.broken[run.case, run.mode] = str(error)
        else:
            results.values[run.case, run.mode] = {name: [value] for name, value in found.items()}

    for run in wanted:
        results.values[run.case, run.mode] = {}
    with ThreadPoolExecutor(len(cores())) as pool:
        for done, _ in enumerate(pool.map(take, wanted), 1):
            if sys.stderr.isatty():
                sys.stderr.write(f"\r\x1b[Ksimulate {done}/{len(wanted)}")
    if sys.stderr.isatty():
        sys.stderr.write("\r\x1b[K")


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(main())
