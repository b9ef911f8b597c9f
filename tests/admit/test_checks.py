"""Does an active check find out how an endpoint is, and nothing else? Real servers on loopback; the engine is a list of its words."""

from __future__ import annotations

import asyncio
import random
import socket
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent import futures
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import grpc.aio
import pytest

from meshlib._native import core
from meshlib.admit import checks, names
from meshlib.admit.checks import Checker
from meshlib.admit.probe import is_link_local
from meshlib.discover import EndpointAddress
from meshlib.keeper import Keeper
from meshlib.secure import FolderSource, IdentityStore
from tests.support import TRUST_DOMAIN, Request, Scripted, free_port, identities, mesh_of, ok, scripted

EVERY, TIMEOUT = 10.0, 0.5
ID = f"spiffe://{TRUST_DOMAIN}/ns/default/sa/"


class Now:
    """A clock that stands still, and a source without chance: everything is due at once, and again one interval later."""

    def __init__(self) -> None:
        self.time = 1000.0

    def __call__(self) -> float:
        return self.time


class Still(random.Random):
    def random(self) -> float:
        return 0.0


class Words:
    """The engine's ear."""

    def __init__(self) -> None:
        self.said: list[tuple[str, str, bool]] = []

    def check(self, service: str, address: str, is_healthy: bool, now: float) -> None:
        self.said.append((service, address, is_healthy))

    def take(self) -> list[bool]:
        said, self.said = self.said, []
        return [word for _, _, word in said]


class World:
    """A checker with all that it needs, moved by hand."""

    def __init__(self, *addresses: str | EndpointAddress, listed: Sequence[str] = (), own: Any = None, **settings: Any) -> None:
        self.now, self.words = Now(), Words()
        self.places = tuple(EndpointAddress(a) if isinstance(a, str) else a for a in addresses)
        self.is_private, self.protocol, self.listed = own is not None, settings.pop("protocol", "http"), listed
        self.called = True
        self.keeper = Keeper()
        self.checker = Checker(
            self.words, self.keeper, endpoints=lambda _: self.places, own=own or (lambda: None),
            is_called=lambda _: self.called, clock=self.now, source=Still(),
        )  # fmt: skip
        self.settings = {
            "kind": "http", "path": "/healthz", "every": EVERY, "timeout": TIMEOUT, "failures": 1, "successes": 1, **settings,
        }  # fmt: skip
        self.checker.follow(self.config())

    def config(self, **changes: Any) -> Any:
        static = tuple(SimpleNamespace(address=address) for address in self.listed)
        policy = SimpleNamespace(
            identity=f"{ID}orders",
            protocol=self.protocol,
            discover=SimpleNamespace(static=static),
            check=SimpleNamespace(**{**self.settings, **changes}),
        )
        plain = SimpleNamespace(check=None)
        return SimpleNamespace(services={"orders": policy, "unchecked": plain}, is_private=lambda _: self.is_private)

    async def round(self) -> list[bool]:
        """One check of every endpoint, and what the engine was told."""
        await self.checker.look()
        await self.checker.settled()
        self.now.time += EVERY
        return self.words.take()

    @property
    def trouble(self) -> list[str]:
        return list(self.checker.stats()[0]["failing"].values())

    @property
    def row(self) -> dict[str, Any]:
        return self.checker.stats()[0]


def answering(*answers: bytes | None) -> Callable[[Scripted, Request], Any]:
    """One answer after the other, the last one for ever; None closes the connection."""
    left = list(answers)

    async def answer(server: Scripted, request: Request) -> bytes | None:
        return left.pop(0) if len(left) > 1 else left[0]

    return answer


def plain(status: str, *headers: str) -> bytes:
    return f"HTTP/1.1 {status}\r\ncontent-length: 0\r\n{''.join(h + chr(13) + chr(10) for h in headers)}\r\n".encode()


@asynccontextmanager
async def grpc_health(answer: Callable[[bytes], bytes] | None, credentials: Any = None) -> AsyncIterator[str]:
    """A real gRPC server with a health service that answers with the bytes of a message, or without one."""
    server = grpc.aio.server(futures.ThreadPoolExecutor(1))

    async def check(request: bytes, context: Any) -> bytes:
        assert answer is not None
        return answer(request)

    if answer is not None:
        handlers = {"Check": grpc.unary_unary_rpc_method_handler(check)}
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("grpc.health.v1.Health", handlers),))
    port = server.add_secure_port("127.0.0.1:0", credentials) if credentials else server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(None)


