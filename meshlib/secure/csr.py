"""Whose key is to be certified?

A service makes its key where it runs and sends a request (PKCS#10) that is signed with it: so the CA knows that whoever
asks holds the key, and never sees it. Nothing else of the request counts. Which name goes into the certificate is
decided by the token or by the certificate that was shown with it; a request that asks for another SPIFFE ID is refused,
since whoever made it believes to be somebody else.

Keys are those that every peer of the mesh can verify: EC P-256 and P-384, RSA of 2048 to 4096 bits. The kind is looked
at before the signature: a key of a million bits must not cost a second of the CA's time.
"""

from __future__ import annotations

import re
from typing import Final

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from ..errors import IdentityError
from .certificates import PublicKey

LIMIT: Final = 16 * 1024

_PEM: Final = re.compile(r"\s*-----BEGIN CERTIFICATE REQUEST-----[A-Za-z0-9+/=\s]+-----END CERTIFICATE REQUEST-----\s*")
_HINT: Final = "Make it anew: `meshlib ca enroll` does, with an EC key P-256."


def new_request(key: ec.EllipticCurvePrivateKey, spiffe_id: str) -> bytes:
    """A request for a certificate of this ID, as PEM."""
    names = x509.SubjectAlternativeName([x509.UniformResourceIdentifier(spiffe_id)])
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([])).add_extension(names, critical=True)
    return builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def checked_key(request: str, spiffe_id: str) -> PublicKey:
    """The public key of a request that is signed with it, and that asks for this ID or for none."""
    if len(request) > LIMIT or not _PEM.fullmatch(request):
        raise IdentityError(
            "the request for a certificate is not one PKCS#10 request in PEM.", hint=_HINT, reason="csr.malformed"
        )
    try:
        parsed = x509.load_pem_x509_csr(request.encode())
        key = parsed.public_key()
        if flaw := _flaw_of(key):
            raise IdentityError(f"a key of this kind is not certified: {flaw}.", hint=_HINT, reason="csr.key")
        is_signed = parsed.is_signature_valid
        wanted = _uris_of(parsed)
    except (ValueError, TypeError, UnsupportedAlgorithm, x509.DuplicateExtension, x509.UnsupportedGeneralNameType) as error:
        raise IdentityError("the request for a certificate can't be read.", hint=_HINT, reason="csr.malformed") from error
    if not is_signed:
        raise IdentityError(
            "the request for a certificate is not signed with the key that it holds.", hint=_HINT, reason="csr.signature"
        )
    if wanted and wanted != [spiffe_id]:
        raise IdentityError(
            f"the request asks for {', '.join(wanted)[:300]}, and may have {spiffe_id} only.",
            hint="Is the token, or the certificate that was shown, that of this service?",
            reason="csr.identity",
        )
    assert isinstance(key, ec.EllipticCurvePublicKey | rsa.RSAPublicKey)
    return key


def _flaw_of(key: object) -> str:
    if isinstance(key, ec.EllipticCurvePublicKey):
        is_known = isinstance(key.curve, ec.SECP256R1 | ec.SECP384R1)
        return "" if is_known else f"the curve is {key.curve.name}, and P-256 and P-384 are taken"
    if isinstance(key, rsa.RSAPublicKey):
        return "" if 2048 <= key.key_size <= 4096 else f"RSA of {key.key_size} bits, and 2048 to 4096 are taken"
    return "EC P-256 and P-384 and RSA are taken"


def _uris_of(request: x509.CertificateSigningRequest) -> list[str]:
    try:
        names = request.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return []
    return names.get_values_for_type(x509.UniformResourceIdentifier)
