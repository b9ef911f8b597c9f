"""Do our TLS and OpenSSL's agree, and is nobody believed who doesn't prove who they are?

Every test has Python's `ssl` on the other side of a real socket. What depends on time passing (ticket life, expiry under a
session) is tested in Rust, where the clock is moved by hand.
"""

from __future__ import annotations

import contextlib
import datetime
import shutil
import socket
import ssl
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from meshlib import errors
from meshlib._native import core
from tests.support import free_port, process, wait_until_listening

CLIENT = "spiffe://td/client"
SERVER = "spiffe://td/server"
HOST = (b"host", b"orders")
VERSIONS = [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3]
NAMES = {ssl.TLSVersion.TLSv1_2: "TLSv1.2", ssl.TLSVersion.TLSv1_3: "TLSv1.3"}


# ------------------------------------------------------------------ certificates


def moment(seconds: float) -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=seconds)


@dataclass(frozen=True)
class Issued:
    chain: bytes
    key: bytes

    def load_into(self, context: ssl.SSLContext, folder: Path) -> None:
        file = folder / f"{id(self)}.pem"
        file.write_bytes(self.chain + self.key)
        context.load_cert_chain(file)


def not_after_of(issued: Issued) -> float:
    return x509.load_pem_x509_certificate(issued.chain).not_valid_after_utc.timestamp()


class Authority:
    """Issues what it is told to, right or wrong."""

    def __init__(self) -> None:
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test root")])
        usage = x509.KeyUsage(False, False, False, False, False, True, True, False, False)
        self.certificate = (
            self.builder(self.name, self.key, -60, 7200)
            .add_extension(x509.BasicConstraints(True, None), True)
            .add_extension(usage, True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(self.key.public_key()), False)
            .sign(self.key, hashes.SHA256())
        )
        self.pem = self.certificate.public_bytes(serialization.Encoding.PEM)

    def builder(self, subject: x509.Name, key: ec.EllipticCurvePrivateKey, begin: float, end: float) -> x509.CertificateBuilder:
        return x509.CertificateBuilder(
            issuer_name=self.name,
            subject_name=subject,
            public_key=key.public_key(),
            serial_number=x509.random_serial_number(),
            not_valid_before=moment(begin),
            not_valid_after=moment(end),
        )

    def issue(self, *uris: str, begin: float = -60, end: float = 3600) -> Issued:
        key = ec.generate_private_key(ec.SECP256R1())
        names = [x509.UniformResourceIdentifier(uri) for uri in uris]
        purposes = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
        certificate = (
            self.builder(x509.Name([]), key, begin, end)
            .add_extension(x509.SubjectAlternativeName([*names, x509.DNSName("localhost")]), True)
            .add_extension(x509.BasicConstraints(False, None), True)
            .add_extension(x509.KeyUsage(True, False, False, False, False, False, False, False, False), True)
            .add_extension(x509.ExtendedKeyUsage(purposes), False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key()), False)
            .sign(self.key, hashes.SHA256())
        )
        private = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        return Issued(certificate.public_bytes(serialization.Encoding.PEM), private)


@pytest.fixture(scope="module")
def root() -> Authority:
    return Authority()


@pytest.fixture(scope="module")
def client(root: Authority) -> Issued:
    return root.issue(CLIENT)


@pytest.fixture(scope="module")
def server(root: Authority) -> Issued:
    return root.issue(SERVER)


def wrong(root: Authority) -> dict[str, tuple[Issued, str]]:
    """What must be refused on either side, and a word of the reason."""
    return {
        "expired": (root.issue(SERVER, begin=-7200, end=-3600), "expired"),
        "not yet valid": (root.issue(SERVER, begin=1800), "not valid yet"),
        "two URI names": (root.issue(SERVER, "https://x"), "more than one URI name"),
        "no URI name": (root.issue(), "no URI name"),
        "no SPIFFE ID": (root.issue("https://td/server"), "no SPIFFE ID"),
        "no workload": (root.issue("spiffe://td"), "names a trust domain"),
        "trust domain without bundle": (root.issue("spiffe://elsewhere/server"), "no bundle of that trust domain"),
        "signed by another root": (Authority().issue(SERVER), "no root in the bundle"),
    }


