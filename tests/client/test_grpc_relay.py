"""gRPC reaches a server whose certificate has a SPIFFE ID and no DNS name: real servers, certificates, sockets and processes."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import os
import socket
import ssl
import stat
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent import futures
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import grpc.aio
import pytest

from meshlib import errors
from meshlib._native import core
from meshlib.client.grpc import MeshChannel, MeshSyncChannel
from meshlib.client.grpc import nest as grpc_nest
from meshlib.client.grpc import relay as grpc_relay
from meshlib.client.grpc import relay_thread as grpc_relay_thread
from meshlib.client.grpc.links import PeerNames, peer_names
from meshlib.client.grpc.relay import Relay
from meshlib.client.grpc.status import judge
from meshlib.config import load
from meshlib.secure import FolderSource, IdentityStore, certificates
from meshlib.secure.ca import CertificateAuthority
from tests.support import free_port
from tests.wire import envoy

sys.path.insert(0, str(Path(__file__).parent.parent / "grpc_support"))
from grpc_world import (
    CHAT,
    COUNT,
    ECHO,
    SLOW,
    SUM,
    Party,
    Shop,
    blocking_handlers,
    handlers,
    until,
    yaml_of,
)

RULES = 'peer_check: spiffe, allow: [{from: [storefront], paths: ["/shop.Inventory/*"]}]'
TURNS = "retry: {attempts: 1, backoff: [0.001, 0.002]}\nbalance: {policy: round_robin}"
INVENTORY = "spiffe://shop.internal/ns/default/sa/inventory"
PARTNER = "spiffe://partner.test/eu/stock"
NO_RETRY = "retry: {attempts: 0}"


def only_uri(ca: CertificateAuthority, spiffe_id: str, ttl: float = 3600.0) -> tuple[bytes, bytes]:
    """Key and chain without any DNS name."""
    key = certificates.new_key()
    return certificates.key_pem(key), ca.sign(key.public_key(), "inventory", spiffe_id, "", ttl).chain


class Foreign:
    """A gRPC server that knows nothing of the mesh, with a certificate that has a URI SAN only."""

    def __init__(self, ca: CertificateAuthority, spiffe_id: str = INVENTORY, *, roots: bytes = b"", ttl: float = 3600.0) -> None:
        self.behaviour = SimpleNamespace(calls=0, delay=0.0, fails=None, words="", name="foreign")
        self.credentials = grpc.ssl_server_credentials(
            [only_uri(ca, spiffe_id, ttl)], roots or ca.bundle, require_client_auth=True
        )
        self.server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
        self.server.add_generic_rpc_handlers((handlers(self.behaviour),))  # type: ignore[arg-type]
        self.address = ""

    @property
    def calls(self) -> int:
        return int(self.behaviour.calls)

    async def start(self) -> Foreign:
        self.address = f"127.0.0.1:{self.server.add_secure_port('127.0.0.1:0', self.credentials)}"
        await self.server.start()
        return self


@contextlib.contextmanager
def foreign_in_threads(ca: CertificateAuthority, spiffe_id: str = INVENTORY) -> Iterator[str]:
    server = grpc.server(futures.ThreadPoolExecutor(8), options=[("grpc.so_reuseport", 0)])
    server.add_generic_rpc_handlers((blocking_handlers(),))
    credentials = grpc.ssl_server_credentials([only_uri(ca, spiffe_id)], ca.bundle, require_client_auth=True)
    port = server.add_secure_port("127.0.0.1:0", credentials)
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(None).wait(5)


def aio_channel(party: Party, **more: Any) -> MeshChannel:
    return MeshChannel("inventory", party.outbound, names=peer_names(party.config, "inventory"), **more)


def sync_channel(party: Party, **more: Any) -> MeshSyncChannel:
    return MeshSyncChannel("inventory", party.outbound, names=peer_names(party.config, "inventory"), **more)


def relays_of(channel: Any) -> list[Relay]:
    return [link.relay for link in channel._links._links.values() if link.relay is not None]


def nothing_is_left() -> None:
    """No socket, no folder, no thread."""
    assert not grpc_relay._relays
    assert grpc_nest.nest.folder is None
    assert not grpc_relay_thread.relay_thread.is_running
    assert [thread.name for thread in threading.enumerate() if thread.name.startswith("meshlib-grpc-relay")] == []


@pytest.fixture
async def shop(tmp_path: Path) -> AsyncIterator[Shop]:
    shop = Shop(tmp_path, yaml_of(more=TURNS, allow=RULES))
    yield shop
    await shop.stop()


@pytest.fixture
async def start(shop: Shop) -> AsyncIterator[Callable[..., Any]]:
    """Starts foreign servers, and stops them with the test."""
    started: list[Foreign] = []

    async def start(ca: CertificateAuthority | None = None, *given: Any, **more: Any) -> Foreign:
        started.append(await Foreign(ca or shop.ca, *given, **more).start())
        return started[-1]

    yield start
    for server in started:
        await server.server.stop(None)


def party_of(shop: Shop, *servers: Any) -> Party:
    return shop.party("storefront").knows([server.address for server in servers])


async def failure(call: Any) -> Any:
    with pytest.raises(grpc.RpcError) as caught:
        await call
    return caught.value


# ------------------------------------------------------------------------------------------------ the four kinds of call


async def test_all_four_kinds_of_call_reach_a_server_without_a_dns_name(shop: Shop, start: Any) -> None:
    party = party_of(shop, await start())
    async with aio_channel(party) as channel:
        assert await channel.unary_unary(ECHO)(b"x") == b"x"
        assert [piece async for piece in channel.unary_stream(COUNT)(b"3")] == [b"0", b"1", b"2"]
        assert await channel.stream_unary(SUM)(iter([b"1", b"2", b"3"])) == b"6"
        assert [piece async for piece in channel.stream_stream(CHAT)(iter([b"a", b"b"]))] == [b"re: a", b"re: b"]
        (relay,) = relays_of(channel)
        assert (relay.error, len(relay.passages)) == (None, 1)
        assert stat.S_IMODE(os.stat(os.path.dirname(relay.path)).st_mode) == 0o700
        assert len(relay.path) <= 107
    nothing_is_left()
    assert not Path(relay.path).parent.exists()


def test_threads_reach_it_too(tmp_path: Path) -> None:
    shop = Shop(tmp_path, yaml_of(more=TURNS, allow=RULES))
    with foreign_in_threads(shop.ca) as address:
        party = shop.party("storefront").knows([address])
        with sync_channel(party) as channel:
            assert not grpc_relay_thread.relay_thread.is_running
            assert channel.unary_unary(ECHO)(b"x") == b"x"
            assert grpc_relay_thread.relay_thread.is_running
            assert len(list(channel.stream_stream(CHAT)(iter([b"a", b"b"])))) == 2
            assert channel.stream_unary(SUM)(iter([b"1", b"2", b"3"])) == b"6"
            with sync_channel(party) as second:  # of one process there is one thread
                assert second.unary_unary(ECHO)(b"y") == b"y"
                names = [thread.name for thread in threading.enumerate()]
                assert names.count("meshlib-grpc-relay") == 1
            assert channel.unary_unary(ECHO)(b"z") == b"z"
        nothing_is_left()
        with sync_channel(party) as channel:  # and another when it is needed again
            assert channel.unary_unary(ECHO)(b"x") == b"x"
    nothing_is_left()


async def test_a_large_message_goes_through_whole(shop: Shop, start: Any) -> None:
    big = os.urandom(3_500_000)
    async with aio_channel(party_of(shop, await start())) as channel:
        assert await channel.unary_unary(ECHO)(big) == big


async def test_the_server_sees_our_identity(shop: Shop) -> None:
    seen: list[Any] = []

    async def echo(request: bytes, context: Any) -> bytes:
        seen.append(context.auth_context()["peer_spiffe_id"])
        return request

    server = Foreign(shop.ca)
    server.server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler("a.B", {"C": grpc.unary_unary_rpc_method_handler(echo)}),)
    )
    await server.start()
    async with aio_channel(party_of(shop, server)) as channel:
        await channel.unary_unary("/a.B/C")(b"")
    assert seen == [[b"spiffe://shop.internal/ns/default/sa/storefront"]]
    await server.server.stop(None)


def test_a_real_envoy_with_a_spiffe_id_only_is_reached(tmp_path: Path) -> None:
    """Its listener demands our SPIFFE ID, and tells the server behind it both, and under which name it was called."""
    shop = Shop(tmp_path, yaml_of(more=TURNS, allow=RULES))
    key, chain = only_uri(shop.ca, INVENTORY)
    folder = tmp_path / "envoy"
    (folder / "inventory").mkdir(parents=True)
    for name, content in (("key.pem", key), ("svid.pem", chain), ("bundle.pem", shop.ca.bundle)):
        (folder / "inventory" / name).write_bytes(content)
    seen: list[dict[str, Any]] = []

    def echo(request: bytes, context: Any) -> bytes:
        seen.append(dict(context.invocation_metadata()))
        return request

    server = grpc.server(futures.ThreadPoolExecutor(4), options=[("grpc.so_reuseport", 0)])
    methods = {"Echo": grpc.unary_unary_rpc_method_handler(echo)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("shop.Inventory", methods),))
    behind, port = server.add_insecure_port("127.0.0.1:0"), free_port()
    server.start()
    storefront = "spiffe://shop.internal/ns/default/sa/storefront"
    transport = envoy.tls(folder, "inventory", storefront, is_server=True)
    transport["typed_config"]["common_tls_context"]["alpn_protocols"] = ["h2"]
    route = {"route": {"cluster": "app"}, "request_headers_to_add": [
        {"header": {"key": "x-called", "value": "%REQ(:AUTHORITY)%"}},
        {"header": {"key": "x-peer", "value": "%DOWNSTREAM_PEER_URI_SAN%"}},
    ]}  # fmt: skip
    app = envoy.cluster("app", behind)
    options = "type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions"
    app["typed_extension_protocol_options"] = {
        "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
            "@type": options,
            "explicit_http_config": {"http2_protocol_options": {}},
        }
    }
    try:
        with envoy.envoy(folder, [envoy.listener(port, route, transport)], [app]):
            with sync_channel(shop.party("storefront").knows([f"127.0.0.1:{port}"])) as channel:
                assert channel.unary_unary(ECHO)(b"x", timeout=10) == b"x"
            assert (seen[0]["x-peer"], seen[0]["x-called"]) == (storefront, "inventory")
            with sync_channel(shop.party("burglar").knows([f"127.0.0.1:{port}"])) as channel:
                with pytest.raises(grpc.RpcError) as caught:
                    channel.unary_unary(ECHO)(b"x", timeout=10)
                assert (set(sent(caught.value)), len(seen)) == ({"identity"}, 1)
    finally:
        server.stop(None).wait(5)
    nothing_is_left()


# ------------------------------------------------------------------------------------------------ who is believed


async def test_another_spiffe_id_is_refused_and_another_endpoint_used(shop: Shop, start: Any) -> None:
    good, bad = await start(), await start(None, "spiffe://shop.internal/ns/default/sa/burglar")
    party = party_of(shop, bad, good)
    async with aio_channel(party) as channel:
        for _ in range(6):
            assert await channel.unary_unary(ECHO)(b"x") == b"x"
        assert (bad.calls, good.calls) == (0, 6)
        assert party.of(bad.address)["failures"] >= 1
        party.knows([bad.address])
        error = await failure(channel.unary_unary(ECHO)(b"x"))
    sends = [event["what"] for event in error.call.record()["events"] if event["phase"] == "send"]
    assert (set(sends), bad.calls) == ({"identity"}, 0)
    assert isinstance(error.__cause__, errors.PeerIdentityError)
    assert "burglar" in str(error.__cause__)


def test_threads_learn_the_same(tmp_path: Path) -> None:
    shop = Shop(tmp_path, yaml_of(more=NO_RETRY, allow=RULES))
    with foreign_in_threads(shop.ca, "spiffe://shop.internal/ns/default/sa/burglar") as address:
        with sync_channel(shop.party("storefront").knows([address])) as channel, pytest.raises(grpc.RpcError) as caught:
            channel.unary_unary(ECHO)(b"x")
        assert sent(caught.value) == ["identity"]
    nothing_is_left()


def sent(error: Any) -> list[str]:
    return [event["what"] for event in error.call.record()["events"] if event["phase"] == "send"]


async def test_a_server_of_another_ca_is_refused(shop: Shop, start: Any) -> None:
    stranger = await start(CertificateAuthority.create(None, "shop.internal"), roots=shop.ca.bundle)
    async with aio_channel(party_of(shop, stranger)) as channel:
        error = await failure(channel.unary_unary(ECHO)(b"x"))
    assert (set(sent(error)), stranger.calls) == ({"identity"}, 0)


@pytest.mark.parametrize("has_alert", [False, True])
async def test_a_server_that_refuses_our_certificate_gets_no_call(
    shop: Shop, start: Any, tmp_path: Path, has_alert: bool
) -> None:
    """With TLS 1.3 it does so after our side of the handshake: no call has gone out, so another endpoint may be asked.

    gRPC's server only hangs up; OpenSSL says why.
    """
    other = CertificateAuthority.create(None, "shop.internal")
    good = await start()
    if has_alert:
        (tmp_path / "other.pem").write_bytes(other.bundle)
        context = raw_context(shop, tmp_path)
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_verify_locations(tmp_path / "other.pem")
        serving = shaking_hands(context)
    else:
        serving = contextlib.nullcontext((await start(roots=other.bundle)).address)
    with serving as address:
        await assert_no_call(shop, address, good, "identity" if has_alert else "refused")


async def assert_no_call(shop: Shop, address: str, good: Foreign, what: str) -> None:
    party = shop.party("storefront").knows([address, good.address])
    async with aio_channel(party) as channel:
        for _ in range(4):
            assert await channel.unary_unary(ECHO)(b"x") == b"x"
        party.knows([address])
        error = await failure(channel.unary_unary(ECHO)(b"x"))
    assert (set(sent(error)), good.calls) == ({what}, 4)
    assert isinstance(error.__cause__, errors.TlsError if what == "identity" else errors.ConnectFailed)


@contextlib.contextmanager
def shaking_hands(context: ssl.SSLContext) -> Iterator[str]:
    """A server that only does handshakes; with alerts, which asyncio's servers swallow."""
    plug = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            try:
                accepted, _ = plug.accept()
            except OSError:
                return
            with contextlib.suppress(OSError), context.wrap_socket(accepted, server_side=True) as tls:
                tls.recv(1)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield f"127.0.0.1:{plug.getsockname()[1]}"
    finally:
        plug.shutdown(socket.SHUT_RDWR)
        plug.close()
        thread.join(5)


