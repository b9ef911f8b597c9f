"""How do requests reach the CA's service, and how much may they cost?

TLS is the wire's, as for every server of the mesh: the server shows its own SVID (`spiffe://<trust domain>/meshlib/ca`,
issued when it starts and in time before it ends), and a client's certificate, if it shows one, is verified against our
roots alone. A connection carries one request of at most 64 KiB and lives for 10 s, 3 s of which the handshake may take; the
answers (`authority.py`) are made by four threads. What could be read in two ways is refused.

There are 256 connections at once, 32 from one address (of IPv6: from one /64). When all places are taken, the oldest that
is still in its handshake makes room; and 64 of them are never for those who have shown no certificate. So a few addresses
that hold connections open keep nobody out whose certificate has to be renewed.

Once a second it looks whether the CA's own certificate has to be another one (it nears its end, or the root was turned
over), and tends the folders of this machine's services.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import h11

from .._native import core
from ..errors import ListenError, MeshError
from .authority import Reply, Request, Service, network_of, problem
from .ca import Issued

log = logging.getLogger("meshlib.secure")

BODY_LIMIT: Final = 64 * 1024
HEAD_LIMIT: Final = 16 * 1024
HEADERS: Final = 100
SECONDS: Final = 10.0
HANDSHAKE: Final = 3.0
MOST: Final = 256
RESERVED: Final = 64  # of these, for those who have proved a certificate, and those who are about to
MOST_FROM_ONE: Final = 32
THREADS: Final = 4

_TEND: Final = 1.0
_RENEW_EVERY: Final = 60.0
_PIECE: Final = 16 * 1024
_PARTING: Final = 1.0


class Server:
    """The service on an address, from `start` to `stop`. `out`: where folders of this machine's own services are tended."""

    def __init__(self, service: Service, *, out: Path | None = None) -> None:
        self.service = service
        self.address = ("", 0)
        self._out = out
        self._own: Issued | None = None
        self._signed_with: tuple[bytes, str] = (b"", "")
        self._tls: core.TlsServer | None = None
        self._generation = 0
        self._published: tuple[bytes, bytes] = (b"", b"")
        self._renewed = 0.0
        self._faults: list[str] = []
        self._open: Counter[str] = Counter()  # by network
        self._talks: set[asyncio.Task[None]] = set()
        self._shaking: dict[asyncio.Task[None], None] = {}  # of these, who is in the handshake; the oldest first
        self._anonymous: set[asyncio.Task[None]] = set()  # and who has shown no certificate in it
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="meshlib-ca")
        self._server: asyncio.Server | None = None
        self._tending: asyncio.Task[None] | None = None

    async def start(self, host: str, port: int) -> None:
        loop = asyncio.get_running_loop()
        # Nothing listens before there is an identity, and a key for tokens: everybody has to hear of it before it signs.
        await loop.run_in_executor(self._pool, self.service.prepare)
        await loop.run_in_executor(self._pool, self.tend)
        try:
            self._server = await asyncio.start_server(self._accept, host, port, backlog=MOST)
        except OSError as error:
            raise ListenError(
                f"the CA can't listen on {host}:{port}: {error.strerror or error}.",
                hint="Is the address one of this machine, and the port free? Give another one (--listen HOST:PORT).",
            ) from error
        self.address = self._server.sockets[0].getsockname()[:2]
        self._tending = asyncio.create_task(self._tend_always())

    async def stop(self) -> None:
        if self._tending is not None:
            self._tending.cancel()
        if self._server is not None:
            self._server.close()
        for talk in tuple(self._talks):
            talk.cancel()
        await asyncio.gather(*self._talks, return_exceptions=True)
        self._pool.shutdown(wait=True)

    def tend(self) -> None:
        """Whatever is due: our own certificate, and what lies in the folders of this machine's services."""
        authority = self.service.authority
        now, state = authority.now(), (authority.bundle, authority.signer)
        own = self._own
        if own is None or state != self._signed_with or now >= (own.not_before + own.not_after) / 2:
            own = authority.issue_own()
            self._generation += 1
            bundle = {authority.trust_domain: state[0]}
            self._tls = core.TlsServer(own.chain, own.key, bundle, self._generation, False, before=self._tls)
            self._own, self._signed_with = own, state
        self.service.flood.settle()
        if self._out is None or not self._out.is_dir():
            return
        is_due, faults = now >= self._renewed + _RENEW_EVERY or now < self._renewed, list[str]()
        if is_due:
            self._renewed = now
            for issued in authority.renew(self._out, faults=faults):
                log.info("renewed %s, until %s", issued.spiffe_id, issued.not_after)
        public = (state[0], authority.crl if authority.has_revoked else b"")
        has_news = public != self._published
        if has_news or (is_due and self._faults):
            authority.publish(self._out, faults=faults)
            self._published = public
        if is_due or has_news:
            faults = list(dict.fromkeys(faults))
            for fault in faults:
                if fault not in self._faults:
                    log.error("a service's folder can't be served: %s", fault)
            self._faults = faults

    async def _tend_always(self) -> None:
        told = ""
        while True:
            await asyncio.sleep(_TEND)
            try:
                await asyncio.get_running_loop().run_in_executor(self._pool, self.tend)
                told = ""
            except Exception as error:
                if str(error) != told:
                    log.error("the CA can't tend its certificates: %s", error, exc_info=not isinstance(error, MeshError))
                    told = str(error)

    # ------------------------------------------------------------------------------------------------ one connection

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        source = str((writer.get_extra_info("peername") or ("",))[0])
        network = network_of(source)
        task = asyncio.current_task()
        assert task is not None
        if self._tls is None or self._open[network] >= MOST_FROM_ONE or not self._has_room():
            writer.transport.abort()
            return
        self._talks.add(task)
        self._shaking[task] = None
        self._open[network] += 1
        try:
            begin = asyncio.get_running_loop().time()
            async with asyncio.timeout(min(HANDSHAKE, SECONDS)) as limit:

                def known(peer: str | None) -> None:
                    self._know(task, peer)
                    limit.reschedule(begin + SECONDS)

                await _Talk(self.service, self._pool, reader, writer, self._tls, source, known).run()
        except (TimeoutError, OSError, asyncio.CancelledError):
            writer.transport.abort()
        except Exception:
            log.exception("a connection from %s failed", source)
            writer.transport.abort()
        finally:
            writer.close()
            self._talks.discard(task)
            self._shaking.pop(task, None)
            self._anonymous.discard(task)
            self._open[network] -= 1
            if not self._open[network]:
                del self._open[network]

    def _has_room(self) -> bool:
        """Is there a place for another one? Where all are taken, one is made free."""
        if len(self._talks) < MOST:
            return True
        oldest = next(iter(self._shaking), None)
        if oldest is None:
            return False
        del self._shaking[oldest]
        self._talks.discard(oldest)
        oldest.cancel()
        return True

    def _know(self, task: asyncio.Task[None], peer: str | None) -> None:
        """Its handshake is over."""
        self._shaking.pop(task, None)
        if peer is None:
            if len(self._anonymous) >= MOST - RESERVED:
                raise ConnectionRefusedError("all places for those who have shown no certificate are taken")
            self._anonymous.add(task)


