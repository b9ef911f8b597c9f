"""How do I get certificates without running a certificate authority?

`meshlib ca` keeps one in a folder. On one machine three commands do:

    meshlib ca init ca --trust-domain shop.internal
    meshlib ca issue ca orders web          svid.pem, key.pem and bundle.pem for each, good for 90 days
    meshlib ca renew ca                     from a timer, each day: issues anew what is past half of its life

With more than one machine `meshlib ca serve` takes over: services make their keys where they run, and renew by
themselves (`meshlib ca serve --help` tells the way). `revoke` takes a certificate back, `rotate` turns the root over
step by step, `list` and `audit` show what was done. `jwt` makes a token for calls on which no certificate can be shown.
The folder is the authority: keep it on one machine, and back it up. root.key is needed for `rotate` alone; the rest of
the time it may lie in a safe.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from meshlib.cli import ca_audit, ca_jwt, ca_serve
from meshlib.cli.ca_terms import add_folder, add_namespace, add_out, day, folders, out_of, say, seconds
from meshlib.secure import ca, delivery, revocation, roots

_INIT = """\
Make a certificate authority in FOLDER: a root, and an issuer under it that signs everything else.

The root's key is not needed from day to day. To keep it in a safe, where nobody finds it who breaks into this machine:

    mv FOLDER/root.key /media/safe/

The issuer needs it again once in two years:

    meshlib ca rotate FOLDER --issuer --root-key /media/safe/root.key

