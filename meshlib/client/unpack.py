"""How much may a compressed answer grow when it is unpacked?

A few kilobytes can stand for gigabytes. httpx unpacks whatever comes; for answers of services there is a bound: up to `FREE` bytes anything
goes, beyond it an answer that grows more than `RATIO` times is a bomb. What goes into the decoder goes in small pieces, so that the bound
is looked at before the memory is gone. (How many codings may stand on top of one another is said in `faults.py`.)

It puts a decoder of its own where httpx keeps its one (`Response._decoder`, which is no documented name; a test holds both versions to
it). Streams of raw bytes are not unpacked, and so not bounded. Hosts outside the mesh are httpx's own business.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType
from typing import Any, Final

FREE: Final = 64 * 1024 * 1024
RATIO: Final = 100
# Of what is packed; what is packed best of all becomes a thousand times as much.
PIECE: Final = 4096


def bounded(httpx: ModuleType, response: Any) -> Any:
    """The response, which unpacks no more than it should."""
    response._decoder = Bounded(httpx, response._get_content_decoder())
    return response


class Bounded:
    """A decoder of httpx's (which answers bytes) or httpx2's (which answers an iterator of them) with a bound. State of one answer."""

    __slots__ = ("_httpx", "_inner", "_packed", "_unpacked")

    def __init__(self, httpx: ModuleType, inner: Any) -> None:
        self._httpx = httpx
        self._inner = inner
        self._packed = 0
        self._unpacked = 0

    def decode(self, data: bytes) -> Any:
        answers = self._answers(data)
        return b"".join(answers) if self._is_whole else answers

    def flush(self) -> Any:
        found = self._inner.flush()
        return self._counted(found) if isinstance(found, bytes) else map(self._counted, found)

    @property
    def _is_whole(self) -> bool:
        return self._httpx.__name__ == "httpx"

    def _answers(self, data: bytes) -> Iterator[bytes]:
        for at in range(0, len(data), PIECE):
            piece = data[at : at + PIECE]
            self._packed += len(piece)
            found = self._inner.decode(piece)
            if isinstance(found, bytes):
                yield self._counted(found)
            else:
                yield from map(self._counted, found)

    def _counted(self, unpacked: bytes) -> bytes:
        self._unpacked += len(unpacked)
        if self._unpacked > FREE and self._unpacked > RATIO * self._packed:
            raise self._httpx.DecodingError(
                f"the answer has become {self._unpacked // 1048576} MiB, of {self._packed} packed bytes: it is made to fill the "
                "memory of whoever unpacks it. Read it with iter_raw() if it is meant to be so."
            )
        return unpacked
