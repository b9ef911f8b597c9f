"""Does every clause of a policy matter, and does every question about it?

Three policies as people write them, with every kind of clause among them, and beside each a table of questions with their answers. The answers
hold; and if any clause, any entry of a list or any rule is deleted, at least one of them is another one, or the file can't be loaded any more.
So a condition that the gate stopped to look at can't hide, nor one that was lost on the way from the file to the gate. The other way round,
each question is there for a reason: some deletion changes its answer.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import yaml

from meshlib._native import core
from meshlib.config import load
from meshlib.errors import ConfigError
from tests.secure.cases import pki, tokens

POLICIES = Path(__file__).with_name("policies")
NAMES = ("shop", "bank", "edge")
ISSUERS = {
    "people": "https://id.bank.example",
    "partners": "https://partners.bank.example",
    "machines": "https://machines.bank.example",
    "nobody": "https://nobody.example",
}
WALL = 1_700_000_000.0

Place = tuple[str | int, ...]
Answers = tuple[str, ...]
# What a policy may lose and be the same one: names are for people, and `name`less rules are called otherwise.
NOT_CLAUSES = {"name", "authorizer", "mode", "trust_domain", "identity", "issuer", "jwks", "file", "key", "federation"}


# ------------------------------------------------------------------------------------------------ policies and questions


@lru_cache(maxsize=8)
def policy_of(name: str) -> Any:
    return yaml.safe_load((POLICIES / f"{name}.yaml").read_text())


@lru_cache(maxsize=8)
def table_of(name: str) -> Any:
    return yaml.safe_load((POLICIES / f"{name}.questions.yaml").read_text())


def gate_of(policy: Any, service: str, folder: Path) -> core.Gate:
    """The gate of a service under a policy. Raises ConfigError."""
    (folder / "mesh.yaml").write_text(json.dumps(policy))
    config = load(folder / "mesh.yaml", service=service)
    gate = core.Gate()
    gate.publish(config.server_plan(), 0.0)
    for provider in config.own.providers:
        gate.keys(provider, json.dumps({"keys": [tokens.jwk("rsa", "k1"), tokens.jwk("ec", "k2")]}).encode())
    return gate


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the files are that a policy names."""
    from meshlib.secure import bundle

    tmp_path = tmp_path_factory.mktemp("policies")
    root = pki.authority("partner").certificate.public_bytes(pki.serialization.Encoding.DER)
    (tmp_path / "partner.json").write_bytes(bundle.format(bundle.Bundle((root,))))
    (tmp_path / "keys.json").write_text(json.dumps({"keys": [tokens.jwk("rsa", "k1"), tokens.jwk("ec", "k2")]}))
    return tmp_path


def asked(gate: core.Gate, question: dict[str, Any], trust_domain: str) -> tuple[str, str, bool]:
    """The answer to one question, the rule that gave it, and whether a trial would have refused."""
    target, fields = question["target"], [("host", question.get("host", "site.example"))]
    fields += list(question.get("headers", {}).items())
    if "xff" in question:
        fields.append(("x-forwarded-for", question["xff"]))
    if "token" in question:
        target = _with_token(question, target, fields)
    entry = gate.begin(
        question.get("method", "GET"),
        target.encode(),
        [(name.encode(), value.encode()) for name, value in fields],
        _caller(question["from"], trust_domain),
        True,
        0.0,
        wall=WALL,
        source=question.get("source", "192.0.2.1"),
        port=question.get("port", 8443),
        sni=question.get("sni", "site.example"),
    )
    entry.finish(200, 0.0)
    if entry.status == 0:
        return (f"ask {entry.custom}" if entry.custom else "allow"), entry.rule, entry.would_deny
    return {401: "needs_token", 403: "deny"}.get(entry.status, str(entry.status)), entry.rule, entry.would_deny


def _caller(name: str, trust_domain: str) -> str:
    if name.startswith("spiffe://"):
        return name
    namespace, slash, service = name.partition("/")
    return f"spiffe://{trust_domain}/ns/{namespace}/sa/{service}" if slash else f"spiffe://{trust_domain}/ns/default/sa/{name}"


def _with_token(question: dict[str, Any], target: str, fields: list[tuple[str, str]]) -> str:
    """Put the token of a question where it belongs; answers the target, which it may stand in."""
    provider = question.get("by", "people")
    token = _token(provider, json.dumps(question["token"]), question.get("alg", "RS256"))
    place = question.get("place", "header")
    if place == "cookie":
        fields.append(("cookie", f"theme=dark; session={token}"))
    elif place == "query":
        return f"{target}?a=b&access_token={quote(token)}"
    elif provider == "partners":
        fields.append(("x-partner-token", token))
    else:
        fields.append(("authorization", f"Bearer {token}"))
    return target


@lru_cache(maxsize=256)
def _token(provider: str, claims: str, alg: str) -> str:
    signer = ("rsa:k1", "k1") if alg == "RS256" else ("ec:k2", "k2")
    whole = {"iss": ISSUERS[provider], "aud": "accounts", "exp": int(WALL) + 600, **json.loads(claims)}
    return tokens.issued({"alg": alg, "kid": signer[1]}, whole, signer[0])


