"""What becomes of an attempt that goes by the node agent: the same answers, errors and decisions as without it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

import meshlib
from meshlib import errors
from tests.agent.proxy_support import echo, served
from tests.client.node_agent import NodeAgent, failure
from tests.support import Request, Scripted, free_port, mesh_of, ok, scripted


async def hello(server: Scripted, request: Request) -> bytes:
    return ok(b"hello from " + request.target.encode())


@contextlib.asynccontextmanager
async def delegating(folder: Path, server: Scripted | list[str], **more: Any) -> AsyncIterator[tuple[meshlib.Mesh, NodeAgent]]:
    """A mesh whose service `orders` goes by an agent that runs."""
    endpoints = server if isinstance(server, list) else [server.address]
    path = folder / "data.sock"
    async with NodeAgent(path) as agent:
        orders = {"discover": {"static": endpoints}, "delegate": "agent", **more}
        with mesh_of(folder, {"orders": orders}, agent=agent_of(path)) as mesh:
            yield mesh, agent


def agent_of(path: Path) -> dict[str, Any]:
    return {"data": str(path), "ca": "ca"}


async def eventually(holds: Any, seconds: float = 5.0) -> None:
    async with asyncio.timeout(seconds):
        while not holds():
            await asyncio.sleep(0.01)


async def test_an_attempt_goes_by_the_agent(tmp_path: Path) -> None:
    """Of both kinds of client, over connections to the agent that are kept; and the record says so."""
    async with scripted(hello) as server, delegating(tmp_path, server) as (mesh, agent):
        async with mesh.client() as http:
            for _ in range(3):
                answer = await http.get("http://orders/a", headers={"x-own": "1"})
                assert answer.text == "hello from /a"
        with mesh.sync_client() as blocking:
            for _ in range(3):
                answer = await asyncio.to_thread(blocking.get, "http://orders/b")
                assert answer.text == "hello from /b"
        assert len(agent.requests) == 6
        first = agent.requests[0].headers
        assert first["x-mesh-endpoint"] == server.address
        assert (first["x-mesh-expect"], first["x-mesh-protocol"], first["x-mesh-connect"]) == ("-", "http1", "1000")
        assert (first["host"], first["x-own"]) == ("orders", "1")
        assert not {name for name in server.requests[0].headers if name.startswith("x-mesh-e")}
        call = answer.extensions["meshlib.call"]
        assert call.record()["carried"] == ["agent"]
        assert "by the node agent" in call.explain()
        assert mesh.delegation is not None
        stats = mesh.delegation.stats()
        assert (stats["sent"], sum(stats["fallbacks"].values())) == (6, 0)


async def test_a_service_that_is_not_delegated_does_not(tmp_path: Path) -> None:
    """Though another one is."""
    async with scripted(hello) as server, delegating(tmp_path, server, delegate="off") as (mesh, agent):
        async with mesh.client() as http:
            answer = await http.get("http://orders/a")
        assert answer.text == "hello from /a"
        assert agent.requests == []
        assert "carried" not in answer.extensions["meshlib.call"].record()


@pytest.mark.parametrize("kind", ["async", "sync"])
async def test_a_unix_socket_is_connected_to_by_the_process_itself(tmp_path: Path, kind: str) -> None:
    """Who listens there asks the kernel who comes, and must not hear that it is the agent."""
    with served(echo, tmp_path / "app.sock") as path:
        async with delegating(tmp_path, [f"unix:{path}"]) as (mesh, agent):
            if kind == "async":
                async with mesh.client() as http:
                    answer = await http.post("http://orders/a", content=b"x")
            else:
                with mesh.sync_client() as blocking:
                    answer = await asyncio.to_thread(blocking.post, "http://orders/a", content=b"x")
        assert (answer.status_code, answer.text) == (200, "x")
        assert agent.requests == []


async def test_an_application_cannot_say_where_the_agent_goes(tmp_path: Path) -> None:
    """What it writes under the names between us and the agent is not passed on."""
    async with scripted(hello) as server, delegating(tmp_path, server) as (mesh, agent):
        async with mesh.client() as http:
            await http.get("http://orders/", headers={"X-Mesh-Endpoint": "10.0.0.1:1", "x-mesh-expect": "spiffe://evil/x"})
        assert agent.requests[0].headers["x-mesh-endpoint"] == server.address
        assert agent.requests[0].headers["x-mesh-expect"] == "-"


REASONS = [
    ("connect; written=0", errors.ConnectFailed, "send.connect", "refused"),
    ("connect_timeout; written=0", errors.ConnectFailed, "send.connect_timeout", "refused"),
    ("identity; written=0", errors.PeerIdentityError, "secure.peer_identity", "identity"),
    ("tls; written=0", errors.TlsError, "secure.tls", "identity"),
    ("unwritten; written=0", errors.ConnectionLost, "send.unwritten", "unwritten"),
    ("stale; written=1", errors.ConnectionLost, "send.stale", "stale"),
    ("declined; written=1", errors.ConnectionLost, "send.declined", "declined"),
    ("closed; written=1", errors.ConnectionLost, "send.closed", "reset"),
    ("protocol; written=1", errors.ProtocolError, "send.protocol", "protocol"),
    ("caller; written=1", errors.ConnectionLost, "send.client_closed", "cancelled"),
]


@pytest.mark.parametrize("kind", ["async", "sync"])
@pytest.mark.parametrize(("value", "error", "reason", "word"), REASONS, ids=[row[0].split(";")[0] for row in REASONS])
async def test_what_the_agent_met_is_what_the_engine_is_told(
    tmp_path: Path, kind: str, value: str, error: type[errors.AttemptFailed], reason: str, word: str
) -> None:
    """The same error, reason and judgement as of an attempt of our own; the text is the agent's."""
    async with scripted(hello) as server, delegating(tmp_path, server) as (mesh, agent):
        agent.fault = failure(value, "what the agent says.")
        with pytest.raises(error) as caught:
            if kind == "async":
                async with mesh.client() as http:
                    await http.post("http://orders/", content=b"x")
            else:
                with mesh.sync_client() as blocking:
                    await asyncio.to_thread(blocking.post, "http://orders/", content=b"x")
        told: Any = caught.value
        assert told.reason == reason
        assert told.is_written == value.endswith("1")
        assert "what the agent says." in str(told)
        events = told.call.record()["events"]
        assert next(event["what"] for event in events if event["phase"] == "send") == word
        assert server.requests == []


