"""How is the agent, and who may know?

A small HTTP server on a UNIX socket of its own. The kernel says who has connected (SO_PEERCRED): root, the agent's own user and the
`admins` of the configuration are answered, everybody else is refused with the same words for everything. One request for each
connection, with limits on size, time and number. What can be read in two ways is refused, and what isn't in this list is not there:

    GET /health         ok, degraded or draining; the alarms
    GET /certificates   the identities and how much of their life is left
    GET /connections    what the data path carries now, and where it ends TLS
    GET /entries        which services have entries (whose processes get them is in the configuration, and not told here)
    GET /metrics        all of it in numbers, for Prometheus
    GET, PUT /log-level error, warning, info or debug

Nothing here ends the agent, hands out an identity or changes what it does, but for what it writes to its log. No answer holds a key, a
secret or a selector.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import socket
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from ..observe.exposition import CONTENT_TYPE, Text
from ..observe.names import Metric

log = logging.getLogger("meshlib.agent")

HEAD_LIMIT: Final = 8192
FIELDS: Final = 64
BODY_LIMIT: Final = 1024
SECONDS: Final = 5.0
# Connections at once: of those who may ask, and of all others, who take nobody's place.
MOST: Final = 32
STRANGERS: Final = 8
LEVELS: Final = ("error", "warning", "info", "debug")

_JSON: Final = "application/json"
_TOKEN: Final = frozenset(b"!#$%&'*+-.^_`|~0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz")
_REASONS: Final = {
    200: "OK",
    400: "Bad Request",
    403: "Forbidden",
    404: "Not Found",
    405: "Method Not Allowed",
    411: "Length Required",
    413: "Content Too Large",
    431: "Request Header Fields Too Large",
    500: "Internal Server Error",
    503: "Service Unavailable",
}

Samples = Iterable[tuple[tuple[str, ...], float]]


@dataclass(frozen=True, slots=True)
class View:
    """What the agent tells of itself. Each answers something that JSON can hold; `metrics` the numbers."""

    health: Callable[[], Mapping[str, Any]]
    certificates: Callable[[], list[dict[str, Any]]]
    connections: Callable[[], Mapping[str, Any]]
    entries: Callable[[], list[dict[str, Any]]]
    metrics: Callable[[], Iterable[tuple[Metric, Samples]]]


@dataclass(frozen=True, slots=True)
class _Request:
    method: str
    path: str
    body: bytes = field(default=b"", repr=False)


class _RefusedError(Exception):
    """A request that isn't answered as it was meant."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status
        self.text = text


class Admin:
    """State of the agent: its admin socket, from `start` to `close`. `admins` may be replaced at any time."""

    def __init__(self, sock: socket.socket, view: View, admins: Iterable[int]) -> None:
        self.admins = frozenset(admins)
        self.refused = 0
        self._sock = sock
        self._view = view
        self._server: asyncio.Server | None = None
        self._open: dict[asyncio.Task[None], bool] = {}  # whether it may ask

    async def start(self) -> None:
        self._server = await asyncio.start_unix_server(self._accept, sock=self._sock, limit=HEAD_LIMIT)

    async def close(self) -> None:
        if self._server is not None:
            self._server.close()
        for task in tuple(self._open):
            task.cancel()
        await asyncio.gather(*self._open, return_exceptions=True)

    # ------------------------------------------------------------------------------------------------ a connection

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        uid = uid_of(writer.get_extra_info("socket"))
        may_ask = uid in {0, os.geteuid(), *self.admins}
        self._open[task] = may_ask
        try:
            # The rest is closed without a word.
            if sum(each is may_ask for each in self._open.values()) <= (MOST if may_ask else STRANGERS):
                async with asyncio.timeout(SECONDS):
                    writer.write(await self._answered(reader, uid, may_ask))
                    await writer.drain()
                    writer.write_eof()
                    # To close with bytes unread would reset the connection, and take the answer with it.
                    await reader.read(BODY_LIMIT)
        except (TimeoutError, OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass  # slow or gone
        except Exception:
            log.exception("the admin socket could not answer")
        finally:
            writer.transport.abort() if writer.transport.get_write_buffer_size() else writer.close()
            self._open.pop(task, None)

    async def _answered(self, reader: asyncio.StreamReader, uid: int, may_ask: bool) -> bytes:
        if not may_ask:
            self.refused += 1
            return answer(403, _problem("this user may not ask the agent", "agent.admins in mesh.yaml names who may, by uid"))
        try:
            request = await _read(reader)
            return self._route(request, uid)
        except _RefusedError as refused:
            return answer(refused.status, _problem(refused.text))
        except asyncio.LimitOverrunError:
            return answer(431, _problem("the head of the request is too large"))

    def _route(self, request: _Request, uid: int) -> bytes:
        if request.path == "/log-level":
            return self._level(request, uid)
        routes: dict[str, Callable[[], Any]] = {
            "/health": self._view.health,
            "/certificates": self._view.certificates,
            "/connections": self._view.connections,
            "/entries": self._view.entries,
            "/metrics": self._view.metrics,
        }
        found = routes.get(request.path)
        if found is None:
            raise _RefusedError(404, f"there are {', '.join(routes)} and /log-level")
        if request.method != "GET":
            raise _RefusedError(405, f"{request.path} takes GET")
        try:
            told = found()
            if request.path == "/metrics":
                return answer(200, rendered(told), CONTENT_TYPE)
            is_ending = request.path == "/health" and told.get("status") == "draining"
            return answer(503 if is_ending else 200, json.dumps(told) + "\n")
        except Exception:
            log.exception("%s could not be told", request.path)
            return answer(500, _problem("it could not be told; see the log"))

    def _level(self, request: _Request, uid: int) -> bytes:
        logger = logging.getLogger("meshlib")
        if request.method == "PUT":
            wanted = request.body.decode("ascii", "replace").strip()
            with contextlib.suppress(ValueError):
                content = json.loads(wanted)
                wanted = str(content.get("level", "")) if isinstance(content, dict) else str(content)
            if wanted not in LEVELS:
                raise _RefusedError(400, f"the level is one of {', '.join(LEVELS)}")
            logger.setLevel(wanted.upper())
            log.warning("the log level is %s now, as user %d asked", wanted, uid)
        elif request.method != "GET":
            raise _RefusedError(405, "/log-level takes GET and PUT")
        return answer(200, json.dumps({"level": logging.getLevelName(logger.getEffectiveLevel()).lower()}) + "\n")


def uid_of(connection: Any) -> int:
    """Who has connected, as the kernel says; -1, who is nobody, if it doesn't."""
    try:
        found = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("iII"))
        pid, uid, _ = struct.unpack("iII", found)
    except (OSError, struct.error):
        return -1
    return int(uid) if pid > 0 else -1


