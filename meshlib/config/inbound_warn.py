"""Which settings about what comes in are allowed, but do nothing or more than one may think?

A key that another must switch on, a listener where everyone is denied or nobody is, a priority that no call ever has, what
servers can't do yet. As in `warn.py`, which calls this, policies filled in are looked at.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields

from .inbound_policy import InboundPolicy, PriorityPolicy
from .policy import ServicePolicy
from .secure_policy import RulePolicy
from .text import Path, Text

# What doesn't narrow a rule down.
_NO_CLAUSES = ("name", "action", "callers", "authorizer", "is_case_insensitive", "is_dry_run", "place")


def warn(found: Text, services: Mapping[str, ServicePolicy]) -> None:
    """Note what is allowed, and without effect or weaker than it looks."""
    for service in services.values():
        at: Path = ("services", service.name, "inbound")
        _public(found, at, service)
        _priorities(found, at, service)
        _inert(found, at, service.inbound)
        _routes(found, service)
        if service.protocol == "grpc":
            _grpc(found, at, service.inbound)


def _public(found: Text, at: Path, service: ServicePolicy) -> None:
    inbound = service.inbound
    if inbound.public is None:
        return
    rules = inbound.public_allow
    place = (*at, "public")
    if all(rule.is_dry_run for rule in rules):
        message = "no rule allows anything at the public listener: in mode enforce every call is denied there"
        found.refuse(place, message, "allow: [{from: ['*'], paths: [/…]}]; the rules under secure don't let in there")
    for rule in rules:
        if "*" in rule.callers and not rule.is_dry_run and not _narrows(rule):
            message = "everyone may call everything at the public listener, without any identity"
            found.refuse(rule.place, message, "paths and methods; or request_principals, for callers with a token")


def _narrows(rule: RulePolicy) -> bool:
    return any(getattr(rule, field.name) for field in fields(rule) if field.name not in _NO_CLAUSES)


def _priorities(found: Text, at: Path, service: ServicePolicy) -> None:
    inbound = service.inbound
    is_covered = False
    for index, one in enumerate(inbound.priorities):
        place = (*at, "priority", index)
        if is_covered:
            found.refuse(place, "never reached: an entry before it is for every call", "put the wider entry last")
        elif service.mode == "observe" and "*" not in one.callers:
            message = f"{service.name} is in mode observe, where callers have no identity: this is nobody's priority"
            found.refuse((*place, "from"), message, "mode: permissive; or from: ['*'] with paths")
        is_covered |= _is_for_all(one)
    if not inbound.priorities and (*at, "shares") in found.lines:
        found.refuse((*at, "shares"), "shares has no effect without priority", "priority: [{from: […], as: …}]; or leave it out")


def _is_for_all(one: PriorityPolicy) -> bool:
    return "*" in one.callers and (not one.paths or "/*" in one.paths)


def _inert(found: Text, at: Path, inbound: InboundPolicy) -> None:
    if inbound.adaptive is None and (*at, "adaptive_limits") in found.lines:
        message = "adaptive_limits has no effect without adaptive: gradient"
        found.refuse((*at, "adaptive_limits"), message, "adaptive: gradient; or leave it out")
    if inbound.adaptive is not None and inbound.adaptive.most > inbound.in_flight:
        message = f"the limit never grows to {inbound.adaptive.most}: in_flight is {inbound.in_flight}, and it never goes beyond"
        place = (*at, "adaptive_limits", "most")
        if place in found.lines:
            found.refuse(place, message, "most at or below in_flight")
    if inbound.queue == 0 and (*at, "codel") in found.lines:
        found.refuse((*at, "codel"), "codel has no effect: with queue: 0 nobody waits", "queue: 0.5; or leave it out")
    for index in range(len(inbound.rates)):
        place = (*at, "rate", index)
        if (*place, "on_failure") in found.lines and (*place, "store") not in found.lines:
            found.refuse((*place, "on_failure"), "on_failure has no effect without a store", "store: redis; or leave it out")


def _routes(found: Text, service: ServicePolicy) -> None:
    """The gate knows a route by its path alone."""
    for index, route in enumerate(service.routes):
        place = ("services", service.name, "route", index, "on_disconnect")
        if place not in found.lines:
            continue
        if service.protocol == "grpc":
            if route.on_disconnect != "nothing":
                message = "on_disconnect is not for gRPC: it cancels handlers of asyncio by itself, and nobody can cancel those in threads"
                found.refuse(place, message, "leave it out; or nothing, for the calls of handlers in threads")
        elif route.match.methods or route.match.headers:
            message = "on_disconnect goes by the path alone: methods and headers of the match don't narrow it down"
            found.refuse(place, message, "a path of its own for what must not stop half-way")


def _grpc(found: Text, at: Path, inbound: InboundPolicy) -> None:
    if inbound.public is not None:
        message = "public is not for gRPC yet: nobody listens there"
        found.refuse((*at, "public"), message, "a proxy with an identity of its own in front, and a rule that names it")
