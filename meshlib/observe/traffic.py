"""Who called what, so that a policy can be made of it?

Where `secure.record` is on, the gate counts calls by caller, method, path and verdict, and the keeper brings them here every few
seconds. They are added up and written to a folder, one file for each process, a line of JSON for each kind of call:

    {"peer": "spiffe://…/storefront", "method": "GET", "template": "/items/{id}", "protocol": "http", "verdict": "allow",
     "issuer": "", "count": 812, "first": 1778320000.0, "last": 1778323600.0}

A path is written as the template of its route in mesh.yaml, or with `{id}` for segments that are numbers, UUIDs or long hex; so what a
person bought or read is not in the file, nor is any query, header, token or body. Of a token only its issuer is kept. `verdict` is
`allow`, `would_deny` (the rules said no, and the mode let it pass) or `deny` (it was refused).

A line holds the count of its process so far, so that the last line for a kind counts and a torn one loses nothing. A file that has grown
to `LARGEST` is written anew with one line for each kind; kinds and files are bounded, and what finds no place is counted as lost. A folder
that can't be written is told once, and tried again: calls go on. `meshlib suggest` reads all files of the folder.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

logger = logging.getLogger("meshlib.observe")

VERSION: Final = 1
LARGEST: Final = 1024 * 1024
MOST_KINDS: Final = 10_000
MOST_FILES: Final = 100
# Of one file when it is read. A larger one was not written here.
MOST_BYTES: Final = 64 * 1024 * 1024
ENDING: Final = ".jsonl"

ALLOW: Final = "allow"
WOULD_DENY: Final = "would_deny"
DENY: Final = "deny"
VERDICTS: Final = (ALLOW, WOULD_DENY, DENY)

_NUMBER: Final = re.compile(r"[0-9]+\Z")
_UUID: Final = re.compile(r"[0-9a-fA-F]{8}-(?:[0-9a-fA-F]{4}-){3}[0-9a-fA-F]{12}\Z")
# A word can be made of the letters a to f; with a digit among them it is none.
_HEX: Final = re.compile(r"(?=[a-fA-F]*[0-9])[0-9a-fA-F]{8,}\Z")
_FLAGS: Final = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC | getattr(os, "O_NOFOLLOW", 0)


@dataclass(frozen=True, slots=True, order=True)
class Kind:
    """Calls that are counted as the same. `path` is a template if `is_template`, and literal otherwise, braces and all."""

    peer: str
    method: str
    path: str
    is_template: bool
    protocol: str
    verdict: str
    issuer: str


@dataclass(frozen=True, slots=True)
class Observed:
    """How often calls of a kind came to a service, and when first and last (Unix time)."""

    service: str
    kind: Kind
    count: int
    first: float
    last: float

    @property
    def is_served(self) -> bool:
        """True if the application got these calls."""
        return self.kind.verdict != DENY


def templated(path: str) -> tuple[str, bool]:
    """A path with `{id}` for its segments that are names of single things, and whether there are any."""
    segments, found = path.split("/"), 0
    for place, segment in enumerate(segments):
        if is_id(segment):
            found += 1
            segments[place] = "{id}" if found == 1 else f"{{id{found}}}"
    # Braces that came with the path would look like a variable.
    if not found or "{" in path or "}" in path:
        return path, False
    return "/".join(segments), True


def is_id(segment: str) -> bool:
    """Does this part of a path name a single thing: is it a number, a UUID or long hex?"""
    return bool(_NUMBER.match(segment) or _UUID.match(segment) or _HEX.match(segment))


# ---------------------------------------------------------------------- writing


@dataclass(slots=True)
class _Count:
    count: int
    first: float
    last: float
    is_written: bool = False


class Recorder:
    """Adds up what the gate saw, and writes it down. State of the process; used by the keeper, and at the end by whoever closes.

    `issuers` are those of the providers of tokens in the configuration: a principal is "issuer/subject", and only what comes before
    the subject is kept.
    """

    def __init__(
        self,
        folder: Path,
        service: str,
        *,
        issuers: Sequence[str] = (),
        wall: Callable[[], float] = time.time,
        largest: int = LARGEST,
    ) -> None:
        self.folder = folder
        self.service = service
        self._issuers = sorted(issuers, key=len, reverse=True)
        self._wall = wall
        self._largest = largest
        self.error = ""  # why nothing can be written; "" when it can
        self._begin()

    def _begin(self) -> None:
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._counts: dict[Kind, _Count] = {}
        self._lost = self._lost_written = 0
        self._file: Path | None = None
        self._written = 0

    def take(self, rows: Iterable[Mapping[str, Any]], lost: int, mode: str) -> None:
        """Add what the gate saw since the last time (`gate.traffic()`), under the mode that was in force."""
        if os.getpid() != self._pid:
            # What the parent saw is the parent's to tell.
            self._begin()
        with self._lock:
            self._lost += lost
            for row in rows:
                self._add(self._kind(row, mode), int(row["count"]))

    def _add(self, kind: Kind, count: int) -> None:
        known, now = self._counts.get(kind), self._wall()
        if known is not None:
            known.count += count
            known.last, known.is_written = now, False
        elif len(self._counts) < MOST_KINDS:
            self._counts[kind] = _Count(count, now, now)
        else:
            self._lost += count

    def flush(self) -> None:
        """Write what has changed. Never raises for a folder that can't be written."""
        with self._lock:
            self._flush()

    def _flush(self) -> None:
        changed = {kind: count for kind, count in self._counts.items() if not count.is_written}
        if not changed and self._lost == self._lost_written:
            return
        try:
            if self._file is None or self._written > self._largest:
                self._write_anew()
            else:
                self._append(self._file, self._lines(changed))
        except OSError as error:
            if self._file is not None:
                # Half a line may stand there, or somebody has tidied up: everything is written again.
                self._written = self._largest + 1
            text = f"{error.strerror or error} ({error.filename or self.folder})"
            if text != self.error:
                logger.error("the record of calls can't be written: %s; calls go on, and are kept in memory", text)
            self.error = text
            return
        if self.error:
            logger.info("the record of calls is written again")
        self.error = ""
        for count in changed.values():
            count.is_written = True
        self._lost_written = self._lost

    def _kind(self, row: Mapping[str, Any], mode: str) -> Kind:
        peer, protocol, route = str(row["peer"]), str(row["protocol"]), str(row["route"])
        if protocol == "grpc":
            path, is_template = str(row["path"]), False
        elif "{" in route:
            path, is_template = route, True
        else:
            path, is_template = templated(str(row["path"]))
        if mode == "enforce":
            # There, nobody gets in without an identity, whatever a rule says.
            verdict = ALLOW if row["verdict"] == ALLOW and peer else DENY
        else:
            verdict = ALLOW if row["verdict"] == ALLOW else WOULD_DENY
        return Kind(peer, str(row["method"]), path, is_template, protocol, verdict, self._issuer(str(row["principal"])))

    def _issuer(self, principal: str) -> str:
        return next((issuer for issuer in self._issuers if principal.startswith(f"{issuer}/")), "")

    def _lines(self, counts: Mapping[Kind, _Count]) -> bytes:
        lines = [_line(kind, count) for kind, count in counts.items()]
        if self._lost:
            lines.append({"lost": self._lost})
        return b"".join(json.dumps(line, separators=(",", ":")).encode() + b"\n" for line in lines)

    def _append(self, file: Path, data: bytes) -> None:
        # Opened each time: the folder may be another by now, and a descriptor would keep a deleted file alive.
        descriptor = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC | getattr(os, "O_NOFOLLOW", 0))
        try:
            _write(descriptor, data)
        finally:
            os.close(descriptor)
        self._written += len(data)

    def _write_anew(self) -> None:
        """The whole record of this process, in place of what is there."""
        self.folder.mkdir(parents=True, mode=0o700, exist_ok=True)
        file = self._file or self.folder / f"{self.service}.{time.time_ns():x}.{self._pid}{ENDING}"
        head = {"version": VERSION, "service": self.service, "pid": self._pid, "since": self._wall()}
        data = json.dumps(head).encode() + b"\n" + self._lines(self._counts)
        temporary = file.with_suffix(f".{self._pid}.tmp")
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()
        descriptor = os.open(temporary, _FLAGS, 0o600)
        try:
            _write(descriptor, data)
        except OSError:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise
        finally:
            os.close(descriptor)
        temporary.rename(file)
        if self._file is None:
            self._tidy(file)
        # Of a record that is large even so, not every flush is to write it anew.
        self._file, self._written = file, min(len(data), self._largest // 2)

    def _tidy(self, own: Path) -> None:
        """The files of the service's earlier processes: the oldest go, beyond so many. Their names begin with the time."""
        files = sorted(self.folder.glob(f"{self.service}.*{ENDING}"))
        for file in files[: max(0, len(files) - MOST_FILES)]:
            if file != own:
                with contextlib.suppress(OSError):
                    file.unlink()


def _line(kind: Kind, count: _Count) -> dict[str, Any]:
    return {
        "peer": kind.peer,
        "method": kind.method,
        "template" if kind.is_template else "path": kind.path,
        "protocol": kind.protocol,
        "verdict": kind.verdict,
        "issuer": kind.issuer,
        "count": count.count,
        "first": round(count.first, 3),
        "last": round(count.last, 3),
    }


def _write(descriptor: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(descriptor, rest) :]


# ---------------------------------------------------------------------- reading


@dataclass(slots=True)
class Record:
    """What the files of one or several folders hold, added up. `lost`: calls that found no place; `flaws`: files left out, and why."""

    rows: list[Observed] = field(default_factory=list)
    files: int = 0
    lost: int = 0
    flaws: list[str] = field(default_factory=list)


def read(folders: Iterable[Path], since: float = 0.0) -> Record:
    """All records in these folders, in a fixed order. What was last seen before `since` (Unix time) is left out.

    Raises OSError for a folder that can't be read.
    """
    record = Record()
    sums: dict[tuple[str, Kind], Observed] = {}
    for folder in folders:
        for file in sorted(entry for entry in folder.iterdir() if entry.suffix == ENDING):
            try:
                service, counts, lost = _read(file)
            except (OSError, ValueError) as error:
                record.flaws.append(f"{file}: {error}")
                continue
            record.files += 1
            record.lost += lost
            for kind, count in counts.items():
                if count.last >= since:
                    _add(sums, Observed(service, kind, count.count, count.first, count.last))
    record.rows = [sums[key] for key in sorted(sums)]
    return record


def _add(sums: dict[tuple[str, Kind], Observed], row: Observed) -> None:
    key = (row.service, row.kind)
    known = sums.get(key)
    if known is not None:
        first, last = min(known.first, row.first), max(known.last, row.last)
        row = Observed(row.service, row.kind, known.count + row.count, first, last)
    sums[key] = row


def _read(file: Path) -> tuple[str, dict[Kind, _Count], int]:
    if file.stat().st_size > MOST_BYTES:
        raise ValueError(f"it is larger than {MOST_BYTES // 1024 // 1024} MiB, so that meshlib didn't write it")
    head, *lines = file.read_bytes().split(b"\n")
    try:
        said = json.loads(head)
        service, version = str(said["service"]), said["version"]
    except (ValueError, TypeError, KeyError):
        raise ValueError("it doesn't begin as a record of calls does") from None
    if version != VERSION:
        raise ValueError(f"it is of version {version}, and this meshlib reads version {VERSION}: use the one that wrote it")
    counts: dict[Kind, _Count] = {}
    lost = 0
    # The last piece is empty, or a line that its process had no time to end.
    for line in lines[:-1]:
        try:
            row = json.loads(line)
            if "lost" in row:
                lost = int(row["lost"])
                continue
            kind, count = _parsed(row)
        except (ValueError, TypeError, KeyError):
            continue  # torn in the middle of the file: a later line says it again
        counts[kind] = count
    return service, counts, lost


def _parsed(row: Mapping[str, Any]) -> tuple[Kind, _Count]:
    is_template = "template" in row
    words = [str(row[key]) for key in ("peer", "method", "template" if is_template else "path", "protocol", "verdict", "issuer")]
    if words[4] not in VERDICTS:
        raise ValueError(words[4])
    kind = Kind(words[0], words[1], words[2], is_template, *words[3:])
    return kind, _Count(int(row["count"]), float(row["first"]), float(row["last"]))
