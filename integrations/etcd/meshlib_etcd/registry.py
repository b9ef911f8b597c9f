"""How does the mesh look services up in etcd, and enter its own?

One client for a cluster, one feed for each of the first services that are watched and one for all others, a lease for each
service that this process serves. Everything is made when it is first used, on the keeper's loop: opening the registry makes no
connection.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any, Final

from meshlib.discover import Instance
from meshlib.errors import ConfigError

from .client import Client
from .feed import Feed
from .instance import instance_key, name_of, service_key, services_of, write_instance
from .registration import TTL, EtcdRegistration
from .resolver import EtcdResolver
from .settings import Settings, read_settings, seconds

# Services with a watch of their own. A process that calls a few hears of those alone; one that calls many shares one watch on all.
OWN_FEEDS: Final = 4


class EtcdRegistry:
    """A cluster of etcd as a registry of the mesh."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._client = Client(settings)
        self._all = services_of(settings.prefix)
        self._feeds: dict[bytes, Feed] = {}
        self._registrations: weakref.WeakSet[EtcdRegistration] = weakref.WeakSet()

    def __repr__(self) -> str:
        return f"<EtcdRegistry {', '.join(self._settings.urls)}>"

    def resolver(self, service: str, settings: Mapping[str, Any]) -> EtcdResolver:
        _only_known(service, "discover", settings, {"name"})
        prefix = service_key(self._settings.prefix, name_of(settings, service))
        return EtcdResolver(service, prefix, self._feed_of, has_identities=self._settings.has_identities)

    def register(self, instance: Instance, settings: Mapping[str, Any]) -> EtcdRegistration:
        _only_known(instance.service, "register", settings, {"name", "ttl"})
        ttl = seconds(f"services.{instance.service}.register.ttl", settings.get("ttl", TTL), 2.0, 600.0)
        key = instance_key(self._settings.prefix, name_of(settings, instance.service), instance.id)
        made = EtcdRegistration(self._client, key, write_instance(instance), ttl=ttl)
        self._registrations.add(made)
        return made

    async def close(self) -> None:
        for feed in tuple(self._feeds.values()):
            await feed.close()
        self._feeds.clear()
        await self._client.close()

    def after_fork(self) -> None:
        self._feeds.clear()
        self._client.after_fork()
        for registration in self._registrations:
            registration.after_fork()

    def _feed_of(self, prefix: bytes) -> Feed:
        if prefix not in self._feeds and len(self._feeds.keys() - {self._all}) >= OWN_FEEDS:
            idle = next((name for name, feed in self._feeds.items() if feed.is_idle and name != self._all), None)
            if idle is None:
                prefix = self._all
            else:
                del self._feeds[idle]
        if prefix not in self._feeds:
            self._feeds[prefix] = Feed(self._client, prefix, self._part_of)
        return self._feeds[prefix]

    def _part_of(self, key: bytes) -> bytes:
        """The prefix of the service that a key belongs to."""
        end = key.find(b"/", len(self._all))
        return key[: end + 1] if end >= 0 else b""


def open_registry(settings: Mapping[str, Any]) -> EtcdRegistry:
    """The factory behind the entry point. `settings` are those of `registries.etcd` in mesh.yaml. Raises ConfigError."""
    return EtcdRegistry(read_settings(settings))


def _only_known(service: str, section: str, settings: Mapping[str, Any], known: set[str]) -> None:
    unknown = sorted(str(name) for name in settings.keys() - known - {"registry"})
    if unknown:
        raise ConfigError(
            f"services.{service}.{section}: etcd knows no settings {', '.join(unknown)}.",
            hint=f"Known: {', '.join(sorted(known))}.",
            unknown=unknown,
            known=sorted(known),
        )
