"""When is the configuration read again, and what if it can't be used?

A file is looked at each second, and its content is compared: no date is trusted. A source in a registry tells by itself. What can't be
used changes nothing: the old configuration serves on, the mistake is told once, and what it may need beside it (a file of keys, a CA) is
waited for, with a look every ten seconds. A registry that is away is asked less and less often, by chance.

It puts nothing in force: `Mesh` does, as a whole or not at all.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Final

from . import errors

if TYPE_CHECKING:
    import asyncio

    from .config import Config
    from .config.source import ConfigSource

log = logging.getLogger("meshlib.mesh")

# Seconds between two looks at the file.
LOOK: Final = 1.0
# Seconds after which a configuration that could not be used is tried again unchanged.
RETRY: Final = 10.0


class Reload:
    """State of the process: what was tried last. `taken` and `failures` are counted over its life."""

    def __init__(self, in_force: Callable[[], Config], adopt: Callable[[Config], object]) -> None:
        self._in_force = in_force
        self._adopt = adopt
        self.taken = 0
        self.failures = 0
        self.source_failures = 0
        self._lock = threading.Lock()
        self._error = ""
        # The content that was tried last, and when the same may be tried again.
        self._tried = "", 0.0
        # The wait for a change of a configuration that is no file.
        self._hearing: asyncio.Future[None] | None = None

    def now(self) -> bool:
        """Read it, and have it adopted if it is another one; True if a new one is in force. Raises MeshError, and counts it."""
        from .config import load

        with self._lock:
            config = self._in_force()
            try:
                fresh = load(config.url or config.file, service=config.service, zone=config.zone, origin=config.origin)
                is_new = fresh.source != config.source
                if is_new:
                    self._adopt(fresh)
                elif self._error:
                    log.info("configuration %s can be used again", fresh.label)
                remember(fresh)
            except errors.MeshError:
                self.failures += 1
                raise
            self._error = ""
            if not is_new:
                return False
            self.taken += 1
        tell(fresh)
        log.info("configuration %s is in force", fresh.label)
        return True

    async def look(self) -> None:
        """The keeper's work. Reading is apart from its loop: a new source of identity may take its time to answer."""
        config = self._in_force()
        if config.origin is not None:
            await self._hear(config.origin)
            return
        digest, now = _digest_of(config.file), time.monotonic()
        if digest == config.source and not self._error:
            return
        if self._error and digest == self._tried[0] and now < self._tried[1]:
            # It failed as it is; what it needs beside it may come about, and is asked for less often.
            return
        self._tried = digest, now + RETRY
        await self._apart()

    async def _hear(self, origin: ConfigSource) -> None:
        import asyncio

        hearing = self._hearing = asyncio.ensure_future(origin.changed())
        try:
            # What could not be taken may need something beside it, which comes about without a word of the source's.
            await asyncio.wait({hearing}, timeout=RETRY if self._error else None)
            if hearing.cancelled():  # by `rest`
                return
            if hearing.done():
                hearing.result()
        except OSError as error:
            self.source_failures += 1
            pause = random.uniform(0.0, min(RETRY, LOOK * 2.0 ** min(self.source_failures, 10)))
            log.info("the source of the configuration can't be watched, and is asked again in %.1f s: %s", pause, error)
            await asyncio.sleep(pause)
            return
        finally:
            hearing.cancel()
        self.source_failures = 0
        await self._apart()

    async def _apart(self) -> None:
        from .keeper import apart

        await apart(self._now_or_tell, "meshlib-reload")

    def _now_or_tell(self) -> None:
        try:
            self.now()
        except errors.MeshError as error:
            # Looked at each second: told once, and again when it becomes another mistake.
            if str(error) != self._error:
                self._error = str(error)
                log.error("the changed configuration can't be used, the old one stays in force:\n%s", error)

    def rest(self) -> None:
        """Wait for no change any more, until the next look."""
        hearing, self._hearing = self._hearing, None
        if hearing is not None:
            with contextlib.suppress(RuntimeError):  # its loop is closed
                hearing.get_loop().call_soon_threadsafe(hearing.cancel)

    def after_fork(self) -> None:
        self._lock = threading.Lock()
        self._hearing = None


def remember(config: Config) -> None:
    """What is in force, and nothing else, is what a process begins with while its source is down."""
    from .config.source import keep

    if config.fresh:
        keep(config.url, config.fresh)


def tell(config: Config) -> None:
    """What is allowed, but inert or dangerous, is said once per configuration, by the process that it concerns."""
    for warning in config.warnings:
        if not warning.key.startswith("services.") or warning.key.startswith(f"services.{config.service}."):
            log.warning("%s", warning)


def _digest_of(file: Path) -> str:
    """As a configuration tells its own; "" for a file that can't be read."""
    try:
        return hashlib.sha256(file.read_bytes()).hexdigest()
    except OSError:
        return ""
