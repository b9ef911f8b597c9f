"""How does a process hear who it is from an agent on its machine, for as long as it lives?

By the SPIFFE Workload API, over a UNIX socket, and without showing anything: the agent finds out who asks.

    address.py   which sockets may say who we are
    channel.py   the call over gRPC, and nothing of it decided
    read.py      bytes of a message, strictly
    parts.py     what a message says about us
    watch.py     `WorkloadSource`: one stream, held open; when an identity ends, and when it doesn't

`identity: {agent: …}` in mesh.yaml uses all of it. The package `meshlib-spiffe` uses it with the channel and the messages of the
library `spiffe`, and has more settings: for SPIRE, or any other agent.
"""

from __future__ import annotations

from .address import agent_uid, checked_socket
from .channel import connect
from .parts import NotOurs, parts_of
from .watch import TIMEOUT, Connection, Stream, WorkloadSource

__all__ = ["TIMEOUT", "Connection", "NotOurs", "Stream", "WorkloadSource", "agent_uid", "checked_socket", "connect", "parts_of"]
