"""Where is each service of this process now, and how old is that knowledge?

The directory asks the resolvers of all services, on the keeper's time, or follows those that tell by themselves, and gives the engine a
new version of the endpoints when something changed. So a request never waits for discovery and never sees half a change: it finds what
was last published. What is written in the configuration or in files is there before `start` returns, and so is what a registry said
last, if it was kept on disk; others get a limited time for their first answer.

An error changes nothing: the last good endpoints stay, their age is exported, and the error is logged when it changes. What an answer of
DNS or of a registry takes away may be held back for a while (`hold.py`). It balances nothing, and does not look at health; but where
connects come to nothing, it asks DNS again before its time.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import ipaddress
import json
import logging
import random
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from meshlib.config.plugin import note, noting
from meshlib.config.text import Text
from meshlib.errors import ConfigError, Problem
from meshlib.keeper import Job, Keeper, apart

from .cache import Cache
from .dns import DnsResolver, Lookup, system_lookup
from .entry import GATHER, Entry, Row, Sink
from .file import FileResolver
from .follow import follow
from .hold import SECONDS
from .pace import Delays
from .registration import judge
from .registries import Opened, Registries
from .registry import open_registry
from .resolver import Change, EndpointAddress, Immediate, Snapshot, StaticResolver, Watching, from_settings
from .srv import SrvResolver

if TYPE_CHECKING:
    from meshlib.config.agent_policy import RegistryPolicy
    from meshlib.config.policy import Config, ServicePolicy

__all__ = ["Directory", "Row", "Sink"]

logger = logging.getLogger("meshlib.discover")

FIRST_LIMIT = 2.0  # seconds for the first answers of DNS and registries
TEND = 1.0  # seconds between two looks at what waits for time to pass
SAVE = 10.0  # seconds between two writes of a service's endpoints to disk
AGAIN = 1.0  # seconds between two looks because of connects that came to nothing


class Directory:
    """All services of a Config, resolved. Any thread may call it; the work is the keeper's."""

    def __init__(
        self,
        engine: Sink,
        keeper: Keeper,
        *,
        clock: Callable[[], float] = time.monotonic,
        lookup: Lookup = system_lookup,
        open_one: Callable[[str, Mapping[str, Any]], Any] = open_registry,
        source: random.Random | None = None,
    ) -> None:
        self._engine = engine
        self._keeper = keeper
        self._clock = clock
        self._lookup = lookup
        # By default the system's: forked children must not draw the same delays. Nothing secret hangs on it.
        self._random = source or random.SystemRandom()
        self.registries = Registries(keeper, self._random, open_one=open_one)
        self._lock = threading.RLock()
        self._is_started = False
        self._is_dev = False
        self._entries: dict[str, Entry] = {}
        self._versions: dict[str, int] = {}  # beyond an entry's life: the engine's versions only rise
        self._jobs: list[Job] = []
        self._tended = clock()
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
        """The part of `follow` that can fail: reads what must be read, and has the own service's entry made once, without entering it.

        Call what it returns to go through with it.
        """
        entries: dict[str, Entry] = {}
        fresh: dict[str, Entry] = {}
        notes = Text(config.label, lines=config.places.lines)
        opened: dict[str, Opened] = {}
        for name in dict.fromkeys(_registries_of(config)):
            try:
                opened |= self.registries.prepare([name], config.registries)
            except ConfigError as error:
                note(notes, ("registries", name), error)
        for name, policy in config.services.items():
            if policy.discover is None:
                continue
            registry = opened.get(policy.discover.registry or "")
            if policy.discover.registry is not None and registry is None:  # told already
                continue
            settings = self._settings(config, policy, registry)
            old = self._entries.get(name)
            if old is not None and old.settings == settings:
                entries[name] = old
                continue
            try:
                entries[name] = fresh[name] = self._entry(config, policy, registry, settings)
            except ConfigError as error:
                note(notes, ("services", name, "discover"), error)
        own = config.own
        if own.register is not None and own.register.registry in opened:
            with noting(notes, ("services", own.name, "register")):
                judge(opened[own.register.registry].registry, own, config.zone)
        self._is_dev = config.is_dev
        answers = self._read(fresh, notes.problems)

        def apply() -> None:
            with self._lock:
                before = self._entries
                gone = [old for name, old in before.items() if entries.get(name) is not old]
                self._entries = entries
            for old in gone:
                _cancel(old)
            for name, snapshot in answers.items():
                self._take(entries[name], snapshot)
            for entry in fresh.values():
                self._inherit(entry, before.get(entry.name))
                self._recall(entry)
            self.registries.use(opened)
            if self._is_started:
                self._begin(fresh, first=0.0)

        return apply

    def start(self, *, limit: float = FIRST_LIMIT) -> None:
        """Look again on the keeper's time, and wait for first answers, at most `limit` seconds."""
        self._reopen()
        self._is_started = True
        self._begin(self._entries)
        waiting = {name: entry for name, entry in self._entries.items() if _is_remote(entry) and _is_in_the_dark(entry)}
        if waiting:
            with contextlib.suppress(TimeoutError):
                self._keeper.run(self._first_answers(waiting, limit)).result(limit + 1.0)

    def cancel(self) -> None:
        """Look no more, and close what was opened for it. What was published stays published, and `start` may follow."""
        with self._lock:
            self._is_started = False
        while self._jobs:
            self._jobs.pop().cancel()
        for entry in self._entries.values():
            _cancel(entry)
        self.registries.close()

    def jobs(self) -> list[Directory]:
        """`start`, for those who keep a list of what they have to `cancel`."""
        self.start()
        return [self]

    def confirm(self, service: str) -> bool:
        """Believe the answer that is held back for a service; False if none is."""
        with self._lock:
            entry = self._entries.get(service)
            if entry is None or not entry.table.is_holding:
                return False
            now = self._clock()
            entry.touch(entry.table.confirm(now))
            entry.known = now
            self._publish(entry)
            logger.warning("%s: the loss of endpoints was confirmed, %d are left", service, len(entry.table))
            return True

    def endpoints(self, service: str) -> Sequence[EndpointAddress]:
        """What was published for a service: empty before its first answer, and for names that nobody follows."""
        with self._lock:
            entry = self._entries.get(service)
            return () if entry is None else entry.endpoints

    @property
    def waiting(self) -> tuple[str, ...]:
        """Services of which nothing is known: no source has ever answered, and nothing of it was kept on disk."""
        return tuple(sorted(name for name, entry in self._entries.items() if entry.known is None))

    def stats(self, now: float) -> list[dict[str, Any]]:
        """One row per service.

        `age` is in seconds since the endpoints in use were confirmed, None if none ever were.
        """
        return [entry.stats(now) for _, entry in sorted(self._entries.items())]

    def faults(self, now: float) -> dict[str, str]:
        """By service, what somebody should look at: endpoints that are held on to, and sources that have been silent for long."""
        return {name: fault for name, entry in sorted(self._entries.items()) if (fault := entry.fault(now))}

    # ------------------------------------------------------------------ one answer

    async def look(self, service: str) -> None:
        """Ask for one service now. Errors are noted, never raised."""
        entry = self._entries.get(service)
        if entry is not None:
            await self._look(entry)

    async def _look(self, entry: Entry) -> None:
        entry.looked = self._clock()
        try:
            self._take(entry, await entry.resolver.resolve())
        except Exception as error:
            entry.failed(error)
        # DNS says for how long an answer is good.
        if entry.job is not None and entry.resolver.interval is not None:
            entry.job.seconds = entry.resolver.interval

    def _take(self, entry: Entry, answer: Snapshot | Change) -> bool:
        if self._is_dev:
            _only_loopback(entry.name, answer.endpoints if isinstance(answer, Snapshot) else answer.changed)
        with self._lock:
            if self._entries.get(entry.name) is not entry:  # a reload came between
                return True
            now = self._clock()
            was_held, before = entry.table.is_holding, len(entry.table)
            if not entry.take(answer, now):
                return False
            if entry.table.is_holding and not was_held:
                logger.error(
                    "%s: an answer of %s leaves %d of %d endpoints, or fewer than half of those of the last minutes. The lost ones are "
                    "kept for %g s, in case that the answer is wrong; if it is right, confirm it or wait",
                    entry.name,
                    entry.source,
                    len(entry.table.told),
                    before,
                    entry.table.seconds,
                )
            if isinstance(answer, Snapshot):
                self._publish(entry)
            elif entry.is_changed:
                self._publish_soon(entry, now)
        entry.well()
        return True

    def _publish(self, entry: Entry) -> None:
        if entry.timer is not None:
            entry.timer.cancel()
            entry.timer = None
        if not entry.is_changed:
            return
        version = self._versions.get(entry.name, 0) + 1
        entry.publish(self._engine, version, self._clock())
        self._versions[entry.name] = version
        logger.log(
            logging.DEBUG if isinstance(entry.resolver, Watching) else logging.INFO,
            "%s: %d endpoints by %s, version %d",
            *(entry.name, len(entry.table), entry.source, version),
        )

    def _publish_soon(self, entry: Entry, now: float) -> None:
        """At once, if nothing was published just before; else with what is told until `GATHER` seconds after that."""
        pause = max(0.0, entry.published_at + GATHER - now)
        loop = asyncio.get_running_loop()
        if entry.timer is not None:
            if entry.timer.when() <= loop.time() + pause:
                return
            entry.timer.cancel()
        if pause:
            entry.timer = loop.call_later(pause, self._publish_now, entry)
        else:
            entry.timer = None
            self._publish_now(entry)

    def _publish_now(self, entry: Entry) -> None:
        with self._lock:
            entry.timer = None
            if self._entries.get(entry.name) is entry:
                try:
                    self._publish(entry)
                except Exception as error:  # tried again by `_tend`, with everything
                    entry.failed(error)

    # ------------------------------------------------------------------ as time goes by

    def _begin(self, entries: Mapping[str, Entry], first: float | None = None) -> None:
        for entry in entries.values():
            self._keep(entry, first)
        if not self._jobs and any(_is_remote(entry) for entry in self._entries.values()):
            # The disk may hang, and then holds up nothing but itself.
            for work, name in ((self._tend, "discover"), (self._save_all, "keep endpoints")):
                self._jobs.append(self._keeper.every(TEND, work, name=name, jitter=0.0, first=0.0))
        if self._keeper.is_running and any(isinstance(entry.resolver, Watching) for entry in entries.values()):
            self._keeper.run(self._follow_all())

    def _keep(self, entry: Entry, first: float | None = None) -> None:
        interval = entry.resolver.interval
        with self._lock:
            if interval is None or entry.job is not None or self._entries.get(entry.name) is not entry:
                return
            entry.job = self._keeper.every(interval, lambda: self._look(entry), name=f"discover {entry.name}", first=first)

    async def _follow_all(self) -> None:
        """On the keeper's loop: whoever tells by himself is followed; begun anew after a fork."""
        loop = asyncio.get_running_loop()
        for entry in tuple(self._entries.values()):
            if not isinstance(entry.resolver, Watching) or entry.opened is None:
                continue
            with self._lock:
                # A reload or the end, in another thread, cancels what it finds: nothing may be begun after that.
                if not self._is_started or self._entries.get(entry.name) is not entry:
                    continue
                if entry.task is not None and not entry.task.done() and entry.task.get_loop() is loop:
                    continue
                entry.delays = entry.delays or Delays(self._random)
                work = follow(entry.resolver, _Told(self, entry), entry.opened.pace, entry.delays, clock=self._clock)
                entry.task = loop.create_task(work, name=f"meshlib-discover: {entry.name}")

    async def _tend(self) -> None:
        now = self._clock()
        passed, self._tended = now - self._tended, now
        await self._follow_all()
        for entry in tuple(self._entries.values()):
            with self._lock:
                if entry.table.is_holding and not entry.error:
                    # A stream that says nothing says the same.
                    entry.touch(entry.table.review(now))
                elif entry.table.is_holding:
                    # And one that is away says nothing: what it said last may have been the beginning of its end.
                    entry.table.defer(passed, now)
                if entry.is_changed and entry.timer is None:
                    try:
                        self._publish(entry)
                    except Exception as error:
                        entry.failed(error)
            if entry.job is not None and _is_remote(entry):
                connects = self._engine.unreachable(entry.name)
                if connects != entry.connects and now - entry.looked >= AGAIN:
                    entry.connects = connects
                    self._keeper.soon(entry.job)

    async def _first_answers(self, waiting: Mapping[str, Entry], limit: float) -> None:
        await self._follow_all()
        looks = {asyncio.ensure_future(self._first_of(entry)): name for name, entry in waiting.items()}
        _, late = await asyncio.wait(looks, timeout=limit)
        for look in late:
            look.add_done_callback(lambda done: done.cancelled() or done.exception())
        if late:
            names = ", ".join(sorted(looks[look] for look in late))
            logger.warning("no answer of DNS or of a registry within %g s for %s: started without", limit, names)

    async def _first_of(self, entry: Entry) -> None:
        if not isinstance(entry.resolver, Watching):
            await self._look(entry)
            return
        while not entry.has_answered and self._entries.get(entry.name) is entry:  # noqa: ASYNC110  # until `start` waits no longer
            await asyncio.sleep(0.01)

    # ------------------------------------------------------------------ on disk

    def _inherit(self, entry: Entry, old: Entry | None) -> None:
        """Of a registry that was opened anew and is asked the same: its answer is judged by what the one before said."""
        now = self._clock()
        if old is None or old.known is None or entry.opened is None or old.opened is None:
            return
        is_same = entry.settings[:-1] == old.settings[:-1] and entry.asked == old.asked
        with self._lock:
            if is_same and entry.known is None and self._entries.get(entry.name) is entry:
                entry.touch(entry.table.replace(tuple(old.table), now))
                entry.known = old.known
                self._publish(entry)

    def _recall(self, entry: Entry) -> None:
        """What the registry said last, as long as it doesn't say more."""
        kept = entry.cache.read() if entry.cache is not None and entry.known is None else None
        if kept is None:
            return
        endpoints, age = kept
        with self._lock:
            now = self._clock()
            if entry.known is None and self._entries.get(entry.name) is entry:
                entry.touch(entry.table.recall(endpoints, age, now))
                entry.known = now - age
                self._publish(entry)
                entry.saved = entry.version, now, entry.known
                logger.warning(
                    "%s: begins with %d endpoints that were kept on disk and are %.0f s old, until %s answers",
                    *(entry.name, len(endpoints), age, entry.source),
                )

    async def _save_all(self) -> None:
        for entry in tuple(self._entries.values()):
            await self._save(entry, self._clock())

    async def _save(self, entry: Entry, now: float) -> None:
        cache, known = entry.cache, entry.known
        version, written, confirmed = entry.saved
        if cache is None or known is None or not entry.has_answered or now - written < SAVE:
            return
        endpoints, current, age = entry.endpoints, entry.version, max(0.0, now - known)
        if current != version:
            done = await apart(lambda: cache.write(endpoints, age), f"meshlib-keep-{entry.name}")
        elif known > confirmed:
            done = await apart(lambda: cache.confirm(age), f"meshlib-keep-{entry.name}")
        else:
            return
        # What could not be confirmed may not be there any more.
        entry.saved = (current if done else -1), now, known

    # ------------------------------------------------------------------ all

    def _settings(self, config: Config, policy: ServicePolicy, registry: Opened | None) -> tuple[object, ...]:
        """What makes it another entry. A registry that was opened anew makes it one too."""
        discover = policy.discover
        file = Path(config.file).parent / discover.file if discover is not None and discover.file is not None else None
        return discover, config.is_dev, file, None if registry is None else id(registry)

    def _entry(self, config: Config, policy: ServicePolicy, registry: Opened | None, settings: tuple[object, ...]) -> Entry:
        discover, name, clock = policy.discover, policy.name, self._clock
        if discover is None:
            raise RuntimeError(f"nobody looks for {name}")
        if discover.static is not None:
            rows, now = from_settings(discover.static, is_dev=config.is_dev), clock()
            return Entry(name, "static", lambda: StaticResolver(name, rows, now=now), settings, 0.0)
        if discover.file is not None:
            file = Path(config.file).parent / discover.file
            return Entry(name, "file", lambda: FileResolver(name, file, is_dev=config.is_dev, clock=clock), settings, 0.0)
        if discover.dns is not None:
            host, every = discover.dns, discover.every
            return Entry(
                name, "dns", lambda: DnsResolver(name, host, every=every, lookup=self._lookup, clock=clock), settings, SECONDS
            )
        if discover.srv is not None:
            records = discover.srv
            return Entry(name, "srv", lambda: SrvResolver(name, records, clock=clock), settings, SECONDS)
        if registry is None:
            raise ConfigError(f"services.{name}.discover says nothing that is understood.", hint="Name one of `registries`.")
        options, made = discover.settings, registry
        entry = Entry(name, registry.policy.name, lambda: made.registry.resolver(name, options), settings, SECONDS)
        entry.opened = registry
        entry.asked = _source(registry.policy, options)
        # In development nothing beyond this machine is called, and what is on it is nobody's word for later.
        if registry.policy.cache is not None and not config.is_dev:
            entry.cache = Cache(registry.policy.cache, config.name, name, entry.asked)
        return entry

    def _read(self, entries: Mapping[str, Entry], problems: list[Problem]) -> dict[str, Snapshot]:
        """The answers of those who need not wait.

        A file that isn't there yet is an alarm; one that is wrong is an error.
        """
        answers: dict[str, Snapshot] = {}
        for name, entry in entries.items():
            if not isinstance(entry.resolver, Immediate):
                continue
            try:
                answers[name] = entry.resolver.look()
                if self._is_dev:
                    _only_loopback(name, answers[name].endpoints)
            except ConfigError as error:
                problems += error.problems or [Problem(entry.source, 1, f"services.{name}", error.message, error.hint)]
            except OSError as error:
                entry.failed(error)
        if problems:
            raise ConfigError(problems)
        return answers

    def _reopen(self) -> None:
        """After `cancel`, registries are closed: those who use one get it anew."""
        fresh = self.registries.reopen()
        for entry in self._entries.values():
            if entry.opened in fresh:
                entry.resolver = entry.make()

    def _after_fork(self) -> None:
        self._lock = threading.RLock()
        for entry in self._entries.values():
            # They are the parent's, and must not be touched.
            entry.task = entry.timer = None
            entry.step = None
            if entry.delays is not None:
                entry.delays = Delays(self._random)
        self.registries.after_fork()