# ---------------------------------------------------------------- what is asked, and what counts


async def test_a_check_is_a_get_of_the_path_with_the_service_as_host() -> None:
    """A 2xx is health; the connection is made for the check and not kept."""
    async with scripted(answering(plain("204 No Content"))) as server:
        world = World(server.address, path="/healthz?deep=1")
        assert await world.round() == [True]
        request = server.requests[0]
        assert (request.method, request.target, request.headers["host"]) == ("GET", "/healthz?deep=1", "orders")
        assert request.headers["connection"] == "close"
        assert await world.round() == [True]
        assert server.connections == 2


@pytest.mark.parametrize("status", ["500 Oh", "404 Not Found", "403 Forbidden", "503 Busy"])
async def test_any_other_status_is_a_failure(status: str) -> None:
    """Also those that say that the caller is wrong: health was not shown."""
    async with scripted(answering(plain(status))) as server:
        world = World(server.address)
        assert (await world.round(), world.trouble) == ([False], [f"it answers {status[:3]}"])


async def test_a_redirect_is_an_answer_and_not_followed() -> None:
    """Where it points to is asked for nothing."""
    async with scripted(answering(ok())) as elsewhere:
        async with scripted(answering(plain("302 Found", f"location: http://{elsewhere.address}/"))) as server:
            world = World(server.address)
            assert (await world.round(), world.trouble) == ([False], ["it answers 302"])
        assert elsewhere.connections == 0


async def test_a_head_is_enough() -> None:
    """A health page that never ends is no reason to wait."""

    async def endless(server: Scripted, request: Request) -> bytes:
        return b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n"

    async with scripted(endless) as server:
        assert await World(server.address).round() == [True]


async def test_a_hanging_endpoint_is_given_up_after_its_time() -> None:
    """And does not hold up the others, nor the look for what is due next."""
    hanging = asyncio.Event()

    async def hang(server: Scripted, request: Request) -> bytes:
        await hanging.wait()
        return ok()

    async with scripted(hang) as slow, scripted(answering(ok())) as quick:
        world = World(slow.address, quick.address, timeout=0.2)
        await world.checker.look()
        async with asyncio.timeout(5):
            while not world.words.said:
                await asyncio.sleep(0)
        assert world.words.said == [("orders", quick.address, True)]
        async with asyncio.timeout(2):
            await world.checker.settled()
        assert world.words.said[1:] == [("orders", slow.address, False)]
        assert world.trouble == ["no answer within 0.2 s"]
        hanging.set()


async def test_a_refused_connect_is_a_failure() -> None:
    """For every kind of check."""
    for kind in ("http", "tcp", "grpc"):
        world = World(f"127.0.0.1:{free_port()}", kind=kind)
        assert await world.round() == [False]
        assert "refused" in world.trouble[0].lower()


@pytest.mark.parametrize("answer", [None, b"what?\r\n\r\n", b"HTTP/1.1 2"])
async def test_what_is_no_answer_is_a_failure(answer: bytes | None) -> None:
    """A closed connection, nonsense, and half a head."""

    async def closing(server: Scripted, request: Request) -> bytes | None:
        for writer in server._writers:
            if answer:
                writer.write(answer)
            writer.close()
        return None

    async with scripted(closing) as server:
        assert await World(server.address).round() == [False]


async def test_tcp_asks_for_a_connection_only() -> None:
    """No byte is sent."""
    seen = asyncio.get_running_loop().create_future()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seen.set_result(await reader.read())
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        host, port = server.sockets[0].getsockname()
        assert await World(f"{host}:{port}", kind="tcp").round() == [True]
        assert await asyncio.wait_for(seen, 5) == b""


async def test_a_name_and_a_unix_socket_are_addresses_too(tmp_path: Path) -> None:
    """Names are resolved on a thread that ends; nothing of the loop's own is left."""
    server = await asyncio.start_unix_server(lambda _, writer: writer.close(), tmp_path / "s")
    async with server, scripted(answering(ok())) as named:
        world = World(f"unix:{tmp_path / 's'}", kind="tcp")
        assert await world.round() == [True]
        assert await World(f"localhost:{named.port}").round() == [True]


