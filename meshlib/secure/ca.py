"""Who may call themselves a member of this trust domain?

An embedded certificate authority in a folder, for systems that have none: root.pem, root.key (0600), bundle.pem,
issued.jsonl. It issues SPIFFE X.509-SVIDs, and turns its root over without a failed handshake in three steps, between
which the files have to reach the services:

    begin_rotation      then `publish` the bundle, which holds both roots
    activate_rotation   then `reissue` every certificate, now signed by the new root
    finish_rotation     then `publish` the bundle, which holds the new root only

With folder None it lives in memory. What is handed out is logged before it is handed out. Each operation takes the
folder's lock and reads the state anew, so that a command line and a running process can share a folder.

It does not revoke, has no intermediate, and makes the services' keys itself: whoever reads its folder can be anyone.
"""

from __future__ import annotations

import datetime
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from threading import RLock
from typing import Any, Final, NoReturn

from cryptography import x509

from ..errors import IdentityError, KeyFileError
from . import certificates, files
from .dev import DEV_TRUST_DOMAIN
from .roots import Root, Roots, read_certificate

DAY: Final = 86400.0
# Nothing renews a certificate that was issued by hand: as long as one dares, and as short as one endures.
LEAF_LIFE: Final = 90 * DAY
# The root's end stops the whole system, and `rotate` turns it over at any time before.
ROOT_LIFE: Final = 3650 * DAY
NAMESPACE: Final = "default"


@dataclass(frozen=True, slots=True)
class Issued:
    """What a service needs to stand up with its identity: the certificate chain, its key, and the roots to trust."""

    service: str
    spiffe_id: str
    serial: str
    not_before: float
    not_after: float
    chain: bytes = field(repr=False)
    bundle: bytes = field(repr=False)
    key: bytes = field(repr=False)

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise TypeError("an issued identity can't be pickled or copied: it holds a private key")


