"""Is from a bundle taken what the standard says, and everything else left out with a reason?"""

from __future__ import annotations

import base64
import datetime
import json
import re
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding
from hypothesis import given
from hypothesis import strategies as st

from meshlib.errors import IdentityError, TrustDomainError
from meshlib.secure import CertificateAuthority, bundle, certificates
from meshlib.secure.bundle import Bundle

NOW = 1_800_000_000.0
TD = "partner.example"
TOKEN_KEY = {"use": "jwt-svid", "kty": "EC", "kid": "one", "crv": "P-256", "x": "eA", "y": "eQ"}


def root_of(key: Any = None, *, is_ca: bool = True, may_sign: bool = True, uri: str = f"spiffe://{TD}") -> x509.Certificate:
    """A certificate as a bundle may hold it."""
    key = key or certificates.new_key()
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "root")])
    usage = {use: False for use in certificates._KEY_USES} | {"key_cert_sign": may_sign, "crl_sign": True}
    begin = datetime.datetime.fromtimestamp(NOW, datetime.UTC)
    builder = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
    builder = builder.serial_number(1).not_valid_before(begin).not_valid_after(begin + datetime.timedelta(days=1))
    builder = builder.add_extension(x509.BasicConstraints(is_ca, None), True).add_extension(x509.KeyUsage(**usage), True)
    if uri:
        builder = builder.add_extension(x509.SubjectAlternativeName([x509.UniformResourceIdentifier(uri)]), False)
    return builder.sign(key, None if isinstance(key, ed25519.Ed25519PrivateKey) else hashes.SHA256())


