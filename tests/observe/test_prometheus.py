"""The numbers are told in a form that Prometheus and OpenMetrics read, under names that stand in one table."""

from __future__ import annotations

import inspect
import math
import re
import shutil
import subprocess
from typing import Any

import pytest

from meshlib.observe import names
from meshlib.observe.prometheus import Readings, render
from meshlib.secure import alarms

BUCKETS = [1, 2, 0, 0, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 3]


def out(endpoint: str = "", **changes: Any) -> dict[str, Any]:
    """A row as the engine gives it."""
    return {
        "service": "orders",
        "endpoint": endpoint,
        "requests": 10,
        "failures": 3,
        "retries": 2,
        "ejections": 1,
        "in_flight": 4,
        "breaker": "open" if endpoint else "",
        "ewma": 0.25,
        "budget": 98.5,
        "zone": "a" if endpoint else "",
        "weight": 2.0 if endpoint else 0.0,
        "limit": 0 if endpoint else 40,
        "pending": 5,
        "limited": 6,
        "throttled": 7,
        "rate_limited": 8,
        "hedges": 9,
        "panics": 11,
        "slow_after": 0.0 if endpoint else 0.125,
        "latency_buckets": BUCKETS,
        "latency_sum": 47.5,
        "codes": {"0": 1, "200": 7, "503": 2},
    } | changes


def came_in(**changes: Any) -> dict[str, Any]:
    """A row as the gate gives it."""
    return {
        "service": "storefront",
        "route": "/items/{id}",
        "method": "GET",
        "peer": "spiffe://shop.internal/ns/default/sa/orders",
        "requests": 10,
        "refused": 2,
        "would_deny": 1,
        "in_flight": 1,
        "codes": {"200": 8, "403": 2},
        "latency_buckets": BUCKETS,
        "latency_sum": 47.5,
    } | changes


GUARD = out(service="guard:ledger", codes={"0": 1, "200": 6, "500": 2, "503": 1})
RATE = {
    "service": "orders",
    "rate": "tenant",
    "store": "redis",
    "is_away": True,
    "asked": 9,
    "refused": 2,
    "failed": 1,
    "skipped": 3,
}
CHECK = {"service": "orders", "failing": {"127.0.0.1:8102": "503"}, "checks": 50, "failures": 4, "skipped": 1}

TOLD = {"is_ready": True, "changes": 5, "kept": 1, "cache_failures": 2}

FULL = Readings(
    house={"limit": 1024, "waiting": 3},
    engine=[out(), out("127.0.0.1:8101"), out("127.0.0.1:8102", breaker="half_open"), out(service="stock"), GUARD],
    gate=[came_in(), came_in(peer="", method="FROB")],
    discover=[
        {"service": "orders", "source": "dns", "endpoints": 2, "age": 7.5, "failures": 1, "is_held": True, "held": 3, **TOLD},
        {"service": "stock", "source": "file", "endpoints": 0, "age": None, "failures": 9, "is_held": False, "held": 0, **TOLD},
    ],
    registered={"service": "storefront", "registry": "etcd", "is_entered": True, "failures": 6},
    jobs=[("reload", 5, 1), ("rotate", 7, 0), ("reload", 2, 2)],
    identity={"rotations": 2, "failures": 1, "not_after": 1_800_000_000.5, "spent": 0.25},
    tls={
        "client": {
            "full": 3,
            "resumed": 9,
            "failed": 7,
            "failed_identity": 1,
            "failed_refused": 2,
            "failed_lost": 4,
            "tickets_stored": 24,
            "tickets_used": 10,
            "tickets_held": 11,
        },
        "server": {"full": 5, "resumed": 6, "failed": 1, "failed_identity": 1, "failed_lost": 0},
    },
    pools=[
        {"idle": 2, "opened": 8, "reused": 90, "closed": {"idle": 5, "peer": 1}},
        {"idle": 1, "opened": 2, "reused": 10, "closed": {"idle": 1, "peer": 0}},
    ],
    rates=[RATE, RATE | {"rate": "all", "asked": 90}],
    checks=[CHECK],
    fallbacks={("orders", "last_good"): 3, ("guard:ledger", "value"): 8},
    egress={"api.example.com": 4},
    messages={("client", "inventory", "/shop.Inventory/Count"): (1, 20), ("server", "", "/shop.Inventory/Count"): (30, 2)},
    plain=[{"client": f"10.0.0.{number}", "requests": 1} for number in range(101)],
    authorizers=[{"name": "opa", "outcome": "timeout", "count": 3}],
    keys=[
        {"provider": "people", "source": "url", "keys": 2, "age": 40.5, "failures": 3},
        {"provider": "late", "source": "url", "keys": 0, "age": -1.0, "failures": 9},
        {"provider": "fixed", "source": "inline", "keys": 1, "age": 86400.0, "failures": 0},
    ],
    bundles=[{"trust_domain": "partner.example", "age": 7.5, "failures": 4}],
    alarms=frozenset({"life", "federation"}),
    alerts={"mtls_lost": 2, "new_peer": 0},
    delegated={"sent": 7, "fallbacks": {"away": 2, "silent": 1}, "state": "up", "changes": {"up": 2, "away": 1}},
    handed={"taken": 5, "wrong": 1},
    reloads=1,
    reload_failures=2,
    mesh="shop",
    service="storefront",
    version="1.2.3",
    protocols={"stock": "grpc"},
    scheme="https",
)


