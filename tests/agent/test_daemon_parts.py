"""Is the data path told what it has to know, and does the admin socket answer what it should and nothing else?"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from meshlib.agent import sockets
from meshlib.agent.admin import BODY_LIMIT, HEAD_LIMIT, MOST, STRANGERS, Admin, View
from meshlib.agent.attest import Caller
from meshlib.agent.data import DataPlane, Handover, doors_of
from meshlib.agent.entries import Entries
from meshlib.agent.issue import Issuer
from meshlib.agent.run import configured
from meshlib.agent.strangers import MOST as MOST_STRANGERS
from meshlib.agent.strangers import Strangers
from meshlib.agent.systemd import Notifier
from meshlib.errors import KeyFileError
from meshlib.observe.names import Metric
from meshlib.secure import CertificateAuthority
from tests.agent.daemon_world import DOMAIN, ORDERS, STOCK, Paper, ask, config_of, place, raw

US = os.geteuid()


# ---------------------------------------------------------------------------------------------------- the data path


@pytest.fixture
def folder() -> Iterator[Path]:
    with place() as where:
        yield where


class World:
    """A data path beside a real issuer."""

    def __init__(self, folder: Path, life: float = 3600.0) -> None:
        self.folder = folder
        self.authority = CertificateAuthority.create(folder / "ca", DOMAIN)
        self.life = life
        self.proxy = Paper()

    async def begin(self, *details: Any, **more: Any) -> World:
        self.config = config_of(self.folder, *details, **more)
        assert self.config.agent is not None
        self.issuer = Issuer(self.config, life=self.life)
        await self.issuer.start(10.0)
        self.entries = Entries(self.config.agent.entries)
        self.data = DataPlane(self.proxy, self.issuer, self.entries, Handover(self.folder / "state"))
        self.data.follow(self.config)
        return self

    def told(self, what: str) -> list[tuple[Any, ...]]:
        return [each[1:] for each in self.proxy.told if each[0] == what]


@pytest.fixture
async def world(folder: Path) -> AsyncIterator[World]:
    made = World(folder)
    yield made
    await made.issuer.close()


async def until(is_so: Callable[[], bool], seconds: float = 10.0) -> None:
    async with asyncio.timeout(seconds):
        while not is_so():
            await asyncio.sleep(0.05)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        return int(found.getsockname()[1])


async def test_the_data_path_is_told_of_each_identity_and_of_each_renewal(world: World) -> None:
    """Once each; a look that finds nothing new tells nothing."""
    world.life = 4.0
    await world.begin()
    assert world.told("identify") == [(ORDERS,)]
    world.data.look()
    assert len(world.told("identify")) == 1
    world.issuer.watch(world.data.look)
    await until(lambda: len(world.told("identify")) == 2)


async def test_a_withdrawn_identity_is_forgotten_and_its_address_closed(world: World) -> None:
    """Its connections end; the address is free for whoever wants it."""
    port = free_port()
    listen = f', listen: "127.0.0.1:{port}", inbound: {{agent: {world.folder}/app.sock}}'
    await world.begin(orders=listen)
    assert world.told("listen") == [("orders", ORDERS, f"{world.folder}/app.sock", "enforce")]
    world.issuer.watch(world.data.look)
    world.authority.revoke("orders")
    await until(lambda: world.told("forget") == [(ORDERS,)])
    assert world.told("unlisten") == [("orders",)]
    socket.create_server(("127.0.0.1", port)).close()


def test_only_users_of_the_entries_may_listen_for_a_service(tmp_path: Path) -> None:
    """All of them, and root, whose servers give up their rights after they have bound; users of other services may not."""
    listen = f', listen: "127.0.0.1:{free_port()}", inbound: {{agent: {tmp_path}/app.sock}}'
    entries = "[{service: orders, uid: 4101}, {service: orders, uid: 4100, path: /bin/true}, {service: stock, uid: 4102}]"
    (door,) = doors_of(config_of(tmp_path, entries=entries, orders=listen))
    assert (door.name, door.owners) == ("orders", (0, 4100, 4101))


async def test_nothing_listens_before_there_is_an_identity(world: World) -> None:
    """And who connects to the data socket without one is closed."""
    port = free_port()
    world.authority.issue("orders")
    world.authority.revoke("orders")
    listen = f', listen: "127.0.0.1:{port}", inbound: {{agent: {world.folder}/app.sock}}'
    await world.begin(orders=listen)
    assert world.proxy.told == []
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), 1)
    assert [row["is_open"] for row in world.data.rows()] == [False]


async def test_an_address_that_is_taken_is_an_alarm_and_tried_again(world: World) -> None:
    """As soon as it is free, the service is served."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        listen = f', listen: "127.0.0.1:{port}", inbound: {{agent: {world.folder}/app.sock}}'
        await world.begin(orders=listen)
        assert [about for about, _ in world.data.alarms] == ["orders"]
    world.data.look()
    assert world.data.alarms == []
    assert len(world.told("listen")) == 1


