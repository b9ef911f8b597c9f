"""Do many exchanges share one HTTP/2 connection of a loop without sharing their misfortunes?

The peer is scripted step by step, on asyncio and on uvloop. Real servers are in `test_http2_servers.py`, what the wire makes of
bytes in `tests/wire/test_http2.py`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import Any

import h2.events
import pytest
from h2.errors import ErrorCodes
from h2.settings import SettingCodes

from meshlib import errors
from meshlib.client import http2
from meshlib.client.faults import IDLE_TIMEOUT, WRITE_TIMEOUT, outcome_of
from meshlib.client.terms import Terms
from tests.client.http2_peer import NEVER, attempt, run, scripted, whole

WINDOW = 256 * 1024


@pytest.fixture(params=["asyncio", "uvloop"], autouse=True)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def start(connection: http2.Http2Connection, *args: Any, **kwargs: Any) -> asyncio.Task[Any]:
    return asyncio.get_running_loop().create_task(connection.exchange(attempt(*args, **kwargs)))


def test_answers_come_in_any_order(kind: str) -> None:
    """Each call gets its own."""

    async def story() -> None:
        async with scripted() as (connection, peer):
            calls = [start(connection, target=f"/{n}") for n in range(50)]
            streams = [await peer.asked() for _ in calls]
            for stream in reversed(streams):
                peer.answer(stream, b"%d" % stream)
            assert [(await call)[4] for call in calls] == [b"%d" % stream for stream in streams]
            assert (connection.exchanges, connection.is_usable()) == (0, True)

    run(story, kind)


def test_whole_answer_is_a_reply_like_any(kind: str) -> None:
    """Status, version, no reason, headers, body."""

    async def story() -> None:
        async with scripted() as (connection, peer):
            call = start(connection, "POST", body=b"hello")
            stream = await peer.asked()
            assert (await peer.hear(h2.events.DataReceived)).data == b"hello"
            peer.answer(stream)
            assert await call == (200, 20, b"", [], b"ok")

    run(story, kind)


def test_cancelled_call_resets_its_own_stream_only(kind: str) -> None:
    """The peer is told, and the others don't notice."""

    async def story() -> None:
        async with scripted() as (connection, peer):
            first, second = start(connection), start(connection)
            streams = [await peer.asked(), await peer.asked()]
            first.cancel()
            reset = await peer.hear(h2.events.StreamReset)
            assert (reset.stream_id, reset.error_code) == (streams[0], ErrorCodes.CANCEL)
            peer.answer(streams[1])
            assert ((await second)[4], first.cancelled(), connection.exchanges) == (b"ok", True, 0)

    run(story, kind)


def test_call_that_is_late_ends_alone(kind: str) -> None:
    """Its time is its own."""

    async def story() -> None:
        async with scripted() as (connection, peer):
            hasty, patient = start(connection, seconds=0.05), start(connection)
            streams = [await peer.asked(), await peer.asked()]
            with pytest.raises(errors.AttemptTimeout) as caught:
                await hasty
            assert (caught.value.is_written, "did not answer in time" in str(caught.value)) == (True, True)
            assert (await peer.hear(h2.events.StreamReset)).stream_id == streams[0]
            peer.answer(streams[1])
            assert (await patient)[4] == b"ok"

    run(story, kind)


def test_refused_stream_and_failed_stream_are_told_apart(kind: str) -> None:
    """The first is safe to send again, whatever its method."""

    async def story() -> None:
        async with scripted() as (connection, peer):
            calls = [start(connection, "POST", body=b"x"), start(connection, "POST", body=b"x")]
            for code in (ErrorCodes.REFUSED_STREAM, ErrorCodes.INTERNAL_ERROR):
                peer.reset(await peer.asked(), code)
            found = await asyncio.gather(*calls, return_exceptions=True)
            assert [(type(e), e.reason, e.is_written) for e in found if isinstance(e, errors.AttemptFailed)] == [
                (errors.ConnectionLost, "send.declined", False),
                (errors.ConnectionLost, "send.closed", True),
            ]
            assert connection.is_usable()

    run(story, kind)


