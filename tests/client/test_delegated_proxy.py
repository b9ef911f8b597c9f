"""Do delegated calls go by the real data path as they go by this process? The native proxy in a process that is stopped and killed."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import ssl
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import meshlib
from meshlib import errors
from tests.proxy_agent import needs_proxy
from tests.support import PYTHON, Request, Scripted, free_port, identities, mesh_of, ok, process, wait_until_listening

pytestmark = needs_proxy


@contextlib.contextmanager
def proxied(folder: Path) -> Iterator[Any]:
    """An agent with the native data path, ready."""
    with process(PYTHON, "-m", "tests.proxy_agent", str(folder)) as agent:
        assert agent.stdout is not None
        assert agent.stdout.readline().startswith("ready")
        yield agent


async def hello(server: Scripted, request: Request) -> bytes:
    return ok(b"hello from " + request.target.encode())


def tls_of(folder: Path, service: str = "orders") -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    own = folder / "identities" / service
    context.load_cert_chain(own / "svid.pem", own / "key.pem")
    context.load_verify_locations(own / "bundle.pem")
    context.verify_mode = ssl.CERT_REQUIRED
    return context


@contextlib.asynccontextmanager
async def delegating(folder: Path, answer: Any = hello, **more: Any) -> AsyncIterator[tuple[meshlib.Mesh, Scripted]]:
    """A mesh in mode enforce whose `orders`, a server with mutual TLS, is delegated to FOLDER/data.sock."""
    server = Scripted(answer)
    await server.start(ssl=tls_of(folder))
    try:
        orders = {"discover": {"static": [server.address]}, "delegate": "agent", **more}
        agent = {"data": str(folder / "data.sock"), "ca": "ca"}
        with mesh_of(folder, {"orders": orders}, mode="enforce", agent=agent) as mesh:
            yield mesh, server
    finally:
        await server.stop()


def carried(answer: Any) -> list[str]:
    found: list[str] = answer.extensions["meshlib.call"].record()["carried"]
    return found


async def eventually(holds: Any, seconds: float) -> float:
    """Seconds that it took."""
    begun = time.monotonic()
    async with asyncio.timeout(seconds):
        while not holds():
            await asyncio.sleep(0.01)
    return time.monotonic() - begun


async def test_calls_go_by_the_proxy(tmp_path: Path) -> None:
    """Mutual TLS and all, from both kinds of client: the connections to the endpoint are the proxy's, and shared."""
    identities(tmp_path, "me", "orders")
    with proxied(tmp_path):
        async with delegating(tmp_path) as (mesh, server):
            async with mesh.client() as http:
                for _ in range(3):
                    answer = await http.get("http://orders/a")
                    assert (answer.text, carried(answer)) == ("hello from /a", ["agent"])
                answer = await http.post("http://orders/b", content=b"x" * 3_000_000)
                assert answer.text == "hello from /b"
                assert len(server.requests[-1].body) == 3_000_000
            with mesh.sync_client() as blocking:
                answer = await asyncio.to_thread(blocking.get, "http://orders/c")
                assert (answer.text, carried(answer)) == ("hello from /c", ["agent"])
            assert server.connections == 1
            assert not {name for name in server.requests[0].headers if name in ("x-mesh-endpoint", "x-mesh-expect")}


async def test_whoever_is_not_expected_is_refused_as_ever(tmp_path: Path) -> None:
    """The proxy checks the identity that the mesh expects; the error and the judgement are those of this process."""
    identities(tmp_path, "me", "orders", "other")
    with proxied(tmp_path):
        async with delegating(tmp_path, identity="spiffe://shop.internal/ns/default/sa/other") as (mesh, server):
            async with mesh.client() as http:
                with pytest.raises(errors.PeerIdentityError) as caught:
                    await http.get("http://orders/")
            assert server.requests == []
            assert caught.value.call is not None
            assert caught.value.call.record()["carried"][0] == "agent"


