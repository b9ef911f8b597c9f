"""May a call go now, over real sockets? Permits and the queue for them, rates, throttling, learnt limits, slow endpoints, and checks."""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

import meshlib
from meshlib.call import Peer
from tests.server.inside import Caller, http_scope
from tests.support import Request, Scripted, mesh_of, ok, scripted, write_config

CLIENTS = pytest.mark.parametrize("client", ["async", "blocking"])
NO_RETRY = {"attempts": 0}

Get = Callable[..., Any]


@contextlib.asynccontextmanager
async def caller(mesh: meshlib.Mesh, client: str) -> AsyncIterator[Get]:
    """`await get(path, ...)` with one of the clients; the blocking one is on threads, since the servers are on this one."""
    if client == "blocking":
        with mesh.sync_client() as blocking:

            async def get(path: str = "/", **more: Any) -> httpx.Response:
                return await asyncio.to_thread(blocking.get, f"http://orders{path}", **more)

            yield get
    else:
        made = mesh.client() if client == "async" else httpx.AsyncClient(transport=mesh.transport())
        async with made as http:

            async def get_async(path: str = "/", **more: Any) -> httpx.Response:
                return await http.get(f"http://orders{path}", **more)

            yield get_async


class Gate:
    """A server that answers when it may: `free` is set at first or later."""

    def __init__(self, is_free: bool = False) -> None:
        self.free = asyncio.Event()
        self.came = asyncio.Event()
        if is_free:
            self.free.set()

    async def __call__(self, server: Scripted, request: Request) -> bytes:
        self.came.set()
        await self.free.wait()
        return ok(server.address.encode())


class Status:
    """A server whose status the test sets."""

    def __init__(self, status: int = 200) -> None:
        self.status = status

    async def __call__(self, server: Scripted, request: Request) -> bytes:
        body = server.address.encode()
        return f"HTTP/1.1 {self.status} x\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body


def orders(servers: list[Scripted], admit: dict[str, Any], **more: Any) -> dict[str, Any]:
    balance = {"policy": "round_robin", "slow_start": "0s"}
    return {
        "orders": {"discover": {"static": [server.address for server in servers]}, "balance": balance, "admit": admit, **more}
    }


def rows(mesh: meshlib.Mesh) -> dict[str, dict[str, Any]]:
    """By endpoint; the service's own is ""."""
    return {row["endpoint"]: row for row in mesh.engine.stats(time.monotonic()) if row["service"] == "orders"}


def permits(mesh: meshlib.Mesh) -> tuple[int, int]:
    """Calls in flight, and calls that wait."""
    row = rows(mesh)[""]
    return row["in_flight"], row["pending"]


async def settled(judge: Callable[[], bool], seconds: float = 5.0) -> None:
    end = time.monotonic() + seconds
    while not judge() and time.monotonic() < end:
        await asyncio.sleep(0.002)
    assert judge()


# ------------------------------------------------------------------ permits


@pytest.mark.parametrize("client", ["async", "blocking", "transport"])
async def test_a_call_beyond_the_limit_waits_its_turn_and_the_next_is_refused(tmp_path: Path, client: str) -> None:
    """One in flight, one may wait: the third is told at once, the second goes when the first is done."""
    gate = Gate()
    async with scripted(gate) as server:
        with mesh_of(tmp_path, orders([server], {"in_flight": 1, "pending": 1})) as mesh:
            async with caller(mesh, client) as get:
                first = asyncio.create_task(get("/first"))
                await gate.came.wait()
                second = asyncio.create_task(get("/second"))
                await settled(lambda: permits(mesh)[1] == 1)
                with pytest.raises(meshlib.LimitExceeded) as caught:
                    await get("/third")
                assert caught.value.reason == "admit.limit"
                assert not isinstance(caught.value, meshlib.Throttled)
                assert '1 calls to "orders" are in flight already, and 1 wait' in str(caught.value)
                assert [request.target for request in server.requests] == ["/first"]
                gate.free.set()
                assert (await first).status_code == (await second).status_code == 200
                text = (await second).extensions["meshlib.call"].explain()
                assert "waits for a permit: as many calls are in flight as may be at once" in text
                assert re.search(r"got a permit after \d", text)
                assert "waits for a permit" not in (await first).extensions["meshlib.call"].explain()
                assert permits(mesh) == (0, 0)
                assert rows(mesh)[""]["limited"] == 1


