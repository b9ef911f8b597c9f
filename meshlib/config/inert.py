"""Which settings of retry, balance and admit has nobody a use for?

A key that another key must switch on does nothing without it, and says so nowhere: a ring_size with peak_ewma, limits
of an adaptive that is off. Each such pair is a row here. A key of the system is inert only if it is so for every
service (and guard) that follows it; a key of a service if it is so for that service.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from .levels import HASHING
from .policy import GuardPolicy, ServicePolicy
from .text import Path, Text

SAFE: Final = ("GET", "HEAD", "OPTIONS")


@dataclass(frozen=True, slots=True)
class _Pair:
    """A key (section first), who has a use for it, and what would give it one."""

    keys: tuple[str, ...]
    is_used: Callable[[Any], bool]
    hint: str


def _hashes(one: ServicePolicy) -> bool:
    return one.balance.policy in HASHING


def _hedges(one: ServicePolicy | GuardPolicy) -> bool:
    return isinstance(one, ServicePolicy) and any(route.retry.hedge for route in one.routes)


_PAIRS: Final = (
    _Pair(("retry", "statuses"), lambda one: any("status" in route.retry.on for route in one.routes), "status under `on`"),
    _Pair(("retry", "hedge_quantile"), _hedges, "hedge: true"),
    _Pair(("retry", "hedge_share"), _hedges, "hedge: true"),
    _Pair(("retry", "hedge_least"), _hedges, "hedge: true"),
    _Pair(("balance", "orca"), lambda one: one.balance.weights == "orca", "weights: orca"),
    _Pair(("balance", "slow_start_least"), lambda one: one.balance.slow_start > 0, "slow_start: 10s"),
    _Pair(("balance", "hash_on"), _hashes, "policy: ring_hash or maglev"),
    _Pair(("balance", "hash_bound"), _hashes, "policy: ring_hash or maglev"),
    _Pair(("balance", "ring_size"), lambda one: one.balance.policy == "ring_hash", "policy: ring_hash"),
    _Pair(("balance", "table_size"), lambda one: one.balance.policy == "maglev", "policy: maglev"),
    _Pair(("balance", "zones"), lambda one: one.balance.locality == "failover", "locality: failover"),
    _Pair(("balance", "overprovisioning"), lambda one: one.balance.locality == "failover", "locality: failover"),
    _Pair(("balance", "zone_aware_from"), lambda one: one.balance.locality == "zone_aware", "locality: zone_aware"),
    _Pair(("admit", "adaptive_limits"), lambda one: one.admit.adaptive == "gradient", "adaptive: gradient"),
    _Pair(("admit", "throttle_window"), lambda one: one.admit.throttle > 0, "throttle: 2"),
)


def warn(found: Text, services: Mapping[str, ServicePolicy], guards: Mapping[str, GuardPolicy]) -> None:
    """Note what is written and has no effect."""
    for pair in _PAIRS:
        everyone: list[tuple[Path, ServicePolicy | GuardPolicy]] = [(("services", name), one) for name, one in services.items()]
        if pair.keys[0] == "admit":
            everyone += [(("guards", name), one) for name, one in guards.items()]
        _pair(found, pair, everyone)
    for service in services.values():
        at: Path = ("services", service.name)
        _locality(found, at, service)
        _check(found, at, service)
        _hedge(found, at, service)
    _per_try(found, services)
    _grpc(found, services)
    for at in [(), *(("services", name) for name in services), *(("guards", name) for name in guards)]:
        _rates(found, at)


def _pair(found: Text, pair: _Pair, everyone: Iterable[tuple[Path, ServicePolicy | GuardPolicy]]) -> None:
    message = f"{pair.keys[-1]} has no effect without {pair.hint}"
    following: list[bool] = []
    for at, one in everyone:
        place = (*at, *pair.keys)
        if place not in found.lines:
            following.append(pair.is_used(one))
        elif not pair.is_used(one):
            found.refuse(place, message, f"{pair.hint}; or leave it out")
    if pair.keys in found.lines and following and not any(following):
        found.refuse(pair.keys, message, f"{pair.hint}; or leave it out")


def _place(found: Text, at: Path, *keys: str) -> Path | None:
    """Where the key stands that counts for a service, or None if it is a default."""
    return next((place for place in ((*at, *keys), keys) if place in found.lines), None)


def _locality(found: Text, at: Path, service: ServicePolicy) -> None:
    balance = service.balance
    place = _place(found, at, "balance", "locality")
    if place is None or balance.locality == "off" or not _hashes(service):
        return
    message = f"locality is ignored by {balance.policy} of {service.name}: a key has one home, whoever asks"
    found.refuse(place if place[:2] == at else (*at, "balance"), message, "locality: off, or another policy")


def _check(found: Text, at: Path, service: ServicePolicy) -> None:
    check = service.check
    if check is None:
        return
    kind_at = _place(found, at, "admit", "check", "kind")
    is_grpc = service.protocol == "grpc"
    if kind_at is not None and check.kind != "tcp" and (check.kind == "grpc") != is_grpc:
        message = f"{service.name} speaks {service.protocol}, and is asked by {check.kind}: it will look ill"
        found.refuse(kind_at, message, f"kind: {'grpc' if is_grpc else 'http'}, or tcp")
    path_at = _place(found, at, "admit", "check", "path")
    if path_at is not None and path_at[:2] == at and check.kind != "http":
        found.refuse(path_at, f"a check by {check.kind} has no path", "kind: http; or leave it out")


def _per_try(found: Text, services: Mapping[str, ServicePolicy]) -> None:
    """A time for attempts that no call has."""
    read: dict[Path, list[tuple[float, float]]] = {}
    for service in services.values():
        at: Path = ("services", service.name)
        for index, route in enumerate(service.routes):
            places = ((*at, "route", index, "retry", "per_try"), (*at, "retry", "per_try"), ("retry", "per_try"))
            place = next((place for place in places if place in found.lines), None)
            if place is not None:
                read.setdefault(place, []).append((route.retry.per_try, route.deadline))
    for place, pairs in read.items():
        if all(per_try >= deadline for per_try, deadline in pairs):
            message = f"per_try ({pairs[0][0]:g} s) never ends an attempt: the deadline of the call is earlier"
            found.refuse(place, message, f"below {max(deadline for _, deadline in pairs):g} s")


def _hedge(found: Text, at: Path, service: ServicePolicy) -> None:
    """Hedges of what may never be sent twice."""
    if service.protocol == "grpc":
        return  # methods are declared where the channel is made
    can_hedge = []
    for index, route in enumerate(service.routes):
        retry, place = route.retry, (*at, "route", index, "retry")
        unsafe = [method for method in route.match.methods if method not in SAFE]
        is_unsafe = bool(unsafe) and len(unsafe) == len(route.match.methods)
        can_hedge.append(not is_unsafe or retry.idempotency_key or retry.idempotent)
        if retry.hedge and (*place, "hedge") in found.lines and not can_hedge[-1]:
            found.refuse((*place, "hedge"), _NEVER, _IDEMPOTENT)
    if service.retry.hedge and (*at, "retry", "hedge") in found.lines and not any(can_hedge):
        found.refuse((*at, "retry", "hedge"), _NEVER, _IDEMPOTENT)


def _grpc(found: Text, services: Mapping[str, ServicePolicy]) -> None:
    """What gRPC channels don't do yet. A key of the system is told only if all that follow it speak gRPC."""
    for section, key, is_on in _NOT_FOR_GRPC:
        following: list[bool] = []
        for service in services.values():
            place: Path = ("services", service.name, section, key)
            if service.protocol != "grpc":
                following.append(False)
            elif place not in found.lines:
                following.append(is_on(service))
            elif is_on(service):
                found.refuse(place, f"{key} is not for gRPC yet: no effect on calls to {service.name}", "leave it out")
        if (section, key) in found.lines and following and all(following):
            found.refuse((section, key), f"{key} is not for gRPC yet, and all services that follow speak it", "leave it out")


# Section, key, and whether one who has it wants something.
_NOT_FOR_GRPC: Final[tuple[tuple[str, str, Callable[[Any], bool]], ...]] = (
    ("balance", "sticky", lambda one: one.balance.sticky is not None),
    ("balance", "weights", lambda one: one.balance.weights == "orca"),
)

_NEVER: Final = "hedge without effect: such calls are sent twice only if the caller says that they are idempotent"
_IDEMPOTENT: Final = "idempotency_key: true if the service honours that header; idempotent: true if all calls may be doubled"


def _rates(found: Text, at: Path) -> None:
    for index in range(10_000):
        place: Path = (*at, "admit", "rate", index)
        if place not in found.lines:
            return
        if (*place, "on_failure") in found.lines and (*place, "store") not in found.lines:
            found.refuse((*place, "on_failure"), "on_failure has no effect without a store", "store: redis; or leave it out")
