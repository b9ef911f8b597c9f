"""Is what gunicorn gets for a socket a socket? A pair of sockets, our own client at the other end, and no gunicorn."""

from __future__ import annotations

import io
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from meshlib import errors
from meshlib._native import core
from meshlib.server import gunicorn_socket as tested
from meshlib.server import slow
from meshlib.server.door import PEER, PORT, PUBLIC, REFUSAL, Door, Standing
from meshlib.server.gunicorn_socket import CONTINUE, MeshSocket, place_of
from tests.server.inside import ORDERS, SHOP, Inside, store
from tests.support import identities


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("gunicorn")
    identities(home, "orders", "storefront")
    return home / "identities"


class Pair:
    """A connection: `sock` is gunicorn's side, `wire` the caller's."""

    def __init__(self, folder: Path, mode: str = "enforce") -> None:
        self.mesh = Inside(mode, store(folder))
        self.door = Door(self.mesh)  # type: ignore[arg-type]
        ours, self.wire = socket.socketpair()
        self.sock = MeshSocket(ours, self.door)
        self.client = core.HttpConnection(store(folder, "storefront").client_tls, ORDERS, "orders")
        for end in (ours, self.wire):
            end.settimeout(10)

    def call(self, *requests: tuple[str, str]) -> None:
        """The caller shakes hands and sends requests; in a thread, since gunicorn's side blocks."""
        threading.Thread(target=self._call, args=(requests,)).start()

    def _call(self, requests: tuple[tuple[str, str], ...]) -> None:
        self.wire.sendall(self.client.open())
        while not self.client.is_open:
            data = self.wire.recv(65536)
            out, _ = self.client.receive(data, len(data))
            self.wire.sendall(out)
        for method, target in requests:
            self.wire.sendall(self.client.send(method, target, [(b"host", b"orders")], None, False))

    def heard(self) -> bytes:
        """What the caller got as a body."""
        body = b""
        while data := self.wire.recv(65536):
            _, events = self.client.receive(data, len(data))
            body += b"".join(part for event in events for part in event if isinstance(part, bytes))
        return body

    def close(self) -> None:
        self.sock.close()
        self.wire.close()


@pytest.fixture
def pair(folder: Path) -> Iterator[Any]:
    made: list[Pair] = []

    def make(mode: str = "enforce") -> Pair:
        made.append(Pair(folder, mode))
        return made[-1]

    yield make
    for each in made:
        each.close()


REQUEST = b"GET /a HTTP/1.1\r\n"


def test_the_first_read_shakes_hands_and_names_the_peer(pair: Any) -> None:
    """Not the accept: that is the main thread's, and nobody may hold it up."""
    here = pair()
    assert repr(here.sock).startswith("<MeshSocket new")
    here.call(("GET", "/a"))
    assert here.sock.recv(len(REQUEST)) == REQUEST
    assert (here.sock.peer.spiffe_id, here.sock.environ[PEER], here.sock.environ["wsgi.url_scheme"]) == (
        SHOP,
        here.sock.peer,
        "https",
    )
    assert here.sock.environ["SSL_CLIENT_M_SERIAL"] == here.sock.peer.serial.upper()
    assert repr(here.sock).startswith("<MeshSocket tls")


def test_never_more_is_read_than_was_asked_for(pair: Any) -> None:
    """What is left waits inside, and says so: the socket itself has nothing to say any more."""
    here = pair()
    here.call(("GET", "/a"))
    first = here.sock.recv(3)
    buffer = bytearray(5)
    assert (first, here.sock.recv_into(buffer), bytes(buffer), here.sock.has_pending) == (b"GET", 5, b" /a H", True)
    here.sock.recv(65536)
    assert not here.sock.has_pending


def test_a_plain_connection_is_the_socket(pair: Any) -> None:
    """Mode permissive: read and written as it is."""
    here = pair("permissive")
    here.wire.sendall(REQUEST)
    assert here.sock.recv(65536) == REQUEST
    here.sock.sendall(b"one")
    assert here.sock.send(b"two") == 3
    here.sock.shutdown(socket.SHUT_WR)
    assert (here.wire.recv(10), here.wire.recv(10)) == (b"onetwo", b"")
    assert (here.sock.peer.spiffe_id, here.sock.environ["wsgi.url_scheme"], here.door.plain) == ("", "http", 1)


