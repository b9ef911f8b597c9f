"""How does a service get its identity from a CA on another machine, and keep it while it runs?

    first        the key is made here, and a one-use token buys its certificate (`meshlib ca token`, on the CA's machine)
    then         at half of the certificate's life, give or take a tenth of that, a new key is made here and certified
                 over mTLS, which the present certificate opens
    meanwhile    every five minutes or so, roots and revocations are asked for
    a restart    what isn't due to be renewed is in force at once; roots and revocations are asked for with the next look, which is now
    afterwards   a machine that was off until its certificate had expired can't renew: nobody vouches for it any more. It
                 takes another token; one that is put into the token's place is found by itself, within a minute

Everything is kept in `state`/<service>, in the same files that `meshlib ca issue` writes (`kept.py`), and is judged when
it is read like they are: so any process of this machine can stand up with it, while the CA is unreachable too. Processes
that share the folder take turns: one renews, the others find new files. When they start together with one token, one
enrols, and the others wait for it.

What fails is tried again after a second, then after twice as long each time, up to five minutes; the present identity
goes on, with a note that says what is wrong. What can't be written is used from memory, and written when it can be. An
identity that the CA says it has revoked is given up at once. When the leaf is of a root that is on its way out, it's
renewed within a minute, not at half of its life.

It starts no thread: the store asks it on one, when `refresh_at` says.
"""

from __future__ import annotations

import hashlib
import json
import logging
import random
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, NamedTuple

from cryptography import x509

from ..errors import IdentityError, IdentityWithdrawn, KeyFileError, MeshError
from . import certificates, csr, exchange, files
from .files import Secret
from .folder import FolderSource
from .identity import Identity, renewal_of
from .kept import Kept
from .proof import Parts, prove
from .tokens import Token

log = logging.getLogger("meshlib.secure")

FIRST_PAUSE: Final = 1.0
LONGEST_PAUSE: Final = 300.0
TRUST_EVERY: Final = 300.0
LOOK_EVERY: Final = 30.0
SOON: Final = 60.0
# How long a process without an identity waits for another one that is enrolling: longer than that may take.
PATIENCE: Final = 15.0

_JITTER: Final = 0.1


class Line(NamedTuple):
    """How the CA is asked; exchanged in tests."""

    first_roots: Callable[[exchange.Place, Token], bytes] = exchange.first_roots
    ask: Callable[..., bytes] = exchange.ask


