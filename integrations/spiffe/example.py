"""Who does the Workload API say we are? Ask, and watch what changes, for a while.

python example.py unix:///run/spire/agent.sock spiffe://example.org/ns/default/sa/storefront

A service does nothing of this by hand: `plugin: spiffe` in mesh.yaml (there is one beside this file), and the mesh asks.
"""

import sys
import time

from meshlib_spiffe import open_source

import meshlib


def main() -> None:
    socket, spiffe_id = sys.argv[1], sys.argv[2]
    seconds = float(sys.argv[3]) if len(sys.argv) > 3 else 10.0
    source = open_source({"socket": socket}, spiffe_id=spiffe_id, trust_domain=spiffe_id.split("/")[2])
    shown, end = "", time.monotonic() + seconds
    try:
        while time.monotonic() < end:
            try:
                identity = source.load()
                said = f"{identity.spiffe_id}, serial {identity.serial}, trusts {', '.join(sorted(identity.bundles))}"
            except meshlib.IdentityError as error:
                said = str(error)
            if said != shown:
                print(said, flush=True)
            shown = said
            time.sleep(0.1)
    finally:
        source.close()


if __name__ == "__main__":
    main()
