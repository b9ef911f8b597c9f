"""What do the tests of gRPC share? A shop of two services with real engines, gates, certificates and servers, on loopback.

Messages are bytes, so that no generated code is needed. A `Party` is one service's side of the mesh: what `meshlib.Mesh` holds, without
the keeper, so that a test says when something is looked at.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
import weakref
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent import futures
from pathlib import Path
from typing import Any

import grpc
import grpc.aio

from meshlib._native import core
from meshlib.call import outer_end, outer_layer, peer
from meshlib.client.way import OutboundWay
from meshlib.config import load
from meshlib.observe import Observer
from meshlib.observe.trace import Sampler, here
from meshlib.secure import FolderSource, IdentityStore
from meshlib.secure.ca import CertificateAuthority
from meshlib.server.grpc import add_port, server_interceptors, sync_server_interceptors
from meshlib.server.waiting import Room

TRUST_DOMAIN = "shop.internal"
ECHO, FAIL, SLOW, WHO, TELL = (f"/shop.Inventory/{name}" for name in ("Echo", "Fail", "Slow", "Who", "Tell"))
COUNT, SUM, CHAT, BREAK, TRACE = (f"/shop.Inventory/{name}" for name in ("Count", "Sum", "Chat", "Break", "Trace"))
HEALTH = "/grpc.health.v1.Health/Check"

YAML = """
mesh: shop
secure:
  mode: {mode}
  trust_domain: shop.internal
  identity: {{folder: ./identities}}
{more}
services:
  storefront: {{}}
  burglar: {{}}
  inventory:
    protocol: grpc
    discover: {{static: ["127.0.0.1:1"]}}
{service}
    secure: {{{allow}}}
"""


def yaml_of(mode: str = "enforce", *, more: str = "", service: str = "", allow: str = "") -> str:
    """A mesh.yaml of the shop. By default the storefront may call every method of the inventory, and anyone its health."""
    rules = allow or (
        'allow: [{name: shop, from: [storefront], paths: ["/shop.Inventory/*"]},'
        ' {name: health, from: ["*"], paths: ["/grpc.health.v1.Health/*"]}]'
    )
    return YAML.format(mode=mode, more=more, service=service, allow=rules)


class Party:
    """One service's side of the mesh, with the parts that `meshlib.Mesh` has."""

    def __init__(self, file: Path, service: str) -> None:
        self.config = load(file, service=service)
        self.service = service
        self.observer = Observer(service=service)
        now = time.monotonic()
        self.engine = core.Engine(7)
        self.engine.publish(self.config.client_plan(), now)
        self.gate = core.Gate()
        self.gate.publish(self.config.server_plan(), now)
        self.room = Room(self.gate, time.monotonic)
        self.ways: weakref.WeakSet[Any] = weakref.WeakSet()
        self.inbound_rates = None
        self.identity: IdentityStore | None = None
        self.trust = None
        own = self.config.own
        if own.mode != "observe":
            source = FolderSource(self.config.identity_folder, service, self.config.trust_domain, own.identity)
            self.identity = IdentityStore(source, mode=own.mode)
            self.identity.require(time.time())
        self.outbound = OutboundWay(self.engine, self.identity, self.observer)
        self._version = 0

    def knows(self, addresses: Sequence[str], service: str = "inventory") -> Party:
        """These are the endpoints of a service now."""
        self._version += 1
        identity = self.config.identity_of(service) if self.config.is_private(service) else ""
        rows = [(address, 1.0, "", {}, identity) for address in addresses]
        self.engine.resolve(service, self._version, rows, time.monotonic())
        return self

    def of(self, endpoint: str = "", service: str = "inventory") -> dict[str, Any]:
        """The engine's statistics of an endpoint, or of the service."""
        rows = self.engine.stats(time.monotonic())
        return next(row for row in rows if row["service"] == service and row["endpoint"] == endpoint)