async def test_the_engine_tries_another_endpoint_as_ever(tmp_path: Path) -> None:
    """A refused connection behind the agent ejects that endpoint, and the next attempt goes elsewhere, by the agent again."""
    async with scripted(hello) as server:
        dead = Scripted(hello)
        await dead.start()
        await dead.stop()
        async with delegating(tmp_path, [dead.address, server.address], balance={"policy": "round_robin"}) as (mesh, agent):
            async with mesh.client() as http:
                answer = await http.post("http://orders/a", content=b"x")
            assert answer.text == "hello from /a"
            assert [request.headers["x-mesh-endpoint"] for request in agent.requests] == [dead.address, server.address]
            assert answer.extensions["meshlib.call"].record()["carried"] == ["agent", "agent"]


async def test_a_body_streams_both_ways(tmp_path: Path) -> None:
    """Uploads from an iterator, and answers that are read as they come."""

    async def echo(server: Scripted, request: Request) -> bytes:
        return b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n" + b"%x\r\n%s\r\n0\r\n\r\n" % (
            len(request.body),
            request.body,
        )

    async def pieces() -> AsyncIterator[bytes]:
        for at in range(3):
            yield b"%d" % at

    async with scripted(echo) as server, delegating(tmp_path, server) as (mesh, agent):
        async with mesh.client() as http, http.stream("POST", "http://orders/", content=pieces()) as answer:
            assert b"".join([piece async for piece in answer.aiter_raw()]) == b"012"
        with mesh.sync_client() as blocking:

            def stream() -> bytes:
                with blocking.stream("POST", "http://orders/", content=iter([b"3", b"4"])) as answer:
                    return b"".join(answer.iter_raw())

            assert await asyncio.to_thread(stream) == b"34"
        assert len(agent.requests) == 2


