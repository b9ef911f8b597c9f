"""Is nobody served any more whose proof has ended, and can nobody hold up the others by being slow? Real processes, real sockets."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from meshlib.secure.ca import CertificateAuthority
from tests.support import PYTHON, TRUST_DOMAIN, free_port, identities, process, wait_until_listening, write_config

KINDS = ["asgi", "wsgi"]
APPS = """
import asyncio, time, meshlib

async def asgi(scope, receive, send):
    if scope["type"] == "lifespan":
        while True:
            message = await receive()
            await send({"type": message["type"] + ".complete"})
            if message["type"].endswith("shutdown"):
                return
    if scope["type"] == "websocket":
        await receive()
        await send({"type": "websocket.accept"})
        while (await receive())["type"] != "websocket.disconnect":
            await send({"type": "websocket.send", "text": "echo"})
        return
    _, _, seconds = scope["path"].partition("/slow/")
    await asyncio.sleep(float(seconds or 0))
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})

def wsgi(environ, start_response):
    time.sleep(float(environ["PATH_INFO"].partition("/slow/")[2] or 0))
    start_response("200 OK", [("content-length", "2")])
    return [b"ok"]
"""


class Caller:
    """Another service's connection, byte by byte."""

    def __init__(self, port: int, folder: Path, who: str = "me") -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        context.load_cert_chain(folder / who / "svid.pem", folder / who / "key.pem")
        self.sock = context.wrap_socket(socket.create_connection(("127.0.0.1", port), timeout=20))

    def send(self, *targets: str) -> None:
        self.sock.sendall(b"".join(f"GET {target} HTTP/1.1\r\nhost: orders\r\n\r\n".encode() for target in targets))

    def answer(self) -> bytes:
        """One answer, or all that came before the end."""
        heard = b""
        with contextlib.suppress(ConnectionError, ssl.SSLError):
            while not heard.endswith((b"ok", b"}")) and (data := self.sock.recv(65536)):
                heard += data
        return heard

    def ask(self, target: str) -> bytes:
        with contextlib.suppress(ConnectionError, ssl.SSLError):
            self.send(target)
        return self.answer()

    def rest(self) -> bytes:
        """Until the other side ends."""
        heard = b""
        with contextlib.suppress(ConnectionError, ssl.SSLError):
            while data := self.sock.recv(65536):
                heard += data
        return heard


@pytest.fixture
def served(tmp_path: Path) -> Callable[..., Any]:
    @contextlib.contextmanager
    def serving(kind: str, ttl: float | None = None) -> Iterator[int]:
        authority = identities(tmp_path, "orders")
        authority.write("me", tmp_path / "identities", *([ttl] if ttl else []))
        (tmp_path / "connected.py").write_text(APPS)
        port = free_port()
        allow = [{"name": "me", "from": ["me"]}]
        services: dict[str, Any] = {"orders": {"listen": f"127.0.0.1:{port}", "secure": {"allow": allow}}, "me": {}}
        file = write_config(tmp_path, services, mode="enforce")
        meshlib = str(Path(PYTHON).parent / "meshlib")
        command = (meshlib, "serve", f"connected:{kind}", "--config", str(file), "--service", "orders")
        with process(*command, env={"PYTHONPATH": str(tmp_path)}, cwd=tmp_path) as child:
            wait_until_listening(port, child)
            yield port

    return serving


def withdraw(home: Path) -> None:
    """Another root for the service, and with it nobody of before is known any more."""
    CertificateAuthority.create(home / "other", TRUST_DOMAIN).write("orders", home / "identities")