def address_of(server: asyncio.Server) -> str:
    return f"127.0.0.1:{server.sockets[0].getsockname()[1]}"


class Federated:
    """Bundles of other trust domains, as `secure.federation` brings them."""

    def __init__(self, **bundles: bytes) -> None:
        self.bundles = {name.replace("_", "."): bundle for name, bundle in bundles.items()}

    def faults(self) -> dict[str, str]:
        return {}


async def test_a_federated_trust_domain_is_reached_by_its_own_bundle(tmp_path: Path) -> None:
    text = yaml_of(more=TURNS, service=f"    identity: {PARTNER}", allow="peer_check: auto")
    shop = Shop(tmp_path, text)
    partner = CertificateAuthority.create(None, "partner.test")
    server = await Foreign(partner, PARTNER, roots=shop.ca.bundle).start()
    party = party_of(shop, server)
    async with aio_channel(party) as channel:
        error = await failure(channel.unary_unary(ECHO)(b"x"))  # nobody has told us its keys
        assert set(sent(error)) == {"identity"}
    own = party.config.own
    source = FolderSource(party.config.identity_folder, "storefront", party.config.trust_domain, own.identity)
    party.identity = IdentityStore(source, mode=own.mode, federation=Federated(partner_test=partner.bundle))
    party.identity.require(time.time())
    party.outbound.identity = party.identity
    async with aio_channel(party) as channel:
        assert await channel.unary_unary(ECHO)(b"x") == b"x"
        assert len(relays_of(channel)) == 1
    await server.server.stop(None)


