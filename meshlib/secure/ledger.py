"""What has this CA done, and does anybody know if it was changed afterwards?

issued.jsonl, one JSON object a line, oldest first: every issue, renewal, refusal and revocation, every step of a
rotation, every token that was made, used or refused. Entries are only ever appended, and flushed before what they tell
of is handed out. Each holds the SHA-256 of the line before it (`prev`): whoever changes, removes or inserts a line in
the middle breaks the chain, and `verify` names the place. Cutting off the end breaks nothing; against that one keeps
the newest hash (`head`) somewhere else, and asks whether it is still in the chain.

Lines of earlier versions have no `prev`; the chain begins behind them. A line that a crash cut off stays, is bound into
the chain like any other, and tells nothing: what it was about to tell of was never handed out.

The file is read once, then only what was added. All methods want the caller to hold the folder's lock. With folder None
the ledger lives in memory. It does not decide anything.
"""

from __future__ import annotations

import datetime
import errno
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from . import files

NAME: Final = "issued.jsonl"
GENESIS: Final = "0" * 64

# How certificates stand, as `meshlib ca list` shows them.
VALID: Final = "valid"
EXPIRED: Final = "expired"
REVOKED: Final = "revoked"
SUPERSEDED: Final = "superseded"

Entry = dict[str, Any]

# Above twice as many as were alive the last time, the dead are forgotten.
_PRUNE: Final = 4096


@dataclass(frozen=True, slots=True)
class Chain:
    """What `verify` found: how many lines, the hash of the newest, and what is wrong where."""

    entries: int
    head: str
    faults: tuple[tuple[int, str], ...] = ()
    unchained: int = 0  # lines from before the chain began
    torn: int = 0  # lines that a crash cut off


