"""How does Consul tell the mesh where services are, what its configuration is, and who we are?

    registries: {consul: {url: "http://127.0.0.1:8500"}}          open_registry, for `discover` and `register`
    MESHLIB_CONFIG=consul://127.0.0.1:8500/shop/mesh.yaml         open_config, from the KV store
    secure: {identity: {plugin: consul}}                          open_source, from the CA of its service mesh (Connect)

Nothing is called here by hand: the mesh finds the three by their entry points when the configuration names them. Each of
them imports what it needs when it is first used: discovery needs no cryptography.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .connect import ConnectSource, open_source
    from .kv import KeyValueConfig, open_config
    from .place import ConsulError
    from .registry import ConsulRegistry, open_registry

_HOMES = {
    "ConnectSource": "connect",
    "ConsulError": "place",
    "ConsulRegistry": "registry",
    "KeyValueConfig": "kv",
    "open_config": "kv",
    "open_registry": "registry",
    "open_source": "connect",
}

__all__ = [
    "ConnectSource",
    "ConsulError",
    "ConsulRegistry",
    "KeyValueConfig",
    "open_config",
    "open_registry",
    "open_source",
]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{home}", __name__), name)