class _Talk:
    """One connection: a handshake, a request, a reply."""

    def __init__(
        self,
        service: Service,
        pool: ThreadPoolExecutor,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        tls: core.TlsServer,
        source: str,
        known: Callable[[str | None], None],
    ) -> None:
        self._service = service
        self._pool = pool
        self._reader = reader
        self._writer = writer
        self._tls = core.TlsConnection(tls)
        self._http = h11.Connection(h11.SERVER, max_incomplete_event_size=HEAD_LIMIT)
        self._source = source
        # Told the SPIFFE ID that was proved, or None, as soon as the handshake is over.
        self._known: Callable[[str | None], None] | None = known

    async def run(self) -> None:
        try:
            reply = await self._reply()
            self._say(reply)
        except MeshError as error:
            # TLS: the alert tells the client why.
            self._writer.write(self._tls.pending())
            self._service.flood.refuse(error.reason, source=self._source, why=error.message)
        else:
            self._writer.write(self._tls.close())
        await self._writer.drain()
        await self._part()

    async def _part(self) -> None:
        """Hear the client out: to close with its bytes unread would reset the connection, and take our last words with it."""
        self._writer.write_eof()
        async with asyncio.timeout(_PARTING):
            for _ in range(BODY_LIMIT // _PIECE):
                if not await self._reader.read(_PIECE):
                    return

    async def _reply(self) -> Reply:
        try:
            request = await self._request()
        except _RefusedError as refused:
            return refused.reply
        except h11.RemoteProtocolError as error:
            if error.error_status_hint == 431:
                return _too_long()
            return problem(400, "http.malformed", "This is no HTTP request that can be read.", str(error)[:200])
        return await asyncio.get_running_loop().run_in_executor(self._pool, self._service.answer, request)

    async def _request(self) -> Request:
        head: h11.Request | None = None
        body = bytearray()
        while True:
            event = self._http.next_event()
            if event is h11.NEED_DATA:
                if self._http.they_are_waiting_for_100_continue:
                    self._send(h11.InformationalResponse(status_code=100, headers=[]))
                self._http.receive_data(await self._plain())
            elif isinstance(event, h11.Request):
                head = event
                _check(head)
            elif isinstance(event, h11.Data):
                body += event.data  # no more than was announced
            elif isinstance(event, h11.EndOfMessage) and head is not None:
                chain = tuple(self._tls.peer_chain)
                target = head.target.decode("latin-1")
                return Request(head.method.decode("latin-1"), target, bytes(body), self._tls.peer, chain, self._source)
            else:
                raise ConnectionResetError("it went away before its request was whole")

    async def _plain(self) -> bytes:
        """The next bytes of the request; b"" at its end."""
        while True:
            data = await self._reader.read(_PIECE)
            if not data:
                return b""
            plain, out, is_over = self._tls.receive(data)
            if out:
                self._writer.write(out)
                await self._writer.drain()
            if self._known is not None and not self._tls.is_handshaking:
                known, self._known = self._known, None
                known(self._tls.peer)
            if plain or is_over:
                return plain

    def _say(self, reply: Reply) -> None:
        headers = [
            ("content-type", reply.kind),
            ("content-length", str(len(reply.body))),
            ("cache-control", "no-store"),
            ("connection", "close"),
        ]
        self._send(h11.Response(status_code=reply.status, headers=headers))
        self._send(h11.Data(data=reply.body))
        self._send(h11.EndOfMessage())

    def _send(self, event: Any) -> None:
        data = self._http.send(event)
        if data:
            self._writer.write(self._tls.send(data))


class _RefusedError(Exception):
    """A request that is answered before it is whole."""

    def __init__(self, reply: Reply) -> None:
        super().__init__()
        self.reply = reply


def _check(head: h11.Request) -> None:
    """h11 takes what could be read in two ways; here nothing is."""
    if head.http_version != b"1.1":
        raise _RefusedError(problem(505, "http.version", "Only HTTP/1.1 is spoken here.", "Speak that."))
    names = [name for name, _ in head.headers]
    size = len(head.target) + sum(len(name) + len(value) for name, value in head.headers)
    if size > HEAD_LIMIT or len(names) > HEADERS:
        raise _RefusedError(_too_long())
    if b"transfer-encoding" in names:
        raise _RefusedError(problem(411, "http.length", "The body's length must be given.", "Send Content-Length."))
    if names.count(b"content-length") > 1 or names.count(b"host") > 1:
        raise _RefusedError(problem(400, "http.malformed", "A header that may stand once stands twice.", "Send it once."))
    length = next((value for name, value in head.headers if name == b"content-length"), b"0")
    if len(length) > 9 or int(length) > BODY_LIMIT:
        raise _RefusedError(_too_large())


def _too_long() -> Reply:
    return problem(431, "http.size", f"The head is larger than {HEAD_LIMIT // 1024} KiB or {HEADERS} fields.", "Send less.")


def _too_large() -> Reply:
    return problem(
        413, "http.size", f"The body is larger than {BODY_LIMIT // 1024} KiB.", "A request for a certificate has 1 KiB."
    )