def der(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(Encoding.DER)


def entry(*certificates_: x509.Certificate, **more: Any) -> dict[str, Any]:
    """An entry for certificates, as SPIRE writes it."""
    chain = [base64.b64encode(der(each)).decode() for each in certificates_]
    made = {"use": "x509-svid", "kty": "EC", "crv": "P-256", "x": "eA", "y": "eQ", "x5c": chain, **more}
    return {name: value for name, value in made.items() if value is not None}


def document(*keys: Any, **more: Any) -> bytes:
    return json.dumps({"keys": list(keys), **more}).encode()


ROOT, OTHER = root_of(), root_of()

# ---------------------------------------------------------------------------------------------------- what counts


def test_bundle_holds_roots_and_token_keys_apart() -> None:
    """Each by its use; a key for certificates is none for tokens, nor the other way round."""
    found = bundle.parse(document(entry(ROOT), TOKEN_KEY, entry(OTHER), spiffe_sequence=7, spiffe_refresh_hint=600))
    assert found == Bundle((der(ROOT), der(OTHER)), json.dumps({"keys": [TOKEN_KEY]}, separators=(",", ":")).encode(), 7, 600.0)
    assert found.pem == certificates.pem(ROOT, OTHER)


def test_bundle_without_keys_says_that_nobody_is_to_be_believed() -> None:
    """It's an answer, unlike a file that can't be read."""
    found = bundle.parse(document())
    assert (found.x509, json.loads(found.jwt), found.pem, found.ignored) == ((), {"keys": []}, b"", ())


def test_of_several_certificates_the_first_counts() -> None:
    """Exactly one CA certificate belongs there; what follows is ignored, and that is told."""
    found = bundle.parse(document(entry(ROOT, OTHER)))
    assert (found.x509, found.ignored) == ((der(ROOT),), ("key 0: of x5c only the first certificate counts",))


@pytest.mark.parametrize(
    ("key", "reason"),
    [
        ("text", "it is no object"),
        ({}, "use and kty must be set"),
        (entry(ROOT, use=None), "use and kty must be set"),
        (entry(ROOT, kty=None), "use and kty must be set"),
        (entry(ROOT, use=7), "use and kty must be set"),
        (entry(ROOT, use=["x509-svid"]), "use and kty must be set"),
        (entry(ROOT, use="foo"), "its use 'foo' is unknown"),
        (entry(ROOT, use="X509-SVID"), "its use 'X509-SVID' is unknown"),
        (entry(ROOT, use="sig"), "its use 'sig' is unknown"),
        (entry(ROOT, use="jwt-svid"), "it has no kid"),
        (entry(ROOT, kty="foo"), "its kty 'foo' is unknown"),
        (entry(ROOT, kty="oct"), "its kty 'oct' is unknown"),
        (entry(ROOT, x5c=None), "it has no x5c"),
        (entry(ROOT, x5c=[]), "it has no x5c"),
        (entry(ROOT, x5c="MII"), "it has no x5c"),
        (entry(ROOT, x5c=[7]), "no certificate in base64"),
        (entry(ROOT, x5c=["%%%"]), "no certificate in base64"),
        (entry(ROOT, x5c=["bm90aGluZw=="]), "no certificate in base64"),
        (entry(ROOT, x5c=[base64.urlsafe_b64encode(b"\xff\xef" * 30).decode()]), "no certificate in base64"),
        (entry(root_of(is_ca=False)), "is not that of a CA"),
        (entry(root_of(may_sign=False)), "may not sign certificates"),
        (entry(root_of(uri="spiffe://evil.example")), r"names another trust domain \(evil.example\)"),
        (entry(root_of(uri="https://partner.example")), "names another trust domain"),
        ({**TOKEN_KEY, "kid": ""}, "it has no kid"),
        ({**TOKEN_KEY, "kid": None}, "it has no kid"),
        ({**TOKEN_KEY, "kid": 7}, "it has no kid"),
        ({**TOKEN_KEY, "kty": "oct", "k": "AAAA"}, "is unknown, or not for tokens"),
        ({**TOKEN_KEY, "kty": "OKP"}, "is unknown, or not for tokens"),
        ({**TOKEN_KEY, "d": "AAAA"}, "it is a private key"),
        ({**TOKEN_KEY, "y": None}, "it is incomplete"),
        ({**TOKEN_KEY, "alg": 7}, "it is incomplete"),
    ],
)
def test_key_that_does_not_count_is_ignored_with_a_reason(key: Any, reason: str) -> None:
    """It, and no other: the rest of the bundle is as good as before."""
    found = bundle.parse(document(entry(OTHER), key), TD)
    assert (found.x509, json.loads(found.jwt)) == ((der(OTHER),), {"keys": []})
    assert len(found.ignored) == 1
    assert re.match(f"key 1: .*{reason}", found.ignored[0]), found.ignored


def test_a_second_key_of_one_name_is_ignored() -> None:
    """Nobody could say which of the two is meant."""
    found = bundle.parse(document(TOKEN_KEY, {**TOKEN_KEY, "x": "eg"}))
    assert json.loads(found.jwt) == {"keys": [TOKEN_KEY]}
    assert found.ignored == ("key 1: its kid is that of an earlier key",)


def test_of_a_token_key_only_its_own_members_are_handed_on() -> None:
    """What else stands there (jku, x5u, key_ops of another opinion) must not be believed by whoever reads it next."""
    found = bundle.parse(document({**TOKEN_KEY, "alg": "ES256", "jku": "https://evil", "x5c": ["x"], "n": "x"}))
    assert json.loads(found.jwt) == {"keys": [{**TOKEN_KEY, "alg": "ES256"}]}


@pytest.mark.parametrize("uri", ["", f"spiffe://{TD}"])
def test_root_that_names_no_trust_domain_or_the_right_one_counts(uri: str) -> None:
    """The binding to a trust domain is the configuration's; a root may confirm it, and must not contradict it."""
    assert len(bundle.parse(document(entry(root_of(uri=uri))), TD).x509) == 1


@pytest.mark.parametrize("hint", [0, -1, 1.5, 300.0, "300", True, None, 10**12])
def test_refresh_hint_is_whole_seconds_or_nothing(hint: Any) -> None:
    """It is only a hint: without it the default counts, and that is told."""
    found = bundle.parse(document(spiffe_refresh_hint=hint))
    told = () if hint is None else ("spiffe_refresh_hint: it is not a whole number of seconds",)
    assert (found.refresh_hint, found.ignored) == (None, told)


# ---------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"{}", "has no keys"),
        (b'{"keys": null}', "has no keys"),
        (b'{"keys": {}}', "has no keys"),
        (b'{"keys": []', "not JSON in UTF-8"),
        (b'{"keys": [], "x": NaN}', "not JSON in UTF-8"),
        (b'{"keys": ["\xff"]}', "not JSON in UTF-8"),
        (b'{"keys": ' + b"[" * 100_000, "not JSON in UTF-8"),
        (b'{"keys": [], "keys": []}', "the member 'keys' twice"),
        (b'{"keys": [{"use": "x509-svid", "use": "jwt-svid"}]}', "the member 'use' twice"),
        (b'{"keys": [], "x": {"a": 1, "a": 2}}', "the member 'a' twice"),
        (b'{"keys": [' + b",".join([b"{}"] * 300) + b"]}", "300 keys"),
        (b'{"keys": [], "spiffe_sequence": -1}', "not a whole number"),
        (b'{"keys": [], "spiffe_sequence": 1.0}', "not a whole number"),
        (b'{"keys": [], "spiffe_sequence": "1"}', "not a whole number"),
        (b'{"keys": [], "spiffe_sequence": true}', "not a whole number"),
        (b"{" + b" " * bundle.LIMIT, "larger than 512 KiB"),
        (b"", "neither a SPIFFE bundle nor PEM"),
        (b"[]", "neither a SPIFFE bundle nor PEM"),
        ("{}".encode("utf-16"), "neither a SPIFFE bundle nor PEM"),
        (certificates.pem(ROOT)[:200], "neither a SPIFFE bundle nor PEM"),
        (certificates.pem(ROOT, OTHER)[:-200], "in the middle of a certificate"),
        (certificates.pem(root_of(is_ca=False)), "holds no root: certificate 0: its certificate is not that of a CA"),
    ],
)
def test_text_that_is_no_bundle_is_refused(text: bytes, reason: str) -> None:
    """As a whole, with what to do."""
    with pytest.raises(IdentityError, match=reason) as caught:
        bundle.parse(text)
    assert caught.value.hint


