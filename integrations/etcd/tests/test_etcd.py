"""Are the endpoints of a service those that etcd has, whatever becomes of etcd? A real etcd, and all that can happen to it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
from meshlib_etcd import EtcdError, EtcdRegistry, open_config, open_registry
from meshlib_etcd import feed as feed_module

import meshlib
import meshlib.config
from integrations.etcd.tests.cluster import Etcd, until, watching
from meshlib.discover import Watching
from meshlib.discover import open_registry as open_plugin
from tests.support import Request, Scripted, mesh_of, ok, scripted, write_config

pytestmark = pytest.mark.skipif(shutil.which("etcd") is None, reason="etcd is not installed")
A, B, C = "10.0.0.1:8443", "10.0.0.2:8443", "10.0.0.3:8443"


@pytest.fixture
def etcd(tmp_path: Path) -> Iterator[Etcd]:
    made = Etcd(tmp_path)
    try:
        made.start()
        yield made
    finally:
        made.kill()


@pytest.fixture
async def registry(etcd: Etcd) -> AsyncIterator[EtcdRegistry]:
    made = etcd.registry(timeout="3s")
    try:
        yield made
    finally:
        await made.close()


# ---------------------------------------------------------------- what it answers


def test_mesh_finds_it_by_its_entry_points() -> None:
    """And by nothing else: a plugin is loaded only if the configuration names it."""
    (point,) = entry_points(group="meshlib.resolver", name="etcd")
    assert point.load() is open_registry
    assert {point.name for point in entry_points(group="meshlib.config") if point.load() is open_config} == {"etcd", "etcd+https"}
    assert isinstance(open_plugin("etcd", {"url": "http://127.0.0.1:2379"}), EtcdRegistry)


async def test_look_answers_what_is_there(etcd: Etcd, registry: EtcdRegistry) -> None:
    """With all that is special about an endpoint; the identity only where the configuration says that it is believed."""
    identity = "spiffe://shop.internal/ns/x/sa/y"
    etcd.instance("orders", "a", A, weight=2, zone="eu", labels={"version": "v2"}, identity=identity, protocol="grpc", more=1)
    etcd.instance("orders", "b", B)
    etcd.instance("orders-old", "c", C)
    found = (await registry.resolver("orders", {}).resolve()).endpoints
    assert [(e.address, e.weight, e.zone, dict(e.labels), e.identity) for e in found] == [
        (A, 2.0, "eu", {"version": "v2"}, ""),
        (B, 1.0, "", {}, ""),
    ]
    believing = etcd.registry(identities=True)
    assert (await believing.resolver("orders", {}).resolve()).endpoints[0].identity == identity
    await believing.close()


async def test_service_may_have_another_name_there(etcd: Etcd) -> None:
    """And the keys another beginning."""
    etcd.put("shop/services/orders-v1/a", {"address": A})
    made = etcd.registry(prefix="shop/")
    assert [e.address for e in (await made.resolver("orders", {"name": "orders-v1"}).resolve()).endpoints] == [A]
    await made.close()


async def test_watch_begins_with_the_state_and_goes_on_with_changes(etcd: Etcd, registry: EtcdRegistry) -> None:
    """Each names the version that it changes."""
    etcd.instance("orders", "a", A)
    resolver = registry.resolver("orders", {})
    assert isinstance(resolver, Watching) and resolver.interval is None
    async with watching(resolver) as (seen,):
        await until(lambda: seen.addresses, [A])
        etcd.instance("orders", "b", B)
        await until(lambda: seen.addresses, [A, B])
        etcd.instance("orders", "a", A, weight=3)
        await until(lambda: seen.endpoints[A].weight, 3.0)
        etcd.delete("/meshlib/services/orders/a")
        await until(lambda: seen.addresses, [B])
        etcd.delete("/meshlib/services/orders/b")
        await until(lambda: seen.addresses, [])
    assert seen.errors == []


async def test_empty_service_is_told_as_empty(registry: EtcdRegistry) -> None:
    """That there are no endpoints is an answer, and no error."""
    async with watching(registry.resolver("orders", {})) as (seen,):
        await until(lambda: seen.addresses, [])


async def test_address_of_two_keys_is_gone_with_the_last_of_them(etcd: Etcd, registry: EtcdRegistry) -> None:
    """A process that died and came back has two for a while; the younger counts."""
    etcd.instance("orders", "old", A, weight=1)
    etcd.instance("orders", "new", A, weight=2)
    async with watching(registry.resolver("orders", {})) as (seen,):
        await until(lambda: seen.endpoints is not None and [e.weight for e in seen.endpoints.values()], [2.0])
        etcd.delete("/meshlib/services/orders/new")
        await until(lambda: [e.weight for e in seen.endpoints.values()], [1.0])
        etcd.instance("orders", "new", A, weight=5)
        await until(lambda: [e.weight for e in seen.endpoints.values()], [5.0])
        etcd.delete("/meshlib/services/orders/old")
        etcd.instance("orders", "new", B)
        await until(lambda: seen.addresses, [B])
    assert seen.errors == []


async def test_bad_value_is_told_and_passed_over(etcd: Etcd, registry: EtcdRegistry, caplog: Any) -> None:
    """It takes nothing else away, and not even what its key said before."""
    caplog.set_level(logging.WARNING, "meshlib.etcd")  # whatever else has run in this process
    etcd.instance("orders", "a", A)
    etcd.put("/meshlib/services/orders/bad", "{")
    etcd.put("/meshlib/services/orders/x/y", {"address": C})
    async with watching(registry.resolver("orders", {})) as (seen,):
        await until(lambda: seen.addresses, [A])
        etcd.put("/meshlib/services/orders/a", '{"address": "unix:/run/docker.sock"}')
        etcd.instance("orders", "b", B)
        await until(lambda: seen.addresses, [A, B])
    told = [record.getMessage() for record in caplog.records if record.name == "meshlib.etcd"]
    assert [line.partition(" at ")[2].partition(" is ")[0] for line in told] == [
        "/meshlib/services/orders/bad", "/meshlib/services/orders/x/y", "/meshlib/services/orders/a",
    ]  # fmt: skip
    # A new beginning finds the same, and keeps the same.
    async with watching(seen.resolver) as (again,):
        await until(lambda: again.addresses, [A, B])


async def test_weight_of_nothing_takes_an_instance_out_of_the_traffic(etcd: Etcd, tmp_path: Path) -> None:
    """As it does where endpoints are written by hand: the instance stays, with that weight, and gets no calls."""

    async def answer(server: Scripted, request: Request) -> bytes:
        return ok(server.address.encode())

    async with scripted(answer) as one, scripted(answer) as two:
        for name, server in (("o1", one), ("o2", two)):
            await asyncio.to_thread(etcd.instance, "orders", name, server.address)
        services = {"orders": {"discover": "etcd", "balance": {"policy": "round_robin"}}}
        with mesh_of(tmp_path, services, registries={"etcd": {"url": etcd.url, "cache": False}}) as mesh:
            async with mesh.client() as client:
                weights = lambda: sorted(e.weight for e in mesh.directory.endpoints("orders"))
                await until(weights, [1.0, 1.0])
                await asyncio.to_thread(lambda: etcd.instance("orders", "o1", one.address, weight=0))
                await until(weights, [0.0, 1.0])
                said = {(await client.get("http://orders/")).text for _ in range(20)}
    assert said == {two.address}


async def test_service_without_one_readable_value_is_an_error(etcd: Etcd, registry: EtcdRegistry) -> None:
    """An empty list would say that nothing is there."""
    etcd.put("/meshlib/services/orders/a", "what")
    resolver = registry.resolver("orders", {})
    with pytest.raises(EtcdError, match="1 keys for orders, and not one"):
        await resolver.resolve()
    etcd.instance("orders", "a", A)
    assert len((await resolver.resolve()).endpoints) == 1


async def test_large_service_comes_in_pages_of_one_revision(etcd: Etcd, registry: EtcdRegistry) -> None:
    """More than one page holds, while others write."""
    put = registry._client.put
    for number in range(0, 600, 10):
        await asyncio.gather(
            *(
                put(b"/meshlib/services/orders/%03d" % n, b'{"address":"10.1.0.1:%d"}' % (n + 1))
                for n in range(number, number + 10)
            )
        )
    async with watching(registry.resolver("orders", {})) as (seen,):
        await until(lambda: seen.endpoints is not None and len(seen.endpoints), 600)
    pages = [page async for page in registry._client.range(b"/meshlib/services/", b"/meshlib/services0")]
    assert [len(page.entries) for page in pages] == [250, 250, 100]
    assert len({page.revision for page in pages}) == 1


async def test_many_services_share_one_watch_and_one_range(etcd: Etcd, registry: EtcdRegistry) -> None:
    """The first four have their own; forty more cost one connection."""
    names = [f"s{n}" for n in range(44)]
    for name in names:
        etcd.instance(name, "a", A)
    async with watching(*(registry.resolver(name, {}) for name in names)) as seen:
        await until(lambda: [watcher.addresses for watcher in seen], [[A]] * 44)
        assert len(registry._feeds) == 5
        etcd.instance("s40", "b", B)
        etcd.instance("s1", "b", B)
        await until(lambda: (seen[40].addresses, seen[1].addresses, seen[41].addresses), ([A, B], [A, B], [A]))
        # Who comes later begins at the watch that runs.
        async with watching(registry.resolver("s43", {}), registry.resolver("s99", {})) as (late, empty):
            await until(lambda: (late.addresses, empty.addresses), ([A], []))
            etcd.instance("s99", "c", C)
            await until(lambda: empty.addresses, [C])
    await until(lambda: [feed._task for feed in registry._feeds.values()], [None] * 5)


async def test_silence_is_confirmed(etcd: Etcd, registry: EtcdRegistry, monkeypatch: Any) -> None:
    """By a question to the very member of the watch, so that old is told from unknown."""
    monkeypatch.setattr(feed_module.Feed.__init__, "__kwdefaults__", {"every": 0.1})
    async with watching(registry.resolver("orders", {})) as (seen,):
        await until(lambda: seen.confirmed >= 3)
    assert seen.errors == [] and len(seen.said) == seen.confirmed + 1


# ---------------------------------------------------------------- what becomes of etcd


async def test_killed_etcd_is_an_error_and_comes_back(etcd: Etcd, registry: EtcdRegistry) -> None:
    """With what happened meanwhile."""
    etcd.instance("orders", "a", A)
    async with watching(registry.resolver("orders", {})) as (seen,):
        await until(lambda: seen.addresses, [A])
        etcd.kill()
        await until(lambda: bool(seen.errors))
        assert all(isinstance(error, EtcdError) for error in seen.errors)
        etcd.start()
        etcd.instance("orders", "b", B)
        await until(lambda: seen.addresses, [A, B])


async def test_paused_etcd_is_noticed(etcd: Etcd, registry: EtcdRegistry, monkeypatch: Any) -> None:
    """Its connections stay open, and nothing comes."""
    monkeypatch.setattr(feed_module.Feed.__init__, "__kwdefaults__", {"every": 0.2})
    etcd.instance("orders", "a", A)
    async with watching(registry.resolver("orders", {})) as (seen,):
        await until(lambda: seen.addresses, [A])
        etcd.send(signal.SIGSTOP)
        await until(lambda: bool(seen.errors))
        assert "no answer within 3 s" in str(seen.errors[0])
        assert seen.addresses == [A]
        etcd.send(signal.SIGCONT)
        etcd.instance("orders", "b", B)
        await until(lambda: seen.addresses, [A, B])


async def test_etcd_that_lost_its_data_is_believed_by_its_own_count(etcd: Etcd, registry: EtcdRegistry) -> None:
    """Revisions begin anew there; versions go on rising."""
    for number in range(30):
        etcd.instance("orders", "a", A, weight=number + 1)
    async with watching(registry.resolver("orders", {})) as (seen,):
        await until(lambda: seen.addresses, [A])
        etcd.empty()
        await until(lambda: seen.addresses, [])
        etcd.instance("orders", "b", B)
        await until(lambda: seen.addresses, [B])


async def test_compaction_takes_nothing_away(etcd: Etcd, registry: EtcdRegistry) -> None:
    """A watch that runs isn't touched by it, and one that begins doesn't ask for history."""
    etcd.instance("orders", "a", A)
    async with watching(registry.resolver("orders", {})) as (seen,):
        await until(lambda: seen.addresses, [A])
        etcd.instance("orders", "b", B)
        etcd.compact()
        etcd.instance("orders", "c", C)
        await until(lambda: seen.addresses, [A, B, C])
        etcd.kill()
        await until(lambda: bool(seen.errors))
        etcd.start()
        etcd.delete("/meshlib/services/orders/a")
        etcd.compact()
        await until(lambda: seen.addresses, [B, C])


async def test_another_member_is_asked_when_one_is_away(etcd: Etcd, tmp_path: Path) -> None:
    """The first that answers is asked first from then on."""
    etcd.instance("orders", "a", A)
    made = open_registry({"urls": ["http://127.0.0.1:1", etcd.url], "timeout": "1s"})
    async with watching(made.resolver("orders", {})) as (seen,):
        await until(lambda: seen.addresses, [A])
    assert seen.errors == [] and made._client._members()[0] == etcd.url
    await made.close()


# ---------------------------------------------------------------- registration


def instance(**more: Any) -> Any:
    return meshlib.discover.Instance(**{"service": "orders", "id": "orders-1", "address": A, **more})


@contextlib.asynccontextmanager
async def kept(registration: Any) -> AsyncIterator[list[Exception]]:
    """As the mesh does it: again after a while when it raised."""
    errors: list[Exception] = []

    async def keep() -> None:
        while True:
            try:
                await registration.keep()
            except OSError as error:
                errors.append(error)
                await asyncio.sleep(0.05)

    task = asyncio.create_task(keep())
    try:
        yield errors
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


KEY = "/meshlib/services/orders/orders-1"


async def test_instance_is_there_as_long_as_it_is_kept(etcd: Etcd, registry: EtcdRegistry) -> None:
    """And out at once when it leaves."""
    registration = registry.register(instance(zone="eu", weight=2.0, labels={"v": "1"}, identity="spiffe://td/x"), {"ttl": "2s"})
    async with watching(registry.resolver("orders", {})) as (seen,):
        async with kept(registration) as errors:
            await until(lambda: seen.addresses, [A])
            await asyncio.sleep(3)
            assert (seen.addresses, seen.endpoints[A].zone, errors) == ([A], "eu", [])
        begun = time.monotonic()
        await registration.leave()
        await until(lambda: seen.addresses, [])
        assert time.monotonic() - begun < 1.5
    await registration.leave()


async def test_dead_process_is_out_when_its_lease_ends(etcd: Etcd, registry: EtcdRegistry) -> None:
    """Nobody has to clean up."""
    async with kept(registry.register(instance(), {"ttl": "2s"})):
        await until(etcd.all_keys, [KEY])
    await until(etcd.all_keys, [])


async def test_lost_entry_is_made_again(etcd: Etcd, registry: EtcdRegistry) -> None:
    """Deleted by hand, with its lease, or with all that etcd knew."""
    registration = registry.register(instance(), {"ttl": "2s"})
    async with kept(registration):
        await until(etcd.all_keys, [KEY])
        etcd.delete(KEY)
        await until(etcd.all_keys, [])
        await until(etcd.all_keys, [KEY])
        etcd.ask("lease/revoke", {"ID": registration._lease})
        await until(etcd.all_keys, [])
        await until(etcd.all_keys, [KEY])
        etcd.empty()
        await until(etcd.all_keys, [KEY])


async def test_short_outage_of_etcd_costs_no_second_lease(etcd: Etcd, registry: EtcdRegistry) -> None:
    """It is asked again while the lease lives, and what is left of it is taken up: also by who was stopped meanwhile."""
    registration = registry.register(instance(), {"ttl": "10s"})
    async with kept(registration) as errors:
        await until(etcd.all_keys, [KEY])
        lease = registration._lease
        etcd.kill()
        await asyncio.sleep(2.5)
        etcd.start()
        await asyncio.sleep(4)
        assert errors == []
    async with kept(registration):
        await asyncio.sleep(0.5)
        assert (etcd.all_keys(), registration._lease, len(etcd.ask("lease/leases", {})["leases"])) == ([KEY], lease, 1)


@contextlib.asynccontextmanager
async def swallowing(port: int, what: bytes) -> AsyncIterator[tuple[int, asyncio.Event]]:
    """A relay to etcd, and its port. Once the event is set, one question about `what` gets no answer, and its connection hangs."""
    may_hang = asyncio.Event()

    async def pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                if may_hang.is_set() and what in data:
                    may_hang.clear()
                    await asyncio.sleep(3600)
                writer.write(data)
                await writer.drain()
        writer.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection("127.0.0.1", port)
        with contextlib.suppress(asyncio.CancelledError):  # by the loop's end
            await asyncio.gather(pass_on(reader, back), pass_on(there, writer))

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1], may_hang
    finally:
        server.close()


async def test_question_that_hangs_costs_no_lease(etcd: Etcd, registry: EtcdRegistry) -> None:
    """With the timeout that is the default, which is longer than what is left: nobody who watches notices anything."""
    async with swallowing(etcd.port, b"lease/keepalive") as (port, may_hang):
        through = open_registry({"url": f"http://127.0.0.1:{port}"})
        registration = through.register(instance(), {"ttl": "5s"})
        async with watching(registry.resolver("orders", {})) as (seen,), kept(registration) as errors:
            await until(lambda: seen.addresses, [A])
            lease = registration._lease
            may_hang.set()
            end = time.monotonic() + 8.0
            while time.monotonic() < end:
                assert seen.addresses == [A]
                await asyncio.sleep(0.02)
            assert (may_hang.is_set(), errors, registration._lease) == (False, [], lease)
        await through.close()


async def test_member_that_hangs_does_not_keep_others_from_being_asked(etcd: Etcd) -> None:
    """It is given up before its time is over, and the next question begins with another member."""
    async with swallowing(etcd.port, b"lease/keepalive") as (port, may_hang):
        registry = open_registry({"urls": [f"http://127.0.0.1:{port}", etcd.url]})
        client = registry.register(instance(), {})._client
        lease, _ = await client.grant(10.0)
        may_hang.set()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.3):
                await client.keep_alive(lease)
        may_hang.set()
        async with asyncio.timeout(0.3):
            assert await client.keep_alive(lease) == 10.0
        await registry.close()


async def test_route_finds_an_instance_by_the_labels_of_its_register(etcd: Etcd, tmp_path: Path) -> None:
    """Labels and weight under `register` are what callers see of it: a route by label takes it, and no other instance."""

    def answering(name: bytes) -> Any:
        async def answer(server: Scripted, request: Request) -> bytes:
            return ok(name)

        return answer

    async def app(scope: object, receive: object, send: object) -> None: ...

    async with scripted(answering(b"v1")) as first, scripted(answering(b"v2")) as second:
        services = {
            "me": {},
            "orders": {
                "listen": second.address,
                "register": {"registry": "etcd", "labels": {"version": "v2"}, "weight": 3},
                "discover": "etcd",
                "route": [
                    {"match": {"path": {"prefix": "/new"}}, "backends": [{"labels": {"version": "v2"}}]},
                    {"backends": [{"labels": {"version": "v1"}}]},
                ],
            },
        }
        file = write_config(tmp_path, services, registries={"etcd": {"url": etcd.url, "cache": False}})
        await asyncio.to_thread(lambda: etcd.instance("orders", "old", first.address, labels={"version": "v1"}))
        server, caller = (meshlib.Mesh.load(file, service=service) for service in ("orders", "me"))
        try:
            server.asgi(app).way.rise()
            await asyncio.to_thread(caller.start)
            end = time.monotonic() + 10.0
            while len(found := caller.directory.endpoints("orders")) < 2:
                assert time.monotonic() < end, server.registrar.error or "it was not entered"
                await asyncio.sleep(0.02)
            (ours,) = (each for each in found if each.address == second.address)
            assert (ours.weight, dict(ours.labels)) == (3.0, {"version": "v2"})
            async with caller.client() as client:
                said = [(await client.get(f"http://orders/{path}")).content for path in ("new", "old", "new", "old")]
            assert said == [b"v2", b"v1", b"v2", b"v1"]
        finally:
            await asyncio.to_thread(server.close)
            await asyncio.to_thread(caller.close)


def test_what_nobody_could_read_is_not_registered() -> None:
    """The mistake is told where it was made."""
    made = open_registry({"url": "http://127.0.0.1:1"})
    for wrong in ({"address": "unix:/run/x.sock"}, {"address": "0.0.0.0:80"}, {"weight": -1.0}, {"weight": float("nan")}):
        with pytest.raises(meshlib.ConfigError, match="can't be registered in etcd"):
            made.register(instance(**wrong), {})
    with pytest.raises(meshlib.ConfigError, match="ttl must be a duration"):
        made.register(instance(), {"ttl": "1s"})
    for settings in ({"name": "a/b"}, {"nmae": "x"}):
        with pytest.raises(meshlib.ConfigError):
            made.register(instance(), settings)
        with pytest.raises(meshlib.ConfigError):
            made.resolver("orders", settings)


# ---------------------------------------------------------------- what stands beside it


def test_the_example_runs(etcd: Etcd) -> None:
    """As it is written in the README."""
    example = Path(__file__).parent.parent / "example.py"
    done = subprocess.run(
        [sys.executable, str(example), etcd.url], capture_output=True, text=True, timeout=60, check=False, cwd=example.parent
    )
    lines = done.stdout.splitlines()
    assert (done.returncode, done.stderr) == (0, "")
    assert lines[0] == "there are 0 endpoints" and lines[-2:] == ["127.0.0.1:8301 is gone", "127.0.0.1:8302 is gone"]
    assert sorted(lines[1:3]) == ["127.0.0.1:8301 is there, in zone eu-1a", "127.0.0.1:8302 is there, in zone eu-1a"]


def test_the_configuration_beside_the_example_is_whole() -> None:
    """It loads, and its registry opens."""
    config = meshlib.config.load(Path(__file__).parent.parent / "mesh.yaml", service="storefront")
    policy = config.registries["etcd"]
    assert isinstance(open_plugin(policy.plugin, policy.settings), EtcdRegistry)
