"""Where are the services that etcd knows, and how does this process get into its list?

    mesh.yaml:  registries: {etcd: {url: "http://127.0.0.1:2379"}}      and `discover: etcd`, `register: etcd` at a service
    a configuration that is kept there:  etcd://127.0.0.1:2379/meshlib/config/mesh.yaml

Nothing is called here by hand: the mesh finds `open_registry` and `open_config` by their entry points when a configuration
names them. etcd's JSON gateway is spoken by httpx; there is no other dependency.
"""

from __future__ import annotations

from .messages import EtcdError
from .registry import EtcdRegistry, open_registry
from .source import EtcdSource, open_config

__all__ = ["EtcdError", "EtcdRegistry", "EtcdSource", "open_config", "open_registry"]
__version__ = "0.1.0"
