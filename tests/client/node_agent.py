"""What does a node agent do that is only good enough for tests?

It speaks the agreement of the data socket in HTTP/1.1: one attempt for each request that names an endpoint, `x-mesh-failed` where there
is no answer, `/ping` and `/handover`. TLS and HTTP/2 are the real agent's. `python -m tests.client.node_agent PATH` runs one as a
process that can be stopped and killed.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from pathlib import Path

from tests.support import Request

OWN = {"x-mesh-endpoint", "x-mesh-expect", "x-mesh-protocol", "x-mesh-connect", "x-mesh-failed", "x-mesh-handed"}
SECRET = "5ec7e7" * 8


class NodeAgent:
    """Counts what it carried. `fault`, where it is set, answers an attempt in place of its endpoint, by raw bytes; b"" hangs up.

    As the real one it asks for a body on demand when it has a connection to the endpoint; one that `is_greedy` asks at once.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.requests: list[Request] = []
        self.asked: list[str] = []
        self.fault: bytes | None = None
        self.is_silent = False
        self.is_greedy = False
        self.connections = 0
        self.secret = SECRET
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> NodeAgent:
        self.path.unlink(missing_ok=True)
        self._server = await asyncio.start_unix_server(self._serve, self.path)
        return self

    async def stop(self) -> None:
        """As a kill does: the socket's file stays, and every connection ends."""
        if self._server is not None:
            self._server.close()
            self._server = None
        for task in tuple(self._tasks):
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)

    async def __aenter__(self) -> NodeAgent:
        return await self.start()

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self.connections += 1
        try:
            while (head := await _head(reader)) is not None:
                if self.is_silent:
                    await asyncio.sleep(60)
                if not await self._answer(head, reader, writer):
                    break
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            self._tasks.discard(task)
            writer.transport.abort()

    async def _answer(self, head: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        body = _Body(head, reader, writer)
        if not body.is_on_demand or self.is_greedy:
            request = await body.request()
        else:
            request = body.begun()
        endpoint = request.headers.get("x-mesh-endpoint")
        if endpoint is None:
            self.asked.append(request.target)
            if request.target == "/ping":
                writer.write(b"HTTP/1.1 204 No Content\r\n\r\n")
            elif request.target == "/handover":
                writer.write(f"HTTP/1.1 200 OK\r\ncontent-length: {len(self.secret)}\r\n\r\n{self.secret}".encode())
            else:
                writer.write(b"HTTP/1.1 400 Bad Request\r\ncontent-length: 0\r\n\r\n")
            return True
        self.requests.append(request)
        if self.fault is not None:
            writer.write(self.fault)
            await writer.drain()
            return bool(self.fault) and not body.is_left
        try:
            host, _, port = endpoint.rpartition(":")
            far, out = (
                await asyncio.open_unix_connection(port)
                if host == "unix"
                else await asyncio.open_connection(host.strip("[]"), port)
            )
        except OSError as error:
            writer.write(failure("connect; written=0", f"no connection to {endpoint} ({error.strerror})."))
            return not body.is_left
        try:
            if body.is_left:
                request = self.requests[-1] = await body.request()
            return await self._relay(request, reader, writer, far, out)
        finally:
            out.close()

    async def _relay(
        self,
        request: Request,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        far: asyncio.StreamReader,
        out: asyncio.StreamWriter,
    ) -> bool:
        fields = {name: value for name, value in request.headers.items() if name not in OWN}
        fields.pop("expect", "")
        if fields.pop("transfer-encoding", ""):
            fields["content-length"] = str(len(request.body))
        head = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
        out.write(f"{request.method} {request.target} HTTP/1.1\r\n{head}\r\n".encode() + request.body)
        try:
            answer = await far.readuntil(b"\r\n\r\n")
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.write(failure("closed; written=1", "it closed the connection before its answer was complete."))
            return True
        writer.write(answer)
        await writer.drain()
        lower = answer.lower()
        if b" 101 " in answer.split(b"\r\n")[0]:
            await asyncio.wait(
                {asyncio.ensure_future(_pipe(far, writer)), asyncio.ensure_future(_pipe(reader, out))},
                return_when=asyncio.FIRST_COMPLETED,
            )
            return False
        if b"content-length:" in lower and request.method != "HEAD":
            left = int(lower.partition(b"content-length:")[2].split(b"\r\n")[0])
            while left and (piece := await far.read(min(left, 65536))):
                left -= len(piece)
                writer.write(piece)
                await writer.drain()
            return not left
        if b"transfer-encoding: chunked" in lower:
            seen = b""
            while piece := await far.read(65536):
                writer.write(piece)
                await writer.drain()
                seen = (seen + piece)[-5:]
                if seen == b"0\r\n\r\n":
                    return True
            return False
        return b"connection: close" not in lower


class _Body:
    """What follows a head, which may have to be asked for. `is_left`: it wasn't."""

    def __init__(self, head: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._head = head
        self._reader = reader
        self._writer = writer
        self.is_on_demand = self.is_left = b"\r\nexpect: 100-continue\r\n" in head.lower()

    def begun(self) -> Request:
        """The request without it."""
        line, *fields = self._head.decode("latin-1").split("\r\n")
        return Request(
            line, {name.lower(): value.strip() for name, _, value in (field.partition(":") for field in fields if field)}, b""
        )

    async def request(self) -> Request:
        """The whole of it."""
        if self.is_on_demand:
            self._writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            self.is_left = False
        whole = await Request.read(_Again(self._head, self._reader))  # type: ignore[arg-type]
        assert whole is not None
        return whole


class _Again:
    """A reader that gives a head once more."""

    def __init__(self, head: bytes, reader: asyncio.StreamReader) -> None:
        self._head = head
        self.readexactly = reader.readexactly
        self.readline = reader.readline

    async def readuntil(self, _: bytes) -> bytes:
        return self._head


async def _head(reader: asyncio.StreamReader) -> bytes | None:
    try:
        return await reader.readuntil(b"\r\n\r\n")
    except asyncio.IncompleteReadError:
        return None


def failure(reason: str, text: str) -> bytes:
    """What the agent answers where there is no answer."""
    return (
        f"HTTP/1.1 502 Bad Gateway\r\nx-mesh-failed: {reason}\r\ncontent-type: text/plain\r\ncontent-length: {len(text)}\r\n\r\n{text}"
    ).encode()


async def _pipe(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(ConnectionError):
        while piece := await reader.read(65536):
            writer.write(piece)
            await writer.drain()


async def _run(path: str) -> None:
    async with NodeAgent(Path(path)):
        print(os.getpid(), flush=True)
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(_run(sys.argv[1]))
