"""Does the library learn how far a failed attempt had come? Each reason, told for HTTP/1.1, HTTP/2 and gRPC."""

from __future__ import annotations

import contextlib
import socket
import ssl
import struct
import threading
import time

import h2.config
import h2.connection
import h2.events
import httpx
import pytest

from tests.agent.proxy_support import (
    CALLER,
    ORDERS,
    Caller2,
    World,
    asking,
    echo,
    head_of,
    heard,
    read_all,
    scripted,
    until,
    world,
)
from tests.support import free_port

__all__ = ["world"]
OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"


def failed(reply: httpx.Response) -> str:
    assert reply.status_code == 502, (reply.status_code, reply.text)
    assert reply.headers["content-type"].startswith("text/plain")
    assert reply.text
    told: str = reply.headers["x-mesh-failed"]
    return told


@pytest.mark.parametrize("protocol", ["http1", "http2"])
def test_nobody_listens(world: World, protocol: str) -> None:
    """Refused: nothing was written."""
    reply = world.client().get("/", headers=asking(free_port(), expect="-", protocol=protocol))
    assert failed(reply) == "connect; written=0"


def test_nobody_answers_in_time(world: World) -> None:
    """The patience for a connection is the library's."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        begin = time.monotonic()
        reply = world.client().get("/", headers=asking(silent.getsockname()[1], connect=200))
        assert failed(reply) == "connect_timeout; written=0"
        assert 0.15 < time.monotonic() - begin < 3


@pytest.mark.parametrize("protocol", ["http1", "http2"])
def test_somebody_else_answers(world: World, protocol: str) -> None:
    """Another identity than the expected one gets nothing."""
    port = world.listen(world.application(echo))
    reply = world.client().get("/", headers=asking(port, expect="spiffe://td/other", protocol=protocol))
    assert failed(reply) == "identity; written=0"
    assert ORDERS in reply.text


def test_a_peer_that_speaks_no_tls(world: World) -> None:
    """It is said, and nothing was written."""
    with scripted(lambda plug: plug.sendall(OK)) as port:
        assert failed(world.client().get("/", headers=asking(port))) == "tls; written=0"


@pytest.mark.parametrize("protocol", ["http1", "http2"])
@pytest.mark.parametrize("is_reset", [False, True])
def test_a_peer_that_breaks_the_handshake_off(world: World, protocol: str, is_reset: bool) -> None:
    """It proved nothing wrong: it is not there, as for this process itself, and no wrong identity."""

    def script(plug: socket.socket) -> None:
        assert plug.recv(65536)
        if is_reset:
            plug.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    with scripted(script) as port:
        reply = world.client().get("/", headers=asking(port, protocol=protocol))
        assert failed(reply) == "connect; written=0"
        assert "refuses our certificate without saying so, or it is stopping." in reply.text


def test_a_peer_that_closes_before_its_answer(world: World) -> None:
    """The request was written: who doesn't know that it is idempotent can't send it again."""
    with scripted(head_of) as port:
        assert failed(world.client().get("/", headers=asking(port, expect="-"))) == "closed; written=1"


def test_a_kept_connection_that_ended_is_stale(world: World) -> None:
    """One answer, and then the end without a byte."""

    def script(plug: socket.socket) -> None:
        head_of(plug)
        plug.sendall(OK)
        head_of(plug)

    with scripted(script) as port:
        client = world.client()
        assert client.get("/", headers=asking(port, expect="-")).status_code == 200
        assert failed(client.get("/", headers=asking(port, expect="-"))) == "stale; written=1"


def test_a_peer_that_speaks_something_else(world: World) -> None:
    """Not HTTP: the connection can't be trusted."""

    def script(plug: socket.socket) -> None:
        head_of(plug)
        plug.sendall(b"SSH-2.0-OpenSSH_9.2\r\n\r\n")
        head_of(plug)

    with scripted(script) as port:
        assert failed(world.client().get("/", headers=asking(port, expect="-"))) == "protocol; written=1"


@pytest.mark.parametrize("how", ["refused_stream", "goaway"])
def test_a_peer_that_declines(world: World, how: str) -> None:
    """REFUSED_STREAM, and GOAWAY below the stream: it was not processed."""

    def script(plug: socket.socket) -> None:
        for peer, event in heard(plug):
            if isinstance(event, h2.events.RequestReceived):
                assert event.stream_id
                if how == "goaway":
                    plug.sendall(struct.pack(">I", 8)[1:] + b"\x07\0" + bytes(4) + bytes(4) + bytes(4))
                else:
                    peer.reset_stream(event.stream_id, 7)

    with scripted(script) as port:
        assert failed(world.client().get("/", headers=asking(port, expect="-", protocol="http2"))) == "declined; written=1"