@CLIENTS
async def test_without_a_queue_a_call_beyond_the_limit_is_refused(tmp_path: Path, client: str) -> None:
    """The default: who can't be served is told at once, and nothing was sent."""
    gate = Gate()
    async with scripted(gate) as server:
        with mesh_of(tmp_path, orders([server], {"in_flight": 1})) as mesh:
            async with caller(mesh, client) as get:
                first = asyncio.create_task(get("/"))
                await gate.came.wait()
                with pytest.raises(meshlib.LimitExceeded):
                    await get("/")
                gate.free.set()
                await first
                assert (await get("/")).status_code == 200
                assert permits(mesh) == (0, 0)


async def test_a_waiting_call_that_is_cancelled_gives_its_place_back(tmp_path: Path) -> None:
    """The queue has room again, the permit is still the first one's, and nothing was sent."""
    gate = Gate()
    async with scripted(gate) as server:
        with mesh_of(tmp_path, orders([server], {"in_flight": 1, "pending": 1})) as mesh:
            async with caller(mesh, "async") as get:
                first = asyncio.create_task(get("/first"))
                await gate.came.wait()
                for _ in range(3):
                    waiting = asyncio.create_task(get("/cancelled"))
                    await settled(lambda: permits(mesh) == (1, 1))
                    waiting.cancel()
                    with pytest.raises(asyncio.CancelledError):
                        await waiting
                    assert permits(mesh) == (1, 0)
                last = asyncio.create_task(get("/last"))
                await settled(lambda: permits(mesh) == (1, 1))
                gate.free.set()
                await asyncio.gather(first, last)
            assert [request.target for request in server.requests] == ["/first", "/last"]
            assert permits(mesh) == (0, 0)


@CLIENTS
async def test_a_deadline_ends_the_wait_for_a_permit(tmp_path: Path, client: str) -> None:
    """DeadlineExceeded, which is httpx's timeout too; its record says what it waited for."""
    gate = Gate()
    async with scripted(gate) as server:
        with mesh_of(tmp_path, orders([server], {"in_flight": 1, "pending": 5})) as mesh:
            async with caller(mesh, client) as get:
                first = asyncio.create_task(get("/"))
                await gate.came.wait()
                begun = time.monotonic()
                with pytest.raises(meshlib.DeadlineExceeded) as caught:
                    await get("/", extensions=meshlib.policy(timeout=0.08))
                assert 0.08 <= time.monotonic() - begun < 2
                assert isinstance(caught.value, httpx.TimeoutException)
                assert "the deadline passed while it waited for a permit" in caught.value.call.explain()
                assert permits(mesh) == (1, 0)
                gate.free.set()
                await first
            assert (len(server.requests), permits(mesh)) == (1, (0, 0))


@CLIENTS
async def test_permits_are_conserved_whatever_becomes_of_those_who_wait(tmp_path: Path, client: str) -> None:
    """A third has no patience; at the end nothing is in flight and nobody waits."""

    async def brief(server: Scripted, request: Request) -> bytes:
        await asyncio.sleep(0.001)
        return ok()

    async with scripted(brief) as server:
        with mesh_of(tmp_path, orders([server], {"in_flight": 3, "pending": 30})) as mesh:
            async with caller(mesh, client) as get:

                async def ask(number: int) -> str:
                    try:
                        await get("/", extensions=meshlib.policy(timeout=0.01 if number % 3 == 0 else 10))
                    except meshlib.DeadlineExceeded:
                        return "late"
                    return "answered"

                for _ in range(4):
                    found = Counter(await asyncio.gather(*(ask(number) for number in range(30))))
                    assert found["answered"] >= 20
            assert permits(mesh) == (0, 0)
            assert [row["in_flight"] for row in rows(mesh).values()] == [0, 0]


@CLIENTS
async def test_everybody_in_the_queue_gets_a_turn(tmp_path: Path, client: str) -> None:
    """Never more than two in flight, none refused, none forgotten."""
    most = 0

    async def counted(server: Scripted, request: Request) -> bytes:
        nonlocal most
        flying.append(request)
        most = max(most, len(flying))
        await asyncio.sleep(0.002)
        flying.pop()
        return ok()

    flying: list[Request] = []
    async with scripted(counted) as server:
        with mesh_of(tmp_path, orders([server], {"in_flight": 2, "pending": 20})) as mesh:
            async with caller(mesh, client) as get:
                answers = await asyncio.gather(*(get("/") for _ in range(22)))
            assert ({answer.status_code for answer in answers}, most) == ({200}, 2)
            assert permits(mesh) == (0, 0)


# ------------------------------------------------------------------ rates


