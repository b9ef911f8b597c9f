"""How does gunicorn get mutual TLS, and the application the peer?

Worker classes for `gunicorn -k`: `SyncWorker`, `ThreadWorker` (gthread) and `ASGIWorker` (uvicorn in gunicorn's processes). The first
two give gunicorn a `MeshSocket` for every connection: it looks at the first byte when gunicorn first reads, in the thread that
serves the connection, and from then on is the plain socket or speaks TLS of the wire crate. gunicorn is started without its own
`--certfile`. Each new connection takes the newest identity.

Ways into gunicorn: its worker classes are meant to be derived from; what is overridden are methods without an underscore. Of both:
`accept` (the listener is handed on inside a `_Listener`), `load_wsgi` (to put the peer into the environ) and `handle_exit`. Of gthread:
`handle` (no thread before a request's head is there), `handle_request` (the last request of a connection whose peer's proof is not of
today), `finish_request` (back to the poller, or straight back to work if what is decrypted already makes no socket readable),
`murder_keepalived` and `murder_pending` (who is too slow, or would not be let in any more).

It does not speak HTTP/2. It sets no limit to bodies. A sync worker, with its one call at a time, has a limit of time for handshake and
head, and no more protection from slow clients than that: it takes gthread.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import selectors
import signal
import socket
import sys
import time
from concurrent.futures import Future
from functools import partial
from types import FrameType
from typing import IO, Any, Final

from gunicorn.arbiter import Arbiter
from gunicorn.workers.base import Worker
from gunicorn.workers.gthread import TConn
from gunicorn.workers.gthread import ThreadWorker as GunicornThreadWorker
from gunicorn.workers.sync import SyncWorker as GunicornSyncWorker

from .._native import core
from ..call import Peer
from ..errors import MeshError
from . import door as doors
from .door import HEAD, PATIENCE, PEER, SNI, Door, Standing, refusal_of
from .way import PLAIN, problem

# Bytes of ciphertext read at once: some records, so that a large body takes few system calls.
READ = 64 * 1024

# Seconds that a connection without a request has when the worker ends.
LINGER = 2.0

# What a connection is answered with that has no whole request yet: it goes back to the poller, and takes no thread.
WAIT: Final = object()


class MeshSocket:
    """A connection as gunicorn uses a socket. TLS or plain is decided by its first byte; `peer` is known when the handshake is done."""

    __slots__ = (
        *("_address", "_door", "_handshake", "_is_broken", "_is_over", "_is_settled", "_plain", "_searched", "_socket", "_tls"),
        *("_until", "environ", "is_refused", "peer"),
    )

    def __init__(self, sock: socket.socket, door: Door, address: str = "") -> None:
        self._socket = sock
        self._door = door
        self._address = address
        self._tls: core.TlsConnection | None = None
        # TLS before the handshake is done.
        self._handshake: core.TlsConnection | None = None
        self._plain = b""
        self._searched = 0
        # Until when the handshake, or the head that is under way, must be complete.
        self._until: float | None = None
        self._is_settled = False
        self._is_broken = False
        self._is_over = False
        # A request of it was answered 401, because the peer's proof has ended.
        self.is_refused = False
        self.peer: Peer = PLAIN
        # What the environ of each request on this connection gets.
        self.environ: dict[str, Any] = {PEER: PLAIN, "wsgi.url_scheme": "http"}

    @property
    def has_pending(self) -> bool:
        """Decrypted and not read yet: more to do, although the socket itself has nothing to say."""
        return bool(self._plain)

    @property
    def standing(self) -> Standing:
        """Does what the peer proved still hold?"""
        return Standing.GOOD if self._tls is None else self._door.standing(self._tls)

    @property
    def is_broken(self) -> bool:
        return self._is_broken

    @property
    def until(self) -> float | None:
        """The end of the time for what is under way; None if nothing is."""
        return self._until

    # --- reading

    def await_head(self) -> None:
        """What is read from now on is a request's head, and has an end in time."""
        if self._until is None:
            self._until = time.monotonic() + PATIENCE

    def end_head(self) -> None:
        self._until = None

    def has_head(self, before: bytes = b"") -> bool:
        """Read what is there without waiting: is it a whole head, behind the bytes that were read before? True at the end, too.

        To be called with a socket that does not block. Raises OSError for a connection that is lost, or too slow, or too talkative.
        """
        self._searched = 0
        try:
            while not self._is_complete(before):
                if not self._step():
                    return True
        except BlockingIOError:
            if not (before or self._plain or self._handshake is not None):
                # Idle: that has a limit of its own.
                self._until = None
                return False
            self.await_head()
            if self._until is not None and time.monotonic() > self._until:
                raise self._too_slow() from None
            return False
        return True

    def _is_complete(self, before: bytes) -> bool:
        if not self._plain and not before:
            return False
        whole = (before + self._plain if before else self._plain).lstrip(b"\r\n")
        if whole.find(b"\r\n\r\n", max(self._searched - 3, 0)) >= 0:
            return True
        self._searched = len(whole)
        if len(whole) > HEAD:
            self._is_broken = True
            raise _lost(f"the head of a request is longer than {HEAD} bytes")
        return False

    def recv(self, size: int, flags: int = 0) -> bytes:
        if self._is_broken:
            # gunicorn drains what it closes. What comes after a refusal is no request, whatever it looks like.
            return bytes(len(self._socket.recv(size)))
        if self._plain:
            return self._take(size)
        if self._until is None and self._is_settled:
            if self._tls is None:
                return self._socket.recv(size, flags)
            while not self._plain and self._step():
                pass
            return self._take(size)
        return self._recv_in_time(size)

    def _recv_in_time(self, size: int) -> bytes:
        sock = self._socket
        patience = sock.gettimeout()
        try:
            while not self._plain:
                self.await_head()
                left = (self._until or 0.0) - time.monotonic()
                if left <= 0:
                    raise self._too_slow()
                sock.settimeout(left if patience is None else min(left, patience))
                if not self._step():
                    break
        except BlockingIOError:
            raise
        except TimeoutError as error:
            raise self._too_slow() from error
        finally:
            sock.settimeout(patience)
        return self._take(size)

    def _take(self, size: int) -> bytes:
        piece = self._plain[:size]
        self._plain = self._plain[size:]
        self._searched = 0
        return piece

    def recv_into(self, buffer: Any, nbytes: int = 0, flags: int = 0) -> int:
        view = memoryview(buffer)
        data = self.recv(nbytes or len(view), flags)
        view[: len(data)] = data
        return len(data)

    def _step(self) -> bool:
        """Take in once what the socket has. False: the other side has ended. What fails is told as a connection that was lost."""
        if not self._is_settled and self._handshake is None and not self._decide():
            return False
        if self._is_over:
            return False
        data = self._socket.recv(READ)
        if not data:
            if self._handshake is not None:
                raise self._fall("closed in the handshake")
            return False
        tls = self._tls or self._handshake
        if tls is None:
            self._plain += data
            return True
        try:
            plain, out, self._is_over = tls.receive(data)
        except MeshError as error:
            if self._handshake is not None:
                self._door.fail(error)
            raise self._broken(error) from error
        self._plain += plain
        if out:
            self._answer(out)
        if self._handshake is not None and not tls.is_handshaking:
            self._settle(tls)
        elif self._handshake is not None and self._is_over:
            raise self._fall("closed in the handshake")
        return bool(plain) or not self._is_over

    def _decide(self) -> bool:
        """By the first byte: plain text, TLS, or neither."""
        sock, door = self._socket, self._door
        if door.is_plain_only:
            door.plain += 1
            self._is_settled = True
            return True
        first = sock.recv(1, socket.MSG_PEEK)
        if not first:
            self._is_settled = True
            return False
        if door.admits_plain(first[0]):
            door.plain += 1
            self._is_settled = True
            return True
        try:
            self._handshake = door.open(first[0])
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
        self.environ = _environ(self.peer, extension, tls)
        self._tls, self._handshake = tls, None
        self._is_settled = True
        # The head has a time of its own.
        self._until = None

    def refuse(self, start_response: Any) -> list[bytes]:
        """The answer to a request whose peer has proved who they are, when that does not hold any more."""
        self._door.ended += 1
        self.is_refused = True
        body, headers = problem(401, "secure.proof_ended")
        headers = [*headers, (b"connection", b"close")]
        start_response("401 Unauthorized", [(name.decode(), value.decode()) for name, value in headers])
        return [body]

    def _answer(self, out: bytes) -> None:
        try:
            self._socket.sendall(out)
        except OSError as error:
            # A record that went out by half can't be mended; and who does not take so little is not waited for.
            raise self._fall("an answer of TLS could not be sent") from error

    def _fall(self, message: str) -> OSError:
        self._is_broken = self._is_settled = True
        return _lost(message)

    def _too_slow(self) -> OSError:
        return self._fall("no handshake and no whole head in time")

    # --- writing

    def sendall(self, data: Any, flags: int = 0) -> None:
        if self._is_broken:
            raise _lost("the connection was refused, or a record was not sent whole")
        if self._tls is None:
            self._socket.sendall(data, flags)
            return
        try:
            out = self._tls.send(data)
        except MeshError as error:
            raise self._broken(error) from error
        # A record that went out by half can't be mended.
        self._is_broken = True
        self._socket.sendall(out)
        self._is_broken = False

    def send(self, data: Any, flags: int = 0) -> int:
        if self._tls is None and not self._is_broken:
            return self._socket.send(data, flags)
        self.sendall(data)
        return len(data)

    def sendfile(self, file: IO[bytes], offset: int = 0, count: int | None = None) -> int:
        if self._tls is None:
            return self._socket.sendfile(file, offset, count)
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

    def _broken(self, error: Exception) -> OSError:
        tls = self._tls or self._handshake
        if tls is not None and not self._is_broken:
            with contextlib.suppress(OSError):
                self._socket.sendall(tls.pending())
        return self._fall(f"the TLS {'connection' if self._tls is not None else 'handshake'} failed: {error}")

    # --- the rest of a socket

    def shutdown(self, how: int) -> None:
        if how != socket.SHUT_RD:
            self._say_goodbye()
        self._socket.shutdown(how)

    def close(self) -> None:
        self._say_goodbye()
        self._socket.close()

    def _say_goodbye(self) -> None:
        if self._tls is not None and not self._is_broken and self._socket.fileno() >= 0:
            self._is_broken = True
            with contextlib.suppress(OSError, MeshError):
                self._socket.setblocking(False)
                self._socket.sendall(self._tls.close())

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
        return f"<MeshSocket {kind} fd={self.fileno()} peer={self.peer.spiffe_id!r}>"


