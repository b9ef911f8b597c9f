"""Does one deadline hold for everything under it: every wait of a call, every attempt, every thread and task, and the next hop?

The servers run in a thread of their own, so that blocked callers can be tested as well. What is cut is cut by the clock, so these
tests wait for tenths of a second; what is asserted is what happened and what was said, never how quickly.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

import meshlib
from tests.chaos.elsewhere import at, elsewhere, full, in_flight, listening, mute, tls_of
from tests.support import Request, Scripted, mesh_of, ok

SHORT = 0.15


async def answers(server: Scripted, request: Request) -> bytes | None:
    match request.target:
        case "/never":
            await asyncio.sleep(60)
        case "/busy":
            return b"HTTP/1.1 503 no\r\ncontent-length: 0\r\n\r\n"
        case "/busy-for-long":
            return b"HTTP/1.1 503 no\r\nretry-after: 30\r\ncontent-length: 0\r\n\r\n"
    return ok(b"ok")


@pytest.fixture
def server() -> Iterator[Scripted]:
    with elsewhere(answers) as found:
        yield found


def told(server: Scripted) -> list[int]:
    """What each request said of the time that is left, in milliseconds."""
    return [int(request.headers["x-mesh-deadline-ms"]) for request in server.requests]


# ------------------------------------------------------------------ it cuts


async def test_a_deadline_ends_a_call_and_gives_back_its_permits(tmp_path: Path, server: Scripted) -> None:
    """The error is ours and httpx's, and knows its call."""
    with mesh_of(tmp_path, at(server.address)) as mesh:
        async with mesh.client() as http:
            with meshlib.deadline(SHORT), pytest.raises(meshlib.DeadlineExceeded) as caught:
                await http.get("http://orders/never")
            assert isinstance(caught.value, httpx.TimeoutException)
            assert caught.value.call.service == "orders"
            assert in_flight(mesh) == 0
            assert (await http.get("http://orders/")).status_code == 200


def test_a_deadline_ends_a_blocking_call(tmp_path: Path, server: Scripted) -> None:
    """The same error, the same permits."""
    with mesh_of(tmp_path, at(server.address)) as mesh, mesh.sync_client() as http:
        with meshlib.deadline(SHORT), pytest.raises(meshlib.DeadlineExceeded) as caught:
            http.get("http://orders/never")
        assert isinstance(caught.value, httpx.TimeoutException)
        assert in_flight(mesh) == 0
        assert http.get("http://orders/").status_code == 200


