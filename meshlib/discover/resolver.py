"""What does a source of endpoints answer?

A `Resolver` answers `Snapshot`s: whole, immutable states of one Service, each with a version that rises with every
change. Asked again by the one who needs it (`interval`), it has no thread, no callback and no life of its own.

A source that tells by itself is `Watching`: a stream that begins with a whole state and goes on with states or with
`Change`s, each of which names the version that it changes. A change that got lost is noticed by that, and ends the stream;
who watches begins anew, with a whole state.

When a resolver does not know, it raises: an empty snapshot says that there are no endpoints, and that is another thing.
What is done about errors, losses and age is the `Directory`'s; a resolver only asks.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Protocol, runtime_checkable

from meshlib.errors import ConfigError


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
    """All endpoints of a service at one time. `taken` is that time, in the monotonic seconds of the resolver's clock (of a copy, as of
    when it was true): the age of what is used is counted from it.
    """

    service: str
    version: int
    endpoints: tuple[EndpointAddress, ...]
    taken: float = field(compare=False)

    def age(self, now: float) -> float:
        """For how long nobody has confirmed it."""
        return max(0.0, now - self.taken)


@dataclass(frozen=True, slots=True)
class Change:
    """What is different since the version `base` of a service: endpoints that are new or not as before, and addresses that are gone.

    One that changes nothing says that what is known still holds. `taken` is as in `Snapshot`; 0.0 is "just now".
    """

    service: str
    base: int
    version: int
    changed: tuple[EndpointAddress, ...] = ()
    gone: tuple[str, ...] = ()
    taken: float = field(default=0.0, compare=False)


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
class Watching(Resolver, Protocol):
    """A source that tells by itself. Its `interval` is None, and its `resolve` answers once, for those who only want to look."""

    def watch(self) -> AsyncIterator[Snapshot | Change]:
        """The state, then what becomes of it, for ever. Raises when it isn't known any more; whoever watches calls again after a
        while. It ends when its iterator is closed or its task cancelled, and leaves nothing open then.

        An error that has a true `is_refusal` says that the source lives, and refuses this service for a reason of its own: no right to
        it, an answer that can't be read. Then no other service waits for this one.
        """
        ...


def is_refusal(error: Exception) -> bool:
    """Whether an error says something about one service only. What we ourselves can't use (ConfigError) does, too."""
    return isinstance(error, PermissionError | ConfigError) or getattr(error, "is_refusal", False) is True


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
