"""Does an attested process get what the standard says, by the clients that people use? Real sockets, real clients."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import os
import socket
import struct
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from hypothesis import given, settings
from hypothesis import strategies as st
from spiffe import JwtSource, WorkloadApiClient, X509Source
from spiffe._proto import workload_pb2 as pb
from spiffe._proto import workload_pb2_grpc as pg

from meshlib.agent.attest import Attestor, Caller, Peer
from meshlib.agent.frames import Frames
from meshlib.agent.grpc import Connection, Limits, Method
from meshlib.config.agent_policy import EntryPolicy
from meshlib.errors import Denied
from meshlib.secure import CertificateAuthority, certificates
from meshlib.secure.jwt_svid import TokenKey
from tests.agent.workload_world import PATIENCE, TD, Issuer, Node, id_of, node, until

ME = 0
HEADER = [("workload.spiffe.io", "true")]


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[Node]:
    with node(tmp_path) as made:
        yield made


@pytest.fixture
def stub(agent: Node) -> Iterator[pg.SpiffeWorkloadAPIStub]:
    with grpc.insecure_channel(agent.address) as channel:
        yield pg.SpiffeWorkloadAPIStub(channel)


def der(pem: bytes) -> bytes:
    return b"".join(each.public_bytes(Encoding.DER) for each in x509.load_pem_x509_certificates(pem))


def code_of(call: Any) -> grpc.StatusCode:
    with pytest.raises(grpc.RpcError) as raised:
        call()
    return raised.value.code()


# ---------------------------------------------------------------- what it answers


def test_the_spiffe_library_gets_the_identity_of_its_process(agent: Node) -> None:
    """Certificate, key and roots are those that were issued."""
    issued = agent.issuer.identities["orders"]
    with WorkloadApiClient(agent.address) as client:
        svid = client.fetch_x509_svid()
        bundles = client.fetch_x509_bundles()
    assert str(svid.spiffe_id) == id_of("orders")
    assert certificates.pem(*svid.cert_chain) == issued.chain
    (bundle,) = bundles.bundles
    assert certificates.pem(*bundle.x509_authorities) == agent.issuer.authority.bundle


def test_the_spiffe_librarys_source_hears_of_every_rotation(agent: Node) -> None:
    """Without asking again: one stream, a message for each change."""
    with X509Source(socket_path=agent.address, timeout_in_seconds=PATIENCE) as source:
        for _ in range(3):
            issued = agent.issuer.issue("orders")
            until(lambda issued=issued: certificates.pem(*source.get_x509_context().default_svid.cert_chain) == issued.chain)


def test_tokens_are_for_the_audiences_that_were_asked_for(agent: Node) -> None:
    """And are found good for them, by the agent and by the library with the keys of the agent."""
    with WorkloadApiClient(agent.address) as client:
        token = client.fetch_jwt_svid(audience={"web", "db"})
        assert (str(token.spiffe_id), set(token.audience)) == (id_of("orders"), {"web", "db"})
        assert str(client.validate_jwt_svid(token.token, "web").spiffe_id) == id_of("orders")
        with pytest.raises(Exception, match="JWT"):
            client.validate_jwt_svid(token.token, "elsewhere")
    with JwtSource(socket_path=agent.address, timeout_in_seconds=PATIENCE) as source:
        bundle = source.get_bundle_for_trust_domain(token.spiffe_id.trust_domain)
        assert bundle is not None
        assert list(bundle.jwt_authorities) == [agent.issuer.keys[0].kid]


async def test_asyncio_clients_are_served_too(agent: Node) -> None:
    """The other implementation of gRPC for Python."""
    async with grpc.aio.insecure_channel(agent.address) as channel:
        stream = pg.SpiffeWorkloadAPIStub(channel).FetchX509SVID(pb.X509SVIDRequest(), metadata=HEADER)
        first = await stream.read()
        agent.issuer.issue("orders")
        second = await stream.read()
        stream.cancel()
    assert [each.svids[0].spiffe_id for each in (first, second)] == [id_of("orders")] * 2
    assert first.svids[0].x509_svid != second.svids[0].x509_svid


def test_message_holds_everything_and_each_identity_once(tmp_path: Path) -> None:
    """All identities of a caller in the order of the entries, roots of partners under their IDs, and revocations."""
    issuer = Issuer()
    partner = CertificateAuthority.create(None, "partner.example").bundle
    issuer.partners["partner.example"] = partner
    root = issuer.authority._roots.signing
    crl = certificates.new_crl(root.certificate, root.key, [("0a", time.time(), "unspecified")], 3600.0, time.time(), 1)
    issuer.revoked[TD] = crl.public_bytes(Encoding.PEM)
    entries = [
        EntryPolicy("web", uid=ME),
        EntryPolicy("orders", uid=ME),
        EntryPolicy("web", uid=ME, gid=0),
        EntryPolicy("db", uid=5),
    ]
    with node(tmp_path, entries, issuer=issuer) as agent, grpc.insecure_channel(agent.address) as channel:
        stub = pg.SpiffeWorkloadAPIStub(channel)
        stream = stub.FetchX509SVID(pb.X509SVIDRequest(), metadata=HEADER)
        message = next(stream)
        bundles = next(stub.FetchX509Bundles(pb.X509BundlesRequest(), metadata=HEADER))
        stream.cancel()
    assert [svid.spiffe_id for svid in message.svids] == [id_of("web"), id_of("orders")]
    der = {
        f"spiffe://{name}": x509.load_pem_x509_certificate(pem).public_bytes(Encoding.DER)
        for name, pem in issuer.bundles().items()
    }
    assert dict(message.federated_bundles) == {"spiffe://partner.example": der["spiffe://partner.example"]}
    assert dict(bundles.bundles) == der
    assert list(message.crl) == list(bundles.crl) == [crl.public_bytes(Encoding.DER)]


def test_change_of_somebody_else_is_no_message(agent: Node, stub: Any) -> None:
    """What a caller gets says nothing about its neighbours, not even by its time."""
    stream = stub.FetchX509SVID(pb.X509SVIDRequest(), metadata=HEADER)
    first = next(stream)
    agent.issuer.issue("neighbour")
    agent.issuer.tell()
    issued = agent.issuer.issue("orders")
    second = next(stream)
    stream.cancel()
    assert first != second
    assert second.svids[0].x509_svid == der(issued.chain)


def test_new_key_of_tokens_is_told(agent: Node, stub: Any) -> None:
    """Before it signs anything, others have heard of it."""
    stream = stub.FetchJWTBundles(pb.JWTBundlesRequest(), metadata=HEADER)
    first = next(stream)
    agent.issuer.keys.append(TokenKey.make())
    agent.issuer.tell()
    second = next(stream)
    stream.cancel()
    assert [each.bundles[f"spiffe://{TD}"].count(b'"kid"') for each in (first, second)] == [1, 2]


# ---------------------------------------------------------------- what it refuses


CALLS = [
    ("FetchX509SVID", pb.X509SVIDRequest()),
    ("FetchX509Bundles", pb.X509BundlesRequest()),
    ("FetchJWTSVID", pb.JWTSVIDRequest(audience=["web"])),
    ("FetchJWTBundles", pb.JWTBundlesRequest()),
    ("ValidateJWTSVID", pb.ValidateJWTSVIDRequest(audience="web", svid="a.b.c")),
]


def called(stub: Any, name: str, request: Any, metadata: Any) -> Any:
    answer = getattr(stub, name)(request, metadata=metadata, timeout=PATIENCE)
    return next(answer) if hasattr(answer, "__next__") else answer


@pytest.mark.parametrize(("name", "request_"), CALLS, ids=[name for name, _ in CALLS])
@pytest.mark.parametrize(
    "metadata",
    [[], [("workload.spiffe.io", "True")], [("workload.spiffe.io", "false")], [*HEADER, *HEADER]],
    ids=["none", "another case", "false", "twice"],
)
def test_call_without_the_header_is_invalid(stub: Any, name: str, request_: Any, metadata: Any) -> None:
    """To the letter."""
    assert code_of(lambda: called(stub, name, request_, metadata)) is grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.parametrize(("name", "request_"), CALLS, ids=[name for name, _ in CALLS])
def test_caller_without_an_entry_is_denied_everything(tmp_path: Path, name: str, request_: Any) -> None:
    """Not even public keys are for everybody; and the words are always the same."""
    with node(tmp_path, [EntryPolicy("orders", uid=4321)]) as agent, grpc.insecure_channel(agent.address) as channel:
        with pytest.raises(grpc.RpcError) as raised:
            called(pg.SpiffeWorkloadAPIStub(channel), name, request_, HEADER)
    assert (raised.value.code(), raised.value.details()) == (grpc.StatusCode.PERMISSION_DENIED, "no identity issued")


def test_stream_of_a_caller_who_loses_the_entry_is_ended(agent: Node, stub: Any) -> None:
    """With the other entries' first moment."""
    streams = [called_stream(stub, name, request) for name, request in CALLS if name in STREAMS]
    for stream in streams:
        next(stream)
    agent.entries.replace([EntryPolicy("orders", uid=4321)])
    assert [code_of(lambda stream=stream: next(stream)) for stream in streams] == [grpc.StatusCode.PERMISSION_DENIED] * 3


