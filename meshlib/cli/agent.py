"""`meshlib agent run` and `meshlib agent status`: the node agent, and how it is.

What it does is `meshlib.agent`'s; here are arguments, and tables of what its admin socket tells.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from meshlib.errors import ConfigError, MeshError
from meshlib.observe.edges import duration
from meshlib.observe.redact import one_line

PATIENCE: Final = 3.0
LARGEST: Final = 8 * 1024 * 1024
DEFAULT: Final = "/run/meshlib/admin.sock"

_ABOUT: Final = """\
The node agent: one daemon per machine that gives its processes their identities (SPIFFE Workload API), and carries the calls of those
that delegate to it. Five minutes:

    meshlib ca init ca --trust-domain shop.internal

    # mesh.yaml
    agent:
      ca: ca
      entries: [{service: orders, uid: 1001}]

    meshlib agent run           leave it running; as a service: integrations/systemd
    meshlib agent status

Any SPIFFE library gets its identity at unix:///run/meshlib/agent.sock then; a service of meshlib by `identity: {agent: true}`.
"""

_RUN: Final = """\
Run the agent in the foreground. It looks at everything first and tells all that is wrong at once. SIGHUP or a changed mesh.yaml takes
over entries, federation and addresses; SIGTERM lets what is under way end, for 25 seconds at most, and a second one doesn't wait.

It needs no root, but services take identities only from a socket of root's, of the system user `meshlib` (as whom our systemd units let
it run), or of their own user's. To attest processes of other users it needs CAP_SYS_PTRACE, and for ports below 1024
CAP_NET_BIND_SERVICE.

Exit code 2: something that only a person can mend, such as a mistake in mesh.yaml, a CA that isn't there or is another trust domain's, or
a file that others may change. Exit code 1: something that may pass, such as an address that is taken or a registry that is away.
"""

_STATUS: Final = """\
Ask the agent of this machine how it is: health, identities and what is left of their lives, entries, connections. Exit code 0: all is
well; 1: something isn't, or the agent doesn't answer.
"""


def add(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser("agent", help="run the node agent, or ask how it is", description=_ABOUT)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    run = actions.add_parser("run", help="run it, in the foreground", description=_RUN)
    status = actions.add_parser("status", help="how is it?", description=_STATUS)
    for each in (run, status):
        each.formatter_class = argparse.RawDescriptionHelpFormatter
        each.add_argument(
            "--config", metavar="FILE", help="or the URL of one in a registry; default: $MESHLIB_CONFIG, then ./mesh.yaml"
        )
    run.add_argument("--log-level", default="info", choices=("error", "warning", "info", "debug"), help="default: info")
    status.add_argument("--socket", metavar="PATH", help=f"its admin socket; default: agent.admin of the file, else {DEFAULT}")
    status.add_argument("--json", action="store_true", help="one JSON object instead of tables")
    status.add_argument(
        "--watch", nargs="?", const=2.0, type=float, metavar="SECONDS", help="again and again, every 2 seconds or as given"
    )


def run(args: argparse.Namespace) -> int:
    return _ACTIONS[args.action](args)


# ---------------------------------------------------------------------------------------------------- run


def _run(args: argparse.Namespace) -> int:
    from meshlib.agent.run import serve

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("meshlib").setLevel(args.log_level.upper())
    # A line per question to a registry tells nobody anything.
    logging.getLogger("httpx").setLevel(logging.WARNING)
    serve(args.config, say=lambda line: print(line, flush=True))
    logging.shutdown()
    sys.stdout.flush()
    # Threads that still ask a CA for something have nobody left to tell: the interpreter's end would wait for them.
    os._exit(0)


# ---------------------------------------------------------------------------------------------------- status


def _status(args: argparse.Namespace) -> int:
    while True:
        path, fault = (args.socket, "") if args.socket else _place(args.config)
        away: MeshError | None = None
        told: dict[str, Any] = {"health": {"status": "away", "alarms": []}}
        try:
            told = {part: asked(path, f"/{part}") for part in ("health", "certificates", "entries", "connections")}
        except MeshError as error:
            away = error
            told["health"]["alarms"].append({"about": "", "message": str(error)})
        told["config"] = {"error": fault}
        if args.json:
            print(json.dumps(told, ensure_ascii=False), flush=True)
        elif away is None or args.watch is not None:
            if args.watch is not None and sys.stdout.isatty():
                print("\033[H\033[2J", end="")
            show(told)
        elif fault:
            print(_faulty(fault), file=sys.stderr)
        if args.watch is None:
            if away is not None:
                raise away
            return 0 if told["health"].get("status") == "ok" and not fault else 1
        time.sleep(max(args.watch, 0.2))


def _place(source: str | None) -> tuple[str, str]:
    """The admin socket, and why the configuration can't be used: to ask how the agent is, is for just such a time."""
    from meshlib.config import examine

    named = source or os.environ.get("MESHLIB_CONFIG") or "mesh.yaml"
    if source is None and named == "mesh.yaml" and not Path(named).exists():
        return DEFAULT, ""
    try:
        node = examine(named).document.agent
    except ConfigError as error:
        is_unread = isinstance(error.__context__, OSError)
        return DEFAULT if is_unread else _written(named), str(error)
    return DEFAULT if node is None else node.admin, ""


