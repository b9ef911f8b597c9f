"""Which keys speak for a trust domain?

A bundle holds them: as a SPIFFE bundle (a JWK set, JSON), which trust domains exchange, or as PEM, which has the roots for
certificates only. What is read is what the standard says (SPIFFE Trust Domain and Bundle 4, X509-SVID 6, JWT-SVID 6): of a
key for certificates the first of `x5c` counts, if it is the certificate of a CA; keys of an unknown kind or use are
ignored, and each thing that was ignored is told; a document with a member twice is refused as a whole, since two readers
could see two different keys in it. Keys for certificates and keys for tokens are kept apart and never stand in for one another.

No key at all is an answer, too: the trust domain has withdrawn everything, and nothing that it signed is believed. Only a
SPIFFE bundle can say so; a PEM text without certificates is a file that was cut off.

It does not know to which trust domain a bundle belongs, for that is never written in it: who asks for it knows.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding

from .._native import core
from ..errors import IdentityError, MeshError, TrustDomainError
from . import certificates

# The largest bundles in use hold some dozens of keys, 2 KiB each.
LIMIT: Final = 512 * 1024
MOST_KEYS: Final = 256

_X509, _JWT = "x509-svid", "jwt-svid"
# What a public key is made of, by its kind. Symmetric keys (oct) are no keys of a trust domain, whatever they say.
_MEMBERS: Final = {"EC": ("crv", "x", "y"), "RSA": ("n", "e"), "OKP": ("crv", "x")}
# Kinds with which tokens may be signed by the profile (RS, PS and ES).
_TOKEN_KINDS: Final = ("EC", "RSA")
_PRIVATE: Final = frozenset({"d", "p", "q", "dp", "dq", "qi", "oth", "k"})
_WAY_OUT: Final = "Fetch or write the bundle again; `meshlib ca` writes a good one."


@dataclass(frozen=True, slots=True)
class Bundle:
    """The keys of one trust domain.

    `x509` are roots for certificates in DER, `jwt` is a JWK set (JSON) of the keys for tokens, `sequence` rises with each new bundle,
    `refresh_hint` are the seconds after which to ask again, and `ignored` says what did not count, and why.
    """

    x509: tuple[bytes, ...]
    jwt: bytes = b'{"keys":[]}'
    sequence: int | None = None
    refresh_hint: float | None = None
    ignored: tuple[str, ...] = ()

    @property
    def pem(self) -> bytes:
        """The roots for certificates as PEM; b"" if there are none."""
        return certificates.pem(*(x509.load_der_x509_certificate(der) for der in self.x509))

    def supersedes(self, before: Bundle) -> bool:
        """Whether this one may replace what was known: its sequence doesn't go back. One without a sequence counts as new."""
        return self.sequence is None or before.sequence is None or self.sequence >= before.sequence


@dataclass(frozen=True, slots=True)
class BundleMap:
    """Bundles by trust domain, never in one pool. Hints of the single bundles say nothing about when to ask for the map."""

    bundles: Mapping[str, Bundle]


def parse(document: bytes, trust_domain: str = "") -> Bundle:
    """A bundle from a SPIFFE bundle (JSON) or from PEM; IdentityError if it is neither, or none that can be trusted.

    With `trust_domain`, a root that names another one is ignored.
    """
    _refuse_size(document)
    if document.lstrip()[:1] == b"{":
        return parse_json(document, trust_domain)
    try:
        roots = x509.load_pem_x509_certificates(document)
    except ValueError:
        raise IdentityError("the bundle is neither a SPIFFE bundle nor PEM.", hint=f"Was it cut off? {_WAY_OUT}") from None
    if len(roots) != document.count(b"-----BEGIN CERTIFICATE-----"):
        raise IdentityError("the bundle ends in the middle of a certificate.", hint=f"Was it cut off? {_WAY_OUT}")
    kept, ignored = list[bytes](), list[str]()
    for index, root in enumerate(roots):
        flaw = _flaw_of_root(root, trust_domain)
        if flaw:
            ignored.append(f"certificate {index}: {flaw}")
        else:
            kept.append(root.public_bytes(Encoding.DER))
    if not kept:
        raise IdentityError(f"the bundle holds no root: {'; '.join(ignored)}.", hint=_WAY_OUT)
    return Bundle(tuple(kept), ignored=tuple(ignored))


def parse_json(document: bytes, trust_domain: str = "") -> Bundle:
    """A SPIFFE bundle; PEM won't do."""
    _refuse_size(document)
    return _bundle_of(_json(document), trust_domain)


