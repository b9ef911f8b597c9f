"""A gRPC call goes out through the mesh: real channels, servers, certificates and engine, on loopback."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from meshlib import deadline, errors
from meshlib._native import core
from meshlib.call import current_deadline, current_layer
from meshlib.client.grpc import client_interceptors, open_channel, open_sync_channel
from meshlib.client.grpc.status import judge, pushback, rpc_error

SUPPORT = Path(__file__).parent.parent / "grpc_support"
sys.path.insert(0, str(SUPPORT))
from grpc_world import (  # noqa: E402
    BREAK,
    CHAT,
    COUNT,
    ECHO,
    FAIL,
    SLOW,
    SUM,
    TELL,
    TRACE,
    WHO,
    Backend,
    Party,
    Shop,
    blocking_server,
    until,
    yaml_of,
)

UNAVAILABLE = grpc.StatusCode.UNAVAILABLE
# In turn, so that every endpoint is sure to be asked.
ONE_RETRY = "retry: {attempts: 1, backoff: [0.001, 0.002]}\nbalance: {policy: round_robin}"
NO_RETRY = "retry: {attempts: 0}"
IDEMPOTENT = (("x-mesh-idempotent", "1"),)


@pytest.fixture
async def shop(tmp_path: Path) -> AsyncIterator[Shop]:
    shop = Shop(tmp_path, yaml_of(more=ONE_RETRY))
    yield shop
    await shop.stop()


@pytest.fixture
async def pair(shop: Shop) -> tuple[Backend, Backend]:
    return await shop.start("a"), await shop.start("b")


@pytest.fixture
async def channel(shop: Shop, pair: tuple[Backend, Backend]) -> AsyncIterator[Any]:
    channel = open_channel(shop.party("storefront").knows([backend.address for backend in pair]), "inventory")
    yield channel
    await channel.close()


def called(*backends: Backend) -> int:
    return sum(backend.calls for backend in backends)


async def failure(call: Any) -> Any:
    """What a call raises."""
    with pytest.raises(grpc.RpcError) as caught:
        await call
    return caught.value


# ------------------------------------------------------------------------------------------------ four kinds, one surface


async def test_all_four_kinds_of_call_go_through(channel: Any) -> None:
    """A stub finds on the mesh channel what it finds on gRPC's own."""

    async def numbers() -> AsyncIterator[bytes]:
        for number in (1, 2, 3):
            yield str(number).encode()

    assert await channel.unary_unary(ECHO)(b"hello") == b"hello"
    assert [message async for message in channel.unary_stream(COUNT)(b"3")] == [b"0", b"1", b"2"]
    assert await channel.stream_unary(SUM)(numbers()) == b"6"
    assert [message async for message in channel.stream_stream(CHAT)(numbers())] == [b"re: 1", b"re: 2", b"re: 3"]


async def test_streams_can_be_written_and_read_by_hand(channel: Any) -> None:
    """The reader-writer style works, for requests and responses."""
    total = channel.stream_unary(SUM)()
    await total.write(b"4")
    await total.write(b"5")
    await total.done_writing()
    assert await total == b"9"

    chat = channel.stream_stream(CHAT)()
    await chat.write(b"x")
    assert await chat.read() == b"re: x"
    await chat.done_writing()
    assert await chat.read() is grpc.aio.EOF
    assert await chat.code() is grpc.StatusCode.OK

    count = channel.unary_stream(COUNT)(b"1")
    assert await count.read() == b"0"
    assert await count.read() is grpc.aio.EOF
    assert await count.read() is grpc.aio.EOF


async def test_a_call_tells_what_grpcs_own_call_tells(channel: Any) -> None:
    """Metadata, code, details, time and callbacks; and the mesh's record beside them."""
    told: list[Any] = []
    call = channel.unary_unary(TELL)(b"", timeout=5, metadata=(("x-a", "1"),))
    call.add_done_callback(told.append)
    assert await call == b"[('x-a', '1')]"
    assert (await call.initial_metadata())["name"] in ("a", "b")
    assert (await call.trailing_metadata())["bye"] == "now"
    assert (await call.code(), await call.details()) == (grpc.StatusCode.OK, "")
    assert (call.done(), call.cancelled(), call.cancel()) == (True, False, False)
    assert 0 < call.time_remaining() <= 5
    assert await call == b"[('x-a', '1')]"
    await call.wait_for_connection()
    await until(lambda: told == [call])
    assert call.mesh_call.service == "inventory"
    assert isinstance(call, grpc.aio.UnaryUnaryCall)
    assert isinstance(channel, grpc.aio.Channel)


async def test_a_failure_is_grpcs_own_error_with_the_call_on_it(channel: Any) -> None:
    """Code, details and trailing metadata come as the server sent them."""
    call = channel.unary_unary(FAIL)(b"NOT_FOUND")
    error = await failure(call)
    assert (error.code(), error.details(), error.trailing_metadata()["why"]) == (grpc.StatusCode.NOT_FOUND, "as asked", "asked")
    assert isinstance(error, grpc.aio.AioRpcError)
    assert error.call.attempts == 1
    assert (await call.code(), await call.details()) == (grpc.StatusCode.NOT_FOUND, "as asked")
    stream = channel.unary_stream(BREAK)(b"")
    assert await stream.read() == b"one"
    assert (await failure(stream.read())).code() is grpc.StatusCode.INTERNAL