STREAMS = {"FetchX509SVID", "FetchX509Bundles", "FetchJWTBundles"}


def called_stream(stub: Any, name: str, request: Any) -> Any:
    return getattr(stub, name)(request, metadata=HEADER, timeout=PATIENCE)


def test_caller_of_whom_more_must_be_known_is_sent_away_to_come_again(agent: Node, stub: Any) -> None:
    """An entry asks for a hash that nobody took so far: the same channel is attested anew, and loses nothing."""
    digest = hashlib.sha256(Path(os.path.realpath(sys.executable)).read_bytes()).hexdigest()
    stream = called_stream(stub, "FetchX509SVID", pb.X509SVIDRequest())
    next(stream)
    agent.entries.replace([EntryPolicy("orders", uid=ME, sha256=(digest,))])
    assert code_of(lambda: next(stream)) is grpc.StatusCode.UNAVAILABLE
    again = stub.FetchX509SVID(pb.X509SVIDRequest(), metadata=HEADER, timeout=PATIENCE, wait_for_ready=True)
    assert next(again).svids[0].spiffe_id == id_of("orders")
    agent.entries.replace([EntryPolicy("orders", uid=ME, sha256=("0" * 64,))])
    assert code_of(lambda: next(again)) is grpc.StatusCode.PERMISSION_DENIED


