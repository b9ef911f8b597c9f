"""Can a test say who calls, whatever test client and framework it uses, and is it judged as the real one would be?

Django's clients: integrations/django/tests.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import subprocess
import threading
import unittest
import warnings
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import werkzeug.test
from fastapi import FastAPI
from flask import Flask
from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect

import meshlib
from meshlib.testing import as_peer
from tests.support import PYTHON, identities, mesh_of

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # newer ones would rather have a successor of httpx
    from starlette.testclient import TestClient

ID = "spiffe://shop.internal/ns/default/sa/"
WEB, BATCH, STRANGER = ID + "web", ID + "batch", ID + "stranger"
RULES = {"allow": [{"name": "web reads", "from": ["web"], "methods": ["GET"]}, {"name": "batch", "from": ["batch"]}]}
SERVICES: dict[str, Any] = {"me": {"secure": RULES}, "web": {}, "batch": {}}


@pytest.fixture(params=["observe", "permissive", "enforce"])
def any_mode(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[meshlib.Mesh]:
    yield from made(tmp_path, request.param)


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[meshlib.Mesh]:
    """Mode enforce."""
    yield from made(tmp_path, "enforce")


def made(folder: Path, mode: str) -> Iterator[meshlib.Mesh]:
    if mode != "observe":
        identities(folder, "me")
    with mesh_of(folder, SERVICES, mode=mode) as mesh:
        yield mesh


def caller() -> dict[str, Any]:
    peer, call = meshlib.peer(), meshlib.current_call()
    assert peer is not None and call is not None
    return {"peer": peer.spiffe_id, "tls": peer.is_tls, "judged": call["peer"]}


def of(spiffe_id: str) -> dict[str, Any]:
    return {"peer": spiffe_id, "tls": bool(spiffe_id), "judged": spiffe_id}


def starlette_app(mesh: meshlib.Mesh) -> Any:
    async def later(request: Any) -> JSONResponse:
        return JSONResponse(caller())

    def now(request: Any) -> JSONResponse:
        return JSONResponse(caller())

    async def talk(socket: WebSocket) -> None:
        await socket.accept()
        await socket.send_json(caller())
        await socket.close()

    both = ["GET", "POST"]
    routes = [Route("/later", later, methods=both), Route("/now", now, methods=both), WebSocketRoute("/talk", talk)]
    return mesh.asgi(Starlette(routes=routes))


def flask_app(mesh: meshlib.Mesh) -> Flask:
    app = Flask("under test")
    app.wsgi_app = mesh.wsgi(app.wsgi_app)  # type: ignore[method-assign]
    app.add_url_rule("/now", "now", caller, methods=["GET", "POST"])
    return app


# ---------------------------------------------------------------------------------------------- the rules, by mode


def test_rules_judge_the_declared_peer(any_mode: meshlib.Mesh) -> None:
    """Allowed is what the rules allow it; without a rule 403, without identity 401; where nothing binds, everybody is let in."""
    binds = any_mode.config.own.mode == "enforce"
    client = TestClient(starlette_app(any_mode))
    with as_peer(WEB):
        assert client.get("/later").json() == of(WEB)
        assert client.post("/later").status_code == (403 if binds else 200)
    with as_peer(BATCH):
        assert client.post("/later").json() == of(BATCH)
    with as_peer(STRANGER):
        assert client.get("/later").status_code == (403 if binds else 200)
    with as_peer("spiffe://elsewhere.example/ns/default/sa/web"):
        assert client.get("/later").status_code == (403 if binds else 200)
    for refused in (client.get("/later"), as_peer(None)(client.get)("/later")):
        assert refused.status_code == (401 if binds else 200)


def test_rules_judge_it_under_wsgi_too(any_mode: meshlib.Mesh) -> None:
    """The same, by Flask's test client."""
    binds = any_mode.config.own.mode == "enforce"
    client = flask_app(any_mode).test_client()
    with as_peer(WEB):
        assert client.get("/now").json == of(WEB)
        assert client.post("/now").status_code == (403 if binds else 200)
    with as_peer(STRANGER):
        assert client.get("/now").status_code == (403 if binds else 200)
    assert client.get("/now").status_code == (401 if binds else 200)


# ------------------------------------------------------------------------------------------- each client, mode enforce


