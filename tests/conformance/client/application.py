"""What do the real servers of the client's conformance tests answer? One ASGI application, with nothing of a framework between."""

from __future__ import annotations

import asyncio
import base64
import gzip
import hashlib
import json
import logging
import zlib
from typing import Any
from urllib.parse import parse_qsl, unquote

# A server that goes on sending to a caller who has gone says so for each piece, and nobody reads it: its pipe would fill up.
logging.getLogger("asyncio").setLevel(logging.CRITICAL)

TEXT = "a line\nzweite Zeile: äöü\r\nthe last, without an end"


def coded(name: str) -> bytes:
    """A text in a content coding."""
    data = TEXT.encode()
    if name == "gzip":
        return gzip.compress(data, mtime=0)
    if name == "deflate":
        return zlib.compress(data)
    if name == "br":
        import brotli

        return brotli.compress(data)
    if name == "zstd":
        import zstandard

        return zstandard.compress(data)
    return data


class Exchange:
    """One request and its answer."""

    def __init__(self, scope: Any, receive: Any, send: Any) -> None:
        self.method = scope["method"]
        self.path = unquote(scope["raw_path"].decode().partition("?")[0])
        self.query = dict(parse_qsl(scope["query_string"].decode(), keep_blank_values=True))
        self.raw_query = scope["query_string"].decode()
        self.headers = [(n.decode("latin-1").lower(), v.decode("latin-1")) for n, v in scope["headers"]]
        self.fields = dict(self.headers)
        self._receive, self._send = receive, send
        self.is_gone = False

    async def pieces(self) -> Any:
        while True:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                self.is_gone = True
                return
            yield message.get("body", b"")
            if not message.get("more_body"):
                return

    async def body(self) -> bytes:
        return b"".join([piece async for piece in self.pieces()])

    async def end(self) -> None:
        """Until the caller has gone."""
        while (await self._receive())["type"] != "http.disconnect":
            await asyncio.sleep(0.01)

    async def begin(self, status: int = 200, *headers: tuple[str, str]) -> None:
        raw = [(n.encode(), v.encode("latin-1")) for n, v in headers]
        await self._send({"type": "http.response.start", "status": status, "headers": raw})

    async def more(self, data: bytes, is_last: bool = False) -> None:
        await self._send({"type": "http.response.body", "body": data, "more_body": not is_last})

    async def answer(self, status: int, data: bytes = b"", *headers: tuple[str, str]) -> None:
        await self.begin(status, *headers, *((("content-length", str(len(data))),) if status not in (204, 304) else ()))
        await self.more(b"" if self.method == "HEAD" else data, True)

    async def json(self, what: Any, *headers: tuple[str, str]) -> None:
        await self.answer(200, json.dumps(what).encode(), ("content-type", "application/json"), *headers)


async def inspect(x: Exchange, *_: str) -> None:
    """Everything that was asked, as JSON."""
    body = await x.body()
    await x.json({"method": x.method, "path": x.path, "query": x.raw_query, "headers": x.headers, "body": body.decode("latin-1")})


async def echo(x: Exchange, *_: str) -> None:
    """The body as it comes."""
    await x.begin(200, ("content-type", x.fields.get("content-type", "application/octet-stream")))
    async for piece in x.pieces():
        await x.more(piece)
    await x.more(b"", True)


async def digest(x: Exchange, *_: str) -> None:
    """How much came, and its hash."""
    size, seen = 0, hashlib.sha256()
    pause = float(x.query.get("pause", 0))
    async for piece in x.pieces():
        size += len(piece)
        seen.update(piece)
        if pause:
            await asyncio.sleep(pause)
    await x.json({"size": size, "sha256": seen.hexdigest(), "length": x.fields.get("content-length")})


async def status(x: Exchange, code: str, *_: str) -> None:
    await x.body()
    await x.answer(int(code), b"" if code in ("204", "304") else f"status {code}".encode())


async def much(x: Exchange, size: str, *_: str) -> None:
    """A body in pieces of 64 KiB, of a length that is said, or not."""
    left = int(size)
    await x.begin(200, *((("content-length", size),) if "length" in x.query else ()))
    while left > 0 and x.method != "HEAD":
        piece = b"x" * min(left, 65536)
        left -= len(piece)
        await x.more(piece)
    await x.more(b"", True)


async def redirect(x: Exchange, code: str, *_: str) -> None:
    await x.body()
    await x.answer(int(code), b"elsewhere", ("location", x.query["to"]))


async def chain(x: Exchange, left: str, *_: str) -> None:
    await x.body()
    if int(left):
        await x.answer(302, b"", ("location", f"/chain/{int(left) - 1}"))
    else:
        await x.answer(200, b"the end")


