"""The directory keeps the engine supplied, whatever its sources do."""

from __future__ import annotations

import logging
import random
import socket
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest

from meshlib._native import core
from meshlib.config import Config, load
from meshlib.discover import Directory
from meshlib.discover.directory import Row
from meshlib.errors import ConfigError
from meshlib.keeper import Keeper

HEAD = """\
mesh: shop
secure: {mode: observe}
services:
  storefront: {}
"""


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Engine:
    """Takes what the real engine takes, and remembers it."""

    def __init__(self) -> None:
        self.taken: list[tuple[str, int, list[str]]] = []
        self.rows: list[Row] = []

        self.has: dict[str, tuple[int, dict[str, Row]]] = {}
        self.amendments = 0
        self.refused = 0

    def resolve(self, service: str, version: int, endpoints: Sequence[Row], now: float) -> None:
        self.has[service] = version, {row[0]: row for row in endpoints}
        self._note(service)

    def amend(self, service: str, base: int, version: int, changed: Sequence[Row], gone: Sequence[str], now: float) -> bool:
        known, rows = self.has.get(service, (0, {}))
        if base != known:
            return False
        self.amendments += 1
        self.has[service] = version, {a: row for a, row in rows.items() if a not in gone} | {row[0]: row for row in changed}
        self._note(service)
        return True

    def unreachable(self, service: str) -> int:
        return self.refused

    def _note(self, service: str) -> None:
        version, rows = self.has[service]
        self.taken.append((service, version, sorted(rows)))
        self.rows = list(rows.values())


class Names:
    """A DNS that answers what a test says."""

    def __init__(self, *addresses: str) -> None:
        self.answer: list[str] | OSError = list(addresses)

    def __call__(self, host: str, port: int) -> list[str]:
        if isinstance(self.answer, OSError):
            raise self.answer
        return self.answer


class World:
    """A directory under a virtual clock, whose keeper is run by hand."""

    def __init__(self, folder: Path, names: Names | None = None) -> None:
        self.folder = folder
        self.clock = Clock()
        self.engine = Engine()
        self.keeper = Keeper(clock=self.clock, source=random.Random(7))
        self.directory = Directory(self.engine, self.keeper, clock=self.clock, lookup=names or Names())

    def follow(self, services: str) -> None:
        self.directory.follow(config(self.folder, services))

    def keep(self) -> None:
        """`start`, without the wait for DNS that needs a thread."""
        self.directory._is_started = True
        self.directory._begin(self.directory._entries, first=0.0)
        self.keeper.tick(self.clock.now)

    def after(self, seconds: float) -> None:
        self.clock.now += seconds
        self.keeper.tick(self.clock.now)

    def row(self, service: str) -> dict[str, object]:
        return next(row for row in self.directory.stats(self.clock.now) if row["service"] == service)


def config(folder: Path, services: str) -> Config:
    file = folder / "mesh.yaml"
    file.write_text(HEAD + services)
    return load(file, service="storefront")


STATIC = '  orders: {discover: {static: ["127.0.0.1:1", "127.0.0.1:2"]}}\n'
FILE = "  orders: {discover: {file: orders.yaml}}\n"
DNS = '  orders: {discover: {dns: "orders.internal:80", every: 5}}\n'


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


# ---------------------------------------------------------------------- at the start


def test_static_endpoints_are_there_when_follow_returns(world: World) -> None:
    """What is written in the configuration needs no thread and no wait."""
    world.follow(
        '  orders: {discover: {static: ["127.0.0.1:1", {address: "127.0.0.1:2", labels: {version: v2}, zone: a, '
        'weight: 3, identity: "spiffe://shop.internal/x"}]}}\n'
    )
    assert world.engine.rows == [
        ("127.0.0.1:1", 1.0, "", {}, "", False),
        ("127.0.0.1:2", 3.0, "a", {"version": "v2"}, "spiffe://shop.internal/x", False),
    ]
    assert world.row("orders")["age"] == 0.0


def test_real_engine_takes_what_the_directory_gives(tmp_path: Path) -> None:
    """The native engine, whose plan comes first, picks an endpoint of the list."""
    engine = core.Engine(1)
    found = config(tmp_path, STATIC)
    engine.publish(found.client_plan(), 0.0)
    Directory(engine, Keeper(), clock=Clock()).follow(found)
    step = engine.begin("orders", "GET", "/", [], 1.0).next(1.0)
    assert step[2] in ("127.0.0.1:1", "127.0.0.1:2")


