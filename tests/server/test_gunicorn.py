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
from meshlib.server import gunicorn as tested
from meshlib.server.door import PEER, REFUSAL, Door, Standing
from meshlib.server.gunicorn import MeshSocket
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
