"""What is a call, an endpoint and a second, where there is neither a socket nor a clock?

Discrete events: the heap has what is still to happen, and the clock jumps to the next of it. A `Caller` is one process with an
engine of its own, the very one that `mesh.client()` uses; this file drives it as `client/way.py` does: `begin`, `next`, wait where it says
WAIT, tell what became of an attempt with `head`, and do it again where it says RETRY. An `Endpoint` has workers and one queue, first come
first served, so that the end of a call is known when it arrives; what comes between (a crash, a time-out) overtakes it.

There are no connections: a refused connect takes one round trip, a lost one the connect time-out, and what was under way in an endpoint
that dies is reset. Bodies, TLS, hedges and stale keep-alive connections are not simulated. All chance comes from one seed.
"""

from __future__ import annotations

import heapq
import math
import random
from array import array
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final

from meshlib import errors
from meshlib._native import core

from .plan import SERVICE, USER

INFINITE: Final = math.inf
# One way between two processes, seconds.
HOP: Final = 0.00025
# Values that are drawn in advance, and users that the hashes go by.
POOL: Final = 1 << 15
USERS: Final = 10_000
# Of all calls these are not idempotent.
POSTS: Final = 0.1
UP, REFUSING, SILENT = 0, 1, 2


class Endpoint:
    """One address: `workers` serve one queue. `slowness` multiplies the work, `failing` is a status in place of the answer."""

    __slots__ = (
        "address", "failing", "first_use", "flying", "free", "onward", "patience", "served", "slowness", "state", "taken", "zone",
    )  # fmt: skip

    def __init__(self, address: str, workers: int, patience: float = INFINITE, zone: str = "") -> None:
        self.address = address
        self.zone = zone
        # When each worker is free.
        self.free = [0.0] * workers
        # Seconds of waiting from which a call is refused at once (503): shedding.
        self.patience = patience
        self.slowness = 1.0
        self.failing = 0
        self.state = UP
        self.onward: Caller | None = None
        # Calls under way here, with their tokens.
        self.flying: dict[Flight, int] = {}
        # Attempts that came, and those that were worked on.
        self.taken = 0
        self.served = 0
        # When each caller sent here first, while somebody wants to know.
        self.first_use: dict[int, float] | None = None


class Caller:
    """A process that calls: its engine, and how it retries. `is_naive` keeps the number of the attempt to itself."""

    __slots__ = ("engine", "is_naive", "number", "per_try", "timeout")

    def __init__(self, number: int, engine: Any, timeout: float, per_try: float, is_naive: bool) -> None:
        self.number = number
        self.engine = engine
        self.timeout = timeout
        self.per_try = per_try
        self.is_naive = is_naive


class Flight:
    """One call, from its beginning to its end."""

    __slots__ = ("attempts", "begun", "caller", "deadline", "endpoint", "is_idempotent", "native", "on_end", "token")

    def __init__(self, caller: Caller, native: Any, begun: float, is_idempotent: bool, on_end: Callable[[int], None] | None):
        self.caller = caller
        self.native = native
        self.begun = begun
        self.deadline: float = native.deadline
        self.is_idempotent = is_idempotent
        self.on_end = on_end
        self.attempts = 0
        # Of the attempt under way; none: -1.
        self.token = -1
        self.endpoint: Endpoint | None = None


class Journal:
    """What became of the calls: when they began, how long they took, and whether they failed (1 idempotent, 2 not)."""

    __slots__ = ("attempts", "begun", "failed", "took")

    def __init__(self) -> None:
        self.begun = array("d")
        self.took = array("d")
        self.failed = array("b")
        self.attempts = 0


