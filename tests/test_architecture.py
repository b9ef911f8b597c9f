"""Do the arrows point down? The rules of dependency, read from the sources themselves.

mesh → client, server → phases → config, call → _native → errors. Phases never import one another; only `_native/__init__.py` imports the
extension; nothing imports `testing`; integrations import public names only.
"""

from __future__ import annotations

import ast
import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "meshlib"
PHASES = {"discover", "route", "retry", "balance", "admit", "secure", "observe"}

# What stands higher may import what stands lower.
TIERS = {
    "errors": 0,
    "_native": 1,
    "call": 2,
    "keeper": 2,
    "config": 2,
    **dict.fromkeys(PHASES, 3),
    "client": 4,
    "server": 4,
    "reload": 4,
    "upkeep": 5,
    "mesh": 6,
    "__init__": 7,
    "testing": 8,
    "agent": 8,
    "cli": 9,  # `meshlib agent run` runs the agent
}
# A Call carries its record as data; putting it into words is observe's, and is asked for only when a person wants to read.
REACHES_UP = {("call.py", "meshlib.observe.explain.explain")}
# Packages that may be imported at will, and extras that one file each may import.
FREE = {
    "cryptography", "grpc", "httpx", "jwt", "opentelemetry", "pybreaker", "pydantic", "pydantic_core", "tenacity", "yaml", "_typeshed",
}  # fmt: skip
EXTRAS = {
    "uvicorn": {"server/uvicorn.py", "server/serve.py"},
    "gunicorn": {"server/gunicorn.py", "server/serve.py"},
    "h11": {"server/head.py", "secure/authority_server.py"},  # comes with httpx and with uvicorn
    "httptools": {"server/head.py"},
    "rich": {"cli"},
    "h2": {"agent"},
    "hyperframe": {"agent"},
    "google": {"agent"},  # protobuf
    "dns": {"discover/srv.py"},  # dnspython
}


def modules() -> list[Path]:
    return sorted(p for p in PACKAGE.rglob("*.py") if "target" not in p.parts)


