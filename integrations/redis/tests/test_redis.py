"""Is a limit in Redis one limit for all? A real redis-server, real processes, and all that can happen to either."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from importlib.metadata import entry_points
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import redis
from meshlib_redis import RedisLimiter, open_limiter
from meshlib_redis.limiter import _Asker, wait, window

import meshlib
from meshlib.admit.inbound import STAND_IN, InboundRates
from meshlib.admit.limiter import RateGuard, Stores
from meshlib.client.way import run
from meshlib.config import RatePart, RatePolicy
from tests.support import free_port

pytestmark = pytest.mark.skipif(shutil.which("redis-server") is None, reason="redis-server is not installed")
# Generous, since a busy machine is no fault of the code; what is fast is shown by what isn't waited for.
PATIENCE = 2.0


class Server:
    """A redis-server of our own, that keeps nothing."""

    def __init__(self) -> None:
        self.port = free_port()
        self.child: subprocess.Popen[bytes] | None = None
        self.start()

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def start(self) -> None:
        options = ("--port", str(self.port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no")
        self.child = subprocess.Popen(["redis-server", *options], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        with redis.Redis(port=self.port, host="127.0.0.1") as client:
            end = time.monotonic() + 20
            while True:
                try:
                    client.ping()
                except redis.RedisError:
                    assert time.monotonic() < end, "redis-server does not start"
                    time.sleep(0.02)
                else:
                    return

    def send(self, what: signal.Signals) -> None:
        assert self.child is not None
        self.child.send_signal(what)

    def kill(self) -> None:
        assert self.child is not None
        self.child.kill()
        self.child.wait()


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    try:
        yield made
    finally:
        made.kill()


@pytest.fixture
def limiter(server: Server) -> RedisLimiter:
    return open_limiter({"url": server.url, "timeout": PATIENCE})


def guard(server: Server, on_failure: str = "local", *, calls: int = 3, per: float = 60.0, timeout: float = 0.05) -> RateGuard:
    """The guard of a process, as the mesh has it, with the store found by its entry point."""
    rate = RatePolicy("r", calls, per, calls, (RatePart("service", ""),), "redis", on_failure)
    config: Any = SimpleNamespace(
        name="shop",
        services={"orders": None},
        stores={"redis": {"url": server.url, "timeout": timeout}},
        rates_of=lambda _: (rate,),
    )
    made = RateGuard(source=random.Random(1))
    made.prepare(config)()
    return made


def ask(made: RateGuard) -> bool:
    return run(made.take("orders", "", None, [], time.monotonic() + 60, is_blocking=True))


# ---------------------------------------------------------------- counting


def test_the_mesh_finds_the_store_by_its_name() -> None:
    """By the entry point that this distribution brings."""
    (point,) = entry_points(group="meshlib.limit", name="redis")
    assert point.load() is open_limiter


async def test_blocking_and_asynchronous_callers_share_one_limit(limiter: RedisLimiter) -> None:
    """Six calls fit, whoever makes them; then both are told when to come again."""
    said = []
    for _ in range(4):
        said += [limiter.take("k", 6, 60.0, 6, PATIENCE), await limiter.take_async("k", 6, 60.0, 6, PATIENCE)]
    assert said[:6] == [0.0] * 6
    assert all(50.0 < seconds <= 60.0 for seconds in said[6:])
    assert limiter.take("other", 6, 60.0, 6, PATIENCE) == 0.0


def test_a_burst_is_what_comes_at_once(limiter: RedisLimiter) -> None:
    """Ten a minute with a burst of two: two at once, and the next within the sixth of a minute that two stand for."""
    said = [limiter.take("k", 10, 60.0, 2, PATIENCE) for _ in range(3)]
    assert said[:2] == [0.0, 0.0]
    assert 10.0 < said[2] <= 12.0


def test_who_waits_as_told_gets_the_rate_and_no_more(limiter: RedisLimiter) -> None:
    """40 a second with a burst of 4. In any stretch of time come at most 4 and what the rate gives, as with the engine's own."""
    times: list[tuple[float, float]] = []
    end = time.monotonic() + 1.0
    while time.monotonic() < end:
        before = time.monotonic()
        seconds = limiter.take("k", 40, 1.0, 4, PATIENCE)
        if seconds == 0.0:
            times.append((before, time.monotonic()))
        else:
            time.sleep(seconds)
    assert len(times) >= 20
    spans = [(n, times[i + n - 1][1] - times[i][0]) for i in range(len(times)) for n in range(1, len(times) - i + 1)]
    worst = max(n - 4 - 40 * seconds for n, seconds in spans)
    assert worst <= 1


