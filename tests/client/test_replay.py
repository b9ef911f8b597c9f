"""Is a streamed body sent a second time, whole and only if it is safe?"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import httpx
import pytest

import meshlib
from meshlib.client.replay import AHEAD, LIMIT, AsyncReplayed, Replayed, replayed
from meshlib.client.upload import feed
from meshlib.client.way import Attempt

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


# --- a body that is held: taken by somebody who has no connection yet, and may fail


class Steps:
    """A body whose pieces come when they are let go."""

    def __init__(self) -> None:
        self.go = asyncio.Semaphore(0)
        self.error: Exception | None = None
        self.is_closed = False

    async def pieces(self) -> AsyncIterator[bytes]:
        try:
            for number in range(3):
                await self.go.acquire()
                if self.error is not None:
                    raise self.error
                yield b"%d" % number
        finally:
            self.is_closed = True


class Upload:
    """An upload of a held body, and what it has pushed."""

    def __init__(self, body: AsyncReplayed) -> None:
        self.pushed: list[bytes] = []
        self.is_over = False
        attempt = Attempt("", "", None, "POST", "/", [], body, 0.0, 1.0)
        self.task = asyncio.ensure_future(feed(attempt, self._push))

    async def _push(self, piece: bytes | memoryview, is_last: bool) -> bool:
        if self.is_over:
            return False
        self.pushed.append(bytes(piece))
        return True

    async def give_up(self) -> None:
        self.is_over = True
        self.task.cancel()
        await asyncio.wait((self.task,))


async def held() -> tuple[Steps, AsyncReplayed, Upload]:
    """A held body in the middle of its second piece."""
    steps = Steps()
    body = AsyncReplayed(steps.pieces())
    body.hold()
    upload = Upload(body)
    steps.go.release()
    await asyncio.sleep(0.01)
    assert upload.pushed == [b"0"]
    return steps, body, upload


@pytest.mark.parametrize("is_held", [True, False])
async def test_a_generator_in_the_middle_of_a_piece_outlives_an_attempt(is_held: bool) -> None:
    """The piece is the next attempt's, with all before it; also where that one sends it by other means."""
    steps, body, upload = await held()
    await upload.give_up()
    assert not body.is_lost
    body.is_held = is_held
    again = Upload(body)
    for _ in range(2):
        steps.go.release()
    await asyncio.wait_for(again.task, 1.0)
    assert again.pushed == [b"0", b"1", b"2", b""]
    assert upload.pushed == [b"0"]
    assert steps.is_closed


async def test_a_generator_that_fails_between_two_attempts_is_not_taken_for_whole() -> None:
    """Its error is that of the next one."""
    steps, body, upload = await held()
    await upload.give_up()
    steps.error = LookupError()
    steps.go.release()
    await asyncio.sleep(0.01)
    with pytest.raises(LookupError):
        await Upload(body).task


async def test_a_held_body_is_put_away_when_the_call_has_failed() -> None:
    """Though a generator was left in the middle of a piece."""
    steps, body, upload = await held()
    await upload.give_up()
    await body.close()
    assert steps.is_closed
    assert body.is_lost


@pytest.mark.parametrize("is_given_up", [True, False])
async def test_a_held_body_is_put_away_with_its_answer(is_given_up: bool) -> None:
    """At once, or when the upload that goes on beside it ends."""
    steps, body, upload = await held()
    if is_given_up:
        await upload.give_up()
    await body.release()
    assert steps.is_closed is is_given_up
    await upload.give_up()
    assert steps.is_closed


def test_what_is_taken_ahead_of_a_connection_is_kept() -> None:
    """All that fits into the window, and the piece that waits behind it."""
    for sizes, is_lost in (((AHEAD, 1_000_000), False), ((AHEAD, 1, 1), True)):
        body = Replayed([bytes(size) for size in sizes])
        body.hold()
        assert [len(piece) for piece in body] == list(sizes)
        assert body.is_lost is is_lost