def test_wrong_files_stop_the_start_with_all_their_problems(world: World) -> None:
    """Two files with a mistake each make one error with both, and nothing is published."""
    (world.folder / "orders.yaml").write_text("- nonsense\n")
    (world.folder / "stock.yaml").write_text('- "127.0.0.1:1"\n- {adress: x}\n')
    with pytest.raises(ConfigError) as caught:
        world.follow(FILE + "  stock: {discover: {file: stock.yaml}}\n")
    assert {Path(problem.file).name for problem in caught.value.problems} == {"orders.yaml", "stock.yaml"}
    assert world.engine.taken == []


def test_file_that_is_not_there_yet_is_waited_for(world: World, caplog: pytest.LogCaptureFixture) -> None:
    """A deployment may write it later: it's logged, and taken when it comes."""
    with caplog.at_level(logging.WARNING, logger="meshlib.discover"):
        world.follow(FILE)
    assert "has no endpoints yet" in caplog.text
    world.keep()
    (world.folder / "orders.yaml").write_text('- "127.0.0.1:1"\n')
    world.after(1.2)
    assert world.engine.taken == [("orders", 1, ["127.0.0.1:1"])]


def test_start_waits_for_the_first_answers_of_dns(tmp_path: Path) -> None:
    """When `start` returns, the names are resolved, by a thread of the keeper's."""
    engine, keeper = Engine(), Keeper()
    directory = Directory(engine, keeper, lookup=Names("10.0.0.1"))
    directory.follow(config(tmp_path, DNS))
    assert engine.taken == []
    try:
        directory.start(limit=30.0)
        assert engine.taken == [("orders", 1, ["10.0.0.1:80"])]
    finally:
        directory.cancel()
        keeper.stop()
    assert keeper.jobs == ()


