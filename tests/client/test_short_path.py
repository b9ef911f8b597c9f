"""Is the short path httpx, to the letter? The same requests through the full path and the short one, compared on both ends.

What the server received must be equal, and what the caller got back too, over the whole product of methods, bodies, headers, URLs and
kinds of answers. Where the short path is not taken the comparison is trivially true: a last test shows where it must be.
"""

from __future__ import annotations

import copy
import gzip
import itertools
import pickle
from pathlib import Path
from typing import Any

import httpx
import pytest

from meshlib.client.short import KNOWN
from tests.support import Request, Scripted, mesh_of, scripted

ANSWERS = {
    "ok": b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 8\r\n\r\n" + b'{"a": 1}',
    "empty": b"HTTP/1.1 204 No Content\r\n\r\n",
    "unchanged": b"HTTP/1.1 304 Not Modified\r\netag: x\r\n\r\n",
    "missing": b"HTTP/1.1 404 Nowhere To Be Found\r\ncontent-length: 4\r\n\r\ngone",
    "broken": b"HTTP/1.1 500 \r\ncontent-length: 0\r\n\r\n",
    "moved": b"HTTP/1.1 302 Found\r\nlocation: /elsewhere?x=1\r\ncontent-length: 0\r\n\r\n",
    "chunked": b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n",
    "latin": "HTTP/1.1 200 OK\r\ncontent-type: text/plain; charset=latin-1\r\ncontent-length: 1\r\n\r\né".encode("latin-1"),
    "zipped": b"HTTP/1.1 200 OK\r\ncontent-encoding: gzip\r\ncontent-length: %d\r\n\r\n%b"
    % (len(gzip.compress(b"zipped", mtime=0)), gzip.compress(b"zipped", mtime=0)),
    "several": b"HTTP/1.1 200 OK\r\nx-a: 1\r\nx-a: 2\r\nvary: *\r\ncontent-length: 0\r\n\r\n",
}
BODIES: list[dict[str, Any]] = [
    {},
    {"json": {"n": [1, "ä", None]}},
    {"json": []},
    {"content": b"bytes"},
    {"content": "text ä"},
    {"content": b""},
    {"data": {"form": "1"}},
    {"files": {"f": ("name", b"x", "text/plain")}},
]
HEADERS: list[Any] = [
    None,
    {},
    {"X-Own": "1"},
    {"accept": "text/plain"},
    {"Content-Type": "x/y"},
    [("x-a", "1"), ("x-a", "2")],
    {"Host": "other"},
]
URLS = [
    "http://orders",
    "http://orders/",
    "http://orders/items/7?q=a&r=1",
    "http://orders:80/x",
    "http://orders/a b/ä?q=ü#part",
    "http://ORDERS/up",
]
METHODS = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "get"]


async def answer(server: Scripted, request: Request) -> bytes:
    name = request.headers.get("x-answer", "ok")
    out = ANSWERS[name]
    return out.split(b"\r\n\r\n")[0] + b"\r\n\r\n" if request.method == "HEAD" else out


def seen(request: Request) -> Any:
    own = {"x-mesh-deadline-ms", "traceparent"}
    headers = {n: v for n, v in request.headers.items() if n not in own}
    if "boundary=" in headers.get("content-type", ""):
        headers["content-type"] = headers["content-type"].split("boundary=")[0]
        return (request.method, request.target, headers, len(request.body))
    return (request.method, request.target, headers, request.body)


def told(response: httpx.Response) -> Any:
    request = response.request
    return {
        "status": response.status_code,
        "reason": response.reason_phrase,
        "version": response.http_version,
        "headers": response.headers.multi_items(),
        "content": response.content,
        "text": response.text,
        "encoding": response.encoding,
        "is_closed": (response.is_closed, response.is_stream_consumed),
        "history": response.history,
        "next": response.next_request and (response.next_request.method, str(response.next_request.url)),
        "url": str(response.url),
        "request": (
            request.method,
            str(request.url),
            request.headers.multi_items() if not request.headers.get("content-type", "").startswith("multipart") else None,
        ),
        "cookies": dict(response.cookies),
        "downloaded": response.num_bytes_downloaded,
        "redirect": (response.is_redirect, response.has_redirect_location),
        "repr": repr(response),
        "links": response.links,
        "elapsed": response.elapsed.total_seconds() > 0,
    }


