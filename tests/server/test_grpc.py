"""A gRPC call comes in through the mesh: who it is, what it may do, and what it is told. Real servers, certificates and gate."""

from __future__ import annotations

import asyncio
import dataclasses
import socket
import ssl
import sys
import time
from collections.abc import AsyncIterator, Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from meshlib import errors
from meshlib.call import outer_end, outer_layer, peer
from meshlib.server.grpc import add_port, server_interceptors
from meshlib.server.grpc.peer import Callers

sys.path.insert(0, str(Path(__file__).parent.parent / "grpc_support"))
from grpc_world import (
    BREAK,
    CHAT,
    COUNT,
    ECHO,
    FAIL,
    HEALTH,
    SLOW,
    SUM,
    TELL,
    WHO,
    Backend,
    Party,
    Shop,
    blocking_server,
    until,
    yaml_of,
)

STOREFRONT = "spiffe://shop.internal/ns/default/sa/storefront"
NAME = ("grpc.ssl_target_name_override", "inventory.default.shop.internal")
Code = grpc.StatusCode


@pytest.fixture
async def shop(tmp_path: Path) -> AsyncIterator[Shop]:
    shop = Shop(tmp_path)
    yield shop
    await shop.stop()


@pytest.fixture
async def backend(shop: Shop) -> Backend:
    return await shop.start("a")


def credentials(party: Party, *, with_certificate: bool = True) -> grpc.ChannelCredentials:
    """What stock gRPC needs to call us: no part of the mesh is on the caller's side."""
    assert party.identity is not None
    current = party.identity.current
    assert current is not None
    own = (bytes(current.key), current.chain) if with_certificate else (None, None)
    return grpc.ssl_channel_credentials(current.bundles["shop.internal"], *own)


def stock(party: Party, address: str) -> grpc.aio.Channel:
    return grpc.aio.secure_channel(address, credentials(party), options=[NAME])


@pytest.fixture
async def caller(shop: Shop, backend: Backend) -> AsyncIterator[grpc.aio.Channel]:
    async with stock(shop.party("storefront"), backend.address) as channel:
        yield channel


async def refusal(call: Any) -> tuple[Code, str]:
    """The code and the words with which a call ends."""
    with pytest.raises(grpc.RpcError) as caught:
        await call
    return caught.value.code(), caught.value.details()


def counted(party: Party, method: str) -> dict[str, int]:
    """How calls of a method ended, by gRPC's numbers."""
    codes: dict[str, int] = {}
    for row in party.gate.stats():
        if row["method"] == method:
            for code, count in row["codes"].items():
                codes[code] = codes.get(code, 0) + count
    return codes


def in_flight(party: Party) -> int:
    return sum(row["in_flight"] for row in party.gate.stats())


# ------------------------------------------------------------------------------------------------ who and what


async def test_a_handler_knows_who_calls_and_how_long_there_is(shop: Shop, caller: Any) -> None:
    """Identity, serial number, deadline and attempt come from the connection and the call, by context variables."""
    who = (await caller.unary_unary(WHO)(b"", timeout=3, metadata=(("x-mesh-attempt", "2"),))).decode().split("|")
    party = shop.party("storefront")
    assert party.identity is not None
    assert party.identity.current is not None
    assert who[:3] == [STOREFRONT, "True", party.identity.current.serial]
    assert 2 < float(who[3]) <= 3.1
    assert who[4] == "2"
    assert (await caller.unary_unary(WHO)(b"")).decode().split("|")[3:] == ["-1.000", "0"]
    assert (await caller.unary_unary(WHO)(b"", metadata=(("x-mesh-attempt", "many"),))).decode().endswith("|1")
    assert (peer(), outer_end(), outer_layer()) == (None, None, 0)


async def test_identity_in_metadata_counts_for_nothing(shop: Shop, backend: Backend) -> None:
    """Only the connection says who calls."""
    async with stock(shop.party("burglar"), backend.address) as channel:
        claim = (("x-forwarded-client-cert", f"URI={STOREFRONT}"), ("x-spiffe-id", STOREFRONT), ("x-mesh-peer", STOREFRONT))
        assert await refusal(channel.unary_unary(ECHO)(b"", metadata=claim)) == (Code.PERMISSION_DENIED, "not allowed")
    assert backend.calls == 0


