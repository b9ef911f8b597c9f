"""Does a process stand up only with an identity that is whole, private and its own, and keep the last good one?"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import logging
import os
import pickle
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from cryptography.x509 import oid

from meshlib._native import core
from meshlib.errors import IdentityError, KeyFileError, MeshError, TrustDomainError
from meshlib.secure import (
    CertificateAuthority,
    FolderSource,
    Identity,
    IdentityStore,
    certificates,
    files,
)
from meshlib.secure.files import Secret
from tests.secure.stores import ID, LIFE, NOW, Clock, Tls, handshake, serial_in, store_of


@pytest.fixture(autouse=True)
def _generations_begin_at_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are counted for the process; each test here is one."""
    monkeypatch.setattr("meshlib.secure.identity._generations", itertools.count(1))


# ---------------------------------------------------------------------------------------------------- a good folder


def test_identity_holds_what_the_folder_says(source: FolderSource, out: Path) -> None:
    """Chain, key, the bundle under our trust domain, serial and times."""
    identity = source.load()
    assert dataclasses.asdict(identity) == {
        "spiffe_id": ID,
        "chain": (out / "orders" / "svid.pem").read_bytes(),
        "key": (out / "orders" / "key.pem").read_bytes(),
        "bundles": {"shop.internal": (out / "orders" / "bundle.pem").read_bytes()},
        "serial": serial_in(out / "orders"),
        "not_before": NOW - 30,
        "not_after": NOW + LIFE,
        "generation": 0,
        "crls": {},
        "notes": (),
    }
    assert identity.trust_domain == "shop.internal"


def test_unchanged_content_is_not_parsed_again(source: FolderSource, out: Path) -> None:
    """The same object comes back, even if the files were touched."""
    first = source.load()
    os.utime(out / "orders" / "svid.pem")
    assert source.load() is first


def test_chain_with_an_intermediate_is_supported_by_its_root(authority: CertificateAuthority, clock: Clock) -> None:
    """Signatures are followed through the chain in any order; without the intermediate they lead nowhere."""
    roots = authority._roots
    key, leaf_key = certificates.new_key(), certificates.new_key()
    root = roots.signing
    middle = certificates.new_root(key, "shop.internal", LIFE, NOW)
    middle = (
        x509.CertificateBuilder()
        .subject_name(middle.subject)
        .issuer_name(root.certificate.subject)
        .public_key(key.public_key())
        .serial_number(middle.serial_number)
        .not_valid_before(middle.not_valid_before_utc)
        .not_valid_after(middle.not_valid_after_utc)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(root.key, hashes.SHA256())
    )
    leaf = certificates.new_leaf(leaf_key, middle, key, ID, "", LIFE, NOW)
    other = certificates.new_root(leaf_key, "shop.internal", LIFE, NOW)
    found = [
        certificates.is_anchored(chain, [root.certificate])
        for chain in ([leaf, middle], [leaf, other, middle], [leaf], [leaf, other], [leaf, *[other] * 7, middle])
    ]
    assert found == [True, True, False, False, False]


def test_chain_that_runs_in_a_circle_is_supported_by_nobody() -> None:
    """Two CAs that signed each other lead nowhere, and the search ends."""
    one, two, key = certificates.new_key(), certificates.new_key(), certificates.new_key()
    first, second = (certificates.new_root(each, "shop.internal", LIFE, NOW) for each in (one, two))

    def crossed(subject: x509.Certificate, own: Any, issuer: x509.Certificate, by: Any) -> x509.Certificate:
        builder = certificates._builder(subject.subject, issuer.subject, own, 1, LIFE, NOW)
        return builder.sign(by, hashes.SHA256())

    leaf = certificates.new_leaf(key, first, one, ID, "", LIFE, NOW)
    chain = [leaf, crossed(first, one, second, two), crossed(second, two, first, one)]
    assert certificates.is_anchored(chain, []) is False
    assert certificates.is_anchored(chain, [second]) is True


# ---------------------------------------------------------------------------------------------------- bad files


def chmod(name: str, mode: int) -> Callable[[Path], None]:
    return lambda folder: (folder / name).chmod(mode)


def replace(name: str, content: bytes) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        (folder / name).write_bytes(content)

    return spoil


def link(name: str) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        (folder / name).rename(folder / "elsewhere")
        (folder / name).symlink_to("elsewhere")

    return spoil


def pipe(name: str) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        (folder / name).unlink()
        os.mkfifo(folder / name, 0o600)

    return spoil


def directory(name: str) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).mkdir(mode=0o700)

    return spoil


def missing(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def encrypt(folder: Path) -> None:
    key = load_pem_private_key((folder / "key.pem").read_bytes(), None)
    secret = serialization.BestAvailableEncryption(b"x")
    (folder / "key.pem").write_bytes(key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, secret))