def _lost(message: str) -> OSError:
    # gunicorn takes a reset for what it is: nothing to answer, nothing to shout about.
    return ConnectionResetError(errno.ECONNRESET, message)


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


class _Listener:
    """A listener whose connections come through the door."""

    __slots__ = ("_door", "_listener")

    def __init__(self, listener: Any, door: Door) -> None:
        self._listener = listener
        self._door = door

    def accept(self) -> tuple[MeshSocket, Any]:
        sock, address = self._listener.accept()
        # Of a UNIX socket there is none.
        return MeshSocket(sock, self._door, str(address[0]) if isinstance(address, tuple) else ""), address

    def __getattr__(self, name: str) -> Any:
        return getattr(self._listener, name)


class _Mesh:
    """What both kinds of worker do alike. `door` is set by `meshlib serve`; otherwise it is that of the process's latest mesh."""

    door: Door | None = None
    wsgi: Any

    def accept(self, listener: Any) -> None:
        super().accept(_Listener(listener, self.door or doors.latest()))  # type: ignore[misc]

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        (self.door or doors.latest()).mesh.drain()
        super().handle_exit(sig, frame)  # type: ignore[misc]

    def load_wsgi(self) -> None:
        super().load_wsgi()  # type: ignore[misc]
        self.wsgi = _Stamped(self.wsgi)