def test_after_a_refusal_nothing_is_read_as_a_request(pair: Any) -> None:
    """gunicorn drains what it closes: it gets as many bytes as came, and none of them."""
    here = pair()
    here.wire.sendall(REQUEST + REQUEST)
    with pytest.raises(ConnectionResetError):
        here.sock.recv(65536)
    assert here.sock.recv(65536) == bytes(2 * len(REQUEST))
    with pytest.raises(ConnectionResetError):
        here.sock.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
    with pytest.raises(ConnectionResetError):
        here.sock.send(b"x")
    here.sock.close()
    assert here.wire.makefile("rb").read() == REFUSAL


def test_a_handshake_that_fails_is_a_lost_connection(pair: Any) -> None:
    """With the alert that says why, and counted."""
    here, garbage = pair(), pair()
    here.client = core.HttpConnection(core.TlsClient(None, None, here.mesh.identity.current.bundles, 1), ORDERS, "orders")
    here.wire.sendall(here.client.open())
    threading.Thread(target=lambda: here.wire.sendall(received(here))).start()
    with pytest.raises(ConnectionResetError, match="handshake"):
        here.sock.recv(65536)
    here.sock.close()
    rest = b"".join(iter(lambda: here.wire.recv(65536), b""))
    with pytest.raises(errors.TlsError):
        here.client.receive(rest, len(rest))
    garbage.wire.sendall(b"\x16\x03\x01\x00\x05hello")
    with pytest.raises(ConnectionResetError, match="handshake"):
        garbage.sock.recv(65536)
    assert (here.door.failed, garbage.door.failed) == (1, 1)


def received(here: Pair) -> bytes:
    data = here.wire.recv(65536)
    out, _ = here.client.receive(data, len(data))
    return bytes(out)


