"""How does a chaos test start `meshlib serve`, and see what its processes hold?

In a process of its own, as a user starts it, with certificates and a mesh.yaml in a folder; what it says goes to a file, since a
pipe that nobody reads would stop a server that logs its refusals. `Served` looks at the processes from outside: memory, descriptors.
"""

from __future__ import annotations

import contextlib
import os
import signal
import ssl
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.conformance.server.wire import Answer, connection, context
from tests.support import PYTHON, ROOT, free_port, identities, wait_until_listening, write_config

CLI = "import sys; from meshlib.cli import main; sys.exit(main())"

# What `meshlib serve` is told for each kind of server.
KINDS: dict[str, tuple[str, ...]] = {
    "uvicorn": ("tests.chaos.inbound_app:asgi",),
    "uvicorn x4": ("tests.chaos.inbound_app:asgi", "--workers", "4"),
    "gthread": ("tests.chaos.inbound_app:wsgi", "--threads", "8"),
    "sync": ("tests.chaos.inbound_app:wsgi", "--threads", "1"),
}

# Who may call: the storefront everything, and others what is public.
RULES: dict[str, Any] = {
    "allow": [{"name": "everything", "from": ["*"]}],
    "deny": [{"name": "no-admin", "from": ["*"], "paths": ["/admin"]}],
}
ROUTES = [
    {"name": "stop", "match": {"path": {"prefix": "/stop"}}, "on_disconnect": "handler"},
    {"name": "keep", "match": {"path": {"prefix": "/keep"}}, "on_disconnect": "nothing"},
    {"name": "rest"},
]


class World:
    """A folder with a CA, SVIDs and a mesh.yaml for the service `orders`."""

    def __init__(self, folder: Path, *callers: str) -> None:
        self.folder = folder
        folder.mkdir(exist_ok=True)
        identities(folder, "orders", "storefront", *callers)

    def write(self, mode: str, inbound: dict[str, Any] | None = None, services: dict[str, Any] | None = None, **top: Any) -> Path:
        """mesh.yaml. A service `orders` among `services` is put on top of the one that all tests have."""
        more = dict(services or {})
        orders = {"secure": RULES, "route": ROUTES, "inbound": inbound or {}, **more.pop("orders", {})}
        callers = {folder.name: {} for folder in (self.folder / "identities").iterdir() if folder.name != "orders"}
        return write_config(self.folder, {"orders": orders, **callers, **more}, mode=mode, **top)

    def tls(self, service: str = "storefront") -> ssl.SSLContext:
        return context(self.folder / "identities" / service)


class Served:
    """A running server."""

    def __init__(self, child: subprocess.Popen[bytes], port: int, world: World, log: Path) -> None:
        self.child = child
        self.port = port
        self.world = world
        self.log = log

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def pids(self) -> list[int]:
        """The processes that serve: the children of the one that watches, or the one that there is."""
        return children(self.child.pid) or [self.child.pid]

    def ask(self, target: str, tls: ssl.SSLContext | None = None) -> Answer:
        """A GET on a connection of its own."""
        with connection(self.port, tls) as wire:
            return wire.ask("GET", target, is_last=True)

    def numbers(self, tls: ssl.SSLContext | None = None) -> Any:
        return self.ask("/numbers", tls).json

    def complaints(self) -> list[str]:
        """What it has logged that nobody should have to read: failures of its own."""
        said = self.log.read_text(errors="replace").splitlines()
        return [
            line for line in said if " ERROR " in line or "[ERROR]" in line or line.startswith(("Traceback", "Exception ignored"))
        ]

    def said(self) -> str:
        return self.log.read_text(errors="replace")[-6000:]


@contextlib.contextmanager
def started(
    world: World, command: list[str], port: int, name: str = "server", env: dict[str, str] | None = None
) -> Iterator[Served]:
    """A server in a session of its own, ended with everything that it started."""
    log = world.folder / f"{name}-{port}.log"
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    with log.open("wb") as out:
        child = subprocess.Popen(
            command, env={**os.environ, "PYTHONPATH": path, **(env or {})}, cwd=ROOT, start_new_session=True,
            stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT,
        )  # fmt: skip
    served = Served(child, port, world, log)
    try:
        try:
            wait_until_listening(port, child)  # type: ignore[arg-type]
        except AssertionError:
            raise AssertionError(f"the server ended or never listened: {served.said()}") from None
        yield served
    finally:
        end(child)


def end(child: subprocess.Popen[bytes]) -> None:
    if child.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()


@contextlib.contextmanager
def serving(world: World, kind: str, config: Path, *more: str, service: str = "orders", port: int = 0) -> Iterator[Served]:
    """`meshlib serve` of a kind. `more` are further options; the last word counts."""
    port = port or free_port()
    app, *options = KINDS[kind]
    words = ["serve", app, "--config", str(config), "--service", service, "--listen", f"127.0.0.1:{port}", *options, *more]
    with started(world, [PYTHON, "-c", CLI, *words], port, kind.replace(" ", "-")) as served:
        yield served


def children(pid: int) -> list[int]:
    with contextlib.suppress(OSError):
        return [int(each) for each in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


def descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def sockets_of(pid: int) -> int:
    count = 0
    for name in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(OSError):
            count += os.readlink(f"/proc/{pid}/fd/{name}").startswith("socket:")
    return count


def begin_peak(pid: int) -> None:
    """From now on `peak` counts."""
    Path(f"/proc/{pid}/clear_refs").write_text("5")


def memory(pid: int, key: str = "VmRSS") -> float:
    """MiB."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) / 1024
    raise AssertionError(key)


def peak(pid: int) -> float:
    """The most MiB since `begin_peak`."""
    return memory(pid, "VmHWM")


def until(judge: Any, seconds: float = 10.0, every: float = 0.02) -> Any:
    """The first true answer, or the last one."""
    end = time.monotonic() + seconds
    while not (found := judge()) and time.monotonic() < end:
        time.sleep(every)
    return found