def test_start_does_not_wait_for_dns_longer_than_its_limit(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A name that takes too long is named in the log, and published when it comes."""
    engine, keeper, may_answer = Engine(), Keeper(), threading.Event()

    def slow(host: str, port: int) -> list[str]:
        may_answer.wait(30)
        return ["10.0.0.1"]

    published = threading.Event()
    resolve = engine.resolve

    def note(*args: object) -> None:
        resolve(*args)  # type: ignore[arg-type]
        published.set()

    engine.resolve = note  # type: ignore[method-assign]
    directory = Directory(engine, keeper, lookup=slow)
    directory.follow(config(tmp_path, DNS))
    try:
        with caplog.at_level(logging.WARNING, logger="meshlib.discover"):
            directory.start(limit=0.01)
        assert "for orders: started without" in caplog.text
        assert engine.taken == []
        may_answer.set()
        assert published.wait(20)
    finally:
        directory.cancel()
        keeper.stop()


# ---------------------------------------------------------------------- as time goes by


def test_changed_file_is_published_and_an_unchanged_one_is_not(world: World) -> None:
    """One version for each change; each look makes the knowledge young again."""
    file = world.folder / "orders.yaml"
    file.write_text('- "127.0.0.1:1"\n')
    world.follow(FILE)
    world.keep()
    world.after(1.2)
    file.write_text('- "127.0.0.1:1"\n- "127.0.0.1:2"\n')
    world.after(1.2)
    assert world.engine.taken == [("orders", 1, ["127.0.0.1:1"]), ("orders", 2, ["127.0.0.1:1", "127.0.0.1:2"])]
    assert world.row("orders")["age"] == 0.0


def test_broken_file_keeps_the_last_good_and_is_logged_once(world: World, caplog: pytest.LogCaptureFixture) -> None:
    """An error is counted at each look, logged when it changes, and its end is logged."""
    file = world.folder / "orders.yaml"
    file.write_text('- "127.0.0.1:1"\n')
    world.follow(FILE)
    world.keep()
    with caplog.at_level(logging.INFO, logger="meshlib.discover"):
        file.write_text("- nonsense\n")
        for _ in range(3):
            world.after(1.2)
        row = world.row("orders")
        file.write_text('- "127.0.0.1:1"\n')
        world.after(1.2)
    assert (row["failures"], row["endpoints"], row["age"]) == (3, 1, pytest.approx(3.6))
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]
    assert len(world.engine.taken) == 1
    assert (world.row("orders")["error"], world.row("orders")["age"]) == ("", 0.0)


def test_emptied_file_is_believed_at_once(world: World) -> None:
    """A person wrote it: a file is never held back."""
    file = world.folder / "orders.yaml"
    file.write_text("".join(f'- "127.0.0.1:{n}"\n' for n in range(1, 9)))
    world.follow(FILE)
    world.keep()
    file.write_text("[]\n")
    world.after(1.2)
    assert world.engine.taken[-1] == ("orders", 2, [])


def test_dns_that_fails_keeps_the_last_addresses(tmp_path: Path) -> None:
    """NXDOMAIN for ten minutes: nothing is taken away, and the age tells."""
    names = Names("10.0.0.1", "10.0.0.2")
    world = World(tmp_path, names)
    world.follow(DNS)
    world.keep()
    names.answer = socket.gaierror(socket.EAI_NONAME, "Name or service not known")
    for _ in range(100):
        world.after(6.0)
    row = world.row("orders")
    assert len(world.engine.taken) == 1
    assert (row["endpoints"], row["age"], row["failures"]) == (2, 600.0, 100)


def test_dns_that_loses_most_is_held_back_for_five_minutes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """R14: the loss is an alarm, counted, and believed after 300 s of the same verdict."""
    names = Names(*(f"10.0.0.{n}" for n in range(1, 5)))
    world = World(tmp_path, names)
    world.follow(DNS)
    world.keep()
    names.answer = ["10.0.0.1"]
    with caplog.at_level(logging.ERROR, logger="meshlib.discover"):
        world.after(6.0)
        for _ in range(49):
            world.after(6.0)
    row = world.row("orders")
    assert (row["is_held"], row["held"], row["endpoints"], row["age"]) == (True, 1, 4, 300.0)
    assert [record.levelname for record in caplog.records] == ["ERROR"]
    assert "leaves 1 of 4 endpoints" in caplog.text
    world.after(6.0)
    assert world.engine.taken[-1] == ("orders", 3, ["10.0.0.1:80"])
    assert (world.row("orders")["is_held"], world.row("orders")["age"]) == (False, 0.0)


def test_connects_that_fail_make_dns_be_asked_soon_but_not_often(tmp_path: Path) -> None:
    """R38: the next look is a second away, not five; a thousand failures a second are one look a second."""
    names = Names("10.0.0.1")
    world = World(tmp_path, names)
    world.follow(DNS)
    world.keep()
    looks = 0
    lookup = names.__call__

    def counted(host: str, port: int) -> list[str]:
        nonlocal looks
        looks += 1
        return lookup(host, port)

    world.directory._entries["orders"].resolver._lookup = counted  # type: ignore[attr-defined]
    names.answer = ["10.0.0.2"]
    world.after(1.0)
    assert looks == 0
    world.engine.refused = 5
    world.after(1.0)
    world.after(0.0)
    assert (looks, world.engine.taken[-1]) == (1, ("orders", 2, ["10.0.0.2:80"]))
    world.after(1.0)
    world.after(0.0)
    assert looks == 1
    for _ in range(40):
        world.engine.refused += 100
        world.after(0.25)
    assert looks <= 11


def test_confirmed_loss_is_believed_at_once(tmp_path: Path) -> None:
    """Somebody who knows that it is true need not wait; where nothing is held there is nothing to confirm."""
    names = Names(*(f"10.0.0.{n}" for n in range(1, 5)))
    world = World(tmp_path, names)
    world.follow(DNS)
    world.keep()
    assert world.directory.confirm("orders") is False
    names.answer = ["10.0.0.1"]
    world.after(6.0)
    assert world.directory.confirm("orders") is True
    world.after(0.0)
    assert world.engine.taken[-1] == ("orders", 3, ["10.0.0.1:80"])


def test_engine_that_refuses_does_not_end_the_looks(world: World) -> None:
    """What goes wrong while publishing is an error of that service, tried again at the next look."""
    file = world.folder / "orders.yaml"
    file.write_text('- "127.0.0.1:1"\n')
    world.follow(FILE)
    world.keep()
    works = world.engine.resolve

    def fails(*args: object) -> None:
        raise RuntimeError("no")

    world.engine.resolve = fails  # type: ignore[method-assign, assignment]
    file.write_text('- "127.0.0.1:2"\n')
    world.after(1.2)
    assert world.row("orders")["failures"] == 1
    world.engine.resolve = works  # type: ignore[method-assign]
    world.after(1.2)
    assert world.engine.taken[-1] == ("orders", 2, ["127.0.0.1:2"])


# ---------------------------------------------------------------------- another configuration


def test_new_configuration_changes_only_what_changed(world: World) -> None:
    """A service whose `discover` is as before is not published again; versions rise across configurations."""
    world.follow(STATIC + '  stock: {discover: {static: ["127.0.0.1:5"]}}\n')
    world.engine.taken.clear()
    world.follow(STATIC + '  stock: {discover: {static: ["127.0.0.1:6"]}}\n')
    assert world.engine.taken == [("stock", 2, ["127.0.0.1:6"])]
    world.follow(STATIC)
    world.follow(STATIC + '  stock: {discover: {static: ["127.0.0.1:6"]}}\n')
    assert world.engine.taken[-1] == ("stock", 3, ["127.0.0.1:6"])


def test_service_may_change_its_source_while_running(world: World) -> None:
    """From a file to a list: the old job is gone, the new endpoints are there."""
    (world.folder / "orders.yaml").write_text('- "127.0.0.1:9"\n')
    world.follow(FILE)
    world.keep()
    assert len(world.keeper.jobs) == 1
    world.follow(STATIC)
    assert world.keeper.jobs == ()
    assert world.engine.taken[-1] == ("orders", 2, ["127.0.0.1:1", "127.0.0.1:2"])
    world.follow(FILE)
    assert [job.name for job in world.keeper.jobs] == ["discover orders"]


def test_answer_that_comes_after_its_question_was_withdrawn_is_dropped(tmp_path: Path) -> None:
    """A lookup of the old configuration ends under the new one: the new endpoints stay."""
    names = Names("10.0.0.1")
    world = World(tmp_path, names)
    world.follow(DNS)

    def meanwhile(host: str, port: int) -> list[str]:
        world.follow(STATIC)
        return ["10.0.0.1"]

    world.directory._entries["orders"].resolver._lookup = meanwhile  # type: ignore[attr-defined]
    world.keep()
    assert world.engine.taken == [("orders", 1, ["127.0.0.1:1", "127.0.0.1:2"])]


def test_configuration_with_a_wrong_file_changes_nothing(world: World) -> None:
    """What can't be used is refused as a whole; the old services are still looked at."""
    (world.folder / "orders.yaml").write_text('- "127.0.0.1:1"\n')
    world.follow(FILE)
    world.keep()
    (world.folder / "bad.yaml").write_text("- nonsense\n")
    with pytest.raises(ConfigError):
        world.follow('  stock: {discover: {file: bad.yaml}}\n  orders: {discover: {static: ["127.0.0.1:7"]}}\n')
    assert [row["service"] for row in world.directory.stats(0.0)] == ["orders"]
    (world.folder / "orders.yaml").write_text('- "127.0.0.1:2"\n')
    world.after(1.2)
    assert world.engine.taken == [("orders", 1, ["127.0.0.1:1"]), ("orders", 2, ["127.0.0.1:2"])]


def test_real_engine_keeps_its_endpoints_over_a_new_plan(tmp_path: Path) -> None:
    """After a reload that leaves `discover` alone, calls still find an endpoint."""
    engine = core.Engine(1)
    directory = Directory(engine, Keeper(), clock=Clock())
    for deadline in (5, 6):
        found = config(tmp_path, STATIC.replace("{discover", f"{{deadline: {deadline}, discover"))
        engine.publish(found.client_plan(), 0.0)
        directory.follow(found)
    assert engine.begin("orders", "GET", "/", [], 1.0).next(1.0)[0] == core.SEND


# ---------------------------------------------------------------------- development


def test_development_reaches_nothing_beyond_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file or a name that points elsewhere is refused; identities are the services' own."""
    monkeypatch.setenv("MESHLIB_DEV", str(tmp_path / "dev"))
    names = Names("127.0.0.1")
    world = World(tmp_path, names)
    local = '  stock: {discover: {dns: "localhost:80"}}\n'
    (tmp_path / "orders.yaml").write_text('- "10.0.0.1:80"\n')
    with pytest.raises(ConfigError, match=r"not on this machine"):
        world.follow(FILE + local)
    (tmp_path / "orders.yaml").write_text('- {address: "127.0.0.1:80", identity: "spiffe://shop.internal/x"}\n')
    world.follow(FILE + local)
    assert world.engine.rows == [("127.0.0.1:80", 1.0, "", {}, "", False)]
    world.keep()
    names.answer = ["10.0.0.1"]
    world.after(6.0)
    assert world.row("stock")["failures"] == 1
    assert ["10.0.0.1:80"] not in [addresses for _, _, addresses in world.engine.taken]
