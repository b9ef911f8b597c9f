"""What counts for a service, after all that was left out has been filled in?

`Config` is what the other modules read: no optional field stands for "look elsewhere". Overrides are merged key by
key: what a route says wins over its service, that over the system, that over the defaults. Identities are complete,
paths of files absolute. It is frozen: a reload makes a new one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from meshlib.errors import ConfigError, Problem

from . import document as doc
from .agent_policy import AgentPolicy, RegisterPolicy, RegistryPolicy, register
from .discover_document import Discover
from .inbound_policy import InboundPolicy, inbound
from .names import Names
from .rate_policy import RatePolicy, rates
from .section import Choice, Section
from .secure_document import Secure
from .secure_policy import CredentialPolicy, FederationPolicy, IdentityChoice, ProviderPolicy, ProxiesPolicy, RulePolicy, rules
from .source import ConfigSource, shown
from .text import Text
from .values import near, some

S = TypeVar("S", bound=Section)


@dataclass(frozen=True, slots=True)
class RoutePolicy:
    """A route with everything filled in."""

    name: str
    match: doc.Match
    backends: tuple[doc.Backend, ...]
    retry: doc.RouteRetry
    deadline: float
    stream_idle: float
    on_disconnect: str


@dataclass(frozen=True, slots=True)
class CheckPolicy:
    """How endpoints are asked whether they are well. `kind` is http, grpc or tcp; `path` counts for http."""

    kind: str
    path: str
    every: float
    timeout: float
    failures: int
    successes: int


@dataclass(frozen=True, slots=True)
class GuardPolicy:
    """What a guarded function goes by, with everything filled in. Its limits are counted in this process."""

    name: str
    retry: doc.GuardRetry
    admit: doc.AdmitRules
    rates: tuple[RatePolicy, ...]
    deadline: float


@dataclass(frozen=True, slots=True)
class ServicePolicy:
    """A service with everything filled in. `identity` is its SPIFFE ID in every mode.

    `peer_check` says how a gRPC channel proves it: auto, dns or spiffe. `is_delegated`: calls to it go by the node agent.
    """

    name: str
    protocol: str
    identity: str
    mode: str
    peer_check: str
    listen: str | None
    discover: Discover | None
    register: RegisterPolicy | None
    is_delegated: bool
    routes: tuple[RoutePolicy, ...]
    retry: doc.Retry
    balance: doc.Balance
    admit: doc.Admit
    rates: tuple[RatePolicy, ...]
    check: CheckPolicy | None
    deadline: float
    rules: tuple[RulePolicy, ...]
    providers: tuple[str, ...]
    jwt_required: tuple[str, ...]
    inbound: InboundPolicy
    observe: doc.Observe

    @property
    def is_by_peer(self) -> bool:
        """True if calls are balanced or limited by on whose behalf they are made."""
        by_hash = any(part.part[0] == "peer" for part in self.balance.hash_on)
        return by_hash or any(part.kind == "peer" for rate in self.rates for part in rate.by)

    @property
    def global_rates(self) -> tuple[RatePolicy, ...]:
        """The limits that all processes are counted for together."""
        return tuple(rate for rate in self.rates if rate.is_global)

    @property
    def inbound_rates(self) -> tuple[RatePolicy, ...]:
        """The limits of calls that come in, whoever counts them."""
        return self.inbound.rates

    @property
    def inbound_global_rates(self) -> tuple[RatePolicy, ...]:
        """Those of them that are counted in a store."""
        return self.inbound.global_rates


@dataclass(frozen=True, slots=True)
class Config:
    """The whole configuration, as the process of one service sees it.

    `source` is the hash of the file's text, to tell whether a reload brings anything new. `warnings` are what
    `meshlib vet` tells about settings that are allowed, but inert or dangerous. `zone` is where this process runs, "" if
    nobody said. `guards` has an entry "*" for all that the file doesn't name; `stores` are settings by plugin.
    `origin` is None where `file` is one; else where it came from by `url`, and `file` says what relative paths are relative to.
    `fresh` is the text itself where the source was asked for it: what is to be kept on disk once it is in force.
    `places` knows on which lines it says where services are, for what only their packages can judge.
    `federation` is by trust domain, `jwt` by the provider's name. `record` is the folder of what `meshlib suggest` reads.
    """

    name: str
    file: Path
    service: str
    secure: Secure
    observe: doc.Observe
    services: Mapping[str, ServicePolicy]
    trust_domain: str
    egress: str
    deadline: float
    identity_folder: Path | None
    is_dev: bool
    source: str
    zone: str = ""
    guards: Mapping[str, GuardPolicy] = field(default_factory=dict)
    stores: Mapping[str, Mapping[str, Any]] = field(default_factory=dict, repr=False)
    warnings: tuple[Problem, ...] = field(default=(), repr=False)
    identity_source: IdentityChoice | None = None
    federation: Mapping[str, FederationPolicy] = field(default_factory=dict)
    jwt: Mapping[str, ProviderPolicy] = field(default_factory=dict)
    proxies: ProxiesPolicy = field(default_factory=ProxiesPolicy)
    egress_hosts: tuple[str, ...] = ()
    egress_credentials: tuple[CredentialPolicy, ...] = ()
    record: Path | None = None
    registries: Mapping[str, RegistryPolicy] = field(default_factory=dict)
    agent: AgentPolicy | None = None
    origin: ConfigSource | None = field(default=None, repr=False, compare=False)
    url: str = field(default="", repr=False)
    fresh: bytes = field(default=b"", repr=False, compare=False)
    places: Text = field(default_factory=lambda: Text(""), repr=False, compare=False)

    @property
    def label(self) -> str:
        """How people find it: the file, or the URL without what may be a password."""
        return shown(self.url) if self.url else str(self.file)

    @property
    def own(self) -> ServicePolicy:
        """The service that this process is."""
        return self.services[self.service]

    @property
    def xfcc(self) -> str:
        """What becomes of X-Forwarded-Client-Cert: sanitize, sanitize_set or append_forward."""
        return self.secure.xfcc

    @property
    def authorizers(self) -> tuple[str, ...]:
        """Whom the CUSTOM rules of the own service ask, each once."""
        return tuple(dict.fromkeys(rule.authorizer for rule in self.own.rules if rule.authorizer))

    def identity_of(self, service: str) -> str:
        """The SPIFFE ID of a service."""
        return self._known(service).identity

    def mode_of(self, service: str) -> str:
        """observe, permissive or enforce: how the listener of a service treats its callers."""
        return self._known(service).mode

    def is_private(self, service: str) -> bool:
        """True if this process speaks mutual TLS to a service.

        Both ends write it down: plain only if one of them is in mode observe. Nothing is probed or falls back.
        """
        return self.own.mode != "observe" and self._known(service).mode != "observe"

    def rates_of(self, service: str) -> tuple[RatePolicy, ...]:
        """The limits of a service that are counted in a store, for all processes together."""
        return self._known(service).global_rates

    def guard(self, name: str) -> GuardPolicy:
        """What a guarded function goes by, named in the file or not."""
        return self.guards.get(name) or self.guards["*"]

    def client_plan(self) -> bytes:
        """What the outbound engine needs, as JSON with every field explicit."""
        from .plan import client_plan

        return client_plan(self)

    def server_plan(self) -> bytes:
        """What the inbound gate needs, as JSON with every field explicit."""
        from .plan import server_plan

        return server_plan(self)

    def _known(self, service: str) -> ServicePolicy:
        found = self.services.get(service)
        if found is None:
            hint = f"{near(service, self.services)}Known services: {some(self.services)}."
            raise ConfigError(f"{self.file} has no service {service!r}.", hint=hint)
        return found


def merge(base: S, *overrides: Section | None) -> S:
    """A section in which what an override says wins, key by key, level by level. Foreign keys are left out.

    A `Choice` is taken as a whole: a cookie of the system's and a header of the service's are not both meant.
    """
    if all(override is None for override in overrides):
        return base
    values = {name: getattr(base, name) for name in type(base).model_fields}
    for override in overrides:
        if override is None:
            continue
        for name in override.model_fields_set & values.keys():
            own, other = values[name], getattr(override, name)
            has_keys = isinstance(own, Section) and not isinstance(own, Choice)
            values[name] = merge(own, other) if has_keys and isinstance(other, Section) else other
    return type(base).model_construct(set(values), **values)


def resolve(document: doc.Document, names: Names) -> dict[str, ServicePolicy]:
    """All services of a document with everything filled in."""
    return {name: _service(document, name, names) for name in document.services}


def resolve_guards(document: doc.Document) -> dict[str, GuardPolicy]:
    """All guards of a document with everything filled in, and "*" for all others."""
    return {name: _guard(document, name, document.guards.get(name)) for name in ("*", *document.guards)}


def _service(document: doc.Document, name: str, names: Names) -> ServicePolicy:
    written = document.services[name]
    deadline = document.deadline if written.deadline is None else written.deadline
    idle = document.stream_idle if written.stream_idle is None else written.stream_idle
    retry = merge(document.retry, written.retry)
    admit = merge(document.admit, written.admit)
    return ServicePolicy(
        name=name,
        protocol=written.protocol,
        identity=names.identity(name),
        mode=written.secure.mode or document.secure.mode,
        peer_check=written.secure.peer_check,
        listen=written.listen,
        discover=_discover(written.discover, names),
        register=register(written.register_),
        is_delegated=(written.delegate or document.delegate) == "agent",
        routes=tuple(
            _route(name, index, route, retry, deadline, idle) for index, route in enumerate(written.route or (doc.Route(),))
        ),
        retry=retry,
        balance=merge(document.balance, written.balance),
        admit=admit,
        rates=rates(f"{name}/rate", admit.rate),
        check=_check(admit.check, written.protocol),
        deadline=deadline,
        rules=(*rules("*", document.secure, names), *rules(name, written.secure, names)),
        providers=tuple(document.secure.jwt) if written.secure.jwt.providers is None else written.secure.jwt.providers,
        jwt_required=written.secure.jwt.require,
        inbound=inbound(name, written.inbound, names, in_flight=admit.in_flight),
        observe=merge(document.observe, written.observe),
    )


def _guard(document: doc.Document, name: str, written: doc.Guard | None) -> GuardPolicy:
    retry, admit, deadline = (None, None, None) if written is None else (written.retry, written.admit, written.deadline)
    merged = merge(doc.AdmitRules(), document.admit, admit)
    return GuardPolicy(
        name=name,
        retry=merge(doc.GuardRetry(), document.retry, retry),
        admit=merged,
        rates=tuple(rate for rate in rates(f"{name}/rate", merged.rate) if _is_for_functions(rate)),
        deadline=document.deadline if deadline is None else deadline,
    )


def _is_for_functions(rate: RatePolicy) -> bool:
    """A limit of the system that a store counts, or that goes by a header, is for its services.

    Nobody asks the store for a function, and without headers all calls of a function would be counted as those of one tenant.
    """
    return not rate.is_global and all(part.kind != "header" for part in rate.by)


def _check(written: doc.Check | None, protocol: str) -> CheckPolicy | None:
    if written is None:
        return None
    return CheckPolicy(
        kind=written.kind or ("grpc" if protocol == "grpc" else "http"),
        path=written.path,
        every=written.every,
        timeout=written.timeout,
        failures=written.failures,
        successes=written.successes,
    )


def _discover(written: Discover | None, names: Names) -> Discover | None:
    if written is None or written.static is None or not names.is_dev:
        return written
    endpoints = tuple(item.model_copy(update={"identity": names.endpoint(item.identity)}) for item in written.static)
    return written.model_copy(update={"static": endpoints})


def _route(service: str, index: int, written: doc.Route, retry: doc.Retry, deadline: float, idle: float) -> RoutePolicy:
    return RoutePolicy(
        name=written.name or f"{service}/{index}",
        match=written.match,
        backends=written.backends or (doc.Backend(),),
        retry=merge(doc.RouteRetry(), retry, written.retry),
        deadline=deadline if written.deadline is None else written.deadline,
        stream_idle=idle if written.stream_idle is None else written.stream_idle,
        on_disconnect=written.on_disconnect,
    )