def _written(named: str) -> str:
    """`agent.admin` as it stands in a document that can't be used, for whatever else is wrong with it."""
    from meshlib.config.source import is_url, open_source, read_source
    from meshlib.config.text import parse

    try:
        content = read_source(open_source(named), named)[0] if is_url(named) else Path(named).read_bytes()
    except (ConfigError, OSError):
        return DEFAULT
    value = parse(content.decode("utf-8", "replace"), named).value
    node = value.get("agent") if isinstance(value, dict) else None
    path = node.get("admin") if isinstance(node, dict) else None
    return path if isinstance(path, str) and path.startswith("/") else DEFAULT


def _faulty(fault: str) -> str:
    lines = fault.splitlines()
    more = f" (and {len(lines) - 1} more: `meshlib vet`)" if len(lines) > 1 else ""
    return f"the configuration can't be used as it is now: {one_line(lines[0])}{more}"


def asked(path: str, what: str) -> Any:
    """What the admin socket tells, as JSON. MeshError where it doesn't, with what to do."""
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as plug:
            plug.settimeout(PATIENCE)
            plug.connect(path)
            with contextlib.suppress(BrokenPipeError):
                plug.sendall(f"GET {what} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n".encode("ascii"))
            status, body = _answer(plug)
    except (FileNotFoundError, ConnectionRefusedError):
        raise MeshError(
            f"no agent answers at {path}.",
            hint="Does it run? `meshlib agent run`, or `systemctl status meshlib-agent`. Is it this socket? --socket PATH.",
            reason="agent.away",
        ) from None
    except PermissionError:
        raise _forbidden(path) from None
    except TimeoutError:
        raise MeshError(
            f"the agent at {path} doesn't answer within {PATIENCE:g} s.",
            hint="Is it stuck? Its log may say.",
            reason="agent.hangs",
        ) from None
    except OSError as error:
        raise MeshError(f"the agent at {path} can't be asked: {error.strerror or error}.", reason="agent.away") from None
    if status == 403:
        raise _forbidden(path)
    try:
        found = json.loads(body)
    except ValueError:
        raise MeshError(
            f"what answers at {path} is no agent.", hint="Name its admin socket: --socket PATH.", reason="agent.foreign"
        ) from None
    if status not in (200, 503):
        said = one_line(str(found.get("error", status))) if isinstance(found, dict) else str(status)
        raise MeshError(f"the agent at {path} refuses: {said}.", hint="Is it of this version?", reason="agent.refused")
    return found