class SyncWorker(_Mesh, GunicornSyncWorker):
    """One call at a time, one call per connection."""

    def handle_request(self, listener: Any, req: Any, client: Any, addr: Any) -> Any:
        client.end_head()
        return super().handle_request(listener, req, client, addr)  # type: ignore[no-untyped-call]


class ThreadWorker(_Mesh, GunicornThreadWorker):
    """A pool of threads and kept-alive connections: gthread.

    A thread is taken for a request whose head is complete. Whoever is slower, with the handshake or with the head, waits in the poller,
    and has `PATIENCE` for it; so it takes no thread to be slow, nor many connections to stop the worker.
    """

    def handle(self, conn: TConn) -> Any:
        sock = conn.sock
        try:
            sock.setblocking(False)
            before = conn.parser.unreader.buf.getvalue() if conn.parser is not None else b""
            if not sock.has_head(before):
                return WAIT
        except OSError as error:
            self.log.debug("Connection lost: %s", error)
            return False
        conn.data_ready = True
        sock.await_head()
        return super().handle(conn)  # type: ignore[no-untyped-call]

    def handle_request(self, req: Any, conn: TConn) -> Any:
        sock = conn.sock
        sock.end_head()
        if sock.standing is not Standing.GOOD:
            req.force_close()
        is_kept = super().handle_request(req, conn)  # type: ignore[no-untyped-call]
        # In case it ended between the two looks.
        return is_kept and not sock.is_refused

    def finish_request(self, conn: TConn, fs: Future[Any]) -> None:
        result = fs.result() if not fs.cancelled() and fs.exception() is None else False
        if result is WAIT:
            conn.sock.setblocking(False)
            conn.timeout = time.monotonic() + (self.cfg.keepalive or PATIENCE)
            self.pending_conns.append(conn)
            self.poller.register(  # type: ignore[union-attr]
                conn.sock, selectors.EVENT_READ, partial(self.on_pending_socket_readable, conn)
            )
        elif result is True and conn.sock.has_pending:
            self.enqueue_req(conn)  # type: ignore[no-untyped-call]
        elif conn.sock.is_broken:
            # Nobody waits for what a lost connection may still say.
            self.nr_conns -= 1
            conn.close()  # type: ignore[no-untyped-call]
        else:
            super().finish_request(conn, fs)  # type: ignore[no-untyped-call]

    def murder_keepalived(self, force: bool = False) -> None:
        """Idle connections, of callers too that would not be let in any more."""
        for conn in [conn for conn in self.keepalived_conns if conn.sock.standing is Standing.OVER]:
            self.keepalived_conns.remove(conn)
            self._end(conn)
        super().murder_keepalived(force)  # type: ignore[no-untyped-call]

    def murder_pending(self) -> None:
        """Connections that have not come to a whole head."""
        now = time.monotonic()
        for conn in tuple(self.pending_conns):
            until = conn.sock.until
            if until is None and not self.alive:
                # The worker ends: what has not begun by now has a moment left.
                conn.timeout = min(conn.timeout, now + LINGER)
            if now > (conn.timeout if until is None else until) or conn.sock.standing is Standing.OVER:
                self.pending_conns.remove(conn)
                self._end(conn)

    def _end(self, conn: TConn) -> None:
        with contextlib.suppress(OSError, KeyError, ValueError):
            self.poller.unregister(conn.sock)  # type: ignore[union-attr]
        self.nr_conns -= 1
        conn.close()  # type: ignore[no-untyped-call]


