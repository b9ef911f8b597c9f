"""Does a CA work with its root's key in a safe, does its issuer last, and does a folder of the earlier layout go on working?"""

from __future__ import annotations

import datetime
import json
import shutil
from functools import partial
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.x509 import verification

from meshlib.errors import IdentityError, KeyFileError
from meshlib.secure import CertificateAuthority, Issued, certificates
from meshlib.secure.ca import DAY
from meshlib.secure.roots import ACTIVATED, BEGUN, ISSUER_LIFE, STEADY
from tests.secure.crashes import is_done
from tests.secure.earlier import make_earlier_ca
from tests.secure.test_ca import NOW, Clock, is_accepted, roots_of


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def authority(tmp_path: Path, clock: Clock) -> CertificateAuthority:
    return CertificateAuthority.create(tmp_path / "ca", "shop.internal", clock=clock)


def put_away(authority: CertificateAuthority, safe: Path) -> Path:
    """root.key goes into a safe."""
    assert authority.folder is not None
    safe.mkdir(mode=0o700, exist_ok=True)
    return (authority.folder / "root.key").rename(safe / "root.key")


def turn(authority: CertificateAuthority) -> None:
    authority.begin_rotation()
    authority.activate_rotation()
    authority.finish_rotation(force=True)


# ---------------------------------------------------------------------------------------------------- without the root's key


def test_everything_of_every_day_works_without_the_roots_key(authority: CertificateAuthority, tmp_path: Path) -> None:
    """Issuing, renewing, revoking and listing need the issuer's key only."""
    put_away(authority, tmp_path / "safe")
    issued = authority.write("orders", tmp_path / "out")
    assert is_accepted(issued, authority.bundle)
    assert [each.service for each in authority.reissue(tmp_path / "out")] == ["orders"]
    authority.revoke("orders")
    assert len(certificates.crls_of(authority.crl)) == 2
    assert authority.has_root_key is False
    assert CertificateAuthority.open(tmp_path / "ca").trust_domain == "shop.internal"


def test_rotation_needs_no_old_key_and_destroys_one_that_came_back(authority: CertificateAuthority, tmp_path: Path) -> None:
    """A new root makes its own key. Taken away before the second step, it's away after it, and the old one is gone too."""
    old = authority.issue("orders")
    kept = put_away(authority, tmp_path / "safe")
    authority.begin_rotation()
    shutil.copy(kept, tmp_path / "ca" / "root.key")
    (tmp_path / "ca" / "root.key").chmod(0o600)
    (tmp_path / "ca" / "next.key").rename(tmp_path / "safe" / "next.key")
    authority.activate_rotation()
    assert (authority.has_root_key, (tmp_path / "ca" / "root.key").exists()) == (False, False)
    assert [is_accepted(each, authority.bundle) for each in (old, authority.issue("orders"))] == [True, True]
    authority.finish_rotation()
    assert [is_accepted(each, authority.bundle) for each in (old, authority.issue("orders"))] == [False, True]
    authority.renew_issuer(tmp_path / "safe" / "next.key")


def test_issuer_is_renewed_by_itself_before_a_leaf_would_outlive_it(authority: CertificateAuthority, clock: Clock) -> None:
    """With the root's key at hand nobody notices: same name, same key, and the leaves of before stay good."""
    before = authority.issue("orders")
    clock.now = NOW + ISSUER_LIFE - 30 * DAY
    last = authority.issue("orders", ttl=20 * DAY)
    after = authority.issue("orders", ttl=90 * DAY)
    (first, renewed) = (x509.load_pem_x509_certificates(each.chain)[1] for each in (last, after))
    assert x509.load_pem_x509_certificates(before.chain)[1] == first
    assert (first.subject, first.public_key()) == (renewed.subject, renewed.public_key())
    assert renewed.not_valid_after_utc.timestamp() == clock.now + ISSUER_LIFE
    assert [is_accepted(each, authority.bundle, clock.now) for each in (last, after)] == [True, True]
    assert [entry["event"] for entry in authority.issued()] == ["create", "issue", "renewal", "issuer.renewal", "renewal"]


