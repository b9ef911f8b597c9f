"""Where do the sockets lie over which gRPC reaches a relay of this very process, and who may use them?

In a folder of the process's own under the system's temporary folder (TMPDIR), which is there while it holds a socket. Two things keep
others out: the folder is private (0700), which shuts out other users; and on Linux the kernel says which process is at the other end
(SO_PEERCRED), and any but ours is shut out, also of the same user. Where the platform doesn't tell, the folder alone has to do: other
processes of the same user could then call as this service.

What is left open: plain text crosses the kernel between two sockets of one process. Root, and a process of the same user that may
trace this one (ptrace), could read it there; both could read the private key in its memory as well. A process of the same user may
also write to the folder: it could take the socket away, so that calls fail, or put one of its own in its place and get what gRPC sends
with its next connection. As everywhere in meshlib, files of the service's own user are trusted: a service that doesn't trust its
neighbours has a user of its own.

A process that is killed leaves its folder behind, with sockets on which nobody listens. A forked child has a folder of its own. This
file moves no bytes.
"""

from __future__ import annotations

import atexit
import os
import shutil
import socket
import struct
import sys
import tempfile
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from meshlib import errors

# What `sun_path` holds, without its end; on systems that come from BSD it is shorter.
LONGEST_PATH: Final = 107 if sys.platform == "linux" else 103
# gRPC makes one connection at a time for a link.
BACKLOG: Final = 8
_CREDENTIALS: Final = struct.Struct("3i")  # struct ucred: pid, uid, gid


class Nest:
    """The private folder of this process, which is there while it holds a socket."""

    def __init__(self) -> None:
        # Taken again by a link that the garbage collector finds while it is held.
        self._lock = threading.RLock()
        self._count = 0
        self._number = 0
        self.folder: Path | None = None
        self._owner = os.getpid()

    def take(self) -> tuple[socket.socket, str]:
        """A listening socket and its path."""
        with self._lock:
            self._count += 1
            listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                self.folder = self.folder or Path(tempfile.mkdtemp(prefix="mesh-"))
                self._number += 1
                path = str(self.folder / str(self._number))
                if len(os.fsencode(path)) > LONGEST_PATH:
                    raise errors.MeshError(
                        f"{path} is too long for the path of a UNIX socket ({LONGEST_PATH} bytes).",
                        hint="gRPC reaches this service over such a socket: set TMPDIR to a folder with a shorter path.",
                        reason="grpc.relay_path",
                    )
                listener.setblocking(False)
                listener.bind(path)
                listener.listen(BACKLOG)
            except BaseException:
                listener.close()
                self.leave("")
                raise
            return listener, path

    def leave(self, path: str) -> None:
        """A socket is needed no more; with the last one the folder goes."""
        with self._lock:
            if path:
                Path(path).unlink(missing_ok=True)
            self._count -= 1
            if self._count == 0 and self.folder is not None:
                folder, self.folder = self.folder, None
                with suppress(OSError):
                    folder.rmdir()

    def clear(self) -> None:
        """The process ends, and its folder with it."""
        folder, self.folder = self.folder, None
        if folder is not None and self._owner == os.getpid():
            shutil.rmtree(folder, ignore_errors=True)


def stranger_at(plug: Any) -> str:
    """Which other process is at the other end of a UNIX socket; "" if it is ours, or the platform doesn't tell."""
    option = getattr(socket, "SO_PEERCRED", None)
    if option is None:
        return ""
    try:
        pid, uid, _ = _CREDENTIALS.unpack(plug.getsockopt(socket.SOL_SOCKET, option, _CREDENTIALS.size))
    except OSError as error:
        return f"somebody unknown ({error.strerror})"
    return "" if pid == os.getpid() else f"the process {pid} of the user {uid}"


nest = Nest()


def _after_fork() -> None:
    global nest
    nest = Nest()


def _clear() -> None:
    nest.clear()


os.register_at_fork(after_in_child=_after_fork)
atexit.register(_clear)
