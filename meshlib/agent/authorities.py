"""Who vouches for the services of this node, and how is that one asked?

    agent: {ca: folder}         `Embedded`: the CA's folder lies on this machine. It signs here, and every key stays in memory
    agent: {enrol: https://…}   `Enrolled`: `meshlib ca serve` on another machine. Each service enrols with its one-use token, and
                                what it wins is kept under the agent's state (`meshlib.secure.enrol`)

Both give the same: a source of the identity of each service, the roots and the keys for tokens of the trust domain, and a JWT-SVID for
who already has an identity. Nothing is issued on doubt: for an ID that was taken back nothing is signed until somebody issues to it
anew on the CA's side (`meshlib ca issue`, `meshlib ca token`), which is how one says that it is trusted again.

What fails raises; who keeps the last good, and for how long, is `issue.py`'s. All of it may block, and none of it runs on the loop.
"""

from __future__ import annotations

import json
import logging
import math
import random
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, Protocol

from ..errors import IdentityError, IdentityWithdrawn, KeyFileError, MeshError, TrustDomainError
from ..secure import bundle as bundles
from ..secure import certificates, exchange, files
from ..secure.ca import CertificateAuthority, Issued
from ..secure.enrol import EnrolledSource
from ..secure.files import Secret
from ..secure.identity import Identity, IdentitySource, renewal_of
from ..secure.jwt_svid import Handed, TokenKeys, handed_out, jwks, kid_of, kids_of
from ..secure.proof import Parts, prove

log = logging.getLogger("meshlib.agent")

# Seconds between two looks at the CA's folder: what was revoked is gone from this node within that.
LOOK: Final = 1.0
# And at an identity that isn't due.
LOOK_EVERY: Final = 30.0
# After a failure it is tried again after a second, then after twice as long each time, up to this.
LONGEST_PAUSE: Final = 60.0
# Seconds between two questions for the keys of tokens, and a share of that by which agents spread. Where a token names a key that
# isn't known, between two questions at least.
KEYS_EVERY: Final = 300.0
SEEK_EVERY: Final = 5.0
JITTER: Final = 0.1


class Authority(Protocol):
    """Who vouches. `trouble` says what isn't well about it, "" if nothing."""

    trust_domain: str

    @property
    def trouble(self) -> str: ...
    @property
    def version(self) -> object:
        """Another object when every identity is to be looked at: roots, revocations or the issuer changed."""
        ...

    @property
    def bundle(self) -> bytes:
        """The roots of the trust domain as PEM, as far as they are known without an identity."""
        ...

    @property
    def token_keys(self) -> bytes:
        """The JWK set by which tokens of the trust domain are verified; b"" while nobody has told it."""
        ...

    def check(self) -> None:
        """Raise what would keep it from vouching at all."""
        ...

    def source_of(self, service: str, spiffe_id: str, token: Path | None) -> IdentitySource: ...

    def hand(self, source: IdentitySource, token: Path | None) -> None:
        """Another token, or none any more, for one of its sources."""
        ...

    def look(self, own: Identity | None) -> None:
        """Whatever is due that belongs to no single identity. `own`: one that may be shown to the CA."""
        ...

    @property
    def looked(self) -> float:
        """When the last look that succeeded began, by its own clock; -inf if there was none."""
        ...

    def seek(self) -> float:
        """The key of a token isn't known: look again soon, though no more than each few seconds. Answers the clock's time."""
        ...

    def jwt(self, identity: Identity, service: str, audiences: Sequence[str]) -> Handed: ...

    def close(self) -> None:
        """Leave nothing behind that is for this process only."""
        ...


# ---------------------------------------------------------------------------------------------------- a folder of this machine


@dataclass(frozen=True, slots=True)
class Known:
    """What the CA's folder says now."""

    bundle: bytes = field(repr=False)
    signer: str
    crl: bytes = field(repr=False)
    token_keys: bytes = field(repr=False)


