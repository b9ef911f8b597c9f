"""How is the story of one call told to a person?

From the record of its decisions, which the core keeps with each call anyway: what was asked, who could have answered,
and then step by step what was decided, with the reason that decided it. The reader wants to know why; so each line ends
with its because, and numbers are compared with what they were compared with. Missing parts are left out: a record of
another version is still told.

It formats and nothing else. Programs read the record, not this text.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

Record = Mapping[str, Any]

WIDTH = 110


def explain(record: Record) -> str:
    """The story of a call, outbound (`Call.record()`) or inbound (`Entry.record()`), in aligned lines without a
    trailing newline.
    """
    return "\n".join(_inbound(record) if "verdict" in record else _outbound(record))


# ---------------------------------------------------------------------- out


def _outbound(record: Record) -> list[str]:
    lines = [_title(record)]
    lines += _facts(
        ("route", _route(record)),
        ("deadline", _seconds(record.get("deadline"))),
        ("idempotent", _idempotent(record)),
    )
    candidates = record.get("candidates") or []
    if candidates:
        lines += ["", "candidates    (cost as it was compared, the rest as it is now)", *_candidates(candidates)]
    events = record.get("events") or []
    if events:
        lines += ["", "what happened", *_events(events)]
    return [*lines, "", _outcome(record, events)]


def _title(record: Record) -> str:
    method, path, service = (str(record.get(key) or "") for key in ("method", "path", "service"))
    what = " ".join(part for part in (method, path) if part)
    return f"{what or 'a call'} to {service}" if service else what or "a call"


def _route(record: Record) -> str:
    route, backend = str(record.get("route") or ""), str(record.get("backend") or "")
    rule = str(record.get("rule") or "")
    return route + (f", backend {backend}" if backend else "") + (f" ({rule})" if rule else "")


def _idempotent(record: Record) -> str:
    if "idempotent" not in record:
        return ""
    return "yes, so it may be sent twice" if record["idempotent"] else "no, so it is sent again only if nothing of it arrived"


def _candidates(candidates: Sequence[Record]) -> list[str]:
    rows = [("", "endpoint", "zone" if any(c.get("zone") for c in candidates) else "", "latency", "in flight", "cost", "breaker")]
    costs = [c["score"] for c in candidates if isinstance(c.get("score"), int | float)]
    # A hair's breadth is chance, and not worth a star.
    least = min(costs) if costs and max(costs) > 1.01 * min(costs) else None
    for candidate in candidates:
        score = candidate.get("score")
        is_best = score is not None and score == least
        rows.append(
            (
                "*" if is_best else "",
                str(candidate.get("endpoint", "?")),
                str(candidate.get("zone") or ""),
                _milliseconds(candidate.get("ewma_ms")),
                _plain(candidate.get("in_flight")),
                _cost(score),
                str(candidate.get("breaker") or "-").replace("_", " "),
            )
        )
    return _table(rows, right={3, 4, 5})


def _events(events: Sequence[Record]) -> list[str]:
    rows = []
    attempt, status = 0, 0
    # Attempts may overlap, so that an answer is not always the last one's.
    latest: dict[Any, int] = {}
    for event in events:
        status = (event.get("detail") or {}).get("status", status)
        if event.get("phase") == "balance":
            attempt += 1
            latest[event.get("endpoint")] = attempt
        own = latest.get(event.get("endpoint"), attempt)
        number = f"#{own}" if attempt and event.get("phase") in ("balance", "admit", "send") else ""
        at = event.get("at")
        time = f"{at:.1f} ms" if isinstance(at, int | float) else ""
        rows.append((time, str(event.get("phase") or ""), number, _event(event, status)))
    return _table(rows, right={0})


def _event(event: Record, status: int) -> str:
    """What was decided, and because of what. `status` is the last one that came."""
    what = str(event.get("what") or "")
    endpoint = str(event.get("endpoint") or "")
    detail: Record = event.get("detail") or {}
    why = str(detail.get("why") or "")
    phase = event.get("phase")
    if phase == "route" and what == "matched":
        seconds = detail.get("seconds")
        return "matched" + (f"; {_seconds(seconds)} are left for the call" if seconds is not None else "")
    if phase == "balance":
        return _pick(what, endpoint, detail)
    if phase == "admit":
        return "the endpoint is taken out: its breaker opened" if what == "ejected" else what.replace("_", " ")
    if phase == "send":
        if what == "response":
            return f"{endpoint} answered {detail.get('status', '')}".strip()
        text = _FAILURES.get(what, what) + (f" ({why})" if why else "")
        return f"{endpoint}: {text}" if endpoint else text
    if phase == "retry" and what in ("hedged", "given up"):
        after = f" after {_seconds(detail.get('seconds'))}"
        return f"{endpoint} has not answered{after}: another is asked as well" if what == "hedged" else f"{endpoint} is given up"
    if phase == "retry":
        return _judged(what, f"status {status}" if why == "status" else why, detail.get("seconds"))
    known = {"why", "seconds", "status", "cost", "other", "other_cost", "zone"}
    extra = ", ".join(f"{key} {value}" for key, value in detail.items() if key not in known)
    return " ".join(part for part in (what, endpoint, f"({why})" if why else "", extra) if part)


def _pick(what: str, endpoint: str, detail: Record) -> str:
    other, cost, other_cost = detail.get("other"), detail.get("cost"), detail.get("other_cost")
    if what == "probe":
        return f"probe to {endpoint}: it was taken out, and this call finds out whether it is well again"
    if what == "picked in zone":
        text = f"picked {endpoint} in zone {detail.get('zone') or '?'}"
    elif what == "picked outside the zone":
        text = f"picked {endpoint} outside the zone"
    else:
        text = f"{endpoint} {what}" if what.startswith("sent") else f"{what} {endpoint}"
    if other and cost is not None and other_cost is not None:
        text += f": cost {_cost(cost)} against {_cost(other_cost)} of {other}"
    elif other:
        text += f" rather than {other}"
    elif what in ("picked", "picked in zone", "picked outside the zone"):
        text += ": no other was left to compare it with"
    if "panic" in what:
        text += "; fewer are healthy than may be trusted, so all are used"
    return text


def _judged(what: str, why: str, seconds: Any) -> str:
    wait = f" after {_seconds(seconds)}" if isinstance(seconds, int | float) and seconds > 0 else ""
    if what == "again":
        return f"sent again{wait}" + (f", because: {why}" if why else "")
    if what == "awaited":
        return f"not sent again yet: {why}"
    if what == "not hedged":
        return "not hedged" + (f", because: {why}" if why else "")
    if what == "delivered":
        return "not sent again" + (f", because: {why}" if why else "")
    if what == "refused":
        return "no attempt was possible: the mesh says no"
    return what + (f" ({why})" if why else "")


def _outcome(record: Record, events: Sequence[Record]) -> str:
    attempts = sum(1 for event in events if event.get("phase") == "balance")
    last = next((event for event in reversed(events) if event.get("phase") in ("send", "retry")), None)
    sent = next((event for event in reversed(events) if event.get("phase") == "send"), None)
    count = f"{attempts} attempt{'s' if attempts != 1 else ''}{_hedge(events)}"
    if last is not None and (last.get("phase"), last.get("what")) == ("retry", "refused"):
        return f"=> refused by the mesh after {count}"
    if sent is None:
        return "=> not answered yet" if attempts else "=> nothing was sent"
    status = (sent.get("detail") or {}).get("status")
    if sent.get("what") == "response":
        at = sent.get("at")
        took = f" after {at:.1f} ms" if isinstance(at, int | float) else ""
        return f"=> {status or 'answered'}{took}, {count}"
    return f"=> failed after {count}: {_FAILURES.get(str(sent.get('what')), str(sent.get('what')))}"


def _hedge(events: Sequence[Record]) -> str:
    """When a second attempt went out beside the first, where, and what came of it; "" if none did."""
    place = next((n for n, event in enumerate(events) if (event.get("phase"), event.get("what")) == ("retry", "hedged")), None)
    if place is None:
        return ""
    after = [event for event in events[place + 1 :] if event.get("endpoint")]
    where = next((str(event["endpoint"]) for event in after if event.get("phase") == "balance"), "")
    ends = [event for event in after if event.get("endpoint") == where and event.get("phase") != "balance"]
    text = f"; hedged after {_seconds((events[place].get('detail') or {}).get('seconds'))} to {where}"
    if not ends:
        return text
    if ends[0].get("what") == "given up":
        return text + ", which was not needed"
    is_good = ends[0].get("what") == "response" and (ends[0].get("detail") or {}).get("status", 0) < 500
    return text + (", which won" if is_good else ", which did not help")


_FAILURES = {
    "refused": "no connection (refused, unreachable or too slow to connect)",
    "unwritten": "the connection broke before anything was written",
    "stale": "the kept-alive connection had been closed by the other side",
    "reset": "the connection was lost while the answer was awaited",
    "timeout": "no answer in time",
    "identity": "the other side did not prove the expected identity",
    "protocol": "the answer was not correct HTTP",
    "cancelled": "the caller gave up",
}


# ---------------------------------------------------------------------- in


def _inbound(record: Record) -> list[str]:
    method, path, service = (str(record.get(key) or "") for key in ("method", "path", "service"))
    what = " ".join(part for part in (method, path) if part) or "a call"
    left = record.get("left")
    lines = [f"{what} into {service}" if service else what]
    lines += _facts(
        ("caller", _caller(record)),
        ("mode", str(record.get("mode") or "")),
        ("route", str(record.get("route") or "")),
        ("deadline", f"{_seconds(left)} were left" if left is not None else ""),
    )
    return [*lines, "", *_verdict(record)]


def _caller(record: Record) -> str:
    wire = "mutual TLS" if record.get("peer") else "TLS without a certificate" if record.get("tls") else "plain text"
    return f"{record.get('peer') or 'nobody that we know'}, over {wire}"


def _verdict(record: Record) -> list[str]:
    rule, status = record.get("rule"), record.get("status")
    by = f" by the rule {rule!r}" if rule else ""
    detail, nearest = str(record.get("detail") or ""), record.get("nearest_rule")
    lines = [f"=> refused with {status} ({record.get('reason')})" + by if status else f"=> let in{by}"]
    lines += textwrap.wrap(detail, WIDTH, initial_indent="   ", subsequent_indent="   ", break_long_words=False)
    lines += [f"   nearest rule: {nearest!r}"] if nearest and not rule else []
    if record.get("would_deny") and not status:
        dry = record.get("dry_run_rule")
        lines.append(
            f"   it would be refused by the rule {dry!r}, which is only tried out"
            if dry
            else "   mode enforce would refuse it: " + ("a rule denies it" if rule else "no rule allows it")
        )
    return lines


# ---------------------------------------------------------------------- pieces


def _facts(*pairs: tuple[str, str]) -> list[str]:
    return [f"  {name:<12}{value}" for name, value in pairs if value]


def _table(rows: Sequence[tuple[str, ...]], *, right: set[int]) -> list[str]:
    """Columns as wide as their widest cell; empty columns vanish."""
    widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            cell.rjust(width) if place in right else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
            if width
        ]
        lines.append("  " + "  ".join(cells).rstrip())
    return lines


def _seconds(value: Any) -> str:
    if not isinstance(value, int | float):
        return ""
    return f"{value * 1000:.0f} ms" if 0 <= value < 1 else f"{value:.4g} s"


def _milliseconds(value: Any) -> str:
    if not isinstance(value, int | float):
        return "-"
    return f"{value:.1f} ms" if value < 1000 else f"{value / 1000:.1f} s"


def _plain(value: Any) -> str:
    return "-" if value is None else str(value)


def _cost(value: Any) -> str:
    """Latency times what is in flight; only its proportions matter."""
    if not isinstance(value, int | float):
        return "-"
    return f"{value * 1000:.1f}" if value < 0.1 else f"{value * 1000:.0f}"
