"""Why this endpoint and not another?

The part of a call's story that tells of balance: by which policy endpoints were compared, what each of them looked like, and what decided
each choice. A policy compares what it compares: cost (peak_ewma), calls in flight (least_request), whose turn it is, chance, or a key;
so each has its own words, and numbers stand only where numbers decided.

It reads a record and decides nothing. The rest of the story is in `explain.py`, how numbers are written in `text.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .text import Record, decimal, milliseconds, plain, table

_POLICIES = {
    "peak_ewma": "of two drawn by chance the one with the lower cost, which is latency x (calls in flight + 1)",
    "least_request": "of two drawn by chance the one with fewer calls in flight for its weight",
    "round_robin": "each in its turn, as often as its weight says",
    "random": "by chance, as often as its weight says",
    "ring_hash": "calls with the same key go to the same endpoint",
    "maglev": "calls with the same key go to the same endpoint",
}
_BY_KEY = ("ring_hash", "maglev")
# What is compared, as the head of its column; the other policies compare no numbers.
_SCORES = {"peak_ewma": "cost", "least_request": "load"}

_HEALTH = {
    "closed": "healthy",
    "open": "out: its breaker is open",
    "half_open": "out: a probe is under way",
    "failing": "out: it fails its health check",
    "isolated": "out: isolated by hand",
}


def policy(record: Record) -> str:
    """The policy and what it means; "" where the record doesn't name it."""
    name = str(record.get("policy") or "")
    return f"{name}: {_POLICIES[name]}" if name in _POLICIES else name


def health(record: Record) -> str:
    """How many may be chosen; "" while all of them may."""
    total, out = record.get("total"), record.get("out")
    if not isinstance(total, int) or not isinstance(out, int) or not 0 < out <= total:
        return ""
    text = f"{total - out} of {total} healthy"
    panic = record.get("panic")
    if isinstance(panic, int | float) and panic > 0:
        text += f"; panic below {panic * 100:g} %"
    if any("in panic" in str(event.get("what")) for event in record.get("events") or ()):
        text += "; so few that all were used (panic)"
    return text


def candidates(record: Record) -> list[str]:
    """Everybody who could have been chosen, with what was compared; those above the record's bound as a number."""
    found: Sequence[Record] = record.get("candidates") or ()
    score = _SCORES.get(str(record.get("policy") or "peak_ewma"), "")
    scores = _scores(record, found) if score else [None] * len(found)
    compared = [value for value in scores if value is not None]
    # A hair's breadth is chance, and not worth a star.
    least = min(compared) if compared and max(compared) > 1.01 * min(compared) else None
    write = decimal if score == "load" else cost
    has_zones, has_weights = any(c.get("zone") for c in found), has_unlike_weights(record)
    rows = [
        ("", "endpoint", "zone" if has_zones else "", "weight" if has_weights else "", "latency", "in flight", score, "health")
    ]
    for candidate, value in zip(found, scores, strict=True):
        word = str(candidate.get("breaker") or "-")
        rows.append(
            (
                "*" if value is not None and value == least else "",
                str(candidate.get("endpoint", "?")),
                str(candidate.get("zone") or ""),
                decimal(candidate.get("weight")) if has_weights else "",
                milliseconds(candidate.get("ewma_ms")),
                plain(candidate.get("in_flight")),
                write(value) if score else "",
                _HEALTH.get(word, word.replace("_", " ")),
            )
        )
    lines = table(rows, right={3, 4, 5, 6})
    more = _more(record, found)
    head = f"candidates    ({score} as it was compared, the rest as it is now)" if score else "candidates    (as they are now)"
    return [head, *lines, *([f"  and {more} more"] if more > 0 else [])]


def pick(record: Record, event: Record, place: int) -> str:
    """What was chosen in this event, and what decided it. `place` is its number among the events."""
    what, endpoint = str(event.get("what") or ""), str(event.get("endpoint") or "")
    if what == "probe":
        return f"probe to {endpoint}: it was taken out, and this call finds out whether it is well again"
    if what == "picked to see whether it is back":
        return f"picked {endpoint}: it failed and was kept only for want of others, and this call finds out whether it is back"
    if what == "picked by session":
        return f"picked {endpoint}: the caller's session belongs here"
    if what == "picked by key":
        return f"picked {endpoint}: {_home(record, event, place)}"
    text = f"{endpoint} {what}" if what.startswith("sent") else f"{what} {endpoint}"
    if what.startswith("picked in zone"):
        text = f"picked {endpoint} in zone {_zone(record, event) or '?'}"
    elif what in ("picked outside the zone", "picked from another backend", "picked again, for want of another"):
        text = what.replace("picked", f"picked {endpoint}")
    elif what == "picked in panic":
        text = f"picked {endpoint}"
    why = _why(record, event)
    text += f": {why}" if why else ""
    return text + ("; so few are healthy that all are used (panic)" if "in panic" in what else "")


