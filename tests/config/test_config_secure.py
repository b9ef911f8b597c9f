"""Is it clear in the end who is trusted, whatever was left out, and who could read a secret in it?"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from meshlib.config import (
    Config,
    CredentialPolicy,
    FederationPolicy,
    IdentityChoice,
    JwksChoice,
    ProxiesPolicy,
    TokenPlace,
    load,
)
from meshlib.config.defaults import TABLE
from meshlib.config.judged import asking, expression_fault
from meshlib.config.secure_values import SVID_ALGORITHMS

GOLDEN = Path(__file__).parent / "golden"
Write = Callable[..., Path]


def _golden() -> Config:
    return load(GOLDEN / "mesh.yaml", service="orders")


def _rules(config: Config) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(config.server_plan())["rules"]
    return found


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("mesh", IdentityChoice("folder", folder=GOLDEN / "identities")),
        (
            "files",
            IdentityChoice(
                "files",
                certificate=GOLDEN / "tls.crt",
                key=GOLDEN / "tls.key",
                bundle=GOLDEN / "ca.crt",
                crl=GOLDEN / "crl.pem",
            ),
        ),
        ("ca", IdentityChoice("ca", ca="https://ca.shop.test:8444", token=GOLDEN / "join.token", state=Path("/var/lib/shop"))),
        ("plugin", IdentityChoice("plugin", plugin="spiffe", settings={"socket": "unix:///run/spire/agent.sock", "timeout": 5})),
    ],
)
def test_an_identity_comes_from_one_place(name: str, expected: IdentityChoice) -> None:
    """Paths are relative to the file; a plugin gets all keys that are not ours."""
    config = load(GOLDEN / f"{name}.yaml", service="orders")
    assert config.identity_source == expected
    assert config.identity_folder == expected.folder


def test_a_ca_keeps_its_state_beside_the_file(write: Write) -> None:
    """Unless another folder is named; and who has been there once needs no token."""
    file = write("mesh: m\nsecure: {mode: enforce, identity: {ca: 'https://ca.test:8444'}}\nservices: {a: {}}\n")
    assert load(file).identity_source == IdentityChoice("ca", ca="https://ca.test:8444", state=file.parent / "identities")


def test_in_mode_observe_nobody_needs_an_identity(write: Write) -> None:
    """What is not written is not there."""
    config = load(write("mesh: m\nsecure: {mode: observe}\nservices: {a: {}}\n"))
    assert (config.identity_source, config.identity_folder, config.federation, config.jwt) == (None, None, {}, {})
    assert (config.proxies, config.record, config.xfcc, config.authorizers) == (ProxiesPolicy(), None, "sanitize", ())
    assert (config.egress, config.egress_hosts, config.egress_credentials) == ("allow", (), ())
    plan = json.loads(config.server_plan())
    assert plan["proxies"] == {"identities": [], "cidrs": [], "hops": 0}
    assert (plan["providers"], plan["jwt_required"], plan["rates"], plan["record"]) == ([], [], [], False)


def test_other_trust_domains_are_told_apart_by_how_their_keys_come() -> None:
    """A file; an endpoint that any CA vouches for; an endpoint that proves its own SPIFFE ID by the first bundle."""
    federation = _golden().federation
    assert list(federation.values()) == [
        FederationPolicy("partner.test", GOLDEN / "partner.json", "", "", "", 0.0, can_be_local=False),
        FederationPolicy("web.test", None, "https://web.test/bundle", "https_web", "", 60.0, can_be_local=False),
        FederationPolicy(
            "other.test",
            GOLDEN / "other.pem",
            "https://other.test/bundle",
            "https_spiffe",
            "spiffe://other.test/bundle-server",
            0.0,
            can_be_local=False,
        ),
    ]


def test_providers_are_filled_in() -> None:
    """Keys by address, file or hand; without more, tokens come as bearers, and only two algorithms are believed."""
    jwt = _golden().jwt
    assert {name: one.jwks for name, one in jwt.items()} == {
        "people": JwksChoice("url", url="https://id.shop.test/keys.json"),
        "machines": JwksChoice("file", file=GOLDEN / "machines.json"),
        "tests": JwksChoice("keys", keys=b'{"keys": [{"kty": "EC", "crv": "P-256", "kid": "one", "x": "abc", "y": "def"}]}'),
        "localhost": JwksChoice("url", url="https://localhost:8443/keys", can_be_local=True),
        "svid": JwksChoice("bundle"),
    }
    machines = jwt["machines"]
    assert (machines.algorithms, machines.leeway, machines.longest) == (("RS256", "ES256"), 30.0, 86400.0)
    assert (machines.places, machines.is_forwarded) == ((TokenPlace("header", "authorization", "Bearer "),), False)
    people = jwt["people"]
    assert (people.algorithms, people.leeway, people.longest) == (("ES256", "PS384"), 10.0, 3600.0)
    assert people.places == (
        TokenPlace("header", "authorization", "Bearer "),
        TokenPlace("header", "x-token", "Token "),
        TokenPlace("cookie", "session", ""),
        TokenPlace("query", "access_token", ""),
    )


def test_a_trust_domain_in_place_of_an_issuer_means_jwt_svids() -> None:
    """Signed by the keys of its bundle, with any algorithm of the profile."""
    svid = _golden().jwt["svid"]
    assert (svid.issuer, svid.is_svid, svid.algorithms) == ("shop.test", True, SVID_ALGORITHMS)
    assert [one.is_svid for one in _golden().jwt.values()].count(True) == 1


def test_a_header_of_its_own_has_no_bearer(write: Write) -> None:
    """The word belongs to authorization."""
    file = write("""\
        mesh: m
        secure:
          mode: observe
          jwt: {a: {issuer: a, audiences: [m], jwks: "https://a/k", from: [{header: x-token}, {header: authorization}, bearer]}}
        egress: {credentials: [{host: a.test, header: x-api-key, env: A}, {host: a.test, env: B}]}
        services: {a: {}}
        """)
    config = load(file)
    assert config.jwt["a"].places == (
        TokenPlace("header", "x-token", ""),
        TokenPlace("header", "authorization", "Bearer "),
    )
    assert config.egress_credentials == (
        CredentialPolicy("a.test", "x-api-key", "", "A", None),
        CredentialPolicy("a.test", "authorization", "Bearer ", "B", None),
    )


@pytest.mark.parametrize(
    ("written", "providers"),
    [
        ("{}", ["a", "b"]),
        ("{jwt: {require: [/x]}}", ["a", "b"]),
        ("{jwt: {providers: [b]}}", ["b"]),
        ("{jwt: {providers: []}}", []),
    ],
)
def test_a_service_believes_the_tokens_that_it_names(written: str, providers: list[str], write: Write) -> None:
    """All of the system's if it names none, and none if it says so."""
    file = write(f"""\
        mesh: m
        secure:
          mode: observe
          jwt:
            a: {{issuer: a, audiences: [m], jwks: "https://a/k"}}
            b: {{issuer: b, audiences: [m], jwks: "https://b/k"}}
        services: {{x: {{secure: {written}}}}}
        """)
    assert [one["name"] for one in json.loads(load(file).server_plan())["providers"]] == providers