# ------------------------------------------------------------------ OpenSSL as the server

ANSWER = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"


class OpenSslServer:
    """Answers every request of every connection with ok, and remembers what came and from whom."""

    def __init__(self, context: ssl.SSLContext) -> None:
        self.context = context
        self.seen = b""
        self.peers: list[str] = []
        self.resumed: list[bool] = []
        self.errors: list[str] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while True:
            try:
                plug, _ = self._listener.accept()
            except OSError:
                return
            try:
                with self.context.wrap_socket(plug, server_side=True) as tls:
                    names: Any = (tls.getpeercert() or {}).get("subjectAltName", ())
                    self.peers += [str(value) for kind, value in names if kind == "URI"]
                    self.resumed.append(bool(tls.session_reused))
                    while data := tls.recv(65536):
                        self.seen += data
                        if data.endswith(b"\r\n\r\n"):
                            tls.sendall(ANSWER)
            except OSError as error:
                self.errors.append(str(error))

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join()


def ended(tls: core.TlsClient | core.TlsServer) -> tuple[int, int, int]:
    """How many handshakes were full, resumed, failed."""
    stats = tls.stats()
    return stats["full"], stats["resumed"], stats["failed"]


@contextlib.contextmanager
def openssl_server(
    root: Authority, own: Issued, folder: Path, version: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3
) -> Iterator[OpenSslServer]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = context.maximum_version = version
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_verify_locations(cadata=root.pem.decode())
    context.set_alpn_protocols(["h2", "http/1.1"])
    own.load_into(context, folder)
    running = OpenSslServer(context)
    try:
        yield running
    finally:
        running.close()


def call(tls: core.TlsClient, port: int, expected: str = SERVER) -> core.HttpConnection:
    """One connection with one request, closed properly. The request is sent at once, so that it waits for the handshake."""
    wire = core.HttpConnection(tls, expected, f"127.0.0.1:{port}")
    with socket.create_connection(("127.0.0.1", port), timeout=5) as plug:
        plug.sendall(wire.open())
        assert wire.send("GET", "/", [HOST], None, False) == b""
        assert not wire.has_written
        events: list[tuple[object, ...]] = []
        while not events or events[-1][0] != core.EVENT_RESPONSE:
            data = plug.recv(65536)
            try:
                out, new = wire.receive(data, len(data)) if data else (b"", wire.receive_eof())
            except errors.MeshError:
                if alert := wire.pending():
                    plug.sendall(alert)
                raise
            plug.sendall(out)
            events += new
        assert [event[0] for event in events] == [core.EVENT_OPEN, core.EVENT_RESPONSE]
        assert (events[-1][5], wire.is_idle) == (b"ok", True)
        plug.sendall(wire.close())
    return wire


@pytest.mark.parametrize("version", VERSIONS)
def test_client_and_openssl_prove_themselves_to_each_other(
    root: Authority, client: Issued, server: Issued, tmp_path: Path, version: ssl.TLSVersion
) -> None:
    """Both sides know the other's SPIFFE ID before a byte of HTTP."""
    tls = core.TlsClient(client.chain, client.key, {"td": root.pem}, 7)
    with openssl_server(root, server, tmp_path, version) as peer:
        wire = call(tls, peer.port)
    assert (wire.peer, wire.tls_version, wire.tls_resumed) == (SERVER, NAMES[version], False)
    assert wire.peer_chain[0] == ssl.PEM_cert_to_DER_cert(server.chain.decode())
    assert wire.peer_not_after == not_after_of(server)
    assert (peer.peers, peer.seen, peer.errors) == ([CLIENT], b"GET / HTTP/1.1\r\nhost: orders\r\n\r\n", [])
    assert (tls.generation, ended(tls)) == (7, (1, 0, 0))


