"""Do gRPC's clients and servers in other languages get on with the mesh's? `make interop`, or `python -m tests.interop`.

Builds the peers (peers.py) once, runs the fourteen scenarios both ways, and prints a table for each peer. A peer whose tools are not
installed is skipped with the reason. Exits with 1 if anything failed: a scenario, a build, or a server that didn't start.
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
from pathlib import Path

from tests.interop.matrix import Told, try_out
from tests.interop.peers import Go, Java
from tests.interop.table import as_json, as_text
from tests.support import ROOT


def main() -> int:
    peers = {peer.name: peer for peer in (Go(), Java())}
    parser = argparse.ArgumentParser(prog="python -m tests.interop", description=__doc__.splitlines()[0])
    parser.add_argument("--peer", action="append", choices=sorted(peers), help="only this one; may be given twice")
    parser.add_argument("--cache", type=Path, default=ROOT / ".interop", help="where the peers are built (default: .interop)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there as well")
    given = parser.parse_args()

    # What the mesh says of its configurations is for those who wrote them.
    logging.getLogger("meshlib").setLevel(logging.ERROR)
    told = Told()
    for name in given.peer or peers:
        with tempfile.TemporaryDirectory(prefix="interop-") as folder:
            try_out(peers[name], given.cache.absolute(), Path(folder), told)
    print(as_text(told))
    if given.json is not None:
        given.json.write_text(as_json(told))
    return 1 if told.failures else 0


if __name__ == "__main__":
    sys.exit(main())
