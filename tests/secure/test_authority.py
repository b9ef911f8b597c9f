"""Does the CA's service give an identity to whom it belongs, refuse everybody else, and stand up to what a network sends?"""

from __future__ import annotations

import base64
import json
import re
import shutil
import socket
import subprocess
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jwt
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from meshlib._native import core
from meshlib.config import load
from meshlib.errors import IdentityError, Refused
from meshlib.secure import CertificateAuthority, Issued, authority_server, bundle, certificates, jwt_svid, ledger
from meshlib.secure.authority import Reply, Request, Service, network_of
from meshlib.secure.authority_server import Server
from meshlib.secure.ca import DAY
from tests.secure.ca_world import (
    ORDERS,
    Foreign,
    content_of,
    enroll,
    events,
    reason_of,
    renew,
    request_text,
    serving,
    token_of,
)
from tests.secure.test_ca import NOW, Clock, is_accepted, roots_of


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def authority(tmp_path: Path, clock: Clock) -> CertificateAuthority:
    return CertificateAuthority.create(tmp_path / "ca", "shop.internal", clock=clock)


@pytest.fixture
def seconds() -> Clock:
    """The clock of the flood."""
    return Clock(0.0)


@pytest.fixture
def service(authority: CertificateAuthority, seconds: Clock) -> Service:
    return Service(authority, clock=seconds)


def handed(reply: Reply) -> Issued:
    """What a reply hands out, as if it had been issued by hand."""
    content = content_of(reply)
    assert reply.status == 200, content
    chain = content["chain"].encode()
    leaf = x509.load_pem_x509_certificate(chain)
    return Issued(
        "orders",
        content["spiffe_id"],
        certificates.serial_of(leaf),
        leaf.not_valid_before_utc.timestamp(),
        leaf.not_valid_after_utc.timestamp(),
        chain,
        content["bundle"].encode(),
        b"",
    )


# ---------------------------------------------------------------------------------------------------- enrolment


def test_token_buys_a_certificate_for_the_key_of_the_request(service: Service, authority: CertificateAuthority) -> None:
    """24 hours, the token's ID and DNS name, chain and bundle as issued by hand; the log says who asked and with what."""
    key = certificates.new_key()
    token = token_of(authority)
    issued = handed(enroll(service, token, request_text(ORDERS, key)))
    leaf = x509.load_pem_x509_certificate(issued.chain)
    assert leaf.public_key() == key.public_key()
    assert (issued.spiffe_id, certificates.dns_names_of(leaf)) == (ORDERS, ["orders.default.shop.internal"])
    assert issued.not_after == NOW + DAY
    assert is_accepted(issued, authority.bundle)
    assert issued.bundle == authority.bundle
    entry = authority.issued()[-1]
    assert (entry["event"], entry["by"], entry["source"]) == ("issue", "token", "192.0.2.7")
    assert bytes(token.proof).decode().startswith(entry["token"])
    assert events(authority) == ["create", "token.made", "token.used", "issue"]


def test_second_use_of_a_token_is_refused_and_logged(service: Service, authority: CertificateAuthority) -> None:
    """With what happened, to whom holds it; with from where, in the log."""
    token = token_of(authority)
    handed(enroll(service, token))
    assert reason_of(enroll(service, token, source="198.51.100.9")) == (403, "token.used")
    entry = authority.issued()[-1]
    assert (entry["event"], entry["reason"], entry["source"]) == ("token.refused", "token.used", "198.51.100.9")


def test_expired_token_is_refused(service: Service, authority: CertificateAuthority, clock: Clock) -> None:
    """And the log says so."""
    token = token_of(authority)
    clock.now += 900
    assert reason_of(enroll(service, token)) == (403, "token.expired")
    assert events(authority)[-1] == "token.refused"


def _odd_keys() -> dict[str, Any]:
    return {
        "P-521": ec.generate_private_key(ec.SECP521R1()),
        "secp256k1": ec.generate_private_key(ec.SECP256K1()),
        "RSA 1024": rsa.generate_private_key(65537, 1024),
        "Ed25519": ed25519.Ed25519PrivateKey.generate(),
    }


def _signed(key: Any, *uris: str) -> str:
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    if uris:
        names = x509.SubjectAlternativeName([x509.UniformResourceIdentifier(uri) for uri in uris])
        builder = builder.add_extension(names, critical=True)
    digest = None if isinstance(key, ed25519.Ed25519PrivateKey) else hashes.SHA256()
    return builder.sign(key, digest).public_bytes(serialization.Encoding.PEM).decode()


def _with_a_broken_signature() -> str:
    key = certificates.new_key()
    text = _signed(key, ORDERS)
    der = bytearray(base64.b64decode("".join(text.splitlines()[1:-1])))
    at = bytes(der).index(
        key.public_key().public_bytes(serialization.Encoding.X962, serialization.PublicFormat.UncompressedPoint)
    )
    point = certificates.new_key().public_key()
    der[at : at + 65] = point.public_bytes(serialization.Encoding.X962, serialization.PublicFormat.UncompressedPoint)
    body = base64.encodebytes(bytes(der)).decode()
    return f"-----BEGIN CERTIFICATE REQUEST-----\n{body}-----END CERTIFICATE REQUEST-----\n"


@pytest.mark.parametrize(
    ("wanted", "reason"),
    [
        (lambda: "", "csr.malformed"),
        (lambda: "-----BEGIN CERTIFICATE REQUEST-----\nAAAA\n-----END CERTIFICATE REQUEST-----\n", "csr.malformed"),
        (lambda: request_text() * 2, "csr.malformed"),
        (lambda: request_text() + "x" * 20_000, "csr.malformed"),
        (lambda: request_text().replace("CERTIFICATE REQUEST", "CERTIFICATE"), "csr.malformed"),
        (_with_a_broken_signature, "csr.signature"),
        (lambda: _signed(certificates.new_key(), "spiffe://shop.internal/ns/default/sa/web"), "csr.identity"),
        (lambda: _signed(certificates.new_key(), ORDERS, "spiffe://shop.internal/ns/default/sa/web"), "csr.identity"),
        *((lambda name=name: _signed(_odd_keys()[name]), "csr.key") for name in ("P-521", "secp256k1", "RSA 1024", "Ed25519")),
    ],
)
def test_request_that_can_not_be_signed_costs_no_token(
    service: Service, authority: CertificateAuthority, wanted: Any, reason: str
) -> None:
    """It is refused with the reason, and the token is as good as before."""
    token = token_of(authority)
    assert reason_of(enroll(service, token, wanted())) == (400, reason)
    handed(enroll(service, token))


