"""Applied, does what `meshlib suggest` proposes allow every recorded call and nothing else? And does it say what it leaves out?"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from meshlib import cli
from meshlib._native import core
from meshlib.cli.suggest import suggest
from meshlib.config import examine, load
from meshlib.observe.traffic import Recorder, read

DOMAIN = "shop.internal"
FOREIGN = f"spiffe://{DOMAIN}/ns/batch/sa/nightly"
Call = tuple[str, str, str]  # caller, method, path


class System:
    """A configuration in a folder, and what its processes record."""

    def __init__(self, folder: Path, services: dict[str, Any] | None = None, mode: str = "permissive", **secure: Any) -> None:
        self.folder = folder
        self.services = services or {"orders": {"listen": "127.0.0.1:1"}}
        self.secure = {"mode": mode, "trust_domain": DOMAIN, "identity": {"folder": "identities"}, "record": True, **secure}
        self.write()

    @property
    def file(self) -> Path:
        return self.folder / "mesh.yaml"

    def write(self) -> None:
        services = {**{name: {} for name in ("web", "jobs")}, **self.services}
        self.file.write_text(json.dumps({"mesh": "shop", "secure": self.secure, "services": services}))

    def peer(self, name: str) -> str:
        return name if not name or name.startswith("spiffe:") else f"spiffe://{DOMAIN}/ns/default/sa/{name}"

    def gate(self, service: str = "orders") -> core.Gate:
        gate = core.Gate()
        gate.publish(load(self.file, service=service).server_plan(), 0.0)
        return gate

    def ask(self, gate: core.Gate, call: Call, *, headers: Iterable[tuple[bytes, bytes]] = (), rpc: bool = False) -> int:
        name, method, path = call
        peer = self.peer(name)
        if rpc:
            entry = gate.begin_grpc(path, peer, bool(peer), 0.0)
        else:
            target = path if path == "*" else quote(path, safe="/")
            entry = gate.begin(method, target.encode(), [(b"host", b"orders"), *headers], peer, bool(peer), 0.0)
        if not entry.status:
            entry.finish(200, 0.0)
        return int(entry.status)

    def record(self, calls: Iterable[Call], service: str = "orders", **more: Any) -> None:
        """Real calls through a real gate, written down as the keeper does."""
        config = load(self.file, service=service)
        assert config.record is not None
        gate, recorder = self.gate(service), Recorder(config.record, service)
        for call in calls:
            self.ask(gate, call, **more)
        rows, lost = gate.traffic()
        recorder.take(rows, lost, config.own.mode)
        recorder.flush()

    def suggest(self, **options: Any) -> str:
        text, problems = suggest(examine(self.file), read([self.folder / ".meshlib" / "traffic"]), **options)
        assert problems == []
        return text

    def apply(self, text: str) -> None:
        """Put what is proposed into the configuration, and enforce it."""
        for name, service in yaml.safe_load(text)["services"].items():
            own = self.services.setdefault(name, {})
            own["secure"] = {**own.get("secure", {}), **service["secure"]}
        self.secure["mode"] = "enforce"
        self.write()


def comments(text: str, head: str) -> list[str]:
    """The list of comments under a head."""
    lines = iter(text.splitlines())
    for line in lines:
        if line.strip().startswith(f"# {head}"):
            found = []
            for item in lines:
                if not item.startswith("      #   "):
                    break
                found.append(item.removeprefix("      #   "))
            return found
    return []


# ---------------------------------------------------------------- the proof

SEGMENTS = st.sampled_from(
    ["orders", "items", "7", "0123456789abcdef", "me", "a*", "{x}", "b c", "ä", "100%", "x?y", "q#r", "a;b", "a-b"]
)
PATHS = st.lists(SEGMENTS, min_size=0, max_size=4).flatmap(
    lambda parts: st.sampled_from(["/" + "/".join(parts), *(["/" + "/".join(parts) + "/"] if parts else [])])
)
CALLERS = st.sampled_from(["web", "jobs", FOREIGN])
METHODS = st.sampled_from(["GET", "HEAD", "POST", "DELETE"])
CALLS = st.tuples(CALLERS, METHODS, PATHS)


def shape(path: str) -> tuple[str, ...]:
    """What a call stands for, in the test's own words: ids are alike. A path with braces is not generalised."""
    parts = path.split("/")
    is_plain = "{" not in path and "}" not in path
    return tuple(":id" if is_plain and re.fullmatch("[0-9]+|[0-9a-f]{16}", part) else part for part in parts)


