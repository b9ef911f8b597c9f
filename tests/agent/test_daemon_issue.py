"""Does each entry's service have an identity, a fresh one, and none that was taken back?"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import jwt
import pytest
from cryptography import x509

from meshlib.agent.issue import Issuer
from meshlib.agent.run import configured, lost_identities
from meshlib.config import Config
from meshlib.errors import IdentityError, TrustDomainError
from meshlib.secure import CertificateAuthority, certificates
from meshlib.secure.authority import Service
from meshlib.secure.jwt_svid import TokenKeys, kid_of, kids_of, validated
from tests.agent.daemon_world import DOMAIN, config_of, mesh_file
from tests.secure.ca_world import events, serving, token_of, url_of


@pytest.fixture
def authority(tmp_path: Path) -> CertificateAuthority:
    return CertificateAuthority.create(tmp_path / "ca", DOMAIN)


Make = Callable[..., Any]


@pytest.fixture
async def issuing() -> AsyncIterator[Make]:
    """Start an issuer; it is closed after the test."""
    made: list[Issuer] = []

    async def make(config: Config, **more: Any) -> Issuer:
        issuer = Issuer(config, **more)
        made.append(issuer)
        await issuer.start(10.0)
        return issuer

    yield make
    for issuer in made:
        await issuer.close()


async def until(is_so: Callable[[], bool], seconds: float = 10.0) -> None:
    async with asyncio.timeout(seconds):
        while not is_so():
            await asyncio.sleep(0.05)


def entry_of(config: Config, index: int = 0) -> Any:
    assert config.agent is not None
    return config.agent.entries[index]


# ---------------------------------------------------------------------------------------------------- a CA in a folder


async def test_an_entry_gets_an_identity_that_the_folder_vouches_for(tmp_path: Path, authority: Any, issuing: Make) -> None:
    """Chain, key and bundle belong together, and the audit log has the line."""
    config = config_of(tmp_path)
    issuer = await issuing(config)
    identity = issuer.identity_of(entry_of(config))
    assert identity is not None
    assert identity.spiffe_id == f"spiffe://{DOMAIN}/ns/default/sa/orders"
    assert certificates.is_anchored(
        x509.load_pem_x509_certificates(identity.chain), x509.load_pem_x509_certificates(issuer.bundles()[DOMAIN])
    )
    assert events(authority)[-1] == "issue"
    assert issuer.alarms == []


async def test_entries_of_one_service_share_its_identity(tmp_path: Path, authority: Any, issuing: Make) -> None:
    """One certificate is issued, and both get it."""
    config = config_of(tmp_path, "ca: ca", "[{service: orders, uid: 0}, {service: orders, uid: 7}, {service: stock, uid: 7}]")
    issuer = await issuing(config)
    found = [issuer.identity_of(entry_of(config, index)) for index in range(3)]
    assert found[0] is found[1]
    assert len({identity.serial for identity in found}) == 2
    assert events(authority).count("issue") == 2


async def test_a_certificate_is_renewed_at_half_of_its_life_and_everybody_is_told(
    tmp_path: Path, authority: Any, issuing: Make
) -> None:
    """With a life of four seconds, within three; who watches is called back."""
    config = config_of(tmp_path)
    issuer = await issuing(config, life=4.0)
    told: list[str] = []
    entry = entry_of(config)
    issuer.watch(lambda: told.append(issuer.identity_of(entry).serial))
    first = issuer.identity_of(entry).serial
    begun = time.monotonic()
    await until(lambda: bool(told))
    assert 1.0 < time.monotonic() - begun < 3.9
    assert told[0] != first
    assert issuer.rows()[0]["rotations"] >= 1


class Clock:
    """The wall clock, as a test sets it."""

    def __init__(self) -> None:
        self.now = time.time()

    def __call__(self) -> float:
        return self.now


async def test_renewal_begins_between_two_fifths_and_three_fifths_of_a_day(tmp_path: Path, authority: Any, issuing: Make) -> None:
    """At half of the usual life, give or take a tenth of that: not before 0.45 of it, and not after 0.55."""
    clock, config = Clock(), config_of(tmp_path)
    issuer = await issuing(config, wall_clock=clock)
    entry = entry_of(config)
    first = issuer.identity_of(entry)
    begun = clock.now
    assert first.not_after - begun == pytest.approx(86400, abs=5)
    clock.now = begun + 0.44 * 86400
    await asyncio.sleep(1.5)
    assert issuer.identity_of(entry).serial == first.serial
    clock.now = begun + 0.56 * 86400
    await until(lambda: issuer.identity_of(entry).serial != first.serial)


async def test_three_quarters_of_a_life_without_renewal_are_an_alarm(tmp_path: Path, authority: Any, issuing: Make) -> None:
    """It goes on being served, and stands in what is told."""
    clock, config = Clock(), config_of(tmp_path)
    issuer = await issuing(config, wall_clock=clock)
    entry = entry_of(config)
    (tmp_path / "ca").rename(tmp_path / "away")
    clock.now += 0.7 * 86400
    await until(lambda: any("does not exist" in message for _, message in issuer.alarms))
    assert not any("life are gone" in message for _, message in issuer.alarms)
    assert issuer.rows()[0]["is_overdue"] is False
    clock.now += 0.1 * 86400
    await until(lambda: any("life are gone" in message for _, message in issuer.alarms))
    assert issuer.rows()[0]["is_overdue"] is True
    assert issuer.identity_of(entry) is not None


async def test_a_clock_that_is_set_back_costs_no_identity(tmp_path: Path, authority: Any, issuing: Make) -> None:
    """By an hour: another certificate, which is valid by the clock of now."""
    clock, config = Clock(), config_of(tmp_path)
    issuer = await issuing(config, wall_clock=clock)
    entry = entry_of(config)
    first = issuer.identity_of(entry).serial
    clock.now -= 3600
    authority.begin_rotation()  # it is looked at again
    await until(lambda: issuer.identity_of(entry).serial != first)
    assert issuer.identity_of(entry).not_before <= clock.now


async def test_a_watcher_that_left_is_told_no_more(tmp_path: Path, authority: Any, issuing: Make) -> None:
    """What `watch` answers ends it."""
    config = config_of(tmp_path)
    issuer = await issuing(config, life=3.0)
    told, stayed = list[int](), list[int]()
    leave = issuer.watch(lambda: told.append(1))
    issuer.watch(lambda: stayed.append(1))
    leave()
    await until(lambda: bool(stayed))
    assert told == []


async def test_a_folder_that_is_gone_costs_nothing_before_the_certificate_ends(
    tmp_path: Path, authority: Any, issuing: Make
) -> None:
    """The last good one stays, with an alarm; when it has ended there is none; and when the folder is back, a new one."""
    config = config_of(tmp_path)
    issuer = await issuing(config, life=6.0)
    entry = entry_of(config)
    first = issuer.identity_of(entry).serial
    (tmp_path / "ca").rename(tmp_path / "away")
    await until(lambda: any("does not exist" in message for _, message in issuer.alarms))
    assert issuer.identity_of(entry).serial == first
    await until(lambda: issuer.identity_of(entry) is None, 8.0)
    with pytest.raises(IdentityError):
        await issuer.jwt(entry, ["me"])
    (tmp_path / "away").rename(tmp_path / "ca")
    await until(lambda: issuer.identity_of(entry) is not None, 20.0)
    assert issuer.identity_of(entry).serial != first


async def test_a_revoked_identity_is_given_up_at_once_and_not_issued_again_by_itself(
    tmp_path: Path, authority: Any, issuing: Make
) -> None:
    """Only who issues to it anew trusts it again: a restart of the agent doesn't."""
    config = config_of(tmp_path)
    issuer = await issuing(config)
    entry = entry_of(config)
    authority.revoke("orders")
    await until(lambda: issuer.identity_of(entry) is None, 4.0)
    again = await issuing(config)
    assert again.identity_of(entry) is None
    assert any("was revoked" in message for _, message in again.alarms)
    assert events(authority).count("issue") + events(authority).count("renewal") == 1
    authority.issue("orders")
    later = await issuing(config)
    assert later.identity_of(entry) is not None


