"""What does a file say about calls that come in, which mistakes can it hold, and what of it does nothing?

In each mistake's file `#!` marks the line where it must be told.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from meshlib.config import Config, InboundPolicy, PriorityPolicy, RatePart, RulePolicy, judged, load
from meshlib.config.inbound_document import AdaptiveLimits
from meshlib.errors import ConfigError

GOLDEN = Path(__file__).parent / "golden" / "mesh.yaml"
Write = Callable[..., Path]


def _file(keys: str, *, service: str = "", system: str = "", mode: str = "enforce") -> str:
    """Two services, of which `orders` has an `inbound`; the line of the keys is marked."""
    return (
        f"mesh: shop\nsecure: {{mode: {mode}, identity: {{folder: ids}}}}\n{system}"
        f"services:\n  web: {{secure: {{allow: [{{from: [web]}}]}}}}\n"
        f"  orders:\n    secure: {{allow: [{{from: [web]}}]}}\n{service}    inbound: {keys}  #!\n"
    )


def _orders(file: Path) -> Config:
    return load(file, service="orders")


# ---------------------------------------------------------------- the policy


def test_without_a_word_a_service_takes_in_what_the_defaults_say(write: Write) -> None:
    """As many at once as its callers may have in flight; nobody has a priority, so nobody is turned away before others."""
    assert load(write("mesh: m\nsecure: {mode: observe}\nservices: {a: {}}\n")).own.inbound == InboundPolicy(
        public=None,
        public_allow=(),
        probe=None,
        probes=("/healthz", "/livez", "/readyz", "/grpc.health.v1.Health/Check", "/grpc.health.v1.Health/Watch"),
        in_flight=1024,
        adaptive=None,
        queue=0.5,
        target=0.005,
        interval=0.1,
        priorities=(),
        shares=(1.0, 1.0, 1.0, 1.0),
        rates=(),
        drain_wait=5.0,
        is_wait_written=False,
        drain_grace=20.0,
    )


def test_what_is_written_is_filled_in() -> None:
    """Callers are complete, the short form of an address is one, and what stands twice is there once."""
    config = load(GOLDEN, service="orders")
    inbound = config.own.inbound
    assert (inbound.public, inbound.probe, inbound.probes) == ("0.0.0.0:8080", "127.0.0.1:8081", ("/healthz", "/up/*"))
    assert (inbound.in_flight, inbound.adaptive) == (64, AdaptiveLimits(initial=16, least=8, most=48))
    assert (inbound.queue, inbound.target, inbound.interval) == (0.25, 0.01, 0.2)
    assert inbound.priorities == (
        PriorityPolicy(("spiffe://shop.test/ns/prod/sa/storefront",), (), "told"),
        PriorityPolicy(("spiffe://shop.test/batch/*", "spiffe://shop.test/ns/prod/sa/legacy"), (), "sheddable"),
        PriorityPolicy(("*",), ("/orders/*", "*/pay"), "critical_plus"),
    )
    assert inbound.shares == (0.5, 0.7, 0.8, 0.95)
    assert (inbound.drain_wait, inbound.drain_grace) == (3.0, 20.0)
    assert config.services["legacy"].inbound.probe == "127.0.0.1:0"


def test_the_limit_is_that_of_admit_unless_inbound_says_another(write: Write) -> None:
    """What callers may have in flight, and what the service takes from all of them together, may differ."""
    text = "mesh: m\nsecure: {mode: observe}\nadmit: {in_flight: 7}\nservices: {a: {}, b: {inbound: {in_flight: 9}}, c: {admit: {in_flight: 8}}}\n"
    services = load(write(text), service="a").services
    assert {name: one.inbound.in_flight for name, one in services.items()} == {"a": 7, "b": 9, "c": 8}


def test_what_comes_in_is_counted_here_or_in_a_store() -> None:
    """By the client too; those of a store are known apart."""
    own = load(GOLDEN, service="orders").own
    assert [(rate.name, rate.calls, rate.per, rate.burst, rate.store) for rate in own.inbound_rates] == [
        ("clients", 100, 1.0, 200, "local"),
        ("orders/inbound/1", 1000, 1.0, 1000, "local"),
        ("everywhere", 500, 1.0, 500, "redis"),
        ("orders/inbound/3", 5000, 60.0, 5000, "redis"),
    ]
    assert own.inbound_rates[0].by == (RatePart("client", ""),)
    assert [part.kind for part in own.inbound_rates[1].by] == ["peer", "route", "service", "header"]
    assert [(rate.name, rate.on_failure) for rate in own.inbound_global_rates] == [
        ("everywhere", "local"),
        ("orders/inbound/3", "closed"),
    ]


def test_in_development_priorities_are_those_of_its_identities(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in rules."""
    monkeypatch.setenv("MESHLIB_DEV", "throwaway")
    file = write("mesh: m\nsecure: {mode: enforce}\nservices: {a: {inbound: {priority: [{from: [a], as: told}]}}}\n")
    assert load(file).own.inbound.priorities[0].callers == ("spiffe://dev.meshlib.invalid/ns/default/sa/a",)