@pytest.mark.parametrize("version", VERSIONS)
def test_client_resumes_at_openssl_and_knows_the_peer_all_the_same(
    root: Authority, client: Issued, server: Issued, tmp_path: Path, version: ssl.TLSVersion
) -> None:
    """By address and expected identity; a new generation begins without tickets."""
    tls = core.TlsClient(client.chain, client.key, {"td": root.pem}, 1)
    with openssl_server(root, server, tmp_path, version) as peer:
        resumed = [call(tls, peer.port).tls_resumed for _ in range(3)]
        resumed.append(call(tls, peer.port, "").tls_resumed)
        renewed = core.TlsClient(client.chain, client.key, {"td": root.pem}, 2)
        wires = [call(renewed, peer.port) for _ in range(2)]
    assert resumed == [False, True, True, False]
    assert [(wire.tls_resumed, wire.peer) for wire in wires] == [(False, SERVER), (True, SERVER)]
    assert ended(tls) == (2, 2, 0)
    assert peer.resumed == [False, True, True, False, False, True]


def test_wrong_servers_get_nothing(root: Authority, client: Issued, server: Issued, tmp_path: Path) -> None:
    """No byte of the request is written to a server that does not prove the expected identity."""
    tls = core.TlsClient(client.chain, client.key, {"td": root.pem}, 1)
    cases = {**wrong(root), "another service": (root.issue("spiffe://td/other"), "but spiffe://td/server was expected")}
    for name, (own, reason) in cases.items():
        with openssl_server(root, own, tmp_path) as peer:
            with pytest.raises(errors.PeerIdentityError, match=reason) as caught:
                call(tls, peer.port)
            assert (name, caught.value.is_written, caught.value.reason) == (name, False, "secure.peer_identity")
            assert f"127.0.0.1:{peer.port}: The peer did not prove its identity" in str(caught.value)
        assert (name, peer.seen, peer.peers) == (name, b"", [])
    assert ended(tls) == (0, 0, len(cases))
    assert tls.stats()["failed_identity"] == len(cases)


def test_refusal_of_our_own_certificate_is_told(root: Authority, server: Issued, tmp_path: Path) -> None:
    """It comes after the handshake (TLS 1.3), and says what to compare."""
    foreign = Authority().issue(CLIENT)
    tls = core.TlsClient(foreign.chain, foreign.key, {"td": root.pem}, 1)
    with openssl_server(root, server, tmp_path) as peer, pytest.raises(errors.TlsError, match="refused our certificate"):
        call(tls, peer.port)
    assert peer.seen == b""
    # For us the handshake had ended (TLS 1.3) when the refusal came: it counts as both.
    assert (ended(tls), tls.stats()["failed_refused"]) == ((1, 0, 1), 1)


def test_client_without_identity_verifies_the_server_all_the_same(root: Authority, server: Issued, tmp_path: Path) -> None:
    """It is anonymous, not careless; a server that wants a certificate refuses it."""
    tls = core.TlsClient(None, None, {"td": root.pem}, 1)
    with openssl_server(root, server, tmp_path) as peer:
        with pytest.raises(errors.TlsError, match="refused our certificate"):
            call(tls, peer.port)
        peer.context.verify_mode = ssl.CERT_NONE
        assert call(tls, peer.port).peer == SERVER
        with pytest.raises(errors.PeerIdentityError):
            call(tls, peer.port, "spiffe://td/other")


def test_plain_and_old_peers_are_told_apart(root: Authority, client: Issued) -> None:
    """What stands in the error is what an operator has to change."""
    tls = core.TlsClient(client.chain, client.key, {"td": root.pem}, 1)
    wire = core.HttpConnection(tls, SERVER, "orders:1")
    wire.open()
    answer = b"HTTP/1.1 400 Bad Request\r\n\r\n"
    with pytest.raises(errors.TlsError, match="does not speak TLS"):
        wire.receive(answer, len(answer))
    wire = core.HttpConnection(tls, SERVER, "orders:1")
    wire.open()
    with pytest.raises(errors.TlsError, match="during the TLS handshake"):
        wire.receive_eof()


