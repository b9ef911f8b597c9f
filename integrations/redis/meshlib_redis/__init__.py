"""How do the rate limits of the mesh hold for all processes together?

    mesh.yaml:  stores: {redis: {url: "redis://host:6379/0"}}      and `store: redis` at a rate

Nothing is called here by hand: the mesh finds `open_limiter` by its entry point when the configuration names the store.
"""

from __future__ import annotations

from .limiter import RedisLimiter, open_limiter

__all__ = ["RedisLimiter", "open_limiter"]
__version__ = "0.1.0"
