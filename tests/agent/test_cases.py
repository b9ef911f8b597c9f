"""Does the agent withstand every collected attack on its socket, and its clients every one on them? None of them may be left out.

`tests/secure/test_attack_cases.py` runs all areas; here are the two that are the agent's, and nothing that waits for anything passes.
"""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("h2", reason="the node agent needs the extra [agent]")
pytest.importorskip("google.protobuf", reason="the node agent needs the extra [agent]")
pytest.importorskip("meshlib_spiffe", reason="what clients are shown is made by the library spiffe")

from tests.secure.cases import Case, NotUnderstood, answer, is_one_of
from tests.secure.test_attack_cases import LINES

OURS = [line for line in LINES if line["area"] in {"uds_attestation", "workload_api"}]


@pytest.mark.skipif(not OURS, reason="the attack cases are not here: MESHLIB_ATTACK_CASES names their file")
@pytest.mark.parametrize("line", [pytest.param(line, id=line["id"]) for line in OURS])
def test_attack_gets_the_answer_that_it_should(line: dict[str, Any]) -> None:
    """What happens is what is expected, or what the case also accepts."""
    found = answer(Case.of(line))
    accepted = [line["expected"], *line.get("also_ok", [])]
    assert is_one_of(found, accepted), (found, accepted, line)


MORE = [
    ("uds_attestation", {"so_peercred": {"uid": 1001, "pid": 10}, "registered_uid": 1001}, "accept"),
    ("uds_attestation", {"dir_mode": "0755"}, "start"),
    ("uds_attestation", {"dir_mode": "1777"}, "start"),
    ("uds_attestation", {"dir_mode": "0775"}, "refuse_to_start"),
    ("uds_attestation", {"stale_socket": "owned by this uid"}, "unlink"),
    ("uds_attestation", {"pid": "recycled: the process exits after connect()"}, "PermissionDenied"),
    ("uds_attestation", {"exe": "binary replaced while running"}, "PermissionDenied"),
    ("workload_api", {"metadata": {"workload.spiffe.io": "true"}}, "svid"),
    ("workload_api", {"metadata": {"workload.spiffe.io": "True"}}, "InvalidArgument"),
    ("workload_api", {"SPIFFE_ENDPOINT_SOCKET": "unix:///run/x.sock"}, "accept"),
    ("workload_api", {"response": "PermissionDenied"}, "stop_using"),
    ("workload_api", {"response": "mandatory field missing"}, "error_and_discard"),
]


@pytest.mark.parametrize(("area", "given", "expected"), MORE, ids=[f"{area}-{number}" for number, (area, *_) in enumerate(MORE)])
def test_good_and_bad_are_told_apart(area: str, given: Any, expected: str) -> None:
    """An agent that refuses everybody would withstand every attack."""
    case = Case("more", area, given)
    assert is_one_of(answer(case), [expected])


def test_case_that_nobody_understands_is_not_taken_for_withstood() -> None:
    """It fails."""
    with pytest.raises(NotUnderstood):
        answer(Case("x", "uds_attestation", {"what": "is this"}))