async def test_nothing_listens_at_the_endpoint(tmp_path: Path) -> None:
    """As in this process: a refused connection, safe to try elsewhere."""
    identities(tmp_path, "me", "orders")
    with proxied(tmp_path):
        async with delegating(tmp_path) as (mesh, server):
            await server.stop()
            async with mesh.client() as http:
                with pytest.raises(errors.ConnectFailed) as caught:
                    await http.post("http://orders/", content=b"x")
            assert not caught.value.is_written


async def test_a_proxy_that_is_killed_under_load_costs_no_call(tmp_path: Path) -> None:
    """Calls that may be repeated go on in this process, and by the proxy again within two seconds of its return."""
    identities(tmp_path, "me", "orders")
    async with delegating(tmp_path) as (mesh, _):
        done: list[str] = []
        failures: list[BaseException] = []
        is_over = asyncio.Event()
        async with mesh.client() as http:

            async def call() -> None:
                while not is_over.is_set():
                    try:
                        answer = await http.get("http://orders/x")
                        assert answer.status_code == 200
                        done.extend(carried(answer))
                    except errors.MeshError as error:
                        failures.append(error)

            with proxied(tmp_path) as agent:
                workers = [asyncio.create_task(call()) for _ in range(8)]
                await asyncio.sleep(0.5)
                assert "agent" in done
                os.kill(agent.pid, signal.SIGKILL)
                await asyncio.sleep(0.5)
            assert mesh.delegation is not None
            watch = mesh.delegation.watch
            assert watch.is_away
            with proxied(tmp_path):
                assert await eventually(lambda: not watch.is_away, 2.0) < 2.0
                done.clear()
                await eventually(lambda: "agent" in done, 2.0)
                is_over.set()
                await asyncio.gather(*workers)
        assert failures == []


@pytest.mark.parametrize("kind", ["async", "sync"])
async def test_a_proxy_that_hangs_costs_no_call(tmp_path: Path, kind: str) -> None:
    """Found out by its silence; calls lose no time from then on, and it is used again when it comes to itself."""
    identities(tmp_path, "me", "orders")
    with proxied(tmp_path) as agent:
        async with delegating(tmp_path) as (mesh, _), mesh.client() as http:
            with mesh.sync_client() as blocking:

                async def get() -> Any:
                    if kind == "async":
                        return await http.get("http://orders/x")
                    return await asyncio.to_thread(blocking.get, "http://orders/x")

                assert carried(await get()) == ["agent"]
                assert mesh.delegation is not None
                watch = mesh.delegation.watch
                os.kill(agent.pid, signal.SIGSTOP)
                try:
                    begun = time.monotonic()
                    answers = await asyncio.gather(*(get() for _ in range(4)))
                    assert time.monotonic() - begun < 2.0
                    assert {word for answer in answers for word in carried(answer)} <= {"silent", "away"}
                    assert watch.is_away
                    assert carried(await get()) == ["away"]
                finally:
                    os.kill(agent.pid, signal.SIGCONT)
                assert await eventually(lambda: not watch.is_away, 5.0) < 5.0
                assert carried(await get()) == ["agent"]


async def test_http2_goes_by_the_proxy(tmp_path: Path) -> None:
    """To us and to the endpoint, with many calls at a time, large bodies both ways, and from threads."""
    from tests.client.test_http2_servers import APP

    identities(tmp_path, "me", "orders")
    own, port = tmp_path / "identities" / "orders", free_port()
    (tmp_path / "service.py").write_text(APP)
    command = [PYTHON, "-m", "hypercorn", "service:app", "--bind", f"127.0.0.1:{port}"]
    command += ["--certfile", str(own / "svid.pem"), "--keyfile", str(own / "key.pem")]
    command += ["--ca-certs", str(own / "bundle.pem"), "--verify-mode", "CERT_REQUIRED"]
    orders = {"discover": {"static": [f"127.0.0.1:{port}"]}, "delegate": "agent", "protocol": "http2"}
    agent = {"data": str(tmp_path / "data.sock"), "ca": "ca"}
    with process(*command, cwd=tmp_path) as server, proxied(tmp_path):
        wait_until_listening(port, server)
        with mesh_of(tmp_path, {"orders": orders}, mode="enforce", agent=agent) as mesh:
            async with mesh.client() as http:
                answers = await asyncio.gather(*(http.get("http://orders/") for _ in range(50)))
                assert {answer.text for answer in answers} == {"ok"}
                assert {answer.headers["x-http"] for answer in answers} == {"2"}
                assert {answer.http_version for answer in answers} == {"HTTP/2"}
                assert {word for answer in answers for word in carried(answer)} == {"agent"}
                answer = await http.post("http://orders/large", content=b"x" * 3_000_000)
                assert (answer.headers["x-size"], len(answer.content)) == ("3000000", 64 * 65536)
            with mesh.sync_client() as blocking:
                answer = await asyncio.to_thread(blocking.post, "http://orders/", content=b"xyz")
                assert (answer.headers["x-http"], answer.headers["x-size"], carried(answer)) == ("2", "3", ["agent"])
            assert mesh.delegation is not None
            assert sum(mesh.delegation.stats()["fallbacks"].values()) == 0


