"""Who is believed to be whom? spiffe_id, spiffe_match, x509_svid.

Certificates are shown in real handshakes: Python's `ssl` on one side, our TLS on the other, over memory. Where the case is about names in
a certificate of the Web, the server listens on loopback and the caller is the mesh's own client on its way out.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import ssl
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import httpx
from cryptography import x509

from meshlib._native import core
from meshlib.errors import ConfigError, MeshError
from tests.secure.cases import ground, pki
from tests.secure.cases.case import Answer, Case, not_understood
from tests.secure.cases.ground import ANYONE, Request

BUNDLES = {"td": ["rootA"], "td2": ["rootB"]}


# ------------------------------------------------------------------------------------------------ spiffe_id, spiffe_match


def spiffe_id(case: Case) -> Answer:
    """A text that may be a SPIFFE ID, to our own parser; and the one in a certificate is read by the same."""
    text = case.input if isinstance(case.input, str) else case.given.get("id", case.given.get("uri"))
    if not isinstance(text, str):
        raise not_understood(case)
    try:
        core.parse_spiffe_id(grown(text))
    except (MeshError, ValueError):
        return "invalid"
    return "valid"


def grown(text: str) -> str:
    """`spiffe://td/aaaa...[2048 bytes total]`, written out."""
    found = re.fullmatch(r"(.*?)(.)\.\.\.\[(\d+) bytes(?: total)?\](.*)", text, re.DOTALL)
    if found is None:
        return text
    start, letter, size, end = found[1] + found[2], found[2], int(found[3]), found[4]
    return start + letter * (size - len(start) - len(end)) + end


def spiffe_match(case: Case) -> Answer:
    """A caller and a rule on callers."""
    policy = case.policy
    known = {"allow_principals", "deny_principals", "allow_not_principals", "deny_not_principals", "trust_domains", "namespaces"}
    if not isinstance(case.given.get("peer"), str) or not policy.keys() <= known:
        raise not_understood(case)
    own: dict[str, list[dict[str, Any]]] = {}
    for name, clause in (("principals", "from"), ("not_principals", "not_from")):
        for action in ("allow", "deny"):
            listed = policy.get(f"{action}_{name}")
            if listed is not None:
                rule: dict[str, Any] = {"from": ["*"], clause: listed}
                if "trust_domains" in policy:
                    rule["trust_domains"] = policy["trust_domains"]
                own.setdefault(action, []).append(rule)
    own.setdefault("allow", [dict(ANYONE)])
    try:
        mesh = ground.mesh_of(ground.document(own=own))
    except ConfigError:
        return "config_error"
    peer = case.given["peer"]
    if "tcp" in str(case.given.get("proto", "")):
        # What is behind a plain TCP port is judged by the caller alone, and so is this call: no path, no header, nothing else.
        return ground.verdict(ground.ask(mesh, Request("/", method="POST", peer=peer)))
    return ground.verdict(ground.ask(mesh, Request(peer=peer)))


# ------------------------------------------------------------------------------------------------ x509_svid


def x509_svid(case: Case) -> Answer:
    """A certificate, shown to us by a client or a server."""
    given = case.given
    bundles = case.policy.get("bundles", BUNDLES)
    if not {"uri", "dns", "ip", "cn", "other_name", "email"} & given.keys() or not case.policy.keys() <= {
        "bundles",
        "crl",
        "revoked",
    }:
        raise not_understood(case)
    if given.get("mode") == "webpki":
        return asyncio.run(_of_the_web(given))
    try:
        shown, roots, lists = _made(given, bundles)
    except ValueError as error:
        raise not_understood(case) from error
    if given.get("peer") == "server":
        return _shown_by_a_server(shown, roots, lists, given.get("expected", ""))
    return shown_by_a_client(shown, roots, lists)


def _made(given: dict[str, Any], bundles: dict[str, list[str]]) -> tuple[pki.Leaf, dict[str, bytes], dict[str, bytes]]:
    """The chain of a case, the bundles by which it is judged, and the lists of what was revoked."""
    kind = "rsa2048" if any(weak in str(given.get("sig", "")).lower() for weak in ("rsa", "sha1", "md5", "md2")) else "p256"
    constraint = str(given.get("ca_name_constraint_uri", ""))
    name = str(given.get("issuer", "rootA"))
    roots = {
        domain: b"".join(pki.authority(root, kind, constraint if root == name else "").pem for root in listed)
        for domain, listed in bundles.items()
    }
    issuer: pki.Authority | None = None
    if "self" not in name:
        issuer = pki.authority(name, kind, constraint)
        if "leaf" in name:
            issuer = pki.intermediate(pki.authority("rootA", kind), "leaf")
    if issuer is not None:
        for remark in _intermediates(given):
            issuer = pki.intermediate(issuer, remark)
    shown = pki.leaf(given, issuer, issuer.above if issuer else ())
    lists: dict[str, bytes] = {}
    if given.get("revoked") or given.get("crl") or "revoked" in str(given.get("status", "")):
        root = pki.authority(name, kind, constraint)
        serial = x509.load_der_x509_certificate(shown.chain[0]).serial_number
        lists = {domain: pki.revoked_by(root, serial) for domain, listed in bundles.items() if name in listed}
    return shown, roots, lists


def _intermediates(given: dict[str, Any]) -> list[str]:
    """Those between root and leaf, the highest first. A CA that may have few below it is put on top, where that can be broken."""
    if "chain_len" in given:
        return ["intermediate"] * (int(given["chain_len"]) - 1)
    between = [
        str(part) for part in given.get("chain", []) if "intermediate" in str(part) or str(part).lower().startswith(("ca", "sub"))
    ]
    return sorted(between, key=lambda remark: "pathlen" not in remark.lower())


def _tls(cls: Any, own: pki.Leaf, roots: dict[str, bytes], lists: dict[str, bytes], *more: Any) -> Any:
    lists = {"crls": lists} if lists else {}
    return cls(own.pem, own.key, roots, 1, *more, **lists)


def _own(roots: dict[str, bytes]) -> pki.Leaf:
    """Us: a good certificate of the first trust domain, by a root that the other side is told to trust."""
    return pki.leaf({"uri": [f"spiffe://{next(iter(roots))}/us"], "dns": ["us"]}, pki.authority("ours"))


def _foreign(purpose: int, own: pki.Leaf) -> ssl.SSLContext:
    """OpenSSL with the case's certificate, as lenient as it can be."""
    context = ssl.SSLContext(purpose)
    context.set_ciphers("ALL:@SECLEVEL=0")
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "own.pem"
        file.write_bytes(own.pem + own.key)
        context.load_cert_chain(file)
    return context


