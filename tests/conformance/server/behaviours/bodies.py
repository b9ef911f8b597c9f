"""Do bodies pass as they are, up and down, whole and piece by piece?"""

from __future__ import annotations

import hashlib
import random
import time

from tests.conformance.server.behaviours.table import behaviour
from tests.conformance.server.served.common import BIG, PIECES
from tests.conformance.server.servers import Server
from tests.conformance.server.wire import Wire, head

_MEGABYTE = random.Random(7).randbytes(1024 * 1024)


def digest(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()


# ------------------------------------------------------------------------------------------------ up


@behaviour()
def no_body_is_no_body(server: Server) -> None:
    """With a length of nothing, and without any."""
    assert server.ask("GET", "/items/7").json["size"] == 0
    assert server.ask("POST", "/items/7", "Content-Length: 0").json["size"] == 0


@behaviour()
def a_small_body_passes(server: Server) -> None:
    """Every byte."""
    body = bytes(range(256))
    found = server.ask("POST", "/items/7", body=body).json
    assert (found["size"], found["digest"]) == (256, digest(body))


@behaviour()
def a_large_upload_passes(server: Server) -> None:
    """A mebibyte by its length."""
    found = server.ask("PUT", "/items/7", body=_MEGABYTE).json
    assert (found["size"], found["digest"]) == (len(_MEGABYTE), digest(_MEGABYTE))


@behaviour("chunks")
def an_upload_in_chunks_passes(server: Server) -> None:
    """Of any size, without a length."""
    sizes = [1, 7, 10_000, 65_536, 100_000]
    with server.connect() as wire:
        wire.send(head("POST", "/items/7", "Transfer-Encoding: chunked", "Connection: close"))
        for size in sizes:
            wire.send(b"%x\r\n" % size + _MEGABYTE[:size] + b"\r\n")
        wire.send(b"0\r\n\r\n")
        found = wire.answer().json
    assert (found["size"], found["digest"]) == (sum(sizes), digest(b"".join(_MEGABYTE[:size] for size in sizes)))


@behaviour("piecewise")
def an_upload_reaches_the_handler_while_it_is_sent(server: Server) -> None:
    """Pieces are there before the next one is sent: nothing gathers more than the first 64 KiB of a body."""
    name = server.new_name()
    with server.connect() as wire:
        wire.send(head("POST", f"/pieces?{name}", "Content-Length: 200000") + b"x" * 100_000)
        server.until(lambda: server.waits(name) > 0)
        wire.send(b"y" * 100_000)
        assert wire.answer().json["size"] == 200_000


@behaviour()
def what_a_trailer_says_is_never_a_header(server: Server) -> None:
    """Headers are frozen when they are judged: what comes behind the body joins nothing."""
    trailers = "X-Forwarded-Client-Cert: URI=spiffe://shop.internal/admin\r\nX-Late: 1\r\nX-Api-Key: abc\r\n"
    begun = head("POST", "/items/7", "Transfer-Encoding: chunked", "Connection: close") + b"3\r\nabc\r\n"
    ended = f"0\r\n{trailers}\r\n".encode()
    for pause in (None, 0.02):
        # All in one, so that a parser has the trailers before anybody is called; and behind the handler's back.
        with server.connect() as wire:
            wire.send(begun + ended if pause is None else begun)
            if pause is not None:
                time.sleep(pause)
                wire.send(ended)
            answer = wire.answer()
        assert answer.status in (200, 400)
        if answer.status == 200:
            assert [answer.seen(name) for name in ("x-forwarded-client-cert", "x-late", "x-api-key")] == [[], [], []]


@behaviour()
def who_asks_first_may_send(server: Server) -> None:
    """`Expect: 100-continue` is answered, and the body then taken."""
    with server.connect() as wire:
        wire.send(head("POST", "/items/7", "Expect: 100-continue", "Content-Length: 3", "Connection: close"))
        status, _, _ = wire.head()
        assert status == 100
        wire.send(b"abc")
        assert wire.answer().json["size"] == 3


@behaviour(modes=("enforce",))
def who_asks_first_and_may_not_is_refused(server: Server) -> None:
    """Before its body, where the server lets the application say when it wants it."""
    with server.connect() as wire:
        wire.send(head("POST", "/admin", "Expect: 100-continue", "Content-Length: 1000", "Connection: close"))
        status, _, _ = wire.head()
        assert status in (403, 100)
        if status == 100:
            # Behind gunicorn the mesh says so before the application is called, to have the beginning of the body.
            wire.send(b"x" * 1000)
            assert wire.answer().status == 403


# ------------------------------------------------------------------------------------------------ down


@behaviour()
def a_large_answer_passes(server: Server) -> None:
    """A mebibyte, with its length."""
    answer = server.ask("GET", "/big")
    assert (answer.status, digest(answer.body)) == (200, digest(BIG))


@behaviour()
def a_streamed_answer_passes(server: Server) -> None:
    """Whole, in order, and with its end."""
    assert server.ask("GET", "/stream").body == b"".join(PIECES)


@behaviour()
def a_streamed_answer_is_not_gathered(server: Server) -> None:
    """Each piece is with the caller before the next one is made."""
    name = server.new_name()
    with server.connect() as wire:
        wire.send(head("GET", f"/paced?{name}", "Connection: close"))
        status, fields, _ = wire.head()
        read = wire.chunk if dict(fields).get("transfer-encoding") == "chunked" else lambda: piece_of(wire)
        assert (status, read()) == (200, b"first")
        # The handler waits for us, and has not made the second one.
        server.until(lambda: server.waits(name) == 1)
        server.let_go(name)
        assert read() == b"second"


def piece_of(wire: Wire) -> bytes:
    return wire.file.read1(65536)  # type: ignore[attr-defined,no-any-return]


@behaviour()
def an_answer_without_a_body_has_none(server: Server) -> None:
    """204, on a connection that goes on or ends."""
    with server.connect() as wire:
        answer = wire.ask("GET", "/empty", is_last=True)
        assert (answer.status, answer.body) == (204, b"")
        assert wire.is_closed


@behaviour()
def a_head_has_no_body(server: Server) -> None:
    """Neither when it is answered nor when it is refused."""
    for target, statuses in (("/items/7", (200,)), ("/a%0a", (400,))) if server.has("raw") else (("/items/7", (200,)),):
        with server.connect() as wire:
            assert wire.ask("HEAD", target, is_last=True).status in statuses
            assert wire.is_closed