def cut(name: str) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        (folder / name).write_bytes((folder / name).read_bytes()[:100])

    return spoil


FILE_FAULTS = [
    pytest.param(spoil, text, id=name)
    for name, spoil, text in [
        ("key readable by group and all", chmod("key.pem", 0o644), "key.pem may be opened by other users .*0644.*chmod 600"),
        (
            "key readable by all",
            chmod("key.pem", 0o604),
            "key.pem may be opened by other users .*0604.*issue a new key",
        ),
        ("key writable by group", chmod("key.pem", 0o620), "key.pem may be opened by other users .*0620"),
        ("key executable by all", chmod("key.pem", 0o601), "key.pem may be opened by other users .*0601"),
        ("svid writable by group", chmod("svid.pem", 0o664), "svid.pem may be changed by other users .*chmod 644"),
        ("svid writable by all", chmod("svid.pem", 0o646), "svid.pem may be changed"),
        ("bundle writable by group", chmod("bundle.pem", 0o664), "bundle.pem may be changed"),
        ("bundle writable by all", chmod("bundle.pem", 0o646), "bundle.pem may be changed"),
        ("folder writable by group", chmod(".", 0o770), "may be changed by other users .*chmod go-w"),
        ("folder writable by all", chmod(".", 0o703), "may be changed by other users"),
        *((f"{n} is a link", link(n), "symbolic link") for n in ("key.pem", "svid.pem", "bundle.pem")),
        *((f"{n} is a pipe", pipe(n), "not a regular file") for n in ("key.pem", "svid.pem", "bundle.pem")),
        *((f"{n} is a folder", directory(n), "not a regular file") for n in ("key.pem", "svid.pem", "bundle.pem")),
        *((f"{n} is missing", missing(n), f"{n} does not exist") for n in ("key.pem", "svid.pem", "bundle.pem")),
        *((f"{n} is empty", replace(n, b""), "in PEM") for n in ("key.pem", "svid.pem", "bundle.pem")),
        *((f"{n} is cut off", cut(n), "Was it cut off") for n in ("key.pem", "svid.pem", "bundle.pem")),
        *((f"{n} is huge", replace(n, b"x" * (files.LIMIT + 1)), "larger than") for n in ("key.pem", "svid.pem")),
        ("key is encrypted", encrypt, "key.pem is encrypted"),
    ]
]


@pytest.mark.parametrize(("spoil", "text"), FILE_FAULTS)
def test_spoiled_file_is_refused_with_the_way_out(
    source: FolderSource, out: Path, spoil: Callable[[Path], None], text: str
) -> None:
    """Whatever it is: one exception, with the path, the cause, and what to do."""
    spoil(out / "orders")
    with pytest.raises(KeyFileError, match=text) as caught:
        source.load()
    assert str(out / "orders") in caught.value.message
    assert caught.value.hint
    assert caught.value.reason == "secure.key_file"


def test_fault_of_permission_counts_although_the_content_is_unchanged(source: FolderSource, out: Path) -> None:
    """A key that was opened to others later is no longer a secret."""
    source.load()
    (out / "orders" / "key.pem").chmod(0o644)
    with pytest.raises(KeyFileError, match="may be opened"):
        source.load()


