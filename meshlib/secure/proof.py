"""Do these parts make a whole identity, and may we stand up with it?

Chain, key, bundle, revocations: wherever they come from, they are judged here, as a set and as a whole. The key is that of
the certificate, the certificate is an X.509-SVID of exactly the expected SPIFFE ID and is valid now, and the bundle holds
roots of our own trust domain only. Anything else is refused with what, why and what to do: a peer would refuse most of it
too, but an hour later and in other words.

Two parts are not worth the identity, and have a rule of their own: what was known before stays, and a note says so.

- *Revocations* that can't be read, that are signed by nobody we know, that are older than those we have, or that are gone:
  forgetting what was revoked is the one answer that helps an attacker. At the start there is nothing to keep, so it fails. A
  list past its date goes on counting: see `revoked.rs` in the wire for why.
- *Bundles of other trust domains* that can't be read. One that was never good is left out, and its members are refused.

It reads no files and remembers nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple, NoReturn

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from .._native import core
from ..errors import IdentityError, IdentityWithdrawn, KeyFileError, MeshError, TrustDomainError
from . import bundle as bundles_
from . import certificates
from .dev import DEV_TRUST_DOMAIN
from .files import Secret
from .identity import Identity, digest_of

_ANEW: Final = "Issue it anew: meshlib ca issue"
_CUT_OFF: Final = f"Was it cut off while copying? {_ANEW}"
_CRL_BEGIN: Final = b"-----BEGIN X509 CRL-----"


class Names(NamedTuple):
    """How the parts are called in errors: paths, where they are files."""

    chain: str = "the certificate"
    key: str = "the key"
    bundle: str = "the bundle"
    crl: str = "the list of revocations"


@dataclass(frozen=True, slots=True)
class Parts:
    """What a source has found: PEM, or a SPIFFE bundle for the roots. `federated` are bundles of other trust domains, by their names.

    Where revocations or a federated bundle should be and can't be read, the error stands in their place.
    """

    chain: bytes = field(repr=False)
    key: Secret = field(repr=False)
    bundle: bytes = field(repr=False)
    crl: bytes | MeshError = field(default=b"", repr=False)
    federated: Mapping[str, bytes | MeshError] = field(default_factory=dict, repr=False, hash=False)

    @property
    def digest(self) -> bytes:
        others = (part for name in sorted(self.federated) for part in (name.encode(), _content(self.federated[name])))
        return digest_of(self.chain, self.key, self.bundle, _content(self.crl), *others)

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise TypeError("the parts of an identity can't be pickled or copied: they hold a private key")


class Trust(NamedTuple):
    """Whom the parts say to trust: roots and revocations by trust domain, as PEM, and what isn't well about it."""

    bundles: dict[str, bytes]
    crls: dict[str, bytes]
    notes: tuple[str, ...]


def prove(
    parts: Parts,
    spiffe_id: str,
    now: float,
    *,
    names: Names = Names(),  # noqa: B008 - immutable
    last: Identity | None = None,
) -> Identity:
    """The identity that the parts make, or KeyFileError, TrustDomainError or IdentityError. `last` is what was good before."""
    trust_domain = certificates.trust_domain_of(spiffe_id)
    chain = _certificates(parts.chain, names.chain)
    leaf = chain[0]
    if _public_key(parts.key, names.key) != leaf.public_key():
        raise KeyFileError(
            f"{names.key} is not the key of {names.chain}.",
            hint="One of the two was replaced without the other: issue the pair anew (`meshlib ca issue`).",
        )
    uris = certificates.uris_of(leaf)
    domains = {certificates.trust_domain_of(uri) for uri in uris}
    if domains and domains != {trust_domain}:
        raise _wrong_domain(names.chain, domains, trust_domain)
    if flaw := certificates.flaw_of_leaf(leaf):
        raise IdentityError(f"{names.chain} is no X.509-SVID: {flaw}.", hint=_ANEW)
    if uris[0] != spiffe_id:
        raise IdentityError(
            f"{names.chain} is for {uris[0]}, and this service is {spiffe_id}.",
            hint="Is MESHLIB_SERVICE right, and does the identity belong to this service and namespace?",
        )
    begin, end = leaf.not_valid_before_utc, leaf.not_valid_after_utc
    if now >= end.timestamp():
        raise IdentityError(f"{names.chain} expired at {end:%Y-%m-%d %H:%M:%S} UTC.", hint=_ANEW)
    if now < begin.timestamp():
        raise IdentityError(
            f"{names.chain} is not valid before {begin:%Y-%m-%d %H:%M:%S} UTC.", hint="Is this machine's clock right?"
        )
    trust = trust_of(parts, trust_domain, names=names, last=last, chain=chain)
    return Identity(
        spiffe_id=spiffe_id,
        # A file may hold the key, too (SPIFFE's credential bundles do): the chain is shown to everybody.
        chain=parts.chain if parts.chain.count(b"-----BEGIN ") == len(chain) else certificates.pem(*chain),
        key=bytes(parts.key),
        bundles=trust.bundles,
        serial=certificates.serial_of(leaf),
        not_before=begin.timestamp(),
        not_after=end.timestamp(),
        crls=trust.crls,
        notes=trust.notes,
    )


