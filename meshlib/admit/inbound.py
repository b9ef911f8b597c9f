"""How many calls may come in to a whole fleet, when each process sees only its own?

Rates of `inbound.rate` with a store, counted as `limiter.py` counts those of calls that go out, in the same stores: one that is away
for one is away for the other, and is tried again by one call. A call is asked about after the gate has let it in, and before the
handler runs; what the gate counts itself never comes here.

Who calls is not trusted, so that two things are different. The caller's deadline does not shorten the time of the store: a call in a
hurry would get around the limit. And an answer is a number or a word, no exception: the gate has the last word, and gives the place
back. Keys of the two ways differ, since a call may be counted on both.
"""

from __future__ import annotations

import ipaddress
import math
import random
import time
from collections.abc import Callable, Coroutine, Iterable
from enum import Enum
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final, Literal

from .limiter import PAUSE, Counted, Stores, carry_on

if TYPE_CHECKING:
    from meshlib.config import Config

Headers = Iterable[tuple[bytes, bytes]]


class Word(Enum):
    """What else may be said of a call than that it fits, or for how long it doesn't."""

    # A store is away, and the gate's own count stands in.
    STAND_IN = "stand_in"


STAND_IN: Final = Word.STAND_IN
# None: it fits, and is counted. Seconds: too many, and until when.
Answer = float | Literal[Word.STAND_IN] | None


class InboundRates:
    """The global rates of the service that this process is. State of the process."""

    __slots__ = ("_clock", "_random", "_rates", "_service", "stores")

    def __init__(
        self,
        stores: Stores | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
        source: random.Random | None = None,
    ) -> None:
        self.stores = stores or Stores()
        self._clock = clock
        self._random = source or random.Random()  # spreads load; nothing secret hangs on it
        self._service = ""
        self._rates: tuple[Counted, ...] = ()

    def prepare(self, config: Config) -> Callable[[], None]:
        """Open the stores that the service's rates name: the part that can fail. Call what it returns to go through with it."""
        prefix = f"{config.name}:{config.service}/inbound"
        rates = tuple(
            Counted(prefix, rate, self.stores.named(rate.store, config.stores[rate.store]))
            for rate in config.own.inbound_global_rates
        )

        def apply() -> None:
            carry_on(rates, self._rates)
            self._service, self._rates = config.service, rates

        return apply

    def __bool__(self) -> bool:
        """Whether there is anything to ask."""
        return bool(self._rates)

    async def take(self, route: str, peer: str, client: str, headers: Headers) -> Answer:
        """Count a call. `peer` is "" for a caller without identity, `client` an address, "" where none is known."""
        return await self._take(route, peer, client, headers, is_blocking=False)

    def take_blocking(self, route: str, peer: str, client: str, headers: Headers) -> Answer:
        """The same for threads."""
        return _run(self._take(route, peer, client, headers, is_blocking=True))

    async def _take(self, route: str, peer: str, client: str, headers: Headers, *, is_blocking: bool) -> Answer:
        answer: Answer = None
        for kept in self._rates:
            key = kept.key(route, peer, network(client), headers)
            seconds = await kept.ask(key, math.inf, self._clock, self._random, is_blocking=is_blocking)
            if seconds is None:
                if kept.rate.on_failure == "closed":
                    return max(kept.store.until - self._clock(), 0.0) or PAUSE
                if kept.rate.on_failure == "local":
                    answer = STAND_IN
            elif seconds > 0.0:
                return seconds
        return answer

    def stats(self) -> list[dict[str, Any]]:
        """One row per rate: how often its store was `asked`, `failed` to answer or was `skipped`, and calls `refused`."""
        return [kept.row(self._service) for kept in self._rates]


@lru_cache(maxsize=4096)
def network(client: str) -> str:
    """A subscriber's addresses as one: of IPv6 the first 64 bits, as the gate counts them. What is no address is nobody's."""
    try:
        address = ipaddress.ip_address(client)
    except ValueError:
        return ""
    if isinstance(address, ipaddress.IPv4Address):
        return str(address)
    if address.ipv4_mapped is not None:
        return str(address.ipv4_mapped)
    return str(ipaddress.IPv6Address(int(address) >> 64 << 64))


def _run(asking: Coroutine[Any, Any, Answer]) -> Answer:
    """To its end: a blocking question never suspends."""
    try:
        asking.send(None)
    except StopIteration as done:
        answer: Answer = done.value
        return answer
    asking.close()
    raise RuntimeError("a blocking question suspended; it must block instead")
