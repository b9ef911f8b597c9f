"""How do services on several machines get certificates from one certificate authority?

`meshlib ca serve` on the authority's machine, `meshlib ca token` for each service, and on the other machine a line in
mesh.yaml or `meshlib ca enroll`. What the service says is `meshlib.secure.authority`'s; here are arguments and text.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Final

from meshlib.cli.ca_terms import add_folder, add_namespace, add_out, address, day, out_of, say, seconds
from meshlib.errors import IdentityError
from meshlib.secure import ca, certificates, files

_SERVE: Final = """\
Issue and renew certificates for services on other machines, over HTTPS. Two machines, five minutes:

On the authority's machine, ca.host:

    meshlib ca init ca --trust-domain shop.internal
    meshlib ca serve ca --listen 0.0.0.0:8444           leave it running: a unit of systemd, a container
    meshlib ca token ca orders --address https://ca.host:8444 --out orders.token

Carry orders.token to the machine of `orders` (scp -p) within a quarter of an hour; it is good once. There, in
mesh.yaml:

    secure:
      mode: enforce
      trust_domain: shop.internal
      identity: {ca: "https://ca.host:8444", token: orders.token}

That is all. When the service starts, it makes its key, checks that the authority is the one that made the token (by
the root's fingerprint, which is in it), gets a certificate for 24 hours, and removes the token. It renews by itself at
half of that time, and fetches new roots and revocations every five minutes. Key and certificate are kept beside
mesh.yaml in identities/ (identity.state), so that it starts again while the authority can't be reached. The
authority's keys never leave its machine; the service's never leave theirs. `meshlib ca enroll` does the same once, for
what is not a mesh.

A machine that was off for longer than its certificate lives can't renew: nobody vouches for it any more. Make another
token, and put it where the first one was; the service finds it by itself, within a minute.

A token that somebody else was quicker to use is refused, and says so: `meshlib ca audit ca --event token` shows from
where it was used, `meshlib ca revoke ca orders` takes back what it bought.

To turn the root over, take the three steps of `meshlib ca rotate`, ten minutes apart; this service and all that are
enrolled follow by themselves. Services of this machine whose folders lie under --out are renewed as well.
"""

_ONCE: Final = """\
Make a token with which a service on another machine gets its first certificate, once. It goes to standard output, or
with --out to a file that only you can read. Who has it can be that service: send it over a channel that you trust.
"""

_ENROLL: Final = """\
On the service's machine: make a key, and buy its certificate with a token of `meshlib ca token`.

It writes what `meshlib ca issue` would: DIR/<service>/svid.pem, key.pem, bundle.pem and crl.pem. A service with
`identity: {ca: …}` in its mesh.yaml needs no such step: it enrols and renews by itself, also from this folder.
"""


def add(actions: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    serve = actions.add_parser("serve", help="issue and renew for services on other machines", description=_SERVE)
    serve.formatter_class = argparse.RawDescriptionHelpFormatter
    add_folder(serve)
    serve.add_argument("--listen", type=address, default=("0.0.0.0", 8444), metavar="HOST:PORT", help="default: 0.0.0.0:8444")
    serve.add_argument(
        "--ttl", type=seconds, default=ca.RENEWED_LIFE, metavar="TIME", help="life of the certificates: 24h (default), 1h"
    )
    add_out(serve)

    token = actions.add_parser("token", help="make a one-use token for a service on another machine", description=_ONCE)
    token.formatter_class = argparse.RawDescriptionHelpFormatter
    add_folder(token)
    token.add_argument("service", metavar="SERVICE")
    add_namespace(token)
    token.add_argument("--expires", type=seconds, default=900.0, metavar="TIME", help="default: 15m")
    token.add_argument("--address", default="", metavar="URL", help="where the authority serves; then `enroll` need not be told")
    token.add_argument("--out", type=Path, metavar="FILE", help="write it to this file (mode 0600)")

    enroll = actions.add_parser("enroll", help="on a service's machine: get a certificate with a token", description=_ENROLL)
    enroll.formatter_class = argparse.RawDescriptionHelpFormatter
    enroll.add_argument("file", metavar="FILE", help="with the token, which is removed when it was used; - for standard input")
    enroll.add_argument("--ca", default="", metavar="URL", help="https://ca.host:8444, unless the token tells it")
    enroll.add_argument("--out", type=Path, default=Path("identities"), metavar="DIR", help="default: identities")


def _serve(args: argparse.Namespace) -> int:
    from meshlib.secure.authority import Service
    from meshlib.secure.authority_server import Server

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    authority = ca.CertificateAuthority.open(args.folder)
    server = Server(Service(authority, ttl=args.ttl), out=out_of(args))

    async def run() -> None:
        ended = asyncio.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, ended.set)
        await server.start(*args.listen)
        host, port = server.address
        say(
            f"The certificate authority of {authority.trust_domain} serves on {f'[{host}]' if ':' in host else host}:{port}.",
            f"Its root's fingerprint (SHA-256) is {authority.fingerprints[0]}.",
            f"For a service on another machine: meshlib ca token {args.folder} <service> --address https://<this machine>:{port}",
        )
        await ended.wait()
        await server.stop()

    asyncio.run(run())
    return 0


def _token(args: argparse.Namespace) -> int:
    from meshlib.secure.exchange import Place
    from meshlib.secure.tokens import Tokens

    authority = ca.CertificateAuthority.open(args.folder)
    if args.address:
        Place.of(args.address, authority.trust_domain)
    token = Tokens(authority).make(args.service, args.namespace, args.expires, args.address)
    if args.out is None:
        say(token.text)
    else:
        where: Path = args.out.absolute()
        files.write(where.parent, [(where.name, token.text.encode() + b"\n", 0o600)])
    print(
        f"For {token.spiffe_id}, once, until {day(authority.now() + args.expires)}. There: meshlib ca enroll FILE,"
        " or in mesh.yaml: identity: {ca: URL, token: FILE}",
        file=sys.stderr,
    )
    return 0


def _enroll(args: argparse.Namespace) -> int:
    from meshlib.secure.enrol import EnrolledSource
    from meshlib.secure.tokens import Token

    out: Path = args.out
    path = Path(args.file).absolute()
    if args.file == "-":
        path = files.make_private(out).absolute() / ".token"
        files.write(path.parent, [(path.name, sys.stdin.read().encode(), 0o600)])
    try:
        with files.folder(path.parent) as fd:
            token = Token.parse(files.read_secret(fd, path.parent, path.name).decode("utf-8", "replace"))
        url = args.ca or token.address
        if not url:
            raise IdentityError("the token doesn't tell where the CA is.", hint="Say it: --ca https://ca.host:8444.")
        service = token.spiffe_id.rpartition("/")[2]
        trust_domain = certificates.trust_domain_of(token.spiffe_id)
        certificates.checked_label("service name", service)
        source = EnrolledSource(url, out, service, trust_domain, token.spiffe_id, token=path)
        identity = source.enroll()
    finally:
        if args.file == "-":
            path.unlink(missing_ok=True)
    say(
        f"{out / service}: {identity.spiffe_id}, until {day(identity.not_after)} (serial {identity.serial})",
        "",
        "In mesh.yaml, so that it renews by itself:",
        "  secure:",
        f"    trust_domain: {trust_domain}",
        f'    identity: {{ca: "{url}", state: {out}}}',
    )
    return 0


ACTIONS: Final[dict[str, Callable[[argparse.Namespace], int]]] = {"serve": _serve, "token": _token, "enroll": _enroll}
