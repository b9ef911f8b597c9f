"""Which connections come in, and as whom? The door alone: modes, first bytes, and what it says about a peer."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest

from meshlib import errors
from meshlib._native import core
from meshlib.server import door as doors
from meshlib.server.door import HANDSHAKE, REFUSAL, Door, door_of
from tests.server.inside import ORDERS, SHOP, Inside, store
from tests.support import identities

GET = ord("G")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("door")
    identities(home, "orders", "storefront")
    return home / "identities"


def door(mode: str, identity: Any) -> Door:
    mesh: Any = Inside(mode, identity)
    meshes.append(mesh)
    return Door(mesh)


meshes: list[Inside] = []


@pytest.mark.parametrize(
    ("mode", "has_identity", "plain", "tls"),
    [
        ("enforce", True, "refused", "tls"),
        ("permissive", True, "plain", "tls"),
        ("observe", True, "plain", "tls"),
        ("observe", False, "plain", "plain"),
        ("enforce", False, "refused", "refused"),
    ],
)
def test_the_mode_says_what_is_taken(folder: Path, mode: str, has_identity: bool, plain: str, tls: str) -> None:
    """enforce without an identity lets nothing in: it can't prove itself, and must not fall back."""
    tested = door(mode, store(folder) if has_identity else None)

    def judged(first: int) -> str:
        if tested.admits_plain(first):
            return "plain"
        return "refused" if tested.open(first) is None else "tls"

    assert (judged(GET), judged(HANDSHAKE)) == (plain, tls)
    assert tested.takes_only_plain() is (mode == "observe" and not has_identity)


def test_the_refusal_is_whole_http() -> None:
    """A person with curl reads why."""
    head, _, body = REFUSAL.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 ")
    assert b"content-length: %d\r\n" % len(body) in head
    assert b"mutual TLS" in body


def shake_hands(client: core.HttpConnection, server: core.TlsConnection) -> None:
    out = client.open()
    while out:
        _, back, _ = server.receive(out)
        out, _ = client.receive(back, len(back))


def test_the_peer_is_what_the_handshake_proved(folder: Path) -> None:
    """SPIFFE ID, serial number, end and chain; the extension has the shapes of today and of tomorrow."""
    tested, caller = door("enforce", store(folder)), store(folder, "storefront")
    tls = tested.open(HANDSHAKE)
    assert tls is not None
    shake_hands(core.HttpConnection(caller.client_tls, ORDERS, "orders"), tls)
    peer, extension = tested.welcome(tls)
    assert caller.current is not None
    assert (peer.spiffe_id, peer.is_tls, peer.not_after) == (SHOP, True, caller.current.not_after)
    assert int(peer.serial, 16) == int(caller.current.serial.replace(":", ""), 16)
    assert extension["client_cert"] == peer.chain[0]
    assert extension["client_cert_chain"][0].encode() in caller.current.chain.replace(b"\r\n", b"\n")
    assert (extension["tls_version"], extension["client_cert_error"]) == (0x0304, None)
    assert extension["cipher_suite"] in (0x1301, 0x1302, 0x1303)
    assert (tested.handshakes, tested.resumed) == (1, 0)
    left = tested.seconds_left(tls)
    assert left is not None
    assert left > 0


def test_a_caller_without_certificate_has_no_identity(folder: Path) -> None:
    """permissive: the wire is private, and nobody is proved."""
    tested = door("permissive", store(folder))
    tls = tested.open(HANDSHAKE)
    assert tls is not None
    bundles = store(folder).current.bundles  # type: ignore[union-attr]
    shake_hands(core.HttpConnection(core.TlsClient(None, None, bundles, 1), ORDERS, "orders"), tls)
    peer, extension = tested.welcome(tls)
    assert (peer.spiffe_id, peer.is_tls, extension["client_cert"], tested.seconds_left(tls)) == ("", True, None, None)


def test_a_failing_handshake_is_counted_each_time_and_told_once_in_a_while(caplog: pytest.LogCaptureFixture) -> None:
    """Whoever can connect can cause it: the log is not theirs to fill. Nor to be blinded by names that they make up."""
    mesh: Any = Inside("enforce", None)
    now = [0.0]
    tested = Door(mesh, lambda: now[0])
    for number in range(200):
        tested.fail(errors.PeerIdentityError(f"it is spiffe://evil{number}/x, and there is no bundle of that trust domain"))
    assert (tested.failed, len(caplog.messages)) == (200, 1)
    tested.fail(errors.PeerIdentityError("its certificate has expired"))
    assert len(caplog.messages) == 2
    now[0] = 11.0
    tested.fail(errors.PeerIdentityError("it is spiffe://real/x, and there is no bundle of that trust domain"))
    assert "199 more" in caplog.messages[-1]
    assert "spiffe://real/x" in caplog.messages[-1]


def test_a_chain_that_can_not_be_described_is_a_failed_handshake() -> None:
    """What TLS had no need to look at may be anything."""
    with pytest.raises(errors.PeerIdentityError, match="can't be parsed"):
        doors._described((b"no certificate",))


def test_a_mesh_has_one_door_and_takes_it_along() -> None:
    """The latest one is that of the process."""
    mesh: Any = Inside("observe", None)
    first = door_of(mesh)
    assert door_of(mesh) is first
    assert doors.latest() is first
    gone = weakref.ref(mesh)
    other: Any = Inside("observe", None)
    assert door_of(other) is doors.latest()
    del mesh, first
    gc.collect()
    assert gone() is None


def test_a_server_without_a_mesh_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """`uvicorn --http meshlib.server.uvicorn:MeshHTTP` for an application that nobody wrapped."""
    monkeypatch.setattr(doors, "_latest", None)
    with pytest.raises(RuntimeError, match=r"mesh\.asgi\(app\)"):
        doors.latest()