async def test_which_way_is_taken(tmp_path: Path) -> None:
    """By DNS name only where our own CA writes one that is known, or the configuration says so."""
    shop = Shop(tmp_path, yaml_of(allow="peer_check: auto"))
    party = shop.party("storefront")
    assert party.identity is not None
    current = party.identity.current
    foreign = "spiffe://partner.test/ns/default/sa/inventory"
    strange = "spiffe://shop.internal/other/form"

    def way(identity: str, **more: Any) -> bool:
        names = PeerNames({INVENTORY: "inventory.default.shop.internal"})
        names.__dict__.update(more)
        return MeshChannel("inventory", party.outbound, names=names)._links._is_relayed(identity, current)

    assert [way(INVENTORY), way(foreign), way(strange), way(INVENTORY, has_own_ca=False)] == [False, True, True, True]
    assert [way(INVENTORY, check="spiffe"), way(foreign, check="dns")] == [True, False]
    # A certificate of ours without a DNS name: somebody else issues here, and the neighbours will have none either.
    key, chain = only_uri(shop.ca, "spiffe://shop.internal/ns/default/sa/storefront")
    for name, content in (("key.pem", key), ("svid.pem", chain)):
        (shop.identities / "storefront" / name).write_bytes(content)
    party = shop.party("storefront")
    assert party.identity is not None
    current = party.identity.current
    assert way(INVENTORY)


