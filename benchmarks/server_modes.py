"""How is each server started?

`meshlib` is `meshlib serve`: canonical paths, authorisation, limits, metrics, and a trace in which the share `sample` is recorded with
OpenTelemetry's SDK; `meshlib-no-sdk` the same without the SDK, so that the trace is only carried. The others are the servers as
their own commands start them, without an access log: `bare`; `ssl`, uvicorn with Python's ssl, which wants a certificate of the same
CA and knows no rule; `otel`, OpenTelemetry's middleware with the same SDK; `otel-lean`, the same with as few spans as the mesh makes.
One process with one loop, or one worker; with uvloop and httptools where they are uvicorn's choice.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .peers import Absent, Peers, free_port, program, running

# Which application, of `apps.py`, behind `asgi` and `wsgi`.
APPS = {"bare": "", "ssl": "", "meshlib-no-sdk": "", "meshlib": "_traced", "otel": "_otel", "otel-lean": "_otel_lean"}
# Spans that a recorded call has.
SPANS = {"otel": 3}
THREADS = {"gunicorn": 8, "gunicorn-sync": 1}
NEEDED = {"asgi": ("uvicorn", "starlette", "httptools", "uvloop"), "wsgi": ("gunicorn", "flask")}


@dataclass(frozen=True)
class Served:
    """A server that listens. `pid` is that of its first process."""

    port: int
    pid: int


def is_traced(mode: str) -> bool:
    """Has it the SDK, and so somebody to send spans to?"""
    return bool(APPS[mode])


@contextlib.contextmanager
def serving(peers: Peers, server: str, mode: str, *, sample: float, is_private: bool = False) -> Iterator[Served]:
    kind = "asgi" if server == "uvicorn" else "wsgi"
    for package in NEEDED[kind]:
        _need(package)
    variables = {}
    if is_traced(mode):
        for package in ("opentelemetry.sdk", "opentelemetry.exporter.otlp.proto.http"):
            _need(package)
        if mode.startswith("otel"):
            _need(f"opentelemetry.instrumentation.{kind}")
        variables = {
            # The mesh decides by `observe.sample` which calls are recorded, before the SDK does: it would draw a second time.
            "OTEL_TRACES_SAMPLER": "parentbased_always_on" if mode == "meshlib" else "parentbased_traceidratio",
            "OTEL_TRACES_SAMPLER_ARG": str(sample),
            "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": peers.receiver.url,
            "NO_PROXY": "127.0.0.1",
        }
    port = free_port()
    app = f"benchmarks.apps:{kind}{APPS[mode]}"
    if mode.startswith("meshlib"):
        command = _mesh(peers, f"{app}()", port, kind, THREADS.get(server, 8), sample, is_private=is_private)
    elif kind == "asgi":
        command = [sys.executable, "-m", "uvicorn", "--factory", app, "--port", str(port), "--no-access-log"]
        # As the mesh serves: neither a middleware for proxies nor a header that names the server.
        command += ["--no-proxy-headers", "--no-server-header"]
        command += ["--log-level", "warning", *(_ssl(peers) if mode == "ssl" else ())]
    else:
        command = [sys.executable, "-m", "gunicorn", f"{app}()", "-b", f"127.0.0.1:{port}", "--keep-alive", "30"]
        command += ["-k", "sync"] if THREADS[server] == 1 else ["-k", "gthread", "--threads", str(THREADS[server])]
        command += ["--worker-tmp-dir", "/dev/shm" if Path("/dev/shm").is_dir() else str(peers.folder)]
    with running(peers.folder, *command, port=port, env=variables) as child:
        yield Served(port, child.pid)


def _mesh(peers: Peers, app: str, port: int, kind: str, threads: int, sample: float, *, is_private: bool) -> list[str]:
    rule: dict[str, Any] = {"name": "readers", "methods": ["GET"], "paths": ["/items/*"]}
    config = peers.mesh(
        [],
        is_private=is_private,
        sample=sample,
        secure={"allow": [{**rule, "from": ["me"] if is_private else ["*"]}]},
        # Nobody looks whether it is ready, so it need not wait until all have seen that it is not.
        inbound={"drain": {"wait": 0}},
    )
    command = [program("meshlib", "this project: make build"), "serve", app, "--config", config, "--service", "orders"]
    return [*command, "--listen", f"127.0.0.1:{port}", f"--{kind}", "--threads", str(threads)]


def _ssl(peers: Peers) -> list[str]:
    own = Path(peers.identities) / "orders"
    required = "2"  # ssl.CERT_REQUIRED
    files = ["--ssl-keyfile", f"{own}/key.pem", "--ssl-certfile", f"{own}/svid.pem", "--ssl-ca-certs", f"{own}/bundle.pem"]
    return [*files, "--ssl-cert-reqs", required]


def _need(package: str) -> None:
    try:
        found = find_spec(package)
    except ModuleNotFoundError:
        found = None
    if found is None:
        raise Absent(f"the package {package} is not installed")
