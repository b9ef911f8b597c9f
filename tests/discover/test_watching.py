"""The directory follows what tells by itself, on a real keeper, and gives the engine what is different."""

from __future__ import annotations

import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from meshlib.config import load
from meshlib.discover import Change, Directory, EndpointAddress
from meshlib.discover import pace as pace_module
from meshlib.discover.entry import GATHER, Entry
from meshlib.keeper import Keeper
from tests.discover.memory import Source, System, some
from tests.discover.test_directory import Engine

HEAD = """\
mesh: shop
secure: {{mode: observe}}
registries:
  memory: {{cache: {cache}, token: {{env: SECRET}}}}
services:
  storefront: {{}}
  orders: {{discover: memory}}
"""


class World:
    """A mesh's directory with a registry in memory."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.system = System()
        self.keeper = Keeper()
        self.engine = Engine()
        self.directory = self.new()

    def new(self) -> Directory:
        return Directory(self.engine, self.keeper, open_one=self.system.open_one)

    def follow(self, more: str = "", cache: str = "false") -> None:
        file = self.folder / "mesh.yaml"
        file.write_text(HEAD.format(cache=cache) + more)
        self.directory.follow(load(file, service="storefront"))

    def begin(self, more: str = "", cache: str = "false") -> None:
        self.follow(more, cache)
        self.keeper.start()
        self.directory.start(limit=5.0)

    def addresses(self, service: str = "orders") -> list[str]:
        return sorted(self.engine.has.get(service, (0, {}))[1])

    def row(self, service: str = "orders") -> dict[str, object]:
        return next(row for row in self.directory.stats(time.monotonic()) if row["service"] == service)

    def close(self) -> None:
        self.directory.cancel()
        self.keeper.stop()


def until(is_it: Callable[[], bool], limit: float = 10.0) -> None:
    end = time.monotonic() + limit
    while not is_it():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.002)


def names(*numbers: int) -> list[str]:
    return sorted(e.address for e in some(*numbers))


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    # What takes ten seconds in the world takes half of one here.
    monkeypatch.setattr(pace_module, "LOST", ((0.0, 0.3), (0.1, 0.3)))
    monkeypatch.setattr(pace_module, "LEAST", 0.05)
    world = World(tmp_path)
    yield world
    world.close()


# ---------------------------------------------------------------------- changes


def test_first_state_is_there_when_start_returns(world: World) -> None:
    """And says that it was confirmed just now."""
    world.system.put("orders", *some(1, 2, 3))
    world.begin()
    row = world.row()
    assert (world.addresses(), row["is_ready"], row["source"]) == (names(1, 2, 3), True, "memory")
    assert isinstance(row["age"], float)
    assert row["age"] < 5.0
    assert world.directory.waiting == ()


def test_engine_knows_which_endpoints_are_only_held(world: World) -> None:
    """Those that the registry doesn't tell any more, from the first of them on, and until it tells them again."""

    def held() -> list[str]:
        return sorted(row[0] for row in world.engine.has["orders"][1].values() if row[5])

    world.system.put("orders", *some(*range(1, 9)))
    world.begin()
    assert held() == []
    world.system.remove("orders", *names(1, 2, 3, 4, 5))
    until(lambda: held() == names(1, 2, 3, 4, 5))
    world.system.remove("orders", *names(6))
    until(lambda: held() == names(1, 2, 3, 4, 5, 6))
    world.system.put("orders", *some(2))
    until(lambda: held() == names(1, 3, 4, 5, 6))
    assert world.addresses() == names(*range(1, 9))
    assert world.directory.confirm("orders")
    assert (world.addresses(), held()) == (names(2, 7, 8), [])


