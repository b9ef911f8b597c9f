"""How do the conformance tests speak? Raw bytes over plain sockets, or over Python's ssl as a foreign TLS implementation.

An HTTP client would tidy up what the tests are about.
"""

from __future__ import annotations

import contextlib
import json
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class Answer:
    def __init__(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.status = status
        self.headers = headers
        self.body = body

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    def __repr__(self) -> str:
        return f"<{self.status} {self.headers} {self.body[:200]!r}>"


class Wire:
    """One connection."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.file = sock.makefile("rb")

    def send(self, data: bytes) -> None:
        self.sock.sendall(data)

    def ask(self, method: str, target: str, *headers: str, body: bytes = b"", is_last: bool = False) -> Answer:
        """One request whose target and headers go out as they are (latin-1)."""
        lines = [
            f"{method} {target} HTTP/1.1",
            *([] if any(h.lower().startswith("host:") for h in headers) else ["Host: orders"]),
            *headers,
        ]
        if body:
            lines.append(f"Content-Length: {len(body)}")
        if is_last:
            lines.append("Connection: close")
        self.send("\r\n".join([*lines, "", ""]).encode("latin-1") + body)
        return self.answer(is_head=method == "HEAD")

    def answer(self, *, is_head: bool = False) -> Answer:
        line = self.file.readline()
        if not line:
            raise ConnectionError("closed without an answer")
        headers: dict[str, str] = {}
        while (field := self.file.readline().strip()) != b"":
            name, _, value = field.decode("latin-1").partition(":")
            headers[name.lower()] = value.strip()
        status = int(line.split()[1])
        if is_head or status in (101, 204, 304):
            body = b""
        elif headers.get("transfer-encoding") == "chunked":
            body = b""
            while size := int(self.file.readline(), 16):
                body += self.file.read(size)
                self.file.readline()
            self.file.readline()
        elif "content-length" in headers:
            body = self.file.read(int(headers["content-length"]))
        else:
            body = self.file.read()
        return Answer(status, headers, body)

    @property
    def is_closed(self) -> bool:
        """Whether the other side closes now, without another byte."""
        try:
            return self.file.read(1) == b""
        except (ConnectionError, ssl.SSLError):
            return True

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
    try:
        wire = Wire(tls.wrap_socket(sock) if tls is not None else sock)
    except BaseException:
        sock.close()
        raise
    try:
        yield wire
    finally:
        wire.close()
