"""What stands in the bytes of an X509SVIDResponse?

A reader of one protobuf message, by hand: the library needs no protobuf for the one message that it reads. It is stricter than
protobuf. Fields that nobody here knows are passed over, as they must be, but for those in an entry of a map; a known one with another
type, one that comes twice where there is one, text that isn't UTF-8, a length that points beyond the end, a number that is too long: all
of it means that the message isn't what it seems, and it is discarded as a whole. What isn't in a message is empty, and never what was
there before.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

from ...errors import IdentityError

# Bytes of a message; an identity has some thousands.
LONGEST: Final = 4 * 1024 * 1024

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_LAST_NUMBER: Final = 2**29 - 1


@dataclass(frozen=True, slots=True)
class Svid:
    """One identity of a message; what it lacks is empty."""

    spiffe_id: str = ""
    x509_svid: bytes = field(default=b"", repr=False)
    x509_svid_key: bytes = field(default=b"", repr=False)
    bundle: bytes = field(default=b"", repr=False)
    hint: str = ""


@dataclass(frozen=True, slots=True)
class Response:
    """A whole message."""

    svids: tuple[Svid, ...] = ()
    crl: tuple[bytes, ...] = field(default=(), repr=False)
    federated_bundles: dict[str, bytes] = field(default_factory=dict, repr=False)


class _Flaw(Exception):  # becomes an IdentityError, with the same words for every flaw of one kind
    pass


def response_of(data: bytes) -> Response:
    """The message, or IdentityError; its content is never quoted."""
    try:
        if len(data) > LONGEST:
            raise _Flaw("it is too long")
        svids, crls, federated = list[Svid](), list[bytes](), dict[str, bytes]()
        for number, value in _fields(data, {1, 2, 3}):
            if number == 1:
                svids.append(_svid(value))
            elif number == 2:
                crls.append(value)
            elif number == 3:
                name, bundle = _pair(value)
                if name in federated:
                    raise _Flaw("it names one trust domain twice")
                federated[name] = bundle
    except _Flaw as flaw:
        raise IdentityError(
            f"a message of the Workload API can't be read, and was discarded: {flaw}.",
            hint="The agent sent something that the standard doesn't allow: see its log, and its version.",
        ) from None
    return Response(tuple(svids), tuple(crls), federated)


def _svid(data: bytes) -> Svid:
    found = _once(data, {1, 2, 3, 4, 5})
    return Svid(_text(found.get(1)), found.get(2, b""), found.get(3, b""), found.get(4, b""), _text(found.get(5)))


def _pair(data: bytes) -> tuple[str, bytes]:
    """An entry of a map: those never grow, and protobuf drops one in which it finds anything else."""
    found = _once(data, {1, 2}, may_grow=False)
    name = _text(found.get(1))
    if not name:
        raise _Flaw("it names no trust domain for a bundle")
    return name, found.get(2, b"")


def _once(data: bytes, known: set[int], *, may_grow: bool = True) -> dict[int, bytes]:
    found: dict[int, bytes] = {}
    for number, value in _fields(data, known, may_grow=may_grow):
        if number in found:
            raise _Flaw("a field comes twice")
        found[number] = value
    return found


def _text(data: bytes | None) -> str:
    try:
        return (data or b"").decode()
    except UnicodeDecodeError:
        raise _Flaw("a text is not UTF-8") from None


def _fields(data: bytes, known: set[int], *, may_grow: bool = True) -> Iterator[tuple[int, bytes]]:
    """The known fields, all of which hold bytes, in their order."""
    at, end = 0, len(data)
    while at < end:
        tag, at = _varint(data, at)
        number, kind = tag >> 3, tag & 7
        if not 1 <= number <= _LAST_NUMBER:
            raise _Flaw("a field has no number")
        if number not in known and not may_grow:
            raise _Flaw("it has a field that can't be there")
        if number in known and kind != _BYTES:
            raise _Flaw("a field is of another type")
        if kind == _VARINT:
            _, at = _varint(data, at)
        elif kind == _BYTES:
            length, at = _varint(data, at)
            if length > end - at:
                raise _Flaw("it is cut off")
            if number in known:
                yield number, data[at : at + length]
            at += length
        elif kind in {_FIXED64, _FIXED32}:
            at += 8 if kind == _FIXED64 else 4
            if at > end:
                raise _Flaw("it is cut off")
        else:
            raise _Flaw("a field is of no type that there is")


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            raise _Flaw("it is cut off")
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            if value >= 2**64:
                break
            return value, at
    raise _Flaw("a number is too long")