def is_like(known: tuple[str, ...], path: str) -> bool:
    parts = path.split("/")
    return len(parts) == len(known) and all(
        bool(part) if want == ":id" else part == want for part, want in zip(parts, known, strict=True)
    )


@given(
    calls=st.lists(CALLS, min_size=1, max_size=12),
    others=st.lists(CALLS, max_size=12),
    mode=st.sampled_from(["observe", "permissive"]),
)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_applied_it_allows_what_was_recorded_and_refuses_everything_else(
    tmp_path_factory: pytest.TempPathFactory, calls: list[Call], others: list[Call], mode: str
) -> None:
    """Real calls through a gate that records; the text into mesh.yaml; the same calls, and others, through a gate that enforces."""
    system = System(tmp_path_factory.mktemp("system"), mode=mode)
    system.record(calls)
    system.apply(system.suggest())
    gate = system.gate()
    assert [system.ask(gate, call) for call in calls] == [0] * len(calls)
    # A path with parameters is also read without them.
    seen = [(caller, method, shape(text)) for caller, method, path in calls for text in (path, path.replace("a;b", "a"))]
    strangers = [
        (caller, method, path) for method, path in {call[1:] for call in calls} for caller in ("stranger", "web", "jobs", FOREIGN)
    ]
    more = [(caller, method, path) for caller, _, path in calls for method in ("GET", "PUT", "PATCH", "OPTIONS")]
    for caller, method, path in [*others, *strangers, *more]:
        readings = (path, path.replace("a;b", "a"))
        is_seen = all(any((caller, method) == known[:2] and is_like(known[2], text) for known in seen) for text in readings)
        assert (system.ask(gate, (caller, method, path)) == 0) is is_seen, (caller, method, path)
    assert system.ask(gate, ("", *calls[0][1:])) == 401


def test_generalised_it_still_refuses_what_was_refused(tmp_path: Path) -> None:
    """Positions with many values become variables, but not over a call that a process refused."""
    system = System(tmp_path)
    system.record([("web", "GET", f"/users/{name}/profile") for name in "abcdefg"])
    system.record([("web", "GET", f"/teams/{name}") for name in "abcdefg"])
    system.secure["mode"] = "enforce"
    system.write()
    system.record([("jobs", "GET", "/users/admin/profile")])
    system.apply(system.suggest(most=5))
    gate = system.gate()
    asked = ["/teams/new", "/users/a/profile", "/users/new/profile", "/users/admin/profile"]
    assert [system.ask(gate, ("web", "GET", path)) for path in asked] == [0, 0, 403, 403]


@pytest.mark.parametrize("rule", [{"path_regexes": ["/items/[0-9]+"]}, {"paths": ["/items/7"]}])
def test_an_id_that_was_seen_is_no_way_to_what_was_refused_beside_it(tmp_path: Path, rule: dict[str, Any]) -> None:
    """A template would be one: any segment stands for its variable."""
    system = System(tmp_path, {"orders": {"secure": {"allow": [{"from": ["web"], "methods": ["GET"], **rule}]}}}, mode="enforce")
    system.record([("web", "GET", "/items/7"), ("web", "GET", "/items/export-all")])
    system.apply(system.suggest())
    gate = system.gate()
    assert [system.ask(gate, ("web", "GET", f"/items/{name}")) for name in ("7", "8", "export-all", "x")] == [0, 0, 403, 403]


def test_an_id_that_was_seen_is_no_way_around_the_conditions_of_a_rule(tmp_path: Path) -> None:
    """Neither of what they let in, nor of what they refused."""
    admin = ((b"x-role", b"admin"),)
    allow = [{**CONDITION, "paths": ["/items/export-all", "/items/purge"]}, {"from": ["web"], "paths": ["/items/7"]}]
    system = System(tmp_path, {"orders": {"secure": {"allow": allow}}})
    system.record([("web", "GET", "/items/7"), ("web", "GET", "/items/purge")])
    system.record([("web", "GET", "/items/export-all")], headers=admin)
    system.apply(system.suggest())
    gate = system.gate()
    assert [system.ask(gate, ("web", "GET", f"/items/{name}")) for name in ("7", "export-all", "purge")] == [0, 403, 403]
    assert system.ask(gate, ("web", "GET", "/items/export-all"), headers=admin) == 0