def value(text: str, name: str, **labels: str) -> float:
    """The value of one sample, by an own, simple reading of the text."""
    found = []
    for line in text.splitlines():
        if not line.startswith("#") and re.split(r"[{ ]", line, maxsplit=1)[0] == name:
            pairs = dict(re.findall(r'(\w+)="((?:[^"\\]|\\.)*)"', line))
            if pairs == labels:
                found.append(float(line.rsplit(" ", 1)[1]))
    (only,) = found
    return only


# ---------------------------------------------------------------------- what is told


def test_calls_and_attempts_are_told_apart() -> None:
    """What the application saw has the service only; what the wire saw has the endpoint, too."""
    text = render(FULL)
    assert value(text, "meshlib_route_requests_total", service="orders") == 10
    assert value(text, "meshlib_retry_attempts_total", service="orders") == 2
    assert value(text, "meshlib_retry_budget_remaining", service="orders") == 98.5
    assert value(text, "meshlib_balance_requests_total", service="orders", endpoint="127.0.0.1:8101") == 10
    assert value(text, "meshlib_balance_latency_seconds", service="orders", endpoint="127.0.0.1:8101") == 0.25
    assert value(text, "meshlib_route_responses_total", service="orders", code="503") == 2
    assert value(text, "meshlib_route_responses_total", service="orders", code="none") == 1


def test_breaker_is_a_number_for_each_state() -> None:
    """0 closed, 1 half open, 2 open, 3 isolated, 4 failing its checks."""
    text = render(Readings(engine=[out(f"h:{n}", breaker=word) for n, word in enumerate(names.BREAKER_STATES)]))
    states = [value(text, "meshlib_admit_breaker_state", service="orders", endpoint=f"h:{n}") for n in range(5)]
    expected = {"closed": 0, "half_open": 1, "open": 2, "isolated": 3, "failing": 4}
    assert expected == dict(zip(names.BREAKER_STATES, states, strict=True))


def test_endpoint_that_was_never_used_has_no_series() -> None:
    """50,000 endpoints of which a process uses 50 are 50."""
    idle = {"requests": 0, "failures": 0, "in_flight": 0, "ejections": 0, "breaker": "closed", "codes": {}}
    text = render(
        Readings(engine=[out(), out("used:1"), out("unused:1", **idle), out("isolated:1", **idle | {"breaker": "isolated"})])
    )
    assert "unused:1" not in text
    assert "used:1" in text
    assert "isolated:1" in text


def test_calls_that_were_refused_first_are_told_by_reason() -> None:
    """Too many under way, too many for a service that refuses them, too many in a time: different things to do."""
    text = render(FULL)
    told = {
        reason: value(text, "meshlib_admit_refused_total", service="orders", reason=reason)
        for reason in ("limit", "throttle", "rate")
    }
    assert told == {"limit": 6, "throttle": 7, "rate": 8}
    assert value(text, "meshlib_admit_limit", service="orders") == 40
    assert value(text, "meshlib_admit_pending", service="orders") == 5


def test_hedges_tell_how_many_and_after_how_long() -> None:
    """The delay is there once it is known, and no sooner."""
    text = render(FULL)
    assert value(text, "meshlib_retry_hedges_total", service="orders") == 9
    assert value(text, "meshlib_retry_hedge_delay_seconds", service="orders") == 0.125
    assert "hedge_delay" not in render(Readings(engine=[out(slow_after=0.0)]))


