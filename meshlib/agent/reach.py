"""Can the agent reach the application behind a door, and if not, what is to be done about it?

To connect to a UNIX socket is to write to it. An agent with a user of its own, as its units give it, has no right to the files of others:
many servers open their socket for their own user only, and then every call of the service fails while both processes are well. The native
proxy only counts that a connect failed, so it is found out here why.

Rights are looked at without a word to the application. It is connected to only after a call has failed, and until that has ceased: a
server that isn't there, and whom nobody has called, is no trouble of ours.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Final

_CREDENTIALS: Final = struct.Struct("iII")
_OPEN: Final = (
    "To connect is to write: open it for the agent, by the server's own setting (hypercorn --umask 0, granian --uds-permissions 0666,"
    " waitress --unix-socket-perms=666) or by a group that both have. The secret of the hand-over keeps others out, not the mode."
)


def trouble_with(path: str, owners: Sequence[int], *, is_asked: bool) -> str:
    """Why no call can be handed over to a socket, and what to do; "" if nothing is known against it.

    `owners` are the users who may listen there. `is_asked`: connect to it, if it looks well.
    """
    us = os.geteuid()
    try:
        found = Path(path).stat()
        may = os.access(path, os.W_OK, effective_ids=os.access in os.supports_effective_ids)
    except PermissionError:
        return (
            f"permission denied on {path}: a folder above it is closed to user {us}, who is the agent."
            f" Let that user pass through it (chmod o+x, or a group that both have)."
        )
    except OSError as error:
        hint = "Does the application run, and does the agent see that folder as it does (PrivateTmp=)?"
        return f"nothing to connect to at {path}: {error.strerror}. {hint}" if is_asked else ""
    if not may:
        mode = stat.S_IMODE(found.st_mode)
        return f"permission denied on {path} (mode {mode:04o}, user {found.st_uid}) for user {us}, who is the agent. {_OPEN}"
    return _answer(path, owners) if is_asked else ""


def _answer(path: str, owners: Sequence[int]) -> str:
    with contextlib.closing(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)) as plug:
        try:
            plug.connect(path)  # at once or not at all
            _, uid, _ = _CREDENTIALS.unpack(plug.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
        except OSError as error:
            if error.errno == errno.ECONNREFUSED:
                return f"nobody listens at {path}. Does the application run?"
            if error.errno == errno.EAGAIN:
                return f"the queue at {path} is full. The application doesn't accept: is it overloaded, or stuck?"
            return f"no connection to {path}: {error.strerror or error}."
    if owners and uid not in owners:
        return (
            f"user {uid} listens at {path}, for whom the service has no entry: nothing is handed over."
            " If that is the application, write an entry with its uid."
        )
    return ""
