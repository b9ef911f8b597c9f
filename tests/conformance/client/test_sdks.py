"""Do the official packages of openai and stripe run on a mesh client? Against stand-ins of their services, with their streaming.

openai takes any client of httpx or httpx2. stripe makes its clients itself, by a module that it can be given.

Their retries and the mesh's add up and don't multiply. The SDKs that are made with Stainless (openai among them) say in each request which
attempt it is: the mesh tries again for their first, and leaves the rest to them. stripe doesn't say; where a Service stands in for it,
the mesh's own retries are switched off for its client, by an event hook.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import httpx2
import openai
import pytest
import stripe

import meshlib
from tests.support import Request, mesh_of, ok

COMPLETION = {
    "id": "c1", "object": "chat.completion", "created": 1, "model": "m", "usage": None,
    "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "hello"}}],
}  # fmt: skip


# stripe sends its forms as `data=`.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


class Stand:
    """A service that speaks one of the APIs, with what it saw."""

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.failures = 0
        self.go_on = asyncio.Event()
        self.address = ""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.CancelledError):
            while request := await Request.read(reader):
                self.requests.append(request)
                if self.failures:
                    self.failures -= 1
                    writer.write(b"HTTP/1.1 503 Busy\r\nretry-after-ms: 1\r\ncontent-length: 2\r\n\r\n{}")
                elif request.body and b'"stream":true' in request.body:
                    await self.stream(writer)
                else:
                    writer.write(ok(json.dumps(self.answer(request)).encode(), "content-type: application/json"))
                await writer.drain()
        writer.close()

    def answer(self, request: Request) -> Any:
        if request.target.startswith("/v1/customers"):
            return {"id": "cus_1", "object": "customer", "email": "a@b.c", "asked": request.body.decode()}
        if request.target.startswith("/v1/models"):
            return {"object": "list", "data": [{"id": "m", "object": "model", "created": 1, "owned_by": "me"}]}
        return COMPLETION

    async def stream(self, writer: asyncio.StreamWriter) -> None:
        """The second word comes when the first has been seen: nothing may be held back."""
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")
        for n, word in enumerate(("one", "two")):
            if n:
                await self.go_on.wait()
            chunk = {
                "id": "c",
                "object": "chat.completion.chunk",
                "created": 1,
                "model": "m",
                "choices": [{"index": 0, "delta": {"content": word}}],
            }
            data = b"data: %s\n\n" % json.dumps(chunk).encode()
            writer.write(b"%x\r\n%b\r\n" % (len(data), data))
            await writer.drain()
        writer.write(b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n")


@pytest.fixture
async def stand() -> AsyncIterator[Stand]:
    made = Stand()
    server = await asyncio.start_server(made.serve, "127.0.0.1", 0)
    made.address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield made
    finally:
        server.close()


@pytest.fixture
def mesh(tmp_path: Path, stand: Stand) -> Iterator[meshlib.Mesh]:
    with mesh_of(
        tmp_path, {"brain": {"discover": {"static": [stand.address]}}, "till": {"discover": {"static": [stand.address]}}}
    ) as mesh:
        yield mesh


MODULES = pytest.mark.parametrize("module", [httpx, httpx2], ids=lambda m: m.__name__)
# By the name of a service, and by an address outside the mesh.
BASES = pytest.mark.parametrize("is_service", [True, False], ids=["service", "egress"])
ASKED: Any = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}


@MODULES
@BASES
async def test_openai_answers_streams_and_lists(mesh: meshlib.Mesh, stand: Stand, module: Any, is_service: bool) -> None:
    """The asynchronous client."""
    base = "http://brain/v1" if is_service else f"http://{stand.address}/v1"
    async with mesh.client(httpx=module) as http:
        client = openai.AsyncOpenAI(api_key="k", base_url=base, http_client=http)
        assert (await client.chat.completions.create(**ASKED)).choices[0].message.content == "hello"
        assert [model.id async for model in client.models.list()] == ["m"]
        words = []
        async for chunk in await client.chat.completions.create(**ASKED, stream=True):
            words.append(chunk.choices[0].delta.content)
            stand.go_on.set()
    assert words == ["one", "two"]
    assert ("traceparent" in stand.requests[0].headers) == is_service
    assert stand.requests[0].headers["authorization"] == "Bearer k"


@MODULES
@BASES
async def test_blocking_openai_answers_and_streams(mesh: meshlib.Mesh, stand: Stand, module: Any, is_service: bool) -> None:
    """The same for threads."""
    base = "http://brain/v1" if is_service else f"http://{stand.address}/v1"
    loop = asyncio.get_running_loop()

    def work() -> Any:
        with mesh.sync_client(httpx=module) as http:
            client = openai.OpenAI(api_key="k", base_url=base, http_client=http)
            said = client.chat.completions.create(**ASKED).choices[0].message.content
            words = []
            for chunk in client.chat.completions.create(**ASKED, stream=True):
                words.append(chunk.choices[0].delta.content)
                loop.call_soon_threadsafe(stand.go_on.set)
            return said, words

    assert await asyncio.to_thread(work) == ("hello", ["one", "two"])


async def test_openai_s_errors_are_its_own(mesh: meshlib.Mesh, stand: Stand) -> None:
    """By status, and for a service that can't be reached, with our reason as the cause."""
    async with mesh.client() as http:
        client = openai.AsyncOpenAI(api_key="k", base_url="http://brain/v1", http_client=http, max_retries=0)
        stand.failures = 2
        with pytest.raises(openai.InternalServerError):
            await client.chat.completions.create(**ASKED)
        stand.failures = 0
        gone = openai.AsyncOpenAI(api_key="k", base_url="http://undeclared/v1", http_client=http, max_retries=0)
        with pytest.raises(openai.APIConnectionError) as caught:
            await gone.models.list()
        assert isinstance(caught.value.__cause__, meshlib.UnknownService)
        with meshlib.deadline(1e-6), pytest.raises(openai.APITimeoutError) as late:
            await client.models.list()
        assert isinstance(late.value.__cause__, meshlib.DeadlineExceeded)


