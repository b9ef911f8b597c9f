"""How does Prometheus get the numbers of this process?

A listener of a few lines on the keeper's loop: `GET /metrics`, `GET /livez` and `/readyz` for those who ask whether the
process lives and takes work, and `GET /status` for `meshlib status`: edges, certificate and alerts as JSON, and nothing
secret. A framework would bring a thread and a dependency, and the application's own server must not tell its metrics to
its callers. One request per connection, limits on size, time and number of connections; everything else is answered
with 404 and closed. `Listener` is what it has in common with the probe listener (`probe.py`), which is for
orchestrators.

It speaks plain HTTP and knows no users: it binds where the configuration says, loopback as a rule. So that no web page can
make a browser read it, by a name that suddenly leads here, a listener on loopback answers only who asks by an address or
for localhost, and `/status` does so everywhere. It names SPIFFE IDs, addresses and serials, so that a listener that others can
reach tells it to clients on its own machine only: `meshlib status` is run there. Each process has its own: workers of one service
that are to be scraped one by one need port 0, or a port each.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import json
import logging
import re
import socket
from collections.abc import Callable
from typing import Any, Final

from meshlib.errors import ListenError
from meshlib.keeper import Keeper

from .exposition import CONTENT_TYPE, OPENMETRICS_END, OPENMETRICS_TYPE

logger = logging.getLogger("meshlib.observe")

LARGEST: Final = 8192  # bytes of a request
LONGEST: Final = 5.0  # seconds to receive it
MOST: Final = 32  # connections at once


class Listener:
    """A small HTTP server on the keeper's loop: one request per connection, bounded in size, time and number."""

    def __init__(self) -> None:
        self.port: int | None = None
        self._socket: socket.socket | None = None
        self._server: asyncio.Server | None = None
        self._keeper: Keeper | None = None
        self._open = 0
        # Those whose request has not come yet, in the order in which they came.
        self._waiting: dict[asyncio.StreamWriter, None] = {}

    def response_to(self, request: bytes, *, is_from_here: bool) -> bytes:
        """The answer to a whole head; `is_from_here`: it was sent on this machine."""
        raise NotImplementedError

    def has_room(self) -> bool:
        """One more connection has come: may it stay?"""
        return self._open <= MOST

    def open(self, keeper: Keeper, listening: socket.socket) -> None:
        """Answer on a socket that listens. It is closed by `stop`, and in a forked child."""
        self._socket = listening
        self.port = int(listening.getsockname()[1])
        self._keeper = keeper
        keeper.on_fork(self._after_fork)
        keeper.run(self._serve(listening)).result(10.0)

    def stop(self) -> None:
        """Listen no more. Answers under way are cut."""
        server, listening, keeper = self._server, self._socket, self._keeper
        self._server = self._socket = self._keeper = self.port = None
        if server is not None and keeper is not None and keeper.is_running:
            with contextlib.suppress(Exception):
                keeper.run(self._close(server)).result(5.0)
        if listening is not None:
            listening.close()

    async def _serve(self, listening: socket.socket) -> None:
        self._server = await asyncio.start_server(self._answer, sock=listening, limit=LARGEST)

    async def _close(self, server: asyncio.Server) -> None:
        server.close()

    def _after_fork(self) -> None:
        """The child has a copy of the listening socket: as long as it lives, it would answer with the wrong numbers."""
        if self._socket is not None:
            # Only the descriptor: what belongs to the parent's loop stays untouched.
            self._socket.close()
        self._server = self._socket = self._keeper = self.port = None
        self._open = 0
        self._waiting = {}

    # ------------------------------------------------------------------ a request

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._open += 1
        try:
            if self.has_room():  # the rest is closed without a word: to read on is what a flood wants
                self._waiting[writer] = None
                request = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), LONGEST)
                del self._waiting[writer]
                is_from_here = _is_from_here(writer.get_extra_info("peername"), writer.get_extra_info("sockname"))
                writer.write(self.response_to(request, is_from_here=is_from_here))
                await asyncio.wait_for(writer.drain(), LONGEST)
        except asyncio.LimitOverrunError:
            writer.write(response(431, "the request is too large\n"))
        except (TimeoutError, asyncio.IncompleteReadError, OSError):
            pass  # slow or gone: nothing to tell
        finally:
            self._waiting.pop(writer, None)
            try:
                writer.close()
                await asyncio.wait_for(writer.wait_closed(), LONGEST)
            except Exception:
                # Who asks and doesn't read keeps neither a descriptor nor a buffer.
                writer.transport.abort()
            finally:
                self._open -= 1


