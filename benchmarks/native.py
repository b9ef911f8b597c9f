"""What does the engine take where Python has no part in it?

The figures come from examples of the Rust crate (`meshlib/_native/core/examples`), which are built when the first of them is asked for,
and run in a process of their own. They print one JSON object. `cargo bench -p mesh-core` measures the same calls with criterion; here they
are rounds among others, with goals. Without cargo there is nothing to measure.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import cache, partial
from typing import Final

from .peers import ROOT, Absent, Broken

NATIVE: Final = ROOT / "meshlib" / "_native"
# Seconds that an example may take on top of the time that it measures: a large mesh is made first.
PATIENCE: Final = 60.0


def by_example(example: str, *arguments: str, is_timed: bool = True) -> Callable[[float], dict[str, float]]:
    """A measurement by an example, called with these arguments and, if it is timed, the seconds."""
    return partial(_run, example, arguments, is_timed)


def _run(example: str, arguments: tuple[str, ...], is_timed: bool, seconds: float) -> dict[str, float]:
    command = [built()[example], *arguments, *([f"{seconds:g}"] if is_timed else [])]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE + 10 * seconds, check=False)
    except subprocess.TimeoutExpired:
        raise Broken("no result in time") from None
    if done.returncode:
        raise Broken(f"exit code {done.returncode}: {(done.stderr.strip().splitlines() or ['no word'])[-1]}")
    found: dict[str, float] = json.loads(done.stdout)
    return found


@cache
def built() -> dict[str, str]:
    """The examples by name, where cargo put them."""
    if shutil.which("cargo") is None:
        raise Absent("cargo is not installed")
    print("building the examples of the engine (a minute the first time)", file=sys.stderr, flush=True)
    command = ["cargo", "build", "--release", "--locked", "--quiet", "-p", "mesh-core", "--examples", "--message-format=json"]
    done = subprocess.run(command, cwd=NATIVE, capture_output=True, text=True, check=False)
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.startswith("error")]
        raise Broken(f"the examples of the engine were not built: {(said or ['no word'])[0]}")
    told = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {each["target"]["name"]: each["executable"] for each in told if "example" in each.get("target", {}).get("kind", ())}
