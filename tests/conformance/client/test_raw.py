"""What can no well-behaved server be made to say? Interim answers, trailers, odd framings: by scripted peers, against plain httpx."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.conformance.client.behaviours import head
from tests.conformance.client.caller import DRIVERS, Caller
from tests.support import Request, Scripted, mesh_of, scripted

ANSWERS = {
    "interim": b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nlink: </a>\r\n\r\nHTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok",
    "trailers": b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\ntrailer: x-sum\r\n\r\n3\r\nabc\r\n0\r\nx-sum: 1\r\n\r\n",
    "extensions of chunks": b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3;a=b\r\nabc\r\n0;c\r\n\r\n",
    "until the end": b"HTTP/1.1 200 OK\r\nconnection: close\r\n\r\nall of it",
    "old": b"HTTP/1.0 200 OK\r\nconnection: close\r\ncontent-length: 2\r\n\r\nok",
    "no reason": b"HTTP/1.1 200 \r\ncontent-length: 2\r\n\r\nok",
    "a long reason": b"HTTP/1.1 404 It Was Here Yesterday\r\ncontent-length: 0\r\n\r\n",
    "an unknown status": b"HTTP/1.1 299 Hm\r\ncontent-length: 0\r\n\r\n",
    "latin-1": b"HTTP/1.1 200 OK\r\nx-name: caf\xe9\r\ncontent-length: 0\r\n\r\n",
    "spaces": b"HTTP/1.1 200 OK\r\nx-a:   1  \r\nX-B:2\r\nx-empty:\r\ncontent-length: 0\r\n\r\n",
    "one chunk at a time": b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n" + b"1\r\na\r\n" * 2000 + b"0\r\n\r\n",
    "a length for HEAD": b"HTTP/1.1 200 OK\r\ncontent-length: 99\r\n\r\n",
    "empty and compressed": b"HTTP/1.1 200 OK\r\ncontent-encoding: gzip\r\ncontent-length: 0\r\n\r\n",
    "compressed in chunks": b"HTTP/1.1 200 OK\r\ncontent-encoding: gzip\r\ntransfer-encoding: chunked\r\n\r\n"
    + b"".join(b"1\r\n%c\r\n" % byte for byte in gzip.compress(b"text", mtime=0))
    + b"0\r\n\r\n",
    "two sets of cookies": b"HTTP/1.1 200 OK\r\nset-cookie: a=1\r\nset-cookie: b=2; Secure\r\ncontent-length: 0\r\n\r\n",
    "no HTTP": b"SSH-2.0-x\r\n\r\n",
    "half a head": b"HTTP/1.1 200 OK\r\ncontent-le",
    "half a body": b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 10\r\n\r\nhalf",
    "half a chunk": b"HTTP/1.1 200 OK\r\nconnection: close\r\ntransfer-encoding: chunked\r\n\r\n9\r\nhalf",
    "nothing": b"",
    "no gzip": b"HTTP/1.1 200 OK\r\ncontent-encoding: gzip\r\ncontent-length: 4\r\n\r\nnone",
}
# What ends the connection after it was said.
CUT = {"half a head", "nothing", "no HTTP"}


@contextlib.asynccontextmanager
async def saying(name: str) -> AsyncIterator[Scripted]:
    async def answer(server: Scripted, request: Request) -> bytes | None:
        return ANSWERS[name] or None

    async def cut(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            await reader.readuntil(b"\r\n\r\n")
            writer.write(ANSWERS[name])
        writer.close()

    if name not in CUT:
        async with scripted(answer) as server:
            yield server
        return
    server = Scripted(answer)
    plain = await asyncio.start_server(cut, "127.0.0.1", 0)
    server.port = plain.sockets[0].getsockname()[1]
    yield server
    plain.close()


async def outcome(call: Caller, name: str) -> Any:
    """Twice, since an answer may have spoilt the connection for the next."""
    method, out = "HEAD" if "HEAD" in name else "GET", []
    for _ in range(2):
        try:
            answer = await call.request(method, "/", timeout=5)
        except httpx.HTTPError as error:
            classes = [c for c in (httpx.RemoteProtocolError, httpx.ReadError, httpx.DecodingError) if isinstance(error, c)]
            out.append((classes[0].__name__, error.request.url.path))
        else:
            out.append(
                (
                    head(answer),
                    answer.content,
                    answer.num_bytes_downloaded,
                    answer.http_version,
                    dict(answer.cookies),
                    answer.is_closed,
                )
            )
    return out


@pytest.mark.parametrize("driver", [driver for driver in DRIVERS if driver != "uvloop"])
@pytest.mark.parametrize("name", ANSWERS)
async def test_every_answer_is_understood_as_httpx_understands_it(tmp_path: Path, name: str, driver: str) -> None:
    """Or refused with its class."""
    is_async = driver != "sync"
    async with saying(name) as server:
        orders = {"discover": {"static": [server.address]}, "retry": {"attempts": 1}, "admit": {"breaker": {"failures": 1000}}}
        with mesh_of(tmp_path, {"orders": orders}) as mesh:
            told = []
            for base in (f"http://{server.address}", "http://orders"):
                plain = (httpx.AsyncClient if is_async else httpx.Client)(trust_env=False)
                client: Any = plain if base != "http://orders" else (mesh.client if is_async else mesh.sync_client)()
                call = Caller(client, base, is_async=is_async, options=lambda **options: None)
                if is_async:
                    told.append(await outcome(call, name))
                    await asyncio.gather(client.aclose(), plain.aclose() if plain is not client else asyncio.sleep(0))
                else:
                    # Blocking calls run beside the server's loop.
                    told.append(await asyncio.to_thread(asyncio.run, outcome(call, name)))
                    client.close()
                    plain.close()
            assert told[0] == told[1]
            assert sum(row["in_flight"] for row in mesh.engine.stats(0.0)) == 0
