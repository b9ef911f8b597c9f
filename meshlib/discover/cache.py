"""What did a registry say last, before this process began?

A process that starts while its registry is down would know nobody. So the last good endpoints of each service are kept in a file, one
per service and configuration, for this user only: a process starts with them, and tells how old they are. Several processes may share
the folder, since a file is replaced as a whole.

Who can write there says where our calls go. So the folder and the file must be ours (or root's) and nobody else's to write, no link is
followed, and what is not of our making (another version, service or source, broken, too large, too old) is left alone, with a line in the
log. What can't be written is not kept: a full or read-only disk is told as an alarm, and costs no call.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import stat
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

from .resolver import EndpointAddress

logger = logging.getLogger("meshlib.discover")

VERSION: Final = 1
# Addresses are given to others some day; and who starts with a list this old has been down himself.
OLDEST: Final = 24 * 3600.0
LARGEST: Final = 64 * 1024 * 1024
# Endpoints that are written without letting other threads have the interpreter.
SLICE: Final = 512

_OURS: Final = os.O_NOFOLLOW | os.O_CLOEXEC


class Cache:
    """The file of one service. `source` says whose word it is: of another source, nothing is taken."""

    __slots__ = ("_clock", "_file", "_folder", "_source", "error", "failures", "service")

    def __init__(self, folder: Path, mesh: str, service: str, source: str, *, clock: Callable[[], float] = time.time) -> None:
        self.service = service
        self._folder = folder
        self._file = f"{mesh}.{service}.json"
        self._source = source
        self._clock = clock
        self.failures = 0
        self.error = ""

    def read(self) -> tuple[tuple[EndpointAddress, ...], float] | None:
        """What is kept, and for how many seconds nobody has confirmed it; None if there is nothing that may be used."""
        try:
            content, written = self._content()
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            logger.warning("%s: what is kept in %s is not used: %s", self.service, self._folder / self._file, error)
            return None
        age = max(0.0, self._clock() - written)
        try:
            if age > OLDEST:
                raise ValueError(f"it is {age / 3600.0:.0f} hours old")
            endpoints = self._endpoints(json.loads(content))
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            logger.warning("%s: what is kept in %s is not used: %s", self.service, self._folder / self._file, error)
            return None
        return endpoints, age

    def write(self, endpoints: Sequence[EndpointAddress], age: float) -> bool:
        """Keep these, which were confirmed `age` seconds ago. Blocks; False if it wasn't possible, which is noted."""
        try:
            self._write(endpoints, self._clock() - age)
        except OSError as error:
            self._failed(error)
            return False
        self._well()
        return True

    def confirm(self, age: float) -> bool:
        """What is kept is still so, as of `age` seconds ago. False if it has to be written anew."""
        try:
            folder = self._open_folder()
            try:
                then = self._clock() - age
                os.utime(self._file, (then, then), dir_fd=folder, follow_symlinks=False)
            finally:
                os.close(folder)
        except FileNotFoundError:
            return False  # somebody has cleared it away: no fault, and it is to be written anew
        except OSError as error:
            self._failed(error)
            return False
        self._well()
        return True

    # ------------------------------------------------------------------ how

    def _open_folder(self) -> int:
        descriptor = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY | _OURS)
        told = os.fstat(descriptor)
        if told.st_uid not in {0, os.geteuid()} or told.st_mode & 0o022:
            os.close(descriptor)
            raise PermissionError(f"others may write in {self._folder}: it must be this user's, with mode 0700")
        return descriptor

    def _content(self) -> tuple[bytes, float]:
        folder = self._open_folder()
        try:
            # Not to be stopped by a pipe that somebody has put there.
            descriptor = os.open(self._file, os.O_RDONLY | os.O_NONBLOCK | _OURS, dir_fd=folder)
        finally:
            os.close(folder)
        with os.fdopen(descriptor, "rb") as file:
            told = os.fstat(file.fileno())
            if not stat.S_ISREG(told.st_mode) or told.st_uid not in {0, os.geteuid()} or told.st_mode & 0o022:
                raise PermissionError("it isn't a file of this user's, or others may write it")
            if told.st_size > LARGEST:
                raise ValueError(f"it has {told.st_size} bytes, and the largest that is read has {LARGEST}")
            return file.read(LARGEST + 1), told.st_mtime

    def _endpoints(self, kept: Any) -> tuple[EndpointAddress, ...]:
        if not isinstance(kept, dict) or kept.get("version") != VERSION:
            raise ValueError("it is of another version")
        if (kept.get("service"), kept.get("source")) != (self.service, self._source):
            raise ValueError("it is of another service or source")
        return tuple(_endpoint(row) for row in kept["endpoints"])

    def _write(self, endpoints: Sequence[EndpointAddress], then: float) -> None:
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder = self._open_folder()
        name = f".{self._file}.{os.getpid()}.{secrets.token_hex(4)}"
        try:
            descriptor = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _OURS, 0o600, dir_fd=folder)
            try:
                with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                    self._lay_down(file, endpoints)
                    file.flush()
                    os.fsync(file.fileno())
                os.utime(name, (then, then), dir_fd=folder, follow_symlinks=False)
                os.replace(name, self._file, src_dir_fd=folder, dst_dir_fd=folder)
            except BaseException:
                with contextlib.suppress(OSError):
                    os.unlink(name, dir_fd=folder)
                raise
        finally:
            os.close(folder)

    def _lay_down(self, file: Any, endpoints: Sequence[EndpointAddress]) -> None:
        head = json.dumps({"version": VERSION, "service": self.service, "source": self._source})
        file.write(f'{head[:-1]}, "endpoints": [')
        comma = "\n"
        for start in range(0, len(endpoints), SLICE):
            rows = [[e.address, e.weight, e.zone, dict(e.labels), e.identity] for e in endpoints[start : start + SLICE]]
            file.write(comma + json.dumps(rows)[1:-1])
            comma = ",\n"
            time.sleep(0)  # other threads have calls under way
        file.write("\n]}\n")

    def _failed(self, error: OSError) -> None:
        self.failures += 1
        text = error.strerror or str(error)
        if text != self.error:
            self.error = text
            logger.error(
                "%s: its endpoints can't be kept in %s (%s): they are known as long as this process lives, and a process that starts "
                "while the registry is down won't know them",
                self.service,
                self._folder,
                text,
            )

    def _well(self) -> None:
        if self.error:
            self.error = ""
            logger.info("%s: its endpoints are kept in %s again", self.service, self._folder)


def _endpoint(row: Any) -> EndpointAddress:
    address, weight, zone, labels, identity = row
    strings = (address, zone, identity, *labels, *labels.values())
    if not all(isinstance(each, str) for each in strings) or not 0.0 <= float(weight) < 1e9 or not address:
        raise ValueError("an endpoint in it makes no sense")
    return EndpointAddress(address, float(weight), zone, labels, identity)