def _answer(plug: socket.socket) -> tuple[int, bytes]:
    pieces, size, end = list[bytes](), 0, time.monotonic() + PATIENCE
    while piece := plug.recv(65536):
        pieces.append(piece)
        size += len(piece)
        if size > LARGEST or time.monotonic() > end:
            raise TimeoutError
    head, _, body = b"".join(pieces).partition(b"\r\n\r\n")
    words = head.split(b" ", 2)
    is_http = words[0].startswith(b"HTTP/1.") and len(words) > 1 and words[1].isdigit()
    return (int(words[1]) if is_http else 0), body if is_http else b""


def _forbidden(path: str) -> MeshError:
    return MeshError(
        f"user {os.geteuid()} may not ask the agent at {path}.",
        hint="Ask as root or as the agent's user, or add this uid to agent.admins in mesh.yaml.",
        reason="agent.forbidden",
    )


# ---------------------------------------------------------------------------------------------------- showing


def show(told: Mapping[str, Any]) -> None:
    """Tables for people. What another process said moves no cursor."""
    health = told["health"]
    if "uptime" in health:
        identities = health["identities"]
        print(
            f"{_cell(health['status'])}: agent of {_cell(health['trust_domain'])}, process {health['pid']}, up"
            f" {duration(health['uptime'])}, {identities['in_force']} of {identities['wanted']} identities in force"
        )
    for alarm in health["alarms"]:
        about = f" ({_cell(alarm['about'])})" if alarm["about"] else ""
        print(f"alarm{about}: {_cell(alarm['message'])}")
    if fault := told.get("config", {}).get("error"):
        print(_faulty(fault))
    strangers = health.get("strangers", {})
    if strangers.get("count"):
        print(
            f"callers without an entry: {strangers['count']}, the last one {duration(strangers['since'])} ago"
            " (the agent's log names process and user)"
        )
    if certificates := told.get("certificates"):
        heads = ("service", "identity", "serial", "ends in", "spent", "renewed")
        _table(heads, [_certificate(row) for row in certificates])
    if entries := told.get("entries"):
        known = [(str(row["entry"]), str(row["service"]), "yes" if row["has_identity"] else "none") for row in entries]
        _table(("entry", "service", "identity"), known)
    carried = told.get("connections", {})
    if listeners := carried.get("listeners"):
        states = [_door_state(row) for row in listeners]
        doors = [(row["service"], row["address"], row["mode"], state) for row, state in zip(listeners, states, strict=True)]
        _table(("service", "listens at", "mode", "state"), doors)
    if connections := carried.get("connections"):
        heads = tuple(dict.fromkeys(name for row in connections for name in row))
        _table(heads, [tuple(_shown(row.get(name, "-")) for name in heads) for row in connections])


def _certificate(row: Mapping[str, Any]) -> tuple[str, ...]:
    front = (row["service"], row["spiffe_id"])
    if row["left"] is None:
        return (*front, "none", "-", "-", str(row["rotations"]))
    spent = f"{row['spent']:.0%}" + (" (not renewed)" if row["is_overdue"] else "")
    return (*front, str(row["serial"])[:16], duration(row["left"]) if row["left"] > 0 else "ended", spent, str(row["rotations"]))


def _door_state(row: Mapping[str, Any]) -> str:
    if not row["is_open"]:
        return str(row["error"] or "waits")
    # Why is said by an alarm.
    return "open, and no way to its application" if row["error"] else "open"


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _cell(text: Any) -> str:
    return one_line(str(text))


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    cells = [tuple(map(_cell, row)) for row in rows]
    print()
    if sys.stdout.isatty():
        with contextlib.suppress(ModuleNotFoundError):
            from rich.console import Console
            from rich.table import Table
            from rich.text import Text

            table = Table()
            for head in heads:
                table.add_column(head, overflow="fold")  # a name that is cut off names nobody
            for row in cells:
                table.add_row(*map(Text, row))
            Console(markup=False, highlight=False, emoji=False).print(table)
            return
    widths = [max(len(row[place]) for row in (tuple(heads), *cells)) for place in range(len(heads))]
    for row in (tuple(heads), *cells):
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


_ACTIONS: Final[dict[str, Callable[[argparse.Namespace], int]]] = {"run": _run, "status": _status}
