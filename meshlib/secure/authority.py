"""How does a service on another machine get its identity, and keep it?

The HTTPS service of `meshlib ca serve`. Keys stay where they are made: the service sends requests for certificates, and
the CA's keys never leave this machine.

    POST /v1/enroll   {"token", "csr"} → {"chain", "bundle", "crl", "spiffe_id", "not_after"}; once per token
    POST /v1/renew    {"csr"}          → the same, for the SPIFFE ID of the certificate shown in the handshake
    POST /v1/jwt      {"audience": […]} → {"token", "spiffe_id", "not_after"}: a JWT-SVID for that SPIFFE ID, for five minutes
    GET  /v1/bundle   the SPIFFE bundle (JSON) with roots and keys for tokens, also for other trust domains (https_spiffe)
    GET  /v1/roots    the roots as PEM, the one under which leaves are signed first
    GET  /v1/crl      what was revoked, as PEM

Deny is the answer to anything unknown. Whether a certificate was revoked is asked of the log, so that whoever was revoked
is told so. Refusals cost us at most 30 lines of the log in a minute and 1000 in a day, for each kind: what comes beyond is
counted. That a token is used twice, or a revoked certificate, tells of a theft, and only who has the secret or the key can
cause it: it is always told, once for each network that it comes from.

Here are the answers alone; sockets and TLS are `authority_server.py`'s.
"""

from __future__ import annotations

import ipaddress
import json
import logging
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from ..errors import IdentityError
from . import bundle as bundles
from . import certificates, csr
from .ca import RENEWED_LIFE, CertificateAuthority, Issued
from .jwt_svid import TokenKeys, handed_out, jwks
from .ledger import Entry
from .tokens import Tokens

log = logging.getLogger("meshlib.secure")

REFRESH_HINT: Final = 300.0
NO_KEYS: Final = jwks([])

_LINES: Final = 30
_MINUTE: Final = 60.0
_LINES_A_DAY: Final = 1000
_DAY: Final = 86400.0
# Of who had a real secret, or proved a real certificate; so many are told apart, and the others are like the rest.
_PROVED: Final = frozenset({"token.used", "token.expired", "renew.revoked"})
_MOST_PROVED: Final = 4096
_JSON: Final = "application/json"
_PROBLEM: Final = "application/problem+json"
_PEM: Final = "application/x-pem-file"


@dataclass(frozen=True, slots=True)
class Request:
    """What was asked. `peer` and `chain` (DER) are what the client proved in the handshake, `source` is its address."""

    method: str
    path: str
    body: bytes = field(default=b"", repr=False)
    peer: str | None = None
    chain: tuple[bytes, ...] = ()
    source: str = ""


@dataclass(frozen=True, slots=True)
class Reply:
    status: int
    body: bytes = field(repr=False)
    kind: str = _JSON


