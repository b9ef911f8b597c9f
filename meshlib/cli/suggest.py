"""`meshlib suggest`: which rules allow what was seen, and nothing else?

Reads the records that processes write where `secure.record` is on, adds them up, and prints for each service an `allow:` list, ready to
be put into mesh.yaml in place of the one that is there. Paths with numbers, UUIDs or long hex become templates, and so does a position
at which more than `--distinct` values were seen; routes of mesh.yaml keep their own templates. A present rule with conditions that a
record doesn't hold (headers, claims, addresses) is kept as it is, and what only its conditions refused is not let in by another rule.
A `{id}` of a rule is any one segment: where that would let in what was refused, a regular expression for ids is written instead.

Never in a rule, and told as comments: calls without an identity (a rule could only let in anybody), calls that were refused, calls that
a deny rule would still refuse. Told as well: what the present rules allow and nobody used.

The same records give the same text. It changes no file but the one of `--out`, and a record is as good as the time it covers:
what happens once a month must have happened.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import quote

import yaml

from meshlib.errors import ConfigError, MeshError
from meshlib.observe import least
from meshlib.observe.redact import one_line
from meshlib.observe.traffic import ALLOW, DENY, Kind, Observed, Record, read

if TYPE_CHECKING:
    from meshlib._native import core
    from meshlib.config import Config
    from meshlib.config.load import Examined

# Lines of one list of comments.
MOST_LINES: Final = 20
WIDTH: Final = 120
_UNITS: Final = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
# Clauses that a recorded call answers; a rule with any other is one with conditions.
_JUDGED: Final = frozenset(
    {
        *("name", "action", "dry_run", "authorizer", "is_case_insensitive", "from", "not_from", "namespaces", "not_namespaces"),
        *("methods", "not_methods", "paths", "not_paths"),
    }
)
# What may have stood for a variable of a recorded template, one of each sort, and a word.
_VALUES: Final = ("918273645", "6f1c2a54-8f0e-4d39-9b57-0c6a1d2e3f40", "0a9b8c7d6e5f4a3b", "any-word")
_VARIABLE: Final = re.compile(r"\{[A-Za-z_][A-Za-z0-9_]*\}")
# A scalar that YAML reads as the text that it is.
_BARE: Final = re.compile(r"(?!(?:true|false|null|yes|no|on|off|y|n)\Z)(?:[A-Za-z/][A-Za-z0-9/_.-]*)\Z", re.IGNORECASE)


def add(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "suggest", help="write the least policy that allows the calls that were seen", description=__doc__
    )
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("folders", nargs="*", type=Path, metavar="FOLDER", help="of records; default: secure.record of mesh.yaml")
    parser.add_argument(
        "--config", metavar="FILE", help="or the URL of one in a registry; default: $MESHLIB_CONFIG, then ./mesh.yaml"
    )
    parser.add_argument(
        "--since", type=_since, default=0.0, metavar="TIME", help="only what was seen since: 24h, 7d or 2026-05-01"
    )
    parser.add_argument(
        "--distinct",
        type=int,
        default=least.MOST,
        metavar="N",
        help="values at one position of paths beyond which it is a variable (default: %(default)s)",
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="write to this new file instead of the terminal")


def run(args: argparse.Namespace) -> int:
    from meshlib.config import examine

    examined = examine(args.config)
    record = _read(examined, args.folders, args.since)
    text, problems = suggest(examined, record, most=args.distinct)
    if args.out is None:
        print(text, end="")
    else:
        try:
            with args.out.open("x", encoding="utf-8") as file:
                file.write(text)
        except FileExistsError:
            raise MeshError(f"{args.out} is there already.", hint="Name a new file: nothing is overwritten.") from None
    for problem in problems:
        print(f"meshlib: {problem}", file=sys.stderr)
    return 1 if problems else 0


def _since(text: str) -> float:
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)([smhd])", text)
    if match is not None:
        return time.time() - float(match[1]) * _UNITS[match[2]]
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no time: 24h, 7d, 2026-05-01 or 2026-05-01T12:00 is expected") from None
    return (moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)).timestamp()


def _read(examined: Examined, folders: Sequence[Path], since: float) -> Record:
    if not folders:
        config = _config_of(examined, next(iter(examined.services)))
        if config.record is None:
            raise MeshError(
                "no calls are recorded: secure.record is off in mesh.yaml.",
                hint="Set `record: true` under `secure`, let the system run as long as it takes to see all that is meant, and come back.",
            )
        folders = (config.record,)
    try:
        record = read(folders, since)
    except FileNotFoundError as error:
        raise MeshError(
            f"there are no records in {error.filename}.", hint="Has a process of the mesh served calls since `record` is on?"
        ) from None
    if not record.rows:
        raise MeshError(
            f"there are no recorded calls in {', '.join(map(str, folders))}.",
            hint="Records are written every few seconds, once calls come in; see also --since.",
        )
    return record


def _config_of(examined: Examined, service: str) -> Config:
    from meshlib.config import load

    return load(examined.url or examined.file, service=service, origin=examined.origin)


def _config(file: Path, service: str) -> Config:
    from meshlib.config import load

    return load(file, service=service)


# ---------------------------------------------------------------- what is proposed


@dataclass(slots=True)
class Proposal:
    """For one service: its new rules, the present ones that stay, and what is to be said beside them."""

    service: str
    rules: list[least.Rule] = field(default_factory=list)
    kept: list[dict[str, Any]] = field(default_factory=list)
    anonymous: list[Observed] = field(default_factory=list)
    refused: list[Observed] = field(default_factory=list)
    held: list[Observed] = field(default_factory=list)  # let in by the conditions of a rule that is kept
    denied: list[tuple[Observed, str]] = field(default_factory=list)
    conditional: list[tuple[Observed, str]] = field(default_factory=list)
    unwritable: list[Observed] = field(default_factory=list)
    would_be_denied: list[tuple[Observed, str]] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)


def suggest(examined: Examined, record: Record, *, most: int = least.MOST) -> tuple[str, list[str]]:
    """The text, and what went wrong with it. Deterministic."""
    problems = [f"left out: {flaw}" for flaw in record.flaws]
    if record.lost:
        problems.append(f"{record.lost} calls found no place in the records: what is proposed may lack some of them")
    services = sorted({row.service for row in record.rows})
    problems += [
        f"left out: records of {one_line(name)!r}, which is no service of {examined.label}"
        for name in services
        if name not in examined.services
    ]
    proposals = [
        propose(examined, name, [row for row in record.rows if row.service == name], most=most)
        for name in services
        if name in examined.services
    ]
    names = {policy.identity: name for name, policy in examined.services.items()}
    text = _text(examined, record, proposals, names)
    problems += _check(examined, text, proposals)
    return text, problems


def propose(examined: Examined, service: str, rows: Sequence[Observed], *, most: int = least.MOST) -> Proposal:
    """What to allow at one service, from what came to it."""
    config = _config_of(examined, service)
    plan: dict[str, Any] = json.loads(config.server_plan())
    present = [rule for rule in plan["rules"] if not rule["dry_run"]]
    denials = [rule for rule in present if rule["action"] == "deny" and _is_plain(rule)]
    plain = [rule for rule in present if rule["action"] == "allow" and _is_plain(rule)]
    conditional = [rule for rule in present if rule["action"] == "allow" and not _is_plain(rule)]
    everybody = _everybody()
    denying, allowing = Judge(plan, [*denials, everybody]), Judge(plan, plain)
    # What a rule would let in if its conditions held.
    might = [(rule, Judge(plan, [_bare(rule)])) for rule in conditional]
    proposal = Proposal(service)
    wanted: list[Observed] = []
    kept: set[str] = set()
    for row in rows:
        if not row.is_served:
            proposal.refused.append(row)
        elif not row.kind.peer:
            proposal.anonymous.append(row)
        elif not _is_writable(row):
            proposal.unwritable.append(row)
        elif rule := denying.denied_by(row):
            proposal.denied.append((row, rule))
        elif not allowing.always_allows(row) and (matching := [rule["name"] for rule, judge in might if judge.allows(row)]):
            if row.kind.verdict == ALLOW:
                kept.update(matching)
                proposal.held.append(row)
            else:
                proposal.conditional.append((row, matching[0]))
        else:
            wanted.append(row)
    routes, literals = _paths_of(config)
    out = [replace(row, kind=replace(row.kind, verdict=DENY)) for row in _kept_out(proposal)]
    proposal.rules = least.least([*wanted, *out], routes=routes, literals=literals, most=most)
    proposal.kept = _written_rules(examined, service, kept)
    dry = [rule for rule in plan["rules"] if rule["dry_run"] and rule["action"] == "deny" and _is_plain(rule)]
    if dry:
        judge = Judge(plan, [*({**rule, "dry_run": False} for rule in dry), everybody])
        proposal.would_be_denied = [(row, rule) for row in wanted if (rule := judge.denied_by(row))]
    served = [row for row in rows if row.is_served and row.kind.peer and _is_writable(row)]
    proposal.unused = _unused(plan, plain, served)
    return proposal


def _kept_out(proposal: Proposal) -> list[Observed]:
    """What no new rule may let in."""
    return [*proposal.refused, *proposal.held, *(row for row, _ in proposal.conditional)]


def _is_plain(rule: Mapping[str, Any]) -> bool:
    return not any(value for clause, value in rule.items() if clause not in _JUDGED)


def _bare(rule: Mapping[str, Any]) -> dict[str, Any]:
    """The same rule without its conditions."""
    return {clause: value if clause in _JUDGED else type(value)() for clause, value in rule.items()}


def _everybody() -> dict[str, Any]:
    return {"name": "", "action": "allow", "from": [{"kind": "any"}]}


def _is_writable(row: Observed) -> bool:
    """Can a rule say this at all?"""
    from meshlib.config.values import METHODS

    return row.kind.method in METHODS and len(row.kind.path) <= least.LONGEST_REGEX


def _paths_of(config: Config) -> tuple[list[str], list[str]]:
    """Templates of the service's routes, and the paths that its routes and rules name as they are."""
    templates, literals = [], []
    for route in config.own.routes:
        match = route.match.path
        if match is not None and match.template is not None:
            templates.append(match.template)
        elif match is not None:
            literals.append(match.exact or match.prefix or "/")
    for rule in config.own.rules:
        # Of a beginning, what stands before its last slash is named as it is.
        literals += [
            path.removesuffix("*").rpartition("/")[0] if path.endswith("*") else path for path in rule.paths if "{" not in path
        ]
    return templates, [path for path in literals if path.startswith("/") and path != "/"]