def test_the_configuration_tells_whose_certificates_they_are(tmp_path: Path) -> None:
    def names(source: str, service: str = "") -> PeerNames:
        file = tmp_path / "mesh.yaml"
        file.write_text(
            f"mesh: m\nsecure: {{mode: enforce, identity: {source}}}\nservices:\n  a: {{}}\n  b: {{protocol: grpc{service}}}\n"
        )
        return peer_names(load(file, service="a"), "b")

    spire = names("{plugin: spiffe}")
    assert (spire.has_own_ca, spire.check) == (False, "auto")
    assert names("{folder: ids}").has_own_ca
    assert names("{folder: ids}", ", secure: {peer_check: spiffe}").check == "spiffe"
    # A name that our CA writes for its own trust domain is in no certificate of another one.
    assert dict(names("{folder: ids}", ", identity: 'spiffe://m.internal/x'")) == {
        "spiffe://m.internal/x": "b.default.m.internal"
    }
    assert dict(names("{folder: ids}", ", identity: 'spiffe://partner.test/x'")) == {}


# ------------------------------------------------------------------------------------------------ why it failed


async def test_a_refused_connection_is_told_and_another_endpoint_used(shop: Shop, start: Any) -> None:
    good = await start()
    party = shop.party("storefront").knows(["127.0.0.1:1", good.address])
    async with aio_channel(party) as channel:
        for _ in range(3):
            assert await channel.unary_unary(ECHO)(b"x") == b"x"
        party.knows(["127.0.0.1:1"])
        error = await failure(channel.unary_unary(ECHO)(b"x"))
    assert set(sent(error)) == {"refused"}
    assert isinstance(error.__cause__, errors.ConnectFailed)


