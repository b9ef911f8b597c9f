"""Does any server let a request reach a handler that the oracle denies?

The collected attacks on paths, and spellings made of their pieces, over raw sockets to every server that people use, with the mesh's middleware
on and an application with real routes behind it. Servers hand over paths in ways of their own (see each one's tests); whatever they make of a
target, a handler runs only if the oracle allows that very target, and sees the oracle's form of it. The oracle and the cases are read
where they are; without them these tests skip.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import random
import signal
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from meshlib.errors import ConfigError
from tests.secure.cases import Case, ground
from tests.secure.cases.path_host import FOLDER, KINDS
from tests.secure.cases.paths import _providers, own_of
from tests.support import PYTHON, ROOT, free_port, process, wait_until_listening

BESIDE = ROOT.parent / "shared" / "cases" / "attack_cases.jsonl"
CASES = Path(os.environ.get("MESHLIB_ATTACK_CASES", BESIDE))
ORACLE = next(
    (file for file in (CASES.with_name("path_reference.py"), BESIDE.with_name("path_reference.py")) if file.exists()),
    CASES.with_name("path_reference.py"),
)
if not CASES.exists() or not ORACLE.exists():
    pytest.skip(f"the attack cases and their oracle are not here ({CASES.name}, {ORACLE.name})", allow_module_level=True)

GENERATED = 40
# These hand over the decoded path alone, and mend what can't be decoded: what the target was is lost, and what the handler sees is judged.
LOSSY = {"granian-wsgi"}
PIECES = [
    "/",
    "//",
    ".",
    "..",
    "/./",
    "/../",
    "%2e",
    "%2E",
    "%2f",
    "%2F",
    "%5c",
    "\\",
    ";",
    ";a=b",
    "%3b",
    "?",
    "#",
    "%23",
    "%25",
    "%252f",
    "%00",
    "%0a",
    "%0d",
    "%20",
    "%7f",
    "%c3%a9",
    "%ff",
    "%c0%af",
    "admin",
    "Admin",
    "public",
    "x",
    "*",
    "@",
    ":",
    "http://",
    "svc.local",
    "https://svc.local",
    "+",
    ",",
    "&",
    "=",
    "~",
]


def _oracle() -> Any:
    spec = importlib.util.spec_from_file_location("path_reference", ORACLE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


oracle = _oracle()


class Policies:
    """The policies of the cases, each as a file of its own for the servers, with the targets that are tried under it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.all: list[tuple[dict[str, Any], str, list[tuple[str, str]]]] = []
        chance = random.Random(20240229)
        made = ["/" * chance.randint(0, 1) + "".join(chance.choices(PIECES, k=chance.randint(1, 6))) for _ in range(GENERATED)]
        for policy, targets in _by_policy().items():
            more = [("GET", target) for target in made] if policy in ('{"deny": ["/admin"]}', '{"allow": ["/public"]}') else []
            for paths in ("canonical", "strict"):
                self._add(json.loads(policy), paths, [*targets, *more])
        (folder / "policy").write_bytes(bytes(4))

    def _add(self, policy: dict[str, Any], paths: str, targets: list[tuple[str, str]]) -> None:
        content = ground.document({"paths": paths, **_providers(policy)}, own_of(Case("", "path_authz", "", policy)))
        ground.mesh_of(content)
        (self.folder / f"{len(self.all) + 1}.yaml").write_text(json.dumps(content))
        self.all.append((policy, paths, targets))

    def choose(self, number: int) -> None:
        with (self.folder / "policy").open("r+b") as file:
            os.pwrite(file.fileno(), number.to_bytes(4, "little"), 0)


def _by_policy() -> dict[str, list[tuple[str, str]]]:
    found: dict[str, list[tuple[str, str]]] = {}
    for text in CASES.read_text(encoding="utf-8").splitlines():
        case = json.loads(text)
        if case["area"] != "path_authz":
            continue
        given = case["input"] if isinstance(case["input"], dict) else {"target": case["input"]}
        found.setdefault(json.dumps(case["policy"], sort_keys=True), []).append((given.get("method", "GET"), given["target"]))
    return found


@pytest.fixture(scope="module")
def policies(tmp_path_factory: pytest.TempPathFactory) -> Policies:
    try:
        return Policies(tmp_path_factory.mktemp("paths"))
    except ConfigError as error:  # pragma: no cover - says which policy the configuration can't express
        raise AssertionError(f"a policy of the cases can't be written: {error}") from error