class World:
    """The clock, what is still to happen, and who is there."""

    def __init__(self, seed: int, work: float, sigma: float = 0.6) -> None:
        self.now = 0.0
        self.chance = random.Random(seed)
        self.journal = Journal()
        self.endpoints: dict[str, Endpoint] = {}
        self.callers: list[Caller] = []
        # Calls a second of all `callers` together.
        self.rate = 0.0
        self.simulated = 0
        # A failure that a layer hands up is marked: it has done what it could, and nobody is to repeat it.
        self.is_marking = False
        self._events: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._number = 0
        # Log-normal, with `work` as its mean: most calls are ordinary, and some take many times as long.
        draw = self.chance
        self._works = [draw.lognormvariate(math.log(work) - sigma * sigma / 2, sigma) for _ in range(POOL)]
        self._gaps = [draw.expovariate(1.0) for _ in range(POOL)]
        self._headers = [[(b"host", b"orders"), (USER.encode(), b"user-%d" % n)] for n in range(USERS)]

    # --- time

    def at(self, when: float, act: Callable[..., None], *what: Any) -> None:
        self._number += 1
        heapq.heappush(self._events, (when, self._number, act, what))

    def each(self, seconds: float, act: Callable[[], None], begin: float = 0.0) -> None:
        def again() -> None:
            act()
            self.at(self.now + seconds, again)

        self.at(begin + seconds, again)

    def run(self, until: float) -> None:
        """Callers call at `rate` (a Poisson process: they don't wait for one another) until the end; what is under way then ends."""
        events, pop, gaps, draw = self._events, heapq.heappop, self._gaps, self.chance.random
        turn = self.chance.randrange(POOL)
        arrival = INFINITE if self.rate <= 0 else gaps[turn] / self.rate
        while True:
            if events and events[0][0] <= arrival:
                when, _, act, what = pop(events)
                if when > until and arrival == INFINITE and not self._is_under_way():
                    return
                self.now = when
                act(*what)
                continue
            if arrival > until:
                if arrival == INFINITE:
                    return
                arrival = INFINITE
                continue
            self.now = arrival
            turn = (turn + 1) & (POOL - 1)
            arrival += gaps[turn] / self.rate if self.rate > 0 else INFINITE
            self.call(self.callers[int(draw() * len(self.callers))], draw() >= POSTS)

    def _is_under_way(self) -> bool:
        return self.simulated > len(self.journal.begun)

    # --- endpoints

    def add(self, endpoints: Iterable[Endpoint]) -> None:
        for endpoint in endpoints:
            self.endpoints[endpoint.address] = endpoint

    def crash(self, endpoint: Endpoint, state: int = REFUSING) -> None:
        """It is gone. What it had under way is reset at once, or hangs (SILENT) until the caller's patience ends."""
        endpoint.state = state
        flying, endpoint.flying = endpoint.flying, {}
        for flight, token in flying.items():
            if state == REFUSING:
                self.at(self.now + HOP, self._fail, flight, token, core.OUTCOME_RESET)
            else:
                end = min(flight.deadline, self.now + flight.caller.per_try)
                self.at(end, self._fail, flight, token, core.OUTCOME_TIMEOUT)
                # Its answer is on its way no more.
                flight.endpoint = None

    def revive(self, endpoint: Endpoint) -> None:
        endpoint.state = UP
        endpoint.free = [self.now] * len(endpoint.free)

    # --- calls

    def call(
        self,
        caller: Caller,
        is_idempotent: bool = True,
        deadline: float | None = None,
        layer: int = 0,
        on_end: Callable[[int], None] | None = None,
    ) -> None:
        now = self.now
        if on_end is None:
            self.simulated += 1
        headers = self._headers[int(self.chance.random() * USERS)]
        method = "GET" if is_idempotent else "POST"
        try:
            native = caller.engine.begin(
                SERVICE, method, "/items/7", headers, now, deadline, None, True, 0 if caller.is_naive else layer, caller.timeout
            )
        except errors.MeshError:
            if on_end is None:
                self._note(now, is_idempotent, 503)
            else:
                on_end(503)
            return
        self._step(Flight(caller, native, now, is_idempotent, on_end))

    def _step(self, flight: Flight) -> None:
        try:
            step = flight.native.next(self.now)
        except errors.MeshError:
            self._end(flight, 503)
            return
        if step[0] == core.SEND:
            self._send(flight, step[1], self.endpoints[step[2]])
        else:
            # Without hedges nothing else is under way, so that it is WAIT.
            self.at(min(self.now + step[1], flight.deadline), self._step, flight)

    def _send(self, flight: Flight, token: int, endpoint: Endpoint) -> None:
        now = self.now
        flight.attempts += 1
        flight.token = token
        flight.endpoint = endpoint
        endpoint.taken += 1
        if endpoint.first_use is not None:
            endpoint.first_use.setdefault(flight.caller.number, now)
        if endpoint.state == REFUSING:
            self.at(now + 2 * HOP, self._fail, flight, token, core.OUTCOME_REFUSED)
            return
        if endpoint.state == SILENT:
            end = min(flight.deadline, now + flight.native.connect_timeout)
            self.at(end, self._fail, flight, token, core.OUTCOME_REFUSED if end < flight.deadline else core.OUTCOME_CANCELLED)
            return
        arrival = now + HOP
        free = endpoint.free
        begin = max(arrival, free[0])
        if begin - arrival > endpoint.patience:
            self.at(arrival + HOP, self._answer, flight, token, 503)
            return
        self._number += 1
        works = self._works
        end = begin + (works[self._number & (POOL - 1)] * endpoint.slowness if not endpoint.failing else 0.0)
        # It is worked on even if nobody waits for it any more.
        heapq.heapreplace(free, end)
        endpoint.served += 1
        endpoint.flying[flight] = token
        last = now + flight.caller.per_try
        last = min(last, flight.deadline)
        if endpoint.onward is not None:
            self.at(end, self._onward, flight, token, endpoint, endpoint.onward)
            self.at(last, self._fail, flight, token, core.OUTCOME_TIMEOUT)
        elif end + HOP < last:
            self.at(end + HOP, self._answer, flight, token, endpoint.failing or 200)
        else:
            self.at(last, self._fail, flight, token, core.OUTCOME_TIMEOUT)

    def _onward(self, flight: Flight, token: int, endpoint: Endpoint, caller: Caller) -> None:
        """An endpoint that has done its own part calls the next layer: deadline and attempt travel along."""
        if flight.token != token or endpoint.state != UP:
            return
        deadline = None if caller.is_naive else flight.deadline

        def back(status: int) -> None:
            if self.is_marking and status >= 500:
                flight.native.stop()
            self.at(self.now + HOP, self._answer, flight, token, status)

        self.call(caller, flight.is_idempotent, deadline, flight.native.attempt, back)

    def _answer(self, flight: Flight, token: int, status: int) -> None:
        if flight.token != token:
            return
        endpoint = flight.endpoint
        if endpoint is None:
            return
        endpoint.flying.pop(flight, None)
        flight.token = -1
        if flight.native.head(token, core.OUTCOME_RESPONSE, status, self.now, -1.0, True) == core.DELIVER:
            self._end(flight, status)
        else:
            self._step(flight)

    def _fail(self, flight: Flight, token: int, outcome: int) -> None:
        if flight.token != token:
            return
        if flight.endpoint is not None:
            flight.endpoint.flying.pop(flight, None)
        flight.token = -1
        if flight.native.head(token, outcome, 0, self.now) == core.DELIVER:
            self._end(flight, 504 if outcome == core.OUTCOME_TIMEOUT else 503)
        else:
            self._step(flight)

    def _end(self, flight: Flight, status: int) -> None:
        if flight.on_end is None:
            self.journal.attempts += flight.attempts
            self._note(flight.begun, flight.is_idempotent, status)
        else:
            flight.on_end(status)

    def _note(self, begun: float, is_idempotent: bool, status: int) -> None:
        journal = self.journal
        journal.begun.append(begun)
        journal.took.append(self.now - begun)
        journal.failed.append(0 if status < 500 else 1 if is_idempotent else 2)


def resolve(caller: Caller, version: int, endpoints: Sequence[Endpoint], now: float, service: str = SERVICE) -> None:
    caller.engine.resolve(service, version, [(each.address, 1.0, each.zone, {}, "") for each in endpoints], now)
