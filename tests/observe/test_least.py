"""Do the rules allow what was seen, and nothing beside it?"""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshlib.observe.least import Pattern, Rule, least
from meshlib.observe.traffic import ALLOW, DENY, WOULD_DENY, Kind, Observed, templated

A, B, C = (f"spiffe://shop.internal/ns/default/sa/{name}" for name in "abc")


def row(peer: str, method: str, path: str, *, is_template: bool | None = None, verdict: str = ALLOW, **more: Any) -> Observed:
    """A recorded call; ids in its path are templated as the recorder does."""
    if is_template is None:
        path, is_template = templated(path)
    kind = Kind(peer, method, path, is_template, more.get("protocol", "http"), verdict, more.get("issuer", ""))
    return Observed("orders", kind, more.get("count", 1), more.get("first", 100.0), more.get("last", 200.0))


def written(rules: list[Rule]) -> list[tuple[str, str, str]]:
    """Callers by their letters, methods, paths by their texts."""
    return [
        ("".join(caller[-1] for caller in rule.callers), " ".join(rule.methods), " ".join(path.text for path in rule.paths))
        for rule in rules
    ]


def matches(pattern: Pattern, path: str) -> bool:
    if pattern.kind == "exact":
        return pattern.text == path
    if pattern.kind == "regex":
        return re.fullmatch(pattern.text, path) is not None
    wanted, found = pattern.text.split("/"), path.split("/")
    pairs = zip(wanted, found, strict=False)
    return len(wanted) == len(found) and all(bool(part) if name.startswith("{") else name == part for name, part in pairs)


def lets_in(rules: list[Rule], peer: str, method: str, path: str) -> bool:
    return any(
        peer in rule.callers and method in rule.methods and any(matches(one, path) for one in rule.paths) for rule in rules
    )


# ---------------------------------------------------------------- rules


def test_callers_with_the_same_methods_and_paths_share_a_rule() -> None:
    """And only those."""
    rows = [
        *(row(peer, method, path) for peer in (A, B) for method in ("POST", "GET") for path in ("/x", "/items/7")),
        row(C, "GET", "/x"),
        row(A, "DELETE", "/y"),
    ]
    assert written(least(rows)) == [("a", "DELETE", "/y"), ("ab", "GET POST", "/x /items/{id}"), ("c", "GET", "/x")]


def test_the_order_of_the_record_is_no_difference() -> None:
    """The same text each time, for reviews."""
    rows = [row(peer, method, path) for peer in (A, B, C) for method in ("PUT", "GET") for path in ("/x", "/y", f"/{peer[-1]}")]
    assert written(least(rows)) == written(least(rows[::-1]))


def test_calls_are_counted_once() -> None:
    """With the first and the last of them."""
    (rule,) = least([row(A, "GET", "/x", count=3, first=50.0), row(A, "GET", "/y", count=4, last=300.0)])
    assert (rule.calls, rule.first, rule.last) == (7, 50.0, 300.0)


def test_what_was_refused_or_has_no_identity_makes_no_rule() -> None:
    """What the mode let pass does: that is how a policy begins."""
    rows = [row("", "GET", "/x"), row(A, "GET", "/refused", verdict=DENY), row(A, "GET", "/new", verdict=WOULD_DENY)]
    assert written(least(rows)) == [("a", "GET", "/new")]
    assert least(rows[:2]) == []


def test_a_token_is_asked_for_where_one_came_each_time() -> None:
    """By its issuer; calls that came once without one go without."""
    rows = [
        row(A, "GET", "/me", issuer="https://i"),
        row(A, "GET", "/me", issuer="https://j"),
        row(A, "GET", "/open", issuer="https://i"),
        row(A, "GET", "/open"),
    ]
    assert [(rule.issuers, rule.paths[0].text) for rule in least(rows)] == [(("https://i", "https://j"), "/me"), ((), "/open")]


def test_methods_of_grpc_are_never_generalised() -> None:
    """They are a program's names, however many there are."""
    rows = [row(A, "POST", f"/pkg.Svc/M{number}", is_template=False, protocol="grpc") for number in range(9)]
    (rule,) = least(rows, most=3)
    assert [path.kind for path in rule.paths] == ["exact"] * 9


