"""What an answer takes away is held back when it can hardly be true."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshlib.discover import EndpointAddress
from meshlib.discover.hold import Hold, is_loss


def some(*numbers: int) -> tuple[EndpointAddress, ...]:
    return tuple(EndpointAddress(f"10.0.0.{number}:80") for number in numbers)


FOUR = some(1, 2, 3, 4)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (some(1, 2, 3), False),
        (some(1, 2), False),  # half is not more than half
        (some(1), True),
        ((), True),
        (some(5, 6, 7, 8), False),  # an exchange, not a loss
        (some(5), True),
    ],
)
def test_loss_is_more_than_half_of_the_endpoints(answer: tuple[EndpointAddress, ...], expected: bool) -> None:
    """Counted is how many are left, not which."""
    assert is_loss(FOUR, answer) is expected


def test_first_answer_is_believed_whatever_it_is() -> None:
    """Without anything to lose there is no loss."""
    assert (Hold().judge((), 0.0), is_loss((), ())) == ((), False)


def test_lost_endpoints_are_kept_for_five_minutes() -> None:
    """The same verdict for 300 s is believed in the end."""
    hold = Hold()
    hold.judge(FOUR, 0.0)
    assert hold.judge(some(1), 10.0) == FOUR
    assert (hold.is_holding, hold.since, hold.times) == (True, 10.0, 1)
    assert hold.judge(some(1), 309.9) == FOUR
    assert hold.judge(some(1), 310.0) == some(1)
    assert (hold.is_holding, hold.times) == (False, 1)


def test_answer_that_recovers_ends_the_hold() -> None:
    """A later answer that is no loss is believed at once, and the next loss is held for its own five minutes."""
    hold = Hold()
    hold.judge(FOUR, 0.0)
    hold.judge((), 10.0)
    assert hold.judge(some(1, 2, 3), 20.0) == some(1, 2, 3)
    assert hold.is_holding is False
    assert hold.judge((), 200.0) == some(1, 2, 3)
    assert (hold.since, hold.times) == (200.0, 2)


def test_what_a_held_answer_adds_is_used_at_once() -> None:
    """Held back is only the loss: new endpoints join the old ones, and do not pile up."""
    hold = Hold()
    hold.judge(FOUR, 0.0)
    assert hold.judge(some(5), 10.0) == some(1, 2, 3, 4, 5)
    assert hold.judge(some(6), 20.0) == some(1, 2, 3, 4, 6)


def test_changed_endpoint_of_a_held_answer_replaces_the_old_one() -> None:
    """The newest word about an address counts."""
    hold = Hold()
    hold.judge(FOUR, 0.0)
    heavy = EndpointAddress("10.0.0.1:80", weight=5.0)
    assert hold.judge((heavy,), 10.0) == (heavy, *some(2, 3, 4))


def test_wavering_answers_do_not_hold_for_ever() -> None:
    """The time counts from the first loss, even if each answer is another one."""
    hold = Hold()
    hold.judge(FOUR, 0.0)
    for now in range(10, 310, 10):
        hold.judge(some(1 + now // 10 % 2), float(now))
    assert hold.judge(some(2), 310.0) == some(2)


def test_confirmed_loss_is_believed_at_the_next_answer() -> None:
    """Somebody who knows may end the hold; it holds for one answer only."""
    hold = Hold()
    hold.judge(FOUR, 0.0)
    hold.judge(some(1), 10.0)
    hold.confirm()
    assert hold.judge(some(1), 15.0) == some(1)
    hold.judge(FOUR, 20.0)
    assert hold.judge(some(1), 25.0) == FOUR


@given(st.lists(st.tuples(st.sets(st.integers(1, 9)), st.floats(0, 100)), max_size=30))
def test_service_never_becomes_empty_within_the_hold(steps: list[tuple[set[int], float]]) -> None:
    """Whatever the answers: in less than 300 s after the last good one, no endpoint count falls below half of it."""
    hold = Hold()
    hold.judge(FOUR, 0.0)
    base, now, since = FOUR, 0.0, None
    for numbers, step in steps:
        now += step
        answer = some(*sorted(numbers))
        used = hold.judge(answer, now)
        if is_loss(base, answer):
            since = now if since is None else since
            if now - since < 300.0:
                assert set(base) <= set(used) | set(answer)
                assert len(used) >= len(base)
                continue
        assert used == answer
        base, since = answer, None