async def test_an_upgrade_goes_by_the_agent(tmp_path: Path) -> None:
    """And the bytes behind it, both ways."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await Request.read(reader)
        writer.write(b"HTTP/1.1 101 Switching Protocols\r\nupgrade: echo\r\nconnection: upgrade\r\n\r\n")
        while piece := await reader.read(100):
            writer.write(piece.upper())
        writer.close()

    listening = await asyncio.start_server(serve, "127.0.0.1", 0)
    address = f"127.0.0.1:{listening.sockets[0].getsockname()[1]}"
    try:
        async with delegating(tmp_path, [address]) as (mesh, agent), mesh.client() as http:
            fields = {"connection": "upgrade", "upgrade": "echo"}
            async with http.stream("GET", "http://orders/", headers=fields) as answer:
                assert answer.status_code == 101
                stream = answer.extensions["network_stream"]
                await stream.write(b"hello")
                assert await stream.read(100) == b"HELLO"
            assert len(agent.requests) == 1
    finally:
        listening.close()


# --- without the agent


@pytest.mark.parametrize("kind", ["async", "sync"])
@pytest.mark.parametrize("method", ["GET", "POST"])
async def test_nobody_notices_that_there_is_no_agent(tmp_path: Path, kind: str, method: str) -> None:
    """Where nobody listens nothing was sent, so that every call goes in the process: one attempt, as the engine sees it."""
    async with scripted(hello) as server, delegating(tmp_path, server) as (mesh, agent):
        await agent.stop()
        for _ in range(3):
            if kind == "async":
                async with mesh.client() as http:
                    answer = await http.request(method, "http://orders/a")
            else:
                with mesh.sync_client() as blocking:
                    answer = await asyncio.to_thread(blocking.request, method, "http://orders/a")
            assert answer.text == "hello from /a"
            call = answer.extensions["meshlib.call"]
            assert call.attempts == 1
            assert call.record()["carried"] in (["gone"], ["away"])
        assert mesh.delegation is not None
        stats = mesh.delegation.stats()
        assert stats["state"] == "away"
        assert stats["fallbacks"]["gone"] + stats["fallbacks"]["away"] == 3
        assert stats["fallbacks"]["away"] >= 2


async def test_calls_go_by_the_agent_again_when_it_is_back(tmp_path: Path) -> None:
    """By themselves, and soon."""
    async with scripted(hello) as server, delegating(tmp_path, server) as (mesh, agent), mesh.client() as http:
        await agent.stop()
        await http.get("http://orders/")
        assert mesh.delegation is not None and mesh.delegation.watch.is_away
        await agent.start()
        await eventually(lambda: mesh.delegation is not None and not mesh.delegation.watch.is_away, 2.0)
        answer = await http.get("http://orders/")
        assert answer.extensions["meshlib.call"].record()["carried"] == ["agent"]
        assert mesh.delegation.stats()["changes"] == {"up": 2, "away": 1} or mesh.delegation.stats()["changes"] == {
            "up": 1,
            "away": 1,
        }


async def test_a_mesh_that_was_closed_looks_at_the_agent_again_when_it_is_used(tmp_path: Path) -> None:
    """What `close` ended, `start` begins anew."""
    async with scripted(hello) as server, delegating(tmp_path, server) as (mesh, agent):
        async with mesh.client() as http:
            await http.get("http://orders/")
        await asyncio.to_thread(mesh.close)
        await agent.stop()
        async with mesh.client() as http:
            await http.get("http://orders/")
            assert mesh.delegation is not None and mesh.delegation.watch.is_away
            await agent.start()
            await eventually(lambda: mesh.delegation is not None and not mesh.delegation.watch.is_away, 2.0)


@pytest.mark.parametrize("kind", ["async", "sync"])
async def test_a_call_under_way_survives_an_agent_that_dies(tmp_path: Path, kind: str) -> None:
    """If it is idempotent. The endpoint isn't blamed, and the engine knows of one attempt."""
    release = asyncio.Event()

    async def slow(server: Scripted, request: Request) -> bytes:
        if len(server.requests) == 1:
            await release.wait()
        return ok(b"done")

    async with scripted(slow) as server, delegating(tmp_path, server) as (mesh, agent):
        with contextlib.ExitStack() as stack:
            if kind == "async":
                http = mesh.client()
                call = asyncio.create_task(http.get("http://orders/"))
            else:
                blocking = stack.enter_context(mesh.sync_client())
                call = asyncio.create_task(asyncio.to_thread(blocking.get, "http://orders/"))
            await eventually(lambda: server.requests)
            await agent.stop()
            answer = await call
            release.set()
            assert answer.text == "done"
            assert answer.extensions["meshlib.call"].record()["carried"] == ["closed"]
            assert answer.extensions["meshlib.call"].attempts == 1
            row = next(row for row in mesh.engine.stats(0.0) if row["endpoint"] == server.address)
            assert not row.get("is_ejected")
            if kind == "async":
                await http.aclose()