@dataclass(slots=True)
class Ledger:
    """State of a CA's folder: what it has done, and which of its certificates may still be in use."""

    folder: Path | None
    certificates: dict[str, Entry] = field(default_factory=dict)  # by serial, the newest last
    newest: dict[str, str] = field(default_factory=dict)  # SPIFFE ID → serial
    revoked: dict[str, Entry] = field(default_factory=dict)  # by serial of the certificate
    withdrawn: dict[str, str] = field(default_factory=dict)  # SPIFFE ID → when a certificate of it was revoked last
    turns: int = 1  # how often the bundle has changed: its sequence
    token_keys: str = ""  # the hash of the keys for tokens in it
    _lines: list[bytes] = field(default_factory=list)  # in memory only
    _offset: int = 0
    _tail: bytes = b""
    _head: str = GENESIS
    _alive: int = 0

    def look(self, now: float) -> None:
        """Take in what was added since the last look, by whomever."""
        if self.folder is None:
            return
        with files.folder(self.folder) as fd:
            try:
                file = os.open(NAME, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=fd)
            except FileNotFoundError:
                return
            with os.fdopen(file, "rb") as log:
                if os.fstat(file).st_size < self._offset:
                    self._forget()
                log.seek(self._offset)
                self._take(log.read())
        if len(self.certificates) > 2 * self._alive + _PRUNE:
            self._prune(now)

    def note(self, event: str, now: float, **facts: Any) -> Entry:
        """Append an entry; when this returns, it is on the disk."""
        self.look(now)
        previous = hashlib.sha256(self._tail).hexdigest() if self._tail else self._head
        entry = {"time": moment(now), "event": event, **facts, "uid": os.getuid(), "prev": previous}
        line = json.dumps(entry, separators=(",", ":")).encode()
        if self.folder is None:
            self._lines.append(line)
            self._take(line + b"\n")
        else:
            files.append(self.folder, NAME, line)
            self.look(now)
            if self._head != hashlib.sha256(line).hexdigest():
                raise OSError(
                    errno.EIO, "the audit log did not take the line: is its disk full or broken?", str(self.folder / NAME)
                )
        return entry

    def entries(self) -> list[Entry]:
        """All of them, oldest first."""
        return [entry for line in self._all() if (entry := _parsed(line)) is not None]

    def standing_of(self, entry: Entry, now: float) -> str:
        """How the certificate of an issue or renewal stands now."""
        if entry["serial"] in self.revoked:
            return REVOKED
        if seconds(entry["not_after"]) <= now:
            return EXPIRED
        return VALID if self.newest.get(entry["spiffe_id"]) == entry["serial"] else SUPERSEDED

    def is_renewable(self, entry: Entry, now: float) -> bool:
        """May its holder have another one on this machine, also after its end? Not if its ID was taken back since.

        What has ended is on no list of revocations: so it must be younger than the last revocation of its ID, unless it
        is the ID's valid one.
        """
        state = self.standing_of(entry, now)
        return state == VALID or (state != REVOKED and entry["time"] > self.withdrawn.get(entry["spiffe_id"], ""))

    def verify(self, head: str = "") -> Chain:
        """Is every line as it was written? `head`: a hash that was noted earlier and must still be in the chain."""
        previous, faults, unchained, torn, count = GENESIS, [], 0, 0, 0
        is_chained, has_head = False, head in {"", GENESIS}
        for count, line in enumerate(self._all(), 1):
            entry = _parsed(line)
            if entry is None:
                torn += 1
            elif "prev" in entry:
                is_chained = True
                if entry["prev"] != previous:
                    faults.append((count, "it is not bound to the line before: something was changed, taken out or put in here"))
            elif is_chained:
                faults.append((count, "it has no hash, although lines before it have: it was put in"))
            else:
                unchained += 1
            previous = hashlib.sha256(line).hexdigest()
            has_head = has_head or previous == head
        if not has_head:
            faults.append((count, "the hash that was noted is not in the log: its end was cut off, or lines were changed"))
        return Chain(count, previous, tuple(faults), unchained, torn)

    # ------------------------------------------------------------------------------------------------ inside

    def _all(self) -> Iterator[bytes]:
        if self.folder is None:
            yield from self._lines
            return
        with files.folder(self.folder) as fd:
            try:
                file = os.open(NAME, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=fd)
            except FileNotFoundError:
                return
            with os.fdopen(file, "rb") as log:
                for line in log:
                    yield line.rstrip(b"\n")

    def _take(self, data: bytes) -> None:
        *lines, self._tail = data.split(b"\n")
        for line in lines:
            self._offset += len(line) + 1
            self._head = hashlib.sha256(line).hexdigest()
            entry = _parsed(line)
            if entry is not None:
                self._learn(entry)

    def _learn(self, entry: Entry) -> None:
        event, serial = entry.get("event", ""), entry.get("serial")
        if event in {"issue", "renewal"} and isinstance(serial, str) and {"spiffe_id", "not_after"} <= entry.keys():
            self.certificates[serial] = entry
            self.newest[entry["spiffe_id"]] = serial
        elif event == "revocation" and isinstance(serial, str):
            self.revoked[serial] = entry
            self.withdrawn[entry.get("spiffe_id", "")] = entry.get("time", "")
        elif event.startswith("rotation."):
            self.turns += 1
            if event == "rotation.tokens":
                self.token_keys = entry.get("keys", "")

    def _forget(self) -> None:
        self.certificates, self.newest, self.revoked, self.withdrawn = {}, {}, {}, {}
        self.turns, self.token_keys = 1, ""
        self._offset, self._tail, self._head = 0, b"", GENESIS

    def _prune(self, now: float) -> None:
        kept = set(self.newest.values())
        self.certificates = {
            serial: entry for serial, entry in self.certificates.items() if serial in kept or seconds(entry["not_after"]) > now
        }
        # A revoked certificate that has ended needs no list; its serial number is never given again.
        self.revoked = {
            serial: entry
            for serial, entry in self.revoked.items()
            if serial in self.certificates and seconds(self.certificates[serial]["not_after"]) > now
        }
        self._alive = len(self.certificates)


def moment(when: float) -> str:
    return datetime.datetime.fromtimestamp(when, datetime.UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def seconds(text: str) -> float:
    return datetime.datetime.fromisoformat(text).timestamp()


def _parsed(line: bytes) -> Entry | None:
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    return entry if isinstance(entry, dict) else None
