"""How do I get certificates without running a certificate authority?

`meshlib ca` keeps one in a folder. `init` makes it, `issue` writes the files that a service is configured with,
`rotate` turns the root over step by step and says what comes next, `list` shows what was handed out. The folder is the
authority: keep it on one machine, and back it up. Everything is `meshlib.secure.ca`'s doing; here are arguments and
text.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from meshlib.secure import ca, roots

_LENGTH: Final = re.compile(r"([0-9]+(?:\.[0-9]+)?)(s|m|h|d)")
_UNITS: Final = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": ca.DAY}


def add(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser("ca", help="make a certificate authority in a folder, and certificates", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)

    init = actions.add_parser("init", help="make a certificate authority in FOLDER")
    init.add_argument("folder", type=Path, metavar="FOLDER")
    init.add_argument(
        "--trust-domain",
        required=True,
        metavar="NAME",
        help="as in mesh.yaml, secure.trust_domain; such as shop.internal",
    )

    issue = actions.add_parser("issue", help="write svid.pem, key.pem and bundle.pem for services")
    issue.add_argument("folder", type=Path, metavar="FOLDER")
    issue.add_argument("services", nargs="+", metavar="SERVICE")
    _add_out(issue)
    issue.add_argument(
        "--ttl",
        type=_seconds,
        default=ca.LEAF_LIFE,
        metavar="TIME",
        help="life of the certificates: 90d (default), 24h, 30m",
    )
    issue.add_argument(
        "--namespace",
        default=ca.NAMESPACE,
        metavar="NAME",
        help="as in mesh.yaml, secure.namespace (default: %(default)s)",
    )

    rotate = actions.add_parser("rotate", help="turn the root over, in three steps; without --step tell where it stands")
    rotate.add_argument("folder", type=Path, metavar="FOLDER")
    rotate.add_argument("--step", choices=("begin", "activate", "finish"))
    _add_out(rotate)
    rotate.add_argument(
        "--force",
        action="store_true",
        help="finish although certificates of the old root are in use: they stop working",
    )

    listing = actions.add_parser("list", help="show the newest certificate of each service")
    listing.add_argument("folder", type=Path, metavar="FOLDER")
    listing.add_argument("--all", action="store_true", help="every certificate, not only the newest of each service")
    listing.add_argument("--json", action="store_true", help="one JSON list")


def run(args: argparse.Namespace) -> int:
    actions: dict[str, Callable[[argparse.Namespace], int]] = {
        "init": _init,
        "issue": _issue,
        "rotate": _rotate,
        "list": _list,
    }
    return actions[args.action](args)


def _init(args: argparse.Namespace) -> int:
    authority = ca.CertificateAuthority.create(args.folder, args.trust_domain)
    _say(
        f"Made a certificate authority for {authority.trust_domain} in {args.folder}.",
        "Whoever reads root.key can be any service: keep the folder on this machine, and back it up.",
        f"Next: meshlib ca issue {args.folder} <service> …",
    )
    return 0


def _issue(args: argparse.Namespace) -> int:
    authority = ca.CertificateAuthority.open(args.folder)
    out = _out(args)
    for service in args.services:
        issued = authority.write(service, out, args.ttl, args.namespace)
        _say(f"{out / service}: {issued.spiffe_id}, until {_day(issued.not_after)} (serial {issued.serial})")
    _say(
        "",
        "In mesh.yaml:",
        "  secure:",
        f"    trust_domain: {authority.trust_domain}",
        f"    identity: {{folder: {out}}}",
    )
    return 0


def _rotate(args: argparse.Namespace) -> int:
    authority = ca.CertificateAuthority.open(args.folder)
    out = _out(args)
    if args.step == "begin":
        authority.begin_rotation()
        served = authority.publish(out)
        _say(f"A new root is in the bundle beside the old one, in {args.folder / 'bundle.pem'} and {_folders(served, out)}.")
    elif args.step == "activate":
        # Whoever came since the first step gets both roots; and a folder that can't be written stops it before, not after.
        served = authority.publish(out)
        authority.activate_rotation()
        renewed = authority.reissue(out)
        names = [issued.service for issued in renewed]
        _say(f"The new root signs. Issued anew in {out}: {', '.join(names) or 'nothing'}.")
        if strangers := [where.name for where in served if where.name not in names]:
            _say(f"Left alone, since another CA has signed what is there: {', '.join(strangers)}.")
    elif args.step == "finish":
        authority.finish_rotation(force=args.force)
        served = authority.publish(out)
        _say(f"The old root is out of the bundle, in {args.folder / 'bundle.pem'} and {_folders(served, out)}.")
    else:
        _say(f"The rotation of the root is {authority.stage}.")
    stage = authority.stage
    before = {
        roots.STEADY: "" if args.step else "Nothing is under way.",
        roots.BEGUN: (
            "Before the next step every process must have the new bundle: copy it to services on other machines;"
            " processes read it within seconds."
        ),
        roots.ACTIVATED: (
            "Before the next step every service must have its new certificate: issue those that live elsewhere"
            " (`meshlib ca issue`), and copy them."
        ),
    }[stage]
    if before:
        _say(before)
    if args.step != "finish":
        _say(f"Next: meshlib ca rotate {args.folder} --step {roots.NEXT_STEP[stage]}")
    return 0


def _list(args: argparse.Namespace) -> int:
    entries = [entry for entry in ca.CertificateAuthority.open(args.folder).issued() if "spiffe_id" in entry]
    if not args.all:
        entries = list({entry["spiffe_id"]: entry for entry in entries}.values())
    shown: list[dict[str, Any]] = [
        {
            "service": entry["service"],
            "id": entry["spiffe_id"],
            "serial": entry["serial"],
            "issued": entry["time"],
            "expires": entry["not_after"],
        }
        for entry in entries
    ]
    if args.json:
        _say(json.dumps(shown, indent=2))
        return 0
    if not shown:
        _say(f"Nothing was issued yet. Next: meshlib ca issue {args.folder} <service> …")
        return 0
    width = max(len(entry["id"]) for entry in shown)
    _say(f"{'id':<{width}}  {'expires':<28}  serial")
    for entry in shown:
        left = datetime.fromisoformat(entry["expires"]).timestamp() - time.time()
        _say(f"{entry['id']:<{width}}  {entry['expires'][:10]} {_left(left):<17}  {entry['serial']}")
    return 0


def _add_out(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, metavar="DIR", help="where the services' folders are (default: FOLDER/identities)")


def _out(args: argparse.Namespace) -> Path:
    out: Path | None = args.out
    return Path(args.folder, "identities") if out is None else out


def _seconds(text: str) -> float:
    match = _LENGTH.fullmatch(text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a length of time: write 90d, 24h, 30m or 60s")
    return float(match[1]) * _UNITS[match[2]]


def _folders(served: list[Path], out: Path) -> str:
    return f"{len(served)} folders under {out}" if served else f"no folder under {out} (there is none)"


def _day(seconds: float) -> str:
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M} UTC"


def _left(seconds: float) -> str:
    if seconds <= 0:
        return "(expired)"
    return f"(in {seconds / ca.DAY:.0f} days)" if seconds >= 2 * ca.DAY else f"(in {seconds / 3600:.1f} hours)"


def _say(*lines: str) -> None:
    for line in lines:
        print(line, file=sys.stdout, flush=True)
