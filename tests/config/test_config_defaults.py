"""Does each default exist once, with a reason, and does the schema tell it?"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from meshlib.config import json_schema, load
from meshlib.config.defaults import IN_CODE, TABLE
from meshlib.config.document import Document


def _walk(value: Any) -> Iterator[Any]:
    yield value
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    for item in inner:
        yield from _walk(item)


def test_every_row_is_used_and_every_use_has_a_row() -> None:
    """The table and the models can't drift apart; what is said in the code has its row all the same."""
    used = {item["x-default-of"] for item in _walk(json_schema()) if isinstance(item, dict) and "x-default-of" in item}
    assert set(TABLE) - IN_CODE == used
    assert not IN_CODE - set(TABLE)


def test_every_default_lies_in_its_range_and_has_a_reason() -> None:
    """A row says why, and its own value would be accepted."""
    for row in TABLE.values():
        assert len(row.reason) > 10, row.name
        for value in row.value if isinstance(row.value, tuple) else (row.value,):
            if row.least is not None and row.most is not None:
                assert row.least <= value <= row.most, row.name


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("deadline", 15.0),
        ("retry.attempts", 1),
        ("retry.backoff", (0.025, 0.25)),
        ("retry.budget.ratio", 0.2),
        ("retry.budget.per_second", 10.0),
        ("retry.budget.window", 10.0),
        ("balance.policy", "peak_ewma"),
        ("balance.decay", 10.0),
        ("balance.start", 0.03),
        ("balance.panic", 0.5),
        ("admit.in_flight", 1024),
        ("admit.connect", 1.0),
        ("admit.breaker.failures", 5),
        ("admit.breaker.success_rate", 0.8),
        ("admit.breaker.window", 10.0),
        ("admit.breaker.minimum_calls", 5),
        ("admit.breaker.open", (1.0, 60.0)),
        ("admit.breaker.max_ejected", 0.5),
        ("retry.on", ("connect", "refused_stream", "reset", "timeout", "protocol", "identity", "status")),
        ("retry.per_try", 0.0),
        ("retry.hedge", False),
        ("retry.hedge_quantile", 0.95),
        ("retry.hedge_share", 0.02),
        ("retry.hedge_least", 0.001),
        ("balance.weights", "discover"),
        ("balance.orca.blackout", 10.0),
        ("balance.orca.expiry", 180.0),
        ("balance.orca.error_penalty", 1.0),
        ("balance.slow_start", 10.0),
        ("balance.slow_start_least", 0.1),
        ("balance.hash_on", ()),
        ("balance.hash_bound", 0.0),
        ("balance.ring_size", 1024),
        ("balance.table_size", 65537),
        ("balance.locality", "zone_aware"),
        ("balance.zones", ()),
        ("balance.overprovisioning", 1.4),
        ("balance.zone_aware_from", 6),
        ("admit.pending", 0),
        ("admit.breaker.slow", 0.0),
        ("admit.breaker.slow_rate", 0.5),
        ("admit.adaptive", "off"),
        ("admit.adaptive_limits.initial", 20),
        ("admit.adaptive_limits.least", 4),
        ("admit.adaptive_limits.most", 1000),
        ("admit.throttle", 0.0),
        ("admit.throttle_window", 30.0),
        ("admit.rate.per", 1.0),
        ("admit.rate.by", ("service",)),
        ("admit.rate.store", "local"),
        ("admit.rate.on_failure", "local"),
        ("admit.check.path", "/healthz"),
        ("admit.check.every", 10.0),
        ("admit.check.timeout", 1.0),
        ("admit.check.failures", 3),
        ("admit.check.successes", 2),
        ("stores.timeout", 0.05),
        ("route.on_disconnect", "calls"),
        ("inbound.probes", ("/healthz", "/livez", "/readyz", "/grpc.health.v1.Health/Check", "/grpc.health.v1.Health/Watch")),
        ("inbound.queue", 0.5),
        ("inbound.codel.target", 0.005),
        ("inbound.codel.interval", 0.1),
        ("inbound.shares.sheddable", 0.6),
        ("inbound.shares.sheddable_plus", 0.75),
        ("inbound.shares.critical", 0.9),
        ("inbound.shares.critical_plus", 1.0),
        ("inbound.drain.wait", 5.0),
        ("inbound.drain.grace", 20.0),
        ("egress", "allow"),
        ("egress.credentials.header", "authorization"),
        ("secure.paths", "canonical"),
        ("secure.identity.state", "identities"),
        ("secure.federation.every", 300.0),
        ("secure.federation.local", False),
        ("secure.jwt.algorithms", ("RS256", "ES256")),
        ("secure.jwt.leeway", 30.0),
        ("secure.jwt.longest", 86400.0),
        ("secure.jwt.from", ("bearer",)),
        ("secure.jwt.forward", False),
        ("secure.jwt.local", False),
        ("secure.proxies.hops", 1),
        ("secure.xfcc", "sanitize"),
        ("secure.record", False),
        ("secure.case", "sensitive"),
        ("secure.dry_run", False),
        ("secure.authorizer.timeout", 0.5),
        ("registries.cache", True),
        ("delegate", "off"),
        ("agent.socket", "/run/meshlib/agent.sock"),
        ("agent.data", "/run/meshlib/data.sock"),
        ("agent.admin", "/run/meshlib/admin.sock"),
        ("agent.state", "/var/lib/meshlib"),
        ("agent.workers", 1),
    ],
)
def test_the_documented_defaults_are_these(name: str, value: Any) -> None:
    """A default is a promise: to change it is a change of behaviour, and this list makes it one on purpose."""
    assert value == TABLE[name].value