def test_choices_in_panic_are_counted() -> None:
    """By service: health was ignored there."""
    assert value(render(FULL), "meshlib_balance_panics_total", service="orders") == 11


def test_service_that_was_never_called_has_no_series_of_limits() -> None:
    """A mesh of 5,000 services of which a process calls five; a call that was refused first is a call, too."""
    idle = {"requests": 0, "in_flight": 0, "pending": 0, "limited": 0, "throttled": 0, "rate_limited": 0}
    text = render(Readings(engine=[out(service="unused", **idle), out(service="refused", **idle | {"throttled": 1})]))
    for name in ("meshlib_admit_limit", "meshlib_admit_pending", "meshlib_admit_refused_total", "meshlib_retry_hedges_total"):
        assert f'{name}{{service="unused"' not in text
        assert f'{name}{{service="refused"' in text


def test_endpoint_tells_its_weight_and_its_zone() -> None:
    """The zone is a series of its own, to be joined with the others; where it isn't known there is none."""
    text = render(Readings(engine=[out("a:1"), out("b:1", zone="")]))
    assert value(text, "meshlib_balance_weight", service="orders", endpoint="a:1") == 2
    assert value(text, "meshlib_balance_endpoint_info", service="orders", endpoint="a:1", zone="a") == 1
    assert 'meshlib_balance_endpoint_info{service="orders",endpoint="b:1"' not in text


def test_guard_has_the_words_of_functions_and_a_duration_of_its_own() -> None:
    """It is no HTTP: what stands for a status is told as ok, error or none, and two kinds of error are one."""
    text = render(Readings(engine=[GUARD, out("ledger", service="guard:ledger", codes={"200": 6, "500": 2, "503": 1})]))
    at = {"service": "guard:ledger"}
    told = {code: value(text, "meshlib_route_responses_total", **at, code=code) for code in ("ok", "error", "none")}
    assert told == {"ok": 6, "error": 3, "none": 1}
    assert value(text, "meshlib_balance_responses_total", **at, endpoint="ledger", code="error") == 3
    assert value(text, "meshlib_retry_guard_duration_seconds_count", **at) == 10
    assert "http_client" not in text
    assert "meshlib_balance_weight" not in text


def test_rates_that_processes_share_are_told_by_rate_and_their_store_once() -> None:
    """What the store was asked, what it refused, what it didn't answer, and whether it is left alone."""
    text = render(FULL)
    at = {"service": "orders", "rate": "tenant"}
    told = [value(text, f"meshlib_admit_rate_{word}_total", **at) for word in ("asked", "refused", "failed", "skipped")]
    assert told == [9, 2, 1, 3]
    assert value(text, "meshlib_admit_rate_asked_total", service="orders", rate="all") == 90
    assert value(text, "meshlib_admit_store_away", store="redis") == 1


def test_health_checks_tell_how_many_fail_and_not_which() -> None:
    """Which ones is the breaker's state, by endpoint; here it is the size of the trouble."""
    text = render(FULL)
    at = {"service": "orders"}
    counters = [value(text, f"meshlib_admit_{word}_total", **at) for word in ("checks", "check_failures", "checks_skipped")]
    assert counters == [50, 4, 1]
    assert value(text, "meshlib_admit_checks_failing", **at) == 1


def test_fallbacks_are_told_by_what_stood_in() -> None:
    """A failure that callers don't see must be seen here."""
    text = render(FULL)
    assert value(text, "meshlib_retry_fallbacks_total", service="orders", kind="last_good") == 3
    assert value(text, "meshlib_retry_fallbacks_total", service="guard:ledger", kind="value") == 8
    assert "fallbacks" not in render(Readings())


def test_histogram_is_cumulative_and_ends_with_all() -> None:
    """Counts per bucket become counts up to the bucket; +Inf, _count and the sum of the counts agree."""
    text = render(Readings(engine=[out()]))
    at = {"http_request_method": "", "server_address": "orders"}
    name = "http_client_request_duration_seconds"
    read = [value(text, f"{name}_bucket", **at, le=le) for le in ("0.005", "0.01", "0.075", "0.1", "10.0", "+Inf")]
    assert read == [1, 3, 3, 7, 7, 10]
    assert (value(text, f"{name}_count", **at), value(text, f"{name}_sum", **at)) == (10, 47.5)


