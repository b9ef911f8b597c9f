"""Who may call themselves a member of this trust domain?

An embedded certificate authority in a folder, for systems that have none:

    root.pem, root.key       the root. It signs the issuer alone: root.key may be taken to a safe (`roots.py`)
    issuer.pem, issuer.key   the issuer, an intermediate: signs leaves and revocations
    bundle.pem               the roots to trust: what every service gets
    crl.pem                  what was revoked; there from the first revocation on
    issued.jsonl             the audit log, each line bound to the one before (`ledger.py`)
    tokens.json, tokens.key  the keys of JWT-SVIDs, from the first one on (`jwt_svid.py`)
    tokens/                  hashes of the one-use tokens of services on other machines (`tokens.py`)

It issues SPIFFE X.509-SVIDs, whose chain is the leaf and the issuer, and turns root and issuer over without a failed
handshake in three steps, between which the files have to reach the services:

    begin_rotation      then `publish` the bundle, which holds both roots
    activate_rotation   then `reissue` every certificate, now under the new root
    finish_rotation     then `publish` the bundle, which holds the new root only

The keys of JWT-SVIDs, where there are some, take the same steps.

A folder of the earlier layout has no issuer.*: it opens and works as before, its root signs the leaves; its next
rotation brings a root of the new kind with an issuer.

With folder None the CA lives in memory. What is handed out is logged before it is handed out. Each operation takes the
folder's lock and reads the state anew, so that a command line and a running process can share a folder.

For services of its own machine it makes the keys as well; for those of others see `authority.py`. Whoever reads its
folder can be anyone.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from threading import RLock
from typing import Any, Final, NoReturn

from cryptography import x509

from ..errors import IdentityError, KeyFileError
from . import certificates, delivery, files, ledger, revocation
from .delivery import Issued
from .dev import DEV_TRUST_DOMAIN
from .jwt_svid import ISSUED, TokenKeys
from .ledger import Chain, Entry, Ledger
from .roots import Root, Roots, read_key

__all__ = ["CertificateAuthority", "Issued"]

DAY: Final = 86400.0
# Nothing renews a certificate that was issued by hand: as long as one dares, and as short as one endures.
LEAF_LIFE: Final = 90 * DAY
# Where something renews it at half its life, a day is enough to notice that nothing does.
RENEWED_LIFE: Final = DAY
# The root's end stops the whole system, and `rotate` turns it over at any time before.
ROOT_LIFE: Final = 3650 * DAY
NAMESPACE: Final = "default"
# What the CA's own service is called: nobody else is issued an ID under it.
OWN_PATH: Final = "/meshlib/ca"


class CertificateAuthority:
    """The CA of one trust domain. Make it with `create` or `open`."""

    def __init__(self, folder: Path | None, trust_domain: str, roots: Roots, clock: Callable[[], float]) -> None:
        self.folder = folder
        self.trust_domain = trust_domain
        self._roots = roots
        self._clock = clock
        self._lock = RLock()
        self._ledger = Ledger(folder)
        self._depth = 0  # how often we are inside `_current`
        self._told: set[tuple[Path, str]] = set()  # which folders were refused, and why
        self._crl = b""  # in memory only, or where nothing was revoked yet

    # ------------------------------------------------------------------------------------------------ make or open

    @classmethod
    def create(
        cls,
        folder: str | os.PathLike[str] | None,
        trust_domain: str,
        *,
        root_life: float = ROOT_LIFE,
        clock: Callable[[], float] = time.time,
    ) -> CertificateAuthority:
        """A new CA with a new root and issuer, in a folder (made with mode 0700) or, with None, in memory."""
        certificates.checked_trust_domain(trust_domain)
        if folder is not None and trust_domain == DEV_TRUST_DOMAIN:
            raise IdentityError(
                f"{DEV_TRUST_DOMAIN} is the trust domain of `meshlib dev` alone.",
                hint="Choose one of your own, such as shop.internal.",
            )
        root = Root.make(trust_domain, root_life, clock())
        if folder is None:
            authority = cls(None, trust_domain, Roots.create(None, root), clock)
        else:
            where = files.make_private(folder)
            with files.locked(where):
                if any((where / name).exists() for name in ("root.key", "root.pem", "issuer.key", ledger.NAME)):
                    raise KeyFileError(
                        f"{where} holds a CA already.",
                        hint="Use it (`meshlib ca issue`), turn its root over (`meshlib ca rotate`), or take another.",
                    )
                where.chmod(0o700)
                authority = cls(where, trust_domain, Roots.create(where, root), clock)
        authority._note("create", root.certificate)
        return authority

    @classmethod
    def open(cls, folder: str | os.PathLike[str], *, clock: Callable[[], float] = time.time) -> CertificateAuthority:
        """The CA in a folder. Refuses a folder or key that others can reach."""
        where = Path(folder)
        if not (where / "root.pem").exists():
            raise KeyFileError(
                f"{where} holds no CA: there is no root.pem.",
                hint=f"Make one: meshlib ca init {where} --trust-domain <name>",
            )
        with files.locked(where):
            roots = Roots.load(where)
        names = certificates.uris_of(roots.signing.certificate)
        trust_domain = certificates.trust_domain_of(names[0]) if len(names) == 1 else ""
        if not trust_domain:
            raise IdentityError(
                f"{where / 'root.pem'} names no trust domain.",
                hint="It wasn't made by `meshlib ca init`: make a new CA.",
            )
        return cls(where, trust_domain, roots, clock)

    # ------------------------------------------------------------------------------------------------ what is

    @property
    def stage(self) -> str:
        """`steady`, `begun` or `activated`: where the rotation of the root stands."""
        with self._current() as roots:
            return roots.stage

    @property
    def bundle(self) -> bytes:
        """The roots to trust now, as PEM, the one under which leaves are signed first."""
        with self._current() as roots:
            return roots.bundle

    def sequence(self, token_keys: bytes = b"") -> int:
        """The number of the bundle: it rises with every step that changes the roots, and when other token keys stand in it."""
        found = hashlib.sha256(token_keys).hexdigest() if token_keys else ""
        with self._current():
            if found != self._ledger.token_keys:
                self._ledger.note("rotation.tokens", self._clock(), keys=found)
            return self._ledger.turns

    @property
    def fingerprints(self) -> list[str]:
        """The SHA-256 of every root to trust now, the signing one first."""
        with self._current() as roots:
            return [certificates.fingerprint_of(root.certificate) for root in roots.present]

    @property
    def signer(self) -> str:
        """Which certificate signs leaves now: its serial number."""
        with self._current() as roots:
            return certificates.serial_of((roots.signing.issuer or roots.signing).certificate)

    @property
    def has_root_key(self) -> bool:
        """False where root.key was taken to a safe."""
        with self._current() as roots:
            return roots.signing.key is not None

    @property
    def signing_ends(self) -> float:
        """When the issuer ends, and with it the issuing; Unix seconds."""
        with self._current() as roots:
            return (roots.signing.issuer or roots.signing).certificate.not_valid_after_utc.timestamp()

    @property
    def own_id(self) -> str:
        """Under which ID the CA's own service answers."""
        return f"spiffe://{self.trust_domain}{OWN_PATH}"

    def id_of(self, service: str, namespace: str = NAMESPACE) -> str:
        certificates.checked_label("service name", service)
        certificates.checked_label("namespace", namespace)
        return f"spiffe://{self.trust_domain}/ns/{namespace}/sa/{service}"

    def dns_name_of(self, service: str, namespace: str = NAMESPACE) -> str:
        return f"{service}.{namespace}.{self.trust_domain}"

    # ------------------------------------------------------------------------------------------------ hand out

    def issue(self, service: str, ttl: float = LEAF_LIFE, namespace: str = NAMESPACE, *, spiffe_id: str | None = None) -> Issued:
        """A new key and certificate for a service; `spiffe_id` replaces the ID that its name and namespace make."""
        made_id = self.id_of(service, namespace)
        return self._issue(service, spiffe_id or made_id, self.dns_name_of(service, namespace), ttl)

    def issue_own(self, ttl: float = RENEWED_LIFE) -> Issued:
        """What the CA's own service shows: a certificate that nobody else is ever issued."""
        return self._issue("meshlib-ca", self.own_id, "", ttl, is_own=True)

    def sign(
        self, key: certificates.PublicKey, service: str, spiffe_id: str, dns_name: str, ttl: float = RENEWED_LIFE, **facts: str
    ) -> Issued:
        """A certificate for a key that was made elsewhere. `facts` go into the log: who asked, and with what."""
        return self._issue(service, spiffe_id, dns_name, ttl, key, facts=facts)

    def _issue(
        self,
        service: str,
        spiffe_id: str,
        dns_name: str,
        ttl: float,
        public: certificates.PublicKey | None = None,
        *,
        facts: dict[str, str] | None = None,
        is_own: bool = False,
    ) -> Issued:
        with self._current() as roots:
            self.prepare(spiffe_id, ttl, is_own=is_own)
            now = self._clock()
            signer = roots.signing.signer
            assert signer is not None
            key = None if public is not None else certificates.new_key()
            taken = public if public is not None else key
            assert taken is not None
            leaf = certificates.new_leaf(taken, signer.certificate, signer.key, spiffe_id, dns_name, ttl, now)
            event = "renewal" if spiffe_id in self._ledger.newest else "issue"
            self._log(event, leaf, service=service, spiffe_id=spiffe_id, **_by(signer.certificate), **(facts or {}))
            return Issued(
                service=service,
                spiffe_id=spiffe_id,
                serial=certificates.serial_of(leaf),
                not_before=leaf.not_valid_before_utc.timestamp(),
                not_after=leaf.not_valid_after_utc.timestamp(),
                chain=certificates.pem(leaf, *roots.signing.chain),
                bundle=roots.bundle,
                key=b"" if key is None else certificates.key_pem(key),
                crl=self._lists(roots, now) if self._has_revoked() else b"",
            )

    def prepare(self, spiffe_id: str, ttl: float = RENEWED_LIFE, *, is_own: bool = False) -> None:
        """Raise now what `sign` would raise, and renew the issuer where that is due: before something is used up for it."""
        certificates.checked_id(spiffe_id, self.trust_domain)
        if self._is_reserved(spiffe_id) and not is_own:
            raise IdentityError(
                f"{spiffe_id} belongs to the CA itself.", hint="Give the service another ID.", reason="ca.reserved"
            )
        if not ttl >= 1:
            raise IdentityError(
                f"a certificate can't live {ttl:g} s.",
                hint="Give at least 1 s; 90d by hand, 24h where something renews.",
            )
        with self._current() as roots:
            now = self._clock()
            self._extend(roots, now + ttl, now)

    def _extend(self, roots: Roots, until: float, now: float) -> None:
        """Make sure that what signs outlives a leaf; renew the issuer where that helps and the root's key is here."""
        root = roots.signing
        end, last = root.certificate.not_valid_after_utc.timestamp(), root.certificate
        if root.issuer is not None:
            last = root.issuer.certificate
            issuer_end = last.not_valid_after_utc.timestamp()
            if until > issuer_end and until <= end and root.key is not None:
                roots.renew_issuer(self.trust_domain, root.key, now)
                self._log("issuer.renewal", root.issuer.certificate)
                return
            if until > issuer_end and until <= end:
                raise IdentityError(
                    f"the issuer ends in {(issuer_end - now) / DAY:.1f} days, before this certificate would,"
                    " and root.key is not here to renew it.",
                    hint="Fetch the root's key for a moment (`meshlib ca rotate --issuer --root-key FILE`), or give a shorter --ttl.",
                )
        if until > last.not_valid_after_utc.timestamp():
            raise IdentityError(
                f"the root ends in {(end - now) / DAY:.1f} days, before this certificate would.",
                hint="Turn the root over (`meshlib ca rotate`), or give a shorter --ttl.",
            )

    def write(
        self,
        service: str,
        out: str | os.PathLike[str],
        ttl: float = LEAF_LIFE,
        namespace: str = NAMESPACE,
        *,
        spiffe_id: str | None = None,
    ) -> Issued:
        """Issue, and put svid.pem, key.pem and bundle.pem into `out`/<service>; a running process picks them up."""
        issued = self.issue(service, ttl, namespace, spiffe_id=spiffe_id)
        return delivery.fill(Path(out) / service, issued, self._published_tokens())

    def publish(self, out: str | os.PathLike[str], *, faults: list[str] | None = None) -> list[Path]:
        """Put the present bundle, and what was revoked, into every service's folder that this trust domain has filled.

        What fails in one folder is added to `faults`, or without them raised when all others are done.
        """
        with self._current() as roots:
            crl = self._lists(roots, self._clock()) if self._has_revoked() else b""
            bundle = roots.bundle
        failed = [] if faults is None else faults
        served = delivery.publish(Path(out), self.trust_domain, bundle, crl, failed, self._published_tokens())
        if faults is None:
            delivery.refuse(failed)
        return served

    def reissue(self, out: str | os.PathLike[str], ttl: float | None = None, *, faults: list[str] | None = None) -> list[Issued]:
        """Issue anew all that lies under `out` and was signed by us: same names, same life unless `ttl` is given."""
        return self.renew(out, ttl, is_forced=True, faults=faults)

    def renew(
        self,
        out: str | os.PathLike[str],
        ttl: float | None = None,
        *,
        services: Collection[str] = (),
        is_forced: bool = False,
        faults: list[str] | None = None,
    ) -> list[Issued]:
        """Issue anew what lies under `out`, was issued by us, and is past half of its life or `is_forced`.

        A certificate is public: who puts one there must not choose whom we vouch for. So its key must lie beside it, and
        the log must know it. Nor is anything renewed that is older than the last revocation of its ID: it takes a new
        `issue` to trust its holder again. Such folders are left alone, and the log tells it. What fails in one folder is
        added to `faults`, or without them raised when all others are done.
        """
        renewed, failed = [], [] if faults is None else faults
        for old in delivery.served(Path(out), self.trust_domain, x509.load_pem_x509_certificates(self.bundle), failed):
            if (services and old.service not in services) or self._is_reserved(old.spiffe_id):
                continue
            if not old.is_ours or not (is_forced or old.is_past_half(self._clock())):
                continue
            with delivery.noted(old.where, failed):
                issued = self._renewed(old, ttl)
                if issued is not None:
                    renewed.append(delivery.fill(old.where, issued, self._published_tokens()))
        if faults is None:
            delivery.refuse(failed)
        return renewed

    def _published_tokens(self) -> bytes:
        """The keys by which tokens of this trust domain are verified; b"" before the first token."""
        if self.folder is None or not (self.folder / "tokens.json").exists():
            return b""
        with files.folder(self.folder) as fd:
            return files.read_public(fd, self.folder, "tokens.json")

    def _renewed(self, old: delivery.Served, ttl: float | None) -> Issued | None:
        with self._current():
            entry = self._ledger.certificates.get(old.serial)
            if entry is None or entry["spiffe_id"] != old.spiffe_id:
                reason = "renew.unknown"
            elif not old.holds_key:
                reason = "renew.unproved"
            elif not self._ledger.is_renewable(entry, self._clock()):
                reason = "renew.revoked"
            else:
                self._told = {told for told in self._told if told[0] != old.where}
                return self._issue(old.service, old.spiffe_id, old.dns_name, ttl or old.life)
            # A timer comes by every minute: what it finds each time is one line.
            if (old.where, reason) not in self._told:
                self._told.add((old.where, reason))
                self.refuse(reason, service=old.service, spiffe_id=old.spiffe_id, serial=old.serial)
            return None

    def entitled(self, leaf: x509.Certificate) -> Entry:
        """The log's entry of a certificate whose holder may have another one; else an IdentityError, with its reason."""
        serial = certificates.serial_of(leaf)
        with self._current():
            now = self._clock()
            entry = self._ledger.certificates.get(serial)
            if entry is None or certificates.uris_of(leaf) != [entry["spiffe_id"]] or self._is_reserved(entry["spiffe_id"]):
                raise IdentityError(
                    f"this CA did not issue the certificate {serial}.", hint="Enrol anew with a token.", reason="renew.unknown"
                )
            state = self._ledger.standing_of(entry, now)
        service = entry["service"]
        hint = f"Enrol anew: `meshlib ca token … {service}` on the CA's machine, then `meshlib ca enroll` here."
        if state == ledger.REVOKED:
            raise IdentityError(f"the certificate {serial} of {service} was revoked.", hint=hint, reason="renew.revoked")
        if state == ledger.EXPIRED:
            raise IdentityError(
                f"the certificate {serial} of {service} expired at {entry['not_after']}.", hint=hint, reason="renew.expired"
            )
        return entry

    # ------------------------------------------------------------------------------------------------ take back

    def revoke(self, what: str, reason: str = "unspecified", namespace: str = "") -> list[Entry]:
        """Take back one certificate (by serial number) or all that a service has (by name or SPIFFE ID).

        crl.pem tells it from then on; then `publish`. Who was revoked renews nothing until somebody issues to it anew, and
        tokens of its ID that were not used yet are gone. Where there were only such, nothing is returned.
        """
        from . import tokens  # which is about this class

        if reason not in revocation.REASONS:
            raise IdentityError(f"{reason!r} is no reason.", hint=f"Give one of {', '.join(revocation.REASONS)}.")
        serial = what.replace(":", "").lower()
        with self._current() as roots:
            now = self._clock()
            found = [
                entry
                for entry in self._ledger.certificates.values()
                if (entry["serial"] == serial or what in {entry["spiffe_id"], entry["service"]})
                and (not namespace or f"/ns/{namespace}/" in entry["spiffe_id"])
                and self._ledger.standing_of(entry, now) in {ledger.VALID, ledger.SUPERSEDED}
            ]
            outstanding = tokens.outstanding(self.folder)
            ids = {entry["spiffe_id"] for entry in found} or {
                grant.spiffe_id
                for grant in outstanding
                if what in {grant.spiffe_id, grant.service} and (not namespace or f"/ns/{namespace}/" in grant.spiffe_id)
            }
            if not ids:
                raise IdentityError(
                    f"there is no valid certificate with the serial number, service name or ID {what}.",
                    hint="`meshlib ca list --all` shows them; what has expired or was revoked needs nothing.",
                    reason="revoke.nothing",
                )
            if len(ids) > 1:
                raise IdentityError(
                    f"{what} names several: {', '.join(sorted(ids))}.",
                    hint="Give the ID, or --namespace.",
                    reason="revoke.ambiguous",
                )
            for grant in outstanding:
                if grant.spiffe_id in ids:
                    tokens.take_back(self.folder, grant)
                    self._ledger.note("token.revoked", now, token=grant.name, service=grant.service, spiffe_id=grant.spiffe_id)
            for entry in found:
                facts = {key: entry[key] for key in ("serial", "service", "spiffe_id")}
                self._ledger.note("revocation", now, **facts, reason=reason)
            self._lists(roots, now)
        return found

    @property
    def crl(self) -> bytes:
        """What is revoked, as PEM: good for a day, and made anew in time."""
        with self._current() as roots:
            return self._lists(roots, self._clock())

    @property
    def has_revoked(self) -> bool:
        with self._current():
            return self._has_revoked()

    def is_revoked(self, serial: str) -> bool:
        with self._current():
            return serial in self._ledger.revoked

    def withdrawn(self, spiffe_id: str) -> Entry | None:
        """The newest certificate of this ID, if the last word about the ID was that it was taken back."""
        with self._current():
            newest = self._ledger.certificates.get(self._ledger.newest.get(spiffe_id, ""))
            return newest if newest is not None and not self._ledger.is_renewable(newest, self._clock()) else None

    # ------------------------------------------------------------------------------------------------ turn over

    def begin_rotation(self) -> None:
        """Step 1: a new root joins the bundle; the old issuer goes on signing. Then publish the bundle."""
        with self._current() as roots:
            roots.refuse_out_of_step("begin")
            old = roots.signing.certificate
            life = (old.not_valid_after_utc - old.not_valid_before_utc).total_seconds() - certificates.SKEW
            coming = Root.make(self.trust_domain, life, self._clock())
            self._log("rotation.begin", coming.certificate)
            roots.begin(coming)
            self._refresh_lists(roots)
        self._turn_tokens("begin")

    def activate_rotation(self) -> None:
        """Step 2: the new issuer signs from now on, and the old root's key is gone. Then issue every certificate anew."""
        with self._current() as roots:
            roots.refuse_out_of_step("activate")
            self._log("rotation.activate", roots.signing.certificate)
            roots.activate()
            self._refresh_lists(roots)
        self._turn_tokens("activate")

    def finish_rotation(self, *, force: bool = False) -> None:
        """Step 3: the old root leaves the bundle; refused while a certificate needs it unless `force`. Then publish."""
        with self._current() as roots:
            roots.refuse_out_of_step("finish")
            late = self._signed_by(roots.leaving) if roots.leaving is not None else []
            if late and not force:
                raise IdentityError(
                    f"the old root can't leave yet: the newest certificate of {', '.join(late)} is signed under it.",
                    hint="Issue these anew first (`meshlib ca issue`; what is enrolled renews by itself);"
                    " --force if they are gone, or the key is stolen.",
                )
            if not force:
                self._refuse_unended_tokens()
            self._log("rotation.finish", roots.signing.certificate)
            roots.finish()
            self._refresh_lists(roots)
        self._turn_tokens("finish")

    def renew_issuer(self, root_key: str | os.PathLike[str] | None = None) -> None:
        """A new certificate for the issuer, signed by the root, whose key may lie elsewhere. Nobody else notices."""
        with self._current() as roots:
            key = roots.signing.key
            if root_key is not None:
                path = Path(root_key)
                with files.folder(path.parent) as fd:
                    key = read_key(fd, path.parent, path.name)
            if key is None:
                raise KeyFileError(f"root.key is not in {self.folder}.", hint="Say where it is: --root-key FILE.")
            roots.renew_issuer(self.trust_domain, key, self._clock())
            assert roots.signing.issuer is not None
            self._log("issuer.renewal", roots.signing.issuer.certificate)

    # ------------------------------------------------------------------------------------------------ look back

    def issued(self) -> list[Entry]:
        """The audit log, oldest first: every issue, renewal, refusal, revocation, token, and step of a rotation."""
        with self._current():
            return self._ledger.entries()

    def standing(self, *, is_whole: bool = False) -> list[tuple[Entry, str]]:
        """The newest certificate of each service, or every one, and how it stands: `ledger.VALID` and so on."""
        with self._current():
            now, known = self._clock(), self._ledger
            if is_whole:
                entries = [entry for entry in known.entries() if entry["event"] in {"issue", "renewal"}]
            else:
                entries = [known.certificates[serial] for serial in known.newest.values()]
            return [(entry, known.standing_of(entry, now)) for entry in entries]

    def verify_log(self, head: str = "") -> Chain:
        """Is the audit log whole? See `Ledger.verify`."""
        with self._current():
            return self._ledger.verify(head)

    def note(self, event: str, **facts: Any) -> None:
        """Put something into the audit log."""
        with self._current():
            self._ledger.note(event, self._clock(), **facts)

    def refuse(self, reason: str, **facts: Any) -> None:
        """Put a refusal into the audit log."""
        self.note("refusal", reason=reason, **facts)

    def now(self) -> float:
        return self._clock()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Nobody else issues, revokes or turns over until the block ends: what was found in it holds until then."""
        with self._current():
            yield

    def __repr__(self) -> str:
        return f"<CertificateAuthority of {self.trust_domain} in {self.folder or 'memory'}>"

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise TypeError("a certificate authority can't be pickled or copied: it holds private keys")

    # ------------------------------------------------------------------------------------------------ inside

    @contextmanager
    def _current(self) -> Iterator[Roots]:
        with self._lock:
            if self._depth:  # the folder's lock is ours already, and is not to be had twice
                yield self._roots
                return
            with nullcontext() if self.folder is None else files.locked(self.folder):
                if self.folder is not None:
                    self._roots = Roots.load(self.folder)
                self._ledger.look(self._clock())
                self._depth += 1
                try:
                    yield self._roots
                finally:
                    self._depth -= 1

    def _signed_by(self, root: Root) -> list[str]:
        signer, now = (root.issuer or root).certificate, self._clock()
        newest = [self._ledger.certificates[serial] for serial in self._ledger.newest.values()]
        return [
            entry["service"]
            for entry in newest
            # The CA's own service issues to itself whenever it starts; what is revoked needs no root.
            if entry["spiffe_id"] != self.own_id
            and self._ledger.standing_of(entry, now) == ledger.VALID
            and revocation.belongs_to(entry, signer)
        ]

    def _turn_tokens(self, step: str) -> None:
        # After the root's step, and not within it: the keys take the folder's lock themselves.
        if self.folder is not None:
            TokenKeys(self.folder).follow(step)

    def _refuse_unended_tokens(self) -> None:
        """Nobody could verify a token any more whose key has left the bundle."""
        if self.folder is None or not (keys := TokenKeys(self.folder)).exists:
            return
        kid, now = keys.signing().kid, self._clock()
        tokens = [entry for entry in self._ledger.entries() if entry["event"] == ISSUED and entry["kid"] != kid]
        if last := max((entry["expires"] for entry in tokens if ledger.seconds(entry["expires"]) > now), default=""):
            raise IdentityError(
                f"the old key of the tokens can't leave yet: the last token that it has signed ends at {last}.",
                hint="Wait until then; --force if the key is stolen.",
            )

    def _is_reserved(self, spiffe_id: str) -> bool:
        return spiffe_id == self.own_id or spiffe_id.startswith(f"{self.own_id}/")

    def _has_revoked(self) -> bool:
        return bool(self._ledger.revoked) or (self.folder is not None and (self.folder / "crl.pem").exists())

    def _refresh_lists(self, roots: Roots) -> None:
        if self._has_revoked():
            self._lists(roots, self._clock())

    def _lists(self, roots: Roots, now: float) -> bytes:
        kept = self._crl
        if self.folder is not None and (self.folder / "crl.pem").exists():
            with files.folder(self.folder) as fd:
                kept = files.read_public(fd, self.folder, "crl.pem")
        self._crl = revocation.renewed(kept, roots, self._ledger, now)
        if self.folder is not None and self._has_revoked() and (self._crl != kept or not (self.folder / "crl.pem").exists()):
            files.write(self.folder, [("crl.pem", self._crl, 0o644)])
        return self._crl

    def _note(self, event: str, certificate: x509.Certificate) -> None:
        with self._current():
            self._log(event, certificate)

    def _log(self, event: str, certificate: x509.Certificate, **more: str) -> None:
        self._ledger.note(
            event,
            self._clock(),
            serial=certificates.serial_of(certificate),
            **more,
            not_before=ledger.moment(certificate.not_valid_before_utc.timestamp()),
            not_after=ledger.moment(certificate.not_valid_after_utc.timestamp()),
        )


def _by(issuer: x509.Certificate) -> dict[str, str]:
    return {"issuer": certificates.serial_of(issuer), "issuer_key": certificates.key_id_of(issuer)}