async def test_a_call_that_may_not_be_repeated_fails_and_blames_nobody(tmp_path: Path) -> None:
    """It may have been processed. Its endpoint has a good name still."""
    release = asyncio.Event()

    async def slow(server: Scripted, request: Request) -> bytes:
        await release.wait()
        return ok(b"done")

    async with scripted(slow) as server, delegating(tmp_path, server) as (mesh, agent), mesh.client() as http:
        call = asyncio.create_task(http.post("http://orders/", content=b"x"))
        await eventually(lambda: server.requests)
        await agent.stop()
        with pytest.raises(errors.ConnectionLost) as caught:
            await call
        release.set()
        assert (caught.value.reason, caught.value.is_written) == ("send.agent_closed", True)
        row = next(row for row in mesh.engine.stats(0.0) if row["endpoint"] == server.address)
        assert json.dumps(row).count("ejected") == 0 or not row.get("is_ejected")
        assert len(server.requests) == 1
        assert (await http.get("http://orders/")).text == "done"


@pytest.mark.parametrize("kind", ["async", "sync"])
async def test_a_silent_agent_is_found_out_and_its_calls_go_on(tmp_path: Path, kind: str) -> None:
    """An idempotent call that waits for it is taken away from it; the next ones don't try."""
    async with scripted(hello) as server, delegating(tmp_path, server) as (mesh, agent):
        async with mesh.client() as http:
            with mesh.sync_client() as blocking:

                async def get() -> Any:
                    if kind == "async":
                        return await http.get("http://orders/")
                    return await asyncio.to_thread(blocking.get, "http://orders/")

                await get()
                agent.is_silent = True
                loop = asyncio.get_running_loop()
                begun = loop.time()
                answer = await get()
                assert answer.extensions["meshlib.call"].record()["carried"] == ["silent"]
                assert loop.time() - begun < 2.0
                answer = await get()
                assert answer.extensions["meshlib.call"].record()["carried"] == ["away"]


async def test_a_call_that_may_not_be_repeated_waits_for_a_silent_agent(tmp_path: Path) -> None:
    """It may come to itself, and then the answer is there: nothing is lost by waiting within the deadline."""
    go_on = asyncio.Event()

    async def slow(server: Scripted, request: Request) -> bytes:
        await go_on.wait()
        return ok(b"done")

    async with scripted(slow) as server, delegating(tmp_path, server) as (mesh, agent), mesh.client() as http:
        call = asyncio.create_task(http.post("http://orders/", content=b"x"))
        await eventually(lambda: server.requests)
        agent.is_silent = True
        await eventually(lambda: mesh.delegation is not None and mesh.delegation.watch.is_away)
        assert not call.done()
        go_on.set()
        assert (await call).text == "done"


async def test_an_agent_that_cannot_says_so_and_the_process_does_it(tmp_path: Path) -> None:
    """A reason that speaks of no endpoint is the agent's own trouble."""
    async with scripted(hello) as server, delegating(tmp_path, server) as (mesh, agent), mesh.client() as http:
        agent.fault = failure("agent; written=0", "no identity yet.")
        answer = await http.post("http://orders/", content=b"x")
        assert answer.extensions["meshlib.call"].record()["carried"] == ["unable"]


