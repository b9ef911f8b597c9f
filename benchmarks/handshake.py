"""What does a TLS handshake cost the client?

Both sides live in one process and pass bytes in memory: the mesh's client against the mesh's server, and Python's ssl against itself.
Only the client's own steps are on the clock, and the clock is that of the thread's CPU. Mutual TLS 1.3, P-256 certificates of the
embedded CA, both sides verify: the mesh a SPIFFE ID, ssl a DNS name. `resumed` presents the ticket of the handshake before. A
handshake is over when the client may send; taking in the tickets that follow is not on the clock. It says nothing about the
network's round trips.
"""

from __future__ import annotations

import ssl
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .harness import Run, in_process
from .peers import SERVER_NAME, TRUST_DOMAIN, Peers

PRIMARY = "cpu_us"
HAS_RATIOS = True
SECONDS = 1.0


def runs(peers: Peers) -> list[Run]:
    return [
        Run(
            f"{kind}/mtls/c=1",
            mode,
            in_process("benchmarks.handshake:work", mode=mode, is_resumed=kind == "resumed", folder=lambda: peers.identities),
        )
        for kind in ("full", "resumed")
        for mode in ("meshlib", "ssl")
    ]


# --- in the worker


def work(mode: str, folder: str, *, is_resumed: bool, seconds: float) -> dict[str, float]:
    handshake = (_meshlib if mode == "meshlib" else _ssl)(Path(folder), is_resumed)
    for _ in range(20):
        handshake()
    took: list[int] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or not took:
        took.append(handshake())
    return {"cpu_us": statistics.fmean(took) / 1000, "p50_us": statistics.median(took) / 1000}


def _meshlib(folder: Path, is_resumed: bool) -> Callable[[], int]:
    from meshlib._native import core
    from meshlib.secure import FolderSource, IdentityStore

    def store(service: str) -> Any:
        identity = f"spiffe://{TRUST_DOMAIN}/ns/default/sa/{service}"
        made = IdentityStore(FolderSource(folder, service, TRUST_DOMAIN, identity), mode="enforce")
        made.require(time.time())
        return made

    me, orders = store("me"), store("orders")
    server_tls, expected = orders.server_tls(True), orders.current.spiffe_id
    own, kept = me.current, me.client_tls
    clock = time.thread_time_ns
    was_resumed = False

    def handshake() -> int:
        nonlocal was_resumed
        # A client that has never been there has no ticket; making it is not part of a handshake.
        tls = kept if is_resumed else core.TlsClient(own.chain, own.key, own.bundles, own.generation)
        server = core.TlsConnection(server_tls)
        begun = clock()
        client = core.HttpConnection(tls, expected, "127.0.0.1:1")
        out = client.open()
        took = clock() - begun
        while not client.is_open:
            _, back, _ = server.receive(out)
            begun = clock()
            out, _ = client.receive(back, len(back))
            took += clock() - begun
        _, tickets, _ = server.receive(out)
        if tickets:
            client.receive(tickets, len(tickets))
        was_resumed = client.tls_resumed
        return took

    handshake()
    handshake()
    _check(is_resumed, was_resumed)
    return handshake


def _ssl(folder: Path, is_resumed: bool) -> Callable[[], int]:
    def context(service: str, protocol: int) -> ssl.SSLContext:
        made = ssl.SSLContext(protocol)
        made.minimum_version = ssl.TLSVersion.TLSv1_3
        made.load_cert_chain(folder / service / "svid.pem", folder / service / "key.pem")
        made.load_verify_locations(folder / service / "bundle.pem")
        made.verify_mode = ssl.CERT_REQUIRED
        return made

    mine, theirs = context("me", ssl.PROTOCOL_TLS_CLIENT), context("orders", ssl.PROTOCOL_TLS_SERVER)
    clock = time.thread_time_ns
    session: ssl.SSLSession | None = None
    was_reused = False

    def handshake() -> int:
        nonlocal session, was_reused
        to_client, to_server, from_server = ssl.MemoryBIO(), ssl.MemoryBIO(), ssl.MemoryBIO()
        server = theirs.wrap_bio(to_server, from_server, server_side=True)
        begun = clock()
        out = ssl.MemoryBIO()
        client = mine.wrap_bio(to_client, out, server_hostname=SERVER_NAME, session=session)
        is_done = _step(client)
        took = clock() - begun
        while not is_done:
            to_server.write(out.read())
            _step(server)
            back = from_server.read()
            begun = clock()
            to_client.write(back)
            is_done = _step(client)
            took += clock() - begun
        to_server.write(out.read())
        _step(server)
        to_client.write(from_server.read())
        try:
            client.read(1)
        except ssl.SSLWantReadError:
            pass  # there was nothing but tickets
        was_reused = bool(client.session_reused)
        if is_resumed:
            session = client.session
        return took

    handshake()
    handshake()
    _check(is_resumed, was_reused)
    return handshake


def _step(side: ssl.SSLObject) -> bool:
    try:
        side.do_handshake()
    except ssl.SSLWantReadError:
        return False
    return True


def _check(is_resumed: bool, was_resumed: bool) -> None:
    if was_resumed != is_resumed:
        raise RuntimeError("the handshake was not " + ("resumed" if is_resumed else "full"))
