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

from meshlib.config import CheckPolicy, Config, IdentityChoice, RatePart, RatePolicy, examine, load
from meshlib.config.defaults import TABLE
from meshlib.errors import ConfigError

GOLDEN = Path(__file__).parent / "golden"
PLANS: dict[str, Callable[[], bytes]] = {
    "client.json": lambda: load(GOLDEN / "mesh.yaml", service="storefront", zone="eu-1").client_plan(),
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
    assert (
        own.retry.budget.ratio,
        own.retry.budget.per_second,
        own.retry.budget.window,
    ) == (0.1, 5.0, 20.0)
    assert (own.balance.policy, own.balance.decay) == ("round_robin", 5.0)
    assert (
        own.admit.in_flight,
        own.admit.connect,
        own.admit.breaker.failures,
        own.admit.breaker.open,
    ) == (100, 0.5, 3, (2.0, 30.0))


def test_each_level_of_retry_wins_over_the_one_above() -> None:
    """Conditions, the time of an attempt and hedges, key by key."""
    plan = _client(load(GOLDEN / "mesh.yaml", service="storefront"), "orders")
    retry = {route["name"]: route["retry"] for route in plan["routes"]}
    assert [(one["on"], one["per_try"], one["hedge"]) for one in retry.values()] == [
        (["connect"], 0.1, None),
        (["connect", "reset", "status"], 4.0, {"quantile": 0.99, "share": 0.05, "least": 0.005}),
        (["connect", "reset", "status"], 4.0, {"quantile": 0.95, "share": 0.05, "least": 0.005}),
    ]


def test_a_choice_is_overridden_as_a_whole() -> None:
    """The header of the service stands in for the system's cookie, and `off` takes it away."""
    config = load(GOLDEN / "mesh.yaml", service="storefront")
    assert [_client(config, name)["balance"]["sticky"] for name in ("storefront", "orders", "inventory")] == [
        {"kind": "cookie", "name": "session"},
        {"kind": "header", "name": "x-session"},
        {"kind": "none", "name": ""},
    ]


def test_a_hashing_service_has_no_zones_in_the_plan() -> None:
    """A key has one home, whoever asks."""
    balance = _client(load(GOLDEN / "mesh.yaml", service="storefront"), "inventory")["balance"]
    assert balance["locality"] == {"policy": "off", "order": ["eu-1", "eu-2"], "overprovisioning": 1.5, "least_endpoints": 4}
    assert balance["hash"] == {
        "on": [
            {"kind": "header", "name": "x-user"},
            {"kind": "cookie", "name": "session"},
            {"kind": "path", "name": "id"},
            {"kind": "peer", "name": ""},
        ],
        "bound": 1.25,
        "ring": 4096,
        "table": 131071,
    }


def test_a_rate_in_a_store_is_in_the_plan_only_as_a_stand_in() -> None:
    """Python asks the store; the engine counts local ones, and those that hold while a store is away."""
    config = load(GOLDEN / "mesh.yaml", service="storefront")
    header, peer = {"kind": "header", "name": "x-tenant"}, {"kind": "peer", "name": ""}
    everyone = {"kind": "service", "name": ""}
    assert _client(config, "orders")["admit"]["rate"] == [
        {"name": "tenants", "calls": 100.0, "per": 1.0, "burst": 100.0, "by": [header], "is_standby": True},
        {"name": "peers", "calls": 10.0, "per": 0.1, "burst": 10.0, "by": [everyone, peer], "is_standby": False},
    ]
    assert config.rates_of("orders") == (
        RatePolicy("tenants", 100, 1.0, 100, (RatePart("header", "x-tenant"),), "redis", "local"),
        RatePolicy("orders/rate/1", 1000, 1.0, 1000, (RatePart("service", ""),), "redis", "open"),
    )
    assert config.rates_of("storefront") == ()
    assert _client(config, "storefront")["admit"]["rate"] == [
        {
            "name": "storefront/rate/0",
            "calls": 50.0,
            "per": 60.0,
            "burst": 5.0,
            "by": [{"kind": "route", "name": ""}, header],
            "is_standby": False,
        }
    ]
    assert _client(config, "legacy")["admit"]["rate"] == []


def test_checks_are_for_the_process_and_not_in_the_plan() -> None:
    """Filled in from all levels; their kind follows the protocol unless it is said."""
    config = load(GOLDEN / "mesh.yaml", service="storefront")
    assert {name: service.check for name, service in config.services.items()} == {
        "storefront": CheckPolicy("http", "/healthz", 5.0, 1.0, 2, 2),
        "orders": CheckPolicy("http", "/up", 5.0, 0.5, 2, 1),
        "inventory": CheckPolicy("grpc", "/healthz", 5.0, 1.0, 2, 2),
        "legacy": None,
    }
    assert "check" not in _client(config, "orders")["admit"]


def test_nobody_is_checked_unless_it_is_asked_for(write: Callable[..., Path]) -> None:
    """Empty settings are asking for it."""
    file = write("mesh: m\nsecure: {mode: observe}\nservices: {a: {}, b: {admit: {check: {}}}}\n")
    assert [one.check for one in load(file, service="a").services.values()] == [
        None,
        CheckPolicy("http", "/healthz", 10.0, 1.0, 3, 2),
    ]


def test_a_guard_is_a_service_of_one_endpoint() -> None:
    """Its breaker may open, nothing is balanced, and what a function can't have is at rest."""
    plan = _client(load(GOLDEN / "mesh.yaml", service="storefront"), "guard:ledger")
    balance, admit = plan.pop("balance"), plan.pop("admit")
    assert plan == {
        "name": "guard:ledger",
        "hosts": ["guard:ledger"],
        "protocol": "function",
        "identity": "",
        "is_guard": True,
        "routes": [
            {
                "name": "guard:ledger",
                "match": {"path": {"kind": "prefix", "value": "/"}, "methods": [], "headers": []},
                "backends": [{"name": "all", "labels": {}, "weight": 1}],
                "retry": {
                    "attempts": 3,
                    "backoff_base": 0.005,
                    "backoff_max": 0.05,
                    "statuses": [503],
                    "idempotency_key": False,
                    "idempotent": True,
                    "on": list(TABLE["retry.on"].value),
                    "per_try": 0.5,
                    "hedge": None,
                },
                "deadline": 2.0,
                "stream_idle": 2.0,
            }
        ],
        "budget": {"ratio": 0.5, "per_second": 5.0, "window": 20.0},
    }
    assert (balance["policy"], balance["locality"]["policy"], balance["slow_start"]) == ("peak_ewma", "off", 0.0)
    assert (balance["weights"], balance["sticky"]["kind"], balance["hash"]["on"]) == ("discover", "none", [])
    assert admit == {
        "in_flight": 8,
        "pending": 4,
        "connect": 1.0,
        "breaker": {
            "failures": 4,
            "success_rate": 0.7,
            "window": 20.0,
            "minimum_calls": 10,
            "open_min": 1.0,
            "open_max": 60.0,
            "max_ejected": 1.0,
            "slow": 2.0,
            "slow_rate": 0.3,
        },
        "adaptive": None,
        "throttle": {"ratio": 0.0, "window": 60.0},
        "rate": [
            {
                "name": "slowly",
                "calls": 3.0,
                "per": 1.0,
                "burst": 3.0,
                "by": [{"kind": "peer", "name": ""}],
                "is_standby": False,
            }
        ],
    }


def test_a_guard_that_the_file_does_not_name_goes_by_the_system(write: Callable[..., Path]) -> None:
    """The engine clones the entry of all others, and the limits of services in a store are not for functions."""
    file = write("""\
        mesh: m
        secure: {mode: observe}
        deadline: 3s
        retry: {attempts: 2, per_try: 1s, on: [connect], statuses: [502], hedge: true}
        admit: {in_flight: 7, connect: 9s, rate: [{calls: 5}, {calls: 6, store: redis}]}
        stores: {redis: {url: "redis://127.0.0.1/0"}}
        services: {a: {}}
        """)
    config = load(file)
    plan = _client(config, "guard:*")
    retry = plan["routes"][0]["retry"]
    assert (retry["attempts"], retry["per_try"], retry["hedge"], retry["statuses"]) == (2, 1.0, None, [503])
    assert retry["on"] == list(TABLE["retry.on"].value)
    assert (plan["routes"][0]["deadline"], plan["admit"]["in_flight"], plan["admit"]["connect"]) == (3.0, 7, 1.0)
    assert [rate["name"] for rate in plan["admit"]["rate"]] == ["*/rate/0"]
    assert (config.guard("anything").name, config.guard("anything").deadline) == ("*", 3.0)


def test_guards_of_the_file_are_known_by_name() -> None:
    """With "*" for all others."""
    config = load(GOLDEN / "mesh.yaml", service="orders")
    assert list(config.guards) == ["*", "ledger"]
    assert (config.guard("ledger").deadline, config.guard("ledger").retry.attempts) == (2.0, 3)
    assert (config.guard("other").deadline, config.guard("other").retry.attempts) == (10.0, 2)


def test_a_store_gets_what_is_written_for_it() -> None:
    """Its own keys, too, and its time in seconds; nothing of it is in a repr."""
    config = load(GOLDEN / "mesh.yaml", service="orders")
    assert {name: dict(settings) for name, settings in config.stores.items()} == {
        "redis": {"url": "redis://127.0.0.1:6379/0", "timeout": 0.02, "prefix": "shop"}
    }
    assert "6379" not in repr(config)
    assert "6379" not in repr(examine(GOLDEN / "mesh.yaml"))


def test_a_process_is_told_its_zone(write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """By argument or environment; the file is shared by processes in all zones."""
    file = write("mesh: m\nsecure: {mode: observe}\nservices: {a: {}}\n")
    assert (load(file).zone, json.loads(load(file).client_plan())["zone"]) == ("", "")
    monkeypatch.setenv("MESHLIB_ZONE", "eu-1")
    assert (load(file).zone, load(file, zone="eu-2").zone, load(file, zone="").zone) == ("eu-1", "eu-2", "")
    plan = json.loads(load(file).client_plan())
    assert (plan["service"], plan["zone"]) == ("a", "eu-1")


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
    assert (plan["mode"], plan["identity"]) == ("observe", "spiffe://shop.test/ns/prod/sa/legacy")


def test_who_may_not_get_may_not_head(write: Callable[..., Path]) -> None:
    """What keeps GET out, or asks about it, does so for HEAD; what lets GET in doesn't let HEAD in with it."""
    file = write("""\
        mesh: shop
        secure: {mode: observe}
        services:
          a:
            secure:
              custom: [{from: ["*"], methods: [GET], authorizer: x}]
              deny: [{from: ["*"], methods: [GET]}, {from: ["*"], not_methods: [GET]}]
              allow: [{from: ["*"], methods: [GET]}, {from: ["*"], not_methods: [GET]}, {from: ["*"], not_methods: [GET, HEAD]}]
        """)
    rules = json.loads(load(file).server_plan())["rules"]
    assert [(rule["action"], rule["methods"], rule["not_methods"]) for rule in rules] == [
        ("custom", ["GET", "HEAD"], []),
        ("deny", ["GET", "HEAD"], []),
        ("deny", [], ["GET"]),
        ("allow", ["GET"], []),
        ("allow", [], ["GET", "HEAD"]),
        ("allow", [], ["GET", "HEAD"]),
    ]


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
    assert config.identity_source == IdentityChoice("folder", folder=file.parent / "ids")
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
