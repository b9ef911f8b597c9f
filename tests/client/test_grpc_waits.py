"""When does a gRPC call wait, repeat itself or go out twice, in every way of waiting? Real servers on loopback, asyncio and threads."""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from meshlib import errors
from meshlib.client.grpc import open_channel, open_sync_channel, sync_client_interceptors

SUPPORT = Path(__file__).parent.parent / "grpc_support"
sys.path.insert(0, str(SUPPORT))
from grpc_world import CHAT, COUNT, ECHO, FAIL, SLOW, SUM, Backend, Party, Shop, until, yaml_of  # noqa: E402

StatusCode = grpc.StatusCode
IDEMPOTENT = (("x-mesh-idempotent", "1"),)
IN_TURN = "retry: {attempts: 1, backoff: [0.001, 0.002]}\nbalance: {policy: round_robin}"
HEDGED = (
    "retry: {attempts: 0, hedge: true, hedge_least: 30ms, hedge_share: 1.0, budget: {per_second: 100}}\n"
    "balance: {policy: round_robin}"
)


class World:
    """Two backends in a thread's own loop, so that blocking callers can be tested beside asyncio's."""

    def __init__(self, folder: Path, **terms: Any) -> None:
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()
        self.shop = Shop(folder, yaml_of("observe", **terms))
        self.a, self.b = self.run(self.shop.start("a")), self.run(self.shop.start("b"))
        self.party: Party = self.shop.party("storefront").knows([self.a.address, self.b.address])

    def run(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(20)

    def end(self) -> None:
        self.run(self.shop.stop())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(10)
        self.loop.close()


@pytest.fixture
def world(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[World]:
    world = World(tmp_path, **getattr(request, "param", {"more": IN_TURN}))
    yield world
    world.end()


@pytest.fixture
async def channel(world: World) -> AsyncIterator[Any]:
    async with open_channel(world.party, "inventory") as channel:
        yield channel


@pytest.fixture
def blocking(world: World) -> Iterator[Any]:
    with open_sync_channel(world.party, "inventory") as channel:
        yield channel


def free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def idle(world: World) -> bool:
    return bool(world.party.of()["in_flight"] == 0)


def wait_for(condition: Any) -> None:
    end = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < end, "it never came to hold"
        time.sleep(0.005)


# ------------------------------------------------------------------------------------------------ wait for ready


async def test_a_call_that_waits_for_ready_waits_for_the_first_endpoint(world: World, channel: Any) -> None:
    """Without an endpoint others fail at once; this one is answered when discovery has found one."""
    world.party.knows([])
    with pytest.raises(errors.NoEndpoint):
        await channel.unary_unary(ECHO)(b"x")
    call = channel.unary_unary(ECHO)(b"x", wait_for_ready=True)
    stream = channel.unary_stream(COUNT)(b"2", wait_for_ready=True)
    await asyncio.sleep(0.2)
    assert (call.done(), stream.done()) == (False, False)
    world.party.knows([world.a.address])
    assert await call == b"x"
    assert [message async for message in stream] == [b"0", b"1"]
    await until(lambda: idle(world))


async def test_a_call_that_waits_for_ready_waits_for_a_server_to_come_up(world: World, channel: Any) -> None:
    """Nobody listens where the only endpoint should be, until somebody does."""
    address = f"127.0.0.1:{free_port()}"
    world.party.knows([address])
    call = channel.unary_unary(ECHO)(b"x", wait_for_ready=True)
    await asyncio.sleep(0.3)
    assert not call.done()
    late = Backend(world.shop.party("inventory"), "late")
    await late.listen(address)
    assert await call == b"x"
    await late.stop()


async def test_waiting_for_ready_ends_with_the_deadline(world: World, channel: Any) -> None:
    """Nothing is sent, and the caller is told when its own time is over."""
    world.party.knows(["127.0.0.1:1"])
    begun = time.monotonic()
    with pytest.raises(grpc.RpcError) as caught:
        await channel.unary_unary(ECHO)(b"x", timeout=0.3, wait_for_ready=True)
    assert caught.value.code() in (StatusCode.UNAVAILABLE, StatusCode.DEADLINE_EXCEEDED)
    assert 0.25 <= time.monotonic() - begun < 2
    await until(lambda: idle(world))


async def test_what_was_sent_is_not_waited_for(world: World, channel: Any) -> None:
    """A server that answers UNAVAILABLE was there: the call fails as it would without wait_for_ready."""
    with pytest.raises(grpc.RpcError) as caught:
        await channel.unary_unary(FAIL)(b"UNAVAILABLE", wait_for_ready=True)
    assert caught.value.code() is StatusCode.UNAVAILABLE
    assert world.a.calls + world.b.calls == 1


async def test_a_waiting_call_can_be_cancelled(world: World, channel: Any) -> None:
    """Nothing is left of it."""
    world.party.knows([])
    call = channel.unary_unary(ECHO)(b"x", wait_for_ready=True)
    await asyncio.sleep(0.05)
    assert call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert (call.cancelled(), await call.code(), idle(world)) == (True, StatusCode.CANCELLED, True)


def test_a_thread_waits_for_ready_too(world: World, blocking: Any) -> None:
    """In with_call, future and a stream of answers."""
    world.party.knows([])
    threading.Timer(0.2, lambda: world.party.knows([world.a.address])).start()
    assert blocking.unary_unary(ECHO)(b"x", wait_for_ready=True) == b"x"
    world.party.knows([])
    threading.Timer(0.2, lambda: world.party.knows([world.a.address])).start()
    assert list(blocking.unary_stream(COUNT)(b"2", wait_for_ready=True)) == [b"0", b"1"]
    world.party.knows([])
    threading.Timer(0.2, lambda: world.party.knows([world.a.address])).start()
    assert blocking.unary_unary(ECHO).future(b"y", wait_for_ready=True).result(5) == b"y"
    wait_for(lambda: idle(world))


# ------------------------------------------------------------------------------------------------ hedges


@pytest.mark.parametrize("world", [{"more": HEDGED}], indirect=True)
async def test_a_slow_call_is_asked_of_another_endpoint_beside_it(world: World, channel: Any) -> None:
    """One of two endpoints hangs: idempotent calls are answered by the other, and nothing is left of the slow ones."""
    echo = channel.unary_unary(ECHO)
    for _ in range(120):
        await echo(b"x", metadata=IDEMPOTENT)
    world.a.delay = 5.0
    took = []
    for _ in range(6):
        begun = time.monotonic()
        assert await echo(b"x", metadata=IDEMPOTENT, timeout=4) == b"x"
        took.append(time.monotonic() - begun)
    assert max(took) < 1.0
    assert world.party.of()["hedges"] >= 1
    await until(lambda: idle(world))


@pytest.mark.parametrize("world", [{"more": HEDGED}], indirect=True)
async def test_a_call_that_is_not_idempotent_is_not_doubled(world: World, channel: Any) -> None:
    """However slow it is."""
    world.a.delay = world.b.delay = 0.4
    assert await channel.unary_unary(ECHO)(b"x") == b"x"
    assert (world.a.calls + world.b.calls, world.party.of()["hedges"]) == (1, 0)


@pytest.mark.parametrize("world", [{"more": HEDGED}], indirect=True)
def test_a_thread_hedges_too(world: World, blocking: Any) -> None:
    """gRPC's threads move the second attempt."""
    echo = blocking.unary_unary(ECHO)
    for _ in range(120):
        echo(b"x", metadata=IDEMPOTENT)
    world.a.delay = 5.0
    begun = time.monotonic()
    for _ in range(6):
        assert echo(b"x", metadata=IDEMPOTENT, timeout=4) == b"x"
    assert time.monotonic() - begun < 4.0
    assert world.party.of()["hedges"] >= 1
    wait_for(lambda: idle(world))


@pytest.mark.parametrize("world", [{"more": HEDGED}], indirect=True)
async def test_the_caller_of_a_hedged_call_that_gives_up_leaves_nothing(world: World, channel: Any) -> None:
    """Both attempts are cancelled."""
    echo = channel.unary_unary(ECHO)
    for _ in range(120):
        await echo(b"x", metadata=IDEMPOTENT)
    world.a.delay = world.b.delay = 30.0
    task = asyncio.ensure_future(echo(b"x", metadata=IDEMPOTENT))
    await asyncio.sleep(0.3)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await until(lambda: idle(world))


# ------------------------------------------------------------------------------------------------ one attempt's time, permits


@pytest.mark.parametrize(
    "world",
    [{"more": "retry: {attempts: 1, per_try: 100ms, backoff: [0.001, 0.002]}\nbalance: {policy: round_robin}"}],
    indirect=True,
)
async def test_an_attempt_that_takes_too_long_is_tried_elsewhere(world: World, channel: Any) -> None:
    """per_try cuts an attempt of an idempotent call; the call itself has time."""
    world.a.delay = 5.0
    for _ in range(4):
        assert await channel.unary_unary(ECHO)(b"x", metadata=IDEMPOTENT) == b"x"
    world.b.delay = 5.0
    with pytest.raises(grpc.RpcError) as caught:
        await channel.unary_unary(ECHO)(b"x", metadata=IDEMPOTENT)
    assert caught.value.code() is StatusCode.DEADLINE_EXCEEDED
    await until(lambda: idle(world))


@pytest.mark.parametrize("world", [{"more": IN_TURN, "service": "    admit: {in_flight: 1, pending: 8}"}], indirect=True)
async def test_a_call_waits_for_a_permit_of_the_service(world: World, channel: Any) -> None:
    """One may be under way, and eight may wait for it: four are answered one after the other, none is refused."""
    world.a.delay = world.b.delay = 0.05
    begun = time.monotonic()
    assert await asyncio.gather(*(channel.unary_unary(ECHO)(b"x") for _ in range(4))) == [b"x"] * 4
    assert time.monotonic() - begun >= 0.19
    await until(lambda: idle(world))


@pytest.mark.parametrize("world", [{"more": IN_TURN, "service": "    admit: {in_flight: 1, pending: 8}"}], indirect=True)
def test_threads_wait_for_a_permit_too(world: World, blocking: Any) -> None:
    """The same for four threads."""
    from concurrent.futures import ThreadPoolExecutor

    world.a.delay = world.b.delay = 0.05
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda _: blocking.unary_unary(ECHO)(b"x"), range(4))) == [b"x"] * 4
    wait_for(lambda: idle(world))