def test_issuer_is_never_renewed_past_the_end_of_its_root(tmp_path: Path, clock: Clock) -> None:
    """Near the root's end there is only `rotate`."""
    authority = CertificateAuthority.create(tmp_path / "ca", "shop.internal", root_life=ISSUER_LIFE + 100 * DAY, clock=clock)
    clock.now = NOW + ISSUER_LIFE - 10 * DAY
    authority.issue("orders", ttl=110 * DAY)
    assert authority.signing_ends == NOW + ISSUER_LIFE + 100 * DAY
    with pytest.raises(IdentityError, match="the root ends in 110.0 days"):
        authority.issue("orders", ttl=110 * DAY + 1)


def test_issuer_near_its_end_says_where_the_roots_key_is_wanted(
    authority: CertificateAuthority, tmp_path: Path, clock: Clock
) -> None:
    """The key comes from its safe for one command, and only the right one does."""
    kept = put_away(authority, tmp_path / "safe")
    clock.now = NOW + ISSUER_LIFE - 30 * DAY
    with pytest.raises(IdentityError, match="root.key is not here to renew it.*--issuer --root-key"):
        authority.issue("orders")
    with pytest.raises(KeyFileError, match="--root-key FILE"):
        authority.renew_issuer()
    CertificateAuthority.create(tmp_path / "other", "shop.internal")
    with pytest.raises(KeyFileError, match="not the key of this CA's root"):
        authority.renew_issuer(tmp_path / "other" / "root.key")
    authority.renew_issuer(kept)
    assert is_accepted(authority.issue("orders"), authority.bundle, clock.now)
    assert not (tmp_path / "ca" / "root.key").exists()


def test_issuer_can_make_no_further_ca(authority: CertificateAuthority, clock: Clock) -> None:
    """A verifier that isn't ours refuses a chain with one more level in it."""
    signer = authority._roots.signing.issuer
    assert signer is not None
    key, own = certificates.new_key(), certificates.new_key()
    rogue = certificates.new_issuer(key, signer.certificate, signer.key, "shop.internal", DAY, NOW)
    leaf = certificates.new_leaf(own, rogue, key, "spiffe://shop.internal/x", "", DAY, NOW)
    chain = certificates.pem(leaf, rogue, signer.certificate)
    issued = Issued("x", "spiffe://shop.internal/x", "", NOW, NOW + DAY, chain, authority.bundle, b"")
    assert not is_accepted(issued, authority.bundle)


# ---------------------------------------------------------------------------------------------------- the earlier layout


def test_folder_of_the_earlier_layout_opens_and_issues(tmp_path: Path, clock: Clock) -> None:
    """Its root signs the leaves itself; what it has issued stays good and is renewed."""
    make_earlier_ca(tmp_path / "ca", NOW, "orders")
    authority = CertificateAuthority.open(tmp_path / "ca", clock=clock)
    issued = authority.issue("web")
    assert len(x509.load_pem_x509_certificates(issued.chain)) == 1
    assert is_accepted(issued, authority.bundle)
    assert [each.service for each in authority.reissue(tmp_path / "ca" / "identities")] == ["orders"]
    assert [(entry["service"], state) for entry, state in authority.standing()] == [("orders", "valid"), ("web", "valid")]
    assert sorted(path.name for path in (tmp_path / "ca").iterdir()) == [
        "bundle.pem", "identities", "issued.jsonl", "root.key", "root.pem",
    ]  # fmt: skip


def test_chain_of_hashes_begins_behind_the_lines_of_the_earlier_layout(tmp_path: Path, clock: Clock) -> None:
    """They stay as they are, are told apart, and are bound in by the first new line."""
    make_earlier_ca(tmp_path / "ca", NOW, "orders", "web")
    authority = CertificateAuthority.open(tmp_path / "ca", clock=clock)
    authority.issue("orders")
    chain = authority.verify_log()
    assert (chain.entries, chain.unchained, chain.faults) == (4, 3, ())
    log = tmp_path / "ca" / "issued.jsonl"
    log.write_bytes(log.read_bytes().replace(b'"service":"web"', b'"service":"wab"'))
    assert [line for line, _ in CertificateAuthority.open(tmp_path / "ca").verify_log().faults] == [4]