class Shop:
    """The whole: a folder with a mesh.yaml and a CA, and the servers that a test started."""

    def __init__(self, folder: Path, text: str | None = None) -> None:
        self.folder = folder
        self.file = folder / "mesh.yaml"
        self.file.write_text(text or yaml_of())
        self.identities = folder / "identities"
        self.ca = CertificateAuthority.create(None, TRUST_DOMAIN)
        self.certify()
        self.backends: list[Backend] = []

    def certify(self) -> None:
        """New certificates for everybody."""
        for service in ("storefront", "inventory", "burglar"):
            self.ca.write(service, self.identities)

    def party(self, service: str) -> Party:
        return Party(self.file, service)

    async def start(self, name: str = "a", *, host: str = "127.0.0.1", party: Party | None = None, **behaviour: Any) -> Backend:
        """A backend of the inventory on a free port."""
        backend = Backend(party or self.party("inventory"), name, **behaviour)
        await backend.listen(f"{host}:0")
        self.backends.append(backend)
        return backend

    async def stop(self) -> None:
        for backend in self.backends:
            await backend.stop()


class Backend:
    """A grpc.aio server of the inventory. `fails` makes each call end with that code, `delay` makes it slow."""

    def __init__(self, party: Party, name: str, *, fails: grpc.StatusCode | None = None, delay: float = 0.0) -> None:
        self.party = party
        self.name = name
        self.fails = fails
        self.words = "told to fail"
        self.delay = delay
        self.calls = 0
        self.address = ""
        self.server = grpc.aio.server(interceptors=list(server_interceptors(party)), options=[("grpc.so_reuseport", 0)])
        self.server.add_generic_rpc_handlers((handlers(self),))

    async def listen(self, address: str, **more: Any) -> int:
        port = add_port(self.party, self.server, address, **more)
        self.address = f"{address.rpartition(':')[0]}:{port}"
        await self.server.start()
        return port

    async def stop(self) -> None:
        await self.server.stop(None)


def handlers(backend: Backend) -> grpc.GenericRpcHandler:
    async def meet(context: Any) -> None:
        backend.calls += 1
        if backend.delay:
            await asyncio.sleep(backend.delay)
        if backend.fails is not None:
            await context.abort(backend.fails, backend.words)

    async def echo(request: bytes, context: Any) -> bytes:
        await meet(context)
        return request

    async def fail(request: bytes, context: Any) -> bytes:
        backend.calls += 1
        await context.abort(grpc.StatusCode[request.decode()], "as asked", (("why", "asked"),))
        return b""

    async def slow(request: bytes, context: Any) -> bytes:
        backend.calls += 1
        await asyncio.sleep(float(request))
        return b"at last"

    async def who(request: bytes, context: Any) -> bytes:
        caller, end = peer(), outer_end()
        assert caller is not None
        left = -1.0 if end is None else end - time.monotonic()
        return f"{caller.spiffe_id}|{caller.is_tls}|{caller.serial}|{left:.3f}|{outer_layer()}".encode()

    async def trace(request: bytes, context: Any) -> bytes:
        found = here(Sampler(1.0))
        assert found is not None
        sent = [value for key, value in context.invocation_metadata() if key == "traceparent"]
        return b"|".join([found.found.trace_id, *(value.encode() for value in sent)])

    async def tell(request: bytes, context: Any) -> bytes:
        await context.send_initial_metadata((("name", backend.name),))
        context.set_trailing_metadata((("bye", "now"),))
        return repr(sorted((k, v) for k, v in context.invocation_metadata() if k not in ("user-agent", "traceparent"))).encode()

    async def count(request: bytes, context: Any) -> AsyncIterator[bytes]:
        await meet(context)
        for number in range(int(request)):
            yield str(number).encode()

    async def break_off(request: bytes, context: Any) -> AsyncIterator[bytes]:
        backend.calls += 1
        yield b"one"
        await context.abort(grpc.StatusCode.INTERNAL, "broke")

    async def total(requests: Any, context: Any) -> bytes:
        await meet(context)
        return str(sum([int(request) async for request in requests])).encode()

    async def chat(requests: Any, context: Any) -> None:
        await meet(context)
        while (request := await context.read()) is not grpc.aio.EOF:
            await context.write(b"re: " + request)

    async def check(request: bytes, context: Any) -> bytes:
        return b"\x08\x01"  # grpc.health.v1.HealthCheckResponse: SERVING

    inventory = {
        "Echo": grpc.unary_unary_rpc_method_handler(echo),
        "Fail": grpc.unary_unary_rpc_method_handler(fail),
        "Slow": grpc.unary_unary_rpc_method_handler(slow),
        "Who": grpc.unary_unary_rpc_method_handler(who),
        "Trace": grpc.unary_unary_rpc_method_handler(trace),
        "Tell": grpc.unary_unary_rpc_method_handler(tell),
        "Count": grpc.unary_stream_rpc_method_handler(count),
        "Break": grpc.unary_stream_rpc_method_handler(break_off),
        "Sum": grpc.stream_unary_rpc_method_handler(total),
        "Chat": grpc.stream_stream_rpc_method_handler(chat),
    }
    known = {f"/shop.Inventory/{name}": handler for name, handler in inventory.items()}
    known[HEALTH] = grpc.unary_unary_rpc_method_handler(check)

    class Handlers(grpc.GenericRpcHandler):
        def service(self, handler_call_details: Any) -> Any:
            return known.get(handler_call_details.method)

    return Handlers()


