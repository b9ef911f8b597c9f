"""What an application asks of one call: a second attempt when the first is slow, and endpoints nearby.

The servers are scripted, and hold their answers back until the test has seen what it waits for.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

import meshlib
from meshlib.client.terms import Terms
from meshlib.client.way import Attempt, OutboundWay, Reply
from tests.support import Request, Scripted, mesh_of, ok, scripted

HEDGE = 0.02
ROUND = {"policy": "round_robin"}


def at(*servers: Scripted, **more: Any) -> dict[str, Any]:
    """In turn, so that the first call asks the first server."""
    return {"orders": {"discover": {"static": [server.address for server in servers]}, "balance": ROUND, **more}}


def rows(mesh: meshlib.Mesh) -> dict[str, dict[str, Any]]:
    return {row["endpoint"]: row for row in mesh.engine.stats(time.monotonic())}


def in_flight(mesh: meshlib.Mesh) -> int:
    return sum(row["in_flight"] for row in rows(mesh).values())


def others() -> list[asyncio.Task[Any]]:
    """The tasks of this loop that are neither ours nor the servers'."""
    return [task for task in asyncio.all_tasks() if "Race" in repr(task.get_coro())]


async def settled(judge: Callable[[], bool]) -> None:
    end = time.monotonic() + 3
    while not judge() and time.monotonic() < end:
        await asyncio.sleep(0.002)
    assert judge()


class Held:
    """An answer that comes when `free` is set, from a server that says whether its connection was closed before."""

    def __init__(self, answer: bytes = b"") -> None:
        self.free = asyncio.Event()
        self.came = asyncio.Event()
        self.answer = answer or ok(b"late")

    async def __call__(self, server: Scripted, request: Request) -> bytes:
        self.came.set()
        await self.free.wait()
        return self.answer


async def quick(server: Scripted, request: Request) -> bytes:
    return ok(b"quick")


@contextlib.asynccontextmanager
async def closing() -> AsyncIterator[tuple[str, asyncio.Event, asyncio.Event]]:
    """A server that takes a request and never answers: its address, whether it was asked, and whether the caller hung up."""
    asked, left = asyncio.Event(), asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            await reader.readuntil(b"\r\n\r\n")
            asked.set()
            await reader.read()
        left.set()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}", asked, left
    finally:
        server.close()