@pytest.mark.parametrize("kind", ["unary_unary", "unary_stream", "stream_unary", "stream_stream"])
async def test_who_is_not_allowed_is_refused_in_every_kind_of_call(shop: Shop, backend: Backend, kind: str) -> None:
    """The handler never runs, and the caller is told nothing but that."""
    method = {"unary_unary": ECHO, "unary_stream": COUNT, "stream_unary": SUM, "stream_stream": CHAT}[kind]
    async with stock(shop.party("burglar"), backend.address) as channel:
        request = b"1" if kind.startswith("unary") else iter([b"1"])
        call = getattr(channel, kind)(method)(request)
        assert await refusal(call if kind.endswith("unary") else call.read()) == (Code.PERMISSION_DENIED, "not allowed")
    assert backend.calls == 0
    await until(lambda: in_flight(backend.party) == 0)
    assert sum(row["refused"] for row in backend.party.gate.stats()) == 1


async def test_whether_a_method_exists_is_told_only_to_who_may_ask(shop: Shop, backend: Backend, caller: Any) -> None:
    """An unknown method under an allowed path is UNIMPLEMENTED; for everybody else it is as forbidden as a known one."""
    assert await refusal(caller.unary_unary("/shop.Inventory/Nothing")(b"")) == (Code.UNIMPLEMENTED, "no such method")
    async with stock(shop.party("burglar"), backend.address) as channel:
        assert await refusal(channel.unary_unary("/shop.Inventory/Nothing")(b"")) == (Code.PERMISSION_DENIED, "not allowed")
        assert await refusal(channel.stream_stream("/shop.Inventory/Nothing")().read()) == (Code.PERMISSION_DENIED, "not allowed")
    assert counted(backend.party, "/shop.Inventory/Nothing") == {"12": 1}


@pytest.mark.parametrize(
    "method",
    ["/shop.Inventory/Echo/", "//shop.Inventory/Echo", "/shop.Inventory/./Echo", "/shop.Inventory%2FEcho", "/Echo", "shop.Inventory/Echo",
     "/shop.Inventory/Echo?x", "/shop.Inventory\\Echo", "/shop.Inventory/Ec ho"],
)  # fmt: skip
async def test_method_names_are_exact(backend: Backend, caller: Any, method: str) -> None:
    """Nothing is normalised: what isn't /package.Service/Method is UNIMPLEMENTED, and no handler is looked for."""
    asked: list[str] = []
    backend.server.add_generic_rpc_handlers((_Asked(asked),))
    code, _ = await refusal(caller.unary_unary(method)(b""))
    assert code is Code.UNIMPLEMENTED
    assert asked == []
    assert backend.calls == 0


class _Asked(grpc.GenericRpcHandler):
    def __init__(self, asked: list[str]) -> None:
        self._asked = asked

    def service(self, handler_call_details: Any) -> Any:
        self._asked.append(handler_call_details.method)


async def test_a_request_is_parsed_only_for_who_is_allowed(shop: Shop) -> None:
    """Bytes of strangers don't reach a parser; what can't be parsed ends with a constant text and a line in the log."""
    party = shop.party("inventory")
    parsed: list[bytes] = []

    def parse(data: bytes) -> int:
        parsed.append(data)
        return int(data)

    async def double(request: int, context: Any) -> bytes:
        return str(2 * request).encode()

    server = grpc.aio.server(interceptors=list(server_interceptors(party)))
    handler = grpc.unary_unary_rpc_method_handler(double, request_deserializer=parse)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("shop.Inventory", {"Echo": handler}),))
    port = add_port(party, server, "127.0.0.1:0")
    await server.start()
    async with stock(shop.party("burglar"), f"127.0.0.1:{port}") as channel:
        assert (await refusal(channel.unary_unary(ECHO)(b"evil")))[0] is Code.PERMISSION_DENIED
    assert parsed == []
    async with stock(shop.party("storefront"), f"127.0.0.1:{port}") as channel:
        assert await channel.unary_unary(ECHO)(b"21") == b"42"
        assert await refusal(channel.unary_unary(ECHO)(b"secret")) == (Code.INTERNAL, "the request can't be read")
    # gRPC sends the status of an abort before the handler is left.
    await until(lambda: counted(party, ECHO) == {"0": 1, "13": 1})
    await server.stop(None)