def test_grpc_services_have_durations_of_rpc() -> None:
    """The conventions know HTTP and RPC apart; the protocol is the configuration's."""
    text = render(FULL)
    assert value(text, "rpc_client_call_duration_seconds_count", rpc_system_name="grpc", server_address="stock") == 10
    assert 'http_client_request_duration_seconds_count{http_request_method="",server_address="stock"}' not in text
    text = render(Readings(gate=[came_in(method="/shop.Inventory/Reserve")]))
    assert (
        value(text, "rpc_server_call_duration_seconds_count", rpc_system_name="grpc", rpc_method="shop.Inventory/Reserve") == 10
    )


def test_calls_in_are_told_by_caller_and_durations_without() -> None:
    """Who called is a label of our counters; OpenTelemetry's histogram has fewer labels, so rows are added up."""
    peer = "spiffe://shop.internal/ns/default/sa/orders"
    text = render(Readings(gate=[came_in(), came_in(peer="")], scheme="https"))
    at = {"service": "storefront", "route": "/items/{id}", "method": "GET", "peer": peer}
    assert value(text, "meshlib_secure_requests_total", **at) == 10
    assert value(text, "meshlib_secure_refused_total", **at) == 2
    assert value(text, "meshlib_secure_would_deny_total", **at) == 1
    assert value(text, "meshlib_secure_responses_total", **at, code="403") == 2
    seen = {"http_request_method": "GET", "http_route": "/items/{id}", "url_scheme": "https"}
    assert value(text, "http_server_request_duration_seconds_count", **seen) == 20


def test_statuses_of_grpc_are_words() -> None:
    """Its 0 is OK, where that of HTTP is no answer; an unknown method of a gRPC service is a gRPC call all the same."""
    codes = {"0": 5, "7": 2, "99": 1}
    text = render(Readings(gate=[came_in(method="/shop.Inventory/Reserve", codes=codes)]))
    assert re.findall(r'meshlib_secure_responses_total.*code="(.*)"} (\d+)', text) == [
        ("OK", "5"),
        ("PERMISSION_DENIED", "2"),
        ("99", "1"),
    ]
    text = render(Readings(gate=[came_in(method="_OTHER", codes={"12": 1})], protocols={"storefront": "grpc"}))
    assert 'code="UNIMPLEMENTED"} 1' in text
    assert 'code="none"} 1' in render(Readings(gate=[came_in(codes={"0": 1})]))


def test_messages_of_grpc_are_told_by_side() -> None:
    """What goes out by the service, what comes in by who called; the method as the conventions write it."""
    text = render(FULL)
    out = {"service": "inventory", "method": "shop.Inventory/Count"}
    assert value(text, "meshlib_route_messages_sent_total", **out) == 1
    assert value(text, "meshlib_route_messages_received_total", **out) == 20
    came = {"service": "storefront", "method": "shop.Inventory/Count", "peer": ""}
    assert value(text, "meshlib_secure_messages_sent_total", **came) == 30
    assert value(text, "meshlib_secure_messages_received_total", **came) == 2


def test_route_of_a_duration_is_its_template() -> None:
    """http.route is what the path matched; our own counters keep the route's name."""
    text = render(Readings(gate=[came_in(route="items")], templates={"items": "/items/{id}"}))
    assert 'http_route="/items/{id}"' in text
    assert 'meshlib_secure_requests_total{service="storefront",route="items"' in text


def test_method_that_nobody_defined_makes_no_series_of_its_own() -> None:
    """Callers choose methods: unknown ones are one."""
    assert 'http_server_request_duration_seconds_count{http_request_method="_OTHER"' in render(FULL)


def test_discovery_tells_age_and_what_is_held_back() -> None:
    """A service that never had an answer has no age."""
    text = render(FULL)
    assert value(text, "meshlib_discover_age_seconds", service="orders", source="dns") == 7.5
    assert 'meshlib_discover_age_seconds{service="stock"' not in text
    assert value(text, "meshlib_discover_held", service="orders", source="dns") == 1
    assert value(text, "meshlib_discover_holds_total", service="orders", source="dns") == 3
    assert value(text, "meshlib_discover_failures_total", service="stock", source="file") == 9
    assert value(text, "meshlib_discover_ready", service="orders", source="dns") == 1
    assert value(text, "meshlib_discover_changes_total", service="orders", source="dns") == 5
    assert value(text, "meshlib_discover_kept", service="orders", source="dns") == 1
    assert value(text, "meshlib_discover_cache_failures_total", service="orders", source="dns") == 2