def _written_rules(examined: Examined, service: str, names: set[str]) -> list[dict[str, Any]]:
    """Present rules of the service, as they stand in the file."""
    found = []
    for index, rule in enumerate(examined.document.services[service].secure.allow):
        if (rule.name or f"{service}/allow/{index}") in names:
            found.append(rule.model_dump(mode="json", by_alias=True, exclude_unset=True))
    return found


def _unused(plan: Mapping[str, Any], rules: Sequence[Mapping[str, Any]], rows: Sequence[Observed]) -> list[str]:
    """Of the present rules, and of the entries of their lists, those that no recorded call needed."""
    told = []
    for rule in rules:
        judge = Judge(plan, [rule])
        used = [row for row in rows if judge.allows(row)]
        if not used:
            told.append(f"rule {rule['name']!r}: nothing of it")
            continue
        for clause in ("from", "methods", "paths"):
            entries = rule[clause]
            if len(entries) < 2:
                continue
            judges = [(entry, Judge(plan, [{**rule, clause: [entry]}])) for entry in entries]
            idle = [_entry(entry) for entry, one in judges if not any(one.allows(row) for row in used)]
            if idle:
                told.append(f"rule {rule['name']!r}, {clause}: {', '.join(idle)}")
    return told


def _entry(entry: Any) -> str:
    if isinstance(entry, str):
        return entry
    return {"prefix": "{}*", "suffix": "*{}", "any": "*"}.get(entry["kind"], "{}").format(entry.get("value", ""))


