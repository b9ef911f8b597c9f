"""Does a chain prove a SPIFFE ID, by every MUST of X509-SVID and SPIFFE-ID?

Each line of the tables is a certificate that is wrong in one thing only, and a word of the reason for which it is refused: so a
rule that is gone is seen, and so is one that fires for another reason. `verify_chain` is the very function that a handshake calls;
that it is, is tested over sockets here too, for one case of each kind.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.name import _ASN1Type
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from meshlib import errors
from meshlib._native import core
from tests.wire.peers import CLIENT, SERVER, Authority, Issued, call, moment, openssl_client, openssl_server, talk, usage

ID = "spiffe://td/a"
NUL = "\x00"


@pytest.fixture(scope="module")
def root() -> Authority:
    return Authority("root")


@pytest.fixture(scope="module")
def other() -> Authority:
    """The root of another trust domain, which we trust for that one."""
    return Authority("other")


def verdict(root: Authority, other: Authority, issued: Issued, expected: str = "", side: str = "clients") -> str:
    """The proved ID, or why there is none."""
    bundles = {"td": root.pem, "td2": other.pem}
    try:
        return str(core.verify_chain(issued.der, bundles, expected, time.time(), side)["id"])
    except errors.PeerIdentityError as error:
        return str(error).split("\n")[0]


def san(*names: x509.GeneralName) -> x509.SubjectAlternativeName:
    return x509.SubjectAlternativeName(names)


def uri(text: str) -> x509.UniformResourceIdentifier:
    return x509.UniformResourceIdentifier(text)


def unreadable(extension: type[Any]) -> x509.UnrecognizedExtension:
    """An extension that holds a NULL where it must hold something else."""
    return x509.UnrecognizedExtension(extension.oid, b"\x05\x00")


Case = Callable[[Authority], Issued]

GOOD: dict[str, Case] = {
    "plain": lambda root: root.issue(ID),
    "2: other kinds of names beside the one URI": lambda root: root.issue(
        ID, names=[x509.DNSName("other.svc"), x509.RFC822Name("a@b.example"), x509.RegisteredID(x509.ObjectIdentifier("1.2.3"))]
    ),
    "3.1: SAN need not be critical where there is a subject": lambda root: root.issue(ID, subject="a"),
    "4.3: further usages are allowed": lambda root: root.issue(
        ID, extensions=[(usage("digital_signature", "key_encipherment", "key_agreement"), True)]
    ),
    "4.4: extended key usage may be absent": lambda root: root.issue(ID, without=[x509.ExtendedKeyUsage]),
    "4.4: and may name more": lambda root: root.issue(
        ID,
        extensions=[
            (
                x509.ExtendedKeyUsage(
                    [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.CODE_SIGNING]
                ),
                False,
            )
        ],
    ),
    "4.1: basic constraints may be absent": lambda root: root.issue(ID, without=[x509.BasicConstraints]),
    "a long ID": lambda root: root.issue(ID + "b" * (2048 - len(ID))),
    "P-384": lambda root: root.issue(ID, key=ec.generate_private_key(ec.SECP384R1())),
    "Ed25519": lambda root: root.issue(ID, key=ed25519.Ed25519PrivateKey.generate()),
    "RSA of 2048 bits": lambda root: root.issue(ID, key=rsa.generate_private_key(65537, 2048)),
    "SHA-384": lambda root: root.issue(ID, hash=hashes.SHA384()),
    "through an intermediate": lambda root: Authority("below", parent=root, path_length=0).issue(ID),
    "through one that names the trust domain": lambda root: Authority(
        "below", parent=root, extensions=[(san(uri("spiffe://td")), False)]
    ).issue(ID),
    "through one that speaks of DNS names only": lambda root: Authority(
        "below", parent=root, extensions=[(x509.NameConstraints([x509.DNSName("localhost")], None), True)]
    ).issue(ID),
}


@pytest.mark.parametrize("case", GOOD)
def test_what_the_standard_allows_proves_its_id(root: Authority, other: Authority, case: str) -> None:
    """On either side."""
    issued = GOOD[case](root)
    expected = x509.load_pem_x509_certificate(issued.chain).extensions.get_extension_for_class(x509.SubjectAlternativeName)
    (spiffe_id,) = expected.value.get_values_for_type(x509.UniformResourceIdentifier)
    assert [verdict(root, other, issued, spiffe_id, side) for side in ("clients", "servers")] == [spiffe_id] * 2


def deep(root: Authority, count: int) -> Authority:
    for number in range(count):
        root = Authority(f"below {number}", parent=root)
    return root


def constrained(root: Authority, **constraints: list[x509.GeneralName]) -> Issued:
    made = x509.NameConstraints(constraints.get("permitted"), constraints.get("excluded"))
    return Authority("below", parent=root, extensions=[(made, True)]).issue(ID)


def nothing_of(authority: Authority) -> Issued:
    return Issued(authority.pem, b"")


BAD: dict[str, tuple[Case, str]] = {
    # --- names
    "2: two URI names": (lambda root: root.issue(ID, "https://x"), "more than one URI name"),
    "2: the same URI name twice": (lambda root: root.issue(ID, ID), "more than one URI name"),
    "2: two SPIFFE IDs": (lambda root: root.issue(ID, "spiffe://td/b"), "more than one URI name"),
    "2: a DNS name alone": (lambda root: root.issue(names=[x509.DNSName("a.td")]), "no URI name"),
    "2: no names": (lambda root: root.issue(subject=ID, names=[]), "no subject alternative name"),
    "2: OTHERNAME": (
        lambda root: root.issue(names=[x509.OtherName(x509.ObjectIdentifier("1.2.3"), b"\x0c\x0d" + ID.encode())]),
        "no URI name",
    ),
    "2: the same as an address": (lambda root: root.issue(names=[x509.RFC822Name("spiffe@td")]), "no URI name"),
    "2: a NUL in the URI": (lambda root: root.issue(ID + NUL + ".evil"), "holds a NUL"),
    "2: a NUL in a DNS name beside it": (
        lambda root: root.issue(ID, names=[x509.DNSName("a" + NUL + ".evil")]),
        "holds a NUL",
    ),
    "2: a NUL in a name of a directory": (
        lambda root: root.issue(
            ID, names=[x509.DirectoryName(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "a" + NUL + "b")]))]
        ),
        "holds a NUL",
    ),
    "2: names that can't be read": (
        lambda root: root.issue(extensions=[(unreadable(x509.SubjectAlternativeName), True)]),
        "can't be read",
    ),
    "2: scheme": (lambda root: root.issue("https://td/a"), "no SPIFFE ID"),
    "2.1: trust domain in capitals": (lambda root: root.issue("spiffe://TD/a"), "no SPIFFE ID"),
    "2.2: ends in a slash": (lambda root: root.issue("spiffe://td/"), "no SPIFFE ID"),
    "2.2: dot segment": (lambda root: root.issue("spiffe://td/x/../a"), "no SPIFFE ID"),
    "2.3: longer than 2048 bytes": (lambda root: root.issue(ID + "b" * 2048), "no SPIFFE ID"),
    "3.1: no path": (lambda root: root.issue("spiffe://td"), "names a trust domain, not a workload"),
    "3.1: SAN not critical without a subject": (
        lambda root: root.issue(extensions=[(san(uri(ID)), False)]),
        "subject is empty, and its subject alternative name is not critical",
    ),
    # --- what a leaf may
    "4.1: cA": (lambda root: root.issue(ID, extensions=[(x509.BasicConstraints(True, None), True)]), "cA is true"),
    "4.1: constraints that can't be read": (
        lambda root: root.issue(ID, extensions=[(unreadable(x509.BasicConstraints), True)]),
        "basic constraints can't be read",
    ),
    "4.3: no key usage": (lambda root: root.issue(ID, without=[x509.KeyUsage]), "no key usage"),
    "4.3: key usage not critical": (
        lambda root: root.issue(ID, extensions=[(usage("digital_signature"), False)]),
        "key usage is not critical",
    ),
    "4.3: without digitalSignature": (
        lambda root: root.issue(ID, extensions=[(usage("key_agreement"), True)]),
        "lacks digitalSignature",
    ),
    "4.3: keyCertSign": (
        lambda root: root.issue(ID, extensions=[(usage("digital_signature", "key_cert_sign"), True)]),
        "allows signing",
    ),
    "4.3: cRLSign": (
        lambda root: root.issue(ID, extensions=[(usage("digital_signature", "crl_sign"), True)]),
        "allows signing",
    ),
    "4.4: serverAuth alone": (
        lambda root: root.issue(ID, extensions=[(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), False)]),
        "lacks serverAuth or clientAuth",
    ),
    "4.4: clientAuth alone": (
        lambda root: root.issue(ID, extensions=[(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH]), False)]),
        "lacks serverAuth or clientAuth",
    ),
    "5.1: a critical extension that nobody knows": (
        lambda root: root.issue(
            ID, extensions=[(x509.UnrecognizedExtension(x509.ObjectIdentifier("1.2.3.4"), b"\x05\x00"), True)]
        ),
        "UnsupportedCriticalExtension",
    ),
    # --- keys and signatures
    "a key of RSA with 1024 bits": (lambda root: root.issue(ID, key=rsa.generate_private_key(65537, 1024)), "its key is none of"),
    "a key on another curve": (lambda root: root.issue(ID, key=ec.generate_private_key(ec.SECP256K1())), "its key is none of"),
    "a key of P-521": (lambda root: root.issue(ID, key=ec.generate_private_key(ec.SECP521R1())), "its key is none of"),
    # --- time
    "5.1: not yet valid": (lambda root: root.issue(ID, begin=3000), "not valid yet"),
    "5.1: expired": (lambda root: root.issue(ID, begin=-3000, end=-10), "has expired"),
    "5.1: an intermediate that has expired": (
        lambda root: Authority("below", parent=root, begin=-3000, end=-10).issue(ID),
        "has expired",
    ),
    # --- paths
    "5.1: another root of the same name": (lambda root: Authority("root").issue(ID), "no root in the bundle"),
    "5.1: signed by itself": (lambda root: nothing_of(Authority("a", extensions=[(san(uri(ID)), False)])), "cA is true"),
    "5.1: signed by a leaf": (
        lambda root: Authority(
            "leaf",
            parent=root,
            extensions=[
                (x509.BasicConstraints(False, None), True),
                (usage("digital_signature"), True),
                (san(uri("spiffe://td/thief")), True),
            ],
        ).issue(ID),
        "EndEntityUsedAsCa",
    ),
    "5.1: deeper than pathlen allows": (
        lambda root: Authority("b", parent=Authority("a", parent=root, path_length=0)).issue(ID),
        "PathLenConstraintViolated",
    ),
    "5.1: more certificates than 8": (lambda root: deep(root, 8).issue(ID), "9 certificates, more than 8"),
    "5.1: a name constraint that speaks of URIs": (
        lambda root: constrained(root, permitted=[uri("other")]),
        "NameConstraintViolation",
    ),
    "5.1: even one that would allow it": (lambda root: constrained(root, permitted=[uri("td")]), "NameConstraintViolation"),
    "5.1: a name constraint that the DNS name breaks": (
        lambda root: constrained(root, permitted=[x509.DNSName("example.com")]),
        "NameConstraintViolation",
    ),
    "5.1: or that excludes it": (lambda root: constrained(root, excluded=[x509.DNSName("localhost")]), "NameConstraintViolation"),
    # --- who signs
    "3.2: the ID of a signer has a path": (
        lambda root: Authority("below", parent=root, extensions=[(san(uri("spiffe://td/ca")), False)]).issue(ID),
        "has the SPIFFE ID of a workload",
    ),
    "3.2: a signer of another trust domain": (
        lambda root: Authority("below", parent=root, extensions=[(san(uri("spiffe://td2")), False)]).issue(ID),
        "is of another trust domain",
    ),
    "3.2: the URI of a signer is no SPIFFE ID": (
        lambda root: Authority("below", parent=root, extensions=[(san(uri("https://td")), False)]).issue(ID),
        "no SPIFFE ID",
    ),
    "4.3: a signer without key usage": (
        lambda root: Authority("below", parent=root, without=[x509.KeyUsage]).issue(ID),
        "has no key usage",
    ),
    "4.3: a signer's key usage is not critical": (
        lambda root: Authority("below", parent=root, extensions=[(usage("key_cert_sign"), False)]).issue(ID),
        "key usage that is not critical",
    ),
    "4.3: a signer may not sign": (
        lambda root: Authority("below", parent=root, extensions=[(usage("digital_signature"), True)]).issue(ID),
        "lacks keyCertSign",
    ),
    "4.1: a signer is no CA": (
        lambda root: Authority("below", parent=root, without=[x509.BasicConstraints]).issue(ID),
        "EndEntityUsedAsCa",
    ),
    # --- whose bundle
    "no bundle of the trust domain": (lambda root: root.issue("spiffe://td3/a"), "no bundle of that trust domain"),
    "a trust domain that only begins like ours": (
        lambda root: root.issue("spiffe://td.evil/a"),
        "no bundle of that trust domain",
    ),
    "our root can't speak for another trust domain": (lambda root: root.issue("spiffe://td2/a"), "no root in the bundle"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_the_standard_forbids_proves_nothing(root: Authority, other: Authority, case: str) -> None:
    """Refused on either side, and for this very reason."""
    make, reason = BAD[case]
    issued = make(root)
    for side in ("clients", "servers"):
        said = verdict(root, other, issued, side=side)
        assert said.startswith("The peer did not prove its identity"), said
        assert reason in said


def test_a_signing_certificate_never_authenticates() -> None:
    """Not even a root of the bundle itself, whose ID has no path (3.2)."""
    ca = Authority("root", extensions=[(san(uri("spiffe://td")), False)])
    assert "not a workload" in verdict(ca, Authority("other"), nothing_of(ca))


def sha1_in_place_of_sha256(issued: Issued, key: rsa.RSAPrivateKey) -> list[bytes]:
    """The same certificate, correctly signed by RSA with SHA-1: libraries that issue certificates don't do that any more."""
    leaf = x509.load_pem_x509_certificate(issued.chain)
    sha256, sha1 = (bytes.fromhex("2a864886f70d0101") + bytes([last]) for last in (11, 5))
    signed = leaf.tbs_certificate_bytes.replace(sha256, sha1)
    size = key.key_size // 8
    digest = bytes.fromhex("3021300906052b0e03021a05000414") + hashlib.sha1(signed).digest()
    numbers = key.private_numbers()
    padded = b"\x00\x01" + b"\xff" * (size - 3 - len(digest)) + b"\x00" + digest
    signature = pow(int.from_bytes(padded), numbers.d, numbers.public_numbers.n).to_bytes(size)
    return [
        leaf.public_bytes(Encoding.DER)
        .replace(leaf.tbs_certificate_bytes, signed)
        .replace(sha256, sha1)
        .replace(leaf.signature, signature)
    ]