async def test_the_health_service_is_open_by_a_rule(shop: Shop, backend: Backend) -> None:
    """Like any other method: here anyone with a certificate may ask."""
    async with stock(shop.party("burglar"), backend.address) as channel:
        assert await channel.unary_unary(HEALTH)(b"") == b"\x08\x01"


# ------------------------------------------------------------------------------------------------ how calls end


async def test_every_end_of_a_call_is_counted_once(backend: Backend, caller: Any) -> None:
    """By gRPC's code: returned, aborted, raised, cancelled, too late; and no place stays taken."""

    async def raises(request: bytes, context: Any) -> bytes:
        raise RuntimeError("a secret")

    async def sets(request: bytes, context: Any) -> bytes:
        context.set_code(Code.OUT_OF_RANGE)
        return b""

    extra = {"Raises": grpc.unary_unary_rpc_method_handler(raises), "Sets": grpc.unary_unary_rpc_method_handler(sets)}
    backend.server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("shop.Inventory", extra),))
    await caller.unary_unary(ECHO)(b"")
    assert (await refusal(caller.unary_unary(FAIL)(b"ABORTED")))[0] is Code.ABORTED
    assert (await refusal(caller.unary_unary("/shop.Inventory/Raises")(b"")))[0] is Code.UNKNOWN
    assert (await refusal(caller.unary_unary("/shop.Inventory/Sets")(b"")))[0] is Code.OUT_OF_RANGE
    assert (await refusal(caller.unary_unary(SLOW)(b"30", timeout=0.05)))[0] is Code.DEADLINE_EXCEEDED
    slow = caller.unary_unary(SLOW)(b"30")
    await until(lambda: backend.calls == 4)
    slow.cancel()
    stream = caller.unary_stream(BREAK)(b"")
    assert await stream.read() == b"one"
    assert (await refusal(stream.read()))[0] is Code.INTERNAL
    assert [message async for message in caller.unary_stream(COUNT)(b"2")] == [b"0", b"1"]
    await until(lambda: in_flight(backend.party) == 0 and sum(counted(backend.party, SLOW).values()) == 2)
    assert counted(backend.party, ECHO) == {"0": 1}
    assert counted(backend.party, FAIL) == {"10": 1}
    assert counted(backend.party, "/shop.Inventory/Raises") == {"2": 1}
    assert counted(backend.party, "/shop.Inventory/Sets") == {"11": 1}
    assert sum(counted(backend.party, SLOW).values()) == 2
    assert set(counted(backend.party, SLOW)) <= {"1", "4"}
    assert counted(backend.party, BREAK) == {"13": 1}
    assert counted(backend.party, COUNT) == {"0": 1}


async def test_a_full_house_is_unavailable(tmp_path: Path) -> None:
    """At the limit of calls in flight a caller is told to go elsewhere; nothing queues."""
    shop = Shop(tmp_path, yaml_of(service="    admit: {in_flight: 1}"))
    backend = await shop.start("a")
    async with stock(shop.party("storefront"), backend.address) as channel:
        slow = channel.unary_unary(SLOW)(b"30")
        await until(lambda: backend.calls == 1)
        assert await refusal(channel.unary_unary(ECHO)(b"")) == (Code.UNAVAILABLE, "too many calls")
        slow.cancel()
        await until(lambda: in_flight(backend.party) == 0)
        assert await channel.unary_unary(ECHO)(b"x") == b"x"
    await shop.stop()


