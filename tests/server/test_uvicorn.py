"""Is the transport that uvicorn's protocols get a transport, and what becomes of a connection on the way there? A loop, no sockets."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from meshlib._native import core
from meshlib.server import uvicorn as tested
from meshlib.server.door import PEER, REFUSAL, Door
from meshlib.server.uvicorn import HOLD, MeshHTTP, TlsTransport
from tests.server.inside import ORDERS, SHOP, Inside, store
from tests.support import identities


class Below(asyncio.Transport):
    """The event loop's transport, as far as it is seen from above."""

    def __init__(self) -> None:
        super().__init__()
        self.writes: list[bytes] = []
        self.calls: list[str] = []
        self.protocol: Any = None
        self.is_over = False

    def write(self, data: Any) -> None:
        self.writes.append(bytes(data))

    def close(self) -> None:
        self.is_over = True
        self.calls.append("close")

    def abort(self) -> None:
        self.is_over = True
        self.calls.append("abort")

    def is_closing(self) -> bool:
        return self.is_over

    def set_protocol(self, protocol: Any) -> None:
        self.protocol = protocol

    def pause_reading(self) -> None:
        self.calls.append("pause_reading")

    def resume_reading(self) -> None:
        self.calls.append("resume_reading")

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return {"peername": ("127.0.0.1", 4000)}.get(name, default)

    def get_write_buffer_size(self) -> int:
        return 7


class Above(asyncio.Protocol):
    """An HTTP protocol that remembers."""

    made: list[Above] = []

    def __init__(self, config: Any, server_state: Any, app_state: Any, _loop: Any) -> None:
        self.config = config
        self.state = server_state
        self.transport: Any = None
        self.data = b""
        self.calls: list[Any] = []
        Above.made.append(self)

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        self.state.connections.add(self)

    def data_received(self, data: bytes) -> None:
        self.data += data

    def eof_received(self) -> None:
        self.calls.append("eof")

    def connection_lost(self, exc: Any) -> None:
        self.state.connections.discard(self)
        self.calls.append(("lost", exc))

    def pause_writing(self) -> None:
        self.calls.append("pause")

    def resume_writing(self) -> None:
        self.calls.append("resume")

    def shutdown(self) -> None:
        self.calls.append("shutdown")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("uvicorn")
    identities(home, "orders", "storefront")
    return home / "identities"


class Connection:
    """A connection at the door, with our client at its other end."""

    def __init__(self, folder: Path, mode: str = "enforce") -> None:
        self.mesh = Inside(mode, store(folder))
        self.door = Door(self.mesh)  # type: ignore[arg-type]
        self.state = SimpleNamespace(connections=set())
        self.scopes: list[Any] = []
        config: Any = SimpleNamespace(loaded_app=self.app, ws_protocol_class=None)
        self.below = Below()
        self.front = MeshHTTP.behind(self.door, Above)(config, self.state, {}, asyncio.get_running_loop())  # type: ignore[arg-type]
        self.front.connection_made(self.below)
        caller = store(folder, "storefront")
        self.client = core.HttpConnection(caller.client_tls, ORDERS, "orders")
        Above.made.clear()

    async def app(self, scope: Any, receive: Any, send: Any) -> None:
        self.scopes.append(scope)

    def shake_hands(self) -> tuple[Above, TlsTransport]:
        self.front.data_received(self.client.open())
        self.deliver(self.answer())
        (above,) = Above.made
        assert isinstance(self.below.protocol, TlsTransport)
        self.answer()
        return above, self.below.protocol

    def deliver(self, data: bytes) -> None:
        """Bytes from the wire, as a loop gives them to a buffered protocol."""
        protocol = self.below.protocol
        buffer = protocol.get_buffer(-1)
        buffer[: len(data)] = data
        protocol.buffer_updated(len(data))

    def answer(self) -> bytes:
        sent = b"".join(self.below.writes)
        self.below.writes.clear()
        out, _ = self.client.receive(sent, len(sent))
        return out


@pytest.fixture
def connection(folder: Path) -> Iterator[Any]:
    yield lambda mode="enforce": Connection(folder, mode)
    Above.made.clear()


