"""What do tests of the daemon need? A mesh.yaml, a process that runs the agent, and questions to its sockets."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import grpc

from meshlib.agent import messages
from meshlib.config import Config
from meshlib.errors import MeshError

ROOT = Path(__file__).resolve().parents[2]
DOMAIN = "shop.internal"
ORDERS = f"spiffe://{DOMAIN}/ns/default/sa/orders"
STOCK = f"spiffe://{DOMAIN}/ns/default/sa/stock"
NOBODY = 65534

# As `meshlib agent run` does, with a life of certificates and a grace that a test can wait for.
RUNNER = """
import logging, os, sys
from meshlib.agent.run import serve
logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
serve(sys.argv[1], say=lambda line: print(line, flush=True), life=float(sys.argv[2]), grace=float(sys.argv[3]))
os._exit(0)
"""


class Paper:
    """A data path that writes down what it is told, and carries nothing."""

    def __init__(self, workers: int = 1) -> None:
        self.workers = workers
        self.told: list[tuple[Any, ...]] = []
        self.secrets: dict[str, str] = {}
        self.refuses = ""

    def identify(self, spiffe_id: str, chain: bytes, key: bytes, bundles: Any, crls: Any, secret: str) -> None:
        if self.refuses:
            raise MeshError(self.refuses)
        assert b"PRIVATE KEY" in key
        self.secrets[spiffe_id] = secret
        self.told.append(("identify", spiffe_id))

    def forget(self, spiffe_id: str) -> None:
        self.told.append(("forget", spiffe_id))

    def readmit(self, spiffe_id: str) -> None:
        self.told.append(("readmit", spiffe_id))

    def adopt(self, fd: int, *spiffe_ids: str) -> None:
        os.close(fd)
        self.told.append(("adopt", *spiffe_ids))

    def listen(self, name: str, fd: int, spiffe_id: str, to: str, mode: str, owners: Sequence[int]) -> None:
        assert os.fstat(fd)
        self.told.append(("listen", name, spiffe_id, to, mode))

    def unlisten(self, name: str) -> None:
        self.told.append(("unlisten", name))

    def stats(self) -> dict[str, Any]:
        return {"outbound": {"requests": 3, "failed": {"tls": 1}}, "inbound": {}, "upstream": {}, "identities": {}}

    def connections(self) -> list[dict[str, Any]]:
        return []

    def drain(self) -> None:
        self.told.append(("drain",))

    def stop(self, seconds: float) -> bool:
        self.told.append(("stop", seconds))
        return True


def mesh_file(
    folder: Path,
    agent: str = "ca: ca",
    entries: str | None = None,
    *,
    more: str = "",
    orders: str = "",
    uid: int | None = None,
) -> Path:
    """A mesh.yaml with an agent whose sockets lie beside it, and an entry for ourselves."""
    file = folder / "mesh.yaml"
    sockets = "".join(f"{name}: {folder}/{name}.sock, " for name in ("socket", "data", "admin"))
    own = os.geteuid() if uid is None else uid
    entries = entries or f"[{{service: orders, uid: {own}}}]"
    text = (
        f"mesh: shop\nsecure: {{mode: enforce, identity: {{agent: true}}{more}}}\n"
        f"agent: {{{sockets}state: state, {agent}, entries: {entries}}}\n"
        f"services:\n  orders: {{secure: {{allow: [{{from: [stock]}}]}}{orders}}}\n"
        "  stock: {secure: {allow: [{from: [orders]}]}}\n"
    )
    fresh = file.with_suffix(".new")
    fresh.write_text(text)
    fresh.rename(file)
    return file


def config_of(folder: Path, *details: Any, **more: Any) -> Config:
    from meshlib.agent.run import configured

    return configured(mesh_file(folder, *details, **more))


@contextlib.contextmanager
def place(uid: int = 0) -> Iterator[Path]:
    """A folder that a user without rights can reach, unlike those of pytest; short, for sockets."""
    where = Path(tempfile.mkdtemp(prefix="mesh-", dir="/tmp"))
    where.chmod(0o755)
    if uid:
        os.chown(where, uid, uid)
    try:
        yield where
    finally:
        shutil.rmtree(where, ignore_errors=True)


class Daemon:
    """An agent in a process of its own. What it says is in `lines`."""

    def __init__(self, process: subprocess.Popen[str], folder: Path) -> None:
        self.process = process
        self.folder = folder
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line.rstrip("\n"))

    @property
    def text(self) -> str:
        return "\n".join(self.lines)

    @property
    def workload(self) -> str:
        return f"unix://{self.folder}/socket.sock"

    def ready(self, seconds: float = 20.0) -> Daemon:
        until(lambda: "agent status" in self.text or self.process.poll() is not None, seconds, lambda: self.text)
        assert self.process.poll() is None, self.text
        return self

    def end(self, seconds: float = 10.0) -> int:
        self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(seconds)
        self._reader.join(5)
        return code

    def close(self) -> None:
        self._reader.join(5)
        assert self.process.stdout is not None
        self.process.stdout.close()

    def ask(self, path: str, method: str = "GET", body: str = "") -> tuple[int, Any]:
        return ask(self.folder / "admin.sock", path, method, body)


@contextlib.contextmanager
def running(folder: Path, life: float = 3600.0, grace: float = 5.0, *, wait: bool = True, **more: Any) -> Iterator[Daemon]:
    """The agent of folder/mesh.yaml, until the block ends."""
    words = [sys.executable, "-c", RUNNER, str(folder / "mesh.yaml"), str(life), str(grace)]
    environment = {name: text for name, text in os.environ.items() if not name.startswith(("MESHLIB_", "NOTIFY_", "LISTEN_"))}
    environment |= {"PYTHONPATH": f"{ROOT}", **more.pop("env", {})}
    process = subprocess.Popen(
        more.pop("before", []) + words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, cwd=ROOT, **more
    )  # fmt: skip
    daemon = Daemon(process, folder)
    try:
        yield daemon.ready() if wait else daemon
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(10)
        daemon.close()


def until(is_so: Callable[[], bool], seconds: float = 10.0, why: Callable[[], str] = str) -> None:
    end = time.monotonic() + seconds
    while not is_so():
        if time.monotonic() > end:
            raise AssertionError(f"it did not come to that within {seconds:g} s: {why()}")
        time.sleep(0.05)


def ask(path: Path, what: str, method: str = "GET", body: str = "") -> tuple[int, Any]:
    """Status and content of one question to an admin socket."""
    head = f"{method} {what} HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(body)}\r\n\r\n"
    answer = raw(path, (head + body).encode())
    front, _, content = answer.partition(b"\r\n\r\n")
    is_json = b"application/json" in front
    return int(front.split(b" ")[1]), json.loads(content) if is_json else content.decode()


def raw(path: Path, data: bytes) -> bytes:
    with socket.socket(socket.AF_UNIX) as plug:
        plug.settimeout(10)
        plug.connect(str(path))
        with contextlib.suppress(BrokenPipeError):
            plug.sendall(data)
        got = b""
        with contextlib.suppress(ConnectionResetError):
            while piece := plug.recv(65536):
                got += piece
        return got


def as_user(uid: int) -> list[str]:
    """Words before a command that make it another user's. It may read every file, since our interpreter may lie in a private folder."""
    return [
        "setpriv",
        "--reuid",
        str(uid),
        "--regid",
        str(uid),
        "--clear-groups",
        "--inh-caps",
        "+dac_read_search",
        "--ambient-caps",
        "+dac_read_search",
    ]


HEADER = (("workload.spiffe.io", "true"),)


def x509_svids(channel: grpc.Channel, timeout: float = 10.0) -> Any:
    """The stream of FetchX509SVID, by grpcio."""
    call = channel.unary_stream(
        "/SpiffeWorkloadAPI/FetchX509SVID",
        request_serializer=lambda message: message.SerializeToString(),
        response_deserializer=messages.X509SVIDResponse.FromString,
    )
    return call(messages.X509SVIDRequest(), metadata=HEADER, timeout=timeout)
