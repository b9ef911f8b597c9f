"""Does the gate let in what the policy allows, and nothing else, and does it say why?

Every refusal and every mode through the seam that the servers use. The clock is an argument, so nothing here waits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from meshlib._native import core
from meshlib.errors import ConfigError
from tests.support import server_plan, server_rule

TRUST = "spiffe://shop.internal/ns/default/sa/"
SHOP = TRUST + "storefront"
BROWSER = TRUST + "browser"
NOW = 1000.0
HOST = [(b"host", b"orders")]


Clause = Sequence[dict[str, str]]


def rule(
    name: str,
    action: str = "allow",
    *,
    callers: Clause = (),
    methods: Sequence[str] = (),
    paths: Clause = (),
    dry_run: bool = False,
) -> dict[str, Any]:
    return server_rule(name, action, callers=callers, methods=methods, paths=paths, dry_run=dry_run)


def exact(value: str) -> dict[str, str]:
    return {"kind": "exact", "value": value}


def prefix(value: str) -> dict[str, str]:
    return {"kind": "prefix", "value": value}


ANYONE = {"kind": "any"}
OPEN = rule("open", callers=[ANYONE])
SHOP_RULE = rule("shop", callers=[exact(SHOP)], methods=["GET", "POST"], paths=[exact("/orders"), prefix("/orders/")])


def plan(*rules: dict[str, Any], mode: str = "enforce", **fields: Any) -> bytes:
    template = {"kind": "template", "value": "/orders/{id}"}
    routes = [
        {"name": "item", "path": template, "on_disconnect": "calls"},
        {"name": "all", "path": prefix("/"), "on_disconnect": "calls"},
    ]
    return server_plan(*rules, **{"mode": mode, "in_flight": 100, "routes": routes, **fields})


def gate(*rules: dict[str, Any], mode: str = "enforce", **fields: Any) -> core.Gate:
    made = core.Gate()
    made.publish(plan(*rules, mode=mode, **fields), NOW)
    return made


def begin(
    at: core.Gate,
    target: str = "/orders/7",
    method: str = "GET",
    *,
    peer: str | None = SHOP,
    headers: list[tuple[bytes, bytes]] = HOST,
    deadline: float | None = None,
) -> core.Entry:
    return at.begin(method, target.encode("latin-1"), headers, peer, peer is not None, NOW, deadline)


def answer(entry: core.Entry) -> tuple[int, str]:
    return entry.status, entry.reason


def test_allowed_call_goes_on_with_its_canonical_path_route_and_rule() -> None:
    """An entry with status 0 carries all that the application and the metrics need."""
    entry = begin(gate(SHOP_RULE), "//x/../orders/%37?q=1")
    assert (
        *answer(entry),
        entry.rule,
        entry.path,
        entry.raw_path,
        entry.route,
        entry.deadline,
    ) == (0, "", "shop", "/orders/7", b"/orders/7", "item", None)
    assert (entry.would_deny, entry.detail) == (False, "")


def test_nothing_is_let_in_before_a_plan_is_published() -> None:
    """No plan is not an empty plan."""
    at = core.Gate()
    assert answer(begin(at)) == (503, "server.not_ready")
    assert answer(at.begin_grpc("/a.B/C", SHOP, True, NOW)) == (503, "server.not_ready")


def test_enforce_denies_what_no_rule_allows() -> None:
    """Without a rule there is no way in, and the detail says how one would be made."""
    entry = begin(gate())
    assert (*answer(entry), entry.rule) == (403, "secure.denied", "")
    assert "allow: [{name: …, from: [" in entry.detail


@pytest.mark.parametrize(
    ("changed", "fault"),
    [
        ({"peer": BROWSER}, f'the caller "{BROWSER}" is not in "from"'),
        ({"method": "PUT"}, 'the method PUT is not in "methods"'),
        ({"method": "HEAD"}, 'the method HEAD is not in "methods"'),
        ({"target": "/admin"}, 'the path "/admin" is not in "paths"'),
        ({"target": "/orders;x"}, 'the path "/orders;x" is not in "paths"'),
    ],
)
def test_refusal_names_the_nearest_rule_and_the_clause_that_failed(changed: dict[str, Any], fault: str) -> None:
    """Each clause can be the one that fails."""
    far = rule("health", callers=[exact(TRUST + "probe")], methods=["OPTIONS"], paths=[exact("/health")])
    entry = begin(gate(far, SHOP_RULE), **changed)
    assert answer(entry) == (403, "secure.denied")
    assert f'The nearest: rule "shop" allows GET, POST on /orders, /orders/* to {SHOP}; {fault}.' in entry.detail
    assert entry.record()["nearest_rule"] == "shop"


def test_caller_without_identity_is_told_to_bring_one() -> None:
    """401 where an identity might help, 403 where a rule denies it to all the world."""
    at = gate(SHOP_RULE, rule("no-admin", "deny", paths=[prefix("/admin")]))
    assert answer(begin(at, peer=None)) == (401, "secure.no_identity")
    assert answer(begin(at, "/admin", peer=None)) == (403, "secure.denied")
    assert answer(begin(at, peer="")) == (401, "secure.no_identity")


def test_identity_counts_only_over_tls() -> None:
    """A name that did not come from the connection is no identity."""
    entry = gate(SHOP_RULE).begin("GET", b"/orders", HOST, SHOP, False, NOW)
    assert (entry.status, entry.record()["peer"]) == (401, "")


def test_denial_wins_and_names_its_rule() -> None:
    """Denials are judged first, in any reading of the path, and GET covers HEAD."""
    at = gate(OPEN, rule("no-admin", "deny", methods=["GET"], paths=[exact("/admin")]))
    for target in ["/admin", "/admin/", "/x/..;/admin", "/%61dmin"]:
        entry = begin(at, target, "GET")
        assert (entry.status, entry.rule) == (403, "no-admin"), target
        assert 'rule "no-admin" denies GET on /admin from anyone' in entry.detail
    assert (begin(at, "/admin", "HEAD").status, begin(at, "/admin", "POST").status) == (403, 0)


@pytest.mark.parametrize("mode", ["observe", "permissive"])
@pytest.mark.parametrize(("peer", "would_deny"), [(SHOP, False), (BROWSER, True), (None, True)])
def test_modes_below_enforce_report_and_do_not_refuse(mode: str, peer: str | None, would_deny: bool) -> None:
    """What would be denied is let in, marked, counted and explained."""
    at = gate(SHOP_RULE, mode=mode)
    entry = begin(at, peer=peer)
    entry.finish(200, NOW)
    assert (0, would_deny, would_deny) == (entry.status, entry.would_deny, "no rule allows it" in entry.detail)
    assert [int(would_deny)] == [row["would_deny"] for row in at.stats()]


def test_permissive_hears_plain_callers_as_nobody() -> None:
    """A rule for anyone is met by a caller without identity; a rule for a service is not."""
    at = gate(rule("browsers", methods=["GET"], callers=[ANYONE]), SHOP_RULE, mode="permissive")
    assert (begin(at, peer=None).would_deny, begin(at, peer=None).rule) == (False, "browsers")
    assert begin(at, peer=None, method="POST").would_deny


@pytest.mark.parametrize("action", ["allow", "deny"])
def test_dry_run_rule_only_reports(action: str) -> None:
    """A dry-run denial lets through and is reported; a dry-run permission lets nobody in."""
    dry = rule("trial", action, dry_run=True, paths=[prefix("/orders/")])
    if action == "deny":
        entry = begin(gate(SHOP_RULE, dry))
        assert (entry.status, entry.would_deny, entry.rule, entry.record()["dry_run_rule"]) == (
            0,
            True,
            "shop",
            "trial",
        )
        assert 'rule "trial" denies' in entry.detail
    else:
        entry = begin(gate(dry))
        assert (entry.status, entry.would_deny, entry.rule, entry.record()["dry_run_rule"]) == (403, False, "", "trial")


@pytest.mark.parametrize("mode", ["observe", "permissive", "enforce"])
@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"target": "/admin%00"}, (400, "secure.path")),
        ({"target": "orders"}, (400, "secure.path")),
        ({"target": "*"}, (400, "secure.path")),
        ({"target": "http://evil/orders"}, (400, "secure.path")),
        ({"target": "/" + "a" * 8192}, (414, "secure.path")),
        ({"method": "get"}, (400, "secure.method")),
        ({"method": "G@T"}, (400, "secure.method")),
        ({"method": ""}, (400, "secure.method")),
        ({"method": "TRACE"}, (405, "secure.method")),
        ({"headers": [*HOST, *HOST]}, (400, "secure.headers")),
        ({"headers": [*HOST, (b"Host", b"orders")]}, (400, "secure.headers")),
        ({"headers": [(b"host", b"a b")]}, (400, "secure.headers")),
        ({"headers": [(b"content-length", b"1"), (b"transfer-encoding", b"chunked")]}, (400, "secure.headers")),
        ({"headers": [(b"content-length", b"1"), (b"Content-Length", b"2")]}, (400, "secure.headers")),
        ({"headers": [(b"x-a\x01", b"")]}, (400, "secure.headers")),
        ({"headers": [(b"x-a", b"b\r\nx-role: admin")]}, (400, "secure.headers")),
        ({"headers": [(b"x-a", b"1")] * 101}, (431, "secure.headers")),
        ({"headers": [(b"x-mesh-deadline-ms", b"0")]}, (504, "deadline.exceeded")),
        ({"deadline": NOW}, (504, "deadline.exceeded")),
        ({"deadline": -1.0}, (504, "deadline.exceeded")),
        ({"deadline": float("nan")}, (504, "deadline.exceeded")),
    ],
)
def test_malformed_or_late_calls_are_refused_in_every_mode(mode: str, changed: dict[str, Any], expected: tuple[int, str]) -> None:
    """A mode is about trust; these are about sense. Each has a status, a stable word and a sentence."""
    entry = begin(gate(OPEN, mode=mode), **changed)
    assert expected == answer(entry)
    assert entry.detail.endswith(".")


def test_options_of_the_whole_server_is_understood() -> None:
    """`OPTIONS *` is the one target without a slash; a rule for every path covers it."""
    assert (begin(gate(OPEN), "*", "OPTIONS").status, begin(gate(OPEN), "*", "OPTIONS").path) == (0, "*")
    assert begin(gate(OPEN, rule("root", "deny", paths=[exact("/")])), "*", "OPTIONS").status == 403


@pytest.mark.parametrize(
    ("fields", "left"),
    [
        ([(b"x-mesh-deadline-ms", b"250")], 0.25),
        ([(b"X-Mesh-Deadline-Ms", b"250"), (b"x-mesh-deadline-ms", b"100")], 0.1),
        ([(b"grpc-timeout", b"3S"), (b"x-envoy-expected-rq-timeout-ms", b"1500")], 1.5),
        ([(b"grpc-timeout", b"99999999999999999H")], 3600.0),
        ([(b"x-mesh-deadline-ms", b"99999999")], 3600.0),
        ([(b"x-mesh-deadline-ms", b"soon")], None),
        ([], None),
    ],
)
def test_deadline_is_read_from_the_wire(fields: list[tuple[bytes, bytes]], left: float | None) -> None:
    """The shortest of the known headers, an hour at most; what can't be read is ignored."""
    entry = begin(gate(OPEN), headers=[*HOST, *fields])
    assert (None if left is None else NOW + left) == entry.deadline
    assert left == entry.record()["left"]