@given(st.binary(max_size=200) | st.text(max_size=200).map(lambda text: b'{"keys": [' + text.encode("utf-8", "replace") + b"]}"))
def test_no_text_is_an_error_of_another_kind(text: bytes) -> None:
    """Whatever it is, it's a bundle or an IdentityError."""
    try:
        bundle.parse(text)
    except IdentityError:
        pass


def test_pem_holds_roots_and_nothing_else() -> None:
    """Certificates that are no CA's are ignored there, too."""
    found = bundle.parse(certificates.pem(ROOT, root_of(is_ca=False), OTHER))
    assert (found.x509, found.ignored) == ((der(ROOT), der(OTHER)), ("certificate 1: its certificate is not that of a CA",))
    assert (found.sequence, found.refresh_hint) == (None, None)


# ---------------------------------------------------------------------------------------------------- both ways


@pytest.mark.parametrize(
    "key",
    [
        ec.generate_private_key(ec.SECP256R1()),
        ec.generate_private_key(ec.SECP384R1()),
        rsa.generate_private_key(65537, 2048),
        ed25519.Ed25519PrivateKey.generate(),
    ],
    ids=["P-256", "P-384", "RSA", "Ed25519"],
)
def test_bundle_that_is_written_is_read_again(key: Any) -> None:
    """Every kind of root, with its key in the words of JWK beside it."""
    made = Bundle((der(root_of(key)),), json.dumps({"keys": [TOKEN_KEY]}, separators=(",", ":")).encode(), 3, 60.0)
    assert bundle.parse(bundle.format(made), TD) == made