def test_a_handshake_that_does_not_end_is_a_lost_connection(pair: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the socket has its own patience back."""
    monkeypatch.setattr(tested, "PATIENCE", 0.1)
    silent, halfway, gone = pair(), pair(), pair()
    halfway.wire.sendall(halfway.client.open()[:30])
    gone.wire.sendall(gone.client.open()[:30])
    gone.wire.close()
    for here in (silent, halfway, gone):
        with pytest.raises(ConnectionResetError):
            here.sock.recv(65536)
    assert silent.sock.gettimeout() == 10


def test_a_file_is_sent_through_tls(pair: Any, tmp_path: Path) -> None:
    """The kernel can't encrypt it: piece by piece, as much as was asked for."""
    here = pair()
    here.call(("GET", "/file"))
    here.sock.recv(65536)
    file = tmp_path / "file"
    file.write_bytes(b"0123456789" * 20_000)
    here.sock.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 150000\r\n\r\n")
    heard: list[bytes] = []
    reader = threading.Thread(target=lambda: heard.append(here.heard()))
    reader.start()
    with file.open("rb") as opened:
        assert here.sock.sendfile(opened, offset=50_000, count=100_000) == 100_000
    with io.BytesIO(b"0123456789" * 5_000) as whole:
        assert here.sock.sendfile(whole) == 50_000
    here.sock.close()
    reader.join()
    assert heard[0].endswith(b"0123456789" * 15_000)


def test_a_record_that_went_out_by_half_ends_the_connection(pair: Any) -> None:
    """gunicorn writes some errors without waiting; what follows half a record would be garbage."""
    here = pair()
    here.call(("GET", "/a"))
    here.sock.recv(65536)
    here.sock.setblocking(False)
    with pytest.raises(BlockingIOError):
        for _ in range(1000):
            here.sock.sendall(b"x" * 65536)
    here.sock.setblocking(True)
    with pytest.raises(ConnectionResetError):
        here.sock.sendall(b"x")


def test_damaged_records_are_a_lost_connection(pair: Any) -> None:
    """After the handshake, too."""
    here = pair()
    here.call(("GET", "/a"))
    here.sock.recv(65536)
    here.wire.sendall(b"\x17\x03\x03\x00\x20" + bytes(32))
    with pytest.raises(ConnectionResetError):
        here.sock.recv(65536)


def test_the_end_is_told_and_heard(pair: Any) -> None:
    """A goodbye of the caller is an end of file; ours is told before the socket closes."""
    here = pair()
    here.call(("GET", "/a"))
    here.sock.recv(65536)
    here.wire.sendall(here.client.close())
    assert here.sock.recv(10) == b""
    here.sock.shutdown(socket.SHUT_WR)
    assert here.wire.recv(65536) != b""
    assert here.wire.recv(65536) == b""


def test_a_connection_knows_how_far_its_proof_goes(pair: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When our identity was replaced, or the caller's proof has ended; a plain one never is."""
    from meshlib.secure.ca import CertificateAuthority

    here, plain = pair(), pair("permissive")
    here.call(("GET", "/a"))
    here.sock.recv(65536)
    plain.wire.sendall(REQUEST)
    plain.sock.recv(65536)
    assert here.sock.standing is Standing.GOOD
    CertificateAuthority.open(folder.parent / "ca").write("orders", folder)
    assert here.mesh.identity.refresh(0.0)
    assert here.sock.standing is Standing.LAST
    later = time.time() + 400 * 86400
    monkeypatch.setattr("meshlib.server.door.time", SimpleNamespace(time=lambda: later))
    assert here.sock.standing is Standing.OVER
    assert plain.sock.standing is Standing.GOOD


def test_it_has_the_rest_of_a_socket(pair: Any) -> None:
    """What gunicorn asks of one."""
    here = pair()
    assert here.sock.fileno() > 0
    here.sock.settimeout(3)
    assert here.sock.gettimeout() == 3
    here.sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    assert here.sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
    assert here.sock.family == socket.AF_UNIX
    assert (here.sock.getsockname(), here.sock.getpeername()) == ("", "")


# ------------------------------------------------------------------------------------------------ who is slow

HEAD = b"POST /a HTTP/1.1\r\nhost: orders\r\ncontent-length: %d\r\n\r\n"


def drained(sock: socket.socket) -> bytes:
    """Everything until the end."""
    return b"".join(iter(lambda: sock.recv(65536), b""))


def asked(here: Pair, request: bytes) -> None:
    """The caller's request was read, and is being served."""
    here.wire.sendall(request)
    here.sock.recv(65536)
    here.sock.end_head()
    here.sock.setblocking(True)


def test_a_request_is_there_when_its_body_is(pair: Any) -> None:
    """Nothing blocks meanwhile; what was read is there for gunicorn; and what follows it, too."""
    here = pair("permissive")
    here.sock.setblocking(False)
    assert (here.sock.has_request(), here.sock.until) == (False, None)
    here.wire.sendall(HEAD[:20])
    assert not here.sock.has_request()
    assert here.sock.until is not None
    here.wire.sendall(HEAD[20:] % 5 + b"123")
    assert not here.sock.has_request()
    here.wire.sendall(b"45GET /b")
    assert here.sock.has_request()
    here.sock.setblocking(True)
    assert here.sock.recv(65536) == HEAD % 5 + b"12345GET /b"
    here.sock.end_head()
    here.wire.close()
    assert here.sock.has_request()  # the end is something to serve, too


def test_the_same_through_tls(pair: Any) -> None:
    """Handshake, head and body, in as many pieces as they come."""
    here = pair()
    here.sock.setblocking(False)
    here.wire.sendall(here.client.open())
    while not here.client.is_open:
        assert not here.sock.has_request()
        data = here.wire.recv(65536)
        here.wire.sendall(here.client.receive(data, len(data))[0])
    records = here.client.send("POST", "/a", [(b"host", b"orders"), (b"content-length", b"3000")], None, True)
    records += here.client.send_body(b"x" * 3000, True)
    for byte in records[:-1]:
        here.wire.sendall(bytes([byte]))
        assert not here.sock.has_request()
    here.wire.sendall(records[-1:])
    assert here.sock.has_request()


def test_a_body_that_does_not_come_is_answered_408(pair: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the poller, and in a thread; and nothing is written behind that."""
    monkeypatch.setattr(slow, "PATIENCE_BODY", 0.2)
    waiting, served = pair("permissive"), pair("permissive")
    waiting.sock.setblocking(False)
    waiting.wire.sendall(HEAD % 5)
    with pytest.raises(ConnectionResetError):
        for _ in range(200):
            assert not waiting.sock.has_request()
            time.sleep(0.01)
    asked(served, HEAD % 5 + b"12")
    with pytest.raises(ConnectionResetError):
        served.sock.recv(10)
    for here in (waiting, served):
        assert here.sock.is_broken
        with pytest.raises(ConnectionResetError):
            here.sock.sendall(b"HTTP/1.1 500 Internal Server Error\r\ncontent-length: 0\r\n\r\n")
        here.sock.close()
        answer = drained(here.wire)
        assert answer.startswith(b"HTTP/1.1 408 Request Timeout\r\n")
        assert (answer.count(b"HTTP/1.1 "), b"connection: close" in answer) == (1, True)


def test_a_body_of_a_byte_now_and_then_ends_in_the_poller_too(pair: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """It renews nothing: a thousand of them would be all the connections of a worker."""
    monkeypatch.setattr(slow, "PATIENCE_BODY", 0.3)
    here = pair("permissive")
    here.sock.setblocking(False)
    here.wire.sendall(HEAD % 1000)
    begun = time.monotonic()
    with pytest.raises(ConnectionResetError):
        while time.monotonic() - begun < 20:
            assert not here.sock.has_request()
            here.wire.sendall(b"x")
            time.sleep(0.02)
    here.sock.close()
    assert drained(here.wire).startswith(b"HTTP/1.1 408 ")


def test_a_request_has_come_when_it_was_put_in_line(pair: Any) -> None:
    """Not when a thread has time for it, and not when its body is there; the next one has a time of its own."""
    here = pair("permissive")
    here.sock.setblocking(False)
    here.wire.sendall(HEAD[:20])
    here.sock.queued = 5.0
    assert (here.sock.has_request(), here.sock.arrived) == (False, 0.0)
    here.wire.sendall(HEAD[20:] % 2)
    here.sock.queued = 7.0
    assert (here.sock.has_request(), here.sock.arrived) == (False, 7.0)
    here.wire.sendall(b"ok")
    here.sock.queued = 9.0
    assert (here.sock.has_request(), here.sock.arrived) == (True, 7.0)
    here.sock.recv(65536)
    here.sock.end_head()
    here.sock.end_request(is_read=True)
    assert here.sock.arrived == 0.0
    here.wire.sendall(HEAD % 0)
    assert (here.sock.has_request(), here.sock.arrived) == (True, 9.0)


def test_nobody_is_waited_for_who_does_not_take_the_handshake(pair: Any) -> None:
    """Our part of it is less than any buffer holds."""
    here = pair()
    here.sock.setblocking(True)
    with pytest.raises(BlockingIOError):
        while True:
            here.sock._socket.send(bytes(65536), socket.MSG_DONTWAIT)
    here.wire.sendall(here.client.open())
    with pytest.raises(ConnectionResetError, match="could not be sent"):
        here.sock.has_request()


def test_a_handler_may_take_its_time_between_two_reads(pair: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the caller didn't make us wait for isn't its fault."""
    monkeypatch.setattr(slow, "PATIENCE_BODY", 0.2)
    here = pair("permissive")
    asked(here, HEAD % 4)
    for byte in b"1234":
        here.wire.sendall(bytes([byte]))
        time.sleep(0.15)
        assert here.sock.recv(1) == bytes([byte])


def test_once_something_was_answered_there_is_no_408(pair: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would be taken for a piece of that answer. The same for HTTP/1.0; a 100 or a hint is no answer."""
    monkeypatch.setattr(slow, "PATIENCE_BODY", 0.05)
    for sent, is_told in (
        (b"HTTP/1.1 200 OK\r\n\r\npart", False),
        (b"HTTP/1.0 200 OK\r\n\r\npart", False),
        (b"HTTP/1.1 103 Early Hints\r\n\r\n", True),
        (CONTINUE, True),
    ):
        here = pair("permissive")
        asked(here, HEAD % 5)
        here.sock.sendall(sent)
        with pytest.raises(ConnectionResetError):
            here.sock.recv(10)
        here.sock.close()
        answer = drained(here.wire)
        assert answer.startswith(sent)
        assert (b" 408 " in answer) is is_told, sent


def test_who_has_said_nothing_is_told_nothing(pair: Any) -> None:
    """A connection that was opened ahead of time and never used is closed, without an answer to no question."""
    here, begun = pair("permissive"), pair("permissive")
    begun.wire.sendall(b"GET /a")
    for each in (here, begun):
        each.sock.setblocking(False)
        assert not each.sock.has_request()
        each.sock.expire()
        each.sock.close()
    assert (drained(here.wire), drained(begun.wire)[:12]) == (b"", b"HTTP/1.1 408")


def test_who_waits_for_a_word_gets_it_once(pair: Any) -> None:
    """`Expect: 100-continue`, in the poller; gunicorn's own is the same one."""
    here = pair("permissive")
    here.sock.setblocking(False)
    here.wire.sendall(b"POST /a HTTP/1.1\r\nhost: orders\r\nexpect: 100-continue\r\ncontent-length: 2\r\n\r\n")
    assert not here.sock.has_request()
    assert here.wire.recv(65536) == CONTINUE
    assert not here.sock.has_request()
    here.wire.sendall(b"ok")
    assert here.sock.has_request()
    here.sock.setblocking(True)
    here.sock.recv(65536)
    here.sock.end_head()
    assert here.sock.send(CONTINUE) == len(CONTINUE)
    here.sock.sendall(b"HTTP/1.1 204 No Content\r\n\r\n")
    here.sock.end_request(is_read=True)
    here.sock.close()
    assert drained(here.wire) == b"HTTP/1.1 204 No Content\r\n\r\n"


@pytest.mark.parametrize("mode", ["permissive", "enforce"])
def test_who_does_not_read_the_answer_is_left(pair: Any, monkeypatch: pytest.MonkeyPatch, mode: str, tmp_path: Path) -> None:
    """A thread is not held for ever: neither for what is made, nor for a file."""
    monkeypatch.setattr(slow, "PATIENCE_BODY", 0.2)
    big = b"x" * 10_000_000
    (tmp_path / "big").write_bytes(big)
    for by_file in (False, True):
        here = pair(mode)
        if mode == "enforce":
            here.call(("GET", "/a"))
        asked(here, b"" if mode == "enforce" else b"GET /a HTTP/1.1\r\nhost: orders\r\n\r\n")
        here.sock.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 10000000\r\n\r\n")
        begun = time.monotonic()
        with pytest.raises(ConnectionResetError), (tmp_path / "big").open("rb") as file:
            if by_file:
                here.sock.sendfile(file, count=len(big))
            else:
                here.sock.sendall(big)
        assert (here.sock.is_broken, time.monotonic() - begun < 5) == (True, True)


@pytest.mark.parametrize("by_file", [True, False])
def test_who_reads_little_by_little_is_left_in_the_end(
    pair: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, by_file: bool
) -> None:
    """Always in time for the next piece, and never done: that has an end, too."""
    monkeypatch.setattr(slow, "PATIENCE_ALL", 0.4)
    monkeypatch.setattr(slow, "STEADY_RATE", 1e9)
    here = pair("permissive")
    asked(here, b"GET /a HTTP/1.1\r\nhost: orders\r\n\r\n")
    (tmp_path / "big").write_bytes(b"x" * 20_000_000)
    done = threading.Event()

    def read() -> None:
        while not done.wait(0.01) and here.wire.recv(100_000):
            pass

    reader = threading.Thread(target=read)
    reader.start()
    try:
        with pytest.raises(ConnectionResetError, match="too slowly"), (tmp_path / "big").open("rb") as file:
            if by_file:
                here.sock.sendfile(file)
            else:
                here.sock.sendall(b"x" * 20_000_000)
    finally:
        done.set()
        reader.join()


def test_a_file_is_sent_from_where_it_was_asked(pair: Any, tmp_path: Path) -> None:
    """By the kernel, all of it or a part."""
    here = pair("permissive")
    asked(here, b"GET /a HTTP/1.1\r\nhost: orders\r\n\r\n")
    (tmp_path / "file").write_bytes(b"0123456789" * 1000)
    with (tmp_path / "file").open("rb") as file:
        sent = (here.sock.sendfile(file, offset=5, count=10), here.sock.sendfile(file, offset=9_995))
    here.sock.close()
    assert (sent, drained(here.wire)) == ((10, 5), b"567890123456789")


def test_who_reads_steadily_gets_all_of_it(pair: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """In many more moments than the patience has."""
    monkeypatch.setattr(slow, "PATIENCE_BODY", 0.3)
    here = pair("permissive")
    asked(here, b"GET /a HTTP/1.1\r\nhost: orders\r\n\r\n")
    got: list[int] = []

    def read() -> None:
        while data := here.wire.recv(50_000):
            got.append(len(data))
            time.sleep(0.005)

    reader = threading.Thread(target=read)
    reader.start()
    here.sock.sendall(b"x" * 10_000_000)
    here.sock.close()
    reader.join()
    assert sum(got) == 10_000_000


def test_a_shorter_time_of_gunicorns_own_is_an_ordinary_timeout(pair: Any) -> None:
    """As it sets one for what it throws away."""
    here = pair("permissive")
    asked(here, HEAD % 5)
    here.sock.settimeout(0.05)
    with pytest.raises(TimeoutError):
        here.sock.recv(10)
    assert not here.sock.is_broken


# ------------------------------------------------------------------------------------------------ how it is answered


@pytest.mark.parametrize("finish", ["body", "end", "goodbye"])
def test_head_and_body_go_out_together(pair: Any, finish: str) -> None:
    """One packet, one record; a head without a body goes when the request ends, or the connection."""
    here = pair("permissive")
    asked(here, b"GET /a HTTP/1.1\r\nhost: orders\r\n\r\n")
    here.sock.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
    here.wire.settimeout(0.05)
    with pytest.raises(TimeoutError):
        here.wire.recv(65536)
    if finish == "body":
        here.sock.sendall(b"body")
    elif finish == "end":
        here.sock.end_request(is_read=True)
    else:
        here.sock.shutdown(socket.SHUT_WR)
    assert here.wire.recv(65536) == b"HTTP/1.1 200 OK\r\n\r\n" + (b"body" if finish == "body" else b"")


def test_when_all_is_read_and_said_nobody_waits_for_a_goodbye(pair: Any) -> None:
    """A sync worker has nobody else to do it; but what may still be on its way is waited for."""
    done, unread = pair("permissive"), pair("permissive")
    for here, is_read in ((done, True), (unread, False)):
        asked(here, b"GET /a HTTP/1.1\r\nhost: orders\r\n\r\n")
        here.sock.end_request(is_read=is_read)
        here.sock.shutdown(socket.SHUT_WR)
        here.sock.settimeout(0.05)
    assert done.sock.recv(4096) == b""
    with pytest.raises(TimeoutError):
        unread.sock.recv(4096)


def test_the_port_is_that_of_the_socket() -> None:
    """And so is whether it is public. No request has a word in it."""
    mesh = Inside("enforce", None)
    door = Door(mesh)  # type: ignore[arg-type]
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        assert (place_of(listener, door)[PORT], place_of(listener, door)[PUBLIC]) == (port, False)
        mesh.config.own.inbound.public = f"0.0.0.0:{port}"
        door = Door(mesh)  # type: ignore[arg-type]
        with socket.create_connection(listener.getsockname()) as wire:
            sock = MeshSocket(listener.accept()[0], door)
            assert (sock.port, sock.is_public, sock.environ[PUBLIC]) == (port, True, True)
            # In mode enforce, and without an identity of ours: plain text is welcome there.
            wire.sendall(REQUEST)
            assert sock.recv(65536) == REQUEST
            sock.close()


@pytest.mark.parametrize("is_public", [True, False])
def test_the_public_listener_takes_tls_without_a_certificate(pair: Any, is_public: bool) -> None:
    """The mesh port of the same service takes nobody without."""
    here = pair()
    here.sock.is_public = is_public
    here.client = core.HttpConnection(core.TlsClient(None, None, here.mesh.identity.current.bundles, 1), ORDERS, "orders")
    if is_public:
        here.call(("GET", "/a"))
        assert here.sock.recv(len(REQUEST)) == REQUEST
        assert (here.sock.peer.spiffe_id, here.sock.peer.is_tls, here.sock.standing) == ("", True, Standing.GOOD)
        return
    here.wire.sendall(here.client.open())
    threading.Thread(target=lambda: here.wire.sendall(received(here))).start()
    with pytest.raises(ConnectionResetError, match="handshake"):
        here.sock.recv(65536)
