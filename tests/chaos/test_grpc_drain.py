"""Is a stream dropped, or does a call fail, when one of three gRPC servers is told to end?

Three processes with servers of asyncio or of threads, two hundred unary calls a second, and thirty streams of a second and a half open at
any time; then `kill -TERM` to one of them, and while it stops a crowd that calls without a pause, so that calls come in at the very moment at
which it closes. Every stream that could end within the grace has to get its last message, also the conversations that were begun before
the signal and go on for two seconds after it. No unary call may fail, since the other two take them: all are idempotent, which the streams of
requests are not helped by, so that no new ones begin after the signal. The process is gone as soon as its streams are, with the code 0.
"""

from __future__ import annotations

import asyncio
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.chaos.grpc_served import CHAT, COUNT, ECHO
from tests.chaos.grpc_shop import Load, Shop, backends, percentile
from tests.support import free_port

CALLS, STREAMS, TALKS, CROWD = 200.0, 20.0, 12, 12
MESSAGES, PAUSE = 10, 0.15
NUMBERS = [b"%d" % number for number in range(MESSAGES)]

# Before the signal, and the time for which conversations go on after it.
BEFORE, AFTER = 2.0, 2.0
WAIT, GRACE = 0.3, 8.0

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]


class Talks:
    """Conversations: each says a word, waits for the answer, and again, until it is over."""

    def __init__(self) -> None:
        self.is_over = False
        self.faults: list[str] = []
        self.words: list[int] = []
        self.is_crowded = False
        self.crowd = 0

    async def one(self, channel: Any) -> None:
        said = 0
        try:
            chat = channel.stream_stream(CHAT)()
            while not self.is_over:
                await chat.write(b"%d" % said)
                assert await chat.read() == b"re: %d" % said
                said += 1
                await asyncio.sleep(PAUSE)
            await chat.done_writing()
            assert [each async for each in chat] == []
        except Exception as error:
            self.faults.append(f"after {said} words: {error!r}")
        self.words.append(said)

    async def hurry(self, echo: Any) -> None:
        """One of a crowd that calls without a pause while the server stops: its calls come in at the very moment."""
        while not self.is_over:
            if not self.is_crowded:
                await asyncio.sleep(0.02)
                continue
            self.crowd += 1
            try:
                assert await echo(b"x") == b"x"
            except Exception as error:
                self.faults.append(f"in the crowd: {error!r}")


def ways_of(mesh: Any, calls: Load, streams: Load, talks: Talks) -> Any:
    """The whole load, by one channel in one loop."""

    async def main(_: Load) -> None:
        async with mesh.grpc_channel("inventory") as channel:
            echo, count = channel.unary_unary(ECHO), channel.unary_stream(COUNT)

            async def call(number: int) -> None:
                assert await echo(b"%d" % number) == b"%d" % number

            async def stream(number: int) -> None:
                found = [message async for message in count(b"%d %g" % (MESSAGES, PAUSE))]
                assert found == NUMBERS, f"{len(found)} messages"

            talking = [talks.one(channel) for _ in range(TALKS)]
            hurrying = [talks.hurry(echo) for _ in range(CROWD)]
            await asyncio.gather(calls.drive(call), streams.drive(stream), *talking, *hurrying)

    return main


def moments(seconds: float) -> Iterator[float]:
    """Until so many seconds have gone."""
    begun = time.monotonic()
    while (now := time.monotonic()) < begun + seconds:
        yield now
        time.sleep(0.02)


@pytest.mark.parametrize("kind", ["aio", "sync"])
def test_no_stream_is_dropped_when_a_server_is_told_to_end(tmp_path: Path, kind: str) -> None:
    shop = Shop(tmp_path, "inventory")
    ports = [free_port() for _ in range(3)]
    addresses = {"inventory": [f"127.0.0.1:{port}" for port in ports]}
    inbound = {"drain": {"wait": f"{WAIT}s", "grace": f"{GRACE}s"}}
    config = shop.write(addresses, inbound=inbound)
    calls, streams, talks = Load(CALLS), Load(STREAMS), Talks()
    with backends(config, *[("inventory", kind)] * 3, ports=ports) as three, shop.mesh(addresses, inbound=inbound) as mesh:
        calls.in_loop(ways_of(mesh, calls, streams, talks))
        time.sleep(BEFORE)
        one = three[0]
        assert one.child is not None
        begun, whole = one.tell()["streams"]
        talks.is_crowded = True
        told = time.monotonic()
        one.send(signal.SIGTERM)
        code, took = None, 0.0
        for now in moments(AFTER):
            talks.is_crowded = now < told + WAIT + 0.7
            if code is None and (code := one.child.poll()) is not None:
                took = now - told
        talks.is_over = True
        if code is None:
            try:
                code = one.child.wait(WAIT + GRACE + 2 - AFTER)
            except subprocess.TimeoutExpired:
                code = -999
            took = time.monotonic() - told
        time.sleep(0.5)
        streams.stop()
        calls.stop()
        said = [backend.tell()["streams"] for backend in three[1:]]
        complaints = [line for backend in three for line in backend.complaints()]
        retries = sum(row["retries"] for row in mesh.engine.stats(time.monotonic()) if row["endpoint"] == "")
    print(
        f"\n{kind}: {begun - whole} streams under way at it, gone after {took:.1f} s with {code}; {len(calls.done)} calls, p99 "
        f"{percentile(calls.done, 0.99):.0f} ms, {len(calls.faults)} failed, {retries} tried again; {len(streams.done)} streams, "
        f"{len(streams.faults)} dropped; {len(talks.words)} conversations of {min(talks.words)} words or more; "
        f"{talks.crowd} calls of the crowd; {len(talks.faults)} of both failed"
    )
    assert (calls.faults, streams.faults, talks.faults) == ([], [], [])
    # There was something to be lost: streams, and among them conversations.
    assert begun - whole >= 5
    assert talks.crowd >= 200
    assert len(calls.done) >= 0.9 * CALLS * (BEFORE + AFTER)
    assert len(streams.done) >= 0.9 * STREAMS * (BEFORE + AFTER)
    assert min(talks.words) >= 0.5 * (BEFORE + AFTER) / PAUSE
    # It ends when they do, neither before nor long after.
    assert code == 0, one.said()
    assert AFTER - 0.2 <= took < AFTER + 2.5
    assert all(began == ended for began, ended in said)
    assert complaints == []
