"""Do our TLS and OpenSSL's agree, and is nobody believed who doesn't prove who they are?

Every test has Python's `ssl` on the other side of a real socket. What depends on time passing (ticket life, expiry under a
session) is tested in Rust, where the clock is moved by hand.
"""

from __future__ import annotations

import base64
import shutil
import ssl
import time
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID

from meshlib import errors
from meshlib._native import core
from tests.support import free_port, process, wait_until_listening
from tests.wire.peers import (
    CLIENT,
    SERVER,
    Authority,
    Issued,
    call,
    ended,
    not_after_of,
    openssl_client,
    openssl_server,
    talk,
)

VERSIONS = [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3]
NAMES = {ssl.TLSVersion.TLSv1_2: "TLSv1.2", ssl.TLSVersion.TLSv1_3: "TLSv1.3"}


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
    with pytest.raises(errors.ConnectionLost, match="during the TLS handshake"):
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


def test_a_server_judges_a_chain_without_a_handshake(root: Authority, client: Issued, server: Issued) -> None:
    """As it would in one, at this moment; a connection says which server it is of."""
    mine = core.TlsServer(server.chain, server.key, {"td": root.pem}, 7, True)
    lenient = core.TlsServer(server.chain, server.key, {"td": root.pem}, 7, False)
    assert mine.accepts(client.der)
    assert mine.accepts(client.der)  # remembered
    assert [mine.accepts(issued.der) for issued, _ in wrong(root).values()] == [False] * len(wrong(root))
    assert (mine.accepts([]), lenient.accepts([]), mine.accepts([b"no certificate"])) == (False, True, False)
    assert core.TlsConnection(mine).server is mine
    assert core.TlsConnection(mine).generation == 7


@pytest.mark.parametrize("signs_for", ["clients", "servers"])
def test_who_signs_for_one_side_only_does_not_sign_for_the_other(
    root: Authority, client: Issued, server: Issued, tmp_path: Path, signs_for: str
) -> None:
    """The purposes of an intermediate hold for what it signs, whatever the leaf says of itself."""
    purpose = {"clients": ExtendedKeyUsageOID.CLIENT_AUTH, "servers": ExtendedKeyUsageOID.SERVER_AUTH}[signs_for]
    below = Authority("intermediate", parent=root, extensions=[(x509.ExtendedKeyUsage([purpose]), False)])
    tls = core.TlsServer(server.chain, server.key, {"td": root.pem}, 1, True)
    assert tls.accepts(below.issue(CLIENT).der) is (signs_for == "clients")
    asking = core.TlsClient(client.chain, client.key, {"td": root.pem}, 1)
    with openssl_server(root, below.issue(SERVER), tmp_path) as peer:
        if signs_for == "servers":
            assert call(asking, peer.port).peer == SERVER
        else:
            with pytest.raises(errors.PeerIdentityError):
                call(asking, peer.port)


def test_an_expired_root_vouches_for_nobody(root: Authority, server: Issued) -> None:
    """Although it stands in the bundle; the others there still do."""
    old = Authority("old root", begin=-7200, end=-3600)
    tls = core.TlsServer(server.chain, server.key, {"td": old.pem + root.pem}, 1, True)
    assert (tls.accepts(old.issue(CLIENT).der), tls.accepts(root.issue(CLIENT).der)) == (False, True)


# ------------------------------------------------------------------ what a CA has taken back


def with_lists(
    root: Authority, client: Issued, server: Issued, *revoked: int, clients: core.TlsClient, servers: core.TlsServer
) -> tuple[core.TlsClient, core.TlsServer]:
    """The next generation of both, with a list."""
    crls = {"td": root.crl(*revoked)}
    return (
        core.TlsClient(client.chain, client.key, {"td": root.pem}, 2, clients, crls),
        core.TlsServer(server.chain, server.key, {"td": root.pem}, 2, True, before=servers, crls=crls),
    )


