"""Is what was revoked listed, signed, fresh, and brought to everybody; and does nobody who was revoked come back by renewal?"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from cryptography import x509

from meshlib.errors import IdentityError
from meshlib.secure import CertificateAuthority, FolderSource, IdentityStore, certificates
from meshlib.secure.ca import DAY
from tests.secure.test_ca import NOW, Clock, leaf_of, mode_of


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def authority(tmp_path: Path, clock: Clock) -> CertificateAuthority:
    return CertificateAuthority.create(tmp_path / "ca", "shop.internal", clock=clock)


def listed(text: bytes) -> set[str]:
    return {certificates.serial_text(entry.serial_number) for crl in certificates.crls_of(text) for entry in crl}


def test_nothing_is_published_before_the_first_revocation(authority: CertificateAuthority, tmp_path: Path) -> None:
    """A list that nobody renews would be worse than none; who asks for one gets an empty one."""
    issued = authority.write("orders", tmp_path / "out")
    authority.publish(tmp_path / "out")
    assert (issued.crl, listed(authority.crl)) == (b"", set())
    assert not (tmp_path / "ca" / "crl.pem").exists()
    assert not (tmp_path / "out" / "orders" / "crl.pem").exists()


def test_revoked_certificate_is_listed_and_the_list_is_published(authority: CertificateAuthority, tmp_path: Path) -> None:
    """By serial number; beside bundle.pem, in the CA's folder and in every service's, readable by all."""
    first, second = (authority.write(name, tmp_path / "out") for name in ("orders", "web"))
    (entry,) = authority.revoke(first.serial, "keyCompromise")
    authority.publish(tmp_path / "out")
    text = (tmp_path / "ca" / "crl.pem").read_bytes()
    assert (entry["spiffe_id"], listed(text)) == (first.spiffe_id, {first.serial})
    assert authority.issue("billing").crl == text
    for name in ("orders", "web"):
        copy = tmp_path / "out" / name / "crl.pem"
        assert (copy.read_bytes(), mode_of(copy)) == (text, 0o644)
    assert (authority.is_revoked(first.serial), authority.is_revoked(second.serial)) == (True, False)


def test_list_says_by_whom_when_why_and_until_when(authority: CertificateAuthority, clock: Clock) -> None:
    """Signed by the issuer, with a number, good for a day; the reason `unspecified` is left out, as the standard wants."""
    issued, other = authority.issue("orders"), authority.issue("web")
    clock.now += 100
    authority.revoke(issued.serial, "cessationOfOperation")
    authority.revoke(other.serial)
    crl, _ = certificates.crls_of(authority.crl)
    _, issuer = x509.load_pem_x509_certificates(issued.chain)
    assert crl.is_signature_valid(issuer.public_key())  # type: ignore[arg-type]
    assert crl.issuer == issuer.subject
    assert crl.last_update_utc.timestamp() == NOW + 100 - certificates.SKEW
    assert crl.next_update_utc is not None
    assert crl.next_update_utc.timestamp() == NOW + 100 + DAY
    found, plain = (crl.get_revoked_certificate_by_serial_number(leaf_of(each).serial_number) for each in (issued, other))
    assert found is not None
    assert plain is not None
    assert found.revocation_date_utc.timestamp() == NOW + 100
    assert found.extensions.get_extension_for_class(x509.CRLReason).value.reason is x509.ReasonFlags.cessation_of_operation
    assert list(plain.extensions) == []


def test_service_is_revoked_with_all_it_has(authority: CertificateAuthority) -> None:
    """By name or SPIFFE ID: also the certificates that a newer one has replaced, which are as good as it."""
    serials = {authority.issue("orders").serial for _ in range(3)}
    kept = authority.issue("web")
    assert {entry["serial"] for entry in authority.revoke("orders")} == serials
    assert listed(authority.crl) == serials
    again = authority.issue("orders")
    assert [(entry["serial"], state) for entry, state in authority.standing()] == [
        (again.serial, "valid"),
        (kept.serial, "valid"),
    ]
    assert [entry["serial"] for entry in authority.revoke(again.spiffe_id)] == [again.serial]


def test_name_that_means_several_is_refused(authority: CertificateAuthority) -> None:
    """Of two namespaces one has to be named; then the other keeps what it has."""
    authority.issue("orders", namespace="prod")
    kept = authority.issue("orders", namespace="stage")
    with pytest.raises(IdentityError, match="names several"):
        authority.revoke("orders")
    authority.revoke("orders", namespace="prod")
    assert not authority.is_revoked(kept.serial)


@pytest.mark.parametrize("what", ["nobody", "00ff", "", "spiffe://shop.internal/ns/default/sa/nobody"])
def test_what_is_not_there_can_not_be_revoked(authority: CertificateAuthority, what: str) -> None:
    """A misspelt serial number must not look like a success."""
    authority.issue("orders")
    with pytest.raises(IdentityError, match="no valid certificate"):
        authority.revoke(what)


def test_revoked_once_is_revoked(authority: CertificateAuthority) -> None:
    """Again there is nothing to revoke; and the serial may be written as openssl prints it."""
    issued = authority.issue("orders")
    pairs = [issued.serial[at : at + 2].upper() for at in range(0, len(issued.serial), 2)]
    authority.revoke(":".join(pairs))
    with pytest.raises(IdentityError, match="no valid certificate"):
        authority.revoke(issued.serial)


def test_unknown_reason_is_refused(authority: CertificateAuthority) -> None:
    """A hold, say, which could be lifted: we know none."""
    authority.issue("orders")
    with pytest.raises(IdentityError, match="is no reason"):
        authority.revoke("orders", "certificateHold")


def test_who_was_revoked_renews_nothing(authority: CertificateAuthority, tmp_path: Path) -> None:
    """Neither by timer nor by rotation; the refusal is logged. A new issue is a new decision."""
    authority.write("orders", tmp_path / "out")
    authority.write("web", tmp_path / "out")
    authority.revoke("orders")
    assert [each.service for each in authority.reissue(tmp_path / "out")] == ["web"]
    refused = [entry for entry in authority.issued() if entry["event"] == "refusal"]
    assert [(entry["reason"], entry["service"]) for entry in refused] == [("renew.revoked", "orders")]
    authority.write("orders", tmp_path / "out")
    assert [each.service for each in authority.reissue(tmp_path / "out")] == ["orders", "web"]


def _kept(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in ("svid.pem", "key.pem")}


@pytest.mark.parametrize("has_new_issue", [False, True])
def test_what_had_ended_before_the_revocation_is_not_renewed_either(
    authority: CertificateAuthority, tmp_path: Path, clock: Clock, has_new_issue: bool
) -> None:
    """It is on no list: but who puts an older pair back must not come back with it, nor after somebody issued anew."""
    web = tmp_path / "out" / "web"
    authority.write("web", tmp_path / "out", ttl=3600)
    old = _kept(web)
    clock.now += 4000
    authority.write("web", tmp_path / "out", ttl=3600)
    authority.revoke("web")
    clock.now += 5000
    if has_new_issue:
        authority.issue("web")
    for name, content in old.items():
        (web / name).write_bytes(content)
    assert authority.renew(tmp_path / "out") == []
    assert authority.issued()[-1]["reason"] == "renew.revoked"


def test_revoked_pair_is_not_renewed_after_it_has_ended_and_was_forgotten(
    authority: CertificateAuthority, tmp_path: Path, clock: Clock
) -> None:
    """What has ended needs no list, and the memory of it is bounded: but its ID is known as taken back."""
    authority.write("web", tmp_path / "out", ttl=3600)
    authority.revoke("web")
    clock.now += 7200
    authority._ledger._prune(clock.now)
    assert not authority._ledger.revoked
    assert authority.renew(tmp_path / "out") == []


def test_certificate_that_ended_while_no_timer_ran_is_renewed(
    authority: CertificateAuthority, tmp_path: Path, clock: Clock
) -> None:
    """A machine may be off for longer than a certificate lives; nobody took it back."""
    authority.write("web", tmp_path / "out", ttl=3600)
    clock.now += 7200
    assert [each.service for each in authority.renew(tmp_path / "out")] == ["web"]


def test_one_serial_that_is_revoked_leaves_the_newest_alone(
    authority: CertificateAuthority, tmp_path: Path, clock: Clock
) -> None:
    """Its ID was not taken back: what replaced it goes on, and is renewed."""
    old = authority.issue("web")
    clock.now += 1
    authority.write("web", tmp_path / "out")
    authority.revoke(old.serial)
    assert [each.service for each in authority.reissue(tmp_path / "out")] == ["web"]


def test_revocation_takes_tokens_back_that_were_not_used_yet(authority: CertificateAuthority) -> None:
    """Those of its ID, and no others; also where nothing was bought yet."""
    from meshlib.secure.tokens import Tokens

    tokens = Tokens(authority)
    made = {name: bytes(tokens.make(name).proof).decode() for name in ("orders", "web", "billing")}
    authority.issue("orders")
    assert [entry["service"] for entry in authority.revoke("orders")] == ["orders"]
    assert authority.revoke("web") == []
    for name in ("orders", "web"):
        with pytest.raises(IdentityError) as refused:
            tokens.find(made[name])
        assert refused.value.reason == "token.unknown"
    assert tokens.find(made["billing"]).service == "billing"
    assert [entry["service"] for entry in authority.issued() if entry["event"] == "token.revoked"] == ["orders", "web"]


def test_list_is_made_anew_after_a_quarter_of_its_life_and_not_before(authority: CertificateAuthority, clock: Clock) -> None:
    """So that six hours of silence are noticed by nobody; its number rises, even if the clock goes back."""
    authority.revoke(authority.issue("orders").serial)
    first = authority.crl
    clock.now += DAY / 4 - 1
    assert authority.crl == first
    clock.now += 1
    second = authority.crl
    clock.now -= 10 * DAY
    third = authority.crl
    numbers = [
        certificates.crls_of(each)[0].extensions.get_extension_for_class(x509.CRLNumber).value for each in (first, second, third)
    ]
    assert [number.crl_number for number in numbers] == [int(NOW), int(NOW + DAY / 4), int(NOW + DAY / 4) + 1]
    assert certificates.crls_of(third)[0].last_update_utc.timestamp() == clock.now - certificates.SKEW


def test_certificate_stays_listed_until_it_would_have_ended(authority: CertificateAuthority, clock: Clock) -> None:
    """A list would grow for ever otherwise."""
    short, long = authority.issue("orders", ttl=2 * DAY), authority.issue("web")
    authority.revoke(short.serial)
    authority.revoke(long.serial)
    clock.now += 2 * DAY - 1
    before = listed(authority.crl)
    clock.now += DAY
    assert (before, listed(authority.crl)) == ({short.serial, long.serial}, {long.serial})


def test_during_a_rotation_every_issuer_has_a_list(authority: CertificateAuthority) -> None:
    """What the old one has signed is revoked by the old one, until it has left."""
    old = authority.issue("orders")
    authority.revoke(old.serial)
    counts = [len(certificates.crls_of(authority.crl))]
    authority.begin_rotation()
    counts.append(len(certificates.crls_of(authority.crl)))
    late = authority.issue("web")
    authority.activate_rotation()
    new = authority.issue("billing")
    authority.revoke(late.serial)
    authority.revoke(new.serial)
    lists = certificates.crls_of(authority.crl)
    by_issuer = [{certificates.serial_text(entry.serial_number) for entry in crl} for crl in lists]
    assert (counts, by_issuer) == ([2, 4], [{new.serial}, {old.serial, late.serial}, set(), set()])
    authority.finish_rotation()
    assert (len(certificates.crls_of(authority.crl)), listed(authority.crl)) == (2, {new.serial})


def test_revocations_of_the_earlier_layout_are_signed_by_its_root(tmp_path: Path, clock: Clock) -> None:
    """Its root is its issuer, and its entries know their issuer by serial number alone."""
    from tests.secure.earlier import make_earlier_ca

    make_earlier_ca(tmp_path / "ca", NOW, "orders")
    authority = CertificateAuthority.open(tmp_path / "ca", clock=clock)
    (entry,) = authority.revoke("orders")
    (crl,) = certificates.crls_of(authority.crl)
    (root,) = x509.load_pem_x509_certificates(authority.bundle)
    assert (crl.is_signature_valid(root.public_key()), listed(authority.crl)) == (True, {entry["serial"]})  # type: ignore[arg-type]


def test_revoked_service_is_known_after_a_restart(authority: CertificateAuthority, tmp_path: Path, clock: Clock) -> None:
    """The log is the memory; crl.pem can be lost."""
    issued = authority.issue("orders")
    authority.revoke(issued.serial)
    (tmp_path / "ca" / "crl.pem").unlink()
    again = CertificateAuthority.open(tmp_path / "ca", clock=clock)
    assert (again.is_revoked(issued.serial), listed(again.crl)) == (True, {issued.serial})
    assert (tmp_path / "ca" / "crl.pem").exists()


@pytest.mark.skipif(shutil.which("openssl") is None, reason="the openssl binary is not installed")
def test_openssl_refuses_what_was_revoked_and_nothing_else(tmp_path: Path) -> None:
    """With a list for every signer of the chain, strictly; and it reads the reason."""
    authority = CertificateAuthority.create(tmp_path / "ca", "shop.internal")
    for name in ("orders", "web"):
        authority.write(name, tmp_path / "out")
    authority.revoke("orders", "keyCompromise")
    authority.publish(tmp_path / "out")
    said = {}
    for name in ("orders", "web"):
        folder = tmp_path / "out" / name
        words = ["openssl", "verify", "-x509_strict", "-crl_check_all", "-CRLfile", folder / "crl.pem"]
        done = subprocess.run(
            [*words, "-CAfile", folder / "bundle.pem", "-untrusted", folder / "svid.pem", folder / "svid.pem"],
            capture_output=True, text=True,
        )  # fmt: skip
        said[name] = (done.returncode, "certificate revoked" in done.stderr)
    assert said == {"orders": (2, True), "web": (0, False)}
    words = [
        "openssl",
        "crl",
        "-noout",
        "-text",
        "-verify",
        "-CAfile",
        tmp_path / "ca" / "issuer.pem",
        "-in",
        tmp_path / "ca" / "crl.pem",
    ]
    shown = subprocess.run(words, capture_output=True, text=True)
    assert (shown.returncode, "verify OK" in shown.stderr, "Key Compromise" in shown.stdout) == (0, True, True)


def test_running_process_takes_the_list_with_its_identity(authority: CertificateAuthority, tmp_path: Path, clock: Clock) -> None:
    """The folder's source reads what `publish` wrote, and the wire is given it."""
    authority.write("orders", tmp_path / "out", ttl=DAY)
    spiffe_id = "spiffe://shop.internal/ns/default/sa/orders"
    source = FolderSource(tmp_path / "out", "orders", "shop.internal", spiffe_id, wall_clock=clock)
    store = IdentityStore(source, mode="enforce", wall_clock=clock)
    assert store.require(NOW).crls == {}
    victim = authority.issue("web")
    authority.revoke(victim.serial)
    authority.publish(tmp_path / "out")
    assert store.refresh(NOW)
    assert store.current is not None
    assert listed(store.current.crls["shop.internal"]) == {victim.serial}
