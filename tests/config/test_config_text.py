"""Does the reader of YAML say what stands in the file, on which line, and refuse what surprises?"""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from meshlib.config.text import Text, dotted, parse


def _mistakes(text: Text) -> list[tuple[int, str, str]]:
    return [(problem.line, problem.key, problem.message) for problem in text.problems]


def test_every_key_path_keeps_its_line() -> None:
    """Keys stand on their own line, items of a list on theirs, and an unknown path falls back to its nearest part."""
    text = parse("a: 1\nb:\n  c: [x,\n      y]\n  d: {e: 5}\n", "f")
    lines = {path: text.line_of(path) for path in [("a",), ("b", "c"), ("b", "c", 0), ("b", "c", 1), ("b", "d", "e")]}
    assert lines == {("a",): 1, ("b", "c"): 3, ("b", "c", 0): 3, ("b", "c", 1): 4, ("b", "d", "e"): 5}
    assert text.line_of(("b", "d", "missing", "deeper")) == 5
    assert text.line_of(("nowhere",)) == 1


def test_a_duplicate_key_is_a_mistake_and_the_first_one_stays() -> None:
    """Last one wins would hide a rule; the message names both lines, and the parsing goes on."""
    text = parse("a: 1\nb: 2\na:\n  c: 3\nd: 4\n", "f")
    assert _mistakes(text) == [(3, "a", "the key stands here a second time (first: line 1)")]
    assert text.value == {"a": 1, "b": 2, "d": 4}


def test_two_duplicates_are_two_problems() -> None:
    """A first mistake never hides a second."""
    text = parse("a: {x: 1, x: 2}\nb: 1\nb: 2\n", "f")
    assert [(line, key) for line, key, _ in _mistakes(text)] == [(1, "a.x"), (3, "b")]


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("true", True),
        ("False", False),
        ("null", None),
        ("~", None),
        ("7", 7),
        ("-3", -3),
        ("1.5", 1.5),
        ("1e3", 1000.0),
        ("yes", "yes"),
        ("no", "no"),
        ("on", "on"),
        ("012", "012"),
        ("0x1F", "0x1F"),
        ("12:30", "12:30"),
        ("1_000", "1_000"),
        ("2024-01-01", "2024-01-01"),
        (".inf", ".inf"),
        (".nan", ".nan"),
        ('"1"', "1"),
        ("!!str 1", "1"),
        ("127.0.0.1:80", "127.0.0.1:80"),
    ],
)
def test_only_plain_numbers_and_true_and_false_are_not_words(word: str, value: Any) -> None:
    """YAML 1.1's booleans, octals, clock times and dates are words: a policy has no surprises."""
    text = parse(f"a: {word}\n", "f")
    assert text.problems == []
    assert text.value == {"a": value}
    assert type(text.value["a"]) is type(value)


def test_an_alias_repeats_a_value() -> None:
    """Anchors are a legal way to write something once."""
    text = parse("a: &x [1, 2]\nb: *x\n", "f")
    assert text.value == {"a": (1, 2), "b": (1, 2)}


@pytest.mark.parametrize(
    ("source", "line", "message"),
    [
        ("a: !!python/object/apply:os.system [ls]\n", 1, "not allowed"),
        ("a: 1\nb: !secret x\n", 2, "not allowed"),
        ("a: 1\n---\nb: 2\n", 2, "second document"),
        ("a: [1, 2\nb: 3\n", 2, "not valid YAML"),
        ('a: 1\nb: "open\n', 3, "not valid YAML"),
        ("a: 1\n\tb: 2\n", 2, "not valid YAML"),
        ("from: [*]\n", 1, "not valid YAML"),
        ("? [a, b]\n: 1\n", 1, "a key must be a word"),
        ("a: *missing\n", 1, "alias"),
        ("x: &x y\n*x : 1\n", 2, "alias can't be a key"),
        ("a: \x01\n", 1, "not valid YAML"),
        ("[" * 40 + "]" * 40, 1, "nested deeper"),
        ("[" * 100_000, 1, "nested deeper"),
    ],
)
def test_what_is_no_plain_document_is_one_clear_problem(source: str, line: int, message: str) -> None:
    """Tags, second documents, depth and bad syntax end the parsing where they stand."""
    text = parse(source, "f")
    assert len(text.problems) == 1
    assert message in text.problems[0].message
    assert line == text.problems[0].line
    assert text.value is None


def test_an_alias_to_a_list_that_is_not_finished_is_unknown() -> None:
    """A value can't hold itself."""
    text = parse("a: &a [1, *a]\n", "f")
    assert "alias" in text.problems[0].message


def test_aliases_cannot_blow_up() -> None:
    """Ten levels of nine aliases are nine to the tenth values: they are counted, not built."""
    levels = ["a0: &a0 [x,x,x,x,x,x,x,x,x]"]
    levels += [f"a{n}: &a{n} [{','.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 11)]
    text = parse("\n".join(levels), "f")
    assert "aliases count each time" in text.problems[0].message


def test_a_merge_key_is_refused() -> None:
    """What a mapping holds stands in it."""
    text = parse("a: &a {x: 1}\nb:\n  <<: *a\n  y: 2\n", "f")
    assert _mistakes(text) == [(3, "b.<<", "merge keys are not supported")]
    assert text.value["b"] == {"y": 2}


def test_dotted_paths_read_like_the_file() -> None:
    """Lists by index, mappings by dots."""
    assert dotted(("services", "a", "route", 0, "match")) == "services.a.route[0].match"
    assert dotted(()) == "(file)"


_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**9), 10**9) | st.text("abc:-_{}#&*!|>'\"%@`, \n", max_size=12),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text("abc-", min_size=1, max_size=5), inner, max_size=4),
    max_leaves=12,
)


def _with_tuples(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(_with_tuples(item) for item in value)
    if isinstance(value, dict):
        return {key: _with_tuples(item) for key, item in value.items()}
    return value


@settings(max_examples=200, deadline=None, derandomize=True)
@given(_VALUES)
def test_what_yaml_writes_is_read_back(value: Any) -> None:
    """Values survive the way through a file, lists as tuples."""
    text = parse(yaml.safe_dump(value), "f")
    assert text.problems == []
    assert text.value == _with_tuples(value)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.text("ab:-?[]{}&*!|>'\"#%@ \n\t,0", max_size=60))
def test_no_text_raises(source: str) -> None:
    """Whatever stands in a file becomes a value or a problem, never an exception."""
    text = parse(source, "f")
    assert text.value is None or not any("not valid YAML" in problem.message for problem in text.problems)
