"""What is known of one Service, and how does it reach the engine?

An `Entry` takes what a source tells (whole states or changes) into its table, and publishes what is different: as an amendment where the
engine has the version before, as a whole list where it has not. Changes that come within `GATHER` seconds of a publication are gathered
until these are over; one that comes alone waits for nothing, since an endpoint that is gone may be called until then, and one that came
may be the only one. It waits for nothing and asks nobody; its caller holds the directory's lock.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

from meshlib.keeper import Job

from .cache import Cache
from .hold import Table
from .pace import Delays
from .registries import Opened
from .resolver import Change, EndpointAddress, Resolver, Snapshot

logger = logging.getLogger("meshlib.discover")

# Address, weight, zone, labels, identity, and whether the source doesn't tell it any more.
Row = tuple[str, float, str, Mapping[str, str], str, bool]

GATHER = 0.02  # seconds
# Above this part of all endpoints an amendment costs no less than a whole list.
PART = 0.25
SLICE = 512
# A source that gave no answer for so many seconds is told of: a restart takes less.
SILENT = 60.0


class Sink(Protocol):
    """The part of the engine that the directory needs."""

    def resolve(self, service: str, version: int, endpoints: Sequence[Row], now: float) -> None: ...

    def amend(self, service: str, base: int, version: int, changed: Sequence[Row], gone: Sequence[str], now: float) -> bool: ...

    def unreachable(self, service: str) -> int: ...


class Entry:
    """State of the Service."""

    __slots__ = (
        *(
            "_all",
            "_last",
            "_touched",
            "asked",
            "cache",
            "changes",
            "connects",
            "delays",
            "error",
            "failures",
            "has_answered",
            "is_dirty",
        ),
        *(
            "is_missing",
            "job",
            "known",
            "looked",
            "make",
            "name",
            "opened",
            "published_at",
            "resolver",
            "saved",
            "settings",
            "source",
        ),
        *("step", "table", "task", "timer", "version"),
    )

    def __init__(self, name: str, source: str, make: Callable[[], Resolver], settings: tuple[object, ...], hold: float) -> None:
        self.name = name
        self.source = source
        self.make = make
        self.resolver = make()
        self.settings = settings
        self.table = Table(hold)
        self.opened: Opened | None = None
        self.asked = ""  # which registry, and what
        self.delays: Delays | None = None
        self.cache: Cache | None = None
        self.job: Job | None = None
        self.task: asyncio.Task[None] | None = None  # that follows a source which tells by itself
        self.timer: asyncio.TimerHandle | None = None
        self.version = 0  # of what the engine has
        self.changes = 0
        self.is_missing = True  # the engine has nothing yet
        self.is_dirty = False  # it could not be given what is known
        self.has_answered = False
        self.known: float | None = None  # as of when the endpoints in use were last confirmed
        self.step: int | None = None  # the version of the stream
        self.failures = 0
        self.error = ""
        self.published_at = float("-inf")
        self.saved = (-1, 0.0, 0.0)  # the version that is on disk, when it was written, and as of when it was confirmed
        self.connects = 0
        self.looked = float("-inf")
        self._touched: set[str] = set()
        self._all: tuple[EndpointAddress, ...] | None = None
        self._last: object = None  # the list of the last answer

    # ------------------------------------------------------------------ what is told

    def take(self, answer: Snapshot | Change, now: float) -> bool:
        """Into the table. False for a change of something else than what is known."""
        if isinstance(answer, Snapshot):
            # Who is asked often answers the same object as long as nothing has changed.
            is_same = self.has_answered and answer.endpoints is self._last
            self.touch(self.table.review(now) if is_same else self.table.replace(answer.endpoints, now))
            self._last = answer.endpoints
        else:
            if answer.base != self.step:
                return False
            is_same = not answer.changed and not answer.gone
            self.touch(self.table.review(now) if is_same else self.table.change(answer.changed, answer.gone, now))
            self._last = None
        self.step = answer.version
        self.has_answered = True
        if not self.table.is_holding:
            # As of when it is true, which may be long ago: a server of Consul's without its leader says so. Never of later than now.
            self.known = min(answer.taken, now) if answer.taken else now
        return True

    def touch(self, addresses: Iterable[str]) -> None:
        self._touched.update(addresses)

    @property
    def is_changed(self) -> bool:
        return bool(self._touched) or self.is_dirty or (self.is_missing and self.known is not None)

    # ------------------------------------------------------------------ what is published

    def publish(self, engine: Sink, version: int, now: float) -> None:
        """Give the engine what is different, as `version`. Raises what it raises, and then gives it all the next time."""
        touched, self._touched = self._touched, set()
        is_small = not self.is_missing and not self.is_dirty and len(touched) <= PART * max(len(self.table), 4)
        self.is_dirty = True
        self._all = None
        if is_small:
            found = [(address, self.table.find(address)) for address in touched]
            kept = self.table.kept
            changed = [_row(endpoint, address in kept) for address, endpoint in found if endpoint is not None]
            gone = [address for address, endpoint in found if endpoint is None]
            is_taken = engine.amend(self.name, self.version, version, changed, gone, now)
        else:
            is_taken = False
        if not is_taken:
            engine.resolve(self.name, version, _rows(self.table), now)
        self.version, self.is_missing, self.is_dirty = version, False, False
        self.published_at = now
        self.changes += 1

    @property
    def endpoints(self) -> tuple[EndpointAddress, ...]:
        if self._all is None:
            self._all = tuple(self.table)
        return self._all

    # ------------------------------------------------------------------ errors

    def failed(self, error: Exception) -> None:
        self.failures += 1
        text = str(error) or type(error).__name__
        if text != self.error:
            kept = "the last good endpoints are kept" if len(self.table) else "it has no endpoints yet"
            logger.warning("%s: %s gives no answer, %s: %s", self.name, self.source, kept, text)
            self.error = text

    def well(self) -> None:
        if self.error:
            logger.info("%s: %s answers again", self.name, self.source)
            self.error = ""

    def age(self, now: float) -> float | None:
        if self.source == "static":
            return 0.0
        return None if self.known is None else max(0.0, now - self.known)

    def fault(self, now: float) -> str:
        """What somebody should look at, in words; "" for nothing."""
        if self.table.is_holding:
            lost, all_of_them = len(self.table.kept), len(self.table)
            return (
                f"{self.source} has lost {lost} of {all_of_them} endpoints of {self.name} at once: "
                f"they stay in use for now, and mesh.confirm({self.name!r}) believes it"
            )
        age = self.age(now)
        if self.error and (age is None or age > SILENT):
            since = "nothing is known" if age is None else f"what is used is {age:.0f} s old"
            return f"{self.source} gives no answer about {self.name}, {since}: {self.error}"
        if self.cache is not None and self.cache.error:
            return f"what {self.source} says of {self.name} can't be kept on disk: {self.cache.error}"
        return ""

    def stats(self, now: float) -> dict[str, Any]:
        return {
            "service": self.name,
            "source": self.source,
            "endpoints": len(self.table),
            "version": self.version,
            "age": self.age(now),
            "failures": self.failures,
            "error": self.error,
            "is_ready": self.has_answered,
            "changes": self.changes,
            "is_held": self.table.is_holding,
            "kept": len(self.table.kept),
            "held": self.table.times,
            "cache_failures": 0 if self.cache is None else self.cache.failures,
        }


def _row(endpoint: EndpointAddress, is_held: bool) -> Row:
    return endpoint.address, endpoint.weight, endpoint.zone, dict(endpoint.labels), endpoint.identity, is_held


def _rows(table: Table) -> list[Row]:
    rows = []
    for endpoint in table:
        rows.append(_row(endpoint, endpoint.address in table.kept))
        if not len(rows) % SLICE:
            time.sleep(0)  # other threads have calls under way
    return rows
