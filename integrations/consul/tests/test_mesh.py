"""Does a call fail because of Consul? A real mesh under load, real servers, and an agent that is killed, stopped, emptied, restarted or
answers nonsense.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

import meshlib
from integrations.consul.tests.agents import StandInAgent
from tests.support import Request, Scripted, mesh_of, ok, scripted, write_config

pytest.importorskip("meshlib.discover.follow", reason="this meshlib follows no registries")

PATIENCE = 20.0
REGISTRY = {"timeout": "500ms", "wait": "1s", "cache": "cache"}


@pytest.fixture(autouse=True)
def quick_pace(monkeypatch: pytest.MonkeyPatch) -> None:
    """A test has not the ten seconds over which a fleet spreads."""
    from meshlib.discover import pace

    monkeypatch.setattr(pace, "LOST", ((0.0, 0.5),))


async def answer(server: Scripted, request: Request) -> bytes:
    return ok(str(server.port).encode())


@pytest.fixture
async def servers() -> AsyncIterator[list[Scripted]]:
    async with AsyncExitStack() as stack:
        yield [await stack.enter_async_context(scripted(answer)) for _ in range(4)]


class Load:
    """Calls as fast as four callers make them, and what became of each."""

    def __init__(self, mesh: meshlib.Mesh) -> None:
        self.mesh = mesh
        self.ports: list[int] = []
        self.failures: list[Exception] = []
        self.tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Load:
        self.client = self.mesh.client()
        await self.client.__aenter__()
        self.tasks = [asyncio.ensure_future(self._call()) for _ in range(4)]
        return self

    async def __aexit__(self, *_: Any) -> None:
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)
        await self.client.aclose()

    async def _call(self) -> None:
        while True:
            try:
                answered = await self.client.get("http://orders/")
                self.ports.append(int(answered.text))
            except Exception as error:
                self.failures.append(error)
            await asyncio.sleep(0.005)

    async def until_called(self, *ports: int) -> None:
        """Just these are called."""
        end = time.monotonic() + PATIENCE
        while True:
            begin = len(self.ports)
            while len(self.ports) < begin + 40:
                assert time.monotonic() < end, (
                    f"{set(self.ports[begin:])} are called, not {set(ports)}; failures {self.failures[-3:]}"
                )
                await asyncio.sleep(0.01)
            if set(self.ports[begin:]) == set(ports):
                return


@pytest.fixture
async def load_of(tmp_path: Path) -> AsyncIterator[Callable[[Any], Awaitable[Load]]]:
    async with AsyncExitStack() as stack:

        async def begin(agent: Any) -> Load:
            registries = {"consul": {"url": agent.url, **REGISTRY}}
            services = {"orders": {"discover": "consul", "balance": {"policy": "round_robin"}}}
            mesh = stack.enter_context(mesh_of(tmp_path, services, registries=registries))
            return await stack.enter_async_context(Load(mesh))

        yield begin


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["kill and restart", "pause"])
async def test_no_call_fails_while_the_agent_is_away(
    agent: Any, servers: list[Scripted], load_of: Callable[[Any], Awaitable[Load]], fault: str
) -> None:
    """What was known stays in use; when the agent is back, what is there then is called."""
    first, second, third, _ = (server.port for server in servers)
    for port in (first, second):
        agent.put("orders", port)
    load = await load_of(agent)
    await load.until_called(first, second)
    await asyncio.to_thread(agent.kill if fault == "kill and restart" else agent.pause)
    await asyncio.sleep(3.0)
    await load.until_called(first, second)
    await asyncio.to_thread(agent.restart if fault == "kill and restart" else agent.resume)
    await asyncio.to_thread(lambda: [agent.put("orders", port) for port in (first, second, third)])
    await load.until_called(first, second, third)
    assert (load.failures, len(load.ports) > 300) == ([], True)


@pytest.mark.slow
async def test_no_call_fails_when_the_catalogue_is_suddenly_empty(
    agent: Any, servers: list[Scripted], load_of: Callable[[Any], Awaitable[Load]]
) -> None:
    """An agent that lost its memory answers quickly, cleanly and wrong: it isn't believed at once, and what comes again is."""
    first, second, third, _ = (server.port for server in servers)
    for port in (first, second):
        agent.put("orders", port)
    load = await load_of(agent)
    await load.until_called(first, second)
    await asyncio.to_thread(agent.restart)
    await asyncio.sleep(2.0)
    await load.until_called(first, second)
    (row,) = [each for each in load.mesh.directory.stats(time.monotonic()) if each["service"] == "orders"]
    assert row["is_held"]
    await asyncio.to_thread(lambda: [agent.put("orders", port) for port in (first, second, third)])
    await load.until_called(first, second, third)
    assert load.failures == []


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["500", "429", "reset", "garbage", "cut", "object", "nonsense", "filtered", "index goes back"])
async def test_no_call_fails_while_the_agent_answers_nonsense(
    standin: StandInAgent, servers: list[Scripted], load_of: Callable[[Any], Awaitable[Load]], fault: str
) -> None:
    """And when it is itself again, what has changed meanwhile is known."""
    first, second, third, _ = (server.port for server in servers)
    for port in (first, second):
        standin.put("orders", port)
    load = await load_of(standin)
    await load.until_called(first, second)
    if fault == "index goes back":
        standin.standin.restore(3)
    else:
        standin.standin.fail(fault)
    await asyncio.sleep(1.5)
    await load.until_called(first, second)
    standin.standin.fail("")
    standin.put("orders", third)
    await load.until_called(first, second, third)
    assert load.failures == []