A rotation of the root makes a new root.key, which can be put away after the second step.
"""


def add(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser("ca", help="make a certificate authority in a folder, and certificates", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)

    init = actions.add_parser("init", help="make a certificate authority in FOLDER", description=_INIT)
    init.formatter_class = argparse.RawDescriptionHelpFormatter
    add_folder(init)
    init.add_argument(
        "--trust-domain",
        required=True,
        metavar="NAME",
        help="as in mesh.yaml, secure.trust_domain; such as shop.internal",
    )

    issue = actions.add_parser("issue", help="write svid.pem, key.pem and bundle.pem for services")
    add_folder(issue)
    issue.add_argument("services", nargs="+", metavar="SERVICE")
    add_out(issue)
    issue.add_argument(
        "--ttl",
        type=seconds,
        default=ca.LEAF_LIFE,
        metavar="TIME",
        help="life of the certificates: 90d (default), 24h, 30m",
    )
    add_namespace(issue)

    renew = actions.add_parser("renew", help="issue anew what is past half of its life; refresh and publish the rest")
    add_folder(renew)
    renew.add_argument("services", nargs="*", metavar="SERVICE", help="these only (default: all)")
    add_out(renew)
    renew.add_argument("--all", action="store_true", help="also what is not past half of its life")
    renew.add_argument("--ttl", type=seconds, metavar="TIME", help="another life than before")

    publish = actions.add_parser("publish", help="bring roots and revocations into the services' folders")
    add_folder(publish)
    add_out(publish)

    revoke = actions.add_parser("revoke", help="take back a certificate, or all that a service has, and its unused tokens")
    add_folder(revoke)
    revoke.add_argument("what", metavar="SERIAL|SERVICE", help="a serial number, the name of a service, or a SPIFFE ID")
    reasons = ", ".join(revocation.REASONS)
    revoke.add_argument("--reason", choices=revocation.REASONS, default="unspecified", metavar="WORD", help=f"one of {reasons}")
    add_namespace(revoke, None)
    add_out(revoke)

    rotate = actions.add_parser("rotate", help="turn the root over, in three steps; without --step tell where it stands")
    add_folder(rotate)
    rotate.add_argument("--step", choices=("begin", "activate", "finish"))
    add_out(rotate)
    rotate.add_argument(
        "--force",
        action="store_true",
        help="finish although certificates of the old root are in use: they stop working",
    )
    rotate.add_argument("--issuer", action="store_true", help="only renew the issuer's certificate; nobody else notices")
    rotate.add_argument("--root-key", type=Path, metavar="FILE", help="where root.key is, if it was put away (with --issuer)")

    ca_serve.add(actions)
    ca_jwt.add(actions)
    ca_audit.add(actions)


def run(args: argparse.Namespace) -> int:
    actions: dict[str, Callable[[argparse.Namespace], int]] = {
        "init": _init,
        "issue": _issue,
        "renew": _renew,
        "publish": _publish,
        "revoke": _revoke,
        "rotate": _rotate,
        **ca_serve.ACTIONS,
        **ca_jwt.ACTIONS,
        **ca_audit.ACTIONS,
    }
    return actions[args.action](args)


def _init(args: argparse.Namespace) -> int:
    authority = ca.CertificateAuthority.create(args.folder, args.trust_domain)
    say(
        f"Made a certificate authority for {authority.trust_domain} in {args.folder}.",
        "Whoever reads root.key or issuer.key can be any service: keep the folder on this machine, and back it up.",
        "root.key is not needed from day to day, and may be put into a safe: `meshlib ca init --help` tells how.",
        f"Next: meshlib ca issue {args.folder} <service> …, or for other machines: meshlib ca serve {args.folder}",
    )
    return 0


def _issue(args: argparse.Namespace) -> int:
    authority = ca.CertificateAuthority.open(args.folder)
    out = out_of(args)
    for service in args.services:
        issued = authority.write(service, out, args.ttl, args.namespace)
        say(f"{out / service}: {issued.spiffe_id}, until {day(issued.not_after)} (serial {issued.serial})")
    say(
        "",
        "In mesh.yaml:",
        "  secure:",
        f"    trust_domain: {authority.trust_domain}",
        f"    identity: {{folder: {out}}}",
    )
    _warn(authority)
    return 0


def _renew(args: argparse.Namespace) -> int:
    authority = ca.CertificateAuthority.open(args.folder)
    out = out_of(args)
    faults: list[str] = []
    renewed = authority.renew(out, args.ttl, services=args.services, is_forced=args.all or bool(args.services), faults=faults)
    for issued in renewed:
        say(f"{out / issued.service}: {issued.spiffe_id}, until {day(issued.not_after)} (serial {issued.serial})")
    served = authority.publish(out, faults=faults)
    say(f"Renewed {len(renewed)}; roots and revocations are up to date in {folders(served, out)}.")
    if strangers := sorted(set(args.services) - {issued.service for issued in renewed}):
        say(
            f"Not renewed: {', '.join(strangers)}. Nothing of ours lies there, not with its key, or it was revoked:"
            " `meshlib ca issue` issues anew."
        )
    _warn(authority)
    delivery.refuse(list(dict.fromkeys(faults)))
    return 0


def _publish(args: argparse.Namespace) -> int:
    authority = ca.CertificateAuthority.open(args.folder)
    faults: list[str] = []
    served = authority.publish(out_of(args), faults=faults)
    say(f"Roots and revocations are up to date in {folders(served, out_of(args))}.")
    delivery.refuse(faults)
    return 0


def _revoke(args: argparse.Namespace) -> int:
    authority = ca.CertificateAuthority.open(args.folder)
    out = out_of(args)
    found = authority.revoke(args.what, args.reason, args.namespace or "")
    if not found:
        say(f"No certificate of {args.what} is valid; its tokens that were not used yet are taken back.")
    for entry in found:
        end = entry["not_after"][:16].replace("T", " ")
        say(f"Revoked {entry['spiffe_id']}, serial {entry['serial']} (it would have ended {end} UTC).")
    faults: list[str] = []
    served = authority.publish(out, faults=faults)
    say(
        f"{args.folder / 'crl.pem'} tells it, and {folders(served, out)}; services that are enrolled fetch it within minutes.",
        "The list is good for a day: `meshlib ca serve` renews it, or `meshlib ca renew` from a timer.",
        "Who was revoked renews nothing, until `meshlib ca issue` or `meshlib ca token` gives them another identity.",
    )
    delivery.refuse(faults)
    return 0


def _rotate(args: argparse.Namespace) -> int:
    authority = ca.CertificateAuthority.open(args.folder)
    out = out_of(args)
    if args.issuer:
        authority.renew_issuer(args.root_key)
        say(f"The issuer's certificate is good until {day(authority.signing_ends)}.")
        return 0
    if args.step == "begin":
        authority.begin_rotation()
        served = authority.publish(out)
        say(f"A new root is in the bundle beside the old one, in {args.folder / 'bundle.pem'} and {folders(served, out)}.")
    elif args.step == "activate":
        # Whoever came since the first step gets both roots; and a folder that can't be written stops it before, not after.
        served = authority.publish(out)
        authority.activate_rotation()
        renewed = authority.reissue(out)
        names = [issued.service for issued in renewed]
        say(f"The new root counts for what is issued. Issued anew in {out}: {', '.join(names) or 'nothing'}.")
        if strangers := [where.name for where in served if where.name not in names]:
            say(f"Left alone, since another CA has signed what is there, or it was revoked: {', '.join(strangers)}.")
    elif args.step == "finish":
        authority.finish_rotation(force=args.force)
        served = authority.publish(out)
        say(f"The old root is out of the bundle, in {args.folder / 'bundle.pem'} and {folders(served, out)}.")
    else:
        say(f"The rotation of the root is {authority.stage}.")
    stage = authority.stage
    before = {
        roots.STEADY: "" if args.step else "Nothing is under way.",
        roots.BEGUN: (
            "Before the next step every process must have the new bundle: copy it to services on other machines;"
            " processes read it within seconds. What is enrolled fetches it within ten minutes."
        ),
        roots.ACTIVATED: (
            "Before the next step every service must have its new certificate: issue those that live elsewhere"
            " (`meshlib ca issue`), and copy them. What is enrolled renews within ten minutes."
        ),
    }[stage]
    if before:
        say(before)
    if args.step != "finish":
        say(f"Next: meshlib ca rotate {args.folder} --step {roots.NEXT_STEP[stage]}")
    return 0


def _warn(authority: ca.CertificateAuthority) -> None:
    """Of the end of what signs, while there is time."""
    left = authority.signing_ends - authority.now()
    if left < ca.LEAF_LIFE and not authority.has_root_key:
        say(
            f"The issuer ends in {left / ca.DAY:.0f} days, and root.key is not here to renew it:"
            f" meshlib ca rotate {authority.folder} --issuer --root-key FILE"
        )