def test_a_signature_by_sha1_is_none() -> None:
    """Although it is correct: two contents can be made to have one."""
    key = rsa.generate_private_key(65537, 2048)
    root = Authority("root", key=key)
    issued = root.issue(ID)
    assert verdict(root, root, issued) == ID
    assert sha1_in_place_of_sha256(issued, key)[0] != issued.der[0]
    with pytest.raises(errors.PeerIdentityError, match="UnsupportedSignatureAlgorithm"):
        core.verify_chain(sha1_in_place_of_sha256(issued, key), {"td": root.pem}, "", time.time(), "clients")


def test_the_expected_id_is_compared_by_equality(root: Authority, other: Authority) -> None:
    """No prefix, no case, no trailing slash."""
    issued = root.issue(ID)
    assert verdict(root, other, issued, ID) == ID
    for expected in ("spiffe://td/A", "spiffe://td/aa", "spiffe://td/", "spiffe://td2/a"):
        assert f"it is {ID}, but {expected} was expected" in verdict(root, other, issued, expected)


def test_a_chain_is_verified_with_the_roots_of_its_own_trust_domain_only(root: Authority, other: Authority) -> None:
    """A bundle is never a pool."""
    assert verdict(root, other, other.issue("spiffe://td2/a")) == "spiffe://td2/a"
    assert "no root in the bundle" in verdict(root, other, other.issue(ID))