def test_keys_that_peers_can_verify_are_certified(service: Service, authority: CertificateAuthority) -> None:
    """EC P-256 and P-384, RSA from 2048 bits; without a name in the request, too."""
    for key in (certificates.new_key(), ec.generate_private_key(ec.SECP384R1()), rsa.generate_private_key(65537, 2048)):
        issued = handed(enroll(service, token_of(authority), _signed(key)))
        leaf = x509.load_pem_x509_certificate(issued.chain)
        assert (leaf.public_key(), issued.spiffe_id) == (key.public_key(), ORDERS)


def test_large_key_is_refused_before_its_signature_is_looked_at(service: Service, authority: CertificateAuthority) -> None:
    """RSA of 8192 bits: nobody needs it, and verifying costs."""
    from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicNumbers

    text = _signed(rsa.generate_private_key(65537, 2048))
    parsed = x509.load_pem_x509_csr(text.encode())
    old = parsed.public_key().public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    big = RSAPublicNumbers(65537, (1 << 8191) + 1).public_key()
    new = big.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    der = parsed.public_bytes(serialization.Encoding.DER)
    inner = parsed.tbs_certrequest_bytes.replace(old, new)
    inner = b"\x30\x82" + (len(inner) - 4).to_bytes(2, "big") + inner[4:]
    rest = der[der.index(parsed.tbs_certrequest_bytes) + len(parsed.tbs_certrequest_bytes) :]
    outer = b"\x30\x82" + (len(inner) + len(rest)).to_bytes(2, "big") + inner + rest
    body = base64.encodebytes(outer).decode()
    made = f"-----BEGIN CERTIFICATE REQUEST-----\n{body}-----END CERTIFICATE REQUEST-----\n"
    assert reason_of(enroll(service, token_of(authority), made)) == (400, "csr.key")


@pytest.mark.parametrize(
    "body",
    [
        b"", b"[]", b"{}", b"null", b'"x"', b"\xff", b"[" * 50_000,
        b'{"token":"x"}', b'{"csr":"x"}', b'{"token":1,"csr":"x"}', b'{"token":"x","csr":null}',
        b'{"token":"x","csr":"x","id":"x"}', b'{"token":"x","token":"y","csr":"x"}',
    ],
)  # fmt: skip
def test_bodies_of_another_shape_are_refused(service: Service, body: bytes) -> None:
    """Unknown members and members that stand twice, too."""
    assert reason_of(service.answer(Request("POST", "/v1/enroll", body))) == (400, "http.body")


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/", 404), ("GET", "/v2/bundle", 404), ("GET", "/v1/bundle/", 404), ("GET", "/v1/bundle?x", 404),
        ("GET", "/v1/../v1/bundle", 404), ("GET", "//v1/bundle", 404), ("GET", "/v1/%62undle", 404), ("GET", "/v1/root.key", 404),
        ("POST", "/v1/bundle", 405), ("GET", "/v1/enroll", 405), ("PUT", "/v1/renew", 405), ("get", "/v1/bundle", 405),
    ],
)  # fmt: skip
def test_only_what_is_there_is_answered(service: Service, method: str, path: str, status: int) -> None:
    """A path is compared as it is; there is nothing to normalise."""
    assert service.answer(Request(method, path)).status == status


# ---------------------------------------------------------------------------------------------------- renewal


def test_renewal_gives_the_same_name_to_another_key(service: Service, authority: CertificateAuthority, clock: Clock) -> None:
    """For 24 hours from now; the log binds it to the one before."""
    old = authority.issue("orders", ttl=DAY)
    clock.now += DAY / 2
    key = certificates.new_key()
    new = handed(renew(service, old.chain, request_text(ORDERS, key)))
    leaf = x509.load_pem_x509_certificate(new.chain)
    assert (new.spiffe_id, leaf.public_key(), new.not_after) == (ORDERS, key.public_key(), clock.now + DAY)
    assert certificates.dns_names_of(leaf) == ["orders.default.shop.internal"]
    entry = authority.issued()[-1]
    assert (entry["event"], entry["by"], entry["before"]) == ("renewal", "renewal", old.serial)


def test_certificate_that_was_replaced_can_still_be_renewed(service: Service, authority: CertificateAuthority) -> None:
    """The answer to a renewal may have been lost on its way."""
    old = authority.issue("orders")
    handed(renew(service, old.chain))
    assert renew(service, old.chain).status == 200


def test_renewal_for_another_name_is_refused(service: Service, authority: CertificateAuthority) -> None:
    """Whatever the request asks for, and whatever the handshake is said to have proved."""
    old = authority.issue("orders")
    web = "spiffe://shop.internal/ns/default/sa/web"
    assert reason_of(renew(service, old.chain, request_text(web))) == (400, "csr.identity")
    assert reason_of(renew(service, old.chain, peer=web)) == (403, "renew.unknown")


def test_renewal_without_a_certificate_is_refused(service: Service) -> None:
    """A token is the way in."""
    body = json.dumps({"csr": request_text()}).encode()
    assert reason_of(service.answer(Request("POST", "/v1/renew", body))) == (401, "renew.anonymous")