# ------------------------------------------------------------------ sessions that are gone on with


@pytest.mark.parametrize("version", VERSIONS)
def test_no_ticket_is_offered_once_our_own_certificate_has_ended(
    root: Authority, server: Issued, tmp_path: Path, version: ssl.TLSVersion
) -> None:
    """Even where the server would take it, and asks for no certificate."""
    tls, alive = (
        core.TlsClient(own.chain, own.key, {"td": root.pem}, 1)
        for own in (root.issue(CLIENT, begin=-7200, end=-1), root.issue(CLIENT))
    )
    with openssl_server(root, server, tmp_path, version) as peer:
        peer.context.verify_mode = ssl.CERT_NONE
        assert [call(tls, peer.port).tls_resumed for _ in range(3)] == [False, False, False]
        assert [call(alive, peer.port).tls_resumed for _ in range(3)] == [False, True, True]
    assert (tls.stats()["tickets_used"], tls.stats()["tickets_expired"] > 0) == (0, True)
    assert alive.stats()["tickets_used"] == 2


@pytest.mark.parametrize("version", VERSIONS)
def test_wrong_identity_is_refused_and_never_resumed(
    root: Authority, client: Issued, server: Issued, tmp_path: Path, version: ssl.TLSVersion
) -> None:
    """Whatever was won at the same address with the right one; and that is still good afterwards."""
    tls = core.TlsClient(client.chain, client.key, {"td": root.pem}, 1)
    with openssl_server(root, server, tmp_path, version) as peer:
        call(tls, peer.port)
        for _ in range(2):
            with pytest.raises(errors.PeerIdentityError):
                call(tls, peer.port, "spiffe://td/other")
        assert tls.stats()["tickets_used"] == 0
        assert call(tls, peer.port).tls_resumed
    assert ended(tls) == (1, 1, 2)


@pytest.mark.parametrize("version", VERSIONS)
def test_resumed_connection_knows_when_the_proof_ends(
    root: Authority, client: Issued, tmp_path: Path, version: ssl.TLSVersion
) -> None:
    """As the handshake in full had found it."""
    own = root.issue(SERVER, end=1234)
    tls = core.TlsClient(client.chain, client.key, {"td": root.pem}, 1)
    with openssl_server(root, own, tmp_path, version) as peer:
        first, second = call(tls, peer.port), call(tls, peer.port)
    assert (first.tls_resumed, second.tls_resumed) == (False, True)
    assert first.peer_not_after == second.peer_not_after == not_after_of(own)
    assert (first.peer, first.peer_chain) == (second.peer, second.peer_chain)
    assert tls.not_after == not_after_of(client)


def test_counters_are_taken_over_by_the_next_generation_and_tickets_are_not(
    root: Authority, client: Issued, server: Issued, tmp_path: Path
) -> None:
    """Both sides; what a handshake of before ends with is counted in the same place."""
    tls = core.TlsClient(client.chain, client.key, {"td": root.pem}, 1)
    with openssl_server(root, server, tmp_path) as peer:
        resumed = [call(tls, peer.port).tls_resumed for _ in range(2)]
        renewed = core.TlsClient(client.chain, client.key, {"td": root.pem}, 2, tls)
        assert renewed.stats() == tls.stats() | {"tickets_held": 0}
        resumed += [call(renewed, peer.port).tls_resumed for _ in range(2)]
        resumed.append(call(tls, peer.port).tls_resumed)
    assert resumed == [False, True, False, True, True]
    assert ended(renewed) == ended(tls) == (2, 3, 0)
    first = core.TlsServer(server.chain, server.key, {"td": root.pem}, 1, True)
    context = openssl_client(root, client, tmp_path)
    _, _, _, session = talk(first, context)
    second = core.TlsServer(server.chain, server.key, {"td": root.pem}, 2, True, before=first)
    wire, _, _, _ = talk(second, context, session=session)
    assert (wire.tls_resumed, ended(second)) == (False, (2, 0, 0))


