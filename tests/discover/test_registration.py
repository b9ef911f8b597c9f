"""A process that serves is in its registry, for as long as it serves."""

from __future__ import annotations

import asyncio
import logging
import os
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from meshlib import Mesh
from meshlib.config import load
from meshlib.discover import Directory, Instance, Registrar, Registration, instance_of, registration
from meshlib.discover import pace as pace_module
from meshlib.discover.registration import advertised, outward_address
from meshlib.discover.registries import Registries
from meshlib.errors import ConfigError
from meshlib.keeper import Keeper
from tests.discover.memory import Memory, System

HEAD = """\
mesh: shop
secure: {mode: observe}
registries:
  memory: {cache: false}
services:
  orders: {listen: "127.0.0.1:8443", register: {registry: memory, labels: {version: v2}, weight: 3}}
"""


class Strict(Memory):
    """Judges what is written for it."""

    def register(self, instance: Instance, settings: Mapping[str, Any]) -> Registration:
        if settings.get("ttl") == "1s":
            raise ConfigError(f"services.{instance.service}.register.ttl must be 2 s at least.")
        assert not settings.keys() - {"ttl"}
        return super().register(instance, settings)


class StrictSystem(System):
    def open_one(self, plugin: str, settings: Mapping[str, Any]) -> Memory:
        self.opened.append(Strict(self, settings))
        return self.opened[-1]


def until(is_it: Callable[[], bool], limit: float = 10.0) -> None:
    end = time.monotonic() + limit
    while not is_it():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.005)


@pytest.fixture
def system(monkeypatch: pytest.MonkeyPatch) -> System:
    monkeypatch.setattr(pace_module, "LOST", ((0.0, 0.2), (0.1, 0.2)))
    monkeypatch.setattr(registration, "SETTLED", 0.3)
    return System()


@pytest.fixture
def strict(system: System, monkeypatch: pytest.MonkeyPatch) -> System:
    strict = StrictSystem()
    monkeypatch.setitem(Directory.__init__.__kwdefaults__, "open_one", strict.open_one)  # type: ignore[attr-defined, arg-type]
    return strict


@pytest.fixture
def keeper() -> Iterator[Keeper]:
    keeper = Keeper()
    yield keeper
    keeper.stop()


@pytest.fixture
def mesh(tmp_path: Path, system: System, monkeypatch: pytest.MonkeyPatch) -> Iterator[Mesh]:
    file = tmp_path / "mesh.yaml"
    file.write_text(HEAD)
    monkeypatch.setitem(Directory.__init__.__kwdefaults__, "open_one", system.open_one)  # type: ignore[attr-defined, arg-type]
    mesh = Mesh(load(file, service="orders"))
    yield mesh
    mesh.close()


def registrar_of(keeper: Keeper, system: System, tmp_path: Path) -> Registrar:
    file = tmp_path / "mesh.yaml"
    file.write_text(HEAD)
    registries = Registries(keeper, random.Random(1), open_one=system.open_one)
    registries.use(registries.prepare(["memory"], load(file, service="orders").registries))
    return Registrar(keeper, registries, source=random.Random(1))


def serve(mesh: Mesh) -> object:
    """Hold on to what it returns, for as long as it is to serve."""

    async def app(scope: object, receive: object, send: object) -> None: ...

    wrapped = mesh.asgi(app)
    wrapped.way.rise()
    mesh.start()
    return wrapped


def alarms(mesh: Mesh) -> list[dict[str, str]]:
    found: list[dict[str, str]] = mesh.watch.status(time.monotonic())["alarms"]
    return found


ORDERS = instance_of("orders", "127.0.0.1:8443")


def test_entry_is_kept_and_made_again_when_the_registry_has_lost_it(keeper: Keeper, system: System, tmp_path: Path) -> None:
    """It is entered, an outage is told once, and after it the entry is there again."""
    registrar = registrar_of(keeper, system, tmp_path)
    keeper.run(registrar.keep(ORDERS, "memory", {})).result(5)
    until(lambda: system.instances == {ORDERS.id: ORDERS})
    system.down()
    until(lambda: registrar.failures > 2)
    assert (system.instances, registrar.error) == ({}, "the registry is down")
    system.down(False)
    until(lambda: system.instances == {ORDERS.id: ORDERS})
    keeper.run(registrar.leave()).result(5)
    assert system.instances == {}
    assert registrar.instance is None


