"""Which server does a call come to, over real sockets: by its key, its session, its labels, its zone, and what servers report?

Every test has servers that answer with their own address. Most run with an async client, a blocking one, and an httpx client of the
application's own on the mesh's transport.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

import meshlib
from meshlib.call import Peer
from tests.server.inside import Caller, http_scope
from tests.support import Request, Scripted, in_order, mesh_of, ok, scripted, write_config

CLIENTS = pytest.mark.parametrize("client", ["async", "blocking", "transport"])
HASHING = pytest.mark.parametrize("policy", ["ring_hash", "maglev"])
KEYS = [f"key-{number}" for number in range(24)]
# An endpoint that was lost is asked again soon, and gets all of its share at once.
SOON = {"breaker": {"open": ["10ms", "20ms"]}}

Get = Callable[..., Any]


@contextlib.asynccontextmanager
async def caller(mesh: meshlib.Mesh, client: str, **options: Any) -> AsyncIterator[Get]:
    """`await get(path, ...)` with one of the clients; the blocking one is on a thread, since the servers are on this one."""
    if client == "blocking":
        with mesh.sync_client(**options) as blocking:

            async def get(path: str = "/", **more: Any) -> httpx.Response:
                return await asyncio.to_thread(blocking.get, f"http://orders{path}", **more)

            yield get
    else:
        made = mesh.client(**options) if client == "async" else httpx.AsyncClient(transport=mesh.transport(), **options)
        async with made as http:

            async def get_async(path: str = "/", **more: Any) -> httpx.Response:
                return await http.get(f"http://orders{path}", **more)

            yield get_async


async def own_name(server: Scripted, request: Request) -> bytes:
    return ok(server.address.encode())


@contextlib.asynccontextmanager
async def fleet(size: int, answer: Any = own_name) -> AsyncIterator[list[Scripted]]:
    async with contextlib.AsyncExitStack() as stack:
        yield [await stack.enter_async_context(scripted(answer)) for _ in range(size)]


def orders(servers: list[Scripted], balance: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {
        "orders": {
            "discover": {"static": [server.address for server in servers]},
            "balance": {"slow_start": "0s", **balance},
            **more,
        }
    }


def story(answer: httpx.Response) -> str:
    text: str = answer.extensions["meshlib.call"].explain()
    return text


def rows(mesh: meshlib.Mesh) -> dict[str, dict[str, Any]]:
    return {row["endpoint"]: row for row in mesh.engine.stats(time.monotonic())}


# ------------------------------------------------------------------ keys

WAYS: dict[str, Callable[[str], tuple[str, dict[str, Any]]]] = {
    "header": lambda key: ("/", {"headers": {"X-User": key}}),
    "cookie": lambda key: ("/", {"headers": {"cookie": f"a=b; session={key}; c=d"}}),
    "path": lambda key: (f"/users/{key}/cart", {}),
    "own": lambda key: ("/", {"extensions": meshlib.policy(key=key)}),
}
PARTS: dict[str, Any] = {"header": "x-user", "cookie": "session", "path": "id", "own": "x-nothing"}


def keyed(servers: list[Scripted], policy: str, part: str, **more: Any) -> dict[str, Any]:
    kind = "header" if part == "own" else part
    balance = {"policy": policy, "hash_on": [{kind: PARTS[part]}]}
    routes = [{"match": {"path": {"template": "/users/{id}/cart"}}}, {}] if part == "path" else [{}]
    return orders(servers, balance, route=routes, **more)


@CLIENTS
@HASHING
@pytest.mark.parametrize("part", list(WAYS))
async def test_a_key_has_one_home(tmp_path: Path, client: str, policy: str, part: str) -> None:
    """The same key always comes to the same server, and different ones are spread over all."""
    async with fleet(3) as servers:
        with mesh_of(tmp_path, keyed(servers, policy, part)) as mesh:
            async with caller(mesh, client) as get:
                homes: dict[str, set[str]] = {key: set() for key in KEYS}
                for _ in range(3):
                    for key in KEYS:
                        path, more = WAYS[part](key)
                        homes[key].add((await get(path, **more)).text)
                assert {len(found) for found in homes.values()} == {1}
                assert {address for found in homes.values() for address in found} == {server.address for server in servers}
                path, more = WAYS[part](KEYS[0])
                text = story(await get(path, **more))
                assert f"balance     {policy}" in text
                assert "its key has its home here" in text


@HASHING
async def test_all_processes_send_a_key_to_the_same_home(tmp_path: Path, policy: str) -> None:
    """The hash is of the key and the addresses, and of nothing that a process makes up."""
    async with fleet(4) as servers:
        found = []
        for _ in range(2):
            with mesh_of(tmp_path, keyed(servers, policy, "header")) as mesh:
                async with caller(mesh, "async") as get:
                    found.append([(await get("/", headers={"x-user": key})).text for key in KEYS])
        assert found[0] == found[1]


@CLIENTS
@HASHING
async def test_a_key_moves_when_its_home_is_gone_and_returns_with_it(tmp_path: Path, client: str, policy: str) -> None:
    """One server stands in for it, those of other homes stay, and once the home answers again it has its keys back."""
    async with fleet(3) as servers:
        with mesh_of(tmp_path, keyed(servers, policy, "header", admit=SOON)) as mesh:
            async with caller(mesh, client) as get:

                async def homes() -> dict[str, str]:
                    return {key: (await get("/", headers={"x-user": key})).text for key in KEYS}

                before = await homes()
                lost = next(server for server in servers if server.address == before[KEYS[0]])
                port = lost.port
                await lost.stop()
                # The first call finds out, and is sent again.
                text = story(await get("/", headers={"x-user": KEYS[0]}))
                assert f"it stands in for {lost.address}, the home of its key, which was tried already" in text
                during = await homes()
                assert during == await homes()
                moved = {key for key in KEYS if before[key] != during[key]}
                assert moved == {key for key in KEYS if before[key] == lost.address}
                await lost.start(port)
                end = time.monotonic() + 5
                while rows(mesh)[lost.address]["breaker"] != "closed" and time.monotonic() < end:
                    await homes()
                assert await homes() == before


@HASHING
async def test_a_home_with_too_much_in_flight_sends_calls_on(tmp_path: Path, policy: str) -> None:
    """`hash_bound` 1.25: a quarter more than the mean; without it everything stays at home."""
    free = asyncio.Event()

    async def held(server: Scripted, request: Request) -> bytes:
        await free.wait()
        return ok(server.address.encode())

    for bound in (1.25, 0):
        free.clear()
        async with fleet(3, held) as servers:
            balance = {"policy": policy, "hash_on": [{"header": "x-user"}], "hash_bound": bound}
            with mesh_of(tmp_path, orders(servers, balance)) as mesh:
                async with caller(mesh, "async") as get:
                    calls = []
                    for count in range(1, 13):
                        calls.append(asyncio.create_task(get("/", headers={"x-user": "one"})))
                        while sum(len(server.requests) for server in servers) < count:
                            await asyncio.sleep(0.001)
                    free.set()
                    answers = await asyncio.gather(*calls)
                    most = Counter(answer.text for answer in answers).most_common(1)[0][1]
                    assert (most <= 8) == (bound > 0)
                    told = ["which has too much in flight" in story(answer) for answer in answers]
                    assert any(told) == (bound > 0)


@HASHING
async def test_a_call_without_its_key_goes_anywhere(tmp_path: Path, policy: str) -> None:
    """It isn't refused, and doesn't pile up on one server."""
    async with fleet(3) as servers:
        with mesh_of(tmp_path, keyed(servers, policy, "header")) as mesh:
            async with caller(mesh, "async") as get:
                assert len({(await get("/")).text for _ in range(60)}) == 3


@HASHING
async def test_a_key_has_a_home_among_the_endpoints_that_a_call_asks_for(tmp_path: Path, policy: str) -> None:
    """Labels first, then the key; the keys are spread over all that carry them."""
    async with fleet(4) as servers:
        services = orders(servers, {"policy": policy, "hash_on": [{"header": "x-user"}]})
        services["orders"]["discover"] = {
            "static": [
                {"address": server.address, "labels": {"version": "v1" if place == 0 else "v2"}}
                for place, server in enumerate(servers)
            ]
        }
        with mesh_of(tmp_path, services) as mesh:
            async with caller(mesh, "async") as get:
                homes: dict[str, set[str]] = {key: set() for key in KEYS}
                for _ in range(3):
                    for key in KEYS:
                        terms = meshlib.policy(key=key, labels={"version": "v2"})
                        homes[key].add((await get("/", extensions=terms)).text)
                assert {len(found) for found in homes.values()} == {1}
                assert set.union(*homes.values()) == {server.address for server in servers[1:]}


@HASHING
@pytest.mark.parametrize("client", ["async", "blocking"])
async def test_calls_of_a_handler_have_the_home_of_its_caller(tmp_path: Path, client: str, policy: str) -> None:
    """On whose behalf a call is made is what the connection of our own caller has proved."""
    async with fleet(4) as servers:
        services = orders(servers, {"policy": policy, "hash_on": [{"peer": True}]})
        with mesh_of(tmp_path, services) as mesh:
            async with caller(mesh, client) as get:

                async def handler(scope: Any, receive: Any, send: Any) -> None:
                    answer = await get("/")
                    await send({"type": "http.response.start", "status": 200, "headers": []})
                    await send({"type": "http.response.body", "body": answer.content})

                app = mesh.asgi(handler)

                async def home(name: str) -> bytes:
                    server = Caller()
                    peer = Peer(f"spiffe://shop.internal/ns/default/sa/{name}", is_tls=True)
                    await app(http_scope("/", peer=peer), server.receive, server.send)
                    return server.body

                found = {key: {await home(key) for _ in range(5)} for key in KEYS}
                assert {len(homes) for homes in found.values()} == {1}
                # Ports are by chance, so that one of four may have no key of these.
                assert len(set.union(*found.values())) > 1


# ------------------------------------------------------------------ sessions

STICKY = {"policy": "round_robin", "sticky": {"cookie": "at"}}


@CLIENTS
async def test_a_client_with_a_cookie_jar_stays_at_its_endpoint(tmp_path: Path, client: str) -> None:
    """The first answer sets the cookie, the others don't, and a second client has a session of its own."""
    async with fleet(3) as servers:
        with mesh_of(tmp_path, orders(servers, STICKY)) as mesh:
            async with caller(mesh, client) as get, caller(mesh, client) as other:
                answers = [await get("/") for _ in range(6)]
                assert len({answer.text for answer in answers}) == 1
                assert re.fullmatch(r"at=[0-9a-f]{16}; Path=/; HttpOnly; SameSite=Lax", answers[0].headers["set-cookie"])
                assert ["set-cookie" in answer.headers for answer in answers[1:]] == [False] * 5
                assert "the caller's session belongs here" in story(answers[1])
                mine = {(await other("/")).text for _ in range(6)}
                assert len(mine) == 1 and mine != {answers[0].text}


