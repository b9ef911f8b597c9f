"""What travels down with a call and back up?

The context that a handler and its outgoing calls share: who called us (`Peer`), until when there is time (`deadline`), and the
`Call` that just came back, with its record. Context variables carry it through tasks and `asyncio.to_thread`; no thread-local and
no argument has to be passed along. This module decides nothing.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from ._native import core

HEADER_DEADLINE = "x-mesh-deadline-ms"
HEADER_ATTEMPT = "x-mesh-attempt"


@dataclass(frozen=True, slots=True)
class Peer:
    """Who called, as proved by the connection. `spiffe_id` is "" for a caller without identity (modes observe and permissive)."""

    spiffe_id: str
    is_tls: bool = False
    serial: str = ""
    not_after: float = 0.0
    chain: tuple[bytes, ...] = field(default=(), repr=False)

    @property
    def trust_domain(self) -> str:
        return self.spiffe_id.removeprefix("spiffe://").split("/", 1)[0]

    @property
    def service(self) -> str:
        """The last segment of the SPIFFE ID: the service account, by convention the service's name."""
        return self.spiffe_id.rsplit("/", 1)[-1] if self.spiffe_id else ""


class Call:
    """What the application asked once, with the story of how it went. Found at `response.extensions["meshlib.call"]`."""

    __slots__ = ("_native", "method", "target")

    def __init__(self, native: core.Call, method: str, target: str) -> None:
        self._native = native
        self.method = method
        self.target = target

    @property
    def service(self) -> str:
        return self._native.service

    @property
    def route(self) -> str:
        return self._native.route

    @property
    def attempts(self) -> int:
        """How often it was sent."""
        return sum(1 for event in self._native.record()["events"] if event["phase"] == "balance")

    def record(self) -> dict[str, Any]:
        """The decisions in order, for programs: candidates, choices, verdicts, waits. Times in milliseconds since the beginning."""
        return {**self._native.record(), "method": self.method, "path": self.target}

    def explain(self) -> str:
        """The same for people: which route, who was a candidate, what each attempt did, and why it was (not) tried again."""
        from .observe.explain import explain

        return explain(self.record())

    def __repr__(self) -> str:
        return f"<Call {self.method} {self.service}{self.target} route={self.route} attempts={self.attempts}>"


current_peer: ContextVar[Peer | None] = ContextVar("meshlib.peer", default=None)
current_entry: ContextVar[core.Entry | None] = ContextVar("meshlib.entry", default=None)
# In which attempt of our caller we run; above 0 the caller retries, and we must not.
current_layer: ContextVar[int] = ContextVar("meshlib.layer", default=0)
current_deadline: ContextVar[float | None] = ContextVar("meshlib.deadline", default=None)


def peer() -> Peer | None:
    """Who called the handler that runs now, as proved by its connection; None outside a handler."""
    return current_peer.get()


def current_call() -> Mapping[str, Any] | None:
    """The decisions on the call that the running handler serves (rule, path, peer, deadline …); None outside a handler."""
    entry = current_entry.get()
    return None if entry is None else entry.record()


def remaining(now: float | None = None) -> float | None:
    """Seconds left of the current deadline, None without one; negative when it is spent."""
    end = current_deadline.get()
    return None if end is None else end - (time.monotonic() if now is None else now)


@contextmanager
def deadline(seconds: float) -> Iterator[float]:
    """Cut everything under it, at most `seconds` from now; an outer, earlier deadline stays in force.

    Yields the absolute end in monotonic seconds. It travels with outgoing calls as a header.
    """
    end = time.monotonic() + seconds
    outer = current_deadline.get()
    token = current_deadline.set(end if outer is None else min(outer, end))
    try:
        yield end if outer is None else min(outer, end)
    finally:
        current_deadline.reset(token)
