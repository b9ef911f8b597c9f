"""How many calls may a whole fleet make, when each process sees only its own?

A rate with `store: redis` is counted in a store that all processes ask, once per call and before the first attempt. The store is a
plugin: a distribution with an entry point in the group `meshlib.limit`, whose value is a factory,

    factory(settings: Mapping[str, Any]) -> GlobalLimiter

called with what the configuration says under `stores.<name>`, and imported only if the configuration names it.

A limit must not become an outage. A store that doesn't answer within its time is left alone for a second, and then asked by one call.
Until it answers the rate does as its `on_failure` says: `local` (the engine's own limit stands in, per process), `open` or `closed`.
And whoever was refused is refused again without asking, as long as the answer said: an overload is not passed on to the store.

Rates are asked one after the other, in the order of the configuration; what a later one refuses has been counted by the earlier
ones. Here are the rates of calls that go out, and what they share with those that come in (`inbound.py`): the stores. Nothing here
knows Redis, and local rates never come here: they are the engine's.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import math
import random
import time
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from meshlib.config.plugin import opened
from meshlib.errors import RateLimited

if TYPE_CHECKING:
    from meshlib.config import Config, RatePolicy

logger = logging.getLogger("meshlib.admit")

GROUP = "meshlib.limit"
# Seconds for which a store that failed is left alone, and the share of it by which processes differ.
PAUSE = 1.0
JITTER = 0.2
# A refusal is remembered for so many seconds at most, and so many of them.
REMEMBERED = 1.0
MAX_REMEMBERED = 4096
# Nobody is told to wait for longer: no rate is for more than a day.
LONGEST = 86400.0


class GlobalLimiter(Protocol):
    """A store of rates that processes share. Both faces do the same; each is used from any loop, any thread, and after a fork.

    They count one call of `key`, of which at most `burst` may come at once and `calls` in every `per` seconds afterwards, and return
    0.0; or count nothing and return the seconds until it may be worth asking again. They raise, whatever it is, if that isn't known
    within `timeout` seconds. The text of an exception is logged: no secrets in it.
    """

    async def take_async(self, key: str, calls: int, per: float, burst: int, timeout: float) -> float: ...

    def take(self, key: str, calls: int, per: float, burst: int, timeout: float) -> float: ...


class Stores:
    """The stores of one process, each opened once for all that go by it. State of the process.

    A store is kept, with its connections and what is known of it, as long as somebody uses it with the settings that it was opened with.
    """

    def __init__(self, opener: Callable[[str, Mapping[str, Any]], GlobalLimiter] | None = None) -> None:
        self._open = opener or open_store
        self._known: weakref.WeakSet[Store] = weakref.WeakSet()

    def named(self, name: str, settings: Mapping[str, Any]) -> Store:
        """The store of a name with these settings. Raises ConfigError."""
        for known in self._known:
            if (known.name, known.settings) == (name, settings):
                return known
        store = Store(name, dict(settings), self._open(name, settings))
        self._known.add(store)
        return store


class RateGuard:
    """All global rates of one process for calls that go out: whom to ask, what was answered, and what to do without an answer."""

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
        self._rates: dict[str, tuple[Counted, ...]] = {}

    def prepare(self, config: Config) -> Callable[[], None]:
        """Open the stores that a configuration names: the part that can fail. Call what it returns to go through with it."""
        rates: dict[str, tuple[Counted, ...]] = {}
        for service in config.services:
            found = config.rates_of(service)
            if found:
                prefix = f"{config.name}:{service}"
                rates[service] = tuple(
                    Counted(prefix, rate, self.stores.named(rate.store, config.stores[rate.store])) for rate in found
                )

        def apply() -> None:
            for service, fresh in rates.items():
                carry_on(fresh, self._rates.get(service, ()))
            self._rates = rates

        return apply

    def __contains__(self, service: object) -> bool:
        return service in self._rates

    def is_away(self, service: str) -> bool:
        """Whether a store that has a stand-in isn't asked now: a call that begins as stand-by needn't be begun again.

        When the store is to be tried again this says no, so that the stand-in's refusals don't keep it from being tried.
        """
        now = self._clock()
        return any(
            kept.store.is_away and now < kept.store.until and kept.rate.on_failure == "local"
            for kept in self._rates.get(service, ())
        )

    async def take(
        self,
        service: str,
        route: str,
        peer: str | None,
        headers: Iterable[tuple[bytes, bytes]],
        end: float,
        *,
        is_blocking: bool,
    ) -> bool:
        """Count a call. True if a store is away and the engine's local limit has to stand in; raises RateLimited.

        `end` is the end of the call in the seconds of the clock. Where `is_blocking` it never suspends.
        """
        is_standby = False
        for kept in self._rates.get(service, ()):
            rate = kept.rate
            left = end - self._clock()
            if left <= 0.0:
                return is_standby  # the engine knows what to say of a call whose time is spent
            key = kept.key(route, peer, "", headers)
            seconds = await kept.ask(key, left, self._clock, self._random, is_blocking=is_blocking)
            if seconds is None:
                if rate.on_failure == "closed":
                    raise _unknown(service, rate, kept.store.until - self._clock())
                is_standby |= rate.on_failure == "local"
            elif seconds > 0.0:
                raise _refused(service, rate, seconds)
        return is_standby

    def stats(self) -> list[dict[str, Any]]:
        """One row per rate: how often its store was `asked`, `failed` to answer or was `skipped`, and calls `refused`."""
        return [kept.row(service) for service, rates in sorted(self._rates.items()) for kept in rates]


def open_store(name: str, settings: Mapping[str, Any]) -> GlobalLimiter:
    """The store of a name, by its entry point."""
    made, _ = opened(GROUP, name, lambda factory: factory(settings), at=f"stores.{name}", trusted_with="limits")
    found: GlobalLimiter = made
    return found


class Store:
    """What is known of one store. State of the process."""

    __slots__ = ("__weakref__", "_full", "is_away", "limiter", "name", "settings", "timeout", "until")

    def __init__(self, name: str, settings: dict[str, Any], limiter: GlobalLimiter) -> None:
        self.name = name
        self.settings = settings
        self.limiter = limiter
        self.timeout: float = settings["timeout"]
        self.is_away = False
        self.until = 0.0  # when it is asked again, if it is away
        self._full: dict[str, float] = {}

    def may_be_asked(self, now: float, pause: float) -> bool:
        """A store that is away is asked by one call per pause."""
        if not self.is_away:
            return True
        if now < self.until:
            return False
        self.until = now + pause
        return True

    def fail(self, error: Exception, now: float, pause: float) -> None:
        self.until = now + pause
        if not self.is_away:
            self.is_away = True
            logger.warning(
                "%s can't be asked for rate limits and is tried again each second; until then each rate does as its on_failure "
                "says: %s: %s",
                self.name,
                type(error).__name__,
                error,
            )

    def answered(self) -> None:
        if self.is_away:
            self.is_away = False
            logger.info("%s answers again", self.name)

    def remembered(self, key: str, now: float) -> float:
        """Seconds for which a refusal still holds."""
        return self._full.get(key, 0.0) - now if self._full else 0.0

    def remember(self, key: str, now: float, seconds: float) -> None:
        if len(self._full) >= MAX_REMEMBERED:
            self._full = {kept: until for kept, until in tuple(self._full.items()) if until > now}
            if len(self._full) >= MAX_REMEMBERED:
                self._full = {}
        self._full[key] = now + min(seconds, REMEMBERED)


class Counted:
    """A rate with its store and what was counted. State of the Service."""

    __slots__ = ("_prefix", "asked", "failed", "rate", "refused", "skipped", "store")

    def __init__(self, prefix: str, rate: RatePolicy, store: Store) -> None:
        self._prefix = f"{prefix}:{rate.name}"
        self.rate = rate
        self.store = store
        self.asked = self.refused = self.failed = self.skipped = 0

    def count_on(self, before: Counted | None) -> None:
        """Counters never go back."""
        if before is not None:
            self.asked, self.refused, self.failed, self.skipped = before.asked, before.refused, before.failed, before.skipped

    async def ask(
        self,
        key: str,
        left: float,
        clock: Callable[[], float],
        source: random.Random,
        *,
        is_blocking: bool,
    ) -> float | None:
        """Count a call: 0.0 if it fits, else the seconds until one may; None if nobody can tell. It has `left` seconds.

        Where `is_blocking` it never suspends.
        """
        store, rate, now = self.store, self.rate, clock()
        seconds = store.remembered(key, now)
        if seconds > 0.0:
            self.refused += 1
            return seconds
        limit = min(store.timeout, left)
        if not store.may_be_asked(now, _pause(source)):
            self.skipped += 1
            return None
        self.asked += 1
        try:
            if is_blocking:
                seconds = store.limiter.take(key, rate.calls, rate.per, rate.burst, limit)
            else:
                async with asyncio.timeout(limit):
                    seconds = await store.limiter.take_async(key, rate.calls, rate.per, rate.burst, limit)
            seconds = min(float(seconds), LONGEST)
            if math.isnan(seconds):
                raise ValueError("the store answered something that is no number of seconds")
        except Exception as error:
            self.failed += 1
            # A call in a hurry says nothing of the store.
            if limit == store.timeout or not _is_timeout(error):
                store.fail(error, clock(), _pause(source))
            return None
        store.answered()
        if seconds > 0.0:
            store.remember(key, clock(), seconds)
            self.refused += 1
            return seconds
        return 0.0

    def key(self, route: str, peer: str | None, client: str, headers: Iterable[tuple[bytes, bytes]]) -> str:
        """What is counted together. Values go in as a digest: a tenant's token is nobody's business in the store.

        What isn't there counts as empty, so that leaving a header out is no way around its limit.
        """
        parts: list[bytes] = []
        for part in self.rate.by:
            if part.kind == "route":
                parts += (b"route", route.encode())
            elif part.kind == "peer":
                parts += (b"peer", (peer or "").encode())
            elif part.kind == "client":
                parts += (b"client", client.encode())
            elif part.kind == "header":
                wanted = part.name.lower().encode()
                parts += (wanted, b",".join(value for given, value in headers if given.lower() == wanted))
        if not parts:
            return self._prefix
        digest = hashlib.blake2b(self._prefix.encode(), digest_size=16)
        for piece in parts:
            digest.update(len(piece).to_bytes(8, "big") + piece)
        return f"{self._prefix}:{digest.hexdigest()}"

    def row(self, service: str) -> dict[str, Any]:
        """What `stats` tells."""
        return {
            "service": service,
            "rate": self.rate.name,
            "store": self.rate.store,
            "is_away": self.store.is_away,
            "asked": self.asked,
            "refused": self.refused,
            "failed": self.failed,
            "skipped": self.skipped,
        }


def carry_on(fresh: Iterable[Counted], before: Iterable[Counted]) -> None:
    """Rates are told apart by name, as in metrics: with other numbers it is still the same limit, and its counters go on."""
    known = {kept.rate.name: kept for kept in before}
    for kept in fresh:
        kept.count_on(known.get(kept.rate.name))


def _pause(source: random.Random) -> float:
    return PAUSE * (1.0 + JITTER * source.uniform(-1.0, 1.0))


def _is_timeout(error: Exception) -> bool:
    return isinstance(error, TimeoutError) or type(error).__name__ == "TimeoutError"


def _refused(service: str, rate: RatePolicy, seconds: float) -> RateLimited:
    return RateLimited(
        f"the limit {rate.name!r} of {service!r} is used up: {rate.calls} calls in {rate.per:g} s, over all processes.",
        hint=f"Call again in {seconds:.3g} s, or raise admit.rate of the service.",
        retry_after=seconds,
    )


def _unknown(service: str, rate: RatePolicy, seconds: float) -> RateLimited:
    return RateLimited(
        f"the limit {rate.name!r} of {service!r} can't be asked for: the store {rate.store!r} does not answer.",
        hint="Its on_failure is `closed`. Bring the store back, or say `local`, so that each process limits itself meanwhile.",
        reason="admit.rate_store",
        retry_after=max(0.0, seconds),
    )


__all__: Sequence[str] = ["GROUP", "Counted", "GlobalLimiter", "RateGuard", "Store", "Stores", "carry_on", "open_store"]
