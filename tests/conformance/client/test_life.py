"""What happens to a client in the life of a program? Many calls at once, threads, loops, cancellation, bodies larger than memory should hold."""

from __future__ import annotations

import asyncio
import resource
import threading
from pathlib import Path
from typing import Any

import httpx
import httpx2
import pytest

from tests.conformance.client.caller import drive
from tests.conformance.client.shop import SECURITY, SERVERS, Shop
from tests.support import mesh_of

MIB = 1024 * 1024


def in_flight(mesh: Any) -> int:
    return sum(row["in_flight"] for row in mesh.engine.stats(0.0))


@pytest.fixture(params=[(server, security) for server in SERVERS for security in SECURITY], ids="-".join)
def mesh(request: pytest.FixtureRequest, shop: Shop, tmp_path: Path) -> Any:
    with shop.mesh(tmp_path, *request.param) as mesh:
        yield mesh


@pytest.mark.parametrize("driver", ["asyncio", "uvloop"])
def test_many_calls_at_once_get_their_own_answers(mesh: Any, driver: str) -> None:
    """Bodies up and down, and none is mixed up with another."""

    async def work() -> list[bool]:
        async with mesh.client() as http:

            async def one(n: int) -> bool:
                body = b"%d " % n * (n % 50 + 1)
                return (await http.post("http://orders/echo", content=body)).content == body

            return await asyncio.gather(*(one(n) for n in range(300)))

    assert drive(driver, work) == [True] * 300
    assert in_flight(mesh) == 0


def test_threads_share_a_blocking_client(mesh: Any) -> None:
    """Eight of them, with bodies and with streams."""
    wrong: list[Any] = []
    with mesh.sync_client() as http:

        def work(n: int) -> None:
            try:
                for i in range(20):
                    body = b"%d.%d " % (n, i) * 20
                    if http.post("http://orders/echo", content=body).content != body:
                        wrong.append((n, i))
                    with http.stream("GET", f"http://orders/bytes/{i * 1000}") as answer:
                        if len(answer.read()) != i * 1000:
                            wrong.append((n, i, "stream"))
            except BaseException as error:
                wrong.append(error)

        threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert wrong == []
    assert in_flight(mesh) == 0


# uvloop warns of what a closed loop leaves open, and a warning that is made an error keeps it from closing it.
@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")
def test_one_client_serves_loop_after_loop(mesh: Any) -> None:
    """A module's client, a loop per test: of both kinds of loop in turn."""
    http = mesh.client()

    async def once() -> int:
        return (await http.get("http://orders/status/201")).status_code

    assert [drive(driver, once) for driver in ("asyncio", "uvloop", "asyncio")] == [201] * 3
    drive("asyncio", http.aclose)


