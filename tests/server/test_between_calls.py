"""Does a call see anything of another on its connection, or of what came after it was judged? A real uvicorn behind the mesh's door."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider

import meshlib
from meshlib.call import Visit, current_visit
from meshlib.server.asgi import MeshASGI
from meshlib.server.door import door_of
from meshlib.server.line import Line
from meshlib.server.uvicorn import MeshHTTP
from tests.server.inside import SOMEBODY, Caller, http_scope, way
from tests.server.test_asgi import App
from tests.support import mesh_of


@contextlib.asynccontextmanager
async def served(folder: Path, app: Any, **service: Any) -> AsyncIterator[tuple[meshlib.Mesh, int]]:
    with mesh_of(folder, {"me": service}) as mesh:
        config = uvicorn.Config(mesh.asgi(app), port=0, http=MeshHTTP.behind(door_of(mesh)), log_config=None, lifespan="off")
        server = uvicorn.Server(config)
        running = asyncio.create_task(server.serve())
        while not server.started:
            await asyncio.sleep(0.01)
        try:
            yield mesh, server.servers[0].sockets[0].getsockname()[1]
        finally:
            server.should_exit = True
            await running


async def told(scope: Any, receive: Any, send: Any) -> None:
    """Answers with the headers that it sees, after the body."""
    while (await receive()).get("more_body"):
        pass
    await asyncio.sleep(float(scope["query_string"] or 0))
    body = json.dumps([name.decode() for name, _ in scope["headers"]]).encode()
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(body))]})
    await send({"type": "http.response.body", "body": body})


async def answer(reader: asyncio.StreamReader) -> bytes:
    head = await reader.readuntil(b"\r\n\r\n")
    size = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
    return await reader.readexactly(size)


HEAD = b"POST /x%b HTTP/1.1\r\nhost: me\r\ntransfer-encoding: chunked\r\n\r\n"
REST = b"3\r\nabc\r\n0\r\nX-Role: admin\r\nX-Forwarded-For: 6.6.6.6\r\n\r\n"


async def test_what_a_trailer_says_is_no_header(tmp_path: Path) -> None:
    """Neither in one piece with the head, nor while the call waits for a place."""
    room = {"in_flight": 1, "queue": 5, "codel": {"target": "1s", "interval": "2s"}}
    async with served(tmp_path, told, inbound=room) as (_, port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(HEAD % b"" + REST)
        assert json.loads(await answer(reader)) == ["host", "transfer-encoding"]
        other, busy = await asyncio.open_connection("127.0.0.1", port)
        busy.write(b"GET /slow?0.3 HTTP/1.1\r\nhost: me\r\n\r\n")
        await asyncio.sleep(0.1)
        writer.write(HEAD % b"" + b"")
        await asyncio.sleep(0.05)
        writer.write(REST)
        assert json.loads(await answer(reader)) == ["host", "transfer-encoding"]
        await answer(other)
        busy.close()
        writer.close()


async def test_a_call_is_never_traced_under_another_of_its_connection(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that came before the answer to the one before, and one after a large upload, are begun in a context of their own."""
    seen: list[tuple[str, int]] = []
    provider = TracerProvider()
    monkeypatch.setattr(trace, "get_tracer_provider", lambda: provider)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append((scope["path"], trace.get_current_span().get_span_context().trace_id))
        await told(scope, receive, send)

    async with served(tmp_path, app) as (_, port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET /a?0.05 HTTP/1.1\r\nhost: me\r\n\r\nGET /b HTTP/1.1\r\nhost: me\r\n\r\n")
        await answer(reader)
        await answer(reader)
        writer.write(b"POST /large HTTP/1.1\r\nhost: me\r\ncontent-length: 300000\r\n\r\n" + b"x" * 300_000)
        await answer(reader)
        writer.write(b"GET /after HTTP/1.1\r\nhost: me\r\n\r\n")
        await answer(reader)
        writer.close()
    assert [path for path, _ in seen] == ["/a", "/b", "/large", "/after"]
    assert all(number for _, number in seen)
    assert len({number for _, number in seen}) == 4


async def test_a_conversation_hears_that_its_client_has_gone(tmp_path: Path) -> None:
    """After the change of protocols too: what it asks on the client's behalf ends."""
    ended: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.set()
        await reader.read()

    asked = asyncio.Event()
    stock = await asyncio.start_server(silent, "127.0.0.1", 0)
    address = f"127.0.0.1:{stock.sockets[0].getsockname()[1]}"
    with mesh_of(tmp_path, {"stock": {"discover": {"static": [address]}}}) as mesh:
        http = mesh.client()

        async def app(scope: Any, receive: Any, send: Any) -> None:
            await receive()
            await send({"type": "websocket.accept"})
            try:
                await http.get("http://stock/items/7")
            except BaseException as error:
                ended.set_result(error)
                raise

        config = uvicorn.Config(mesh.asgi(app), port=0, http=MeshHTTP.behind(door_of(mesh)), log_config=None, lifespan="off")
        server = uvicorn.Server(config)
        running = asyncio.create_task(server.serve())
        while not server.started:
            await asyncio.sleep(0.01)
        _, writer = await asyncio.open_connection("127.0.0.1", server.servers[0].sockets[0].getsockname()[1])
        key = b"sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\nsec-websocket-version: 13\r\n"
        writer.write(b"GET /ws HTTP/1.1\r\nhost: me\r\nconnection: Upgrade\r\nupgrade: websocket\r\n" + key + b"\r\n")
        await asyncio.wait_for(asked.wait(), 5)
        writer.transport.abort()
        assert isinstance(await asyncio.wait_for(ended, 5), meshlib.CallerGone)
        server.should_exit = True
        await running
    stock.close()


async def test_a_layer_further_in_knows_the_connection_too() -> None:
    """Judged again because the path was changed in between: by the same peer, and not by nobody."""
    peers: list[Any] = []

    async def inner(scope: Any, receive: Any, send: Any) -> None:
        peers.append(meshlib.peer())
        await App()(scope, receive, send)

    inbound = way()
    mesh = MeshASGI(inner, inbound)

    async def moved(scope: Any, receive: Any, send: Any) -> None:
        await mesh({**scope, "path": "/items/8", "raw_path": b"/items/8"}, receive, send)

    line, caller = Line(SOMEBODY, is_ours=True), Caller()
    await MeshASGI(moved, inbound).serve(line, http_scope(peer=None), caller.receive, caller.send)
    assert (caller.status, peers, line.visit) == (200, [SOMEBODY], None)


async def test_a_task_that_outlives_its_call_may_still_ask() -> None:
    """Its client has gone, and it does not work for that client any more."""
    asked: list[bool] = []
    go_on = asyncio.Event()

    async def background() -> None:
        await go_on.wait()
        visit = current_visit.get()
        assert visit is not None
        asked.append(visit.is_gone or visit.ends_calls or bool(visit.layer))

    async def app(scope: Any, receive: Any, send: Any) -> None:
        tasks.append(asyncio.create_task(background()))
        await asyncio.sleep(0)
        line.gone()
        await App()(scope, receive, send)

    tasks: list[asyncio.Task[None]] = []
    line, caller = Line(is_ours=True), Caller()
    scope = http_scope("/items/7", ("x-mesh-attempt", "1"), peer=None)
    await MeshASGI(app, way(mode="observe")).serve(line, scope, caller.receive, caller.send)
    go_on.set()
    await tasks[0]
    assert asked == [False]


async def test_an_errand_that_is_over_is_cut_no_more() -> None:
    """Also one within another of the same task: only what still waits is cancelled."""
    visit = Visit(None)
    outer, inner = visit.errand(), visit.errand()
    inner.end()
    outer.end()
    visit.cut()
    await asyncio.sleep(0)
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0


async def test_a_call_leaves_nothing_for_the_collector(tmp_path: Path) -> None:
    """What a call needed is gone with its last reference: cycles would stop the process for their collection now and then."""
    async with served(tmp_path, told) as (_, port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for _ in range(3):
            writer.write(b"GET /a HTTP/1.1\r\nhost: me\r\n\r\n")
            await answer(reader)
        gc.collect()
        gc.disable()
        try:
            for _ in range(100):
                writer.write(b"GET /a HTTP/1.1\r\nhost: me\r\n\r\n")
                await answer(reader)
            await asyncio.sleep(0.01)
            found = gc.collect()
        finally:
            gc.enable()
        writer.close()
    assert found < 100


async def test_a_call_that_is_not_recorded_has_a_trace_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of its own, the same for everything on its behalf, and spans of its handler aren't recorded either."""
    seen: list[tuple[int, bool, bool]] = []
    provider = TracerProvider()
    monkeypatch.setattr(trace, "get_tracer_provider", lambda: provider)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        for _ in range(2):
            with provider.get_tracer("app").start_as_current_span("work") as span:
                found = span.get_span_context()
                seen.append((found.trace_id, span.is_recording(), found.trace_flags.sampled))
        await told(scope, receive, send)

    async with served(tmp_path, app, observe={"sample": 0.0}) as (_, port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for _ in range(2):
            writer.write(b"GET /a HTTP/1.1\r\nhost: me\r\n\r\n")
            await answer(reader)
        writer.close()
    assert [tail for _, *tail in seen] == [[False, False]] * 4
    ids = [number for number, *_ in seen]
    assert ids[0] == ids[1] != ids[2] == ids[3]
    assert all(ids)
