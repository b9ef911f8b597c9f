"""How is the story of one call told to a person?

From the record of its decisions, which the core keeps with each call anyway: what was asked, who could have answered,
and then step by step what was decided, with the reason that decided it. The reader wants to know why; so each line ends
with its because, and numbers are compared with what they were compared with. Missing parts are left out: a record of
another version is still told.

Why an endpoint was chosen is told in `choice.py`. It formats and nothing else. Programs read the record, not this text.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

from . import choice
from .text import Record, facts, seconds, table

WIDTH = 110
GUARD = "guard:"


def explain(record: Record) -> str:
    """The story of a call, outbound (`Call.record()`) or inbound (`Entry.record()`), in aligned lines without a
    trailing newline.
    """
    return "\n".join(_inbound(record) if "verdict" in record else _outbound(record))


# ---------------------------------------------------------------------- out


def _outbound(record: Record) -> list[str]:
    guard = _guard(record)
    events: Sequence[Record] = record.get("events") or []
    lines = [_title(record)]
    lines += facts(
        ("guard", guard),
        ("route", "" if guard else _route(record)),
        ("balance", "" if guard else choice.policy(record)),
        ("health", "" if guard else choice.health(record)),
        ("circuit", _circuit(record) if guard else ""),
        ("deadline", seconds(record.get("deadline"))),
        ("idempotent", _idempotent(record)),
        ("carried", _carried(record)),
    )
    # A guard has its function and no other: nothing was chosen.
    if record.get("candidates") and not guard:
        lines += ["", *choice.candidates(record)]
    if events:
        lines += ["", "what happened", *_events(record, events)]
    return [*lines, "", _outcome(record, events) + _fallback(record)]


def _guard(record: Record) -> str:
    """The name of the guard that this is a call of; "" for a call of a service."""
    service = str(record.get("service") or "")
    return service.removeprefix(GUARD) if service.startswith(GUARD) else ""


def _title(record: Record) -> str:
    method, path, service = (str(record.get(key) or "") for key in ("method", "path", "service"))
    if guard := _guard(record):
        return f"call of {path or guard}"
    what = " ".join(part for part in (method, path) if part)
    return f"{what or 'a call'} to {service}" if service else what or "a call"


def _route(record: Record) -> str:
    route, backend = str(record.get("route") or ""), str(record.get("backend") or "")
    rule = str(record.get("rule") or "")
    return route + (f", backend {backend}" if backend else "") + (f" ({rule})" if rule else "")


def _circuit(record: Record) -> str:
    """A guard's breaker is that of its one endpoint."""
    words = [str(candidate.get("breaker") or "").replace("_", " ") for candidate in record.get("candidates") or ()]
    return words[0] if words else ""


def _idempotent(record: Record) -> str:
    if "idempotent" not in record:
        return ""
    if record["idempotent"]:
        return "yes, so it may be sent twice" if not _guard(record) else "yes, so it may be called twice"
    return "no, so it is sent again only if nothing of it arrived" if not _guard(record) else "no, so it is called once"


# Who sent a delegated attempt: the agent, or this process, and why.
_CARRIERS = {
    "agent": "by the node agent",
    "away": "by this process (the node agent is away)",
    "gone": "by this process (the node agent could not be reached)",
    "full": "by this process (the node agent was slow to accept)",
    "silent": "by this process (the node agent fell silent)",
    "closed": "by this process (the node agent broke off)",
    "unable": "by this process (the node agent could not)",
}


def _carried(record: Record) -> str:
    """Who moved the bytes of each attempt, where the service is delegated."""
    words = [_CARRIERS.get(str(word), str(word)) for word in record.get("carried") or ()]
    return words[0] if len(set(words)) == 1 else "; ".join(f"{n}: {word}" for n, word in enumerate(words, 1))


