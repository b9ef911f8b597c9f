"""What does gunicorn get for a socket?

A `MeshSocket`: TLS or plain is decided by the first byte that comes, in the thread that serves the connection, and from then on it is
the plain socket or speaks TLS of the wire crate. What is known of the connection (who is there, at which listener it came in) goes into
the environ of each request. On the public listener plain text is welcome in every mode.

Nobody is waited for without end, in either direction: handshake and head have `PATIENCE`; a body that comes, and an answer that is
read, slower than `slow.LEAST_RATE` end the connection, with a 408 where none of an answer was sent yet. What the caller doesn't make us
wait for isn't counted: a handler may take its time between two reads.

It does not know gunicorn's workers, and parses no HTTP beyond where a request ends.
"""

from __future__ import annotations

import contextlib
import errno
import math
import os
import select
import socket
import stat
import time
from http import HTTPStatus
from typing import IO, Any, Final

from .._native import core
from ..call import Peer
from ..errors import MeshError
from .door import PATIENCE, PEER, PORT, PUBLIC, SNI, Door, Standing, refusal_of
from .line import PLAIN
from .slow import Arrival, Pace, TooLarge, least
from .way import problem

# Bytes of ciphertext read at once: some records, so that a large body takes few system calls.
READ: Final = 64 * 1024

# Of a file at once: the pace is looked at in between.
MOST_FILE: Final = 1024 * 1024

# What is read and thrown away of a connection that ends, so that its last answer isn't lost with it.
MOST_REST: Final = 256 * 1024

CONTINUE: Final = b"HTTP/1.1 100 Continue\r\n\r\n"


