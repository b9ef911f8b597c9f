"""Is a streamed body sent a second time, whole and only if it is safe?"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import httpx
import pytest

import meshlib
from meshlib.client.replay import LIMIT, AsyncReplayed, Replayed, replayed

from ..support import Request, Scripted, mesh_of, ok, scripted

IDEMPOTENT = meshlib.policy(idempotent=True)


async def once(server: Scripted, request: Request) -> bytes:
    return ok(request.body)


async def never(server: Scripted, request: Request) -> bytes:
    return b"HTTP/1.1 503 Service Unavailable\r\ncontent-length: 0\r\n\r\n"


def two(first: Scripted, second: Scripted) -> dict[str, object]:
    return {"orders": {"discover": {"static": [first.address, second.address]}, "balance": {"policy": "round_robin"}}}


async def pieces(*sizes: int) -> AsyncIterator[bytes]:
    for number, size in enumerate(sizes):
        yield bytes([number]) * size


@pytest.mark.parametrize(("sizes", "status", "asked"), [((1, 2, 3), 200, 1), ((40_000, 40_000), 503, 0)])
async def test_a_streamed_body_up_to_64_kib_is_sent_again(
    tmp_path: Path, sizes: tuple[int, ...], status: int, asked: int
) -> None:
    """Whole and in order; a larger one isn't, and the first answer counts."""
    async with scripted(never) as first, scripted(once) as second:
        with mesh_of(tmp_path, two(first, second)) as mesh:
            async with mesh.client() as http:
                answer = await http.post("http://orders/", content=pieces(*sizes), extensions=IDEMPOTENT)
    whole = b"".join([bytes([number]) * size for number, size in enumerate(sizes)])
    assert (answer.status_code, len(second.requests), first.requests[0].body) == (status, asked, whole)
    if asked:
        assert second.requests[0].body == whole


async def test_a_blocking_client_sends_it_again_too(tmp_path: Path) -> None:
    """From a generator, in a thread."""

    def generated() -> Iterator[bytes]:
        yield from (b"a", b"b", b"c")

    async with scripted(never) as first, scripted(once) as second:
        with mesh_of(tmp_path, two(first, second)) as mesh, mesh.sync_client() as http:

            def post() -> httpx.Response:
                return http.post("http://orders/", content=generated(), extensions=IDEMPOTENT)

            answer = await asyncio.to_thread(post)
    assert (answer.status_code, answer.content) == (200, b"abc")


async def test_a_call_that_is_not_idempotent_is_not_repeated_because_its_body_could_be(tmp_path: Path) -> None:
    """To have the body is one thing, to be allowed another."""
    async with scripted(never) as first, scripted(once) as second:
        with mesh_of(tmp_path, two(first, second)) as mesh:
            async with mesh.client() as http:
                answer = await http.post("http://orders/", content=pieces(1, 2))
    assert (answer.status_code, len(second.requests)) == (503, 0)


def test_a_body_of_exactly_the_limit_is_kept() -> None:
    """And of one byte more it isn't."""
    for size, is_lost in ((LIMIT, False), (LIMIT + 1, True)):
        body = Replayed([bytes(size)])
        assert [len(piece) for piece in body] == [size]
        assert body.is_lost is is_lost


def test_a_second_reading_goes_on_where_the_first_stopped() -> None:
    """What was taken comes first, and the iterator is asked only for the rest."""
    body = Replayed(iter([b"a", b"b", b"c"]))
    assert next(iter(body)) == b"a"
    assert list(body) == [b"a", b"b", b"c"]
    assert list(body) == [b"a", b"b", b"c"]


async def test_an_iterator_that_was_stopped_in_the_middle_is_lost() -> None:
    """A cancelled generator is at its end: what follows would look like the whole."""

    async def slow() -> AsyncIterator[bytes]:
        yield b"a"
        await asyncio.sleep(3600)
        yield b"b"

    body = AsyncReplayed(slow())

    async def read() -> list[bytes]:
        return [piece async for piece in body]

    task = asyncio.create_task(read())
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert body.is_lost


def test_an_iterator_that_fails_is_lost() -> None:
    """Its error is the caller's, and nothing is sent again."""

    def broken() -> Iterator[bytes]:
        yield b"a"
        raise LookupError

    body = Replayed(broken())
    with pytest.raises(LookupError):
        list(body)
    assert body.is_lost


def test_a_body_of_both_kinds_is_read_as_its_caller_reads() -> None:
    """Multipart bodies can be read in both ways."""

    class Both:
        def __iter__(self) -> Iterator[bytes]:
            return iter([b"a"])

        def __aiter__(self) -> AsyncIterator[bytes]:
            return pieces(1)

    assert isinstance(replayed(Both(), is_blocking=True), Replayed)
    assert isinstance(replayed(Both(), is_blocking=False), AsyncReplayed)
