"""Which limits in calls per time hold, and who counts them?

The same policy for calls that go out (`admit.rate`) and for those that come in (`inbound.rate`): names and bursts are filled
in, and nothing is counted here.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from . import document as doc
    from .inbound_document import InboundRate


@dataclass(frozen=True, slots=True)
class RatePart:
    """What of a call a limit is counted by: `kind` is service, route, peer, client (calls that come in), or header with its name."""

    kind: str
    name: str


@dataclass(frozen=True, slots=True)
class RatePolicy:
    """A limit of calls. `store` is "local" or one of the configuration's `stores`."""

    name: str
    calls: int
    per: float
    burst: int
    by: tuple[RatePart, ...]
    store: str
    on_failure: str

    @property
    def is_global(self) -> bool:
        """True if all processes are counted together."""
        return self.store != "local"


def rates(prefix: str, written: Iterable[doc.Rate | InboundRate]) -> tuple[RatePolicy, ...]:
    """What was written, with everything filled in. `prefix` stands before the number of a rate without name."""
    return tuple(
        RatePolicy(
            name=rate.name or f"{prefix}/{index}",
            calls=rate.calls,
            per=rate.per,
            burst=rate.calls if rate.burst is None else rate.burst,
            by=tuple(dict.fromkeys(RatePart(*part.part) for part in rate.by)),
            store=rate.store,
            on_failure=rate.on_failure,
        )
        for index, rate in enumerate(written)
    )
