"""Who is at the other end of a UNIX socket, as the kernel says and not as they say?

The kernel keeps who called `connect` (SO_PEERCRED: process, user, group) and, since Linux 6.5, a handle on that very process
(SO_PEERPIDFD), which no successor with the same number can be taken for. What is asked about it comes from /proc, in this order:

    meet      at once after accept: credentials, handle, /proc/<pid> opened, start time
    attest    on a thread: user and group as they are now, executable, its hash, control groups; and then all of it once more,
              and that the process still lives. What differs, or can't be read, is a refusal

An executable is looked at through /proc/<pid>/exe and never by its path, where another file may lie by now; one that was replaced
or deleted is refused. It is read only for its hash: one that we may not read (0750, say) has none, and fits no entry that asks for
one. Its path counts only where it leads to that same file for us too: a process can make itself a mount
namespace in which any path leads anywhere. A unit is the first service or scope on the way down from the root, as systemd sees
it: what is below was made by whoever the unit is delegated to, in any name they liked.

An older kernel gives no handle: there it is opened by the number, and the process must have begun before we accepted. A process
that ends within that moment, and one of the same user with the same number that begins in it, could be taken for one another.

It is no border between processes of one user: they can trace each other, hand connections on (who connected is who counts), and
start any program with what they like in it. Selectors are never in a repr, a log or an error: a refusal has a word for its rule.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import select
import socket
import stat
import struct
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, NamedTuple, NoReturn

from ..errors import Denied

log = logging.getLogger("meshlib.agent")

# Python has no name for it yet.
SO_PEERPIDFD: Final = 77
# Bytes: what is read of /proc, and of the largest executable whose hash is taken.
MOST_TEXT: Final = 64 * 1024
LARGEST: Final = 1024 * 1024 * 1024
# Seconds between two lines about programs that can't be read.
QUIET: Final = 60.0
# Hashes that are remembered: executables of one machine, not processes.
MOST_DIGESTS: Final = 256

_NOBODY: Final = 0xFFFFFFFF
_CREDENTIALS: Final = struct.Struct("iII")
_TICKS: Final = os.sysconf("SC_CLK_TCK")
_GONE: Final = {errno.ESRCH, errno.ENOENT, errno.ENODATA}


@dataclass(frozen=True, slots=True, eq=False)
class Caller:
    """An attested process: what its registration entry is looked for with. None of it is ever shown, not in repr, logs or errors; but for
    the process and user of who fits no entry (`strangers.py`).

    `executable` is "" where its path doesn't name it (another mount namespace); `digest` (SHA-256, hex) is "" where no entry of its
    user asks for one, or the file can't be read. `units` are systemd's, `cgroups` paths of control groups.
    """

    pid: int = field(repr=False)
    uid: int = field(repr=False)
    gid: int = field(repr=False)
    executable: str = field(default="", repr=False)
    digest: str = field(default="", repr=False)
    units: tuple[str, ...] = field(default=(), repr=False)
    cgroups: tuple[str, ...] = field(default=(), repr=False)

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise TypeError("a caller can't be pickled or copied: it counts for its own connection only")


class Kernel:
    """What the kernel answers, each question by itself; exchanged in tests."""

    def credentials(self, sock: socket.socket) -> tuple[int, int, int]:
        """Process, user and group of whoever connected."""
        pid, uid, gid = _CREDENTIALS.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
        return pid, uid, gid

    def handle(self, sock: socket.socket) -> int | None:
        """A handle (pidfd) on the process that connected; None where the kernel has no such thing."""
        try:
            fd: int = struct.unpack("i", sock.getsockopt(socket.SOL_SOCKET, SO_PEERPIDFD, 4))[0]
        except OSError as error:
            if error.errno == errno.ENOPROTOOPT:
                return None
            raise
        os.set_inheritable(fd, False)
        return fd

    def handle_of(self, pid: int) -> int:
        """A handle on the process that has this number now."""
        return os.pidfd_open(pid)

    def folder(self, pid: int) -> int:
        """/proc/<pid>, open: it is of that process for good, and empty after its end."""
        return os.open(f"/proc/{pid}", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)

    def now(self) -> float:
        """Seconds since the machine's start, as processes' start times are counted."""
        return time.clock_gettime(time.CLOCK_BOOTTIME)


def uid_of(sock: socket.socket, kernel: Kernel | None = None) -> int:
    """The user who connected, quickly: enough to turn them away, and no proof of anything; -1 if nobody can say."""
    try:
        return (kernel or Kernel()).credentials(sock)[1]
    except (OSError, struct.error):
        return -1


class Peer:
    """The process at the other end of one connection, held by handle and not by number. To be closed."""

    __slots__ = ("_folder", "_handle", "begun", "gid", "pid", "uid")

    def __init__(self, pid: int, uid: int, gid: int, handle: int, folder: int, begun: int) -> None:
        self.pid, self.uid, self.gid, self.begun = pid, uid, gid, begun
        self._handle, self._folder = handle, folder

    def fileno(self) -> int:
        """A descriptor that becomes readable when the process ends."""
        return self._handle

    @property
    def has_ended(self) -> bool:
        return _has_ended(self._handle)

    def read(self, name: str) -> bytes:
        return _read(self._folder, name)

    def link(self, name: str) -> str:
        return os.readlink(name, dir_fd=self._folder)

    def stat(self, name: str) -> os.stat_result:
        return os.stat(name, dir_fd=self._folder)

    def open(self, name: str) -> int:
        return os.open(name, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK, dir_fd=self._folder)

    def moved(self) -> Peer:
        """The same process, for somebody else to look into and to close. What stays here knows when it ends, and no more."""
        folder, self._folder = self._folder, -1
        try:
            return Peer(self.pid, self.uid, self.gid, os.dup(self._handle), folder, self.begun)
        except BaseException:
            os.close(folder)
            raise

    def close(self) -> None:
        folder, handle, self._folder, self._handle = self._folder, self._handle, -1, -1
        for fd in (folder, handle):
            if fd >= 0:
                os.close(fd)


class _Look(NamedTuple):
    """What must not change while it is looked at."""

    begun: int
    uid: int
    gid: int
    link: str
    file: tuple[int, ...]


class Attestor:
    """State of the agent: how callers are found out about. `wants_digest(uid)`: whether a hash is worth its time."""

    def __init__(self, wants_digest: Callable[[int], bool] = lambda _: True, *, kernel: Kernel | None = None) -> None:
        self._wants_digest = wants_digest
        self._kernel = kernel or Kernel()
        self._digests = Digests()
        self._quiet_until = 0.0

    def uid_of(self, sock: socket.socket) -> int:
        return uid_of(sock, self._kernel)

    def meet(self, sock: socket.socket) -> Peer:
        """Get hold of the process, quickly. Raises Denied."""
        kernel = self._kernel
        handle = folder = -1
        try:
            if sock.family != socket.AF_UNIX:
                raise _denied("no_unix_socket")
            pid, uid, gid = kernel.credentials(sock)
            if pid <= 0 or _NOBODY in {uid, gid} or (uid == _overflow() and not _sees_all_users()):
                # It lives in a namespace that we don't see into: then nothing that is known of it says who it is.
                raise _denied("other_namespace")
            given = kernel.handle(sock)
            handle = kernel.handle_of(pid) if given is None else given
            if given is not None and _pid_of(handle) != pid:
                raise _denied("ended")
            folder = kernel.folder(pid)
            begun = _begun(_read(folder, "stat"))
            if given is None and begun / _TICKS > kernel.now():
                raise _denied("another_process")
            if _has_ended(handle):
                raise _denied("ended")
        except BaseException as error:
            for fd in (folder, handle):
                if fd >= 0:
                    os.close(fd)
            if isinstance(error, OSError | ValueError | struct.error):
                raise _denied(_rule_of(error)) from None
            raise
        return Peer(pid, uid, gid, handle, folder, begun)

    def attest(self, peer: Peer) -> Caller:
        """All that is known of a process, if it is one and the same from beginning to end. Takes its time. Raises Denied."""
        try:
            first, digest = self._look(peer, hashed=self._wants_digest(peer.uid))
            if (first.begun, first.uid, first.gid) != (peer.begun, peer.uid, peer.gid):
                raise _denied("changed")
            if first.link.endswith(" (deleted)"):
                raise _denied("replaced_executable")
            executable = first.link if _names(first.link, first.file) else ""
            cgroups, units = groups_of(peer.read("cgroup"))
            again, _ = self._look(peer, hashed=False)
        except (OSError, ValueError) as error:
            raise _denied(_rule_of(error)) from None
        if again != first:
            raise _denied("changed")
        if peer.has_ended:
            raise _denied("ended")
        return Caller(peer.pid, peer.uid, peer.gid, executable, digest, units, cgroups)

    def _look(self, peer: Peer, *, hashed: bool) -> tuple[_Look, str]:
        link = peer.link("exe")
        found = peer.stat("exe")
        digest = self._digest(peer, found) if hashed else ""
        uid, gid = _users(peer.read("status"))
        return _Look(_begun(peer.read("stat")), uid, gid, link, _identity(found)), digest

    def _digest(self, peer: Peer, found: os.stat_result) -> str:
        try:
            fd = peer.open("exe")
        except PermissionError:
            self._tell_unreadable()
            return ""
        try:
            if _identity(os.fstat(fd)) != _identity(found):
                raise _denied("changed")
            return self._digests.of(fd, found)
        finally:
            os.close(fd)

    def _tell_unreadable(self) -> None:
        now = time.monotonic()
        if now >= self._quiet_until:
            self._quiet_until = now + QUIET
            log.warning(
                "the program of a caller can't be read, and so fits no entry with sha256: let the agent's user read it, or give"
                " the agent CAP_DAC_READ_SEARCH"
            )


class Digests:
    """Hashes of files, remembered for as long as nothing about the file has changed. Any thread may ask."""

    def __init__(self) -> None:
        self._known: OrderedDict[tuple[int, ...], str] = OrderedDict()
        self._lock = threading.Lock()

    def of(self, fd: int, found: os.stat_result) -> str:
        """The SHA-256 of an open file as hex; "" if it is no regular file, or too large. Raises ValueError if it changes meanwhile."""
        if not stat.S_ISREG(found.st_mode) or found.st_size > LARGEST:
            return ""
        key = _identity(found)
        with self._lock:
            if known := self._known.get(key):
                self._known.move_to_end(key)
                return known
        with open(fd, "rb", closefd=False, buffering=0) as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if _identity(os.fstat(fd)) != key:
            raise ValueError("the file has changed while it was read")
        with self._lock:
            self._known[key] = digest
            while len(self._known) > MOST_DIGESTS:
                self._known.popitem(last=False)
        return digest


def groups_of(text: bytes) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Control groups and systemd's units of /proc/<pid>/cgroup, of both versions. Raises ValueError for what isn't one."""
    cgroups, units = dict[str, None](), dict[str, None]()
    for line in text.split(b"\n"):
        if not line:
            continue
        number, controllers, path = os.fsdecode(line).split(":", 2)
        if not number.isdecimal() or not path.startswith("/") or "\0" in path:
            raise ValueError("not a line of /proc/<pid>/cgroup")
        if path.endswith(" (deleted)"):
            continue
        cgroups[path] = None
        if controllers in {"", "name=systemd"} and (unit := _unit(path)):
            units[unit] = None
    return tuple(cgroups), tuple(units)