async def test_a_new_root_counts_within_seconds_and_the_leaf_follows(tmp_path: Path, authority: Any, issuing: Make) -> None:
    """Begin: two roots in the bundle. Activate: a certificate of the new issuer. Finish: the old root is gone."""
    config = config_of(tmp_path)
    issuer = await issuing(config)
    entry = entry_of(config)

    def roots() -> int:
        return len(x509.load_pem_x509_certificates(issuer.identity_of(entry).bundles[DOMAIN]))

    first = issuer.identity_of(entry).serial
    authority.begin_rotation()
    await until(lambda: roots() == 2)
    assert issuer.identity_of(entry).serial == first
    authority.activate_rotation()
    await until(lambda: issuer.identity_of(entry).serial != first)
    authority.finish_rotation()
    await until(lambda: roots() == 1)


async def test_the_ca_of_another_trust_domain_is_refused(tmp_path: Path) -> None:
    """Before anything is served."""
    CertificateAuthority.create(tmp_path / "ca", "other.internal")
    issuer = Issuer(config_of(tmp_path))
    with pytest.raises(TrustDomainError, match=r"is that of other\.internal"):
        issuer.check()


async def test_a_token_is_for_its_audience_and_given_again_until_half_of_its_life(
    tmp_path: Path, authority: Any, issuing: Make
) -> None:
    """Its keys are in the bundle for tokens; the audit log has one line for the same question asked twice."""
    config = config_of(tmp_path)
    issuer = await issuing(config)
    entry = entry_of(config)
    token, _ = await issuer.jwt(entry, ["stock"])
    again, _ = await issuer.jwt(entry, ["stock"])
    other, _ = await issuer.jwt(entry, ["stock", "till"])
    assert token == again != other
    assert events(authority).count("jwt.issue") == 2
    claims = validated(token, TokenKeys(tmp_path / "ca").jwks, DOMAIN, "stock")
    assert claims["sub"] == f"spiffe://{DOMAIN}/ns/default/sa/orders"
    assert claims["exp"] - claims["iat"] <= 300
    await until(lambda: len(json.loads(issuer.jwt_bundles()[DOMAIN])["keys"]) == 1)