async def test_an_address_that_is_none_is_a_failed_connection(shop: Shop) -> None:
    address = "a..b:1"
    async with aio_channel(shop.party("storefront").knows([address])) as channel:
        error = await failure(channel.unary_unary(ECHO)(b"x"))
    assert set(sent(error)) == {"refused"}
    assert isinstance(error.__cause__, errors.ConnectFailed)


@pytest.mark.parametrize("answer", [b"", b"HTTP/1.1 400 Bad Request\r\n\r\n"])
async def test_connecting_and_the_handshake_share_one_time(tmp_path: Path, answer: bytes) -> None:
    """A server that accepts and says nothing takes no longer than `admit.connect`; one that speaks no TLS fails at once."""
    shop = Shop(tmp_path, yaml_of(more=f"{NO_RETRY}\nadmit: {{connect: 300ms}}", allow=RULES))

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(answer)
        with contextlib.suppress(OSError):
            await reader.read()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    address = address_of(server)
    begun = time.monotonic()
    async with aio_channel(shop.party("storefront").knows([address])) as channel:
        error = await failure(channel.unary_unary(ECHO)(b"x"))
        taken = time.monotonic() - begun
    server.close()
    assert sent(error) == (["identity"] if answer else ["refused"])
    assert error.__cause__.reason == (errors.TlsError.reason if answer else "send.connect_timeout")
    assert (taken >= 0.3) == (not answer)
    assert taken < 2.0


async def test_a_server_that_speaks_no_http2_is_none_for_grpc(tmp_path: Path) -> None:
    """TLS and the identity are right, but it picks no protocol."""
    shop = Shop(tmp_path, yaml_of(more=NO_RETRY, allow=RULES))
    context = raw_context(shop, tmp_path, alpn=())
    server = await asyncio.start_server(lambda reader, writer: None, "127.0.0.1", 0, ssl=context)
    address = address_of(server)
    async with aio_channel(shop.party("storefront").knows([address])) as channel:
        error = await failure(channel.unary_unary(ECHO)(b"x"))
    server.close()
    assert "HTTP/2" in str(error.__cause__)


def test_a_relays_word_counts_only_of_a_link_that_never_stood() -> None:
    """What it knew of an earlier connection doesn't prove that this call was not sent."""
    unavailable, text = grpc.StatusCode.UNAVAILABLE, "failed to connect to all addresses; last error: Socket closed"
    why = errors.PeerIdentityError("it is somebody else")

    def outcome(**how: Any) -> int:
        return judge(unavailable, how.pop("text", text), is_late=False, why=how.pop("why", why), **how)[0]

    assert outcome(is_ready=False, is_down=True) == core.OUTCOME_IDENTITY
    assert outcome(is_ready=False, is_down=True, why=errors.TlsError("refused")) == core.OUTCOME_IDENTITY
    assert outcome(is_ready=False, is_down=True, why=errors.ConnectFailed("late")) == core.OUTCOME_REFUSED
    assert outcome(is_ready=True, is_down=False) == core.OUTCOME_RESPONSE
    assert outcome(is_ready=False, is_down=True, text="Socket closed") == core.OUTCOME_RESET


async def test_a_server_that_goes_away_is_found_again(shop: Shop, start: Any) -> None:
    """The link stays; gRPC connects anew through the same relay, and the TLS session is resumed."""
    server = await start()
    party = party_of(shop, server)
    async with aio_channel(party) as channel:
        await channel.unary_unary(ECHO)(b"x")
        (relay,) = relays_of(channel)
        for passage in tuple(relay.passages):
            assert passage.far is not None
            passage.far.abort()
        await until(lambda: not relay.passages)
        assert await channel.unary_unary(ECHO)(b"y") == b"y"
        assert relays_of(channel) == [relay]
        assert party.outbound.identity.tls_stats()["client"]["resumed"] == 1


# ------------------------------------------------------------------------------------------------ who may use the socket

STRANGER = """
import socket, sys
plug = socket.socket(socket.AF_UNIX)
plug.settimeout(10)
plug.connect(sys.argv[1])
try:
    plug.sendall(b"PRI * HTTP/2.0\\r\\n\\r\\nSM\\r\\n\\r\\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0]))
    print(len(plug.recv(100)))
except OSError as error:
    print(0, type(error).__name__)
"""