@pytest.mark.parametrize("path", ["/later", "/now"])
def test_starlettes_client_carries_it_into_its_threads(mesh: meshlib.Mesh, path: str) -> None:
    """Handlers that are coroutines run in the portal's thread, the others in a thread of the pool; with lifespan and without."""
    client = TestClient(starlette_app(mesh))
    with as_peer(WEB):
        assert client.get(path).json() == of(WEB)
    # The loop was begun before anybody was declared, and serves several in turn.
    with client:
        for peer in (WEB, BATCH):
            with as_peer(peer):
                assert client.get(path).json() == of(peer)
        assert client.get(path).status_code == 401


def test_a_websocket_is_from_the_peer_as_which_it_was_opened(mesh: meshlib.Mesh) -> None:
    """A stranger is turned away before the acceptance."""
    client = TestClient(starlette_app(mesh))
    with as_peer(BATCH), client.websocket_connect("/talk") as socket:
        assert socket.receive_json() == of(BATCH)
    with as_peer(STRANGER), pytest.raises((WebSocketDisconnect, httpx.HTTPError)), client.websocket_connect("/talk"):
        pass


def test_fastapis_client_carries_it(mesh: meshlib.Mesh) -> None:
    """Into dependencies and handlers, in coroutines and threads."""
    app = FastAPI()
    app.get("/later")(starlette_later)
    app.get("/now")(caller)
    client = TestClient(mesh.asgi(app))
    with as_peer(WEB):
        assert [client.get("/later").json(), client.get("/now").json()] == [of(WEB)] * 2


async def starlette_later() -> dict[str, Any]:
    return caller()


async def test_httpx_asgi_transport_carries_it_and_tasks_keep_their_own(mesh: meshlib.Mesh) -> None:
    """Calls at the same time, each as somebody else."""
    transport = httpx.ASGITransport(starlette_app(mesh))
    async with httpx.AsyncClient(transport=transport, base_url="http://me") as http:
        here = asyncio.Barrier(2)

        async def call(peer: str) -> Any:
            async with as_peer(peer):
                await here.wait()
                return (await http.get("/now")).json()

        assert list(await asyncio.gather(call(WEB), call(BATCH))) == [of(WEB), of(BATCH)]
        assert (await http.get("/now")).status_code == 401


def test_werkzeugs_client_and_httpx_wsgi_transport_carry_it(mesh: meshlib.Mesh) -> None:
    """WSGI in the thread that calls."""
    app = flask_app(mesh)
    with as_peer(WEB):
        assert json.loads(werkzeug.test.Client(app).get("/now").data) == of(WEB)
        with httpx.Client(transport=httpx.WSGITransport(app), base_url="http://me") as http:
            assert http.get("/now").json() == of(WEB)
    assert werkzeug.test.Client(app).get("/now").status_code == 401


# ------------------------------------------------------------------------------------------------- the object itself


def test_the_innermost_counts_and_the_outer_comes_back() -> None:
    """Also when one of them ends with an exception, and when one object stands within itself."""
    app = observed()
    web, batch = as_peer(WEB), as_peer(BATCH)
    assert asked(app) == ""
    with web as peer:
        assert (peer.spiffe_id, peer.is_tls, peer.service) == (WEB, True, "web")
        with batch, web:
            assert asked(app) == WEB
            with pytest.raises(KeyError), as_peer(None):
                assert asked(app) == ""
                raise KeyError
            assert asked(app) == WEB
        assert asked(app) == WEB
    assert asked(app) == ""


def test_it_decorates_functions_of_all_four_kinds() -> None:
    """And they stay what they were: the same name, signature and kind."""
    app = observed()

    def plain(one: int, *, two: int = 2) -> tuple[int, str]:
        """What it does."""
        return one + two, asked(app)

    async def later() -> str:
        await asyncio.sleep(0)
        return asked(app)

    def pieces() -> Iterator[str]:
        yield asked(app)

    async def parts() -> AsyncIterator[str]:
        yield asked(app)

    async def first(found: AsyncIterator[str]) -> list[str]:
        return [part async for part in found]

    web = as_peer(WEB)
    assert web(plain)(1) == (3, WEB)
    assert asyncio.run(web(later)()) == WEB
    assert list(web(pieces)()) == [WEB]
    assert asyncio.run(first(web(parts)())) == [WEB]
    assert asked(app) == ""
    assert (web(plain).__doc__, inspect.signature(web(plain))) == ("What it does.", inspect.signature(plain))
    assert inspect.iscoroutinefunction(web(later)) and inspect.isasyncgenfunction(web(parts))
    assert inspect.isgeneratorfunction(web(pieces))


