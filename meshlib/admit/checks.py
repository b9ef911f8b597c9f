"""Is an endpoint well, even when nobody calls it?

Active checks, for services that ask for them (`admit.check`): HTTP GET, gRPC health (grpc.health.v1) or a TCP connect, to every
endpoint that discovery gave, each at its own moment within the interval. So many failures in a row, or successes, make a verdict,
which the engine is told with every check that confirms it: it may have forgotten, and a passing check ends an ejection early.

The keeper's loop does it, and never waits for one check before another (`probe.py` has the single check). A mesh is described in one
file for all, so only services that this process calls are checked, and only at addresses that discovery gave. What the verdict does to an
endpoint is the engine's decision.
"""

from __future__ import annotations

import asyncio
import heapq
import logging
import os
import random
import socket
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Protocol

from meshlib import errors
from meshlib._native import core

from .names import Names
from .probe import Check, Failing, Unknowable, probe

if TYPE_CHECKING:
    from meshlib.config.policy import Config
    from meshlib.keeper import Job, Keeper

logger = logging.getLogger("meshlib.admit")

# Seconds between two looks at what is due; checks are started at their own moments within.
LOOK = 1.0


class Verdicts(Protocol):
    """The part of the engine that is told."""

    def check(self, service: str, address: str, is_healthy: bool, now: float) -> object: ...


class Place(Protocol):
    """An endpoint as discovery knows it. Its identity is "" where it is the service's own."""

    @property
    def address(self) -> str: ...
    @property
    def identity(self) -> str: ...


class Checker:
    """The active checks of one process. Any thread may call it; the work is the keeper's.

    `endpoints` answers what discovery published for a service, `own` the TLS of our newest identity, and `is_called` whether this
    process calls a service.
    """

    def __init__(
        self,
        engine: Verdicts,
        keeper: Keeper,
        *,
        endpoints: Callable[[str], Iterable[Place]],
        own: Callable[[], core.TlsClient | None],
        is_called: Callable[[str], bool] = lambda _service: True,
        clock: Callable[[], float] = time.monotonic,
        source: random.Random | None = None,
    ) -> None:
        self._engine = engine
        self._keeper = keeper
        self._endpoints = endpoints
        self._own = own
        self._is_called = is_called
        self._clock = clock
        self._random = source or random.Random()  # spreads load; nothing secret hangs on it
        self._services: dict[str, _Service] = {}
        self._due: list[tuple[float, int, _Endpoint]] = []
        self._order = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._names = Names()
        self._job: Job | None = None
        self._is_started = False
        keeper.on_fork(self._after_fork)

    # ------------------------------------------------------------------ life

    def follow(self, config: Config) -> None:
        """Check what a configuration wants checked. Services whose check is as before keep what is known."""
        services: dict[str, _Service] = {}
        for check in checks_of(config):
            old = self._services.get(check.service)
            services[check.service] = old if old is not None and old.check == check else _Service(check, old)
        gone = [old for name, old in self._services.items() if services.get(name) is not old]
        self._services = services
        for old in gone:
            for endpoint in old.endpoints.values():
                endpoint.is_gone = True
                if endpoint.verdict is False and old.check.service not in services:
                    # Nobody will find out that it is well again.
                    self._engine.check(old.check.service, endpoint.address, True, self._clock())
        if self._is_started:
            self._work()

    def jobs(self) -> list[Checker]:
        """Start, for those who keep a list of what they have to `cancel`."""
        self._is_started = True
        self._work()
        return [self]

    def cancel(self) -> None:
        """Check no more. What the engine was told stays."""
        self._is_started = False
        self._work()

    def _work(self) -> None:
        """Have the keeper look, as long as there is something to look at."""
        is_needed = self._is_started and bool(self._services)
        if is_needed and self._job is None:
            self._job = self._keeper.every(LOOK, self.look, name="check", jitter=0.0, first=0.0)
        elif not is_needed and self._job is not None:
            self._job.cancel()
            self._job = None

    # ------------------------------------------------------------------ what is due

    async def look(self) -> None:
        """Start the checks that are due until the next look, and wait for none of them."""
        now = self._clock()
        for service in self._services.values():
            if service.is_called or self._is_called(service.check.service):
                service.is_called = True
                self._take(service, now)
        while self._due and self._due[0][0] < now + LOOK:
            due, _, endpoint = heapq.heappop(self._due)
            if not endpoint.is_gone:
                task = asyncio.get_running_loop().create_task(self._one(endpoint, max(0.0, due - now)))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)

    async def settled(self) -> None:
        """Wait for the checks that were started."""
        await asyncio.gather(*self._tasks)

    def _take(self, service: _Service, now: float) -> None:
        places = self._endpoints(service.check.service)
        if places is service.places:
            return
        service.places = places
        known, service.endpoints = service.endpoints, {}
        for place in places:
            identity = (place.identity or service.check.identity) if service.check.identity else ""
            endpoint = known.get(place.address)
            if endpoint is not None and endpoint.identity == identity:
                del known[place.address]
            else:
                # Under another identity it is another endpoint: the old one stays among those that are gone.
                endpoint = _Endpoint(service, place.address, identity)
                # A round is spread over the interval, and so are processes that start together.
                self._put(endpoint, now + service.check.every * self._random.random())
            service.endpoints[place.address] = endpoint
        for endpoint in known.values():
            endpoint.is_gone = True

    def _put(self, endpoint: _Endpoint, due: float) -> None:
        self._order += 1
        heapq.heappush(self._due, (due, self._order, endpoint))

    async def _one(self, endpoint: _Endpoint, pause: float) -> None:
        service = endpoint.service
        check = service.check
        await asyncio.sleep(pause)
        began = self._clock()
        trouble = ""
        try:
            async with asyncio.timeout(check.timeout):
                await probe(check, endpoint.address, endpoint.identity, self._own, self._names)
        except Unknowable as error:
            service.skipped += 1
            endpoint.tell(str(error))
            return
        except TimeoutError:
            trouble = f"no answer within {check.timeout:g} s"
        except OSError as error:
            trouble = _said(error)
        except (Failing, errors.MeshError) as error:
            trouble = str(error) or type(error).__name__
        except Exception as error:
            # A fault of ours, which must take no endpoint out of service.
            service.skipped += 1
            endpoint.tell(f"{type(error).__name__}: {error}")
            return
        finally:
            if not endpoint.is_gone:
                # Jittered, so that those who fell together don't stay together.
                self._put(endpoint, began + check.every * (0.9 + 0.2 * self._random.random()))
        if endpoint.is_gone:
            return
        service.checks += 1
        service.failures += trouble != ""
        endpoint.judge(trouble)
        if endpoint.verdict is not None:
            self._engine.check(check.service, endpoint.address, endpoint.verdict, self._clock())

    # ------------------------------------------------------------------ what is known

    def stats(self) -> list[dict[str, Any]]:
        """One row per service: its `endpoints`, how many are `failing`, and the `checks`, `failures` and `skipped` so far."""
        return [
            {
                "service": name,
                "kind": service.check.kind,
                "endpoints": len(service.endpoints),
                "failing": {e.address: e.trouble for e in service.endpoints.values() if e.verdict is False},
                "checks": service.checks,
                "failures": service.failures,
                "skipped": service.skipped,
            }
            for name, service in sorted(self._services.items())
        ]

    def _after_fork(self) -> None:
        # The parent's checks are not ours. All begin anew, spread anew.
        self._tasks = set()
        self._due = []
        self._random.seed()
        for service in self._services.values():
            service.places, service.endpoints = None, {}


