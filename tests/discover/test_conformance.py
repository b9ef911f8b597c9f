"""Every resolver of meshlib's own keeps the rules of `check_resolver`; and a wrong one is found."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from meshlib.discover import Change, DnsResolver, EndpointAddress, FileResolver, Resolver, Snapshot, StaticResolver
from meshlib.testing import check_resolver
from meshlib.testing.resolver import RULES

EVERYTHING = frozenset({"weight", "zone", "labels", "identity"})
ALL = [rule.__name__ for rule in RULES]


class Base:
    """What most stages share."""

    service = "orders"
    carries: frozenset[str] = EVERYTHING

    def __init__(self) -> None:
        self.known: dict[str, EndpointAddress] = {}

    def address(self, n: int) -> str:
        return f"127.0.0.{n}:8080"

    def put(self, *endpoints: EndpointAddress) -> None:
        self.known.update((endpoint.address, endpoint) for endpoint in endpoints)
        self.write()

    def remove(self, *addresses: str) -> None:
        for address in addresses:
            del self.known[address]
        self.write()

    def write(self) -> None: ...

    def fail(self) -> None:
        raise NotImplementedError

    def mend(self) -> None:
        self.write()

    async def open(self) -> Resolver:
        raise NotImplementedError

    async def close_resolver(self) -> None: ...

    def after_fork(self) -> None: ...

    def close(self) -> None: ...


class OfAFile(Base):
    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.file = folder / "orders.json"

    def write(self) -> None:
        rows = [
            {"address": e.address, "weight": e.weight, "zone": e.zone, "labels": dict(e.labels)}
            | ({"identity": e.identity} if e.identity else {})
            for e in self.known.values()
        ]
        fresh = self.file.with_suffix(".new")
        fresh.write_text(json.dumps(rows))
        fresh.replace(self.file)

    def fail(self) -> None:
        self.file.write_text("- nonsense\n")

    async def open(self) -> Resolver:
        return FileResolver(self.service, self.file)


class OfNames(Base):
    """DNS, as the system's resolver answers it."""

    carries = frozenset()
    is_failing = False

    def fail(self) -> None:
        self.is_failing = True

    def mend(self) -> None:
        self.is_failing = False

    def lookup(self, host: str, port: int) -> list[str]:
        time.sleep(0.01)
        if self.is_failing:
            raise OSError("Name or service not known")
        return [address.rpartition(":")[0] for address in self.known]

    async def open(self) -> Resolver:
        return DnsResolver(self.service, "orders.internal:8080", lookup=self.lookup)


class OfAList(Base):
    """What is written in the configuration changes with it only."""

    def remove(self, *addresses: str) -> None:
        raise NotImplementedError

    def put(self, *endpoints: EndpointAddress) -> None:
        if self.known:
            raise NotImplementedError
        super().put(*endpoints)

    async def open(self) -> Resolver:
        return StaticResolver(self.service, self.known.values(), now=time.monotonic())