class EnrolledSource:
    """The identity of a service that a CA on another machine vouches for.

    `url` is that of `meshlib ca serve`, `token` the file with the one-use token, which is removed when it was used.
    """

    def __init__(
        self,
        url: str,
        state: str | Path,
        service: str,
        trust_domain: str,
        spiffe_id: str,
        *,
        token: str | Path | None = None,
        wall_clock: Callable[[], float] = time.time,
        chance: Callable[[], float] = random.random,
        line: Line = Line(),  # noqa: B008 - immutable
    ) -> None:
        self.place = exchange.Place.of(url, trust_domain)
        self.service = service
        self.spiffe_id = spiffe_id
        self.path = Path(state) / service
        self._kept = Kept(self.path)
        self.failures = 0
        # Where the token lies, and what counts of it while the CA is asked: another thread may name another place meanwhile.
        self.token = token
        self._token: Path | None = None
        self._wall_clock = wall_clock
        self._chance = chance
        self._line = line
        self._source = FolderSource(state, service, trust_domain, spiffe_id, wall_clock=wall_clock)
        # By serial number: when it is due, and the one that the CA has taken back.
        self._renewals: dict[str, float] = {}
        self._withdrawn = ""
        self._refused: dict[bytes, MeshError] = {}  # by the hash of a token that will never be good again
        self._trust_due = 0.0
        self._has_answered = False
        self._pause = _Pause(chance)

    # ------------------------------------------------------------------------------------------------ for the store

    def load(self) -> Identity:
        """The identity now; asks the CA where that is due, for a few seconds at most."""
        files.make_private(self.path)
        self._token = None if self.token is None else Path(self.token)
        now = self._wall_clock()
        self._kept.write_down()
        found, missing = self._present(now)
        has_answered, self._has_answered = self._has_answered, True
        token, hindrance = self._token_text()
        # A process that begins has it at once, also while the CA is silent, when every question takes seconds. That for roots and
        # revocations is left to the next look, which is due now: `refresh_at` says so. A renewal isn't left to processes that live longer.
        is_settled = not has_answered and token is None and found is not None and self._is_settled(found, now)
        try:
            if not is_settled and self._pause.is_over(now):
                found = self._asked(found, token, now)
                self._pause.forget()
        except (MeshError, OSError) as error:
            self._failed(error, now)
        problem = self._pause.problem or hindrance
        if found is None:
            raise problem or missing or self._not_enrolled("there is no identity yet.")
        if found.serial == self._withdrawn:
            raise IdentityWithdrawn(
                f"the CA has revoked the certificate {found.serial} of {self.service}.",
                hint=f"If it may go on: {self._way_out}" + (f" ({problem.message})" if problem else ""),
            )
        notes = [] if problem is None else [f"the CA's service could not be used: {problem}"]
        if self._kept.trouble:
            notes.append(self._kept.trouble)
        return replace(found, notes=(*found.notes, *notes)) if notes else found

    def enroll(self) -> Identity:
        """Use the token now; raises what goes wrong, whatever there was before."""
        files.make_private(self.path)
        self._token = None if self.token is None else Path(self.token)
        with self._kept.turn() as is_ours:
            if not is_ours:
                raise IdentityError(f"another process is enrolling {self.service} in {self.path}.", hint="Try again.")
            token, hindrance = self._token_text()
            if token is None:
                raise hindrance or self._not_enrolled(f"there is no token in {self._token}.")
            return self._enrol(token)

    def refresh_at(self, identity: Identity, now: float) -> float:
        """When there is something to do again. Unix seconds."""
        if self._pause.problem is not None:
            return min(self._pause.until, now + LOOK_EVERY)
        return min(self.renewal_at(identity), self._trust_due, now + LOOK_EVERY)

    def renewal_at(self, identity: Identity) -> float:
        """When the certificate is due to be renewed. Unix seconds."""
        if identity.serial not in self._renewals:
            # The life begins with the issue: what lies before is there for slow clocks, and isn't life.
            issued = replace(identity, not_before=identity.not_before + certificates.SKEW)
            due = renewal_of(issued, self._chance)
            if not _is_by_first_root(identity):
                due = min(due, self._wall_clock() + SOON * self._chance())
            self._renewals = {identity.serial: due}
        return self._renewals[identity.serial]

    def __repr__(self) -> str:
        return f"<EnrolledSource of {self.spiffe_id} at {self.place.address}>"

    # ------------------------------------------------------------------------------------------------ what there is

    @property
    def _way_out(self) -> str:
        return f"`meshlib ca token … {self.service}` on the CA's machine, and put the token into {self._token or 'a file here'}."

    def _not_enrolled(self, text: str, reason: str = "enroll.none") -> IdentityError:
        return IdentityError(text, hint=f"Make another token: {self._way_out}", reason=reason)

    def _present(self, now: float) -> tuple[Identity | None, MeshError | None]:
        """The identity in the folder, or why there is none that counts."""
        try:
            found = self._kept.held or self._read(now)
        except IdentityWithdrawn:
            raise
        except IdentityError as error:
            return None, error
        if now >= found.not_after:
            return None, self._not_enrolled(f"the certificate of {self.service} has expired.", "renew.expired")
        if found.serial in _revoked_in(found):
            self._withdrawn = found.serial
        return found, None

    def _read(self, now: float) -> Identity:
        end = self._kept.end
        if end is None:
            raise self._not_enrolled(f"{self.service} is not enrolled: there is no certificate in {self.path}.")
        if now >= end.timestamp():
            text = f"the certificate of {self.service} expired at {end:%Y-%m-%d %H:%M:%S} UTC; only a valid one can be renewed."
            raise self._not_enrolled(text, "renew.expired")
        return self._source.load()

    def _token_text(self) -> tuple[Secret | None, MeshError | None]:
        """What stands in the token's file, or why it is no good: the CA has refused it already, say."""
        if self._token is None:
            return None, None
        where = self._token.parent
        try:
            if not self._token.exists():
                return None, None
            with files.folder(where) as fd:
                text = files.read_secret(fd, where, self._token.name, may_group=True)
        except (KeyFileError, OSError) as error:
            problem = (
                error if isinstance(error, KeyFileError) else KeyFileError(f"{self._token}: {error}.", hint="May we read it?")
            )
            return None, problem
        refused = self._refused.get(_hash(text))
        return (text, None) if refused is None else (None, refused)

    # ------------------------------------------------------------------------------------------------ what is due

    def _asked(self, found: Identity | None, token: Secret | None, now: float) -> Identity | None:
        """Whatever is due, and the identity afterwards."""
        if token is not None:
            return self._first(found, now)
        if found is None:
            # Between our two looks another process may have enrolled, and taken the token away.
            found = self._present(now)[0]
        if found is None or found.serial == self._withdrawn:
            return found
        if not now < self._trust_due < now + 2 * TRUST_EVERY:  # later than that: the clock was set back
            with self._kept.turn() as is_ours:
                found = self._trust(self._newest(found, now)) if is_ours else found
        if found.serial != self._withdrawn and now >= self.renewal_at(found):
            with self._kept.turn() as is_ours:
                newest = self._newest(found, now)
                # Another process may have been quicker.
                found = self._renew(found) if is_ours and newest.serial == found.serial else newest
        return found

    def _is_settled(self, found: Identity, now: float) -> bool:
        return found.serial != self._withdrawn and now < self.renewal_at(found)

    def _first(self, found: Identity | None, now: float) -> Identity | None:
        """Use the token, or find what another process has bought with it."""
        with self._kept.turn(PATIENCE if found is None else 0.0) as is_ours:
            if not is_ours and found is None:
                raise IdentityError(
                    f"another process has been enrolling {self.service} in {self.path} for {PATIENCE:g} s.",
                    hint="Does it hang? It is tried again.",
                )
            if not is_ours:
                return found
            self._kept.write_down()
            newest, (token, _) = self._present(now)[0], self._token_text()
            if token is None or (found is None and newest is not None):
                return newest or found
            return self._enrol(token)

    def _newest(self, found: Identity, now: float) -> Identity:
        return self._present(now)[0] or found

    def _enrol(self, text: Secret) -> Identity:
        try:
            token = Token.parse(bytes(text).decode("utf-8", "replace"))
            if token.spiffe_id != self.spiffe_id:
                raise IdentityError(
                    f"the token is for {token.spiffe_id}, and this service is {self.spiffe_id}.",
                    hint=f"Make one for it: `meshlib ca token … {self.service}` (and --namespace).",
                    reason="token.identity",
                )
            roots = self._line.first_roots(self.place, token)
            key = certificates.new_key()
            content = {"token": bytes(token.proof).decode(), "csr": csr.new_request(key, self.spiffe_id).decode()}
            answer = self._line.ask(self.place, roots, "POST", "/v1/enroll", content)
        except IdentityError as error:
            if error.reason.startswith("token."):
                self._refused = {_hash(text): error.with_traceback(None)}
            raise
        identity = self._won(answer, certificates.key_pem(key))
        assert self._token is not None
        try:
            files.remove(self._token.parent, self._token.name)
        except (OSError, KeyFileError) as error:
            spent = IdentityError(f"the token in {self._token} was used and can't be removed: {error}.", hint="Take it away.")
            self._refused = {_hash(text): spent}
        log.info("enrolled as %s, serial %s", identity.spiffe_id, identity.serial)
        return identity

    def _renew(self, present: Identity) -> Identity:
        key = certificates.new_key()
        content = {"csr": csr.new_request(key, self.spiffe_id).decode()}
        roots = present.bundles[present.trust_domain]
        try:
            answer = self._line.ask(self.place, roots, "POST", "/v1/renew", content, pair=(present.chain, present.key))
        except IdentityError as error:
            if error.reason == "renew.revoked":
                self._withdrawn = present.serial
            raise
        return self._won(answer, certificates.key_pem(key))

    def _trust(self, present: Identity) -> Identity:
        """The roots and revocations of now, beside the pair that we have."""
        roots = present.bundles[present.trust_domain]
        bundle = self._line.ask(self.place, roots, "GET", "/v1/roots")
        crl = self._line.ask(self.place, roots, "GET", "/v1/crl")
        proved = prove(Parts(present.chain, Secret(present.key), bundle, crl), self.spiffe_id, self._wall_clock(), last=present)
        lists = proved.crls.get(proved.trust_domain, b"")
        if (proved.bundles, lists) != (present.bundles, present.crls.get(present.trust_domain, b"")):
            self._renewals.clear()  # a root that is to go makes it due sooner
            self._kept.put_trust(proved, bundle, lists)
        self._trust_due = self._next_trust()
        found, missing = self._present(self._wall_clock())
        if found is None:
            raise missing or self._not_enrolled("there is no identity any more.")
        return found

    def _next_trust(self) -> float:
        return self._wall_clock() + TRUST_EVERY * (1.0 + _JITTER * (2.0 * self._chance() - 1.0))

    def _won(self, answer: bytes, key: bytes) -> Identity:
        """Judge what the CA handed out, and put it into force; what is no good changes nothing."""
        try:
            content = json.loads(answer)
            chain, bundle, crl = (content[name].encode() for name in ("chain", "bundle", "crl"))
        except (ValueError, TypeError, KeyError, AttributeError):
            raise IdentityError("the CA's answer can't be read.", hint="Is it a meshlib of another version?") from None
        proved = prove(Parts(chain, Secret(key), bundle, crl), self.spiffe_id, self._wall_clock())
        if not certificates.is_anchored(x509.load_pem_x509_certificates(chain), x509.load_pem_x509_certificates(bundle)):
            raise IdentityError(
                "the CA handed out a certificate that none of its roots stands for.", hint="Look at the CA's log."
            )
        self._kept.put(proved, key, bundle, crl)
        self._withdrawn, self._trust_due = "", self._next_trust()
        return self._kept.held or self._source.load()

    def _failed(self, error: MeshError | OSError, now: float) -> None:
        self.failures += 1
        problem = error if isinstance(error, MeshError) else IdentityError(f"{error}.", hint="Look at the state folder.")
        before = self._pause.problem
        self._pause.begin(problem.with_traceback(None), now)
        if str(before) != str(problem):
            log.warning("the CA's service can't be used for %s: %s", self.spiffe_id, problem)