def _events(record: Record, events: Sequence[Record]) -> list[str]:
    rows = []
    attempt, status = 0, 0
    # Attempts may overlap, so that an answer is not always the last one's.
    latest: dict[Any, int] = {}
    for place, event in enumerate(events):
        status = (event.get("detail") or {}).get("status", status)
        if event.get("phase") == "balance":
            attempt += 1
            latest[event.get("endpoint")] = attempt
        own = latest.get(event.get("endpoint"), attempt)
        number = f"#{own}" if attempt and event.get("phase") in ("balance", "admit", "send") else ""
        at = event.get("at")
        time = f"{at:.1f} ms" if isinstance(at, int | float) else ""
        rows.append((time, str(event.get("phase") or ""), number, _event(record, event, place, status)))
    return table(rows, right={0})


def _event(record: Record, event: Record, place: int, status: int) -> str:
    """What was decided, and because of what. `place` is its number; `status` is the last one that came."""
    what = str(event.get("what") or "")
    endpoint = str(event.get("endpoint") or "")
    detail: Record = event.get("detail") or {}
    why = str(detail.get("why") or "")
    phase = event.get("phase")
    guard = _guard(record)
    if phase == "route" and what == "matched":
        left = detail.get("seconds")
        return ("begun" if guard else "matched") + (f"; {seconds(left)} are left for the call" if left is not None else "")
    if phase == "balance" and guard:
        return "called, to find out whether it works again" if what == "probe" else "called"
    if phase == "balance":
        return choice.pick(record, event, place)
    if phase == "admit":
        return _admitted(what, detail, guard)
    if phase == "send" and guard:
        return _returned(what, detail)
    if phase == "send":
        if what == "response":
            return f"{endpoint} answered {detail.get('status', '')}".strip()
        text = _FAILURES.get(what, what) + (f" ({why})" if why else "")
        return f"{endpoint}: {text}" if endpoint else text
    if phase == "retry" and what in ("hedged", "given up"):
        after = f" after {seconds(detail.get('seconds'))}"
        return f"{endpoint} has not answered{after}: another is asked as well" if what == "hedged" else f"{endpoint} is given up"
    if phase == "retry" and what == "refused":
        return f"no attempt was possible: {_refusal(record, event, place)}"
    if phase == "retry":
        if why == "status":
            why = "it failed" if guard else f"status {status}"
        elif why == "answered" and status:
            why = "not a kind of failure that is repeated" if guard else f"the route does not repeat status {status}"
        return _judged(what, why, detail, "called" if guard else "sent")
    known = {"why", "seconds", "status", "cost", "other", "other_cost", "zone", "budget"}
    extra = ", ".join(f"{key} {value}" for key, value in detail.items() if key not in known)
    return " ".join(part for part in (what, endpoint, f"({why})" if why else "", extra) if part)


def _admitted(what: str, detail: Record, guard: str) -> str:
    """Permits, and what an attempt did to the breaker."""
    if what == "waiting for a permit":
        return "waits for a permit: as many calls are in flight as may be at once"
    if what == "got a permit":
        return "got a permit" + (f" after {seconds(detail['seconds'])}" if detail.get("seconds") is not None else "")
    if what == "ejected":
        return "the circuit opens: it has failed too often" if guard else "the endpoint is taken out: its breaker opened"
    return what.replace("_", " ")


def _returned(what: str, detail: Record) -> str:
    """How a function ended; the engine is told of it in statuses."""
    if what != "response":
        return _FAILURES.get(what, what)
    status = detail.get("status")
    return "raised an exception" if isinstance(status, int) and status >= 500 else "returned"


def _judged(what: str, why: str, detail: Record, done: str) -> str:
    wait, left = detail.get("seconds"), detail.get("budget")
    because = f", because: {why}" if why else ""
    budget = f"; the budget held {left:.1f} retries" if isinstance(left, int | float) else ""
    if what == "again":
        pause = f" after {seconds(wait)}" if isinstance(wait, int | float) and wait > 0 else ""
        return f"{done} again{pause}{because}{budget}"
    if what == "awaited":
        return f"not {done} again yet: {why}"
    if what == "not hedged":
        return f"not hedged{because}"
    if what == "delivered":
        return f"not {done} again{because}{budget}"
    return what + (f" ({why})" if why else "")


