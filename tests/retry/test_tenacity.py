"""tenacity's own strategies see the state that they know, and what they answer is seconds or an end."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
import tenacity

import meshlib
from meshlib.retry.tenacity import LONGEST, should_stop, state_of, wait_of

FAILED = OSError("down")


def third() -> tenacity.RetryCallState:
    """The third attempt has failed, 5 seconds after the beginning, of which 2 were slept."""
    return state_of(3, 100.0, 105.0, 2.0, FAILED, function=third, args=(7,), kwargs={"x": 1})


def test_the_state_says_what_tenacity_says() -> None:
    """The real RetryCallState, with every field that strategies look at."""
    state = third()
    assert isinstance(state, tenacity.RetryCallState)
    assert (state.attempt_number, state.seconds_since_start, state.idle_for) == (3, 5.0, 2.0)
    assert (state.fn, state.args, state.kwargs) == (third, (7,), {"x": 1})
    assert state.outcome is not None
    assert (state.outcome.failed, state.outcome.exception()) == (True, FAILED)
    answered = state_of(1, 0.0, 1.0, 0.0, result=503)
    assert answered.outcome is not None
    assert (answered.outcome.failed, answered.outcome.result()) == (False, 503)


@pytest.mark.parametrize(
    ("wait", "seconds"),
    [
        (tenacity.wait_none(), 0.0),
        (tenacity.wait_fixed(2), 2.0),
        (tenacity.wait_incrementing(1, 2), 5.0),
        (tenacity.wait_exponential(multiplier=0.5), 2.0),
        (tenacity.wait_chain(tenacity.wait_fixed(1), tenacity.wait_fixed(4)), 4.0),
        (tenacity.wait_fixed(1) + tenacity.wait_fixed(2), 3.0),
        (tenacity.wait_exception(lambda error: 7.0 if error is FAILED else 0.0), 7.0),
        (lambda state: state.attempt_number * 2, 6.0),
        (lambda state: timedelta(milliseconds=1500), 1.5),
        (lambda state: -3, 0.0),
        (lambda state: float("inf"), LONGEST),
    ],
)
def test_a_wait_is_seconds(wait: Any, seconds: float) -> None:
    """Of tenacity's objects and of any callable; noted where `stop_before_delay` looks for it."""
    state = third()
    assert wait_of(wait, state) == seconds
    assert state.upcoming_sleep == seconds
    assert state.next_action is not None
    assert state.next_action.sleep == seconds


@pytest.mark.parametrize("wait", [tenacity.wait_random_exponential(max=3), tenacity.wait_exponential_jitter(max=3)])
def test_a_jittered_wait_stays_in_its_range(wait: Any) -> None:
    """Chance is tenacity's own."""
    assert all(0.0 <= wait_of(wait, third()) <= 4.0 for _ in range(50))


def test_a_wait_that_is_no_number_is_an_error() -> None:
    """It would never end."""
    with pytest.raises(ValueError, match="nan"):
        wait_of(lambda state: float("nan"), third())


@pytest.mark.parametrize(
    ("stop", "is_over"),
    [
        (tenacity.stop_never, False),
        (tenacity.stop_after_attempt(3), True),
        (tenacity.stop_after_attempt(4), False),
        (tenacity.stop_after_delay(5), True),
        (tenacity.stop_after_delay(6), False),
        (tenacity.stop_before_delay(6), True),
        (tenacity.stop_before_delay(8), False),
        (tenacity.stop_after_attempt(9) | tenacity.stop_after_delay(1), True),
        (tenacity.stop_after_attempt(9) & tenacity.stop_after_delay(1), False),
        (lambda state: state.idle_for >= 2, True),
    ],
)
def test_a_stop_ends_or_does_not(stop: Any, is_over: bool) -> None:
    """The wait is asked for first, so that what comes next is known."""
    state = third()
    wait_of(tenacity.wait_fixed(2), state)
    assert should_stop(stop, state) is is_over


def test_a_policy_takes_strategies_and_refuses_what_can_not_be_asked() -> None:
    """At the call that says so, not at the first failure."""
    wait, stop = tenacity.wait_fixed(1), tenacity.stop_after_attempt(2)
    asked = meshlib.policy(wait=wait, stop=stop)["meshlib.policy"]
    assert (asked.wait, asked.stop) == (wait, stop)
    for wrong in (3, "1s", tenacity.wait_fixed):
        with pytest.raises(ValueError, match="wait="):
            meshlib.CallPolicy(wait=wrong)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="stop="):
            meshlib.CallPolicy(stop=wrong)  # type: ignore[arg-type]
