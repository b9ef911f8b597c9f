"""Does every row of the threat model point at something that tests it?"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CASES = ROOT.parent / "shared" / "cases" / "attack_cases.jsonl"
PAGE = (ROOT / "THREAT_MODEL.md").read_text()


def rows() -> list[tuple[str, str]]:
    threats = PAGE.split("## Threats", 1)[1].split("## Out of reach", 1)[0]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in threats.splitlines() if line.startswith("| ")]
    return [(row[0], row[2]) for row in cells if row[0] != "threat"]


def test_there_are_rows_of_each_kind_of_threat() -> None:
    """The six letters of STRIDE, and some rows of each."""
    kinds = re.findall(r"^### (\w)", PAGE, re.MULTILINE)
    assert kinds == list("STRIDE")
    assert len(rows()) >= 3 * len(kinds)


@pytest.mark.parametrize(("threat", "shown"), rows())
def test_each_row_points_at_tests_that_exist(threat: str, shown: str) -> None:
    """A file of ours, or cases of the collection."""
    for name in (name.strip() for name in shown.split(",")):
        if name.startswith("tests/"):
            assert (ROOT / name).is_file(), f"{threat}: {name}"


@pytest.mark.skipif(not CASES.exists(), reason="the collection of attack cases is not beside this project")
def test_each_case_is_one_of_the_collection() -> None:
    """An area, or the ID of one case."""
    cases = [json.loads(line) for line in CASES.read_text().splitlines()]
    known = {case["id"] for case in cases} | {case["area"] for case in cases}
    named = {name.strip() for _, shown in rows() for name in shown.split(",") if not name.strip().startswith("tests/")}
    assert named - known == set()
