"""Is a token good once, for one service, for a short time, and does the CA keep nothing that is worth stealing?"""

from __future__ import annotations

import base64
import json
import multiprocessing
import pickle
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import pytest

from meshlib.errors import IdentityError
from meshlib.secure import CertificateAuthority
from meshlib.secure.tokens import PREFIX, Token, Tokens, fingerprint_matches
from tests.secure.ca_world import ORDERS, events
from tests.secure.test_ca import NOW, Clock, mode_of, roots_of


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def authority(tmp_path: Path, clock: Clock) -> CertificateAuthority:
    return CertificateAuthority.create(tmp_path / "ca", "shop.internal", clock=clock)


@pytest.fixture
def tokens(authority: CertificateAuthority) -> Tokens:
    return Tokens(authority)


def proof_of(token: Token) -> str:
    return bytes(token.proof).decode()


def refusal(tokens: Tokens, proof: str) -> str:
    with pytest.raises(IdentityError) as refused:
        tokens.find(proof)
    return refused.value.reason


def test_text_holds_what_the_other_machine_needs(tokens: Tokens, authority: CertificateAuthority) -> None:
    """The ID, the root's fingerprint, the address if there was one; and white space around it does no harm."""
    token = tokens.make("orders", "default", address="https://ca.host:8444")
    read = Token.parse(f"\n  {token.text}\n")
    assert read == token
    assert (read.spiffe_id, read.address) == (ORDERS, "https://ca.host:8444")
    assert fingerprint_matches(roots_of(authority.bundle)[0], read)
    assert not fingerprint_matches(roots_of(CertificateAuthority.create(None, "shop.internal").bundle)[0], read)


def test_token_shows_its_secret_to_nobody(tokens: Tokens) -> None:
    """Not in repr or str, and it can't be pickled."""
    token = tokens.make("orders")
    assert proof_of(token).split(".")[1] not in f"{token!r} {token!s}"
    with pytest.raises(TypeError, match="pickled"):
        pickle.dumps(token)


def test_ca_keeps_the_hash_only(tokens: Tokens, tmp_path: Path) -> None:
    """In private files; the secret is nowhere in the folder, nor in the log."""
    secret = proof_of(tokens.make("orders")).split(".")[1]
    held = {path: path.read_bytes() for path in (tmp_path / "ca").rglob("*") if path.is_file()}
    assert [path for path, content in held.items() if secret.encode() in content] == []
    (kept,) = (tmp_path / "ca" / "tokens").iterdir()
    assert (mode_of(kept), mode_of(kept.parent)) == (0o600, 0o700)


def _with(**changes: Any) -> str:
    content = {"id": ORDERS, "root": ["0" * 64], "token": f"{'0' * 16}.{'A' * 43}", **changes}
    return PREFIX + base64.urlsafe_b64encode(json.dumps(content).encode()).rstrip(b"=").decode()


@pytest.mark.parametrize(
    "text",
    [
        "", "mesh1.", "mesh2.AAAA", "mesh1.!!!!", "mesh1.AAAA", PREFIX + "A" * 5000,
        _with(id=7), _with(root=[]), _with(root=["0" * 63]), _with(root="0" * 64), _with(token="x"), _with(token=None), _with(ca=1),
        PREFIX + base64.urlsafe_b64encode(b"[]").decode(), PREFIX + base64.urlsafe_b64encode(b"\xff" * 9).decode(),
    ],
)  # fmt: skip
def test_what_is_no_token_is_refused(text: str) -> None:
    """In one sentence, with the likely cause."""
    assert Token.parse(_with()).spiffe_id == ORDERS
    with pytest.raises(IdentityError, match="cut off while copying"):
        Token.parse(text)


def test_token_is_good_once(tokens: Tokens, authority: CertificateAuthority) -> None:
    """Looking at it costs nothing; a second use is told as one."""
    proof = proof_of(tokens.make("orders"))
    grant = tokens.find(proof)
    assert (grant.service, grant.spiffe_id, grant.dns_name) == ("orders", ORDERS, "orders.default.shop.internal")
    tokens.consume(tokens.find(proof))
    assert refusal(tokens, proof) == "token.used"
    with pytest.raises(IdentityError, match="was used already"):
        tokens.consume(grant)
    assert events(authority) == ["create", "token.made", "token.used"]


def test_token_that_was_taken_back_between_look_and_use_buys_nothing(tokens: Tokens, authority: CertificateAuthority) -> None:
    """And it isn't called used: that would be the sign of a theft."""
    grant = tokens.find(proof_of(tokens.make("orders")))
    authority.revoke("orders")
    with pytest.raises(IdentityError, match="was taken back") as refused:
        tokens.consume(grant)
    assert refused.value.reason == "token.unknown"