async def test_a_name_that_leads_nowhere_is_a_failure_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the resolver's own words, whose numbers are no errno; and what can't be a host's name at all gets a verdict, too."""

    def resolve(host: str, *args: Any, **options: Any) -> Any:
        host.encode("idna")  # as the real one does
        if host == "empty.example":
            return []
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    long = "a" * 64
    expected = {
        "gone.example": "its name can't be resolved: Name or service not known",
        "empty.example": "empty.example has no address",
        long: f"{long!r} can't be looked up: it is no host name",
    }
    for host, trouble in expected.items():
        world = World(f"{host}:80")
        assert (await world.round(), world.trouble) == ([False], [trouble])


async def test_lookups_that_hang_say_nothing_of_an_endpoint_that_waits_for_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """No thread was free to ask for it: that is skipped, and told within the time of the check."""
    monkeypatch.setattr(names, "MOST", 0)
    world = World("orders.example:80", timeout=0.02)
    monkeypatch.setattr(asyncio, "wait", immediately)
    assert (await world.round(), world.row["skipped"], world.row["checks"]) == ([], 1, 0)


async def immediately(*args: Any, timeout: float, **options: Any) -> None:
    await asyncio.sleep(timeout)


# ---------------------------------------------------------------- gRPC


@pytest.mark.parametrize(
    ("message", "word", "trouble"),
    [
        (b"\x08\x01", True, []),
        (b"\x08\x02", False, ["it says NOT_SERVING"]),
        (b"\x08\x03", False, ["it says SERVICE_UNKNOWN"]),
        (b"", False, ["it says UNKNOWN"]),
        (b"\x12\x01x", False, ["it says nothing that is known"]),
    ],
)
async def test_grpc_health_must_say_serving(message: bytes, word: bool, trouble: list[str]) -> None:
    """The server as a whole is asked: an empty request."""
    asked = []

    def answer(request: bytes) -> bytes:
        asked.append(request)
        return message

    async with grpc_health(answer) as address:
        world = World(address, kind="grpc", protocol="grpc")
        assert (await world.round(), world.trouble, asked) == ([word], trouble, [b""])


async def test_a_grpc_server_without_health_service_fails_its_check() -> None:
    """The configuration promised one."""
    async with grpc_health(None) as address:
        world = World(address, kind="grpc")
        assert await world.round() == [False]
        assert world.trouble == ["it has no health service (grpc.health.v1.Health)"]


# ---------------------------------------------------------------- identity


def store(folder: Path, name: str) -> IdentityStore:
    made = IdentityStore(FolderSource(folder / "identities", name, TRUST_DOMAIN, f"{ID}{name}"), mode="enforce")
    made.require(0.0)
    return made


@asynccontextmanager
async def secured(folder: Path, name: str) -> AsyncIterator[str]:
    """A server that speaks mutual TLS as a service of the mesh, and answers every request with 200."""
    tls = store(folder, name).server_tls(True)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = core.TlsConnection(tls)
        try:
            while data := await reader.read(65536):
                plain_text, out, is_eof = connection.receive(data)
                writer.write(out)
                if plain_text:
                    writer.write(connection.send(ok()))
                if is_eof:
                    break
        except Exception:
            writer.write(connection.pending())
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"


async def test_an_endpoint_must_prove_its_identity_in_a_check_too(tmp_path: Path) -> None:
    """Who answers well under another name is not well. The endpoint's own identity goes before the service's."""
    identities(tmp_path, "me", "orders", "burglar")
    mine = store(tmp_path, "me")
    async with secured(tmp_path, "orders") as right, secured(tmp_path, "burglar") as wrong:
        assert await World(right, own=lambda: mine.client_tls).round() == [True]
        world = World(wrong, own=lambda: mine.client_tls)
        assert await world.round() == [False]
        assert "identity" in world.trouble[0] or "burglar" in world.trouble[0]
        assert await World(EndpointAddress(wrong, identity=f"{ID}burglar"), own=lambda: mine.client_tls).round() == [True]


async def test_a_plain_server_is_not_well_where_tls_is_demanded(tmp_path: Path) -> None:
    """A check never downgrades."""
    identities(tmp_path, "me")
    mine = store(tmp_path, "me")
    async with scripted(answering(ok())) as server:
        assert await World(server.address, own=lambda: mine.client_tls).round() == [False]
        assert server.requests == []


async def test_without_an_identity_of_ours_nothing_is_said_of_the_endpoint() -> None:
    """The fault is ours."""
    async with scripted(answering(ok())) as server:
        world = World(server.address, own=lambda: None)
        assert (await world.round(), world.row["skipped"], world.row["checks"]) == ([], 1, 0)


