"""What may a user write in mesh.yaml?

The whole file as types, one class for each section, in the order in which a person reads it. The classes say what is
allowed and nothing else: defaults and ranges come from `defaults.py`, single values from `values.py`, what depends
on other sections is checked in `vet.py`, and what finally counts for a service (override over service over system)
is computed in `policy.py`.

Who is trusted (`secure`) and what goes out (`egress`) is in `secure_document.py`, what comes in (`inbound`) in
`inbound_document.py`, where services are (`discover`, `registries`) in `discover_document.py`, and the node agent in
`agent_document.py`.
"""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

from pydantic import BeforeValidator, ConfigDict, Field

from .agent_document import Agent, Delegate
from .defaults import override, setting
from .discover_document import DiscoverOrWord, RegisterOrWord, Registry
from .inbound_document import AdaptiveLimits, Inbound
from .section import Choice, Closed, Section
from .secure_document import Egress, EgressOrWord, Secure, ServiceSecure
from .values import (
    CheckPath,
    CookieName,
    GuardName,
    HeaderName,
    Label,
    ListenAddress,
    Method,
    Name,
    Pair,
    Prime,
    RoutePath,
    Seconds,
    SpiffeId,
    Template,
    Title,
    Variable,
    Zone,
    off,
    off_or,
    span,
    word_of,
)

Condition = Literal["connect", "refused_stream", "reset", "timeout", "protocol", "identity", "status"]


# ---------------------------------------------------------------- retry, balance, admit: for all or for a service


class RetryRules(Section):
    """When a call is tried again. Only safe calls are: nothing was written, or the call is idempotent."""

    attempts: int = setting("retry.attempts")
    backoff: Annotated[Pair, span("retry.backoff")] = setting("retry.backoff")
    statuses: Annotated[tuple[int, ...], span("retry.statuses")] = setting("retry.statuses")
    idempotency_key: bool = setting("retry.idempotency_key")
    on: Annotated[tuple[Condition, ...], Field(min_length=1)] = setting("retry.on")
    per_try: Seconds = setting("retry.per_try")
    hedge: bool = setting("retry.hedge")
    hedge_quantile: float = setting("retry.hedge_quantile")
    hedge_share: float = setting("retry.hedge_share")
    hedge_least: Seconds = setting("retry.hedge_least")


class RouteRetry(RetryRules):
    """Retries of a route. Only of a route can it be said that all calls are idempotent, never of everything."""

    idempotent: bool = setting("retry.idempotent")


class Budget(Section):
    """What all retries of a service together may add to its load."""

    ratio: float = setting("retry.budget.ratio")
    per_second: float = setting("retry.budget.per_second")
    window: Seconds = setting("retry.budget.window")


class Retry(RetryRules):
    """Retries of a service: as for a route, and the budget that its routes share."""

    budget: Budget = Field(default_factory=Budget, description="What retries may add to the load of a service.")


class Orca(Section):
    """How far the reports of endpoints on their own load are believed."""

    blackout: Seconds = setting("balance.orca.blackout")
    expiry: Seconds = setting("balance.orca.expiry")
    error_penalty: float = setting("balance.orca.error_penalty")


class HashPart(Choice):
    """A part of a call that decides where it goes."""

    header: HeaderName | None = Field(default=None, description="The value of a request header.")
    cookie: CookieName | None = Field(default=None, description="The value of a cookie.")
    path: Variable | None = Field(default=None, description="A variable of the route's template: id for /items/{id}.")
    peer: Literal[True] | None = Field(default=None, description="On whose behalf the call is made.")


class Sticky(Choice):
    """What a client brings back, so that it comes to the same endpoint again."""

    cookie: CookieName | None = Field(default=None, description="A cookie, set with the answer.")
    header: HeaderName | None = Field(default=None, description="A header of the answer, which the client sends again.")


StickyOrOff = Annotated[Sticky | None, BeforeValidator(off, json_schema_input_type=Sticky | Literal["off"])]


class Balance(Section):
    """Which endpoint takes a call."""

    policy: Literal["peak_ewma", "least_request", "round_robin", "random", "ring_hash", "maglev"] = setting("balance.policy")
    decay: Seconds = setting("balance.decay")
    start: Seconds = setting("balance.start")
    penalty: Seconds = setting("balance.penalty")
    panic: float = setting("balance.panic")
    weights: Literal["discover", "orca"] = setting("balance.weights")
    orca: Orca = Field(default_factory=Orca, description="How far the reports of endpoints are believed.")
    slow_start: Seconds = setting("balance.slow_start")
    slow_start_least: float = setting("balance.slow_start_least")
    hash_on: tuple[HashPart, ...] = setting("balance.hash_on")
    hash_bound: Annotated[float, off_or("balance.hash_bound", 1.05)] = setting("balance.hash_bound")
    ring_size: int = setting("balance.ring_size")
    table_size: Prime = setting("balance.table_size")
    sticky: StickyOrOff = Field(default=None, description="Clients come back to their endpoint. Default: off.")
    locality: Literal["off", "failover", "zone_aware"] = setting("balance.locality")
    zones: tuple[Zone, ...] = setting("balance.zones")
    overprovisioning: float = setting("balance.overprovisioning")
    zone_aware_from: int = setting("balance.zone_aware_from")


