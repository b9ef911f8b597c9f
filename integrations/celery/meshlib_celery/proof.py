"""Who sent this task, if the broker is not to be believed?

The sender signs, with the key of its X.509-SVID, what the task is: id, name, arguments, what is to follow it, and when. The signature is
a JWS (RFC 7515) with the certificates beside it (`x5c`) in a header of the message. The receiver asks of it what it asks of a client's
connection: is this chain good now, under our bundles and revocations? Then, is it a signature of exactly this task, made lately?

    sub      who sent the task. Another than the signer only where a worker of our own service sends a task again (`retry`)
    jti      the id of the task
    task     its name
    iat      when it was signed; with `eta` the time counts from there
    digest   over arguments, callbacks, errbacks, chain, chord, eta, expires, retries and timelimit

Arguments are hashed as JSON sees them, since they aren't the same objects on both sides: a tuple comes as a list, a key as text. What JSON
can't say (pickled objects) isn't signed.

The request at the receiver is what the message says of itself: none of it is believed before the digest is right, and before it is sure
that headers and body don't contradict each other (origin.py).

What it does not prove: that the message comes for the first time. Brokers deliver again, by design, and so can whoever writes into them:
the same task with the same arguments, for as long as `window` and the certificate last. Nor for whom it was meant: names of tasks
should be the only ones in a broker. A signature with this key can't be taken for one of TLS, nor the other way round: TLS signs bytes
that are no base64url.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from typing import Any, Final

import jwt
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, load_pem_private_key
from kombu.utils import json as kombu_json

from meshlib import Mesh, Peer

TYPE: Final = "meshlib-task+jwt"
# What clocks may differ.
SKEW: Final = 30.0
# Of a proof: a chain of eight certificates is longer than any that is in use.
LONGEST: Final = 32 * 1024
MOST: Final = 8

_ALGORITHMS: Final = {"secp256r1": "ES256", "secp384r1": "ES384", "secp521r1": "ES512"}


class Unproved(Exception):
    """The text says why."""


@dataclass(frozen=True, slots=True)
class Facts:
    """What a task is, for those who sign it and those who judge."""

    id: str
    name: str
    eta: str | None
    digest: str

    @classmethod
    def of(cls, source: Any, name: str, args: Any, kwargs: Any, follow: Any) -> Facts:
        """`source` are the headers of the message, `follow` is what the task brings on; at the receiver the request is both.

        Raises `Unproved`.
        """
        whole = {
            "args": args,
            "kwargs": kwargs,
            **{word: follow.get(word) or None for word in ("callbacks", "errbacks", "chain", "chord")},
            **{word: source.get(word) or None for word in ("eta", "expires", "retries", "timelimit")},
        }
        try:
            # Twice: only texts are keys then, and can be put in order.
            plain = json.loads(kombu_json.dumps(whole))  # type: ignore[no-untyped-call]
        except Exception as error:
            raise Unproved("its arguments can't be said in JSON") from error
        text = json.dumps(plain, sort_keys=True, separators=(",", ":")).encode()
        return cls(str(source.get("id")), name, source.get("eta"), _encoded(hashlib.sha256(text).digest()))


class Prover:
    """Signs for this process, and judges what others have signed. State of the process: only what it has parsed."""

    def __init__(self, mesh: Mesh, window: float, wall_clock: Callable[[], float] = time.time) -> None:
        self._mesh = mesh
        self._window = window
        self._wall_clock = wall_clock
        self._signing: tuple[Any, Any, str, list[str]] | None = None

    @property
    def own_id(self) -> str:
        """Our own SPIFFE ID; "" without an identity."""
        store = self._mesh.identity
        current = store.current if store is not None else None
        return current.spiffe_id if current is not None else ""

    def sign(self, facts: Facts, sent_by: str = "") -> str | None:
        """A proof that we sent this task, or (`sent_by`) that somebody did whose proof we had. None without an identity."""
        store = self._mesh.identity
        identity = store.current if store is not None else None
        if identity is None:
            return None
        made = self._signing
        if made is None or made[0] is not identity:
            key: Any = load_pem_private_key(identity.key, None)
            chain = x509.load_pem_x509_certificates(identity.chain)
            ders = [base64.b64encode(each.public_bytes(Encoding.DER)).decode() for each in chain]
            made = self._signing = identity, key, _algorithm_of(key.public_key()), ders
        _, key, algorithm, ders = made
        claims = {
            "sub": sent_by or identity.spiffe_id,
            "jti": facts.id,
            "task": facts.name,
            "iat": round(self._wall_clock(), 3),
            "digest": facts.digest,
        }
        return jwt.encode(claims, key, algorithm, headers={"typ": TYPE, "x5c": ders})

    def judge(self, proof: Any, facts: Facts) -> Peer:
        """Who sent the task, or `Unproved` with the reason."""
        header = _header_of(proof)
        chain = _chain_of(header)
        signer, serial, not_after, key, algorithm = _described(chain[0])
        store = self._mesh.identity
        if store is None or store.current is None:
            raise Unproved("we have no identity, and so nothing to judge it with")
        if not store.server_tls(require_client=True).accepts(chain):
            raise Unproved(f"the certificate of {signer} isn't good here, or isn't any more")
        try:
            claims = jwt.decode(
                proof,
                key,
                [algorithm],
                options={"verify_iat": False, "verify_sub": False, "verify_jti": False, "verify_aud": False},
            )
        except jwt.PyJWTError as error:
            raise Unproved(f"its signature is wrong ({error})") from None
        if (claims.get("jti"), claims.get("task")) != (facts.id, facts.name):
            raise Unproved("it was made for another task")
        if not hmac.compare_digest(str(claims.get("digest")).encode(), facts.digest.encode()):
            raise Unproved("the task was changed on its way")
        self._judge_time(claims.get("iat"), facts.eta)
        sent_by = claims.get("sub")
        if sent_by == signer:
            return Peer(signer, False, serial, not_after, chain)
        if signer != store.current.spiffe_id or not isinstance(sent_by, str):
            raise Unproved(f"{signer} says that another has sent it, and only our own service may say so")
        return Peer(sent_by)

    def _judge_time(self, signed: Any, eta: str | None) -> None:
        if not isinstance(signed, int | float):
            raise Unproved("it doesn't say when it was made")
        now = self._wall_clock()
        if now < signed - SKEW:
            raise Unproved("it was made in the future: clocks differ")
        due = max(float(signed), _seconds_of(eta))
        if now > due + self._window + SKEW:
            raise Unproved(f"it is {now - due:.0f} s old, and {self._window:.0f} s is what it lasts")


def claimed_in(proof: Any) -> str:
    """Who a proof says that it is from, whether it is good or not; "" if it says nothing."""
    try:
        return _described(_chain_of(_header_of(proof))[0])[0]
    except Unproved:
        return ""


def _header_of(proof: Any) -> Mapping[str, Any]:
    if not isinstance(proof, str) or len(proof) > LONGEST:
        raise Unproved("it is none")
    try:
        header: Mapping[str, Any] = jwt.get_unverified_header(proof)
    except jwt.PyJWTError:
        raise Unproved("it can't be read") from None
    if header.get("typ") != TYPE:
        raise Unproved("it is a token for something else")
    return header


def _chain_of(header: Mapping[str, Any]) -> tuple[bytes, ...]:
    told = header.get("x5c")
    if not isinstance(told, list) or not 0 < len(told) <= MOST:
        raise Unproved("it has no certificates")
    try:
        return tuple(base64.b64decode(each, validate=True) for each in told)
    except (TypeError, ValueError):
        raise Unproved("its certificates can't be read") from None


@lru_cache(maxsize=512)
def _described(der: bytes) -> tuple[str, str, float, Any, str]:
    """SPIFFE ID, serial number, end, key and its algorithm. The same few senders come again and again."""
    try:
        leaf = x509.load_der_x509_certificate(der)
        names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        (spiffe_id,) = names.get_values_for_type(x509.UniformResourceIdentifier)
        key: Any = leaf.public_key()
        return spiffe_id, f"{leaf.serial_number:x}", leaf.not_valid_after_utc.timestamp(), key, _algorithm_of(key)
    except Exception as error:
        raise Unproved("its certificate can't be read") from error


def _algorithm_of(key: Any) -> str:
    """The one algorithm for a public key: what a proof says about that doesn't count."""
    if isinstance(key, ec.EllipticCurvePublicKey) and key.curve.name in _ALGORITHMS:
        return _ALGORITHMS[key.curve.name]
    if isinstance(key, rsa.RSAPublicKey):
        return "PS256"
    if isinstance(key, ed25519.Ed25519PublicKey):
        return "EdDSA"
    raise Unproved("nothing is signed with such a key")


def _seconds_of(eta: str | None) -> float:
    if not eta:
        return 0.0
    try:
        moment = datetime.fromisoformat(eta)
    except (TypeError, ValueError):
        return 0.0
    # Celery's times without a zone are its own time zone's; a day too late is better than one that may be any.
    return moment.timestamp() if moment.tzinfo is not None else 0.0


def _encoded(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()
