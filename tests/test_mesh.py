"""Does a Mesh start loudly or not at all, keep serving after a bad reload, and survive a fork?"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import meshlib
from tests.support import ROOT, Request, Scripted, identities, mesh_of, ok, scripted, write_config


async def hello(server: Scripted, request: Request) -> bytes:
    return ok()


def test_an_unknown_service_is_told_with_its_near_match(tmp_path: Path) -> None:
    """What happened, the likely cause, what to do."""
    file = write_config(tmp_path, {"orders": {}, "inventory": {}})
    with pytest.raises(meshlib.ConfigError, match="order") as caught:
        meshlib.Mesh.load(file, service="order")
    assert "orders" in str(caught.value)


def test_a_missing_certificate_stops_the_start(tmp_path: Path) -> None:
    """In enforce there is no start without an identity; in observe there is."""
    (tmp_path / "identities").mkdir()
    with pytest.raises(meshlib.KeyFileError) as caught:
        meshlib.Mesh.load(write_config(tmp_path, {"me": {}}, mode="enforce"), service="me")
    assert "svid.pem" in str(caught.value)
    meshlib.Mesh.load(write_config(tmp_path, {"me": {}}, mode="observe"), service="me").close()


def test_an_unreadable_key_stops_the_start(tmp_path: Path) -> None:
    """A key that others may read is no key."""
    identities(tmp_path, "me")
    (tmp_path / "identities" / "me" / "key.pem").chmod(0o644)
    with pytest.raises(meshlib.KeyFileError) as caught:
        meshlib.Mesh.load(write_config(tmp_path, {"me": {}}, mode="enforce"), service="me")
    assert "chmod" in str(caught.value)


def test_a_certificate_of_another_trust_domain_stops_the_start(tmp_path: Path) -> None:
    """Trust domains compare by equality."""
    identities(tmp_path, "me")
    file = write_config(tmp_path, {"me": {}}, mode="enforce")
    file.write_text(file.read_text().replace("shop.internal", "other.internal"))
    with pytest.raises(meshlib.TrustDomainError):
        meshlib.Mesh.load(file, service="me")


def test_a_port_in_use_is_a_listen_error(tmp_path: Path) -> None:
    """The message names the port and how to find who has it."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"

        async def app(scope: object, receive: object, send: object) -> None: ...

        with mesh_of(tmp_path, {}) as mesh, pytest.raises(meshlib.ListenError, match="ss -ltnp"):
            mesh.serve(app, listen=address)