async def test_openai_s_retries_and_ours_add_up(mesh: meshlib.Mesh, stand: Stand) -> None:
    """A GET may be sent again by both: once by the mesh for the first attempt, then by the SDK alone. Two and two, not two by three."""
    async with mesh.client() as http:
        client = openai.AsyncOpenAI(api_key="k", base_url="http://brain/v1", http_client=http, max_retries=2)
        stand.failures = 100
        with pytest.raises(openai.InternalServerError):
            await client.models.list()
        tries = [(r.headers["x-stainless-retry-count"], r.headers.get("x-mesh-attempt")) for r in stand.requests]
        assert [count for count, _ in tries] == ["0", "0", "1", "2"]
        stand.requests.clear()
        with pytest.raises(openai.InternalServerError):
            await client.chat.completions.create(**ASKED)
        assert [r.headers["x-stainless-retry-count"] for r in stand.requests] == ["0", "1", "2"]  # a POST is the SDK's only
        stand.requests.clear()
        outside = openai.AsyncOpenAI(api_key="k", base_url=f"http://{stand.address}/v1", http_client=http, max_retries=2)
        with pytest.raises(openai.InternalServerError):
            await outside.models.list()
        assert [r.headers["x-stainless-retry-count"] for r in stand.requests] == ["0", "1", "2"]


async def test_openai_keeps_its_own_timeouts(mesh: meshlib.Mesh) -> None:
    """A client for which no timeout was given looks like one: the SDK then brings its own, and doesn't wait for ever."""
    async with mesh.client() as http:
        assert openai.AsyncOpenAI(api_key="k", http_client=http).timeout == openai.DEFAULT_TIMEOUT
    async with mesh.client(timeout=7) as http:
        assert openai.AsyncOpenAI(api_key="k", http_client=http).timeout == httpx2.Timeout(7)


def tills(mesh: meshlib.Mesh, base: str, **options: Any) -> stripe.StripeClient:
    lib = SimpleNamespace(
        AsyncClient=lambda **more: mesh.client(**more, **options.get("asynchronous", {})),
        Client=lambda **more: mesh.sync_client(**more, **options.get("blocking", {})),
    )
    http = stripe.HTTPXClient(allow_sync_methods=True, _lib=lib)
    return stripe.StripeClient("sk_test", http_client=http, base_addresses={"api": base}, max_network_retries=2)


@BASES
async def test_stripe_answers_on_both_of_its_ways(mesh: meshlib.Mesh, stand: Stand, is_service: bool) -> None:
    """Its forms, its key and its idempotency key arrive; what comes back are its objects."""
    client = tills(mesh, "http://till" if is_service else f"http://{stand.address}")
    made = await client.v1.customers.create_async({"email": "a@b.c"})
    assert (made.id, made.email, made["asked"]) == ("cus_1", "a@b.c", "email=a%40b.c")
    assert (await asyncio.to_thread(client.v1.customers.retrieve, "cus_1")).id == "cus_1"
    first = stand.requests[0].headers
    assert (first["authorization"], "idempotency-key" in first) == ("Bearer sk_test", True)


async def test_stripe_s_errors_and_retries_are_its_own(mesh: meshlib.Mesh, stand: Stand, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the mesh's switched off for its client, a GET is sent as often as stripe says, and its keys stay the same."""
    monkeypatch.setattr(stripe.HTTPXClient, "sleep_async", lambda self, seconds: asyncio.sleep(0))

    async def once(request: httpx.Request) -> None:
        request.extensions.update(meshlib.policy(retries=0))

    client = tills(mesh, "http://till", asynchronous={"event_hooks": {"request": [once]}})
    stand.failures = 100
    for ask in (client.v1.customers.retrieve_async("cus_1"), client.v1.customers.create_async({"email": "x"})):
        stand.requests.clear()
        with pytest.raises(stripe.StripeError):
            await ask
        assert len(stand.requests) == 3
    assert len({r.headers["idempotency-key"] for r in stand.requests}) == 1
    gone = tills(mesh, "http://undeclared")
    with pytest.raises(stripe.APIConnectionError) as caught:
        await gone.v1.customers.retrieve_async("cus_1")
    assert isinstance(caught.value.__cause__, meshlib.UnknownService)