def test_a_rule_that_cant_keep_out_what_was_refused_is_a_problem(tmp_path: Path) -> None:
    """Of a route's variable the record has no values: a person has to say what it may be."""
    system = System(tmp_path, {"orders": {"route": [{"match": {"path": {"template": "/items/{item}"}}}]}}, mode="enforce")
    config = load(system.file, service="orders")
    assert config.record is not None
    recorder = Recorder(config.record, "orders")
    call = {"peer": system.peer("web"), "method": "GET", "protocol": "http", "principal": "", "count": 1}
    rows = [("/items/x", "/items/{item}", "allow"), ("/items/export-all", "", "deny")]
    recorder.take([{**call, "path": path, "route": route, "verdict": verdict} for path, route, verdict in rows], 0, "enforce")
    recorder.flush()
    text, problems = suggest(examine(system.file), read([config.record]))
    assert [("GET /items/export-all" in problem, "by hand" in problem) for problem in problems] == [(True, True)]
    assert "/items/{item}" in text


def test_grpc_is_proposed_by_method(tmp_path: Path) -> None:
    """Exactly, and for gRPC calls."""
    system = System(tmp_path, {"orders": {"listen": "127.0.0.1:1", "protocol": "grpc"}})
    system.record([("web", "POST", "/shop.Inventory/Reserve")], rpc=True)
    system.apply(system.suggest())
    gate = system.gate()
    asked = [
        ("web", "POST", "/shop.Inventory/Reserve"),
        ("web", "POST", "/shop.Inventory/Drop"),
        ("jobs", "POST", "/shop.Inventory/Reserve"),
    ]
    assert [system.ask(gate, call, rpc=True) == 0 for call in asked] == [True, False, False]


# ---------------------------------------------------------------- the text


def test_the_text_is_ready_to_be_pasted(tmp_path: Path) -> None:
    """Services by their names, others by their SPIFFE IDs; grouped; with what was seen; and nothing in it that YAML reads otherwise."""
    system = System(tmp_path)
    system.record(
        [(caller, method, path) for caller in ("web", "jobs") for method in ("GET", "POST") for path in ("/items/7", "/orders")]
    )
    system.record([(FOREIGN, "GET", "/on"), (FOREIGN, "GET", "/a: b, [c]")])
    text = system.suggest()
    rules = yaml.safe_load(text)["services"]["orders"]["secure"]["allow"]
    assert rules == [
        {"name": "nightly", "from": [FOREIGN], "methods": ["GET"], "paths": ["/a: b, [c]", "/on"]},
        {"name": "jobs+web", "from": ["jobs", "web"], "methods": ["GET", "POST"], "paths": ["/orders", "/items/{id}"]},
    ]
    assert "- {name: jobs+web" not in text  # a plus is no plain letter
    assert "        # 8 calls, " in text
    assert "{id} or another name in braces is any one segment" in text
    assert text.startswith("# What was seen, and nothing else") and text.endswith("\n")


def test_the_same_records_give_the_same_text(tmp_path: Path) -> None:
    """In whatever order they were written."""
    calls = [(caller, "GET", f"/{name}") for caller in ("web", "jobs", FOREIGN) for name in "abc"]
    texts = []
    for name, order in (("one", calls), ("two", calls[::-1])):
        folder = tmp_path / name
        folder.mkdir()
        system = System(folder)
        for call in order:
            system.record([call])
        texts.append(re.sub("[0-9]{4}-[0-9]{2}-[0-9]{2} [0-9]{2}:[0-9]{2}", "", system.suggest()))
    assert texts[0] == texts[1]
    assert system.suggest() == system.suggest()


def test_calls_without_an_identity_are_told_and_make_no_rule(tmp_path: Path) -> None:
    """A rule for them would be one for anybody."""
    system = System(tmp_path)
    system.record([("", "GET", "/healthz"), ("", "GET", "/healthz"), ("web", "GET", "/x")])
    text = system.suggest()
    assert [line.split(", last")[0] for line in comments(text, "Without an identity")] == ["GET /healthz, 2 calls"]
    assert "*" not in str(yaml.safe_load(text)) and "/healthz" not in str(yaml.safe_load(text))


