"""What does Consul say about the instances of a service, and what becomes of it?

By blocking queries: each names the index of what we know and is held until there is a newer one, or until its time is over. The
index is Consul's, and has rules of its own:

    unchanged            nothing has happened: not even read, and told as a sign of life
    grown                the service, or something near it, has changed: compared with what we know
    smaller than before  the servers were restored, or another one answers: begin anew, with a whole state
    0                    means nothing; the next query must not wait for it

An index that never blocks would make this a busy loop, so queries that come back at once are asked more and more slowly, up to
once a second. What goes wrong is raised and ends the watch; when to begin again is for the one who watches.

An empty list may mean that our token may not see what is there. Consul says so in a header, and then it isn't an answer.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from meshlib.discover import Change, EndpointAddress, Snapshot

from .instances import Rules, endpoints_of
from .place import ConsulError, Reader
from .wire import Answer, Wire

# Queries that come back sooner than this are slowed down: by as much after the first, and up to LONGEST_PAUSE.
PACE: Final = 0.1
LONGEST_PAUSE: Final = 1.0
# Objects that are read before others on this loop have their turn: half a millisecond.
TURN: Final = 32


@dataclass(frozen=True, slots=True)
class Query:
    """Which instances are asked for: the keys of `discover`, by service."""

    name: str
    tags: tuple[str, ...] = ()
    filter: str = ""
    datacenter: str = ""
    near: str = ""
    is_passing_only: bool = True
    takes_identities: bool = False

    def params(self, datacenter: str) -> list[tuple[str, str]]:
        asked = [("tag", tag) for tag in self.tags]
        named = (("filter", self.filter), ("dc", self.datacenter or datacenter), ("near", self.near))
        asked += [(name, value) for name, value in named if value]
        return [*asked, ("passing", "1")] if self.is_passing_only else asked


def query_of(service: str, settings: Mapping[str, Any]) -> Query:
    """What `discover` says. Raises ConfigError."""
    reader = Reader(f"services.{service}.discover", settings)
    found = Query(
        name=reader.text("name", service),
        tags=reader.texts("tags"),
        filter=reader.text("filter"),
        datacenter=reader.text("datacenter"),
        near=reader.text("near"),
        is_passing_only=reader.flag("passing_only", default=True),
        takes_identities=reader.flag("identities", default=False),
    )
    reader.end()
    return found


class ConsulResolver:
    """A `Watching` resolver of one service. Versions rise over its life, whoever watches."""

    interval: float | None = None

    def __init__(self, wire: Wire, service: str, query: Query, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.service = service
        self._wire = wire
        self._query = query
        self._rules = Rules(query.is_passing_only, query.takes_identities)
        self._clock = clock
        self._version = 0
        self._known: dict[str, EndpointAddress] | None = None

    def __repr__(self) -> str:
        return f"<ConsulResolver of {self._query.name} at {self._wire.place.name}>"

    async def resolve(self) -> Snapshot:
        answer = await self._ask(0)
        return self._snapshot(await self._read(answer), self._taken(answer))

    async def watch(self) -> AsyncIterator[Snapshot | Change]:
        index, quick, is_whole = 0, 0, True
        while True:
            if quick > 1:
                await asyncio.sleep(min(LONGEST_PAUSE, PACE * (quick - 1)))
            began = self._clock()
            answer = await self._ask(index)
            came, taken = answer.index, self._taken(answer)
            quick = quick + 1 if came < 1 or self._clock() - began < PACE else 0
            if came < index or came < 1:
                index, is_whole = 0, True
            elif came == index and not is_whole and not answer.is_filtered:
                yield Change(self.service, self._version, self._version, taken=taken)
                continue
            else:
                index = came
            found = await self._read(answer)
            if is_whole:
                # The first after a reset is asked for without waiting: what comes then may well be the same.
                is_whole = False
                yield self._snapshot(found, taken)
            else:
                yield self._change(found, taken)

    # ------------------------------------------------------------------ one answer

    async def _ask(self, index: int) -> Answer:
        path = f"/v1/health/service/{self._query.name}"
        place = self._wire.place
        stale = [("stale", "1")] if place.is_stale else []
        answer = await self._wire.ask("GET", path, [*self._query.params(place.datacenter), *stale], index=index)
        if not answer.has_leader and not place.is_stale:
            raise ConsulError(f"{place.name} knows no leader of its cluster.", hint="See `consul operator raft list-peers`.")
        return answer

    def _taken(self, answer: Answer) -> float:
        """When this was true: a server that has not heard from its leader for a while tells of the past."""
        return self._clock() - answer.age

    async def _read(self, answer: Answer) -> dict[str, EndpointAddress]:
        entries = list[Any]()
        try:
            for entry in _elements(answer.raw.decode()):
                entries.append(entry)
                if len(entries) % TURN == 0:
                    await asyncio.sleep(0)
        except (ValueError, RecursionError) as error:
            raise ConsulError(
                f"{self._wire.place.name}: the instances of {self._query.name} can't be read: {error}.",
                hint="Is that the URL of a Consul agent?",
                is_refusal=True,
            ) from None
        if not entries and answer.is_filtered:
            raise ConsulError(
                f"{self._wire.place.name}: our token may not see the instances of {self._query.name}.",
                hint="Its policy needs service:read for the service and node:read for its nodes.",
                is_refusal=True,
            )
        return endpoints_of(entries, self._query.name, self._rules)

    # ------------------------------------------------------------------ what is told of it

    def _snapshot(self, found: dict[str, EndpointAddress], taken: float) -> Snapshot:
        if found != self._known:
            self._version += 1
            self._known = found
        return Snapshot(self.service, self._version, tuple(found.values()), taken)

    def _change(self, found: dict[str, EndpointAddress], taken: float) -> Change:
        before = self._known or {}
        changed = tuple(each for address, each in found.items() if before.get(address) != each)
        gone = tuple(address for address in before if address not in found)
        base = self._version
        if changed or gone:
            self._version += 1
            self._known = found
        return Change(self.service, base, self._version, changed, gone, taken)


_decoder: Final = json.JSONDecoder()


def _elements(text: str) -> Any:
    """The elements of a JSON array, one by one: an answer of megabytes, parsed at once, would hold up every thread of the process."""
    at = _after_space(text, 0)
    if text[at : at + 1] != "[":
        raise ValueError("it is no list")
    at = _after_space(text, at + 1)
    if text[at : at + 1] == "]":
        end = at + 1
    else:
        while True:
            element, at = _decoder.raw_decode(text, at)
            yield element
            at = _after_space(text, at)
            mark, at = text[at : at + 1], _after_space(text, at + 1)
            if mark == "]":
                end = at
                break
            if mark != ",":
                raise ValueError("it is cut off" if not mark else "it is no JSON")
    if _after_space(text, end) != len(text):
        raise ValueError("there is more after its end")


def _after_space(text: str, at: int) -> int:
    while text[at : at + 1] in {" ", "\t", "\r", "\n"}:
        at += 1
    return at