def test_the_rules_of_the_system_come_first() -> None:
    """Each with its own name, and each service has them."""
    assert [rule["name"] for rule in _rules(_golden())] == [
        *("opa", "no-browsers", "probes"),
        *("orders/custom/0", "orders/deny/0", "everything", "all-but", "shop", "orders/allow/2"),
    ]
    assert [rule["name"] for rule in _rules(load(GOLDEN / "mesh.yaml", service="legacy"))] == ["opa", "no-browsers", "probes"]
    assert _golden().authorizers == ("opa",)


def test_rules_without_a_name_are_told_apart_by_their_place(write: Write) -> None:
    """Those of the system bear a star, which no service can."""
    file = write("""\
        mesh: m
        secure: {mode: observe, allow: [{from: [a]}, {name: x, from: [a]}, {from: [a]}]}
        services: {a: {secure: {allow: [{from: [a]}], custom: [{from: [a], authorizer: y}]}}}
        """)
    rules = load(file).own.rules
    assert [rule.name for rule in rules] == ["*/allow/0", "x", "*/allow/2", "a/custom/0", "a/allow/0"]
    assert [rule.place for rule in rules[2:4]] == [("secure", "allow", 2), ("services", "a", "secure", "custom", 0)]


def test_a_caller_of_several_trust_domains_is_one_for_each(write: Write) -> None:
    """Nothing matches a domain that nobody wrote down; services mean their own identity, wherever that is."""
    file = write("""\
        mesh: m
        secure: {mode: observe}
        services:
          a:
            identity: spiffe://elsewhere.test/ns/tools/sa/alpha
            secure:
              deny:
                - {from: [a, "*/ns/x/sa/y", "*/ns/z/*", "*/*"], not_from: ["*/q"], trust_domains: [m.internal, b.test], methods: [PUT]}
        """)
    rule = _rules(load(file))[0]
    assert rule["from"] == [
        {"kind": "exact", "value": "spiffe://elsewhere.test/ns/tools/sa/alpha"},
        {"kind": "exact", "value": "spiffe://m.internal/ns/x/sa/y"},
        {"kind": "exact", "value": "spiffe://b.test/ns/x/sa/y"},
        {"kind": "prefix", "value": "spiffe://m.internal/ns/z/"},
        {"kind": "prefix", "value": "spiffe://b.test/ns/z/"},
        {"kind": "prefix", "value": "spiffe://m.internal/"},
        {"kind": "prefix", "value": "spiffe://b.test/"},
    ]
    assert [one["value"] for one in rule["not_from"]] == ["spiffe://m.internal/q", "spiffe://b.test/q"]


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("x", {"kind": "exact", "value": "x"}),
        ("x*", {"kind": "prefix", "value": "x"}),
        ("'*x'", {"kind": "suffix", "value": "x"}),
        ("'*'", {"kind": "any"}),
        ("a.b", {"kind": "exact", "value": "a.b"}),
        ("'(a+)+'", {"kind": "exact", "value": "(a+)+"}),
    ],
)
def test_a_pattern_has_one_star_and_nothing_else_means_anything(written: str, expected: dict[str, str], write: Write) -> None:
    """A dot is a dot."""
    rule = f"{{from: ['*'], when: [{{key: request.auth.audiences, values: [{written}]}}]}}"
    file = write(f"mesh: m\nsecure: {{mode: observe, allow: [{rule}]}}\nservices: {{a: {{}}}}\n")
    assert _rules(load(file))[0]["when"][0]["values"] == [expected]


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("/a", ("exact", "/a")),
        ("/a*", ("prefix", "/a")),
        ("'*/a'", ("suffix", "/a")),
        ("'*.php'", ("suffix", ".php")),
        ("'/a/{id}'", ("template", "/a/{id}")),
        ("'/a/{*}/b/{**}'", ("template", "/a/{*}/b/{**}")),
        ("'/{*}/{*}'", ("template", "/{*}/{*}")),
        ("'/a/{**}/b'", ("template", "/a/{**}/b")),
    ],
)
def test_a_path_is_compared_in_one_of_four_ways(written: str, expected: tuple[str, str], write: Write) -> None:
    """In rules and where a token is required alike."""
    file = write(
        "mesh: m\nsecure: {mode: observe}\n"
        f"services: {{a: {{secure: {{jwt: {{require: [{written}]}}, allow: [{{from: [a], paths: [{written}]}}]}}}}}}\n"
    )
    plan = json.loads(load(file).server_plan())
    wanted = [dict(zip(("kind", "value"), expected, strict=True))]
    assert (plan["jwt_required"], plan["rules"][0]["paths"]) == (wanted, wanted)


