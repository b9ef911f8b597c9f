"""Where do the spans go, and do they get there?

A real OpenTelemetry collector (rotel) that takes OTLP over HTTP, counts what it has decoded, and passes it on to nowhere. Without one a
process looks quick that only throws its spans away: so each run asks afterwards how many have arrived. It is a program of its own
and shares the machine with the server, as on many a node: what it costs is told beside what the server costs.

It is found in this environment, or in `.venv-peers`. Its words are read from its log, one line for each request that it took.
"""

from __future__ import annotations

import contextlib
import json
import time
from importlib.util import find_spec
from pathlib import Path

from .peers import ROOT, Absent, free_port, running

# Seconds without a new span after which all are there. What was under way is written by then.
QUIET = 0.3


class Receiver:
    """A collector that runs, and is stopped with `stack`."""

    def __init__(self, folder: Path, stack: contextlib.ExitStack) -> None:
        port, beside = free_port(), free_port()
        program = found()
        command = [program, "start", "--exporter", "blackhole", "--debug-log", "traces", "--log-format", "json"]
        command += ["--otlp-http-endpoint", f"127.0.0.1:{port}", "--otlp-grpc-endpoint", f"127.0.0.1:{beside}"]
        self.pid = stack.enter_context(running(folder, *command, port=port)).pid
        self.url = f"http://127.0.0.1:{port}/v1/traces"
        self._log = folder / f"{Path(program).name}-{port}.log"

    def spans(self) -> int:
        """How many have come so far, when no more come."""
        count, since = self._count(), time.monotonic()
        while time.monotonic() - since < QUIET:
            time.sleep(0.05)
            if (now := self._count()) != count:
                count, since = now, time.monotonic()
        return count

    def _count(self) -> int:
        lines = self._log.read_bytes().splitlines()
        return sum(json.loads(line)["spans"] for line in lines if b'"Received traces."' in line and line.endswith(b"}"))


def found() -> str:
    """The collector's path. It is in a package and not among the commands, so no shell finds it."""
    spec = find_spec("rotel")
    folders = [Path(place) for place in (spec and spec.submodule_search_locations) or ()]
    folders += (ROOT / ".venv-peers").glob("lib/python*/site-packages/rotel")
    for folder in folders:
        if (folder / "rotel-agent").exists():
            return str(folder / "rotel-agent")
    raise Absent("there is no OTLP receiver: rotel is not installed (PyPI: rotel==0.0.1a15, here or in .venv-peers)")
