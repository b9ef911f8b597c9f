"""What do tests of the CA's service need? A CA, its server on a loop of its own, requests, and a client of another make."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import socket
import ssl
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from meshlib.secure import CertificateAuthority, Issued, certificates, csr, files
from meshlib.secure.authority import Reply, Request, Service
from meshlib.secure.authority_server import Server
from meshlib.secure.tokens import Token, Tokens

TRUST_DOMAIN = "shop.internal"
ORDERS = "spiffe://shop.internal/ns/default/sa/orders"


@contextlib.contextmanager
def serving(service: Service, *, out: Path | None = None, host: str = "127.0.0.1") -> Iterator[Server]:
    """The server, on a thread with a loop; it doesn't tend by itself, so that a test says when."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    server = Server(service, out=out)
    try:
        asyncio.run_coroutine_threadsafe(server.start(host, 0), loop).result(10)
        yield server
    finally:
        asyncio.run_coroutine_threadsafe(server.stop(), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.close()


def url_of(server: Server) -> str:
    return f"https://127.0.0.1:{server.address[1]}"


def token_of(authority: CertificateAuthority, service: str = "orders", **more: Any) -> Token:
    return Tokens(authority).make(service, **more)


def token_file(folder: Path, token: Token) -> Path:
    """Where a service would find it."""
    files.write(files.make_private(folder), [("token", token.text.encode() + b"\n", 0o600)])
    return folder / "token"


def request_text(spiffe_id: str = ORDERS, key: Any = None) -> str:
    return csr.new_request(key or certificates.new_key(), spiffe_id).decode()


def enroll(service: Service, token: Token, wanted: str | None = None, source: str = "192.0.2.7") -> Reply:
    body = {"token": bytes(token.proof).decode(), "csr": request_text(token.spiffe_id) if wanted is None else wanted}
    return service.answer(Request("POST", "/v1/enroll", json.dumps(body).encode(), source=source))


def renew(service: Service, chain: bytes, wanted: str | None = None, peer: str | None = ORDERS) -> Reply:
    ders = tuple(each.public_bytes(Encoding.DER) for each in x509.load_pem_x509_certificates(chain))
    body = json.dumps({"csr": wanted or request_text(peer or ORDERS)}).encode()
    return service.answer(Request("POST", "/v1/renew", body, peer=peer, chain=ders, source="192.0.2.7"))


def content_of(reply: Reply) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(reply.body)
    return found


def reason_of(reply: Reply) -> tuple[int, str]:
    return reply.status, content_of(reply)["reason"]


def events(authority: CertificateAuthority) -> list[str]:
    return [entry["event"] for entry in authority.issued()]


class Foreign:
    """A client that isn't ours: Python's http.client over OpenSSL, which verifies the chain by the bundle."""

    def __init__(self, server: Server, bundle: bytes, own: Issued | None = None) -> None:
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        self.context.check_hostname = False
        self.context.load_verify_locations(cadata=bundle.decode())
        self.port = server.address[1]
        if own is not None:
            with tempfile.NamedTemporaryFile() as file:
                file.write(own.chain + own.key)
                file.flush()
                self.context.load_cert_chain(file.name)

    def ask(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, bytes, list[str]]:
        """Status, body, and the URI names in the server's certificate."""
        connection = http.client.HTTPSConnection("127.0.0.1", self.port, timeout=10, context=self.context)
        try:
            connection.connect()
            leaf = x509.load_der_x509_certificate(connection.sock.getpeercert(True))  # type: ignore[union-attr, arg-type]
            text = None if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
            connection.request(method, path, text, headers)
            answer = connection.getresponse()
            return answer.status, answer.read(), certificates.uris_of(leaf)
        finally:
            connection.close()

    def raw(self, *pieces: bytes) -> bytes:
        """What comes back for bytes, until the connection ends. Before another piece is sent, something must have come."""
        with socket.create_connection(("127.0.0.1", self.port), 10) as plug, self.context.wrap_socket(plug) as secured:
            got = b""
            with contextlib.suppress(ssl.SSLError, ConnectionError):
                for number, data in enumerate(pieces):
                    got += secured.recv(65536) if number else b""
                    secured.sendall(data)
                while piece := secured.recv(65536):
                    got += piece
            return got