def test_revoked_certificate_is_not_renewed(service: Service, authority: CertificateAuthority) -> None:
    """Its holder is told so, and the log tells who tried."""
    old = authority.issue("orders")
    authority.revoke("orders")
    reply = renew(service, old.chain)
    assert reason_of(reply) == (403, "renew.revoked")
    assert "meshlib ca token" in content_of(reply)["hint"]
    entry = authority.issued()[-1]
    assert (entry["event"], entry["reason"], entry["peer"]) == ("refusal", "renew.revoked", ORDERS)


def test_expired_certificate_is_not_renewed(service: Service, authority: CertificateAuthority, clock: Clock) -> None:
    """The handshake refuses it already; here it is refused again."""
    old = authority.issue("orders", ttl=DAY)
    clock.now += DAY
    assert reason_of(renew(service, old.chain)) == (403, "renew.expired")


def test_certificate_that_is_not_in_the_log_is_not_renewed(service: Service, authority: CertificateAuthority) -> None:
    """Signed with our key, perhaps, but not by us: who stole the issuer's key gets nothing on top."""
    signer = authority._roots.signing.issuer
    assert signer is not None
    key = certificates.new_key()
    forged = certificates.new_leaf(key, signer.certificate, signer.key, ORDERS, "", DAY, NOW)
    assert reason_of(renew(service, certificates.pem(forged, signer.certificate))) == (403, "renew.unknown")


def test_own_certificate_of_the_ca_is_not_renewed_over_the_network(service: Service, authority: CertificateAuthority) -> None:
    """Only the CA itself issues it."""
    own = authority.issue_own()
    assert reason_of(renew(service, own.chain, peer=own.spiffe_id)) == (403, "renew.unknown")


# ---------------------------------------------------------------------------------------------------- JWT-SVIDs


def wants_jwt(service: Service, chain: bytes, body: Any = None, peer: str | None = ORDERS) -> Reply:
    ders = tuple(each.public_bytes(serialization.Encoding.DER) for each in x509.load_pem_x509_certificates(chain))
    text = body if isinstance(body, bytes) else json.dumps(body or {"audience": ["web"]}).encode()
    return service.answer(Request("POST", "/v1/jwt", text, peer=peer, chain=ders, source="192.0.2.7"))


def published(service: Service) -> bytes:
    """The keys for tokens, as /v1/bundle has them."""
    return bundle.parse_json(service.answer(Request("GET", "/v1/bundle")).body, "shop.internal").jwt


def test_jwt_svid_is_for_the_caller_and_its_audience(service: Service, authority: CertificateAuthority) -> None:
    """For five minutes, by a key that is published; nobody else's and no other trust domain's."""
    own = authority.issue("orders")
    content = content_of(wants_jwt(service, own.chain))
    claims = jwt_svid.validated(content["token"], published(service), "shop.internal", "web", now=NOW)
    assert claims == {"sub": ORDERS, "aud": "web", "iat": int(NOW), "exp": int(NOW) + 300, "iss": "shop.internal"}
    assert (content["spiffe_id"], content["not_after"]) == (ORDERS, NOW + 300)
    for domain, audience in (("shop.internal", "jobs"), ("other.internal", "web")):
        with pytest.raises(Refused):
            jwt_svid.validated(content["token"], published(service), domain, audience, now=NOW)


def test_log_tells_of_a_jwt_svid_and_does_not_have_it(service: Service, authority: CertificateAuthority, tmp_path: Path) -> None:
    """Who, for whom, until when, by which certificate; no part of the token's signature is anywhere in the folder's log."""
    own = authority.issue("orders")
    token = content_of(wants_jwt(service, own.chain))["token"]
    entry = authority.issued()[-1]
    assert {name: entry[name] for name in ("event", "service", "spiffe_id", "audiences", "by", "serial", "source")} == {
        "event": "jwt.issue", "service": "orders", "spiffe_id": ORDERS, "audiences": ["web"], "by": "certificate",
        "serial": own.serial, "source": "192.0.2.7",
    }  # fmt: skip
    assert ledger.seconds(entry["expires"]) == NOW + 300
    assert not any(part in (tmp_path / "ca" / ledger.NAME).read_text() for part in token.split("."))
    assert authority.standing(is_whole=True)[-1][0]["serial"] == own.serial
    assert authority.verify_log().faults == ()


def test_gate_believes_a_jwt_svid_of_its_trust_domain(service: Service, authority: CertificateAuthority, tmp_path: Path) -> None:
    """With the published keys, and its own name as audience; the principal is the SPIFFE ID. Any other is a bad token: 401."""
    text = """
        mesh: shop
        secure:
          mode: enforce
          trust_domain: shop.internal
          identity: {folder: identities}
          jwt:
            svid: {trust_domain: shop.internal, audiences: [web]}
        services:
          orders: {}
          web: {secure: {jwt: {providers: [svid]}, allow: [{from: [orders], request_principals: ["*"]}]}}
    """
    (tmp_path / "mesh.yaml").write_text(textwrap.dedent(text))
    gate = core.Gate()
    gate.publish(load(tmp_path / "mesh.yaml", service="web").server_plan(), 0.0)
    own = authority.issue("orders")

    def told(audience: str) -> tuple[int, str]:
        token = content_of(wants_jwt(service, own.chain, {"audience": [audience]}))["token"]
        assert gate.keys("svid", published(service)) == []
        headers = [(b"host", b"web"), (b"authorization", f"Bearer {token}".encode())]
        entry = gate.begin("GET", b"/", headers, ORDERS, True, 0.0, wall=NOW)
        return entry.status, entry.principal

    assert told("web") == (0, f"shop.internal/{ORDERS}")
    assert told("jobs")[0] == 401


