"""Does an agent that ends answer the request that was on its way to an idle connection?

HTTP/1.1 has no GOAWAY: whoever closes an idle connection may cut off a request that was written at the same moment, and its caller can't
know whether it was read. Many callers with a connection each ask again and again, with the shortest of pauses, while the proxy drains.
"""

from __future__ import annotations

import select
import socket
import threading
import time

from meshlib._native import core
from tests.proxy_agent import ME, needs_proxy

pytestmark = needs_proxy

CALLERS, ROUNDS = 12, 12
PING = b"GET /ping HTTP/1.1\r\nhost: agent\r\n\r\n"


def ask(plug: socket.socket, lost: list[str], lasts: list[bool]) -> None:
    """Until an answer says that it is the last, or the connection ends between two questions."""
    plug.settimeout(10)
    with plug:
        for number in range(1_000_000):
            if select.select([plug], [], [], 0)[0]:
                return  # it has ended, and we see it before we write
            try:
                plug.sendall(PING)
            except BrokenPipeError:
                return  # nobody was there to read it: it may be sent elsewhere
            try:
                got = plug.recv(4096)
            except OSError as error:
                lost.append(f"{number}: {error!r}")
                return
            if not got:
                lost.append(f"{number}: it ended without a word")
                return
            if b"connection: close" in got:
                lasts.append(True)
                return


def test_no_request_is_cut_off_where_the_agent_ends() -> None:
    """Each has an answer, and the last one says that it is."""
    lost: list[str] = []
    lasts: list[bool] = []
    for number in range(ROUNDS):
        proxy = core.Proxy(1)
        pairs = [socket.socketpair() for _ in range(CALLERS)]
        for near, _ in pairs:
            proxy.adopt(near.detach(), ME)
        threads = [threading.Thread(target=ask, args=(far, lost, lasts)) for _, far in pairs]
        for thread in threads:
            thread.start()
        time.sleep(0.05 + 0.003 * number)
        proxy.drain()
        for thread in threads:
            thread.join(15)
        assert proxy.stop(5.0)
    assert lost == []
    assert len(lasts) == CALLERS * ROUNDS
