"""By which keys are tokens judged now?

Each provider of tokens has one source of keys, and the gate gets what comes from it:

- *inline*: what the configuration says, once
- *file*: looked at each second, by content, since mounts swap links and copies keep times
- *url*: asked every 5 minutes, or as its `max-age` says (between one minute and half an hour); and when a token names a key
  that isn't known, though never twice within 30 seconds: whoever invents key names must not make us a weapon against the
  provider. How it is reached, and what is refused, is `fetch.py`'s
- *read*: a function that tells what somebody else keeps, such as the keys for tokens in a SPIFFE bundle

What can't be fetched or read changes nothing for an hour, counted from the last good answer; then the keys are withdrawn,
and every token of the provider is refused. Before the first good answer there are none, and there never is a default key. A
set without keys is an answer, too, and takes all of them back at once.

What a key must be like is the core's (`KeySet`). Nothing is written to disk: a restart begins without keys.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import random
import ssl
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol
from urllib.parse import urlsplit

from ..errors import ConfigError, MeshError
from ..keeper import apart
from . import fetch as fetch_
from . import files

if TYPE_CHECKING:
    from ..keeper import Job, Keeper

log = logging.getLogger("meshlib.secure")

# Seconds between two looks at files and at what is due.
LOOK: Final = 1.0
# Seconds between two fetches: usually, at least, and at most, so that a good server is asked twice within STALE.
EVERY: Final = 300.0
SHORTEST: Final = 60.0
LONGEST: Final = 1800.0
JITTER: Final = 0.1
# Between two fetches whatever happens: an unknown key, or a failure.
REST: Final = 30.0
# Keys that nobody has confirmed for so long are no keys.
STALE: Final = 3600.0


@dataclass(frozen=True, slots=True)
class KeySource:
    """Where the keys of a provider come from: exactly one of `url`, `file`, `keys` (JWKs) and `read`. With another `issuer`, it is
    another source.
    """

    provider: str
    url: str | None = None
    file: Path | None = None
    keys: Iterable[Mapping[str, Any]] | None = None
    read: Callable[[], bytes | None] | None = None
    issuer: str = ""


class Gate(Protocol):
    """The part of the native gate that is told. Answers which keys of a set were left out; ConfigError for what is no set."""

    def keys(self, provider: str, jwks: bytes | None) -> list[str]: ...


@dataclass(slots=True)
class _Known:
    """State of one provider: the keys in force, and how it stands with the next ones."""

    source: KeySource
    due: float = float("-inf")
    # When there was a good answer last; None: never, or it was withdrawn.
    at: float | None = None
    asked: float = float("-inf")
    every: float = EVERY
    digest: bytes = b""
    count: int = 0
    fetches: int = 0
    failures: int = 0
    error: str = ""
    is_asking: bool = False
    # The lookup of a name can't be cut off: as long as one hangs, no other is begun.
    is_hanging: bool = False


class KeyStore:
    """The keys of all providers. State of the process; the keeper does the work, `nudge` and `stats` are for any thread.

    `allowed`: hosts (as in the URL) that may be on this machine or its link. `context` makes the TLS context of fetches; the
    platform's roots are trusted without it.
    """

    def __init__(
        self,
        sources: Iterable[KeySource],
        gate: Gate,
        keeper: Keeper,
        *,
        allowed: frozenset[str] = frozenset(),
        context: Callable[[], ssl.SSLContext] = fetch_.platform_context,
        lookup: fetch_.Lookup = fetch_.system_lookup,
        clock: Callable[[], float] = time.monotonic,
        chance: Callable[[], float] = random.random,
    ) -> None:
        self._gate = gate
        self._keeper = keeper
        self._context = context
        self._lookup = lookup
        self._clock = clock
        self._chance = chance
        self._known: dict[str, _Known] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._job: Job | None = None
        self._lock = threading.Lock()  # a set that is late must not follow its own withdrawal
        self.update(sources, allowed=allowed)
        keeper.on_fork(self._after_fork)

    def update(self, sources: Iterable[KeySource], *, allowed: frozenset[str] = frozenset()) -> None:
        """Take another configuration: call it before the gate gets its new plan. Keys of a source that stays, stay.

        Raises ConfigError for a source that can't be one, and then changes nothing.
        """
        wanted = {source.provider: source for source in sources}
        check(wanted.values())
        with self._lock:
            before = self._known
            kept = {
                name: old for name, old in before.items() if name in wanted and _place_of(wanted[name]) == _place_of(old.source)
            }
            for name in before.keys() - kept.keys():
                self._gate.keys(name, None)
            for name, old in kept.items():
                old.source = wanted[name]
            self._allowed = allowed
            self._known = {name: kept.get(name) or _Known(source) for name, source in wanted.items()}
        self._look_near()
        if self._job is not None:
            self._keeper.soon(self._job)

    def jobs(self) -> list[KeyStore]:
        """Start, for those who keep a list of what they have to `cancel`."""
        if self._job is None and any(known.source.keys is None for known in self._known.values()):
            self._job = self._keeper.every(LOOK, self.look, name="jwks", jitter=0.0, first=0.0)
        return [self]

    def cancel(self) -> None:
        """Look no more."""
        if self._job is not None:
            self._job.cancel()
            self._job = None

    def nudge(self, provider: str) -> None:
        """A token names a key that isn't known: ask again, as soon as it is time. Cheap, and from any thread."""
        known = self._known.get(provider)
        if known is None or known.source.url is None or known.is_asking:
            return
        now = self._clock()
        due = max(now, known.asked + REST)
        if due < known.due:
            known.due = due
            if due <= now and self._job is not None:
                self._keeper.soon(self._job)

    def stats(self) -> list[dict[str, Any]]:
        """One row per provider: `keys`, `age` of the last good answer (-1: none in force) and at which it is `stale`, `fetches`,
        `failures`, `error`.
        """
        now = self._clock()
        return [
            {
                "provider": name,
                "source": _kind_of(known.source),
                "keys": known.count,
                "age": -1.0 if known.at is None else now - known.at,
                "fetches": known.fetches,
                "failures": known.failures,
                "stale": STALE,
                "error": known.error,
            }
            for name, known in sorted(self._known.items())
        ]

    # ------------------------------------------------------------------ the keeper's

    async def look(self) -> None:
        """Read what is near, ask the URLs that are due without waiting for one of them, and withdraw what is too old."""
        now = self._clock()
        self._look_near()
        for known in self._known.values():
            if known.source.url is not None and known.due <= now and not known.is_asking:
                known.is_asking = True
                task = asyncio.get_running_loop().create_task(self._ask(known, known.source.url))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)
        for known in self._known.values():
            if known.at is not None and known.source.keys is None and now - known.at > STALE:
                known.at, known.digest, known.count = None, b"", 0
                with self._lock:
                    self._gate.keys(known.source.provider, None)
                log.error(
                    "the keys of the provider %s are withdrawn: nothing confirmed them for %g s, and its tokens are refused",
                    known.source.provider,
                    STALE,
                )

    async def settled(self) -> None:
        """Wait for the fetches under way. For the start, and for tests."""
        while self._tasks:
            await asyncio.gather(*self._tasks)

    async def first(self) -> None:
        """Ask all who are due, and wait for their answers, good or bad: before the first request comes in."""
        await self.look()
        await self.settled()

    async def _ask(self, known: _Known, url: str) -> None:
        known.asked = self._clock()
        known.fetches += 1
        is_good = False
        try:
            found = await self._fetched(known, url)
            known.every = min(max(EVERY if found.max_age is None else found.max_age, SHORTEST), LONGEST)
            self._take(known, found.content)
            is_good = True
        except Exception as error:
            known.failures += 1
            self._note(known, str(error) or type(error).__name__)
        finally:
            known.is_asking = False
            wait = (
                known.every * (1.0 + JITTER * (2.0 * self._chance() - 1.0)) if is_good else REST * (1.0 + JITTER * self._chance())
            )
            known.due = known.asked + max(wait, REST)

    async def _fetched(self, known: _Known, url: str) -> fetch_.Fetched:
        if known.is_hanging:
            raise fetch_.failed("the lookup of its name still hangs.", "Look at the name servers of this machine.")
        fetching = fetch_.Fetching()
        is_allowed = (urlsplit(url).hostname or "") in self._allowed

        def work() -> fetch_.Fetched:
            known.is_hanging = True
            try:
                context = self._context()
                return fetch_.fetch(url, context, is_near_allowed=is_allowed, fetching=fetching, lookup=self._lookup)
            finally:
                known.is_hanging = False

        try:
            async with asyncio.timeout(fetch_.PATIENCE):
                return await apart(work, f"meshlib-jwks-{known.source.provider}")
        except TimeoutError:
            raise fetch_.late(url) from None
        finally:
            fetching.abort()

    def _look_near(self) -> None:
        """Take what needs no network."""
        for known in self._known.values():
            source = known.source
            if source.url is not None or (source.keys is not None and known.at is not None):
                continue
            try:
                if source.keys is not None:
                    content: bytes | None = _document(source)
                elif source.file is not None:
                    content = _read(source.file)
                else:
                    content = source.read() if source.read is not None else None
                if content is None:
                    continue
                self._take(known, content)
            except Exception as error:
                text = str(error) or type(error).__name__
                known.failures += text != known.error
                self._note(known, text)

    def _take(self, known: _Known, content: bytes) -> None:
        """Hand a set to the gate, if it is another one than before."""
        provider = known.source.provider
        digest = hashlib.sha256(content).digest()
        if digest != known.digest or known.at is None:
            from .._native import core

            names, _ = core.parse_jwks(content)
            with self._lock:
                if self._known.get(provider) is not known:  # it was configured anew meanwhile
                    return
                ignored = self._gate.keys(provider, content)
            for reason in ignored:
                log.warning("the key set of the provider %s: %s, and is left out", provider, reason)
            if names:
                log.info("the provider %s has %d keys", provider, len(names))
            else:
                log.warning("the provider %s has no keys (any more): its tokens are refused", provider)
            known.digest, known.count = digest, len(names)
        known.at = self._clock()
        self._note(known, "")

    def _note(self, known: _Known, error: str) -> None:
        """A state is logged when it changes, and not each time that it is met."""
        provider = known.source.provider
        if error and error != known.error:
            stays = "the last ones stay in force for a while" if known.at is not None else "its tokens are refused"
            log.error("no new keys of the provider %s (%s): %s", provider, stays, error)
        elif known.error and not error:
            log.info("the keys of the provider %s can be had again", provider)
        known.error = error

    def _after_fork(self) -> None:
        """Who was being asked in the parent, tells the parent."""
        self._tasks, self._lock = set(), threading.Lock()
        for known in self._known.values():
            known.is_asking = known.is_hanging = False