class CertificateAuthority:
    """The CA of one trust domain. Make it with `create` or `open`."""

    def __init__(self, folder: Path | None, trust_domain: str, roots: Roots, clock: Callable[[], float]) -> None:
        self.folder = folder
        self.trust_domain = trust_domain
        self._roots = roots
        self._clock = clock
        self._lock = RLock()
        self._log: list[dict[str, Any]] = []

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
        """A new CA with a new root, in a folder (made with mode 0700) or, with None, in memory."""
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
                if any((where / name).exists() for name in ("root.key", "root.pem", "issued.jsonl")):
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

    # ------------------------------------------------------------------------------------------------ hand out

    @property
    def stage(self) -> str:
        """`steady`, `begun` or `activated`: where the rotation of the root stands."""
        with self._current() as roots:
            return roots.stage

    @property
    def bundle(self) -> bytes:
        """The roots to trust now, as PEM."""
        with self._current() as roots:
            return roots.bundle

    def id_of(self, service: str, namespace: str = NAMESPACE) -> str:
        certificates.checked_label("service name", service)
        certificates.checked_label("namespace", namespace)
        return f"spiffe://{self.trust_domain}/ns/{namespace}/sa/{service}"

    def issue(self, service: str, ttl: float = LEAF_LIFE, namespace: str = NAMESPACE, *, spiffe_id: str | None = None) -> Issued:
        """A new key and certificate for a service; `spiffe_id` replaces the ID that its name and namespace make."""
        made_id = self.id_of(service, namespace)
        return self._issue(service, spiffe_id or made_id, f"{service}.{namespace}.{self.trust_domain}", ttl)

    def _issue(self, service: str, spiffe_id: str, dns_name: str, ttl: float) -> Issued:
        certificates.checked_id(spiffe_id, self.trust_domain)
        if not ttl >= 1:
            raise IdentityError(
                f"a certificate can't live {ttl:g} s.",
                hint="Give at least 1 s; 90d by hand, 24h where something renews.",
            )
        with self._current() as roots:
            now = self._clock()
            end = roots.signing.certificate.not_valid_after_utc.timestamp()
            if now + ttl > end:
                raise IdentityError(
                    f"the root ends in {(end - now) / DAY:.1f} days, before this certificate would.",
                    hint="Turn the root over (`meshlib ca rotate`), or give a shorter --ttl.",
                )
            key = certificates.new_key()
            leaf = certificates.new_leaf(key, roots.signing.certificate, roots.signing.key, spiffe_id, dns_name, ttl, now)
            is_known = any(entry.get("spiffe_id") == spiffe_id for entry in self._entries())
            event = "renewal" if is_known else "issue"
            self._note(event, leaf, service=service, spiffe_id=spiffe_id, issuer=roots.signing)
            return Issued(
                service=service,
                spiffe_id=spiffe_id,
                serial=certificates.serial_of(leaf),
                not_before=leaf.not_valid_before_utc.timestamp(),
                not_after=leaf.not_valid_after_utc.timestamp(),
                chain=certificates.pem(leaf),
                bundle=roots.bundle,
                key=certificates.key_pem(key),
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
        _fill(files.make_private(Path(out) / service), issued)
        return issued

    def publish(self, out: str | os.PathLike[str]) -> list[Path]:
        """Put the present bundle into every service's folder under `out` that this trust domain has filled."""
        bundle = self.bundle
        served = [where for where, _ in self._served(out)]
        for where in served:
            files.write(where, [("bundle.pem", bundle, 0o644)])
        return served

    def reissue(self, out: str | os.PathLike[str], ttl: float | None = None) -> list[Issued]:
        """Issue anew what lies under `out` and was signed by a root of ours: same names, same life unless `ttl` is given.

        What somebody else signed is left alone: who can put a certificate there must not choose whom we vouch for.
        """
        renewed = []
        roots = x509.load_pem_x509_certificates(self.bundle)
        for where, old in self._served(out):
            if certificates.is_anchored([old], roots):
                life = (old.not_valid_after_utc - old.not_valid_before_utc).total_seconds() - certificates.SKEW
                dns_name = next(iter(certificates.dns_names_of(old)), "")
                issued = self._issue(where.name, certificates.uris_of(old)[0], dns_name, ttl or life)
                _fill(where, issued)
                renewed.append(issued)
        return renewed

    # ------------------------------------------------------------------------------------------------ turn over

    def begin_rotation(self) -> None:
        """Step 1: a new root joins the bundle; the old one goes on signing. Then publish the bundle."""
        with self._current() as roots:
            roots.refuse_out_of_step("begin")
            old = roots.signing.certificate
            life = (old.not_valid_after_utc - old.not_valid_before_utc).total_seconds() - certificates.SKEW
            coming = Root.make(self.trust_domain, life, self._clock())
            self._note("rotation.begin", coming.certificate)
            roots.begin(coming)

    def activate_rotation(self) -> None:
        """Step 2: the new root signs from now on, and the old key is gone. Then issue every certificate anew."""
        with self._current() as roots:
            roots.refuse_out_of_step("activate")
            self._note("rotation.activate", roots.signing.certificate)
            roots.activate()

    def finish_rotation(self, *, force: bool = False) -> None:
        """Step 3: the old root leaves the bundle; refused while a certificate needs it unless `force`. Then publish."""
        with self._current() as roots:
            roots.refuse_out_of_step("finish")
            late = self._signed_by(roots.leaving) if roots.leaving is not None else []
            if late and not force:
                raise IdentityError(
                    f"the old root can't leave yet: the newest certificate of {', '.join(late)} is signed by it.",
                    hint="Issue these anew first (`meshlib ca issue`); --force if they are gone, or the key is stolen.",
                )
            self._note("rotation.finish", roots.signing.certificate)
            roots.finish()

    # ------------------------------------------------------------------------------------------------ look back

    def issued(self) -> list[dict[str, Any]]:
        """The audit log, oldest first: every issue, renewal and step of a rotation."""
        with self._current():
            return self._entries()

    def __repr__(self) -> str:
        return f"<CertificateAuthority of {self.trust_domain} in {self.folder or 'memory'}>"

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise TypeError("a certificate authority can't be pickled or copied: it holds private keys")

    # ------------------------------------------------------------------------------------------------ inside

    @contextmanager
    def _current(self) -> Iterator[Roots]:
        with self._lock, nullcontext() if self.folder is None else files.locked(self.folder):
            if self.folder is not None:
                self._roots = Roots.load(self.folder)
            yield self._roots

    def _served(self, out: str | os.PathLike[str]) -> list[tuple[Path, x509.Certificate]]:
        found = []
        for path in sorted(Path(out).glob("*/svid.pem")):
            with files.folder(path.parent) as fd:
                certificate = read_certificate(fd, path.parent, "svid.pem", "Take it away, and issue it anew.")
            if [certificates.trust_domain_of(uri) for uri in certificates.uris_of(certificate)] == [self.trust_domain]:
                found.append((path.parent, certificate))
        return found

    def _signed_by(self, root: x509.Certificate) -> list[str]:
        newest = {entry["spiffe_id"]: entry for entry in self._entries() if "spiffe_id" in entry}
        issuer, now = certificates.serial_of(root), self._clock()
        return [entry["service"] for entry in newest.values() if entry["issuer"] == issuer and _seconds(entry["not_after"]) > now]

    def _entries(self) -> list[dict[str, Any]]:
        if self.folder is None:
            return list(self._log)
        path = self.folder / "issued.jsonl"
        return list(_parsed(path.read_bytes().splitlines())) if path.exists() else []

    def _note(self, event: str, certificate: x509.Certificate, *, issuer: Root | None = None, **more: str) -> None:
        entry: dict[str, Any] = {
            "time": _text(self._clock()),
            "event": event,
            "serial": certificates.serial_of(certificate),
            **more,
            **({"issuer": certificates.serial_of(issuer.certificate)} if issuer else {}),
            "not_before": _text(certificate.not_valid_before_utc.timestamp()),
            "not_after": _text(certificate.not_valid_after_utc.timestamp()),
            "uid": os.getuid(),
        }
        if self.folder is None:
            self._log.append(entry)
        else:
            files.append(self.folder, "issued.jsonl", json.dumps(entry, separators=(",", ":")).encode())


def _fill(where: Path, issued: Issued) -> None:
    # The bundle first: who presents the new certificate must already trust what it trusts.
    pair = [("key.pem", issued.key, 0o600), ("svid.pem", issued.chain, 0o644)]
    files.write(where, [("bundle.pem", issued.bundle, 0o644), *pair])


def _parsed(lines: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    for line in lines:
        try:
            entry = json.loads(line)
        except ValueError:
            continue  # a line that a crash cut off: its certificate was never handed out
        if isinstance(entry, dict):
            yield entry


def _text(seconds: float) -> str:
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _seconds(text: str) -> float:
    return datetime.datetime.fromisoformat(text).timestamp()