def test_age_is_that_of_the_answer(world: World) -> None:
    """Not of its arrival: a copy tells as of when it was true. What comes from the future, or doesn't tell, is as of now."""

    def age() -> float:
        found = world.row()["age"]
        assert isinstance(found, float)
        return found

    world.system.stale = 3600.0
    world.system.put("orders", *some(1, 2))
    world.begin()
    assert 3600.0 <= age() < 3605.0
    for number, (stale, least) in enumerate([(60.0, 60.0), (-60.0, 0.0), (7200.0, 7200.0), (None, 0.0)], 3):
        world.system.stale = stale
        world.system.put("orders", *some(number))
        until(lambda: f"10.0.0.{number}:80" in world.addresses())
        assert least <= age() < least + 5.0


def test_changes_reach_the_engine_as_amendments(world: World) -> None:
    """What comes, what is different and what goes; never all of it again."""
    world.system.put("orders", *some(*range(1, 40)))
    world.begin()
    heavy = EndpointAddress("10.0.0.3:80", weight=7.0)
    world.system.put("orders", *some(40), heavy)
    until(lambda: "10.0.0.40:80" in world.addresses())
    world.system.remove("orders", "10.0.0.1:80")
    until(lambda: "10.0.0.1:80" not in world.addresses())
    assert world.engine.has["orders"][1]["10.0.0.3:80"][1] == 7.0
    assert world.engine.amendments == len(world.engine.taken) - 1


def test_many_changes_are_few_amendments(world: World) -> None:
    """A burst is gathered for 20 ms; the last word about an endpoint counts."""
    world.system.put("orders", *some(*range(1, 100)))
    world.begin()
    begun = time.monotonic()
    for n in range(100, 200):
        world.system.put("orders", *some(n))
        time.sleep(0.002)
    until(lambda: len(world.addresses()) == 199)
    took = time.monotonic() - begun
    assert world.engine.amendments <= took / 0.02 + 2


def test_removal_is_published_at_once(world: World) -> None:
    """Not even the gathering is waited for, if nothing was published just before."""
    world.system.put("orders", *some(*range(1, 40)))
    world.begin()
    time.sleep(0.05)
    slowest = 0.0
    for n in range(1, 15):
        begun = time.monotonic()
        world.system.remove("orders", f"10.0.0.{n}:80")
        until(lambda n=n: f"10.0.0.{n}:80" not in world.addresses())  # type: ignore[misc]
        slowest = max(slowest, time.monotonic() - begun)
        time.sleep(0.03)
    assert slowest < 0.1


def test_addition_that_comes_alone_is_published_at_once(world: World) -> None:
    """It may be the only endpoint; what is gathered is what comes right after a publication."""
    world.system.put("orders", *some(*range(1, 40)))
    world.begin()
    took = []
    for n in range(40, 52):
        time.sleep(0.03)
        begun = time.monotonic()
        world.system.put("orders", *some(n))
        until(lambda n=n: f"10.0.0.{n}:80" in world.addresses())  # type: ignore[misc]
        took.append(time.monotonic() - begun)
    assert min(took) < GATHER


def test_engine_that_has_another_version_is_given_everything(world: World) -> None:
    """A plan without the service came and went: an amendment would be one of nothing."""
    world.system.put("orders", *some(*range(1, 40)))
    world.begin()
    world.engine.has["orders"] = (0, {})
    world.system.put("orders", *some(41))
    until(lambda: len(world.addresses()) == 40)


def test_change_that_does_not_fit_begins_the_stream_anew(world: World) -> None:
    """One was lost: nothing is guessed, and a whole state comes soon."""
    world.system.put("orders", *some(1, 2, 3, 4, 5))
    world.begin()
    resolver = world.directory._entries["orders"].resolver
    assert isinstance(resolver, Source)

    def skip(change: Change) -> Change:
        resolver.twist = lambda change: change
        return Change(change.service, change.base + 1, change.version, change.changed, (), change.taken)

    resolver.twist = skip
    world.system.put("orders", *some(6))
    until(lambda: world.addresses() == names(1, 2, 3, 4, 5, 6), 2.0)
    assert len(world.system.tries) == 2


# ---------------------------------------------------------------------- trouble


