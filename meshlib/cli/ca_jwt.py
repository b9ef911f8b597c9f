"""How does a script get a JWT-SVID, to call as a service where no certificate can be shown?

`meshlib ca jwt`, on the authority's machine. A service on another machine asks the authority's own service for one, with
its certificate (`POST /v1/jwt`). What a token is, and who signs it, is `meshlib.secure.jwt_svid`'s.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Final

from meshlib.cli.ca_terms import add_folder, add_namespace, say, seconds
from meshlib.secure import ca, jwt_svid

_JWT: Final = """\
Print a JWT-SVID: a token that says who calls, for where TLS ends on the way. Nothing else goes to standard output:

    curl -H "Authorization: Bearer $(meshlib ca jwt ca cron --audience orders)" https://shop.example/orders

Whoever is shown it can show it on until it ends, and nothing takes it back: so it names its audience and is short. The
log has a line of each, without the token. The first one makes the key; whoever takes tokens needs the public part, from
FOLDER/tokens.json or the bundle of `meshlib ca serve` (/v1/bundle), and refuses them until it has it. In mesh.yaml:

    secure:
      jwt:
        svid: {trust_domain: shop.internal, audiences: [orders], jwks: {file: tokens.json}}

`meshlib ca rotate` turns the key over with the root: bring the new file to them after the first step and the last.

A service on another machine gets its own from the authority's service, for its certificate:

    POST /v1/jwt {"audience": ["orders"]}       answers {"token": …, "spiffe_id": …, "not_after": …}, good for 5m
"""


def add(actions: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    jwt = actions.add_parser("jwt", help="print a JWT-SVID for a service, to be shown to an audience", description=_JWT)
    jwt.formatter_class = argparse.RawDescriptionHelpFormatter
    add_folder(jwt)
    jwt.add_argument("service", metavar="SERVICE")
    jwt.add_argument(
        "--audience", action="append", required=True, metavar="NAME", help="who shall take it, as it calls itself; again for more"
    )
    jwt.add_argument("--ttl", type=seconds, default=jwt_svid.LIFE, metavar="TIME", help="5m (default), at most 1h")
    add_namespace(jwt)


def _jwt(args: argparse.Namespace) -> int:
    authority = ca.CertificateAuthority.open(args.folder)
    spiffe_id = authority.id_of(args.service, args.namespace)
    say(jwt_svid.handed_out(authority, args.service, spiffe_id, args.audience, args.ttl, by="hand").text)
    return 0


ACTIONS: Final[dict[str, Callable[[argparse.Namespace], int]]] = {"jwt": _jwt}