@contextlib.contextmanager
def slow_at(phase: str, folder: Path) -> Iterator[tuple[str, str]]:
    """An address at which a call stands still in this phase, and the mode for it."""

    async def drip(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 100000\r\n\r\n" if phase == "body" else b"HTTP/1.1 200 OK\r\n")
        while True:
            writer.write(b"x" if phase == "body" else b"x-more: 1\r\n")
            await writer.drain()
            await asyncio.sleep(0.02)

    if phase == "handshake":
        tls_of(folder)
    made: Any = {"connect": full, "handshake": mute, "head": mute, "upload": mute}.get(phase, lambda: listening(drip))
    with made() as address:
        yield address, "enforce" if phase == "handshake" else "observe"


PHASES = ["connect", "handshake", "upload", "head", "dripping head", "body"]


async def endless() -> AsyncIterator[bytes]:
    while True:
        yield b"x" * 65536


def endless_too() -> Iterator[bytes]:
    while True:
        yield b"x" * 65536


@pytest.mark.parametrize("phase", PHASES)
async def test_a_deadline_ends_whatever_the_call_waits_for(tmp_path: Path, phase: str) -> None:
    """Connect, handshake, a peer that doesn't read, doesn't answer, or never stops talking: one end for all of them."""
    with slow_at(phase, tmp_path) as (address, mode), mesh_of(tmp_path, at(address, admit={"connect": 20}), mode=mode) as mesh:
        async with mesh.client() as http:
            with meshlib.deadline(SHORT), pytest.raises(meshlib.DeadlineExceeded):
                if phase == "upload":
                    await http.put("http://orders/", content=endless())
                else:
                    await http.post("http://orders/")
            assert in_flight(mesh) == 0


@pytest.mark.parametrize("phase", PHASES)
def test_a_deadline_ends_whatever_a_blocking_call_waits_for(tmp_path: Path, phase: str) -> None:
    """The same on the calling thread."""
    with slow_at(phase, tmp_path) as (address, mode), mesh_of(tmp_path, at(address, admit={"connect": 20}), mode=mode) as mesh:
        with mesh.sync_client() as http:
            with meshlib.deadline(SHORT), pytest.raises(meshlib.DeadlineExceeded):
                if phase == "upload":
                    http.put("http://orders/", content=endless_too())
                else:
                    http.post("http://orders/")
            assert in_flight(mesh) == 0


async def test_a_deadline_that_is_over_sends_nothing(tmp_path: Path, server: Scripted) -> None:
    """Nobody would read the answer."""
    with mesh_of(tmp_path, at(server.address)) as mesh:
        async with mesh.client() as http:
            for seconds in (0.0, -1.0):
                with meshlib.deadline(seconds), pytest.raises(meshlib.DeadlineExceeded):
                    await http.get("http://orders/")
            assert in_flight(mesh) == 0
    assert server.requests == []


# ------------------------------------------------------------------ one end for all attempts


@pytest.mark.parametrize("path", ["/busy", "/busy-for-long"])
async def test_retries_and_their_waits_share_the_end(tmp_path: Path, server: Scripted, path: str) -> None:
    """An attempt more, or a wait that the server asks for, doesn't move the end: the last answer is handed over instead."""
    retry = {"attempts": 5, "backoff": ["100ms", "100ms"], "budget": {"per_second": 100}}
    with mesh_of(tmp_path, at(server.address, retry=retry)) as mesh:
        async with mesh.client() as http:
            begun = time.monotonic()
            with meshlib.deadline(SHORT):
                try:
                    assert (await http.get("http://orders" + path)).status_code == 503
                except meshlib.DeadlineExceeded:
                    pass  # as good: it was cut within an attempt
            assert time.monotonic() - begun < 5
            assert in_flight(mesh) == 0
    left = told(server)
    assert left == sorted(left, reverse=True)
    assert max(left) <= SHORT * 1000


async def test_connecting_elsewhere_shares_the_end(tmp_path: Path, server: Scripted) -> None:
    """Time lost at an endpoint that takes no connection is lost for the next one: it is told of less."""
    with full() as dead:
        services = at(dead, server.address, admit={"connect": "100ms"}, balance={"policy": "round_robin"})
        with mesh_of(tmp_path, services) as mesh:
            async with mesh.client() as http:
                for _ in range(4):
                    with meshlib.deadline(5):
                        assert (await http.get("http://orders/")).status_code == 200
    assert min(told(server)) < 4_950
    assert max(told(server)) <= 5_000


# ------------------------------------------------------------------ it nests and travels


async def test_the_earlier_of_two_deadlines_holds(tmp_path: Path, server: Scripted) -> None:
    """An inner one can only shorten; afterwards the outer one is in force again."""
    with mesh_of(tmp_path, at(server.address)) as mesh:
        async with mesh.client() as http:
            with meshlib.deadline(2):
                with meshlib.deadline(60):
                    await http.get("http://orders/")
                with meshlib.deadline(1):
                    await http.get("http://orders/")
                await http.get("http://orders/")
            await http.get("http://orders/")
    longer, shorter, outer, none = told(server)
    assert 1000 < longer <= 2000
    assert shorter <= 1000
    assert 1000 < outer <= longer
    assert 14_000 < none <= 15_000


async def test_the_routes_own_deadline_is_never_lengthened(tmp_path: Path, server: Scripted) -> None:
    """What is configured holds as well as what the caller says."""
    with mesh_of(tmp_path, at(server.address, deadline="500ms")) as mesh:
        async with mesh.client() as http:
            with meshlib.deadline(60):
                await http.get("http://orders/")
    assert 0 < told(server)[0] <= 500


async def test_the_next_hop_is_never_told_more_than_is_left(tmp_path: Path, server: Scripted) -> None:
    """Not even if the application forwards the header of its own caller."""
    with mesh_of(tmp_path, at(server.address)) as mesh:
        async with mesh.client() as http:
            with meshlib.deadline(1) as end:
                for _ in range(20):
                    await http.get("http://orders/", headers={"X-Mesh-Deadline-Ms": "99999"})
                    left = (end - time.monotonic()) * 1000
                    # What was said at sending is not less than what is left now, and not more than there was.
                    assert left - 50 < told(server)[-1] <= 1000
    assert told(server) == sorted(told(server), reverse=True)
    assert all("," not in request.headers["x-mesh-deadline-ms"] for request in server.requests)


async def test_a_deadline_goes_with_tasks_and_threads(tmp_path: Path, server: Scripted) -> None:
    """Through create_task, TaskGroup, to_thread, and threads that were given the context; a bare thread begins anew."""
    with mesh_of(tmp_path, at(server.address)) as mesh, mesh.sync_client() as blocking:
        async with mesh.client() as http:

            def from_thread(target: Callable[[], object]) -> None:
                thread = threading.Thread(target=target)
                thread.start()
                thread.join()

            def ask() -> None:
                blocking.get("http://orders/")

            with meshlib.deadline(2):
                await asyncio.create_task(http.get("http://orders/"))
                async with asyncio.TaskGroup() as group:
                    group.create_task(http.get("http://orders/"))
                await asyncio.to_thread(ask)
                await asyncio.to_thread(from_thread, lambda context=contextvars.copy_context(): context.run(ask))  # type: ignore[misc]
                assert max(told(server)) <= 2000
                await asyncio.to_thread(from_thread, ask)
            assert len(server.requests) == 5
            assert told(server)[-1] > 2000


async def test_a_deadline_cuts_in_a_thread_and_in_a_task(tmp_path: Path, server: Scripted) -> None:
    """Not only told, but kept."""
    with mesh_of(tmp_path, at(server.address)) as mesh, mesh.sync_client() as blocking:
        async with mesh.client() as http:
            with meshlib.deadline(SHORT):
                found = await asyncio.gather(
                    asyncio.create_task(http.get("http://orders/never")),
                    asyncio.to_thread(blocking.get, "http://orders/never"),
                    return_exceptions=True,
                )
            assert [isinstance(one, meshlib.DeadlineExceeded) for one in found] == [True, True]
            assert in_flight(mesh) == 0


# ------------------------------------------------------------------ inbound

ENDS = [
    ("x-mesh-deadline-ms", "700"),
    ("grpc-timeout", "700m"),
    ("grpc-timeout", "700000u"),
    ("x-envoy-expected-rq-timeout-ms", "700"),
]


@pytest.mark.parametrize("header", ENDS, ids=lambda header: f"{header[0]}={header[1]}")
async def test_an_incoming_deadline_goes_on_to_the_next_hop(tmp_path: Path, server: Scripted, header: tuple[str, str]) -> None:
    """Whoever said it, and in whichever words; under ASGI."""
    with mesh_of(tmp_path, at(server.address)) as mesh:
        async with mesh.client() as http:

            async def app(scope: Any, receive: Any, send: Any) -> None:
                await http.get("http://orders/")
                await send({"type": "http.response.start", "status": 204, "headers": []})
                await send({"type": "http.response.body", "body": b""})

            async with httpx.AsyncClient(transport=httpx.ASGITransport(mesh.asgi(app)), base_url="http://me") as outside:
                assert (await outside.get("/", headers=[header])).status_code == 204
                assert (await outside.get("/")).status_code == 204
    assert 0 < told(server)[0] <= 700
    assert told(server)[1] > 700


@pytest.mark.parametrize("header", ENDS, ids=lambda header: f"{header[0]}={header[1]}")
def test_an_incoming_deadline_goes_on_from_wsgi(tmp_path: Path, server: Scripted, header: tuple[str, str]) -> None:
    """The same for a blocking application."""
    with mesh_of(tmp_path, at(server.address)) as mesh, mesh.sync_client() as http:

        def app(environ: Any, start_response: Any) -> Any:
            http.get("http://orders/")
            start_response("204 No Content", [])
            return []

        with httpx.Client(transport=httpx.WSGITransport(mesh.wsgi(app)), base_url="http://me") as outside:
            assert outside.get("/", headers=[header]).status_code == 204
            assert outside.get("/").status_code == 204
    assert 0 < told(server)[0] <= 700
    assert told(server)[1] > 700


async def test_the_shortest_of_several_incoming_deadlines_counts(tmp_path: Path, server: Scripted) -> None:
    """What can't be understood changes nothing, and a negative time is one that is spent."""
    with mesh_of(tmp_path, at(server.address)) as mesh:
        async with mesh.client() as http:

            async def app(scope: Any, receive: Any, send: Any) -> None:
                await http.get("http://orders/")
                await send({"type": "http.response.start", "status": 204, "headers": []})
                await send({"type": "http.response.body", "body": b""})

            headers = [("x-mesh-deadline-ms", "5000"), ("grpc-timeout", "600m"), ("x-envoy-expected-rq-timeout-ms", "soon")]
            async with httpx.AsyncClient(transport=httpx.ASGITransport(mesh.asgi(app)), base_url="http://me") as outside:
                assert (await outside.get("/", headers=headers)).status_code == 204
                spent = [("x-mesh-deadline-ms", "5000"), ("x-envoy-expected-rq-timeout-ms", "-1")]
                assert (await outside.get("/", headers=spent)).status_code == 504
    assert len(server.requests) == 1
    assert 0 < told(server)[0] <= 600


# ------------------------------------------------------------------ streams

# Seconds without progress after which a stream is given up, as these tests configure it.
IDLE = 0.3


@contextlib.contextmanager
def streaming(pause: float, pieces: int) -> Iterator[str]:
    """Answers at once, then sends a piece after each pause."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await reader.readuntil(b"\r\n\r\n"):
            writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
            for _ in range(pieces):
                await asyncio.sleep(pause)
                writer.write(b"1\r\nx\r\n")
                await writer.drain()
            writer.write(b"0\r\n\r\n")

    with listening(serve) as address:
        yield address


async def test_a_stream_may_outlive_its_deadline_while_it_goes_on(tmp_path: Path) -> None:
    """The deadline holds to the head; afterwards a stream lives as long as it makes progress."""
    with streaming(0.05, 10) as address, mesh_of(tmp_path, at(address, deadline="250ms", stream_idle=IDLE)) as mesh:
        async with mesh.client() as http:
            async with http.stream("GET", "http://orders/") as answer:
                assert b"".join([piece async for piece in answer.aiter_raw()]) == b"x" * 10
            assert in_flight(mesh) == 0


def test_a_blocking_stream_may_outlive_its_deadline_too(tmp_path: Path) -> None:
    """The same on the calling thread."""
    with streaming(0.05, 10) as address, mesh_of(tmp_path, at(address, deadline="250ms", stream_idle=IDLE)) as mesh:
        with mesh.sync_client() as http:
            with http.stream("GET", "http://orders/") as answer:
                assert b"".join(answer.iter_raw()) == b"x" * 10
            assert in_flight(mesh) == 0


async def test_a_stream_without_progress_is_given_up(tmp_path: Path) -> None:
    """Async and blocking: a timeout, and no permit is kept."""
    with streaming(30, 1) as address, mesh_of(tmp_path, at(address, stream_idle=IDLE)) as mesh:
        async with mesh.client() as http:
            with pytest.raises(httpx.TimeoutException):
                async with http.stream("GET", "http://orders/") as answer:
                    await answer.aread()
        assert in_flight(mesh) == 0

        def ask() -> None:
            with mesh.sync_client() as blocking, blocking.stream("GET", "http://orders/") as answer:
                answer.read()

        with pytest.raises(httpx.TimeoutException):
            await asyncio.to_thread(ask)
        assert in_flight(mesh) == 0


async def test_an_explicit_timeout_of_httpx_wins_over_the_idle_time(tmp_path: Path) -> None:
    """A shorter one cuts sooner, a longer one waits longer."""
    with streaming(0.4, 2) as address, mesh_of(tmp_path, at(address, stream_idle=0.1)) as mesh:
        async with mesh.client() as http:
            async with http.stream("GET", "http://orders/", timeout=10) as answer:
                assert await answer.aread() == b"xx"
    with streaming(30, 1) as address, mesh_of(tmp_path, at(address, stream_idle=30)) as mesh:
        async with mesh.client() as http:
            with pytest.raises(httpx.TimeoutException):
                async with http.stream("GET", "http://orders/", timeout=0.1) as answer:
                    await answer.aread()
            assert in_flight(mesh) == 0