def test_caller_who_could_not_be_attested_for_a_moment_is_attested_anew(tmp_path: Path) -> None:
    """On the same channel: it is denied, hung up on, and served when it asks again."""

    class Unsure(Attestor):
        doubts = 1

        def attest(self, peer: Peer) -> Caller:
            if self.doubts:
                self.doubts -= 1
                raise Denied("no", rule="attest.test")
            return super().attest(peer)

    with node(tmp_path, attestor=lambda _: Unsure()) as agent, grpc.insecure_channel(agent.address) as channel:
        stub = pg.SpiffeWorkloadAPIStub(channel)
        assert (
            code_of(lambda: next(called_stream(stub, "FetchX509SVID", pb.X509SVIDRequest()))) is grpc.StatusCode.PERMISSION_DENIED
        )
        again = stub.FetchX509SVID(pb.X509SVIDRequest(), metadata=HEADER, timeout=PATIENCE, wait_for_ready=True)
        assert next(again).svids[0].spiffe_id == id_of("orders")
        assert agent.acceptor.accepted == 2


def test_identity_that_is_withdrawn_ends_the_stream_and_a_missing_one_is_asked_for_again(agent: Node, stub: Any) -> None:
    """Taken back is denied; not there yet isn't."""
    stream = called_stream(stub, "FetchX509SVID", pb.X509SVIDRequest())
    next(stream)
    agent.issuer.withdraw("orders")
    assert code_of(lambda: next(stream)) is grpc.StatusCode.PERMISSION_DENIED
    assert code_of(lambda: next(called_stream(stub, "FetchX509SVID", pb.X509SVIDRequest()))) is grpc.StatusCode.UNAVAILABLE


