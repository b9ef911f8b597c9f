"""What does a call cost the service that answers it, in the mesh and without it?

One process of uvicorn with Starlette, one worker of gunicorn with Flask: with eight threads (`gunicorn`), and of the kind that takes one call
at a time and closes (`gunicorn-sync`). Over plain TCP wrk asks on 32 connections; `uvicorn-otlp` is the same with every call recorded,
where elsewhere it is one of a hundred. In every mode that makes spans a collector takes them, and how many came is told: `spans` for
each call, `dropped` the percentage that did not arrive where all should. Over mutual TLS a client in Python opens
connections (`connect-full`, `connect-resumed`), and the mesh's own wire client keeps them (`kept`). Modes: `server_modes.py`. `cpu_us` is the
CPU of the server's processes for a call or a connection, all of it; wrk is a closed loop: its p99 is what its own connections saw.

Server, collector and client share the machine. Only in `kept` the server has a core of its own, to be what limits the rest.
"""

from __future__ import annotations

import urllib.request
from typing import Final

from . import wrk
from .harness import Comparison, Results, Run, in_process
from .machine import cores, cpu_of, pin
from .peers import ANSWER, Broken, Peers, program
from .server_modes import SPANS, is_traced, serving

PRIMARY = "rps"
HAS_RATIOS = True
# wrk counts whole seconds.
SECONDS = 3.0
CONNECTIONS: Final = 32
# The share of the calls that is recorded, where not all are.
SAMPLE: Final = 0.01
# Of the names of cases: the server, and the share.
WRK: Final = {"uvicorn": ("uvicorn", SAMPLE), "uvicorn-otlp": ("uvicorn", 1.0)} | {
    server: (server, SAMPLE) for server in ("gunicorn-sync", "gunicorn")
}
MODES: Final = {
    "uvicorn": ("meshlib", "meshlib-no-sdk", "bare", "otel", "otel-lean"),
    "uvicorn-otlp": ("meshlib", "bare", "otel", "otel-lean"),
    "gunicorn-sync": ("meshlib", "meshlib-no-sdk", "bare", "otel"),
    "gunicorn": ("meshlib", "meshlib-no-sdk", "bare", "otel"),
}


def runs(peers: Peers) -> list[Run]:
    def asked(what: str, mode: str) -> Run:
        return Run(f"{what}/plain/c={CONNECTIONS}", mode, lambda seconds: _ask(peers, what, mode, seconds))

    def connected(kind: str, mode: str) -> Run:
        # One connection at a time: both sides take turns.
        return Run(f"connect-{kind}/mtls/c=1", mode, lambda seconds: _connect(peers, kind, mode, seconds), is_serial=True)

    def kept(mode: str) -> Run:
        return Run(f"kept/mtls/c={CONNECTIONS}", mode, lambda seconds: _keep(peers, mode, seconds))

    return [
        *(asked(what, mode) for what, modes in MODES.items() for mode in modes),
        *(connected(kind, mode) for kind in ("full", "resumed") for mode in ("meshlib", "ssl")),
        *(kept(mode) for mode in ("meshlib", "meshlib-no-sdk", "ssl")),
    ]


def compared(results: Results) -> list[Comparison]:
    found = []
    for server in ("uvicorn", "gunicorn-sync", "gunicorn"):
        case = f"{server}/plain/c={CONNECTIONS}"
        added = results.difference((case, "meshlib"), (case, "bare"), "cpu_us")
        if added is not None:
            found.append(Comparison(f"CPU µs that the mesh adds to a call: {server}", added, "no bound yet"))
    otlp, kept = f"uvicorn-otlp/plain/c={CONNECTIONS}", f"kept/mtls/c={CONNECTIONS}"
    found += _shares(results, otlp, ("meshlib", "otel"), {"cpu_us": "the server", "receiver_us": "the receiver"})
    found += _shares(results, kept, ("meshlib", "ssl"), {"cpu_us": "the server", "client_us": "the client"})
    return found


def _shares(results: Results, case: str, modes: tuple[str, ...], sides: dict[str, str]) -> list[Comparison]:
    """How many cores each side has used: who was it that had no more to give?"""
    found = []
    for mode in modes:
        rps = results.median(case, mode, "rps")
        for metric, side in sides.items():
            used = results.median(case, mode, metric)
            if rps is not None and used is not None:
                found.append(Comparison(f"cores that {side} used: {case} {mode}", rps * used / 1e6, ""))
    return found


# --- plain, by wrk


def _ask(peers: Peers, what: str, mode: str, seconds: float) -> dict[str, float]:
    server, sample = WRK[what]
    program("wrk", "Debian: wrk")
    # A sync worker keeps no connection, and says so; a client that knows it from the start waits for nothing.
    options = ["-H", "Connection: close"] if what == "gunicorn-sync" else []
    receiver = peers.receiver if is_traced(mode) else None
    had = receiver.spans() if receiver else 0
    with serving(peers, server, mode, sample=sample) as served:
        own = cores()
        if len(own) > 1:
            # The server on one core, who asks on the others: a process with a second thread is not moved about between them.
            pin(served.pid, {own[-1]})
        url = f"http://127.0.0.1:{served.port}/items/7"
        with urllib.request.urlopen(url, timeout=10) as answer:
            if answer.read() != ANSWER:
                raise Broken("a wrong answer")
        warm = wrk.load(peers, url, CONNECTIONS, 1, options)
        before, beside = cpu_of(served.pid), cpu_of(receiver.pid) if receiver else 0.0
        said = wrk.load(peers, url, CONNECTIONS, seconds, options)
        spent, beside = cpu_of(served.pid) - before, (cpu_of(receiver.pid) - beside) if receiver else 0.0
    calls = said["calls"]
    if not calls or said["failed"]:
        raise Broken(f"{said['failed']:.0f} of {calls:.0f} calls failed")
    found = {"rps": calls / said["us"] * 1e6, "cpu_us": spent / calls * 1e6, "p50_us": said["p50"], "p99_us": said["p99"]}
    if receiver is None:
        return found
    # The server has ended, and has sent what was waiting. What wrk left half-way is not among its calls: some tens.
    each = (receiver.spans() - had) / (1 + warm["calls"] + calls)
    found |= {"receiver_us": beside / calls * 1e6, "spans": each}
    return found | {"dropped": max(0.0, 100 - 100 * each / SPANS.get(mode, 1))} if sample == 1.0 else found


# --- mutual TLS


def _connect(peers: Peers, kind: str, mode: str, seconds: float) -> dict[str, float]:
    with serving(peers, "uvicorn", mode, sample=SAMPLE, is_private=True) as served:
        job = {"port": served.port, "pid": served.pid, "identity": f"{peers.identities}/me", "is_resumed": kind == "resumed"}
        return in_process("benchmarks.server_tls:connects", **job)(seconds)


def _keep(peers: Peers, mode: str, seconds: float) -> dict[str, float]:
    own = cores()
    with serving(peers, "uvicorn", mode, sample=SAMPLE, is_private=True) as served:
        address = f"127.0.0.1:{served.port}"
        if len(own) > 1:
            pin(served.pid, {own[-1]})
        return in_process(
            "benchmarks.server_tls:kept",
            pid=served.pid,
            core=own[0] if len(own) > 1 else None,
            mode="meshlib-wire",
            loop="uvloop",
            count=CONNECTIONS,
            is_private=True,
            addresses=[address],
            config=peers.mesh([address], is_private=True),
            identity=f"{peers.identities}/me",
        )(seconds)