@pytest.fixture(scope="module")
def ports(policies: Policies) -> Iterator[dict[str, int]]:
    """All servers at once: they start together."""
    found: dict[str, int] = {}
    with ExitStack() as stack:
        children = {}
        for kind in KINDS:
            found[kind] = free_port()
            env = {FOLDER: str(policies.folder), "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
            command = (PYTHON, "-m", "tests.secure.cases.path_host", kind, str(found[kind]))
            children[kind] = stack.enter_context(process(*command, env=env))
        for kind, child in children.items():
            wait_until_listening(found[kind], child, seconds=60)
        yield found
        for child in children.values():
            # Nothing is under way, and some take seconds to end in peace.
            os.killpg(child.pid, signal.SIGKILL)


def asked(port: int, method: str, target: str) -> tuple[int, str | None]:
    """The status of the answer, and what the handler that ran says of itself; 0 for a connection that was closed without a word."""
    with socket.create_connection(("127.0.0.1", port), 5) as plug:
        head = f"{method} {target} HTTP/1.1\r\nHost: svc.local\r\nConnection: close\r\n\r\n"
        plug.sendall(head.encode("latin-1"))
        answer = b""
        try:
            while b"\r\n\r\n" not in answer and (data := plug.recv(65536)):
                answer += data
        except (ConnectionError, TimeoutError):
            pass
    lines = answer.split(b"\r\n\r\n")[0].decode("latin-1").split("\r\n")
    reached = next((line.partition(":")[2].strip() for line in lines if line.lower().startswith("x-reached:")), None)
    return (int(lines[0].split(" ")[1]) if lines[0].startswith("HTTP/") else 0), reached


def faults(kind: str, port: int, policy: dict[str, Any], paths: str, targets: list[tuple[str, str]]) -> list[str]:
    """Each request that reached a handler which the oracle denies, or saw another path than the oracle's."""
    found = []
    for method, target in targets:
        status, reached = asked(port, method, target)
        expected = "400" if paths == "strict" and oracle.refused_by_strict(target) else oracle.decide(target, policy, method)
        if reached is None:
            continue
        route, _, shown = reached.partition(" ")
        seen = ast.literal_eval(shown)
        if expected == "400" and kind in LOSSY:
            if oracle.decide(quote(seen, safe="/"), policy, method) != "allow":
                found.append(f"{method} {target!r} under {policy}: the handler of {route} ran for {seen!r}")
        elif expected != "allow":
            found.append(
                f"{method} {target!r} under {policy} ({paths}) is {expected}, and reached {route} with {seen!r} ({status})"
            )
        elif seen != oracle.canon(target, method):
            found.append(f"{method} {target!r}: the handler of {route} saw {seen!r}, not {oracle.canon(target, method)!r}")
        elif oracle.decide(quote(seen, safe="/"), policy) == "deny":
            found.append(f"{method} {target!r} under {policy}: the handler of {route} ran for {seen!r}")
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_no_request_reaches_a_handler_that_the_oracle_denies(kind: str, ports: dict[str, int], policies: Policies) -> None:
    """Every case under its policy, and some more spellings, as they are and under `paths: strict`."""
    found = []
    for number, (policy, paths, targets) in enumerate(policies.all, 1):
        policies.choose(number)
        found += faults(kind, ports[kind], policy, paths, targets)
    assert found == []


@pytest.mark.parametrize("kind", KINDS)
def test_what_the_oracle_allows_is_served(kind: str, ports: dict[str, int], policies: Policies) -> None:
    """A server behind which nothing is ever reached would pass the test above."""
    number = next(
        index
        for index, (policy, paths, _) in enumerate(policies.all, 1)
        if policy == {"deny": ["/admin"]} and paths == "canonical"
    )
    policies.choose(number)
    assert asked(ports[kind], "GET", "/public") == (200, "/public '/public'")
    assert asked(ports[kind], "GET", "/x/../public")[1] == "/public '/public'"
    assert asked(ports[kind], "GET", "//public?x#y")[1] == "/public '/public'"
    assert asked(ports[kind], "GET", "/admin") == (403, None)


@pytest.mark.parametrize("kind", KINDS)
def test_without_the_middleware_denied_handlers_are_reached(kind: str, ports: dict[str, int], policies: Policies) -> None:
    """The test can tell: the same requests, with nothing in between."""
    policy, paths, targets = next(entry for entry in policies.all if entry[0] == {"deny": ["/admin"]} and entry[1] == "canonical")
    policies.choose(0)
    assert len(faults(kind, ports[kind], policy, paths, targets)) > 5
