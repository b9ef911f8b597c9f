"""What do many tests need? A mesh of one process from a few lines, real certificates, and small real servers on loopback."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import meshlib

ROOT = Path(__file__).resolve().parent.parent
TRUST_DOMAIN = "shop.internal"


def free_port() -> int:
    with socket.socket() as plug:
        plug.bind(("127.0.0.1", 0))
        return int(plug.getsockname()[1])


class _Leap(selectors.DefaultSelector):
    """Whoever waits has waited already."""

    now = 0.0

    def select(self, timeout: float | None = None) -> Any:
        assert timeout is not None, "all wait for something that doesn't come"
        self.now += timeout
        return super().select(0)


def run_virtually(main: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
    """As `asyncio.run`, on a loop where an hour takes no time. Its clock is the loop's, and begins at 0. For what opens no sockets."""
    leap = _Leap()
    loop = asyncio.SelectorEventLoop(leap)
    loop.time = lambda: leap.now  # type: ignore[method-assign]
    with asyncio.Runner(loop_factory=lambda: loop) as runner:
        return runner.run(main())


def write_config(folder: Path, services: dict[str, Any], *, mode: str = "observe", **top: Any) -> Path:
    """A mesh.yaml; JSON is YAML."""
    secure: dict[str, Any] = {"mode": mode, "trust_domain": TRUST_DOMAIN}
    if mode != "observe" or (folder / "identities").exists():
        secure["identity"] = {"folder": str(folder / "identities")}
    file = folder / "mesh.yaml"
    file.write_text(json.dumps({"mesh": "shop", "secure": secure, "services": services, **top}))
    return file


_CLAUSES = (
    *("from", "not_from", "namespaces", "not_namespaces", "request_principals", "not_request_principals"),
    *("ip_blocks", "not_ip_blocks", "remote_ip_blocks", "not_remote_ip_blocks", "methods", "not_methods"),
    *("paths", "not_paths", "hosts", "not_hosts", "ports", "not_ports", "when"),
)


def server_rule(name: str, action: str = "allow", **fields: Any) -> dict[str, Any]:
    """A rule of the inbound plan: what isn't given isn't asked. `from` is written `callers`."""
    if "callers" in fields:
        fields["from"] = fields.pop("callers")
    plain = {"name": name, "action": action, "dry_run": False, "authorizer": "", "is_case_insensitive": False}
    rule = {**plain, **{clause: [] for clause in _CLAUSES}}
    assert fields.keys() <= rule.keys(), fields.keys() - rule.keys()
    return {**rule, **fields}


def server_plan(*rules: dict[str, Any], in_flight: int = 1024, admission: dict[str, Any] | None = None, **fields: Any) -> bytes:
    """The inbound plan of a service, as the core reads it; `fields` go over what is usual. Nobody waits, unless `admission` says so."""
    plan: dict[str, Any] = {
        "service": "orders",
        "mode": "enforce",
        "identity": "spiffe://shop.internal/ns/default/sa/orders",
        "trust_domain": TRUST_DOMAIN,
        "paths": "canonical",
        "admission": {
            "in_flight": in_flight,
            "adaptive": None,
            "queue": 0.0,
            "target": 0.005,
            "interval": 0.1,
            "shares": [1.0, 1.0, 1.0, 1.0],
            "priorities": [],
            "probes": [],
            **(admission or {}),
        },
        "rules": list(rules),
        "public_rules": [],
        "routes": [],
        "proxies": {"identities": [], "cidrs": [], "hops": 0},
        "xfcc": "sanitize",
        "providers": [],
        "jwt_required": [],
        "rates": [],
        "record": False,
    }
    return json.dumps({**plan, **fields}).encode()


@contextlib.contextmanager
def mesh_of(
    folder: Path, services: dict[str, Any], *, service: str = "me", mode: str = "observe", **top: Any
) -> Iterator[meshlib.Mesh]:
    """A mesh for the service `me`, closed at the end. Round robin begins with the first endpoint."""
    with in_order():
        mesh = meshlib.Mesh.load(write_config(folder, {"me": {}, **services}, mode=mode, **top), service=service)
    # All other chance is what it is elsewhere.
    mesh.engine.reseed(secrets.randbits(64))
    try:
        yield mesh
    finally:
        mesh.close()


