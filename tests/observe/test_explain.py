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
    assert re.search(
        r"retry +sent again after \d+ ms, because: no connection; the budget held \d+\.\d retries$", text, re.MULTILINE
    )
    assert re.search(r"balance  #2  picked 127\.0\.0\.1:810\d: no other was left to compare it with$", text, re.MULTILINE)
    assert re.search(r"=> 200 after \d+\.\d ms, 2 attempts$", text)
    assert re.search(r"^  127\.0\.0\.1:810\d +5\.0 s .* out: its breaker is open$", text, re.MULTILINE)
    assert re.search(r"^  health      1 of 2 healthy", text, re.MULTILINE)


def test_status_that_is_retried_is_named(engine: core.Engine) -> None:
    """The reason is the status and not the word; the last one says why it was the last."""
    text = story(engine, [(core.OUTCOME_RESPONSE, 503), (core.OUTCOME_RESPONSE, 503)])
    assert "because: status 503" in text
    assert re.search("not sent again, because: no retry left; the budget held \\d+\\.\\d retries", text)
    assert re.search(r"=> 503 after \d+\.\d ms, 2 attempts$", text)


def test_status_that_is_not_retried_says_that_the_route_does_not(engine: core.Engine) -> None:
    """500 is none of those that are repeated, and "answered" alone would not tell it."""
    assert "not sent again, because: the route does not repeat status 500" in story(engine, [(core.OUTCOME_RESPONSE, 500)])


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
    assert explain(call.record()).endswith("=> refused by the mesh after 0 attempts: the backend has no endpoints")


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


# ---------------------------------------------------------------------- out: balance and admit

TEMPLATE = """\
mesh: shop
secure: {{mode: observe}}
services:
  storefront: {{}}
  orders: {{{orders}}}
guards: {{ledger: {{retry: {{attempts: 1}}, admit: {{breaker: {{failures: 2}}}}}}}}
"""


def made(tmp_path: Path, orders: str, count: int, weights: bool = False) -> core.Engine:
    """An engine whose service `orders` has this section, and so many endpoints."""
    (tmp_path / "mesh.yaml").write_text(TEMPLATE.format(orders=orders))
    engine = core.Engine(1)
    engine.publish(load(tmp_path / "mesh.yaml", service="storefront").client_plan(), 0.0)
    found = [(f"h{n}:80", float(n) if weights else 1.0, "", {}, "") for n in range(1, count + 1)]
    engine.resolve("orders", 1, found, 0.0)
    return engine


def told(engine: core.Engine, attempts: int = 1, **asked: Any) -> str:
    """A call of `orders` whose attempts lose their connection, all but the last."""
    call, now = engine.begin("orders", "GET", "/", asked.pop("headers", []), 100.0, **asked), 100.0
    for n in range(attempts):
        step = call.next(now)
        if step[0] == core.WAIT:
            now += step[1]
            step = call.next(now)
        if n < attempts - 1:
            call.head(step[1], core.OUTCOME_RESET, 0, now)
    return explain(call.record())


@pytest.mark.parametrize(
    ("policy", "means", "why"),
    [
        ("peak_ewma", "of two drawn by chance the one with the lower cost", r"cost \S+ against \S+ of h\d:80"),
        ("least_request", "of two drawn by chance the one with fewer calls in flight", r"0 in flight against [01] of h\d:80"),
        ("round_robin", "each in its turn", "its turn"),
        ("random", "by chance", "by chance"),
        ("ring_hash", "calls with the same key go to the same endpoint", "its key has its home here"),
        ("maglev", "calls with the same key go to the same endpoint", "its key has its home here"),
    ],
)
def test_policy_is_named_with_what_it_means_and_what_it_compared(tmp_path: Path, policy: str, means: str, why: str) -> None:
    """Each policy in its own words: numbers only where numbers decide."""
    keyed = ", hash_on: [{header: x-user}]" if policy in ("ring_hash", "maglev") else ""
    engine = made(tmp_path, f"balance: {{policy: {policy}{keyed}}}", 3)
    busy = engine.begin("orders", "GET", "/", [], 100.0)
    busy.next(100.0)
    text = told(engine, headers=[(b"x-user", b"anna")])
    assert f"  balance     {policy}: {means}" in text
    assert re.search(rf"#1  picked h\d:80: {why}$", text, re.MULTILINE), text
    scores = {"peak_ewma": "cost", "least_request": "load"}
    assert (f" {scores.get(policy)}  health" in text) == (policy in scores), text