# ---------------------------------------------------------------- verdicts


async def test_a_verdict_takes_so_many_in_a_row_and_is_repeated() -> None:
    """Three failures in a row, two successes in a row; one of the other kind begins the row anew."""
    bad, good = plain("500 Oh"), ok()
    answers = [bad, bad, good, bad, bad, bad, bad, good, bad, good, good, good]
    async with scripted(answering(*answers)) as server:
        world = World(server.address, failures=3, successes=2)
        said = [await world.round() for _ in answers]
        no, yes, nothing = [False], [True], list[bool]()
        expected = [nothing, nothing, nothing, nothing, nothing, no, no, no, no, no, yes, yes]
        assert said == expected
        assert (world.row["checks"], world.row["failures"], world.trouble) == (12, 7, [])


async def test_only_services_that_are_called_are_checked() -> None:
    """The file describes the whole mesh; once called, a service stays checked."""
    async with scripted(answering(ok())) as server:
        world = World(server.address)
        world.called = False
        assert (await world.round(), server.connections) == ([], 0)
        world.called = True
        assert await world.round() == [True]
        world.called, world.places = False, (*world.places, EndpointAddress(f"localhost:{server.port}"))
        assert await world.round() == [True, True]


async def test_an_endpoint_that_is_gone_is_not_checked_any_more() -> None:
    """And one that is back begins anew."""
    async with scripted(answering(plain("500 Oh"))) as server:
        world = World(server.address, failures=2)
        await world.round()
        places, world.places = world.places, ()
        assert (await world.round(), server.connections) == ([], 1)
        world.places = tuple(replace(place, weight=2.0) for place in places)
        assert (await world.round(), await world.round()) == ([], [False])
        assert server.connections == 3


async def test_under_another_identity_it_is_another_endpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who it was before is asked for no more: it would fail for ever, and each verdict would undo the other."""
    asked = []

    async def probe(check: Any, address: str, identity: str, own: Any, names: Any) -> None:
        asked.append(identity)

    monkeypatch.setattr(checks, "probe", probe)
    world = World(EndpointAddress("127.0.0.1:9", identity="old"), own=lambda: None)
    await world.round()
    world.places = (EndpointAddress("127.0.0.1:9", identity="new"),)
    await world.round()
    await world.round()
    assert asked == ["old", "new", "new"]


async def test_a_fault_of_ours_is_told_and_says_nothing_of_the_endpoint(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It would take every endpoint out of service; and the next check is made all the same."""

    async def probe(*args: Any) -> None:
        raise RuntimeError("oh")

    monkeypatch.setattr(checks, "probe", probe)
    world = World("127.0.0.1:9")
    assert (await world.round(), await world.round(), world.row["skipped"], world.row["checks"]) == ([], [], 2, 0)
    assert [record.getMessage() for record in caplog.records] == ["orders: 127.0.0.1:9 can't be checked: RuntimeError: oh"]


async def test_a_changed_configuration_keeps_counters_and_a_removed_check_takes_back_its_word() -> None:
    """Nobody else would ever say that the endpoint is well again."""
    async with scripted(answering(plain("500 Oh"))) as server:
        world = World(server.address)
        await world.round()
        world.checker.follow(world.config())
        assert await world.round() == [False]
        world.checker.follow(world.config(path="/else"))
        assert (await world.round(), world.row["checks"]) == ([False], 3)
        assert [r.target for r in server.requests] == ["/healthz", "/healthz", "/else"]
        world.checker.follow(SimpleNamespace(services={}))
        assert (world.words.take(), world.checker.stats()) == ([True], [])
        assert (await world.round(), server.connections) == ([], 3)


async def test_a_round_is_spread_over_the_interval() -> None:
    """A hundred endpoints, of which about a tenth is due in each second of ten."""
    world = World(*(f"127.0.0.1:{port}" for port in range(1, 101)))
    world.checker._random = random.Random(7)
    due = []
    for _ in range(10):
        await world.checker.look()
        due.append(len(world.checker._tasks))
        await asyncio.gather(*(t for t in world.checker._tasks if t.cancel()), return_exceptions=True)
        world.now.time += 1.0
    assert sum(due) == 100
    assert max(due) <= 20 and min(due) >= 3


