"""What do the two engines in Rust get to know?

Two JSON documents in which every field is explicit, made from a `Config`: the client plan (all services, as this
process may call them) and the server plan (who may call this process). The names of the fields are the contract with
the core, which refuses unknown and missing ones. Endpoints are not in it: they come from discover, and change more
often.

Here, and only here, it is decided whether an edge is plain or mutual TLS: see `Config.is_private`.
"""

from __future__ import annotations

import json
from typing import Any

from . import document as doc
from .policy import Config, RoutePolicy, RulePolicy, ServicePolicy
from .values import rule_path_kind

Json = dict[str, Any]


def client_plan(config: Config) -> bytes:
    """The outbound plan."""
    return _encode({"services": [_service(config, service) for service in config.services.values()]})


def server_plan(config: Config) -> bytes:
    """The inbound plan of the service that this process is."""
    own = config.own
    return _encode(
        {
            "service": own.name,
            "mode": own.mode,
            "identity": own.identity,
            "paths": config.secure.paths,
            "in_flight": own.admit.in_flight,
            "rules": [_rule(rule) for rule in own.rules],
            "routes": [{"name": route.name, "path": _path(route.match.path)} for route in own.routes],
        }
    )


def _service(config: Config, service: ServicePolicy) -> Json:
    breaker = service.admit.breaker
    return {
        "name": service.name,
        "hosts": [service.name],
        "protocol": service.protocol,
        "identity": service.identity if config.is_private(service.name) else "",
        "routes": [_route(route) for route in service.routes],
        "budget": {
            "ratio": float(service.retry.budget.ratio),
            "per_second": float(service.retry.budget.per_second),
            "window": service.retry.budget.window,
        },
        "balance": {
            "policy": service.balance.policy,
            "decay": service.balance.decay,
            "start": service.balance.start,
            "penalty": service.balance.penalty,
            "panic": float(service.balance.panic),
        },
        "admit": {
            "in_flight": service.admit.in_flight,
            "connect": service.admit.connect,
            "breaker": {
                "failures": breaker.failures,
                "success_rate": float(breaker.success_rate),
                "window": breaker.window,
                "minimum_calls": breaker.minimum_calls,
                "open_min": breaker.open[0],
                "open_max": breaker.open[1],
                "max_ejected": float(breaker.max_ejected),
            },
        },
    }


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
        "retry": {
            "attempts": route.retry.attempts,
            "backoff_base": route.retry.backoff[0],
            "backoff_max": route.retry.backoff[1],
            "statuses": list(route.retry.statuses),
            "idempotency_key": route.retry.idempotency_key,
            "idempotent": route.retry.idempotent,
        },
        "deadline": route.deadline,
        "stream_idle": route.stream_idle,
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


def _rule(rule: RulePolicy) -> Json:
    methods = list(rule.methods)
    if rule.action == "deny" and "GET" in methods and "HEAD" not in methods:
        methods.append("HEAD")  # a HEAD tells what a GET would: who may not GET may not HEAD either
    return {
        "name": rule.name,
        "action": rule.action,
        "dry_run": rule.is_dry_run,
        "from": [_caller(caller) for caller in rule.callers],
        "methods": methods,
        "paths": [dict(zip(("kind", "value"), rule_path_kind(path), strict=True)) for path in rule.paths],
    }


def _caller(caller: str) -> Json:
    if caller == "*":
        return {"kind": "any"}
    if caller.endswith("*"):
        return {"kind": "prefix", "value": caller[:-1]}
    return {"kind": "exact", "value": caller}


def _encode(plan: Json) -> bytes:
    return json.dumps(plan, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