async def test_messages_are_serialised_once_and_by_the_stub(channel: Any, pair: Any) -> None:
    """The request's serialiser runs once, although the call is sent twice; a mistake in it is the caller's to see."""
    runs: list[int] = []

    def write(number: int) -> bytes:
        runs.append(number)
        return str(number).encode()

    pair[0].fails = pair[1].fails = UNAVAILABLE
    await failure(channel.unary_unary(ECHO, write, int)(7, metadata=IDEMPOTENT))
    assert (runs, called(*pair)) == ([7], 2)
    pair[0].fails = pair[1].fails = None
    assert await channel.unary_unary(ECHO, write, int)(8) == 8
    with pytest.raises(ZeroDivisionError):
        channel.unary_unary(ECHO, lambda _: b"%d" % (1 // 0))(b"")


async def test_the_trace_travels(channel: Any) -> None:
    """Each call carries one traceparent, the caller's own if it wrote one, and the handler's calls belong to that trace."""
    trace_id, sent = (await channel.unary_unary(TRACE)(b"")).decode().split("|")
    assert sent.split("-")[1] == trace_id
    own = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
    assert await channel.unary_unary(TRACE)(b"", metadata=(("traceparent", own),)) == f"{own.split('-')[1]}|{own}".encode()


def test_an_attempt_and_its_handler_are_spans_of_one_trace(tmp_path: Path) -> None:
    """With OpenTelemetry's SDK: a CLIENT span for each attempt, a SERVER span for each call that came in, by the RPC conventions."""
    script = [sys.executable, str(SUPPORT / "grpc_traced.py"), str(tmp_path)]
    spans = json.loads(subprocess.run(script, capture_output=True, text=True, check=True, timeout=60).stdout)
    clients = [span for span in spans if span["kind"] == "CLIENT"]
    servers = {span["parent"]: span for span in spans if span["kind"] == "SERVER"}
    assert [(span["name"], span["code"]) for span in clients] == [
        ("shop.Inventory/Echo", "OK"),
        ("shop.Inventory/Fail", "UNAVAILABLE"),
        ("shop.Inventory/Fail", "UNAVAILABLE"),
        ("shop.Inventory/Count", "OK"),
    ]
    assert clients[1]["trace"] != clients[0]["trace"]
    for span in clients:
        server = servers[span["id"]]
        assert (server["trace"], server["name"], server["code"]) == (span["trace"], span["name"], span["code"])


# ------------------------------------------------------------------------------------------------ retry


async def test_a_call_that_never_left_goes_to_another_endpoint(shop: Shop, pair: Any) -> None:
    """Nothing listens at one of three addresses: no call fails, idempotent or not, and after the first one nobody asks there."""
    dead = "127.0.0.1:1"
    party = shop.party("storefront").knows([dead, *(backend.address for backend in pair)])
    async with open_channel(party, "inventory") as channel:
        echo = channel.unary_unary(ECHO)
        for number in range(30):
            assert await echo(str(number).encode()) == str(number).encode()
    assert called(*pair) == 30
    assert 1 <= party.of()["retries"] <= 2
    assert party.of(dead)["breaker"] == "open"


async def test_unavailable_from_a_server_is_repeated_only_if_the_call_is_idempotent(channel: Any, pair: Any) -> None:
    """UNAVAILABLE may come after the work was done: three ways to say that it may be done again."""
    pair[0].fails = pair[1].fails = UNAVAILABLE
    assert (await failure(channel.unary_unary(ECHO)(b""))).code() is UNAVAILABLE
    assert called(*pair) == 1
    assert (await failure(channel.unary_unary(ECHO)(b"", metadata=IDEMPOTENT))).code() is UNAVAILABLE
    assert called(*pair) == 3


@pytest.mark.parametrize("methods", [(ECHO,), ("/shop.Inventory/*",)])
async def test_a_channel_declares_methods_idempotent(shop: Shop, pair: Any, methods: tuple[str, ...]) -> None:
    """Exactly, or all of a gRPC service."""
    pair[0].fails = pair[1].fails = UNAVAILABLE
    party = shop.party("storefront").knows([backend.address for backend in pair])
    async with open_channel(party, "inventory", idempotent=methods) as channel:
        await failure(channel.unary_unary(ECHO)(b""))
    assert called(*pair) == 2


async def test_a_route_declares_its_calls_idempotent(tmp_path: Path) -> None:
    """`retry: {idempotent: true}` of a route is the third way."""
    route = f"    route: [{{match: {{path: {{exact: {ECHO}}}}}, retry: {{idempotent: true}}}}, {{}}]"
    shop = Shop(tmp_path, yaml_of(more=ONE_RETRY, service=route))
    pair = await shop.start("a", fails=UNAVAILABLE), await shop.start("b", fails=UNAVAILABLE)
    async with open_channel(shop.party("storefront").knows([b.address for b in pair]), "inventory") as channel:
        await failure(channel.unary_unary(ECHO)(b""))
        assert called(*pair) == 2
        await failure(channel.unary_unary(FAIL)(b"UNAVAILABLE"))
        assert called(*pair) == 3
    await shop.stop()


async def test_the_declaration_stays_here_and_the_attempts_number_travels(channel: Any, pair: Any) -> None:
    """The next hop sees in which attempt it runs, and nothing of what the caller declared or forged about itself."""
    seen = await channel.unary_unary(TELL)(b"", metadata=(*IDEMPOTENT, ("x-mesh-attempt", "7"), ("x-mesh-deadline-ms", "1")))
    assert seen == b"[]"
    pair[0].fails = UNAVAILABLE
    layers = {(await channel.unary_unary(WHO)(b"")).decode().rpartition("|")[2] for _ in range(4)}
    assert layers == {"0"}
    token = current_layer.set(1)
    try:
        pair[1].fails = UNAVAILABLE
        before = called(*pair)
        await failure(channel.unary_unary(ECHO)(b"", metadata=IDEMPOTENT))
        assert called(*pair) == before + 1  # somebody further up retries already
    finally:
        current_layer.reset(token)


async def test_a_server_can_forbid_retries(shop: Shop, pair: Any) -> None:
    """grpc-retry-pushback-ms: -1 means no (gRFC A6)."""

    async def no(request: bytes, context: Any) -> bytes:
        pair[0].calls += 1
        await context.abort(UNAVAILABLE, "no", (("grpc-retry-pushback-ms", "-1"),))
        return b""

    servers = [grpc.aio.server(), grpc.aio.server()]
    for server in servers:
        handler = grpc.method_handlers_generic_handler("shop.Inventory", {"Echo": grpc.unary_unary_rpc_method_handler(no)})
        server.add_generic_rpc_handlers((handler,))
    Shop(shop.folder, yaml_of("observe", more=ONE_RETRY))
    party = shop.party("storefront").knows([f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}" for server in servers])
    for server in servers:
        await server.start()
    async with open_channel(party, "inventory") as channel:
        error = await failure(channel.unary_unary(ECHO)(b"", metadata=IDEMPOTENT))
    assert (error.details(), pair[0].calls, party.of()["in_flight"]) == ("no", 1, 0)
    for server in servers:
        await server.stop(None)


@pytest.mark.parametrize(("value", "expected"), [("100", 0.1), ("-1", -2.0), ("soon", -2.0), ("", -2.0)])
def test_pushback_is_read_as_grpc_reads_it(value: str, expected: float) -> None:
    """Milliseconds, or never (-2.0)."""
    assert pushback((("grpc-retry-pushback-ms", value),)) == expected
    assert pushback(None) == -1.0


async def test_a_server_that_says_that_it_was_not_reached_is_not_believed(channel: Any, pair: Any) -> None:
    """A relayed text of gRPC's never makes a call count as not sent: the channel to the endpoint is up."""

    for backend in pair:
        backend.fails, backend.words = UNAVAILABLE, "failed to connect to all addresses; last error: refused"
    error = await failure(channel.unary_unary(ECHO)(b""))
    assert (error.details(), called(*pair)) == ("failed to connect to all addresses; last error: refused", 1)


def test_judgement_of_a_failure_needs_the_channels_state() -> None:
    """Text and state together prove "nothing was sent"; one of them doesn't."""
    text = "failed to connect to all addresses; last error: UNKNOWN: ipv4:127.0.0.1:1: Connection refused"
    strange = "failed to connect to all addresses; last error: Ssl handshake failed: CERTIFICATE_VERIFY_FAILED"
    deadline_code = grpc.StatusCode.DEADLINE_EXCEEDED

    def outcome(code: grpc.StatusCode, details: str, ready: bool, down: bool, late: bool = False) -> tuple[int, int]:
        return judge(code, details, is_ready=ready, is_down=down, is_late=late)

    assert outcome(UNAVAILABLE, text, False, True) == (core.OUTCOME_REFUSED, 503)
    assert outcome(UNAVAILABLE, strange, False, True) == (core.OUTCOME_IDENTITY, 503)
    assert outcome(UNAVAILABLE, text, True, False) == (core.OUTCOME_RESPONSE, 503)
    assert outcome(UNAVAILABLE, text, False, False) == (core.OUTCOME_RESET, 503)
    assert outcome(UNAVAILABLE, "Socket closed", False, True) == (core.OUTCOME_RESET, 503)
    assert outcome(UNAVAILABLE, "busy", True, False) == (core.OUTCOME_RESPONSE, 503)
    assert outcome(deadline_code, "", True, False, late=True) == (core.OUTCOME_TIMEOUT, 504)
    assert outcome(deadline_code, "", True, False) == (core.OUTCOME_RESPONSE, 504)


async def test_a_stream_of_responses_is_tried_again_before_its_first_message_only(channel: Any, pair: Any) -> None:
    """Until the caller has seen a message, another endpoint can take over; afterwards an error is an error."""
    pair[0].fails = UNAVAILABLE
    for _ in range(6):
        assert [m async for m in channel.unary_stream(COUNT)(b"2", metadata=IDEMPOTENT)] == [b"0", b"1"]
    before = called(*pair)
    stream = channel.unary_stream(BREAK)(b"", metadata=IDEMPOTENT)
    assert await stream.read() == b"one"
    await failure(stream.read())
    assert called(*pair) == before + 1


async def test_a_stream_of_requests_is_sent_once(channel: Any, pair: Any) -> None:
    """What the caller wrote is gone: it can't be sent again."""
    pair[0].fails = pair[1].fails = UNAVAILABLE
    await failure(channel.stream_unary(SUM)(iter([b"1"]), metadata=IDEMPOTENT))
    chat = channel.stream_stream(CHAT)(iter([b"1"]), metadata=IDEMPOTENT)
    assert (await failure(chat.read())).code() is UNAVAILABLE
    assert called(*pair) == 2


async def test_a_call_is_tried_again_for_whoever_asks_how_it_went(channel: Any, pair: Any) -> None:
    """Not only await: code(), done() and callbacks carry a failed call on."""
    pair[0].fails = UNAVAILABLE
    echo = channel.unary_unary(ECHO)
    for _ in range(4):
        assert await echo(b"", metadata=IDEMPOTENT).code() is grpc.StatusCode.OK
    told: list[Any] = []
    calls = [echo(b"", metadata=IDEMPOTENT) for _ in range(4)]
    for call in calls:
        call.add_done_callback(told.append)
    await until(lambda: len(told) == 4)
    polled = echo(b"", metadata=IDEMPOTENT)
    await until(polled.done)
    assert [await call.code() for call in (*calls, polled)] == [grpc.StatusCode.OK] * 5
    assert await asyncio.gather(*(echo(b"x", metadata=IDEMPOTENT) for _ in range(20))) == [b"x"] * 20


# ------------------------------------------------------------------------------------------------ a process dies


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[Any]:
    """Three backends in processes of their own."""
    started: list[subprocess.Popen[str]] = []

    def start(text: str) -> tuple[Shop, list[subprocess.Popen[str]], list[str]]:
        shop = Shop(tmp_path, text)
        for name in "abc":
            command = [sys.executable, str(SUPPORT / "grpc_backend.py"), str(shop.file), name]
            started.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        return shop, started, [process.stdout.readline().strip() for process in started if process.stdout]

    yield start
    for process in started:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


async def kill_one_under_load(shop: Shop, processes: list[Any], addresses: list[str]) -> tuple[Party, int, int]:
    """Eight callers at work; one of three processes is killed. Returns the party, the calls and the failures."""
    party = shop.party("storefront").knows(addresses)
    done = failed = 0
    is_over = False

    async def work(echo: Any) -> None:
        nonlocal done, failed
        while not is_over:
            try:
                await echo(b"x" * 200)
            except grpc.aio.AioRpcError:
                failed += 1
            done += 1

    async with open_channel(party, "inventory", idempotent=["/shop.Inventory/*"]) as channel:
        workers = [asyncio.create_task(work(channel.unary_unary(ECHO))) for _ in range(8)]
        await until(lambda: done > 300 and all(party.of(a)["requests"] > 20 for a in addresses), patience=30)
        processes[0].send_signal(signal.SIGKILL)
        processes[0].wait()
        goal = done + 600
        await until(lambda: done > goal, patience=30)
        is_over = True
        await asyncio.gather(*workers)
    return party, done, failed


@pytest.mark.slow
async def test_no_idempotent_call_fails_when_one_of_three_processes_is_killed(processes: Any) -> None:
    """What was under way there is done elsewhere, and the endpoint is left alone."""
    shop, running, addresses = processes(yaml_of(more="retry: {attempts: 1, backoff: [0.001, 0.002]}"))
    party, done, failed = await kill_one_under_load(shop, running, addresses)
    assert failed == 0
    assert party.of()["retries"] >= 1
    assert party.of(addresses[0])["breaker"] != "closed"
    assert party.of(addresses[0])["failures"] <= 20  # those under way, and probes; not a share of 600
    assert done >= 900


@pytest.mark.slow
async def test_without_retries_calls_do_fail_when_a_process_is_killed(processes: Any) -> None:
    """So that the test above can't be true by accident."""
    shop, running, addresses = processes(yaml_of(more=NO_RETRY))
    _, _, failed = await kill_one_under_load(shop, running, addresses)
    assert failed >= 1


async def test_traffic_leaves_an_endpoint_that_always_refuses(channel: Any, pair: Any) -> None:
    """At 100 % UNAVAILABLE an endpoint is left after a handful of calls."""
    pair[0].fails = UNAVAILABLE
    for _ in range(60):
        await channel.unary_unary(ECHO)(b"", metadata=IDEMPOTENT)
    assert pair[0].calls <= 6
    assert pair[1].calls == 60


async def test_an_endpoint_that_comes_back_is_used_again(tmp_path: Path) -> None:
    """A probe makes a connection of its own: gRPC's back-off from the time of the failure doesn't stand in its way."""
    shop = Shop(tmp_path, yaml_of(more=ONE_RETRY, service="    admit: {breaker: {open: [0.05, 0.1]}}"))
    stays, leaves = await shop.start("a"), await shop.start("b")
    party = shop.party("storefront").knows([stays.address, leaves.address])
    async with open_channel(party, "inventory", idempotent=[ECHO]) as channel:
        echo = channel.unary_unary(ECHO)
        await asyncio.gather(*(echo(b"") for _ in range(8)))
        await leaves.stop()
        for _ in range(8):
            await echo(b"")
        assert party.of(leaves.address)["breaker"] != "closed"
        back = Backend(shop.party("inventory"), "b")
        await back.listen(leaves.address)
        shop.backends.append(back)

        async def calls() -> None:
            while back.calls < 3:
                await echo(b"")

        await asyncio.wait_for(calls(), 10)
        assert party.of(leaves.address)["breaker"] == "closed"
    await shop.stop()


# ------------------------------------------------------------------------------------------------ deadline


async def test_the_deadline_travels_and_the_earliest_one_counts(channel: Any) -> None:
    """timeout, mesh.deadline and the route's deadline: what the server sees is the smallest."""

    async def left(**arguments: Any) -> float:
        return float((await channel.unary_unary(WHO)(b"", **arguments)).decode().split("|")[3])

    rounding = 1.02  # gRPC sends few digits, and rounds up
    assert 14 < await left() <= 15 * rounding
    assert 2 < await left(timeout=3) <= 3 * rounding
    assert 14 < await left(timeout=60) <= 15 * rounding
    with deadline(2):
        assert 1 < await left() <= 2 * rounding
        assert 1 < await left(timeout=9) <= 2 * rounding
        assert 0 < await left(timeout=1) <= 1 * rounding


async def test_a_call_ends_with_its_deadline(tmp_path: Path) -> None:
    """DEADLINE_EXCEEDED comes in time, from the route's deadline too, and is not tried again."""
    shop = Shop(tmp_path, yaml_of(more=ONE_RETRY, service="    deadline: 0.2"))
    backend = await shop.start("a")
    party = shop.party("storefront").knows([backend.address])
    async with open_channel(party, "inventory") as channel:
        await channel.unary_unary(ECHO)(b"")
        for arguments in ({}, {"timeout": 0.1}):
            begun = time.monotonic()
            error = await failure(channel.unary_unary(SLOW)(b"30", metadata=IDEMPOTENT, **arguments))
            assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
            assert time.monotonic() - begun < 2
        before = backend.calls
        with deadline(-1):
            error = await failure(channel.unary_unary(ECHO)(b""))
        assert (error.code(), isinstance(error, errors.DeadlineExceeded)) == (grpc.StatusCode.DEADLINE_EXCEEDED, True)
        assert backend.calls == before == 3
    assert party.of()["in_flight"] == 0
    await shop.stop()


async def test_the_routes_deadline_ends_only_the_wait_for_a_streams_beginning(tmp_path: Path) -> None:
    """A stream that flows is not cut by the route; one that never begins is, and says so."""
    shop = Shop(tmp_path, yaml_of(more=NO_RETRY, service="    deadline: 0.3"))
    backend = await shop.start("a")
    async with open_channel(shop.party("storefront").knows([backend.address]), "inventory") as channel:
        await channel.unary_unary(ECHO)(b"")
        chat = channel.stream_stream(CHAT)()
        await chat.write(b"1")
        assert await chat.read() == b"re: 1"
        backend.delay = 60.0
        error = await failure(channel.unary_stream(COUNT)(b"1").read())  # takes the 0.3 s that the chat outlives
        assert (error.code(), "route's deadline" in error.details()) == (grpc.StatusCode.DEADLINE_EXCEEDED, True)
        await chat.write(b"2")
        assert await chat.read() == b"re: 2"
        chat.cancel()
    await shop.stop()


# ------------------------------------------------------------------------------------------------ refusals


async def test_a_refusal_of_the_mesh_is_both_a_grpc_error_and_the_meshs(shop: Shop) -> None:
    """Callers catch what they know: grpc.RpcError with a code, or the class that HTTP callers of the mesh catch."""
    party = shop.party("storefront")
    error = await failure(open_channel(party, "nobody").unary_unary(ECHO)(b""))
    assert isinstance(error, grpc.aio.AioRpcError)
    assert isinstance(error, errors.UnknownService)
    assert isinstance(error, errors.Refused)
    assert (error.code(), error.reason) == (UNAVAILABLE, "route.unknown_service")
    assert "nobody" in error.details()
    party.knows([])
    error = await failure(open_channel(party, "inventory").unary_unary(ECHO)(b""))
    assert isinstance(error, errors.NoEndpoint)
    stream = open_channel(party, "inventory").unary_stream(COUNT)(b"1")
    with pytest.raises(errors.NoEndpoint):
        async for _ in stream:
            pass
    assert await stream.code() is UNAVAILABLE
    assert party.of()["in_flight"] == 0


def test_a_refusal_survives_pickling() -> None:
    """Process pools hand exceptions over by pickle."""
    error = rpc_error(errors.CircuitOpen("all are out.", hint="Wait."))
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), again.code(), again.details(), str(again)) == (type(error), error.code(), error.details(), str(error))
    assert isinstance(again, errors.CircuitOpen)
    assert rpc_error(again) is again


async def test_the_limit_of_the_service_holds_for_grpc(tmp_path: Path) -> None:
    """More calls in flight than allowed are refused, and the permit comes back when a call ends or is cancelled."""
    shop = Shop(tmp_path, yaml_of(service="    admit: {in_flight: 2}"))
    backend = await shop.start("a")
    party = shop.party("storefront").knows([backend.address])
    async with open_channel(party, "inventory") as channel:
        slow = [channel.unary_unary(SLOW)(b"30") for _ in range(2)]
        error = await failure(channel.unary_unary(ECHO)(b""))
        assert isinstance(error, errors.LimitExceeded)
        for call in slow:
            assert call.cancel()
            assert (call.done(), call.cancelled(), await call.code()) == (True, True, grpc.StatusCode.CANCELLED)
        assert party.of()["in_flight"] == 0
        assert await channel.unary_unary(ECHO)(b"x") == b"x"
    await shop.stop()


# ------------------------------------------------------------------------------------------------ identity


async def test_a_server_with_another_identity_is_refused_and_another_endpoint_used(shop: Shop, pair: Any) -> None:
    """The name in the certificate is checked: who is at that address is not enough."""
    stranger = await shop.start("x", party=shop.party("burglar"))
    party = shop.party("storefront").knows([stranger.address, pair[0].address])
    async with open_channel(party, "inventory") as channel:
        for _ in range(20):
            assert await channel.unary_unary(ECHO)(b"x") == b"x"
        party.knows([stranger.address])
        error = await failure(channel.unary_unary(ECHO)(b""))
    assert stranger.calls == 0
    assert error.code() is UNAVAILABLE
    assert next(e["what"] for e in error.call.record()["events"] if e["phase"] == "send") == "identity"


async def test_a_server_of_another_ca_is_refused(shop: Shop, tmp_path_factory: pytest.TempPathFactory) -> None:
    """The same names, signed by a root that isn't ours."""
    other = Shop(tmp_path_factory.mktemp("other"), yaml_of())
    foreign = await other.start("x")
    party = shop.party("storefront").knows([foreign.address])
    async with open_channel(party, "inventory") as channel:
        error = await failure(channel.unary_unary(ECHO)(b""))
    await other.stop()
    assert (error.code(), foreign.calls) == (UNAVAILABLE, 0)


async def test_who_is_not_allowed_gets_permission_denied_and_nothing_secret(shop: Shop, pair: Any) -> None:
    """The caller learns that it is refused; the rule, the names and the identity stay in the service's log."""
    async with open_channel(shop.party("burglar").knows([pair[0].address]), "inventory") as channel:
        error = await failure(channel.unary_unary(ECHO)(b""))
    assert (error.code(), error.details(), called(*pair)) == (grpc.StatusCode.PERMISSION_DENIED, "not allowed", 0)
    assert len(error.trailing_metadata()) == 0


async def test_without_a_certificate_nothing_is_sent(shop: Shop, pair: Any) -> None:
    """A call that needs mutual TLS never falls back to plain text."""
    party = shop.party("storefront").knows([pair[0].address])
    party.outbound.identity = None
    error = await failure(open_channel(party, "inventory").unary_unary(ECHO)(b""))
    assert isinstance(error, errors.IdentityError)
    assert (called(*pair), party.of()["in_flight"]) == (0, 0)


async def test_an_identity_written_by_hand_is_checked_by_the_services_name(tmp_path: Path) -> None:
    """A SPIFFE ID of another form tells no DNS name; our CA writes the service's."""
    special = "spiffe://shop.internal/stock/keeper"
    shop = Shop(tmp_path, yaml_of(service=f"    identity: {special}"))
    shop.ca.write("inventory", shop.identities, spiffe_id=special)
    backend = await shop.start("a")
    party = shop.party("storefront").knows([backend.address])
    async with open_channel(party, "inventory") as channel:
        assert await channel.unary_unary(ECHO)(b"x") == b"x"
    party.engine.resolve("inventory", 9, [(backend.address, 1.0, "", {}, "spiffe://shop.internal/other/form")], time.monotonic())
    # What no name is known of is proved by its SPIFFE ID, which the server isn't.
    async with open_channel(party, "inventory") as channel:
        error = await failure(channel.unary_unary(ECHO)(b""))
    assert (type(error.__cause__).__name__, backend.calls) == ("PeerIdentityError", 1)
    await shop.stop()


async def test_in_mode_observe_calls_are_plain(tmp_path: Path) -> None:
    """No certificate is needed, and the handler sees a caller without identity."""
    shop = Shop(tmp_path, yaml_of("observe"))
    backend = await shop.start("a")
    async with open_channel(shop.party("storefront").knows([backend.address]), "inventory") as channel:
        assert (await channel.unary_unary(WHO)(b"")).startswith(b"|False||")
    await shop.stop()


async def test_certificates_and_roots_are_replaced_under_load_without_a_failed_call(shop: Shop, pair: Any) -> None:
    """Every generation of the identity has channels of its own; those of the one before end with their calls."""
    party = shop.party("storefront").knows([backend.address for backend in pair])
    everybody = [party, *(backend.party for backend in pair)]
    serials: set[str] = set()
    done = 0
    is_over = False

    def look() -> None:
        for one in everybody:
            assert one.identity is not None
            one.identity.refresh(time.time())

    async def work(who: Any, chat: Any) -> None:
        nonlocal done
        while not is_over:
            serials.add((await who(b"")).decode().split("|")[2])
            done += 1

    async def some_calls() -> None:
        goal = done + 40
        await until(lambda: done >= goal)

    async with open_channel(party, "inventory") as channel:
        chat = channel.stream_stream(CHAT)()
        await chat.write(b"1")
        assert await chat.read() == b"re: 1"
        workers = [asyncio.create_task(work(channel.unary_unary(WHO), chat)) for _ in range(4)]
        await some_calls()
        # A root is turned over in three steps; at each, everybody looks.
        shop.ca.begin_rotation()
        shop.ca.publish(shop.identities)
        look()
        await some_calls()
        shop.ca.activate_rotation()
        shop.certify()
        look()
        await some_calls()
        shop.ca.finish_rotation()
        shop.ca.publish(shop.identities)
        look()
        await some_calls()
        await chat.write(b"2")
        assert await chat.read() == b"re: 2"  # the stream lives on in the channel that it began in
        await chat.done_writing()
        assert await chat.read() is grpc.aio.EOF
        is_over = True
        await asyncio.gather(*workers)
        assert len(serials) == 2
        assert party.identity is not None and party.identity.current is not None
        newest = party.identity.current.generation
        assert {link.own.generation for link, _ in channel._links.states()} == {newest}
        await until(lambda: not channel._links._closing)
    assert party.of()["failures"] == 0


# ------------------------------------------------------------------------------------------------ life of a channel


async def test_a_cancelled_or_forgotten_call_gives_everything_back(shop: Shop, pair: Any) -> None:
    """Cancelled by its method, by its task, by a time-out around it, or dropped: no permit stays away, and the server is told."""
    party = shop.party("storefront").knows([backend.address for backend in pair])
    async with open_channel(party, "inventory") as channel:
        slow, count = channel.unary_unary(SLOW), channel.stream_stream(CHAT)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(slow(b"30"), 0.05)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await slow(b"30")
        task = asyncio.create_task(_await(slow(b"30")))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        stream = count()
        await stream.write(b"1")
        assert await stream.read() == b"re: 1"
        del stream
        gc.collect()
        stream = count()
        await stream.write(b"1")
        assert await stream.read() == b"re: 1"
        assert stream.cancel()
        assert stream.cancelled()
        with pytest.raises(asyncio.CancelledError):
            await stream.read()
        await until(lambda: party.of()["in_flight"] == 0)
        await until(lambda: all(not link.calls for link, _ in channel._links.states()))
        await until(lambda: sum(row["in_flight"] for b in pair for row in b.party.gate.stats()) == 0)


async def test_a_forgotten_call_goes_on_and_is_noted(shop: Shop, pair: Any) -> None:
    """Who sends and forgets has it done, as with gRPC's own channel; a failure counts, and is not tried again."""
    party = shop.party("storefront").knows([pair[0].address])
    async with open_channel(party, "inventory") as channel:
        channel.unary_unary(ECHO)(b"")
        channel.unary_unary(FAIL)(b"UNAVAILABLE", metadata=IDEMPOTENT)
        kept = channel.unary_unary(FAIL)(b"UNAVAILABLE", metadata=IDEMPOTENT)
        await until(lambda: pair[0].calls == 3 and party.of(pair[0].address)["requests"] == 2)
        del kept
        gc.collect()
        await until(lambda: party.of(pair[0].address)["requests"] == 3)
    assert (party.of(pair[0].address)["failures"], party.of()["in_flight"]) == (2, 0)


async def _await(call: Any) -> Any:
    return await call


async def test_a_closed_channel_takes_no_calls(channel: Any) -> None:
    """READY once it was used, SHUTDOWN after close; calls under way are cancelled."""
    assert channel.get_state() is grpc.ChannelConnectivity.IDLE
    await asyncio.wait_for(channel.channel_ready(), 5)
    await channel.unary_unary(ECHO)(b"")
    assert channel.get_state() is grpc.ChannelConnectivity.READY
    slow = channel.unary_unary(SLOW)(b"30")
    await asyncio.sleep(0)
    waiting = asyncio.create_task(channel.wait_for_state_change(grpc.ChannelConnectivity.READY))
    await channel.close()
    await asyncio.wait_for(waiting, 5)
    assert channel.get_state() is grpc.ChannelConnectivity.SHUTDOWN
    with pytest.raises(asyncio.CancelledError):
        await slow
    with pytest.raises(grpc.aio.UsageError):
        await channel.unary_unary(ECHO)(b"")
    with pytest.raises(grpc.aio.UsageError):
        await channel.unary_stream(COUNT)(b"1").read()


async def test_a_channel_belongs_to_its_event_loop(channel: Any) -> None:
    """In another loop there is a clear error, not a hang."""
    await channel.unary_unary(ECHO)(b"")
    caught: list[Any] = []

    def elsewhere() -> None:
        async def call() -> None:
            caught.append(await failure(channel.unary_unary(ECHO)(b"")))

        asyncio.run(call())

    thread = threading.Thread(target=elsewhere)
    thread.start()
    await asyncio.to_thread(thread.join, 10)
    assert isinstance(caught[0], errors.MeshError)
    assert caught[0].reason == "grpc.other_loop"


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_channel_used_before_a_fork_says_so_after_it(shop_in_threads: tuple[Party, str]) -> None:
    """gRPC would hang; the mesh raises. Python only: the child calls nothing of gRPC."""
    party, _ = shop_in_threads
    with open_sync_channel(party, "inventory") as channel:
        assert channel.unary_unary(ECHO)(b"x") == b"x"
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                channel.unary_unary(ECHO)(b"x")
                os.write(writer, b"no error")
            except errors.MeshError as error:
                os.write(writer, error.reason.encode())
            finally:
                os._exit(0)
        os.close(writer)
        os.waitpid(child, 0)
        assert os.read(reader, 100) == b"grpc.forked"
        os.close(reader)


async def test_methods_of_a_stub_are_kept_within_bounds(channel: Any) -> None:
    """Who makes a multicallable for each call must not fill the memory."""
    for _ in range(600):
        await channel.unary_unary(ECHO, lambda request: request)(b"")
    assert all(len(link.methods) <= 256 for link, _ in channel._links.states())


# ------------------------------------------------------------------------------------------------ for threads


@pytest.fixture
def shop_in_threads(tmp_path: Path) -> Iterator[tuple[Party, str]]:
    shop = Shop(tmp_path, yaml_of(more=ONE_RETRY))
    with blocking_server(shop.party("inventory")) as address:
        yield shop.party("storefront").knows([address]), address


def test_threads_call_in_all_four_kinds(shop_in_threads: tuple[Party, str]) -> None:
    """A grpc.Channel for stubs: call, with_call, future, and streams both ways; each is counted once."""
    party, _ = shop_in_threads
    with open_sync_channel(party, "inventory") as channel:
        assert isinstance(channel, grpc.Channel)
        assert channel.unary_unary(ECHO)(b"x") == b"x"
        response, call = channel.unary_unary(ECHO).with_call(b"y", timeout=3)
        assert (response, call.code()) == (b"y", grpc.StatusCode.OK)
        assert channel.unary_unary(ECHO).future(b"z").result(5) == b"z"
        assert list(channel.unary_stream(COUNT)(b"2")) == [b"0 storefront", b"1 storefront"]
        assert channel.stream_unary(SUM)(iter([b"1", b"2"])) == b"3"
        assert channel.stream_unary(SUM).with_call(iter([b"1"]))[0] == b"1"
        assert list(channel.stream_stream(CHAT)(iter([b"1"]))) == [b"re: 1"]
        with pytest.raises(grpc.RpcError) as caught:
            channel.unary_unary(FAIL)(b"NOT_FOUND")
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
        wait_for(lambda: party.of()["in_flight"] == 0)
        assert party.of()["requests"] == 8
    with pytest.raises(grpc.aio.UsageError):
        channel.unary_unary(ECHO)(b"x")


def test_threads_have_the_same_retries(shop_in_threads: tuple[Party, str]) -> None:
    """Nothing listens at one of two addresses: no call fails, and a thread is not held up."""
    party, address = shop_in_threads
    party.knows(["127.0.0.1:1", address])
    with open_sync_channel(party, "inventory") as channel:
        for number in range(20):
            assert channel.unary_unary(ECHO)(str(number).encode()) == str(number).encode()
    assert party.of("127.0.0.1:1")["breaker"] == "open"
    assert party.of()["in_flight"] == 0


def test_threads_get_the_same_refusals(shop_in_threads: tuple[Party, str]) -> None:
    """The mesh's class and gRPC's code in one exception, from every kind of call, when its answer is asked for."""
    party, _ = shop_in_threads
    party.knows([])
    with open_sync_channel(party, "inventory") as channel:
        for call in (
            lambda: channel.unary_unary(ECHO)(b""),
            lambda: channel.unary_unary(ECHO).future(b"").result(5),
            lambda: next(channel.unary_stream(COUNT)(b"1")),
            lambda: next(channel.stream_stream(CHAT)(iter([]))),
            lambda: channel.stream_unary(SUM)(iter([])),
        ):
            with pytest.raises(errors.NoEndpoint) as caught:
                call()
            assert isinstance(caught.value, grpc.RpcError)
            assert caught.value.code() is UNAVAILABLE
        refused, future = channel.unary_stream(COUNT)(b"1"), channel.unary_unary(ECHO).future(b"")
        assert (refused.code(), future.code(), refused.cancel(), future.done()) == (UNAVAILABLE, UNAVAILABLE, False, True)
    assert party.of()["in_flight"] == 0


def test_threads_follow_a_new_certificate(shop_in_threads: tuple[Party, str], tmp_path: Path) -> None:
    """The next call after a rotation goes over a channel with the new certificate."""
    party, _ = shop_in_threads
    with open_sync_channel(party, "inventory") as channel:
        channel.unary_unary(ECHO)(b"")
        (first,) = channel._links._links.values()
        assert party.identity is not None
        party.identity._take(_renewed(party))
        channel.unary_unary(ECHO)(b"")
        (second,) = channel._links._links.values()
        assert (first.is_left, len(first.calls), second.own.generation > first.own.generation) == (True, 0, True)


def _renewed(party: Party) -> Any:
    """The same certificate under a bundle that names its root twice: another generation, as good as new."""
    from dataclasses import replace

    assert party.identity is not None
    current = party.identity.current
    assert current is not None
    return replace(current, bundles={domain: bundle + bundle for domain, bundle in current.bundles.items()})


def wait_for(condition: Any) -> None:
    end = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


# ------------------------------------------------------------------------------------------------ channels of the user's own


async def test_interceptors_bring_policy_to_a_channel_of_the_users_own(tmp_path: Path) -> None:
    """Deadline of the route, limit, record and statistics; the channel's target stays the user's choice."""
    shop = Shop(tmp_path, yaml_of("observe", service="    deadline: 5\n    admit: {in_flight: 1}"))
    backend = await shop.start("a")
    party = shop.party("storefront").knows([backend.address])
    async with grpc.aio.insecure_channel(backend.address, interceptors=client_interceptors(party, "inventory")) as channel:
        left = float((await channel.unary_unary(WHO)(b"")).decode().split("|")[3])
        assert 4 < left <= 5.1
        assert [m async for m in channel.unary_stream(COUNT)(b"2")] == [b"0", b"1"]
        assert await channel.stream_unary(SUM)(iter([b"1", b"2"])) == b"3"
        assert [m async for m in channel.stream_stream(CHAT)(iter([b"1"]))] == [b"re: 1"]
        error = await failure(channel.unary_unary(FAIL)(b"UNAVAILABLE"))
        assert (error.code(), error.call.attempts) == (UNAVAILABLE, 1)
        await until(lambda: party.of()["in_flight"] == 0)
        assert party.of(backend.address)["requests"] == 5
        assert party.of(backend.address)["failures"] == 1
        slow = channel.unary_unary(SLOW)(b"30")
        await until(lambda: party.of()["in_flight"] == 1)
        assert isinstance(await failure(channel.unary_unary(ECHO)(b"")), errors.LimitExceeded)
        slow.cancel()
        await until(lambda: party.of()["in_flight"] == 0)
    await shop.stop()


async def test_interceptors_blame_no_endpoint_where_there_are_several(tmp_path: Path) -> None:
    """Nobody can tell which endpoint the user's channel reached, so no breaker hears of it."""
    shop = Shop(tmp_path, yaml_of("observe"))
    backend = await shop.start("a")
    party = shop.party("storefront").knows([backend.address, "127.0.0.1:1"])
    async with grpc.aio.insecure_channel(backend.address, interceptors=client_interceptors(party, "inventory")) as channel:
        for _ in range(8):
            await failure(channel.unary_unary(FAIL)(b"UNAVAILABLE"))
    assert {row["breaker"] for row in party.engine.stats(time.monotonic()) if row["endpoint"]} == {"closed"}
    assert (party.of(backend.address)["requests"], party.of()["in_flight"]) == (0, 0)
    await shop.stop()


async def test_the_context_of_the_caller_is_not_changed(channel: Any) -> None:
    """What a call reads from the context stays the caller's."""
    with deadline(5):
        before = current_deadline.get()
        await channel.unary_unary(ECHO)(b"")
        assert current_deadline.get() == before