@pytest.mark.parametrize(
    ("request_", "expected"),
    [
        (pb.JWTSVIDRequest(), grpc.StatusCode.INVALID_ARGUMENT),
        (pb.JWTSVIDRequest(audience=[""]), grpc.StatusCode.INVALID_ARGUMENT),
        (pb.JWTSVIDRequest(audience=["a b"]), grpc.StatusCode.INVALID_ARGUMENT),
        (pb.JWTSVIDRequest(audience=["web"], spiffe_id=id_of("db")), grpc.StatusCode.PERMISSION_DENIED),
        (pb.JWTSVIDRequest(audience=["unavailable"]), grpc.StatusCode.UNAVAILABLE),
    ],
    ids=["none", "empty", "impossible", "not ours", "no CA"],
)
def test_token_that_cannot_be_had(stub: Any, request_: Any, expected: grpc.StatusCode) -> None:
    """Each for its own reason."""
    assert code_of(lambda: stub.FetchJWTSVID(request_, metadata=HEADER)) is expected


def test_tokens_that_are_not_good_are_invalid(agent: Node, stub: Any) -> None:
    """Of strangers, of other trust domains, cut off, or none at all: with one answer for all."""
    good = agent.issuer.keys[0].issue(id_of("web"), ["here"])
    stranger = TokenKey.make()
    bad = [
        stranger.issue(id_of("web"), ["here"]),
        stranger.issue("spiffe://elsewhere/a", ["here"]),
        good[:-3],
        good + ".x",
        "a.b.c",
        "..",
        "x",
        "e30.W10.",
        "e30." + "W1" * 20000 + ".",
    ]
    asked = lambda svid: stub.ValidateJWTSVID(pb.ValidateJWTSVIDRequest(audience="here", svid=svid), metadata=HEADER)
    assert asked(good).claims["sub"] == id_of("web")
    assert [code_of(lambda svid=svid: asked(svid)) for svid in bad] == [grpc.StatusCode.INVALID_ARGUMENT] * len(bad)


def test_token_by_a_key_that_is_being_asked_for_is_not_called_bad(agent: Node, stub: Any) -> None:
    """The client may ask again, which it never does after InvalidArgument; then the token is good."""
    new = TokenKey.make()
    token = new.issue(id_of("web"), ["here"])
    asked = lambda svid: stub.ValidateJWTSVID(pb.ValidateJWTSVIDRequest(audience="here", svid=svid), metadata=HEADER)
    agent.issuer.coming.add(new.kid)
    assert code_of(lambda: asked(token)) is grpc.StatusCode.UNAVAILABLE
    agent.issuer.keys.append(new)
    agent.issuer.coming.clear()
    assert asked(token).claims["sub"] == id_of("web")
    assert code_of(lambda: asked(token[:-3])) is grpc.StatusCode.INVALID_ARGUMENT


def test_method_that_is_not_there_is_unimplemented(agent: Node) -> None:
    """To the letter, and never made to fit."""
    with grpc.insecure_channel(agent.address) as channel:
        for path in (
            "/SpiffeWorkloadAPI/FetchWITSVID",
            "/spiffeworkloadapi/FetchX509SVID",
            "//SpiffeWorkloadAPI/FetchX509SVID",
            "/",
        ):
            call = channel.unary_unary(path)
            assert code_of(lambda call=call: call(b"", metadata=HEADER)) is grpc.StatusCode.UNIMPLEMENTED
        call = channel.unary_stream("/SpiffeWorkloadAPI/FetchX509SVID")
        assert code_of(lambda: next(call(b"\xff\xff", metadata=HEADER))) is grpc.StatusCode.INVALID_ARGUMENT


# ---------------------------------------------------------------- its life