def parse_map(document: bytes) -> BundleMap:
    """A SPIFFE bundle map: `trust_domains` with a bundle for each. Any fault in it refuses the whole map."""
    _refuse_size(document)
    content = _json(document)
    found = content.get("trust_domains")
    if not isinstance(found, dict):
        raise IdentityError(
            "the bundle map has no trust_domains.", hint="It needs an object with a bundle for each trust domain."
        )
    bundles = {}
    for name, value in found.items():
        if flaw := flaw_of_trust_domain(name):
            raise TrustDomainError(f"the bundle map names {name[:300]!r}: {flaw}.", hint=_WAY_OUT)
        if not isinstance(value, dict):
            raise IdentityError(f"the bundle map holds no bundle for {name}.", hint=_WAY_OUT)
        bundles[name] = _bundle_of(value, name)
    return BundleMap(bundles)


def format(bundle: Bundle) -> bytes:  # noqa: A001 - the pair of `parse`, and always called as bundle.format
    """The SPIFFE bundle, as other trust domains read it."""
    keys = [_jwk_of(der) for der in bundle.x509]
    keys += json.loads(bundle.jwt)["keys"]
    document: dict[str, Any] = {}
    if bundle.sequence is not None:
        document["spiffe_sequence"] = bundle.sequence
    if bundle.refresh_hint is not None:
        document["spiffe_refresh_hint"] = int(bundle.refresh_hint)
    document["keys"] = keys
    return json.dumps(document, indent=1).encode() + b"\n"


def flaw_of_trust_domain(name: str) -> str:
    """What keeps a text from being the name of a trust domain; "" if nothing does."""
    if not name or len(name) > 255:
        return "the name of a trust domain has 1 to 255 characters"
    if not set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789.-_"):
        return 'a trust domain has small letters, digits, ".", "-" and "_", and neither scheme, port nor path'
    return ""


# ---------------------------------------------------------------------------------------------------- JSON


def _bundle_of(content: Mapping[str, Any], trust_domain: str) -> Bundle:
    keys = content.get("keys")
    if not isinstance(keys, list):
        raise IdentityError("the SPIFFE bundle has no keys.", hint="It needs a list; an empty one says that all are withdrawn.")
    if len(keys) > MOST_KEYS:
        raise IdentityError(f"the SPIFFE bundle has {len(keys)} keys, and at most {MOST_KEYS} are read.", hint=_WAY_OUT)
    sequence = content.get("spiffe_sequence")
    if sequence is not None and (not _is_whole(sequence) or sequence < 0):
        # Without it an old bundle couldn't be told from a new one: who writes it wrongly must not be taken for one who leaves it out.
        raise IdentityError("the SPIFFE bundle's spiffe_sequence is not a whole number.", hint=_WAY_OUT)
    ignored = list[str]()
    hint = content.get("spiffe_refresh_hint")
    if hint is not None and (not _is_whole(hint) or hint <= 0 or hint > 10**9):
        ignored.append("spiffe_refresh_hint: it is not a whole number of seconds")
        hint = None
    roots, tokens, names = list[bytes](), list[dict[str, Any]](), set[str]()
    for index, key in enumerate(keys):
        flaw = ""
        if not isinstance(key, dict):
            flaw = "it is no object"
        elif not isinstance(key.get("use"), str) or not isinstance(key.get("kty"), str):
            flaw = "use and kty must be set"
        elif key["use"] == _X509:
            found = _root_of(key, trust_domain)
            if isinstance(found, bytes):
                roots.append(found)
                if len(key["x5c"]) > 1:
                    ignored.append(f"key {index}: of x5c only the first certificate counts")
            else:
                flaw = found
        elif key["use"] == _JWT:
            flaw = _flaw_of_token_key(key, names)
            if not flaw:
                names.add(key["kid"])
                tokens.append({name: key[name] for name in ("use", "kty", "kid", "alg", *_MEMBERS[key["kty"]]) if name in key})
        else:
            flaw = f"its use {key['use'][:40]!r} is unknown"
        if flaw:
            ignored.append(f"key {index}: {flaw}")
    return Bundle(
        tuple(dict.fromkeys(roots)),
        json.dumps({"keys": tokens}, separators=(",", ":")).encode(),
        sequence,
        None if hint is None else float(hint),
        tuple(ignored),
    )


def _root_of(key: Mapping[str, Any], trust_domain: str) -> bytes | str:
    """The root of an entry in DER, or why there is none."""
    chain = key.get("x5c")
    if key["kty"] not in _MEMBERS:
        return f"its kty {key['kty'][:40]!r} is unknown"
    if not isinstance(chain, list) or not chain:
        return "it has no x5c"
    try:
        if not isinstance(chain[0], str):
            raise TypeError
        der = base64.b64decode(chain[0], validate=True)
        root = x509.load_der_x509_certificate(der)
        flaw = _flaw_of_root(root, trust_domain)
    except (ValueError, TypeError):
        return "its x5c holds no certificate in base64"
    return flaw or der