async def test_the_key_of_tokens_is_told_before_the_first_token(tmp_path: Path, authority: Any, issuing: Make) -> None:
    """It is made when the agent looks at its parts, and not by the first who wants a token."""
    config = config_of(tmp_path)
    Issuer(config).check()
    issuer = await issuing(config)
    await until(lambda: len(kids_of(issuer.jwt_bundles()[DOMAIN])) == 1)
    before = kids_of(issuer.jwt_bundles()[DOMAIN])
    token, _ = await issuer.jwt(entry_of(config), ["stock"])
    assert {kid_of(token)} == before


async def test_all_who_ask_for_one_token_at_once_get_the_same(tmp_path: Path, authority: Any, issuing: Make) -> None:
    """It is made once, however many they are and whoever of them goes away; what goes wrong is told to all, and tried anew after."""
    config = config_of(tmp_path)
    issuer = await issuing(config)
    entry = entry_of(config)
    asked = [asyncio.create_task(issuer.jwt(entry, ["stock"])) for _ in range(200)]
    await asyncio.sleep(0)
    asked[0].cancel()
    found = await asyncio.gather(*asked, return_exceptions=True)
    assert isinstance(found[0], asyncio.CancelledError)
    assert len(set(found[1:])) == 1
    assert events(authority).count("jwt.issue") == 1
    bad = await asyncio.gather(*(issuer.jwt(entry, ["no name"]) for _ in range(3)), return_exceptions=True)
    assert [getattr(error, "reason", None) for error in bad] == ["jwt.audience"] * 3
    assert issuer._under_way == {}


