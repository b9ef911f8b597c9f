"""What does the gate get to know of rules, tokens and proxies?

The parts of the server plan that say who is trusted; `plan.py` has the whole. Every clause is written out, an empty
list means that there is no such condition, and patterns are split into kind and text here, so that the core never
reads a star.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from .rule_values import ADDRESSES, network, pattern_kind, rule_path_kind
from .secure_policy import ProviderPolicy, ProxiesPolicy, RulePolicy, WhenPolicy

Json = dict[str, Any]


def rule(rule: RulePolicy) -> Json:
    """A rule with every clause."""
    return {
        "name": rule.name,
        "action": rule.action,
        "dry_run": rule.is_dry_run,
        "authorizer": rule.authorizer,
        "from": peers(rule.callers),
        "not_from": peers(rule.not_callers),
        "namespaces": _texts(rule.namespaces),
        "not_namespaces": _texts(rule.not_namespaces),
        "request_principals": _texts(rule.request_principals),
        "not_request_principals": _texts(rule.not_request_principals),
        "ip_blocks": list(rule.ip_blocks),
        "not_ip_blocks": list(rule.not_ip_blocks),
        "remote_ip_blocks": list(rule.remote_ip_blocks),
        "not_remote_ip_blocks": list(rule.not_remote_ip_blocks),
        # A HEAD tells what a GET would: who may not GET may not HEAD either.
        "methods": _with_head(rule.methods) if rule.action != "allow" else list(rule.methods),
        "not_methods": _with_head(rule.not_methods) if rule.action == "allow" else list(rule.not_methods),
        "paths": _paths(rule.paths, rule.path_regexes),
        "not_paths": _paths(rule.not_paths, rule.not_path_regexes),
        "is_case_insensitive": rule.is_case_insensitive,
        "hosts": _texts(rule.hosts),
        "not_hosts": _texts(rule.not_hosts),
        "ports": list(rule.ports),
        "not_ports": list(rule.not_ports),
        "when": [_when(one) for one in rule.when],
    }


def _with_head(methods: tuple[str, ...]) -> list[str]:
    return [*methods, "HEAD"] if "GET" in methods and "HEAD" not in methods else list(methods)


def _when(one: WhenPolicy) -> Json:
    return {"key": one.key, "values": _values(one.key, one.values), "not_values": _values(one.key, one.not_values)}


def _values(key: str, values: tuple[str, ...]) -> list[Json]:
    if key in ADDRESSES:
        return [{"kind": "exact", "value": network(value)} for value in values]
    return _texts(values)


def _texts(patterns: Iterable[str]) -> list[Json]:
    return [_text(*pattern_kind(pattern)) for pattern in patterns]


def _text(kind: str, text: str) -> Json:
    return {"kind": kind} if kind == "any" else {"kind": kind, "value": text}


def _paths(paths: Iterable[str], regexes: Iterable[str]) -> list[Json]:
    return [*(path(one) for one in paths), *({"kind": "regex", "value": one} for one in regexes)]


def path(written: str) -> Json:
    """A path of a rule, by how it is compared."""
    kind, value = rule_path_kind(written)
    return {"kind": kind, "value": value}


def peers(callers: Iterable[str]) -> list[Json]:
    """Callers, by how they are compared."""
    return [_peer(caller) for caller in callers]


def _peer(caller: str) -> Json:
    if caller == "*":
        return {"kind": "any"}
    if caller.endswith("*"):
        return {"kind": "prefix", "value": caller[:-1]}
    return {"kind": "exact", "value": caller}


def proxies(proxies: ProxiesPolicy) -> Json:
    """Who is believed about where a call comes from."""
    return {"identities": peers(proxies.callers), "cidrs": list(proxies.cidrs), "hops": proxies.hops}


def provider(provider: ProviderPolicy) -> Json:
    """Whose tokens are believed. Its keys are not in the plan: they come and go."""
    return {
        "name": provider.name,
        "issuer": provider.issuer,
        "audiences": list(provider.audiences),
        "algorithms": list(provider.algorithms),
        "leeway": provider.leeway,
        "longest": provider.longest,
        "from": [{"kind": place.kind, "name": place.name, "prefix": place.prefix} for place in provider.places],
        "forward": provider.is_forwarded,
        "is_svid": provider.is_svid,
    }