def test_first_rotation_brings_an_issuer_to_the_earlier_layout(tmp_path: Path, clock: Clock) -> None:
    """The three steps are the same, and afterwards nothing is left of the old way."""
    old_root = make_earlier_ca(tmp_path / "ca", NOW, "orders")
    out = tmp_path / "ca" / "identities"
    authority = CertificateAuthority.open(tmp_path / "ca", clock=clock)
    old = authority.issue("web")
    authority.begin_rotation()
    assert is_accepted(authority.issue("web"), old.bundle)
    authority.publish(out)
    authority.activate_rotation()
    new = authority.issue("web")
    assert [is_accepted(each, authority.bundle) for each in (old, new)] == [True, True]
    authority.revoke(old.serial)  # its signer's key is kept for that until the end
    assert len(certificates.crls_of(authority.crl)) == 3
    authority.reissue(out)
    authority.finish_rotation()
    assert [is_accepted(each, authority.bundle) for each in (old, new)] == [False, True]
    assert sorted(path.name for path in (tmp_path / "ca").iterdir()) == [
        "bundle.pem", "crl.pem", "identities", "issued.jsonl", "issuer.key", "issuer.pem", "root.key", "root.pem",
    ]  # fmt: skip
    assert old_root["root.key"] not in {path.read_bytes() for path in (tmp_path / "ca").iterdir() if path.is_file()}


def test_rotation_that_the_earlier_version_had_begun_goes_on(tmp_path: Path, clock: Clock) -> None:
    """next.pem and next.key without an issuer: that root comes, and signs the leaves itself."""
    make_earlier_ca(tmp_path / "ca", NOW, "orders")
    coming = make_earlier_ca(tmp_path / "coming", NOW)
    for name in ("key", "pem"):
        shutil.copy(tmp_path / "coming" / f"root.{name}", tmp_path / "ca" / f"next.{name}")
    authority = CertificateAuthority.open(tmp_path / "ca", clock=clock)
    assert authority.stage == BEGUN
    assert coming["root.pem"] in authority.bundle
    authority.activate_rotation()
    assert authority.stage == ACTIVATED
    issued = authority.issue("orders")
    assert is_accepted(issued, coming["root.pem"])
    authority.finish_rotation()
    assert (authority.stage, authority.bundle) == (STEADY, coming["root.pem"])
    assert is_accepted(authority.issue("orders"), authority.bundle)


def test_activation_that_the_earlier_version_left_half_done_is_completed(tmp_path: Path, clock: Clock) -> None:
    """Its next.key had become root.key: that committed it."""
    make_earlier_ca(tmp_path / "ca", NOW, "orders")
    coming = make_earlier_ca(tmp_path / "coming", NOW)
    folder = tmp_path / "ca"
    (folder / "root.pem").rename(folder / "previous.pem")
    shutil.copy(folder / "previous.pem", folder / "root.pem")
    shutil.copy(tmp_path / "coming" / "root.pem", folder / "next.pem")
    shutil.copy(tmp_path / "coming" / "root.key", folder / "root.key")
    authority = CertificateAuthority.open(folder, clock=clock)
    assert (authority.stage, authority._roots.signing.certificate) == (ACTIVATED, roots_of(coming["root.pem"])[0])
    assert is_accepted(authority.issue("orders"), coming["root.pem"])
    assert not (folder / "next.pem").exists()


@pytest.mark.parametrize("step", ["begin", "activate", "finish"])
def test_crash_while_the_earlier_layout_gets_its_issuer_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clock: Clock, step: str
) -> None:
    """Wherever the machine stops in its first rotation, the folder opens, issues, and can go on to the end."""
    crashes = 0
    while True:
        folder = tmp_path / f"ca{crashes}"
        make_earlier_ca(folder, NOW, "orders")
        authority = CertificateAuthority.open(folder, clock=clock)
        old = authority.issue("web")
        for earlier in ["begin", "activate", "finish"][: ["begin", "activate", "finish"].index(step)]:
            getattr(authority, f"{earlier}_rotation")()
        turn = partial(authority.finish_rotation, force=True) if step == "finish" else getattr(authority, f"{step}_rotation")
        is_through = is_done(monkeypatch, crashes, turn)
        again = CertificateAuthority.open(folder, clock=clock)
        assert is_accepted(again.issue("billing"), again.bundle)
        if step != "finish":
            assert is_accepted(old, again.bundle)
        while again.stage != STEADY or again.bundle == old.bundle:
            due = {STEADY: "begin", BEGUN: "activate", ACTIVATED: "finish"}[again.stage]
            again.finish_rotation(force=True) if due == "finish" else getattr(again, f"{due}_rotation")()
        assert len(x509.load_pem_x509_certificates(again.issue("billing").chain)) == 2
        if is_through:
            break
        crashes += 1
    assert crashes >= 3


