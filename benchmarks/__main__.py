"""Which benchmarks are run, for how long, and where do the numbers go?

`python -m benchmarks` runs every script, `python -m benchmarks client --rounds 5` one of them, with those that measure the rest of its
goals. The tables go to the terminal, the goals as the last of them; with `--json FILE` one object per line and number goes to a file. The
exit code is 1 if a mode broke, not if a peer was absent or a goal is missed.
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import importlib
import random
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from .goals import Verdict, judged
from .harness import Results, write_json
from .peers import Peers
from .table import print_goals, print_head, print_results

SCRIPTS = (
    "client",
    "handshake",
    "memory",
    "decide",
    "guard",
    "discover",
    "etcd",
    "simulate",
    "server",
    "grpc_calls",
    "agent",
    "abuse",
    "start",
)
# How long each mode is measured each time, unless its script says otherwise.
SECONDS, BRIEF_SECONDS = 2.5, 0.1


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description="Measure the mesh and its peers in one interleaved run."
    )
    parser.add_argument("scripts", nargs="*", metavar="script", help=f"of {', '.join(SCRIPTS)}; default: all")
    parser.add_argument("--rounds", type=int, metavar="N", help="how often each mode is measured (default 5; with --brief 1)")
    parser.add_argument(
        "--seconds", type=float, metavar="S", help="how long each time (default: the script's own; with --brief 0.1)"
    )
    parser.add_argument("--brief", action="store_true", help="one short round: is it all there? Not for figures")
    parser.add_argument("--case", action="append", metavar="GLOB", help="only these cases, as in 'get/mtls/*'; again for more")
    parser.add_argument("--mode", action="append", metavar="GLOB", help="only these modes, as in 'meshlib*'; again for more")
    parser.add_argument("--seed", type=int, metavar="N", help="of the order in which the modes are run (default: by chance)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows, one JSON object per line")
    given = parser.parse_args(arguments)
    for script in given.scripts:
        if script not in SCRIPTS:
            parser.error(f"there is no script {script!r}: choose from {', '.join(SCRIPTS)}")
    if (given.rounds is not None and given.rounds < 1) or (given.seconds is not None and given.seconds <= 0):
        parser.error("--rounds and --seconds are above 0")
    rounds = given.rounds or (1 if given.brief else 5)

    signal.signal(signal.SIGTERM, _leave)
    order = random.Random(given.seed)
    print_head(rounds, is_brief=given.brief)
    everything: list[Results] = []
    verdicts: list[Verdict] = []
    for name in _with_companions(given.scripts or SCRIPTS):
        script = importlib.import_module(f"benchmarks.{name}")
        seconds = given.seconds or (BRIEF_SECONDS if given.brief else getattr(script, "SECONDS", SECONDS))
        with contextlib.ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="meshlib-bench-")))
            runs = [
                run
                for run in script.runs(Peers(folder, stack))
                if _is_wanted(run.case, given.case) and _is_wanted(run.mode, given.mode)
            ]
            results = Results(name, script.PRIMARY)
            results.measure(runs, min(rounds, getattr(script, "MOST_ROUNDS", rounds)), seconds, order)
        if hasattr(script, "show"):
            script.show(results)
        else:
            print_results(results, script.compared(results) if hasattr(script, "compared") else [], has_ratios=script.HAS_RATIOS)
        everything.append(results)
        verdicts = judged(everything)
        if given.json:
            rows = [row for each in everything for row in each.rows()]
            write_json(given.json, rows + [verdict.row() for verdict in verdicts if verdict.has_figure])
    print_goals(verdicts)
    return 1 if any(results.broken for results in everything) else 0


def _with_companions(names: Sequence[str]) -> list[str]:
    """Each script once, followed by those that measure the rest of its goals."""
    found: dict[str, None] = {}
    for name in names:
        script = importlib.import_module(f"benchmarks.{name}")
        found.update(dict.fromkeys((name, *getattr(script, "WITH", ()))))
    return list(found)


def _is_wanted(name: str, globs: list[str] | None) -> bool:
    return globs is None or any(fnmatch.fnmatchcase(name, glob) for glob in globs)


def _leave(number: int, frame: FrameType | None) -> None:
    # As an exception, so that every peer is stopped on the way out.
    raise SystemExit(128 + number)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
