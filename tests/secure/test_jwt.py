"""Is a token believed exactly when its provider's terms say so?

Tokens made by PyJWT with real keys of every kind, judged by the core through the seam; and JWT-SVIDs as the CA issues them.
What each claim and header may be is tested in the core itself (`secure/jwt/tests.rs`).
"""

from __future__ import annotations

import base64
import json
import time
from pathlib import Path
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from jwt.algorithms import ECAlgorithm, OKPAlgorithm, RSAAlgorithm

from meshlib._native import core
from meshlib.errors import ConfigError, IdentityError, KeyFileError, Refused
from meshlib.secure import jwt_svid
from meshlib.secure.jwt_svid import TokenKey, TokenKeys

NOW = 1_800_000_000.0
ISSUER = "https://issuer.example"
RSA = rsa.generate_private_key(65537, 2048)
P256, P384 = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP384R1())
ED25519 = ed25519.Ed25519PrivateKey.generate()
WORKLOAD = "spiffe://shop.internal/ns/default/sa/web"


def plan(**terms: Any) -> bytes:
    """A provider as the server plan has it."""
    usual = {"name": "auth", "issuer": ISSUER, "audiences": ["orders"], "algorithms": ["RS256", "ES256"], "leeway": 30.0}
    rest = {"longest": 86400.0, "from": [], "forward": False, "is_svid": False}
    return json.dumps({**usual, **rest, **terms}).encode()


def jwk(key: Any, **members: Any) -> dict[str, Any]:
    algorithm = {rsa.RSAPrivateKey: RSAAlgorithm, ec.EllipticCurvePrivateKey: ECAlgorithm}
    maker: Any = next((each for kind, each in algorithm.items() if isinstance(key, kind)), OKPAlgorithm)
    plain = json.loads(maker.to_jwk(key.public_key()))
    plain.pop("key_ops", None)
    return {**plain, "kid": "k1", **members}


def key_set(*keys: dict[str, Any]) -> bytes:
    return json.dumps({"keys": keys}).encode()


def token(key: Any, algorithm: str, headers: dict[str, Any] | None = None, **claims: Any) -> bytes:
    usual = {"iss": ISSUER, "aud": "orders", "sub": "ada", "exp": NOW + 60}
    return jwt.encode({**usual, **claims}, key, algorithm, headers={"kid": "k1", **(headers or {})}).encode()


def verdict(text: bytes, keys: bytes, provider: bytes, wall: float = NOW) -> str:
    """`accepted`, or what the refusal says."""
    try:
        core.verify_jwt(text, keys, provider, wall)
    except Refused as error:
        assert error.reason == "secure.jwt"
        return error.message
    return "accepted"


