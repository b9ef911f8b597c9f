"""What is known of one connection, before anything is asked on it?

Who is at its other end, where that is, and at which listener of ours it came in: found out once, when the connection is made, by the
server of ours that holds it, and never from a request. The gate gets it as a `core.Place`. A `Line` also knows the call that it carries
at the moment, so that this call hears of it when the client goes away: `gone` is called in the protocol's connection_lost.

For a connection that another server holds there is no line. Such a server tells where a call came from (`scope["client"]`, REMOTE_ADDR)
and nothing about who called; a test client that runs as a declared peer (`meshlib.testing.as_peer`) stands in for the connection.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Final

from .._native import core
from ..call import Peer

if TYPE_CHECKING:
    from .asgi import Exchange
    from .door import Standing

# Nobody whose connection proved who they are: a caller on a plain connection.
PLAIN: Final = Peer("")
PLAIN_TLS: Final = Peer("", is_tls=True)

# Where a scope says on which connection it came. No server writes it but ours.
LINE: Final = "meshlib.line"

# Set by `meshlib.testing.as_peer`, and by nothing else: as whom a test client calls, where no server of ours holds the connection.
declared: ContextVar[Peer | None] | None = None


class Line:
    """One connection. `extension` is what ASGI's TLS extension says of it, None for plain text; `judge` whether its proof still holds."""

    __slots__ = ("address", "extension", "is_ours", "is_public", "judge", "peer", "place", "port", "sni", "visit")

    def __init__(
        self,
        peer: Peer = PLAIN,
        address: str = "",
        port: int = 0,
        sni: str = "",
        extension: Mapping[str, Any] | None = None,
        *,
        is_public: bool = False,
        judge: Callable[[], Standing] | None = None,
        is_ours: bool = False,
    ) -> None:
        self.peer = peer
        self.address = address
        self.port = port
        self.sni = sni
        self.extension = extension
        self.is_public = is_public
        self.judge = judge
        # Held by a server of ours, which tells when it is lost.
        self.is_ours = is_ours
        self.place = core.Place(peer.spiffe_id, peer.is_tls, address, port, sni, is_public)
        # The call under way; in HTTP/1.1 there is one at a time.
        self.visit: Exchange | None = None

    def gone(self) -> None:
        """The connection is lost: the call under way, if there is one, has nobody to answer to."""
        visit, self.visit = self.visit, None
        if visit is not None:
            visit.gone()


def stranger(address: str, port: int, *, is_tls: bool = False) -> Line:
    """A call over a connection of another server's: from nobody, but for a test client that was declared to be somebody."""
    if declared is not None and (peer := declared.get()) is not None:
        return Line(peer, address, port)
    return Line(PLAIN_TLS if is_tls else PLAIN, address, port)
