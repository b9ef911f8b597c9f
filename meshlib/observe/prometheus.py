"""What has this process counted, in a form that Prometheus reads?

The engines count with atomics in Rust, and everything else keeps its own few numbers; they are read here when somebody
asks, and only then. Nothing is registered and nothing is locked. The text is Prometheus' format 0.0.4, or OpenMetrics
1.0 on request. Prometheus' client library is not used: it would keep a second copy of every number, and it has no way
to take over a histogram.

Endpoints that were never used have no series. Inbound series are bounded by the core (1000, then "other"). It stores
and pushes nothing, and what several processes of a service count is added up by Prometheus, not here.
How it is written is `exposition.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from . import names
from .exposition import Histogram, Labels, Text

Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Readings:
    """All numbers of a process at one moment, as plain data."""

    engine: Sequence[Row] = ()
    gate: Sequence[Row] = ()
    house: Row | None = None  # of what comes in: limit, waiting
    discover: Sequence[Row] = ()
    registered: Row | None = None  # service, registry, is_entered, failures; None where nobody wants to be entered
    jobs: Sequence[tuple[str, int, int]] = ()  # name, runs, failures
    identity: Row | None = None  # rotations, failures, not_after, spent
    tls: Mapping[str, Mapping[str, int]] = field(default_factory=dict)  # of each side what TLS counted
    pools: Sequence[Row] = ()  # idle, opened, reused, closed by reason; of each pool, those that are gone included
    rates: Sequence[Row] = ()  # shared by processes: service, rate, store, is_away, asked, refused, failed, skipped
    checks: Sequence[Row] = ()  # of active health checks: service, failing, checks, failures, skipped
    fallbacks: Mapping[tuple[str, str], int] = field(default_factory=dict)  # by service and word
    egress: Mapping[str, int] = field(default_factory=dict)
    delegated: Row | None = None  # to the node agent: sent, fallbacks by reason, state, changes
    handed: Row | None = None  # by the node agent: taken, wrong
    # Of gRPC: sent, received; by side (client, server), service or peer, method.
    messages: Mapping[tuple[str, str, str], tuple[int, int]] = field(default_factory=dict)
    plain: Sequence[Row] = ()  # who comes in without TLS, as they came: client, requests
    authorizers: Sequence[Row] = ()  # name, outcome, count
    keys: Sequence[Row] = ()  # for tokens: provider, source, keys, age (-1: none in force), failures
    bundles: Sequence[Row] = ()  # of other trust domains: trust_domain, age, failures
    alarms: frozenset[str] | None = None  # the kinds that stand; None without an identity
    alerts: Mapping[str, int] = field(default_factory=dict)  # by kind
    reloads: int = 0
    reload_failures: int = 0
    mesh: str = ""
    service: str = ""
    version: str = ""
    protocols: Mapping[str, str] = field(default_factory=dict)  # of services; what isn't named is http
    templates: Mapping[str, str] = field(default_factory=dict)  # of our own routes, by name
    scheme: str = ""  # of what comes in, where only one is possible


def render(readings: Readings, *, is_openmetrics: bool = False) -> str:
    """The text of all metrics, in the order of the table."""
    text = Text(is_openmetrics)
    _process(text, readings)
    _tls(text, readings.tls)
    _pools(text, readings.pools)
    _agent(text, readings)
    _discover(text, readings.discover)
    _registered(text, readings.registered)
    _calls(text, readings)
    _limits(text, [row for row in readings.engine if not row["endpoint"] and _is_called(row)])
    _rates(text, readings.rates)
    _checks(text, readings.checks)
    _attempts(text, [row for row in readings.engine if row["endpoint"] and _is_used(row)])
    _inbound(text, readings)
    _plain(text, readings.plain)
    text.add(names.SECURE_AUTHORIZER, [((row["name"], row["outcome"]), row["count"]) for row in readings.authorizers])
    _believed(text, readings)
    return text.end()


# Why the mesh says no before the first attempt, and under which key the engine counts it.
_REFUSALS = {"limit": "limited", "throttle": "throttled", "rate": "rate_limited"}

# ---------------------------------------------------------------------- what is read


def _process(text: Text, readings: Readings) -> None:
    text.add(names.OBSERVE_INFO, [((readings.mesh, readings.service, readings.version), 1)])
    text.add(names.OBSERVE_RELOADS, [((), readings.reloads)])
    text.add(names.OBSERVE_RELOAD_FAILURES, [((), readings.reload_failures)])
    text.add(names.OBSERVE_ALERTS, [((kind,), count) for kind, count in readings.alerts.items()])
    runs, failures = _summed(readings.jobs, 1), _summed(readings.jobs, 2)
    text.add(names.OBSERVE_JOB_RUNS, [((name,), count) for name, count in runs.items()])
    text.add(names.OBSERVE_JOB_FAILURES, [((name,), count) for name, count in failures.items()])
    identity = readings.identity
    if identity is not None:
        text.add(names.IDENTITY_ROTATIONS, [((), identity["rotations"])])
        text.add(names.IDENTITY_FAILURES, [((), identity["failures"])])
        if identity.get("not_after") is not None:
            text.add(names.IDENTITY_EXPIRY, [((), float(identity["not_after"]))])
            text.add(names.IDENTITY_SPENT, [((), float(identity["spent"]))])


def _tls(text: Text, tls: Mapping[str, Mapping[str, int]]) -> None:
    for side, ended, failed in (
        ("client", names.SECURE_CLIENT_HANDSHAKES, names.SECURE_CLIENT_FAILURES),
        ("server", names.SECURE_SERVER_HANDSHAKES, names.SECURE_SERVER_FAILURES),
    ):
        counts = tls.get(side)
        if counts:
            text.add(ended, [(("false",), counts["full"]), (("true",), counts["resumed"])])
            text.add(failed, _named(counts, "failed_"))
    counts = tls.get("client")
    if counts:
        text.add(names.SECURE_TICKETS, [at for at in _named(counts, "tickets_") if at[0] != ("held",)])


def _pools(text: Text, pools: Sequence[Row]) -> None:
    if not pools:
        return
    text.add(names.ADMIT_CONNECTIONS_IDLE, [((), sum(pool["idle"] for pool in pools))])
    text.add(names.ADMIT_CONNECTIONS_OPENED, [((), sum(pool["opened"] for pool in pools))])
    text.add(names.ADMIT_CONNECTIONS_REUSED, [((), sum(pool["reused"] for pool in pools))])
    closed: dict[str, int] = {}
    for pool in pools:
        for reason, count in pool["closed"].items():
            closed[reason] = closed.get(reason, 0) + count
    text.add(names.ADMIT_CONNECTIONS_CLOSED, [((reason,), count) for reason, count in closed.items()])


def _agent(text: Text, readings: Readings) -> None:
    delegated, handed = readings.delegated, readings.handed
    if delegated is not None:
        by = {"agent": delegated["sent"], **delegated["fallbacks"]}
        text.add(names.ADMIT_DELEGATED, [((who,), count) for who, count in by.items()])
        text.add(names.ADMIT_AGENT_UP, [((), int(delegated["state"] == "up"))])
        text.add(names.ADMIT_AGENT_CHANGES, [((state,), count) for state, count in delegated["changes"].items()])
    if handed is not None:
        text.add(names.SECURE_HANDED, [((result,), handed[result]) for result in ("taken", "wrong")])


def _named(counts: Mapping[str, int], front: str) -> list[tuple[Labels, float]]:
    """The counts whose name begins so, by the rest of it."""
    return [((name.removeprefix(front),), count) for name, count in counts.items() if name.startswith(front)]


def _discover(text: Text, rows: Sequence[Row]) -> None:
    labels = [(row["service"], row["source"]) for row in rows]
    text.add(names.DISCOVER_ENDPOINTS, [(at, row["endpoints"]) for at, row in zip(labels, rows, strict=True)])
    text.add(
        names.DISCOVER_AGE,
        [(at, float(row["age"])) for at, row in zip(labels, rows, strict=True) if row["age"] is not None],
    )
    text.add(names.DISCOVER_FAILURES, [(at, row["failures"]) for at, row in zip(labels, rows, strict=True)])
    text.add(names.DISCOVER_HELD, [(at, int(row["is_held"])) for at, row in zip(labels, rows, strict=True)])
    text.add(names.DISCOVER_HOLDS, [(at, row["held"]) for at, row in zip(labels, rows, strict=True)])
    for metric, key in (
        (names.DISCOVER_READY, "is_ready"),
        (names.DISCOVER_CHANGES, "changes"),
        (names.DISCOVER_KEPT, "kept"),
        (names.DISCOVER_CACHE_FAILURES, "cache_failures"),
    ):
        text.add(metric, [(at, int(row[key])) for at, row in zip(labels, rows, strict=True)])


def _registered(text: Text, row: Row | None) -> None:
    if row is not None:
        at = row["service"], row["registry"]
        text.add(names.DISCOVER_REGISTERED, [(at, int(row["is_entered"]))])
        text.add(names.DISCOVER_REGISTRATION_FAILURES, [(at, row["failures"])])


def _calls(text: Text, readings: Readings) -> None:
    rows = [row for row in readings.engine if not row["endpoint"]]
    services = [(row["service"],) for row in rows]
    for metric, key in (
        (names.ROUTE_REQUESTS, "requests"),
        (names.ROUTE_FAILURES, "failures"),
        (names.RETRY_ATTEMPTS, "retries"),
        (names.ADMIT_IN_FLIGHT, "in_flight"),
        (names.RETRY_BUDGET, "budget"),
    ):
        text.add(metric, [(at, row[key]) for at, row in zip(services, rows, strict=True) if key in row])
    text.add(names.ROUTE_RESPONSES, _outbound_codes(services, rows))
    said = [((name, _rpc(method)), counts) for (side, name, method), counts in readings.messages.items() if side == "client"]
    text.add(names.ROUTE_MESSAGES_SENT, [(at, sent) for at, (sent, _) in said])
    text.add(names.ROUTE_MESSAGES_RECEIVED, [(at, received) for at, (_, received) in said])
    text.add(names.RETRY_FALLBACKS, sorted(readings.fallbacks.items()))
    text.add(names.ROUTE_EGRESS, [((host,), count) for host, count in sorted(readings.egress.items())])
    http: dict[Labels, Histogram] = {}
    rpc: dict[Labels, Histogram] = {}
    guards: dict[Labels, Histogram] = {}
    for row in rows:
        if _is_guard(row):
            _merge(guards, (row["service"],), row)
        elif readings.protocols.get(row["service"]) == "grpc":
            _merge(rpc, ("grpc", row["service"]), row)
        else:
            _merge(http, (_method(row.get("method", "")), row["service"]), row)
    text.add_histograms(names.HTTP_CLIENT_DURATION, http)
    text.add_histograms(names.RPC_CLIENT_DURATION, rpc)
    text.add_histograms(names.GUARD_DURATION, guards)


def _limits(text: Text, rows: Sequence[Row]) -> None:
    """What stands between a call and its first attempt, of services that this process calls."""
    services = [(row["service"],) for row in rows]
    for metric, key in (
        (names.RETRY_HEDGES, "hedges"),
        (names.BALANCE_PANICS, "panics"),
        (names.ADMIT_LIMIT, "limit"),
        (names.ADMIT_PENDING, "pending"),
    ):
        text.add(metric, [(at, row[key]) for at, row in zip(services, rows, strict=True) if key in row])
    # 0 is not known yet.
    text.add(
        names.RETRY_HEDGE_DELAY,
        [(at, float(row["slow_after"])) for at, row in zip(services, rows, strict=True) if row.get("slow_after")],
    )
    text.add(
        names.ADMIT_REFUSED,
        [((row["service"], reason), row[key]) for row in rows for reason, key in _REFUSALS.items() if key in row],
    )


def _rates(text: Text, rows: Sequence[Row]) -> None:
    rates = [(row["service"], row["rate"]) for row in rows]
    for metric, key in (
        (names.ADMIT_RATE_ASKED, "asked"),
        (names.ADMIT_RATE_REFUSED, "refused"),
        (names.ADMIT_RATE_FAILED, "failed"),
        (names.ADMIT_RATE_SKIPPED, "skipped"),
    ):
        text.add(metric, [(at, row[key]) for at, row in zip(rates, rows, strict=True)])
    # Of one store there is one state, however many rates it counts.
    away = {str(row["store"]): int(row["is_away"]) for row in rows}
    text.add(names.ADMIT_STORE_AWAY, [((store,), value) for store, value in sorted(away.items())])


def _checks(text: Text, rows: Sequence[Row]) -> None:
    for metric, key in (
        (names.ADMIT_CHECKS, "checks"),
        (names.ADMIT_CHECK_FAILURES, "failures"),
        (names.ADMIT_CHECKS_SKIPPED, "skipped"),
    ):
        text.add(metric, [((row["service"],), row[key]) for row in rows])
    text.add(names.ADMIT_CHECKS_FAILING, [((row["service"],), len(row["failing"])) for row in rows])


def _attempts(text: Text, rows: Sequence[Row]) -> None:
    places = [(row["service"], row["endpoint"]) for row in rows]
    for metric, key in (
        (names.BALANCE_REQUESTS, "requests"),
        (names.BALANCE_FAILURES, "failures"),
        (names.BALANCE_RETRIED, "retries"),
        (names.BALANCE_IN_FLIGHT, "in_flight"),
        (names.BALANCE_LATENCY, "ewma"),
        (names.ADMIT_EJECTIONS, "ejections"),
    ):
        text.add(metric, [(at, row[key]) for at, row in zip(places, rows, strict=True) if key in row])
    text.add(names.BALANCE_RESPONSES, _outbound_codes(places, rows))
    # A guard has one function, which weighs nothing and is nowhere.
    known = [row for row in rows if not _is_guard(row)]
    text.add(
        names.BALANCE_WEIGHT, [((row["service"], row["endpoint"]), float(row["weight"])) for row in known if "weight" in row]
    )
    text.add(names.BALANCE_ENDPOINT, [((row["service"], row["endpoint"], row["zone"]), 1) for row in known if row.get("zone")])
    states = names.BREAKER_STATES
    text.add(
        names.ADMIT_BREAKER,
        [(at, states[row["breaker"]]) for at, row in zip(places, rows, strict=True) if row["breaker"] in states],
    )


def _inbound(text: Text, readings: Readings) -> None:
    rows = readings.gate
    if readings.house is not None:
        text.add(names.ADMIT_INBOUND_LIMIT, [((), readings.house["limit"])])
        text.add(names.ADMIT_INBOUND_WAITING, [((), readings.house["waiting"])])
    callers = [(row["service"], row["route"], row["method"], row["peer"]) for row in rows]
    for metric, key in (
        (names.SECURE_REQUESTS, "requests"),
        (names.SECURE_REFUSED, "refused"),
        (names.SECURE_WOULD_DENY, "would_deny"),
        (names.SECURE_IN_FLIGHT, "in_flight"),
    ):
        text.add(metric, [(at, row[key]) for at, row in zip(callers, rows, strict=True)])
    are_rpc = [str(row["method"]).startswith("/") or readings.protocols.get(row["service"]) == "grpc" for row in rows]
    http_rows = [pair for pair, is_rpc in zip(zip(callers, rows, strict=True), are_rpc, strict=True) if not is_rpc]
    rpc_rows = [pair for pair, is_rpc in zip(zip(callers, rows, strict=True), are_rpc, strict=True) if is_rpc]
    text.add(names.SECURE_RESPONSES, [*_codes(http_rows), *_codes(rpc_rows, _grpc_word)])
    heard = [
        ((readings.service, _rpc(method), peer), counts)
        for (side, peer, method), counts in readings.messages.items()
        if side == "server"
    ]
    text.add(names.SECURE_MESSAGES_RECEIVED, [(at, received) for at, (_, received) in heard])
    text.add(names.SECURE_MESSAGES_SENT, [(at, sent) for at, (sent, _) in heard])
    http: dict[Labels, Histogram] = {}
    rpc: dict[Labels, Histogram] = {}
    for _, row in http_rows:
        _merge(http, (_method(row["method"]), readings.templates.get(row["route"], row["route"]), readings.scheme), row)
    for _, row in rpc_rows:
        _merge(rpc, ("grpc", _rpc(row["method"])), row)
    text.add_histograms(names.HTTP_SERVER_DURATION, http)
    text.add_histograms(names.RPC_SERVER_DURATION, rpc)


# Addresses with a series of their own: callers choose them.
MOST_CLIENTS = 100


def _plain(text: Text, rows: Sequence[Row]) -> None:
    samples: list[tuple[Labels, float]] = [((row["client"] or "unknown",), row["requests"]) for row in rows[:MOST_CLIENTS]]
    if rest := sum(row["requests"] for row in rows[MOST_CLIENTS:]):
        samples.append((("other",), rest))
    text.add(names.SECURE_PLAIN, samples)


def _believed(text: Text, readings: Readings) -> None:
    text.add(names.SECURE_KEYS, [((row["provider"],), row["keys"]) for row in readings.keys])
    # What stands in the configuration needs nobody to confirm it.
    confirmed = [row for row in readings.keys if row["age"] >= 0 and row["source"] != "inline"]
    text.add(names.SECURE_KEYS_AGE, [((row["provider"],), float(row["age"])) for row in confirmed])
    text.add(names.SECURE_KEYS_FAILURES, [((row["provider"],), row["failures"]) for row in readings.keys])
    text.add(names.SECURE_BUNDLE_AGE, [((row["trust_domain"],), float(row["age"])) for row in readings.bundles])
    text.add(names.SECURE_BUNDLE_FAILURES, [((row["trust_domain"],), row["failures"]) for row in readings.bundles])
    if readings.alarms is not None:
        text.add(names.IDENTITY_ALARMS, [((kind,), int(kind in readings.alarms)) for kind in names.ALARM_KINDS])


def _is_used(row: Row) -> bool:
    return bool(row["requests"] or row["in_flight"] or row["ejections"] or row["breaker"] not in ("", "closed"))


def _is_called(row: Row) -> bool:
    return bool(row["requests"] or row["in_flight"] or row.get("pending") or any(row.get(key) for key in _REFUSALS.values()))


def _is_guard(row: Row) -> bool:
    return str(row["service"]).startswith("guard:")


def _method(name: str) -> str:
    return name if name in names.KNOWN_METHODS or not name else names.OTHER_METHOD


def _rpc(method: str) -> str:
    """A full method as the conventions write it."""
    return method.removeprefix("/")


def _http_word(code: str) -> str:
    return "none" if code == "0" else code


def _guard_word(code: str) -> str:
    """A function has no status: the engine is told 200 or one of 5xx in its place."""
    return "none" if code == "0" else "ok" if code < "500" else "error"


def _grpc_word(code: str) -> str:
    return names.GRPC_STATUSES[int(code)] if code.isdigit() and int(code) < len(names.GRPC_STATUSES) else code


def _codes(rows: Iterable[tuple[Labels, Row]], word: Callable[[str], str] = _http_word) -> list[tuple[Labels, float]]:
    counts: dict[Labels, float] = {}
    for at, row in rows:
        for code, count in row["codes"].items():
            key = (*at, word(str(code)))
            counts[key] = counts.get(key, 0) + count
    return list(counts.items())


def _outbound_codes(places: Sequence[Labels], rows: Sequence[Row]) -> list[tuple[Labels, float]]:
    pairs = list(zip(places, rows, strict=True))
    calls = _codes(pair for pair in pairs if not _is_guard(pair[1]))
    return calls + _codes((pair for pair in pairs if _is_guard(pair[1])), _guard_word)


def _summed(jobs: Sequence[tuple[str, int, int]], place: int) -> dict[str, int]:
    """Several meshes of one process have jobs of the same name."""
    counts: dict[str, int] = {}
    for job in jobs:
        counts[job[0]] = counts.get(job[0], 0) + int(job[place])
    return counts


def _merge(into: dict[Labels, Histogram], at: Labels, row: Row) -> None:
    """OpenTelemetry's histograms have fewer labels than our rows: add up what falls together."""
    counts, total = row["latency_buckets"], row["latency_sum"]
    if not any(counts):
        return
    if at in into:
        before, sum_before = into[at]
        counts = [a + b for a, b in zip(before, counts, strict=True)]
        total += sum_before
    into[at] = (counts, total)