async def test_a_socket_of_somebody_else_is_nobodys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests are not handed to whoever has put a socket there."""
    from meshlib.client.delegated_agent import AgentSocket

    monkeypatch.setattr(AgentSocket, "_owner", lambda self, plug: 4711)
    async with scripted(hello) as server, delegating(tmp_path, server) as (mesh, agent), mesh.client() as http:
        assert (await http.get("http://orders/")).text == "hello from /"
        assert agent.requests == []
        assert mesh.delegation is not None
        assert "user 4711" in mesh.delegation.stats()["why"]


async def test_a_full_queue_is_no_reason_to_wait(tmp_path: Path) -> None:
    """An agent that is slow to accept costs no time."""
    import socket

    path = tmp_path / "full.sock"
    plug = socket.socket(socket.AF_UNIX)
    plug.bind(str(path))
    plug.listen(0)
    waiting = socket.socket(socket.AF_UNIX)
    waiting.connect(str(path))
    try:
        async with scripted(hello) as server:
            orders = {"discover": {"static": [server.address]}, "delegate": "agent"}
            with mesh_of(tmp_path, {"orders": orders}, agent=agent_of(path)) as mesh:
                async with mesh.client() as http:
                    answer = await http.post("http://orders/", content=b"x")
                    assert answer.extensions["meshlib.call"].record()["carried"][0] in ("full", "away")
                with mesh.sync_client() as blocking:
                    answer = await asyncio.to_thread(blocking.post, "http://orders/", content=b"x")
                    assert answer.extensions["meshlib.call"].record()["carried"][0] in ("full", "away")
    finally:
        waiting.close()
        plug.close()


async def test_threads_share_the_connections_to_the_agent(tmp_path: Path) -> None:
    """Many threads at once, and an agent that goes and comes meanwhile: no call fails."""
    async with scripted(hello) as server, delegating(tmp_path, server) as (mesh, agent):
        failures: list[BaseException] = []
        is_over = threading.Event()
        with mesh.sync_client() as blocking:

            def work() -> None:
                while not is_over.is_set():
                    try:
                        assert blocking.get("http://orders/x").status_code == 200
                    except BaseException as error:
                        failures.append(error)

            threads = [asyncio.create_task(asyncio.to_thread(work)) for _ in range(4)]
            for _ in range(3):
                await asyncio.sleep(0.15)
                await agent.stop()
                await asyncio.sleep(0.1)
                await agent.start()
            is_over.set()
            await asyncio.gather(*threads)
        assert failures == []


async def test_what_went_by_the_agent_is_told(tmp_path: Path) -> None:
    """In the metrics, and for `meshlib status`; there is nothing of it where nothing is delegated."""
    async with scripted(hello) as server, delegating(tmp_path, server) as (mesh, agent), mesh.client() as http:
        await http.get("http://orders/")
        await eventually(lambda: "meshlib_admit_agent_up 1" in mesh.metrics())
        assert 'meshlib_admit_delegated_total{by="agent"} 1' in mesh.metrics()
        told = mesh.watch.status(0.0)["agent"]
        assert (told["out"]["sent"], told["out"]["state"], told["in"]) == (1, "up", None)
        await agent.stop()
        await http.get("http://orders/")
        text = mesh.metrics()
        assert "meshlib_admit_agent_up 0" in text
        assert 'meshlib_admit_agent_changes_total{state="away"} 1' in text
    with mesh_of(tmp_path, {"orders": {"discover": {"static": ["127.0.0.1:1"]}}}) as plain:
        assert "meshlib_admit_delegated" not in plain.metrics()
        assert plain.watch.status(0.0)["agent"] is None


async def test_a_forked_child_has_an_agent_of_its_own(tmp_path: Path) -> None:
    """Connections, and what is known, are the parent's; the child begins anew."""
    async with scripted(hello) as server, delegating(tmp_path, server) as (mesh, agent):
        with mesh.sync_client() as blocking:
            await asyncio.to_thread(blocking.get, "http://orders/parent")

            def child() -> int:
                import os

                pid = os.fork()
                if pid == 0:
                    code = 1
                    try:
                        answer = blocking.get("http://orders/child")
                        is_own = answer.extensions["meshlib.call"].record()["carried"] == ["agent"]
                        code = 0 if answer.text == "hello from /child" and is_own else 2
                    finally:
                        os._exit(code)
                return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

            assert await asyncio.to_thread(child) == 0
            answer = await asyncio.to_thread(blocking.get, "http://orders/parent")
            assert answer.extensions["meshlib.call"].record()["carried"] == ["agent"]
        assert [request.target for request in agent.requests] == ["/parent", "/child", "/parent"]


async def test_a_service_is_delegated_from_one_moment_to_the_next(tmp_path: Path) -> None:
    """By a changed configuration, and back."""
    from tests.support import write_config

    async with scripted(hello) as server, NodeAgent(tmp_path / "data.sock"):
        orders = {"discover": {"static": [server.address]}}
        with mesh_of(tmp_path, {"orders": orders}) as mesh:
            async with mesh.client() as http:
                assert "carried" not in (await http.get("http://orders/")).extensions["meshlib.call"].record()
                both = {"me": {}, "orders": {**orders, "delegate": "agent"}}
                write_config(tmp_path, both, agent=agent_of(tmp_path / "data.sock"))
                await asyncio.to_thread(mesh.reload)
                assert (await http.get("http://orders/")).extensions["meshlib.call"].record()["carried"] == ["agent"]
                assert "agent" in {job.name for job in mesh.keeper.jobs}
                write_config(tmp_path, {"me": {}, "orders": orders})
                await asyncio.to_thread(mesh.reload)
                assert "carried" not in (await http.get("http://orders/")).extensions["meshlib.call"].record()


