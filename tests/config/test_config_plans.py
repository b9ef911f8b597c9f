"""Do the plans say what the file says, with every field written out?

`golden/` holds a file with every section and the plans that follow from it. After a change on purpose, read the
difference and write them anew: `python tests/config/test_config_plans.py`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from meshlib.config import Config, load
from meshlib.config.defaults import TABLE
from meshlib.errors import ConfigError

GOLDEN = Path(__file__).parent / "golden"
PLANS = {
    "client.json": lambda: load(GOLDEN / "mesh.yaml", service="storefront").client_plan(),
    "server.json": lambda: load(GOLDEN / "mesh.yaml", service="orders").server_plan(),
}


def _client(config: Config, service: str) -> dict[str, Any]:
    services = json.loads(config.client_plan())["services"]
    found: dict[str, Any] = next(item for item in services if item["name"] == service)
    return found


@pytest.mark.parametrize("name", PLANS)
def test_plans_are_the_golden_ones(name: str) -> None:
    """Each field of the contract with the core, for a file that uses every section."""
    assert json.loads((GOLDEN / name).read_text()) == json.loads(PLANS[name]())


def test_the_core_takes_the_plans() -> None:
    """Rust refuses unknown and missing fields, so the two sides agree to the letter."""
    from meshlib._native import core

    core.Engine(1).publish(PLANS["client.json"](), 0.0)
    core.Gate().publish(PLANS["server.json"](), 0.0)


def test_a_route_wins_over_its_service_over_the_system_over_the_defaults() -> None:
    """Key by key: what a level doesn't say comes from the next one."""
    config = load(GOLDEN / "mesh.yaml", service="orders")
    retry = {route.name: route.retry for route in config.own.routes}
    default = TABLE["retry.statuses"].value
    assert (0, (0.01, 1.0), default) == (retry["items"].attempts, retry["items"].backoff, retry["items"].statuses)
    assert (
        retry["orders/1"].attempts,
        retry["orders/1"].backoff,
        retry["orders/1"].statuses,
    ) == (2, (0.01, 1.0), (503,))
    assert [route.deadline for route in config.own.routes] == [0.25, 5.0, 5.0]
    assert config.services["legacy"].routes[0].deadline == 10.0


def test_overrides_are_merged_at_every_level() -> None:
    """A service that sets one key of the breaker keeps the others, of the system or by default."""
    own = load(GOLDEN / "mesh.yaml", service="orders").own
    assert (0.1, 5.0, TABLE["retry.budget.window"].value) == (
        own.retry.budget.ratio,
        own.retry.budget.per_second,
        own.retry.budget.window,
    )
    assert (own.balance.policy, own.balance.decay) == ("round_robin", 5.0)
    assert (
        own.admit.in_flight,
        own.admit.connect,
        own.admit.breaker.failures,
        own.admit.breaker.open,
    ) == (100, 0.5, 3, (2.0, 30.0))


def test_a_service_says_where_its_own_metrics_are() -> None:
    """One file, several processes on a machine: the address is the service's, the rest the system's."""
    assert load(GOLDEN / "mesh.yaml", service="storefront").observe.metrics == "127.0.0.1:9464"
    assert load(GOLDEN / "mesh.yaml", service="storefront").observe.sample == 0.5
    assert load(GOLDEN / "mesh.yaml", service="orders").observe.metrics == "127.0.0.1:0"


def test_a_written_default_is_a_value_of_its_own(write: Callable[..., Path]) -> None:
    """An override that repeats the default wins over the system's other value."""
    file = write("""\
        mesh: shop
        secure: {mode: observe}
        retry: {attempts: 3}
        services: {a: {retry: {attempts: 1}}}
        """)
    assert load(file).own.routes[0].retry.attempts == 1


@pytest.mark.parametrize(
    ("own", "callee", "is_private"),
    [
        ("observe", "observe", False),
        ("observe", "permissive", False),
        ("observe", "enforce", False),
        ("permissive", "observe", False),
        ("permissive", "permissive", True),
        ("permissive", "enforce", True),
        ("enforce", "observe", False),
        ("enforce", "permissive", True),
        ("enforce", "enforce", True),
    ],
)
def test_a_call_is_plain_only_if_one_end_observes(own: str, callee: str, is_private: bool, write: Callable[..., Path]) -> None:
    """Both modes are written down; nothing is probed."""
    file = write(f"""\
        mesh: shop
        secure: {{mode: enforce, identity: {{folder: x}}}}
        services:
          a: {{secure: {{mode: {own}}}}}
          b: {{secure: {{mode: {callee}}}}}
        """)
    config = load(file, service="a")
    assert is_private == config.is_private("b")
    assert ("spiffe://shop.internal/ns/default/sa/b" if is_private else "") == _client(config, "b")["identity"]


def test_the_server_plan_names_the_own_identity_in_every_mode() -> None:
    """Only the outbound plan uses an empty identity to say plain."""
    plan = json.loads(load(GOLDEN / "mesh.yaml", service="legacy").server_plan())
    assert (plan["mode"], plan["identity"], plan["rules"]) == ("observe", "spiffe://shop.test/ns/prod/sa/legacy", [])