class MeshSocket:
    """A connection as gunicorn uses a socket. `peer` is known when the handshake is done."""

    __slots__ = (
        *("_address", "_arrival", "_door", "_handshake", "_has_answered", "_has_begun", "_head", "_is_broken", "_is_continued"),
        *("_is_over", "_is_settled", "_is_through", "_is_told", "_looked", "_plain", "_reading", "_socket", "_tls", "_until"),
        *(
            "_writing",
            "arrived",
            "environ",
            "is_public",
            "is_refused",
            "is_unheard",
            "is_unused",
            "peer",
            "port",
            "queued",
            "request",
        ),
        "since",
    )

    def __init__(self, sock: socket.socket, door: Door, address: str = "", place: dict[str, Any] | None = None) -> None:
        """`place` is what a listener knows of all of its connections: `place_of`."""
        self._socket = sock
        self._door = door
        self._address = address
        # What the environ of each request on this connection gets.
        self.environ = place = place_of(sock, door) if place is None else place
        self.port: int = place[PORT]
        self.is_public: bool = place[PUBLIC]
        # The head of an answer, until its body comes: what goes out together is one packet, and one record.
        self._head = b""
        self._tls: core.TlsConnection | None = None
        # TLS before the handshake is done.
        self._handshake: core.TlsConnection | None = None
        self._plain = bytearray()
        self._arrival: Arrival | None = None
        # When a body was looked after last, in the poller.
        self._looked = 0.0
        # Until when the handshake, or the head that is under way, must be complete.
        self._until: float | None = None
        self._reading, self._writing = Pace(), Pace()
        self._is_settled = False
        self._is_broken = False
        self._is_over = False
        # We have said that we write no more.
        self._is_told = False
        # All of the request has been read: nothing is on its way that an end could cut off.
        self._is_through = False
        # Of the request under way: a byte of it came; something was answered; "100 Continue" was.
        self._has_begun = False
        self._has_answered = False
        self._is_continued = False
        # When it was accepted, had its handshake done or its last answer: from there on it is idle.
        self.since = time.monotonic()
        # Nobody has looked yet whether it says anything; no request of it was ever whole.
        self.is_unheard = self.is_unused = True
        # When what is there to be read was put in line for a thread; and when the head of the request under way was, 0 before that.
        self.queued = self.arrived = 0.0
        # A request of it was answered 401, because the peer's proof has ended.
        self.is_refused = False
        # gunicorn's request under way, where the connection may be kept after it.
        self.request: Any = None
        self.peer: Peer = PLAIN

    @property
    def has_pending(self) -> bool:
        """Decrypted and not read yet: more to do, although the socket itself has nothing to say."""
        return bool(self._plain)

    @property
    def standing(self) -> Standing:
        """Does what the peer proved still hold?"""
        return Standing.GOOD if self._tls is None else self._door.standing(self._tls, is_public=self.is_public)

    @property
    def is_broken(self) -> bool:
        return self._is_broken

    @property
    def until(self) -> float | None:
        """The end of the time for what is under way; None if nothing is."""
        return self._until

    @property
    def is_readable(self) -> bool:
        """Something has come, or the end has, that nobody has looked at yet."""
        return bool(self._plain) or _is_readable(self._socket)

    # --- a request comes

    def await_head(self) -> None:
        """What is read from now on is a request's head, and has an end in time."""
        if self._until is None:
            self._until = time.monotonic() + PATIENCE

    def end_head(self) -> None:
        """The head is read: the request begins."""
        self._until = self._arrival = None
        self._reading.begin()
        self._writing.begin()
        self._has_begun = True
        self._has_answered = self._is_through = self.is_unused = False

    def unread(self, data: bytes) -> None:
        """Bytes that were read too far, and belong before all others."""
        self._plain[:0] = data
        self._has_begun = True

    def has_request(self) -> bool:
        """Read what is there without waiting: is it a request that is worth a thread? True at the end, too.

        Raises OSError for a connection that is lost, or too slow, or too talkative.
        """
        arrival = self._arrival
        if arrival is None:
            arrival = self._arrival = Arrival()
        try:
            while not arrival.is_worth_a_thread(self._plain):
                if arrival.expects and not self._is_continued:
                    self._write(CONTINUE)
                    self._is_continued = True
                if arrival.head and not self._looked:
                    # From here on it is the body.
                    self._looked = time.monotonic()
                    self.arrived = self.queued
                before = len(self._plain)
                if not self._step(socket.MSG_DONTWAIT):
                    return True
                if self._looked:
                    self._note(len(self._plain) - before)
        except TooLarge as error:
            self._is_broken = True
            raise _lost(str(error)) from error
        except BlockingIOError:
            return self._is_late()
        self._looked = 0.0
        self.arrived = self.arrived or self.queued
        return True

    def _note(self, size: int) -> None:
        """So many bytes of a body have come since the last look."""
        now = time.monotonic()
        self._reading.waited(now - self._looked, size)
        self._looked = now
        self._until = now + self._reading.left

    def _is_late(self) -> bool:
        """It is not here yet, and not to be waited for by a thread. Raises OSError where it isn't to be waited for at all."""
        if self._arrival is not None and self._arrival.head:
            self._note(0)
            if self._reading.is_over:
                raise self._cut()
        elif not self._plain and self._handshake is None:
            # Idle: that has a limit of its own.
            self._until = None
        else:
            self.await_head()
            if self._until is not None and time.monotonic() > self._until:
                raise self._cut()
        return False

    def expire(self) -> bool:
        """The time for what is under way is over: its caller is told so. False where there was nothing to tell."""
        is_told = self._is_settled and self._has_begun
        self._cut()
        return is_told

    # --- reading

    def recv(self, size: int, flags: int = 0) -> bytes:
        if self._head:
            self._flush()
        if self._is_told and self._is_through:
            # It has been answered, and nothing is on its way that the end could cut off: nobody waits for its goodbye.
            return b""
        if self._is_broken:
            # gunicorn drains what it closes. What comes after a refusal is no request, whatever it looks like.
            return bytes(len(self._socket.recv(size)))
        if self._plain:
            return self._take(size)
        if self._until is not None or not self._is_settled:
            return self._recv_in_time(size)
        if self._tls is None:
            return self._recv_paced(size)
        while not self._plain and self._step():
            pass
        return self._take(size)

    def _recv_in_time(self, size: int) -> bytes:
        """Handshake and head: all of it within `PATIENCE`."""
        sock = self._socket
        patience = sock.gettimeout()
        if not patience:
            # Without a time of its own the socket heeds the flag, and mostly everything is there.
            with contextlib.suppress(BlockingIOError):
                while not self._plain and self._step(socket.MSG_DONTWAIT):
                    pass
                return self._take(size)
        try:
            while not self._plain:
                self.await_head()
                left = (self._until or 0.0) - time.monotonic()
                if left <= 0:
                    raise self._cut()
                sock.settimeout(left if patience is None else min(left, patience))
                if not self._step():
                    break
        except BlockingIOError:
            raise
        except TimeoutError as error:
            raise self._cut() from error
        finally:
            sock.settimeout(patience)
        return self._take(size)

    def _recv_paced(self, size: int) -> bytes:
        """A body: not slower than the least rate. A shorter time that gunicorn has set itself is an ordinary timeout."""
        sock, pace = self._socket, self._reading
        if pace.is_over:
            raise self._cut()
        patience = sock.gettimeout()
        if not patience:
            try:
                return sock.recv(size, socket.MSG_DONTWAIT)
            except BlockingIOError:
                if patience == 0:
                    raise
        begun = time.monotonic()
        sock.settimeout(least(pace.left, patience))
        try:
            data = sock.recv(size)
        except TimeoutError as error:
            if patience is not None and patience < pace.left:
                raise
            raise self._cut() from error
        finally:
            sock.settimeout(patience)
        pace.waited(time.monotonic() - begun, len(data))
        return data

    def _take(self, size: int) -> bytes:
        plain = self._plain
        if size >= len(plain):
            self._plain = bytearray()
            return bytes(plain)
        piece = bytes(plain[:size])
        del plain[:size]
        return piece

    def recv_into(self, buffer: Any, nbytes: int = 0, flags: int = 0) -> int:
        view = memoryview(buffer)
        data = self.recv(nbytes or len(view), flags)
        view[: len(data)] = data
        return len(data)

    def _step(self, flags: int = 0) -> bool:
        """Take in once what the socket has. False: the other side has ended. What fails is told as a connection that was lost."""
        if not self._is_settled and self._handshake is None and not self._decide(flags):
            return False
        if self._is_over:
            return False
        is_paced = self._is_settled and self._until is None and not flags
        data = self._recv_paced(READ) if is_paced else self._socket.recv(READ, flags)
        if not data:
            if self._handshake is not None:
                raise self._fall("closed in the handshake")
            return False
        tls = self._tls or self._handshake
        if tls is None:
            self._plain += data
            self._has_begun = True
            return True
        try:
            plain, out, self._is_over = tls.receive(data)
        except MeshError as error:
            if self._handshake is not None:
                self._door.fail(error)
            raise self._broken(error) from error
        self._plain += plain
        self._has_begun = self._has_begun or bool(plain)
        if out:
            self._answer(out)
        if self._handshake is not None and not tls.is_handshaking:
            self._settle(tls)
        elif self._handshake is not None and self._is_over:
            raise self._fall("closed in the handshake")
        return bool(plain) or not self._is_over

    def _decide(self, flags: int) -> bool:
        """By the first byte: plain text, TLS, or neither."""
        sock, door = self._socket, self._door
        if door.takes_only_plain(is_public=self.is_public):
            door.plain += 1
            self._is_settled = True
            return True
        first = sock.recv(1, socket.MSG_PEEK | flags)
        if not first:
            self._is_settled = True
            return False
        if door.admits_plain(first[0], is_public=self.is_public or door.is_agents(self.port)):
            door.plain += 1
            self._is_settled = True
            return True
        try:
            self._handshake = door.open(first[0], is_public=self.is_public)
        except MeshError as error:
            door.fail(error)
            raise self._fall(f"the TLS handshake failed: {error}") from error
        if self._handshake is None:
            self._answer(refusal_of(first[0]))
            raise self._fall("nothing to speak mutual TLS with, on one of the two sides")
        self.await_head()
        return True

    def _settle(self, tls: core.TlsConnection) -> None:
        """The handshake is done."""
        try:
            self.peer, extension = self._door.welcome(tls, self._address)
        except MeshError as error:
            self._door.fail(error)
            raise self._broken(error) from error
        self.environ = {**self.environ, **_environ(self.peer, extension, tls)}
        self._tls, self._handshake = tls, None
        self._is_settled = True
        # The head has a time of its own.
        self._until = None
        self.since = time.monotonic()

    def refuse(self, start_response: Any) -> list[bytes]:
        """The answer to a request whose peer has proved who they are, when that does not hold any more."""
        self._door.ended += 1
        self.is_refused = True
        body, headers = problem(401, "secure.proof_ended")
        headers = [*headers, (b"connection", b"close")]
        start_response("401 Unauthorized", [(name.decode(), value.decode()) for name, value in headers])
        return [body]

    # --- writing

    def sendall(self, data: Any, flags: int = 0) -> None:
        if self._is_broken:
            raise _lost("the connection was refused, or a record was not sent whole")
        if self._has_answered:
            if self._head:
                data, self._head = self._head + data, b""
        elif data[:7] != b"HTTP/1." or data[9:10] == b"1":
            # gunicorn's own 100, which may have been said already, or a hint: no answer yet. Or no head at all.
            if data == CONTINUE and self._is_continued:
                return
        else:
            self._has_answered = True
            if data[-4:] == b"\r\n\r\n":
                # Nothing but the head: with the first of the body, or at its end where there is none (PEP 3333 allows it).
                self._head = data
                return
        self._write(data)

    def _flush(self) -> None:
        """The head has waited long enough for its body."""
        head, self._head = self._head, b""
        if head and not self._is_broken:
            self._write(head)

    def _write(self, data: Any) -> None:
        if self._tls is None:
            self._push(data)
            return
        try:
            out = self._tls.send(data)
        except MeshError as error:
            raise self._broken(error) from error
        # A record that went out by half can't be mended.
        self._is_broken = True
        self._push(out)
        self._is_broken = False

    def _push(self, data: Any) -> None:
        """All of it, to somebody who takes it not slower than the least rate."""
        sock = self._socket
        patience, sent = sock.gettimeout(), 0
        if not patience:
            with contextlib.suppress(BlockingIOError):
                sent = sock.send(data, socket.MSG_DONTWAIT)
            if sent == len(data):
                return
            if patience == 0:
                raise BlockingIOError(errno.EAGAIN, "nobody takes it")
        view, pace = memoryview(data).cast("B")[sent:], self._writing
        try:
            while view:
                if pace.is_over:
                    raise self._fall("the answer is read too slowly")
                begun = time.monotonic()
                sock.settimeout(least(pace.left, patience))
                try:
                    sent = sock.send(view)
                except TimeoutError as error:
                    raise self._fall("the answer is read too slowly") from error
                pace.waited(time.monotonic() - begun, sent)
                view = view[sent:]
        finally:
            sock.settimeout(patience)

    def send(self, data: Any, flags: int = 0) -> int:
        self.sendall(data)
        return len(data)

    def sendfile(self, file: IO[bytes], offset: int = 0, count: int | None = None) -> int:
        if self._tls is None and not self._is_broken and _is_regular(file):
            self._flush()
            return self._push_file(file.fileno(), offset, count)
        file.seek(offset)
        left, sent = count, 0
        while left is None or left > 0:
            piece = file.read(READ if left is None else min(READ, left))
            if not piece:
                break
            self.sendall(piece)
            sent += len(piece)
            if left is not None:
                left -= len(piece)
        return sent

    def _push_file(self, file: int, offset: int, count: int | None) -> int:
        """By the kernel, to somebody who takes it not slower than the least rate."""
        sock, pace, sent = self._socket, self._writing, 0
        patience = sock.gettimeout()
        poll = select.poll()
        poll.register(sock, select.POLLOUT)
        sock.setblocking(False)
        try:
            while count is None or sent < count:
                begun, now = time.monotonic(), 0
                if pace.is_over or not poll.poll(math.ceil(least(pace.left, patience or None) * 1000)):
                    raise self._fall("the answer is read too slowly")
                with contextlib.suppress(BlockingIOError):
                    now = os.sendfile(
                        sock.fileno(), file, offset + sent, MOST_FILE if count is None else min(MOST_FILE, count - sent)
                    )
                    if not now:
                        break
                pace.waited(time.monotonic() - begun, now)
                sent += now
        finally:
            sock.settimeout(patience)
        return sent

    def _answer(self, out: bytes) -> None:
        try:
            if self._is_settled:
                self._push(out)
            elif self._socket.send(out, socket.MSG_DONTWAIT) < len(out):
                # There was nothing before it in the buffer: who does not take so little is not waited for.
                raise BlockingIOError(errno.EAGAIN, "nobody takes it")
        except OSError as error:
            # A record that went out by half can't be mended.
            raise self._fall("an answer of TLS could not be sent") from error

    def _cut(self) -> OSError:
        """Too slow. Who has asked for something, and has no answer yet, is told so."""
        if self._is_settled and self._has_begun and not (self._is_broken or self._has_answered or self._is_told):
            with contextlib.suppress(OSError, MeshError):
                self._socket.setblocking(False)
                out = _too_slow() if self._tls is None else self._tls.send(_too_slow()) + self._tls.close()
                self._socket.send(out)
        return self._fall("no handshake, no whole head or too little of a body in time")

    def _fall(self, message: str) -> OSError:
        self._is_broken = self._is_settled = True
        return _lost(message)

    def _broken(self, error: Exception) -> OSError:
        tls = self._tls or self._handshake
        if tls is not None and not self._is_broken:
            with contextlib.suppress(OSError):
                self._socket.send(tls.pending(), socket.MSG_DONTWAIT)
        return self._fall(f"the TLS {'connection' if self._tls is not None else 'handshake'} failed: {error}")

    # --- the end

    def end_request(self, *, is_read: bool) -> None:
        """The answer is given. `is_read`: all of the request has been read."""
        if self._head:
            self._flush()
        self.request = None
        self.arrived = 0.0
        self.since = time.monotonic()
        self._is_through = is_read and not self._plain
        self._has_begun = bool(self._plain)
        self._is_continued = False

    def shutdown(self, how: int) -> None:
        if how != socket.SHUT_RD:
            self._say_goodbye()
            self._is_told = True
        self._socket.shutdown(how)

    def has_ended(self) -> bool:
        """After `shutdown`, and without waiting: has the other side ended, too, or said more than anybody will read?"""
        self._socket.setblocking(False)
        seen = 0
        with contextlib.suppress(BlockingIOError):
            while seen < MOST_REST:
                size = len(self._socket.recv(READ))
                if not size:
                    return True
                seen += size
            return True
        return False

    def close(self) -> None:
        self._say_goodbye()
        self._socket.close()

    def _say_goodbye(self) -> None:
        if self._head:
            with contextlib.suppress(OSError):
                self._flush()
        if self._tls is not None and not self._is_broken and self._socket.fileno() >= 0:
            self._is_broken = True
            with contextlib.suppress(OSError, MeshError):
                self._socket.setblocking(False)
                self._socket.sendall(self._tls.close())

    # --- the rest of a socket

    def fileno(self) -> int:
        return self._socket.fileno()

    def settimeout(self, value: float | None) -> None:
        self._socket.settimeout(value)

    def gettimeout(self) -> float | None:
        return self._socket.gettimeout()

    def setblocking(self, flag: bool) -> None:
        self._socket.setblocking(bool(flag))

    def getpeername(self) -> Any:
        return self._socket.getpeername()

    def getsockname(self) -> Any:
        return self._socket.getsockname()

    def getsockopt(self, *args: Any) -> Any:
        return self._socket.getsockopt(*args)

    def setsockopt(self, *args: Any) -> None:
        self._socket.setsockopt(*args)

    @property
    def family(self) -> int:
        return self._socket.family

    def __repr__(self) -> str:
        kind = "tls" if self._tls is not None else "plain" if self._is_settled else "new"
        return f"<MeshSocket {kind} fd={self.fileno()} port={self.port} peer={self.peer.spiffe_id!r}>"


