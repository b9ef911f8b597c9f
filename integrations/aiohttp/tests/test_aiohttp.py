"""Does a session on the mesh do what a session does, and what the mesh does? Real servers, and plain aiohttp beside it."""

from __future__ import annotations

import asyncio
import copy
import pickle
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import aiohttp
import httpx
import meshlib_aiohttp
import pytest

import meshlib
from integrations.aiohttp.tests.common import (
    EACH,
    EXAMPLE,
    MESHLIB,
    PATH,
    at,
    counted,
    die,
    everything,
    full,
    hello,
    in_flight,
    settled,
)
from tests.support import (
    PYTHON,
    Request,
    Scripted,
    free_port,
    identities,
    mesh_of,
    ok,
    process,
    scripted,
    wait_until_listening,
    write_config,
)


async def test_a_call_goes_to_a_service_and_tells_its_story(tmp_path: Path) -> None:
    """The name in the URL is the Service, and https is refused where it is called in plain text. A hundred calls take one connection."""
    async with scripted(hello) as server:
        with mesh_of(tmp_path, at(server)) as mesh:
            async with meshlib_aiohttp.session(mesh, base_url="http://orders/") as http:
                async with http.get("/items/7", params={"q": "x"}) as answer:
                    assert (answer.status, await answer.text()) == (200, "hello from /items/7?q=x")
                    call = meshlib_aiohttp.call_of(answer)
                assert call is not None
                assert (call.service, call.attempts, server.address in call.explain()) == ("orders", 1, True)
                with pytest.raises(meshlib.Denied, match="promises TLS"):
                    await http.get("https://orders/")
                assert server.requests[0].headers["host"] == "orders"
                assert 0 < int(server.requests[0].headers["x-mesh-deadline-ms"]) <= 15000
                for _ in range(100):
                    async with http.get("/") as answer:
                        assert await answer.read() == b"hello from /"
            assert (server.connections, in_flight(mesh)) == (1, 0)


async def test_a_connection_is_used_again_after_a_body_that_was_read(tmp_path: Path) -> None:
    """However it is framed, and also if its reader stops with the last byte."""

    async def large(server: Scripted, request: Request) -> bytes:
        if request.target == "/chunks":
            return b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n" + b"30d40\r\n" + b"x" * 200_000 + b"\r\n0\r\n\r\n"
        return ok(b"x" * 200_000)

    async with scripted(large) as server:
        with mesh_of(tmp_path, at(server)) as mesh:
            async with meshlib_aiohttp.session(mesh) as http:
                for _ in range(3):
                    async with http.post("http://orders/") as answer:
                        assert len(await answer.read()) == 200_000
                    async with http.post("http://orders/chunks") as answer:
                        assert len(await answer.read()) == 200_000
                    async with http.post("http://orders/") as answer:
                        assert len(await answer.content.readexactly(200_000)) == 200_000
            assert (server.connections, in_flight(mesh)) == (1, 0)


async def test_events_are_there_when_they_come(tmp_path: Path) -> None:
    """Nothing is held back, and a session that is closed closes the mesh's connections too."""
    go_on = asyncio.Event()

    async def events(server: Scripted, request: Request) -> bytes:
        (writer,) = server._writers
        writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n4\r\none\n\r\n")
        await go_on.wait()
        return b"4\r\ntwo\n\r\n0\r\n\r\n"

    async with scripted(events) as server:
        with mesh_of(tmp_path, at(server)) as mesh:
            async with meshlib_aiohttp.session(mesh) as http, http.get("http://orders/") as answer:
                assert await answer.content.readline() == b"one\n"
                go_on.set()
                assert await answer.content.read() == b"two\n"
            for _ in range(100):
                if not server._writers:
                    break
                await asyncio.sleep(0.01)
            assert not server._writers


