"""Is the path that is authorised the path that every reader would find in the target?

The native canonicaliser against an oracle in plain Python, on targets made of the pieces from which attacks are made: new
ones in each run, and ten thousand that are always the same. The oracle lies beside the attack cases (which are run by
`test_attack_cases.py`); without it these tests skip.
"""

from __future__ import annotations

import importlib.util
import os
import random
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from meshlib._native import core
from meshlib.errors import Refused
from tests.support import server_plan, server_rule

BESIDE = Path(__file__).parents[2] / ".." / "shared" / "cases" / "attack_cases.jsonl"
CASES = Path(os.environ.get("MESHLIB_ATTACK_CASES", BESIDE))
REFUSED = "400"
# The host under which the oracle looks at absolute targets.
HOST = [(b"host", b"svc.local")]


def _oracle() -> ModuleType:
    beside = (CASES.with_name("path_reference.py"), BESIDE.with_name("path_reference.py"))
    file = next((file for file in beside if file.exists()), beside[0])
    if not file.exists():
        pytest.skip(f"the oracle for paths is not here ({file.name} beside the attack cases)", allow_module_level=True)
    spec = importlib.util.spec_from_file_location("path_reference", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


oracle = _oracle()


def _rule(action: str, paths: list[dict[str, str]], **clauses: Any) -> dict[str, Any]:
    return server_rule(action, action, paths=paths, **clauses)


def _gate(rules: list[dict[str, Any]], paths: str = "canonical") -> core.Gate:
    gate = core.Gate()
    gate.publish(server_plan(*rules, mode="enforce", paths=paths, in_flight=10), 0.0)
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
MANY: Callable[..., Any] = settings(max_examples=400, deadline=None)


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
@example("http://:80/admin")
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


# ------------------------------------------------------------------------------------------------ ten thousand, always the same

SEED = 7
MANY_TARGETS = 10_000


def _generated(count: int, *, is_text: bool = False) -> list[str]:
    """Targets made of the pieces of attacks, the same in each run. `is_text`: without bytes that no text has."""
    chance = random.Random(SEED)
    pieces = [piece for piece in PIECES if not is_text or piece.isascii()]
    made = []
    for _ in range(count):
        start = "/" if chance.random() < 0.9 else ""
        made.append(start + "".join(chance.choices(pieces, k=chance.randint(0, 8))))
    return made


def test_ten_thousand_canonical_forms_are_the_oracles() -> None:
    """The bare function, on a collection that does not change from run to run."""
    wrong = []
    refused = 0
    for target in _generated(MANY_TARGETS):
        expected = _expected(target, "GET")
        try:
            found = core.canonical_path(target.encode("latin-1"))[0]
        except Refused:
            found = REFUSED
            refused += 1
        # Without a Host there is nothing that an absolute target could agree with.
        if expected != found and "://" not in target:
            wrong.append((target, expected, found))
    assert wrong == []
    assert MANY_TARGETS // 10 < refused < MANY_TARGETS


@pytest.mark.parametrize("profile", ["NONE", "BASE", "MERGE_SLASHES", "DECODE_AND_MERGE_SLASHES"])
def test_ten_thousand_normalised_forms_are_istios(profile: str) -> None:
    """Istio's documented profiles, query and all."""
    wrong = []
    for target in _generated(MANY_TARGETS, is_text=True):
        try:
            expected = "path", oracle.istio_normalize(target, profile)
        except oracle.Bad:
            expected = "refused", REFUSED
        found = core.normalized_path(target, profile)
        if expected != found:
            wrong.append((target, expected, found))
    assert wrong == []


ESCAPED_SLASH = re.compile(r"%(2[fF]|5[cC])")


@pytest.mark.parametrize("action", ["KEEP_UNCHANGED", "REJECT_REQUEST", "UNESCAPE_AND_REDIRECT", "UNESCAPE_AND_FORWARD"])
@pytest.mark.parametrize("is_grpc", [False, True])
def test_escaped_slashes_are_dealt_with_as_envoy_does(action: str, is_grpc: bool) -> None:
    """Kept, refused, sent elsewhere, or decoded: in the path and never in the query, and for gRPC there are no redirects."""
    for target in _generated(1000, is_text=True):
        path, mark, query = target.partition("?")
        path, query = (path.split("#")[0], "") if "#" in path else (path, query.split("#")[0])
        if "%00" in path or not target.startswith("/"):
            continue
        rest = mark + query if mark and "#" not in target.split("?")[0] else ""
        found = core.normalized_path(target, "NONE", action, is_grpc)
        decoded = ESCAPED_SLASH.sub(lambda hit: "/" if hit[1][0] == "2" else "\\", path)
        if action == "KEEP_UNCHANGED" or decoded == path:
            assert found[0] == "path", target
        elif action == "REJECT_REQUEST":
            assert found == ("refused", "INTERNAL" if is_grpc else REFUSED), target
        elif action == "UNESCAPE_AND_FORWARD":
            assert found == ("path", decoded + rest), target
        elif is_grpc:
            assert found == ("refused", "INTERNAL"), target
        else:
            # What a browser takes for another host is no place to send it to, nor is what no header can hold.
            leads_away = decoded.startswith(("//", "/\\")) or any(not 0x20 < ord(char) < 0x7F for char in target)
            assert found == (("refused", REFUSED) if leads_away else ("redirect", decoded + rest)), target
