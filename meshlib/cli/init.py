"""`meshlib init`: with what do I begin?

Writes a commented mesh.yaml of at most 30 lines for the service in this folder: its name from pyproject.toml or the
folder, a hint how to serve the application that it finds. It begins in mode observe, which needs no certificates and
refuses nobody, and names the next steps. The folder's code is parsed, never imported. An existing file is not
touched without --force.
"""

from __future__ import annotations

import argparse
import ast
import os
import re
import shlex
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from meshlib.errors import MeshError

_APPS = {"FastAPI", "Flask", "Starlette", "Quart", "Litestar", "get_asgi_application", "get_wsgi_application"}
_SKIPPED = {
    "node_modules",
    "venv",
    "env",
    "site-packages",
    "build",
    "dist",
    "tests",
    "test",
    "migrations",
    "__pycache__",
}
_MOST_FILES = 500

_TEMPLATE = """\
# One file for all services of the system. Check it: meshlib vet {file}   All keys: meshlib schema
mesh: {mesh}{pad_mesh}# the name of the system
secure:
  mode: observe                       # observe (plain, reports), permissive (mTLS where it can), enforce (mTLS, rules)
  # identity: {{folder: ./identities}}  # from permissive on; filled by these two:
  #   meshlib ca init ./ca --trust-domain {mesh}.internal
  #   meshlib ca issue ./ca {service} --out ./identities
  # several machines: identity: {{ca: "https://ca.example:8444", token: ./token}}, with `meshlib ca serve`
# egress: {{policy: deny, hosts: [api.example.com]}}  # default: hosts outside may be called, and are reported
observe:
  metrics: null                       # "127.0.0.1:9464" answers in Prometheus text
services:
  {service}:
    # {serve}
    listen: 127.0.0.1:8000
    protocol: {protocol}{pad_protocol}# http or grpc
    discover: {{static: ["127.0.0.1:8000"]}} # or {{file: endpoints.yaml}}, {{dns: "{service}.internal:8000"}}
    # deadline: 5                     # seconds, or 250ms, 2s, 5m; default 15
    # retry: {{attempts: 1}}            # on another endpoint, only when it is safe
    secure:
      allow:                          # counts in mode enforce, where the rest is denied
        - {{name: anyone, from: ["*"]}} # better: {{from: [storefront], methods: [GET], paths: ["/items/*"]}}
  # Other services: call them by name, http://inventory/…
  # inventory:
  #   discover: {{static: ["127.0.0.1:8001"]}}
"""


@dataclass(frozen=True, slots=True)
class Found:
    """What the folder tells: `app` is module:name, "" where none was seen."""

    app: str = ""
    is_grpc: bool = False


def add(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "init",
        help="write a first mesh.yaml for the service in this folder",
        description="Write a commented mesh.yaml for the service in this folder. It begins in mode observe.",
    )
    parser.add_argument("--service", metavar="NAME", help="default: the name in pyproject.toml, then the folder's")
    parser.add_argument("--out", metavar="FILE", type=Path, default=Path("mesh.yaml"), help="default: mesh.yaml")
    parser.add_argument("--force", action="store_true", help="replace the file if it is there")


def run(args: argparse.Namespace) -> int:
    folder = Path.cwd()
    service = _given(args.service) if args.service else guess_name(folder)
    found = guess_app(folder)
    text = compose(service, found, str(args.out))
    _write(args.out, text, can_replace=args.force)
    print(f"wrote {args.out} for the service {service}" + (f" ({found.app})" if found.app else ""))
    print(f"next: meshlib vet {shlex.quote(str(args.out))}, then: {_serve(service, found, str(args.out))}")
    return 0


def compose(service: str, found: Found, file: str = "mesh.yaml") -> str:
    """The text of the file."""
    protocol = "grpc" if found.is_grpc else "http"
    return _TEMPLATE.format(
        file=file,
        mesh=service,
        pad_mesh=" " * max(1, 32 - len(service)),
        service=service,
        protocol=protocol,
        pad_protocol=" " * 20,
        serve=_serve(service, found, file),
    )