async def test_handlers_keep_their_style_and_metadata(caller: Any) -> None:
    """Writers into the context, generators, initial and trailing metadata: the wrapping is not seen."""
    call = caller.unary_unary(TELL)(b"", metadata=(("x-a", "1"),))
    assert await call == b"[('x-a', '1')]"
    assert ((await call.initial_metadata())["name"], (await call.trailing_metadata())["bye"]) == ("a", "now")
    chat = caller.stream_stream(CHAT)()
    await chat.write(b"1")
    assert await chat.read() == b"re: 1"
    await chat.done_writing()
    assert await chat.read() is grpc.aio.EOF
    assert await caller.stream_unary(SUM)(iter([b"1", b"2"])) == b"3"


async def test_blocking_handlers_in_an_asyncio_server_stay_in_its_threads(shop: Shop) -> None:
    """They see the same context, are refused by the same rules, and leave nothing behind in the thread."""
    party = shop.party("inventory")
    left: list[Any] = []

    def echo(request: bytes, context: Any) -> bytes:
        caller = peer()
        return caller.service.encode() if caller is not None else b"nobody"

    def count(request: bytes, context: Any) -> Iterator[bytes]:
        caller = peer()
        for _ in range(int(request)):
            yield caller.service.encode() if caller is not None else b"nobody"

    def fail(request: bytes, context: Any) -> bytes:
        context.abort(Code.ABORTED, "as asked")
        return b""

    threads = futures.ThreadPoolExecutor(1)
    server = grpc.aio.server(threads, interceptors=list(server_interceptors(party)))
    methods = {
        "Echo": grpc.unary_unary_rpc_method_handler(echo),
        "Count": grpc.unary_stream_rpc_method_handler(count),
        "Fail": grpc.unary_unary_rpc_method_handler(fail),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("shop.Inventory", methods),))
    address = f"127.0.0.1:{add_port(party, server, '127.0.0.1:0')}"
    await server.start()
    async with stock(shop.party("storefront"), address) as channel:
        assert await channel.unary_unary(ECHO)(b"") == b"storefront"
        assert [m async for m in channel.unary_stream(COUNT)(b"2")] == [b"storefront"] * 2
        assert await refusal(channel.unary_unary(FAIL)(b"")) == (Code.ABORTED, "as asked")
    async with stock(shop.party("burglar"), address) as channel:
        assert await refusal(channel.unary_unary(ECHO)(b"")) == (Code.PERMISSION_DENIED, "not allowed")
        assert await refusal(channel.unary_stream(COUNT)(b"1").read()) == (Code.PERMISSION_DENIED, "not allowed")
    # Awaited, since gRPC's thread may still wait for the loop.
    await asyncio.wrap_future(threads.submit(lambda: left.append((peer(), outer_end()))))
    assert left == [(None, None)]
    await until(lambda: in_flight(party) == 0)
    await server.stop(None)


def test_a_blocking_server_has_the_same_way(tmp_path: Path) -> None:
    """Identity, rules, exact names, ends: all as under asyncio."""
    shop = Shop(tmp_path)
    party = shop.party("inventory")
    with blocking_server(party) as address:
        with grpc.secure_channel(address, credentials(shop.party("storefront")), options=[NAME]) as channel:
            assert channel.unary_unary(WHO)(b"", timeout=3) == f"{STOREFRONT}|True|True".encode()
            assert channel.unary_unary(WHO)(b"") == f"{STOREFRONT}|True|False".encode()
            assert list(channel.unary_stream(COUNT)(b"2")) == [b"0 storefront", b"1 storefront"]
            assert channel.stream_unary(SUM)(iter([b"1", b"2"])) == b"3"
            assert list(channel.stream_stream(CHAT)(iter([b"1"]))) == [b"re: 1"]
            assert ended(lambda: channel.unary_unary(FAIL)(b"ABORTED")) == (Code.ABORTED, "as asked")
            assert ended(lambda: channel.unary_unary("/shop.Inventory/Nothing")(b"")) == (Code.UNIMPLEMENTED, "no such method")
            assert ended(lambda: channel.unary_unary("/shop.Inventory/Echo/")(b""))[0] is Code.UNIMPLEMENTED
        with grpc.secure_channel(address, credentials(shop.party("burglar")), options=[NAME]) as channel:
            assert ended(lambda: channel.unary_unary(ECHO)(b"")) == (Code.PERMISSION_DENIED, "not allowed")
            assert ended(lambda: list(channel.unary_stream(COUNT)(b"1"))) == (Code.PERMISSION_DENIED, "not allowed")
            assert ended(lambda: channel.unary_unary("/shop.Inventory/Nothing")(b"")) == (Code.PERMISSION_DENIED, "not allowed")
    assert in_flight(party) == 0
    assert counted(party, FAIL) == {"10": 1}