def test_a_proof_lasts_as_long_as_the_shortest_of_its_path(root: Authority) -> None:
    """Of leaf, intermediates and root."""
    now = time.time()
    for leaf_end, between_end, expected in ((3000, 2000, 2000), (1000, 2000, 1000)):
        below = Authority("below", parent=root, end=between_end)
        found = core.verify_chain(below.issue(ID, end=leaf_end).der, {"td": root.pem}, "", now, "servers")
        assert abs(found["not_after"] - now - expected) < 30
        assert found["not_before"] < now


# ------------------------------------------------------------------ what a bundle may hold


ROOTS: dict[str, tuple[Callable[[], Authority], str]] = {
    "no CA": (lambda: Authority("x", extensions=[(x509.BasicConstraints(False, None), True)]), "is not a CA"),
    "constraints that can't be read": (
        lambda: Authority("x", extensions=[(unreadable(x509.BasicConstraints), True)]),
        "is not a CA",
    ),
    "may not sign": (lambda: Authority("x", extensions=[(usage("digital_signature"), True)]), "lacks keyCertSign"),
    "of another trust domain": (lambda: Authority("x", extensions=[(san(uri("spiffe://td2")), False)]), "another trust domain"),
    "the name of a workload": (lambda: Authority("x", extensions=[(san(uri(ID)), False)]), "SPIFFE ID of a workload"),
    "insists on something unknown": (
        lambda: Authority("x", extensions=[(x509.UnrecognizedExtension(x509.ObjectIdentifier("1.2.3"), b""), True)]),
        "critical extension",
    ),
}


