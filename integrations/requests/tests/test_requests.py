"""Does a session on the mesh do what a session does, and what the mesh does? Real servers, and plain requests beside it."""

from __future__ import annotations

import asyncio
import copy
import os
import pickle
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import meshlib_requests
import pytest
import requests
import urllib3
from requests.adapters import HTTPAdapter

import meshlib
from integrations.requests.tests.common import EACH, EXAMPLE, MESHLIB, PATH, at, die, full, hello, in_flight, serving
from tests.support import (
    PYTHON,
    Request,
    Scripted,
    free_port,
    identities,
    mesh_of,
    ok,
    process,
    wait_until_listening,
    write_config,
)


def test_a_call_goes_to_a_service_and_tells_its_story(tmp_path: Path) -> None:
    """The name in the URL is the Service, and https is refused where it is called in plain text. A hundred calls take one connection."""
    with serving(hello) as (server,), mesh_of(tmp_path, at(server)) as mesh, meshlib_requests.session(mesh) as http:
        answer = http.get("http://orders/items/7", params={"q": "x"})
        with pytest.raises(meshlib.Denied, match="promises TLS"):
            http.get("https://orders/")
        assert (answer.status_code, answer.text) == (200, "hello from /items/7?q=x")
        call = meshlib_requests.call_of(answer)
        assert call is not None
        assert (call.service, call.attempts, server.address in call.explain()) == ("orders", 1, True)
        assert server.requests[0].headers["host"] == "orders"
        for _ in range(100):
            with http.get("http://orders/", stream=True) as answer:
                assert answer.content == b"hello from /"
        assert (server.connections, in_flight(mesh)) == (1, 0)


def test_a_connection_is_used_again_after_a_body_that_was_read(tmp_path: Path) -> None:
    """However it is framed, and also if its reader stops with the last byte."""

    async def large(server: Scripted, request: Request) -> bytes:
        if request.target == "/chunks":
            return b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n" + b"30d40\r\n" + b"x" * 200_000 + b"\r\n0\r\n\r\n"
        return ok(b"x" * 200_000)

    with serving(large) as (server,), mesh_of(tmp_path, at(server)) as mesh, meshlib_requests.session(mesh) as http:
        for _ in range(3):
            assert len(http.post("http://orders/").content) == 200_000
            assert len(http.post("http://orders/chunks").content) == 200_000
            with http.post("http://orders/", stream=True) as answer:
                assert len(answer.raw.read(200_000)) == 200_000
                assert answer.raw.closed
        assert (server.connections, in_flight(mesh)) == (1, 0)


def test_events_are_there_when_they_come(tmp_path: Path) -> None:
    """A reader of lines doesn't wait for a block to be full."""
    go_on = threading.Event()

    async def events(server: Scripted, request: Request) -> bytes:
        (writer,) = server._writers
        writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n4\r\none\n\r\n")
        await asyncio.to_thread(go_on.wait, 20)
        return b"4\r\ntwo\n\r\n0\r\n\r\n"

    with serving(events) as (server,), mesh_of(tmp_path, at(server)) as mesh, meshlib_requests.session(mesh) as http:
        try:
            with http.get("http://orders/", stream=True) as answer:
                pieces = answer.iter_content(512)
                assert next(pieces) == b"one\n"
                go_on.set()
                assert list(pieces) == [b"two\n"]
        finally:
            go_on.set()


def test_a_killed_endpoint_and_a_503_are_tried_elsewhere(tmp_path: Path) -> None:
    """A refused connection for every method, a lost answer and a 503 for the idempotent ones."""

    async def busy(server: Scripted, request: Request) -> bytes:
        return b"HTTP/1.1 503 Service Unavailable\r\ncontent-length: 0\r\n\r\n"

    with serving(busy, hello, die) as (one, two, three):
        services = at(one, two, balance=EACH) | {
            "dead": {"discover": {"static": [f"127.0.0.1:{free_port()}", two.address]}, "balance": EACH}
        }
        services |= {"broken": {"discover": {"static": [three.address, two.address]}, "balance": EACH}}
        with mesh_of(tmp_path, services) as mesh, meshlib_requests.session(mesh) as http:
            assert [http.get("http://orders/").status_code for _ in range(10)] == [200] * 10
            assert [http.post("http://dead/", data="x").status_code for _ in range(10)] == [200] * 10
            assert [http.get("http://broken/").status_code for _ in range(10)] == [200] * 10
            assert in_flight(mesh) == 0
    assert one.requests
    assert three.requests