@pytest.mark.parametrize(
    ("calls", "per", "burst", "expected"),
    [
        (100, 1.0, 100, (100, 1.0)),
        (100, 1.0, 10, (10, 0.1)),
        (3, 1.0, 1, (1, 0.333)),
        (100, 1.0, 1000, (1000, 10.0)),
        (10_000, 1.0, 1, (100, 0.01)),
        (1, 86_400.0, 1, (1, 86_400.0)),
        (150, 1.0, 1, (2, 0.013)),
    ],
)
def test_a_rate_is_a_window(calls: int, per: float, burst: int, expected: tuple[int, float]) -> None:
    """As many seconds as the burst stands for; below 10 ms the burst is what comes in 10 ms."""
    most, seconds = window(calls, per, burst)
    assert (most, seconds * 1000) == (expected[0], pytest.approx(expected[1] * 1000, abs=4))


def test_every_window_is_whole_milliseconds_for_the_script() -> None:
    """It multiplies by 1000, and Redis refuses fractions."""
    seconds = [window(1, length / 1000, 1)[1] for length in range(1, 5000)]
    assert [float(repr(each)) * 1000 for each in seconds] == [round(each * 1000) for each in seconds]


@pytest.mark.parametrize(
    ("state", "expected"),
    [
        ((10, 1.0, 5, 0.5, 5, 1.5), 0.001),  # five of the last window weigh 2.5: there is room
        ((10, 1.0, 10, 0.9, 5, 1.9), 0.401),  # their weight must fall below five
        ((10, 1.0, 3, 0.9, 10, 1.7), 0.7),  # this window must end
        ((10, 1.0, 0, 0.0, 9, 1.7), 0.001),
    ],
)
def test_the_wait_is_what_the_counters_say(state: tuple[int, float, int, float, int, float], expected: float) -> None:
    """The calls of the last window lose weight, or this one ends."""
    assert wait(*state) == pytest.approx(expected)


def test_the_configuration_beside_the_example_is_whole(server: Server, tmp_path: Path) -> None:
    """From mesh.yaml to Redis: all callers together, and each tenant for itself."""
    text = (Path(__file__).parent.parent / "mesh.yaml").read_text()
    file = tmp_path / "mesh.yaml"
    file.write_text(text.replace("redis://127.0.0.1:6379/0", server.url).replace("per: 1s", "per: 1h"))
    config = meshlib.Mesh.load(file, service="storefront").config
    made = RateGuard()
    made.prepare(config)()

    def call(tenant: bytes) -> bool:
        try:
            run(made.take("orders", "orders/0", None, [(b"X-Tenant", tenant)], time.monotonic() + 60, is_blocking=True))
        except meshlib.RateLimited:
            return False
        return True

    assert [sum(call(tenant) for _ in range(30)) for tenant in (b"a", b"b")] == [20, 20]
    assert ("storefront" in made, [row["refused"] for row in made.stats()]) == (False, [0, 20])


# ---------------------------------------------------------------- calls that come in


def inbound(server: Server, stores: Stores | None = None, *, calls: int = 3) -> InboundRates:
    """The rates of a process for what comes in, by the address of the client."""
    rate = RatePolicy("clients", calls, 60.0, calls, (RatePart("client", ""),), "redis", "local")
    config: Any = SimpleNamespace(
        name="shop",
        service="orders",
        stores={"redis": {"url": server.url, "timeout": PATIENCE}},
        own=SimpleNamespace(inbound_global_rates=(rate,)),
    )
    made = InboundRates(stores, source=random.Random(1))
    made.prepare(config)()
    return made


async def test_what_comes_in_to_several_processes_is_counted_together(server: Server) -> None:
    """Whoever handles the calls; one address of IPv6 is the whole subscriber, and another client has a limit of his own."""
    here, there = inbound(server), inbound(server)
    said = [
        here.take_blocking("", "", "2001:db8::1", []),
        await there.take("", "", "2001:db8::2", []),
        here.take_blocking("items", "spiffe://shop/a", "2001:db8::3", []),
        await here.take("", "", "2001:db8::4", []),
        there.take_blocking("", "", "2001:db8::5", []),
        await there.take("", "", "192.0.2.7", []),
    ]
    assert said[:3] + said[5:] == [None] * 4
    assert all(isinstance(seconds, float) and 0.0 < seconds <= 60.0 for seconds in said[3:5])
    assert [(row["asked"], row["refused"]) for made in (here, there) for row in made.stats()] == [(3, 1), (3, 1)]