def ended(call: Any) -> tuple[Code, str]:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    return caught.value.code(), caught.value.details()


# ------------------------------------------------------------------------------------------------ the wire


async def test_in_mode_enforce_only_certificates_of_our_trust_domain_get_a_connection(
    shop: Shop, backend: Backend, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """No certificate, one of another CA, plain text: refused before any call."""
    other = Shop(tmp_path_factory.mktemp("other"))
    storefront, stranger = shop.party("storefront"), other.party("storefront")
    assert stranger.identity is not None
    assert stranger.identity.current is not None
    assert storefront.identity is not None
    assert storefront.identity.current is not None
    roots = storefront.identity.current.bundles["shop.internal"]
    foreign = grpc.ssl_channel_credentials(roots, bytes(stranger.identity.current.key), stranger.identity.current.chain)
    for channel in (
        grpc.aio.secure_channel(backend.address, credentials(storefront, with_certificate=False), options=[NAME]),
        grpc.aio.secure_channel(backend.address, foreign, options=[NAME]),
        grpc.aio.insecure_channel(backend.address),
    ):
        async with channel:
            assert (await refusal(channel.unary_unary(HEALTH)(b"", timeout=5)))[0] is Code.UNAVAILABLE
    assert backend.calls == 0
    assert backend.party.gate.stats() == []


async def test_in_mode_permissive_there_is_a_plain_port_beside(tmp_path: Path) -> None:
    """Callers of the mesh are known; the others come in plain, and are counted as would-be refusals."""
    shop = Shop(tmp_path, yaml_of("permissive"))
    backend = Backend(shop.party("inventory"), "a")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        plain = f"127.0.0.1:{free.getsockname()[1]}"
    await backend.listen("127.0.0.1:0", plain=plain)
    async with grpc.aio.insecure_channel(plain) as channel:
        assert (await channel.unary_unary(WHO)(b"")).startswith(b"|False||")
    assert [row["would_deny"] for row in backend.party.gate.stats()] == [1]
    async with stock(shop.party("storefront"), backend.address) as channel:
        assert (await channel.unary_unary(WHO)(b"")).startswith(f"{STOREFRONT}|True|".encode())
    await backend.stop()


async def test_in_mode_observe_the_port_is_plain(tmp_path: Path) -> None:
    """No certificate is asked for; rules only tell what they would refuse."""
    shop = Shop(tmp_path, yaml_of("observe"))
    backend = await shop.start("a")
    async with grpc.aio.insecure_channel(backend.address) as channel:
        assert (await channel.unary_unary(WHO)(b"")).startswith(b"|False||")
    assert [row["would_deny"] for row in backend.party.gate.stats()] == [1]
    await shop.stop()


async def test_a_plain_port_is_for_mode_permissive_only(shop: Shop) -> None:
    """A door beside the door is refused, not opened."""
    with pytest.raises(errors.ConfigError, match="permissive"):
        add_port(shop.party("inventory"), grpc.aio.server(), "127.0.0.1:0", plain="127.0.0.1:0")


async def test_a_port_in_use_is_a_listen_error(shop: Shop) -> None:
    """It names the address and what may be the cause."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(errors.ListenError, match=address):
            add_port(shop.party("inventory"), grpc.aio.server(), address)


async def test_without_a_certificate_there_is_no_port(shop: Shop) -> None:
    """Nothing falls back to plain text."""
    party = shop.party("inventory")
    party.identity = None
    with pytest.raises(errors.IdentityError):
        add_port(party, grpc.aio.server(), "127.0.0.1:0")


async def test_new_connections_see_the_new_certificate(shop: Shop, backend: Backend) -> None:
    """The server is asked at each connection; a connection that exists goes on."""
    own = backend.party.identity
    assert own is not None
    async with stock(shop.party("storefront"), backend.address) as channel:
        await channel.unary_unary(ECHO)(b"")
        first = await asyncio.to_thread(serial_at, backend.address, shop)
        assert own.current is not None
        assert first == own.current.serial
        shop.certify()
        assert own.refresh(time.time())
        second = await asyncio.to_thread(serial_at, backend.address, shop)
        assert own.current is not None
        assert (second, second == first) == (own.current.serial, False)
        assert await channel.unary_unary(ECHO)(b"x") == b"x"


def serial_at(address: str, shop: Shop) -> str:
    """The serial number of the certificate that a server shows."""
    host, _, port = address.rpartition(":")
    folder = shop.identities / "storefront"
    context = ssl.create_default_context(cafile=str(folder / "bundle.pem"))
    context.check_hostname = False
    context.load_cert_chain(folder / "svid.pem", folder / "key.pem")
    context.set_alpn_protocols(["h2"])
    with socket.create_connection((host, int(port)), 5) as plain, context.wrap_socket(plain) as wire:
        certificate = wire.getpeercert()
        assert certificate is not None
        return str(certificate["serialNumber"]).lower()


def test_a_certificate_proves_an_identity_or_nothing(shop_files: tuple[Shop, bytes]) -> None:
    """Exactly one URI SAN, a SPIFFE ID of our trust domain, in a certificate that is still valid: else a caller without identity."""
    shop, pem = shop_files
    party = shop.party("inventory")
    now = time.time()

    assert party.identity is not None
    own = party.identity.current
    assert own is not None

    def seen(*, identity: Any = own, wall: float = now, **changes: Any) -> str:
        auth = {"transport_security_type": [b"ssl"], "peer_spiffe_id": [STOREFRONT.encode()], "peer_uri": [STOREFRONT.encode()],
                "x509_pem_cert": [pem], **changes}  # fmt: skip
        callers = Callers(lambda: identity, lambda: wall)
        return callers.peer_of({key: value for key, value in auth.items() if value is not None}).spiffe_id

    assert seen() == STOREFRONT
    assert seen(peer_spiffe_id=None) == ""
    assert seen(peer_uri=[STOREFRONT.encode(), b"https://shop.example"]) == ""
    assert seen(peer_spiffe_id=[STOREFRONT.encode()] * 2, peer_uri=[STOREFRONT.encode()] * 2) == ""
    assert seen(peer_uri=[b"spiffe://shop.internal/ns/default/sa/other"]) == ""
    assert seen(transport_security_type=None) == ""
    assert seen(transport_security_type=[b"insecure"]) == ""
    assert seen(x509_pem_cert=None) == ""
    assert seen(x509_pem_cert=[b"no certificate"]) == ""
    assert seen(peer_spiffe_id=[b"spiffe://shop.internal/\xff"], peer_uri=[b"spiffe://shop.internal/\xff"]) == ""
    assert seen(peer_spiffe_id=[b"spiffe://shop.internal/a/../b"], peer_uri=[b"spiffe://shop.internal/a/../b"]) == ""
    assert seen(identity=dataclasses.replace(own, bundles={"other.internal": own.bundles["shop.internal"]})) == ""
    assert seen(identity=None) == ""
    assert seen(wall=now + 400 * 86400) == ""


@pytest.fixture
def shop_files(tmp_path: Path) -> tuple[Shop, bytes]:
    shop = Shop(tmp_path)
    return shop, (shop.identities / "storefront" / "svid.pem").read_bytes()
