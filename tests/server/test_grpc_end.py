"""A gRPC server ends with its process, and what is under way ends well. Real servers, signals and clocks."""

from __future__ import annotations

import asyncio
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Iterator
from concurrent import futures
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

import meshlib

SUPPORT = Path(__file__).parent.parent / "grpc_support"
sys.path.insert(0, str(SUPPORT))
from grpc_world import COUNT, ECHO, SLOW, until  # noqa: E402

Code = grpc.StatusCode
CHECK = "/grpc.health.v1.Health/Check"

YAML = """\
mesh: shop
secure: {{mode: observe}}
services:
  inventory:
    protocol: grpc
    inbound: {{drain: {{{drain}}}}}
"""


def mesh_of(folder: Path, drain: str = "grace: 5s") -> meshlib.Mesh:
    file = folder / "mesh.yaml"
    file.write_text(YAML.format(drain=drain))
    return meshlib.Mesh.load(file, service="inventory")


class House:
    """A grpc.aio server of a mesh, whose handlers tell how many calls there were."""

    def __init__(self, mesh: meshlib.Mesh) -> None:
        self.calls = 0
        self.server = grpc.aio.server(interceptors=mesh.grpc_server_interceptors(), options=[("grpc.so_reuseport", 0)])
        methods = {
            "Slow": grpc.unary_unary_rpc_method_handler(self.slow),
            "Echo": grpc.unary_unary_rpc_method_handler(self.echo),
            "Count": grpc.unary_stream_rpc_method_handler(self.count),
        }
        self.server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("shop.Inventory", methods),))

    async def slow(self, request: bytes, context: Any) -> bytes:
        self.calls += 1
        await asyncio.sleep(float(request))
        return b"at last"

    async def echo(self, request: bytes, context: Any) -> bytes:
        return request

    async def count(self, request: bytes, context: Any) -> AsyncIterator[bytes]:
        self.calls += 1
        for number in range(int(request)):
            yield str(number).encode()
            await asyncio.sleep(0.1)


async def refused(channel: Any) -> Code:
    with pytest.raises(grpc.RpcError) as caught:
        await channel.unary_unary(ECHO)(b"", timeout=2)
    return caught.value.code()


@pytest.mark.parametrize("is_elsewhere", [False, True])
async def test_a_drained_server_lets_streams_end_and_takes_no_new_calls(tmp_path: Path, is_elsewhere: bool) -> None:
    """Whichever thread says that it is to end."""
    mesh = mesh_of(tmp_path)
    house = House(mesh)
    address = f"127.0.0.1:{mesh.add_grpc_port(house.server, '127.0.0.1:0')}"
    await house.server.start()
    async with grpc.aio.insecure_channel(address) as channel:
        slow, count = channel.unary_unary(SLOW)(b"0.6"), channel.unary_stream(COUNT)(b"6")
        messages = aiter(count)
        assert await anext(messages) == b"0"
        await until(lambda: house.calls == 2)
        assert mesh.is_ready
        await asyncio.to_thread(mesh.drain) if is_elsewhere else mesh.drain()
        assert not mesh.is_ready
        await asyncio.sleep(0.1)
        async with grpc.aio.insecure_channel(address) as late:
            assert await refused(late) is Code.UNAVAILABLE
        assert await slow == b"at last"
        assert [message async for message in messages] == [b"1", b"2", b"3", b"4", b"5"]
        await asyncio.wait_for(house.server.wait_for_termination(), 3)
    mesh.close()


async def test_what_outlives_the_grace_is_cut(tmp_path: Path) -> None:
    """The process ends in time, whatever its handlers do."""
    mesh = mesh_of(tmp_path, "grace: 1s")
    house = House(mesh)
    address = f"127.0.0.1:{mesh.add_grpc_port(house.server, '127.0.0.1:0')}"
    await house.server.start()
    async with grpc.aio.insecure_channel(address) as channel:
        slow = channel.unary_unary(SLOW)(b"30")
        await until(lambda: house.calls == 1)
        begun = time.monotonic()
        mesh.drain()
        with pytest.raises(grpc.RpcError):
            await slow
        assert 0.4 < time.monotonic() - begun < 3
    await house.server.wait_for_termination()
    await until(lambda: sum(row["in_flight"] for row in mesh.gate.stats()) == 0)
    mesh.close()


async def test_while_others_learn_that_it_ends_a_server_serves_as_usual(tmp_path: Path) -> None:
    """Somebody can see that it isn't ready any more, by the health service: for `wait` seconds calls are let in."""
    mesh = mesh_of(tmp_path, "wait: 1s, grace: 3s")
    house = House(mesh)
    mesh.add_grpc_health(house.server)
    address = f"127.0.0.1:{mesh.add_grpc_port(house.server, '127.0.0.1:0')}"
    await house.server.start()
    async with grpc.aio.insecure_channel(address) as channel:
        assert await channel.unary_unary(CHECK)(b"") == b"\x08\x01"
        mesh.drain()
        assert await channel.unary_unary(CHECK)(b"") == b"\x08\x02"
        assert await channel.unary_unary(ECHO)(b"x") == b"x"
        # The keeper looks each second.
        await asyncio.wait_for(house.server.wait_for_termination(), 6)
    mesh.close()


