"""A real name server on loopback, whose records a test writes: dnsmasq."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterable
from pathlib import Path

import pytest

DNSMASQ = shutil.which("dnsmasq") or shutil.which("dnsmasq", path="/usr/sbin")
ZONE = "shop.test"


class Server:
    """Starts anew with each change, which takes some milliseconds: dnsmasq reads SRV records only then."""

    def __init__(self, folder: Path, *, ttl: int = 1) -> None:
        if DNSMASQ is None:
            pytest.skip("dnsmasq is not installed (Debian: apt-get install dnsmasq-base)")
        self.folder = folder
        self.ttl = ttl
        self.port = _free_port()
        self.log = folder / "queries"
        self._process: subprocess.Popen[bytes] | None = None
        self._lines: list[str] = []

    def serve(self, lines: Iterable[str]) -> None:
        self._lines = list(lines)
        self.stop()
        self.start()

    def start(self) -> None:
        file = self.folder / "dnsmasq.conf"
        head = [
            "no-daemon", "no-resolv", "no-hosts", "bind-interfaces", "listen-address=127.0.0.1", f"port={self.port}",
            f"local=/{ZONE}/", f"local-ttl={self.ttl}", "log-queries", f"log-facility={self.log}", "user=root", "pid-file=",
        ]  # fmt: skip
        file.write_text("\n".join([*head, *self._lines]) + "\n")
        self._process = subprocess.Popen(
            [str(DNSMASQ), f"--conf-file={file}"], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        end = time.monotonic() + 10.0
        while not _answers(self.port):
            assert self._process.poll() is None, (self._process.stderr.read() if self._process.stderr else b"").decode()
            assert time.monotonic() < end, "dnsmasq does not answer"
            time.sleep(0.01)

    def stop(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            if process.stderr is not None:
                process.stderr.close()

    def freeze(self) -> None:
        """It takes questions and answers none."""
        if self._process is not None:
            os.kill(self._process.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        if self._process is not None:
            os.kill(self._process.pid, signal.SIGCONT)

    def questions(self, kind: str) -> int:
        return sum(f"query[{kind}]" in line for line in self.log.read_text().splitlines())


def srv(target: str, port: int, priority: int = 0, weight: int = 0, name: str = f"_http._tcp.orders.{ZONE}") -> str:
    return f"srv-host={name},{target},{port},{priority},{weight}"


def host(name: str, *addresses: str) -> list[str]:
    return [f"host-record={name},{address}" for address in addresses]


def _free_port() -> int:
    """Below those that the system gives to whoever asks: the server comes back to it again and again."""
    while True:
        port = random.randrange(20_000, 32_000)
        with (
            contextlib.suppress(OSError),
            socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as datagrams,
            socket.socket(socket.AF_INET, socket.SOCK_STREAM) as stream,
        ):
            datagrams.bind(("127.0.0.1", port))
            stream.bind(("127.0.0.1", port))
            return port


def _answers(port: int) -> bool:
    """A question of no name, in its smallest form."""
    question = b"\x12\x34\x01\x00\x00\x01\x00\x00\x00\x00\x00\x00\x00\x00\x01\x00\x01"
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, contextlib.suppress(OSError):
        probe.settimeout(0.2)
        probe.connect(("127.0.0.1", port))
        probe.send(question)
        return probe.recv(512)[:2] == question[:2]
    return False
