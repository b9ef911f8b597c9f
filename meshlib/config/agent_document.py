"""What may a user write about the node agent?

The type of `agent`: its sockets, where its identities come from, and which processes of its node get which of them. The
rest of the file is in `document.py`, where it is said how these classes are meant. There is no secret in it.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from .agent_values import CgroupPath, Digest, ExecutablePath, SocketPath, Unit
from .defaults import setting
from .section import Section
from .secure_values import FilePath, HttpsUrl
from .values import Name

Delegate = Literal["agent", "off"]
_User = Annotated[int, Field(ge=0, le=4_294_967_294)]


class AgentEntry(Section):
    """Which process is which service: all that is written must hold of it, as the kernel tells."""

    service: Name = Field(description="Whose identity it gets.")
    uid: _User = Field(description="The user that it runs as. No default.")
    gid: _User | None = Field(default=None, description="Its group.")
    path: ExecutablePath | None = Field(default=None, description="Its executable, such as /usr/bin/python3.11.")
    sha256: Annotated[tuple[Digest, ...], Field(min_length=1)] | None = Field(
        default=None, description="SHA-256 of the executable, in hex; one of them."
    )
    unit: Unit | None = Field(default=None, description="Its systemd unit, such as orders.service.")
    cgroup: CgroupPath | None = Field(default=None, description="Its control group, or one above it.")
    token: FilePath | None = Field(default=None, description="With `enrol`: the file of its one-use token; removed when used.")


class Agent(Section):
    """The daemon of a node, for all its processes: identities, and the connections of those who delegate."""

    socket: SocketPath = setting("agent.socket")
    data: SocketPath = setting("agent.data")
    admin: SocketPath = setting("agent.admin")
    state: FilePath = setting("agent.state")
    workers: int = setting("agent.workers")
    ca: FilePath | None = Field(default=None, description="The folder of `meshlib ca init`: the agent issues by itself.")
    enrol: HttpsUrl | None = Field(default=None, description="Where `meshlib ca serve` runs: https://ca.host:8444")
    admins: tuple[_User, ...] = Field(
        default=(), description="Users who may ask the admin socket, beside root and the agent's own."
    )
    entries: tuple[AgentEntry, ...] = Field(default=(), description="Which process gets which identity. Nobody else gets any.")
