"""What counts for the node agent, and for those who register and delegate, after all that was left out has been filled in?

Frozen values; paths of files are absolute. `AgentPolicy` is read by the daemon, and by the services of its node, which want
to know its sockets.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from .agent_document import Agent
from .discover_document import Register, Registry


@dataclass(frozen=True, slots=True)
class EntryPolicy:
    """Which process gets the identity of `service`. What isn't written is None or (), and says nothing."""

    service: str
    uid: int
    gid: int | None = None
    path: str | None = None
    sha256: tuple[str, ...] = ()
    unit: str | None = None
    cgroup: str | None = None
    token: Path | None = None


@dataclass(frozen=True, slots=True)
class AgentPolicy:
    """The daemon of a node. Exactly one of `ca` (a folder) and `enrol` (a URL, else "") says where identities come from."""

    socket: str
    data: str
    admin: str
    state: Path
    workers: int
    ca: Path | None
    enrol: str
    admins: tuple[int, ...]
    entries: tuple[EntryPolicy, ...]


@dataclass(frozen=True, slots=True)
class RegistryPolicy:
    """A registry. `cache` is the folder of what it said last, None for none; `settings` are for its plugin, maybe secret."""

    name: str
    plugin: str
    cache: Path | None
    settings: Mapping[str, Any] = field(repr=False)


@dataclass(frozen=True, slots=True)
class RegisterPolicy:
    """How a service's processes enter themselves. `address` is "" where it follows from `listen`."""

    registry: str
    address: str
    settings: Mapping[str, Any] = field(repr=False)


def agent(written: Agent | None, folder: Path) -> AgentPolicy | None:
    """The agent's policy; relative paths are relative to the file's folder."""
    if written is None:
        return None
    return AgentPolicy(
        socket=written.socket,
        data=written.data,
        admin=written.admin,
        state=(folder / written.state).absolute(),
        workers=written.workers,
        ca=None if written.ca is None else (folder / written.ca).absolute(),
        enrol=written.enrol or "",
        admins=tuple(dict.fromkeys(written.admins)),
        entries=tuple(
            EntryPolicy(
                one.service,
                one.uid,
                one.gid,
                one.path,
                one.sha256 or (),
                one.unit,
                one.cgroup,
                None if one.token is None else (folder / one.token).absolute(),
            )
            for one in written.entries
        ),
    )


def registries(written: Mapping[str, Registry], folder: Path) -> Mapping[str, RegistryPolicy]:
    """The registries, by name."""
    return MappingProxyType(
        {
            name: RegistryPolicy(
                name, one.plugin or name, _cache(one.cache, folder), MappingProxyType(dict(one.model_extra or {}))
            )
            for name, one in written.items()
        }
    )


def register(written: Register | None) -> RegisterPolicy | None:
    """How the processes of a service enter themselves; None if they don't."""
    if written is None:
        return None
    return RegisterPolicy(written.registry, written.address or "", MappingProxyType(dict(written.model_extra or {})))


def _cache(written: bool | str, folder: Path) -> Path | None:
    return (folder / (".meshlib/endpoints" if written is True else written)).absolute() if written else None
