"""What ends when the client goes away in the middle of its call? Outgoing calls that may be repeated; the handler where its route says so."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

import meshlib
from meshlib.call import current_visit
from meshlib.server.asgi import MeshASGI
from meshlib.server.line import Line
from tests.server.inside import Caller, http_scope, in_flight, way
from tests.support import mesh_of


class Backend:
    """A service that never answers, and sees who hangs up."""

    def __init__(self) -> None:
        self.asked = asyncio.Event()
        self.left = asyncio.Event()
        self.port = 0

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        self.asked.set()
        await reader.read()
        self.left.set()
        writer.close()


@pytest.fixture
async def backend() -> AsyncIterator[Backend]:
    made = Backend()
    server = await asyncio.start_server(made, "127.0.0.1", 0)
    made.port = server.sockets[0].getsockname()[1]
    yield made
    server.close()


@pytest.fixture
def http(tmp_path: Path, backend: Backend) -> Any:
    with mesh_of(tmp_path, {"stock": {"discover": {"static": [f"127.0.0.1:{backend.port}"]}}}) as mesh:
        yield mesh.client()


class Story:
    """A call on a line of ours, whose handler does what it is told."""

    def __init__(self, do: Callable[[], Any], on_disconnect: str = "calls") -> None:
        self.inbound = way(mode="observe", on_disconnect=on_disconnect)
        self.line = Line(is_ours=True)
        self.ended: BaseException | str | None = None
        self.caller = Caller()

        async def app(scope: Any, receive: Any, send: Any) -> None:
            try:
                await do()
                self.ended = "well"
            except BaseException as error:
                self.ended = error
                raise
            await send({"type": "http.response.start", "status": 204, "headers": []})
            await send({"type": "http.response.body", "body": b""})

        self.task = asyncio.create_task(
            MeshASGI(app, self.inbound).serve(self.line, http_scope(peer=None), self.caller.receive, self.caller.send)
        )

    async def over(self) -> None:
        await asyncio.wait({self.task}, timeout=5)
        assert self.task.done()


async def test_an_outgoing_call_that_may_be_repeated_ends_with_its_client(http: Any, backend: Backend) -> None:
    """At once, with an error of its own; the connection to the other service is dropped, and no place is kept."""
    story = Story(lambda: http.get("http://stock/items/7"))
    await asyncio.wait_for(backend.asked.wait(), 5)
    story.line.gone()
    await story.over()
    await asyncio.wait_for(backend.left.wait(), 5)
    assert isinstance(story.ended, meshlib.CallerGone)
    assert story.ended.call is not None
    assert story.ended.reason == "handle.cancelled"
    assert in_flight(story.inbound) == 0


async def test_a_call_in_a_task_of_the_handler_ends_too(http: Any, backend: Backend) -> None:
    """Whichever task it was that asked: all of one call share the visit."""

    async def do() -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(http.get("http://stock/items/7"))
            group.create_task(asyncio.sleep(60))

    story = Story(do)
    await asyncio.wait_for(backend.asked.wait(), 5)
    story.line.gone()
    await story.over()
    assert isinstance(story.ended, BaseExceptionGroup)
    assert [type(error) for error in story.ended.exceptions] == [meshlib.CallerGone]


async def test_a_payment_does_not_stop_half_way(http: Any, backend: Backend) -> None:
    """A call that must not be repeated goes on without the client, and so does the handler."""
    story = Story(lambda: http.post("http://stock/payments", content=b"7"))
    await asyncio.wait_for(backend.asked.wait(), 5)
    story.line.gone()
    await asyncio.sleep(0.1)
    assert (story.ended, backend.left.is_set()) == (None, False)
    story.task.cancel()
    await story.over()


async def test_a_call_that_begins_afterwards_is_refused(http: Any, backend: Backend) -> None:
    """If it could be repeated; nobody waits for its answer."""
    released = asyncio.Event()

    async def do() -> None:
        await released.wait()
        await http.get("http://stock/items/7")

    story = Story(do)
    await asyncio.sleep(0)
    story.line.gone()
    released.set()
    await story.over()
    assert isinstance(story.ended, meshlib.CallerGone)
    assert not backend.asked.is_set()


async def test_a_route_may_keep_everything(http: Any, backend: Backend) -> None:
    """`on_disconnect: nothing`."""
    story = Story(lambda: http.get("http://stock/items/7"), "nothing")
    await asyncio.wait_for(backend.asked.wait(), 5)
    story.line.gone()
    await asyncio.sleep(0.1)
    assert (story.ended, backend.left.is_set()) == (None, False)
    story.task.cancel()
    await story.over()


async def test_a_route_may_end_the_handler(backend: Backend) -> None:
    """`on_disconnect: handler`: it is cancelled as a task is; the server sees no error."""
    story = Story(lambda: asyncio.sleep(60), "handler")
    await asyncio.sleep(0.05)
    story.line.gone()
    await story.over()
    assert isinstance(story.ended, asyncio.CancelledError)
    assert not story.task.cancelled()
    assert story.task.exception() is None
    assert in_flight(story.inbound) == 0


async def test_a_handler_that_is_cancelled_by_somebody_else_is_cancelled(http: Any, backend: Backend) -> None:
    """Both at once: whoever cancelled the task is heard."""
    story = Story(lambda: http.get("http://stock/items/7"))
    await asyncio.wait_for(backend.asked.wait(), 5)
    story.line.gone()
    story.task.cancel()
    await story.over()
    assert story.task.cancelled()


async def test_a_timeout_of_the_handler_goes_on_working(http: Any, backend: Backend) -> None:
    """What the client's leaving cancelled doesn't count as a cancellation of anything around it."""

    async def do() -> None:
        async with asyncio.timeout(30):
            await http.get("http://stock/items/7")

    story = Story(do)
    await asyncio.wait_for(backend.asked.wait(), 5)
    story.line.gone()
    await story.over()
    assert isinstance(story.ended, meshlib.CallerGone)
    assert story.task.cancelling() == 0


async def test_a_call_that_waits_for_a_place_is_dropped_with_its_client() -> None:
    """Nothing was begun: no handler runs for nobody, and the queue is free for others."""
    came: list[str] = []
    release = asyncio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        came.append(scope["query_string"].decode())
        await release.wait()
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    room = {"in_flight": 1, "queue": 3.0, "target": 0.005, "interval": 5.0}
    inbound = way(mode="observe", admission=room)
    mesh, lines, caller = MeshASGI(app, inbound), [Line(is_ours=True) for _ in range(3)], Caller()
    tasks = []
    for name, line in zip("abc", lines, strict=True):
        scope = http_scope(f"/items/7?{name}", peer=None)
        tasks.append(asyncio.create_task(mesh.serve(line, scope, caller.receive, caller.send)))
        await asyncio.sleep(0)
    lines[1].gone()
    await asyncio.wait({tasks[1]}, timeout=5)
    assert (tasks[1].exception(), inbound.gate.load()["waiting"]) == (None, 1)
    release.set()
    await asyncio.gather(*tasks)
    assert (came, in_flight(inbound)) == (["a", "c"], 0)


async def test_an_idle_connection_that_closes_ends_nothing() -> None:
    """The call is over with its answer, and what runs on behind it has no client to lose."""
    seen: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body", "body": b""})
        line.gone()
        seen.append(current_visit.get())

    line = Line(is_ours=True)
    caller = Caller()
    await MeshASGI(app, way(mode="observe")).serve(line, http_scope(peer=None), caller.receive, caller.send)
    assert seen[0].is_gone is False


async def test_a_task_that_outlives_its_call_has_no_deadline() -> None:
    """The remaining time belongs to the call; what was started on the way and runs on has time of its own."""
    left: list[Any] = []
    go_on = asyncio.Event()

    async def background() -> None:
        left.append(meshlib.remaining() is not None)
        await go_on.wait()
        left.append(meshlib.remaining())

    async def app(scope: Any, receive: Any, send: Any) -> None:
        task = asyncio.create_task(background())
        await asyncio.sleep(0)
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body", "body": b""})
        go_on.set()
        await task

    caller = Caller()
    scope = http_scope("/items/7", ("x-mesh-deadline-ms", "5000"), peer=None)
    await MeshASGI(app, way(mode="observe")).serve(Line(is_ours=True), scope, caller.receive, caller.send)
    assert left == [True, None]