async def test_a_body_is_read_to_its_end_even_if_that_comes_late() -> None:
    """As in HTTP/2, where the end may be a frame of its own: a stream that is given up costs its connection."""
    ends: list[str] = []

    class Late(httpx.AsyncByteStream):
        async def __aiter__(self) -> AsyncIterator[bytes]:
            yield b"all of it"
            await asyncio.sleep(0.05)
            ends.append("end")

        async def aclose(self) -> None:
            ends.append("close")

    class Way(httpx.AsyncBaseTransport):
        async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
            return httpx.Response(200, headers={"content-length": "9"}, stream=Late())

    mesh: Any = SimpleNamespace(service_of=str, transport=Way)
    async with meshlib_aiohttp.session(mesh) as http, http.get("http://orders/") as answer:
        assert await answer.read() == b"all of it"
    await asyncio.sleep(0)
    assert ends == ["end", "close"]


async def test_a_killed_endpoint_and_a_503_are_tried_elsewhere(tmp_path: Path) -> None:
    """A refused connection for every method, a lost answer and a 503 for the idempotent ones."""

    async def busy(server: Scripted, request: Request) -> bytes:
        return b"HTTP/1.1 503 Service Unavailable\r\ncontent-length: 0\r\n\r\n"

    async with scripted(busy) as one, scripted(hello) as two, scripted(die) as three:
        services = at(one, two, balance=EACH) | {
            "dead": {"discover": {"static": [f"127.0.0.1:{free_port()}", two.address]}, "balance": EACH}
        }
        services |= {"broken": {"discover": {"static": [three.address, two.address]}, "balance": EACH}}
        with mesh_of(tmp_path, services) as mesh:
            async with meshlib_aiohttp.session(mesh, raise_for_status=True) as http:
                for _ in range(10):
                    await (await http.get("http://orders/")).read()
                    await (await http.post("http://dead/", data="x")).read()
                    await (await http.get("http://broken/")).read()
            assert in_flight(mesh) == 0
        assert one.requests
        assert three.requests


async def test_an_endpoint_that_is_killed_is_not_noticed(tmp_path: Path) -> None:
    """Its connections break and its port refuses; the calls go on."""
    async with scripted(hello) as one, scripted(hello) as two:
        with mesh_of(tmp_path, at(one, two, balance=EACH)) as mesh:
            async with meshlib_aiohttp.session(mesh, raise_for_status=True) as http:
                for number in range(40):
                    if number == 10:
                        await one.stop()
                    await (await http.get("http://orders/")).read()
            assert in_flight(mesh) == 0
        assert one.requests
        assert len(one.requests) + len(two.requests) == 40


async def test_only_the_mesh_sends_again(tmp_path: Path) -> None:
    """A POST that was written is not sent twice; aiohttp's own second try of a GET is none of a service's; a caller's own is."""
    async with scripted(die) as server:
        with mesh_of(tmp_path, at(server)) as mesh:
            async with meshlib_aiohttp.session(mesh) as http:
                with pytest.raises(aiohttp.ServerDisconnectedError) as caught:
                    await http.post("http://orders/", data=b"x")
                assert isinstance(caught.value, meshlib.ConnectionLost)
                assert "not idempotent" in meshlib_aiohttp.call_of(caught.value).explain()  # type: ignore[union-attr]
                assert len(server.requests) == 1
                for expected in (3, 5):
                    with pytest.raises(aiohttp.ServerDisconnectedError) as caught:
                        await http.get("http://orders/")
                    assert isinstance(caught.value, meshlib.ConnectionLost)
                    assert caught.value.call is not None
                    assert len(server.requests) == expected

                async def twice(request: aiohttp.ClientRequest, handler: Any) -> Any:
                    try:
                        return await handler(request)
                    except aiohttp.ServerDisconnectedError:
                        return await handler(request)

                with pytest.raises(aiohttp.ServerDisconnectedError):
                    await http.get("http://orders/", middlewares=[twice])
                assert len(server.requests) == 9
            async with meshlib_aiohttp.session(mesh, extensions=meshlib.policy(idempotent=True)) as http:
                with pytest.raises(aiohttp.ServerDisconnectedError):
                    await http.post("http://orders/", data=b"x")
                assert len(server.requests) == 11
            assert in_flight(mesh) == 0


