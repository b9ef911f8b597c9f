"""What is told of gRPC calls that come in: messages, codes and spans, of all four kinds. Real servers, and OpenTelemetry's SDK."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "grpc_support"))
from grpc_world import BREAK, CHAT, COUNT, ECHO, FAIL, SUM, TELL, Backend, Shop, blocking_server, until, yaml_of

SUPPORT = Path(__file__).parent.parent / "grpc_support"


@pytest.fixture
async def backend(tmp_path: Path) -> AsyncIterator[Backend]:
    shop = Shop(tmp_path, yaml_of("observe"))
    yield await shop.start("a")
    await shop.stop()


def counted(party: Any) -> dict[str, tuple[int, int]]:
    """Sent and received, by the method's own name."""
    found = party.observer._messages
    assert all(side == "server" and name == "" for side, name, _ in found)
    return {method.rpartition("/")[2]: tally.read() for (_, _, method), tally in found.items()}


async def test_messages_of_every_kind_of_call_are_counted(backend: Backend) -> None:
    """Sent and received; of streams each, whichever style the handler has; of an end that isn't OK there is no answer."""
    async with grpc.aio.insecure_channel(backend.address) as channel:
        for _ in range(3):
            await channel.unary_unary(ECHO)(b"")
        await channel.unary_unary(TELL)(b"")
        with pytest.raises(grpc.RpcError):
            await channel.unary_unary(FAIL)(b"ABORTED")
        assert len([each async for each in channel.unary_stream(COUNT)(b"5")]) == 5
        await channel.stream_unary(SUM)(iter([b"1", b"2"]))
        assert len([each async for each in channel.stream_stream(CHAT)(iter([b"a", b"b", b"c"]))]) == 3
        with pytest.raises(grpc.RpcError):
            _ = [each async for each in channel.unary_stream(BREAK)(b"")]
        with pytest.raises(grpc.RpcError):
            await channel.unary_unary("/shop.Inventory/Nothing")(b"")
    await until(lambda: backend.party.gate.load()["in_flight"] == 0)
    told = counted(backend.party)
    # What callers invent would take the places of real methods.
    assert "Nothing" not in told
    assert told == {
        "Echo": (3, 3),
        "Tell": (1, 1),
        "Fail": (0, 1),
        "Count": (5, 1),
        "Sum": (1, 2),
        "Chat": (3, 3),
        "Break": (1, 1),
    }


def test_a_blocking_server_counts_them_too(tmp_path: Path) -> None:
    """By the same counters."""
    party = Shop(tmp_path, yaml_of("observe")).party("inventory")
    with blocking_server(party) as address, grpc.insecure_channel(address) as channel:
        channel.unary_unary(ECHO)(b"")
        channel.stream_unary(SUM)(iter([b"1", b"2"]))
        assert len(list(channel.stream_stream(CHAT)(iter([b"a", b"b", b"c"])))) == 3
    assert counted(party) == {"Echo": (1, 1), "Sum": (1, 2), "Chat": (3, 3)}


def test_spans_of_servers_follow_the_conventions(tmp_path: Path) -> None:
    """Name, system, method, status as text, messages; an error only where it is the server's fault."""
    done = subprocess.run(
        [sys.executable, str(SUPPORT / "grpc_observed.py"), str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    spans = json.loads(done.stdout)

    def span(method: str, status: str, sent: int, received: int, error: str | None = None) -> dict[str, Any]:
        told = {
            "rpc.system.name": "grpc",
            "rpc.method": f"shop.Inventory/{method}",
            "rpc.response.status_code": status,
            "meshlib.messages.sent": sent,
            "meshlib.messages.received": received,
        }
        return {"name": f"shop.Inventory/{method}", "attributes": told | ({"error.type": error} if error else {})}

    unknown = span("Nothing", "UNIMPLEMENTED", 0, 0, "UNIMPLEMENTED")
    assert spans == [
        span("Echo", "OK", 1, 1),
        span("Count", "OK", 3, 1),
        span("Sum", "OK", 1, 2),
        span("Chat", "OK", 2, 2),
        span("Fail", "NOT_FOUND", 0, 1),
        span("Fail", "INTERNAL", 0, 1, "INTERNAL"),
        {
            "name": "_OTHER",
            "attributes": unknown["attributes"] | {"rpc.method": "_OTHER", "rpc.method_original": "shop.Inventory/Nothing"},
        },
    ]
