"""What does httpx document that a client does? A function for each, which returns what it saw.

None says what is right: the same function is run with a plain client of httpx, and the two must have seen the same.
"""

from __future__ import annotations

import hashlib
import io
import pickle
from typing import Any

import httpx

from tests.conformance.client.caller import Caller

# Headers that are the server's own, the mesh's, or the moment's.
_PASSING = {
    "date", "server", "x-envoy-upstream-service-time", "x-mesh-deadline-ms", "traceparent", "x-mesh-attempt", "x-request-id",
    "x-forwarded-proto", "x-envoy-expected-rq-timeout-ms", "x-forwarded-for", "x-envoy-internal", "host",
}  # fmt: skip


def head(response: Any) -> Any:
    return (
        response.status_code,
        response.reason_phrase,
        sorted(
            (n, v)
            for n, v in response.headers.multi_items()
            if n not in _PASSING and not (n == "connection" and v == "keep-alive")
        ),
    )


def seen(response: Any) -> Any:
    """What the server says that it got."""
    said = response.json()
    said["headers"] = sorted((n, v) for n, v in said["headers"] if n not in _PASSING and n != "connection")
    return said


def kind(error: Any, *kinds: str) -> Any:
    return (
        [name for name in kinds if isinstance(error, getattr(httpx, name))],
        str(error.request.url.path),
        error.request.method,
    )


