"""The story of a call is told in words that a person can follow, from the record of the real engines."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshlib._native import core
from meshlib.config import load
from meshlib.discover import Directory
from meshlib.errors import MeshError
from meshlib.keeper import Keeper
from meshlib.observe.explain import explain

MESH = """\
mesh: shop
secure: {mode: observe}
services:
  storefront: {}
  orders: {discover: {static: ["127.0.0.1:8101", "127.0.0.1:8102"]}}
  nowhere: {}
"""


@pytest.fixture
def engine(tmp_path: Path) -> core.Engine:
    file = tmp_path / "mesh.yaml"
    file.write_text(MESH)
    config = load(file, service="storefront")
    made = core.Engine(1)
    made.publish(config.client_plan(), 0.0)
    Directory(made, Keeper()).follow(config)
    return made


def story(engine: core.Engine, outcomes: list[tuple[int, int]], method: str = "GET") -> str:
    """What is told of a call whose attempts end so, 10 ms each."""
    call, now = engine.begin("orders", method, "/items/7", [], 100.0), 100.0
    for outcome, status in outcomes:
        step = call.next(now)
        while step[0] == core.WAIT:
            now += step[1]
            step = call.next(now)
        now += 0.01
        if call.head(step[1], outcome, status, now) == core.DELIVER and outcome == core.OUTCOME_RESPONSE:
            call.finish(step[1], outcome, now)
    return explain({**call.record(), "method": method, "path": "/items/7"})


# ---------------------------------------------------------------------- out


def test_ordinary_call_is_told_in_three_steps(engine: core.Engine) -> None:
    """Asked, picked with the comparison that decided it, answered."""
    text = story(engine, [(core.OUTCOME_RESPONSE, 200)])
    assert text.startswith("GET /items/7 to orders\n")
    assert re.search(
        r"^   0\.0 ms  balance  #1  picked 127\.0\.0\.1:810\d: cost 30\.0 against 30\.0 of 127\.0\.0\.1:810\d$",
        text,
        re.MULTILINE,
    )
    assert re.search(r"^  10\.0 ms  send     #1  127\.0\.0\.1:810\d answered 200$", text, re.MULTILINE)
    assert text.endswith("=> 200 after 10.0 ms, 1 attempt")


def test_retried_call_tells_why_and_for_how_long_it_waited(engine: core.Engine) -> None:
    """The refused connection, the endpoint taken out, the wait, the other endpoint."""
    text = story(engine, [(core.OUTCOME_REFUSED, 0), (core.OUTCOME_RESPONSE, 200)])
    assert "the endpoint is taken out: its breaker opened" in text
    assert "no connection (refused, unreachable or too slow to connect)" in text
    assert re.search(r"retry +sent again after \d+ ms, because: no connection$", text, re.MULTILINE)
    assert re.search(r"balance  #2  picked 127\.0\.0\.1:810\d: no other was left to compare it with$", text, re.MULTILINE)
    assert re.search(r"=> 200 after \d+\.\d ms, 2 attempts$", text)
    assert re.search(r"^  127\.0\.0\.1:810\d +5\.0 s .* open$", text, re.MULTILINE)


def test_status_that_is_retried_is_named(engine: core.Engine) -> None:
    """The reason is the status and not the word; the last one says why it was the last."""
    text = story(engine, [(core.OUTCOME_RESPONSE, 503), (core.OUTCOME_RESPONSE, 503)])
    assert "because: status 503" in text
    assert "not sent again, because: no retry left" in text
    assert re.search(r"=> 503 after \d+\.\d ms, 2 attempts$", text)


def test_call_that_is_not_safe_tells_why_it_was_not_repeated(engine: core.Engine) -> None:
    """A POST whose connection broke."""
    text = story(engine, [(core.OUTCOME_RESET, 0)], "POST")
    assert "no, so it is sent again only if nothing of it arrived" in text
    assert "not sent again, because: not idempotent, and it may have been processed" in text
    assert text.endswith("=> failed after 1 attempt: the connection was lost while the answer was awaited")


def test_refused_call_tells_that_nothing_was_sent(engine: core.Engine) -> None:
    """A service without endpoints."""
    call = engine.begin("nowhere", "GET", "/", [], 100.0)
    with pytest.raises(MeshError):
        call.next(100.0)
    assert explain(call.record()).endswith("=> refused by the mesh after 0 attempts")


def hedged(engine: core.Engine, first: tuple[int, int] | None, second: tuple[int, int] | None) -> str:
    """The story of a call that is hedged after 12 ms; what came of each attempt, 20 ms after the call began, in this order."""
    call = engine.begin("orders", "GET", "/", [], 100.0, None, None, True, 0, None, 0, 0.012)
    tokens = [call.next(100.0)[1]]
    assert call.hedge(100.012) == 0.0
    tokens.append(call.next(100.012)[1])
    for token, end in zip(tokens, (first, second), strict=True):
        if end is not None and call.head(token, *end, 100.020) == core.DELIVER and end[0] == core.OUTCOME_RESPONSE:
            call.finish(token, core.OUTCOME_RESPONSE, 100.020)
    return explain(call.record())


OK, BROKEN = (core.OUTCOME_RESPONSE, 200), (core.OUTCOME_RESET, 0)


@pytest.mark.parametrize(
    ("first", "second", "end"),
    [
        (None, OK, "=> 200 after 20.0 ms, 2 attempts; hedged after 12 ms to HEDGE, which won"),
        (OK, None, "=> 200 after 20.0 ms, 2 attempts; hedged after 12 ms to HEDGE, which was not needed"),
        (BROKEN, OK, "=> 200 after 20.0 ms, 2 attempts; hedged after 12 ms to HEDGE, which won"),
        (BROKEN, BROKEN, "=> failed after 2 attempts; hedged after 12 ms to HEDGE, which did not help: the connection was lost"),
        (None, None, "=> not answered yet"),
    ],
)
def test_hedged_call_tells_when_where_and_what_came_of_it(
    engine: core.Engine, first: tuple[int, int] | None, second: tuple[int, int] | None, end: str
) -> None:
    """The last line has it all; above it, each end stands with the number of its attempt."""
    text = hedged(engine, first, second)
    slow, quick = re.findall(r"#\d  picked (127\.0\.0\.1:\d+)", text)
    assert f"retry        {slow} has not answered after 12 ms: another is asked as well" in text
    last = text.splitlines()[-1]
    assert last.startswith(end.replace("HEDGE", quick)), last
    for number, endpoint, outcome in ((1, slow, first), (2, quick, second)):
        if outcome is not None:
            assert re.search(rf"send +#{number}  {endpoint}", text), text
    assert (f"{slow} is given up" in text) == (first is None and second is not None)
    assert ("not sent again yet: another attempt is under way" in text) == (first == BROKEN)


def test_call_that_was_not_hedged_tells_why(engine: core.Engine) -> None:
    """The reason in words; what was sent is told as ever."""
    call = engine.begin("orders", "POST", "/", [], 100.0, hedge=0.01)
    assert call.hedge(100.0) is None
    assert "not hedged, because: not idempotent, and both may be processed" in explain(call.record())


def test_zone_stands_with_the_choice_and_with_the_candidates(engine: core.Engine) -> None:
    """And a choice outside of it says so."""
    found: list[tuple[str, float, str, dict[str, str], str]] = [
        (f"127.0.0.1:810{n}", 1.0, zone, {}, "") for n, zone in ((1, "a"), (2, "b"), (3, "b"))
    ]
    engine.resolve("orders", 10**9, found, 100.0)
    call = engine.begin("orders", "GET", "/", [], 100.0, zone="a")
    call.head(call.next(100.0)[1], core.OUTCOME_RESET, 0, 100.0)
    call.next(101.0)
    text = explain(call.record())
    assert "picked 127.0.0.1:8101 in zone a: no other was left to compare it with" in text
    assert re.search(r"picked 127\.0\.0\.1:810[23] outside the zone: cost", text)
    assert re.search(r"endpoint +zone +latency", text)
    assert re.search(r"127\.0\.0\.1:8101  a ", text)


def test_abandoned_call_is_told_as_such(engine: core.Engine) -> None:
    """The caller gave up before an answer came."""
    call = engine.begin("orders", "GET", "/", [], 100.0)
    call.next(100.0)
    call.abandon(100.5)
    assert explain(call.record()).endswith("=> failed after 1 attempt: the caller gave up")


def test_lower_cost_is_marked(engine: core.Engine) -> None:
    """A star stands at the better of two candidates, and at none of equals."""
    record = {"candidates": [{"endpoint": "a:1", "score": 0.5}, {"endpoint": "b:1", "score": 0.1}]}
    assert [line for line in explain(record).splitlines() if "*" in line] == ["  *  b:1             -          -   100  -"]
    assert "*" not in story(engine, [(core.OUTCOME_RESPONSE, 200)])


def test_columns_are_aligned(engine: core.Engine) -> None:
    """Under each other stands what belongs together, and no line ends with blanks."""
    lines = story(engine, [(core.OUTCOME_REFUSED, 0), (core.OUTCOME_RESPONSE, 200)]).splitlines()
    steps = [found for line in lines if (found := re.match(r" +\d+\.\d ms  (route|balance|admit|send|retry)\b", line))]
    assert len(steps) == 7
    assert len({step.start(1) for step in steps}) == 1
    assert [line for line in lines if line != line.rstrip()] == []


# ---------------------------------------------------------------------- in


def inbound(tmp_path: Path, mode: str, rules: str, peer: str | None) -> str:
    file = tmp_path / "mesh.yaml"
    file.write_text(f"mesh: shop\nsecure: {{mode: {mode}, identity: {{folder: .}}}}\nservices:\n  orders: {{secure: {rules}}}\n")
    gate = core.Gate()
    gate.publish(load(file, service="orders").server_plan(), 0.0)
    return explain(gate.begin("GET", b"/items/7", [(b"host", b"orders")], peer, peer is not None, 1.0, 3.5).record())


SHOP = "spiffe://shop.internal/ns/default/sa/shop"


def test_refusal_names_what_refused_and_what_would_allow(tmp_path: Path) -> None:
    """The caller as proved, the status, and the rule that comes nearest."""
    text = inbound(tmp_path, "enforce", '{allow: [{name: others, from: ["spiffe://shop.internal/x"]}]}', SHOP)
    assert text.startswith("GET /items/7 into orders\n")
    assert f"  caller      {SHOP}, over mutual TLS\n" in text
    assert "=> refused with 403 (secure.denied)\n" in text
    assert text.endswith("nearest rule: 'others'")


def test_admission_names_the_rule(tmp_path: Path) -> None:
    """Which rule let it in, and how much time there was."""
    text = inbound(tmp_path, "enforce", '{allow: [{name: all, from: ["*"]}]}', SHOP)
    assert text.endswith("=> let in by the rule 'all'")
    assert "  deadline    2.5 s were left\n" in text


def test_mode_that_only_observes_tells_what_enforce_would_do(tmp_path: Path) -> None:
    """Let in, and it would be refused."""
    text = inbound(tmp_path, "permissive", "{}", None)
    assert "nobody that we know, over plain text" in text
    assert "=> let in\n" in text
    assert text.endswith("mode enforce would refuse it: no rule allows it")


# ---------------------------------------------------------------------- robust


def test_empty_record_is_told_too() -> None:
    """Nothing is known: nothing is invented."""
    assert explain({}) == "a call\n\n=> nothing was sent"
    assert explain({"verdict": ""}) == "a call\n  caller      nobody that we know, over plain text\n\n=> let in"


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=8), lambda inner: st.lists(inner, max_size=3), max_leaves=4
)
DETAIL = st.dictionaries(st.sampled_from(["cost", "other", "other_cost", "status", "why", "seconds", "new"]), JSON)
EVENT = st.fixed_dictionaries(
    {},
    optional={
        "at": st.floats(0, 1e6),
        "phase": st.sampled_from(["route", "balance", "admit", "send", "retry", "new", ""]),
        "what": st.sampled_from(["matched", "picked", "probe", "ejected", "response", "refused", "again", "delivered", "new"]),
        "endpoint": st.text(max_size=8),
        "detail": DETAIL,
    },
)


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "service": st.text(max_size=8),
            "deadline": JSON,
            "idempotent": st.booleans(),
            "events": st.lists(EVENT, max_size=6),
            "candidates": st.lists(
                st.fixed_dictionaries(
                    {}, optional={"endpoint": st.text(max_size=8), "score": JSON, "ewma_ms": JSON, "in_flight": JSON}
                ),
                max_size=4,
            ),
        },
    )
)
def test_record_of_any_shape_is_told(record: dict[str, Any]) -> None:
    """Missing and unknown parts, odd values: a story always comes out, and its last line is the end."""
    assert explain(record).splitlines()[-1].startswith("=> ")
