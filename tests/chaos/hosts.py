"""How are two hosts made of one machine? Two network namespaces with a cable between them.

Each has its own loopback, addresses and ports: what runs in the one reaches the other only through the cable, which can be pulled.
Processes are the test's own children, and end with it; the namespaces go with the last of them.
"""

from __future__ import annotations

import contextlib
import os
import queue
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.support import PYTHON, process

CLI = "import sys; from meshlib.cli import main; sys.exit(main())"


def why_not() -> str:
    """What keeps this machine from being two; "" if nothing does."""
    if shutil.which("ip") is None:
        return "there is no `ip` (iproute2) to make network namespaces with"
    if os.geteuid() != 0:
        return "network namespaces are root's"
    name = f"meshlib-try-{os.getpid()}"
    tried = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    subprocess.run(["ip", "netns", "delete", name], capture_output=True)
    return f"no network namespaces here: {tried.stderr.strip()}" if tried.returncode else ""


@dataclass(frozen=True)
class Host:
    """One of the two."""

    name: str
    address: str
    folder: Path

    def command(self, *words: object) -> list[str]:
        return ["ip", "netns", "exec", self.name, PYTHON, *map(str, words)]

    def meshlib(self, *words: object, code: int = 0) -> str:
        """`meshlib …` on this host, in its folder; what it said."""
        done = subprocess.run(
            self.command("-c", CLI, *words), cwd=self.folder, capture_output=True, text=True, timeout=30, env=_environment()
        )
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr

    @contextlib.contextmanager
    def running(self, *words: object, **variables: str) -> Iterator[Running]:
        """A program of this host, until the block ends."""
        with process(*self.command(*words), cwd=self.folder, env={**_environment(), **variables}) as child:
            yield Running(child)

    def link(self, state: str) -> None:
        """Pull the cable (down), or put it back (up)."""
        _ip("-n", self.name, "link", "set", "cable", state)


class Running:
    """A program and what it says, line by line."""

    def __init__(self, child: subprocess.Popen[str]) -> None:
        self.child = child
        self.said: list[str] = []
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        threading.Thread(target=self._read, daemon=True).start()

    def wait_for(self, is_it: str | Callable[[str], bool], seconds: float = 20.0) -> str:
        """The next line with these words in it."""
        found = is_it if callable(is_it) else lambda line: is_it in line
        end = time.monotonic() + seconds
        while True:
            try:
                line = self._lines.get(timeout=max(0.0, end - time.monotonic()))
            except queue.Empty:
                raise AssertionError(f"it never said {is_it!r}:\n{''.join(self.said)}") from None
            if line is None:
                raise AssertionError(f"it ended without saying {is_it!r}:\n{''.join(self.said)}")
            self.said.append(line)
            if found(line):
                return line

    def _read(self) -> None:
        assert self.child.stdout is not None
        with contextlib.suppress(ValueError):  # it was closed meanwhile
            for line in self.child.stdout:
                self._lines.put(line)
        self._lines.put(None)


@contextlib.contextmanager
def two_hosts(folder: Path) -> Iterator[tuple[Host, Host]]:
    """Two hosts with a cable between them."""
    names = [f"meshlib-{letter}-{os.getpid()}" for letter in "ab"]
    hosts = [Host(name, f"10.213.7.{number}", folder / name) for number, name in enumerate(names, 1)]
    try:
        for host in hosts:
            host.folder.mkdir(mode=0o700)
            _ip("netns", "add", host.name)
            _ip("-n", host.name, "link", "set", "lo", "up")
        _ip("link", "add", "cable", "netns", names[0], "type", "veth", "peer", "name", "cable", "netns", names[1])
        for host in hosts:
            _ip("-n", host.name, "address", "add", f"{host.address}/24", "dev", "cable")
            host.link("up")
        yield hosts[0], hosts[1]
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


def _environment() -> dict[str, str]:
    """What children find meshlib with; nothing of a configuration."""
    return {"PYTHONUNBUFFERED": "1", "PYTHONPATH": os.pathsep.join([os.getcwd(), os.environ.get("PYTHONPATH", "")])}