def test_spoiled_record_of_a_token_holds_up_no_revocation(
    tokens: Tokens, authority: CertificateAuthority, tmp_path: Path
) -> None:
    """What can't be read buys nothing either."""
    tokens.make("orders")
    for name, text in (("0" * 16, "half"), ("1" * 16, "[]"), ("2" * 16, "{}")):
        (tmp_path / "ca" / "tokens" / f"{name}.json").write_text(text)
        (tmp_path / "ca" / "tokens" / f"{name}.json").chmod(0o600)
    assert authority.revoke("orders") == []
    assert events(authority)[-1] == "token.revoked"


def test_token_ends_after_a_quarter_of_an_hour(tokens: Tokens, clock: Clock) -> None:
    """To the second; a used one is told as used until then."""
    kept, used = tokens.make("orders"), tokens.make("orders")
    tokens.consume(tokens.find(proof_of(used)))
    clock.now = NOW + 899.9
    assert (tokens.find(proof_of(kept)).service, refusal(tokens, proof_of(used))) == ("orders", "token.used")
    clock.now = NOW + 900
    assert refusal(tokens, proof_of(kept)) == "token.expired"


def test_wrong_secret_learns_nothing(tokens: Tokens) -> None:
    """Not even whether there is a token of that name, good or used."""
    token, used = tokens.make("orders"), tokens.make("web")
    tokens.consume(tokens.find(proof_of(used)))
    names = [proof_of(token).split(".")[0], proof_of(used).split(".")[0], "0" * 16]
    told = set()
    for name in names:
        with pytest.raises(IdentityError) as refused:
            tokens.find(f"{name}.{'A' * 43}")
        told.add((refused.value.reason, str(refused.value)))
    assert [reason for reason, _ in told] == ["token.unknown"]
    assert tokens.find(proof_of(token)).service == "orders"


@pytest.mark.parametrize("proof", ["", "..", "../../ca/root.key", f"{'0' * 16}/{'A' * 43}", f"{'0' * 15}g.{'A' * 43}", "\0" * 60])
def test_names_of_files_are_never_made_of_what_was_sent(tokens: Tokens, proof: str) -> None:
    """Only sixteen hex digits become one."""
    assert refusal(tokens, proof) == "token.unknown"


def test_tokens_that_have_ended_are_tidied_away(tokens: Tokens, clock: Clock, tmp_path: Path) -> None:
    """When the next one is made: the used and the unused."""
    first, second = tokens.make("orders"), tokens.make("orders", life=60)
    tokens.consume(tokens.find(proof_of(second)))
    clock.now += 60
    third = tokens.make("orders")
    names = {path.name for path in (tmp_path / "ca" / "tokens").iterdir()}
    assert names == {f"{proof_of(each).split('.')[0]}.json" for each in (first, third)}


@pytest.mark.parametrize("life", [0, -1, 86401, float("nan")])
def test_token_for_a_week_is_refused(tokens: Tokens, life: float) -> None:
    """It's as good as the identity that it buys, and lies around meanwhile."""
    with pytest.raises(IdentityError, match="can't live"):
        tokens.make("orders", life=life)


def test_token_for_no_service_is_refused(tokens: Tokens, tmp_path: Path) -> None:
    """And nothing is made."""
    with pytest.raises(IdentityError, match="service name"):
        tokens.make("../ca")
    assert not (tmp_path / "ca" / "tokens").exists()


def test_during_a_rotation_a_token_vouches_for_both_roots(tokens: Tokens, authority: CertificateAuthority) -> None:
    """Made before the second step, it is good after it."""
    authority.begin_rotation()
    token = tokens.make("orders")
    authority.activate_rotation()
    assert [fingerprint_matches(root, token) for root in roots_of(authority.bundle)] == [True, True]


def test_ca_in_memory_has_no_tokens() -> None:
    """Nobody could take them there."""
    with pytest.raises(IdentityError, match="CA in a folder"):
        Tokens(CertificateAuthority.create(None, "shop.internal"))


def _try(folder: Path, proof: str, barrier: Barrier, won: Any) -> None:
    tokens = Tokens(CertificateAuthority.open(folder, clock=Clock()))
    barrier.wait(20)
    try:
        tokens.consume(tokens.find(proof))
    except IdentityError as error:
        won.put(error.reason)
    else:
        won.put("won")


def test_of_many_processes_one_uses_the_token(tokens: Tokens, authority: CertificateAuthority, tmp_path: Path) -> None:
    """All at once: one wins, the others are told that it was used."""
    proof = proof_of(tokens.make("orders"))
    start = multiprocessing.get_context("fork")
    barrier, won = start.Barrier(6), start.Queue()
    racers = [start.Process(target=_try, args=(tmp_path / "ca", proof, barrier, won)) for _ in range(6)]
    for racer in racers:
        racer.start()
    said = sorted(won.get(timeout=20) for _ in racers)
    for racer in racers:
        racer.join(20)
    assert said == ["token.used"] * 5 + ["won"]
    assert events(authority).count("token.used") == 1
