"""What does a call cost its caller, in the mesh and without it?

One GET of 54 bytes of JSON from nginx with one worker, by `c` callers at once on one event loop (`t`: by threads). The mesh has
everything on: route, balance over two endpoints, breaker, limits, budget, metrics, trace context, and in `mtls` mutual TLS with SPIFFE
identities; the peers have mutual TLS with the same certificates, and nothing else. `httpx-envoy-pair` is how a mesh is made
otherwise: a stock client and two sidecars. The clients themselves are in `client_modes.py`. It measures no large bodies and no errors.
"""

from __future__ import annotations

from .harness import Comparison, Results, Run, in_process
from .peers import Peers

PRIMARY = "rps"
HAS_RATIOS = True
WORK = "benchmarks.client_modes:"
PLAIN_PEERS = ("httpx", "aiohttp", "pyreqwest", "streams")
# The mesh's own layers: what is left when the shell of httpx goes, and when the mesh goes too.
LAYERS = ("meshlib-way", "meshlib-wire")

# What is wanted of the mesh with everything on: at 1 call, and at 64 (or 8 threads).
MESH, TRANSPORT, SYNC = ("get/mtls", "meshlib"), ("get/mtls", "meshlib-transport"), ("get/mtls", "meshlib-sync")
WANTED = (
    (MESH, ("get/plain", "httpx"), "c", 64, (6.0, 50.0), "stock httpx, plain, no mesh"),
    (MESH, ("get/mtls", "httpx-envoy-pair"), "c", 64, (6.0, 40.0), "stock httpx through two Envoys, mTLS"),
    (MESH, ("get/mtls", "aiohttp"), "c", 64, (1.5, 3.0), "aiohttp, mTLS, no mesh"),
    (MESH, ("get/mtls", "pyreqwest"), "c", 64, (1.2, 1.2), "pyreqwest, mTLS, no mesh"),
    (MESH, ("get/mtls", "streams"), "c", 64, (0.8, 0.6), "asyncio streams over ssl: the limit"),
    (TRANSPORT, ("get/mtls", "httpx"), "c", 64, (2.5, 10.0), "meshlib as a transport, stock httpx, mTLS"),
    (SYNC, ("get/mtls", "httpx-sync"), "t", 8, (3.0, 15.0), "the blocking client, httpx.Client, mTLS"),
)


def runs(peers: Peers) -> list[Run]:
    found = []
    for is_private in (False, True):
        wire = "mtls" if is_private else "plain"
        for count in (1, 64):
            modes = ["meshlib", "meshlib-transport", *LAYERS, *PLAIN_PEERS]
            if is_private:
                modes.insert(5, "httpx-envoy-pair")
            found += [_run(peers, f"get/{wire}/c={count}", mode, "uvloop", count, is_private=is_private) for mode in modes]
        for count in (1, 64):
            modes = ["meshlib", "meshlib-transport", "streams"]
            found += [
                _run(peers, f"get-asyncio/{wire}/c={count}", mode, "asyncio", count, is_private=is_private) for mode in modes
            ]
        for count in (1, 8):
            modes = ["meshlib-sync", "httpx-sync", "pyreqwest-sync"]
            found += [_run(peers, f"get/{wire}/t={count}", mode, "threads", count, is_private=is_private) for mode in modes]
    return found


def _run(peers: Peers, case: str, mode: str, loop: str, count: int, *, is_private: bool) -> Run:
    def target() -> str:
        if mode == "httpx-envoy-pair":
            return peers.envoy_pair
        return (peers.private if is_private else peers.plain)[0]

    job = in_process(
        WORK + ("threads" if loop == "threads" else "tasks"),
        mode=mode,
        loop=loop,
        count=count,
        is_private=is_private and mode != "httpx-envoy-pair",
        address=target,
        addresses=lambda: peers.private if is_private else peers.plain,
        config=lambda: (peers.private_mesh if is_private else peers.plain_mesh) if mode.startswith("meshlib") else "",
        identity=lambda: f"{peers.identities}/me" if is_private else "",
    )
    return Run(case, mode, job)


def compared(results: Results) -> list[Comparison]:
    """The mesh with everything on against each peer, maybe in another case."""
    found = []
    for (our_case, ours), (their_case, theirs), letter, many, wanted, label in WANTED:
        for count, least in zip((1, many), wanted, strict=True):
            at = f"/{letter}={count}"
            ratio = results.ratio((our_case + at, ours), (their_case + at, theirs), "rps")
            if ratio is not None:
                found.append(Comparison(f"calls/s: {ours} / {label}, {letter}={count}", ratio, f"≥ {least:g}"))
    for count in (1, 64):
        way, wire = ((f"get/mtls/c={count}", mode) for mode in LAYERS)
        added = results.difference(way, wire, "cpu_us")
        if added is not None:
            found.append(Comparison(f"CPU µs that the mesh adds to its own wire client, c={count}", added, "≤ 4"))
    return found
