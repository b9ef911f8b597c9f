"""How do many services share one watch?

A watch costs a connection of this process and a stream in etcd, so that one for each of 5,000 services is too much; a watch on
all of them brings every change of the mesh to a process that wants three services. So the registry gives the first few services
a feed of their own, and all others share one (`registry.py`); what a feed does is the same.

    a range as of R ──▶ a watch from R + 1 on, by the same connection ──▶ who began it is told of what there was, and of every event
    who joins later  ──▶ a range as of a later R, beside the watch        ──▶ events up to R are in it already

First the range: two hundred processes that come back to etcd in a few seconds cost it one connection each then, and the second one,
by which a silent watch is asked about, when all are there. A watch that is begun later than R can't be missed: R is a moment old, and if
it was compacted all the same, or etcd has lost its data since, the watch is lost and begun anew like any other. Nobody is told
anything before the watch is there, so that an etcd which answers but doesn't watch counts as one that is down.

Where many join at once, all is asked for in one range. When the watch breaks, all who are on it are told, and the next one who joins
begins a new one. When that is, is the Directory's affair.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterable
from typing import Final

from .client import Client
from .messages import UNAVAILABLE, Batch, Entry, EtcdError, Event, end_of
from .watch import EVERY, either, watch

# Who joins together with more than so many others is served by one range of everything.
MANY: Final = 8
# Services of a feed that are told "still so" in a second: it costs each of them a step.
CONFIRMED: Final = 500


class Member:
    """One service's part of a feed: what was there, and what has happened since it was last asked."""

    def __init__(self, prefix: bytes) -> None:
        self.prefix = prefix
        self._revision: int | None = None  # as of which it was told what there is
        self._entries: list[Entry] = []
        self._events: dict[bytes, Event] = {}
        self._is_confirmed = False
        self._error: EtcdError | None = None
        self._changed = asyncio.Event()

    async def begun(self) -> list[Entry]:
        """All entries as of one revision, once: they are not kept. What `next` gives comes after it."""
        while self._revision is None:
            await self._wait()
        revision, entries, self._entries = self._revision, self._entries, []
        self._events = {key: event for key, event in self._events.items() if event.revision > revision}
        return entries

    async def next(self) -> list[Event]:
        """The last event of each key since the last time; none at all if etcd has just confirmed that nothing happened."""
        while not self._events and not self._is_confirmed:
            await self._wait()
        events, self._events, self._is_confirmed = list(self._events.values()), {}, False
        return events

    async def _wait(self) -> None:
        if self._error is not None:
            raise self._error
        self._changed.clear()
        await self._changed.wait()

    # --- the feed's side

    def tell(self, event: Event) -> None:
        if self._revision is not None and event.revision <= self._revision:
            return  # the watch began before it was asked what there is
        # By key, so that a slow reader keeps no more than there are keys.
        self._events.pop(event.key, None)
        self._events[event.key] = event
        self._changed.set()

    def confirm(self) -> None:
        self._is_confirmed = True
        self._changed.set()

    def begin(self, revision: int, entries: list[Entry]) -> None:
        self._revision, self._entries = revision, entries
        self._changed.set()

    def fail(self, error: EtcdError) -> None:
        # Each its own: a traceback grows with everyone who raises it.
        self._error = type(error)(error.message, code=error.code, is_refusal=error.is_refusal)
        self._changed.set()


# A revision, and who asked what there was then.
Found = tuple[int, list[tuple[Member, list[Entry]]]]