class Embedded:
    """The CA in a folder of this machine. `life` is that of the certificates."""

    def __init__(
        self,
        folder: Path,
        trust_domain: str,
        namespace: str,
        life: float,
        *,
        wall_clock: Callable[[], float] = time.time,
        clock: Callable[[], float] = time.monotonic,
        chance: Callable[[], float] = random.random,
    ) -> None:
        self.trust_domain = trust_domain
        self.life = life
        self.wall_clock = wall_clock
        self.chance = chance
        self._folder = folder
        self._namespace = namespace
        self._clock = clock
        self._lock = threading.Lock()
        self._authority: CertificateAuthority | None = None
        self._known: Known | None = None
        self._due = 0.0
        self.looked = -math.inf
        self.trouble = ""

    @property
    def version(self) -> object:
        return self._known

    @property
    def bundle(self) -> bytes:
        return self._known.bundle if self._known is not None else b""

    @property
    def token_keys(self) -> bytes:
        return self._known.token_keys if self._known is not None else b""

    def check(self) -> None:
        self.known()
        # Now, and not with the first token: whoever is shown one must have heard of its key.
        TokenKeys(self._folder).create()
        with self._lock:
            self._due = 0.0
        self.known()

    def source_of(self, service: str, spiffe_id: str, token: Path | None) -> IdentitySource:
        return EmbeddedSource(self, service, spiffe_id)

    def hand(self, source: IdentitySource, token: Path | None) -> None:
        """Who may sign needs none."""

    def look(self, own: Identity | None) -> None:
        self.known()

    def known(self) -> Known:
        """What the folder says, no older than `LOOK`: one look for all services."""
        with self._lock:
            known, now = self._known, self._clock()
            if known is not None and now < self._due:
                return known
            try:
                authority = self._opened()
                with authority.alone():
                    crl = authority.crl if authority.has_revoked else b""
                    known = Known(authority.bundle, authority.signer, crl, TokenKeys(self._folder).jwks)
            except (MeshError, OSError) as error:
                self.trouble = f"the CA's folder can't be used: {error}"
                raise
            if known != self._known or self.trouble:
                self._known = known
            self.trouble, self.looked = "", now
            self._due = self._clock() + LOOK
            return self._known or known

    def seek(self) -> float:
        """The folder is looked at all the time."""
        return self._clock()

    def issue(self, service: str, spiffe_id: str) -> Issued:
        """A new certificate, unless the last word about this ID was that it was taken back."""
        authority = self._opened()
        with authority.alone():
            self._refuse_withdrawn(authority, spiffe_id)
            return authority.issue(service, self.life, self._namespace, spiffe_id=spiffe_id)

    def jwt(self, identity: Identity, service: str, audiences: Sequence[str]) -> Handed:
        authority = self._opened()
        with authority.alone():
            self._refuse_withdrawn(authority, identity.spiffe_id)
        handed = handed_out(authority, service, identity.spiffe_id, audiences, by="agent", serial=identity.serial)
        with self._lock:
            self._due = 0.0  # where the keys were taken away, the token has made another one
        return handed

    def close(self) -> None:
        """Keys were in memory only."""

    def _opened(self) -> CertificateAuthority:
        if self._authority is None:
            authority = CertificateAuthority.open(self._folder, clock=self.wall_clock)
            if authority.trust_domain != self.trust_domain:
                raise TrustDomainError(
                    f"the CA in {self._folder} is that of {authority.trust_domain}, and the mesh is {self.trust_domain}.",
                    hint="Name the right folder (agent.ca), or the right secure.trust_domain.",
                )
            self._authority = authority
        return self._authority

    def _refuse_withdrawn(self, authority: CertificateAuthority, spiffe_id: str) -> None:
        withdrawn = authority.withdrawn(spiffe_id)
        if withdrawn is not None:
            raise IdentityWithdrawn(
                f"{spiffe_id} was revoked, and nobody has issued to it since.",
                hint=f"If it may go on: meshlib ca issue {self._folder} {withdrawn['service']}, which trusts it again.",
            )