def test_the_schema_is_a_json_schema_of_the_whole_file() -> None:
    """Draft 2020-12, closed to unknown keys, with ranges, reasons and both ways to write a duration."""
    schema = json.loads(json.dumps(json_schema()))
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert schema["required"] == ["mesh", "secure", "services"]
    assert schema["additionalProperties"] is False
    definitions = schema["$defs"]
    objects = {name: item["additionalProperties"] for name, item in definitions.items() if item["type"] == "object"}
    # What a store, a registry or a source of identities wants to know is its own affair; `meshlib vet` minds all other sources.
    assert objects == {name: name in ("Store", "IdentityWay", "Discover", "Register", "Registry") for name in objects}
    attempts = definitions["Retry"]["properties"]["attempts"]
    assert (attempts["minimum"], attempts["maximum"], attempts["default"]) == (0, 5, 1)
    assert schema["properties"]["deadline"]["anyOf"][0] == {"type": "number", "minimum": 0.001, "maximum": 3600}
    assert schema["properties"]["deadline"]["anyOf"][1]["type"] == "string"
    assert "from" in definitions["Rule"]["properties"]
    by = definitions["Rate"]["properties"]["by"]
    assert (by["default"], by["items"]["anyOf"][1]["enum"]) == (["service"], ["service", "route", "peer"])
    egress = schema["properties"]["egress"]["anyOf"]
    assert egress == [{"$ref": "#/$defs/Egress"}, {"enum": ["allow", "deny"], "type": "string"}]
    tokens = definitions["Provider"]["properties"]["from"]
    assert (tokens["default"], tokens["items"]["anyOf"][1]) == (["bearer"], {"const": "bearer", "type": "string"})
    assert {"$ref": "#/$defs/Sticky"} in definitions["Balance"]["properties"]["sticky"]["anyOf"]
    assert {"const": "off", "type": "string"} in definitions["Balance"]["properties"]["sticky"]["anyOf"]
    assert definitions["Balance"]["properties"]["hash_on"]["items"] == {"$ref": "#/$defs/HashPart"}
    assert definitions["Retry"]["properties"]["on"]["items"]["enum"] == list(TABLE["retry.on"].value)
    assert definitions["Secure"]["properties"]["mode"]["enum"] == ["observe", "permissive", "enforce"]
    assert "default" not in definitions["Secure"]["properties"]["mode"]