def _unit(path: str) -> str:
    for part in path.split("/")[1:]:
        if part == "..":
            return ""
        if not part.endswith(".slice"):
            return part if part.endswith((".service", ".scope")) else ""
    return ""


def _names(path: str, file: tuple[int, ...]) -> bool:
    """Whether the path leads to that file for us too."""
    try:
        return path.startswith("/") and _identity(Path(path).stat()) == file
    except OSError:
        return False


def _identity(found: os.stat_result) -> tuple[int, ...]:
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _begun(text: bytes) -> int:
    # The second field is a name that its process has chosen, and may hold anything.
    return int(text[text.rindex(b")") + 1 :].split()[19])


def _users(status: bytes) -> tuple[int, int]:
    """User and group in effect."""
    found = {}
    for line in status.split(b"\n"):
        name, _, rest = line.partition(b":")
        if name in {b"Uid", b"Gid"}:
            found[name] = int(rest.split()[1])
    if len(found) != 2:
        raise ValueError("not a /proc/<pid>/status")
    return found[b"Uid"], found[b"Gid"]


def _pid_of(handle: int) -> int:
    """The number of a handle's process: -1 after its end, 0 in a namespace that we don't see into."""
    with Path(f"/proc/self/fdinfo/{handle}").open("rb") as file:
        for line in file.read(MOST_TEXT).split(b"\n"):
            if line.startswith(b"Pid:"):
                return int(line[4:])
    raise ValueError("not a handle on a process")