NGINX = """
daemon off; master_process off; worker_processes 1; pid {folder}/pid; error_log stderr;
events {{}}
http {{
  access_log off; client_body_temp_path {folder}/b; proxy_temp_path {folder}/p; fastcgi_temp_path {folder}/f;
  uwsgi_temp_path {folder}/u; scgi_temp_path {folder}/s;
  ssl_certificate {folder}/server.pem; ssl_certificate_key {folder}/server.pem;
  ssl_client_certificate {folder}/root.pem; ssl_verify_client on; ssl_protocols TLSv1.2 TLSv1.3;
  server {{ listen 127.0.0.1:{tickets} ssl; ssl_session_tickets on; ssl_session_cache off; return 200 "ok"; }}
  server {{ listen 127.0.0.1:{cached} ssl; ssl_session_tickets off; ssl_session_cache shared:kept:1m; return 200 "ok"; }}
  server {{ listen 127.0.0.1:{none} ssl; ssl_session_tickets off; ssl_session_cache off; return 200 "ok"; }}
  server {{ listen 127.0.0.1:{old} ssl; ssl_protocols TLSv1.2; ssl_session_tickets on; ssl_session_cache off; return 200 "ok"; }}
}}
"""


@pytest.mark.skipif(shutil.which("nginx") is None, reason="nginx is not installed")
def test_sessions_at_nginx_follow_what_nginx_allows(root: Authority, client: Issued, server: Issued, tmp_path: Path) -> None:
    """Tickets, sessions that it keeps itself, or nothing; a new generation begins anew in each case."""
    (tmp_path / "server.pem").write_bytes(server.chain + server.key)
    (tmp_path / "root.pem").write_bytes(root.pem)
    ports = {name: free_port() for name in ("tickets", "cached", "none", "old")}
    (tmp_path / "nginx.conf").write_text(NGINX.format(folder=tmp_path, **ports))
    with process("nginx", "-p", str(tmp_path), "-c", str(tmp_path / "nginx.conf"), "-e", "stderr") as nginx:
        for port in ports.values():
            wait_until_listening(port, nginx)
        tls = core.TlsClient(client.chain, client.key, {"td": root.pem}, 1)
        seen = {name: [call(tls, port).tls_resumed for _ in range(3)] for name, port in ports.items()}
        assert seen == {
            "tickets": [False, True, True],
            "cached": [False, True, True],
            "none": [False, False, False],
            "old": [False, True, True],
        }
        assert ended(tls) == (6, 6, 0)
        renewed = core.TlsClient(client.chain, client.key, {"td": root.pem}, 2, tls)
        assert [call(renewed, port).tls_resumed for port in ports.values()] == [False] * 4
        for port in ports.values():
            with pytest.raises(errors.PeerIdentityError):
                call(renewed, port, "spiffe://td/other")
        wire = call(renewed, ports["tickets"])
        assert (wire.tls_resumed, wire.peer, wire.peer_not_after) == (True, SERVER, not_after_of(server))


# ------------------------------------------------------------------ OpenSSL as the client


