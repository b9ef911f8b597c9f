"""What do the two engines in Rust get to know?

Two JSON documents in which every field is explicit, made from a `Config`: the client plan (all services, as this
process may call them) and the server plan (who may call this process). The names of the fields are the contract with
the core, which refuses unknown and missing ones. Endpoints are not in it: they come from discover, and change more
often.

Here, and only here, it is decided whether an edge is plain or mutual TLS: see `Config.is_private`.
"""

from __future__ import annotations

import json
from typing import Any, Final

from . import document as doc
from . import secure_plan
from .defaults import TABLE
from .inbound_document import AdaptiveLimits
from .levels import HASHING
from .policy import Config, GuardPolicy, RoutePolicy, ServicePolicy, merge
from .rate_policy import RatePolicy
from .secure_policy import RulePolicy

Json = dict[str, Any]


def client_plan(config: Config) -> bytes:
    """The outbound plan. A guarded function is a service in it, and "guard:*" stands for all that the file doesn't name."""
    services = [_service(config, service) for service in config.services.values()]
    guards = [_guard(guard) for guard in config.guards.values()]
    return _encode({"service": config.service, "zone": config.zone, "services": [*services, *guards]})


def server_plan(config: Config) -> bytes:
    """The inbound plan of the service that this process is."""
    own = config.own
    return _encode(
        {
            "service": own.name,
            "mode": own.mode,
            "identity": own.identity,
            "trust_domain": config.trust_domain,
            "paths": config.secure.paths,
            "admission": _admission(own),
            "rules": [secure_plan.rule(rule) for rule in own.rules],
            "public_rules": [secure_plan.rule(rule) for rule in _public(own)],
            "routes": [
                {"name": route.name, "path": _path(route.match.path), "on_disconnect": route.on_disconnect}
                for route in own.routes
            ],
            "proxies": secure_plan.proxies(config.proxies),
            "xfcc": config.xfcc,
            "providers": [secure_plan.provider(config.jwt[name]) for name in own.providers],
            "jwt_required": [secure_plan.path(path) for path in own.jwt_required],
            "rates": [_inbound_rate(rate) for rate in own.inbound_rates],
            "record": config.record is not None,
        }
    )


def _service(config: Config, service: ServicePolicy) -> Json:
    return {
        "name": service.name,
        "hosts": [service.name],
        "protocol": service.protocol,
        "identity": service.identity if config.is_private(service.name) else "",
        "is_guard": False,
        "routes": [_route(route) for route in service.routes],
        "budget": _budget(service.retry.budget),
        "balance": _balance(service.balance),
        "admit": _admit(service.admit, service.rates, connect=service.admit.connect),
    }


def _guard(guard: GuardPolicy) -> Json:
    """A function as a service of one route, one backend and one endpoint."""
    name = f"guard:{guard.name}"
    balance = doc.Balance(slow_start=0.0, locality="off")
    # All that fails is the one endpoint's failure, so its breaker must be free to open.
    breaker = guard.admit.breaker.model_copy(update={"max_ejected": 1.0})
    retry = merge(doc.RouteRetry(), guard.retry).model_copy(update={"statuses": _REPEATABLE})
    match: Json = {"path": _path(None), "methods": [], "headers": []}
    return {
        "name": name,
        "hosts": [name],
        "protocol": "function",
        "identity": "",
        "is_guard": True,
        "routes": [
            {
                "name": name,
                "match": match,
                "backends": [{"name": "all", "labels": {}, "weight": 1}],
                "retry": _retry(retry),
                "deadline": guard.deadline,
                "stream_idle": guard.deadline,  # a function has no stream
            }
        ],
        "budget": _budget(guard.retry.budget),
        "balance": _balance(balance),
        "admit": _admit(guard.admit.model_copy(update={"breaker": breaker}), guard.rates, connect=TABLE["admit.connect"].value),
    }


# More than any process can do in a second.
_BOUNDLESS: Final = 1e9
# What a guard reports for a failure that may be repeated.
_REPEATABLE: Final = (503,)


def _budget(budget: doc.Budget) -> Json:
    return {"ratio": float(budget.ratio), "per_second": float(budget.per_second), "window": budget.window}


def _balance(balance: doc.Balance) -> Json:
    kind, name = ("none", "") if balance.sticky is None else balance.sticky.part
    parts = dict.fromkeys(part.part for part in balance.hash_on)
    return {
        "policy": balance.policy,
        "decay": balance.decay,
        "start": balance.start,
        "penalty": balance.penalty,
        "panic": float(balance.panic),
        "weights": balance.weights,
        "orca": {
            "blackout": balance.orca.blackout,
            "expiry": balance.orca.expiry,
            "error_penalty": float(balance.orca.error_penalty),
        },
        "slow_start": balance.slow_start,
        "slow_start_least": float(balance.slow_start_least),
        "hash": {
            "on": [_part(*part) for part in parts],
            "bound": float(balance.hash_bound),
            "ring": balance.ring_size,
            "table": balance.table_size,
        },
        "sticky": _part(kind, name),
        "locality": {
            # A key has one home, whoever asks.
            "policy": "off" if balance.policy in HASHING else balance.locality,
            "order": list(balance.zones),
            "overprovisioning": float(balance.overprovisioning),
            "least_endpoints": balance.zone_aware_from,
        },
    }