@pytest.mark.skipif(not hasattr(socket, "SO_PEERCRED"), reason="this platform doesn't tell who is at the other end of a socket")
async def test_a_foreign_process_gets_nothing(shop: Shop, start: Any, caplog: pytest.LogCaptureFixture) -> None:
    """One of the same user, which may look into the folder: it is shut out before a byte leaves, and the log says so."""
    server = await start()
    async with aio_channel(party_of(shop, server)) as channel:
        await channel.unary_unary(ECHO)(b"x")
        (relay,) = relays_of(channel)
        child = await asyncio.create_subprocess_exec(sys.executable, "-c", STRANGER, relay.path, stdout=subprocess.PIPE)
        out, _ = await asyncio.wait_for(child.communicate(), 30)
        assert out.split()[0] == b"0"
        assert len(relay.passages) == 1  # our own
        assert any(f"process {child.pid} of the user {os.getuid()}" in record.message for record in caplog.records)
        assert await channel.unary_unary(ECHO)(b"y") == b"y"


# ------------------------------------------------------------------------------------------------ time


async def test_identities_are_replaced_under_load_without_a_failed_call(shop: Shop, start: Any) -> None:
    """Each generation has relays of its own; those of the one before end with their last call, and a stream outlives it."""
    servers = [await start(), await start()]
    party = party_of(shop, *servers)
    assert party.identity is not None
    done, is_over = 0, False

    async def work(echo: Any) -> None:
        nonlocal done
        while not is_over:
            assert await echo(b"x") == b"x"
            done += 1

    async with aio_channel(party) as channel:
        chat = channel.stream_stream(CHAT)()
        await chat.write(b"1")
        assert await chat.read() == b"re: 1"
        workers = [asyncio.create_task(work(channel.unary_unary(ECHO))) for _ in range(4)]
        for _ in range(4):
            goal = done + 30
            await until(lambda: done >= goal)
            shop.certify()
            assert party.identity.refresh(time.time())
        goal = done + 30
        await until(lambda: done >= goal)
        await chat.write(b"2")
        assert await chat.read() == b"re: 2"
        await until(lambda: not channel._links._closing)
        assert len(grpc_relay._relays) == 3  # two of this generation, and that of the stream
        await chat.done_writing()
        assert await chat.read() is grpc.aio.EOF
        is_over = True
        await asyncio.gather(*workers)
        await until(lambda: len(grpc_relay._relays) == 2)
    assert party.of()["failures"] == 0
    nothing_is_left()


def test_threads_lose_no_call_either(tmp_path: Path) -> None:
    """Four threads, and a new identity every few calls: the relays of earlier ones end, their thread stays."""
    shop = Shop(tmp_path, yaml_of(more=TURNS, allow=RULES))
    failed: list[BaseException] = []
    done, is_over = [0] * 4, threading.Event()
    with foreign_in_threads(shop.ca) as address:
        party = shop.party("storefront").knows([address])
        assert party.identity is not None

        def work(number: int, echo: Any) -> None:
            try:
                while not is_over.is_set():
                    assert echo(b"x", timeout=10) == b"x"
                    done[number] += 1
            except BaseException as error:
                failed.append(error)

        with sync_channel(party) as channel:
            workers = [threading.Thread(target=work, args=(number, channel.unary_unary(ECHO))) for number in range(4)]
            for worker in workers:
                worker.start()
            for _ in range(8):
                goal = sum(done) + 30
                end = time.monotonic() + 10
                while sum(done) < goal and not failed and time.monotonic() < end:
                    time.sleep(0.005)
                shop.certify()
                assert party.identity.refresh(time.time())
            is_over.set()
            for worker in workers:
                worker.join(15)
            channel.unary_unary(ECHO)(b"x")
            assert (failed, party.of()["failures"]) == ([], 0)
            end = time.monotonic() + 5
            while len(grpc_relay._relays) > 1 and time.monotonic() < end:
                time.sleep(0.01)
            assert list(grpc_relay._relays) == relays_of(channel)
    nothing_is_left()


async def test_nothing_new_is_begun_after_the_end_of_the_servers_certificate(shop: Shop, start: Any) -> None:
    """What runs goes on, as over HTTP/2; the next call makes a link of its own, which asks for a proof of now."""
    async with aio_channel(party_of(shop, await start(ttl=3600.0))) as channel:
        await channel.unary_unary(ECHO)(b"x")
        (first,) = relays_of(channel)
        assert abs(first.not_after - (time.time() + 3600)) < 120
        chat = channel.stream_stream(CHAT)()
        await chat.write(b"1")
        assert await chat.read() == b"re: 1"
        first.not_after = time.time() - 1
        await channel.unary_unary(ECHO)(b"x")
        (second,) = relays_of(channel)
        assert second is not first
        await chat.write(b"2")
        assert await chat.read() == b"re: 2"
        await chat.done_writing()
        assert await chat.read() is grpc.aio.EOF
        await until(lambda: first not in grpc_relay._relays)


# ------------------------------------------------------------------------------------------------ memory


