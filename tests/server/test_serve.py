"""Which server for which application, at which address, and what is said when that can't be? `meshlib serve`, uvicorn and gunicorn as commands."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import signal
import socket
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import meshlib
from meshlib import errors
from meshlib.cli import serve as command
from meshlib.server import door as doors
from meshlib.server import serve as serving
from meshlib.server.asgi import MeshASGI
from meshlib.server.listeners import Listeners
from meshlib.server.serve import bind, speaks_asgi, wrapped
from meshlib.server.wsgi import MeshWSGI
from tests.server.inside import way
from tests.support import PYTHON, ROOT, free_port, identities, mesh_of, process, wait_until_listening, write_config

MESHLIB = str(Path(PYTHON).parent / "meshlib")


async def asgi_function(scope: Any, receive: Any, send: Any) -> None: ...


def asgi_plain(scope: Any, receive: Any, send: Any) -> Any: ...


def wsgi_function(environ: Any, start_response: Any) -> Any: ...


def wsgi_with_more(environ: Any, start_response: Any, *, debug: bool = False) -> Any: ...


class AsgiObject:
    async def __call__(self, scope: Any, receive: Any, send: Any) -> None: ...

    async def method(self, scope: Any, receive: Any, send: Any) -> None: ...


class WsgiObject:
    def __call__(self, environ: Any, start_response: Any) -> Any: ...

    def method(self, environ: Any, start_response: Any) -> Any: ...


@pytest.mark.parametrize(
    ("app", "is_asgi"),
    [
        (asgi_function, True), (asgi_plain, True), (AsgiObject(), True), (AsgiObject().method, True), (MeshASGI(asgi_function, way()), True),
        (wsgi_function, False), (wsgi_with_more, False), (WsgiObject(), False), (WsgiObject().method, False), (MeshWSGI(wsgi_function, way()), False),
    ],
)  # fmt: skip
def test_an_application_is_known_by_how_it_is_called(app: Any, is_asgi: bool) -> None:
    """Two arguments or three."""
    assert speaks_asgi(app) is is_asgi


def test_frameworks_are_known() -> None:
    """The real ones."""
    from fastapi import FastAPI
    from flask import Flask

    assert speaks_asgi(FastAPI())
    assert not speaks_asgi(Flask("x"))


@pytest.mark.parametrize(
    ("app", "hint"),
    [
        ("app:app", "module:app"),
        (AsgiObject, "instance"),
        (lambda: None, "--asgi or --wsgi"),
        (lambda scope: None, "module:make()"),
    ],
)
def test_what_is_no_application_is_refused(app: Any, hint: str) -> None:
    """With a word on what to name instead."""
    with pytest.raises(errors.ConfigError) as caught:
        if speaks_asgi(app):
            raise AssertionError
    assert hint in str(caught.value)


def test_an_application_that_has_the_mesh_is_not_wrapped_again(tmp_path: Path) -> None:
    """`app = mesh.asgi(app)` in the module, and `meshlib serve module:app`."""
    inside = MeshASGI(asgi_function, way())
    with mesh_of(tmp_path, {"other": {}}) as mesh:
        assert wrapped(mesh, inside, is_asgi=True) is inside
        assert isinstance(wrapped(mesh, asgi_function, is_asgi=True), MeshASGI)
        assert isinstance(wrapped(mesh, wsgi_function, is_asgi=False), MeshWSGI)


# ------------------------------------------------------------------------------------------------ the address


def test_a_port_in_use_is_an_error_with_a_way_out() -> None:
    """What happened, who it may be, what to do."""
    with bind("127.0.0.1:0") as sock:
        port = sock.getsockname()[1]
        with pytest.raises(errors.ListenError, match="Address already in use") as caught:
            bind(f"127.0.0.1:{port}")
        assert f":{port}" in caught.value.hint
        assert "another port" in caught.value.hint


@pytest.mark.parametrize(
    ("code", "hint"),
    [
        (errno.EACCES, "1024"),
        (errno.EADDRNOTAVAIL, "0.0.0.0"),
        (errno.EADDRINUSE, "Another process"),
        (errno.EIO, "operating system"),
    ],
)
def test_each_reason_has_its_way_out(monkeypatch: pytest.MonkeyPatch, code: int, hint: str) -> None:
    """No permission, no such address."""

    class Refusing(socket.socket):
        def bind(self, address: Any) -> None:
            raise OSError(code, os.strerror(code))

    monkeypatch.setattr(socket, "socket", Refusing)
    with pytest.raises(errors.ListenError) as caught:
        bind("127.0.0.1:80")
    assert hint in caught.value.hint
    assert os.strerror(code) in str(caught.value)


@pytest.mark.parametrize("address", ["8000", "localhost", "127.0.0.1:http", "127.0.0.1:99999", "no-such-host.invalid:80", ""])
def test_what_is_no_address_is_refused(address: str) -> None:
    """Before anything is started."""
    with pytest.raises(errors.ListenError):
        bind(address)


@pytest.mark.parametrize(
    ("address", "family"), [("127.0.0.1:0", socket.AF_INET), ("[::1]:0", socket.AF_INET6), ("localhost:0", None), (":0", None)]
)
def test_addresses_of_all_kinds(address: str, family: int | None) -> None:
    """Names and both families."""
    try:
        with bind(address) as sock:
            assert family in (None, sock.family)
    except errors.ListenError as error:
        if "::1" not in address:
            raise
        pytest.skip(f"no IPv6 here: {error}")


def test_a_socket_that_was_handed_over_is_taken() -> None:
    """As a supervisor keeps it over our restarts; one that does not listen is none."""
    with bind("127.0.0.1:0") as kept:
        with bind(f"fd:{os.dup(kept.fileno())}") as sock:
            assert sock.getsockname() == kept.getsockname()
    with socket.socket() as deaf:
        copy = os.dup(deaf.fileno())
        with pytest.raises(errors.ListenError, match="does not listen"):
            bind(f"fd:{copy}")
    for address in ("fd:x", "fd:987654"):
        with pytest.raises(errors.ListenError):
            bind(address)


def test_a_service_without_an_address_says_where_to_set_it(tmp_path: Path) -> None:
    """`listen` is optional in mesh.yaml, and needed here."""
    with mesh_of(tmp_path, {"other": {}}) as mesh, pytest.raises(errors.ConfigError, match=r"services\.me\.listen"):
        serving.serve(mesh, wsgi_function)


# ------------------------------------------------------------------------------------------------ the command


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def test_an_application_is_found_by_its_name(module: Path) -> None:
    """Attributes of attributes, and functions that make it."""
    (module / "found_app.py").write_text("class box: app = 1\ndef make(): return box\n")
    assert command.find("found_app:box.app") == 1
    assert command.find("found_app:make()").app == 1


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("app", "module:attribute"),
        (":app", "module:attribute"),
        ("nowhere_at_all:app", "no module"),
        ("found_none:app", "has no 'app'"),
        ("found_none.x:y", "no module"),
    ],
)
def test_a_name_that_leads_nowhere_is_an_error_with_a_way_out(module: Path, name: str, text: str) -> None:
    """Not a traceback."""
    (module / "found_none.py").write_text("")
    with pytest.raises(errors.ConfigError, match=text):
        command.find(name)


def test_a_module_that_misses_another_says_so(module: Path) -> None:
    """The mistake is in the module, not in its name."""
    (module / "found_broken.py").write_text("import no_such_thing_here")
    with pytest.raises(ModuleNotFoundError, match="no_such_thing_here"):
        command.find("found_broken:app")


def test_the_mesh_is_the_one_that_the_application_has_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By `mesh.asgi` or a framework's integration; where there is none yet, it is loaded."""
    with mesh_of(tmp_path, {"other": {}}) as mesh:
        monkeypatch.setattr(doors, "_latest", None)
        mesh.asgi(asgi_function)
        assert command.mesh_of_process() is mesh
        monkeypatch.setattr(doors, "_latest", None)
        monkeypatch.setenv("MESHLIB_CONFIG", str(tmp_path / "mesh.yaml"))
        monkeypatch.setenv("MESHLIB_SERVICE", "other")
        loaded: Any = command.mesh_of_process()
        assert (loaded is mesh, loaded.service) == (False, "other")
        loaded.close()