def test_deadline_of_the_driver_wins_and_is_cut_too() -> None:
    """The driver knows better than a header, and nobody gets more than an hour."""
    late = [(b"x-mesh-deadline-ms", b"0")]
    assert begin(gate(OPEN), headers=late, deadline=NOW + 2.5).deadline == NOW + 2.5
    assert begin(gate(OPEN), deadline=float("inf")).deadline == NOW + 3600


def test_limit_counts_what_is_in_flight_and_gets_each_permit_back_once() -> None:
    """Refused calls hold nothing; a finished, twice finished or dropped entry gives back one permit."""
    at = gate(OPEN, in_flight=2)
    first, second = begin(at), begin(at)
    refused = begin(at)
    assert answer(refused) == (503, "admit.limit")
    assert "2 calls are in flight" in refused.detail
    refused.finish(503, NOW)
    first.finish(200, NOW)
    first.finish(200, NOW)
    third = begin(at)
    assert (third.status, begin(at).status) == (0, 503)
    del second, first
    fourth = begin(at)
    assert (fourth.status, begin(at).status) == (0, 503)
    del third, fourth


def test_denied_calls_do_not_reach_the_limit() -> None:
    """Secure comes before admit: who is not allowed can't take the places of those who are."""
    at = gate(SHOP_RULE, in_flight=1)
    strangers = [begin(at, peer=BROWSER) for _ in range(5)]
    assert [entry.status for entry in strangers] == [403] * 5
    assert begin(at).status == 0