@pytest.fixture(autouse=True)
def _complaints(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """What asyncio has to say of lost tasks and their errors fails the test."""
    yield
    gc.collect()
    records = [*caplog.get_records("call"), *caplog.get_records("teardown")]
    assert [record.getMessage() for record in records if record.name == "asyncio" and record.levelno > logging.INFO] == []


# ------------------------------------------------------------------ hedge


async def test_the_second_attempt_answers_and_the_first_is_cancelled(tmp_path: Path) -> None:
    """The slow one's connection is closed, its permit is back, and its breaker heard nothing."""
    async with closing() as (slow, _, left), scripted(quick) as server:
        services = {"orders": {"discover": {"static": [slow, server.address]}, "balance": ROUND}}
        with mesh_of(tmp_path, services) as mesh:
            async with mesh.client() as http:
                answer = await http.get("http://orders/", extensions=meshlib.policy(hedge=HEDGE))
                assert answer.content == b"quick"
                assert in_flight(mesh) == 0
                await asyncio.wait_for(left.wait(), 3)
                await settled(lambda: others() == [])
                found = rows(mesh)
                assert (found[slow]["breaker"], found[slow]["failures"], found[slow]["requests"]) == ("closed", 0, 0)
                assert (found[""]["retries"], found[""]["requests"], found[server.address]["requests"]) == (1, 1, 1)
                # The number travels, so that whoever is asked second doesn't retry as well.
                assert server.requests[0].headers["x-mesh-attempt"] == "1"
                call = answer.extensions["meshlib.call"]
                assert call.attempts == 2
                text = call.explain()
                assert re.search(rf"{slow} has not answered after \d+ ms: another is asked as well\n", text)
                assert re.search(rf"send +#2  {server.address} answered 200\n", text)
                assert re.search(rf"retry +{slow} is given up\n", text)
                assert re.search(rf"2 attempts; hedged after \d+ ms to {server.address}, which won$", text)


async def test_an_answer_in_time_is_not_hedged(tmp_path: Path) -> None:
    """Nothing is sent, nothing is counted, and the connection is kept."""
    async with scripted(quick) as one, scripted(quick) as two:
        with mesh_of(tmp_path, at(one, two)) as mesh:
            async with mesh.client() as http:
                for _ in range(4):
                    answer = await http.get("http://orders/", extensions=meshlib.policy(hedge=30))
                    assert answer.extensions["meshlib.call"].attempts == 1
            assert (len(one.requests), len(two.requests), one.connections, two.connections) == (2, 2, 1, 1)
            assert (rows(mesh)[""]["retries"], in_flight(mesh), others()) == (0, 0, [])


async def test_a_hedge_that_loses_leaves_no_trace(tmp_path: Path) -> None:
    """The first attempt answers after all."""
    slow = Held()
    async with scripted(slow) as first, closing() as (second, asked, left):
        services = {"orders": {"discover": {"static": [first.address, second]}, "balance": ROUND}}
        with mesh_of(tmp_path, services) as mesh:
            async with mesh.client() as http:
                call = asyncio.create_task(http.get("http://orders/", extensions=meshlib.policy(hedge=HEDGE)))
                await asked.wait()
                slow.free.set()
                answer = await call
                assert answer.content == b"late"
                assert "x-mesh-attempt" not in first.requests[0].headers
                assert answer.extensions["meshlib.call"].explain().endswith(f" to {second}, which was not needed")
                assert in_flight(mesh) == 0
                await asyncio.wait_for(left.wait(), 3)
                await settled(lambda: others() == [])
                assert (rows(mesh)[second]["breaker"], rows(mesh)[second]["requests"]) == ("closed", 0)


@pytest.mark.parametrize("how", ["post", "streamed", "layer", "deadline", "alone"])
async def test_what_may_not_be_sent_twice_is_not_hedged(tmp_path: Path, how: str) -> None:
    """Not idempotent, not there to be sent again, retried further up, no time, nobody else; the record says so."""
    slow = Held()
    terms: dict[str, Any] = {"hedge": HEDGE}
    why = "no other endpoint can be asked"

    async def body() -> AsyncIterator[bytes]:
        yield b"x"

    async with scripted(slow) as first, scripted(quick) as second:
        with mesh_of(tmp_path, at(*([first] if how == "alone" else [first, second]))) as mesh:
            async with mesh.client() as http:
                method = "GET"
                options: dict[str, Any] = {}
                if how == "post":
                    method, options, why = "POST", {"content": b"x"}, "not idempotent, and both may be processed"
                elif how == "streamed":
                    method, options, why = "POST", {"content": body()}, "the body was streamed and can't be sent again"
                    terms["idempotent"] = True
                elif how == "layer":
                    from meshlib.call import current_layer

                    current_layer.set(1)
                    why = "a caller further up is already retrying"
                elif how == "deadline":
                    terms["hedge"], why = 15.0, "the deadline comes before it"
                call = asyncio.create_task(http.request(method, "http://orders/", extensions=meshlib.policy(**terms), **options))
                await slow.came.wait()
                await asyncio.sleep(2 * HEDGE)
                slow.free.set()
                answer = await call
                assert (answer.content, len(second.requests)) == (b"late", 0)
                assert f"not hedged, because: {why}\n" in answer.extensions["meshlib.call"].explain()
                assert in_flight(mesh) == 0


async def test_a_declared_post_is_hedged_with_its_body(tmp_path: Path) -> None:
    """The application's word counts, and both attempts carry all of the body."""
    async with scripted(Held()) as first, scripted(quick) as second:
        with mesh_of(tmp_path, at(first, second)) as mesh:
            async with mesh.client() as http:
                terms = meshlib.policy(hedge=HEDGE, idempotent=True)
                answer = await http.post("http://orders/", content=b"whole", extensions=terms)
                assert answer.content == b"quick"
            assert [first.requests[0].body, second.requests[0].body] == [b"whole", b"whole"]


async def test_an_empty_budget_forbids_hedges(tmp_path: Path) -> None:
    """Hedges and retries draw on the same: 20 % of the calls, and nothing more here."""
    slow = Held()
    services = {"budget": {"ratio": 0.0, "per_second": 0.0}}
    async with scripted(slow) as first, scripted(quick) as second:
        with mesh_of(tmp_path, at(first, second, retry=services)) as mesh:
            async with mesh.client() as http:
                call = asyncio.create_task(http.get("http://orders/", extensions=meshlib.policy(hedge=HEDGE)))
                await slow.came.wait()
                await asyncio.sleep(2 * HEDGE)
                slow.free.set()
                answer = await call
                assert "not hedged, because: the retry budget is empty" in answer.extensions["meshlib.call"].explain()
            assert len(second.requests) == 0


async def test_a_first_attempt_that_fails_leaves_the_hedge_to_answer(tmp_path: Path) -> None:
    """It is awaited, and nothing is sent meanwhile."""
    first_held, second_held = Held(b"HTTP/1.1 503 no\r\ncontent-length: 0\r\n\r\n"), Held(ok(b"second"))
    async with scripted(first_held) as first, scripted(second_held) as second, scripted(quick) as third:
        with mesh_of(tmp_path, at(first, second, third)) as mesh:
            async with mesh.client() as http:
                call = asyncio.create_task(http.get("http://orders/", extensions=meshlib.policy(hedge=HEDGE)))
                await second_held.came.wait()
                first_held.free.set()
                await settled(lambda: rows(mesh)[first.address]["failures"] == 1)
                await asyncio.sleep(2 * HEDGE)
                assert (len(third.requests), rows(mesh)[first.address]["in_flight"]) == (0, 0)
                second_held.free.set()
                answer = await call
                assert answer.content == b"second"
                text = answer.extensions["meshlib.call"].explain()
                assert re.search(rf"send +#1  {first.address} answered 503\n", text)
                assert "not sent again yet: another attempt is under way\n" in text
            assert in_flight(mesh) == 0


async def test_when_both_fail_the_retries_are_still_there(tmp_path: Path) -> None:
    """The hedge is none of them: with one retry there are three attempts, without one there are two."""

    async def die(server: Scripted, request: Request) -> None:
        await asyncio.sleep(2 * HEDGE)

    async with scripted(die) as first, scripted(die) as second, scripted(quick) as third:
        with mesh_of(tmp_path, at(first, second, third)) as mesh:
            async with mesh.client() as http:
                answer = await http.get("http://orders/", extensions=meshlib.policy(hedge=HEDGE, retries=1))
                assert (answer.content, len(first.requests), len(second.requests)) == (b"quick", 1, 1)
                assert third.requests[0].headers["x-mesh-attempt"] == "2"
                assert in_flight(mesh) == 0


async def test_the_error_of_both_is_the_last_ones(tmp_path: Path) -> None:
    """Without retries; the call that comes with it tells of both."""

    async def die(server: Scripted, request: Request) -> None:
        await asyncio.sleep(2 * HEDGE)

    async with scripted(die) as first, scripted(die) as second:
        with mesh_of(tmp_path, at(first, second)) as mesh:
            async with mesh.client() as http:
                with pytest.raises(httpx.RemoteProtocolError) as caught:
                    await http.get("http://orders/", extensions=meshlib.policy(hedge=HEDGE, retries=0))
                assert isinstance(caught.value, meshlib.ConnectionLost)
                text = caught.value.call.explain()
                assert re.search(rf"hedged after \d+ ms to {second.address}, which did not help: ", text)
                assert f"{first.address}: the connection was lost" in text
            assert (len(first.requests), len(second.requests), in_flight(mesh)) == (1, 1, 0)
            assert others() == []


async def test_a_body_that_breaks_off_is_saved_by_the_other(tmp_path: Path) -> None:
    """A short answer counts as come when it is whole, also where two are under way."""
    first_held = Held(b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 9\r\n\r\nhalf")
    second_held = Held(ok(b"second"))
    async with scripted(first_held) as first, scripted(second_held) as second:
        with mesh_of(tmp_path, at(first, second)) as mesh:
            async with mesh.client() as http:
                terms = meshlib.policy(hedge=HEDGE, retries=0)
                call = asyncio.create_task(http.get("http://orders/", extensions=terms))
                await second_held.came.wait()
                first_held.free.set()
                await settled(lambda: rows(mesh)[first.address]["in_flight"] == 0)
                second_held.free.set()
                assert (await call).content == b"second"
            assert in_flight(mesh) == 0


async def test_a_stream_is_raced_to_its_head(tmp_path: Path) -> None:
    """The winner's body comes piece by piece; its permit ends with it, the loser's with the head."""

    async def long(server: Scripted, request: Request) -> bytes:
        return ok(b"x" * 200_000)

    async with closing() as (slow, _, left), scripted(long) as server:
        services = {"orders": {"discover": {"static": [slow, server.address]}, "balance": ROUND}}
        with mesh_of(tmp_path, services) as mesh:
            async with mesh.client() as http:
                async with http.stream("GET", "http://orders/", extensions=meshlib.policy(hedge=HEDGE)) as answer:
                    assert (rows(mesh)[slow]["in_flight"], rows(mesh)[server.address]["in_flight"]) == (0, 1)
                    await asyncio.wait_for(left.wait(), 3)
                    assert len(await answer.aread()) == 200_000
                assert in_flight(mesh) == 0


class Fleet:
    """A carrier that moves nothing: what comes of an attempt is a function of its address."""

    can_overlap = True

    def __init__(self, exchange: Callable[[Attempt], Awaitable[Reply]]) -> None:
        self.exchange = exchange

    async def sleep(self, seconds: float) -> None:
        raise AssertionError("nothing is repeated here")


class Rest:
    """A body on its way that notes whether it was given up."""

    is_closed = False

    async def read(self) -> bytes:
        return b""

    async def write(self, data: bytes) -> None:
        raise AssertionError("nothing is sent here")

    async def close(self) -> None:
        self.is_closed = True

    def info(self, name: str) -> Any:
        return None


@pytest.mark.parametrize("loser", ["body", "error", "error when cancelled"])
async def test_what_comes_together_with_the_winner_is_put_away(tmp_path: Path, loser: str) -> None:
    """Both are here when the caller looks: a body that nobody wants is given up, an error that nobody wants is no complaint."""
    both = asyncio.Event()
    rest = Rest()
    asked = []

    async def exchange(attempt: Attempt) -> Reply:
        asked.append(attempt)
        number = len(asked)
        if number == 2:
            both.set()
        await both.wait()
        if number == 1:
            return (200, 1, b"OK", [], b"won")
        if loser == "error":
            raise meshlib.ConnectionLost("it broke")
        if loser == "error when cancelled":
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                raise meshlib.ConnectionLost("it broke") from None
        return (200, 1, b"OK", [], rest)

    with mesh_of(tmp_path, {"orders": {"discover": {"static": ["127.0.0.1:1", "127.0.0.1:2"]}, "balance": ROUND}}) as mesh:
        way = OutboundWay(mesh.engine, None, None)
        answer = await way.send(Fleet(exchange), "orders", "GET", "/", [], None, Terms(hedge=HEDGE))
        assert (answer.body, rest.is_closed, in_flight(mesh)) == (b"won", loser == "body", 0)
        await settled(lambda: others() == [])


@pytest.mark.parametrize("after", [0, 1, 2, 3, "second"])
async def test_cancelling_the_caller_cancels_both(tmp_path: Path, after: int | str) -> None:
    """Before, between and after the two; nothing of either stays."""
    async with closing() as (first, asked_first, _), closing() as (second, asked_second, left):
        services = {"orders": {"discover": {"static": [first, second]}, "balance": ROUND}}
        with mesh_of(tmp_path, services) as mesh:
            async with mesh.client() as http:
                call = asyncio.create_task(http.get("http://orders/", extensions=meshlib.policy(hedge=HEDGE)))
                if isinstance(after, int):
                    for _ in range(after):
                        await asyncio.sleep(0)
                else:
                    await asked_first.wait()
                    await asked_second.wait()
                    assert in_flight(mesh) == 3
                call.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await call
                assert in_flight(mesh) == 0
                await settled(lambda: others() == [])
                if after == "second":
                    await asyncio.wait_for(left.wait(), 3)
            assert [row["breaker"] for row in rows(mesh).values() if row["endpoint"]] == ["closed", "closed"]


async def test_the_deadline_ends_both(tmp_path: Path) -> None:
    """One absolute end for all attempts."""
    async with closing() as (first, *_), closing() as (second, _, left):
        services = {"orders": {"discover": {"static": [first, second]}, "balance": ROUND}}
        with mesh_of(tmp_path, services) as mesh:
            async with mesh.client() as http:
                with pytest.raises(meshlib.DeadlineExceeded):
                    await http.get("http://orders/", extensions=meshlib.policy(hedge=HEDGE, timeout=0.1))
                assert in_flight(mesh) == 0
                await asyncio.wait_for(left.wait(), 3)
                await settled(lambda: others() == [])


def test_a_blocking_client_does_not_hedge_and_says_so(tmp_path: Path) -> None:
    """It has one thread, and can't wait for two answers."""
    from tests.chaos.elsewhere import elsewhere

    async def slow(server: Scripted, request: Request) -> bytes:
        await asyncio.sleep(2 * HEDGE)
        return ok(b"late")

    with elsewhere(slow) as first, elsewhere(quick) as second:
        with mesh_of(tmp_path, at(first, second)) as mesh, mesh.sync_client() as http:
            answer = http.get("http://orders/", extensions=meshlib.policy(hedge=HEDGE))
            assert (answer.content, len(second.requests)) == (b"late", 0)
            why = "not hedged, because: a blocking client has one thread"
            assert why in answer.extensions["meshlib.call"].explain()


async def test_a_loser_over_http2_costs_its_stream_and_not_its_connection(tmp_path: Path) -> None:
    """The peer is told by a reset, and others go on there."""
    import h2.events

    from tests.client import http2_peer

    async with http2_peer.scripted() as (slow, first), http2_peer.scripted() as (quick, second):
        connections = {"127.0.0.1:1": slow, "127.0.0.1:2": quick}

        async def exchange(attempt: Attempt) -> Reply:
            return await connections[attempt.address].exchange(attempt)

        services = {"orders": {"discover": {"static": list(connections)}, "balance": ROUND}}
        with mesh_of(tmp_path, services) as mesh:
            way = OutboundWay(mesh.engine, None, None)
            call = asyncio.create_task(
                way.send(Fleet(exchange), "orders", "GET", "/", [(b"host", b"orders")], None, Terms(hedge=HEDGE))
            )
            await first.asked()
            second.answer(await second.asked(), b"quick")
            answer = await call
            assert (answer.status, answer.body or await answer.read()) == (200, b"quick")
            while await answer.read():
                pass
            await asyncio.wait_for(first.hear(h2.events.StreamReset), 3)
            assert (slow.is_gone(), in_flight(mesh)) == (False, 0)
            again = asyncio.create_task(slow.exchange(http2_peer.attempt()))
            first.answer(await first.asked(), b"again")
            assert await http2_peer.whole(await again) == b"again"


# ------------------------------------------------------------------ zone


def zoned(*places: tuple[Scripted, str], **more: Any) -> dict[str, Any]:
    static = [{"address": server.address, "zone": zone} for server, zone in places]
    return {"orders": {"discover": {"static": static}, "balance": ROUND, **more}}


async def test_endpoints_of_the_zone_are_asked_first(tmp_path: Path) -> None:
    """And the record names the zone."""
    async with scripted(quick) as one, scripted(quick) as two, scripted(quick) as far:
        with mesh_of(tmp_path, zoned((far, "b"), (one, "a"), (two, "a"))) as mesh:
            async with mesh.client() as http:
                for _ in range(6):
                    answer = await http.get("http://orders/", extensions=meshlib.policy(zone="a"))
            assert (len(one.requests), len(two.requests), len(far.requests)) == (3, 3, 0)
            call = answer.extensions["meshlib.call"]
            assert re.search(r"picked 127\.0\.0\.1:\d+ in zone a", call.explain())
            assert sorted(row["zone"] for row in call.record()["candidates"]) == ["a", "a", "b"]
            assert re.search(r"endpoint +zone +latency", call.explain())


async def test_when_the_zone_is_exhausted_the_others_are_asked(tmp_path: Path) -> None:
    """Its only endpoint refuses connections: first the retry goes elsewhere, then, once it is out, every call."""
    async with scripted(quick) as near, scripted(quick) as one, scripted(quick) as two:
        with mesh_of(tmp_path, zoned((near, "a"), (one, "b"), (two, "b"))) as mesh:
            await near.stop()
            async with mesh.client() as http:
                answer = await http.get("http://orders/", extensions=meshlib.policy(zone="a"))
                assert (answer.content, answer.extensions["meshlib.call"].attempts) == (b"quick", 2)
                assert "outside the zone" in answer.extensions["meshlib.call"].explain()
                answer = await http.get("http://orders/", extensions=meshlib.policy(zone="a"))
                assert (answer.content, answer.extensions["meshlib.call"].attempts) == (b"quick", 1)
    assert len(one.requests) + len(two.requests) == 2


async def test_an_unknown_zone_changes_nothing(tmp_path: Path) -> None:
    """Nobody there: all are asked in turn."""
    async with scripted(quick) as one, scripted(quick) as two:
        with mesh_of(tmp_path, zoned((one, "a"), (two, "b"))) as mesh:
            async with mesh.client() as http:
                for _ in range(4):
                    answer = await http.get("http://orders/", extensions=meshlib.policy(zone="nowhere"))
            assert (len(one.requests), len(two.requests)) == (2, 2)
            assert "zone nowhere" not in answer.extensions["meshlib.call"].explain()


async def test_a_blocking_client_prefers_the_zone_too(tmp_path: Path) -> None:
    """The engine chooses for both."""
    from tests.chaos.elsewhere import elsewhere

    with elsewhere(quick) as near, elsewhere(quick) as far:
        with mesh_of(tmp_path, zoned((far, "b"), (near, "a"))) as mesh, mesh.sync_client() as http:
            for _ in range(3):
                http.get("http://orders/", extensions=meshlib.policy(zone="a"))
        assert (len(near.requests), len(far.requests)) == (3, 0)


# ------------------------------------------------------------------ what is asked


@pytest.mark.parametrize("value", [0, -1, 60.1, float("nan"), float("inf")])
def test_a_hedge_out_of_range_is_refused(value: float) -> None:
    """Where it is written, and not when it would be due."""
    with pytest.raises(ValueError, match="hedge=.*above 0, at most 60"):
        meshlib.policy(hedge=value)


@pytest.mark.parametrize("value", ["", 1, b"a"])
def test_a_zone_without_a_name_is_refused(value: Any) -> None:
    """None is the word for any."""
    with pytest.raises(ValueError, match="zone=.*the name of a zone"):
        meshlib.CallPolicy(zone=value)


def test_policy_carries_every_field() -> None:
    """The helper and the class say the same."""
    wanted = meshlib.CallPolicy(idempotent=True, timeout=1.0, retries=2, hedge=0.5, zone="a")
    assert meshlib.policy(idempotent=True, timeout=1.0, retries=2, hedge=0.5, zone="a") == {"meshlib.policy": wanted}