def test_process_that_serves_tells_whether_it_is_in_its_registry() -> None:
    """One that isn't to be there has no series: a 0 is always a fault."""
    entry = {"service": "storefront", "registry": "etcd"}
    assert value(render(FULL), "meshlib_discover_registered", **entry) == 1
    assert value(render(FULL), "meshlib_discover_registration_failures_total", **entry) == 6
    out = render(Readings(registered={**entry, "is_entered": False, "failures": 1}))
    assert value(out, "meshlib_discover_registered", **entry) == 0
    assert "meshlib_discover_regist" not in render(Readings())


def test_process_tells_identity_jobs_reloads_and_egress() -> None:
    """Jobs of the same name, of several meshes in one process, are added up."""
    text = render(FULL)
    assert value(text, "meshlib_secure_rotations_total") == 2
    assert value(text, "meshlib_secure_expiry_timestamp_seconds") == 1_800_000_000.5
    assert value(text, "meshlib_observe_job_runs_total", job="reload") == 7
    assert value(text, "meshlib_observe_job_failures_total", job="reload") == 3
    assert value(text, "meshlib_observe_reload_failures_total") == 2
    assert value(text, "meshlib_route_egress_total", host="api.example.com") == 4
    assert value(text, "meshlib_observe_info", mesh="shop", service="storefront", version="1.2.3") == 1


def test_process_without_identity_says_nothing_about_it() -> None:
    """Mode observe without certificates: no metric with an invented value."""
    assert "meshlib_secure_expiry" not in render(Readings())
    without = {"rotations": 0, "failures": 3, "not_after": None, "spent": 0.0}
    text = render(Readings(identity=without))
    assert value(text, "meshlib_secure_rotation_failures_total") == 3
    assert "meshlib_secure_expiry" not in text


def test_keys_for_tokens_are_told_by_provider() -> None:
    """Who has none has no age; keys of the configuration have none either, since they grow old by nobody's fault."""
    text = render(FULL)
    assert [value(text, "meshlib_secure_token_keys", provider=name) for name in ("people", "late", "fixed")] == [2, 0, 1]
    assert value(text, "meshlib_secure_token_keys_failures_total", provider="late") == 9
    assert value(text, "meshlib_secure_token_keys_age_seconds", provider="people") == 40.5
    assert text.count("meshlib_secure_token_keys_age_seconds{") == 1
    assert "token_keys" not in render(Readings())


def test_bundles_are_told_by_trust_domain() -> None:
    """How old, and how often there was no newer one; nothing where nobody is federated."""
    text = render(FULL)
    assert value(text, "meshlib_secure_bundle_age_seconds", trust_domain="partner.example") == 7.5
    assert value(text, "meshlib_secure_bundle_failures_total", trust_domain="partner.example") == 4
    assert "bundle" not in render(Readings())


def test_alarm_is_1_while_it_holds_and_0_otherwise() -> None:
    """Every kind that an identity can have is there from the start; without an identity there are none."""
    text = render(FULL)
    told = {kind: value(text, "meshlib_secure_identity_alarms", kind=kind) for kind in names.ALARM_KINDS}
    assert told == dict.fromkeys(names.ALARM_KINDS, 0) | {"life": 1, "federation": 1}
    assert "alarms" not in render(Readings())
    assert set(re.findall(r'\bAlarm\("(\w+)"', inspect.getsource(alarms))) == set(names.ALARM_KINDS)


# ---------------------------------------------------------------------- how it is written


def test_label_values_are_escaped() -> None:
    """Quotes, backslashes and line ends in a value end neither the value nor the line."""
    text = render(Readings(egress={'a"b\\c\nd': 1}))
    assert 'meshlib_route_egress_total{host="a\\"b\\\\c\\nd"} 1\n' in text


