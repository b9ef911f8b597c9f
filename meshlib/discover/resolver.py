"""What does a source of endpoints answer?

A `Resolver` answers `Snapshot`s: whole, immutable states of one Service, each with a version that rises with every
change. A whole state, not a difference, because a difference that got lost is never noticed. Asked again by the one who
needs it (`interval`), it has no thread, no callback and no life of its own; a source that can wait for a change (a
blocking query) does so inside `resolve`.

When a resolver does not know, it raises: an empty snapshot says that there are no endpoints, and that is another thing.
What is done about errors, losses and age is the `Directory`'s; a resolver only asks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Protocol, runtime_checkable


@dataclass(frozen=True, slots=True)
class EndpointAddress:
    """Where one endpoint is and what is special about it. `identity` is "" where it is the service's own."""

    address: str
    weight: float = 1.0
    zone: str = ""
    labels: Mapping[str, str] = field(default_factory=dict, hash=False)
    identity: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "labels", MappingProxyType(dict(self.labels)))


@dataclass(frozen=True, slots=True)
class Snapshot:
    """All endpoints of a service at one time. `taken` is in the monotonic seconds of the resolver's clock."""

    service: str
    version: int
    endpoints: tuple[EndpointAddress, ...]
    taken: float = field(compare=False)

    def age(self, now: float) -> float:
        """For how long nobody has confirmed it."""
        return max(0.0, now - self.taken)


@runtime_checkable
class Resolver(Protocol):
    """A source of endpoints for one service. `interval` is in seconds until the next look; None means never again."""

    @property
    def service(self) -> str: ...

    @property
    def interval(self) -> float | None: ...

    async def resolve(self) -> Snapshot:
        """The state now. Raises when it isn't known; never blocks the loop."""
        ...


@runtime_checkable
class Immediate(Resolver, Protocol):
    """A resolver that can answer without waiting for the network, before any loop runs."""

    def look(self) -> Snapshot: ...


class StaticResolver:
    """The endpoints are written in the configuration, and change only with it."""

    interval: float | None = None

    def __init__(self, service: str, endpoints: Iterable[EndpointAddress], *, now: float) -> None:
        self.service = service
        self._snapshot = Snapshot(service, 1, tuple(endpoints), now)

    def look(self) -> Snapshot:
        return self._snapshot

    async def resolve(self) -> Snapshot:
        return self._snapshot


def from_settings(settings: Iterable[Any], *, is_dev: bool = False) -> tuple[EndpointAddress, ...]:
    """Endpoints as the configuration writes them. In development all identities are the services' own."""
    return tuple(
        EndpointAddress(item.address, item.weight, item.zone, item.labels, "" if is_dev else item.identity or "")
        for item in settings
    )