@pytest.mark.parametrize("case", ROOTS)
def test_a_root_that_can_not_be_one_is_refused_when_it_is_loaded(case: str) -> None:
    """Loudly, with the name of the trust domain; the last good bundle stays in use."""
    make, reason = ROOTS[case]
    with pytest.raises(errors.IdentityError, match=reason):
        core.verify_chain([b""], {"td": make().pem}, "", 0.0, "servers")


def test_the_length_that_a_root_allows_counts() -> None:
    """Although it is an anchor: an intermediate that somebody made with the key of a last CA is none."""
    last = Authority("root", path_length=0)
    assert verdict(last, last, last.issue(ID)) == ID
    assert "PathLenConstraintViolated" in verdict(last, last, Authority("below", parent=last).issue(ID))


# ------------------------------------------------------------------ what its CA has taken back


def listed(
    revoked: Issued, key: Any, issuer: str = "root", kind: _ASN1Type = _ASN1Type.UTF8String, key_id: bytes | None = None
) -> bytes:
    """A list of one certificate, in a name written as one likes, with the key identifier that one likes."""
    written = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, issuer, kind)])
    own = x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key())
    builder = (
        x509.CertificateRevocationListBuilder(written, moment(-60), moment(3600))
        .add_extension(x509.CRLNumber(1), False)
        .add_extension(x509.AuthorityKeyIdentifier(key_id, None, None) if key_id else own, False)
        .add_revoked_certificate(x509.RevokedCertificateBuilder(revoked.serial, moment(-30)).build())
    )
    return builder.sign(key, hashes.SHA256()).public_bytes(Encoding.PEM)


