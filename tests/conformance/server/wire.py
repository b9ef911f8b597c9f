"""How do the conformance tests speak? Raw bytes over plain sockets, or over Python's ssl as a foreign TLS implementation.

An HTTP client would tidy up what the tests are about. Each request is of a tenant of its own, unless it says of which: so the limit on calls
of a tenant binds only where it is meant to.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_tenants = itertools.count(1)


class Answer:
    """What came back. `headers` has the last of each name, `fields` has all."""

    def __init__(self, status: int, fields: list[tuple[str, str]], body: bytes, version: str = "1.1") -> None:
        self.status = status
        self.fields = fields
        self.headers = dict(fields)
        self.body = body
        self.version = version

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def reason(self) -> str:
        """Of a refusal by the mesh, as problem details; "" for another answer."""
        is_problem = self.headers.get("content-type") == "application/problem+json"
        return str(self.json["reason"]) if is_problem and self.body else ""

    def seen(self, name: str) -> list[str]:
        """What the handler has seen under the name of a header."""
        return [value for key, value in self.json["headers"] if key == name]

    def __repr__(self) -> str:
        return f"<{self.status} {self.headers} {self.body[:200]!r}>"


def head(method: str, target: str, *headers: str, version: str = "1.1") -> bytes:
    """A request's head, whose target and headers go out as they are (latin-1)."""
    names = {header.partition(":")[0].lower() for header in headers}
    lines = [f"{method} {target} HTTP/{version}"]
    if "host" not in names:
        lines.append("Host: orders")
    if "x-tenant" not in names:
        lines.append(f"X-Tenant: t{next(_tenants)}")
    return "\r\n".join([*lines, *headers, "", ""]).encode("latin-1")


class Wire:
    """One connection."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.file = sock.makefile("rb")

    def send(self, data: bytes) -> None:
        self.sock.sendall(data)

    def ask(self, method: str, target: str, *headers: str, body: bytes = b"", is_last: bool = False) -> Answer:
        """One request and its answer."""
        more = [f"Content-Length: {len(body)}"] if body else []
        more += ["Connection: close"] if is_last else []
        self.send(head(method, target, *headers, *more) + body)
        return self.answer(is_head=method == "HEAD")

    def answer(self, *, is_head: bool = False) -> Answer:
        status, fields, version = self.head()
        headers = dict(fields)
        if is_head or status in (101, 204, 304):
            body = b""
        elif headers.get("transfer-encoding") == "chunked":
            body = b"".join(iter(self.chunk, b""))
        elif "content-length" in headers:
            body = self.file.read(int(headers["content-length"]))
            if len(body) < int(headers["content-length"]):
                raise ConnectionError("cut off in the body")
        else:
            body = self.file.read()
        return Answer(status, fields, body, version)

    def head(self) -> tuple[int, list[tuple[str, str]], str]:
        """The head of an answer: status, headers, version. What follows is left where it is."""
        line = self.file.readline()
        if not line:
            raise ConnectionError("closed without an answer")
        fields: list[tuple[str, str]] = []
        while (field := self.file.readline().strip()) != b"":
            name, _, value = field.decode("latin-1").partition(":")
            fields.append((name.lower(), value.strip()))
        return int(line.split()[1]), fields, line.split()[0].decode().removeprefix("HTTP/")

    def chunk(self) -> bytes:
        """The next chunk of a body; b"" is the end of it."""
        line = self.file.readline()
        if not line.strip():
            raise ConnectionError("cut off between two chunks")
        data = self.file.read(int(line, 16))
        self.file.readline()
        return data

    @property
    def is_closed(self) -> bool:
        """Whether the other side closes now, without another byte."""
        try:
            return self.file.read(1) == b""
        except (ConnectionError, ssl.SSLError):
            return True

    def abort(self) -> None:
        """Close with a reset, as a killed process does."""
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")
        self.close()

    def close(self) -> None:
        self.file.close()
        self.sock.close()


def context(folder: Path | None, *, bundle: Path | None = None) -> ssl.SSLContext:
    """A client's TLS: with the SVID of `folder`, or with none. The server is proved by the bundle; its SPIFFE ID is not looked at."""
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    made.check_hostname = False
    made.load_verify_locations(str(bundle or (folder / "bundle.pem" if folder else None)))
    if folder is not None:
        made.load_cert_chain(str(folder / "svid.pem"), str(folder / "key.pem"))
    return made


@contextlib.contextmanager
def connection(port: int, tls: ssl.SSLContext | None = None, timeout: float = 15.0) -> Iterator[Wire]:
    sock = socket.create_connection(("127.0.0.1", port), timeout)
    # What is sent in two pieces arrives as two.
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    try:
        wire = Wire(tls.wrap_socket(sock) if tls is not None else sock)
    except BaseException:
        sock.close()
        raise
    try:
        yield wire
    finally:
        wire.close()
