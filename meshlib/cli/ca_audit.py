"""What did the certificate authority do, and how do its certificates stand?

`meshlib ca list` and `meshlib ca audit`: the same log, once by certificate and once as it happened.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from datetime import datetime
from typing import Any, Final

from meshlib.cli.ca_terms import add_folder, left, say, seconds
from meshlib.secure import ca, ledger

_AUDIT: Final = """\
Print the log: issue, renewal, refusal, revocation, rotation.*, issuer.renewal, token.made, token.used, token.refused,
token.revoked, jwt.issue.

The log is only ever appended to, and each line holds the hash of the one before. --verify checks that chain, and
names the line at which something was changed, taken out or put in. That its end was cut off, only a hash can tell
that was kept elsewhere: note what --verify prints, and give it back with --head.
"""

# What `audit` prints of an entry, in this order; the rest is in --json.
_SHOWN: Final = (
    "service", "spiffe_id", "serial", "reason", "token", "audiences", "expires", "by", "source", "why", "count", "reasons",
)  # fmt: skip


def add(actions: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    listing = actions.add_parser("list", help="show the newest certificate of each service, and how it stands")
    add_folder(listing)
    listing.add_argument("--all", action="store_true", help="every certificate, not only the newest of each service")
    listing.add_argument("--json", action="store_true", help="one JSON list")

    audit = actions.add_parser("audit", help="print the log, and check that it is whole", description=_AUDIT)
    audit.formatter_class = argparse.RawDescriptionHelpFormatter
    add_folder(audit)
    audit.add_argument("--event", action="append", default=[], metavar="NAME", help="these only; `token` stands for token.*")
    audit.add_argument("--service", metavar="NAME", help="this service only, by name or SPIFFE ID")
    audit.add_argument("--since", type=seconds, metavar="TIME", help="the last 24h, 7d, …")
    audit.add_argument("--json", action="store_true", help="one JSON object a line")
    audit.add_argument("--verify", action="store_true", help="check the chain instead of printing; exit code 1 if it is broken")
    audit.add_argument(
        "--head", default="", metavar="HASH", help="a hash that --verify has printed: it must still be in the chain"
    )


def _list(args: argparse.Namespace) -> int:
    authority = ca.CertificateAuthority.open(args.folder)
    shown: list[dict[str, Any]] = [
        {
            "service": entry["service"],
            "id": entry["spiffe_id"],
            "serial": entry["serial"],
            "issued": entry["time"],
            "expires": entry["not_after"],
            "state": state,
        }
        for entry, state in authority.standing(is_whole=args.all)
    ]
    if args.json:
        say(json.dumps(shown, indent=2))
        return 0
    if not shown:
        say(f"Nothing was issued yet. Next: meshlib ca issue {args.folder} <service> …")
        return 0
    width = max(len(entry["id"]) for entry in shown)
    say(f"{'id':<{width}}  {'state':<10}  {'expires':<28}  serial")
    for entry in shown:
        end = left(datetime.fromisoformat(entry["expires"]).timestamp() - time.time())
        say(f"{entry['id']:<{width}}  {entry['state']:<10}  {entry['expires'][:10]} {end:<17}  {entry['serial']}")
    return 0


def _audit(args: argparse.Namespace) -> int:
    authority = ca.CertificateAuthority.open(args.folder)
    if args.verify or args.head:
        return _verify(authority, args.head)
    since = 0.0 if args.since is None else time.time() - args.since
    for entry in authority.issued():
        event = entry["event"]
        if args.event and not any(event == wanted or event.startswith(f"{wanted}.") for wanted in args.event):
            continue
        if args.service and args.service not in {entry.get("service"), entry.get("spiffe_id")}:
            continue
        if ledger.seconds(entry["time"]) < since:
            continue
        if args.json:
            say(json.dumps(entry, separators=(",", ":")))
        else:
            told = "  ".join(f"{name}={entry[name]}" for name in _SHOWN if entry.get(name))
            # What was refused may have been chosen by an attacker: it must not steer the terminal.
            say("".join(each if each.isprintable() else "?" for each in f"{entry['time']}  {event:<18}  {told}"))
    return 0


def _verify(authority: ca.CertificateAuthority, head: str) -> int:
    chain = authority.verify_log(head)
    for line, fault in chain.faults:
        print(f"line {line}: {fault}", file=sys.stderr)
    old = f", {chain.unchained} of them from before there was a chain" if chain.unchained else ""
    torn = f", {chain.torn} cut off by a crash" if chain.torn else ""
    say(
        f"{chain.entries} entries{old}{torn}: {'the log was changed' if chain.faults else 'the chain is whole'}.",
        f"head {chain.head}",
    )
    return 1 if chain.faults else 0


ACTIONS: Final[dict[str, Callable[[argparse.Namespace], int]]] = {"list": _list, "audit": _audit}
