"""A gRPC call that finds no place waits for one, as others do: in asyncio and in threads. Real servers and gate."""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable
from concurrent import futures
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import grpc.aio
import pytest

from meshlib.admit.inbound import STAND_IN
from meshlib.call import current_visit
from meshlib.server.grpc import add_port, sync_server_interceptors

sys.path.insert(0, str(Path(__file__).parent.parent / "grpc_support"))
from grpc_world import CHAT, COUNT, ECHO, SLOW, Backend, Party, Shop, until, yaml_of

Code = grpc.StatusCode
PUSHBACK = ("grpc-retry-pushback-ms", "-1")
Open = Callable[..., Any]


@pytest.fixture
async def open_house(tmp_path: Path) -> AsyncIterator[Open]:
    """A server in mode observe with these keys of `inbound`, and a channel to it."""
    shops: list[Shop] = []
    channels: list[Any] = []

    async def open_it(inbound: str, more: str = "", rates: Any = None) -> tuple[Backend, Any]:
        shop = Shop(tmp_path, yaml_of("observe", more=more, service=f"    inbound: {inbound}"))
        shops.append(shop)
        party = shop.party("inventory")
        party.inbound_rates = rates
        backend = await shop.start("a", party=party)
        channels.append(grpc.aio.insecure_channel(backend.address))
        return backend, channels[-1]

    yield open_it
    for channel in channels:
        await channel.close()
    for shop in shops:
        await shop.stop()


async def failure(call: Any) -> Any:
    with pytest.raises(grpc.RpcError) as caught:
        await call
    return caught.value


def load(party: Party) -> tuple[int, int]:
    """How many are in the handlers' hands, and how many wait."""
    found = party.gate.load()
    return found["in_flight"], found["waiting"]


def codes(party: Party, method: str) -> dict[str, int]:
    return {code: count for row in party.gate.stats() if row["method"] == method for code, count in row["codes"].items()}


async def test_a_call_waits_until_there_is_a_place(open_house: Open) -> None:
    """Of every kind; and who finds the queue full, too, is sent elsewhere at once."""
    backend, channel = await open_house("{in_flight: 1, queue: 2, codel: {interval: 5s}}")
    first = channel.unary_unary(SLOW)(b"0.4")
    await until(lambda: backend.calls == 1)
    echo = asyncio.ensure_future(_of(channel.unary_unary(ECHO)(b"x")))
    await until(lambda: load(backend.party) == (1, 1))
    count = asyncio.ensure_future(_all(channel.unary_stream(COUNT)(b"2")))
    await until(lambda: load(backend.party) == (1, 2))
    error = await failure(channel.unary_unary(ECHO)(b"y"))
    assert (error.code(), error.details(), tuple(error.trailing_metadata())) == (Code.UNAVAILABLE, "too many calls", ())
    assert (await first, await echo, await count) == (b"at last", b"x", [b"0", b"1"])
    await until(lambda: load(backend.party) == (0, 0))


async def _of(call: Any) -> Any:
    return await call


async def _all(call: Any) -> list[bytes]:
    return [message async for message in call]


async def test_who_waits_in_vain_is_told_not_to_try_again(open_house: Open) -> None:
    """The service has more to do than it can: a retry elsewhere would be more of the same."""
    backend, channel = await open_house("{in_flight: 1, queue: 2, codel: {interval: 50ms}}")
    first = channel.unary_unary(SLOW)(b"30")
    await until(lambda: backend.calls == 1)
    error = await failure(channel.unary_unary(ECHO)(b"x"))
    assert (error.code(), error.details()) == (Code.UNAVAILABLE, "too many calls")
    assert PUSHBACK in tuple(error.trailing_metadata())
    first.cancel()
    await until(lambda: load(backend.party) == (0, 0))
    assert await channel.unary_unary(ECHO)(b"y") == b"y"