def space() -> list[tuple[str, str, dict[str, Any], Any]]:
    cases = list(itertools.product(METHODS, URLS, BODIES[:1], HEADERS))
    cases += itertools.product(["POST", "PUT", "GET"], URLS[2:4], BODIES, HEADERS[:4])
    return cases


async def test_both_paths_send_and_return_the_same(tmp_path: Path) -> None:
    """Over methods, URLs, bodies and headers."""
    async with scripted(answer) as server:
        with mesh_of(tmp_path, {"orders": {"discover": {"static": [server.address]}}}) as mesh:
            full = httpx.AsyncClient(transport=mesh.transport(), timeout=None, trust_env=False)
            async with full, mesh.client() as short:
                for method, url, body, headers in space():
                    results = []
                    for client in (full, short):
                        server.requests.clear()
                        response = await client.request(method, url, headers=copy.copy(headers), **body)
                        results.append((seen(server.requests[0]), told(response)))
                    assert results[0] == results[1], (method, url, body, headers)


@pytest.mark.parametrize("kind", ANSWERS)
async def test_both_paths_understand_an_answer_the_same_way(tmp_path: Path, kind: str) -> None:
    """Over the kinds of answers, with and without redirects followed."""
    async with scripted(answer) as server:
        with mesh_of(tmp_path, {"orders": {"discover": {"static": [server.address]}}}) as mesh:
            full = httpx.AsyncClient(transport=mesh.transport(), timeout=None, trust_env=False)
            async with full, mesh.client() as short:
                for method, options in itertools.product(
                    ("GET", "HEAD", "POST"), ({}, {"timeout": 3}, {"timeout": httpx.Timeout(2)})
                ):
                    both = [
                        told(await client.request(method, "http://orders/x", headers={"X-Answer": kind}, **options))
                        for client in (full, short)
                    ]
                    assert both[0] == both[1]


async def test_cookies_follow_redirects_auth_and_hooks_keep_working(tmp_path: Path) -> None:
    """The rarer features take httpx's own path; a cookie that was set by a short answer is sent with the next request."""
    script = iter(
        [
            b"HTTP/1.1 200 OK\r\nset-cookie: s=1; Path=/\r\ncontent-length: 0\r\n\r\n",
            b"HTTP/1.1 302 Found\r\nlocation: /two\r\ncontent-length: 0\r\n\r\n",
            *[b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n"] * 3,
        ]
    )

    async def next_answer(server: Scripted, request: Request) -> bytes:
        return next(script)

    async with scripted(next_answer) as server:
        with mesh_of(tmp_path, {"orders": {"discover": {"static": [server.address]}}}) as mesh:
            async with mesh.client() as http:
                await http.get("http://orders/one")
                answer = await http.get("http://orders/one", follow_redirects=True)
                assert [r.status_code for r in answer.history] == [302]
                await http.get("http://orders/", auth=("u", "p"))
                hooked: list[str] = []

                async def hook(request: httpx.Request) -> None:
                    hooked.append(str(request.url))

                http.event_hooks["request"].append(hook)
                await http.get("http://orders/hooked")
    assert [r.headers.get("cookie") for r in server.requests] == [None, "s=1", "s=1", "s=1", "s=1"]
    assert server.requests[3].headers["authorization"].startswith("Basic ")
    assert hooked == ["http://orders/hooked"]


async def test_a_short_response_pickles_as_a_plain_one(tmp_path: Path) -> None:
    """What comes back from a cache or another process is httpx's own class."""
    async with scripted(answer) as server:
        with mesh_of(tmp_path, {"orders": {"discover": {"static": [server.address]}}}) as mesh:
            async with mesh.client() as http:
                response = await http.get("http://orders/x")
                again = pickle.loads(pickle.dumps(response))
    assert type(again) is httpx.Response
    assert (again.json(), again.status_code, str(again.request.url)) == ({"a": 1}, 200, "http://orders/x")


async def test_ordinary_requests_do_take_the_short_path(tmp_path: Path) -> None:
    """Otherwise this file would compare the full path with itself."""
    assert httpx.__version__ in KNOWN["httpx"]
    async with scripted(answer) as server:
        with mesh_of(tmp_path, {"orders": {"discover": {"static": [server.address]}}}) as mesh:
            async with mesh.client() as http:
                for method, body in itertools.product(["GET", "POST", "DELETE"], BODIES[:4]):
                    response = await http.request(method, "http://orders/items/7?q=1", headers={"X-Own": "1"}, **body)
                    assert type(response).__name__ == "ShortResponse"
            with mesh.sync_client() as blocking:
                assert blocking.base_url == httpx.URL("")