class Service:
    """The answers, without sockets. Lives as long as the process; `ttl` is the life of what it signs."""

    def __init__(
        self,
        authority: CertificateAuthority,
        *,
        ttl: float = RENEWED_LIFE,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.authority = authority
        self.flood = Flood(authority, clock)
        self._tokens = Tokens(authority)
        assert authority.folder is not None  # or there were no tokens
        self._keys = TokenKeys(authority.folder)
        self._ttl = ttl
        self._routes: dict[str, tuple[str, Callable[[Request], Reply]]] = {
            "/v1/enroll": ("POST", self._enroll),
            "/v1/renew": ("POST", self._renew),
            "/v1/jwt": ("POST", self._jwt),
            "/v1/bundle": ("GET", self._bundle),
            "/v1/roots": ("GET", lambda _: Reply(200, self.authority.bundle, _PEM)),
            "/v1/crl": ("GET", lambda _: Reply(200, self.authority.crl, _PEM)),
        }

    def prepare(self) -> None:
        """What has to be there before the first question."""
        self._keys.create()

    def answer(self, request: Request) -> Reply:
        method, handle = self._routes.get(request.path, ("", None))
        if handle is None:
            return problem(404, "http.path", "There is nothing at this path.", f"There are {', '.join(self._routes)}.")
        if request.method != method:
            return problem(405, "http.method", f"{request.path} takes {method} only.", "Use that.")
        try:
            return handle(request)
        except IdentityError as error:
            is_unsaid = error.reason in {"renew.anonymous", "jwt.anonymous"}
            status = 401 if is_unsaid else 400 if error.reason.startswith(("csr.", "http.", "jwt.")) else 403
            self.flood.refuse(error.reason, source=request.source, peer=request.peer or "", why=error.message)
            return problem(status, error.reason, error.message, error.hint)
        except Exception:
            log.exception("%s %s failed", request.method, request.path)
            return problem(500, "ca.failed", "The CA could not do it.", "Its log has more; try again later.")

    def _enroll(self, request: Request) -> Reply:
        proof, wanted = _members(request.body, "token", "csr")
        grant = self._tokens.find(proof)
        # A request that can't be signed leaves the token good.
        key = csr.checked_key(wanted, grant.spiffe_id)
        facts = {"by": "token", "token": grant.name, "source": request.source}
        with self.authority.alone():  # who is revoked meanwhile gets nothing, and what can't be signed leaves the token good
            self.authority.prepare(grant.spiffe_id, self._ttl)
            self._tokens.consume(grant, source=request.source)
            issued = self.authority.sign(key, grant.service, grant.spiffe_id, grant.dns_name, self._ttl, **facts)
        return self._handed(issued)

    def _renew(self, request: Request) -> Reply:
        peer, leaf, entry = self._caller(request, "a renewal", "renew.anonymous")
        (wanted,) = _members(request.body, "csr")
        key = csr.checked_key(wanted, peer)
        dns_name = next(iter(certificates.dns_names_of(leaf)), "")
        facts = {"by": "renewal", "before": certificates.serial_of(leaf), "source": request.source}
        with self.authority.alone():
            self.authority.entitled(leaf)  # still: somebody may have revoked it since
            issued = self.authority.sign(key, entry["service"], peer, dns_name, self._ttl, **facts)
        return self._handed(issued)

    def _jwt(self, request: Request) -> Reply:
        peer, leaf, entry = self._caller(request, "a JWT-SVID", "jwt.anonymous")
        handed = handed_out(
            self.authority, entry["service"], peer, _audiences(request.body),
            by="certificate", serial=certificates.serial_of(leaf), source=request.source,
        )  # fmt: skip
        content = {"token": handed.text, "spiffe_id": handed.spiffe_id, "not_after": handed.expires}
        return Reply(200, json.dumps(content).encode())

    def _caller(self, request: Request, what: str, reason: str) -> tuple[str, x509.Certificate, Entry]:
        """Who shows a certificate that may be renewed: its ID, the certificate, and the log's entry of it."""
        if request.peer is None or not request.chain:
            raise IdentityError(
                f"{what} needs the present certificate in the handshake.", hint="Without one: enrol with a token.", reason=reason
            )
        leaf = x509.load_der_x509_certificate(request.chain[0])
        entry = self.authority.entitled(leaf)
        if entry["spiffe_id"] != request.peer:
            raise IdentityError("the certificate is not that of the handshake.", reason="renew.unknown")
        return request.peer, leaf, entry

    def _handed(self, issued: Issued) -> Reply:
        content = {
            "spiffe_id": issued.spiffe_id,
            "not_after": issued.not_after,
            "chain": issued.chain.decode(),
            "bundle": issued.bundle.decode(),
            "crl": self.authority.crl.decode(),
        }
        return Reply(200, json.dumps(content).encode())

    def _bundle(self, request: Request) -> Reply:
        roots = x509.load_pem_x509_certificates(self.authority.bundle)
        ders = tuple(root.public_bytes(Encoding.DER) for root in roots)
        jwt = self._keys.jwks if self._keys.exists else b""
        sequence = self.authority.sequence(jwt)
        made = bundles.Bundle(ders, jwt or NO_KEYS, sequence, REFRESH_HINT)
        return Reply(200, bundles.format(made))


class Flood:
    """Refusals in the audit log: so many lines of a kind in a minute and a day, and a count of the rest."""

    def __init__(self, authority: CertificateAuthority, clock: Callable[[], float] = time.monotonic) -> None:
        self._authority = authority
        self._clock = clock
        self._until = clock() + _MINUTE
        self._day = clock() + _DAY
        # By kind, which is the first word of the reason: the ones can't take the place of the others.
        self._written: Counter[str] = Counter()
        self._written_today: Counter[str] = Counter()
        self._proved: set[tuple[str, str, str]] = set()
        self._beyond: Counter[str] = Counter()

    def refuse(self, reason: str, **facts: str) -> None:
        self.settle()
        kind = reason.split(".", maxsplit=1)[0]
        # What is said names the token or the certificate.
        proof = (reason, facts.get("why", ""), network_of(facts.get("source", "")))
        if reason in _PROVED and proof not in self._proved and len(self._proved) < _MOST_PROVED:
            self._proved.add(proof)
        elif self._written[kind] >= _LINES or self._written_today[kind] >= _LINES_A_DAY:
            self._beyond[kind] += 1
            return
        else:
            self._written[kind] += 1
            self._written_today[kind] += 1
        kept = {name: value[:300] for name, value in facts.items() if value}
        event = "token.refused" if reason.startswith("token.") else "refusal"
        try:
            self._authority.note(event, reason=reason, **kept)
        except OSError:
            log.exception("a refusal (%s) can't be written to the audit log", reason)

    def settle(self) -> None:
        """Tell what was counted, once its minute is over."""
        now = self._clock()
        if now < self._until:
            return
        beyond, self._beyond = self._beyond, Counter()
        self._until, self._written = now + _MINUTE, Counter()
        if now >= self._day:
            self._day, self._written_today, self._proved = now + _DAY, Counter(), set()
        if beyond:
            self._authority.note("refusal.many", count=beyond.total(), reasons=dict(sorted(beyond.items())))


def network_of(source: str) -> str:
    """What counts as one sender: an IPv4 address, and of IPv6 the /64 that everybody gets to choose addresses from."""
    try:
        address = ipaddress.ip_address(source.partition("%")[0])
    except ValueError:
        return source
    if isinstance(address, ipaddress.IPv4Address):
        return str(address)
    if address.ipv4_mapped is not None:
        return str(address.ipv4_mapped)
    return str(ipaddress.IPv6Network((address, 64), strict=False))


def problem(status: int, reason: str, detail: str, hint: str) -> Reply:
    """A refusal, by RFC 9457."""
    content = {"type": "about:blank", "status": status, "reason": reason, "detail": detail, "hint": hint}
    return Reply(status, json.dumps(content).encode(), _PROBLEM)


def _members(body: bytes, *names: str) -> list[str]:
    """The texts of a JSON object that has exactly these members."""
    content = _parsed(body)
    if (
        not isinstance(content, dict)
        or content.keys() != set(names)
        or not all(isinstance(each, str) for each in content.values())
    ):
        raise IdentityError(
            f"the body must be a JSON object with {' and '.join(names)}, as texts.",
            hint="`meshlib ca enroll` sends it so.",
            reason="http.body",
        )
    return [content[name] for name in names]


def _audiences(body: bytes) -> list[str]:
    """Those of a JSON object that holds nothing else. What they may be, the key says that signs."""
    content = _parsed(body)
    found = content["audience"] if isinstance(content, dict) and content.keys() == {"audience"} else None
    if not isinstance(found, list) or not all(isinstance(each, str) for each in found):
        raise IdentityError(
            "the body must be a JSON object with audience, a list of texts.",
            hint='Such as {"audience": ["spiffe://shop.internal/ns/default/sa/orders"]}.',
            reason="http.body",
        )
    return found


def _parsed(body: bytes) -> Any:
    try:
        return json.loads(body, object_pairs_hook=_once)
    except (ValueError, RecursionError):
        return None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a member stands twice")
    return found
