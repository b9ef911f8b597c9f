"""What does an enrolled service keep on its disk, and what do a crash or a full disk cost it?

Nothing. svid.pem, key.pem, bundle.pem and crl.pem lie in `state`/<service>, as `meshlib ca issue` writes them. Four files can't
be replaced at once, and the key of one certificate beside another is the end of both; so what was won is put down under one
name first, which commits it, and then taken apart. What can't be written is held in memory and tried again at every look.

Several processes may share the folder: `turn` says whose turn it is to ask the CA, and who has nothing yet waits for it. The
lock is the folder's, so it ends with the process that holds it. Whether what lies here is any good is judged by who reads it.
"""

from __future__ import annotations

import datetime
import fcntl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final, NamedTuple

from ..errors import KeyFileError
from . import files
from .files import Secret
from .identity import Identity
from .roots import read_certificate

_WHOLE: Final = "renewed.pem"
_DIVIDER: Final = b"# the roots to trust\n"
_BEGIN_CHAIN: Final = b"-----BEGIN CERTIFICATE-----"
# There is no wait for a lock that ends by itself.
_LOOK_AGAIN: Final = 0.05


class _Held(NamedTuple):
    """An identity, and how it is put down: key, chain and roots in one text, the revocations beside it."""

    identity: Identity
    text: Secret
    crl: bytes


class Kept:
    """State of a folder: what an enrolled service has won. `trouble` says why something of it isn't on the disk."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.trouble = ""
        self._held: _Held | None = None

    @property
    def held(self) -> Identity | None:
        """What is newer than the files, and could not be written."""
        return self._held.identity if self._held is not None else None

    @property
    def end(self) -> datetime.datetime | None:
        """When the certificate in the folder ends; None if there is none."""
        if not (self.path / "svid.pem").exists():
            return None
        with files.folder(self.path) as fd:
            return read_certificate(fd, self.path, "svid.pem").not_valid_after_utc

    def put(self, identity: Identity, key: bytes, bundle: bytes, crl: bytes) -> None:
        """A new pair, with the roots and revocations of the moment."""
        self._hold(identity, key, bundle, crl)
        self.write_down()

    def put_trust(self, identity: Identity, bundle: bytes, crl: bytes) -> None:
        """Other roots and revocations; they count, whether or not they can be written."""
        try:
            files.write(self.path, [("bundle.pem", bundle, 0o644), *_crl_file(crl)])
        except OSError as error:
            self._hold(identity, identity.key, bundle, crl)
            self._note(error)

    def write_down(self) -> None:
        """Whatever is not on the disk yet, or not in its files."""
        try:
            if self._held is not None and not self._is_overtaken(self._held.identity):
                files.write(self.path, [(_WHOLE, self._held.text, 0o600), *_crl_file(self._held.crl)])
            self._take_apart()
        except (OSError, KeyFileError) as error:
            self._note(error)
        else:
            self._held, self.trouble = None, ""

    @contextmanager
    def turn(self, patience: float = 0.0) -> Iterator[bool]:
        """Whether it is our turn to ask: no other process of this folder does, or it ended within so many seconds."""
        with files.folder(self.path) as fd:
            if not _is_locked(fd, patience):
                yield False
                return
            try:
                yield True
            finally:
                fcntl.flock(fd, fcntl.LOCK_UN)  # a child that was forked meanwhile has the descriptor, too

    def _hold(self, identity: Identity, key: bytes, bundle: bytes, crl: bytes) -> None:
        self._held = _Held(identity, Secret(key + identity.chain + _DIVIDER + bundle), crl)

    def _is_overtaken(self, identity: Identity) -> bool:
        """By another process, whose disk was not full."""
        try:
            end = self.end
        except KeyFileError:
            return False
        return end is not None and end.timestamp() > identity.not_after

    def _take_apart(self) -> None:
        """What was put down as a whole becomes files; a crash in between is made good at the next look."""
        if not (self.path / _WHOLE).exists():
            return
        with files.folder(self.path) as fd:
            whole = files.read_secret(fd, self.path, _WHOLE)
        pair, _, bundle = whole.partition(_DIVIDER)
        key, begin, rest = pair.partition(_BEGIN_CHAIN)
        files.write(self.path, [("bundle.pem", bundle, 0o644), ("key.pem", key, 0o600), ("svid.pem", begin + rest, 0o644)])
        files.remove(self.path, _WHOLE)

    def _note(self, error: Exception) -> None:
        self.trouble = f"the identity can't be kept in {self.path}, and ends with this process: {error}"


def _is_locked(fd: int, patience: float) -> bool:
    end = time.monotonic() + patience
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            if time.monotonic() >= end:
                return False
            time.sleep(_LOOK_AGAIN)
        else:
            return True


def _crl_file(crl: bytes) -> list[tuple[str, bytes, int]]:
    return [("crl.pem", crl, 0o644)] if crl else []
