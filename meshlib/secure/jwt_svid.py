"""How does a workload prove who it is where TLS ends before it gets there?

By a JWT-SVID: a token with its SPIFFE ID as subject, signed by a key of its trust domain (SPIFFE JWT-SVID). Whoever holds it
can show it, so it is for one audience and lives for minutes; where both sides speak mTLS, that is the better proof. Tokens
are signed with ES256, and have the headers that the standard allows and no others: alg, kid, typ.

The keys of tokens are keys for nothing else: a root never signs one. They lie in the CA's folder (`tokens.json` has the public
ones, `tokens.key` the one that signs), and belong into the trust domain's bundle as JWKs with the use `jwt-svid`. A new one is
published first and signs later, as others must have heard of it; an old one stays published until what it signed has ended:

    begin      a key joins the published ones; the old one goes on signing
    activate   the new one signs from now on
    finish     the old one is published no more

The CA takes these steps with those of its root's rotation. `handed_out` is how a workload gets a token, by hand (`meshlib ca
jwt`) or from the CA's service (`authority.py`), and each is logged. The first key is made when a service of the CA begins, since
others must have heard of that one, too; by hand, with the first token.

Tokens that come in are judged by the core, like those of any provider (`is_svid`), with the keys of the subject's own trust
domain. `validated` does that for one token by hand. No token is revoked, and none is counted: it ends soon.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from .._native import core
from ..errors import IdentityError, KeyFileError
from . import certificates, files, ledger

if TYPE_CHECKING:
    from .ca import CertificateAuthority

# Seconds: what SPIRE gives, and the most that is given here.
LIFE: Final = 300.0
LONGEST: Final = 3600.0
# The event in the audit log.
ISSUED: Final = "jwt.issue"
ALGORITHMS: Final = ("ES256", "ES384", "RS256", "RS384", "RS512", "PS256", "PS384", "PS512")
LEEWAY: Final = 30.0
# Of audiences: a token is a header, and a line of the audit log.
MOST: Final = 16
LONGEST_NAMES: Final = 4096

_PUBLIC, _PRIVATE, _NEXT = "tokens.json", "tokens.key", "tokens-next.key"


@dataclass(frozen=True, slots=True)
class TokenKey:
    """A key that signs tokens. `kid` is its thumbprint (RFC 7638)."""

    kid: str
    jwk: dict[str, str]
    _key: Any = field(repr=False)

    @classmethod
    def make(cls) -> TokenKey:
        from cryptography.hazmat.primitives.asymmetric import ec

        return cls._of(ec.generate_private_key(ec.SECP256R1()))

    @classmethod
    def load(cls, pem: bytes) -> TokenKey:
        from cryptography.hazmat.primitives.asymmetric import ec
        from cryptography.hazmat.primitives.serialization import load_pem_private_key

        try:
            key = load_pem_private_key(pem, None)
        except (ValueError, TypeError):
            key = None
        if not isinstance(key, ec.EllipticCurvePrivateKey) or key.curve.name != "secp256r1":
            raise KeyFileError("the key of the tokens can't be used.", hint="It is a P-256 key in PKCS#8, unencrypted.")
        return cls._of(key)

    @classmethod
    def _of(cls, key: Any) -> TokenKey:
        numbers = key.public_key().public_numbers()
        x, y = (_encoded(number.to_bytes(32, "big")) for number in (numbers.x, numbers.y))
        parts = {"crv": "P-256", "kty": "EC", "x": x, "y": y}
        kid = _encoded(hashlib.sha256(json.dumps(parts, separators=(",", ":"), sort_keys=True).encode()).digest())
        return cls(kid, {**parts, "kid": kid, "use": "jwt-svid"}, key)

    @property
    def pem(self) -> files.Secret:
        from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

        return files.Secret(self._key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))

    def issue(self, spiffe_id: str, audiences: Sequence[str], *, ttl: float = LIFE, now: float | None = None) -> str:
        """A token for a workload, to be shown to these audiences. Whether it may have one, the caller has made sure of."""
        import jwt

        try:
            path = core.parse_spiffe_id(spiffe_id)[1]
        except ValueError as error:
            raise IdentityError(str(error), hint="Give the SPIFFE ID of a workload.") from None
        if path in {"", "/"}:
            raise IdentityError(f"{spiffe_id} is a trust domain, and no workload.", hint="Give the SPIFFE ID of a workload.")
        named = [audiences] if isinstance(audiences, str) else list(audiences)
        if not named or not all(named):
            raise IdentityError(
                "a token needs an audience.", hint="Name who shall take it: its SPIFFE ID, or its name.", reason="jwt.audience"
            )
        is_plain = all(name.isascii() and name.isprintable() and " " not in name for name in named)
        if not is_plain or len(named) > MOST or sum(map(len, named)) > LONGEST_NAMES:
            raise IdentityError(
                "these audiences can't stand in a token.",
                hint=f"At most {MOST}, {LONGEST_NAMES} characters together, of ASCII and without spaces: a SPIFFE ID, a name, a URL.",
                reason="jwt.audience",
            )
        if not 1.0 <= ttl <= LONGEST:
            raise IdentityError(
                f"a token can't live {ttl:g} s.",
                hint=f"Give 1 to {LONGEST:g} s: it is shown again and again until it ends.",
                reason="jwt.ttl",
            )
        issued = int(time.time() if now is None else now)
        claims = {"sub": spiffe_id, "aud": named if len(named) > 1 else named[0], "iat": issued, "exp": issued + int(ttl)}
        return jwt.encode(claims, self._key, algorithm="ES256", headers={"kid": self.kid, "typ": "JWT"})


def jwks(keys: Sequence[dict[str, str]]) -> bytes:
    """The JWK set of public keys: the part for tokens of a SPIFFE bundle."""
    return json.dumps({"keys": list(keys)}, separators=(",", ":")).encode()


def kids_of(keys: bytes) -> frozenset[str]:
    """The names of the keys of a JWK set, as far as it is one."""
    try:
        return frozenset(str(key["kid"]) for key in json.loads(keys or b"{}").get("keys", ()) if "kid" in key)
    except (ValueError, TypeError, AttributeError, RecursionError):
        return frozenset()


def kid_of(token: str) -> str:
    """The name of the key that a token says it is signed by; "" if it says none."""
    try:
        head = token.split(".", 1)[0]
        kid = json.loads(base64.urlsafe_b64decode(head + "=" * (-len(head) % 4)))["kid"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return ""
    return kid if isinstance(kid, str) else ""


def validated(
    token: str | bytes,
    bundle: bytes,
    trust_domain: str,
    audience: str,
    *,
    leeway: float = LEEWAY,
    now: float | None = None,
) -> dict[str, Any]:
    """The claims of a JWT-SVID of this trust domain, for us; raises Refused for any other. `bundle`: its JWK set for tokens."""
    provider = {
        "name": trust_domain,
        "issuer": trust_domain,
        "audiences": [audience],
        "algorithms": ALGORITHMS,
        "leeway": leeway,
        "longest": 86400.0,
        "from": [],
        "forward": False,
        "is_svid": True,
    }
    text = token.encode() if isinstance(token, str) else token
    wall = time.time() if now is None else now
    found = core.verify_jwt(text, bundle, json.dumps(provider).encode(), wall)
    claims: dict[str, Any] = json.loads(found["claims"])
    return claims


@dataclass(frozen=True, slots=True)
class Handed:
    """A token on its way to its workload."""

    text: str = field(repr=False)
    spiffe_id: str
    expires: float


def handed_out(
    authority: CertificateAuthority, service: str, spiffe_id: str, audiences: Sequence[str], ttl: float = LIFE, **facts: str
) -> Handed:
    """A token for a workload of this trust domain, once the audit log has it. `facts` go there too: who asked, from where."""
    certificates.checked_id(spiffe_id, authority.trust_domain)
    if authority.folder is None:
        raise IdentityError("tokens need a CA in a folder.", hint="Make one: meshlib ca init FOLDER --trust-domain NAME")
    keys = TokenKeys(authority.folder)
    keys.create()
    now, named, key = authority.now(), list(dict.fromkeys(audiences)), keys.signing()
    text = key.issue(spiffe_id, named, ttl=ttl, now=now)
    expires = float(int(now) + int(ttl))
    told = {"audiences": named, "kid": key.kid, "expires": ledger.moment(expires), **facts}
    authority.note(ISSUED, service=service, spiffe_id=spiffe_id, **told)
    return Handed(text, spiffe_id, expires)


class TokenKeys:
    """The keys of a trust domain's tokens, in a folder of the CA that nobody else can open. State is read anew each time."""

    __slots__ = ("where",)

    def __init__(self, where: str | os.PathLike[str]) -> None:
        self.where = Path(where)

    @property
    def exists(self) -> bool:
        return (self.where / _PUBLIC).exists()

    def create(self) -> None:
        """Make the first key; nothing happens if there is one."""
        with files.locked(self.where):
            if not self.exists:
                key = TokenKey.make()
                self._write([key.jwk], (_PRIVATE, key.pem, 0o600))

    @property
    def jwks(self) -> bytes:
        """What is published: for the bundle. A trust domain without token keys publishes none."""
        return jwks(self._public() if self.exists else [])

    def signing(self) -> TokenKey:
        """The key that signs now."""
        with files.folder(self.where) as fd:
            key = TokenKey.load(files.read_secret(fd, self.where, _PRIVATE))
        if key.kid not in {each.get("kid") for each in self._public()}:
            raise KeyFileError(f"{self.where / _PRIVATE} is not among the published keys.", hint="Make new ones.")
        return key

    def begin(self) -> None:
        """Step 1 of turning over: a new key is published, and signs nothing yet. Then publish the bundle."""
        with files.locked(self.where):
            if self._coming() is not None:
                raise IdentityError("a new key for tokens is published already.", hint="Activate it.")
            key = TokenKey.make()
            self._write([*self._public(), key.jwk], (_NEXT, key.pem, 0o600))

    def activate(self) -> None:
        """Step 2: the new key signs from now on, and the old private key is gone."""
        with files.locked(self.where):
            if self._coming() is None:
                raise IdentityError("no new key for tokens is published.", hint="Begin with one.")
            (self.where / _NEXT).rename(self.where / _PRIVATE)

    def finish(self) -> None:
        """Step 3, when the last token of the old key has ended: only what signs is published. Then publish the bundle."""
        with files.locked(self.where):
            if self._coming() is not None:
                raise IdentityError("the new key for tokens doesn't sign yet.", hint="Activate it first.")
            self._write([self.signing().jwk])

    def follow(self, step: str) -> None:
        """Take the step that the root has taken; where there are no keys, or none that waits for it, there is nothing to do."""
        is_coming = self.exists and self._coming() is not None
        if step == "activate" and is_coming:
            self.activate()
        elif self.exists and not is_coming and step != "activate":
            (self.begin if step == "begin" else self.finish)()

    def _coming(self) -> TokenKey | None:
        """The key that will sign next; one that was made and not published yet (somebody pulled the plug) is none."""
        if not (self.where / _NEXT).exists():
            return None
        with files.folder(self.where) as fd:
            key = TokenKey.load(files.read_secret(fd, self.where, _NEXT))
        return key if key.kid in {each.get("kid") for each in self._public()} else None

    def _public(self) -> list[dict[str, str]]:
        with files.folder(self.where) as fd:
            found: list[dict[str, str]] = json.loads(files.read_public(fd, self.where, _PUBLIC))["keys"]
        return found

    def _write(self, public: list[dict[str, str]], *private: tuple[str, bytes, int]) -> None:
        # The public part comes last: a key that isn't published yet signs nothing, and does no harm.
        files.write(self.where, [*private, (_PUBLIC, jwks(public), 0o644)])


def _encoded(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()
