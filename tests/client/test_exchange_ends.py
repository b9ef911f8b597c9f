"""What is left when an exchange ends otherwise than planned? No second sending, no leaked connection, and an error that tells."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import socket
import ssl
import threading
import time
import warnings
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

import meshlib
from meshlib import errors
from meshlib._native import core
from meshlib.client.way import Attempt, Reply, outcome_of, run
from tests.support import Request, Scripted, identities, mesh_of, ok, scripted

HEAD = b"\r\n\r\n"


def at(*addresses: str, **more: Any) -> dict[str, Any]:
    return {"orders": {"discover": {"static": list(addresses)}, **more}}


def failures(mesh: meshlib.Mesh) -> int:
    return sum(row["failures"] for row in mesh.engine.stats(time.monotonic()) if row["endpoint"])


def carrier_of(http: Any) -> Any:
    return http._mesh_transport._carriers.current()


def tls_of(folder: Path) -> ssl.SSLContext:
    """What an endpoint `orders` proves itself with; the identities of `me` and `orders` are made in `folder`."""
    identities(folder, "me", "orders")
    own = folder / "identities" / "orders"
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(own / "svid.pem", own / "key.pem")
    context.load_verify_locations(own / "bundle.pem")
    context.verify_mode = ssl.CERT_REQUIRED
    return context


@contextlib.asynccontextmanager
async def raw(serve: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Any]) -> AsyncIterator[str]:
    """A server below HTTP: `serve` has the connection, and is cancelled at the end."""
    tasks: list[asyncio.Task[None]] = []

    def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tasks.append(asyncio.get_running_loop().create_task(serve(reader, writer)))
        writers.append(writer)

    writers: list[asyncio.StreamWriter] = []
    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    try:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for writer in writers:
            writer.transport.abort()


@contextlib.contextmanager
def blocking(serve: Callable[[socket.socket], None]) -> Iterator[str]:
    """The same for blocking callers: each connection has a thread."""
    plug = socket.create_server(("127.0.0.1", 0))

    def one(connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            serve(connection)

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=one, args=(plug.accept()[0],), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield f"127.0.0.1:{plug.getsockname()[1]}"
    finally:
        plug.close()


@contextlib.contextmanager
def mute() -> Iterator[str]:
    """A port that takes connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as plug:
        yield f"127.0.0.1:{plug.getsockname()[1]}"


class Recorded:
    """A carrier that moves nothing: it notes the attempts, and does what the test says."""

    can_overlap = True

    def __init__(self, do: Callable[[Attempt], Reply]) -> None:
        self.attempts: list[Attempt] = []
        self._do = do

    async def exchange(self, attempt: Attempt) -> Reply:
        self.attempts.append(attempt)
        return self._do(attempt)

    async def sleep(self, seconds: float) -> None:
        pass


# --- nothing is sent twice


@pytest.mark.parametrize("kind", [errors.TlsError, errors.PeerIdentityError])
def test_tls_that_breaks_after_the_request_is_a_lost_connection(kind: type[errors.AttemptFailed]) -> None:
    """Only before the request is written does a TLS error mean that nothing was sent."""
    assert outcome_of(kind("x", is_written=True)) == core.OUTCOME_RESET
    assert outcome_of(kind("x")) == core.OUTCOME_IDENTITY