def test_stats_count_each_call_once_by_route_method_and_peer() -> None:
    """Refusals have a code and no latency; a dropped entry has code 0."""
    at = gate(SHOP_RULE)
    begin(at).finish(200, NOW + 0.02)
    begin(at).finish(200, NOW + 0.2)
    begin(at, peer=None).finish(401, NOW + 1)
    begin(at, method="get")
    begin(at, "/orders")
    waiting = begin(at)
    rows = {(row["route"], row["method"], row["peer"]): row for row in at.stats()}
    assert {("item", "GET", SHOP), ("item", "GET", ""), ("", "_OTHER", SHOP), ("all", "GET", SHOP)} == set(rows)
    row = rows["item", "GET", SHOP]
    assert tuple(row[key] for key in ("service", "requests", "codes", "refused", "would_deny", "in_flight")) == (
        "orders",
        2,
        {"200": 2},
        0,
        0,
        1,
    )
    assert row["latency_buckets"] == [0, 0, 1, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0]
    assert row["latency_sum"] == pytest.approx(0.22)
    assert tuple(rows["item", "GET", ""][key] for key in ("requests", "refused", "codes", "in_flight")) == (
        1,
        1,
        {"401": 1},
        0,
    )
    assert sum(rows["item", "GET", ""]["latency_buckets"]) == 0
    assert (rows["all", "GET", SHOP]["codes"], sum(rows["all", "GET", SHOP]["latency_buckets"])) == ({"0": 1}, 0)
    waiting.finish(200, NOW)