# ---------------------------------------------------------------------------------------------------- what is read and written


async def _read(reader: asyncio.StreamReader) -> _Request:
    """The request, if it is HTTP/1.1 that can be read in one way only."""
    head = await reader.readuntil(b"\r\n\r\n")
    line, *rows = head[:-4].split(b"\r\n")
    words = line.split(b" ")
    if len(words) != 3 or words[2] not in {b"HTTP/1.1", b"HTTP/1.0"} or not words[0].isalpha():
        raise _RefusedError(400, "this is not HTTP/1.1")
    if not all(0x21 <= byte <= 0x7E for byte in words[1]):
        raise _RefusedError(400, "the target holds what no target may")
    if len(rows) > FIELDS:
        raise _RefusedError(431, "the request has too many fields")
    fields: list[tuple[bytes, bytes]] = []
    for row in rows:
        name, colon, value = row.partition(b":")
        if not colon or not name or not _TOKEN.issuperset(name) or any(byte < 0x20 and byte != 0x09 for byte in value):
            raise _RefusedError(400, "a header field is malformed")
        fields.append((name.lower(), value.strip(b" \t")))
    names = [name for name, _ in fields]
    if b"transfer-encoding" in names:
        raise _RefusedError(411, "the body's length must be given")
    if names.count(b"content-length") > 1 or names.count(b"host") > 1:
        raise _RefusedError(400, "a field that may stand once stands twice")
    length = dict(fields).get(b"content-length", b"0")
    if not length.isdigit():
        raise _RefusedError(400, "the body's length is no number")
    if len(length) > 9 or int(length) > BODY_LIMIT:
        raise _RefusedError(413, "the body is too large")
    body = await reader.readexactly(int(length))
    return _Request(words[0].decode("ascii"), words[1].decode("ascii"), body)


def answer(status: int, text: str, kind: str = _JSON) -> bytes:
    body = text.encode("utf-8", "replace")
    head = (
        f"HTTP/1.1 {status} {_REASONS[status]}\r\ncontent-type: {kind}\r\ncontent-length: {len(body)}\r\n"
        "cache-control: no-store\r\nconnection: close\r\n\r\n"
    )
    return head.encode("ascii") + body


def rendered(metrics: Iterable[tuple[Metric, Samples]]) -> str:
    text = Text(is_openmetrics=False)
    for metric, samples in metrics:
        text.add(metric, samples)
    return text.end()


def _problem(error: str, hint: str = "") -> str:
    return json.dumps({"error": error, "hint": hint} if hint else {"error": error}) + "\n"
