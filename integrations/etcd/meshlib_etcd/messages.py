"""What does etcd's JSON gateway say, and is it what it should be?

Protocol buffers in JSON: numbers of 64 bits are texts, bytes are base64, and what is zero or empty is left out. Nothing of it
is taken on trust: another program may listen at the port, a proxy may answer in etcd's place, an answer may end in the middle.
Every reader here gives what it promises or raises `EtcdError`, and nothing else. Sizes are bounded by whoever reads the wire
(`client.py`).
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

# Codes of gRPC, as the gateway passes them on.
INVALID, NOT_FOUND, DENIED, PRECONDITION, UNAVAILABLE, UNAUTHENTICATED = 3, 5, 7, 9, 14, 16
LARGEST: Final = 2**63 - 1
# Codes with which etcd says no to this very question. The others say that it can't answer just now, or nothing.
_REFUSALS: Final = frozenset({INVALID, NOT_FOUND, DENIED, PRECONDITION, UNAUTHENTICATED})
# Of HTTP, likewise: these two ask for patience.
_BUSY: Final = frozenset({408, 429})


class EtcdError(ConnectionError):
    """etcd doesn't know, doesn't answer, or answers what it can't mean. `code` is that of gRPC, 0 where etcd gave none.

    `is_refusal`: etcd lives, and has answered so for a reason that lies in this question.
    """

    def __init__(self, message: str, *, code: int = 0, is_refusal: bool = False) -> None:
        super().__init__(message)
        self.message = message
        self.code = code
        self.is_refusal = is_refusal or code in _REFUSALS

    def __str__(self) -> str:
        return self.message


class TooLarge(EtcdError):
    """An answer that is longer than what is read of one."""


class Compacted(EtcdError):
    """The history that was asked for is gone; what is true now can be asked for."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A key with its value, as of `revision`."""

    key: bytes
    value: bytes
    revision: int
    lease: int = 0


@dataclass(frozen=True, slots=True)
class Event:
    """What became of a key; `value` is None when it was deleted."""

    key: bytes
    value: bytes | None
    revision: int


@dataclass(frozen=True, slots=True)
class Page:
    """A part of a range, as of `revision` of the whole store."""

    revision: int
    entries: tuple[Entry, ...]
    has_more: bool


@dataclass(frozen=True, slots=True)
class Batch:
    """One word of a watch. Without events it says that there were none up to `revision`."""

    revision: int
    events: tuple[Event, ...] = ()
    is_created: bool = False


def text_of(value: bytes) -> str:
    """Bytes as the gateway wants them."""
    return base64.b64encode(value).decode("ascii")


def end_of(prefix: bytes) -> bytes:
    """The end of the range of all keys that begin so."""
    kept = prefix.rstrip(b"\xff")
    return kept[:-1] + bytes((kept[-1] + 1,)) if kept else b"\0"


def read_object(body: bytes) -> Mapping[str, Any]:
    """A JSON object."""
    try:
        found = json.loads(body.decode("utf-8"))
    except (ValueError, RecursionError):
        raise EtcdError(_odd("no JSON")) from None
    return _object(found, "no object")


def read_error(status: int, body: bytes) -> EtcdError:
    """Why the gateway refused. A proxy in between may have answered: then only the status is known."""
    try:
        said = read_object(body)
        return error_of(said, f"HTTP status {status}")
    except EtcdError:
        return EtcdError(
            f"etcd's gateway answered with HTTP status {status}.",
            code=UNAVAILABLE if status >= 500 else 0,
            is_refusal=400 <= status < 500 and status not in _BUSY,
        )


def error_of(said: Mapping[str, Any], otherwise: str) -> EtcdError:
    code = said.get("code", said.get("grpc_code"))
    text = said.get("message", said.get("error"))
    shown = shortened(text) if isinstance(text, str) and text else otherwise
    known = code if isinstance(code, int) and not isinstance(code, bool) and 0 <= code <= 16 else 0
    kind = Compacted if "compacted" in shown else EtcdError
    return kind(f"etcd refused: {shown}.", code=known)


