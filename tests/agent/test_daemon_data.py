"""Do calls get through the daemon, under its identities, while these change and while the daemon does?"""

from __future__ import annotations

import hashlib
import hmac
import http.client
import http.server
import os
import socket
import socketserver
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from meshlib.secure import CertificateAuthority
from tests.agent.daemon_world import DOMAIN, ORDERS, STOCK, mesh_file, place, running, until
from tests.agent.test_daemon_run import ACTIVATOR


class Application(http.server.BaseHTTPRequestHandler):
    """What stands behind the agent: says who called, and may take its time."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        if self.path.startswith("/slow"):
            time.sleep(float(self.path.partition("=")[2] or 1.0))
        body = (self.headers.get("x-mesh-handed") or "").encode()
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def address_string(self) -> str:
        return "-"

    def log_message(self, format: str, *args: Any) -> None:
        pass


class Listening(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    daemon_threads = True
    request_queue_size = 128


@pytest.fixture
def folder() -> Iterator[Path]:
    with place() as where:
        CertificateAuthority.create(where / "ca", DOMAIN)
        yield where


@pytest.fixture
def application(folder: Path) -> Iterator[Path]:
    path = folder / "app.sock"
    server = Listening(str(path), Application)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    yield path
    server.shutdown()
    server.server_close()
    thread.join()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        return int(found.getsockname()[1])


def node(folder: Path, port: int) -> Path:
    """We are orders, and call stock, for which the agent ends TLS at a port."""
    us = os.geteuid()
    file = mesh_file(folder, entries=f"[{{service: orders, uid: {us}}}, {{service: stock, uid: {us}}}]")
    stock = f'stock: {{listen: "127.0.0.1:{port}", inbound: {{agent: {folder}/app.sock}}, '
    file.write_text(file.read_text().replace("stock: {", stock, 1))
    return file


class Caller:
    """A program without meshlib that calls by the data socket."""

    def __init__(self, folder: Path, port: int, expect: str = STOCK) -> None:
        self.path = str(folder / "data.sock")
        self.headers = {
            "host": "stock",
            "x-mesh-endpoint": f"127.0.0.1:{port}",
            "x-mesh-expect": expect,
            "x-mesh-protocol": "http1",
            "x-mesh-connect": "2000",
        }

    def plug(self) -> http.client.HTTPConnection:
        connection = http.client.HTTPConnection("localhost", timeout=15)
        connection.auto_open = 0
        connection.sock = socket.socket(socket.AF_UNIX)
        connection.sock.settimeout(15)
        connection.sock.connect(self.path)
        return connection

    def ask(self, path: str = "/", connection: http.client.HTTPConnection | None = None) -> tuple[int, str, str]:
        """Status, body, and why it failed."""
        own = connection or self.plug()
        try:
            own.request("GET", path, headers=self.headers)
            answer = own.getresponse()
            return answer.status, answer.read().decode(), answer.headers.get("x-mesh-failed") or ""
        finally:
            if connection is None:
                own.close()

    def reserved(self, path: str) -> tuple[int, str]:
        connection = self.plug()
        try:
            connection.request("GET", path)
            answer = connection.getresponse()
            return answer.status, answer.read().decode()
        finally:
            connection.close()


def secret_of(folder: Path, spiffe_id: str) -> str:
    key = bytes.fromhex((folder / "state" / "handover.key").read_text())
    return hmac.new(key, spiffe_id.encode(), hashlib.sha256).hexdigest()


def test_a_call_goes_from_one_service_of_the_node_to_another_over_mutual_tls(folder: Path, application: Path) -> None:
    """Called as orders, served as stock: the application hears who it was, with the secret that only it and the agent know."""
    port = free_port()
    node(folder, port)
    with running(folder) as daemon:
        status, handed, failed = Caller(folder, port).ask()
        assert (status, failed) == (200, "")
        told = dict(part.split("=", 1) for part in handed.split(";"))
        assert told["id"] == ORDERS
        assert told["tls"] == "TLSv1.3"
        assert told["secret"] == secret_of(folder, STOCK)
        carried = daemon.ask("/connections")[1]
        assert carried["listeners"] == [
            {"service": "stock", "address": f"127.0.0.1:{port}", "mode": "enforce", "is_open": True, "error": ""}
        ]
        assert {row["direction"] for row in carried["connections"]} >= {"upstream", "inbound"}
        metrics = daemon.ask("/metrics")[1]
        assert 'meshlib_agent_requests_total{door="data"} 1' in metrics
        assert 'meshlib_agent_requests_total{door="stock"} 1' in metrics
        assert secret_of(folder, STOCK) not in metrics + str(carried)


def test_a_caller_learns_the_secret_of_its_own_identity(folder: Path) -> None:
    """At the data socket, as whom the kernel says it is; and the agent answers a ping."""
    node(folder, free_port())
    with running(folder):
        caller = Caller(folder, 1)
        assert caller.reserved("/ping")[0] == 204
        assert caller.reserved("/handover") == (200, secret_of(folder, ORDERS))
        assert caller.reserved("/else")[0] == 400


def test_an_endpoint_that_proves_to_be_somebody_else_gets_nothing(folder: Path, application: Path) -> None:
    """The call fails before a byte of it is written, and says why."""
    port = free_port()
    node(folder, port)
    with running(folder):
        status, text, failed = Caller(folder, port, expect=ORDERS).ask()
        assert (status, failed) == (502, "identity; written=0")
        assert STOCK in text


def test_a_withdrawn_service_is_served_no_more(folder: Path, application: Path) -> None:
    """Within seconds its address is closed, and calls as it are not taken."""
    port = free_port()
    node(folder, port)
    with running(folder) as daemon:
        assert Caller(folder, port).ask()[0] == 200
        CertificateAuthority.open(folder / "ca").revoke("stock")
        until(lambda: daemon.ask("/connections")[1]["listeners"][0]["is_open"] is False)
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port), 2)
        assert Caller(folder, port).ask()[2].startswith("connect")


class Load:
    """Calls without a pause, until it is told to end; what went wrong is in `failures`."""

    def __init__(self, caller: Caller, path: str = "/", *, is_kept: bool, threads: int = 2) -> None:
        self.caller, self.path, self.is_kept = caller, path, is_kept
        self.failures: list[str] = []
        self.done = 0
        self.again = 0
        self._ended = threading.Event()
        self._threads = [threading.Thread(target=self._run) for _ in range(threads)]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *details: object) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join()

    def _run(self) -> None:
        connection: http.client.HTTPConnection | None = None
        while not self._ended.wait(0.01):
            for attempt in range(3):
                try:
                    if connection is None:
                        connection = self.caller.plug()
                    status, _, failed = self.caller.ask(self.path, connection)
                    if failed == "agent; written=0" and connection.sock is None and attempt < 2:
                        # This connection ends, and nothing was tried: as the library does, again on a new one.
                        connection = None
                        self.again += 1
                        continue
                    if status != 200:
                        self.failures.append(f"{status} {failed}")
                    self.done += 1
                    if connection.sock is None:  # the answer said that it is the last
                        connection = None
                    break
                except (http.client.RemoteDisconnected, BrokenPipeError, ConnectionResetError) as error:
                    # It was ended before it said anything: as the library does, again on a new one.
                    connection = None
                    self.again += 1
                    if attempt == 2:
                        self.failures.append(repr(error))
                except OSError as error:
                    connection = None
                    self.failures.append(repr(error))
                    break
            if not self.is_kept and connection is not None:
                connection.close()
                connection = None
        if connection is not None:
            connection.close()


@pytest.mark.slow
@pytest.mark.parametrize("is_kept", [True, False])
def test_rotation_every_two_seconds_fails_no_call(folder: Path, application: Path, is_kept: bool) -> None:
    """Connections of the data socket that are kept, and new ones; on both sides of the call, identities change meanwhile."""
    port = free_port()
    node(folder, port)
    with running(folder, life=4.0) as daemon:
        with Load(Caller(folder, port), is_kept=is_kept) as load:
            until(lambda: min(row["rotations"] for row in daemon.ask("/certificates")[1]) >= 4, 20.0)
        assert load.failures == []
        assert load.done > 50


def test_what_is_under_way_ends_before_the_daemon_does(folder: Path, application: Path) -> None:
    """SIGTERM while twenty calls of a second each are under way: all have their answers."""
    port = free_port()
    node(folder, port)
    answers: list[tuple[int, str, str]] = []
    with running(folder, grace=10.0) as daemon:
        caller = Caller(folder, port)
        threads = [threading.Thread(target=lambda: answers.append(caller.ask("/slow"))) for _ in range(20)]
        for thread in threads:
            thread.start()
        time.sleep(0.5)
        begun = time.monotonic()
        assert daemon.end(15.0) == 0
        assert time.monotonic() - begun < 5.0
        for thread in threads:
            thread.join()
    assert [status for status, _, _ in answers] == [200] * 20


def test_a_second_signal_ends_it_at_once(folder: Path, application: Path) -> None:
    """Whatever is under way: a person has seen enough."""
    port = free_port()
    node(folder, port)
    with running(folder, grace=20.0) as daemon:
        plug = Caller(folder, port).plug()
        plug.request("GET", "/slow?for=8", headers=Caller(folder, port).headers)
        time.sleep(0.3)
        daemon.process.terminate()
        until(lambda: "waiting for" in daemon.text, 6.0)
        assert daemon.ask("/health")[0] == 503
        begun = time.monotonic()
        assert daemon.end() == 0
        assert time.monotonic() - begun < 1.5
        plug.close()


@pytest.mark.slow
def test_an_upgrade_under_load_fails_no_call(folder: Path, application: Path) -> None:
    """The data socket is systemd's: two restarts while calls to a service of another node go on. None fails, none waits for long."""
    port = free_port()
    node(folder, port)
    # The service is on "another node": its agent isn't restarted.
    with place() as other:
        (other / "ca").symlink_to(folder / "ca")
        (other / "app.sock").symlink_to(application)
        far = other
        node(far, port)
        near = node(folder, free_port())
        near.write_text(near.read_text().replace(f"inbound: {{agent: {folder}/app.sock}}, ", ""))
        sock = socket.socket(socket.AF_UNIX)
        sock.bind(str(folder / "data.sock"))
        (folder / "data.sock").chmod(0o666)
        sock.listen(128)
        before = [sys.executable, "-c", ACTIVATOR, "1", str(sock.fileno()), "data"]

        def begun() -> Any:
            return running(folder, before=before, pass_fds=(sock.fileno(),))

        with running(far), Load(Caller(folder, port), is_kept=True) as load:
            for _ in range(3):
                with begun() as daemon:
                    seen = load.done
                    until(lambda seen=seen: load.done > seen + 30)
                    assert daemon.end(15.0) == 0
            with begun():
                seen = load.done
                until(lambda: load.done > seen + 30)
                load._ended.set()
                for thread in load._threads:
                    thread.join()
        sock.close()
    assert load.failures == []


def test_a_killed_daemon_leaves_callers_a_word_they_understand(folder: Path, application: Path) -> None:
    """SIGKILL: the data socket refuses, which is the library's sign to call by itself; and the next daemon serves again."""
    port = free_port()
    node(folder, port)
    with running(folder) as daemon:
        assert Caller(folder, port).ask()[0] == 200
        daemon.process.kill()
        daemon.process.wait(5)
        with pytest.raises(ConnectionRefusedError):
            Caller(folder, port).ask()
    with running(folder):
        assert Caller(folder, port).ask()[0] == 200