def revocation(root: Authority, issued: Issued, lists: bytes) -> str:
    """Whether it is good, or why not."""
    try:
        core.verify_chain(issued.der, {"td": root.pem}, ID, time.time(), "clients", crls={"td": lists})
    except errors.MeshError as error:
        return str(error).split("\n")[0]
    return "good"


LISTS: dict[str, Callable[[Authority, Issued], bytes]] = {
    "as it should be": lambda root, issued: listed(issued, root.key),
    "with another key identifier": lambda root, issued: listed(issued, root.key, key_id=b"x" * 20),
    "in the name as another kind of text": lambda root, issued: listed(issued, root.key, kind=_ASN1Type.PrintableString),
    "in the name in other letters": lambda root, issued: listed(issued, root.key, "ROOT"),
    "in a name that nobody has": lambda root, issued: listed(issued, root.key, "nobody"),
}


@pytest.mark.parametrize("case", LISTS)
def test_what_the_root_has_listed_is_revoked_however_the_list_is_labelled(root: Authority, case: str) -> None:
    """Its signature says whose it is; and who isn't on it is not touched."""
    issued = root.issue(ID)
    lists = LISTS[case](root, issued)
    assert "was revoked by its CA" in revocation(root, issued, lists)
    assert revocation(root, root.issue(ID), lists) == "good"