# ---------------------------------------------------------------- paths


def test_a_position_with_many_values_becomes_a_variable() -> None:
    """Beyond `most`, with what follows it put together; some of the values are told."""
    names = [f"u{letter}" for letter in "abcdef"]
    rows = [row(A, "GET", f"/users/{name}{rest}") for name in names for rest in ("", "/orders", "/orders/7")]
    assert len(least(rows, most=6)[0].paths) == 18
    (rule,) = least(rows, most=5)
    assert [path.text for path in rule.paths] == ["/users/{id}", "/users/{id}/orders", "/users/{id}/orders/{id2}"]
    assert {path.stands_for for path in rule.paths} == {("ua", "ub", "uc")}


def test_what_the_configuration_names_stays_literal() -> None:
    """It isn't one of the values, and not counted as one."""
    rows = [row(A, "GET", f"/users/{name}") for name in ("me", *"abcde")]
    assert written(least(rows, literals=["/users/me"], most=5)) == [
        ("a", "GET", "/users/a /users/b /users/c /users/d /users/e /users/me")
    ]
    assert written(least(rows, literals=["/users/me"], most=4)) == [("a", "GET", "/users/me /users/{id}")]


def test_the_names_of_the_configuration_are_kept() -> None:
    """For a template of the same shape."""
    rows = [row(A, "GET", "/items/7"), row(A, "GET", "/items/{item}/lines", is_template=True)]
    assert written(least(rows, routes=["/items/{item}"])) == [("a", "GET", "/items/{id}/lines /items/{item}")]


@pytest.mark.parametrize("refused", ["/users/admin", "/users/{id}", "/users/a/keys"])
def test_a_template_never_lets_in_what_was_refused(refused: str) -> None:
    """Then every value is written out: long, and right."""
    rows = [row(A, "GET", f"/users/{name}{rest}") for name in "bcdefg" for rest in ("", "/keys")]
    denied = row(B, "GET", refused, is_template="{" in refused, verdict=DENY)
    assert len(least(rows, most=5)[0].paths) == 2
    rules = least([*rows, denied], most=5)
    assert len(rules[0].paths) == 12
    assert not lets_in(rules, A, "GET", refused)


def test_a_refusal_elsewhere_is_no_reason_to_write_all_out() -> None:
    """Of a path that the template doesn't cover, or that was served as well."""
    rows = [row(A, "GET", f"/users/{name}") for name in "bcdefg"]
    others = [
        row(B, "GET", "/users", verdict=DENY),
        row(B, "GET", "/users/b/x", verdict=DENY),
        row(B, "GET", "/users/b", verdict=DENY),
    ]
    assert written(least([*rows, *others], most=5)) == [("a", "GET", "/users/{id}")]


def test_an_id_is_a_template_only_as_long_as_that_lets_in_nothing_that_was_refused() -> None:
    """Then it is an expression for ids, and every id is still let in; whoever was not refused keeps the template."""
    rows = [row(A, "GET", "/items/7"), row(A, "GET", "/teams/7")]
    assert written(least([*rows, row(A, "GET", "/items", verdict=DENY)])) == [("a", "GET", "/items/{id} /teams/{id}")]
    rules = least([*rows, row(A, "GET", "/items/export-all", verdict=DENY)])
    assert [path.kind for path in rules[0].paths] == ["regex", "template"]
    ids = ("8", "6f1c2a54-8f0e-4d39-9b57-0c6a1d2e3f40", "0a9b8c7d6e5f4a3b")
    assert all(lets_in(rules, A, "GET", f"/items/{value}") for value in ids)
    assert not any(lets_in(rules, A, "GET", f"/items/{value}") for value in ("export-all", "x", "7x", "7/x", ""))


@pytest.mark.parametrize("seen", [["7"], [*"bcdefg"]])
def test_what_another_caller_may_do_is_not_let_in_for_whom_it_was_refused(seen: list[str]) -> None:
    """By an id or by many values: B was refused what A does."""
    rows = [row(B, "GET", f"/users/{name}") for name in seen]
    rules = least([*rows, row(A, "GET", "/users/admin"), row(B, "GET", "/users/admin", verdict=DENY)], most=5)
    assert [lets_in(rules, who, "GET", "/users/admin") for who in (A, B)] == [True, False]
    assert all(lets_in(rules, B, "GET", f"/users/{name}") for name in seen)


