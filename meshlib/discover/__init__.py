"""Where are they?

    static, file, DNS, registries  ──Snapshot, Change──▶  Directory  ──new version──▶  engine
                                                          `Table` stands between, for what can't be true

Discovery works beside the requests, on the keeper's time: no request ever waits for it after the first answer. A source
of your own is a class with the three members of `Resolver`; a package of your own is a `Registry`.
"""

from __future__ import annotations

from .directory import Directory
from .dns import DnsResolver
from .file import FileResolver
from .pace import limit_within, pause_within
from .registration import Registrar, instance_of
from .registry import Instance, Registration, Registry, open_registry
from .resolver import Change, EndpointAddress, Immediate, Resolver, Snapshot, StaticResolver, Watching
from .srv import SrvResolver

__all__ = [
    "Change",
    "Directory",
    "DnsResolver",
    "EndpointAddress",
    "FileResolver",
    "Immediate",
    "Instance",
    "Registrar",
    "Registration",
    "Registry",
    "Resolver",
    "Snapshot",
    "SrvResolver",
    "StaticResolver",
    "Watching",
    "instance_of",
    "limit_within",
    "open_registry",
    "pause_within",
]
