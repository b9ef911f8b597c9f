"""How does a connection that was attested speak gRPC?

The gRPC library for Python can't say who is at the other end of a UNIX socket, so the agent accepts its sockets by itself, and this is
the server behind: calls with one request, and one answer or a stream of them, over HTTP/2 by the library `h2`, on a connection that
somebody else has accepted. Whoever is at the other end is on this machine, and not trusted: everything is bounded (`Limits`).

    who doesn't read      isn't read either; what they leave lying for 10 s, in our buffer, the kernel's, or behind a closed window of
                          HTTP/2, costs them the connection. So a stream never holds more than one message
    who doesn't say       within 10 s that it is HTTP/2, or the rest of a request, is not waited for
    who says too much     headers, messages, streams, resets, frames: the call is refused, or the connection is ended (GOAWAY)

Frames are counted for all connections of one user together (`Tally`), since a connection that was ended is opened anew; a call that is
answered, and every message of an answer, gives some of them back, so that who only has much to ask is never taken for a flood. Bytes are
read in small pieces, between which it is the others' turn.

A method is an asynchronous generator: request in, messages out, one of them where the call is unary. It ends otherwise by raising
`Ended` with a status. What nobody expected becomes Unknown, and says nothing.

No TLS, no compression, no streams of requests, no trailers of requests.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import socket
import struct
import termios
from collections import deque
from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, Final

import h2.config
import h2.connection
import h2.errors
import h2.events
import h2.exceptions
import h2.settings
from hyperframe.frame import GoAwayFrame

from .frames import Frames, Tally

log = logging.getLogger("meshlib.agent")


class Code(IntEnum):
    """gRPC's statuses, those that are used here."""

    OK = 0
    UNKNOWN = 2
    INVALID_ARGUMENT = 3
    DEADLINE_EXCEEDED = 4
    PERMISSION_DENIED = 7
    RESOURCE_EXHAUSTED = 8
    UNIMPLEMENTED = 12
    INTERNAL = 13
    UNAVAILABLE = 14


class Ended(Exception):  # no error of ours: it is the answer
    """How a call ends, if not well. The text goes to the caller, and is a constant: it must not tell what is known of them."""

    def __init__(self, code: Code, text: str) -> None:
        super().__init__(text)
        self.code, self.text = code, text


@dataclass(frozen=True, slots=True)
class Limits:
    """What one connection may cost. Times in seconds."""

    streams: int = 32
    # In all, before the connection ends; 0 for as many as they like.
    calls: int = 0
    header_bytes: int = 16 * 1024
    headers: int = 100
    message: int = 64 * 1024
    # Of one request. More is somebody who sends them empty.
    data_frames: int = 1000
    preface: float = 10.0
    request: float = 10.0
    write: float = 10.0
    # Without a call.
    idle: float = 300.0
    longest_timeout: float = 3600.0
    # Within `window`: streams that were reset, ours and theirs; and, over all connections of a user, frames that led to no answer.
    resets: int = 100
    frames: int = 20_000
    window: float = 30.0


Metadata = tuple[tuple[bytes, bytes], ...]


@dataclass(frozen=True, slots=True)
class Method:
    """What answers a call. `is_streaming`: it lasts, and is ended when the server goes."""

    handler: Callable[[bytes], AsyncGenerator[bytes, None]]
    is_streaming: bool = False


@dataclass(slots=True, eq=False)
class _Call:
    stream: int
    method: Method
    timeout: float | None
    body: bytearray = field(default_factory=bytearray)
    frames: int = 0
    is_whole: asyncio.Event = field(default_factory=asyncio.Event)
    has_begun: bool = False  # to answer
    task: asyncio.Task[None] | None = None


class _Over(Exception):  # the connection ends now
    pass


# Frames that an answered call, and each message, gives back: those of the call, and what clients say meanwhile of windows and pings. It
# costs us more than they do. A stream that was reset counts as so many.
_ANSWERED: Final = 8
_RESET: Final = 8
# Of what is read: empty frames have 9 bytes, so that a piece holds some hundreds of them. And of what is written.
_READ: Final = 4 * 1024
_PIECE: Final = 64 * 1024
_PREFIX: Final = struct.Struct(">BI")
_UNITS: Final = {b"H": 3600.0, b"M": 60.0, b"S": 1.0, b"m": 1e-3, b"u": 1e-6, b"n": 1e-9}
# How long the last words of a connection are waited for.
_PARTING: Final = 1.0


