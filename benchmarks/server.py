"""What does a call cost the service that answers it, in the mesh and without it?

One process of uvicorn with Starlette, and one worker of gunicorn with eight threads and Flask, under wrk with 32 kept-alive connections,
plain. `bare` is the application alone; `meshlib` has canonical paths, authorisation (mode observe: judged and told, not refused),
limits, metrics and trace context; `otel` is OpenTelemetry's own middleware with its SDK, and `meshlib-otel` the mesh with the
same SDK. `cpu_us` is the CPU of the server's processes per call. wrk is a closed loop: its p99 is what its own connections saw.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from .harness import Comparison, Results, Run
from .machine import cpu_of
from .peers import ANSWER, Absent, Broken, Peers, free_port, program, running

PRIMARY = "rps"
HAS_RATIOS = True
CONNECTIONS = 32
MODES = ("meshlib", "bare", "otel", "meshlib-otel")
_SCRIPT = """
done = function(summary, latency, requests)
  local failed = summary.errors.connect + summary.errors.read + summary.errors.write + summary.errors.status + summary.errors.timeout
  io.write(string.format('\\nRESULT {"calls":%d,"us":%d,"failed":%d,"p50":%f,"p99":%f}\\n',
    summary.requests, summary.duration, failed, latency:percentile(50), latency:percentile(99)))
end
"""


def runs(peers: Peers) -> list[Run]:
    def run(server: str, mode: str) -> Run:
        return Run(f"{server}/plain/c={CONNECTIONS}", mode, lambda seconds: _measure(peers, server, mode, seconds))

    return [run(server, mode) for server in ("uvicorn", "gunicorn") for mode in MODES]


def compared(results: Results) -> list[Comparison]:
    found = []
    for server in ("uvicorn", "gunicorn"):
        case = f"{server}/plain/c={CONNECTIONS}"
        added = results.difference((case, "meshlib"), (case, "bare"), "cpu_us")
        if added is not None:
            found.append(Comparison(f"CPU µs that the mesh adds to a call: {server}", added, "no bound yet"))
    return found


def _measure(peers: Peers, server: str, mode: str, seconds: float) -> dict[str, float]:
    wrk = program("wrk", "Debian: wrk")
    script = peers.folder / "wrk.lua"
    script.write_text(_SCRIPT)
    length = max(1, round(seconds))  # wrk counts whole seconds
    with _serving(peers, server, mode) as (port, pid):
        url = f"http://127.0.0.1:{port}/items/7"
        with urllib.request.urlopen(url, timeout=10) as answer:
            if answer.read() != ANSWER:
                raise Broken("a wrong answer")
        _load(wrk, script, url, 1)
        before = cpu_of(pid)
        said = _load(wrk, script, url, length)
        spent = cpu_of(pid) - before
    calls = said["calls"]
    if not calls or said["failed"]:
        raise Broken(f"{said['failed']:.0f} of {calls:.0f} calls failed")
    return {"rps": calls / said["us"] * 1e6, "cpu_us": spent / calls * 1e6, "p50_us": said["p50"], "p99_us": said["p99"]}


@contextlib.contextmanager
def _serving(peers: Peers, server: str, mode: str) -> Iterator[tuple[int, int]]:
    """A server on a free port: (port, pid)."""
    kind = "asgi" if server == "uvicorn" else "wsgi"
    for package in ("uvicorn", "starlette", "httptools") if kind == "asgi" else ("gunicorn", "flask"):
        _need(package)
    if "otel" in mode:
        _need("opentelemetry.sdk")
    if mode == "otel":
        _need(f"opentelemetry.instrumentation.{kind}")
    port, python = free_port(), sys.executable
    app = f"benchmarks.apps:{kind}" + {"otel": "_otel", "meshlib-otel": "_traced"}.get(mode, "")
    if mode.startswith("meshlib"):
        allow = [{"name": "readers", "from": ["*"], "methods": ["GET"], "paths": ["/items/*"]}]
        config = peers.mesh([], is_private=False, secure={"allow": allow})
        command = [program("meshlib", "this project: make build"), "serve", f"{app}()", "--config", config, "--service", "orders"]
        command += ["--listen", f"127.0.0.1:{port}", f"--{kind}", "--threads", "8"]
    elif kind == "asgi":
        command = [python, "-m", "uvicorn", "--factory", app, "--port", str(port), "--no-access-log", "--log-level", "warning"]
    else:
        command = [python, "-m", "gunicorn", f"{app}()", "-b", f"127.0.0.1:{port}", "-k", "gthread", "--threads", "8"]
        command += ["--keep-alive", "30", "--worker-tmp-dir", "/dev/shm" if Path("/dev/shm").is_dir() else str(peers.folder)]
    with running(peers.folder, *command, port=port) as child:
        yield port, child.pid


def _need(package: str) -> None:
    try:
        found = find_spec(package)
    except ModuleNotFoundError:
        found = None
    if found is None:
        raise Absent(f"the package {package} is not installed")


def _load(wrk: str, script: Path, url: str, seconds: int) -> dict[str, float]:
    command = [wrk, "-t1", f"-c{CONNECTIONS}", f"-d{seconds}s", "--latency", "-s", str(script), url]
    done = subprocess.run(command, capture_output=True, text=True, timeout=seconds + 30, check=False)
    found = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if not found:
        raise Broken(f"wrk: {(done.stderr or done.stdout)[-500:]}")
    made: dict[str, float] = json.loads(found[0].removeprefix("RESULT "))
    return made
