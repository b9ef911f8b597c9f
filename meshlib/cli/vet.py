"""`meshlib vet`: is this mesh.yaml right, and does it say what I think?

All mistakes at once, a line each, in the form that editors and pipelines understand (file:line: …), with those in what is for the
package of a registry. A file without mistakes is summed up in a table, with warnings for settings that are allowed but inert or
dangerous. It reads the file only: whether endpoints answer and certificates are valid is for the running process to find out.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from meshlib.errors import ConfigError, Problem

if TYPE_CHECKING:
    from meshlib.config.load import Examined
    from meshlib.config.policy import ServicePolicy
    from meshlib.config.secure_policy import RulePolicy

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
    from meshlib.discover.vet import check

    here: list[Problem] = []
    try:
        examined = examine(args.file, check=lambda text: check(text, here))
    except ConfigError as error:
        # Whoever raises it need not know of a file.
        problems = error.problems or [Problem("(configuration)", 1, "(source)", error.message, error.hint)]
        if args.json:
            _print_json(problems, tuple(here), [])
        else:
            print("\n".join(str(problem) for problem in problems))
            print(f"{_count(len(problems), 'problem')}. Nothing would start with this file.", file=sys.stderr)
        return 2
    warnings = (*examined.warnings, *here)
    rows = [_row(service, examined.names.trust_domain) for service in examined.services.values()]
    if args.json:
        _print_json([], warnings, [dict(zip(_COLUMNS, row, strict=True)) for row in rows], _trust(examined))
    else:
        _print(examined, rows, warnings)
    return 0


def _row(service: ServicePolicy, trust_domain: str) -> tuple[str, ...]:
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
        _callers(service, trust_domain),
    )


def _endpoints(service: ServicePolicy) -> str:
    discover = service.discover
    if discover is None:
        return "none"
    if discover.static is not None:
        return f"{len(discover.static)} static"
    ways = (("file", discover.file), ("dns", discover.dns), ("srv", discover.srv), ("registry", discover.registry))
    return next(f"{way} {named}" for way, named in ways if named is not None)


def _callers(service: ServicePolicy, trust_domain: str) -> str:
    if service.mode == "observe":
        return "anyone (observe)"
    allowing = [rule for rule in service.rules if rule.action == "allow" and not rule.is_dry_run]
    text = ", ".join(dict.fromkeys(name for rule in allowing for name in _names(rule, trust_domain))) or "nobody"
    if service.mode == "permissive":
        text = f"anyone (permissive; rules: {text})"
    for action in ("deny", "custom"):
        number = sum(rule.action == action for rule in service.rules)
        text += f"; {_count(number, f'{action} rule')}" if number else ""
    return text


def _names(rule: RulePolicy, trust_domain: str) -> Iterator[str]:
    """Callers as people call them, and whether a token has to come along."""
    wants_token = rule.request_principals or any(one.key.startswith("request.auth.") and one.values for one in rule.when)
    for caller in rule.callers:
        yield _called(caller, trust_domain) + (" with a token" if wants_token else "")


def _called(caller: str, trust_domain: str) -> str:
    """A service of ours by its name; whoever is somebody else's, or several, by the whole ID."""
    if caller == "*":
        return "anyone"
    is_ours = caller.startswith(f"spiffe://{trust_domain}/") and not caller.endswith("*")
    return caller.rsplit("/", 1)[-1] if is_ours else caller


def _range(values: list[Any]) -> str:
    return f"{values[0]:g}" if len(values) == 1 else f"{values[0]:g} to {values[-1]:g}"


def _print(examined: Examined, rows: list[tuple[str, ...]], warnings: Iterable[Problem]) -> None:
    mesh, domain = examined.document.mesh, examined.names.trust_domain
    print(f"{examined.text.file}: mesh {mesh}, trust domain {domain}, {_count(len(rows), 'service')}, no mistakes")
    _print_table(rows)
    for word, value in _trust(examined).items():
        print(f"{word}: {value}")
    for warning in warnings:
        print(f"warning: {warning}")


def _trust(examined: Examined) -> dict[str, str]:
    """What counts for all services, as far as it isn't the default."""
    secure, egress = examined.document.secure, examined.document.egress
    told = {
        "other trust domains": ", ".join(secure.federation),
        "tokens of": ", ".join(secure.jwt),
        "egress": f"denied, but to {', '.join(egress.hosts) or 'nobody'}" if egress.policy == "deny" else "",
        "credentials for": ", ".join(dict.fromkeys(one.host for one in egress.credentials)),
    }
    return {word: value for word, value in told.items() if value}


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


def _print_json(
    problems: list[Problem],
    warnings: tuple[Problem, ...],
    services: list[dict[str, str]],
    trust: Mapping[str, str] = MappingProxyType({}),
) -> None:
    answer = {
        "is_valid": not problems,
        "problems": [asdict(problem) for problem in problems],
        "warnings": [asdict(warning) for warning in warnings],
        "services": services,
        "trust": dict(trust),
    }
    print(json.dumps(answer, ensure_ascii=False, indent=2))


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