async def test_both_ways_share_the_connections_and_what_is_known_of_the_store(server: Server) -> None:
    """When Redis dies, who notices first notices for both; and when it is back, it is back for both."""
    stores = Stores()
    made, out = inbound(server, stores), RateGuard(stores, source=random.Random(1))
    rate = RatePolicy("r", 9, 60.0, 9, (RatePart("service", ""),), "redis", "local")
    config: Any = SimpleNamespace(
        name="shop",
        services={"orders": None},
        stores={"redis": {"url": server.url, "timeout": PATIENCE}},
        rates_of=lambda _: (rate,),
    )
    out.prepare(config)()
    assert (made.take_blocking("", "", "192.0.2.7", []), ask(out)) == (None, False)
    with redis.Redis(port=server.port) as client:
        # Ours, and the one that asks.
        assert client.info("clients")["connected_clients"] == 2
    server.kill()
    assert (await made.take("", "", "192.0.2.7", []), out.is_away("orders"), ask(out)) == (STAND_IN, True, True)
    assert [row["asked"] for row in out.stats()] == [1]
    server.start()
    end = time.monotonic() + 20
    while made.take_blocking("", "", "192.0.2.7", []) is STAND_IN:
        assert time.monotonic() < end
        await asyncio.sleep(0.02)
    assert (out.is_away("orders"), ask(out)) == (False, False)


# ---------------------------------------------------------------- processes, loops, threads


def taken(url: str, seconds: float, out: Any) -> None:
    """A process that takes what it gets."""
    limiter = open_limiter({"url": url, "timeout": PATIENCE})
    end = time.monotonic() + seconds
    got = 0
    while time.monotonic() < end:
        got += limiter.take("shared", 50, 60.0, 50, PATIENCE) == 0.0
    out.put(got)


def test_two_processes_share_one_limit(server: Server) -> None:
    """Both ask as fast as they can: fifty are granted, together."""
    context = multiprocessing.get_context("spawn")
    out = context.Queue()
    children = [context.Process(target=taken, args=(server.url, 1.0, out)) for _ in range(2)]
    for child in children:
        child.start()
    got = [out.get(timeout=60) for _ in children]
    for child in children:
        child.join()
    assert sum(got) == 50


