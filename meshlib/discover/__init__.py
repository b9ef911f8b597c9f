"""Where are they?

    static, file, DNS  ──Snapshot──▶  Directory  ──new version──▶  engine        `Hold` stands between, for what can't
    be true

Discovery works beside the requests, on the keeper's time: no request ever waits for it after the first answer. A source
of your own is a class with the three members of `Resolver`.
"""

from __future__ import annotations

from .directory import Directory
from .dns import DnsResolver
from .file import FileResolver
from .resolver import EndpointAddress, Immediate, Resolver, Snapshot, StaticResolver

__all__ = [
    "Directory",
    "DnsResolver",
    "EndpointAddress",
    "FileResolver",
    "Immediate",
    "Resolver",
    "Snapshot",
    "StaticResolver",
]