def test_an_endpoint_that_is_killed_is_not_noticed(tmp_path: Path) -> None:
    """Its connections break and its port refuses; the calls go on."""
    with (
        serving(hello, hello) as (one, two),
        mesh_of(tmp_path, at(one, two, balance=EACH)) as mesh,
        meshlib_requests.session(mesh) as http,
    ):
        assert [http.get("http://orders/").status_code for _ in range(10)] == [200] * 10
        assert one._server is not None
        asyncio.run_coroutine_threadsafe(one.stop(), one._server.get_loop()).result(10)
        assert [http.get("http://orders/").status_code for _ in range(30)] == [200] * 30
        assert in_flight(mesh) == 0
    assert one.requests
    assert len(one.requests) + len(two.requests) == 40


def test_a_post_that_was_written_is_not_sent_twice(tmp_path: Path) -> None:
    """Not by the mesh, and not by a Retry of urllib3 that is for hosts outside; unless the adapter's extensions say that it's safe."""
    many = urllib3.Retry(5, allowed_methods=None, backoff_factor=0)
    with (
        serving(die) as (server,),
        mesh_of(tmp_path, at(server)) as mesh,
        meshlib_requests.session(mesh, max_retries=many) as http,
    ):
        with pytest.raises(requests.ConnectionError) as caught:
            http.post("http://orders/", data="x")
        assert isinstance(caught.value, meshlib.ConnectionLost)
        assert caught.value.request is not None
        assert caught.value.request.url == "http://orders/"
        assert "not idempotent" in meshlib_requests.call_of(caught.value).explain()  # type: ignore[union-attr]
        assert len(server.requests) == 1
        with pytest.raises(requests.ConnectionError):
            http.get("http://orders/")
        assert len(server.requests) == 3
        http.mount("http://orders/search", meshlib_requests.MeshAdapter(mesh, extensions=meshlib.policy(idempotent=True)))
        with pytest.raises(requests.ConnectionError):
            http.post("http://orders/search", data="x")
        assert len(server.requests) == 5
        assert in_flight(mesh) == 0