def blocking_handlers() -> grpc.GenericRpcHandler:
    """The same methods for threads, as far as tests need them."""

    def echo(request: bytes, context: Any) -> bytes:
        return request

    def who(request: bytes, context: Any) -> bytes:
        caller, end = peer(), outer_end()
        assert caller is not None
        return f"{caller.spiffe_id}|{caller.is_tls}|{end is not None}".encode()

    def fail(request: bytes, context: Any) -> bytes:
        context.abort(grpc.StatusCode[request.decode()], "as asked")
        return b""

    def count(request: bytes, context: Any) -> Iterator[bytes]:
        caller = peer()
        assert caller is not None
        for number in range(int(request)):
            yield f"{number} {caller.service}".encode()

    def total(requests: Iterator[bytes], context: Any) -> bytes:
        return str(sum(int(request) for request in requests)).encode()

    def chat(requests: Iterator[bytes], context: Any) -> Iterator[bytes]:
        for request in requests:
            yield b"re: " + request

    return grpc.method_handlers_generic_handler(
        "shop.Inventory",
        {
            "Echo": grpc.unary_unary_rpc_method_handler(echo),
            "Who": grpc.unary_unary_rpc_method_handler(who),
            "Fail": grpc.unary_unary_rpc_method_handler(fail),
            "Count": grpc.unary_stream_rpc_method_handler(count),
            "Sum": grpc.stream_unary_rpc_method_handler(total),
            "Chat": grpc.stream_stream_rpc_method_handler(chat),
        },
    )


@contextlib.contextmanager
def blocking_server(party: Party) -> Iterator[str]:
    """A grpc.server of the inventory in threads; gives its address."""
    server = grpc.server(
        futures.ThreadPoolExecutor(8), interceptors=list(sync_server_interceptors(party)), options=[("grpc.so_reuseport", 0)]
    )
    server.add_generic_rpc_handlers((blocking_handlers(),))
    port = add_port(party, server, "127.0.0.1:0")
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(None).wait(5)


async def until(condition: Callable[[], bool], *, patience: float = 5.0) -> None:
    """Let the loop run until something holds."""
    end = time.monotonic() + patience
    while not condition():
        assert time.monotonic() < end, "it never came to hold"
        await asyncio.sleep(0.005)
