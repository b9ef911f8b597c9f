"""Is anything lost when a call is cancelled, wherever it happens to be?

A call is driven again and again, and its task is cancelled at the first await, at the second, and so on until it comes through:
once while it waits (`at`), once when what it awaits has come but the task doesn't know yet (`late`), once after so many turns of the
loop, wherever its inner tasks are by then (`turn`). Afterwards there is no permit, no socket, no task and no complaint left, and the
next call works. The servers run in a thread of their own, so that every task of the loop is the client's.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import signal
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Generator, Iterator
from pathlib import Path
from typing import Any

import h2.events
import h2.exceptions
import httpx
import pytest

import meshlib
from tests.chaos.elsewhere import at, elsewhere, full, in_flight, listening, mute, sockets, tls_of
from tests.client.http2_peer import Peer
from tests.support import Request, Scripted, mesh_of, ok

Ask = Callable[[Any], Coroutine[Any, Any, Any]]
PIECE = b"x" * 10_000
LOOPS = ["asyncio", "uvloop"]


class Cut(Coroutine[Any, Any, Any]):
    """A coroutine that has its own task cancelled at its `number`-th await. `has_cut` tells whether it came so far."""

    def __init__(
        self, inner: Coroutine[Any, Any, Any], number: int, how: str, cancel: Callable[[], object] | None = None
    ) -> None:
        self.inner = inner
        self.left = number
        self.how = how
        self.has_cut = False
        self._cancel = cancel

    def send(self, value: Any) -> Any:
        if self.how == "turn" and self._cancel is None:
            self._cancel = self._task().cancel
            self._turn()
        return self._seen(self.inner.send(value))

    def throw(self, *error: Any) -> Any:
        return self._seen(self.inner.throw(*error))

    def close(self) -> None:
        self.inner.close()

    def __await__(self) -> Generator[Any, Any, Any]:
        return (yield from self.inner.__await__())

    def _seen(self, awaited: Any) -> Any:
        if self.how == "turn":
            return awaited
        self.left -= 1
        if self.left == 0:
            cancel = self._cancel or self._task().cancel
            if self.how == "at":
                self._now(cancel)
            elif awaited is None:
                asyncio.get_running_loop().call_soon(self._now, cancel)
            else:
                # Called before the task itself hears of it, since it asked first.
                awaited.add_done_callback(lambda _: self._now(cancel))
        return awaited

    def _turn(self) -> None:
        self.left -= 1
        if self.left == 0 and self._cancel is not None:
            self._now(self._cancel)
        elif self.left > 0:
            asyncio.get_running_loop().call_soon(self._turn)

    def _now(self, cancel: Callable[[], object]) -> None:
        self.has_cut = cancel() is not False

    @staticmethod
    def _task() -> asyncio.Task[Any]:
        task = asyncio.current_task()
        assert task is not None
        return task


def run(loop: str, main: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Run on "asyncio" or "uvloop"; whatever the loop or the garbage collector complains about fails the test."""
    factory: Any = None
    if loop == "uvloop":
        factory = pytest.importorskip("uvloop").new_event_loop
    complaints: list[str] = []

    async def watched() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(repr(context)))
        await main()

    previous, sys.unraisablehook = sys.unraisablehook, lambda found: complaints.append(repr(found))
    try:
        with asyncio.Runner(loop_factory=factory) as runner:
            runner.run(watched())
        gc.collect()
    finally:
        sys.unraisablehook = previous
    assert complaints == []


async def settled(judge: Callable[[], Any], wanted: Any, seconds: float = 3.0) -> None:
    """The other side needs a moment to see a connection end."""
    end = time.monotonic() + seconds
    while (found := judge()) != wanted and time.monotonic() < end:
        await asyncio.sleep(0.002)
    assert found == wanted


def others() -> list[str]:
    """All tasks of this loop but the one that asks."""
    return [repr(task) for task in asyncio.all_tasks() if task is not asyncio.current_task()]


def streams(http: Any) -> int:
    """The exchanges that a client's connections of HTTP/2 still carry."""
    connections = http._transport._carriers.current()._open
    return sum(getattr(connection, "exchanges", 0) for connection in connections)