@pytest.mark.parametrize(
    ("algorithm", "key"),
    [
        *((name, RSA) for name in ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512")),
        ("ES256", P256),
        ("ES384", P384),
        ("EdDSA", ED25519),
    ],
)
def test_every_configured_algorithm_is_verified(algorithm: str, key: Any) -> None:
    """RS, PS and ES with 256 and 384, RS and PS with 512, and EdDSA: good ones are taken, changed ones are not."""
    text, provider = token(key, algorithm), plan(algorithms=[algorithm])
    head, payload, signature = text.split(b".")
    changed = b".".join((head, payload, signature[:9] + (b"A" if signature[9:10] != b"A" else b"B") + signature[10:]))
    assert verdict(text, key_set(jwk(key)), provider) == "accepted"
    assert verdict(text, key_set(jwk(key, alg=algorithm)), provider) == "accepted"
    assert verdict(changed, key_set(jwk(key)), provider) == "the token's signature is wrong."


def test_a_verified_token_tells_its_claims() -> None:
    """What rules and applications ask about is read from the signed part."""
    text = token(RSA, "RS256", azp="web", aud=["orders", "x"], realm={"roles": ["clerk"]})
    found = core.verify_jwt(text, key_set(jwk(RSA)), plan(), NOW)
    claims = json.loads(found.pop("claims"))
    assert claims["realm"] == {"roles": ["clerk"]}
    assert found == {
        "issuer": ISSUER,
        "subject": "ada",
        "principal": f"{ISSUER}/ada",
        "audiences": ["orders", "x"],
        "presenter": "web",
        "expires": int(NOW) + 60,
    }


@pytest.mark.parametrize("form", [serialization.Encoding.PEM, serialization.Encoding.DER])
def test_a_public_key_is_never_a_shared_secret(form: serialization.Encoding) -> None:
    """Key confusion: an HMAC over what everybody can read."""
    import hashlib
    import hmac

    public = RSA.public_key().public_bytes(form, serialization.PublicFormat.SubjectPublicKeyInfo)
    claims = base64.urlsafe_b64encode(json.dumps({"iss": ISSUER, "aud": "orders", "exp": NOW + 60}).encode()).rstrip(b"=")
    for secret in (public, json.dumps(jwk(RSA)).encode()):
        message = base64.urlsafe_b64encode(b'{"alg":"HS256","kid":"k1"}').rstrip(b"=") + b"." + claims
        signature = base64.urlsafe_b64encode(hmac.digest(secret, message, hashlib.sha256)).rstrip(b"=")
        assert "algorithm" in verdict(message + b"." + signature, key_set(jwk(RSA)), plan())
    with pytest.raises(ConfigError, match="HS256"):
        core.verify_jwt(b"", b'{"keys":[]}', plan(algorithms=["RS256", "HS256"]), NOW)


def test_the_algorithm_of_the_key_binds() -> None:
    """A key for RS256 judges no PS256, though both are of the same key."""
    both = plan(algorithms=["RS256", "PS256"])
    assert verdict(token(RSA, "PS256"), key_set(jwk(RSA)), both) == "accepted"
    assert "not for the token's algorithm" in verdict(token(RSA, "PS256"), key_set(jwk(RSA, alg="RS256")), both)


def test_a_key_that_a_token_brings_along_is_not_looked_at() -> None:
    """jwk, jku, x5u and x5c are words of whoever sent the token."""
    attacker = rsa.generate_private_key(65537, 2048)
    brought = {"jwk": jwk(attacker), "jku": "https://evil.example/jwks.json", "x5c": ["MIIB"], "x5u": "https://evil.example"}
    assert verdict(token(attacker, "RS256", brought), key_set(jwk(RSA)), plan()) == "the token's signature is wrong."
    assert verdict(token(RSA, "RS256", brought), key_set(jwk(RSA)), plan()) == "accepted"


def test_what_is_published_for_something_else_is_left_out_with_a_reason() -> None:
    """use, key_ops, size and curve: the good key stays."""
    weak = rsa.generate_private_key(65537, 1024)  # the size is the point
    keys = [
        jwk(RSA),
        jwk(P256, kid="enc", use="enc"),
        jwk(P256, kid="ops", key_ops=["encrypt"]),
        jwk(weak, kid="weak"),
        jwk(ec.generate_private_key(ec.SECP256K1()), kid="curve"),
        {"kty": "oct", "k": "c2VjcmV0", "kid": "secret"},
    ]
    names, ignored = core.parse_jwks(key_set(*keys))
    assert names == ["k1"]
    assert [reason.split('"')[1] for reason in ignored] == ["enc", "ops", "weak", "curve", "secret"]


def test_a_token_is_judged_by_the_time_that_is_given() -> None:
    """The core has no clock."""
    text = token(RSA, "RS256", nbf=NOW)
    found = [verdict(text, key_set(jwk(RSA)), plan(), NOW + late) for late in (-31, -30, 0, 89, 90)]
    assert found == [
        "the token is not valid yet: is a clock wrong?.",
        "accepted",
        "accepted",
        "accepted",
        "the token has expired.",
    ]


def test_a_plan_with_a_field_too_many_is_refused() -> None:
    """What isn't understood isn't half enforced."""
    with pytest.raises(ConfigError, match="unknown field"):
        core.verify_jwt(b"", b'{"keys":[]}', plan(audience="orders"), NOW)


# --- JWT-SVIDs


def svid_set(key: TokenKey) -> bytes:
    return jwt_svid.jwks([key.jwk])


def test_an_issued_svid_is_one_for_us() -> None:
    """Subject, audience, times; and no header but alg, kid and typ."""
    key = TokenKey.make()
    text = key.issue(WORKLOAD, ["orders"], now=NOW)
    assert jwt.get_unverified_header(text) == {"alg": "ES256", "kid": key.kid, "typ": "JWT"}
    claims = jwt_svid.validated(text, svid_set(key), "shop.internal", "orders", now=NOW)
    assert claims == {"sub": WORKLOAD, "aud": "orders", "iat": int(NOW), "exp": int(NOW) + 300, "iss": "shop.internal"}


@pytest.mark.parametrize(
    ("domain", "audience", "late", "text"),
    [
        ("shop.internal", "invoices", 0, "meant for somebody else"),
        ("shop.internal", "orders", 330, "expired"),
        ("shop.internal", "orders", -31, "not valid yet"),
        ("other.internal", "orders", 0, "issued by nobody"),
    ],
)
def test_an_svid_for_others_is_refused(domain: str, audience: str, late: float, text: str) -> None:
    """Trust domain, audience and times are checked each."""
    key = TokenKey.make()
    with pytest.raises(Refused, match=text):
        jwt_svid.validated(key.issue(WORKLOAD, ["orders"], now=NOW), svid_set(key), domain, audience, now=NOW + late)


def test_keys_for_certificates_verify_no_tokens() -> None:
    """A key of the use x509-svid is none for tokens, and one of jwt-svid is none of another provider's."""
    key = TokenKey.make()
    text = key.issue(WORKLOAD, ["orders"], now=NOW)
    with pytest.raises(Refused, match="has not published"):
        jwt_svid.validated(text, jwt_svid.jwks([{**key.jwk, "use": "x509-svid"}]), "shop.internal", "orders", now=NOW)
    loaded = serialization.load_pem_private_key(bytes(key.pem), None)
    plain = token(loaded, "ES256", {"kid": key.kid})
    assert "has not published" in verdict(plain, svid_set(key), plan())


@pytest.mark.parametrize("bad", ["", "web", "spiffe://shop.internal", "spiffe://shop.internal/", "https://shop.internal/a"])
def test_only_a_workload_gets_a_token(bad: str) -> None:
    """A trust domain authenticates nobody."""
    with pytest.raises(IdentityError):
        TokenKey.make().issue(bad, ["orders"])


def test_a_token_needs_an_audience_and_ends_soon() -> None:
    """Whoever is shown it could show it: so not to everybody, and not for long."""
    key = TokenKey.make()
    for audiences, ttl in (([], 300.0), ([""], 300.0), ("", 300.0), (["orders"], 3601.0), (["orders"], 0.0)):
        with pytest.raises(IdentityError):
            key.issue(WORKLOAD, audiences, ttl=ttl)


def test_keys_are_turned_over_without_a_refused_token(tmp_path: Path) -> None:
    """Published first, signing later, gone last."""
    folder = tmp_path / "ca"
    folder.mkdir(mode=0o700)
    keys = TokenKeys(folder)
    assert json.loads(keys.jwks) == {"keys": []}
    keys.create()
    old = keys.signing()
    keys.create()
    assert keys.signing().kid == old.kid
    before = old.issue(WORKLOAD, ["orders"], now=NOW)

    def takes(text: str) -> bool:
        try:
            jwt_svid.validated(text, keys.jwks, "shop.internal", "orders", now=NOW)
        except Refused:
            return False
        return True

    with pytest.raises(IdentityError):
        keys.activate()
    keys.begin()
    with pytest.raises(IdentityError):
        keys.begin()
    assert (keys.signing().kid, takes(before)) == (old.kid, True)
    with pytest.raises(IdentityError):
        keys.finish()
    keys.activate()
    new = keys.signing()
    after = new.issue(WORKLOAD, ["orders"], now=NOW)
    assert (new.kid == old.kid, takes(before), takes(after)) == (False, True, True)
    keys.finish()
    assert (takes(before), takes(after)) == (False, True)


def test_the_private_key_is_for_its_owner_alone(tmp_path: Path) -> None:
    """Files that others can read are refused, and nothing shows the key."""
    folder = tmp_path / "ca"
    folder.mkdir(mode=0o700)
    keys = TokenKeys(folder)
    keys.create()
    file = folder / "tokens.key"
    assert file.stat().st_mode & 0o777 == 0o600
    assert "PRIVATE" not in repr(keys.signing())
    assert "PRIVATE" not in str(keys.signing().pem)
    file.chmod(0o644)
    with pytest.raises(KeyFileError):
        keys.signing()


def test_a_key_that_was_never_published_signs_nothing(tmp_path: Path) -> None:
    """Somebody pulled the plug between two files, or put another key there."""
    folder = tmp_path / "ca"
    folder.mkdir(mode=0o700)
    keys = TokenKeys(folder)
    keys.create()
    for name in ("tokens-next.key", "tokens.key"):
        (folder / name).write_bytes(bytes(TokenKey.make().pem))
        (folder / name).chmod(0o600)
    with pytest.raises(IdentityError, match="no new key"):
        keys.activate()
    with pytest.raises(KeyFileError, match="not among the published"):
        keys.signing()


async def test_a_token_of_our_own_trust_domain_is_believed_by_a_service_of_it(tmp_path: Path) -> None:
    """The CA publishes the keys beside the certificates, and the mesh finds them there without a word about where."""
    from meshlib.secure.jwt_svid import handed_out
    from tests.support import identities, mesh_of

    authority = identities(tmp_path, "me")
    token = handed_out(authority, "me", authority.id_of("me"), ["orders"]).text
    authority.publish(tmp_path / "identities")
    secure = {"jwt": {"own": {"trust_domain": authority.trust_domain, "audiences": ["orders"]}}}
    with mesh_of(tmp_path, {}, mode="enforce") as mesh:
        document = json.loads(mesh.config.file.read_text())
        document["secure"].update(secure)
        document["services"]["me"] = {"secure": {"allow": [{"name": "all", "from": ["*"]}], "jwt": {"require": ["/*"]}}}
        mesh.config.file.write_text(json.dumps(document))
        assert mesh.reload()
        assert mesh.trust.keys is not None
        await mesh.trust.keys.first()

        def ask(*fields: tuple[bytes, bytes]) -> int:
            headers = [(b"host", b"me"), *fields]
            return mesh.gate.begin("GET", b"/x", headers, authority.id_of("me"), True, 1.0, None, time.time()).status

        assert ask((b"authorization", b"Bearer " + token.encode())) == 0
        assert (ask(), ask((b"authorization", b"Bearer " + token.encode()[:-4] + b"AAAA"))) == (401, 401)
