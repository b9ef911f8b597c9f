"""Does a system that never stops turning its certificates over ever fail, and does what was withdrawn cease to count at once?

The real CA writes into the folders from which a real server process and the mesh of this process take their identities, under a
steady load in which every call is a new connection. Two things are measured: that nothing fails, and how soon the new certificate is
the one that is shown. Then a root goes, and whatever was signed under it is tried over and over, in full and resumed.

The short form is part of the suite. `ROTATION_SECONDS=60` is the long one:

    ROTATION_SECONDS=60 python -m pytest tests/chaos/test_rotation.py --timeout 300
"""

from __future__ import annotations

import asyncio
import bisect
import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509

from meshlib import errors
from meshlib._native import core
from meshlib.secure import certificates
from tests.support import PYTHON, TRUST_DOMAIN, free_port, identities, mesh_of, process, wait_until_listening, write_config
from tests.wire.foreign import our_server

SECONDS = float(os.environ.get("ROTATION_SECONDS", "12"))
EVERY = 2.0
RATE = 50.0
# Whoever asks after this time after a turn gets the new one.
SOON = 1.0
ID = f"spiffe://{TRUST_DOMAIN}/ns/default/sa/"

APP = """
import json

async def app(scope, receive, send):
    if scope["type"] != "http":
        return
    import meshlib
    from meshlib.server.door import latest
    door = latest()
    said = {"serial": meshlib.peer().serial, "failed": door.failed, "handshakes": door.handshakes}
    body = json.dumps(said).encode()
    headers = [(b"content-length", b"%d" % len(body)), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})
"""

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]


# ------------------------------------------------------------------ what is measured


def plain(serial: str) -> str:
    """A serial number as a number is written."""
    return serial.lstrip("0")


@dataclass
class Turns:
    """The serial numbers of a service, by when they were written."""

    moments: list[float] = field(default_factory=list)
    serials: list[str] = field(default_factory=list)

    def note(self, serial: str) -> None:
        self.moments.append(time.monotonic())
        self.serials.append(plain(serial))

    def age_of(self, serial: str, begun: float) -> float:
        """How long before `begun` the certificate was replaced; 0.0 for the newest."""
        number = self.serials.index(plain(serial))
        newest = bisect.bisect_right(self.moments, begun) - 1
        return begun - self.moments[number + 1] if number < newest else 0.0


@dataclass
class Seen:
    """What the connections of one side showed: when they were begun, and the serial number."""

    connections: list[tuple[float, str]] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def note(self, begun: float, serial: str) -> None:
        self.connections.append((begun, serial))

    def share_of_new(self, turns: Turns) -> float:
        """Of all connections, those that showed the newest certificate, or one that was replaced less than a second before."""
        ages = [turns.age_of(serial, begun) for begun, serial in self.connections]
        return sum(age <= SOON for age in ages) / len(ages)


def serial_of(wire: core.HttpConnection) -> str:
    return f"{x509.load_der_x509_certificate(wire.peer_chain[0]).serial_number:x}"


def shake_hands(tls: core.TlsClient, port: int, expected: str) -> core.HttpConnection:
    """A handshake and one request on it, so that a late refusal is heard. Raises what our TLS or the socket raises."""
    wire = core.HttpConnection(tls, expected, f"127.0.0.1:{port}")
    with socket.create_connection(("127.0.0.1", port), timeout=5) as plug:
        plug.sendall(wire.open())
        wire.send("GET", "/", [(b"host", b"orders")], None, False)
        events: list[tuple[Any, ...]] = []
        while not any(event[0] in {core.EVENT_HEAD, core.EVENT_RESPONSE} for event in events):
            data = plug.recv(65536)
            out, new = wire.receive(data, len(data)) if data else (b"", wire.receive_eof())
            plug.sendall(out)
            events += new
        with contextlib.suppress(OSError):
            plug.sendall(wire.close())
    return wire