def test_bundle_is_read_by_the_library_of_spiffe() -> None:
    """The foreign reader sees the same keys: roots by its X.509 parser, token keys by its JWT bundle."""
    spiffe = pytest.importorskip("spiffe")
    key = ec.generate_private_key(ec.SECP256R1()).public_key().public_numbers()
    numbers = {name: bundle._text(value, 32) for name, value in (("x", key.x), ("y", key.y))}
    authority = CertificateAuthority.create(None, TD)
    made = Bundle(bundle.parse(authority.bundle).x509, json.dumps({"keys": [{**TOKEN_KEY, **numbers}]}).encode(), 1, 300.0)
    name = spiffe.TrustDomain(TD)
    assert list(spiffe.JwtBundle.parse(name, made.jwt).jwt_authorities) == ["one"]
    assert {der(root) for root in spiffe.X509Bundle.parse(name, made.pem).x509_authorities} == set(made.x509)


@pytest.mark.parametrize(
    ("before", "now", "may"), [(1, 2, True), (2, 2, True), (2, 1, False), (None, 1, True), (1, None, True), (None, None, True)]
)
def test_sequence_never_goes_back(before: int | None, now: int | None, may: bool) -> None:
    """An older bundle is a replay: it holds keys that were withdrawn since."""
    assert Bundle((), sequence=now).supersedes(Bundle((), sequence=before)) is may


# ---------------------------------------------------------------------------------------------------- maps


def test_map_holds_each_bundle_under_its_trust_domain() -> None:
    """Apart from each other: a root that names another trust domain doesn't count there."""
    content = {"trust_domains": {TD: {"keys": [entry(ROOT)]}, "other.example": {"keys": [entry(ROOT)], "spiffe_refresh_hint": 5}}}
    found = bundle.parse_map(json.dumps(content).encode())
    assert {name: each.x509 for name, each in found.bundles.items()} == {TD: (der(ROOT),), "other.example": ()}


@pytest.mark.parametrize(
    ("text", "kind", "reason"),
    [
        (b'{"trust_domains": {"a.b": {"keys": []}, "a.b": {"keys": []}}}', IdentityError, "the member 'a.b' twice"),
        (b'{"trust_domains": {"a.b": {"keys": [], "keys": []}}}', IdentityError, "the member 'keys' twice"),
        (b'{"trust_domains": {}, "trust_domains": {}}', IdentityError, "the member 'trust_domains' twice"),
        (b"{}", IdentityError, "has no trust_domains"),
        (b'{"trust_domains": []}', IdentityError, "has no trust_domains"),
        (b'{"trust_domains": {"a.b": []}}', IdentityError, "holds no bundle for a.b"),
        (b'{"trust_domains": {"a.b": {}}}', IdentityError, "has no keys"),
        (b'{"trust_domains": {"spiffe://a.b": {"keys": []}}}', TrustDomainError, "names 'spiffe://a.b'"),
        (b'{"trust_domains": {"A.b": {"keys": []}}}', TrustDomainError, "names 'A.b'"),
        (b'{"trust_domains": {"": {"keys": []}}}', TrustDomainError, "names ''"),
        (b"[]", IdentityError, "not a JSON object"),
    ],
)
def test_map_with_a_fault_is_refused_as_a_whole(text: bytes, kind: type[Exception], reason: str) -> None:
    """Duplicates above all: two readers could believe two different bundles."""
    with pytest.raises(kind, match=reason):
        bundle.parse_map(text)


@pytest.mark.parametrize(
    ("name", "is_good"),
    [
        ("shop.internal", True),
        ("a_b-c.9", True),
        ("x" * 255, True),
        ("x" * 256, False),
        ("", False),
        ("Shop.internal", False),
        ("shop.internal:8443", False),
        ("shop/x", False),
        ("user@shop", False),
        ("shöp", False),
        ("shop%2e", False),
        ("spiffe://shop", False),
    ],
)
def test_name_of_a_trust_domain_is_what_the_native_core_takes(name: str, is_good: bool) -> None:
    """One rule in both languages."""
    from meshlib._native import core

    def takes(name: str) -> bool:
        try:
            core.parse_spiffe_id(f"spiffe://{name}/x")
        except ValueError:
            return False
        return True

    assert (not bundle.flaw_of_trust_domain(name), is_good) == (is_good, takes(name) if "/" not in name else is_good)
