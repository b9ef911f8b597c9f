"""What is left of a gRPC call that ends in an unusual way: dropped, never read, closed under its feet, refused, too late? Real servers, threads."""

from __future__ import annotations

import asyncio
import gc
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from meshlib import errors
from meshlib.client.grpc import open_channel, open_sync_channel, sync_client_interceptors
from meshlib.client.grpc.links import IDLE

SUPPORT = Path(__file__).parent.parent / "grpc_support"
sys.path.insert(0, str(SUPPORT))
from grpc_world import COUNT, ECHO, SLOW, SUM, Party, blocking_server  # noqa: E402

from tests.client.test_grpc_waits import IDEMPOTENT, World, free_port, idle, wait_for  # noqa: E402

StatusCode = grpc.StatusCode


@pytest.fixture
def world(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[World]:
    terms = {"more": "retry: {attempts: 1, backoff: [0.001, 0.002]}\nbalance: {policy: round_robin}"}
    world = World(tmp_path, **getattr(request, "param", terms))
    yield world
    world.end()


@pytest.fixture
def blocking(world: World) -> Iterator[Any]:
    with open_sync_channel(world.party, "inventory") as channel:
        yield channel


def links(channel: Any) -> Any:
    return channel._links


def test_a_stream_whose_reader_left_ends_at_the_server_too(world: World, blocking: Any) -> None:
    """Who breaks out of the loop and drops the call has cancelled it, as with gRPC; interceptors change nothing of that."""
    plain = grpc.insecure_channel(world.a.address)
    watched = grpc.intercept_channel(plain, *sync_client_interceptors(world.party.knows([world.a.address]), "inventory"))
    for channel in (blocking, watched):
        for message in channel.unary_stream(COUNT)(b"100000000"):
            assert message == b"0"
            break
        gc.collect()
        wait_for(lambda: idle(world))
    plain.close()
    wait_for(lambda: not any(link.calls for link in links(blocking)._links.values()))


def test_a_failed_stream_that_nobody_reads_gives_everything_back(world: World, blocking: Any) -> None:
    """Its permit and its link, once it is dropped."""
    world.a.fails = world.b.fails = StatusCode.INTERNAL
    for _ in range(3):
        call = blocking.unary_stream(COUNT)(b"1")
        wait_for(call._inner.done)
        del call
    gc.collect()
    wait_for(lambda: idle(world) and not any(link.calls for link in links(blocking)._links.values()))


def test_closing_a_channel_ends_what_is_under_way(world: World) -> None:
    """Idempotent calls, too: nothing hangs, and each is told of its end."""
    channel = open_sync_channel(world.party, "inventory")
    future = channel.unary_unary(SLOW).future(b"30", metadata=IDEMPOTENT)
    seen: list[grpc.RpcError] = []

    def call() -> None:
        try:
            channel.unary_unary(SLOW)(b"30")
        except grpc.RpcError as error:
            seen.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    wait_for(lambda: world.party.of()["in_flight"] == 2)
    channel.close()
    assert future.exception(5).code() is StatusCode.CANCELLED
    thread.join(5)
    assert len(seen) == 1
    assert idle(world)


@pytest.mark.parametrize("way", ["call", "future", "stream"])
def test_threads_that_wait_for_ready_get_grpcs_error_at_their_deadline(world: World, blocking: Any, way: str) -> None:
    """Nobody listens, until the time is over."""
    world.party.knows([f"127.0.0.1:{free_port()}"])
    ask = {
        "call": lambda **how: blocking.unary_unary(ECHO)(b"x", **how),
        "future": lambda **how: blocking.unary_unary(ECHO).future(b"x", **how).result(5),
        "stream": lambda **how: list(blocking.unary_stream(COUNT)(b"1", **how)),
    }[way]
    for timeout in (0.2, 0.33):
        begun = time.monotonic()
        with pytest.raises(grpc.RpcError):
            ask(timeout=timeout, wait_for_ready=True)
        assert time.monotonic() - begun < 3
    wait_for(lambda: idle(world))


async def test_asyncio_waits_for_ready_until_its_deadline(world: World) -> None:
    """Calls and streams."""
    world.party.knows([f"127.0.0.1:{free_port()}"])
    async with open_channel(world.party, "inventory") as channel:
        for timeout in (0.2, 0.33):
            with pytest.raises(grpc.RpcError):
                await channel.unary_unary(ECHO)(b"x", timeout=timeout, wait_for_ready=True)
            with pytest.raises(grpc.RpcError):
                await channel.unary_stream(COUNT)(b"1", timeout=timeout, wait_for_ready=True).read()


def test_a_stream_of_requests_is_never_begun_anew(world: World, blocking: Any) -> None:
    """What was taken out of the iterator can't be sent again: an error, and no answer to half of it."""
    world.party.knows([f"127.0.0.1:{free_port()}"])
    threading.Timer(0.3, lambda: world.party.knows([world.a.address])).start()
    with pytest.raises(grpc.RpcError) as caught:
        blocking.stream_unary(SUM)(iter([b"1", b"2"]), wait_for_ready=True, timeout=3)
    assert caught.value.code() is StatusCode.UNAVAILABLE


def test_a_refusal_goes_through_interceptors_of_others(world: World, blocking: Any) -> None:
    """They are handed it in the place of a call, and ask it as one."""

    class Tracing(grpc.UnaryUnaryClientInterceptor):  # type: ignore[type-arg]  # generic in the stubs only
        def intercept_unary_unary(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
            call = continuation(client_call_details, request)
            call.add_done_callback(seen.append)
            return call

    seen: list[Any] = []
    world.party.knows([])
    with pytest.raises(errors.NoEndpoint):
        grpc.intercept_channel(blocking, Tracing()).unary_unary(ECHO)(b"x")
    assert [error.code() for error in seen] == [StatusCode.UNAVAILABLE]


def test_a_callback_that_raises_keeps_no_other_from_being_called(world: World, blocking: Any) -> None:
    """The log has it."""
    heard = threading.Event()
    call = blocking.unary_unary(SLOW).future(b"0.1")
    call.add_done_callback(lambda _: 1 / 0)
    call.add_done_callback(lambda _: heard.set())
    assert heard.wait(5)


def test_links_that_nobody_uses_are_closed(tmp_path: Path, world: World, blocking: Any) -> None:
    """Those to endpoints that discovery has dropped, after a while; one that is used, or has a call, stays."""
    now = [time.monotonic()]
    party = world.party
    for _ in range(4):
        blocking.unary_unary(ECHO)(b"x")
    assert len(links(blocking)._links) == 2
    links(blocking)._outbound.clock = lambda: now[0]
    links(blocking).sweep()
    party.knows([world.a.address])
    now[0] += IDLE - 1
    blocking.unary_unary(ECHO)(b"x")
    now[0] += 2
    links(blocking).sweep()
    assert [address for address, _ in links(blocking)._links] == [world.a.address]


@pytest.mark.parametrize("world", [{"more": "retry: {attempts: 0}", "service": "    deadline: 200ms"}], indirect=True)
def test_a_blocking_stream_begins_within_the_routes_deadline(world: World, blocking: Any) -> None:
    """The keeper looks once a second."""
    world.a.delay = world.b.delay = 30.0
    call = blocking.unary_stream(COUNT)(b"1")
    threading.Timer(0.4, links(blocking).sweep).start()
    begun = time.monotonic()
    with pytest.raises(grpc.RpcError) as caught:
        next(call)
    assert caught.value.code() is StatusCode.DEADLINE_EXCEEDED
    assert time.monotonic() - begun < 5
    wait_for(lambda: idle(world))


async def test_a_stream_that_failed_says_so_to_every_read(world: World) -> None:
    """As gRPC does: a reader that asks once more must not see a clean end."""
    world.a.fails = world.b.fails = StatusCode.INTERNAL
    async with open_channel(world.party, "inventory") as channel:
        call = channel.unary_stream(COUNT)(b"1")
        for _ in range(2):
            with pytest.raises(grpc.RpcError):
                await call.read()


def test_threads_share_links_while_they_are_replaced(tmp_path: Path) -> None:
    """Eight threads call while certificates are turned over: none fails, and no link is left with a call."""
    from grpc_world import Shop

    shop = Shop(tmp_path)
    with blocking_server(shop.party("inventory")) as address:
        party: Party = shop.party("storefront").knows([address])
        assert party.identity is not None
        with open_sync_channel(party, "inventory") as channel:
            over, failed = threading.Event(), []

            def call() -> None:
                stub = channel.unary_unary(ECHO)
                while not over.is_set():
                    try:
                        stub(b"x", timeout=10)
                    except grpc.RpcError as error:
                        failed.append(error)

            threads = [threading.Thread(target=call) for _ in range(8)]
            for thread in threads:
                thread.start()
            for _ in range(5):
                time.sleep(0.15)
                shop.certify()
                asyncio.run(_look(party))
            over.set()
            for thread in threads:
                thread.join(20)
            assert failed == []
            wait_for(lambda: not links(channel)._left and not any(link.calls for link in links(channel)._links.values()))


async def _look(party: Party) -> None:
    assert party.identity is not None
    await asyncio.to_thread(party.identity.look, time.time())
