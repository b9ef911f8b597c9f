"""What may a user write about calls that come in?

The types of a service's `inbound`: where it listens besides the mesh port, how many calls it takes at once and who waits,
whose calls come first, how many come in a time, and how it goes out of service. Who may call is `secure_document.py`'s,
whose rules are used for the public listener too; the rest of the file is in `document.py`, where it is said how these
classes are meant.
"""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

from pydantic import BeforeValidator, Field

from .agent_values import SocketPath
from .defaults import override, setting
from .rule_values import Caller, RulePath
from .section import Choice, Section
from .secure_document import Rule
from .values import HeaderName, ListenAddress, Name, Seconds, Title, word_of

# ---------------------------------------------------------------- where


class Public(Section):
    """A listener for callers without identity, such as an ingress: only these rules let in there, and every deny rule counts."""

    listen: ListenAddress = Field(description="Its address, with a port of its own: 0.0.0.0:8080.")
    allow: tuple[Rule, ...] = Field(default=(), description="Who may call what there. The service's own allow rules don't count.")


def _from_address(value: Any) -> Any:
    return {"listen": value} if isinstance(value, str) else value


class Probe(Section):
    """A listener in plain text for health, readiness and metrics of the process, and nothing else."""

    listen: ListenAddress = Field(description="Its address, with a port of its own: 0.0.0.0:8081.")


ProbeOrAddress = Annotated[Probe, BeforeValidator(_from_address, json_schema_input_type=Probe | str)]


# ---------------------------------------------------------------- how many


class AdaptiveLimits(Section):
    """Between which bounds a limit moves that follows the latency."""

    initial: int = setting("admit.adaptive_limits.initial")
    least: int = setting("admit.adaptive_limits.least")
    most: int = setting("admit.adaptive_limits.most")


class Codel(Section):
    """How long a call waits for a place: `interval`, and only `target` once the queue has not been empty for that long."""

    target: Seconds = setting("inbound.codel.target")
    interval: Seconds = setting("inbound.codel.interval")


class Priority(Section):
    """How important calls are: the first entry that matches says it. Who is in none is critical."""

    from_: tuple[Caller, ...] = Field(
        alias="from", min_length=1, description='Services, SPIFFE IDs (a * at the end = any rest) or "*" (anyone).'
    )
    paths: tuple[RulePath, ...] = Field(default=(), description="Exact, with a * at one end, or templates; none means all.")
    as_: Literal["told", "critical_plus", "critical", "sheddable_plus", "sheddable"] = Field(
        alias="as", description="told: as the caller says in x-mesh-priority. No default."
    )


class Shares(Section):
    """How full the service may be for calls of a priority still to be taken at once, as a share of the limit."""

    sheddable: float = setting("inbound.shares.sheddable")
    sheddable_plus: float = setting("inbound.shares.sheddable_plus")
    critical: float = setting("inbound.shares.critical")
    critical_plus: float = setting("inbound.shares.critical_plus")


# ---------------------------------------------------------------- how often


CALLED_BY: Final = ("service", "route", "peer", "client")


def _counted(value: Any) -> Any:
    return word_of(value, CALLED_BY, {}, f"{', '.join(CALLED_BY)}, or {{header: x-tenant}}")


class CallerPart(Choice):
    """What of a call that comes in a limit is counted by."""

    service: Literal[True] | None = Field(default=None, description="All calls together.")
    route: Literal[True] | None = Field(default=None, description="Each route for itself.")
    peer: Literal[True] | None = Field(default=None, description="Each caller, by its proven identity.")
    client: Literal[True] | None = Field(default=None, description="Each address, as trusted proxies tell; IPv6 by its /64.")
    header: HeaderName | None = Field(default=None, description="Each value of a request header.")


class InboundRate(Section):
    """So many calls in a time may come in: to each process, or with a store to all of them together."""

    name: Title | None = Field(default=None, description='In logs and refusals. Default: "<service>/inbound/<index>".')
    calls: int = Field(ge=1, le=1_000_000_000, description="Calls in each `per`: 1 to 1000000000. No default.")
    per: Seconds = setting("admit.rate.per")
    burst: int | None = Field(default=None, ge=1, le=1_000_000_000, description="Calls at once: 1 to 1000000000. Default: calls.")
    by: Annotated[
        tuple[
            Annotated[
                CallerPart,
                BeforeValidator(_counted, json_schema_input_type=CallerPart | Literal["service", "route", "peer", "client"]),
            ],
            ...,
        ],
        Field(min_length=1),
    ] = setting("admit.rate.by")
    store: Name = setting("admit.rate.store")
    on_failure: Literal["local", "open", "closed"] = setting("admit.rate.on_failure")


# ---------------------------------------------------------------- how it ends


class Drain(Section):
    """How a process goes out of service: not ready, but serving, for `wait`; then at most `grace` for what is in flight."""

    wait: Seconds = setting("inbound.drain.wait")
    grace: Seconds = setting("inbound.drain.grace")


class Inbound(Section):
    """What is admitted of all that comes in."""

    public: Public | None = Field(default=None, description="A listener for callers without identity. Default: none.")
    probe: ProbeOrAddress | None = Field(default=None, description="An address for health, readiness and metrics. Default: none.")
    probes: tuple[RulePath, ...] = setting("inbound.probes")
    in_flight: int | None = override("admit.in_flight", "service's own admit")
    adaptive: Literal["off", "gradient"] = setting("admit.adaptive")
    adaptive_limits: AdaptiveLimits = Field(default_factory=AdaptiveLimits, description="Its bounds.")
    queue: float = setting("inbound.queue")
    codel: Codel = Field(default_factory=Codel, description="How long a call waits for a place.")
    priority: tuple[Priority, ...] = Field(default=(), description="Whose calls come first. Default: all are alike.")
    shares: Shares = Field(default_factory=Shares, description="Who is turned away first; counts where `priority` is set.")
    rate: tuple[InboundRate, ...] = Field(default=(), description="Limits in calls per time. All of them count.")
    drain: Drain = Field(default_factory=Drain, description="How a process goes out of service.")
    agent: SocketPath | None = Field(
        default=None, description="The node agent takes its calls at `listen`, and hands them over to this socket. Default: none."
    )
