"""What becomes of each call of a service whose calls go by the agent of its node?

`python -m tests.chaos.node_caller CONFIG SERVICE KIND RATE [CALL] [CONFIG]` calls `orders` (KIND async or blocking) or `stock`
(grpc) so many times a second, from the first answer until TERM, and then prints one line of JSON. CALL is `GET /items`, if nothing else.

    calls     one row each: when it was due, the seconds from then to its end, how it failed or ""
    sent      one row for each that had an answer: when it began, its seconds, who carried it, by which mesh, its answer
    states    what became of the agent, as this process knows it, and when
    stats     how many attempts went by the agent, and why others didn't

With a second mesh.yaml each other call goes by a mesh of that one, so that two ways can be compared under the same load. `once` in the
place of the rate makes one call. The moments are those of a clock that all processes of the machine share. It prints `ready` when the
load begins, and calls without a pause until somebody answers for the first time.
"""

from __future__ import annotations

import json
import logging
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import meshlib
from tests.chaos.grpc_shop import Load
from tests.chaos.node_app import WHO

EVERY = 0.004
PATIENCE = 20.0


class Notes:
    """What was seen. Written by the threads of the load; `states` by the one that watches."""

    def __init__(self) -> None:
        self.sent: list[tuple[float, float, str, int, str]] = []
        self.states: list[tuple[float, str]] = []

    def watch(self, mesh: meshlib.Mesh) -> None:
        def look() -> None:
            while mesh.delegation is not None:
                state = mesh.delegation.watch.state
                if not self.states or self.states[-1][1] != state:
                    self.states.append((time.monotonic(), state))
                time.sleep(EVERY)

        threading.Thread(target=look, daemon=True).start()

    def answered(self, begun: float, answer: Any, by: int = 0) -> None:
        took = time.monotonic() - begun
        carried = answer.extensions["meshlib.call"].record().get("carried", [])
        if answer.status_code != 200:
            raise RuntimeError(f"{answer.status_code}: {answer.text}")
        self.sent.append((begun, took, "+".join(carried), by, answer.text))


def main(config: str, service: str, kind: str, rate: str, call: str = "GET /items", other: str = "") -> None:
    logging.basicConfig(level=logging.WARNING, stream=sys.stdout, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("meshlib.client").setLevel(logging.INFO)
    is_told = threading.Event()
    signal.signal(signal.SIGTERM, lambda number, frame: is_told.set())
    meshes = [meshlib.Mesh.load(each, service=service) for each in (config, other) if each]
    notes, load = Notes(), Load(0.0 if rate == "once" else float(rate))
    begin, ask = _KINDS[kind](load, meshes, notes, *call.split())
    end = time.monotonic() + PATIENCE
    while True:
        try:
            told = ask()
            break
        except Exception as error:
            if rate == "once" or time.monotonic() > end:
                told = " ".join(f"{type(error).__name__}: {error}".split())
                break
            time.sleep(0.05)
    print("told", told, flush=True)
    if rate != "once":
        notes.sent.clear()
        notes.watch(meshes[0])
        begin()
        print("ready", flush=True)
        while not is_told.wait(0.1):
            pass
        load.stop()
        stats = meshes[0].delegation.stats() if meshes[0].delegation is not None else {}
        calls = [(one.due, one.took, one.fault) for one in load.done]
        print("result", json.dumps({"calls": calls, "sent": notes.sent, "states": notes.states, "stats": stats}), flush=True)
    for mesh in meshes:
        mesh.close()


Start = tuple[Callable[[], Any], Callable[[], str]]


def _async(load: Load, meshes: list[meshlib.Mesh], notes: Notes, method: str, target: str) -> Start:
    async def drive(load: Load) -> None:
        clients = [mesh.client() for mesh in meshes]

        async def call(number: int) -> None:
            by = number % len(clients)
            begun = time.monotonic()
            notes.answered(begun, await clients[by].request(method, f"http://orders{target}"), by)

        await load.drive(call)
        for client in clients:
            await client.aclose()

    def ask() -> str:
        with meshes[0].sync_client() as client:
            answer = client.request(method, f"http://orders{target}")
            return f"{answer.status_code} {answer.text}"

    return lambda: load.in_loop(drive), ask


def _blocking(load: Load, meshes: list[meshlib.Mesh], notes: Notes, method: str, target: str) -> Start:
    clients = [mesh.sync_client() for mesh in meshes]

    def call(number: int) -> None:
        by = number % len(clients)
        begun = time.monotonic()
        notes.answered(begun, clients[by].request(method, f"http://orders{target}"), by)

    def ask() -> str:
        answer = clients[0].request(method, f"http://orders{target}")
        return f"{answer.status_code} {answer.text}"

    return lambda: load.in_threads(call, 64), ask


def _grpc(load: Load, meshes: list[meshlib.Mesh], notes: Notes, method: str, target: str) -> Start:
    wait = target.partition("?wait=")[2].encode()
    # One of aio for the load, and one of threads for the first question.
    who = meshes[0].sync_grpc_channel("stock", idempotent=["/test.Stock/*"]).unary_unary(WHO)

    async def drive(load: Load) -> None:
        async with meshes[0].grpc_channel("stock", idempotent=["/test.Stock/*"]) as channel:
            ask = channel.unary_unary(WHO)

            async def call(number: int) -> None:
                begun = time.monotonic()
                text = (await ask(wait, timeout=8.0)).decode()
                notes.sent.append((begun, time.monotonic() - begun, "", 0, text))

            await load.drive(call)

    return lambda: load.in_loop(drive), lambda: "200 " + who(b"", timeout=8.0).decode()


_KINDS: dict[str, Callable[..., Start]] = {"async": _async, "blocking": _blocking, "grpc": _grpc}


if __name__ == "__main__":
    main(*sys.argv[1:])
