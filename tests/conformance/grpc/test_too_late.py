"""Where does a call fail that had no time at all? Where gRPC lets it fail: when its answer is asked for, never when it is made.

`timeout_on_sleeping_server` comes upon this by chance, when a busy machine needs its millisecond for something else.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import grpc.aio
import pytest

from tests.interop.town import SERVICE

NO_TIME = 1e-6
LATE = grpc.StatusCode.DEADLINE_EXCEEDED
each_channel = pytest.mark.parametrize("channel", ["bare", "mesh"])


@pytest.fixture(scope="module")
def silent() -> Iterator[int]:
    """The port of a server that never says a word: else one that is quick could still answer in time."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield int(server.getsockname()[1])


@pytest.fixture
def sync_channel(peers: Any, channel: str, silent: int) -> Any:
    if channel == "bare":
        return grpc.insecure_channel(f"127.0.0.1:{silent}")
    return peers.mesh("observe", silent).sync_grpc_channel(SERVICE)


CALLS: dict[str, Callable[[Any, Any], tuple[Any, Callable[[Any], Any]]]] = {
    "stream-stream": lambda stub, _: (stub.FullDuplexCall(iter(()), timeout=NO_TIME), next),
    "unary-stream": lambda stub, m: (stub.StreamingOutputCall(m.StreamingOutputCallRequest(), timeout=NO_TIME), next),
    "stream-unary": lambda stub, _: (stub.StreamingInputCall.future(iter(()), timeout=NO_TIME), lambda call: call.result()),
    "unary-unary": lambda stub, m: (stub.EmptyCall.future(m.Empty(), timeout=NO_TIME), lambda call: call.result()),
}


@each_channel
@pytest.mark.parametrize("kind", CALLS)
def test_a_call_without_time_fails_when_a_thread_asks_for_its_answer(peers: Any, sync_channel: Any, kind: str) -> None:
    """And its status says so as well."""
    with sync_channel as made:
        call, ask = CALLS[kind](peers.town.protocol.services.TestServiceStub(made), peers.town.protocol.messages)
        with pytest.raises(grpc.RpcError) as caught:
            ask(call)
        assert (caught.value.code(), call.code()) == (LATE, LATE)


@each_channel
async def test_a_call_without_time_fails_when_a_task_asks_for_its_answer(peers: Any, channel: str, silent: int) -> None:
    """All four kinds of calls."""
    messages = peers.town.protocol.messages
    bare = channel == "bare"
    target = f"127.0.0.1:{silent}"
    async with grpc.aio.insecure_channel(target) if bare else peers.mesh("observe", silent).grpc_channel(SERVICE) as made:
        stub = peers.town.protocol.services.TestServiceStub(made)
        streams = (
            stub.FullDuplexCall(timeout=NO_TIME),
            stub.StreamingOutputCall(messages.StreamingOutputCallRequest(), timeout=NO_TIME),
        )
        single = stub.StreamingInputCall(timeout=NO_TIME), stub.EmptyCall(messages.Empty(), timeout=NO_TIME)
        for call in (*streams, *single):
            with pytest.raises(grpc.RpcError) as caught:
                await (call.read() if call in streams else call)
            assert (caught.value.code(), await call.code()) == (LATE, LATE)
