"""What counts for a service, after all that was left out has been filled in?

`Config` is what the other modules read: no optional field stands for "look elsewhere". Overrides are merged key by
key: what a route says wins over its service, that over the system, that over the defaults. Identities are complete,
paths of files absolute. It is frozen: a reload makes a new one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from meshlib.errors import ConfigError, Problem

from . import document as doc
from .values import DEV_TRUST_DOMAIN, near, some, split_spiffe_id

S = TypeVar("S", bound=doc.Section)


@dataclass(frozen=True, slots=True)
class RoutePolicy:
    """A route with everything filled in."""

    name: str
    match: doc.Match
    backends: tuple[doc.Backend, ...]
    retry: doc.RouteRetry
    deadline: float
    stream_idle: float


@dataclass(frozen=True, slots=True)
class RulePolicy:
    """An inbound rule. `callers` are "*", SPIFFE IDs, or beginnings of SPIFFE IDs with a `*` at the end."""

    name: str
    action: str
    callers: tuple[str, ...]
    methods: tuple[str, ...]
    paths: tuple[str, ...]
    is_dry_run: bool


@dataclass(frozen=True, slots=True)
class ServicePolicy:
    """A service with everything filled in. `identity` is its SPIFFE ID in every mode."""

    name: str
    protocol: str
    identity: str
    mode: str
    listen: str | None
    discover: doc.Discover | None
    routes: tuple[RoutePolicy, ...]
    retry: doc.Retry
    balance: doc.Balance
    admit: doc.Admit
    deadline: float
    rules: tuple[RulePolicy, ...]
    observe: doc.Observe


@dataclass(frozen=True, slots=True)
class Config:
    """The whole configuration, as the process of one service sees it.

    `source` is the hash of the file's text, to tell whether a reload brings anything new. `warnings` are what
    `meshlib vet` tells about settings that are allowed, but inert or dangerous.
    """

    name: str
    file: Path
    service: str
    secure: doc.Secure
    observe: doc.Observe
    services: Mapping[str, ServicePolicy]
    trust_domain: str
    egress: str
    deadline: float
    identity_folder: Path | None
    is_dev: bool
    source: str
    warnings: tuple[Problem, ...] = field(default=(), repr=False)

    @property
    def own(self) -> ServicePolicy:
        """The service that this process is."""
        return self.services[self.service]

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


def merge(base: S, *overrides: doc.Section | None) -> S:
    """A section in which what an override says wins, key by key, level by level. Foreign keys are left out."""
    if all(override is None for override in overrides):
        return base
    values = {name: getattr(base, name) for name in type(base).model_fields}
    for override in overrides:
        if override is None:
            continue
        for name in override.model_fields_set & values.keys():
            own, other = values[name], getattr(override, name)
            values[name] = merge(own, other) if isinstance(own, doc.Section) and isinstance(other, doc.Section) else other
    return type(base).model_construct(set(values), **values)


def resolve(document: doc.Document, names: Names) -> dict[str, ServicePolicy]:
    """All services of a document with everything filled in."""
    return {name: _service(document, name, names) for name in document.services}


@dataclass(frozen=True, slots=True)
class Names:
    """Which SPIFFE IDs the names of a document stand for.

    `meshlib dev` issues its certificates in a trust domain of its own, always at the default path, whatever the file
    says; so the file's identities are carried over. Identities of foreign domains stay as they are and match nobody.
    """

    document: doc.Document
    is_dev: bool

    @property
    def written_domain(self) -> str:
        return self.document.secure.trust_domain or f"{self.document.mesh}.internal"

    @property
    def trust_domain(self) -> str:
        return DEV_TRUST_DOMAIN if self.is_dev else self.written_domain

    def identity(self, service: str) -> str:
        """The SPIFFE ID of a service."""
        written = self.document.services[service].identity
        if written is not None and not self.is_dev:
            return written
        return f"spiffe://{self.trust_domain}/ns/{self.document.secure.namespace}/sa/{service}"

    def caller(self, written: str) -> str:
        """What a rule's `from` means: "*", a SPIFFE ID, or the beginning of SPIFFE IDs with `*`."""
        if written == "*":
            return written
        if not written.startswith("spiffe://"):
            return self.identity(written)
        if not self.is_dev:
            return written
        for service, settings in self.document.services.items():
            if settings.identity == written:
                return self.identity(service)
        domain, _, path = written.removeprefix("spiffe://").partition("/")
        return f"spiffe://{self.trust_domain}/{path}" if domain == self.written_domain else written

    def endpoint(self, written: str | None) -> str | None:
        """The identity of an endpoint that differs from its service's; in development none does."""
        if written is None or self.is_dev:
            return None
        split_spiffe_id(written)
        return written


def _service(document: doc.Document, name: str, names: Names) -> ServicePolicy:
    written = document.services[name]
    deadline = document.deadline if written.deadline is None else written.deadline
    idle = document.stream_idle if written.stream_idle is None else written.stream_idle
    retry = merge(document.retry, written.retry)
    return ServicePolicy(
        name=name,
        protocol=written.protocol,
        identity=names.identity(name),
        mode=written.secure.mode or document.secure.mode,
        listen=written.listen,
        discover=_discover(written.discover, names),
        routes=tuple(
            _route(name, index, route, retry, deadline, idle) for index, route in enumerate(written.route or (doc.Route(),))
        ),
        retry=retry,
        balance=merge(document.balance, written.balance),
        admit=merge(document.admit, written.admit),
        deadline=deadline,
        rules=tuple(
            RulePolicy(
                name=rule.name or f"{name}/{action}/{index}",
                action=action,
                callers=tuple(dict.fromkeys(names.caller(caller) for caller in rule.from_)),
                methods=rule.methods,
                paths=rule.paths,
                is_dry_run=rule.dry_run,
            )
            for action, rules in (("deny", written.secure.deny), ("allow", written.secure.allow))
            for index, rule in enumerate(rules)
        ),
        observe=merge(document.observe, written.observe),
    )


def _discover(written: doc.Discover | None, names: Names) -> doc.Discover | None:
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
    )