def test_threads_share_one_limit(limiter: RedisLimiter) -> None:
    """More of them than there are connections."""
    got: deque[float] = deque()

    def work() -> None:
        got.extend(limiter.take("k", 100, 60.0, 100, PATIENCE) for _ in range(4))

    threads = [threading.Thread(target=work) for _ in range(40)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(seconds == 0.0 for seconds in got) == 100


def test_each_event_loop_has_its_own_connections(limiter: RedisLimiter) -> None:
    """One after the other, and two at the same time; those of closed loops are let go."""

    async def three() -> list[float]:
        return await asyncio.gather(*(limiter.take_async("k", 9, 60.0, 9, PATIENCE) for _ in range(3)))

    assert asyncio.run(three()) == [0.0] * 3
    assert asyncio.run(three()) == [0.0] * 3
    got: list[float] = []
    with asyncio.Runner() as outer:
        got += outer.run(three())
        thread = threading.Thread(target=lambda: got.extend(asyncio.run(three())))
        thread.start()
        thread.join()
        got += outer.run(three())
        assert len(limiter._by_loop) == 2
    assert [seconds == 0.0 for seconds in got] == [True] * 3 + [False] * 6
    gc.collect()  # the connections of closed loops are closed without a loop, which must raise nothing


async def test_a_forked_child_has_connections_of_its_own(server: Server, limiter: RedisLimiter) -> None:
    """And what the child does takes nothing away from the parent's loop and pool."""
    assert (limiter.take("k", 9, 60.0, 9, PATIENCE), await limiter.take_async("k", 9, 60.0, 9, PATIENCE)) == (0.0, 0.0)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            got = [limiter.take("k", 9, 60.0, 9, PATIENCE)]
            result: list[float] = []
            thread = threading.Thread(target=lambda: result.append(asyncio.run(limiter.take_async("k", 9, 60.0, 9, PATIENCE))))
            thread.start()
            thread.join()
            gc.collect()
            os.write(writer, json.dumps(got + result).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with open(reader, "rb") as pipe:
        assert json.loads(pipe.read()) == [0.0, 0.0]
    os.waitpid(child, 0)
    with redis.Redis(port=server.port) as client:
        before = client.info("stats")["total_connections_received"]
        assert (limiter.take("k", 9, 60.0, 9, PATIENCE), await limiter.take_async("k", 9, 60.0, 9, PATIENCE)) == (0.0, 0.0)
        assert client.info("stats")["total_connections_received"] == before


async def test_cancelled_calls_leave_no_answer_behind(limiter: RedisLimiter) -> None:
    """An answer that nobody waited for must not be taken for the next one's, and no connection is lost."""
    chance = random.Random(3)
    await limiter.take_async("warm", 9, 60.0, 9, PATIENCE)
    for _ in range(100):
        task = asyncio.create_task(limiter.take_async("full", 1, 60.0, 1, PATIENCE))
        for _ in range(chance.randrange(12)):
            await asyncio.sleep(0)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
    said = await asyncio.gather(*(limiter.take_async("fresh", 64, 60.0, 64, PATIENCE) for _ in range(65)))
    assert sorted(seconds == 0.0 for seconds in said) == [False] + [True] * 64


async def test_calls_of_one_moment_are_asked_for_together(server: Server, limiter: RedisLimiter) -> None:
    """A thousand calls, of which seven hundred fit: a handful of questions, and exactly seven hundred go."""
    await limiter.take_async("warm", 1, 60.0, 1, PATIENCE)
    with redis.Redis(port=server.port) as client:
        client.config_resetstat()
        said = await asyncio.gather(*(limiter.take_async("k", 700, 60.0, 700, PATIENCE) for _ in range(1000)))
        questions = client.info("commandstats")["cmdstat_evalsha"]["calls"]
    assert (sum(seconds == 0.0 for seconds in said), questions <= 8) == (700, True)
    assert await limiter.take_async("k", 700, 60.0, 700, PATIENCE) > 50.0


async def test_a_question_that_fails_fails_all_who_share_it_and_only_them(server: Server, limiter: RedisLimiter) -> None:
    """Each gets an error of its own; the next one asks anew."""
    assert await limiter.take_async("k", 99, 60.0, 99, PATIENCE) == 0.0
    server.kill()
    said = await asyncio.gather(*(limiter.take_async("k", 99, 60.0, 99, PATIENCE) for _ in range(9)), return_exceptions=True)
    assert [isinstance(each, redis.RedisError) for each in said] == [True] * 9
    assert len({id(each) for each in said}) == 9
    server.start()
    assert await limiter.take_async("k", 99, 60.0, 99, PATIENCE) == 0.0


class Hanging:
    """A store that says nothing until it is told to go on."""

    def __init__(self) -> None:
        self.asked: list[int] = []
        self.go = asyncio.Event()

    async def acquire_sliding_window_entry(self, key: str, most: int, seconds: float, amount: int) -> bool:
        self.asked.append(amount)
        await self.go.wait()
        return True


@pytest.mark.parametrize("has_begun", [False, True])
async def test_a_cancelled_question_is_a_failure_for_who_shares_it(has_begun: bool) -> None:
    """Nobody cancelled them: neither those it asks for, nor who waits for the next one. Who comes later asks anew."""
    store: Any = Hanging()
    asker = _Asker(asyncio.get_running_loop(), store)
    first, *others = [asyncio.create_task(asker.take("k", 9, 60.0)) for _ in range(3)]
    await asyncio.sleep(0)
    first.cancel()
    while not asker._tasks or (has_begun and len(store.asked) < 2):
        await asyncio.sleep(0)
    if has_begun:
        others.append(asyncio.create_task(asker.take("k", 9, 60.0)))
        await asyncio.sleep(0)
    assert store.asked == ([1, 2] if has_begun else [1])
    (task,) = asker._tasks
    task.cancel()
    async with asyncio.timeout(5):
        said = await asyncio.gather(*others, return_exceptions=True)
    assert {type(each) for each in said} == {redis.ConnectionError}
    store.go.set()
    assert (await asker.take("k", 9, 60.0), asker._queues) == (0.0, {})


# ---------------------------------------------------------------- a store that is away


@pytest.mark.parametrize("on_failure", ["local", "open", "closed"])
def test_a_store_that_is_killed_costs_no_call_and_comes_back(server: Server, on_failure: str) -> None:
    """Local: the engine's own limit stands in. Open: all pass. Closed: all are refused. And back again."""
    made = guard(server, on_failure, calls=1000, timeout=PATIENCE)
    assert ask(made) is False
    server.kill()
    for _ in range(3):
        if on_failure == "closed":
            with pytest.raises(meshlib.RateLimited) as caught:
                ask(made)
            assert caught.value.reason == "admit.rate_store"
        else:
            assert ask(made) is (on_failure == "local")
    assert (made.stats()[0]["failed"], made.stats()[0]["skipped"]) == (1, 2)
    server.start()
    made._rates["orders"][0].store.until = 0.0  # a second later
    assert (ask(made), made.stats()[0]["is_away"]) == (False, False)


def test_a_store_that_hangs_holds_up_nobody_for_longer_than_its_time(server: Server) -> None:
    """On a connection that is there, and on a new one, which the kernel accepts though nobody serves it."""
    warm, cold = guard(server, calls=1000, timeout=0.1), guard(server, calls=1000, timeout=0.1)
    assert ask(warm) is False
    server.send(signal.SIGSTOP)
    try:
        for made, asked in ((warm, 2), (cold, 1)):
            began = time.monotonic()
            assert [ask(made) for _ in range(20)] == [True] * 20
            assert 0.05 < time.monotonic() - began < 1.0
            assert (made.stats()[0]["asked"], made.stats()[0]["skipped"]) == (asked, 19)
    finally:
        server.send(signal.SIGCONT)
    warm._rates["orders"][0].store.until = 0.0
    assert ask(warm) is False


async def test_a_store_that_hangs_does_not_hold_up_the_loop(server: Server) -> None:
    """All that ask at that moment wait for its time, side by side, and the loop goes on."""
    made = guard(server, timeout=0.2)
    assert await made.take("orders", "", None, [], time.monotonic() + 60, is_blocking=False) is False
    server.send(signal.SIGSTOP)
    try:
        began = time.monotonic()
        asking = [made.take("orders", "", None, [], time.monotonic() + 60, is_blocking=False) for _ in range(20)]
        assert await asyncio.gather(*asking) == [True] * 20
        assert 0.1 < time.monotonic() - began < 1.5
    finally:
        server.send(signal.SIGCONT)


def test_a_slow_answer_of_many_steps_takes_no_longer_than_the_call(limiter: RedisLimiter) -> None:
    """Each step of a new connection is answered just in time, but together they are late."""
    with socket_that_dawdles(0.15) as port:
        slow = open_limiter({"url": f"redis://:pw@127.0.0.1:{port}/3", "timeout": 0.2})
        began = time.monotonic()
        with pytest.raises(redis.RedisError):
            slow.take("k", 1, 1.0, 1, 0.2)
        assert time.monotonic() - began < 0.29


@contextlib.contextmanager
def socket_that_dawdles(seconds: float) -> Iterator[int]:
    """Says +OK to everything, later."""
    import socket

    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        with contextlib.suppress(OSError):
            peer, _ = listener.accept()
            with peer:
                while peer.recv(65536):
                    time.sleep(seconds)
                    peer.sendall(b"+OK\r\n")

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield listener.getsockname()[1]
    finally:
        listener.close()
        thread.join(5)


# ---------------------------------------------------------------- settings


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"url": "http://:hunter2@host"},
        {"url": "redis://:hunter2@host:no"},
        {"url": 7},
        {"url": "redis://:hunter2@host", "url_file": "/x"},
        {"url_file": "/no/such/file"},
        {"url": "redis://:hunter2@host", "password": "hunter2"},
        {"url": "redis://:hunter2@host", "connections": 0},
    ],
)
def test_settings_that_are_wrong_are_told_without_their_secrets(settings: dict[str, Any]) -> None:
    """A URL may hold a password."""
    with pytest.raises(meshlib.ConfigError, match=r"stores\.redis: ") as caught:
        open_limiter(settings)
    assert "hunter2" not in str(caught.value)


def test_the_url_may_stand_in_a_file(server: Server, tmp_path: Path) -> None:
    """As an orchestrator mounts secrets; and it is in no repr."""
    file = tmp_path / "url"
    file.write_text(server.url + "\n")
    made = open_limiter({"url_file": str(file), "url": None})
    assert (made.take("k", 1, 1.0, 1, PATIENCE), str(server.port) in repr(made)) == (0.0, False)


def test_the_example_runs(server: Server) -> None:
    """As its README says."""
    example = Path(__file__).parent.parent / "example.py"
    out = subprocess.run(
        [sys.executable, str(example), server.url], capture_output=True, text=True, timeout=60, check=False, cwd=example.parent
    )
    assert (out.returncode, out.stderr) == (0, "")
    assert "10 granted" in out.stdout