def check(sources: Iterable[KeySource]) -> None:
    """Raises ConfigError for a source that can't be one."""
    for source in sources:
        if flaw := flaw_of(source):
            raise ConfigError(f"secure.jwt.{source.provider}.jwks: {flaw}.", hint="Give an https URL, a file or keys.")
        if source.keys is not None:
            from .._native import core

            core.parse_jwks(_document(source))


def flaw_of(source: KeySource) -> str:
    """What is wrong with a source; "" if nothing is."""
    given = [each for each in (source.url, source.file, source.keys, source.read) if each is not None]
    if len(given) != 1:
        return "it needs one source of keys, and only one"
    return fetch_.flaw_of(source.url) if source.url is not None else ""


def _place_of(source: KeySource) -> tuple[object, ...]:
    """Where it comes from: with another of these it is another source."""
    inline = None if source.keys is None else _document(source)
    return source.issuer, source.url, source.file, inline, source.read is not None


def _kind_of(source: KeySource) -> str:
    return "url" if source.url else "file" if source.file else "inline" if source.keys is not None else "read"


def _document(source: KeySource) -> bytes:
    return json.dumps({"keys": [dict(key) for key in source.keys or ()]}, sort_keys=True).encode()


def _read(file: Path) -> bytes:
    try:
        with files.mount(file.parent) as mount:
            return mount.read_public(file.name)
    except MeshError:
        raise
    except OSError as error:
        raise fetch_.failed(f"{file} can't be read: {error.strerror}.", "Is it there, and readable?") from None
