"""What do the tests of TLS share? Certificates right and wrong, and OpenSSL (Python's `ssl`) on the other side of a real socket."""

from __future__ import annotations

import contextlib
import datetime
import socket
import ssl
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from meshlib import errors
from meshlib._native import core

CLIENT = "spiffe://td/client"
SERVER = "spiffe://td/server"
HOST = (b"host", b"orders")
USAGES = (
    "digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement",
    "key_cert_sign", "crl_sign", "encipher_only", "decipher_only",
)  # fmt: skip
BOTH_ENDS = (ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH)


def moment(seconds: float) -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=seconds)


def usage(*names: str) -> x509.KeyUsage:
    return x509.KeyUsage(**{name: name in names for name in USAGES})


def name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)] if text else [])


def san_uri(text: str) -> tuple[x509.ExtensionType, bool]:
    """The name of a signing certificate."""
    return x509.SubjectAlternativeName([x509.UniformResourceIdentifier(text)]), False


def key_pem(key: Any) -> bytes:
    made: bytes = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return made


@dataclass(frozen=True)
class Issued:
    chain: bytes
    key: bytes

    @property
    def der(self) -> list[bytes]:
        return [c.public_bytes(serialization.Encoding.DER) for c in x509.load_pem_x509_certificates(self.chain)]

    @property
    def serial(self) -> int:
        return x509.load_pem_x509_certificate(self.chain).serial_number

    def load_into(self, context: ssl.SSLContext, folder: Path) -> None:
        file = folder / f"{id(self)}.pem"
        file.write_bytes(self.chain + self.key)
        context.load_cert_chain(file)


def not_after_of(issued: Issued) -> float:
    return x509.load_pem_x509_certificate(issued.chain).not_valid_after_utc.timestamp()


class Authority:
    """Issues what it is told to, right or wrong. Below a `parent` it is an intermediate."""

    def __init__(
        self,
        subject: str = "test root",
        *,
        parent: Authority | None = None,
        path_length: int | None = None,
        extensions: Sequence[tuple[x509.ExtensionType, bool]] = (),
        without: Sequence[type[x509.ExtensionType]] = (),
        key: Any = None,
        begin: float = -60,
        end: float = 7200,
    ) -> None:
        self.key = key or ec.generate_private_key(ec.SECP256R1())
        self.name = name(subject)
        self.path: list[x509.Certificate] = []  # from here to below the root
        signer = parent or self
        self.certificate = signed(
            self.name, self.key, signer,
            [
                (x509.BasicConstraints(True, path_length), True),
                (usage("key_cert_sign", "crl_sign"), True),
                (x509.SubjectKeyIdentifier.from_public_key(self.key.public_key()), False),
            ],
            extensions, without, begin, end,
        )  # fmt: skip
        self.pem = pem(self.certificate)
        if parent is not None:
            self.path = [self.certificate, *parent.path]

    def issue(
        self,
        *uris: str,
        begin: float = -60,
        end: float = 3600,
        subject: str = "",
        names: Sequence[x509.GeneralName] = (x509.DNSName("localhost"),),
        extensions: Sequence[tuple[x509.ExtensionType, bool]] = (),
        without: Sequence[type[x509.ExtensionType]] = (),
        key: Any = None,
        hash: Any = None,
    ) -> Issued:
        """An SVID for a URI, with extensions exchanged, added or left out."""
        key = key or ec.generate_private_key(ec.SECP256R1())
        standard: list[tuple[x509.ExtensionType, bool]] = [
            (x509.SubjectAlternativeName([*(x509.UniformResourceIdentifier(uri) for uri in uris), *names]), not subject),
            (x509.BasicConstraints(False, None), True),
            (usage("digital_signature"), True),
            (x509.ExtendedKeyUsage(BOTH_ENDS), False),
            (x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key()), False),
        ]
        if not uris and not names:
            standard = standard[1:]
        leaf = signed(name(subject), key, self, standard, extensions, without, begin, end, hash)
        return Issued(pem(leaf, *self.path), key_pem(key))

    def crl(self, *revoked: int, end: float = 86400) -> bytes:
        """Its list of revoked certificates, by their serial numbers, as PEM."""
        builder = (
            x509.CertificateRevocationListBuilder(self.name, moment(-60), moment(end))
            .add_extension(x509.CRLNumber(1), False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key()), False)
        )
        for serial in revoked:
            entry = x509.RevokedCertificateBuilder(serial, moment(-30)).build()
            builder = builder.add_revoked_certificate(entry)
        return builder.sign(self.key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def signed(
    subject: x509.Name,
    key: Any,
    signer: Authority,
    standard: Sequence[tuple[x509.ExtensionType, bool]],
    extensions: Sequence[tuple[x509.ExtensionType, bool]],
    without: Sequence[type[x509.ExtensionType]],
    begin: float,
    end: float,
    hash: Any = None,
) -> x509.Certificate:
    """A certificate of `standard`, where what `extensions` has of the same kind takes the place."""
    exchanged = {extension.oid for extension, _ in extensions} | {kind.oid for kind in without}
    builder = x509.CertificateBuilder(
        issuer_name=signer.name,
        subject_name=subject,
        public_key=key.public_key(),
        serial_number=x509.random_serial_number(),
        not_valid_before=moment(begin),
        not_valid_after=moment(end),
    )
    for extension, is_critical in (*(pair for pair in standard if pair[0].oid not in exchanged), *extensions):
        builder = builder.add_extension(extension, is_critical)
    is_edwards = not isinstance(signer.key, ec.EllipticCurvePrivateKey) and not hasattr(signer.key, "key_size")
    return builder.sign(signer.key, None if is_edwards else hash or hashes.SHA256())


def pem(*certificates: x509.Certificate) -> bytes:
    return b"".join(certificate.public_bytes(serialization.Encoding.PEM) for certificate in certificates)


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


# Bytes that fit into the buffers between two sockets, so that neither side waits for the other to read.
TURN = 32 * 1024


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
            # In turns, and in one thread: OpenSSL's connections can't be read and written at the same time.
            for at in range(0, len(say), TURN):
                turn = say[at : at + TURN]
                send(peer, turn)
                while len(heard) < at + len(turn) and (piece := peer.recv(65536)):
                    heard += piece
            won = peer.session
            peer.unwrap()
        theirs.close()
        thread.join()
    return (*found[0], heard, won)