async def test_who_leaves_while_it_waits_gives_up_its_place_in_the_queue(open_house: Open) -> None:
    """And counts as cancelled, not as answered; the handler never hears of it."""
    backend, channel = await open_house("{in_flight: 1, queue: 1, codel: {interval: 20s}}")
    first = channel.unary_unary(SLOW)(b"30")
    await until(lambda: backend.calls == 1)
    second = channel.unary_unary(ECHO)(b"x")
    await until(lambda: load(backend.party) == (1, 1))
    second.cancel()
    await until(lambda: load(backend.party) == (1, 0))
    first.cancel()
    await until(lambda: load(backend.party) == (0, 0))
    assert backend.calls == 1
    assert codes(backend.party, ECHO) == {"1": 1}


async def test_probes_of_health_need_no_place(open_house: Open) -> None:
    """A service that is full is well."""
    backend, channel = await open_house("{in_flight: 1, queue: 0}")
    first = channel.unary_unary(SLOW)(b"30")
    await until(lambda: backend.calls == 1)
    assert await channel.unary_unary("/grpc.health.v1.Health/Check")(b"") == b"\x08\x01"
    assert (await failure(channel.unary_unary(ECHO)(b"")))._code is Code.UNAVAILABLE
    first.cancel()


async def test_a_handler_knows_how_much_its_call_matters(open_house: Open) -> None:
    """By `priority`; it travels on with the handler's calls."""
    backend, channel = await open_house("{priority: [{from: ['*'], paths: [/shop.Inventory/Level], as: sheddable}]}")

    async def level(request: bytes, context: Any) -> bytes:
        visit = current_visit.get()
        return b"" if visit is None else visit.priority.encode()

    methods = {name: grpc.unary_unary_rpc_method_handler(level) for name in ("Level", "Other")}
    backend.server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("shop.Inventory", methods),))
    assert await channel.unary_unary("/shop.Inventory/Level")(b"") == b"sheddable"
    assert await channel.unary_unary("/shop.Inventory/Other")(b"") == b""


class Store:
    """Shared rates: three calls fit, then there is no answer."""

    def __init__(self, answers: list[Any]) -> None:
        self.answers = answers
        self.asked: list[tuple[Any, ...]] = []

    async def take(self, route: str, peer: str, client: str, headers: Any) -> Any:
        return self.take_blocking(route, peer, client, headers)

    def take_blocking(self, route: str, peer: str, client: str, headers: Any) -> Any:
        self.asked.append((peer, client, [value for name, value in headers if name == b"x-tenant"]))
        return self.answers.pop(0)


SHARED = "{rate: [{calls: 1, per: 1h, store: redis, by: [{client: true}]}]}"
STORES = "stores: {redis: {url: 'redis://127.0.0.1:1'}}"


async def test_a_rate_of_all_processes_is_asked_of_its_store(open_house: Open) -> None:
    """With the caller, its address and what it said; while the store is away, this process counts."""
    store = Store([None, 12.5, STAND_IN, STAND_IN])
    backend, channel = await open_house(SHARED, STORES, rates=store)
    assert await channel.unary_unary(ECHO)(b"x", metadata=(("x-tenant", "a"),)) == b"x"
    error = await failure(channel.unary_unary(ECHO)(b"y"))
    assert (error.code(), error.details()) == (Code.RESOURCE_EXHAUSTED, "too many calls")
    assert PUSHBACK in tuple(error.trailing_metadata())
    assert await channel.unary_unary(ECHO)(b"z") == b"z"
    assert (await failure(channel.unary_unary(ECHO)(b"")))._code is Code.RESOURCE_EXHAUSTED
    assert store.asked[0] == ("", "127.0.0.1", [b"a"])
    assert store.answers == []
    await until(lambda: load(backend.party) == (0, 0))