@pytest.mark.parametrize("client", ["async", "blocking", "transport"])
async def test_a_rate_lets_a_burst_through_and_says_when_the_next_may_come(tmp_path: Path, client: str) -> None:
    """RateLimited before anything is sent; after `retry_after` one more passes."""
    async with scripted(Gate(is_free=True)) as server:
        rate = [{"name": "plan", "calls": 4, "per": "800ms", "burst": 2}]
        with mesh_of(tmp_path, orders([server], {"rate": rate})) as mesh:
            async with caller(mesh, client) as get:
                await get("/")
                await get("/")
                with pytest.raises(meshlib.RateLimited) as caught:
                    await get("/")
                error = caught.value
                assert error.reason == "admit.rate"
                assert 0 < error.retry_after <= 0.2
                assert "plan" in str(error) and "4 calls in 0.8 s" in str(error)
                assert isinstance(error, httpx.RequestError)
                assert len(server.requests) == 2
                await asyncio.sleep(error.retry_after)
                assert (await get("/")).status_code == 200
                assert rows(mesh)[""]["rate_limited"] == 1
                assert permits(mesh) == (0, 0)


@CLIENTS
async def test_a_rate_by_header_counts_each_value_for_itself(tmp_path: Path, client: str) -> None:
    """One tenant that talks too much takes nothing from another; those without the header share one limit."""
    async with scripted(Gate(is_free=True)) as server:
        rate = [{"calls": 2, "per": "1h", "by": [{"header": "x-tenant"}]}]
        with mesh_of(tmp_path, orders([server], {"rate": rate})) as mesh:
            async with caller(mesh, client) as get:
                for headers in ({"X-Tenant": "a"}, {"x-tenant": "b"}, {}):
                    for _ in range(2):
                        await get("/", headers=headers)
                    with pytest.raises(meshlib.RateLimited) as caught:
                        await get("/", headers=headers)
                    assert 1700 < caught.value.retry_after <= 1800
            assert Counter(request.headers.get("x-tenant") for request in server.requests) == {"a": 2, "b": 2, None: 2}


async def test_a_refused_call_takes_nothing_from_other_limits(tmp_path: Path) -> None:
    """All limits hold or none is used: what one tenant is refused, the service's own limit doesn't count."""
    async with scripted(Gate(is_free=True)) as server:
        rate = [{"calls": 4, "per": "1h"}, {"calls": 1, "per": "1h", "by": [{"header": "x-tenant"}]}]
        with mesh_of(tmp_path, orders([server], {"rate": rate})) as mesh:
            async with caller(mesh, "async") as get:
                await get("/", headers={"x-tenant": "a"})
                for _ in range(5):
                    with pytest.raises(meshlib.RateLimited):
                        await get("/", headers={"x-tenant": "a"})
                for name in "bcd":
                    await get("/", headers={"x-tenant": name})
                with pytest.raises(meshlib.RateLimited):
                    await get("/", headers={"x-tenant": "e"})


async def test_a_rate_by_route_counts_each_route_for_itself(tmp_path: Path) -> None:
    """One use of a service can't use up what is meant for another."""
    async with scripted(Gate(is_free=True)) as server:
        services = orders(
            [server],
            {"rate": [{"calls": 1, "per": "1h", "by": ["route"]}]},
            route=[{"name": "search", "match": {"path": {"prefix": "/search"}}}, {"name": "rest"}],
        )
        with mesh_of(tmp_path, services) as mesh:
            async with caller(mesh, "async") as get:
                for path in ("/search", "/"):
                    await get(path)
                    with pytest.raises(meshlib.RateLimited):
                        await get(path)


@CLIENTS
async def test_a_rate_by_peer_counts_on_whose_behalf_a_handler_calls(tmp_path: Path, client: str) -> None:
    """Each of our own callers has a limit; calls on our own account share another."""
    async with scripted(Gate(is_free=True)) as server:
        rate = [{"calls": 2, "per": "1h", "by": ["peer"]}]
        with mesh_of(tmp_path, orders([server], {"rate": rate})) as mesh:
            async with caller(mesh, client) as get:

                async def handler(scope: Any, receive: Any, send: Any) -> None:
                    try:
                        status = (await get("/")).status_code
                    except meshlib.RateLimited:
                        status = 429
                    await send({"type": "http.response.start", "status": status, "headers": []})
                    await send({"type": "http.response.body"})

                app = mesh.asgi(handler)

                async def serve(name: str) -> int:
                    outside = Caller()
                    peer = Peer(f"spiffe://shop.internal/ns/default/sa/{name}", is_tls=True)
                    await app(http_scope("/", peer=peer), outside.receive, outside.send)
                    return outside.status

                for name in ("storefront", "billing"):
                    assert [await serve(name) for _ in range(4)] == [200, 200, 429, 429]
                assert (await get("/")).status_code == 200


