"""`meshlib status`: is every edge private, and for how long are its certificates good?

Asks the metrics listener of each service (`observe.metrics` in mesh.yaml, or `--address`) for /status, puts together what callers and
services say of the same edge, and shows it: the edges with their mTLS and certificates, who still comes in plain, the keys by which
others are believed (where any are configured), what isn't well about an identity, and the alerts of the last hour. What didn't answer
is named, with what to do about it, since nothing can be said of it.

Exit code 0: every process answered, every edge in use is mutual TLS, and nothing alarms. 1: something is plain, mixed, alarming or
unknown, or a bundle or keys are missing or stale. 2: bad arguments or configuration. It changes nothing, and reads nothing that the
metrics' readers can't read.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Final

from meshlib.observe.edges import GOOD, MISSING, MIXED, MTLS, PLAIN, STALE, UNUSED, VERSION, duration
from meshlib.observe.redact import one_line

if TYPE_CHECKING:
    from meshlib.config.policy import ServicePolicy

PATIENCE: Final = 2.0  # seconds for one process
AT_ONCE: Final = 64
LARGEST: Final = 8 * 1024 * 1024  # bytes of one answer
# Alerts that are older are history; the edge and the certificate themselves still tell what is wrong now.
LATELY: Final = 3600.0
# Calls that come without TLS where it is enforced: they get no further.
REFUSED: Final = "refused"
FINE: Final = frozenset({MTLS, UNUSED, REFUSED})

_COLOURS: Final = {MTLS: "green", PLAIN: "bold red", MIXED: "bold yellow", "tls": "bold yellow"} | {
    GOOD: "green",
    MISSING: "bold red",
    STALE: "bold yellow",
}


def add(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser("status", help="show every edge's mTLS and certificates", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "--config", metavar="FILE", help="or the URL of one in a registry; default: $MESHLIB_CONFIG, then ./mesh.yaml"
    )
    parser.add_argument(
        "--address",
        action="append",
        default=[],
        type=_address,
        metavar="HOST:PORT",
        help="where the metrics of a process are, instead of those in the file; may be given several times",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object instead of tables")
    parser.add_argument(
        "--watch", nargs="?", const=2.0, type=float, metavar="SECONDS", help="again and again, every 2 seconds or as given"
    )


def run(args: argparse.Namespace) -> int:
    places, unasked = _given(args.address) if args.address else _places(args.config)
    while True:
        report = fold(asyncio.run(ask_all(places)), unasked, time.time())
        if args.json:
            print(json.dumps(asdict(report) | {"is_fine": report.is_fine}, ensure_ascii=False), flush=True)
        else:
            if args.watch is not None and sys.stdout.isatty():
                print("\033[H\033[2J", end="")
            show(report)
        if args.watch is None:
            return 0 if report.is_fine else 1
        time.sleep(max(args.watch, 0.2))


def _address(text: str) -> str:
    host, _, port = text.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise argparse.ArgumentTypeError(f"{text!r} is no address; host:port is expected, such as 127.0.0.1:9464")
    return text


# ---------------------------------------------------------------- whom to ask


@dataclass(frozen=True, slots=True)
class Silent:
    """Of whom nothing is known, and what to do about it. `services`: who should be there, by mesh.yaml."""

    address: str
    services: tuple[str, ...]
    why: str
    hint: str


Places = dict[str, list[str]]


def _given(addresses: Iterable[str]) -> tuple[Places, list[Silent]]:
    return {address: [] for address in addresses}, []


def _places(file: str | None) -> tuple[Places, list[Silent]]:
    """The addresses of the metrics in a configuration, each with its services; and the services that can't be asked."""
    from meshlib.config import examine

    places: Places = {}
    unasked = []
    for name, service in examine(file).services.items():
        metrics = service.observe.metrics
        if metrics is None:
            if service.listen is not None or service.discover is not None:
                hint = f"Set observe.metrics for {name} in mesh.yaml, or give the address with --address."
                unasked.append(Silent("", (name,), "it serves no metrics", hint))
        elif metrics.endswith(":0"):
            hint = "Give it with --address; the log of the process has it (metrics at …). Or set a fixed port."
            unasked.append(Silent(metrics, (name,), "its metrics are at any free port", hint))
        else:
            for address in _reachable(metrics, service):
                places.setdefault(address, []).append(name)
    return places, unasked