def test_draining_ends_streams_so_that_clients_come_again(agent: Node) -> None:
    """A stream that ends is no withdrawal: the status says that somebody else will answer."""
    with grpc.insecure_channel(agent.address) as channel:
        stub = pg.SpiffeWorkloadAPIStub(channel)
        stream = called_stream(stub, "FetchX509SVID", pb.X509SVIDRequest())
        next(stream)
        agent.loop.run(agent.api.drain())
        assert code_of(lambda: next(stream)) is grpc.StatusCode.UNAVAILABLE
        agent.stop()
        agent.start()
        again = pg.SpiffeWorkloadAPIStub(channel).FetchX509SVID(
            pb.X509SVIDRequest(), metadata=HEADER, wait_for_ready=True, timeout=PATIENCE
        )
        assert next(again).svids[0].spiffe_id == id_of("orders")
        again.cancel()


def test_deadline_of_a_call_ends_it(stub: Any) -> None:
    """On our side too: nothing of it stays."""
    stream = stub.FetchX509SVID(pb.X509SVIDRequest(), metadata=HEADER, timeout=0.3)
    next(stream)
    assert code_of(lambda: next(stream)) is grpc.StatusCode.DEADLINE_EXCEEDED


def test_calls_that_were_cancelled_leave_nothing(agent: Node, stub: Any) -> None:
    """A thousand of them on one connection, and the connection goes on."""
    for _ in range(50):
        stream = called_stream(stub, "FetchX509SVID", pb.X509SVIDRequest())
        next(stream)
        stream.cancel()
    (connection,) = agent.api._connections
    until(lambda: connection.calls, 0)
    assert next(called_stream(stub, "FetchX509SVID", pb.X509SVIDRequest())).svids[0].spiffe_id == id_of("orders")


async def test_many_clients_hear_of_one_change(agent: Node) -> None:
    """A hundred streams on a hundred connections."""

    async def one() -> int:
        options = [("grpc.use_local_subchannel_pool", 1)]
        async with grpc.aio.insecure_channel(agent.address, options=options) as channel:
            stream = pg.SpiffeWorkloadAPIStub(channel).FetchX509SVID(pb.X509SVIDRequest(), metadata=HEADER)
            await stream.read()
            begun.append(1)
            message = await stream.read()
            stream.cancel()
            return len(message.svids)

    begun: list[int] = []
    tasks = [asyncio.create_task(one()) for _ in range(100)]
    while len(begun) < 100:
        await asyncio.sleep(0.01)
    agent.issuer.issue("orders")
    assert await asyncio.gather(*tasks) == [1] * 100


# ---------------------------------------------------------------- those who mean harm


class Raw:
    """A client that speaks HTTP/2 by hand."""

    def __init__(self, path: Path, *, begins: bool = True) -> None:
        import h2.config
        import h2.connection

        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(PATIENCE)
        self.sock.connect(str(path))
        self.h2 = h2.connection.H2Connection(h2.config.H2Configuration(client_side=True))
        self.events: list[Any] = []
        if begins:
            self.h2.initiate_connection()
            self.flush()

    def flush(self) -> None:
        # Who was shut out hears why all the same.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.sock.sendall(self.h2.data_to_send())

    def call(self, method: str = "FetchX509SVID", body: bytes = b"\0\0\0\0\0", **headers: str) -> int:
        stream = self.h2.get_next_available_stream_id()
        head = {":method": "POST", ":scheme": "http", ":path": f"/SpiffeWorkloadAPI/{method}", ":authority": "localhost"}
        head |= {"content-type": "application/grpc", "te": "trailers", "workload.spiffe.io": "true"} | headers
        self.h2.send_headers(stream, list(head.items()))
        self.h2.send_data(stream, body, end_stream=True)
        self.flush()
        return stream

    def read(self) -> bool:
        """Some more; False at the end."""
        try:
            data = self.sock.recv(65536)
        except (ConnectionResetError, BrokenPipeError):
            return False
        self.events += self.h2.receive_data(data) if data else []
        return bool(data)

    def read_all(self) -> list[str]:
        while self.read():
            pass
        return [type(event).__name__ for event in self.events]

    def goaway(self) -> int | None:
        self.read_all()
        return next((event.error_code for event in self.events if type(event).__name__ == "ConnectionTerminated"), None)