def test_registration_is_the_same_after_an_error(keeper: Keeper, system: System, tmp_path: Path) -> None:
    """What it knows of its entry (a lease that still lives) isn't thrown away."""
    registrar = registrar_of(keeper, system, tmp_path)
    keeper.run(registrar.keep(ORDERS, "memory", {})).result(5)
    until(lambda: bool(system.instances))
    before = registrar._registration
    system.down()
    until(lambda: registrar.failures > 2)
    system.down(False)
    until(lambda: bool(system.instances))
    assert registrar._registration is before
    keeper.run(registrar.leave()).result(5)


def test_errors_are_spaced(keeper: Keeper, system: System, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """While the registry is down: quick at first, then less and less often, and one line in the log."""
    system.down()
    registrar = registrar_of(keeper, system, tmp_path)
    with caplog.at_level(logging.WARNING, logger="meshlib.discover"):
        keeper.run(registrar.keep(ORDERS, "memory", {})).result(5)
        until(lambda: registrar.failures >= 5, 20.0)
    assert len(system.tries) == registrar.failures
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    keeper.run(registrar.leave()).result(5)


def test_leaving_takes_no_longer_than_the_drain_waits(keeper: Keeper, system: System, tmp_path: Path) -> None:
    """A registry that hangs keeps no process from ending."""
    registrar = registrar_of(keeper, system, tmp_path)
    keeper.run(registrar.keep(ORDERS, "memory", {})).result(5)
    until(lambda: bool(system.instances))

    async def hang() -> None:
        await asyncio.sleep(3600)

    registrar._registration.leave = hang  # type: ignore[method-assign, union-attr]
    begun = time.monotonic()
    keeper.run(registrar.leave()).result(10)
    assert time.monotonic() - begun < 5.0


def test_process_is_entered_when_it_serves_and_leaves_when_it_drains(mesh: Mesh, system: System) -> None:
    """Not by being loaded or by calling others; and it is gone from the registry while it still serves."""
    mesh.start()
    time.sleep(0.3)
    assert system.instances == {}

    async def app(scope: object, receive: object, send: object) -> None: ...

    wrapped = mesh.asgi(app)
    wrapped.way.rise()
    until(lambda: len(system.instances) == 1)
    (instance,) = system.instances.values()
    assert (instance.service, instance.address, dict(instance.labels), instance.weight) == (
        "orders",
        "127.0.0.1:8443",
        {"version": "v2"},
        3.0,
    )
    mesh.drain()
    from meshlib.server.drain import Phase, drain_of

    drain_of(mesh).look()
    until(lambda: system.instances == {})
    assert drain_of(mesh).phase <= Phase.CLOSING


def test_end_of_a_mesh_takes_its_entry_out(mesh: Mesh, system: System) -> None:
    """Also where nobody drained."""

    async def app(scope: object, receive: object, send: object) -> None: ...

    wrapped = mesh.asgi(app)
    wrapped.way.rise()
    until(lambda: len(system.instances) == 1)
    mesh.close()
    assert system.instances == {}


def test_end_of_a_mesh_is_not_overtaken_by_its_own_registration(
    mesh: Mesh, system: System, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the entry is taken out, the work that enters it is due several times."""
    monkeypatch.setattr("meshlib.upkeep.LOOK", 0.02)

    async def app(scope: object, receive: object, send: object) -> None: ...

    for leaving in (0.1, 0.15, 0.2):
        wrapped = mesh.asgi(app)
        wrapped.way.rise()
        until(lambda: len(system.instances) == 1)
        tries, system.leaving = len(system.tries), leaving
        mesh.close()
        time.sleep(0.1)
        assert (system.instances, len(system.tries), mesh.registrar.instance) == ({}, tries, None)


def test_nobody_enters_while_the_entry_is_taken_out(keeper: Keeper, system: System, tmp_path: Path) -> None:
    """Who leaves has the last word; who says so after that, enters."""
    registrar = registrar_of(keeper, system, tmp_path)
    keeper.run(registrar.keep(ORDERS, "memory", {})).result(5)
    until(lambda: bool(system.instances))
    system.leaving = 0.2
    left = keeper.run(registrar.leave())
    time.sleep(0.05)
    for _ in range(3):
        keeper.run(registrar.keep(ORDERS, "memory", {})).result(5)
    left.result(5)
    time.sleep(0.1)
    assert (system.instances, registrar.instance) == ({}, None)
    keeper.run(registrar.keep(ORDERS, "memory", {})).result(5)
    until(lambda: bool(system.instances))
    keeper.run(registrar.leave()).result(5)


def test_leaving_counts_for_who_waits_to_enter(keeper: Keeper, system: System, tmp_path: Path) -> None:
    """It takes out an old entry in order to make another one, and the process begins to end meanwhile."""
    registrar = registrar_of(keeper, system, tmp_path)
    keeper.run(registrar.keep(ORDERS, "memory", {})).result(5)
    until(lambda: bool(system.instances))
    system.leaving = 0.2
    changed = keeper.run(registrar.keep(ORDERS, "memory", {"weight": 2}))
    time.sleep(0.05)
    keeper.run(registrar.leave()).result(5)
    changed.result(5)
    time.sleep(0.1)
    assert (system.instances, registrar.instance) == ({}, None)


def test_watch_that_is_refused_keeps_nobody_out(
    keeper: Keeper, system: System, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may not look up another service, or finds nothing there that it can read: its next try is always due, and always its own."""
    registrar = registrar_of(keeper, system, tmp_path)
    monkeypatch.setattr(pace_module.Pace, "wait", lambda pace, now: 0.02)
    keeper.run(registrar.keep(ORDERS, "memory", {})).result(5)
    until(lambda: system.instances == {ORDERS.id: ORDERS}, 2.0)
    system.down()
    until(lambda: registrar.failures > 1)
    system.down(False)
    until(lambda: system.instances == {ORDERS.id: ORDERS}, 5.0)
    keeper.run(registrar.leave()).result(5)


def test_entry_follows_the_settings_of_its_registry(keeper: Keeper, system: System, tmp_path: Path) -> None:
    """A reload that opens the registry anew: the entry is made there, and what was left open of the old one is closed."""
    file = tmp_path / "mesh.yaml"
    file.write_text(HEAD)
    registries = Registries(keeper, random.Random(1), open_one=system.open_one)
    registries.use(registries.prepare(["memory"], load(file, service="orders").registries))
    registrar = Registrar(keeper, registries, source=random.Random(1))
    keeper.run(registrar.keep(ORDERS, "memory", {})).result(5)
    until(lambda: bool(system.instances))
    file.write_text(HEAD.replace("cache: false", "cache: false, url: elsewhere"))
    registries.use(registries.prepare(["memory"], load(file, service="orders").registries))
    keeper.run(registrar.keep(ORDERS, "memory", {})).result(5)
    until(lambda: bool(system.instances))
    assert registrar._registration.registry is system.opened[1]  # type: ignore[attr-defined, union-attr]
    assert (system.opened[0].closed, system.opened[1].closed) == (2, 0)
    keeper.run(registrar.leave()).result(5)
    assert system.instances == {}


def test_entry_that_can_not_be_made_stops_the_start_with_all_other_mistakes(strict: System, tmp_path: Path) -> None:
    """With the line and the key, and together with the endpoints that can't be read: nothing is in force then."""
    file = tmp_path / "mesh.yaml"
    (tmp_path / "list.yaml").write_text("{}")
    file.write_text(HEAD.replace("weight: 3", "weight: 3,\n    ttl: 1s") + "  stock: {discover: {file: list.yaml}}\n")
    with pytest.raises(ConfigError) as caught:
        Mesh(load(file, service="orders"))
    assert [(Path(each.file).name, each.line, each.key) for each in caught.value.problems] == [
        ("mesh.yaml", 7, "services.orders.register.ttl"),
        ("list.yaml", 1, "(file)"),
    ]
    assert (strict.instances, strict.tries) == ({}, [])


def test_reload_that_its_registry_refuses_leaves_the_entry(strict: System, tmp_path: Path) -> None:
    """What can't be used changes nothing: the old entry stays, whoever looks finds it, and the mistake is raised."""
    file = tmp_path / "mesh.yaml"
    file.write_text(HEAD)
    mesh = Mesh(load(file, service="orders"))
    served = serve(mesh)
    try:
        until(lambda: len(strict.instances) == 1)
        before, tries = dict(strict.instances), len(strict.tries)
        file.write_text(HEAD.replace("3}", "3, ttl: 1s}"))
        with pytest.raises(ConfigError, match=r"mesh.yaml:6: services.orders.register.ttl: must be 2 s at least"):
            mesh.reload()
        time.sleep(1.5)
        assert (strict.instances, len(strict.tries), mesh.registrar.fault) == (before, tries, "")
    finally:
        mesh.close()
        del served


def test_old_entry_goes_only_when_the_new_one_can_be_made(keeper: Keeper, strict: System, tmp_path: Path) -> None:
    """Where it turns out later that it can't: the old one stays, that is told, and over when nobody wants the new one any more."""
    system = strict
    registrar = registrar_of(keeper, system, tmp_path)
    keeper.run(registrar.keep(ORDERS, "memory", {})).result(5)
    until(lambda: registrar.is_entered)
    for _ in range(2):
        keeper.run(registrar.keep(ORDERS, "memory", {"ttl": "1s"})).result(5)
    assert (system.instances, registrar.is_entered, registrar.failures) == ({ORDERS.id: ORDERS}, True, 2)
    assert "can't be made anew and the old one stays" in registrar.fault
    keeper.run(registrar.keep(ORDERS, "memory", {})).result(5)
    assert (system.instances, registrar.fault, len(system.tries)) == ({ORDERS.id: ORDERS}, "", 1)
    keeper.run(registrar.leave()).result(5)
    assert not registrar.is_wanted


def test_process_that_is_not_entered_is_an_alarm_and_a_number(mesh: Mesh, system: System) -> None:
    """Since when, and why, for as long as it lasts; a process that doesn't serve is missed by nobody."""
    gauge = 'meshlib_discover_registered{service="orders",registry="memory"} '
    assert gauge not in mesh.metrics()
    system.down()
    served = serve(mesh)
    until(lambda: mesh.registrar.failures > 1)
    (alarm,) = alarms(mesh)
    assert (alarm["kind"], alarm["about"]) == ("registration", "orders")
    assert "not entered in memory" in alarm["message"]
    assert "for 0 s: the registry is down" in alarm["message"]
    assert gauge + "0" in mesh.metrics()
    failures = [line for line in mesh.metrics().splitlines() if line.startswith("meshlib_discover_registration_failures_total{")]
    assert int(failures[0].rpartition(" ")[2]) > 1
    system.down(False)
    until(lambda: not mesh.registrar.fault)
    assert (alarms(mesh), gauge + "1" in mesh.metrics()) == ([], True)
    mesh.close()
    del served
    assert gauge not in mesh.metrics()


def test_entry_stands_when_its_package_says_so(keeper: Keeper, system: System, tmp_path: Path) -> None:
    """Not because a question has hung for long: only of a package that doesn't say, quiet is believed."""
    registrar = registrar_of(keeper, system, tmp_path)
    is_there = threading.Event()

    class Hanging:
        @property
        def is_entered(self) -> bool:
            return is_there.is_set()

        async def keep(self) -> None:
            await asyncio.sleep(3600)

        async def leave(self) -> None: ...

    opened = registrar._registries.find("memory")
    assert opened is not None
    opened.registry.register = lambda instance, settings: Hanging()  # type: ignore[method-assign]
    keeper.run(registrar.keep(ORDERS, "memory", {})).result(5)
    registrar.error = "it was away"
    time.sleep(0.5)
    assert (registrar.is_entered, registrar.error) == (False, "it was away")
    is_there.set()
    until(lambda: not registrar.error)
    assert registrar.is_entered
    keeper.run(registrar.leave()).result(5)


def test_address_that_is_not_known_yet_stops_no_start(strict: System, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its port comes with the listener, and a way out of this host may come later: until then it is an alarm."""
    file = tmp_path / "mesh.yaml"
    file.write_text(HEAD.replace("127.0.0.1:8443", "127.0.0.1:0"))
    mesh = Mesh(load(file, service="orders"))
    served = serve(mesh)
    try:
        until(lambda: bool(mesh.registrar.fault))
        assert [alarm["kind"] for alarm in alarms(mesh)] == ["registration"]
        assert "at which address and port" in alarms(mesh)[0]["message"]
        mesh.upkeep.listen = "127.0.0.1:7001"
        until(lambda: mesh.registrar.is_entered)
        assert ([instance.address for instance in strict.instances.values()], alarms(mesh)) == (["127.0.0.1:7001"], [])
    finally:
        mesh.close()
        del served


def test_address_is_one_that_others_can_reach() -> None:
    """Where it listens everywhere, that of the host; as it is written, otherwise."""
    assert advertised("0.0.0.0:80", lambda is_v6: "10.1.2.3") == "10.1.2.3:80"
    assert advertised("[::]:80", lambda is_v6: "fd00::1" if is_v6 else "10.1.2.3") == "[fd00::1]:80"
    assert advertised("127.0.0.1:80", outward_address) == "127.0.0.1:80"
    assert instance_of("orders", "", address="orders-7.internal:443").address == "orders-7.internal:443"
    first, again = (instance_of("orders", "10.0.0.1:80").id for _ in range(2))
    assert first == again
    assert first.startswith(f"orders-10.0.0.1:80-{os.getpid()}-")
    with pytest.raises(ConfigError, match="services.orders.register.address can't be"):
        instance_of("orders", "127.0.0.1:80", address="[::]:80")
    for listen in ("", "0.0.0.0:0", "nonsense"):
        with pytest.raises(ConfigError, match="register"):
            advertised(listen, outward_address)
