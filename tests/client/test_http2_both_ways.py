"""Do both directions of an HTTP/2 exchange flow at once?

An answer that begins before the request has ended doesn't end it: what goes up goes on while the answer is read, until the stream
itself ends. The peer is scripted; whole answers that come early are in `test_http2.py`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import h2.events
import pytest
from h2.errors import ErrorCodes

from meshlib.client import http2
from tests.client.http2_peer import attempt, run, scripted


@pytest.fixture(params=["asyncio", "uvloop"], autouse=True)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


class Upload:
    """A body whose next piece is what somebody puts in; None is its end, an error its failure."""

    def __init__(self) -> None:
        self.pieces: asyncio.Queue[bytes | Exception | None] = asyncio.Queue()
        self.is_closed = False

    async def __aiter__(self) -> AsyncIterator[bytes]:
        try:
            while (piece := await self.pieces.get()) is not None:
                if isinstance(piece, Exception):
                    raise piece
                yield piece
        finally:
            self.is_closed = True


async def begun(connection: http2.Http2Connection, peer: Any, body: Upload) -> tuple[int, Any]:
    """An exchange whose answer has begun while its request goes on."""
    call = asyncio.ensure_future(connection.exchange(attempt("POST", body=body)))
    stream = await peer.asked()
    peer.head(stream)
    return stream, (await call)[4]


def test_upload_goes_on_while_the_answer_is_read(kind: str) -> None:
    """Each piece is answered before the next one is made, and the end of the one is the end of the other."""

    async def story() -> None:
        async with scripted() as (connection, peer):
            body = Upload()
            stream, answer = await begun(connection, peer, body)
            for n in range(5):
                body.pieces.put_nowait(b"%d" % n)
                peer.body(stream, (await peer.hear(h2.events.DataReceived)).data)
                assert await answer.read() == b"%d" % n
            body.pieces.put_nowait(None)
            await peer.hear(h2.events.StreamEnded)
            peer.body(stream, b"", is_last=True)
            assert (await answer.read(), body.is_closed, connection.exchanges) == (b"", True, 0)

    run(story, kind)


def test_end_of_the_answer_ends_the_upload(kind: str) -> None:
    """The rest is for nobody: its iterator is put away, and the peer is told."""

    async def story() -> None:
        async with scripted() as (connection, peer):
            body = Upload()
            stream, answer = await begun(connection, peer, body)
            peer.body(stream, b"enough", is_last=True)
            assert [await answer.read(), await answer.read()] == [b"enough", b""]
            assert (body.is_closed, connection.exchanges) == (True, 0)
            assert (await peer.hear(h2.events.StreamReset)).stream_id == stream

    run(story, kind)


def test_closing_the_answer_ends_the_upload(kind: str) -> None:
    """Whoever leaves the answer leaves the request, too."""

    async def story() -> None:
        async with scripted() as (connection, peer):
            body = Upload()
            _, answer = await begun(connection, peer, body)
            body.pieces.put_nowait(b"more")
            await peer.hear(h2.events.DataReceived)
            await answer.close()
            assert (body.is_closed, connection.exchanges) == (True, 0)
            assert (await peer.hear(h2.events.StreamReset)).error_code == ErrorCodes.CANCEL

    run(story, kind)


def test_iterator_that_fails_later_fails_the_answer(kind: str) -> None:
    """Half a request isn't taken for a whole one, and its error comes out where the answer is read."""

    async def story() -> None:
        async with scripted() as (connection, peer):
            body = Upload()
            _, answer = await begun(connection, peer, body)
            body.pieces.put_nowait(ZeroDivisionError("mine"))
            with pytest.raises(ZeroDivisionError, match="mine"):
                await answer.read()
            assert connection.exchanges == 0
            assert (await peer.hear(h2.events.StreamReset)).error_code == ErrorCodes.CANCEL

    run(story, kind)


def test_head_opens_no_window(kind: str) -> None:
    """A peer that answers and doesn't read is not flooded: no piece more is drawn than its window holds."""

    async def story() -> None:
        async with scripted() as (connection, peer):
            peer.is_reading_on = False
            body = Upload()
            stream, answer = await begun(connection, peer, body)
            for _ in range(8):
                body.pieces.put_nowait(bytes(40_000))
            got = 0
            while got < 65_535:
                got += len((await peer.hear(h2.events.DataReceived)).data)
            peer.body(stream, b"and now?")
            assert await answer.read() == b"and now?"
            assert body.pieces.qsize() == 6
            await answer.close()

    run(story, kind)