def test_the_schema_and_the_models_know_the_same_keys() -> None:
    """What the golden files use, the schema describes: keys are found by following $ref, items and the like."""
    from meshlib.config.text import parse

    schema = json_schema()
    missing: list[str] = []

    def options(node: dict[str, Any]) -> list[dict[str, Any]]:
        found = [node]
        if "$ref" in node:
            found += options(schema["$defs"][node["$ref"].rsplit("/", 1)[1]])
        for item in node.get("anyOf", []):
            found += options(item)
        return found

    def follow(value: Any, node: dict[str, Any], path: str) -> None:
        ways = options(node)
        if isinstance(value, dict):
            for key, item in value.items():
                steps = [way["properties"][key] for way in ways if key in way.get("properties", {})]
                steps += [way["additionalProperties"] for way in ways if isinstance(way.get("additionalProperties"), dict)]
                if not steps and not any(way.get("additionalProperties") is True for way in ways):
                    missing.append(f"{path}.{key}")
                elif steps:
                    follow(item, steps[0], f"{path}.{key}")
        elif isinstance(value, tuple):
            items = [way["items"] for way in ways if isinstance(way.get("items"), dict)]
            items += [way["prefixItems"][0] for way in ways if "prefixItems" in way]
            assert items, path
            for item in value:
                follow(item, items[0], path)

    for golden in (Path(__file__).parent / "golden").glob("*.yaml"):
        text = parse(golden.read_text(), golden.name)
        follow(text.value, schema, "")
        assert missing == []
        Document.model_validate(text.value)


def test_importing_meshlib_leaves_the_configuration_alone() -> None:
    """pydantic costs more than the rest of the import; it is paid when a file is loaded."""
    code = "import sys, meshlib; print([m for m in ('pydantic', 'yaml', 'meshlib.config') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def _warnings(file: Path, service: str | None = None) -> list[tuple[int, str]]:
    return [(warning.line, warning.key) for warning in load(file, service=service).warnings]