class _Pause:
    """How long to wait after failures, and the last of them."""

    __slots__ = ("_chance", "_tries", "problem", "until")

    def __init__(self, chance: Callable[[], float]) -> None:
        self._chance = chance
        self.until = 0.0
        self.problem: MeshError | None = None
        self._tries = 0

    def begin(self, problem: MeshError, now: float) -> None:
        pause = min(LONGEST_PAUSE, FIRST_PAUSE * 2.0 ** min(self._tries, 30))
        self.until = now + pause * (0.5 + self._chance() / 2)
        self.problem = problem
        self._tries += 1

    def is_over(self, now: float) -> bool:
        """Also when the clock was set back: a pause is never longer than the longest."""
        return now >= self.until or self.until - now > LONGEST_PAUSE

    def forget(self) -> None:
        self.until, self.problem, self._tries = 0.0, None, 0


def _hash(text: bytes) -> bytes:
    return hashlib.sha256(text).digest()


def _revoked_in(identity: Identity) -> set[str]:
    lists: list[Any] = certificates.crls_of(identity.crls.get(identity.trust_domain, b""))
    return {certificates.serial_text(entry.serial_number) for each in lists for entry in each}


def _is_by_first_root(identity: Identity) -> bool:
    """Does the root stand for us under which the CA signs now? It is the first of the bundle."""
    roots = x509.load_pem_x509_certificates(identity.bundles[identity.trust_domain])
    return certificates.is_anchored(x509.load_pem_x509_certificates(identity.chain), roots[:1])