def _reachable(metrics: str, service: ServicePolicy) -> list[str]:
    """Where a listener can be asked: one on all interfaces at each host of the service."""
    from meshlib.config.values import split_address

    host, port = split_address(metrics)
    if host not in ("0.0.0.0", "::", ""):
        return [metrics]
    static = (service.discover.static if service.discover is not None else None) or ()
    hosts = [one.address.rpartition(":")[0] for one in static if not one.address.startswith("unix:")]
    return [f"{host}:{port}" for host in dict.fromkeys(hosts or ["127.0.0.1"])]


# ---------------------------------------------------------------- asking


@dataclass(frozen=True, slots=True)
class Answer:
    address: str
    document: Mapping[str, Any] | None
    silent: Silent | None = None


async def ask_all(places: Places) -> list[Answer]:
    """What each process says of itself. Raises nothing for those that don't."""
    free = asyncio.Semaphore(AT_ONCE)

    async def one(address: str, services: Sequence[str]) -> Answer:
        async with free:
            why, hint = "", ""
            try:
                async with asyncio.timeout(PATIENCE):
                    return Answer(address, _checked(address, _document(await _read(address))))
            except TimeoutError:
                why, hint = f"no answer within {PATIENCE:g} s", "Is the process stuck, or is a firewall in between?"
            except OSError as error:
                why = error.strerror or str(error) or type(error).__name__
                hint = "Is the process running, and does it serve its metrics there (observe.metrics, or MESHLIB_METRICS)?"
            except ValueError as error:
                why, hint = str(error), "Is it a process of meshlib, and of this version?"
            return Answer(address, None, Silent(address, tuple(services), one_line(why), hint))

    return list(await asyncio.gather(*(one(address, services) for address, services in places.items())))


async def _read(address: str) -> tuple[int, bytes]:
    host, _, port = address.rpartition(":")
    reader, writer = await asyncio.open_connection(host.removeprefix("[").removesuffix("]"), int(port))
    try:
        # By the address that the name led to: the listener answers to no names, lest a web page should use one.
        peer = writer.get_extra_info("peername")[0]
        name = f"[{peer}]" if ":" in peer else peer
        writer.write(f"GET /status HTTP/1.1\r\nhost: {name}:{port}\r\nconnection: close\r\n\r\n".encode("ascii", "replace"))
        pieces, size = [], 0
        while piece := await reader.read(65536):
            pieces.append(piece)
            size += len(piece)
            if size > LARGEST:
                raise ValueError("the answer is too large")
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()
    head, _, body = b"".join(pieces).partition(b"\r\n\r\n")
    words = head.split(b" ", 2)
    if not words[0].startswith(b"HTTP/1.") or len(words) < 2 or not words[1].isdigit():
        raise ValueError("what answers there doesn't speak HTTP")
    return int(words[1]), body


def _document(answer: tuple[int, bytes]) -> Mapping[str, Any]:
    status, body = answer
    if status != 200:
        raise ValueError(f"it answered {status} to GET /status")
    try:
        document = json.loads(body)
        version = document["version"]
    except (ValueError, TypeError, KeyError):
        raise ValueError("its answer is no status of meshlib") from None
    if version != VERSION:
        raise ValueError(f"it speaks version {version} of the status, and this command version {VERSION}")
    found: Mapping[str, Any] = document
    return found


def _checked(address: str, document: Mapping[str, Any]) -> Mapping[str, Any]:
    """The same document, if it can be read to its end: whatever listens there may have sent it."""
    try:
        fold([Answer(address, document)], [], 0.0)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
        raise ValueError("its answer is no status of meshlib") from None
    return document


# ---------------------------------------------------------------- putting together


@dataclass(slots=True)
class Edge:
    """A caller and a service, by all that either of them says. `last_seen`: seconds ago, None for not since somebody looked."""

    caller: str
    callee: str
    state: str = UNUSED
    requests: int = 0
    refused: int = 0
    would_deny: int = 0
    last_seen: float | None = None
    caller_spent: float | None = None
    callee_spent: float | None = None