async def test_a_hung_proxy_does_not_hold_http2_calls(tmp_path: Path) -> None:
    """A stream of a shared connection is taken away from it as a connection is."""
    from tests.client.test_http2_servers import APP

    identities(tmp_path, "me", "orders")
    own, port = tmp_path / "identities" / "orders", free_port()
    (tmp_path / "service.py").write_text(APP)
    command = [PYTHON, "-m", "hypercorn", "service:app", "--bind", f"127.0.0.1:{port}"]
    command += ["--certfile", str(own / "svid.pem"), "--keyfile", str(own / "key.pem")]
    command += ["--ca-certs", str(own / "bundle.pem"), "--verify-mode", "CERT_REQUIRED"]
    orders = {"discover": {"static": [f"127.0.0.1:{port}"]}, "delegate": "agent", "protocol": "http2"}
    with process(*command, cwd=tmp_path) as server, proxied(tmp_path) as agent:
        wait_until_listening(port, server)
        told = {"data": str(tmp_path / "data.sock"), "ca": "ca"}
        with mesh_of(tmp_path, {"orders": orders}, mode="enforce", agent=told) as mesh:
            async with mesh.client() as http:
                assert carried(await http.get("http://orders/")) == ["agent"]
                os.kill(agent.pid, signal.SIGSTOP)
                try:
                    answers = await asyncio.wait_for(asyncio.gather(*(http.get("http://orders/") for _ in range(5))), 3.0)
                    assert {word for answer in answers for word in carried(answer)} <= {"silent", "away"}
                finally:
                    os.kill(agent.pid, signal.SIGCONT)


# --- bodies that can't be read twice, and answers that halt

HALTING = """
import asyncio

async def app(scope, receive, send):
    if scope["type"] != "http":
        return
    if scope["path"] == "/early":
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"5")]})
        await send({"type": "http.response.body", "body": b"early"})
        return
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return
        size += len(message.get("body", b""))
        if not message.get("more_body"):
            break
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"8")]})
    if scope["path"] == "/halting":
        await asyncio.sleep(1.0)
    await send({"type": "http.response.body", "body": b"%8d" % size})
"""


@contextlib.contextmanager
def answering(folder: Path) -> Iterator[str]:
    """An application that speaks both versions of HTTP: its address."""
    own, port = folder / "identities" / "orders", free_port()
    (folder / "service.py").write_text(HALTING)
    command = [PYTHON, "-m", "hypercorn", "service:app", "--bind", f"127.0.0.1:{port}"]
    command += ["--certfile", str(own / "svid.pem"), "--keyfile", str(own / "key.pem")]
    command += ["--ca-certs", str(own / "bundle.pem"), "--verify-mode", "CERT_REQUIRED"]
    with process(*command, cwd=folder) as server:
        wait_until_listening(port, server)
        yield f"127.0.0.1:{port}"


class Body:
    """A body from a generator, for both kinds of client."""

    def __init__(self, *sizes: int, pause: float = 0.0) -> None:
        self.sizes = sizes
        self.pause = pause
        self.is_begun = self.is_closed = False

    async def several(self) -> AsyncIterator[bytes]:
        self.is_begun = True
        try:
            for size in self.sizes:
                yield bytes(size)
                await asyncio.sleep(self.pause)
        finally:
            self.is_closed = True

    def one_by_one(self) -> Iterator[bytes]:
        for size in self.sizes:
            yield bytes(size)
            time.sleep(self.pause)