@CLIENTS
async def test_a_session_header_is_brought_back(tmp_path: Path, client: str) -> None:
    """For clients without a cookie jar: the value of the answer's header goes with the next request."""
    async with fleet(3) as servers:
        services = orders(servers, {"policy": "round_robin", "sticky": {"header": "x-session"}})
        with mesh_of(tmp_path, services) as mesh:
            async with caller(mesh, client) as get:
                first = await get("/")
                assert re.fullmatch("[0-9a-f]{16}", first.headers["x-session"])
                assert "set-cookie" not in first.headers
                later = [await get("/", headers={"x-session": first.headers["x-session"]}) for _ in range(5)]
                assert {answer.text for answer in later} == {first.text}
                assert ["x-session" in answer.headers for answer in later] == [False] * 5
                assert len({(await get("/")).text for _ in range(3)}) == 3


@CLIENTS
async def test_a_session_moves_once_when_its_endpoint_dies(tmp_path: Path, client: str) -> None:
    """The call is answered by another, with a new cookie in the same answer; from then on the client stays there."""
    async with fleet(3) as servers:
        with mesh_of(tmp_path, orders(servers, STICKY, admit={"breaker": {"open": ["60s", "60s"]}})) as mesh:
            async with caller(mesh, client) as get:
                first = await get("/")
                await next(server for server in servers if server.address == first.text).stop()
                moved = await get("/")
                assert (moved.status_code, moved.text != first.text) == (200, True)
                assert moved.headers["set-cookie"].startswith("at=")
                assert moved.headers["set-cookie"] != first.headers["set-cookie"]
                later = [await get("/") for _ in range(5)]
                assert {answer.text for answer in later} == {moved.text}
                assert ["set-cookie" in answer.headers for answer in later] == [False] * 5


