"""What did the user write, and what follows from it?

    mesh.yaml ─ text ─ document ─ vet ─ policy ─ plan
                lines  types      the whole  filled in  JSON for the core

`load` gives the `Config` of this process or raises ConfigError with every mistake at once. Every default of meshlib
is in `defaults`, with its range and its reason. This is the only package that imports pydantic and PyYAML, so
`import meshlib` leaves it alone until a configuration is loaded. It opens no sockets, reads no keys and starts
nothing.
"""

from __future__ import annotations

from .inbound_policy import InboundPolicy, PriorityPolicy
from .load import examine, load, read_endpoints
from .policy import CheckPolicy, Config, GuardPolicy, RoutePolicy, ServicePolicy
from .rate_policy import RatePart, RatePolicy
from .schema import json_schema
from .secure_policy import (
    CredentialPolicy,
    FederationPolicy,
    IdentityChoice,
    JwksChoice,
    ProviderPolicy,
    ProxiesPolicy,
    RulePolicy,
    TokenPlace,
    WhenPolicy,
)
from .values import DEV_TRUST_DOMAIN

__all__ = [
    "DEV_TRUST_DOMAIN",
    "CheckPolicy",
    "Config",
    "CredentialPolicy",
    "FederationPolicy",
    "GuardPolicy",
    "IdentityChoice",
    "InboundPolicy",
    "JwksChoice",
    "PriorityPolicy",
    "ProviderPolicy",
    "ProxiesPolicy",
    "RatePart",
    "RatePolicy",
    "RoutePolicy",
    "RulePolicy",
    "ServicePolicy",
    "TokenPlace",
    "WhenPolicy",
    "examine",
    "json_schema",
    "load",
    "read_endpoints",
]