async def cut_everywhere(mesh: meshlib.Mesh, ask: Ask, how: str, most: int = 200, make: Any = None) -> int:
    """Cancel a call at each await in turn, until it comes through; returns at how many."""
    make = make or mesh.client
    async with make() as http:
        await ask(http)  # what is opened once in a process is open
    for number in range(1, most + 1):
        async with make() as http:
            cut = Cut(ask(http), number, how)
            task: asyncio.Task[Any] = asyncio.get_running_loop().create_task(cut)
            (result,) = await asyncio.gather(task, return_exceptions=True)
            where = f"{how} {number}: {result!r}"
            assert cut.has_cut == isinstance(result, asyncio.CancelledError), where
            assert (in_flight(mesh), streams(http)) == (0, 0), where
            await settled(others, [])
            answer = await http.get("http://orders/")
            assert (answer.status_code, in_flight(mesh)) == (200, 0), where
        await settled(sockets, 0)
        if not cut.has_cut:
            assert not isinstance(result, BaseException), where
            return number - 1
    return most


# ------------------------------------------------------------------ the calls


async def answers(server: Scripted, request: Request) -> bytes | None:
    match request.target:
        case "/long":
            return b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n" + b"2710\r\n%b\r\n" % PIECE * 51 + b"0\r\n\r\n"
        case "/moved":
            return b"HTTP/1.1 302 Found\r\nlocation: /\r\ncontent-length: 0\r\n\r\n"
        case "/busy":
            return b"HTTP/1.1 503 Service Unavailable\r\ncontent-length: 0\r\n\r\n"
        case "/never":
            await asyncio.sleep(60)
        case "/slow" if "x-mesh-attempt" not in request.headers:
            await asyncio.sleep(60)
    return ok(b"ok")


async def get(http: Any) -> None:
    assert (await http.get("http://orders/")).content == b"ok"


async def get_again(http: Any) -> None:
    """The second of them finds a connection in the pool."""
    for _ in range(2):
        assert (await http.get("http://orders/")).content == b"ok"


async def pieces() -> AsyncIterator[bytes]:
    for _ in range(5):
        yield PIECE
        await asyncio.sleep(0)


async def upload(http: Any) -> None:
    assert (await http.post("http://orders/", content=pieces())).content == b"ok"


async def download(http: Any) -> None:
    size = 0
    async with http.stream("GET", "http://orders/long") as answer:
        async for piece in answer.aiter_raw():
            size += len(piece)
            await asyncio.sleep(0)
    assert size == 51 * len(PIECE)


async def redirected(http: Any) -> None:
    assert (await http.get("http://orders/moved", follow_redirects=True)).content == b"ok"


async def retried(http: Any) -> None:
    assert (await http.get("http://orders/busy")).status_code == 503


async def in_parallel(http: Any) -> None:
    """A task group hands its cancellation down to calls that stand at different places."""
    async with asyncio.TaskGroup() as group:
        for _ in range(3):
            group.create_task(get(http))
        group.create_task(upload(http))


CALLS = [get, get_again, upload, download, redirected, retried, in_parallel]


@pytest.fixture(scope="module")
def server() -> Iterator[Scripted]:
    with elsewhere(answers) as found:
        yield found


@pytest.fixture(scope="module")
def private(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Scripted]]:
    folder = tmp_path_factory.mktemp("private")
    with elsewhere(answers, tls_of(folder)) as found:
        yield folder, found


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("how", ["at", "late", "turn"])
@pytest.mark.parametrize("ask", CALLS, ids=lambda ask: ask.__name__)
def test_a_cancelled_call_leaves_nothing_behind(tmp_path: Path, server: Scripted, ask: Ask, how: str, loop: str) -> None:
    """At every await of every kind of call: no permit, no socket, no task, no complaint, and the next call works."""
    with mesh_of(tmp_path, at(server.address)) as mesh:

        async def main() -> None:
            assert await cut_everywhere(mesh, ask, how, most=40 if how == "turn" else 200) >= 1

        run(loop, main)


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("how", ["at", "late", "turn"])
def test_a_hedged_call_that_is_cancelled_leaves_neither_attempt_behind(
    tmp_path: Path, server: Scripted, how: str, loop: str
) -> None:
    """Two attempts run in tasks of their own, and both end with the caller, the first one (which nobody answers) with the second."""

    async def hedged(http: Any) -> None:
        answer = await http.get("http://orders/slow", extensions=meshlib.policy(hedge=1e-4))
        assert (answer.content, answer.extensions["meshlib.call"].attempts) == (b"ok", 2)

    with elsewhere(answers) as second, mesh_of(tmp_path, at(server.address, second.address)) as mesh:

        async def main() -> None:
            # Which of the two is asked first is balance's to say, and with it how often there is something to wait for.
            assert await cut_everywhere(mesh, hedged, how, most=60 if how == "turn" else 200) >= 1

        run(loop, main)


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("how", ["at", "late", "turn"])
@pytest.mark.parametrize("ask", [get, upload, download], ids=lambda ask: ask.__name__)
def test_a_call_cancelled_within_mutual_tls_leaves_nothing_behind(
    private: tuple[Path, Scripted], ask: Ask, how: str, loop: str
) -> None:
    """The handshake has more steps, and a connection that is half open."""
    folder, found = private
    with mesh_of(folder, at(found.address), mode="enforce") as mesh:

        async def main() -> None:
            assert await cut_everywhere(mesh, ask, how, most=30 if how == "turn" else 200) >= 2

        run(loop, main)


