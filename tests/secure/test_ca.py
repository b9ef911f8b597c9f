"""Does the embedded CA issue what SPIFFE asks for, keep its keys to itself, and turn its root over without a gap?"""

from __future__ import annotations

import datetime
import json
import os
import pickle
import secrets
import shutil
import stat
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from cryptography.x509 import verification
from cryptography.x509.oid import ExtendedKeyUsageOID

from meshlib.errors import IdentityError, KeyFileError
from meshlib.secure import CertificateAuthority, Issued, certificates, files
from meshlib.secure.ca import DAY, LEAF_LIFE
from meshlib.secure.roots import ACTIVATED, BEGUN, STEADY
from tests.secure.crashes import is_done

NOW = 1_800_000_000.0


class Clock:
    """A wall clock that is moved by hand."""

    def __init__(self, now: float = NOW) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def authority(tmp_path: Path, clock: Clock) -> CertificateAuthority:
    return CertificateAuthority.create(tmp_path / "ca", "shop.internal", clock=clock)


def roots_of(bundle: bytes) -> list[x509.Certificate]:
    return x509.load_pem_x509_certificates(bundle)


def leaf_of(issued: Issued) -> x509.Certificate:
    return x509.load_pem_x509_certificate(issued.chain)


def issuer_in(folder: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate((folder / "issuer.pem").read_bytes())


def is_accepted(issued: Issued, bundle: bytes, now: float = NOW) -> bool:
    """The verdict of a verifier that isn't ours: cryptography's, for a client certificate."""
    policy = verification.PolicyBuilder().store(verification.Store(roots_of(bundle)))
    verifier = policy.time(datetime.datetime.fromtimestamp(now, datetime.UTC)).build_client_verifier()
    try:
        verified = verifier.verify(leaf_of(issued), x509.load_pem_x509_certificates(issued.chain)[1:])
    except verification.VerificationError:
        return False
    return x509.UniformResourceIdentifier(issued.spiffe_id) in (verified.subjects or [])


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


# ---------------------------------------------------------------------------------------------------- certificates


def test_root_and_issuer_follow_spiffe(authority: CertificateAuthority, tmp_path: Path) -> None:
    """Both name their trust domain without a path; one level of CAs under the root, none under the issuer; critical usage."""
    (root,) = roots_of(authority.bundle)
    issuer = issuer_in(tmp_path / "ca")
    for certificate, depth in ((root, 1), (issuer, 0)):
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        constraints = certificate.extensions.get_extension_for_class(x509.BasicConstraints)
        usage = certificate.extensions.get_extension_for_class(x509.KeyUsage)
        assert list(names) == [x509.UniformResourceIdentifier("spiffe://shop.internal")]
        assert (constraints.critical, constraints.value) == (True, x509.BasicConstraints(ca=True, path_length=depth))
        assert usage.critical
        assert (usage.value.key_cert_sign, usage.value.crl_sign, usage.value.digital_signature) == (True, True, False)
        certificate.verify_directly_issued_by(root)


def test_chain_is_leaf_and_issuer_and_the_bundle_is_roots_only(authority: CertificateAuthority, tmp_path: Path) -> None:
    """What a service shows leads to the root without it, and what it trusts is never an intermediate."""
    issued = authority.issue("orders")
    leaf, issuer = x509.load_pem_x509_certificates(issued.chain)
    assert issuer == issuer_in(tmp_path / "ca")
    leaf.verify_directly_issued_by(issuer)
    (root,) = roots_of(issued.bundle)
    assert root == x509.load_pem_x509_certificate((tmp_path / "ca" / "root.pem").read_bytes())


def test_leaf_follows_spiffe(authority: CertificateAuthority) -> None:
    """A leaf has one URI with a path beside one DNS name, critical with its empty subject, and serves both ends."""
    leaf = leaf_of(authority.issue("orders", namespace="prod"))
    names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    constraints = leaf.extensions.get_extension_for_class(x509.BasicConstraints)
    usage = leaf.extensions.get_extension_for_class(x509.KeyUsage)
    purposes = leaf.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert leaf.subject == x509.Name([])
    assert (names.critical, list(names.value)) == (
        True,
        [
            x509.UniformResourceIdentifier("spiffe://shop.internal/ns/prod/sa/orders"),
            x509.DNSName("orders.prod.shop.internal"),
        ],
    )
    assert constraints.value == x509.BasicConstraints(ca=False, path_length=None)
    assert usage.critical
    assert (usage.value.digital_signature, usage.value.key_cert_sign, usage.value.crl_sign) == (True, False, False)
    assert set(purposes) == {ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH}
    assert certificates.flaw_of_leaf(leaf) == ""


def test_leaf_lives_as_long_as_asked_and_begins_before_now(authority: CertificateAuthority) -> None:
    """Half a minute of skew at the start, so that a slow clock doesn't refuse a new certificate; the end is exact."""
    issued = authority.issue("orders", ttl=3600)
    assert (issued.not_before, issued.not_after) == (NOW - 30, NOW + 3600)


def test_key_belongs_to_the_certificate_and_each_issue_makes_a_new_one(authority: CertificateAuthority) -> None:
    """No key is ever used twice."""
    first, second = authority.issue("orders"), authority.issue("orders")
    for issued in (first, second):
        assert load_pem_private_key(issued.key, None).public_key() == leaf_of(issued).public_key()
    assert first.key != second.key
    assert first.serial != second.serial


def test_serial_is_the_bytes_in_the_certificate() -> None:
    """Lower-case hex with an even number of digits, as other tools show it."""
    assert [certificates.serial_text(number) for number in (0, 0xA, 0xABC)] == ["00", "0a", "0abc"]


def test_foreign_verifier_accepts_the_leaf_until_it_ends(authority: CertificateAuthority) -> None:
    """cryptography's own verifier takes chain, times and names."""
    issued = authority.issue("orders", ttl=60)
    assert [is_accepted(issued, authority.bundle, NOW + after) for after in (-31, -30, 0, 60, 61)] == [
        False, True, True, True, False,
    ]  # fmt: skip


@pytest.mark.skipif(shutil.which("openssl") is None, reason="the openssl binary is not installed")
def test_openssl_accepts_the_leaf(tmp_path: Path) -> None:
    """openssl verify, strictly, for both ends of a connection."""
    authority = CertificateAuthority.create(tmp_path / "ca", "shop.internal")
    authority.write("orders", tmp_path / "out")
    folder = tmp_path / "out" / "orders"
    for purpose in ("sslclient", "sslserver"):
        words = ["openssl", "verify", "-x509_strict", "-purpose", purpose, "-untrusted", folder / "svid.pem", "-CAfile"]
        done = subprocess.run([*words, folder / "bundle.pem", folder / "svid.pem"], capture_output=True, text=True)
        assert (done.returncode, done.stdout) == (0, f"{folder / 'svid.pem'}: OK\n"), done.stderr


@pytest.mark.parametrize("name", ["", "Orders", "a/b", "..", "-a", "a_b", "a.b", "a" * 64, "ü", "a\n", "a\0", "*"])
def test_names_that_are_no_host_names_are_refused(authority: CertificateAuthority, name: str) -> None:
    """Service and namespace become a path of an ID, a label of a DNS name and a folder."""
    with pytest.raises(IdentityError, match="service name"):
        authority.issue(name)
    with pytest.raises(IdentityError, match="namespace"):
        authority.issue("orders", namespace=name)


@pytest.mark.parametrize("name", ["", "Shop", "shop:80", "spiffe://shop", "shop/x", "a..b", ".a", "a.", "a b", "a\n"])
def test_trust_domains_that_are_no_host_names_are_refused(tmp_path: Path, name: str) -> None:
    """And nothing is made."""
    with pytest.raises(IdentityError, match="trust domain"):
        CertificateAuthority.create(tmp_path / "ca", name)
    assert list(tmp_path.iterdir()) == []


def test_a_ca_speaks_for_its_own_trust_domain_only(authority: CertificateAuthority) -> None:
    """An ID of another domain, even one that begins alike, is refused."""
    for other in (
        "spiffe://shop.internal.evil/x",
        "spiffe://other/x",
        "spiffe://shop.internal",
        "https://shop.internal/x",
    ):
        with pytest.raises(IdentityError, match="not of the trust domain"):
            authority.issue("orders", spiffe_id=other)
    assert authority.issue("orders", spiffe_id="spiffe://shop.internal/x").spiffe_id == "spiffe://shop.internal/x"


@pytest.mark.parametrize("path", ["", "a/", "a//b", "../x", "a/./b", "a b", "a%2fb", "a?b", "a#b", "ü", "a\n", "x" * 2048])
def test_ids_that_spiffe_does_not_know_are_never_issued(authority: CertificateAuthority, path: str) -> None:
    """Two readers could take them for two different workloads."""
    with pytest.raises(IdentityError, match="is no SPIFFE ID"):
        authority.issue("orders", spiffe_id=f"spiffe://shop.internal/{path}")


@pytest.mark.parametrize("ttl", [0, -1, 0.5, float("nan")])
def test_lives_that_are_no_lives_are_refused(authority: CertificateAuthority, ttl: float) -> None:
    """A certificate that has ended before it can be used helps nobody."""
    with pytest.raises(IdentityError, match="can't live"):
        authority.issue("orders", ttl=ttl)


def test_leaf_never_outlives_its_root(tmp_path: Path, clock: Clock) -> None:
    """It would fail at a time that nobody expects; so it's refused with the way out."""
    authority = CertificateAuthority.create(tmp_path / "ca", "shop.internal", root_life=100 * DAY, clock=clock)
    authority.issue("orders")
    clock.now += 10 * DAY + 1
    with pytest.raises(IdentityError, match="meshlib ca rotate"):
        authority.issue("orders")


# ---------------------------------------------------------------------------------------------------- files


def test_folder_and_keys_are_private_whatever_the_umask(tmp_path: Path) -> None:
    """0700 and 0600, certificates 0644, the log 0600."""
    old = os.umask(0)
    try:
        authority = CertificateAuthority.create(tmp_path / "ca", "shop.internal")
        authority.write("orders", tmp_path / "out")
        authority.begin_rotation()
    finally:
        os.umask(old)
    modes = {str(path.relative_to(tmp_path)): mode_of(path) for path in sorted(tmp_path.rglob("*")) if path != tmp_path / "out"}
    assert modes == {
        "ca": 0o700,
        "ca/bundle.pem": 0o644,
        "ca/issued.jsonl": 0o600,
        "ca/issuer.key": 0o600,
        "ca/issuer.pem": 0o644,
        "ca/next-issuer.key": 0o600,
        "ca/next-issuer.pem": 0o644,
        "ca/next.key": 0o600,
        "ca/next.pem": 0o644,
        "ca/root.key": 0o600,
        "ca/root.pem": 0o644,
        "out/orders": 0o700,
        "out/orders/bundle.pem": 0o644,
        "out/orders/key.pem": 0o600,
        "out/orders/svid.pem": 0o644,
    }


def test_write_replaces_all_and_leaves_no_temporary_file(authority: CertificateAuthority, tmp_path: Path) -> None:
    """The three files of the last issue, and nothing else."""
    authority.write("orders", tmp_path / "out")
    issued = authority.write("orders", tmp_path / "out")
    found = {path.name: path.read_bytes() for path in (tmp_path / "out" / "orders").iterdir()}
    assert found == {"svid.pem": issued.chain, "key.pem": issued.key, "bundle.pem": issued.bundle}


def test_failed_write_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk hits before the first rename; the old set stays whole, and the temporary files go."""
    files.write(tmp_path, [("a", b"old", 0o644), ("b", b"old", 0o600)])
    calls = []

    def full(fd: int) -> None:
        calls.append(fd)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        files.write(tmp_path, [("a", b"new", 0o644), ("b", b"new", 0o600)])
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"a": b"old", "b": b"old"}


def test_symbolic_link_in_the_way_is_replaced_not_followed(authority: CertificateAuthority, tmp_path: Path) -> None:
    """Who can plant a link can't make us write the key elsewhere."""
    target = tmp_path / "target"
    target.write_text("untouched")
    (tmp_path / "out" / "orders").mkdir(parents=True, mode=0o700)
    (tmp_path / "out" / "orders" / "key.pem").symlink_to(target)
    authority.write("orders", tmp_path / "out")
    assert target.read_text() == "untouched"
    assert not (tmp_path / "out" / "orders" / "key.pem").is_symlink()


def test_temporary_file_that_exists_already_is_never_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who could guess its name could have opened it before the key is written into it."""
    monkeypatch.setattr(secrets, "token_hex", lambda _: "guessed")
    (tmp_path / ".key.pem.guessed").write_bytes(b"planted")
    with pytest.raises(FileExistsError):
        files.write(tmp_path, [("key.pem", b"secret", 0o600)])
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {".key.pem.guessed": b"planted"}


def test_existing_ca_is_never_overwritten(authority: CertificateAuthority, tmp_path: Path) -> None:
    """Its root would be lost, and with it every certificate."""
    before = (tmp_path / "ca" / "root.key").read_bytes()
    with pytest.raises(KeyFileError, match="already"):
        CertificateAuthority.create(tmp_path / "ca", "shop.internal")
    assert (tmp_path / "ca" / "root.key").read_bytes() == before


def test_opened_ca_is_the_one_that_was_made(authority: CertificateAuthority, tmp_path: Path, clock: Clock) -> None:
    """Same trust domain, same root."""
    again = CertificateAuthority.open(tmp_path / "ca", clock=clock)
    assert (again.trust_domain, again.bundle) == ("shop.internal", authority.bundle)
    assert is_accepted(again.issue("orders"), authority.bundle)


def _open_to_group(folder: Path) -> None:
    (folder / "root.key").chmod(0o640)


def _linked(folder: Path) -> None:
    (folder / "root.key").rename(folder / "elsewhere")
    (folder / "root.key").symlink_to("elsewhere")


def _mixed(folder: Path) -> None:
    CertificateAuthority.create(folder.parent / "other", "shop.internal")
    shutil.copy(folder.parent / "other" / "root.key", folder / "root.key")


def _garbled(folder: Path) -> None:
    (folder / "root.key").write_bytes(b"-----BEGIN PRIVATE KEY-----\nMIG")


def _garbled_certificate(folder: Path) -> None:
    (folder / "root.pem").write_bytes(b"-----BEGIN CERTIFICATE-----\nMIG")


def _writable_folder(folder: Path) -> None:
    folder.chmod(0o770)


def _mixed_issuer(folder: Path) -> None:
    CertificateAuthority.create(folder.parent / "other", "shop.internal")
    for name in ("issuer.key", "issuer.pem"):
        shutil.copy(folder.parent / "other" / name, folder / name)


def _without_key(folder: Path) -> None:
    (folder / "issuer.key").unlink()


def _without_anything(folder: Path) -> None:
    shutil.rmtree(folder)


@pytest.mark.parametrize(
    ("spoil", "text"),
    [
        (_open_to_group, "chmod 600"),
        (_linked, "symbolic link"),
        (_mixed, "does not belong"),
        (_mixed_issuer, "was not signed by the root beside it"),
        (_garbled, "no unencrypted EC key"),
        (_garbled_certificate, "no certificate"),
        (_writable_folder, "chmod go-w"),
        (_without_key, "does not exist"),
        (_without_anything, "meshlib ca init"),
    ],
)
def test_spoiled_ca_is_refused_with_the_way_out(
    authority: CertificateAuthority, tmp_path: Path, spoil: Callable[[Path], None], text: str
) -> None:
    """At opening, and by an object that is open already."""
    spoil(tmp_path / "ca")
    with pytest.raises(KeyFileError, match=text):
        CertificateAuthority.open(tmp_path / "ca")
    with pytest.raises(KeyFileError):
        authority.issue("orders")


def test_ca_in_memory_touches_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    """Issue, log and rotation work without a folder."""
    monkeypatch.chdir(tmp_path)
    authority = CertificateAuthority.create(None, "shop.internal", clock=clock)
    issued = authority.issue("orders")
    authority.begin_rotation()
    authority.activate_rotation()
    authority.finish_rotation(force=True)
    assert [is_accepted(each, authority.bundle) for each in (issued, authority.issue("orders"))] == [False, True]
    assert [entry["event"] for entry in authority.issued()][:2] == ["create", "issue"]
    assert list(tmp_path.iterdir()) == []


def test_ca_and_what_it_issues_hide_their_keys(authority: CertificateAuthority) -> None:
    """Not in repr or str, and nothing can be pickled."""
    issued = authority.issue("orders")
    secret = issued.key.decode().splitlines()[1]
    for thing in (authority, issued):
        assert secret not in f"{thing!r} {thing!s}"
        with pytest.raises(TypeError, match="pickled"):
            pickle.dumps(thing)


# ---------------------------------------------------------------------------------------------------- log


def test_every_issue_renewal_and_step_is_logged(authority: CertificateAuthority, tmp_path: Path) -> None:
    """Append-only, one JSON object a line, with who, what and when; no key in it."""
    first = authority.issue("orders")
    second = authority.issue("orders")
    authority.begin_rotation()
    authority.activate_rotation()
    third = authority.issue("orders")
    authority.finish_rotation()
    lines = [json.loads(line) for line in (tmp_path / "ca" / "issued.jsonl").read_text().splitlines()]
    assert lines == authority.issued()
    assert [(line["event"], line.get("spiffe_id")) for line in lines] == [
        ("create", None),
        ("issue", first.spiffe_id),
        ("renewal", first.spiffe_id),
        ("rotation.begin", None),
        ("rotation.activate", None),
        ("renewal", first.spiffe_id),
        ("rotation.finish", None),
    ]
    assert [line["serial"] for line in lines if "spiffe_id" in line] == [first.serial, second.serial, third.serial]
    assert lines[1]["not_after"] == "2027-04-15T08:00:00.000Z"
    assert "PRIVATE" not in json.dumps(lines)


def test_nothing_is_handed_out_that_can_not_be_logged(
    authority: CertificateAuthority, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The log is written first; if that fails, there is no certificate."""

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "append", full)
    with pytest.raises(OSError, match="No space"):
        authority.write("orders", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_line_that_a_crash_cut_off_spoils_neither_the_log_nor_the_next_line(
    authority: CertificateAuthority, tmp_path: Path
) -> None:
    """It is passed over, and the next one begins on a line of its own."""
    with (tmp_path / "ca" / "issued.jsonl").open("ab") as log:
        log.write(b'{"time":"2027-01-')
    authority.issue("orders")
    assert [entry["event"] for entry in authority.issued()] == ["create", "issue"]


# ---------------------------------------------------------------------------------------------------- rotation


def test_rotation_leaves_no_moment_in_which_a_valid_leaf_is_refused(authority: CertificateAuthority) -> None:
    """Between two steps, each leaf in use is accepted under each bundle in use; after the last only the new one is."""
    old, bundles = authority.issue("orders"), [authority.bundle]
    authority.begin_rotation()
    during = authority.issue("orders")
    bundles.append(authority.bundle)
    # Some processes have the new bundle, some still the old: the old root signs.
    assert [is_accepted(leaf, bundle) for leaf in (old, during) for bundle in bundles] == [True] * 4

    authority.activate_rotation()
    new = authority.issue("orders")
    assert new.bundle == authority.bundle
    # All have both roots: leaves of both are in use.
    assert [is_accepted(leaf, bundle) for leaf in (old, new) for bundle in (bundles[1], authority.bundle)] == [True] * 4
    assert set(roots_of(authority.bundle)) == set(roots_of(bundles[1]))

    both = authority.bundle
    authority.finish_rotation()
    # All have new leaves: bundles with and without the old root are in use.
    assert [is_accepted(new, bundle) for bundle in (both, authority.bundle)] == [True, True]
    assert [is_accepted(leaf, authority.bundle) for leaf in (old, during)] == [False, False]
    assert len(roots_of(authority.bundle)) == 1


def test_rotation_destroys_the_old_keys_and_leaves_no_trace_of_the_way(authority: CertificateAuthority, tmp_path: Path) -> None:
    """The root's after activation, the issuer's (which signs revocations) at the end; then the folder looks as at first."""
    folder = tmp_path / "ca"
    names = sorted(path.name for path in folder.iterdir())
    root, issuer = (folder / "root.key").read_bytes(), (folder / "issuer.key").read_bytes()
    authority.begin_rotation()
    authority.activate_rotation()
    held = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert (root in held.values(), [name for name, content in held.items() if content == issuer]) == (
        False,
        ["previous-issuer.key"],
    )
    authority.finish_rotation()
    assert issuer not in {path.read_bytes() for path in folder.iterdir()}
    assert sorted(path.name for path in folder.iterdir()) == names


def test_steps_can_only_be_taken_in_order(authority: CertificateAuthority) -> None:
    """Every other step is refused and names the next one."""
    steps = [authority.begin_rotation, authority.activate_rotation, authority.finish_rotation]
    stages = [STEADY, BEGUN, ACTIVATED]
    for due in (0, 1, 2, 0):
        assert authority.stage == stages[due]
        for step in range(3):
            if step != due:
                with pytest.raises(IdentityError, match=f"next step is {['begin', 'activate', 'finish'][due]}"):
                    steps[step]()
        steps[due]()


def test_old_root_stays_while_a_certificate_needs_it(authority: CertificateAuthority, clock: Clock) -> None:
    """The names of the services are told; what has expired or been issued anew needs nothing."""
    authority.issue("orders")
    authority.issue("billing", ttl=3600)
    authority.issue("inventory")
    authority.begin_rotation()
    authority.activate_rotation()
    authority.issue("inventory")
    clock.now += 3601
    with pytest.raises(IdentityError, match="newest certificate of orders is signed"):
        authority.finish_rotation()
    assert authority.stage == ACTIVATED
    authority.issue("orders")
    authority.finish_rotation()
    assert authority.stage == STEADY


def test_stolen_root_can_be_thrown_out_by_force(authority: CertificateAuthority) -> None:
    """Although its certificates are in use: they are refused from then on."""
    old = authority.issue("orders")
    authority.begin_rotation()
    authority.activate_rotation()
    authority.finish_rotation(force=True)
    assert not is_accepted(old, authority.bundle)


def test_two_who_share_a_folder_see_the_same_state(authority: CertificateAuthority, tmp_path: Path, clock: Clock) -> None:
    """A command line rotates while a process has the CA open: the next certificate is by the new root."""
    other = CertificateAuthority.open(tmp_path / "ca", clock=clock)
    other.begin_rotation()
    assert authority.stage == BEGUN
    other.activate_rotation()
    other.finish_rotation()
    assert is_accepted(authority.issue("orders"), other.bundle)


def test_publish_and_reissue_reach_the_services_of_this_trust_domain(
    authority: CertificateAuthority, tmp_path: Path, clock: Clock
) -> None:
    """Same ID, namespace and life; folders of other CAs and folders without a certificate are left alone."""
    out = tmp_path / "out"
    authority.write("orders", out, ttl=5 * DAY, namespace="prod")
    authority.write("web", out, spiffe_id="spiffe://shop.internal/special/web")
    foreign = CertificateAuthority.create(None, "other.internal", clock=clock).write("foreign", out)
    (out / "empty").mkdir(mode=0o700)
    authority.begin_rotation()
    assert authority.publish(out) == [out / "orders", out / "web"]
    assert (out / "orders" / "bundle.pem").read_bytes() == authority.bundle
    authority.activate_rotation()
    clock.now += 1000.7
    renewed = authority.reissue(out)
    assert [(each.service, each.spiffe_id, each.not_after - each.not_before - 30) for each in renewed] == [
        ("orders", "spiffe://shop.internal/ns/prod/sa/orders", 5 * DAY),
        ("web", "spiffe://shop.internal/special/web", LEAF_LIFE),
    ]
    assert (out / "orders" / "svid.pem").read_bytes() == renewed[0].chain
    names = leaf_of(renewed[0]).extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["orders.prod.shop.internal"]
    authority.finish_rotation()
    assert (out / "foreign" / "svid.pem").read_bytes() == foreign.chain


def test_only_what_we_have_signed_is_issued_anew(authority: CertificateAuthority, tmp_path: Path, clock: Clock) -> None:
    """A certificate that somebody made and put there, with the ID of another service, makes us vouch for nobody."""
    stranger = CertificateAuthority.create(None, "shop.internal", clock=clock)
    authority.write("orders", tmp_path / "out")
    planted = stranger.write("web", tmp_path / "out", spiffe_id="spiffe://shop.internal/ns/default/sa/orders")
    assert [issued.service for issued in authority.reissue(tmp_path / "out")] == ["orders"]
    assert (tmp_path / "out" / "web" / "svid.pem").read_bytes() == planted.chain


def test_certificate_that_lies_without_its_key_makes_us_vouch_for_nobody(
    authority: CertificateAuthority, tmp_path: Path, clock: Clock
) -> None:
    """Everybody has seen the chain of another service in a handshake: who puts it into their folder gets no key for it."""
    out = tmp_path / "out"
    authority.write("orders", out)
    theirs = authority.sign(certificates.new_key().public_key(), "payments", authority.id_of("payments"), "")
    before = (out / "orders" / "key.pem").read_bytes()
    for key in (before, b"", b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n", None):
        (out / "orders" / "svid.pem").write_bytes(theirs.chain)
        (out / "orders" / "key.pem").unlink()
        if key is not None:
            files.write(out / "orders", [("key.pem", key, 0o600)])
        assert authority.reissue(out) == []
        assert (out / "orders" / "svid.pem").read_bytes() == theirs.chain
    refused = [(entry["reason"], entry["spiffe_id"]) for entry in authority.issued() if entry["event"] == "refusal"]
    assert refused == [("renew.unproved", theirs.spiffe_id)]  # once, however often the timer comes by


def test_certificate_that_is_not_in_the_log_is_not_issued_anew(authority: CertificateAuthority, tmp_path: Path) -> None:
    """Signed with our key, and with its own beside it, but never issued: who stole the issuer's key gets nothing on top."""
    signer = authority._roots.signing.issuer
    assert signer is not None
    key = certificates.new_key()
    forged = certificates.new_leaf(key, signer.certificate, signer.key, authority.id_of("web"), "", DAY, NOW)
    authority.write("orders", tmp_path / "out")
    chain = certificates.pem(forged, signer.certificate)
    files.write(tmp_path / "out" / "orders", [("svid.pem", chain, 0o644), ("key.pem", certificates.key_pem(key), 0o600)])
    assert authority.reissue(tmp_path / "out") == []
    assert authority.issued()[-1]["reason"] == "renew.unknown"


def _with_a_strange_certificate(where: Path) -> None:
    (where / "svid.pem").write_bytes(b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n")


@pytest.mark.parametrize(
    "spoil",
    [
        lambda where: (where / "svid.pem").write_text("half a file"),
        _with_a_strange_certificate,
        lambda where: where.chmod(0o777),
        lambda where: [(where / "svid.pem").unlink(), (where / "svid.pem").symlink_to("/etc/hostname")],
    ],
)
def test_folder_that_is_spoiled_stops_nothing_in_the_others(
    authority: CertificateAuthority, tmp_path: Path, spoil: Callable[[Path], object]
) -> None:
    """All others are renewed and get roots and revocations; at the end it is told which one failed."""
    out = tmp_path / "out"
    for name in ("billing", "orders", "web"):
        authority.write(name, out)
    authority.revoke("web")
    spoil(out / "billing")
    faults: list[str] = []
    assert [each.service for each in authority.renew(out, is_forced=True, faults=faults)] == ["orders"]
    assert authority.publish(out, faults=faults) == [out / "orders", out / "web"]
    assert (out / "web" / "crl.pem").read_bytes() == authority.crl
    assert [fault.count(str(out / "billing")) > 0 for fault in faults] == [True, True]
    for action in (authority.reissue, authority.publish):
        with pytest.raises(KeyFileError, match="1 of the services' folders could not be served"):
            action(out)


def test_reissue_keeps_the_names_of_the_certificate_whatever_its_folder_is_called(
    authority: CertificateAuthority, tmp_path: Path
) -> None:
    """A folder may be renamed; the DNS name that gRPC clients check stays."""
    authority.write("orders", tmp_path)
    (tmp_path / "orders").rename(tmp_path / "Orders_v1")
    (issued,) = authority.reissue(tmp_path)
    names = leaf_of(issued).extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert (issued.service, issued.spiffe_id) == ("Orders_v1", "spiffe://shop.internal/ns/default/sa/orders")
    assert names.get_values_for_type(x509.DNSName) == ["orders.default.shop.internal"]


@pytest.mark.parametrize("step", ["begin", "activate", "finish"])
def test_crash_in_a_step_leaves_a_ca_that_works_and_can_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clock: Clock, step: str
) -> None:
    """Wherever the machine stops: key and root belong together, the bundle holds the signing root, no leaf in use falls."""
    crashes = 0
    while True:
        folder = tmp_path / f"ca{crashes}"
        authority = CertificateAuthority.create(folder, "shop.internal", clock=clock)
        before = authority.issue("orders")
        steps = ["begin", "activate", "finish"]
        for earlier in steps[: steps.index(step)]:
            getattr(authority, f"{earlier}_rotation")()
        stage = authority.stage
        turn = partial(authority.finish_rotation, force=True) if step == "finish" else getattr(authority, f"{step}_rotation")
        is_through = is_done(monkeypatch, crashes, turn)

        again = CertificateAuthority.open(folder, clock=clock)
        after = {STEADY: BEGUN, BEGUN: ACTIVATED, ACTIVATED: STEADY}[stage]
        assert again.stage in ({after} if is_through else {stage, after})
        assert (folder / "bundle.pem").read_bytes() == again.bundle
        assert is_accepted(again.issue("billing"), again.bundle)
        if step != "finish":
            assert is_accepted(before, again.bundle)
        while again.stage != STEADY or again.bundle == before.bundle:
            step_due = {STEADY: "begin", BEGUN: "activate", ACTIVATED: "finish"}[again.stage]
            again.finish_rotation(force=True) if step_due == "finish" else getattr(again, f"{step_due}_rotation")()
        assert is_accepted(again.issue("billing"), again.bundle)
        if is_through:
            break
        crashes += 1
    assert crashes >= 3