class EmbeddedSource:
    """The identity of one service, signed on this machine. Its keys are made here, live in memory, and are written nowhere."""

    def __init__(self, authority: Embedded, service: str, spiffe_id: str) -> None:
        self.service = service
        self.spiffe_id = spiffe_id
        self._authority = authority
        self._held: Identity | None = None
        self._signer = ""
        self._due = 0.0
        # After failures: when it is tried again, how often it failed, and why.
        self._until, self._tries = 0.0, 0
        self._problem: MeshError | OSError | None = None

    def load(self) -> Identity:
        now = self._authority.wall_clock()
        try:
            known = self._authority.known()
            self._trust(known, now)
        except IdentityWithdrawn:
            self._held = None
            raise
        except (MeshError, OSError) as error:
            return self._last(now, error)
        if not self._is_due(known, now) or self._is_pausing(now):
            return self._last(now, self._problem)
        try:
            self._issue(known, now)
        except IdentityWithdrawn:
            self._held = None
            raise
        except (MeshError, OSError) as error:
            self._fail(error, now)
        return self._last(now, self._problem)

    def refresh_at(self, identity: Identity, now: float) -> float:
        """What changes for all is noticed once for all (`Authority.version`)."""
        due = self._until if self._problem is not None else self._due
        return min(max(due, now + LOOK), now + LOOK_EVERY)

    def __repr__(self) -> str:
        return f"<EmbeddedSource of {self.spiffe_id}>"

    def _last(self, now: float, problem: MeshError | OSError | None) -> Identity:
        """The last good one, with a note where another one can't be had; without one, the problem is raised."""
        held = self._held
        if held is None or now >= held.not_after:
            raise problem or IdentityError(f"the certificate of {self.spiffe_id} has ended.", hint="Another one is on its way.")
        if problem is None:
            return held
        return replace(held, notes=(*held.notes, f"no new certificate can be had: {problem}"))

    def _is_due(self, known: Known, now: float) -> bool:
        return self._held is None or now >= self._due or now < self._held.not_before or self._signer != known.signer

    def _is_pausing(self, now: float) -> bool:
        return self._problem is not None and now < self._until <= now + LONGEST_PAUSE  # later than that: the clock was set back

    def _trust(self, known: Known, now: float) -> None:
        """The roots and revocations of now count, whatever becomes of the pair."""
        held = self._held
        if held is None or now >= held.not_after:
            return
        if _revokes(known.crl, held.serial):
            self._held, self._problem = None, None
        elif (held.bundles.get(held.trust_domain), held.crls.get(held.trust_domain, b"")) != (known.bundle, known.crl):
            self._held = prove(Parts(held.chain, Secret(held.key), known.bundle, known.crl), self.spiffe_id, now, last=held)

    def _issue(self, known: Known, now: float) -> None:
        issued = self._authority.issue(self.service, self.spiffe_id)
        proved = prove(Parts(issued.chain, Secret(issued.key), issued.bundle, issued.crl), self.spiffe_id, now, last=self._held)
        # The life begins with the issue: what lies before is there for slow clocks, and isn't life.
        begun = replace(proved, not_before=min(proved.not_before + certificates.SKEW, now))
        self._held, self._signer = proved, known.signer
        self._due = renewal_of(begun, self._authority.chance)
        self._problem, self._tries, self._until = None, 0, 0.0

    def _fail(self, error: MeshError | OSError, now: float) -> None:
        pause = min(LONGEST_PAUSE, 2.0 ** min(self._tries, 30))
        self._until = now + pause * (0.5 + self._authority.chance() / 2)
        self._tries += 1
        self._problem = error.with_traceback(None)


def _revokes(crl: bytes, serial: str) -> bool:
    return any(serial == certificates.serial_text(entry.serial_number) for each in certificates.crls_of(crl) for entry in each)


# ---------------------------------------------------------------------------------------------------- a CA on another machine