def trust_of(
    parts: Parts,
    trust_domain: str,
    *,
    names: Names = Names(),  # noqa: B008 - immutable
    last: Identity | None = None,
    chain: Iterable[x509.Certificate] = (),
) -> Trust:
    """Whom to trust by these parts, whatever becomes of the certificate beside them."""
    notes = list[str]()
    own = _own_bundle(parts.bundle, trust_domain, names.bundle, notes)
    kept = last.bundles if last is not None else {}
    bundles = {trust_domain: own}
    for name, document in sorted(parts.federated.items()):
        pem = _other_bundle(document, name, trust_domain, kept.get(name, b""), notes)
        if pem:
            bundles[name] = pem
    issuers = [*x509.load_pem_x509_certificates(own), *(each for each in chain if _is_ca(each))]
    known = last.crls.get(trust_domain, b"") if last is not None else b""
    crl = _revocations(parts.crl, issuers, (trust_domain, own), names.crl, known, notes)
    return Trust(bundles, {trust_domain: crl} if crl else {}, tuple(notes))


# ---------------------------------------------------------------------------------------------------- certificate and key


def _certificates(text: bytes, name: str) -> list[x509.Certificate]:
    try:
        found = x509.load_pem_x509_certificates(text)
    except ValueError:
        raise KeyFileError(f"{name} holds no certificates in PEM.", hint=_CUT_OFF) from None
    try:
        for certificate in found:
            # Both are parsed when they are first asked for: asked here, no later question can fail.
            certificate.public_key(), certificate.extensions
    except (ValueError, UnsupportedAlgorithm, x509.DuplicateExtension, x509.UnsupportedGeneralNameType) as error:
        raise KeyFileError(f"{name} holds a malformed certificate: {error}.", hint=_ANEW) from None
    return found


def _public_key(key: Secret, name: str) -> Any:
    try:
        return load_pem_private_key(key, None).public_key()
    except TypeError:
        raise KeyFileError(
            f"{name} is encrypted.",
            hint="A service can't type a password: give it the plain key, protected by mode 0600.",
        ) from None
    except (ValueError, UnsupportedAlgorithm):
        raise KeyFileError(f"{name} holds no private key in PEM.", hint=_CUT_OFF) from None


# ---------------------------------------------------------------------------------------------------- bundles


def _own_bundle(document: bytes, trust_domain: str, name: str, notes: list[str]) -> bytes:
    is_pem = document.lstrip()[:1] != b"{"
    if is_pem:
        roots = _certificates(document, name)
        domains = {certificates.trust_domain_of(uri) for root in roots for uri in certificates.uris_of(root)}
        if domains and domains != {trust_domain}:
            raise _wrong_domain(name, domains, trust_domain)
    try:
        found = bundles_.parse(document, trust_domain)
    except IdentityError as error:
        raise KeyFileError(f"{name} can't be used: {error.message}", hint=error.hint) from None
    if not found.x509:
        why = f" ({'; '.join(found.ignored)})" if found.ignored else ""
        raise IdentityWithdrawn(
            f"{name} holds no root any more{why}: the trust domain {trust_domain} has withdrawn its keys.",
            hint="Nothing that it signed is believed. Put a bundle with a root there to go on.",
        )
    notes += (f"{name}: {each}" for each in found.ignored)
    return document if is_pem and not found.ignored else found.pem


def _other_bundle(document: bytes | MeshError, name: str, own: str, kept: bytes, notes: list[str]) -> bytes:
    """Roots of another trust domain; what was known if this is none, b"" if they were withdrawn or never known."""
    if name == own or bundles_.flaw_of_trust_domain(name):
        notes.append(f"a bundle of {name[:300]!r} is ignored: it must be the name of another trust domain")
        return b""
    try:
        if isinstance(document, MeshError):
            raise document
        found = bundles_.parse(document, name)
    except MeshError as error:
        notes.append(f"the bundle of {name} can't be used, {'the last one stays' if kept else 'it stays unknown'}: {error}")
        return kept
    notes += (f"the bundle of {name}: {each}" for each in found.ignored)
    return found.pem