class Connection:
    """One connection, from its preface to its end. `check(metadata)` raises Ended for calls that no method shall see.

    `tally` is that of the user at the other end.
    """

    def __init__(
        self,
        sock: socket.socket,
        methods: Mapping[bytes, Method],
        *,
        check: Callable[[Metadata], None] = lambda _: None,
        limits: Limits = Limits(),
        tally: Tally | None = None,
        earns: Callable[[], bool] = lambda: True,
    ) -> None:
        self._sock = sock
        # Does an answer give back what asking for it cost?
        self._earns = earns
        self._methods = methods
        self._check = check
        self._limits = limits
        config = h2.config.H2Configuration(client_side=False, header_encoding=None)
        self._h2 = h2.connection.H2Connection(config)
        codes = h2.settings.SettingCodes
        self._h2.local_settings = h2.settings.Settings(
            client=False,
            initial_values={
                codes.MAX_CONCURRENT_STREAMS: limits.streams,
                codes.MAX_HEADER_LIST_SIZE: limits.header_bytes,
                codes.INITIAL_WINDOW_SIZE: limits.message + _PREFIX.size,
                codes.ENABLE_PUSH: 0,
            },
        )
        # The settings are told to them; the decoder keeps a bound of its own.
        self._h2.decoder.max_header_list_size = limits.header_bytes
        self._calls: dict[int, _Call] = {}
        self._out = bytearray()
        self._moved = asyncio.Event()  # replaced each time that something has moved: windows, the buffer, the end
        self._ending: str = ""
        self._is_draining = False
        self._begun = 0
        self._resets: deque[float] = deque()
        self._tally = tally or Tally(limits.window)
        self._frames = Frames()
        self._unread_since: float | None = None
        self._timers: dict[str, asyncio.TimerHandle] = {}

    @property
    def calls(self) -> int:
        return len(self._calls)

    # ------------------------------------------------------------------------------------------------ its life

    async def serve(self) -> None:
        """Until it ends. Cancelled, it is cut; the socket stays the caller's to close."""
        loop = asyncio.get_running_loop()
        self._loop = loop
        self._sock.setblocking(False)
        self._h2.initiate_connection()
        self._flush()
        self._after("preface", self._limits.preface)
        reading, writing = loop.create_task(self._read()), loop.create_task(self._write())
        try:
            await asyncio.wait({reading, writing}, return_when=asyncio.FIRST_COMPLETED)
            if reading.done() and not writing.done():
                await self._say_goodbye(writing)
        finally:
            for timer in self._timers.values():
                timer.cancel()
            calls = [call.task for call in self._calls.values() if call.task is not None]
            self._calls.clear()
            for task in (reading, writing, *calls):
                task.cancel()
            ends = await asyncio.gather(reading, writing, *calls, return_exceptions=True)
            for end in ends:
                if isinstance(end, Exception) and not isinstance(end, OSError):
                    log.error("a connection of the agent's gRPC server failed", exc_info=end)
            with contextlib.suppress(OSError):
                self._sock.shutdown(socket.SHUT_RDWR)

    async def drain(self, seconds: float = _PARTING) -> None:
        """Streams end with Unavailable, calls that don't last may end within the time, and then the connection does (GOAWAY)."""
        self._is_draining = True
        # Said before the streams end: whoever comes again at once must not do so on this connection. h2 has no GOAWAY that ends nothing.
        goodbye = GoAwayFrame(0)
        goodbye.last_stream_id = self._h2.highest_inbound_stream_id
        self._flush()
        self._out += goodbye.serialize()
        self._tell()
        for call in tuple(self._calls.values()):
            if call.task is not None and call.method.is_streaming:
                call.task.cancel()
        tasks = [call.task for call in self._calls.values() if call.task is not None]
        if tasks:
            await asyncio.wait(tasks, timeout=seconds)
        self._end("drained", h2.errors.ErrorCodes.NO_ERROR)

    async def _say_goodbye(self, writing: asyncio.Task[None]) -> None:
        """What is still to be written, a GOAWAY with it, goes out if it goes out soon."""
        self._flush()
        end = self._loop.time() + _PARTING
        while self._out and not writing.done() and (left := end - self._loop.time()) > 0:
            moved = self._moved
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(moved.wait(), left)

    def _end(self, why: str, code: h2.errors.ErrorCodes) -> None:
        """The reader ends, and with it the connection, after a GOAWAY."""
        if not self._ending:
            self._ending = why
            with contextlib.suppress(h2.exceptions.ProtocolError):
                self._h2.close_connection(code)
            self._flush()
            self._reading_wakes()

    def _reading_wakes(self) -> None:
        # A reader waits in the kernel: nothing more comes in, which it takes for the end.
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RD)
        self._tell()

    def _after(self, name: str, seconds: float) -> None:
        self._never(name)
        self._timers[name] = self._loop.call_later(seconds, self._is_due, name)

    def _never(self, name: str) -> None:
        timer = self._timers.pop(name, None)
        if timer is not None:
            timer.cancel()

    def _is_due(self, name: str) -> None:
        self._timers.pop(name, None)
        if name == "unread":
            self._look_at_unread()
        elif name == "idle":
            self._end("idle", h2.errors.ErrorCodes.NO_ERROR)
        else:
            self._cut(name)

    def _cut(self, why: str) -> None:
        """Nothing more is said: the other side doesn't listen, or never spoke."""
        self._ending = self._ending or why
        self._out.clear()
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        self._tell()

    def _tell(self) -> None:
        moved, self._moved = self._moved, asyncio.Event()
        moved.set()

    # ------------------------------------------------------------------------------------------------ bytes

    async def _read(self) -> None:
        is_first = True
        while not self._ending:
            while len(self._out) > _PIECE and not self._ending:
                await self._moved.wait()
            data = await self._loop.sock_recv(self._sock, _READ)
            if not data or self._ending:
                return
            try:
                self._count_frames(self._frames.of(data))  # before they cost anything
                for event in self._h2.receive_data(data):
                    if is_first and isinstance(event, h2.events.RemoteSettingsChanged):
                        is_first = False
                        self._never("preface")
                        self._after("idle", self._limits.idle)
                    self._meet(event)
            except h2.exceptions.ProtocolError:
                self._end("protocol", h2.errors.ErrorCodes.PROTOCOL_ERROR)
            except _Over:
                self._end("flood", h2.errors.ErrorCodes.ENHANCE_YOUR_CALM)
            self._flush()
            self._tell()
            # What is there already is answered without a pause: others want the loop too.
            await asyncio.sleep(0)

    async def _write(self) -> None:
        while True:
            if not self._out:
                await self._moved.wait()
                continue
            piece = bytes(self._out[:_PIECE])
            self._mark_unread()
            try:
                async with asyncio.timeout(self._limits.write):
                    await self._loop.sock_sendall(self._sock, piece)
            except TimeoutError:
                self._cut("unread")
            except OSError:
                self._cut("gone")
            if self._ending and not self._out:
                return
            del self._out[: len(piece)]
            self._tell()

    def _flush(self) -> None:
        if data := self._h2.data_to_send():
            self._out += data
            self._tell()

    def _mark_unread(self) -> None:
        """Before something is written: has all that was written before been read?"""
        if self._unread_since is None or not _unread(self._sock):
            self._unread_since = self._loop.time()
        if "unread" not in self._timers:
            self._after("unread", self._limits.write)

    def _look_at_unread(self) -> None:
        since = self._unread_since
        if since is None or not _unread(self._sock):
            self._unread_since = None
        elif (left := since + self._limits.write - self._loop.time()) > 0:
            self._after("unread", left)
        else:
            self._cut("unread")

    # ------------------------------------------------------------------------------------------------ frames

    def _count_frames(self, count: int) -> None:
        if not self._tally.add(count, self._limits.frames):
            raise _Over

    def _count_reset(self) -> None:
        now = self._loop.time()
        self._resets.append(now)
        while now - self._resets[0] > self._limits.window:
            self._resets.popleft()
        if len(self._resets) > self._limits.resets or not self._tally.add(_RESET, self._limits.frames):
            raise _Over

    def _meet(self, event: h2.events.Event) -> None:
        if isinstance(event, h2.events.RequestReceived):
            self._begin(_known(event.stream_id), event.headers or (), is_whole=event.stream_ended is not None)
        elif isinstance(event, h2.events.DataReceived):
            self._take(_known(event.stream_id), event.data or b"", event.flow_controlled_length or 0)
        elif isinstance(event, h2.events.StreamEnded):
            if call := self._calls.get(_known(event.stream_id)):
                call.is_whole.set()
        elif isinstance(event, h2.events.StreamReset):
            self._forget(_known(event.stream_id))
            self._count_reset()
        elif isinstance(event, h2.events.ConnectionTerminated):
            # They begin no calls any more; when those that are open have ended, they hang up.
            self._is_draining = True

    def _begin(self, stream: int, headers: Any, *, is_whole: bool) -> None:
        is_over = 0 < self._limits.calls <= self._begun
        if self._is_draining or is_over or len(self._calls) >= self._limits.streams:
            self._reset(stream, h2.errors.ErrorCodes.REFUSED_STREAM)
            return
        self._begun += 1
        try:
            if len(headers) > self._limits.headers:
                raise Ended(Code.RESOURCE_EXHAUSTED, "too many headers")
            metadata: Metadata = tuple((bytes(name), bytes(value)) for name, value in headers)
            named = dict(metadata)
            if named.get(b":method") != b"POST" or not _is_grpc(named.get(b"content-type", b"")):
                self._answer(stream, [(b":status", b"415")], is_whole=is_whole)
                return
            self._check(metadata)
            method = self._methods.get(named.get(b":path", b""))
            if method is None:
                raise Ended(Code.UNIMPLEMENTED, "there is no such method here")
            if named.get(b"grpc-encoding", b"identity") != b"identity":
                raise Ended(Code.UNIMPLEMENTED, "compression is not supported")
            timeout = _timeout(named.get(b"grpc-timeout"), self._limits.longest_timeout)
        except Ended as ended:
            self._answer(stream, _trailers(ended.code, ended.text, is_only=True), is_whole=is_whole)
            return
        call = _Call(stream, method, timeout)
        if is_whole:
            call.is_whole.set()
        self._calls[stream] = call
        self._never("idle")
        call.task = self._loop.create_task(self._run(call))

    def _take(self, stream: int, data: bytes, length: int) -> None:
        call = self._calls.get(stream)
        if call is not None:
            call.frames += 1
            call.body += data
            if len(call.body) > self._limits.message + _PREFIX.size or call.frames > self._limits.data_frames:
                self._finish(call, Code.RESOURCE_EXHAUSTED, "the request is too large")
        if length:
            # The stream may be closed by now; the connection's window is to be given back all the same.
            with contextlib.suppress(h2.exceptions.StreamClosedError):
                self._h2.acknowledge_received_data(length, stream)

    # ------------------------------------------------------------------------------------------------ calls

    async def _run(self, call: _Call) -> None:
        ended: tuple[Code, str]
        try:
            async with asyncio.timeout(call.timeout) as limit:
                request = await self._request(call)
                async with contextlib.aclosing(call.method.handler(request)) as messages:
                    async for message in messages:
                        await self._send(call, message)
            ended = (Code.OK, "")
        except Ended as error:
            ended = (error.code, error.text)
        except TimeoutError:
            ended = (
                (Code.DEADLINE_EXCEEDED, "the call's time is spent")
                if limit.expired()
                else (Code.UNKNOWN, "the agent has failed; its log says why")
            )
        except asyncio.CancelledError:
            if not self._is_draining or call.stream not in self._calls:
                raise
            ended = (Code.UNAVAILABLE, "the agent stops, or begins anew")
        except h2.exceptions.ProtocolError:
            # The stream was closed meanwhile, which is told by an event of its own.
            self._forget(call.stream)
            return
        except Exception:
            log.exception("a call of the agent's gRPC server failed")
            ended = (Code.UNKNOWN, "the agent has failed; its log says why")
        call.task = None
        self._answered()
        self._finish(call, *ended)

    async def _request(self, call: _Call) -> bytes:
        """The one message of a request."""
        try:
            async with asyncio.timeout(self._limits.request) as limit:
                await call.is_whole.wait()
        except TimeoutError:
            if limit.expired():
                raise Ended(Code.DEADLINE_EXCEEDED, "the request was not sent in time") from None
            raise
        body = bytes(call.body)
        call.body.clear()
        if len(body) < _PREFIX.size:
            raise Ended(Code.INVALID_ARGUMENT, "the request holds no message")
        is_compressed, length = _PREFIX.unpack_from(body)
        if is_compressed:
            raise Ended(Code.UNIMPLEMENTED, "compression is not supported")
        if length != len(body) - _PREFIX.size:
            raise Ended(Code.INVALID_ARGUMENT, "the request doesn't hold exactly one message")
        return body[_PREFIX.size :]

    async def _send(self, call: _Call, message: bytes) -> None:
        """One message, whole, before the next is asked for."""
        if not call.has_begun:
            call.has_begun = True
            self._h2.send_headers(call.stream, [(b":status", b"200"), (b"content-type", b"application/grpc")])
            self._flush()
        rest = memoryview(_PREFIX.pack(0, len(message)) + message)
        end = self._loop.time() + self._limits.write
        while rest:
            room = 0 if len(self._out) > _PIECE else self._h2.local_flow_control_window(call.stream)
            size = min(len(rest), room, self._h2.max_outbound_frame_size)
            if size <= 0:
                moved, left = self._moved, end - self._loop.time()
                if left <= 0:
                    self._cut("unread")
                    raise asyncio.CancelledError
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(moved.wait(), left)
                continue
            self._h2.send_data(call.stream, rest[:size].tobytes())
            rest = rest[size:]
            self._flush()
        self._answered()

    def _answered(self) -> None:
        if self._earns():
            self._tally.give_back(_ANSWERED)

    def _finish(self, call: _Call, code: Code, text: str) -> None:
        if call.stream not in self._calls:
            return
        is_whole = call.is_whole.is_set()
        self._answer(call.stream, _trailers(code, text, is_only=not call.has_begun), is_whole=is_whole)
        self._forget(call.stream)

    def _answer(self, stream: int, headers: list[tuple[bytes, bytes]], *, is_whole: bool) -> None:
        """The last headers of a stream. Of a request that isn't whole, the rest isn't wanted."""
        with contextlib.suppress(h2.exceptions.ProtocolError):
            self._h2.send_headers(stream, headers, end_stream=True)
            if not is_whole:
                self._h2.reset_stream(stream, h2.errors.ErrorCodes.NO_ERROR)
        self._flush()
        if 0 < self._limits.calls <= self._begun and not self._calls.keys() - {stream}:
            self._end("done", h2.errors.ErrorCodes.NO_ERROR)

    def _reset(self, stream: int, code: h2.errors.ErrorCodes) -> None:
        with contextlib.suppress(h2.exceptions.ProtocolError):
            self._h2.reset_stream(stream, code)
        self._count_reset()

    def _forget(self, stream: int) -> None:
        call = self._calls.pop(stream, None)
        if call is not None and call.task is not None:
            call.task.cancel()
        if not self._calls and not self._ending:
            self._after("idle", self._limits.idle)


