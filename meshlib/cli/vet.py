"""`meshlib vet`: is this mesh.yaml right, and does it say what I think?

All mistakes at once, a line each, in the form that editors and pipelines understand (file:line: …). A file without
mistakes is summed up in a table, with warnings for settings that are allowed but inert or dangerous. It reads the
file only: whether endpoints answer and certificates are valid is for the running process to find out.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from meshlib.errors import ConfigError, Problem

if TYPE_CHECKING:
    from meshlib.config.load import Examined
    from meshlib.config.policy import ServicePolicy

_COLUMNS = ("service", "mode", "protocol", "endpoints", "routes", "retry", "deadline", "who may call")


def add(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "vet",
        help="find every mistake in a mesh.yaml",
        description="Find every mistake in a mesh.yaml. Exit code 2 if there is one.",
    )
    parser.add_argument("file", nargs="?", help="default: $MESHLIB_CONFIG, then ./mesh.yaml")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text")


def run(args: argparse.Namespace) -> int:
    from meshlib.config import examine

    try:
        examined = examine(args.file)
    except ConfigError as error:
        if args.json:
            _print_json(error.problems, (), [])
        else:
            print("\n".join(str(problem) for problem in error.problems))
            print(f"{_count(len(error.problems), 'problem')}. Nothing would start with this file.", file=sys.stderr)
        return 2
    rows = [_row(service) for service in examined.services.values()]
    if args.json:
        _print_json([], examined.warnings, [dict(zip(_COLUMNS, row, strict=True)) for row in rows])
    else:
        _print(examined, rows)
    return 0


def _row(service: ServicePolicy) -> tuple[str, ...]:
    retries = sorted({route.retry.attempts for route in service.routes})
    deadlines = sorted({route.deadline for route in service.routes})
    return (
        service.name,
        service.mode,
        service.protocol,
        _endpoints(service),
        str(len(service.routes)),
        _range(retries),
        _range(deadlines) + " s",
        _callers(service),
    )


def _endpoints(service: ServicePolicy) -> str:
    discover = service.discover
    if discover is None:
        return "none"
    if discover.static is not None:
        return f"{len(discover.static)} static"
    return f"file {discover.file}" if discover.file is not None else f"dns {discover.dns}"


def _callers(service: ServicePolicy) -> str:
    if service.mode == "observe":
        return "anyone (observe)"
    allowed = [caller for rule in service.rules if rule.action == "allow" and not rule.is_dry_run for caller in rule.callers]
    names = ["anyone" if caller == "*" else caller.rsplit("/", 1)[-1] for caller in dict.fromkeys(allowed)]
    denies = sum(rule.action == "deny" for rule in service.rules)
    text = ", ".join(names) or "nobody"
    if service.mode == "permissive":
        text = f"anyone (permissive; rules: {text})"
    return text + (f"; {_count(denies, 'deny rule')}" if denies else "")


def _range(values: list[Any]) -> str:
    return f"{values[0]:g}" if len(values) == 1 else f"{values[0]:g} to {values[-1]:g}"


def _print(examined: Examined, rows: list[tuple[str, ...]]) -> None:
    mesh, domain = examined.document.mesh, examined.names.trust_domain
    print(f"{examined.text.file}: mesh {mesh}, trust domain {domain}, {_count(len(rows), 'service')}, no mistakes")
    _print_table(rows)
    for warning in examined.warnings:
        print(f"warning: {warning}")


def _print_table(rows: list[tuple[str, ...]]) -> None:
    if sys.stdout.isatty():
        try:
            from rich.console import Console
            from rich.table import Table
        except ModuleNotFoundError:
            pass
        else:
            table = Table(*_COLUMNS)
            for row in rows:
                table.add_row(*row)
            # The words come from a file: nothing in them is markup.
            Console(markup=False, highlight=False, emoji=False).print(table)
            return
    widths = [max(len(row[index]) for row in (_COLUMNS, *rows)) for index in range(len(_COLUMNS))]
    for row in (_COLUMNS, *rows):
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _print_json(problems: list[Problem], warnings: tuple[Problem, ...], services: list[dict[str, str]]) -> None:
    answer = {
        "is_valid": not problems,
        "problems": [asdict(problem) for problem in problems],
        "warnings": [asdict(warning) for warning in warnings],
        "services": services,
    }
    print(json.dumps(answer, ensure_ascii=False, indent=2))


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