def test_the_core_is_asked_in_a_plan_of_all_fields() -> None:
    """A plan of fewer fields would be refused for that, and no rule be judged."""
    config = _golden()
    asked, whole = asking(config.own.rules, config.jwt.values()), json.loads(config.server_plan())
    assert asked.keys() == whole.keys()
    assert asked["admission"].keys() == whole["admission"].keys()
    assert [rule.keys() for rule in asked["rules"]] == [rule.keys() for rule in whole["rules"]]
    assert asked["providers"][0].keys() == whole["providers"][0].keys()
    assert (expression_fault("/x"), expression_fault("/v[0-9]+/.*")) == ("", "")


def test_an_expression_may_be_about_any_case(write: Write) -> None:
    """The core has what that takes."""
    text = "mesh: m\nsecure: {mode: observe, allow: [{from: [a], path_regexes: [/v.*], case: insensitive}]}\nservices: {a: {}}\n"
    assert load(write(text)).own.rules[0].is_case_insensitive


def test_addresses_have_one_spelling(write: Write) -> None:
    """What Rust compares is canonical, also in conditions."""
    file = write("""\
        mesh: m
        secure:
          mode: observe
          proxies: {cidrs: ["2001:DB8:0:0::/32", 192.0.2.7]}
          allow:
            - {from: ["*"], ip_blocks: ["0:0:0:0:0:0:0:1", 10.0.0.0/8], when: [{key: source.ip, values: ["FE80::/10"]}]}
        services: {a: {}}
        """)
    plan = json.loads(load(file).server_plan())
    assert plan["proxies"] == {"identities": [], "cidrs": ["2001:db8::/32", "192.0.2.7"], "hops": 1}
    assert plan["rules"][0]["ip_blocks"] == ["::1", "10.0.0.0/8"]
    assert plan["rules"][0]["when"][0]["values"] == [{"kind": "exact", "value": "fe80::/10"}]