def test_goaway_ends_what_was_not_processed_and_then_the_connection(kind: str) -> None:
    """No new exchanges meanwhile; the last one that goes on takes the connection with it."""

    async def story() -> None:
        async with scripted() as (connection, peer):
            below, above = start(connection), start(connection, "POST", body=b"x")
            stream = await peer.asked()
            await peer.asked()
            peer.h2.close_connection(last_stream_id=stream)
            peer.flush()
            with pytest.raises(errors.ConnectionLost) as caught:
                await above
            assert (caught.value.reason, caught.value.is_written) == ("send.unwritten", False)
            assert (connection.is_usable(), connection.is_gone(), connection.exchanges) == (False, False, 1)
            carrier: Any = connection._carrier
            assert (carrier.retired, carrier.forgotten) == ([connection], [])
            with pytest.raises(errors.ConnectionLost) as caught:
                await connection.exchange(attempt())
            assert (caught.value.reason, caught.value.is_written) == ("send.unwritten", False)
            peer.h2.state_machine.state = type(peer.h2.state_machine.state).CLIENT_OPEN
            peer.answer(stream)
            assert (await below)[4] == b"ok"
            assert (connection.is_gone(), carrier.forgotten) == (True, [connection])

    run(story, kind)


def test_lost_connection_fails_each_call_with_an_error_of_its_own(kind: str) -> None:
    """Who catches one may write into it."""

    async def story() -> None:
        async with scripted() as (connection, peer):
            calls = [start(connection) for _ in range(3)]
            for _ in calls:
                await peer.asked()
            peer.writer.transport.abort()
            found = await asyncio.gather(*calls, return_exceptions=True)
            assert {(type(e), getattr(e, "reason", "")) for e in found} == {(errors.ConnectionLost, "send.closed")}
            assert (len({id(error) for error in found}), connection.is_gone(), connection.end) == (3, True, NEVER)

    run(story, kind)


def test_connection_closed_under_a_new_call_is_stale(kind: str) -> None:
    """It had been used before, and not a byte came since the call."""

    async def story() -> None:
        async with scripted() as (connection, peer):
            call = start(connection)
            peer.answer(await peer.asked())
            await call
            call = start(connection)
            await peer.asked()
            # Nothing goes back, not even to the client's last words.
            peer.writer.transport.abort()
            with pytest.raises(errors.ConnectionLost) as caught:
                await call
            assert caught.value.reason == "send.stale"

    run(story, kind)


def test_streamed_answer_waits_for_its_reader_and_others_do_not(kind: str) -> None:
    """The peer may send a window, and as much again as was read."""

    async def story() -> None:
        async with scripted() as (connection, peer):
            slow = start(connection)
            stream = await peer.asked()
            peer.head(stream)
            reply = await slow
            sent = 0
            while room := min(peer.h2.local_flow_control_window(stream), 16_000):
                peer.body(stream, bytes(room))
                sent += room
            assert sent == WINDOW
            quick = start(connection)
            peer.answer(await peer.asked())
            assert (await quick)[4] == b"ok"
            assert peer.h2.local_flow_control_window(stream) == 0
            got = 0
            while got < WINDOW:
                got += len(await reply[4].read())
            while peer.h2.local_flow_control_window(stream) < WINDOW // 2:
                await peer.hear(h2.events.WindowUpdated)
            peer.body(stream, b"end", is_last=True)
            assert (await whole(reply), await reply[4].read()) == (b"end", b"")

    run(story, kind)


def test_body_that_breaks_off_is_read_to_the_break(kind: str) -> None:
    """And then says why; a body that is given up is reset."""

    async def story() -> None:
        async with scripted() as (connection, peer):
            calls = [start(connection), start(connection)]
            streams = [await peer.asked(), await peer.asked()]
            for stream in streams:
                peer.head(stream)
                peer.body(stream, b"half")
            broken, dropped = [await call for call in calls]
            peer.reset(streams[0], ErrorCodes.INTERNAL_ERROR)
            assert await broken[4].read() == b"half"
            with pytest.raises(errors.ConnectionLost, match="INTERNAL_ERROR"):
                await broken[4].read()
            await dropped[4].close()
            assert (await peer.hear(h2.events.StreamReset)).stream_id == streams[1]
            assert (connection.exchanges, connection.is_usable()) == (0, True)

    run(story, kind)


def test_silent_body_is_late_but_a_slow_reader_is_not(kind: str) -> None:
    """What counts is the time between two pieces of the peer's, while somebody waits for one."""

    async def story() -> None:
        async with scripted() as (connection, peer):
            terms = Terms(read=0.1, is_explicit=True)
            call = start(connection, terms=terms)
            stream = await peer.asked()
            peer.head(stream)
            reply = await call
            # Nobody reads: longer than the limit, and nothing happens.
            await asyncio.sleep(0.25)
            peer.body(stream, b"x")
            assert await reply[4].read() == b"x"
            with pytest.raises(errors.AttemptTimeout) as caught:
                await reply[4].read()
            assert caught.value.reason == IDLE_TIMEOUT
            assert (await peer.hear(h2.events.StreamReset)).stream_id == stream

    run(story, kind)