class _Stamped:
    """The application as gunicorn calls it: with the connection's peer in every environ."""

    __slots__ = ("_app",)

    def __init__(self, app: Any) -> None:
        self._app = app

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Any:
        sock = environ.get("gunicorn.socket")
        if isinstance(sock, MeshSocket):
            if sock.standing is Standing.OVER:
                return sock.refuse(start_response)
            environ.update(sock.environ)
        return self._app(environ, start_response)


class ASGIWorker(Worker):
    """uvicorn, one server per process of gunicorn's. For ASGI applications that want several processes."""

    door: Door | None = None

    def init_signals(self) -> None:
        # gunicorn's would swallow what uvicorn's graceful end needs; uvicorn sets TERM and INT by itself.
        for each in self.SIGNALS:
            signal.signal(each, signal.SIG_DFL)
        signal.signal(signal.SIGUSR1, self.handle_usr1)
        signal.siginterrupt(signal.SIGUSR1, False)

    def run(self) -> None:
        from .serve import uvicorn_server

        async def notify() -> None:
            self.notify()  # type: ignore[no-untyped-call]

        server = uvicorn_server(
            self.wsgi,
            self.door or doors.latest(),
            backlog=self.cfg.backlog,
            timeout_keep_alive=self.cfg.keepalive,
            timeout_graceful_shutdown=self.cfg.graceful_timeout,
            limit_max_requests=None if self.max_requests == sys.maxsize else self.max_requests,
            callback_notify=notify,
            timeout_notify=max(1, self.timeout // 2) if self.timeout else 30,
        )

        async def serve() -> None:
            asyncio.get_running_loop().add_signal_handler(signal.SIGQUIT, server.handle_exit, signal.SIGQUIT, None)
            await server.serve(sockets=[each.sock for each in self.sockets])

        factory = server.config.get_loop_factory()
        with asyncio.Runner(loop_factory=factory) as runner:
            runner.run(serve())
        if not server.started:
            sys.exit(Arbiter.WORKER_BOOT_ERROR)  # the arbiter gives up, instead of starting it for ever