class Enrolled:
    """A CA that answers at a URL. Where the state folder can't be written, what is won is kept until this machine is started anew."""

    def __init__(
        self,
        url: str,
        state: Path,
        trust_domain: str,
        *,
        wall_clock: Callable[[], float] = time.time,
        clock: Callable[[], float] = time.monotonic,
        chance: Callable[[], float] = random.random,
        ask: Callable[..., bytes] = exchange.ask,
    ) -> None:
        self.trust_domain = trust_domain
        self._url = url
        self._place = exchange.Place.of(url, trust_domain)
        self._state = state
        self._wall_clock = wall_clock
        self._clock = clock
        self._chance = chance
        self._ask = ask
        self._bundle: bundles.Bundle | None = None
        self._due = 0.0
        self._asked = -math.inf
        self.looked = -math.inf
        self._tries = 0
        self._problem = ""
        self._unwritten = ""
        self._states: list[Path] = []  # those that end with the process

    @property
    def trouble(self) -> str:
        return self._unwritten or self._problem

    @property
    def version(self) -> object:
        """Each source asks for itself."""
        return None

    @property
    def bundle(self) -> bytes:
        return self._bundle.pem if self._bundle is not None else b""

    @property
    def token_keys(self) -> bytes:
        return self._bundle.jwt if self._bundle is not None else b""

    def check(self) -> None:
        """Nothing can be known before it is asked: a CA that is away is no reason not to start with what was won before."""

    def source_of(self, service: str, spiffe_id: str, token: Path | None) -> IdentitySource:
        state = self._writable(service)
        return EnrolledSource(self._url, state, service, self.trust_domain, spiffe_id, token=token, wall_clock=self._wall_clock)

    def hand(self, source: IdentitySource, token: Path | None) -> None:
        if isinstance(source, EnrolledSource):
            source.token = token

    def look(self, own: Identity | None) -> None:
        """Ask for the keys of tokens, where that is due."""
        now = self._clock()
        if own is None or now < self._due:
            return
        self._asked = now
        roots = own.bundles.get(self.trust_domain, b"")
        try:
            found = bundles.parse_json(self._ask(self._place, roots, "GET", "/v1/bundle"), self.trust_domain)
            if self._bundle is not None and not found.supersedes(self._bundle):
                raise IdentityError(
                    f"its sequence went back from {self._bundle.sequence} to {found.sequence}.",
                    hint="Was the CA restored from a backup? Then restart the agent.",
                )
        except (MeshError, OSError) as error:
            self._problem = f"the keys for tokens can't be had from the CA: {error}"
            self._due = now + min(KEYS_EVERY, 2.0 ** min(self._tries, 30)) * (0.5 + self._chance() / 2)
            self._tries += 1
            raise
        self._bundle, self._problem, self._tries, self.looked = found, "", 0, now
        self._due = now + KEYS_EVERY * (1.0 + JITTER * (2.0 * self._chance() - 1.0))

    def seek(self) -> float:
        now = self._clock()
        self._due = min(self._due, self._asked + SEEK_EVERY)
        return now

    def jwt(self, identity: Identity, service: str, audiences: Sequence[str]) -> Handed:
        roots = identity.bundles.get(self.trust_domain, b"")
        pair = (identity.chain, identity.key)
        answer = self._ask(self._place, roots, "POST", "/v1/jwt", {"audience": list(audiences)}, pair=pair)
        try:
            content: dict[str, Any] = json.loads(answer)
            handed = Handed(str(content["token"]), str(content["spiffe_id"]), float(content["not_after"]))
        except (ValueError, TypeError, KeyError):
            raise IdentityError("the CA's answer can't be read.", hint="Is it a meshlib of another version?") from None
        if handed.spiffe_id != identity.spiffe_id:
            raise IdentityError("the CA's token is for somebody else.", hint="Look at the CA's log.")
        if kid_of(handed.text) not in kids_of(self.token_keys):
            self._due = 0.0  # by a key that we have not heard of
        return handed

    def close(self) -> None:
        for state in self._states:
            shutil.rmtree(state, ignore_errors=True)

    def _writable(self, service: str) -> Path:
        """The state folder, or where it can't be used one that ends with this machine."""
        try:
            files.make_private(self._state / service)
        except KeyFileError as error:
            shared = Path("/dev/shm")  # noqa: S108 - memory; the folder in it is ours alone
            state = Path(tempfile.mkdtemp(prefix="meshlib-agent-", dir=shared if shared.is_dir() else None))
            self._states.append(state)
            self._unwritten = f"the identities can't be kept in {self._state}, and end with this process: {error}"
            log.error("%s", self._unwritten)
            return state
        return self._state


NO_KEYS: Final = jwks([])