class Breaker(Section):
    """When an endpoint is ejected, and for how long."""

    failures: int = setting("admit.breaker.failures")
    success_rate: float = setting("admit.breaker.success_rate")
    window: Seconds = setting("admit.breaker.window")
    minimum_calls: int = setting("admit.breaker.minimum_calls")
    open: Annotated[Pair, span("admit.breaker.open")] = setting("admit.breaker.open")
    max_ejected: float = setting("admit.breaker.max_ejected")
    slow: Seconds = setting("admit.breaker.slow")
    slow_rate: float = setting("admit.breaker.slow_rate")


COUNTED_BY: Final = ("service", "route", "peer")


def _from_word(value: Any) -> Any:
    return word_of(value, COUNTED_BY, {}, f"{', '.join(COUNTED_BY)}, or {{header: x-tenant}}")


class RatePart(Choice):
    """What of a call a limit is counted by."""

    service: Literal[True] | None = Field(default=None, description="All calls of the service together.")
    route: Literal[True] | None = Field(default=None, description="Each route for itself.")
    peer: Literal[True] | None = Field(default=None, description="Each one on whose behalf calls are made.")
    header: HeaderName | None = Field(default=None, description="Each value of a request header.")


CountedBy = Annotated[
    RatePart,
    BeforeValidator(_from_word, json_schema_input_type=RatePart | Literal["service", "route", "peer"]),
]


class Rate(Section):
    """So many calls in a time, and what is counted together."""

    name: Title | None = Field(default=None, description='In logs and refusals. Default: "<service>/rate/<index>".')
    calls: int = Field(ge=1, le=1_000_000_000, description="Calls in each `per`: 1 to 1000000000. No default.")
    per: Seconds = setting("admit.rate.per")
    burst: int | None = Field(default=None, ge=1, le=1_000_000_000, description="Calls at once: 1 to 1000000000. Default: calls.")
    by: Annotated[tuple[CountedBy, ...], Field(min_length=1)] = setting("admit.rate.by")
    store: Name = setting("admit.rate.store")
    on_failure: Literal["local", "open", "closed"] = setting("admit.rate.on_failure")


class Check(Section):
    """How endpoints are asked whether they are well."""

    kind: Literal["http", "grpc", "tcp"] | None = Field(
        default=None, description="Default: grpc for services of protocol grpc, else http."
    )
    path: CheckPath = setting("admit.check.path")
    every: Seconds = setting("admit.check.every")
    timeout: Seconds = setting("admit.check.timeout")
    failures: int = setting("admit.check.failures")
    successes: int = setting("admit.check.successes")


CheckOrOff = Annotated[Check | None, BeforeValidator(off, json_schema_input_type=Check | Literal["off"])]


class AdmitRules(Section):
    """How many calls may be under way: to a service, or of a guarded function."""

    in_flight: int = setting("admit.in_flight")
    pending: int = setting("admit.pending")
    breaker: Breaker = Field(default_factory=Breaker, description="When an endpoint is ejected, and for how long.")
    adaptive: Literal["off", "gradient"] = setting("admit.adaptive")
    adaptive_limits: AdaptiveLimits = Field(default_factory=AdaptiveLimits, description="Its bounds.")
    throttle: Annotated[float, off_or("admit.throttle", 1.1)] = setting("admit.throttle")
    throttle_window: Seconds = setting("admit.throttle_window")
    rate: tuple[Rate, ...] = Field(default=(), description="Limits in calls per time. All of them count.")


class Admit(AdmitRules):
    """How many calls may be under way, and to which endpoints none may go."""

    connect: Seconds = setting("admit.connect")
    check: CheckOrOff = Field(default=None, description="Endpoints are asked whether they are well. Default: off.")


# ---------------------------------------------------------------- guards: functions instead of services


class GuardRetry(Section):
    """When a guarded function is called again: only if it is idempotent."""

    attempts: int = setting("retry.attempts")
    backoff: Annotated[Pair, span("retry.backoff")] = setting("retry.backoff")
    idempotent: bool = setting("retry.idempotent")
    per_try: Seconds = setting("retry.per_try")
    budget: Budget = Field(default_factory=Budget, description="What retries may add to the calls of this function.")


class Guard(Section):
    """What `@mesh.guard("<name>")` goes by, over the system's."""

    retry: GuardRetry | None = Field(default=None, description="Over the system's.")
    admit: AdmitRules | None = Field(default=None, description="Over the system's.")
    deadline: Seconds | None = override("deadline", "system")


