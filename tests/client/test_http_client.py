"""Does a call of an httpx client come through, and what becomes of it when something breaks? Real sockets, scripted servers."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

import httpx
import pytest

import meshlib
from tests.support import Request, Scripted, free_port, identities, mesh_of, ok, scripted


async def hello(server: Scripted, request: Request) -> bytes:
    return ok(b"hello from " + request.target.encode())


def at(*servers: Scripted | str, **more: Any) -> dict[str, Any]:
    addresses = [s if isinstance(s, str) else s.address for s in servers]
    return {"orders": {"discover": {"static": addresses}, **more}}


def in_flight(mesh: meshlib.Mesh) -> int:
    return sum(row["in_flight"] for row in mesh.engine.stats(0.0))


async def test_a_call_by_service_name_reaches_its_endpoint(tmp_path: Path) -> None:
    """The name in the URL is the Service; the answer is a real httpx.Response with the call's record."""
    async with scripted(hello) as server:
        with mesh_of(tmp_path, at(server)) as mesh:
            async with mesh.client() as http:
                answer = await http.get("http://orders/items/7", params={"q": "x"})
    assert (answer.status_code, answer.text, answer.http_version) == (200, "hello from /items/7?q=x", "HTTP/1.1")
    call = answer.extensions["meshlib.call"]
    assert (call.service, call.attempts) == ("orders", 1)
    assert server.address in call.explain()
    assert server.requests[0].headers["host"] == "orders"
    assert 0 < int(server.requests[0].headers["x-mesh-deadline-ms"]) <= 15000


async def test_connections_are_kept_and_used_again(tmp_path: Path) -> None:
    """A hundred calls in a row take one connection."""
    async with scripted(hello) as server:
        with mesh_of(tmp_path, at(server)) as mesh:
            async with mesh.client() as http:
                for _ in range(100):
                    await http.get("http://orders/")
    assert (len(server.requests), server.connections) == (100, 1)


async def test_a_refused_connection_moves_a_post_to_another_endpoint(tmp_path: Path) -> None:
    """Nothing was written, so that every method is safe."""
    async with scripted(hello) as server:
        with mesh_of(tmp_path, at(server, f"127.0.0.1:{free_port()}")) as mesh:
            async with mesh.client() as http:
                for _ in range(20):
                    assert (await http.post("http://orders/", json={"n": 1})).status_code == 200
            assert sum(row["ejections"] for row in mesh.engine.stats(0.0) if row["endpoint"]) >= 1
    assert len(server.requests) == 20


async def test_a_post_that_was_lost_is_not_sent_twice(tmp_path: Path) -> None:
    """The request was written and no answer came: only the application can know whether it's safe."""

    async def die(server: Scripted, request: Request) -> None:
        return None

    async with scripted(die) as one, scripted(die) as two:
        with mesh_of(tmp_path, at(one, two)) as mesh:
            async with mesh.client() as http:
                with pytest.raises(meshlib.ConnectionLost) as caught:
                    await http.post("http://orders/", content=b"x")
                assert isinstance(caught.value, httpx.TransportError)
                assert len(one.requests) + len(two.requests) == 1
                assert "not idempotent" in caught.value.call.explain()
                with pytest.raises(httpx.ReadError):
                    await http.get("http://orders/")
            assert len(one.requests) + len(two.requests) == 3
            assert in_flight(mesh) == 0


async def test_a_declared_post_is_sent_again(tmp_path: Path) -> None:
    """By the route's configuration and an Idempotency-Key, or by the application for one call."""
    seen = 0

    async def once(server: Scripted, request: Request) -> bytes | None:
        nonlocal seen
        seen += 1
        return None if seen % 2 else ok()

    async with scripted(once) as server:
        with mesh_of(tmp_path, at(server, retry={"idempotency_key": True})) as mesh:
            async with mesh.client() as http:
                answer = await http.post("http://orders/", content=b"x", headers={"Idempotency-Key": "k"})
                assert answer.status_code == 200
                answer = await http.post("http://orders/", content=b"x", extensions=meshlib.policy(idempotent=True))
                assert answer.status_code == 200
    assert [r.body for r in server.requests] == [b"x"] * 4
    assert [r.headers.get("x-mesh-attempt") for r in server.requests] == [None, "1", None, None]  # the second was a replay


