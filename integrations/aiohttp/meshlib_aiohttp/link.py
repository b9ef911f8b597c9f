"""What does aiohttp talk to, when there is no socket?

A transport of asyncio that is no socket: what aiohttp writes into it is taken as the request of one call, and the mesh's answer is given to
aiohttp's own parser as the bytes of an answer in HTTP/1.1. That costs a few microseconds for a head, and buys that every feature
of `ClientResponse` is aiohttp's own code. Both directions have flow control: a reader that is slow stops the mesh's connection, and a
peer that is slow stops the writer. A body that is written at once goes as bytes, which the mesh may send again; one that comes
piece by piece goes as a stream.
"""

from __future__ import annotations

import asyncio
import weakref
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable
from functools import lru_cache
from typing import Any

import aiohttp
import httpx
from aiohttp.client_proto import ResponseHandler

import meshlib

from .failures import as_aiohttp_says

# Bytes of an upload that wait for the peer before the writer has to, and before it may go on.
HIGH, LOW = 64 * 1024, 16 * 1024

_calls: weakref.WeakKeyDictionary[aiohttp.ClientResponse, meshlib.Call] = weakref.WeakKeyDictionary()


def call_of(found: aiohttp.ClientResponse | BaseException) -> meshlib.Call | None:
    """The call behind a response or an error, with its record; None for hosts outside the mesh."""
    if isinstance(found, aiohttp.ClientResponse):
        return _calls.get(found)
    call: meshlib.Call | None = getattr(found, "call", None)
    return call


class Reader(ResponseHandler):
    """aiohttp's own reader of answers, for one answer. It knows the body that it has handed out, so that an error can reach it."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(loop)
        self.body: Any = None
        # Never kept for another request.
        self.force_close()

    def feed_data(self, data: Any, size: int = 0) -> None:
        if data[0].code >= 200 or data[0].code == 101:
            self.body = data[1]
        super().feed_data(data, size)


class Link(asyncio.Transport):
    """One call, as a transport."""

    def __init__(
        self,
        reader: Reader,
        way: httpx.AsyncBaseTransport,
        request: aiohttp.ClientRequest,
        extensions: dict[str, Any],
        *,
        loop: asyncio.AbstractEventLoop,
        on_failure: Callable[[meshlib.MeshError], None],
    ) -> None:
        super().__init__()
        self._reader = reader
        self._way = way
        self._request = request
        self._extensions = extensions
        self._loop = loop
        self._on_failure = on_failure
        # The request
        self._has_head = False
        self._chunks: Chunks | None = None
        self._missing = 0
        self._pieces: deque[bytes] = deque()
        self._unsent = 0
        self._more: asyncio.Future[None] | None = None
        # The answer
        self._task: asyncio.Task[None] | None = None
        self._resumed: asyncio.Future[None] | None = None
        self._is_fed = False
        self._is_closing = False
        self._is_lost = False

    # --- the request, as aiohttp writes it

    def write(self, data: bytes | bytearray | memoryview) -> None:
        piece = bytes(data)
        if not self._has_head:
            # aiohttp writes a head in one piece, and what it says is in the request already.
            self._has_head = True
            piece = piece.partition(b"\r\n\r\n")[2]
            headers = self._request.headers
            if "chunked" in headers.get("Transfer-Encoding", "").lower():
                self._chunks = Chunks()
            else:
                self._missing = int(headers.get("Content-Length", "0"))
            if headers.get("Expect", "").lower() == "100-continue":
                # The mesh asks nobody beforehand: whoever refuses a request answers while its body is on the way.
                self._loop.call_soon(self._reader.data_received, b"HTTP/1.1 100 Continue\r\n\r\n")
        if self._chunks is not None:
            for part in self._chunks.take(piece):
                self._put(part)
        elif piece:
            self._missing -= len(piece)
            self._put(piece)
        if self._more is not None and not self._more.done():
            self._more.set_result(None)
        if self._task is None:
            if self._is_whole():
                self._begin()
                return
            # What is written in one go is one body, however many pieces it has.
            self._loop.call_soon(self._begin)
        if self._unsent > HIGH and not self._reader.writing_paused:
            self._reader.pause_writing()

    def writelines(self, list_of_data: Iterable[bytes | bytearray | memoryview]) -> None:
        self.write(b"".join(list_of_data))

    def _put(self, piece: bytes) -> None:
        self._pieces.append(piece)
        self._unsent += len(piece)

    def _is_whole(self) -> bool:
        return self._chunks.is_over if self._chunks is not None else self._missing <= 0

    def _begin(self) -> None:
        if self._task is not None or self._is_closing:
            return
        content: bytes | AsyncIterator[bytes] = self._upload()
        if self._is_whole() and self._chunks is None:
            content = b"".join(self._pieces)
            self._pieces.clear()
            self._unsent = 0
            if self._reader.writing_paused:
                self._reader.resume_writing()
        self._task = self._loop.create_task(self._run(content))

    async def _upload(self) -> AsyncIterator[bytes]:
        while True:
            while self._pieces:
                piece = self._pieces.popleft()
                self._unsent -= len(piece)
                if self._unsent <= LOW and self._reader.writing_paused:
                    self._reader.resume_writing()
                yield piece
            if self._is_whole():
                return
            self._more = self._loop.create_future()
            await self._more
            self._more = None

    # --- the call

    async def _run(self, content: bytes | AsyncIterator[bytes]) -> None:
        request = self._request
        answer: httpx.Response | None = None
        try:
            answer = await self._way.handle_async_request(
                httpx.Request(
                    request.method,
                    _url(str(request.url)),
                    headers=[
                        (name.encode(), value.encode()) for name, value in request.headers.items() if name.lower() != "expect"
                    ],
                    content=content,
                    extensions=self._extensions,
                )
            )
            call = answer.extensions.get("meshlib.call")
            if call is not None and request.response is not None:
                _calls[request.response] = call
            await self._deliver(answer)
        except meshlib.MeshError as error:
            self._fail(error)
        except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
            self._fail(meshlib.MeshError(f"the request to {request.url.host!r} can't be sent: {error}"), error)
        finally:
            if answer is not None:
                await answer.aclose()

    async def _deliver(self, answer: httpx.Response) -> None:
        """Give aiohttp's parser the answer, as fast as its reader wants it."""
        head, size, is_chunked = _head(answer)
        has_body = self._request.method != "HEAD" and answer.status_code not in (204, 304)
        left = int(size) if size.isdigit() and has_body else None
        self._reader.data_received(head)
        if answer.status_code == 101:
            await self._converse(answer.extensions.get("network_stream"))
            return
        pieces = aiter(answer.stream)  # type: ignore[arg-type]  # an asynchronous transport's stream is an asynchronous one
        while piece := await anext(pieces, b""):
            if left is not None:
                left -= len(piece)
                if left <= 0:
                    # aiohttp is done with the last byte and closes, but the mesh keeps a connection whose body was read to its end.
                    await anext(pieces, b"")
                    self._is_fed = True
            await self._feed(b"%x\r\n%b\r\n" % (len(piece), piece) if is_chunked else piece)
        self._is_fed = True
        if is_chunked and has_body:
            await self._feed(b"0\r\n\r\n")
        elif left is None and has_body:
            # A body that ends with its connection.
            await self._feed(b"")
            self._lose()

    async def _converse(self, stream: Any) -> None:
        """After a change of protocols (WebSocket): bytes both ways, until one side ends it."""
        if stream is None:
            raise meshlib.ProtocolError(
                "the service changed to another protocol, which this version of the mesh can't carry.",
                hint="Open the WebSocket with httpx-ws and mesh.client(), or call the endpoint by its address.",
            )
        # Never whole: what is written from now on is sent as it comes.
        self._missing, self._chunks = 1 << 62, None
        writing = self._loop.create_task(self._write_to(stream))
        try:
            while data := await stream.read(64 * 1024):
                await self._feed(data)
        finally:
            writing.cancel()
            await stream.aclose()
        self._is_fed = True
        self._lose()

    async def _write_to(self, stream: Any) -> None:
        async for piece in self._upload():
            await stream.write(piece)

    async def _feed(self, data: bytes) -> None:
        while self._resumed is not None:
            await self._resumed
        if data and not self._is_closing:
            self._reader.data_received(data)

    def _fail(self, error: meshlib.MeshError, cause: BaseException | None = None) -> None:
        body = self._reader.body
        failure = as_aiohttp_says(error, self._request, has_begun=body is not None)
        if cause is not None:
            failure.__cause__ = cause
        if body is None:
            self._on_failure(failure)
        else:
            body.set_exception(failure)
        self._reader.set_exception(failure)
        if self._reader.writing_paused:
            self._reader.resume_writing()

    # --- asyncio.Transport

    def pause_reading(self) -> None:
        if self._resumed is None:
            self._resumed = self._loop.create_future()

    def resume_reading(self) -> None:
        if self._resumed is not None:
            resumed, self._resumed = self._resumed, None
            if not resumed.done():
                resumed.set_result(None)

    def is_reading(self) -> bool:
        return self._resumed is None

    def is_closing(self) -> bool:
        return self._is_closing

    def close(self) -> None:
        """The response is complete, or nobody wants it any more: then the call is cancelled."""
        if not self._is_closing:
            self._is_closing = True
            self._pieces.clear()
            if self._task is not None and not self._is_fed:
                self._task.cancel()
            self._loop.call_soon(self._lose)

    def abort(self) -> None:
        self.close()

    def can_write_eof(self) -> bool:
        return False

    def get_write_buffer_size(self) -> int:
        return self._unsent

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return default

    def _lose(self) -> None:
        if not self._is_lost:
            self._is_lost = True
            self._reader.connection_lost(None)