class OfAWatch(Base):
    """A registry in memory, that tells of changes."""

    def __init__(self) -> None:
        super().__init__()
        self.version = 1
        self.changed: list[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = []
        self.is_failing = False

    def write(self) -> None:
        self.version += 1
        for loop, event in tuple(self.changed):
            loop.call_soon_threadsafe(event.set)

    def fail(self) -> None:
        self.is_failing = True
        self.write()

    def mend(self) -> None:
        self.is_failing = False

    def after_fork(self) -> None:
        self.changed = []

    async def open(self) -> Resolver:
        return Watch(self)


class Watch:
    interval: float | None = None

    def __init__(self, stage: OfAWatch) -> None:
        self.stage = stage
        self.service = stage.service

    async def resolve(self) -> Snapshot:
        if self.stage.is_failing:
            raise OSError("the registry is down")
        return Snapshot(self.service, self.stage.version, tuple(self.stage.known.values()), time.monotonic())

    async def watch(self) -> AsyncIterator[Snapshot | Change]:
        mine = asyncio.get_running_loop(), asyncio.Event()
        self.stage.changed.append(mine)
        try:
            state = await self.resolve()
            yield state
            while True:
                await mine[1].wait()
                mine[1].clear()
                fresh = await self.resolve()
                change = self.between(state, fresh)
                state = fresh
                yield change
        finally:
            if mine in self.stage.changed:
                self.stage.changed.remove(mine)

    def between(self, old: Snapshot, new: Snapshot) -> Change:
        before, after = ({e.address: e for e in state.endpoints} for state in (old, new))
        changed = tuple(e for e in new.endpoints if before.get(e.address) != e)
        gone = tuple(address for address in before if address not in after)
        return Change(self.service, old.version, new.version, changed, gone, time.monotonic())


# ---------------------------------------------------------------------- good ones


def test_list_of_the_configuration_conforms() -> None:
    """It never changes and never fails, so that few rules are left."""
    assert check_resolver(OfAList) == [
        "it_tells_all_that_is_there",
        "it_says_when_to_ask_again",
        "it_leaves_nothing_behind_when_it_is_cancelled",
    ]


def test_file_conforms(tmp_path: Path) -> None:
    """All rules."""
    assert check_resolver(lambda: OfAFile(tmp_path)) == ALL


def test_dns_conforms() -> None:
    """All rules but that of what a record of DNS can't say."""
    assert check_resolver(OfNames) == [name for name in ALL if name != "it_tells_what_is_special_about_an_endpoint"]


def test_source_that_tells_by_itself_conforms() -> None:
    """All rules, with changes instead of states."""
    assert check_resolver(OfAWatch) == ALL


def test_change_need_not_say_when_it_was_learned() -> None:
    """Its default is "just now"."""

    class Plain(Watch):
        async def watch(self) -> AsyncIterator[Snapshot | Change]:
            async for answer in super().watch():
                yield dataclasses.replace(answer, taken=0.0) if isinstance(answer, Change) else answer

    class Stage(OfAWatch):
        async def open(self) -> Resolver:
            return Plain(self)

    assert check_resolver(Stage) == ALL


# ---------------------------------------------------------------------- wrong ones


def broken(change: Callable[[Watch], None]) -> Callable[[], OfAWatch]:
    """A stage whose resolvers have a fault."""

    class Broken(OfAWatch):
        async def open(self) -> Resolver:
            resolver = Watch(self)
            change(resolver)
            return resolver

    return Broken


def answers_nothing_instead_of_failing(resolver: Watch) -> None:
    async def resolve() -> Snapshot:
        endpoints = () if resolver.stage.is_failing else tuple(resolver.stage.known.values())
        return Snapshot(resolver.service, resolver.stage.version, endpoints, time.monotonic())

    resolver.resolve = resolve  # type: ignore[method-assign]


def forgets_the_gone(resolver: Watch) -> None:
    between = resolver.between

    def without(old: Snapshot, new: Snapshot) -> Change:
        change = between(old, new)
        return Change(change.service, change.base, change.version, change.changed, (), change.taken)

    resolver.between = without  # type: ignore[method-assign]


def counts_anew(resolver: Watch) -> None:
    between = resolver.between

    def wrong(old: Snapshot, new: Snapshot) -> Change:
        change = between(old, new)
        return Change(change.service, change.base + 1, change.version + 1, change.changed, change.gone, change.taken)

    resolver.between = wrong  # type: ignore[method-assign]


def blocks(resolver: Watch) -> None:
    async def resolve() -> Snapshot:
        time.sleep(0.3)  # the fault
        if resolver.stage.is_failing:
            raise OSError("the registry is down")
        return Snapshot(resolver.service, resolver.stage.version, tuple(resolver.stage.known.values()), time.monotonic())

    resolver.resolve = resolve  # type: ignore[method-assign]


def leaves_tasks(resolver: Watch) -> None:
    left: list[Any] = []
    watch = resolver.watch

    async def leaky() -> AsyncIterator[Snapshot | Change]:
        left.append(asyncio.ensure_future(asyncio.sleep(3600)))
        async for answer in watch():
            yield answer

    resolver.watch = leaky  # type: ignore[method-assign]


def is_bound_to_its_process(resolver: Watch) -> None:
    mine, resolve = os.getpid(), resolver.resolve

    async def only_here() -> Snapshot:
        if os.getpid() != mine:
            raise OSError("this connection is another process's")
        return await resolve()

    resolver.resolve = only_here  # type: ignore[method-assign]


@pytest.mark.parametrize(
    ("fault", "rule"),
    [
        (answers_nothing_instead_of_failing, "it_raises_when_it_does_not_know"),
        (forgets_the_gone, "it_tells_what_comes_and_what_goes"),
        (counts_anew, "it_tells_what_is_special_about_an_endpoint"),
        (blocks, "it_does_not_block_its_loop"),
        (leaves_tasks, "it_leaves_nothing_behind_when_it_is_cancelled"),
        (is_bound_to_its_process, "it_works_in_a_forked_child"),
    ],
)
def test_resolver_with_a_fault_breaks_its_rule(fault: Callable[[Watch], None], rule: str) -> None:
    """A check that finds nothing would be worth nothing."""
    with pytest.raises(AssertionError, match=rule):
        check_resolver(broken(fault), patience=3.0)