class Judge:
    """The gate itself, with these rules and in mode enforce, asked about recorded calls."""

    def __init__(self, plan: Mapping[str, Any], rules: Iterable[Mapping[str, Any]]) -> None:
        from meshlib._native import core

        empty = {"routes": [], "providers": [], "jwt_required": [], "rates": [], "record": False}
        made = {**plan, **{key: value for key, value in empty.items() if key in plan}, "mode": "enforce", "paths": "canonical"}
        # A rule that is written here has no clauses but those that it needs.
        blank = {key: type(value)() for rule in plan["rules"][:1] for key, value in rule.items()} or _BLANK
        made["rules"] = [{**blank, **rule} for rule in rules]
        self._gate: core.Gate = core.Gate()
        self._gate.publish(json.dumps(made).encode(), 0.0)

    def allows(self, row: Observed) -> bool:
        """Whatever of it: of a template, one value is enough."""
        return any(self._ask(row.kind, path)[0] for path in _paths(row.kind))

    def always_allows(self, row: Observed) -> bool:
        return all(self._ask(row.kind, path)[0] for path in _paths(row.kind))

    def denied_by(self, row: Observed) -> str:
        """The name of the rule that denies it, whatever stands for its variables; "" where none does."""
        answers = [self._ask(row.kind, path) for path in _paths(row.kind)]
        return "" if any(is_allowed for is_allowed, _ in answers) else answers[0][1]

    def _ask(self, kind: Kind, path: str) -> tuple[bool, str]:
        if kind.protocol == "grpc":
            entry = self._gate.begin_grpc(path, kind.peer, True, 0.0)
        else:
            target = path if path == "*" else quote(path, safe="/")
            entry = self._gate.begin(kind.method, target.encode(), [(b"host", b"localhost")], kind.peer, True, 0.0)
        answer = entry.status == 0, entry.rule
        if answer[0]:
            entry.finish(200, 0.0)
        return answer