def imports(path: Path) -> list[tuple[str, bool]]:
    """Absolute dotted names that a module imports, and whether at run time (False under TYPE_CHECKING)."""
    tree = ast.parse(path.read_text(), str(path))
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    package = ["meshlib", *path.relative_to(PACKAGE).with_suffix("").parts]
    package = package[:-1]
    found: list[tuple[str, bool]] = []
    for node in ast.walk(tree):
        live = id(node) not in typing_only
        if isinstance(node, ast.Import):
            found += [(alias.name, live) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            name = ".".join([*base, *(node.module.split(".") if node.module else [])])
            found += [(f"{name}.{alias.name}", live) for alias in node.names]
    return found


def tier_of(dotted: str) -> str | None:
    parts = dotted.split(".")
    if parts[0] != "meshlib":
        return None
    return parts[1] if len(parts) > 1 and parts[1] in TIERS else "__init__"


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_downward(path: Path) -> None:
    """A module imports only what stands lower, and no phase imports another."""
    own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    wrong = []
    for name, is_live in imports(path):
        tier = tier_of(name)
        if not is_live or tier is None or tier == own or own == "__init__":
            continue
        if (str(path.relative_to(PACKAGE)), name) in REACHES_UP:
            continue
        if tier == "testing" or TIERS[tier] >= TIERS[own]:
            wrong.append(name)
    assert wrong == []


def test_only_the_door_imports_the_extension() -> None:
    """`_core` is imported in one place, where its version is checked."""
    wrong = [
        str(path.relative_to(PACKAGE))
        for path in modules()
        for name, _ in imports(path)
        if name.startswith("meshlib._native._core") and path != PACKAGE / "_native" / "__init__.py"
    ]
    assert wrong == []


def test_foreign_packages_are_agreed() -> None:
    """What meshlib imports from others is on the list of its dependencies, extras in their own files."""
    import sys

    wrong = []
    for path in modules():
        here = str(path.relative_to(PACKAGE))
        for name, live in imports(path):
            top = name.split(".")[0]
            if top in {"meshlib", "__future__"} or top in sys.stdlib_module_names or top in FREE or not live:
                continue
            places = EXTRAS.get(top, set())
            if here not in places and here.split("/")[0] not in places:
                wrong.append((here, name))
    assert wrong == []


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_file_opens_with_the_question_it_answers(path: Path) -> None:
    """The first paragraph of a module's docstring holds a question."""
    text = ast.get_docstring(ast.parse(path.read_text()))
    assert text, "no docstring"
    assert "?" in text.split("\n\n")[0] or path.name == "way.py" or path.parent.name == "cli", text.split("\n")[0]


def crate(name: str) -> dict[str, object]:
    return tomllib.loads((PACKAGE / "_native" / name / "Cargo.toml").read_text())


def test_core_and_wire_know_no_python_and_no_runtime() -> None:
    """The crates' own boundaries: pyo3 only in the binding, tokio's runtime nowhere but in the proxy."""
    for name in ("core", "wire"):
        needs = set(crate(name)["dependencies"])  # type: ignore[call-overload]
        assert needs & {"pyo3", "hyper", "mesh-core", "mesh-wire", "mesh-binding"} == set()
    # The wire implements tokio's traits for `h2`, which it polls by hand. What is compiled: tests/wire/test_http2_runtime.py.
    assert "tokio" not in crate("core")["dependencies"]  # type: ignore[operator]
    workspace = tomllib.loads((PACKAGE / "_native" / "Cargo.toml").read_text())["workspace"]["dependencies"]
    assert workspace["tokio"] == {"version": "1", "default-features": False}
    assert crate("wire")["dependencies"]["tokio"] == {"workspace": True}  # type: ignore[index]
    # Of all crates only the proxy asks for a runtime, and for no more of it than one thread, sockets and timers.
    runtime = crate("proxy")["dependencies"]["tokio"]  # type: ignore[index]
    assert set(runtime.pop("features")) == {"rt", "net", "time", "sync", "io-util"}
    assert runtime == {"workspace": True}
    assert set(crate("binding")["dependencies"]) & {"tokio", "hyper", "h2"} == set()  # type: ignore[call-overload]
    assert set(crate("proxy")["dependencies"]) & {"pyo3", "mesh-core", "mesh-binding"} == set()  # type: ignore[call-overload]
    assert "mesh-wire" not in crate("core")["dependencies"]  # type: ignore[operator]


def test_core_and_wire_read_no_clock_and_open_no_socket() -> None:
    """`now` is an argument, bytes come in and go out."""
    banned = re.compile(r"Instant::now|SystemTime::now|std::net|std::fs|std::thread|std::env")
    wrong = []
    for name in ("core", "wire"):
        for path in sorted((PACKAGE / "_native" / name / "src").rglob("*.rs")):
            text = path.read_text()
            is_test = path.name == "tests.rs" or "tests" in path.parts
            live = "" if is_test else text.split("#[cfg(test)]\nmod tests")[0]
            wrong += [f"{path.name}: {hit}" for hit in banned.findall(live)]
    assert wrong == []


def test_phases_of_the_core_never_call_one_another() -> None:
    """They meet in client.rs and server.rs; `model` and `random` are for all."""
    phases = {"route", "retry", "balance", "admit", "secure", "observe"}
    wrong = []
    for phase in sorted(phases):
        base = PACKAGE / "_native" / "core" / "src"
        for path in [base / f"{phase}.rs", *sorted((base / phase).rglob("*.rs"))]:
            used = set(re.findall(r"crate::(\w+)", path.read_text()))
            wrong += [f"{path.name} uses {other}" for other in sorted(used & (phases | {"client", "server"}) - {phase})]
    assert wrong == []


def test_unsafe_code_is_forbidden_outside_the_binding() -> None:
    """The workspace forbids it; each crate but the binding inherits that."""
    workspace = tomllib.loads((PACKAGE / "_native" / "Cargo.toml").read_text())
    assert workspace["workspace"]["lints"]["rust"]["unsafe_code"] == "forbid"
    for name in ("core", "wire", "proxy"):
        assert crate(name)["lints"] == {"workspace": True}