class _Told:
    """Hears of one service, for the directory."""

    __slots__ = ("_directory", "_entry")

    def __init__(self, directory: Directory, entry: Entry) -> None:
        self._directory = directory
        self._entry = entry

    def told(self, answer: Snapshot | Change) -> bool:
        return self._directory._take(self._entry, answer)

    def lost(self, error: Exception) -> None:
        self._entry.failed(error)


def _registries_of(config: Config) -> Iterable[str]:
    for policy in config.services.values():
        if policy.discover is not None and policy.discover.registry is not None:
            yield policy.discover.registry
    if config.own.register is not None:
        yield config.own.register.registry


def _cancel(entry: Entry) -> None:
    if entry.job is not None:
        entry.job.cancel()
        entry.job = None
    task, entry.task = entry.task, None
    if task is not None:
        with contextlib.suppress(RuntimeError):  # its loop is closed
            task.get_loop().call_soon_threadsafe(task.cancel)


def _is_remote(entry: Entry) -> bool:
    return not isinstance(entry.resolver, Immediate)


def _is_in_the_dark(entry: Entry) -> bool:
    """Whether nothing is known of it that may be judged by."""
    return entry.known is None or (entry.table.is_old and not entry.has_answered)


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


def _source(registry: RegistryPolicy, options: Mapping[str, Any]) -> str:
    """Whose word it is, for the disk: what another registry said, or this one to another question, is no answer.

    A mapping among the registry's settings says where a secret is, and who holds another one gets the same answer.
    """
    place = {key: value for key, value in registry.settings.items() if not isinstance(value, Mapping)}
    asked = json.dumps([place, dict(options)], sort_keys=True, default=repr)
    return f"{registry.name} ({registry.plugin}) {hashlib.sha256(asked.encode()).hexdigest()[:16]}"
