"""How does a service get its identity from SPIRE, or whoever else speaks the SPIFFE Workload API?

    mesh.yaml:  secure: {identity: {plugin: spiffe, socket: "unix:///run/spire/agent.sock"}}

Nothing is called here by hand: the mesh finds `open_source` by its entry point when the configuration names it.
"""

from __future__ import annotations

from meshlib.secure.workload import WorkloadSource

from .source import open_source

__all__ = ["WorkloadSource", "open_source"]
__version__ = "0.1.0"