class Upload:
    """An iterator that tells how far it was drawn and whether it was put away."""

    def __init__(self, pieces: list[bytes], *, hangs: bool = False) -> None:
        self.pieces, self.hangs = pieces, hangs
        self.drawn = 0
        self.is_closed = False

    async def __aiter__(self) -> AsyncIterator[bytes]:
        try:
            for piece in self.pieces:
                self.drawn += 1
                yield piece
            if self.hangs:
                await asyncio.Event().wait()
        finally:
            self.is_closed = True


def test_upload_goes_as_fast_as_the_peer_reads(kind: str) -> None:
    """A mebibyte through a window of 64 KiB: pieces are drawn only when there is room."""

    async def story() -> None:
        async with scripted() as (connection, peer):
            peer.is_reading_on = False
            body = Upload([bytes([n]) * 16_384 for n in range(64)])
            given = attempt("POST", body=body)
            call = asyncio.create_task(connection.exchange(given))
            stream = await peer.asked()
            got = b""
            while len(got) < 65_535:
                got += (await peer.hear(h2.events.DataReceived)).data
            await asyncio.sleep(0.05)
            # Four are in the window but for a byte, and the fourth waits.
            assert (len(got), body.drawn, call.done()) == (65_535, 4, False)
            while len(got) < 1024 * 1024:
                peer.h2.acknowledge_received_data(65_535 if len(got) % 65_535 == 0 else len(got) % 65_535, stream)
                peer.flush()
                got += (await peer.hear(h2.events.DataReceived)).data
            assert got == b"".join(body.pieces)
            peer.answer(stream)
            assert ((await call)[0], body.is_closed) == (200, True)

    run(story, kind)


@pytest.mark.parametrize("make", [list, iter, lambda pieces: b"".join(pieces)], ids=["list", "iterator", "bytes"])
def test_any_large_body_arrives_whole(kind: str, make: Any) -> None:
    """Blocking iterators and bytes above a write's size take the same way."""

    async def story() -> None:
        async with scripted() as (connection, peer):
            pieces = [bytes([n % 251]) * 50_000 for n in range(60)]
            body: Iterator[bytes] = make(pieces)
            call = start(connection, "PUT", body=body)
            stream = await peer.asked()
            got = []
            while (event := await peer.heard.get()) is not None:
                if isinstance(event, h2.events.DataReceived):
                    got.append(event.data)
                if isinstance(event, h2.events.StreamEnded):
                    break
            peer.answer(stream)
            assert ((await call)[0], b"".join(got) == b"".join(pieces)) == (200, True)

    run(story, kind)


@pytest.mark.parametrize("is_blocked", [False, True])
def test_early_answer_wins_over_the_upload(kind: str, is_blocked: bool) -> None:
    """Whether the iterator or the window holds it up; the iterator is put away, and the connection serves on."""

    async def story() -> None:
        async with scripted() as (connection, peer):
            peer.is_reading_on = False
            body = Upload([bytes(100_000)] * 5 if is_blocked else [b"x"], hangs=True)
            call = start(connection, "POST", body=body)
            stream = await peer.asked()
            await peer.hear(h2.events.DataReceived)
            peer.answer(stream, b"too much")
            assert ((await call)[4], body.is_closed) == (b"too much", True)
            call = start(connection)
            peer.answer(await peer.asked())
            assert (await call)[4] == b"ok"

    run(story, kind)


def test_upload_that_the_peer_does_not_take_is_late(kind: str) -> None:
    """The window never opens: the write timeout says so."""

    async def story() -> None:
        async with scripted() as (connection, peer):
            peer.is_reading_on = False
            call = start(connection, "POST", body=Upload([bytes(100_000)] * 5), terms=Terms(write=0.1, is_explicit=True))
            await peer.asked()
            with pytest.raises(errors.AttemptTimeout) as caught:
                await call
            assert caught.value.reason == WRITE_TIMEOUT

    run(story, kind)


def test_broken_iterator_ends_its_own_stream(kind: str) -> None:
    """Its error is the caller's, and the peer doesn't take half a body for a whole one."""

    async def broken() -> AsyncIterator[bytes]:
        yield b"half"
        raise KeyError("mine")

    async def story() -> None:
        async with scripted() as (connection, peer):
            call = start(connection, "POST", body=broken())
            stream = await peer.asked()
            with pytest.raises(KeyError, match="mine"):
                await call
            assert (await peer.hear(h2.events.StreamReset)).stream_id == stream
            assert connection.is_usable()

    run(story, kind)