@pytest.mark.parametrize("body", [b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nhalf",
                                  b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n4\r\nhalf\r\n9\r\nh"])  # fmt: skip
def test_a_body_that_breaks_off_is_an_error_of_both(tmp_path: Path, body: bytes) -> None:
    """As `iter_content` tells it, and as `raw` tells it."""

    async def cut(server: Scripted, request: Request) -> bytes:
        return body + b"" if b"connection: close" in body else body.replace(b"\r\n\r\n", b"\r\nconnection: close\r\n\r\n", 1)

    with serving(cut) as (server,), mesh_of(tmp_path, at(server)) as mesh, meshlib_requests.session(mesh) as http:
        with pytest.raises(requests.exceptions.ChunkedEncodingError) as plain:
            requests.get(f"http://{server.address}/")
        answer = http.post("http://orders/", stream=True)
        pieces = answer.iter_content(4)
        assert next(pieces) == b"half"
        with pytest.raises(requests.exceptions.ChunkedEncodingError) as caught:
            list(pieces)
        assert isinstance(caught.value, meshlib.AttemptFailed)
        assert not isinstance(plain.value, meshlib.MeshError)
        assert meshlib_requests.call_of(caught.value) is meshlib_requests.call_of(answer)
        with pytest.raises(urllib3.exceptions.ProtocolError):
            http.post("http://orders/", stream=True).raw.read()
        assert in_flight(mesh) == 0


def test_time_is_cut_by_a_timeout_and_by_the_deadline(tmp_path: Path) -> None:
    """Both are requests.ReadTimeout; a route's deadline is in force if the caller says nothing."""
    release = threading.Event()

    async def slow(server: Scripted, request: Request) -> bytes:
        await asyncio.to_thread(release.wait, 20)
        return ok()

    with serving(slow) as (server,), mesh_of(tmp_path, at(server)) as mesh, meshlib_requests.session(mesh) as http:
        try:
            with pytest.raises(requests.ReadTimeout) as caught:
                http.post("http://orders/", timeout=0.05)
            assert isinstance(caught.value, meshlib.AttemptTimeout | meshlib.DeadlineExceeded)
            with pytest.raises(requests.Timeout):
                http.post("http://orders/", timeout=urllib3.Timeout(total=0.05))
            with mesh.deadline(0.05), pytest.raises(requests.ReadTimeout) as caught:
                http.get("http://orders/")
            assert isinstance(caught.value, meshlib.DeadlineExceeded)
            assert in_flight(mesh) == 0
        finally:
            release.set()


def test_a_timeout_of_the_caller_and_a_stream_outlast_the_routes_deadline(tmp_path: Path) -> None:
    """Who says how long to wait for a piece may wait longer; a streamed body may take its time after its head."""

    async def slow(server: Scripted, request: Request) -> bytes:
        if request.target == "/head":
            await asyncio.sleep(0.3)
        return b"HTTP/1.1 200 OK\r\nconnection: close\r\n\r\n" + b"x" * 10

    with serving(slow) as (server,), mesh_of(tmp_path, at(server, deadline=0.1)) as mesh, meshlib_requests.session(mesh) as http:
        with pytest.raises(meshlib.DeadlineExceeded):
            http.get("http://orders/head")
        assert http.get("http://orders/head", timeout=5).content == b"x" * 10
        assert http.get("http://orders/head", timeout=(5, None)).content == b"x" * 10
        http.get("http://orders/", stream=True).close()
    told = [request.headers.get("x-mesh-deadline-ms") for request in server.requests]
    assert 0 < int(told[0] or 0) <= 100
    assert 4_000 < int(told[1] or 0) <= 5_000
    assert told[2:] == [None, None]


def test_a_mistake_in_an_upload_is_the_callers_own(tmp_path: Path) -> None:
    """It comes out as it went in, and nothing stays behind."""

    def broken() -> Iterator[bytes]:
        yield b"x"
        raise LookupError("mine")

    with serving(hello) as (server,), mesh_of(tmp_path, at(server)) as mesh, meshlib_requests.session(mesh) as http:
        with pytest.raises(LookupError, match="mine"):
            http.post("http://orders/", data=broken())
        assert in_flight(mesh) == 0


def test_a_connection_that_takes_too_long_is_a_connect_timeout(tmp_path: Path) -> None:
    """Also a ConnectionError, as in requests: nothing was sent. Whether it was the caller's time, or the deadline's."""
    with full() as address, mesh_of(tmp_path, at(address)) as mesh, meshlib_requests.session(mesh) as http:
        with pytest.raises(requests.ConnectTimeout) as caught:
            http.post("http://orders/", timeout=(0.02, 5))
        assert isinstance(caught.value, meshlib.ConnectFailed)
        with mesh.deadline(0.02), pytest.raises(requests.ConnectTimeout) as caught:
            http.post("http://orders/")
        assert isinstance(caught.value, meshlib.DeadlineExceeded)


def test_refusals_are_connection_errors_that_say_more(tmp_path: Path) -> None:
    """No endpoint, no such service, no way out: nothing was sent."""
    with mesh_of(tmp_path, {"orders": {"discover": {"static": [f"127.0.0.1:{free_port()}"]}}}, egress="deny") as mesh:
        with meshlib_requests.session(mesh) as http:
            for url, kind in (
                ("http://orders/", meshlib.ConnectFailed),
                ("http://nobody/", meshlib.UnknownService),
                ("http://127.0.0.1:1/", meshlib.Denied),
                ("https://example.invalid/", meshlib.Denied),
            ):
                with pytest.raises(requests.ConnectionError) as caught:
                    http.get(url)
                assert isinstance(caught.value, kind)


def test_errors_can_be_copied_and_pickled(tmp_path: Path) -> None:
    """Into the process of whoever has to know; the call's record stays here."""
    with mesh_of(tmp_path, at(f"127.0.0.1:{free_port()}")) as mesh, meshlib_requests.session(mesh) as http:
        with pytest.raises(meshlib.ConnectFailed) as caught:
            http.get("http://orders/")
    for found in (copy.copy(caught.value), pickle.loads(pickle.dumps(caught.value))):
        assert type(found) is type(caught.value)
        assert isinstance(found, requests.ConnectionError)
        assert (str(found), found.request.url, found.call) == (str(caught.value), "http://orders/", None)


def test_hosts_outside_go_by_requests_own_adapter(tmp_path: Path) -> None:
    """With `max_retries` and everything that it has; the mesh only counts them."""
    with serving(hello) as (server,), mesh_of(tmp_path, {}) as mesh, meshlib_requests.session(mesh, max_retries=3) as http:
        answer = http.get(f"http://{server.address}/x")
        assert (answer.text, meshlib_requests.call_of(answer)) == ("hello from /x", None)
        assert type(answer.raw) is urllib3.HTTPResponse
        assert isinstance(answer.connection, HTTPAdapter)
        assert answer.connection.max_retries.total == 3
        assert "egress" in mesh.metrics()
        with pytest.raises(requests.ConnectionError) as caught:
            http.get(f"http://127.0.0.1:{free_port()}/")
        assert not isinstance(caught.value, meshlib.MeshError)
        assert meshlib_requests.call_of(caught.value) is None


def test_credentials_of_a_proxy_stay_with_the_proxy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A service is not asked through a proxy, and is not told its password."""
    monkeypatch.setenv("HTTP_PROXY", f"http://me:secret@127.0.0.1:{free_port()}")

    async def around(server: Scripted, request: Request) -> bytes:
        return ok() if request.target == "/end" else b"HTTP/1.1 302 Found\r\nlocation: /end\r\ncontent-length: 0\r\n\r\n"

    with serving(around) as (server,), mesh_of(tmp_path, at(server)) as mesh, meshlib_requests.session(mesh) as http:
        assert http.get("http://orders/").status_code == 200
    assert [request.headers.get("proxy-authorization") for request in server.requests] == [None, None]


def test_many_threads_share_a_session(tmp_path: Path) -> None:
    """Every thread gets its own answer, and no permit stays behind."""
    with serving(hello, hello) as servers, mesh_of(tmp_path, at(*servers)) as mesh, meshlib_requests.session(mesh) as http:
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(lambda n: http.get(f"http://orders/{n}").text, range(200)))
        assert found == [f"hello from /{n}" for n in range(200)]
        assert in_flight(mesh) == 0


def test_a_forked_child_makes_its_own_connections(tmp_path: Path) -> None:
    """The parent's are left to the parent."""
    with serving(hello) as (server,), mesh_of(tmp_path, at(server)) as mesh, meshlib_requests.session(mesh) as http:
        assert http.get("http://orders/").status_code == 200
        pid = os.fork()
        if pid == 0:
            os._exit(0 if http.get("http://orders/child").text == "hello from /child" else 1)
        assert os.waitpid(pid, 0)[1] == 0
        assert http.get("http://orders/").status_code == 200
        assert server.connections == 2


def test_an_answer_that_nobody_reads_is_given_up(tmp_path: Path) -> None:
    """Closed early, or forgotten: its permit comes back, its connection isn't used again."""

    async def endless(server: Scripted, request: Request) -> bytes:
        return b"HTTP/1.1 200 OK\r\ncontent-length: 900000\r\n\r\n" + b"x" * 200_000

    with serving(endless) as (server,), mesh_of(tmp_path, at(server)) as mesh, meshlib_requests.session(mesh) as http:
        with http.get("http://orders/", stream=True) as answer:
            assert answer.raw.read(10) == b"x" * 10
            assert in_flight(mesh) > 0
        assert in_flight(mesh) == 0
        answer = http.get("http://orders/", stream=True)
        del answer
        assert in_flight(mesh) == 0
        assert server.connections == 2
        http.close()
        assert http.get("http://orders/", stream=True).raw.read(1) == b"x"


def test_a_session_of_the_mesh_does_not_travel_to_another_process(tmp_path: Path) -> None:
    """It says why, and what to do instead."""
    with mesh_of(tmp_path, {}) as mesh, meshlib_requests.session(mesh) as http:
        with pytest.raises(TypeError, match="in each process"):
            pickle.dumps(http)


def test_the_example_runs_with_mutual_tls(tmp_path: Path) -> None:
    """The service behind `meshlib serve` in mode enforce, and the script beside it."""
    port = free_port()
    (tmp_path / "mesh.yaml").write_text(EXAMPLE.with_name("mesh.yaml").read_text().replace("8301", str(port)))
    identities(tmp_path, "reports", "orders")
    env = {"MESHLIB_CONFIG": str(tmp_path / "mesh.yaml"), "PYTHONPATH": PATH}
    serve = (MESHLIB, "serve", "example:orders()", "--service", "orders")
    with process(*serve, env=env, cwd=EXAMPLE.parent) as orders:
        wait_until_listening(port, orders)
        with process(PYTHON, str(EXAMPLE), env={**env, "MESHLIB_SERVICE": "reports"}) as script:
            told = script.communicate(timeout=60)[0]
    # What comes first is said of the configuration.
    told = told[told.index("item 1") :]
    assert told.splitlines()[:4] == ["item 1 for reports", "item 2 for reports", "item 3 for reports", "3 lines read by orders"]
    assert "GET /items/4 to orders" in told


def test_somebody_else_at_the_address_is_an_ssl_error(tmp_path: Path) -> None:
    """The right CA, the wrong service: nothing is sent."""
    identities(tmp_path, "me", "orders", "mallory")
    port = free_port()
    services = {
        "me": {},
        "orders": {"discover": {"static": [f"127.0.0.1:{port}"]}},
        "mallory": {"listen": f"127.0.0.1:{port}", "secure": {"allow": [{"name": "all", "from": ["*"]}]}},
    }
    env = {"MESHLIB_CONFIG": str(write_config(tmp_path, services, mode="enforce")), "PYTHONPATH": PATH}
    with process(MESHLIB, "serve", "example:orders()", "--service", "mallory", env=env, cwd=EXAMPLE.parent) as child:
        wait_until_listening(port, child)
        with mesh_of(tmp_path, services, mode="enforce") as mesh, meshlib_requests.session(mesh) as http:
            with pytest.raises(requests.exceptions.SSLError) as caught:
                http.get("http://orders/")
    assert isinstance(caught.value, meshlib.PeerIdentityError)