def test_who_can_not_renew_gets_no_jwt_svid(service: Service, authority: CertificateAuthority, clock: Clock) -> None:
    """Unknown, revoked, expired, anonymous, of another name, and the CA itself: no key is made, and the log tells who tried."""
    old, revoked = authority.issue("orders", ttl=DAY), authority.issue("jobs")
    authority.revoke("jobs")
    jobs = "spiffe://shop.internal/ns/default/sa/jobs"
    stranger = CertificateAuthority.create(None, "shop.internal").issue("orders")
    own = authority.issue_own()
    assert reason_of(wants_jwt(service, revoked.chain, peer=jobs)) == (403, "renew.revoked")
    assert authority.issued()[-1]["reason"] == "renew.revoked"
    assert reason_of(wants_jwt(service, old.chain, peer=jobs)) == (403, "renew.unknown")
    assert reason_of(wants_jwt(service, stranger.chain)) == (403, "renew.unknown")
    assert reason_of(wants_jwt(service, own.chain, peer=own.spiffe_id)) == (403, "renew.unknown")
    assert reason_of(wants_jwt(service, old.chain, peer=None)) == (401, "jwt.anonymous")
    clock.now += DAY
    assert reason_of(wants_jwt(service, old.chain)) == (403, "renew.expired")
    assert (json.loads(published(service)), "jwt.issue" in events(authority)) == ({"keys": []}, False)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        *((body, "http.body") for body in (
            b"", b"[]", b"{}", b"null", b'{"audience":"web"}', b'{"audience":[1]}', b'{"audience":["web"],"sub":"x"}',
            b'{"audience":["web"],"audience":["jobs"]}', b'{"audience":["web"],"ttl":"1h"}',
        )),
        *((json.dumps({"audience": names}).encode(), "jwt.audience") for names in (
            [], [""], ["web", ""], ["a b"], ["a\n"], ["\u00e4"], [f"a{number}" for number in range(17)], ["x" * 4097],
        )),
    ],
)  # fmt: skip
def test_jwt_svid_needs_plain_audiences_and_nothing_else(
    service: Service, authority: CertificateAuthority, body: bytes, reason: str
) -> None:
    """The subject and the life are not for the caller to say."""
    own = authority.issue("orders")
    assert reason_of(wants_jwt(service, own.chain, body)) == (400, reason)
    assert "jwt.issue" not in events(authority)


def test_keys_of_tokens_turn_over_with_the_root(service: Service, authority: CertificateAuthority, clock: Clock) -> None:
    """The new one is published a step before it signs; the old one stays until the last of its tokens has ended."""
    own = authority.issue("orders")

    def kid() -> str:
        content = content_of(wants_jwt(service, own.chain))
        jwt_svid.validated(content["token"], published(service), "shop.internal", "web", now=clock.now)
        found: str = jwt.get_unverified_header(content["token"])["kid"]
        return found

    def kids() -> list[str]:
        return [key["kid"] for key in json.loads(published(service))["keys"]]

    old = kid()
    authority.begin_rotation()
    assert (kids()[0], len(kids()), kid()) == (old, 2, old)
    authority.activate_rotation()
    authority.issue("orders")
    new = kid()
    assert kids() == [old, new]
    with pytest.raises(IdentityError, match="the last token that it has signed ends at"):
        authority.finish_rotation()
    assert (authority.stage, kids()) == ("activated", [old, new])
    clock.now += 300
    authority.finish_rotation()
    assert kids() == [new]


def _meanwhile(monkeypatch: pytest.MonkeyPatch, do: Any) -> None:
    """Somebody does this between the first look at a request and its signature."""
    from meshlib.secure import csr

    real = csr.checked_key

    def slow(*words: Any) -> Any:
        do()
        return real(*words)

    monkeypatch.setattr(csr, "checked_key", slow)


