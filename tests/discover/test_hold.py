"""What an answer takes away is held back when it can hardly be true."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshlib.discover import EndpointAddress
from meshlib.discover.hold import Table


def some(*numbers: int) -> tuple[EndpointAddress, ...]:
    return tuple(EndpointAddress(f"10.0.0.{number}:80") for number in numbers)


FOUR = some(1, 2, 3, 4)
HUNDRED = some(*range(100))


def used(table: Table) -> set[EndpointAddress]:
    return set(table)


def table_of(*endpoints: EndpointAddress) -> Table:
    table = Table()
    table.replace(endpoints, 0.0)
    return table


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
    table = table_of(*FOUR)
    table.replace(answer, 1.0)
    assert table.is_holding is expected


def test_first_answer_is_believed_whatever_it_is() -> None:
    """Without anything to lose there is no loss."""
    table = table_of()
    assert (used(table), table.is_holding) == (set(), False)


def test_lost_endpoints_are_kept_for_five_minutes() -> None:
    """The same verdict for 300 s is believed in the end, also if nothing more is said."""
    table = table_of(*FOUR)
    table.replace(some(1), 10.0)
    assert (used(table), table.since, table.times) == (set(FOUR), 10.0, 1)
    table.replace(some(1), 309.9)
    assert used(table) == set(FOUR)
    assert table.review(310.0) == {e.address for e in some(2, 3, 4)}
    assert (used(table), table.is_holding, table.times) == (set(some(1)), False, 1)


def test_single_removals_do_not_slip_through() -> None:
    """A registry whose entries run out one after the other takes away no more than half, also a minute apart from each other."""
    for pause in (0.01, 2.0):
        table, now = table_of(*HUNDRED), 0.0
        for endpoint in HUNDRED[:-1]:
            now += pause
            table.change((), [endpoint.address], now)
        assert (len(table), table.is_holding, table.times) == (50, True, 1)


def test_slow_scale_down_is_believed() -> None:
    """From a hundred to ten over an hour: nowhere is it halved within five minutes."""
    table, now = table_of(*HUNDRED), 0.0
    for endpoint in HUNDRED[:60]:
        now += 20.0
        table.change((), [endpoint.address], now)
    for endpoint in HUNDRED[60:90]:
        now += 80.0
        table.change((), [endpoint.address], now)
    assert (len(table), table.times) == (10, 0)


def test_rolling_deployment_is_believed_at_once() -> None:
    """A quarter goes before another comes: what is gone is not used, and nothing is held."""
    rng = random.Random(3)
    table, now, fresh = table_of(*HUNDRED), 0.0, 100
    old = list(HUNDRED)
    while old:
        gone = [old.pop() for _ in range(min(25, len(old)))]
        for endpoint in gone:
            now += rng.random()
            table.change((), [endpoint.address], now)
            assert table.find(endpoint.address) is None
        for _ in gone:
            now += rng.random()
            table.change(some(fresh), (), now)
            fresh += 1
    assert (len(table), table.times) == (100, 0)


def test_loss_counts_against_what_was_believed_within_the_window() -> None:
    """Two halvings within five minutes are one loss; the same an hour apart are none."""
    table = table_of(*HUNDRED)
    table.replace(HUNDRED[:60], 10.0)
    table.replace(HUNDRED[:40], 300.0)
    assert (len(table), table.is_holding) == (60, True)
    table = table_of(*HUNDRED)
    table.replace(HUNDRED[:60], 10.0)
    table.replace(HUNDRED[:40], 320.0)
    assert (len(table), table.is_holding) == (40, False)


def test_answer_that_recovers_ends_the_hold() -> None:
    """A later answer that is no loss is believed at once, and the next loss is held for its own five minutes."""
    table = table_of(*FOUR)
    table.replace((), 10.0)
    assert table.replace(some(1, 2, 3), 20.0) == {e.address for e in FOUR}
    assert (used(table), table.is_holding) == (set(some(1, 2, 3)), False)
    table.replace((), 200.0)
    assert (used(table), table.since, table.times) == (set(some(1, 2, 3)), 200.0, 2)


def test_what_a_held_answer_adds_is_used_at_once() -> None:
    """Held back is only the loss: new endpoints join the old ones, and do not pile up."""
    table = table_of(*FOUR)
    table.replace(some(5), 10.0)
    assert used(table) == set(some(1, 2, 3, 4, 5))
    table.replace(some(6), 20.0)
    assert used(table) == set(some(1, 2, 3, 4, 6))
    table.change(some(7), (), 30.0)
    assert (used(table), table.is_holding) == (set(some(6, 7)), False)


def test_changed_endpoint_of_a_held_answer_replaces_the_old_one() -> None:
    """The newest word about an address counts."""
    table = table_of(*FOUR)
    table.replace((), 5.0)
    heavy = EndpointAddress("10.0.0.1:80", weight=5.0)
    assert table.change((heavy,), (), 10.0) == {"10.0.0.1:80"}
    assert used(table) == {heavy, *some(2, 3, 4)}


def test_wavering_answers_do_not_hold_for_ever() -> None:
    """The time counts from the first loss, even if each answer is another one."""
    table = table_of(*FOUR)
    for now in range(10, 310, 10):
        table.replace(some(1 + now // 10 % 2), float(now))
        assert used(table) == set(FOUR)
    table.replace(some(2), 310.0)
    assert used(table) == set(some(2))


def test_confirmed_loss_is_believed() -> None:
    """Somebody who knows may end the hold; the next loss is another one."""
    table = table_of(*FOUR)
    table.replace(some(1), 10.0)
    assert table.confirm(12.0) == {e.address for e in some(2, 3, 4)}
    assert used(table) == set(some(1))
    table.replace(FOUR, 20.0)
    table.replace(some(1), 25.0)
    assert (used(table), table.times) == (set(FOUR), 2)


@pytest.mark.parametrize(("age", "is_judged"), [(299.0, True), (301.0, False), (8 * 3600.0, False)])
def test_what_was_recalled_is_judged_by_only_where_it_is_young(age: float, is_judged: bool) -> None:
    """A list that nobody has believed within the window is no reason to hold what an answer leaves out."""
    table = Table()
    table.recall(HUNDRED, age, 0.0)
    table.replace(HUNDRED[:30], 1.0)
    assert (len(table), table.is_holding) == ((100, True) if is_judged else (30, False))
    table.replace(HUNDRED[:2], 2.0)
    assert table.is_holding


def test_empty_answer_is_held_however_old_what_was_recalled_is() -> None:
    """Better those of yesterday than nobody; and the first that says more is believed, however much is missing."""
    table = Table()
    table.recall(HUNDRED, 8 * 3600.0, 0.0)
    assert table.replace((), 1.0) == {e.address for e in HUNDRED}
    assert (len(table), table.is_holding) == (100, True)
    assert table.change(some(1, 2, 3), (), 2.0) == {e.address for e in HUNDRED}
    assert (used(table), table.is_holding) == (set(some(1, 2, 3)), False)
    table.replace(some(1), 3.0)
    assert table.is_holding


def test_nothing_is_held_of_what_a_person_wrote() -> None:
    """Files and static lists count as they stand."""
    table = Table(0.0)
    table.replace(FOUR, 0.0)
    table.replace((), 1.0)
    assert (used(table), table.times) == (set(), 0)


STEPS = st.lists(
    st.tuples(st.sampled_from(["whole", "come", "go"]), st.sets(st.integers(1, 12), max_size=8), st.floats(0.0, 120.0)),
    max_size=40,
)


@given(STEPS)
def test_what_is_touched_is_what_is_different(steps: list[tuple[str, set[int], float]]) -> None:
    """Whatever is told: who applies only the touched addresses has the whole, and knows what is only held; and the service never loses
    more than half within the hold.
    """
    table, mine, now, begun = table_of(*FOUR), {e.address: (e, False) for e in FOUR}, 0.0, len(FOUR)
    for what, numbers, step in steps:
        now += step
        endpoints = some(*sorted(numbers))
        was_held, before = table.is_holding, len(table)
        if what == "whole":
            touched = table.replace(endpoints, now)
        elif what == "come":
            touched = table.change(endpoints, (), now)
        else:
            touched = table.change((), [e.address for e in endpoints], now)
        for address in touched:
            found = table.find(address)
            if found is None:
                mine.pop(address, None)
            else:
                mine[address] = found, address in table.kept
        assert mine == {e.address: (e, e.address in table.kept) for e in table}
        assert not set(table.told) & set(table.kept)
        if table.is_holding and not was_held:
            begun = before
        if table.is_holding:
            assert 2 * len(table) >= begun
            assert now - (table.since or 0.0) < 300.0
        else:
            assert not table.kept
            assert 2 * len(table) >= before or was_held