@CLIENTS
@pytest.mark.parametrize(
    "cookie",
    [
        "at=", "at", "at=zzzzzzzzzzzzzzzz", "at=0123456789abcdef", "at=+123456789abcdef", "at=" + "f" * 4000, "at=127.0.0.1:1",
        "at=%00%0d%0aset-cookie:x=y", "=;;at=;at=", 'at="0123456789abcdef"', "at=ffffffffffffffff; at=0000000000000000",
    ],
)  # fmt: skip
async def test_a_forged_cookie_is_as_good_as_none(tmp_path: Path, client: str, cookie: str) -> None:
    """It is balanced like a new client, and gets a cookie that is right."""
    async with fleet(2) as servers:
        with mesh_of(tmp_path, orders(servers, STICKY)) as mesh:
            async with caller(mesh, client) as get:
                answers = [await get("/", headers={"cookie": cookie}) for _ in range(4)]
                assert {answer.text for answer in answers} == {server.address for server in servers}
                for answer in answers:
                    (line,) = answer.headers.get_list("set-cookie")
                    assert re.fullmatch(r"at=[0-9a-f]{16}; Path=/; HttpOnly; SameSite=Lax", line)


async def test_a_cookie_of_the_application_stays_beside_the_session(tmp_path: Path) -> None:
    """The answer's own Set-Cookie is kept, and both come back."""

    async def with_cookie(server: Scripted, request: Request) -> bytes:
        return ok(server.address.encode(), "set-cookie: theme=dark; Path=/")

    async with fleet(3, with_cookie) as servers:
        with mesh_of(tmp_path, orders(servers, STICKY)) as mesh:
            async with caller(mesh, "async") as get:
                first = await get("/")
                assert len(first.headers.get_list("set-cookie")) == 2
                assert (await get("/")).text == first.text
                server = next(server for server in servers if server.address == first.text)
                assert "theme=dark" in server.requests[1].headers["cookie"]