def openssl_client(root: Authority, own: Issued | None, folder: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.load_verify_locations(cadata=root.pem.decode())
    if own is not None:
        own.load_into(context, folder)
    return context


def serve(tls: core.TlsServer, plug: socket.socket) -> tuple[core.TlsConnection, errors.MeshError | None]:
    """Echo what comes, until the other side says farewell or is refused."""
    wire = core.TlsConnection(tls)
    with contextlib.suppress(OSError):
        while data := plug.recv(65536):
            try:
                plain, out, is_eof = wire.receive(data)
            except errors.MeshError as error:
                plug.sendall(wire.pending())
                plug.shutdown(socket.SHUT_WR)
                return wire, error
            plug.sendall(out)
            if plain:
                plug.sendall(wire.send(plain))
            if is_eof:
                plug.sendall(wire.close())
                break
    return wire, None


def send(peer: ssl.SSLSocket, say: bytes) -> None:
    # Who is refused can't say it any more.
    with contextlib.suppress(OSError):
        peer.sendall(say)


def talk(
    tls: core.TlsServer, context: ssl.SSLContext, *, session: ssl.SSLSession | None = None, say: bytes = b"hello"
) -> tuple[core.TlsConnection, errors.MeshError | None, bytes, ssl.SSLSession | None]:
    """Our server's side, the error that ended it, what OpenSSL heard, and its session."""
    ours, theirs = socket.socketpair()
    found: list[tuple[core.TlsConnection, errors.MeshError | None]] = []
    thread = threading.Thread(target=lambda: found.append(serve(tls, ours)))
    thread.start()
    heard, won = b"", None
    with ours:
        with contextlib.suppress(OSError), context.wrap_socket(theirs, server_hostname="LocalHost", session=session) as peer:
            sender = threading.Thread(target=send, args=(peer, say))
            sender.start()
            try:
                while len(heard) < len(say) and (piece := peer.recv(65536)):
                    heard += piece
                won = peer.session
                peer.unwrap()
            finally:
                sender.join()
        theirs.close()
        thread.join()
    return (*found[0], heard, won)


@pytest.mark.parametrize("version", VERSIONS)
def test_openssl_clients_are_known_by_their_spiffe_id(
    root: Authority, client: Issued, server: Issued, tmp_path: Path, version: ssl.TLSVersion
) -> None:
    """And what the application may want to know of the connection is there."""
    tls = core.TlsServer(server.chain, server.key, {"td": root.pem}, 3, True, [b"h2", b"http/1.1"])
    context = openssl_client(root, client, tmp_path)
    context.minimum_version = context.maximum_version = version
    context.set_alpn_protocols(["http/1.1"])
    wire, error, heard, _ = talk(tls, context)
    assert (error, heard, wire.peer, wire.is_handshaking) == (None, b"hello", CLIENT, False)
    assert (wire.tls_version, wire.alpn, wire.server_name) == (NAMES[version], b"http/1.1", "localhost")
    assert (wire.tls_cipher or "").startswith("TLS_")
    assert wire.peer_chain[0] == ssl.PEM_cert_to_DER_cert(client.chain.decode())
    assert wire.peer_not_after == x509.load_pem_x509_certificate(client.chain).not_valid_after_utc.timestamp()
    assert (tls.generation, ended(tls)) == (3, (1, 0, 0))


def test_wrong_clients_are_refused_before_a_byte_is_read(root: Authority, server: Issued, tmp_path: Path) -> None:
    """Whether certificates are required or not: one that is shown must be right."""
    for is_required in (True, False):
        tls = core.TlsServer(server.chain, server.key, {"td": root.pem}, 1, is_required)
        for name, (own, reason) in wrong(root).items():
            wire, error, heard, _ = talk(tls, openssl_client(root, own, tmp_path))
            assert isinstance(error, errors.PeerIdentityError), name
            assert reason in str(error)
            assert (name, wire.peer, heard) == (name, None, b"")
            with pytest.raises(errors.TlsError, match="is over"):
                wire.receive(b"more")
        assert ended(tls) == (0, 0, len(wrong(root)))


def test_anonymous_clients_come_in_only_where_none_is_required(root: Authority, server: Issued, tmp_path: Path) -> None:
    """Mode permissive admits them, and sees that they are nobody."""
    context = openssl_client(root, None, tmp_path)
    required = core.TlsServer(server.chain, server.key, {"td": root.pem}, 1, True)
    _, error, heard, _ = talk(required, context)
    assert (type(error), str(error).split(".")[0], heard) == (errors.PeerIdentityError, "The peer showed no certificate", b"")
    optional = core.TlsServer(server.chain, server.key, {"td": root.pem}, 1, False)
    wire, error, heard, _ = talk(optional, context)
    assert (error, heard, wire.peer, wire.peer_chain, wire.peer_not_after) == (None, b"hello", None, [], 0.0)


@pytest.mark.parametrize("version", VERSIONS)
def test_openssl_clients_resume_within_a_generation_only(
    root: Authority, client: Issued, server: Issued, tmp_path: Path, version: ssl.TLSVersion
) -> None:
    """And are known all the same, although they show no certificate again."""
    tls = core.TlsServer(server.chain, server.key, {"td": root.pem}, 1, True)
    context = openssl_client(root, client, tmp_path)
    context.minimum_version = context.maximum_version = version
    _, _, _, session = talk(tls, context)
    wire, error, heard, session = talk(tls, context, session=session)
    assert (error, heard, wire.tls_resumed, wire.peer) == (None, b"hello", True, CLIENT)
    assert ended(tls) == (1, 1, 0)

    renewed = core.TlsServer(server.chain, server.key, {"td": root.pem}, 2, True)
    wire, error, heard, _ = talk(renewed, context, session=session)
    assert (error, heard, wire.tls_resumed, wire.peer) == (None, b"hello", False, CLIENT)


def test_large_messages_pass_both_ways(root: Authority, client: Issued, server: Issued, tmp_path: Path) -> None:
    """Through many records, cut wherever the socket cuts them."""
    tls = core.TlsServer(server.chain, server.key, {"td": root.pem}, 1, True)
    say = bytes(range(256)) * 8000
    _, error, heard, _ = talk(tls, openssl_client(root, client, tmp_path), say=say)
    assert (error, heard == say) == (None, True)


# ------------------------------------------------------------------ what can't be loaded


def test_identities_that_can_not_be_used_are_refused_when_loaded(root: Authority, client: Issued, server: Issued) -> None:
    """Not at the first call; and no text shows a key."""
    bundles = {"td": root.pem}
    for chain, key, trusted, kind in [
        (client.chain, server.key, bundles, errors.IdentityError),
        (client.chain, b"-----BEGIN PRIVATE KEY-----\nc2VjcmV0\n-----END PRIVATE KEY-----\n", bundles, errors.IdentityError),
        (b"", client.key, bundles, errors.IdentityError),
        (root.pem, client.key, bundles, errors.IdentityError),
        (client.chain, client.key, {"td": client.chain}, errors.IdentityError),
        (client.chain, client.key, {"td": b""}, errors.IdentityError),
        (client.chain, client.key, {"other": root.pem}, errors.TrustDomainError),
    ]:
        for load in (
            lambda c=chain, k=key, t=trusted: core.TlsClient(c, k, t, 1),
            lambda c=chain, k=key, t=trusted: core.TlsServer(c, k, t, 1, True),
        ):
            with pytest.raises(kind) as caught:
                load()
            assert caught.value.hint
            assert "c2VjcmV0" not in str(caught.value)
            assert "secret" not in repr(caught.value)
    with pytest.raises(ValueError, match="belong together"):
        core.TlsClient(client.chain, None, bundles, 1)


def test_spiffe_ids_are_parsed_strictly() -> None:
    """The one parser, as Python has it."""
    assert core.parse_spiffe_id("spiffe://td/ns/default/sa/orders") == ("td", "/ns/default/sa/orders")
    for text in ("", "https://td/a", "spiffe://TD/a", "spiffe://td/a/", "spiffe://td/../a", "spiffe://td/a\n"):
        with pytest.raises(ValueError, match="is no SPIFFE ID"):
            core.parse_spiffe_id(text)


# ------------------------------------------------------------------ a chain that is judged again


def der(*pems: bytes) -> list[bytes]:
    found = [each for pem in pems for each in x509.load_pem_x509_certificates(pem)]
    return [each.public_bytes(serialization.Encoding.DER) for each in found]


def test_a_server_judges_a_chain_without_a_handshake(root: Authority, client: Issued, server: Issued) -> None:
    """As it would in one, at this moment; a connection says which server it is of."""
    mine = core.TlsServer(server.chain, server.key, {"td": root.pem}, 7, True)
    lenient = core.TlsServer(server.chain, server.key, {"td": root.pem}, 7, False)
    assert mine.accepts(der(client.chain))
    assert mine.accepts(der(client.chain))  # remembered
    assert [mine.accepts(der(issued.chain)) for issued, _ in wrong(root).values()] == [False] * len(wrong(root))
    assert (mine.accepts([]), lenient.accepts([]), mine.accepts([b"no certificate"])) == (False, True, False)
    assert core.TlsConnection(mine).server is mine
    assert core.TlsConnection(mine).generation == 7


INTERMEDIATES: dict[str, tuple[bool | None, str | None, bool]] = {
    "correct": (True, "spiffe://td", True),
    "without a name": (True, None, True),
    "without key usage": (None, "spiffe://td", False),
    "without keyCertSign": (False, "spiffe://td", False),
    "of another trust domain": (True, "spiffe://elsewhere", False),
    "with the name of a workload": (True, "spiffe://td/client", False),
    "with a name that is no SPIFFE ID": (True, "https://td", False),
}


@pytest.mark.parametrize("case", INTERMEDIATES)
def test_intermediates_sign_for_their_trust_domain_only(root: Authority, server: Issued, case: str) -> None:
    """X509-SVID: keyCertSign is set, and a SPIFFE ID of a signer is the trust domain itself."""
    signs, uri, is_accepted = INTERMEDIATES[case]
    below = Authority()
    below.name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "intermediate")])
    builder = root.builder(below.name, below.key, -60, 3600).add_extension(x509.BasicConstraints(True, None), True)
    if signs is not None:
        usage = x509.KeyUsage(not signs, False, False, False, False, signs, False, False, False)
        builder = builder.add_extension(usage, True)
    if uri is not None:
        builder = builder.add_extension(x509.SubjectAlternativeName([x509.UniformResourceIdentifier(uri)]), False)
    intermediate = builder.sign(root.key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
    tls = core.TlsServer(server.chain, server.key, {"td": root.pem}, 1, True)
    assert tls.accepts(der(below.issue(CLIENT).chain, intermediate)) is is_accepted


@pytest.mark.parametrize("signs_for", ["clients", "servers"])
def test_who_signs_for_one_side_only_does_not_sign_for_the_other(
    root: Authority, client: Issued, server: Issued, tmp_path: Path, signs_for: str
) -> None:
    """The purposes of an intermediate hold for what it signs, whatever the leaf says of itself."""
    below = Authority()
    below.name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "intermediate")])
    purpose = {"clients": ExtendedKeyUsageOID.CLIENT_AUTH, "servers": ExtendedKeyUsageOID.SERVER_AUTH}[signs_for]
    usage = x509.KeyUsage(False, False, False, False, False, True, False, False, False)
    intermediate = (
        root.builder(below.name, below.key, -60, 3600)
        .add_extension(x509.BasicConstraints(True, None), True)
        .add_extension(usage, True)
        .add_extension(x509.ExtendedKeyUsage([purpose]), False)
        .sign(root.key, hashes.SHA256())
        .public_bytes(serialization.Encoding.PEM)
    )
    tls = core.TlsServer(server.chain, server.key, {"td": root.pem}, 1, True)
    assert tls.accepts(der(below.issue(CLIENT).chain, intermediate)) is (signs_for == "clients")
    leaf = below.issue(SERVER)
    asking = core.TlsClient(client.chain, client.key, {"td": root.pem}, 1)
    with openssl_server(root, Issued(leaf.chain + intermediate, leaf.key), tmp_path) as peer:
        if signs_for == "servers":
            assert call(asking, peer.port).peer == SERVER
        else:
            with pytest.raises(errors.PeerIdentityError):
                call(asking, peer.port)


def test_an_expired_root_vouches_for_nobody(root: Authority, server: Issued) -> None:
    """Although it stands in the bundle; the others there still do."""
    old = Authority()
    old.name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "old root")])
    expired = old.builder(old.name, old.key, -7200, -3600).add_extension(x509.BasicConstraints(True, None), True)
    pem = expired.sign(old.key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
    tls = core.TlsServer(server.chain, server.key, {"td": pem + root.pem}, 1, True)
    assert (tls.accepts(der(old.issue(CLIENT).chain)), tls.accepts(der(root.issue(CLIENT).chain))) == (False, True)