# ------------------------------------------------------------------------------------------------ retries that nobody stands by for


def test_a_future_goes_on_by_itself(world: World, blocking: Any) -> None:
    """Its first attempt is refused, and nobody waits for it yet."""
    world.a.fails = StatusCode.UNAVAILABLE
    heard = threading.Event()
    calls = [blocking.unary_unary(ECHO).future(b"x", metadata=IDEMPOTENT) for _ in range(6)]
    calls[0].add_done_callback(lambda _: heard.set())
    assert heard.wait(5)
    assert [call.result(5) for call in calls] == [b"x"] * 6
    assert all(call.code() is StatusCode.OK and call.done() and not call.running() for call in calls)
    assert max(call.mesh_call.attempts for call in calls) == 2
    wait_for(lambda: idle(world))


def test_a_future_tells_how_it_failed(world: World, blocking: Any) -> None:
    """As gRPC's own does."""
    call = blocking.unary_unary(FAIL).future(b"NOT_FOUND")
    assert call.exception(5).code() is StatusCode.NOT_FOUND
    with pytest.raises(grpc.RpcError):
        call.result()
    assert (call.code(), call.details(), call.cancelled()) == (StatusCode.NOT_FOUND, "as asked", False)
    assert ("why", "asked") in [tuple(pair) for pair in call.trailing_metadata()]
    hangs = blocking.unary_unary(SLOW).future(b"30")
    with pytest.raises(grpc.FutureTimeoutError):
        hangs.result(0.05)
    assert hangs.running()
    assert hangs.cancel()
    wait_for(hangs.done)
    assert hangs.cancelled()
    wait_for(lambda: idle(world))