@pytest.mark.parametrize("client", ["async", "blocking"])
async def test_a_session_holds_for_a_stream(tmp_path: Path, client: str) -> None:
    """The cookie comes with the head of a streamed answer, too."""
    async with fleet(3) as servers:
        with mesh_of(tmp_path, orders(servers, STICKY)) as mesh:
            seen = []
            if client == "async":
                async with mesh.client() as http:
                    for _ in range(4):
                        async with http.stream("GET", "http://orders/") as answer:
                            seen.append(((await answer.aread()).decode(), "set-cookie" in answer.headers))
            else:

                def work() -> None:
                    with mesh.sync_client() as http:
                        for _ in range(4):
                            with http.stream("GET", "http://orders/") as answer:
                                seen.append((answer.read().decode(), "set-cookie" in answer.headers))

                await asyncio.to_thread(work)
            assert seen == [(seen[0][0], True), *[(seen[0][0], False)] * 3]


# ------------------------------------------------------------------ labels


def labelled(servers: list[Scripted], **more: Any) -> dict[str, Any]:
    """The first server is v1, the others are v2."""
    static = [
        {"address": server.address, "labels": {"version": "v1" if place == 0 else "v2", "track": "stable"}}
        for place, server in enumerate(servers)
    ]
    return {"orders": {"discover": {"static": static}, "balance": {"policy": "round_robin", "slow_start": "0s"}, **more}}


@CLIENTS
async def test_labels_of_a_call_are_kept_to(tmp_path: Path, client: str) -> None:
    """Only v2 is asked, all of it; without labels everybody is."""
    async with fleet(3) as servers:
        with mesh_of(tmp_path, labelled(servers)) as mesh:
            async with caller(mesh, client) as get:
                answers = [await get("/", extensions=meshlib.policy(labels={"version": "v2"})) for _ in range(6)]
                assert Counter(answer.text for answer in answers) == {servers[1].address: 3, servers[2].address: 3}
                assert "version=v2" in story(answers[0])
                both = meshlib.policy(labels={"version": "v1", "track": "stable"})
                assert {(await get("/", extensions=both)).text for _ in range(3)} == {servers[0].address}
                assert len({(await get("/")).text for _ in range(6)}) == 3


