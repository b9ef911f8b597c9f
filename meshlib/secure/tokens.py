"""How does a machine that has nothing yet prove, once, that it may have an identity?

By a token: `meshlib ca token` makes it on the CA's machine, somebody carries it over, and the service there hands it in
with its first request. It is good for one service, one use, and a quarter of an hour. Its text is `mesh1.` and
base64url, and holds what the machine can't know otherwise:

    the secret       256 random bits, of which the CA keeps the hash only
    the fingerprint  SHA-256 of the CA's root (of both, during a rotation): so the machine knows whom to give the secret to
    the ID           for which it is good; and the CA's address, where it was given

Used up is a token by a rename: of many processes that try, one succeeds, and a crash between that and the certificate
costs the token. A token that was used leaves its hash behind until it would have ended, so that a second use is told
from a wrong token: who has the secret learns which it was, and nobody else learns anything.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import hmac
import json
import os
import re
import secrets
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, NoReturn

from ..errors import IdentityError, KeyFileError
from . import certificates, files
from .ca import NAMESPACE, CertificateAuthority
from .files import Secret

LIFE: Final = 900.0
PREFIX: Final = "mesh1."
FOLDER: Final = "tokens"

_LIMIT: Final = 4096
_NAME: Final = re.compile(r"[0-9a-f]{16}")
_PROOF: Final = re.compile(r"([0-9a-f]{16})\.([A-Za-z0-9_-]{43})")
_FINGERPRINT: Final = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Token:
    """What a token's text says. `proof` is what the CA is given, after it has shown a root with one of the fingerprints."""

    spiffe_id: str
    fingerprints: tuple[str, ...]
    proof: Secret = field(repr=False)
    address: str = ""

    @property
    def text(self) -> str:
        content = {"id": self.spiffe_id, "root": list(self.fingerprints), "token": bytes(self.proof).decode()}
        if self.address:
            content["ca"] = self.address
        return PREFIX + base64.urlsafe_b64encode(json.dumps(content, separators=(",", ":")).encode()).rstrip(b"=").decode()

    @classmethod
    def parse(cls, text: str) -> Token:
        """The token in a text, which may have white space around it."""
        text = text.strip()
        try:
            if not text.startswith(PREFIX) or len(text) > _LIMIT:
                raise ValueError
            body = text.removeprefix(PREFIX)
            content = json.loads(base64.b64decode(body + "=" * (-len(body) % 4), altchars=b"-_", validate=True))
            spiffe_id, fingerprints, proof = content["id"], tuple(content["root"]), content["token"]
            address = content.get("ca", "")
            if not (isinstance(spiffe_id, str) and isinstance(address, str) and fingerprints and _PROOF.fullmatch(proof)):
                raise ValueError
            if not all(_FINGERPRINT.fullmatch(each) for each in fingerprints):
                raise ValueError
        except (ValueError, TypeError, KeyError, AttributeError):
            raise IdentityError(
                "this is no token of `meshlib ca token`.",
                hint=f"It is one line that begins with {PREFIX}; was it cut off while copying?",
                reason="token.malformed",
            ) from None
        return cls(spiffe_id, fingerprints, Secret(proof.encode()), address)

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise TypeError("a token can't be pickled or copied: it holds a secret")


@dataclass(frozen=True, slots=True)
class Grant:
    """What a good token entitles to."""

    name: str
    service: str
    spiffe_id: str
    dns_name: str
    expires: float