def test_registry_that_is_down_keeps_what_is_known(world: World, caplog: pytest.LogCaptureFixture) -> None:
    """It is told once, the age grows, and after it all is as the registry says then."""
    world.system.put("orders", *some(1, 2))
    world.begin()
    with caplog.at_level(logging.INFO, logger="meshlib.discover"):
        world.system.down()
        until(lambda: world.row()["failures"] == 4)
        assert (world.addresses(), world.row()["error"]) == (names(1, 2), "the registry is down")
        world.system.put("orders", *some(3))
        world.system.down(False)
        until(lambda: world.addresses() == names(1, 2, 3))
    lines = [record.levelname for record in caplog.records if "gives no answer" in record.message or "again" in record.message]
    assert lines == ["WARNING", "INFO"]


def test_single_losses_are_held_and_may_be_confirmed(world: World, caplog: pytest.LogCaptureFixture) -> None:
    """R14, one endpoint after the other: an alarm, and what is left is kept until somebody says that it is right."""
    world.system.put("orders", *some(*range(1, 11)))
    world.begin()
    for n in range(1, 10):
        world.system.remove("orders", f"10.0.0.{n}:80")
        time.sleep(0.005)
    until(lambda: world.row()["kept"] == 4)
    assert (len(world.addresses()), world.row()["is_held"], world.row()["held"]) == (5, True, 1)
    assert [record.levelname for record in caplog.records if "leaves" in record.message] == ["ERROR"]
    fault = world.directory.faults(time.monotonic())["orders"]
    assert "has lost 4 of 5 endpoints" in fault and "mesh.confirm('orders')" in fault
    assert world.directory.confirm("orders")
    assert not world.directory.faults(time.monotonic())
    assert world.addresses() == names(10)
    assert not world.directory.confirm("orders")


def test_long_silence_is_a_fault_and_a_short_one_is_none(world: World) -> None:
    """A registry that is started anew is nobody's trouble; one that stays away is, with the age of what is used."""
    world.system.put("orders", *some(1))
    world.begin()
    world.system.down()
    until(lambda: bool(world.row()["error"]))
    now = time.monotonic()
    assert not world.directory.faults(now)
    fault = world.directory.faults(now + 3600.0)["orders"]
    assert "gives no answer about orders, what is used is 360" in fault and fault.endswith(str(world.row()["error"]))