def _paths(kind: Kind) -> list[str]:
    """Paths that a gate can be asked about, of this kind."""
    return [_VARIABLE.sub(value, kind.path) for value in _VALUES] if kind.is_template else [kind.path]


_BLANK: Final[dict[str, Any]] = {
    **dict.fromkeys(("name", "action", "authorizer"), ""),
    **dict.fromkeys(("dry_run", "is_case_insensitive"), False),
    **{
        clause: []
        for name in (
            "from",
            "namespaces",
            "request_principals",
            "ip_blocks",
            "remote_ip_blocks",
            "methods",
            "paths",
            "hosts",
            "ports",
        )
        for clause in (name, f"not_{name}")
    },
    "when": [],
}


# ---------------------------------------------------------------- is it what it says?


def _check(examined: Examined, text: str, proposals: Sequence[Proposal]) -> list[str]:
    """Load mesh.yaml with the text in it, and ask the gate about every call again."""
    value = json.loads(json.dumps(examined.text.value))
    services = (yaml.safe_load(text) or {}).get("services", {})
    for name, service in services.items():
        value["services"].setdefault(name, {})
        value["services"][name] = value["services"][name] or {}
        value["services"][name].setdefault("secure", {}).update(service["secure"])
    with tempfile.TemporaryDirectory(prefix="meshlib-suggest-") as folder:
        file = Path(folder) / "mesh.yaml"
        file.write_text(json.dumps(value), encoding="utf-8")
        try:
            plans = {one.service: json.loads(_config(file, one.service).server_plan()) for one in proposals}
        except ConfigError as error:
            return [f"what is proposed can't be loaded, which is a fault of meshlib: {error}"]
    wrong = []
    for proposal in proposals:
        plan = plans[proposal.service]
        judge = Judge(plan, [_bare(rule) for rule in plan["rules"] if not rule["dry_run"] and rule["action"] == "allow"])
        left = [row for rule in proposal.rules for row in rule.rows if not judge.allows(row)]
        wrong += [f"{proposal.service}: the rules don't allow {_call(row)}, which is a fault of meshlib" for row in left[:5]]
        names = {rule.get("name") for rule in services[proposal.service]["secure"]["allow"] if rule not in proposal.kept}
        denials = [rule for rule in plan["rules"] if rule["action"] == "deny" and not rule["dry_run"] and _is_plain(rule)]
        fresh = [_bare(rule) for rule in plan["rules"] if rule["action"] == "allow" and rule["name"] in names]
        judge, done = Judge(plan, [*denials, *fresh]), {_what(row) for rule in proposal.rules for row in rule.rows}
        more = [row for row in _kept_out(proposal) if _what(row) not in done and judge.allows(row)]
        wrong += [
            f"{proposal.service}: the rules let in {_call(row)}, which was refused or has conditions: what stood for a variable of "
            "a route isn't recorded; write this rule by hand"
            for row in more[:5]
        ]
    return wrong


