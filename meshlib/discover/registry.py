"""Who keeps the list of what is where, and how does a process get into it?

A `Registry` is somebody else's: Consul, etcd. A package brings the way to it under the entry point `meshlib.resolver`, by the
name that `registries` in mesh.yaml has. It makes a `Resolver` for each service that is looked up there, and a
`Registration` for the service that this process serves. What to do about errors, and when to try again, is not its
affair: it raises, and is asked again after a while. All of it runs on the keeper's loop.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

from meshlib.config.plugin import opened

from .resolver import Resolver

GROUP: Final = "meshlib.resolver"


@dataclass(frozen=True, slots=True)
class Instance:
    """One process that serves a service, as it tells a registry. `address` is host:port as others reach it; `id` is its own, for as
    long as it lives. `identity` is its SPIFFE ID, "" where it is nothing special.
    """

    service: str
    id: str
    address: str
    zone: str = ""
    weight: float = 1.0
    labels: Mapping[str, str] = field(default_factory=dict)
    identity: str = ""
    protocol: str = "http"


class Registration(Protocol):
    """An entry that lives as long as somebody keeps it.

    One that has an attribute `is_entered` tells by it whether the entry stands just now. Others are believed after ten seconds without an
    error.
    """

    async def keep(self) -> None:
        """Enter, keep the entry alive, and enter again when it was lost. It doesn't come back; it raises when it can't go on, and is
        called again after a while.

        That may be longer than the entry lives: one question that fails is no reason to raise while there is time to ask again.
        """
        ...

    async def leave(self) -> None:
        """Take the entry out. Harmless if there is none."""
        ...


class Registry(Protocol):
    """A system that knows where services are."""

    def resolver(self, service: str, settings: Mapping[str, Any]) -> Resolver:
        """Who finds the endpoints of a service. `settings` are those of its `discover`. Raises ConfigError for wrong ones."""
        ...

    def register(self, instance: Instance, settings: Mapping[str, Any]) -> Registration:
        """An entry for this process, not made yet. `settings` are those of its `register`. Raises ConfigError for wrong ones.

        It opens no connection: settings are judged by it, at each configuration that is to come into force.
        """
        ...

    async def close(self) -> None:
        """Close its connections."""
        ...

    def after_fork(self) -> None:
        """In a forked child: forget the parent's connections without a word on the wire."""
        ...


# What a package offers under its entry point: the settings are those of `registries.<name>`, without `plugin`.
Factory = Callable[[Mapping[str, Any]], Registry]


def open_registry(plugin: str, settings: Mapping[str, Any]) -> Registry:
    """The registry of a plugin's name. Raises ConfigError."""
    made, _ = opened(
        GROUP,
        plugin,
        lambda factory: factory(dict(settings)),
        at="registries",
        trusted_with="addresses",
    )
    found: Registry = made
    return found