def test_who_may_not_get_may_not_head(write: Callable[..., Path]) -> None:
    """A deny of GET covers HEAD; an allow of GET doesn't."""
    file = write("""\
        mesh: shop
        secure: {mode: observe}
        services:
          a:
            secure:
              deny: [{from: ["*"], methods: [GET]}]
              allow: [{from: ["*"], methods: [GET]}]
        """)
    rules = json.loads(load(file).server_plan())["rules"]
    assert [(rule["action"], rule["methods"]) for rule in rules] == [("deny", ["GET", "HEAD"]), ("allow", ["GET"])]


def test_a_service_without_routes_has_one_for_everything(write: Callable[..., Path]) -> None:
    """One route, one backend of all endpoints."""
    config = load(write("mesh: m\nsecure: {mode: observe}\nservices: {a: {}}\n"))
    route = _client(config, "a")["routes"][0]
    assert route["match"] == {"path": {"kind": "prefix", "value": "/"}, "methods": [], "headers": []}
    assert route["backends"] == [{"name": "all", "labels": {}, "weight": 1}]
    assert route["name"] == "a/0"


@pytest.mark.parametrize(
    ("written", "seconds"),
    [("2", 2.0), ("0.5", 0.5), ("250ms", 0.25), ("2s", 2.0), ("5m", 300.0), ("1h", 3600.0), ('"1.5 s"', 1.5)],
)
def test_durations_are_seconds_or_have_a_unit(written: str, seconds: float, write: Callable[..., Path]) -> None:
    """A number is seconds; ms, s, m and h are understood."""
    file = write(f"mesh: m\nsecure: {{mode: observe}}\ndeadline: {written}\nservices: {{a: {{}}}}\n")
    assert seconds == load(file).deadline


def test_the_file_and_the_service_come_from_the_environment(write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """MESHLIB_CONFIG and MESHLIB_SERVICE; arguments win; the only service needs no name."""
    one = write("mesh: one\nsecure: {mode: observe}\nservices: {a: {}}\n", "one.yaml")
    two = write("mesh: two\nsecure: {mode: observe}\nservices: {a: {}, b: {}}\n", "two.yaml")
    monkeypatch.setenv("MESHLIB_CONFIG", str(one))
    assert (load().name, load().service) == ("one", "a")
    monkeypatch.setenv("MESHLIB_SERVICE", "b")
    assert (load(two).name, load(two).service) == ("two", "b")
    assert load(two, service="a").service == "a"


def test_mesh_yaml_in_the_folder_is_found(write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Without argument and environment."""
    file = write("mesh: here\nsecure: {mode: observe}\nservices: {a: {}}\n")
    monkeypatch.chdir(file.parent)
    config = load()
    assert ("here", file) == (config.name, config.file)


def test_the_identity_folder_is_relative_to_the_file(write: Callable[..., Path]) -> None:
    """Wherever the process was started."""
    file = write("mesh: m\nsecure: {mode: enforce, identity: {folder: ./ids}}\nservices: {a: {}}\n")
    config = load(file)
    assert file.parent / "ids" == config.identity_folder
    assert config.secure.identity is not None
    assert str(file.parent / "ids") == config.secure.identity.folder
    assert (config.trust_domain, config.secure.trust_domain) == ("m.internal", "m.internal")


def test_the_hash_tells_whether_the_text_changed(write: Callable[..., Path]) -> None:
    """The same text has the same hash, a comment more another."""
    text = "mesh: m\nsecure: {mode: observe}\nservices: {a: {}}\n"
    first, same, other = load(write(text)), load(write(text, "b.yaml")), load(write(text + "# c\n", "c.yaml"))
    assert first.source == same.source
    assert first.source != other.source


def test_a_configuration_is_frozen(write: Callable[..., Path]) -> None:
    """A reload makes a new one; nothing changes under a request."""
    config = load(write("mesh: m\nsecure: {mode: observe}\nservices: {a: {}}\n"))
    with pytest.raises(AttributeError):
        config.service = "b"  # type: ignore[misc]
    with pytest.raises(TypeError):
        config.services["b"] = config.own  # type: ignore[index]
    with pytest.raises(ValueError, match="frozen"):
        config.own.retry.attempts = 5


def test_asking_for_an_unknown_service_names_the_near_one() -> None:
    """A mistake of the caller is told like one of the file."""
    config = load(GOLDEN / "mesh.yaml", service="orders")
    assert config.identity_of("inventory") == "spiffe://shop.test/ns/prod/sa/stock"
    assert config.mode_of("storefront") == "permissive"
    with pytest.raises(ConfigError, match="did you mean 'legacy'"):
        config.identity_of("legcy")


if __name__ == "__main__":
    for name, plan in PLANS.items():
        (GOLDEN / name).write_text(json.dumps(json.loads(plan()), indent=1) + "\n")