@dataclass(slots=True)
class Process:
    service: str
    address: str
    mode: str
    pid: int
    spiffe_id: str = ""
    serial: str = ""
    not_after: float | None = None
    left: float | None = None
    spent: float | None = None
    is_overdue: bool = False


@dataclass(slots=True)
class Believed:
    """By what a process believes others: a bundle of another trust domain, or the keys for a provider's tokens.

    `age`: seconds since a good answer, None for never and where none is needed. `fault`: what isn't well, or nothing.
    """

    service: str
    address: str
    kind: str
    name: str
    source: str
    count: int
    age: float | None
    failures: int
    state: str
    fault: str


@dataclass(frozen=True, slots=True)
class Standing:
    """Something that isn't well about the identity of a process, the services that it calls or its entry in a registry, and lasts.

    `about`: a trust domain, a service, or nothing.
    """

    service: str
    address: str
    kind: str
    about: str
    message: str


@dataclass(slots=True)
class AgentSide:
    """What one process has to do with the agent of its node. `by_itself`: attempts that this process sent after all, by reason."""

    service: str
    address: str
    state: str
    sent: int
    by_itself: dict[str, int]
    taken: int
    why: str


@dataclass(slots=True)
class Report:
    """All that is known at one moment."""

    edges: list[Edge] = field(default_factory=list)
    processes: list[Process] = field(default_factory=list)
    believed: list[Believed] = field(default_factory=list)
    alarms: list[Standing] = field(default_factory=list)
    agents: list[AgentSide] = field(default_factory=list)
    alerts: list[dict[str, Any]] = field(default_factory=list)
    silent: list[Silent] = field(default_factory=list)

    @property
    def is_fine(self) -> bool:
        """Everybody answered, every edge in use is mutual TLS, all keys are at hand, and nothing alarms."""
        return (
            bool(self.processes)
            and not self.silent
            and not self.alerts
            and not self.alarms
            and all(one.state == GOOD for one in self.believed)
            and all(edge.state in FINE for edge in self.edges)
            and not any(process.is_overdue for process in self.processes)
        )


def fold(answers: Sequence[Answer], unasked: Sequence[Silent], now: float) -> Report:
    """What the processes say, as one picture."""
    report = Report(silent=[*(answer.silent for answer in answers if answer.silent is not None), *unasked])
    edges: dict[tuple[str, str], Edge] = {}
    told: dict[tuple[str, str], set[str]] = {}
    for answer in answers:
        document = answer.document
        if document is None:
            continue
        report.processes.append(_process(answer.address, document))
        report.believed += _believed(answer.address, document)
        report.alarms += _alarms(answer.address, document)
        report.agents += _agents(answer.address, document)
        for side in ("in", "out"):
            for row in document[side]:
                _take(edges, told, row, side, float(document["now"]))
        lately = [dict(alert) for alert in document["alerts"] if now - float(alert["at"]) <= LATELY]
        report.alerts += [{**alert, "service": document["service"]} for alert in lately]
    for key, edge in edges.items():
        edge.state = _state(told[key])
    spent: dict[str, float] = {}
    for process in report.processes:
        if process.spent is not None:
            spent[process.service] = max(spent.get(process.service, 0.0), process.spent)
    for edge in edges.values():
        edge.caller_spent, edge.callee_spent = spent.get(edge.caller), spent.get(edge.callee)
    report.edges = [edges[key] for key in sorted(edges)]
    report.processes.sort(key=lambda process: (process.service, process.address))
    report.believed.sort(key=lambda one: (one.service, one.address, one.kind, one.name))
    report.alarms.sort(key=lambda alarm: (alarm.service, alarm.address))
    report.alerts.sort(key=lambda alert: float(alert["at"]))
    # A service that answers at one of its addresses may have nobody at another one; it is told all the same.
    report.silent.sort(key=lambda silent: (silent.services, silent.address))
    return report