def test_labels_are_bounded() -> None:
    """A flood of names ends in one series."""
    at = gate(OPEN)
    for number in range(1500):
        at.begin_grpc(f"/flood.S/M{number}", SHOP, True, NOW).finish(12, NOW)
    other = [row for row in at.stats() if row["peer"] == "other"]
    assert (len(at.stats()), [row["requests"] for row in other]) == (1001, [500])


def test_grpc_method_is_exact() -> None:
    """Never normalised; a name that is none is answered as one that does not exist."""
    at = gate(
        rule("svc", paths=[prefix("/app.Svc/")], callers=[exact(SHOP)]),
        rule("no", "deny", paths=[exact("/app.Svc/Delete")]),
    )
    entry = at.begin_grpc("/app.Svc/Get", SHOP, True, NOW, NOW + 1)
    assert (entry.status, entry.path, entry.rule, entry.deadline) == (0, "/app.Svc/Get", "svc", NOW + 1)
    assert ((denied := at.begin_grpc("/app.Svc/Delete", SHOP, True, NOW)).status, denied.rule) == (403, "no")
    assert at.begin_grpc("/grpc.reflection.v1.ServerReflection/ServerReflectionInfo", SHOP, True, NOW).status == 403
    assert at.begin_grpc("/app.Svc/Get", None, False, NOW).status == 401
    assert at.begin_grpc("/app.Svc/Get", SHOP, True, NOW, NOW - 1).status == 504
    for name in ["/%s", "%s/", "%s#x", "/x/..%s", "%s%%00", "%.8s", "%.0s"]:
        assert answer(at.begin_grpc(name % "/app.Svc/Get", SHOP, True, NOW)) == (404, "secure.method"), name


