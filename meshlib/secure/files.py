"""Who else could read or change this file?

Keys and trust anchors lie in folders, so the file system is part of the proof of identity. A file is opened once,
never through a symbolic link, and judged by the open descriptor: whoever swaps the path afterwards changes nothing. A
key must be readable by its owner only; a certificate or bundle may be read by all and written by nobody else; the
folder likewise, or files could be swapped. Writing goes to a temporary name first (created anew, flushed), then all
files of a set are renamed in a row: a reader finds the old or the new file, never half of one.

Orchestrators hand over files in their own ways, and two of them are taken. Where the caller says so (`may_group`), a
key may be readable by a group that this process is in: so does Kubernetes for `fsGroup`, and Docker for secrets with a
gid. And a `mount` is read through its links, which is how Kubernetes swaps all files at once: links count as long as
they stay inside the mount, and every folder and link on the way belongs to us or to root. A link that was followed once
leads to the same place until the mount is left, so that what is read together was written together.

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
# Steps on the way through a mount. Kubernetes takes three: the name, ..data, the folder of that moment.
_MOST_STEPS: Final = 40
# Where orchestrators put secrets, besides what systemd tells in the environment.
_SECRET_FOLDERS: Final = ("/run/secrets", "/var/run/secrets")


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
        _refuse_open_folder(Path(path), found)
        yield fd
    finally:
        os.close(fd)


def names(fd: int) -> list[str]:
    """What lies in an open folder, sorted."""
    return sorted(os.listdir(fd))


def read_secret(fd: int, where: Path, name: str, *, may_group: bool = False) -> Secret:
    """The content of a file that only its owner may open, or with `may_group` our own group; else a KeyFileError."""
    return Secret(_taken(_opened(fd, where, name), where / name, is_secret=True, may_group=may_group))


def read_public(fd: int, where: Path, name: str) -> bytes:
    """The content of a file that only its owner may change; anything else is a KeyFileError."""
    return _taken(_opened(fd, where, name), where / name, is_secret=False)


class Mount:
    """A folder that somebody else fills: files are read through links, which are followed once and stay inside."""

    __slots__ = ("_fd", "_links", "where")

    def __init__(self, fd: int, where: Path) -> None:
        self.where = where
        self._fd = fd
        # What was read of a link, by its folder and name: the same for all files that are read together.
        self._links: dict[tuple[int, int, str], str] = {}

    def read_secret(self, name: str) -> Secret:
        """The content of a file that nobody may open but its owner and our own group; else a KeyFileError."""
        return Secret(_taken(self._reach(name), self.where / name, is_secret=True, may_group=True))

    def read_public(self, name: str) -> bytes:
        """The content of a file that only its owner may change; else a KeyFileError."""
        return _taken(self._reach(name), self.where / name, is_secret=False)

    def _reach(self, name: str) -> int:
        """The descriptor of the file that a name leads to."""
        path = self.where / name
        rest, folders, steps = name.split("/")[::-1], [os.dup(self._fd)], 0
        try:
            while True:
                steps += 1
                if not rest or steps > _MOST_STEPS:
                    raise KeyFileError(f"{path} leads to no file.", hint="Its links go round in circles, or end in a folder.")
                part, here = rest.pop(), folders[-1]
                if part in {"", "."}:
                    continue
                if part == "..":
                    if len(folders) == 1:
                        raise _left(path)
                    os.close(folders.pop())
                    continue
                found = os.stat(part, dir_fd=here, follow_symlinks=False)
                _refuse_foreign(path, found, "link" if stat.S_ISLNK(found.st_mode) else "file")
                if stat.S_ISLNK(found.st_mode):
                    rest += self._target(part, here, path).split("/")[::-1]
                elif rest:
                    folders.append(os.open(part, _FOLDER_FLAGS | os.O_NOFOLLOW, dir_fd=here))
                    _refuse_open_folder(path.parent, os.fstat(folders[-1]), is_mount=True)
                else:
                    return os.open(part, _READ_FLAGS, dir_fd=here)
        except OSError as error:
            raise _unopened(path, error) from error
        finally:
            for fd in folders:
                os.close(fd)

    def _target(self, part: str, here: int, path: Path) -> str:
        place = os.fstat(here)
        key = (place.st_dev, place.st_ino, part)
        if key not in self._links:
            self._links[key] = os.readlink(part, dir_fd=here)
        if self._links[key].startswith("/"):
            raise _left(path)
        return self._links[key]


@contextmanager
def mount(path: str | os.PathLike[str]) -> Iterator[Mount]:
    """A mounted folder, for as long as files are read from it together. See `Mount`."""
    where = Path(path)
    try:
        fd = os.open(where, _FOLDER_FLAGS)
    except OSError as error:
        raise _unopened(where, error) from error
    try:
        found = os.fstat(fd)
        _refuse_foreign(where, found, "folder")
        _refuse_open_folder(where, found, is_mount=True)
        yield Mount(fd, where)
    finally:
        os.close(fd)


def read_listed(path: str | os.PathLike[str], folders: Sequence[str | os.PathLike[str]] = ()) -> Secret:
    """A secret text (a token, a password) from a file that a configuration names, without the line's end.

    Only from the folders given, and from those where orchestrators put secrets: who can write a configuration must not be
    able to have any file read and sent away.
    """
    where = Path(os.path.realpath(path))
    credentials = os.environ.get("CREDENTIALS_DIRECTORY", "")
    allowed = [Path(os.path.realpath(folder)) for folder in (*folders, *_SECRET_FOLDERS, *([credentials] if credentials else []))]
    root = next((folder for folder in allowed if folder in where.parents), None)
    if root is None:
        raise KeyFileError(
            f"{path} is in no folder from which secrets are read.",
            hint=f"Put it into {' or '.join(map(str, allowed))}.",
        )
    with mount(root) as mounted:
        return Secret(mounted.read_secret(str(where.relative_to(root))).strip())


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
            rest = memoryview((b"\n" if torn else b"") + line + b"\n")
            while rest:
                # A full disk takes what fits and tells so with the next write, or never.
                if not (taken := os.write(file, rest)):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(Path(where) / name))
                rest = rest[taken:]
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


def _opened(fd: int, where: Path, name: str) -> int:
    try:
        return os.open(name, _READ_FLAGS, dir_fd=fd)
    except OSError as error:
        raise _unopened(where / name, error) from error


def _taken(file: int, path: Path, *, is_secret: bool, may_group: bool = False) -> bytes:
    """The content of an open file, if nobody can read or change it who shouldn't. Closes it."""
    try:
        found = os.fstat(file)
        if not stat.S_ISREG(found.st_mode):
            raise KeyFileError(f"{path} is not a regular file.", hint="Put the PEM file itself there.")
        _refuse_foreign(path, found, "file")
        if is_secret:
            _refuse_readers(path, found, may_group=may_group)
        elif found.st_mode & 0o022:
            raise KeyFileError(
                f"{path} may be changed by other users of this machine (mode {stat.S_IMODE(found.st_mode):04o}).",
                hint=f"Take the right away: chmod 644 {path}",
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


def _refuse_readers(path: Path, found: os.stat_result, *, may_group: bool) -> None:
    """A key that others may open: all of them, or a group that isn't ours."""
    open_to = found.st_mode & 0o077
    is_ours = found.st_gid in {os.getegid(), *os.getgroups()}
    if not open_to or (may_group and open_to == 0o040 and is_ours):
        return
    mode = f"mode {stat.S_IMODE(found.st_mode):04o}, group {found.st_gid}"
    hint = f"Take the right away: chmod 600 {path}; if others have used this machine meanwhile, issue a new key."
    if may_group:
        hint += (
            " In Kubernetes: `defaultMode: 0400` for the volume, and `fsGroup` in the pod's securityContext."
            " In Docker: `uid`, `gid` and `mode: 0400` for the secret."
        )
    raise KeyFileError(f"{path} may be opened by other users of this machine ({mode}).", hint=hint)


def _refuse_open_folder(path: Path, found: os.stat_result, *, is_mount: bool = False) -> None:
    """A folder in which others could swap files. In a sticky one they can't swap ours, nor root's: Kubernetes makes such."""
    if not found.st_mode & 0o022 or (is_mount and found.st_mode & stat.S_ISVTX):
        return
    hint = f"Take the right away: chmod go-w {path}"
    if is_mount:
        hint += " (an emptyDir of Kubernetes is open to the whole pod: put the files into a folder of mode 0755 in it)."
    raise KeyFileError(
        f"the folder {path} may be changed by other users (mode {stat.S_IMODE(found.st_mode):04o}):"
        " they could swap the files in it.",
        hint=hint,
    )


def _left(path: Path) -> KeyFileError:
    return KeyFileError(
        f"{path} is a link that leads out of its folder.",
        hint="Links count inside the mounted folder only: name the folder in which the file itself lies.",
    )


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
            hint="Links are not followed, since they can be turned: put the file itself there. What Kubernetes or cert-manager"
            " mounted is read by `identity: {files: …}`, inside the mount.",
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