def _has_ended(handle: int) -> bool:
    poll = select.poll()
    poll.register(handle, select.POLLIN)
    return bool(poll.poll(0))


def _read(folder: int, name: str) -> bytes:
    fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC, dir_fd=folder)
    try:
        parts, left = list[bytes](), MOST_TEXT + 1
        while left > 0 and (part := os.read(fd, left)):
            parts.append(part)
            left -= len(part)
    finally:
        os.close(fd)
    if left <= 0:
        raise ValueError("it is too long")
    return b"".join(parts)


def _overflow() -> int:
    """As whom the kernel shows a user who has no number here."""
    with Path("/proc/sys/kernel/overflowuid").open("rb") as file:
        return int(file.read(32))


def _sees_all_users() -> bool:
    with Path("/proc/self/uid_map").open("rb") as file:
        return file.read(MOST_TEXT).split() == [b"0", b"0", b"4294967295"]


def _rule_of(error: Exception) -> str:
    if isinstance(error, PermissionError):
        return "no_right"
    return "ended" if isinstance(error, OSError) and error.errno in _GONE else "unreadable"


def _denied(rule: str) -> Denied:
    hint = "To see which program a process of another user runs, the agent runs as root, or has CAP_SYS_PTRACE."
    hint = hint if rule == "no_right" else ""
    return Denied(f"a caller can't be attested ({rule}).", rule=f"attest.{rule}", hint=hint)
