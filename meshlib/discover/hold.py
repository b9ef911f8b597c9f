"""Is this answer a change, or is the one who answers broken?

A registry that has lost its data answers quickly, cleanly and wrong: half of a fleet disappears at once. Believing it
turns a fault of the registry into an outage of the services (Eureka calls the answer self-preservation, and so do we).
So what an answer takes away is held back when it empties a service or leaves fewer than half of its endpoints; what it
adds is used at once. It is believed after five minutes of the same verdict, or when somebody confirms it.

Counted is the loss of endpoints, not their exchange: a name that moves to other addresses with the same number of them
is a deployment. An endpoint that is really gone costs little meanwhile, since passive health ejects it at the first
refused connect. It does not judge files and static lists: a person wrote them.
"""

from __future__ import annotations

from .resolver import EndpointAddress

SECONDS = 300.0

Endpoints = tuple[EndpointAddress, ...]


class Hold:
    """What is believed of one Service. `since` is when the answer that is held back first came, None if nothing is."""

    __slots__ = ("_base", "_is_confirmed", "seconds", "since", "times")

    def __init__(self, seconds: float = SECONDS) -> None:
        self.seconds = seconds
        self.since: float | None = None
        self.times = 0
        self._base: Endpoints | None = None
        self._is_confirmed = False

    @property
    def is_holding(self) -> bool:
        return self.since is not None

    def judge(self, answer: Endpoints, now: float) -> Endpoints:
        """The endpoints to use, given the answer."""
        base = self._base
        if base is None or not is_loss(base, answer) or self._is_confirmed:
            return self._believe(answer)
        if self.since is None:
            self.since = now
            self.times += 1
        if now - self.since >= self.seconds:
            return self._believe(answer)
        known = {endpoint.address for endpoint in answer}
        return tuple(sorted((*answer, *(e for e in base if e.address not in known)), key=lambda e: e.address))

    def confirm(self) -> None:
        """The next answer is believed, whatever it takes away."""
        self._is_confirmed = True

    def _believe(self, answer: Endpoints) -> Endpoints:
        self._base, self.since, self._is_confirmed = answer, None, False
        return answer


def is_loss(base: Endpoints, answer: Endpoints) -> bool:
    """Whether the answer empties the service or loses more than half of it at once."""
    return bool(base) and (not answer or 2 * len(answer) < len(base))
