"""How is a UNIX socket opened so that nobody can put theirs in its place?

Whoever serves the Workload API says to a whole machine who everybody is. So its socket lies in a folder that belongs to root or to
the agent's user and that nobody else can write to (a sticky one, like /tmp, is no danger to what is ours), and so do all folders above
it. What lies in its place already is taken away only if it is a socket of this very user on which nobody listens any more. Anything
else stops the start. A socket gets its mode before it can be reached.

Under systemd, sockets may be handed over open (LISTEN_FDS): then a restart of the agent loses no caller, they wait in the queue.
Names tell them apart (`FileDescriptorName=`): workload, data, admin. They are judged like our own.

Two agents that start within the same moment are kept apart by whoever starts them, not here.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ..errors import ListenError

# Whoever may connect is told apart by attestation; the admin socket is for its owner and root.
MODES: Final[Mapping[str, int]] = {"workload": 0o666, "data": 0o666, "admin": 0o600}
# Callers that wait to be accepted; the kernel cuts it to net.core.somaxconn.
BACKLOG: Final = 512

# The reason of a refusal that another start doesn't cure.
PLACE: Final = "agent.place"

_FIRST: Final = 3  # of the descriptors that systemd hands over
_VARIABLES: Final = ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES")
# Of an address: the path and its end.
_LONGEST: Final = 107


@dataclass(frozen=True, slots=True)
class Listening:
    """A listening socket, non-blocking, and where it lies. `is_inherited`: systemd opened it, and keeps it."""

    sock: socket.socket
    path: Path
    is_inherited: bool = False
    file: tuple[int, int] = (0, 0)

    def refuse(self) -> None:
        """Whoever connects from now on is refused, and knows that nothing was read; who has connected may still be accepted.

        Where the queue outlives us, it is for the next process.
        """
        if not self.is_inherited:
            with contextlib.suppress(OSError):
                self.sock.shutdown(socket.SHUT_RD)

    def admit(self, mode: int) -> None:
        """Give its file another mode, if it is still ours: one of systemd's has that of its unit. Raises OSError."""
        if self._has_file():
            self.path.chmod(mode)

    def close(self) -> None:
        """Close it, and take its file away if it is still ours."""
        self.sock.close()
        with contextlib.suppress(OSError):
            if self._has_file():
                self.path.unlink()

    def _has_file(self) -> bool:
        if self.is_inherited:
            return False
        found = self.path.lstat()
        return (found.st_dev, found.st_ino) == self.file


def open_socket(path: str | os.PathLike[str], mode: int) -> Listening:
    """Listen at a path. Raises ListenError wherever somebody else could meddle."""
    written = Path(path)
    if not written.is_absolute() or "\0" in str(written):
        raise ListenError(
            f"the socket {str(written)!r} is no absolute path.", hint="Write it from the root on: /run/meshlib/agent.sock"
        )
    try:
        written.parent.mkdir(mode=0o755, exist_ok=True)
        # Links are followed once, and what they lead to is judged and used.
        place = Path(os.path.realpath(written.parent)) / written.name
        refuse_open_folder(place.parent)
        if len(os.fsencode(place)) > _LONGEST:
            raise ListenError(
                f"the path {place} is too long for a socket.",
                hint=f"At most {_LONGEST} bytes: use a folder in /run.",
                reason=PLACE,
            )
        _clear(place)
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            os.fchmod(sock.fileno(), 0o600)  # the file gets it with `bind`: nobody connects before it's told
            sock.bind(str(place))
            place.chmod(mode)
            found = place.lstat()
            if not stat.S_ISSOCK(found.st_mode) or found.st_uid != os.geteuid():
                raise _foreign(place)
            sock.listen(BACKLOG)
        except BaseException:
            sock.close()
            raise
    except OSError as error:
        raise ListenError(
            f"the socket {written} can't be opened: {error.strerror or error}.",
            hint=f"Does its folder exist, and may user {os.geteuid()} write to it? (systemd: RuntimeDirectory=meshlib)",
        ) from error
    return Listening(sock, place, file=(found.st_dev, found.st_ino))