def _known(stream: int | None) -> int:
    assert stream is not None
    return stream


def _is_grpc(kind: bytes) -> bool:
    return kind == b"application/grpc" or kind.startswith((b"application/grpc+", b"application/grpc;"))


def _timeout(text: bytes | None, longest: float) -> float | None:
    """Seconds of a grpc-timeout, at most `longest`."""
    if text is None:
        return None
    digits, unit = text[:-1], _UNITS.get(text[-1:])
    if unit is None or not 1 <= len(digits) <= 8 or not digits.isdigit():
        raise Ended(Code.INVALID_ARGUMENT, "grpc-timeout is malformed")
    return min(int(digits) * unit, longest)


def _trailers(code: Code, text: str, *, is_only: bool) -> list[tuple[bytes, bytes]]:
    head = [(b":status", b"200"), (b"content-type", b"application/grpc")] if is_only else []
    said = [(b"grpc-message", text.replace("%", "%25").encode("ascii", "replace"))] if text else []
    return [*head, (b"grpc-status", b"%d" % code), *said]


def _unread(sock: socket.socket) -> int:
    """What was written and not yet read, as the kernel counts it; 0 if it can't say."""
    try:
        count: int = struct.unpack("i", fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, b"\0" * 4))[0]
    except OSError:
        return 0
    return count