def test_peers_limit_on_streams_is_kept(kind: str) -> None:
    """A connection that is full takes nothing, and what was not sent is safe to send elsewhere."""

    async def story() -> None:
        async with scripted({SettingCodes.MAX_CONCURRENT_STREAMS: 2}) as (connection, peer):
            calls = [start(connection), start(connection)]
            streams = [await peer.asked(), await peer.asked()]
            assert not connection.is_usable()
            with pytest.raises(errors.ConnectionLost) as caught:
                await connection.exchange(attempt())
            assert outcome_of(caught.value) == outcome_of(errors.ConnectionLost("", reason="send.unwritten"))
            peer.answer(streams[0])
            await calls[0]
            assert connection.is_usable()
            peer.answer(streams[1])
            await calls[1]

    run(story, kind)


def test_idle_connection_goes_with_a_farewell(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before its peer would close it."""
    monkeypatch.setattr(http2, "KEEP", 0.05)

    async def story() -> None:
        async with scripted() as (connection, peer):
            call = start(connection)
            stream = await peer.asked()
            await asyncio.sleep(0.1)
            assert not connection.is_gone()
            peer.answer(stream)
            await call
            assert (await peer.hear(h2.events.ConnectionTerminated)).error_code == ErrorCodes.NO_ERROR
            assert (connection.is_gone(), connection._carrier.forgotten) == (True, [connection])  # type: ignore[attr-defined]

    run(story, kind)


def test_closing_client_tells_whoever_waits(kind: str) -> None:
    """Our own doing says nothing of the endpoint."""

    async def story() -> None:
        async with scripted() as (connection, peer):
            waiting = start(connection)
            reading = start(connection)
            await peer.asked()
            peer.head(await peer.asked())
            reply = await reading
            connection.abort()
            for late in (waiting, reply[4].read()):
                with pytest.raises(errors.ConnectionLost) as caught:
                    await late
                assert caught.value.reason == "send.client_closed"

    run(story, kind)


def test_error_of_the_connection_is_told_to_each_call_as_its_own(kind: str) -> None:
    """Each is told what happened, and the record of its call is written into no other's."""

    async def story() -> None:
        async with scripted() as (connection, peer):
            calls = [start(connection), start(connection)]
            for _ in calls:
                await peer.asked()
            connection.abort(errors.TlsError("broken", hint="look", is_written=True))
            found: list[Any] = await asyncio.gather(*calls, return_exceptions=True)
            assert [(type(e), e.message, e.hint, e.is_written) for e in found] == [(errors.TlsError, "broken", "look", True)] * 2
            assert found[0] is not found[1]

    run(story, kind)


def test_goaway_on_an_idle_connection_closes_it(kind: str) -> None:
    """Nobody is waited for."""

    async def story() -> None:
        async with scripted() as (connection, peer):
            peer.h2.close_connection()
            peer.flush()
            while await peer.heard.get() is not None:
                pass
            peer.heard.put_nowait(None)
            assert (connection.is_gone(), connection.is_usable()) == (True, False)

    run(story, kind)


def test_peer_that_breaks_the_rules_is_left_with_all_its_streams(kind: str) -> None:
    """A broken connection is no half-broken one."""

    async def story() -> None:
        async with scripted() as (connection, peer):
            calls = [start(connection), start(connection)]
            await peer.asked()
            peer.writer.write(b"\x00\x00\x01\x01\x04\x00\x00\x00\x01\xff")
            found = await asyncio.gather(*calls, return_exceptions=True)
            assert [type(error) for error in found] == [errors.ProtocolError] * 2
            assert connection.is_gone()

    run(story, kind)


def test_cancellation_after_any_step_leaves_nothing_behind(kind: str) -> None:
    """Upload, head and body, cancelled after each turn of the loop: the stream is gone on both sides, the connection serves on."""

    async def story() -> None:
        async with scripted() as (connection, peer):

            async def serve() -> None:
                while True:
                    stream = await peer.asked()
                    peer.h2.send_headers(stream, [(":status", "200")])
                    peer.h2.send_data(stream, bytes(30_000), end_stream=False)
                    peer.flush()

            async def call() -> None:
                reply: Any = await connection.exchange(attempt("POST", body=Upload([b"a", b"b", bytes(70_000)])))
                for _ in range(2):
                    await reply[4].read()
                await reply[4].close()

            serving = asyncio.create_task(serve())
            for steps in range(40):
                task = asyncio.create_task(call())
                for _ in range(steps):
                    await asyncio.sleep(0)
                task.cancel()
                await asyncio.wait((task,))
                assert (connection.exchanges, connection.is_usable()) == (0, True)
            serving.cancel()
            await asyncio.wait((serving,))

    run(story, kind)