async def methods(call: Caller) -> Any:
    """Every method, with and without a body."""
    out = []
    for method in ("GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "PROPFIND"):
        out.append(seen(await call.request(method, "/inspect")))
        out.append(seen(await call.request(method, "/inspect", content=b"body")))
    answer = await call.request("HEAD", "/bytes/1000?length")
    return [*out, head(answer), answer.content]


async def targets(call: Caller) -> Any:
    """Paths and queries arrive as httpx writes them."""
    paths = ("/inspect", "/inspect/a%20b", "/inspect/ä?q=ü", "/inspect?a=1&a=2&b=", "/inspect/x?%2F=%26", "/inspect/a/./b")
    return [(seen(await call.get(path)), (await call.get(path)).request.url.raw_path) for path in paths]


async def params(call: Caller) -> Any:
    """Query parameters in all their forms, merged with the client's and the URL's."""
    out = [
        seen(await call.get("/inspect", params=given))
        for given in (
            {"a": "1", "b": ["x", "y"]},
            [("a", "1"), ("a", "2")],
            "raw=1&é=2",
            {"n": None, "t": True, "i": 3},
            httpx.QueryParams("q=1"),
            {},
        )
    ]
    out.append(seen(await call.get("/inspect?from=url", params={"given": "1"})))
    async with call.other(params={"client": "1"}) as client:
        out.append(seen(await client.get("/inspect", params={"own": "2"})))
    return out


async def bodies(call: Caller) -> Any:
    """json, data, content, text."""
    given: list[dict[str, Any]] = [
        {"json": {"a": [1, "ü", None]}},
        {"json": "x"},
        {"data": {"a": "1", "b": ["2", "3"], "c": "ü"}},
        {"content": b"\x00\xff"},
        {"content": "text ü"},
        {"content": b""},
        {"content": b"{}", "headers": {"content-type": "application/x"}},
        {"data": {"a": "1"}, "headers": {"content-type": "application/y"}},
    ]
    return [seen(await call.post("/inspect", **body)) for body in given]


async def multipart(call: Caller) -> Any:
    """Files with names, types, and fields beside them; a boundary of our own makes it comparable."""
    headers = {"content-type": "multipart/form-data; boundary=cut"}
    given: list[dict[str, Any]] = [
        {"files": {"f": b"bytes"}},
        {"files": {"f": ("name ü.txt", b"bytes", "text/x")}},
        {"files": [("f", ("1", b"1")), ("f", ("2", io.BytesIO(b"2")))], "data": {"a": ["1", "2"]}},
        {"files": {"f": ("x", b"1", "text/plain", {"X-Part": "1"})}},
    ]
    return [seen(await call.post("/inspect", headers=headers, **body)) for body in given]


async def iterators(call: Caller) -> Any:
    """A body in pieces is sent in chunks, or with the length that is given."""
    out = [seen(await call.post("/inspect", content=call.body(b"one", b"", b"two")))]
    out.append(seen(await call.post("/inspect", content=call.body(b"abc", b"def"), headers={"content-length": "6"})))
    big = [bytes([n]) * 65_536 for n in range(64)]
    answer = (await call.post("/digest", content=call.body(*big))).json()
    return [*out, answer, answer["sha256"] == hashlib.sha256(b"".join(big)).hexdigest()]


async def both_ways(call: Caller) -> Any:
    """What goes up in pieces comes down again."""
    async with call.stream("POST", "/echo", content=call.body(*[b"x" * 10_000] * 50)) as stream:
        data = await stream.read()
    return (stream.response.status_code, len(data), stream.response.num_bytes_downloaded, stream.response.is_closed)


async def headers(call: Caller) -> Any:
    """Of the client, of the request, several of a name, and the defaults that they replace."""
    out = [
        seen(await call.get("/inspect", headers=given))
        for given in (
            {"X-A": "1"},
            [("x-a", "1"), ("x-a", "2")],
            httpx.Headers({"user-agent": "me"}),
            {"accept": "x/y"},
            {"x-latin": "é".encode("latin-1")},
        )
    ]
    async with call.other(headers={"x-client": "1", "user-agent": "client"}) as client:
        out.append(seen(await client.get("/inspect", headers={"x-own": "1"})))
        out.append(seen(await client.get("/inspect", headers={"x-client": "2"})))
        client.client.headers["x-later"] = "3"
        out.append(seen(await client.get("/inspect")))
    return out


async def cookies(call: Caller) -> Any:
    """Set by the server, sent again to it; given by the client; kept in the jar."""
    async with call.other(cookies={"mine": "0"}) as client:
        first = await client.get("/cookies?a=1&b=2;%20Path=/inspect")
        out = [dict(first.cookies), dict(client.client.cookies)]
        out.append(seen(await client.get("/inspect")))
        out.append((await client.get("/echo")).status_code)
        await client.get("/cookies?a=;%20Max-Age=0")
        out.append(seen(await client.get("/inspect")))
        client.client.cookies.clear()
        out.append(seen(await client.get("/inspect")))
        return out


async def redirects(call: Caller) -> Any:
    """Followed where asked: relative and absolute, with the change of method, and the history."""
    out: list[Any] = []
    for code in (301, 302, 303, 307, 308):
        for method in ("GET", "POST", "HEAD"):
            answer = await call.request(method, f"/redirect/{code}?to=/inspect", follow_redirects=True)
            out.append(
                (
                    code,
                    method,
                    answer.request.method,
                    answer.status_code,
                    [(r.status_code, r.url.path) for r in answer.history],
                    answer.url.path,
                )
            )
        body = await call.post(f"/redirect/{code}?to=/inspect", content=b"again", follow_redirects=True)
        out.append(seen(body))
    absolute = await call.get(f"/redirect/302?to={call.base}/inspect", follow_redirects=True)
    fragment = await call.get("/redirect/302?to=/inspect%23part", follow_redirects=True)
    return [*out, seen(absolute), len(absolute.history), fragment.url.fragment]


async def redirects_by_hand(call: Caller) -> Any:
    """Not followed by itself: `next_request` is what would be sent."""
    answer = await call.post("/redirect/303?to=../inspect/x", content=b"x")
    request = answer.next_request
    out: list[Any] = [head(answer), answer.is_redirect, answer.has_redirect_location, request.method, request.url.path]
    return [*out, seen(await call.send(request))]


async def too_many_redirects(call: Caller) -> Any:
    """`max_redirects` is the end, and says so."""
    async with call.other(max_redirects=3, follow_redirects=True) as client:
        ends = [(await client.get("/chain/3")).text, len((await client.get("/chain/3")).history)]
        return [ends, kind(await client.failure("/chain/4"), "TooManyRedirects", "RequestError")]


async def basic(call: Caller) -> Any:
    """By argument, by the client, by an object, and absent."""
    out = [head(await call.get("/basic", auth=auth)) for auth in (("user", "pass word"), httpx.BasicAuth("user", "no"), None)]
    async with call.other(auth=("user", "pass word")) as client:
        out += [head(await client.get("/basic")), head(await client.get("/basic", auth=None))]
    return out


async def digest(call: Caller) -> Any:
    """The challenge is answered, and the history tells of it; a body is sent again."""
    auth = httpx.DigestAuth("user", "secret")
    out = []
    for algorithm in ("SHA-256", "MD5"):
        answer = await call.post(f"/digest-auth?algorithm={algorithm}", auth=auth, content=b"paid")
        out.append((answer.status_code, answer.content, [r.status_code for r in answer.history]))
    return [*out, (await call.get("/digest-auth", auth=httpx.DigestAuth("user", "wrong"))).status_code]


class TokenAuth(httpx.Auth):
    """A flow that needs the answer's body and the request's."""

    requires_request_body = True
    requires_response_body = True

    def auth_flow(self, request: httpx.Request) -> Any:
        request.headers["x-length"] = str(len(request.content))
        response = yield request
        if response.status_code == 401:
            request.headers["x-token"] = response.text
            yield request


async def own_auth(call: Caller) -> Any:
    """A flow of one's own may read bodies and ask again; a function may change the request."""

    def sign(request: httpx.Request) -> httpx.Request:
        request.headers["x-signed"] = "yes"
        return request

    answer = await call.post("/token", auth=TokenAuth(), content=call.body(b"ab", b"c"))
    return [answer.text, answer.request.headers["x-length"], len(answer.history), seen(await call.get("/inspect", auth=sign))]


async def hooks(call: Caller) -> Any:
    """Each request before it goes, each response before it is read; also those of a redirect."""
    told: list[Any] = []
    events = {
        "request": [
            call.hook(lambda request: told.append((request.method, request.url.path)) or request.headers.update({"x-hook": "1"}))
        ],
        "response": [
            call.hook(lambda response: told.append((response.status_code, response.is_closed, response.request.url.path)))
        ],
    }
    async with call.other(event_hooks=events, follow_redirects=True) as client:
        return [seen(await client.get("/redirect/302?to=/inspect")), told]


async def raising_hook(call: Caller) -> Any:
    """`raise_for_status` in a hook is the classic; the connection lives on."""
    events = {"response": [call.hook(lambda response: response.raise_for_status())]}
    async with call.other(event_hooks=events) as client:
        error = await client.failure("/status/503/x", method="POST")
        return [kind(error, "HTTPStatusError"), error.response.status_code, (await client.get("/inspect")).status_code]


async def streaming(call: Caller) -> Any:
    """All the ways to take a body, and what the response says of itself."""
    out: list[Any] = []
    for form, given in (("bytes", (7,)), ("text", (11,)), ("lines", ()), ("raw", (13,))):
        async with call.stream("GET", "/lines") as stream:
            pieces = await stream.pieces(form, *given)
            out.append((pieces, stream.response.is_stream_consumed, stream.response.num_bytes_downloaded))
        out.append(stream.response.is_closed)
    async with call.stream("GET", "/lines") as stream:
        out += [len(await stream.read()), stream.response.text]
    return out


async def early_close(call: Caller) -> Any:
    """A body that is left behind is no harm to the next call."""
    out = []
    for _ in range(3):
        async with call.stream("GET", "/bytes/20000000?length") as stream:
            out.append(len(await stream.first("raw")) > 0)
        out.append((stream.response.is_closed, stream.response.is_stream_consumed, (await call.get("/echo")).status_code))
    async with call.stream("GET", "/inspect") as stream:
        await stream.close()
    out.append(stream.response.is_closed)
    try:
        await stream.read()
    except httpx.StreamError as error:
        out.append(type(error).__name__)
    return out


async def endless(call: Caller) -> Any:
    """What has come is there at once, though the answer has no end."""
    async with call.stream("GET", "/events") as stream:
        return [await stream.first("lines"), stream.response.headers["content-type"]]


async def misuse(call: Caller) -> Any:
    """What is not read can't be looked at, and nothing is read twice."""
    out: list[Any] = []
    async with call.stream("GET", "/lines") as stream:
        try:
            stream.response.content
        except httpx.ResponseNotRead as error:
            out.append(str(error))
        await stream.pieces("raw")
        try:
            await stream.pieces("raw")
        except httpx.StreamConsumed as error:
            out.append(type(error).__name__)
    return out


async def large_bodies(call: Caller) -> Any:
    """Both framings of a body that doesn't fit into any buffer."""
    out = []
    for query in ("", "?length"):
        answer = await call.get(f"/bytes/3000000{query}")
        out.append((len(answer.content), answer.num_bytes_downloaded, "content-length" in answer.headers))
    return out


async def codings(call: Caller) -> Any:
    """Decoded as far as the packages are installed; raw stays raw."""
    out = []
    for name in ("gzip", "deflate", "br", "zstd", "identity"):
        answer = await call.get(f"/coded/{name}")
        async with call.stream("GET", f"/coded/{name}") as stream:
            raw = b"".join(await stream.pieces("raw"))
        out.append((name, answer.text, answer.num_bytes_downloaded, raw))
    return out


async def encodings(call: Caller) -> Any:
    """The charset that is said, the client's default, and a function that guesses."""
    out = [((await call.get(f"/text/{name}?said")).text, (await call.get(f"/text/{name}")).text) for name in ("utf-8", "latin-1")]
    for guess in ("latin-1", lambda content: "latin-1"):
        async with call.other(default_encoding=guess) as client:
            answer = await client.get("/text/latin-1")
            out.append((answer.text, str(answer.encoding)))
    return out


async def bodiless(call: Caller) -> Any:
    """204, 304 and HEAD have no body, and leave the connection fit for the next."""
    out = []
    for method, path in (
        ("GET", "/status/204"),
        ("GET", "/status/304"),
        ("HEAD", "/status/200"),
        ("DELETE", "/status/204"),
        ("HEAD", "/bytes/99?length"),
    ):
        answer = await call.request(method, path)
        out.append((answer.status_code, answer.content, answer.num_bytes_downloaded, answer.headers.get("content-length")))
    return out


async def statuses(call: Caller) -> Any:
    """Any status is an answer, and `raise_for_status` says what it thinks of it."""
    out: list[Any] = []
    for code in (200, 201, 299, 400, 404, 418, 429, 500, 599):
        answer = await call.post(f"/status/{code}")
        out.append(
            (answer.status_code, answer.text, answer.is_success, answer.is_error, answer.is_client_error, answer.is_server_error)
        )
        try:
            out.append(answer.raise_for_status() is answer)
        except httpx.HTTPStatusError as error:
            out.append((str(error).replace(call.base, ""), error.response is answer, error.request is answer.request))
    return out


async def large_headers(call: Caller) -> Any:
    """Some 20 KiB of them, and several of a name."""
    return head(await call.get("/large-headers/80"))


async def closing(call: Caller) -> Any:
    """`Connection: close` from either side."""
    out = [(await call.get("/close")).text for _ in range(3)]
    return [
        *out,
        (await call.get("/inspect", headers={"connection": "close"})).status_code,
        (await call.get("/inspect")).status_code,
    ]


async def a_request_of_one_s_own(call: Caller) -> Any:
    """Built and sent by hand, with or without the client's settings."""
    async with call.other(headers={"x-client": "1"}, params={"p": "1"}, cookies={"c": "1"}) as client:
        built = client.client.build_request("POST", client.base + "/inspect", json={"a": 1}, headers={"x-own": "1"})
        bare = httpx.Request("PUT", client.base + "/inspect", content=b"x")
        answers = [await client.send(built), await client.send(bare)]
        opened = await client.send(client.client.build_request("GET", client.base + "/lines"), stream=True)
        text = await opened.aread() if client.is_async else opened.read()
        return [*map(seen, answers), answers[0].request is built, text.decode()]


async def base_url(call: Caller) -> Any:
    """Relative URLs are put behind it."""
    async with call.other(base_url=call.base + "/inspect") as client:
        asked = [client.client.get(path) for path in ("x", "/y", "", "?q=1")]
        return [seen(await answer if client.is_async else answer) for answer in asked]


async def told_by_a_response(call: Caller) -> Any:
    """Its attributes, and its copy out of a pickle."""
    answer = await call.get("/coded/gzip", headers={"x-own": "1"})
    again = pickle.loads(pickle.dumps(answer))
    return [
        answer.http_version,
        answer.elapsed.total_seconds() > 0,
        (answer.is_closed, answer.is_stream_consumed, answer.encoding, answer.charset_encoding),
        answer.request.headers["x-own"],
        (answer.url.path, answer.history, answer.next_request),
        repr(answer),
        (again.text, again.status_code, again.request.url.path, again.is_closed, sorted(again.extensions), again.http_version),
        answer.extensions["http_version"],
        answer.extensions.get("reason_phrase"),  # HTTP/2 has none
    ]


async def read_timeout(call: Caller) -> Any:
    """An answer that doesn't come in time."""
    times = (0.05, httpx.Timeout(5, read=0.05), (5, 0.05, 5, 5))
    names = ("ReadTimeout", "TimeoutException", "TransportError")
    out: list[Any] = [kind(await call.failure("/slow/5", timeout=timeout), *names) for timeout in times]
    async with call.other(timeout=0.05) as client:
        out.append(kind(await client.failure("/slow/5"), "ReadTimeout"))
        out.append((await client.get("/slow/0.1", timeout=5)).text)
    return out


async def timeout_between_pieces(call: Caller) -> Any:
    """A stream that stops: the read timeout is between two pieces."""
    try:
        async with call.stream("GET", "/events", timeout=httpx.Timeout(5, read=0.1)) as stream:
            await stream.pieces("raw")
    except httpx.ReadTimeout as error:
        return [isinstance(error, httpx.TimeoutException), (await call.get("/echo")).status_code]


async def cut_short(call: Caller) -> Any:
    """A body that ends before its length is no body."""
    # hypercorn says nothing over HTTP/2 when an application breaks off: its callers wait as long as they want to.
    error = await call.failure("/cut", timeout=3.0)
    return kind(error, "TransportError"), [
        name for name in ("ReadError", "RemoteProtocolError") if isinstance(error, getattr(httpx, name))
    ] != []


async def unsupported(call: Caller) -> Any:
    """What is no HTTP is refused before anything is sent."""
    out = []
    for url in ("ftp://orders/x", "orders://x/", "mailto:a", "relative"):
        error = await call.failure(url)
        out.append((str(error), type(error).__name__))
    return out


async def unwritable(call: Caller) -> Any:
    """A header with a line break would be a second header: it isn't sent."""
    error = await call.failure("/inspect", headers={"x-a": "1\r\nx-b: 2"})
    told = kind(error, "LocalProtocolError", "TransportError")
    # Of a wrong length httpx lets h11's error of the same name through.
    wrong = [
        await call.failure("/inspect", method="POST", content=b"abc", headers={"content-length": size}) for size in ("1", "5")
    ]
    names = [[kind.__name__ for kind in type(error).__mro__].count("LocalProtocolError") > 0 for error in wrong]
    return [told, names, (await call.get("/echo")).status_code]


async def a_closed_client(call: Caller) -> Any:
    """Can't be used any more, and says so."""
    async with call.other() as client:
        await client.get("/echo")
    try:
        await client.get("/echo")
    except RuntimeError as error:
        return [str(error), client.client.is_closed]


async def a_body_that_fails(call: Caller) -> Any:
    """The iterator's own error comes out, and the client lives on."""

    def sync_body() -> Any:
        yield b"begun"
        raise ZeroDivisionError("in the body")

    async def body() -> Any:
        yield b"begun"
        raise ZeroDivisionError("in the body")

    error = await call.failure("/digest", method="POST", content=body() if call.is_async else sync_body())
    return [type(error).__name__, str(error), (await call.get("/echo")).status_code]


BEHAVIOURS = [
    methods, targets, params, bodies, multipart, iterators, both_ways, headers, cookies, redirects, redirects_by_hand, too_many_redirects,
    basic, digest, own_auth, hooks, raising_hook, streaming, early_close, endless, misuse, large_bodies, codings, encodings, bodiless,
    statuses, large_headers, closing, a_request_of_one_s_own, base_url, told_by_a_response, read_timeout, timeout_between_pieces,
    cut_short, unsupported, unwritable, a_closed_client, a_body_that_fails,
]  # fmt: skip
