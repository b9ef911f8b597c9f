"""Who else could read or change this file?

Keys and trust anchors lie in folders, so the file system is part of the proof of identity. A file is opened once,
never through a symbolic link, and judged by the open descriptor: whoever swaps the path afterwards changes nothing. A
key must be readable by its owner only; a certificate or bundle may be read by all and written by nobody else; the
folder likewise, or files could be swapped. Writing goes to a temporary name first (created anew, flushed), then all
files of a set are renamed in a row: a reader finds the old or the new file, never half of one.

It does not protect against root, nor against code that runs as the same user.
"""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final, NoReturn

from ..errors import KeyFileError

# A chain of eight certificates has some 16 KiB; nothing that belongs here comes near.
LIMIT: Final = 256 * 1024

_FOLDER_FLAGS: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
# Without O_NONBLOCK the open of a named pipe would wait for a writer for ever.
_READ_FLAGS: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
_WRITE_FLAGS: Final = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


class Secret(bytes):
    """Bytes that never show themselves: not in repr, str or format, not in a pickle or a copy. Compare like bytes."""

    __slots__ = ()

    def __repr__(self) -> str:
        return f"<secret, {len(self)} bytes>"

    __str__ = __repr__

    def __format__(self, spec: str) -> str:
        return format(repr(self), spec)

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise TypeError("a secret can't be pickled or copied: hand on the path of its file instead")


@contextmanager
def folder(path: str | os.PathLike[str]) -> Iterator[int]:
    """The descriptor of a folder in which nobody else can rename or create files; files are opened relative to it."""
    try:
        fd = os.open(path, _FOLDER_FLAGS)
    except OSError as error:
        raise _unopened(Path(path), error) from error
    try:
        found = os.fstat(fd)
        _refuse_foreign(Path(path), found, "folder")
        if found.st_mode & 0o022:
            raise KeyFileError(
                f"the folder {path} may be changed by other users (mode {stat.S_IMODE(found.st_mode):04o}):"
                " they could swap the files in it.",
                hint=f"Take the right away: chmod go-w {path}",
            )
        yield fd
    finally:
        os.close(fd)


def read_secret(fd: int, where: Path, name: str) -> Secret:
    """The content of a file that only its owner may open; anything else is a KeyFileError."""
    return Secret(_read(fd, where, name, 0o077, "opened"))


def read_public(fd: int, where: Path, name: str) -> bytes:
    """The content of a file that only its owner may change; anything else is a KeyFileError."""
    return _read(fd, where, name, 0o022, "changed")


def write(where: str | os.PathLike[str], files: Sequence[tuple[str, bytes, int]]) -> None:
    """Put (name, content, mode) into the folder: all are written and flushed first, then renamed in the order given."""
    staged: list[tuple[str, str]] = []
    with folder(where) as fd:
        try:
            for name, content, mode in files:
                temporary = f".{name}.{secrets.token_hex(8)}"
                file = os.open(temporary, _WRITE_FLAGS, 0o600, dir_fd=fd)
                staged.append((temporary, name))
                try:
                    os.fchmod(file, mode)
                    rest = memoryview(content)
                    while rest:
                        rest = rest[os.write(file, rest) :]
                    os.fsync(file)
                finally:
                    os.close(file)
            while staged:
                os.rename(*staged[0], src_dir_fd=fd, dst_dir_fd=fd)
                staged.pop(0)
            os.fsync(fd)
        finally:
            for temporary, _ in staged:
                _remove(fd, temporary)


def append(where: str | os.PathLike[str], name: str, line: bytes) -> None:
    """Add one line to a private log and flush it; a line that was cut off by a crash is closed first."""
    with folder(where) as fd:
        file = os.open(name, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=fd)
        try:
            size = os.fstat(file).st_size
            torn = size > 0 and os.pread(file, 1, size - 1) != b"\n"
            os.write(file, (b"\n" if torn else b"") + line + b"\n")
            os.fsync(file)
        finally:
            os.close(file)


def remove(where: str | os.PathLike[str], name: str) -> None:
    """Take a file out of the folder, if it is there."""
    with folder(where) as fd:
        _remove(fd, name)
        os.fsync(fd)


def make_private(path: str | os.PathLike[str]) -> Path:
    """Make a folder that is ours alone (0700), with its parents; one that is there must not be changeable by others."""
    where = Path(path)
    try:
        where.parent.mkdir(parents=True, exist_ok=True)
        where.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise _unopened(where, error) from error
    with folder(where):
        return where


@contextmanager
def locked(path: str | os.PathLike[str]) -> Iterator[None]:
    """Alone in the folder among those who ask, in this process and in others, until the block ends."""
    with folder(path) as fd:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield


def _read(fd: int, where: Path, name: str, forbidden: int, verb: str) -> bytes:
    path = where / name
    try:
        file = os.open(name, _READ_FLAGS, dir_fd=fd)
    except OSError as error:
        raise _unopened(path, error) from error
    try:
        found = os.fstat(file)
        if not stat.S_ISREG(found.st_mode):
            raise KeyFileError(f"{path} is not a regular file.", hint="Put the PEM file itself there.")
        _refuse_foreign(path, found, "file")
        if found.st_mode & forbidden:
            mode = 0o600 if forbidden & 0o044 else 0o644
            raise KeyFileError(
                f"{path} may be {verb} by other users of this machine (mode {stat.S_IMODE(found.st_mode):04o}).",
                hint=f"Take the right away: chmod {mode:o} {path}"
                + ("; if others have used this machine meanwhile, issue a new key." if forbidden & 0o044 else ""),
            )
        parts = []
        left = LIMIT + 1
        while left > 0 and (part := Secret(os.read(file, left))):
            parts.append(part)
            left -= len(part)
        if left <= 0:
            raise KeyFileError(f"{path} is larger than {LIMIT // 1024} KiB.", hint="It should hold PEM text and nothing else.")
        return b"".join(parts)
    finally:
        os.close(file)


def _refuse_foreign(path: Path, found: os.stat_result, kind: str) -> None:
    if found.st_uid not in (os.geteuid(), 0):
        raise KeyFileError(
            f"the {kind} {path} belongs to user {found.st_uid}, and this process runs as user {os.geteuid()}.",
            hint=f"Only oneself or root may own it: chown {os.geteuid()} {path}, or run as its owner.",
        )


def _unopened(path: Path, error: OSError) -> KeyFileError:
    if error.errno == errno.ENOENT:
        return KeyFileError(
            f"{path} does not exist.",
            hint="Is the folder right? `meshlib ca issue` writes svid.pem, key.pem and bundle.pem for a service.",
        )
    if error.errno == errno.ELOOP:
        return KeyFileError(
            f"{path} is a symbolic link.",
            hint="Links are not followed, since they can be turned: put the file itself there.",
        )
    if error.errno in (errno.EACCES, errno.EPERM):
        return KeyFileError(
            f"{path} may not be read by user {os.geteuid()}.",
            hint=f"Give it to the service's user: chown {os.geteuid()} {path}",
        )
    return KeyFileError(f"{path} can't be opened: {error.strerror}.", hint="Check the path and the file system.")


def _remove(fd: int, name: str) -> None:
    with suppress(FileNotFoundError):
        os.unlink(name, dir_fd=fd)