def test_a_root_may_have_a_key_identifier_of_its_own_making() -> None:
    """RFC 7093 has several, and a list by another program has the one that this program computes."""
    root = Authority("root", extensions=[(x509.SubjectKeyIdentifier(b"\1" * 20), False)])
    issued = root.issue(ID)
    assert "was revoked by its CA" in revocation(root, issued, listed(issued, root.key))


@pytest.mark.parametrize("key_id", [None, b"x" * 20])
@pytest.mark.parametrize("kind", [_ASN1Type.UTF8String, _ASN1Type.PrintableString])
def test_a_list_in_the_name_of_a_root_that_it_did_not_sign_is_refused(
    root: Authority, key_id: bytes | None, kind: _ASN1Type
) -> None:
    """When it is loaded: whoever damages one extension must not switch revocation off."""
    issued, thief = root.issue(ID), ec.generate_private_key(ec.SECP256R1())
    forged = listed(issued, thief, kind=kind, key_id=key_id)
    for lists in (forged, listed(issued, root.key) + forged):
        assert "not signed by the root that it names" in revocation(root, issued, lists)


def test_a_list_left_over_from_a_root_that_is_gone_keeps_nothing_out(root: Authority) -> None:
    """A rotation takes the root away before the list."""
    issued, gone = root.issue(ID), ec.generate_private_key(ec.SECP256R1())
    left_over = listed(issued, gone, "the root before")
    assert revocation(root, issued, left_over) == "good"
    assert "was revoked by its CA" in revocation(root, issued, left_over + listed(issued, root.key))


# ------------------------------------------------------------------ how long it may take


def test_a_chain_made_to_be_searched_for_long_is_given_up_quickly(root: Authority, other: Authority) -> None:
    """Eight certificates that could stand above one another in any order: at most 100 signatures are checked."""
    leaf = Authority("root", parent=Authority("root")).issue(ID)
    maze = [each for _ in range(6) for each in Authority("root", parent=root).path]
    chain = leaf.der[:2] + [certificate.public_bytes(Encoding.DER) for certificate in maze]
    begun = time.perf_counter()
    with pytest.raises(errors.PeerIdentityError, match="MaximumSignatureChecksExceeded"):
        core.verify_chain(chain, {"td": root.pem}, "", time.time(), "clients")
    assert (len(chain), time.perf_counter() - begun < 1.0) == (8, True)


# ------------------------------------------------------------------ and that a handshake asks


WIRED = {
    name: BAD[name]
    for name in (
        "2: two URI names",
        "2: a NUL in a DNS name beside it",
        "3.1: no path",
        "3.1: SAN not critical without a subject",
        "4.1: cA",
        "4.3: key usage not critical",
        "4.4: serverAuth alone",
        "5.1: an intermediate that has expired",
        "5.1: deeper than pathlen allows",
        "5.1: even one that would allow it",
        "3.2: a signer of another trust domain",
        "4.3: a signer's key usage is not critical",
        "our root can't speak for another trust domain",
    )
}