@contextlib.contextmanager
def orders(folder: Path, services: dict[str, Any], port: int) -> Iterator[None]:
    """The server: a process of its own, started as one does."""
    (folder / "app.py").write_text(APP)
    allow = [{"name": "callers", "from": ["me"], "methods": ["GET"]}]
    mine = {"orders": {"listen": f"127.0.0.1:{port}", "discover": {"static": [f"127.0.0.1:{port}"]}, "secure": {"allow": allow}}}
    (folder / "server").mkdir()
    (folder / "server" / "identities").symlink_to(folder / "identities")
    file = write_config(folder / "server", {**mine, "me": {}}, mode="enforce")
    command = (str(Path(PYTHON).parent / "meshlib"), "serve", "app:app", "--config", str(file), "--service", "orders")
    with process(*command, env={"PYTHONPATH": str(folder)}, cwd=folder) as child:
        wait_until_listening(port, child)
        services["orders"] = {"discover": {"static": [f"127.0.0.1:{port}"]}}
        yield


# ------------------------------------------------------------------ turning over


async def test_certificates_turn_over_under_load_and_nothing_fails(tmp_path: Path) -> None:
    """Both sides every two seconds, 50 new connections a second: no failed handshake, no failed call, and the new one within a second."""
    authority = identities(tmp_path, "me", "orders")
    turns = {name: Turns() for name in ("me", "orders")}
    seen = {name: Seen() for name in turns}
    services: dict[str, Any] = {}
    port = free_port()
    with orders(tmp_path, services, port), mesh_of(tmp_path, services, mode="enforce") as mesh:
        async with mesh.client() as http:
            is_over = asyncio.Event()

            async def turn_over() -> None:
                while not is_over.is_set():
                    for name, own in turns.items():
                        own.note((await asyncio.to_thread(authority.write, name, tmp_path / "identities")).serial)
                    with contextlib.suppress(TimeoutError):
                        await asyncio.wait_for(is_over.wait(), EVERY)

            async def call() -> None:
                begun = time.monotonic()
                try:
                    answer = await http.get("http://orders/")
                    answer.raise_for_status()
                    seen["me"].note(begun, answer.json()["serial"])
                except Exception as error:
                    seen["me"].failures.append(repr(error))

            async def probe() -> None:
                """One that looks at the certificate of the server, with the identity of this moment."""
                store, begun = mesh.identity, time.monotonic()
                assert store is not None and store.client_tls is not None
                try:
                    wire = await asyncio.to_thread(shake_hands, store.client_tls, port, ID + "orders")
                    seen["orders"].note(begun, serial_of(wire))
                except Exception as error:
                    seen["orders"].failures.append(repr(error))

            turning = asyncio.create_task(turn_over())
            await asyncio.sleep(SOON + 0.5)  # what was there before has been replaced, on both sides
            begun, tasks, number = time.monotonic(), [], 0
            while (now := time.monotonic()) < begun + SECONDS:
                # As many as are due: a slow moment is made up for.
                while number < (now - begun) * RATE:
                    tasks.append(asyncio.create_task(probe() if number % 5 == 0 else call()))
                    number += 1
                await asyncio.sleep(1 / RATE)
            await asyncio.gather(*tasks)
            is_over.set()
            await turning
            last = (await http.get("http://orders/")).json()
            stats = mesh.identity.tls_stats()["client"] if mesh.identity is not None else {}
    shares = {name: seen[name].share_of_new(turns[name]) for name in turns}
    rotations = len(turns["orders"].serials)
    print(
        f"{number} connections in {SECONDS:.0f} s, {rotations} turns, new within {SOON:.0f} s: {shares}; {stats}; server {last}"
    )
    assert {name: seen[name].failures for name in seen} == {name: [] for name in seen}
    assert (stats["failed"], last["failed"]) == (0, 0)
    assert last["handshakes"] >= number >= SECONDS * RATE * 0.9
    assert stats["resumed"] > 0 and rotations >= SECONDS / EVERY
    assert {name: share >= 0.99 for name, share in shares.items()} == {name: True for name in shares}, shares


# ------------------------------------------------------------------ a root that goes


def accepted_for(seconds: float, attempt: Callable[[], object], begun: float) -> tuple[float, int]:
    """Tries over and over; how long after `begun` the last try began that was not refused, and how many were refused."""
    last, refused = 0.0, 0
    while (now := time.monotonic()) < begun + seconds:
        try:
            attempt()
        except (errors.MeshError, OSError):
            refused += 1
        else:
            last = now - begun
        time.sleep(0.02)
    return last, refused