@dataclass(frozen=True)
class Deletion:
    """A part of a policy that can be left out."""

    place: Place

    @property
    def words(self) -> str:
        return "/".join(map(str, self.place))

    def applied(self, policy: Any) -> Any:
        changed = copy.deepcopy(policy)
        parent = changed
        for step in self.place[:-1]:
            parent = parent[step]
        last = self.place[-1]
        if last == "from":
            # Whom a rule speaks of has to be said: without it, it would be everyone.
            parent[last] = ["*"]
        else:
            del parent[last]
        return changed


@lru_cache(maxsize=1024)
def answers(name: str, deletion: Deletion | None, folder: Path) -> Answers:
    """The answers to all questions under a policy without a part of it; one word for one that can't be loaded."""
    table, policy = table_of(name), policy_of(name)
    if deletion is not None:
        policy = deletion.applied(policy)
    try:
        gate = gate_of(policy, table["service"], folder)
    except ConfigError:
        return ("can't be loaded",)
    trust_domain = policy["secure"]["trust_domain"]
    found = [asked(gate, question, trust_domain) for question in table["questions"]]
    return tuple(f"{answer}{' (would be denied)' if would_deny else ''}" for answer, _, would_deny in found)


# ------------------------------------------------------------------------------------------------ deletions


def deletions(policy: Any, name: str) -> Iterator[Deletion]:
    """Every rule, clause and entry of the system's and the service's policy."""
    service = table_of(name)["service"]
    own = policy["services"][service]["secure"]
    for deletion in (*_within(policy["secure"], ("secure",)), *_within(own, ("services", service, "secure"))):
        # Of the system's issuers the service takes some; the others are there for others.
        if deletion.place[1] != "jwt" or len(deletion.place) < 3 or deletion.place[2] in own["jwt"]["providers"]:
            yield deletion


def _within(part: Any, place: Place) -> Iterator[Deletion]:
    steps: list[tuple[str | int, Any]] = list(part.items()) if isinstance(part, dict) else list(enumerate(part))
    for step, value in steps:
        here = (*place, step)
        if step in NOT_CLAUSES or (step == "from" and value == ["*"]):
            continue
        # The only entry of a list is the clause itself.
        if not (isinstance(part, list) and len(part) == 1):
            yield Deletion(here)
        if isinstance(value, dict | list):
            yield from _within(value, here)


CASES = [(name, deletion) for name in NAMES for deletion in deletions(policy_of(name), name)]
KINDS = {
    "from", "not_from", "trust_domains", "namespaces", "not_namespaces", "request_principals", "not_request_principals", "ip_blocks",
    "not_ip_blocks", "remote_ip_blocks", "not_remote_ip_blocks", "methods", "not_methods", "paths", "not_paths", "path_regexes",
    "not_path_regexes", "case", "hosts", "not_hosts", "ports", "not_ports", "when", "values", "not_values", "dry_run",
}  # fmt: skip


# ------------------------------------------------------------------------------------------------ tests


@pytest.mark.parametrize("name", NAMES)
def test_every_question_has_its_answer(name: str, folder: Path) -> None:
    """The policy means what its table says, rule by rule."""
    policy, table = policy_of(name), table_of(name)
    gate = gate_of(policy, table["service"], folder)
    wrong = []
    for question in table["questions"]:
        answer, rule, would_deny = asked(gate, question, policy["secure"]["trust_domain"])
        expected = (question["answer"], question.get("rule", rule), question.get("would_deny", False))
        if (answer, rule, would_deny) != expected:
            wrong.append((question, answer, rule, would_deny))
    assert wrong == []


@pytest.mark.parametrize(("name", "deletion"), [pytest.param(name, cut, id=f"{name}:{cut.words}") for name, cut in CASES])
def test_deleting_any_clause_changes_an_answer(name: str, deletion: Deletion, folder: Path) -> None:
    """A clause that could be left out unnoticed would be one that nobody tests."""
    before, after = answers(name, None, folder), answers(name, deletion, folder)
    assert before != after, f"without {deletion.words} all answers are the same"


@pytest.mark.parametrize("name", NAMES)
def test_no_question_is_idle(name: str, folder: Path) -> None:
    """Each question is answered otherwise without something in the policy; one that never is tests nothing."""
    before = answers(name, None, folder)
    changed: set[int] = set()
    for deletion in deletions(policy_of(name), name):
        after = answers(name, deletion, folder)
        if len(after) == len(before):
            changed |= {number for number, (was, now) in enumerate(zip(before, after, strict=True)) if was != now}
    idle = [table_of(name)["questions"][number] for number in range(len(before)) if number not in changed]
    assert idle == []


def test_every_kind_of_clause_stands_in_one_of_the_policies() -> None:
    """Whatever a rule may say is said somewhere here."""
    from meshlib.config.secure_document import Rule, When

    said = {step for _, deletion in CASES for step in deletion.place if isinstance(step, str)}
    known = {field.alias or name for model in (Rule, When) for name, field in model.model_fields.items()}
    assert known - {"name", "key"} == KINDS
    assert said >= KINDS
