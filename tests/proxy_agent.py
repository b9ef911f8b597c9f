"""What does a node agent consist of that has the real data path and nothing else?

The native proxy behind a data socket, without attestation: whoever connects is `me`. `python -m tests.proxy_agent FOLDER [PORT TO
MODE]` runs one with the identity in FOLDER/identities/me, data socket FOLDER/data.sock; with a port it accepts the connections of
callers there, and hands their calls over to the UNIX socket `TO`.
"""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path

import pytest

from meshlib._native import core
from tests.support import TRUST_DOMAIN

ME = f"spiffe://{TRUST_DOMAIN}/ns/default/sa/me"
SECRET = "5ec7e7" * 10

needs_proxy = pytest.mark.skipif(not hasattr(core, "Proxy"), reason="this build of the core has no proxy")


def main(folder: Path, *inbound: str) -> None:
    own = folder / "identities" / "me"
    proxy = core.Proxy(1)
    chain, key, bundle = ((own / name).read_bytes() for name in ("svid.pem", "key.pem", "bundle.pem"))
    proxy.identify(ME, chain, key, {TRUST_DOMAIN: bundle}, {}, SECRET)
    if inbound:
        port, to, mode = inbound
        with socket.create_server(("127.0.0.1", int(port))) as listening:
            proxy.listen("me", listening.fileno(), ME, to, mode)
    path = folder / "data.sock"
    path.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX) as data:
        data.bind(str(path))
        data.listen(512)
        print("ready", os.getpid(), flush=True)
        while True:
            plug, _ = data.accept()
            proxy.adopt(plug.detach(), ME)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