def test_a_stream_of_answers_is_tried_again_by_who_reads_it(world: World, blocking: Any) -> None:
    """Before its first message, and if the call is idempotent."""
    world.a.fails = StatusCode.UNAVAILABLE
    for _ in range(4):
        assert list(blocking.unary_stream(COUNT)(b"3", metadata=IDEMPOTENT)) == [b"0", b"1", b"2"]
    with pytest.raises(grpc.RpcError):
        for _ in range(2):
            list(blocking.unary_stream(COUNT)(b"3"))
    wait_for(lambda: idle(world))


# ------------------------------------------------------------------------------------------------ what is counted


async def test_the_messages_of_every_kind_are_counted(world: World, channel: Any) -> None:
    """Sent and received, by service and method."""
    await channel.unary_unary(ECHO)(b"x")
    assert [message async for message in channel.unary_stream(COUNT)(b"5")] == [b"0", b"1", b"2", b"3", b"4"]
    assert await channel.stream_unary(SUM)(iter([b"1", b"2", b"3"])) == b"6"
    chat = channel.stream_stream(CHAT)()
    for _ in range(2):
        await chat.write(b"x")
        await chat.read()
    await chat.done_writing()
    assert await chat.read() is grpc.aio.EOF
    await until(lambda: idle(world))
    counted = {method: tally.read() for (_, _, method), tally in world.party.observer._messages.items()}
    assert counted == {ECHO: (1, 1), COUNT: (1, 5), SUM: (3, 1), CHAT: (2, 2)}


