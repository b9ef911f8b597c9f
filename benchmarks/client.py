"""What does a call cost its caller, in the mesh and without it?

One GET of 54 bytes of JSON from nginx with one worker, by `c` callers at once on one event loop (`t`: by threads). The mesh has
everything on: route, balance over two endpoints, breaker, limits, budget, metrics, trace context, and in `mtls` mutual TLS with SPIFFE
identities; the peers have mutual TLS with the same certificates, and nothing else. `httpx-envoy-pair` is how a mesh is made
otherwise: a stock client and two sidecars. `get-2-workers` is a service with a process for each of two cores, whose handlers have
work of their own; `get-1MiB` a large body; `added` the CPU of the mesh's layers above its own wire client, taken by turns in one
process. The clients themselves are in `client_modes.py`, what is wanted of them in `goals.py`. It measures no uploads and no errors,
and what a large body does to memory is asked in `memory.py`.
"""

from __future__ import annotations

from functools import cache

from .harness import Run, in_processes
from .peers import LARGE, LARGE_PATH, Peers
from .worker import steps_of

PRIMARY = "rps"
HAS_RATIOS = True
# Shorter than elsewhere: there are many modes, and the rounds tell more than their length.
SECONDS = 1.0
# Goals of the outbound path that another script measures.
WITH = ("handshake", "memory")
WORK = "benchmarks.client_modes:"
PEERS = ("httpx", "aiohttp", "pyreqwest", "streams")
# The mesh's own layers: what is left when the shell of httpx goes, and when the mesh goes too.
LAYERS = ("meshlib-way", "meshlib-wire")
# What a handler does of its own for each call, in seconds of pure Python.
OWN_WORK = 67e-6


def runs(peers: Peers) -> list[Run]:
    found = []
    for wire in ("plain", "mtls"):
        for count in (1, 64):
            modes = ["meshlib", "meshlib-transport", *LAYERS, *PEERS]
            if wire == "mtls":
                modes.insert(5, "httpx-envoy-pair")
            found += [_run(peers, "get", wire, count, mode) for mode in modes]
        for count in (1, 64):
            modes = ["meshlib", "meshlib-transport", "streams"]
            found += [_run(peers, "get-asyncio", wire, count, mode, loop="asyncio") for mode in modes]
        for count in (1, 8):
            modes = ["meshlib-sync", "httpx-sync", "pyreqwest-sync"]
            found += [_run(peers, "get", wire, count, mode, loop="threads") for mode in modes]
    for count in (1, 64):
        found += [_run(peers, "get-2-workers", "mtls", count, mode, processes=2) for mode in ("meshlib", "pyreqwest")]
    for count in (1, 8):
        found += [_run(peers, "get-1MiB", "mtls", count, mode, is_large=True) for mode in ("meshlib", *PEERS[1:])]
    for count in (1, 64):
        found += [_run(peers, "added", "mtls", count, mode, work="added") for mode in ("meshlib", LAYERS[0])]
    return found


def _run(
    peers: Peers,
    what: str,
    wire: str,
    count: int,
    mode: str,
    *,
    work: str = "",
    loop: str = "uvloop",
    processes: int = 1,
    is_large: bool = False,
) -> Run:
    is_private = wire == "mtls"

    def addresses() -> list[str]:
        if mode == "httpx-envoy-pair":
            return [peers.envoy_pair]
        if processes > 1:
            return peers.roomy
        return peers.private if is_private else peers.plain

    def config() -> str:
        if not mode.startswith("meshlib"):
            return ""
        if processes > 1:
            return peers.roomy_mesh
        return peers.private_mesh if is_private else peers.plain_mesh

    job = in_processes(
        processes,
        WORK + (work or ("threads" if loop == "threads" else "tasks")),
        mode=mode,
        loop=loop,
        count=count,
        is_private=is_private and mode != "httpx-envoy-pair",
        addresses=addresses,
        config=config,
        identity=lambda: f"{peers.identities}/me" if is_private else "",
        **({"path": LARGE_PATH, "length": LARGE} if is_large else {}),
        **({"steps": _steps} if processes > 1 else {}),
    )
    letter = "t" if loop == "threads" else "c"
    # A large body is no turn-taking: one side encrypts while the other decrypts.
    is_serial = count == 1 and processes == 1 and not is_large
    return Run(f"{what}/{wire}/{letter}={count}", mode, job, is_serial)


@cache
def _steps() -> int:
    # Once for the whole run, so that all modes do the same work and not the same guess of it.
    return steps_of(OWN_WORK)