def test_only_calls_without_an_identity_propose_nothing(tmp_path: Path) -> None:
    """An empty list, which denies."""
    system = System(tmp_path)
    system.record([("", "GET", "/")])
    assert yaml.safe_load(system.suggest())["services"]["orders"]["secure"]["allow"] == []


def test_what_was_refused_stays_so_and_is_told(tmp_path: Path) -> None:
    """Otherwise whoever knocks often enough would write the policy."""
    system = System(tmp_path, {"orders": {"secure": {"allow": [{"from": ["web"]}]}}}, mode="enforce")
    system.record([("web", "GET", "/x"), ("jobs", "GET", "/knock")])
    text = system.suggest()
    assert [line.split(", last")[0] for line in comments(text, "Refused, and in no rule")] == ["jobs: GET /knock, 1 call"]
    assert [rule["from"] for rule in yaml.safe_load(text)["services"]["orders"]["secure"]["allow"]] == [["web"]]


def test_what_a_deny_rule_forbids_is_not_proposed(tmp_path: Path) -> None:
    """An allow rule would be of no use; a dry-run one is told."""
    deny = [
        {"name": "no-jobs", "from": ["jobs"], "paths": ["/secret"]},
        {"name": "soon", "from": ["jobs"], "paths": ["/old"], "dry_run": True},
    ]
    system = System(tmp_path, {"orders": {"secure": {"deny": deny}}})
    system.record([("jobs", "GET", path) for path in ("/secret", "/old", "/x")])
    text = system.suggest()
    assert [line.split(", last")[0] for line in comments(text, "Still denied")] == ["jobs: GET /secret, 1 call"]
    assert [line.split(", last")[0] for line in comments(text, "A dry-run rule")] == ["jobs: GET /old, 1 call"]
    assert "'no-jobs'" in text and "'soon'" in text
    system.apply(text)
    assert [system.ask(system.gate(), ("jobs", "GET", path)) for path in ("/secret", "/old", "/x")] == [403, 0, 0]


CONDITION = {
    "name": "admins",
    "from": ["web"],
    "paths": ["/admin"],
    "when": [{"key": "request.headers[x-role]", "values": ["admin"]}],
}


def test_a_rule_with_conditions_stays_and_isn_t_replaced_by_a_wider_one(tmp_path: Path) -> None:
    """A record has no headers, so that nobody can tell from it what they were."""
    admin = ((b"x-role", b"admin"),)
    system = System(
        tmp_path, {"orders": {"secure": {"allow": [CONDITION, {"from": ["web"], "paths": ["/*"], "methods": ["PUT"]}]}}}
    )
    system.record([("web", "GET", "/admin")], headers=admin)
    system.record([("web", "PUT", "/admin")], headers=admin)
    text = system.suggest()
    assert CONDITION in yaml.safe_load(text)["services"]["orders"]["secure"]["allow"]
    system.apply(text)
    gate = system.gate()
    assert [system.ask(gate, ("web", method, "/admin"), headers=given) for method in ("GET", "PUT") for given in (admin, ())] == [
        0,
        403,
        0,
        0,
    ]


def test_what_only_its_conditions_refused_is_not_let_in(tmp_path: Path) -> None:
    """A caller without the role, in mode permissive: the rule said no for a reason."""
    system = System(tmp_path, {"orders": {"secure": {"allow": [CONDITION]}}})
    system.record([("web", "GET", "/admin")])
    text = system.suggest()
    assert [line.split(", last")[0] for line in comments(text, "Not let in")] == ["web: GET /admin, 1 call"]
    assert yaml.safe_load(text)["services"]["orders"]["secure"]["allow"] == []


def test_what_nobody_used_is_told(tmp_path: Path) -> None:
    """Whole rules, and entries of their lists."""
    allow = [
        {"name": "used", "from": ["web", "jobs"], "methods": ["GET", "POST"], "paths": ["/x", "/y/*", "/z"]},
        {"name": "idle", "from": ["jobs"], "paths": ["/nothing"]},
    ]
    system = System(tmp_path, {"orders": {"secure": {"allow": allow}}}, mode="enforce")
    system.record([("web", "GET", "/x"), ("web", "POST", "/y/1")])
    assert comments(system.suggest(), "Allowed by the present rules") == [
        f"rule 'used', from: spiffe://{DOMAIN}/ns/default/sa/jobs",
        "rule 'used', paths: /z",
        "rule 'idle': nothing of it",
    ]