class Chunks:
    """Takes the chunked coding off again, which aiohttp's writer has put on. Its input is known to be right."""

    def __init__(self) -> None:
        self._rest = b""
        self.is_over = False

    def take(self, data: bytes) -> list[bytes]:
        found: list[bytes] = []
        rest = self._rest + data
        while not self.is_over:
            line, end, after = rest.partition(b"\r\n")
            if not end:
                break
            size = int(line, 16)
            if len(after) < size + 2:
                break
            if size:
                found.append(after[:size])
            else:
                self.is_over = True
            rest = after[size + 2 :]
        self._rest = rest
        return found


@lru_cache(maxsize=512)
def _url(url: str) -> httpx.URL:
    """Parsing costs as much as the mesh's own part of a call, and the same few URLs come again and again."""
    return httpx.URL(url)


def _head(answer: httpx.Response) -> tuple[bytes, bytes, bool]:
    """The head as HTTP/1.1 writes it, the length that it announces (or b""), and whether its body is chunked."""
    version = answer.extensions.get("http_version", b"HTTP/1.1")
    lines = [b"%b %d %b" % (
        version if version == b"HTTP/1.0" else b"HTTP/1.1",
        answer.status_code,
        answer.extensions.get("reason_phrase", b""),
    )]  # fmt: skip
    size, is_chunked = b"", False
    for name, value in answer.headers.raw:
        lines.append(b"%b: %b" % (name, value))
        if len(name) == 14 and name.lower() == b"content-length":
            size = value
        elif len(name) == 17 and name.lower() == b"transfer-encoding":
            is_chunked = b"chunked" in value.lower()
    return b"\r\n".join([*lines, b"\r\n"]), size, is_chunked