def test_load_of_least_request_is_a_number_also_where_it_is_nothing(tmp_path: Path) -> None:
    """The idle one was chosen over the busy one: both loads stand there, and the star is at the idle one."""
    engine = made(tmp_path, "balance: {policy: least_request}", 2)
    busy = engine.begin("orders", "GET", "/", [], 100.0)
    busy.next(100.0)
    rows = dict(re.findall(r"^  ([* ])  h\d:80 .* (\d|-)  healthy$", told(engine), re.MULTILINE))
    assert rows == {"*": "0", " ": "1"}


def test_weights_are_shown_only_where_they_differ(tmp_path: Path) -> None:
    """And then what is compared is in flight for its weight."""
    text = told(made(tmp_path, "balance: {policy: least_request}", 3, weights=True))
    assert re.search(r"endpoint  weight  latency", text)
    assert re.search(r"h2:80 +2 ", text)
    assert re.search(r"0 in flight for its weight against 0 of", text)
    assert "weight  latency" not in told(made(tmp_path, "", 3))


def test_long_list_of_candidates_ends_with_how_many_more_there_are(tmp_path: Path) -> None:
    """Those that were shown and those that were not are all of them."""
    text = told(made(tmp_path, "", 28))
    shown = len(re.findall(r"^ .* h\d+:80 .* healthy$", text, re.MULTILINE))
    assert f"\n  and {28 - shown} more\n" in text
    assert 16 <= shown <= 18
    assert " more\n" not in told(made(tmp_path, "", 3))


def test_call_without_a_key_goes_by_chance_and_says_so(tmp_path: Path) -> None:
    """A service that is balanced by a key, and a call that has none."""
    text = told(made(tmp_path, "balance: {policy: maglev, hash_on: [{header: x-user}]}", 3))
    assert re.search(r"picked h\d:80: by chance, for want of a key$", text, re.MULTILINE)


def test_retry_by_key_goes_to_the_next_in_line(tmp_path: Path) -> None:
    """The home was tried: who comes next for this key stands in for it."""
    text = told(made(tmp_path, "balance: {policy: ring_hash, hash_on: [{header: x-user}]}", 3), 2, key="anna")
    assert re.search(r"#1  picked h\d:80: its key has its home here$", text, re.MULTILINE)
    assert re.search(
        r"#2  picked h\d:80: it stands in for h\d:80, the home of its key, which was tried already$", text, re.MULTILINE
    )


def test_key_whose_home_is_out_is_told_so(tmp_path: Path) -> None:
    """And who it would have been."""
    engine = made(tmp_path, "balance: {policy: ring_hash, hash_on: [{header: x-user}]}", 3)
    engine.isolate("orders", "h1:80", True, 99.0)
    assert "picked h2:80: it stands in for h1:80, the home of its key, which is out" in told(engine, key="anna")


@pytest.mark.parametrize(
    ("breaker", "why"), [("open", "is out"), ("failing", "is out"), ("closed", "has too much in flight"), ("", "is out")]
)
def test_who_stands_in_for_a_home_names_it_where_the_record_does(breaker: str, why: str) -> None:
    """A record that compares the choice with the home tells who that is, and what is the matter with it."""
    event = {"phase": "balance", "what": "picked by key", "endpoint": "b:1", "detail": {"other": "a:1"}}
    record = {"policy": "maglev", "events": [event], "candidates": [{"endpoint": "a:1", "breaker": breaker}]}
    assert f"picked b:1: it stands in for a:1, the home of its key, which {why}" in explain(record)


