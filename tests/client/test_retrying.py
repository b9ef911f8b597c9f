"""Is a call sent again, over real sockets? Times for one attempt, conditions, Retry-After, layers, tenacity, hedges, and what stands in.

Servers on loopback count what comes to them. The applications of the layers are served by uvicorn (ASGI) and wsgiref (WSGI), each
with a mesh of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import threading
import time
import wsgiref.simple_server
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import tenacity
import uvicorn

import meshlib
from tests.support import Request, Scripted, mesh_of, ok, scripted

CLIENTS = pytest.mark.parametrize("client", ["async", "blocking"])
ALL = pytest.mark.parametrize("client", ["async", "blocking", "transport"])
# Nothing is taken out, so that each attempt is where the test expects it.
PATIENT = {"breaker": {"failures": 1000, "minimum_calls": 1000}}

Get = Callable[..., Any]


@contextlib.asynccontextmanager
async def caller(mesh: meshlib.Mesh, client: str) -> AsyncIterator[Get]:
    """`await get(path, method=, ...)` with one of the clients; the blocking one is on threads, since the servers are on this one."""
    if client == "blocking":
        with mesh.sync_client() as blocking:

            async def get(path: str = "/", method: str = "GET", **more: Any) -> httpx.Response:
                return await asyncio.to_thread(blocking.request, method, f"http://orders{path}", **more)

            yield get
    else:
        made = mesh.client() if client == "async" else httpx.AsyncClient(transport=mesh.transport())
        async with made as http:

            async def get_async(path: str = "/", method: str = "GET", **more: Any) -> httpx.Response:
                return await http.request(method, f"http://orders{path}", **more)

            yield get_async


def orders(*addresses: str, retry: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    return {
        "orders": {
            "discover": {"static": list(addresses)},
            "balance": {"policy": "round_robin", "slow_start": "0s"},
            "admit": PATIENT,
            "retry": retry or {},
            **more,
        }
    }


async def good(server: Scripted, request: Request) -> bytes:
    return ok(b"good")


class Failing:
    """A server that fails so many times, in one of several ways, and then answers."""

    def __init__(self, how: str = "status", times: int = 1000, *headers: str, status: int = 503) -> None:
        self.how = how
        self.left = times
        self.status = status
        self.headers = "".join(f"{header}\r\n" for header in headers)
        self.at: list[float] = []

    async def __call__(self, server: Scripted, request: Request) -> bytes | None:
        self.at.append(time.monotonic())
        if self.left <= 0:
            return ok(b"good")
        self.left -= 1
        if self.how == "reset":
            return None
        if self.how == "protocol":
            return b"HTTP/1.1 what\r\n\r\nconnection: close"
        if self.how == "timeout":
            await asyncio.sleep(60)
        return f"HTTP/1.1 {self.status} no\r\ncontent-length: 0\r\n{self.headers}\r\n".encode()


def story(of: Any) -> str:
    call = of.extensions["meshlib.call"] if isinstance(of, httpx.Response) else of.call
    text: str = call.explain()
    return text


def pauses(answer: httpx.Response) -> list[float]:
    """How long was waited before each retry, as decided."""
    events = answer.extensions["meshlib.call"].record()["events"]
    return [event["detail"].get("seconds", 0.0) for event in events if event["what"] == "again"]


def row(mesh: meshlib.Mesh) -> dict[str, Any]:
    return next(row for row in mesh.engine.stats(time.monotonic()) if row["service"] == "orders" and not row["endpoint"])


# ------------------------------------------------------------------ a time for each attempt


@ALL
async def test_an_attempt_that_takes_too_long_is_tried_elsewhere(tmp_path: Path, client: str) -> None:
    """`per_try` cuts the attempt, not the call: another host answers, long before the deadline."""
    async with scripted(Failing("timeout")) as slow, scripted(good) as quick:
        services = orders(slow.address, quick.address, retry={"per_try": "100ms", "backoff": ["1ms", "2ms"]})
        with mesh_of(tmp_path, services) as mesh:
            async with caller(mesh, client) as get:
                begun = time.monotonic()
                answer = await get()
                assert 0.1 <= time.monotonic() - begun < 5
                assert (answer.text, len(slow.requests), len(quick.requests)) == ("good", 1, 1)
                assert quick.requests[0].headers["x-mesh-attempt"] == "1"
                text = story(answer)
                assert f"{slow.address}: no answer in time" in text
                assert re.search(r"sent again after [\d.]+ ms, because: too slow; the budget held", text)


@CLIENTS
async def test_the_last_attempt_that_takes_too_long_is_no_spent_deadline(tmp_path: Path, client: str) -> None:
    """AttemptTimeout: there was time left for the call, and no more attempts."""
    async with scripted(Failing("timeout")) as server:
        services = orders(server.address, retry={"per_try": "50ms", "backoff": ["1ms", "2ms"]})
        with mesh_of(tmp_path, services) as mesh:
            async with caller(mesh, client) as get:
                with pytest.raises(meshlib.AttemptTimeout) as caught:
                    await get()
                assert isinstance(caught.value, httpx.ReadTimeout)
                assert caught.value.call.attempts == 2
                with pytest.raises(meshlib.DeadlineExceeded):
                    await get(extensions=meshlib.policy(timeout=0.02))
                with pytest.raises(meshlib.AttemptTimeout) as caught:
                    await get(method="POST", content=b"x")
                assert "not idempotent, and it may have been processed" in caught.value.call.explain()
            assert len(server.requests) == 4


@ALL
@pytest.mark.parametrize("method", ["GET", "POST"])
async def test_the_time_for_an_attempt_ends_with_its_head(tmp_path: Path, client: str, method: str) -> None:
    """The rest has until the deadline: an answer that has begun to come can't be asked for again anyway."""

    async def drip(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
        for _ in range(4):
            writer.write(b"1\r\nx\r\n")
            await writer.drain()
            await asyncio.sleep(0.05)
        writer.write(b"0\r\n\r\n")
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(drip, "127.0.0.1", 0)
    async with server:
        address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        with mesh_of(tmp_path, orders(address, retry={"per_try": "100ms"})) as mesh:
            async with caller(mesh, client) as get:
                assert (await get(method=method)).text == "xxxx"
            async with mesh.client() as http, http.stream(method, "http://orders/") as answer:
                assert await answer.aread() == b"xxxx"


async def test_a_hedge_has_a_time_of_its_own(tmp_path: Path) -> None:
    """Both attempts are cut, one after the other, and then the retry comes."""
    async with scripted(Failing("timeout")) as one, scripted(Failing("timeout")) as two, scripted(good) as three:
        retry = {"per_try": "150ms", "backoff": ["1ms", "2ms"]}
        with mesh_of(tmp_path, orders(one.address, two.address, three.address, retry=retry)) as mesh:
            async with caller(mesh, "async") as get:
                answer = await get(extensions=meshlib.policy(hedge=0.05))
                assert (answer.text, answer.extensions["meshlib.call"].attempts) == ("good", 3)
                assert "not sent again yet: another attempt is under way" in story(answer)
                assert row(mesh)["in_flight"] == 0


# ------------------------------------------------------------------ conditions

CONDITIONS = ("connect", "reset", "timeout", "protocol", "status")


@CLIENTS
@pytest.mark.parametrize("how", CONDITIONS)
async def test_a_failure_is_repeated_only_if_the_route_names_its_kind(tmp_path: Path, client: str, how: str) -> None:
    """Each kind alone, and all but it."""
    async with contextlib.AsyncExitStack() as stack:
        if how == "connect":
            bad = await stack.enter_async_context(scripted(good))
            await bad.stop()
        else:
            bad = await stack.enter_async_context(scripted(Failing(how)))
        well = await stack.enter_async_context(scripted(good))
        for on, is_repeated in (([how], True), ([other for other in CONDITIONS if other != how], False)):
            retry = {"on": on, "per_try": "100ms", "backoff": ["1ms", "2ms"]}
            with mesh_of(tmp_path, orders(bad.address, well.address, retry=retry)) as mesh:
                async with caller(mesh, client) as get:
                    if is_repeated:
                        assert (await get()).text == "good"
                    elif how == "status":
                        answer = await get()
                        assert answer.status_code == 503
                        assert "the route does not repeat this kind of failure" in story(answer)
                    else:
                        with pytest.raises(meshlib.AttemptFailed) as caught:
                            await get()
                        assert "the route does not repeat this kind of failure" in caught.value.call.explain()


# ------------------------------------------------------------------ what the endpoint asks for


@CLIENTS
async def test_retry_after_is_waited_for(tmp_path: Path, client: str) -> None:
    """Not a moment earlier, and in place of the backoff."""
    failing = Failing("status", 1, "Retry-After: 1")
    async with scripted(failing) as server:
        with mesh_of(tmp_path, orders(server.address)) as mesh:
            async with caller(mesh, client) as get:
                answer = await get()
                assert (answer.text, pauses(answer)) == ("good", [1.0])
                assert failing.at[1] - failing.at[0] >= 0.99


async def test_a_call_that_is_cancelled_while_it_waits_to_be_sent_again_holds_nothing(tmp_path: Path) -> None:
    """Its permit is back at once."""
    failing = Failing("status", 1000, "retry-after: 9")
    async with scripted(failing) as server:
        with mesh_of(tmp_path, orders(server.address)) as mesh:
            async with caller(mesh, "async") as get:
                call = asyncio.create_task(get())
                while row(mesh)["retries"] == 0:
                    await asyncio.sleep(0.002)
                assert row(mesh)["in_flight"] == 1
                call.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await call
                assert (row(mesh)["in_flight"], len(server.requests)) == (0, 1)


@CLIENTS
async def test_a_retry_after_beyond_the_deadline_is_not_waited_for(tmp_path: Path, client: str) -> None:
    """The failure is handed over at once: nobody gains by sleeping on it."""
    async with scripted(Failing("status", 1000, "retry-after: 30")) as server:
        with mesh_of(tmp_path, orders(server.address)) as mesh:
            async with caller(mesh, client) as get:
                begun = time.monotonic()
                answer = await get(extensions=meshlib.policy(timeout=5))
                assert (answer.status_code, len(server.requests)) == (503, 1)
                assert time.monotonic() - begun < 3
                assert "not sent again, because: the deadline comes before the next attempt" in story(answer)


@ALL
async def test_a_failure_that_has_been_retried_further_down_is_not_repeated(tmp_path: Path, client: str) -> None:
    """x-mesh-no-retry on a 503, from whatever server."""
    async with scripted(Failing("status", 1000, "X-Mesh-No-Retry: 1")) as server, scripted(good) as other:
        with mesh_of(tmp_path, orders(server.address, other.address)) as mesh:
            async with caller(mesh, client) as get:
                answer = await get()
                assert (answer.status_code, len(server.requests), len(other.requests)) == (503, 1, 0)
                assert "not sent again, because: the endpoint asks not to be tried again" in story(answer)


# ------------------------------------------------------------------ layers


@contextlib.asynccontextmanager
async def asgi(app: Any) -> AsyncIterator[str]:
    """The address of an ASGI application, served on this loop."""

    began, ends = asyncio.Event(), asyncio.Event()

    class Ours(uvicorn.Server):
        """Leaves the signals to the tests, and ends at once instead of looking ten times a second."""

        def capture_signals(self) -> Any:
            return contextlib.nullcontext()

        async def main_loop(self) -> None:
            began.set()
            await ends.wait()

    server = Ours(uvicorn.Config(app, host="127.0.0.1", port=0, log_config=None, lifespan="off"))
    task = asyncio.create_task(server.serve())
    await began.wait()
    try:
        yield f"127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        ends.set()
        await task


class _Silent(wsgiref.simple_server.WSGIRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass


@contextlib.contextmanager
def wsgi(app: Any) -> Iterator[str]:
    """The address of a WSGI application, served on a thread."""
    server = wsgiref.simple_server.make_server("127.0.0.1", 0, app, handler_class=_Silent)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def passing_on(http: httpx.AsyncClient, *, otherwise: int = 502, method: str = "GET") -> Any:
    """An application that asks the next one, and answers `otherwise` where that fails."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        try:
            answer = await http.request(method, "http://orders/")
            status, body = (200, answer.content) if answer.status_code < 500 else (otherwise, b"")
        except meshlib.MeshError:
            status, body = otherwise, b""
        await send({"type": "http.response.start", "status": status, "headers": [(b"content-length", b"%d" % len(body))]})
        await send({"type": "http.response.body", "body": body})

    return app


@contextlib.asynccontextmanager
async def layer(folder: Path, below: str, kind: str = "asgi", **more: Any) -> AsyncIterator[str]:
    """The address of an application of the mesh whose every call is one to `below`."""
    folder.mkdir(exist_ok=True)
    with mesh_of(folder, orders(below)) as mesh:
        if kind == "asgi":
            async with mesh.client() as http, asgi(mesh.asgi(passing_on(http, **more))) as address:
                yield address
        else:
            with mesh.sync_client() as blocking:
                otherwise = more.get("otherwise", 502)

                def app(environ: Any, start: Any) -> list[bytes]:
                    try:
                        answer = blocking.get("http://orders/")
                        status, body = (200, answer.content) if answer.status_code < 500 else (otherwise, b"")
                    except meshlib.MeshError:
                        status, body = otherwise, b""
                    start(f"{status} x", [("content-length", str(len(body)))])
                    return [body]

                with wsgi(mesh.wsgi(app)) as address:
                    yield address


SERVERS = pytest.mark.parametrize("kind", ["asgi", "wsgi"])


@SERVERS
@pytest.mark.parametrize("how", ["status", "reset"])
async def test_a_server_whose_own_call_failed_says_not_to_repeat(tmp_path: Path, kind: str, how: str) -> None:
    """The mark is on a 5xx, whichever it is, and on nothing else."""
    for otherwise in (500, 502, 503, 404, 200):
        async with scripted(Failing(how)) as bottom, layer(tmp_path, bottom.address, kind, otherwise=otherwise) as address:
            async with httpx.AsyncClient() as plain:
                answer = await plain.get(f"http://{address}/")
            assert answer.status_code == otherwise
            assert ("x-mesh-no-retry" in answer.headers) == (otherwise >= 500)
            assert len(bottom.requests) == 2


@SERVERS
async def test_a_server_whose_call_went_well_after_a_retry_says_nothing(tmp_path: Path, kind: str) -> None:
    """What the handler then makes of it is its own failure, and may pass elsewhere."""
    async with scripted(Failing("status", 1)) as bottom, layer(tmp_path, bottom.address, kind) as address:
        async with httpx.AsyncClient() as plain:
            answer = await plain.get(f"http://{address}/")
        assert (answer.status_code, answer.text, len(bottom.requests)) == (200, "good", 2)
        assert "x-mesh-no-retry" not in answer.headers


async def test_a_failure_of_a_call_that_may_not_be_repeated_is_not_marked(tmp_path: Path) -> None:
    """The handler has not tried what may be tried; whether the caller may is for its own rules to say."""
    async with scripted(Failing("status")) as bottom, layer(tmp_path, bottom.address, method="POST") as address:
        async with httpx.AsyncClient() as plain:
            answer = await plain.get(f"http://{address}/")
        assert (answer.status_code, len(bottom.requests)) == (502, 1)
        assert "x-mesh-no-retry" not in answer.headers


@CLIENTS
@SERVERS
@pytest.mark.parametrize("how", ["status", "reset"])
async def test_two_layers_over_a_dead_bottom_are_two_attempts_there(tmp_path: Path, client: str, kind: str, how: str) -> None:
    """Each of the two repeats once when left alone, which would be four."""
    async with scripted(Failing(how)) as bottom, layer(tmp_path / "a", bottom.address, kind, otherwise=503) as top:
        with mesh_of(tmp_path, orders(top)) as mesh:
            async with caller(mesh, client) as get:
                for count in range(1, 6):
                    answer = await get()
                    assert (answer.status_code, len(bottom.requests)) == (503, 2 * count)
                assert answer.extensions["meshlib.call"].attempts == 1
                assert "the endpoint asks not to be tried again" in story(answer)


@CLIENTS
@SERVERS
@pytest.mark.parametrize("how", ["status", "reset"])
async def test_three_layers_over_a_dead_bottom_are_two_attempts_there(tmp_path: Path, client: str, kind: str, how: str) -> None:
    """Each of the three repeats once when left alone, which would be eight."""
    async with scripted(Failing(how)) as bottom, layer(tmp_path / "b", bottom.address, kind) as middle:
        async with layer(tmp_path / "a", middle, kind, otherwise=503) as top:
            with mesh_of(tmp_path, orders(top)) as mesh:
                async with caller(mesh, client) as get:
                    for count in range(1, 6):
                        answer = await get()
                        assert answer.status_code == 503
                        assert len(bottom.requests) <= 2 * count
                    assert answer.extensions["meshlib.call"].attempts == 1
                    assert "the endpoint asks not to be tried again" in story(answer)
            assert len(bottom.requests) == 10


async def test_a_layer_that_is_called_again_does_not_repeat_itself(tmp_path: Path) -> None:
    """The attempt travels: through a hop without a mesh the bottom is asked once by the second call of the edge."""
    async with scripted(Failing("status")) as bottom, layer(tmp_path / "a", bottom.address) as top:
        async with httpx.AsyncClient() as plain:

            async def hop(server: Scripted, request: Request) -> bytes:
                # Knows nothing of the mesh but its headers: the mark is lost, the attempt isn't.
                kept = {name: value for name, value in request.headers.items() if name in ("x-mesh-attempt", "tracestate")}
                answer = await plain.get(f"http://{top}/", headers=kept)
                return f"HTTP/1.1 {answer.status_code} x\r\ncontent-length: 0\r\n\r\n".encode()

            async with scripted(hop) as between:
                with mesh_of(tmp_path, orders(between.address)) as mesh:
                    async with caller(mesh, "async") as get:
                        assert (await get()).status_code == 502
                assert (len(between.requests), len(bottom.requests)) == (2, 3)


@SERVERS
@pytest.mark.parametrize(
    ("header", "value", "attempts"),
    [
        ("x-mesh-attempt", "1", 1),
        ("X-Mesh-Attempt", "0", 2),
        ("x-envoy-attempt-count", "1", 2),
        ("x-envoy-attempt-count", "2", 1),
        ("X-Envoy-Attempt-Count", "3", 1),
        ("x-envoy-attempt-count", "0", 2),
        ("tracestate", "meshlib=1", 1),
        ("tracestate", "vendor=x,meshlib=2,other=y", 1),
        ("TraceState", "vendor=x , meshlib=1", 1),
        ("tracestate", "meshlib=0", 2),
        ("tracestate", "meshlibs=1,xmeshlib=1,a=meshlib=1", 2),
        # What can't be read is taken for a retry.
        ("tracestate", "meshlib=", 1),
        ("tracestate", ",,,", 2),
    ],
)
async def test_who_is_called_again_does_not_repeat(tmp_path: Path, kind: str, header: str, value: str, attempts: int) -> None:
    """However the caller tells its attempt: by our header, Envoy's, or the state of the trace."""
    async with scripted(Failing("status")) as bottom, layer(tmp_path, bottom.address, kind) as address:
        async with httpx.AsyncClient() as plain:
            answer = await plain.get(f"http://{address}/", headers={header: value})
        assert (answer.status_code, len(bottom.requests)) == (502, attempts)
        # The attempt goes on down, so that nobody below repeats either.
        told = bottom.requests[0].headers
        assert ("x-mesh-attempt" in told) == (attempts == 1)


@ALL
async def test_the_attempt_rides_in_the_state_of_the_trace(tmp_path: Path, client: str) -> None:
    """On a retry, in front of what is there, once; on the first attempt nothing is added."""
    trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    async with scripted(Failing("status", 1)) as server:
        with mesh_of(tmp_path, orders(server.address)) as mesh:
            async with caller(mesh, client) as get:
                await get(headers={"traceparent": trace, "tracestate": "vendor=x,other=y"})
                first, second = server.requests
                assert first.headers["tracestate"] == "vendor=x,other=y"
                assert second.headers["tracestate"] == "meshlib=1,vendor=x,other=y"
                assert second.headers["x-mesh-attempt"] == "1"
                assert (
                    first.headers["traceparent"].split("-")[1]
                    == second.headers["traceparent"].split("-")[1]
                    == trace.split("-")[1]
                )
    async with scripted(Failing("status", 2)) as server:
        with mesh_of(tmp_path, orders(server.address, retry={"attempts": 2})) as mesh:
            async with caller(mesh, client) as get:
                await get()
                assert [request.headers.get("tracestate") for request in server.requests] == [None, "meshlib=1", "meshlib=2"]


# ------------------------------------------------------------------ tenacity


@ALL
async def test_tenacity_decides_how_often_and_how_long(tmp_path: Path, client: str) -> None:
    """Three attempts, with its own wait in place of the backoff; the last answer is what the caller gets."""
    failing = Failing()
    terms = meshlib.policy(wait=tenacity.wait_fixed(0.05), stop=tenacity.stop_after_attempt(3), idempotent=True)
    async with scripted(failing) as server:
        with mesh_of(tmp_path, orders(server.address, retry={"backoff": ["5s", "10s"]})) as mesh:
            async with caller(mesh, client) as get:
                for method in ("GET", "POST"):
                    failing.at.clear()
                    answer = await get(method=method, extensions=terms)
                    assert (answer.status_code, len(failing.at), pauses(answer)) == (503, 3, [0.05, 0.05])
                    assert all(0.05 <= later - earlier < 2 for earlier, later in zip(failing.at, failing.at[1:], strict=False))
                    assert "sent again after 50 ms" in story(answer)
                    assert "no retry left" in story(answer)


@CLIENTS
async def test_tenacity_is_asked_for_errors_as_well(tmp_path: Path, client: str) -> None:
    """A connection that is lost counts as an attempt; its strategies see the error and the number of the attempt."""
    seen = []

    def wait(state: tenacity.RetryCallState) -> float:
        assert state.outcome is not None
        seen.append((state.attempt_number, type(state.outcome.exception()).__name__))
        return 0.001 * state.attempt_number

    async with scripted(Failing("reset")) as server:
        with mesh_of(tmp_path, orders(server.address)) as mesh:
            async with caller(mesh, client) as get:
                with pytest.raises(meshlib.ConnectionLost):
                    await get(extensions=meshlib.policy(wait=wait, stop=tenacity.stop_after_attempt(4)))
        assert len(server.requests) == 4
        assert seen == [(number, "ConnectionLost") for number in (1, 2, 3, 4)]


@CLIENTS
async def test_tenacity_can_only_stop_earlier_than_safety_does(tmp_path: Path, client: str) -> None:
    """A POST that may have been processed isn't repeated, whatever `stop` says; nor where a caller retries, or the budget is empty."""
    terms = meshlib.policy(wait=tenacity.wait_none(), stop=tenacity.stop_after_attempt(5))
    async with scripted(Failing()) as server:
        with mesh_of(tmp_path, orders(server.address)) as mesh:
            async with caller(mesh, client) as get:
                assert (await get(method="POST", extensions=terms)).status_code == 503
                assert len(server.requests) == 1
        with mesh_of(tmp_path, orders(server.address, retry={"budget": {"ratio": 0, "per_second": 0}})) as mesh:
            async with caller(mesh, client) as get:
                answer = await get(extensions=terms)
                assert "the retry budget is empty" in story(answer)
                assert len(server.requests) == 2


@CLIENTS
async def test_a_wait_of_tenacity_ends_with_the_deadline(tmp_path: Path, client: str) -> None:
    """Nobody is kept longer than he asked for."""
    terms = meshlib.policy(wait=tenacity.wait_fixed(60), stop=tenacity.stop_never, timeout=0.2)
    async with scripted(Failing()) as server:
        with mesh_of(tmp_path, orders(server.address)) as mesh:
            async with caller(mesh, client) as get:
                begun = time.monotonic()
                with contextlib.suppress(meshlib.DeadlineExceeded):
                    assert (await get(extensions=terms)).status_code == 503
                assert time.monotonic() - begun < 3
                assert (len(server.requests), row(mesh)["in_flight"]) == (1, 0)


@CLIENTS
async def test_a_wait_beyond_the_deadline_is_not_begun(tmp_path: Path, client: str) -> None:
    """The answer that there is comes at once, and the budget keeps its retry."""
    terms = meshlib.policy(wait=tenacity.wait_fixed(60), stop=tenacity.stop_never, timeout=5)
    async with scripted(Failing()) as server:
        with mesh_of(tmp_path, orders(server.address)) as mesh:
            async with caller(mesh, client) as get:
                answer = await get(extensions=terms)
    assert (answer.status_code, len(server.requests), answer.extensions["meshlib.call"].record()["retries"]) == (503, 1, 0)


@CLIENTS
async def test_a_strategy_that_is_no_good_costs_no_permit(tmp_path: Path, client: str) -> None:
    """Its own error is what the caller gets."""

    def broken(state: tenacity.RetryCallState) -> float:
        raise ZeroDivisionError

    async with scripted(Failing()) as server:
        with mesh_of(tmp_path, orders(server.address)) as mesh:
            async with caller(mesh, client) as get:
                with pytest.raises(ZeroDivisionError):
                    await get(extensions=meshlib.policy(wait=broken))
                with pytest.raises(ValueError, match="seconds are expected"):
                    await get(extensions=meshlib.policy(wait=lambda _: float("nan")))
            assert [found["in_flight"] for found in mesh.engine.stats(time.monotonic()) if found["service"] == "orders"] == [0, 0]


# ------------------------------------------------------------------ hedges


class Moody:
    """A server that is quick, but for /slow, which takes until it is given up or `free`."""

    def __init__(self) -> None:
        self.free = asyncio.Event()

    async def __call__(self, server: Scripted, request: Request) -> bytes:
        if request.target == "/slow" and "x-mesh-attempt" not in request.headers:
            await self.free.wait()
        elif request.target == "/slower":
            await asyncio.sleep(0.03)
        return ok(server.address.encode())


HEDGED = {"hedge": True, "hedge_least": "20ms"}


async def test_a_call_slower_than_most_is_hedged(tmp_path: Path) -> None:
    """Once the service has answered a hundred calls it is known what is slow, and not before."""
    async with scripted(Moody()) as one, scripted(Moody()) as two:
        with mesh_of(tmp_path, orders(one.address, two.address, retry=HEDGED)) as mesh:
            async with caller(mesh, "async") as get:
                await get()
                mesh.engine.tend(time.monotonic())
                for _ in range(30):
                    await get()
                assert row(mesh)["slow_after"] == 0.0
                with pytest.raises(meshlib.DeadlineExceeded):
                    await get("/slow", extensions=meshlib.policy(timeout=0.1))
                for _ in range(120):
                    await get()
                assert 0 < row(mesh)["slow_after"] < 1
                answer = await get("/slow")
                assert answer.status_code == 200
                assert re.search(r"hedged after [\d.]+ m?s to 127", story(answer))
                assert "another is asked as well" in story(answer)
                assert (row(mesh)["hedges"], row(mesh)["in_flight"]) == (1, 0)


async def test_hedges_are_a_small_share_of_the_calls(tmp_path: Path) -> None:
    """At most 2 % of them and one, however many are slow."""
    async with scripted(Moody()) as one, scripted(Moody()) as two:
        with mesh_of(tmp_path, orders(one.address, two.address, retry={**HEDGED, "hedge_least": "1ms"})) as mesh:
            async with caller(mesh, "async") as get:
                await get()
                mesh.engine.tend(time.monotonic())
                for _ in range(149):
                    await get()
                for _ in range(15):
                    await asyncio.gather(*(get("/slower" if place < 4 else "/") for place in range(10)))
                sent = len(one.requests) + len(two.requests)
                assert 1 <= row(mesh)["hedges"] <= 0.02 * 300 + 1
                assert sent == 300 + row(mesh)["hedges"]


async def test_a_blocking_client_waits_for_its_one_answer(tmp_path: Path) -> None:
    """It has one thread, and the record says so."""
    async with scripted(Moody()) as one, scripted(Moody()) as two:
        with mesh_of(tmp_path, orders(one.address, two.address, retry=HEDGED)) as mesh:
            async with caller(mesh, "blocking") as get:
                await get()
                mesh.engine.tend(time.monotonic())
                for _ in range(149):
                    await get()
                answer = await get("/slower")
                assert "not hedged, because: " in story(answer)
                assert (row(mesh)["hedges"], answer.extensions["meshlib.call"].attempts) == (0, 1)


# ------------------------------------------------------------------ what stands in


@ALL
async def test_a_value_stands_in_for_a_failure(tmp_path: Path, client: str) -> None:
    """For an answer of 5xx and for an error, after all attempts; counted, and visible in the answer and in its record."""
    failing = Failing()
    async with scripted(failing) as server:
        with mesh_of(tmp_path, orders(server.address)) as mesh:
            async with caller(mesh, client) as get:
                terms = meshlib.policy(fallback={"items": []})
                # The first leaves no connection behind that could be used again.
                for how, attempts in (("reset", 2), ("status", 4)):
                    failing.how = how
                    answer = await get(extensions=terms)
                    assert (answer.status_code, answer.json(), len(server.requests)) == (200, {"items": []}, attempts)
                    assert answer.extensions["meshlib.fallback"] == "value"
                    assert story(answer).endswith("; the value that its fallback names stood in")
                assert mesh.fallbacks == {("orders", "value"): 2}
                failing.left = 0
                answer = await get(extensions=terms)
                assert (answer.text, "meshlib.fallback" in answer.extensions) == ("good", False)
                assert mesh.fallbacks == {("orders", "value"): 2}


@ALL
async def test_the_last_good_answer_stands_in(tmp_path: Path, client: str) -> None:
    """Of the same question, headers included; where there is none the failure is what it is."""
    failing = Failing(times=0)
    async with scripted(failing) as server:
        with mesh_of(tmp_path, orders(server.address)) as mesh:
            async with caller(mesh, client) as get:
                terms = meshlib.policy(fallback=meshlib.last_good(30))
                assert (await get("/a", extensions=terms, headers={"x-who": "me"})).text == "good"
                failing.left = 1000
                answer = await get("/a", extensions=terms, headers={"x-who": "me"})
                assert (answer.status_code, answer.text) == (200, "good")
                assert answer.extensions["meshlib.fallback"] == "last_good"
                assert "the last good answer stood in" in story(answer)
                for path, who in (("/b", "me"), ("/a", "you")):
                    other = await get(path, extensions=terms, headers={"x-who": who})
                    assert (other.status_code, "meshlib.fallback" in other.extensions) == (503, False)
                assert mesh.fallbacks == {("orders", "last_good"): 1}


@ALL
async def test_a_callable_makes_something_of_the_error(tmp_path: Path, client: str) -> None:
    """It is given what would have been raised."""
    seen: list[Any] = []

    def stand_in(error: Any) -> str:
        seen.append(error)
        return f"sorry: {type(error).__name__}"

    async with scripted(Failing("reset")) as server:
        with mesh_of(tmp_path, orders(server.address)) as mesh:
            async with caller(mesh, client) as get:
                answer = await get(extensions=meshlib.policy(fallback=stand_in))
                assert answer.text.startswith("sorry: ")
                assert isinstance(seen[0], meshlib.ConnectionLost)
                assert answer.extensions["meshlib.fallback"] == "callable"
                assert "what its fallback made of the error stood in" in story(answer)


@CLIENTS
async def test_a_call_that_the_mesh_refuses_has_its_fallback(tmp_path: Path, client: str) -> None:
    """A rate that is used up, for one."""
    async with scripted(good) as server:
        services = orders(server.address, admit={"rate": [{"calls": 1, "per": "1h"}]})
        with mesh_of(tmp_path, services) as mesh:
            async with caller(mesh, client) as get:
                await get()
                answer = await get(extensions=meshlib.policy(fallback="later"))
                assert (answer.text, answer.extensions["meshlib.fallback"], len(server.requests)) == ("later", "value", 1)
