"""Which processes is the shop made of, and how is it made sure that none outlives the demo?

Each process is a session of its own (gunicorn has children, and Ctrl-C in the terminal must reach the demo only), is
ended as a whole group by its number, and is killed by the kernel if the demo itself is killed. Ports are free ones
from below the range that the kernel hands out to outgoing connections: a process that is killed and started again
finds its port still free. Everything is written to one temporary folder, which goes with the demo.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import random
import signal
import socket
import string
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
LIBC = ctypes.CDLL(None)
PR_SET_PDEATHSIG = 1
START_SECONDS = 30.0


class Process:
    """One process of the shop, which may be killed and started again on the same port."""

    def __init__(self, name: str, command: list[str], environment: Mapping[str, str], folder: Path, address: str = "") -> None:
        self.name, self.command, self.address = name, command, address
        self.environment = {**os.environ, **environment}
        self.log = folder / f"{name}.log"
        self.child: subprocess.Popen[bytes] | None = None
        self.starts = 0

    def start(self, stdout: int | IO[bytes] | None = None) -> None:
        self.starts += 1
        with self.log.open("ab") as log:
            self.child = subprocess.Popen(
                self.command,
                cwd=ROOT,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log if stdout is None else stdout,
                stderr=log,
                start_new_session=True,
                preexec_fn=die_with_parent,  # safe here: the demo has no other thread
            )

    async def lines(self) -> AsyncIterator[bytes]:
        """Start it and give what it prints, line by line; raise if it ends badly."""
        self.start(subprocess.PIPE)
        assert self.child is not None
        reader = asyncio.StreamReader(limit=2**22)
        loop = asyncio.get_running_loop()
        await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), self.child.stdout)
        async for line in reader:
            yield line
        while self.is_running:
            await asyncio.sleep(0.02)
        if self.child.returncode != 0:
            raise RuntimeError(f"{self.name} failed; its last words:\n{self.last_words()}")

    def signal(self, number: int) -> None:
        if self.child is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.child.pid, number)

    def kill(self) -> None:
        """As a crash, or the kernel short of memory, would do it: no goodbye, connections break where they are."""
        self.signal(signal.SIGKILL)
        if self.child is not None:
            self.child.wait()

    @property
    def is_running(self) -> bool:
        return self.child is not None and self.child.poll() is None

    async def ready(self) -> None:
        """Wait until the port answers; raise with the end of its log if the process has ended."""
        give_up = time.monotonic() + START_SECONDS
        while True:
            if not self.is_running or time.monotonic() > give_up:
                raise RuntimeError(f"{self.name} did not start; its last words:\n{self.last_words()}")
            with contextlib.suppress(OSError), connected(self.address):
                return
            await asyncio.sleep(0.05)

    def last_words(self) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-15:]) if self.log.exists() else ""


class Fleet:
    """All processes; a context that leaves none behind."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.processes: dict[str, Process] = {}

    def add(self, name: str, command: list[str], environment: Mapping[str, str], address: str = "") -> Process:
        common = {"MESHLIB_CONFIG": str(self.folder / "mesh.yaml"), "PYTHONUNBUFFERED": "1"}
        process = Process(name, command, {**common, **environment}, self.folder, address)
        self.processes[name] = process
        return process

    def __enter__(self) -> Fleet:
        return self

    def __exit__(self, *error: object) -> None:
        for process in self.processes.values():
            process.signal(signal.SIGTERM)
        patience = time.monotonic() + 2.0
        while time.monotonic() < patience and any(process.is_running for process in self.processes.values()):
            time.sleep(0.02)
        for process in self.processes.values():
            process.kill()


def connected(address: str) -> socket.socket:
    """A connection to host:port, or to the path of a UNIX socket. Raises OSError."""
    if not address.startswith("/"):
        host, _, port = address.rpartition(":")
        return socket.create_connection((host, int(port)), timeout=0.2)
    plug = socket.socket(socket.AF_UNIX)
    try:
        plug.settimeout(0.2)
        plug.connect(address)
    except OSError:
        plug.close()
        raise
    return plug


def free_addresses() -> Iterator[str]:
    """Loopback addresses that nobody listens on, each named once."""
    for port in random.sample(range(20_000, 32_000), 12_000):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        yield f"127.0.0.1:{port}"


def write_mesh_yaml(folder: Path, addresses: Mapping[str, str], retry: int, *, services_of_agent: Sequence[str] = ()) -> Path:
    """The shop's mesh.yaml. With `services_of_agent` they get their identities from a node agent, which makes their calls."""
    path = folder / "mesh.yaml"
    template = string.Template((HERE / "mesh.yaml.in").read_text())
    agent = (HERE / "agent.yaml.in").read_text() if services_of_agent else ""
    entries = "\n".join(f"    - {{service: {service}, uid: {os.geteuid()}}}" for service in services_of_agent)
    values = {
        "identity": "{agent: true}" if services_of_agent else "{folder: ./identities}",
        "agent": string.Template(agent).substitute(folder=folder, entries=entries).rstrip(),
    }
    path.write_text(template.substitute(addresses, retry=retry, **values))
    return path


def die_with_parent() -> None:
    if sys.platform == "linux":
        LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def python(*arguments: str) -> list[str]:
    return [sys.executable, *arguments]
