"""What may a single value look like where the node agent's sockets and processes are named?

As in `values.py`, each is a type that refuses what it can't mean. Nothing here looks at a file or a process.
"""

from __future__ import annotations

import re
from typing import Annotated, Final

from pydantic import AfterValidator

from .values import refuse

# sockaddr_un has 108 bytes, the last of which is NUL.
_LONGEST: Final = 107
# PATH_MAX of the kernel, likewise; what is longer names no file.
_LONGEST_FILE: Final = 4095
_DIGEST: Final = re.compile(r"[0-9a-f]{64}\Z")
_UNIT: Final = re.compile(r"[A-Za-z0-9:_.@\\-]{1,240}\.(?:service|scope)\Z")


def _plain(value: str) -> bool:
    return (
        value.startswith("/")
        and value.isprintable()
        and not value.endswith("/")
        and not {"", ".", ".."} & {*value[1:].split("/")}
    )


def _socket(value: str) -> str:
    if value.startswith(("@", "\0")):
        refuse("is an abstract socket, which anybody could take", "an absolute path, such as /run/meshlib/agent.sock")
    if not _plain(value):
        refuse(f"{value!r} is not a plain absolute path", "such as /run/meshlib/agent.sock")
    if len(value.encode()) > _LONGEST:
        refuse(f"is longer than the {_LONGEST} bytes that a socket's path may have", "a shorter one")
    return value


def _executable(value: str) -> str:
    if not _plain(value):
        refuse(f"{value!r} is not a plain absolute path", "the executable itself and no link to it, such as /usr/bin/python3.11")
    if len(value.encode()) > _LONGEST_FILE:
        refuse(f"is longer than the {_LONGEST_FILE} bytes that a path may have", "a shorter one")
    return value


def _cgroup(value: str) -> str:
    if not _plain(value):
        refuse(f"{value!r} is not the path of a control group", "as in /proc/self/cgroup, such as /system.slice/orders.service")
    return value


def _digest(value: str) -> str:
    if not _DIGEST.match(value):
        refuse("is not a SHA-256 in hex", "64 digits, as sha256sum prints them")
    return value


def _unit(value: str) -> str:
    if not _UNIT.match(value):
        refuse(f"{value!r} is not a systemd unit", "orders.service, or a .scope")
    return value


def workload_socket(value: str) -> str:
    """The address of a Workload API as SPIFFE writes it: unix: and an absolute path."""
    path = value.removeprefix("unix:")
    path = path.removeprefix("//")
    if not value.startswith("unix:") or set(path) & {"?", "#"}:
        refuse(
            f"{value!r} is not unix: and an absolute path", "true for the socket of `agent`, or unix:///run/meshlib/agent.sock"
        )
    return f"unix://{_socket(path)}"


SocketPath = Annotated[str, AfterValidator(_socket)]
ExecutablePath = Annotated[str, AfterValidator(_executable)]
CgroupPath = Annotated[str, AfterValidator(_cgroup)]
Digest = Annotated[str, AfterValidator(_digest)]
Unit = Annotated[str, AfterValidator(_unit)]
WorkloadSocket = Annotated[str, AfterValidator(workload_socket)]
