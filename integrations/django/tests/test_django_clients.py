"""What do a project's own tests see? Django's Client and AsyncClient, sync and async views, without any server."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import django
import meshlib_django
import pytest
from asgiref.sync import iscoroutinefunction
from django.conf import settings
from django.core.exceptions import ImproperlyConfigured
from django.http import HttpRequest, HttpResponse, JsonResponse
from django.test import AsyncClient, AsyncRequestFactory, Client, RequestFactory, override_settings
from django.urls import path
from meshlib_django import mesh, peer_required

import meshlib
from meshlib.testing import as_peer
from tests.support import write_config

WEB = "spiffe://shop.internal/ns/default/sa/web"
SEEN: list[str] = []
FAILURE: list[Exception] = []


@peer_required
def show(request: HttpRequest, item: str) -> JsonResponse:
    """One item."""
    return JsonResponse({"item": item, "peer": request.peer.service})


@peer_required
async def show_later(request: HttpRequest, item: str) -> JsonResponse:
    return JsonResponse({"item": item, "peer": request.peer.service})


def public(request: HttpRequest, item: str) -> JsonResponse:
    return JsonResponse({"peer": request.peer and request.peer.service})


async def public_later(request: HttpRequest, item: str) -> JsonResponse:
    return JsonResponse({"peer": request.peer and request.peer.service})


def fail(request: HttpRequest, item: str) -> None:
    raise FAILURE[-1]


async def fail_later(request: HttpRequest, item: str) -> None:
    raise FAILURE[-1]


def slow(request: HttpRequest) -> HttpResponse:
    with meshlib.deadline(0.15), mesh().sync_client() as http:
        return HttpResponse(http.get("http://silent/").text)


async def slow_later(request: HttpRequest) -> HttpResponse:
    with meshlib.deadline(0.15):
        async with mesh().client() as http:
            return HttpResponse((await http.get("http://silent/")).text)


class Urls:
    urlpatterns = (
        path("items/<item>", show),
        path("items-later/<item>", show_later),
        path("open/<item>", public),
        path("open-later/<item>", public_later),
        path("call/<item>", fail),
        path("call-later/<item>", fail_later),
        path("slow", slow),
        path("slow-later", slow_later),
    )


class Plain:
    """A middleware of before Django 3.1, which knows no async."""

    def __init__(self, get_response: Any) -> None:
        self.get_response = get_response

    def __call__(self, request: HttpRequest) -> Any:
        SEEN.append(request.path)
        return self.get_response(request)

    def process_exception(self, request: HttpRequest, exception: Exception) -> HttpResponse | None:
        return HttpResponse("mine", status=418) if isinstance(exception, meshlib.NoRoute) else None


if not settings.configured:
    settings.configure(
        SECRET_KEY="x" * 50, ALLOWED_HOSTS=["testserver"], INSTALLED_APPS=["meshlib_django"], ROOT_URLCONF=Urls,
        MIDDLEWARE=["meshlib_django.MeshMiddleware"],
    )  # fmt: skip
    django.setup()

BETWEEN = ["meshlib_django.MeshMiddleware", f"{__name__}.Plain"]


@pytest.fixture
def in_mesh(tmp_path: Path) -> Iterator[meshlib.Mesh]:
    """Mode observe. `silent` takes connections and says nothing."""
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        services = {"shop": {}, "silent": {"discover": {"static": [f"127.0.0.1:{silent.getsockname()[1]}"]}}}
        with override_settings(MESH={"CONFIG": write_config(tmp_path, services), "SERVICE": "shop"}):
            yield mesh()


async def asked(way: str, where: str) -> Any:
    """Both clients, and both kinds of views: "sync", or "async"."""
    return await (asyncio.to_thread(Client().get, where) if way == "sync" else AsyncClient().get(where))


WAYS = pytest.mark.parametrize("way", ["sync", "async"])


@WAYS
@pytest.mark.parametrize("suffix", ["", "-later"])
async def test_a_test_may_say_who_calls(way: str, suffix: str) -> None:
    """With `as_peer`, as for every framework; by default its clients have proved nothing."""
    refused, found = await asked(way, f"/items{suffix}/7"), await asked(way, f"/open{suffix}/7")
    assert (refused.status_code, refused["www-authenticate"], found.json()) == (401, "mTLS", {"peer": None})
    with as_peer(WEB):
        assert (await asked(way, f"/items{suffix}/7")).json() == {"item": "7", "peer": "web"}
        assert (await asked(way, f"/open{suffix}/7")).json() == {"peer": "web"}
    assert (await asked(way, f"/items{suffix}/7")).status_code == 401


async def test_a_peer_is_in_no_header() -> None:
    """Nor in anything else that a client can send."""
    names = {"meshlib.peer": WEB, "X-Spiffe-Id": WEB, "Remote-User": WEB, "X-Forwarded-Client-Cert": f"URI={WEB}"}
    assert Client(headers=names).get("/items/7").status_code == 401
    assert (await AsyncClient(headers=names).get("/items/7")).status_code == 401
    # A server's word is an object, not a text.
    assert Client(**{"meshlib.peer": WEB}).get("/items/7").status_code == 401


async def test_peer_required_needs_no_middleware(caplog: pytest.LogCaptureFixture) -> None:
    """It looks for itself, and tells why nobody can be known where the mesh isn't around the application."""
    with as_peer(WEB):
        request = RequestFactory().get("/")
        request.peer = meshlib.Peer(WEB)
        assert show(request, "7").status_code == 200
        later = AsyncRequestFactory().get("/")
        later.peer = None
        assert (await show_later(later, "7")).status_code == 401
    with caplog.at_level(logging.WARNING, "meshlib_django"):
        assert show(RequestFactory().get("/x"), "7").status_code == 401
    assert "the mesh doesn't stand around this application" in caplog.text


