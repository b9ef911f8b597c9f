"""Who is told what the breaker of a guarded function does?

pybreaker's listeners, by the names that they know: `before_call`, `success` and `failure` for each attempt, `state_change` when the
engine's breaker has turned. Its state is read from the call's own record after a failure, and while it is not closed; nobody is told
at the moment at which an open breaker becomes ready for a probe, only when the probe goes. Where there are no listeners nothing of this
is loaded into a call. A listener can't set anything, and one that fails is logged: who listens doesn't decide.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any

from .. import errors
from .._native import core

log = logging.getLogger("meshlib.admit")


class _State:
    """A state of the breaker as pybreaker's listeners read it: `.name`."""

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        self.name = name

    def __repr__(self) -> str:
        return f"<state {self.name}>"


# pybreaker knows no state that a person has set.
_STATES = {"closed": _State("closed"), "open": _State("open"), "half_open": _State("half-open"), "isolated": _State("open")}


class Breaker:
    """What stands for pybreaker's CircuitBreaker before its listeners. It tells; nothing can be set here."""

    __slots__ = ("fail_counter", "listeners", "name", "state")

    def __init__(self, name: str, listeners: tuple[Any, ...]) -> None:
        self.name = name
        self.listeners = listeners
        self.fail_counter = 0
        self.state = _STATES["closed"]

    @property
    def current_state(self) -> str:
        return self.state.name


class Listened:
    """Tells pybreaker's listeners of each attempt, and of what the engine's breaker did."""

    __slots__ = ("_breaker", "_lock")

    def __init__(self, name: str, listeners: tuple[Any, ...]) -> None:
        self._breaker = Breaker(name, listeners)
        self._lock = threading.Lock()

    def before(self, call: core.Call, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._breaker.state.name != "closed":
            # It was let through nevertheless: a probe, unless the breaker has closed meanwhile.
            self._look(call)
        self._tell("before_call", function, *args, **kwargs)

    def good(self, call: core.Call) -> None:
        self._breaker.fail_counter = 0
        if self._breaker.state.name != "closed":
            self._look(call)
        self._tell("success")

    def failed(self, call: core.Call, error: BaseException) -> None:
        self._breaker.fail_counter += 1
        self._tell("failure", error)
        self._look(call)

    def refused(self, error: BaseException) -> None:
        if isinstance(error, errors.CircuitOpen):
            self._turn(_STATES["open"])

    def _look(self, call: core.Call) -> None:
        for row in call.record()["candidates"]:
            self._turn(_STATES.get(row["breaker"], self._breaker.state))

    def _turn(self, state: _State) -> None:
        with self._lock:
            before, self._breaker.state = self._breaker.state, state
        if before.name != state.name:
            self._tell("state_change", before, state)

    def _tell(self, event: str, *facts: Any, **named: Any) -> None:
        for listener in self._breaker.listeners:
            try:
                getattr(listener, event)(self._breaker, *facts, **named)
            except Exception:
                # Who listens doesn't decide.
                log.exception("a listener of %s failed at %s", self._breaker.name, event)
