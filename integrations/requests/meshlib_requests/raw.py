"""What does `response.raw` hold, when no urllib3 connection is behind it?

A `urllib3.HTTPResponse` nevertheless, made with the arguments of its public constructor: it decodes, counts and hands out the body as ever,
and reads it from a file whose bytes come from the mesh. The one thing that differs: a body without a length is handed out as it
comes, since the chunks of the wire are gone, and a reader of events must not wait for a block to be full.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from http.client import HTTPMessage
from typing import Any

import httpx
from requests import PreparedRequest
from urllib3 import HTTPHeaderDict, HTTPResponse
from urllib3.exceptions import HTTPError

import meshlib

from .failures import as_requests_says

_VERSIONS = {b"HTTP/1.0": 10, b"HTTP/1.1": 11, b"HTTP/2": 20}


class Body(io.RawIOBase):
    """The body of an answer as a file. Its errors are OSErrors, which urllib3 expects of a socket."""

    def __init__(self, answer: httpx.Response, request: PreparedRequest) -> None:
        super().__init__()
        self._answer = answer
        self._request = request
        self._pieces: Iterator[bytes] = iter(answer.stream)  # type: ignore[arg-type]  # a blocking transport's stream is a blocking one
        self._rest = b""
        self._is_over = False
        size = answer.headers.get("content-length", "")
        self._left = int(size) if size.isdigit() and request.method != "HEAD" else None

    def readable(self) -> bool:
        return True

    def read(self, size: int | None = -1) -> bytes:
        """As many bytes as were asked for, or what is left."""
        pieces, missing = [], size if size is not None and size >= 0 else None
        while missing is None or missing > 0:
            piece = self.read1(missing)
            if not piece:
                break
            pieces.append(piece)
            if missing is not None:
                missing -= len(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def read1(self, size: int | None = -1) -> bytes:
        """What there is, at most `size` bytes; waits only if there is nothing."""
        piece = self._rest or self._pull()
        if size is not None and 0 <= size < len(piece):
            piece, self._rest = piece[:size], piece[size:]
        else:
            self._rest = b""
        if self._is_over and not self._rest:
            self.close()
        return piece

    def readinto(self, buffer: Any) -> int:
        piece = self.read(len(buffer))
        buffer[: len(piece)] = piece
        return len(piece)

    def close(self) -> None:
        if not self.closed:
            self._answer.close()
        super().close()

    def _pull(self) -> bytes:
        if self._is_over or self.closed:
            return b""
        try:
            piece = next(self._pieces, b"")
            if self._left is not None:
                self._left -= len(piece)
                if piece and self._left <= 0:
                    # A connection is used again only if its body was read to the end, and nobody asks again for what is complete.
                    next(self._pieces, b"")
                    self._is_over = True
        except meshlib.MeshError as error:
            raise as_requests_says(error, self._request, has_begun=True) from error.__cause__
        self._is_over |= not piece
        return piece


class Original:
    """As much of an `http.client.HTTPResponse` as a cookie jar and urllib3 want to see."""

    def __init__(self, msg: HTTPMessage, body: Body) -> None:
        self.msg = msg
        self._body = body

    def isclosed(self) -> bool:
        return self._body.closed

    def close(self) -> None:
        self._body.close()


class MeshRaw(HTTPResponse):
    """An answer of the mesh as urllib3's own. `call` is its `meshlib.Call`."""

    call: meshlib.Call | None = None

    def stream(self, amt: int | None = 2**16, decode_content: bool | None = None) -> Iterator[bytes]:  # type: ignore[override]
        try:
            if self.length_remaining is not None:
                yield from super().stream(amt, decode_content)
            elif amt != 0:
                while piece := self.read1(amt, decode_content):
                    yield piece
        except HTTPError as error:
            if isinstance(error.__cause__, meshlib.MeshError):
                raise error.__cause__ from error.__cause__.__cause__
            raise


def raw_of(answer: httpx.Response, request: PreparedRequest) -> MeshRaw:
    """An answer of the mesh's transport, in the form that requests reads."""
    headers, msg = HTTPHeaderDict(), HTTPMessage()
    for name, value in answer.headers.raw:
        headers.add(name.decode("latin-1"), value.decode("latin-1"))
        msg[name.decode("latin-1")] = value.decode("latin-1")
    body = Body(answer, request)
    version = answer.extensions.get("http_version", b"HTTP/1.1")
    raw = MeshRaw(
        body,
        headers=headers,
        status=answer.status_code,
        version=_VERSIONS.get(version, 11),
        version_string=version.decode("ascii"),
        reason=answer.extensions.get("reason_phrase", b"").decode("latin-1"),
        preload_content=False,
        decode_content=False,
        original_response=Original(msg, body),  # type: ignore[arg-type]  # a likeness, see above
        msg=msg,
        request_method=request.method,
        request_url=request.path_url,
    )
    raw.call = answer.extensions.get("meshlib.call")
    return raw