def shown_by_a_client(shown: pki.Leaf, roots: dict[str, bytes], lists: dict[str, bytes]) -> set[str]:
    server = _tls(core.TlsServer, _own(roots), roots, lists, True)
    # First without a handshake, since OpenSSL won't show everything; then in one.
    is_taken = server.accepts(list(shown.chain))
    connection = core.TlsConnection(server)
    try:
        context = _foreign(ssl.PROTOCOL_TLS_CLIENT, shown)
    except ssl.SSLError:
        return {"accept"} if is_taken else {"reject"}
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = context.wrap_bio(incoming, outgoing, server_side=False)
    try:
        for _ in range(10):
            with contextlib.suppress(ssl.SSLWantReadError):
                client.do_handshake()
            if data := outgoing.read():
                _, out, _ = connection.receive(data)
                incoming.write(out)
            if not connection.is_handshaking and connection.peer:
                break
    except MeshError:
        return {"reject", *({"disagrees"} if is_taken else set())}
    except ssl.SSLError:
        return {"reject"}
    if connection.is_handshaking or not connection.peer:
        return {"reject"}
    return {f"accept:{connection.peer}", "accept"} if is_taken else {"disagrees"}


def _shown_by_a_server(shown: pki.Leaf, roots: dict[str, bytes], lists: dict[str, bytes], expected: str) -> set[str]:
    tls = _tls(core.TlsClient, _own(roots), roots, lists)
    wire = core.HttpConnection(tls, expected, "127.0.0.1:443")
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    server = _foreign(ssl.PROTOCOL_TLS_SERVER, shown).wrap_bio(incoming, outgoing, server_side=True)
    incoming.write(wire.open())
    try:
        for _ in range(10):
            with contextlib.suppress(ssl.SSLWantReadError):
                server.do_handshake()
            if data := outgoing.read():
                out, _ = wire.receive(data, len(data))
                incoming.write(out)
            if wire.is_open:
                break
    except (MeshError, ssl.SSLError):
        return {"reject"}
    return {f"accept:{wire.peer}", "accept"} if wire.is_open else {"reject"}


async def _of_the_web(given: dict[str, Any]) -> set[str]:
    """A server of the Web on loopback, called by the mesh's client, which knows the platform's roots and nothing else."""
    root = pki.authority("of the web")
    issuer: pki.Authority | None = root
    for remark in _intermediates(given):
        issuer = pki.intermediate(issuer, remark)  # type: ignore[arg-type]
    if "self" in str(given.get("issuer", "")):
        issuer = None
    try:
        shown = pki.leaf({"eku": ["serverAuth"], **given}, issuer, issuer.above if issuer else ())
    except ValueError:
        # A name that a certificate can't hold.
        return {"reject"}
    context = _foreign(ssl.PROTOCOL_TLS_SERVER, shown)

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0, ssl=context)
    port = server.sockets[0].getsockname()[1]
    file = ground.home() / "web.pem"
    file.write_bytes(root.pem)
    mesh = ground.mesh_of(ground.document({"mode": "observe"}))
    try:
        with mock.patch.dict(os.environ, {"SSL_CERT_FILE": str(file)}):
            async with mesh.client() as http:
                # The connection goes to loopback; the name is the one that the case calls.
                reply = await http.get(
                    f"https://127.0.0.1:{port}/", extensions={"sni_hostname": given.get("host", "a.example.com")}
                )
        return {"accept"} if reply.status_code == 200 else {str(reply.status_code)}
    except (httpx.HTTPError, MeshError, ValueError):
        return {"reject"}
    finally:
        server.close()
