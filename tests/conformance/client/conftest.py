"""What stands on the other side of the client's conformance tests? Real servers, and the worlds in which they are reached."""

from __future__ import annotations

from tests.conformance.client.shop import shop

__all__ = ["shop"]