def test_bad_plan_changes_nothing_and_names_every_mistake() -> None:
    """The last good policy stays in force."""
    at = gate(SHOP_RULE)
    callers, paths = [exact("admin"), prefix("spiffe://td")], [exact("//admin"), exact("/a%2fb")]
    bad = rule("bad", "deny", callers=callers, methods=["get"], paths=paths)
    with pytest.raises(ConfigError) as caught:
        at.publish(plan(bad), NOW)
    assert str(caught.value).count('rule "bad"') == 5
    unknown = [plan(SHOP_RULE, mode="open"), plan(SHOP_RULE | {"wen": []}), plan(SHOP_RULE, paths="loose")]
    for wrong in [b"", b"{}", *unknown]:
        with pytest.raises(ConfigError):
            at.publish(wrong, NOW)
    assert (begin(at).rule, begin(at, peer=BROWSER).status) == ("shop", 403)


def test_calls_under_way_keep_their_plan_and_metrics_survive() -> None:
    """Publishing swaps the policy for the next call, and resets nothing."""
    at = gate(OPEN)
    before = begin(at, peer=BROWSER)
    at.publish(plan(SHOP_RULE), NOW)
    assert (before.rule, begin(at, peer=BROWSER).status) == ("open", 403)
    before.finish(204, NOW)
    assert [row["codes"] for row in at.stats()] == [{"204": 1, "403": 1}]


def test_reset_empties_the_hands_of_a_forked_child() -> None:
    """Permits and counts of the parent are the parent's."""
    at = gate(OPEN, in_flight=1)
    inherited = begin(at)
    at.reset()
    own = begin(at)
    inherited.finish(200, NOW)
    assert (own.status, begin(at).status) == (0, 503)
    assert [(row["requests"] - row["refused"], row["in_flight"]) for row in at.stats()] == [(0, 1)]


def test_record_tells_the_whole_decision() -> None:
    """The keys that logs and explain() read."""
    record = begin(gate(SHOP_RULE), peer=BROWSER, method="POST").record()
    assert {key: value for key, value in record.items() if key != "detail"} == {
        "service": "orders",
        "protocol": "http",
        "mode": "enforce",
        "peer": BROWSER,
        "tls": True,
        "method": "POST",
        "path": "/orders/7",
        "route": "item",
        "verdict": "deny",
        "rule": "",
        "nearest_rule": "shop",
        "dry_run_rule": "",
        "principal": "",
        "client": "",
        "authorizer": "",
        "would_deny": False,
        "status": 403,
        "reason": "secure.denied",
        "left": None,
        "waited": 0.0,
        "priority": "critical",
        "listener": "mesh",
    }


def test_text_from_outside_is_made_safe_to_print() -> None:
    """Control characters and endless paths do not reach a log through a refusal."""
    detail = begin(gate(), "/%E2%80%AE" + "x" * 2000).detail
    assert "\u202e" not in detail
    assert len(detail) < 500


def test_headers_may_be_any_pairs_and_must_be_bytes() -> None:
    """ASGI says an iterable of two-item iterables; text is a mistake of the driver."""
    at: Any = gate(OPEN)
    assert at.begin("GET", b"/", ([b"host", b"a"], (b"x", b"y")), SHOP, True, NOW).status == 0
    assert at.begin("GET", b"/", iter([[b"host", b"a"], [b"host", b"b"]]), SHOP, True, NOW).status == 400
    for wrong in [[("host", "a")], [b"host"], [(b"host",)], 7]:
        with pytest.raises(TypeError):
            at.begin("GET", b"/", wrong, SHOP, True, NOW)
