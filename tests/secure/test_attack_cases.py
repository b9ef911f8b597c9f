"""Does every collected attack get the answer that it should?

Each line of the collection is one test: the adapter of its area builds the real thing (a token, a certificate, a frame, a file, a request)
and says what happened, and that must be the expected answer, or one that the case also accepts. Paths must match to the letter. The
collection is the file that MESHLIB_ATTACK_CASES names, by default the one that lies beside; without it nothing is tested here. A case that
no adapter understands fails: an attack that was not run was not withstood.
"""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import pytest

from tests.secure.cases import ADAPTERS, Case, Waits, agrees, answer, is_exact, is_one_of
from tests.secure.cases.paths import path_authz
from tests.support import ROOT

BESIDE = ROOT.parent / "shared" / "cases" / "attack_cases.jsonl"
CASES = Path(os.environ.get("MESHLIB_ATTACK_CASES", BESIDE))
ORACLE = next(
    (file for file in (CASES.with_name("path_reference.py"), BESIDE.with_name("path_reference.py")) if file.exists()),
    CASES.with_name("path_reference.py"),
)


def lines() -> list[dict[str, Any]]:
    if not CASES.exists():
        return []
    return [json.loads(line) for line in CASES.read_text(encoding="utf-8").splitlines() if line.strip()]


LINES = lines()
pytestmark = pytest.mark.skipif(
    not LINES, reason=f"the attack cases are not here ({CASES.name}): MESHLIB_ATTACK_CASES names their file"
)


@pytest.mark.parametrize("line", [pytest.param(line, id=line["id"]) for line in LINES])
def test_attack_gets_the_answer_that_it_should(line: dict[str, Any]) -> None:
    """What happens is what is expected, or what the case also accepts."""
    try:
        found = answer(Case.of(line))
    except Waits as waits:
        pytest.skip(str(waits))
    accepted = [line["expected"], *line.get("also_ok", [])]
    if is_exact(line["area"]):
        # Where no token, no certificate and no socket is involved there is one right answer.
        assert found == line["expected"], line
    else:
        assert is_one_of(found, accepted), (found, accepted, line)


@pytest.mark.skipif(not ORACLE.exists(), reason="the oracle for paths is not here (path_reference.py beside the attack cases)")
@pytest.mark.parametrize("line", [pytest.param(line, id=line["id"]) for line in LINES if line["area"] == "path_authz"])
def test_attack_on_a_path_under_strict(line: dict[str, Any]) -> None:
    """`paths: strict` refuses what has to be decoded or resolved, and else answers the same."""
    case = Case.of(line)
    target = case.input["target"] if isinstance(case.input, dict) else case.input
    expected = "400" if _oracle().refused_by_strict(target) else line["expected"]
    assert path_authz(case, "strict") == expected, line


def _oracle() -> Any:
    spec = importlib.util.spec_from_file_location("path_reference", ORACLE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_there_is_an_adapter_for_every_area() -> None:
    """An area without an adapter would be an attack that nobody runs."""
    assert {line["area"] for line in LINES} <= set(ADAPTERS)


@pytest.mark.parametrize(
    ("answered", "expected", "is_same"),
    [
        ("reject", "refuse", True),
        ("accept", "reject", False),
        ({"reject", "503"}, "reject_all(401/503)", True),
        ({"reject", "200"}, "reject_all(401/503)", False),
        ({"GOAWAY"}, "GOAWAY(ENHANCE_YOUR_CALM)", False),
        ({"GOAWAY", "ENHANCE_YOUR_CALM"}, "GOAWAY(ENHANCE_YOUR_CALM)", True),
        ("416", "ignore_or_416", True),
        ("accept:spiffe://td/b", "accept:spiffe://td/a", False),
        ("accept", "accept:spiffe://td/a", False),
        ("client_ip:10.0.0.1", "client_ip:10.0.0.2", False),
        (set(), "deny", False),
        ([{"400"}, {"400", "close"}], "400", True),
        ([{"400"}, {"accept"}], "400", False),
        ([], "400", False),
    ],
)
def test_words_of_an_answer_agree_only_with_what_means_the_same(answered: Any, expected: str, is_same: bool) -> None:
    """Alternatives and remarks are understood; a yes is never taken for a no."""
    assert agrees(answered, expected) is is_same