@contextlib.contextmanager
def in_order() -> Iterator[None]:
    """Turns of a mesh that is loaded here begin with the first of 2 to 8 endpoints; otherwise they begin anywhere."""
    # The first number that this seed gives is divisible by 840.
    with mock.patch("meshlib.mesh.secrets.randbits", return_value=2779):
        yield


def identities(folder: Path, *services: str) -> Any:
    """An embedded CA in `folder`/ca, and an SVID for each service in `folder`/identities. Returns the CA."""
    from meshlib.secure.ca import CertificateAuthority

    authority = CertificateAuthority.create(folder / "ca", TRUST_DOMAIN)
    for service in services:
        authority.write(service, folder / "identities")
    return authority


class Scripted:
    """An HTTP/1.1 server whose every answer is a function of the test, with what it saw."""

    def __init__(self, answer: Callable[[Scripted, Request], Awaitable[bytes | None]]) -> None:
        self.answer = answer
        self.requests: list[Request] = []
        self.connections = 0
        self.port = 0
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    async def start(self, port: int = 0, ssl: Any = None) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", port, ssl=ssl)
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        if self._server is not None:
            self._server.close()
            for writer in list(self._writers):
                writer.transport.abort()
            await self._server.wait_closed()
            self._server = None

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self._writers.add(writer)
        try:
            while True:
                request = await Request.read(reader)
                if request is None:
                    break
                self.requests.append(request)
                out = await self.answer(self, request)
                if out is None:
                    break
                writer.write(out)
                await writer.drain()
                if b"connection: close" in out.lower():
                    break
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            self._writers.discard(writer)
            writer.close()


class Request:
    def __init__(self, line: str, headers: dict[str, str], body: bytes) -> None:
        self.method, self.target, _ = line.split(" ")
        self.headers = headers
        self.body = body

    @classmethod
    async def read(cls, reader: asyncio.StreamReader) -> Request | None:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
        except asyncio.IncompleteReadError:
            return None
        line, *rest = head.decode("latin-1").split("\r\n")
        headers = {n.lower(): v.strip() for n, _, v in (field.partition(":") for field in rest if field)}
        body = b""
        if "content-length" in headers:
            body = await reader.readexactly(int(headers["content-length"]))
        elif headers.get("transfer-encoding") == "chunked":
            while size := int(await reader.readline(), 16):
                body += (await reader.readexactly(size + 2))[:-2]
            await reader.readline()
        return cls(line, headers, body)


def ok(body: bytes = b"ok", *headers: str) -> bytes:
    head = "".join(f"{h}\r\n" for h in (f"content-length: {len(body)}", *headers))
    return f"HTTP/1.1 200 OK\r\n{head}\r\n".encode() + body


@contextlib.asynccontextmanager
async def scripted(
    answer: Callable[[Scripted, Request], Awaitable[bytes | None]], *, ssl: Any = None, port: int = 0
) -> AsyncIterator[Scripted]:
    server = Scripted(answer)
    await server.start(port, ssl)
    try:
        yield server
    finally:
        await server.stop()


@contextlib.contextmanager
def process(*command: str, env: dict[str, str] | None = None, cwd: Path | None = None) -> Iterator[subprocess.Popen[str]]:
    """A child in a session of its own, ended with everything that it started."""
    child = subprocess.Popen(
        command, env={**os.environ, **(env or {})}, cwd=cwd or ROOT, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        yield child
    finally:
        if child.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGTERM)
            try:
                child.wait(10)
            except subprocess.TimeoutExpired:
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()
        if child.stdout is not None:
            child.stdout.close()


def wait_until_listening(port: int, child: subprocess.Popen[str] | None = None, seconds: float = 20.0) -> None:
    """Until something accepts on the port; a child that ended first is reported with its output."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if child is not None and child.poll() is not None:
            raise AssertionError(f"the server ended: {child.stdout.read() if child.stdout else ''}")
        with socket.socket() as plug:
            if plug.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.02)
    raise AssertionError(f"nothing listens on port {port}")


PYTHON = sys.executable