def place_of(sock: Any, door: Door) -> dict[str, Any]:
    """What each environ says of a connection at this end, before anybody has proved anything. Not to be written into.

    Our own port is 0 where there is none, as at a UNIX socket.
    """
    name = sock.getsockname()
    port = int(name[1]) if isinstance(name, tuple) else 0
    return {PEER: PLAIN, PORT: port, PUBLIC: door.is_public(port), "wsgi.url_scheme": "http"}


def _lost(message: str) -> OSError:
    # gunicorn takes a reset for what it is: nothing to answer, nothing to shout about.
    return ConnectionResetError(errno.ECONNRESET, message)


def _too_slow() -> bytes:
    """The whole answer to a request that doesn't come."""
    status = HTTPStatus.REQUEST_TIMEOUT
    body, headers = problem(status, "server.slow")
    lines = [b"HTTP/1.1 %d %s" % (status, status.phrase.encode()), *(b"%s: %s" % pair for pair in headers), b"connection: close"]
    return b"\r\n".join(lines) + b"\r\n\r\n" + body


def _is_regular(file: IO[bytes]) -> bool:
    """Can the kernel send it?"""
    try:
        return stat.S_ISREG(os.fstat(file.fileno()).st_mode)
    except (AttributeError, OSError):
        return False


def _is_readable(sock: socket.socket) -> bool:
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    return bool(poll.poll(0))


def _environ(peer: Peer, extension: dict[str, Any], tls: core.TlsConnection) -> dict[str, Any]:
    """What each request's environ says of its connection: the peer, and the keys that mod_ssl made customary."""
    found: dict[str, Any] = {
        PEER: peer,
        SNI: tls.server_name or "",
        "wsgi.url_scheme": "https",
        "HTTPS": "on",
        "SSL_PROTOCOL": tls.tls_version or "",
        "SSL_CIPHER": tls.tls_cipher or "",
        "SSL_CLIENT_VERIFY": "SUCCESS" if peer.spiffe_id else "NONE",
    }
    for index, pem in enumerate(extension["client_cert_chain"]):
        found["SSL_CLIENT_CERT" if index == 0 else f"SSL_CLIENT_CERT_CHAIN_{index - 1}"] = pem
    if peer.spiffe_id:
        found["SSL_CLIENT_M_SERIAL"] = peer.serial.upper()
        found["SSL_CLIENT_S_DN"] = extension["client_cert_name"] or ""
    return found