@pytest.mark.parametrize(
    ("number", "written"), [(1, "1"), (0.5, "0.5"), (math.inf, "+Inf"), (-math.inf, "-Inf"), (math.nan, "NaN")]
)
def test_numbers_are_written_as_prometheus_reads_them(number: float, written: str) -> None:
    """Whole numbers without a point, infinities and NaN with their words."""
    assert f'meshlib_retry_budget_remaining{{service="orders"}} {written}\n' in render(Readings(engine=[out(budget=number)]))


def test_handshakes_are_told_by_side_and_by_how_they_ended() -> None:
    """Full and resumed ones apart, failures by reason; the sum and the tickets in hand are no counters of their own."""
    text = render(FULL)
    assert value(text, "meshlib_secure_client_handshakes_total", resumed="false") == 3
    assert value(text, "meshlib_secure_client_handshakes_total", resumed="true") == 9
    assert value(text, "meshlib_secure_server_handshakes_total", resumed="true") == 6
    assert value(text, "meshlib_secure_client_handshake_failures_total", reason="lost") == 4
    assert value(text, "meshlib_secure_server_handshake_failures_total", reason="identity") == 1
    assert value(text, "meshlib_secure_tickets_total", event="used") == 10
    assert 'event="held"' not in text
    assert "handshake" not in render(Readings())


def test_connections_of_all_pools_are_added_up() -> None:
    """A process has one pool for each event loop and one for its threads."""
    text = render(FULL)
    assert value(text, "meshlib_admit_connections_idle") == 3
    assert value(text, "meshlib_admit_connections_opened_total") == 10
    assert value(text, "meshlib_admit_connections_reused_total") == 100
    assert value(text, "meshlib_admit_connections_closed_total", reason="idle") == 6


def test_table_of_names_keeps_its_rules() -> None:
    """Ours begin with meshlib_ and a phase; counters end with _total, units stand in the name; each has a help and no
    name twice.
    """
    phases = ("discover", "route", "retry", "balance", "admit", "secure", "observe")
    seen = [metric.name for metric in names.METRICS]
    assert len(set(seen)) == len(seen) > 30
    for metric in names.METRICS:
        assert metric.name.startswith((*(f"meshlib_{phase}_" for phase in phases), "http_", "rpc_"))
        assert metric.name.endswith("_total") == (metric.kind == "counter")
        assert re.fullmatch(r"[a-z][a-z0-9_]*", metric.name)
        assert metric.help.endswith(".")
        assert not metric.unit or metric.name.endswith(f"_{metric.unit}")


def test_every_metric_of_the_table_is_told() -> None:
    """What stands in the table is what is exported: no row without a number, no number without a row."""
    text = render(FULL) + render(Readings(gate=[came_in()], protocols={"storefront": "grpc"}))
    told = set(re.findall(r"^# TYPE (\S+) ", text, re.MULTILINE))
    assert told == {metric.name for metric in names.METRICS}


def samples(families: Any) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    return {(s.name, tuple(sorted(s.labels.items()))): s.value for family in families for s in family.samples}


def test_prometheus_own_parser_reads_all_of_it() -> None:
    """The parser of Prometheus' client: every family with its type, and both formats hold the same samples."""
    parser = pytest.importorskip("prometheus_client.parser", reason="prometheus-client is not installed")
    openmetrics = pytest.importorskip("prometheus_client.openmetrics.parser", reason="prometheus-client is not installed")
    plain = list(parser.text_string_to_metric_families(render(FULL)))
    strict = list(openmetrics.text_string_to_metric_families(render(FULL, is_openmetrics=True)))
    assert {family.type for family in plain} == {"counter", "gauge", "histogram"}
    assert all(family.documentation for family in plain)
    assert samples(plain) == samples(strict)
    lines = [line for line in render(FULL).splitlines() if not line.startswith("#")]
    assert len(samples(plain)) == len(lines)


def test_promtool_has_nothing_to_say() -> None:
    """Prometheus' own check of names, units and help, as far as it is installed."""
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed")
    done = subprocess.run([promtool, "check", "metrics"], input=render(FULL), capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_prometheus_parser_gives_back_what_was_escaped() -> None:
    """Round trip of a value with everything that needs escaping."""
    parser = pytest.importorskip("prometheus_client.parser", reason="prometheus-client is not installed")
    host = 'a"b\\c\nd\\n'
    (family,) = [f for f in parser.text_string_to_metric_families(render(Readings(egress={host: 1}))) if "egress" in f.name]
    assert family.samples[0].labels == {"host": host}