# ---------------------------------------------------------------------------------------------------- revocations


def _revocations(
    text: bytes | MeshError,
    issuers: list[x509.Certificate],
    own: tuple[str, bytes],
    name: str,
    kept: bytes,
    notes: list[str],
) -> bytes:
    """The lists that count now, as PEM."""
    if isinstance(text, MeshError):
        if not kept:
            raise text
        notes.append(f"the last good list of revocations stays in force: {text}")
        return kept
    if not text:
        if kept:
            notes.append(f"{name} is gone: what it revoked stays revoked until this process ends. Put it back")
        return kept
    flaw = ""
    lists = list[x509.CertificateRevocationList]()
    try:
        lists = certificates.crls_of(text)
    except (ValueError, UnsupportedAlgorithm):
        flaw = "it holds a list that can't be read"
    if not flaw:
        # A block that was cut off is none to the parser, and a list less is a revocation forgotten.
        is_whole = lists and len(lists) == text.count(_CRL_BEGIN)
        flaw = _flaw_of_lists(lists, issuers) if is_whole else "it holds no list, or half of one"
    if not flaw:
        flaw = _flaw_on_the_wire(text, own)
    if not flaw and kept and text != kept:
        flaw = _loss(lists, certificates.crls_of(kept), {issuer.subject for issuer in issuers})
    if not flaw:
        return text
    if not kept:
        raise KeyFileError(f"{name} can't be used: {flaw}.", hint="Publish it anew (`meshlib ca revoke`, `meshlib ca publish`).")
    notes.append(f"{name} can't be used, the last good one stays in force: {flaw}")
    return kept


def _flaw_of_lists(lists: list[x509.CertificateRevocationList], issuers: list[x509.Certificate]) -> str:
    """Lists of issuers that we don't know do no harm, and count for the certificates of theirs; but all can't be theirs."""
    is_any_known = False
    for each in lists:
        named = [issuer for issuer in issuers if issuer.subject == each.issuer]
        if named and not any(_has_signed(issuer, each) for issuer in named):
            return f"a list in it is not signed by {each.issuer.rfc4514_string()}, whom it names"
        is_any_known = is_any_known or bool(named)
    return "" if is_any_known else "it is signed by nobody whom we know"


def _flaw_on_the_wire(text: bytes, own: tuple[str, bytes]) -> str:
    """Whoever verifies with it must be able to read it, down to kinds of lists that we can't tell apart here."""
    try:
        core.TlsClient(None, None, dict([own]), 0, crls={own[0]: text})
    except MeshError as error:
        return error.message
    return ""


def _loss(
    lists: list[x509.CertificateRevocationList], before: list[x509.CertificateRevocationList], known: set[x509.Name]
) -> str:
    """What would be forgotten, if these lists replaced those; "" if nothing would."""
    newest: dict[x509.Name, Any] = {}
    for each in lists:
        newest[each.issuer] = max(newest.get(each.issuer, each.last_update_utc), each.last_update_utc)
    for each in before:
        if each.issuer not in newest:
            if each.issuer in known:
                return f"it lacks the list of {each.issuer.rfc4514_string()}, which we have"
        elif newest[each.issuer] < each.last_update_utc:
            return "it is older than what we have"
    return ""


def _has_signed(issuer: x509.Certificate, listed: x509.CertificateRevocationList) -> bool:
    try:
        return listed.is_signature_valid(issuer.public_key())  # type: ignore[arg-type]
    except (TypeError, ValueError, UnsupportedAlgorithm):
        return False


def _is_ca(certificate: x509.Certificate) -> bool:
    try:
        return certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    except x509.ExtensionNotFound:
        return False


def _content(part: bytes | MeshError) -> bytes:
    return part if isinstance(part, bytes) else str(part).encode()


def _wrong_domain(name: str, found: set[str], expected: str) -> TrustDomainError:
    names = ", ".join(sorted(each or "(not a SPIFFE ID)" for each in found))
    hint = "Set secure.trust_domain, or issue it by the CA of this trust domain."
    if DEV_TRUST_DOMAIN in found:
        hint = "It was made by `meshlib dev`, and counts nowhere else."
    return TrustDomainError(f"{name} is of the trust domain {names}, and the configuration says {expected}.", hint=hint)