@CLIENTS
async def test_labels_that_nobody_carries_are_refused_with_their_names(tmp_path: Path, client: str) -> None:
    """NoEndpoint, before anything is sent; whoever reads it learns which labels they were."""
    async with fleet(2) as servers:
        with mesh_of(tmp_path, labelled(servers)) as mesh:
            async with caller(mesh, client) as get:
                with pytest.raises(meshlib.NoEndpoint) as caught:
                    await get("/", extensions=meshlib.policy(labels={"version": "v3"}))
                assert isinstance(caught.value, httpx.ConnectError)
                assert caught.value.reason == "balance.no_endpoints"
                assert "'orders'" in str(caught.value) or '"orders"' in str(caught.value)
                assert "version=v3" in str(caught.value)
                assert caught.value.hint
                assert "version=v3" in caught.value.call.explain()
            assert [len(server.requests) for server in servers] == [0, 0]


async def test_a_retry_keeps_to_the_labels_of_its_call(tmp_path: Path) -> None:
    """With the only v1 gone the call fails, rather than being answered by a v2."""
    async with fleet(3) as servers:
        with mesh_of(tmp_path, labelled(servers, retry={"attempts": 2})) as mesh:
            await servers[0].stop()
            async with caller(mesh, "async") as get:
                for _ in range(3):
                    with pytest.raises(meshlib.MeshError):
                        await get("/", extensions=meshlib.policy(labels={"version": "v1"}))
            assert [len(server.requests) for server in servers] == [0, 0, 0]


# ------------------------------------------------------------------ weights from load reports


class Loaded:
    """A server that says how busy it is."""

    def __init__(self, report: str) -> None:
        self.report = report

    async def __call__(self, server: Scripted, request: Request) -> bytes:
        return ok(server.address.encode(), f"endpoint-load-metrics: TEXT {self.report}")


@CLIENTS
async def test_calls_go_where_the_reports_say_that_there_is_room(tmp_path: Path, client: str) -> None:
    """Three times the requests a second at the same utilisation is three times the weight."""
    reports = ["rps_fractional=300,application_utilization=0.5", "rps_fractional=100.0, application_utilization=0.5"]
    async with scripted(Loaded(reports[0])) as strong, scripted(Loaded(reports[1])) as weak:
        balance = {"policy": "round_robin", "weights": "orca", "orca": {"blackout": "0s", "expiry": "1h"}}
        with mesh_of(tmp_path, orders([strong, weak], balance)) as mesh:
            async with caller(mesh, client) as get:
                for _ in range(8):
                    await get("/")
                assert (len(strong.requests), len(weak.requests)) == (4, 4)
                mesh.engine.tend(time.monotonic())
                hits = Counter([(await get("/")).text for _ in range(80)])
                assert hits[strong.address] == pytest.approx(60, abs=2)


@CLIENTS
async def test_endpoints_are_asked_for_reports_where_they_count(tmp_path: Path, client: str) -> None:
    """Once, in our format and not in one that the application handed on; and where nobody weighs by them, what it says goes out."""

    async def answer(server: Scripted, request: Request) -> bytes:
        return ok(request.headers.get("endpoint-load-metrics-format", "-").encode())

    async with scripted(answer) as server:
        for weights, found in (("orca", ["text", "text"]), ("discover", ["-", "JSON"])):
            with mesh_of(tmp_path, orders([server], {"policy": "round_robin", "weights": weights})) as mesh:
                async with caller(mesh, client) as get:
                    answers = [await get("/"), await get("/", headers={"Endpoint-Load-Metrics-Format": "JSON"})]
                    assert [answer.text for answer in answers] == found


async def test_reports_that_make_no_sense_change_nothing(tmp_path: Path) -> None:
    """A broken or hostile server can't draw the traffic, nor break a call."""
    words = [
        "TEXT",
        "JSON {",
        "BIN !!!",
        "TEXT rps_fractional=nan,application_utilization=0.1",
        "TEXT =,=",
        "\xff",
        "TEXT rps_fractional=-1",
    ]
    turn = iter(range(1000))

    async def nonsense(server: Scripted, request: Request) -> bytes:
        return f"HTTP/1.1 200 OK\r\ncontent-length: 0\r\nendpoint-load-metrics: {words[next(turn) % 7]}\r\n\r\n".encode("latin-1")

    async with scripted(nonsense) as one, scripted(nonsense) as two:
        balance = {"policy": "round_robin", "weights": "orca", "orca": {"blackout": "0s", "expiry": "1h"}}
        with mesh_of(tmp_path, orders([one, two], balance)) as mesh:
            async with caller(mesh, "async") as get:
                for _ in range(28):
                    assert (await get("/")).status_code == 200
                    mesh.engine.tend(time.monotonic())
        assert (len(one.requests), len(two.requests)) == (14, 14)