APP = """
import json, os
import meshlib
from meshlib.server.door import way_into
from meshlib.server.asgi import MeshASGI
from meshlib.server.wsgi import MeshWSGI

mesh = meshlib.Mesh.load()

async def bare(scope, receive, send):
    if scope["type"] == "lifespan":
        while True:
            message = await receive()
            await send({"type": message["type"] + ".complete"})
            if message["type"].endswith("shutdown"):
                return
    body = json.dumps({"peer": meshlib.peer().spiffe_id, "pid": os.getpid(), "keeper": mesh.keeper.is_running}).encode()
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(body))]})
    await send({"type": "http.response.body", "body": body})

def bare_wsgi(environ, start_response):
    body = json.dumps({"peer": meshlib.peer().spiffe_id, "pid": os.getpid(), "keeper": mesh.keeper.is_running}).encode()
    start_response("200 OK", [("Content-Length", str(len(body)))])
    return [body]

app = MeshASGI(bare, way_into(mesh))
wsgi = MeshWSGI(bare_wsgi, way_into(mesh))
"""


class Shop:
    """Two services with certificates, and an application of one of them in a module."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = free_port()
        identities(folder, "shop", "web")
        (folder / "shop_app.py").write_text(APP)
        rules = {"allow": [{"name": "web", "from": ["web"]}]}
        shop = {"listen": f"127.0.0.1:{self.port}", "discover": {"static": [f"127.0.0.1:{self.port}"]}, "secure": rules}
        # A listener takes connections before the workers behind it have started.
        self.config = write_config(folder, {"shop": shop, "web": {}}, mode="enforce", admit={"connect": 20})
        self.env = {"PYTHONPATH": f"{folder}:{ROOT}", "MESHLIB_CONFIG": str(self.config), "MESHLIB_SERVICE": "shop"}

    def ask(self, count: int = 1) -> list[dict[str, Any]]:
        mesh = meshlib.Mesh.load(self.config, service="web")
        try:
            with mesh.sync_client() as http:
                answers = [http.get("http://shop/items/7") for _ in range(count)]
        finally:
            mesh.close()
        assert [answer.status_code for answer in answers] == [200] * count
        return [answer.json() for answer in answers]


@pytest.fixture
def shop(tmp_path: Path) -> Shop:
    return Shop(tmp_path)


UVICORN = (PYTHON, "-m", "uvicorn", "shop_app:app", "--http", "meshlib.server.uvicorn:MeshHTTP")
GUNICORN = (PYTHON, "-m", "gunicorn", "-k")


@pytest.mark.parametrize(
    ("words", "port_option"),
    [
        ((*UVICORN,), "--port={}"),
        ((*UVICORN, "--loop", "asyncio", "--workers", "2"), "--port={}"),
        ((*GUNICORN, "meshlib.server.gunicorn.SyncWorker", "shop_app:wsgi", "--workers", "4"), "--bind=127.0.0.1:{}"),
        (
            (*GUNICORN, "meshlib.server.gunicorn.ThreadWorker", "shop_app:wsgi", "--workers", "4", "--threads", "4", "--preload"),
            "--bind=127.0.0.1:{}",
        ),
        ((*GUNICORN, "meshlib.server.gunicorn.ASGIWorker", "shop_app:app", "--workers", "2", "--preload"), "--bind=127.0.0.1:{}"),
    ],
    ids=["uvicorn", "uvicorn-workers", "gunicorn-sync", "gunicorn-gthread-preload", "gunicorn-asgi-preload"],
)
def test_the_servers_own_commands_speak_for_the_mesh(shop: Shop, words: tuple[str, ...], port_option: str) -> None:
    """By a class that they name; the mesh is the one that the application made, and lives in each process."""
    with process(*words, port_option.format(shop.port), env=shop.env, cwd=shop.folder) as child:
        wait_until_listening(shop.port, child)
        answers = shop.ask(30)
    assert {answer["peer"] for answer in answers} == {"spiffe://shop.internal/ns/default/sa/web"}
    assert all(answer["keeper"] for answer in answers)


@pytest.mark.parametrize("name", ["shop_app:bare", "shop_app:app", "shop_app:bare_wsgi", "shop_app:wsgi"])
def test_meshlib_serve_takes_applications_with_and_without_a_mesh(shop: Shop, name: str) -> None:
    """At the service's own address, and with its certificate."""
    with process(MESHLIB, "serve", name, env=shop.env, cwd=shop.folder) as child:
        wait_until_listening(shop.port, child)
        assert shop.ask()[0]["peer"].endswith("/web")
        child.send_signal(signal.SIGTERM)
        assert child.wait(15) == 0