def test_a_client_that_goes_away_takes_its_calls_along_unless_the_route_says_otherwise() -> None:
    """A payment must not stop half-way."""
    routes = load(GOLDEN, service="orders").own.routes
    assert [route.on_disconnect for route in routes] == ["handler", "calls", "nothing"]


# ---------------------------------------------------------------- the plan


def _plan(file: Path) -> dict[str, Any]:
    plan: dict[str, Any] = json.loads(_orders(file).server_plan())
    return plan


def test_shares_count_only_where_somebody_has_a_priority(write: Write) -> None:
    """Otherwise a tenth of the limit would be kept for nobody."""
    assert _plan(write(_file("{}")))["admission"]["shares"] == [1.0, 1.0, 1.0, 1.0]
    priority = "{priority: [{from: [web], as: sheddable}]}"
    assert _plan(write(_file(priority)))["admission"]["shares"] == [0.6, 0.75, 0.9, 1.0]


def test_calls_of_grpc_wait_as_those_of_http(write: Write) -> None:
    """And are counted by the same stores."""
    for protocol in ("", "    protocol: grpc\n"):
        file = _file("{queue: 2, " + RATE + "}", service=protocol) + "stores: {redis: {url: 'redis://127.0.0.1:6379'}}\n"
        plan = _plan(write(file))
        assert (plan["admission"]["queue"], [rate["is_global"] for rate in plan["rates"]]) == (2.0, [True])


def test_at_the_public_listener_only_its_own_rules_let_in(write: Write) -> None:
    """And all that may refuse counts there as well; without such a listener nobody gets in by it."""
    service = "    secure: {allow: [{name: mesh, from: [web]}], deny: [{name: no, from: [web], methods: [PUT]}]}\n"
    text = _file("{public: {listen: '0.0.0.0:8080', allow: [{from: ['*'], paths: [/x]}]}}").replace(
        "    secure: {allow: [{from: [web]}]}\n", service
    )
    system = "secure: {mode: enforce, identity: {folder: ids}, allow: [{name: all, from: [web]}], deny: [{name: never, from: [web], methods: [PUT]}]}"
    text = text.replace("secure: {mode: enforce, identity: {folder: ids}}", system)
    plan = _plan(write(text))
    assert [rule["name"] for rule in plan["rules"]] == ["never", "all", "no", "mesh"]
    assert [rule["name"] for rule in plan["public_rules"]] == ["never", "no", "orders/public/0"]
    without = text.replace(text[text.index("inbound: {") :], "inbound: {}\n")
    assert _plan(write(without))["public_rules"] == []