@pytest.mark.parametrize("case", WIRED)
def test_a_handshake_refuses_it_on_either_side(root: Authority, other: Authority, tmp_path: Path, case: str) -> None:
    """Before a byte of the application has passed, in both directions."""
    make, reason = WIRED[case]
    issued, bundles = make(root), {"td": root.pem, "td2": other.pem}
    own = root.issue(SERVER)
    answering = core.TlsServer(own.chain, own.key, bundles, 1, True)
    wire, error, heard, _ = talk(answering, openssl_client(root, issued, tmp_path))
    assert (type(error), wire.peer, heard) == (errors.PeerIdentityError, None, b"")
    assert reason in str(error)
    mine = root.issue(CLIENT)
    asking = core.TlsClient(mine.chain, mine.key, bundles, 1)
    with openssl_server(root, issued, tmp_path) as peer:
        with pytest.raises(errors.PeerIdentityError, match=reason) as caught:
            call(asking, peer.port, "")
        assert (caught.value.is_written, peer.seen) == (False, b"")


@pytest.mark.parametrize("case", ["plain", "Ed25519", "RSA of 2048 bits", "P-384", "through an intermediate"])
def test_a_handshake_takes_what_is_right_on_either_side(root: Authority, tmp_path: Path, case: str) -> None:
    """With every kind of key that may be one."""
    issued, bundles = GOOD[case](root), {"td": root.pem}
    own = root.issue(SERVER)
    wire, error, heard, _ = talk(core.TlsServer(own.chain, own.key, bundles, 1, True), openssl_client(root, issued, tmp_path))
    assert (error, wire.peer, heard) == (None, ID, b"hello")
    mine = root.issue(CLIENT)
    with openssl_server(root, issued, tmp_path) as peer:
        assert call(core.TlsClient(mine.chain, mine.key, bundles, 1), peer.port, ID).peer == ID


# ------------------------------------------------------------------ the SPIFFE ID itself


VALID = [
    "spiffe://td",
    "spiffe://td/a/b/c",
    "spiffe://10.0.0.1/a",
    "spiffe://td/..a",
    "spiffe://a-b_c.d/A.B-C_9",
    "spiffe://td/" + "a" * 2036,
]
INVALID = [
    "", "td/a", "Spiffe://td/a", "SPIFFE://td/a", "spiffe:/td/a", "spiffe://", "spiffe:///a", "spiffe://td:443/a", "spiffe://u@td/a",
    "spiffe://t%64/a", "spiffe://TD/a", "spiffe://td/", "spiffe://td//a", "spiffe://td/a/", "spiffe://td/./a", "spiffe://td/../b",
    "spiffe://td/a?q", "spiffe://td/a#f", "spiffe://td?q", "spiffe://td/a\x00", "spiffe://td/a%2fb", "spiffe://t\u0501/a",
    "spiffe://td/\u00e9", "spiffe://td/a;b", "spiffe://td\\a", "spiffe://td/a\n", "spiffe://td/a b", " spiffe://td/a", "spiffe://td/a ",
    "spiffe://td/" + "a" * 2048, "spiffe://" + "d" * 256 + "/a", "spiffe://td/a:b", "spiffe://td/a*", "spiffe://[::1]/a", "//td/a",
    "http://td/a", "spiffe://td/a\t", "spiffe://\uff54d/a", "spiffe://td\x00/a", "spiffe://td/a\\b", "spiffe://td/%2e%2e/a",
]  # fmt: skip


def test_spiffe_ids_are_read_in_one_way() -> None:
    """SPIFFE-ID 2 to 2.4, in the strict reading: nothing is normalised, and lengths are capped."""
    for text in VALID:
        trust_domain, path = core.parse_spiffe_id(text)
        assert f"spiffe://{trust_domain}{path}" == text
    for text in INVALID:
        with pytest.raises(ValueError, match="is no SPIFFE ID"):
            core.parse_spiffe_id(text)