def test_a_blocking_server_is_drained_as_well(tmp_path: Path) -> None:
    """By gRPC's own threads, while the call that is under way goes on."""
    mesh = mesh_of(tmp_path)
    begun: list[bool] = []

    def slow(request: bytes, context: Any) -> bytes:
        begun.append(True)
        time.sleep(float(request))
        return b"at last"

    server = grpc.server(futures.ThreadPoolExecutor(2), interceptors=mesh.sync_grpc_server_interceptors())
    handler = grpc.unary_unary_rpc_method_handler(slow)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("shop.Inventory", {"Slow": handler, "Echo": handler}),))
    address = f"127.0.0.1:{mesh.add_grpc_port(server, '127.0.0.1:0')}"
    server.start()
    with grpc.insecure_channel(address) as channel:
        under_way = channel.unary_unary(SLOW).future(b"0.6")
        while not begun:
            time.sleep(0.01)
        mesh.drain()
        time.sleep(0.2)
        with grpc.insecure_channel(address) as late, pytest.raises(grpc.RpcError) as caught:
            late.unary_unary(ECHO)(b"0", timeout=2)
        assert caught.value.code() is Code.UNAVAILABLE
        assert under_way.result(3) == b"at last"
    # False: it has not run into the time limit.
    assert server.wait_for_termination(3) is False
    mesh.close()


# ------------------------------------------------------------------------------------------ a process of its own


@contextmanager
def process(folder: Path, kind: str, drain: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    file = folder / "mesh.yaml"
    file.write_text(YAML.format(drain=drain))
    served = subprocess.Popen(
        [sys.executable, str(SUPPORT / "grpc_served.py"), str(file), kind], stdout=subprocess.PIPE, text=True
    )
    try:
        assert served.stdout is not None
        yield served, served.stdout.readline().strip()
    finally:
        served.kill()
        served.wait(5)
        served.stdout.close()


def under_way(channel: grpc.Channel, seconds: bytes, method: str = SLOW) -> Any:
    """A call that is in its handler, as far as one can tell from here."""
    grpc.channel_ready_future(channel).result(10)
    call = channel.unary_unary(method).future(seconds)
    time.sleep(0.3)
    return call


@pytest.mark.parametrize("kind", ["aio", "sync"])
def test_a_process_that_serves_only_grpc_drains_by_sigterm(tmp_path: Path, kind: str) -> None:
    """What is under way is answered, others are waited for, and the process ends as one that has done its work."""
    with process(tmp_path, kind, "wait: 500ms, grace: 10s") as (served, address), grpc.insecure_channel(address) as channel:
        slow = under_way(channel, b"1.5")
        assert channel.unary_unary(CHECK)(b"") == b"\x08\x01"
        begun = time.monotonic()
        served.send_signal(signal.SIGTERM)
        time.sleep(0.15)
        assert channel.unary_unary(CHECK)(b"", timeout=2) == b"\x08\x02"
        assert slow.result(5) == b"at last"
        assert served.wait(8) == 0
        assert 0.5 < time.monotonic() - begun < 6
        assert served.stdout is not None
        assert served.stdout.read() == "ended\n"


@pytest.mark.parametrize("kind", ["aio", "sync"])
def test_a_second_signal_ends_at_once(tmp_path: Path, kind: str) -> None:
    """Who says it twice means it."""
    with process(tmp_path, kind, "wait: 20s, grace: 30s") as (served, address), grpc.insecure_channel(address) as channel:
        slow = under_way(channel, b"60")
        served.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        assert served.poll() is None
        begun = time.monotonic()
        served.send_signal(signal.SIGTERM)
        assert served.wait(8) == 0
        assert time.monotonic() - begun < 4
        with pytest.raises(grpc.RpcError):
            slow.result(1)


@pytest.mark.parametrize(("signals", "grace"), [(1, 2), (2, 60)])
def test_a_handler_in_a_thread_that_hears_nothing_does_not_keep_the_process(tmp_path: Path, signals: int, grace: int) -> None:
    """Nobody can stop it, and Python would wait for it: when the time is over, or at the second signal, the process goes all the same."""
    with process(tmp_path, "sync", f"wait: 0s, grace: {grace}s") as (served, address), grpc.insecure_channel(address) as channel:
        deaf = under_way(channel, b"60", "/shop.Inventory/Deaf")
        begun = time.monotonic()
        for _ in range(signals):
            served.send_signal(signal.SIGTERM)
            time.sleep(0.3)
        assert served.wait(9) == 1
        assert time.monotonic() - begun < 7
        assert deaf.exception(5).code() is Code.UNAVAILABLE


def test_probes_tell_how_far_the_end_has_come(tmp_path: Path) -> None:
    """At the listener of the configuration, as with HTTP."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    probe = f"wait: 1500ms, grace: 10s}}, probe: {{listen: '127.0.0.1:{port}'"
    with process(tmp_path, "aio", probe) as (served, address), grpc.insecure_channel(address) as channel:
        slow = under_way(channel, b"1.8")
        assert (asked(port, "/readyz"), asked(port, "/livez")) == (200, 200)
        served.send_signal(signal.SIGTERM)
        time.sleep(0.4)
        assert (asked(port, "/readyz"), asked(port, "/livez")) == (503, 200)
        assert slow.result(5) == b"at last"
        assert served.wait(8) == 0


def asked(port: int, path: str) -> int:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


@pytest.mark.parametrize("kind", ["aio", "sync"])
def test_a_person_does_not_wait_for_others_to_learn_of_it(tmp_path: Path, kind: str) -> None:
    """SIGINT: what is under way is answered, and that is all."""
    with process(tmp_path, kind, "wait: 30s, grace: 30s") as (served, address), grpc.insecure_channel(address) as channel:
        slow = under_way(channel, b"0.8")
        begun = time.monotonic()
        served.send_signal(signal.SIGINT)
        assert slow.result(5) == b"at last"
        assert served.wait(8) == 0
        assert time.monotonic() - begun < 5