def test_a_rate_of_a_store_is_in_the_plan_with_a_stand_in_that_holds_or_not(write: Write) -> None:
    """`local` holds while the store is away; for `open` and `closed` nobody counts here, whatever the gate is asked."""
    keys = "{rate: [{calls: 2}, {calls: 3, store: redis}, {calls: 4, per: 1m, by: [client], store: redis, on_failure: open}]}"
    plan = _plan(write(_file(keys, system="stores: {redis: {url: x}}\n")))
    assert [(rate["is_global"], rate["calls"], rate["per"], rate["burst"]) for rate in plan["rates"]] == [
        (False, 2.0, 1.0, 2.0),
        (True, 3.0, 1.0, 3.0),
        (True, 1e9, 1.0, 1e9),
    ]


# ---------------------------------------------------------------- mistakes

RATE = "rate: [{calls: 1, store: redis}]"
# name: (the keys of inbound, further lines of the service, key, part of the message, part of the hint)
MISTAKES: dict[str, tuple[str, str, str, str, str]] = {
    "a listener without address": ("{public: {allow: []}}", "", "public.listen", "is missing", "a port of its own"),
    "an address without port": ("{probe: localhost}", "", "probe", "has no port", "127.0.0.1:8000"),
    "any port for the public": (
        "{public: {listen: '0.0.0.0:0'}}",
        "",
        "public.listen",
        "nobody could tell it from the mesh port",
        "8080",
    ),
    "two listeners at one port": (
        "{public: {listen: '0.0.0.0:8080'}, probe: '127.0.0.1:8080'}",
        "",
        "probe",
        "port 8080 is that of services.orders.inbound.public.listen",
        "a port of its own",
    ),
    "the public at the mesh port": (
        "{public: {listen: '0.0.0.0:8443'}}",
        "    listen: 0.0.0.0:8443\n",
        "public.listen",
        "port 8443 is that of services.orders.listen",
        "a port of its own",
    ),
    "a probe at the metrics of the system": (
        "{probe: {listen: '0.0.0.0:9464'}}",
        "",
        "probe.listen",
        "port 9464 is that of observe.metrics",
        "a port of its own",
    ),
    "a public rule of a stranger": (
        "{public: {listen: ':1', allow: [{from: [wbe]}]}}".replace("':1'", "'[::]:1'"),
        "",
        "public.allow[0].from[0]",
        "'wbe' is no service of this file",
        "did you mean 'web'",
    ),
    "a public rule that the core refuses": (
        "{public: {listen: '[::]:1', allow: [{from: [web], path_regexes: ['/(']}]}}",
        "",
        "public.allow[0].path_regexes[0]",
        "unclosed group",
        "Rust's regex",
    ),
    "a public rule called as another": (
        "{public: {listen: '[::]:1', allow: [{name: orders/allow/0, from: [web]}]}}",
        "",
        "public.allow[0].name",
        "another rule is called 'orders/allow/0'",
        "",
    ),
    "public denials": ("{public: {listen: '[::]:1', deny: []}}", "", "public.deny", "unknown key", "listen, allow"),
    "probes of everything": ("{probes: [/*]}", "", "probes[0]", "no limit would hold anybody", "[]"),
    "probes that never match": ("{probes: [healthz]}", "", "probes[0]", "does not begin with /", ""),
    "nobody at once": ("{in_flight: 0}", "", "in_flight", "0 is out of range", "1 to 1e+06 calls; default 1024"),
    "a queue in calls": ("{queue: 100}", "", "queue", "100 is out of range", "0 to 10; default 0.5"),
    "a word of another system": ("{max_queue: 1}", "", "max_queue", "unknown key", "did you mean 'queue'?"),
    "adaptive as a bool": ("{adaptive: true}", "", "adaptive", "true is not allowed", "off, gradient"),
    "bounds that don't rise": (
        "{adaptive_limits: {initial: 2}}",
        "",
        "adaptive_limits",
        "least 4, initial 2, most 1000 don't rise",
        "least <= initial <= most",
    ),
    "codel turned round": ("{codel: {target: 1s}}", "", "codel.target", "target 1 s is above interval 0.1 s", "below interval"),
    "anybody tells": (
        "{priority: [{from: [web, '*'], as: told}]}",
        "",
        "priority[0].from[1]",
        "'*' is anyone",
        "name the callers whose word counts",
    ),
    "a priority in every domain": (
        "{priority: [{from: ['*/ns/a/sa/b'], as: told}]}",
        "",
        "priority[0].from[0]",
        "would match every trust domain",
        "spiffe://",
    ),
    "a priority of a stranger": ("{priority: [{from: [wbe], as: told}]}", "", "priority[0].from[0]", "is no service", "'web'"),
    "a priority without a word": ("{priority: [{from: [web]}]}", "", "priority[0].as", "is missing", "told, critical_plus"),
    "a priority of another word": (
        "{priority: [{from: [web], as: critcal}]}",
        "",
        "priority[0].as",
        "'critcal' is not allowed",
        "did you mean 'critical'?",
    ),
    "shares turned round": (
        "{priority: [{from: [web], as: told}], shares: {sheddable: 0.8}}",
        "",
        "shares.sheddable",
        "sheddable (0.8) gets more than sheddable_plus (0.75)",
        "shares that rise",
    ),
    "no share at all": ("{shares: {sheddable: 0}}", "", "shares.sheddable", "0 is out of range", "0.01 to 1; default 0.6"),
    "inbound by a word": (
        "{rate: [{calls: 1, by: [ip]}]}",
        "",
        "rate[0].by[0]",
        "'ip' is not allowed",
        "service, route, peer, client",
    ),
    "inbound by two things at once": (
        "{rate: [{calls: 1, by: [{client: true, peer: true}]}]}",
        "",
        "rate[0].by[0]",
        "peer and client is given",
        "exactly one of",
    ),
    "inbound by nothing": ("{rate: [{calls: 1, by: [{}]}]}", "", "rate[0].by[0]", "nothing is given", "exactly one of"),
    "inbound rates of one name": (
        "{rate: [{name: a, calls: 1}, {name: a, calls: 2}]}",
        "",
        "rate[1].name",
        "another rate is called 'a'",
        "",
    ),
    "inbound in a store of no name": (
        "{rate: [{calls: 1, store: rediss}]}",
        "",
        "rate[0].store",
        "the store 'rediss' is not configured",
        "did you mean 'redis'?",
    ),
    "inbound in a URL": (
        "{rate: [{calls: 1, store: 'redis://:hunter2@host'}]}",
        "",
        "rate[0].store",
        "what stands here can't be a name",
        "",
    ),
    "drained for ever": ("{drain: {wait: 2h}}", "", "drain.wait", "7200.0 is out of range", "0 to 3600 s; default 5.0"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_told_at_its_line_with_what_is_allowed(name: str, write: Write) -> None:
    """Key, line, what is wrong, and what to write instead; and nothing else is found."""
    keys, service, key, message, hint = MISTAKES[name]
    text = _file(keys, service=service, system="stores: {redis: {url: x}}\nobserve: {metrics: '127.0.0.1:9464'}\n")
    with pytest.raises(ConfigError) as caught:
        _orders(write(text))
    expected = [number for number, line in enumerate(text.splitlines(), 1) if "#!" in line]
    assert [(problem.line, problem.key) for problem in caught.value.problems] == [
        (line, f"services.orders.inbound.{key}") for line in expected
    ]
    problem = caught.value.problems[0]
    assert message in problem.message
    assert hint in problem.hint
    assert "hunter2" not in str(caught.value)


def test_the_core_judges_the_rules_of_the_public_listener_too(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it has against one is told at its line, though the types found nothing."""
    asked: list[RulePolicy] = []

    def refuse(rules: list[RulePolicy], _: Any) -> list[str]:
        asked.extend(rules)
        return [f'rule "{len(rules) - 1}": paths: never matches; write another']

    monkeypatch.setattr(judged, "_ask", refuse)
    with pytest.raises(ConfigError, match=r"inbound\.public\.allow\[0\]\.paths: never matches \(write another\)"):
        _orders(write(_file("{public: {listen: '[::]:1', allow: [{from: [web], paths: [/x]}]}}")))
    assert [rule.name for rule in asked] == ["web/allow/0", "orders/allow/0", "orders/public/0"]


def test_all_mistakes_are_told_at_once(write: Write) -> None:
    """Of the types and of the whole."""
    with pytest.raises(ConfigError) as caught:
        _orders(
            write(
                _file(
                    "{queue: -1, probe: 'a:1', public: {listen: 'a:1'}, codel: {target: 2}, priority: [{from: [x], as: y}], rate: [{store: x}]}"
                )
            )
        )
    assert sorted(problem.key.removeprefix("services.orders.inbound.") for problem in caught.value.problems) == [
        "codel.target",
        "priority[0].as",
        "priority[0].from[0]",
        "probe",
        "queue",
        "rate[0].calls",
        "rate[0].store",
    ]


def test_on_disconnect_is_one_of_three_words(write: Write) -> None:
    """And no other."""
    with pytest.raises(ConfigError, match=r"route\[0\]\.on_disconnect: 'call' is not allowed \(did you mean 'calls'\?"):
        load(write("mesh: m\nsecure: {mode: observe}\nservices: {a: {route: [{on_disconnect: call}]}}\n"))


def test_metrics_of_its_own_may_be_where_the_systems_would_be(write: Write) -> None:
    """The service's own word counts, also if it is that there are none."""
    keys = "{probe: '127.0.0.1:9464'}"
    for service in ("    observe: {metrics: '127.0.0.1:1'}\n", "    observe: {metrics: null}\n"):
        text = _file(keys, service=service, system="observe: {metrics: '127.0.0.1:9464'}\n")
        assert _orders(write(text)).own.inbound.probe == "127.0.0.1:9464"
    text = _file("{}", service="    listen: 127.0.0.1:9\n    observe: {metrics: '127.0.0.1:9'}\n")
    with pytest.raises(ConfigError, match=r"services\.orders\.observe\.metrics: port 9 is that of services\.orders\.listen"):
        _orders(write(text))


def test_any_free_port_is_no_port_twice(write: Write) -> None:
    """0 for several of them, as tests have it."""
    text = _file("{probe: '127.0.0.1:0'}", service="    listen: 127.0.0.1:0\n    observe: {metrics: '127.0.0.1:0'}\n")
    assert _orders(write(text)).own.inbound.probe == "127.0.0.1:0"


@pytest.mark.parametrize("keys", ["{public: {listen: '0.0.0.0:8080'}}", "{probe: '0.0.0.0:8080'}", "{probe: {listen: '[::]:1'}}"])
def test_in_development_every_listener_is_on_loopback(keys: str, write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    """What its CA vouches for must not leave the machine."""
    monkeypatch.setenv("MESHLIB_DEV", "throwaway")
    with pytest.raises(ConfigError, match=r"services\.orders\.inbound\.p.*is not a loopback address"):
        _orders(write(_file(keys)))


# ---------------------------------------------------------------- warnings

PUBLIC = "listen: '0.0.0.0:8080'"
# The keys of inbound, further lines of the service, the key of the warning, part of its message.
WARNINGS: list[tuple[str, str, str, str]] = [
    (f"{{public: {{{PUBLIC}}}}}", "", "inbound.public", "every call is denied there"),
    (f"{{public: {{{PUBLIC}, allow: [{{from: ['*'], dry_run: true}}]}}}}", "", "inbound.public", "every call is denied there"),
    (f"{{public: {{{PUBLIC}, allow: [{{from: ['*']}}]}}}}", "", "inbound.public.allow[0]", "everyone may call everything"),
    (
        f"{{public: {{{PUBLIC}, allow: [{{from: ['*'], not_paths: [/x]}}]}}}}",
        "",
        "inbound.public.allow[0].not_paths",
        "ALLOW of all paths but these",
    ),
    (
        f"{{public: {{{PUBLIC}, allow: [{{from: ['*'], request_principals: ['*']}}]}}}}",
        "",
        "inbound.public.allow[0].request_principals",
        "believes no token",
    ),
    ("{shares: {sheddable: 0.5}}", "", "inbound.shares", "without priority"),
    (
        "{priority: [{from: ['*'], as: critical}, {from: [web], as: told}]}",
        "",
        "inbound.priority[1]",
        "never reached",
    ),
    ("{adaptive_limits: {most: 50}}", "", "inbound.adaptive_limits", "without adaptive: gradient"),
    (
        "{adaptive: gradient, in_flight: 50, adaptive_limits: {most: 60}}",
        "",
        "inbound.adaptive_limits.most",
        "never grows to 60",
    ),
    ("{queue: 0, codel: {target: 1ms}}", "", "inbound.codel", "with queue: 0 nobody waits"),
    ("{rate: [{calls: 1, on_failure: open}]}", "", "inbound.rate[0].on_failure", "without a store"),
    (
        f"{{public: {{{PUBLIC}, allow: [{{from: [web]}}]}}}}",
        "    protocol: grpc\n",
        "inbound.public",
        "public is not for gRPC yet",
    ),
    ("{}", "    protocol: grpc\n    route: [{on_disconnect: handler}]\n", "route[0].on_disconnect", "is not for gRPC"),
    (
        "{}",
        "    route: [{match: {methods: [GET]}, on_disconnect: handler}]\n",
        "route[0].on_disconnect",
        "goes by the path alone",
    ),
]


@pytest.mark.parametrize(("keys", "service", "key", "message"), WARNINGS)
def test_what_is_inert_or_dangerous_is_a_warning(keys: str, service: str, key: str, message: str, write: Write) -> None:
    """A warning never stops the load; it has a place and a way out, and is the only one."""
    found = _orders(write(_file(keys, service=service))).warnings
    assert [f"services.orders.{key}"] == [warning.key for warning in found]
    assert message in found[0].message
    assert found[0].hint


def test_in_observe_nobody_has_a_priority_by_name(write: Write) -> None:
    """Callers have no identity there; what is said of everyone counts."""
    keys = "{priority: [{from: [web], as: told}, {from: ['*'], paths: [/x], as: sheddable}]}"
    found = [warning for warning in _orders(write(_file(keys, mode="observe"))).warnings if "inbound" in warning.key]
    assert [(one.key, "no identity" in one.message) for one in found] == [("services.orders.inbound.priority[0].from", True)]


def test_what_is_used_is_no_warning(write: Write) -> None:
    """Nor are the defaults, whose queue is nothing that anybody has written."""
    keys = (
        "{public: {listen: '0.0.0.0:8080', allow: [{from: ['*'], paths: [/shop/*], methods: [GET]}]}, probe: '0.0.0.0:8081', "
        "adaptive: gradient, adaptive_limits: {most: 500}, queue: 1, codel: {target: 10ms}, shares: {sheddable: 0.5}, "
        "priority: [{from: ['*'], paths: [/a], as: critical}, {from: [web], as: told}, {from: ['*'], as: sheddable}], rate: [{calls: 1, store: redis, on_failure: open}]}"
    )
    text = _file(keys, service="    route: [{on_disconnect: nothing}]\n", system="stores: {redis: {url: x}}\n")
    assert _orders(write(text)).warnings == ()
    assert _orders(write(_file("{}", service="    protocol: grpc\n"))).warnings == ()