def test_grpc_gets_its_own_form(world: World) -> None:
    """Trailers only: 200, UNAVAILABLE, and the reason beside it."""
    headers = {**asking(free_port(), expect="-", protocol="http2"), "content-type": "application/grpc+proto", "te": "trailers"}
    reply = world.client(http2=True).post("/a.B/C", headers=headers, content=b"\0\0\0\0\0")
    told = [reply.headers[name] for name in ("grpc-status", "x-mesh-failed", "content-type")]
    assert (reply.status_code, told) == (200, ["14", "connect; written=0", "application/grpc"])
    assert "Nothing listens there" in reply.headers["grpc-message"]


def test_a_failure_after_the_head_cuts_the_message(world: World) -> None:
    """HTTP/1.1: the connection ends in the middle. HTTP/2: the stream is reset."""

    def script(plug: socket.socket) -> None:
        head_of(plug)
        plug.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\nhalf")

    with scripted(script) as port:
        for is_http2 in (False, True):
            with pytest.raises(httpx.RemoteProtocolError) as caught:
                world.client(http2=is_http2).get("/", headers=asking(port, expect="-"))
            if is_http2:
                assert "error_code:2" in str(caught.value).replace(" ", "").replace("ErrorCodes.INTERNAL_ERROR", "2")


@pytest.mark.parametrize("is_http2", [False, True])
@pytest.mark.parametrize("end", ["whole", "cut", "reset"])
def test_an_answer_that_ends_with_its_connection_is_whole_only_if_that_was_closed(world: World, end: str, is_http2: bool) -> None:
    """In the words of HTTP/1.0 nothing else tells its end: what breaks off under TLS is an error, what ends there a whole answer."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    world.issued[ORDERS].load_into(context, world.folder)

    def script(plug: socket.socket) -> None:
        tls = context.wrap_socket(plug, server_side=True)
        head_of(tls)
        tls.sendall(b"HTTP/1.0 200 OK\r\ncontent-type: text/plain\r\n\r\nas far as this")
        time.sleep(0.1)
        if end == "whole":
            with contextlib.suppress(OSError):
                tls.unwrap()
        elif end == "reset":
            tls.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        tls.close()

    with scripted(script) as port:
        client = world.client(http2=is_http2)
        if end == "whole":
            reply = client.get("/", headers=asking(port))
            assert (reply.text, reply.http_version) == ("as far as this", "HTTP/2" if is_http2 else "HTTP/1.1")
        else:
            with pytest.raises(httpx.RemoteProtocolError):
                client.get("/", headers=asking(port))


def test_an_answer_is_never_passed_on_as_one_that_ends_with_the_connection(world: World) -> None:
    """If the agent itself is killed in the middle, its caller sees that: whoever asks in HTTP/1.1 is told the length."""

    def script(plug: socket.socket) -> None:
        head_of(plug)
        plug.sendall(b"HTTP/1.0 200 OK\r\n\r\nhalf")
        plug.recv(1)

    with scripted(script) as port:
        plug = world.caller()
        fields = "".join(f"{name}: {value}\r\n" for name, value in asking(port, expect="-").items())
        plug.sendall(f"GET / HTTP/1.1\r\nhost: orders\r\n{fields}\r\n".encode())
        head = head_of(plug)
        assert head.startswith(b"HTTP/1.1 200 OK\r\n")
        assert b"transfer-encoding: chunked" in head.lower()


def test_a_caller_that_leaves_cancels_at_once(world: World) -> None:
    """The endpoint notices within a tenth of a second, over HTTP/1.1 and HTTP/2."""
    ended: list[float] = []

    def script(plug: socket.socket) -> None:
        head_of(plug)
        with contextlib.suppress(OSError):
            while plug.recv(65536):
                pass
        ended.append(time.monotonic())

    with scripted(script) as port:
        with pytest.raises(httpx.ReadTimeout):
            world.client().get("/", headers=asking(port, expect="-"), timeout=0.3)
        left = time.monotonic()
        until(lambda: ended)
        assert ended[0] - left < 0.1
        ended.clear()
        caller = Caller2(world.caller())
        stream = caller.ask(asking(port, expect="-"))
        until(lambda: world.proxy.stats()["upstream"]["opened"] == 2)
        left = time.monotonic()
        caller.peer.reset_stream(stream, 8)
        caller.flush()
        until(lambda: ended)
        assert ended[0] - left < 0.1


def test_a_request_that_says_nothing_right_is_refused(world: World) -> None:
    """The four fields are read strictly, and each may be there once."""
    client = world.client()
    for wrong in (
        {"x-mesh-endpoint": "nowhere"},
        {"x-mesh-expect": "orders"},
        {"x-mesh-protocol": "http3"},
        {"x-mesh-connect": "soon"},
    ):
        assert client.get("/", headers={**asking(1), **wrong}).status_code == 400, wrong
    twice = [*asking(1).items(), ("x-mesh-endpoint", "127.0.0.1:2")]
    assert client.get("/", headers=twice).status_code == 400


def test_an_identity_that_is_withdrawn_ends_everything(world: World) -> None:
    """Connections of the caller close, and the secret is gone with the identity."""
    port = world.listen(world.application(echo))
    plug = world.caller()
    fields = "".join(f"{name}: {value}\r\n" for name, value in asking(port).items())
    plug.sendall(f"GET / HTTP/1.1\r\nhost: orders\r\n{fields}\r\n".encode())
    assert b"200 OK" in head_of(plug)
    world.proxy.forget(CALLER)
    assert read_all(plug, 2) == b""
    until(lambda: not [row for row in world.proxy.connections() if row["owner"] == CALLER])
    assert failed(world.client().get("/", headers=asking(port))) == "agent; written=0"
    assert world.client().get("/handover").status_code == 404


def test_a_caller_is_whom_it_says_of_those_it_was_attested_for(world: World) -> None:
    """The first of them if it says nothing; nobody else, whatever it says."""
    port = world.listen(world.application(echo))
    other = "spiffe://td/other"
    world.identify(other)
    ours, theirs = socket.socketpair(socket.AF_UNIX)
    ours.settimeout(5)
    world.proxy.adopt(theirs.detach(), CALLER, other)
    told = []
    for named in ({}, {"x-mesh-as": other}, {"x-mesh-as": CALLER}, {"x-mesh-as": f"{CALLER}x"}):
        fields = "".join(f"{name}: {value}\r\n" for name, value in {**asking(port), **named}.items())
        ours.sendall(f"GET / HTTP/1.1\r\nhost: orders\r\n{fields}\r\n".encode())
        head = head_of(ours)
        told.append((head.lower().partition(b"x-came-x-mesh-handed: ")[2].partition(b"id=")[2].partition(b";")[0].decode(), head))
    ours.close()
    assert [who for who, _ in told] == [CALLER, other, CALLER, ""]
    assert b"x-mesh-failed: agent; written=0" in told[3][1].lower()


def test_a_new_generation_is_used_by_new_connections(world: World) -> None:
    """After a rotation the next call proves the new certificate, and the old connection ends."""
    port = world.listen(world.application(echo))
    client = world.client()
    serials = []
    for _ in range(2):
        told = client.get("/", headers=asking(port)).headers["x-came-x-mesh-handed"]
        serials.append(told.partition("serial=")[2].partition(";")[0])
        world.identify(CALLER)
    assert serials[0] != serials[1]
    until(lambda: world.proxy.stats()["upstream"]["open"] <= 1)


def test_an_application_that_is_not_there_is_said_so(world: World) -> None:
    """A peer gets 503 and a problem document, gRPC gets UNAVAILABLE."""
    port = world.listen(world.folder / "nobody.sock")
    reply = world.client().get("/", headers=asking(port))
    assert (reply.status_code, reply.headers["content-type"]) == (503, "application/problem+json")
    assert reply.json() == {"type": "about:blank", "title": "The application is not there.", "status": 503}
    assert "x-mesh-failed" not in reply.headers
    grpc = {**asking(port, protocol="http2"), "content-type": "application/grpc", "te": "trailers"}
    reply = world.client(http2=True).post("/a.B/C", headers=grpc, content=b"")
    assert (reply.status_code, reply.headers["grpc-status"]) == (200, "14")


def answer_all(server: socket.socket) -> None:
    """Takes everybody who is in the queue, and who comes later."""

    def one(plug: socket.socket) -> None:
        head_of(plug)
        plug.sendall(OK)
        plug.recv(1)

    with contextlib.suppress(OSError):
        while True:
            threading.Thread(target=one, args=(server.accept()[0],), daemon=True).start()


def test_an_application_whose_queue_is_full_is_asked_again(world: World) -> None:
    """A burst waits in line for as long as a connection may take; the kernel says at once that there is no room."""
    path = world.folder / "busy.sock"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        server.listen(2)
        caller = Caller2(socket.create_connection(("127.0.0.1", world.listen(path, mode="observe"))))
        for _ in range(20):
            caller.ask({}, method="POST")
        assert caller.wait(h2.events.ResponseReceived, 0.3) is None
        threading.Thread(target=answer_all, args=(server,), daemon=True).start()
        answers = [dict(caller.wait(h2.events.ResponseReceived).headers)[b":status"] for _ in range(20)]
        assert answers == [b"200"] * 20
        caller.plug.close()


def test_an_application_whose_queue_stays_full_is_not_there(world: World) -> None:
    """After a second."""
    path = world.folder / "busy.sock"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        server.listen(2)
        caller = Caller2(socket.create_connection(("127.0.0.1", world.listen(path, mode="observe"))))
        begun = time.monotonic()
        for _ in range(8):
            caller.ask({}, method="POST")
        answers = [dict(caller.wait(h2.events.ResponseReceived).headers)[b":status"] for _ in range(5)]
        assert answers == [b"503"] * 5
        assert 0.9 < time.monotonic() - begun < 3
        caller.plug.close()