QUICK = Limits(preface=0.3, request=0.3, write=0.5, idle=0.5)


@pytest.fixture
def quick(tmp_path: Path) -> Iterator[Node]:
    with node(tmp_path, limits=QUICK) as made:
        yield made


def seconds_of(work: Any) -> float:
    began = time.monotonic()
    work()
    return time.monotonic() - began


@pytest.mark.parametrize("said", [b"", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"PRI * HT"], ids=["nothing", "no settings", "half"])
def test_client_that_does_not_begin_is_hung_up_on(quick: Node, said: bytes) -> None:
    """It holds a place, and nothing else."""
    raw = Raw(quick.path, begins=False)
    raw.sock.sendall(said)
    assert seconds_of(raw.read_all) < PATIENCE / 2


def test_client_without_a_call_is_told_to_go(quick: Node) -> None:
    """Politely: it comes again when it has one."""
    assert Raw(quick.path).goaway() == 0


def test_request_that_does_not_come_is_not_waited_for(quick: Node) -> None:
    """Its stream ends, with a status."""
    raw = Raw(quick.path)
    stream = raw.h2.get_next_available_stream_id()
    head = [
        (":method", "POST"),
        (":scheme", "http"),
        (":path", "/SpiffeWorkloadAPI/FetchX509SVID"),
        (":authority", "localhost"),
        ("content-type", "application/grpc"),
    ]
    raw.h2.send_headers(stream, [*head, ("workload.spiffe.io", "true")])
    raw.flush()
    raw.read_all()
    heads = [dict(event.headers) for event in raw.events if type(event).__name__ == "ResponseReceived"]
    assert [head[b"grpc-status"] for head in heads] == [b"4"]


def test_client_that_reads_nothing_is_hung_up_on(quick: Node) -> None:
    """One small message is left lying in the kernel's buffer: that is enough."""
    raw = Raw(quick.path)
    raw.call()
    until(lambda: quick.api.connections, 1)
    assert seconds_of(lambda: until(lambda: quick.api.connections, 0)) < PATIENCE / 2


def test_client_that_reads_a_byte_now_and_then_is_hung_up_on(quick: Node) -> None:
    """Progress that leads nowhere is none."""
    raw = Raw(quick.path)
    raw.call()
    until(lambda: quick.api.connections, 1)
    end = time.monotonic() + PATIENCE
    read = 0
    while time.monotonic() < end and quick.api.connections:
        raw.sock.settimeout(0.1)
        try:
            read += len(raw.sock.recv(1))
        except TimeoutError:
            pass
        time.sleep(0.05)
    assert (quick.api.connections, 0 < read < 500) == (0, True)


def test_client_that_closes_its_window_is_hung_up_on(quick: Node) -> None:
    """It reads, and lets nothing be written."""
    import h2.settings

    raw = Raw(quick.path, begins=False)
    raw.h2.initiate_connection()
    raw.h2.update_settings({h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: 10})
    raw.flush()
    raw.read()
    raw.call()
    assert seconds_of(raw.read_all) < PATIENCE / 2


def test_rapid_resets_end_the_connection(agent: Node) -> None:
    """With the word that says why; another client is served meanwhile."""
    raw = Raw(agent.path)
    for _ in range(150):
        stream = raw.call()
        raw.h2.reset_stream(stream, 8)
    raw.flush()
    assert raw.goaway() == 11
    with WorkloadApiClient(agent.address) as client:
        assert str(client.fetch_x509_svid().spiffe_id) == id_of("orders")


def test_flood_of_pings_ends_the_connection(tmp_path: Path) -> None:
    """Each asks for an answer, and costs nothing."""
    with node(tmp_path, limits=Limits(frames=500)) as agent:
        raw = Raw(agent.path)
        try:
            for _ in range(200):
                raw.sock.sendall(PING * 100)
        except (BrokenPipeError, ConnectionResetError):
            pass
        assert raw.goaway() == 11


PING = struct.pack(">I", 8)[1:] + b"\x06\x00" + struct.pack(">I", 0) + b"12345678"