@pytest.mark.parametrize("version", VERSIONS)
def test_a_revoked_peer_is_refused_in_full_and_resumed_on_either_side(
    root: Authority, client: Issued, server: Issued, tmp_path: Path, version: ssl.TLSVersion
) -> None:
    """A list makes a new generation, which knows no tickets; what was open before is not accepted any more."""
    asking = core.TlsClient(client.chain, client.key, {"td": root.pem}, 1)
    answering = core.TlsServer(server.chain, server.key, {"td": root.pem}, 1, True)
    context = openssl_client(root, client, tmp_path)
    context.minimum_version = context.maximum_version = version
    _, _, _, session = talk(answering, context)
    wire, error, heard, session = talk(answering, context, session=session)
    assert (wire.tls_resumed, error, heard) == (True, None, b"hello")
    new_asking, new_answering = with_lists(root, client, server, client.serial, server.serial, clients=asking, servers=answering)
    for kept in (session, None):
        wire, error, heard, _ = talk(new_answering, context, session=kept)
        assert (type(error), wire.peer, heard) == (errors.PeerIdentityError, None, b"")
        assert "its certificate was revoked by its CA" in str(error)
    assert (answering.accepts(client.der), new_answering.accepts(client.der)) == (True, False)
    with openssl_server(root, server, tmp_path, version) as peer:
        assert [call(asking, peer.port).tls_resumed for _ in range(2)] == [False, True]
        for _ in range(2):
            with pytest.raises(errors.PeerIdentityError, match="revoked by its CA"):
                call(new_asking, peer.port)
    assert new_asking.stats()["tickets_held"] == 0


def test_a_revoked_intermediate_takes_its_leaves_along(root: Authority, server: Issued) -> None:
    """And a leaf is revoked by the list of the CA that signed it, not by another one's."""
    below = Authority("intermediate", parent=root)
    leaf = below.issue(CLIENT)

    def accepts(lists: bytes) -> bool:
        return core.TlsServer(server.chain, server.key, {"td": root.pem}, 1, True, crls={"td": lists}).accepts(leaf.der)

    assert accepts(root.crl()) and accepts(root.crl(leaf.serial)) and accepts(root.crl() + below.crl())
    assert not accepts(root.crl(below.certificate.serial_number))
    assert not accepts(root.crl() + below.crl(leaf.serial))


def test_lists_that_can_not_be_used_are_refused_when_loaded(root: Authority, client: Issued, server: Issued) -> None:
    """With what to do, so that the last good generation stays in use. One that is only old is used."""
    bad = {
        "not PEM": b"-----BEGIN X509 CRL-----\n!\n-----END X509 CRL-----\n",
        "holds no list": root.pem,
        "can't be read": b"-----BEGIN X509 CRL-----\nMAA=\n-----END X509 CRL-----\n",
        "not signed by the root": forged(root.crl(7)),
        # Of the same name and with another key: somebody else's, or what is left of a root that was replaced.
        "not signed by the root that it names": Authority().crl(),
    }
    for why, lists in bad.items():
        for load in (
            lambda crls: core.TlsClient(client.chain, client.key, {"td": root.pem}, 1, crls=crls),
            lambda crls: core.TlsServer(server.chain, server.key, {"td": root.pem}, 1, True, crls=crls),
        ):
            with pytest.raises(errors.IdentityError, match=why) as caught:
                load({"td": lists})
            assert "nothing counts as revoked" in str(caught.value.hint)
    with pytest.raises(errors.IdentityError, match="no bundle of it"):
        core.TlsClient(client.chain, client.key, {"td": root.pem}, 1, crls={"dt": root.crl()})
    assert core.TlsClient(client.chain, client.key, {"td": root.pem}, 1).crls_until == float("inf")
    old = core.TlsServer(server.chain, server.key, {"td": root.pem}, 1, True, crls={"td": root.crl(client.serial, end=-1)})
    assert old.crls_until < time.time()
    assert (old.accepts(client.der), old.accepts(root.issue(CLIENT).der)) == (False, True)
    # Of a root that nobody here knows: it says nothing of anybody.
    assert core.TlsClient(client.chain, client.key, {"td": root.pem}, 1, crls={"td": Authority("a stranger").crl()})