async def test_an_answer_that_breaks_off_with_the_agent_blames_nobody(tmp_path: Path) -> None:
    """In the middle of a body that is read as it comes: the caller is told, and the endpoint keeps its name."""
    go_on = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await Request.read(reader)
        writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n")
        await go_on.wait()
        writer.close()

    listening = await asyncio.start_server(serve, "127.0.0.1", 0)
    address = f"127.0.0.1:{listening.sockets[0].getsockname()[1]}"
    try:
        async with delegating(tmp_path, [address]) as (mesh, agent), mesh.client() as http:
            async with http.stream("GET", "http://orders/") as answer:
                pieces = answer.aiter_raw()
                assert await anext(pieces) == b"abc"
                await agent.stop()
                with pytest.raises(errors.AttemptFailed) as caught:
                    await anext(pieces)
            assert caught.value.reason == "send.agent_closed"
            assert address in str(caught.value)
    finally:
        go_on.set()
        listening.close()


@pytest.mark.parametrize("kind", ["async", "blocking"])
async def test_what_is_left_of_an_upload_is_not_sent_as_if_it_were_the_whole(tmp_path: Path, kind: str) -> None:
    """The agent says that it can't when it has taken more of the body than is kept: the call fails, and nobody gets a part."""
    pieces = [b"x" * 40_000] * 4

    async def upload() -> AsyncIterator[bytes]:
        for piece in pieces:
            yield piece

    async with scripted(hello) as server, delegating(tmp_path, server) as (mesh, agent):
        agent.is_greedy = True
        agent.fault = failure("agent; written=0", "no identity any more.")
        with pytest.raises(errors.AttemptFailed):
            if kind == "async":
                async with mesh.client() as http:
                    await http.put("http://orders/a", content=upload())
            else:
                with mesh.sync_client() as blocking:
                    await asyncio.to_thread(lambda: blocking.put("http://orders/a", content=iter(pieces)))
        assert [len(request.body) for request in agent.requests] == [160_000]
        assert server.requests == []


# --- bodies that can't be read twice


class Pieces:
    """A body from a generator, for both kinds of client. Counts what was taken of it."""

    def __init__(self, *sizes: int, pause: float = 0.0) -> None:
        self.sizes = sizes
        self.pause = pause
        self.taken = 0
        self.is_closed = False

    @property
    def whole(self) -> bytes:
        return b"".join(self._piece(at) for at in range(len(self.sizes)))

    def _piece(self, at: int) -> bytes:
        self.taken += 1
        return bytes([at]) * self.sizes[at]

    async def several(self) -> AsyncIterator[bytes]:
        try:
            for at in range(len(self.sizes)):
                yield self._piece(at)
                await asyncio.sleep(self.pause)
        finally:
            self.is_closed = True

    def one_by_one(self) -> Iterator[bytes]:
        try:
            for at in range(len(self.sizes)):
                yield self._piece(at)
                time.sleep(self.pause)
        finally:
            self.is_closed = True


async def upload(
    mesh: meshlib.Mesh, kind: str, pieces: Pieces, headers: dict[str, str] | None = None, *, may_repeat: bool = False
) -> Any:
    """The answer to a streamed request."""
    more: dict[str, Any] = {"headers": headers, "extensions": meshlib.policy(idempotent=True) if may_repeat else None}
    if kind == "async":
        async with mesh.client() as http:
            return await http.post("http://orders/a", content=pieces.several(), **more)
    with mesh.sync_client() as blocking:
        return await asyncio.to_thread(lambda: blocking.post("http://orders/a", content=pieces.one_by_one(), **more))


def word(answer: Any) -> list[str]:
    found: list[str] = answer.extensions["meshlib.call"].record()["carried"]
    return found


def nobody() -> str:
    """An address where nobody listens."""
    return f"127.0.0.1:{free_port()}"


@pytest.mark.parametrize("kind", ["async", "sync"])
@pytest.mark.parametrize(("sizes", "pause"), [((100, 100, 100), 0.02), ((16384,) * 8, 0.0)], ids=["slow", "long"])
async def test_a_body_is_not_begun_before_the_agent_has_a_connection(
    tmp_path: Path, kind: str, sizes: tuple[int, ...], pause: float
) -> None:
    """An endpoint that refuses connections costs nothing of a streamed body: the next attempt sends it whole, as without the agent."""
    pieces = Pieces(*sizes, pause=pause)
    async with scripted(hello) as server:
        async with delegating(tmp_path, [nobody(), server.address], balance={"policy": "round_robin"}) as (mesh, agent):
            answer = await upload(mesh, kind, pieces)
            assert (answer.text, word(answer)) == ("hello from /a", ["agent", "agent"])
            assert pieces.taken == len(sizes)
            assert [request.body for request in server.requests] == [Pieces(*sizes).whole]
            assert [len(request.body) for request in agent.requests] == [0, sum(sizes)]
            assert "expect" not in server.requests[0].headers


