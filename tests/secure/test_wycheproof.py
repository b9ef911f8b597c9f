"""Is a signature that others know to be bad ever taken for a good one?

Wycheproof's vectors for JSON Web Signatures and Keys, through the parser, the key filter and the signatures of the core. Nothing
that they call invalid may be accepted. What they call valid may be refused only for a reason on the list below: the core takes
asymmetric signatures by keys that say what they are for. The vectors are read where they are; without them these tests skip.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from meshlib._native import core
from meshlib.errors import Refused

VECTORS = Path(__file__).resolve().parents[2].parent / "shared" / "vectors"
# All that the core can verify: a vector's own key says which of them it is for.
ALGORITHMS = [name for family in ("RS", "PS", "ES") for name in (f"{family}256", f"{family}384", f"{family}512")] + ["EdDSA"]

SECRET = "a shared secret: whoever can verify with it can sign"
RFC7520 = "RFC 7520's own example: a key for PS256 and a token signed with PS384"
ES521 = "RFC 7520's own example: the key names an algorithm ES521, which doesn't exist"
# Valid for Wycheproof, refused by us, and why that is right.
FALSE_REFUSALS = {
    "json_web_signature": {
        **dict.fromkeys((1, 348, 352, 357, 358, 359, 372, 373, 376, 377), SECRET),
        **dict.fromkeys((346, 350), RFC7520),
        **dict.fromkeys((347, 351), ES521),
    },
    "json_web_key": dict.fromkeys((2, 13, 14, 15), SECRET),
    "json_web_crypto": dict.fromkeys((1, 48), SECRET),
}


def vectors(name: str) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    file = VECTORS / f"{name}.json"
    if not file.exists():
        pytest.skip(f"Wycheproof's vectors are not here ({VECTORS.name}/{file.name} beside the repository)")
    groups = json.loads(file.read_text())["testGroups"]
    return [(group, test) for group in groups for test in group["tests"] if "jws" in test]


def key_set(group: dict[str, Any]) -> bytes:
    """The set of a group. Where it is private, so is the secret: a shared key has no public part."""
    given = group.get("public") or group["private"]
    return json.dumps(given if "keys" in given else {"keys": [given]}).encode()


def is_accepted(group: dict[str, Any], test: dict[str, Any]) -> bool:
    text = test["jws"] if isinstance(test["jws"], str) else json.dumps(test["jws"])
    try:
        core.verify_jws(text.encode(), key_set(group), ALGORITHMS)
    except Refused:
        return False
    return True


@pytest.mark.parametrize("name", sorted(FALSE_REFUSALS))
def test_nothing_invalid_is_accepted(name: str) -> None:
    """0 false accepts."""
    wrong = [test["tcId"] for group, test in vectors(name) if test["result"] == "invalid" and is_accepted(group, test)]
    assert wrong == []


@pytest.mark.parametrize("name", sorted(FALSE_REFUSALS))
def test_what_is_valid_is_refused_for_listed_reasons_only(name: str) -> None:
    """The list is exact: a vector on it that is accepted some day is found, too."""
    refused = {test["tcId"] for group, test in vectors(name) if test["result"] == "valid" and not is_accepted(group, test)}
    assert refused == set(FALSE_REFUSALS[name])


def test_the_vectors_are_all_there() -> None:
    """A file that was cut off would pass by saying nothing."""
    assert {name: len(vectors(name)) for name in FALSE_REFUSALS} == {
        "json_web_signature": 401,
        "json_web_key": 26,
        "json_web_crypto": 49,
    }