async def test_a_bad_reload_keeps_the_old_configuration_serving(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Logged, counted, and nothing half-applied; the next good file is taken."""
    async with scripted(hello) as one, scripted(hello) as two:
        with mesh_of(tmp_path, {"orders": {"discover": {"static": [one.address]}}}) as mesh:
            async with mesh.client() as http:
                good = mesh.config.file.read_text()
                mesh.config.file.write_text(good.replace('"orders"', '"odrers"').replace("static", "sttic"))
                with pytest.raises(meshlib.ConfigError):
                    mesh.reload()
                with caplog.at_level(logging.ERROR):
                    await mesh._reload.look()
                assert "old one stays in force" in caplog.text
                assert mesh.reload_failures >= 2
                assert (await http.get("http://orders/")).status_code == 200
                mesh.config.file.write_text(good.replace(one.address, two.address))
                mesh.reload()
                assert (await http.get("http://orders/")).status_code == 200
                assert "meshlib" in mesh.metrics()
    assert (len(one.requests), len(two.requests)) == (1, 1)


async def test_a_reload_that_fails_half_way_changes_nothing(tmp_path: Path) -> None:
    """A bad file of endpoints stops the whole change; when it is mended, the whole change comes."""
    async with scripted(hello) as one, scripted(hello) as two:
        with mesh_of(tmp_path, {"orders": {"discover": {"static": [one.address]}}}) as mesh:
            endpoints = tmp_path / "stock.yaml"
            endpoints.write_text("nonsense: {")
            services = {
                "me": {},
                "orders": {"discover": {"static": [two.address]}},
                "stock": {"discover": {"file": str(endpoints)}},
            }
            write_config(tmp_path, services)
            async with mesh.client() as http:
                with pytest.raises(meshlib.ConfigError):
                    mesh.reload()
                await http.get("http://orders/")
                with pytest.raises(meshlib.UnknownService):
                    await http.get("http://stock/")
                endpoints.write_text(json.dumps([two.address]))
                assert mesh.reload()
                await http.get("http://orders/")
                await http.get("http://stock/")
    assert (len(one.requests), len(two.requests)) == (1, 2)


async def test_identity_rotates_without_a_failed_call(tmp_path: Path) -> None:
    """Root and leaves are exchanged under load in three steps; every call succeeds and new serials are seen."""
    import ssl

    authority = identities(tmp_path, "me", "orders")
    folder = tmp_path / "identities"

    def context() -> ssl.SSLContext:
        made = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        made.load_cert_chain(folder / "orders" / "svid.pem", folder / "orders" / "key.pem")
        made.load_verify_locations(folder / "orders" / "bundle.pem")
        made.verify_mode = ssl.CERT_REQUIRED
        return made

    with mesh_of(tmp_path, {"orders": {"discover": {"static": ["127.0.0.1:1"]}}}, mode="enforce") as mesh:
        assert mesh.identity is not None
        serials = set()
        async with mesh.client() as http:
            for version, step in enumerate(("begin_rotation", "activate_rotation", "finish_rotation")):
                getattr(authority, step)()
                for service in ("me", "orders"):
                    authority.write(service, folder)
                assert mesh.identity.refresh(time.time())
                serials.add(mesh.identity.current.serial if mesh.identity.current else "")
                async with scripted(hello, ssl=context()) as server:
                    mesh.engine.resolve("orders", 10**9 + version, [(server.address, 1.0, "", {}, "")], time.monotonic())
                    for _ in range(5):
                        assert (await http.get("http://orders/")).status_code == 200
        assert len(serials) == 3


def test_a_forked_child_makes_calls_of_its_own(tmp_path: Path) -> None:
    """A client made and used before the fork works in the child, on connections of its own."""
    ready, stop = threading.Event(), threading.Event()
    servers: list[Scripted] = []

    def serve() -> None:
        async def main() -> None:
            async with scripted(hello) as server:
                servers.append(server)
                ready.set()
                while not stop.is_set():
                    await asyncio.sleep(0.01)

        asyncio.run(main())

    thread = threading.Thread(target=serve)
    thread.start()
    ready.wait(5)
    try:
        with mesh_of(tmp_path, {"orders": {"discover": {"static": [servers[0].address]}}}) as mesh, mesh.sync_client() as http:
            assert http.get("http://orders/").status_code == 200
            read, write = os.pipe()
            child = os.fork()
            if child == 0:
                try:
                    results = [http.get("http://orders/").status_code for _ in range(3)]
                    os.write(write, json.dumps([results, mesh.keeper.is_running]).encode())
                finally:
                    os._exit(0)
            os.waitpid(child, 0)
            assert json.loads(os.read(read, 1000)) == [[200, 200, 200], True]
            assert http.get("http://orders/").status_code == 200
            os.close(read)
            os.close(write)
        assert servers[0].connections == 2
    finally:
        stop.set()
        thread.join()


FORKS = """
import os, signal, sys, threading, time
import meshlib

mesh = meshlib.Mesh.load(sys.argv[1], service="me")
found = [(f"10.0.{n >> 8}.{n & 255}:80", 1.0, "", {}, "") for n in range(20_000)]
is_over = False

def change():
    version = 10**9
    while not is_over:
        mesh.engine.resolve("orders", version, found, 1.0)
        version += 1

thread = threading.Thread(target=change)
thread.start()
lost = 0
for n in range(5):
    time.sleep(0.05)
    child = os.fork()
    if child == 0:
        signal.alarm(10)
        mesh.engine.resolve("orders", 10**10, found[:5], 2.0)
        mesh.engine.begin("orders", "GET", "/", [], 2.0)
        os._exit(0)
    lost += os.waitpid(child, 0)[1] != 0
is_over = True
thread.join()
print("lost", lost)
"""


def test_a_child_that_is_forked_during_a_change_can_go_on(tmp_path: Path) -> None:
    """Another thread's change of the endpoints is finished before the fork, or it would stay half made in the child for ever."""
    balance = {"policy": "maglev", "hash_on": [{"header": "x"}]}
    services = {"me": {}, "orders": {"discover": {"static": ["127.0.0.1:1"]}, "balance": balance}}
    file = write_config(tmp_path, services, mode="observe")
    done = subprocess.run([sys.executable, "-c", FORKS, str(file)], capture_output=True, text=True, timeout=100, cwd=ROOT)
    assert done.stdout.strip() == "lost 0", done.stderr


def test_a_mesh_that_was_closed_and_is_started_again_takes_new_certificates(tmp_path: Path) -> None:
    """As a server does that loads it before its workers are forked: closing ends the work, not the knowledge of where to look."""
    authority = identities(tmp_path, "me")
    with mesh_of(tmp_path, {}, mode="permissive") as mesh:
        mesh.start()
        mesh.close()
        mesh.start()
        assert mesh.identity is not None
        before = mesh.identity.current
        authority.write("me", tmp_path / "identities")
        assert mesh.identity.refresh(time.time())
        assert mesh.identity.current != before
