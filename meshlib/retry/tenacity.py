"""How do tenacity's strategies decide here on a wait and on an end?

`wait_*` and `stop_*` are plain callables over a RetryCallState, and good ones; tenacity's loops are not used, because one keeps its
state in a shared object and none knows a budget, a deadline or what is safe to repeat. So the strategies are asked, and the mesh
decides: they can make a call wait differently or stop earlier, but never repeat what the budget, the deadline or safety forbids. They
are asked only when an attempt has failed and a retry is due, which is why tenacity's own state object is affordable (4 µs), and why
tenacity is imported only then. As in its own loop the wait is asked for first, so that `stop_before_delay` sees `upcoming_sleep`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from tenacity import RetryCallState

Wait: TypeAlias = "Callable[[RetryCallState], float]"
Stop: TypeAlias = "Callable[[RetryCallState], bool]"

# Seconds beyond which a wait is a mistake rather than a wish: the deadline comes long before.
LONGEST = 86400.0


def state_of(
    attempt: int,
    begun: float,
    now: float,
    idle: float,
    error: BaseException | None = None,
    result: Any = None,
    *,
    function: Callable[..., Any] | None = None,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
) -> RetryCallState:
    """What tenacity's strategies look at: `attempt` is the number of the one that has just failed, from 1 on.

    `begun` and `now` are monotonic seconds, `idle` the seconds that were slept so far. Without an `error` it ended with `result`,
    such as an answer that is no good.
    """
    from tenacity import Future, RetryCallState

    # The controller is none of ours, and strategies don't look at it.
    state = RetryCallState(None, function, args, dict(kwargs or {}))  # type: ignore[arg-type]
    state.start_time, state.outcome_timestamp = begun, now
    state.attempt_number, state.idle_for = attempt, idle
    outcome: Future = Future(attempt)
    if error is not None:
        outcome.set_exception(error)
    else:
        outcome.set_result(result)
    state.outcome = outcome
    return state


def wait_of(wait: Wait, state: RetryCallState) -> float:
    """Seconds until the next attempt, also noted in the state. `ValueError` for what is no time."""
    from tenacity import RetryAction

    seconds = wait(state)
    # Some strategies of others answer with a timedelta.
    seconds = seconds.total_seconds() if hasattr(seconds, "total_seconds") else float(seconds)
    if math.isnan(seconds):
        raise ValueError(f"wait={wait!r} answered nan: seconds are expected")
    seconds = min(max(seconds, 0.0), LONGEST)
    state.upcoming_sleep = seconds
    state.next_action = RetryAction(seconds)
    return seconds


def should_stop(stop: Stop, state: RetryCallState) -> bool:
    """Whether this was the last attempt."""
    return bool(stop(state))


def checked(name: str, strategy: Any) -> Any:
    """The strategy or None; `ValueError` for what can't be asked."""
    if strategy is not None and (not callable(strategy) or isinstance(strategy, type)):
        raise ValueError(f"{name}={strategy!r}: one of tenacity's {name}_* objects or a callable(state) is expected")
    return strategy
