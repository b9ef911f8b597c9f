"""What can be done from a shell?

    meshlib vet     find every mistake in a mesh.yaml
    meshlib init    write a first mesh.yaml for the service in this folder
    meshlib schema  print the JSON Schema of mesh.yaml
    meshlib serve   serve an application inside the mesh
    meshlib ca      make a certificate authority in a folder, and certificates
    meshlib dev     run a command with a throw-away authority, on loopback
    meshlib agent   run the node agent, or ask how it is
    meshlib status  show every edge's mTLS and certificates
    meshlib suggest write the least policy that allows the calls that were seen

Each command is a module with `add(subparsers)` and `run(args) -> int`, imported only when it is the one that was
asked for, so that a missing extra breaks nothing but its own command. Exit codes: 0 done, 1 failed, 2 bad input
(arguments or configuration). What can be expected to go wrong ends with a message that says what to do, never with a
traceback; a traceback is a bug of meshlib.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from typing import Final

from meshlib.errors import ConfigError, MeshError

COMMANDS: Final = (
    ("vet", "find every mistake in a mesh.yaml"),
    ("init", "write a first mesh.yaml for the service in this folder"),
    ("schema", "print the JSON Schema of mesh.yaml"),
    ("serve", "serve an application inside the mesh"),
    ("ca", "make a certificate authority in a folder, and certificates"),
    ("dev", "run a command with a throw-away authority, on loopback"),
    ("agent", "run the node agent, or ask how it is"),
    ("status", "show every edge's mTLS and certificates"),
    ("suggest", "write the least policy that allows the calls that were seen"),
)

DONE: Final = 0
FAILED: Final = 1
BAD_INPUT: Final = 2

# Which extra brings a package that a command may miss.
_EXTRAS: Final = {"uvicorn": "serve", "gunicorn": "serve", "rich": "cli", "h2": "agent", "google": "agent"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code is returned, nothing that is expected is raised."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        return _run(arguments)
    except SystemExit as stop:  # argparse has already said why
        return stop.code if isinstance(stop.code, int) else BAD_INPUT if stop.code else DONE
    except ConfigError as error:
        return _say(error, BAD_INPUT)
    except MeshError as error:
        return _say(error, FAILED)
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] not in _EXTRAS:
            raise  # not an extra that a user may leave out: a mistake, whose place the traceback shows
        return _say(_missing(next(word for word in arguments if not word.startswith("-")), error.name or ""), FAILED)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader went away (`meshlib vet | head`); the interpreter must not complain about it at exit either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except OSError as error:
        where = f" {error.filename}" if error.filename else ""
        print(f"meshlib:{where}: {error.strerror or error}", file=sys.stderr)
        return FAILED


def _run(arguments: list[str]) -> int:
    asked = next((word for word in arguments if not word.startswith("-")), None)
    parser = argparse.ArgumentParser(prog="meshlib", description="A service mesh that you pip install.")
    parser.add_argument("--version", action="version", version=f"meshlib {_version()}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    chosen = None
    for name, summary in COMMANDS:
        if name == asked:
            chosen = _command(name)
            chosen.add(commands)
        else:
            commands.add_parser(name, help=summary)
    args = parser.parse_args(arguments)
    if chosen is None:
        parser.print_help(sys.stderr)
        return BAD_INPUT
    return int(chosen.run(args))


def _command(name: str) -> _Command:
    try:
        return importlib.import_module(f"meshlib.cli.{name}")  # type: ignore[return-value]
    except ModuleNotFoundError as error:
        raise _missing(name, error.name or "") from None


def _missing(command: str, module: str) -> MeshError:
    top = module.split(".", maxsplit=1)[0]
    extra = _EXTRAS.get(top)
    hint = f'Install it: pip install "meshlib-servicemesh[{extra}]".' if extra else f"Install it: pip install {top}."
    if top == "meshlib":
        hint = "This installation is incomplete; install meshlib-servicemesh again."
    return MeshError(f"`meshlib {command}` needs the module {module}, which is not installed.", hint=hint)


class _Command:
    """The shape of a command's module, for the type checker."""

    @staticmethod
    def add(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
        raise NotImplementedError

    @staticmethod
    def run(args: argparse.Namespace) -> int:
        raise NotImplementedError


def _say(error: MeshError, code: int) -> int:
    print(f"meshlib: {error}" if not getattr(error, "problems", None) else str(error), file=sys.stderr)
    return code


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("meshlib-servicemesh")
    except PackageNotFoundError:
        return "(not installed)"
