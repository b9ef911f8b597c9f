"""What does a gRPC call cost, with the mesh on one of its sides or on both, and without it?

Messages of 1 KiB as bytes, so that no generated code is in the figures, by `c` callers at once: tasks of one event loop (`-aio`, uvloop)
or threads (`-sync`). `unary` is one message each way, `added` the CPU that the mesh's channel adds to it, taken by turns with grpcio's own in one process,
`stream` the messages of one endless response, `chat` messages to and fro on one stream. Who answers `unary`, `added` and `stream` in plain text is nginx: a
server in Python needs twice the CPU of the client, and would hide what the client costs. Over mutual TLS and in `served` it is a server of
grpcio, since it is half of what is compared there.

`bare` is grpcio as it comes, `bare-no-retries` without its retries, which the mesh turns off too, `grpc-xds` grpcio with its own balancer and a control
plane, `envoy-pair` grpcio through two sidecars. The clients are in `grpc_modes.py`, their other sides in `grpc_peers.py`, what is wanted in
`goals.py`. It measures no errors, no large messages, and not how long an endpoint that comes or goes takes to be known.
"""

from __future__ import annotations

from typing import Any, Final

from .grpc_peers import GrpcPeers, echoing
from .harness import Comparison, Results, Run, in_process
from .machine import cores, pin
from .peers import Peers

PRIMARY = "rps"
HAS_RATIOS = True
SECONDS = 1.5
WORK = "benchmarks.grpc_modes:"
PLAIN: Final = {
    "unary-aio/plain/c=1": ("meshlib", "bare", "bare-no-retries"),
    "unary-aio/plain/c=64": ("meshlib", "bare", "bare-no-retries", "grpc-xds"),
    "unary-sync/plain/c=1": ("meshlib", "bare", "bare-no-retries"),
    "unary-sync/plain/c=64": ("meshlib", "bare", "bare-no-retries"),
    "added-aio/plain/c=1": ("meshlib",),
    "added-aio/plain/c=64": ("meshlib",),
    "added-sync/plain/c=1": ("meshlib",),
    "stream-aio/plain/c=1": ("meshlib", "bare"),
    "chat-aio/plain/c=1": ("meshlib", "bare"),
}
PRIVATE: Final = {f"unary-aio/mtls/c={count}": ("meshlib", "meshlib-relay", "bare", "envoy-pair") for count in (1, 64)}
SERVED: Final = {f"served-{kind}/plain/c=64": ("meshlib", "bare") for kind in ("aio", "sync")}
# How the mesh's channel proves the server: by gRPC's own TLS, or behind a relay by ours.
CHECKS: Final = {"meshlib": "dns", "meshlib-relay": "spiffe"}
# The server's side of `added`.
BY_TURNS: Final = {f"added-{case}": case for case in SERVED}


def runs(peers: Peers) -> list[Run]:
    sides = GrpcPeers(peers)
    return [
        *(_plain(sides, case, mode) for case, modes in PLAIN.items() for mode in modes),
        *(_private(sides, case, mode) for case, modes in PRIVATE.items() for mode in modes),
        *(_served(sides, case, mode) for case, modes in SERVED.items() for mode in modes),
        *(_served(sides, case, "meshlib", by_turns_as=name) for name, case in BY_TURNS.items()),
    ]


def compared(results: Results) -> list[Comparison]:
    """Who had no more to give? Cores of the side that is meant to limit the other."""
    found = []
    for case, side in {
        "unary-aio/plain/c=64": "the client",
        "unary-sync/plain/c=64": "the client",
        "stream-aio/plain/c=1": "the client",
        **dict.fromkeys(SERVED, "the server"),
    }.items():
        for mode in ("meshlib", "bare"):
            rps, used = (results.median(case, mode, metric) for metric in ("rps", "cpu_us"))
            if rps is not None and used is not None:
                found.append(Comparison(f"cores that {side} used: {case} {mode}", rps * used / 1e6, ""))
    return found


def _what(case: str) -> tuple[str, str, int]:
    """`unary`, `aio` and 64 of `unary-aio/plain/c=64`."""
    name, _, count = case.split("/")
    what, _, kind = name.partition("-")
    return what, kind, int(count.removeprefix("c="))


def _plain(sides: GrpcPeers, case: str, mode: str) -> Run:
    what, kind, count = _what(case)
    work = {"added": f"added_{kind}", "unary": "threads" if kind == "sync" else "tasks"}.get(what, "tasks")

    def address() -> str:
        return sides.echo if what == "chat" else sides.answers

    job = in_process(
        WORK + work,
        mode=mode,
        what="unary" if what == "added" else what,
        count=count,
        address=address,
        config=lambda: sides.mesh(address()) if mode == "meshlib" else "",
        bootstrap=lambda: sides.bootstrap if mode == "grpc-xds" else "",
    )
    # The messages of an endless response are no turn-taking: one side writes while the other reads.
    return Run(case, mode, job, is_serial=count == 1 and what != "stream")


def _private(sides: GrpcPeers, case: str, mode: str) -> Run:
    _, _, count = _what(case)

    def address() -> str:
        if mode.startswith("meshlib"):
            return sides.mesh_echo
        return sides.envoy_pair if mode == "envoy-pair" else sides.tls_echo

    job = in_process(
        WORK + "tasks",
        mode=mode,
        what="unary",
        count=count,
        address=address,
        config=lambda: sides.mesh(address(), peer_check=CHECKS[mode]) if mode in CHECKS else "",
        identity=lambda: f"{sides.peers.identities}/me" if mode == "bare" else "",
    )
    return Run(case, mode, job, is_serial=count == 1)


def _served(sides: GrpcPeers, case: str, mode: str, *, by_turns_as: str = "") -> Run:
    """The same bare client for both. `cpu_us` is the server's here."""
    _, kind, count = _what(case)

    def measure(seconds: float) -> dict[str, float]:
        own = cores()
        with echoing(sides.peers, kind, config=sides.server_mesh() if mode == "meshlib" else "") as served:
            if len(own) > 1:
                # A core each: the server needs more than the client, and so is what limits both.
                pin(served.pid, {own[-1]})
            job: dict[str, Any] = {"mode": "bare", "what": "unary", "count": count, "address": served.address}
            job |= {"pid": served.pid, "core": own[0] if len(own) > 1 else None}
            if by_turns_as:
                return in_process(WORK + "added_served", beside=served.beside, **job)(seconds)
            return in_process(WORK + "loaded", **job)(seconds)

    return Run(by_turns_as or case, mode, measure)
