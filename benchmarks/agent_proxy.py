"""Who is one node's agent in a benchmark, reduced to its data path?

`python -m benchmarks.agent_proxy out PORT FOLDER`: plain connections at a TCP port, handed to `core.Proxy` as the agent's acceptor hands over
those of its data socket: wrk knows no UNIX sockets. `… in PORT FOLDER SOCKET` is the other end: mutual TLS at the port, and the application
behind a UNIX socket. FOLDER holds the identities of `me` and `orders`. The proxy is the very one of `meshlib agent run`; what isn't here is
its control: attestation, issuing, admin. It ends with SIGTERM.
"""

from __future__ import annotations

import signal
import socket
import sys
import threading
from pathlib import Path

from meshlib._native import core

from .peers import TRUST_DOMAIN

SECRET = "00" * 32


def main(side: str, port: str, folder: str, to: str = "") -> None:
    service = "me" if side == "out" else "orders"
    own = Path(folder) / service
    spiffe_id = f"spiffe://{TRUST_DOMAIN}/ns/default/sa/{service}"
    chain, key, bundle = ((own / name).read_bytes() for name in ("svid.pem", "key.pem", "bundle.pem"))
    proxy = core.Proxy(1)
    proxy.identify(spiffe_id, chain, key, {TRUST_DOMAIN: bundle}, {}, SECRET)
    plug = socket.create_server(("127.0.0.1", int(port)), backlog=1024)
    if side == "in":
        proxy.listen("orders", plug.fileno(), spiffe_id, to, "enforce")
    else:
        threading.Thread(target=_accept, args=(plug, proxy, spiffe_id), daemon=True).start()
    signal.sigwait({signal.SIGTERM, signal.SIGINT})


def _accept(plug: socket.socket, proxy: core.Proxy, spiffe_id: str) -> None:
    while True:
        connection, _ = plug.accept()
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        proxy.adopt(connection.detach(), spiffe_id)


if __name__ == "__main__":
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    main(*sys.argv[1:])