async def test_a_limit_that_is_used_up_stays_so_when_the_configuration_is_read_again(tmp_path: Path) -> None:
    """Otherwise each change of the file would let another burst through."""
    async with scripted(Gate(is_free=True)) as server:
        admit = {"rate": [{"calls": 1, "per": "1h"}]}
        with mesh_of(tmp_path, orders([server], admit)) as mesh:
            async with caller(mesh, "async") as get:
                await get("/")
                write_config(tmp_path, {"me": {}, **orders([server], admit, deadline="3s")})
                assert mesh.reload()
                with pytest.raises(meshlib.RateLimited):
                    await get("/")


async def test_retries_are_not_counted_by_a_rate(tmp_path: Path) -> None:
    """A limit is of calls, and once per call: the budget is what limits retries."""
    async with scripted(Status(503)) as bad, scripted(Status()) as good:
        services = orders([bad, good], {"rate": [{"calls": 2, "per": "1h"}], "breaker": {"failures": 100, "minimum_calls": 100}})
        with mesh_of(tmp_path, services) as mesh:
            async with caller(mesh, "async") as get:
                assert [(await get("/")).status_code for _ in range(2)] == [200, 200]
                assert len(bad.requests) + len(good.requests) > 2


# ------------------------------------------------------------------ throttling


@CLIENTS
async def test_a_service_that_refuses_most_is_sent_less(tmp_path: Path, client: str) -> None:
    """Throttled, which is a LimitExceeded, in an outage; when that is over and forgotten, everything goes out again."""
    status = Status(503)
    async with scripted(status) as server:
        admit = {"throttle": 2, "throttle_window": "1s"}
        with mesh_of(tmp_path, orders([server], admit, retry=NO_RETRY)) as mesh:
            async with caller(mesh, client) as get:

                async def ask() -> int:
                    try:
                        return int((await get("/")).status_code)
                    except meshlib.Throttled as error:
                        assert isinstance(error, meshlib.LimitExceeded)
                        assert error.reason == "admit.throttle"
                        assert "at most 2 times what it accepts" in str(error)
                        return 0

                seen = Counter([await ask() for _ in range(150)])
                assert set(seen) == {503, 0}
                # The chance to be let through after n refusals is about 1/n.
                assert seen[503] < 40
                assert rows(mesh)[""]["throttled"] == seen[0]
                assert len(server.requests) == seen[503]
                if client == "blocking":
                    return  # the rest is time that passes
                status.status = 200
                end = time.monotonic() + 5
                while (await ask()) != 200 and time.monotonic() < end:
                    await asyncio.sleep(0.02)
                await asyncio.sleep(1.1)
                assert Counter([await ask() for _ in range(50)]) == {200: 50}
                assert permits(mesh) == (0, 0)


# ------------------------------------------------------------------ a limit that is learnt


@CLIENTS
async def test_an_adaptive_limit_is_in_force_and_shown(tmp_path: Path, client: str) -> None:
    """It begins where it is told to, and a call beyond it is refused, far below the fixed one."""
    gate = Gate()
    async with scripted(gate) as server:
        admit = {"adaptive": "gradient", "adaptive_limits": {"initial": 5, "least": 4, "most": 50}}
        with mesh_of(tmp_path, orders([server], admit)) as mesh:
            assert rows(mesh)[""]["limit"] == 5
            async with caller(mesh, client) as get:
                calls = [asyncio.create_task(get("/")) for _ in range(5)]
                await settled(lambda: len(server.requests) == 5)
                with pytest.raises(meshlib.LimitExceeded) as caught:
                    await get("/")
                assert '5 calls to "orders" are in flight already' in str(caught.value)
                gate.free.set()
                await asyncio.gather(*calls)
                for _ in range(40):
                    await asyncio.gather(*(get("/") for _ in range(4)))
                    mesh.engine.tend(time.monotonic())
            assert 4 <= rows(mesh)[""]["limit"] <= 50


