"""meshlib: a service mesh inside the Python process. How does a request go?

    outbound   observe > route > retry > [ balance > admit > secure > send ]     [ ] = once per attempt
    inbound    observe > secure > admit > route > handle
    beside     discover feeds route and balance; a request never waits for it after the first answer

The order is the nesting. These words are the folders, the Rust modules, the sections of mesh.yaml and the prefixes of the
metrics. Start with `Mesh.load("mesh.yaml")`; everything else hangs on the `Mesh`. Importing this package starts no thread and
loads neither pydantic, httpx nor grpc: they come when they are used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from . import errors
from ._native import EXPECTED as __version__
from .call import Call, CallPolicy, Peer, call_of, claims, current_call, deadline, peer, policy, remaining
from .errors import (
    AttemptFailed,
    AttemptTimeout,
    CallerGone,
    ConfigError,
    ConnectFailed,
    ConnectionLost,
    DeadlineExceeded,
    Denied,
    IdentityError,
    IdentityWithdrawn,
    KeyFileError,
    LimitExceeded,
    ListenError,
    MeshError,
    NoEndpoint,
    NoRoute,
    PeerIdentityError,
    Problem,
    ProtocolError,
    RateLimited,
    Refused,
    Throttled,
    TlsError,
    TrustDomainError,
    UnknownService,
)
from .mesh import Mesh
from .retry.fallback import last_good

if TYPE_CHECKING:
    from .errors import CircuitOpen
    from .observe.edges import Alert
    from .secure.custom import Inquiry
else:

    def __getattr__(name: str) -> Any:
        # What few need, and what would cost an import of every process: other packages, asyncio, inspect.
        if name == "CircuitOpen":
            return errors.CircuitOpen
        if name == "Alert":
            from .observe.edges import Alert

            return Alert
        if name == "Inquiry":
            from .secure.custom import Inquiry

            return Inquiry
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "Alert",
    "AttemptFailed",
    "AttemptTimeout",
    "Call",
    "CallPolicy",
    "CallerGone",
    "CircuitOpen",
    "ConfigError",
    "ConnectFailed",
    "ConnectionLost",
    "DeadlineExceeded",
    "Denied",
    "IdentityError",
    "IdentityWithdrawn",
    "Inquiry",
    "KeyFileError",
    "LimitExceeded",
    "ListenError",
    "Mesh",
    "MeshError",
    "NoEndpoint",
    "NoRoute",
    "Peer",
    "PeerIdentityError",
    "Problem",
    "ProtocolError",
    "RateLimited",
    "Refused",
    "Throttled",
    "TlsError",
    "TrustDomainError",
    "UnknownService",
    "__version__",
    "call_of",
    "claims",
    "current_call",
    "deadline",
    "last_good",
    "peer",
    "policy",
    "remaining",
]