def test_flood_over_many_connections_ends_all_of_them(tmp_path: Path) -> None:
    """Each stays within what one may send. Until the time is over their user gets no other; nobody else is kept out."""
    with node(tmp_path, limits=Limits(frames=500, window=2.0)) as agent:
        raws = [Raw(agent.path) for _ in range(6)]
        for raw in raws:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                raw.sock.sendall(PING * 150)
        until(lambda: agent.api.bars(ME))
        assert Raw(agent.path).read_all() == []
        for raw in raws:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                raw.sock.sendall(PING)
            assert raw.goaway() in {11, None}  # None: it had sent more when it was closed
        assert (agent.api.connections, agent.api.bars(1001)) == (0, False)
        until(lambda: agent.api.bars(ME), False)
        with WorkloadApiClient(agent.address) as client:
            assert str(client.fetch_x509_svid().spiffe_id) == id_of("orders")


def test_frames_of_nothing_are_counted_however_they_come(tmp_path: Path) -> None:
    """Those on a stream that is closed, of which the library tells nothing, too."""
    with node(tmp_path, limits=Limits(frames=300)) as agent:
        raw = Raw(agent.path)
        stream = raw.call()
        raw.h2.reset_stream(stream, 8)
        raw.flush()
        empty = b"\0\0\0\0\0" + struct.pack(">I", stream)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            for _ in range(10):
                raw.sock.sendall(empty * 100)
        until(lambda: agent.api.bars(ME))


def test_client_who_only_has_much_to_ask_is_no_flood(tmp_path: Path) -> None:
    """Neither with good tokens nor with bad ones, which others have sent them; and no call is lost."""
    with node(tmp_path, limits=Limits(frames=150)) as agent, grpc.insecure_channel(agent.address) as channel:
        stub = pg.SpiffeWorkloadAPIStub(channel)
        good = agent.issuer.keys[0].issue(id_of("web"), ["here"])
        asked = lambda svid: stub.ValidateJWTSVID(pb.ValidateJWTSVIDRequest(audience="here", svid=svid), metadata=HEADER)
        for _ in range(200):
            assert asked(good).claims["sub"] == id_of("web")
            assert code_of(lambda: asked("bad")) is grpc.StatusCode.INVALID_ARGUMENT
        assert agent.api.connections == 1


@pytest.mark.parametrize("what", [{}, {"body": b""}, {"grpc-timeout": "1n"}], ids=["a message", "none", "no time"])
def test_stranger_who_asks_and_asks_is_a_flood(tmp_path: Path, what: dict[str, Any]) -> None:
    """Whatever they are told, it costs as much as an answer."""
    with node(tmp_path, [EntryPolicy("orders", uid=1001)], limits=Limits(frames=1000)) as agent:
        raw = Raw(agent.path)
        with contextlib.suppress(Exception):
            for _ in range(100):
                raw.call(**what)
                raw.read()
        until(lambda: agent.api.bars(ME))


@given(st.lists(st.binary(max_size=40), max_size=6), st.lists(st.integers(0, 300), max_size=8))
def test_frames_are_counted_by_their_heads_wherever_they_are_cut(bodies: list[bytes], cuts: list[int]) -> None:
    """One for each head that is whole."""
    sent = PREFACE[:24] + b"".join(struct.pack(">I", len(body))[1:] + bytes(6) + body for body in bodies)
    frames, at = Frames(), 0
    counted = 0
    for cut in [*sorted(cuts), len(sent)]:
        counted += frames.of(sent[at:cut])
        at = max(at, min(cut, len(sent)))
    assert counted == len(bodies)