def _refusal(record: Record, event: Record, place: int) -> str:
    """Why no attempt went out. The record has the facts and no word for it."""
    at, deadline, total, out = event.get("at"), record.get("deadline"), record.get("total"), record.get("out")
    before: Sequence[Record] = (record.get("events") or ())[:place]
    if isinstance(at, int | float) and isinstance(deadline, int | float) and at / 1000 > deadline - 1e-6:
        is_waiting = bool(before) and before[-1].get("what") == "waiting for a permit"
        return "the deadline passed" + (" while it waited for a permit" if is_waiting else "")
    if isinstance(total, int) and isinstance(out, int):
        if total and out >= total:
            return "the circuit is open" if _guard(record) else f"all {total} endpoints are taken out"
        if not total:
            return "the backend has no endpoints"
    return "the mesh says no"


def _outcome(record: Record, events: Sequence[Record]) -> str:
    guard = _guard(record)
    attempts = sum(1 for event in events if event.get("phase") == "balance")
    last = next((n for n in reversed(range(len(events))) if events[n].get("phase") in ("send", "retry")), None)
    sent = next((event for event in reversed(events) if event.get("phase") == "send"), None)
    count = f"{attempts} {'call' if guard else 'attempt'}{'s' if attempts != 1 else ''}{_hedge(events)}"
    if last is not None and (events[last].get("phase"), events[last].get("what")) == ("retry", "refused"):
        return f"=> refused by the mesh after {count}: {_refusal(record, events[last], last)}"
    if sent is None:
        return "=> not answered yet" if attempts else "=> nothing was sent"
    status = (sent.get("detail") or {}).get("status")
    if guard and sent.get("what") == "response" and isinstance(status, int) and status >= 500:
        return f"=> failed after {count}"
    if sent.get("what") == "response":
        at = sent.get("at")
        took = f" after {at:.1f} ms" if isinstance(at, int | float) else ""
        return f"=> {'returned' if guard else status or 'answered'}{took}, {count}"
    return f"=> failed after {count}: {_FAILURES.get(str(sent.get('what')), str(sent.get('what')))}"


def _fallback(record: Record) -> str:
    """What the caller got in place of an answer."""
    word = str(record.get("fallback") or "")
    return f"; {_FALLBACKS.get(word, 'a fallback')} stood in" if word else ""


def _hedge(events: Sequence[Record]) -> str:
    """When a second attempt went out beside the first, where, and what came of it; "" if none did."""
    place = next((n for n, event in enumerate(events) if (event.get("phase"), event.get("what")) == ("retry", "hedged")), None)
    if place is None:
        return ""
    after = [event for event in events[place + 1 :] if event.get("endpoint")]
    where = next((str(event["endpoint"]) for event in after if event.get("phase") == "balance"), "")
    ends = [event for event in after if event.get("endpoint") == where and event.get("phase") != "balance"]
    text = f"; hedged after {seconds((events[place].get('detail') or {}).get('seconds'))} to {where}"
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

# The words of `retry/fallback.py`.
_FALLBACKS = {
    "value": "the value that its fallback names",
    "last_good": "the last good answer",
    "callable": "what its fallback made of the error",
}


# ---------------------------------------------------------------------- in


def _inbound(record: Record) -> list[str]:
    method, path, service = (str(record.get(key) or "") for key in ("method", "path", "service"))
    what = " ".join(part for part in (method, path) if part) or "a call"
    left = record.get("left")
    lines = [f"{what} into {service}" if service else what]
    lines += facts(
        ("caller", _caller(record)),
        ("mode", str(record.get("mode") or "")),
        ("route", str(record.get("route") or "")),
        ("deadline", f"{seconds(left)} were left" if left is not None else ""),
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