class Tokens:
    """The tokens of a CA in a folder: `tokens`/<name>.json while they are good, <name>.used afterwards."""

    def __init__(self, authority: CertificateAuthority) -> None:
        if authority.folder is None:
            raise IdentityError("tokens need a CA in a folder.", hint="Make one: meshlib ca init FOLDER --trust-domain NAME")
        self._authority = authority
        self._folder = authority.folder / FOLDER

    def make(self, service: str, namespace: str = NAMESPACE, life: float = LIFE, address: str = "") -> Token:
        """A new token for a service; what has ended is tidied away."""
        if not 1 <= life <= 86400:
            raise IdentityError(f"a token can't live {life:g} s.", hint="Give 1 s to 24 h: it is carried over and used at once.")
        authority = self._authority
        spiffe_id, now = authority.id_of(service, namespace), authority.now()
        where = files.make_private(self._folder)
        self._sweep(now)
        name, secret = secrets.token_hex(8), secrets.token_urlsafe(32)
        record = {
            "hash": _hash(secret),
            "service": service,
            "spiffe_id": spiffe_id,
            "dns_name": authority.dns_name_of(service, namespace),
            "expires": now + life,
        }
        authority.note("token.made", token=name, service=service, spiffe_id=spiffe_id, seconds=life)
        files.write(where, [(f"{name}.json", json.dumps(record).encode(), 0o600)])
        return Token(spiffe_id, tuple(authority.fingerprints), Secret(f"{name}.{secret}".encode()), address)

    def find(self, proof: str) -> Grant:
        """What a token is good for; an IdentityError, with its reason, if for nothing. It is not used up by that."""
        match = _PROOF.fullmatch(proof)
        unknown = IdentityError(
            "this token is not known here.",
            hint="Make another one (`meshlib ca token`) on this CA's machine.",
            reason="token.unknown",
        )
        if match is None:
            raise unknown
        name, secret = match.groups()
        record, is_used = self._read(name)
        # A name that isn't there costs as much as one that is.
        is_right = hmac.compare_digest(record.get("hash", "0" * 64), _hash(secret))
        if not record or not is_right:
            raise unknown
        service = record["service"]
        if is_used:
            raise IdentityError(
                f"the token {name} for {service} was used already.",
                hint="A token is good once. If it wasn't you, somebody else has that identity: see `meshlib ca audit`, and revoke it.",
                reason="token.used",
            )
        if self._authority.now() >= record["expires"]:
            raise IdentityError(
                f"the token {name} for {service} has expired.",
                hint="Make another one (`meshlib ca token`), and use it within its time.",
                reason="token.expired",
            )
        return Grant(name, service, record["spiffe_id"], record["dns_name"], record["expires"])

    def consume(self, grant: Grant, **facts: str) -> None:
        """Use it up; an IdentityError if somebody else was quicker."""
        with files.folder(self._folder) as fd:
            try:
                os.rename(f"{grant.name}.json", f"{grant.name}.used", src_dir_fd=fd, dst_dir_fd=fd)
            except FileNotFoundError:
                if not (self._folder / f"{grant.name}.used").exists():
                    raise IdentityError(
                        f"the token {grant.name} for {grant.service} was taken back.",
                        hint="Make another one (`meshlib ca token`) on this CA's machine.",
                        reason="token.unknown",
                    ) from None
                raise IdentityError(
                    f"the token {grant.name} for {grant.service} was used already.",
                    hint="A token is good once.",
                    reason="token.used",
                ) from None
            os.fsync(fd)  # a crash must not make it good again
        self._authority.note("token.used", token=grant.name, service=grant.service, spiffe_id=grant.spiffe_id, **facts)

    def _read(self, name: str) -> tuple[dict[str, Any], bool]:
        if not self._folder.is_dir():
            return {}, False
        with files.folder(self._folder) as fd:
            for suffix in ("json", "used"):  # in this order: between the two looks it can only become used
                if (self._folder / f"{name}.{suffix}").exists():
                    with contextlib.suppress(KeyFileError):
                        return json.loads(files.read_secret(fd, self._folder, f"{name}.{suffix}")), suffix == "used"
        return {}, False

    def _sweep(self, now: float) -> None:
        for path in sorted(self._folder.iterdir()):
            if path.suffix in {".json", ".used"} and _NAME.fullmatch(path.stem):
                record, _ = self._read(path.stem)
                if record and now >= record["expires"]:
                    files.remove(self._folder, path.name)


def outstanding(folder: Path | None) -> list[Grant]:
    """The tokens of a CA's folder that were not used yet."""
    if folder is None or not (folder / FOLDER).is_dir():
        return []
    found = []
    where = folder / FOLDER
    with files.folder(where) as fd:
        for name in files.names(fd):
            if not name.endswith(".json") or not _NAME.fullmatch(name.removesuffix(".json")):
                continue
            with contextlib.suppress(KeyFileError, ValueError, KeyError, TypeError):  # such a one buys nothing either
                record = json.loads(files.read_secret(fd, where, name))
                facts = (record["service"], record["spiffe_id"], record["dns_name"], record["expires"])
                found.append(Grant(name.removesuffix(".json"), *facts))
    return found


def take_back(folder: Path | None, grant: Grant) -> None:
    """It is good for nothing from now on. The caller holds the folder's lock, and tells the log."""
    if folder is not None:
        files.remove(folder / FOLDER, f"{grant.name}.json")


def fingerprint_matches(root: Any, token: Token) -> bool:
    """Is this root one that the token vouches for?"""
    return any(hmac.compare_digest(certificates.fingerprint_of(root), each) for each in token.fingerprints)


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()