# ------------------------------------------------------------------ zones


@contextlib.contextmanager
def zoned(folder: Path, where: list[tuple[Scripted, str]], balance: dict[str, Any], *, zone: str | None, **more: Any) -> Any:
    """A mesh of a process that runs in `zone`."""
    static = [{"address": server.address, "zone": name} for server, name in where]
    services = {"me": {}, "orders": {"discover": {"static": static}, "balance": {"slow_start": "0s", **balance}, **more}}
    with in_order():
        mesh = meshlib.Mesh.load(write_config(folder, services), service="me", zone=zone)
    try:
        yield mesh
    finally:
        mesh.close()


@CLIENTS
async def test_failover_leaves_the_zone_only_when_it_is_lost(tmp_path: Path, client: str) -> None:
    """All calls stay in zone a; when both of its endpoints are gone, those of the next zone in the list take over."""
    async with fleet(4) as servers:
        where = [(servers[0], "a"), (servers[1], "a"), (servers[2], "b"), (servers[3], "c")]
        balance = {"locality": "failover", "zones": ["c", "b"]}
        # Both may be asked in vain before a third.
        more = {"admit": {"breaker": {"open": ["60s", "60s"]}}, "retry": {"attempts": 2}}
        with zoned(tmp_path, where, balance, zone="a", **more) as mesh:
            async with caller(mesh, client) as get:
                answers = [await get("/") for _ in range(20)]
                assert {answer.text for answer in answers} == {servers[0].address, servers[1].address}
                assert "zone a" in story(answers[0])
                await servers[0].stop()
                await servers[1].stop()
                for _ in range(10):
                    assert (await get("/")).text not in {servers[0].address, servers[1].address}
                assert {(await get("/")).text for _ in range(20)} == {servers[3].address}


@pytest.mark.parametrize("client", ["async", "blocking"])
async def test_zone_aware_keeps_calls_in_their_zone_where_it_can_carry_them(tmp_path: Path, client: str) -> None:
    """From six endpoints on; a zone of the same share as ours in the whole keeps everything."""
    async with fleet(6) as servers:
        where = [(server, "a" if place < 3 else "b") for place, server in enumerate(servers)]
        with zoned(tmp_path, where, {}, zone="a") as mesh:
            async with caller(mesh, client) as get:
                hits = Counter([(await get("/")).text for _ in range(60)])
                assert set(hits) <= {server.address for server in servers[:3]}
        with zoned(tmp_path, where, {}, zone="") as mesh:
            async with caller(mesh, client) as get:
                hits = Counter([(await get("/")).text for _ in range(60)])
                assert set(hits) & {server.address for server in servers[3:]}


async def test_the_environment_says_where_a_process_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """MESHLIB_ZONE, unless the code says otherwise."""
    monkeypatch.setenv("MESHLIB_ZONE", "b")
    async with fleet(2) as servers:
        where = [(servers[0], "a"), (servers[1], "b")]
        for zone, home in ((None, 1), ("a", 0)):
            with zoned(tmp_path, where, {"locality": "failover"}, zone=zone) as mesh:
                async with caller(mesh, "async") as get:
                    assert {(await get("/")).text for _ in range(20)} == {servers[home].address}


async def test_a_call_may_wish_for_a_zone_of_its_own(tmp_path: Path) -> None:
    """`policy(zone=)` comes before where the process runs."""
    async with fleet(2) as servers:
        where = [(servers[0], "a"), (servers[1], "b")]
        with zoned(tmp_path, where, {"locality": "failover"}, zone="a") as mesh:
            async with caller(mesh, "async") as get:
                wish = meshlib.policy(zone="b")
                assert {(await get("/", extensions=wish)).text for _ in range(10)} == {servers[1].address}