async def test_a_plain_connection_is_handed_over_as_it_is(connection: Any) -> None:
    """From its first byte on it is uvicorn's alone: the transport is the loop's own, and so is the protocol."""
    here = connection("permissive")
    here.front.data_received(b"GET / HTTP/1.1\r\n")
    (above,) = Above.made
    assert (above.transport, above.data, here.below.protocol) == (here.below, b"GET / HTTP/1.1\r\n", above)
    assert (here.state.connections, here.door.plain) == ({above}, 1)


async def test_where_nothing_is_to_be_told_apart_nothing_is_waited_for(connection: Any) -> None:
    """Mode observe without an identity: uvicorn has the connection before its first byte."""
    here = connection()
    here.mesh.config.own.mode, here.mesh.identity = "observe", None
    fresh = MeshHTTP.behind(here.door, Above)(here.front._config, here.state, {}, asyncio.get_running_loop())
    fresh.connection_made(here.below)
    assert here.below.protocol is Above.made[-1]


async def test_a_plain_connection_is_refused_in_words(connection: Any) -> None:
    """Mode enforce; nothing is made for it."""
    here = connection()
    here.front.data_received(b"GET / HTTP/1.1\r\n\r\n")
    here.front.data_received(b"GET / HTTP/1.1\r\n\r\n")
    assert (here.below.writes, here.below.calls, Above.made) == ([REFUSAL], ["close"], [])


async def test_the_application_finds_the_peer_in_its_scope(connection: Any) -> None:
    """In the TLS extension, for http and for websocket; extensions of the server stay."""
    here = connection()
    above, _ = here.shake_hands()
    await above.config.loaded_app({"type": "http"}, None, None)
    await above.config.loaded_app({"type": "websocket", "extensions": {"websocket.http.response": {}}}, None, None)
    assert [scope["extensions"]["tls"][PEER].spiffe_id for scope in here.scopes] == [SHOP, SHOP]
    assert "websocket.http.response" in here.scopes[1]["extensions"]
    assert here.front._config.loaded_app == here.app  # the server's own configuration is untouched


