"""How does the mesh come to Consul's catalogue?

`open_registry` is what the entry point `consul` in the group `meshlib.resolver` names: it makes a `ConsulRegistry` of the
settings under `registries.consul`, and that a resolver for each service that is looked up there and an entry for the one that
this process serves. All of them share one wire, and it opens its first connection when the first of them asks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from meshlib.discover import Instance

from .entry import ConsulEntry, terms_of
from .health import ConsulResolver, query_of
from .place import Place, Reader, place_of
from .wire import Wire


class ConsulRegistry:
    """A `Registry`. State of the process: the wire to one agent."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self._wire = Wire(place)

    def __repr__(self) -> str:
        return f"<ConsulRegistry, {self.place.name}>"

    def resolver(self, service: str, settings: Mapping[str, Any]) -> ConsulResolver:
        return ConsulResolver(self._wire, service, query_of(service, settings))

    def register(self, instance: Instance, settings: Mapping[str, Any]) -> ConsulEntry:
        return ConsulEntry(self._wire, instance, terms_of(instance, settings))

    async def close(self) -> None:
        await self._wire.close()

    def after_fork(self) -> None:
        self._wire.after_fork()


def open_registry(settings: Mapping[str, Any]) -> ConsulRegistry:
    """The factory behind the entry point. `settings` are those of `registries.consul` in mesh.yaml."""
    reader = Reader("registries.consul", settings)
    place = place_of(reader)
    reader.end()
    return ConsulRegistry(place)