def test_silent_stream_says_that_it_is_still_so(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss is believed when its time is over, though nothing more was said."""
    world.system.put("orders", *some(1, 2, 3, 4))
    world.begin()
    world.directory._entries["orders"].table.seconds = 0.5
    world.system.remove("orders", *names(1, 2, 3))
    until(lambda: bool(world.row()["is_held"]))
    until(lambda: world.addresses() == names(4), 5.0)
    assert not world.row()["is_held"]


# ---------------------------------------------------------------------- life


def test_services_share_one_registry_across_reloads(world: World) -> None:
    """As long as its settings are the same; then the old one is closed."""
    stock = "  stock: {discover: {registry: memory, name: other}}\n"
    world.system.put("orders", *some(1))
    world.system.put("other", *some(2))
    world.begin(stock)
    assert (world.addresses("stock"), len(world.system.opened), world.system.watches) == (names(2), 1, 2)
    world.follow()
    until(lambda: world.system.watches == 1)
    world.follow(stock)
    until(lambda: world.system.watches == 2)
    assert (len(world.system.opened), world.system.opened[0].closed) == (1, 0)
    assert world.system.opened[0].settings == {"token": {"env": "SECRET"}}
    world.follow(cache="true")
    until(lambda: world.system.opened[0].closed == 1)
    assert len(world.system.opened) == 2
    until(lambda: world.system.watches == 1)


class Interrupted(dict[str, Entry]):
    """Entries between whose reading and use another thread does something, once."""

    meanwhile: Callable[[], object] | None = None

    def values(self) -> Any:
        found, work, self.meanwhile = list(super().values()), self.meanwhile, None
        if work is not None:
            thread = threading.Thread(target=work)
            thread.start()
            thread.join()
        return found


@pytest.mark.parametrize(("is_reload", "left"), [(True, 1), (False, 0)])
def test_entry_that_is_gone_is_not_followed_again(world: World, is_reload: bool, left: int) -> None:
    """A reload or the end comes while the keeper looks who is to be followed: nothing is begun on a registry that is closed."""
    world.system.put("orders", *some(1))
    world.begin()
    entries = Interrupted(world.directory._entries)
    world.directory._entries = entries

    async def look() -> None:
        entries.meanwhile = (lambda: world.follow(cache="true")) if is_reload else world.directory.cancel
        await world.directory._follow_all()

    world.keeper.run(look()).result(10)
    until(lambda: world.system.opened[0].closed == 1)
    time.sleep(0.3)
    assert world.system.watches == left
    assert [entry.task for entry in entries.values()] == [None]


def test_end_leaves_no_watch_and_start_may_follow(world: World) -> None:
    """`cancel` ends the tasks and closes the registry; `start` begins with a new one."""
    world.system.put("orders", *some(1))
    world.begin()
    world.directory.cancel()
    until(lambda: world.system.watches == 0 and world.system.opened[0].closed == 1)
    assert world.keeper.jobs == ()
    world.system.put("orders", *some(2))
    world.directory.start(limit=5.0)
    until(lambda: world.addresses() == names(1, 2))
    assert len(world.system.opened) == 2


def test_forked_child_watches_anew(world: World) -> None:
    """The parent's tasks are the parent's; the child hears of changes by its own, and the parent goes on."""
    world.system.put("orders", *some(1))
    world.begin()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            world.keeper.start()
            world.system.put("orders", *some(2))
            until(lambda: world.addresses() == names(1, 2), 8.0)
            status = 0 if world.system.opened[0].forks == 1 else 2
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    world.system.put("orders", *some(3))
    until(lambda: world.addresses() == names(1, 3))
    assert world.system.opened[0].forks == 0


# ---------------------------------------------------------------------- on disk


def test_process_starts_while_the_registry_is_down(world: World, caplog: pytest.LogCaptureFixture) -> None:
    """With what it said last, whose age is told; and what it says then counts."""
    world.system.put("orders", *some(1, 2))
    world.begin(cache="true")
    until(lambda: any((world.folder / ".meshlib/endpoints").glob("shop.orders.json")), 5.0)
    world.close()
    kept = world.folder / ".meshlib/endpoints/shop.orders.json"
    assert kept.stat().st_mode & 0o777 == 0o600
    then = time.time() - 100.0
    os.utime(kept, (then, then))
    world.system.down()
    world.engine = Engine()
    world.directory = world.new()
    begun = time.monotonic()
    world.begin(cache="true")
    age = world.row()["age"]
    assert isinstance(age, float)
    assert (world.addresses(), world.row()["is_ready"], 99.0 < age < 110.0) == (names(1, 2), False, True)
    assert time.monotonic() - begun < 2.0
    assert "kept on disk" in caplog.text
    world.system.remove("orders", *names(1))
    world.system.down(False)
    until(lambda: world.addresses() == names(2))
    assert world.row()["is_ready"] is True


def begin_again(world: World, age: float) -> None:
    """Another process, so many seconds after the end of this one: with what was kept, and a registry that tells what it has now."""
    kept = world.folder / ".meshlib/endpoints/shop.orders.json"
    until(kept.exists)
    world.close()
    then = time.time() - age
    os.utime(kept, (then, then))
    world.engine = Engine()
    world.directory = world.new()


def test_process_that_was_down_for_long_begins_with_what_is_there_now(world: World) -> None:
    """Ten were kept, and three of them are left: the others are no loss, and `start` waits for the registry's own word."""
    world.system.put("orders", *some(*range(1, 11)))
    world.begin(cache="true")
    world.system.known["orders"] = {e.address: e for e in some(1, 2, 3)}
    begin_again(world, 8 * 3600.0)
    world.begin(cache="true")
    row = world.row()
    assert (world.addresses(), row["is_held"], row["is_ready"]) == (names(1, 2, 3), False, True)


def test_process_that_was_down_for_a_moment_judges_by_what_it_knew(world: World) -> None:
    """Also an answer of its registry: one that leaves three of ten is held back as if it had run on."""
    world.system.put("orders", *some(*range(1, 11)))
    world.begin(cache="true")
    world.system.known["orders"] = {e.address: e for e in some(1, 2, 3)}
    begin_again(world, 10.0)
    world.begin(cache="true")
    until(lambda: world.row()["is_ready"] is True)
    assert (world.addresses(), world.row()["is_held"]) == (names(*range(1, 11)), True)


def test_empty_registry_is_held_back_however_old_the_file_is(world: World) -> None:
    """It may have lost its data: those of eight hours ago are better than nobody."""
    world.system.put("orders", *some(1, 2, 3))
    world.begin(cache="true")
    world.system.known["orders"] = {}
    begin_again(world, 8 * 3600.0)
    world.begin(cache="true")
    assert (world.addresses(), world.row()["is_held"]) == (names(1, 2, 3), True)


def test_start_waits_no_longer_for_a_registry_that_is_down(world: World) -> None:
    """Then an old file serves as well as it can."""
    world.system.put("orders", *some(1, 2))
    world.begin(cache="true")
    begin_again(world, 8 * 3600.0)
    world.system.down()
    world.follow(cache="true")
    world.keeper.start()
    begun = time.monotonic()
    world.directory.start(limit=0.5)
    assert 0.4 < time.monotonic() - begun < 3.0
    assert world.addresses() == names(1, 2)


def test_file_that_was_cleared_away_is_written_anew(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Also while nothing changes but its age, and without an alarm."""
    monkeypatch.setattr("meshlib.discover.directory.SAVE", 0.2)
    kept = world.folder / ".meshlib/endpoints/shop.orders.json"
    world.system.put("orders", *some(1, 2))
    world.begin(cache="true")
    until(kept.exists)
    ways: list[Callable[[], object]] = [kept.unlink, lambda: shutil.rmtree(kept.parent)]
    for clear in ways:
        clear()
        end = time.monotonic() + 10.0
        while not kept.exists():
            assert time.monotonic() < end, "it was not written"
            world.system._tell("orders")  # it still holds
            time.sleep(0.1)
    assert (world.row()["cache_failures"], world.directory.faults(time.monotonic())) == (0, {})
    assert "can't be kept" not in caplog.text


def test_development_neither_recalls_nor_keeps(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """What an ordinary run has kept is not on this machine; and what is, is nothing for an ordinary run."""
    world.system.put("orders", *some(1, 2))
    world.begin(cache="true")
    begin_again(world, 10.0)
    kept = world.folder / ".meshlib/endpoints/shop.orders.json"
    kept.rename(before := world.folder / "before")
    kept.write_bytes(before.read_bytes())
    kept.chmod(0o600)
    monkeypatch.setenv("MESHLIB_DEV", str(world.folder / "dev"))
    monkeypatch.setattr("meshlib.discover.directory.SAVE", 0.0)
    world.system.known["orders"] = {"127.0.0.1:80": EndpointAddress("127.0.0.1:80")}
    world.follow(cache="true")
    assert world.addresses() == []
    world.keeper.start()
    world.directory.start(limit=5.0)
    assert world.addresses() == ["127.0.0.1:80"]
    time.sleep(1.5)
    assert kept.read_bytes() == before.read_bytes()


# ---------------------------------------------------------------------- other settings


def test_endpoints_of_another_question_are_not_recalled(world: World) -> None:
    """What was kept for `name: blue` are no endpoints of `name: green`, and must not be held on to as if they were lost."""
    world.system.put("blue", *some(*range(1, 11)))
    world.system.put("green", *some(21, 22))
    blue, green = (f"  orders: {{discover: {{registry: memory, name: {name}}}}}\n" for name in ("blue", "green"))
    document = HEAD.replace("  orders: {{discover: memory}}\n", "").format(cache="true")
    file = world.folder / "mesh.yaml"
    file.write_text(document + blue)
    world.directory.follow(load(file, service="storefront"))
    world.keeper.start()
    world.directory.start(limit=5.0)
    until(lambda: (world.folder / ".meshlib/endpoints/shop.orders.json").exists())
    file.write_text(document + green)
    world.directory.follow(load(file, service="storefront"))
    until(lambda: world.addresses() == names(21, 22))
    assert world.row()["held"] == 0


@pytest.mark.parametrize(
    ("before", "after", "is_recalled"),
    [
        ("url: blue", "url: blue", True),
        ("url: blue", "url: green", False),
        ("password: {env: OLD}", "password: {env: NEW}", True),
    ],
)
def test_word_of_another_registry_is_not_recalled(world: World, before: str, after: str, is_recalled: bool) -> None:
    """Two registries of one name are two; where its secret is kept makes no other one of it."""
    world.system.put("orders", *some(1, 2))
    world.begin(cache=f"true, {before}")
    until(lambda: (world.folder / ".meshlib/endpoints/shop.orders.json").exists())
    world.close()
    world.system.down()
    world.engine = Engine()
    world.directory = world.new()
    world.follow(cache=f"true, {after}")
    assert world.addresses() == (names(1, 2) if is_recalled else [])


def test_registry_that_is_opened_anew_is_judged_by_what_was_known(world: World) -> None:
    """Nothing is kept on disk here: an empty answer after a reload is no better founded than one before it."""
    world.system.put("orders", *some(*range(1, 11)))
    world.begin()
    world.system.known["orders"].clear()
    file = world.folder / "mesh.yaml"
    file.write_text(HEAD.format(cache="false").replace("SECRET", "OTHER"))
    world.directory.follow(load(file, service="storefront"))
    until(lambda: world.row()["is_ready"] is True)
    assert (world.addresses(), world.row()["is_held"]) == (names(*range(1, 11)), True)


def test_other_registry_is_not_judged_by_what_the_one_before_said(world: World) -> None:
    """The same name and package, and another address: its three are not seven that are lost."""
    blue, green = System(), System()
    blue.put("orders", *some(*range(1, 11)))
    green.put("orders", *some(101, 102, 103))

    def open_one(plugin: str, settings: Mapping[str, Any]) -> Any:
        return (blue if settings["url"] == "http://blue" else green).open_one(plugin, settings)

    world.directory = Directory(world.engine, world.keeper, open_one=open_one)
    world.begin(cache="false, url: 'http://blue'")
    assert world.addresses() == names(*range(1, 11))
    world.follow(cache="false, url: 'http://green'")
    until(lambda: world.row()["is_ready"] is True)
    assert (world.addresses(), world.row()["held"]) == (names(101, 102, 103), 0)


# ---------------------------------------------------------------------- what must go on


def test_disk_that_hangs_holds_up_nothing_else(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """A loss is believed in time, though nobody can write it down."""
    is_over = threading.Event()
    monkeypatch.setattr("meshlib.discover.cache.Cache.write", lambda *_: is_over.wait(30.0))
    try:
        world.system.put("orders", *some(*range(1, 11)))
        world.begin(cache="true")
        world.directory._entries["orders"].table.seconds = 0.5
        time.sleep(1.5)
        world.system.remove("orders", *names(*range(2, 11)))
        until(lambda: world.row()["is_held"] is True)
        until(lambda: world.addresses() == names(1), 5.0)
    finally:
        is_over.set()


def test_outage_is_no_confirmation_of_a_loss(world: World) -> None:
    """The registry loses its data, is down for longer than losses are held, and comes back as empty as it was."""
    world.system.put("orders", *some(*range(1, 11)))
    world.begin()
    world.directory._entries["orders"].table.seconds = 3.0
    world.system.remove("orders", *names(*range(1, 11)))
    until(lambda: world.row()["is_held"] is True)
    world.system.down()
    time.sleep(4.5)
    world.system.down(False)
    until(lambda: world.row()["error"] == "")
    assert (world.addresses(), world.row()["is_held"]) == (names(*range(1, 11)), True)
    until(lambda: world.addresses() == [], 6.0)