def forged(lists: bytes) -> bytes:
    """The same with another serial number in it."""
    (begin, *middle, end) = lists.strip().splitlines()
    data = bytearray(base64.b64decode(b"".join(middle)))
    at = data.index(bytes([2, 1, 7]))  # the serial number 7
    data[at + 2] = 8
    return b"\n".join([begin, base64.encodebytes(bytes(data)).strip(), end, b""])


# ------------------------------------------------------------------ what nobody may switch on from outside


def test_secrets_of_a_connection_are_written_nowhere(
    root: Authority, client: Issued, server: Issued, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SSLKEYLOGFILE is for debuggers; in a mesh it would be a way to read everything."""
    file = tmp_path / "keys.log"
    monkeypatch.setenv("SSLKEYLOGFILE", str(file))
    asking = core.TlsClient(client.chain, client.key, {"td": root.pem}, 1)
    answering = core.TlsServer(server.chain, server.key, {"td": root.pem}, 1, True)
    assert talk(answering, openssl_client(root, client, tmp_path))[2] == b"hello"
    with openssl_server(root, server, tmp_path) as peer:
        assert call(asking, peer.port).peer == SERVER
    assert not file.exists()


OLD = {ssl.TLSVersion.TLSv1: b"\x03\x01", ssl.TLSVersion.TLSv1_1: b"\x03\x02"}


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion")
@pytest.mark.parametrize("version", OLD)
def test_versions_below_1_2_are_refused_on_either_side(
    root: Authority, client: Issued, server: Issued, tmp_path: Path, version: ssl.TLSVersion
) -> None:
    """Whatever the other side would be content with."""
    context = openssl_client(root, client, tmp_path)
    context.set_ciphers("ALL:@SECLEVEL=0")
    context.minimum_version = context.maximum_version = version
    answering = core.TlsServer(server.chain, server.key, {"td": root.pem}, 1, True)
    wire, error, heard, _ = talk(answering, context)
    assert (type(error), wire.tls_version, heard) == (errors.TlsError, None, b"")
    assert "no TLS parameters in common" in str(error)
    asking = core.TlsClient(client.chain, client.key, {"td": root.pem}, 1)
    with openssl_server(root, server, tmp_path, version) as peer:
        peer.context.set_ciphers("ALL:@SECLEVEL=0")
        with pytest.raises(errors.TlsError, match=r"refused|alert|no TLS parameters"):
            call(asking, peer.port)
        assert peer.seen == b""


def test_the_life_of_a_ticket_is_capped_by_the_certificates_and_by_an_hour(
    root: Authority, client: Issued, server: Issued, tmp_path: Path
) -> None:
    """As the server says it to the client: what is said is never longer than what is meant."""

    def life(theirs: Issued, ours: Issued) -> int:
        tls = core.TlsServer(ours.chain, ours.key, {"td": root.pem}, 1, True)
        session = talk(tls, openssl_client(root, theirs, tmp_path))[3]
        assert session is not None and session.has_ticket
        return session.ticket_lifetime_hint

    long = root.issue(CLIENT, end=7000)
    assert life(long, root.issue(SERVER, end=7000)) == 3600
    for short in (life(root.issue(CLIENT, end=600), server), life(long, root.issue(SERVER, end=600))):
        assert 590 <= short <= 600


def test_it_is_visible_whose_cryptography_it_is() -> None:
    """ring where nothing else was asked for when the library was built."""
    assert core.crypto_provider in {"ring", "aws-lc-rs", "aws-lc-rs (FIPS)"}