async def answers_http2(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """The same answers on the streams of one connection, each when its request is whole, and as far as its window goes."""
    peer = Peer(reader, writer, {})
    listening_on = asyncio.ensure_future(peer.listen())
    asked: dict[int, str] = {}
    left: dict[int, int] = {}
    while (event := await peer.heard.get()) is not None:
        # What was reset meanwhile takes no answer.
        with contextlib.suppress(h2.exceptions.ProtocolError):
            if isinstance(event, h2.events.RequestReceived):
                asked[event.stream_id] = dict(event.headers)[":path"]
            elif isinstance(event, h2.events.StreamEnded):
                target = asked[event.stream_id]
                if target == "/long":
                    peer.head(event.stream_id)
                    left[event.stream_id] = 51
                elif target == "/moved":
                    peer.head(event.stream_id, ("location", "/"), status=302, is_last=True)
                elif target == "/busy":
                    peer.head(event.stream_id, status=503, is_last=True)
                else:
                    peer.answer(event.stream_id)
        for stream in list(left):
            try:
                while left[stream] and peer.h2.local_flow_control_window(stream) >= len(PIECE):
                    left[stream] -= 1
                    peer.body(stream, PIECE, is_last=not left[stream])
            except h2.exceptions.ProtocolError:
                left[stream] = 0
            if not left[stream]:
                del left[stream]
    await listening_on


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("how", ["at", "late", "turn"])
@pytest.mark.parametrize("ask", CALLS, ids=lambda ask: ask.__name__)
def test_a_call_cancelled_within_http2_leaves_nothing_behind(tmp_path: Path, ask: Ask, how: str, loop: str) -> None:
    """Its stream is reset, and the connection goes on with the others."""
    with listening(answers_http2) as address, mesh_of(tmp_path, at(address, protocol="http2")) as mesh:

        async def main() -> None:
            assert await cut_everywhere(mesh, ask, how, most=40 if how == "turn" else 200) >= 1

        run(loop, main)


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("ask", [get, upload, download], ids=lambda ask: ask.__name__)
def test_the_transport_alone_is_as_careful(tmp_path: Path, server: Scripted, ask: Ask, loop: str) -> None:
    """An `httpx.AsyncClient` of one's own goes the full path."""
    with mesh_of(tmp_path, at(server.address)) as mesh:

        async def main() -> None:
            for how in ("at", "late"):
                assert await cut_everywhere(mesh, ask, how, make=lambda: httpx.AsyncClient(transport=mesh.transport())) >= 2

        run(loop, main)


@pytest.mark.parametrize("loop", LOOPS)
def test_an_upload_that_was_cancelled_closes_its_iterator(tmp_path: Path, server: Scripted, loop: str) -> None:
    """Files and cursors are behind such iterators, and one that waits for ever must not keep a task alive."""
    opened = closed = 0

    async def stuck() -> AsyncIterator[bytes]:
        nonlocal opened, closed
        opened += 1
        try:
            yield PIECE
            await asyncio.sleep(0)
            yield PIECE
            await asyncio.sleep(60)
        finally:
            closed += 1

    with mesh_of(tmp_path, at(server.address)) as mesh:

        async def main() -> None:
            async with mesh.client() as http:
                for number in range(1, 30):
                    task: asyncio.Task[Any] = asyncio.create_task(
                        Cut(http.post("http://orders/", content=stuck()), number, "turn")
                    )
                    (result,) = await asyncio.gather(task, return_exceptions=True)
                    assert isinstance(result, asyncio.CancelledError)
                    assert in_flight(mesh) == 0
                    await settled(others, [])
                    assert closed == opened, number
            assert opened > 10

        run(loop, main)


# ------------------------------------------------------------------ peers that keep us waiting


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("kind", ["connect", "handshake", "head"])
def test_a_call_cancelled_while_the_peer_says_nothing_leaves_nothing_behind(tmp_path: Path, kind: str, loop: str) -> None:
    """A connect that hangs, a handshake that hangs, an answer that doesn't come."""
    if kind == "handshake":
        tls_of(tmp_path)
    with full() if kind == "connect" else mute() as address:
        with mesh_of(tmp_path, at(address), mode="enforce" if kind == "handshake" else "observe") as mesh:

            async def main() -> None:
                for turns in (1, 2, 3, 5, 10):
                    async with mesh.client() as http:
                        tasks = [asyncio.get_running_loop().create_task(http.get("http://orders/")) for _ in range(5)]
                        for _ in range(turns):
                            await asyncio.sleep(0)
                        for task in tasks:
                            task.cancel()
                        found = await asyncio.gather(*tasks, return_exceptions=True)
                        assert [type(one) for one in found] == [asyncio.CancelledError] * 5
                        assert in_flight(mesh) == 0
                        await settled(others, [])
                    await settled(sockets, 0)

            run(loop, main)


# ------------------------------------------------------------------ other ways to give up


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("ask", CALLS, ids=lambda ask: ask.__name__)
def test_a_timeout_around_a_call_is_a_timeout(tmp_path: Path, server: Scripted, ask: Ask, loop: str) -> None:
    """`asyncio.timeout` cancels from outside and must get its cancellation back, at every await, or it can't turn it into its error."""
    with mesh_of(tmp_path, at(server.address)) as mesh:

        async def main() -> None:
            for number in range(1, 200):
                async with mesh.client() as http:
                    has_ended = False
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(None) as patience:
                            cut = Cut(ask(http), number, "at", lambda: patience.reschedule(0.0))
                            await cut
                            has_ended = True
                    task = asyncio.current_task()
                    assert task is not None
                    # What was cut at its last await may end before the timeout has come.
                    assert has_ended or patience.expired(), number
                    assert (task.cancelling(), in_flight(mesh)) == (0, 0), number
                    await settled(others, [])
                    assert (await http.get("http://orders/")).status_code == 200
                await settled(sockets, 0)
                if not cut.has_cut:
                    return
            raise AssertionError("never came through")

        run(loop, main)


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("is_private", [False, True], ids=["plain", "mtls"])
def test_closing_the_client_ends_the_calls_in_flight(
    tmp_path: Path, server: Scripted, private: tuple[Path, Scripted], loop: str, is_private: bool
) -> None:
    """They are told at once, and nothing of them stays."""
    folder, found = private if is_private else (tmp_path, server)
    with mesh_of(folder, at(found.address), mode="enforce" if is_private else "observe") as mesh:

        async def main() -> None:
            async with mesh.client() as http:
                await http.get("http://orders/")

            async def endless() -> AsyncIterator[bytes]:
                while True:
                    yield PIECE
                    await asyncio.sleep(0.001)

            async def slow_reader() -> None:
                async with http.stream("GET", "http://orders/long") as answer:
                    await answer.aread()
                    await asyncio.sleep(60)

            http = mesh.client()
            count = len(found.requests)
            calls: list[Awaitable[Any]] = [http.get("http://orders/never") for _ in range(10)]
            calls += [http.post("http://orders/never", content=endless()) for _ in range(2)]
            tasks = [asyncio.ensure_future(call) for call in calls]
            while len(found.requests) < count + 10:
                await asyncio.sleep(0.005)
            await http.aclose()
            done, pending = await asyncio.wait(tasks, timeout=5)
            assert len(pending) == 0
            for task in done:
                assert isinstance(task.exception(), meshlib.MeshError | httpx.TransportError), task
            assert in_flight(mesh) == 0
            await settled(others, [])
            await settled(sockets, 0)

        run(loop, main)


@pytest.mark.parametrize("loop", LOOPS)
def test_a_stream_that_is_left_early_leaves_nothing_behind(tmp_path: Path, server: Scripted, loop: str) -> None:
    """By break, by an exception in the loop's body, by an iterator that is dropped, and without reading at all."""
    with mesh_of(tmp_path, at(server.address)) as mesh:

        async def main() -> None:
            async with mesh.client() as http:
                await http.get("http://orders/")
            async with mesh.client() as http:
                async with http.stream("GET", "http://orders/long") as answer:
                    async for _ in answer.aiter_raw():
                        break
                assert in_flight(mesh) == 0
                with pytest.raises(ZeroDivisionError):
                    async with http.stream("GET", "http://orders/long") as answer:
                        async for _ in answer.aiter_raw():
                            raise ZeroDivisionError
                assert in_flight(mesh) == 0
                async with http.stream("GET", "http://orders/long") as answer:
                    iterator = answer.aiter_bytes(100)
                    await anext(iterator)
                    del iterator
                    gc.collect()
                assert in_flight(mesh) == 0
                async with http.stream("GET", "http://orders/long"):
                    pass
                assert in_flight(mesh) == 0
                assert (await http.get("http://orders/")).status_code == 200
            await settled(others, [])
            await settled(sockets, 0)

        run(loop, main)


@pytest.mark.parametrize("loop", LOOPS)
def test_an_answer_that_nobody_closed_ends_with_the_client(tmp_path: Path, server: Scripted, loop: str) -> None:
    """A mistake of the application costs a permit only as long as the client is open."""
    with mesh_of(tmp_path, at(server.address)) as mesh:

        async def main() -> None:
            async with mesh.client() as http:
                await http.get("http://orders/")
            async with mesh.client() as http:
                answer = await http.send(http.build_request("GET", "http://orders/long"), stream=True)
                assert answer.status_code == 200
                del answer
                gc.collect()
            await settled(others, [])
            await settled(sockets, 0)
            assert in_flight(mesh) == 0

        run(loop, main)


# ------------------------------------------------------------------ Ctrl-C in a blocking call


@contextlib.contextmanager
def interrupted_when(event: threading.Event) -> Iterator[None]:
    """SIGINT for the main thread once the event is set: as Ctrl-C, in the middle of whatever blocks."""

    is_over = threading.Event()

    def press() -> None:
        event.wait(10)
        # Until the caller is back in its system call, which nothing can tell. A call that failed meanwhile is not interrupted.
        if not is_over.wait(0.05):
            os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=press)
    thread.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            yield
    finally:
        is_over.set()
        event.set()
        thread.join()


