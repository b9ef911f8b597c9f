"""Is this answer a change, or is the one who answers broken?

A registry that has lost its data answers quickly, cleanly and wrong: half of a fleet disappears at once, or one endpoint after the other
as their entries run out. Believing it turns a fault of the registry into an outage of the services (Eureka calls the answer
self-preservation, and so do we). So what is told counts against the most endpoints that were believed within the last five minutes: when
fewer than half of those are left, or none, what is gone from then on is kept. What comes, and what is different, is used at once. A loss
is believed after five minutes of the same verdict (those in which the source can't be asked don't count), or when somebody confirms it;
and it is no loss any more when enough have come back. What was kept on disk and is older than those five minutes (`recall`) was believed
by nobody lately: against it only an empty answer counts as a loss.

Counted is the loss of endpoints, not their exchange: a service that moves to other addresses with the same number of them is a
deployment, and a slow scale-down never halves within the window. One that is quick is held back for its five minutes, which costs little:
the engine knows who is only held, and ejects each of those that is really gone at the first refused connect, however many they are, as
long as somebody is told. Nobody judges files and static lists: a person
wrote them (`seconds` is 0).
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

from .resolver import EndpointAddress

SECONDS = 300.0
# Endpoints that are compared without letting other threads have the interpreter: about a millisecond.
SLICE = 512


class Table:
    """What is told of one Service's endpoints, and what of it is believed.

    `told` is what the source says, `kept` what it doesn't say any more and what is used all the same. `since` is when that began, None
    while nothing is held back; `times` is how often it did. `is_old` while all that is known was recalled, and is older than what a
    loss is judged by. Its methods answer the addresses of which something has changed, also
    if it is only that they are held from now on.
    """

    __slots__ = ("_base", "_fresh", "_past", "is_old", "kept", "seconds", "since", "times", "told")

    def __init__(self, seconds: float = SECONDS) -> None:
        self.seconds = seconds
        self.told: dict[str, EndpointAddress] = {}
        self.kept: dict[str, EndpointAddress] = {}
        self.since: float | None = None
        self.times = 0
        self.is_old = False
        # How many were believed, with the time until which; those that count, so that each is less than the one before.
        self._past: deque[tuple[float, int]] = deque()
        self._base = 0  # how many there were when it began
        self._fresh: set[str] = set()  # came while something was held back

    @property
    def is_holding(self) -> bool:
        return self.since is not None

    def __len__(self) -> int:
        return len(self.told) + len(self.kept)

    def __iter__(self) -> Iterator[EndpointAddress]:
        yield from self.told.values()
        yield from self.kept.values()

    def find(self, address: str) -> EndpointAddress | None:
        """What is used of an address."""
        return self.told.get(address) or self.kept.get(address)

    def recall(self, endpoints: Sequence[EndpointAddress], age: float, now: float) -> set[str]:
        """The source told all that there is, so many seconds ago and to somebody else."""
        touched = self.replace(endpoints, now)
        self.is_old = age > self.seconds
        return touched

    def replace(self, endpoints: Sequence[EndpointAddress], now: float) -> set[str]:
        """The source told all that there is."""
        whole: dict[str, EndpointAddress] = {}
        changed: list[EndpointAddress] = []
        for part in _sliced(endpoints):
            for endpoint in part:
                # Twice the same address is one endpoint, and the first counts.
                if whole.setdefault(endpoint.address, endpoint) is endpoint:
                    old = self.told.get(endpoint.address)
                    if old is not endpoint and old != endpoint:
                        changed.append(endpoint)
        return self.change(changed, [address for address in self.told if address not in whole], now)

    def change(self, changed: Iterable[EndpointAddress], gone: Iterable[str], now: float) -> set[str]:
        """The source told what is different."""
        before, lost = len(self.told), {}
        for address in gone:
            endpoint = self.told.pop(address, None)
            if endpoint is not None:
                lost[address] = endpoint
        touched: set[str] = set()
        came: set[str] = set()
        for endpoint in changed:
            address = endpoint.address
            if address not in self.kept and address not in self.told and address not in lost:
                came.add(address)
            self.told[address] = endpoint
            self.kept.pop(address, None)
            lost.pop(address, None)
            touched.add(address)
        return touched | self._judge(before, lost, came, now)

    def review(self, now: float) -> set[str]:
        """Time has passed, and the source still says the same."""
        return self._judge(len(self.told), {}, set(), now) if self.since is not None else set()

    def defer(self, seconds: float, now: float) -> None:
        """For so long the source could not be asked: that confirms nothing, and doesn't count."""
        if self.since is not None:
            self.since = min(now, self.since + seconds)

    def confirm(self, now: float) -> set[str]:
        """Somebody knows that what is told is right."""
        return self._let_go(now, is_believed=True)

    def _judge(self, before: int, lost: dict[str, EndpointAddress], came: set[str], now: float) -> set[str]:
        if self.is_old and self.told:
            self.is_old = False
            return set(lost) | self._let_go(now, is_believed=True)
        most = self._most(before, now) if self.since is None else self._base
        is_loss = 2 * len(self.told) < most
        if self.since is None:
            if is_loss and self.seconds:
                self.since, self.kept, self._base, self._fresh = now, lost, most, came
                self.times += 1
                return set(lost)
            self._note(before, now)
            return set(lost)
        really = {address for address in lost if address in self._fresh}
        self._fresh = (self._fresh - really) | came
        self.kept.update((address, endpoint) for address, endpoint in lost.items() if address not in really)
        if not is_loss:
            return really | self._let_go(now, is_believed=False)
        if now - self.since >= self.seconds:
            return really | self._let_go(now, is_believed=True)
        return set(lost)

    def _let_go(self, now: float, *, is_believed: bool) -> set[str]:
        """Nothing is held back any more. Is the loss believed, it is forgotten how many there were."""
        touched = set(self.kept)
        self.kept, self.since = {}, None
        self._fresh.clear()
        if is_believed:
            self._past.clear()
        else:
            self._note(self._base, now)
        return touched

    def _most(self, count: int, now: float) -> int:
        """The most that were believed within the window, up to now."""
        past = self._past
        while past and past[0][0] <= now - self.seconds:
            past.popleft()
        return max(count, past[0][1] if past else 0)

    def _note(self, count: int, now: float) -> None:
        """So many were believed until now."""
        past = self._past
        if count <= len(self.told):
            return
        while past and past[-1][1] <= count:
            past.pop()
        past.append((now, count))


def _sliced(endpoints: Sequence[EndpointAddress]) -> Iterator[Iterator[EndpointAddress]]:
    for start in range(0, len(endpoints), SLICE):
        if start:
            time.sleep(0)  # other threads have calls under way, and must not wait for ten thousand endpoints
        yield islice(endpoints, start, start + SLICE)