def test_the_template_of_a_route_stays() -> None:
    """What stood for its variables isn't recorded: they may be words."""
    rows = [row(A, "GET", "/items/{id}", is_template=True), row(A, "GET", "/items/export-all", verdict=DENY)]
    assert written(least(rows, routes=["/items/{id}"])) == [("a", "GET", "/items/{id}")]


@pytest.mark.parametrize("path", ["/a*", "/{b}", "/x{", "/a?b", "/a#b", "/a%41", "/ä", "*", "/a b*(c)[d]+$^|.~&-"])
def test_odd_paths_become_regular_expressions_that_match_nothing_else(path: str) -> None:
    """A star or a brace would mean something in a rule's path."""
    (rule,) = least([row(A, "GET", path, is_template=False)])
    (pattern,) = rule.paths
    assert (pattern.kind, re.fullmatch(pattern.text, path) is not None) == ("regex", True)
    assert not any(re.fullmatch(pattern.text, other) for other in (path + "x", "x" + path, path.replace("a", "b") + "/", ""))


def test_a_template_with_an_odd_part_is_one_too() -> None:
    """Its variables stand for one segment each."""
    (rule,) = least([row(A, "GET", "/a*/{id}", is_template=True)])
    assert rule.paths[0].text == "/a\\*/[^/]+"


# ---------------------------------------------------------------- always

PATHS = st.lists(st.sampled_from(["orders", "items", "7", "42", "me", "a*", "{x}", "b c", ""]), min_size=1, max_size=4).map(
    lambda parts: "/" + "/".join(part for place, part in enumerate(parts) if part or place == len(parts) - 1)
)
CALLS = st.lists(st.tuples(st.sampled_from([A, B, C]), st.sampled_from(["GET", "POST", "PUT"]), PATHS), min_size=1, max_size=25)


@given(calls=CALLS, other=st.tuples(st.sampled_from([A, B, C]), st.sampled_from(["GET", "POST", "PUT"]), PATHS))
@settings(max_examples=300, deadline=None)
def test_exactly_what_was_seen_is_allowed(calls: list[tuple[str, str, str]], other: tuple[str, str, str]) -> None:
    """Each call, and of the others those only that differ in an id: for any calls, of any callers."""
    rules = least([row(*call) for call in sorted(set(calls))])
    for call in calls:
        assert lets_in(rules, *call)

    def is_like(seen: tuple[str, str, str]) -> bool:
        if seen[:2] != other[:2] or "{" in seen[2]:
            return seen == other
        known, asked = seen[2].split("/"), other[2].split("/")
        return len(known) == len(asked) and all(
            bool(b) if re.fullmatch("[0-9]+", a) else a == b for a, b in zip(known, asked, strict=True)
        )

    assert lets_in(rules, *other) is any(is_like(seen) for seen in calls)


def is_same_but_for_ids(known: list[str], asked: list[str]) -> bool:
    return len(known) == len(asked) and all(
        a == b or bool(re.fullmatch("[0-9]+", a) and re.fullmatch("[0-9]+", b)) for a, b in zip(known, asked, strict=True)
    )


@given(
    calls=CALLS,
    refused=st.lists(st.tuples(st.sampled_from([A, B]), st.just("GET"), PATHS), max_size=5),
    most=st.integers(min_value=1, max_value=4),
)
@settings(max_examples=300, deadline=None)
def test_generalising_never_lets_in_what_was_refused(
    calls: list[tuple[str, str, str]], refused: list[tuple[str, str, str]], most: int
) -> None:
    """However few values make a variable, and whatever was served beside it."""
    rows, denied = [row(*call) for call in calls], [row(*call, verdict=DENY) for call in refused]
    rules = least([*rows, *denied], most=most)
    for call in calls:
        assert lets_in(rules, *call)
    for peer, method, path in refused:
        is_like_one = any(
            (peer, method) == known[:2] and is_same_but_for_ids(known[2].split("/"), path.split("/")) for known in calls
        )
        if not is_like_one:
            assert not lets_in(rules, peer, method, path)
            assert not lets_in(least([*rows, *denied]), peer, method, path)
