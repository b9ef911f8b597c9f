"""What does the caller get where every attempt has failed?

A fallback is a value, the last good answer up to an age, or a callable that is given the error and makes an answer. It hides a
failure, and so it is never silent: each use is counted under its word (`value`, `last_good`, `callable`), and the answer's record
names it. The store of good answers is bounded in entries (over HTTP in the bytes of a body, too; what a function returns is an object,
whose size nobody knows) and belongs to one process, as everything that decides on a call does: a fallback must work exactly when
nothing else is reachable. It knows no HTTP library and no function; those who use it say what a key is, and when an answer is good.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any, Final

# The words under which uses are counted.
VALUE: Final = "value"
LAST_GOOD: Final = "last_good"
CALLABLE: Final = "callable"
# Good answers that one store holds; the one that was used least lately goes first.
MOST: Final = 1024
# Bytes of a body that is kept.
LARGEST: Final = 64 * 1024

# Of all stores, since it is held for a moment and must be free in a forked child.
_lock = threading.Lock()


def _new_lock() -> None:
    global _lock
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_new_lock)


@dataclass(frozen=True, slots=True)
class LastGood:
    """The fallback "what it was the last time, unless that is longer ago than `max_age` seconds"."""

    max_age: float = 60.0

    def __post_init__(self) -> None:
        if not 0 < self.max_age <= 86400:
            raise ValueError(f"max_age={self.max_age!r}: seconds above 0, at most 86400, are expected")


def last_good(max_age: float = 60.0) -> LastGood:
    """As a `fallback`: the last good answer to the same question, if it is at most `max_age` seconds old.

    Over HTTP the same question is the same service, method, URL and headers, and only GET, HEAD and OPTIONS are asked that way; a
    body is kept up to 64 KiB, and none with a `Set-Cookie` or `no-store`. For a function it is the same arguments, of the same types
    and on behalf of the same peer; they must be hashable, and are held (the `self` of a method too) as long as the answer, which is
    the very object that was returned, of whatever size. Another answer ends it: over HTTP one below 500, such as a 404, but for 408,
    425 and 429, which say nothing of what was asked; for a function an exception that is ignored. 1024 answers are kept by each mesh
    for HTTP, and by each guarded function.
    """
    return LastGood(max_age)


def word_of(fallback: object) -> str:
    """Under which word a use of it is counted."""
    if isinstance(fallback, LastGood):
        return LAST_GOOD
    return CALLABLE if callable(fallback) else VALUE


@dataclass(frozen=True, slots=True)
class Kept:
    """A good answer, and when it came (monotonic seconds)."""

    answer: Any
    at: float


class Fallbacks:
    """How often which fallback was used, and the good answers of one mesh or one function."""

    __slots__ = ("_counts", "_kept", "_most")

    def __init__(self, most: int = MOST) -> None:
        self._counts: dict[tuple[str, str], int] = {}
        self._kept: dict[Hashable, Kept] = {}
        self._most = most

    def count(self, name: str, word: str) -> None:
        """One more use, by a service or a guard (``guard:<name>``)."""
        with _lock:
            self._counts[name, word] = self._counts.get((name, word), 0) + 1

    def counts(self) -> Mapping[tuple[str, str], int]:
        """Uses so far by (service or guard, word)."""
        with _lock:
            return dict(self._counts)

    def keep(self, key: Hashable, answer: Any, now: float) -> None:
        """A good answer, as the newest to its question."""
        with _lock:
            self._kept.pop(key, None)
            self._kept[key] = Kept(answer, now)
            if len(self._kept) > self._most:
                del self._kept[next(iter(self._kept))]

    def drop(self, key: Hashable) -> None:
        """What is known of this question must not be told again."""
        with _lock:
            self._kept.pop(key, None)

    def find(self, key: Hashable, max_age: float, now: float) -> Kept | None:
        """The last good answer, if it is young enough. An older one stays: another caller may be less choosy."""
        with _lock:
            kept = self._kept.pop(key, None)
            if kept is None:
                return None
            self._kept[key] = kept
        return kept if now - kept.at <= max_age else None

    def __len__(self) -> int:
        return len(self._kept)


def checked(fallback: Any) -> Any:
    """The fallback, or `ValueError` for what can't be one. `...` stands for none, since None is an answer like another."""
    if isinstance(fallback, type):
        # A class is callable, and would be made of the error by mistake.
        text = f"fallback={fallback.__name__}: a value, meshlib.last_good() or a callable(error) is expected, not a class"
        raise ValueError(text)  # noqa: TRY004  # as for every other value that can't be used
    return fallback
