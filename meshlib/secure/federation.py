"""Whom of other trust domains do we believe, and how do we hear that it changed?

For each foreign trust domain that the configuration names, one bundle: from a file, which is looked at each second, or from
a bundle endpoint (SPIFFE Federation), which is asked as often as the bundle says (`spiffe_refresh_hint`, at most once a
minute) or the configuration, whichever is more often, and every 5 minutes if neither says anything. A fetch that failed is
tried again when the next one is due, and not sooner: a whole fleet that hammers on an endpoint keeps it down. A bundle whose
sequence goes back is a replay, and refused.

What was good stays in force until something better comes, and its age is told: the keys of a partner don't become wrong
because his server is down. Before the first good bundle nobody of that trust domain is believed. Bundles are kept apart by
the trust domain under which they are *configured*, since none is written in them, and none is inferred from a URL.

How an endpoint is reached and proves who it is, is `endpoint.py`'s. Nothing is written to disk: the file beside a URL is where
the next process begins.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol

from ..errors import ConfigError, IdentityError, MeshError
from ..keeper import apart
from . import bundle as bundles_
from . import certificates, endpoint, fetch, files
from .identity import digest_of

if TYPE_CHECKING:
    from ..keeper import Job, Keeper

log = logging.getLogger("meshlib.secure")

# Seconds between two looks at a file, and between two questions to an endpoint: where nobody says it; at least, by the bundle's hint
# and by the configuration; and at most (a hint may be a month, and a key that was stolen should be gone sooner).
LOOK: Final = 1.0
EVERY: Final = 300.0
SHORTEST: Final = 60.0
EAGER: Final = 10.0
LONGEST: Final = 86400.0
JITTER: Final = 0.1
# After how many intervals without a good answer a bundle is called stale.
STALE: Final = 3

WEB, SPIFFE = "https_web", "https_spiffe"


class Relation(Protocol):
    """One entry of `federation:` in mesh.yaml. With `can_be_local` true, its endpoint may be on this machine."""

    @property
    def trust_domain(self) -> str: ...
    @property
    def file(self) -> Path | None: ...
    @property
    def url(self) -> str | None: ...
    @property
    def profile(self) -> str | None: ...
    @property
    def spiffe_id(self) -> str | None: ...
    @property
    def every(self) -> float | None: ...


class Federated(Protocol):
    """The part of a configuration that is asked."""

    @property
    def trust_domain(self) -> str: ...
    @property
    def federation(self) -> Iterable[Relation]: ...


def flaw_of(relation: Relation, own: str) -> str:
    """What is wrong with an entry of the configuration; "" if nothing is."""
    name, profile = relation.trust_domain, relation.profile
    if flaw := bundles_.flaw_of_trust_domain(name):
        return flaw
    if name == own:
        return "it is our own trust domain, whose bundle comes with our identity"
    if relation.url is None:
        if relation.file is None:
            return "it needs a file or a url"
        return (
            "profile, spiffe_id and every go with a url" if (profile, relation.spiffe_id, relation.every) != (None,) * 3 else ""
        )
    if flaw := fetch.flaw_of(relation.url):
        return f"of the url, {flaw}"
    if profile not in {WEB, SPIFFE}:
        return f"profile must be {WEB} or {SPIFFE}: how the endpoint proves who it is, is never guessed"
    if profile == WEB:
        return f"spiffe_id goes with {SPIFFE}" if relation.spiffe_id is not None else ""
    if relation.spiffe_id is None:
        return f"{SPIFFE} needs the spiffe_id of the endpoint"
    domain = certificates.trust_domain_of(relation.spiffe_id)
    if bundles_.flaw_of_trust_domain(domain) or relation.spiffe_id == f"spiffe://{domain}":
        return "spiffe_id is not the SPIFFE ID of a workload"
    if domain == name and relation.file is None:
        return f"{SPIFFE} needs a file with a first bundle, since the endpoint's own certificate is of this trust domain"
    return ""


@dataclass(slots=True)
class _Known:
    """State of one relation: its bundle, and how it stands with the next one."""

    relation: Relation
    due: float
    every: float
    # When there was a good answer last, or when we began to ask.
    at: float
    bundle: bundles_.Bundle | None = None
    pem: bytes = b""
    file_digest: bytes = b""
    error: str = ""
    failures: int = 0
    fetches: int = 0
    is_asking: bool = False
    # The lookup of a name can't be cut off: as long as one hangs, no other is begun.
    is_hanging: bool = False


class Federation:
    """The bundles of other trust domains. State of the process; the keeper does the work, any thread may read.

    `own` answers our own bundles by trust domain: an endpoint may prove itself with a certificate of ours.
    """

    def __init__(
        self,
        config: Federated,
        keeper: Keeper,
        *,
        own: Callable[[], Mapping[str, bytes]] = dict,
        clock: Callable[[], float] = time.monotonic,
        chance: Callable[[], float] = random.random,
        ask: Callable[..., bytes] = endpoint.fetch,
    ) -> None:
        self._keeper = keeper
        self._own = own
        self._clock = clock
        self._chance = chance
        self._ask_endpoint = ask
        self._known: dict[str, _Known] = {}
        self._bundles: dict[str, bytes] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._job: Job | None = None
        self.follow(config)
        keeper.on_fork(self._after_fork)

    # ------------------------------------------------------------------ life

    def follow(self, config: Federated) -> None:
        """Take over a configuration; files are read at once. Relations that are as before keep what is known. Raises ConfigError."""
        wanted = {relation.trust_domain: relation for relation in config.federation}
        for name, relation in wanted.items():
            if flaw := flaw_of(relation, config.trust_domain):
                raise ConfigError(f"secure.federation.{name}: {flaw}.", hint="A bundle comes from a file or from an https URL.")
        now, before, known = self._clock(), self._known, dict[str, _Known]()
        for name, relation in wanted.items():
            old = before.get(name)
            if old is not None and _place_of(old.relation) == _place_of(relation):
                known[name] = old
                old.relation = relation
            else:
                known[name] = _Known(relation, now, _interval(relation, None), now)
        self._known = known
        self._look_at_files(now)
        self._publish()

    def jobs(self) -> list[Federation]:
        """Start, for those who keep a list of what they have to `cancel`."""
        if self._job is None and self._known:
            self._job = self._keeper.every(LOOK, self.look, name="federation", jitter=0.0, first=0.0)
        return [self]

    def cancel(self) -> None:
        """Look no more. What is known stays in force."""
        if self._job is not None:
            self._job.cancel()
            self._job = None

    def _after_fork(self) -> None:
        """Who was being asked in the parent, tells the parent."""
        self._tasks = set()
        for known in self._known.values():
            known.is_asking = known.is_hanging = False

    # ------------------------------------------------------------------ what is known

    @property
    def bundles(self) -> Mapping[str, bytes]:
        """The roots as PEM, by trust domain; the same object as long as nothing changes. Who has no root is not in it."""
        return self._bundles

    def bundle_of(self, trust_domain: str) -> bundles_.Bundle | None:
        """All that is known of a trust domain, with its keys for tokens; None before the first good bundle."""
        known = self._known.get(trust_domain)
        return known.bundle if known is not None else None

    def faults(self) -> Mapping[str, str]:
        """What isn't well, by trust domain: no bundle yet, or an old one."""
        now = self._clock()
        return {name: fault for name, known in self._known.items() if (fault := _fault(known, now))}

    def stats(self) -> list[dict[str, Any]]:
        """One row per trust domain: `roots`, `sequence` (-1: none), `age` of the last good answer, `fetches`, `failures`, and `error`."""
        now = self._clock()
        return [
            {
                "trust_domain": name,
                "source": "url" if known.relation.url is not None else "file",
                "roots": 0 if known.bundle is None else len(known.bundle.x509),
                "sequence": -1 if known.bundle is None or known.bundle.sequence is None else known.bundle.sequence,
                "age": now - known.at,
                "fetches": known.fetches,
                "failures": known.failures,
                "error": known.error,
            }
            for name, known in sorted(self._known.items())
        ]

    # ------------------------------------------------------------------ what becomes

    async def look(self) -> None:
        """Read the files, and ask the endpoints that are due, without waiting for one of them."""
        now = self._clock()
        self._look_at_files(now)
        self._publish()
        for known in self._known.values():
            if known.relation.url is not None and known.due <= now and not known.is_asking:
                known.is_asking = True
                task = asyncio.get_running_loop().create_task(self._ask(known))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)

    async def settled(self) -> None:
        """Wait for those who were asked."""
        await asyncio.gather(*self._tasks)

    async def _ask(self, known: _Known) -> None:
        relation = known.relation
        known.fetches += 1
        try:
            url, expected, roots = relation.url or "", "", b""
            if known.is_hanging:
                raise IdentityError("the lookup of its name still hangs.", hint="Look at the name servers of this machine.")
            if relation.profile == SPIFFE:
                expected = relation.spiffe_id or ""
                roots = self._roots_of(certificates.trust_domain_of(expected))
            fetching = fetch.Fetching()
            can_be_near = getattr(relation, "can_be_local", False)

            def work() -> bytes:
                known.is_hanging = True
                try:
                    return self._ask_endpoint(url, expected, roots, fetching, can_be_near=can_be_near)
                finally:
                    known.is_hanging = False

            try:
                # The thread ends with the fetch, and that with its time: whoever answers drop by drop is cut off.
                async with asyncio.timeout(endpoint.PATIENCE):
                    document = await apart(work, "meshlib-federation")
            finally:
                fetching.abort()
            found = bundles_.parse_json(document, relation.trust_domain)
            if known.bundle is not None and not found.supersedes(known.bundle):
                raise IdentityError(
                    f"its sequence went back from {known.bundle.sequence} to {found.sequence}.",
                    hint="An old bundle was served again: ask the operator of the endpoint.",
                )
            self._take(known, found)
        except Exception as error:
            known.failures += 1
            text = "it took too long" if isinstance(error, TimeoutError) else str(error) or type(error).__name__
            self._note(known, text)
        else:
            self._note(known, "")
            known.at = self._clock()
        finally:
            known.is_asking = False
            known.every = _interval(relation, known.bundle)
            known.due = self._clock() + known.every * (1.0 + JITTER * (2.0 * self._chance() - 1.0))
        self._publish()

    def _roots_of(self, trust_domain: str) -> bytes:
        """The latest bundle of the trust domain in which an endpoint proves itself."""
        roots = self._bundles.get(trust_domain) or self._own().get(trust_domain, b"")
        if not roots:
            raise IdentityError(
                f"there is no bundle of {trust_domain} to check the endpoint's certificate with.",
                hint=f"Name a first one: secure.federation.{trust_domain}.file",
            )
        return roots

    def _look_at_files(self, now: float) -> None:
        for known in self._known.values():
            file = known.relation.file
            if file is None:
                continue
            try:
                with files.mount(file.parent) as mount:
                    document = mount.read_public(file.name)
                digest = digest_of(document)
                if digest == known.file_digest:
                    if known.relation.url is None:
                        known.at = now
                    continue
                found = bundles_.parse(document, known.relation.trust_domain)
            except MeshError as error:
                # A file that was there and is gone, or broken, withdraws nothing.
                if known.relation.url is None or known.bundle is None:
                    known.failures += str(error) != known.error
                    self._note(known, str(error))
                continue
            # The operator's own word: it counts whatever its sequence is, until the endpoint has a newer one.
            known.file_digest, known.at = digest, now
            self._take(known, found)
            self._note(known, "")

    def _take(self, known: _Known, found: bundles_.Bundle) -> None:
        name, before = known.relation.trust_domain, known.bundle
        if before is None or found != before:
            for reason in found.ignored:
                log.warning("the bundle of the trust domain %s: %s", name, reason)
            if not found.x509:
                log.warning("the trust domain %s has withdrawn all its keys: nobody of it is believed", name)
            log.info("the bundle of the trust domain %s: %d roots, sequence %s", name, len(found.x509), found.sequence)
        known.bundle, known.pem = found, found.pem

    def _note(self, known: _Known, error: str) -> None:
        if error and error != known.error:
            stays = "the last one stays in force" if known.pem else "nobody of it is believed"
            log.error("no new bundle of the trust domain %s (%s): %s", known.relation.trust_domain, stays, error)
        elif known.error and not error:
            log.info("the bundle of the trust domain %s can be had again", known.relation.trust_domain)
        known.error = error

    def _publish(self) -> None:
        bundles = {name: known.pem for name, known in self._known.items() if known.pem}
        if bundles != self._bundles:
            self._bundles = bundles


def _fault(known: _Known, now: float) -> str:
    if known.bundle is None:
        return f"there is none yet, and nobody of it is believed: {known.error or 'its endpoint has not answered yet'}"
    age = now - known.at
    limit = STALE * (known.every if known.relation.url is not None else LOOK)
    return f"it is {age:.0f} s old: {known.error}" if known.error and age > limit else ""


def _place_of(relation: Relation) -> tuple[object, ...]:
    """Where it comes from, and who vouches for it: with another of these it is another relation."""
    return relation.file, relation.url, relation.profile, relation.spiffe_id, getattr(relation, "can_be_local", False)


def _interval(relation: Relation, bundle: bundles_.Bundle | None) -> float:
    hint = bundle.refresh_hint if bundle is not None else None
    wishes = [max(hint, SHORTEST)] if hint is not None else []
    if relation.every is not None:
        wishes.append(max(relation.every, EAGER))
    return min(*wishes, LONGEST) if wishes else EVERY