async def test_a_body_that_was_written_at_once_can_be_sent_again(tmp_path: Path) -> None:
    """Bytes, a form, a large body, a short stream; a stream beyond 64 KiB can't, and the caller is told."""
    count = 0

    async def every_other(server: Scripted, request: Request) -> bytes | None:
        nonlocal count
        count += 1
        return None if count % 2 else ok(str(len(request.body)).encode())

    async with scripted(every_other) as server:
        with mesh_of(tmp_path, at(server, retry={"idempotency_key": True})) as mesh:
            async with meshlib_aiohttp.session(mesh, headers={"Idempotency-Key": "k"}) as http:
                for data in (b"x" * 10, b"x" * 900_000, {"a": "b"}, counted(3)):
                    async with http.put("http://orders/", data=data) as answer:
                        assert int(await answer.text()) == len(server.requests[-2].body) > 0
                with pytest.raises(aiohttp.ServerDisconnectedError):
                    await http.put("http://orders/", data=counted(7))
            assert in_flight(mesh) == 0


async def test_a_slow_peer_stops_the_writer_and_a_slow_reader_stops_the_peer(tmp_path: Path) -> None:
    """Flow control in both directions: neither side gathers what the other doesn't take."""
    drawn, sent, go_on = 0, 0, asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        head = await reader.readuntil(b"\r\n\r\n")
        if head.startswith(b"POST"):
            await go_on.wait()
            end = b""
            while end != b"\r\n0\r\n\r\n":
                end = (end + await reader.read(1 << 16))[-7:]
            writer.write(ok())
        else:
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 64000000\r\n\r\n")
            for _ in range(640):
                writer.write(b"x" * 100_000)
                await writer.drain()
                sent += 100_000
        await writer.drain()
        writer.close()

    async def endless() -> AsyncIterator[bytes]:
        nonlocal drawn
        for _ in range(640):
            drawn += 100_000
            yield b"x" * 100_000

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    with mesh_of(tmp_path, at(address)) as mesh:
        async with meshlib_aiohttp.session(mesh) as http:
            upload = asyncio.create_task(http.post("http://orders/", data=endless()))
            before = -1
            while drawn != before:
                before = drawn
                await asyncio.sleep(0.2)
            assert 0 < drawn < 32_000_000
            go_on.set()
            assert (await (await upload).read(), drawn) == (b"ok", 64_000_000)
            async with http.get("http://orders/") as answer:
                before = -1
                while sent != before:
                    before = sent
                    await asyncio.sleep(0.2)
                assert 0 < sent < 32_000_000
                assert len(await answer.read()) == 64_000_000
        assert in_flight(mesh) == 0
    server.close()


async def test_a_mistake_in_an_upload_ends_the_call(tmp_path: Path) -> None:
    """aiohttp tells it as it ever did, and nothing stays behind."""

    async def broken() -> AsyncIterator[bytes]:
        yield b"x" * 100_000
        await asyncio.sleep(0)
        raise LookupError("mine")

    async def do(http: aiohttp.ClientSession, base: str) -> Any:
        with pytest.raises(aiohttp.ClientConnectionError, match="mine") as caught:
            await http.post(base + "/items", data=broken())
        return type(caught.value), type(caught.value.__cause__)

    async with everything() as port:
        with mesh_of(tmp_path, at(f"127.0.0.1:{port}")) as mesh:
            async with aiohttp.ClientSession() as plain, meshlib_aiohttp.session(mesh) as http:
                assert await do(plain, f"http://127.0.0.1:{port}") == await do(http, "http://orders")
                assert await settled(mesh)