@pytest.mark.parametrize(
    ("services", "line", "key", "message"),
    [
        ("web: {}", 4, "services.web.secure.allow", "every call is denied"),
        ("web: {secure: {allow: [{from: ['*'], dry_run: true}]}}", 4, "services.web.secure.allow", "dry run"),
        ("web: {secure: {allow: [{from: ['*']}]}}", 4, "services.web.secure.allow[0].from", "lets everyone in"),
        (
            "web: {secure: {allow: [{from: ['spiffe://a.test/*']}]}}",
            4,
            "services.web.secure.allow[0].from",
            "a whole trust domain",
        ),
        (
            "web: {secure: {allow: [{from: [web]}], deny: [{from: ['*'], paths: [/admin]}]}}",
            4,
            "services.web.secure.deny[0].paths",
            "DENY by path",
        ),
        (
            "web: {secure: {peer_check: spiffe, allow: [{from: [web]}]}}",
            4,
            "services.web.secure.peer_check",
            "peer_check is for gRPC",
        ),
        ("web: {secure: {mode: observe}}", 4, "services.web.secure.mode", "observe"),
        ("web: {secure: {mode: permissive}}", 4, "services.web.secure.mode", "permissive"),
        (
            "web: {secure: {allow: [{from: [web]}]}, route: [{name: a}, {name: b, match: {methods: [GET]}}]}",
            4,
            "services.web.route[1]",
            "never reached",
        ),
        (
            "web: {secure: {allow: [{from: [web]}]}, route: [{match: {methods: [POST]}, retry: {attempts: 2}}]}",
            4,
            "services.web.route[0].retry",
            "POST is repeated only if nothing was written",
        ),
        (
            "web: {secure: {allow: [{from: [web]}]}, discover: {file: nowhere.yaml}}",
            4,
            "services.web.discover.file",
            "is not there",
        ),
        (
            "web: {secure: {allow: [{from: [web]}]}, retry: {budget: {ratio: 0, per_second: 0}}}",
            4,
            "services.web.retry",
            "budget is 0",
        ),
        (
            "web: {secure: {allow: [{from: [web]}]}, route: [{backends: [{labels: {a: b}}]}]}",
            4,
            "services.web.route[0].backends",
            "labels without discover",
        ),
        *(
            (f"web: {{{section}}}", 4, f"services.web.{key}", message)
            for section, key, message in [
                ("retry: {on: [connect], statuses: [503]}", "retry.statuses", "without status under `on`"),
                ("retry: {hedge_share: 0.1}", "retry.hedge_share", "without hedge: true"),
                ("retry: {hedge_quantile: 0.9}", "retry.hedge_quantile", "without hedge: true"),
                ("retry: {hedge_least: 5ms}", "retry.hedge_least", "without hedge: true"),
                ("retry: {per_try: 15s}", "retry.per_try", "never ends an attempt"),
                ("route: [{deadline: 1s, retry: {per_try: 2s}}]", "route[0].retry.per_try", "never ends an attempt"),
                ("route: [{match: {methods: [POST]}, retry: {hedge: true}}]", "route[0].retry.hedge", "hedge without effect"),
                ("protocol: grpc, retry: {per_try: 15s}", "retry.per_try", "never ends an attempt"),
                ("protocol: grpc, balance: {sticky: {header: x}}", "balance.sticky", "sticky is not for gRPC yet"),
                ("protocol: grpc, balance: {weights: orca}", "balance.weights", "weights is not for gRPC yet"),
                ("balance: {orca: {expiry: 5s}}", "balance.orca", "without weights: orca"),
                ("balance: {slow_start: 0, slow_start_least: 0.5}", "balance.slow_start_least", "without slow_start"),
                ("balance: {hash_on: [{peer: true}]}", "balance.hash_on", "without policy: ring_hash or maglev"),
                ("balance: {hash_bound: 1.5}", "balance.hash_bound", "without policy: ring_hash or maglev"),
                ("balance: {ring_size: 9}", "balance.ring_size", "without policy: ring_hash"),
                ("balance: {table_size: 11}", "balance.table_size", "without policy: maglev"),
                ("balance: {zones: [a]}", "balance.zones", "without locality: failover"),
                ("balance: {overprovisioning: 2}", "balance.overprovisioning", "without locality: failover"),
                ("balance: {locality: failover, zone_aware_from: 3}", "balance.zone_aware_from", "without locality: zone_aware"),
                (
                    "balance: {policy: maglev, hash_on: [{peer: true}], locality: failover}",
                    "balance.locality",
                    "a key has one home, whoever asks",
                ),
                ("admit: {adaptive_limits: {most: 50}}", "admit.adaptive_limits", "without adaptive: gradient"),
                ("admit: {throttle_window: 60s}", "admit.throttle_window", "without throttle: 2"),
                ("admit: {rate: [{calls: 1, on_failure: open}]}", "admit.rate[0].on_failure", "without a store"),
                ("admit: {check: {kind: grpc}}", "admit.check.kind", "speaks http, and is asked by grpc"),
                ("protocol: grpc, admit: {check: {kind: http}}", "admit.check.kind", "speaks grpc, and is asked by http"),
                ("admit: {check: {kind: tcp, path: /up}}", "admit.check.path", "a check by tcp has no path"),
            ]
        ),
        (
            "web: {}\nguards: {ledger: {admit: {throttle_window: 60s}}}",
            5,
            "guards.ledger.admit.throttle_window",
            "without throttle: 2",
        ),
        ("web: {}\nbalance: {ring_size: 9}", 5, "balance.ring_size", "without policy: ring_hash"),
        ("web: {protocol: grpc}\nbalance: {weights: orca}", 5, "balance.weights", "weights is not for gRPC yet"),
        (
            "web: {protocol: grpc}\n  g: {protocol: grpc, balance: {weights: discover}}\nbalance: {weights: orca}",
            6,
            "balance.weights",
            "all services that follow speak it",
        ),
        ("web: {}\nretry: {per_try: 1h}", 5, "retry.per_try", "never ends an attempt"),
        ("web: {}\nadmit: {rate: [{calls: 1, on_failure: open}]}", 5, "admit.rate[0].on_failure", "without a store"),
    ],
)
def test_what_is_inert_or_dangerous_is_a_warning(services: str, line: int, key: str, message: str, tmp_path: Path) -> None:
    """A warning never stops the load."""
    file = tmp_path / "mesh.yaml"
    file.write_text(f"mesh: m\nsecure: {{mode: enforce, identity: {{folder: x}}}}\nservices:\n  {services}\n")
    found = [warning for warning in load(file, service=services.partition(":")[0]).warnings if message in warning.message]
    assert [(line, key)] == [(warning.line, warning.key) for warning in found]
    assert all(warning.hint for warning in found)


