"""Which identities may this process have?

Registration entries say so: each names a service, and selectors of which every one that is written must hold. All entries that hold
count, in the order of the configuration; the first is what a program takes that asks for one identity only. Where a selector can't be
judged, it doesn't hold.

It does not attest (`attest.py`), and holds no identities (`issue.py`). Neither entries nor callers are ever logged here.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import Protocol

from .attest import Caller


class Entry(Protocol):
    """A registration entry, as `agent.entries` of the configuration has it (EntryPolicy). What isn't written is None or ()."""

    @property
    def service(self) -> str: ...
    @property
    def uid(self) -> int: ...
    @property
    def gid(self) -> int | None: ...
    @property
    def path(self) -> object: ...  # text, or Path
    @property
    def sha256(self) -> tuple[str, ...]: ...
    @property
    def unit(self) -> str | None: ...
    @property
    def cgroup(self) -> str | None: ...


class Entries:
    """State of the agent: the entries in force. Any thread may ask, and replace them."""

    def __init__(self, entries: Iterable[Entry]) -> None:
        self._entries = tuple(entries)
        self._callbacks: tuple[Callable[[], None], ...] = ()
        self._lock = threading.Lock()

    def of(self, caller: Caller) -> tuple[Entry, ...]:
        """The entries whose selectors all hold, in their order; () means that the caller gets nothing."""
        return tuple(entry for entry in self._entries if _holds(entry, caller))

    def knows(self, uid: int) -> bool:
        """Whether there is an entry of this user at all, whatever else it asks for."""
        return any(entry.uid == uid for entry in self._entries)

    def wants_digest(self, uid: int) -> bool:
        """Whether an entry of this user asks for the hash of the executable."""
        return any(entry.uid == uid and entry.sha256 for entry in self._entries)

    def replace(self, entries: Iterable[Entry]) -> None:
        """Other entries from now on; streams of callers who lost theirs are ended."""
        self._entries = tuple(entries)
        for callback in self._callbacks:
            callback()

    def watch(self, callback: Callable[[], None]) -> Callable[[], None]:
        """Call back after each `replace`, on its thread; what is answered ends that."""
        with self._lock:
            self._callbacks = (*self._callbacks, callback)

        def end() -> None:
            with self._lock:
                self._callbacks = tuple(each for each in self._callbacks if each is not callback)

        return end


def _holds(entry: Entry, caller: Caller) -> bool:
    # A uid that isn't a number, or is True, is nobody's: 1 == True must not let in user 1.
    if type(entry.uid) is not int or entry.uid != caller.uid:
        return False
    if entry.gid is not None and entry.gid != caller.gid:
        return False
    if entry.path and str(entry.path) != caller.executable:
        return False
    if entry.sha256 and not (caller.digest and caller.digest in {each.lower() for each in entry.sha256}):
        return False
    if entry.unit and entry.unit not in caller.units:
        return False
    return not entry.cgroup or any(_is_in(entry.cgroup, each) for each in caller.cgroups)


def _is_in(wanted: str, cgroup: str) -> bool:
    """In the group itself, or in one below it: whoever made that had to be in there."""
    return cgroup == wanted or cgroup.startswith(wanted.rstrip("/") + "/")
