"""What does an application hold after an Upgrade?

`response.extensions["network_stream"]`, with the methods that httpcore documents, so that httpx-ws and the like run unmodified: `read`,
`write`, `aclose` (or `close`), `get_extra_info`. It is there for every answer that is still open; where the answer was 101 the bytes are
the application's, otherwise they are the body's and it only tells about the connection. Failures are httpcore's classes and ours.
It moves no bytes itself: the carrier's `Incoming` does.
"""

from __future__ import annotations

import asyncio
from types import ModuleType, SimpleNamespace
from typing import Any

from .. import errors
from .faults import IDLE_TIMEOUT, WRITE_TIMEOUT
from .twins import twins
from .way import Answer, run

# What asyncio's transports call the same.
_INFO = {"server_addr": "peername", "client_addr": "sockname"}


def streams(httpcore: ModuleType) -> SimpleNamespace:
    """`AsyncStream` and `Stream` for one module of the httpcore family."""
    translate = twins(httpcore)

    def late(reason: str) -> errors.MeshError:
        text = "nothing was taken in time." if reason == WRITE_TIMEOUT else "nothing came in time."
        return translate(errors.AttemptTimeout(text, hint="The stream is still open.", reason=reason, is_written=True), None)

    class Shared:
        def __init__(self, answer: Any) -> None:
            self._answer = answer
            self._left = b""
            self._ending: Any = None

        def _is_upgraded(self) -> None:
            if self._answer.status != 101:
                raise RuntimeError(
                    "the bytes of this connection belong to the response's body; only an answer 101 hands them over"
                )

        def _cut(self, piece: bytes, most: int) -> bytes:
            self._left = piece[most:]
            return piece[:most]

        def get_extra_info(self, info: str) -> Any:
            """Of "client_addr", "server_addr", "socket" and "ssl_object" what the connection tells: its TLS is not Python's."""
            return self._answer.stream.info(_INFO.get(info, info))

    class AsyncStream(Shared, httpcore.AsyncNetworkStream):  # type: ignore[misc,name-defined]
        async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
            """At most `max_bytes`, b"" at the end. After a timeout the stream is as it was."""
            self._is_upgraded()
            if self._left:
                return self._cut(self._left, max_bytes)
            # Whoever gives up waiting leaves the read behind, and the next one takes it over: cancelled, it would end the stream.
            if self._ending is None:
                self._ending = asyncio.ensure_future(self._answer.read())
            try:
                async with asyncio.timeout(timeout):
                    piece = await asyncio.shield(self._ending)
            except TimeoutError as error:
                if isinstance(error, errors.MeshError):
                    self._ending = None
                    raise translate(error, None) from error.__cause__
                raise late(IDLE_TIMEOUT) from error
            except errors.MeshError as error:
                self._ending = None
                raise translate(error, None) from error.__cause__
            self._ending = None
            return self._cut(piece, max_bytes)

        async def write(self, buffer: bytes, timeout: float | None = None) -> None:
            """Everything, when the other side takes it. After a timeout nobody knows how much it took."""
            self._is_upgraded()
            try:
                async with asyncio.timeout(timeout):
                    await self._answer.stream.write(buffer)
            except errors.MeshError as error:
                raise translate(error, None) from error.__cause__
            except TimeoutError as error:
                await self.aclose()
                raise late(WRITE_TIMEOUT) from error

        async def aclose(self) -> None:
            reading, self._ending = self._ending, None
            if reading is not None:
                reading.cancel()
                await asyncio.wait((reading,))
            await self._answer.close()

        async def start_tls(self, ssl_context: Any, server_hostname: str | None = None, timeout: float | None = None) -> Any:
            raise NotImplementedError("the mesh secures its connections itself")

    class Stream(Shared, httpcore.NetworkStream):  # type: ignore[misc,name-defined]
        def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
            """At most `max_bytes`, b"" at the end. After a timeout the stream is as it was."""
            self._is_upgraded()
            if self._left:
                return self._cut(self._left, max_bytes)
            try:
                if timeout is not None and not run(self._answer.stream.is_ready(timeout)):
                    raise late(IDLE_TIMEOUT)
                piece = run(self._answer.read())
            except errors.MeshError as error:
                raise translate(error, None) from error.__cause__
            return self._cut(piece, max_bytes)

        def write(self, buffer: bytes, timeout: float | None = None) -> None:
            """Everything. How long the other side may take is the configuration's `stream_idle`."""
            self._is_upgraded()
            try:
                run(self._answer.stream.write(buffer))
            except errors.MeshError as error:
                raise translate(error, None) from error.__cause__

        def close(self) -> None:
            run(self._answer.close())

        def start_tls(self, ssl_context: Any, server_hostname: str | None = None, timeout: float | None = None) -> Any:
            raise NotImplementedError("the mesh secures its connections itself")

    def stream_of(answer: Answer, *, is_async: bool) -> Any:
        return (AsyncStream if is_async else Stream)(answer)

    return SimpleNamespace(AsyncStream=AsyncStream, Stream=Stream, stream_of=stream_of)
