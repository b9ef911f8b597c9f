"""What do the tests of the inbound way share? A gate with a small policy, calls without a server, and servers without a process."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from meshlib._native import core
from meshlib.call import Peer
from meshlib.secure import FolderSource, IdentityStore
from meshlib.server.line import LINE, Line
from meshlib.server.way import InboundWay
from tests.support import TRUST_DOMAIN, server_plan, server_rule

ORDERS = f"spiffe://{TRUST_DOMAIN}/ns/default/sa/orders"
SHOP = f"spiffe://{TRUST_DOMAIN}/ns/default/sa/storefront"
ANY = [{"kind": "any"}]

# Who calls where a test does not care: mode enforce takes nobody without an identity.
SOMEBODY = Peer(f"spiffe://{TRUST_DOMAIN}/ns/default/sa/somebody", is_tls=True)


def rule(
    name: str, *paths: str, action: str = "allow", methods: Iterable[str] = (), callers: list[dict[str, str]] | None = None
) -> Any:
    """`/x/*` is a prefix, anything else exact; without paths, all."""
    wanted = [
        {"kind": "prefix", "value": path[:-1]} if path.endswith("*") else {"kind": "exact", "value": path} for path in paths
    ]
    return server_rule(name, action, callers=callers or ANY, methods=list(methods), paths=wanted)


def exact(spiffe_id: str) -> list[dict[str, str]]:
    return [{"kind": "exact", "value": spiffe_id}]


def plan(*rules: Any, mode: str = "enforce", on_disconnect: str = "calls", **more: Any) -> bytes:
    routes = [{"name": "items", "path": {"kind": "template", "value": "/items/{id}"}, "on_disconnect": on_disconnect}]
    return server_plan(*rules, mode=mode, routes=routes, **more)


class Clock:
    """Time that moves when a test says so."""

    def __init__(self, now: float = 1000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def way(*rules: Any, clock: Callable[[], float] = time.monotonic, observer: Any = None, **more: Any) -> InboundWay:
    gate = core.Gate()
    gate.publish(plan(*(rules or [rule("all")]), **more), clock())
    return InboundWay(gate, observer, clock)


def row(inbound: InboundWay) -> dict[str, Any]:
    """The only series that a gate has counted."""
    (found,) = inbound.gate.stats()
    return found


def in_flight(inbound: InboundWay) -> int:
    return sum(found["in_flight"] for found in inbound.gate.stats())


def http_scope(
    target: str = "/items/7", *headers: tuple[str, str], method: str = "GET", peer: Peer | None = SOMEBODY, **more: Any
) -> dict[str, Any]:
    raw, _, query = target.partition("?")
    scope: dict[str, Any] = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": raw,
        "raw_path": raw.encode("latin-1"),
        "query_string": query.encode("latin-1"),
        "root_path": "",
        "headers": [(b"host", b"orders"), *((name.encode("latin-1"), value.encode("latin-1")) for name, value in headers)],
        "client": ("127.0.0.1", 4000),
        "server": ("127.0.0.1", 8000),
        **more,
    }
    if peer is not None:
        scope[LINE] = Line(peer, "127.0.0.1", 8000, is_ours=True)
    return scope


class Caller:
    """The server's half of an ASGI call: what the application receives, and what it sent."""

    def __init__(self, *messages: dict[str, Any]) -> None:
        self.messages = list(messages) or [{"type": "http.request", "body": b"", "more_body": False}]
        self.sent: list[dict[str, Any]] = []

    async def receive(self) -> dict[str, Any]:
        return self.messages.pop(0) if self.messages else {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        self.sent.append(dict(message))

    @property
    def status(self) -> int:
        return int(next(message["status"] for message in self.sent if message["type"].endswith("response.start")))

    @property
    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.sent if message["type"].endswith("response.body"))

    @property
    def problem(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.body)
        return found


class Inside:
    """A mesh, as far as a door looks at it."""

    def __init__(self, mode: str, identity: Any) -> None:
        self.config = SimpleNamespace(own=SimpleNamespace(mode=mode, inbound=SimpleNamespace(public=None, agent="")))
        self.identity = identity
        self.trust = None
        # Who has proved to be somebody, and from where.
        self.seen: list[tuple[str, str]] = []
        self.watch = SimpleNamespace(proved=lambda address, peer: self.seen.append((address, peer)))


def store(folder: Path, service: str = "orders") -> IdentityStore:
    """The identity of a service in a folder of SVIDs."""
    made = IdentityStore(FolderSource(folder, service, TRUST_DOMAIN, ORDERS.replace("orders", service)), mode="enforce")
    made.refresh(0.0)
    return made