async def test_a_long_stream_arrives_in_order_at_a_slow_reader(shop: Shop, start: Any) -> None:
    """12,000 messages; nothing piles up between the two."""
    most = 0
    async with aio_channel(party_of(shop, await start())) as channel:
        expected = 0
        async for piece in channel.unary_stream(COUNT)(b"12000"):
            assert piece == str(expected).encode()
            expected += 1
            if expected % 1000 == 0:
                await asyncio.sleep(0.02)
                (relay,) = relays_of(channel)
                (passage,) = relay.passages
                assert passage.near is not None
                assert passage.far is not None
                most = max(most, passage.near.get_write_buffer_size(), passage.far.get_write_buffer_size())
    assert expected == 12000
    assert most < 512 * 1024


def raw_context(shop: Shop, folder: Path, *, alpn: tuple[str, ...] = ("h2",)) -> ssl.SSLContext:
    """TLS of a server that isn't gRPC, for bytes without HTTP."""
    key, chain = only_uri(shop.ca, INVENTORY)
    (folder / "raw.pem").write_bytes(key + chain)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "raw.pem")
    if alpn:
        context.set_alpn_protocols(list(alpn))
    return context


async def test_each_side_is_read_only_while_the_other_takes_it(shop: Shop, tmp_path: Path) -> None:
    """Without the flow control of HTTP/2, so that only the relay's own holds the memory: 32 MiB each way, and nobody reads."""
    size, pattern = 32 * 2**20, bytes(range(256)) * 4097
    piece = pattern[: 2**16]
    given = taken = 0
    go = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal given, taken

        async def give() -> None:
            nonlocal given
            while given < size:
                writer.write(piece)
                given += len(piece)
                await writer.drain()

        giving = asyncio.create_task(give())
        await go.wait()
        while taken < size:
            taken += len(await reader.read(2**20))
        await giving
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=raw_context(shop, tmp_path))
    address = address_of(server)
    party = shop.party("storefront")
    relay = Relay(asyncio.get_running_loop(), party.outbound.identity.client_tls, INVENTORY, address, 5.0)
    relay.start()
    reader, writer = await asyncio.open_unix_connection(relay.path, limit=2**16)
    sent_off = 0

    async def send() -> None:
        nonlocal sent_off
        while sent_off < size:
            writer.write(piece)
            sent_off += len(piece)
            await writer.drain()

    sending = asyncio.create_task(send())
    await asyncio.sleep(1.0)
    (passage,) = relay.passages
    assert passage.near is not None
    assert passage.far is not None
    # The rest is the kernel's: a few megabytes on each way at most.
    assert max(passage.near.get_write_buffer_size(), passage.far.get_write_buffer_size()) < 512 * 1024
    stuck = given, sent_off
    assert max(stuck) < 24 * 2**20
    assert min(stuck) > 0
    await asyncio.sleep(0.3)
    assert (given, sent_off) == stuck
    go.set()
    got = 0
    while data := await reader.read(2**20):
        assert data == pattern[got % 256 : got % 256 + len(data)]
        got += len(data)
    await sending
    assert (got, taken) == (size, size)
    writer.close()
    await relay.close()
    server.close()
    nothing_is_left()


# ------------------------------------------------------------------------------------------------ life


async def test_closing_leaves_neither_socket_nor_folder_nor_task(shop: Shop, start: Any) -> None:
    server = await start()
    before = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else 0
    for _ in range(3):
        async with aio_channel(party_of(shop, server)) as channel:
            assert await channel.unary_unary(ECHO)(b"x") == b"x"
            slow = channel.unary_unary(SLOW)(b"30")
            await asyncio.sleep(0.05)
        assert slow.cancelled() or slow.done()
        nothing_is_left()
    await asyncio.sleep(0)
    ours = ("Relay.", "Passage.", "_end")  # the rest is of gRPC's server
    coroutines: list[Any] = [task.get_coro() for task in asyncio.all_tasks()]
    assert [one for one in coroutines if one.__qualname__.startswith(ours)] == []
    gc.collect()
    if before:
        await until(lambda: len(os.listdir("/proc/self/fd")) <= before + 4)


async def test_a_channel_that_is_dropped_takes_its_relays_along(shop: Shop, start: Any) -> None:
    channel = aio_channel(party_of(shop, await start()))
    await channel.unary_unary(ECHO)(b"x")
    assert len(grpc_relay._relays) == 1
    del channel
    gc.collect()
    await until(lambda: not grpc_relay._relays)
    nothing_is_left()


def test_what_a_closed_loop_left_open_is_buried_by_the_next_relay(tmp_path: Path) -> None:
    shop = Shop(tmp_path, yaml_of(allow=RULES))
    tls = shop.party("storefront").outbound.identity.client_tls

    async def leave_open() -> Relay:
        relay = Relay(asyncio.get_running_loop(), tls, INVENTORY, "127.0.0.1:1", 1.0)
        relay.start()
        await asyncio.sleep(0)
        return relay

    first = asyncio.run(leave_open())
    assert Path(first.path).exists()

    async def again() -> None:
        relay = await leave_open()
        assert not Path(first.path).exists()
        await relay.close()

    asyncio.run(again())
    nothing_is_left()


