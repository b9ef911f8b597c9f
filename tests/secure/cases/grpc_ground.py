"""How does an attack reach a gRPC server? A real server of grpcio behind our interceptors, and raw HTTP/2 frames to it over mutual TLS."""

from __future__ import annotations

import atexit
import json
import socket
import ssl
from concurrent import futures
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import grpc
import h2.config
import h2.connection
import h2.events

from tests.secure.cases import ground

STATUS = {code.value[0]: code.name for code in grpc.StatusCode}


@dataclass
class Answer:
    """What came back: gRPC's status, or how the stream or the connection ended."""

    status: str = ""
    text: str = ""
    http: str = ""
    ended: list[str] = field(default_factory=list)
    goaway: str = ""


class _Everything(grpc.GenericRpcHandler):
    """A handler for whatever name it is asked for."""

    def service(self, handler_call_details: Any) -> Any:
        return grpc.unary_unary_rpc_method_handler(lambda request, context: b"")


def port_of(content: dict[str, Any]) -> int:
    """The port of a server in mode enforce under this configuration."""
    return _serve(json.dumps(content, sort_keys=True))


@lru_cache(maxsize=16)
def _serve(content: str) -> int:
    mesh = ground.mesh_of(json.loads(content))
    pool = futures.ThreadPoolExecutor(2)
    server = grpc.server(pool, interceptors=list(mesh.sync_grpc_server_interceptors()))
    server.add_generic_rpc_handlers((_Everything(),))
    port = mesh.add_grpc_port(server, "127.0.0.1:0")
    server.start()
    atexit.register(lambda: server.stop(None).wait(2))
    return port


def context(service: str = "caller", *, alpn: str = "h2") -> ssl.SSLContext:
    """A client's TLS with the identity of a service."""
    folder = ground.home() / "identities" / service
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    made.check_hostname = False
    made.load_verify_locations(str(folder / "bundle.pem"))
    made.load_cert_chain(str(folder / "svid.pem"), str(folder / "key.pem"))
    made.set_alpn_protocols([alpn])
    return made


class Raw:
    """One HTTP/2 connection that sends what it is told, right or wrong."""

    def __init__(self, port: int, *, timeout: float = 5.0) -> None:
        plug = socket.create_connection(("127.0.0.1", port), timeout)
        self.sock = context().wrap_socket(plug, server_hostname="svc")
        config = h2.config.H2Configuration(
            client_side=True,
            header_encoding="utf-8",
            validate_outbound_headers=False,
            normalize_outbound_headers=False,
        )
        self.h2 = h2.connection.H2Connection(config)
        self.h2.initiate_connection()
        self.flush()

    def flush(self) -> None:
        self.sock.sendall(self.h2.data_to_send())

    def call(self, path: str, *metadata: tuple[str, str], body: bytes = b"\0\0\0\0\0") -> Answer:
        """A unary call, as far as it gets."""
        stream = self.h2.get_next_available_stream_id()
        fields = [(":method", "POST"), (":scheme", "https"), (":path", path), (":authority", "svc.local")]
        self.h2.send_headers(stream, [*fields, ("te", "trailers"), ("content-type", "application/grpc"), *metadata])
        self.h2.send_data(stream, body, end_stream=True)
        self.flush()
        return self.listen(stream)

    def listen(self, stream: int) -> Answer:
        """Until this stream or the connection ends."""
        answer = Answer()
        while True:
            try:
                data = self.sock.recv(65536)
            except TimeoutError:
                answer.ended.append("timeout")
                return answer
            except OSError:
                data = b""
            if not data:
                answer.ended.append("closed")
                return answer
            for event in self.h2.receive_data(data):
                if isinstance(event, h2.events.ResponseReceived | h2.events.TrailersReceived) and event.stream_id == stream:
                    for name, value in event.headers:
                        self._note(answer, str(name), str(value))
                elif isinstance(event, h2.events.StreamReset) and event.stream_id == stream:
                    answer.ended.append(f"reset:{event.error_code}")
                    return answer
                elif isinstance(event, h2.events.ConnectionTerminated):
                    answer.goaway = str(event.error_code)
                    return answer
                elif isinstance(event, h2.events.StreamEnded) and event.stream_id == stream:
                    return answer
            self.flush()

    @staticmethod
    def _note(answer: Answer, name: str, value: str) -> None:
        if name == "grpc-status":
            answer.status = STATUS.get(int(value), value)
        elif name == "grpc-message":
            answer.text = value
        elif name == ":status":
            answer.http = value

    def close(self) -> None:
        self.sock.close()


class _Aborted(Exception):
    """How a handler of grpcio ends a call."""


class _Context:
    """As much of a ServicerContext as a refusal needs."""

    def __init__(self) -> None:
        self.code: grpc.StatusCode | None = None

    def abort(self, code: grpc.StatusCode, details: str) -> None:
        self.code = code
        raise _Aborted

    def peer(self) -> str:
        return "ipv4:203.0.113.9:40000"

    def auth_context(self) -> dict[str, list[bytes]]:
        return {"transport_security_type": [b"ssl"], "x509_pem_cert": []}

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **more: None


@dataclass
class _Details:
    method: str
    invocation_metadata: tuple[tuple[str, str], ...] = ()


def asked_directly(content: dict[str, Any], method: str) -> str:
    """The status with which our interceptors answer a method's name, without a connection."""
    mesh = ground.mesh_of(content)
    interceptor = mesh.sync_grpc_server_interceptors()[0]
    handler = interceptor.intercept_service(_Everything().service, _Details(method))
    context = _Context()
    try:
        if handler.unary_unary is not None:
            handler.unary_unary(b"", context)
        else:
            list(handler.stream_stream(iter(()), context))
    except _Aborted:
        assert context.code is not None
        return context.code.name
    return "OK"
