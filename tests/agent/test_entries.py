"""Does a caller get what its selectors say, and on any doubt nothing?"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from meshlib.agent.attest import Caller
from meshlib.agent.entries import Entries
from meshlib.config.agent_policy import EntryPolicy

CALLER = Caller(7, 1001, 1002, "/usr/bin/orders", "ab" * 32, ("orders.service",), ("/system.slice/orders.service/sub",))


def services(*entries: Any, caller: Caller = CALLER) -> list[str]:
    return [entry.service for entry in Entries(entries).of(caller)]


@pytest.mark.parametrize(
    "selector",
    [
        {},
        {"gid": 1002},
        {"path": "/usr/bin/orders"},
        {"sha256": ("cd" * 32, "AB" * 32)},
        {"unit": "orders.service"},
        {"cgroup": "/system.slice/orders.service"},
        {"cgroup": "/system.slice/orders.service/sub"},
        {"cgroup": "/system.slice/"},
        {"gid": 1002, "path": "/usr/bin/orders", "sha256": ("ab" * 32,), "unit": "orders.service", "cgroup": "/system.slice"},
    ],
)
def test_entry_whose_selectors_all_hold_counts(selector: dict[str, Any]) -> None:
    """What isn't written says nothing."""
    assert services(EntryPolicy("orders", uid=1001, **selector)) == ["orders"]


@pytest.mark.parametrize(
    "selector",
    [
        {"uid": 1002},
        {"uid": 0},
        {"uid": "1001"},
        {"uid": None},
        {"gid": 1001},
        {"gid": 0},
        {"path": "/usr/bin/order"},
        {"path": "/usr/bin/orders "},
        {"sha256": ("cd" * 32,)},
        {"sha256": ("",)},
        {"unit": "orders"},
        {"unit": "web.service"},
        {"cgroup": "/system.slice/orders"},
        {"cgroup": "system.slice"},
        {"gid": 1002, "path": "/usr/bin/orders", "unit": "web.service"},
    ],
)
def test_one_selector_that_does_not_hold_is_enough(selector: dict[str, Any]) -> None:
    """Be all the others right."""
    assert services(EntryPolicy("orders", **{"uid": 1001, **selector})) == []


def test_what_could_not_be_found_out_holds_nothing() -> None:
    """A caller without path, hash, unit and group is only a user."""
    bare = Caller(7, 1001, 1002)
    wanted: list[dict[str, Any]] = [
        {"path": "/x"},
        {"sha256": ("ab",)},
        {"sha256": ("",)},
        {"unit": "x.service"},
        {"cgroup": "/"},
    ]
    assert [services(EntryPolicy("a", uid=1001, **each), caller=bare) for each in wanted] == [[]] * 5
    assert services(EntryPolicy("a", uid=1001), caller=bare) == ["a"]


def test_number_is_not_a_truth() -> None:
    """`uid: true` in a configuration that was let through is not user 1."""
    made = SimpleNamespace(service="a", uid=True, gid=None, path=None, sha256=(), unit=None, cgroup=None)
    assert services(made, caller=Caller(7, 1, 1)) == []


def test_all_entries_that_hold_count_in_their_order() -> None:
    """The first one is what a program takes that asks for one."""
    entries = [EntryPolicy(name, uid=uid) for name, uid in (("b", 1001), ("x", 5), ("a", 1001), ("b", 1001))]
    assert services(*entries) == ["b", "a", "b"]


def test_replacing_is_told_until_nobody_wants_to_hear() -> None:
    """Streams hang on it."""
    entries, told = Entries([]), list[str]()
    end = entries.watch(lambda: told.append("first"))
    entries.watch(lambda: told.append("second"))
    entries.replace([EntryPolicy("orders", uid=1001)])
    end()
    end()
    entries.replace([])
    assert (told, entries.of(CALLER)) == (["first", "second", "second"], ())