def test_a_path_that_is_too_long_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = tmp_path / ("x" * 100)
    long.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(long))
    with pytest.raises(errors.MeshError, match="TMPDIR") as caught:
        grpc_nest.Nest().take()
    assert caught.value.reason == "grpc.relay_path"
    assert list(long.iterdir()) == []


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="what a child holds is read from /proc")
def test_a_forked_child_has_relays_of_its_own_and_the_parents_stay(tmp_path: Path) -> None:
    """The child lets go of what it inherited without a word, and its own folder comes and goes. Python only: no gRPC in the child."""
    shop = Shop(tmp_path, yaml_of(more=TURNS, allow=RULES))
    with foreign_in_threads(shop.ca) as address:
        party = shop.party("storefront").knows([address])
        tls = party.outbound.identity.client_tls
        with sync_channel(party) as channel:
            assert channel.unary_unary(ECHO)(b"x") == b"x"
            (relay,) = relays_of(channel)
            (passage,) = relay.passages
            reader, writer = os.pipe()
            child = os.fork()
            if child == 0:
                try:
                    os.write(writer, json.dumps(in_the_child(relay, passage, tls, address)).encode())
                except BaseException as error:
                    os.write(writer, json.dumps(repr(error)).encode())
                finally:
                    os._exit(0)
            os.close(writer)
            os.waitpid(child, 0)
            with os.fdopen(reader, "rb") as pipe:
                assert json.loads(pipe.read()) == {
                    "inherited": ["null", "null", "null"],
                    "relays": 0,
                    "is_own_folder": True,
                    "preface": True,
                    "left": False,
                }
            assert Path(relay.path).exists()
            assert (tuple(relay.passages), channel.unary_unary(ECHO)(b"y")) == ((passage,), b"y")
    nothing_is_left()


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="what a child holds is read from /proc")
async def test_a_fork_in_the_midst_of_a_loop_leaves_its_connections_alone(shop: Shop, start: Any) -> None:
    async with aio_channel(party_of(shop, await start())) as channel:
        await channel.unary_unary(ECHO)(b"x")
        (relay,) = relays_of(channel)
        (passage,) = relay.passages
        child = os.fork()
        if child == 0:
            plugs = [relay._listener, *passage.sockets()]
            kinds = {os.readlink(f"/proc/self/fd/{plug.fileno()}") for plug in plugs}
            relay.close_soon()  # somebody who tidies up: nothing happens
            os._exit(0 if kinds == {os.devnull} else 1)
        assert os.waitpid(child, 0)[1] == 0
        assert await channel.unary_unary(ECHO)(b"y") == b"y"
        assert (tuple(relay.passages), Path(relay.path).exists()) == ((passage,), True)
    nothing_is_left()


def in_the_child(relay: Relay, passage: Any, tls: Any, address: str) -> dict[str, Any]:
    plugs = [relay._listener, *passage.sockets()]
    kinds = ["null" if os.readlink(f"/proc/self/fd/{plug.fileno()}") == os.devnull else "open" for plug in plugs]
    relays = len(grpc_relay._relays)
    own = grpc_relay_thread.relay_thread.open(tls, INVENTORY, address, 5.0)
    is_own_folder = Path(own.path).parent != Path(relay.path).parent
    with socket.socket(socket.AF_UNIX) as plug:
        plug.settimeout(10)
        plug.connect(own.path)
        plug.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0]))
        settings = plug.recv(9)
    grpc_relay_thread.relay_thread.close(own)
    return {
        "inherited": kinds,
        "relays": relays,
        "is_own_folder": is_own_folder,
        "preface": settings[3:4] == b"\x04",
        "left": Path(own.path).parent.exists(),
    }


AT_EXIT = """
import sys
sys.path[:0] = [sys.argv[3], sys.argv[4]]
from pathlib import Path
from grpc_world import ECHO, Party
from meshlib.client.grpc import nest as grpc_nest
from meshlib.client.grpc import MeshSyncChannel
from meshlib.client.grpc.links import peer_names
party = Party(Path(sys.argv[1]), "storefront").knows([sys.argv[2]])
channel = MeshSyncChannel("inventory", party.outbound, names=peer_names(party.config, "inventory"))
assert channel.unary_unary(ECHO)(b"x") == b"x"
print(grpc_nest.nest.folder, flush=True)
"""


def test_a_process_that_ends_without_closing_leaves_nothing_behind(tmp_path: Path) -> None:
    shop = Shop(tmp_path, yaml_of(more=TURNS, allow=RULES))
    root = Path(__file__).parents[2]
    with foreign_in_threads(shop.ca) as address:
        command = (sys.executable, "-c", AT_EXIT, str(shop.file), address, str(root / "tests/grpc_support"), str(root))
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    folder = Path(done.stdout.strip())
    assert folder.name.startswith("mesh-")
    assert not folder.exists()