def inherited(environment: Mapping[str, str] | None = None, modes: Mapping[str, int] = MODES) -> dict[str, Listening]:
    """What systemd hands over, by name: workload, data, admin. Raises ListenError for what isn't one of these.

    `modes` are the widest that their files may have.

    The variables are taken out of the environment: they aren't for processes that we start.
    """
    given = dict(os.environ if environment is None else environment)
    if environment is None:
        for name in _VARIABLES:
            os.environ.pop(name, None)
    pid, count, names = (given.get(name, "") for name in _VARIABLES)
    if not count or pid != str(os.getpid()):
        return {}
    named = names.split(":") if names else []
    if not count.isdecimal() or len(named) != int(count) or len(set(named)) != len(named) or not set(named) <= set(modes):
        raise ListenError(
            "systemd hands over sockets that the agent can't tell apart.",
            hint="Each .socket unit needs FileDescriptorName=workload, data or admin, each of them once.",
            reason=PLACE,
        )
    found: dict[str, Listening] = {}
    try:
        for fd, name in enumerate(named, _FIRST):
            found[name] = _taken_over(fd, name, modes[name])
    except BaseException:
        for each in found.values():
            each.sock.close()
        raise
    return found


def refuse_open_folder(folder: Path) -> None:
    """Raise ListenError if anybody but root and us can change what lies in a folder, or turn the way to it."""
    for place in (folder, *folder.parents):
        found = place.stat()
        hint = f"chown it to root or to user {os.geteuid()}, and chmod go-w {place}; or choose a folder in /run."
        if found.st_uid not in {0, os.geteuid()}:
            raise ListenError(
                f"the folder {place} belongs to another user, who could put a socket of their own there.",
                hint=hint,
                reason=PLACE,
            )
        if found.st_mode & 0o022 and not found.st_mode & stat.S_ISVTX:
            raise ListenError(
                f"the folder {place} may be changed by other users (mode {stat.S_IMODE(found.st_mode):04o}),"
                " who could put a socket of their own there.",
                hint=hint,
                reason=PLACE,
            )


def _clear(place: Path) -> None:
    """Take a stale socket of ours away. Whatever else is there stays, and stops the start."""
    try:
        found = place.lstat()
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(found.st_mode) or found.st_uid != os.geteuid():
        raise _foreign(place)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
        refused = probe.connect_ex(str(place))
    if refused != errno.ECONNREFUSED:
        # Nobody refuses but the kernel, for a socket without a listener; a full queue is a listener too.
        raise ListenError(
            f"somebody listens on {place} already.", hint="Does another agent run? `meshlib agent status` asks it. Stop it first."
        )
    place.unlink()


def _taken_over(fd: int, name: str, mode: int) -> Listening:
    try:
        os.set_inheritable(fd, False)
        sock = socket.socket(fileno=fd)
        address = sock.getsockname()
        is_right = (
            sock.family == socket.AF_UNIX
            and sock.type == socket.SOCK_STREAM
            and isinstance(address, str)
            and address.startswith("/")
            and sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN) == 1
        )
    except OSError as error:
        raise ListenError(
            f"the socket {name!r} of systemd can't be used: {error.strerror}.", hint="See the .socket unit."
        ) from error
    if not is_right:
        sock.close()
        raise ListenError(
            f"the socket {name!r} of systemd is no listening UNIX socket.", hint="ListenStream= with an absolute path, Accept=no."
        )
    place = Path(address)
    try:
        refuse_open_folder(Path(os.path.realpath(place.parent)))
        found = place.lstat()
        if not stat.S_ISSOCK(found.st_mode) or found.st_uid not in {0, os.geteuid()}:
            raise _foreign(place)
        if found.st_mode & 0o777 & ~mode:
            raise ListenError(
                f"the socket {place} may be used by other users (mode {stat.S_IMODE(found.st_mode):04o}).",
                hint=f"Set SocketMode={mode:04o} in its .socket unit.",
                reason=PLACE,
            )
    except OSError as error:
        sock.close()
        raise ListenError(
            f"the socket {place} of systemd is not there: {error.strerror}.", hint="See the .socket unit."
        ) from error
    except ListenError:
        sock.close()
        raise
    sock.setblocking(False)
    return Listening(sock, place, is_inherited=True)


def _foreign(place: Path) -> ListenError:
    return ListenError(
        f"what lies at {place} is no socket of user {os.geteuid()}, and is not touched.",
        hint="Find out who put it there before you remove it.",
        reason=PLACE,
    )