Call = Callable[[str, Body | None], Any]


@contextlib.asynccontextmanager
async def caller(folder: Path, kind: str, addresses: list[str], protocol: str) -> AsyncIterator[tuple[meshlib.Mesh, Call]]:
    """Calls of a mesh whose `orders` is delegated: a GET, or a POST with a body."""
    orders: dict[str, Any] = {"discover": {"static": addresses}, "delegate": "agent", "protocol": protocol, "deadline": 6}
    orders["balance"] = {"policy": "round_robin"}
    told = {"data": str(folder / "data.sock"), "ca": "ca"}
    with mesh_of(folder, {"orders": orders}, mode="enforce", agent=told) as mesh, mesh.sync_client() as blocking:
        async with mesh.client() as http:

            async def call(path: str, body: Body | None) -> Any:
                method, url = "GET" if body is None else "POST", f"http://orders{path}"
                if kind == "async":
                    return await http.request(method, url, content=None if body is None else body.several())
                content = None if body is None else body.one_by_one()
                return await asyncio.to_thread(lambda: blocking.request(method, url, content=content))

            yield mesh, call


@pytest.mark.parametrize("protocol", ["http", "http2"])
@pytest.mark.parametrize("kind", ["async", "sync"])
async def test_an_endpoint_that_refuses_costs_nothing_of_a_body(tmp_path: Path, kind: str, protocol: str) -> None:
    """A streamed upload goes to the next one, by the proxy: slow pieces, several at once, and more than is kept of others."""
    identities(tmp_path, "me", "orders")
    sizes = [Body(*[100] * 4, pause=0.05), Body(*[16384] * 8), Body(*[65536] * 40), Body(400_000, 1)]
    with answering(tmp_path) as address, proxied(tmp_path):
        for body in sizes:
            dead = f"127.0.0.1:{free_port()}"
            async with caller(tmp_path, kind, [dead, address], protocol) as (_, call):
                ways = []
                for _ in range(2):  # one of them meets the endpoint that refuses
                    answer = await call("/", body)
                    assert int(answer.text) == sum(body.sizes)
                    ways.append(carried(answer))
                assert sorted(ways) == [["agent"], ["agent", "agent"]]


@pytest.mark.parametrize("kind", ["async", "sync"])
async def test_an_answer_that_comes_early_ends_the_upload(tmp_path: Path, kind: str) -> None:
    """And what is left of its generator is put away."""
    identities(tmp_path, "me", "orders")
    with answering(tmp_path) as address, proxied(tmp_path):
        async with caller(tmp_path, kind, [address], "http") as (_, call):
            body = Body(*[100] * 20, pause=0.1)
            answer = await call("/early", body)
            assert (answer.text, carried(answer)) == ("early", ["agent"])
            if kind == "async":
                assert body.is_closed is body.is_begun
            assert int((await call("/", Body(100))).text) == 100


@pytest.mark.parametrize("protocol", ["http", "http2"])
@pytest.mark.parametrize("kind", ["async", "sync"])
async def test_a_proxy_that_hangs_behind_a_head_costs_no_call(tmp_path: Path, kind: str, protocol: str) -> None:
    """A short body that it owes is not waited for."""
    identities(tmp_path, "me", "orders")
    with answering(tmp_path) as address, proxied(tmp_path) as agent:
        async with caller(tmp_path, kind, [address], protocol) as (_, call):
            await call("/", None)
            begun = time.monotonic()
            halting = asyncio.ensure_future(call("/halting", None))
            await asyncio.sleep(0.4)
            os.kill(agent.pid, signal.SIGSTOP)
            try:
                answer = await halting
            finally:
                os.kill(agent.pid, signal.SIGCONT)
            assert (int(answer.text), carried(answer)) == (0, ["silent"])
            assert time.monotonic() - begun < 4.0