class Store(Closed):
    """A store of limits that processes share. Other keys than these are passed on to it as they are."""

    model_config = ConfigDict(extra="allow")

    url: str | None = Field(default=None, min_length=1, repr=False, description="Where it is: redis://host:6379/0")
    timeout: Seconds = setting("stores.timeout")


# ---------------------------------------------------------------- observe


class Observe(Section):
    """What is told about calls, and where."""

    metrics: ListenAddress | None = setting("observe.metrics")
    sample: float = setting("observe.sample")


# ---------------------------------------------------------------- route


class PathMatch(Section):
    """Exactly one of the three."""

    exact: RoutePath | None = Field(default=None, description="This very path.")
    prefix: RoutePath | None = Field(default=None, description="This path and everything under it, by whole segments.")
    template: Template | None = Field(default=None, description="Segments with variables: /items/{id}.")


class HeaderMatch(Section):
    """A header, and exactly one condition on it."""

    name: HeaderName
    exact: str | None = Field(default=None, description="The whole value.")
    prefix: str | None = Field(default=None, min_length=1, description="The beginning of the value.")
    present: Literal[True] | None = Field(default=None, description="The header is there, whatever it says.")


class Match(Section):
    """Which calls a route takes: all conditions hold at once."""

    path: PathMatch | None = None
    methods: tuple[Method, ...] = Field(default=(), description="HTTP methods; none means all.")
    headers: tuple[HeaderMatch, ...] = ()


class Backend(Section):
    """Those endpoints of the service that carry all these labels, and their share."""

    labels: dict[str, Label] = Field(default_factory=dict, description="None means all endpoints.")
    weight: int = setting("route.weight")


class Route(Section):
    """The first route that matches takes the call."""

    name: Title | None = Field(default=None, description='In logs and metrics. Default: "<service>/<index>".')
    match: Match = Field(default_factory=Match, description="Nothing means every call.")
    backends: tuple[Backend, ...] = Field(default=(), description="Nothing means all endpoints.")
    retry: RouteRetry | None = Field(default=None, description="Over the service's.")
    deadline: Seconds | None = override("deadline", "service")
    stream_idle: Seconds | None = override("stream_idle", "service")
    on_disconnect: Literal["calls", "handler", "nothing"] = setting("route.on_disconnect")


# ---------------------------------------------------------------- the whole


class Service(Section):
    """One service: what its callers need to reach it, and what its own process needs to be it."""

    listen: ListenAddress | None = Field(default=None, description="Where `meshlib serve` listens.")
    protocol: Literal["http", "http2", "grpc"] = setting("protocol")
    identity: SpiffeId | None = Field(default=None, description="Default: spiffe://<trust domain>/ns/<namespace>/sa/<service>.")
    discover: DiscoverOrWord | None = Field(default=None, description="Where it is. Nothing means that nobody calls it.")
    register_: RegisterOrWord | None = Field(
        default=None, alias="register", description="Its processes enter themselves in a registry."
    )
    delegate: Delegate | None = Field(default=None, description="Over the system's: agent or off.")
    route: tuple[Route, ...] = Field(default=(), description="Nothing means one route for everything.")
    retry: Retry | None = Field(default=None, description="Over the system's.")
    balance: Balance | None = Field(default=None, description="Over the system's.")
    admit: Admit | None = Field(default=None, description="Over the system's.")
    deadline: Seconds | None = override("deadline", "system")
    stream_idle: Seconds | None = override("stream_idle", "system")
    secure: ServiceSecure = Field(default_factory=ServiceSecure)
    inbound: Inbound = Field(default_factory=Inbound, description="What is admitted of what comes in.")
    observe: Observe | None = Field(default=None, description="Over the system's, for this service's own processes.")


class Document(Section):
    """mesh.yaml: one file for a whole system."""

    mesh: Name = Field(description="The name of the system.")
    secure: Secure
    observe: Observe = Field(default_factory=Observe)
    egress: EgressOrWord = Field(default_factory=Egress, description="Calls to hosts that are no service. Default: allow.")
    deadline: Seconds = setting("deadline")
    stream_idle: Seconds = setting("stream_idle")
    retry: Retry = Field(default_factory=Retry)
    balance: Balance = Field(default_factory=Balance)
    admit: Admit = Field(default_factory=Admit)
    guards: dict[GuardName, Guard] = Field(default_factory=dict, description="Guarded functions, by the name in the code.")
    stores: dict[Name, Store] = Field(default_factory=dict, description="Stores of limits, by the name of their plugin.")
    registries: dict[Name, Registry] = Field(
        default_factory=dict, description="Who knows where services are, by a name of yours."
    )
    agent: Agent | None = Field(default=None, description="The node agent: `meshlib agent run`. Default: none.")
    delegate: Delegate = setting("delegate")
    services: dict[Name, Service] = Field(min_length=1, description="By the name that callers use as host: http://orders/…")