async def test_head_and_body_become_one_record(connection: Any) -> None:
    """What is written in one round of the loop is encrypted and sent at once."""
    here = connection()
    above, _ = here.shake_hands()
    above.transport.write(b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\n")
    above.transport.writelines([b"bo", bytearray(b"dy")])
    assert here.below.writes == []
    assert above.transport.get_write_buffer_size() > 7
    await asyncio.sleep(0)
    assert len(here.below.writes) == 1
    above.transport.write(b"x" * (HOLD + 1))
    assert len(here.below.writes) == 2  # large ones don't wait


async def test_closing_sends_what_was_written(connection: Any) -> None:
    """First the rest, then goodbye, then the end; afterwards nothing more."""
    here = connection()
    above, transport = here.shake_hands()
    here.client.send("GET", "/", [(b"host", b"orders")], None, False)
    above.transport.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")
    above.transport.close()
    above.transport.write(b"too late")
    above.transport.close()
    assert (transport.is_closing(), here.below.calls) == (True, ["close"])
    sent = b"".join(here.below.writes)
    _, events = here.client.receive(sent, len(sent))
    assert any(b"ok" in part for event in events for part in event if isinstance(part, bytes))
    await asyncio.sleep(0)
    assert b"".join(here.below.writes) == sent


async def test_it_is_a_transport_in_all_that_uvicorn_asks(connection: Any) -> None:
    """Flow control in both directions, addresses, and that it is TLS."""
    here = connection()
    above, transport = here.shake_hands()
    above.transport.pause_reading()
    above.transport.resume_reading()
    transport.pause_writing()
    transport.resume_writing()
    assert here.below.calls == ["pause_reading", "resume_reading"]
    assert above.calls == ["pause", "resume"]
    assert transport.get_extra_info("peername") == ("127.0.0.1", 4000)
    assert transport.get_extra_info("sslcontext")
    assert (transport.get_extra_info("ssl_object"), transport.can_write_eof()) == (None, False)
    assert transport.get_protocol() is above
    other = Above(None, here.state, {}, None)
    transport.set_protocol(other)  # an upgrade to WebSocket
    request = here.client.send("GET", "/", [(b"host", b"orders")], None, False)
    here.deliver(request)
    assert (above.data, other.data[:5]) == (b"", b"GET /")


async def test_the_end_is_passed_on_in_both_directions(connection: Any) -> None:
    """A close of the caller is an end of file above; a lost connection is lost above, and nothing is written to it any more."""
    here = connection()
    above, transport = here.shake_hands()
    here.deliver(here.client.close())
    assert (above.calls, here.below.calls) == (["eof"], ["close"])
    transport.connection_lost(None)
    above.transport.write(b"x")
    await asyncio.sleep(0)
    assert above.calls == ["eof", ("lost", None)]
    assert here.state.connections == set()


async def test_broken_records_end_the_connection_with_an_alert(connection: Any) -> None:
    """And uvicorn hears of it as of any lost connection."""
    here = connection()
    above, transport = here.shake_hands()
    here.deliver(b"\x17\x03\x03\x00\x20" + bytes(32))
    assert here.below.calls == ["close"]
    assert here.below.writes[0][0] in (0x15, 0x17)  # an alert, encrypted by then
    transport.connection_lost(None)
    assert above.calls == [("lost", None)]


async def test_a_handshake_that_does_not_end_is_ended(connection: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before its first byte, and in its middle."""
    monkeypatch.setattr(tested, "PATIENCE", 0.05)
    silent, halfway = connection(), connection()
    halfway.front.data_received(halfway.client.open()[:20])
    await asyncio.sleep(0.15)
    assert (silent.below.calls, halfway.below.calls) == (["abort"], ["abort"])
    done = connection()
    done.shake_hands()
    await asyncio.sleep(0.15)
    assert done.below.calls == []


async def test_a_server_that_ends_ends_connections_in_every_state(connection: Any) -> None:
    """uvicorn tells all that are in its set: before the first byte, in the handshake; afterwards it's the protocol above."""
    silent, halfway, done = connection(), connection(), connection()
    halfway.front.data_received(halfway.client.open()[:20])
    above, _ = done.shake_hands()
    for here in (silent, halfway, done):
        (entry,) = here.state.connections
        entry.shutdown()
    assert (silent.below.calls, halfway.below.calls, above.calls) == (["close"], ["abort"], ["shutdown"])


async def test_a_connection_of_a_replaced_identity_answers_once_more(connection: Any, folder: Path) -> None:
    """With `connection: close`; a websocket goes on."""
    here = connection()
    above, _ = here.shake_hands()
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"a", b"b")]})
        await send({"type": "http.response.body", "body": b""})

    above.config.loaded_app._app = app
    here.deliver(here.client.send("GET", "/", [(b"host", b"orders")], None, False))
    await above.config.loaded_app({"type": "http"}, None, send)
    assert sent[0]["headers"] == [(b"a", b"b")]
    identities_of_next_generation(folder)
    assert here.mesh.identity.refresh(0.0)
    reply = b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n"
    above.transport.write(reply)
    await asyncio.sleep(0)
    here.answer()
    here.deliver(here.client.send("GET", "/", [(b"host", b"orders")], None, False))
    await above.config.loaded_app({"type": "http"}, None, send)
    await above.config.loaded_app({"type": "websocket"}, None, send)
    assert [message["headers"] for message in sent if "headers" in message][1:] == [
        [(b"a", b"b"), (b"connection", b"close")],
        [(b"a", b"b")],
    ]


def identities_of_next_generation(folder: Path) -> None:
    from meshlib.secure.ca import CertificateAuthority

    CertificateAuthority.open(folder.parent / "ca").write("orders", folder)


async def test_a_connection_whose_callers_proof_ends_is_retired(connection: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """At that moment, also if nothing happens on it."""
    here = connection()
    monkeypatch.setattr(Door, "seconds_left", lambda self, tls: 0.05)
    above, _ = here.shake_hands()
    assert above.calls == []
    await asyncio.sleep(0.15)
    assert above.calls == ["shutdown"]