@pytest.mark.parametrize("phase", ["connect", "handshake", "head", "body", "upload", "wait"])
def test_ctrl_c_in_a_blocking_call_leaves_nothing_behind(tmp_path: Path, phase: str) -> None:
    """Wherever the calling thread blocks: no permit, no socket, and the next call works."""
    tls = tls_of(tmp_path) if phase == "handshake" else None
    seen = threading.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if phase == "handshake":
            await reader.read(1)
            seen.set()
            await asyncio.sleep(60)
        await reader.readuntil(b"\r\n\r\n")
        if phase == "body":
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nhalf")
        elif phase == "wait":
            writer.write(b"HTTP/1.1 503 no\r\nretry-after: 5\r\ncontent-length: 0\r\n\r\n")
        await writer.drain()
        seen.set()
        await asyncio.sleep(60)

    def endless() -> Iterator[bytes]:
        while True:
            yield PIECE

    with contextlib.ExitStack() as stack:
        address = stack.enter_context(full() if phase == "connect" else listening(serve))
        services = at(address)
        mesh = stack.enter_context(mesh_of(tmp_path, services, mode="enforce" if phase == "handshake" else "observe"))
        with mesh.sync_client() as http:
            if phase == "connect":
                seen.set()
            with interrupted_when(seen):
                if phase == "upload":
                    http.post("http://orders/", content=endless())
                elif phase == "body":
                    with http.stream("GET", "http://orders/") as answer:
                        for _ in answer.iter_raw():
                            pass
                else:
                    http.get("http://orders/")
            assert in_flight(mesh) == 0
            with elsewhere(answers, tls) as good:
                found = (good.address, 1.0, "", {}, mesh.config.identity_of("orders") if tls else "")
                mesh.engine.resolve("orders", 10**9, [found], time.monotonic())
                assert http.get("http://orders/").status_code == 200
        assert sockets() == 0


def test_what_cuts_can_find_a_leak() -> None:
    """The tool itself: a call that forgets to give back what it took is found at the await where it forgets."""

    async def main() -> None:
        taken = 0

        async def leaky() -> None:
            nonlocal taken
            await asyncio.sleep(0)
            taken += 1
            await asyncio.sleep(0)  # not within try
            try:
                await asyncio.sleep(0)
            finally:
                taken -= 1

        left = []
        for how in ("at", "late", "turn"):
            for number in range(1, 5):
                taken = 0
                cut = Cut(leaky(), number, how)
                await asyncio.gather(asyncio.get_running_loop().create_task(cut), return_exceptions=True)
                left.append((how, number, cut.has_cut, taken))
        assert left[:8] == [
            ("at", 1, True, 0), ("at", 2, True, 1), ("at", 3, True, 0), ("at", 4, False, 0),
            ("late", 1, True, 0), ("late", 2, True, 1), ("late", 3, True, 0), ("late", 4, False, 0),
        ]  # fmt: skip
        assert 1 in [taken for how, *_, taken in left[8:]]

    asyncio.run(main())