# ---------------------------------------------------------------------------------------------------- names that are kept


def test_nobody_is_issued_the_name_of_the_ca_itself(authority: CertificateAuthority, tmp_path: Path) -> None:
    """Who had it could be the CA to a machine that enrols."""
    own = authority.issue_own()
    assert own.spiffe_id == "spiffe://shop.internal/meshlib/ca"
    for spiffe_id in (own.spiffe_id, f"{own.spiffe_id}/x"):
        with pytest.raises(IdentityError, match="belongs to the CA itself"):
            authority.issue("orders", spiffe_id=spiffe_id)
    place = tmp_path / "out" / "stolen"
    place.mkdir(parents=True, mode=0o700)
    for name, content in (("svid.pem", own.chain), ("key.pem", own.key)):
        (place / name).write_bytes(content)
    assert authority.reissue(tmp_path / "out") == []


def test_own_certificate_never_holds_a_rotation_up(authority: CertificateAuthority) -> None:
    """The CA's service issues to itself whenever it looks; it may not even run."""
    authority.issue_own()
    authority.begin_rotation()
    authority.activate_rotation()
    authority.finish_rotation()
    assert authority.stage == STEADY


def test_sequence_of_the_bundle_rises_with_each_step(authority: CertificateAuthority, tmp_path: Path) -> None:
    """As the SPIFFE bundle wants it, over restarts too."""
    before = authority.sequence()
    turn(authority)
    assert (before, authority.sequence(), CertificateAuthority.open(tmp_path / "ca").sequence()) == (1, 4, 4)


def test_verifier_that_wants_a_list_from_every_signer_finds_one(authority: CertificateAuthority) -> None:
    """The root's own list is signed while its key is there, and lasts as long as the root."""
    authority.revoke(authority.issue("orders").serial)
    of_issuer, of_root = certificates.crls_of(authority.crl)
    (root,) = roots_of(authority.bundle)
    assert of_root.is_signature_valid(root.public_key())  # type: ignore[arg-type]
    assert (len(list(of_root)), of_root.next_update_utc) == (0, root.not_valid_after_utc)
    assert len(list(of_issuer)) == 1


def test_log_says_by_which_key_a_leaf_was_signed(authority: CertificateAuthority, tmp_path: Path) -> None:
    """Serial numbers of issuers change with their renewal, their keys don't."""
    authority.issue("orders")
    line = json.loads((tmp_path / "ca" / "issued.jsonl").read_text().splitlines()[-1])
    issuer = x509.load_pem_x509_certificate((tmp_path / "ca" / "issuer.pem").read_bytes())
    assert (line["issuer"], line["issuer_key"]) == (certificates.serial_of(issuer), certificates.key_id_of(issuer))


def test_verifier_of_another_make_takes_the_chain_until_it_ends(authority: CertificateAuthority, clock: Clock) -> None:
    """cryptography's own, given leaf and issuer as a peer shows them; without the issuer there is no way to the root."""
    issued = authority.issue("orders", ttl=60)
    leaf, issuer = x509.load_pem_x509_certificates(issued.chain)
    when = datetime.datetime.fromtimestamp(NOW, datetime.UTC)
    policy = verification.PolicyBuilder().store(verification.Store(roots_of(authority.bundle))).time(when)
    assert policy.build_client_verifier().verify(leaf, [issuer]).chain[-1] == roots_of(authority.bundle)[0]
    with pytest.raises(verification.VerificationError):
        policy.build_client_verifier().verify(leaf, [])
