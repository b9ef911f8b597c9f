"""How do two nodes with an agent each come about, with services of several users and a CA that they enrol with?

    node A   the CA (`meshlib ca serve`), an agent, `storefront` and `stranger` who call, and a second instance of `orders`
    node B   an agent, `orders` (uvicorn) and `stock` (gRPC) behind it

Each service is a user of its own, by whom the agent knows it. The nodes are network namespaces of one machine (hosts.py) and share its
file system; what belongs to a node lies in its folder. Identities come by enrolment, with one-use tokens.

What happens to them is the tests'. A program that must end in a certain order is ended by its own block.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from meshlib.secure import CertificateAuthority, files
from meshlib.secure.tokens import Tokens
from tests.agent.daemon_world import as_user, ask
from tests.chaos.hosts import CLI, Host, Running
from tests.support import PYTHON

DOMAIN = "shop.internal"
USERS = {"orders": 4101, "stock": 4102, "storefront": 4103, "stranger": 4104}
NOBODY = 4105
# How far the ports of the services are from the first of their pair, which is the CA's.
PORTS = {"orders": 1, "stock": 2}
RULES = {"allow": [{"name": "storefront", "from": ["storefront"]}]}


def id_of(service: str) -> str:
    return f"spiffe://{DOMAIN}/ns/default/sa/{service}"


@dataclass(frozen=True)
class User(Host):
    """A user of a host."""

    uid: int = 0

    def command(self, *words: object) -> list[str]:
        before, (python, *rest) = ["ip", "netns", "exec", self.name], [PYTHON, *map(str, words)]
        return [*before, *as_user(self.uid), python, *rest]


@dataclass
class Node:
    """One of the two. `services` are those for which its agent has an entry, `served` those that it serves."""

    host: Host
    letter: str
    port: int
    enrol: str
    services: tuple[str, ...]
    served: tuple[str, ...]
    agent: Running | None = None
    stack: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    @property
    def folder(self) -> Path:
        return self.host.folder

    def address_of(self, service: str) -> str:
        return f"{self.host.address}:{self.port + PORTS[service]}"

    def user(self, uid: int) -> User:
        return User(self.host.name, self.host.address, self.folder, uid)

    def socket_of(self, service: str) -> Path:
        return self.folder / service / "app.sock"

    def config(self, name: str, **services: dict[str, Any]) -> Path:
        """A mesh.yaml of this node, in which `services` have more than what all say."""
        own: dict[str, Any] = {name: {} for name in USERS}
        for service in PORTS:
            own[service] = {"secure": RULES, "delegate": "agent", "discover": {"static": [self.address_of(service)]}}
        own["stock"]["protocol"] = "grpc"
        for service in self.served:
            own[service] |= {
                "listen": self.address_of(service),
                "inbound": {"agent": str(self.socket_of(service))},
            }
        for service, more in services.items():
            own[service] |= more
        entries: Any = [{"service": each, "uid": USERS[each], "token": str(self.token_of(each))} for each in self.services]
        agent: dict[str, Any] = {name: str(self.folder / f"{name}.sock") for name in ("socket", "data", "admin")}
        agent |= {"state": str(self.folder / "state"), "enrol": self.enrol, "entries": entries}
        secure = {"mode": "enforce", "trust_domain": DOMAIN, "identity": {"agent": True}}
        file = self.folder / f"{name}.yaml"
        file.write_text(json.dumps({"mesh": "shop", "secure": secure, "agent": agent, "services": own}))
        return file

    def token_of(self, service: str) -> Path:
        return self.folder / "tokens" / service

    def start(self) -> Running:
        """The agent; returns when the process was made."""
        self.agent = self.stack.enter_context(self.host.running("-c", CLI, "agent", "run", "--config", self.folder / "mesh.yaml"))
        return self.agent

    def ready(self) -> float:
        """When the agent had said that it serves."""
        assert self.agent is not None
        self.agent.wait_for("agent status")
        return time.monotonic()

    def send(self, number: signal.Signals) -> float:
        assert self.agent is not None
        self.agent.child.send_signal(number)
        return time.monotonic()

    def end(self, number: signal.Signals) -> tuple[float, float]:
        """End the agent: when it was told, and when it was gone."""
        begun = self.send(number)
        assert self.agent is not None
        self.agent.child.wait(35)
        return begun, time.monotonic()

    def ask(self, what: str) -> Any:
        """The admin socket of the agent."""
        return ask(self.folder / "admin.sock", what)[1]

    def serve(self, service: str) -> Running:
        path = self.socket_of(service)
        path.parent.mkdir(mode=0o755)
        os.chown(path.parent, USERS[service], USERS[service])
        variables = {"MESHLIB_CONFIG": str(self.folder / "mesh.yaml"), "MESHLIB_SERVICE": service, "NODE": self.letter}
        uvicorn = ("-m", "uvicorn", "--factory", "tests.chaos.node_app:asgi", "--uds", path, "--no-access-log")
        words = ("-m", "tests.chaos.node_app", path) if service == "stock" else uvicorn
        return self.stack.enter_context(self.user(USERS[service]).running(*words, **variables))


class Calls:
    """A process that calls, and in the end what it has seen."""

    def __init__(self, name: str, running: Running) -> None:
        self.name = name
        self.running = running
        self.calls: list[tuple[float, float, str]] = []
        self.sent: list[tuple[float, float, str, int, str]] = []
        self.states: list[tuple[float, str]] = []
        self.stats: dict[str, Any] = {}

    def ready(self) -> None:
        told = self.running.wait_for("told", 30)
        assert told.startswith("told 200"), "".join(self.running.said)
        self.running.wait_for("ready")

    def stop(self) -> None:
        self.running.child.send_signal(signal.SIGTERM)

    def read(self) -> None:
        told = json.loads(self.running.wait_for(lambda line: line.startswith("result "), 40).removeprefix("result "))
        self.calls, self.sent, self.states = told["calls"], told["sent"], told["states"]
        self.stats = told["stats"]

    @property
    def faults(self) -> list[str]:
        return [fault for _, _, fault in self.calls if fault]

    def between(self, begin: float, end: float) -> list[tuple[float, float, str, int, str]]:
        """What began then and had an answer."""
        return [row for row in self.sent if begin <= row[0] < end]

    def when(self, state: str, after: float) -> float:
        """When the agent was found to be in that state; NaN for never."""
        return next((at for at, name in self.states if name == state and at >= after), float("nan"))


class Pair:
    """Both nodes, running."""

    def __init__(self, a: Node, b: Node) -> None:
        self.a = a
        self.b = b

    def addresses(self, *nodes: Node, service: str = "orders") -> dict[str, Any]:
        return {"discover": {"static": [node.address_of(service) for node in nodes]}}

    def storefront(self, name: str, *nodes: Node, **more: Any) -> Path:
        """A mesh.yaml of node A whose `orders` is at these nodes."""
        orders = {**self.addresses(*(nodes or (self.b,))), "deadline": "10s", **more}
        return self.a.config(name, orders=orders, stock=self.addresses(self.b, service="stock"))

    def once(self, config: Path, kind: str = "async", *, service: str = "storefront", call: str = "GET /items") -> str:
        """What one call is told."""
        user = self.a.user(USERS[service])
        with user.running("-m", "tests.chaos.node_caller", config, service, kind, "once", call) as running:
            return running.wait_for("told", 30).removeprefix("told ").strip()

    @contextlib.contextmanager
    def load(
        self, config: Path, *kinds: str, rate: float = 80.0, call: str = "GET /items", other: Path | str = ""
    ) -> Iterator[list[Calls]]:
        """A process of `storefront` for each kind; with what it has seen at the end of the block, where the load ends."""
        with contextlib.ExitStack() as stack:
            words = ("-m", "tests.chaos.node_caller", config, "storefront")
            user = self.a.user(USERS["storefront"])
            found = [Calls(kind, stack.enter_context(user.running(*words, kind, rate, call, other))) for kind in kinds]
            for each in found:
                each.ready()
            yield found
            for each in found:
                each.stop()
            for each in found:
                each.read()


@contextlib.contextmanager
def two_nodes(hosts: tuple[Host, Host], folder: Path, ttl: str = "1h", port: int = 8444) -> Iterator[Pair]:
    """Both, with everything that runs on them. `ttl`: the life of certificates; `port`: the first that they use."""
    first, second = (Host(host.name, host.address, folder / letter) for host, letter in zip(hosts, "ab", strict=True))
    enrol = f"https://{first.address}:{port}"
    a = Node(first, "a", port, enrol, ("orders", "storefront", "stranger"), ("orders",))
    b = Node(second, "b", port, enrol, ("orders", "stock"), ("orders", "stock"))
    for host in (first, second):
        host.folder.mkdir(mode=0o755)
    authority = CertificateAuthority.create(folder / "ca", DOMAIN)
    with contextlib.ExitStack() as stack:
        ca = stack.enter_context(
            first.running("-c", CLI, "ca", "serve", folder / "ca", "--listen", f"{first.address}:{port}", "--ttl", ttl)
        )
        for node in (a, b):
            stack.enter_context(node.stack)
            for service in node.services:
                files.write(
                    files.make_private(node.folder / "tokens"), [(service, Tokens(authority).make(service).text.encode(), 0o600)]
                )
            node.config("mesh")
        ca.wait_for("serves on")
        for node in (a, b):
            node.start()
        for node in (a, b):
            node.ready()
        for node in (a, b):
            for service in node.served:
                node.serve(service)
        for node in (a, b):
            for service in node.served:
                _until_it_listens(node.socket_of(service))
        yield Pair(a, b)


def _until_it_listens(path: Path, seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    with socket.socket(socket.AF_UNIX) as plug:
        while plug.connect_ex(str(path)):
            assert time.monotonic() < end, f"nothing listens at {path}"
            time.sleep(0.05)
