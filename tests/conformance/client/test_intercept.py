"""Are mesh clients intercepted as plain ones are? respx, pytest-httpx and MockTransport, on both clients, both transports, both paths."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import httpx2
import pytest
import respx
from respx.mocks import HTTPCoreMocker

import meshlib
from meshlib.client.http import faces
from meshlib.client.intercept import interception
from tests.support import free_port, mesh_of


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[meshlib.Mesh]:
    """Its one service can't be reached, so that every answer comes from an interceptor."""
    dead = {"discover": {"static": [f"127.0.0.1:{free_port()}"]}}
    with mesh_of(tmp_path, {"orders": dead}) as mesh:
        yield mesh


async def asked(mesh: meshlib.Mesh, kind: str, method: str, url: str, **options: Any) -> httpx.Response:
    if kind == "client":
        async with mesh.client() as http:
            return await http.request(method, url, **options)
    if kind == "transport":
        async with httpx.AsyncClient(transport=mesh.transport()) as http:
            return await http.request(method, url, **options)
    if kind == "sync client":
        with mesh.sync_client() as http:
            return http.request(method, url, **options)
    with httpx.Client(transport=mesh.sync_transport()) as http:
        return http.request(method, url, **options)


KINDS = ("client", "transport", "sync client", "sync transport")
URLS = ("http://orders/items/7?q=1", "http://undeclared/x", "https://outside.example/x")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("url", URLS)
async def test_respx_answers_in_the_place_of_the_mesh(mesh: meshlib.Mesh, kind: str, url: str) -> None:
    """Its default mocker replaces methods of httpcore."""
    with respx.mock() as router:
        route = router.post(url).mock(return_value=httpx.Response(201, json={"a": 1}, headers={"x-b": "2"}))
        answer = await asked(mesh, kind, "POST", url, json={"n": 1})
    assert (answer.status_code, answer.json(), answer.headers["x-b"]) == (201, {"a": 1}, "2")
    assert [call.request.content for call in route.calls] == [b'{"n":1}']


@pytest.mark.parametrize("kind", ["client", "sync client"])
async def test_respx_s_other_mocker_answers_too(mesh: meshlib.Mesh, kind: str) -> None:
    """It replaces a method of httpx's clients, so that a bare transport isn't its affair."""
    with respx.mock(using="httpx") as router:
        router.get("http://orders/items/7").respond(202)
        assert (await asked(mesh, kind, "GET", "http://orders/items/7")).status_code == 202


async def test_respx_s_side_effects_and_patterns_are_its_own(mesh: meshlib.Mesh) -> None:
    """Errors and unmatched requests are told as for a plain client."""
    with respx.mock() as router:
        router.get("http://orders/slow").mock(side_effect=httpx.ReadTimeout)
        router.get(path__regex=r"^/items/\d+$").respond(text="an item")
        async with mesh.client() as http:
            with pytest.raises(httpx.ReadTimeout):
                await http.get("http://orders/slow")
            assert (await http.get("http://orders/items/9")).text == "an item"
            with pytest.raises(respx.models.AllMockedAssertionError):
                await http.get("http://orders/other")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("url", URLS)
async def test_pytest_httpx_answers_in_the_place_of_the_mesh(mesh: meshlib.Mesh, httpx_mock: Any, kind: str, url: str) -> None:
    """Its fixture replaces methods of httpx's transports."""
    httpx_mock.add_response(method="PUT", url=url, json=[1], status_code=202)
    answer = await asked(mesh, kind, "PUT", url, content=b"x")
    assert (answer.status_code, answer.json()) == (202, [1])
    assert httpx_mock.get_request().read() == b"x"


@pytest.mark.parametrize("kind", KINDS)
async def test_what_respx_lets_pass_ends_in_the_mesh(tmp_path: Path, kind: str, shop: Any) -> None:
    """A plain client's request would go to the network; that of a mesh client goes to the service's endpoint, body and all."""
    with mesh_of(tmp_path, {"orders": {"discover": {"static": [shop.address]}}}) as mesh:
        for using in ("httpcore", "httpx"):
            with respx.mock(using=using, assert_all_called=False) as router:
                router.route(host="orders").pass_through()
                answer = await asked(mesh, kind, "POST", "http://orders/echo", content=b"through")
            assert (answer.status_code, answer.content) == (200, b"through"), using
            assert answer.extensions["meshlib.call"].service == "orders"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.httpx_mock(should_mock=lambda request: request.url.host != "orders")
async def test_what_pytest_httpx_lets_pass_ends_in_the_mesh(tmp_path: Path, httpx_mock: Any, kind: str, shop: Any) -> None:
    """The same for its `should_mock`, and for a body in pieces."""
    with mesh_of(tmp_path, {"orders": {"discover": {"static": [shop.address]}}}) as mesh:
        answer = await asked(mesh, kind, "POST", "http://orders/echo", content=b"through")
        assert answer.content == b"through"
        assert httpx_mock.get_requests() == []