def test_threads_wait_as_well(tmp_path: Path) -> None:
    """A blocking server: a place, a queue, a store; and who has left meanwhile never reaches the handler."""
    shop = Shop(
        tmp_path,
        yaml_of("observe", more=STORES, service="    inbound: {in_flight: 1, queue: 3, codel: {interval: 5s}, " + SHARED[1:]),
    )
    party = shop.party("inventory")
    party.inbound_rates = store = Store([None, None, 3.0])
    go_on, calls = threading.Event(), list[bytes]()

    def hold(request: bytes, context: Any) -> bytes:
        calls.append(request)
        go_on.wait(10)
        return request

    server = grpc.server(futures.ThreadPoolExecutor(6), interceptors=list(sync_server_interceptors(party)))
    handler = grpc.unary_unary_rpc_method_handler(hold)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("shop.Inventory", {"Echo": handler}),))
    address = f"127.0.0.1:{add_port(party, server, '127.0.0.1:0')}"
    server.start()
    try:
        with grpc.insecure_channel(address) as channel:
            first = channel.unary_unary(ECHO).future(b"1")
            _wait(lambda: calls == [b"1"])
            leaver = channel.unary_unary(ECHO).future(b"2")
            _wait(lambda: load(party) == (1, 1))
            third = channel.unary_unary(ECHO).future(b"3")
            _wait(lambda: load(party) == (1, 2))
            leaver.cancel()
            # gRPC tells the server in its own time, which a busy machine has little of.
            time.sleep(0.5)
            go_on.set()
            assert (first.result(5), third.result(5)) == (b"1", b"3")
            _wait(lambda: load(party) == (0, 0))
            assert calls == [b"1", b"3"]
    finally:
        server.stop(None).wait(5)
    # Who had left was not asked about.
    assert store.answers == [3.0]


def _wait(condition: Callable[[], bool]) -> None:
    pause = threading.Event()
    for _ in range(1000):
        if condition():
            return
        pause.wait(0.005)
    raise AssertionError("it never came to hold")


async def test_streams_of_requests_wait_before_a_message_is_read(open_house: Open) -> None:
    """As the others."""
    backend, channel = await open_house("{in_flight: 1, queue: 2, codel: {interval: 5s}}")
    first = channel.unary_unary(SLOW)(b"0.2")
    await until(lambda: backend.calls == 1)
    chat = channel.stream_stream(CHAT)(iter([b"1"]))
    assert await _all(chat) == [b"re: 1"]
    await first


class Authorizers:
    """In place of those of a mesh: allows who says the word, in its own time."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str]] = []
        self.go_on = asyncio.Event()

    async def ask(self, name: str, inquiry: Any) -> bool:
        self.asked.append((name, inquiry.path))
        await self.go_on.wait()
        return (b"x-word", b"please") in inquiry.headers


@pytest.mark.parametrize("word", ["please", "now"])
async def test_a_rule_can_ask_somebody(tmp_path: Path, word: str) -> None:
    """With all the metadata; the call holds its place meanwhile, and a no is told as any other."""
    rules = (
        'allow: [{name: shop, from: [storefront], paths: ["/shop.Inventory/*"]}],'
        ' custom: [{from: [storefront], paths: ["/shop.Inventory/Echo"], authorizer: hours}]'
    )
    shop = Shop(tmp_path, yaml_of(allow=rules))
    party = shop.party("inventory")
    authorizers = Authorizers()
    party.trust = SimpleNamespace(authorizers=authorizers, keys=None)  # type: ignore[assignment]
    backend = await shop.start("a", party=party)
    identity = shop.party("storefront").identity
    assert identity is not None
    own = identity.current
    assert own is not None
    credentials = grpc.ssl_channel_credentials(own.bundles["shop.internal"], bytes(own.key), own.chain)
    options = [("grpc.ssl_target_name_override", "inventory.default.shop.internal")]
    async with grpc.aio.secure_channel(backend.address, credentials, options=options) as channel:
        call = channel.unary_unary(ECHO)(b"x", metadata=(("x-word", word),))
        await until(lambda: authorizers.asked == [("hours", ECHO)])
        assert (load(party), backend.calls) == ((1, 0), 0)
        authorizers.go_on.set()
        if word == "please":
            assert await call == b"x"
        else:
            error = await failure(call)
            assert (error.code(), error.details()) == (Code.PERMISSION_DENIED, "not allowed")
            assert backend.calls == 0
        await until(lambda: load(party) == (0, 0))
    await shop.stop()