@pytest.mark.parametrize(
    ("written", "expected"),
    [("allow", "allow"), ("deny", "deny"), ("{policy: deny}", "deny"), ("{hosts: [a.test]}", "allow"), ("{}", "allow")],
)
def test_egress_is_a_word_or_a_section(written: str, expected: str, write: Write) -> None:
    """The policy stays where it was."""
    assert load(write(f"mesh: m\nsecure: {{mode: observe}}\negress: {written}\nservices: {{a: {{}}}}\n")).egress == expected


def test_egress_says_where_its_secrets_are_and_not_what_they_are() -> None:
    """The file holds names of variables and files."""
    config = _golden()
    assert (config.egress, config.egress_hosts) == ("deny", ("api.stripe.test", "*.github.test"))
    assert config.egress_credentials == (
        CredentialPolicy("api.stripe.test", "authorization", "Bearer ", "STRIPE_KEY", None),
        CredentialPolicy("x.github.test", "x-api-key", "", "", GOLDEN / "github.key"),
    )


@pytest.mark.parametrize(
    ("written", "folder"), [("false", None), ("true", ".meshlib/traffic"), ("seen", "seen"), ("/x/y", "/x/y")]
)
def test_calls_are_recorded_where_it_is_said(written: str, folder: str | None, write: Write) -> None:
    """Beside the file; and the gate is told whether."""
    file = write(f"mesh: m\nsecure: {{mode: observe, record: {written}}}\nservices: {{a: {{}}}}\n")
    config = load(file)
    assert config.record == (None if folder is None else file.parent / folder)
    assert json.loads(config.server_plan())["record"] == (folder is not None)


