"""Which benchmarks are run, for how long, and where do the numbers go?

`python -m benchmarks` runs every script, `python -m benchmarks client --rounds 5` one of them. The table goes to the terminal, with
`--json FILE` one object per line and number goes to a file. The exit code is 1 if a mode broke (not if a peer was absent).
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
from pathlib import Path
from types import FrameType

from .harness import Results, write_json
from .peers import Peers
from .table import print_head, print_results

SCRIPTS = ("client", "handshake", "decide", "server", "start")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description="Measure the mesh and its peers in one interleaved run."
    )
    parser.add_argument("scripts", nargs="*", metavar="script", help=f"of {', '.join(SCRIPTS)}; default: all")
    parser.add_argument("--rounds", type=int, metavar="N", help="how often each mode is measured (default 5; with --brief 1)")
    parser.add_argument("--seconds", type=float, metavar="S", help="how long each time (default 2.5; with --brief 0.5)")
    parser.add_argument("--brief", action="store_true", help="one short round: is it all there? Not for figures")
    parser.add_argument("--case", action="append", metavar="GLOB", help="only these cases, as in 'get/mtls/*'; again for more")
    parser.add_argument("--mode", action="append", metavar="GLOB", help="only these modes, as in 'meshlib*'; again for more")
    parser.add_argument("--seed", type=int, metavar="N", help="of the order in which the modes are run (default: by chance)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows, one JSON object per line")
    given = parser.parse_args(arguments)
    for script in given.scripts:
        if script not in SCRIPTS:
            parser.error(f"there is no script {script!r}: choose from {', '.join(SCRIPTS)}")
    rounds = given.rounds or (1 if given.brief else 5)
    seconds = given.seconds or (0.5 if given.brief else 2.5)
    if rounds < 1 or seconds <= 0:
        parser.error("--rounds and --seconds are above 0")

    signal.signal(signal.SIGTERM, _leave)
    order = random.Random(given.seed)
    print_head(rounds, seconds)
    everything: list[Results] = []
    for name in given.scripts or SCRIPTS:
        script = importlib.import_module(f"benchmarks.{name}")
        with contextlib.ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="meshlib-bench-")))
            runs = [
                run
                for run in script.runs(Peers(folder, stack))
                if _is_wanted(run.case, given.case) and _is_wanted(run.mode, given.mode)
            ]
            results = Results(name, script.PRIMARY)
            results.measure(runs, rounds, seconds, order)
        print_results(results, script.compared(results), has_ratios=script.HAS_RATIOS)
        everything.append(results)
        if given.json:
            write_json(given.json, everything)
    return 1 if any(results.broken for results in everything) else 0


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
