"""Do streams get through: WebSocket over HTTP/1.1, gRPC of every kind over HTTP/2, and bodies with trailers?"""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

import grpc
import h2.config
import h2.connection
import h2.events
import httpx
import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import unix_connect

from tests.agent.proxy_support import CALLER, Caller2, World, asking, facts, head_of, heard, read_all, scripted, until, world

__all__ = ["world"]


async def websocket(scope: dict[str, Any], receive: Any, send: Any) -> None:
    """Says back what it hears, after it has said who called."""
    if scope["type"] == "http":
        await send({"type": "http.response.start", "status": 403, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body", "body": b""})
        return
    await receive()
    await send({"type": "websocket.accept"})
    await send({"type": "websocket.send", "text": dict(scope["headers"])[b"x-mesh-handed"].decode()})
    while True:
        event = await receive()
        if event["type"] == "websocket.disconnect":
            return
        await send({"type": "websocket.send", "text": event["text"]})


def test_a_websocket_goes_through_both_agents(world: World) -> None:
    """Both ways, text of any size, until one side ends."""
    port = world.listen(world.application(websocket))
    with unix_connect(world.data_socket(), "ws://orders/chat", additional_headers=asking(port), max_size=None) as plug:
        assert facts(str(plug.recv(10)))["id"] == CALLER
        for text in ("hello", "x" * 200_000):
            plug.send(text)
            assert text == plug.recv(10)


def test_an_offer_that_is_refused_leaves_the_connection_usable(world: World) -> None:
    """The answer is passed on, and the next request follows on the same connection."""
    port = world.listen(world.application(websocket))
    plug = world.caller()
    fields = "".join(f"{name}: {value}\r\n" for name, value in asking(port).items())
    offer = f"GET / HTTP/1.1\r\nhost: orders\r\nconnection: upgrade\r\nupgrade: unknown\r\n{fields}\r\n"
    for _ in range(2):
        plug.sendall(offer.encode())
        assert b" 403 " in head_of(plug)


def _read_on(plug: socket.socket) -> None:
    head_of(plug)
    plug.recv(1)


def test_bytes_before_the_answer_to_an_offer_are_refused(world: World) -> None:
    """Nobody smuggles a request in behind an upgrade."""
    with scripted(_read_on) as port:
        plug = world.caller()
        fields = "".join(f"{name}: {value}\r\n" for name, value in asking(port, expect="-").items())
        offer = f"GET / HTTP/1.1\r\nhost: orders\r\nconnection: upgrade\r\nupgrade: websocket\r\n{fields}\r\n"
        plug.sendall(offer.encode() + b"GET /admin HTTP/1.1\r\nhost: orders\r\n\r\n")
        assert b" 200 " not in read_all(plug, 5)


class Numbers(grpc.GenericRpcHandler):  # type: ignore[type-arg]
    """One service without a schema: bytes in, bytes out."""

    def service(self, details: Any) -> Any:
        kinds = {"/n.N/One": self.one, "/n.N/Many": self.many, "/n.N/All": self.all, "/n.N/Both": self.both, "/n.N/Bad": self.bad}
        method = kinds.get(details.method)
        return method() if method else None

    def one(self) -> Any:
        return grpc.unary_unary_rpc_method_handler(
            lambda request, context: dict(context.invocation_metadata())["x-mesh-handed"].encode()
        )

    def many(self) -> Any:
        return grpc.unary_stream_rpc_method_handler(lambda request, context: iter([request] * 50))

    def all(self) -> Any:
        return grpc.stream_unary_rpc_method_handler(lambda requests, context: b"".join(requests))

    def both(self) -> Any:
        return grpc.stream_stream_rpc_method_handler(lambda requests, context: (request * 2 for request in requests))

    def bad(self) -> Any:
        def refuse(request: bytes, context: Any) -> bytes:
            context.set_trailing_metadata((("x-why", "because"),))
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, "not now")
            raise AssertionError

        return grpc.unary_unary_rpc_method_handler(refuse)


@contextlib.contextmanager
def numbers(path: Path) -> Iterator[None]:
    server = grpc.server(futures.ThreadPoolExecutor(4))
    server.add_generic_rpc_handlers((Numbers(),))
    server.add_insecure_port(f"unix:{path}")
    server.start()
    try:
        yield
    finally:
        server.stop(0).wait(5)


@pytest.fixture
def channel(world: World) -> Iterator[tuple[Any, Any]]:
    with numbers(world.folder / "grpc.sock"):
        port = world.listen(world.folder / "grpc.sock")
        metadata = tuple(asking(port, protocol="http2").items())
        with grpc.insecure_channel(f"unix:{world.data_socket()}", options=[("grpc.default_authority", "orders")]) as made:
            yield made, metadata


def test_grpc_of_every_kind_goes_through(channel: tuple[Any, Any]) -> None:
    """Unary, streams each way, both ways; the caller's proof is in the metadata."""
    plug, metadata = channel
    assert facts(plug.unary_unary("/n.N/One")(b"x", metadata=metadata, timeout=10).decode())["id"] == CALLER
    assert list(plug.unary_stream("/n.N/Many")(b"y", metadata=metadata, timeout=10)) == [b"y"] * 50
    assert plug.stream_unary("/n.N/All")(iter([b"a", b"b", b"c"]), metadata=metadata, timeout=10) == b"abc"
    assert list(plug.stream_stream("/n.N/Both")(iter([b"a", b"b"]), metadata=metadata, timeout=10)) == [b"aa", b"bb"]
    large = b"z" * 3_000_000
    assert [large] * 50 != list(plug.unary_stream("/n.N/Many")(b"", metadata=metadata, timeout=10))
    assert large == plug.stream_unary("/n.N/All")(iter([large]), metadata=metadata, timeout=20)


def test_a_status_and_its_trailers_come_through(channel: tuple[Any, Any]) -> None:
    """What the application said last is what the caller gets."""
    plug, metadata = channel
    with pytest.raises(grpc.RpcError) as caught:
        plug.unary_unary("/n.N/Bad")(b"x", metadata=metadata, timeout=10)
    error: Any = caught.value
    assert (error.code(), error.details()) == (grpc.StatusCode.FAILED_PRECONDITION, "not now")
    assert dict(error.trailing_metadata())["x-why"] == "because"


def test_a_call_that_is_cancelled_reaches_the_application(channel: tuple[Any, Any]) -> None:
    """A stream that the caller ends in the middle ends, and the next call goes on."""
    plug, metadata = channel
    stream = plug.stream_stream("/n.N/Both")(iter([b"a"]), metadata=metadata, timeout=10)
    assert next(stream) == b"aa"
    stream.cancel()
    assert plug.unary_unary("/n.N/One")(b"x", metadata=metadata, timeout=10)


def test_trailers_of_http1_pass(world: World) -> None:
    """A chunked answer's trailers come out at the other end, without what is for one hop."""

    def script(plug: socket.socket) -> None:
        head_of(plug)
        plug.sendall(
            b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\ntrailer: x-sum, x-mesh-failed\r\n\r\n"
            b"2\r\nok\r\n0\r\nx-sum: 7\r\nx-mesh-failed: connect\r\n\r\n"
        )

    with scripted(script) as port:
        plug = world.caller()
        fields = "".join(f"{name}: {value}\r\n" for name, value in asking(port, expect="-").items())
        plug.sendall(f"GET / HTTP/1.1\r\nhost: orders\r\nte: trailers\r\nconnection: te, close\r\n{fields}\r\n".encode())
        data = read_all(plug, 5)
        assert b"x-sum: 7" in data
        assert b"connect" not in data.partition(b"\r\n\r\n")[2]


def test_a_websocket_is_listed_and_ends_with_the_identity(world: World) -> None:
    """It counts as open on both sides while it lasts, and is cut when the caller's identity is withdrawn."""
    port = world.listen(world.application(websocket))
    with unix_connect(world.data_socket(), "ws://orders/chat", additional_headers=asking(port)) as plug:
        plug.recv(10)
        stats = world.proxy.stats()
        assert (stats["outbound"]["connections_open"], stats["inbound"]["orders"]["connections_open"]) == (1, 1)
        world.proxy.forget(CALLER)
        with pytest.raises(ConnectionClosed):
            plug.recv(5)
    until(lambda: world.proxy.stats()["inbound"]["orders"]["connections_open"] == 0)


@pytest.mark.slow
def test_a_websocket_is_cut_some_time_after_its_caller_was_told_to_come_again(world: World) -> None:
    """Its entry is gone: for half a minute it may go on, as a stream of HTTP/2 may, and no longer."""
    port = world.listen(world.application(websocket))
    with unix_connect(world.data_socket(), "ws://orders/chat", additional_headers=asking(port)) as plug:
        plug.recv(10)
        begun = time.monotonic()
        world.proxy.readmit(CALLER)
        with pytest.raises(ConnectionClosed):
            while time.monotonic() < begun + 40:
                plug.send("still here")
                assert plug.recv(10) == "still here"
                time.sleep(0.2)
        assert 25 < time.monotonic() - begun < 35


class Breaking:
    """An endpoint of HTTP/2 that answers with half a message, and then ends in some way."""

    def __init__(self, end: str, kind: str = "application/grpc") -> None:
        self.end = end
        self.kind = kind

    def __call__(self, plug: socket.socket) -> None:
        for peer, event in heard(plug):
            if isinstance(event, h2.events.RequestReceived):
                assert event.stream_id
                fields = [(":status", "200"), ("content-type", self.kind)]
                if self.end == "no error":
                    fields.append(("content-length", "100"))
                peer.send_headers(event.stream_id, fields)
                # A whole message, and the beginning of another one.
                peer.send_data(event.stream_id, b"\0\0\0\0\5first\0\0\0\0\5se")
                plug.sendall(peer.data_to_send())
                time.sleep(0.2)
                if self.end == "closed":
                    return
                peer.reset_stream(event.stream_id, {"refused": 7, "cancelled": 8, "calm": 11, "no error": 0}[self.end])


@pytest.mark.parametrize(
    ("end", "code"),
    [
        ("closed", grpc.StatusCode.UNAVAILABLE),
        ("refused", grpc.StatusCode.UNAVAILABLE),
        ("cancelled", grpc.StatusCode.CANCELLED),
        ("calm", grpc.StatusCode.RESOURCE_EXHAUSTED),
    ],
)
def test_a_stream_that_breaks_ends_as_it_would_without_an_agent(world: World, end: str, code: grpc.StatusCode) -> None:
    """A connection that ends is UNAVAILABLE, a reset is what it says; what had come before is delivered, and no half message."""
    with scripted(Breaking(end)) as port:
        for target, metadata in (
            (f"unix:{world.data_socket()}", tuple(asking(port, expect="-", protocol="http2").items())),
            (f"127.0.0.1:{port}", ()),
        ):
            with grpc.insecure_channel(target, options=[("grpc.default_authority", "orders")]) as channel:
                plug: Any = channel
                stream = plug.unary_stream("/n.N/Many")(b"x", metadata=metadata, timeout=10)
                assert next(stream) == b"first"
                with pytest.raises(grpc.RpcError) as caught:
                    next(stream)
                error: Any = caught.value
                assert error.code() == code, (target, error)


@pytest.mark.parametrize("end", ["closed", "refused", "cancelled", "no error"])
@pytest.mark.parametrize("is_http2", [False, True])
def test_an_answer_of_http2_that_breaks_never_looks_whole(world: World, end: str, is_http2: bool) -> None:
    """Also where the other side resets it without an error, short of the length that it had named."""
    with scripted(Breaking(end, "text/plain")) as port:
        with pytest.raises(httpx.RemoteProtocolError):
            world.client(http2=is_http2).get("/", headers=asking(port, expect="-", protocol="http2"))


def test_an_upload_that_its_caller_gives_up_never_looks_whole(world: World) -> None:
    """The endpoint of a chunked body sees the connection end, and not the last chunk."""
    came: list[bytes] = []

    def script(plug: socket.socket) -> None:
        data = head_of(plug)
        with contextlib.suppress(OSError):
            while piece := plug.recv(65536):
                data += piece
        came.append(data)

    with scripted(script) as port:
        caller = Caller2(world.caller())
        stream = caller.ask(asking(port, expect="-"), method="POST", is_end=False)
        caller.peer.send_data(stream, b"half")
        caller.flush()
        until(lambda: world.proxy.stats()["upstream"]["opened"] == 1)
        time.sleep(0.2)
        caller.peer.reset_stream(stream, 8)
        caller.flush()
        until(lambda: came)
        assert b"half" in came[0]
        assert not came[0].endswith(b"0\r\n\r\n")