class _Service:
    """State of the Service."""

    __slots__ = ("check", "checks", "endpoints", "failures", "is_called", "places", "skipped")

    def __init__(self, check: Check, before: _Service | None) -> None:
        self.check = check
        self.places: Iterable[Place] | None = None
        self.endpoints: dict[str, _Endpoint] = {}
        self.is_called: bool = before is not None and before.is_called
        # Counters never go back.
        self.checks: int = before.checks if before else 0
        self.failures: int = before.failures if before else 0
        self.skipped: int = before.skipped if before else 0


class _Endpoint:
    """State of the Endpoint. `verdict` is None until there is one."""

    __slots__ = ("address", "identity", "is_gone", "row", "service", "trouble", "verdict")

    def __init__(self, service: _Service, address: str, identity: str) -> None:
        self.service = service
        self.address = address
        self.identity = identity
        self.is_gone = False
        self.row = 0  # failures in a row below zero, successes above
        self.trouble = ""
        self.verdict: bool | None = None

    def judge(self, trouble: str) -> None:
        check = self.service.check
        self.row = min(self.row, 0) - 1 if trouble else max(self.row, 0) + 1
        if trouble:
            self.trouble = trouble
        if self.row <= -check.failures and self.verdict is not False:
            self.verdict = False
            logger.warning("%s: %s fails its %s check: %s", check.service, self.address, check.kind, trouble)
        elif self.row >= check.successes and self.verdict is not True:
            if self.verdict is False:
                logger.info("%s: %s passes its %s check again", check.service, self.address, check.kind)
            self.verdict, self.trouble = True, ""

    def tell(self, trouble: str) -> None:
        if trouble != self.trouble:
            logger.warning("%s: %s can't be checked: %s", self.service.check.service, self.address, trouble)
            self.trouble = trouble


def _said(error: OSError) -> str:
    """What the system says, in its words; asyncio's own name an address that is known. A resolver's numbers are no errno."""
    if isinstance(error, socket.gaierror):
        return f"its name can't be resolved: {error.strerror or error}"
    return f"no connection: {str(error) if error.errno is None else os.strerror(error.errno)}"


def checks_of(config: Config) -> Iterable[Check]:
    """The checks of a configuration, complete."""
    for name, policy in config.services.items():
        wanted = policy.check
        if wanted is None:
            continue
        discover = policy.discover
        static = (discover.static or ()) if discover is not None else ()
        yield Check(
            name,
            wanted.kind,
            wanted.path,
            wanted.every,
            wanted.timeout,
            wanted.failures,
            wanted.successes,
            policy.identity if config.is_private(name) else "",
            policy.protocol in ("http2", "grpc"),
            frozenset(item.address for item in static),
        )