def _why(record: Record, event: Record) -> str:
    """What this policy compared."""
    what, detail = str(event.get("what") or ""), event.get("detail") or {}
    name = str(record.get("policy") or "peak_ewma")
    if not what.startswith("picked"):
        return ""
    if name in _BY_KEY:
        # Only without a key is the choice called so; in the other cases the record doesn't say whether there was one.
        return "by chance, for want of a key" if what in ("picked", "picked in zone", "picked outside the zone") else ""
    if name == "round_robin":
        return "its turn"
    if name == "random":
        return "by chance"
    other, its_cost, other_cost = detail.get("other"), detail.get("cost"), detail.get("other_cost")
    if name == "least_request" and other:
        unit = " for its weight" if has_unlike_weights(record) else ""
        return f"{decimal(its_cost or 0)} in flight{unit} against {decimal(other_cost or 0)} of {other}"
    if other and its_cost is not None and other_cost is not None:
        return f"cost {cost(its_cost)} against {cost(other_cost)} of {other}"
    if other:
        return f"rather than {other}"
    return "" if what.startswith("picked again") else "no other was left to compare it with"


def _home(record: Record, event: Record, place: int) -> str:
    """A key has one home; where that can't be used, the next one in line stands in for it."""
    home = (event.get("detail") or {}).get("other")
    events: Sequence[Record] = record.get("events") or ()
    before = events[:place]
    tried = [e.get("endpoint") for e in before if e.get("phase") == "balance"]
    if home:
        word = next((str(c.get("breaker") or "") for c in record.get("candidates") or () if c.get("endpoint") == home), "")
        why = "was tried already" if home in tried else "has too much in flight" if word == "closed" else "is out"
        return f"it stands in for {home}, the home of its key, which {why}"
    if tried:
        return "the next in line for its key, of those that were not tried yet"
    out, total = record.get("out"), record.get("total")
    # Those that went out because of this call were in when it was made.
    out = out - sum(1 for e in events[place:] if e.get("what") == "ejected") if isinstance(out, int) else 0
    if out > 0:
        return f"its key has its home here, or here is who stands in for it: {out} of {total} {'is' if out == 1 else 'are'} out"
    return "its key has its home here"


def _zone(record: Record, event: Record) -> str:
    zone = (event.get("detail") or {}).get("zone")
    endpoint = event.get("endpoint")
    return str(zone or next((c.get("zone") for c in record.get("candidates") or () if c.get("endpoint") == endpoint), None) or "")


def _scores(record: Record, found: Sequence[Record]) -> list[float | None]:
    """What each was compared with. An idle endpoint's load is nothing at all, so that the record leaves it out."""
    idle = set()
    if record.get("policy") == "least_request":
        idle = {str(e.get("endpoint")) for e in record.get("events") or () if (e.get("detail") or {}).get("other")}
    scores = []
    for candidate in found:
        score = candidate.get("score")
        if not isinstance(score, int | float):
            score = 0.0 if str(candidate.get("endpoint")) in idle else None
        scores.append(score)
    return scores


def has_unlike_weights(record: Record) -> bool:
    weights = [c.get("weight") for c in record.get("candidates") or ()]
    return any(isinstance(weight, int | float) and weight != weights[0] for weight in weights)


def _more(record: Record, found: Sequence[Record]) -> int:
    """How many of the backend the record left out. Those of another backend are none of them."""
    total = record.get("total")
    if not isinstance(total, int):
        return 0
    foreign = set()
    for event in record.get("events") or ():
        if event.get("what") == "picked from another backend":
            foreign |= {str(event.get("endpoint")), str((event.get("detail") or {}).get("other"))}
    return total - sum(1 for candidate in found if str(candidate.get("endpoint")) not in foreign)


def cost(value: Any) -> str:
    """Latency times what is in flight; only its proportions matter."""
    if not isinstance(value, int | float):
        return "-"
    thousand = value * 1000
    return f"{thousand:.0f}" if thousand >= 100 else f"{thousand:.1f}" if thousand >= 0.1 or not thousand else f"{thousand:.2g}"