def _process(address: str, document: Mapping[str, Any]) -> Process:
    process = Process(str(document["service"]), address, str(document["mode"]), int(document["pid"]))
    certificate = document.get("certificate")
    if certificate is not None:
        process.spiffe_id, process.serial = str(certificate["spiffe_id"]), str(certificate["serial"])
        process.not_after, process.spent = float(certificate["not_after"]), float(certificate["spent"])
        process.left = process.not_after - float(document["now"])
        process.is_overdue = bool(certificate["is_overdue"])
    return process


# Of each kind: where a status has it, what it is named by, and what it counts.
_KINDS: Final = (("bundle", "bundles", "trust_domain", "roots"), ("tokens", "keys", "provider", "keys"))


def _believed(address: str, document: Mapping[str, Any]) -> list[Believed]:
    service = str(document["service"])
    return [
        Believed(
            service,
            address,
            kind,
            str(row[name]),
            str(row["source"]),
            int(row[count]),
            None if row["age"] is None else float(row["age"]),
            int(row["failures"]),
            str(row["state"]),
            str(row["fault"]),
        )
        for kind, place, name, count in _KINDS
        # Processes of an earlier version don't tell.
        for row in document.get(place, ())
    ]


def _agents(address: str, document: Mapping[str, Any]) -> list[AgentSide]:
    told = document.get("agent")
    if not told:
        return []
    out, come = told.get("out") or {}, told.get("in") or {}
    by_itself = {str(why): int(count) for why, count in (out.get("fallbacks") or {}).items() if count}
    state = str(out.get("state") or ("up" if come.get("is_ready") else "new"))
    return [
        AgentSide(
            str(document["service"]),
            address,
            state,
            int(out.get("sent") or 0),
            by_itself,
            int(come.get("taken") or 0),
            str(out.get("why") or ""),
        )
    ]


def _alarms(address: str, document: Mapping[str, Any]) -> list[Standing]:
    service, rows = str(document["service"]), document.get("alarms", ())
    return [Standing(service, address, str(row["kind"]), str(row["about"]), str(row["message"])) for row in rows]


def _take(
    edges: dict[tuple[str, str], Edge], told: dict[tuple[str, str], set[str]], row: Mapping[str, Any], side: str, now: float
) -> None:
    key = (str(row["caller"]), str(row["callee"]))
    edge = edges.setdefault(key, Edge(*key))
    state, refused = str(row["state"]), int(row.get("refused", 0))
    if state == PLAIN and refused and refused >= int(row["requests"]):
        state = REFUSED
    told.setdefault(key, set()).add(state)
    if side == "in":
        # The service's own count; a caller's is of calls, which may be several requests.
        edge.requests += int(row["requests"])
        edge.refused += refused
        edge.would_deny += int(row["would_deny"])
    last = float(row["last_seen"])
    if last:
        ago = max(0.0, now - last)
        edge.last_seen = ago if edge.last_seen is None else min(edge.last_seen, ago)


def _state(states: set[str]) -> str:
    used = states - {UNUSED}
    if not used:
        return UNUSED
    return used.pop() if len(used) == 1 else MIXED


# ---------------------------------------------------------------- showing

_EDGES: Final = ("caller", "service", "mtls", "requests", "refused", "would deny", "last seen", "certificates (caller, service)")
_PROCESSES: Final = ("service", "at", "mode", "certificate", "ends in", "spent")
_BELIEVED: Final = ("service", "at", "believes", "by", "keys", "confirmed", "failures", "state")


def show(report: Report) -> None:
    """Tables for people."""
    if report.edges:
        _print_table(_EDGES, [_edge_row(edge) for edge in report.edges], state=2)
    elif report.processes:
        print("No calls yet.")
    if report.processes:
        print()
        _print_table(_PROCESSES, [_process_row(process) for process in report.processes])
    if report.believed:
        print()
        _print_table(_BELIEVED, [_believed_row(one) for one in report.believed], state=7)
    for side in sorted(report.agents, key=lambda side: (side.service, side.address)):
        print(f"agent: {_cell(_agent_words(side))}")
    alarming = {(alarm.address, alarm.about) for alarm in report.alarms if alarm.kind == "federation"}
    for one in report.believed:
        # A bundle's fault is an alarm of the identity as well, where there is one.
        if one.fault and (one.kind != "bundle" or (one.address, one.name) not in alarming):
            print(f"{_cell(one.state)}: {one.kind} {_cell(one.name)} ({_cell(one.service)}): {_cell(one.fault)}")
    for alarm in report.alarms:
        print(f"alarm: {_cell(alarm.kind)} ({_cell(alarm.service)}): {_cell(alarm.message)}")
    for alert in report.alerts:
        print(f"alert: {_cell(alert['kind'])} ({_cell(alert['service'])}): {_cell(alert['text'])}")
    for silent in report.silent:
        who = ", ".join(silent.services) or "a process"
        where = f" at {silent.address}" if silent.address else ""
        print(f"no answer: {_cell(who)}{_cell(where)}: {_cell(silent.why)}. {silent.hint}")
    print(_summary(report))