def test_rules_of_the_whole_system_count_as_present(tmp_path: Path) -> None:
    """They let calls in beside the service's, and that is told."""
    system = System(
        tmp_path, allow=[{"name": "everyone", "from": ["web", "jobs"], "paths": ["/healthz", "/other"]}], mode="enforce"
    )
    system.record([("web", "GET", "/healthz")])
    text = system.suggest()
    assert "secure.allow lets calls into all services" in text
    assert "rule 'everyone', paths: /other" in comments(text, "Allowed by the present rules")


def test_names_in_comments_write_no_lines(tmp_path: Path) -> None:
    """A path may hold nearly anything, and a comment ends with its line."""
    system = System(tmp_path)
    system.record([("", "GET", "/x\u2028- {from: ['*']}"), ("", "GET", "/y\u0085z")])
    text = system.suggest()
    assert "\u2028" not in text and "\u0085" not in text
    assert yaml.safe_load(text)["services"]["orders"]["secure"]["allow"] == []


def test_long_lists_are_cut(tmp_path: Path) -> None:
    """Twenty lines, and how many more."""
    system = System(tmp_path)
    system.record([("", "GET", f"/{first}{second}") for first in "abcdef" for second in "uvwxyz"])
    lines = comments(system.suggest(), "Without an identity")
    assert (len(lines), lines[-1]) == (21, "and 16 more")


# ---------------------------------------------------------------- the command


def run(*arguments: str) -> int:
    return cli.main(["suggest", *arguments])


def test_the_command_reads_the_folder_of_the_configuration(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Or those that it is given; the text goes to the terminal, or to a file that isn't there yet."""
    system = System(tmp_path)
    system.record([("web", "GET", "/x")])
    assert run("--config", str(system.file)) == 0
    text = capsys.readouterr().out
    assert text == system.suggest()
    out = tmp_path / "policy.yaml"
    assert run(str(tmp_path / ".meshlib" / "traffic"), "--config", str(system.file), "--out", str(out)) == 0
    assert (out.read_text(), capsys.readouterr().out) == (text, "")
    assert run("--config", str(system.file), "--out", str(out)) == 1
    assert "nothing is overwritten" in capsys.readouterr().err


def test_since_leaves_out_what_is_older(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By a time or a date."""
    system = System(tmp_path)
    system.record([("web", "GET", "/x")])
    for since, code in (("1h", 0), ("2026-05-01", 0), ("2099-01-01T12:00", 1)):
        assert run("--config", str(system.file), "--since", since) == code
    assert "no recorded calls" in capsys.readouterr().err
    assert run("--config", str(system.file), "--since", "soon") == 2


def test_where_nothing_is_recorded_it_says_what_to_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The switch, or patience."""
    system = System(tmp_path)
    assert run("--config", str(system.file)) == 1
    assert "there are no records in" in capsys.readouterr().err
    system.secure["record"] = False
    system.write()
    assert run("--config", str(system.file)) == 1
    assert "record: true" in capsys.readouterr().err


def test_a_record_with_gaps_is_exit_code_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What was lost, unreadable, or of a service that is gone; the text is there all the same."""
    system = System(tmp_path)
    system.record([("web", "GET", "/x")])
    folder = tmp_path / ".meshlib" / "traffic"
    (folder / "zzz.jsonl").write_text("nonsense")
    gone = Recorder(folder, "gone")
    gone.take(
        [
            {
                **dict.fromkeys(("peer", "route", "principal"), ""),
                "method": "GET",
                "path": "/",
                "protocol": "http",
                "verdict": "allow",
                "count": 1,
            }
        ],
        5,
        "enforce",
    )
    gone.flush()
    assert run("--config", str(system.file)) == 1
    told = capsys.readouterr()
    assert "/x" in told.out
    assert all(words in told.err for words in ("zzz.jsonl", "5 calls found no place", "'gone'"))