async def test_a_post_is_not_sent_twice_when_tls_breaks_under_its_answer(tmp_path: Path) -> None:
    """The endpoint has acted on it; what broke was the way back."""
    broken = []

    async def answer(server: Scripted, request: Request) -> bytes:
        return ok(b"done")

    async with scripted(answer, ssl=tls_of(tmp_path)) as server:

        async def through(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            inner, out = await asyncio.open_connection("127.0.0.1", server.port)

            async def up() -> None:
                while data := await reader.read(65536):
                    out.write(data)

            forward = asyncio.create_task(up())
            try:
                while data := await inner.read(65536):
                    if server.requests and not broken:
                        broken.append(1)
                        data = b"\x17\x03\x03\x00\x20" + bytes(32)
                    writer.write(data)
            finally:
                forward.cancel()
                out.close()

        async with raw(through) as one, raw(through) as two:
            with mesh_of(tmp_path, at(one, two), mode="enforce") as mesh:
                async with mesh.client() as http:
                    with pytest.raises(errors.TlsError) as caught:
                        await http.post("http://orders/pay", content=b"pay 100")
    assert caught.value.is_written
    assert [request.body for request in server.requests] == [b"pay 100"]


async def test_a_streamed_body_is_sent_again_only_while_all_of_it_is_here(tmp_path: Path) -> None:
    """Beyond 64 KiB its beginning is gone, even where the error says that nothing was written."""

    def drawn(attempt: Attempt) -> Reply:
        taken.append(b"".join(attempt.body))  # type: ignore[arg-type]
        raise errors.ConnectFailed("no")

    def untouched(attempt: Attempt) -> Reply:
        raise errors.ConnectFailed("no")

    with mesh_of(tmp_path, at("127.0.0.1:1", "127.0.0.1:2")) as mesh:
        for do, body, times in ((drawn, [b"a", b"b"], 2), (drawn, [bytes(40_000)] * 2, 1), (untouched, [bytes(40_000)] * 2, 2)):
            taken: list[bytes] = []
            carrier = Recorded(do)
            carrier.can_overlap = False
            with pytest.raises(errors.ConnectFailed):
                await mesh.outbound.send(carrier, "orders", "PUT", "/", [(b"host", b"orders")], iter(body))
            assert len(carrier.attempts) == times
            assert taken == [b"".join(body)] * (times if do is drawn else 0)
        assert sum(row["in_flight"] for row in mesh.engine.stats(0.0)) == 0


async def test_the_mesh_headers_of_an_incoming_call_are_not_forwarded(tmp_path: Path) -> None:
    """An application that forwards all headers says nothing of the new call's deadline and attempt."""
    carrier = Recorded(lambda attempt: (200, 1, b"OK", [], b""))
    given = [(b"Host", b"orders"), (b"X-Mesh-Deadline-Ms", b"99999"), (b"x-mesh-attempt", b"3"), (b"content-length", b"0")]
    with mesh_of(tmp_path, at("127.0.0.1:1"), deadline="2s") as mesh:
        await mesh.outbound.send(carrier, "orders", "GET", "/", given)
    sent = carrier.attempts[0].headers
    ours = [(name, int(value)) for name, value in sent if name.lower().startswith(b"x-mesh-")]
    assert [name for name, _ in ours] == [b"x-mesh-deadline-ms"]
    assert ours[0][1] <= 2000
    assert sent[:2] == [(b"Host", b"orders"), (b"content-length", b"0")]


# --- nothing is left behind


async def test_nothing_watches_a_body_that_broke(tmp_path: Path) -> None:
    """A cut answer, a cancelled one and one that was given up leave no connection in the carrier."""

    async def cut(server: Scripted, request: Request) -> bytes:
        more = "connection: close\r\n" if request.target == "/cut" else ""
        return f"HTTP/1.1 200 OK\r\n{more}content-length: 9\r\n\r\nhalf".encode()

    async with scripted(cut) as server:
        with mesh_of(tmp_path, at(server.address, retry={"attempts": 0})) as mesh:
            async with mesh.client() as http:
                carrier = carrier_of(http)
                for method in ("GET", "POST"):
                    with pytest.raises(httpx.HTTPError):
                        await http.request(method, "http://orders/cut")
                    with pytest.raises(asyncio.TimeoutError):
                        await asyncio.wait_for(http.request(method, "http://orders/slow"), 0.05)
                async with http.stream("GET", "http://orders/slow"):
                    pass
                assert not carrier._open
                assert carrier.pool.opened == 5


def test_connections_of_loops_that_are_over_are_closed(tmp_path: Path) -> None:
    """A module-level client that is used by one asyncio.run after the other holds the last one's connections at most."""

    def serve(connection: socket.socket) -> None:
        while connection.recv(65536):
            connection.sendall(ok())

    with blocking(serve) as address, mesh_of(tmp_path, at(address)) as mesh, warnings.catch_warnings():
        warnings.simplefilter("error", ResourceWarning)
        http = mesh.client()

        async def one() -> None:
            assert (await http.get("http://orders/")).status_code == 200

        held = []
        for _ in range(10):
            asyncio.run(one())
            held += [connection for idle in _last(http).pool._idle.values() for connection in idle]
        transports = [connection._transport for connection in held]
        gc.collect()
        assert len(http._mesh_transport._carriers._by_loop) == 1
        assert [transport is None for transport in transports] == [True] * 9 + [False]
        asyncio.run(http.aclose())
        assert not http._mesh_transport._carriers._by_loop


def _last(http: Any) -> Any:
    return list(http._mesh_transport._carriers._by_loop.values())[-1]


def test_a_blocking_connection_that_fails_to_open_closes_its_socket(tmp_path: Path) -> None:
    """Errors that are kept keep no socket."""
    identities(tmp_path, "me", "orders")
    with mute() as address, mesh_of(tmp_path, at(address), mode="enforce") as mesh, mesh.sync_client() as http:
        before = len(os.listdir("/proc/self/fd")) if os.path.exists("/proc/self/fd") else None
        kept = []
        for _ in range(3):
            with pytest.raises(errors.ConnectFailed) as caught:
                http.get("http://orders/", timeout=0.05)
            kept.append(caught.value)
        if before is not None:
            assert len(os.listdir("/proc/self/fd")) == before


async def test_a_stream_ends_with_its_client(tmp_path: Path) -> None:
    """Who reads on after aclose() is told at once, and the endpoint is not blamed."""

    async def begin(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(HEAD)
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 100000\r\n\r\nabc")
        await asyncio.sleep(30)

    async with raw(begin) as address:
        with mesh_of(tmp_path, at(address)) as mesh:
            http = mesh.client()
            answer = await http.send(http.build_request("GET", "http://orders/"), stream=True)
            carrier = carrier_of(http)
            await http.aclose()
            with pytest.raises(errors.ConnectionLost, match="closed by this side"):
                await asyncio.wait_for(answer.aread(), 5)
            assert (failures(mesh), len(carrier._open)) == (0, 0)


# --- uploads


async def test_an_upload_that_waits_is_cut_by_the_deadline(tmp_path: Path) -> None:
    """The iterator is cancelled and may clean up; the caller hears of the deadline."""
    states = []

    async def stalls() -> AsyncIterator[bytes]:
        try:
            yield b"a"
            await asyncio.sleep(30)
        finally:
            states.append("cleaned up")

    async def swallow(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await reader.read(65536):
            pass

    async with raw(swallow) as address:
        with mesh_of(tmp_path, at(address), deadline="0.05s", stream_idle="0.15s") as mesh:
            async with mesh.client() as http:
                began = time.monotonic()
                with meshlib.deadline(0.1), pytest.raises(errors.DeadlineExceeded):
                    await http.post("http://orders/", content=stalls())
                assert states == ["cleaned up"]
                # Without a deadline of the application an upload may take its time, but not fall silent.
                with pytest.raises(errors.AttemptTimeout) as caught:
                    await http.post("http://orders/", content=stalls())
                assert caught.value.reason == "send.write_timeout"
                assert time.monotonic() - began < 5
                assert not carrier_of(http)._open
    assert states == ["cleaned up", "cleaned up"]


async def test_an_answer_before_the_end_of_an_upload_is_delivered(tmp_path: Path) -> None:
    """A 413 comes while the iterator waits: the rest is for nobody."""

    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(HEAD)
        writer.write(b"HTTP/1.1 413 Content Too Large\r\ncontent-length: 2\r\n\r\nno")
        await asyncio.sleep(30)

    async def stalls() -> AsyncIterator[bytes]:
        yield b"a"
        await asyncio.sleep(30)

    async with raw(refuse) as address:
        with mesh_of(tmp_path, at(address)) as mesh:
            async with mesh.client() as http:
                answer = await asyncio.wait_for(http.post("http://orders/", content=stalls()), 5)
                assert (answer.status_code, answer.content) == (413, b"no")
                assert not carrier_of(http).pool._idle


async def test_what_an_uploads_iterator_raises_reaches_the_caller(tmp_path: Path) -> None:
    """The connection is given up, since its request can't be ended; the mistake is the application's own."""

    async def breaks() -> AsyncIterator[bytes]:
        yield b"a"
        raise LookupError("no such file")

    async def swallow(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await reader.read(65536):
            pass

    async with raw(swallow) as address:
        with mesh_of(tmp_path, at(address)) as mesh:
            async with mesh.client() as http:
                with pytest.raises(LookupError, match="no such file"):
                    await http.post("http://orders/", content=breaks())
                assert (len(carrier_of(http)._open), len(carrier_of(http).pool._idle)) == (0, 0)
            assert sum(row["in_flight"] for row in mesh.engine.stats(0.0)) == 0


async def test_a_peer_that_goes_during_an_upload_is_a_lost_connection(tmp_path: Path) -> None:
    """Nothing but our errors comes out, whatever the loop says of writing to a closed transport."""
    gone = asyncio.Event()

    async def leave(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(HEAD)
        writer.transport.abort()
        gone.set()

    async def long() -> AsyncIterator[bytes]:
        yield b"a"
        await gone.wait()
        for _ in range(1000):
            yield b"b" * 1000
            await asyncio.sleep(0)

    async with raw(leave) as address:
        with mesh_of(tmp_path, at(address)) as mesh:
            async with mesh.client() as http:
                with pytest.raises(errors.ConnectionLost):
                    await http.post("http://orders/", content=long())


async def test_a_connection_with_an_unsent_request_is_not_used_again(tmp_path: Path) -> None:
    """The peer answered early and reads no more: the next request would wait behind what it doesn't want."""

    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(HEAD)
        writer.transport.pause_reading()
        writer.write(b"HTTP/1.1 413 Content Too Large\r\ncontent-length: 0\r\n\r\n")
        await asyncio.sleep(30)

    async with raw(refuse) as address:
        with mesh_of(tmp_path, at(address)) as mesh:
            async with mesh.client() as http:
                answer = await http.post("http://orders/", content=b"x" * 30_000_000)
                assert answer.status_code == 413
                carrier = carrier_of(http)
                assert (carrier.pool.opened, len(carrier.pool), len(carrier._open)) == (1, 0, 0)


def test_a_blocking_upload_still_hears_an_answer_that_came_first(tmp_path: Path) -> None:
    """Writing fails, since the peer has closed; what it said before is in the socket."""

    def refuse(connection: socket.socket) -> None:
        connection.recv(65536)
        connection.sendall(b"HTTP/1.1 413 Content Too Large\r\ncontent-length: 2\r\n\r\nno")
        connection.shutdown(socket.SHUT_WR)

    with blocking(refuse) as address, mesh_of(tmp_path, at(address)) as mesh, mesh.sync_client() as http:
        answer = http.post("http://orders/", content=b"x" * 30_000_000)
        assert (answer.status_code, answer.content) == (413, b"no")
        assert not http._mesh_transport._carrier.pool._idle


# --- time


async def test_a_caller_without_time_for_a_connection_does_not_blame_the_endpoint(tmp_path: Path) -> None:
    """The deadline cut the handshake, not `admit.connect`."""
    identities(tmp_path, "me", "orders")
    with mute() as address, mesh_of(tmp_path, at(address), mode="enforce") as mesh:
        async with mesh.client() as http:
            with meshlib.deadline(0.03), pytest.raises(errors.DeadlineExceeded):
                await http.get("http://orders/")
        with mesh.sync_client() as blocked, meshlib.deadline(0.03), pytest.raises(errors.DeadlineExceeded):
            blocked.get("http://orders/")
        assert failures(mesh) == 0
        with mesh.sync_client() as blocked, pytest.raises(errors.ConnectFailed):
            blocked.get("http://orders/", timeout=httpx.Timeout(5, connect=0.03))
        assert failures(mesh) == 0


async def test_a_kept_alive_connection_that_tls_closes_is_stale(tmp_path: Path) -> None:
    """A close_notify instead of an answer means the same as an end of the socket: again, and no failure of the endpoint."""

    async def every_other(server: Scripted, request: Request) -> bytes | None:
        return None if len(server.requests) % 2 == 0 else ok()

    async with scripted(every_other, ssl=tls_of(tmp_path)) as server:
        with mesh_of(tmp_path, at(server.address, retry={"attempts": 0}), mode="enforce") as mesh:
            async with mesh.client() as http:
                for _ in range(3):
                    assert (await http.get("http://orders/")).status_code == 200
            assert (len(server.requests), failures(mesh)) == (5, 0)


def test_a_blocking_kept_alive_connection_that_tls_closes_is_stale(tmp_path: Path) -> None:
    """The same for threads."""
    context = tls_of(tmp_path)
    seen = []

    def every_other(connection: socket.socket) -> None:
        with context.wrap_socket(connection, server_side=True) as tls:
            while tls.recv(65536):
                seen.append(1)
                if len(seen) % 2 == 0:
                    tls.unwrap()
                    return
                tls.sendall(ok())

    with blocking(every_other) as address:
        plan = at(address, retry={"attempts": 0})
        with mesh_of(tmp_path, plan, mode="enforce") as mesh, mesh.sync_client() as http:
            for _ in range(3):
                assert http.get("http://orders/").status_code == 200
            assert (len(seen), failures(mesh)) == (5, 0)


async def test_a_deadline_that_ends_in_the_body_is_called_a_deadline(tmp_path: Path) -> None:
    """Not the timeout of an attempt: there is no time for another one."""

    async def half(server: Scripted, request: Request) -> bytes:
        return b"HTTP/1.1 200 OK\r\ncontent-length: 900000\r\n\r\nhalf"

    async with scripted(half) as server:
        with mesh_of(tmp_path, at(server.address), deadline="0.1s") as mesh:
            async with mesh.client() as http:
                with pytest.raises(errors.DeadlineExceeded) as caught:
                    await http.get("http://orders/")
                assert isinstance(caught.value, httpx.ReadTimeout)
                assert caught.value.call is not None
        with mesh_of(tmp_path, at(server.address), deadline="30s") as mesh:
            async with mesh.client() as http:
                with pytest.raises(errors.AttemptTimeout):
                    await http.get("http://orders/", timeout=0.1)


def test_a_peer_that_never_stops_talking_is_cut_by_the_deadline(tmp_path: Path) -> None:
    """A blocking read that always finds something still looks at the clock."""

    def flood(connection: socket.socket) -> None:
        connection.recv(65536)
        connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
        while True:
            connection.sendall(b"x" * 65536)

    with blocking(flood) as address, mesh_of(tmp_path, at(address), deadline="0.1s") as mesh:
        with mesh.sync_client() as http, pytest.raises(errors.DeadlineExceeded):
            http.get("http://orders/")
        with mesh.sync_client() as http, pytest.raises(errors.DeadlineExceeded):
            with meshlib.deadline(0.1), http.stream("GET", "http://orders/") as answer:
                for _ in answer.iter_raw():
                    pass


def test_no_time_left_is_late_without_waiting(tmp_path: Path) -> None:
    """A blocking attempt whose end has passed opens nothing."""
    from meshlib.client.thread import ThreadCarrier

    carrier = ThreadCarrier()
    past = time.monotonic() - 1
    with mute() as address, pytest.raises(errors.ConnectFailed, match="in time"):
        run(carrier.exchange(Attempt(address, "", None, "GET", "/", [], None, past, past, True)))
