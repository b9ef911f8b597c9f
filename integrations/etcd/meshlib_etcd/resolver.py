"""Which endpoints does a service have, by the keys that etcd has for it?

A key is an instance, an endpoint is an address: a process that died and came back may have two keys for one address until the old
lease ends. So the table keeps both, the youngest key of an address counts, and an address is gone with its last key.

A value that can't be read is told in the log and passed over; what its key said before stays. Only if none of a service's
values can be read is that an error: an empty list would say that there are no endpoints. Versions are this resolver's own and
only rise, as etcd's revisions don't when it has lost its data.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, Callable, Iterable

from meshlib.discover import Change, EndpointAddress, Snapshot

from .client import PAGE
from .feed import Feed, Member
from .instance import read_instance
from .messages import Entry, EtcdError, Event, shortened

logger = logging.getLogger("meshlib.etcd")


class Table:
    """The instances of one service, by key and by address."""

    def __init__(self, service: str, prefix: bytes, *, has_identities: bool = False) -> None:
        self._service = service
        self._prefix = prefix
        self._has_identities = has_identities
        self._by_key: dict[bytes, EndpointAddress] = {}
        # The last key of an address is the youngest.
        self._by_address: dict[str, dict[bytes, EndpointAddress]] = {}
        self._told: dict[bytes, str] = {}

    async def begin(self, entries: Iterable[Entry]) -> tuple[EndpointAddress, ...]:
        """All is as in these entries. Raises EtcdError if there are some, and none can be read."""
        before, self._by_key, self._by_address = self._by_key, {}, {}
        # By age, so that of two keys with one address the younger counts.
        by_age = sorted(entries, key=lambda entry: entry.revision)
        there = {entry.key for entry in by_age}
        self._told = {key: why for key, why in self._told.items() if key in there}
        for number, entry in enumerate(by_age, 1):
            if number % PAGE == 0:
                await asyncio.sleep(0)  # others on this loop have something to do, too
            endpoint = self._read(entry.key, entry.value) or before.get(entry.key)
            if endpoint is not None:
                self._put(entry.key, endpoint)
        if there and not self._by_key:
            self._by_key = before
            raise EtcdError(f"etcd has {len(there)} keys for {self._service}, and not one of them can be read.", is_refusal=True)
        return tuple(self._effective(address) for address in self._by_address)

    def apply(self, events: Iterable[Event]) -> tuple[tuple[EndpointAddress, ...], tuple[str, ...]]:
        """Which endpoints are new or not as before after these events, and which addresses are gone."""
        touched: dict[str, EndpointAddress | None] = {}  # what the address was before
        for event in sorted(events, key=lambda event: event.revision):
            if event.value is None:
                self._told.pop(event.key, None)
                self._drop(event.key, touched)
            elif (endpoint := self._read(event.key, event.value)) is not None:
                self._drop(event.key, touched, endpoint.address)
                self._put(event.key, endpoint)
        changed = []
        gone = []
        for address, before in touched.items():
            if address not in self._by_address:
                if before is not None:
                    gone.append(address)
            elif self._effective(address) != before:
                changed.append(self._effective(address))
        return tuple(changed), tuple(gone)

    def _effective(self, address: str) -> EndpointAddress:
        return next(reversed(self._by_address[address].values()))

    def _put(self, key: bytes, endpoint: EndpointAddress) -> None:
        self._by_key[key] = endpoint
        self._by_address.setdefault(endpoint.address, {})[key] = endpoint

    def _drop(self, key: bytes, touched: dict[str, EndpointAddress | None], *also: str) -> None:
        old = self._by_key.pop(key, None)
        for address in (*((old.address,) if old is not None else ()), *also):
            if address not in touched:
                touched[address] = self._effective(address) if address in self._by_address else None
        if old is not None:
            keys = self._by_address[old.address]
            del keys[key]
            if not keys:
                del self._by_address[old.address]

    def _read(self, key: bytes, value: bytes) -> EndpointAddress | None:
        name = key.removeprefix(self._prefix)
        try:
            if not name or b"/" in name:
                raise ValueError("its key is none of an instance")
            endpoint = read_instance(value, has_identities=self._has_identities)
        except ValueError as error:
            if self._told.get(key) != str(error) and len(self._told) < 1000:
                self._told[key] = str(error)
                logger.warning(
                    "%s: what etcd has at %s is no instance, and is passed over: %s",
                    self._service,
                    shortened(key.decode("utf-8", "replace")),
                    error,
                )
            return None
        self._told.pop(key, None)
        return endpoint


class EtcdResolver:
    """The endpoints of one service, as etcd tells of them. It is `Watching`."""

    interval: float | None = None

    def __init__(
        self,
        service: str,
        prefix: bytes,
        feed_of: Callable[[bytes], Feed],
        *,
        has_identities: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.service = service
        self._prefix = prefix
        self._feed_of = feed_of
        self._table = Table(service, prefix, has_identities=has_identities)
        self._has_identities = has_identities
        self._clock = clock
        self._version = 0

    def __repr__(self) -> str:
        return f"<EtcdResolver of {self.service}, version {self._version}>"

    async def resolve(self) -> Snapshot:
        """A look, without anything that goes on."""
        table = Table(self.service, self._prefix, has_identities=self._has_identities)
        async with self._joined() as member:
            endpoints = await table.begin(await member.begun())
        self._version += 1
        return Snapshot(self.service, self._version, endpoints, self._clock())

    async def watch(self) -> AsyncGenerator[Snapshot | Change, None]:
        """The state, then each change."""
        async with self._joined() as member:
            endpoints = await self._table.begin(await member.begun())
            self._version += 1
            yield Snapshot(self.service, self._version, endpoints, self._clock())
            while True:
                changed, gone = self._table.apply(await member.next())
                base = self._version
                if changed or gone:
                    self._version += 1
                yield Change(self.service, base, self._version, changed, gone, self._clock())

    @contextlib.asynccontextmanager
    async def _joined(self) -> AsyncGenerator[Member, None]:
        feed = self._feed_of(self._prefix)
        member = feed.join(self._prefix)
        try:
            yield member
        finally:
            await feed.leave(member)
