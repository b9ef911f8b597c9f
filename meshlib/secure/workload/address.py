"""Which socket may say who we are?

The socket is part of the proof: whoever serves it says who we are and whom we trust. So it must belong to root, to us, or to a user who
was named, and must lie where nobody else could have put it: the same holds for every folder and every link on the way to it. Nobody
but these users can turn that way then, so that what is judged is what is connected to. There is no TCP, and no abstract socket.

The node agent has a user of its own where its units are installed: `agent_uid` knows that one by its name, which only root gives to a
system user.
"""

from __future__ import annotations

import errno
import os
import pwd
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from ...errors import ConfigError, IdentityError

VARIABLE: Final = "SPIFFE_ENDPOINT_SOCKET"
AGENT: Final = "meshlib"
# Numbers below are of system users, whom only root makes.
_FIRST_PERSON: Final = 1000
# As many as the kernel follows.
_MOST_LINKS: Final = 40


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
    """Raise IdentityError unless it is root's, ours or `uid`'s, and nobody else can put one in its place; OSError if it isn't there."""
    owners = {0, os.geteuid()} | ({uid} if uid is not None else set())
    hint = (
        "It must be the agent's: root's, ours, or the system user meshlib's; nobody else may write to a folder on the way to it."
    )
    for place, found, kind in _way_to(path_of(socket)):
        if found.st_uid not in owners:
            raise IdentityError(f"the {kind} {place} belongs to user {found.st_uid}, who is not the agent's.", hint=hint)
        # In a sticky folder nobody moves what belongs to these users.
        if kind == "folder" and found.st_mode & 0o022 and not found.st_mode & stat.S_ISVTX:
            raise IdentityError(f"the folder {place} may be changed by other users.", hint=hint)


def _way_to(path: str) -> Iterator[tuple[Path, os.stat_result, str]]:
    """All that lies on the way to a socket, as the kernel goes it, from the root on; every link, and where it leads to."""
    place, ahead, links = Path("/"), _parts(path), 0
    yield place, place.lstat(), "folder"
    while ahead:
        name = ahead.pop()
        if name == "..":
            place = place.parent
            continue
        found = (place / name).lstat()
        if stat.S_ISLNK(found.st_mode):
            yield place / name, found, "link"
            links += 1
            if links > _MOST_LINKS:
                raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), path)
            target = str((place / name).readlink())
            ahead += _parts(target)
            place = Path("/") if target.startswith("/") else place
            continue
        place /= name
        yield place, found, "folder" if ahead else "socket"


def _parts(path: str) -> list[str]:
    """The last one first."""
    return [part for part in reversed(path.split("/")) if part not in {"", "."}]