class MetricsListener(Listener):
    """Serves the text of `render` at an address "host:port" or "[v6]:port". Port 0 takes a free one: see `port`."""

    def __init__(
        self,
        address: str,
        render: Callable[[], str],
        *,
        is_ready: Callable[[], bool] = lambda: True,
        status: Callable[[], object] | None = None,
    ) -> None:
        super().__init__()
        self.address = address
        self._render = render
        self._status = status
        self._is_ready = is_ready

    def start(self, keeper: Keeper) -> None:
        """Listen. Raises ListenError when the address can't be had."""
        self.open(keeper, self._bind())
        logger.info("metrics at http://%s:%d/metrics", self.address.rpartition(":")[0], self.port or 0)

    def _bind(self) -> socket.socket:
        host, _, port = self.address.rpartition(":")
        host = host.removeprefix("[").removesuffix("]")
        try:
            family, kind, protocol, _, place = socket.getaddrinfo(
                host or None, int(port), type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )[0]
            listening = socket.socket(family, kind, protocol)
        except (OSError, ValueError) as error:
            raise ListenError(
                f"the metrics can't be served at {self.address}: {error}.",
                hint='observe.metrics is "host:port", such as "127.0.0.1:9464".',
            ) from None
        try:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind(place)
            listening.listen(MOST)
        except OSError as error:
            listening.close()
            raise ListenError(
                f"the metrics can't be served at {self.address}: {error.strerror or error}.",
                hint="Another process has it, perhaps another worker of this service: give each an address of its own, "
                "or port 0 for any free one.",
            ) from None
        listening.setblocking(False)
        return listening

    def response_to(self, request: bytes, *, is_from_here: bool) -> bytes:
        line, _, head = request.partition(b"\r\n")
        parts = line.split(b" ")
        if len(parts) != 3 or not parts[2].startswith(b"HTTP/1."):
            return response(400, "this is not HTTP/1.1\n")
        path = parts[1].split(b"?", 1)[0]
        if parts[0] != b"GET" or path not in (b"/metrics", b"/healthz", b"/livez", b"/readyz", b"/status"):
            return response(404, "GET /metrics, /livez, /readyz, /healthz or /status\n")
        # As at the probe listener: alive is one thing, ready another.
        if path in (b"/healthz", b"/livez"):
            return response(200, "ok\n")
        if path == b"/readyz":
            return response(200, "ok\n") if self._is_ready() else response(503, "draining\n")
        if (path == b"/status" or _is_loopback(self._host)) and not is_asked_by_address(head, self._host):
            return response(403, "ask by the address, or as localhost\n")
        if path == b"/status" and not _is_loopback(self._host) and not is_from_here:
            return response(403, "the status is told on this machine only: run `meshlib status` here, with --address\n")
        if path == b"/metrics":
            return rendered(self._render)
        if self._status is None:
            return response(404, "this process has no status\n")
        try:
            return response(200, json.dumps(self._status()) + "\n", "application/json")
        except Exception:
            logger.exception("the status could not be told")
            return response(500, "see the log\n")

    @property
    def _host(self) -> str:
        return self.address.rpartition(":")[0].removeprefix("[").removesuffix("]").lower()


def is_asked_by_address(head: bytes, own: str) -> bool:
    """Does the request name us by an address, by localhost or by the name that the configuration has, and not for a web page?"""
    fields = [(name.strip().lower(), value.strip()) for name, _, value in (line.partition(b":") for line in head.split(b"\r\n"))]
    if any(name == b"origin" for name, _ in fields):
        return False
    hosts = [value.decode("latin-1").lower() for name, value in fields if name == b"host"]
    if not hosts:
        return True  # HTTP/1.0, which no browser speaks
    host = re.sub(r":[0-9]{1,5}\Z", "", hosts[0]).removesuffix(".")
    host = host.removeprefix("[").removesuffix("]")
    return len(hosts) == 1 and (host in ("localhost", own) or _is_address(host))


def _is_loopback(host: str) -> bool:
    return host == "localhost" or (_is_address(host) and ipaddress.ip_address(host).is_loopback)


def _is_from_here(client: Any, own: Any) -> bool:
    """Does a connection between these two ("peername", "sockname") come from this machine: over loopback, or to an address from itself?"""
    if not client or not own or not _is_address(client[0]):
        return False
    address = ipaddress.ip_address(client[0])
    return client[0] == own[0] or (getattr(address, "ipv4_mapped", None) or address).is_loopback


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


_REASONS: Final = {
    200: "OK",
    400: "Bad Request",
    403: "Forbidden",
    404: "Not Found",
    431: "Request Header Fields Too Large",
    500: "Internal Server Error",
    503: "Service Unavailable",
}


def rendered(render: Callable[[], str]) -> bytes:
    """The metrics as an answer."""
    try:
        text = render()
    except Exception:
        logger.exception("the metrics could not be rendered")
        return response(500, "see the log\n")
    return response(200, text, OPENMETRICS_TYPE if text.endswith(OPENMETRICS_END) else CONTENT_TYPE)


def response(status: int, text: str, kind: str = "text/plain; charset=utf-8") -> bytes:
    body = text.encode("utf-8", "replace")
    head = (
        f"HTTP/1.1 {status} {_REASONS[status]}\r\ncontent-type: {kind}\r\ncontent-length: {len(body)}\r\n"
        "cache-control: no-store\r\nx-content-type-options: nosniff\r\nconnection: close\r\n\r\n"
    )
    return head.encode("ascii") + body
