"""What counts for calls that come in, after all that was left out has been filled in?

Addresses, limits, priorities and times of one service, frozen. A priority's callers are complete SPIFFE IDs. It is
read by the servers, which open the listeners and drain, and by `plan.py`, which tells the core the rest.
"""

from __future__ import annotations

from dataclasses import dataclass

from .inbound_document import AdaptiveLimits, Inbound
from .names import Names
from .rate_policy import RatePolicy, rates
from .secure_policy import RulePolicy, public_rules


@dataclass(frozen=True, slots=True)
class PriorityPolicy:
    """How important the calls of some are. `level` is told, critical_plus, critical, sheddable_plus or sheddable."""

    callers: tuple[str, ...]
    paths: tuple[str, ...]
    level: str


@dataclass(frozen=True, slots=True)
class InboundPolicy:
    """What a service takes in.

    `public` and `probe` are addresses, None where there is no such listener; `public_allow` are the only rules that let in at
    the first. `probes` are paths as in rules. `adaptive` is None where the limit doesn't move. `queue` is a share of the
    limit, and so are `shares`: of sheddable, sheddable_plus, critical and critical_plus, all 1 where nobody has a priority.
    `is_wait_written`: the wait is in the file, and no default. `agent` is the socket to which the node agent hands calls over, "" for
    none.
    """

    public: str | None
    public_allow: tuple[RulePolicy, ...]
    probe: str | None
    probes: tuple[str, ...]
    in_flight: int
    adaptive: AdaptiveLimits | None
    queue: float
    target: float
    interval: float
    priorities: tuple[PriorityPolicy, ...]
    shares: tuple[float, float, float, float]
    rates: tuple[RatePolicy, ...]
    drain_wait: float
    is_wait_written: bool
    drain_grace: float
    agent: str = ""

    @property
    def global_rates(self) -> tuple[RatePolicy, ...]:
        """The limits that all processes are counted for together."""
        return tuple(rate for rate in self.rates if rate.is_global)


def inbound(service: str, written: Inbound, names: Names, *, in_flight: int) -> InboundPolicy:
    """The policy of a service; `in_flight` is what its `admit` says."""
    shares = written.shares
    return InboundPolicy(
        public=None if written.public is None else written.public.listen,
        public_allow=() if written.public is None else public_rules(service, written.public.allow, names),
        probe=None if written.probe is None else written.probe.listen,
        probes=tuple(dict.fromkeys(written.probes)),
        in_flight=in_flight if written.in_flight is None else written.in_flight,
        adaptive=written.adaptive_limits if written.adaptive == "gradient" else None,
        queue=float(written.queue),
        target=written.codel.target,
        interval=written.codel.interval,
        priorities=tuple(PriorityPolicy(names.callers(one.from_), one.paths, one.as_) for one in written.priority),
        shares=(
            (float(shares.sheddable), float(shares.sheddable_plus), float(shares.critical), float(shares.critical_plus))
            if written.priority
            else (1.0, 1.0, 1.0, 1.0)
        ),
        rates=rates(f"{service}/inbound", written.rate),
        drain_wait=written.drain.wait,
        is_wait_written="wait" in written.drain.model_fields_set,
        drain_grace=written.drain.grace,
        agent=written.agent or "",
    )