async def test_a_connection_closed_while_idle_is_replaced(tmp_path: Path) -> None:
    """The peer closed a kept-alive connection without a word: the GET is sent once more, outside the retries."""
    count = 0

    async def close_after(server: Scripted, request: Request) -> bytes | None:
        nonlocal count
        count += 1
        return None if count == 2 else ok()

    async with scripted(close_after) as server:
        with mesh_of(tmp_path, at(server)) as mesh:
            async with mesh.client() as http:
                await http.get("http://orders/")
                assert (await http.get("http://orders/")).status_code == 200
            assert sum(row["retries"] for row in mesh.engine.stats(0.0)) == 0
    assert (len(server.requests), server.connections) == (3, 2)


async def test_an_endpoint_that_dies_between_head_and_body_is_replaced(tmp_path: Path) -> None:
    """A short answer counts as come when it is whole, so that an idempotent call can still go elsewhere."""
    count = 0

    async def cut(server: Scripted, request: Request) -> bytes:
        nonlocal count
        count += 1
        return b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 9\r\n\r\nhalf" if count % 2 else ok(b"whole")

    async with scripted(cut) as one, scripted(cut) as two:
        with mesh_of(tmp_path, at(one, two)) as mesh:
            async with mesh.client() as http:
                for _ in range(5):
                    assert (await http.get("http://orders/")).text == "whole"
                with pytest.raises(httpx.RemoteProtocolError):
                    await http.post("http://orders/", content=b"x")
            assert in_flight(mesh) == 0


async def test_bodies_stream_both_ways(tmp_path: Path) -> None:
    """What goes up in pieces comes down in pieces, and nothing is held as a whole."""

    async def echo(server: Scripted, request: Request) -> bytes:
        pieces = [request.body[n : n + 1000] for n in range(0, len(request.body), 1000)]
        chunked = b"".join(b"%x\r\n%b\r\n" % (len(p), p) for p in pieces)
        return b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n" + chunked + b"0\r\n\r\n"

    async def pieces() -> Any:
        for n in range(100):
            yield bytes([n]) * 10_000

    async with scripted(echo) as server:
        with mesh_of(tmp_path, at(server)) as mesh:
            async with mesh.client() as http:
                async with http.stream("POST", "http://orders/", content=pieces()) as answer:
                    back = b"".join([piece async for piece in answer.aiter_raw()])
                assert back == b"".join([bytes([n]) * 10_000 for n in range(100)])
                assert (await http.get("http://orders/")).content == b""
            assert in_flight(mesh) == 0
    assert server.connections == 1


async def test_an_unread_body_costs_its_connection(tmp_path: Path) -> None:
    """What was not read to its end is not used again, and its permit comes back."""

    async def long(server: Scripted, request: Request) -> bytes:
        return ok(b"x" * 1_000_000)

    async with scripted(long) as server:
        with mesh_of(tmp_path, at(server)) as mesh:
            async with mesh.client() as http:
                async with http.stream("GET", "http://orders/") as answer:
                    assert answer.status_code == 200
                await http.get("http://orders/")
            assert in_flight(mesh) == 0
    assert server.connections == 2


async def test_a_deadline_cuts_the_call(tmp_path: Path) -> None:
    """`mesh.deadline` ends whatever is under it, and the error is httpx's timeout as well."""

    async def never(server: Scripted, request: Request) -> bytes:
        await asyncio.sleep(30)
        return ok()

    async with scripted(never) as server:
        with mesh_of(tmp_path, at(server)) as mesh:
            async with mesh.client() as http:
                with meshlib.deadline(0.2), pytest.raises(meshlib.DeadlineExceeded) as caught:
                    await http.get("http://orders/")
                assert isinstance(caught.value, httpx.TimeoutException)
                with pytest.raises(httpx.ReadTimeout):
                    await http.get("http://orders/", timeout=0.1)
            assert in_flight(mesh) == 0
    assert int(server.requests[0].headers["x-mesh-deadline-ms"]) <= 200


async def test_cancelled_calls_leave_nothing_behind(tmp_path: Path) -> None:
    """A permit, a socket and a task less after each cancellation than during it."""

    async def slow(server: Scripted, request: Request) -> bytes:
        await asyncio.sleep(5)
        return ok()

    async with scripted(slow) as server:
        with mesh_of(tmp_path, at(server)) as mesh:
            async with mesh.client() as http:
                calls = [asyncio.create_task(http.get("http://orders/")) for _ in range(50)]
                while len(server.requests) < 50:
                    await asyncio.sleep(0.01)
                assert in_flight(mesh) == 100
                for call in calls:
                    call.cancel()
                await asyncio.gather(*calls, return_exceptions=True)
                assert in_flight(mesh) == 0