@pytest.mark.parametrize("withdrawn", ["root", "certificates"])
def test_what_was_withdrawn_is_refused_within_a_second(tmp_path: Path, withdrawn: str) -> None:
    """A root that left the bundle, or certificates that were revoked: by servers and by clients, in full and resumed. A connection
    that is open comes to its end, and whoever has a new certificate goes on."""
    authority = identities(tmp_path, "me", "orders", "legacy")
    folder = tmp_path / "identities"
    chains = {name: (folder / name / "svid.pem").read_bytes() for name in ("me", "legacy")}
    keys = {name: (folder / name / "key.pem").read_bytes() for name in chains}
    services: dict[str, Any] = {}
    port = free_port()
    with contextlib.ExitStack() as stack:
        stack.enter_context(orders(tmp_path, services, port))
        if withdrawn == "root":
            authority.begin_rotation()
            authority.publish(folder)
        trusted = {TRUST_DOMAIN: authority.bundle}
        # A server and a caller that go on showing what they have, and believe whoever there is.
        legacy = stack.enter_context(our_server(core.TlsServer(chains["legacy"], keys["legacy"], trusted, 1, True)))
        services["legacy"] = {"discover": {"static": [f"127.0.0.1:{legacy.port}"]}}
        mesh = stack.enter_context(mesh_of(tmp_path, services, mode="enforce"))
        http = stack.enter_context(mesh.sync_client())
        resuming = core.TlsClient(chains["me"], keys["me"], trusted, 1)

        def fully() -> core.HttpConnection:
            return shake_hands(core.TlsClient(chains["me"], keys["me"], trusted, 1), port, ID + "orders")

        time.sleep(1.5)
        if withdrawn == "root":
            authority.activate_rotation()
        authority.reissue(folder)
        time.sleep(1.5)
        # Up to now both stand well, and resume.
        assert [shake_hands(resuming, port, ID + "orders").tls_resumed for _ in range(2)] == [False, True]
        assert [http.get("http://legacy/").status_code for _ in range(2)] == [200, 200]
        assert legacy.resumed[-1] is True
        opened = stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=30))
        kept = core.HttpConnection(resuming, ID + "orders", f"127.0.0.1:{port}")
        opened.sendall(kept.open())
        while not kept.is_open:
            data = opened.recv(65536)
            opened.sendall(kept.receive(data, len(data))[0])

        if withdrawn == "root":
            authority.finish_rotation(force=True)
        else:
            for chain in chains.values():
                authority.revoke(certificates.serial_of(x509.load_pem_x509_certificate(chain)))
        authority.publish(folder)
        begun = time.monotonic()
        results: dict[str, tuple[float, int]] = {}

        def note(name: str, attempt: Callable[[], object]) -> threading.Thread:
            def run() -> None:
                results[name] = accepted_for(3.0, attempt, begun)

            thread = threading.Thread(target=run)
            thread.start()
            return thread

        tries = {
            "server, full": fully,
            "server, resumed": lambda: shake_hands(resuming, port, ID + "orders"),
            "client": lambda: http.get("http://legacy/").raise_for_status(),
        }
        waiting = threading.Thread(target=lambda: results.update(opened=(_ended(opened, begun), 10)))
        waiting.start()
        for thread in [note(name, attempt) for name, attempt in tries.items()]:
            thread.join()
        waiting.join()
        assert http.get("http://orders/").status_code == 200
    ended, _ = results.pop("opened")
    said = {name: f"{last:.2f} s, then {refused} refusals" for name, (last, refused) in results.items()}
    print(f"{withdrawn}: accepted for the last time after {said}; the open connection ended after {ended:.2f} s")
    assert {name: last <= SOON for name, (last, _) in results.items()} == {name: True for name in tries}, said
    assert all(refused >= 10 for _, refused in results.values()), said
    assert ended < 30


def _ended(plug: socket.socket, begun: float) -> float:
    """How long after `begun` the other side ended it."""
    with contextlib.suppress(ConnectionError):
        while plug.recv(65536):
            pass
    return time.monotonic() - begun
