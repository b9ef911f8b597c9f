"""Is a session on the mesh a session of aiohttp? Everything that aiohttp documents, beside plain aiohttp, from the same server."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiohttp
import meshlib_aiohttp
import pytest

from integrations.aiohttp.tests.common import (
    HIDDEN,
    at,
    both,
    counted,
    settled,
)
from tests.support import (
    Request,
    Scripted,
    mesh_of,
    ok,
    scripted,
)


async def seen(answer: aiohttp.ClientResponse, base: str) -> dict[str, Any]:
    """All that aiohttp documents of a response, with the host's name taken out."""

    def short(url: Any) -> str:
        return str(url).removeprefix(base)

    found: dict[str, Any] = {
        "status": answer.status,
        "reason": answer.reason,
        "ok": answer.ok,
        "version": answer.version,
        "method": answer.method,
        "url": (short(answer.url), short(answer.real_url)),
        "headers": sorted((k.lower(), v) for k, v in answer.headers.items() if k.lower() not in HIDDEN),
        "raw": sorted((k.lower(), v) for k, v in answer.raw_headers if k.lower() != b"date"),
        "cookies": sorted(answer.cookies.output().splitlines()),
        "type": (answer.content_type, answer.charset, answer.content_disposition),
        "links": [(k, v["rel"], short(v["url"])) for k, v in answer.links.items()],
        "history": [(old.status, short(old.url), old.closed) for old in answer.history],
        "request": (
            answer.request_info.method,
            short(answer.request_info.url),
            sorted((k, v) for k, v in answer.request_info.headers.items() if k.lower() != "host" and "boundary" not in v),
        ),
        "body": await answer.read(),
        "again": await answer.read(),
        "text": await answer.text(errors="replace"),
        "end": (answer.content.at_eof(), answer.content.total_bytes, answer.closed, answer.connection),
    }
    try:
        found["json"] = await answer.json()
    except aiohttp.ContentTypeError as error:
        found["json"] = (error.status, error.message)
    try:
        answer.raise_for_status()
    except aiohttp.ClientResponseError as error:
        found["raised"] = (error.status, error.message)
    return found


def form() -> aiohttp.FormData:
    made = aiohttp.FormData({"k": "v"})
    made.add_field("f", io.BytesIO(b"in memory" * 10_000), filename="n.bin", content_type="x/y")
    return made


REQUESTS: list[tuple[str, str, Callable[[], dict[str, Any]]]] = [
    ("GET", "/items/7", dict),
    (
        "GET",
        "/items/7?a=1#part",
        lambda: {"params": {"q": "x y", "u": "ü"}, "headers": {"X-Mine": "mine", "Accept": "text/plain"}},
    ),
    ("GET", "/odd/%2F%7e;p=1/[x]|{y}'\"?z=%5B^`", dict),
    ("HEAD", "/big", dict),
    ("OPTIONS", "/items", dict),
    ("DELETE", "/items/7", dict),
    ("POST", "/items", dict),
    ("POST", "/items", lambda: {"json": {"n": [1, 2, None]}}),
    ("POST", "/items", lambda: {"data": {"a": "ü", "b": "1"}}),
    ("POST", "/items", lambda: {"data": "text ü"}),
    ("PUT", "/items", lambda: {"data": b"\x00" * 900_000}),
    ("PUT", "/items", lambda: {"data": io.BytesIO(b"file " * 100_000)}),
    ("POST", "/items", lambda: {"data": form()}),
    ("POST", "/items", lambda: {"data": counted(100)}),
    ("POST", "/items", lambda: {"data": b"packed " * 1000, "compress": "gzip"}),
    ("POST", "/items", lambda: {"data": b"later", "expect100": True}),
    ("POST", "/items", lambda: {"data": counted(3), "expect100": True}),
    ("GET", "/status/404", dict),
    ("GET", "/status/503", dict),
    ("GET", "/nothing", dict),
    ("GET", "/packed/gzip", dict),
    ("GET", "/packed/deflate", dict),
    ("GET", "/packed/gzip", lambda: {"auto_decompress": False}),
    ("GET", "/chunks", dict),
    ("GET", "/big", dict),
    ("GET", "/typed/latin-1", dict),
    ("GET", "/typed/utf-16", dict),
    ("GET", "/cookies", lambda: {"cookies": {"mine": "1"}}),
    ("GET", "/cookies", lambda: {"allow_redirects": False}),
    ("GET", "/go/301?to=/items", dict),
    ("POST", "/go/302?to=/items", lambda: {"data": "x"}),
    ("POST", "/go/303?to=/items", lambda: {"data": "x"}),
    ("PUT", "/go/307?to=/go/308?to=/items", lambda: {"data": b"x" * 1000}),
    ("HEAD", "/go/302?to=/items", dict),
    ("GET", "/items", lambda: {"headers": {"Authorization": "Basic bWU6c2VjcmV0"}}),
    ("GET", "/items", lambda: {"timeout": aiohttp.ClientTimeout(total=20, sock_connect=2, sock_read=10)}),
]


@pytest.mark.parametrize(("method", "path", "options"), REQUESTS, ids=[f"{n} {m} {p}" for n, (m, p, _) in enumerate(REQUESTS)])
async def test_a_response_is_what_plain_aiohttp_gives(
    tmp_path: Path, method: str, path: str, options: Callable[[], dict[str, Any]]
) -> None:
    """Every documented attribute, from the same server."""

    async def do(http: aiohttp.ClientSession, base: str) -> Any:
        async with http.request(method, base + path, **options()) as answer:
            return await seen(answer, base)

    async with both(tmp_path) as compare:
        plain, ours = await compare(do)
    assert ours == plain