@pytest.mark.parametrize("kind", KINDS)
async def test_a_tracer_that_wraps_the_transport_sees_calls_and_changes_nothing(
    tmp_path: Path, kind: str, shop: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tracers wrap the methods that mockers replace; the request is still the mesh's, with its errors."""
    seen: list[str] = []
    sync_send, async_send = httpx.HTTPTransport.handle_request, httpx.AsyncHTTPTransport.handle_async_request

    def traced(self: Any, request: httpx.Request) -> httpx.Response:
        seen.append(str(request.url))
        return sync_send(self, request)

    async def async_traced(self: Any, request: httpx.Request) -> httpx.Response:
        seen.append(str(request.url))
        return await async_send(self, request)

    monkeypatch.setattr(httpx.HTTPTransport, "handle_request", traced)
    monkeypatch.setattr(httpx.AsyncHTTPTransport, "handle_async_request", async_traced)
    gone = {"discover": {"static": [f"127.0.0.1:{free_port()}"]}}
    with mesh_of(tmp_path, {"orders": {"discover": {"static": [shop.address]}}, "gone": gone}) as mesh:
        assert (await asked(mesh, kind, "GET", "http://orders/bytes/3000000")).num_bytes_downloaded == 3000000
        with pytest.raises(meshlib.ConnectFailed) as caught:
            await asked(mesh, kind, "GET", "http://gone/")
        assert isinstance(caught.value, httpx.ConnectError) and str(caught.value.request.url) == "http://gone/"
        with pytest.raises(meshlib.UnknownService):
            await asked(mesh, kind, "GET", "http://undeclared/")
        assert sum(row["in_flight"] for row in mesh.engine.stats(0.0)) == 0
    assert seen == ["http://orders/bytes/3000000", "http://gone/", "http://undeclared/"]


@pytest.mark.parametrize("name", ["get", "request", "send"])
async def test_a_replaced_method_of_the_client_is_called(mesh: meshlib.Mesh, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`mock.patch("httpx.AsyncClient.get")` is what many tests do."""
    async with mesh.client() as http:
        with pytest.raises(httpx.ConnectError):
            await http.get("http://orders/")

        async def fake(self: Any, *given: Any, **options: Any) -> httpx.Response:
            return httpx.Response(299, request=httpx.Request("GET", "http://orders/"))

        monkeypatch.setattr(httpx.AsyncClient, name, fake)
        assert (await http.get("http://orders/")).status_code == 299
    monkeypatch.undo()
    with mesh.sync_client() as blocking:
        monkeypatch.setattr(
            httpx.Client, name, lambda self, *given, **options: httpx.Response(298, request=httpx.Request("GET", "x:"))
        )
        assert blocking.get("http://orders/").status_code == 298


@pytest.mark.parametrize("module", [httpx, httpx2], ids=lambda m: m.__name__)
async def test_a_transport_of_the_user_s_replaces_the_mesh(mesh: meshlib.Mesh, module: Any) -> None:
    """As httpx documents: every request goes there, services too."""

    def handler(request: Any) -> Any:
        return module.Response(200, json={"host": request.url.host, "body": request.read().decode()})

    async with mesh.client(httpx=module, transport=module.MockTransport(handler)) as http:
        assert (await http.post("http://orders/", content="x")).json() == {"host": "orders", "body": "x"}
        assert isinstance(http, module.AsyncClient)
    with mesh.sync_client(httpx=module, transport=module.MockTransport(handler)) as http:
        assert http.get("http://outside.example/").json() == {"host": "outside.example", "body": ""}
    with mesh.sync_client(httpx=module, mounts={"http://orders": module.MockTransport(handler)}) as http:
        assert http.get("http://orders/").json() == {"host": "orders", "body": ""}
    with mesh.sync_client(httpx=module) as http:
        http._transport = module.MockTransport(handler)
        assert http.get("http://orders/").json() == {"host": "orders", "body": ""}


@pytest.mark.parametrize("module", [httpx, httpx2], ids=lambda m: m.__name__)
def test_the_watch_sees_every_change_and_its_end(module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each method that an interceptor may replace, for as long as it is replaced."""
    is_intercepted = faces(module).is_intercepted
    core = HTTPCoreMocker.targets if module is httpx else []
    assert not is_intercepted()
    for kind, name in [
        (module.AsyncHTTPTransport, "handle_async_request"),
        (module.HTTPTransport, "handle_request"),
        *[(kind, name) for kind in (module.AsyncClient, module.Client) for name in ("send", "build_request", "request", "get", "_transport_for_url")],
    ]:  # fmt: skip
        with monkeypatch.context() as patch:
            patch.setattr(kind, name, lambda *given: None)
            assert [is_intercepted() for _ in range(3)] == [True] * 3, (kind, name)
        assert [is_intercepted() for _ in range(3)] == [False] * 3, (kind, name)
    if core:
        with respx.mock():
            assert is_intercepted()
        assert not is_intercepted()


def test_a_watch_that_begins_late_is_not_fooled(httpx_mock: Any) -> None:
    """The first client may be made while a mock is in force: nothing is taken for httpx's own because it was there first."""
    late = interception(httpx)
    assert (late.is_intercepted(), late.is_diverted()) == (True, True)