def test_revocation_that_comes_while_a_renewal_is_under_way_is_not_lost(
    service: Service, authority: CertificateAuthority, clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the command line, in another process: nothing is signed after it."""
    old = authority.issue("orders")
    _meanwhile(monkeypatch, lambda: CertificateAuthority.open(tmp_path / "ca", clock=clock).revoke("orders"))
    assert reason_of(renew(service, old.chain)) == (403, "renew.revoked")
    assert [state for _, state in authority.standing(is_whole=True)] == ["revoked"]


def test_revocation_that_comes_while_an_enrolment_is_under_way_is_not_lost(
    service: Service, authority: CertificateAuthority, clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes the token back, also one that was looked at already."""
    token = token_of(authority)
    _meanwhile(monkeypatch, lambda: CertificateAuthority.open(tmp_path / "ca", clock=clock).revoke("orders"))
    assert reason_of(enroll(service, token)) == (403, "token.unknown")
    assert "issue" not in events(authority)


def test_token_is_as_good_as_before_if_the_ca_can_not_sign(tmp_path: Path, clock: Clock) -> None:
    """Near the root's end, say: when it was turned over, the same token buys a certificate."""
    authority = CertificateAuthority.create(tmp_path / "short", "shop.internal", root_life=DAY, clock=clock)
    token = token_of(authority)
    assert enroll(Service(authority, ttl=2 * DAY), token).status == 403
    assert "token.used" not in events(authority)
    assert enroll(Service(authority, ttl=DAY / 2), token).status == 200


# ---------------------------------------------------------------------------------------------------- what all may ask


def test_bundle_is_a_spiffe_bundle(service: Service, authority: CertificateAuthority) -> None:
    """The roots, the number that rises with each step of a rotation, and when to ask again."""
    read = bundle.parse_json(service.answer(Request("GET", "/v1/bundle")).body, "shop.internal")
    assert (read.pem, read.sequence, read.refresh_hint, read.ignored) == (authority.bundle, 1, 300.0, ())
    authority.begin_rotation()
    assert bundle.parse_json(service.answer(Request("GET", "/v1/bundle")).body).sequence == 2


def test_bundle_holds_the_keys_for_tokens(service: Service, authority: CertificateAuthority, tmp_path: Path) -> None:
    """Where the trust domain has some; its number rises when they change, and not otherwise."""
    from meshlib.secure.jwt_svid import TokenKeys

    keys = TokenKeys(tmp_path / "ca")

    def asked() -> tuple[int | None, int]:
        read = bundle.parse_json(service.answer(Request("GET", "/v1/bundle")).body, "shop.internal")
        return read.sequence, len(json.loads(read.jwt)["keys"])

    said = [asked()]
    for step in (keys.create, keys.begin, keys.activate, keys.finish):
        step()
        said.append(asked())
    assert said == [(1, 0), (2, 1), (3, 2), (3, 2), (4, 1)]
    assert CertificateAuthority.open(tmp_path / "ca").verify_log().faults == ()


def test_roots_and_revocations_are_pem(service: Service, authority: CertificateAuthority) -> None:
    """As they lie in the CA's folder."""
    issued = authority.issue("orders")
    authority.revoke("orders")
    assert service.answer(Request("GET", "/v1/roots")).body == authority.bundle
    (crl, _) = certificates.crls_of(service.answer(Request("GET", "/v1/crl")).body)
    assert [certificates.serial_text(entry.serial_number) for entry in crl] == [issued.serial]


def test_fault_inside_tells_nothing_outside(
    service: Service, authority: CertificateAuthority, monkeypatch: pytest.MonkeyPatch
) -> None:
    """500, and a constant text."""

    def broken(self: object) -> bytes:
        raise OSError("secret: /ca/issuer.key")

    monkeypatch.setattr(CertificateAuthority, "crl", property(broken))
    reply = service.answer(Request("GET", "/v1/crl"))
    assert reason_of(reply) == (500, "ca.failed")
    assert b"secret" not in reply.body


def test_flood_of_refusals_is_counted_not_written_out(service: Service, authority: CertificateAuthority, seconds: Clock) -> None:
    """Thirty lines in a minute, then one with the number of the rest."""
    before = len(authority.issued())
    for _ in range(1000):
        enroll(service, _unknown_token())
    assert len(authority.issued()) == before + 30
    seconds.now += 60
    service.flood.settle()
    entry = authority.issued()[-1]
    assert (entry["event"], entry["count"], entry["reasons"]) == ("refusal.many", 970, {"token": 970})
    enroll(service, _unknown_token())
    assert len(authority.issued()) == before + 32


def test_flood_hides_no_theft(service: Service, authority: CertificateAuthority) -> None:
    """A token that is used twice and a revoked certificate are told, whatever anybody else has sent before."""
    token, old = token_of(authority), authority.issue("web")
    authority.revoke("web")
    handed(enroll(service, token))
    for _ in range(100):
        service.answer(Request("POST", "/v1/renew", b"x", source="198.51.100.9"))
        enroll(service, _unknown_token())
    before = len(authority.issued())
    for _ in range(3):
        assert reason_of(enroll(service, token)) == (403, "token.used")
        assert reason_of(renew(service, old.chain, peer=old.spiffe_id)) == (403, "renew.revoked")
    assert [entry["reason"] for entry in authority.issued()[before:]] == ["token.used", "renew.revoked"]


def test_theft_is_told_for_each_network_it_comes_from(service: Service, authority: CertificateAuthority) -> None:
    """Of IPv6 a /64: who has one has more addresses than a log has room."""
    token = token_of(authority)
    handed(enroll(service, token))
    for _ in range(40):
        enroll(service, _unknown_token())
    before = len(authority.issued())
    for source in ("192.0.2.1", "192.0.2.2", "2001:db8::1", "2001:db8::2", "2001:db8:0:1::1", "192.0.2.1"):
        enroll(service, token, source=source)
    assert [entry["source"] for entry in authority.issued()[before:]] == [
        "192.0.2.1", "192.0.2.2", "2001:db8::1", "2001:db8:0:1::1",
    ]  # fmt: skip


def test_kinds_of_refusals_do_not_take_each_others_place(service: Service, authority: CertificateAuthority) -> None:
    """Thirty lines for each."""
    before = len(authority.issued())
    for _ in range(100):
        service.answer(Request("POST", "/v1/renew", b"x"))
        enroll(service, _unknown_token())
        service.answer(Request("POST", "/v1/enroll", b"x"))
    assert len(authority.issued()) == before + 90


def test_refusals_of_a_day_are_bounded(
    service: Service, authority: CertificateAuthority, seconds: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A flood that lasts fills no disk; the next day begins anew."""
    monkeypatch.setattr("meshlib.secure.authority._LINES_A_DAY", 50)
    told = []
    for moment in (0.0, 60.0, 120.0, DAY + 1):
        seconds.now = moment
        for _ in range(31):
            enroll(service, _unknown_token())
        told.append(events(authority).count("token.refused"))
    assert told == [30, 50, 50, 80]


def test_what_an_attacker_says_takes_no_room_in_the_log(service: Service, authority: CertificateAuthority) -> None:
    """Three hundred characters of each fact at most."""
    token = token_of(authority)
    names = [f"spiffe://shop.internal/{number}{'x' * 500}" for number in range(10)]
    enroll(service, token, _signed(certificates.new_key(), *names))
    assert max(len(str(value)) for value in authority.issued()[-1].values()) <= 300


def _unknown_token() -> Any:
    from meshlib.secure.tokens import Token

    return Token(ORDERS, ("0" * 64,), f"{'0' * 16}.{'A' * 43}".encode())  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------------------------- over the network


@pytest.fixture
def live(tmp_path: Path) -> CertificateAuthority:
    return CertificateAuthority.create(tmp_path / "live", "shop.internal")


@pytest.fixture
def server(live: CertificateAuthority) -> Iterator[Server]:
    with serving(Service(live)) as server:
        yield server


def test_foreign_client_enrols_and_renews(server: Server, live: CertificateAuthority) -> None:
    """Python's http.client over OpenSSL, with the root alone; the server shows that it is the CA."""
    key = certificates.new_key()
    token = token_of(live)
    body = {"token": bytes(token.proof).decode(), "csr": request_text(ORDERS, key)}
    status, answer, names = Foreign(server, live.bundle).ask("POST", "/v1/enroll", body)
    assert (status, names) == (200, ["spiffe://shop.internal/meshlib/ca"])
    content = json.loads(answer)
    own = Issued("orders", ORDERS, "", 0, 0, content["chain"].encode(), b"", certificates.key_pem(key))
    status, answer, _ = Foreign(server, live.bundle, own).ask("POST", "/v1/renew", {"csr": request_text()})
    assert status == 200
    assert json.loads(answer)["spiffe_id"] == ORDERS
    assert [entry.get("by") for entry in live.issued()][-2:] == ["token", "renewal"]
    assert live.issued()[-1]["source"] == "127.0.0.1"


def test_other_trust_domain_can_fetch_the_bundle(server: Server, live: CertificateAuthority) -> None:
    """By https_spiffe, with the ID of the CA's service and its roots: what federation asks for."""
    from meshlib.secure import endpoint

    url = f"https://127.0.0.1:{server.address[1]}/v1/bundle"
    fetched = endpoint.fetch(url, "spiffe://shop.internal/meshlib/ca", live.bundle, endpoint.Fetching(), can_be_near=True)
    assert bundle.parse_json(fetched, "shop.internal").pem == live.bundle


def test_key_of_tokens_is_published_before_the_first_token(server: Server, live: CertificateAuthority) -> None:
    """Whoever asks for the bundle in time knows the key of every token."""

    def known() -> list[str]:
        content = bundle.parse_json(Foreign(server, live.bundle).ask("GET", "/v1/bundle")[1], "shop.internal").jwt
        return [key["kid"] for key in json.loads(content)["keys"]]

    before = known()
    _, answer, _ = Foreign(server, live.bundle, live.issue("orders")).ask("POST", "/v1/jwt", {"audience": ["web"]})
    assert [jwt.get_unverified_header(json.loads(answer)["token"])["kid"]] == before == known()


def test_service_gets_a_jwt_svid_with_its_certificate(server: Server, live: CertificateAuthority) -> None:
    """For its own ID; the SPIFFE project's client verifies it by the keys in /v1/bundle, and refuses it for others."""
    spiffe = pytest.importorskip("spiffe")
    status, answer, _ = Foreign(server, live.bundle, live.issue("orders")).ask("POST", "/v1/jwt", {"audience": ["web", "jobs"]})
    assert status == 200, answer
    content = json.loads(answer)
    published = bundle.parse_json(Foreign(server, live.bundle).ask("GET", "/v1/bundle")[1], "shop.internal").jwt
    keys = spiffe.JwtBundle.parse(spiffe.TrustDomain("shop.internal"), published)
    svid = spiffe.JwtSvid.parse_and_validate(content["token"], keys, {"jobs"})
    assert (str(svid.spiffe_id), content["spiffe_id"], svid.expiry) == (ORDERS, ORDERS, content["not_after"])
    assert svid.audience == {"web", "jobs"}
    with pytest.raises(Exception, match="(?i)audience"):
        spiffe.JwtSvid.parse_and_validate(content["token"], keys, {"payments"})
    other = spiffe.JwtBundle.parse(spiffe.TrustDomain("other.internal"), published)
    with pytest.raises(Exception, match="does not match"):
        spiffe.JwtSvid.parse_and_validate(content["token"], other, {"jobs"})
    status, answer, _ = Foreign(server, live.bundle).ask("POST", "/v1/jwt", {"audience": ["web"]})
    assert (status, json.loads(answer)["reason"]) == (401, "jwt.anonymous")


def test_client_with_an_expired_certificate_is_refused_in_the_handshake(
    server: Server, live: CertificateAuthority, tmp_path: Path
) -> None:
    """It is told by the alert; we by the log."""
    past = CertificateAuthority.open(tmp_path / "live", clock=lambda: time.time() - 3600)
    old = past.issue("orders", ttl=600)
    with pytest.raises(OSError, match="(?i)expired"):
        Foreign(server, live.bundle, old).ask("POST", "/v1/renew", {"csr": request_text()})
    entry = live.issued()[-1]
    assert (entry["event"], "has expired" in entry["why"]) == ("refusal", True)


def test_client_of_another_ca_is_refused_in_the_handshake(server: Server, live: CertificateAuthority) -> None:
    """Of another trust domain, and of another CA that calls itself the same."""
    for other in ("other.internal", "shop.internal"):
        stranger = CertificateAuthority.create(None, other).issue("orders")
        with pytest.raises(OSError, match="alert|reset|EOF|closed"):
            Foreign(server, live.bundle, stranger).ask("POST", "/v1/renew", {"csr": request_text()})


def test_client_must_hold_the_key_of_what_it_shows(server: Server, live: CertificateAuthority) -> None:
    """A certificate is public; without its key it proves nothing. (OpenSSL won't even try: so by hand.)"""
    from meshlib._native import core

    own, other = live.issue("orders"), live.issue("web")
    with pytest.raises(Exception, match="does not belong"):
        core.TlsClient(own.chain, other.key, {"shop.internal": live.bundle}, 1)
    foreign = Foreign(server, live.bundle)
    status, answer, _ = foreign.ask("POST", "/v1/renew", {"csr": request_text()})
    assert (status, json.loads(answer)["reason"]) == (401, "renew.anonymous")


def test_requests_that_could_be_read_in_two_ways_are_refused(server: Server, live: CertificateAuthority) -> None:
    """One answer, and the connection ends: nothing is read after it."""
    foreign = Foreign(server, live.bundle)
    host = b"host: ca\r\n"
    said = [
        (b"POST /v1/enroll HTTP/1.1\r\n" + host + b"transfer-encoding: chunked\r\n\r\n0\r\n\r\n", 411),
        (b"POST /v1/enroll HTTP/1.1\r\n" + host + b"transfer-encoding: chunked\r\ncontent-length: 2\r\n\r\n{}", 411),
        (b"POST /v1/enroll HTTP/1.1\r\n" + host + b"content-length: 2\r\ncontent-length: 2\r\n\r\n{}", 400),
        (b"POST /v1/enroll HTTP/1.1\r\n" + host + b"content-length: +2\r\n\r\n{}", 400),
        (b"POST /v1/enroll HTTP/1.1\r\n" + host + b"content-length: 65537\r\n\r\n", 413),
        (b"POST /v1/enroll HTTP/1.1\r\n" + host + b"content-length: 99999999999\r\n\r\n", 413),
        (b"GET /v1/roots HTTP/1.1\r\n" + host + host + b"\r\n", 400),
        (b"GET /v1/roots HTTP/1.1\r\n\r\n", 400),
        (b"GET  /v1/roots HTTP/1.1\r\n" + host + b"\r\n", 400),
        (b"GET /v1/roots HTTP/1.1\r\nx: " + b"y" * 20_000 + b"\r\n" + host + b"\r\n", 431),
        (b"GET /v1/roots HTTP/1.1\r\n" + b"x: y\r\n" * 101 + host + b"\r\n", 431),
        (b"GET /" + b"x" * 20_000 + b" HTTP/1.1\r\n" + host + b"\r\n", 431),
        (b"GET /v1/roots HTTP/1.1\r\nx: " + b"y" * 40_000, 431),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505),
        (b"GET /v1/roots HTTP/1.0\r\n" + host + b"\r\n", 505),
        (b"GET /v1/roots HTTP/1.1\r\n" + host + b"\r\nGET /v1/crl HTTP/1.1\r\n" + host + b"\r\n", 200),
    ]
    for data, status in said:
        got = foreign.raw(data)
        assert re.findall(rb"HTTP/1.1 (\d+)", got) == [str(status).encode()], data[:80]


def test_body_that_waits_to_be_asked_for_is_asked_for(server: Server, live: CertificateAuthority) -> None:
    """As curl does with larger bodies."""
    got = Foreign(server, live.bundle).raw(
        b"POST /v1/enroll HTTP/1.1\r\nhost: ca\r\nexpect: 100-continue\r\ncontent-length: 2\r\n\r\n", b"{}"
    )
    assert re.findall(rb"HTTP/1.1 (\d+)", got) == [b"100", b"400"]


def test_what_is_no_tls_is_refused_and_logged(server: Server, live: CertificateAuthority) -> None:
    """The log has a line, the sender an alert."""
    with socket.create_connection(server.address, 10) as plug:
        plug.sendall(b"GET /v1/roots HTTP/1.1\r\nhost: ca\r\n\r\n")
        got = b""
        while piece := plug.recv(4096):
            got += piece
    assert got[:1] == b"\x15"  # an alert of TLS
    assert live.issued()[-1]["reason"] == "secure.tls"


def test_who_is_slow_is_cut_off(live: CertificateAuthority, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the handshake and in the request: a connection lives ten seconds, here a fifth of one."""
    monkeypatch.setattr(authority_server, "SECONDS", 0.2)
    with serving(Service(live)) as server:
        with socket.create_connection(server.address, 10) as plug:
            assert _ended(plug)
        assert Foreign(server, live.bundle).raw(b"POST /v1/enroll HTTP/1.1\r\nhost: ca\r\ncontent-length: 100\r\n\r\n{") == b""
        assert Foreign(server, live.bundle).ask("GET", "/v1/roots")[0] == 200


def test_connections_are_limited_by_address_and_in_all(
    server: Server, live: CertificateAuthority, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One address can't take all places, and what is full refuses at once; a place that is free again is one."""
    monkeypatch.setattr(authority_server, "MOST_FROM_ONE", 2)
    held = [socket.create_connection(server.address, 10) for _ in range(2)]
    try:
        _until(lambda: server._open["127.0.0.1"] == 2)
        with socket.create_connection(server.address, 10) as third:
            assert _ended(third)
    finally:
        for plug in held:
            plug.close()
    _until(lambda: not server._open)
    assert Foreign(server, live.bundle).ask("GET", "/v1/roots")[0] == 200
    monkeypatch.setattr(authority_server, "MOST", 0)
    with socket.create_connection(server.address, 10) as plug:
        assert _ended(plug)


def test_addresses_of_one_network_count_as_one() -> None:
    """Of IPv6 the /64 that one machine may choose from; an IPv4 address is one, in whatever notation."""
    said = ["192.0.2.1", "::ffff:192.0.2.1", "2001:db8::1", "2001:db8::ffff:1", "fe80::1%eth0", "2001:db8:0:1::1", ""]
    assert [network_of(source) for source in said] == [
        "192.0.2.1", "192.0.2.1", "2001:db8::/64", "2001:db8::/64", "fe80::/64", "2001:db8:0:1::/64", "",
    ]  # fmt: skip


def test_idle_connections_lock_nobody_out(server: Server, live: CertificateAuthority, monkeypatch: pytest.MonkeyPatch) -> None:
    """When all places are taken, the oldest that is still in its handshake makes room."""
    monkeypatch.setattr(authority_server, "MOST", 3)
    monkeypatch.setattr(authority_server, "RESERVED", 1)
    held = [socket.create_connection(server.address, 10) for _ in range(3)]
    try:
        _until(lambda: len(server._shaking) == 3)
        assert Foreign(server, live.bundle).ask("GET", "/v1/roots")[0] == 200
        assert _ended(held[0])
        assert len(server._shaking) == 2
    finally:
        for plug in held:
            plug.close()


def test_places_are_kept_for_who_has_a_certificate(
    server: Server, live: CertificateAuthority, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Handshakes without one take their own places only, however long they hold them."""
    monkeypatch.setattr(authority_server, "MOST", 3)
    monkeypatch.setattr(authority_server, "RESERVED", 1)
    own = live.issue("orders")
    anonymous = Foreign(server, live.bundle)
    held = [anonymous.context.wrap_socket(socket.create_connection(server.address, 10)) for _ in range(2)]
    try:
        _until(lambda: len(server._anonymous) == 2)
        with pytest.raises(OSError, match="reset|EOF|closed|[Rr]emote"):
            anonymous.ask("GET", "/v1/roots")
        assert Foreign(server, live.bundle, own).ask("POST", "/v1/renew", {"csr": request_text()})[0] == 200
    finally:
        for plug in held:
            plug.close()


def test_handshake_has_less_time_than_a_request(live: CertificateAuthority, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three seconds, here a fifth of one; after it the ten seconds of the whole count."""
    monkeypatch.setattr(authority_server, "HANDSHAKE", 0.2)
    with serving(Service(live)) as server:
        secured = Foreign(server, live.bundle).context.wrap_socket(socket.create_connection(server.address, 10))
        _until(lambda: len(server._anonymous) == 1)
        with socket.create_connection(server.address, 10) as plug, secured:
            assert _ended(plug)  # and it came later
            secured.sendall(b"GET /v1/roots HTTP/1.1\r\nhost: ca\r\n\r\n")
            assert secured.recv(12) == b"HTTP/1.1 200"


def _ended(plug: socket.socket) -> bool:
    """At once, not when its time is over."""
    plug.settimeout(authority_server.SECONDS / 2 + 1)
    try:
        return plug.recv(1) == b""
    except ConnectionResetError:
        return True


def _until(is_so: Any) -> None:
    end = time.monotonic() + 10
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_server_follows_a_rotation_by_itself(server: Server, live: CertificateAuthority) -> None:
    """After the second step it shows a certificate under the new root; who trusts the new one alone is answered."""
    Foreign(server, live.bundle).ask("GET", "/v1/roots")
    live.begin_rotation()
    live.activate_rotation()
    server.tend()
    (new, _) = roots_of(live.bundle)
    assert Foreign(server, certificates.pem(new)).ask("GET", "/v1/roots")[0] == 200
    live.finish_rotation()
    server.tend()
    assert Foreign(server, live.bundle).ask("GET", "/v1/roots")[1] == live.bundle


def test_server_takes_no_client_of_a_root_that_has_left(server: Server, live: CertificateAuthority) -> None:
    """Its bundle is the CA's of now."""
    old = live.issue("orders")
    live.begin_rotation()
    live.activate_rotation()
    live.finish_rotation(force=True)
    server.tend()
    with pytest.raises(OSError, match="alert|reset|EOF|closed"):
        Foreign(server, live.bundle, old).ask("POST", "/v1/renew", {"csr": request_text()})


def test_server_renews_its_own_certificate_at_half_its_life(authority: CertificateAuthority, clock: Clock) -> None:
    """And leaves it alone before."""
    server = Server(Service(authority))
    for moment in (0, DAY / 2 - 60, DAY / 2):
        clock.now = NOW + moment
        server.tend()
    assert [entry["event"] for entry in authority.issued()] == ["create", "issue", "renewal"]
    server._pool.shutdown()


def test_server_tends_the_folders_of_its_own_machine(authority: CertificateAuthority, clock: Clock, tmp_path: Path) -> None:
    """Certificates past half of their life are issued anew, and a revocation reaches the others."""
    authority.write("orders", tmp_path / "out", ttl=DAY)
    kept = authority.write("web", tmp_path / "out")
    server = Server(Service(authority), out=tmp_path / "out")
    server.tend()
    clock.now += DAY / 2
    server.tend()
    leaf = x509.load_pem_x509_certificate((tmp_path / "out" / "orders" / "svid.pem").read_bytes())
    assert leaf.not_valid_after_utc.timestamp() == clock.now + DAY
    assert (tmp_path / "out" / "web" / "svid.pem").read_bytes() == kept.chain
    authority.revoke("orders")
    server.tend()
    assert (tmp_path / "out" / "web" / "crl.pem").read_bytes() == authority.crl
    server._pool.shutdown()


def test_spoiled_folder_keeps_the_server_from_nothing(
    authority: CertificateAuthority, clock: Clock, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It starts, renews and publishes for the others, and tells of the folder once; mended, the folder is served."""
    out = tmp_path / "out"
    for name in ("billing", "orders", "web"):
        authority.write(name, out, ttl=DAY)
    whole = (out / "billing" / "svid.pem").read_bytes()
    (out / "billing" / "svid.pem").write_text("half a file")
    server = Server(Service(authority), out=out)
    clock.now += DAY / 2
    server.tend()
    clock.now += 60
    server.tend()
    authority.revoke("web")
    server.tend()
    assert (out / "orders" / "crl.pem").read_bytes() == authority.crl
    assert [entry["service"] for entry in authority.issued() if entry["event"] == "renewal"] == ["orders", "web"]
    assert [record.message.count("billing") > 0 for record in caplog.records if record.levelname == "ERROR"] == [True]
    (out / "billing" / "svid.pem").write_bytes(whole)
    clock.now += 60
    server.tend()
    assert (out / "billing" / "crl.pem").read_bytes() == authority.crl
    server._pool.shutdown()


def test_address_that_can_not_be_listened_on_is_told(live: CertificateAuthority) -> None:
    """With what to do."""
    import asyncio

    from meshlib.errors import ListenError

    with serving(Service(live)) as taken:

        async def start() -> None:
            other = Server(Service(live))
            try:
                await other.start("127.0.0.1", taken.address[1])
            finally:
                await other.stop()

        with pytest.raises(ListenError, match="can't listen"):
            asyncio.run(start())


@pytest.mark.skipif(shutil.which("openssl") is None, reason="the openssl binary is not installed")
def test_openssl_verifies_the_server_and_gets_no_ticket(server: Server, live: CertificateAuthority, tmp_path: Path) -> None:
    """s_client with the bundle: the chain is good, TLS 1.1 is not spoken."""
    (tmp_path / "bundle.pem").write_bytes(live.bundle)
    at = f"127.0.0.1:{server.address[1]}"
    words = ["openssl", "s_client", "-connect", at, "-CAfile", tmp_path / "bundle.pem", "-verify_return_error"]
    done = subprocess.run(words, input="", capture_output=True, text=True, timeout=20)
    assert "Verify return code: 0 (ok)" in done.stdout
    old = subprocess.run([*words, "-tls1_1"], input="", capture_output=True, text=True, timeout=20)
    assert old.returncode != 0