def test_meshlib_serve_with_a_port_in_use_ends_with_the_reason(shop: Shop) -> None:
    """Exit code 1, no traceback, and nothing is left running."""
    with bind(f"127.0.0.1:{shop.port}"):
        for name in ("shop_app:bare", "shop_app:bare_wsgi"):
            done = subprocess.run(
                [MESHLIB, "serve", name],
                env={**os.environ, **shop.env},
                cwd=shop.folder,
                capture_output=True,
                text=True,
                timeout=30,
            )
            assert done.returncode == 1
            assert "Address already in use" in done.stderr
            assert "Traceback" not in done.stderr


def test_meshlib_serve_with_a_wrong_name_ends_with_the_reason(shop: Shop) -> None:
    """Exit code 2: bad input."""
    for words in (
        ["shop_app:nothing"],
        ["nothing:app"],
        ["shop_app:bare", "--workers", "0"],
        ["shop_app:bare", "--service", "nobody"],
    ):
        done = subprocess.run(
            [MESHLIB, "serve", *words],
            env={**os.environ, **shop.env},
            cwd=shop.folder,
            capture_output=True,
            text=True,
            timeout=30,
        )
        assert (done.returncode, "Traceback" in done.stderr) == (2, False), done.stderr


def test_nothing_listens_before_there_is_an_identity(shop: Shop) -> None:
    """Mode enforce without a certificate is no mode at all."""
    shutil.rmtree(shop.folder / "identities" / "shop")
    done = subprocess.run(
        [MESHLIB, "serve", "shop_app:bare"],
        env={**os.environ, **shop.env},
        cwd=shop.folder,
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr


def test_after_the_end_nothing_is_left(shop: Shop) -> None:
    """Neither a worker nor a listener."""
    with process(MESHLIB, "serve", "shop_app:bare_wsgi", "--workers", "3", env=shop.env, cwd=shop.folder) as child:
        wait_until_listening(shop.port, child)
        pids = {answer["pid"] for answer in shop.ask(10)}
        child.send_signal(signal.SIGINT)
        assert child.wait(15) == 0
    end = time.monotonic() + 5
    while any(Path(f"/proc/{pid}").exists() for pid in pids) and time.monotonic() < end:
        time.sleep(0.05)
    assert [pid for pid in pids if Path(f"/proc/{pid}").exists()] == []
    with bind(f"127.0.0.1:{shop.port}"):
        pass


# ------------------------------------------------------------------------------------------------ before the fork

EARLY = """
import asyncio, os
import meshlib

mesh = meshlib.Mesh.load()
# Used before the fork, as code at a module's top is: connections, sessions and threads of this process, which the workers must not take over.
sync, http = mesh.sync_client(), mesh.client()
assert sync.get("http://stock/import").status_code == 200

async def warm():
    async with mesh.client() as early:
        assert (await early.get("http://stock/import")).status_code == 200

asyncio.run(warm())

def bare_wsgi(environ, start_response):
    answer = sync.get("http://stock/item")
    body = b"%d %d" % (answer.status_code, os.getpid())
    start_response("200 OK", [("Content-Length", str(len(body)))])
    return [body]

async def bare(scope, receive, send):
    if scope["type"] == "lifespan":
        while True:
            message = await receive()
            await send({"type": message["type"] + ".complete"})
            if message["type"].endswith("shutdown"):
                return
    answer = await http.get("http://stock/item")
    body = b"%d %d" % (answer.status_code, os.getpid())
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(body))]})
    await send({"type": "http.response.body", "body": body})

wsgi, app = mesh.wsgi(bare_wsgi), mesh.asgi(bare)
"""
STOCK = """
def app(environ, start_response):
    start_response("200 OK", [("Content-Length", "2")])
    return [b"ok"]
"""
WORKERS = "meshlib.server.gunicorn."


@pytest.mark.parametrize(
    "words",
    [
        *(
            (*GUNICORN, f"{WORKERS}{kind}", f"early_app:{app}", "--workers", "4", "--bind=127.0.0.1:{port}", *more, *preload)
            for kind, app, more in (
                ("SyncWorker", "wsgi", ()),
                ("ThreadWorker", "wsgi", ("--threads", "4")),
                ("ASGIWorker", "app", ()),
            )
            for preload in ((), ("--preload",))
        ),
        (MESHLIB, "serve", "early_app:wsgi", "--workers", "4"),
        (MESHLIB, "serve", "early_app:app", "--workers", "4"),
    ],
    ids=["sync", "sync-preload", "gthread", "gthread-preload", "asgi", "asgi-preload", "serve-wsgi", "serve-asgi"],
)
def test_a_client_that_was_used_at_import_works_in_every_worker(tmp_path: Path, words: tuple[str, ...]) -> None:
    """Four of them, over mTLS: no call fails, neither at once nor side by side."""
    identities(tmp_path, "shop", "stock", "web")
    (tmp_path / "early_app.py").write_text(EARLY)
    (tmp_path / "stock_app.py").write_text(STOCK)
    port, stock_port = free_port(), free_port()
    allow = {"allow": [{"name": "all", "from": ["web", "shop"]}]}
    services = {
        name: {
            "listen": f"127.0.0.1:{each}",
            "discover": {"static": [f"127.0.0.1:{each}"]},
            "secure": allow,
            "admit": {"connect": 20},
        }
        for name, each in (("shop", port), ("stock", stock_port))
    }
    config = write_config(tmp_path, {**services, "web": {}}, mode="enforce")
    env = {"PYTHONPATH": f"{tmp_path}:{ROOT}", "MESHLIB_CONFIG": str(config)}
    stock = (MESHLIB, "serve", "stock_app:app", "--service", "stock")
    with contextlib.ExitStack() as stack:
        first = stack.enter_context(process(*stock, env=env, cwd=tmp_path))
        wait_until_listening(stock_port, first)
        shop = stack.enter_context(
            process(*(word.format(port=port) for word in words), env={**env, "MESHLIB_SERVICE": "shop"}, cwd=tmp_path)
        )
        wait_until_listening(port, shop)
        mesh = meshlib.Mesh.load(config, service="web")
        stack.callback(mesh.close)
        workers = children(shop.pid, 4)
        with ThreadPoolExecutor(8) as pool:
            for alone in workers:
                others = [pid for pid in workers if pid != alone]
                try:
                    for pid in others:
                        os.kill(pid, signal.SIGSTOP)
                    answers = list(pool.map(lambda _: _fresh(mesh), range(16)))
                finally:
                    for pid in others:
                        os.kill(pid, signal.SIGCONT)
                assert answers == [(b"200", b"%d" % alone)] * 16


def children(pid: int, count: int, seconds: float = 20.0) -> list[int]:
    """The workers of a watcher, as soon as there are so many."""
    end = time.monotonic() + seconds
    while True:
        found = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
        if len(found) == count:
            return found
        assert time.monotonic() < end, "the workers don't start"
        time.sleep(0.05)


def _fresh(mesh: meshlib.Mesh) -> tuple[bytes, bytes]:
    """By a connection of its own, so that all workers come to it."""
    with mesh.sync_client() as http:
        answer = http.get("http://shop/items")
    assert answer.status_code == 200, answer.text
    status, pid = answer.content.split()
    return status, pid


def test_the_log_names_every_address(tmp_path: Path) -> None:
    """One line, with all listeners."""
    with bind("127.0.0.1:0") as one, bind("127.0.0.1:0") as two:
        ports = [sock.getsockname()[1] for sock in (one, two)]
    listeners = Listeners("127.0.0.1:0", f"127.0.0.1:{ports[0]}", f"127.0.0.1:{ports[1]}")
    mine = listeners.mesh.getsockname()[1]
    assert str(listeners) == f"127.0.0.1:{mine}, public 127.0.0.1:{ports[0]}, probes 127.0.0.1:{ports[1]}"
    assert len(listeners.serving) == 2
    listeners.close()
    with Listeners("127.0.0.1:0").mesh as alone:
        assert alone.fileno() > 0


def test_all_addresses_or_none(tmp_path: Path) -> None:
    """Where the last can't be had, those before it are let go."""
    with bind("127.0.0.1:0") as taken:
        port = free_port()
        with pytest.raises(errors.ListenError):
            Listeners(f"127.0.0.1:{port}", None, f"127.0.0.1:{taken.getsockname()[1]}")
        with bind(f"127.0.0.1:{port}"):
            pass