def test_the_messages_of_threads_are_counted(world: World, blocking: Any) -> None:
    """The same on a blocking channel."""
    blocking.unary_unary(ECHO)(b"x")
    list(blocking.unary_stream(COUNT)(b"5"))
    blocking.stream_unary(SUM)(iter([b"1", b"2", b"3"]))
    wait_for(lambda: idle(world))
    counted = {method: tally.read() for (_, _, method), tally in world.party.observer._messages.items()}
    assert counted == {ECHO: (1, 1), COUNT: (1, 5), SUM: (3, 1)}


# ------------------------------------------------------------------------------------------------ channels of the user's own


def test_interceptors_accompany_a_blocking_channel(world: World) -> None:
    """All four kinds: each call is counted, with its deadline and end."""
    world.party.knows([world.a.address])
    plain = grpc.insecure_channel(world.a.address)
    with grpc.intercept_channel(plain, *sync_client_interceptors(world.party, "inventory")) as channel:
        assert channel.unary_unary(ECHO)(b"x") == b"x"
        assert channel.unary_unary(ECHO).future(b"x").result(5) == b"x"
        assert list(channel.unary_stream(COUNT)(b"2")) == [b"0", b"1"]
        assert channel.stream_unary(SUM)(iter([b"1", b"2"])) == b"3"
        assert list(channel.stream_stream(CHAT)(iter([b"1"]))) == [b"re: 1"]
        with pytest.raises(grpc.RpcError) as caught:
            channel.unary_unary(FAIL)(b"UNAVAILABLE")
        assert caught.value.code() is StatusCode.UNAVAILABLE
        wait_for(lambda: idle(world))
        row = world.party.of(world.a.address)
        assert (row["requests"], row["failures"]) == (6, 1)
