"""What is one attack case, and does what was seen agree with what was expected?

A `Case` is what an adapter gets: what the attacker sends, the configuration in force, and the remarks of whoever collected it, which
sometimes say what the attack is where the input only names it. The expected answer is not in it: an adapter builds the real thing,
looks at what happens, and says so.

An answer is a set of words that are all true of what happened (`refuse` and `403`). Where the collection wants one exact word (paths),
`is_exact` compares letters. Elsewhere it writes intentions in words of its own, so that `agrees` knows three things about writing: several
answers may be named as alternatives (`ignore or 416`), a remark may stand in brackets (`GOAWAY(ENHANCE_YOUR_CALM)`) and must be true too,
and some words say the same (reject, refuse). It never turns a yes into a no: `accept` agrees with nothing but itself.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

# What was seen: words, all of them true. A list has the words of each side that was attacked, and each has to agree.
Answer = str | set[str] | list[set[str]]

# Areas whose expected answer is compared to the letter.
EXACT = frozenset({"path_authz", "istio_profile", "escaped_slash_action"})


@dataclass(frozen=True, slots=True)
class Case:
    """One line of a collection, without its expected answer."""

    id: str
    area: str
    input: Any
    policy: dict[str, Any] = field(default_factory=dict)
    remarks: str = ""

    @classmethod
    def of(cls, line: dict[str, Any]) -> Case:
        remarks = f"{line.get('source', '')} {line.get('note', '')}".strip()
        return cls(line["id"], line["area"], line["input"], line.get("policy") or {}, remarks)

    @property
    def given(self) -> dict[str, Any]:
        """The input, where it has to be a mapping."""
        if not isinstance(self.input, dict):
            raise not_understood(self)
        return self.input

    def says(self, *words: str) -> bool:
        """Does one of the words stand in the input (or, where that is mere dots, in the remarks)?"""
        return has_word(self.prose, *words)

    @property
    def prose(self) -> str:
        """The input as text, in small letters; the remarks where the input says nothing."""
        text = _text(self.input)
        return (text if text.strip(". ") else self.remarks).lower()


class NotUnderstood(Exception):
    """An input that the adapter of its area can't build: the case fails, since it was not run."""


class Waits(Exception):
    """The case belongs to a part that is not there yet; the text says which."""


def not_understood(case: Case) -> NotUnderstood:
    return NotUnderstood(
        f"{case.id}: no adapter for {case.area} understands the input {case.input!r} under {case.policy!r} ({case.remarks})"
    )


def has_word(text: str, *words: str) -> bool:
    return any(word in text for word in words)


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return " ".join(f"{key}: {_text(item)}" for key, item in value.items())
    if isinstance(value, list):
        return ", ".join(_text(item) for item in value)
    return str(value)


# ------------------------------------------------------------------------------------------------ answers

# Words of one line say the same thing.
_SAME = (
    "reject refuse refused rejected reject_all invalid_rejected fetch_refused",
    "close close_connection closed disconnect connection_closed",
    "abort aborted",
    "deny denied 403 permissiondenied permission_denied",
    "config_error load_error configuration_error",
    "ignore_key ignored_key ignore_entry skip_key",
    "redacted redact",
    "scrubbed scrub",
    "escaped escape",
    "strip stripped dropped drop removed not_visible_to_app absent",
    "keep_last_good last_good",
    "limited 429",
    "stream_error rst_stream",
    "new_trace restart_trace",
    "drop_tracestate drop tracestate_dropped",
    "drop_baggage drop baggage_dropped",
    "fetch_error fetch_fails",
    "normalise normalised normalize lower-cased lower_cased",
    "refuse refuse_to_load refuse_to_start",
)  # fmt: skip
_GROUPS = [frozenset(line.split()) for line in _SAME]


def is_exact(area: str) -> bool:
    return area in EXACT


def agrees(answer: Answer, expected: str) -> bool:
    """Is what was expected among what was seen, on every side?"""
    if isinstance(answer, list):
        return bool(answer) and all(agrees(side, expected) for side in answer)
    words = {answer} if isinstance(answer, str) else answer
    if expected in words:
        return True
    known = {_plain(word) for word in words}
    known |= {word for group in _GROUPS if group & known for word in group}
    return _holds(_plain(expected), known)


def _plain(phrase: str) -> str:
    return re.sub(r"[\s_]+", "_", phrase.strip().lower().replace("'", ""))


def _holds(phrase: str, known: set[str]) -> bool:
    if phrase in known:
        return True
    bracketed = re.fullmatch(r"(.+?)_?\((.+)\)", phrase)
    if bracketed:
        return _holds(bracketed[1], known) and _holds(bracketed[2], known)
    if ":" in phrase:
        # accept:spiffe://…, set:…, app_sees:…: the rest is a value.
        return False
    parts = re.split(r"_or_|/|\|", phrase)
    return len(parts) > 1 and any(_holds(part, known) for part in parts)


def is_one_of(answer: Answer, accepted: Iterable[str]) -> bool:
    """Does every side say something that is accepted, be it each something else?"""
    accepted = list(accepted)
    sides = answer if isinstance(answer, list) else [answer]
    return bool(sides) and all(any(agrees(side, word) for word in accepted) for side in sides)
