"""Is an answer that fills the memory when it is unpacked refused, and every other one unpacked as ever?"""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path
from typing import Any

import httpx
import httpx2
import pytest

from meshlib.client import unpack
from meshlib.client.unpack import Bounded, bounded
from tests.support import Request, Scripted, mesh_of, scripted

PLAIN = b"a line of a log that repeats itself\n" * 3000


def packed(body: bytes, *codings: str) -> Any:
    async def answer(server: Scripted, request: Request) -> bytes:
        head = f"HTTP/1.1 200 OK\r\ncontent-length: {len(body)}\r\ncontent-encoding: {', '.join(codings)}\r\n\r\n"
        return head.encode() + body

    return answer


@pytest.mark.parametrize("module", [httpx, httpx2], ids=lambda module: module.__name__)
def test_the_decoder_stands_where_httpx_looks_for_it(module: Any) -> None:
    """The name isn't documented: here it would be seen if it changed."""
    response = module.Response(200, headers={"content-encoding": "gzip"}, stream=module.ByteStream(gzip.compress(PLAIN)))
    assert isinstance(bounded(module, response)._get_content_decoder(), Bounded)
    assert response.read() == PLAIN


async def test_an_ordinary_packed_answer_is_unpacked(tmp_path: Path) -> None:
    """Text shrinks a hundred times and more, and that is no crime."""
    async with scripted(packed(gzip.compress(PLAIN), "gzip")) as server:
        with mesh_of(tmp_path, {"web": {"discover": {"static": [server.address]}}}) as mesh:
            async with mesh.client() as http:
                assert (await http.get("http://web/")).content == PLAIN
                async with http.stream("GET", "http://web/") as answer:
                    assert b"".join([piece async for piece in answer.aiter_bytes()]) == PLAIN


async def test_a_bomb_is_left_before_it_is_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bound is looked at after each small piece."""
    monkeypatch.setattr(unpack, "FREE", 1 << 20)
    squeezer = zlib.compressobj(9, wbits=31)
    bomb = b"".join(squeezer.compress(bytes(1 << 20)) for _ in range(40)) + squeezer.flush()
    async with scripted(packed(bomb, "gzip")) as server:
        with mesh_of(tmp_path, {"web": {"discover": {"static": [server.address]}}}) as mesh:
            async with mesh.client() as http:
                with pytest.raises(httpx.DecodingError, match="MiB"):
                    await http.get("http://web/")