async def test_unknown_names_fail_and_egress_obeys(tmp_path: Path) -> None:
    """A bare undeclared name always fails; a host outside goes out only where that is allowed."""
    async with scripted(hello) as server:
        with mesh_of(tmp_path, at(server)) as mesh:
            async with mesh.client() as http:
                with pytest.raises(meshlib.UnknownService) as caught:
                    await http.get("http://order/")
                assert isinstance(caught.value, httpx.ConnectError)
                assert (await http.get(f"http://{server.address}/out")).text == "hello from /out"
        with mesh_of(tmp_path, at(server), egress="deny") as mesh:
            async with mesh.client() as http:
                with pytest.raises(meshlib.Denied):
                    await http.get(f"http://{server.address}/")


async def test_one_layer_retries(tmp_path: Path) -> None:
    """Called as somebody's second attempt, we don't retry."""
    from meshlib.call import current_layer

    async def fail(server: Scripted, request: Request) -> bytes:
        return b"HTTP/1.1 503 no\r\ncontent-length: 0\r\n\r\n"

    async with scripted(fail) as server:
        with mesh_of(tmp_path, at(server)) as mesh:
            async with mesh.client() as http:
                await http.get("http://orders/")
                assert len(server.requests) == 2
                token = current_layer.set(1)
                await http.get("http://orders/")
                current_layer.reset(token)
    assert len(server.requests) == 3


async def test_mutual_tls_with_spiffe_identities(tmp_path: Path) -> None:
    """The server proves the identity that we expect and sees ours; another identity is refused before a byte of the request."""
    import ssl

    authority = identities(tmp_path, "me", "orders", "thief")
    folder = tmp_path / "identities"

    def server_context(service: str) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(folder / service / "svid.pem", folder / service / "key.pem")
        context.load_verify_locations(folder / service / "bundle.pem")
        context.verify_mode = ssl.CERT_REQUIRED
        return context

    assert authority is not None
    async with scripted(hello, ssl=server_context("orders")) as good, scripted(hello, ssl=server_context("thief")) as bad:
        with mesh_of(tmp_path, at(good), mode="enforce") as mesh:
            async with mesh.client() as http:
                assert (await http.get("http://orders/")).status_code == 200
        with mesh_of(tmp_path, at(bad), mode="enforce") as mesh:
            async with mesh.client() as http:
                with pytest.raises(meshlib.PeerIdentityError) as caught:
                    await http.get("http://orders/")
                assert isinstance(caught.value, httpx.ConnectError)
    assert bad.requests == []


def test_the_blocking_client_does_the_same_from_many_threads(tmp_path: Path) -> None:
    """Eight threads share a client; each connection is used by one thread at a time."""
    ready, stop, ports = threading.Event(), threading.Event(), []

    def serve() -> None:
        async def main() -> None:
            async with scripted(hello) as server:
                ports.append(server)
                ready.set()
                while not stop.is_set():
                    await asyncio.sleep(0.01)

        asyncio.run(main())

    thread = threading.Thread(target=serve)
    thread.start()
    ready.wait(5)
    try:
        server = ports[0]
        with mesh_of(tmp_path, at(server, f"127.0.0.1:{free_port()}")) as mesh, mesh.sync_client() as http:
            failures: list[BaseException] = []

            def work(n: int) -> None:
                try:
                    for i in range(50):
                        assert http.get(f"http://orders/{n}/{i}").text == f"hello from /{n}/{i}"
                except BaseException as error:
                    failures.append(error)

            threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
            for t in threads:
                t.start()
            for t in threads:
                t.join()
            assert failures == []
            with http.stream("POST", "http://orders/up", content=iter([b"a", b"b"])) as answer:
                assert b"".join(answer.iter_raw()) == b"hello from /up"
            with meshlib.deadline(1e-9), pytest.raises(meshlib.DeadlineExceeded):
                http.get("http://orders/")
            assert in_flight(mesh) == 0
        assert server.connections <= 9
    finally:
        stop.set()
        thread.join()


def test_one_client_survives_a_loop_per_test(tmp_path: Path) -> None:
    """A module-level client is used from one loop after another."""
    with mesh_of(tmp_path, at("127.0.0.1:1")) as mesh:
        http = mesh.client()
        versions = iter(range(10**9, 10**9 + 3))

        async def once() -> str:
            async with scripted(hello) as server:
                mesh.engine.resolve("orders", next(versions), [(server.address, 1.0, "", {}, "")], 0.0)
                text = (await http.get("http://orders/")).text
                await http._transport.aclose()
                return text

        assert [asyncio.run(once()) for _ in range(3)] == ["hello from /"] * 3