@pytest.mark.parametrize("driver", ["asyncio", "uvloop"])
def test_a_cancelled_call_is_gone(mesh: Any, driver: str) -> None:
    """While it waits, while it reads, while it sends; the client goes on."""

    async def work() -> int:
        async with mesh.client() as http:

            async def endless() -> Any:
                while True:
                    yield b"x" * 1000
                    await asyncio.sleep(0.01)

            async def reading() -> None:
                async with http.stream("GET", "http://orders/events") as answer:
                    async for _ in answer.aiter_raw():
                        pass

            for call in (http.get("http://orders/slow/9"), reading(), http.post("http://orders/digest", content=endless())):
                task = asyncio.ensure_future(call)
                await asyncio.sleep(0.05)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
                assert in_flight(mesh) == 0
            return (await http.get("http://orders/status/204")).status_code

    assert drive(driver, work) == 204


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@pytest.mark.slow
@pytest.mark.parametrize("driver", ["asyncio", "uvloop", "sync"])
def test_an_upload_waits_for_its_reader(shop: Shop, tmp_path: Path, driver: str) -> None:
    """64 MiB to a server that pauses between its reads: what is not taken is not asked of the iterator, so memory stays as it was."""
    begun = taken = 0

    def pieces() -> Any:
        nonlocal taken
        for _ in range(256):
            taken += 1
            yield b"x" * (MIB // 4)

    async def apieces() -> Any:
        for piece in pieces():
            yield piece

    with shop.mesh(tmp_path, "uvicorn", "plain") as mesh:

        async def work() -> Any:
            nonlocal begun
            if driver == "sync":
                with mesh.sync_client(timeout=60) as http:
                    http.get("http://orders/echo")
                    begun = peak()
                    return http.post("http://orders/digest?pause=0.002", content=pieces()).json()
            async with mesh.client(timeout=60) as http:
                await http.get("http://orders/echo")
                begun = peak()
                return (await http.post("http://orders/digest?pause=0.002", content=apieces())).json()

        assert (drive(driver, work)["size"], taken) == (64 * MIB, 256)
        assert peak() - begun < 16 * MIB


@pytest.mark.parametrize("driver", ["asyncio", "uvloop", "sync"])
def test_a_download_waits_for_its_reader(shop: Shop, tmp_path: Path, driver: str) -> None:
    """Nobody reads: only what fits into buffers comes. Then it comes whole."""
    with shop.mesh(tmp_path, "uvicorn", "mtls") as mesh:

        async def work() -> tuple[int, int]:
            size, before = 0, peak()
            if driver == "sync":
                with mesh.sync_client() as http, http.stream("GET", f"http://orders/bytes/{128 * MIB}") as answer:
                    for piece in answer.iter_raw():
                        size += len(piece)
            else:
                async with mesh.client() as http, http.stream("GET", f"http://orders/bytes/{128 * MIB}") as answer:
                    await asyncio.sleep(0.3)
                    async for piece in answer.aiter_raw():
                        size += len(piece)
            return size, peak() - before

        size, grown = drive(driver, work)
        assert size == 128 * MIB
        assert grown < 24 * MIB


@pytest.mark.parametrize("module", [httpx, httpx2], ids=lambda m: m.__name__)
async def test_both_modules_get_clients_of_their_own(shop: Shop, tmp_path: Path, module: Any) -> None:
    """Their classes all through: client, response, stream, cookies."""
    with mesh_of(tmp_path, {"orders": {"discover": {"static": [shop.address]}}}) as mesh:
        async with mesh.client(httpx=module) as http:
            assert isinstance(http, module.AsyncClient)
            answer = await http.post("http://orders/inspect", json={"a": 1}, cookies=None)
            assert isinstance(answer, module.Response) and isinstance(answer.request, module.Request)
            assert (answer.json()["body"], answer.extensions["meshlib.call"].service) == ('{"a":1}', "orders")
            async with http.stream("GET", "http://orders/bytes/300000") as streamed:
                assert len(await streamed.aread()) == 300_000
            followed = await http.get("http://orders/redirect/302?to=/inspect", follow_redirects=True)
            assert [r.status_code for r in followed.history] == [302]
        own = module.AsyncClient(transport=mesh.transport(httpx=module))
        assert (await own.get("http://orders/status/201")).status_code == 201
        await own.aclose()
        with mesh.sync_client(httpx=module) as blocking:
            assert type(blocking.get("http://orders/status/201")).__mro__.index(module.Response) >= 0


async def test_httpx2_s_own_additions_work(shop: Shop, tmp_path: Path) -> None:
    """Its `sse`, `websocket` and `query`, as far as they are there."""
    with mesh_of(tmp_path, {"orders": {"discover": {"static": [shop.address]}}}) as mesh:
        async with mesh.client(httpx=httpx2) as http:
            async with http.sse("http://orders/events") as source:
                async for event in source:
                    assert event.data == "1"
                    break
            async with http.websocket("http://orders/ws") as ws:
                await ws.send_text("hello")
                assert await ws.receive_text(timeout=5) == "hello"
            assert (await http.query("http://orders/inspect", content=b"q")).json()["method"] == "QUERY"


async def test_httpx_s_trace_tells_of_a_call(shop: Shop, tmp_path: Path) -> None:
    """Once per call: that it goes, and how it was answered or failed."""
    told: list[Any] = []

    async def trace(name: str, info: dict[str, Any]) -> None:
        told.append((name, sorted(info)))

    dead = {"discover": {"static": ["127.0.0.1:1"]}}
    with mesh_of(tmp_path, {"orders": {"discover": {"static": [shop.address]}}, "dead": dead}) as mesh:
        async with mesh.client() as http:
            await http.get("http://orders/status/200", extensions={"trace": trace})
            with pytest.raises(httpx.ConnectError):
                await http.get("http://dead/", extensions={"trace": trace})
        with mesh.sync_client() as blocking:
            blocking.get("http://orders/status/200", extensions={"trace": lambda name, info: told.append((name, sorted(info)))})
    began, came = (
        ("http11.send_request_headers.started", ["request"]),
        ("http11.receive_response_headers.complete", ["return_value"]),
    )
    assert told == [began, came, began, ("http11.receive_response_headers.failed", ["exception"]), began, came]