async def test_a_token_without_an_audience_is_refused(tmp_path: Path, authority: Any, issuing: Make) -> None:
    """By its reason, which the Workload API tells apart."""
    config = config_of(tmp_path)
    issuer = await issuing(config)
    for audiences in ([], [""]):
        with pytest.raises(IdentityError) as caught:
            await issuer.jwt(entry_of(config), audiences)
        assert caught.value.reason == "jwt.audience"


async def test_nobody_fills_the_audit_log_with_tokens(tmp_path: Path, authority: Any, issuing: Make) -> None:
    """So many different ones in a minute, for one identity."""
    config = config_of(tmp_path)
    issuer = await issuing(config)
    issuer._held[f"spiffe://{DOMAIN}/ns/default/sa/orders"].minute = (int(time.monotonic() // 60), 120)
    with pytest.raises(IdentityError) as caught:
        await issuer.jwt(entry_of(config), ["one more"])
    assert caught.value.reason == "jwt.many" or int(time.monotonic() % 60) == 0


async def test_a_changed_configuration_adds_and_removes_identities(tmp_path: Path, authority: Any, issuing: Make) -> None:
    """What stays isn't issued anew."""
    config = config_of(tmp_path)
    issuer = await issuing(config)
    serial = issuer.identity_of(entry_of(config)).serial
    both = config_of(tmp_path, "ca: ca", "[{service: orders, uid: 0}, {service: stock, uid: 0}]")
    issuer.follow(both)
    issuer.look()
    await until(lambda: issuer.identity_of(entry_of(both, 1)) is not None)
    assert issuer.identity_of(entry_of(both, 0)).serial == serial
    issuer.follow(config_of(tmp_path, "ca: ca", "[{service: stock, uid: 0}]"))
    assert issuer.identity_of(entry_of(both, 0)) is None
    assert list(issuer.identities) == [f"spiffe://{DOMAIN}/ns/default/sa/stock"]


async def test_bundles_of_partners_stand_beside_our_own(tmp_path: Path, authority: Any, issuing: Make) -> None:
    """One for each trust domain, in the identity and in what is told to everybody."""
    partner = CertificateAuthority.create(tmp_path / "partner-ca", "bank.example")
    (tmp_path / "bank.pem").write_bytes(partner.bundle)
    config = config_of(tmp_path, more=", federation: {bank.example: {file: bank.pem}}")
    issuer = await issuing(config)
    await until(lambda: "bank.example" in issuer.identity_of(entry_of(config)).bundles)
    assert issuer.bundles().keys() == {DOMAIN, "bank.example"}
    assert json.loads(issuer.jwt_bundles()["bank.example"]) == {"keys": []}


async def test_the_first_partner_takes_no_identity_away(tmp_path: Path, authority: Any, issuing: Make) -> None:
    """Its bundle joins the identities that are in force: none is issued anew, and none is missing for a moment."""
    partner = CertificateAuthority.create(tmp_path / "partner-ca", "bank.example")
    (tmp_path / "bank.pem").write_bytes(partner.bundle)
    config = config_of(tmp_path)
    issuer = await issuing(config)
    entry = entry_of(config)
    serial = issuer.identity_of(entry).serial
    issuer.follow(config_of(tmp_path, more=", federation: {bank.example: {file: bank.pem}}"))
    assert issuer.identity_of(entry).serial == serial
    await until(lambda: "bank.example" in issuer.identity_of(entry).bundles)
    assert issuer.identity_of(entry).serial == serial
    issuer.follow(config)
    await until(lambda: "bank.example" not in issuer.identity_of(entry).bundles)
    assert issuer.identity_of(entry).serial == serial
    assert events(authority).count("issue") == 1


def shared(folder: Path, *services: str) -> Config:
    """A configuration with entries for services of one SPIFFE ID."""
    entries = ", ".join(f"{{service: {service}, uid: 0}}" for service in services)
    file = mesh_file(folder, entries=f"[{entries}]")
    text = file.read_text().replace("orders: {", "orders: {identity: ID, ").replace("stock: {", "stock: {identity: ID, ")
    file.write_text(text.replace("ID", f"spiffe://{DOMAIN}/both"))
    return configured(file)


async def test_an_identity_under_another_service_is_exchanged_when_that_has_one(
    tmp_path: Path, authority: Any, issuing: Make
) -> None:
    """Until then the one that was in force stays so, whatever keeps the other one."""
    before, after = shared(tmp_path, "orders"), shared(tmp_path, "stock")
    issuer = await issuing(before)
    serial = issuer.identity_of(entry_of(before)).serial
    (tmp_path / "ca").rename(tmp_path / "away")
    issuer.follow(after)
    await asyncio.sleep(1.5)
    assert issuer.identity_of(entry_of(after)).serial == serial
    assert "stock" in {about for about, _ in issuer.alarms}
    (tmp_path / "away").rename(tmp_path / "ca")
    await until(lambda: issuer.identity_of(entry_of(after)).serial != serial)
    assert [row["service"] for row in issuer.rows()] == ["stock"]
    serial = issuer.identity_of(entry_of(after)).serial
    issuer.follow(shared(tmp_path, "orders", "stock"))
    await asyncio.sleep(1.0)
    assert issuer.identity_of(entry_of(after)).serial == serial


async def test_what_is_told_of_identities_holds_no_key(tmp_path: Path, authority: Any, issuing: Make) -> None:
    """Nor does what the issuer shows of itself in a log."""
    config = config_of(tmp_path)
    issuer = await issuing(config)
    shown = json.dumps(issuer.rows()) + repr(issuer.__dict__) + repr(list(issuer._held.values()))
    assert "PRIVATE" not in shown
    assert issuer.rows()[0]["service"] == "orders"


# ---------------------------------------------------------------------------------------------------- a CA on another machine


@pytest.fixture
def box(tmp_path: Path) -> Path:
    where = tmp_path / "box"
    where.mkdir(mode=0o700)
    return where


def put_token(box: Path, authority: Any, service: str = "orders") -> None:
    file = box / f"{service}.token"
    file.touch(0o600)
    file.write_text(token_of(authority, service).text)


ENTRY = "[{service: orders, uid: 0, token: orders.token}]"


async def test_an_entry_enrols_with_its_token_and_renews_with_its_certificate(
    box: Path, authority: CertificateAuthority, issuing: Make
) -> None:
    """From the real service of the CA, over TLS; its key is kept where only the agent reads it."""
    put_token(box, authority)
    with serving(Service(authority, ttl=4.0)) as server:
        config = config_of(box, f'enrol: "{url_of(server)}"', ENTRY)
        issuer = await issuing(config)
        entry = entry_of(config)
        first = issuer.identity_of(entry).serial
        assert not (box / "orders.token").exists()
        assert (box / "state" / "identities" / "orders" / "key.pem").stat().st_mode & 0o777 == 0o600
        await until(lambda: issuer.identity_of(entry).serial != first)
        token, _ = await issuer.jwt(entry, ["stock"])
        assert jwt.decode(token, options={"verify_signature": False})["aud"] == "stock"
        await until(lambda: len(json.loads(issuer.jwt_bundles()[DOMAIN])["keys"]) == 1)
    assert events(authority).count("renewal") >= 1


async def test_a_key_of_tokens_that_nobody_has_heard_of_is_asked_for(
    box: Path, authority: CertificateAuthority, issuing: Make
) -> None:
    """Soon and once, though the keys are not due for minutes: until then nobody can say that the token is bad, and then they can."""
    put_token(box, authority)
    assert authority.folder is not None
    keys = TokenKeys(authority.folder)
    with serving(Service(authority)) as server:
        config = config_of(box, f'enrol: "{url_of(server)}"', ENTRY)
        issuer = await issuing(config)
        await until(lambda: len(kids_of(issuer.jwt_bundles()[DOMAIN])) == 1)
        keys.begin()
        keys.activate()
        new = keys.signing().kid
        assert (issuer.may_hear_of(DOMAIN, new), issuer.may_hear_of(DOMAIN, "forged")) == (True, True)
        await until(lambda: new in kids_of(issuer.jwt_bundles()[DOMAIN]))
        assert (issuer.may_hear_of(DOMAIN, "forged"), issuer.may_hear_of("bank.example", "another")) == (False, False)


async def test_a_restart_needs_neither_token_nor_ca(box: Path, authority: CertificateAuthority, issuing: Make) -> None:
    """What was won before is kept; that the CA is away is an alarm, and no failure."""
    put_token(box, authority)
    with serving(Service(authority)) as server:
        config = config_of(box, f'enrol: "{url_of(server)}"', ENTRY)
        serial = (await issuing(config)).identity_of(entry_of(config)).serial
    issuer = await issuing(config)
    assert issuer.identity_of(entry_of(config)).serial == serial
    await until(lambda: any("can't be reached" in message for _, message in issuer.alarms))


async def test_a_token_that_is_used_up_is_taken_out_of_the_configuration(
    box: Path, authority: CertificateAuthority, issuing: Make
) -> None:
    """Which costs nobody an identity, nor a connection; one that is named later is used."""
    put_token(box, authority)
    with serving(Service(authority)) as server:
        url = f'enrol: "{url_of(server)}"'
        config = config_of(box, url, ENTRY)
        issuer = await issuing(config)
        entry = entry_of(config)
        held, serial = list(issuer._held.values()), issuer.identity_of(entry).serial
        fresh = config_of(box, url, "[{service: orders, uid: 0}]")
        issuer.follow(fresh)
        assert issuer.identity_of(entry).serial == serial
        assert lost_identities(config, fresh) == set()
        put_token(box, authority)
        (box / "orders.token").rename(box / "another.token")
        issuer.follow(config_of(box, url, ENTRY.replace("orders.token", "another.token")))
        assert issuer.identity_of(entry).serial == serial
        await until(lambda: issuer.identity_of(entry).serial != serial)
        assert list(issuer._held.values()) == held
        assert not (box / "another.token").exists()


async def test_without_a_token_an_entry_has_no_identity_and_it_is_told_why(
    box: Path, authority: CertificateAuthority, issuing: Make
) -> None:
    """The others have theirs; and a token that is put there later is found."""
    put_token(box, authority, "stock")
    entries = "[{service: orders, uid: 0, token: orders.token}, {service: stock, uid: 0, token: stock.token}]"
    with serving(Service(authority)) as server:
        config = config_of(box, f'enrol: "{url_of(server)}"', entries)
        issuer = await issuing(config)
        assert issuer.identity_of(entry_of(config, 0)) is None
        assert issuer.identity_of(entry_of(config, 1)) is not None
        assert any(about == "orders" and "token" in message for about, message in issuer.alarms)
        put_token(box, authority)
        await until(lambda: issuer.identity_of(entry_of(config, 0)) is not None, 30.0)


async def test_state_that_cannot_be_written_costs_no_identity(box: Path, authority: CertificateAuthority, issuing: Make) -> None:
    """It is kept until the process ends, and that is an alarm."""
    put_token(box, authority)
    (box / "state").write_text("a file where the folder should be")
    with serving(Service(authority)) as server:
        config = config_of(box, f'enrol: "{url_of(server)}"', ENTRY)
        issuer = await issuing(config)
        assert issuer.identity_of(entry_of(config)) is not None
        assert any("end with this process" in message for _, message in issuer.alarms)
        (kept,) = issuer._authority._states  # type: ignore[attr-defined]
        assert kept.stat().st_mode & 0o777 == 0o700
        await issuer.close()
        assert not kept.exists()
