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
from meshlib.config.defaults import TABLE
from meshlib.config.document import Document


def _walk(value: Any) -> Iterator[Any]:
    yield value
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    for item in inner:
        yield from _walk(item)


def test_every_row_is_used_and_every_use_has_a_row() -> None:
    """The table and the models can't drift apart."""
    used = {item["x-default-of"] for item in _walk(json_schema()) if isinstance(item, dict) and "x-default-of" in item}
    assert set(TABLE) == used


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
        ("egress", "allow"),
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
    assert all(item["additionalProperties"] is False for item in definitions.values() if item["type"] == "object")
    attempts = definitions["Retry"]["properties"]["attempts"]
    assert (attempts["minimum"], attempts["maximum"], attempts["default"]) == (0, 5, 1)
    assert schema["properties"]["deadline"]["anyOf"][0] == {"type": "number", "minimum": 0.001, "maximum": 3600}
    assert schema["properties"]["deadline"]["anyOf"][1]["type"] == "string"
    assert "from" in definitions["Rule"]["properties"]
    assert definitions["Secure"]["properties"]["mode"]["enum"] == ["observe", "permissive", "enforce"]
    assert "default" not in definitions["Secure"]["properties"]["mode"]


def test_the_schema_and_the_models_know_the_same_keys() -> None:
    """What the golden file uses, the schema describes: keys are found by following $ref, items and the like."""
    from meshlib.config.text import parse

    golden = Path(__file__).parent / "golden" / "mesh.yaml"
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
                if not steps:
                    missing.append(f"{path}.{key}")
                else:
                    follow(item, steps[0], f"{path}.{key}")
        elif isinstance(value, tuple):
            items = [way["items"] for way in ways if isinstance(way.get("items"), dict)]
            items += [way["prefixItems"][0] for way in ways if "prefixItems" in way]
            assert items, path
            for item in value:
                follow(item, items[0], path)

    text = parse(golden.read_text(), "golden")
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
            "web: {protocol: grpc, identity: 'spiffe://m.internal/web', secure: {allow: [{from: [web]}]}}",
            4,
            "services.web.identity",
            "can't be checked by a gRPC channel",
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
    ],
)
def test_what_is_inert_or_dangerous_is_a_warning(services: str, line: int, key: str, message: str, tmp_path: Path) -> None:
    """A warning never stops the load."""
    file = tmp_path / "mesh.yaml"
    file.write_text(f"mesh: m\nsecure: {{mode: enforce, identity: {{folder: x}}}}\nservices:\n  {services}\n")
    found = [warning for warning in load(file).warnings if message in warning.message]
    assert [(line, key)] == [(warning.line, warning.key) for warning in found]
    assert all(warning.hint for warning in found)


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
