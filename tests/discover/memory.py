"""A registry in memory, for tests: it tells by itself, may be down, and counts who asks."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

from meshlib.discover import Change, EndpointAddress, Instance, Registration, Resolver, Snapshot


def some(*numbers: int) -> tuple[EndpointAddress, ...]:
    return tuple(EndpointAddress(f"10.0.0.{number}:80") for number in numbers)


class System:
    """What all registry objects look at."""

    def __init__(self) -> None:
        self.known: dict[str, dict[str, EndpointAddress]] = {}
        self.versions: dict[str, int] = {}
        self.is_down = False
        self.opened: list[Memory] = []
        self.instances: dict[str, Instance] = {}
        self.tries: list[float] = []
        self.leaving = 0.0  # seconds that it takes to be taken out
        self.stale: float | None = 0.0  # seconds by which its answers are old; None for changes that don't tell
        self.watches = 0
        self._watchers: list[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = []

    def open_one(self, plugin: str, settings: Mapping[str, Any]) -> Memory:
        self.opened.append(Memory(self, settings))
        return self.opened[-1]

    def put(self, service: str, *endpoints: EndpointAddress) -> None:
        self.known.setdefault(service, {}).update((e.address, e) for e in endpoints)
        self._tell(service)

    def remove(self, service: str, *addresses: str) -> None:
        for address in addresses:
            self.known[service].pop(address, None)
        self._tell(service)

    def down(self, is_down: bool = True) -> None:
        self.is_down = is_down
        self._tell("")

    def _tell(self, service: str) -> None:
        self.versions[service] = self.versions.get(service, 0) + 1
        for loop, event in tuple(self._watchers):
            if not loop.is_closed():
                loop.call_soon_threadsafe(event.set)


class Memory:
    """One registry object."""

    def __init__(self, system: System, settings: Mapping[str, Any]) -> None:
        self.system = system
        self.settings = settings
        self.closed = 0
        self.forks = 0

    def resolver(self, service: str, settings: Mapping[str, Any]) -> Resolver:
        return Source(self, str(settings.get("name", service)), service)

    def register(self, instance: Instance, settings: Mapping[str, Any]) -> Registration:
        return Entered(self, instance)

    async def close(self) -> None:
        self.closed += 1

    def after_fork(self) -> None:
        self.forks += 1
        self.system._watchers = []


class Source:
    interval: float | None = None

    def __init__(self, registry: Memory, name: str, service: str) -> None:
        self.registry, self.name, self.service = registry, name, service
        self.twist: Callable[[Change], Change] = lambda change: change

    async def resolve(self) -> Snapshot:
        system = self.registry.system
        if system.is_down:
            raise OSError("the registry is down")
        state = tuple(system.known.get(self.name, {}).values())
        return Snapshot(self.service, system.versions.get(self.name, 0), state, time.monotonic() - (system.stale or 0.0))

    async def watch(self) -> AsyncIterator[Snapshot | Change]:
        system = self.registry.system
        system.tries.append(time.monotonic())
        mine = asyncio.get_running_loop(), asyncio.Event()
        system._watchers.append(mine)
        system.watches += 1
        try:
            state = await self.resolve()
            yield state
            while True:
                await mine[1].wait()
                mine[1].clear()
                fresh = await self.resolve()
                before, after = ({e.address: e for e in each.endpoints} for each in (state, fresh))
                changed = tuple(e for e in fresh.endpoints if before.get(e.address) is not e)
                gone = tuple(address for address in before if address not in after)
                taken = 0.0 if system.stale is None else fresh.taken
                yield self.twist(Change(self.service, state.version, fresh.version, changed, gone, taken))
                state = fresh
        finally:
            system.watches -= 1
            if mine in system._watchers:
                system._watchers.remove(mine)


class Entered:
    """Kept while somebody keeps it."""

    def __init__(self, registry: Memory, instance: Instance) -> None:
        self.registry, self.instance = registry, instance
        self.pid = os.getpid()

    async def keep(self) -> None:
        system = self.registry.system
        system.tries.append(time.monotonic())
        if system.is_down:
            raise OSError("the registry is down")
        system.instances[self.instance.id] = self.instance
        try:
            while not system.is_down:
                await asyncio.sleep(0.01)
        finally:
            if system.is_down:
                system.instances.pop(self.instance.id, None)
        raise OSError("the registry is down")

    async def leave(self) -> None:
        await asyncio.sleep(self.registry.system.leaving)
        self.registry.system.instances.pop(self.instance.id, None)