def _flaw_of_root(root: x509.Certificate, trust_domain: str) -> str:
    try:
        extensions = root.extensions
        root.public_key()
    except (ValueError, TypeError, UnsupportedAlgorithm, x509.DuplicateExtension, x509.UnsupportedGeneralNameType) as error:
        return f"its certificate is malformed ({type(error).__name__})"
    try:
        is_ca = extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    except x509.ExtensionNotFound:
        is_ca = False
    if not is_ca:
        return "its certificate is not that of a CA"
    try:
        may_sign = extensions.get_extension_for_class(x509.KeyUsage).value.key_cert_sign
    except x509.ExtensionNotFound:
        may_sign = True
    if not may_sign:
        return "its certificate may not sign certificates (key usage)"
    named = {certificates.trust_domain_of(uri) for uri in certificates.uris_of(root)}
    if trust_domain and named - {trust_domain}:
        return f"its certificate names another trust domain ({', '.join(sorted(name or 'no SPIFFE ID' for name in named))})"
    try:
        # Whoever verifies with it must be able to read it: one root that it can't must not cost us all the others.
        core.TlsClient(None, None, {trust_domain or next(iter(named), "any"): certificates.pem(root)}, 0)
    except MeshError as error:
        return f"its certificate can't be used: {error}"
    return ""


def _flaw_of_token_key(key: Mapping[str, Any], names: set[str]) -> str:
    name, kind = key.get("kid"), key["kty"]
    if kind not in _TOKEN_KINDS:
        return f"its kty {kind[:40]!r} is unknown, or not for tokens"
    if not isinstance(name, str) or not name:
        return "it has no kid"
    if name in names:
        return "its kid is that of an earlier key"
    if _PRIVATE & key.keys():
        return "it is a private key, which should be replaced: who can read this bundle can sign with it"
    if not all(isinstance(key.get(member), str) for member in _MEMBERS[kind]) or not isinstance(key.get("alg", ""), str):
        return "it is incomplete"
    return ""


def _json(document: bytes) -> dict[str, Any]:
    try:
        content = json.loads(document.decode("utf-8"), object_pairs_hook=_once, parse_constant=_refuse_constant)
    except _TwiceError as error:
        raise IdentityError(
            f"the SPIFFE bundle has the member {str(error)[:300]!r} twice.",
            hint=f"Nobody can say which one counts. {_WAY_OUT}",
        ) from None
    except (ValueError, RecursionError):
        raise IdentityError("the SPIFFE bundle is not JSON in UTF-8.", hint=f"Was it cut off? {_WAY_OUT}") from None
    if not isinstance(content, dict):
        raise IdentityError("the SPIFFE bundle is not a JSON object.", hint=_WAY_OUT)
    return content


class _TwiceError(Exception):
    """A member of an object stands twice."""


def _once(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise _TwiceError(name)
        found[name] = value
    return found


def _refuse_constant(name: str) -> Any:
    raise ValueError(name)


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _refuse_size(document: bytes) -> None:
    if len(document) > LIMIT:
        raise IdentityError(f"the bundle is larger than {LIMIT // 1024} KiB.", hint="It should hold keys and nothing else.")


def _jwk_of(der: bytes) -> dict[str, Any]:
    """An entry for a root: its key in the words of JWK, and the certificate."""
    key = x509.load_der_x509_certificate(der).public_key()
    members: dict[str, str]
    if isinstance(key, ec.EllipticCurvePublicKey):
        numbers, size = key.public_numbers(), (key.key_size + 7) // 8
        curve = {256: "P-256", 384: "P-384", 521: "P-521"}[key.key_size]
        members = {"kty": "EC", "crv": curve, "x": _text(numbers.x, size), "y": _text(numbers.y, size)}
    elif isinstance(key, rsa.RSAPublicKey):
        rsa_numbers = key.public_numbers()
        members = {"kty": "RSA", "n": _text(rsa_numbers.n), "e": _text(rsa_numbers.e)}
    elif isinstance(key, ed25519.Ed25519PublicKey):
        members = {"kty": "OKP", "crv": "Ed25519", "x": _unpadded(key.public_bytes_raw())}
    else:
        raise IdentityError("a root has a key of a kind that a SPIFFE bundle can't hold.", hint="Use EC, RSA or Ed25519.")
    return {**members, "use": _X509, "x5c": [base64.b64encode(der).decode()]}


def _text(number: int, size: int = 0) -> str:
    return _unpadded(number.to_bytes(size or (number.bit_length() + 7) // 8, "big"))


def _unpadded(content: bytes) -> str:
    return base64.urlsafe_b64encode(content).rstrip(b"=").decode()