def _what(row: Observed) -> tuple[str, ...]:
    return row.kind.peer, row.kind.method, row.kind.protocol, row.kind.path


# ---------------------------------------------------------------- text


def _text(examined: Examined, record: Record, proposals: Sequence[Proposal], names: Mapping[str, str]) -> str:
    first, last = min(row.first for row in record.rows), max(row.last for row in record.rows)
    calls = sum(row.count for row in record.rows)
    lines = [
        "# What was seen, and nothing else, as `meshlib suggest` found it.",
        f"# {_count(calls, 'call')} from {_time(first)} to {_time(last)} UTC, of {_count(record.files, 'process', 'processes')}.",
        "# Put each `allow` in place of the one that its service has in mesh.yaml; `deny` and `custom` rules stay as they are.",
    ]
    if (allow := examined.document.secure.model_dump().get("allow")) and len(allow):
        lines.append("# secure.allow lets calls into all services beside these rules: take out of it what they cover.")
    if any(path.kind == least.TEMPLATE for one in proposals for rule in one.rules for path in rule.paths):
        lines.append("# In paths, {id} or another name in braces is any one segment, and not only the ids that were seen.")
    lines.append("services:" if proposals else "services: {}")
    for proposal in proposals:
        lines += _service(proposal, names)
    silent = sorted(
        name
        for name, service in examined.services.items()
        if (service.listen is not None or service.discover is not None) and name not in {one.service for one in proposals}
    )
    if silent:
        lines.append(f"# No calls were recorded at {', '.join(silent)}.")
    return "\n".join(lines) + "\n"


def _service(proposal: Proposal, names: Mapping[str, str]) -> list[str]:
    lines = [f"  {proposal.service}:", "    secure:"]
    taken = {rule["name"] for rule in proposal.kept if "name" in rule}
    if not proposal.rules and not proposal.kept:
        lines.append("      allow: []  # no call that a rule could allow was seen")
    else:
        lines.append("      allow:")
    for rule in proposal.rules:
        lines += _rule(rule, names, taken)
    for kept in proposal.kept:
        lines.append("        # as it is: a record doesn't hold what its conditions ask about")
        lines.append(f"        - {_flow(kept)}")
    lines += _comments(
        "Without an identity, so in no rule; give their callers one (`meshlib status` tells where they come from):",
        [_call(row) for row in proposal.anonymous],
    )
    lines += _comments("Refused, and in no rule:", [_call(row, names) for row in proposal.refused if row.kind.peer])
    for what, rows in (
        ("Still denied, by a deny rule:", proposal.denied),
        ("Not let in, since the conditions of a rule for it did not hold:", proposal.conditional),
        ("A dry-run rule would deny:", proposal.would_be_denied),
    ):
        lines += _comments(what, [f"{_call(row, names)} (rule {one_line(rule)!r})" for row, rule in rows])
    lines += _comments("No rule can say this:", [_call(row, names) for row in proposal.unwritable])
    return lines + _comments("Allowed by the present rules, and not used:", [one_line(text) for text in proposal.unused])


