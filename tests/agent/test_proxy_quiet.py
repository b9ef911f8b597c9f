"""Is an endpoint that is only quiet left alone, and one that has vanished noticed (R29)?"""

from __future__ import annotations

import ctypes
import socket
import struct
import threading
import time

import h2.config
import h2.connection
import h2.events
import httpx
import pytest

from tests.agent.proxy_support import Caller2, World, asking, head_of, heard, scripted, until, world

__all__ = ["world"]

GRPC = {"content-type": "application/grpc", "te": "trailers"}
SO_ATTACH_FILTER = 26


def vanish(plug: socket.socket) -> None:
    """From now on nothing that is sent there comes, nor is an answer sent: as if the cable were cut. No FIN, no RST."""
    nothing = ctypes.create_string_buffer(struct.pack("HBBI", 6, 0, 0, 0))  # BPF: return 0
    plug.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, struct.pack("HxxxxxxP", 1, ctypes.addressof(nothing)))


class Quiet:
    """An endpoint of HTTP/2 whose answers begin and don't end. It counts what it hears."""

    def __init__(self) -> None:
        self.plugs: list[socket.socket] = []
        self.asked = self.pings = 0

    def __call__(self, plug: socket.socket) -> None:
        self.plugs.append(plug)
        plug.settimeout(60)
        for peer, event in heard(plug):
            if isinstance(event, h2.events.RequestReceived):
                assert event.stream_id is not None
                self.asked += 1
                peer.send_headers(event.stream_id, [(":status", "200"), ("content-type", "application/grpc")])
            self.pings += isinstance(event, h2.events.PingReceived)


def test_a_quiet_stream_is_not_pinged(world: World) -> None:
    """Servers of gRPC end a connection whose client asks every few seconds whether it lives, and all calls on it with it."""
    endpoint = Quiet()
    with scripted(endpoint) as port:
        caller = Caller2(world.caller())
        caller.ask(GRPC | asking(port, expect="-", protocol="http2"))
        assert caller.wait(h2.events.ResponseReceived)
        assert caller.wait(h2.events.StreamEnded, 6.5) is None
        assert (endpoint.asked, endpoint.pings) == (1, 0)


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="nobody can vanish here")
def test_an_endpoint_that_vanished_is_noticed(world: World) -> None:
    """Within ten seconds: by the stream that waits for it, by the call that was sent to it since then, and over HTTP/1.1 too."""
    quiet, asked, plugs = Quiet(), Quiet(), list[socket.socket]()

    def silent(plug: socket.socket) -> None:
        head_of(plug)
        plugs.append(plug)
        plug.settimeout(60)
        plug.recv(1)

    with scripted(quiet) as one, scripted(asked) as two, scripted(silent) as three:
        callers = [Caller2(world.caller()), Caller2(world.caller())]
        for caller, port in zip(callers, (one, two), strict=True):
            caller.ask(GRPC | asking(port, expect="-", protocol="http2"))
            assert caller.wait(h2.events.ResponseReceived)
        replies: list[httpx.Response] = []
        client = world.client()
        thread = threading.Thread(target=lambda: replies.append(client.get("/", headers=asking(three, expect="-"), timeout=20)))
        thread.start()
        until(lambda: plugs)
        # What they have sent is acknowledged after 40 ms, or it would be sent again, which is a sign of life.
        time.sleep(0.3)
        for plug in (*quiet.plugs, *asked.plugs, *plugs):
            vanish(plug)
        begun = time.monotonic()
        callers[1].ask(GRPC | asking(two, expect="-", protocol="http2"))
        event = callers[1].wait(h2.events.ResponseReceived, 12)
        assert event is not None and dict(event.headers)[b"x-mesh-failed"] == b"stale; written=1"
        thread.join(12)
        assert replies[0].headers["x-mesh-failed"] == "closed; written=1"
        assert callers[0].wait(h2.events.StreamEnded, 12)  # gRPC's own end, with a status
        assert 4 < time.monotonic() - begun < 12
        until(lambda: not [row for row in world.proxy.connections() if row["direction"] == "upstream"])