async def test_an_address_moves_with_the_configuration(world: World) -> None:
    """Another port: the old one is closed. Another mode: the same socket, other terms."""
    first, second = free_port(), free_port()

    file = world.folder / "mesh.yaml"
    await world.begin(orders=f', listen: "127.0.0.1:{first}", inbound: {{agent: {world.folder}/app.sock}}')
    world.data.follow(
        config_of(world.folder, orders=f', listen: "127.0.0.1:{second}", inbound: {{agent: {world.folder}/app.sock}}')
    )
    socket.create_server(("127.0.0.1", first)).close()
    file.write_text(file.read_text().replace("orders: {secure: {", "orders: {secure: {mode: permissive, "))
    world.data.follow(configured(file))
    assert [told[-1] for told in world.told("listen")] == ["enforce", "enforce", "permissive"]
    assert world.data.rows()[0]["address"] == f"127.0.0.1:{second}"


async def test_an_application_that_comes_and_goes_does_not_fill_the_log(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """One line within ten seconds; the alarm is always as it is now. It is looked at after a call that failed, until it is well."""
    port, now, asked = free_port(), 0.0, list[bool]()
    missed, fault = 0, ""
    monkeypatch.setattr(world.proxy, "stats", lambda: {"inbound": {"orders": {"failed": {"connect": missed, "tls": 9}}}})

    def trouble_with(path: str, owners: Any, *, is_asked: bool) -> str:
        asked.append(is_asked)
        return fault if is_asked else ""

    monkeypatch.setattr("meshlib.agent.data.trouble_with", trouble_with)
    await world.begin(orders=f', listen: "127.0.0.1:{port}", inbound: {{agent: {world.folder}/app.sock}}')
    world.data._clock = lambda: now
    world.data.look()
    assert asked[-2:] == [False, False]
    with caplog.at_level(logging.INFO, "meshlib.agent"):
        for _ in range(40):
            now += 0.5
            missed, fault = missed + (not fault), "" if fault else "nobody is there."
            world.data.look()
            assert [what for _, what in world.data.alarms] == [fault] * bool(fault)
            assert asked[-1]
    told = [line for line in caplog.messages if "its application can" in line]
    assert told[0] == "orders: its application can't be reached: nobody is there."
    assert 2 <= len(told) <= 3
    fault = ""
    world.data.look()
    world.data.look()
    assert not asked[-1]


async def test_a_caller_gets_the_identities_of_its_entries(world: World) -> None:
    """Whoever has no entry is closed, without a word."""
    await world.begin("ca: ca", f"[{{service: stock, uid: {US}}}, {{service: orders, uid: {US}}}]")
    for uid, told in ((US, [(STOCK, ORDERS)]), (US + 1, [(STOCK, ORDERS)])):
        ours, theirs = socket.socketpair()
        await world.data.on_caller(ours, Caller(1, uid, uid))
        assert world.told("adopt") == told
        ours.close()
        assert theirs.recv(1) == b""
        theirs.close()
    assert (world.data.adopted, world.data.turned_away) == (1, 1)


async def test_an_identity_that_the_data_path_refuses_is_an_alarm(world: World) -> None:
    """The one before stays, and it is tried again with the next look."""
    world.proxy.refuses = "it doesn't like it"
    await world.begin()
    assert world.data.alarms == [(ORDERS, "it doesn't like it")]
    world.proxy.refuses = ""
    world.data.look()
    assert world.data.alarms == []


async def test_the_secret_is_one_per_identity_and_stays_over_restarts(folder: Path) -> None:
    """Made once, 0600, and another one for each SPIFFE ID; nothing of it is shown."""
    first, second = Handover(folder / "state"), Handover(folder / "state")
    assert first.secret_of(ORDERS) == second.secret_of(ORDERS) != first.secret_of(STOCK)
    assert len(first.secret_of(ORDERS)) == 64
    assert (folder / "state" / "handover.key").stat().st_mode & 0o777 == 0o600
    assert first.secret_of(ORDERS) not in repr(first)


async def test_a_key_that_others_could_read_is_refused(folder: Path) -> None:
    """And one that was cut off."""
    Handover(folder / "state")
    key = folder / "state" / "handover.key"
    key.chmod(0o644)
    with pytest.raises(KeyFileError, match="may be opened by other users"):
        Handover(folder / "state")
    key.chmod(0o600)
    key.write_text("ab")
    with pytest.raises(KeyFileError, match="holds no key"):
        Handover(folder / "state")


async def test_without_a_state_folder_the_secret_lives_as_long_as_the_process(folder: Path) -> None:
    """A disk that takes nothing costs no call; it is an alarm."""
    (folder / "file").write_text("")
    lost = Handover(folder / "file" / "state")
    assert "another one after a restart" in lost.trouble
    assert len(lost.secret_of(ORDERS)) == 64


# ---------------------------------------------------------------------------------------------------- who fits no entry


def test_nobody_fills_the_log_with_who_they_are_not(caplog: pytest.LogCaptureFixture) -> None:
    """A line for a user and a minute, and so many in all; what is not told is counted, and told with the next line."""
    now = 0.0
    strangers = Strangers(lambda: now)
    assert strangers.since is None
    for _ in range(5):
        strangers.note("workload", Caller(7, 1001, 1))
    assert len(caplog.messages) == 1
    for uid in range(3000, 3000 + 10 * MOST_STRANGERS):
        strangers.note("data", Caller(8, uid, 1))
    assert len(caplog.messages) == MOST_STRANGERS
    now = 60.0
    strangers.note("workload", Caller(9, 1001, 1))
    strangers.note("workload", Caller(9, 9999, 1))
    assert "process 9 of user 1001 at the workload socket" in caplog.messages[-2]
    assert caplog.messages[-2].endswith("; 4 more of this user since the last line")
    assert "user 9999" in caplog.messages[-1]
    assert len(strangers._named) <= MOST_STRANGERS
    assert strangers.counts == {"workload": 7, "data": 10 * MOST_STRANGERS}
    assert strangers.since == 0.0


# ---------------------------------------------------------------------------------------------------- the admin socket


@pytest.fixture
async def admin(folder: Path) -> AsyncIterator[Admin]:
    def fails() -> Any:
        raise RuntimeError("on purpose")

    view = View(
        health=lambda: {"status": "ok"},
        certificates=list,
        connections=fails,
        entries=lambda: [{"service": "orders"}],
        metrics=lambda: [(Metric("meshlib_agent_alarms", "gauge", "What isn't well now."), [((), 0)])],
    )
    listening = sockets.open_socket(folder / "admin.sock", 0o600)
    made = Admin(listening.sock, view, [])
    await made.start()
    yield made
    await made.close()
    listening.close()


async def asked(folder: Path, *details: str) -> tuple[int, Any]:
    return await asyncio.to_thread(ask, folder / "admin.sock", *details)


async def status_of(folder: Path, data: bytes) -> int:
    answer = await asyncio.to_thread(raw, folder / "admin.sock", data)
    return int(answer.split(b" ")[1])


async def test_each_question_has_its_answer(folder: Path, admin: Admin) -> None:
    """JSON, and Prometheus' text; what fails is told as a failure without its text."""
    assert await asked(folder, "/health") == (200, {"status": "ok"})
    assert await asked(folder, "/certificates") == (200, [])
    assert await asked(folder, "/entries") == (200, [{"service": "orders"}])
    status, text = await asked(folder, "/metrics")
    assert (status, text.splitlines()[0]) == (200, "# TYPE meshlib_agent_alarms gauge")
    status, problem = await asked(folder, "/connections")
    assert status == 500
    assert "on purpose" not in json.dumps(problem)
    assert (await asked(folder, "/keys"))[0] == 404


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"GET /health HTTP/1.1\r\n\r\n", 200),
        (b"GET /health HTTP/1.0\r\n\r\n", 200),
        (b"GET /health?x HTTP/1.1\r\n\r\n", 404),
        (b"GET http://x/health HTTP/1.1\r\n\r\n", 404),
        (b"GET /health HTTP/2.0\r\n\r\n", 400),
        (b"GET  /health HTTP/1.1\r\n\r\n", 400),
        (b"GET /he\x00lth HTTP/1.1\r\n\r\n", 400),
        (b"GET /health HTTP/1.1\r\nhost : x\r\n\r\n", 400),
        (b"GET /health HTTP/1.1\r\n folded: x\r\n\r\n", 400),
        (b"GET /health HTTP/1.1\r\nx: a\x01b\r\n\r\n", 400),
        (b"GET /health HTTP/1.1\r\nhost: a\r\nhost: b\r\n\r\n", 400),
        (b"PUT /log-level HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n", 411),
        (b"PUT /log-level HTTP/1.1\r\ncontent-length: 4\r\ncontent-length: 4\r\n\r\ninfo", 400),
        (b"PUT /log-level HTTP/1.1\r\ncontent-length: +4\r\n\r\ninfo", 400),
        (b"PUT /log-level HTTP/1.1\r\ncontent-length: %d\r\n\r\n" % (BODY_LIMIT + 1), 413),
        (b"GET /health HTTP/1.1\r\n" + b"x: y\r\n" * 65 + b"\r\n", 431),
        (b"GET /health HTTP/1.1\r\nx: " + b"y" * HEAD_LIMIT * 2 + b"\r\n\r\n", 431),
        (b"DELETE /health HTTP/1.1\r\n\r\n", 405),
        (b"POST /log-level HTTP/1.1\r\n\r\n", 405),
    ],
)
async def test_what_can_be_read_in_two_ways_is_refused(folder: Path, admin: Admin, data: bytes, status: int) -> None:
    """With the right status, and nothing else happens."""
    assert await status_of(folder, data) == status