def _admit(admit: doc.AdmitRules, rates: tuple[RatePolicy, ...], *, connect: float) -> Json:
    breaker = admit.breaker
    return {
        "in_flight": admit.in_flight,
        "pending": admit.pending,
        "connect": connect,
        "breaker": {
            "failures": breaker.failures,
            "success_rate": float(breaker.success_rate),
            "window": breaker.window,
            "minimum_calls": breaker.minimum_calls,
            "open_min": breaker.open[0],
            "open_max": breaker.open[1],
            "max_ejected": float(breaker.max_ejected),
            "slow": breaker.slow,
            "slow_rate": float(breaker.slow_rate),
        },
        "adaptive": _adaptive(admit.adaptive_limits) if admit.adaptive == "gradient" else None,
        "throttle": {"ratio": float(admit.throttle), "window": admit.throttle_window},
        # What a store counts is here only as its stand-in.
        "rate": [_rate(rate) for rate in rates if not rate.is_global or rate.on_failure == "local"],
    }


def _rate(rate: RatePolicy) -> Json:
    return {
        "name": rate.name,
        "calls": float(rate.calls),
        "per": rate.per,
        "burst": float(rate.burst),
        "by": [_part(part.kind, part.name) for part in rate.by],
        "is_standby": rate.is_global,
    }


def _inbound_rate(rate: RatePolicy) -> Json:
    """A limit of a store, too: the gate has to know that it must be asked for, and stands in for it if the store is away.

    Where nobody is to stand in (on_failure is open or closed), its stand-in is a limit that holds nobody.
    """
    plan = _rate(rate)
    plan["is_global"] = plan.pop("is_standby")
    if rate.is_global and rate.on_failure != "local":
        plan |= {"calls": _BOUNDLESS, "burst": _BOUNDLESS, "per": 1.0}
    return plan


def _public(own: ServicePolicy) -> list[RulePolicy]:
    """What is judged by at the public listener: all that may refuse, and only its own rules that let in. None: nobody gets in."""
    if own.inbound.public is None:
        return []
    return [*(rule for rule in own.rules if rule.action != "allow"), *own.inbound.public_allow]


def _admission(own: ServicePolicy) -> Json:
    inbound = own.inbound
    return {
        "in_flight": inbound.in_flight,
        "adaptive": None if inbound.adaptive is None else _adaptive(inbound.adaptive),
        "queue": inbound.queue,
        "target": inbound.target,
        "interval": inbound.interval,
        "shares": list(inbound.shares),
        "priorities": [
            {
                "from": secure_plan.peers(one.callers),
                "paths": [secure_plan.path(path) for path in one.paths],
                "as": one.level,
            }
            for one in inbound.priorities
        ],
        "probes": [secure_plan.path(path) for path in inbound.probes],
    }


def _adaptive(limits: AdaptiveLimits) -> Json:
    return {"initial": limits.initial, "least": limits.least, "most": limits.most}


def _part(kind: str, name: str) -> Json:
    return {"kind": kind, "name": name}


def _route(route: RoutePolicy) -> Json:
    return {
        "name": route.name,
        "match": {
            "path": _path(route.match.path),
            "methods": list(route.match.methods),
            "headers": [_header(header) for header in route.match.headers],
        },
        "backends": [
            {"name": backend_name(backend), "labels": dict(backend.labels), "weight": backend.weight}
            for backend in route.backends
        ],
        "retry": _retry(route.retry),
        "deadline": route.deadline,
        "stream_idle": route.stream_idle,
    }


def _retry(retry: doc.RouteRetry) -> Json:
    hedge = {"quantile": float(retry.hedge_quantile), "share": float(retry.hedge_share), "least": retry.hedge_least}
    return {
        "attempts": retry.attempts,
        "backoff_base": retry.backoff[0],
        "backoff_max": retry.backoff[1],
        "statuses": list(retry.statuses),
        "idempotency_key": retry.idempotency_key,
        "idempotent": retry.idempotent,
        "on": list(dict.fromkeys(retry.on)),
        "per_try": retry.per_try,
        "hedge": hedge if retry.hedge else None,
    }


def backend_name(backend: doc.Backend) -> str:
    """`version=v1`, or `all` for the backend without labels: what explain() and metrics call it."""
    return ",".join(f"{key}={value}" for key, value in sorted(backend.labels.items())) or "all"


def _path(match: doc.PathMatch | None) -> Json:
    if match is None:
        return {"kind": "prefix", "value": "/"}
    if match.exact is not None:
        return {"kind": "exact", "value": match.exact}
    if match.template is not None:
        return {"kind": "template", "value": match.template}
    return {"kind": "prefix", "value": match.prefix or "/"}


def _header(match: doc.HeaderMatch) -> Json:
    if match.exact is not None:
        return {"name": match.name, "kind": "exact", "value": match.exact}
    if match.prefix is not None:
        return {"name": match.name, "kind": "prefix", "value": match.prefix}
    return {"name": match.name, "kind": "present", "value": ""}


def _encode(plan: Json) -> bytes:
    return json.dumps(plan, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