def test_in_development_the_own_trust_domain_is_carried_over(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    """The throw-away CA stands in for every source of identity, and no other domain is trusted beside it."""
    monkeypatch.setenv("MESHLIB_DEV", "/dev/folder")
    file = write("""\
        mesh: m
        secure:
          mode: enforce
          identity: {ca: "https://ca.test"}
          federation: {b.test: {file: b.json}}
          jwt: {svid: {trust_domain: m.internal, audiences: [m]}}
          proxies: {identities: [a, "spiffe://m.internal/edge/*"]}
          allow: [{from: ["*/x", a], trust_domains: [m.internal, b.test]}]
        services: {a: {}}
        """)
    config = load(file)
    assert config.identity_source == IdentityChoice("folder", folder=Path("/dev/folder"))
    assert (config.federation, config.jwt["svid"].issuer) == ({}, "dev.meshlib.invalid")
    domain = "spiffe://dev.meshlib.invalid"
    assert config.proxies.callers == (f"{domain}/ns/default/sa/a", f"{domain}/edge/*")
    assert config.own.rules[0].callers == (f"{domain}/ns/default/sa/a", f"{domain}/x", "spiffe://b.test/x")
    assert json.loads(config.server_plan())["trust_domain"] == "dev.meshlib.invalid"


def test_what_may_be_secret_is_in_no_repr(write: Write) -> None:
    """Settings of a plugin, and keys by hand: nobody here knows what they hold."""
    file = write("""\
        mesh: m
        secure:
          mode: enforce
          identity: {plugin: vault, secret_id: hunter2, inner: {token: hunter2}}
          jwt: {a: {issuer: a, audiences: [m], jwks: {keys: [{kty: EC, x: hunter2}]}}}
        services: {a: {}}
        """)
    config = load(file)
    assert config.identity_source is not None
    assert config.identity_source.settings["secret_id"] == "hunter2"
    assert b"hunter2" in config.jwt["a"].jwks.keys
    assert "hunter2" not in repr(config) + repr(config.secure) + repr(config.jwt) + repr(config.identity_source)
    assert b"hunter2" not in config.server_plan() + config.client_plan()


def test_the_default_time_of_an_authorizer_is_in_the_table() -> None:
    """It is said in the code, by whoever registers one; 500 ms unless said otherwise."""
    assert (TABLE["secure.authorizer.timeout"].value, TABLE["secure.authorizer.timeout"].span) == (0.5, "0.001 to 60 s")


def _warnings(file: Path) -> list[tuple[str, str]]:
    return [(warning.key, warning.message) for warning in load(file, service="web").warnings]


@pytest.mark.parametrize(
    ("secure", "rules", "key", "message"),
    [
        ("", "deny: [{from: [web], paths: [/a]}]", "deny[0].paths", "DENY by path"),
        ("", "deny: [{from: [web], path_regexes: [/a]}]", "deny[0].path_regexes", "DENY by path"),
        ("", "allow: [{from: [web], not_paths: [/a]}]", "allow[0].not_paths", "ALLOW of all paths but these"),
        ("", "allow: [{from: [web], not_path_regexes: [/a]}]", "allow[0].not_path_regexes", "ALLOW of all paths but these"),
        ("", "deny: [{from: [web], hosts: [a.test]}]", "deny[0].hosts", "hosts are what the caller writes"),
        ("", "allow: [{from: [web], not_hosts: [a.test]}]", "allow[0].not_hosts", "hosts are what the caller writes"),
        ("", "allow: [{from: [web], remote_ip_blocks: [10.0.0.0/8]}]", "allow[0].remote_ip_blocks", "without proxies nobody"),
        ("", "deny: [{from: [web], not_remote_ip_blocks: ['::1']}]", "deny[0].not_remote_ip_blocks", "without proxies nobody"),
        ("", "allow: [{from: [web], when: [{key: remote.ip, values: ['::1']}]}]", "allow[0].when", "without proxies nobody"),
        ("", "allow: [{from: [web], request_principals: ['*']}]", "allow[0].request_principals", "web believes no token"),
        ("", "deny: [{from: [web], not_request_principals: ['*']}]", "deny[0].not_request_principals", "web believes no token"),
        (
            "",
            "allow: [{from: [web], when: [{key: 'request.auth.claims[a]', values: [b]}]}]",
            "allow[0].when",
            "believes no token",
        ),
        ("", "jwt: {require: ['/*']}", "jwt.require", "require without a provider"),
        ("", "allow: [{from: [web], case: insensitive}]", "allow[0].case", "case has no effect"),
        (
            "",
            "allow: [{from: [web], when: [{key: 'request.headers[x-forwarded-user]', values: [b]}]}]",
            "allow[0].when[0].key",
            "anybody may write it",
        ),
        (
            "",
            "custom: [{from: [web], authorizer: x, when: [{key: 'request.headers[x-envoy-peer]', values: [b]}]}]",
            "custom[0].when[0].key",
            "anybody may write it",
        ),
        (
            "",
            "allow: [{from: [web], when: [{key: 'request.headers[authorization]', values: [Bearer x]}]}]",
            "allow[0].when[0].values",
            "is a secret, and stands in this file",
        ),
    ],
)
def test_what_is_weaker_than_it_looks_is_a_warning(secure: str, rules: str, key: str, message: str, write: Write) -> None:
    """With the safer way in the hint; and it never stops the load."""
    file = write(
        f"mesh: m\nsecure: {{mode: enforce, identity: {{folder: x}}{secure}}}\nservices: {{web: {{secure: {{{rules}}}}}}}\n"
    )
    found = [warning for warning in load(file).warnings if message in warning.message]
    assert [f"services.web.secure.{key}"] == [warning.key for warning in found]
    assert all(warning.hint for warning in found)


@pytest.mark.parametrize(
    ("keys", "key", "message"),
    [
        ("secure.xfcc: append_forward", "secure.xfcc", "nobody's header is let in"),
        ("secure.proxies: {cidrs: [10.0.0.0/8], hops: 0}", "secure.proxies.hops", "no address of a proxy is believed"),
        (
            "secure.jwt: {a: {issuer: a, audiences: [m], jwks: 'https://a/k', from: [bearer, {query: t}]}}",
            "secure.jwt.a.from[1]",
            "stands in every log",
        ),
        ("egress: {hosts: [a.test]}", "egress.hosts", "all hosts may be called"),
        (
            "egress: {policy: deny, hosts: ['*.b.test'], credentials: [{host: b.test, env: A}]}",
            "egress.credentials[0].host",
            "it is not under hosts",
        ),
        ("secure.deny: [{from: ['*'], paths: [/a]}]", "secure.deny[0].paths", "DENY by path"),
    ],
)
def test_what_is_weak_in_the_system_is_told_once(keys: str, key: str, message: str, write: Write) -> None:
    """However many services it holds for."""
    inner = keys.removeprefix("secure.") if keys.startswith("secure.") else "paths: strict"
    outer = "deadline: 5" if keys.startswith("secure.") else keys
    file = write(f"mesh: m\nsecure:\n  mode: observe\n  {inner}\n{outer}\nservices: {{web: {{}}, b: {{}}}}\n")
    assert [key] == [found for found, text in _warnings(file) if message in text]


def test_good_rules_bring_no_warning(write: Write) -> None:
    """The documented way: allow the paths that may be called, believe whom the configuration names."""
    file = write("""\
        mesh: m
        secure:
          mode: enforce
          identity: {ca: "https://ca.test"}
          federation: {b.test: {file: b.json}}
          jwt: {a: {issuer: a, audiences: [m], jwks: "https://a/k"}}
          proxies: {identities: [web], cidrs: [10.0.0.0/8]}
          xfcc: append_forward
        egress: {policy: deny, hosts: ["*.a.test"], credentials: [{host: x.a.test, env: A}]}
        services:
          web:
            secure:
              jwt: {require: ["/*"]}
              custom: [{from: ["*"], authorizer: opa}]
              deny: [{from: ["*"], not_request_principals: ["*"]}]
              allow:
                - {from: [web, "spiffe://b.test/x"], methods: [GET], paths: ["/api/{**}"], remote_ip_blocks: [192.0.2.0/24]}
                - {from: ["*"], request_principals: ["a/*"], when: [{key: "request.headers[x-role]", values: [admin]}]}
        """)
    assert _warnings(file) == []


def test_a_trust_domain_that_nobody_can_prove_is_a_warning(write: Write) -> None:
    """Where this file alone says whose bundles there are; a folder may hold more of them."""
    text = """\
        mesh: m
        secure: {{mode: enforce, identity: {{{source}}}}}
        services: {{web: {{secure: {{allow: [{{from: ["*/x"], trust_domains: [m.internal, b.test]}}]}}}}}}
        """
    told = ["services.web.secure.allow[0].from"]
    assert [key for key, message in _warnings(write(text.format(source="ca: 'https://ca.test'"))) if "b.test" in message] == told
    assert _warnings(write(text.format(source="folder: x"))) == []


def test_each_service_says_how_grpc_proves_it(tmp_path: Path) -> None:
    """By itself, or forced; by DNS name also for an identity of another form, beside which our CA writes the service's name."""
    file = tmp_path / "mesh.yaml"
    file.write_text(
        "mesh: m\nsecure: {mode: enforce, identity: {folder: ids}}\nservices:\n  a: {protocol: grpc}\n"
        "  b: {protocol: grpc, identity: 'spiffe://partner.test/b', secure: {peer_check: spiffe}}\n"
        "  c: {protocol: grpc, identity: 'spiffe://m.internal/c', secure: {peer_check: dns}}\n"
        "  d: {protocol: grpc, identity: 'spiffe://partner.test/ns/x/sa/d', secure: {peer_check: dns}}\n"
    )
    config = load(file, service="a")
    assert {name: service.peer_check for name, service in config.services.items()} == {
        "a": "auto",
        "b": "spiffe",
        "c": "dns",
        "d": "dns",
    }
