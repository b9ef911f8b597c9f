"""Is the short path httpx, to the letter? The same requests through the full path and the short one, compared on both ends.

What the server received must be equal, and what the caller got back too, over the whole product of methods, bodies, headers, URLs and
kinds of answers. Where the short path is not taken the comparison is trivially true: a last test shows where it must be.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import gzip
import itertools
import os
import pickle
import threading
import zlib
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

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


# --- the whole option space: what httpx does with any mix of options, settings and answers is what the short path does


class Recorder:
    """A server on a thread of its own that keeps every byte of a request and answers by its name."""

    def __init__(self) -> None:
        self.seen: list[tuple[bytes, bytes]] = []
        self.port = 0
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._main()))

    def __enter__(self) -> Recorder:
        self._thread.start()
        assert self._ready.wait(10)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()

    async def _main(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        self._ready.set()
        await self._stop.wait()
        server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError, ValueError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                fields = {n.lower(): v.strip() for n, _, v in (line.partition(b":") for line in head.split(b"\r\n")[1:])}
                body = b""
                if b"chunked" in fields.get(b"transfer-encoding", b""):
                    while size := int(await reader.readline(), 16):
                        body += (await reader.readexactly(size + 2))[:-2]
                    await reader.readline()
                elif b"content-length" in fields:
                    body = await reader.readexactly(int(fields[b"content-length"]))
                own = (b"x-mesh-", b"traceparent", b"tracestate")
                lines = [line for line in head.split(b"\r\n") if not line.lower().startswith(own)]
                self.seen.append((b"\r\n".join(lines), body))
                target = head.split(b" ")[1].decode()
                name = target.rpartition("answer-")[2].partition("?")[0].partition("/")[0]
                answer = MORE.get(name, MORE["ok"])
                if head.startswith(b"HEAD "):
                    answer = answer.split(b"\r\n\r\n")[0] + b"\r\n\r\n"
                writer.write(answer)
                if b"connection: close" in answer.lower():
                    break
        writer.close()


MORE = {
    **ANSWERS,
    "cookie": b"HTTP/1.1 200 OK\r\nset-cookie: s=1; Path=/\r\nset-cookie: t=2; HttpOnly\r\ncontent-length: 2\r\n\r\nok",
    "cookie-moved": b"HTTP/1.1 303 See Other\r\nset-cookie: r=1\r\nlocation: /answer-ok\r\ncontent-length: 0\r\n\r\n",
    "far": b"HTTP/1.1 307 Far\r\nlocation: http://orders:80/answer-moved?y\r\ncontent-length: 0\r\n\r\n",
    "round": b"HTTP/1.1 302 Found\r\nlocation: /answer-round\r\ncontent-length: 0\r\n\r\n",
    "nowhere": b"HTTP/1.1 302 Found\r\nlocation: http://[bad/\r\ncontent-length: 0\r\n\r\n",
    "unplaced": b"HTTP/1.1 302 Found\r\ncontent-length: 0\r\n\r\n",
    "multiple": b"HTTP/1.1 300 Multiple Choices\r\nlocation: /x\r\ncontent-length: 1\r\n\r\n1",
    "unzipped": b"HTTP/1.1 200 OK\r\ncontent-encoding: gzip\r\ncontent-length: 4\r\n\r\nnone",
    "uncoded": b"HTTP/1.1 200 OK\r\ncontent-encoding: rot13, identity\r\ncontent-length: 4\r\n\r\ntext",
    "deflated": b"HTTP/1.1 200 OK\r\ncontent-encoding: deflate\r\ncontent-length: %d\r\n\r\n%b"
    % (len(zlib.compress(b"deflated" * 9)), zlib.compress(b"deflated" * 9)),
    "html": "HTTP/1.1 200 OK\r\ncontent-type: text/html\r\nlink: </a>; rel=next\r\ncontent-length: 2\r\n\r\nü".encode(),
    "unknown-charset": b"HTTP/1.1 200 OK\r\ncontent-type: text/x; charset=nonsense\r\ncontent-length: 1\r\n\r\n\xe9",
    "old": b"HTTP/1.0 200 Fine\r\nconnection: close\r\n\r\nuntil the end",
    "closing": b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 3\r\n\r\nbye",
    "unauthorized": b'HTTP/1.1 401 No\r\nwww-authenticate: Digest realm="r", nonce="n", qop="auth"\r\ncontent-length: 0\r\n\r\n',
    "large": b"HTTP/1.1 200 OK\r\ncontent-length: 300000\r\n\r\n" + b"x" * 300_000,
    "hinted": b"HTTP/1.1 103 Early Hints\r\nlink: </a>\r\n\r\nHTTP/1.1 200 OK\r\ncontent-length: 1\r\n\r\n1",
    "header-bytes": b"HTTP/1.1 200 OK\r\nx-latin: \xe9\r\nX-Upper: A\r\ncontent-length: 0\r\n\r\n",
    "trailed": b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\ntrailer: x-t\r\n\r\n1\r\na\r\n0\r\nx-t: 1\r\n\r\n",
}


def digest() -> httpx.Auth:
    # Its cnonce is chance; two clients would differ by it.
    auth = httpx.DigestAuth("u", "p")
    auth._get_client_nonce = lambda nonce_count, nonce: b"0123456789abcdef"  # type: ignore[method-assign]
    return auth


def hooks(is_async: bool) -> Any:
    if is_async:

        async def mark(request: httpx.Request) -> None:
            request.headers["x-hooked"] = "1"

        return {"request": [mark]}
    return {"request": [lambda request: request.headers.update({"x-hooked": "1"})]}


# Values are made anew for each client, since many can be used once only. Those that begin with `call:` are called.
names = st.sampled_from([*ANSWERS, *sorted(MORE.keys() - ANSWERS.keys())])
forms = st.sampled_from(
    ["http://orders/answer-{}", "http://orders/answer-{}?q=1&r=%20", "http://orders:80/answer-{}", "http://orders:8080/answer-{}",
     "http://ORDERS/answer-{}", "http://orders/a b/answer-{}", "http://orders/ü/answer-{}?ü#part", "https://orders/answer-{}",
     "http://u:p@orders/answer-{}", "http://orders/x/../answer-{}", "http://orders//answer-{}", "/answer-{}", "HTTP://orders/answer-{}",
     " http://orders/answer-{}", "http://orders/%zz/answer-{}", "http://orders/answer-{}?a=[]&b='\"<>", "http://orders/a;b=c,d/answer-{}"]
)  # fmt: skip
methods = st.sampled_from(
    ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "get", "Post", "PROPFIND", "QUERY", "X-OWN", "pURGE"]
)
header_values = st.sampled_from(
    [None, {}, {"X-Own": "1"}, {"accept": "text/plain"}, {"Content-Type": "x/y"}, [("x-a", "1"), ("x-a", "2")], {"Host": "other"},
     {b"x-bytes": b"\xe9"}, {"x-ü": "1"}, {"x-value": "ü"}, {"User-Agent": "me"}, {"Cookie": "own=1"}, {"Authorization": "mine"},
     {"Connection": "close"}, {"Transfer-Encoding": "chunked"}, {"x-a": "1", "X-A": "2"}, {"x-empty": ""}, {"x-space": " 1 "}, httpx.Headers({"x-h": "1"}),
     {"Accept-Encoding": "identity"}, {"x-n": 3}, {"Expect": "x"}, {"x-tab": "a\tb"}, {"x-line": "a\r\nb: c"}, {"": "1"}, {"x y": "1"}]
)  # fmt: skip
bodies = st.sampled_from(
    [{}, {"json": {"n": [1, "ä", None]}}, {"json": []}, {"json": 0}, {"json": None}, {"json": float("inf")}, {"json": {1: 2.5}},
     {"content": b"bytes"}, {"content": "text ä"}, {"content": b""}, {"content": ""}, {"content": "call:pieces"}, {"content": bytearray(b"x")},
     {"data": {"form": ["1", "2"]}}, {"data": {}}, {"files": {"f": ("name", b"x", "text/plain")}, "headers": {"content-type": "multipart/form-data; boundary=b"}},
     {"json": {"a": 1}, "content": b"both"}, {"content": b"x", "data": {"a": "1"}}, {"json": {"a": 1}, "headers": {"content-type": "x/json"}},
     {"content": b"x", "headers": {"content-length": "1"}}]
)  # fmt: skip
calls = st.fixed_dictionaries(
    {"method": methods, "form": forms, "answer": names, "as_url": st.booleans(), "body": bodies},
    optional={
        "headers": header_values,
        "params": st.sampled_from([None, {}, {"a": "1"}, [("a", "ü")], "raw=1", {"n": None}]),
        "cookies": st.sampled_from([None, {}, {"c": "1"}]),
        "auth": st.sampled_from([None, ("u", "p"), "call:digest", httpx.USE_CLIENT_DEFAULT]),
        "timeout": st.sampled_from([None, 5, 5.5, (5, 5, 5, 5), httpx.Timeout(5, read=4), httpx.USE_CLIENT_DEFAULT, True]),
        "follow_redirects": st.sampled_from([True, False, httpx.USE_CLIENT_DEFAULT]),
        "extensions": st.sampled_from([None, {}, {"x": 1}, {"timeout": {"read": 5}}]),
    },
)
# Half of them are such as the short path takes, so that it isn't only shown when it isn't taken.
ordinary = st.fixed_dictionaries(
    {
        "method": methods,
        "form": st.sampled_from(["http://orders/answer-{}", "http://orders/answer-{}?q=1", "http://orders:80/x/answer-{}"]),
        "answer": names,
        "as_url": st.just(False),
        "body": st.sampled_from([{}, {}, {"json": {"a": "ü"}}, {"content": b"x"}, {"content": "ü"}, {"content": b""}]),
    },
    optional={
        "headers": st.sampled_from([None, {}, {"X-Own": "1"}, {"x-b": ""}, {"x-line": "a\r\nb: c"}, {"x y": "1"}]),
        "timeout": st.sampled_from([5, 5.5, None, httpx.USE_CLIENT_DEFAULT]),
        "follow_redirects": st.sampled_from([False, httpx.USE_CLIENT_DEFAULT]),
        "params": st.none(),
    },
)
bare = st.fixed_dictionaries(
    {}, optional={"headers": st.just({"x-client": "1"}), "timeout": st.just(5), "default_encoding": st.just("latin-1")}
)
settings_of = st.fixed_dictionaries(
    {},
    optional={
        "headers": st.sampled_from(
            [
                {},
                {"x-client": "1"},
                {"host": "client"},
                {"content-type": "x/client"},
                {"accept": "x"},
                [("x-c", "1"), ("x-c", "2")],
            ]
        ),
        "params": st.sampled_from([{}, {"p": "1"}]),
        "cookies": st.sampled_from([{}, {"mine": "1"}]),
        "auth": st.sampled_from([("a", "b")]),
        "base_url": st.sampled_from(["http://orders", "http://orders/base/", "http://orders:80/base"]),
        "follow_redirects": st.booleans(),
        "max_redirects": st.sampled_from([0, 1, 20]),
        "event_hooks": st.just("call:hooks"),
        "default_encoding": st.sampled_from(["latin-1", "utf-8"]),
        "timeout": st.sampled_from([None, 5, httpx.Timeout(5, connect=4)]),
    },
)
# What is done to a client between two calls.
changes = st.sampled_from(
    [None, None, None, ("headers", "x-later", "1"), ("headers", "accept", "y"), ("cookies", "later", "1"), ("base_url", "http://orders/later"),
     ("timeout", 4), ("auth", ("x", "y")), ("params", {"later": "1"}), ("follow_redirects", True), ("headers", {"only": "1"}), ("cookies", {})]
)  # fmt: skip
PUBLIC = [name for name in dir(httpx.Response) if not name.startswith("_") and not callable(getattr(httpx.Response, name))]
FIELDS = [
    "status_code",
    "headers",
    "history",
    "next_request",
    "extensions",
    "default_encoding",
    "is_closed",
    "is_stream_consumed",
]


def shown(value: Any) -> Any:
    """Any value of a response or a request, in a form that can be compared."""
    if isinstance(value, httpx.Response):
        return all_of(value)
    if isinstance(value, httpx.Request):
        body = value.content if hasattr(value, "_content") else type(value.stream).__name__
        extensions = {name: dict(v) if isinstance(v, dict) else v for name, v in value.extensions.items()}
        return (value.method, str(value.url), value.url.raw_path, value.headers.raw, value.headers.encoding, body, extensions)
    if isinstance(value, httpx.Headers):
        return (value.raw, value.multi_items(), value.encoding)
    if isinstance(value, httpx.Cookies):
        return sorted((c.name, c.value, c.domain, c.path) for c in value.jar)
    if isinstance(value, list):
        return [shown(v) for v in value]
    if isinstance(value, dict):
        return {name: v for name, v in value.items() if name not in ("meshlib.call", "network_stream")}
    return str(value) if isinstance(value, httpx.URL) else value


def all_of(response: httpx.Response) -> dict[str, Any]:
    """Every public attribute, or what it raises."""
    out: dict[str, Any] = {}
    for name in [*PUBLIC, *FIELDS]:
        try:
            value = getattr(response, name)
        except Exception as error:
            value = (type(error).__name__, str(error))
        out[name] = value.total_seconds() >= 0 if name == "elapsed" else shown(value)
    for name in ("json", "raise_for_status"):
        try:
            got = getattr(response, name)()
            out[name] = "itself" if got is response else repr(got)
        except Exception as error:
            out[name] = (type(error).__name__, str(error))
    out["repr"], out["bool"] = repr(response), bool(response)
    return out


def fresh(options: dict[str, Any], is_async: bool) -> dict[str, Any]:
    makers = {"call:pieces": lambda: pieces(is_async), "call:digest": digest, "call:hooks": lambda: hooks(is_async)}
    return {
        n: makers[v]() if isinstance(v, str) and v in makers else copy.deepcopy(v) if isinstance(v, (dict, list)) else v
        for n, v in options.items()
    }


def pieces(is_async: bool) -> Any:
    async def body() -> Any:
        yield b"one"
        yield b"two"

    return body() if is_async else iter([b"one", b"two"])


def tale(recorder: Recorder, client: Any, is_async: bool, runner: asyncio.Runner, story: list[Any]) -> list[Any]:
    """What becomes of some calls of one client: what the server saw, and what came back."""
    out: list[Any] = []
    for call, change in story:
        recorder.seen.clear()
        options = fresh(
            {n: v for n, v in call.items() if n not in ("method", "form", "answer", "as_url", "body")} | call["body"], is_async
        )
        url: Any = call["form"].format(call["answer"])
        try:
            url = httpx.URL(url) if call["as_url"] else url
            asked = client.request(call["method"], url, **options)
            came = all_of(runner.run(awaited(asked)) if is_async else asked)
        except Exception as error:
            kinds = [kind.__name__ for kind in type(error).__mro__ if kind.__module__ in ("httpx", "builtins")]
            request = getattr(error, "_request", None)
            came = (kinds, str(error), shown(request) if request is not None else None)
        out.append((list(recorder.seen), came, shown(client.cookies), client.is_closed))
        if change is not None:
            name, *rest = change
            if len(rest) == 1:
                setattr(client, name, copy.deepcopy(rest[0]))
            elif name == "headers":
                client.headers[rest[0]] = rest[1]
            else:
                client.cookies.set(rest[0], rest[1])
    return out


async def awaited(asked: Any) -> Any:
    return await asked


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with Recorder() as recorder, asyncio.Runner() as runner:
        orders = {"discover": {"static": [f"127.0.0.1:{recorder.port}"]}, "retry": {"attempts": 1}}
        with mesh_of(tmp_path_factory.mktemp("both"), {"orders": orders}) as mesh:
            yield recorder, runner, mesh


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@settings(
    max_examples=int(os.environ.get("MESHLIB_EXAMPLES", "300")),
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
@given(chosen=bare | settings_of, story=st.lists(st.tuples(ordinary | calls, changes), min_size=1, max_size=3))
def test_the_short_path_is_httpx_over_the_whole_option_space(both: Any, chosen: dict[str, Any], story: list[Any]) -> None:
    """Any options, any settings, changed between calls, any answer: a stock client on our transport, and a client with the short path."""
    recorder, runner, mesh = both
    for is_async in (False, True):
        told = []
        for kind in ("full", "short"):
            options = fresh(chosen, is_async)
            short = (mesh.client if is_async else mesh.sync_client)(trust_env=False, **options)
            client = short
            if kind == "full":
                transport = mesh.transport() if is_async else mesh.sync_transport()
                client = (httpx.AsyncClient if is_async else httpx.Client)(transport=transport, trust_env=False, **options)
                client._timeout = short._timeout
            told.append(tale(recorder, client, is_async, runner, story))
            for opened in {client, short}:
                runner.run(opened.aclose()) if is_async else opened.close()
        assert told[0] == told[1]