async def give_cookies(x: Exchange, *_: str) -> None:
    await x.answer(200, b"", *(("set-cookie", f"{n}={v}") for n, v in x.query.items()))


async def basic(x: Exchange, *_: str) -> None:
    await x.body()
    if x.fields.get("authorization") == "Basic " + base64.b64encode(b"user:pass word").decode():
        await x.answer(200, b"welcome")
    else:
        await x.answer(401, b"who are you?", ("www-authenticate", 'Basic realm="shop"'))


async def digested(x: Exchange, *_: str) -> None:
    """RFC 7616 with SHA-256, or MD5 on request."""
    kind = {"md5": hashlib.md5, "sha-256": hashlib.sha256}[x.query.get("algorithm", "sha-256").lower()]
    given, body = x.fields.get("authorization", ""), await x.body()
    if not given.startswith("Digest "):
        challenge = f'Digest realm="shop", qop="auth", nonce="n0", opaque="o", algorithm={x.query.get("algorithm", "SHA-256")}'
        await x.answer(401, b"who are you?", ("www-authenticate", challenge), ("set-cookie", "asked=1"))
        return
    said = {n.strip(): v.strip('"') for n, _, v in (part.partition("=") for part in given.removeprefix("Digest ").split(", "))}

    def h(text: str) -> str:
        return kind(text.encode()).hexdigest()

    expected = h(f"{h('user:shop:secret')}:n0:{said['nc']}:{said['cnonce']}:auth:{h(f'{x.method}:' + said['uri'])}")
    await x.answer(200 if said["response"] == expected else 403, body or b"welcome")


async def token(x: Exchange, *_: str) -> None:
    """401 with a token in the body; 200 for those who bring it."""
    await x.body()
    if x.fields.get("x-token") == "t7":
        await x.answer(200, b"welcome")
    else:
        await x.answer(401, b"t7")


async def coding(x: Exchange, name: str, *_: str) -> None:
    await x.answer(200, coded(name), ("content-encoding", name), ("content-type", "text/plain; charset=utf-8"))


async def text(x: Exchange, charset: str, *_: str) -> None:
    await x.answer(
        200, "Grüße".encode(charset), ("content-type", f"text/plain; charset={charset}" if "said" in x.query else "text/plain")
    )


async def lines(x: Exchange, *_: str) -> None:
    """A text that is cut in the middle of lines and of characters."""
    data = TEXT.encode()
    await x.begin(200, ("content-type", "text/plain; charset=utf-8"))
    for n in range(0, len(data), 5):
        await x.more(data[n : n + 5])
    await x.more(b"", True)


async def events(x: Exchange, *_: str) -> None:
    """One event at once, and no end until the caller goes."""
    await x.begin(200, ("content-type", "text/event-stream"))
    await x.more(b"data: 1\n\n")
    await x.end()


async def slow(x: Exchange, seconds: str, *_: str) -> None:
    await x.body()
    await asyncio.sleep(float(seconds))
    await x.answer(200, b"at last")


async def large_headers(x: Exchange, count: str, *_: str) -> None:
    await x.answer(200, b"", *((f"x-large-{n}", "v" * 200) for n in range(int(count))), ("x-twice", "1"), ("x-twice", "2"))


async def closing(x: Exchange, *_: str) -> None:
    await x.answer(200, b"bye", ("connection", "close"))


async def cut(x: Exchange, *_: str) -> None:
    """A body that ends before its length."""
    await x.begin(200, ("content-length", "100"))
    await x.more(b"half")
    raise RuntimeError("as asked")


ROUTES = {
    "inspect": inspect, "echo": echo, "digest": digest, "status": status, "bytes": much, "redirect": redirect, "chain": chain,
    "cookies": give_cookies, "basic": basic, "digest-auth": digested, "token": token, "coded": coding, "text": text, "lines": lines,
    "events": events, "slow": slow, "large-headers": large_headers, "close": closing, "cut": cut,
}  # fmt: skip


async def app(scope: Any, receive: Any, send: Any) -> None:
    if scope["type"] == "lifespan":
        while True:
            message = await receive()
            await send({"type": message["type"] + ".complete"})
            if message["type"] == "lifespan.shutdown":
                return
    if scope["type"] == "websocket":
        await receive()
        if scope["path"] != "/ws":
            await send({"type": "websocket.close"})
            return
        await send({"type": "websocket.accept"})
        while (message := await receive())["type"] != "websocket.disconnect":
            await send({"type": "websocket.send", "text": message.get("text"), "bytes": message.get("bytes")})
        return
    x = Exchange(scope, receive, send)
    name, *rest = x.path.strip("/").split("/")
    if name in ROUTES:
        await ROUTES[name](x, *rest)
    else:
        await x.answer(404, b"no such thing")