@pytest.mark.parametrize("kind", ["async", "sync"])
async def test_an_agent_that_ends_takes_nothing_of_a_body(tmp_path: Path, kind: str) -> None:
    """It says that it tried nothing: this process sends the body, whole."""
    pieces = Pieces(*[40_000] * 4)
    async with scripted(hello) as server, delegating(tmp_path, server) as (mesh, agent):
        agent.fault = failure("agent; written=0", "this connection ends: nothing was tried.")
        answer = await upload(mesh, kind, pieces)
        assert (answer.text, word(answer)) == ("hello from /a", ["unable"])
        assert [len(request.body) for request in server.requests] == [160_000]


@pytest.mark.parametrize("kind", ["async", "sync"])
async def test_a_body_waits_on_a_connection_that_was_used_before(tmp_path: Path, kind: str) -> None:
    """What was heard on it is not taken for the word that the body may come."""
    async with scripted(hello) as server, delegating(tmp_path, server) as (mesh, agent):
        async with mesh.client() as http:
            with mesh.sync_client() as blocking:

                async def post(pieces: Pieces) -> Any:
                    if kind == "async":
                        return await http.post("http://orders/a", content=pieces.several())
                    return await asyncio.to_thread(lambda: blocking.post("http://orders/a", content=pieces.one_by_one()))

                for _ in range(3):
                    assert word(await post(Pieces(100, 100))) == ["agent"]
                assert agent.connections <= 2  # one may be that of the watch
                agent.fault = failure("connect; written=0", "no connection.")
                pieces = Pieces(100, 100)
                with pytest.raises(errors.ConnectFailed):
                    await post(pieces)
                assert pieces.taken == 0


@pytest.mark.parametrize("kind", ["async", "sync"])
async def test_a_body_that_waits_for_a_silent_agent_is_sent_by_the_process(tmp_path: Path, kind: str) -> None:
    """Of a call that may be repeated, and soon."""
    pieces = Pieces(*[40_000] * 4)
    async with scripted(hello) as server, delegating(tmp_path, server) as (mesh, agent):
        await upload(mesh, kind, Pieces(1))
        agent.is_silent = True
        begun = time.monotonic()
        answer = await upload(mesh, kind, pieces, may_repeat=True)
        assert (answer.text, word(answer)) == ("hello from /a", ["silent"])
        assert time.monotonic() - begun < 2.0
        assert [len(request.body) for request in server.requests] == [1, 160_000]


@pytest.mark.parametrize("kind", ["async", "sync"])
async def test_a_body_does_not_wait_for_a_silent_agent_beyond_the_deadline(tmp_path: Path, kind: str) -> None:
    """Of a call that may not be repeated, which ends when its time does."""
    pieces = Pieces(100)
    async with scripted(hello) as server, delegating(tmp_path, server, deadline=0.8) as (mesh, agent):
        await upload(mesh, kind, Pieces(1))
        agent.is_silent = True
        begun = time.monotonic()
        with pytest.raises(errors.DeadlineExceeded):
            await upload(mesh, kind, pieces)
        assert 0.7 < time.monotonic() - begun < 2.0
        assert pieces.taken == 0


@pytest.mark.parametrize("kind", ["async", "sync"])
async def test_an_answer_may_come_before_the_body_is_asked_for(tmp_path: Path, kind: str) -> None:
    """Then nobody wants the body, and the answer counts."""
    pieces = Pieces(100, 100)
    async with scripted(hello) as server, delegating(tmp_path, server) as (mesh, agent):
        agent.fault = b"HTTP/1.1 413 Content Too Large\r\ncontent-length: 4\r\n\r\nmuch"
        answer = await upload(mesh, kind, pieces)
        assert (answer.status_code, answer.text, pieces.taken) == (413, "much", 0)
        agent.fault = None
        assert (await upload(mesh, kind, Pieces(3))).text == "hello from /a"


