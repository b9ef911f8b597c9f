"""Where is each service of this process now, and how old is that knowledge?

The directory asks the resolvers of all services, on the keeper's time, and gives the engine a new version of the
endpoints when something changed. So a request never waits for discovery and never sees half a change: it finds what was
last published. What is written in the configuration or in files is there before `start` returns; names of DNS get a
limited time for their first answer.

An error changes nothing: the last good endpoints stay, their age is exported, and the error is logged when it changes.
What an answer of DNS takes away may be held back for a while (`hold.py`). It balances nothing, and does not look at
health.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from meshlib.errors import ConfigError, Problem
from meshlib.keeper import Job, Keeper

from .dns import DnsResolver, Lookup, system_lookup
from .file import FileResolver
from .hold import Hold
from .resolver import EndpointAddress, Immediate, Resolver, Snapshot, StaticResolver, from_settings

if TYPE_CHECKING:
    from meshlib.config.policy import Config, ServicePolicy

logger = logging.getLogger("meshlib.discover")

FIRST_LIMIT = 2.0  # seconds for the first answers of DNS

Row = tuple[str, float, str, Mapping[str, str], str]


class Sink(Protocol):
    """The part of the engine that the directory needs."""

    def resolve(self, service: str, version: int, endpoints: Sequence[Row], now: float) -> None: ...


class _Entry:
    """What is known of one Service."""

    __slots__ = ("error", "failures", "hold", "job", "known", "published", "resolver", "settings", "source")

    def __init__(self, source: str, resolver: Resolver, settings: object, hold: Hold | None) -> None:
        self.source = source
        self.resolver = resolver
        self.settings = settings
        self.hold = hold
        self.job: Job | None = None
        self.published: tuple[EndpointAddress, ...] | None = None
        self.known: float | None = None  # when the published endpoints were last confirmed
        self.failures = 0
        self.error = ""


class Directory:
    """All services of a Config, resolved. Any thread may call it; the work is the keeper's."""

    def __init__(
        self,
        engine: Sink,
        keeper: Keeper,
        *,
        clock: Callable[[], float] = time.monotonic,
        lookup: Lookup = system_lookup,
    ) -> None:
        self._engine = engine
        self._keeper = keeper
        self._clock = clock
        self._lookup = lookup
        self._lock = threading.Lock()
        self._is_started = False
        self._is_dev = False
        self._entries: dict[str, _Entry] = {}
        self._versions: dict[str, int] = {}  # beyond an entry's life: the engine's versions only rise
        keeper.on_fork(self._after_fork)

    # ------------------------------------------------------------------ life

    def follow(self, config: Config) -> None:
        """Resolve the services of a configuration from now on; the engine has taken its plan already.

        What is known without the network is published at once. Services whose `discover` is as before keep their
        endpoints and their age. Raises ConfigError with all the problems of all endpoint files, and then changes
        nothing.
        """
        self.prepare(config)()

    def prepare(self, config: Config) -> Callable[[], None]:
        """The part of `follow` that can fail: reads what must be read. Call what it returns to go through with it."""
        entries: dict[str, _Entry] = {}
        fresh: dict[str, _Entry] = {}
        for name, policy in config.services.items():
            entry = self._entry(config, policy)
            if entry is None:
                continue
            old = self._entries.get(name)
            if old is not None and old.settings == entry.settings:
                entries[name] = old
            else:
                entries[name] = fresh[name] = entry
        self._is_dev = config.is_dev
        answers = self._read(fresh)

        def apply() -> None:
            with self._lock:
                gone = [old for name, old in self._entries.items() if entries.get(name) is not old]
                self._entries = entries
            for old in gone:
                if old.job is not None:
                    old.job.cancel()
            for name, snapshot in answers.items():
                self._take(name, entries[name], snapshot)
            if self._is_started:
                for name, entry in fresh.items():
                    self._keep(name, entry, first=0.0)

        return apply

    def start(self, *, limit: float = FIRST_LIMIT) -> None:
        """Look again on the keeper's time, and wait for the first answers of DNS, at most `limit` seconds."""
        self._is_started = True
        for name, entry in self._entries.items():
            self._keep(name, entry)
        waiting = {name: entry for name, entry in self._entries.items() if entry.published is None and _is_remote(entry)}
        if waiting:
            with contextlib.suppress(TimeoutError):
                self._keeper.run(self._first_answers(waiting, limit)).result(limit + 1.0)

    def cancel(self) -> None:
        """Look no more. What was published stays published, and `start` may follow."""
        self._is_started = False
        for entry in self._entries.values():
            if entry.job is not None:
                entry.job.cancel()
                entry.job = None

    def jobs(self) -> list[Directory]:
        """`start`, for those who keep a list of what they have to `cancel`."""
        self.start()
        return [self]

    def confirm(self, service: str) -> bool:
        """Believe the answer that is held back for a service; False if none is."""
        entry = self._entries.get(service)
        if entry is None or entry.hold is None or not entry.hold.is_holding:
            return False
        entry.hold.confirm()
        if entry.job is not None:
            self._keeper.soon(entry.job)
        return True

    def endpoints(self, service: str) -> Sequence[EndpointAddress]:
        """What was published for a service: empty before its first answer, and for names that nobody follows."""
        entry = self._entries.get(service)
        return () if entry is None else entry.published or ()

    def stats(self, now: float) -> list[dict[str, Any]]:
        """One row per service.

        `age` is in seconds since the endpoints in use were confirmed, None if none ever were.
        """
        return [
            {
                "service": name,
                "source": entry.source,
                "endpoints": len(entry.published or ()),
                "version": self._versions.get(name, 0),
                "age": _age(entry, now),
                "failures": entry.failures,
                "error": entry.error,
                "is_held": entry.hold is not None and entry.hold.is_holding,
                "held": 0 if entry.hold is None else entry.hold.times,
            }
            for name, entry in sorted(self._entries.items())
        ]

    # ------------------------------------------------------------------ one look

    async def look(self, service: str) -> None:
        """Ask for one service now. Errors are noted, never raised."""
        entry = self._entries.get(service)
        if entry is not None:
            await self._look(service, entry)

    async def _look(self, name: str, entry: _Entry) -> None:
        try:
            self._take(name, entry, await entry.resolver.resolve())
        except Exception as error:
            self._failed(name, entry, error)

    def _take(self, name: str, entry: _Entry, snapshot: Snapshot) -> None:
        now = self._clock()
        endpoints = snapshot.endpoints
        if self._is_dev:
            _only_loopback(name, endpoints)
        with self._lock:
            if self._entries.get(name) is not entry:  # a reload came between
                return
            was_held = entry.hold is not None and entry.hold.is_holding
            if entry.hold is not None:
                endpoints = entry.hold.judge(endpoints, now)
                if entry.hold.is_holding and not was_held:
                    logger.error(
                        "%s: an answer of %s leaves %d of %d endpoints. The lost ones are kept for %g s, in case that "
                        "the answer is wrong; if it is right, confirm it or wait",
                        name,
                        entry.source,
                        len(snapshot.endpoints),
                        len(entry.published or ()),
                        entry.hold.seconds,
                    )
            if endpoints != entry.published:
                version = self._versions.get(name, 0) + 1
                rows = [(e.address, e.weight, e.zone, dict(e.labels), e.identity) for e in endpoints]
                self._engine.resolve(name, version, rows, now)
                self._versions[name] = version
                logger.info("%s: %d endpoints by %s, version %d", name, len(endpoints), entry.source, version)
                entry.published = endpoints
        if entry.hold is None or not entry.hold.is_holding:
            entry.known = now
        if entry.error:
            logger.info("%s: %s answers again", name, entry.source)
            entry.error = ""

    def _failed(self, name: str, entry: _Entry, error: Exception) -> None:
        entry.failures += 1
        text = str(error) or type(error).__name__
        if text != entry.error:
            kept = "the last good endpoints are kept" if entry.published else "it has no endpoints yet"
            logger.warning("%s: %s gives no answer, %s: %s", name, entry.source, kept, text)
            entry.error = text

    # ------------------------------------------------------------------ all

    def _entry(self, config: Config, policy: ServicePolicy) -> _Entry | None:
        discover = policy.discover
        if discover is None:
            return None
        now = self._clock()
        settings = (discover, config.is_dev)
        if discover.static is not None:
            resolver = StaticResolver(policy.name, from_settings(discover.static, is_dev=config.is_dev), now=now)
            return _Entry("static", resolver, settings, None)
        if discover.file is not None:
            file = Path(config.file).parent / discover.file
            return _Entry(
                "file",
                FileResolver(policy.name, file, is_dev=config.is_dev, clock=self._clock),
                (*settings, file),
                None,
            )
        if discover.dns is not None:
            resolver_of_names = DnsResolver(
                policy.name, discover.dns, every=discover.every, lookup=self._lookup, clock=self._clock
            )
            return _Entry("dns", resolver_of_names, settings, Hold())
        return None

    def _read(self, entries: Mapping[str, _Entry]) -> dict[str, Snapshot]:
        """The answers of those who need not wait.

        A file that isn't there yet is an alarm; one that is wrong is an error.
        """
        answers: dict[str, Snapshot] = {}
        problems: list[Problem] = []
        for name, entry in entries.items():
            if not isinstance(entry.resolver, Immediate):
                continue
            try:
                answers[name] = entry.resolver.look()
                if self._is_dev:
                    _only_loopback(name, answers[name].endpoints)
            except ConfigError as error:
                problems.extend(error.problems or [Problem(entry.source, 1, f"services.{name}", error.message, error.hint)])
            except OSError as error:
                self._failed(name, entry, error)
        if problems:
            raise ConfigError(problems)
        return answers

    def _keep(self, name: str, entry: _Entry, first: float | None = None) -> None:
        interval = entry.resolver.interval
        if interval is not None and entry.job is None:
            entry.job = self._keeper.every(interval, lambda: self._look(name, entry), name=f"discover {name}", first=first)

    async def _first_answers(self, waiting: Mapping[str, _Entry], limit: float) -> None:
        looks = {asyncio.ensure_future(self._look(name, entry)): name for name, entry in waiting.items()}
        _, late = await asyncio.wait(looks, timeout=limit)
        if late:
            names = ", ".join(sorted(looks[look] for look in late))
            logger.warning("no answer of DNS within %g s for %s: started without", limit, names)

    def _after_fork(self) -> None:
        self._lock = threading.Lock()


def _is_remote(entry: _Entry) -> bool:
    return not isinstance(entry.resolver, Immediate)


def _age(entry: _Entry, now: float) -> float | None:
    if entry.source == "static":
        return 0.0
    return None if entry.known is None else max(0.0, now - entry.known)


def _only_loopback(name: str, endpoints: Sequence[EndpointAddress]) -> None:
    """The certificates of development are worth nothing, so nothing beyond this machine is called with them."""
    for endpoint in endpoints:
        host = endpoint.address.rpartition(":")[0].removeprefix("[").removesuffix("]")
        try:
            is_here = host == "localhost" or ipaddress.ip_address(host).is_loopback
        except ValueError:
            is_here = endpoint.address.startswith("unix:")
        if not is_here:
            raise ConfigError(
                f"{name}: {endpoint.address} is not on this machine, and `meshlib dev` calls nothing else.",
                hint="Use loopback addresses in development, or run with certificates of your own.",
            )