@pytest.mark.parametrize(
    ("what", "status"),
    [
        ({"body": b"\0" + struct.pack(">I", 70_000) + b"x" * 16_000}, b"3"),
        ({"body": b"\1\0\0\0\0"}, b"12"),
        ({"body": b""}, b"3"),
        ({"body": b"\0\0\0\0\0\0\0\0\0\0"}, b"3"),
        ({"grpc-encoding": "gzip"}, b"12"),
        ({"grpc-timeout": "123456789S"}, b"3"),
        ({"grpc-timeout": "1x"}, b"3"),
        ({"grpc-timeout": "S"}, b"3"),
        ({f"x-{n}": "y" for n in range(101)}, b"8"),
    ],
    ids=["long", "compressed", "empty", "two", "encoding", "timeout", "unit", "digits", "headers"],
)
def test_call_that_is_malformed_gets_a_status(agent: Node, what: Any, status: bytes) -> None:
    """And the connection goes on with the next one."""
    raw = Raw(agent.path)
    raw.call(**what)
    while not any(type(event).__name__ == "StreamEnded" for event in raw.events):
        assert raw.read()
    (head,) = [dict(event.headers) for event in raw.events if type(event).__name__ == "ResponseReceived"]
    assert head[b"grpc-status"] == status
    raw.events.clear()
    raw.call()
    while not any(type(event).__name__ == "DataReceived" for event in raw.events):
        assert raw.read()


def test_more_streams_than_allowed_are_refused(agent: Node) -> None:
    """The rest of them go on."""
    raw = Raw(agent.path)
    raw.h2.remote_settings.max_concurrent_streams = 100
    for _ in range(40):
        raw.call()
    # h2 counts as well, and takes it for what it is: a client that ignores what it was told.
    assert raw.goaway() == 1


# ---------------------------------------------------------------- any bytes


PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0"


def call_bytes() -> bytes:
    """A whole call, as a client sends it."""
    import h2.config
    import h2.connection

    made = h2.connection.H2Connection(h2.config.H2Configuration(client_side=True))
    made.initiate_connection()
    head = [
        (":method", "POST"),
        (":scheme", "http"),
        (":path", "/a.B/C"),
        (":authority", "x"),
        ("content-type", "application/grpc"),
    ]
    made.send_headers(1, head)
    made.send_data(1, b"\0\0\0\0\1x", end_stream=True)
    return made.data_to_send()


CALL = call_bytes()
FRAME = st.builds(
    lambda kind, flags, stream, body: struct.pack(">I", len(body))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + body,
    st.integers(0, 12), st.integers(0, 255), st.sampled_from([0, 1, 2, 3, 5, 2**31 - 1]), st.binary(max_size=30),
)  # fmt: skip


def damaged(data: st.DataObject) -> bytes:
    message = bytearray(CALL)
    for _ in range(data.draw(st.integers(0, 3))):
        at = data.draw(st.integers(24, len(message)))
        message[at : at + data.draw(st.integers(0, 4))] = data.draw(st.binary(max_size=4))
    return bytes(message)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_any_bytes_end_a_call_or_a_connection_and_nothing_else(data: st.DataObject) -> None:
    """Random bytes, frames of all kinds, and calls that were damaged: no fault of ours comes out of it, and it ends."""
    said = data.draw(st.sampled_from(["bytes", "frames", "damaged"]))
    if said == "bytes":
        sent = data.draw(st.sampled_from([b"", PREFACE])) + data.draw(st.binary(max_size=200))
    elif said == "frames":
        sent = PREFACE + b"".join(data.draw(st.lists(FRAME, max_size=8)))
    else:
        sent = damaged(data)

    async def echo(request: bytes) -> Any:
        yield request

    faults: list[object] = []
    log = logging.getLogger("meshlib.agent")
    handler = logging.Handler()
    handler.emit = lambda record: faults.append(record.getMessage())  # type: ignore[method-assign]

    async def talk() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: faults.append(context))
        ours, theirs = socket.socketpair(socket.AF_UNIX)
        with ours, theirs:
            theirs.sendall(sent)
            made = Connection(ours, {b"/a.B/C": Method(echo)})
            serving = asyncio.create_task(made.serve())
            await asyncio.sleep(0.005)  # for an answer, where there is one
            theirs.shutdown(socket.SHUT_WR)
            await asyncio.wait_for(serving, PATIENCE)
            assert made.calls == 0

    log.addHandler(handler)
    try:
        asyncio.run(talk())
    finally:
        log.removeHandler(handler)
    assert faults == []