@pytest.mark.parametrize("name", ["key.pem", "svid.pem", "bundle.pem", "."])
def test_file_of_another_user_is_refused(source: FolderSource, out: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only oneself or root may have written what we believe."""
    if os.geteuid() == 0:
        os.chown(out / "orders" / name, 12345, -1)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: 12345)
    with pytest.raises(KeyFileError, match=r"belongs to user .* chown"):
        source.load()


def test_file_of_root_is_believed(source: FolderSource, monkeypatch: pytest.MonkeyPatch) -> None:
    """A service runs as its own user, and root has put the files there."""
    real = os.fstat
    monkeypatch.setattr(os, "geteuid", lambda: 12345)

    def of_root(fd: int) -> os.stat_result:
        found = list(real(fd))
        found[4] = 0
        return os.stat_result(found)

    monkeypatch.setattr(os, "fstat", of_root)
    assert source.load().spiffe_id == ID


def test_file_that_may_not_be_read_is_refused(source: FolderSource, monkeypatch: pytest.MonkeyPatch) -> None:
    """The operating system says no, and the message says to whom."""
    real = os.open

    def refuse(path: Any, flags: int, *more: Any, **named: Any) -> int:
        if path == "key.pem":
            raise PermissionError(13, "Permission denied")
        return real(path, flags, *more, **named)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(KeyFileError, match=f"key.pem may not be read by user {os.geteuid()}"):
        source.load()


def test_missing_folder_is_refused(tmp_path: Path) -> None:
    """And the hint names the command that makes it."""
    with pytest.raises(KeyFileError, match=r"does not exist.*meshlib ca issue"):
        FolderSource(tmp_path, "orders", "shop.internal", ID).load()


# ---------------------------------------------------------------------------------------------------- wrong content


def test_key_of_another_certificate_is_refused(source: FolderSource, out: Path, authority: CertificateAuthority) -> None:
    """Otherwise every handshake would fail, with a message about signatures."""
    (out / "orders" / "key.pem").write_bytes(authority.issue("orders").key)
    with pytest.raises(KeyFileError, match=r"key.pem is not the key of .*svid.pem"):
        source.load()


@pytest.mark.parametrize("domain", ["other.internal", "shop.internal.evil", "shop", "sub.shop.internal"])
def test_certificate_of_another_trust_domain_is_refused(tmp_path: Path, clock: Clock, domain: str) -> None:
    """Trust domains compare by equality: neither a beginning nor an end is enough."""
    CertificateAuthority.create(None, domain, clock=clock).write("orders", tmp_path, ttl=LIFE)
    with pytest.raises(TrustDomainError, match=f"svid.pem is of the trust domain {domain}") as caught:
        FolderSource(tmp_path, "orders", "shop.internal", ID, wall_clock=clock).load()
    assert caught.value.reason == "secure.trust_domain"


def test_bundle_with_a_root_of_another_trust_domain_is_refused(source: FolderSource, out: Path, clock: Clock) -> None:
    """One foreign root in it would let foreign certificates speak for our services."""
    foreign = CertificateAuthority.create(None, "other.internal", clock=clock).bundle
    with (out / "orders" / "bundle.pem").open("ab") as bundle:
        bundle.write(foreign)
    with pytest.raises(TrustDomainError, match="bundle.pem is of the trust domain other.internal"):
        source.load()


def test_certificate_of_another_service_is_refused(out: Path, clock: Clock) -> None:
    """The trust domain is right, the ID is not."""
    source = FolderSource(out, "orders", "shop.internal", ID.replace("orders", "web"), wall_clock=clock)
    with pytest.raises(IdentityError, match=r"svid.pem is for .*/orders, and this service is .*/web") as caught:
        source.load()
    assert not isinstance(caught.value, TrustDomainError | KeyFileError)


@pytest.mark.parametrize(
    ("after", "text"), [(-31, "not valid before"), (-30, ""), (LIFE - 1, ""), (LIFE, "expired"), (1e9, "expired")]
)
def test_certificate_counts_only_while_it_is_valid(source: FolderSource, clock: Clock, after: float, text: str) -> None:
    """From its start to just before its end."""
    clock.now += after
    if text:
        with pytest.raises(IdentityError, match=text):
            source.load()
    else:
        assert source.load().spiffe_id == ID


USAGE = {name: False for name in certificates._KEY_USES}
SERVER, CLIENT = oid.ExtendedKeyUsageOID.SERVER_AUTH, oid.ExtendedKeyUsageOID.CLIENT_AUTH
NAMES = x509.SubjectAlternativeName([x509.UniformResourceIdentifier(ID)])
LEAF_USAGE = x509.KeyUsage(**{**USAGE, "digital_signature": True})


@pytest.mark.parametrize(
    ("extensions", "flaw"),
    [
        ([NAMES, LEAF_USAGE], ""),
        ([NAMES, LEAF_USAGE, x509.ExtendedKeyUsage([SERVER, CLIENT])], ""),
        ([LEAF_USAGE], "0 URI names"),
        ([x509.SubjectAlternativeName([x509.DNSName("orders")]), LEAF_USAGE], "0 URI names"),
        ([x509.SubjectAlternativeName([*NAMES, x509.UniformResourceIdentifier(ID + "2")]), LEAF_USAGE], "2 URI names"),
        ([x509.SubjectAlternativeName([*NAMES, *NAMES]), LEAF_USAGE], "2 URI names"),
        (
            [x509.SubjectAlternativeName([x509.UniformResourceIdentifier("spiffe://shop.internal")]), LEAF_USAGE],
            "not the SPIFFE ID of a workload",
        ),
        (
            [x509.SubjectAlternativeName([x509.UniformResourceIdentifier("spiffe://shop.internal/")]), LEAF_USAGE],
            "not the SPIFFE ID of a workload",
        ),
        ([NAMES, LEAF_USAGE, x509.BasicConstraints(ca=True, path_length=0)], "certificate of a CA"),
        ([NAMES], "no key usage"),
        ([NAMES, x509.KeyUsage(**{**USAGE, "key_encipherment": True})], "key usage is not"),
        ([NAMES, x509.KeyUsage(**{**USAGE, "digital_signature": True, "key_cert_sign": True})], "key usage is not"),
        ([NAMES, x509.KeyUsage(**{**USAGE, "digital_signature": True, "crl_sign": True})], "key usage is not"),
        ([NAMES, LEAF_USAGE, x509.ExtendedKeyUsage([SERVER])], "both server and client"),
        ([NAMES, LEAF_USAGE, x509.ExtendedKeyUsage([CLIENT])], "both server and client"),
    ],
)
def test_certificate_that_is_no_workload_svid_is_refused(
    source: FolderSource,
    out: Path,
    authority: CertificateAuthority,
    extensions: list[x509.ExtensionType],
    flaw: str,
) -> None:
    """Every rule of SPIFFE that a peer will hold against us is held against us at the start."""
    root, key = authority._roots.signing, certificates.new_key()
    builder = certificates._builder(x509.Name([]), root.certificate.subject, key, 1, LIFE, NOW)
    for extension in extensions:
        builder = builder.add_extension(extension, critical=False)
    (out / "orders" / "svid.pem").write_bytes(certificates.pem(builder.sign(root.key, hashes.SHA256())))
    (out / "orders" / "key.pem").write_bytes(certificates.key_pem(key))
    if flaw:
        with pytest.raises(IdentityError, match=flaw):
            source.load()
    else:
        assert source.load().serial == "01"


def test_malformed_extension_is_refused_like_any_other_fault(source: FolderSource, out: Path, clock: Clock) -> None:
    """What can't be parsed raises our own error, not the parser's."""
    authority = CertificateAuthority.create(None, "shop.internal", clock=clock)
    root, key = authority._roots.signing, certificates.new_key()
    builder = certificates._builder(x509.Name([]), root.certificate.subject, key, 1, LIFE, NOW)
    broken = x509.UnrecognizedExtension(oid.ExtensionOID.SUBJECT_ALTERNATIVE_NAME, b"\x30\x80garbage")
    certificate = builder.add_extension(broken, critical=False).sign(root.key, hashes.SHA256())
    (out / "orders" / "svid.pem").write_bytes(certificates.pem(certificate))
    (out / "orders" / "key.pem").write_bytes(certificates.key_pem(key))
    with pytest.raises(KeyFileError, match="malformed certificate"):
        source.load()


# ---------------------------------------------------------------------------------------------------- the store


def test_first_identity_is_required_and_raises_what_is_wrong(store: IdentityStore, out: Path) -> None:
    """Nothing may start without one, and the cause is told as the source told it."""
    (out / "orders" / "key.pem").chmod(0o644)
    for _ in range(2):
        with pytest.raises(KeyFileError, match="may be opened by other users"):
            store.require(0.0)
    assert (store.current, store.client_tls, store.failures) == (None, None, 2)
    (out / "orders" / "key.pem").chmod(0o600)
    assert store.require(0.0) is store.current
    assert store.last_error is None


def test_generation_is_one_whole(store: IdentityStore, source: FolderSource) -> None:
    """Identity, client and server side are of the same generation and made of the same parts."""
    store.require(0.0)
    identity = source.load()
    client: Any = store.client_tls
    server: Any = store.server_tls(True)
    parts = (identity.chain, identity.key, identity.bundles, 1)
    assert (client.chain, client.key, client.bundles, client.generation, client.more) == (*parts, ())
    assert (server.chain, server.key, server.bundles, server.generation, server.more) == (*parts, (True,))
    # TLS libraries written in C refuse subclasses of bytes.
    assert (type(client.key), type(client.chain)) == (bytes, bytes)


def test_tls_objects_live_as_long_as_their_generation(store: IdentityStore, out: Path, authority: CertificateAuthority) -> None:
    """The same objects until the identity changes (sessions are kept), then all of them anew (sessions die)."""
    store.require(0.0)
    first = [store.client_tls, store.server_tls(True), store.server_tls(False)]
    assert store.refresh(1.0) is False
    assert [store.client_tls, store.server_tls(True), store.server_tls(False)] == first
    authority.write("orders", out, ttl=LIFE)
    assert store.refresh(2.0) is True
    second: list[Any] = [store.client_tls, store.server_tls(True), store.server_tls(False)]
    assert all(new is not old for new, old in zip(second, first, strict=True))
    assert [each.generation for each in second] == [2, 2, 2]
    assert [each.more for each in second] == [(), (True,), (False,)]
    # Each goes on with the counters of its predecessor, and holds nothing else of it.
    assert [each.before for each in second] == first


def test_changed_bundle_alone_is_a_new_generation(store: IdentityStore, out: Path, authority: CertificateAuthority) -> None:
    """Sessions that a removed root vouched for must die with it."""
    store.require(0.0)
    authority.begin_rotation()
    authority.publish(out)
    assert store.refresh(1.0) is True
    current = store.current
    assert current is not None
    assert (current.generation, current.bundles, store.rotations) == (2, {"shop.internal": authority.bundle}, 1)


def test_rotation_is_told_after_it_is_in_force(store: IdentityStore, out: Path, authority: CertificateAuthority) -> None:
    """Each callback gets the new identity once; one that fails keeps nobody else from it."""
    told: list[tuple[str, Identity | None]] = []

    def fail(_: Identity) -> None:
        raise RuntimeError("callback")

    store.on_change(fail)
    store.on_change(lambda identity: told.append((identity.serial, store.current)))
    store.require(0.0)
    store.refresh(1.0)
    authority.write("orders", out, ttl=LIFE)
    store.refresh(2.0)
    assert [serial for serial, _ in told] == [current.serial for _, current in told if current]
    assert len({serial for serial, _ in told}) == len(told) == 2
    assert (store.rotations, store.failures) == (1, 0)


def test_half_written_pair_keeps_the_last_good(store: IdentityStore, out: Path, authority: CertificateAuthority) -> None:
    """Key without certificate, then both: no step between them is ever used."""
    first = store.require(0.0)
    issued = authority.issue("orders", ttl=LIFE)
    (out / "orders" / "key.pem").write_bytes(issued.key)
    assert (store.refresh(1.0), store.current, store.failures) == (False, first, 1)
    assert isinstance(store.last_error, KeyFileError)
    (out / "orders" / "svid.pem").write_bytes(issued.chain)
    assert (store.refresh(2.0), store.failures) == (True, 1)
    assert store.last_error is None
    current = store.current
    assert current is not None
    assert (current.serial, current.key, current.generation) == (issued.serial, issued.key, 2)


@pytest.mark.parametrize(("spoil", "text"), FILE_FAULTS)
def test_last_good_identity_survives_every_fault(
    store: IdentityStore, out: Path, spoil: Callable[[Path], None], text: str
) -> None:
    """The process goes on with what it has, and tells."""
    first, client = store.require(0.0), store.client_tls
    spoil(out / "orders")
    assert (store.refresh(1.0), store.refresh(2.0)) == (False, False)
    assert (store.current, store.client_tls, store.failures) == (first, client, 2)


def test_writer_in_the_middle_is_read_once_more(
    source: FolderSource, out: Path, authority: CertificateAuthority, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second file arrives while the first is judged: that is no failure."""
    source.load()
    issued = authority.issue("orders", ttl=LIFE)
    (out / "orders" / "key.pem").write_bytes(issued.key)
    real, calls = source._read, []

    def read() -> Any:
        found = real()
        calls.append(found)
        (out / "orders" / "svid.pem").write_bytes(issued.chain)
        return found

    monkeypatch.setattr(source, "_read", read)
    assert (source.load().serial, len(calls)) == (issued.serial, 2)


def test_reader_never_gets_half_of_a_pair(out: Path, authority: CertificateAuthority, source: FolderSource) -> None:
    """While another thread rotates 40 times, each identity that comes out has its own key, and the last one comes out."""
    written: list[str] = []
    writer = threading.Thread(target=lambda: written.extend(authority.write("orders", out, ttl=LIFE).serial for _ in range(40)))
    writer.start()
    while writer.is_alive():
        try:
            identity = source.load()
        except IdentityError:
            continue
        leaf = x509.load_pem_x509_certificate(identity.chain)
        assert load_pem_private_key(identity.key, None).public_key() == leaf.public_key()
    assert source.load().serial == written[-1]


def test_withdrawn_root_counts_at_once_even_beside_a_bad_pair(
    store: IdentityStore, out: Path, authority: CertificateAuthority
) -> None:
    """Trust is never kept because the certificate beside it can't be used; the fault is told by the next refresh."""
    first = store.require(0.0)
    authority.begin_rotation()
    authority.publish(out)
    store.refresh(1.0)
    (out / "orders" / "key.pem").write_bytes(b"half")
    authority.activate_rotation()
    authority.finish_rotation(force=True)
    authority.publish(out)
    assert (store.refresh(2.0), store.failures) == (True, 0)
    current = store.current
    assert current is not None
    assert (current.serial, current.bundles) == (first.serial, {"shop.internal": authority.bundle})
    assert (store.refresh(3.0), store.failures, store.current) == (False, 1, current)


def test_bundle_that_comes_back_is_taken_again(store: IdentityStore, source: FolderSource, out: Path) -> None:
    """After a withdrawal beside a bad pair the source forgets what it had seen: an undo is a change, too."""
    first = store.require(0.0)
    key, bundle = ((out / "orders" / name).read_bytes() for name in ("key.pem", "bundle.pem"))
    (out / "orders" / "key.pem").write_bytes(b"half")
    (out / "orders" / "bundle.pem").write_bytes(bundle + b"\n")
    store.refresh(1.0)
    (out / "orders" / "key.pem").write_bytes(key)
    (out / "orders" / "bundle.pem").write_bytes(bundle)
    assert store.refresh(2.0) is True
    current = store.current
    assert current is not None
    assert (current.bundles, current.generation) == (first.bundles, 3)


def test_certificate_that_no_root_of_the_bundle_supports_is_not_taken(store: IdentityStore, out: Path, clock: Clock) -> None:
    """At the start it is refused; later the last good one stays, as long as the bundle is the same."""
    bundle = (out / "orders" / "bundle.pem").read_bytes()
    stranger = CertificateAuthority.create(None, "shop.internal", clock=clock)
    first = store.require(0.0)
    stranger.write("orders", out, ttl=LIFE)
    (out / "orders" / "bundle.pem").write_bytes(bundle)
    assert (store.refresh(1.0), store.current, store.failures) == (False, first, 1)
    with pytest.raises(IdentityError, match="signed by no root of our bundle"):
        store_of(FolderSource(out, "orders", "shop.internal", ID, wall_clock=clock), clock).require(0.0)


def test_bundle_without_our_own_root_counts_all_the_same(
    store: IdentityStore, out: Path, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    """The root was thrown out before our certificate was issued anew: we don't go on trusting it, and say so."""
    first = store.require(0.0)
    bundle = CertificateAuthority.create(None, "shop.internal", clock=clock).bundle
    (out / "orders" / "bundle.pem").write_bytes(bundle)
    assert store.refresh(1.0) is True
    current = store.current
    assert current is not None
    assert (current.serial, current.bundles) == (first.serial, {"shop.internal": bundle})
    assert "signed by no root of our bundle" in caplog.text


def test_empty_bundle_is_no_withdrawal_but_a_fault(store: IdentityStore, out: Path) -> None:
    """A file that was cut off must not make us trust nobody, nor anybody."""
    first = store.require(0.0)
    (out / "orders" / "bundle.pem").write_bytes(b"")
    assert (store.refresh(1.0), store.current, store.failures) == (False, first, 1)


def test_identity_that_the_native_core_refuses_is_not_taken(
    source: FolderSource, out: Path, authority: CertificateAuthority, clock: Clock
) -> None:
    """Neither side of the new generation is put in force if one of them can't be built."""
    broken: list[bool] = []

    def server(*parts: Any, **more: Any) -> Tls:
        if broken:
            raise ValueError("the core says no")
        return Tls(*parts, **more)

    store = store_of(source, clock, tls_server=server)
    first, listening = store.require(0.0), store.server_tls(True)
    broken.append(True)
    authority.write("orders", out, ttl=LIFE)
    assert (store.refresh(1.0), store.current, store.failures) == (False, first, 1)
    assert store.server_tls(True) is listening
    assert (type(store.last_error), "the core says no" in str(store.last_error)) == (IdentityError, True)
    broken.clear()
    assert (store.refresh(2.0), store.last_error) == (True, None)


def test_fault_is_logged_once_and_again_when_it_changes(
    store: IdentityStore, out: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Files are polled each second; the log is not to be filled."""
    store.require(0.0)
    caplog.clear()
    (out / "orders" / "key.pem").chmod(0o644)
    for now in (1.0, 2.0, 3.0):
        store.refresh(now)
    (out / "orders" / "key.pem").unlink()
    store.refresh(4.0)
    told = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    assert ["may be opened" in told[0], "does not exist" in told[1], len(told)] == [True, True, 2]
    assert store.failures == 4


def test_alarm_is_raised_once_when_three_quarters_of_the_life_are_gone(
    store: IdentityStore, out: Path, authority: CertificateAuthority, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    """And is over when the certificate is renewed. The life counts from its start, half a minute before it was issued."""
    store.require(0.0)
    seen = []
    for gone in (0.5, 0.75, 0.76, 0.99, 1.0):
        clock.now = NOW - 30 + gone * (LIFE + 30)
        store.refresh(1.0)
        seen.append((store.is_overdue, store.is_expired, caplog.text.count("nothing renewed it")))
    assert seen == [(False, False, 0), (False, False, 0), (True, False, 1), (True, False, 1), (True, True, 1)]
    authority.write("orders", out, ttl=LIFE)
    store.refresh(2.0)
    assert (store.is_overdue, store.is_expired) == (False, False)
    clock.now += LIFE
    store.refresh(3.0)
    assert caplog.text.count("nothing renewed it") == 2


def test_expired_identity_stays_until_there_is_a_better_one(store: IdentityStore, clock: Clock) -> None:
    """Peers will refuse it; to drop it would gain nothing, and a clock that jumped would end the process."""
    first = store.require(0.0)
    clock.now += 10 * LIFE
    store.refresh(1.0)
    assert (store.current, store.is_expired) == (first, True)


def test_next_refresh_is_a_second_after_the_last(store: IdentityStore, out: Path) -> None:
    """Also after a failure."""
    store.require(100.0)
    assert store.next_refresh == 101.0
    (out / "orders" / "key.pem").unlink()
    store.refresh(200.0)
    assert store.next_refresh == 201.0


def test_mode_observe_needs_no_identity_and_the_others_do(clock: Clock) -> None:
    """A missing source is refused at once where it is needed."""
    store = store_of(None, clock, mode="observe")
    assert (store.refresh(0.0), store.current, store.client_tls) == (False, None, None)
    with pytest.raises(IdentityError, match="no identity to serve"):
        store.server_tls(True)
    with pytest.raises(IdentityError, match="no identity is configured"):
        store.require(0.0)
    for mode in ("permissive", "enforce"):
        with pytest.raises(IdentityError, match=f"mode {mode} needs an identity"):
            store_of(None, clock, mode=mode)


def test_refresh_never_raises_and_the_identity_may_come_later(source: FolderSource, clock: Clock, out: Path) -> None:
    """In mode observe a service can be configured before its certificate is there."""
    (out / "orders").rename(out / "away")
    store = store_of(source, clock, mode="observe")
    assert (store.refresh(0.0), store.failures, isinstance(store.last_error, KeyFileError)) == (False, 1, True)
    (out / "away").rename(out / "orders")
    assert (store.refresh(1.0), store.current is not None) == (True, True)


def test_all_threads_get_the_same_server_side(store: IdentityStore) -> None:
    """Two objects would have two sets of session tickets, and every other resumption would fail."""
    store.require(0.0)
    barrier, found = threading.Barrier(8), []

    def ask() -> None:
        barrier.wait()
        found.append(store.server_tls(True))

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(map(id, found))) == 1


def test_forked_child_has_the_identity_and_tls_objects_of_its_own(store: IdentityStore) -> None:
    """Same generation, but no session of the parent; a refresh that was under way in the parent blocks nobody."""
    first = store.require(0.0)
    before = [store.client_tls, store.server_tls(True)]
    store._refreshing.acquire()
    store.after_fork()
    after: list[Any] = [store.client_tls, store.server_tls(True)]
    assert all(new is not old for new, old in zip(after, before, strict=True))
    assert [each.before for each in after] == [None, None]
    assert store.current is first
    assert store.refresh(1.0) is False


# ---------------------------------------------------------------------------------------------------- on the wire


def test_root_is_turned_over_between_two_processes_without_a_refused_handshake(tmp_path: Path) -> None:
    """Each step reaches one side before the other; full handshakes after each change, resumed ones between them."""
    authority = CertificateAuthority.create(tmp_path / "ca", "shop.internal")

    def member(service: str) -> IdentityStore:
        authority.write(service, tmp_path)
        source = FolderSource(tmp_path, service, "shop.internal", authority.id_of(service))
        store = IdentityStore(source, mode="enforce")
        store.require(0.0)
        return store

    orders, web = member("orders"), member("web")
    peers = (authority.id_of("web"), authority.id_of("orders"))
    assert [handshake(orders, web), handshake(orders, web)] == [(*peers, False), (*peers, True)]
    steps: list[tuple[Callable[[], object], Callable[..., object]]] = [
        (authority.begin_rotation, authority.publish),
        (authority.activate_rotation, authority.reissue),
        (authority.finish_rotation, authority.publish),
    ]
    for number, (step, spread) in enumerate(steps):
        step()
        spread(tmp_path)
        for late in (orders, web) if number % 2 else (web, orders):
            assert late.refresh(1.0) is True
            assert [handshake(orders, web), handshake(orders, web)] == [(*peers, False), (*peers, True)]
    assert (orders.rotations, web.rotations) == (3, 3)

    authority.begin_rotation()
    authority.activate_rotation()
    authority.finish_rotation(force=True)
    authority.write("orders", tmp_path)
    orders.refresh(2.0)
    # Its root was thrown out: the client's session is worth nothing either.
    with pytest.raises(MeshError, match="did not prove its identity"):
        handshake(orders, web)


def test_what_tls_counted_goes_on_over_rotations_and_begins_anew_in_a_child(tmp_path: Path) -> None:
    """Sums over all generations and over both kinds of server; what ends after the rotation is counted too."""
    authority = CertificateAuthority.create(tmp_path / "ca", "shop.internal")
    stores = []
    for service in ("orders", "web"):
        authority.write(service, tmp_path)
        source = FolderSource(tmp_path, service, "shop.internal", authority.id_of(service))
        stores.append(IdentityStore(source, mode="enforce"))
    orders, web = stores
    assert orders.tls_stats() == {}
    for store in stores:
        store.require(0.0)
    handshake(orders, web)
    handshake(orders, web)
    late = core.HttpConnection(web.client_tls, ID, "server")
    late.open()
    for store, service in zip(stores, ("orders", "web"), strict=True):
        authority.write(service, tmp_path)
        assert store.refresh(1.0) is True
    handshake(orders, web)
    orders.server_tls(False)
    with pytest.raises(MeshError):
        late.receive_eof()
    ended = {"full": 2, "resumed": 1}
    lost = {"failed": 1, "failed_identity": 0, "failed_refused": 0, "failed_protocol": 0, "failed_lost": 1}
    client = web.tls_stats()["client"]
    assert {name: client[name] for name in (*ended, *lost)} == {**ended, **lost}
    assert orders.tls_stats()["server"] == {**ended, **dict.fromkeys(lost, 0)}
    # Of the tickets only those of this generation are held.
    assert (client["tickets_used"], client["tickets_held"] < client["tickets_stored"]) == (2, True)
    for store in stores:
        store.after_fork()
    assert (set(web.tls_stats()["client"].values()), set(orders.tls_stats()["server"].values())) == ({0}, {0})


def test_client_side_knows_the_end_of_its_own_certificate(out: Path, authority: CertificateAuthority) -> None:
    """So that what depends on it ends before."""
    ours = FolderSource(out, "orders", "shop.internal", ID, wall_clock=lambda: NOW).load()
    assert core.TlsClient(ours.chain, ours.key, ours.bundles, 1).not_after == NOW + LIFE
    assert core.TlsClient(None, None, ours.bundles, 1).not_after == float("inf")


# ---------------------------------------------------------------------------------------------------- secrets


@pytest.fixture
def secrets_of(out: Path) -> Callable[[], set[str]]:
    """What must never show: the lines of the key file, in any of its forms."""

    def lines() -> set[str]:
        text = (out / "orders" / "key.pem").read_bytes()
        shown = {line.decode() for line in text.splitlines() if not line.startswith(b"--")}
        return {line[:40] for line in shown} | {repr(line.encode())[2:42] for line in shown}

    return lines


def test_identity_never_shows_its_key(source: FolderSource, secrets_of: Callable[[], set[str]]) -> None:
    """Not in repr, str, format, or inside another object's repr."""
    identity = source.load()
    shown = f"{identity!r} {identity!s} {identity} {[identity]} {dict(a=identity)}"
    assert not any(secret in shown for secret in secrets_of())
    assert "PRIVATE" not in shown
    assert identity.serial in shown


@pytest.mark.parametrize("way", [pickle.dumps, copy.copy, copy.deepcopy])
def test_identity_and_secret_refuse_to_be_pickled_or_copied(source: FolderSource, way: Callable[[Any], Any]) -> None:
    """Multiprocessing, caches and crash reporters would carry the key along."""
    for thing in (source.load(), Secret(b"x"), [Secret(b"x")]):
        if thing.__class__ is list and way is copy.copy:
            continue
        with pytest.raises(TypeError, match="pickled"):
            way(thing)


def test_secret_is_bytes_that_never_show() -> None:
    """It works where bytes do, and reads the same in every form."""
    secret = Secret(b"abc")
    assert secret == b"abc"
    ways = ["{}", "{!s}", "{!r}", "{:>17}"]
    assert {repr(secret), str(secret), *(way.format(secret) for way in ways)} == {"<secret, 3 bytes>"}


@pytest.mark.parametrize(("spoil", "text"), FILE_FAULTS)
def test_errors_logs_and_tracebacks_never_show_the_key(
    store: IdentityStore,
    out: Path,
    spoil: Callable[[Path], None],
    text: str,
    secrets_of: Callable[[], set[str]],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Whatever fails: arguments, attributes, the log, and a traceback with all local variables, as crash reporters make."""
    secrets = secrets_of()
    caplog.set_level(logging.DEBUG)
    store.require(0.0)
    spoil(out / "orders")
    if (out / "orders" / "key.pem").is_file():
        secrets |= secrets_of()
    try:
        store._source.load()  # type: ignore[union-attr]
    except MeshError as error:
        below = error.__traceback__.tb_next if error.__traceback__ else None  # our own frame knows the key, of course
        report = "".join(traceback.TracebackException(type(error), error, below, capture_locals=True).format())
        assert "self = " in report
        shown = f"{report} {error!r} {error!s} {error.args} {vars(error)}"
    store.refresh(1.0)
    shown += caplog.text + repr(store.last_error) + repr(vars(store))
    assert store.failures == 1
    assert not any(secret in shown for secret in secrets if len(secret) > 10)


def test_error_that_is_kept_holds_no_frames(store: IdentityStore, out: Path) -> None:
    """Its local variables would keep the key alive."""
    store.require(0.0)
    (out / "orders" / "svid.pem").write_bytes(b"")
    store.refresh(1.0)
    assert store.last_error is not None
    assert store.last_error.__traceback__ is None


@pytest.fixture(autouse=True)
def _is_logged(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    with caplog.at_level(logging.INFO, "meshlib.secure"):
        yield