@pytest.mark.slow
async def test_a_process_starts_while_consul_is_away(
    standin: StandInAgent, servers: list[Scripted], load_of: Callable[[Any], Awaitable[Load]], tmp_path: Path
) -> None:
    """With what the last one knew."""
    standin.put("orders", servers[0].port)
    before = await load_of(standin)
    end = time.monotonic() + PATIENCE
    while not any((tmp_path / "cache").glob("*")):
        assert time.monotonic() < end, "nothing was kept"
        await asyncio.sleep(0.1)
    await before.__aexit__()
    await asyncio.to_thread(before.mesh.close)
    standin.kill()
    after = await load_of(standin)
    await after.until_called(servers[0].port)
    assert after.failures == []


async def test_an_instance_that_leaves_is_called_no_more(
    agent: Any, servers: list[Scripted], load_of: Callable[[Any], Awaitable[Load]]
) -> None:
    """Within a moment of Consul's answer, and no call fails by it."""
    ports = [server.port for server in servers]
    for port in ports:
        agent.put("orders", port)
    load = await load_of(agent)
    await load.until_called(*ports)
    began = time.monotonic()
    await asyncio.to_thread(agent.remove, "orders", ports[0])
    await load.until_called(*ports[1:])
    assert (time.monotonic() - began < 3.0, load.failures) == (True, [])


async def test_route_finds_an_instance_by_the_labels_of_its_register(agent: Any, tmp_path: Path) -> None:
    """Labels and weight under `register` are what callers see of it: a route by label takes it, and no other instance."""

    def answering(name: bytes) -> Any:
        async def answer(server: Scripted, request: Request) -> bytes:
            return ok(name)

        return answer

    async def app(scope: object, receive: object, send: object) -> None: ...

    async with scripted(answering(b"v1")) as first, scripted(answering(b"v2")) as second:
        services = {
            "me": {},
            "orders": {
                "listen": second.address,
                "register": {"registry": "consul", "labels": {"version": "v2"}, "weight": 3},
                "discover": "consul",
                "route": [
                    {"match": {"path": {"prefix": "/new"}}, "backends": [{"labels": {"version": "v2"}}]},
                    {"backends": [{"labels": {"version": "v1"}}]},
                ],
            },
        }
        file = write_config(tmp_path, services, registries={"consul": {"url": agent.url, "cache": False}})
        agent.put("orders", first.port, Tags=["version=v1"])
        server, caller = (meshlib.Mesh.load(file, service=service) for service in ("orders", "me"))
        try:
            server.asgi(app).way.rise()
            await asyncio.to_thread(caller.start)
            end = time.monotonic() + 10.0
            while len(found := caller.directory.endpoints("orders")) < 2:
                assert time.monotonic() < end, server.registrar.error or "it was not entered"
                await asyncio.sleep(0.02)
            (ours,) = (each for each in found if each.address == second.address)
            assert (ours.weight, dict(ours.labels)) == (3.0, {"version": "v2"})
            async with caller.client() as client:
                said = [(await client.get(f"http://orders/{path}")).content for path in ("new", "old", "new", "old")]
            assert said == [b"v2", b"v1", b"v2", b"v1"]
        finally:
            await asyncio.to_thread(server.close)
            await asyncio.to_thread(caller.close)