class Feed:
    """One watch on a range of keys, and those who follow a part of it."""

    def __init__(
        self,
        client: Client,
        prefix: bytes,
        part_of: Callable[[bytes], bytes],
        *,
        every: float = EVERY,
    ) -> None:
        self.prefix = prefix
        self._client = client
        self._part_of = part_of  # the prefix of the service that a key belongs to
        self._every = every
        self._members: dict[bytes, list[Member]] = {}
        self._joining: list[Member] = []
        self._has_begun = asyncio.Event()
        self._has_joined = asyncio.Event()
        self._confirmed = 0.0
        self._found: list[Found] = []  # not handed out yet
        self._since = 0  # the revision from which on the watch is to tell
        self._task: asyncio.Task[None] | None = None

    @property
    def is_idle(self) -> bool:
        return not self._members

    def join(self, prefix: bytes) -> Member:
        """Follow all keys that begin so."""
        member = Member(prefix)
        self._members.setdefault(prefix, []).append(member)
        self._joining.append(member)
        self._has_joined.set()
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._run(), name=f"etcd {self.prefix!r}")
        return member

    async def leave(self, member: Member) -> None:
        """Follow no more. With the last one the watch ends."""
        self._forget(member)
        if self.is_idle:
            await self.close()

    async def close(self) -> None:
        task, self._task = self._task, None
        if task is not None and not task.done():
            task.cancel()
            await asyncio.wait((task,))
        if self._task is None:
            self._fail(EtcdError("the registry was closed."))

    def _forget(self, member: Member) -> None:
        there = self._members.get(member.prefix, [])
        if member in there:
            there.remove(member)
        if not there:
            self._members.pop(member.prefix, None)
        if member in self._joining:
            self._joining.remove(member)

    # ------------------------------------------------------------------ the watch

    async def _run(self) -> None:
        try:
            self._has_begun.clear()
            # Those who begin together come together.
            await asyncio.sleep(0)
            self._found = await self._asked_for(self._joined())
            self._since = min((revision for revision, _ in self._found), default=-1) + 1
            told = watch(self._client, self.prefix, end_of(self.prefix), self._told, since=self._since, every=self._every)
            await either(told, self._load())
        except EtcdError as error:
            self._fail(error)
        except Exception as error:
            # A mistake here, or a secret that can't be read: nobody may wait for what doesn't come.
            self._fail(EtcdError(f"the watch of etcd broke: {type(error).__name__}: {error}"))

    def _fail(self, error: EtcdError) -> None:
        # Whoever joins from here on gets a task of its own.
        self._task = None
        members = [member for there in self._members.values() for member in there]
        self._members.clear()
        self._joining.clear()
        self._found.clear()
        for member in members:
            member.fail(error)

    def _told(self, batch: Batch) -> None:
        if batch.is_created:
            if batch.revision < self._since - 1:
                # It would be silent until it is as old.
                raise EtcdError("etcd has lost its data since it was asked what there is.", code=UNAVAILABLE)
            self._has_begun.set()
            return
        for event in batch.events:
            for member in self._members.get(self._part_of(event.key), ()):
                member.tell(event)
        # A watch that tells of one service is alive for all others, too.
        now = time.monotonic()
        if now - self._confirmed >= 0.9 * max(self._every, len(self._members) / CONFIRMED):
            self._confirmed = now
            for there in self._members.values():
                for member in there:
                    member.confirm()

    # ------------------------------------------------------------------ what is there

    async def _load(self) -> None:
        """Tell those who began the watch, then those who join."""
        await self._has_begun.wait()
        while True:
            await self._hand_out()
            await self._has_joined.wait()
            # Those who begin together come together.
            await asyncio.sleep(0)
            self._found = await self._asked_for(self._joined())

    async def _hand_out(self) -> None:
        """To those who asked; nothing of it is kept here, where the next one may join in an hour."""
        found, self._found = self._found, []
        for revision, parts in found:
            for number, (member, entries) in enumerate(parts):
                member.begin(revision, entries)
                if number % MANY == 0:
                    await asyncio.sleep(0)  # each has something to do now, and this loop has others

    def _joined(self) -> list[Member]:
        self._has_joined.clear()
        joining, self._joining = self._joining, []
        return joining

    async def _asked_for(self, joining: list[Member]) -> list[Found]:
        if len(joining) > MANY:
            return [await self._range(self.prefix, joining)]
        found = []
        for member in joining:
            try:
                found.append(await self._range(member.prefix, [member]))
            except EtcdError as error:
                if error.code == UNAVAILABLE:
                    raise
                # Of this service only.
                self._forget(member)
                member.fail(error)
        return found

    async def _range(self, prefix: bytes, joining: Iterable[Member]) -> Found:
        parts: dict[bytes, list[Entry]] = {member.prefix: [] for member in joining}
        revision = 0
        async with contextlib.aclosing(self._client.range(prefix, end_of(prefix))) as pages:
            async for page in pages:
                revision = page.revision
                for entry in page.entries:
                    part = parts.get(self._part_of(entry.key))
                    if part is not None:
                        part.append(entry)
                await asyncio.sleep(0)
        return revision, [(member, parts[member.prefix]) for member in joining]
