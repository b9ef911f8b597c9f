"""What does a process hold after thousands of gRPC calls that it didn't hold before? Run by test_grpc_flat.

`python -m tests.chaos.grpc_flat CONFIG aio|sync CALLS SECONDS` makes so many calls of every kind as the service `me`, after a fifth as many
to warm up, and prints as JSON what it held before and after them. It stops early when the seconds are over. Of twenty calls, three are
streams, one of which is left in the middle, two are cancelled, and two fail. Each answer is compared; `wrong` has what differed.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
import json
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import grpc

import meshlib
from tests.chaos.grpc_served import CHAT, COUNT, ECHO, FAIL
from tests.chaos.inbound_server import memory

# Callers at once.
LOOP, THREADS = 32, 8

BODY = b"x" * 1000
FIVE = [b"0", b"1", b"2", b"3", b"4"]
TALK = [b"a", b"b"]
REPLIES = [b"re: a", b"re: b"]
CODES = {18: "NOT_FOUND", 19: "INTERNAL"}

wrong: list[str] = []
kinds: Counter[str] = Counter()


def expect(kind: str, *pair: Any) -> None:
    kinds[kind] += 1
    if pair[0] != pair[1] and len(wrong) < 20:
        wrong.append(f"{kind}: {pair[0]!r} is not {pair[1]!r}")


class Spell:
    """So many calls, or so many seconds, whatever is over first."""

    def __init__(self, calls: int, end: float) -> None:
        self.calls = calls
        self.end = end
        self.numbers = itertools.count()
        self.done = 0

    def __iter__(self) -> Iterator[int]:
        while (number := next(self.numbers)) < self.calls and time.monotonic() < self.end:
            yield number
            self.done += 1


def held(tasks: int) -> dict[str, float]:
    for _ in range(3):
        gc.collect()
    return {
        "rss": memory(os.getpid()),
        "descriptors": len(os.listdir("/proc/self/fd")),
        "threads": len(os.listdir("/proc/self/task")),
        "tasks": tasks,
        "objects": len(gc.get_objects()),
    }


# ------------------------------------------------------------------ with a loop


async def one_aio(stubs: dict[str, Any], kind: int) -> None:
    if kind == 0:
        expect("stream", [each async for each in stubs["count"](b"5 0")], FIVE)
    elif kind == 1:
        stream = stubs["count"](b"1000 0")
        first = await stream.read()
        stream.cancel()
        expect("left stream", first, b"0")
    elif kind == 2:
        expect("conversation", [each async for each in stubs["chat"](iter(TALK))], REPLIES)
    elif kind == 3:
        call = stubs["echo"](BODY)
        await asyncio.sleep(0)
        call.cancel()
        try:
            await call
        except asyncio.CancelledError:
            expect("cancelled", call.cancelled(), True)
    elif kind == 4:
        task = asyncio.ensure_future(waited(stubs["echo"](BODY)))
        await asyncio.sleep(0)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        expect("cancelled task", task.cancelled(), True)
    elif kind in CODES:
        try:
            await stubs["fail"](CODES[kind].encode())
        except grpc.RpcError as error:
            expect("failing", error.code(), grpc.StatusCode[CODES[kind]])
    else:
        expect("unary", await stubs["echo"](BODY), BODY)


async def waited(call: Any) -> Any:
    return await call


async def by_aio(mesh: Any, spells: list[Spell]) -> list[dict[str, float]]:
    found = []
    async with mesh.grpc_channel("inventory") as channel:
        stubs = {
            "echo": channel.unary_unary(ECHO),
            "count": channel.unary_stream(COUNT),
            "chat": channel.stream_stream(CHAT),
            "fail": channel.unary_unary(FAIL),
        }

        async def work(spell: Spell) -> None:
            for number in spell:
                await one_aio(stubs, number % 20)

        for spell in spells:
            async with asyncio.TaskGroup() as group:
                for _ in range(LOOP):
                    group.create_task(work(spell))
            await asyncio.sleep(0.3)
            found.append(held(len(asyncio.all_tasks())))
    return found


# ------------------------------------------------------------------ with threads


def one_blocking(stubs: dict[str, Any], kind: int) -> None:
    if kind == 0:
        expect("stream", list(stubs["count"](b"5 0")), FIVE)
    elif kind == 1:
        stream = stubs["count"](b"1000 0")
        first = next(stream)
        stream.cancel()
        expect("left stream", first, b"0")
    elif kind == 2:
        expect("conversation", list(stubs["chat"](iter(TALK))), REPLIES)
    elif kind in (3, 4):
        future = stubs["echo"].future(BODY)
        future.cancel()
        expect("cancelled", future.cancelled(), True)
    elif kind in CODES:
        try:
            stubs["fail"](CODES[kind].encode())
        except grpc.RpcError as error:
            expect("failing", error.code(), grpc.StatusCode[CODES[kind]])
    else:
        expect("unary", stubs["echo"](BODY), BODY)


def by_threads(mesh: Any, spells: list[Spell]) -> list[dict[str, float]]:
    found = []
    with mesh.sync_grpc_channel("inventory") as channel:
        stubs = {
            "echo": channel.unary_unary(ECHO),
            "count": channel.unary_stream(COUNT),
            "chat": channel.stream_stream(CHAT),
            "fail": channel.unary_unary(FAIL),
        }

        def work(spell: Spell) -> None:
            try:
                for number in spell:
                    one_blocking(stubs, number % 20)
            except Exception as error:
                wrong.append(repr(error))

        for spell in spells:
            threads = [threading.Thread(target=work, args=(spell,)) for _ in range(THREADS)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            time.sleep(0.5)
            found.append(held(0))
    return found


def main(config: str, kind: str, calls: int, seconds: float) -> None:
    mesh, begun = meshlib.Mesh.load(config, service="me"), time.monotonic()
    spells = [Spell(calls // 5, begun + seconds / 4), Spell(calls, begun + seconds)]
    before, after = asyncio.run(by_aio(mesh, spells)) if kind == "aio" else by_threads(mesh, spells)
    in_flight = sum(row["in_flight"] for row in mesh.engine.stats(time.monotonic()))
    said = {"done": spells[1].done, "seconds": time.monotonic() - begun, "before": before, "after": after}
    print(json.dumps({**said, "in_flight": in_flight, "wrong": wrong, "kinds": kinds}))
    mesh.close()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), float(sys.argv[4]))