def _summary(report: Report) -> str:
    bad = sum(edge.state not in FINE for edge in report.edges)
    if not report.processes:
        return "Nobody answered: nothing is known."
    if report.is_fine:
        return "Every edge in use is mutual TLS, and nothing alarms."
    amiss = sum(one.state != GOOD for one in report.believed)
    overdue = sum(process.is_overdue for process in report.processes)
    parts = [
        f"{bad} of {len(report.edges)} edges not mutual TLS" if bad else "",
        f"{overdue} certificates near their end" if overdue else "",
        f"{len(report.alarms)} alarms" if report.alarms else "",
        f"{amiss} bundles or keys missing or stale" if amiss else "",
        f"{len(report.alerts)} alerts in the last hour" if report.alerts else "",
        f"{len(report.silent)} without an answer" if report.silent else "",
    ]
    return "; ".join(part for part in parts if part) + "."


def _edge_row(edge: Edge) -> tuple[str, ...]:
    numbers = (str(edge.requests or "-"), str(edge.refused or "-"), str(edge.would_deny or "-"))
    seen = "-" if edge.last_seen is None else f"{duration(edge.last_seen)} ago"
    spent = ", ".join("-" if share is None else f"{share:.0%}" for share in (edge.caller_spent, edge.callee_spent))
    return (edge.caller, edge.callee, edge.state, *numbers, seen, spent)


def _process_row(process: Process) -> tuple[str, ...]:
    if process.spent is None or process.left is None:
        return (process.service, process.address, process.mode, "none", "-", "-")
    left = duration(process.left) if process.left > 0 else "ended"
    spent = f"{process.spent:.0%}" + (" (not renewed)" if process.is_overdue else "")
    return (process.service, process.address, process.mode, process.serial[:16], left, spent)


def _agent_words(side: AgentSide) -> str:
    reasons = ", ".join(f"{why} {count}" for why, count in sorted(side.by_itself.items()))
    why = f" ({side.why})" if side.state == "away" and side.why else ""
    own = f", {sum(side.by_itself.values())} by the process ({reasons})" if reasons else ""
    return f"{side.service} ({side.address}): {side.state}{why}; {side.sent} attempts by the agent{own}, {side.taken} calls handed over"


def _believed_row(one: Believed) -> tuple[str, ...]:
    confirmed = "-" if one.age is None else f"{duration(one.age)} ago"
    return (
        *(one.service, one.address, f"{one.kind} {one.name}", one.source, str(one.count), confirmed),
        *(str(one.failures or "-"), one.state),
    )


def _cell(text: Any) -> str:
    """What another process said, so that it moves no cursor."""
    return one_line(str(text))


def _print_table(heads: tuple[str, ...], rows: Sequence[tuple[str, ...]], state: int | None = None) -> None:
    cells = [tuple(map(_cell, row)) for row in rows]
    if sys.stdout.isatty():
        try:
            from rich.console import Console
            from rich.table import Table
            from rich.text import Text
        except ModuleNotFoundError:
            pass
        else:
            table = Table(*heads)
            for row in cells:
                style = "" if state is None else _COLOURS.get(row[state], "")
                table.add_row(*(Text(cell, style=style if place == state else "") for place, cell in enumerate(row)))
            Console(markup=False, highlight=False, emoji=False).print(table)
            return
    widths = [max(len(row[place]) for row in (heads, *cells)) for place in range(len(heads))]
    for row in (heads, *cells):
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