async def test_cookies_of_the_session_come_back(tmp_path: Path) -> None:
    """Set by headers of one answer, kept in the session's jar, and sent where they belong."""

    async def do(http: aiohttp.ClientSession, base: str) -> Any:
        await http.get(base + "/cookies")
        sent = []
        for path in ("/echo", "/else"):
            async with http.get(base + path) as answer:
                sent.append(sorted(dict((await answer.json())["headers"]).get("cookie", "").split("; ")))
        return sorted(cookie.key for cookie in http.cookie_jar), sent

    async with both(tmp_path) as compare:
        plain, ours = await compare(do)
    assert ours == plain == (["a", "b"], [["a=1", "b=two"], ["a=1"]])


async def test_a_body_can_be_read_as_it_comes(tmp_path: Path) -> None:
    """All ways of the StreamReader, early ends, and errors of the decoding."""

    async def do(http: aiohttp.ClientSession, base: str) -> list[Any]:
        found: list[Any] = []
        async with http.get(base + "/big") as answer:
            found += [
                await answer.content.read(10),
                await answer.content.readexactly(300_000) == (bytes(range(256)) * 4096)[10:300_010],
            ]
            found += [answer.closed, answer.connection is None]
        found.append(answer.closed)
        async with http.get(base + "/big") as answer:
            found.append(sum([len(piece) async for piece in answer.content.iter_chunked(1000)]))
        async with http.get(base + "/chunks") as answer:
            found.append([line async for line in answer.content])
        async with http.get(base + "/chunks") as answer:
            found.append([await answer.content.readline(), await answer.content.readuntil(b"1\n"), await answer.content.read()])
        async with http.get(base + "/chunks") as answer:
            # The chunks of the wire are not kept, what is in them is.
            found.append(b"".join([piece async for piece, _ in answer.content.iter_chunks()]))
        async with http.get(base + "/packed/broken") as answer:
            with pytest.raises(aiohttp.ClientPayloadError):
                await answer.read()
        answer = await http.get(base + "/big")
        answer.close()
        with pytest.raises(aiohttp.ClientConnectionError):
            await answer.read()
        found.append((answer.closed, answer.connection))
        return found

    async with both(tmp_path) as compare:
        plain, ours = await compare(do)
    assert ours == plain


async def test_traces_middlewares_and_upload_trackers_see_a_call(tmp_path: Path) -> None:
    """What watches a session watches it still."""
    events: list[str] = []
    trace = aiohttp.TraceConfig()
    for name in ("request_start", "request_headers_sent", "request_chunk_sent", "request_end", "request_redirect"):

        async def note(session: Any, context: Any, params: Any, name: str = name) -> None:
            events.append(name)

        getattr(trace, "on_" + name).append(note)

    async def twice(request: aiohttp.ClientRequest, handler: Any) -> aiohttp.ClientResponse:
        first = await handler(request)
        events.append(f"middleware {first.status}")
        first.release()
        answer: aiohttp.ClientResponse = await handler(request)
        return answer

    async def do(http: aiohttp.ClientSession, base: str) -> list[str]:
        events.clear()
        async with http.post(base + "/go/307?to=/items", data=b"x") as answer:
            assert answer.status == 200
        return list(events)

    async with both(tmp_path, trace_configs=[trace], middlewares=[twice]) as compare:
        plain, ours = await compare(do)
    assert ours == plain
    assert "middleware 307" in ours


async def test_timeouts_of_aiohttp_are_aiohttps_own(tmp_path: Path) -> None:
    """`total` and `sock_read` raise what they always raised, and leave no call behind."""
    release = asyncio.Event()

    async def slow(server: Scripted, request: Request) -> bytes:
        if request.target == "/body":
            return b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nhalf"
        await release.wait()
        return ok()

    async def do(http: aiohttp.ClientSession, base: str) -> list[Any]:
        found = []
        for timeout in (aiohttp.ClientTimeout(total=0.05), aiohttp.ClientTimeout(sock_read=0.05)):
            for path in ("/head", "/body"):
                with pytest.raises(TimeoutError) as caught:
                    async with http.post(base + path, timeout=timeout) as answer:
                        await answer.read()
                found.append(isinstance(caught.value, aiohttp.ServerTimeoutError))
        return found

    async with scripted(slow) as server:
        with mesh_of(tmp_path, at(server)) as mesh:
            async with aiohttp.ClientSession() as plain, meshlib_aiohttp.session(mesh) as ours:
                expected, found = await do(plain, f"http://{server.address}"), await do(ours, "http://orders")
                # A total is told to the mesh too, which may be first to say so.
                assert found[2:] == expected[2:] == [True, True]
                assert await settled(mesh)
        release.set()


async def test_a_websocket_goes_to_a_service(tmp_path: Path) -> None:
    """Text, bytes, a large message, pings, subprotocols, compression, and closing from either side."""

    async def do(http: aiohttp.ClientSession, base: str) -> list[Any]:
        found: list[Any] = []
        async with http.ws_connect(base + "/talk", protocols=("chat",), compress=15, heartbeat=5, max_msg_size=0) as socket:
            await socket.send_str("hello")
            found += [await socket.receive_str(), socket.protocol, socket.compress]
            await socket.send_bytes(b"x" * 2_000_000)
            found.append(len(await socket.receive_bytes()))
            await socket.ping(b"are you there?")
            await socket.send_str("bye")
            found += [message.data async for message in socket]
            found += [socket.close_code, socket.closed]
        socket = await http.ws_connect(base + "/talk")
        found += [await socket.close(), socket.close_code]
        with pytest.raises(aiohttp.WSServerHandshakeError) as caught:
            await http.ws_connect(base + "/items")
        return [*found, caught.value.status]

    async with both(tmp_path) as compare:
        plain, ours = await compare(do)
    assert ours == plain
