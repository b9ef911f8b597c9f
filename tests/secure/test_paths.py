"""Is the path that is authorised the path that every reader would find in the target?

The native canonicaliser against an oracle in plain Python, on the collected attacks and on targets made of the pieces
from which attacks are made. The oracle and the attack cases are read where they are; without them these tests skip.
"""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from meshlib._native import core
from meshlib.errors import Refused

BESIDE = Path(__file__).parents[2] / ".." / "shared" / "cases" / "attack_cases.jsonl"
CASES = Path(os.environ.get("MESHLIB_ATTACK_CASES", BESIDE))
REFUSED = "400"
# The host under which the oracle looks at absolute targets.
HOST = [(b"host", b"svc.local")]


def _oracle() -> ModuleType:
    file = CASES.with_name("path_reference.py")
    if not file.exists():
        pytest.skip(f"the oracle for paths is not here ({file.name} beside the attack cases)", allow_module_level=True)
    spec = importlib.util.spec_from_file_location("path_reference", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


oracle = _oracle()


def _plan(rules: list[dict[str, Any]], paths: str = "canonical") -> bytes:
    plan = {"service": "svc", "mode": "enforce", "identity": "", "paths": paths, "in_flight": 10}
    return json.dumps({**plan, "rules": rules, "routes": []}).encode()


def _rule(action: str, paths: list[dict[str, str]]) -> dict[str, Any]:
    return {"name": action, "action": action, "dry_run": False, "from": [], "methods": [], "paths": paths}


def _gate(rules: list[dict[str, Any]], paths: str = "canonical") -> core.Gate:
    gate = core.Gate()
    gate.publish(_plan(rules, paths), 0.0)
    return gate


OPEN = _gate([_rule("allow", [])])
OPEN_STRICT = _gate([_rule("allow", [])], "strict")


def _entry(gate: core.Gate, target: str, method: str = "GET") -> core.Entry:
    entry = gate.begin(method, target.encode("latin-1"), HOST, "spiffe://shop.internal/ns/default/sa/caller", True, 0.0)
    entry.finish(200, 0.0)
    return entry


def _expected(target: str, method: str) -> str:
    try:
        return str(oracle.canon(target, method))
    except oracle.Bad:
        return REFUSED


WORDS = r"""
    / // . .. /./ /../ %2e %2E %2f %2F %5c \ ; ;a=b %3b ? # %23 %3F % %zz %25 %252f %252e %2500 %257f %25%32f %00 %0a %1f
    %7f %20 %c3%a9 %ff %c0%af %ed%a0%80 admin a b : @ * { | " http:// svc.local :80 HTTPS://
"""
PIECES = [*WORDS.split(), "x\x00", " ", "\xe9"]
targets = st.one_of(
    st.lists(st.sampled_from(PIECES), max_size=8).map(lambda parts: "/" + "".join(parts)),
    st.lists(st.sampled_from(PIECES), max_size=8).map("".join),
    st.text(st.characters(max_codepoint=255), max_size=20),
)
MANY: Callable[..., Any] = settings(max_examples=1000, deadline=None)


@MANY
@given(targets, st.sampled_from(["GET", "OPTIONS"]))
@example("*", "OPTIONS")
@example("http://svc.local:443?x", "GET")
@example("/x//../admin", "GET")
@example("/..;/", "GET")
def test_canonical_form_is_the_oracles(target: str, method: str) -> None:
    """One form or a refusal, and never another one than the oracle's."""
    entry = _entry(OPEN, target, method)
    found = entry.path if entry.status == 0 else str(entry.status)
    assert _expected(target, method) == found


@MANY
@given(targets)
def test_raw_form_is_the_canonical_form_escaped(target: str) -> None:
    """What is sent on is ASCII and means the same path, or is refused where it is decoded again."""
    entry = _entry(OPEN, target)
    if entry.status == 0:
        raw = entry.raw_path.decode("ascii")
        assert _expected(raw, "GET") in {entry.path, REFUSED}
        assert "?" not in raw and "#" not in raw and " " not in raw


@MANY
@given(targets)
def test_strict_refuses_what_the_oracle_refuses(target: str) -> None:
    """`paths: strict` is the canonical answer, minus what has to be decoded or resolved to be understood."""
    entry = _entry(OPEN_STRICT, target)
    found = entry.path if entry.status == 0 else str(entry.status)
    assert (REFUSED if oracle.refused_by_strict(target) else _expected(target, "GET")) == found


@MANY
@given(targets)
def test_the_bare_function_agrees_with_the_gate(target: str) -> None:
    """`canonical_path` is the same function, without a Host to compare an absolute target with."""
    entry = _entry(OPEN, target)
    if entry.status == 0 and target.startswith("/"):
        assert (entry.path, entry.raw_path) == core.canonical_path(target.encode("latin-1"))
    else:
        with pytest.raises(Refused) as caught:
            core.canonical_path(target.encode("latin-1"))
        assert caught.value.reason == "secure.path"


rule_paths = st.sampled_from(["/admin", "/admin/", "/a", "/a/b", "/", "/admin*", "/a/*", "*", "/;", "/admin;a=b"])


@MANY
@given(targets, rule_paths)
def test_a_denial_is_the_oracles(target: str, path: str) -> None:
    """A denial fires for any reading of the target."""
    gate = _gate([_rule("deny", [_path(path)]), _rule("allow", [])])
    assert oracle.decide(target, {"deny": [path]}) == _answer(gate, target)


@MANY
@given(targets, rule_paths)
def test_a_permission_is_the_oracles(target: str, path: str) -> None:
    """A permission needs every reading of the target."""
    assert oracle.decide(target, {"allow": [path]}) == _answer(_gate([_rule("allow", [_path(path)])]), target)


def _path(pattern: str) -> dict[str, str]:
    return {"kind": "prefix", "value": pattern[:-1]} if pattern.endswith("*") else {"kind": "exact", "value": pattern}


def _answer(gate: core.Gate, target: str, method: str = "GET") -> str:
    # Nobody presents an identity in these cases: 401 and 403 are both the denial.
    return {0: "allow", 400: REFUSED, 401: "deny", 403: "deny"}[_entry(gate, target, method).status]


def _segments(pattern: str) -> list[dict[str, str]]:
    return [_path(pattern), _path(pattern.rstrip("/") + "/*")]


def _rules(policy: dict[str, Any]) -> list[dict[str, Any]] | None:
    """The policy of a case as rules; None where it needs what rules do not have (suffix, regex, case, JWT)."""
    patterns = [path for value in policy.values() if isinstance(value, list) for path in value]
    known = {"deny", "allow", "deny_prefix", "allow_prefix", "not_paths"}
    if not policy.keys() <= known or any(path.startswith("*") and path != "*" for path in patterns):
        return None
    denied = [_path(path) for path in policy.get("deny", []) + policy.get("not_paths", [])]
    denied += [pattern for path in policy.get("deny_prefix", []) for pattern in _segments(path)]
    allowed = [_path(path) for path in policy.get("allow", [])]
    allowed += [pattern for path in policy.get("allow_prefix", []) for pattern in _segments(path)]
    rules = [_rule("deny", denied)] if denied else []
    if allowed or policy.keys() & {"deny", "deny_prefix", "not_paths"}:
        rules.append(_rule("allow", allowed))
    return rules


def _cases() -> Iterator[Any]:
    for line in CASES.read_text().splitlines() if CASES.exists() else []:
        case = json.loads(line)
        if case["area"] == "path_authz" and _rules(case["policy"]) is not None:
            yield pytest.param(case, id=case["id"])


@pytest.mark.parametrize("case", list(_cases()))
def test_attack_on_a_path_gets_the_expected_answer(case: dict[str, Any]) -> None:
    """Each collected attack that these kinds of rules can express, also under `paths: strict`."""
    given_input = case["input"] if isinstance(case["input"], dict) else {"target": case["input"]}
    target, method = given_input["target"], given_input.get("method", "GET")
    rules = _rules(case["policy"])
    assert rules is not None
    assert _answer(_gate(rules), target, method) == case["expected"]
    strict = REFUSED if oracle.refused_by_strict(target) else case["expected"]
    assert _answer(_gate(rules, "strict"), target, method) == strict


def test_most_of_the_collection_is_run() -> None:
    """A reader of the cases that finds none would pass everything."""
    assert len(list(_cases())) >= 70