def guess_name(folder: Path) -> str:
    """The project's name in pyproject.toml, else the folder's, in the form of a host name."""
    name = ""
    try:
        project = tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))
        name = project.get("project", {}).get("name") or project.get("tool", {}).get("poetry", {}).get("name") or ""
    except (OSError, ValueError, AttributeError):
        pass  # no project file that tells a name: the folder does
    return _host_name(str(name)) or _host_name(folder.name) or "app"


def guess_app(folder: Path) -> Found:
    """The first application object at the top level of a module, nearest to the folder first."""
    is_grpc = False
    for file in _modules(folder):
        try:
            tree = ast.parse(file.read_text(encoding="utf-8"))
        except (OSError, ValueError, SyntaxError, RecursionError):
            continue  # what can't be read can't be served either
        for node in tree.body:
            if not isinstance(node, ast.Assign | ast.AnnAssign):
                continue
            value = node.value
            if isinstance(value, ast.Call) and _called(value).rsplit(".", 1)[-1] in _APPS:
                target = node.targets[0] if isinstance(node, ast.Assign) else node.target
                if isinstance(target, ast.Name):
                    return Found(f"{_module_name(file, folder)}:{target.id}")
        is_grpc = is_grpc or any(
            isinstance(node, ast.Call) and _called(node) in ("grpc.server", "grpc.aio.server", "aio.server")
            for node in ast.walk(tree)
        )
    return Found(is_grpc=is_grpc)


def _serve(service: str, found: Found, file: str) -> str:
    if found.is_grpc:
        return f"a gRPC server: mesh = meshlib.Mesh.load({file!r}, service={service!r}); mesh.add_grpc_port(server, …)"
    named = "" if file == "mesh.yaml" else f"MESHLIB_CONFIG={shlex.quote(file)} "
    return f"{named}MESHLIB_SERVICE={service} meshlib serve {found.app or 'module:app'}"


def _given(name: str) -> str:
    wanted = _host_name(name)
    if wanted != name:
        instead = f" For example: {wanted}." if wanted else ""
        hint = f"It is a host name, too: small letters, digits and inner hyphens.{instead}"
        raise MeshError(f"{name!r} can't be the name of a service.", hint=hint)
    return name


def _host_name(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:63].strip("-")


def _modules(folder: Path) -> Iterator[Path]:
    """Python files: a folder's before its sub-folders', well-known names first, without hidden folders and tests."""
    seen = 0
    level = [folder]
    for _ in range(4):
        files: list[Path] = []
        below: list[Path] = []
        for place in level:
            try:
                entries = sorted(place.iterdir())
            except OSError:
                continue
            for entry in entries:
                if entry.is_symlink() or entry.name.startswith("."):
                    continue
                if entry.is_dir() and entry.name not in _SKIPPED and not (entry / "pyvenv.cfg").exists():
                    below.append(entry)
                elif entry.suffix == ".py" and entry.name != "setup.py" and not entry.name.startswith("test_"):
                    files.append(entry)
        for file in sorted(files, key=lambda item: item.stem not in ("main", "app", "asgi", "wsgi", "server")):
            seen += 1
            if seen > _MOST_FILES:
                return
            yield file
        level = below


def _module_name(file: Path, folder: Path) -> str:
    parts = list(file.relative_to(folder).with_suffix("").parts)
    if parts[0] == "src" and len(parts) > 1:
        parts = parts[1:]
    if parts[-1] == "__init__" and len(parts) > 1:
        parts = parts[:-1]
    return ".".join(parts)


def _called(call: ast.Call) -> str:
    parts: list[str] = []
    node: ast.expr = call.func
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    if isinstance(node, ast.Name):
        parts.append(node.id)
    return ".".join(reversed(parts))


def _write(file: Path, text: str, *, can_replace: bool) -> None:
    flags = os.O_WRONLY | os.O_CREAT | (os.O_TRUNC if can_replace else os.O_EXCL)
    try:
        handle = os.open(file, flags, 0o666)
    except FileExistsError:
        raise MeshError(
            f"{file} is there already, and was not touched.",
            hint="Use --out for another name, or --force to replace it.",
        ) from None
    with os.fdopen(handle, "w", encoding="utf-8") as out:
        out.write(text)
