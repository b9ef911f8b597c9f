"""How does a server get TLS connections and calls that it must keep up with?

Both sorts of callers run in the worker's process and are the same for every server. `connects` opens one connection after the
other with Python's ssl, asks once on each, and sees to it that each handshake is of the kind that is measured: a full one, or one that
takes up the session of the connection before. `kept` keeps 32 connections open with the mesh's own wire client, which takes a third of what
a server takes, on a core of its own. `cpu_us` is the server's CPU here, all of it, for a connection or a call.
"""

from __future__ import annotations

import os
import socket
import ssl
import time

from .client_modes import Job, meshlib_wire
from .machine import cpu_of
from .peers import ANSWER, SERVER_NAME
from .worker import drive_beside, on_loop

WARM = 20


def connects(port: int, pid: int, identity: str, *, is_resumed: bool, seconds: float) -> dict[str, float]:
    """A request of some bytes on each connection, and its end. `pid` is the server's."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.load_verify_locations(f"{identity}/bundle.pem")
    context.load_cert_chain(f"{identity}/svid.pem", f"{identity}/key.pem")
    session = None
    took: list[float] = []
    for _ in range(WARM):
        session, _ = _ask(context, port, session if is_resumed else None)
    begun, own, cpu = time.perf_counter(), time.process_time(), cpu_of(pid)
    while time.perf_counter() - begun < seconds or not took:
        before = time.perf_counter()
        session, was_resumed = _ask(context, port, session if is_resumed else None)
        took.append(time.perf_counter() - before)
        if was_resumed != is_resumed:
            raise RuntimeError("the handshake was not " + ("resumed" if is_resumed else "full"))
    cpu, own = cpu_of(pid) - cpu, time.process_time() - own
    count = len(took)
    return {"cpu_us": cpu / count * 1e6, "client_us": own / count * 1e6, "p50_us": sorted(took)[count // 2] * 1e6}


def _ask(context: ssl.SSLContext, port: int, session: ssl.SSLSession | None) -> tuple[ssl.SSLSession | None, bool]:
    """The session for the next one, and whether that of the one before was taken up."""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as plain:
        plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with context.wrap_socket(plain, server_hostname=SERVER_NAME, session=session) as tls:
            tls.sendall(b"GET /items/7 HTTP/1.1\r\nHost: orders\r\nConnection: close\r\n\r\n")
            answer = b""
            while piece := tls.recv(65536):
                answer += piece
            if not (answer.startswith(b"HTTP/1.1 200 ") and answer.endswith(ANSWER)):
                raise RuntimeError(f"a wrong answer: {answer[:80]!r}")
            # Tickets come behind the handshake, so that the session is not whole before there is an answer.
            return tls.session, bool(tls.session_reused)


def kept(pid: int, core: int | None, seconds: float, **job: object) -> dict[str, float]:
    """`core` is our own; None where there is but one."""
    if core is not None:
        os.sched_setaffinity(0, {core})
    made = Job(**job)  # type: ignore[arg-type]

    async def main() -> dict[str, float]:
        async with meshlib_wire(made) as calls:
            return await drive_beside(calls, pid, seconds)

    return on_loop(made.loop, main)