async def test_an_adaptive_limit_grows_under_load_that_stays_quick(tmp_path: Path) -> None:
    """As many callers as there may be, and an answer that takes the same time whatever the load."""

    async def steady(server: Scripted, request: Request) -> bytes:
        await asyncio.sleep(0.02)
        return ok()

    async with scripted(steady) as server:
        admit = {"adaptive": "gradient", "adaptive_limits": {"initial": 4, "least": 4, "most": 12}}
        with mesh_of(tmp_path, orders([server], admit)) as mesh:
            async with caller(mesh, "async") as get:
                end = time.monotonic() + 8
                while rows(mesh)[""]["limit"] <= 4 and time.monotonic() < end:
                    await asyncio.gather(*(get("/") for _ in range(rows(mesh)[""]["limit"])))
                    mesh.engine.tend(time.monotonic())
            assert 4 < rows(mesh)[""]["limit"] <= 12


# ------------------------------------------------------------------ endpoints that are taken out


@CLIENTS
async def test_an_endpoint_that_is_slow_half_of_the_time_is_taken_out(tmp_path: Path, client: str) -> None:
    """Slow and correct counts, where the configuration says what is slow; the others take its calls."""

    async def slow(server: Scripted, request: Request) -> bytes:
        await asyncio.sleep(0.06)
        return ok(server.address.encode())

    async with scripted(slow) as tired, scripted(Gate(is_free=True)) as quick:
        breaker = {"slow": "50ms", "slow_rate": 0.5, "minimum_calls": 4, "open": ["60s", "60s"]}
        with mesh_of(tmp_path, orders([tired, quick], {"breaker": breaker})) as mesh:
            async with caller(mesh, client) as get:
                texts = [(await get("/")).extensions["meshlib.call"].explain() for _ in range(8)]
                assert len(tired.requests) == 4
                assert any("the endpoint is taken out: its breaker opened" in text for text in texts)
                assert rows(mesh)[tired.address]["breaker"] == "open"
                assert {(await get("/")).text for _ in range(6)} == {quick.address}
                assert "out: its breaker is open" in (await get("/")).extensions["meshlib.call"].explain()


@pytest.mark.parametrize("kind", ["http", "tcp"])
async def test_a_failing_check_takes_an_endpoint_out_before_a_call_fails(tmp_path: Path, kind: str) -> None:
    """And back when it passes again. Only services that are called are asked how they are."""
    health = {"sick": 200}

    async def answer(server: Scripted, request: Request) -> bytes:
        if request.target == "/ready":
            status = health.get("sick", 200) if server is sick else 200
            return f"HTTP/1.1 {status} x\r\ncontent-length: 0\r\n\r\n".encode()
        return ok(server.address.encode())

    async with scripted(answer) as sick, scripted(answer) as well:
        check = {"kind": kind, "every": "200ms", "timeout": "190ms", "failures": 2, "successes": 1}
        if kind == "http":
            check["path"] = "/ready"
        with mesh_of(tmp_path, orders([sick, well], {"check": check})) as mesh:
            async with caller(mesh, "async") as get:
                assert {(await get("/")).text for _ in range(4)} == {sick.address, well.address}
                if kind == "http":
                    await settled(lambda: any(request.target == "/ready" for request in sick.requests))
                    health["sick"] = 503
                else:
                    port = sick.port
                    await sick.stop()
                await settled(lambda: rows(mesh)[sick.address]["breaker"] != "closed")
                answers = [await get("/") for _ in range(6)]
                assert {answer.text for answer in answers} == {well.address}
                assert {answer.extensions["meshlib.call"].attempts for answer in answers} == {1}
                assert "check" in answers[0].extensions["meshlib.call"].explain()
                assert rows(mesh)[sick.address]["failures"] == 0
                if kind == "http":
                    health["sick"] = 200
                else:
                    await sick.start(port)
                await settled(lambda: rows(mesh)[sick.address]["breaker"] == "closed")
                assert {(await get("/")).text for _ in range(4)} == {sick.address, well.address}


async def test_a_service_that_nobody_calls_is_not_checked(tmp_path: Path) -> None:
    """Every process asks every endpoint that it uses, and no other."""
    async with scripted(Gate(is_free=True)) as used, scripted(Gate(is_free=True)) as unused:
        check = {"kind": "http", "path": "/ready", "every": "100ms", "timeout": "90ms"}
        services = {
            **orders([used], {"check": check}),
            "prices": {"discover": {"static": [unused.address]}, "admit": {"check": check}},
        }
        with mesh_of(tmp_path, services) as mesh:
            async with caller(mesh, "async") as get:
                await get("/")
                await settled(lambda: sum(request.target == "/ready" for request in used.requests) >= 1)
        assert unused.requests == []