def test_threads_share_the_object_and_not_what_it_declares() -> None:
    """A thread of its own has nobody; one that was given the context has it."""
    app = observed()
    web = as_peer(WEB)
    here = threading.Barrier(4)

    def call(_: int) -> str:
        with web:
            here.wait(5)
            return asked(app)

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(call, range(4))) == [WEB] * 4
        with web:
            assert pool.submit(asked, app).result() == ""
            assert asyncio.run(in_thread(app)) == WEB


async def in_thread(app: Any) -> str:
    return await asyncio.to_thread(asked, app)


@pytest.mark.parametrize(
    ("spiffe_id", "said"),
    [
        ("web", "does not begin with spiffe://"),
        ("", "does not begin with spiffe://"),
        ("https://shop.internal/web", "does not begin with spiffe://"),
        ("spiffe://Shop.internal/web", "lower-case"),
        ("spiffe://shop.internal", "no workload"),
        ("spiffe://shop.internal/a/../b", "dot segment"),
        (7, "a text is expected"),
    ],
)
def test_what_is_no_spiffe_id_is_said_at_once(spiffe_id: Any, said: str) -> None:
    """Where it is written, and not where the first call is refused."""
    with pytest.raises(ValueError, match=said):
        as_peer(spiffe_id)


def test_it_does_not_decorate_classes() -> None:
    """A decorated class would do nothing for its tests."""
    with pytest.raises(TypeError, match="enterContext"):
        as_peer(WEB)(object)  # type: ignore[type-var]


class AsTestCases(unittest.IsolatedAsyncioTestCase):
    """unittest's way: for all tests of a class."""

    def setUp(self) -> None:
        self.enterContext(as_peer(WEB))

    async def test_it_is_in_force_in_coroutines(self) -> None:
        assert asked(observed()) == WEB

    @as_peer(BATCH)
    def test_a_test_of_its_own_counts_more(self) -> None:
        assert asked(observed()) == BATCH


# pytest's ways: fixtures, sync and async.


@pytest.fixture
def web() -> Iterator[meshlib.Peer]:
    with as_peer(WEB) as peer:
        yield peer


@pytest.fixture
@as_peer(BATCH)
async def batch() -> AsyncIterator[str]:
    yield BATCH
    assert asked(observed()) == BATCH


@as_peer(WEB)
@pytest.mark.parametrize("number", [1, 2])
def test_a_decorated_test_has_its_parameters(number: int, tmp_path: Path) -> None:
    """pytest sees through the decorator."""
    assert (asked(observed()), tmp_path.exists(), number in (1, 2)) == (WEB, True, True)


@as_peer(WEB)
async def test_a_decorated_coroutine_is_awaited() -> None:
    """pytest-asyncio sees that it is one."""
    await asyncio.sleep(0)
    assert asked(observed()) == WEB


def test_a_fixture_may_say_who_calls(web: meshlib.Peer) -> None:
    """And answer who that is."""
    assert (asked(observed()), web.service) == (WEB, "web")


async def test_a_fixture_may_say_it_for_coroutines(web: meshlib.Peer) -> None:
    """The loop's tasks are begun in the fixture's context."""
    assert asked(observed()) == WEB


async def test_an_async_fixture_may_say_it(batch: str) -> None:
    """pytest-asyncio carries the context of its fixtures into the test."""
    assert asked(observed()) == batch


def test_without_the_import_nobody_is_asked() -> None:
    """Outside of tests there is nothing to declare a peer with: the faces find none."""
    code = "from meshlib.server import asgi, line, wsgi; print(line.declared); import meshlib.testing; print(type(line.declared).__name__)"
    done = subprocess.run([PYTHON, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["None", "ContextVar"]


def observed() -> Any:
    """What the faces would ask."""
    from meshlib.server import line

    return line


def asked(line: Any) -> str:
    peer = line.declared.get()
    return "" if peer is None else peer.spiffe_id
