"""What the peer of a gRPC connection has proved can cease to hold while the connection is open. Real handshakes and certificates."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from meshlib.secure.ca import CertificateAuthority
from meshlib.server.grpc.peer import Callers

sys.path.insert(0, str(Path(__file__).parent.parent / "grpc_support"))
from grpc_world import WHO, Party, Shop, yaml_of

STOREFRONT = "spiffe://shop.internal/ns/default/sa/storefront"
PARTNER = "spiffe://partner.example/ns/default/sa/storefront"
ANYONE = f'allow: [{{name: shop, from: [storefront, "{PARTNER}"], paths: ["/shop.Inventory/*"]}}]'


class Held:
    """An identity of ours, as the store of a mesh has it, that a test can change."""

    def __init__(self, party: Party) -> None:
        assert party.identity is not None
        self.current: Any = party.identity.current

    def change(self, **changes: Any) -> None:
        self.current = dataclasses.replace(self.current, **changes)


class World:
    """A server with an identity that can change, and another trust domain beside ours."""

    def __init__(self, folder: Path) -> None:
        (folder / "partner").mkdir()
        self.shop = Shop(folder, yaml_of(allow=ANYONE))
        self.partner = CertificateAuthority.create(None, "partner.example")
        self.party = self.shop.party("inventory")
        self.own = Held(self.party)
        self.party.identity = self.own  # type: ignore[assignment]
        self.address = ""

    async def start(self) -> None:
        self.address = (await self.shop.start("a", party=self.party)).address

    def channel(self, chain: bytes, key: bytes) -> Any:
        credentials = grpc.ssl_channel_credentials(self.own.current.bundles["shop.internal"], key, chain)
        options = [("grpc.ssl_target_name_override", "inventory.default.shop.internal"), ("grpc.use_local_subchannel_pool", 1)]
        return grpc.aio.secure_channel(self.address, credentials, options=options)

    def of(self, authority: CertificateAuthority, folder: str = "partner") -> tuple[bytes, bytes]:
        """A certificate for the storefront, and its key."""
        out = self.shop.folder / folder
        authority.write("storefront", out)
        return (out / "storefront" / "svid.pem").read_bytes(), (out / "storefront" / "key.pem").read_bytes()


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    world = World(tmp_path)
    yield world
    await world.shop.stop()


async def outcome(channel: Any) -> str:
    """Who we are to the server, or why it doesn't know us."""
    try:
        return str((await channel.unary_unary(WHO)(b"", timeout=5)).decode().split("|")[0])
    except grpc.RpcError as error:
        return str(error.code().name)


async def test_a_revoked_certificate_proves_nothing_from_then_on(world: World) -> None:
    """On the connection that exists as on a new one; those of others go on."""
    await world.start()
    chain, key = world.of(world.shop.ca, "first")
    other = world.of(world.shop.ca, "second")
    async with world.channel(chain, key) as channel, world.channel(*other) as untouched:
        assert (await outcome(channel), await outcome(untouched)) == (STOREFRONT, STOREFRONT)
        world.own.change(crls={"shop.internal": world.shop.ca.crl})
        assert (await outcome(channel), await outcome(untouched)) == (STOREFRONT, STOREFRONT)
        world.shop.ca.revoke(serial_of(chain))
        world.own.change(crls={"shop.internal": world.shop.ca.crl})
        assert (await outcome(channel), await outcome(untouched)) == ("UNAUTHENTICATED", STOREFRONT)
    async with world.channel(chain, key) as again:
        assert await outcome(again) == "UNAUTHENTICATED"


def serial_of(chain: bytes) -> str:
    from cryptography import x509

    from meshlib.secure.certificates import serial_text

    return serial_text(x509.load_pem_x509_certificate(chain).serial_number)


async def test_callers_of_a_federated_trust_domain_are_known_as_long_as_its_bundle_is_there(world: World) -> None:
    """A bundle that comes lets new connections in; when it goes, those that exist are of callers without identity."""
    await world.start()
    chain, key = world.of(world.partner)
    async with world.channel(chain, key) as early:
        assert await outcome(early) == "UNAVAILABLE"
    ours = world.own.current.bundles
    world.own.change(bundles={**ours, "partner.example": world.partner.bundle})
    async with world.channel(chain, key) as channel:
        assert await outcome(channel) == PARTNER
        world.own.change(bundles=ours)
        assert await outcome(channel) == "UNAUTHENTICATED"


async def test_a_federated_ca_can_vouch_for_its_own_trust_domain_only(world: World) -> None:
    """gRPC can't tell which root belongs to whom, and takes the connection; the identity that it shows is not believed."""
    forger = CertificateAuthority.create(None, "shop.internal")
    world.own.change(bundles={**world.own.current.bundles, "partner.example": forger.bundle})
    await world.start()
    chain, key = world.of(forger, "forged")
    async with world.channel(chain, key) as channel:
        assert await outcome(channel) == "UNAUTHENTICATED"


def test_a_chain_is_judged_once_for_each_identity_of_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It costs as much as a handshake; a new bundle or list of revocations is a new identity."""
    from meshlib.server.grpc import peer as grpc_peer

    party = Shop(tmp_path).party("inventory")
    own = Held(party)
    pem = (tmp_path / "identities" / "storefront" / "svid.pem").read_bytes()
    judged: list[bytes] = []
    proves = grpc_peer._proves

    def counting(chain: bytes, *more: Any) -> bool:
        judged.append(chain)
        return proves(chain, *more)

    monkeypatch.setattr(grpc_peer, "_proves", counting)
    callers = Callers(lambda: own.current, time.time)
    auth = {
        "transport_security_type": [b"ssl"],
        "peer_spiffe_id": [STOREFRONT.encode()],
        "peer_uri": [STOREFRONT.encode()],
        "x509_pem_cert": [pem],
    }
    assert [callers.peer_of(auth).spiffe_id for _ in range(3)] == [STOREFRONT] * 3
    assert len(judged) == 1
    own.change(crls={})
    assert callers.peer_of(auth).spiffe_id == STOREFRONT
    assert len(judged) == 2