# ---------------------------------------------------------------- where a check may go


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("169.254.169.254", True),
        ("fe80::1", True),
        ("fe80::1%eth0", True),
        ("::ffff:169.254.169.254", True),
        ("64:ff9b::a9fe:a9fe", True),
        ("2002:a9fe:a9fe::1", True),
        ("169.253.0.1", False),
        ("10.0.0.1", False),
        ("127.0.0.1", False),
        ("::1", False),
        ("2001:db8::1", False),
    ],
)
def test_link_local_is_known_in_every_form(host: str, expected: bool) -> None:
    """IPv4 in IPv6's clothes is still where the cloud keeps its credentials."""
    assert is_link_local(host) is expected


async def test_link_local_addresses_are_not_checked_unless_they_are_written_down(monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer of DNS doesn't send a process to the metadata service: neither as an address nor behind a name."""
    tried: list[Any] = []

    async def connect(self: Any, sock: socket.socket, place: Any) -> None:
        tried.append(place)

    monkeypatch.setattr(asyncio.SelectorEventLoop, "sock_connect", connect)
    real = socket.getaddrinfo

    def resolve(host: str, *args: Any, **options: Any) -> Any:
        return real("169.254.169.254" if host == "sneaky.example" else host, *args, **options)

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    for address in ("169.254.169.254:80", "sneaky.example:80", "[::ffff:169.254.169.254]:80"):
        world = World(address, kind="tcp")
        assert (await world.round(), tried, world.row["skipped"]) == ([], [], 1)
    assert await World("169.254.169.254:80", kind="tcp", listed=["169.254.169.254:80"]).round() == [True]
    assert tried == [("169.254.169.254", 80)]


async def test_loopback_is_checked_whoever_gave_the_address(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sidecars and a whole mesh on one machine are there, and calls go there all the same."""
    tried: list[Any] = []

    async def connect(self: Any, sock: socket.socket, place: Any) -> None:
        tried.append(place)

    monkeypatch.setattr(asyncio.SelectorEventLoop, "sock_connect", connect)
    for address in ("127.0.0.1:80", "[::1]:80"):
        assert await World(address, kind="tcp").round() == [True]
    assert tried == [("127.0.0.1", 80), ("::1", 80, 0, 0)]


# ---------------------------------------------------------------- on the keeper


async def test_the_keeper_does_the_work_and_stops_when_it_is_told_to() -> None:
    """One job for all services, and none where nothing is to be checked."""
    async with scripted(answering(ok())) as server:
        world = World(server.address)
        assert world.keeper.jobs == ()
        (started,) = world.checker.jobs()
        assert [job.name for job in world.keeper.jobs] == ["check"]
        world.keeper.start()
        try:
            async with asyncio.timeout(5):
                while not world.words.said:
                    await asyncio.sleep(0.01)
        finally:
            started.cancel()
            world.keeper.stop()
        assert (world.words.said[0], world.keeper.jobs) == (("orders", server.address, True), ())
        world.checker.jobs()
        world.checker.follow(SimpleNamespace(services={}))
        assert world.keeper.jobs == ()


async def test_the_engine_sends_no_call_to_an_endpoint_that_fails_its_check(tmp_path: Path) -> None:
    """A configuration, the engine and the checks together; when the endpoint is well again it gets calls again."""
    check = {"path": "/healthz", "failures": 1, "successes": 2}
    async with scripted(answering(plain("500 Oh"), ok())) as ill, scripted(answering(ok())) as well:
        orders = {
            "discover": {"static": [ill.address, well.address]}, "balance": {"policy": "round_robin"}, "admit": {"check": check},
        }  # fmt: skip
        with mesh_of(tmp_path, {"orders": orders, "other": {}}) as mesh:
            now, places = Now(), tuple(EndpointAddress(a) for a in (ill.address, well.address))
            checker = Checker(mesh.engine, Keeper(), endpoints=lambda _: places, own=lambda: None, clock=now, source=Still())
            checker.follow(mesh.config)

            async def called() -> set[str]:
                await checker.look()
                await checker.settled()
                now.time += EVERY
                return {address_of(mesh, now.time) for _ in range(8)}

            assert [row["service"] for row in checker.stats()] == ["orders"]
            assert [await called() for _ in range(3)] == [{well.address}, {well.address}, {ill.address, well.address}]


def address_of(mesh: Any, now: float) -> str:
    call = mesh.engine.begin("orders", "GET", "/", [], now)
    _, token, address, _, _ = call.next(now)
    call.head(token, core.OUTCOME_RESPONSE, 200, now, -1.0, True)
    return str(address)
