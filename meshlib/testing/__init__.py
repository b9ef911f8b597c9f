"""What do you need to test what you have built on meshlib?

`as_peer` says who calls, in tests without connections; `check_identity_source` is the conformance check of sources of identity,
`check_resolver` that of sources of endpoints.
Nothing in meshlib imports this package.
"""

from __future__ import annotations

from .identity import World, check_identity_source
from .peer import as_peer
from .resolver import Stage, check_resolver

__all__ = ["Stage", "World", "as_peer", "check_identity_source", "check_resolver"]
