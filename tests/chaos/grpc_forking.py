"""What becomes of gRPC channels when `multiprocessing` makes processes? Run by test_grpc_fork.

`python -m tests.chaos.grpc_forking CONFIG fork|spawn aio|sync CASE` makes three processes, each of which makes calls, and prints as a line
of JSON what each of them says, or that it hangs. The cases are about the channel:

    after    each process makes its own; the parent (with fork) has loaded the mesh, and has called nobody
    unused   the parent made it, and only the children call on it
    used     the parent has called on it
    anew     the parent has called on one, which is open, and each child makes another
    closed   the same, but the parent has closed its own before
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import os
import sys
from multiprocessing.connection import Connection
from typing import Any

import meshlib
from tests.chaos.grpc_served import COUNT, ECHO

CHILDREN, CALLS, PATIENCE = 3, 40, 12.0

ways: dict[str, Any] = {}


def opened(mesh: Any, kind: str) -> Any:
    return mesh.grpc_channel("inventory") if kind == "aio" else mesh.sync_grpc_channel("inventory")


def call(channel: Any, kind: str, *, is_closed: bool = False) -> None:
    if kind == "aio":
        asyncio.run(_call(channel, is_closed=is_closed))
        return
    for _ in range(CALLS):
        assert channel.unary_unary(ECHO)(b"x", timeout=5) == b"x"
    assert list(channel.unary_stream(COUNT)(b"2 0", timeout=5)) == [b"0", b"1"]
    if is_closed:
        channel.close()


async def _call(channel: Any, *, is_closed: bool) -> None:
    for _ in range(CALLS):
        assert await channel.unary_unary(ECHO)(b"x", timeout=5) == b"x"
    assert [each async for each in channel.unary_stream(COUNT)(b"2 0", timeout=5)] == [b"0", b"1"]
    if is_closed:
        await channel.close()


def child(pipe: Connection, config: str, kind: str) -> None:
    said = {"fault": "", "reason": "", "is_meshs": False}
    try:
        mesh = ways.get("mesh") or meshlib.Mesh.load(config, service="me")
        call(ways.get("channel") or opened(mesh, kind), kind)
    except Exception as error:
        said = {
            "fault": f"{type(error).__name__}: {error}",
            "reason": getattr(error, "reason", ""),
            "is_meshs": isinstance(error, meshlib.MeshError),
        }
    pipe.send(said)
    pipe.close()
    os._exit(0)  # how a child ends that has a channel, and one that it must not touch, is not asked here


def main(config: str, method: str, kind: str, case: str) -> None:
    made: Any = multiprocessing.get_context(method)
    if method == "fork":
        ways["mesh"] = mesh = meshlib.Mesh.load(config, service="me").start()
        if case != "after":
            ways["channel"] = opened(mesh, kind)
        if case in ("used", "anew", "closed"):
            call(ways["channel"], kind, is_closed=case == "closed")
        if case in ("anew", "closed"):
            ways["parents"] = ways.pop("channel")
    said, begun = [], []
    for _ in range(CHILDREN):
        here, there = made.Pipe(duplex=False)
        process = made.Process(target=child, args=(there, config, kind))
        process.start()
        there.close()
        begun.append((process, here))
    for process, here in begun:
        answer: Any = {"fault": "hangs", "reason": "", "is_meshs": False}
        if here.poll(PATIENCE):
            try:
                answer = here.recv()
            except EOFError:
                answer = {"fault": "died", "reason": "", "is_meshs": False}
        said.append(answer)
        process.join(2)
        if process.is_alive():
            process.kill()
            process.join()
    is_well = True
    if case in ("used", "anew") and kind == "sync":  # the loop to which the other belongs has ended
        try:
            call(ways.get("channel") or ways["parents"], kind)
        except Exception as error:
            is_well = False
            print(repr(error), file=sys.stderr)
    print(json.dumps({"children": said, "parent": is_well}), flush=True)
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
