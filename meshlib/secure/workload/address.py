"""Which socket may say who we are?

The socket is part of the proof: whoever serves it says who we are and whom we trust. So it must belong to root, to us, or to a user who
was named, and must lie where nobody else could have put it. There is no TCP, and no abstract socket.

The node agent has a user of its own where its units are installed: `agent_uid` knows that one by its name, which only root gives to a
system user.
"""

from __future__ import annotations

import os
import pwd
import stat
from pathlib import Path
from typing import Final

from ...errors import ConfigError, IdentityError

VARIABLE: Final = "SPIFFE_ENDPOINT_SOCKET"
AGENT: Final = "meshlib"
# Numbers below are of system users, whom only root makes.
_FIRST_PERSON: Final = 1000


def checked_socket(socket: str) -> str:
    """The address, if a Workload API may be there: `unix:` and an absolute path, without an authority. Else ConfigError."""
    hint = f"Write unix:///run/spire/agent.sock, say, or set {VARIABLE}."
    if not socket:
        raise ConfigError(f"secure.identity names no socket, and {VARIABLE} is not set.", hint=hint)
    path = path_of(socket)
    if not socket.startswith("unix:") or not path.startswith("/") or path.endswith("/") or set(path) & {"?", "#", "\0"}:
        raise ConfigError(f"secure.identity: {socket!r} is not unix: and an absolute path.", hint=hint)
    return f"unix://{path}"


def path_of(socket: str) -> str:
    """What follows `unix:`, or `unix://` with an empty authority; with another authority something that begins with two slashes."""
    path = socket.removeprefix("unix:")
    if path.startswith("///"):
        return "/" + path.lstrip("/")
    return "" if path.startswith("//") else path


def agent_uid() -> int | None:
    """The system user as whom the node agent's units let it run; None where there is none."""
    try:
        uid = pwd.getpwnam(AGENT).pw_uid
    except KeyError:
        return None
    return uid if uid < _FIRST_PERSON else None


def refuse_foreign_socket(socket: str, uid: int | None = None) -> None:
    """Raise IdentityError unless it is root's, ours or `uid`'s, and in a folder where nobody swaps it; OSError if it isn't there."""
    path = Path(path_of(socket))
    owners = {0, os.geteuid()} | ({uid} if uid is not None else set())
    hint = "It must be the agent's: root's, ours, or the system user meshlib's; nobody else may write to the socket's folder."
    for place, kind in ((path, "socket"), (path.parent, "folder")):
        found = place.stat()
        if found.st_uid not in owners:
            raise IdentityError(f"the {kind} {place} belongs to user {found.st_uid}, who is not the agent's.", hint=hint)
        if kind == "folder" and found.st_mode & 0o022 and not found.st_mode & stat.S_ISVTX:
            raise IdentityError(f"the folder {place} may be changed by other users.", hint=hint)