async def test_an_answer_may_come_before_the_upload_is_over(tmp_path: Path) -> None:
    """What is left of the upload is for nobody."""
    is_over = False

    async def early(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 413 Too Large\r\nconnection: close\r\ncontent-length: 2\r\n\r\nno")
        await writer.drain()
        while await reader.read(1 << 16):
            pass
        writer.close()

    async def long() -> AsyncIterator[bytes]:
        nonlocal is_over
        for _ in range(1000):
            yield b"x" * 10_000
            await asyncio.sleep(0.001)
        is_over = True

    server = await asyncio.start_server(early, "127.0.0.1", 0)
    with mesh_of(tmp_path, at(f"127.0.0.1:{server.sockets[0].getsockname()[1]}")) as mesh:
        async with meshlib_aiohttp.session(mesh) as http, http.post("http://orders/", data=long()) as answer:
            assert (answer.status, await answer.read(), is_over) == (413, b"no", False)
        assert await settled(mesh)
    server.close()


async def test_a_timeout_of_the_caller_wins_over_the_routes_deadline(tmp_path: Path) -> None:
    """aiohttp's default is no wish; what the caller gives is, and the total is told to the next hop."""

    async def slow(server: Scripted, request: Request) -> bytes:
        await asyncio.sleep(0.3)
        return ok()

    async with scripted(slow) as server:
        with mesh_of(tmp_path, at(server, deadline=0.1)) as mesh:
            async with meshlib_aiohttp.session(mesh) as http:
                with pytest.raises(meshlib.DeadlineExceeded):
                    await http.get("http://orders/")
                for timeout in (aiohttp.ClientTimeout(total=10), aiohttp.ClientTimeout(total=None)):
                    async with http.get("http://orders/", timeout=timeout) as answer:
                        assert answer.status == 200
    told = [request.headers.get("x-mesh-deadline-ms") for request in server.requests]
    assert 0 < int(told[0] or 0) <= 100
    assert 9_000 < int(told[1] or 0) <= 10_000
    assert told[2] is None


@pytest.mark.parametrize("body", [b"content-length: 9\r\n\r\nhalf", b"transfer-encoding: chunked\r\n\r\n4\r\nhalf\r\n9\r\nh"])
async def test_a_body_that_breaks_off_is_an_error_of_both(tmp_path: Path, body: bytes) -> None:
    """As aiohttp tells it: what came is there, then a ClientPayloadError."""

    async def cut(server: Scripted, request: Request) -> bytes:
        return b"HTTP/1.1 200 OK\r\nconnection: close\r\n" + body

    async with scripted(cut) as server:
        with mesh_of(tmp_path, at(server)) as mesh:
            async with aiohttp.ClientSession() as plain, meshlib_aiohttp.session(mesh) as http:
                for session, base in ((plain, f"http://{server.address}"), (http, "http://orders")):
                    async with session.post(base) as answer:
                        assert await answer.content.read(4) == b"half"
                        with pytest.raises(aiohttp.ClientPayloadError) as caught:
                            await answer.content.read(9)
                            await answer.content.read()
                    assert isinstance(caught.value, meshlib.AttemptFailed) is (session is http)
                assert meshlib_aiohttp.call_of(caught.value) is meshlib_aiohttp.call_of(answer)
            assert in_flight(mesh) == 0


async def test_a_body_may_end_with_its_connection(tmp_path: Path) -> None:
    """Neither a length nor chunks, as HTTP/1.0 has it."""

    async def old(server: Scripted, request: Request) -> bytes:
        return b"HTTP/1.0 200 OK\r\nconnection: close\r\n\r\nuntil the end"

    async with scripted(old) as server:
        with mesh_of(tmp_path, at(server)) as mesh:
            async with meshlib_aiohttp.session(mesh) as http, http.get("http://orders/") as answer:
                assert (await answer.read(), answer.version) == (b"until the end", aiohttp.HttpVersion10)


async def test_what_is_no_http_is_told_as_aiohttp_tells_it(tmp_path: Path) -> None:
    """A ClientResponseError with status 400, also without the mesh; also for a header that is too long for aiohttp alone."""

    async def nonsense(server: Scripted, request: Request) -> bytes:
        if request.target == "/long":
            return ok(b"x", "x-long: " + "x" * 10_000)
        return b"SSH-2.0-nonsense\r\n\r\n"

    async with scripted(nonsense) as server:
        with mesh_of(tmp_path, at(server)) as mesh:
            async with aiohttp.ClientSession() as plain, meshlib_aiohttp.session(mesh) as http:
                for session, base in ((plain, f"http://{server.address}"), (http, "http://orders")):
                    for path in ("/long", "/nonsense"):
                        with pytest.raises(aiohttp.ClientResponseError) as caught:
                            await session.post(base + path)
                        assert caught.value.status == 400
                assert isinstance(caught.value, meshlib.ProtocolError)
            assert await settled(mesh)


async def test_the_deadline_cuts_a_call(tmp_path: Path) -> None:
    """It's a SocketTimeoutError, and so a TimeoutError; nothing stays behind, also after a cancelled task."""
    release = asyncio.Event()

    async def slow(server: Scripted, request: Request) -> bytes:
        await release.wait()
        return ok()

    async with scripted(slow) as server:
        with mesh_of(tmp_path, at(server)) as mesh:
            async with meshlib_aiohttp.session(mesh) as http:
                with mesh.deadline(0.05), pytest.raises(aiohttp.SocketTimeoutError) as caught:
                    await http.get("http://orders/")
                assert isinstance(caught.value, meshlib.DeadlineExceeded)
                task = asyncio.create_task(http.get("http://orders/"))
                while len(server.requests) < 2:
                    await asyncio.sleep(0.01)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
                assert await settled(mesh)
        release.set()


async def test_a_connection_that_takes_too_long_is_a_connection_timeout(tmp_path: Path) -> None:
    """By `sock_connect`, by `connect`, and by the deadline; nothing was sent."""
    with full() as address, mesh_of(tmp_path, at(address)) as mesh:
        async with meshlib_aiohttp.session(mesh) as http:
            for timeout in (aiohttp.ClientTimeout(sock_connect=0.02), aiohttp.ClientTimeout(connect=0.02)):
                with pytest.raises(aiohttp.ConnectionTimeoutError) as caught:
                    await http.post("http://orders/", timeout=timeout)
                assert isinstance(caught.value, meshlib.ConnectFailed)
            with mesh.deadline(0.02), pytest.raises(aiohttp.ConnectionTimeoutError) as caught:
                await http.post("http://orders/")
            assert isinstance(caught.value, meshlib.DeadlineExceeded)


async def test_refusals_are_connector_errors_that_say_more(tmp_path: Path) -> None:
    """Nobody there, no such service, no way out: nothing was sent."""
    port = free_port()
    with mesh_of(tmp_path, at(f"127.0.0.1:{port}"), egress="deny") as mesh:
        async with meshlib_aiohttp.session(mesh) as http:
            for url, kind in (
                ("http://orders/", meshlib.ConnectFailed),
                ("http://nobody/", meshlib.UnknownService),
                ("http://127.0.0.1:1/", meshlib.Denied),
                ("https://example.invalid/", meshlib.Denied),
            ):
                with pytest.raises(aiohttp.ClientConnectorError) as caught:
                    await http.get(url)
                assert isinstance(caught.value, kind)
                assert caught.value.host in url
                assert (caught.value.errno is not None) is (kind is meshlib.ConnectFailed)
                assert str(caught.value)


async def test_hosts_outside_go_by_aiohttps_own_connector(tmp_path: Path) -> None:
    """With its pool and its errors; the mesh only counts them."""
    async with scripted(hello) as server:
        with mesh_of(tmp_path, {}) as mesh:
            async with meshlib_aiohttp.session(mesh) as http:
                for _ in range(3):
                    async with http.get(f"http://{server.address}/x") as answer:
                        assert await answer.text() == "hello from /x"
                        assert meshlib_aiohttp.call_of(answer) is None
                assert server.connections == 1
                assert "egress" in mesh.metrics()
                with pytest.raises(aiohttp.ClientConnectorError) as caught:
                    await http.get(f"http://127.0.0.1:{free_port()}/")
                assert not isinstance(caught.value, meshlib.MeshError)
                assert meshlib_aiohttp.call_of(caught.value) is None


async def test_an_answer_that_nobody_reads_is_given_up(tmp_path: Path) -> None:
    """Closed early, or by its session: its permit comes back, its connection isn't used again."""

    async def endless(server: Scripted, request: Request) -> bytes:
        return b"HTTP/1.1 200 OK\r\ncontent-length: 9000000\r\n\r\n" + b"x" * 200_000

    async with scripted(endless) as server:
        with mesh_of(tmp_path, at(server)) as mesh:
            async with meshlib_aiohttp.session(mesh) as http:
                async with http.get("http://orders/") as answer:
                    assert await answer.content.read(1) == b"x"
                    assert in_flight(mesh) > 0
                assert await settled(mesh)
                await http.get("http://orders/")
            # The session is closed, and what was open in it.
            assert await settled(mesh)
            assert server.connections == 2


async def test_many_calls_at_once_share_a_session(tmp_path: Path) -> None:
    """Every task gets its own answer, and no permit stays behind."""
    async with scripted(hello) as one, scripted(hello) as two:
        with mesh_of(tmp_path, at(one, two)) as mesh:
            async with meshlib_aiohttp.session(mesh) as http:

                async def call(number: int) -> str:
                    async with http.get(f"http://orders/{number}") as answer:
                        return await answer.text()

                assert await asyncio.gather(*map(call, range(500))) == [f"hello from /{n}" for n in range(500)]
            assert in_flight(mesh) == 0


async def test_a_websocket_that_is_dropped_leaves_nothing_behind(tmp_path: Path) -> None:
    """By us, without a word; and by the peer, which the reader is told."""
    async with everything() as port:
        with mesh_of(tmp_path, at(f"127.0.0.1:{port}")) as mesh:
            async with meshlib_aiohttp.session(mesh) as http:
                socket = await http.ws_connect("http://orders/talk")
                await socket.send_str("hello")
                assert in_flight(mesh) > 0
                assert socket._response.connection is not None
                socket._response.connection.close()
                assert await settled(mesh)
                other = await http.ws_connect("http://orders/talk")
                await other.send_str("hello")
                assert in_flight(mesh) > 0
            assert await settled(mesh)


async def test_errors_can_be_copied_and_pickled(tmp_path: Path) -> None:
    """Into the process of whoever has to know; the call's record stays here."""
    with mesh_of(tmp_path, at(f"127.0.0.1:{free_port()}")) as mesh:
        async with meshlib_aiohttp.session(mesh) as http:
            with pytest.raises(meshlib.ConnectFailed) as caught:
                await http.get("http://orders/")
    for found in (copy.copy(caught.value), pickle.loads(pickle.dumps(caught.value))):
        assert type(found) is type(caught.value)
        assert isinstance(found, aiohttp.ClientConnectorError)
        assert (str(found), found.host, found.errno) == (str(caught.value), "orders", caught.value.errno)
        assert found.call is None


async def test_the_example_runs_with_mutual_tls(tmp_path: Path) -> None:
    """The service behind `meshlib serve` in mode enforce, and the script beside it."""
    port = free_port()
    (tmp_path / "mesh.yaml").write_text(EXAMPLE.with_name("mesh.yaml").read_text().replace("8401", str(port)))
    identities(tmp_path, "reports", "orders")
    env = {"MESHLIB_CONFIG": str(tmp_path / "mesh.yaml"), "PYTHONPATH": PATH}
    with process(MESHLIB, "serve", "example:orders()", "--service", "orders", env=env, cwd=EXAMPLE.parent) as orders:
        wait_until_listening(port, orders)
        with process(PYTHON, str(EXAMPLE), env={**env, "MESHLIB_SERVICE": "reports"}) as script:
            told = script.communicate(timeout=60)[0]
    # What comes first is said of the configuration.
    told = told[told.index("item 1") :]
    assert told.splitlines()[:4] == ["item 1 for reports", "item 2 for reports", "item 3 for reports", "3 lines read by orders"]
    assert "GET /items/4 to orders" in told


async def test_somebody_else_at_the_address_is_a_certificate_error(tmp_path: Path) -> None:
    """The right CA, the wrong service: nothing is sent."""
    identities(tmp_path, "me", "orders", "mallory")
    port = free_port()
    services = {
        "me": {},
        "orders": {"discover": {"static": [f"127.0.0.1:{port}"]}},
        "mallory": {"listen": f"127.0.0.1:{port}", "secure": {"allow": [{"name": "all", "from": ["*"]}]}},
    }
    env = {"MESHLIB_CONFIG": str(write_config(tmp_path, services, mode="enforce")), "PYTHONPATH": PATH}
    with process(MESHLIB, "serve", "example:orders()", "--service", "mallory", env=env, cwd=EXAMPLE.parent) as child:
        wait_until_listening(port, child)
        with mesh_of(tmp_path, services, mode="enforce") as mesh:
            async with meshlib_aiohttp.session(mesh) as http:
                with pytest.raises(aiohttp.ClientConnectorCertificateError) as caught:
                    await http.get("http://orders/")
    assert isinstance(caught.value, meshlib.PeerIdentityError)
    assert caught.value.host == "orders"