def _rule(rule: least.Rule, names: Mapping[str, str], taken: set[str]) -> list[str]:
    callers = [names.get(peer, peer) for peer in rule.callers]
    written: dict[str, Any] = {"name": _name(callers, taken), "from": sorted(callers), "methods": list(rule.methods)}
    paths = [path.text for path in rule.paths if path.kind != least.REGEX]
    regexes = [path.text for path in rule.paths if path.kind == least.REGEX]
    if paths:
        written["paths"] = paths
    if regexes:
        written["path_regexes"] = regexes
    if rule.issuers:
        written["request_principals"] = [f"{issuer}/*" for issuer in rule.issuers]
    lines = [f"        # {_count(rule.calls, 'call')}, {_time(rule.first)} to {_time(rule.last)}"]
    for path in rule.paths:
        if path.stands_for:
            some = ", ".join(one_line(value) for value in path.stands_for)
            lines.append(f"        # {one_line(path.text)} stands for many values, such as {some}")
    flow = f"        - {_flow(written)}"
    if len(flow) <= WIDTH:
        return [*lines, flow]
    lead = "        - "
    for key, value in written.items():
        if isinstance(value, list) and len(f"{lead}{key}: {_flow(value)}") > WIDTH:
            lines.append(f"{lead}{key}:")
            lines += [f"            - {_scalar(item)}" for item in value]
        else:
            lines.append(f"{lead}{key}: {_flow(value)}")
        lead = "          "
    return lines


def _name(callers: Sequence[str], taken: set[str]) -> str:
    """A name of its own, from the callers' names."""
    short = [caller.rsplit("/", 1)[-1] for caller in sorted(callers)]
    base = "+".join(short) if len("+".join(short)) <= 60 else f"{short[0]}+{len(short) - 1}"
    base = base[:80]
    name, number = base, 1
    while name in taken:
        number += 1
        name = f"{base}-{number}"
    taken.add(name)
    return name


def _comments(head: str, lines: Sequence[str]) -> list[str]:
    if not lines:
        return []
    shown = [f"      #   {line}" for line in lines[:MOST_LINES]]
    if len(lines) > MOST_LINES:
        shown.append(f"      #   and {len(lines) - MOST_LINES} more")
    return [f"      # {head}", *shown]


def _call(row: Observed, names: Mapping[str, str] | None = None) -> str:
    kind = row.kind
    who = f"{(names or {}).get(kind.peer, kind.peer)}: " if kind.peer else ""
    return one_line(f"{who}{kind.method} {kind.path}, {_count(row.count, 'call')}, last {_time(row.last)}")


def _flow(value: Any) -> str:
    """A value in YAML's flow style, on one line."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_scalar(key)}: {_flow(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_flow, value)) + "]"
    return _scalar(value)


def _scalar(value: Any) -> str:
    if not isinstance(value, str):
        return json.dumps(value)
    if _BARE.match(value):
        return value
    # Everything but plain letters is escaped there, so that no reader takes it for another text.
    return yaml.safe_dump(value, default_style='"', width=sys.maxsize).removesuffix("\n")


def _time(moment: float) -> str:
    return datetime.fromtimestamp(moment, UTC).strftime("%Y-%m-%d %H:%M")


def _count(number: int, noun: str, plural: str = "") -> str:
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"