def test_session_is_the_reason_where_it_came_back(tmp_path: Path) -> None:
    """The answer sets a session; the call that brings it goes there, and says why."""
    engine = made(tmp_path, "balance: {sticky: {header: x-session}}", 3)
    first = engine.begin("orders", "GET", "/", [], 100.0)
    first.next(100.0)
    name, session = first.session or (b"", b"")
    endpoint = first.record()["events"][-1]["endpoint"]
    assert f"picked {endpoint}: the caller's session belongs here" in told(engine, headers=[(name, session)])


def test_sick_endpoints_are_counted_and_each_says_what_it_has(tmp_path: Path) -> None:
    """A failed check and a person's word are different, and both are out."""
    engine = made(tmp_path, "", 5)
    engine.check("orders", "h1:80", False, 99.0)
    engine.isolate("orders", "h2:80", True, 99.0)
    text = told(engine)
    assert re.search(r"^  health      3 of 5 healthy", text, re.MULTILINE)
    assert re.search(r"h1:80 .*  out: it fails its health check$", text, re.MULTILINE)
    assert re.search(r"h2:80 .*  out: isolated by hand$", text, re.MULTILINE)
    assert "health      " not in told(made(tmp_path, "", 5))


def test_panic_is_told_with_the_choice_and_with_the_health(tmp_path: Path) -> None:
    """So few are well that the sick are used too; the bound stands there if the record has it."""
    engine = made(tmp_path, "", 5)
    for n in range(1, 5):
        engine.check("orders", f"h{n}:80", False, 99.0)
    text = told(engine)
    assert re.search(r"health      1 of 5 healthy(; panic below 50 %)?; so few that all were used \(panic\)$", text, re.MULTILINE)
    assert re.search(r"picked h\d:80: cost .*; so few are healthy that all are used \(panic\)$", text, re.MULTILINE)
    assert "  health      3 of 5 healthy; panic below 50 %\n" in explain({"total": 5, "out": 2, "panic": 0.5})


def test_wait_for_a_permit_is_told_from_its_beginning_to_its_end(tmp_path: Path) -> None:
    """One in flight may be at once; the second waits until the first is gone."""
    engine = made(tmp_path, "admit: {in_flight: 1, pending: 1}", 1)
    first, second = (engine.begin("orders", "GET", "/", [], 100.0) for _ in range(2))
    first.next(100.0)
    assert second.next(100.0)[0] == core.WAIT
    first.abandon(100.020)
    assert second.next(100.020)[0] == core.SEND
    text = explain(second.record())
    assert re.search(r" 0\.0 ms  admit +waits for a permit: as many calls are in flight as may be at once$", text, re.MULTILINE)
    assert re.search(r"20\.0 ms  admit +got a permit after 20 ms$", text, re.MULTILINE)


def test_refusal_after_waiting_for_a_permit_says_that_it_waited(tmp_path: Path) -> None:
    """The deadline came first: the reason stands in the last line."""
    engine = made(tmp_path, "admit: {in_flight: 1, pending: 1}", 1)
    first, second = (engine.begin("orders", "GET", "/", [], 100.0, timeout=1.0) for _ in range(2))
    first.next(100.0)
    with pytest.raises(MeshError):
        second.next(101.5)
    last = "=> refused by the mesh after 0 attempts: the deadline passed while it waited for a permit"
    assert explain(second.record()).endswith(last)


def test_refusal_says_that_all_are_out(tmp_path: Path) -> None:
    """Taken out by hand: not even panic uses them."""
    engine = made(tmp_path, "", 2)
    for n in (1, 2):
        engine.isolate("orders", f"h{n}:80", True, 99.0)
    call = engine.begin("orders", "GET", "/", [], 100.0)
    with pytest.raises(MeshError):
        call.next(100.0)
    text = explain(call.record())
    assert "no attempt was possible: all 2 endpoints are taken out" in text
    assert text.endswith("=> refused by the mesh after 0 attempts: all 2 endpoints are taken out")