def test_what_grpc_does_not_do_is_no_warning_where_it_is_not_asked_for(tmp_path: Path) -> None:
    """Neither what is off, nor what stands in the system for others, nor what gRPC does."""
    file = tmp_path / "mesh.yaml"
    file.write_text(
        "mesh: m\nsecure: {mode: observe}\n"
        "retry: {per_try: 1s, hedge: true}\nbalance: {sticky: {cookie: c}, weights: orca}\n"
        "services:\n  web: {}\n  g:\n    protocol: grpc\n    retry: {per_try: 0, hedge: false}\n"
        "    balance: {sticky: off, weights: discover, policy: maglev, hash_on: [{peer: true}]}\n"
        "    admit: {rate: [{calls: 1, by: [peer]}]}\n"
        "  h: {protocol: grpc}\n"
    )
    assert [warning for warning in load(file, service="web").warnings if "gRPC" in warning.message] == []


def test_what_one_service_uses_is_not_inert(tmp_path: Path) -> None:
    """A key of the system that only some services have a use for stands there for them."""
    file = tmp_path / "mesh.yaml"
    file.write_text(
        "mesh: m\nsecure: {mode: observe}\n"
        "balance: {hash_on: [{header: x-user}], ring_size: 99, zones: [a], orca: {expiry: 5s}, overprovisioning: 2}\n"
        "admit: {adaptive_limits: {most: 50}, throttle_window: 1m}\n"
        "retry: {hedge_share: 0.1, per_try: 10s}\n"
        "services:\n"
        "  a: {balance: {policy: ring_hash}, deadline: 1s}\n"
        "  b: {balance: {locality: failover, weights: orca}, admit: {adaptive: gradient}, retry: {hedge: true}}\n"
        "guards: {ledger: {admit: {throttle: 2}}}\n"
    )
    assert _warnings(file, "a") == [(2, "secure.mode")]


def test_the_default_locality_of_a_hashing_service_is_no_warning(tmp_path: Path) -> None:
    """Nobody has written it."""
    file = tmp_path / "mesh.yaml"
    file.write_text("mesh: m\nsecure: {mode: observe}\nservices: {a: {balance: {policy: maglev, hash_on: [{peer: true}]}}}\n")
    assert _warnings(file) == [(2, "secure.mode")]


def test_a_mode_that_all_share_is_one_warning(tmp_path: Path) -> None:
    """One line in the file, one warning, not one for each service."""
    file = tmp_path / "mesh.yaml"
    file.write_text("mesh: m\nsecure:\n  mode: observe\nservices: {a: {}, b: {}, c: {}}\n")
    assert _warnings(file, "a") == [(3, "secure.mode")]


def test_identities_that_rules_cannot_tell_apart_and_plain_callers_are_warnings(tmp_path: Path) -> None:
    """Two services of one SPIFFE ID; and a caller in mode observe that a service in enforce will refuse."""
    file = tmp_path / "mesh.yaml"
    file.write_text(
        "mesh: m\n"
        "secure: {mode: enforce, identity: {folder: x}}\n"
        "services:\n"
        "  a: {secure: {mode: observe}}\n"
        "  b: {identity: 'spiffe://m.internal/ns/default/sa/c', secure: {allow: [{from: [a]}]}}\n"
        "  c: {secure: {allow: [{from: [b]}]}}\n"
    )
    found = _warnings(file, "a")
    assert (6, "services.c.identity") in found
    assert (5, "services.b.secure") in found


def test_an_idempotent_post_is_no_warning(tmp_path: Path) -> None:
    """The author has said that it may be repeated."""
    file = tmp_path / "mesh.yaml"
    file.write_text(
        "mesh: m\nsecure: {mode: enforce, identity: {folder: x}}\nservices:\n  a:\n    secure: {allow: [{from: [a]}]}\n"
        "    route: [{match: {methods: [POST]}, retry: {idempotency_key: true}}]\n"
    )
    assert _warnings(file) == []