def read_page(body: bytes) -> Page:
    """The answer to a range."""
    said = read_object(body)
    entries = tuple(_entry(each) for each in _list(said, "kvs"))
    return Page(revision_of(said), entries, _flag(said, "more"))


def read_batch(line: bytes) -> Batch:
    """One line of a watch. Raises when etcd ended it, too."""
    result = read_result(line)
    if _flag(result, "canceled"):
        if number(result, "compact_revision"):
            raise Compacted("etcd ended the watch: what it would tell next was compacted away.")
        reason = result.get("cancel_reason")
        why = shortened(reason) if isinstance(reason, str) and reason else "it gave no reason"
        raise EtcdError(f"etcd ended the watch: {why}.", code=DENIED if "permission denied" in why else 0)
    events = tuple(_event(each) for each in _list(result, "events"))
    return Batch(revision_of(result), events, _flag(result, "created"))


def read_result(line: bytes) -> Mapping[str, Any]:
    """What stands in one line of a stream."""
    said = read_object(line)
    if "error" in said:
        raise error_of(said["error"] if isinstance(said["error"], dict) else said, "it gave no reason")
    return _object(said.get("result"), "no result")


def revision_of(said: Mapping[str, Any]) -> int:
    found = number(_object(said.get("header"), "no header"), "revision")
    if not found:
        # The first revision of an empty store is 1: without one, this is no answer of a store.
        raise EtcdError(_odd("no revision"))
    return found


def number(said: Mapping[str, Any], name: str) -> int:
    """A number of 64 bits; 0 where it is left out."""
    found = said.get(name, 0)
    if isinstance(found, str) and found.isascii() and found.isdigit() and len(found) <= 19:
        found = int(found)
    if isinstance(found, bool) or not isinstance(found, int) or not 0 <= found <= LARGEST:
        raise EtcdError(_odd(f"no number in {name}"))
    return found


def shortened(text: str) -> str:
    """A text of somebody else's as a log may have it."""
    return "".join(char if char.isprintable() else "?" for char in text[:200]).rstrip(". ")


def _entry(each: Any) -> Entry:
    said = _object(each, "an entry that is no object")
    key = _bytes(said, "key")
    if not key:
        raise EtcdError(_odd("an entry without a key"))
    return Entry(key, _bytes(said, "value"), number(said, "mod_revision"), number(said, "lease"))


def _event(each: Any) -> Event:
    said = _object(each, "an event that is no object")
    entry = _entry(said.get("kv"))
    kind = said.get("type", "PUT")
    if kind not in ("PUT", "DELETE"):
        raise EtcdError(_odd("an event of an unknown type"))
    if not entry.revision:
        raise EtcdError(_odd("an event without a revision"))
    return Event(entry.key, None if kind == "DELETE" else entry.value, entry.revision)


def _object(found: Any, what: str) -> Mapping[str, Any]:
    if not isinstance(found, dict):
        raise EtcdError(_odd(what))
    return found


def _list(said: Mapping[str, Any], name: str) -> list[Any]:
    found = said.get(name, [])
    if not isinstance(found, list):
        raise EtcdError(_odd(f"no list in {name}"))
    return found


def _flag(said: Mapping[str, Any], name: str) -> bool:
    found = said.get(name, False)
    if not isinstance(found, bool):
        raise EtcdError(_odd(f"neither true nor false in {name}"))
    return found


def _bytes(said: Mapping[str, Any], name: str) -> bytes:
    found = said.get(name, "")
    if not isinstance(found, str):
        raise EtcdError(_odd(f"no bytes in {name}"))
    try:
        return base64.b64decode(found, validate=True)
    except (binascii.Error, ValueError):
        raise EtcdError(_odd(f"no base64 in {name}")) from None


def _odd(what: str) -> str:
    return f"what answers is not etcd's gateway, or is broken: {what}. Check the URL, and what stands between."
