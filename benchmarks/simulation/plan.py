"""Which plan do the simulated engines get? The one that a configuration without a word on balance, admit and retry compiles to.

So every default is a user's. A scenario changes a few keys, by name; a key that the plan of this build doesn't have is left alone, because
the simulator is older and younger than some policies. An engine that can't read the result doesn't have the policy: the mode is absent.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

POLICIES: Final = ("peak_ewma", "least_request", "round_robin", "random", "ring_hash", "maglev")
SERVICE: Final = "orders"
# The header that the consistent hashes go by.
USER: Final = "x-user"

# What many clients do instead: three retries for whatever fails, no budget, and no breaker.
NO_BREAKER: Final = {"admit": {"breaker": {"failures": 4_000_000_000, "success_rate": 0.0}}}
NO_BUDGET: Final = {"budget": {"ratio": 1e6, "per_second": 1e6}, "route": {"retry": {"attempts": 3}}}
# Policies of retry that are no balancers: they balance as the default does.
VARIANTS: Final[dict[str, dict[str, Any]]] = {
    "naive": {**NO_BREAKER, **NO_BUDGET},
    "shedding-only": {**NO_BREAKER, **NO_BUDGET},
    "budget-only": {},
    "marked": {},
}


def plan_of(config: str, mode: str, changes: dict[str, Any], zone: str = "") -> bytes:
    """The plan of one process that calls one service. `changes` is said of the service, under "route" of its only route."""
    from meshlib.config import load

    plan = json.loads(load(Path(config), service="me").client_plan())
    one = next(service for service in plan["services"] if service["name"] == SERVICE)
    one["routes"] = one["routes"][-1:]
    policy = mode if mode in POLICIES else POLICIES[0]
    one["balance"]["policy"] = policy
    change(one, {"balance": {"hash": {"on": [{"kind": "header", "name": USER}]}}})
    for some in (changes, VARIANTS.get(mode, {})):
        change(one, {name: value for name, value in some.items() if name != "route"})
        change(one["routes"][0], some.get("route", {}))
    change(plan, {"zone": zone})
    return json.dumps(plan).encode()


def change(plan: dict[str, Any], changes: dict[str, Any]) -> None:
    """Set what there is of these keys, however deep."""
    for name, value in changes.items():
        if name not in plan:
            continue
        if isinstance(value, dict) and isinstance(plan[name], dict):
            change(plan[name], value)
        else:
            plan[name] = value