def wait_until_refused(port: int, folder: Path, seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while Caller(port, folder).ask("/a").startswith(b"HTTP/1.1 200"):
        assert time.monotonic() < end, "the withdrawn root is still trusted"
        time.sleep(0.05)


@pytest.mark.parametrize("kind", KINDS)
def test_a_withdrawn_root_ends_the_connections_that_it_vouched_for(served: Any, tmp_path: Path, kind: str) -> None:
    """Idle ones, and one that was never asked for anything; nobody has to ask for it."""
    folder = tmp_path / "identities"
    with served(kind) as port:
        idle, never = Caller(port, folder), Caller(port, folder)
        assert idle.ask("/a").startswith(b"HTTP/1.1 200")
        withdraw(tmp_path)
        begun = time.monotonic()
        assert (idle.rest(), never.rest()) == (b"", b"")
        assert time.monotonic() - begun < 8


@pytest.mark.parametrize("kind", KINDS)
def test_requests_after_the_withdrawal_are_not_answered(served: Any, tmp_path: Path, kind: str) -> None:
    """Pipelined behind one that is under way: nothing of them is run."""
    folder = tmp_path / "identities"
    with served(kind) as port:
        caller = Caller(port, folder)
        caller.send("/slow/4", "/b", "/c")
        withdraw(tmp_path)
        wait_until_refused(port, folder)
        assert caller.rest().count(b"HTTP/1.1 200") <= 1


@pytest.mark.parametrize("kind", KINDS)
def test_who_has_expired_is_told_so_once(served: Any, tmp_path: Path, kind: str) -> None:
    """What was asked before is answered; the next gets 401, a problem in words, and the end of the connection."""
    with served(kind, ttl=4.0) as port:
        caller = Caller(port, tmp_path / "identities")
        caller.send("/slow/6", "/b", "/c")
        heard = caller.rest()
    assert (heard.count(b"HTTP/1.1 200"), heard.count(b"HTTP/1.1 401"), heard.count(b"HTTP/1.1 ")) == (1, 1, 2)
    assert b"connection: close" in heard.lower()
    assert b"secure.proof_ended" in heard


def test_a_websocket_ends_with_the_trust_in_its_peer(served: Any, tmp_path: Path) -> None:
    """No request of it is judged again, so the connection is."""
    folder = tmp_path / "identities"
    with served("asgi") as port:
        caller = Caller(port, folder)
        key = "sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\nsec-websocket-version: 13\r\n"
        upgrade = f"GET /ws HTTP/1.1\r\nhost: orders\r\nconnection: Upgrade\r\nupgrade: websocket\r\n{key}\r\n"
        caller.sock.sendall(upgrade.encode())
        assert caller.sock.recv(65536).startswith(b"HTTP/1.1 101")
        withdraw(tmp_path)
        assert caller.rest() == b""


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_certificate_of_ours_costs_nobody_an_answer(served: Any, tmp_path: Path, kind: str) -> None:
    """The caller would be let in again: the answer comes, says that it is the last, and the next connection has the new one."""
    folder = tmp_path / "identities"
    with served(kind) as port:
        caller = Caller(port, folder)
        assert b"close" not in caller.ask("/a").lower()
        before = (folder / "orders" / "svid.pem").read_bytes()
        CertificateAuthority.open(tmp_path / "ca").write("orders", folder)
        assert (folder / "orders" / "svid.pem").read_bytes() != before
        end = time.monotonic() + 10
        while b"connection: close" not in (heard := caller.ask("/a")).lower():
            assert heard.startswith(b"HTTP/1.1 200")
            assert time.monotonic() < end
            time.sleep(0.05)
        assert heard.startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("slow", ["handshake", "head", "silence"])
def test_slow_callers_hold_up_nobody(served: Any, tmp_path: Path, kind: str, slow: str) -> None:
    """More of them than a worker has threads: the next request is answered at once."""
    folder = tmp_path / "identities"
    with served(kind) as port:
        held: list[Any] = []
        for _ in range(12):
            if slow == "head":
                caller = Caller(port, folder)
                caller.sock.sendall(b"GET / HTTP/1.1\r\nhost: orders\r\nx: ")
                held.append(caller)
            else:
                held.append(socket.create_connection(("127.0.0.1", port)))
                held[-1].sendall(b"\x16" if slow == "handshake" else b"")
        begun = time.monotonic()
        assert Caller(port, folder).ask("/a").startswith(b"HTTP/1.1 200")
        assert time.monotonic() - begun < 4


@pytest.mark.parametrize("kind", KINDS)
def test_a_head_that_does_not_end_is_cut_off(served: Any, tmp_path: Path, kind: str) -> None:
    """After 10 seconds, however often a byte comes; and by its size at once. One in a thousand pieces that ends is answered."""
    folder = tmp_path / "identities"
    with served(kind) as port:
        dripping, talking, small = (Caller(port, folder) for _ in range(3))
        for byte in b"GET /a HTTP/1.1\r\nhost: orders\r\n\r\n":
            small.sock.sendall(bytes([byte]))
        assert small.answer().startswith(b"HTTP/1.1 200")
        dripping.sock.sendall(b"GET /a HTTP/1.1\r\nhost: orders\r\n")
        with pytest.raises(OSError):
            talking.sock.sendall(b"GET /a HTTP/1.1\r\nhost: orders\r\nx: ")
            begun = time.monotonic()
            while time.monotonic() - begun < 20:  # the kernel has room for some megabytes
                talking.sock.sendall(b"x" * 4096)
        begun = time.monotonic()
        with pytest.raises(OSError):
            while time.monotonic() - begun < 20:
                dripping.sock.sendall(b"x: 1\r\n" if time.monotonic() - begun < 5 else b"x")
                time.sleep(0.25)
        assert 5 < time.monotonic() - begun < 14


@pytest.mark.parametrize(
    "http", ["uvicorn.protocols.http.httptools_impl:HttpToolsProtocol", "uvicorn.protocols.http.h11_impl:H11Protocol"]
)
def test_the_target_is_judged_as_it_came(http: str) -> None:
    """An absolute target keeps its authority, and an origin one whatever stands in it."""
    from uvicorn.config import Config
    from uvicorn.server import ServerState

    from meshlib._native import core
    from meshlib.server.head import bounded

    module, _, name = http.partition(":")
    seen: list[tuple[bytes, bytes]] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        path, _, query = (
            scope[core.TARGET].partition(b"?") if core.TARGET in scope else (scope["raw_path"], b"", scope["query_string"])
        )
        seen.append((path, query))
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    async def run() -> None:
        config = Config(app, log_config=None)
        config.load()
        protocol = bounded(getattr(importlib.import_module(module), name))(
            config=config, server_state=ServerState(), app_state={}
        )
        ours, theirs = socket.socketpair()
        with ours, theirs:
            ours.setblocking(False)
            await asyncio.get_running_loop().connect_accepted_socket(lambda: protocol, ours)
            for number, target in enumerate([b"/a%2Fb?c=d", b"http://elsewhere:1/a?c"]):
                theirs.sendall(b"GET %s HTTP/1.1\r\nhost: orders\r\n\r\n" % target)
                for _ in range(1000):
                    if len(seen) > number:
                        break
                    await asyncio.sleep(0.005)
            protocol.transport.close()

    asyncio.run(run())
    assert seen == [(b"/a%2Fb", b"c=d"), (b"http://elsewhere:1/a", b"c")]