@pytest.mark.parametrize("kind", ["async", "sync"])
async def test_an_agent_that_dies_after_it_asked_for_a_body_blames_nobody(tmp_path: Path, kind: str) -> None:
    """The call may have been processed, and its error is the agent's, as of any other that is cut off."""
    release = asyncio.Event()

    async def slow(server: Scripted, request: Request) -> bytes:
        await release.wait()
        return ok(b"done")

    async with scripted(slow) as server, delegating(tmp_path, server) as (mesh, agent):
        call = asyncio.create_task(upload(mesh, kind, Pieces(100)))
        await eventually(lambda: server.requests)
        await agent.stop()
        with pytest.raises(errors.ConnectionLost) as caught:
            await call
        release.set()
        assert (caught.value.reason, caught.value.is_written) == ("send.agent_closed", True)
        assert len(server.requests) == 1


@pytest.mark.parametrize("kind", ["async", "sync"])
async def test_a_streamed_body_may_be_empty(tmp_path: Path, kind: str) -> None:
    """With a length of 0 it is never asked for, and without a length it is: both are answered."""
    async with scripted(hello) as server, delegating(tmp_path, server) as (mesh, agent):
        for headers in ({"content-length": "0"}, None):
            answer = await upload(mesh, kind, Pieces(), headers)
            assert (answer.text, word(answer)) == ("hello from /a", ["agent"])
        assert ["expect" in request.headers for request in agent.requests] == [False, True]


@pytest.mark.parametrize("kind", ["async", "sync"])
async def test_what_an_application_expects_reaches_the_endpoint(tmp_path: Path, kind: str) -> None:
    """The agent would keep it for itself: this process sends such a call, as it does without the agent."""
    async with scripted(hello) as server, delegating(tmp_path, server) as (mesh, agent):
        for pieces in (Pieces(1, 2), Pieces()):
            answer = await upload(mesh, kind, pieces, {"Expect": "100-continue"})
            assert answer.text == "hello from /a"
        assert [request.headers["expect"] for request in server.requests] == ["100-continue"] * 2
        assert agent.requests == []


# --- an agent that falls silent behind the head of an answer


@contextlib.asynccontextmanager
async def halting(is_long: bool = False) -> AsyncIterator[tuple[str, asyncio.Event, list[int]]]:
    """An endpoint whose first answer stops after its head: its address, what lets it go on, and how many came."""
    go_on, asked = asyncio.Event(), [0]

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await Request.read(reader) is not None:
            asked[0] += 1
            length = 100_000 if is_long else 5
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % length)
            if asked[0] == 1:
                await go_on.wait()
            writer.write(b"hello" * (length // 5))
        writer.close()

    listening = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield f"127.0.0.1:{listening.sockets[0].getsockname()[1]}", go_on, asked
    finally:
        go_on.set()
        listening.close()


@pytest.mark.parametrize("kind", ["async", "sync"])
async def test_a_short_body_is_not_awaited_from_a_silent_agent(tmp_path: Path, kind: str) -> None:
    """The head was there, and nobody has been told of it: a call that may be repeated goes on in this process."""
    async with halting() as (address, _, asked), delegating(tmp_path, [address], deadline=6) as (mesh, agent):
        begun = time.monotonic()
        call = asyncio.create_task(get(mesh, kind))
        await eventually(lambda: asked[0] and mesh.delegation is not None and mesh.delegation.watch.state == "up")
        await asyncio.sleep(0.2)
        agent.is_silent = True
        answer = await call
        assert (answer.text, word(answer)) == ("hello", ["silent"])
        assert time.monotonic() - begun < 3.0


@pytest.mark.parametrize("kind", ["async", "sync"])
async def test_an_answer_that_streams_to_the_application_is_left_to_a_silent_agent(tmp_path: Path, kind: str) -> None:
    """It may come to itself, and the rest with it."""
    async with halting(is_long=True) as (address, go_on, asked), delegating(tmp_path, [address]) as (mesh, agent):
        call = asyncio.create_task(get(mesh, kind))
        await eventually(lambda: asked[0] and mesh.delegation is not None and mesh.delegation.watch.state == "up")
        await asyncio.sleep(0.2)
        agent.is_silent = True
        await eventually(lambda: mesh.delegation is not None and mesh.delegation.watch.is_away)
        await asyncio.sleep(0.2)
        assert not call.done()
        go_on.set()
        answer = await call
        assert (len(answer.text), word(answer), asked) == (100_000, ["agent"], [1])


async def get(mesh: meshlib.Mesh, kind: str) -> Any:
    if kind == "async":
        async with mesh.client() as http:
            return await http.get("http://orders/")
    with mesh.sync_client() as blocking:
        return await asyncio.to_thread(blocking.get, "http://orders/")