async def test_who_may_not_ask_hears_the_same_whatever_they_ask(
    folder: Path, admin: Admin, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also what isn't HTTP: nothing of it is read."""
    monkeypatch.setattr("meshlib.agent.admin.uid_of", lambda connection: 4242)
    answers = {
        await asyncio.to_thread(raw, folder / "admin.sock", data) for data in (b"GET /health HTTP/1.1\r\n\r\n", b"nonsense")
    }
    assert len(answers) == 1
    assert answers.pop().startswith(b"HTTP/1.1 403 ")
    admin.admins = frozenset({4242})
    assert (await asked(folder, "/health"))[0] == 200


async def test_slow_and_many_keep_nobody_out_for_long(folder: Path, admin: Admin, monkeypatch: pytest.MonkeyPatch) -> None:
    """A request has seconds; beyond the bound a connection is closed, and there is room again when the slow are gone."""
    monkeypatch.setattr("meshlib.agent.admin.SECONDS", 1.0)
    plugs = []
    for _ in range(MOST + 4):
        plug = socket.socket(socket.AF_UNIX)
        plug.connect(str(folder / "admin.sock"))
        plugs.append(plug)
    await asyncio.sleep(0.2)
    assert len(admin._open) == MOST
    await asyncio.sleep(1.2)
    assert await asked(folder, "/health") == (200, {"status": "ok"})
    for plug in plugs:
        plug.close()


async def test_who_may_not_ask_takes_nobodys_place(folder: Path, admin: Admin, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many of them there are, and however long they stay."""
    monkeypatch.setattr("meshlib.agent.admin.uid_of", lambda connection: 4242)
    plugs = []
    for _ in range(MOST + 4):
        plug = socket.socket(socket.AF_UNIX)
        plug.connect(str(folder / "admin.sock"))
        plugs.append(plug)
    await asyncio.sleep(0.2)
    assert len(admin._open) == STRANGERS
    monkeypatch.undo()
    assert await asked(folder, "/health") == (200, {"status": "ok"})
    for plug in plugs:
        plug.close()


async def test_the_log_level_is_one_of_four(folder: Path, admin: Admin) -> None:
    """As JSON or as a word."""
    logger = logging.getLogger("meshlib")
    before = logger.level
    try:
        assert await asked(folder, "/log-level", "PUT", "debug") == (200, {"level": "debug"})
        assert await asked(folder, "/log-level", "PUT", '"error"') == (200, {"level": "error"})
        assert (await asked(folder, "/log-level", "PUT", '{"level": 3}'))[0] == 400
        assert await asked(folder, "/log-level") == (200, {"level": "error"})
    finally:
        logger.setLevel(before)


# ---------------------------------------------------------------------------------------------------- sd_notify


@pytest.mark.parametrize(
    ("environment", "seconds"),
    [
        ({}, None),
        ({"WATCHDOG_USEC": "3000000"}, 1.5),
        ({"WATCHDOG_USEC": "3000000", "WATCHDOG_PID": "1"}, None),
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": "soon"}, None),
    ],
)
def test_the_watchdog_is_fed_at_half_of_its_patience(environment: dict[str, str], seconds: float | None) -> None:
    """If it waits for us at all."""
    assert Notifier(environment).watchdog == seconds


def test_without_anybody_who_listens_nothing_is_told(tmp_path: Path) -> None:
    """No variable, a socket that is gone, an address of another kind: none of it is an error."""
    for written in ("", str(tmp_path / "gone"), "vsock:2:1"):
        Notifier({"NOTIFY_SOCKET": written}).tell("READY=1")


def test_an_abstract_socket_and_a_long_status_are_told(tmp_path: Path) -> None:
    """A line's end in a status can't make another state of it."""
    name = f"mesh-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as ear:
        ear.bind(f"\0{name}")
        Notifier({"NOTIFY_SOCKET": f"@{name}"}).tell("READY=1", status="one\nSTOPPING=1")
        lines = ear.recv(4096).decode().split("\n")
    assert lines[0] == "READY=1"
    assert len(lines) == 2
    assert lines[1].startswith("STATUS=one")