def guarded(engine: core.Engine, statuses: list[int], **more: str) -> str:
    """A call of the guard `ledger`, whose function ends so."""
    call, token, _ = engine.guard("guard:ledger", 100.0, None, True)
    now = 100.0
    for n, status in enumerate(statuses):
        if n:
            step = call.next(now)
            if step[0] == core.WAIT:
                now += step[1]
                step = call.next(now)
            token = step[1]
        now += 0.01
        call.head(token, core.OUTCOME_RESPONSE, status, now, -1.0, True)
    return explain({**call.record(), "method": "CALL", "path": "book", **more})


def test_guard_is_told_as_a_function_and_not_as_a_service(tmp_path: Path) -> None:
    """It is called, raises and returns; there are no endpoints, no policy, and no statuses."""
    text = guarded(made(tmp_path, "", 1), [503, 200])
    assert text.startswith("call of book\n  guard       ledger\n  circuit     closed\n")
    assert re.search(r"#1  raised an exception\n.*called again after \d+ ms, because: it failed; the budget held", text)
    assert re.search(r"#2  returned$", text, re.MULTILINE)
    assert re.search(r"=> returned after \d+\.\d ms, 2 calls$", text)
    for word in ("candidates", "balance  peak", "endpoint", "503", "attempt"):
        assert word not in text


def test_guard_whose_circuit_opened_tells_so(tmp_path: Path) -> None:
    """Two failures are as many as this one takes."""
    text = guarded(made(tmp_path, "", 1), [503, 503])
    assert "  circuit     open\n" in text
    assert "the circuit opens: it has failed too often" in text
    assert text.endswith("=> failed after 2 calls")


@pytest.mark.parametrize(
    ("word", "what"),
    [
        ("value", "the value that its fallback names"),
        ("last_good", "the last good answer"),
        ("callable", "what its fallback made of the error"),
        ("", ""),
    ],
)
def test_fallback_is_told_after_the_failure_that_it_hides(tmp_path: Path, word: str, what: str) -> None:
    """The last line has both: what failed, and what the caller got."""
    text = guarded(made(tmp_path, "", 1), [503, 503], fallback=word)
    assert text.endswith("=> failed after 2 calls" + (f"; {what} stood in" if what else ""))


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
DETAIL = st.dictionaries(st.sampled_from(["cost", "other", "other_cost", "status", "why", "seconds", "budget", "new"]), JSON)
POLICIES = st.sampled_from(["peak_ewma", "least_request", "round_robin", "random", "ring_hash", "maglev", "new", ""])
PICKS = ["picked", "probe", "picked by key", "picked by session", "picked in zone, in panic", "picked again, for want of another"]
EVENT = st.fixed_dictionaries(
    {},
    optional={
        "at": st.floats(0, 1e6),
        "phase": st.sampled_from(["route", "balance", "admit", "send", "retry", "new", ""]),
        "what": st.sampled_from(
            ["matched", *PICKS, "ejected", "got a permit", "response", "refused", "again", "delivered", "hedged", "new"]
        ),
        "endpoint": st.text(max_size=8),
        "detail": DETAIL,
    },
)


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "service": st.text(max_size=8) | st.just("guard:ledger"),
            "policy": POLICIES,
            "total": JSON,
            "out": JSON | st.integers(),
            "panic": JSON,
            "fallback": JSON,
            "deadline": JSON,
            "idempotent": st.booleans(),
            "events": st.lists(EVENT, max_size=6),
            "candidates": st.lists(
                st.fixed_dictionaries(
                    {},
                    optional={"endpoint": st.text(max_size=8)}
                    | dict.fromkeys(("score", "ewma_ms", "in_flight", "weight", "breaker", "zone"), JSON),
                ),
                max_size=4,
            ),
        },
    )
)
def test_record_of_any_shape_is_told(record: dict[str, Any]) -> None:
    """Missing and unknown parts, odd values: a story always comes out, and its last line is the end."""
    assert explain(record).splitlines()[-1].startswith("=> ")