def test_a_view_stays_what_it_is() -> None:
    """Its name, its text, and whether it is a coroutine function, which Django asks."""
    assert (show.__name__, show.__doc__) == ("show", "One item.")
    assert [iscoroutinefunction(show), iscoroutinefunction(show_later)] == [False, True]


@pytest.mark.parametrize("suffix", ["", "-later"])
@pytest.mark.parametrize(
    ("error", "status", "reason"),
    [
        (meshlib.DeadlineExceeded("secret"), 504, "upstream.timeout"),
        (meshlib.AttemptTimeout("secret"), 504, "upstream.timeout"),
        (meshlib.NoEndpoint("secret"), 503, "upstream.unavailable"),
        (meshlib.CircuitOpen("secret"), 503, "upstream.unavailable"),
        (meshlib.LimitExceeded("secret"), 503, "upstream.unavailable"),
        (meshlib.RateLimited("secret"), 503, "upstream.unavailable"),
        (meshlib.KeyFileError("secret"), 503, "upstream.unavailable"),
        (meshlib.Denied("secret", rule="secret"), 502, "upstream.failed"),
        (meshlib.UnknownService("secret"), 502, "upstream.failed"),
        (meshlib.NoRoute("secret"), 502, "upstream.failed"),
        (meshlib.ConnectionLost("secret"), 502, "upstream.failed"),
        (meshlib.PeerIdentityError("secret"), 502, "upstream.failed"),
    ],
)
async def test_each_error_has_its_answer(
    suffix: str, error: Exception, status: int, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A constant body, Retry-After where it passes by itself, and the text in the log only."""
    FAILURE.append(error)
    with caplog.at_level(logging.WARNING, "meshlib_django"):
        answer = await asked("async" if suffix else "sync", f"/call{suffix}/7")
    assert (answer.status_code, answer.json()["status"], answer.json()["reason"]) == (status, status, reason)
    assert ("retry-after" in answer.headers) is (status == 503)
    assert answer["content-type"] == "application/problem+json"
    assert "secret" not in answer.content.decode() + str(answer.headers)
    told = [record.getMessage() for record in caplog.records if record.name == "meshlib_django"]
    assert told == [f"{status} for /call{suffix}/<item>: {type(error).__name__}: secret"]


@WAYS
async def test_a_call_that_takes_too_long_is_a_gateway_timeout(in_mesh: meshlib.Mesh, way: str) -> None:
    """A real one, as httpx's user sees it."""
    answer = await asked(way, "/slow" if way == "sync" else "/slow-later")
    assert (answer.status_code, answer.json()["reason"]) == (504, "upstream.timeout")


@WAYS
async def test_what_is_no_failed_call_stays_an_error(way: str) -> None:
    """A mistake of our own is no bad gateway."""
    FAILURE.append(meshlib.ConfigError("secret"))
    with pytest.raises(meshlib.ConfigError):
        await asked(way, "/call/7")
    assert Client(raise_request_exception=False).get("/call/7").status_code == 500


@WAYS
@override_settings(MIDDLEWARE=BETWEEN)
async def test_other_middleware_goes_on_and_answers_first(way: str) -> None:
    """One that knows no async stands between, and has its own answer for an error."""
    SEEN.clear()
    FAILURE.append(meshlib.NoRoute("x"))
    mine = await asked(way, "/call-later/7")
    FAILURE.append(meshlib.ConnectionLost("x"))
    ours = await asked(way, "/call-later/7")
    with as_peer(WEB):
        found = await asked(way, "/items-later/7")
    assert (mine.status_code, ours.status_code, found.json()["peer"]) == (418, 502, "web")
    assert SEEN == ["/call-later/7", "/call-later/7", "/items-later/7"]


def test_all_of_a_process_share_one_mesh(in_mesh: meshlib.Mesh) -> None:
    """Also threads that ask at the same moment for the first time."""
    with override_settings(MESH=settings.MESH):
        gate, found = threading.Barrier(8), []

        def ask() -> None:
            gate.wait()
            found.append(mesh())

        threads = [threading.Thread(target=ask) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(set(map(id, found))) == 1
        assert (found[0] is in_mesh, found[0].service) == (False, "shop")


def test_other_settings_make_another_mesh(in_mesh: meshlib.Mesh, tmp_path: Path) -> None:
    """The environment says what they leave out."""
    with override_settings(MESH={"CONFIG": tmp_path / "mesh.yaml", "SERVICE": "silent"}):
        assert mesh().service == "silent"
    with pytest.MonkeyPatch.context() as patch, override_settings(MESH={"SERVICE": "shop"}):
        patch.setenv("MESHLIB_CONFIG", str(tmp_path / "mesh.yaml"))
        patch.setenv("MESHLIB_SERVICE", "silent")
        assert mesh().service == "shop"


@pytest.mark.parametrize("wrong", [{"FILE": "mesh.yaml"}, "mesh.yaml"])
def test_settings_that_cannot_be_used_are_told(wrong: Any) -> None:
    """As Django's own are."""
    with override_settings(MESH=wrong), pytest.raises(ImproperlyConfigured, match="MESH"):
        mesh()


async def test_the_lifespan_ends_the_mesh_and_reaches_no_django(in_mesh: meshlib.Mesh) -> None:
    """Django would raise for it. Another application inside has a lifespan of its own."""
    events = [{"type": "lifespan.startup"}, {"type": "lifespan.shutdown"}]
    sent: list[dict[str, Any]] = []
    seen = []

    async def receive() -> Any:
        return events.pop(0)

    async def send(message: Any) -> None:
        sent.append(message)

    await meshlib_django.get_asgi_application()({"type": "lifespan"}, receive, send)
    assert sent == [{"type": "lifespan.startup.complete"}, {"type": "lifespan.shutdown.complete"}]

    async def router(scope: Any, receive: Any, send: Any) -> None:
        seen.append(scope["type"])

    await meshlib_django.mesh_asgi(router)({"type": "lifespan"}, receive, send)
    assert seen == ["lifespan"]


def test_the_inbound_way_is_around_all_middleware(in_mesh: meshlib.Mesh) -> None:
    """What is refused reaches none; what is let in has the canonical path."""
    SEEN.clear()
    with override_settings(MIDDLEWARE=BETWEEN[::-1]):
        application = meshlib_django.get_wsgi_application()
        found = []

        def ask(where: str) -> bytes:
            environ = {**RequestFactory()._base_environ(), "HTTP_HOST": "testserver", "PATH_INFO": where, "RAW_URI": where}
            return b"".join(application(environ, lambda status, headers, *_: found.append(status)))

        assert json.loads(ask("/open/%00"))["reason"] == "secure.path"
        assert json.loads(ask("//open/7")) == {"peer": None}
        with as_peer(WEB):
            assert json.loads(ask("/items/7")) == {"item": "7", "peer": "web"}
    assert [status[:3] for status in found] == ["400", "200", "200"]
    assert SEEN == ["/open/7", "/items/7"]
