"""What do you need to test what you have built on meshlib?

For now the conformance check of sources of identity: `check_identity_source`. Nothing in meshlib imports this package.
"""

from __future__ import annotations

from .identity import World, check_identity_source

__all__ = ["World", "check_identity_source"]
